"""The cost of the two methods: counts that the papers' networks are known to have, and steps that are really timed."""

import json

import pytest
import torch

from benchmarks import cost


def test_counts_of_the_full_size_networks():
    latent, pixel = (cost.count(method, torch.bfloat16, 1, 512, 2) for method in cost.METHODS)
    # Counted on the official modules: parameters, and multiplications and additions of a step.
    assert latent["parameters"]["velocity"] / 1e6 == pytest.approx(113.3, abs=0.05)
    assert pixel["parameters"]["velocity"] / 1e6 == pytest.approx(160.5, abs=0.05)
    assert latent["step"]["gflop"] == pytest.approx(134.1, rel=0.02)
    assert pixel["step"]["gflop"] == pytest.approx(504.0, rel=0.02)
    for row in (latent, pixel):
        assert (
            row["image"]["gflop"] > 2 * row["step"]["gflop"] and row["image"]["mb_moved"] > 2 * row["step"]["mb_moved"]
        )
        # A step reads its weights, and the fused ops leave no more than a dozen operations a block.
        assert row["step"]["mb_moved"] > 2 * 0.75 * row["parameters"]["velocity"] / 1e6
        assert row["step"]["operations"] < 250


def test_costs_are_those_of_one_image_whatever_the_batch():
    one, two = (cost.count("PMRF", torch.bfloat16, batch, 256, 1) for batch in (1, 2))
    assert two["step"]["gflop"] == pytest.approx(one["step"]["gflop"], rel=1e-3)
    assert two["step"]["mb_moved"] < one["step"]["mb_moved"]  # weights are read once
    tables = two["step"]["activation_mb"] - 2 * one["step"]["activation_mb"]  # one set for the batch
    assert -one["step"]["activation_mb"] / 2 < tables < 0


def test_steps_are_timed_and_the_report_is_written(monkeypatch, tmp_path, capsys):
    methods = {
        "Latent-PMRF": (cost.LatentPMRFPipeline, ("swinir-m", "sim-vae-c16", "loouformer-s"), 8),
        "PMRF": (cost.PMRFPipeline, ("swinir-m", "hdit-s"), 1),
    }
    monkeypatch.setattr(cost, "METHODS", methods)
    out = tmp_path / "cost.json"
    arguments = ["--device", "cpu", "--size", "256", "--seconds", "0.01", "--dtype", "fp32", "--out", str(out)]
    assert cost.main(arguments) == 0
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == ["Latent-PMRF", "PMRF"] and report["machine"]["versions"][
        "torch"
    ]
    assert all(row["step"]["seconds"] > 0 and row["step"]["times"] >= 5 for row in report["rows"])
    assert "Latent-PMRF, step" in capsys.readouterr().out
