"""The machine as a measurement's condition: GPU, clocks, power limit, driver, versions."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.conditions import conditions
from bench.sections import Context

_PACKAGES = ("triton", "pytest", "nvidia-ml-py", "hypothesis")


def slug(device: torch.device) -> str:
    """The folder of results of a device."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def environment(context: Context) -> None:
    context.put("conditions", conditions())
    context.put("versions", {name: version(name) for name in _PACKAGES} | {"cuda": torch.version.cuda})
    context.put("commit", commit())
    context.part("gpu", lambda: gpu(context))


def gpu(context: Context) -> dict[str, Any]:
    context.needs_cuda()
    p = torch.cuda.get_device_properties(context.device)
    found: dict[str, Any] = {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "devices_seen": torch.cuda.device_count(),
    }
    return found | {"state": state(context.device)}


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power and temperature now, from the driver's library or its tool; says so where neither is there."""
    try:
        import pynvml  # from nvidia-ml-py
    except ImportError:
        return _by_tool()
    pynvml.nvmlInit()
    h = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1e3,
        "power_w": pynvml.nvmlDeviceGetPowerUsage(h) / 1e3,
        "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(h, pynvml.NVML_CLOCK_SM),
        "sm_clock_most_mhz": pynvml.nvmlDeviceGetMaxClockInfo(h, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(h, pynvml.NVML_CLOCK_MEM),
        "temperature_c": pynvml.nvmlDeviceGetTemperature(h, pynvml.NVML_TEMPERATURE_GPU),
    }


_FIELDS = {"driver_version": "driver", "enforced.power.limit": "power_limit_w", "power.draw": "power_w",
           "clocks.sm": "sm_clock_mhz", "clocks.max.sm": "sm_clock_most_mhz", "clocks.mem": "memory_clock_mhz",
           "temperature.gpu": "temperature_c"}  # fmt: skip


def _by_tool() -> dict[str, Any]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        return {"unknown": f"neither pynvml nor nvidia-smi: {type(e).__name__}"}
    values = run.stdout.splitlines()[0].split(", ")
    return dict(zip(_FIELDS.values(), values, strict=True))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """What is measured; unknown where the tree came without its history."""
    tree = Path(__file__).parents[1]
    try:
        said = [
            subprocess.run(["git", *args], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return {"unknown": "no git history here"}
    return {"commit": said[0], "changed": bool(said[1]), "environment": os.environ.get("TRITON_INTERPRET", "")}
