"""What the kernels that update parameters by Adam share: its tensors, its element, its schedule and its book-keeping.

Numbers that a rule fixes lie in one fp64 tensor (:func:`settings_of`), so that one compiled kernel serves every rule;
what depends on the step is computed from device counters by every program, in fp64, while its tile is being loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# ---- tensors


@dataclass(frozen=True)
class Updated:
    """Flat parameters, what their update reads and writes, and which of its parts there are.

    Attributes:
        flat, exp_avg, exp_avg_sq: parameters and moments ``[size]``, fp32 or fp64.
        grad: gradients ``[size]`` of that dtype.
        steps: updates that each parameter has had, fp32 ``[n]``.
        active: which parameters have a gradient, uint8 ``[n]``.
        update: number of the update for the schedule, int64 0-dim.
        skipped: updates left out, int64 0-dim.
        grad_norm: norm of the last gradients, 0-dim of ``flat``'s dtype.
        counter: programs that have arrived, int32 0-dim, zero between launches.
        settings: of :func:`settings_of`.
        decay: ``"none"``, ``"gradient"`` (Adam) or ``"parameter"`` (AdamW).
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
        warmup: whether the rate rises first.
        follows: how ``average`` does: ``"none"``, ``"decay"``, ``"halflife"`` or ``"rampup"`` (a limited half-life).
        average: ``[size]`` of ``flat``'s dtype; ``None`` with ``"none"``.
        images, averaged: int64 0-dim: shown so far, and at the last average; ``None`` with ``"none"``.
        low: copy of the parameters in fp16 or bf16, ``[size]``.
        clip: whether parameters are clamped.
        zero_grad: whether zeros are left in ``grad``.
        scale, good_steps: the loss scale by which gradients are multiplied, fp32 0-dim, and int64 0-dim, the good
            updates since it changed.
        advance: int64 0-dim counters, at most three, with what is added to each after all else.
        ring: values ``[m]``, rows ``[R, m]`` of their dtype, int64 0-dim slot: the values as they are after the
            update go to row ``slot % R``, then slot grows by 1.
        offsets: where each parameter begins; needed only where the gradients' launch makes the update.
    """

    flat: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor
    steps: torch.Tensor
    active: torch.Tensor
    update: torch.Tensor
    skipped: torch.Tensor
    grad_norm: torch.Tensor
    counter: torch.Tensor
    settings: torch.Tensor
    decay: str = "none"
    schedule: str = "constant"
    warmup: bool = False
    follows: str = "none"
    average: torch.Tensor | None = None
    images: torch.Tensor | None = None
    averaged: torch.Tensor | None = None
    low: torch.Tensor | None = None
    clip: bool = False
    zero_grad: bool = False
    scale: torch.Tensor | None = None
    good_steps: torch.Tensor | None = None
    advance: tuple[tuple[torch.Tensor, int], ...] = ()
    ring: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    offsets: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of either kernel by name."""
        if len(self.advance) > 3:
            raise ValueError(f"adam_ema: advance has {len(self.advance)} counters, expected at most 3")

        def or_any(t: torch.Tensor | None) -> torch.Tensor:
            return self.flat if t is None else t  # never read

        counts = [*self.advance, *[(self.update, 0)] * (3 - len(self.advance))]
        values, rows, slot = self.ring or (self.grad_norm, self.grad_norm, self.update)
        return {
            "flat_ptr": self.flat, "exp_avg_ptr": self.exp_avg, "exp_avg_sq_ptr": self.exp_avg_sq,
            "average_ptr": or_any(self.average), "low_ptr": or_any(self.low), "steps_ptr": self.steps,
            "active_ptr": self.active, "update_ptr": self.update, "images_ptr": or_any(self.images),
            "averaged_ptr": or_any(self.averaged), "skipped_ptr": self.skipped, "grad_norm_ptr": self.grad_norm,
            "counter_ptr": self.counter, "settings_ptr": self.settings, "scale_ptr": or_any(self.scale),
            "good_steps_ptr": or_any(self.good_steps),
            "count_a_ptr": counts[0][0], "count_b_ptr": counts[1][0], "count_c_ptr": counts[2][0],
            "add_a": counts[0][1], "add_b": counts[1][1], "add_c": counts[2][1],
            "values_ptr": values, "ring_ptr": rows, "slot_ptr": slot, "n_params": self.steps.numel(),
            "n_values": values.numel(), "n_slots": rows.shape[0] if self.ring else 1,
            "DECAY": self.decay, "SCHEDULE": self.schedule, "WARMUP": self.warmup, "FOLLOWS": self.follows,
            "CLIP": self.clip, "LOW": self.low is not None, "SCALED": self.scale is not None,
            "N_COUNTS": len(self.advance), "RING": self.ring is not None,
        }  # fmt: skip


