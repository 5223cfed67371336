"""The page and the pictures of ``fastgan bench``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from fastgan.report.conditions import conditions
from fastgan.report.page import Html, el, header, join, page, row, section, swatch, table
from fastgan.report.palette import variant
from fastgan.report.plots import Bar, Line, Plot, bars, log_log, picture, slug, write
from fastgan.report.values import (
    NOTHING,
    Row,
    between,
    count,
    duration,
    figure,
    moment,
    number,
    part,
    parts,
    percent,
    times,
    word,
)  # fmt: skip

OWN, PLAIN, TWIN = "fastgan", "eager", " again"
SIGNS = {"wrong": "✗", "failed": "!", "skipped": "○"}
SPLIT = ("discriminator", "penalty", "generator")


def bench_page(result: Mapping[str, Any]) -> str:
    """One HTML document, without scripts and without anything from elsewhere.

    Args:
        result: schema ``fastgan.bench/1``; whatever is missing or ``None`` is shown as not known.
    """
    said, results = part(result, "conditions"), parts(result, "results")
    groups = _groups(results)
    names = list(dict.fromkeys(group.name for group in groups))
    title = f"fastgan bench: {names[0] if len(names) == 1 else f'{len(names)} workloads'}"
    where = [word(said, "device_name", "a device that is not named"), moment(word(result, "created", "no date"))]
    top = header("Benchmark", title.partition(": ")[2], where)
    body = [top, el("p", _headline(results), class_="result"), _alerts(groups)]
    if len(results) > 1:
        body.append(_overview(groups))
    unknown = [c.head for c in _COLUMNS if not _shown(c, results)]
    body += [_group_section(group, [c for c in _COLUMNS if _shown(c, results)]) for group in groups]
    body.append(_reading(part(result, "ceilings"), unknown))
    return page(title, [*body, conditions(said, result)])


def bench_pictures(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the page's plots as PNG files.

    Args:
        result: schema ``fastgan.bench/1``.
        folder: where; it is made if it is missing.

    Returns:
        The files.

    Raises:
        InputError: ``folder`` cannot be made.
    """
    return write([plot for group in _groups(parts(result, "results")) for plot in _plots(group)], folder)


# ---- what belongs together


@dataclass(frozen=True)
class Group:
    """The results of one workload in one precision, by batch size.

    Attributes:
        name: of the workload, with the precision where there are several.
        anchor: of its section and its files, there once.
        results: the smallest batch first.
    """

    name: str
    anchor: str
    results: list[Row]

    @property
    def variants(self) -> list[str]:
        """All that occur, but the twin that shows the noise."""
        names = dict.fromkeys(name for result in self.results for name in part(result, "variants"))
        return [name for name in names if not name.endswith(TWIN)]


def _groups(results: Sequence[Row]) -> list[Group]:
    found: dict[tuple[str, str], list[Row]] = {}
    for result in results:
        found.setdefault((word(result, "workload", "unnamed"), word(result, "precision", "")), []).append(result)
    several = len({precision for _, precision in found}) > 1
    groups: list[Group] = []
    for (workload, precision), rows in found.items():
        name = f"{workload}, {precision}" if several and precision else workload
        anchor, taken = slug(name), {group.anchor for group in groups}
        while anchor in taken:
            anchor += "_"
        groups.append(Group(name, anchor, sorted(rows, key=lambda r: number(r, "batch") or 0)))
    return groups


def _rows(result: Row) -> list[tuple[str, Row]]:
    return [(name, part(part(result, "variants"), name)) for name in part(result, "variants")]


def _good(result: Row, name: str) -> Row:
    """A variant's row, empty where it has no time."""
    found = part(part(result, "variants"), name)
    return found if word(found, "status") == "ok" and number(found, "median_us") else {}


def _batch(result: Row) -> str:
    return f"batch {word(result, 'batch')}"


# ---- sentences


