"""Figures of a result as text; whatever is missing, ``null`` or not finite is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
NOTHING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def number(row: Row, key: str) -> float | None:
    """A finite figure of a row, or ``None``."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def part(row: Row, key: str) -> Row:
    """An object within a row; an empty one where there is none."""
    value = row.get(key)
    return value if isinstance(value, Mapping) else {}


def parts(row: Row, key: str) -> list[Row]:
    """The objects of a list within a row."""
    value = row.get(key)
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, Sequence) else []


def word(row: Row, key: str, otherwise: str = NOTHING) -> str:
    """A text of a row."""
    value = row.get(key)
    return otherwise if value in (None, "") or value != value else str(value)


def points(pairs: object) -> list[tuple[float, float]]:
    """Those of a series ``[[seconds, value], ...]`` that are numbers."""
    if not isinstance(pairs, Sequence):
        return []
    good = (p for p in pairs if isinstance(p, Sequence) and len(p) == 2 and all(isinstance(v, (int, float)) for v in p))
    return [(float(t), float(v)) for t, v in good if math.isfinite(t) and math.isfinite(v)]


def figure(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, and all that are left of the point."""
    if value is None:
        return NOTHING
    if abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    elif value and abs(value) < 1e-3:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", _MINUS)


def count(value: float | None) -> str:
    """How many: whole, or with three digits where it is an average."""
    return f"{value:,.0f}" if value is not None and value == round(value) else figure(value)


def times(value: float | None) -> str:
    """A ratio: ``1.75x``."""
    return NOTHING if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    """A share: ``41%``, and ``0.4%`` below a hundredth."""
    if value is None:
        return NOTHING
    return f"{value:.1%}".replace("-", _MINUS) if 0 < abs(value) < 0.0995 else f"{value:.0%}".replace("-", _MINUS)


def duration(us: float | None) -> str:
    """Of microseconds: ``850 µs``, ``1.2 ms``, ``3.4 s``."""
    if us is None:
        return NOTHING
    for factor, unit in ((1.0, "µs"), (1e3, "ms")):
        if abs(us) < 999.5 * factor:
            return f"{figure(us / factor)} {unit}"
    return f"{figure(us / 1e6)} s"


def size(n: float | None) -> str:
    """Of bytes: ``12 KiB``, ``3.4 GiB``."""
    if n is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1023.5:
            return f"{figure(n)} {unit}"
        n /= 1024
    return f"{figure(n)} GiB"


def moment(created: str) -> str:
    """An ISO time, to the minute."""
    return created.replace("T", " ")[:16] + (" UTC" if created.endswith(("+00:00", "Z")) else created[19:])


def between(values: Sequence[float], text: Any) -> str:
    """One value, or the range of several."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"
