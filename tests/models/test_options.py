"""Options of the networks that no golden file covers, against their definitions written out here."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lpmrf_kernels as ops
from lpmrf_fast import models
from lpmrf_fast.models import AutoencoderKL, HDiT, LooUFormer, SimVAE, SwinIR
from lpmrf_fast.models.hdit import window_attention


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sim_vae(**options):
    config = dict(block_out_channels=[32, 64], latent_channels=2, layers_per_block=1, layers_mid_block=1)
    types = dict(down_block_types=["EncoderBlock2D"] * 2, up_block_types=["DecoderBlock2D"] * 2)
    return SimVAE(**{**config, **types, **options})


def autoencoder_kl(**options):
    config = dict(block_out_channels=[8, 16], latent_channels=2, layers_per_block=1, norm_num_groups=4)
    types = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return AutoencoderKL(**{**config, **types, **options})


def loouformer(**options):
    config = dict(
        in_channels=2,
        out_channels=2,
        patch_size=[1, 1],
        block_dims=[16, 32],
        block_layers=[1, 1],
        block_types=["neighborhood", "global"],
        window_sizes=[3, 0],
        head_dims=[8, 16],
        time_embed_dim=32,
    )
    return LooUFormer(**{**config, **options})


def swinir(**options):
    config = dict(
        img_size=16, embed_dim=12, depths=[2], num_heads=[2], window_size=4, mlp_ratio=2, sf=2, upsampler="nearest+conv"
    )
    return SwinIR(**{**config, **options})


NEAR, FAR = {"type": "neighborhood", "d_head": 8, "kernel_size": 3}, {"type": "global", "d_head": 16}


def hdit(**options):
    config = dict(
        in_channels=3,
        out_channels=3,
        widths=[16, 32],
        depths=[1, 1],
        patch_size=[2, 2],
        self_attns=[NEAR, FAR],
        mapping_depth=1,
        mapping_width=16,
        dropout_rate=[0, 0],
        mapping_dropout_rate=0.0,
    )
    return HDiT(**{**config, **options})


def every_parameter_counts(network, output):
    """A parameter without gradient is one that the option's path forgot."""
    output.square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle, f"no influence: {idle}"


# ---- Sim-VAE

VAE_OPTIONS = [
    dict(norm_pos=pos, norm_type=norm, upsample_method=up)
    for pos in ("pre_norm", "post_norm")
    for norm in ("layer_norm", "group_norm")
    for up in ("interpolate", "pixel_shuffle")
]


@pytest.mark.parametrize("options", VAE_OPTIONS, ids=lambda o: "-".join(o.values()))
def test_sim_vae_block_and_upsampler_as_defined(randomized, options):
    vae = randomized(sim_vae(**options)).double()
    x = randn(3, 32, 6, 10, dtype=torch.float64)

    block = vae.encoder.down_blocks[0].resnets[0]
    if options["norm_type"] == "group_norm":

        def norm(h):
            return F.group_norm(h, 32, block.norm.weight, block.norm.bias, eps=1e-6)

    else:

        def norm(h):
            mean, var = h.mean(1, keepdim=True), h.var(1, keepdim=True, unbiased=False)
            scale, shift = (p[:, None, None] for p in (block.norm.weight, block.norm.bias))
            return (h - mean) / (var + 1e-6).sqrt() * scale + shift

    def convolutions(h):
        return block.conv2(F.silu(block.conv1(h)))

    pre = options["norm_pos"] == "pre_norm"
    expected = x + convolutions(norm(x)) if pre else norm(x + convolutions(x))
    torch.testing.assert_close(block(x), expected)

    level = vae.decoder.up_blocks[0]  # 64 channels up to 32
    h = randn(3, 64, 6, 10, dtype=torch.float64)
    conv = level.upsampler.conv
    if options["upsample_method"] == "pixel_shuffle":
        assert conv.weight.shape == (4 * 32, 64, 3, 3)
        expected = F.pixel_shuffle(conv(h), 2)
    else:
        expected = conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(level.upsampler(h), expected)


@pytest.mark.parametrize("options", VAE_OPTIONS, ids=lambda o: "-".join(o.values()))
def test_sim_vae_uses_all_its_parameters(randomized, options):
    vae = randomized(sim_vae(**options))
    every_parameter_counts(vae, vae(randn(1, 3, 6, 10)))


@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 3), h=st.integers(1, 9), w=st.integers(1, 9), levels=st.integers(1, 3))
def test_sim_vae_shapes(b, h, w, levels):
    vae = SimVAE(
        down_block_types=["EncoderBlock2D"] * levels,
        up_block_types=["DecoderBlock2D"] * levels,
        block_out_channels=[4] * levels,
        layers_per_block=1,
        layers_mid_block=1,
        latent_channels=3,
    )
    f = vae.multiple
    assert f == 2 ** (levels - 1)
    moments = vae.encode(torch.zeros(b, 3, h * f, w * f))
    assert moments.shape == (b, 6, h, w)
    assert vae.decode(moments[:, :3]).shape == (b, 3, h * f, w * f)


