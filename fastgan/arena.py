"""One network's parameters, gradients and moments in flat tensors, so that an update is one pass over memory.

The layout is ``[p1|p2|...]``, each parameter padded to a multiple of :data:`PAD` elements. The module's parameters
become views: ``state_dict()``, ``load_state_dict()`` and in-place changes by the user go on working, and so do copies
and pickles of the module (they hold the parameters' memory once, not once per parameter).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastgan.errors import InputError

PAD = 128  # elements
_BLOCK = 2048  # elements that a native pass treats at once: five such parts fit the first-level cache


def obstacle(params: Sequence[tuple[str, torch.Tensor]]) -> str | None:
    """Why parameters cannot share one flat tensor, in words, or ``None`` where they can."""
    first_name, first = params[0]
    if first.dtype not in (torch.float32, torch.float64):
        return f"parameter {first_name!r} is {first.dtype}, expected float32 or float64"
    for name, p in params:
        if (p.dtype, p.device) != (first.dtype, first.device):
            return f"parameter {name!r} is {_kind(p)}, {first_name!r} is {_kind(first)}"
        if p.layout != torch.strided or not _holds_each_number_once(p):
            return f"parameter {name!r} is not dense"
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name) for name, p in params if p.numel())
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            return f"parameters {name!r} and {other!r} share memory"
    return None


class Arena:
    """Flat tensors of one network, all laid out alike.

    Attributes:
        names, params: as given.
        flat: the parameters, ``[size]``; padding is 0.
        grad: gradients, ``[size]``.
        exp_avg, exp_avg_sq: Adam's moments, ``[size]``; empty where another optimiser keeps its own.
        average: the averaged parameters, ``[size]``, or ``None``.
        views: parameters in ``flat``, of each parameter's shape and strides.
        grads: the same in ``grad``.
        offsets: where each parameter begins.
        blocks: parts of parameters, int64 ``[n, 3]`` of (begin, length, parameter), on the CPU.
    """

    def __init__(
        self,
        params: Sequence[tuple[str, nn.Parameter]],
        average: Sequence[torch.Tensor] | None = None,
        *,
        moments: bool = True,
    ) -> None:
        """Move parameters into one flat tensor: they keep their values and become views of it.

        Args:
            params: names and parameters, each parameter once: fp32 or fp64, of one dtype and device.
            average: one tensor per parameter, of its shape, dtype and device, which become views too.
            moments: whether Adam's moments are kept here.

        Raises:
            InputError: the parameters cannot share a flat tensor; see :func:`obstacle`.
        """
        if (why := obstacle(params)) is not None:
            raise InputError(f"Arena: {why}")
        self.names, self.params = [n for n, _ in params], [p for _, p in params]
        self._averages = list(average or ())
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self.params]  # dense: kept
        self.offsets, self.size = [], 0
        for p in self.params:
            self.offsets.append(self.size)
            self.size += -(-p.numel() // PAD) * PAD
        first = self.params[0]
        sizes = (self.size, self.size, *[self.size if moments else 0] * 2)
        self.flat, self.grad, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(n, dtype=first.dtype, device=first.device) for n in sizes
        )
        self.average = torch.zeros_like(self.flat) if average is not None else None
        self._low: torch.Tensor | None = None
        self._make_views()
        blocks = [
            (offset + i, min(_BLOCK, p.numel() - i), k)
            for k, (p, offset) in enumerate(zip(self.params, self.offsets, strict=True))
            for i in range(0, p.numel(), _BLOCK)
        ]
        self.blocks = torch.tensor(blocks, dtype=torch.int64).view(-1, 3)
        self.attach()

    def _make_views(self) -> None:
        self.views, self.grads = self.views_of(self.flat), self.views_of(self.grad)
        self._average_views = [] if self.average is None else self.views_of(self.average)
        self._at: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: in a pickle each would become memory of its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("views", "grads", "_average_views", "_at")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The parameters are taken in again when :meth:`attach` is called next."""
        self.__dict__.update(state)
        self._make_views()

    def views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's part of a flat tensor of this layout, in the parameter's shape and strides."""
        return [
            flat.as_strided(p.shape, stride, offset)
            for p, stride, offset in zip(self.params, self._strides, self.offsets, strict=True)
        ]

    @property
    def low(self) -> torch.Tensor:
        """The parameters in bf16, ``[size]``: made when first asked for, from then on written by every update.

        A change by the user reaches it with the next update, or with :meth:`refresh`. In fp16 where :meth:`lower` was
        asked for that before.
        """
        return self.lower(torch.bfloat16 if self._low is None else self._low.dtype)

    def lower(self, dtype: torch.dtype) -> torch.Tensor:
        """:attr:`low` in bf16 or fp16; an arena has one of them.

        Raises:
            InputError: it is there in the other.
        """
        if self._low is None:
            self._low = self.flat.to(dtype)
        if self._low.dtype != dtype:
            raise InputError(f"Arena: the copy of the parameters is {self._low.dtype}, expected {dtype}")
        return self._low

    @property
    def has_low(self) -> bool:
        """Whether :attr:`low` was asked for."""
        return self._low is not None

    @property
    def low_dtype(self) -> torch.dtype | None:
        """Of :attr:`low`, where it was asked for."""
        return None if self._low is None else self._low.dtype

    def refresh(self) -> None:
        """Write the parameters to :attr:`low` again."""
        if self._low is not None:
            self._low.copy_(self.flat)

    def attached(self) -> bool:
        """Whether every parameter, and every averaged one, still is the view that it became."""
        return [p.data_ptr() for p in self.params] + [a.data_ptr() for a in self._averages] == self._at

    @torch.no_grad()
    def attach(self) -> None:
        """Take in again what the user has moved to memory of its own: its values are copied into the flat tensor.

        Raises:
            InputError: a parameter has another shape, dtype or device than it had; nothing is changed then.
        """
        pairs = [
            *zip(self.names, self.params, self.views, strict=True),
            *zip(map("average of {}".format, self.names), self._averages, self._average_views, strict=False),
        ]
        moved = [(name, p, view) for name, p, view in pairs if p.data_ptr() != view.data_ptr()]
        for name, p, view in moved:
            if (p.shape, p.dtype, p.device) != (view.shape, view.dtype, view.device):
                raise InputError(
                    f"parameter {name!r} became {_kind(p)} {list(p.shape)}, expected {_kind(view)} {list(view.shape)}"
                )
        for _, p, view in moved:
            view.copy_(p)
            p.data = view
        if any(p is a for _, a, _ in moved for p in self.params):
            self.refresh()
        self._at = [p.data_ptr() for _, p, _ in pairs]

    @torch.no_grad()
    def take(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Copy gradients, one per parameter or ``None``, into :attr:`grad`."""
        given = [(view, g) for view, g in zip(self.grads, grads, strict=True) if g is not None]
        if given:
            torch._foreach_copy_([view for view, _ in given], [g for _, g in given])


def _kind(t: torch.Tensor) -> str:
    return f"{t.dtype} on {t.device}"


def _holds_each_number_once(t: torch.Tensor) -> bool:
    return all(stride > 0 or size <= 1 for size, stride in zip(t.shape, t.stride(), strict=True))