def _headline(results: Sequence[Row]) -> str:
    """What it comes to."""
    own = [(r, _good(r, OWN)) for r in results if number(_good(r, OWN), "eager_over_this")]
    if not own:
        return _fastest(results)
    ratios = [number(row, "eager_over_this") or 0 for _, row in own]
    text = f"fastgan is {between(ratios, times)} as fast as eager"
    rivals = [(word(r, "best_competitor"), number(row, "best_competitor_over_this")) for r, row in own]
    better = [(name, ratio) for name, ratio in rivals if ratio is not None and name not in (PLAIN, NOTHING)]
    if better:
        who = " or ".join(dict.fromkeys(name for name, _ in better))
        text += f" and {between([ratio for _, ratio in better], times)} as fast as the best competitor ({who})"
    noise = max((number(r, "noise") or 0 for r, _ in own), default=0)
    known = any(number(r, "noise") is not None for r, _ in own)
    where = f" at {_batch(own[0][0])}" if len(own) == 1 else f", over {len(own)} cases"
    return f"{text}{where}; noise {'up to ' * (len(own) > 1)}{percent(noise)}." if known else f"{text}{where}."


def _fastest(results: Sequence[Row]) -> str:
    timed = [(number(row, "median_us") or 0, name, r) for r in results for name, row in _rows(r) if _good(r, name)]
    if not timed:
        return "No variant has a time."
    us, name, result = min(timed, key=lambda t: t[0])
    return f"The fastest iteration is {name}'s: {duration(us)} ({word(result, 'workload')}, {_batch(result)})."


