"""Mixtures of Gaussians in the plane with known modes: a fixed table of points, drawn once.

Source: the 25-mode grid and the 8-mode ring of VEEGAN (Srivastava et al. 2017) and PacGAN (Lin et al. 2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastgan.noise import Stream, integers, normal

_POINTS = 100_000


class Modes(NamedTuple):
    """Where a toy's mass is.

    Attributes:
        centers: float32 ``[K, 2]``, in the units that the data set gives.
        sigma: standard deviation of each mode along each axis.
    """

    centers: torch.Tensor
    sigma: float


def grid25() -> Modes:
    """5 by 5 modes on -4 … 4 in steps of 2, sigma 0.05."""
    side = torch.arange(-4.0, 5.0, 2.0)
    return Modes(torch.cartesian_prod(side, side), 0.05)


def ring8() -> Modes:
    """8 modes on a circle of radius 2, sigma 0.02."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return Modes((2.0 * torch.stack([angle.cos(), angle.sin()], dim=1)).float(), 0.02)


TOYS = {"gaussians25": grid25, "gaussians8": ring8}


def draw(modes: Modes) -> torch.Tensor:
    """100,000 points, float32 ``[100000, 2]``, the same at every call."""
    which = integers(_POINTS, len(modes.centers), seed=0, stream=Stream.TOY, step=0, device="cpu")
    noise = normal(_POINTS, 2, seed=0, stream=Stream.TOY, step=1, device="cpu")
    return modes.centers[which] + modes.sigma * noise
