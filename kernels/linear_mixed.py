"""The first layer of real samples, fake samples and the samples between them, in one launch.

    x^_i = alpha_i x_i + (1 - alpha_i) x~_i        z(x^_i) = alpha_i z(x_i) + (1 - alpha_i) z(x~_i),  z = x W^T + b

The layer is affine, hence interpolating costs no product: x^ is never formed. A program makes the same tile of all
three, with two accumulators and one pass over the weights. The bias enters once in each, since alpha + (1 - alpha) = 1.

Launch only: :func:`fastgan.kernels.linear_lrelu` is the op. Source: see ``fastgan/rules.py``; our own derivation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.kernels import configs
from fastgan.kernels._device import activate, place_of
from fastgan.kernels._launch import Launch, accumulator, check
from fastgan.kernels._matrix import arch_of, check_activation, check_operands, input_precision, rows_of

# ---- kernels


@triton.jit
def _linear_mixed_kernel(
    x_ptr, weight_ptr, bias_ptr, alpha_ptr, y_ptr,
    n_rows, n, k, first, second, mixed, stride_x, stride_weight, stride_y,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    rows = place_of(tile, 0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # of each of the three parts
    cols = place_of(tile, 1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask, inner = (rows < n_rows)[:, None], (cols < n)[None, :], tl.arange(0, BLOCK_K)
    a = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    b = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, k, BLOCK_K):
        ks = (start + inner).to(tl.int64)
        k_mask = ks < k
        weight_at = weight_ptr + cols[None, :] * stride_weight + ks[:, None]
        weight = tl.load(weight_at, mask=k_mask[:, None] & col_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        x_mask = row_mask & k_mask[None, :]
        x = tl.load(x_ptr + (rows + first)[:, None] * stride_x + ks[None, :], mask=x_mask, other=0.0)
        a = tl.dot(x.to(weight.dtype), weight, a, input_precision=PRECISION, out_dtype=ACC)
        x = tl.load(x_ptr + (rows + second)[:, None] * stride_x + ks[None, :], mask=x_mask, other=0.0)
        b = tl.dot(x.to(weight.dtype), weight, b, input_precision=PRECISION, out_dtype=ACC)
    if DEPENDENT:
        gdc_launch_dependents()
    alpha = tl.load(alpha_ptr + rows, mask=rows < n_rows, other=0.0).to(ACC)[:, None]
    c = alpha * a + (1 - alpha) * b
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(ACC)[None, :]
        a, b, c = a + bias, b + bias, c + bias
    at, mask = y_ptr + rows[:, None] * stride_y + cols[None, :], row_mask & col_mask
    to = y_ptr.dtype.element_ty
    stride = tl.full([], stride_y, tl.int64)
    tl.store(at + first * stride, activate(a, ACTIVATION, SLOPE).to(to), mask=mask)
    tl.store(at + second * stride, activate(b, ACTIVATION, SLOPE).to(to), mask=mask)
    tl.store(at + mixed * stride, activate(c, ACTIVATION, SLOPE).to(to), mask=mask)


# ---- launchers


def mixed_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    alpha: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
    first: int,
    second: int,
    mixed: int,
    precision: str = "ieee",
    tile: configs.Config | None = None,
) -> Launch:
    """The launch that writes the layer of two parts of ``x``, and of the samples between them.

    Args:
        x: ``[2 n, K]``: part one in rows ``[first, first + n)``, part two in ``[second, second + n)``; fp16, bf16, fp32
            or fp64. Converted to ``weight``'s dtype on the way.
        weight: ``[N, K]``.
        y: ``[>= mixed + n, N]``; the rows of the two parts and ``[mixed, mixed + n)`` are written. Must not overlap x.
        alpha: ``[n]``, contiguous, the share of part one in ``[0, 1]``.
        bias: ``[N]``, contiguous, of any of the dtypes.
        activation, slope, precision, tile: as for :func:`fastgan.kernels.linear_lrelu.linear_launch`.
        first, second: 0 and ``n``, or ``n`` and 0.
        mixed: ``>= 2 n``.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "linear_mixed"
    check_operands(op, x, weight, precision)
    check_activation(op, activation, slope)
    (n, k), n_rows = weight.shape, len(alpha)
    check(
        alpha.ndim == 1 and alpha.is_contiguous(), op, f"alpha has shape {tuple(alpha.shape)}, expected one dimension"
    )
    check(x.shape == (2 * n_rows, k), op, f"x has shape {tuple(x.shape)}, expected {(2 * n_rows, k)}")
    check({first, second} == {0, n_rows}, op, f"first is {first} and second {second}, expected 0 and {n_rows}")
    check(mixed >= 2 * n_rows, op, f"mixed is {mixed}, expected >= {2 * n_rows}")
    rows_of(op, "y", y)
    shape = tuple(y.shape)
    check(len(y) >= mixed + n_rows and shape[1] == n, op, f"y has shape {shape}, expected (>= {mixed + n_rows}, {n})")
    if bias is not None:
        check(bias.shape == (n,), op, f"bias has shape {tuple(bias.shape)}, expected ({n},)")
        check(bias.is_contiguous(), op, "bias is not contiguous")
    tile = tile or configs.config(op, n_rows, n, k, weight.dtype, arch_of(y))
    return Launch(
        _linear_mixed_kernel, (triton.cdiv(n_rows, tile.block_m), triton.cdiv(n, tile.block_n)),
        {"x_ptr": x, "weight_ptr": weight, "bias_ptr": y if bias is None else bias, "alpha_ptr": alpha, "y_ptr": y,
         "n_rows": n_rows, "n": n, "k": k, "first": first, "second": second, "mixed": mixed, "stride_x": x.stride(0),
         "stride_weight": weight.stride(0), "stride_y": y.stride(0), "HAS_BIAS": bias is not None,
         "ACTIVATION": activation, "SLOPE": float(slope), "PRECISION": input_precision(weight.dtype, precision),
         "ACC": accumulator(weight.dtype), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def launches(dtype: torch.dtype) -> list[Launch]:
    """Every shipped config, for the compilation ahead of time."""
    x, weight, y = (torch.empty(rows, 64, dtype=dtype) for rows in (128, 64, 192))
    wide = torch.empty(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = {"bias": wide, "activation": "leaky-relu", "slope": 0.2, "first": 0, "second": 64, "mixed": 128}
    tiles = configs.shipped("linear_mixed", dtype)
    precisions = ("tf32", "ieee") if dtype == torch.float32 else ("ieee",)
    return [
        mixed_launch(x, weight, y, wide, **rest, precision=precision, tile=tile)  # type: ignore[arg-type]
        for precision in precisions
        for tile in tiles
    ]
