"""The kernel benchmark: every case is runnable, wrong or broken providers have rows that say so, ratios are ratios."""

import dataclasses
import json

import pytest
import torch

import lpmrf_kernels as ops
from benchmarks import kernels
from benchmarks.cases import CASES, Case, Maker

TOY = Case(
    "euler_step",
    "toy",
    lambda make: (make.image(3, 8, torch.float32), make.image(3, 8), 0.5),
    lambda z, v, dt: z + dt * v,
    lambda z, v, dt: 2 * 4 * z.numel(),
)


def small(case: Case) -> tuple:
    """The case's inputs, unless they are too large for a test."""
    with torch.device("meta"):
        arguments = case.inputs(MetaMaker("meta", torch.bfloat16, 1))
    return arguments


class MetaMaker(Maker):
    def __init__(self, device, dtype, batch):
        self.device, self.dtype, self.batch, self.generator = device, dtype, batch, None

    def normal(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_counts_and_composes(case):
    """On the meta device: the eager composition takes the inputs, bytes and FLOPs are positive whole numbers."""
    arguments = small(case)
    if case.op not in ("neighborhood_attention_2d", "add_source_noise"):  # whose indices are real tensors
        assert kernels.outputs(case.eager(*arguments))
    assert case.bytes(*arguments) > 0 and case.flops(*arguments) >= 0
    assert isinstance(case.bytes(*arguments), int) and isinstance(case.flops(*arguments), int)


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def rows_of(case, **options):
    rows = kernels.run_case(case, "cpu", torch.bfloat16, 1, compiled=False, budget=0.01, **options)
    return {row["provider"]: row for row in rows}


def test_rows():
    rows = rows_of(TOY)
    assert {"eager", "ours torch", "ours cpp"} <= rows.keys()
    assert rows["eager"]["speed_of_eager"] == 1 and rows["eager"]["times"] >= 5
    ours = rows["ours torch"]
    assert ours["seconds"] > 0 and ours["bytes"] == 2 * 4 * 192 and ours["error"] < 1e-2
    assert ours["speed_of_eager"] == pytest.approx(rows["eager"]["seconds"] / ours["seconds"], rel=1e-2)
    assert json.dumps(list(rows.values()))


def test_wrong_broken_and_absent_providers_say_so():
    def absent():
        raise ImportError("No module named 'fast'")

    def crash(*_):
        raise RuntimeError("no kernel image")

    rows = rows_of(dataclasses.replace(TOY, ours=lambda z, v, dt: z))
    assert rows["ours torch"]["failed"].startswith("wrong values") and "seconds" not in rows["ours torch"]
    rows = rows_of(dataclasses.replace(TOY, ours=crash))
    assert rows["ours torch"]["failed"] == "RuntimeError: no kernel image"
    assert rows_of(dataclasses.replace(TOY, op="nothing"))["ours torch"]["absent"] == "this version has no such op"
    found = kernels.providers(dataclasses.replace(TOY, peers={"fast": absent}), "cuda", compiled=False)
    assert found["fast"] == "ImportError: No module named 'fast'"
    assert "absent" in rows_of(dataclasses.replace(TOY, peers={"fast": absent}))["fast"]
    assert kernels.table(list(rows.values())).count("no kernel image") >= 1


def test_our_backends_are_forced():
    seen = []
    case = dataclasses.replace(TOY, ours=lambda *a: (seen.append(ops.registry.forced_backend()), a[0])[1])
    kernels.providers(case, "cpu", compiled=False)["ours torch"](torch.zeros(1))
    assert seen == ["torch"]


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "CASES", [TOY])
    path = tmp_path / "results" / "kernels.json"
    assert kernels.main(["--device", "cpu", "--no-compile", "--seconds", "0.01", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__ and len(report["rows"]) >= 3
    assert "euler_step toy" in capsys.readouterr().out
    rows = report["rows"]
    other = {"op": "other", "dtype": "bfloat16", "provider": "eager"}
    path.write_text(json.dumps({"rows": [other, rows[0], {**rows[0], "dtype": "float32"}]}))
    kernels.main(["--device", "cpu", "--no-compile", "--seconds", "0.01", "--add", "--out", str(path)])
    again = json.loads(path.read_text())["rows"]
    assert again[0] == other and again[1]["dtype"] == "float32" and len(again) == 2 + len(rows)
    with pytest.raises(SystemExit) as status:
        kernels.main(["--device", "cpu", "--ops", "nothing"])
    assert status.value.code == 2 and "no benchmark is called 'nothing'" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as status:
        kernels.main(["--device", "cuda"])
    assert status.value.code == 2 and "PyTorch sees no GPU" in capsys.readouterr().err
