"""The report is JSON, says what works, and names every loss in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastgan
from fastgan import doctor


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpus", lambda: ([], "none here"))


def test_report_is_json_and_text() -> None:
    report = doctor.report()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["fastgan"] == fastgan.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert all(report["versions"].values())
    assert report["cpu"]["cores"] >= 1
    assert 0.1 < report["cpu"]["memory_gib"] < 1e5
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["triton"]["works"] == torch.cuda.is_available()
    assert report["driver"]["works"] or not torch.cuda.is_available()
    assert all("\n" not in line for line in report["lost"])
    text = doctor.render(report)
    for line in (torch.__version__, report["cpu"]["model"], report["driver"]["detail"], *report["lost"]):
        assert line in text


def test_each_loss_is_named(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fastgan._C", "onnx", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, module, None)
    report = doctor.report()
    assert not report["native"]["works"]
    assert report["optional"]["onnx"] is None
    for start in (
        "no GPU is used (none here)",
        "Triton kernels do not run",
        "the native extension does not work (it was not built",
        "onnx is not installed",
        "torch-fidelity is not installed",
    ):
        assert sum(line.startswith(start) for line in report["lost"]) == 1


@pytest.mark.parametrize(
    ("gather", "version", "detail"),
    [
        (lambda *a: None, fastgan.__version__, "wrong numbers"),
        (lambda *a: a[3].__setitem__(..., [[1.0, 0.5], [-0.5, 0.0]]), "0.0.1", "built from fastgan 0.0.1"),
        (lambda: None, fastgan.__version__, "takes 0 positional arguments"),
    ],
)
def test_a_native_extension_that_lies_is_found_out(
    monkeypatch: pytest.MonkeyPatch, gather: object, version: str, detail: str
) -> None:
    monkeypatch.setitem(sys.modules, "fastgan._C", SimpleNamespace(gather=gather, __version__=version))
    native = doctor.report()["native"]
    assert not native["works"]
    assert detail in native["detail"]


def test_a_driver_that_cannot_be_called_is_a_loss_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> str:
        raise RuntimeError("no CUDA driver: libcuda.so.1 is nowhere\nat all")

    monkeypatch.setattr("fastgan.driver.version", version)
    monkeypatch.setattr(doctor, "_native", lambda: {"works": True, "detail": ""})
    monkeypatch.setattr(doctor, "_triton", lambda gpu: {"works": True, "detail": ""})
    start = "the CUDA driver cannot be called (no CUDA driver: libcuda.so.1 is nowhere):"
    for gpus in ([], [{"name": "a", "memory_gib": 1.0, "capability": "9.0"}]):
        monkeypatch.setattr(doctor, "_gpus", lambda gpus=gpus: (gpus, "none"))
        assert sum(line.startswith(start) for line in doctor.report()["lost"]) == len(gpus)


def test_cuda_stays_uninitialised() -> None:
    code = "import torch; from fastgan.doctor import report; report(); print(torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(torch.cuda.is_available())
