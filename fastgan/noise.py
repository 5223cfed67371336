"""Random numbers without a generator's state: Philox4x32-10 keyed by (seed, stream, step).

A number is a function of its seed, stream, step, row and column alone: it is the same on every device, in every
batch split (give the split's ``first_row``), and resuming needs no more than the step. Integers and uniform numbers
agree to the bit everywhere; normal numbers are computed in fp64 and rounded once, so that devices whose
logarithms differ in the last fp64 bit still agree.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11 (doi:10.1145/2063384.2063405).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from functools import partial

import torch

from fastgan._native import ext
from fastgan.backend import resolve
from fastgan.errors import InputError

Step = int | torch.Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_LOW, _LOW64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_WALK = 128  # steps of a walk that is not looked at


class Stream(enum.IntEnum):
    """What a number is used for: two streams never share a number."""

    D_LATENT = 0
    G_LATENT = 1
    ALPHA = 2
    PERTURBATION = 3
    G_LABELS = 4
    SAMPLE = 5
    SAMPLE_LABELS = 6
    ORDER = 7
    MIRROR = 8
    TOY = 9
    EVALUATION = 10


def philox(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Philox4x32-10 of counters ``[4, ...]`` (int64 that hold uint32 values); the same shape comes back.

    Args:
        counter: int64 with values in ``[0, 2**32)``.
        key: two integers in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter.unbind()
    for i in range(10):  # with Python's numbers: a tensor of constants would be a copy from the host
        key0, key1 = (key[0] + i * _W0) & _LOW, (key[1] + i * _W1) & _LOW
        p0, p1 = c0 * _M0, c2 * _M1  # int64 wraps: the 64 bits are those of the unsigned product
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ key0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ key1, p0 & _LOW
    return torch.stack([c0, c1, c2, c3])


def bits_reference(step: torch.Tensor, rows: int, cols: int, seed: int, stream: int, first_row: int) -> torch.Tensor:
    """What :func:`bits` computes, in torch ops, on ``step``'s device."""
    quads, device = -(-cols // 4), step.device
    row = torch.arange(first_row, first_row + rows, device=device).unsqueeze(1)
    col = torch.arange(quads, device=device).unsqueeze(0)
    high = ((step >> 32) & 0xFFFF) | (stream << 16)
    counter = torch.stack([c.expand(rows, quads) for c in (col, row, step & _LOW, high)])
    out = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return out.permute(1, 2, 0).reshape(rows, quads * 4)[:, :cols]


def _bits_native(step: torch.Tensor, rows: int, cols: int, seed: int, stream: int, first_row: int) -> torch.Tensor:
    out = torch.empty(rows, -(-cols // 4) * 4, dtype=torch.int64)
    assert ext is not None
    ext.philox(out.numpy(), first_row, int(step), stream, seed & _LOW64)
    return out[:, :cols]


def uniform_reference_(out: torch.Tensor, step: torch.Tensor, seed: int, stream: int, first_row: int) -> None:
    """What :func:`uniform` writes into ``out``, in torch ops."""
    rows, cols = out.shape
    raw = bits_reference(step, rows, cols, seed, stream, first_row)
    out.copy_((raw >> 8).to(torch.promote_types(out.dtype, torch.float32)) * 2.0**-24)  # fp16 ends at 2**16


def normal_reference_(out: torch.Tensor, step: torch.Tensor, seed: int, stream: int, first_row: int) -> None:
    """What :func:`normal` writes into ``out``, in torch ops."""
    rows, cols = out.shape
    pairs = -(-cols // 2)
    raw = bits_reference(step, rows, 2 * pairs, seed, stream, first_row)
    u = (raw.double() + 0.5) * 2.0**-32  # in (0, 1): the logarithm is finite
    radius = (-2.0 * u[:, 0::2].log()).sqrt()
    angle = (2.0 * math.pi) * u[:, 1::2]
    out.copy_(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).reshape(rows, 2 * pairs)[:, :cols])


def integers_reference_(
    out: torch.Tensor, step: torch.Tensor, high: int, seed: int, stream: int, first_row: int
) -> None:
    """What :func:`integers` writes into ``out``, in torch ops."""
    out.copy_(bits_reference(step, len(out), 1, seed, stream, first_row)[:, 0] * high >> 32)


def _fill_native(name: str, out: torch.Tensor, step: torch.Tensor, seed: int, stream: int, first_row: int) -> None:
    rows, cols = out.shape
    fits = out.stride(1) == 1 and out.stride(0) >= cols and out.dtype in (torch.float32, torch.float64)
    to = out if fits else torch.empty(rows, cols, dtype=torch.float32 if out.dtype == torch.float32 else torch.float64)
    getattr(ext, name)(
        to.data_ptr(), to.dtype == torch.float64, rows, cols, to.stride(0), first_row, step.data_ptr(), stream,
        seed & _LOW64, torch.get_num_threads(),
    )  # fmt: skip
    if to is not out:
        out.copy_(to)


def _integers_native(out: torch.Tensor, step: torch.Tensor, high: int, seed: int, stream: int, first_row: int) -> None:
    assert ext is not None
    ext.integers(
        out.data_ptr(), len(out), out.stride(0), high, first_row, step.data_ptr(), stream, seed & _LOW64,
        torch.get_num_threads(),
    )  # fmt: skip


def _launch(kind: str, out: torch.Tensor, step: torch.Tensor, *key: int) -> None:
    """One kernel that fills ``out``, or the reference in torch ops where that backend was chosen."""
    if resolve("noise", None, out, step) == "reference":
        _REFERENCES[kind](out, step, *key)
        return
    from fastgan.kernels.latent import latent_launch  # imports Triton

    *high, seed, stream, first_row = key
    options = {"high": high[0]} if high else {}
    latent_launch(out, step, seed=seed, stream=stream, first_row=first_row, kind=kind, **options)()


_REFERENCES: dict[str, Callable[..., None]] = {
    "normal": normal_reference_,
    "uniform": uniform_reference_,
    "integers": integers_reference_,
}

# ops of their own, so that what records a step sees their inputs and what they write
_LIBRARY = torch.library.Library("fastgan", "DEF")  # type: ignore[no-untyped-call]
_KEY = "int seed, int stream, int first_row"
for _op, _reference, _native in (
    (f"bits(Tensor step, int rows, int cols, {_KEY}) -> Tensor", bits_reference, _bits_native),
    (f"uniform_(Tensor(a!) out, Tensor step, {_KEY}) -> ()", uniform_reference_, partial(_fill_native, "uniform")),
    (f"normal_(Tensor(a!) out, Tensor step, {_KEY}) -> ()", normal_reference_, partial(_fill_native, "normal")),
    (f"integers_(Tensor(a!) out, Tensor step, int high, {_KEY}) -> ()", integers_reference_, _integers_native),
):
    _LIBRARY.define(_op)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_op.partition("(")[0], _reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if ext is not None:
        _LIBRARY.impl(_op.partition("(")[0], _native, "CPU")  # type: ignore[no-untyped-call]
for _kind in _REFERENCES:
    _LIBRARY.impl(f"{_kind}_", partial(_launch, _kind), "CUDA")  # type: ignore[no-untyped-call]


def bits(
    rows: int, cols: int, *, seed: int, stream: Stream, step: Step, first_row: int = 0, device: torch.device | str
) -> torch.Tensor:
    """Independent uint32 values as int64 ``[rows, cols]``.

    Args:
        rows: number of rows, e.g. samples.
        cols: numbers per row.
        seed: any integer; taken modulo 2**64.
        stream: what the numbers are for.
        step: counter, an integer below 2**48 or a 0-dim int64 tensor on ``device`` (never read back from a GPU).
        first_row: row number of row 0, for a part of a larger batch.
        device: where the numbers are made; on a CPU natively where the extension was built, equal to the bit.
    """
    out: torch.Tensor = torch.ops.fastgan.bits(_counter(step, device), rows, cols, _int64(seed), int(stream), first_row)
    return out


def uniform(
    rows: int,
    cols: int,
    *,
    seed: int,
    stream: Stream,
    step: Step,
    first_row: int = 0,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Uniform numbers in ``[0, 1)``, multiples of 2**-24, ``[rows, cols]``.

    Args:
        rows, cols, seed, stream, step, first_row, device: as for :func:`bits`.
        dtype: of the numbers where ``out`` is not given.
        out: floating point ``[rows, cols]`` on ``device``, of any strides: written in place and returned.

    Raises:
        InputError: ``out`` has another shape or device, or is not floating point.
    """
    out = _output(out, (rows, cols), device, dtype)
    torch.ops.fastgan.uniform_(out, _counter(step, device), _int64(seed), int(stream), first_row)
    return out


def normal(
    rows: int,
    cols: int,
    *,
    seed: int,
    stream: Stream,
    step: Step,
    first_row: int = 0,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Standard normal numbers by Box and Muller, ``[rows, cols]``; arguments and errors as for :func:`uniform`."""
    out = _output(out, (rows, cols), device, dtype)
    torch.ops.fastgan.normal_(out, _counter(step, device), _int64(seed), int(stream), first_row)
    return out


def integers(
    rows: int,
    high: int,
    *,
    seed: int,
    stream: Stream,
    step: Step,
    first_row: int = 0,
    device: torch.device | str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integers in ``[0, high)``, int64 ``[rows]``, equally likely to 2**-32.

    Args:
        rows, seed, stream, step, first_row, device: as for :func:`bits`.
        high: ``1 <= high < 2**31``.
        out: int64 ``[rows]`` on ``device``: written in place and returned.

    Raises:
        InputError: ``out`` has another shape, dtype or device.
    """
    out = _output(out, (rows,), device, torch.int64)
    torch.ops.fastgan.integers_(out, _counter(step, device), high, _int64(seed), int(stream), first_row)
    return out


def _counter(step: Step, device: torch.device | str) -> torch.Tensor:
    return step.long() if isinstance(step, torch.Tensor) else torch.tensor(step, device=device)


def _int64(seed: int) -> int:
    """What an op takes of a seed."""
    return (seed + 2**63) % 2**64 - 2**63


def _output(
    out: torch.Tensor | None, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, device=device, dtype=dtype)
    right_kind = out.is_floating_point() if dtype.is_floating_point else out.dtype == dtype
    if tuple(out.shape) != shape or not right_kind or out.device.type != torch.device(device).type:
        kind = "floating point" if dtype.is_floating_point else str(dtype)
        raise InputError(
            f"noise: out is {out.dtype} {list(out.shape)} on {out.device}, expected {kind} {list(shape)} on {device}"
        )
    return out


def shuffled(position: torch.Tensor, n: int, *, seed: int) -> torch.Tensor:
    """Where a pass over ``n`` items without replacement stands: the item at each position, without a table.

    Positions run on over passes: ``position // n`` is the pass, and every pass visits each item once in an order of
    its own. A Feistel network of eight Philox rounds over the next power of two (64 at least: fewer are not
    mixed evenly), with cycle walking.

    A CPU walks until all items are below ``n``. A GPU, which is not read back, takes as many steps as any walk may
    have, which is the number of values that are no items, or 128 where that is less: half of the values at least are
    items then, so that a walk is cut short with probability below 2**-128, and gives an item out of range.

    Args:
        position: int64 ``[B]``, non-negative.
        n: number of items, ``1 <= n < 2**32``.
        seed: any integer.

    Returns:
        int64 ``[B]`` with values in ``[0, n)``.
    """
    return _shuffled(position, n, seed, look=position.is_cpu)


def _shuffled(position: torch.Tensor, n: int, seed: int, look: bool) -> torch.Tensor:
    """:func:`shuffled`; ``look``: whether to see if all walks have ended."""
    if n == 1:
        return torch.zeros_like(position)
    epoch, item = position // n, position % n
    width = max(6, (n - 1).bit_length())
    low = width // 2
    high = width - low
    key = (seed & _LOW, (seed >> 32) & _LOW)
    stream = torch.full_like(epoch, int(Stream.ORDER) << 16)

    def once(x: torch.Tensor) -> torch.Tensor:
        left, right, left_bits, right_bits = x >> low, x & ((1 << low) - 1), high, low
        for i in range(8):
            mixed = philox(torch.stack([right, torch.full_like(right, i), epoch, stream]), key)[0]
            left, right = right, left ^ (mixed & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right

    item = once(item)
    for _ in range((1 << width) - n if look else min((1 << width) - n, _WALK)):
        outside = item >= n
        if look and not bool(outside.any()):
            break
        item = torch.where(outside, once(item), item)
    return item
