"""Global attention: softmax(q kᵀ · scale) v, by the fastest of several implementations.

Shapes      q (B, heads, Lq, D), k and v (B, heads, Lk, D); the result like q. Lq and Lk are free.
Providers   triton       the kernels here: forward and backward in the flash form, scores are never in memory
            cpp          the same form on CPUs, float32 and bfloat16, without a backward
            sdpa         PyTorch's scaled_dot_product_attention, which picks a kernel of its own
            sdpa_flash, sdpa_cudnn, sdpa_efficient    the same, with one kernel prescribed
            flash_attn, xformers                      those packages, where they are installed
Choice      `use_attention(name)`, over the environment variable LPMRF_ATTENTION, over `use_backend` and LPMRF_BACKEND
            ("torch" is sdpa, "triton" and "cpp" are ours), over the fastest in this GPU's table of measurements, over
            sdpa. On a CPU cpp, where it is faster: AVX-512, and no matrix tiles (AMX), which bfloat16 in sdpa uses; and
            where nobody asks for gradients, for which "cpp" as a backend gives way to sdpa too. A provider that was
            asked for and cannot serve raises RuntimeError with its reason; one from the table gives way to the next.
            The choice is made when attention is called, or, inside torch.compile or export, when it is traced.
Table       "attention_providers" in configs/<GPU>.json (see `launch.py`), a row for each measured size with the
            nanoseconds of each provider: {"depth": 64, "queries": 1024, "keys": 1024, "triton": 9000, "sdpa": 9500}.
RoPE        Tables cos and sin rotate q and k in front, in PyTorch, whoever attends. Where they matter, the depthwise
            convolution in front applies them in its own pass.

C++         Heads of any size and layout; a block of 48 queries goes through its head's keys in tiles of 64, which lie
            in the thread's cache as float32, transposed once. Everything is float32 until the result's one rounding.

Of the Triton kernels:
Dtypes      q, k and v float32, bfloat16 or float16, all alike.
Layouts     Any strides are read in place; the result has q's memory format.
Arithmetic  Products accumulate in float32; the softmax is float32 and online.
Traffic     q, k, v and out about once, k and v again out of the L2 cache for every tile of queries. The backward saves
            the inputs, out and the logsumexp (4 bytes a query).
Gradients   dq by tiles of queries, dk and dv by tiles of keys: no atomics, two runs give the same bits.
Refused     Heads of more than 128 channels, and float64.
Source      Dao 2023 (FlashAttention-2, arXiv 2307.08691).
"""

import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference
from ._triton import jit, tl
from .launch import choices, launch_config, nearest_row
from .registry import OPS, CompileCase, Kernel, Op, Served, forced_backend, register, unavailable
from .tiles import DTYPES, load_tile, tile_size, upcast

_log = logging.getLogger("lpmrf_kernels")


# ---- kernels


@jit
def _rows(i, stride_l, stride_d, BLOCK_D: tl.constexpr):
    return i.to(tl.int64)[:, None] * stride_l + tl.arange(0, BLOCK_D)[None, :] * stride_d  # [rows, BLOCK_D]


