"""README's tables of measured speed, from the committed results: python -m bench.readme_table [--write]

A row is a function from the results of one machine to its cells; where a file or an entry is missing, so are its rows.
A GPU has a table of its own where ``bench/results/<gpu>/bench.json`` is there. Without ``--write`` a difference to
README is shown, with exit code 1.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.conditions import RESULTS
from fastgan.errors import InputError

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- performance: begin, python -m bench.readme_table -->"
END = "<!-- performance: end -->"

Results = dict[str, Any]  # what the files of a folder hold, by name
Row = tuple[str, str, str]


def read(folder: Path) -> Results:
    """Every ``*.json`` of a machine's folder, by its name without the ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


# ---- numbers


def duration(us: float) -> str:
    """Three digits and a unit."""
    value, unit = next(
        (us / size, unit) for size, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")) if us >= size or size == 1
    )
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def times(ratios: Iterable[float], noises: Iterable[float]) -> str:
    """Ratios; one that may as well be chance is about 1."""
    return "; ".join("≈ 1 ×" if abs(r - 1) <= noise else f"{r:.2f} ×" for r, noise in zip(ratios, noises, strict=True))


# ---- rows


def recipes(results: Results) -> list[Row]:
    """Whole runs of ``fastgan train``, as shipped."""
    found, rows = results.get("recipes", {}).get("recipes", {}), []
    for name, on in (("wgan-gp", " on the digits"), ("gaussians25-wgan-gp", ""), ("gaussians25", "")):
        if name not in found:
            continue
        run = found[name]
        q = run["quality"]
        if "modes_covered" in q:
            result = f"{q['modes_covered']:.0f} of 25 modes, {q['high_quality']:.0%} of samples within 3 σ"
        else:
            figures = f"precision {q['precision']:.2f}, recall {q['recall']:.2f}"
            result = f"FID {q['fid_small_classifier']:.2f} on a small classifier's features, {figures}"
        rows.append((f"`{name}`{on}", f"{run['wall_s']:.0f} s, {run['seconds_per_kimg']:.3f} s/kimg", result))
    return rows


def benched(results: Results) -> list[Results]:
    """Results of ``fastgan bench`` from the files ``bench*.json``, by workload and batch size."""
    found = [r for name, file in results.items() if name.startswith("bench") for r in file["results"]]
    order = list(dict.fromkeys(r["workload"] for r in found))
    return sorted(found, key=lambda r: (order.index(r["workload"]), r["precision"], r["batch"]))


def quoted(result: Results) -> bool:
    """Whether a workload has a row: the engine was right and was timed."""
    return bool(result["variants"].get("fastgan", {}).get("status") == "ok")


def workloads(results: Results) -> list[Row]:
    """One row for each workload and precision, its batch sizes beside each other."""
    found = [r for r in benched(results) if quoted(r)]
    rows = []
    for (name, precision), group in itertools.groupby(found, key=lambda r: (r["workload"], r["precision"])):
        cases = list(group)
        own, noises = [case["variants"]["fastgan"] for case in cases], [case["noise"] for case in cases]
        sizes = "; ".join(str(case["batch"]) for case in cases)
        about = ", ".join(x for x in (cases[0]["about"], precision * (precision != "fp32"), f"batch {sizes}") if x)
        said = []
        if all(variant["eager_over_this"] for variant in own):
            said.append(f"{times((v['eager_over_this'] for v in own), noises)} as fast as the usual loop")
        if all(variant["best_competitor_over_this"] for variant in own):
            names = "; ".join(dict.fromkeys(case["best_competitor"] for case in cases))
            best = times((v["best_competitor_over_this"] for v in own), noises)
            said.append(f"{best} as the best other ({names})")
        if said:
            said.append(f"± {'; '.join(f'{n:.0%}' for n in noises)}")
        eager = [case["variants"].get("eager", {}).get("peak_bytes") for case in cases]
        if all(eager) and all(v.get("peak_bytes") for v in own):
            size = "; ".join(f"{v['peak_bytes'] / b:.2f}" for v, b in zip(own, eager, strict=True))
            said.append(f"memory {size} of the usual loop's")
        rows.append((f"`{name}`: {about}", "; ".join(duration(v["median_us"]) for v in own), ", ".join(said)))
    return rows


