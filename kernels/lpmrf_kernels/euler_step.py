"""One Euler step of the restoration's ODE: z + dt · v.

Shapes      z, v and the result alike, any number of dimensions; nothing is broadcast.
Dtypes      z float32 (or float64), v any float; the result has z's dtype: the state is never rounded to v's.
Layouts     z and v are read with their own strides, nothing is copied; the result has z's memory format.
Arithmetic  v is upcast at the load; one multiplication and one addition in z's dtype.
Traffic     numel · (4 + sizeof(v) + 4) bytes, one pass. PyTorch with a bf16 v makes three (upcast, scale, add).
Fallback    The kernels take float32 z and float32, bfloat16 or float16 v of up to four dimensions. Everything else,
            float64 above all, goes to the reference and is counted.
Source      The explicit Euler method; direction of time as in Lipman et al. 2023 (t = 0 source, t = 1 data).
"""

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .launch import choices, launch_config
from .layout import laid_out_like, memory_order
from .registry import CompileCase, Kernel, Op, register, run

V_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# ---- kernel


@jit
def _euler_step_fwd_kernel(
    z_ptr,
    v_ptr,
    out_ptr,
    numel,
    size1,
    size2,
    size3,
    stride_z0,
    stride_z1,
    stride_z2,
    stride_z3,
    stride_v0,
    stride_v1,
    stride_v2,
    stride_v3,
    dt,
    FLAT: tl.constexpr,  # z and v lie in memory as out does
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], in out's memory order
    mask = offs < numel
    if FLAT:
        offs_z = offs
        offs_v = offs
    else:
        i3 = offs % size3
        i2 = offs // size3 % size2
        i1 = offs // size3 // size2 % size1
        i0 = offs // size3 // size2 // size1
        offs_z = i0 * stride_z0 + i1 * stride_z1 + i2 * stride_z2 + i3 * stride_z3
        offs_v = i0 * stride_v0 + i1 * stride_v1 + i2 * stride_v2 + i3 * stride_v3
    z = tl.load(z_ptr + offs_z, mask=mask)
    v = tl.load(v_ptr + offs_v, mask=mask).to(tl.float32)
    tl.store(out_ptr + offs, z + dt * v, mask=mask)


# ---- launchers


def _launch_euler_step(z: Tensor, v: Tensor, dt: float) -> Tensor:
    out = torch.empty_like(z)
    numel = z.numel()
    if numel:
        _, z, v = memory_order(out, z, v)
        sizes, z_strides, v_strides = (
            (pad,) * (4 - z.dim()) + tuple(x) for pad, x in ((1, z.shape), (0, z.stride()), (0, v.stride()))
        )
        default = {"BLOCK": 1024, "num_warps": 4}  # 16 bytes of z a thread and load
        config = launch_config("euler_step", z.device, default, numel=numel)
        flat = z.is_contiguous() and v.is_contiguous()
        with torch.cuda.device_of(z):
            _euler_step_fwd_kernel[(triton.cdiv(numel, config["BLOCK"]),)](
                z, v, out, numel, *sizes[1:], *z_strides, *v_strides, dt, FLAT=flat, **config
            )  # fmt: skip
    return out


def _cpp_euler_step(z: Tensor, v: Tensor, dt: float) -> Tensor:
    out = torch.empty_like(z)
    flat, z, v = memory_order(out, z, v)
    torch.ops.lpmrf_cpp.euler_step(z, v, dt, flat)
    return out


def _torch_euler_step(z: Tensor, v: Tensor, dt: float) -> Tensor:
    return laid_out_like(reference.euler_step(z, v, dt), z)


def _refuses(z: Tensor, v: Tensor, dt: float) -> str | None:
    if z.dtype != torch.float32:
        return f"the kernel keeps the state in float32, z is {z.dtype}"
    if v.dtype not in V_DTYPES:
        return f"the kernel takes a float32, bfloat16 or float16 v, not {v.dtype}"
    if z.dim() > 4:
        return "the kernel takes up to four dimensions"
    return None


def _compile_cases() -> list[CompileCase]:
    ints = ("numel", "size1", "size2", "size3", *(f"stride_{t}{d}" for t in "zv" for d in range(4)))
    return [
        CompileCase(
            f"{dtype} v, {'flat' if flat else 'strided'}",
            _euler_step_fwd_kernel,
            {
                "z_ptr": "*fp32",
                "v_ptr": f"*{dtype}",
                "out_ptr": "*fp32",
                **dict.fromkeys(ints, "i64"),
                "dt": "fp32",
            },
            {"FLAT": flat, "BLOCK": 1024},
            raced=dtype == "bf16" and flat,
        )
        for dtype in V_DTYPES.values()
        for flat in (True, False)
    ]


def _tune_inputs(device):
    for batch in (1, 8, 32):  # latents of 512x512 photos
        z = torch.randn(batch, 16, 64, 64, device=device)
        yield z, z.bfloat16(), 0.04


# ---- registration

register(
    Op(
        "euler_step",
        forward={
            "triton": Kernel(_launch_euler_step, _refuses),
            "cpp": Kernel(_cpp_euler_step, _refuses),
            "torch": Kernel(_torch_euler_step),
        },
        notes={"backward": "it is g and dt · g, which PyTorch does in one pass"},
        compile_cases=_compile_cases,
        candidates={"euler_step": choices(BLOCK=(256, 512, 1024, 2048, 4096), num_warps=(2, 4, 8))},
        tune_inputs=_tune_inputs,
    )
)


def _check(z: Tensor, v: Tensor) -> None:
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"euler_step: z must be float32 or float64, got {z.dtype}; keep the state as z.float()")
    if not v.dtype.is_floating_point:
        raise TypeError(f"euler_step: v must have a float dtype, got {v.dtype}")
    if v.shape != z.shape:
        raise ValueError(f"euler_step: z and v must have the same shape, got {tuple(z.shape)} and {tuple(v.shape)}")
    if v.device != z.device:
        raise ValueError(f"euler_step: z and v must be on one device, got {z.device} and {v.device}")


@torch.library.custom_op("lpmrf::euler_step", mutates_args=())
def _euler_step(z: Tensor, v: Tensor, dt: float) -> Tensor:
    _check(z, v)
    return run("euler_step", z, v, dt)


@_euler_step.register_fake
def _(z, v, dt):
    _check(z, v)
    return torch.empty_like(z)


def _setup_context(ctx, inputs, output):
    _, v, ctx.dt = inputs
    ctx.v_dtype = v.dtype


def _backward(ctx, g):
    return g, (ctx.dt * g).to(ctx.v_dtype) if ctx.needs_input_grad[1] else None, None


_euler_step.register_autograd(_backward, setup_context=_setup_context)
# No autocast rule: autocast then leaves the inputs as they are, which is right for an op that mixes dtypes on purpose.
# A rule would cast v in a pass of its own.


# ---- public


def euler_step(z: Tensor, v: Tensor, dt: float) -> Tensor:
    """One Euler step z + dt · v along the flow, t running from 0 (source) to 1 (clean).

    z: state, float32 (float64 is computed by the reference), any shape and memory format. v: velocity, same shape, any
    float dtype, any memory format. dt: step in flow time, 1/K for K even steps. Nothing is mutated.
    Returns a new tensor with z's shape, dtype and memory format. Differentiable in z and v.
    Raises TypeError for other dtypes, ValueError for different shapes (nothing is broadcast) or devices.
    """
    return torch.ops.lpmrf.euler_step(z, v, dt)