def settings_of(
    device: torch.device,
    dtype: torch.dtype,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    start: int = 0,
    steps: int = 0,
    final: float = 0.0,
    warmup: int = 0,
    ema_weight: float = 0.0,
    halflife: float = 1.0,
    rampup: float = 0.0,
) -> torch.Tensor:
    """Numbers of a rule in the order in which the kernels read them, fp64.

    Args:
        device: of the parameters.
        dtype: of the parameters.
        lr, betas, eps, weight_decay: of Adam or AdamW.
        clip: bound of the parameters' absolute values.
        start, steps, final, warmup: of the schedule, as ``fastgan.Schedule`` has them.
        ema_weight: weight of the new value in the average, where it is fixed.
        halflife: in images, where it is not.
        rampup: limits the half-life to this fraction of the images shown.
    """
    # the least fp64 number that rounds to infinity
    limit = math.inf if dtype == torch.float64 else (2 - 2**-24) * 2.0**127
    log2 = [math.log2(beta) if beta > 0 else -math.inf for beta in betas]
    numbers = [lr, *log2, betas[1], 1 - betas[0], 1 - betas[1], eps, weight_decay, limit, clip, start, steps - start,
               final, warmup, ema_weight, halflife, rampup]  # fmt: skip
    return torch.tensor(numbers, dtype=torch.float64, device=device)


# ---- device functions

# positions in the settings
_LR = tl.constexpr(0)
_LOG_BETA1 = tl.constexpr(1)
_LOG_BETA2 = tl.constexpr(2)
_BETA2 = tl.constexpr(3)
_REST1 = tl.constexpr(4)
_REST2 = tl.constexpr(5)
_EPS = tl.constexpr(6)
_WEIGHT_DECAY = tl.constexpr(7)
_LIMIT = tl.constexpr(8)
_CLIP = tl.constexpr(9)
_START = tl.constexpr(10)
_LENGTH = tl.constexpr(11)
_FINAL = tl.constexpr(12)
_WARMUP = tl.constexpr(13)
_EMA_WEIGHT = tl.constexpr(14)
_HALFLIFE = tl.constexpr(15)
_RAMPUP = tl.constexpr(16)

_GROWTH_INTERVAL = tl.constexpr(2000)  # of the loss scale, as in fastgan.adam.LossScale
_LEAST_SCALE = tl.constexpr(2.0**-14)


@triton.jit
def _sine(x):
    """sin(x) for ``|x| <= pi/2`` in fp64, to rounding; the library's reserves stack for large arguments."""
    s = x * x
    # Taylor: the next term is below 2^-58 of x
    y = 1 - s / 420
    y = 1 - s / 342 * y
    y = 1 - s / 272 * y
    y = 1 - s / 210 * y
    y = 1 - s / 156 * y
    y = 1 - s / 110 * y
    y = 1 - s / 72 * y
    y = 1 - s / 42 * y
    y = 1 - s / 20 * y
    return x * (1 - s / 6 * y)


@triton.jit
def learning_rate(settings_ptr, update_ptr, SCHEDULE: tl.constexpr, WARMUP: tl.constexpr):
    """Of this update, fp64: ``fastgan.Schedule.factor`` times lr."""
    rate = tl.load(settings_ptr + _LR)
    if SCHEDULE != "constant" or WARMUP:
        at = tl.load(update_ptr).to(tl.float64)
        if SCHEDULE != "constant":
            done = (at - tl.load(settings_ptr + _START)) / tl.load(settings_ptr + _LENGTH)
            done = tl.where(done < 0, 0.0, tl.where(done > 1, 1.0, done))
            left = 1 - done
            if SCHEDULE == "cosine":  # (1 + cos(pi done)) / 2
                left = (1 + _sine((0.5 - done) * 3.141592653589793)) / 2
            final = tl.load(settings_ptr + _FINAL)
            rate *= final + (1 - final) * left
        if WARMUP:
            risen = (at + 1) / tl.load(settings_ptr + _WARMUP)
            rate *= tl.where(risen > 1, 1.0, risen)
    return rate


@triton.jit
def average_weight(settings_ptr, images_ptr, averaged_ptr, FOLLOWS: tl.constexpr):
    """Weight of the new value in the average, fp64: ``fastgan.EMA.weight``."""
    weight = tl.load(settings_ptr + _EMA_WEIGHT)
    if FOLLOWS == "halflife" or FOLLOWS == "rampup":
        images = tl.load(images_ptr)
        fresh = (images - tl.load(averaged_ptr)).to(tl.float64)
        halflife = tl.load(settings_ptr + _HALFLIFE)
        if FOLLOWS == "rampup":
            limit = images.to(tl.float64) * tl.load(settings_ptr + _RAMPUP)
            halflife = tl.where(limit < halflife, limit, halflife)
        weight = 1 - tl.exp2(-fresh / tl.where(halflife < 1e-8, 1e-8, halflife))
    return weight


@triton.jit
def bias_corrections(settings_ptr, t, lr):
    """``lr / (1 - beta1^t)`` and ``1 / sqrt(1 - beta2^t)`` in fp64, t the number of the update from 1."""
    rate = lr / (1 - tl.exp2(t * tl.load(settings_ptr + _LOG_BETA1)))
    root = 1 / tl.sqrt(1 - tl.exp2(t * tl.load(settings_ptr + _LOG_BETA2)))
    return rate, root


