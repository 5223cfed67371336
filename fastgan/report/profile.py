"""The page and the pictures of ``fastgan profile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgan.report import palette
from fastgan.report.conditions import conditions
from fastgan.report.page import Html, bar, el, facts, header, join, page, prose, row, section, swatch, table
from fastgan.report.plots import Bar, Plot, Series, bars, over_time, picture, stack, write
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
    points,
    size,
    word,
)  # fmt: skip

_SERIES = {
    "process_cpu_percent": ("CPU of the process, %", 1.0),
    "resident_bytes": ("Resident memory, MiB", 2.0**20),
    "threads": ("Threads of the process", 1.0),
    "gpu_percent": ("GPU busy, %", 1.0),
    "sm_percent": ("SMs active, %", 1.0),
    "tensor_percent": ("Tensor cores active, %", 1.0),
    "dram_percent": ("Memory bandwidth, %", 1.0),
    "gpu_memory_bytes": ("GPU memory, MiB", 2.0**20),
    "process_gpu_memory_bytes": ("Its part of GPU memory, MiB", 2.0**20),
    "power_w": ("Power, W", 1.0),
    "sm_clock_mhz": ("SM clock, MHz", 1.0),
    "memory_clock_mhz": ("Memory clock, MHz", 1.0),
    "temperature_c": ("Temperature, °C", 1.0),
}
"""Titles of the samples, and what a value is divided by."""


def profile_page(result: Mapping[str, Any]) -> str:
    """One HTML document, without scripts and without anything from elsewhere.

    Args:
        result: schema ``fastgan.profile/1``; whatever is missing or ``None`` is shown as not known.
    """
    said, run = part(result, "conditions"), part(result, "run")
    what = word(run, "what", "a training loop")
    what = what[:1].upper() + what[1:]
    about = [word(said, "device_name", "a device that is not named"), moment(word(result, "created", "no date"))]
    plots = {plot.name: picture(plot) for plot in _plots(result)}
    body = [
        header("Profile", what, about),
        _findings(parts(result, "findings")),
        _iteration(result),
        _phases(parts(result, "phases"), plots.get("phases")),
        _lines(parts(result, "lines")),
        _synchronisations(parts(result, "synchronisations")),
        _operators(parts(result, "operators")),
        _memory(part(result, "memory"), [plots[name] for name in ("memory", "memory-timeline") if name in plots]),
        _samples(part(result, "samples"), plots.get("samples")),
        _cost(part(result, "profiler_cost")),
        conditions(said, result),
    ]
    return page(f"fastgan profile: {what}", body)


def profile_pictures(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the page's plots as PNG files.

    Args:
        result: schema ``fastgan.profile/1``.
        folder: where; it is made if it is missing.

    Returns:
        The files.

    Raises:
        InputError: ``folder`` cannot be made.
    """
    return write(_plots(result), folder)


# ---- sections


def _findings(found: Sequence[Row]) -> Html:
    if not found:
        return section("Findings", el("p", "Nothing stands out."))
    items = []
    for one in found:
        share, us = number(one, "share"), number(one, "us")
        cost = el("span", f"{percent(share)} of the time · {duration(us)} an iteration")
        advice = word(one, "advice", "")
        items.append(
            el(
                "li",
                el("h3", prose(word(one, "title"))),
                el("div", bar(share), cost, class_="cost") if us else None,
                el("p", prose(word(one, "evidence", "")), class_="evidence"),
                el("p", "→ ", prose(advice[:1].upper() + advice[1:])) if advice else None,
            )
        )
    return section("Findings", el("ol", *items, class_="findings"))


