"""A gradient penalty and its derivative in one pass over the gradients.

With g_i all elements of row i, |g_i| = sqrt(sum + tiny), whose derivative at 0 is 0, and means over the B rows:

    norm    value = mean w (|g| - t)^2    factor_i = 2 w / B (1 - t / |g_i|)
    square  value = mean w |g|^2          factor_i = 2 w / B

The value's derivative, the direction, is factor_i g_i. A closed-form update takes it from the launch. The op has the
factors as outputs: its first derivative is a product with them, which is differentiable through g and through their
own derivative, with u = g / |g|:

    norm    d factor_i / d g_i = 2 w / B t / |g_i|^2 u_i
    square  d factor_i / d g_i = 0

Every program sums one row; the last to finish adds up the rows, in order.

Sources: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028; Mescheder et al. 2018,
"Which Training Methods for GANs do actually Converge?", arXiv:1801.04406. The derivatives are our own.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.backend import Backend, resolve
from fastgan.kernels._device import last_arrival
from fastgan.kernels._launch import Launch, accumulator, check, check_dtype
from fastgan.kernels._library import register
from fastgan.kernels._spec import OpSpec, Sample

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Kind = Literal["norm", "square"]

# ---- reference


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(t: torch.Tensor) -> torch.Tensor:
    """``[B, ...]`` as ``[B, n]`` in the type that is computed in."""
    return t.to(_wide(t.dtype)).unsqueeze(1).flatten(1)


def _length(rows: torch.Tensor) -> torch.Tensor:
    return (rows.square().sum(1) + torch.finfo(rows.dtype).tiny).sqrt()


def gradient_penalty_reference(
    g: torch.Tensor, *, kind: Kind = "norm", weight: float, target: float = 1.0
) -> torch.Tensor:
    """The formula above in PyTorch ops."""
    rows = _rows(g)
    values = (_length(rows) - target).square() if kind == "norm" else rows.square().sum(1)
    return (weight * values).mean()


# ---- kernels


@triton.jit
def _gradient_penalty_fwd_kernel(
    g_ptr, direction_ptr, value_ptr, rows_value_ptr, counter_ptr, loss_scale_ptr,
    n_rows, n_cols,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, TARGET: tl.constexpr, SCALE: tl.constexpr, TINY: tl.constexpr,
    FACTOR: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], ACC)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        g = tl.load(g_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0).to(ACC)
        squares += g * g
    squared = tl.sum(squares)
    if NORM:
        length = tl.sqrt(squared + TINY)
        if squared.dtype == tl.float32:
            length = tl.sqrt_rn(squared + TINY)  # the other is an approximation there
        value = WEIGHT * (length - TARGET) * (length - TARGET)
        factor = 2 * WEIGHT * SCALE * (length - TARGET) / length / n_rows
    else:
        value = WEIGHT * squared
        factor = tl.full([], 2 * WEIGHT * SCALE, ACC) / n_rows
    if SCALED:
        factor *= tl.load(loss_scale_ptr).to(ACC)
    if FACTOR:
        tl.store(direction_ptr + row, factor.to(direction_ptr.dtype.element_ty))
    else:
        for start in range(0, n_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)  # [BLOCK]
            offs, mask = row * n_cols + cols, cols < n_cols
            r = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC) * factor
            if ADD:
                r += tl.load(direction_ptr + offs, mask=mask, other=0.0).to(ACC)
            tl.store(direction_ptr + offs, r.to(direction_ptr.dtype.element_ty), mask=mask)
    if DEPENDENT:
        gdc_launch_dependents()
    tl.store(rows_value_ptr + row, value.to(rows_value_ptr.dtype.element_ty))
    if last_arrival(counter_ptr, n_rows):
        values = tl.zeros([BLOCK], ACC)
        for start in range(0, n_rows, BLOCK):
            rows = start + tl.arange(0, BLOCK)  # [BLOCK]
            values += tl.load(rows_value_ptr + rows, mask=rows < n_rows, other=0.0, cache_modifier=".cg").to(ACC)
        tl.store(value_ptr, (tl.sum(values) / n_rows).to(value_ptr.dtype.element_ty))
        tl.store(counter_ptr, 0)


# ---- launchers

_BLOCK = 512  # not tuned: replace with the measured choice and name the bench that shows it


def gradient_penalty_launch(
    g: torch.Tensor,
    direction: torch.Tensor,
    value: torch.Tensor,
    rows_value: torch.Tensor,
    counter: torch.Tensor,
    *,
    kind: str,
    weight: float,
    target: float,
    scale: float = 1.0,
    add: bool = False,
    loss_scale: torch.Tensor | None = None,
    factor: bool = False,
) -> Launch:
    """A penalty's mean ``value`` and ``scale * loss_scale`` times its derivative to ``g``, which ``direction`` takes.

    Args:
        g: ``[B, ...]``, dense with rows outermost, ``B >= 1``.
        direction: as ``g``, of any dtype; may be ``g``.
        value: 0-dim, the mean before any scale.
        rows_value: ``[B]``, written.
        counter: int32, one element, 0 before and after.
        kind, weight, target: see :func:`gradient_penalty`.
        scale: factor of the direction.
        add: to what ``direction`` holds.
        loss_scale: 0-dim factor of the direction that is read when the launch runs.
        factor: ``direction`` is ``[B]`` and takes the factors that make the direction of ``g``, not added to anything.
    """
    finfo = torch.finfo(_wide(g.dtype))
    return Launch(
        _gradient_penalty_fwd_kernel, (len(g),),
        {"g_ptr": g, "direction_ptr": direction, "value_ptr": value, "rows_value_ptr": rows_value,
         "counter_ptr": counter, "loss_scale_ptr": value if loss_scale is None else loss_scale, "n_rows": len(g),
         "n_cols": math.prod(g.shape[1:]), "NORM": kind == "norm", "WEIGHT": float(weight), "TARGET": float(target),
         "SCALE": float(scale), "TINY": finfo.tiny, "FACTOR": factor, "ADD": add, "SCALED": loss_scale is not None,
         "ACC": accumulator(g.dtype), "BLOCK": _BLOCK},
    )  # fmt: skip


def _forward(g: torch.Tensor, kind: Kind, weight: float, target: float) -> tuple[torch.Tensor, torch.Tensor]:
    value, factors = _fake(g, kind, weight, target)
    value.fill_(math.nan)  # of no rows, as torch's mean is
    counter = torch.zeros(1, dtype=torch.int32, device=g.device)
    gradient_penalty_launch(
        g.contiguous(), factors, value, torch.empty_like(factors), counter, kind=kind, weight=weight, target=target,
        factor=True,
    )()  # fmt: skip
    return value, factors


def _fake(g: torch.Tensor, kind: Kind, weight: float, target: float) -> tuple[torch.Tensor, torch.Tensor]:
    return g.new_empty((), dtype=_wide(g.dtype)), g.new_empty(g.shape[0], dtype=_wide(g.dtype))


# ---- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, ctx.kind, ctx.weight, ctx.target = inputs
    ctx.save_for_backward(g, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dvalue: torch.Tensor | None, dfactors: torch.Tensor | None
) -> tuple[torch.Tensor | None, None, None, None]:
    g, factors = ctx.saved_tensors
    rows, dg = _rows(g), None
    if dvalue is not None:
        dg = (dvalue * factors).unsqueeze(1) * rows  # differentiable: the factors are an output of this op
    if dfactors is not None and ctx.kind == "norm":
        length = _length(rows)
        along = dfactors / length * (2 * ctx.weight * ctx.target / len(g)) / length  # in this order finite near 0
        second = along.unsqueeze(1) * (rows / length.unsqueeze(1))
        dg = second if dg is None else dg + second
    return None if dg is None else dg.view(g.shape).to(g.dtype), None, None, None


_FORWARD = register(
    "gradient_penalty(Tensor g, str kind, float weight, float target) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _save,
    _differentiate,
)


# ---- public


def gradient_penalty(
    g: torch.Tensor,
    *,
    kind: Kind = "norm",
    weight: float,
    target: float = 1.0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Mean penalty on the length of each row.

    Args:
        g: ``[B, ...]``, gradients of each sample's logit; fp16, bf16, fp32 or fp64. Copied if not contiguous.
        kind: ``"norm"`` for ``weight * (|g| - target)^2`` (WGAN-GP, DRAGAN), ``"square"`` for ``weight * |g|^2`` (R1
            and R2, with ``weight = gamma / 2``).
        weight: factor, ``>= 0``.
        target: length without penalty, ``>= 0``; not read where ``kind`` is ``"square"``.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        0-dim, fp32 (fp64 for fp64), computed in that type; NaN where ``B`` is 0. Differentiable to any order.

    Raises:
        ValueError: a dtype or value is none of the above.
    """
    op = "gradient_penalty"
    check_dtype(op, "g", g, DTYPES)
    check(g.ndim >= 1, op, "g is a scalar, expected [B, ...]")
    check(kind in get_args(Kind), op, f"kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    check(0 <= weight < math.inf, op, f"weight is {weight}, expected a finite weight >= 0")
    check(0 <= target < math.inf, op, f"target is {target}, expected a finite target >= 0")
    if resolve(op, backend, g) == "reference":
        return gradient_penalty_reference(g, kind=kind, weight=weight, target=target)
    value, _ = _FORWARD(g, kind, weight, target)
    return value  # type: ignore[no-any-return]


# ---- spec


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Most rows have a power of 2 as their length: sums are exact in every order, also where their terms cancel."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, *shape: int) -> tuple[torch.Tensor]:
        columns = math.prod(shape)
        kept = 16 if columns >= 16 else 4 if columns >= 4 else 1
        g = torch.zeros(n, columns)
        for row in g:
            at = torch.randperm(columns, generator=generator)[:kept]
            signs = torch.randint(0, 2, (kept,), generator=generator) * 2 - 1
            row[at] = signs * 2.0 ** int(torch.randint(-2, 2, (), generator=generator))
        return (g.view(n, *shape).to(device, dtype),)

    def randn(*shape: int) -> tuple[torch.Tensor]:
        return (torch.randn(shape, generator=generator).to(device, dtype),)

    (columns,) = randn(9, 5)
    return [
        Sample("norm", rows(3, 7), {"weight": 1.5}),
        Sample("square", rows(5, 2, 3, 7), {"kind": "square", "weight": 2.5}),
        Sample("target", rows(33, 31), {"weight": 16.5, "target": 0.0}),
        Sample("wide", rows(2, 1025), {"weight": 1.0, "target": 3.0}),
        Sample("random", randn(3, 7), {"weight": 10.0}),
        Sample("one-row", randn(1, 2), {"kind": "square", "weight": 1.0}),
        Sample("transposed", (columns.t(),), {"weight": 10.0}),
        Sample("scalars", rows(5), {"weight": 1.0, "target": 0.5}),
        Sample("no-columns", (torch.zeros(3, 0, device=device, dtype=dtype),), {"weight": 10.0}),
    ]


def _launches(dtype: torch.dtype) -> list[Launch]:
    wide = _wide(dtype)
    g, value, rows = torch.empty(64, 256, dtype=dtype), torch.empty((), dtype=wide), torch.empty(64, dtype=wide)
    counter = torch.zeros(1, dtype=torch.int32)
    variants: list[dict[str, Any]] = [{"direction": g}, {"direction": rows, "factor": True}]
    if dtype == torch.float32:
        variants.append({"direction": g, "add": True})
    if dtype == torch.float16:
        variants.append({"direction": g, "loss_scale": torch.empty(())})
    return [
        gradient_penalty_launch(
            g, value=value, rows_value=rows, counter=counter, kind=kind, weight=10.0, target=1.0, **variant
        )
        for kind in get_args(Kind)
        for variant in variants
    ]


def _bytes_moved(s: Sample) -> int:
    g = s.inputs[0]
    assert g is not None
    return g.numel() * g.element_size()


SPEC = OpSpec(
    name="gradient_penalty",
    op=gradient_penalty,
    reference=gradient_penalty_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=2,
    bytes_moved=_bytes_moved,
)
