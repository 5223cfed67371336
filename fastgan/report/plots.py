"""Plots of a page: drawn wide and narrow, light and dark, as SVG within the page; or as PNG files."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgan.errors import InputError
from fastgan.report.page import Html, clean, el
from fastgan.report.palette import dark, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 920, 350  # CSS pixels
_BREAK = "(max-width:760px)"  # that of style.css
_DIM = "(prefers-color-scheme:dark)"
_POINTS = 240  # of a series in a plot
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"], "font.size": 12.0, "svg.fonttype": "none", "svg.hashsalt": "fastgan",
    "text.parse_math": False, "axes.unicode_minus": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.edgecolor": light("line"), "axes.facecolor": "none", "axes.axisbelow": True,
    "axes.labelcolor": light("muted"), "axes.labelsize": 12.0, "axes.titlesize": 12.0, "axes.titlelocation": "left",
    "axes.titlecolor": light("ink"), "axes.titleweight": "bold", "axes.grid": True, "grid.color": light("line"),
    "grid.linewidth": 0.8, "text.color": light("ink"), "xtick.color": light("line"), "ytick.color": light("line"),
    "xtick.labelcolor": light("muted"), "ytick.labelcolor": light("ink"), "xtick.labelsize": 12.0,
    "ytick.labelsize": 12.0, "ytick.major.size": 0.0, "legend.frameon": False, "legend.fontsize": 12.0,
    "figure.facecolor": light("ground"), "figure.dpi": 144.0, "lines.linewidth": 2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A picture with what it shows in words.

    Attributes:
        name: of its file, without suffix.
        title: above it.
        about: how to read it.
        alt: what it shows, in numbers.
        draw: the picture, narrow or not.
        subject: what it is about, where it stands alone.
    """

    name: str
    title: str
    about: str
    alt: str
    draw: Callable[[bool], Figure]
    subject: str = ""


def picture(plot: Plot) -> Html:
    """The plot as an element that fits the reader's screen and colour scheme."""
    wide, narrow = svg(plot, False), svg(plot, True)
    sources = [
        (f"screen and {_BREAK} and {_DIM}", dark(narrow)),
        (f"screen and {_BREAK}", narrow),
        (f"screen and {_DIM}", dark(wide)),
    ]
    about = el("small", plot.about) if plot.about else None
    return el(
        "figure",
        el("figcaption", plot.title, about),
        el(
            "picture",
            *(el("source", media=media, srcset=_as_data(text)) for media, text in sources),
            el("img", src=_as_data(wide), alt=plot.alt),
        ),
    )


