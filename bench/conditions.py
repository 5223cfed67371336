"""What the scripts that measure on a CPU share: conditions, interleaved timing, where results go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastgan import machine

RESULTS = Path(__file__).parent / "results"
conditions = partial(machine.conditions, torch.device("cpu"))


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, warmup: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds per call by name: the variants take turns, median with p20 and p80."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup + rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    quantiles = {name: np.percentile(t[warmup:], (20, 50, 80)) for name, t in times.items()}
    return {name: {"p20_ms": a, "median_ms": b, "p80_ms": c} for name, (a, b, c) in quantiles.items()}


def write(name: str, result: dict[str, object]) -> Path:
    """Write ``bench/results/cpu/<name>.json``."""
    out = RESULTS / "cpu" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return out
