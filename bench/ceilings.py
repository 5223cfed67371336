"""What the machine can do at most: bandwidth, matrix rates, the gap between two kernels of a graph, a grid barrier.

The kernels here compute nothing; they are no ops of fastgan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.sections import Context
from fastgan.benchmark.ceilings import copy, matrix
from fastgan.benchmark.timing import median_us

_NODES, _BARRIERS = 1000, (100, 1100)


def ceilings(context: Context) -> None:
    device = context.device
    sizes = {"dram": 2**20 if context.tiny else 2**30, "l2": 2**16 if context.tiny else 2**24}
    for name, n in sizes.items():
        context.part(f"copy {name}", lambda n=n: copy(n, device))
    n = 64 if context.tiny else 8192
    for name in ("fp32", "tf32", "bf16", "fp16"):
        context.part(f"matrix {name}", lambda name=name: matrix(name, n, device))
    for name, dependent in (("graph node", False), ("graph node, dependent", True)):
        context.part(name, lambda dependent=dependent: graph_node(context, dependent))
    context.part("grid barrier", lambda: grid_barrier(context))
    context.part("eager launch", lambda: eager_launch(context))


def captured(run: Callable[[], object], device: torch.device) -> Any:
    """A graph of ``run``, after a call that compiles and allocates."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def graph_node(context: Context, dependent: bool) -> dict[str, float]:
    """Microseconds from one empty kernel to the next in a chain of them."""
    context.needs_cuda()
    from bench.empty_kernels import empty_launch

    x = torch.zeros(1, device=context.device)
    launch = empty_launch(x, dependent)

    def chain() -> None:
        for _ in range(_NODES):
            launch()

    time_us = median_us(captured(chain, context.device).replay, context.device)
    return {"nodes": _NODES, "node_us": time_us / _NODES}


def grid_barrier(context: Context) -> dict[str, float]:
    """Microseconds that all programs of a cooperative launch take to wait for each other; from two launches' difference
    in time and in barriers."""
    context.needs_cuda()
    from bench.empty_kernels import barrier_launch

    programs = torch.cuda.get_device_properties(context.device).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device=context.device)

    def timed(barriers: int) -> float:
        launch = barrier_launch(counter, programs, barriers)

        def run() -> None:
            counter.zero_()
            launch()

        return median_us(run, context.device)

    few, many = (timed(n) for n in _BARRIERS)
    return {"programs": programs, "barrier_us": (many - few) / (_BARRIERS[1] - _BARRIERS[0])}


def eager_launch(context: Context) -> dict[str, float]:
    """Microseconds of one Triton launch and of one small torch op from Python."""
    context.needs_cuda()
    from bench.empty_kernels import empty_launch

    x = torch.zeros(1, device=context.device)
    launch = empty_launch(x, False)
    return {"triton_us": median_us(launch, context.device), "torch_us": median_us(lambda: x.add_(1), context.device)}
