"""Device functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(tile, DIM: tl.constexpr):
    """Which program of the grid this is along a dimension.

    ``tile``: in a program that does the work of several (persistent.py) a tuple of the place in both dimensions and the
    grid's size in both; else ``None``.
    """
    return tl.program_id(DIM) if tile is None else tile[DIM]


@triton.jit
def grid_size(tile, DIM: tl.constexpr):
    """Programs of the grid along a dimension; ``tile`` as for :func:`place_of`."""
    return tl.num_programs(DIM) if tile is None else tile[2 + DIM]


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """phi(z) in the type of z; "leaky-relu" with SLOPE 0 is ReLU."""
    if ACTIVATION == "leaky-relu" and SLOPE == 0:
        z = tl.where(z <= 0, 0.0, z)  # -inf gives 0, NaN stays
    elif ACTIVATION == "leaky-relu":
        z = tl.where(z > 0, z, z * SLOPE)
    elif ACTIVATION == "tanh":
        # 1 - 2 / (exp(2 |z|) + 1) loses digits near 0, where the series is exact to rounding
        e = tl.exp(-2 * tl.abs(z))
        t = (1 - e) / (1 + e)
        s = z * z
        series = tl.abs(z) * (1 - s / 3 + 2 * s * s / 15 - 17 * s * s * s / 315 + 62 * s * s * s * s / 2835)
        t = tl.where(tl.abs(z) < 0.04, series, t)
        z = tl.where(z < 0, -t, t)
    elif ACTIVATION == "sigmoid":
        e = tl.exp(-tl.abs(z))
        z = tl.where(z >= 0, 1 / (1 + e), e / (1 + e))
    return z


@triton.jit
def derivative(y, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """phi'(z) from y = phi(z), in the type of y."""
    if ACTIVATION == "leaky-relu":
        d = tl.where(y > 0, tl.full(y.shape, 1.0, y.dtype), tl.full(y.shape, SLOPE, y.dtype))  # a bare SLOPE is fp32
    elif ACTIVATION == "tanh":
        d = 1 - y * y
    elif ACTIVATION == "sigmoid":
        d = y * (1 - y)
    else:
        d = tl.full(y.shape, 1.0, y.dtype)
    return d


@triton.jit
def last_arrival(counter_ptr, n_programs):
    """Whether this program is the last of the launch to come here; what the others stored before is visible to it.

    The last one has to store 0 to ``counter_ptr`` again.
    """
    tl.debug_barrier()  # all of the program's threads have stored
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == n_programs - 1
