"""Parity: each network loads its golden file strictly by name and reproduces every stored output."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import lpmrf_kernels
from lpmrf_fast.models import AutoencoderKL, HDiT, LooUFormer, SimVAE, SwinIR
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


def velocity(network, x, sigma):
    return {"v": network(x, sigma)}


CASES = {
    "sim_vae_layer_norm": (SimVAE, vae),
    "sim_vae_group_norm": (SimVAE, vae),
    "sd_vae": (AutoencoderKL, vae),
    "swinir": (SwinIR, swinir),
    "loouformer_global": (LooUFormer, velocity),
    "loouformer_neighborhood": (LooUFormer, velocity),
    "hdit": (HDiT, velocity),
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


def test_hdit_intermediates(golden):
    """What the file stores on the way, to localise a mistake; NHWC there."""
    fixture = golden("hdit")
    network = fixture.network(HDiT)
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: output})

    for name, module in (
        ("patch_in", network.patch_in),
        ("cond", network.mapping),
        ("attention", network.down_levels[0][0].self_attn),
        ("down0", network.down_levels[0]),
        ("mid", network.mid_level),
        ("up_last", network.up_levels[0]),
    ):
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        network(**fixture.inputs)
    seen = {name: t.movedim(1, -1) for name, t in seen.items() if t.dim() == 4} | {"cond": seen["cond"]}
    seen["attn0_plus_skip"] = seen["patch_in"] + seen.pop("attention")
    assert set(seen) | {"v"} == set(fixture.outputs)
    for name, actual in seen.items():
        fixture.assert_close(actual, name)


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

    def windowed(x, bias, size, shift, scale):
        (B, H, W, C), NH = x.shape, len(bias)
        x = x.roll((-shift, -shift), (1, 2)).view(B, H // size, size, W // size, size, C).transpose(2, 3)
        q, k, v = x.reshape(-1, size * size, 3, NH, C // 3 // NH).permute(2, 0, 3, 1, 4)
        if shift:
            mask = reference.shift_mask(H, W, size, shift).to(x.dtype)
            bias = (bias + mask[:, None]).repeat(B, 1, 1, 1)
        out = softmax_attention(q, k, v, bias.to(q.dtype), scale).transpose(1, 2)
        out = out.reshape(B, H // size, W // size, size, size, C // 3).transpose(2, 3).reshape(B, H, W, C // 3)
        return out.roll((shift, shift), (1, 2))

    def depthwise(x, weight, bias):
        return x if weight is None else F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])

    def gate(x, weight=None, bias=None, gate_first=True):
        first, second = depthwise(x, weight, bias).chunk(2, dim=1)
        return F.gelu(first) * second if gate_first else first * F.gelu(second)

    def heads(qkv, num_heads, weight=None, bias=None, cos=None, sin=None, scale=None):
        qkv = depthwise(qkv, weight, bias).permute(0, 2, 3, 1)
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)
        if scale is not None:
            q, k = (reference.cosine_similarity_scale(x, scale, 1e-6) for x in (q, k))
        return reference.rope(q, cos, sin), reference.rope(k, cos, sin), v

    def add_rms(x, scale, eps=1e-6, residual=None):
        if residual is None:
            return rms(x, 1 + scale, eps)
        return x + residual, rms(x + residual, 1 + scale, eps)

    stock = {
        "dwconv_geglu": gate,
        "dwconv_rope_qkv": heads,
        "geglu": lambda x, dim=-1: F.gelu(x.chunk(2, dim)[1]) * x.chunk(2, dim)[0],
        "layer_norm_2d": layer_norm,
        "group_norm_silu": group_norm,
        "ada_rms_norm_2d": add_rms,
        "attention": lambda q, k, v, scale=None: softmax_attention(q, k, v, 0, scale or q.shape[-1] ** -0.5),
        "neighborhood_attention_2d": neighborhood,
        "rms_norm_2d": rms,
        "window_attention": windowed,
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
