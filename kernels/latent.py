"""Noise on the device: normal and uniform numbers and integers, the same as the CPU's stream, one launch for each.

    word_{r, 4q .. 4q+3} = Philox4x32-10(counter = (q, first_row + r, step mod 2^32, step >> 32 | stream << 16), seed)
    uniform  = (word >> 8) 2^-24
    normal   = sqrt(-2 log u) (cos 2 pi v, sin 2 pi v),   u, v = (word + 1/2) 2^-32 of two words beside each other
    integers = word_{r, 0} high >> 32

The step is read in the kernel, so that a captured launch goes on with the counter. Uniform numbers and integers equal
:mod:`fastgan.noise` to the bit. Normal numbers are computed in fp64 by the steps of ``csrc/noise.cpp`` and rounded once
(to bf16 and fp16 by way of fp32, as PyTorch does): with the same roundings they are equal to the bit, which the
interpreter shows; a GPU fuses multiply-adds, which changes the last bits in fp64 and so a few fp32 numbers in 10^8, as
many as differ from what is computed with 64 bits of mantissa.

fp64 division and root are the only subroutines. The library's cosine has a slow path for large angles, which needs a
stack; here an angle is less than a turn, and the quarter turns are taken off exactly.

Nothing here has a derivative. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11; Box and
Muller 1958, "A note on the generation of random normal deviates".
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan import noise
from fastgan.backend import Backend, resolve
from fastgan.kernels._launch import Launch, check, check_dtype, grid_1d
from fastgan.kernels._spec import OpSpec, Sample

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("normal", "uniform", "integers")

# ---- reference


def latent_reference(
    rows: int, cols: int, *, seed: int, stream: int, step: noise.Step, first_row: int = 0, kind: str = "normal",
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> torch.Tensor:  # fmt: skip
    """The formula above in PyTorch ops."""
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    counter = step if isinstance(step, torch.Tensor) else torch.tensor(step, device=device)
    fill = noise.normal_reference_ if kind == "normal" else noise.uniform_reference_
    fill(out, counter, seed, int(stream), first_row)
    return out


# ---- kernels

_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e42fep-1"))
_LN2_LOW = tl.constexpr(math.log(2) - float.fromhex("0x1.62e42fep-1"))
_ROOT_HALF = tl.constexpr(0x3FE6A09E00000000)  # bits of sqrt(1/2), rounded down
_ONE_BITS = tl.constexpr(0x3FF0000000000000)
_MANTISSA = tl.constexpr(0x000FFFFFFFFFFFFF)
_TURN = tl.constexpr(2 * math.pi)
_HALF_PI = tl.constexpr(float.fromhex("0x1.921fb544p+0"))  # 33 bits: its product with 0 .. 4 is exact
_HALF_PI_REST = tl.constexpr(float.fromhex("0x1.0b4611a626331p-34"))
_ROUNDER = tl.constexpr(1.5 * 2.0**52)  # adding it leaves the nearest integer in the last bits
_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """The four words of Philox4x32-10. Counters are uint32, ``c0`` and ``c2`` tensors; keys int64 in [0, 2**32)."""
    for i in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ ((key0 + i * 0x9E3779B9) & _WORD).to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ ((key1 + i * 0xBB67AE85) & _WORD).to(tl.uint32)
        c1 = (p1 & _WORD).to(tl.uint32)
        c3 = (p0 & _WORD).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def words(quad, row, step, stream, key0, key1):
    """The words of quads (uint32) of rows (uint32) at a step (int64) of a stream."""
    high = (((step >> 32) & 0xFFFF) | (stream.to(tl.int64) << 16)).to(tl.uint32)
    return philox(quad, row, (step & _WORD).to(tl.uint32), high, key0, key1)


@triton.jit
def _open_unit(word):
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32: exact, and never 0


@triton.jit
def _log_below_one(x):
    """Of fp64 in (0, 1): x = 2^k m, m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1)) by its series."""
    shifted = x.to(tl.int64, bitcast=True) + (_ONE_BITS - _ROOT_HALF)
    k = ((shifted >> 52) - 1023).to(tl.float64)
    f = ((shifted & _MANTISSA) + _ROOT_HALF).to(tl.float64, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = tl.full(z.shape, 1.0 / 23, tl.float64)
    for n in tl.static_range(21, 2, -2):
        series = series * z + 1.0 / n
    return k * _LN2_HIGH + (2.0 * s + (2.0 * s * z * series + k * _LN2_LOW))


@triton.jit
def _turn(v):
    """cos and sin of 2 pi v, fp64 in (0, 1): quarter turns come off, the rest (pi / 4 at most) goes into the series."""
    rounded = 4.0 * v + _ROUNDER
    quarter = rounded.to(tl.int64, bitcast=True) & 3
    n = rounded - _ROUNDER
    y = _TURN * v - n * _HALF_PI - n * _HALF_PI_REST
    z = y * y
    odd = tl.full(z.shape, -1.0 / (16 * 17), tl.float64)
    even = tl.full(z.shape, -1.0 / (15 * 16), tl.float64)
    for k in tl.static_range(14, 3, -2):
        odd = (1.0 + z * odd) * (-1.0 / (k * (k + 1)))
    for k in tl.static_range(13, 2, -2):
        even = (1.0 + z * even) * (-1.0 / (k * (k + 1)))
    s = y - y * z * ((1.0 + z * odd) * (1.0 / 6))
    c = 1.0 - 0.5 * z * (1.0 + z * even)
    swapped = (quarter & 1) == 1
    cosine = tl.where(swapped, s, c)
    sine = tl.where(swapped, c, s)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((quarter & 2) == 2, -sine, sine)
    return cosine, sine


@triton.jit
def _box_muller(a, b):
    radius = tl.sqrt(-2.0 * _log_below_one(_open_unit(a)))
    cosine, sine = _turn(_open_unit(b))
    return radius * cosine, radius * sine


@triton.jit
def _unit(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24: exact


@triton.jit
def side_by_side(x0, x1, x2, x3):
    """[BLOCK, 4] of four [BLOCK]."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(x0.shape[0], 4)