@jit
def _load_rows(ptr, i, length, stride_l, stride_d, UPCAST: tl.constexpr, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = (i < length)[:, None] & (tl.arange(0, BLOCK_D) < DEPTH)[None, :]
    return load_tile(ptr, _rows(i, stride_l, stride_d, BLOCK_D), mask, UPCAST)


@jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [B, heads, Lq], float32
    heads,
    queries,
    keys,
    stride_qb,
    stride_qn,
    stride_ql,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vl,
    stride_vd,
    stride_ob,
    stride_on,
    stride_ol,
    stride_od,
    scale,
    UPCAST: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // heads).to(tl.int64)
    head = (pid // tiles % heads).to(tl.int64)
    i = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_qb + head * stride_qn
    k_ptr += b * stride_kb + head * stride_kn
    v_ptr += b * stride_vb + head * stride_vn
    q = _load_rows(q_ptr, i, queries, stride_ql, stride_qd, UPCAST, DEPTH, BLOCK_D)
    scale *= 1.4426950408889634  # log2 e: exp2 is the machine's own
    largest = tl.full((BLOCK_M,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, keys, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, j, keys, stride_kl, stride_kd, UPCAST, DEPTH, BLOCK_D)
        v = _load_rows(v_ptr, j, keys, stride_vl, stride_vd, UPCAST, DEPTH, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where((j < keys)[None, :], s, -float("inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = new

    mask = i < queries
    out_ptr += b * stride_ob + head * stride_on
    mask_out = mask[:, None] & (tl.arange(0, BLOCK_D) < DEPTH)[None, :]
    tl.store(out_ptr + _rows(i, stride_ol, stride_od, BLOCK_D), out * (1.0 / total)[:, None], mask=mask_out)
    lse = 0.6931471805599453 * (largest + tl.log2(total))
    tl.store(lse_ptr + (b * heads + head) * queries + i, lse, mask=mask)


@jit
def _attention_dq_kernel(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    delta_ptr,  # like lse: Σ_d g · out of each query, for the other kernel
    heads,
    queries,
    keys,
    stride_gb,
    stride_gn,
    stride_gl,
    stride_gd,
    stride_qb,
    stride_qn,
    stride_ql,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vl,
    stride_vd,
    stride_ob,
    stride_on,
    stride_ol,
    stride_od,
    stride_xb,
    stride_xn,
    stride_xl,
    stride_xd,
    scale,
    UPCAST: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // heads).to(tl.int64)
    head = (pid // tiles % heads).to(tl.int64)
    i = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = i < queries
    g_ptr += b * stride_gb + head * stride_gn
    q_ptr += b * stride_qb + head * stride_qn
    k_ptr += b * stride_kb + head * stride_kn
    v_ptr += b * stride_vb + head * stride_vn
    out_ptr += b * stride_ob + head * stride_on
    g = _load_rows(g_ptr, i, queries, stride_gl, stride_gd, UPCAST, DEPTH, BLOCK_D)
    out = _load_rows(out_ptr, i, queries, stride_ol, stride_od, UPCAST, DEPTH, BLOCK_D)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    rows = (b * heads + head) * queries + i
    tl.store(delta_ptr + rows, delta, mask=mask)
    q = _load_rows(q_ptr, i, queries, stride_ql, stride_qd, UPCAST, DEPTH, BLOCK_D)
    lse = tl.load(lse_ptr + rows, mask=mask, other=0.0) * 1.4426950408889634
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, keys, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, j, keys, stride_kl, stride_kd, UPCAST, DEPTH, BLOCK_D)
        v = _load_rows(v_ptr, j, keys, stride_vl, stride_vd, UPCAST, DEPTH, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        p = tl.where((j < keys)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr += b * stride_xb + head * stride_xn
    mask_dq = mask[:, None] & (tl.arange(0, BLOCK_D) < DEPTH)[None, :]
    tl.store(dq_ptr + _rows(i, stride_xl, stride_xd, BLOCK_D), dq * scale, mask=mask_dq)


@jit
def _attention_dkdv_kernel(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    heads,
    queries,
    keys,
    stride_gb,
    stride_gn,
    stride_gl,
    stride_gd,
    stride_qb,
    stride_qn,
    stride_ql,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vl,
    stride_vd,
    stride_xb,
    stride_xn,
    stride_xl,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yl,
    stride_yd,
    scale,
    UPCAST: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # keys here
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(keys, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // heads).to(tl.int64)
    head = (pid // tiles % heads).to(tl.int64)
    j = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    g_ptr += b * stride_gb + head * stride_gn
    q_ptr += b * stride_qb + head * stride_qn
    k_ptr += b * stride_kb + head * stride_kn
    v_ptr += b * stride_vb + head * stride_vn
    k = _load_rows(k_ptr, j, keys, stride_kl, stride_kd, UPCAST, DEPTH, BLOCK_D)
    v = _load_rows(v_ptr, j, keys, stride_vl, stride_vd, UPCAST, DEPTH, BLOCK_D)
    dk = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, queries, BLOCK_N, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_N)
        q = _load_rows(q_ptr, i, queries, stride_ql, stride_qd, UPCAST, DEPTH, BLOCK_D)
        g = _load_rows(g_ptr, i, queries, stride_gl, stride_gd, UPCAST, DEPTH, BLOCK_D)
        rows = (b * heads + head) * queries + i
        lse = tl.load(lse_ptr + rows, mask=i < queries, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + rows, mask=i < queries, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)  # [keys, queries]
        p = tl.where((i < queries)[None, :], tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    mask = (j < keys)[:, None] & (tl.arange(0, BLOCK_D) < DEPTH)[None, :]
    dk_ptr += b * stride_xb + head * stride_xn
    dv_ptr += b * stride_yb + head * stride_yn
    tl.store(dk_ptr + _rows(j, stride_xl, stride_xd, BLOCK_D), dk * scale, mask=mask)
    tl.store(dv_ptr + _rows(j, stride_yl, stride_yd, BLOCK_D), dv, mask=mask)


# ---- launchers


def _launch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q)
    if q.numel():
        config = _config("attention", q, k)
        with torch.cuda.device_of(q):
            _attention_fwd_kernel[_grid(q, config)](
                q, k, v, out, lse, q.shape[1], q.shape[2], k.shape[2],
                *q.stride(), *k.stride(), *v.stride(), *out.stride(), scale, **_constants(q), **config,
            )  # fmt: skip
    return out, lse


def _launch_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    delta = torch.empty_like(lse)
    sizes = q.shape[1], q.shape[2], k.shape[2]
    with torch.cuda.device_of(q):
        config = _config("attention_dq", q, k)
        _attention_dq_kernel[_grid(q, config)](
            g, q, k, v, out, lse, dq, delta, *sizes,
            *g.stride(), *q.stride(), *k.stride(), *v.stride(), *out.stride(), *dq.stride(), scale,
            **_constants(q), **config,
        )  # fmt: skip
        config = _config("attention_dkdv", q, k)
        _attention_dkdv_kernel[_grid(k, config)](
            g, q, k, v, lse, delta, dk, dv, *sizes,
            *g.stride(), *q.stride(), *k.stride(), *v.stride(), *dk.stride(), *dv.stride(), scale,
            **_constants(q), **config,
        )  # fmt: skip
    return dq, dk, dv


def _cpp_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q)
    if q.numel():
        rows = out if out.stride(3) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
        torch.ops.lpmrf_cpp.attention(q, k, v, scale, rows, lse)
        if rows is not out:
            out.copy_(rows)
    return out, lse


def _grid(x: Tensor, config: dict[str, int]) -> tuple[int]:
    return (x.shape[0] * x.shape[1] * -(-x.shape[2] // config["BLOCK_M"]),)


def _config(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    """A table is made with half precision and heads of 64: what is larger may not fit the memory of its choices."""
    default = _default(kernel, q)
    if q.dtype == torch.float32 or q.shape[3] > 64:
        return default
    sizes = {"rows": q.shape[0] * q.shape[1] * q.shape[2], "keys": k.shape[2], "depth": q.shape[3]}
    return launch_config(kernel, q.device, default, **sizes)


def _default(kernel: str, q: Tensor) -> dict[str, int]:
    """Tiles of 128 queries where there are enough of them to fill a large GPU, else 64. Every choice fits 99 KB."""
    block_d = tile_size(q.shape[3])
    wide, padded = block_d > 64, block_d != q.shape[3]  # masks along the channels cost registers
    if q.dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "STAGES": 1, "num_warps": 4 if kernel == "attention_dkdv" else 8}
    if kernel == "attention":
        many = q.shape[0] * q.shape[1] * q.shape[2] >= 256 * 128 and not padded
        return {"BLOCK_M": 128 if many else 64, "BLOCK_N": 64, "STAGES": 2, "num_warps": 8 if many else 4}
    warps = 8 if wide and kernel == "attention_dkdv" else 4
    return {"BLOCK_M": 64, "BLOCK_N": 32 if wide or padded else 64, "STAGES": 2, "num_warps": warps}


def _constants(q: Tensor) -> dict[str, int | bool]:
    return {"UPCAST": upcast(q.dtype), "DEPTH": q.shape[3], "BLOCK_D": tile_size(q.shape[3])}


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _compile_cases() -> list[CompileCase]:
    """Heads of 64 channels as LooUFormer and HDiT have, few and many queries; then the other sizes of a tile."""
    cases = []
    for dtype, D, rows in (
        (torch.bfloat16, 64, 256),
        (torch.bfloat16, 64, 65536),
        (torch.float16, 40, 65536),
        (torch.bfloat16, 128, 65536),
        (torch.float32, 64, 65536),
    ):
        q = torch.empty(1, 1, rows, D, dtype=dtype, device="meta")
        for kernel, name, tensors in (
            (_attention_fwd_kernel, "attention", "qkvo"),
            (_attention_dq_kernel, "attention_dq", "gqkvox"),
            (_attention_dkdv_kernel, "attention_dkdv", "gqkvxy"),
        ):
            if rows == 256 and name != "attention":
                continue  # the backward's tiles do not depend on it
            constants = {**_constants(q), "UPCAST": False, **_default(name, q)}
            warps = constants.pop("num_warps")
            constants |= {f"stride_{t}d": 1 for t in tensors}
            names = [arg for arg in kernel.arg_names if arg not in constants]
            signature = {arg: "i64" if arg.startswith("stride") else "i32" for arg in names}
            signature |= {arg: f"*{DTYPES[dtype]}" for arg in names if arg.endswith("_ptr")}
            signature |= {arg: "*fp32" for arg in names if arg in ("lse_ptr", "delta_ptr")} | {"scale": "fp32"}
            label = f"{name.removeprefix('attention').strip('_') or 'forward'}, {DTYPES[dtype]}, heads of {D}"
            label += f", tiles of {constants['BLOCK_M']}"
            aligned = tuple(arg for arg in names if arg.startswith("stride") or arg.endswith("_ptr"))
            raced = dtype == torch.bfloat16 and D == 64 and rows > 256
            cases.append(CompileCase(label, kernel, signature, constants, warps, aligned, config=name, raced=raced))
    return cases


# ---- providers


@dataclass(frozen=True)
class Provider:
    run: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    missing: Callable[[str], str | None]
    """Device type → why it serves no tensors there, None if it does."""
    refuses: Callable[[torch.dtype, int], str | None] = lambda dtype, depth: None
    """Dtype and channels of a head → why it does not take them."""


def _run_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.ops.lpmrf.attention(q, k, v, scale)[0]


def _run_cpp(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.ops.lpmrf.attention(q, k, v, scale, "cpp")[0]


def _cpp_refuses(dtype: torch.dtype, depth: int) -> str | None:
    kernel_takes = dtype in (torch.float32, torch.bfloat16)
    return None if kernel_takes else f"the kernel takes float32 or bfloat16, not {dtype}"


def _triton_refuses(dtype: torch.dtype, depth: int) -> str | None:
    if dtype not in DTYPES:
        return f"the kernel takes float32, bfloat16 or float16, not {dtype}"
    return None if depth <= 128 else "the kernel takes heads of up to 128 channels"


def _sdpa(backend: SDPBackend | None = None):
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return run


def _cuda_only(device: str) -> str | None:
    return None if device == "cuda" else f"it serves CUDA tensors, not {device}"


@cache
def _import_error(module: str) -> str | None:
    """Why a peer's package is not there."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer built for another torch fails in ways of its own
        return f"{module} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


def _peer(module: str) -> Callable[[str], str | None]:
    return lambda device: _cuda_only(device) or _import_error(module)


def _half_only(dtype: torch.dtype, depth: int) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else f"it takes bfloat16 or float16, not {dtype}"


def _run_flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    attend = importlib.import_module("flash_attn").flash_attn_func
    return attend(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale).transpose(1, 2)


def _run_xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    return attend(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


PROVIDERS = {
    "triton": Provider(_run_triton, lambda device: unavailable("triton", device), _triton_refuses),
    "cpp": Provider(_run_cpp, lambda device: unavailable("cpp", device), _cpp_refuses),
    "sdpa": Provider(_sdpa(), lambda device: None),
    "sdpa_flash": Provider(_sdpa(SDPBackend.FLASH_ATTENTION), _cuda_only, _half_only),
    "sdpa_cudnn": Provider(_sdpa(SDPBackend.CUDNN_ATTENTION), _cuda_only, _half_only),
    "sdpa_efficient": Provider(_sdpa(SDPBackend.EFFICIENT_ATTENTION), _cuda_only),
    "flash_attn": Provider(_run_flash_attn, _peer("flash_attn"), _half_only),
    "xformers": Provider(_run_xformers, _peer("xformers.ops")),
}

_asked: ContextVar[str | None] = ContextVar("lpmrf_attention", default=None)


@contextmanager
def use_attention(name: str) -> Iterator[None]:
    """Attend with this provider inside, over LPMRF_ATTENTION: a name out of this module's docstring, or "auto".

    Goes with the thread or task that entered it. Raises ValueError for another name; where the provider cannot serve,
    `attention` raises RuntimeError with its reason.
    """
    token = _asked.set(_known(name, "use_attention"))
    try:
        yield
    finally:
        _asked.reset(token)


def _known(name: str, who: str) -> str:
    if name not in (*PROVIDERS, "auto"):
        raise ValueError(f"{who}: no attention is called {name!r}; there are {', '.join(PROVIDERS)} and auto")
    return name


# What reads the environment, files and packages is constant where torch.compile traces it.


@torch.compiler.assume_constant_result
def _forced() -> str | None:
    name = _asked.get() or _known(os.environ.get("LPMRF_ATTENTION") or "auto", "LPMRF_ATTENTION")
    if name != "auto":
        return name
    return {None: None, "triton": "triton", "torch": "sdpa", "cpp": None}[forced_backend()]


@torch.compiler.assume_constant_result
def _refusal(name: str, device: str, dtype: torch.dtype, depth: int) -> str | None:
    return PROVIDERS[name].missing(device) or PROVIDERS[name].refuses(dtype, depth)


@torch.compiler.assume_constant_result
def _fastest(device: torch.device, dtype: torch.dtype, depth: int, queries: int, keys: int) -> str:
    row = nearest_row("attention_providers", device, depth=depth, queries=queries, keys=keys)
    able = (name for name in PROVIDERS.keys() & row.keys() if _refusal(name, device.type, dtype, depth) is None)
    return min(able, key=row.get, default="sdpa")


@torch.compiler.assume_constant_result
def _fastest_on_cpu(dtype: torch.dtype, depth: int) -> str:
    """For inference. Where C++ was asked for as a backend, or vectors are wide and there are no tiles for bfloat16."""
    if _refusal("cpp", "cpu", dtype, depth):
        return "sdpa"
    tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and not tiles
    return "cpp" if fast or forced_backend() == "cpp" else "sdpa"


def _choose(q: Tensor, k: Tensor, v: Tensor) -> str:
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    device = q.device.type
    if name := _forced():
        reason = _refusal(name, device, q.dtype, q.shape[3])
        if reason is None and name == "cpp" and gradients:
            reason = "it has no backward; sdpa has"
        if reason:
            raise RuntimeError(f"attention: {name!r} was asked for and cannot serve: {reason}")
        return name
    if device == "meta":
        return "triton"  # shapes alone: one op, as every kernel is, not the products and the scores of PyTorch's form
    if device == "cuda":
        return _fastest(q.device, q.dtype, q.shape[3], q.shape[2], k.shape[2])
    return _fastest_on_cpu(q.dtype, q.shape[3]) if device == "cpu" and not gradients else "sdpa"


def _served(direction: str, device: str) -> Served:
    """The line of `backends()`: providers in the place of backends. A table may choose another one for some sizes."""
    forced = _forced()
    why_not = {name: p.missing(device) for name, p in PROVIDERS.items() if p.missing(device)}
    if direction == "backward":
        why_not.setdefault("cpp", "it has no backward")
    first = forced or (_fastest_on_cpu(torch.bfloat16, 64) if device == "cpu" and direction == "forward" else "sdpa")
    backend = None if first in why_not else first
    other = f"{first} was asked for" if forced else f"{first} comes first where no table says that another is faster"
    why_not.update((name, other) for name in PROVIDERS if name not in why_not and name != first)
    return Served("attention", direction, device, backend, why_not)


def _tune_inputs(device):
    """The coarse levels of LooUFormer and HDiT; the gradients at a training's batch; views as networks have them."""
    for batch, heads, tokens, gradients in (
        (1, 12, 256, False),
        (1, 16, 1024, False),
        (8, 12, 256, False),
        (8, 16, 1024, True),
    ):
        shape, like = (batch, tokens, heads, 64), {"device": device, "dtype": torch.bfloat16}
        qkv = (torch.randn(shape, **like).transpose(1, 2).requires_grad_(gradients) for _ in range(3))
        yield *qkv, 0.125


def _race_providers(device: torch.device, measure: Callable[[Callable], float]) -> dict[str, list[dict[str, int]]]:
    """The table of providers: nanoseconds of each that serves at these sizes."""
    rows = []
    for q, k, v, scale in _tune_inputs(device):
        row = {"depth": q.shape[3], "queries": q.shape[2], "keys": k.shape[2]}
        q, k, v = (t.detach() for t in (q, k, v))
        for name, provider in PROVIDERS.items():
            if _refusal(name, device.type, q.dtype, q.shape[3]) is None:
                call = partial(provider.run, q, k, v, scale)
                try:
                    row[name] = max(1, round(1e9 * measure(call)))
                except RuntimeError as error:  # a prescribed kernel that this GPU has not
                    _log.debug("attention by %s is out: %s", name, error)
        rows.append(row)
    return {"attention_providers": rows}


# 128 queries spill in four warps, in the forward only with 128 keys: `compile_report --candidates` says so.
_FORWARD = [
    choice
    for choice in choices(BLOCK_M=(64, 128), BLOCK_N=(64, 128), STAGES=(2, 3), num_warps=(4, 8))
    if choice["BLOCK_M"] * choice["BLOCK_N"] // choice["num_warps"] <= 2048
]
_BACKWARD = [
    choice
    for choice in choices(BLOCK_M=(64, 128), BLOCK_N=(32, 64), STAGES=(2,), num_warps=(4, 8))
    if choice["BLOCK_M"] // choice["num_warps"] <= 16
]


# ---- registration

register(
    Op(
        "attention",
        forward={
            "triton": Kernel(_launch_attention, lambda q, *args: _triton_refuses(q.dtype, q.shape[3])),
            "cpp": Kernel(_cpp_attention, lambda q, *args: _cpp_refuses(q.dtype, q.shape[3])),
            "torch": Kernel(reference.attention),
        },
        backward={"triton": Kernel(_launch_attention_backward)},
        compile_cases=_compile_cases,
        candidates={
            "attention": _FORWARD,
            "attention_dq": _BACKWARD,
            "attention_dkdv": _BACKWARD,
        },
        tune_inputs=_tune_inputs,
        race=_race_providers,
        served=_served,
    )
)


@torch.library.custom_op("lpmrf::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "triton") -> tuple[Tensor, Tensor]:
    return OPS["attention"].forward[backend].run(q, k, v, scale)


@_attention.register_fake
def _(q, k, v, scale, backend="triton"):
    return _outputs(q)


@torch.library.custom_op("lpmrf::attention_backward", mutates_args=())
def _attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_attention_backward(g, q, k, v, out, lse, scale)


@_attention_backward.register_fake
def _(g, q, k, v, out, lse, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, g, _):
    return *torch.ops.lpmrf.attention_backward(g, *ctx.saved_tensors, ctx.scale), None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


# ---- public


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v, by the provider that this module's docstring says: `use_attention` forces one.

    q: (B, heads, Lq, D), k and v: (B, heads, Lk, D), one float dtype, any strides. scale: of the logits, by default
    D**-0.5. cos, sin: RoPE tables (L, heads, R), R at most D / 2, for q and k alike; the first 2R channels are rotated.
    Nothing is mutated; differentiable in q, k and v.
    Returns (B, heads, Lq, D) in q's dtype. Raises TypeError for dtypes, ValueError for shapes, devices or a scale that
    do not fit, RuntimeError where a provider was asked for and cannot serve.
    """
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"attention: q, k and v must have one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention: expected q (B, heads, Lq, D), k and v (B, heads, Lk, D), got {shapes}")
    if k.shape[2] == 0 or q.shape[3] == 0:
        raise ValueError(f"attention: there must be a key and a channel at least, got the shape {tuple(k.shape)} of k")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"attention: q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"attention: scale must be finite, got {scale}")
    if cos is not None or sin is not None:
        q, k = (_rotated(t, cos, sin) for t in (q, k))
    return PROVIDERS[_choose(q, k, v)].run(q, k, v, scale)


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    B, heads, L, D = x.shape
    for table in (cos, sin):
        if table is None or table.dim() != 3 or table.shape[:2] != (L, heads) or 2 * table.shape[2] > D:
            got = None if table is None else tuple(table.shape)
            raise ValueError(f"attention: cos and sin must be ({L}, {heads}, at most {D // 2}), got {got}")
    return reference.rope(x, cos.transpose(0, 1), sin.transpose(0, 1))
