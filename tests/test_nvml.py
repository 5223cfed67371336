"""Figures of a GPU from a stand-in for its driver's library: right, or a line that says what is missing and why."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_nvml import CODES, CONSTANTS, PCI, PROPERTIES, UUID, Board, FakeNvml, installed

from fastgan import machine, nvml

CUDA = torch.device("cuda", 0)
STATE = {
    "name": "NVIDIA H100", "driver": "580.65.06", "power_limit_w": 700.0, "power_w": 350.0, "sm_clock_mhz": 1980,
    "sm_clock_most_mhz": 1995, "memory_clock_mhz": 2619, "temperature_c": 61,
}  # fmt: skip
SAMPLE = {
    "gpu_percent": 93, "memory_percent": 17, "gpu_memory_bytes": 5 << 30, "process_gpu_memory_bytes": 3 << 30,
    "power_w": 350.0, "sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 61,
}  # fmt: skip
ACTIVITY = {"sm_percent": 88.5, "tensor_percent": 31.25, "dram_percent": 12.0}
SUPPORT = "nvmlGpmQueryDeviceSupport"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return installed(monkeypatch)


def test_everything(fake: FakeNvml) -> None:
    gpu = nvml.Gpu(CUDA)
    assert gpu.state() == STATE
    assert gpu.sample() == SAMPLE  # the activity is of the time since the sample before
    assert gpu.sample() == SAMPLE | ACTIVITY
    assert gpu.sample() == SAMPLE | ACTIVITY
    first, second = gpu.energy_j(), gpu.energy_j()
    assert first is not None
    assert second == pytest.approx(first + 42.0)
    gpu.close()
    assert gpu.missing == []
    assert fake.started == 0
    assert len(fake.freed) == 2
    gpu.close()
    assert gpu.sample() == {}
    assert fake.started == 0


def test_conditions_of_a_gpu(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30, "L2_cache_size": 50 << 20}
    properties = SimpleNamespace(**vars(PROPERTIES), **more)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    said = machine.conditions(CUDA, timing="none")
    assert (said["device"], said["device_name"], said["timing"]) == ("cuda:0", "NVIDIA H100", "none")
    assert said["gpu"] == STATE | {
        "capability": "9.0", "multiprocessors": 132, "memory_gib": 80.0, "l2_mib": 50.0, "devices_seen": 8,
        "cuda": torch.version.cuda, "missing": [],
    }  # fmt: skip
    assert fake.started == 0


def test_conditions_of_a_cpu() -> None:
    said = machine.conditions(torch.device("cpu"))
    assert said["gpu"] is None
    assert said["device_name"] == said["cpu"] != ""
    assert said["cores"] >= 1
    assert said["torch"] == torch.__version__


# ---- nothing to ask


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = nvml.Gpu(CUDA)
    assert (gpu.state(), gpu.sample(), gpu.energy_j()) == ({}, {}, None)
    assert gpu.missing == ["NVML: the package is not installed: pip install nvidia-ml-py"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("NVML_ERROR_LIBRARY_NOT_FOUND", "NVML: no NVIDIA driver here: libnvidia-ml.so.1 is not found"),
        ("NVML_ERROR_DRIVER_NOT_LOADED", "NVML: the driver does not answer (NVML_ERROR_DRIVER_NOT_LOADED)"),
        ("NVML_ERROR_NO_PERMISSION", "NVML: the driver does not answer (NVML_ERROR_NO_PERMISSION)"),
    ],
)
def test_driver_missing(fake: FakeNvml, error: str, line: str) -> None:
    fake.failing["nvmlInit"] = error
    assert nvml.state(CUDA) == {"missing": [line]}


def test_the_real_library_without_a_driver() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    (line,) = nvml.state(CUDA)["missing"]
    assert line.startswith("NVML: ")


# ---- one figure missing


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("NVML_ERROR_NO_PERMISSION", "no permission (NVML_ERROR_NO_PERMISSION)"),
        ("NVML_ERROR_NOT_SUPPORTED", "not supported by this GPU (NVML_ERROR_NOT_SUPPORTED)"),
        ("NVML_ERROR_FUNCTION_NOT_FOUND", "not known to this driver (NVML_ERROR_FUNCTION_NOT_FOUND)"),
        ("an old driver", "not known to this driver (an old driver)"),
        ("NVML_ERROR_UNKNOWN", "NVML_ERROR_UNKNOWN"),
    ],
)
@pytest.mark.parametrize(
    ("function", "label", "gone"),
    [
        ("nvmlDeviceGetPowerUsage", "power", {"power_w"}),
        ("nvmlDeviceGetTemperature", "temperature", {"temperature_c"}),
        ("nvmlDeviceGetComputeRunningProcesses", "memory of this process", {"process_gpu_memory_bytes"}),
        (SUPPORT, "SM activity, tensor activity, DRAM bandwidth", set(ACTIVITY)),
    ],
)
def test_one_figure(fake: FakeNvml, function: str, label: str, gone: set[str], error: str, why: str) -> None:
    """It is a line, is not asked for again, and takes nothing else with it."""
    fake.failing[function] = error
    gpu = nvml.Gpu(CUDA)
    gpu.sample()
    assert gpu.sample().keys() == (SAMPLE | ACTIVITY).keys() - gone
    gpu.close()
    assert gpu.missing == [f"{label}: {why}"]
    assert fake.calls[function] == 1


def test_no_permission_to_profile(fake: FakeNvml) -> None:
    fake.failing["nvmlGpmSampleGet"] = "NVML_ERROR_NO_PERMISSION"
    gpu = nvml.Gpu(CUDA)
    assert [gpu.sample(), gpu.sample()] == [SAMPLE, SAMPLE]
    gpu.close()
    assert gpu.missing == [
        "SM activity, tensor activity, DRAM bandwidth: no permission (NVML_ERROR_NO_PERMISSION); "
        "ask for the driver's option NVreg_RestrictProfilingToAdminUsers=0"
    ]
    assert len(fake.freed) == 2


def test_no_gpm(fake: FakeNvml) -> None:
    fake.boards[0].gpm = 0
    gpu = nvml.Gpu(CUDA)
    assert [gpu.sample(), gpu.sample()] == [SAMPLE, SAMPLE]
    assert gpu.missing == ["SM activity, tensor activity, DRAM bandwidth: GPM is not supported by this GPU"]


def test_one_metric_of_gpm(fake: FakeNvml) -> None:
    fake.bad_metrics["NVML_GPM_METRIC_ANY_TENSOR_UTIL"] = "NVML_ERROR_NOT_SUPPORTED"
    gpu = nvml.Gpu(CUDA)
    for _ in range(3):
        found = gpu.sample()
    assert found.keys() == (SAMPLE | ACTIVITY).keys() - {"tensor_percent"}
    assert gpu.missing == ["tensor activity: not supported by this GPU (NVML_ERROR_NOT_SUPPORTED)"]


def test_process_memory_is_not_available(fake: FakeNvml) -> None:
    fake.boards[0].processes[0].usedGpuMemory = None  # as nvidia-ml-py says it
    gpu = nvml.Gpu(CUDA)
    assert "process_gpu_memory_bytes" not in gpu.sample()
    gpu.close()
    assert gpu.missing == ["memory of this process: the driver does not say"]


def test_process_is_not_listed(fake: FakeNvml) -> None:
    """Not on the GPU yet is no failure; never listed is a line at the end."""
    listed, other = fake.boards[0].processes, [SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=1)]
    fake.boards[0].processes = other
    early, never = nvml.Gpu(CUDA), nvml.Gpu(CUDA)
    for gpu in (early, never):
        assert "process_gpu_memory_bytes" not in gpu.sample()
    fake.boards[0].processes = listed
    assert early.sample()["process_gpu_memory_bytes"] == 3 << 30
    early.close()
    never.close()
    assert early.missing == []
    assert never.missing == ["memory of this process: the driver does not list it (process ids of a container?)"]


def test_gpu_lost_in_mid_run(fake: FakeNvml) -> None:
    gpu = nvml.Gpu(CUDA)
    gpu.sample()
    fake.failing = dict.fromkeys(
        (name for name in dir(FakeNvml) if name.startswith("nvmlDevice")), "NVML_ERROR_GPU_IS_LOST"
    )
    before = fake.calls["nvmlDeviceGetPowerUsage"]
    assert gpu.sample() == {}
    assert gpu.sample() == {}
    assert gpu.energy_j() is None
    gpu.close()
    assert gpu.missing == ["NVML: the GPU is lost since GPU utilisation was asked for (NVML_ERROR_GPU_IS_LOST)"]
    assert fake.calls["nvmlDeviceGetPowerUsage"] == before
    assert fake.started == 0


# ---- which GPU


def boards() -> tuple[Board, Board, Board]:
    """CUDA's first GPU is NVML's last."""
    other, own = Board("GPU-other", "00000000:01:00.0", power_mw=1000), Board(f"GPU-{UUID}", PCI, mig_mode=1)
    return other, own, Board(f"MIG-{UUID}", parent=own, used=1 << 30)


@pytest.mark.parametrize("uuid", [f"GPU-{UUID}", "GPU-in-another-form"])
def test_found_by_uuid_or_place(fake: FakeNvml, uuid: str) -> None:
    other, own, _ = boards()
    own.uuid, own.mig_mode = uuid, 0
    fake.boards = (other, own)
    assert nvml.Gpu(CUDA).state()["power_w"] == 350.0


def test_not_known(fake: FakeNvml) -> None:
    fake.boards = boards()[:1]
    assert nvml.state(CUDA) == {
        "missing": [f"NVML: it does not know the GPU NVIDIA H100 at {PCI} (NVML_ERROR_NOT_FOUND)"]
    }
    assert fake.started == 0


@pytest.mark.parametrize("by", ["the instance's UUID", "CUDA_VISIBLE_DEVICES"])
def test_mig(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    other, own, instance = boards()
    if by == "CUDA_VISIBLE_DEVICES":
        instance.uuid = "MIG-1234"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    else:
        own.uuid = "GPU-of-the-instance"
    fake.boards = (other, own, instance)
    gpu = nvml.Gpu(CUDA)
    assert gpu.sample()["gpu_memory_bytes"] == 1 << 30
    assert gpu.sample().keys() == (SAMPLE | ACTIVITY).keys() - {"gpu_percent", "memory_percent"}
    assert gpu.missing == [
        "MIG: power, energy, clocks and temperature are those of the whole GPU",
        "GPU utilisation: not supported by this GPU (NVML_ERROR_NOT_SUPPORTED)",
        "memory utilisation: not supported by this GPU (NVML_ERROR_NOT_SUPPORTED)",
    ]
    assert fake.calls["nvmlGpmMigSampleGet"] == 2
    assert "nvmlGpmSampleGet" not in fake.calls


def test_an_unknown_instance(fake: FakeNvml) -> None:
    fake.boards = boards()[1:2]
    gpu = nvml.Gpu(CUDA)
    assert gpu.sample()["gpu_memory_bytes"] == 5 << 30
    assert gpu.missing[0] == "MIG: which instance this is is not known; all figures are those of the whole GPU"


# ---- the stand-in is like the library


def test_names_of_the_real_library() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    used = set(re.findall(r"\b(?:nvml|NVML|c_nvml)[A-Z_]\w*", Path(nvml.__file__).read_text())) - {
        "nvmlReturn"
    }  # a field
    assert {"nvmlGpmMetricsGet", "NVML_CLOCK_MEM", "c_nvmlGpmMetricsGet_t", "NVMLError_GpuIsLost"} <= used
    assert {name for name in used if not hasattr(real, name)} == set()
    for name, value in (CODES | CONSTANTS).items():
        assert getattr(real, name) == value, name
    names = {name for name in [*dir(FakeNvml), *vars(FakeNvml())] if re.match(r"nvml[A-Z]|NVML", name)}
    assert used <= names | {"c_nvmlGpmMetricsGet_t"}
    assert {name for name in names if not hasattr(real, name)} == set()
    for name in (name for name in names if name.startswith("NVMLError_")):
        assert issubclass(getattr(real, name), real.NVMLError)
    asked = real.c_nvmlGpmMetricsGet_t()
    assert {"version", "numMetrics", "sample1", "sample2", "metrics"} == {name for name, *_ in asked._fields_}
    assert {"metricId", "nvmlReturn", "value"} <= {name for name, *_ in asked.metrics[0]._fields_}
