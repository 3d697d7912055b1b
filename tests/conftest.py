"""What several test files share: golden fixtures, the tolerance helper, small networks with random weights."""

import os

# Before torch: waiting threads that spin make small ops several times slower on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import functools
import json
from pathlib import Path

import pytest
import torch

# Before triton: without a GPU its kernels run in the interpreter, which is chosen at the import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors import safe_open

from lpmrf_fast import models
from lpmrf_fast.pipeline import LatentPMRFPipeline

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One file of tests/golden (its README describes the format): config, state, inputs, outputs, recorded errors."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.config = json.loads(metadata["config"])
        self.recorded = json.loads(metadata["fp32_vs_fp64_maxabs"])
        self.state, self.inputs, self.outputs = (
            {key.removeprefix(f"{kind}/"): t for key, t in tensors.items() if key.startswith(f"{kind}/")}
            for kind in ("state", "input", "output")
        )

    def network(self, cls, part: str | None = None):
        """The network in eval mode, strictly loaded; `part` is the prefix in a fixture of several networks."""
        prefix = f"{part}." if part else ""
        network = cls(**(self.config[part] if part else self.config))
        network.load_state_dict(
            {key.removeprefix(prefix): t for key, t in self.state.items() if key.startswith(prefix)}, strict=True
        )
        return network.eval()

    def assert_close(self, actual: torch.Tensor, name: str, scale: float = 1.0) -> None:
        """`actual`, brought to the units of output `name` by `scale`, agrees with it.

        float64: within three times the error that the reference's own float32 run has, as recorded in the file: the
        stored outputs are that run. float32: within 1e-4, the README's figure for independent implementations.
        """
        assert actual.shape == self.outputs[name].shape
        limit = 3 * self.recorded[name] if actual.dtype == torch.float64 else 1e-4
        error = (actual.double() * scale - self.outputs[name].double()).abs().max().item()
        assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


@pytest.fixture(scope="session")
def golden():
    """golden(name) → Golden, read once."""
    return functools.cache(Golden)


@pytest.fixture(scope="session")
def assert_error_within():
    """assert_error_within(actual, exact, baseline, factor, floor): the measured tolerance for low precision.

    `actual` may be at most `factor` times as far from the exact result as a plain implementation at the same precision
    is, plus `floor`, the rounding of the result itself. The budget is measured for each case, not guessed
    (flash-attention's tests do so).
    """

    def check(actual, exact, baseline, factor: float = 2.0, floor: float = 0.0):
        error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, baseline))
        limit = factor * allowed + floor
        assert error <= limit, f"error {error:.3g}, limit {factor:g} * {allowed:.3g} + {floor:.3g}"

    return check


@pytest.fixture
def randomized():
    """randomized(network) → it in eval mode, no parameter zero or one: a branch that starts as nothing counts too."""

    def draw(network, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in network.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(0.3 + 0.1 * noise if p.dim() < 2 else noise / p[0].numel() ** 0.5)
        return network.eval()

    return draw


@pytest.fixture
def pipe(golden):
    """The whole golden Latent-PMRF pipeline, float32 on the CPU: images in multiples of 64, 4 latent channels."""
    fixture = golden("latent_pmrf_pipeline")
    return LatentPMRFPipeline(
        fixture.network(models.SwinIR, "posterior_mean_model"),
        fixture.network(models.SimVAE, "vae"),
        fixture.network(models.LooUFormer, "transformer"),
        noise_std=fixture.config["sampling"]["noise_std"],
    )