@triton.jit
def normal_numbers(w0, w1, w2, w3):
    """fp64 [BLOCK, 4]"""
    x0, x1 = _box_muller(w0, w1)
    x2, x3 = _box_muller(w2, w3)
    return side_by_side(x0, x1, x2, x3)


@triton.jit
def uniform_numbers(w0, w1, w2, w3):
    """fp32 [BLOCK, 4], exact"""
    return side_by_side(_unit(w0), _unit(w1), _unit(w2), _unit(w3))


@triton.jit
def bounded_integers(w0, high):
    """int64 [BLOCK]"""
    return ((w0.to(tl.uint64) * high.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def store_rounded(ptrs, values, mask):
    """Values to memory: bf16 and fp16 by way of fp32, which is how PyTorch rounds fp64 to them."""
    if ptrs.dtype.element_ty == tl.float64:
        tl.store(ptrs, values.to(tl.float64), mask=mask)
    else:
        tl.store(ptrs, values.to(tl.float32).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["key0", "key1", "first_row", "stream", "high"])
def _latent_kernel(
    out_ptr, step_ptr,
    rows, cols, stride_out_row, stride_out_col, key0, key1, first_row, stream, high,
    KIND: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    step = tl.load(step_ptr)
    quads = (cols + 3) // 4
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], below 2^31: the launcher sees to it
    row = at // quads
    quad = at - row * quads
    numbered = ((first_row.to(tl.int64) + row) & _WORD).to(tl.uint32)
    w0, w1, w2, w3 = words(
        quad.to(tl.uint32), numbered, step, stream, key0.to(tl.int64) & _WORD, key1.to(tl.int64) & _WORD
    )
    mask = row < rows
    if KIND == "integers":
        tl.store(out_ptr + row.to(tl.int64) * stride_out_row, bounded_integers(w0, high), mask=mask)
    else:
        col = 4 * quad[:, None] + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
        ptrs = out_ptr + row[:, None].to(tl.int64) * stride_out_row + col.to(tl.int64) * stride_out_col
        values = normal_numbers(w0, w1, w2, w3) if KIND == "normal" else uniform_numbers(w0, w1, w2, w3)
        store_rounded(ptrs, values, mask[:, None] & (col < cols))


# ---- launchers

BLOCK = 128  # one quad for each thread: an update's noise is small, and its fp64 chains are long


def word(x: int) -> int:
    """The low 32 bits of an integer, as a signed one: always the same type of kernel argument."""
    return (x + 2**31) % 2**32 - 2**31


def keys(seed: int) -> tuple[int, int]:
    """The two words of a seed."""
    return word(seed), word(seed >> 32)


def check_draw(op: str, out: torch.Tensor, step: torch.Tensor, kind: str, high: int) -> tuple[int, int]:
    """Rows and columns of what a draw fills, if it can be drawn."""
    check(kind in KINDS, op, f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "integers":
        check(
            out.dtype == torch.int64 and out.ndim == 1, op, f"out is {out.dtype} {list(out.shape)}, expected int64 [B]"
        )
        check(1 <= high < 2**31, op, f"high is {high}, expected 1 <= high < 2**31")
    else:
        check_dtype(op, "out", out, DTYPES)
        check(out.ndim == 2, op, f"out has shape {tuple(out.shape)}, expected [rows, cols]")
    right = step.dtype == torch.int64 and step.ndim == 0 and step.device == out.device
    check(right, op, f"step is {step.dtype} {list(step.shape)} on {step.device}, expected int64 [] on {out.device}")
    rows, cols = (len(out), 1) if kind == "integers" else out.shape
    check(rows * -(-cols // 4) < 2**31 - BLOCK, op, f"{rows} x {cols} numbers are too many for one launch")
    return rows, cols


def latent_launch(
    out: torch.Tensor, step: torch.Tensor, *, seed: int, stream: int, first_row: int = 0, kind: str = "normal",
    high: int = 1,
) -> Launch:  # fmt: skip
    """Noise into ``out``.

    Args:
        out: fp16, bf16, fp32 or fp64 ``[rows, cols]`` of any strides; for integers int64 ``[rows]``.
        step: 0-dim int64 on the same device, read in the kernel.
        seed, stream, first_row: as for :func:`fastgan.noise.normal`.
        kind: ``"normal"``, ``"uniform"`` or ``"integers"``.
        high: integers are below it.

    Raises:
        ValueError: what is given is not of these kinds.
    """
    rows, cols = check_draw("latent", out, step, kind, high)
    key0, key1 = keys(seed)
    return Launch(
        _latent_kernel, grid_1d(rows * -(-cols // 4), BLOCK),
        {"out_ptr": out, "step_ptr": step, "rows": rows, "cols": cols, "stride_out_row": out.stride(0),
         "stride_out_col": out.stride(1) if out.ndim == 2 else 1, "key0": key0, "key1": key1,
         "first_row": word(first_row), "stream": int(stream), "high": high, "KIND": kind, "BLOCK": BLOCK},
    )  # fmt: skip


# ---- public


def latent(
    rows: int,
    cols: int,
    *,
    seed: int,
    stream: int,
    step: noise.Step,
    first_row: int = 0,
    kind: str = "normal",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
) -> torch.Tensor:
    """Noise that is a function of (seed, stream, step, row, column) alone: :func:`fastgan.noise.normal` on a device.

    Args:
        rows: number of rows, e.g. samples.
        cols: numbers per row.
        seed: any integer; taken modulo 2**64.
        stream: what the numbers are for, a :class:`fastgan.noise.Stream`.
        step: counter, an integer below 2**48 or a 0-dim int64 tensor on ``device``, never read on the host.
        first_row: row number of row 0, for a part of a larger batch; below 2**32.
        kind: ``"normal"``, or ``"uniform"`` in ``[0, 1)``.
        dtype: fp16, bf16, fp32 or fp64.
        device: where the numbers are made.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        ``[rows, cols]``, contiguous. Uniform numbers are those of the CPU's stream to the bit, normal ones up to the
        last bits of fp64. No derivative.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "latent"
    check(kind in ("normal", "uniform"), op, f"kind is {kind!r}, expected normal or uniform")
    check(dtype in DTYPES, op, f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    check(rows >= 0 and cols >= 0, op, f"rows and cols are {rows} and {cols}, expected at least 0")
    counter = step if isinstance(step, torch.Tensor) else torch.tensor(step, device=device)
    if resolve(op, backend, counter) == "reference":
        return latent_reference(
            rows, cols, seed=seed, stream=stream, step=counter, first_row=first_row, kind=kind, dtype=dtype,
            device=device,
        )  # fmt: skip
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    latent_launch(out, counter, seed=seed, stream=stream, first_row=first_row, kind=kind)()
    return out


# ---- spec


def _at(step: torch.Tensor, *, backend: Backend | None = None, **kwargs: Any) -> torch.Tensor:
    return latent(step=step, device=step.device, backend=backend, **kwargs)


def _at_reference(step: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return latent_reference(step=step, device=step.device, **kwargs)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, step: int, rows: int, cols: int, **more: Any) -> Sample:
        counter = torch.tensor(step, device=device)
        return Sample(name, (counter,), {"rows": rows, "cols": cols, "stream": 1, "dtype": dtype, **more})

    return [
        sample("odd", 3, 33, 7, seed=11),
        sample("whole-quads", 2**40 + 5, 64, 64, seed=-(2**63), first_row=2**31),
        sample("uniform", 2**33, 129, 1, seed=2**64 - 1, kind="uniform", first_row=5),
        sample("uniform-wide", 0, 3, 130, seed=0, kind="uniform"),
        sample("no-rows", 1, 0, 8, seed=1),
        sample("no-columns", 1, 8, 0, seed=1),
    ]


def _launches(dtype: torch.dtype) -> list[Launch]:
    out, step = torch.empty(64, 64, dtype=dtype), torch.zeros((), dtype=torch.int64)
    key: dict[str, Any] = {"seed": 5 << 32 | 7, "stream": 2}
    made = [latent_launch(out, step, **key, kind=kind) for kind in ("normal", "uniform")]
    if dtype == torch.float32:
        made += [
            latent_launch(out.t(), step, **key),
            latent_launch(torch.empty(64, dtype=torch.int64), step, **key, kind="integers", high=10),
        ]
    return made


SPEC = OpSpec(
    name="latent",
    op=_at,
    reference=_at_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=0,
    bytes_moved=lambda s: s.kwargs["rows"] * s.kwargs["cols"] * s.kwargs["dtype"].itemsize,
)
