"""The next batch of a data set that lies on the device: order, gather, normalisation and mirroring in one launch.

    p = position + i,   e, k = divmod(p, n),   item = shuffled_e(k)
    out_i = fl(fl(data_item scale) + offset), every line of ``width`` values reversed where bit_p is set

The order is the stateless permutation of :func:`fastgan.noise.shuffled`, a Feistel network of eight Philox rounds with
cycle walking, and bit_p is a word of the mirror stream: both are computed where the row is read, and nothing but the
position is kept, which lies on the device, so that a captured launch goes on with it.

Product and sum are rounded to fp32 one after the other, as a host's gather does. A compiler would fuse them into one
rounding; here the factor is split into two halves of 12 bits, whose products with a byte are exact, so that their sum
is the rounded product whether it is fused or not, and what follows is a sum alone.

Nothing here has a derivative. Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", CT-RSA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan import noise
from fastgan.backend import Backend, resolve
from fastgan.kernels._device import grid_size, last_arrival, place_of
from fastgan.kernels._launch import Launch, check, check_dtype
from fastgan.kernels._spec import OpSpec, Sample
from fastgan.kernels.latent import _WORD, keys, philox, store_rounded

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DATA_DTYPES = (torch.uint8, torch.float32, torch.float64)
_BITS = 14  # 2^14 positions share a step of the mirror stream, as in fastgan.data


@dataclass(frozen=True)
class SampleArguments:
    """Which rows go where.

    Attributes:
        data: uint8 ``[N, row size]``, or fp32 or fp64, which are taken as they are; contiguous.
        position: 0-dim int64: samples given so far, non-negative.
        out: fp16, bf16, fp32 or fp64 ``[B, row size]``, rows contiguous.
        seed: of order and mirroring, any integer.
        width: length of a line; divides the row size.
        scale: factor of uint8 data, rounded to fp32.
        offset: summand of uint8 data, rounded to fp32.
        mirror: whether half of the rows are mirrored.
        labels: int64 ``[N]`` or ``None``.
        labels_out: int64 ``[B]`` where ``labels`` are given.
        arrivals: a 0-dim int32 zero that the kernel may count in: ``position`` is then advanced by ``B`` in the end.
    """

    data: torch.Tensor
    position: torch.Tensor
    out: torch.Tensor
    seed: int
    width: int
    scale: float = 1.0
    offset: float = 0.0
    mirror: bool = False
    labels: torch.Tensor | None = None
    labels_out: torch.Tensor | None = None
    arrivals: torch.Tensor | None = None

    def check(self, op: str) -> None:
        """Raise ``ValueError`` if something is not as said above."""
        data, out, device = self.data, self.out, self.out.device
        check_dtype(op, "data", data, DATA_DTYPES)
        check_dtype(op, "out", out, DTYPES)
        check(data.ndim == 2 and data.is_contiguous(), op, f"data {list(data.shape)} is not contiguous [N, row size]")
        check(data.numel() > 0 and len(data) < 2**32, op, f"data has shape {tuple(data.shape)}, expected 1 … 2^32 rows")
        check(out.ndim == 2 and out.shape[1] == data.shape[1], op,
              f"out has shape {tuple(out.shape)}, expected [B, {data.shape[1]}]")  # fmt: skip
        check(out.stride(1) == 1 or out.shape[1] == 1, op, "the rows of out are not contiguous")
        check(self.width > 0 and data.shape[1] % self.width == 0, op,
              f"width is {self.width}, which does not divide the row size {data.shape[1]}")  # fmt: skip
        check((self.labels is None) == (self.labels_out is None), op, "labels and labels_out go together")
        for name, t, dtype, shape in (
            ("position", self.position, torch.int64, ()),
            ("labels", self.labels, torch.int64, (len(data),)),
            ("labels_out", self.labels_out, torch.int64, (len(out),)),
            ("arrivals", self.arrivals, torch.int32, ()),
        ):
            fits = t is None or (t.dtype == dtype and tuple(t.shape) == shape and t.device == device)
            check(fits, op, "" if t is None else f"{name} is {t.dtype} {list(t.shape)} on {t.device}, "
                                                 f"expected {dtype} {list(shape)} on {device}")  # fmt: skip
            check(t is None or t.is_contiguous(), op, f"{name} is not contiguous")
        check(data.device == device, op, f"data is on {data.device} and out on {device}")


# ---- reference


def sample_rows_reference_(a: SampleArguments) -> None:
    """The formula above in PyTorch ops, which read nothing back from a GPU."""
    positions = a.position + torch.arange(len(a.out), device=a.out.device)
    item = noise.shuffled(positions, len(a.data), seed=a.seed)
    rows = a.data.index_select(0, item)
    if a.data.dtype == torch.uint8:  # as fp32 scalars, whatever the dtype of out
        rows = rows.float() * torch.tensor(a.scale, dtype=torch.float32) + torch.tensor(a.offset, dtype=torch.float32)
    if a.mirror:
        lines = rows.view(len(rows), rows.shape[1] // a.width, a.width)
        rows = torch.where(_mirrored(positions, a.seed).view(-1, 1, 1), lines.flip(2), lines).view(rows.shape)
    a.out.copy_(rows)
    if a.labels is not None and a.labels_out is not None:
        a.labels_out.copy_(a.labels.index_select(0, item))
    if a.arrivals is not None:
        a.position.add_(len(a.out))


def _mirrored(position: torch.Tensor, seed: int) -> torch.Tensor:
    """Which positions are mirrored: word 0 of row ``position % 2**14`` at step ``position // 2**14``, its last bit."""
    block, row = position >> _BITS, position & ((1 << _BITS) - 1)
    high = ((block >> 32) & 0xFFFF) | (int(noise.Stream.MIRROR) << 16)
    counter = torch.stack([torch.zeros_like(row), row, block & 0xFFFFFFFF, high])
    return (noise.philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))[0] & 1).bool()