def peers(results: Results) -> list[Row]:
    """Code of others, beside the engine."""
    rows = []
    for name, peer in results.get("peers", {}).get("peers", {}).items():
        if peer["status"] == "ok":
            ratio = times([peer["peer_over_fastgan"]], [peer["noise"]])
            result = f"{ratio} as fast as `{name}`, ± {peer['noise']:.0%}"
            rows.append((peer["about"], duration(peer["sides"]["fastgan"]["median_us"]), result))
    return rows


def memory(results: Results) -> list[Row]:
    """Of one update, as the operating system counts it."""
    if "memory" not in results:
        return []
    found = results["memory"]
    said, size = found["conditions"], found["ways"]["engine"]["resident_bytes"]
    ratio = found["ratios"]["engine over eager"]["resident"]
    label = f"peak memory of a WGAN-GP critic update, {said['critic']}, batch {said['batch']}"
    return [(label, f"{size / 1e6:.0f} MB", f"{ratio:.2f} of the usual loop's")]


def gather(results: Results) -> list[Row]:
    """The data's batches."""
    if "gather" not in results:
        return []
    found = results["gather"]["batch"]["256"]
    us, ratio = found["variants"]["native, 2 threads"]["median_us"], found["expression_over_native"]
    return [("gather 256 random images of 3×32×32", duration(us), f"{ratio:.1f} × the numpy expression")]


ROWS: tuple[Callable[[Results], list[Row]], ...] = (recipes, workloads, peers, memory, gather)


# ---- tables


def machine(results: Results) -> str:
    """The machine and the version of torch that the results share; several where they do not."""
    said = [r["conditions"] for r in results.values() if "conditions" in r]
    cores = {f"{c['cores']} cores of an {c['cpu']}" if not c.get("gpu") else f"one {c['device_name']}" for c in said}
    versions = {c["torch"].partition("+")[0] for c in said}
    return f"{' and '.join(sorted(cores))}, torch {' and '.join(sorted(versions))}"


def table(results: Results, link: str) -> str:
    """A sentence of conditions and the rows; empty where there is none."""
    rows = [row for make in ROWS for row in make(results)]
    if not rows:
        return ""
    names = ("recipes", "peers", "memory", "gather")
    used = {name: result for name, result in results.items() if name in names or name.startswith("bench")}
    runs = "recipes as shipped, one run each; all else " if "recipes" in used else ""
    how = (
        f"Measured on {machine(used)}, fp32 where nothing else is said: {runs}interleaved with what it is compared "
        f"with, medians; the best other is the fastest of the same precision ([conditions, all variants, "
        f"autocast too]({link})):"
    )
    return "\n".join(
        [
            textwrap.fill(how, 120, break_long_words=False, break_on_hyphens=False),
            "",
            "| | time | result |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def section(folder: Path = RESULTS) -> str:
    """All that stands between the two comments: the CPU's table, and one for each GPU that was measured."""
    gpus = sorted(path.parent for path in folder.glob("*/bench.json") if path.parent.name != "cpu")
    parts = [table(read(where), f"bench/results/{where.name}") for where in (folder / "cpu", *gpus)]
    return "\n\n".join(part for part in parts if part)


def rewritten(text: str, folder: Path = RESULTS) -> str:
    """README's text with the tables as the results have them.

    Raises:
        InputError: the comments around them are missing.
    """
    before, begin, rest = text.partition(BEGIN + "\n")
    _, end, after = rest.partition(END + "\n")
    if not begin or not end:
        raise InputError(f"README.md: has no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n{section(folder)}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 where README differs and ``--write`` is not given; 2 where it has no place for the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="bring README.md up to date")
    args = parser.parse_args(argv)
    have = README.read_text()
    try:
        want = rewritten(have)
    except InputError as e:
        print(f"readme_table: {e}", file=sys.stderr)
        return 2
    if args.write:
        README.write_text(want)
    elif have != want:
        sys.stdout.writelines(
            difflib.unified_diff(have.splitlines(True), want.splitlines(True), "README.md", "the results")
        )
        print("README.md differs from bench/results: python -m bench.readme_table --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
