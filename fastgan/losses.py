"""Adversarial losses, from logits.

With logits ``r = D(x)`` and ``f = D(G(z))``, each the mean over all their elements:

    minimax         D  softplus(-r) + softplus(f)     G  -softplus(f)            Goodfellow et al. 2014
    non-saturating  D  softplus(-r) + softplus(f)     G  softplus(-f)            Goodfellow et al. 2014
    wasserstein     D  f - r                          G  -f                      Arjovsky et al. 2017
    hinge           D  relu(1 - r) + relu(1 + f)      G  -f                      Miyato et al. 2018
    least-squares   D  (r - 1)^2 / 2 + f^2 / 2        G  (f - 1)^2 / 2           Mao et al. 2017
    relativistic    D  softplus(-(r - f))             G  softplus(-(f - r))      Huang et al. 2024
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from torch.nn.functional import relu

from fastgan.errors import InputError, unknown


def softplus(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + exp(x))``: torch takes ``x`` itself from 20 on by default, which leaves out 2e-9 there."""
    return F.softplus(x, threshold=40.0)


@dataclass(frozen=True)
class Loss:
    """What the two players minimise.

    Attributes:
        name: shown by ``Engine.explain()``.
        discriminator: ``(real logits, fake logits) -> losses``, elementwise; the mean is minimised.
        generator: ``(fake logits, real logits or None) -> losses``, elementwise; the mean is minimised.
        compares: whether the generator's loss needs real logits (they come without gradient).
        clip: the discriminator's parameters are clamped to ``[-clip, clip]`` after each of its updates
            (Arjovsky et al. 2017); ``None`` for no clipping.
    """

    name: str
    discriminator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    generator: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    compares: bool = False
    clip: float | None = None


Logits = torch.Tensor


def _cross_entropy(r: Logits, f: Logits) -> torch.Tensor:
    return softplus(-r) + softplus(f)


def _minimax_generator(f: Logits, r: Logits | None) -> torch.Tensor:
    return -softplus(f)


def _non_saturating_generator(f: Logits, r: Logits | None) -> torch.Tensor:
    return softplus(-f)


def _wasserstein(r: Logits, f: Logits) -> torch.Tensor:
    return f - r


def _higher(f: Logits, r: Logits | None) -> torch.Tensor:
    return -f


def _hinge(r: Logits, f: Logits) -> torch.Tensor:
    return relu(1 - r) + relu(1 + f)


def _least_squares(r: Logits, f: Logits) -> torch.Tensor:
    return ((r - 1).square() + f.square()) / 2


def _least_squares_generator(f: Logits, r: Logits | None) -> torch.Tensor:
    return (f - 1).square() / 2


def _relativistic(r: Logits, f: Logits) -> torch.Tensor:
    return softplus(f - r)


def _relativistic_generator(f: Logits, r: Logits | None) -> torch.Tensor:
    assert r is not None  # the engine gives real logits where `compares` is set
    return softplus(r - f)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (  # named functions, so that an engine can be pickled
        Loss("minimax", _cross_entropy, _minimax_generator),
        Loss("non-saturating", _cross_entropy, _non_saturating_generator),
        Loss("wasserstein", _wasserstein, _higher),
        Loss("hinge", _hinge, _higher),
        Loss("least-squares", _least_squares, _least_squares_generator),
        Loss("relativistic", _relativistic, _relativistic_generator, compares=True),
    )
}


def get(loss: str | Loss, *, clip: float | None = None) -> Loss:
    """The loss of that name, with weight clipping if ``clip`` is given.

    Args:
        loss: one of ``LOSSES``, or a :class:`Loss`, which comes back as it is.
        clip: bound of the discriminator's parameters, ``> 0``.

    Raises:
        InputError: the name is unknown, or ``clip`` is not positive.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES)
        loss = LOSSES[loss]
    if not isinstance(loss, Loss):
        raise InputError(f"loss is {loss!r}, expected a name or a fastgan.losses.Loss")
    if clip is None:
        return loss
    if not clip > 0:
        raise InputError(f"loss: clip is {clip}, expected > 0")
    return replace(loss, clip=clip)
