"""The most memory that training holds: what is kept from one iteration to the next, and what one takes besides."""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgan.benchmark.timing import wait


class Held:
    """Bytes of tensors made since this was made.

    On a CPU those that Python knows, storages counted once; on a GPU what the allocator has given out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._now()

    def _now(self) -> Any:
        wait(self.device)
        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        found = {}
        for tensor in gc.get_objects():
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
                with contextlib.suppress(NotImplementedError):  # torch.func's wrappers have no memory of their own
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        return found

    def peak(self, run: Callable[[], object]) -> int:
        """What is held now, and the most that a call takes besides."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            wait(self.device)
            return int(torch.cuda.max_memory_allocated(self.device)) - int(self._before)
        now = self._now()
        kept: int = sum(size for at, size in now.items() if self._before.get(at) != size)
        return kept + transient(run)


def transient(run: Callable[[], object]) -> int:
    """Bytes that live on a CPU during a call beyond those before it, at most, by the allocator's record.

    Of two calls the second counts: what was made before the first is freed without a trace.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
        with torch.profiler.record_function("second call"):
            run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    second = next(e["ts"] for e in events if e["name"] == "second call")
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]" and e["ts"] >= second)
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    return int(most)
