"""The phases of an iteration: data that says who is updated, from what, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastgan.penalties import Penalty


@dataclass(frozen=True, eq=False)
class Phase:
    """One update of one player.

    Attributes:
        player: whose parameters change.
        adversarial: whether the loss is part of it.
        penalties: gradient penalties that are part of it.
        every: runs after every so many updates of the player, the first one included.
    """

    player: Literal["discriminator", "generator"]
    adversarial: bool
    penalties: tuple[Penalty, ...] = ()
    every: int = 1