def _iteration(result: Mapping[str, Any]) -> Html:
    run, iteration, samples = part(result, "run"), part(result, "iteration"), part(result, "samples")
    low, high = number(iteration, "p20_us"), number(iteration, "p80_us")
    spread = f"{duration(low)}…{duration(high)}"
    pairs = [
        ("Median, p20…p80", join([duration(number(iteration, "median_us")), el("small", spread)])),
        ("Iterations/s", figure(number(iteration, "iterations_per_second"), 4)),
        ("s/kimg", figure(number(iteration, "seconds_per_kimg"))),
        ("Launches an iteration", count(number(result, "launches_per_iteration"))),
        ("Peak memory", size(number(part(result, "memory"), "peak_bytes"))),
    ]
    if (energy := number(samples, "energy_j_per_kimg")) is not None:
        pairs.append(("Energy, J/kimg", figure(energy)))
    critic = number(run, "n_critic") or 1
    said = [f"{count(number(run, 'iterations'))} iterations of batch {word(run, 'batch')}", word(run, "precision", "")]
    said += [f"{count(critic)} discriminator updates an iteration"] if critic > 1 else []
    said += [f"{count(images)} images an iteration"] if (images := number(run, "images_per_iteration")) else []
    return section("Iteration", el("p", " · ".join(filter(None, said)), class_="about"), facts(pairs, "figures"))


def _phases(phases: Sequence[Row], plot: Html | None) -> Html:
    if not phases:
        return section("Time by phase", _none("No phase was recorded."))
    rows = []
    for p in phases:
        name, us = word(p, "phase"), number(p, "us")
        role = palette.phase(name)
        work, moved = (v / us * 1e6 if us and (v := number(p, key)) else None for key in ("gflop", "gb"))
        cells = [duration(us), _share(p, role), count(number(p, "calls")), figure(work), figure(moved)]
        rows.append(row(join([swatch(role), name]), cells))
    head = ["Phase", "Time an iteration", "Share", "Calls an iteration", "GFLOP/s", "GB/s"]
    return section("Time by phase", plot, table("Time by phase, in the order of an iteration", head, rows))


def _lines(lines: Sequence[Row]) -> Html:
    if not lines:
        return section("Lines", _none("No line of your own code takes time worth naming."))
    head = ["Where", "Source", "Time an iteration", "Share", "Phase"]
    cells = ([_source(one), duration(number(one, "us")), _share(one), word(one, "phase")] for one in lines)
    rows = [row(word(one, "where"), cell) for one, cell in zip(lines, cells, strict=True)]
    return section("Lines", table("Your lines, the most costly first", head, rows, class_="sources"))


def _synchronisations(found: Sequence[Row]) -> Html:
    if not found:
        return section("Synchronisations", _none("No line waits for the device."))
    head = ["Where", "Source", "Times an iteration", "Operator"]
    rows = [
        row(word(s, "where"), [_source(s), count(number(s, "per_iteration")), el("code", word(s, "op"))])
        for s in found
    ]  # fmt: skip
    return section("Synchronisations", table("Lines that wait for the device", head, rows, class_="sources"))


def _operators(operators: Sequence[Row]) -> Html:
    if not operators:
        return section("Operators", _none("No operator was recorded."))
    most = max((number(o, "us") or 0.0 for o in operators), default=0.0) or 1.0
    rows = []
    for o in operators:
        us = number(o, "us")
        length = bar((us or 0.0) / most)
        rows.append(row(word(o, "operator"), [join([duration(us), length]), count(number(o, "calls"))]))
    head = ["Operator", "Time an iteration", "Calls an iteration"]
    return section("Operators", table("Operators, the most costly first", head, rows))


def _memory(memory: Row, plots: Sequence[Html]) -> Html:
    rows = [row(word(c, "category"), [size(number(c, "bytes"))]) for c in parts(memory, "categories")]
    peak = number(memory, "peak_bytes")
    said = el("p", f"Peak: {size(peak)}.") if peak is not None else None
    if not rows and said is None and not plots:
        return section("Memory", _none("Memory was not measured."))
    shown = table("Memory by category", ["Category", "Size"], rows) if rows else None
    return section("Memory", said, *plots, shown)


