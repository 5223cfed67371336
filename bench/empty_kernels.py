"""Kernels that do nothing but be launched, and wait for each other; see :mod:`bench.ceilings`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.kernels._launch import Launch


@triton.jit
def _empty_kernel(x_ptr, DEPENDENT: tl.constexpr = False):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(x_ptr, 1.0)


@triton.jit
def _barrier_kernel(counter_ptr, n_programs, BARRIERS: tl.constexpr, DEPENDENT: tl.constexpr = False):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    for i in range(BARRIERS):
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
        while arrived < (i + 1) * n_programs:
            arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        tl.debug_barrier()


def empty_launch(x: torch.Tensor, dependent: bool) -> Launch:
    """One program that stores one number to ``x``."""
    return Launch(_empty_kernel, (1,), {"x_ptr": x, "DEPENDENT": dependent}, num_warps=1)


def barrier_launch(counter: torch.Tensor, programs: int, barriers: int) -> Launch:
    """So many programs that wait for each other so many times; ``counter`` [1] int32 must hold 0 before each run."""
    arguments = {"counter_ptr": counter, "n_programs": programs, "BARRIERS": barriers}
    return Launch(_barrier_kernel, (programs,), arguments, num_warps=4, cooperative=True)
