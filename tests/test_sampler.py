"""The thread that looks at the process and the GPU beside a run: what it finds, and that it never harms the run."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml, installed

from fastgan import InputError
from fastgan.profiling import sampler
from fastgan.profiling.sampler import Sampler

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GPU_SERIES = {
    "gpu_percent", "memory_percent", "gpu_memory_bytes", "process_gpu_memory_bytes", "power_w", "sm_clock_mhz",
    "memory_clock_mhz", "temperature_c", "sm_percent", "tensor_percent", "dram_percent",
}  # fmt: skip
SHORT = "which says little; measure 5 s or more"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return installed(monkeypatch)


def until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end, "20 seconds were not enough"
        time.sleep(0.005)


def sampled(device: torch.device, seconds: float = 0.1, interval_s: float = 0.01) -> dict[str, Any]:
    with Sampler(device, interval_s) as s:
        time.sleep(seconds)
    result = s.result()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


def test_the_process() -> None:
    with Sampler(CPU, 0.02) as s:
        time.sleep(0.1)  # a sample before
        kept = mmap.mmap(-1, 64 << 20)  # memory that nothing has used before
        kept.write(bytes(64 << 20))
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
    result = s.result()
    assert (result["interval_s"], result["missing"], result["energy_j"]) == (0.02, [], None)
    assert result["series"].keys() == {"process_cpu_percent", "resident_bytes", "threads"}
    resident, cpu = result["series"]["resident_bytes"], result["series"]["process_cpu_percent"]
    assert len(resident) > 3
    assert [t for t, _ in resident] == sorted(t for t, _ in resident)
    assert resident[-1][1] - resident[0][1] > len(kept) // 2
    assert result["series"]["threads"][-1][1] >= 2
    busy_s = sum((t - before) * v / 100 for (before, _), (t, v) in zip(resident, cpu, strict=False))
    assert 0.1 < busy_s < 10


def test_a_gpu(fake: FakeNvml) -> None:
    result = sampled(CUDA)
    assert result["series"].keys() == GPU_SERIES | {"process_cpu_percent", "resident_bytes", "threads"}
    assert {v for _, v in result["series"]["sm_percent"]} == {88.5}
    reads = len(result["series"]["power_w"])
    assert result["energy_j"] == pytest.approx(42.0 * (reads - 1))  # the stand-in's counter, from one time to the next
    (line,) = result["missing"]
    assert line.endswith(SHORT)
    assert fake.started == 0


def test_energy_of_a_long_run(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "ENERGY_S", 0.05)
    result = sampled(CUDA)
    assert result["energy_j"] == pytest.approx(42.0 * (len(result["series"]["power_w"]) - 1))
    assert result["missing"] == []


def test_energy_without_a_counter(fake: FakeNvml) -> None:
    fake.failing["nvmlDeviceGetTotalEnergyConsumption"] = "NVML_ERROR_NOT_SUPPORTED"
    with Sampler(CUDA, 0.01) as s:
        time.sleep(0.1)
    result = s.result()
    times = [t for t, _ in s._series["power_w"]]  # those of the result are in whole milliseconds
    assert s._last is not None
    assert times[-1] == s._last[0] - s.begin  # to the last bit: behind the end it would cut energy off
    assert result["energy_j"] == pytest.approx(350 * (times[-1] - times[0]))
    energy, summed, short = result["missing"]
    assert summed == "energy counter: energy is the sum over the power samples instead"
    assert short.endswith(SHORT)
    assert energy == "energy: not supported by this GPU (NVML_ERROR_NOT_SUPPORTED)"


def test_energy_of_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "ENERGY_S", 1.0)
    s = Sampler(CPU, 1.0)
    with s:
        pass
    s._counter = [[0.0, 100.0], [1.0, 1100.0], [2.0, 1200.0], [3.0, 1220.0]]  # a second of compilation before
    at = s.begin
    assert s.result((at + 1, at + 3))["energy_j"] == pytest.approx(120)
    assert s.result((at + 1.5, at + 2.5))["energy_j"] == pytest.approx(50 + 10)
    assert s.result((at + 1.5, at + 2.5))["missing"] == []
    assert s.result((at + 4, at + 6))["energy_j"] is None  # the counter was lost
    ended = s.result((0.0, 0.0))
    assert ended["energy_j"] is None
    assert ended["missing"] == ["energy: the run ended before the part of it that energy is measured over"]
    s._counter, s._series["power_w"] = [], [[0.0, 500.0], [1.0, 500.0], [2.0, 300.0], [3.0, 300.0]]
    result = s.result((at + 2, at + 2.5))
    assert result["energy_j"] == pytest.approx(150)
    assert result["missing"] == [
        "energy counter: energy is the sum over the power samples instead",
        "energy: of 0.5 s, which says little; measure 1 s or more",
    ]


def test_no_energy(fake: FakeNvml) -> None:
    fake.failing |= dict.fromkeys(
        ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"), "NVML_ERROR_NO_PERMISSION"
    )
    result = sampled(CUDA)
    assert result["energy_j"] is None
    assert "power_w" not in result["series"]
    assert [line.partition(":")[0] for line in result["missing"]] == ["energy", "power"]


def test_no_driver(fake: FakeNvml) -> None:
    fake.failing["nvmlInit"] = "NVML_ERROR_LIBRARY_NOT_FOUND"
    result = sampled(CUDA)
    assert result["series"].keys() == {"process_cpu_percent", "resident_bytes", "threads"}
    assert result["missing"] == ["NVML: no NVIDIA driver here: libnvidia-ml.so.1 is not found"]
    assert result["energy_j"] is None


def test_gpu_lost(fake: FakeNvml) -> None:
    with Sampler(CUDA, 0.01) as s:
        until(lambda: len(s._series.get("power_w", ())) > 1)
        fake.failing = dict.fromkeys((n for n in dir(FakeNvml) if n.startswith("nvmlDevice")), "NVML_ERROR_GPU_IS_LOST")
        until(lambda: len(s._series["resident_bytes"]) > len(s._series["power_w"]) + 1)
    result = s.result()
    assert result["energy_j"] is None
    (line,) = result["missing"]
    assert line.startswith("NVML: the GPU is lost since ")
    assert result["series"]["resident_bytes"][-1][0] > result["series"]["power_w"][-1][0]


def test_no_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(sampler, "_STAT", tmp_path / "stat")
    result = sampled(CPU)
    assert result["series"].keys() == {"process_cpu_percent"}
    assert result["missing"] == [f"resident memory and threads of the process: this system has no {tmp_path / 'stat'}"]


def test_a_sampler_that_dies(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on and gets what was sampled before."""
    calls = []

    def breaks(self: Any) -> dict[str, float]:
        calls.append(0)
        return {"power_w": 1.0} if len(calls) < 3 else {}["gone"]

    monkeypatch.setattr(sampler.Gpu, "sample", breaks)
    with Sampler(CUDA, 0.01) as s:
        until(lambda: not s._thread.is_alive())
    result = s.result()
    assert len(result["series"]["power_w"]) == 2
    (line,) = result["missing"]
    assert line.startswith("samples after 0.")
    assert line.endswith("the sampler ended with KeyError: 'gone'")
    assert fake.started == 0