# ---- AutoencoderKL

KL_OPTIONS = {
    "as Stable Diffusion's": {},
    "as FLUX's": dict(use_quant_conv=False, use_post_quant_conv=False, latent_channels=4, shift_factor=0.1159),
    "no attention": dict(mid_block_add_attention=False),
    "one quant conv, one level": dict(
        use_post_quant_conv=False,
        block_out_channels=[12],
        norm_num_groups=3,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
    ),
}


@pytest.mark.parametrize("options", KL_OPTIONS.values(), ids=KL_OPTIONS.keys())
def test_autoencoder_kl_as_defined(randomized, options):
    """The whole network out of PyTorch's functions and the official names, at an odd size."""
    vae = randomized(autoencoder_kl(**options)).double()
    state, groups = vae.state_dict(), vae.config["norm_num_groups"]
    used = set()

    def p(name):
        used.update((f"{name}.weight", f"{name}.bias"))
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def conv(name, h, **how):
        weight, bias = p(name)
        return F.conv2d(h, weight, bias, **{"padding": weight.shape[-1] // 2, **how})

    def norm(name, h):
        return F.group_norm(h, groups, *p(name), eps=1e-6)

    def resnet(name, h):
        out = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)))
        out = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", out)))
        changes = f"{name}.conv_shortcut.weight" in state
        return out + (conv(f"{name}.conv_shortcut", h) if changes else h)

    def resnets(name, h):
        for i in range(sum(f"{name}.resnets.{j}.norm1.weight" in state for j in range(9))):
            h = resnet(f"{name}.resnets.{i}", h)
        return h

    def middle(name, h):
        h = resnet(f"{name}.resnets.0", h)
        if vae.config["mid_block_add_attention"]:
            a = f"{name}.attentions.0"
            tokens = norm(f"{a}.group_norm", h).flatten(2).transpose(1, 2)
            q, k, v = (F.linear(tokens, *p(f"{a}.to_{n}")) for n in "qkv")
            weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
            h = h + F.linear(weights @ v, *p(f"{a}.to_out.0")).transpose(1, 2).view(h.shape)
        return resnet(f"{name}.resnets.1", h)

    def end(name, h):
        return conv(f"{name}.conv_out", F.silu(norm(f"{name}.conv_norm_out", h)))

    levels = len(vae.config["block_out_channels"])
    x = randn(3, 3, 7, 10, dtype=torch.float64)
    h = conv("encoder.conv_in", x)
    for i in range(levels):
        h = resnets(f"encoder.down_blocks.{i}", h)
        if i < levels - 1:
            h = conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
    moments = end("encoder", middle("encoder.mid_block", h))
    if vae.config["use_quant_conv"]:
        moments = conv("quant_conv", moments)
    torch.testing.assert_close(vae.encode(x), moments)

    z = moments.chunk(2, dim=1)[0]
    h = conv("post_quant_conv", z) if vae.config["use_post_quant_conv"] else z
    h = middle("decoder.mid_block", conv("decoder.conv_in", h))
    for i in range(levels):
        h = resnets(f"decoder.up_blocks.{i}", h)
        if i < levels - 1:
            h = conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(vae.decode(z), end("decoder", h))
    assert used == set(state)


# ---- LooUFormer

LOOUFORMER_OPTIONS = {
    "as published": {},
    "no dwconv": dict(dwconv_type="none"),
    "no bias": dict(use_bias=False),
    "no dwconv, no bias": dict(dwconv_type="none", use_bias=False),
    "untimed": dict(time_embed_dim=None),
    "log time": dict(time_embed_log_space=True, time_embed_freq_scale=0.5),
    "patch 2": dict(patch_embed_type="pixel_shuffle", patch_size=[2, 2]),
    "patch 1x2, no bias": dict(patch_embed_type="pixel_shuffle", patch_size=[1, 2], use_bias=False),
    "down unshuffle+conv": dict(downsample_method="pixel_unshuffle+conv", downsample_kernel_size=1),
    "down conv+unshuffle": dict(downsample_method="conv+pixel_unshuffle"),
    "up shuffle": dict(upsample_method="pixel_shuffle", upsample_kernel_size=1),
    "three levels": dict(
        block_dims=[16, 16, 32],
        block_layers=[1, 2, 1],
        block_types=["neighborhood", "global", "neighborhood"],
        window_sizes=[5, 0, 3],
        head_dims=[8, 16, 8],
    ),
    "one level": dict(block_dims=[16], block_layers=[2], block_types=["global"], window_sizes=[0], head_dims=[16]),
    "wide mapping": dict(mapping_layers=1, mapping_mult=2.0, mult=4.0),
    "no mapping blocks": dict(mapping_layers=0),
}
every_loouformer = pytest.mark.parametrize("name", LOOUFORMER_OPTIONS)


def times(network, n):
    return None if network.time_embed_dim is None else torch.linspace(1, 0.3, n)


