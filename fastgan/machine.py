"""The machine as a measurement's condition: processor, its load, GPU, clocks, power limit, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import fastgan
from fastgan import nvml


def conditions(device: torch.device, **more: Any) -> dict[str, Any]:
    """What a number measured on this machine depends on.

    Args:
        device: that the work runs on.
        more: whatever else it depends on; added as it is.

    Returns:
        ``device``, ``device_name``, ``cpu``, ``cores`` (that this process may use), ``load_before`` (runnable processes
        in the last minute, ``None`` where the system does not count them), ``torch_threads``, ``system``, the versions
        ``python``, ``torch``, ``triton``, ``numpy`` and ``fastgan``, and ``gpu``: ``None``, or what :func:`gpu` gives.
    """
    on_gpu = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cpu": cpu_name(),
        "cores": cores(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "numpy": version("numpy"),
        "fastgan": fastgan.__version__,
        "gpu": gpu(device) if on_gpu else None,
        **more,
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """A CUDA device: what torch says of it, and its state by :func:`fastgan.nvml.state`."""
    p = torch.cuda.get_device_properties(device)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "devices_seen": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        **nvml.state(device),
    }


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not say."""
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int | None:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
