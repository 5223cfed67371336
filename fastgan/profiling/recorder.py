"""What is heard while a profile listens: times of phases, the user's lines, what waits for the device."""

from __future__ import annotations

import contextlib
import itertools
import sys
import sysconfig
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch

from fastgan import graphs, marks
from fastgan.costs import OpWatch
from fastgan.graphs import FASTGAN

Level = Literal["off", "time", "cost", "trace"]
Place = tuple[str, int]  # file and line
R = TypeVar("R")

_SAMPLE_S = 0.01  # between two looks at the stack: each takes the interpreter from the loop
_TORCH = str(Path(torch.__file__).parent)
_READERS = (f"{FASTGAN}/data/", f"{_TORCH}/utils/data/")
_LIBRARIES = tuple({sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")})
_WATCHING = tuple(f"{FASTGAN}/{name}" for name in ("profiling/", "graphs.py", "costs.py", "marks.py"))
_LOOPS = tuple(f"{FASTGAN}/{name}.py" for name in ("cli", "trainer", "__main__"))  # not a loop of the user's
_PHASES = frozenset(marks.PHASES)
_NOTHING = contextlib.nullcontext()
_ALONE = 24  # iterations' worth of critic updates without a generator's, from which the critic is trained alone
_NATIVE = ("noise", "optimiser")  # one call each, which is no torch op where it is native
_READS = ("metrics", "history")  # methods of an engine that wait


def is_users(file: str) -> bool:
    """Whether a file is neither fastgan's nor torch's nor of another library."""
    return not file.startswith((FASTGAN, _TORCH, "<frozen", "<string", *_LIBRARIES))


class _Range:
    """Work of one phase."""

    def __init__(self, recorder: Recorder, phase: str) -> None:
        self.recorder, self.phase = recorder, phase

    def __enter__(self) -> None:
        self.recorder.begin(self.phase)

    def __exit__(self, *exc: object) -> None:
        self.recorder.end(self.phase)


class Recorder:
    """The listener of a profile.

    Args:
        engine: whose iterations are counted; those of others, and of other threads, are the user's loop.
        boundary: is told how many iterations have ended.

    Attributes:
        level: what is measured: nothing, times, costs (FLOPs, bytes and launches), or ranges of torch's profiler.
        times: nanoseconds by phase since :meth:`take`.
        calls: by phase since then.
        costs: launches, FLOPs and bytes by phase.
        reads: calls of ``metrics`` and ``history`` by the user's line.
        elsewhere: whether another thread has called the engine.
        begun, ended: of the last iteration, nanoseconds; it begins when the one before it has been dealt with.
    """

    def __init__(self, engine: Any, boundary: Callable[[int], None]) -> None:
        self.engine, self.boundary = engine, boundary
        self.level: Level = "off"
        self.thread = threading.get_ident()
        self.times: defaultdict[str, int] = defaultdict(int)
        self.calls: Counter[str] = Counter()
        self.costs: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.reads: Counter[tuple[str, Place]] = Counter()
        self.ops: OpWatch | None = None
        self._open: list[str] = []
        self._launched: list[int] = []  # in the phases that are open, before they began
        self._ranges: list[Any] = []
        self._methods: list[str] = []
        self.elsewhere = False
        self._before = engine.d_updates, engine.g_updates
        self._critic_alone = False
        self._counted = self._made()
        self._foreign = 0  # another engine's methods that are open
        self.begun = self.ended = self._since = 0
        self._seen = (0, 0, 0)
        self._groups: dict[int, tuple[object, list[Any]]] = {}

    @property
    def phase(self) -> str:
        """The one that is open."""
        return self._open[-1] if self._open else "host gap" if self._methods else "your loop"

    def _made(self) -> int:
        """Iterations so far; ``n_critic`` updates each where a critic is trained alone beside a generator."""
        engine = self.engine
        if engine.generator is None:
            return int(engine.iterations)
        updates, steps = engine.d_updates - self._before[0], engine.g_updates - self._before[1]
        if steps and self._critic_alone:
            self._critic_alone, self._counted = False, steps - 1
        self._critic_alone = not steps and updates >= _ALONE * engine.n_critic
        return int(updates // engine.n_critic if self._critic_alone else steps)

    # ---- as a listener, and as the outermost while nothing is measured

    def around(self, call: Callable[[], R], engine: Any, method: str) -> R:
        if engine is not self.engine or self._methods not in ([], ["run"]) or threading.get_ident() != self.thread:
            self.elsewhere |= engine is self.engine and threading.get_ident() != self.thread
            return call()
        self._methods.append(method)
        try:
            result = call()
        finally:
            self.ended = time.perf_counter_ns()
            self._methods.pop()
        self._end_iteration()
        return result

    def mark(self, phase: str) -> contextlib.AbstractContextManager[object]:
        if self.level == "off" or self._foreign or threading.get_ident() != self.thread or self.phase == phase:
            return _NOTHING
        return _Range(self, phase if phase in _PHASES else "other")

    @contextlib.contextmanager
    def entry(self, engine: Any, method: str) -> Iterator[None]:
        if threading.get_ident() != self.thread:
            self.elsewhere |= engine is self.engine
            yield
            return
        if engine is not self.engine:
            self._foreign += 1
            try:
                yield
            finally:
                self._foreign -= 1
            return
        self._account()
        self._methods.append(method)
        try:
            if method in _READS:
                if self.level == "time" and (place := locate(sys._getframe(1))[0]) is not None:
                    self.reads[method, place] += 1
                with self.mark("metrics"):
                    yield
            else:
                yield
        finally:
            self._account()
            self.ended = self._since
            self._methods.pop()
        self._end_iteration()

    def _end_iteration(self) -> None:
        if self._methods in ([], ["run"]) and (made := self._made()) > self._counted:
            self.boundary(made - self._counted)
            self.resume()

    def run(self, work: marks.Labelled) -> None:
        if self.level == "off" or self._foreign or threading.get_ident() != self.thread:
            for call in work.calls:
                call()
            return
        if self.level == "time":
            self._run_timed(work)
            return
        for phase, calls, costs in self._grouped(work):
            with self.mark(phase):
                for call, cost in zip(calls, costs, strict=True):
                    self._run_one(call, cost)

    def _run_timed(self, work: marks.Labelled) -> None:
        """With one look at the clock for each run of calls."""
        self._account()
        self._open.append("other")
        try:
            for phase, calls, _ in self._grouped(work):
                self._open[-1] = phase
                self.calls[phase] += len(calls)
                for call in calls:
                    call()
                now = time.perf_counter_ns()
                self.times[phase] += now - self._since
                self._since = now
        finally:
            self._open.pop()

    def _grouped(self, work: marks.Labelled) -> list[Any]:
        """Runs of calls of one phase."""
        if id(work) not in self._groups:
            rows = zip(work.phases, work.calls, work.costs, strict=True)
            groups = [(phase, list(of)) for phase, of in itertools.groupby(rows, key=lambda row: row[0])]
            self._groups[id(work)] = work, [(p, [c for _, c, _ in of], [k for _, _, k in of]) for p, of in groups]
        return self._groups[id(work)][1]

    def _run_one(self, call: Any, cost: tuple[int, int]) -> None:
        if self.level == "trace":
            with torch.profiler.record_function(name_of(call)):
                call()
            return
        assert self.ops is not None
        launches, flops, moved = self.ops.launches, self.ops.flops, self.ops.bytes
        call()
        self.ops.launches += self.ops.launches == launches  # a native call, or a kernel
        if any(cost):
            self.ops.flops, self.ops.bytes = flops + cost[0], moved + cost[1]

    # ---- phases

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self._account()
        self._open.append(phase)
        self._launched.append(self.costs[phase][0])
        self.calls[phase] += 1
        if self.level == "trace":
            self._ranges.append(torch.profiler.record_function(phase))
            self._ranges[-1].__enter__()

    def end(self, phase: str) -> None:
        """And ends."""
        if self._open[-1:] != [phase]:  # it began before something else was measured
            return
        self._account()
        self._open.pop()
        launched = self._launched.pop()
        if self.level == "cost" and phase in _NATIVE:
            self.costs[phase][0] += self.costs[phase][0] == launched
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    def _account(self) -> None:
        """What has been since the last time is the open phase's."""
        if self.level == "time":
            now = time.perf_counter_ns()
            self.times[self.phase] += now - self._since
            self._since = now
        elif self.level == "cost" and self.ops is not None:
            now_seen = (self.ops.launches, self.ops.flops, self.ops.bytes)
            for i, (new, old) in enumerate(zip(now_seen, self._seen, strict=True)):
                self.costs[self.phase][i] += new - old
            self._seen = now_seen

    def measure(self, level: Level) -> None:
        """From now on; where an iteration has ended."""
        self.level = level
        marks.listener, marks.outermost = (None, self) if level == "off" else (self, None)
        self._open.clear()
        self._launched.clear()
        self.take()
        self._seen = (self.ops.launches, self.ops.flops, self.ops.bytes) if self.ops is not None else (0, 0, 0)
        self.resume()

    def resume(self) -> None:
        """What was done since the iteration ended is nobody's."""
        self._counted = self._made()
        self.begun = self._since = time.perf_counter_ns()

    def take(self) -> tuple[dict[str, int], Counter[str]]:
        """Times and calls since the last time."""
        taken = dict(self.times), Counter(self.calls)
        self.times.clear()
        self.calls.clear()
        return taken


def name_of(call: Any) -> str:
    """How a call of a plan is shown among the operators."""
    function = getattr(call, "kernel", None) or getattr(call, "func", call)
    name = getattr(function, "__name__", None) or getattr(function, "name", None)
    return f"fastgan::{str(name or type(function).__name__).strip('_')}"


class Waits(graphs.Watch):  # type: ignore[no-untyped-call]
    """Counts what waits for the device, by op and the user's line.

    Data that is read on the host stays there, so that it is left out: on a CPU, where nothing tells host and device
    apart, all that is called by data sets and loaders or by fastgan itself.

    Args:
        device: of the engine.
        phase: the one that is open; what an engine's ``metrics`` waits for is counted by :attr:`Recorder.reads`.
    """

    def __init__(self, device: torch.device, phase: Callable[[], str]) -> None:
        super().__init__()
        self.device, self.phase = device, phase
        self.counts: Counter[tuple[str, Place]] = Counter()

    def _note(self, op: str, does: str, devices: set[str]) -> None:
        place, reads, own = locate(sys._getframe(1))
        on_host = self.device.type == "cpu" and (reads or own or self.phase() == "data")
        waits = self.device.type in devices and "from the host" not in does and self.phase() != "metrics"
        if waits and place is not None and not on_host:
            self.counts[op, place] += 1


def locate(frame: FrameType | None) -> tuple[Place | None, bool, bool]:
    """The user's innermost line, whether a data set or loader is at work, and whether fastgan works below the line."""
    place: Place | None = None
    reads = own = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_LOOPS):
            break
        if file.startswith(_READERS):
            reads = True
        elif file.startswith(FASTGAN):
            own = own or (place is None and not file.startswith(_WATCHING))
        elif place is None and is_users(file):
            place = file, frame.f_lineno
        frame = frame.f_back
    return place, reads, own


class Lines:
    """A thread that looks at the stack of the training thread every few milliseconds.

    Attributes:
        seconds: by the user's line, the phase, and whether a data set or loader was at work; no line where fastgan was.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.seconds: defaultdict[tuple[Place | None, str, bool], float] = defaultdict(float)
        self._active, self._stop = threading.Event(), False
        self._begun = 0.0
        self._thread = threading.Thread(target=self._work, name="fastgan profile", daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._active.set()
        self._thread.join()

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look, as long as this lasts."""
        self._begun = time.perf_counter()
        self._active.set()
        try:
            yield
        finally:
            self._active.clear()

    def _work(self) -> None:
        last = 0.0
        while True:
            self._active.wait()
            time.sleep(_SAMPLE_S)
            if self._stop:
                return
            frame = sys._current_frames().get(self.recorder.thread)
            phase, now = self.recorder.phase, time.perf_counter()
            spent, last = now - max(last, self._begun), now  # the interpreter may have been held by a long call
            if not self._active.is_set():
                del frame
                continue
            place, reads, own = locate(frame)
            del frame  # until the next look it would keep the loop's tensors
            self.seconds[place if reads or not own else None, phase, reads] += spent
