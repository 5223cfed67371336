"""One update of a whole network by Adam or AdamW, as one pass over its arena.

``total = sum of squared gradients; skip everything up to the average where it is not finite;``
``m += (g - m)(1 - b1); v = b2 v + (1 - b2) g^2; p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``

With weight decay, Adam adds ``weight_decay * p`` to ``g`` and AdamW takes ``lr * weight_decay * p`` from ``p`` first.
Then, skipped or not: clamp, average, bf16 or fp16 copy, gradients to zero, each where asked for. A parameter without a
gradient keeps its values, moments and step count, as in ``torch.optim``. What changes from step to step is read from
tensors, so that one call can be made once and repeated. The native pass, the Triton one and the reference here have one
interface; what the last two do besides (loss scale, counters, ring of metrics) is what a captured iteration needs.

Sources: Kingma and Ba 2015 (arXiv:1412.6980); Loshchilov and Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fastgan._native import ext
from fastgan.arena import PAD, Arena
from fastgan.backend import Backend, resolve

if TYPE_CHECKING:
    from fastgan.ema import Average
    from fastgan.kernels._launch import Launch
    from fastgan.optim import Adam

Call = tuple[Callable[..., None], tuple[Any, ...]]

_SCALE_START, _SCALE_LEAST, _SCALE_GROWTH_INTERVAL = 2.0**16, 2.0**-14, 2000  # kernels/_adam.py has the last two again


@dataclass(frozen=True)
class LossScale:
    """What an fp16 loss is multiplied by before it is differentiated, kept on the device.

    Attributes:
        scale: fp32 0-dim.
        good_steps: updates since it changed, int64 0-dim.
    """

    scale: torch.Tensor
    good_steps: torch.Tensor

    @classmethod
    def on(cls, device: torch.device) -> LossScale:
        """With its first value."""
        return cls(torch.full((), _SCALE_START, device=device), torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def adapt(self, grad_norm: torch.Tensor) -> None:
        """Twice as much after 2000 good updates, half where a gradient was not finite; nothing is read back."""
        good = torch.isfinite(grad_norm)
        self.good_steps.copy_(torch.where(good, self.good_steps + 1, 0))
        grow = self.good_steps >= _SCALE_GROWTH_INTERVAL
        self.scale.mul_(torch.where(good, torch.where(grow, 2.0, 1.0), 0.5)).clamp_(min=_SCALE_LEAST)
        self.good_steps.mul_(~grow)


@dataclass(frozen=True)
class Ring:
    """Where the numbers of the last updates are kept until the host asks.

    Attributes:
        values: ``[n]``, copied as they are after an update; they may be what the update writes, such as its norm.
        rows: ``[R, n]`` of the same dtype.
        slot: number of the next row, modulo R, int64 0-dim; every update adds 1.
    """

    values: torch.Tensor
    rows: torch.Tensor
    slot: torch.Tensor


Advance = Sequence[tuple[torch.Tensor, int]]


class AdamState:
    """What an update counts and measures, on the parameters' device.

    Attributes:
        steps: updates that each parameter has had, fp32 ``[n]`` as in ``torch.optim``.
        skipped: updates left out, int64.
        grad_norm: of the last gradients, in the parameters' dtype; not finite where the update was left out.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.steps = torch.zeros(n, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.full((), torch.nan, dtype=dtype, device=device)


