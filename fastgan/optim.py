"""Adam and AdamW as settings, learning-rate schedules, and the update that a player makes with them.

Own settings run as one pass over the player's arena (:mod:`fastgan.adam`), an optimiser of the user's as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fastgan import ema
from fastgan.adam import AdamPass, AdamState, AdamTriton, Advance, Call, LossScale, Ring, mark, pass_for
from fastgan.arena import Arena, obstacle
from fastgan.backend import Backend
from fastgan.ema import Average
from fastgan.errors import InputError
from fastgan.marks import during

State = dict[str, Any]
Active = tuple[bool, ...]


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate as a function of the player's own updates.

    Attributes:
        kind: ``"constant"``, ``"linear"`` or ``"cosine"`` decay.
        steps: update at which the decay ends; needed by linear and cosine.
        start: update at which the decay begins.
        final: factor at the end of the decay, ``>= 0``.
        warmup: the factor rises linearly over the first ``warmup`` updates, to be multiplied by the decay.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 0
    start: int = 0
    final: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine"):
            raise InputError(f"Schedule: kind is {self.kind!r}, expected constant, linear or cosine")
        if self.kind != "constant" and not self.steps > self.start >= 0:
            raise InputError(f"Schedule: steps is {self.steps}, expected more than start, which is {self.start}")
        if self.final < 0 or self.warmup < 0:
            raise InputError(f"Schedule: final is {self.final} and warmup {self.warmup}, expected >= 0")

    def factor(self, update: torch.Tensor) -> torch.Tensor:
        """The factor for the update with that number (0-dim integer tensor, from 0), 0-dim fp64."""
        at = update.double()
        out = torch.ones_like(at)
        if self.kind != "constant":
            done = ((at - self.start) / (self.steps - self.start)).clamp(0, 1)
            left = 1 - done if self.kind == "linear" else (1 + torch.cos(math.pi * done)) / 2
            out = self.final + (1 - self.final) * left
        if self.warmup:
            out = out * ((at + 1) / self.warmup).clamp(max=1)
        return out


@dataclass(frozen=True)
class Adam:
    """Settings of Adam (Kingma and Ba 2015); ``weight_decay`` is an L2 term in the gradient."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule | None = None
    decoupled: ClassVar[bool] = False  # weight decay apart from the gradient

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key in ("lr", "eps", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise InputError(f"{name}: {key} is {getattr(self, key)}, expected >= 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"{name}: betas is {self.betas}, expected two numbers in [0, 1)")


@dataclass(frozen=True)
class AdamW(Adam):
    """Settings of AdamW (Loshchilov and Hutter 2019); ``weight_decay`` shrinks the parameters directly."""

    weight_decay: float = 0.01
    decoupled: ClassVar[bool] = True


class Updater:
    """Applies gradients to one player's parameters, and what follows an update: clamping, and the average.

    A set of gradients with a value that is not finite is skipped and counted, without reading anything back.

    Attributes:
        names, params: the parameters that are updated.
        arena: they, their gradients and moments in flat tensors; ``None`` where ``obstacle`` says why not.
        optimizer: what steps: the user's, or torch's fused one where own settings have no arena; else ``None``.
        rule: own settings as they are applied, lazy penalties taken into account; else ``None``.
        skipped: updates left out, int64 0-dim.
        grad_norm: of the last gradients, 0-dim.
    """

    def __init__(
        self,
        player: str,
        module: nn.Module,
        optimizer: Adam | torch.optim.Optimizer,
        extra_per_update: float = 0.0,
        *,
        update: torch.Tensor,
        average: Average | None = None,
        clip: float | None = None,
        zero_grad: bool = False,
        other: nn.Module | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Prepare the optimiser.

        Args:
            player: ``"g_optimizer"`` or ``"d_optimizer"``, for messages.
            module: whose parameters that require a gradient are updated; they become views of the arena.
            optimizer: settings, or an optimiser over exactly those parameters.
            extra_per_update: optimiser steps for lazy penalties per ordinary one, the sum of 1/k.
            update: number of the player's update, int64 0-dim on the parameters' device, for the schedule.
            average: what follows the module at every update; its parameters become views too.
            clip: the parameters are clamped to ``[-clip, clip]`` after every update.
            zero_grad: own settings leave zeros in ``arena.grad``.
            other: the other player's network; a parameter in both belongs to no arena.
            backend: which implementation of own settings, see :func:`fastgan.adam.pass_for`.
        """
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise InputError(f"{player}: the network has no parameter that requires a gradient")
        self.names, self.params = list(named), list(named.values())
        device, dtype = self.params[0].device, self.params[0].dtype
        self.player, self.update, self.average, self.clip, self.zero_grad = player, update, average, clip, zero_grad
        self.backend = backend
        self.lazy = 1 / (1 + extra_per_update)
        self.own = isinstance(optimizer, Adam)
        shared = {id(p) for p in other.parameters()} if other is not None else set()
        both = next((n for n, p in named.items() if id(p) in shared), None)
        self.obstacle = obstacle(list(named.items())) if both is None else f"parameter {both!r} is in both networks"
        self.rule: Adam | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if isinstance(optimizer, Adam):
            betas = (optimizer.betas[0] ** self.lazy, optimizer.betas[1] ** self.lazy)
            self.rule = replace(optimizer, lr=optimizer.lr * self.lazy, betas=betas)
            if self.obstacle is not None:
                self.optimizer = _torchs(self.rule, self.params)
        elif isinstance(optimizer, torch.optim.Optimizer):
            given = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if given != {id(p) for p in self.params}:
                raise InputError(f"{player}: the optimiser does not hold exactly the network's trainable parameters")
            self.optimizer = optimizer
            if isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
                _use_fused(optimizer)
        else:
            raise InputError(
                f"{player}: got {type(optimizer).__name__}, expected Adam, AdamW or a torch.optim optimiser"
            )
        self.fused = isinstance(self.optimizer, torch.optim.Adam)

        followers = dict(average.module.named_parameters()) if average is not None else {}
        in_pass = [followers[n] for n in self.names] if average is not None and self.optimizer is None else None
        self.arena = (
            None if self.obstacle is not None else Arena(list(named.items()), in_pass, moments=self.optimizer is None)
        )
        self._rest: list[tuple[torch.Tensor, torch.Tensor]] = []  # averaged one by one
        if average is not None:
            done = {id(p) for p in in_pass or ()}
            self._rest = [pair for pair in ema.pairs(average.module, module) if id(pair[0]) not in done]
        self._state = AdamState(len(self.params), dtype, device)
        self.skipped, self.grad_norm = self._state.skipped, self._state.grad_norm
        self._pass: AdamPass | None = None
        self._marks: dict[Active, torch.Tensor] = {}
        self._versions = -1
        self._rates: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> State:
        """Without the pass, which holds addresses: a copy makes its own."""
        return self.__dict__ | {"_pass": None}

    @during("optimiser")
    def apply(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Make one update.

        Args:
            grads: one per parameter; ``None`` where the loss does not depend on it.
        """
        if self.arena is not None and self.optimizer is None:
            self.arena.take(grads)
            self.step(tuple(g is not None for g in grads))
        else:
            self._apply_by_optimizer(grads)

    def measure_into(self, grad_norm: torch.Tensor) -> None:
        """Keep the gradients' norm in that 0-dim tensor from now on."""
        self.grad_norm = self._state.grad_norm = grad_norm
        self._pass = None

    @during("optimiser")
    def step(
        self,
        active: Active | None = None,
        *,
        squares: torch.Tensor | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        """Make one update with the gradients that ``arena.grad`` holds.

        Args:
            active: which parameters have a gradient, one per parameter; by default all.
            squares, loss_scale: see :meth:`calls`; own settings on kernels only.

        Raises:
            InputError: a parameter has become of another shape, dtype or device since; names it.
        """
        assert self.arena is not None
        active = (True,) * len(self.params) if active is None else active
        self.attach()
        grads = [g if on else None for g, on in zip(self.arena.grads, active, strict=True)]
        if self.optimizer is not None:
            self._apply_by_optimizer(grads)
            return
        self._show(grads)
        if squares is not None or loss_scale is not None:
            for call in self.calls(active, squares=squares, loss_scale=loss_scale):
                call()
        else:
            self.follow()
            function, arguments = self.call(active)
            function(*arguments)
        self.noted()

    def _show(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Let ``p.grad`` be the gradients."""
        for p, g in zip(self.params, grads, strict=True):
            if p.grad is not g:
                p.grad = g

    def noted(self, active: Active | None = None) -> None:
        """Tell autograd and the user that an update was made: a graph made of the parameters before notices.

        Args:
            active: which parameters had a gradient, where :meth:`step` was not what made the update.
        """
        if active is not None and self.arena is not None:
            self._show([g if on else None for g, on in zip(self.arena.grads, active, strict=True)])
        torch.autograd.graph.increment_version(self.params)
        self._versions = sum(p._version for p in self.params)

    def take_rates(self) -> None:
        """Put rates that the user has set as numbers into the tensors that a recording reads."""
        if self.optimizer is None or not self.fused or self.own:
            return
        for i, group in enumerate(self.optimizer.param_groups):
            if not isinstance(group["lr"], torch.Tensor):
                if i not in self._rates:
                    p = group["params"][0]
                    full = torch.float64 if p.device.type == "cpu" else torch.float32  # as torch's kernels take it
                    self._rates[i] = torch.zeros((), dtype=full, device=p.device)
                self._rates[i].fill_(group["lr"])
                group["lr"] = self._rates[i]

    def refresh(self) -> None:
        """Bring the arena's copy in lower precision up to date where the user has changed parameters in place."""
        if self.arena is not None and self.arena.has_low:
            versions = sum(p._version for p in self.params)
            if versions != self._versions:
                self.arena.refresh()
                self._versions = versions

    @property
    def on_kernels(self) -> bool:
        """Whether own settings run as launches, which :meth:`calls` gives."""
        return self.arena is not None and self.optimizer is None and pass_for(self.arena, self.backend) is AdamTriton

    def calls(
        self,
        active: Active,
        *,
        squares: torch.Tensor | None = None,
        loss_scale: LossScale | None = None,
        advance: Advance = (),
        ring: Ring | None = None,
    ) -> list[Callable[[], None]]:
        """One update from ``arena.grad`` as calls that can be repeated, for :attr:`on_kernels`.

        Args:
            active: which parameters have a gradient.
            squares, loss_scale, advance, ring: see :meth:`fastgan.adam.AdamTriton.launches`.
        """
        passed = self._the_pass()
        assert isinstance(passed, AdamTriton)
        follow = [self.follow] if self._rest and self.average is not None else []
        return [*follow, *passed.launches(
            self._marked(active), squares=squares, loss_scale=loss_scale, advance=advance, ring=ring
        )]  # fmt: skip

    def call(self, active: Active | None = None) -> Call:
        """A function and arguments that make the update from ``arena.grad``, the same at every step.

        Own settings in an arena only. It leaves out what :meth:`step` does besides: taking parameters in again that
        the user has moved, ``p.grad``, and before the update :meth:`follow`. Ask for ``arena.low`` first, if at all.
        """
        return self._the_pass().call(self._marked((True,) * len(self.params) if active is None else active))

    def _the_pass(self) -> AdamPass:
        assert self.arena is not None
        assert self.rule is not None
        if self._pass is None or self._pass.has_low != self.arena.has_low:
            self._pass = pass_for(self.arena, self.backend)(
                self.arena, self._state, self.rule, update=self.update, average=self.average, clip=self.clip,
                zero_grad=self.zero_grad,
            )  # fmt: skip
        return self._pass

    def _marked(self, active: Active) -> torch.Tensor:
        if active not in self._marks:
            self._marks[active] = mark(active, self.params[0].device)
        return self._marks[active]

    def follow(self) -> None:
        """Move what of the average the update's pass does not: buffers, and parameters without a gradient."""
        if self._rest and self.average is not None:
            ema.follow(self._rest, self.average.weight())

    def attach(self) -> None:
        """Take in again parameters whose memory the user has replaced.

        Raises:
            InputError: one has become of another shape, dtype or device; names it.
        """
        if self.arena is not None and not self.arena.attached():
            try:
                self.arena.attach()
            except InputError as e:
                raise InputError(f"{self.player}: {e}") from None

    @torch.no_grad()
    def _apply_by_optimizer(self, grads: Sequence[torch.Tensor | None]) -> None:
        assert self.optimizer is not None
        total = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
        self.grad_norm.copy_(total)
        bad = ~torch.isfinite(total)
        self.skipped.add_(bad)
        if self.rule is not None and self.rule.schedule is not None:
            self.optimizer.param_groups[0]["lr"].copy_(self.rule.lr * self.rule.schedule.factor(self.update))
        for p, g in zip(self.params, grads, strict=True):
            # fused kernels walk both as flat memory, and convolutions may return another layout
            p.grad = g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        if self.fused:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by torch's fused kernels
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        else:
            self._step_or_restore(self.optimizer, bad)
        if self.clip is not None:
            for p in self.params:
                p.clamp_(-self.clip, self.clip)
        if self.average is not None:
            self.follow()
            self.average.averaged.copy_(self.average.images)

    def _step_or_restore(self, optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
        """One step of an optimiser that knows no guard: what it changed is put back where ``bad`` is set.

        The gradient is zero then: state that this very step creates is what its first step of nothing leaves.
        """
        before = [p.clone() for p in self.params]
        state = {p: {k: v.clone() for k, v in _tensors(optimizer, p).items()} for p in self.params}
        for p in self.params:
            if p.grad is not None:
                p.grad = p.grad.masked_fill(bad, 0.0)
        optimizer.step()
        for p, old in zip(self.params, before, strict=True):
            p.copy_(torch.where(bad, old, p))
            for key, value in _tensors(optimizer, p).items():
                was = state[p].get(key, torch.zeros_like(value) if key == "step" else value)
                value.copy_(torch.where(bad.to(value.device), was, value))

    def state_dict(self) -> State:
        """Moments by parameter name, counts of skipped steps; the rates too where the optimiser is the user's."""
        state = dict(zip(self.names, self._states(), strict=True))
        out: State = {"kind": self._kind(), "state": state, "skipped": self.skipped, "grad_norm": self.grad_norm}
        if not self.own and self.optimizer is not None:
            out["lr"] = [float(group["lr"]) for group in self.optimizer.param_groups]
        return out

    def _states(self) -> list[State]:
        if self.optimizer is not None:
            return [dict(self.optimizer.state[p]) for p in self.params]
        assert self.arena is not None
        kept = self._state.steps, self.arena.views_of(self.arena.exp_avg), self.arena.views_of(self.arena.exp_avg_sq)
        return [{"step": t, "exp_avg": m, "exp_avg_sq": v} for t, m, v in zip(*kept, strict=True)]

    def _kind(self) -> str:
        """The optimiser and what decides which state it keeps."""
        if self.optimizer is None:
            return type(self.rule).__name__
        on = [k for k in ("amsgrad", "centered", "momentum", "nesterov") if self.optimizer.defaults.get(k)]
        return " ".join([type(self.optimizer).__name__, *on])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            InputError: the state is another optimiser's, or of other parameters.
        """
        if state["kind"] != self._kind():
            raise InputError(f"checkpoint: its optimiser is {state['kind']}, expected {self._kind()}")
        for n in self.names:
            if state["state"].get(n) is None:
                raise InputError(f"checkpoint: no optimiser state for parameter {n!r}")
        entries = [state["state"][n] for n in self.names]
        if self.optimizer is not None:
            for p, entry in zip(self.params, entries, strict=True):
                self.optimizer.state[p] = {
                    k: v.clone().to(p.device if v.ndim or self.fused else "cpu") if isinstance(v, torch.Tensor) else v
                    for k, v in entry.items()
                }
            for group, lr in zip(self.optimizer.param_groups, state.get("lr", []), strict=False):
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        else:
            for mine, entry in zip(self._states(), entries, strict=True):
                for key, value in mine.items():
                    value.copy_(entry[key]) if entry else value.zero_()  # empty: never had a gradient
        self.skipped.copy_(state["skipped"])
        self.grad_norm.copy_(state["grad_norm"])


def _torchs(rule: Adam, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's fused optimiser with these settings."""
    rate: float | torch.Tensor = rule.lr
    if rule.schedule is not None:  # CPU kernels take the rate in fp64, CUDA kernels in fp32
        device = params[0].device
        rate = torch.tensor(rate, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
    return kind(
        params, lr=rate, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay, fused=True,
        capturable=params[0].device.type == "cuda",
    )  # fmt: skip


def _tensors(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    return {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}


def _use_fused(optimizer: torch.optim.Adam) -> None:
    """Switch a user's Adam to torch's fused kernels: the same mathematics, with a guard that needs no read-back.

    On a GPU it can be recorded in a graph then.
    """
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        if group["params"][0].device.type == "cuda":
            group["capturable"] = True
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state and "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
