"""`accelerate(model)`: the fused ops inside somebody else's model, whose code, weights and names stay what they are.

    report = accelerate(AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse").eval())
    print(report)

A module that a rule below knows changes its class for a subclass with another `forward`; parameters, buffers, hooks and
state dict are untouched, and `restore_original` gives the class back. Every change proves itself first: the module runs
on random input before and after, and one that answers differently keeps its own code and is named in the report.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import lpmrf_kernels as ops

__all__ = ["Report", "accelerate", "restore_original"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of an answer's largest difference, by dtype, in units of its largest value."""


@dataclass
class Report:
    """What `accelerate` did. Printing it shows the counts, and what was left alone with the reason."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Rule by module name."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Reason by module name: modules that a rule knows and that kept their code."""

    def __str__(self) -> str:
        lines = [f"{n:5d}  {rule}" for rule, n in Counter(self.replaced.values()).most_common()]
        for reason, n in Counter(self.skipped.values()).most_common():
            first = next(name for name, why in self.skipped.items() if why == reason)
            lines.append(f"{n:5d}  left alone, {reason} ({first or 'the model'}{', ...' if n > 1 else ''})")
        return "\n".join(lines) or "    0  modules that a fused op serves"


def accelerate(model: nn.Module, *, exclude: Iterable[str] = ()) -> Report:
    """Change the modules inside `model` that the fused ops can serve, in place; a second call finds nothing to do.

    exclude: names of submodules to leave alone, with all that is inside them. Known are: GroupNorm, with the SiLU that
    follows it, as a module, function or x · sigmoid(x); LayerNorm2d; GEGLU; nearest upsampling with its convolution;
    VQGAN's and LDM's AttnBlock; SwinIR's SwinTransformerBlock. Call it after the weights are loaded and `model` is on
    its device in its dtype; both may change later.

    A group norm's output waits for what is done with it, where no gradient is asked for: exclude a norm whose *input*
    the model overwrites in place before it uses the output. Where gradients are asked for, and under torch.compile, the
    norm runs fused and SiLU by itself. Under autocast the model's own code runs.
    Raises TypeError for something that is not a module, ValueError for an excluded name that it does not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: expected a torch.nn.Module, got {type(model).__name__}; for a pipeline of"
            " several, accelerate each"
        )
    names = dict(model.named_modules())
    exclude = list(exclude)
    if unknown := [name for name in exclude if name not in names]:
        raise ValueError(f"accelerate: {type(model).__name__} has no submodule {unknown[0]!r} to exclude")
    report = Report()
    for name, module in names.items():
        rule = next((rule for rule in RULES if rule.knows(module)), None)
        if rule is None or hasattr(type(module), "_original_class"):
            continue
        if any(name == out or name.startswith(f"{out}.") or not out for out in exclude):
            report.skipped[name] = "excluded"
        elif reason := _replace(module, rule):
            report.skipped[name] = f"{rule.name}: {reason}"
        else:
            report.replaced[name] = rule.name
    return report


def restore_original(model: nn.Module) -> None:
    """Give every module inside `model` that `accelerate` changed its own class back."""
    for module in model.modules():
        if original := getattr(type(module), "_original_class", None):
            module.__class__ = original


@dataclass(frozen=True)
class Rule:
    """One kind of module, and the `forward` that serves it."""

    name: str
    knows: Callable[[nn.Module], bool]
    forward: Callable
    """forward(module, *args, **kwargs); `_own` calls the module's own."""
    example: Callable[[nn.Module, Callable], tuple]
    """(module, randn) -> arguments to prove it with."""
    silu: bool = False
    """SiLU of the answer is proved too."""


