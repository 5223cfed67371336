"""All that an update draws in one launch: latents, interpolation weights, random labels and the next rows of the data.

Each of them is small, and a launch of its own would cost more than its numbers do. A program finds in a table on the
device which draw its quads of numbers belong to: where they go, in which type, under which key, at which step. The
programs after those fill the batch, tile by tile. Numbers and rows are those of :func:`latent` and
:func:`sample_rows`, whose device functions these are.

The table holds addresses: the tensors must stay where they are, and the table keeps them alive.

Nothing here has a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan import noise
from fastgan.backend import Backend, resolve
from fastgan.kernels._device import grid_size, place_of
from fastgan.kernels._launch import Launch, check
from fastgan.kernels._spec import OpSpec, Sample
from fastgan.kernels.latent import (
    _WORD,
    BLOCK,
    DTYPES,
    bounded_integers,
    check_draw,
    normal_numbers,
    store_rounded,
    uniform_numbers,
    word,
    words,
)
from fastgan.kernels.sample_rows import SCALARS, SampleArguments, kernel_arguments, sample_rows_, sample_tile


@dataclass(frozen=True)
class Draw:
    """What one stream fills.

    Attributes:
        out: fp16, bf16, fp32 or fp64 ``[rows, cols]``, each row contiguous; for integers int64 ``[rows]``.
        step: 0-dim int64 on the same device, read in the kernel.
        seed: any integer.
        stream: a :class:`fastgan.noise.Stream`.
        kind: ``"normal"``, ``"uniform"`` or ``"integers"``.
        first_row: row number of row 0.
        high: integers are below it.
    """

    out: torch.Tensor
    step: torch.Tensor
    seed: int
    stream: int
    kind: str = "normal"
    first_row: int = 0
    high: int = 1


# ---- reference


def inputs_reference(draws: Sequence[Draw], rows: SampleArguments | None = None) -> None:
    """One after the other, in PyTorch ops."""
    for d in draws:
        key = (d.seed, int(d.stream), d.first_row)
        if d.kind == "integers":
            noise.integers_reference_(d.out, d.step, d.high, *key)
        else:
            fill = noise.normal_reference_ if d.kind == "normal" else noise.uniform_reference_
            fill(d.out, d.step, *key)
    if rows is not None:
        sample_rows_(rows, backend="reference")


# ---- kernels

_FIELDS = tl.constexpr(16)
_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}  # of an out's type


@triton.jit
def _draw_tile(program, field_ptr, BLOCK: tl.constexpr):
    """``BLOCK`` quads of the draw whose fields these are; ``program`` counts from the draw's first."""
    out = tl.load(field_ptr + 1)
    step = tl.load(tl.load(field_ptr + 2).to(tl.pointer_type(tl.int64)))
    stride_row = tl.load(field_ptr + 3)
    rows = tl.load(field_ptr + 4).to(tl.int32)
    cols = tl.load(field_ptr + 5).to(tl.int32)
    number = tl.load(field_ptr + 6)
    normal = tl.load(field_ptr + 7) != 0
    key0 = tl.load(field_ptr + 8) & _WORD
    key1 = tl.load(field_ptr + 9) & _WORD
    first_row = tl.load(field_ptr + 10)
    stream = tl.load(field_ptr + 11)
    quads = (cols + 3) // 4
    at = program * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = at // quads
    quad = at - row * quads
    w0, w1, w2, w3 = words(quad.to(tl.uint32), ((first_row + row) & _WORD).to(tl.uint32), step, stream, key0, key1)
    if number == 4:
        to = out.to(tl.pointer_type(tl.int64))
        integers = bounded_integers(w0, tl.load(field_ptr + 12))
        tl.store(to + row.to(tl.int64) * stride_row, integers, mask=row < rows)
    else:
        if normal:  # noqa: SIM108 (a conditional expression would compute both)
            values = normal_numbers(w0, w1, w2, w3)
        else:
            values = uniform_numbers(w0, w1, w2, w3).to(tl.float64)
        col = 4 * quad[:, None] + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
        mask = (row < rows)[:, None] & (col < cols)
        offs = row[:, None].to(tl.int64) * stride_row + col
        if number == 0:
            store_rounded(out.to(tl.pointer_type(tl.float64)) + offs, values, mask)
        elif number == 1:
            store_rounded(out.to(tl.pointer_type(tl.float32)) + offs, values, mask)
        elif number == 2:
            store_rounded(out.to(tl.pointer_type(tl.bfloat16)) + offs, values, mask)
        else:
            store_rounded(out.to(tl.pointer_type(tl.float16)) + offs, values, mask)


