"""Is a variant right? Its first iterations are held to the same ones in fp64, by hand, on the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastgan.benchmark.by_hand import Form
from fastgan.benchmark.variants import Way, by_hand
from fastgan.benchmark.workloads import Case

Tensor = torch.Tensor
ITERATIONS = 2
# relative, in the norm over all parameters: of Adam's first moments (the last gradients, averaged), and of the way that
# the parameters have gone, where elements whose gradient is all rounding may go the other way. A variant may err twice
# as much as plain PyTorch in its precision, and this besides, for rows that cross a kink in one of them alone
FLOOR = {"fp32": (1e-3, 0.02), "tf32": (0.01, 0.1), "bf16": (0.03, 0.1), "fp64": (1e-9, 1e-6)}
MOST = (0.5, 0.7)  # beyond it nothing is held to anything


@dataclass(frozen=True)
class Error:
    """How far a variant is from the reference.

    Attributes:
        moments, way: relative distances.
        limits: of both.
    """

    moments: float
    way: float
    limits: tuple[float, float]

    @property
    def share(self) -> float:
        """The larger one, of its limit."""
        found = max(self.moments / self.limits[0], self.way / self.limits[1])
        return found if math.isfinite(found) else math.inf

    @property
    def right(self) -> bool:
        return self.share <= 1


def distance(a: Sequence[Tensor], b: Sequence[Tensor], start: Sequence[Tensor] | None = None) -> float:
    """Relative, in the norm over all tensors; with ``start``, of the ways from there."""
    x, y = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (a, b))
    origin = torch.cat([t.detach().double().flatten() for t in start]) if start is not None else torch.zeros_like(y)
    return float((x - y).norm() / (y - origin).norm())


@dataclass
class Reference:
    """The iterations in fp64.

    Attributes:
        case: what is trained.
        iterations: how many are held.
    """

    case: Case
    iterations: int = ITERATIONS
    _after: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = field(default=None, repr=False)
    _limits: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    def hold(self, way: Way, precision: str) -> Error:
        """Run a variant's first iterations and compare.

        Raises:
            Unable: the reference's loop does not do what the case asks for.
        """
        found = self._distances(way)
        if precision not in self._limits:
            plain = by_hand(replace(self.case, precision=precision), Form(amp=precision == "bf16"))
            own = self._distances(plain)
            floors = FLOOR[precision]
            self._limits[precision] = tuple(  # type: ignore[assignment]
                min(2 * e + floor, most) for e, floor, most in zip(own, floors, MOST, strict=True)
            )
        return Error(*found, self._limits[precision])

    def _distances(self, way: Way) -> tuple[float, float]:
        if self._after is None:
            self._after = self._iterated(by_hand(self.case, dtype=torch.float64))
        start, after, moments = self._after
        own_start, own_after, own_moments = self._iterated(way)
        if any(not torch.equal(a, b.to(a.dtype)) for a, b in zip(own_start, start, strict=True)):
            return float("inf"), float("inf")  # from another start
        apart = distance(own_moments, moments) if moments and len(moments) == len(own_moments) else 0.0
        return apart, distance(own_after, after, start)

    def _iterated(self, way: Way) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters before, and parameters and moments after; dropout, which draws in an order of its own, is off."""
        dropouts = [(m, m.p) for net in way.networks for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        for m, _ in dropouts:
            m.p = 0.0
        start = [p.detach().clone() for p in way.parameters]
        with way.precision():
            for i in range(self.iterations):
                way.held(i)
        for m, p in dropouts:
            m.p = p
        return start, [p.detach().clone() for p in way.parameters], [m.clone() for m in way.moments()]
