"""Batches from any iterable or DataLoader, as a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch

from fastgan.data.dataset import _BLOCK, Batch, Dataset, Feed, count, flips_at
from fastgan.data.gather import U8
from fastgan.errors import InputError

_HEAD_ROWS, _HEAD_BYTES = 10_000, 256 << 20


class Stream(Dataset):
    """A data set whose feed reads batches as an iterable gives them.

    Its length, :meth:`~fastgan.data.Dataset.batch` and ``fingerprint`` are those of its head: the first samples, at
    most 10,000, kept as uint8 for figures and pictures. Shapes, range and classes are read off the head too.
    """

    def __init__(self, source: Iterable[Any], *, mirror: bool = False) -> None:
        """Args:
            source: gives tensors ``[B, C, H, W]``, ``[B, H, W]`` or ``[B, D]``, or pairs of such a tensor and int64
                labels ``[B]``; images are uint8 or floats in ``[0, 1]`` or ``[-1, 1]``, tables are taken as they are.
                Every pass over it is one pass over the data; an iterator that cannot restart lasts one pass.
            mirror: whether feeds mirror half of the images.

        Raises:
            InputError: a batch of another kind, or none at all.
        """
        self.source = source
        self._first: list[Any] = []
        self._unit = False
        self.kind, self.shape = "", ()
        iterator = iter(source)
        self._once = iterator if iterator is source else None
        xs: list[torch.Tensor] = []
        ys: list[torch.Tensor] = []
        rows = size = 0
        for item in iterator:
            x, y = _pair(item)
            if not xs:
                self._learn(x)
                self._labelled = y is not None
            x = self._scaled(x)
            self._first.append(item)
            xs.append(_pixels(x) if self.kind == "image" else x)
            ys += [] if y is None else [y]
            rows, size = rows + len(x), size + xs[-1].nbytes
            if rows >= _HEAD_ROWS or size >= _HEAD_BYTES:
                break
        if not rows:
            raise InputError("the stream gives no samples")
        if self._once is None:
            self._first = []
        if len(ys) not in (0, len(xs)):
            raise InputError("the stream gives labels with some of its batches only")
        labels = torch.cat(ys).numpy() if ys else None
        inner = getattr(getattr(source, "dataset", None), "classes", None)
        names = tuple(map(str, inner)) if inner else tuple(map(str, range(0 if labels is None else labels.max() + 1)))
        head: U8 | torch.Tensor = torch.cat(xs) if self.kind == "table" else torch.cat(xs).numpy()
        super().__init__("stream", head, labels=labels, class_names=names if ys else (), mirror=mirror)

    def _learn(self, x: torch.Tensor) -> None:
        if x.ndim not in (2, 3, 4) or not x.numel():
            raise InputError(f"the stream gives shape {tuple(x.shape)}, expected [B, C, H, W], [B, H, W] or [B, D]")
        self.kind = "table" if x.ndim == 2 else "image"
        self.shape = tuple(x.shape[1:]) if x.ndim != 3 else (1, *x.shape[1:])
        if self.kind == "image" and self.shape[0] not in (1, 3):
            raise InputError(f"the stream gives {self.shape[0]} channels, shape {tuple(x.shape)}, expected 1 or 3")
        self._unit = x.is_floating_point() and bool(x.min() >= 0)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """One batch as float32 ``[B, *shape]``, images in ``[-1, 1]``."""
        if x.ndim == 3:
            x = x.unsqueeze(1)
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"the stream gives shape {tuple(x.shape)}, expected (B, {', '.join(map(str, self.shape))})"
            )
        x = x.detach().cpu()
        if self.kind == "image" and x.dtype == torch.uint8:
            return x.float() * (2 / 255) - 1
        x = x.float()
        low, high = (float(v) for v in x.aminmax()) if len(x) else (0.0, 0.0)
        if self.kind == "table":
            if not np.isfinite(low + high):
                raise InputError("the stream gives a value that is not finite")
            return x
        least = 0 if self._unit else -1
        if not (least <= low and high <= 1):
            raise InputError(f"the stream gives images in {low:g} … {high:g}, expected [{least}, 1]")
        return x * 2 - 1 if self._unit else x

    def read(self) -> Iterator[Batch]:
        """One pass: checked batches as the source gives them.

        Raises:
            InputError: a batch unlike the first, or an iterator that was used up.
        """
        source: Iterable[Any] = self.source
        if self._once is not None:
            source, self._first = chain(self._first, self._once), []
        empty = True
        for item in source:
            x, y = _pair(item)
            if (y is not None) != self._labelled or (y is not None and len(y) and int(y.max()) >= self.n_classes):
                raise InputError(f"the stream gives labels outside its {self.n_classes} classes, or only sometimes")
            empty = empty and not len(x)
            yield self._scaled(x), y
        if empty:
            raise InputError("the stream is used up: give an iterable that can be read again, not an iterator")

    def feed(self, batch: int, seed: int = 0, device: torch.device | str | None = None) -> Feed:
        """As :meth:`fastgan.data.Dataset.feed`; the order within a pass is the source's own matter.

        Raises:
            InputError: ``batch`` is not positive, or there is a ``device``: only its source knows a stream's samples.
        """
        if device is not None:
            raise InputError(f"feed: a stream cannot be put on a device, got {str(device)!r}")
        return StreamFeed(self, batch, seed)


class StreamFeed(Feed):
    """Batches of one size cut from those of a stream, pass after pass.

    Resuming restarts the stream and skips what the current pass had given: the same samples follow only where the
    stream's own order is the same.
    """

    def __init__(self, dataset: Stream, batch: int, seed: int = 0) -> None:
        if batch < 1:
            raise InputError(f"batch is {batch}, expected at least 1")
        self.stream, self.dataset, self.batch, self.seed = dataset, dataset, batch, seed
        self.position = self.offset = 0
        self._pass: Iterator[Batch] | None = None
        self._rest: Batch | None = None

    def _next_rows(self, limit: int) -> Batch:
        """At least one and at most ``limit`` rows of the current pass, or of the next one where it has ended."""
        while self._rest is None or not len(self._rest[0]):
            if self._pass is None:
                self._pass = self.stream.read()
            self._rest = next(self._pass, None)
            if self._rest is None:
                self._pass, self.offset = None, 0
        x, y = self._rest
        self._rest = x[limit:], None if y is None else y[limit:]
        self.offset += min(limit, len(x))
        return x[:limit], None if y is None else y[:limit]

    def __next__(self) -> Batch:
        parts: list[Batch] = []
        need = self.batch
        while need:
            parts.append(self._next_rows(need))
            need -= len(parts[-1][0])
        x = torch.cat([x for x, _ in parts])
        y = torch.cat([y for _, y in parts if y is not None]) if parts[0][1] is not None else None
        if self.dataset.mirror:
            first, last = self.position // _BLOCK, (self.position + self.batch - 1) // _BLOCK
            flips = torch.cat([flips_at(block, self.seed) for block in range(first, last + 1)])
            flips = flips[self.position % _BLOCK :][: self.batch]
            x[flips] = x[flips].flip(-1)
        self.position += self.batch
        return x, y

    def state_dict(self) -> dict[str, int]:
        """Samples given so far, and how many of them in the current pass."""
        return {"position": self.position, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restart the stream and skip what the current pass had given."""
        position, offset = count(state, "position"), count(state, "offset")
        self._pass, self._rest, self.offset = self.stream.read(), None, 0
        while self.offset < offset:
            before = self.offset
            self._next_rows(offset - before)
            if self.offset <= before:
                raise InputError(f"feed state: {offset} samples into a pass, but the stream has {before} in one")
        self.position = position


def _pair(item: Any) -> Batch:
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    values = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    if len(values) not in (1, 2) or not all(isinstance(v, torch.Tensor) for v in values):
        got = ", ".join(type(v).__name__ for v in values)
        raise InputError(f"the stream gives {got}; expected batches: tensors, or pairs of a tensor and its labels")
    x, y = values if len(values) == 2 else (values[0], None)
    if y is None:
        return x, None
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool or (len(y) and int(y.min()) < 0):
        expected = f"class numbers of shape ({len(x)},)"
        raise InputError(f"the stream gives labels of shape {tuple(y.shape)} and type {y.dtype}, expected {expected}")
    return x, y.detach().long().cpu()


def _pixels(x: torch.Tensor) -> torch.Tensor:
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
