"""Kernels that the ahead-of-time gate must refuse, one flaw each; compiled by ``tests/ahead_of_time.py --flaws``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.kernels._launch import Launch


@triton.jit
def _copy_kernel(
    x_ptr, y_ptr, n, SQUARES: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr, TRIGGER: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if DEPENDENT and WAIT == "first":
        gdc_wait()
    x = tl.load(x_ptr + offs, mask=offs < n)
    if DEPENDENT and WAIT == "late":
        gdc_wait()
    if DEPENDENT and TRIGGER:
        gdc_launch_dependents()
    if SQUARES:
        x *= tl.sum(x * x, 0)  # the whole block stays in registers
    tl.store(y_ptr + offs, x, mask=offs < n)


@triton.jit
def _product_kernel(
    x_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr, N_K: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    rows, inner = tl.arange(0, M), tl.arange(0, K)
    acc = tl.zeros((M, M), tl.float32)
    for _ in range(N_K):
        x = tl.load(x_ptr + rows[:, None] * K + inner[None, :])
        acc = tl.dot(x, tl.trans(x), acc, input_precision=PRECISION)
        x_ptr += M * K
    tl.store(y_ptr + rows[:, None] * M + rows[None, :], acc)


def _copy(squares: bool = False, block: int = 1024, num_warps: int = 4, **constants: object) -> Launch:
    x = torch.empty(block)
    arguments = {"x_ptr": x, "y_ptr": x, "n": 1000, "SQUARES": squares, "BLOCK": block}
    return Launch(_copy_kernel, (1,), {**arguments, "WAIT": "first", "TRIGGER": True, **constants}, num_warps)


def _product(
    dtype: torch.dtype, m: int, k: int, num_warps: int = 4, precision: str = "ieee", num_stages: int = 3
) -> Launch:
    x = torch.empty(m, k, dtype=dtype)
    arguments = {"x_ptr": x, "y_ptr": torch.empty(m, m), "M": m, "K": k, "N_K": 8, "PRECISION": precision}
    return Launch(_product_kernel, (1,), arguments, num_warps, num_stages)


LAUNCHES = {  # by flaw, for one architecture each; those called right have none
    "right copy": (_copy(DEPENDENT=True), 90),
    "right product": (_product(torch.bfloat16, 64, 64), 90),
    "right tf32 product": (_product(torch.float32, 64, 32, precision="tf32"), 90),
    "right ieee product": (_product(torch.float32, 32, 16), 90),
    "right small product": (_product(torch.bfloat16, 32, 64), 90),
    "right product on sm_80": (_product(torch.float16, 64, 64), 80),
    "right product on sm_100": (_product(torch.bfloat16, 128, 64), 100),
    "spills": (_copy(squares=True, block=8192, num_warps=1), 90),
    "waits late": (_copy(WAIT="late", DEPENDENT=True), 90),
    "never waits": (_copy(WAIT="never", DEPENDENT=True), 90),
    "never lets the next begin": (_copy(TRIGGER=False, DEPENDENT=True), 90),
    "no instruction": (_copy(WAIT="never", TRIGGER=False, DEPENDENT=True), 90),
    "too few warps for wgmma": (_product(torch.bfloat16, 64, 64, num_warps=2), 90),
    "does not compile": (_copy(block=1000), 90),
    "too much shared memory": (_product(torch.bfloat16, 128, 256, num_warps=8, num_stages=6), 90),
}