def _alerts(groups: Sequence[Group]) -> Html:
    """Variants that are not what they should be, above all figures; those that are wrong come first."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for status in ("wrong", "failed"):
        for group in groups:
            for result in group.results:
                for name, one in _rows(result):
                    if word(one, "status") == status:
                        where = f"{group.name}, {_batch(result)}"
                        found.setdefault((status, name), []).append((where, word(one, "reason", "no reason given")))
    alerts = []
    for (status, name), cases in found.items():
        what = f"{SIGNS[status]} {name} {'is wrong' if status == 'wrong' else 'failed'}"
        others = ["", f" and in {cases[-1][0]}", f" and {len(cases) - 1} more cases"][min(len(cases), 3) - 1]
        text = f" in {cases[0][0]}{others}: {shorten(cases[0][1], 200, placeholder='…')}"
        alerts.append(el("p", el("strong", what), text, class_=f"alert {status}"))
    return join(alerts)


# ---- tables


@dataclass(frozen=True)
class Column:
    """A figure of every variant, with a second one below it.

    Attributes:
        head: its name.
        key: of the row.
        text: of the figure.
        unit: below the name.
        below: from the row and its result.
    """

    head: str
    key: str
    text: Callable[[float | None], str]
    unit: str = ""
    below: Callable[[Row, Row], str | None] = lambda row, result: None


def _range(row: Row, result: Row) -> str | None:
    low, high = number(row, "p80_us"), number(row, "p20_us")
    return f"{figure(1e6 / low, 4)}…{figure(1e6 / high, 4)}" if low and high else None


def _apart(key: str, row: Row, result: Row) -> str | None:
    value, noise = number(row, key), number(result, "noise")
    return f"±{value * noise:.2f}" if value is not None and noise is not None else None


def _of_limit(key: str, row: Row, result: Row) -> str | None:
    return None if (share := number(row, key)) is None else f"{percent(share)} of limit"


def _error_share(row: Row, result: Row) -> str | None:
    error, limit = number(row, "error"), number(row, "error_limit")
    return f"{percent(error / limit)} of limit" if error is not None and limit else None


_EAGER, _BEST = "eager_over_this", "best_competitor_over_this"
_COLUMNS: tuple[Column, ...] = (
    Column("Iterations/s", "iterations_per_second", partial(figure, digits=4), "p20…p80", _range),
    Column("s/kimg", "seconds_per_kimg", figure),
    Column("Against eager", _EAGER, times, "± noise", partial(_apart, _EAGER)),
    Column("Against best competitor", _BEST, times, "± noise", partial(_apart, _BEST)),
    Column("Penalty", "penalty_overhead", times, "with ÷ without"),
    Column("Launches", "launches", count),
    Column("TFLOP/s", "tflop_per_s", figure, "", partial(_of_limit, "share_of_matrix_rate")),
    Column("GB/s", "gb_per_s", figure, "", partial(_of_limit, "share_of_bandwidth")),
    Column("Memory", "peak_bytes", lambda n: figure(None if n is None else n / 1e6), "MB, peak"),
    Column("Energy", "joule_per_kimg", figure, "J/kimg"),
    Column("Error", "error", figure, "against fp64", _error_share),
)


def _shown(column: Column, results: Sequence[Row]) -> bool:
    return any(number(row, column.key) is not None for r in results for name, row in _rows(r) if _good(r, name))


def _group_section(group: Group, columns: Sequence[Column]) -> Html:
    first = group.results[0]
    critic = number(first, "n_critic") or 1
    about = [word(first, "about", ""), word(first, "precision", "")]
    about += [f"{count(critic)} discriminator updates an iteration"] if critic > 1 else []
    head = [join([c.head, el("small", c.unit) if c.unit else None]) for c in columns]
    bodies = [_body(result, columns) for result in group.results]
    return section(
        group.name,
        el("p", " · ".join(filter(None, about)), class_="about"),
        *map(picture, _plots(group)),
        table(f"{group.name}: all variants", ["Variant", *head], *bodies),
        anchor=group.anchor,
    )


def _body(result: Row, columns: Sequence[Column]) -> list[Html]:
    said = [f"{count(number(result, 'images_per_iteration'))} images an iteration"]
    said += [] if (noise := number(result, "noise")) is None else [f"ratios good to ±{noise:.1%}"]
    said.append(f"best competitor: {word(result, 'best_competitor', 'none')}")
    text = el("span", _capital(_batch(result)), " ", el("small", " · ".join(said)))
    head = el("tr", el("th", text, scope="rowgroup", colspan=len(columns) + 1))
    return [head, *(_line(name, row, result, columns) for name, row in _rows(result))]


def _line(name: str, found: Row, result: Row, columns: Sequence[Column]) -> Html:
    title = join([swatch(variant(name)), name])
    status = word(found, "status", "failed")
    if status == "ok":
        cells = [join([c.text(number(found, c.key)), _below(c, found, result)]) for c in columns]
        return row(title, cells, "own" if name == OWN else "again" if name.endswith(TWIN) else None)
    what = el("strong", f"{SIGNS.get(status, '!')} {_capital(status)}")
    reason = el("span", what, f": {word(found, 'reason', 'no reason given')}")
    cell = el("td", reason, class_="reason", colspan=max(len(columns), 1))
    return el("tr", el("th", title, scope="row"), cell, class_=status if status in SIGNS else "failed")


def _below(column: Column, found: Row, result: Row) -> Html | None:
    text = column.below(found, result)
    return None if text is None else el("small", text)


def _overview(groups: Sequence[Group]) -> Html:
    """fastgan in every case, with links to the sections."""
    rows = []
    for group in groups:
        for result in group.results:
            own = _good(result, OWN)
            status = word(part(part(result, "variants"), OWN), "status", "not run")
            noise = number(result, "noise")
            cells = [
                word(result, "batch"),
                figure(number(own, "iterations_per_second"), 4) if own else status,
                times(number(own, "eager_over_this")),
                times(number(own, "best_competitor_over_this")),
                word(result, "best_competitor"),
                NOTHING if noise is None else f"±{noise:.1%}",
            ]
            rows.append(row(el("a", group.name, href=f"#{group.anchor}"), cells))
    head = ["Workload", "Batch", "Iterations/s", "Against eager", "Against best competitor", "Best competitor", "Noise"]
    return table("fastgan in all cases", head, rows)


_READING = (
    "Each variant trains networks of its own from the same start and is first held to the same update in fp64; one "
    "that is further off than rounding explains is wrong and gets no time. Times are medians of rounds in which the "
    "variants take turns. A kimg is a thousand real images.",
    "Ratios say how many times as fast as the other a variant is; a difference within the noise is none. The best "
    "competitor is the fastest variant that is not one of fastgan and whose numbers are as good.",
)
_CACHES = "Operands that fit a cache may be read faster than these copies."


def _reading(ceilings: Row, unknown: Sequence[str]) -> Html:
    """What the figures mean, and the machine's limits."""
    rates = part(ceilings, "matrix_tflop_per_s")
    limits = [f"{kind} products {figure(rate)} TFLOP/s" for kind in rates if (rate := number(rates, kind)) is not None]
    copies = number(ceilings, "copy_gb_per_s")
    limits += [f"copies {figure(copies)} GB/s"] if copies is not None else []
    rest = [f"Measured limits of this machine: {', '.join(limits)}. {_CACHES}"] if limits else []
    unknown_here = el("p", f"Not known here: {', '.join(unknown)}.", class_="note") if unknown else None
    return section("How to read the figures", *(el("p", text) for text in (*_READING, *rest)), unknown_here)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- plots


