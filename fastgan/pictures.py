"""Pictures of a run: grids of samples, scatter plots of tables, loss curves. Each is written whole or not at all."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastgan.data import Dataset

_CELL = 48  # least pixels per side of a picture in a grid


def samples(dataset: Dataset, x: torch.Tensor, path: Path, *, columns: int | None = None) -> None:
    """Write a picture of samples: a grid for images, a scatter plot over real rows for tables.

    Args:
        dataset: where the samples could come from.
        x: ``[N, *dataset.shape]``, in the range of ``dataset.batch``.
        path: the PNG file.
        columns: pictures per row of the grid; about the square root of ``N`` where not given.
    """
    if dataset.kind == "image":
        grid(dataset.denormalise(x), path, columns=columns)
    else:
        rows = torch.arange(min(len(dataset), max(len(x), 2)))
        scatter(dataset.denormalise(dataset.batch(rows, None)[0]), dataset.denormalise(x), path)


def grid(images: NDArray[Any], path: Path, *, columns: int | None = None) -> None:
    """Write images uint8 ``[N, H, W, C]`` row by row as one PNG, small ones enlarged."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale, gap = max(1, -(-_CELL // max(height, width))), 2
    big = images.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.full((-(-n // columns) * step_y + gap, columns * step_x + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(big):
        y, x = gap + i // columns * step_y, gap + i % columns * step_x
        sheet[y : y + height * scale, x : x + width * scale] = image
    write_whole(path, png(sheet))


def png(image: NDArray[np.uint8]) -> bytes:
    """One image uint8 ``[H, W, C]`` as a PNG file; of other than 1, 3 or 4 channels the first is taken."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image if image.shape[2] in (3, 4) else image[..., 0]).save(buffer, "png")
    return buffer.getvalue()


def scatter(real: NDArray[Any], fake: NDArray[Any], path: Path) -> None:
    """Write fakes ``[N, D]`` over real rows ``[M, D]``: as they are in two columns, else on the real rows' first two
    principal components.
    """
    from matplotlib.figure import Figure

    label = "column"
    if real.shape[1] != 2:
        label = "principal component"
        mean, spread = real.mean(axis=0), real.std(axis=0) + 1e-8
        real, fake = (real - mean) / spread, (fake - mean) / spread
        axes = np.linalg.svd(real, full_matrices=False)[2][:2].T
        real, fake = real @ axes, fake @ axes
    if real.shape[1] == 1:
        real, fake = (np.concatenate([part, np.zeros_like(part)], axis=1) for part in (real, fake))
    figure = Figure(figsize=(6, 6), layout="constrained")
    plot = figure.add_subplot()
    plot.scatter(real[:, 0], real[:, 1], s=8, color="0.7", linewidths=0, label="real")
    plot.scatter(fake[:, 0], fake[:, 1], s=4, color="C0", linewidths=0, label="generated")
    centre, reach = real.mean(axis=0), 1.25 * np.abs(real - real.mean(axis=0)).max() + 1e-6
    plot.set(xlim=(centre[0] - reach, centre[0] + reach), ylim=(centre[1] - reach, centre[1] + reach), aspect="equal")
    plot.set(xlabel=f"{label} 1", ylabel=f"{label} 2")
    plot.legend(loc="upper right")
    write_figure(figure, path)


def loss_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write losses and logits over kimg as a PNG.

    Args:
        rows: lines of metrics.jsonl: ``kimg`` and figures; a figure that is missing or ``None`` leaves a gap.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    panels = [
        ("loss", (("d_loss", "discriminator"), ("g_loss", "generator"), ("penalty", "penalty"))),
        ("mean logit", (("d_real", "D(real)"), ("d_fake", "D(fake)"))),
        ("gradient norm", (("d_grad_norm", "discriminator"), ("g_grad_norm", "generator"))),
    ]
    figure = Figure(figsize=(8, 8), layout="constrained")
    for plot, (label, lines) in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
        for key, name in lines:
            points = [(row["kimg"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                plot.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 3 else "")
        plot.set_ylabel(label)
        plot.grid(alpha=0.3)
        if plot.lines:
            plot.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plot.set_xlabel("thousands of real images shown (kimg)")
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there."""
    new = path.with_name(f".{path.name}.unfinished")
    new.write_bytes(data)
    os.replace(new, path)
