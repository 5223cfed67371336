"""Where the time and the memory of training go, and what to change: ``with fastgan.profile(engine) as p:``.

The iterations of the loop within are used one after another: some to warm up, some watched for what waits for the
device and for FLOPs, bytes and launches, a few under torch's profiler, and all others in blocks that are timed as they
are and with the clocks of the phases running, in turn. The ratio of the two medians is the profiler's own cost.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from datetime import datetime, timezone
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgan import marks, pictures
from fastgan.benchmark.timing import wait
from fastgan.costs import OpWatch, bytes_of_optimisers
from fastgan.engine import Engine
from fastgan.errors import InputError
from fastgan.plain import as_json
from fastgan.profiling import findings, memory, text, trace
from fastgan.profiling.recorder import Lines, Place, Recorder, Waits
from fastgan.profiling.sampler import Sampler

SCHEMA = "fastgan.profile/1"

_WARM_UP = 3  # iterations
_WATCHED = 2
_TRACED = 3
_LONGEST_PERIOD = 16  # iterations after which lazy penalties are due again, up to which all stages cover whole ones
_BLOCK_S = 0.05
_MEASURED_S = 60.0  # after which a loop runs on without being looked at
_OPERATORS = 20

Stage = Generator[None, int, int]


class Profile:
    """One profile of an engine's training, as a context around the loop.

    Attributes:
        result: after the loop, one JSON object (schema ``fastgan.profile/1``).
    """

    def __init__(
        self, engine: Engine, *, what: str = "your loop", command: str | None = None, interval_s: float = 0.1,
        progress: Callable[[str], object] | None = None,
    ) -> None:  # fmt: skip
        """See :func:`profile`."""
        if not isinstance(engine, Engine):
            raise InputError(f"profile: got a {type(engine).__name__}, expected a fastgan.Engine")
        if not 0.01 <= interval_s <= 60:
            raise InputError(f"profile: interval_s is {interval_s}, expected 0.01 … 60 seconds")
        self.engine, self.what, self.interval_s = engine, what, interval_s
        self.command = " ".join(sys.argv) if command is None else command
        self._say = progress or (lambda line: None)
        self._result: dict[str, Any] | None = None
        self._events: str | None = None
        intervals = math.lcm(*(p.every for p in engine.phases))
        period = intervals // math.gcd(intervals, engine.n_critic)
        self._period = period if period <= _LONGEST_PERIOD else 1

    @property
    def result(self) -> dict[str, Any]:
        if self._result is None:
            raise InputError("profile: there is no result before the loop has ended")
        return self._result

    @property
    def least(self) -> int:
        """Iterations that a loop has to make; after a few dozen more all parts of the result are there."""
        return max(_WARM_UP, 2 * self._period) + max(_WATCHED, self._period) + 2

    def __str__(self) -> str:
        """The result as text: phases, memory, what waits, the profiler's cost, findings."""
        return text.render(self.result)

    def write(
        self, *, json: str | Path | None = None, html: str | Path | None = None, trace: str | Path | None = None
    ) -> None:
        """Write files, each whole or not at all.

        Args:
            json: the result.
            html: one page that needs nothing else.
            trace: a few iterations as a Chrome trace, with the phases in it.

        Raises:
            InputError: a file cannot be written.
        """
        contents: list[tuple[str | Path | None, Callable[[], str]]] = [
            (json, lambda: as_json(self.result, indent=1) + "\n"),
            (html, self._page),
            (trace, lambda: self._events or ""),
        ]
        for path, make in contents:
            if path is not None:
                try:
                    pictures.write_whole(Path(path), make().encode())
                except OSError as e:
                    raise InputError(f"{path}: cannot be written: {e.strerror}") from e

    def _page(self) -> str:
        from fastgan.report import profile_page

        page: str = profile_page(self.result)
        return page

    # ---- the loop

    def __enter__(self) -> Profile:
        if marks.listener is not None or marks.outermost is not None:
            raise InputError("profile: another profile is running")
        engine, device = self.engine, self.engine.device
        self._durations: dict[bool, list[float]] = {False: [], True: []}  # nanoseconds per iteration; timed ones?
        self._plain, self._timed = [0.0, 0, 0], [0.0, 0, 0]  # nanoseconds, iterations and real images
        self._times: defaultdict[str, int] = defaultdict(int)
        self._calls: Counter[str] = Counter()
        self._watched = self._traced = self._seen = self._shown = 0
        self._images = engine.images  # at the end of the last iteration
        self._batches: Counter[int] = Counter()
        self._kernels_seen = False
        self._span, self._span_images = (0.0, 0.0), 0  # whole pairs of blocks, nothing compiled between: for energy
        self._waits: Counter[tuple[str, Place]] = Counter()
        self._traced_ns = 0.0
        self._events = self._result = None
        self._recorder = Recorder(engine, self._advance)
        self._lines = Lines(self._recorder)
        self._sampler = Sampler(device, interval_s=self.interval_s)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._sampler)
            stack.enter_context(self._lines)
            self._stages = self._all_stages()
            stack.callback(self._deafen)
            stack.callback(self._stages.close)  # which measures no more, and listens to the outermost calls again
            self._recorder.measure("off")
            next(self._stages)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._stack.close()
        if kind is None:
            if not self._timed[1]:
                where = " in the thread that entered it, and others in another thread" * self._recorder.elsewhere
                raise InputError(
                    f"profile: the loop made {self._seen} iterations{where}, expected at least {self.least}"
                )
            self._result = self._make()

    @staticmethod
    def _deafen() -> None:
        marks.listener = marks.outermost = None

    def _advance(self, iterations: int) -> None:
        """So many iterations have ended."""
        self._seen += iterations
        self._batches[self.engine.batch] += iterations
        self._shown += self.engine.images - self._images
        self._images = self.engine.images
        with contextlib.suppress(StopIteration):
            self._stages.send(iterations)

    def _all_stages(self) -> Generator[None, int, None]:
        self._say("warming up")
        yield from self._pass(max(_WARM_UP, 2 * self._period))
        self._say("watching for what waits for the device")
        yield from self._watch()
        begun, count, reverse = time.monotonic(), 1, False
        yield from self._pair(count, reverse)
        self._say("a few iterations under torch's profiler")
        yield from self._trace()
        self._say("timing blocks of iterations")
        self._span, shown = (time.perf_counter(), time.perf_counter()), self._shown
        while time.monotonic() - begun < _MEASURED_S:
            if count * self._plain[0] / self._plain[1] < _BLOCK_S * 1e9:
                count *= 2
            reverse = not reverse
            yield from self._pair(count, reverse)
            self._span, self._span_images = (self._span[0], time.perf_counter()), self._shown - shown
        self._recorder.measure("off")
        while True:
            yield

    def _pass(self, iterations: int) -> Stage:
        done = 0
        while done < iterations:
            done += yield
        return done

    def _watch(self) -> Generator[None, int, None]:
        recorder = self._recorder
        waits = Waits(self.engine.device, lambda: recorder.phase)
        with waits, OpWatch() as ops:
            recorder.ops = ops
            recorder.measure("cost")
            self._watched = yield from self._pass(max(_WATCHED, self._period))
            self._waits = waits.counts
            recorder.measure("off")

    def _pair(self, iterations: int, reverse: bool) -> Generator[None, int, None]:
        """One block as it is, one with the clocks running."""
        for timed in (reverse, not reverse):
            yield from self._block(iterations, timed)

    def _block(self, iterations: int, timed: bool) -> Generator[None, int, None]:
        recorder, on_gpu = self._recorder, self.engine.device.type == "cuda"
        with self._lines.looking() if timed else contextlib.nullcontext():
            wait(self.engine.device)
            recorder.measure("time" if timed else "off")
            begun, done, shown = recorder.begun, 0, self._shown
            while done < iterations:
                count = yield
                done += count
                if not on_gpu:
                    self._note(timed, recorder.ended - recorder.begun, count, self._shown - shown)
                    shown = self._shown
                    recorder.resume()
            if on_gpu:  # the host runs ahead: only the end of a block is known
                wait(self.engine.device)
                self._note(timed, time.perf_counter_ns() - begun, done, self._shown - shown)
            recorder.measure("off")

    def _note(self, timed: bool, ns: int, iterations: int, images: int) -> None:
        """So many iterations took so long."""
        total = self._timed if timed else self._plain
        total[:] = total[0] + ns, total[1] + iterations, total[2] + images
        self._durations[timed].append(ns / iterations)
        times, calls = self._recorder.take()
        for phase, spent in times.items():
            self._times[phase] += spent
        self._calls += calls

    def _trace(self) -> Generator[None, int, None]:
        device, recorder = self.engine.device, self._recorder
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes lines of its own on the standard error
        profiler = torch.profiler.profile(activities=kinds, profile_memory=True)
        wait(device)
        profiler.start()
        done = 0
        try:
            recorder.measure("trace")
            begun = recorder.begun
            done = yield from self._pass(max(_TRACED, self._period))
            wait(device)
            self._traced_ns = float(time.perf_counter_ns() - begun)
        finally:
            recorder.measure("off")
            profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            self._events = file.read_text()
        self._traced = done

    # ---- the result

    def _make(self) -> dict[str, Any]:
        from fastgan.machine import conditions

        engine = self.engine
        events: list[dict[str, Any]] = json.loads(self._events)["traceEvents"] if self._events else []
        images, batch = self._shown / self._seen, self._batches.most_common(1)[0][0]
        mean_us = self._plain[0] / self._plain[1] / 1e3
        p20, median, p80 = (np.percentile(self._durations[False], (20, 50, 80)) / 1e3).tolist()
        profiled = statistics.median(self._durations[True]) / 1e3
        samples = self._sampler.result(self._span)
        phases, launches = self._phases(events, mean_us)
        if engine.device.type == "cuda" and not self._kernels_seen:
            why = "the trace has none of the GPU" if self._traced else "the loop ended before a trace"
            samples["missing"].append(f"kernels: {why}, so that phases and the host gap are the host's time")
        samples["energy_j_per_kimg"] = self._energy(samples)
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
            "conditions": conditions(engine.device),
            "run": {
                "what": self.what, "batch": batch, "n_critic": engine.n_critic, "precision": engine.precision,
                "iterations": self._seen, "images_per_iteration": int(images) if images.is_integer() else images,
            },
            "iteration": {
                "median_us": median, "p20_us": p20, "p80_us": p80, "iterations_per_second": 1e6 / mean_us,
                "seconds_per_kimg": self._plain[0] / 1e6 / self._plain[2],
            },
            "phases": phases,
            "operators": self._operators(events, mean_us),
            "lines": self._users_lines(),
            "synchronisations": self._synchronisations(),
            "launches_per_iteration": launches,
            "memory": self._memory(events, samples),
            "samples": samples,
            "profiler_cost": {"share": profiled / median - 1, "plain_us": median, "profiled_us": profiled},
        }  # fmt: skip
        result["findings"] = findings.find(result, {**findings.facts(engine), "kernels_seen": self._kernels_seen})
        return result

    def _phases(self, events: list[dict[str, Any]], mean_us: float) -> tuple[list[dict[str, Any]], float]:
        """Rows of the result, in the order of an iteration, and launches per iteration."""
        n = self._timed[1]
        host = self._host()
        calls = {phase: number / n for phase, number in self._calls.items()}
        costs = {phase: (f / self._watched, b / self._watched) for phase, (_, f, b) in self._recorder.costs.items()}
        launches = sum(of for of, _, _ in self._recorder.costs.values()) / max(1, self._watched)
        us: dict[str, float] = host
        if self.engine.device.type == "cuda" and self._traced:
            recorded, of_graph = self._recorded()
            found = trace.on_device(events, marks.PHASES, recorded)
            self._kernels_seen = found.launches > 0
        if self._kernels_seen:
            us = {phase: spent / self._traced for phase, (spent, _) in found.by_phase.items()}
            calls = {phase: number / self._traced for phase, (_, number) in found.by_phase.items()}
            waits = {k: host[k] for k in ("data", "your loop", "metrics") if k in host}
            idle = trace.split_idle(mean_us, found.busy_us / self._traced, waits)
            us = {k: us.get(k, 0.0) + idle.get(k, 0.0) for k in {**us, **idle}}
            costs, launches = {**of_graph, **costs}, found.launches / self._traced
        if own := bytes_of_optimisers(self.engine):
            costs["optimiser"] = 0, own
        total = sum(us.values())
        rows = []
        for phase in marks.PHASES:
            if us.get(phase, 0.0) <= 0 and phase != "host gap":
                continue
            flops, moved_bytes = costs.get(phase, (0, 0)) if phase != "host gap" else (0, 0)
            rows.append({
                "phase": phase, "us": us.get(phase, 0.0), "share": us.get(phase, 0.0) / total,
                "calls": calls.get(phase, 0.0), "gflop": flops / 1e9 or None, "gb": moved_bytes / 1e9 or None,
            })  # fmt: skip
        return rows, launches

    def _host(self) -> defaultdict[str, float]:
        """Microseconds of the host per iteration by phase; what loaders take between steps is data."""
        n = self._timed[1]
        host: defaultdict[str, float] = defaultdict(float)
        for phase, ns in self._times.items():
            host[phase] += ns / n / 1e3
        seconds = [(reads, s) for (_, phase, reads), s in self._lines.seconds.items() if phase == "your loop"]
        if reading := sum(s for reads, s in seconds if reads):
            moved = host["your loop"] * reading / sum(s for _, s in seconds)
            host["your loop"] -= moved
            host["data"] += moved
        return host

    def _recorded(self) -> tuple[list[list[str]], dict[str, tuple[float, float]]]:
        """The phases of the launches of each recording, the last one first; its FLOPs and bytes per iteration."""
        executor = self.engine._executor
        variants = [v for v in executor.variants if v.iterations] if executor is not None else []
        recorded = [[phase for iteration in v.iterations for phase in iteration.phases] for v in reversed(variants)]
        costs: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        iterations = variants[-1].iterations if variants else []
        for iteration in iterations:
            for phase, cost in zip(iteration.phases, iteration.costs, strict=True):
                flops, moved = costs[phase]
                costs[phase] = flops + cost[0] / len(iterations), moved + cost[1] / len(iterations)
        return recorded, dict(costs)

    def _operators(self, events: list[dict[str, Any]], mean_us: float) -> list[dict[str, Any]]:
        """Of the host, as torch's profiler saw them, brought to the length of an iteration without it."""
        if not self._traced:
            return []
        scale = mean_us * 1e3 / (self._traced_ns / self._traced)
        rows = trace.operators(events, marks.PHASES)[:_OPERATORS]
        return [
            {"operator": name, "us": us * scale / self._traced, "calls": number / self._traced}
            for name, us, number in rows
        ]

    def _users_lines(self) -> list[dict[str, Any]]:
        """Each phase's time, which the clocks know, in the proportions in which its lines were seen."""
        n, total = self._timed[1], self._timed[0]
        seen: defaultdict[str, float] = defaultdict(float)
        for (_, phase, _), seconds in self._lines.seconds.items():
            seen[phase] += seconds
        rows = [
            {"where": _short(place), "source": _source(place), "us": ns / n / 1e3, "share": ns / total,
             "phase": "data" if reads and phase == "your loop" else phase}
            for (place, phase, reads), seconds in self._lines.seconds.items()
            if place is not None and (ns := self._times.get(phase, 0) * seconds / seen[phase])
        ]  # fmt: skip
        return sorted(rows, key=itemgetter("us"), reverse=True)[:_OPERATORS]

    def _synchronisations(self) -> list[dict[str, Any]]:
        rows = [(op, place, number / self._watched) for (op, place), number in self._waits.items()]
        rows += [
            (f"engine.{name}()", place, number / self._timed[1])
            for (name, place), number in self._recorder.reads.items()
        ]
        return [
            {"op": op, "where": _short(place), "source": _source(place), "per_iteration": number}
            for op, place, number in sorted(rows, key=lambda row: -row[2])
        ]

    def _memory(self, events: list[dict[str, Any]], samples: dict[str, Any]) -> dict[str, Any]:
        """Categories, peak and timeline: of the process on a CPU, of the device's allocator's users on a GPU."""
        device, series = self.engine.device, samples["series"]
        if device.type == "cuda":
            timeline = series.get("process_gpu_memory_bytes") or series.get("gpu_memory_bytes") or []
            peak = torch.cuda.max_memory_allocated(device)
        else:
            timeline = series.get("resident_bytes") or []
            unit = 1 if sys.platform == "darwin" else 1024
            whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            peak = max((int(v) for _, v in timeline), default=whole)
        temporaries = trace.peak_of_temporaries(events, device.type == "cuda")
        return {"categories": memory.categories(self.engine, temporaries), "peak_bytes": peak, "timeline": timeline}

    def _energy(self, samples: dict[str, Any]) -> float | None:
        joule = samples.get("energy_j")
        return None if joule is None or not self._span_images else joule / (self._span_images / 1000)


