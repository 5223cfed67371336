"""Exponential moving average of the generator."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fastgan.errors import InputError


@dataclass(frozen=True)
class EMA:
    """How fast the averaged generator follows: by a fixed decay, or by a half-life in images.

    Attributes:
        decay: factor of the average at each generator update, in ``[0, 1)``.
        halflife_kimg: thousands of real images after which an old value counts half (Karras et al. 2020).
        rampup: with a half-life, limits it to this fraction of the images shown so far; ``None`` for no limit.
    """

    decay: float | None = None
    halflife_kimg: float | None = None
    rampup: float | None = None

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.halflife_kimg is None):
            raise InputError(f"EMA: give either decay or halflife_kimg, got {self.decay} and {self.halflife_kimg}")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise InputError(f"EMA: decay is {self.decay}, expected 0 <= decay < 1")
        if self.halflife_kimg is not None and not self.halflife_kimg > 0:
            raise InputError(f"EMA: halflife_kimg is {self.halflife_kimg}, expected > 0")
        if self.rampup is not None and (self.decay is not None or not self.rampup > 0):
            raise InputError(f"EMA: rampup is {self.rampup}, expected > 0 and only with halflife_kimg")

    def weight(self, images: torch.Tensor, new_images: torch.Tensor) -> float | torch.Tensor:
        """Weight of the new value.

        Args:
            images: real images shown so far, 0-dim integer tensor.
            new_images: of them, those since the last average.
        """
        if self.decay is not None:
            return 1 - self.decay
        assert self.halflife_kimg is not None
        halflife = torch.full_like(images, 1, dtype=torch.float64) * (self.halflife_kimg * 1000)
        if self.rampup is not None:
            halflife = torch.minimum(halflife, images.double() * self.rampup)
        return 1 - torch.exp2(-new_images.double() / halflife.clamp(min=1e-8))


@dataclass(frozen=True)
class Average:
    """A module that follows another, and what says how fast.

    Attributes:
        module: a copy of the module that is followed.
        rule: how fast.
        images: real images shown so far, int64 0-dim.
        averaged: those of them that were shown at the last average, int64 0-dim; every average sets it.
    """

    module: nn.Module
    rule: EMA
    images: torch.Tensor
    averaged: torch.Tensor

    def weight(self) -> float | torch.Tensor:
        """Weight of the new value in the average that is due."""
        return self.rule.weight(self.images, self.images - self.averaged)


def copy_of(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters take no gradient."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def pairs(average: nn.Module, module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Averaged and new tensors: parameters and buffers."""
    old, new = ((*m.parameters(), *m.buffers()) for m in (average, module))
    return list(zip(old, new, strict=True))


@torch.no_grad()
def follow(tensors: Iterable[tuple[torch.Tensor, torch.Tensor]], weight: float | torch.Tensor) -> None:
    """Move averaged tensors towards new ones: floating ones by ``weight``, others at once."""
    for old, new in tensors:
        if old.is_floating_point():
            old.lerp_(new, weight.to(old.dtype) if isinstance(weight, torch.Tensor) else weight)
        else:
            old.copy_(new)