def write(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write plots as ``folder/name.png``; the folder is made where it is missing.

    Raises:
        InputError: there can be no such folder.
    """
    from fastgan.pictures import write_figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: is no folder and cannot be made one: {e.strerror}") from None
    paths = []
    for plot in plots:
        path = folder / f"{plot.name}.png"
        with _style():
            figure = plot.draw(False)
            figure.set_figheight(figure.get_figheight() + 0.4)
            figure.suptitle(f"{plot.subject}: {plot.title}" if plot.subject else plot.title, x=0.01, ha="left")
            write_figure(figure, path)
        paths.append(path)
    return paths


def svg(plot: Plot, narrow: bool) -> str:
    """The plot in light colours, the same text for the same result."""
    buffer = io.StringIO()
    with _style():
        figure = plot.draw(narrow)
        figure.set_facecolor("none")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("'DejaVu Sans'", _FONT)
    return re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text, count=2)  # a point becomes a CSS pixel


def _as_data(text: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's settings, and no warning where its font lacks a letter that the reader's may have."""
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font")
        yield


# ---- parts of plots


def canvas(narrow: bool, height: float) -> Figure:
    """An empty figure, so many CSS pixels high."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(wspace=0.05, hspace=0.07)
    return Figure(figsize=((NARROW if narrow else WIDE) / 72, height / 72), layout=layout)


def label(text: str, most: int = 22) -> str:
    """A text on one line, its middle left out where it is long."""
    text = " ".join(clean(text).split())
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60] or "unnamed"


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of one or more parts.

    Attributes:
        name: beside it.
        parts: lengths and the roles of their colours.
        text: at its end.
        apart: half the length of a whisker at the end, or ``None``.
        role: of the text's colour.
    """

    name: str
    parts: Sequence[tuple[float, str]]
    text: str
    apart: float | None = None
    role: str = "ink"

    @property
    def end(self) -> float:
        """Of the bar or its whisker."""
        return sum(length for length, _ in self.parts) + (self.apart or 0.0)


def bars(
    narrow: bool, panels: Mapping[str, Sequence[Bar]], axis: str, *, mark: float | None = None, shared: bool = True,
    legend: Sequence[tuple[str, str]] = (),
) -> Figure:  # fmt: skip
    """Panels of horizontal bars, of the same names in each.

    Args:
        narrow: for a narrow screen: below each other.
        panels: bars by title; the titles are left out where there is one panel.
        axis: its name.
        mark: where a line stands through all bars.
        shared: whether all panels have one scale.
        legend: names and roles of the parts' colours.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    columns = 1 if narrow else {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    height = rows * (26 * most + 44 + 20 * (len(panels) > 1)) + 26 * bool(legend)
    figure = canvas(narrow, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    longest = [max([mark or 0.0, *(b.end for b in group)]) or 1.0 for group in panels.values()]
    room = 1.4 if narrow or columns > 1 else 1.15  # for the texts
    for plot in grid.flat[len(panels) :]:
        plot.set_visible(False)
    for i, (plot, (title, group)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        most_here = max(longest) if shared else longest[i]
        _bar_panel(plot, group, most_here)
        plot.set(xlim=(0, most_here * room), ylim=(most - 0.5, -0.5), xlabel=axis)
        plot.xaxis.set_major_locator(MaxNLocator(4 if columns > 1 else 6, steps=[1, 2, 5, 10]))
        if i % columns:
            plot.set_yticks([])
        if len(panels) > 1:
            plot.set_title(title)
        if mark is not None:
            plot.axvline(mark, color=light("ink"), linewidth=1, linestyle=(0, (3, 3)), zorder=3)
    if legend:
        handles = [Patch(color=light(role), label=name) for name, role in legend]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1, columnspacing=1.2)
    return figure


def _bar_panel(plot: Axes, group: Sequence[Bar], longest: float) -> None:
    plot.grid(axis="y", visible=False)
    plot.set_yticks(range(len(group)), [label(b.name) for b in group])
    behind = {"facecolor": light("ground"), "edgecolor": "none", "pad": 1.0}
    for y, one in enumerate(group):
        left = 0.0
        for length, role in one.parts:
            plot.barh(y, length, left=left, height=0.62, color=light(role), edgecolor=light("ground"), linewidth=0.6)
            left += length
        if one.apart:
            plot.plot([left - one.apart, left + one.apart], [y, y], color=light("ink"), linewidth=1.2, zorder=4)
        x = one.end + 0.02 * longest
        plot.text(x, y, one.text, va="center", color=light(one.role), bbox=behind, zorder=5)


@dataclass(frozen=True)
class Line:
    """A curve with the range around it.

    Attributes:
        name: in the legend.
        role: of its colour.
        points: ``(x, y, low, high)``.
    """

    name: str
    role: str
    points: Sequence[tuple[float, float, float, float]]


_MARKERS = "osD^vPX*<>"


def log_log(narrow: bool, lines: Sequence[Line], xlabel: str, ylabel: str) -> Figure:
    """Curves over logarithmic axes; ``x`` is marked where there are points."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = canvas(narrow, 330 + 22 * -(-len(lines) // 2) if narrow else 400)
    plot = figure.subplots()
    plot.set(xscale="log", yscale="log")
    for line, marker in zip(lines, _MARKERS * len(lines), strict=False):
        x, y, low, high = zip(*line.points, strict=True)
        plot.fill_between(x, low, high, color=light(line.role), alpha=0.18, linewidth=0)
        plot.plot(x, y, color=light(line.role), marker=marker, markersize=6, label=label(line.name))
    xs = sorted({p[0] for line in lines for p in line.points})
    ys = [v for line in lines for p in line.points for v in p[1:]]
    least, most = min(ys) / 1.1, max(ys) * 1.1
    plot.set_ylim(least, most)
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    for axis, ticks in ((plot.xaxis, _apart(xs, 0.18 if narrow else 0.07)), (plot.yaxis, _log_ticks(least, most))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(plain)
    plot.set(xlabel=xlabel, ylabel=ylabel)
    where = {"loc": "outside lower left", "ncols": 2} if narrow else {"loc": "outside right center"}
    figure.legend(**where)
    return figure


def _apart(ticks: Sequence[float], least: float) -> list[float]:
    """Those whose names do not lie over each other."""
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= least * span:
            kept.append(tick)
    return kept


_FINE = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values within a range, at least three where it is not too small."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), _FINE, [1 + i / 10 for i in range(90)]):
        found = [v for d in decades for s in steps if low <= (v := float(f"{s * 10.0**d:.2g}")) <= high]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 8)] if found else [low, high]


