"""A profile's result as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from fastgan.profiling.findings import duration, size

_WIDTH = 100
_BAR = 30


def render(result: Mapping[str, Any]) -> str:
    """Phases with bars, memory, what waits for the device, the profiler's cost, and findings last."""
    run, iteration, memory = result["run"], result["iteration"], result["memory"]
    critic = f", {run['n_critic']} discriminator updates" if run["n_critic"] > 1 else ""
    lines = [
        f"{run['what']}: batch {run['batch']}{critic} per iteration, {run['precision']}, "
        f"on {result['conditions']['device_name']}",
        f"{duration(iteration['median_us'])} per iteration ({duration(iteration['p20_us'])} … "
        f"{duration(iteration['p80_us'])}), {iteration['iterations_per_second']:.1f} iterations/s on average, "
        f"{iteration['seconds_per_kimg']:.4g} s/kimg, {result['launches_per_iteration']:.0f} launches",
        "",
    ]
    for p in result["phases"]:
        bar = "█" * round(p["share"] * _BAR)
        work = f"{p['gflop'] / p['us'] * 1e6:8.1f} GFLOP/s" if p["gflop"] and p["us"] else ""
        moved = f"{p['gb'] / p['us'] * 1e6:7.1f} GB/s" if p["gb"] and p["us"] else ""
        lines.append(f"{p['phase']:<16}{duration(p['us']):>9}{p['share']:>7.1%}  {bar:<{_BAR}}{work}{moved}".rstrip())
    parts = [f"{row['category']} {size(row['bytes'])}" for row in memory["categories"]]
    lines += ["", *_wrapped("memory: ", f"{', '.join(parts)}; peak {size(memory['peak_bytes'])}")]
    samples = result["samples"]
    if samples["energy_j_per_kimg"] is not None:
        lines.append(f"energy: {samples['energy_j_per_kimg']:.4g} J/kimg")
    lines += [line for what in samples["missing"] for line in _wrapped("not measured: ", what)]
    for s in result["synchronisations"]:
        lines += _wrapped("waits: ", f"{s['per_iteration']:g} per iteration at {s['where']} {s['source']} ({s['op']})")
    cost = result["profiler_cost"]
    lines.append(
        f"profiler: {cost['share']:+.1%} ({duration(cost['plain_us'])} without, {duration(cost['profiled_us'])} with), "
        "relative to iterations of the same loop in which only their ends are noted"
    )
    lines.append("")
    for i, f in enumerate(result["findings"], 1):
        lines += _wrapped(f"{i}. ", f["title"])
        lines += _wrapped("   ", f["evidence"])
        lines += _wrapped("   → ", _capital(f["advice"]))
    return "\n".join(lines if result["findings"] else [*lines, "Nothing stands out."])


def _wrapped(lead: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
