"""launch_config: the heuristic, over it the GPU's table, over it the user's; a bad table is passed over."""

import json
import logging

import pytest
import torch

from lpmrf_kernels import launch

CUDA = torch.device("cuda", 0)
DEFAULT = {"BLOCK": 1024, "num_warps": 4}


@pytest.fixture
def user_table(monkeypatch, tmp_path):
    """Writes the user's table of the GPU at hand, an invented one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "ACME G-1 (80GB)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "lpmrf-fast" / "configs" / "ACME-G-1-80GB.json"
    path.parent.mkdir(parents=True)

    def write(text):
        launch._table.cache_clear()
        path.write_text(text)

    launch._table.cache_clear()
    yield write
    launch._table.cache_clear()


def test_heuristic_without_a_table(user_table):
    assert launch.launch_config("euler_step", CUDA, DEFAULT, numel=1) == DEFAULT
    assert launch.launch_config("euler_step", torch.device("cpu"), DEFAULT, numel=1) == DEFAULT


def test_nearest_row_in_log_space(user_table):
    rows = [{"numel": n, "BLOCK": block, "num_warps": 8} for n, block in ((1000, 128), (100_000, 2048))]
    user_table(json.dumps({"euler_step": rows}))
    for numel, block in ((0, 128), (9_000, 128), (11_000, 2048), (10**9, 2048)):
        assert launch.launch_config("euler_step", CUDA, DEFAULT, numel=numel) == {"BLOCK": block, "num_warps": 8}
    assert launch.launch_config("another_op", CUDA, DEFAULT, numel=1) == DEFAULT


def test_rows_of_an_older_kernel_are_passed_over(user_table):
    user_table(json.dumps({"euler_step": [{"numel": 10, "BLOCK": 64}, {"pixels": 10, "BLOCK": 64, "num_warps": 1}]}))
    assert launch.launch_config("euler_step", CUDA, DEFAULT, numel=10) == DEFAULT


@pytest.mark.parametrize("text", ["", "{", "[]", '{"euler_step": [{"numel": "many"}]}', '{"euler_step": 3}'])
def test_a_damaged_table_is_said_and_passed_over(user_table, caplog, text):
    user_table(text)
    with caplog.at_level(logging.WARNING, "lpmrf_kernels"):
        assert launch.launch_config("euler_step", CUDA, DEFAULT, numel=1) == DEFAULT
    assert "ACME-G-1-80GB.json is passed over" in caplog.text


def test_a_table_reaches_the_kernel(interpreted, module_of, monkeypatch):
    """Another tile, the same values: the launcher uses what the table says."""
    module = module_of("euler_step")
    monkeypatch.setattr(module, "launch_config", lambda *a, **k: {"BLOCK": 16, "num_warps": 1})
    z = torch.randn(2, 3, 5, 7)
    with interpreted:
        assert (module.euler_step(z, z, 0.5) - 1.5 * z).abs().max() < 1e-6


def test_shipped_tables_are_valid():
    for path in (launch.Path(launch.__file__).parent / "configs").glob("*.json"):
        assert launch._read(path)
