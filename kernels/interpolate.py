"""Samples on the lines between two batches, each at a place of its own.

    y_i = alpha_i a_i + (1 - alpha_i) b_i

WGAN-GP takes its penalty there. As an affine layer maps lines to lines, the same op mixes what a first layer without
activation makes of ``a`` and ``b``. Nothing is saved but the inputs; the derivatives, needed only where somebody trains
through the mix, are bilinear, and PyTorch ops give them to any order.

Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.backend import Backend, resolve
from fastgan.kernels._launch import Launch, accumulator, check, check_dtype, grid_1d
from fastgan.kernels._library import register
from fastgan.kernels._spec import OpSpec, Sample

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# ---- reference


def _column(alpha: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return alpha.view(-1, *[1] * (like.ndim - 1))


def interpolate_reference(alpha: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The formula above in PyTorch ops."""
    weight = _column(alpha, a)
    return (weight * a + (1 - weight) * b).to(a.dtype)


# ---- kernels


@triton.jit
def _interpolate_fwd_kernel(
    alpha_ptr, a_ptr, b_ptr, y_ptr,
    n_elements, n_cols,
    ACC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < n_elements
    alpha = tl.load(alpha_ptr + offs // n_cols, mask=mask, other=0.0).to(ACC)
    a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(ACC)
    b = tl.load(b_ptr + offs, mask=mask, other=0.0).to(ACC)
    y = alpha * a + (1 - alpha) * b
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- launchers

_BLOCK = 1024  # not tuned: replace with the measured choice and name the bench that shows it


def interpolate_launch(alpha: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Launch:
    """``out[i] = alpha[i] a[i] + (1 - alpha[i]) b[i]``.

    ``a``, ``b`` and ``out``, which may be one of them, are dense with the same strides and rows outermost; ``alpha`` is
    contiguous and may have another dtype.
    """
    return Launch(
        _interpolate_fwd_kernel, grid_1d(a.numel(), _BLOCK),
        {"alpha_ptr": alpha, "a_ptr": a, "b_ptr": b, "y_ptr": out, "n_elements": a.numel(),
         "n_cols": a[0].numel() if len(a) else 1, "ACC": accumulator(a.dtype), "BLOCK": _BLOCK},
    )  # fmt: skip


def _forward(alpha: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    interpolate_launch(alpha.contiguous(), a, b, y)()
    return y


# ---- autograd


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    alpha, a, b = ctx.saved_tensors
    weight, dalpha, da, db = _column(alpha, a), None, None, None
    if ctx.needs_input_grad[0]:
        wide = torch.promote_types(alpha.dtype, a.dtype)
        dalpha = (dy.to(wide) * (a.to(wide) - b.to(wide))).unsqueeze(1).flatten(1).sum(1).to(alpha.dtype)
    if ctx.needs_input_grad[1]:
        da = (weight * dy).to(a.dtype)
    if ctx.needs_input_grad[2]:
        db = ((1 - weight) * dy).to(b.dtype)
    return dalpha, da, db


_FORWARD = register(
    "interpolate(Tensor alpha, Tensor a, Tensor b) -> Tensor",
    _forward,
    lambda alpha, a, b: torch.empty_like(a, memory_format=torch.contiguous_format),
    _save,
    _differentiate,
)


# ---- public


def interpolate(
    alpha: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, backend: Backend | None = None
) -> torch.Tensor:
    """Mix each row of ``a`` with that of ``b``.

    Args:
        alpha: ``[B]``, the share of ``a``; ``a``'s dtype or fp32.
        a, b: ``[B, ...]`` of one shape and dtype; fp16, bf16, fp32 or fp64. Copied if not contiguous.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        ``[B, ...]``, contiguous, ``a``'s dtype. Computed in fp32 (fp64 for fp64). Differentiable to any order, in
        ``alpha`` too.

    Raises:
        ValueError: a shape or dtype is none of the above.
    """
    op = "interpolate"
    check_dtype(op, "a", a, DTYPES)
    check(a.ndim >= 1, op, "a is a scalar, expected [B, ...]")
    check(b.shape == a.shape, op, f"b has shape {tuple(b.shape)}, expected {tuple(a.shape)}")
    check(b.dtype == a.dtype, op, f"b has dtype {b.dtype}, expected {a.dtype}")
    check(alpha.shape == a.shape[:1], op, f"alpha has shape {tuple(alpha.shape)}, expected ({a.shape[0]},)")
    check_dtype(op, "alpha", alpha, (a.dtype,) if a.dtype == torch.float32 else (a.dtype, torch.float32))
    if resolve(op, backend, alpha, a, b) == "reference":
        return interpolate_reference(alpha, a, b)
    return _FORWARD(alpha, a, b)  # type: ignore[no-any-return]


# ---- spec


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    g = torch.Generator(device=device).manual_seed(0)

    def sample(name: str, *shape: int) -> Sample:
        alpha = torch.rand(shape[:1], generator=g, device=device).to(dtype)
        a, b = (torch.randn(shape, generator=g, device=device).to(dtype) for _ in range(2))
        return Sample(name, (alpha, a, b))

    images, rows = sample("images", 3, 2, 5, 7), sample("transposed", 33, 9)
    alpha, a, b = rows.inputs
    assert a is not None
    return [
        sample("row", 1, 7),
        images,
        sample("odd", 37, 31),
        Sample("transposed", (alpha, a.t().contiguous().t(), b)),
        sample("scalars", 5),
        sample("empty", 0, 4),
    ]


def _launches(dtype: torch.dtype) -> list[Launch]:
    a = torch.empty(64, 256, dtype=dtype)
    alphas = [torch.empty(64, dtype=d) for d in dict.fromkeys((dtype, torch.float32))]
    return [interpolate_launch(alpha, a, a, a) for alpha in alphas]


def _bytes_moved(s: Sample) -> int:
    alpha, a, _ = s.inputs
    assert alpha is not None
    assert a is not None
    return 3 * a.numel() * a.element_size() + alpha.numel() * alpha.element_size()


SPEC = OpSpec(
    name="interpolate",
    op=interpolate,
    reference=interpolate_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=2,
    bytes_moved=_bytes_moved,
)
