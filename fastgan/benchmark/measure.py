"""One result: a case in all variants, each checked first, then timed in turn."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgan import nvml
from fastgan.benchmark.by_hand import Unable
from fastgan.benchmark.ceilings import Limits
from fastgan.benchmark.check import Reference
from fastgan.benchmark.memory import Held
from fastgan.benchmark.timing import block, quantiles, ratio, rounds_us, wait
from fastgan.benchmark.variants import VARIANTS, Make, Way
from fastgan.benchmark.workloads import Case
from fastgan.costs import Cost
from fastgan.errors import InputError

Row = dict[str, Any]
PLAIN, OWN, TWIN, AMP = "eager", "fastgan", " again", "AMP"
TIMED = (
    "median_us", "p20_us", "p80_us", "rounds", "noise", "iterations_per_second", "seconds_per_kimg", "eager_over_this",
    "best_competitor_over_this", "penalty_overhead", "launches", "gflop", "gb", "tflop_per_s", "gb_per_s",
    "share_of_matrix_rate", "share_of_bandwidth", "peak_bytes", "joule_per_kimg", "time_split_us",
)  # fmt: skip
"""Keys of a row of a variant that is right."""


@dataclass(frozen=True)
class Settings:
    """How a case is measured.

    Attributes:
        rounds: of timing, at most.
        seconds: of timing, after which no further round begins.
        variants: by name; one whose name ends in ``again`` is a twin, and shows the noise.
        split: whether the penalty's and the generator's share are measured too.
        energy_s: seconds of each variant on a GPU that its energy is read over, whose counter is too coarse for less
            than five; 0 to leave it out.
        say: takes what is being done.
    """

    rounds: int = 60
    seconds: float = 25.0
    variants: Mapping[str, Make] = field(default_factory=lambda: VARIANTS)
    split: bool = True
    energy_s: float = 5.0
    say: Callable[[str], None] = lambda text: None


class Measurement:
    """A case that is being measured.

    Attributes:
        rows: by variant, as in the schema.
        limits: what the machine was seen to do at most, as ``ceilings`` of the schema; after :meth:`run`.
    """

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.limits: dict[str, Any] = {}
        self.rows: dict[str, Row] = {}
        self._ways: dict[str, Way] = {}
        self._costs: dict[str, Cost | None] = {}
        self._times: dict[str, list[float]] = {}

    def run(self) -> Row:
        """The result."""
        torch._dynamo.reset()  # the compiler takes a function of ours so many times, whatever it closes over
        reference = Reference(self.case)
        self.settings.say("the reference in fp64")
        reference.exact()  # before memory is measured
        for name, make in self.settings.variants.items():
            self.settings.say(f"{name}: made and checked")
            self.rows[name] = self._checked(name, make, reference)
        self.settings.say("timed")
        deadline = time.monotonic() + self.settings.seconds
        runs = {name: _call(way) for name, way in self._ways.items()}
        limits = Limits(self.case.device, {way.numbers for way in self._ways.values()})
        times, _ = rounds_us(runs | limits.runs, self.case.device, self.settings.rounds, deadline)
        self.limits = limits.reached({name: times.pop(name) for name in limits.runs})
        self._times = {name: [t / self._ways[name].calls for t in found] for name, found in times.items()}
        for name, found in self._times.items():
            self.rows[name] |= quantiles(found) | {"noise": ratio([1.0] * len(found), found)[1]}
        if self.settings.split:
            self._split()
        for name in self._ways:
            self._rate(name)
        if self.case.device.type == "cuda" and self.settings.energy_s:
            self._measure_energy()
        return related(self.case, self.rows, self._times)

    def _checked(self, name: str, make: Make, reference: Reference) -> Row:
        """The beginning of a row; memory and cost are known then."""
        row: Row = {"status": "ok", "reason": None, "precision": None, "error": None, "error_limit": None}
        held = Held(self.case.device)
        try:
            way = make(self.case)
            row["precision"] = way.numbers
            error = reference.hold(way, way.numbers)
            row |= {"error": error.moments, "error_limit": error.limits[0]}
            if not error.right:
                return row | {"status": "wrong", "reason": error.sentence()}
            row |= dict.fromkeys(TIMED)
            with way.precision():
                row["peak_bytes"] = held.peak(way.run)
                self._costs[name] = way.cost()
        except (Unable, InputError) as e:
            return row | {"status": "skipped", "reason": str(e)}
        except Exception as e:  # a form that the compiler refuses is part of the result
            return row | {"status": "failed", "reason": last_line(e)}
        self._ways[name] = way
        return row

    def _split(self) -> None:
        """What the penalty costs, and the generator's update: fewer rounds, beside the whole iteration."""
        case, runs = self.case, {}
        ways = {name: way for name, way in self._ways.items() if not name.endswith(TWIN)}
        penalised = bool(case.plain.penalties)
        for name, way in ways.items():
            runs[name, "whole"] = _call(way)
            if way.generate is not None:
                runs[name, "generator"] = _call(way, way.generate)  # of which a call is one
            if penalised:
                self.settings.say(f"{name}: made without penalty")
                try:
                    bare = _call(self.settings.variants[name](case.without_penalties()))
                    bare()
                except Exception as e:  # the whole is known all the same
                    self.settings.say(f"{name}: its penalty's cost is not known: {last_line(e)}")
                else:
                    runs[name, "bare"] = bare
        self.settings.say("timed without penalty")
        deadline = time.monotonic() + self.settings.seconds / 2
        named = {"\n".join(key): run for key, run in runs.items()}
        times, _ = rounds_us(named, case.device, max(3, self.settings.rounds // 3), deadline)
        for name, way in ways.items():
            whole = [t / way.calls for t in times[f"{name}\nwhole"]]
            without = [t / way.calls for t in times.get(f"{name}\nbare", [])]
            generator = times.get(f"{name}\ngenerator")
            row, penalty = self.rows[name], 0.0
            if without:
                row["penalty_overhead"], _ = ratio(whole, without)
                penalty = max(0.0, 1 - 1 / row["penalty_overhead"])
            if generator is not None and (without or not penalised):
                share = min(1 - penalty, ratio(generator, whole)[0])
                parts = {"discriminator": 1 - penalty - share, "penalty": penalty, "generator": share}
                row["time_split_us"] = {part: value * row["median_us"] for part, value in parts.items()}

    def _rate(self, name: str) -> None:
        """Throughput. A compiler's launches and bytes are not known."""
        row, own = self.rows[name], self._costs[name]
        us = row["median_us"]
        row["iterations_per_second"] = 1e6 / us
        row["seconds_per_kimg"] = us / 1e3 / self.case.images
        cost = own or self._costs.get(PLAIN)
        if cost is not None and cost.flops:  # of one launch that is everything they are not told
            row["gflop"], row["tflop_per_s"] = cost.flops / 1e9, cost.flops / us / 1e6
        if own is not None:
            row["launches"], row["gb"], row["gb_per_s"] = own.launches, own.bytes / 1e9, own.bytes / us / 1e3

    def _measure_energy(self) -> None:
        """Joule for a thousand real images, from the GPU's counter over some seconds."""
        gpu = nvml.Gpu(self.case.device)
        for name, way in self._ways.items():
            if name.endswith(TWIN):
                continue
            row, run = self.rows[name], _call(way)
            calls = max(1, round(self.settings.energy_s * 1e6 / (row["median_us"] * way.calls)))
            wait(self.case.device)
            before = gpu.energy_j()
            if before is None:
                self.settings.say("; ".join(gpu.missing) or "energy is not known")
                break
            block(run, calls, self.case.device)
            after = gpu.energy_j()
            if after is not None:
                row["joule_per_kimg"] = (after - before) / (calls * way.calls * self.case.images) * 1e3
        gpu.close()


def _call(way: Way, run: Callable[[], object] | None = None) -> Callable[[], object]:
    run = run or way.many or way.run

    def call() -> None:
        with way.precision():
            run()

    return call


def related(case: Case, rows: Mapping[str, Row], times: Mapping[str, Sequence[float]]) -> Row:
    """The variants' ratios to each other, round by round, and the noise of these.

    The best competitor is the fastest other variant whose numbers are as good: autocast competes where bf16 is asked
    for.
    """
    good = {name: row for name, row in rows.items() if name in times and not name.endswith(TWIN)}
    rivals = [name for name in good if not name.startswith(OWN) and (AMP not in name or case.precision == "bf16")]
    beside = times.get(OWN, [1.0] * max(map(len, times.values()), default=0))
    best = min(rivals, key=lambda name: ratio(times[name], beside)[0]) if rivals else None
    noise = 0.0
    for name, found in times.items():
        for key, other in (("eager_over_this", PLAIN), ("best_competitor_over_this", best)):
            if other is not None and other in times:
                rows[name][key], apart = ratio(times[other], found)
                if len(found) > 1 and other == PLAIN and name != other:
                    rows[name]["noise"] = apart
                noise = max(noise, apart, abs(rows[name][key] - 1) if name == f"{other}{TWIN}" else 0.0)
        if len(found) == 1:  # medians of processes of their own
            noise = max(noise, 2 * rows[name]["noise"])
    return {
        "workload": case.workload.name,
        "about": case.workload.about,
        "batch": case.batch,
        "precision": case.precision,
        "n_critic": case.plain.n_critic,
        "images_per_iteration": case.images,
        "noise": noise if times else None,
        "best_competitor": best,
        "variants": dict(rows),
    }


def compared_with(limits: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Add the shares of what the machine can do to rows."""
    for row in rows:
        rate = limits["matrix_tflop_per_s"].get(row["precision"])
        for share, key, limit in (
            ("share_of_matrix_rate", "tflop_per_s", rate), ("share_of_bandwidth", "gb_per_s", limits["copy_gb_per_s"])
        ):  # fmt: skip
            if row.get(key) is not None and limit:
                row[share] = row[key] / limit


def last_line(e: BaseException) -> str:
    """Of a traceback, shortened; all lines of an error of torch's compiler, whose first ones say what it is."""
    text = "".join(traceback.format_exception_only(e)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kind = type(e).__name__
    if type(e).__module__.startswith("torch._dynamo"):
        return f"{kind}: {' '.join(str(e).split())}"[:400]
    line = lines[-1] if lines else kind
    return (line if line.startswith(kind) or len(lines) == 1 else f"{kind}: {line}")[:400]
