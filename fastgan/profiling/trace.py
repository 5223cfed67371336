"""What the events of a Chrome trace, as torch's profiler writes one, say: operators, memory, kernels by phase.

All functions are pure. Events are dicts with ``ph`` (``"X"`` has ``ts`` and ``dur`` in microseconds), ``cat``,
``name``, ``tid`` and ``args``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]
Kernel = tuple[str, float, float]  # name, start and duration in microseconds

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation")
_RUNTIME = ("cuda_runtime", "cuda_driver")
_CUDA = 1  # "Device Type" of memory


def spans(events: Iterable[Event], *categories: str) -> list[Event]:
    """Events with a duration of some categories, in the order of their starts, longer ones first."""
    found = [e for e in events if e.get("ph") == "X" and e.get("cat") in categories]
    return sorted(found, key=lambda e: (e["ts"], -e["dur"]))


def operators(events: Sequence[Event], phases: Sequence[str]) -> list[tuple[str, float, int]]:
    """Name, microseconds without what is nested within, and number, the most costly first; phases are left out."""
    own: defaultdict[str, float] = defaultdict(float)
    number: defaultdict[str, int] = defaultdict(int)
    open_: defaultdict[Any, list[tuple[float, str]]] = defaultdict(
        list
    )  # by thread: end and name of spans within spans
    for e in spans(events, *_ON_HOST):
        stack = open_[e.get("tid")]
        while stack and stack[-1][0] <= e["ts"]:
            stack.pop()
        if stack:
            own[stack[-1][1]] -= e["dur"]
        own[e["name"]] += e["dur"]
        number[e["name"]] += 1
        stack.append((e["ts"] + e["dur"], e["name"]))
    rows = [(name, own[name], number[name]) for name in own if name not in phases and own[name] > 0]
    return sorted(rows, key=lambda row: -row[1])


def peak_of_temporaries(events: Iterable[Event], on_gpu: bool = False) -> int:
    """The most bytes of one device's memory that were held at once of all that was allocated within the trace."""
    rows = [e for e in events if e.get("name") == "[memory]" and (e["args"]["Device Type"] == _CUDA) == on_gpu]
    sizes: dict[int, int] = {}  # by address; what is not there was allocated before
    held = peak = 0
    for e in sorted(rows, key=lambda e: e["ts"]):
        at, size = e["args"]["Addr"], int(e["args"]["Bytes"])
        held -= sizes.pop(at, 0)
        if size > 0:
            sizes[at] = size
            held += size
            peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class OnDevice:
    """What ran on a GPU.

    Attributes:
        by_phase: microseconds and number of kernels and copies.
        busy_us: in which something ran.
        launches: kernels and copies.
    """

    by_phase: dict[str, tuple[float, int]]
    busy_us: float
    launches: int


def on_device(events: Sequence[Event], phases: Sequence[str], recorded: Sequence[Sequence[str]]) -> OnDevice:
    """Kernels and copies by phase.

    One that a graph has launched belongs to the phase of the launch at its place in the list that was recorded; one
    that was launched by itself to the innermost phase in which the host did so.

    Args:
        events: of the trace.
        phases: names that may be ranges of the host.
        recorded: phases of the launches of each recording, in order.
    """
    launched = {e["args"]["correlation"]: e for e in spans(events, *_RUNTIME) if "correlation" in e.get("args", {})}
    by_launch: defaultdict[Any, list[Kernel]] = defaultdict(list)
    for e in spans(events, *_ON_DEVICE):
        by_launch[e.get("args", {}).get("correlation")].append((e["name"], e["ts"], e["dur"]))
    ranges = [e for e in spans(events, "user_annotation") if e["name"] in phases]
    totals: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for correlation, kernels in by_launch.items():
        launch = launched.get(correlation)
        if launch is not None and "GraphLaunch" in launch["name"]:
            found = by_order(kernels, recorded)
        else:
            found = [_innermost(ranges, launch["ts"]) if launch is not None else "other"] * len(kernels)
        for phase, (_, _, us) in zip(found, kernels, strict=True):
            before, n = totals[phase]
            totals[phase] = before + us, n + 1
    everything = [k for kernels in by_launch.values() for k in kernels]
    return OnDevice(dict(totals), union_us(everything), len(everything))


def by_order(kernels: Sequence[Kernel], recorded: Sequence[Sequence[str]]) -> list[str]:
    """The phase of each kernel of a graph, in the order of their starts, by the first recording of as many launches.

    Where there is none, as where torch ops are among them, a replay is of one piece.
    """
    labels = next((labels for labels in recorded if len(labels) == len(kernels)), ["graph replay"] * len(kernels))
    found = [""] * len(kernels)
    for label, i in zip(labels, sorted(range(len(kernels)), key=lambda i: kernels[i][1]), strict=True):
        found[i] = label
    return found


def union_us(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one ran."""
    total, end = 0.0, float("-inf")
    for _, start, us in sorted(kernels, key=lambda k: k[1]):
        total += max(0.0, start + us - max(start, end))
        end = max(end, start + us)
    return total


def _innermost(ranges: Sequence[Event], at: float) -> str:
    name = "other"
    for e in ranges:  # in the order of their starts: a later one that holds the moment lies within the earlier
        if e["ts"] > at:
            break
        if at <= e["ts"] + e["dur"]:
            name = e["name"]
    return name


def split_idle(iteration_us: float, device_us: float, host: Mapping[str, float]) -> dict[str, float]:
    """The time in which a device has nothing to do, by what the host did then.

    Work of the host beside a busy device costs nothing, so that each phase of ``host`` (microseconds, the likeliest
    reasons first) accounts for no more than what is left; the rest is the host gap.
    """
    left = max(0.0, iteration_us - device_us)
    found: dict[str, float] = {}
    for phase, us in host.items():
        found[phase] = min(us, left)
        left -= found[phase]
    return {**found, "host gap": left}
