"""Two results of ``fastgan bench``: what has become faster, slower or wrong, beyond their noise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan.benchmark.measure import OWN, PLAIN, TWIN
from fastgan.errors import InputError

SCHEMA = "fastgan.bench/1"


def load(path: str | Path) -> dict[str, Any]:
    """A result that was written with ``--json``.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        result = json.loads(Path(path).read_text())
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"{path}: is no JSON: {e}") from e
    got = result.get("schema") if isinstance(result, dict) else type(result).__name__
    if got != SCHEMA:
        raise InputError(f"{path}: schema is {got!r}, expected {SCHEMA!r}")
    return dict(result)


@dataclass(frozen=True)
class Change:
    """Of one variant of one case.

    Attributes:
        case: workload, batch and precision.
        variant: of it.
        speed: of the second result over the first one's: of the ratios to eager where both have them, else of the
            absolute times; ``None`` where one has no number.
        absolute: of iterations per second.
        noise: of ``speed``.
        verdict: ``faster``, ``slower``, ``same``, or what the variant has become (``wrong``, ``gone``, ``ok`` ...).
    """

    case: str
    variant: str
    speed: float | None
    absolute: float | None
    noise: float
    verdict: str

    @property
    def regression(self) -> bool:
        """Whether a variant of fastgan is slower than before beyond noise, or not right any more."""
        return self.variant.startswith(OWN) and self.verdict not in ("faster", "same", "ok", "new", "as before")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """All variants of all cases of both results."""
    old, new = ({_name(r): r for r in result["results"]} for result in (before, after))
    changes = []
    for case in dict.fromkeys([*old, *new]):
        a, b = old.get(case), new.get(case)
        if a is None or b is None:
            rows = (a or b or {})["variants"]
            changes += [Change(case, name, None, None, 0.0, "new" if a is None else "gone") for name in rows]
            continue
        for name in dict.fromkeys([*a["variants"], *b["variants"]]):
            changes.append(_changed(case, name, a, b))
    return changes


def _name(result: Mapping[str, Any]) -> str:
    return f"{result['workload']}, batch {result['batch']}, {result['precision']}"


def _changed(case: str, name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Change:
    x, y = a["variants"].get(name), b["variants"].get(name)
    was, now = (row["status"] if row else None for row in (x, y))
    noise = math.hypot(_noise(a, x), _noise(b, y))
    if was != "ok" or now != "ok":
        verdict = "gone" if now is None else "new" if was is None else now
        if was == now:
            verdict = "as before"
        return Change(case, name, None, None, noise, verdict)
    absolute = x["median_us"] / y["median_us"]
    related = name != PLAIN and None not in (x["eager_over_this"], y["eager_over_this"])
    speed = y["eager_over_this"] / x["eager_over_this"] if related else absolute
    verdict = "same" if abs(speed - 1) <= noise else "faster" if speed > 1 else "slower"
    return Change(case, name, speed, absolute, noise, verdict)


def _noise(result: Mapping[str, Any], row: Mapping[str, Any] | None) -> float:
    """Of a variant's ratio to eager, or how far eager is from its twin, if that is more."""
    twin: float = result["variants"].get(f"{PLAIN}{TWIN}", {}).get("eager_over_this") or 1.0
    own: float = (row or {}).get("noise") or 0.0
    return max(abs(twin - 1), own)


def changes_table(changes: list[Change], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The changes as text, with what differs between the conditions."""
    width = max((len(c.variant) for c in changes), default=0) + 2
    lines = []
    for key in ("device_name", "torch_threads", "torch", "triton", "python"):
        x, y = (result["conditions"].get(key) for result in (before, after))
        if x != y:
            lines.append(f"note: {key} was {x}, is {y}")
    case = None
    for c in changes:
        if c.case != case:
            lines += ["", c.case, " " * width + f"{'to eager':>10}{'noise':>8}{'alone':>9}"]
            case = c.case
        if c.speed is None or c.absolute is None:
            lines.append(f"{c.variant:<{width}}{c.verdict:>10}")
        else:
            figures = f"{c.speed - 1:>+10.1%}{c.noise:>8.1%}{c.absolute - 1:>+9.1%}"
            lines.append(f"{c.variant:<{width}}{figures}  {c.verdict}")
    bad = [c for c in changes if c.regression]
    closing = f"{len(bad)} regressions beyond noise" if bad else "no regression beyond noise"
    return "\n".join([*lines, "", closing]).lstrip("\n")
