"""A feed whose data lies on the device and whose batches are made there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fastgan.backend import Backend
from fastgan.data.dataset import _OFFSET, _SCALE, Batch, Dataset, Feed
from fastgan.errors import InputError

if TYPE_CHECKING:
    from fastgan.kernels.sample_rows import SampleArguments

_SHARE = 0.8  # of the free device memory that a data set may take: networks, their updates and graphs need the rest
_PIECE = 64 << 20  # bytes that are copied at a time


class ResidentFeed(Feed):
    """The samples of :class:`~fastgan.data.Feed`, to the bit, in its order and with its mirroring, on a device.

    The data lies there once, as uint8 images or fp32 tables with int64 labels, whatever the number of feeds: an image
    takes ``C * H * W`` bytes, a table's row ``4 * D``, a label 8. On a CPU it is the data set's own memory where that
    can be written, and a copy of what is mapped.

    A batch is one launch that reads its position from the device and advances it there, so that a captured
    :meth:`fill`, or a launch made with :meth:`arguments`, gives the next samples in each replay; :meth:`advanced` tells
    the host's :attr:`position` of them. States can be exchanged with those of a feed on the host.

    Attributes:
        dataset, batch, seed: as of :class:`~fastgan.data.Feed`.
        device: where data and batches are.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        seed: int = 0,
        *,
        device: torch.device | str,
        backend: Backend | None = None,
    ) -> None:
        """Args:
            dataset: not a stream.
            batch: samples per batch, in ``[1, len(dataset)]``.
            seed: of order and mirroring.
            device: where the data goes.
            backend: see :func:`fastgan.backend.resolve`.

        Raises:
            InputError: ``batch`` is out of range, or the data is larger than four fifths of the free device memory.
        """
        self._counter = torch.zeros((), dtype=torch.int64, device=device)
        self._arrivals = torch.zeros((), dtype=torch.int32, device=device)
        self._backend = backend
        self.device = self._counter.device  # with its index
        super().__init__(dataset, batch, seed)
        self._data, self._labels = _resident(dataset, self.device)

    @property
    def position(self) -> int:
        """Samples given so far, as the host knows of; setting it moves the device's counter."""
        return self._given

    @position.setter
    def position(self, value: int) -> None:
        self._given = value
        self._counter.fill_(value)  # in place: captured launches read it

    def __next__(self) -> Batch:
        out = torch.empty(self.batch, *self.dataset.shape, device=self.device)
        labels = None
        if self._labels is not None:
            labels = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        self.fill(out, labels)
        return out, labels

    def fill(self, out: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Draw the next batch into memory that is there: one launch, which a CUDA graph may capture.

        Args:
            out: ``[batch, *shape]``, contiguous, fp16, bf16, fp32 or fp64, on the feed's device. A value is that of
                fp32, rounded to this dtype.
            labels: int64 ``[batch]``, contiguous; left out, labels are not written.

        Raises:
            ValueError: a shape, dtype or device that does not fit, or labels where the data set has none.
        """
        self.draw(out, labels)
        if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.advanced()

    def draw(self, out: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """What :meth:`fill` does on the device; :meth:`advanced` is the caller's to call."""
        from fastgan.kernels.sample_rows import sample_rows_

        sample_rows_(self.arguments(out, labels), backend=self._backend)

    @property
    def state(self) -> torch.Tensor:
        """The position on the device, int64 0-dim: all that a draw changes."""
        return self._counter

    def arguments(
        self, out: torch.Tensor, labels: torch.Tensor | None = None, *, advance: bool = True
    ) -> SampleArguments:
        """What :meth:`fill` draws, for ``fastgan.kernels.inputs.inputs_launch``.

        Args:
            out, labels: as for :meth:`fill`.
            advance: whether a run of it advances the device's position; :meth:`advanced` is the caller's to call.

        Raises:
            ValueError: a shape or device that does not fit, or labels where the data set has none.
        """
        from fastgan.kernels.sample_rows import SampleArguments

        shape = (self.batch, *self.dataset.shape)
        if tuple(out.shape) != shape or out.device != self.device or not out.is_contiguous():
            raise InputError(
                f"feed: out has shape {tuple(out.shape)} on {out.device}, expected {shape} on {self.device}, contiguous"
            )
        if labels is not None and self._labels is None:
            raise InputError(f"feed: labels are asked for, and {self.dataset.name} has none")
        image = self.dataset.kind == "image"
        return SampleArguments(
            self._data,
            self._counter,
            out.view(self.batch, -1),
            self.seed,
            self.dataset.shape[-1] if image else self._data.shape[1],
            _SCALE if image else 1.0,
            _OFFSET if image else 0.0,
            mirror=self.dataset.mirror and image,
            labels=None if labels is None else self._labels,
            labels_out=labels,
            arrivals=self._arrivals if advance else None,
        )

    def advanced(self, batches: int = 1) -> None:
        """Note on the host that the device has drawn this many batches on its own, e.g. in replays of a graph."""
        self._given += batches * self.batch


def _resident(dataset: Dataset, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and labels of a data set on a device, put there by the first feed that asks."""
    if device not in dataset._resident:
        table = dataset.kind == "table"
        rows = dataset._table.numpy() if table else dataset._rows
        labels = dataset._labels
        _check_room(dataset.name, rows.nbytes + (0 if labels is None else labels.nbytes), device)
        if device.type == "cpu" and rows.flags.writeable and rows.flags.c_contiguous:
            there = torch.from_numpy(rows)
        else:
            there = torch.empty(rows.shape, dtype=torch.float32 if table else torch.uint8, device=device)
            piece = max(1, _PIECE // max(1, rows[:1].nbytes))
            for i in range(0, len(rows), piece):
                there[i : i + piece].copy_(torch.from_numpy(np.array(rows[i : i + piece])))
        dataset._resident[device] = there, None if labels is None else labels.to(device)
    return dataset._resident[device]


def _check_room(name: str, size: int, device: torch.device) -> None:
    free = _free_memory(device)
    if free is not None and size > _SHARE * free:
        raise InputError(
            f"feed: {name} takes {size / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free on {device}, of which data "
            f"may take {_SHARE:.0%}: use a feed without a device"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes, where a device tells."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
