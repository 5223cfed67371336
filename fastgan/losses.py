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
from torch.nn.functional import relu, softplus

from fastgan.errors import InputError, unknown


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


def _relativistic_generator(f: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
    assert r is not None  # the engine gives real logits where `compares` is set
    return softplus(r - f)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("minimax", lambda r, f: softplus(-r) + softplus(f), lambda f, r: -softplus(f)),
        Loss("non-saturating", lambda r, f: softplus(-r) + softplus(f), lambda f, r: softplus(-f)),
        Loss("wasserstein", lambda r, f: f - r, lambda f, r: -f),
        Loss("hinge", lambda r, f: relu(1 - r) + relu(1 + f), lambda f, r: -f),
        Loss("least-squares", lambda r, f: ((r - 1).square() + f.square()) / 2, lambda f, r: (f - 1).square() / 2),
        Loss("relativistic", lambda r, f: softplus(f - r), _relativistic_generator, compares=True),
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
