"""Everything that needs a GPU, checked and measured by one command in under ten minutes.

python -m bench.gpu [--out FOLDER] [--sections A,B] [--tiny]

It needs torch, triton and numpy; what else is missing is said and left out. Each section runs in a process of its own
and has a time of its own: one that fails, crashes or hangs is recorded, and the next one runs. Results go to one file,
``results.json`` in the folder (by default ``bench/results/<gpu>/``), which is written after every part of a section;
what the sections print goes to ``log.txt`` beside it. A short summary is printed last.

Without a GPU the sections that need one say so; ``--tiny`` then shows in a minute that the others run. What a short
time cuts off can be run again alone: ``--sections tune,sanitizer --seconds 500``; the other sections' results stay.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import ceilings, checks, machine, rows, tune
from bench.conditions import RESULTS
from bench.sections import NO_CUDA, Results, Section, run_apart, run_here

SCHEMA = 1
SECTIONS: dict[str, Section] = {  # in this order: what matters most first, so that it is there when the time is over
    "environment": Section(machine.environment, 20),
    "compilation": Section(rows.compilation, 60, cuda=True),
    "ceilings": Section(ceilings.ceilings, 35),
    "validate": Section(checks.validate, 90),
    "rows": Section(rows.rows, 120),
    "drift": Section(rows.drift, 50),
    "kernels": Section(rows.kernels, 30, cuda=True),
    "compiled": Section(rows.compiled, 75, cuda=True),
    "memory": Section(rows.memory, 20, cuda=True),
    "tune": Section(tune.tune, 60, cuda=True),
    "tests": Section(checks.tests, 60),
    "sanitizer": Section(checks.sanitizer, 40, cuda=True),
}
BUDGET_S = 560.0
MOST_CHARACTERS = 11_500


def main(argv: list[str] | None = None) -> int:
    """Run sections.

    Returns:
        The exit code: 0 where every section is ok or says why it is skipped, 1 otherwise, 2 for a bad argument.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m bench.gpu")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<gpu>)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, in order (default: all)")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds in all (default: {BUDGET_S:.0f})")
    parser.add_argument("--seconds", type=float, help="the most for each section, instead of its own")
    parser.add_argument("--in-process", action="store_true", help="no process for each section, to debug one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = [args.child] if args.child else [name.strip() for name in args.sections.split(",")]
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections: unknown section {unknown[0]!r}, expected some of {', '.join(SECTIONS)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = args.out or RESULTS / (machine.slug(device) + ("-tiny" if args.tiny else ""))
    results = Results(folder)
    if args.child:
        run_here(args.child, SECTIONS[args.child], results, device=device, tiny=args.tiny, seconds=args.budget)
        return 0
    begin = time.monotonic()
    result = results.load()
    results.save({"schema": SCHEMA, "device": machine.slug(device), "tiny": args.tiny, **begun(result, names)})
    for name in names:
        seconds = min(args.seconds or SECTIONS[name].seconds, args.budget - (time.monotonic() - begin))
        why = NO_CUDA if SECTIONS[name].cuda and device.type != "cuda" else "no time left" if seconds < 10 else None
        if why is not None:
            results.set(name, status=(status := "skipped"), reason=why)
        elif args.in_process:
            status = run_here(
                name, SECTIONS[name], results, device=device, tiny=args.tiny, seconds=seconds
            )  # fmt: skip
        else:
            command = ["bench.gpu", "--child", name, "--out", str(folder.resolve()), "--budget", f"{seconds - 4:.1f}"]
            status = run_apart(name, command + ["--tiny"] * args.tiny, results, seconds)
        entry = results.load()["sections"][name]
        reason = f": {entry['reason']}" if "reason" in entry else ""
        print(f"{time.monotonic() - begin:6.1f} s  {name}: {status}{reason}"[:200], flush=True)
    result = results.load()
    print(f"\n{summary(result)[:MOST_CHARACTERS]}\n\nwritten to {results.path}")
    return 1 if any(result["sections"][name]["status"] in ("failed", "out of time") for name in names) else 0


def begun(result: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The file at the start: sections that are not run again keep what an earlier run found."""
    kept = {name: entry for name, entry in result["sections"].items() if name not in names}
    return {"sections": kept | {name: {"status": "not run"} for name in names}}


# ---- in short


def summary(result: Mapping[str, Any]) -> str:
    """The sections' states and the figures that matter, in lines of at most 120 characters."""
    lines = [f"{result['device']}{', tiny sizes: times mean nothing' if result['tiny'] else ''}"]
    for name, entry in result["sections"].items():
        seconds = f"{entry['seconds']:6.1f} s" if "seconds" in entry else " " * 8
        lines.append(f"{name:12} {entry['status']:12} {seconds}  {entry.get('reason', '')}"[:120].rstrip())
    for name, short in SHORT.items():
        data = result["sections"].get(name, {}).get("data", {})
        if data:
            found = short(data)
            lines += ["", *found] if found else []
    wide = [textwrap.wrap(line, 120, subsequent_indent="    ") if len(line) > 120 else [line] for line in lines]
    return "\n".join(itertools.chain.from_iterable(wide))


def short_environment(data: Mapping[str, Any]) -> list[str]:
    said = data.get("conditions", {})
    gpu = dict(said.get("gpu") or {})
    out = [f"torch {said.get('torch')}, triton {said.get('triton')}, python {said.get('python')}"]
    if gpu:
        missing = gpu.pop("missing")
        out += [", ".join(f"{k} {v}" for k, v in gpu.items()), *missing]
    return out


def short_ceilings(data: Mapping[str, Any]) -> list[str]:
    units = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "node_us": "us/node", "barrier_us": "us/barrier"}
    found = [
        f"{key} {value[unit]:.4g} {text}"
        for key, value in data.items()
        for unit, text in units.items()
        if unit in value
    ]
    return ["ceilings: " + ", ".join(found)] if found else []


def short_validate(data: Mapping[str, Any]) -> list[str]:
    n = data.get("summary")
    return [f"validate: {n['passed']} passed, {n['failed']} failed, {n['skipped']} skipped"] if n else []


def short_tests(data: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name, value in data.items():
        found += [f"tests, {name}: {value.get('closing line', value)}"[:120]]
        found += [f"  {line}"[:120] for line in value.get("bad", [])[:8]]
    return found


def short_rows(data: Mapping[str, Any]) -> list[str]:
    out = [
        f"{'median us':34}{'eager':>10}{'graph':>10}{'compiled':>10}{'fastgan':>10}  which way; ratios to graph, eager"
    ]
    for key, found in data.items():
        if "variants" not in found:
            continue
        ways = found["variants"]
        out.append(f"{key[:34]:34}{_times(ways)}"[:120])
        out += [f"    {label}: {ways[label]['penalty_overhead']:.2f} times its time without the penalty"
                for label in ("eager", "CUDA graph", _best(ways, "fastgan"))
                if ways.get(label, {}).get("penalty_overhead")]  # fmt: skip
        out += [f"    {label}: {row['status']}: {row['reason']}"[:120] for label, row in ways.items()
                if row["status"] in ("wrong", "failed")]  # fmt: skip
    return out


def _best(ways: Mapping[str, Any], start: str) -> str:
    timed = {label: row["median_us"] for label, row in ways.items() if label.startswith(start) and "median_us" in row}
    return min(timed, key=lambda label: timed[label]) if timed else ""


def _times(ways: Mapping[str, Any]) -> str:
    best = _best(ways, "fastgan")
    labels = ["eager", "CUDA graph", _best(ways, "compiled"), best]
    times = [ways.get(label, {}).get("median_us") for label in labels]
    text = "".join(f"{t:10.1f}" if t is not None else f"{'-':>10}" for t in times)
    over = [f"{t / times[3]:.2f}" for t in (times[1], times[0]) if t is not None and times[3] is not None]
    return f"{text}  {best.removeprefix('fastgan ')}{'; ' if over else ''}{', '.join(over)}"


def short_drift(data: Mapping[str, Any]) -> list[str]:
    out = []
    for name, value in data.items():
        text = next((str(value[k]) for k in ("skipped", "failed") if k in value), "")
        last = value.get(f"after {value.get('steps')}")
        if last:
            off = "equal bits" if last["equal_bits"] else f"way off {last['way_off']:.1e}"
            text = f"{off} after {value['steps']} iterations"
        out.append(f"drift, {name}: {text}"[:120])
    return out


def short_kernels(data: Mapping[str, Any]) -> list[str]:
    found = [f"{k}: {v['by profiler']['kernels']:g}" for k, v in data.items() if "by profiler" in v]
    return ["kernels of an update: " + "; ".join(found)] if found else []


def short_memory(data: Mapping[str, Any]) -> list[str]:
    found = [f"{k}: {v['peak_bytes'] / 2**20:.0f} MiB" for k, v in data.items() if "peak_bytes" in v]
    return ["peak memory of a critic update at batch 4096: " + "; ".join(found)] if found else []


def short_sanitizer(data: Mapping[str, Any]) -> list[str]:
    return [f"sanitizer, {k}: {v.get('closing line', v)}"[:120] for k, v in data.items()]


def short_tune(data: Mapping[str, Any]) -> list[str]:
    won = [
        f"{k}: {v['best_us']:.2f} us ({'x'.join(map(str, v['best']))})"
        + (f", library {v['library_us']:.2f}" if v["library_us"] is not None else "")
        for k, v in data.items()
        if "best_us" in v
    ]
    return ["tiles, fastest of each shape:", *(f"  {line}"[:120] for line in won[:24])] if won else []


SHORT: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "environment": short_environment,
    "ceilings": short_ceilings,
    "validate": short_validate,
    "tests": short_tests,
    "rows": short_rows,
    "compiled": short_rows,
    "drift": short_drift,
    "kernels": short_kernels,
    "memory": short_memory,
    "sanitizer": short_sanitizer,
    "tune": short_tune,
}

if __name__ == "__main__":
    raise SystemExit(main())
