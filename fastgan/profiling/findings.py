"""From a measured result to sentences: what costs how much, how that is known, and what to change.

Each rule is a function of the result (schema ``fastgan.profile/1``) and of :func:`facts`, and gives a finding or none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgan import machine
from fastgan.benchmark.timing import median_us
from fastgan.plan import Plan

Finding = dict[str, Any]
Result = Mapping[str, Any]
Facts = Mapping[str, Any]

_WORTH_SAYING = 0.03  # share of an iteration
_SMALL = 5  # times an op on one number
_FULL = 0.9  # share of the memory
_COMPUTING = (
    "fakes", "D forward", "chain", "penalty", "sweep", "weight gradient", "D backward", "G forward", "G backward",
    "optimiser",
)  # fmt: skip


def facts(engine: Any) -> dict[str, Any]:
    """What rules ask of an engine after its iterations.

    Returns:
        ``device`` (its type), ``autograd`` (why, by player), ``why_updates`` and ``why_unrecorded`` (of the iteration
        on kernels and of its graph, or ``None``), ``recorded`` (whether it is replayed as a graph), ``optimisers``
        (those that are not the engine's, by player), ``threads``, ``cores``, ``memory_limit`` (bytes of the device, or
        ``None``), ``resident`` (whether batches are made on the device) and ``op_us`` (an op on one number).
    """
    planner, executor = engine._plans(), engine._executor
    reasons: dict[str, str] = {}
    for phase in engine.phases:
        found = planner.find(phase, engine.batch)
        if not isinstance(found, Plan):
            reasons.setdefault(phase.player, found)
    updaters = {"discriminator": engine._d, "generator": engine._g}
    others = {k: type(u.optimizer).__name__ for k, u in updaters.items() if u is not None and u.optimizer is not None}
    variant = executor.variants[-1] if executor is not None and executor.variants else None
    asked = engine.executor != "eager"
    return {
        "device": engine.device.type,
        "autograd": reasons,
        "why_updates": variant.why_updates if variant is not None and engine.kernels else None,
        "why_unrecorded": variant.why_unrecorded if variant is not None and asked else None,
        "recorded": variant is not None and variant.recording is not None,
        "optimisers": others,
        "threads": torch.get_num_threads(),
        "cores": machine.cores() or 1,
        "memory_limit": _memory_limit(engine.device),
        "resident": engine._feed is not None,
        "op_us": median_us(torch.zeros(1, device=engine.device).neg_, engine.device, rounds=5),
    }


def _memory_limit(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):  # not told on this system
        return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def find(result: Result, about: Facts) -> list[Finding]:
    """All that is worth saying, the most costly first.

    Args:
        result: of the profile.
        about: what :func:`facts` says, and ``kernels_seen``: whether the phases are those of a GPU's kernels.
    """
    found = [finding for rule in RULES if (finding := rule(result, about)) is not None]
    return sorted(found, key=lambda f: -f["us"])


# ---- what the rules say it with


def _phase(result: Result, *names: str) -> tuple[float, float]:
    """Microseconds per iteration and share of some phases together."""
    rows = [p for p in result["phases"] if p["phase"] in names]
    return sum(p["us"] for p in rows), sum(p["share"] for p in rows)


def _finding(title: str, us: float, share: float, evidence: str, advice: str) -> Finding:
    return {"title": title, "us": us, "share": share, "evidence": evidence, "advice": advice}


def duration(us: float) -> str:
    """In words: ``850 us``, ``1.2 ms``, ``3.4 s``."""
    for factor, unit in ((1.0, "us"), (1e3, "ms")):
        if us < 1e3 * factor:
            return f"{us / factor:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def size(n: float) -> str:
    """In words: ``12 KiB``, ``3.4 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def often(n: float) -> str:
    """In words: ``once``, ``twice``, ``2.5 times``."""
    return {"1": "once", "2": "twice"}.get(f"{n:.2g}", f"{n:.3g} times")


def _at(result: Result, *phases: str) -> str:
    """The user's most costly line in some phases, as the end of a sentence."""
    lines = [line for line in result["lines"] if line["phase"] in phases]
    if not lines:
        return ""
    line = max(lines, key=lambda line: line["us"])
    return f", most of it at {line['where']} `{line['source']}` ({duration(line['us'])})"


# ---- the rules


def waits_for_data(result: Result, about: Facts) -> Finding | None:
    """Time in feeds and loaders."""
    us, share = _phase(result, "data")
    if share < _WORTH_SAYING:
        return None
    on_gpu = about["device"] == "cuda"
    who = "the GPU waits" if on_gpu else "training waits"
    advice = "let workers prepare batches (DataLoader's num_workers), or make the reading itself faster"
    if on_gpu and not about["resident"]:
        advice = f"where the data fits on the GPU, give `dataset.feed(batch, device=engine.device)`; otherwise {advice}"
    evidence = f"{duration(us)} of each iteration pass in the feed{_at(result, 'data')}"
    return _finding(f"{share:.0%} of the time {who} for data.", us, share, f"{evidence}.", f"{advice}.")