@every_loouformer
def test_loouformer_uses_all_its_parameters(randomized, name):
    network = randomized(loouformer(**LOOUFORMER_OPTIONS[name]))
    x = randn(2, 2, 12, 20)
    v = network(x, times(network, 2))
    assert v.shape == x.shape and v.isfinite().all()
    every_parameter_counts(network, v)


@every_loouformer
def test_loouformer_batches_do_not_mix(randomized, name):
    """A batch of three, at three times, is the three alone; odd numbers of cells; channels-last too."""
    network = randomized(loouformer(**LOOUFORMER_OPTIONS[name])).double()
    x = randn(3, 2, 12, 28, dtype=torch.float64)
    sigma = times(network, 3)
    v = network(x, sigma)
    for i in range(3):
        alone = network(x[i : i + 1], None if sigma is None else sigma[i : i + 1])
        torch.testing.assert_close(v[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), sigma), v
    )


@every_loouformer
def test_loouformer_with_tables_is_the_same(randomized, name):
    """forward of one time, and with tables of several: the same blocks, with scales out of one matrix product."""
    network = randomized(loouformer(**LOOUFORMER_OPTIONS[name])).double()
    x, sigma = randn(2, 2, 12, 20, dtype=torch.float64), times(network, 3)
    tables = network.prepare(sigma, 12, 20)
    for k in range(3):
        expected = network(x, None if sigma is None else sigma[k])
        torch.testing.assert_close(network(x, tables=tables, step=k), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        one = network.float().prepare(None if sigma is None else [sigma[1]], 12, 20)
        assert torch.equal(
            network(x.float(), tables=one, step=0), network(x.float(), None if sigma is None else sigma[1])
        )


def test_tables_fit_their_size(randomized):
    network = loouformer()
    with pytest.raises(ValueError, match=r"the tables are for inputs of \(8, 8\), got \(8, 12\)"):
        network(torch.zeros(1, 2, 8, 12), tables=network.prepare(0.5, 8, 8), step=0)
    with pytest.raises(ValueError, match="must be multiples"):
        network.prepare(0.5, 8, 9)
    with pytest.raises(ValueError, match="sigma is missing"):
        network.prepare(None, 8, 8)


@pytest.mark.parametrize("build", [loouformer, hdit])
def test_trains_under_autocast(randomized, build):
    """Activations are bfloat16, parameters and their gradients float32, near those without autocast."""
    network, gradients = randomized(build()), []
    x = randn(2, network.in_channels, 8, 8)
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            v = network(x, torch.tensor([0.3, 0.9]))
        assert v.dtype == (torch.bfloat16 if enabled else torch.float32)
        v.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in network.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()


def test_loouformer_compiles_without_a_break(randomized):
    network, x = randomized(loouformer()), randn(1, 2, 8, 8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, torch.tensor([0.5])), network(x, 0.5), rtol=1e-5, atol=1e-5)


def test_sigma_may_be_a_number(randomized):
    network = randomized(loouformer())
    x = randn(2, 2, 8, 8)
    torch.testing.assert_close(network(x, 0.5), network(x, torch.tensor([0.5, 0.5])))
    assert (network(x, 0.5) - network(x, 0.6)).abs().max() > 1e-3


def test_names_without_time():
    names = loouformer(time_embed_dim=None).state_dict().keys()
    assert "down_blocks.0.0.norm1.norm.weight" in names
    assert not [n for n in names if "time" in n or "mapping" in n or n.endswith("norm1.linear.weight")]


def test_names_without_bias():
    patched = loouformer(use_bias=False, patch_embed_type="pixel_shuffle", patch_size=[2, 2])
    assert [n for n in patched.state_dict() if n.endswith("bias")] == ["proj_out.proj.bias"]
    assert not [n for n in loouformer(use_bias=False).state_dict() if n.endswith("bias")]


def test_which_projection_has_the_bias():
    names = loouformer().state_dict().keys()
    assert "mid_block.0.attn.qkv_proj.dwconv.bias" in names and "mid_block.0.attn.qkv_proj.conv.bias" not in names
    names = loouformer(dwconv_type="none").state_dict().keys()
    assert "mid_block.0.ff.project_in.conv.bias" in names and not [n for n in names if "dwconv" in n]


def test_downsample_methods_as_defined(randomized):
    x = randn(2, 16, 6, 10)
    widths = {"conv": (16, 32), "pixel_unshuffle+conv": (64, 32), "conv+pixel_unshuffle": (16, 8)}
    for method, (inner, outer) in widths.items():
        down = randomized(loouformer(downsample_method=method)).downs[0]
        assert down.conv.weight.shape == (outer, inner, 3, 3)
        weights = down.conv.weight, down.conv.bias
        if method == "conv":
            expected = F.conv2d(x, *weights, stride=2, padding=1)
        elif method == "pixel_unshuffle+conv":
            expected = F.conv2d(F.pixel_unshuffle(x, 2), *weights, padding=1)
        else:
            expected = F.pixel_unshuffle(F.conv2d(x, *weights, padding=1), 2)
        torch.testing.assert_close(down(x), expected)


