"""accelerate(model): the fused ops answer as somebody else's code does, and really run."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpmrf_kernels as ops
from lpmrf_fast import accelerate, backend, restore_original
from lpmrf_kernels.reference import shift_mask

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}


class ResnetBlock(nn.Module):
    """As in VQGAN and its many descendants."""

    def __init__(self, channels, groups=4):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, channels, eps=1e-6) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        h = self.norm1(x)
        h = h * torch.sigmoid(h)
        h = self.norm2(self.conv1(h))
        return x + self.conv2(torch.sigmoid(h) * h)


class AttnBlock(nn.Module):
    def __init__(self, channels, groups=4):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        b, c, height, width = q.shape
        logits = torch.bmm(q.reshape(b, c, -1).permute(0, 2, 1), k.reshape(b, c, -1)) * c**-0.5
        h = torch.bmm(v.reshape(b, c, -1), logits.softmax(2).permute(0, 2, 1))
        return x + self.proj_out(h.reshape(b, c, height, width))


class Upsample(nn.Module):
    mode = "nearest"

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode=self.mode))


class LayerNorm2d(nn.Module):
    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels)), eps

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GEGLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Linear(channels, 4 * channels)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class SwinAttention(nn.Module):
    def __init__(self, dim, window, heads):
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        axis = torch.arange(window)
        y, x = (a.flatten() for a in torch.meshgrid(axis, axis, indexing="ij"))
        index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask):
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        logits = q * self.scale @ k.transpose(-2, -1) + bias
        if mask is not None:
            logits = (logits.view(-1, len(mask), self.heads, tokens, tokens) + mask[:, None]).flatten(0, 1)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, dim))


class SwinTransformerBlock(nn.Module):
    def __init__(self, dim, window, shift, heads=2):
        super().__init__()
        self.window_size, self.shift_size = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = SwinAttention(dim, window, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, x_size):
        (h, w), s, shift = x_size, self.window_size, self.shift_size
        b, _, c = x.shape
        maps = self.norm1(x).view(b, h, w, c).roll((-shift, -shift), (1, 2))
        windows = maps.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        windows = self.attn(windows, shift_mask(h, w, s, shift).to(x) if shift else None)
        maps = windows.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + maps.roll((shift, shift), (1, 2)).view(b, -1, c)
        return x + self.mlp(self.norm2(x))


class Pixels(nn.Module):
    """Rows of tokens, out of a map and back."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        sizes = (x.shape[2:],) if isinstance(self.block, SwinTransformerBlock) else ()
        return self.block(tokens, *sizes).transpose(1, 2).unflatten(2, x.shape[2:])


def models():
    torch.manual_seed(0)
    return {
        "adm": nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(True)),
        "vqgan": nn.Sequential(ResnetBlock(8), AttnBlock(8), Upsample(8), ResnetBlock(8), nn.GroupNorm(4, 8)),
        "convnext": nn.Sequential(LayerNorm2d(8), nn.Conv2d(8, 8, 1)),
        "transformer": nn.Sequential(Pixels(GEGLU(8))),
        "swin": nn.Sequential(*(Pixels(SwinTransformerBlock(8, 4, shift)) for shift in (0, 2))),
    }