def _short(place: Place) -> str:
    """File and line, relative to the current folder where it lies there."""
    path = Path(place[0])
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return f"{path}:{place[1]}"


def _source(place: Place) -> str:
    import linecache

    return linecache.getline(*place).strip()


def profile(
    engine: Engine, *, what: str = "your loop", command: str | None = None, interval_s: float = 0.1,
    progress: Callable[[str], object] | None = None,
) -> Profile:  # fmt: skip
    """Profile a training loop: ``with fastgan.profile(engine) as p:`` around it, then ``print(p)``.

    Iterations are those of ``engine.step``, ``engine.run``, or ``d_step`` … ``g_step`` by hand, where no ``g_step``
    comes ``n_critic`` updates each; they train as they do without it, to the bit. Seven are needed at least, a few
    seconds' worth give steadier figures; after a minute the loop runs on unwatched. Time within a feed, and in data
    sets and loaders between steps, is "data", other time between steps "your loop"; lines are found by looking at the
    stack every 10 ms. One profile runs at a time, and sees its own thread.

    Args:
        engine: what is trained in the loop.
        what: how the result calls it.
        command: as the result gives it; by default the process's own.
        interval_s: between two samples of memory, processor and GPU.
        progress: takes a line when another part begins.

    Returns:
        A context. After it, ``p.result`` is one JSON object, ``str(p)`` text, and ``p.write(json=, html=, trace=)``
        writes files.

    Raises:
        InputError: not an engine, another profile runs, or the loop made too few iterations.
    """
    return Profile(engine, what=what, command=command, interval_s=interval_s, progress=progress)