def _samples(samples: Row, plot: Html | None) -> Html:
    missing = samples.get("missing")
    lines = [str(line) for line in missing] if isinstance(missing, Sequence) and not isinstance(missing, str) else []
    every = number(samples, "interval_s")
    energy = number(samples, "energy_j")
    said = f"Sampled every {every:g} s." if every and plot else ""
    said += f" The device used {figure(energy)} J in the timed blocks." if energy is not None else ""
    return section(
        "The machine meanwhile",
        el("p", said.strip()) if said else None,
        plot or _none("Nothing was sampled."),
        join([el("h3", "Not measured"), el("ul", *(el("li", line) for line in lines))]) if lines else None,
    )


def _cost(cost: Row) -> Html:
    share, plain, profiled = (number(cost, key) for key in ("share", "plain_us", "profiled_us"))
    if share is None:
        return section("The profiler's own cost", _none("It was not measured."))
    text = (
        f"An iteration takes {duration(plain)} without the profiler and {duration(profiled)} with it: {percent(share)}."
    )
    return section("The profiler's own cost", el("p", text))


def _none(text: str) -> Html:
    return el("p", text, class_="note")


def _share(found: Row, role: str = "accent") -> Html:
    share = number(found, "share")
    return join([percent(share), bar(share, role)])


def _source(found: Row) -> Html:
    return el("code", source) if (source := word(found, "source", "")) else join([NOTHING])


# ---- plots


def _plots(result: Mapping[str, Any]) -> list[Plot]:
    memory = part(result, "memory")
    found = [
        _phase_plot(parts(result, "phases")),
        _category_plot(parts(memory, "categories")),
        _timeline_plot(points(memory.get("timeline"))),
        _series_plot(part(part(result, "samples"), "series")),
    ]
    return [plot for plot in found if plot is not None]


def _phase_plot(phases: Sequence[Row]) -> Plot | None:
    shares = [(word(p, "phase"), share) for p in phases if (share := number(p, "share")) is not None and share > 0.0005]
    if not shares:
        return None
    stacked = [(name, share, percent(share), palette.phase(name)) for name, share in shares]
    said = ", ".join(f"{name} {text}" for name, _, text, _ in stacked)
    return Plot(
        "phases", "One iteration", "From left to right in the order of an iteration; the same phases together.",
        f"Shares of an iteration's time: {said}.", lambda narrow: stack(narrow, stacked),
    )  # fmt: skip


def _category_plot(categories: Sequence[Row]) -> Plot | None:
    sizes = [(word(c, "category"), n) for c in categories if (n := number(c, "bytes")) is not None]
    if not sizes:
        return None
    sizes.sort(key=lambda pair: -pair[1])
    found = [Bar(name, [(n / 2**20, "accent")], size(n)) for name, n in sizes]
    said = ", ".join(f"{b.name} {b.text}" for b in found)
    return Plot(
        "memory", "Memory by category", "", f"Memory by category: {said}.",
        lambda narrow: bars(narrow, {"": found}, "MiB"),
    )  # fmt: skip


def _timeline_plot(timeline: Sequence[tuple[float, float]]) -> Plot | None:
    if not timeline:
        return None
    values = [v for _, v in timeline]
    said = f"from {size(values[0])} to {size(values[-1])}, at most {size(max(values))}"
    one = Series("MiB", [(t, v / 2**20) for t, v in timeline], peaks=True)
    return Plot(
        "memory-timeline", "Memory over time", "", f"Memory over {timeline[-1][0]:.1f} seconds: {said}.",
        lambda narrow: over_time(narrow, [one], 190),
    )  # fmt: skip


def _series_plot(series: Row) -> Plot | None:
    found = [
        (name, found) for name in (*_SERIES, *sorted(set(series) - set(_SERIES))) if (found := points(series.get(name)))
    ]
    if not found:
        return None
    drawn, said = [], []
    for name, pairs in found:
        title, unit = _SERIES.get(name, (name.replace("_", " "), 1.0))
        scaled = [(t, v / unit) for t, v in pairs]
        values = [v for _, v in scaled]
        drawn.append(Series(title, scaled))
        said.append(f"{title}: {between(values, figure)}, mean {figure(sum(values) / len(values))}")
    return Plot(
        "samples", "Samples over time", "", f"{'; '.join(said)}.", lambda narrow: over_time(narrow, drawn)
    )  # fmt: skip