def sample_rows_reference(
    data: torch.Tensor,
    position: torch.Tensor,
    batch: int,
    *,
    seed: int,
    width: int | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    mirror: bool = False,
    labels: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What :func:`sample_rows` computes, in PyTorch ops."""
    return sample_rows(
        data, position, batch, seed=seed, width=width, scale=scale, offset=offset, mirror=mirror, labels=labels,
        dtype=dtype, backend="reference",
    )  # fmt: skip


# ---- kernels

_BLOCK_BITS = tl.constexpr(_BITS)
_BLOCK_LAST = tl.constexpr((1 << _BITS) - 1)
_ORDER = tl.constexpr(int(noise.Stream.ORDER))
_MIRROR = tl.constexpr(int(noise.Stream.MIRROR))


@triton.jit
def shuffled(position, n, low_bits, high_bits, key0, key1):
    """The items (int64) at positions (int64) of passes over n (int64): ``fastgan.noise.shuffled``.

    Halves of a Feistel round have ``high_bits`` and ``low_bits``; a walk ends because it is a cycle through a value
    below n.
    """
    epoch = position // n
    item = (position - epoch * n).to(tl.uint32)
    passes = epoch.to(tl.uint32)
    low = low_bits.to(tl.uint32)
    low_mask = ((1 << low_bits.to(tl.int64)) - 1).to(tl.uint32)
    high_mask = ((1 << high_bits.to(tl.int64)) - 1).to(tl.uint32)
    walks = (item >= 0) & (n > 1)  # all; a single item is its own order
    while tl.max(walks.to(tl.int32), 0) > 0:
        left = item >> low
        right = item & low_mask
        for i in range(0, 8, 2):  # not unrolled: code that runs once or twice costs what it takes to fetch it
            mixed, _, _, _ = philox(right, i, passes, _ORDER << 16, key0, key1)
            left = left ^ (mixed & high_mask)
            mixed, _, _, _ = philox(left, i + 1, passes, _ORDER << 16, key0, key1)
            right = right ^ (mixed & low_mask)
        item = tl.where(walks, (left << low) | right, item)
        walks = item.to(tl.int64) >= n
    return item.to(tl.int64)


@triton.jit
def sample_tile(
    program, data_ptr, out_ptr, labels_ptr, labels_out_ptr, position_ptr, arrivals_ptr,
    n, batch, row_size, stride_out_row, width, low_bits, high_bits, key0, key1, scale_high, scale_low, offset,
    n_programs, SCALED: tl.constexpr, MIRROR: tl.constexpr, LABELS: tl.constexpr, ADVANCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One tile of the batch; the last of the ``n_programs`` advances the position."""
    key0 = key0.to(tl.int64) & _WORD
    key1 = key1.to(tl.int64) & _WORD
    tiles = (row_size + BLOCK_COLS - 1) // BLOCK_COLS
    tile_row = program // tiles
    row = tile_row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    col = (program - tile_row * tiles) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    start = tl.load(position_ptr)
    position = start + row
    item = shuffled(position, n.to(tl.int64), low_bits, high_bits, key0, key1)
    mask = (row < batch)[:, None] & (col < row_size)[None, :]
    if MIRROR:
        block = position >> _BLOCK_BITS
        c1 = (position & _BLOCK_LAST).to(tl.uint32)
        c3 = (((block >> 32) & 0xFFFF) | (_MIRROR << 16)).to(tl.uint32)
        bit, _, _, _ = philox(tl.zeros_like(c1), c1, (block & _WORD).to(tl.uint32), c3, key0, key1)
        reversed_col = (2 * (col // width) + 1) * width - 1 - col
        source = tl.where((bit & 1)[:, None] == 1, reversed_col[None, :], col[None, :])  # [BLOCK_ROWS, BLOCK_COLS]
    else:
        source = col[None, :]
    values = tl.load(data_ptr + item[:, None] * row_size + source, mask=mask, other=0)
    if SCALED:
        pixel = values.to(tl.float32)
        values = pixel * scale_high + pixel * scale_low  # two exact products: rounded once, fused or not
        values = values + offset
    store_rounded(out_ptr + row[:, None] * stride_out_row + col[None, :], values, mask)
    if LABELS:
        once = (row < batch) & (program == tile_row * tiles)
        tl.store(labels_out_ptr + row, tl.load(labels_ptr + item, mask=once, other=0), mask=once)
    if ADVANCE:  # noqa: SIM102 (known when compiled)
        if last_arrival(arrivals_ptr, n_programs):
            tl.store(position_ptr, start + batch)
            tl.store(arrivals_ptr, 0)


SCALARS = ("n", "low_bits", "high_bits", "key0", "key1")  # must not be specialised: a seed or a size compiles nothing


@triton.jit(do_not_specialize=SCALARS)
def _sample_rows_kernel(
    data_ptr, out_ptr, labels_ptr, labels_out_ptr, position_ptr, arrivals_ptr,
    n, batch, row_size, stride_out_row, width, low_bits, high_bits, key0, key1, scale_high, scale_low, offset,
    SCALED: tl.constexpr, MIRROR: tl.constexpr, LABELS: tl.constexpr, ADVANCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    sample_tile(
        place_of(tile, 0), data_ptr, out_ptr, labels_ptr, labels_out_ptr, position_ptr, arrivals_ptr,
        n, batch, row_size, stride_out_row, width, low_bits, high_bits, key0, key1, scale_high, scale_low, offset,
        grid_size(tile, 0), SCALED, MIRROR, LABELS, ADVANCE, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip


# ---- launchers

_TILE = 1024  # values of a program: 8 for each thread, and 1 program for an image of 28 x 28


def halves(scale: float) -> tuple[float, float]:
    """An fp32 factor as a sum of two with 12 bits each."""
    whole = np.array(scale, np.float32)
    high = (whole.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    return float(high), float(whole - high)


def kernel_arguments(a: SampleArguments) -> tuple[int, dict[str, Any]]:
    """Number of programs, and what :func:`sample_tile` takes."""
    n, row_size = a.data.shape
    cols = min(_TILE, triton.next_power_of_2(row_size))
    rows = min(64, _TILE // cols)
    bits = max(6, (n - 1).bit_length())
    key0, key1 = keys(a.seed)
    scale_high, scale_low = halves(a.scale)
    programs = triton.cdiv(len(a.out), rows) * triton.cdiv(row_size, cols)
    return programs, {
        "data_ptr": a.data, "out_ptr": a.out,
        "labels_ptr": a.position if a.labels is None else a.labels,
        "labels_out_ptr": a.position if a.labels_out is None else a.labels_out,
        "position_ptr": a.position, "arrivals_ptr": a.position if a.arrivals is None else a.arrivals,
        "n": n, "batch": len(a.out), "row_size": row_size, "stride_out_row": a.out.stride(0), "width": a.width,
        "low_bits": bits // 2, "high_bits": bits - bits // 2, "key0": key0, "key1": key1,
        "scale_high": scale_high, "scale_low": scale_low, "offset": float(a.offset),
        "SCALED": a.data.dtype == torch.uint8, "MIRROR": a.mirror, "LABELS": a.labels is not None,
        "ADVANCE": a.arrivals is not None, "BLOCK_ROWS": rows, "BLOCK_COLS": cols,
    }  # fmt: skip


def sample_rows_launch(arguments: SampleArguments) -> Launch:
    """The next rows into ``arguments.out``.

    Raises:
        ValueError: an argument that is not as :class:`SampleArguments` says.
    """
    arguments.check("sample_rows")
    programs, given = kernel_arguments(arguments)
    return Launch(_sample_rows_kernel, (programs,), given)


# an op of its own, so that what records a step sees its inputs and what it writes
_LIBRARY = torch.library.Library("fastgan", "FRAGMENT")
_LIBRARY.define(
    "sample_rows_(Tensor data, Tensor(a!) position, Tensor(b!) out, int seed, int width, float scale, float offset, "
    "bool mirror, Tensor? labels, Tensor(c!)? labels_out, Tensor(d!)? arrivals, bool kernel) -> ()"
)


def _run(data, position, out, seed, width, scale, offset, mirror, labels, labels_out, arrivals, kernel):
    a = SampleArguments(data, position, out, seed, width, scale, offset, mirror, labels, labels_out, arrivals)
    if kernel:
        sample_rows_launch(a)()
    else:
        sample_rows_reference_(a)


_LIBRARY.impl("sample_rows_", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastgan::sample_rows_", lambda *args: None, lib=_LIBRARY)


# ---- public


def sample_rows_(arguments: SampleArguments, *, backend: Backend | None = None) -> None:
    """Write the next rows; see :class:`SampleArguments` and :func:`sample_rows`."""
    a = arguments
    a.check("sample_rows")
    kernel = resolve("sample_rows", backend, a.data, a.out, a.position) == "triton"
    seed = (a.seed + 2**63) % 2**64 - 2**63
    torch.ops.fastgan.sample_rows_(
        a.data, a.position, a.out, seed, a.width, a.scale, a.offset, a.mirror, a.labels, a.labels_out, a.arrivals,
        kernel,
    )  # fmt: skip


def sample_rows(
    data: torch.Tensor,
    position: torch.Tensor,
    batch: int,
    *,
    seed: int,
    width: int | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    mirror: bool = False,
    labels: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The rows at positions ``position … position + batch - 1`` of an endless feed that shuffles every pass anew.

    The same rows, order, mirroring and bits as :meth:`fastgan.data.Dataset.feed` gives.

    Args:
        data: uint8 ``[N, row size]`` with ``1 <= N < 2**32``, or fp32 or fp64, which are rounded to ``dtype`` and
            otherwise taken as they are; contiguous.
        position: 0-dim int64 on the same device, non-negative, never read on the host.
        batch: number of rows, at least 0.
        seed: of order and mirroring, any integer.
        width: length of the lines that are mirrored; divides the row size, which is the default.
        scale: factor of uint8 data, rounded to fp32.
        offset: summand of uint8 data, rounded to fp32.
        mirror: whether every other row, drawn by its position, has its lines reversed.
        labels: int64 ``[N]``.
        dtype: of the result: fp16, bf16, fp32 or fp64; product and sum are rounded to fp32 before.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        ``[batch, row size]``, contiguous; with ``labels`` a pair of it and the rows' labels, int64 ``[batch]``. No
        derivative.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "sample_rows"
    check(data.ndim == 2, op, f"data has shape {tuple(data.shape)}, expected [N, row size]")
    check(batch >= 0, op, f"batch is {batch}, expected at least 0")
    check(dtype in DTYPES, op, f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    out = torch.empty(batch, data.shape[1], dtype=dtype, device=data.device)
    labels_out = None if labels is None else torch.empty(batch, dtype=torch.int64, device=data.device)
    sample_rows_(
        SampleArguments(
            data,
            position,
            out,
            seed,
            data.shape[1] if width is None else width,
            scale,
            offset,
            mirror,
            labels,
            labels_out,
        ),
        backend=backend,
    )
    return out if labels_out is None else (out, labels_out)


# ---- spec


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def sample(name: str, n: int, row: int, position: int, **more: Any) -> Sample:
        data = torch.randint(0, 256, (n, row), generator=g, dtype=torch.uint8)
        return Sample(
            name, (data.to(device), torch.tensor(position, device=device)),
            {"seed": 3, "dtype": dtype, "scale": 2 / 255, "offset": -1.0, **more},
        )  # fmt: skip

    def labels(n: int) -> torch.Tensor:
        return torch.randint(0, 10, (n,), generator=g).to(device)

    table = torch.randn(125, 3, generator=g).to(device)
    return [
        sample("odd", 37, 63, 5, batch=9, width=7, mirror=True, labels=labels(37)),
        sample("two-passes", 64, 64, 2**14 - 3, batch=17, seed=-(2**40), mirror=True, width=8),
        sample("one-row", 1, 5, 2**35, batch=3, seed=2**64 - 1),
        sample("wide", 40, 1030, 7, batch=2, labels=labels(40), scale=1 / 3, offset=0.1),
        Sample("table", (table, torch.tensor(121, device=device)), {"batch": 65, "seed": 1, "dtype": dtype}),
        sample("empty", 5, 8, 0, batch=0),
    ]


def _launches(dtype: torch.dtype) -> list[Launch]:
    count = torch.zeros((), dtype=torch.int64)
    lines: dict[str, Any] = {"width": 28, "scale": 2 / 255, "offset": -1.0}
    images = torch.empty(100, 784, dtype=torch.uint8)
    labels, drawn = torch.zeros(100, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    arrivals = torch.zeros((), dtype=torch.int32)
    out = torch.empty(64, 784, dtype=dtype)
    made = [SampleArguments(images, count, out, 7 << 32 | 5, **lines, mirror=True, labels=labels, labels_out=drawn,
                            arrivals=arrivals)]  # fmt: skip
    if dtype == torch.float32:
        digits, points = torch.empty(100, 64, dtype=torch.uint8), torch.empty(100, 2)
        made += [
            SampleArguments(images, count, out, 7 << 32 | 5, **lines),
            SampleArguments(digits, count, torch.empty(64, 64), 7 << 32 | 5, **{**lines, "width": 8}, mirror=True),
            SampleArguments(points, count, torch.empty(64, 2), 7 << 32 | 5, 2, arrivals=arrivals),
        ]
    return [sample_rows_launch(a) for a in made]


def _bytes_moved(s: Sample) -> int:
    data = s.inputs[0]
    assert data is not None
    return int(s.kwargs["batch"] * data.shape[1] * (data.element_size() + s.kwargs["dtype"].itemsize))


SPEC = OpSpec(
    name="sample_rows",
    op=sample_rows,
    reference=sample_rows_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=0,
    bytes_moved=_bytes_moved,
)
