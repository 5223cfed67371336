"""CUDA graphs through the driver: how many launches one has, and many replays of it in one call.

The native extension opens ``libcuda.so.1`` at the first call. Without the extension or a driver :func:`nodes` raises,
and :func:`replay` replays from Python, which costs the interpreter's time for each.
"""

from __future__ import annotations

import torch

from fastgan._native import ext


def version() -> str:
    """The newest CUDA that the driver can run, such as ``"13.0"``.

    Raises:
        RuntimeError: there is no driver, or the native extension was not built.
    """
    if ext is None:
        raise RuntimeError("the native extension was not built when fastgan was installed")
    number = int(ext.driver_version())
    return f"{number // 1000}.{number % 1000 // 10}"


def available() -> bool:
    """Whether the driver can be called."""
    try:
        version()
    except RuntimeError:
        return False
    return True


def nodes(graph: torch.cuda.CUDAGraph) -> dict[str, int]:
    """Count what one replay of a graph runs.

    Args:
        graph: captured, and made with ``torch.cuda.CUDAGraph(keep_graph=True)``.

    Returns:
        Kind of node to number: ``"kernel"``, ``"memcpy"``, ``"memset"``, ``"event_record"``, ...; a child graph is a
        ``"graph"`` and its nodes are counted too. Kinds that the graph has none of are missing.

    Raises:
        RuntimeError: the graph was not kept or not captured, there is no driver, or the extension was not built.
    """
    if ext is None:
        raise RuntimeError("nodes: the native extension was not built when fastgan was installed")
    counts: dict[str, int] = ext.graph_nodes(int(graph.raw_cuda_graph()))
    return counts


def replay(graph: torch.cuda.CUDAGraph, times: int = 1) -> None:
    """Replay a graph many times on the current stream, and return without waiting for it.

    All replays but the first are one call that holds no lock of the interpreter and can be interrupted. torch's
    generators do not advance between them: a graph that draws torch's own random numbers would repeat them. What
    fastgan draws is a function of a step on the device, which advances.

    Args:
        graph: captured.
        times: at least 0.

    Raises:
        ValueError: ``times`` is negative.
        RuntimeError: a launch failed; the message has CUDA's name for the error.
    """
    if times < 0:
        raise ValueError(f"replay: times is {times}, expected at least 0")
    if times == 0:
        return
    graph.replay()  # torch's own: it instantiates a kept graph, and looks after its inputs
    if times == 1:
        return
    if not available():
        for _ in range(times - 1):
            graph.replay()
        return
    assert ext is not None
    ext.replay(int(graph.raw_cuda_graph_exec()), torch.cuda.current_stream().cuda_stream, times - 1)
