"""What the machine can do at most: matrix products and copies, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastgan.benchmark.timing import median_us

_SIDE = {"cpu": 1024, "cuda": 8192}  # of a square product
_COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes, more than caches hold


def matrix(precision: str, n: int, device: torch.device, rounds: int = 10) -> dict[str, float]:
    """FLOP/s of one square product by torch.mm, in ``fp32``, ``tf32``, ``bf16`` or ``fp16``."""
    time_us = median_us(product(precision, n, device), device, rounds)
    return {"n": n, "time_us": time_us, "tflop_per_s": 2 * n**3 / time_us / 1e6}


def product(precision: str, n: int, device: torch.device) -> Callable[[], None]:
    """A call that makes that product."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            torch.mm(a, b, out=out)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def copy(n_bytes: int, device: torch.device, rounds: int = 20) -> dict[str, float]:
    """Read and written bytes per second of ``copy_``, for a source of that size."""
    time_us = median_us(copying(n_bytes, device), device, rounds)
    return {"bytes": n_bytes, "time_us": time_us, "gb_per_s": 2 * n_bytes / time_us / 1e3}


def copying(n_bytes: int, device: torch.device) -> Callable[[], object]:
    """A call that copies so many bytes."""
    a = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return lambda: b.copy_(a)


class Limits:
    """Calls that show the machine's limits, to be timed in turn with the work that is held to them.

    Attributes:
        runs: a product in each precision, and a copy in main memory.
    """

    def __init__(self, device: torch.device, precisions: Iterable[str]) -> None:
        self._side, self._copied = _SIDE[device.type], _COPIED[device.type]
        self._precisions = sorted(precisions)
        self.runs: dict[str, Callable[[], object]] = {
            f"limit {p}": product(p, self._side, device) for p in self._precisions
        }
        self.runs["limit copy"] = copying(self._copied, device)

    def reached(self, times_us: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """``ceilings`` of the schema, from the fastest of the times."""
        fastest = {name: min(times) for name, times in times_us.items()}
        flops = 2 * self._side**3
        return {
            "matrix_tflop_per_s": {p: flops / fastest[f"limit {p}"] / 1e6 for p in self._precisions},
            "copy_gb_per_s": 2 * self._copied / fastest["limit copy"] / 1e3,
        }


def larger(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Of two ``ceilings``, the larger of each."""
    rates = {
        p: max(x["matrix_tflop_per_s"].get(p, 0.0) for x in (a, b))
        for p in sorted({*a["matrix_tflop_per_s"], *b["matrix_tflop_per_s"]})
    }
    return {"matrix_tflop_per_s": rates, "copy_gb_per_s": max(x["copy_gb_per_s"] for x in (a, b))}
