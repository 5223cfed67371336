"""``fastgan bench``: cases measured one after the other, in this process or each variant in one of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from fastgan.benchmark.ceilings import ceilings
from fastgan.benchmark.measure import Measurement, Settings, related
from fastgan.benchmark.workloads import Case
from fastgan.errors import InputError
from fastgan.machine import conditions

SCHEMA = "fastgan.bench/1"
Result = dict[str, Any]


def run(
    cases: Sequence[Case], settings: Settings, *, command: str, isolated: bool = False,
    done: Callable[[Result], None] = lambda result: None,
) -> Result:  # fmt: skip
    """Measure cases.

    Args:
        cases: of one device and precision.
        settings: how.
        command: as it was called, for the record.
        isolated: a process for each variant.
        done: takes all results so far, after each of them.

    Returns:
        The object that ``bench/README.md`` describes.
    """
    device, precision = cases[0].device, cases[0].precision
    settings.say("the machine's limits")
    how = "each variant in a process of its own" if isolated else "variants in turn, one block of calls each a round"
    timing = f"{how}; at most {settings.rounds} rounds or {settings.seconds:g} s of a case; medians"
    result: Result = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "conditions": conditions(device, timing=timing),
        "ceilings": ceilings(device, precision),
        "results": [],
    }
    for case in cases:
        at = f"{case.workload.name}, batch {case.batch}: "

        def say(text: str, at: str = at) -> None:
            settings.say(at + text)

        how_here = dataclasses.replace(settings, say=say)
        if isolated:
            found = _isolated(case, how_here)
        else:
            found = Measurement(case, result["ceilings"], how_here).run()
        result["results"].append(found)
        done(result)
    return result


def _isolated(case: Case, settings: Settings) -> Result:
    """One process after the other; the ratios are those of their medians."""
    rows: dict[str, Any] = {}
    for name in settings.variants:
        settings.say(f"{name}: in a process of its own")
        command = [
            sys.executable, "-m", "fastgan", "bench", "--workload", case.workload.name, "--batch", str(case.batch),
            "--variant", name, "--device", str(case.device), "--precision", case.precision,
            "--rounds", str(settings.rounds), "--seconds", str(settings.seconds),
            "--threads", str(torch.get_num_threads()), "--json", "-", "--quiet",
        ]  # fmt: skip
        child = subprocess.run(command, capture_output=True, text=True)
        try:
            rows[name] = json.loads(child.stdout)["results"][0]["variants"][name]
        except (ValueError, LookupError):
            lines = child.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"its process ended with exit code {child.returncode}"
            rows[name] = {"status": "failed", "reason": reason, "error": None, "error_limit": None}
    return related(case, rows, {name: [row["median_us"]] for name, row in rows.items() if row["status"] == "ok"})


def chosen(device: torch.device, precision: str) -> str:
    """The precision that is meant by ``auto``.

    Raises:
        InputError: it is none that can be compared.
    """
    known = ("fp32", "tf32", "bf16")
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    if precision not in known:
        raise InputError(f"precision: is {precision!r}, expected auto, {', '.join(known)}")
    return precision


