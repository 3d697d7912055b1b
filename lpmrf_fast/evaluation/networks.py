"""Feature networks of the set distances, run straight from published state dicts: no torchvision, no download.

They are functions of the file's tensors: the names in the file are the names in the code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..perceptual import read_state


class FromState(nn.Module):
    """A network whose tensors are called by the names that they have in a file."""

    def __init__(self, path, needed: str, what: str):
        super().__init__()
        state = read_state(path)
        if needed not in state:
            raise ValueError(f"{path}: not {what} (no {needed!r} in it)")
        for name, tensor in state.items():
            self.register_buffer(name.replace(".", "/"), tensor)  # a buffer's name holds no dot

    def __call__(self, *args):
        with torch.inference_mode():
            return super().__call__(*args)

    def tensor(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))

    def has(self, name: str) -> bool:
        return name.replace(".", "/") in self._buffers


class Inception(FromState):
    """Pool features of the FID's Inception-v3: (B, 3, H, W) in [0, 1] → (B, 2048).

    `path`: the TensorFlow weights of 2015-12-05 as ported to PyTorch (pt_inception-2015-12-05-*.pth). Images are
    resized bilinearly to 299x299 without antialiasing, as pytorch-fid and basicsr do. Average pools leave the padding
    out and the last block pools by maximum: the two oddities of that network.
    """

    def __init__(self, path):
        super().__init__(path, "Mixed_7c.branch_pool.conv.weight", "the FID's Inception-v3")

    def conv(self, x: Tensor, name: str, stride: int = 1, pad: bool = True) -> Tensor:
        weight = self.tensor(f"{name}.conv.weight")
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if pad and stride == 1 else 0
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        mean, variance, scale, shift = (
            self.tensor(f"{name}.bn.{part}") for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, variance, scale, shift, eps=1e-3))

    def path(self, x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = self.conv(x, f"{block}.{name}")
        return x

    def pooled(self, x: Tensor, block: str, maximum: bool = False) -> Tensor:
        pool = F.max_pool2d(x, 3, 1, 1) if maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.conv(pool, f"{block}.branch_pool")

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
        x = self.conv(x, "Conv2d_1a_3x3", stride=2)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3", pad=False), "Conv2d_2b_3x3")
        x = self.conv(self.conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", pad=False)
        x = F.max_pool2d(x, 3, 2)
        triple = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            five = self.path(x, b, "branch5x5_1", "branch5x5_2")
            x = torch.cat([self.path(x, b, "branch1x1"), five, self.path(x, b, *triple), self.pooled(x, b)], 1)
        b = "Mixed_6a"
        double = self.conv(self.path(x, b, *triple[:2]), f"{b}.{triple[2]}", stride=2)
        x = torch.cat([self.conv(x, f"{b}.branch3x3", stride=2), double, F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            seven = self.path(x, b, *(f"branch7x7_{i}" for i in (1, 2, 3)))
            double = self.path(x, b, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
            x = torch.cat([self.path(x, b, "branch1x1"), seven, double, self.pooled(x, b)], 1)
        b = "Mixed_7a"
        three = self.conv(self.path(x, b, "branch3x3_1"), f"{b}.branch3x3_2", stride=2)
        seven = self.path(x, b, *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
        x = torch.cat([three, self.conv(seven, f"{b}.branch7x7x3_4", stride=2), F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_7b", "Mixed_7c"):
            three, double = self.path(x, b, "branch3x3_1"), self.path(x, b, *triple[:2])
            split = [self.path(three, b, f"branch3x3_2{i}") for i in "ab"]
            split += [self.path(double, b, f"branch3x3dbl_3{i}") for i in "ab"]
            x = torch.cat([self.path(x, b, "branch1x1"), *split, self.pooled(x, b, maximum=b == "Mixed_7c")], 1)
        return x.mean((2, 3))


class DINOv2(FromState):
    """Class token of a DINOv2 vision transformer (arXiv 2304.07193): (B, 3, H, W) in [0, 1] → (B, width).

    `path`: an official state dict (dinov2_vits14_pretrain.pth and its larger sisters but the giant, whose feed-forward
    layers differ). Images are resized to 224x224, bicubic with antialiasing, and the position embedding with them.
    """

    SIZE = 224

    def __init__(self, path):
        super().__init__(path, "blocks.0.ls1.gamma", "a DINOv2 vision transformer")
        if not self.has("blocks.0.mlp.fc1.weight"):
            raise ValueError(f"{path}: DINOv2's giant is not supported; use the small, base or large network")
        self.depth = sum(self.has(f"blocks.{i}.norm1.weight") for i in range(100))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean.view(1, 3, 1, 1))
        self.register_buffer("std", std.view(1, 3, 1, 1))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"), eps=1e-6)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def positions(self, side: int) -> Tensor:
        embedding = self.tensor("pos_embed")
        grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (round((embedding.shape[1] - 1) ** 0.5), -1))
        # The authors stretch by a scale with 0.1 of a patch on top, which moves every sample a little.
        scale = (side + 0.1) / grid.shape[-1]
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def attention(self, x: Tensor, name: str) -> Tensor:
        heads = x.shape[-1] // 64
        q, k, v = self.linear(x, f"{name}.qkv").unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4)
        return self.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{name}.proj")

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(self.SIZE, self.SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        weight, bias = (self.tensor(f"patch_embed.proj.{part}") for part in ("weight", "bias"))
        x = F.conv2d((x - self.mean) / self.std, weight, bias, stride=weight.shape[-1])
        side = x.shape[-1]
        x = torch.cat([self.tensor("cls_token").expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self.positions(side)
        if self.has("register_tokens"):
            x = torch.cat([x[:, :1], self.tensor("register_tokens").expand(len(x), -1, -1), x[:, 1:]], 1)
        for i in range(self.depth):
            b = f"blocks.{i}"
            x = x + self.tensor(f"{b}.ls1.gamma") * self.attention(self.norm(x, f"{b}.norm1"), f"{b}.attn")
            hidden = F.gelu(self.linear(self.norm(x, f"{b}.norm2"), f"{b}.mlp.fc1"))
            x = x + self.tensor(f"{b}.ls2.gamma") * self.linear(hidden, f"{b}.mlp.fc2")
        return self.norm(x, "norm")[:, 0]