def own_loop(result: Result, about: Facts) -> Finding | None:
    """Time between the engine's steps."""
    us, share = _phase(result, "your loop")
    if share < _WORTH_SAYING:
        return None
    evidence = f"{duration(us)} of each iteration pass between the engine's steps{_at(result, 'your loop')}"
    advice = (
        "if it prepares batches, let workers do so (DataLoader's num_workers) or give the engine a feed; do what is "
        "not needed in every iteration less often"
    )
    return _finding(f"{share:.0%} of the time your own loop runs.", us, share, f"{evidence}.", f"{advice}.")


def synchronises(result: Result, about: Facts) -> Finding | None:
    """Lines that wait for the device."""
    rows = [s for s in result["synchronisations"] if not s["op"].startswith("engine.")]
    if not rows:
        return None
    count = sum(s["per_iteration"] for s in rows)
    places = ", ".join(f"{s['where']} `{s['source']}` ({s['op']}, {often(s['per_iteration'])})" for s in rows[:3])
    more = f" and {len(rows) - 3} more lines" if len(rows) > 3 else ""
    lines = {s["where"] for s in rows}
    us, share = _of_lines(result, lines)
    if about["device"] == "cuda":
        title = f"The host waits for the GPU {often(count)} in each iteration."
    else:
        title = f"Values are read back {often(count)} in each iteration: a GPU would be waited for, no graph recorded."
    advice = "keep values on the device (`.detach()`), and read them every hundred iterations or so"
    return _finding(title, us, share, f"By line: {places}{more}.", f"{advice}.")


def _of_lines(result: Result, places: set[str]) -> tuple[float, float]:
    lines = [line for line in result["lines"] if line["where"] in places]
    return sum(line["us"] for line in lines), sum(line["share"] for line in lines)


def reads_metrics(result: Result, about: Facts) -> Finding | None:
    """``metrics()`` or ``history()`` in most iterations."""
    rows = [s for s in result["synchronisations"] if s["op"].startswith("engine.")]
    count = sum(s["per_iteration"] for s in rows)
    if count < 0.5:
        return None
    us, share = _phase(result, "metrics")
    places = ", ".join(f"{s['op']} at {s['where']}" for s in rows)
    advice = "call it every hundred iterations or so: `engine.history()` gives the figures of the last 64"
    title = f"The engine's figures are read back {often(count)} in each iteration, which waits for the device."
    return _finding(title, us, share, f"By line: {places}.", f"{advice}.")


_AUTOGRAD = {"discriminator": ("D forward", "D backward", "penalty"), "generator": ("G forward", "G backward")}


def through_autograd(result: Result, about: Facts) -> Finding | None:
    """Updates without a closed form."""
    reasons: Mapping[str, str] = about["autograd"]
    us, share = _phase(result, *(name for player in reasons for name in _AUTOGRAD[player]), "graph replay")
    if not reasons or share < _WORTH_SAYING:
        return None
    who = " and the ".join(reasons)
    plural = len(reasons) > 1
    why = "; ".join(dict.fromkeys(reasons.values()))
    return _finding(
        f"The {who} run{'' if plural else 's'} through autograd: {share:.0%} of the time.",
        us, share, f"There is no closed form: {why}.",
        "layers that the engine reads take the closed form (README has the list); `engine.explain()` says what either "
        "costs.",
    )  # fmt: skip


def not_recorded(result: Result, about: Facts) -> Finding | None:
    """A GPU's iterations without a graph, or not as one list of launches."""
    unrecorded, why = about["why_unrecorded"], about["why_unrecorded"] or about["why_updates"]
    if why is None:
        return None
    us, share = _phase(result, "host gap")
    idle = f" The device is idle for {duration(us)} of each." if about["kernels_seen"] else ""
    what = "is not recorded as a CUDA graph" if unrecorded else "is not one list of kernels"
    advice = (
        "remove what is named there: the mathematics does not need it." if unrecorded else
        "torch ops run where a part has no kernel; replace what is named there, or keep it where the network needs it."
    )  # fmt: skip
    return _finding(f"The iteration {what}.", us, share, f"The reason: {why}.{idle}", advice)


