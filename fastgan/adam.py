"""One update of a whole network by Adam or AdamW, as one pass over its arena.

``total = sum of squared gradients; skip everything up to the average where it is not finite;``
``m += (g - m)(1 - b1); v = b2 v + (1 - b2) g^2; p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``

With weight decay, Adam adds ``weight_decay * p`` to ``g`` and AdamW takes ``lr * weight_decay * p`` from ``p`` first.
Then, skipped or not: clamp, average, bf16 copy, gradients to zero, each where asked for. A parameter without a
gradient keeps its values, moments and step count, as in ``torch.optim``. What changes from step to step is read from
tensors, so that one call can be made once and repeated. The native pass and the reference here have one interface.

Sources: Kingma and Ba 2015 (arXiv:1412.6980); Loshchilov and Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastgan._native import ext
from fastgan.arena import PAD, Arena

if TYPE_CHECKING:
    from fastgan.ema import Average
    from fastgan.optim import Adam

Call = tuple[Callable[..., None], tuple[Any, ...]]


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
    def run(self, active: torch.Tensor) -> None:
        """Update the parameters ``active``, uint8 ``[n]``, marks."""
        arena, state, rule = self.arena, self.state, self.rule
        p, grad, m, v = (t.view(-1, PAD) for t in (arena.flat, arena.grad, arena.exp_avg, arena.exp_avg_sq))
        has_gradient = active.bool()
        torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64, out=self._squares)
        self._squares.square_().masked_fill_(~has_gradient[self._owner], 0)
        # in the parameters' own type: a square that is not finite there would stay in the second moment for good
        total = self._squares.sum().to(p.dtype)
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
        g = grad
        if rule.weight_decay and not rule.decoupled:
            g = torch.add(grad, p, alpha=rule.weight_decay, out=self._a)
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


def pass_for(arena: Arena) -> type[AdamPass]:
    """Native where the extension was built and the network is on the CPU."""
    return AdamNative if ext is not None and arena.flat.device.type == "cpu" else AdamReference


def mark(active: Sequence[bool], device: torch.device) -> torch.Tensor:
    """uint8 ``[n]``: which parameters have a gradient."""
    return torch.tensor(active, dtype=torch.uint8, device=device)


def _or_none(value: float | None) -> float:
    """A number as the native pass takes it, where a negative one is none."""
    return -1.0 if value is None else float(value)
