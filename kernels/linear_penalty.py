"""The beginning of a penalty's sweep in one launch: row norms, value, direction, and the first step.

With the gradients g ``[n, K]`` of a critic to its samples, |g_i| = sqrt(sum + tiny), whose derivative at 0 is 0:

    norm     P_i = w (|g_i| - t)^2     r_i = 2 w s / n (1 - t / |g_i|) g_i
    square   P_i = w |g_i|^2           r_i = 2 w s / n g_i
    value = the mean of P_i            out = (r W^T) * phi'(mask)

Since r_i is a factor times g_i, the loop of the product multiplies g itself and adds up its squares on the way; the
factor enters at the end. Programs of the first column of tiles write r, by a second pass over their rows, and P; the
last of them to finish adds up P, in order.

Launch only: ``linear_lrelu`` and ``gradient_penalty`` are the ops. Sources: Gulrajani et al. 2017, arXiv:1704.00028;
Mescheder et al. 2018, arXiv:1801.04406; the sweep: see ``fastgan/rules.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.kernels import configs
from fastgan.kernels._device import derivative, grid_size, last_arrival, place_of
from fastgan.kernels._launch import Launch, accumulator, check
from fastgan.kernels._matrix import arch_of, check_activation, check_operands, input_precision, rows_of

KINDS = ("norm", "square")

# ---- kernels


@triton.jit
def _linear_penalty_kernel(
    g_ptr, weight_ptr, mask_ptr, direction_ptr, out_ptr, rows_value_ptr, value_ptr, loss_scale_ptr, counter_ptr,
    n_rows, n, k, stride_g, stride_weight, stride_mask, stride_direction, stride_out,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, TARGET: tl.constexpr, SCALE: tl.constexpr, TINY: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_LOSS_SCALE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    rows = place_of(tile, 0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = place_of(tile, 1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, inner, writes = rows < n_rows, tl.arange(0, BLOCK_K), place_of(tile, 1) == 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    squares = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for start in range(0, k, BLOCK_K):
        ks = start + inner
        inside = row_mask[:, None] & (ks < k)[None, :]
        g = tl.load(g_ptr + rows[:, None] * stride_g + ks[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight_at = weight_ptr + cols[None, :] * stride_weight + ks[:, None]
        weight = tl.load(weight_at, mask=(ks < k)[:, None] & (cols < n)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(g.to(weight.dtype), weight, acc, input_precision=PRECISION, out_dtype=ACC)
        squares += g.to(ACC) * g.to(ACC)
    if DEPENDENT:
        gdc_launch_dependents()
    squared = tl.sum(squares, 1)
    if NORM:
        length = tl.sqrt_rn(squared + TINY) if tl.float32 == ACC else tl.sqrt(squared + TINY)
        value = WEIGHT * (length - TARGET) * (length - TARGET)
        factor = (2 * WEIGHT * SCALE) * ((length - TARGET) / length) / n_rows
    else:
        value = WEIGHT * squared
        factor = tl.full([BLOCK_M], 2 * WEIGHT * SCALE, ACC) / n_rows
    if HAS_LOSS_SCALE:
        factor *= tl.load(loss_scale_ptr).to(ACC)
    acc *= factor[:, None]
    inside = row_mask[:, None] & (cols < n)[None, :]
    if HAS_MASK:
        below = tl.load(mask_ptr + rows[:, None] * stride_mask + cols[None, :], mask=inside, other=0.0).to(ACC)
        acc *= derivative(below, ACTIVATION, SLOPE)
    tl.store(out_ptr + rows[:, None] * stride_out + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    if writes:
        for start in range(0, k, BLOCK_K):
            ks = start + inner
            there = row_mask[:, None] & (ks < k)[None, :]
            r = tl.load(g_ptr + rows[:, None] * stride_g + ks[None, :], mask=there, other=0.0).to(ACC) * factor[:, None]
            direction_at = direction_ptr + rows[:, None] * stride_direction + ks[None, :]
            tl.store(direction_at, r.to(direction_ptr.dtype.element_ty), mask=there)
        tl.store(rows_value_ptr + rows, value.to(rows_value_ptr.dtype.element_ty), mask=row_mask)
        if last_arrival(counter_ptr, grid_size(tile, 0)):
            values = tl.zeros([BLOCK_ROWS], ACC)
            for start in range(0, n_rows, BLOCK_ROWS):
                at = start + tl.arange(0, BLOCK_ROWS)
                values += tl.load(rows_value_ptr + at, mask=at < n_rows, other=0.0, cache_modifier=".cg").to(ACC)
            tl.store(value_ptr, (tl.sum(values) / n_rows).to(value_ptr.dtype.element_ty))
            tl.store(counter_ptr, 0)


# ---- launchers

_BLOCK_ROWS = 256


def penalty_launch(
    g: torch.Tensor,
    direction: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
    kind: str = "norm",
    penalty_weight: float,
    target: float = 1.0,
    scale: float = 1.0,
    value: torch.Tensor,
    rows_value: torch.Tensor,
    counter: torch.Tensor,
    loss_scale: torch.Tensor | None = None,
    precision: str = "ieee",
    tile: configs.Config | None = None,
) -> Launch:
    """The launch that begins a penalty's sweep: see the formulas of this module.

    Args:
        g: ``[n, K]``; fp16, bf16, fp32 or fp64.
        direction: ``[n, K]``, written: r, the derivative of ``scale`` times the penalty to ``g``. Must not overlap it.
        weight: ``[N, K]`` of the first layer.
        out: ``[n, N]``, written. Must not overlap ``g``.
        mask: ``[n, N]`` output of the first layer, or ``None``. May be the same memory as ``out``.
        activation, slope: of the first layer.
        kind: ``"norm"`` or ``"square"``.
        penalty_weight, target: w and t above; the square has no target.
        scale: s above: how many updates this one stands for. It does not enter ``value``.
        value: 0-dim, written: the mean.
        rows_value: ``[n]``, written: of each row. As ``value`` fp32, or fp64 where ``g`` is.
        counter: one int32, 0 before and after.
        loss_scale: 0-dim factor of r, or ``None``.
        precision: of products of fp32 operands: ``"ieee"`` or ``"tf32"``.
        tile: instead of the one that :func:`fastgan.kernels.configs.config` gives.

    All matrices have contiguous rows; the distance between rows is free.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "linear_penalty"
    check_operands(op, g, weight, precision)
    check_activation(op, activation, slope)
    (n_rows, k), n = g.shape, len(weight)
    check(n_rows > 0, op, "g has no rows, and the mean of nothing is not defined")
    check(weight.shape[1] == k, op, f"weight has shape {tuple(weight.shape)}, expected (N, {k})")
    check(kind in KINDS, op, f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    rows_of(op, "direction", direction, (n_rows, k))
    rows_of(op, "out", out, (n_rows, n))
    if mask is not None:
        rows_of(op, "mask", mask, (n_rows, n))
    check(direction.numel() == 0 or direction.data_ptr() != g.data_ptr(), op, "direction is the memory of g")
    check(rows_value.shape == (n_rows,), op, f"rows_value has shape {tuple(rows_value.shape)}, expected ({n_rows},)")
    check(rows_value.is_contiguous(), op, "rows_value is not contiguous")
    check(value.numel() == 1, op, f"value has shape {tuple(value.shape)}, expected ()")
    check(counter.dtype == torch.int32, op, f"counter has dtype {counter.dtype}, expected torch.int32")
    tile = tile or configs.config(op, n_rows, n, k, weight.dtype, arch_of(g))
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    return Launch(
        _linear_penalty_kernel, (triton.cdiv(n_rows, tile.block_m), triton.cdiv(n, tile.block_n)),
        {"g_ptr": g, "weight_ptr": weight, "mask_ptr": out if mask is None else mask, "direction_ptr": direction,
         "out_ptr": out, "rows_value_ptr": rows_value, "value_ptr": value,
         "loss_scale_ptr": value if loss_scale is None else loss_scale, "counter_ptr": counter, "n_rows": n_rows,
         "n": n, "k": k, "stride_g": g.stride(0), "stride_weight": weight.stride(0),
         "stride_mask": 0 if mask is None else mask.stride(0), "stride_direction": direction.stride(0),
         "stride_out": out.stride(0), "NORM": kind == "norm", "WEIGHT": float(penalty_weight),
         "TARGET": float(target), "SCALE": float(scale), "TINY": torch.finfo(wide).tiny, "HAS_MASK": mask is not None,
         "HAS_LOSS_SCALE": loss_scale is not None, "ACTIVATION": activation, "SLOPE": float(slope),
         "PRECISION": input_precision(weight.dtype, precision), "ACC": accumulator(weight.dtype),
         "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_ROWS": _BLOCK_ROWS},
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def launches(dtype: torch.dtype) -> list[Launch]:
    """Every shipped config, and both kinds, for the compilation ahead of time."""
    g, direction, weight, out = (torch.empty(64, 64, dtype=dtype) for _ in range(4))
    wide = torch.empty(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    counter = torch.zeros(1, dtype=torch.int32)

    def launch(kind: str, tile: configs.Config, precision: str = "tf32") -> Launch:
        return penalty_launch(
            g, direction, weight, out, mask=out, activation="leaky-relu", slope=0.2, kind=kind, penalty_weight=10.0,
            value=wide[0], rows_value=wide, counter=counter, loss_scale=wide[1], precision=precision, tile=tile,
        )  # fmt: skip

    tiles = configs.shipped("linear_penalty", dtype)
    launches = [launch("norm", tile) for tile in tiles] + [launch("square", tiles[-1])]
    return launches + ([launch("norm", tile, "ieee") for tile in tiles] if dtype == torch.float32 else [])