@triton.jit
def adam_element(p, g, m, v, rate, root, lr, settings_ptr, DECAY: tl.constexpr, ROUNDED: tl.constexpr):
    """New (p, m, v), all in p's type; rate, root and lr are fp64 scalars.

    ROUNDED: root and quotient in fp32 to the nearest number, else to 2 ulp of the change, for a third of the registers.
    """
    T: tl.constexpr = p.dtype
    weight_decay = tl.load(settings_ptr + _WEIGHT_DECAY)
    old = p
    if DECAY == "parameter":
        old = p - p * (lr * weight_decay).to(T)
    if DECAY == "gradient":
        g = g + p * weight_decay.to(T)
    m = m + (g - m) * tl.load(settings_ptr + _REST1).to(T)
    v = v * tl.load(settings_ptr + _BETA2).to(T) + g * g * tl.load(settings_ptr + _REST2).to(T)
    eps = tl.load(settings_ptr + _EPS).to(T)
    if p.dtype == tl.float64 or not ROUNDED:
        change = m * rate.to(T) / (tl.sqrt(v) * root.to(T) + eps)
    else:
        change = tl.div_rn(m * rate.to(T), tl.sqrt_rn(v) * root.to(T) + eps)
    return old - change, m, v


@triton.jit
def clamped(p, settings_ptr):
    """p within the bound; NaN stays."""
    clip = tl.load(settings_ptr + _CLIP).to(p.dtype)
    return tl.where(p < -clip, -clip, tl.where(p > clip, clip, p))


@triton.jit
def followed(average, p, weight):
    """The average, moved towards p as ``torch.lerp`` does it."""
    weight = weight.to(p.dtype)
    return tl.where(weight < 0.5, average + weight * (p - average), p - (p - average) * (1 - weight))


@triton.jit
def sum_of(partials_ptr, n, BLOCK: tl.constexpr):
    """Of n partials in fp64, in a fixed order."""
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + at, mask=at < n, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def is_finite(total, settings_ptr):
    """Whether a sum of squares is, once rounded to the parameters' type.

    By way of a number: the interpreter would splat the comparison in the type of what is compared.
    """
    return tl.where(total < tl.load(settings_ptr + _LIMIT), 1, 0) != 0


@triton.jit
def conclude(
    total, goes, settings_ptr, steps_ptr, active_ptr, images_ptr, averaged_ptr, skipped_ptr, grad_norm_ptr, scale_ptr,
    good_steps_ptr, count_a_ptr, count_b_ptr, count_c_ptr, add_a, add_b, add_c, values_ptr, ring_ptr, slot_ptr,
    n_params, n_values, n_slots,
    FOLLOWS: tl.constexpr, SCALED: tl.constexpr, N_COUNTS: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the last program writes: counts, norm, loss scale, and a row of the ring.

    ``goes``: whether active parameters were updated. No other program may still read what is written here.
    """
    finite = is_finite(total, settings_ptr)
    norm = tl.where(finite, tl.sqrt(total), tl.where(total == total, float("inf"), total))
    tl.store(grad_norm_ptr, norm.to(grad_norm_ptr.dtype.element_ty))
    tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(finite, 0, 1))
    if goes:
        for i in range(0, n_params, BLOCK):
            at = i + tl.arange(0, BLOCK)
            inside = at < n_params
            active = tl.load(active_ptr + at, mask=inside, other=0)
            steps = tl.load(steps_ptr + at, mask=inside, other=0.0)
            tl.store(steps_ptr + at, steps + active.to(steps.dtype), mask=inside & (active != 0))
    if FOLLOWS != "none":
        tl.store(averaged_ptr, tl.load(images_ptr))
    if SCALED:
        good = tl.where(finite, tl.load(good_steps_ptr) + 1, 0)
        grows = good >= _GROWTH_INTERVAL
        scale = tl.load(scale_ptr)
        scale = scale * tl.where(finite, tl.where(grows, 2.0, 1.0), 0.5).to(scale.dtype)
        tl.store(scale_ptr, tl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale))
        tl.store(good_steps_ptr, tl.where(grows, 0, good))
    tl.debug_barrier()  # the averaged images are read above
    if N_COUNTS > 0:
        tl.store(count_a_ptr, tl.load(count_a_ptr) + add_a)
    if N_COUNTS > 1:
        tl.debug_barrier()  # two of them may be one
        tl.store(count_b_ptr, tl.load(count_b_ptr) + add_b)
    if N_COUNTS > 2:
        tl.debug_barrier()
        tl.store(count_c_ptr, tl.load(count_c_ptr) + add_c)
    if RING:
        tl.debug_barrier()  # values may be what was written above
        slot = tl.load(slot_ptr)
        for i in range(0, n_values, BLOCK):
            at = i + tl.arange(0, BLOCK)
            row = tl.load(values_ptr + at, mask=at < n_values, other=0.0)
            tl.store(ring_ptr + slot % n_slots * n_values + at, row, mask=at < n_values)
        tl.debug_barrier()
        tl.store(slot_ptr, slot + 1)