def test_a_driver_that_hangs(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(sampler, "PATIENCE_S", 0.05)
    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetPowerUsage", lambda fake, board: released.wait(10) and 1)
    with Sampler(CUDA, 0.01) as s:
        pass
    assert s.result()["missing"] == ["samples: the thread that takes them still waits for the driver"]
    released.set()
    s._thread.join(10)
    assert not s._thread.is_alive()


def test_the_run_fails() -> None:
    s = Sampler(CPU, 0.01)
    with pytest.raises(RuntimeError, match="the run"), s:
        raise RuntimeError("the run")
    assert not s._thread.is_alive()
    assert s.result()["missing"] == []


def test_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long series loses every second point, and the interval doubles."""
    monkeypatch.setattr(sampler, "MOST", 8)
    s = Sampler(CPU, 0.001)
    take = s._take

    def take_until_it_is_long(gpu: Any) -> None:
        take(gpu)
        if s.interval_s > 0.005:
            s._stop.set()

    monkeypatch.setattr(s, "_take", take_until_it_is_long)
    with s:
        until(lambda: s.interval_s > 0.005)
    result = s.result()
    assert result["interval_s"] == pytest.approx(0.008)
    for name, points in result["series"].items():
        assert 2 <= len(points) <= 8, name
    times = [t for t, _ in result["series"]["resident_bytes"]]
    assert times[-1] - times[0] > 0.02  # 9 points 1 ms apart, 4 of 2 ms, 4 of 4 ms


@pytest.mark.parametrize("interval_s", [0, -1.0, float("nan")])
def test_interval(interval_s: float) -> None:
    with pytest.raises(InputError, match=r"interval_s: .*, expected a positive number of seconds"):
        Sampler(CPU, interval_s)
