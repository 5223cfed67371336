"""Gradient penalties: functions of the gradient of the summed logits of each sample with respect to that sample.

With ``g_i = d D(x_i) / d x_i`` over all non-batch axes and means over the batch:

    GradientPenalty  weight * E(|g| - target)^2   at x = alpha real + (1 - alpha) fake    Gulrajani et al. 2017
    R1               gamma / 2 * E|g|^2           at real samples                         Mescheder et al. 2018
    R2               gamma / 2 * E|g|^2           at fake samples                         Mescheder et al. 2018
    DRAGAN           weight * E(|g| - target)^2   at x = real + noise * N(0, 1)           Kodali et al. 2017

A penalty with ``interval=k > 1`` is lazy: after every k-th discriminator update (the first one included) the
discriminator takes one more, on k times the penalty alone, and its Adam runs with lr, beta1 and beta2
adjusted by c = 1 / (1 + 1/k): lr * c, beta ** c (Karras et al. 2020, "lazy regularization").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from fastgan.errors import InputError

Place = Literal["real", "fake", "interpolated", "perturbed"]


class Penalty(Protocol):
    """What the engine asks of a penalty; any object with these will do."""

    @property
    def name(self) -> str:
        """Shown by ``Engine.explain()``."""

    @property
    def place(self) -> Place:
        """The samples at which the gradient is taken."""

    @property
    def interval(self) -> int:
        """1, or every how many discriminator updates it is applied."""

    def rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """Weighted penalty of each sample, ``[B, ...] -> [B]``; the mean over the batch is minimised."""


@runtime_checkable
class Perturbing(Penalty, Protocol):
    """What a penalty at ``perturbed`` samples has besides."""

    @property
    def noise(self) -> float:
        """Standard deviation of the Gaussian noise that is added to the real samples."""


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean norm over all non-batch axes, ``[B, ...] -> [B]``."""
    return gradient.flatten(1).square().sum(1)


def norm(gradient: torch.Tensor) -> torch.Tensor:
    """Euclidean norm over all non-batch axes, ``[B, ...] -> [B]``; its derivative at 0 is 0."""
    return (squared_norm(gradient) + torch.finfo(gradient.dtype).tiny).sqrt()


def _check(penalty: GradientPenalty | R1 | R2 | DRAGAN, **values: float) -> None:
    for key, value in values.items():
        if not value >= 0:
            raise InputError(f"{penalty.name}: {key} is {value}, expected >= 0")
    if not (isinstance(penalty.interval, int) and penalty.interval >= 1):
        raise InputError(f"{penalty.name}: interval is {penalty.interval}, expected a whole number >= 1")


@dataclass(frozen=True)
class GradientPenalty:
    """WGAN-GP: ``weight * E(|g| - target)^2`` at one random point on each line from a fake to a real sample."""

    weight: float = 10.0
    target: float = 1.0
    interval: int = 1
    name: ClassVar[str] = "gradient-penalty"
    place: ClassVar[Place] = "interpolated"

    def __post_init__(self) -> None:
        _check(self, weight=self.weight, target=self.target)

    def rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """``[B, ...] -> [B]``."""
        return self.weight * (norm(gradient) - self.target).square()


@dataclass(frozen=True)
class R1:
    """``gamma / 2 * E|g|^2`` at real samples."""

    gamma: float
    interval: int = 1
    name: ClassVar[str] = "r1"
    place: ClassVar[Place] = "real"

    def __post_init__(self) -> None:
        _check(self, gamma=self.gamma)

    def rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """``[B, ...] -> [B]``."""
        return (self.gamma / 2) * squared_norm(gradient)


@dataclass(frozen=True)
class R2:
    """``gamma / 2 * E|g|^2`` at fake samples."""

    gamma: float
    interval: int = 1
    name: ClassVar[str] = "r2"
    place: ClassVar[Place] = "fake"

    def __post_init__(self) -> None:
        _check(self, gamma=self.gamma)

    def rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """``[B, ...] -> [B]``."""
        return (self.gamma / 2) * squared_norm(gradient)


@dataclass(frozen=True)
class DRAGAN:
    """``weight * E(|g| - target)^2`` at real samples with Gaussian noise of standard deviation ``noise`` added."""

    weight: float = 10.0
    noise: float = 0.5
    target: float = 1.0
    interval: int = 1
    name: ClassVar[str] = "dragan"
    place: ClassVar[Place] = "perturbed"

    def __post_init__(self) -> None:
        _check(self, weight=self.weight, noise=self.noise, target=self.target)

    def rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """``[B, ...] -> [B]``."""
        return self.weight * (norm(gradient) - self.target).square()


PENALTIES: dict[str, Callable[..., Penalty]] = {p.name: p for p in (GradientPenalty, R1, R2, DRAGAN)}
