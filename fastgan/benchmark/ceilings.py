"""What the machine can do at most: matrix products and copies, measured."""

from __future__ import annotations

from typing import Any

import torch

from fastgan.benchmark.timing import median_us

SIDES = {"cpu": (1024, 2048), "cuda": (8192,)}  # of square products, the fastest of which counts
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes, more than caches hold


def matrix(precision: str, n: int, device: torch.device, rounds: int = 10) -> dict[str, float]:
    """FLOP/s of one square product by torch.mm, in ``fp32``, ``tf32``, ``bf16`` or ``fp16``."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        time_us = median_us(lambda: torch.mm(a, b, out=out), device, rounds)
    finally:
        torch.set_float32_matmul_precision(before)
    return {"n": n, "time_us": time_us, "tflop_per_s": 2 * n**3 / time_us / 1e6}


def copy(n_bytes: int, device: torch.device, rounds: int = 20) -> dict[str, float]:
    """Read and written bytes per second of ``copy_``, for a source of that size."""
    a = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    time_us = median_us(lambda: b.copy_(a), device, rounds)
    return {"bytes": n_bytes, "time_us": time_us, "gb_per_s": 2 * n_bytes / time_us / 1e3}


def ceilings(device: torch.device, precision: str) -> dict[str, Any]:
    """Of the schema's ``ceilings``: products in fp32, bf16 and the precision asked for, and copies in main memory."""
    rates = {
        kind: max(matrix(kind, side, device, 4)["tflop_per_s"] for side in SIDES[device.type])
        for kind in dict.fromkeys(("fp32", "bf16", precision))
    }
    copied = max(copy(COPIED[device.type], device, 4)["gb_per_s"] for _ in range(3))
    return {"matrix_tflop_per_s": rates, "copy_gb_per_s": copied}
