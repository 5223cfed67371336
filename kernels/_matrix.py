"""What the matrix kernels share: the loop over the sum, and the checks of what is multiplied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan.kernels._launch import check, check_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTERPRETED = (torch.float16, torch.float32, torch.float64)  # its products of bf16 are those of the bits
ACTIVATIONS = ("identity", "leaky-relu", "tanh", "sigmoid")
PRECISIONS = ("ieee", "tf32")


@triton.jit
def accumulate(
    acc, x_ptr, weight_ptr, rows, cols, m, n, k, stride_x, stride_weight,
    X_TRANSPOSED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the tile [rows, cols] of X B, with X ``[m, k]`` (stored ``[k, m]`` if X_TRANSPOSED) and B ``[k, n]``:
    stored so if TRANSPOSED, else as weights are, ``[n, k]``; rows and cols are int64."""
    inner = tl.arange(0, BLOCK_K)
    for start in range(0, k, BLOCK_K):
        ks = (start + inner).to(tl.int64)
        if X_TRANSPOSED:
            x_at = x_ptr + ks[None, :] * stride_x + rows[:, None]
        else:
            x_at = x_ptr + rows[:, None] * stride_x + ks[None, :]
        if TRANSPOSED:
            weight_at = weight_ptr + ks[:, None] * stride_weight + cols[None, :]
        else:
            weight_at = weight_ptr + cols[None, :] * stride_weight + ks[:, None]
        x = tl.load(x_at, mask=(rows < m)[:, None] & (ks < k)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_at, mask=(ks < k)[:, None] & (cols < n)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


def rows_of(op: str, name: str, t: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Check a matrix whose rows are contiguous, each row by itself."""
    check(t.ndim == 2, op, f"{name} has shape {tuple(t.shape)}, expected two dimensions")
    check(shape is None or t.shape == shape, op, f"{name} has shape {tuple(t.shape)}, expected {shape}")
    check(
        t.shape[1] <= 1 or t.stride(1) == 1, op, f"{name} has strides {t.stride()}, expected rows that are contiguous"
    )


def check_operands(op: str, x: torch.Tensor, weight: torch.Tensor, precision: str) -> None:
    """Check the factors of a product ``[..] x [..]`` of two matrices."""
    rows_of(op, "x", x)
    rows_of(op, "weight", weight)
    check_dtype(op, "x", x, DTYPES)
    check_dtype(op, "weight", weight, DTYPES)
    wide = (x.dtype == torch.float64) == (weight.dtype == torch.float64)
    check(wide, op, f"x has dtype {x.dtype} and weight {weight.dtype}, expected both or neither torch.float64")
    check(precision in PRECISIONS, op, f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


def check_activation(op: str, activation: str, slope: float) -> None:
    check(activation in ACTIVATIONS, op, f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    check(activation != "leaky-relu" or slope >= 0, op, f"slope is {slope}, expected >= 0")


def arch_of(t: torch.Tensor) -> int | None:
    """Compute capability of the GPU that holds a tensor, as 90 for 9.0."""
    if not t.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


def input_precision(dtype: torch.dtype, precision: str) -> str:
    """Of ``tl.dot``: only fp32 operands have a choice."""
    return precision if dtype == torch.float32 else "ieee"
