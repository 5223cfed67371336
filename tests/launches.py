"""Memory for launches under test: outputs start as NaN, and what lies around them must not change."""

from __future__ import annotations

import numpy as np
import torch
from closeness import assert_as_accurate

_MARGIN = 3  # rows and columns around a matrix, elements around a vector
_CANARY = 77.0


class Guarded:
    """Allocates outputs inside larger ones; ``check`` finds what a launch wrote beside them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def new(self, *shape: int, dtype: torch.dtype, like: torch.Tensor | None = None) -> torch.Tensor:
        """NaN, or the values of ``like``, in the middle of canaries; rows are further apart than they are long."""
        outer = torch.full([size + 2 * _MARGIN for size in shape] or [1 + 2 * _MARGIN], _CANARY, dtype=dtype,
                           device=self.device)  # fmt: skip
        inside = torch.zeros_like(outer, dtype=torch.bool)
        middle = tuple(slice(_MARGIN, _MARGIN + size) for size in shape) or (_MARGIN,)
        inside[middle] = True
        view = outer[middle]
        view.copy_(like) if like is not None else view.fill_(float("nan"))
        self._made.append((outer, inside, view))
        return view

    def check(self) -> None:
        for outer, inside, view in self._made:
            assert bool((outer[~inside] == _CANARY).all()), f"canaries around {tuple(view.shape)} were overwritten"


def strided(t: torch.Tensor, pad: int = 5) -> torch.Tensor:
    """The same matrix with rows further apart, NaN between them."""
    wide = torch.full((t.shape[0], t.shape[1] + pad), float("nan"), dtype=t.dtype, device=t.device)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of fp64 matrices, summed in extended precision and rounded once: exact where plain fp64 is not."""
    a_, b_ = (t.cpu().numpy().astype(np.longdouble) for t in (a, b))
    return torch.from_numpy((a_ @ b_).astype(np.float64)).to(a.device)


__all__ = ["Guarded", "assert_as_accurate", "matmul", "strided"]
