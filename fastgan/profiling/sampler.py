"""What the process and the GPU do while something runs, looked at from a thread beside it."""

from __future__ import annotations

import os
import threading
import time
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fastgan.errors import InputError
from fastgan.nvml import Gpu

MOST = 4096  # points of a series, before every second one is dropped and the interval doubled
ENERGY_S = 5.0  # the least time over which the energy counter, which advances in steps, means something
PATIENCE_S = 2.0  # for a thread that hangs in the driver
_STAT = Path("/proc/self/stat")


class Sampler:
    """Samples the process, and a GPU by NVML, while its ``with`` block runs.

    Whatever goes wrong in it is a line of the result's ``missing``: the block neither ends nor waits because of it.

    Args:
        device: whose figures are wanted beside the process's; those of a GPU only where it is a CUDA device.
        interval_s: seconds between samples; doubled each time a series gets long, so that hours fit in memory.

    Attributes:
        begin: ``time.perf_counter()`` at the start of the block, the 0 of all series.

    Raises:
        InputError: ``interval_s`` is not positive.
    """

    def __init__(self, device: torch.device, interval_s: float = 0.1) -> None:
        if not interval_s > 0:
            raise InputError(f"interval_s: {interval_s}, expected a positive number of seconds")
        self.interval_s = interval_s
        self.begin = 0.0
        self._device = device
        self._series: dict[str, list[list[float]]] = {}
        self._missing: list[str] = []
        self._counter: list[list[float]] = []  # Joule, as the series are
        self._end, self._whole = 0.0, False
        self._last: tuple[float, float] | None = None  # sample: wall and process time
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastgan sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self.begin = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        self._end = time.perf_counter()

    def result(self, span: tuple[float, float] | None = None) -> dict[str, Any]:
        """After the block.

        Args:
            span: ``time.perf_counter()`` at the begin and the end of the part whose energy is meant; the whole block.

        Returns:
            JSON-able: ``interval_s``; ``series``, by name a list of ``[seconds since the start, value]``:
            ``process_cpu_percent`` (of one core, since the point before), ``resident_bytes`` and ``threads`` of the
            process, and those of :meth:`fastgan.nvml.Gpu.sample`; ``missing``, a line for each that could not be had;
            ``energy_j``, Joule that the GPU used during the span, or ``None``.
        """
        energy_j, said = self._energy(*(span or (self.begin, self._end)))
        late = ["samples: the thread that takes them still waits for the driver"] if self._thread.is_alive() else []
        return {
            "interval_s": self.interval_s,
            "series": {name: [[round(t, 3), v] for t, v in points] for name, points in dict(self._series).items()},
            "missing": [*self._missing, *said, *late],
            "energy_j": energy_j,
        }

    def _run(self) -> None:
        gpu: Gpu | None = None
        try:
            if not _STAT.is_file():
                self._missing.append(f"resident memory and threads of the process: this system has no {_STAT}")
            if self._device.type == "cuda":
                gpu = Gpu(self._device)
            self._take(gpu)
            while not self._stop.wait(self.interval_s):
                self._take(gpu)
            if self._last and time.perf_counter() - self._last[0] > self.interval_s / 2:  # the end is not yet seen
                self._take(gpu)
            self._whole = True
        except Exception as e:  # the run is what matters; the result says that its samples end here
            after = time.perf_counter() - self.begin
            self._missing.append(f"samples after {after:.1f} s: the sampler ended with {type(e).__name__}: {e}")
        finally:
            if gpu:
                gpu.close()
                self._missing += gpu.missing

    def _take(self, gpu: Gpu | None) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        values: dict[str, float] = {}
        if self._last is not None:
            values["process_cpu_percent"] = 100 * (cpu - self._last[1]) / (now - self._last[0])
        self._last = now, cpu
        values |= _process()
        if gpu:
            if (joule := gpu.energy_j()) is not None:
                self._counter.append([time.perf_counter() - self.begin, joule])
            values |= gpu.sample()
        for name, value in values.items():
            self._series.setdefault(name, []).append([now - self.begin, value])
        if any(len(points) > MOST for points in self._series.values()):
            self._series = {name: points[::2] for name, points in self._series.items()}
            self._counter = self._counter[::2]
            self.interval_s *= 2

    def _energy(self, begin: float, end: float) -> tuple[float | None, list[str]]:
        """Joule from one time to another, between samples in proportion to time, and what is to be said of them."""
        begin, end = begin - self.begin, end - self.begin
        power = self._series.get("power_w", [])
        total, said = list(self._counter), list[str]()
        if not total and len(power) > 1:
            joule = accumulate(((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(power)), initial=0.0)
            total = [[t, j] for (t, _), j in zip(power, joule, strict=True)]
            said.append("energy counter: energy is the sum over the power samples instead")
        if not self._whole or len(total) < 2 or total[-1][0] < end - 2 * self.interval_s:  # lost on the way
            return None, []
        if end <= begin:
            return None, ["energy: the run ended before the part of it that energy is measured over"]
        times, joules = np.array(total).T
        first, last = np.interp((begin, end), times, joules).tolist()
        if end - begin < ENERGY_S:
            said.append(f"energy: of {end - begin:.1f} s, which says little; measure {ENERGY_S:g} s or more")
        return last - first, said


def _process() -> dict[str, float]:
    """Resident bytes and threads, where the system has them."""
    try:
        fields = _STAT.read_text().rpartition(")")[2].split()  # from the third on: the second may hold anything
    except OSError:
        return {}
    return {"resident_bytes": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), "threads": int(fields[17])}