def _replace(module: nn.Module, rule: Rule) -> str | None:
    """Change the module's class if that changes none of its answers; else the reason why not."""
    parameters = list(module.parameters())
    device, dtype = next(((p.device, p.dtype) for p in parameters), (torch.device("cpu"), torch.float32))
    if "forward" in vars(module):
        return "somebody replaced its forward"
    if device.type == "meta":
        return "its weights are on the meta device; load them first"
    if dtype not in TOLERANCE:
        return f"its weights are {dtype}"
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    original, training = type(module), {part: part.training for part in module.modules()}
    try:
        for part in training:
            part.training = False
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            arguments = rule.example(module, randn)
            expected = original.forward(module, *arguments)
            module.__class__ = _subclass(original, rule)
            reason = _differ(expected, module.forward(*arguments))
            if not reason and rule.silu:
                reason = _differ(F.silu(expected), F.silu(module.forward(*arguments)))
    except Exception as error:  # somebody else's code may raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        for part, mode in training.items():
            part.training = mode
    if reason:
        module.__class__ = original
    return reason


def _differ(expected: Tensor, answer: Tensor) -> str | None:
    if (answer.shape, answer.dtype) != (expected.shape, expected.dtype):
        found, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (answer, expected))
        return f"ours gives {found}, its own code {wanted}"
    error = ((answer - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
    if not error <= TOLERANCE[expected.dtype]:
        return f"ours differs from its own code by {error:.1e} of the largest value"
    return None


@cache
def _subclass(original: type, rule: Rule) -> type:
    def reduce(self, protocol):
        _, _, state, *_ = super(subclass, self).__reduce_ex__(protocol)
        return _rebuild, (original, rule.name), state

    names = dict(__module__=original.__module__, __qualname__=original.__qualname__, __doc__=original.__doc__)
    subclass = type(
        original.__name__,
        (original,),
        {**names, "forward": rule.forward, "__reduce_ex__": reduce, "_original_class": original},
    )
    return subclass


def _rebuild(original: type, rule: str) -> nn.Module:
    """An empty module of the class that `rule` made of `original`, for copy and pickle."""
    subclass = _subclass(original, next(r for r in RULES if r.name == rule))
    return subclass.__new__(subclass)


def _own(module: nn.Module, *args, **kwargs):
    """What the module's own code answers."""
    return type(module)._original_class.forward(module, *args, **kwargs)


def _left_alone(x: Tensor) -> bool:
    """Autocast has rules of its own for the parts of a module, and a trace would lose what it does not see."""
    return torch.is_autocast_enabled(x.device.type) or torch.jit.is_tracing()


# GroupNorm, and SiLU behind it


def _normalise(norm: nn.GroupNorm, x: Tensor, act: str) -> Tensor:
    maps = x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1)
    return ops.group_norm_silu(maps, norm.num_groups, norm.weight, norm.bias, norm.eps, act).reshape(x.shape)


def _group_norm(self, x: Tensor) -> Tensor:
    x = x.value() if isinstance(x, _Pending) else x
    if _left_alone(x):
        return _own(self, x)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
    if wants_grad or torch.compiler.is_compiling():
        return _normalise(self, x, "none")
    return _Pending(self, x)


class _Pending(Tensor):
    """A group norm's output, or the sigmoid of one, before it is known what for: SiLU takes both in one pass, anything
    else gets the plain tensor."""

    @staticmethod
    def __new__(cls, norm: nn.GroupNorm, x: Tensor, gate_of: "_Pending | None" = None):
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    def __init__(self, norm, x, gate_of=None):
        self._norm, self._x, self._gate_of = norm, x, gate_of
        self._version_of_x = None if x.is_inference() else x._version
        self._value = None

    def compute(self, act: str) -> Tensor:
        if self._version_of_x is not None and self._x._version != self._version_of_x:
            raise RuntimeError(
                "accelerate: the input of a GroupNorm was overwritten before its output was used; exclude that norm"
            )
        return _normalise(self._norm, self._x, act)

    def value(self) -> Tensor:
        """The plain tensor, computed once."""
        if self._value is None:
            value = self.compute("none")
            self._value = value if self._gate_of is None else torch.sigmoid(value)
            self._x = None
        return self._value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        pending = [t for t in tensors if isinstance(t, cls) and t._value is None]
        norms = [t for t in pending if t._gate_of is None]
        if len(tensors) == len(norms) == 1:
            (norm,) = norms
            if func in SILU:
                y = norm.compute("silu")
                if kwargs.get("inplace"):
                    norm._value, norm._x = y, None
                return y
            if func in SIGMOID:
                return cls(norm._norm, norm._x, gate_of=norm)
        if func in PRODUCT and len(tensors) == len(pending) == 2 and len(norms) == 1:
            (norm,), (gate,) = norms, (t for t in pending if t._gate_of is not None)
            if gate._gate_of is norm:
                return norm.compute("silu")
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs or {}))
        return func(*args, **kwargs)


METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point", "element_size")),
}
SILU = {F.silu, torch._C._nn.silu, torch.ops.aten.silu, torch.ops.aten.silu.default}
SIGMOID = {torch.sigmoid, Tensor.sigmoid}
PRODUCT = {torch.mul, Tensor.mul}


# The other modules


def _layer_norm_2d(self, x: Tensor) -> Tensor:
    if _left_alone(x):
        return _own(self, x)
    return ops.layer_norm_2d(x, self.weight, self.bias, self.eps)


def _geglu(self, x: Tensor, *args, **kwargs) -> Tensor:
    if args or kwargs or _left_alone(x):
        return _own(self, x, *args, **kwargs)
    return ops.geglu(self.proj(x))


def _upsample(self, x: Tensor, *args, **kwargs) -> Tensor:
    if args or any(value is not None for value in kwargs.values()) or _left_alone(x):
        return _own(self, x, *args, **kwargs)
    x = x.value() if isinstance(x, _Pending) else x
    return ops.upsample_conv(x, self.conv.weight, self.conv.bias)


def _attention_block(self, x: Tensor) -> Tensor:
    if _left_alone(x):
        return _own(self, x)
    h = self.norm(x)
    q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))  # (B, 1, HW, C)
    h = ops.attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
    return x + self.proj_out(h)


def _swin_block(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    window, attention = self.window_size, self.attn
    if self.training or _left_alone(x) or any(size % window for size in x_size):
        return _own(self, x, x_size)
    bias = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)  # (heads, L, L)
    qkv = attention.qkv(self.norm1(x)).unflatten(1, x_size)
    maps = ops.window_attention(qkv, bias, window, self.shift_size, attention.scale)
    x = x + attention.proj(maps.flatten(1, 2))
    return x + self.mlp(self.norm2(x))


def _named(module: nn.Module, names: str, parts: str) -> bool:
    return type(module).__name__ in names.split() and all(hasattr(module, part) for part in parts.split())


def _three_by_three(conv) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


RULES = [
    Rule(
        "GroupNorm, with SiLU where it follows",
        lambda m: isinstance(m, nn.GroupNorm),
        _group_norm,
        lambda m, randn: (randn(2, m.num_channels, 5, 3),),
        silu=True,
    ),
    Rule(
        "LayerNorm2d",
        lambda m: _named(m, "LayerNorm2d LayerNorm2D", "weight bias eps"),
        _layer_norm_2d,
        lambda m, randn: (randn(2, m.weight.shape[0], 5, 3),),
    ),
    Rule(
        "GEGLU",
        lambda m: _named(m, "GEGLU", "proj"),
        _geglu,
        lambda m, randn: (randn(2, 5, m.proj.in_features),),
    ),
    Rule(
        "nearest upsampling and convolution",
        lambda m: _named(m, "Upsample Upsample2D", "conv") and _three_by_three(m.conv),
        _upsample,
        lambda m, randn: (randn(2, m.conv.in_channels, 5, 3),),
    ),
    Rule(
        "AttnBlock",
        lambda m: _named(m, "AttnBlock", "norm q k v proj_out"),
        _attention_block,
        lambda m, randn: (randn(2, m.q.in_channels, 5, 3),),
    ),
    Rule(
        "SwinTransformerBlock",
        lambda m: _named(m, "SwinTransformerBlock", "attn norm1 norm2 mlp window_size shift_size"),
        _swin_block,
        lambda m, randn: (
            randn(2, 6 * m.window_size**2, m.norm1.normalized_shape[0]),
            (2 * m.window_size, 3 * m.window_size),
        ),
    ),
]