@dataclass(frozen=True)
class Series:
    """A curve over time.

    Attributes:
        title: above it, with the unit.
        points: ``(seconds, value)``.
        peaks: keep the largest of values that are too many to draw, not their mean.
        role: of its colour.
    """

    title: str
    points: Sequence[tuple[float, float]]
    peaks: bool = False
    role: str = "accent"


def over_time(narrow: bool, series: Sequence[Series], height: float = 104) -> Figure:
    """Small curves over the same time, each with its own scale from 0."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = 1 if narrow else min(len(series), 3)
    rows = -(-len(series) // columns)
    figure = canvas(narrow, rows * height + 34)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for plot in grid.flat[len(series) :]:
        plot.set_visible(False)
    for i, (plot, one) in enumerate(zip(grid.flat, series, strict=False)):
        x, y = zip(*_thinned(one), strict=True)
        plot.fill_between(x, 0, y, color=light(one.role), alpha=0.14, linewidth=0)
        plot.plot(x, y, color=light(one.role), linewidth=1.4, marker="o" if len(x) < 3 else "", markersize=4)
        plot.set_ylim(min(0.0, *y), max(*y, 0.0) * 1.15 or 1.0)
        plot.set_title(one.title)
        plot.yaxis.set_major_locator(MaxNLocator(3))
        plot.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
        )
        if i + columns >= len(series):
            plot.tick_params(labelbottom=True)
            plot.set_xlabel("seconds")
    return figure


def _thinned(series: Series) -> list[tuple[float, float]]:
    every = -(-len(series.points) // _POINTS)
    blocks = [series.points[i : i + every] for i in range(0, len(series.points), every)]
    value: Callable[[list[float]], float] = max if series.peaks else lambda values: sum(values) / len(values)
    return [(block[0][0], value([v for _, v in block])) for block in blocks]


def stack(narrow: bool, parts: Sequence[tuple[str, float, str, str]]) -> Figure:
    """One bar of several parts with their legend.

    Args:
        narrow: for a narrow screen.
        parts: name, share, its text, and the role of its colour.
    """
    from matplotlib.patches import Patch

    columns = 2 if narrow else 5
    figure = canvas(narrow, 78 + 21 * -(-len(parts) // columns))
    plot = figure.subplots()
    plot.set_axis_off()
    left = 0.0
    for name, share, text, role in parts:
        plot.barh(0, share, left=left, height=1, color=light(role), edgecolor=light("ground"), linewidth=1)
        inside = f"{label(name)}\n{text}"
        if share * (NARROW if narrow else WIDE) > 7.6 * max(map(len, inside.split("\n"))):
            plot.text(left + share / 2, 0, inside, ha="center", va="center", color=light("ground"))
        left += share
    plot.set(xlim=(0, max(left, 1e-9)), ylim=(-0.5, 0.5))
    handles: list[Any] = [Patch(color=light(role), label=f"{label(name)} {text}") for name, _, text, role in parts]
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, handlelength=1, columnspacing=1.2)
    return figure
