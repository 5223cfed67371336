"""An NVIDIA GPU's clocks, power, memory and activity, from the driver's management library (NVML, by nvidia-ml-py).

Each figure is asked for on its own: one that cannot be had here is a line that says why, not an error, and is not asked
for again. NVML counts every GPU of the machine in its own order, so that a device is found by its UUID.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Unavailable(Exception):
    """Why a figure cannot be had."""


class Figure(NamedTuple):
    """How a figure is called in a sentence, and how it is read."""

    label: str
    read: Callable[[Gpu], Any]


class Gpu:
    """What NVML says of a CUDA device; everything is absent, with the reason, where there is no NVML.

    Args:
        device: a CUDA device; which one of a machine's it is under ``CUDA_VISIBLE_DEVICES`` is looked up.

    Attributes:
        missing: a line for each figure that was asked for and could not be had.
    """

    def __init__(self, device: torch.device) -> None:
        self.missing: list[str] = []
        self._failed: set[str] = set()
        self._gpm: list[Any] = []  # the last sample, and the memory of the next
        self._listed: bool | None = None  # this process among those of the GPU; None: not asked
        self._nvml: Any = None
        self.mig: Any = None
        try:
            self._nvml = _started()
            self._find(device)
        except Unavailable as e:
            self._close(f"NVML: {e}")

    def state(self) -> dict[str, Any]:
        """The conditions of a measurement, as far as they are known.

        Returns:
            ``name``, ``driver``, ``power_limit_w``, ``power_w``, ``sm_clock_mhz``, ``sm_clock_most_mhz``,
            ``memory_clock_mhz`` and ``temperature_c``.
        """
        return self._known(_STATE)

    def sample(self) -> dict[str, float]:
        """What the GPU does now, as far as it is known.

        Returns:
            ``gpu_percent`` and ``memory_percent`` (of the time in which a kernel ran, in which memory was read or
            written), ``gpu_memory_bytes``, ``process_gpu_memory_bytes``, ``power_w``, ``sm_clock_mhz``,
            ``memory_clock_mhz``, ``temperature_c``; from the second call, and on GPUs with GPM,
            ``sm_percent``, ``tensor_percent`` and ``dram_percent``: means since the call before.
        """
        return self._known(_SAMPLE) | self._activity()

    def energy_j(self) -> float | None:
        """Joule since the driver was loaded, of the whole GPU."""
        found = self._known({"energy_j": _ENERGY})
        return found.get("energy_j")

    def close(self) -> None:
        """Let NVML go; adds to :attr:`missing` what never could be had."""
        if self._nvml is None:
            return
        if self._listed is False:
            self.missing.append("memory of this process: the driver does not list it (process ids of a container?)")
        self._close()

    def _close(self, why: str | None = None) -> None:
        nvml, self._nvml = self._nvml, None
        self.missing += [why] if why is not None else []
        if nvml is None:
            return
        for sample in self._gpm:
            _quietly(nvml, nvml.nvmlGpmSampleFree, sample)
        _quietly(nvml, nvml.nvmlShutdown)

    def _find(self, device: torch.device) -> None:
        """Set ``whole``, the GPU, and ``mig``, the instance of it that CUDA uses, if it is one."""
        nvml = self._nvml
        p: Any = torch.cuda.get_device_properties(device)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        for name in (visible if visible.startswith("MIG-") else "", f"GPU-{p.uuid}", f"MIG-{p.uuid}"):
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(name) if name else None
            except nvml.NVMLError:
                continue
            if handle is not None:
                break
        else:
            place = f"{p.pci_domain_id:08x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
            try:
                handle = nvml.nvmlDeviceGetHandleByPciBusId(place)
            except nvml.NVMLError as e:
                raise Unavailable(f"it does not know the GPU {p.name} at {place} ({e})") from None
        self.whole = handle
        try:
            if nvml.nvmlDeviceIsMigDeviceHandle(handle):
                self.mig = handle
                self.whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
                self.missing.append("MIG: power, energy, clocks and temperature are those of the whole GPU")
            elif nvml.nvmlDeviceGetMigMode(handle)[0]:
                self.missing.append("MIG: which instance this is is not known; all figures are those of the whole GPU")
        except nvml.NVMLError:
            pass  # a GPU or a driver without instances

    @property
    def part(self) -> Any:
        """Whose memory and processes are asked for."""
        return self.whole if self.mig is None else self.mig

    def _known(self, figures: dict[str, Figure]) -> dict[str, Any]:
        found = {}
        for name, figure in figures.items():
            value = self._ask(name, figure.label, figure.read)
            if value is not None:
                found[name] = value
        return found

    def _ask(self, name: str, label: str, read: Callable[[Gpu], Any]) -> Any:
        if self._nvml is None or name in self._failed:
            return None
        nvml = self._nvml
        try:
            return read(self)
        except nvml.NVMLError_GpuIsLost as e:
            self._close(f"NVML: the GPU is lost since {label} was asked for ({e})")
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError, Unavailable) as e:
            self._failed.add(name)
            self.missing.append(f"{label}: {_why(nvml, e)}")
        return None

    def _activity(self) -> dict[str, float]:
        """Of the time since the call before, from the difference of two samples of the GPU's counters."""
        together = ", ".join(label for label, _ in _ACTIVITY.values())
        values: dict[str, float] | None = self._ask("gpm", together, Gpu._gpm_difference)
        return values or {}

    def _gpm_difference(self) -> dict[str, float]:
        nvml = self._nvml
        first = not self._gpm
        if first:
            if not nvml.nvmlGpmQueryDeviceSupport(self.whole).isSupportedDevice:
                raise Unavailable("GPM is not supported by this GPU")
            for _ in range(2):
                self._gpm.append(nvml.nvmlGpmSampleAlloc())
        before, now = self._gpm
        try:
            if self.mig is None:
                nvml.nvmlGpmSampleGet(self.whole, now)
            else:
                nvml.nvmlGpmMigSampleGet(self.whole, nvml.nvmlDeviceGetGpuInstanceId(self.mig), now)
        except nvml.NVMLError_NoPermission as e:
            hint = "ask for the driver's option NVreg_RestrictProfilingToAdminUsers=0"
            raise Unavailable(f"no permission ({e}); {hint}") from None
        self._gpm = [now, before]
        if first:
            return {}
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
        asked.sample1, asked.sample2 = before, now
        wanted = {name: row for name, row in _ACTIVITY.items() if name not in self._failed}
        asked.numMetrics = len(wanted)
        for i, (_, metric) in enumerate(wanted.values()):
            asked.metrics[i].metricId = getattr(nvml, metric)
        nvml.nvmlGpmMetricsGet(asked)
        found: dict[str, float] = {}
        for i, (name, (label, _)) in enumerate(wanted.items()):
            code = asked.metrics[i].nvmlReturn
            value = float(asked.metrics[i].value)
            if code == nvml.NVML_SUCCESS:
                found |= {name: value} if math.isfinite(value) else {}
            else:
                self._failed.add(name)
                self.missing.append(f"{label}: {_why(nvml, nvml.NVMLError(code))}")
        return found

    def _own_memory(self) -> int | None:
        listed = self._nvml.nvmlDeviceGetComputeRunningProcesses(self.part)
        own = next((p for p in listed if p.pid == os.getpid()), None)
        self._listed = bool(self._listed) or own is not None
        if own is None:
            return None  # nothing of it is on the GPU yet, or its number is another there
        if own.usedGpuMemory is None:
            raise Unavailable("the driver does not say")
        return int(own.usedGpuMemory)


