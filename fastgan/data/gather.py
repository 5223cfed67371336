"""Rows of uint8 by index, as normalised float32: the threaded native gather and the reference it equals to the bit.

``out[i, j] = float32(rows[index[i], j]) * scale + offset``, the product and the sum each rounded to float32. Where
``flips[i]``, every line of ``width`` values in the row is reversed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fastgan._native import ext

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


def gather_reference(
    rows: U8, index: I64, flips: Bool | None, out: F32, width: int, scale: float, offset: float, threads: int
) -> None:
    """What ``fastgan._C.gather`` computes, in numpy; ``threads`` changes nothing."""
    if rows.ndim != 2 or index.ndim != 1 or out.shape != (len(index), rows.shape[1]):
        raise ValueError("gather: rows must be [N, row size], index [B] and out [B, row size]")
    if width <= 0 or rows.shape[1] % width or (flips is not None and flips.shape != index.shape) or threads <= 0:
        raise ValueError("gather: width must divide the row size, flips be [B] and threads positive")
    bad = np.flatnonzero((index < 0) | (index >= len(rows)))
    if len(bad):
        raise IndexError(f"gather: index {index[bad[0]]} at position {bad[0]} is outside [0, {len(rows)})")
    out[...] = rows[index]
    if flips is not None:
        lines = out.reshape(len(out), rows.shape[1] // width, width)
        lines[flips] = lines[flips][..., ::-1]
    out *= np.float32(scale)
    out += np.float32(offset)


def gather(rows: U8, index: I64, flips: Bool | None, out: F32, width: int, scale: float, offset: float) -> None:
    """Fill ``out`` from ``rows``, natively where the extension was built, with at most PyTorch's number of threads.

    Args:
        rows: uint8 ``[N, row size]``, contiguous; may be memory-mapped.
        index: int64 ``[B]``, each in ``[0, N)``.
        flips: bool ``[B]``, which rows are mirrored; ``None`` for none of them.
        out: float32 ``[B, row size]``, contiguous, written in place.
        width: length of a line; divides the row size.
        scale: factor, rounded to float32.
        offset: summand, rounded to float32.

    Raises:
        IndexError: an index outside ``[0, N)``; ``out`` is then unchanged.
        ValueError: shapes that do not fit.
    """
    run = gather_reference if ext is None else ext.gather
    run(rows, index, flips, out, width, scale, offset, torch.get_num_threads())