@dataclass(eq=False)
class AdamPass(ABC):
    """The update of one network.

    Attributes:
        arena: whose ``grad`` holds the gradients. It should have its ``low`` already if it is to have one.
        state: counts that go on.
        rule: settings.
        update: number of the update, int64 0-dim on the arena's device, for the schedule.
        average: how ``arena.average``, where there is one, follows.
        clip: parameters are clamped to ``[-clip, clip]`` after each update.
        zero_grad: leave zeros in ``arena.grad``.
        has_low: whether it writes ``arena.low``.
    """

    arena: Arena
    state: AdamState
    rule: Adam
    update: torch.Tensor
    average: Average | None = None
    clip: float | None = None
    zero_grad: bool = False

    def __post_init__(self) -> None:
        self.has_low = self.arena.has_low
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Make what every update uses."""

    @abstractmethod
    def call(self, active: torch.Tensor) -> Call:
        """A function and arguments that update the parameters ``active``, uint8 ``[n]``, marks: at every step the same.

        They do not keep ``active`` alive.
        """


class AdamReference(AdamPass):
    """The update in torch ops on the flat tensors, in place; nothing is read back to the host."""

    def _prepare(self) -> None:
        arena = self.arena
        device = arena.flat.device
        rows = torch.tensor([-(-p.numel() // PAD) for p in arena.params], device=device)
        self._owner = torch.arange(len(rows), device=device).repeat_interleave(rows)  # parameter of each row of PAD
        self._inside = torch.zeros(arena.size, dtype=torch.bool, device=device)  # outside the padding
        for view in arena.views_of(self._inside):
            view.fill_(True)
        self._mask = torch.empty_like(self._inside).view(-1, PAD)
        self._a, self._b = (torch.empty_like(arena.flat).view(-1, PAD) for _ in range(2))
        self._squares = torch.empty(len(self._owner), dtype=torch.float64, device=device)

    @torch.no_grad()
    def run(
        self,
        active: torch.Tensor,
        *,
        squares: torch.Tensor | None = None,
        loss_scale: LossScale | None = None,
        advance: Advance = (),
        ring: Ring | None = None,
    ) -> None:
        """Make an update; see :meth:`AdamTriton.launches`."""
        arena, state, rule = self.arena, self.state, self.rule
        p, grad, m, v = (t.view(-1, PAD) for t in (arena.flat, arena.grad, arena.exp_avg, arena.exp_avg_sq))
        has_gradient = active.bool()
        if squares is None:
            torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64, out=self._squares)
            squares = self._squares.square_().masked_fill_(~has_gradient[self._owner], 0)
        total = squares.sum(dtype=torch.float64)
        if loss_scale is not None:
            total = total / loss_scale.scale.double() ** 2
        # in the parameters' own type: a square that is not finite there would stay in the second moment for good
        total = total.to(p.dtype)
        finite = torch.isfinite(total)
        state.grad_norm.copy_(total.double().sqrt())
        state.skipped.add_(~finite)

        goes = has_gradient & finite
        state.steps.add_(goes)
        lr = torch.full_like(state.steps, rule.lr, dtype=torch.float64)
        if rule.schedule is not None:
            lr *= rule.schedule.factor(self.update)
        t = state.steps.double().clamp(min=1)
        rate = (lr / (1 - rule.betas[0] ** t)).to(p.dtype)[self._owner].unsqueeze(1)
        root = (1 - rule.betas[1] ** t).rsqrt().to(p.dtype)[self._owner].unsqueeze(1)
        torch.logical_and(self._inside.view(-1, PAD), goes[self._owner].unsqueeze(1), out=self._mask)
        g = grad if loss_scale is None else torch.div(grad, loss_scale.scale, out=self._a)
        if rule.weight_decay and not rule.decoupled:
            g = torch.add(g, p, alpha=rule.weight_decay, out=self._a)
        new = torch.sub(g, m, out=self._b).mul_(1 - rule.betas[0]).add_(m)
        torch.where(self._mask, new, m, out=m)
        new = torch.mul(g, g, out=self._b).mul_(1 - rule.betas[1]).add_(v, alpha=rule.betas[1])
        torch.where(self._mask, new, v, out=v)
        change = torch.mul(m, rate, out=self._a).div_(torch.sqrt(v, out=self._b).mul_(root).add_(rule.eps))
        if rule.weight_decay and rule.decoupled:
            shrink = (lr[0] * rule.weight_decay).to(p.dtype)
            change.add_(torch.mul(p, shrink, out=self._b))
        torch.where(self._mask, torch.sub(p, change, out=self._b), p, out=p)

        if self.clip is not None:
            arena.flat.clamp_(-self.clip, self.clip)
        if self.average is not None and arena.average is not None:
            weight = self.average.weight()
            arena.average.lerp_(arena.flat, weight.to(p.dtype) if isinstance(weight, torch.Tensor) else weight)
            self.average.averaged.copy_(self.average.images)
        arena.refresh()
        if self.zero_grad:
            arena.grad.zero_()
        if loss_scale is not None:
            loss_scale.adapt(total)
        for count, by in advance:
            count.add_(by)
        if ring is not None:
            ring.rows.index_copy_(0, (ring.slot % len(ring.rows)).view(1), ring.values.unsqueeze(0))
            ring.slot.add_(1)

    def call(self, active: torch.Tensor) -> Call:
        return self.run, (active,)


class AdamNative(AdamPass):
    """The update as one native pass over CPU memory (``csrc/adam.cpp``), equal to the bit for any number of threads."""

    def _prepare(self) -> None:
        assert ext is not None
        arena, state, rule, average = self.arena, self.state, self.rule, self.average
        schedule = rule.schedule
        ema = average.rule if average is not None and arena.average is not None else None
        tensors: dict[str, torch.Tensor | None] = {
            "flat": arena.flat, "grad": arena.grad, "exp_avg": arena.exp_avg, "exp_avg_sq": arena.exp_avg_sq,
            "average": arena.average if ema else None, "low": arena.low if arena.has_low else None,
            "blocks": arena.blocks, "steps": state.steps, "skipped": state.skipped, "grad_norm": state.grad_norm,
            "update": self.update, "images": average.images if average else None,
            "averaged": average.averaged if average else None,
        }  # fmt: skip
        self._kept = tensors  # the pass holds their addresses
        self._pass = ext.AdamPass(
            is_double=arena.flat.dtype == torch.float64,
            **{name: 0 if t is None else t.data_ptr() for name, t in tensors.items()},
            n_blocks=len(arena.blocks), n_params=len(arena.params),
            lr=rule.lr, beta1=rule.betas[0], beta2=rule.betas[1], eps=rule.eps,
            weight_decay=rule.weight_decay, decoupled=rule.decoupled,
            schedule=schedule.kind if schedule else "constant",
            schedule_start=schedule.start if schedule else 0, schedule_steps=schedule.steps if schedule else 0,
            schedule_final=schedule.final if schedule else 0, warmup=schedule.warmup if schedule else 0,
            ema_decay=_or_none(ema.decay if ema else None),
            ema_halflife=1000 * _or_none(ema.halflife_kimg if ema else None),
            ema_rampup=_or_none(ema.rampup if ema else None), clip=_or_none(self.clip), zero_grad=self.zero_grad,
        )  # fmt: skip

    def call(self, active: torch.Tensor) -> Call:
        return self._pass.run, (active.data_ptr(), torch.get_num_threads())


class AdamTriton(AdamPass):
    """The update as one launch of a Triton kernel (``kernels/adam_ema.py``), and one before it that sums squares."""

    def _prepare(self) -> None:
        from fastgan.kernels._adam import Updated, settings_of
        from fastgan.kernels.adam_ema import blocks_of, squares_of

        arena, state, rule, average = self.arena, self.state, self.rule, self.average
        device, dtype = arena.flat.device, arena.flat.dtype
        schedule = rule.schedule
        ema = average.rule if average is not None and arena.average is not None else None
        follows = "none"
        if ema is not None:
            follows = "decay" if ema.decay is not None else "halflife" if ema.rampup is None else "rampup"
        self._updated = Updated(
            arena.flat, arena.exp_avg, arena.exp_avg_sq, arena.grad, steps=state.steps,
            active=mark([True] * len(arena.params), device), update=self.update, skipped=state.skipped,
            grad_norm=state.grad_norm, counter=torch.zeros((), dtype=torch.int32, device=device),
            settings=settings_of(
                device, dtype, lr=rule.lr, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay,
                clip=self.clip or 0.0, start=schedule.start if schedule else 0,
                steps=schedule.steps if schedule else 0, final=schedule.final if schedule else 0.0,
                warmup=schedule.warmup if schedule else 0,
                ema_weight=1 - ema.decay if ema is not None and ema.decay is not None else 0.0,
                halflife=1000 * (ema.halflife_kimg or 0.0) if ema is not None else 0.0,
                rampup=ema.rampup or 0.0 if ema is not None else 0.0,
            ),
            decay="none" if not rule.weight_decay else "parameter" if rule.decoupled else "gradient",
            schedule=schedule.kind if schedule else "constant", warmup=bool(schedule and schedule.warmup),
            follows=follows, average=arena.average if ema else None,
            images=average.images if ema and average else None,
            averaged=average.averaged if ema and average else None,
            low=arena.low if arena.has_low else None, clip=self.clip is not None, zero_grad=self.zero_grad,
            offsets=tuple(arena.offsets),
        )  # fmt: skip
        self._blocks = blocks_of(arena.offsets, [p.numel() for p in arena.params], device)
        self._squares = squares_of(self._blocks)

    def launches(
        self,
        active: torch.Tensor,
        *,
        squares: torch.Tensor | None = None,
        loss_scale: LossScale | None = None,
        advance: Advance = (),
        ring: Ring | None = None,
    ) -> list[Launch]:
        """The update as launches that can be repeated: one where ``squares`` are given, else two.

        Args:
            active: uint8 ``[n]``, which parameters have a gradient, the same at every step.
            squares: partial sums of the squares of the gradients in ``arena.grad``, fp64 or fp32 ``[any]``, as
                ``weight_gradient_launch`` writes them; nothing of parameters without a gradient may be in them.
            loss_scale: ``arena.grad`` holds gradients times this. They are divided, guarded, and it is adapted.
            advance: counters (int64 0-dim), at most three, and what is added to each after all else.
            ring: takes a row of values last.
        """
        from fastgan.kernels.adam_ema import adam_ema_launch, squares_launch

        updated = replace(self._updated, active=active, **_extras(loss_scale, advance, ring))
        first = [squares_launch(self.arena.grad, self._blocks, active, self._squares)] if squares is None else []
        return [*first, adam_ema_launch(updated, self._blocks, self._squares if squares is None else squares)]

    def updated(self, *, loss_scale: LossScale | None = None, advance: Advance = (), ring: Ring | None = None) -> Any:
        """The tensors, as ``weight_gradient_launch(adam=...)`` takes them; arguments as for :meth:`launches`."""
        return replace(self._updated, **_extras(loss_scale, advance, ring))

    def call(self, active: torch.Tensor) -> Call:
        return _in_turn, (self.launches(active),)


def _extras(loss_scale: LossScale | None, advance: Advance, ring: Ring | None) -> dict[str, Any]:
    return {
        "scale": loss_scale.scale if loss_scale else None, "good_steps": loss_scale.good_steps if loss_scale else None,
        "advance": tuple(advance), "ring": (ring.values, ring.rows, ring.slot) if ring else None,
    }  # fmt: skip


def _in_turn(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


def pass_for(arena: Arena, backend: Backend | None = None) -> type[AdamPass]:
    """Triton on a GPU, native on the CPU where the extension was built and can, else the reference.

    Args:
        arena: of the parameters.
        backend: see :func:`fastgan.backend.resolve`; on the CPU, where Triton interprets, ``"triton"`` must be given.
    """
    on_cpu = arena.flat.device.type == "cpu"
    if (not on_cpu or backend == "triton") and resolve("adam_ema", backend, arena.flat) == "triton":
        return AdamTriton
    native = ext is not None and on_cpu and arena.low_dtype in (None, torch.bfloat16)
    return AdamNative if native else AdamReference


def mark(active: Sequence[bool], device: torch.device) -> torch.Tensor:
    """uint8 ``[n]``: which parameters have a gradient."""
    return torch.tensor(active, dtype=torch.uint8, device=device)


def _or_none(value: float | None) -> float:
    """A number as the native pass takes it, where a negative one is none."""
    return -1.0 if value is None else float(value)
