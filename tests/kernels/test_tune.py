"""tune: candidates race at an op's inputs, wrong ones are out, and the winners become rows that launch_config finds."""

import json

import pytest
import torch

from lpmrf_kernels import euler_step, launch, registry, tune
from lpmrf_kernels.launch import choices
from lpmrf_kernels.registry import OPS, Kernel, Op

CPU = torch.device("cpu")
X = torch.arange(12.0)


@pytest.fixture
def toy(monkeypatch):
    """An op `toy`, its launch choice in its hands: TILE 3 gives wrong values, TILE 5 does not launch."""
    log = []

    def triton(x, factor):
        config = launch.launch_config("toy", torch.device("cuda"), {"TILE": 1, "num_warps": 4}, numel=x.numel())
        log.append(config["TILE"])
        if config["TILE"] == 5:
            raise RuntimeError("out of resources")
        return x * factor + (config["TILE"] == 3)

    op = Op(
        "toy",
        forward={"triton": Kernel(triton), "torch": Kernel(lambda x, factor: x * factor)},
        candidates={"toy": choices(TILE=(1, 2, 3, 4, 5), num_warps=(4,)) + [{"WIDTH": 9}]},
        tune_inputs=lambda device: [(X, 2.0), (X, 3.0), (torch.cat([X, X]), 2.0)],
    )
    monkeypatch.setattr(registry, "OPS", {"toy": op})
    monkeypatch.setattr(registry, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(torch.ops.lpmrf, "toy", lambda *args: registry.run("toy", *args), raising=False)
    return op, log


def test_the_fastest_right_candidate_wins(toy):
    op, log = toy
    seconds = {1: 3.0, 2: 2.0, 3: 0.1, 4: 4.0, 5: 0.1}

    def measure(call):
        call()
        return seconds[log[-1]]

    rows = tune.tune_op(op, CPU, measure)
    assert [(row.name, row.sizes, row.choice) for row in rows] == [
        ("toy", {"numel": 12}, {"TILE": 2, "num_warps": 4}),
        ("toy", {"numel": 24}, {"TILE": 2, "num_warps": 4}),
    ]
    assert "toy at numel=12: TILE=2 num_warps=4, 2000000.0 us, 1.50x the heuristic's choice" == str(rows[0])


def test_a_backward_is_timed_where_an_input_requires_grad(toy, monkeypatch):
    x = X.clone().requires_grad_()
    monkeypatch.setattr(torch.ops.lpmrf, "toy", lambda x, factor: x * factor, raising=False)
    assert len(tune._caller("toy", (X, 2.0))()) == 1
    output, gradient = tune._caller("toy", (x, 2.0))()
    assert torch.equal(gradient, torch.full_like(x, 2))


def test_candidates_fit_the_kernels(interpreted):
    """Every candidate of every op has the heuristic's keys, launches, and gives the heuristic's values."""

    def heads(*shape):
        return [torch.randn(shape).half().requires_grad_() for _ in range(3)]

    x, weight = torch.randn(1, 48, 3, 5, requires_grad=True), torch.randn(48, 1, 3, 3)
    small = {
        "geglu": (x, False),
        "dwconv_geglu": (x, weight, None, True),
        "dwconv_rope_qkv": (x, 2, weight, None, None, None, None, 1e-6),
        "attention": (*heads(1, 1, 20, 8), 0.3),
        "neighborhood_attention_2d": (*heads(1, 5, 4, 1, 8), 3, 0.3),
        "window_attention": (torch.randn(1, 4, 4, 24, requires_grad=True), torch.randn(1, 4, 4), 2, 1, 0.3),
        "output_euler": (
            torch.randn(1, 5, 3, 4),
            torch.ones(5),
            1e-6,
            torch.randn(3, 5),
            None,
            torch.zeros(1, 3, 3, 4),
            0.1,
            (1, 1),
        ),
        "euler_step": (torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7), 0.5),
        "add_source_noise": (torch.zeros(2, 3, 5, 7), 0.1, torch.tensor([1, 2])),
        "to_uint8": (torch.rand(2, 3, 5, 7), 0.0, 1.0, "channels_last"),
        "from_uint8": (torch.ones(2, 3, 5, 7, dtype=torch.uint8), 0.0, 1.0, torch.float32, "channels_last"),
    }
    x = torch.randn(2, 5, 6, 8).permute(0, 3, 1, 2).requires_grad_()  # channels-last, as tables are measured
    vector, rows = torch.randn(8), torch.randn(2, 8)
    small |= {
        "group_norm_silu": (x, 4, vector, vector, 1e-6, "silu"),
        "layer_norm_2d": (x, None, vector, vector, 1e-6),
        "rms_norm_2d": (x, None, vector, None, 1e-6),
        "ada_rms_norm_2d": (x, None, rows, None, 1e-6),
        "bias_silu": (x, vector),
        "bias_residual": (x, vector, x),
    }
    seen = set()
    for name, arguments in small.items():
        call = tune._caller(name, arguments)
        with interpreted:
            launches, expected = tune._launches(call)
            for launched in OPS[name].candidates.keys() & launches.keys():
                seen.add(launched)
                default, _ = launches[launched]
                for choice in OPS[name].candidates[launched][::5]:
                    assert choice.keys() == default.keys(), name
                    with tune._chosen(launched, choice):
                        assert tune._gives(call, expected), (name, choice)
    assert seen == {launched for name in small for launched in OPS[name].candidates}


def test_shapes_to_tune_at_are_arguments_of_the_op():
    for op in OPS.values():
        assert bool(op.candidates) == (next(iter(op.tune_inputs(torch.device("meta"))), None) is not None), op.name


def test_the_table_is_written_merged_and_found(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "ACME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = launch.user_folder() / "ACME.json"
    row, other = {"numel": 10, "BLOCK": 64, "num_warps": 1}, {"numel": 10, "BLOCK": 128, "num_warps": 2}
    default, cuda = {"BLOCK": 1024, "num_warps": 4}, torch.device("cuda", 0)
    try:
        assert launch.launch_config("euler_step", cuda, default, numel=10) == default
        tune.write(path, {"euler_step": [other], "another": [other]}, "sm_90")
        tune.write(path, {"euler_step": [row]}, "sm_90")
        assert json.loads(path.read_text()) == {"target": "sm_90", "euler_step": [row], "another": [other]}
        assert launch.launch_config("euler_step", cuda, default, numel=10) == {"BLOCK": 64, "num_warps": 1}
        path.write_text("{")
        tune.write(path, {"euler_step": [row]}, "sm_90")
        assert json.loads(path.read_text()) == {"target": "sm_90", "euler_step": [row]}
    finally:
        launch.forget_tables()


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="tune: PyTorch sees no GPU"):
        tune.tune()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tunes_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        path = tune.tune(["euler_step"])
        assert len(json.loads(path.read_text())["euler_step"]) == 3
        z = torch.randn(1, 16, 64, 64, device="cuda")
        assert (euler_step(z, z, 0.5) - 1.5 * z).abs().max() < 1e-6
        with pytest.raises(ValueError, match="no op is called 'nothing'"):
            tune.tune(["nothing"])
    finally:
        launch.forget_tables()


def test_attention_races_its_providers():
    rows = OPS["attention"].race(torch.device("meta"), lambda call: 2e-6)["attention_providers"]
    assert {"depth": 64, "queries": 1024, "keys": 1024, "sdpa": 2000} in rows
    assert all(type(n) is int and n > 0 for row in rows for n in row.values())
