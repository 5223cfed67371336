"""Gradients of a phase through torch's autograd: the numbers that every faster path is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastgan.arithmetic import Arithmetic
from fastgan.errors import InputError
from fastgan.losses import Loss
from fastgan.marks import during, mark
from fastgan.penalties import Penalty, Perturbing, Place
from fastgan.phases import Phase

Tensor = torch.Tensor
Grads = list[Tensor | None]


@dataclass
class Samples:
    """What a discriminator's update is given: ``[B, ...]`` each, ``alpha`` one number per row of the discriminator."""

    real: Tensor
    fake: Tensor
    labels: Tensor | None = None
    alpha: Tensor | None = None
    delta: Tensor | None = None


class Autograd:
    """Runs the networks and differentiates.

    Args:
        generator: ``None`` where fakes are given.
        discriminator: its final sigmoid is left out where ``sigmoid`` is that module.
        loss: of both players.
        arithmetic: the precision.
        dtype: of the parameters.
        packed: samples that make one row of the discriminator.
        scale: of fp16 losses, 0-dim.
    """

    def __init__(
        self, generator: nn.Module | None, discriminator: nn.Module, *, loss: Loss, arithmetic: Arithmetic,
        dtype: torch.dtype, packed: int, scale: Tensor,
    ) -> None:  # fmt: skip
        self.generator, self.discriminator, self.loss, self.arithmetic = generator, discriminator, loss, arithmetic
        self.dtype, self.packed, self.scale = dtype, packed, scale
        self.sigmoid: nn.Module | None = None

    @during("fakes")
    def fakes(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Samples of the generator without gradient."""
        assert self.generator is not None
        with torch.no_grad(), self.arithmetic.reduced():
            out: Tensor = self.generator(*_with(z, labels))
        return out.to(self.dtype)

    def critic(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Logits, in the parameters' precision: the input of the final sigmoid where there is one."""
        hook = self.sigmoid.register_forward_hook(lambda m, args, out: args[0]) if self.sigmoid else None
        try:
            logits: Tensor = self.discriminator(*_with(x, labels))
        finally:
            if hook is not None:
                hook.remove()
        return logits.to(self.dtype)

    @torch.enable_grad()
    def discriminator_gradients(
        self, phase: Phase, points: Points, params: Sequence[Tensor], measured: dict[str | int, Tensor]
    ) -> Grads:
        """Gradients of a discriminator's phase; writes figures to ``measured``, the penalty under its interval."""
        adversarial = penalty = None
        if phase.adversarial:
            with mark("D forward"):
                with self.arithmetic.reduced():
                    r, f = points.logits("real"), points.logits("fake")
                adversarial = self.loss.discriminator(r, f).mean()
                for name, value in (("d_loss", adversarial), ("d_real", r.mean()), ("d_fake", f.mean())):
                    measured[name].copy_(value.detach())
        if phase.penalties:
            # logits are shared where their precision allows
            points = points if self.arithmetic.is_full else Points(self, points.samples, points.differentiated)
            with mark("penalty"), self.arithmetic.full():
                penalty = torch.stack([p.rows(points.gradient(p)).mean() for p in phase.penalties]).sum()
            measured[phase.every].copy_(penalty.detach())
            penalty = penalty * phase.every if phase.every > 1 else penalty
        with mark("D backward"):
            return self._differentiate(adversarial, penalty, params)

    @torch.enable_grad()
    def generator_gradients(
        self, z: Tensor, real: Tensor | None, labels: Tensor | None, params: Sequence[Tensor], measured: Tensor
    ) -> Grads:
        """Gradients of the generator's update; its loss is written to ``measured``."""
        assert self.generator is not None
        r = None
        with mark("G forward"):
            if real is not None:
                with torch.no_grad(), self.arithmetic.reduced():
                    r = self.critic(real, labels)
            with self.arithmetic.reduced():
                f = self.critic(self.generator(*_with(z, labels)), labels)
            loss = self.loss.generator(f, r).mean()
            measured.copy_(loss.detach())
        with mark("G backward"):
            return self._differentiate(loss, None, params)

    def _differentiate(self, adversarial: Tensor | None, penalty: Tensor | None, params: Sequence[Tensor]) -> Grads:
        """In full precision the gradient of the sum, otherwise of each part in its own precision."""
        if self.arithmetic.is_full:
            terms = [term for term in (adversarial, penalty) if term is not None]
            parts = [(terms[0] if len(terms) == 1 else terms[0] + terms[1], False)]
        else:
            parts = [(term, i == 0) for i, term in enumerate((adversarial, penalty)) if term is not None]
        total: Grads = [None] * len(params)
        wanted = [i for i, p in enumerate(params) if p.requires_grad]  # some may have been frozen since
        for value, reduced in parts:
            if not wanted or not value.requires_grad:  # as a penalty on a gradient that no trained parameter is part of
                continue
            scale = self.scale if reduced and self.arithmetic.precision == "fp16" else None
            tf32 = reduced and self.arithmetic.precision == "tf32"
            with self.arithmetic.matmul("high" if tf32 else "highest"):
                grads = torch.autograd.grad(value, [params[i] for i in wanted], scale, allow_unused=True)
            for i, g in zip(wanted, grads, strict=True):
                if g is not None:
                    before, g = total[i], g if scale is None else g / scale
                    total[i] = g if before is None else before + g
        return total


class Points:
    """The samples of one discriminator update, their logits and their gradients, each made when first asked for.

    ``differentiated``: whether gradients to the samples will be asked for.
    """

    def __init__(self, autograd: Autograd, samples: Samples, differentiated: bool) -> None:
        self.autograd, self.samples, self.differentiated = autograd, samples, differentiated
        self._x: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}
        self._gradient: dict[str, Tensor] = {}

    def logits(self, place: Place) -> Tensor:
        """Logits of the real or the fake samples, ``[rows, ...]``."""
        return self._logits_at(place, self.samples.real if place == "real" else self.samples.fake)

    def gradient(self, penalty: Penalty) -> Tensor:
        """Gradient of each row's summed logits with respect to the row, differentiable, ``[rows, ...]``."""
        key = f"perturbed by {penalty.noise}" if isinstance(penalty, Perturbing) else penalty.place
        if key not in self._gradient:
            logits = self._logits_at(key, self._at(penalty))
            (g,) = torch.autograd.grad(logits.sum(), self._x[key], create_graph=True)
            packed = self.autograd.packed
            self._gradient[key] = g if packed == 1 else g.reshape(len(g) // packed, -1)
        return self._gradient[key]

    def _logits_at(self, key: str, x: Tensor) -> Tensor:
        if key not in self._logits:
            self._x[key] = x.detach().requires_grad_(self.differentiated)
            self._logits[key] = self.autograd.critic(self._x[key], self.samples.labels)
        return self._logits[key]

    def _at(self, penalty: Penalty) -> Tensor:
        s = self.samples
        if penalty.place == "real":
            return s.real
        if penalty.place == "fake":
            return s.fake
        if penalty.place == "interpolated":
            assert s.alpha is not None
            alpha = s.alpha.repeat_interleave(self.autograd.packed).view(-1, *[1] * (s.real.ndim - 1))
            return alpha * s.real + (1 - alpha) * s.fake
        if isinstance(penalty, Perturbing):
            assert s.delta is not None
            return s.real + penalty.noise * s.delta
        raise InputError(
            f"penalty {penalty.name!r}: place is {penalty.place!r}, expected real, fake, interpolated, "
            "or perturbed and an attribute noise"
        )


def _with(x: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if labels is None else (x, labels)
