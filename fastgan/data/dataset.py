"""A data set in memory or mapped, and its endless feed of batches."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from fastgan import noise
from fastgan.data.gather import F32, I64, U8, gather
from fastgan.data.toys import Modes
from fastgan.errors import InputError

Batch = tuple[torch.Tensor, torch.Tensor | None]

_SCALE, _OFFSET = 2 / 255, -1.0  # 0 and 255 become -1 and 1 exactly, in float32 too
_BLOCK = 1 << 14  # positions whose order is computed at once: 2 µs each, against 3 ms for a batch of its own
_KEPT = 4  # buffers of a feed


class Dataset:
    """Images or table rows by index.

    Attributes:
        name: short, fit for a file name.
        kind: ``"image"`` or ``"table"``.
        shape: of one sample, ``(C, H, W)`` or ``(D,)``.
        class_names: one per class; empty where there are no labels.
        mirror: whether feeds mirror half of the images.
        modes: a toy's true modes, else ``None``.
    """

    def __init__(
        self,
        name: str,
        x: U8 | torch.Tensor,
        *,
        labels: I64 | None = None,
        class_names: tuple[str, ...] = (),
        mirror: bool = False,
        units: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None,
        modes: Modes | None = None,
    ) -> None:
        """Args as the attributes of the same names, and:

        Args:
            x: images, uint8 array ``[N, C, H, W]``, or a table, float32 tensor ``[N, D]``.
            labels: int64 ``[N]``, each below ``len(class_names)``.
            units: offset and scale ``[D]`` of a table: ``x * scale + offset`` is in the units of its source.
        """
        self.name, self.class_names, self.mirror, self.modes = name, class_names, mirror, modes
        self.shape = tuple(x.shape[1:])
        self.kind = "table" if isinstance(x, torch.Tensor) else "image"
        self._table = x if isinstance(x, torch.Tensor) else torch.empty(0)
        self._rows = np.empty((len(x), 0), np.uint8) if isinstance(x, torch.Tensor) else x.reshape(len(x), -1)
        self._labels = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels))
        self._units = units
        self._resident: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        classes = f", {self.n_classes} classes" if self.n_classes else ""
        return f"<{type(self).__name__} {self.name}: {len(self)} x {'x'.join(map(str, self.shape))}{classes}>"

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all samples, labels and units, 64 hex digits; reads the whole set once."""
        digest = hashlib.sha256(repr((self.kind, self.shape, len(self))).encode())
        parts = [self._rows, self._table.numpy(), *(self._units or ())]
        parts += [] if self._labels is None else [self._labels.numpy()]
        for part in parts:
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def batch(self, indices: torch.Tensor, flips: torch.Tensor | None = None) -> Batch:
        """The samples at ``indices``.

        Args:
            indices: int64 ``[B]`` on the CPU, each in ``[0, len(self))``.
            flips: bool ``[B]``, which images are mirrored; ``None`` for none of them.

        Returns:
            float32 ``[B, *shape]``, images in ``[-1, 1]``; and the labels, int64 ``[B]``, or ``None``.

        Raises:
            IndexError: an index out of range.
        """
        return self._fill(indices, flips, np.empty((len(indices), self._rows.shape[1]), np.float32))

    def _fill(self, indices: torch.Tensor, flips: torch.Tensor | None, out: F32) -> Batch:
        labels = None if self._labels is None else self._labels.index_select(0, indices)
        if self.kind == "table":
            return self._table.index_select(0, indices), labels
        mirrored = None if flips is None else flips.contiguous().numpy()
        gather(self._rows, indices.contiguous().numpy(), mirrored, out, self.shape[-1], _SCALE, _OFFSET)
        return torch.from_numpy(out).view(len(indices), *self.shape), labels

    def denormalise(self, x: torch.Tensor) -> U8 | F32:
        """Samples as they would stand in the source.

        Args:
            x: ``[N, *shape]``, any floating dtype and device; images are clamped to ``[-1, 1]``.

        Returns:
            uint8 ``[N, H, W, C]`` for images, float32 ``[N, D]`` in the source's units for tables.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"denormalise: x has shape {tuple(x.shape)}, expected (N, *{self.shape})")
        if self.kind == "image":
            pixels = x.detach().float().cpu().nan_to_num().clamp(-1, 1).mul(127.5).add(127.5).round()
            return np.ascontiguousarray(pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy())
        values = x.detach().double().cpu().numpy()
        if self._units is not None:
            offset, scale = self._units
            values = values * scale + offset
        return values.astype(np.float32)

    def feed(self, batch: int, seed: int = 0, device: torch.device | str | None = None) -> Feed:
        """An endless iterator over shuffled batches.

        Args:
            batch: samples per batch.
            seed: of order and mirroring.
            device: where the data is put, once, and the same batches are made; ``None`` for the host. See
                :class:`fastgan.data.ResidentFeed` for the memory it takes.

        Raises:
            InputError: ``batch`` is not in ``[1, len(self)]``, or the data does not fit on the device.
        """
        if device is None:
            return Feed(self, batch, seed)
        from fastgan.data.resident import ResidentFeed

        return ResidentFeed(self, batch, seed, device=device)


class Feed(Iterator[Batch]):
    """Endless batches: every pass visits each sample once, in an order of its own.

    Order and mirroring are functions of (seed, position) alone, whatever the batch size, so that the position is the
    whole state. A batch may straddle two passes.

    Attributes:
        batch: samples per batch.
        position: samples given so far.
    """

    def __init__(self, dataset: Dataset, batch: int, seed: int = 0) -> None:
        if not 1 <= batch <= len(dataset):
            raise InputError(f"batch is {batch}, expected 1 … {len(dataset)}, the number of samples in {dataset.name}")
        self.dataset, self.batch, self.seed, self.position = dataset, batch, seed, 0
        self._block: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._buffers: list[F32] = []

    def __next__(self) -> Batch:
        parts, need, at = [], self.batch, self.position
        while need:
            number, offset = divmod(at, _BLOCK)
            if self._block is None or self._block[0] != number:
                self._block = (number, *self._order(number))
            take = min(need, _BLOCK - offset)
            parts.append([part[offset : offset + take] for part in self._block[1:]])
            need, at = need - take, at + take
        indices, flips = (torch.cat(columns) for columns in zip(*parts, strict=True))
        out = self.dataset._fill(indices, flips if self.dataset.mirror else None, self._buffer())
        self.position = at
        return out

    def _order(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)
        flips = flips_at(block, self.seed) if self.dataset.mirror else torch.zeros(_BLOCK, dtype=torch.bool)
        return noise.shuffled(position, len(self.dataset), seed=self.seed), flips

    def _buffer(self) -> F32:
        """An array that no living tensor lies in: touching fresh pages would cost more than the gather."""
        for i in range(len(self._buffers)):
            if sys.getrefcount(self._buffers[i]) <= 2:  # the list and this call
                return self._buffers[i]
        fresh = np.empty((self.batch, self.dataset._rows.shape[1]), np.float32)
        if len(self._buffers) < _KEPT:
            self._buffers.append(fresh)
        return fresh

    def state_dict(self) -> dict[str, int]:
        """Where the feed stands."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go where ``state`` says.

        Raises:
            InputError: not a state of this kind of feed.
        """
        self.position = count(state, "position")


def count(state: dict[str, int], key: str) -> int:
    """A non-negative integer of a feed's state."""
    value = state.get(key)
    if type(value) is not int or value < 0:
        raise InputError(f"feed state: {key} is {value!r}, expected a count")
    return value


def flips_at(block: int, seed: int) -> torch.Tensor:
    """Which positions of a block are mirrored, bool ``[16384]``."""
    drawn = noise.bits(_BLOCK, 1, seed=seed, stream=noise.Stream.MIRROR, step=block, device="cpu")
    return (drawn[:, 0] & 1).bool()
