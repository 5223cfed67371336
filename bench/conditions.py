"""What a number measured on this machine depends on, and interleaved timing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def conditions(**more: object) -> dict[str, object]:
    """The CPU, its load and the versions, with whatever else the measurement depends on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next(line.split(": ")[1] for line in info if line.startswith("model name")),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **more,
    }


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