@triton.jit(do_not_specialize=[*SCALARS, "draw_programs"])
def _inputs_kernel(
    table_ptr, draw_programs,
    data_ptr, out_ptr, labels_ptr, labels_out_ptr, position_ptr, arrivals_ptr,
    n, batch, row_size, stride_out_row, width, low_bits, high_bits, key0, key1, scale_high, scale_low, offset,
    ROWS: tl.constexpr, SCALED: tl.constexpr, MIRROR: tl.constexpr, LABELS: tl.constexpr, ADVANCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK: tl.constexpr, DRAWS: tl.constexpr,
    DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    program = place_of(tile, 0)
    if program < draw_programs:
        first = tl.load(table_ptr + tl.arange(0, DRAWS) * _FIELDS)  # [DRAWS]
        here = first <= program
        draw = tl.sum(here.to(tl.int32), 0) - 1
        begun = tl.max(tl.where(here, first, 0), 0).to(tl.int32)
        _draw_tile(program - begun, table_ptr + draw * _FIELDS, BLOCK)
    else:
        if ROWS:
            sample_tile(
                program - draw_programs,
                data_ptr,
                out_ptr,
                labels_ptr,
                labels_out_ptr,
                position_ptr,
                arrivals_ptr,
                n,
                batch,
                row_size,
                stride_out_row,
                width,
                low_bits,
                high_bits,
                key0,
                key1,
                scale_high,
                scale_low,
                offset,
                grid_size(tile, 0) - draw_programs,
                SCALED,
                MIRROR,
                LABELS,
                ADVANCE,
                BLOCK_ROWS,
                BLOCK_COLS,
            )


# ---- launchers

_NEVER = 2**62  # the first program of a draw that is not there
_DRAWS = 8  # rows of a table: one kernel for every smaller number


def _check(draws: Sequence[Draw]) -> list[tuple[int, int]]:
    """Rows and columns of each draw."""
    op, sizes = "inputs", []
    for d in draws:
        sizes.append(check_draw(op, d.out, d.step, d.kind, d.high))
        check(d.out.device == draws[0].out.device, op, f"draws on {d.out.device} and {draws[0].out.device}")
        check(d.out.ndim == 1 or d.out.shape[1] <= 1 or d.out.stride(1) == 1, op, "the rows of out are not contiguous")
    return sizes


def inputs_launch(draws: Sequence[Draw], rows: SampleArguments | None = None) -> Launch:
    """All draws of an update, and the next rows of its data.

    Building one copies a table of 1 KiB to the device, which belongs before a capture; running it
    does not. The outputs must not overlap.

    Args:
        draws: at least one, on one device; their outs may have different dtypes.
        rows: of the data, on the same device.

    Raises:
        ValueError: what is given is not of these kinds.
    """
    op = "inputs"
    check(len(draws) > 0, op, "there is no draw: rows alone are sample_rows_launch")
    sizes, fields, programs = _check(draws), [], 0
    for d, (n_rows, n_cols) in zip(draws, sizes, strict=True):
        fields.append([
            programs, d.out.data_ptr(), d.step.data_ptr(), d.out.stride(0), n_rows, n_cols, _NUMBERS[d.out.dtype],
            int(d.kind == "normal"), word(d.seed), word(d.seed >> 32), word(d.first_row), int(d.stream), d.high,
            0, 0, 0,
        ])  # fmt: skip
        programs += triton.cdiv(n_rows * triton.cdiv(n_cols, 4), BLOCK)
    most = max(_DRAWS, triton.next_power_of_2(len(draws)))
    fields += [[_NEVER, *[0] * 15]] * (most - len(draws))
    table = torch.tensor(fields, dtype=torch.int64, device=draws[0].out.device)
    table.__dict__["keeps_alive"] = [(d.out, d.step) for d in draws]
    given: dict[str, Any] = dict.fromkeys(
        ("data_ptr", "out_ptr", "labels_ptr", "labels_out_ptr", "position_ptr", "arrivals_ptr"), table
    )
    given |= dict.fromkeys(
        ("n", "batch", "row_size", "stride_out_row", "width", "low_bits", "high_bits", "key0", "key1"), 0
    )
    given |= {"scale_high": 0.0, "scale_low": 0.0, "offset": 0.0, "SCALED": False, "MIRROR": False, "LABELS": False,
              "ADVANCE": False, "BLOCK_ROWS": 1, "BLOCK_COLS": 1}  # fmt: skip
    row_programs = 0
    if rows is not None:
        rows.check(op)
        check(rows.out.device == table.device, op, f"draws on {table.device} and rows on {rows.out.device}")
        row_programs, given = kernel_arguments(rows)
    given |= {"table_ptr": table, "draw_programs": programs, "ROWS": rows is not None, "BLOCK": BLOCK, "DRAWS": most}
    return Launch(_inputs_kernel, (programs + row_programs,), given)


# ---- public


def inputs_(draws: Sequence[Draw], rows: SampleArguments | None = None, *, backend: Backend | None = None) -> None:
    """Fill all outs, by one launch; see :class:`Draw` and :class:`SampleArguments`.

    Raises:
        ValueError: an argument that is not as those say.
    """
    if resolve("inputs", backend, *(d.out for d in draws)) == "reference":
        _check(draws)
        inputs_reference(draws, rows)
    else:
        inputs_launch(draws, rows)()


# ---- spec


def _update(
    data: torch.Tensor, position: torch.Tensor, step: torch.Tensor, *, batch: int, latent: int, dtype: torch.dtype,
    backend: Backend | None = None,
) -> Any:  # fmt: skip
    """What an update draws: two latents, one of them a slice of wider rows, weights in fp32, labels and rows."""
    wide = torch.zeros(batch, latent + 3, dtype=dtype, device=data.device)
    z, weights = (torch.empty(batch, n, dtype=t, device=data.device) for n, t in ((latent, dtype), (1, torch.float32)))
    x = torch.empty(batch, data.shape[1], dtype=dtype, device=data.device)
    labels = torch.empty(batch, dtype=torch.int64, device=data.device)
    inputs_(
        [
            Draw(z, step, 5, noise.Stream.D_LATENT),
            Draw(wide[:, 1 : latent + 1], step, 2**64 - 7, noise.Stream.G_LATENT, first_row=3),
            Draw(weights, step, 5, noise.Stream.ALPHA, "uniform"),
            Draw(labels, step, 5, noise.Stream.G_LABELS, "integers", high=10),
        ],
        SampleArguments(data, position, x, 5, data.shape[1], 2 / 255, -1.0, mirror=True),
        backend=backend,
    )
    return z, wide, weights, labels, x


def _update_reference(data: torch.Tensor, position: torch.Tensor, step: torch.Tensor, **kwargs: Any) -> Any:
    return _update(data, position, step, **kwargs, backend="reference")


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, n: int, row: int, **kwargs: int) -> Sample:
        data = torch.randint(0, 256, (n, row), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        counters = (torch.tensor(i, device=device) for i in (n - 1, 2**33 + 5))
        return Sample(name, (data.to(device), *counters), {**kwargs, "dtype": dtype})

    return [
        sample("odd", 41, 5, batch=3, latent=7),
        sample("more", 64, 21, batch=33, latent=18),
        sample("no-rows", 40, 5, batch=0, latent=4),
        sample("no-latents", 40, 5, batch=3, latent=0),
    ]


def _launches(dtype: torch.dtype) -> list[Launch]:
    step = torch.zeros((), dtype=torch.int64)
    z, weights = torch.empty(64, 64, dtype=dtype), torch.empty(64, 1)
    draws = [Draw(z, step, 5, 2), Draw(z, step, 5, 3), Draw(weights, step, 5, 4, "uniform")]
    images, out = torch.empty(100, 784, dtype=torch.uint8), torch.empty(64, 784, dtype=dtype)
    rows = SampleArguments(
        images, step, out, 7 << 32 | 5, 28, 2 / 255, -1.0, mirror=True, labels=torch.zeros(100, dtype=torch.int64),
        labels_out=torch.zeros(64, dtype=torch.int64), arrivals=torch.zeros((), dtype=torch.int32),
    )  # fmt: skip
    made = [inputs_launch(draws, rows)]
    if dtype == torch.float32:
        points = SampleArguments(torch.empty(100, 2), step, torch.empty(64, 2), 7 << 32 | 5, 2)
        made += [inputs_launch(draws), inputs_launch(draws[:1], replace(points, arrivals=rows.arrivals))]
    return made


def _bytes_moved(s: Sample) -> int:
    data = s.inputs[0]
    assert data is not None
    itemsize = s.kwargs["dtype"].itemsize
    per_row = 2 * s.kwargs["latent"] * itemsize + 4 + 8 + data.shape[1] * (1 + itemsize)
    return int(s.kwargs["batch"] * per_row)


SPEC = OpSpec(
    name="inputs",
    op=_update,
    reference=_update_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=0,
    bytes_moved=_bytes_moved,
)