def _plots(group: Group) -> list[Plot]:
    return [plot for make in (_ratios, _scaling, _split) if (plot := make(group)) is not None]


def _images_per_s(result: Row, row: Row, key: str) -> float | None:
    us, images = number(row, key), number(result, "images_per_iteration") or number(result, "batch")
    return images * 1e6 / us if us and images else None


def _scaling(group: Group) -> Plot | None:
    """Images per second over batch sizes, where there are several."""
    lines = []
    for name in group.variants:
        points = []
        for result in group.results:
            good, batch = _good(result, name), number(result, "batch")
            y = _images_per_s(result, good, "median_us")
            if y and batch:
                low, high = (_images_per_s(result, good, key) or y for key in ("p80_us", "p20_us"))
                points.append((batch, y, low, high))
        if points:
            lines.append(Line(name, variant(name), points))
    if len({x for line in lines for x, *_ in line.points}) < 2:
        return None
    said = [
        f"{line.name} {', '.join(f'{figure(y)} at {x:.0f}' for x, y, *_ in line.points)}" for line in lines
    ]  # fmt: skip
    return Plot(
        f"scaling-{group.anchor}", "Real images per second over batch size", "Median; the band is from p20 to p80.",
        f"{group.name}, real images per second by batch size: {'; '.join(said)}.",
        lambda narrow: log_log(narrow, lines, "batch size", "real images per second"), group.name,
    )  # fmt: skip


def _panels(
    group: Group, bar: Callable[[Row, str, Row], Bar | None]
) -> tuple[dict[str, list[Bar]], list[str]]:  # fmt: skip
    """Bars by batch size, with a word where a variant has no time; and what they show in words."""
    panels: dict[str, list[Bar]] = {}
    said = []
    for result in group.results:
        found = []
        for name in group.variants:
            row = part(part(result, "variants"), name)
            if good := _good(result, name):
                found.append(bar(result, name, good) or Bar(name, (), "not known", role="muted"))
            elif row:
                status = word(row, "status", "failed")
                role = {"wrong": "bad", "failed": "warning"}.get(status, "muted")
                found.append(Bar(name, (), f"{SIGNS.get(status, '!')} {status}", role=role))
        if any(b.parts for b in found):
            panels[_batch(result)] = found
            said.append(f"{_batch(result)}: {', '.join(f'{b.name} {b.text}' for b in found)}")
    return panels, said


def _ratios(group: Group) -> Plot | None:
    def bar(result: Row, name: str, row: Row) -> Bar | None:
        ratio, noise = number(row, "eager_over_this"), number(result, "noise")
        if ratio is None:
            return None
        apart = None if noise is None or name == PLAIN else min(noise, 1) * ratio
        return Bar(name, [(ratio, variant(name))], times(ratio), apart)

    panels, said = _panels(group, bar)
    if not panels:
        return None
    return Plot(
        f"ratios-{group.anchor}", "Speed relative to eager", "Longer is faster; whiskers are the noise of the ratios.",
        f"{group.name}, speed relative to eager; {'; '.join(said)}.",
        lambda narrow: bars(narrow, panels, "times as fast as eager", mark=1.0), group.name,
    )  # fmt: skip


def _split(group: Group) -> Plot | None:
    """Milliseconds of an iteration by part."""

    def bar(result: Row, name: str, row: Row) -> Bar | None:
        split = part(row, "time_split_us")
        lengths = [(us / 1e3, role) for role in SPLIT if (us := number(split, role)) is not None]
        return Bar(name, lengths, duration(sum(ms for ms, _ in lengths) * 1e3)) if lengths else None

    panels, said = _panels(group, bar)
    if not panels:
        return None
    used = {role for found in panels.values() for b in found for length, role in b.parts if length}
    legend = [(role, role) for role in SPLIT if role in used]
    own = "; each batch size has a scale of its own" if len(panels) > 1 else ""
    return Plot(
        f"split-{group.anchor}", "Time of an iteration by part", f"Shorter is faster{own}.",
        f"{group.name}, time of an iteration; {'; '.join(said)}.",
        lambda narrow: bars(narrow, panels, "milliseconds", legend=legend, shared=False), group.name,
    )  # fmt: skip
