"""Times of calls that queue work on a device: blocks of calls, variants in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

BLOCK_S = 3e-3  # of calls between two waits for the device, so that the wait is small beside them


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call."""
    wait(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return (time.perf_counter() - begin) / calls


def rounds_us(
    runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, deadline: float = float("inf")
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Microseconds per call in every round, in which each variant has one block of calls; and the calls of a block.

    The order is another in every round: what ran before leaves caches that suit some more than others.

    Args:
        runs: what is timed.
        device: that it works on.
        rounds: how many; fewer where the deadline (``time.monotonic()``) comes first, but at least three.
        deadline: see there.
    """
    calls = {}
    for name, run in runs.items():
        block(run, 3, device)  # warm
        calls[name] = max(1, min(1000, round(BLOCK_S / max(block(run, 2, device), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        if done >= 3 and time.monotonic() > deadline:
            break
        order = list(runs)
        random.Random(done).shuffle(order)
        for name in order:
            times[name].append(block(runs[name], calls[name], device) * 1e6)
    return times, calls


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, deadline: float = float("inf")
) -> dict[str, dict[str, float]]:
    """Microseconds per call by name: median, p20 and p80 over the rounds of :func:`rounds_us`."""
    times, calls = rounds_us(runs, device, rounds, deadline)
    return {name: {**quantiles(t), "calls": calls[name]} for name, t in times.items()}


def quantiles(times_us: Sequence[float]) -> dict[str, float]:
    """Median, p20, p80 and number of times."""
    p20, median, p80 = np.percentile(times_us, (20, 50, 80)).tolist()
    return {"median_us": median, "p20_us": p20, "p80_us": p80, "rounds": len(times_us)}


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float]:
    """Median of the ratios of two variants' times round by round, and its noise.

    The noise is relative: two and a half standard errors of the median, 1.25 s / sqrt(n) for n rounds whose ratios
    scatter by s (half of what lies between their 16th and 84th percentiles), so that chance exceeds it once in eighty.
    """
    found = np.asarray(over) / np.asarray(under)
    low, whole, high = np.percentile(found, (16, 50, 84)).tolist()
    return whole, 2.5 * 1.2533 * (high - low) / 2 / whole / len(found) ** 0.5


def median_us(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    return interleaved({"": run}, device, rounds)[""]["median_us"]
