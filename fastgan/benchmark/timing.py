"""Times of calls that queue work on a device: blocks of calls, variants in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

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


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, deadline: float = float("inf")
) -> dict[str, dict[str, float]]:
    """Microseconds per call by name: median, p20 and p80 over rounds in which every variant has one block.

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
        for name, run in runs.items():
            times[name].append(block(run, calls[name], device) * 1e6)
    table = {}
    for name, t in times.items():
        p20, median, p80 = np.percentile(t, (20, 50, 80)).tolist()
        table[name] = {"median_us": median, "p20_us": p20, "p80_us": p80, "calls": calls[name], "rounds": len(t)}
    return table


def median_us(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    return interleaved({"": run}, device, rounds)[""]["median_us"]
