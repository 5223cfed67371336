"""Memory that tells on a kernel: what it does not write, writes beside its output, reads beside its input, or changes.

Every tensor lies in a larger buffer whose margins hold a pattern that reads as NaN in all floating types and differs
from tensor to tensor, so that copying a margin into a margin is noticed too. The address of a tensor without elements
is null: what is written there ends the process.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

MARGIN = 512  # bytes on each side; keeps the alignment that torch gives
_empty = torch.empty


def _span(size: torch.Size, stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor."""
    return 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


@dataclass
class _Guarded:
    buffer: torch.Tensor  # [MARGIN + bytes + MARGIN], uint8
    before: torch.Tensor
    margins: bool  # whether only those are to stay as they are

    def changed(self) -> torch.Tensor:
        differs = self.buffer != self.before
        if self.margins:
            differs[MARGIN:-MARGIN] = False
        return differs.nonzero().flatten() - MARGIN


@dataclass
class Guard:
    """Keeps guarded tensors and looks after them.

    Attributes:
        poison: what new floating memory holds, with either sign; an integer's holds the pattern of the margins.
    """

    poison: float = float("nan")
    _kept: dict[str, _Guarded] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def _place(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A guarded tensor of a tensor's shape, strides and type, and its buffer."""
        span = _span(like.shape, like.stride())
        buffer = _empty(2 * MARGIN + span * like.element_size(), dtype=torch.uint8, device=like.device)
        buffer.fill_(0xFF)
        buffer[0::2] = 0xF1 + next(self._numbers) % 15
        out = _empty(0, dtype=like.dtype, device=like.device)
        return out.set_(buffer.untyped_storage(), MARGIN // like.element_size(), like.shape, like.stride()), buffer

    def input(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor with its strides, of which no byte may change, also between its elements."""
        out, buffer = self._place(t)
        if any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True)):  # expanded
            span = (_span(t.shape, t.stride()),)
            out.as_strided(span, (1,)).copy_(t.detach().as_strided(span, (1,)))
        else:
            out.copy_(t.detach())
        self._kept[f"{name} {next(self._numbers)}"] = _Guarded(buffer, buffer.clone(), margins=False)
        return out

    def output(self, like: torch.Tensor, name: str, value: float | None = None) -> torch.Tensor:
        """New memory with a tensor's shape, strides and type: poisoned, or of one value."""
        out, buffer = self._place(like)
        if value is not None:
            out.fill_(value)
        elif out.is_floating_point():
            out.fill_(self.poison)
            out.as_strided((_span(out.shape, out.stride()),), (1,))[::2].neg_()
        self._kept[f"{name} {next(self._numbers)}"] = _Guarded(buffer, buffer.clone(), margins=True)
        return out

    def check(self) -> None:
        """Fail if a byte was written where none may be."""
        for name, kept in self._kept.items():
            where = kept.changed().tolist()
            what = "was written beside" if kept.margins else "is an input and was overwritten"
            size = kept.buffer.numel() - 2 * MARGIN
            assert not where, f"{name} {what}, at bytes {where[0]} to {where[-1]} of {size}"

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        """Guard what is allocated through torch in the block; checked at its end."""
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, value in (
                (torch, "empty", None),
                (torch, "empty_like", None),
                (torch, "empty_strided", None),
                (torch, "zeros", 0.0),
                (torch, "zeros_like", 0.0),
                (torch.Tensor, "new_empty", None),
                (torch.Tensor, "new_empty_strided", None),
                (torch.Tensor, "new_zeros", 0.0),
            ):
                patch.setattr(owner, name, self._guarded(getattr(owner, name), name, value))
            yield
        self.check()

    def _guarded(self, allocate: Callable[..., torch.Tensor], name: str, value: float | None) -> Callable:
        def guarded(*args: object, **kwargs: object) -> torch.Tensor:
            like = allocate(*args, **kwargs)
            if type(like) is not torch.Tensor or like.is_meta or like.layout != torch.strided:
                return like
            return self.output(like, f"memory of {name}", value).requires_grad_(like.requires_grad)

        return guarded


@contextlib.contextmanager
def programs_in_reverse() -> Iterator[None]:
    """The interpreter runs the programs of a launch from the last to the first. A GPU gives no order to choose."""
    from triton.runtime.interpreter import interpreter_builder

    forward = interpreter_builder.set_grid_idx

    def backward(*index: int) -> None:
        forward(*(n - 1 - i for n, i in zip(interpreter_builder.grid_dim, index, strict=True)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_idx", backward)
        yield