@pytest.fixture(params=models())
def model(request):
    network = models()[request.param].eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def close(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    error = (a - b).abs().max() / b.abs().max()
    assert error <= TOLERANCE[b.dtype], float(error)


@pytest.fixture
def acts(monkeypatch):
    """Which activation each group norm was asked for."""
    asked = []
    original = ops.group_norm_silu
    monkeypatch.setattr(ops, "group_norm_silu", lambda *a: asked.append(a[5]) or original(*a))
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_answers_as_before(model, dtype, layout, mode):
    model = model.to(dtype, memory_format=layout)
    x = torch.randn(2, 8, 8, 12, dtype=dtype).to(memory_format=layout)
    names = list(model.state_dict())
    with mode():
        expected = model(x)
        report = accelerate(model)
        assert report.replaced and not report.skipped, report
        close(model(x).clone(), expected)
        assert list(model.state_dict()) == names
        assert not accelerate(model).replaced  # nothing is left to do
        restore_original(model)
        assert torch.equal(model(x), expected)
    assert not any(hasattr(type(m), "_original_class") for m in model.modules())


def test_every_rule_is_used():
    used = {rule for model in models().values() for rule in accelerate(model).replaced.values()}
    assert used == {rule.name for rule in backend.RULES}


def test_gradients(model):
    x = torch.randn(2, 8, 8, 12, requires_grad=True)
    model = model.double()
    x = x.detach().double().requires_grad_()
    reference = copy.deepcopy(model)
    accelerate(model)
    weights = torch.randn_like(model(x))
    wanted = torch.autograd.grad((reference(x) * weights).sum(), [x, *reference.parameters()])
    found = torch.autograd.grad((model(x) * weights).sum(), [x, *model.parameters()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_fused_ops_run(acts):
    model = models()["vqgan"]
    accelerate(model)
    acts.clear()
    with torch.no_grad():
        model(torch.randn(1, 8, 4, 4)).sum()
    assert acts == ["silu", "silu", "none", "silu", "silu", "none"]  # two blocks, attention between, a norm last


USES = {
    "silu": F.silu,
    "silu in place": lambda h: F.silu(h, inplace=True),
    "silu in place, not returned": lambda h: (F.silu(h, inplace=True), h)[1],
    "module": nn.SiLU(),
    "swish": lambda h: h * torch.sigmoid(h),
    "swish by method": lambda h: h.sigmoid() * h,
    "another gate": lambda h: h * torch.sigmoid(h + 1),
    "gate alone": lambda h: torch.sigmoid(h),
    "gate, then changed": lambda h: (torch.sigmoid(h), h.mul_(2))[0] * h,
    "both": lambda h: F.silu(h) + h,
    "plain, then silu": lambda h: (h + 1) * F.silu(h),
    "twice": lambda h: h * h,
    "scale and shift": lambda h: F.silu(h * 2 + 1),
    "in place": lambda h: F.silu(h.mul_(2)),
    "chunks": lambda h: torch.cat(h.chunk(2, 1)),
    "strides": lambda h: h.permute(0, 2, 3, 1).contiguous() * h.stride()[0],
    "index": lambda h: h[:, 1:, ..., None],
    "numpy": lambda h: torch.from_numpy(h.numpy()),
    "metadata": lambda h: torch.full(h.shape, float(h.ndim * h.size(0) * len(h) * h.numel())).to(h.device, h.dtype),
    "out": lambda h: torch.add(h, 1, out=torch.empty(h.shape)),
    "deepcopy": copy.deepcopy,
    "list": lambda h: torch.stack([h, F.silu(h)]),
    "op of ours": lambda h: ops.group_norm_silu(h, 2, None, None),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_is_done_with_a_norm(use, mode):
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(3, 4, 5, 2)
    with mode():
        expected = use(norm(x))
        accelerate(norm)
        close(use(norm(x)), expected)


def test_a_norms_input_overwritten_too_early():
    norm = nn.GroupNorm(2, 4)
    accelerate(norm)
    with torch.no_grad():
        x = torch.randn(1, 4, 5, 5)
        h = norm(x)
        x.zero_()
        with pytest.raises(RuntimeError, match="overwritten before its output was used; exclude that norm"):
            F.silu(h)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 7), (0, 8, 3, 3), (2, 8, 1, 1), (2, 8, 3, 4, 5)])
def test_shapes_of_a_group_norm(shape):
    norm = nn.GroupNorm(4, 8)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = F.silu(norm(x)) if shape != (2, 8, 1, 1) else F.silu(norm.double()(x.double()).float())
        norm.float()
        accelerate(norm)
        torch.testing.assert_close(F.silu(norm(x)), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm(x.transpose(-1, 1).contiguous().transpose(-1, 1)) + 0, norm(x) + 0)


def test_not_a_number_stays():
    norm = nn.GroupNorm(2, 4)
    accelerate(norm)
    x = torch.randn(2, 4, 3, 3)
    x[1, 0, 0, 0] = torch.nan
    with torch.no_grad():
        y = F.silu(norm(x))
    assert y[0].isfinite().all() and y[1, :2].isnan().all() and y[1, 2:].isfinite().all()


def test_copies_and_pickles_stay_fast(model):
    x = torch.randn(2, 8, 8, 8)
    report = accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert report.replaced and not accelerate(other).replaced
        with torch.no_grad():
            assert torch.equal(other(x) + 0, model(x) + 0)


def test_new_weights_take_effect(model):
    x = torch.randn(1, 8, 8, 8)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    accelerate(model)
    with torch.no_grad():
        model(x)
        model.load_state_dict(other.state_dict())
        close(model(x) + 0, other(x))


def test_hooks_still_run():
    norm, seen = nn.GroupNorm(2, 4), []
    norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    accelerate(norm)
    assert not seen
    with torch.no_grad():
        norm(torch.randn(1, 4, 2, 2))
    assert seen == [(1, 4, 2, 2)]


def test_autocast_runs_the_models_own_code(model):
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        accelerate(model)
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace has several
def test_compile_and_export(model):
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        expected = model(x)
        accelerate(model)
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
        close(torch.export.export(model, (x,)).module()(x), expected)
        close(torch.jit.trace(model, x)(x), expected)


class Scaled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class BilinearUpsample(Upsample):
    mode = "bilinear"


BilinearUpsample.__name__ = "Upsample"


class Failing(GEGLU):
    def forward(self, x):
        raise KeyError("nothing\nhere")


Failing.__name__ = "GEGLU"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Scaled(2, 4), "ours differs from its own code by"),
        (BilinearUpsample(4), "ours differs from its own code by"),
        (Failing(4), "KeyError: 'nothing"),
        (nn.GroupNorm(2, 4, device="meta"), "meta device; load them first"),
        (nn.GroupNorm(2, 4, dtype=torch.complex64), "its weights are torch.complex64"),
    ],
)
def test_what_answers_differently_keeps_its_code(module, reason):
    model = nn.ModuleDict({"part": module})
    original, training = type(module), module.training
    report = accelerate(model)
    assert not report.replaced and reason in report.skipped["part"] and "\n" not in report.skipped["part"]
    assert type(module) is original and module.training is training
    assert "1  left alone" in str(report) and "(part)" in str(report)