def state(device: torch.device) -> dict[str, Any]:
    """:meth:`Gpu.state` of a CUDA device, and ``missing`` with a line for whatever is not in it."""
    gpu = Gpu(device)
    found = gpu.state()
    missing = [*gpu.missing]
    gpu.close()
    return {**found, "missing": missing}


def _started() -> Any:
    """nvidia-ml-py's module, connected to the driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        raise Unavailable("the package is not installed: pip install nvidia-ml-py") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError_LibraryNotFound:
        raise Unavailable("no NVIDIA driver here: libnvidia-ml.so.1 is not found") from None
    except nvml.NVMLError as e:
        raise Unavailable(f"the driver does not answer ({e})") from None
    return nvml


def _why(nvml: Any, e: Exception) -> str:
    kinds = {
        "NVMLError_NoPermission": "no permission",
        "NVMLError_NotSupported": "not supported by this GPU",
        "NVMLError_FunctionNotFound": "not known to this driver",
        "NVMLLibraryMismatchError": "not known to this driver",
    }
    text = str(e).strip()
    kind = next((words for name, words in kinds.items() if isinstance(e, getattr(nvml, name))), None)
    return text if kind is None else f"{kind} ({text})"


def _quietly(nvml: Any, call: Callable[..., Any], *arguments: Any) -> None:
    """At the end, where nothing depends on it any more."""
    with contextlib.suppress(nvml.NVMLError):
        call(*arguments)


def _clock(kind: str) -> Callable[[Gpu], Any]:
    return lambda g: g._nvml.nvmlDeviceGetClockInfo(g.whole, getattr(g._nvml, kind))


_POWER = Figure("power", lambda g: g._nvml.nvmlDeviceGetPowerUsage(g.whole) / 1e3)
_SM_CLOCK = Figure("SM clock", _clock("NVML_CLOCK_SM"))
_MEMORY_CLOCK = Figure("memory clock", _clock("NVML_CLOCK_MEM"))
_TEMPERATURE = Figure(
    "temperature", lambda g: g._nvml.nvmlDeviceGetTemperature(g.whole, g._nvml.NVML_TEMPERATURE_GPU)
)  # fmt: skip
_ENERGY = Figure("energy", lambda g: g._nvml.nvmlDeviceGetTotalEnergyConsumption(g.whole) / 1e3)
_STATE = {
    "name": Figure("name", lambda g: g._nvml.nvmlDeviceGetName(g.part)),
    "driver": Figure("driver", lambda g: g._nvml.nvmlSystemGetDriverVersion()),
    "power_limit_w": Figure("power limit", lambda g: g._nvml.nvmlDeviceGetEnforcedPowerLimit(g.whole) / 1e3),
    "power_w": _POWER,
    "sm_clock_mhz": _SM_CLOCK,
    "sm_clock_most_mhz": Figure(
        "highest SM clock", lambda g: g._nvml.nvmlDeviceGetMaxClockInfo(g.whole, g._nvml.NVML_CLOCK_SM)
    ),
    "memory_clock_mhz": _MEMORY_CLOCK,
    "temperature_c": _TEMPERATURE,
}
_SAMPLE = {
    "gpu_percent": Figure("GPU utilisation", lambda g: g._nvml.nvmlDeviceGetUtilizationRates(g.whole).gpu),
    "memory_percent": Figure("memory utilisation", lambda g: g._nvml.nvmlDeviceGetUtilizationRates(g.whole).memory),
    "gpu_memory_bytes": Figure("memory of the GPU", lambda g: g._nvml.nvmlDeviceGetMemoryInfo(g.part).used),
    "process_gpu_memory_bytes": Figure("memory of this process", Gpu._own_memory),
    "power_w": _POWER,
    "sm_clock_mhz": _SM_CLOCK,
    "memory_clock_mhz": _MEMORY_CLOCK,
    "temperature_c": _TEMPERATURE,
}
_ACTIVITY = {
    "sm_percent": ("SM activity", "NVML_GPM_METRIC_SM_UTIL"),
    "tensor_percent": ("tensor activity", "NVML_GPM_METRIC_ANY_TENSOR_UTIL"),
    "dram_percent": ("DRAM bandwidth", "NVML_GPM_METRIC_DRAM_BW_UTIL"),
}
