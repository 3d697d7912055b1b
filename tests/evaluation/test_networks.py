"""Feature networks from state dicts: the same numbers as plain modules, and other files refused in one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpmrf_fast.evaluation.networks import DINOv2, Inception
from lpmrf_fast.perceptual import LPIPS


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- LPIPS


def alexnet():
    """torchvision's `features`, random."""
    torch.manual_seed(0)
    pool, relu = nn.MaxPool2d(3, 2), nn.ReLU()
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), relu, pool, nn.Conv2d(64, 192, 5, padding=2), relu, pool),
        *(nn.Conv2d(192, 384, 3, padding=1), relu, nn.Conv2d(384, 256, 3, padding=1), relu),
        *(nn.Conv2d(256, 256, 3, padding=1), relu, pool),
    )


def vgg16():
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "make, compared, widths",
    [
        (alexnet, [1, 4, 7, 9, 11], [64, 192, 384, 256, 256]),
        (vgg16, [3, 8, 15, 22, 29], [64, 128, 256, 512, 512]),
    ],
)
def test_lpips_is_its_definition(tmp_path, make, compared, widths):
    network = make()
    torch.save({f"features.{k}": v for k, v in network.state_dict().items()}, tmp_path / "net.pth")
    lines = [seeded(1, w, 1, 1, seed=w).abs() for w in widths]
    torch.save({f"lin{i}.model.1.weight": line for i, line in enumerate(lines)}, tmp_path / "lin.pth")
    x, y = seeded(2, 3, 64, 64).clamp(-1, 1), seeded(2, 3, 64, 64, seed=1).clamp(-1, 1)
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    a, b, expected = (x - shift) / scale, (y - shift) / scale, 0.0
    with torch.no_grad():
        for i, layer in enumerate(network):
            a, b = layer(a), layer(b)
            if i in compared:
                difference = (F.normalize(a) - F.normalize(b)).square()
                expected = expected + (difference * lines[compared.index(i)]).sum(1).mean((1, 2))
    distance = LPIPS(tmp_path / "net.pth", tmp_path / "lin.pth")
    assert torch.allclose(distance(x, y), expected, rtol=1e-4)
    assert torch.equal(distance(x, x), torch.zeros(2))
    x.requires_grad_()
    distance(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_lpips_finds_the_linear_weights_in_torchmetrics(tmp_path):
    pytest.importorskip("torchmetrics")
    torch.save({f"features.{k}": v for k, v in alexnet().state_dict().items()}, tmp_path / "net.pth")
    distance = LPIPS(tmp_path / "net.pth")
    assert distance.net == "alex" and (distance.line0 >= 0).all()


@pytest.mark.parametrize("content", [None, b"no weights", {"features.0.weight": torch.zeros(8, 3, 5, 5)}, {"a": 1}])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    for network in (LPIPS, Inception, DINOv2):
        with pytest.raises(ValueError, match="file.pth") as error:
            network(path)
        assert "\n" not in str(error.value)


# ---- Inception


def inception_state():
    """The shapes of the FID's Inception with random weights."""
    state = {}

    def conv(name, out, channels, *kernel, seed=len):
        generator = torch.Generator().manual_seed(seed(state))
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        height, width = kernel * (3 - len(kernel))
        fan = channels * height * width
        state[f"{name}.conv.weight"] = draw(out, channels, height, width) * (2 / fan) ** 0.5
        state[f"{name}.bn.weight"], state[f"{name}.bn.bias"] = 1 + 0.1 * draw(out), 0.1 * draw(out)
        state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"] = 0.1 * draw(out), 1 + 0.1 * draw(out).abs()
        return out

    def chain(block, channels, *convs):
        for name, out, *kernel in convs:
            channels = conv(f"{block}.{name}", out, channels, *kernel)

    stem = (("1a_3x3", 32, 3), ("2a_3x3", 32, 3), ("2b_3x3", 64, 3), ("3b_1x1", 80, 1), ("4a_3x3", 192, 3))
    channels = 3
    for name, out, kernel in stem:
        channels = conv(f"Conv2d_{name}", out, channels, kernel)
    triple = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    for block, channels, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        chain(block, channels, ("branch1x1", 64, 1))
        chain(block, channels, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5))
        chain(block, channels, *triple)
        chain(block, channels, ("branch_pool", pool, 1))
    chain("Mixed_6a", 288, ("branch3x3", 384, 3))
    chain("Mixed_6a", 288, *triple)
    for block, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        wide, tall = (1, 7), (7, 1)
        chain(block, 768, ("branch1x1", 192, 1))
        chain(block, 768, ("branch7x7_1", c, 1), ("branch7x7_2", c, *wide), ("branch7x7_3", 192, *tall))
        sizes = [(c, 1), (c, *tall), (c, *wide), (c, *tall), (192, *wide)]
        chain(block, 768, *((f"branch7x7dbl_{i}", *size) for i, size in enumerate(sizes, 1)))
        chain(block, 768, ("branch_pool", 192, 1))
    chain("Mixed_7a", 768, ("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3))
    sizes = [(192, 1), (192, 1, 7), (192, 7, 1), (192, 3)]
    chain("Mixed_7a", 768, *((f"branch7x7x3_{i}", *size) for i, size in enumerate(sizes, 1)))
    for block, channels in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        chain(block, channels, ("branch1x1", 320, 1))
        chain(block, channels, ("branch3x3_1", 384, 1))
        chain(block, channels, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
        for name in ("branch3x3_2", "branch3x3dbl_3"):
            chain(block, 384, (f"{name}a", 384, 1, 3))
            chain(block, 384, (f"{name}b", 384, 3, 1))
        chain(block, channels, ("branch_pool", 192, 1))
    return state


# What torch-fidelity's network gives for these weights and this image: mean, deviation and the first features.
INCEPTION = [0.327057, 0.450794, 0.632628, 1.248309, 1.074049]


def test_inception_gives_torch_fidelitys_features(tmp_path):
    torch.save(inception_state(), tmp_path / "inception.pth")
    features = Inception(tmp_path / "inception.pth")(seeded(1, 3, 299, 299).sigmoid())
    assert features.shape == (1, 2048)
    found = [float(features.mean()), float(features.std()), *features[0, :3].tolist()]
    assert found == pytest.approx(INCEPTION, rel=1e-3)


# ---- DINOv2


def test_dinov2_against_torchs_own_layers(tmp_path):
    """Square of 16 patches, so that the position embedding fits but for the authors' 0.1 of a patch."""
    width, depth, state = 64, 2, {}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 257, width), "patch_embed.proj.weight": (width, 3, 14, 14)}
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    for i in range(depth):
        linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, into) in linear.items():
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = (
                (out * width, into * width),
                (out * width,),
            )
        vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
        shapes |= {f"blocks.{i}.{name}": (width,) for name in vectors}
    for n, (name, shape) in enumerate(shapes.items()):
        state[name] = 0.1 * seeded(*shape, seed=n)
    torch.save(state, tmp_path / "dino.pth")
    network, x = DINOv2(tmp_path / "dino.pth"), torch.rand(2, 3, 224, 224)

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        y = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        y = F.conv2d(y, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
        y = torch.cat([state["cls_token"].expand(2, -1, -1), y.flatten(2).mT], 1) + network.positions(16)
        for i in range(depth):
            s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items()}
            attention = nn.MultiheadAttention(width, 1, batch_first=True)
            attention.in_proj_weight.copy_(s["attn.qkv.weight"])
            attention.in_proj_bias.copy_(s["attn.qkv.bias"])
            attention.out_proj.weight.copy_(s["attn.proj.weight"])
            attention.out_proj.bias.copy_(s["attn.proj.bias"])
            z = F.layer_norm(y, (width,), s["norm1.weight"], s["norm1.bias"], 1e-6)
            y = y + s["ls1.gamma"] * attention(z, z, z)[0]
            z = F.layer_norm(y, (width,), s["norm2.weight"], s["norm2.bias"], 1e-6)
            z = F.gelu(F.linear(z, s["mlp.fc1.weight"], s["mlp.fc1.bias"]))
            y = y + s["ls2.gamma"] * F.linear(z, s["mlp.fc2.weight"], s["mlp.fc2.bias"])
        expected = F.layer_norm(y, (width,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]
    assert torch.allclose(network(x), expected, atol=1e-4)
    stretched = (network.positions(16) - state["pos_embed"]).abs().max()
    assert 0 < stretched < 0.1
