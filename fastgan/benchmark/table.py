"""Results as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}g}" if value < 10**digits else f"{value:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{value:.0%}"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("it/s", "iterations_per_second", _number(4)),
    ("s/kimg", "seconds_per_kimg", _number(3)),
    ("eager/", "eager_over_this", _times),
    ("best/", "best_competitor_over_this", _times),
    ("penalty", "penalty_overhead", _times),
    ("launches", "launches", lambda value: f"{value:.0f}"),
    ("TFLOP/s", "tflop_per_s", _number(3)),
    ("limit", "share_of_matrix_rate", _percent),
    ("GB/s", "gb_per_s", _number(3)),
    ("limit", "share_of_bandwidth", _percent),
    ("MB", "peak_bytes", lambda value: f"{value / 1e6:.0f}"),
    ("J/kimg", "joule_per_kimg", _number(3)),
)


def result_table(result: Row) -> str:
    """One case: a line for each variant, in at most 120 columns."""
    rows: Mapping[str, Row] = result["variants"]
    shown = [c for c in COLUMNS if any(row.get(c[1]) is not None for row in rows.values())]
    width = max(map(len, rows)) + 2
    critics = f", {result['n_critic']} discriminator updates an iteration" if result["n_critic"] > 1 else ""
    lines = [
        f"{result['workload']}, batch {result['batch']}, {result['precision']}{critics}: {result['about']}"[:120],
        " " * width + "".join(f"{head:>9}" for head, *_ in shown),
    ]
    for name, row in rows.items():
        if row["status"] != "ok":
            lines.append(f"{name:<{width}}  {row['status'].upper()}: {row['reason']}"[:120])
            continue
        cells = [_cell(row.get(key), text) for _, key, text in shown]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join([*lines, *sentences(result)])


def _cell(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None or value != value else text(value)


def sentences(result: Row) -> list[str]:
    """What it comes to, with the noise."""
    own, best = result["variants"].get("fastgan", {}), result["best_competitor"]
    if own.get("median_us") is None or own.get("eager_over_this") is None:
        return []
    parts = [f"fastgan is {_times(own['eager_over_this'])} as fast as eager"]
    if best not in (None, "eager"):
        parts.append(f"{_times(own['best_competitor_over_this'])} as fast as the best other variant ({best})")
    return [f"{' and '.join(parts)}; ratios are good to {result['noise']:.1%}"]


def whole_table(result: Row) -> str:
    """All cases, below the conditions."""
    said, limits = result["conditions"], result["ceilings"]
    rates = ", ".join(f"{kind} {rate:.3g}" for kind, rate in limits["matrix_tflop_per_s"].items())
    load = "" if said["load_before"] is None else f", load {said['load_before']:.2f}"
    head = [
        f"{said['device_name']}, {said['torch_threads']} threads, torch {said['torch']}{load}",
        f"limits: products {rates} TFLOP/s, copies {limits['copy_gb_per_s']:.3g} GB/s (bytes of caches count too)",
        "eager/ and best/: how many times as long eager, and the best other variant, take",
    ]
    return "\n\n".join(["\n".join(head), *map(result_table, result["results"])])
