"""Is a variant right? Its first iterations are held to the same ones in fp64, by hand, on the same noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastgan.benchmark.by_hand import Form, Unable
from fastgan.benchmark.variants import Way, by_hand, plain_engine
from fastgan.benchmark.workloads import Case

Tensor = torch.Tensor
ITERATIONS = 2
# relative, in the norm over all parameters: of Adam's first moments (the last gradients, averaged), and of the way that
# the parameters have gone, where elements whose gradient is all rounding may go the other way. A variant may err twice
# as much as plain PyTorch in its precision, and this besides, for rows that cross a kink in one of them alone
FLOOR = {"fp32": (1e-3, 0.02), "tf32": (0.01, 0.1), "bf16": (0.01, 0.05), "fp64": (1e-9, 1e-6)}
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
        return max(self.moments / self.limits[0], self.way / self.limits[1])

    @property
    def right(self) -> bool:
        return self.share <= 1

    def sentence(self) -> str:
        """What is wrong."""
        if not math.isfinite(self.moments):
            return "it does not start from the same parameters, or gives numbers that are not finite"
        off, limit = (self.moments, self.limits[0]) if self.moments > self.limits[0] else (self.way, self.limits[1])
        what = "gradients are" if self.moments > self.limits[0] else "parameters have gone"
        return f"its {what} {off:.2g} off those in fp64 (relative), where rounding explains {limit:.2g}"


def distance(a: Sequence[Tensor], b: Sequence[Tensor], start: Sequence[Tensor] | None = None) -> float:
    """Relative, in the norm over all tensors; with ``start``, of the ways from there; infinite for no number."""
    x, y = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (a, b))
    origin = torch.cat([t.detach().double().flatten() for t in start]) if start is not None else torch.zeros_like(y)
    off, size = float((x - y).norm()), float((y - origin).norm())
    found = off / size if size else (math.inf if off else 0.0)
    return found if math.isfinite(found) else math.inf


@dataclass
class Reference:
    """The iterations in fp64.

    Attributes:
        case: what is trained.
        iterations: how many are held.
    """

    case: Case
    iterations: int = ITERATIONS
    _after: list[_Player] | None = field(default=None, repr=False)
    _limits: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    def hold(self, way: Way, precision: str) -> Error:
        """Run a variant's first iterations and compare."""
        found = self._distances(way)
        if precision not in self._limits:
            own = self._distances(self._plain(precision))
            floors = FLOOR[precision]
            self._limits[precision] = tuple(  # type: ignore[assignment]
                min(2 * e + floor, most) for e, floor, most in zip(own, floors, MOST, strict=True)
            )
        return Error(*found, self._limits[precision])

    def exact(self) -> list[_Player]:
        """What the iterations make of each player in fp64."""
        if self._after is None:
            self._after = self._iterated(self._plain("fp64"))
        return self._after

    def _plain(self, precision: str) -> Way:
        """By hand, or where the loop does not do what the case asks for, by the engine through autograd."""
        dtype = torch.float64 if precision == "fp64" else None
        case = self.case if precision == "fp64" else replace(self.case, precision=precision)
        try:
            return by_hand(case, Form(amp=precision == "bf16"), dtype)
        except Unable:
            return plain_engine(case, dtype=dtype)

    def _distances(self, way: Way) -> tuple[float, float]:
        """The largest of both players', and of what follows them."""
        worst = (0.0, 0.0)
        players = self._iterated(way)
        if len(players) != len(self.exact()):
            return math.inf, math.inf  # something that follows is not there
        for mine, exact in zip(players, self.exact(), strict=True):
            if any(not torch.equal(a, b.to(a.dtype)) for a, b in zip(mine.start, exact.start, strict=True)):
                return math.inf, math.inf  # from another start
            known = len(mine.moments) == len(exact.moments)
            apart = distance(mine.moments, exact.moments) if known and exact.moments else 0.0
            worst = max(worst[0], apart), max(worst[1], distance(mine.after, exact.after, exact.start))
        return worst

    def _iterated(self, way: Way) -> list[_Player]:
        """What the iterations make of each player; dropout, which draws in an order of its own, is off."""
        modules = [m for net in way.networks for m in net.modules()]
        dropouts = [(m, m.p) for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]
        for m, _ in dropouts:
            m.p = 0.0
        start, followers = [_copies(net.parameters()) for net in way.networks], [_copies(of) for of in way.followers]
        with way.precision():
            for i in range(self.iterations):
                way.held(i)
        for m, p in dropouts:
            m.p = p
        after = [_copies(net.parameters()) for net in way.networks]
        players = [_Player(*parts) for parts in zip(start, after, map(_copies, way.moments()), strict=True)]
        return players + [_Player(was, _copies(of), []) for was, of in zip(followers, way.followers, strict=True)]


@dataclass(frozen=True)
class _Player:
    start: list[Tensor]
    after: list[Tensor]
    moments: list[Tensor]


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]
