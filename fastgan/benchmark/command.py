"""``fastgan bench``: cases measured one after the other, in this process or each variant in one of its own."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastgan.benchmark.ceilings import larger
from fastgan.benchmark.compare import SCHEMA, changes_table, compare, load
from fastgan.benchmark.measure import OWN, Measurement, Settings, compared_with, related
from fastgan.benchmark.table import whole_table
from fastgan.benchmark.variants import ABOUT, VARIANTS, Make
from fastgan.benchmark.workloads import WORKLOADS, Case, cases
from fastgan.engine import device_of
from fastgan.errors import InputError, unknown
from fastgan.machine import conditions
from fastgan.pictures import write_whole
from fastgan.plain import as_json

Result = dict[str, Any]


def run(
    asked: Sequence[Case], settings: Settings, *, command: str, isolated: bool = False,
    done: Callable[[Result], None] = lambda result: None,
) -> Result:  # fmt: skip
    """Measure cases.

    Args:
        asked: cases of one device and precision.
        settings: how.
        command: as it was called, for the record.
        isolated: a process for each variant.
        done: takes all results so far, after each of them.

    Returns:
        The object that ``bench/README.md`` describes.
    """
    device = asked[0].device
    how = "each variant in a process of its own" if isolated else "variants in turn, one block of calls each a round"
    timing = f"{how}; at most {settings.rounds} rounds or {settings.seconds:g} s of a case; medians"
    result: Result = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "conditions": conditions(device, timing=timing),
        "ceilings": {"matrix_tflop_per_s": {}, "copy_gb_per_s": 0.0},
        "results": [],
    }
    for case in asked:
        at = f"{case.workload.name}, batch {case.batch}: "

        def say(text: str, at: str = at) -> None:
            settings.say(at + text)

        how_here = dataclasses.replace(settings, say=say)
        if isolated:
            measured, limits = _isolated(case, how_here)
        else:
            measurement = Measurement(case, how_here)
            measured, limits = measurement.run(), measurement.limits
        result["results"].append(measured)
        result["ceilings"] = larger(result["ceilings"], limits)
        compared_with(result["ceilings"], (row for r in result["results"] for row in r["variants"].values()))
        done(result)
    return result


def _isolated(case: Case, settings: Settings) -> tuple[Result, Result]:
    """One process after the other: the result, whose ratios are those of medians, and the machine's limits."""
    rows: dict[str, Any] = {}
    limits: Result = {"matrix_tflop_per_s": {}, "copy_gb_per_s": 0.0}
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
            found = json.loads(child.stdout)
            rows[name] = found["results"][0]["variants"][name]
            limits = larger(limits, found["ceilings"])
        except (ValueError, LookupError):
            lines = child.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"its process ended with exit code {child.returncode}"
            rows[name] = {"status": "failed", "reason": reason, "precision": None, "error": None, "error_limit": None}
    times = {name: [row["median_us"]] for name, row in rows.items() if row["status"] == "ok"}
    return related(case, rows, times), limits


def main(args: Namespace) -> int:
    """The command, with its arguments read.

    Returns:
        0, or 1 where a comparison found a regression, a variant of fastgan is not right, or nothing could be timed.
    """
    if args.compare:
        before, after = map(load, args.compare)
        changes = compare(before, after)
        print(changes_table(changes, before, after))
        return int(any(change.regression for change in changes))
    if args.list:
        _list()
        return 0
    if args.rounds < 3:
        raise InputError(f"--rounds: {args.rounds}, expected >= 3")
    if not args.seconds > 0:
        raise InputError(f"--seconds: {args.seconds}, expected > 0")
    device = device_of("--device", args.device)
    for path in (args.json, args.html):
        if path is not None and path != "-" and not Path(path).parent.is_dir():
            raise InputError(f"{path}: its folder does not exist")
        if path is not None and Path(path).is_dir():
            raise InputError(f"{path}: is a folder, expected a file")
    names = args.workload.split(",") if args.workload else list(WORKLOADS)
    found = cases(names, _numbers("--batch", args.batch), device, chosen(device, args.precision))

    def say(text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    settings = Settings(
        rounds=args.rounds, seconds=args.seconds, variants=_variants(args.variant),
        say=(lambda text: None) if args.quiet else say,
    )  # fmt: skip

    def done(result: Result) -> None:
        if args.json not in (None, "-"):
            _write(args.json, as_json(result, indent=1) + "\n")

    called = shlex.join(["fastgan", *sys.argv[1:]])
    result = run(found, settings, command=called, isolated=args.isolate, done=done)
    if args.json == "-":
        print(as_json(result, indent=1))
    else:
        print(whole_table(result))
    if args.html or args.png:
        from fastgan import report

        if args.html:
            _write(args.html, report.bench_page(result))
        if args.png:
            report.bench_pictures(result, Path(args.png))
    rows = [(name, row) for r in result["results"] for name, row in r["variants"].items()]
    bad = any(name.startswith(OWN) and row["status"] in ("wrong", "failed") for name, row in rows)
    return int(bad or not any(row["status"] == "ok" for _, row in rows))


def _write(path: str, text: str) -> None:
    try:
        write_whole(Path(path), text.encode())
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}") from e


def _list() -> None:
    width = max(map(len, [*WORKLOADS, *VARIANTS])) + 2
    print("workloads")
    for workload in WORKLOADS.values():
        print(f"  {workload.name:<{width}}{workload.about}; batch {workload.batch}")
    print("variants")
    for name in VARIANTS:
        print(f"  {name:<{width}}{ABOUT[name]}")


def _variants(names: str | None) -> Mapping[str, Make]:
    if names is None:
        return VARIANTS
    asked = names.split(",")
    for name in asked:
        if name not in VARIANTS:
            raise unknown("variant", name, VARIANTS)
    return {name: VARIANTS[name] for name in VARIANTS if name in asked}


def _numbers(option: str, text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"{option}: {text!r}, expected whole numbers, e.g. 64,512") from None


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