def test_upsample_methods_as_defined(randomized):
    x, skip = randn(2, 32, 3, 5), randn(2, 16, 6, 10, seed=1)
    for method in ("interpolate", "pixel_shuffle"):
        up = randomized(loouformer(upsample_method=method)).ups[0]
        weights = up.conv.weight, up.conv.bias
        if method == "interpolate":
            y = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), *weights, padding=1)
        else:
            y = F.pixel_shuffle(F.conv2d(x, *weights, padding=1), 2)
        assert up.fac.item() not in (0, 0.5, 1)
        torch.testing.assert_close(up(x, skip), skip + up.fac * (y - skip))


def test_patches_are_flattened_row_column_channel(randomized):
    network = randomized(loouformer(patch_embed_type="pixel_shuffle", patch_size=[2, 3]))
    x = randn(2, 2, 4, 6)
    tokens = torch.empty(2, 12, 2, 2)
    for row in range(2):
        for column in range(3):
            for channel in range(2):
                tokens[:, (row * 3 + column) * 2 + channel] = x[:, channel, row::2, column::3]
    merge = network.proj_in
    torch.testing.assert_close(merge(x), F.conv2d(tokens, merge.proj.weight, merge.proj.bias))

    # The split is the inverse arrangement: with an identity for a projection it gives the image back.
    split = network.proj_out
    split.proj = torch.nn.Conv2d(12, 12, 1, bias=False)
    split.proj.weight = torch.nn.Parameter(torch.eye(12)[..., None, None])
    assert torch.equal(split(tokens), x)


@settings(max_examples=25, deadline=None)
@given(
    levels=st.integers(1, 3),
    patch=st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    batch=st.integers(1, 3),
)
def test_loouformer_shapes(levels, patch, h, w, batch):
    """Every size that `multiple` and `minimum` allow works; one less is refused."""
    network = loouformer(
        block_dims=[16] * levels,
        block_layers=[1] * levels,
        block_types=["neighborhood"] * (levels - 1) + ["global"],
        window_sizes=[3] * levels,
        head_dims=[8] * levels,
        patch_size=patch,
        patch_embed_type="conv" if patch == (1, 1) else "pixel_shuffle",
    )
    size = [max(n * m, math.ceil(low / m) * m) for n, m, low in zip((h, w), network.multiple, network.minimum)]
    x = torch.zeros(batch, 2, *size)
    assert network(x, 0.5).shape == x.shape
    if network.multiple[0] > 1:
        with pytest.raises(ValueError, match="must be multiples of"):
            network(x[:, :, :-1], 0.5)
    too_small = size[0] - network.multiple[0]
    if 0 < too_small < network.minimum[0]:
        with pytest.raises(ValueError, match="at least"):
            network(x[:, :, :too_small], 0.5)


# ---- HDiT

HDIT_OPTIONS = {
    "as published": {},
    "condition channels": dict(in_channels=6),
    "three levels": dict(
        widths=[8, 16, 24],
        depths=[1, 2, 1],
        self_attns=[NEAR, {"type": "global", "d_head": 8}, NEAR],
        dropout_rate=[0] * 3,
    ),
    "one level": dict(widths=[16], depths=[2], self_attns=[FAR], dropout_rate=[0]),
    "oblong patches": dict(patch_size=[1, 4]),
    "shifted windows": dict(depths=[2, 2], self_attns=[{"type": "shifted-window", "d_head": 8, "window_size": 2}] * 2),
    "no mapping blocks": dict(mapping_depth=0),
}
every_hdit = pytest.mark.parametrize("name", HDIT_OPTIONS)


