"""A stand-in for nvidia-ml-py's module ``pynvml``: its names, codes and exceptions over GPUs that are plain objects."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

CODES = {
    "NVML_ERROR_UNINITIALIZED": 1, "NVML_ERROR_INVALID_ARGUMENT": 2, "NVML_ERROR_NOT_SUPPORTED": 3,
    "NVML_ERROR_NO_PERMISSION": 4, "NVML_ERROR_NOT_FOUND": 6, "NVML_ERROR_DRIVER_NOT_LOADED": 9,
    "NVML_ERROR_LIBRARY_NOT_FOUND": 12, "NVML_ERROR_FUNCTION_NOT_FOUND": 13, "NVML_ERROR_GPU_IS_LOST": 15,
    "NVML_ERROR_UNKNOWN": 999,
}  # fmt: skip
CONSTANTS = {
    "NVML_SUCCESS": 0, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0,
    "NVML_GPM_METRICS_GET_VERSION": 1, "NVML_GPM_METRIC_SM_UTIL": 2, "NVML_GPM_METRIC_ANY_TENSOR_UTIL": 5,
    "NVML_GPM_METRIC_DRAM_BW_UTIL": 10,
}  # fmt: skip


@dataclass(eq=False)
class Board:
    """One GPU, or one instance of it."""

    uuid: str
    pci: str = ""
    parent: Board | None = None
    mig_mode: int = 0
    power_mw: int = 350_000
    energy_mj: int = 1_000_000
    used: int = 5 << 30
    processes: list[Any] = field(default_factory=lambda: [SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 << 30)])
    gpm: int = 1


class Metric(ctypes.Structure):
    _fields_ = (("metricId", ctypes.c_uint), ("nvmlReturn", ctypes.c_uint), ("value", ctypes.c_double))


class MetricsGet(ctypes.Structure):
    """The fields of ``c_nvmlGpmMetricsGet_t`` that are plain numbers; its samples are kept as attributes."""

    _fields_ = (("version", ctypes.c_uint), ("numMetrics", ctypes.c_uint), ("metrics", Metric * 333))


class FakeNvml(ModuleType):
    """The module.

    Attributes:
        boards: what the machine has, in NVML's own order.
        failing: name of a function to name of the error that it raises.
        bad_metrics: GPM metrics that give an error each, by constant's name.
        calls: how often a function was called.
    """

    def __init__(self, *boards: Board) -> None:
        super().__init__("pynvml")
        self.boards = boards or (Board("GPU-" + UUID, PCI),)
        self.failing: dict[str, str] = {}
        self.bad_metrics: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self.freed: list[Any] = []
        self.started = 0
        vars(self).update(CONSTANTS)

        class NVMLError(Exception):
            def __init__(self, value: int) -> None:
                self.value = value

            def __new__(cls, value: int) -> Any:
                return Exception.__new__(of_code.get(value, cls) if cls is NVMLError else cls, value)

            def __str__(self) -> str:
                return next(name for name, code in CODES.items() if code == self.value)

        of_code: dict[int, Any] = {}
        self.NVMLError = NVMLError
        self.NVMLLibraryMismatchError = type("NVMLLibraryMismatchError", (Exception,), {})
        for name, code in CODES.items():
            kind = "NVMLError_" + "".join(word.capitalize() for word in name.split("_")[2:])
            of_code[code] = type(kind, (NVMLError,), {})
            vars(self).update({kind: of_code[code], name: code})
        self.c_nvmlGpmMetricsGet_t = MetricsGet

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("nvml"):
            self.calls[name] += 1
            if name in self.failing:
                error = self.failing[name]
                if error in CODES:
                    raise self.NVMLError(CODES[error])
                raise self.NVMLLibraryMismatchError(error)
            if not self.started and name != "nvmlInit":
                raise self.NVMLError(CODES["NVML_ERROR_UNINITIALIZED"])
        return found

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.started -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def _find(self, key: str, value: str) -> Board:
        for board in self.boards:
            if getattr(board, key) == value:
                return board
        raise self.NVMLError(CODES["NVML_ERROR_NOT_FOUND"])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Board:
        return self._find("uuid", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, place: str) -> Board:
        return self._find("pci", place)

    def nvmlDeviceIsMigDeviceHandle(self, board: Board) -> ctypes.c_uint:
        return ctypes.c_uint(board.parent is not None)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, board: Board) -> Board:
        assert board.parent is not None
        return board.parent

    def nvmlDeviceGetMigMode(self, board: Board) -> list[int]:
        return [board.mig_mode, board.mig_mode]

    def nvmlDeviceGetGpuInstanceId(self, board: Board) -> int:
        return 7

    def _whole(self, board: Board) -> Board:
        if board.parent is not None:
            raise self.NVMLError(CODES["NVML_ERROR_NOT_SUPPORTED"])
        return board

    def nvmlDeviceGetName(self, board: Board) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetEnforcedPowerLimit(self, board: Board) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, board: Board) -> int:
        return self._whole(board).power_mw

    def nvmlDeviceGetTotalEnergyConsumption(self, board: Board) -> int:
        board.energy_mj += 42_000  # since it was asked before
        return self._whole(board).energy_mj

    def nvmlDeviceGetClockInfo(self, board: Board, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind] if self._whole(board) else 0

    def nvmlDeviceGetMaxClockInfo(self, board: Board, kind: int) -> int:
        return {1: 1995}[kind]

    def nvmlDeviceGetTemperature(self, board: Board, sensor: int) -> int:
        return {0: 61}[sensor]

    def nvmlDeviceGetUtilizationRates(self, board: Board) -> Any:
        if self._whole(board).mig_mode:
            raise self.NVMLError(CODES["NVML_ERROR_NOT_SUPPORTED"])
        return SimpleNamespace(gpu=93, memory=17)

    def nvmlDeviceGetMemoryInfo(self, board: Board) -> Any:
        return SimpleNamespace(total=80 << 30, used=board.used, free=(80 << 30) - board.used)

    def nvmlDeviceGetComputeRunningProcesses(self, board: Board) -> list[Any]:
        return board.processes

    def nvmlGpmQueryDeviceSupport(self, board: Board) -> Any:
        return SimpleNamespace(isSupportedDevice=self._whole(board).gpm)

    def nvmlGpmSampleAlloc(self) -> dict[str, Any]:
        return {}

    def nvmlGpmSampleFree(self, sample: dict[str, Any]) -> None:
        self.freed.append(sample)

    def nvmlGpmSampleGet(self, board: Board, sample: dict[str, Any]) -> None:
        sample["at"] = (self._whole(board).uuid, self.calls["nvmlGpmSampleGet"])

    def nvmlGpmMigSampleGet(self, board: Board, instance: int, sample: dict[str, Any]) -> None:
        sample["at"] = (f"{self._whole(board).uuid}/{instance}", self.calls["nvmlGpmMigSampleGet"])

    def nvmlGpmMetricsGet(self, asked: MetricsGet) -> None:
        assert asked.version == 1
        (board, before), (same, now) = asked.sample1["at"], asked.sample2["at"]  # type: ignore[attr-defined]
        assert board == same
        assert now > before, "the earlier sample comes first"
        bad = {CONSTANTS[name]: CODES[error] for name, error in self.bad_metrics.items()}
        for metric in asked.metrics[: asked.numMetrics]:
            metric.nvmlReturn = bad.get(metric.metricId, 0)
            metric.value = {2: 88.5, 5: 31.25, 10: 12.0}[metric.metricId]


UUID, PCI = "8932f937-d72c-4106-c12f-20bd9faed9f6", "00000000:5e:00.0"
PROPERTIES = SimpleNamespace(name="NVIDIA H100", uuid=UUID, pci_domain_id=0, pci_bus_id=0x5E, pci_device_id=0)


def installed(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A stand-in in the library's place, and a device for torch."""
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module