def test_the_random_state_and_the_modes_of_modules_stay():
    model = models()["swin"].train()
    model[0].block.mlp.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert accelerate(model).replaced
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_exclude():
    model = models()["vqgan"]
    report = accelerate(model, exclude=["0", "1.norm"])
    assert set(report.skipped) == {"0.norm1", "0.norm2", "1.norm"} and set(report.skipped.values()) == {"excluded"}
    assert set(report.replaced) == {"1", "2", "3.norm1", "3.norm2", "4"}
    with pytest.raises(ValueError, match="Sequential has no submodule 'decoder' to exclude"):
        accelerate(model, exclude=["decoder"])


@pytest.mark.parametrize("wrong", [None, "model", lambda x: x, nn.GroupNorm])
def test_what_is_no_module(wrong):
    with pytest.raises(TypeError, match="accelerate: expected a torch.nn.Module, got"):
        accelerate(wrong)


def test_report_of_a_model_without_anything_to_replace():
    assert str(accelerate(nn.Linear(2, 2))) == "    0  modules that a fused op serves"


def test_autoencoder_of_diffusers(acts):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).eval()
    x = torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        expected = vae(x).sample
        report = accelerate(vae)
        assert not report.skipped and set(report.replaced.values()) == {backend.RULES[0].name, backend.RULES[3].name}
        acts.clear()
        close(vae(x).sample, expected)
        assert (
            acts.count("none") == 2 and acts.count("silu") == len(report.replaced) - 3
        )  # two attentions, an upsampler


def test_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=8,
        attention_head_dim=8,
    ).double()
    inputs = torch.randn(2, 4, 8, 16).double(), 3, torch.randn(2, 5, 8).double()
    reference = copy.deepcopy(unet)
    report = accelerate(unet)
    assert not report.skipped and "GEGLU" in report.replaced.values()
    with torch.no_grad():
        close(unet(*inputs).sample, reference(*inputs).sample)
    for network in (unet, reference):
        network(*inputs).sample.square().sum().backward()
    for (name, a), b in zip(unet.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8, msg=name)