def foreign_optimiser(result: Result, about: Facts) -> Finding | None:
    """Optimisers that are not the engine's one pass."""
    others: Mapping[str, str] = about["optimisers"]
    us, share = _phase(result, "optimiser")
    if not others or share < _WORTH_SAYING:
        return None
    names = " and ".join(f"torch's {name} for the {player}" for player, name in others.items())
    return _finding(
        f"The optimisers take {share:.0%} of the time.", us, share, f"{names} makes the updates: {duration(us)}.",
        "fastgan.Adam and fastgan.AdamW make an update, its guard and the average in one pass over memory.",
    )  # fmt: skip


def idle_between_kernels(result: Result, about: Facts) -> Finding | None:
    """A GPU that waits for the host's launches."""
    us, share = _phase(result, "host gap")
    if not about["kernels_seen"] or share < 0.1 or about["why_unrecorded"]:
        return None
    launches = result["launches_per_iteration"]
    return _finding(
        f"The GPU is idle for {share:.0%} of the time, between kernels.", us, share,
        f"{launches:.0f} launches per iteration leave {duration(us)} in which nothing runs.",
        "let `engine.run(feed, n)` replay several iterations at once on a feed made with device=engine.device, or take "
        "a larger batch.",
    )  # fmt: skip


def launch_bound(result: Result, about: Facts) -> Finding | None:
    """Many short calls."""
    us, share = _phase(result, *_COMPUTING)
    launches, op_us = result["launches_per_iteration"], about["op_us"]
    if about["recorded"] or not launches or us > _SMALL * launches * op_us or share < 0.2:
        return None
    batch, bound_us = result["run"]["batch"], min(us, launches * op_us)
    return _finding(
        f"The batch of {batch} is small: its work is bound by launches.", bound_us, share * bound_us / us,
        f"{launches:.0f} calls per iteration take {duration(us / launches)} each, and one on a single number takes "
        f"{duration(op_us)} here.",
        "a larger batch takes little longer per update: `fastgan bench --batch` shows where that ends.",
    )  # fmt: skip


def penalty_is_large(result: Result, about: Facts) -> Finding | None:
    """Penalty and sweep."""
    us, share = _phase(result, "penalty", "sweep")
    if share < 0.1:
        return None
    return _finding(
        f"The penalty takes {share:.0%} of the time.", us, share,
        f"{duration(us)} in penalty and sweep, besides its rows' part of the discriminator's passes.",
        "penalties take `interval=k`, which computes them at every k-th update, k times as strong (lazy "
        "regularisation); check quality with it.",
    )  # fmt: skip


def threads(result: Result, about: Facts) -> Finding | None:
    """Threads of torch that are not as many as the cores at hand."""
    n, cores = about["threads"], about["cores"]
    if about["device"] != "cpu" or n == cores or (n < cores and result["iteration"]["median_us"] < 2000):
        return None
    us, share = (x * (1 - min(n, cores) / max(n, cores)) for x in _phase(result, *_COMPUTING))
    advice = f"try `torch.set_num_threads({cores})`, or `--threads {cores}`, and compare iterations per second"
    if n > cores:
        title = f"torch runs {n} threads on {cores} core{'s' * (cores > 1)}: they wait for each other."
    else:
        title = f"torch runs {n} thread{'s' * (n > 1)}, and {cores} cores are at hand."
    evidence = f"torch.get_num_threads() is {n}, the process may use {cores}; the figure is an upper bound."
    return _finding(title, us, share, evidence, f"{advice}.")


def memory_is_full(result: Result, about: Facts) -> Finding | None:
    """A peak near the limit."""
    peak, limit = result["memory"]["peak_bytes"], about["memory_limit"]
    if not limit or not peak or peak < _FULL * limit:
        return None
    largest = max(result["memory"]["categories"], key=lambda row: row["bytes"], default=None)
    most = f"; the largest part is {largest['category']} ({size(largest['bytes'])})" if largest is not None else ""
    return _finding(
        f"Memory is nearly full: {peak / limit:.0%} of it.", 0.0, 0.0,
        f"The peak is {size(peak)} of {size(limit)}{most}.", "a smaller batch, or reduced precision, takes less.",
    )  # fmt: skip


def host_gap(result: Result, about: Facts) -> Finding | None:
    """On a CPU, work of the interpreter between the calls."""
    us, share = _phase(result, "host gap")
    if about["device"] != "cpu" or share < 0.15:
        return None
    return _finding(
        f"{share:.0%} of the time the interpreter prepares updates.", us, share,
        f"{duration(us)} of each iteration pass in the engine outside all products, passes and optimisers.",
        "a larger batch makes it a smaller share.",
    )  # fmt: skip


RULES: Sequence[Callable[[Result, Facts], Finding | None]] = (
    waits_for_data, own_loop, synchronises, reads_metrics, through_autograd, not_recorded, foreign_optimiser,
    idle_between_kernels, launch_bound, penalty_is_large, threads, memory_is_full, host_gap,
)  # fmt: skip
