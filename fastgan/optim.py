"""Adam and AdamW as settings, learning-rate schedules, and the update that a player makes with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastgan.errors import InputError

State = dict[str, Any]


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


class Updater:
    """Applies gradients to one player's parameters.

    A set of gradients with a value that is not finite is skipped and counted, without reading anything back.
    """

    def __init__(
        self,
        player: str,
        module: nn.Module,
        optimizer: Adam | torch.optim.Optimizer,
        extra_per_update: float = 0.0,
    ) -> None:
        """Prepare the optimiser.

        Args:
            player: ``"g_optimizer"`` or ``"d_optimizer"``, for messages.
            module: whose parameters that require a gradient are updated.
            optimizer: settings, or an optimiser over exactly those parameters.
            extra_per_update: optimiser steps for lazy penalties per ordinary one, the sum of 1/k.
        """
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise InputError(f"{player}: the network has no parameter that requires a gradient")
        self.names, self.params = list(named), list(named.values())
        device, dtype = self.params[0].device, self.params[0].dtype
        self.schedule: Schedule | None = None
        self.base_lr, self.lazy = 0.0, 1 / (1 + extra_per_update)
        if isinstance(optimizer, Adam):
            betas = (optimizer.betas[0] ** self.lazy, optimizer.betas[1] ** self.lazy)
            self.base_lr, self.schedule = optimizer.lr * self.lazy, optimizer.schedule
            kind = torch.optim.AdamW if isinstance(optimizer, AdamW) else torch.optim.Adam
            rate: float | torch.Tensor = self.base_lr
            if self.schedule is not None:  # CPU kernels take the rate in fp64, CUDA kernels in fp32
                rate = torch.tensor(rate, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
            self.optimizer: torch.optim.Optimizer = kind(
                self.params, lr=rate, betas=betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay, fused=True
            )
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
        self.own = isinstance(optimizer, Adam)
        self.fused = isinstance(self.optimizer, torch.optim.Adam)
        self.skipped = torch.zeros((), device=device, dtype=torch.int64)
        self.grad_norm = torch.full((), math.nan, device=device, dtype=dtype)

    @torch.no_grad()
    def apply(self, grads: Sequence[torch.Tensor | None], update: torch.Tensor) -> None:
        """Take one optimiser step.

        Args:
            grads: one per parameter; ``None`` where the loss does not depend on it.
            update: number of the player's update, 0-dim integer tensor, for the schedule.
        """
        total = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
        self.grad_norm.copy_(total)
        bad = ~torch.isfinite(total)
        self.skipped.add_(bad)
        if self.schedule is not None:
            self.optimizer.param_groups[0]["lr"].copy_(self.base_lr * self.schedule.factor(update))
        for p, g in zip(self.params, grads, strict=True):
            # fused kernels walk both as flat memory, and convolutions may return another layout
            p.grad = g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        if self.fused:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by torch's fused kernels
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        else:
            self._step_or_restore(bad)

    def _step_or_restore(self, bad: torch.Tensor) -> None:
        """One step of an optimiser that knows no guard: what it changed is put back where ``bad`` is set.

        The gradient is zero then: state that this very step creates is what its first step of nothing leaves.
        """
        before = [p.clone() for p in self.params]
        state = {p: {k: v.clone() for k, v in self._tensors(p).items()} for p in self.params}
        for p in self.params:
            if p.grad is not None:
                p.grad = p.grad.masked_fill(bad, 0.0)
        self.optimizer.step()
        for p, old in zip(self.params, before, strict=True):
            p.copy_(torch.where(bad, old, p))
            for key, value in self._tensors(p).items():
                was = state[p].get(key, torch.zeros_like(value) if key == "step" else value)
                value.copy_(torch.where(bad.to(value.device), was, value))

    def _tensors(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        return {k: v for k, v in self.optimizer.state[p].items() if isinstance(v, torch.Tensor)}

    def state_dict(self) -> State:
        """Moments by parameter name, counts of skipped steps; the rates too where the optimiser is the user's."""
        state = {n: dict(self.optimizer.state[p]) for n, p in zip(self.names, self.params, strict=True)}
        out: State = {"kind": self._kind(), "state": state, "skipped": self.skipped, "grad_norm": self.grad_norm}
        if not self.own:
            out["lr"] = [float(group["lr"]) for group in self.optimizer.param_groups]
        return out

    def _kind(self) -> str:
        """The optimiser and what decides which state it keeps."""
        on = [k for k in ("amsgrad", "centered", "momentum", "nesterov") if self.optimizer.defaults.get(k)]
        return " ".join([type(self.optimizer).__name__, *on])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            InputError: the state is another optimiser's, or of other parameters.
        """
        if state["kind"] != self._kind():
            raise InputError(f"checkpoint: its optimiser is {state['kind']}, expected {self._kind()}")
        for n, p in zip(self.names, self.params, strict=True):
            entry = state["state"].get(n)
            if entry is None:
                raise InputError(f"checkpoint: no optimiser state for parameter {n!r}")
            self.optimizer.state[p] = {
                k: v.clone().to(p.device if v.ndim or self.fused else "cpu") if isinstance(v, torch.Tensor) else v
                for k, v in entry.items()
            }
        self.skipped.copy_(state["skipped"])
        self.grad_norm.copy_(state["grad_norm"])
        for group, lr in zip(self.optimizer.param_groups, state.get("lr", []), strict=False):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _use_fused(optimizer: torch.optim.Adam) -> None:
    """Switch a user's Adam to torch's fused kernels: the same mathematics, with a guard that needs no read-back."""
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state and "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
