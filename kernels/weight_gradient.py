"""Gradients of the weights and biases of all linear layers of a network in one launch.

    dW = U^T X      db = sum over rows of w_i u_i

U ``[K, M]`` are the stacked left factors (adjoints, chain), X ``[K, N]`` the right ones (activations, tangents). A
right factor may be made on the way: ``s_i x_i``, ``x_i + r_i`` or ``s_i x_i + r_i`` on some of the rows, which is how a
penalty on real or fake rows joins the loss there. A table in device memory says what each program makes: a tile of one
layer's dW by ``tl.dot``, or a sum over rows (db, and dW of a layer with one output) without. Half of the rows of a bias
sum are summed apart from the other half: where they are real and fake samples whose terms cancel, they do so exactly.

Every program can leave the sum of squares of what it wrote, for the guard of ``adam_ema``. A variant makes Adam's
update in place of writing the gradient; there each element has a guard of its own, because the sum that guards all of
them is only known when all are made: off by default, as the engine promises to leave out whole updates.

``weight_gradient``, the op, is the one-layer case, bilinear and so differentiable any number of times.

Source: the closed forms of a piecewise linear network; see ``fastgan/rules.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.backend import Backend, resolve
from fastgan.kernels import configs
from fastgan.kernels._adam import (
    Updated,
    adam_element,
    average_weight,
    bias_corrections,
    clamped,
    conclude,
    followed,
    learning_rate,
    settings_of,
    sum_of,
)
from fastgan.kernels._device import last_arrival, place_of
from fastgan.kernels._launch import Launch, accumulator, check, check_dtype
from fastgan.kernels._library import register
from fastgan.kernels._matrix import DTYPES, INTERPRETED, PRECISIONS, arch_of, input_precision, rows_of
from fastgan.kernels._spec import OpSpec, Sample

Rows = tuple[int, int]  # begin and end

# ---- reference


def weight_gradient_reference(u: torch.Tensor, x: torch.Tensor, *, precision: str = "ieee") -> torch.Tensor:
    """The product in PyTorch ops; the precision of fp32 is PyTorch's setting."""
    return u.t() @ x


# ---- kernels

# columns of the table; a sum has its weights as left factor, what it sums as right one, and four ranges of rows
_KIND = tl.constexpr(0)
_LEFT = tl.constexpr(1)
_LEFT_STRIDE = tl.constexpr(2)
_RIGHT = tl.constexpr(3)
_RIGHT_STRIDE = tl.constexpr(4)
_K = tl.constexpr(5)
_M = tl.constexpr(6)
_N = tl.constexpr(7)
_ROW = tl.constexpr(8)  # where the program's tile begins
_COL = tl.constexpr(9)
_OUT = tl.constexpr(10)
_OUT_STRIDE = tl.constexpr(11)
_ADDS = tl.constexpr(12)
_SCALE = tl.constexpr(13)
_SCALED = tl.constexpr(14)  # begin and end of the rows
_R = tl.constexpr(16)
_R_STRIDE = tl.constexpr(17)
_JOINED = tl.constexpr(18)
_PARTS = tl.constexpr(20)
_OWNER = tl.constexpr(28)  # parameter, and its place in the flat tensor: for Adam
_PLACE = tl.constexpr(29)
_FIELDS = tl.constexpr(30)

_TILE = tl.constexpr(0)  # kinds of programs
_ALIGNED = tl.constexpr(1)  # a tile whose operands can be read in vectors of 16 bytes
_SUM = tl.constexpr(2)  # weights in the type of the gradient, or none
_ROW_OF_ONE = tl.constexpr(3)  # weights are the one column of u, in the operands' type

_ADAM_TILE = 64 * 32  # elements: what else Adam's element needs fits in registers beside so many
_SUM_ROWS = tl.constexpr(128)
_SUM_COLUMNS = tl.constexpr(16)


@triton.jit
def _joined(x, row_ptr, start, k, ks, cols, inside, T: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr):
    """``s_i x_i + r_i`` for rows start + ks that have a scale or an r, in the accumulation type."""
    begin, end = tl.load(row_ptr + _SCALED) - start, tl.load(row_ptr + _SCALED + 1) - start
    scale_ptr = tl.load(row_ptr + _SCALE).to(tl.pointer_type(OUT)) - begin
    scale = tl.load(scale_ptr + ks, mask=(ks >= begin) & (ks < end), other=1.0).to(ACC)
    begin, end = tl.load(row_ptr + _JOINED) - start, tl.load(row_ptr + _JOINED + 1) - start
    stride = tl.load(row_ptr + _R_STRIDE)
    r_ptr = tl.load(row_ptr + _R).to(tl.pointer_type(T)) - begin * stride
    at = ks[:, None] * stride.to(tl.int32) + cols[None, :]
    r = tl.load(r_ptr + at, mask=inside & ((ks >= begin) & (ks < end))[:, None], other=0.0).to(ACC)
    return x.to(ACC) * scale[:, None] + r