@every_hdit
def test_hdit_uses_all_its_parameters_and_keeps_batches_apart(randomized, name):
    """A batch of two, at two times, is the two alone; contiguous and channels-last; a scalar time; no time."""
    network = randomized(hdit(**HDIT_OPTIONS[name])).double()
    x = randn(2, network.in_channels, 24, 48, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.9])
    v = network(x, sigma)
    assert v.shape == (2, 3, 24, 48)
    every_parameter_counts(network, v)
    with torch.no_grad():
        for i in range(2):
            torch.testing.assert_close(v[i : i + 1], network(x[i : i + 1], sigma[i].item()), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(network(x.to(memory_format=torch.channels_last), sigma), v, rtol=1e-9, atol=1e-9)
        untimed = network(x)
        assert (untimed - network(x, 1.0)).abs().max() > 1e-3
        network.time_emb.weight.zero_()  # the embedding is then 1 and 0: only its first half is read
        network.time_in_proj.weight[:, 8:] = 0
        assert (network(x) - network(x, 0.3)).abs().max() < 1e-9


@every_hdit
def test_hdit_with_tables_is_the_same(randomized, name):
    """As LooUFormer: forward of one time, and with tables of several, whatever the batch."""
    network = randomized(hdit(**HDIT_OPTIONS[name])).double()
    x, sigma = randn(2, network.in_channels, 24, 48, dtype=torch.float64), torch.tensor([0.0, 0.3, 0.9])
    tables = network.prepare(sigma, 24, 48)
    for k in range(3):
        expected = network(x, sigma[k])
        torch.testing.assert_close(network(x, tables=tables, step=k), expected, rtol=1e-12, atol=1e-12)
        at = torch.tensor([k])  # as a captured step has it
        torch.testing.assert_close(network(x, tables=tables, step=at), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network(x, tables=network.prepare(None, 24, 48), step=0), network(x))
    with pytest.raises(ValueError, match=r"HDiT: the tables are for inputs of \(24, 48\), got \(24, 24\)"):
        network(x[..., :24], tables=tables, step=0)


def patched_loouformer():
    return loouformer(patch_embed_type="pixel_shuffle", patch_size=[2, 1])


@pytest.mark.parametrize("build", [hdit, lambda: hdit(patch_size=[1, 4]), patched_loouformer])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_step_in_one_is_velocity_and_euler_step(randomized, assert_error_within, build, dtype):
    network, dt = randomized(build()).double(), -0.25
    x = randn(2, network.in_channels, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        exact = x + dt * network(x, 0.5)
        network.to(dtype)
        z = x.to(torch.promote_types(dtype, torch.float32))
        tables = network.prepare([0.5], 16, 24)
        apart = ops.euler_step(z, network(x.to(dtype), tables=tables, step=0), dt)
        together = network(x.to(dtype), tables=tables, step=0, euler=(z, dt))
    assert network.fuses_euler and together.dtype == z.dtype and together.shape == z.shape
    assert together.stride() == z.stride()
    rounding = torch.finfo(z.dtype).eps * exact.abs().max().item()
    assert_error_within(together, exact, apart, factor=1.5, floor=2 * rounding)


def test_a_convolution_at_the_end_takes_its_step_apart():
    assert not loouformer().fuses_euler


def test_hdit_runs_on_the_ops(randomized, monkeypatch):
    """Forward and backward: scaling and rotation, gate, adaptive norms and both attentions are the library's."""
    network, called = randomized(hdit()), Counter()
    for name in ("dwconv_rope_qkv", "geglu", "ada_rms_norm_2d", "neighborhood_attention_2d", "attention"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, _n=name, _op=op, **kw: called.update([_n]) or _op(*args, **kw))
    network(randn(1, 3, 8, 16), 0.5).sum().backward()
    # Two blocks at the neighborhood level and one in the middle; the mapping network has one gate more.
    assert called == {
        "dwconv_rope_qkv": 3,
        "geglu": 4,
        "ada_rms_norm_2d": 6,
        "neighborhood_attention_2d": 2,
        "attention": 1,
    }


def test_hdit_compiles_without_a_break(randomized):
    network, x = randomized(hdit()), randn(1, 3, 8, 16)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, torch.tensor([0.5])), network(x, 0.5), rtol=1e-5, atol=1e-5)
        tables = network.prepare([0.0, 0.5, 1.0], 8, 16)
        for k, dt in enumerate((0.3, 0.3333)):
            expected = network(x, tables=tables, step=k, euler=(x, dt))
            torch.testing.assert_close(compiled(x, tables=tables, step=k, euler=(x, dt)), expected)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_shifted_windows_as_defined(shift):
    """Position i lies in window (i + shift) / size, counted around the edge; both sides of it do not see each other."""
    size, H, W = 4, 8, 12
    q, k, v = (randn(1, H, W, 1, 4, seed=s, dtype=torch.float64) for s in range(3))

    def window(i, n):
        return (i + shift) % n // size, i + shift >= n

    cells = [(i, j, window(i, H), window(j, W)) for i in range(H) for j in range(W)]
    expected = torch.empty_like(q)
    for i, j, row, column in cells:
        seen = [(a, b) for a, b, r, c in cells if (r, c) == (row, column)]
        keys, values = (torch.stack([x[0, a, b, 0] for a, b in seen]) for x in (k, v))
        expected[0, i, j, 0] = (keys @ q[0, i, j, 0]).softmax(0) @ values
    torch.testing.assert_close(window_attention(q, k, v, size, shift), expected)


def test_hdit_odd_blocks_shift_and_a_level_counts_on():
    """The official index: 0, 1, ... on the way down, and further on the way up."""
    network = hdit(depths=[3, 2], self_attns=[{"type": "shifted-window", "d_head": 8, "window_size": 4}] * 2)
    shifts = [[b.self_attn.shift for b in level] for level in (*network.down_levels, *network.up_levels)]
    assert shifts == [[0, 2, 0], [2, 0, 2]] and [b.self_attn.shift for b in network.mid_level] == [0, 2]
    assert network.multiple == (16, 16)


def test_hdit_parameters_are_in_the_official_order():
    """Published training checkpoints hold their EMA weights as a list in this order."""
    level = [
        "self_attn.scale",
        "self_attn.norm.linear.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.out_proj.weight",
    ]
    level += ["ff.norm.linear.weight", "ff.up_proj.weight", "ff.down_proj.weight"]
    block = ["norm.scale", "up_proj.weight", "down_proj.weight"]
    expected = [
        "patch_in.proj.weight",
        "time_in_proj.weight",
        "aug_in_proj.weight",
        "mapping.in_norm.scale",
        *(f"mapping.blocks.0.{name}" for name in block),
        "mapping.out_norm.scale",
        *(f"{part}.{name}" for part in ("down_levels.0.0", "up_levels.0.0", "mid_level.0") for name in level),
        "merges.0.proj.weight",
        "splits.0.fac",
        "splits.0.proj.weight",
        "out_norm.scale",
        "patch_out.proj.weight",
    ]
    assert [name for name, _ in hdit().named_parameters()] == expected


