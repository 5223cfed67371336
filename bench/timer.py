"""How all suites time: a clock that waits for the device, blocks of calls, a few calls before."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgan.benchmark.timing import BLOCK_S, wait

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synced() -> float:
    """Seconds, read when the device has done what was queued."""
    wait(DEVICE)
    return time.perf_counter()


timed = pytest.mark.benchmark(timer=synced, min_time=BLOCK_S, warmup=False)


def after_warm_up(benchmark: Any, run: Callable[[], object]) -> None:
    """Hand a call to pytest-benchmark's fixture after three that may compile, plan or record."""
    for _ in range(3):
        run()
    benchmark(run)
