"""Parity: each network loads its golden file strictly by name and reproduces every stored output."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import lpmrf_kernels
from lpmrf_fast.models import AutoencoderKL, LooUFormer, SimVAE, SwinIR
from lpmrf_kernels import reference


def vae(network, x, z):
    moments = network.encode(x)
    mode, logvar = moments.chunk(2, dim=1)
    return {
        "moments": moments,
        "mode": mode,
        "std": (logvar.clamp(-30, 20) / 2).exp(),
        "decoded": network.decode(mode),
        "decoded_z": network.decode(z),
    }


def swinir(network, y):
    raw = network(y)
    return {"raw": raw, "x_posterior_mean": raw.clamp(0, 1)}


def loouformer(network, x, sigma):
    return {"v": network(x, sigma)}


CASES = {
    "sim_vae_layer_norm": (SimVAE, vae),
    "sim_vae_group_norm": (SimVAE, vae),
    "sd_vae": (AutoencoderKL, vae),
    "swinir": (SwinIR, swinir),
    "loouformer_global": (LooUFormer, loouformer),
    "loouformer_neighborhood": (LooUFormer, loouformer),
}
every_case = pytest.mark.parametrize("name", CASES)


def run(golden, name, dtype, inputs=None, memory_format=torch.contiguous_format):
    """All outputs of the case's network in dtype, for the stored inputs or others."""
    cls, outputs = CASES[name]
    fixture = golden(name)
    network = fixture.network(cls).to(dtype=dtype, memory_format=memory_format)
    # Times are never rounded to a network's dtype: frequencies multiply them.
    time_dtype = torch.promote_types(dtype, torch.float32)
    inputs = {
        k: v.to(dtype, memory_format=memory_format) if v.dim() == 4 else v.to(time_dtype)
        for k, v in (inputs or fixture.inputs).items()
    }
    with torch.no_grad():
        return outputs(network, **inputs)


@every_case
def test_names_and_shapes_are_the_official_ones(golden, name):
    fixture = golden(name)
    network = CASES[name][0](**fixture.config)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in fixture.state.items()}
    for broken in (dict(list(fixture.state.items())[1:]), {**fixture.state, "extra.weight": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match="Missing|Unexpected"):
            network.load_state_dict(broken, strict=True)


@every_case
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stored_outputs(golden, name, dtype, memory_format):
    results = run(golden, name, dtype, memory_format=memory_format)
    assert set(results) == set(golden(name).recorded), "an output of the file is not tested"
    for output, actual in results.items():
        assert actual.dtype == dtype
        golden(name).assert_close(actual, output)


@every_case
def test_batches_do_not_mix(golden, name):
    """The stored inputs first and last in a larger batch, others between them."""
    fixture = golden(name)
    other = {k: v.flip(-1) if v.dim() == 4 else v * 0.5 for k, v in fixture.inputs.items()}
    inputs = {k: torch.cat([v, other[k], v]) for k, v in fixture.inputs.items()}
    for output, actual in run(golden, name, torch.float32, inputs).items():
        n = len(actual) // 3
        for part in (actual[:n], actual[-n:]):
            fixture.assert_close(part, output)
        assert (actual[n:-n] - actual[:n]).abs().max() > 1e-3, "the other inputs do not tell"


@contextlib.contextmanager
def plain_modules(monkeypatch):
    """The same networks out of stock PyTorch operations, each rounding to the working dtype as it goes.

    RMSNorm and RoPE stay in float32, as in the official code (k-diffusion's).
    """

    def rms(x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = weight.to(wide.dtype)[..., None, None] * torch.rsqrt(wide.pow(2).mean(dim=1, keepdim=True) + eps)
        return x * scale.to(x.dtype)

    def softmax_attention(q, k, v, bias, scale):
        return ((q @ k.transpose(-2, -1)) * scale + bias).softmax(dim=-1) @ v

    def neighborhood(q, k, v, kernel_size, scale=None):
        B, H, W, NH, D = q.shape
        start = [[min(max(i - kernel_size // 2, 0), n - kernel_size) for i in range(n)] for n in (H, W)]
        inside = [
            torch.tensor([[s <= j < s + kernel_size for j in range(n)] for s in starts])
            for starts, n in zip(start, (H, W))
        ]
        seen = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).reshape(H * W, H * W)
        bias = torch.zeros(H * W, H * W, dtype=q.dtype).masked_fill(~seen, -torch.inf)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return softmax_attention(q, k, v, bias, scale or D**-0.5).transpose(1, 2).reshape(B, H, W, NH, D)

    def layer_norm(x, weight, bias, eps=1e-6):
        return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)

    def group_norm(x, groups, weight, bias, eps, act):
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if act == "silu" else y

    def biased(q, k, v, bias, mask, scale):
        if mask is not None:
            bias = (bias + mask.to(bias.dtype)[:, None]).repeat(len(q) // len(mask), 1, 1, 1)
        return softmax_attention(q, k, v, bias.to(q.dtype), scale)

    stock = {
        "layer_norm_2d": layer_norm,
        "group_norm_silu": group_norm,
        "ada_rms_norm_2d": lambda x, scale, eps=1e-6: rms(x, 1 + scale, eps),
        "attention": lambda q, k, v: softmax_attention(q, k, v, 0, q.shape[-1] ** -0.5),
        "neighborhood_attention_2d": neighborhood,
        "rms_norm_2d": rms,
        "biased_attention": biased,
    }
    with monkeypatch.context() as patch:
        for op, function in stock.items():
            for module in (lpmrf_kernels, reference):
                if hasattr(module, op):
                    patch.setattr(module, op, function)
        yield


@every_case
def test_plain_modules_are_the_same_networks(golden, name, monkeypatch):
    """The baseline of the next test computes the right thing."""
    with plain_modules(monkeypatch):
        for output, actual in run(golden, name, torch.float64).items():
            golden(name).assert_close(actual, output)


@every_case
def test_bfloat16_is_as_good_as_plain_modules(golden, name, monkeypatch, assert_error_within):
    exact = run(golden, name, torch.float64)
    results = run(golden, name, torch.bfloat16, memory_format=torch.channels_last)
    with plain_modules(monkeypatch):
        baseline = run(golden, name, torch.bfloat16)
    for output, actual in results.items():
        assert actual.dtype == torch.bfloat16
        largest = exact[output].abs().max().item()
        assert (baseline[output].double() - exact[output]).abs().max() < 0.2 * largest, "the budget says nothing"
        assert_error_within(actual, exact[output], baseline[output], factor=2.0, floor=2**-8 * largest)