def test_hdit_starts_at_zero_velocity_and_drops_out_only_in_training():
    network = hdit(dropout_rate=[0.5, 0.5], mapping_dropout_rate=0.5)
    x = randn(1, 3, 8, 16)
    assert not network(x, 0.5).any()
    torch.nn.init.ones_(network.patch_out.proj.weight)
    for block in network.modules():
        if hasattr(block, "out_proj"):
            torch.nn.init.eye_(block.out_proj.weight)
    assert (network(x, 0.5) - network(x, 0.5)).any()
    network.eval()
    assert torch.equal(network(x, 0.5), network(x, 0.5))


# ---- neighborhood attention


def naive_neighborhood_attention(q, k, v, kernel_size):
    """One query at a time: its window starts at clamp(i - (K - 1) / 2, 0, L - K) on each axis."""
    B, H, W, NH, D = q.shape
    out = torch.empty_like(q)
    for i in range(H):
        top = min(max(i - (kernel_size - 1) // 2, 0), H - kernel_size)
        for j in range(W):
            left = min(max(j - (kernel_size - 1) // 2, 0), W - kernel_size)
            window = slice(None), slice(top, top + kernel_size), slice(left, left + kernel_size)
            keys, values = (x[window].flatten(1, 2) for x in (k, v))  # (B, K², heads, D)
            logits = torch.einsum("bnd,blnd->bnl", q[:, i, j], keys) * D**-0.5
            out[:, i, j] = torch.einsum("bnl,blnd->bnd", logits.softmax(-1), values)
    return out


@settings(max_examples=30, deadline=None)
@given(
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    more=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_neighborhood_attention_is_exact(kernel_size, more, batch, heads, seed):
    """Also where the map is as small as the window, and at every border."""
    H, W = (kernel_size + m for m in more)
    q, k, v = (randn(batch, H, W, heads, 4, seed=seed + i, dtype=torch.float64) for i in range(3))
    expected = naive_neighborhood_attention(q, k, v, kernel_size)
    torch.testing.assert_close(ops.neighborhood_attention_2d(q, k, v, kernel_size), expected)


def test_window_over_the_whole_map_is_global_attention(randomized):
    local = randomized(loouformer(block_types=["neighborhood", "global"], window_sizes=[7, 0]))
    everywhere = loouformer(block_types=["global", "global"]).eval()
    everywhere.load_state_dict(local.state_dict())
    features = randn(2, 16, 7, 7)
    pos = models.layers.axial_positions(7, 7, torch.float32, features.device)
    attn, free = local.down_blocks[0][0].attn, everywhere.down_blocks[0][0].attn
    torch.testing.assert_close(attn(features, *attn.pos_emb(pos)), free(features, *free.pos_emb(pos)))


# ---- SwinIR

SWINIR_OPTIONS = {
    "nearest+conv 2": dict(sf=2, upsampler="nearest+conv"),
    "nearest+conv 4": dict(sf=4, upsampler="nearest+conv"),
    "nearest+conv 8, unshuffle 8": dict(sf=8, upsampler="nearest+conv", unshuffle=True, unshuffle_scale=8),
    "pixelshuffle 2": dict(sf=2, upsampler="pixelshuffle"),
    "pixelshuffle 3": dict(sf=3, upsampler="pixelshuffle"),
    "pixelshuffle 4": dict(sf=4, upsampler="pixelshuffle"),
    "pixelshuffledirect 2": dict(sf=2, upsampler="pixelshuffledirect"),
    "pixelshuffledirect 4, unshuffle 4": dict(sf=4, upsampler="pixelshuffledirect", unshuffle=True, unshuffle_scale=4),
    "none": dict(sf=1, upsampler=""),
    "none, given as None": dict(sf=1, upsampler=None),
    "3conv": dict(resi_connection="3conv"),
    "img_range": dict(img_range=255.0, sf=1, upsampler=""),
    "no qkv bias, own scale": dict(qkv_bias=False, qk_scale=0.3),
    "no patch norm": dict(patch_norm=False),
    "ape": dict(ape=True),
    "two groups": dict(depths=[1, 2], num_heads=[1, 3]),
}
every_swinir = pytest.mark.parametrize("name", SWINIR_OPTIONS)


@every_swinir
def test_swinir_enlarges_and_uses_all_its_parameters(randomized, name):
    options = SWINIR_OPTIONS[name]
    network = randomized(swinir(**options))
    down = options.get("unshuffle_scale", 1)
    side = 16 * down
    y = randn(2, 3, side, side).sigmoid()
    up = options.get("sf", 2) / down
    x = network(y)
    assert x.shape == (2, 3, side * up, side * up)
    if options.get("qkv_bias", True):
        # The keys' bias cancels in the softmax; its gradient is rounding.
        for block in network.modules():
            if hasattr(block, "qkv"):
                block.qkv.bias.register_hook(lambda g: torch.ones_like(g))
    every_parameter_counts(network, x)


@every_swinir
def test_swinir_batches_do_not_mix(randomized, name):
    options = SWINIR_OPTIONS[name]
    network = randomized(swinir(**options)).double()
    down = options.get("unshuffle_scale", 1)
    y = randn(3, 3, 8 * down, 12 * down, dtype=torch.float64).sigmoid()
    x = network(y)
    for i in range(3):
        torch.testing.assert_close(x[i : i + 1], network(y[i : i + 1]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        network.to(memory_format=torch.channels_last)(y.to(memory_format=torch.channels_last)), x
    )


def test_swinir_position_embedding_is_stretched_to_other_maps():
    network = swinir(ape=True)
    rows = torch.linspace(0, 1, 16)
    with torch.no_grad():
        network.absolute_pos_embed.copy_(rows[:, None, None].expand(16, 16, 12).reshape(1, 256, 12))
    table = network.absolute_pos_embed.view(1, 16, 16, 12)
    assert torch.equal(network._position_embedding(16, 16), table)
    stretched = network._position_embedding(32, 8)
    assert stretched.shape == (1, 32, 8, 12)
    # Between neighbouring rows: a quarter of the way from one, then from the other.
    torch.testing.assert_close(stretched[0, 1:3, 0, 0], rows[0] + (rows[1] - rows[0]) * torch.tensor([0.25, 0.75]))
    assert network(torch.rand(1, 3, 20, 8)).shape == (1, 3, 40, 16)


def test_swinir_windows_as_defined(randomized):
    """Shifted window attention against one token at a time: same window after the shift, same region before it."""
    network = randomized(swinir(depths=[2], num_heads=[2])).double()
    block = network.layers[0].residual_group.blocks[1]
    H, W, size, shift, NH = 8, 12, 4, 2, 2
    x = randn(1, H, W, 12, dtype=torch.float64)
    attn, y = block.attn, block.norm1(x)[0].reshape(H * W, 12)
    q, k, v = attn.qkv(y).view(H * W, 3, NH, 6).unbind(1)

    def place(i, n):
        """Where pixel i of an axis of n lands: (window, offset, whether it wrapped around)."""
        j = (i - shift) % n
        return j // size, j % size, i < shift

    out = torch.empty(H * W, NH, 6, dtype=torch.float64)
    for a in range(H * W):
        ra, ca = place(a // W, H), place(a % W, W)
        logits = torch.full((NH, H * W), -torch.inf, dtype=torch.float64)
        for b in range(H * W):
            rb, cb = place(b // W, H), place(b % W, W)
            if (ra[0], ca[0], ra[2], ca[2]) == (rb[0], cb[0], rb[2], cb[2]):
                index = (ra[1] - rb[1] + size - 1) * (2 * size - 1) + ca[1] - cb[1] + size - 1
                bias = attn.relative_position_bias_table[index]
                logits[:, b] = (q[a] * k[b]).sum(-1) * 6**-0.5 + bias
        out[a] = torch.einsum("nb,bnd->nd", logits.softmax(-1), v)
    attended = attn.proj(out.reshape(H * W, 12)).view(1, H, W, 12)
    expected = x + attended
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


# ---- configs and errors


@pytest.mark.parametrize("build", [sim_vae, autoencoder_kl, loouformer, swinir, hdit])
def test_config_rebuilds_the_network(build):
    network = build()
    again = type(network)(**network.config)
    assert again.config == network.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert repr(network)


@pytest.mark.parametrize("build", [sim_vae, autoencoder_kl, loouformer, swinir, hdit])
def test_keys_of_published_config_files(build):
    network = build(_class_name="Official", _diffusers_version="0.30.0", _name_or_path="somewhere")
    assert not [key for key in network.config if key.startswith("_")]


@pytest.mark.parametrize(
    "build, typo, meant",
    [
        (sim_vae, "norm_positon", "norm_pos"),
        (loouformer, "block_dim", "block_dims"),
        (swinir, "depth", "depths"),
        (hdit, "mapping_widths", "mapping_width"),
    ],
)
def test_an_unknown_option_names_the_nearest(build, typo, meant):
    with pytest.raises(TypeError, match=f"no option '{typo}'; did you mean '{meant}"):
        build(**{typo: 1})


@pytest.mark.parametrize(
    "build, options, message",
    [
        (sim_vae, dict(norm_pos="mid_norm"), "norm_pos must be one of pre_norm, post_norm"),
        (sim_vae, dict(norm_type="batch_norm"), "norm_type must be one of"),
        (sim_vae, dict(upsample_method="deconv"), "upsample_method must be one of"),
        (sim_vae, dict(mid_block_out_channel=8), "mid_block_out_channel 8 must equal"),
        (sim_vae, dict(down_block_types=["EncoderBlock2D"]), "down_block_types names 1 blocks"),
        (sim_vae, dict(block_out_channels=[24, 24], norm_type="group_norm"), "32 groups do not divide 24"),
        (autoencoder_kl, dict(act_fn="relu"), "act_fn must be silu"),
        (autoencoder_kl, dict(down_block_types=["DownEncoderBlock2D"]), "down_block_types names 1 blocks"),
        (autoencoder_kl, dict(up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]), "must all be UpDecoder"),
        (autoencoder_kl, dict(norm_num_groups=5), "5 groups do not divide 8"),
        (loouformer, dict(dwconv_type="depthwise"), "dwconv_type must be one of"),
        (loouformer, dict(downsample_method="pool"), "downsample_method must be one of"),
        (loouformer, dict(downsample_kernel_size=5), "needs kernel size 3"),
        (loouformer, dict(upsample_method="deconv"), "upsample_method must be one of"),
        (loouformer, dict(patch_embed_type="linear"), "patch_embed_type must be one of"),
        (loouformer, dict(block_types=["global", "local"]), "block_types must be one of"),
        (loouformer, dict(head_dims=[8]), "differ in length"),
        (loouformer, dict(head_dims=[12, 16]), "head_dim 12 must divide"),
        (loouformer, dict(mult=1.0), "rounds to 0"),
        (swinir, dict(upsampler="bicubic"), "upsampler must be"),
        (swinir, dict(sf=3), "enlarges by 2, 4 or 8"),
        (swinir, dict(sf=6, upsampler="pixelshuffle"), "3 or a power of 2"),
        (swinir, dict(resi_connection="2conv"), "resi_connection must be"),
        (swinir, dict(num_heads=[2, 2]), "1 depths but 2 num_heads"),
        (swinir, dict(unshuffle=True, unshuffle_scale=4), "unshuffle_scale 4 must equal sf 2"),
        (swinir, dict(patch_size=2), "patch_size must be 1"),
        (hdit, dict(depths=[1]), "differ in length"),
        (hdit, dict(self_attns=[NEAR, {"type": "none"}]), "one of neighborhood, global, shifted-window, got 'none'"),
        (hdit, dict(self_attns=[NEAR, "global"]), "one of neighborhood, global, shifted-window, got 'global'"),
        (
            hdit,
            dict(self_attns=[NEAR, {**FAR, "kernel_size": 3}]),
            "global attention has no 'kernel_size'; it has d_head",
        ),
        (hdit, dict(self_attns=[NEAR, {"type": "shifted-window"}]), "needs a window_size"),
        (hdit, dict(self_attns=[{**NEAR, "kernel_size": 4}, FAR]), "kernel_size must be odd, got 4"),
        (hdit, dict(self_attns=[{**NEAR, "d_head": 12}, FAR]), "d_head 12 must divide the width 16"),
        (hdit, dict(mapping_width=15), "mapping_width must be even, got 15"),
    ],
)
def test_options_that_do_not_fit(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"multiples of 2, got 6x5; pad the image"):
        sim_vae().encode(torch.zeros(1, 3, 6, 5))
    with pytest.raises(ValueError, match=r"at least 2, got 1x8; pad the image"):
        autoencoder_kl().encode(torch.zeros(1, 3, 1, 8))
    with pytest.raises(ValueError, match=r"multiples of 4, got 8x6; pad the image"):
        swinir()(torch.zeros(1, 3, 8, 6))
    with pytest.raises(ValueError, match="sigma is missing"):
        loouformer()(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"HDiT: height and width must be multiples of \(4, 4\) and at least \(6, 6\)"):
        hdit()(torch.zeros(1, 3, 8, 10), 0.5)
    with pytest.raises(ValueError, match=r"HDiT: x must be \(B, 6, H, W\), got the shape \(1, 3, 8, 8\)"):
        hdit(in_channels=6)(torch.zeros(1, 3, 8, 8), 0.5)
    with pytest.raises(ValueError, match="untimed"):
        loouformer(time_embed_dim=None)(torch.zeros(1, 2, 8, 8), 0.5)


def test_presets():
    with torch.device("meta"):  # millions of parameters, no values
        sizes = {name: sum(p.numel() for p in models.build(name).parameters()) / 1e6 for name in models.PRESETS}
        small = models.build("loouformer-s", in_channels=4, out_channels=4)
    assert 108 <= sizes["loouformer"] <= 118
    assert (round(sizes["hdit-imagenet256sp4"], 1), round(sizes["hdit-xl2"], 1)) == (160.5, 121.5)
    assert round(sizes["swinir-l"], 1) == 15.8
    # Published: 83.65 million (Stable Diffusion 1.5) and 83.82 million (FLUX.1) parameters.
    assert abs(sizes["sd-vae"] - 83.65) < 0.01 and abs(sizes["flux-vae"] - 83.82) < 0.01
    assert small.config["in_channels"] == 4
    with pytest.raises(ValueError, match="no preset 'sim-vae'; there are .*sim-vae-c32"):
        models.build("sim-vae")
