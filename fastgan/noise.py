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

import torch

from fastgan._native import ext

Step = int | torch.Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_LOW, _LOW64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


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
    like = [2, *[1] * (counter.ndim - 1)]
    multiplier = torch.tensor([_M0, _M1], device=counter.device).view(like)
    rounds = [((key[0] + i * _W0) & _LOW, (key[1] + i * _W1) & _LOW) for i in range(10)]
    keys = torch.tensor(rounds, device=counter.device).view(10, *like)
    even, odd = counter[0::2], counter[1::2]
    for i in range(10):
        product = even * multiplier  # int64 wraps: the 64 bits are those of the unsigned product
        even, odd = (product.flip(0) >> 32 & _LOW) ^ odd ^ keys[i], (product & _LOW).flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])


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


# an op of its own, so that what records a step sees its inputs
_LIBRARY = torch.library.Library("fastgan", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("bits(Tensor step, int rows, int cols, int seed, int stream, int first_row) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("bits", bits_reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
if ext is not None:
    _LIBRARY.impl("bits", _bits_native, "CPU")  # type: ignore[no-untyped-call]


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
    at = step if isinstance(step, torch.Tensor) else torch.tensor(step, device=device)
    seed = (seed + 2**63) % 2**64 - 2**63  # an op takes int64
    out: torch.Tensor = torch.ops.fastgan.bits(at, rows, cols, seed, int(stream), first_row)
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
) -> torch.Tensor:
    """Uniform numbers in ``[0, 1)``, multiples of 2**-24, ``[rows, cols]``; arguments as for :func:`bits`."""
    raw = bits(rows, cols, seed=seed, stream=stream, step=step, first_row=first_row, device=device)
    return (raw >> 8).to(dtype) * 2.0**-24


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
) -> torch.Tensor:
    """Standard normal numbers by Box and Muller, ``[rows, cols]``; arguments as for :func:`bits`."""
    pairs = -(-cols // 2)
    raw = bits(rows, 2 * pairs, seed=seed, stream=stream, step=step, first_row=first_row, device=device)
    u = (raw.double() + 0.5) * 2.0**-32  # in (0, 1): the logarithm is finite
    radius = (-2.0 * u[:, 0::2].log()).sqrt()
    angle = (2.0 * math.pi) * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).reshape(rows, 2 * pairs)[:, :cols].to(dtype)


def integers(
    rows: int, high: int, *, seed: int, stream: Stream, step: Step, first_row: int = 0, device: torch.device | str
) -> torch.Tensor:
    """Integers in ``[0, high)``, int64 ``[rows]``, equally likely to 2**-32; arguments as for :func:`bits`."""
    raw = bits(rows, 1, seed=seed, stream=stream, step=step, first_row=first_row, device=device)[:, 0]
    return (raw * high) >> 32


def shuffled(position: torch.Tensor, n: int, *, seed: int) -> torch.Tensor:
    """Where a pass over ``n`` items without replacement stands: the item at each position, without a table.

    Positions run on over passes: ``position // n`` is the pass, and every pass visits each item once in an order of
    its own. A Feistel network of eight Philox rounds over the next power of two (64 at least: fewer are not
    mixed evenly), with cycle walking.

    Args:
        position: int64 ``[B]``, non-negative.
        n: number of items, ``1 <= n < 2**32``.
        seed: any integer.

    Returns:
        int64 ``[B]`` with values in ``[0, n)``.
    """
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
    while bool((outside := item >= n).any()):
        item = torch.where(outside, once(item), item)
    return item