@triton.jit
def _product(
    row_ptr,
    T: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, JOINS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The program's tile of U^T X."""
    u_ptr, u_stride = tl.load(row_ptr + _LEFT).to(tl.pointer_type(T)), tl.load(row_ptr + _LEFT_STRIDE)
    x_ptr, x_stride = tl.load(row_ptr + _RIGHT).to(tl.pointer_type(T)), tl.load(row_ptr + _RIGHT_STRIDE)
    k, m, n = tl.load(row_ptr + _K), tl.load(row_ptr + _M), tl.load(row_ptr + _N)
    VECTOR: tl.constexpr = 128 // T.primitive_bitwidth if ALIGNED else 1
    if ALIGNED:
        # what is read beyond the last column lies in the operand's memory and enters no element that is stored
        u_ptr, x_ptr = tl.multiple_of(u_ptr, 16), tl.multiple_of(x_ptr, 16)
        u_stride, x_stride = tl.multiple_of(u_stride, VECTOR), tl.multiple_of(x_stride, VECTOR)
        m, n = (m + (VECTOR - 1)) // VECTOR * VECTOR, (n + (VECTOR - 1)) // VECTOR * VECTOR
    # offsets from the tile's beginning, which 32 bits hold: 64-bit ones take too many registers
    ks = tl.arange(0, BLOCK_K)
    rows = tl.multiple_of(tl.load(row_ptr + _ROW).to(tl.int32), 16) + tl.arange(0, BLOCK_M)
    cols = tl.multiple_of(tl.load(row_ptr + _COL).to(tl.int32), 16) + tl.arange(0, BLOCK_N)
    u_at = ks[None, :] * tl.multiple_of(u_stride.to(tl.int32), VECTOR) + rows[:, None]  # [BLOCK_M, BLOCK_K]
    x_at = ks[:, None] * tl.multiple_of(x_stride.to(tl.int32), VECTOR) + cols[None, :]  # [BLOCK_K, BLOCK_N]
    has_row, has_col = (rows < m)[:, None], (cols < n)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, k, BLOCK_K):
        has_k = ks < k - start
        u = tl.load(u_ptr + start * u_stride + u_at, mask=has_k[None, :] & has_row, other=0.0)
        x = tl.load(x_ptr + start * x_stride + x_at, mask=has_k[:, None] & has_col, other=0.0)
        if JOINS:
            x = _joined(x, row_ptr, start, k, ks, cols, has_k[:, None] & has_col, T, OUT, ACC).to(T)
        acc = tl.dot(u, x, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _place(row_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tile's first element lies in the output, where the others lie from there, and which there are."""
    row, col, stride = tl.load(row_ptr + _ROW), tl.load(row_ptr + _COL), tl.load(row_ptr + _OUT_STRIDE)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (rows < tl.load(row_ptr + _M) - row)[:, None] & (cols < tl.load(row_ptr + _N) - col)[None, :]
    return row * stride + col, rows[:, None] * stride.to(tl.int32) + cols[None, :], inside


@triton.jit
def _row_sum(row_ptr, T: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, JOINS: tl.constexpr):
    """Of w_i x_i over the rows of each of four ranges, the ranges' sums added in turn."""
    x_ptr, x_stride = tl.load(row_ptr + _RIGHT).to(tl.pointer_type(T)), tl.load(row_ptr + _RIGHT_STRIDE)
    w_ptr, w_stride = tl.load(row_ptr + _LEFT), tl.load(row_ptr + _LEFT_STRIDE)
    is_column = tl.load(row_ptr + _KIND) == _ROW_OF_ONE
    is_given = (w_ptr != 0) & (tl.load(row_ptr + _KIND) == _SUM)
    ks = tl.arange(0, _SUM_ROWS)
    cols = tl.load(row_ptr + _COL).to(tl.int32) + tl.arange(0, _SUM_COLUMNS)
    has_col = (cols < tl.load(row_ptr + _N))[None, :]
    x_at = ks[:, None] * x_stride.to(tl.int32) + cols[None, :]
    total = tl.zeros([_SUM_COLUMNS], ACC)
    for part in range(4):
        begin, end = tl.load(row_ptr + _PARTS + 2 * part), tl.load(row_ptr + _PARTS + 2 * part + 1)
        sums = tl.zeros([_SUM_ROWS, _SUM_COLUMNS], ACC)
        for start in range(begin, end, _SUM_ROWS):
            has_k = ks < end - start
            x = tl.load(x_ptr + start * x_stride + x_at, mask=has_k[:, None] & has_col, other=0.0).to(ACC)
            if JOINS:
                x = _joined(x, row_ptr, start, end, ks, cols, has_k[:, None] & has_col, T, OUT, ACC)
            column_ptr = w_ptr.to(tl.pointer_type(T)) + (start + ks) * w_stride
            column = tl.load(column_ptr, mask=has_k & is_column, other=0.0).to(ACC)
            given_ptr = w_ptr.to(tl.pointer_type(OUT)) + (start + ks)
            given = tl.load(given_ptr, mask=has_k & is_given, other=1.0).to(ACC)
            sums += tl.where(is_column, column, given)[:, None] * x
        total += tl.sum(sums, 0)
    return total


@triton.jit
def _weight_gradient_kernel(
    table_ptr, squares_ptr,
    T: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, JOINS: tl.constexpr,
    SQUARES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    program = place_of(tile, 0).to(tl.int64)
    row_ptr = table_ptr + program * _FIELDS
    kind = tl.load(row_ptr + _KIND)
    out_ptr, adds = tl.load(row_ptr + _OUT).to(tl.pointer_type(OUT)), tl.load(row_ptr + _ADDS) != 0
    if kind < _SUM:
        if kind == _ALIGNED:
            acc = _product(row_ptr, T, OUT, ACC, PRECISION, JOINS, True, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            acc = _product(row_ptr, T, OUT, ACC, PRECISION, JOINS, False, BLOCK_M, BLOCK_N, 16)
        if DEPENDENT:
            gdc_launch_dependents()
        first, at, inside = _place(row_ptr, BLOCK_M, BLOCK_N)
        acc += tl.load(out_ptr + first + at, mask=inside & adds, other=0.0).to(ACC)
        tl.store(out_ptr + first + at, acc.to(OUT), mask=inside)
        if SQUARES:
            acc = tl.where(inside, acc, 0.0)
            tl.store(squares_ptr + program, tl.sum(tl.sum(acc * acc, 1), 0).to(squares_ptr.dtype.element_ty))
    else:
        columns = tl.load(row_ptr + _COL).to(tl.int32) + tl.arange(0, _SUM_COLUMNS)
        total = _row_sum(row_ptr, T, OUT, ACC, JOINS)
        if DEPENDENT:
            gdc_launch_dependents()
        within = columns < tl.load(row_ptr + _N)
        total += tl.load(out_ptr + columns, mask=within & adds, other=0.0).to(ACC)
        tl.store(out_ptr + columns, total.to(OUT), mask=within)
        if SQUARES:
            total = tl.where(within, total, 0.0)
            tl.store(squares_ptr + program, tl.sum(total * total, 0).to(squares_ptr.dtype.element_ty))


@triton.jit
def _apply(
    g, place, at, inside, rate, root, lr, weight, inverse, settings_ptr, flat_ptr, exp_avg_ptr, exp_avg_sq_ptr,
    average_ptr, low_ptr,
    DECAY: tl.constexpr, FOLLOWS: tl.constexpr, CLIP: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Adam's update of the elements place + at of the flat tensors by their gradient g, element by element."""
    flat_ptr, exp_avg_ptr, exp_avg_sq_ptr = flat_ptr + place, exp_avg_ptr + place, exp_avg_sq_ptr + place
    if SCALED:
        g = g * inverse.to(g.dtype)
    square = g * g
    goes = inside & (square - square == 0)  # finite: an infinite square would stay in the second moment for good
    old = tl.load(flat_ptr + at, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    new, m, v = adam_element(old, tl.where(goes, g, 0.0), m, v, rate, root, lr, settings_ptr, DECAY, False)
    tl.store(exp_avg_ptr + at, m, mask=goes)
    tl.store(exp_avg_sq_ptr + at, v, mask=goes)
    p = tl.where(goes, new, old)
    if CLIP:
        p = clamped(p, settings_ptr)
    tl.store(flat_ptr + at, p, mask=inside)
    if FOLLOWS != "none":
        average = tl.load(average_ptr + place + at, mask=inside, other=0.0)
        tl.store(average_ptr + place + at, followed(average, p, weight), mask=inside)
    if LOW:
        tl.store(low_ptr + place + at, p.to(tl.float32).to(low_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient_adam_kernel(
    table_ptr, squares_ptr,
    flat_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, low_ptr, steps_ptr, active_ptr, update_ptr, images_ptr,
    averaged_ptr, skipped_ptr, grad_norm_ptr, counter_ptr, settings_ptr, scale_ptr, good_steps_ptr,
    count_a_ptr, count_b_ptr, count_c_ptr, values_ptr, ring_ptr, slot_ptr,
    n_params, n_values, n_slots, add_a, add_b, add_c,
    T: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, JOINS: tl.constexpr,
    DECAY: tl.constexpr, SCHEDULE: tl.constexpr, WARMUP: tl.constexpr, FOLLOWS: tl.constexpr, CLIP: tl.constexpr,
    LOW: tl.constexpr, SCALED: tl.constexpr, N_COUNTS: tl.constexpr, RING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + program * _FIELDS
    kind, place = tl.load(row_ptr + _KIND), tl.load(row_ptr + _PLACE)
    out_ptr, adds = tl.load(row_ptr + _OUT).to(tl.pointer_type(OUT)), tl.load(row_ptr + _ADDS) != 0
    lr = learning_rate(settings_ptr, update_ptr, SCHEDULE, WARMUP)
    steps = tl.load(steps_ptr + tl.load(row_ptr + _OWNER)).to(tl.float64) + 1
    rate, root = bias_corrections(settings_ptr, steps, lr)
    weight = average_weight(settings_ptr, images_ptr, averaged_ptr, FOLLOWS)
    inverse = tl.full([], 1.0, tl.float64)
    if SCALED:
        inverse = 1 / tl.load(scale_ptr).to(tl.float64)
    if kind < _SUM:
        if kind == _ALIGNED:
            acc = _product(row_ptr, T, OUT, ACC, PRECISION, JOINS, True, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            acc = _product(row_ptr, T, OUT, ACC, PRECISION, JOINS, False, BLOCK_M, BLOCK_N, 16)
        first, at, inside = _place(row_ptr, BLOCK_M, BLOCK_N)
        acc += tl.load(out_ptr + first + at, mask=inside & adds, other=0.0).to(ACC)
        acc = tl.where(inside, acc, 0.0)
        tl.store(squares_ptr + program, tl.sum(tl.sum(acc * acc, 1), 0).to(squares_ptr.dtype.element_ty))
        _apply(
            acc, place + first, at, inside, rate, root, lr, weight, inverse, settings_ptr, flat_ptr, exp_avg_ptr,
            exp_avg_sq_ptr, average_ptr, low_ptr, DECAY, FOLLOWS, CLIP, LOW, SCALED,
        )  # fmt: skip
    else:
        columns = tl.load(row_ptr + _COL).to(tl.int32) + tl.arange(0, _SUM_COLUMNS)
        total = _row_sum(row_ptr, T, OUT, ACC, JOINS)
        within = columns < tl.load(row_ptr + _N)
        total += tl.load(out_ptr + columns, mask=within & adds, other=0.0).to(ACC)
        total = tl.where(within, total, 0.0)
        tl.store(squares_ptr + program, tl.sum(total * total, 0).to(squares_ptr.dtype.element_ty))
        _apply(
            total, place, columns, within, rate, root, lr, weight, inverse, settings_ptr, flat_ptr, exp_avg_ptr,
            exp_avg_sq_ptr, average_ptr, low_ptr, DECAY, FOLLOWS, CLIP, LOW, SCALED,
        )  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
    if last_arrival(counter_ptr, tl.num_programs(0)):
        squares = sum_of(squares_ptr, tl.num_programs(0), 256) * inverse * inverse
        conclude(
            squares, True, settings_ptr, steps_ptr, active_ptr, images_ptr, averaged_ptr, skipped_ptr, grad_norm_ptr,
            scale_ptr, good_steps_ptr, count_a_ptr, count_b_ptr, count_c_ptr, add_a, add_b, add_c, values_ptr,
            ring_ptr, slot_ptr, n_params, n_values, n_slots, FOLLOWS, SCALED, N_COUNTS, RING, 128,
        )  # fmt: skip
        tl.store(counter_ptr, 0)


# ---- launchers


@dataclass(frozen=True)
class Problem:
    """The gradient of one layer.

    Attributes:
        u: left factors ``[K, M]``; fp16, bf16, fp32 or fp64. Rows are contiguous, the distance between them is free;
            so for x, r and dw.
        x: right factors ``[K, N]`` of that dtype.
        dw: ``u^T x``, ``[M, N]``, written; fp32 (fp64 for fp64 factors).
        db: ``[M]`` of ``dw``'s dtype, contiguous, written; ``None`` for a layer without a bias.
        bias_rows: up to two ranges (begin, end) of rows of u that enter db. Each is halved, the first half the longer
            one, and the halves are summed apart.
        bias_weights: factors of those rows in db, ``[at least the last end]`` of ``dw``'s dtype, from row 0 on.
        scale: ``[S]`` of ``dw``'s dtype: factors of the right factors of the rows ``scaled``.
        scaled: rows (begin, begin + S); by default ``joined``.
        r: ``[S', N]`` of u's dtype: is added to the right factors of the rows ``joined``.
        joined: rows (begin, begin + S').
        accumulate: add to what dw and db hold.
    """

    u: torch.Tensor
    x: torch.Tensor
    dw: torch.Tensor
    db: torch.Tensor | None = None
    bias_rows: Sequence[Rows] = ()
    bias_weights: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scaled: Rows | None = None
    r: torch.Tensor | None = None
    joined: Rows | None = None
    accumulate: bool = False


def programs_of(problems: Sequence[Problem], tile: configs.Config | None = None, *, adam: bool = False) -> int:
    """Programs of the launch: as many as it has partial sums of squares.

    Args:
        problems: of :func:`weight_gradient_launch`; their shapes decide.
        tile: of it.
        adam: whether it makes the update.
    """
    tile = tile or _tile_for(problems, adam)
    return sum(len(_places(p, tile)) for p in problems)


def weight_gradient_launch(
    problems: Sequence[Problem],
    *,
    squares: torch.Tensor | None = None,
    precision: str = "ieee",
    adam: Updated | None = None,
    tile: configs.Config | None = None,
) -> Launch:
    """The gradients of all layers of a network, as one launch on given memory.

    Args:
        problems: at least one; all of one dtype and on one device. Outputs do not overlap each other or an input.
        squares: ``[programs_of(problems)]``, fp64 or fp32, written: sums of the squares of the gradients (with
            ``accumulate``, of the sums), computed in fp32 (fp64 for fp64). Their sum is what ``adam_ema`` guards by.
        precision: of products of fp32 factors: ``"ieee"`` or ``"tf32"``.
        adam: make the update of ``fastgan.adam`` in the same launch. ``dw`` and ``db`` are then parts of ``adam.grad``
            that say which parameters are meant, and are only read, where ``accumulate``; the problems have to cover
            every parameter, and ``squares`` is needed. The guard differs from that of ``adam_ema``: an element whose
            gradient (or its square) is not finite keeps its values, the others are updated and counted, and the update
            is counted as skipped. The global guard needs all gradients before the first element may change: therefore
            this is off unless asked for.
        tile: instead of the one that :func:`fastgan.kernels.configs.config` gives.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "weight_gradient"
    check(len(problems) > 0, op, "problems is empty, expected at least one")
    dtype, out = problems[0].u.dtype, problems[0].dw.dtype
    check_dtype(op, "u", problems[0].u, DTYPES)
    check_dtype(op, "dw", problems[0].dw, (torch.float64 if dtype == torch.float64 else torch.float32,))
    for problem in problems:
        _check(op, problem, dtype, out)
    check(precision in PRECISIONS, op, f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    tile = tile or _tile_for(problems, adam is not None)
    table = [row for problem in problems for row in _rows(op, problem, tile, adam)]
    table.sort(key=lambda row: row[_KIND.value] < _SUM.value)  # what walks along the rows begins first
    if squares is not None:
        check(squares.shape == (len(table),), op, f"squares has shape {tuple(squares.shape)}, expected ({len(table)},)")
        check_dtype(op, "squares", squares, (torch.float64, torch.float32))
    device = problems[0].dw.device
    on_device = torch.tensor(table, dtype=torch.int64, device=device).view(-1, _FIELDS.value)
    joins = any(p.scale is not None or p.r is not None for p in problems)
    arguments: dict[str, Any] = {
        "table_ptr": on_device, "squares_ptr": on_device if squares is None else squares, "T": _TRITON[dtype],
        "OUT": _TRITON[out], "ACC": accumulator(dtype), "PRECISION": input_precision(dtype, precision), "JOINS": joins,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    keep = tuple(t for p in problems for t in (p.u, p.x, p.dw, p.db, p.bias_weights, p.scale, p.r) if t is not None)
    if adam is None:
        arguments |= {"SQUARES": squares is not None}
        kernel = _weight_gradient_kernel
    else:
        check(squares is not None, op, "squares is None, expected memory for the sums of squares with adam")
        covered = {row[_OWNER.value] for row in table}
        sizes = [b - a for a, b in zip(adam.offsets, [*adam.offsets[1:], adam.flat.numel()], strict=True)]
        missing = [i for i, size in enumerate(sizes) if size and i not in covered]
        check(not missing, op, f"problems lack parameters {missing}, expected all of adam's")
        arguments |= adam.arguments()
        kernel = _weight_gradient_adam_kernel
    return Launch(
        kernel, (len(table),), arguments, num_warps=tile.num_warps, num_stages=tile.num_stages, keep=keep
    )  # fmt: skip


_TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
           torch.float64: tl.float64}  # fmt: skip


def _check(op: str, p: Problem, dtype: torch.dtype, out: torch.dtype) -> None:
    rows_of(op, "u", p.u)
    (k, m), n = p.u.shape, p.x.shape[-1]
    rows_of(op, "x", p.x, (k, n))
    rows_of(op, "dw", p.dw, (m, n))
    ends = [end for _, end in p.bias_rows]
    check(len(ends) <= 2, op, f"bias_rows has {len(ends)} ranges, expected at most 2")
    scaled = p.scaled or p.joined
    for name, t, kind in (("u", p.u, dtype), ("x", p.x, dtype), ("r", p.r, dtype), ("dw", p.dw, out), ("db", p.db, out),
                          ("scale", p.scale, out), ("bias_weights", p.bias_weights, out)):  # fmt: skip
        if t is not None:
            check_dtype(op, name, t, (kind,))
            check(t.device == p.dw.device, op, f"{name} is on {t.device}, dw on {p.dw.device}")
    for name, rows in (*(("bias_rows", rows) for rows in p.bias_rows), ("joined", p.joined), ("scaled", scaled)):
        if rows is not None:
            check(0 <= rows[0] <= rows[1] <= k, op, f"{name} is {rows}, expected rows of u's {k}")
    for name, t in (("u", p.u), ("x", p.x), ("r", p.r), ("dw", p.dw)):
        most = 2**31 // _SUM_ROWS.value  # offsets within a tile are of 32 bits
        check(t is None or max(t.stride(0), t.shape[1]) < most, op, f"{name} has rows {most} elements apart or more")
    if p.db is not None:
        check(p.db.shape == (m,) and p.db.is_contiguous(), op, f"db has shape {tuple(p.db.shape)}, expected ({m},)")
    for name, t, needed in (("scale", p.scale, scaled), ("r", p.r, p.joined)):
        if t is not None:
            check(needed is not None, op, f"{name} is given without the rows that it is for")
            assert needed is not None
            check(len(t) == needed[1] - needed[0], op, f"{name} has {len(t)} rows, expected those of {needed}")
    if p.r is not None:
        rows_of(op, "r", p.r, (len(p.r), n))
    for name, t in (("scale", p.scale), ("bias_weights", p.bias_weights)):
        if t is not None:
            check(t.ndim == 1 and t.is_contiguous(), op, f"{name} has shape {tuple(t.shape)}, expected one dimension")
    if p.bias_weights is not None:
        least = max(ends, default=0)
        check(len(p.bias_weights) >= least, op, f"bias_weights has {len(p.bias_weights)} rows, expected {least}")


def _tile_for(problems: Sequence[Problem], adam: bool) -> configs.Config:
    """For as many tiles as all of the problems have."""
    n = max(1, *(p.dw.shape[1] for p in problems), 1)
    m, k = sum(p.dw.numel() for p in problems) // n, max(len(p.u) for p in problems)
    dtype = problems[0].u.dtype
    tile = configs.config("weight_gradient", max(m, 1), n, k, dtype, arch_of(problems[0].dw))
    return _for_adam(tile, dtype) if adam else tile


def _for_adam(tile: configs.Config, dtype: torch.dtype) -> configs.Config:
    """A tile whose elements' parameters and moments fit in registers."""
    small = [t for t in configs.shipped("weight_gradient", dtype) if t.block_m * t.block_n <= _ADAM_TILE]
    return tile if tile.block_m * tile.block_n <= _ADAM_TILE else small[-1]


def _places(p: Problem, tile: configs.Config) -> list[tuple[int, int, bool]]:
    """Of each program of a problem: first row, first column, whether it makes a part of db."""
    m, n = p.dw.shape
    columns = _SUM_COLUMNS.value
    if m == 1:
        out = [(0, j, False) for j in range(0, n, columns)]
    else:
        out = [(i, j, False) for i in range(0, m, tile.block_m) for j in range(0, n, tile.block_n)]
    return out + ([(0, j, True) for j in range(0, m, columns)] if p.db is not None else [])


def _rows(op: str, p: Problem, tile: configs.Config, adam: Updated | None) -> list[list[int]]:
    """Rows of the table."""
    (k, m), n = p.u.shape, p.x.shape[1]
    scaled, joined = p.scaled or p.joined or (0, 0), p.joined or (0, 0)
    join = [_at(p.scale), *(scaled if p.scale is not None else (0, 0)),
            _at(p.r), _stride(p.r), *(joined if p.r is not None else (0, 0))]  # fmt: skip
    kind = (_ROW_OF_ONE if m == 1 else _ALIGNED if _vectors(p) else _TILE).value
    halves = [half for begin, end in p.bias_rows for half in _halves(begin, end)]
    rows = []
    for row, col, bias in _places(p, tile):
        out = p.db if bias else p.dw
        assert out is not None
        owner, place = _parameter(op, out, adam) if adam is not None else (0, 0)
        if bias:
            fields = [_SUM.value, _at(p.bias_weights), 1, _at(p.u), _stride(p.u), k, 1, m]
        else:
            fields = [kind, _at(p.u), _stride(p.u), _at(p.x), _stride(p.x), k, m, n]
        parts = [*(halves if bias else [0, k]), *[0] * 8][:8]
        unjoined = [0] * len(join)
        fields += [row, col, _at(out), _stride(out) if out.ndim == 2 else 0, int(p.accumulate)]
        rows.append([*fields, *(unjoined if bias else join), *parts, owner, place])
    return rows


def _halves(begin: int, end: int) -> list[int]:
    middle = begin + (end - begin + 1) // 2
    return [begin, middle, middle, end]


def _at(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stride(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _vectors(p: Problem) -> bool:
    """Whether u and x can be read 16 bytes at a time, up to whole vectors at the end of each row."""
    for t in (p.u, p.x):
        vector, width = 16 // t.element_size(), t.shape[1]
        if t.data_ptr() % 16 or t.stride(0) % vector:
            return False
        last = t.storage_offset() + max(len(t) - 1, 0) * t.stride(0) + -(-width // vector) * vector
        if last * t.element_size() > t.untyped_storage().nbytes():
            return False
    return True


def _parameter(op: str, out: torch.Tensor, adam: Updated) -> tuple[int, int]:
    """Number and place of the parameter whose gradient a tensor is."""
    place, rest = divmod(out.data_ptr() - adam.grad.data_ptr(), out.element_size())
    known = rest == 0 and place in adam.offsets and out.dtype == adam.grad.dtype
    check(known, op, "dw or db is no parameter's part of adam.grad")
    # an empty parameter begins where the next one does
    return max(i for i, offset in enumerate(adam.offsets) if offset == place), place


# ---- autograd


def _product_of(u: torch.Tensor, x: torch.Tensor, precision: str) -> torch.Tensor:
    wide = u.dtype == torch.float64
    dw = torch.empty(u.shape[1], x.shape[1], dtype=torch.float64 if wide else torch.float32, device=u.device)
    u, x = (t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous() for t in (u, x))
    weight_gradient_launch([Problem(u, x, dw)], precision=precision)()
    return dw.to(u.dtype)


def _fake(u, x, precision):
    return u.new_empty(u.shape[1], x.shape[1])


def _setup(ctx, inputs, output):
    u, x, ctx.precision = inputs
    ctx.save_for_backward(u, x)


def _backward(ctx, dw):
    """``du = x dw^T`` and ``dx = u dw``: products of the layer, which have derivatives of their own."""
    (u, x), product = ctx.saved_tensors, torch.ops.fastgan.linear_lrelu_product
    du = product(x, dw, False, True, ctx.precision) if ctx.needs_input_grad[0] else None
    dx = product(u, dw, False, False, ctx.precision) if ctx.needs_input_grad[1] else None
    return du, dx, None


_weight_gradient = register(
    "weight_gradient(Tensor u, Tensor x, str precision) -> Tensor", _product_of, _fake, _setup, _backward
)


@register_flop_formula(torch.ops.fastgan.weight_gradient)
def _flops(u_shape, x_shape, *args, **kwargs):
    return 2 * u_shape[0] * u_shape[1] * x_shape[1]


# ---- public


def weight_gradient(
    u: torch.Tensor, x: torch.Tensor, *, precision: str = "ieee", backend: Backend | None = None
) -> torch.Tensor:
    """``u^T x``: the gradient of a linear layer's weight.

    Args:
        u: ``[K, M]``, gradients of the layer's output; fp16, bf16, fp32 or fp64. Copied if its rows are not
            contiguous, as is ``x``.
        x: ``[K, N]`` of ``u``'s dtype, the layer's input.
        precision: of products of fp32 factors: ``"ieee"`` or ``"tf32"``.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        ``[M, N]``, contiguous, ``u``'s dtype. Sums in fp32 (fp64 for fp64). Differentiable twice and more.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "weight_gradient"
    check_dtype(op, "u", u, DTYPES)
    check(u.ndim == 2, op, f"u has shape {tuple(u.shape)}, expected [K, M]")
    check(x.ndim == 2 and len(x) == len(u), op, f"x has shape {tuple(x.shape)}, expected ({len(u)}, N)")
    check(x.dtype == u.dtype, op, f"x has dtype {x.dtype}, expected {u.dtype}")
    check(precision in PRECISIONS, op, f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if resolve(op, backend, u, x) == "reference":
        return weight_gradient_reference(u, x, precision=precision)
    dw: torch.Tensor = _weight_gradient(u, x, precision)
    return dw


# ---- spec


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    g = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        """On a grid of 1/64, so that sums of products are exact and orders of summation agree, in fp64 as well."""
        t = torch.randn(shape, generator=g, device=device, dtype=torch.float32)
        return (t.mul_(64).round_() / 64).to(dtype)

    return [
        Sample("small", (randn(5, 3), randn(5, 4))),
        Sample("odd", (randn(65, 33), randn(65, 7))),
        Sample("one-output", (randn(131, 1), randn(131, 33))),
        Sample("one-input", (randn(33, 7), randn(33, 1))),
        Sample("vectors", (randn(48, 64), randn(48, 32))),
        Sample("transposed", (randn(9, 19).t(), randn(6, 19).t())),
        Sample("no-rows", (randn(0, 16), randn(0, 8))),
        Sample("no-outputs", (randn(4, 0), randn(4, 8))),
    ]


def _launches(dtype: torch.dtype) -> list[Launch]:
    wide = dtype == torch.float64
    out = torch.float64 if wide else torch.float32
    u, x, r = (torch.empty(64, 64, dtype=dtype) for _ in range(3))
    flat, dw = torch.empty(64 * 64, dtype=out), torch.empty(64, 64, dtype=out)
    db, scale, squares = dw[0], torch.empty(64, dtype=out), torch.empty(64, dtype=torch.float64)
    plain, joined = Problem(u, x, dw), Problem(u, x, dw, db, [(0, 64)], scale, scale, (0, 64), r, (0, 64))

    def launch(problem: Problem, tile: configs.Config, **options: Any) -> Launch:
        n = programs_of([problem], tile=tile)
        return weight_gradient_launch([problem], squares=squares[:n], tile=tile, **options)

    tiles = configs.shipped("weight_gradient", dtype)
    launches = [launch(p, tile, precision="tf32") for tile in tiles for p in (plain, joined)]
    if dtype == torch.float32:
        launches.append(launch(plain, tiles[-1]))
    some = torch.zeros((), dtype=torch.int64)
    adam = Updated(
        flat, flat, flat, dw.view(-1), steps=torch.zeros(1), active=torch.ones(1, dtype=torch.uint8), update=some,
        skipped=some, grad_norm=flat[0], counter=torch.zeros((), dtype=torch.int32),
        settings=settings_of(torch.device("cpu"), out, lr=1e-3, betas=(0.5, 0.9), eps=1e-8), follows="decay",
        average=flat, images=some, averaged=some, low=torch.empty(64 * 64).bfloat16(), scale=torch.ones(()),
        good_steps=some, offsets=(0,),
    )  # fmt: skip
    small = [tile for tile in tiles if tile.block_m * tile.block_n <= _ADAM_TILE]
    return [*launches, *(launch(plain, tile, precision="tf32", adam=adam) for tile in small)]


def _bytes_moved(s: Sample) -> int:
    u, x = s.inputs[:2]
    assert u is not None
    assert x is not None
    return (u.numel() + x.numel() + u.shape[1] * x.shape[1]) * u.element_size()


SPEC = OpSpec(
    name="weight_gradient",
    op=weight_gradient,
    reference=weight_gradient_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=2,
    bytes_moved=_bytes_moved,
    interpreted_dtypes=INTERPRETED,
)
