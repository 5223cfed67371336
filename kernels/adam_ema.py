"""Adam or AdamW, the average, the low-precision copy and the non-finite guard over flat parameters, in one launch.

    m += (g - m)(1 - b1);  v = b2 v + (1 - b2) g^2;  p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Skipped as a whole where the sum of squared gradients is not finite; then, skipped or not, clamp, average, copy,
gradients to zero. The sum comes as partials from the launch that made the gradients, or from one of its own before.
Each program adds the partials again, in one order, and works off blocks that lie in one parameter each; the last one
to arrive writes the counts, since the others read them. No derivatives, and in place: ``adam_ema`` itself, one tensor
at a time and functional, is what checks call.

Sources: Kingma and Ba 2015 (arXiv:1412.6980); Loshchilov and Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.backend import Backend, resolve
from fastgan.kernels._adam import (
    Updated,
    adam_element,
    average_weight,
    bias_corrections,
    clamped,
    conclude,
    followed,
    is_finite,
    learning_rate,
    settings_of,
    sum_of,
)
from fastgan.kernels._device import grid_size, last_arrival, place_of
from fastgan.kernels._launch import Launch, check, check_dtype
from fastgan.kernels._spec import OpSpec, Sample

DTYPES = (torch.float32, torch.float64)

BLOCK = 512  # elements, one vector of 16 bytes per thread in fp32; not tuned: bench.gpu's tile sweep is to choose it
PAD = 16  # elements: every parameter's memory extends to a multiple of it, and what is beyond the parameter is 0
_PROGRAMS = 1024  # at most: each adds all partials, so there are only as many as a GPU runs at once
_SQUARES_PROGRAMS = 512

# ---- reference


def adam_ema_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> torch.Tensor:
    """The formula above in PyTorch ops."""
    t = step.double()
    rate, root = lr / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()
    g = grad + weight_decay * param if weight_decay and not decoupled else grad
    m = exp_avg + (g - exp_avg) * (1 - betas[0])
    v = betas[1] * exp_avg_sq + (1 - betas[1]) * g * g
    change = rate.to(param.dtype) * m / (v.sqrt() * root.to(param.dtype) + eps)
    if weight_decay and decoupled:
        change = change + lr * weight_decay * param
    return torch.where(torch.isfinite((grad.double() ** 2).sum().to(grad.dtype)), param - change, param)


# ---- kernels


@triton.jit
def _squares_kernel(
    grad_ptr,
    blocks_ptr,
    active_ptr,
    squares_ptr,
    n_blocks,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
    tile=None,
):
    if DEPENDENT:
        gdc_wait()
    program = place_of(tile, 0)
    sums = tl.zeros([BLOCK], tl.float64)
    for k in range(program, n_blocks, grid_size(tile, 0)):
        begin = tl.multiple_of(tl.load(blocks_ptr + 3 * k), 16)
        length = tl.load(blocks_ptr + 3 * k + 1)
        active = tl.load(active_ptr + tl.load(blocks_ptr + 3 * k + 2)) != 0
        offs = tl.arange(0, BLOCK)  # [BLOCK]
        # what has no gradient is not read: it may hold anything
        g = tl.load(grad_ptr + begin + offs, mask=(offs < (length + 15) // 16 * 16) & active, other=0.0)
        g = tl.where(offs < length, g, 0.0).to(tl.float64)
        sums += g * g
    if DEPENDENT:
        gdc_launch_dependents()
    tl.store(squares_ptr + program, tl.sum(sums, 0))


@triton.jit
def _adam_ema_kernel(
    flat_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, low_ptr,
    blocks_ptr, squares_ptr, steps_ptr, active_ptr, update_ptr, images_ptr, averaged_ptr, skipped_ptr, grad_norm_ptr,
    counter_ptr, settings_ptr, scale_ptr, good_steps_ptr, count_a_ptr, count_b_ptr, count_c_ptr, values_ptr, ring_ptr,
    slot_ptr,
    n_blocks, n_squares, n_params, n_values, n_slots, add_a, add_b, add_c,
    DECAY: tl.constexpr, SCHEDULE: tl.constexpr, WARMUP: tl.constexpr, FOLLOWS: tl.constexpr, CLIP: tl.constexpr,
    LOW: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr, N_COUNTS: tl.constexpr, RING: tl.constexpr,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    T: tl.constexpr = flat_ptr.dtype.element_ty
    total = sum_of(squares_ptr, n_squares, 256)
    inverse = tl.full([], 1.0, tl.float64)
    if SCALED:
        inverse = 1 / tl.load(scale_ptr).to(tl.float64)
        total *= inverse * inverse
    finite = is_finite(total, settings_ptr)
    lr = learning_rate(settings_ptr, update_ptr, SCHEDULE, WARMUP)
    weight = average_weight(settings_ptr, images_ptr, averaged_ptr, FOLLOWS)
    for k in range(place_of(tile, 0), n_blocks, grid_size(tile, 0)):
        begin = tl.multiple_of(tl.load(blocks_ptr + 3 * k), 16)
        length, owner = tl.load(blocks_ptr + 3 * k + 1), tl.load(blocks_ptr + 3 * k + 2)
        offs = tl.arange(0, BLOCK)  # [BLOCK]
        at = begin + offs
        inside = offs < (length + 15) // 16 * 16  # whole vectors, up to 15 elements of padding
        real = offs < length
        old = tl.load(flat_ptr + at, mask=inside, other=0.0)
        active = inside & (tl.load(active_ptr + owner) != 0)  # not goes: loads do not wait for the sum
        g = tl.load(grad_ptr + at, mask=active, other=0.0)
        m = tl.load(exp_avg_ptr + at, mask=active, other=0.0)
        v = tl.load(exp_avg_sq_ptr + at, mask=active, other=0.0)
        goes = active & finite
        g = tl.where(goes & real, g, 0.0)
        if SCALED:
            g = g * inverse.to(T)
        rate, root = bias_corrections(settings_ptr, tl.load(steps_ptr + owner).to(tl.float64) + 1, lr)
        new, m, v = adam_element(old, g, m, v, rate, root, lr, settings_ptr, DECAY, True)
        tl.store(exp_avg_ptr + at, tl.where(real, m, 0.0), mask=goes)
        tl.store(exp_avg_sq_ptr + at, tl.where(real, v, 0.0), mask=goes)
        p = tl.where(real, tl.where(goes, new, old), 0.0)  # 0 / (0 + eps) of the padding is not a number where eps is 0
        if CLIP:
            p = clamped(p, settings_ptr)
        tl.store(flat_ptr + at, p, mask=inside)
        if FOLLOWS != "none":
            average = tl.load(average_ptr + at, mask=inside, other=0.0)
            tl.store(average_ptr + at, followed(average, p, weight), mask=inside)
        if LOW:
            tl.store(low_ptr + at, p.to(tl.float32).to(low_ptr.dtype.element_ty), mask=inside)  # in torch's two steps
        if ZERO:
            tl.store(grad_ptr + at, tl.zeros([BLOCK], T), mask=inside)
    if DEPENDENT:
        gdc_launch_dependents()
    if last_arrival(counter_ptr, grid_size(tile, 0)):
        conclude(
            total, finite, settings_ptr, steps_ptr, active_ptr, images_ptr, averaged_ptr, skipped_ptr, grad_norm_ptr,
            scale_ptr, good_steps_ptr, count_a_ptr, count_b_ptr, count_c_ptr, add_a, add_b, add_c, values_ptr,
            ring_ptr, slot_ptr, n_params, n_values, n_slots, FOLLOWS, SCALED, N_COUNTS, RING, 128,
        )  # fmt: skip
        tl.store(counter_ptr, 0)


# ---- launchers


def blocks_of(offsets: list[int], sizes: list[int], device: torch.device) -> torch.Tensor:
    """Parts of parameters of at most ``BLOCK`` elements, int64 ``[n, 3]`` of (begin, length, parameter).

    Args:
        offsets: where each parameter begins, multiples of ``PAD``.
        sizes: of each parameter.
        device: of the parameters.
    """
    blocks = [
        (offset + i, min(BLOCK, size - i), k)
        for k, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
        for i in range(0, size, BLOCK)
    ]
    return torch.tensor(blocks, dtype=torch.int64, device=device).view(-1, 3)


def squares_of(blocks: torch.Tensor) -> torch.Tensor:
    """Memory for the partials of :func:`squares_launch`, fp64."""
    return torch.zeros(min(max(len(blocks), 1), _SQUARES_PROGRAMS), dtype=torch.float64, device=blocks.device)


def squares_launch(grad: torch.Tensor, blocks: torch.Tensor, active: torch.Tensor, squares: torch.Tensor) -> Launch:
    """Sums of squared gradients of active parameters, one per program: what :func:`adam_ema_launch` guards by.

    Args:
        grad: ``[size]``, fp32 or fp64.
        blocks: of :func:`blocks_of`.
        active: uint8 ``[n]``, which parameters have a gradient; the others' is not read.
        squares: fp64, of :func:`squares_of`.
    """
    return Launch(
        _squares_kernel, (len(squares),),
        {"grad_ptr": grad, "blocks_ptr": blocks, "active_ptr": active, "squares_ptr": squares,
         "n_blocks": len(blocks), "BLOCK": BLOCK},
        num_stages=1,
    )  # fmt: skip


def adam_ema_launch(updated: Updated, blocks: torch.Tensor, squares: torch.Tensor) -> Launch:
    """One update of everything, and what is counted with it.

    Args:
        updated: the tensors.
        blocks: of :func:`blocks_of`.
        squares: partial sums ``[any]`` of the squares of active gradients as they lie in ``updated.grad``, fp64 or
            fp32; of :func:`squares_launch`, or of the launch that made the gradients.
    """
    op = "adam_ema"
    for name in ("flat", "grad", "exp_avg", "exp_avg_sq", "average"):
        t = getattr(updated, name)
        if t is not None:
            check_dtype(op, name, t, (updated.flat.dtype,))
            check(
                t.shape == updated.flat.shape,
                op,
                f"{name} has shape {tuple(t.shape)}, flat {tuple(updated.flat.shape)}",
            )
    check_dtype(op, "flat", updated.flat, DTYPES)
    return Launch(
        _adam_ema_kernel, (min(max(len(blocks), 1), _PROGRAMS),),
        {**updated.arguments(), "grad_ptr": updated.grad, "blocks_ptr": blocks, "squares_ptr": squares,
         "n_blocks": len(blocks), "n_squares": squares.numel(), "ZERO": updated.zero_grad, "BLOCK": BLOCK},
        num_stages=1,
    )  # fmt: skip


# ---- public


def adam_ema(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor:
    """One update of one tensor by Adam or AdamW, on copies; training runs :func:`adam_ema_launch` in place.

    Args:
        param: fp32 or fp64, any shape. Copied, as all of the others.
        grad, exp_avg, exp_avg_sq: of its shape and dtype; the second moment ``>= 0``.
        step: 0-dim, the number of this update, from 1; at most 2^24.
        lr: learning rate, ``>= 0``.
        betas: decay of the moments, each in ``[0, 1)``.
        eps: added to the root, ``>= 0``.
        weight_decay: ``>= 0``; added to the gradient times ``param``, or with ``decoupled`` taken from ``param``.
        decoupled: as in AdamW.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        The new parameter, of ``param``'s shape and dtype; the old one where the sum of squares of ``grad`` is not
        finite. Not differentiable.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "adam_ema"
    check_dtype(op, "param", param, DTYPES)
    for name, t in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check(t.shape == param.shape, op, f"{name} has shape {tuple(t.shape)}, expected {tuple(param.shape)}")
        check_dtype(op, name, t, (param.dtype,))
    check(step.ndim == 0, op, f"step has shape {tuple(step.shape)}, expected a scalar")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check(value >= 0, op, f"{name} is {value}, expected >= 0")
    check(len(betas) == 2 and all(0 <= b < 1 for b in betas), op, f"betas is {betas}, expected two in [0, 1)")
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if resolve(op, backend, param, grad, exp_avg, exp_avg_sq, step) == "reference":
        return adam_ema_reference(param, grad, exp_avg, exp_avg_sq, step, **options, decoupled=decoupled)
    device = param.device
    size = param.numel()
    flat, g, m, v = (
        torch.cat([t.detach().reshape(-1), t.new_zeros(-size % PAD)]) for t in (param, grad, exp_avg, exp_avg_sq)
    )
    zero = torch.zeros((), dtype=torch.int64, device=device)
    updated = Updated(
        flat, m, v, g,
        steps=(step.detach() - 1).to(torch.float32).view(1), active=torch.ones(1, dtype=torch.uint8, device=device),
        update=zero, skipped=zero.clone(), grad_norm=torch.zeros_like(flat[:1].sum()),
        counter=torch.zeros((), dtype=torch.int32, device=device),
        settings=settings_of(device, param.dtype, **options),
        decay="none" if not weight_decay else "parameter" if decoupled else "gradient",
    )  # fmt: skip
    blocks = blocks_of([0], [size], device)
    squares = squares_of(blocks)
    squares_launch(g, blocks, updated.active, squares)()
    adam_ema_launch(updated, blocks, squares)()
    return flat[:size].view(param.shape)


# ---- spec


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    g = torch.Generator(device=device).manual_seed(0)

    def sample(name: str, shape: tuple[int, ...], step: int, **kwargs: object) -> Sample:
        p, grad, m, v = (
            torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(dtype) for _ in range(4)
        )
        return Sample(name, (p, grad, m * 0.1, v * v * 0.1, torch.tensor(step, device=device)), kwargs)

    return [
        sample("first", (7,), 1),
        sample("odd", (5, 211), 3, lr=0.1, betas=(0.5, 0.9)),
        sample("l2", (3, 3), 100, weight_decay=0.1, eps=1e-3),
        sample("decoupled", (2049,), 2000, betas=(0.0, 0.99), weight_decay=0.1, decoupled=True),
        sample("empty", (0, 4), 1),
    ]


def _updated(dtype: torch.dtype, **options: object) -> Updated:
    def count() -> torch.Tensor:
        return torch.zeros((), dtype=torch.int64)

    flat, device = torch.empty(4096, dtype=dtype), torch.device("cpu")
    if options.get("follows", "none") != "none":
        options |= {"average": flat, "images": count(), "averaged": count()}
    return Updated(
        flat, flat, flat, flat, steps=torch.zeros(4), active=torch.ones(4, dtype=torch.uint8), update=count(),
        skipped=count(), grad_norm=torch.zeros((), dtype=dtype), counter=torch.zeros((), dtype=torch.int32),
        settings=settings_of(device, dtype, lr=1e-3, betas=(0.5, 0.9), eps=1e-8), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def variants(dtype: torch.dtype) -> list[Updated]:
    """Tensors for updates that between them have every part: each part of the kernel stands alone."""
    some, many = torch.zeros((), dtype=torch.int64), torch.zeros(8, 5, dtype=dtype)
    everything = {
        "clip": True, "zero_grad": True, "scale": torch.ones(()), "good_steps": some,
        "advance": ((some, 64), (some, 1), (some, 2)), "ring": (many[0], many, some),
    }  # fmt: skip
    return [
        _updated(dtype),
        _updated(dtype, decay="gradient", schedule="linear", follows="decay", low=torch.empty(4096).bfloat16()),
        _updated(
            dtype, decay="parameter", schedule="cosine", warmup=True, follows="rampup",
            low=torch.empty(4096).half(), **everything,
        ),
        _updated(dtype, follows="halflife", low=torch.empty(4096).bfloat16(), **everything),
    ]  # fmt: skip


def _launches(dtype: torch.dtype) -> list[Launch]:
    blocks = blocks_of([0], [4096], torch.device("cpu"))
    squares = squares_of(blocks)
    first, *rest = variants(dtype)
    return [
        squares_launch(first.grad, blocks, first.active, squares),
        *(adam_ema_launch(updated, blocks, squares) for updated in (first, *rest)),
    ]


def _bytes_moved(s: Sample) -> int:
    param = s.inputs[0]
    assert param is not None
    return 8 * param.numel() * param.element_size()  # reads p, g, m, v and g for the guard, writes p, m, v


SPEC = OpSpec(
    name="adam_ema",
    op=adam_ema,
    reference=adam_ema_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=0,
    bytes_moved=_bytes_moved,
)
