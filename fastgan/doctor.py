"""What this machine has, what of fastgan works on it, and what is lost where something does not."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

import fastgan
from fastgan import machine

_PACKAGES = (
    "torch", "triton", "numpy", "pillow", "matplotlib", "nvidia-ml-py", "pyyaml", "safetensors", "tensorboardX", "tqdm",
)  # fmt: skip
_OPTIONAL = (  # package, module, what it is for, how to get it
    ("onnx", "onnx", "export of the generator to ONNX", "fastgan[onnx]"),
    ("onnxscript", "onnxscript", "export of the generator to ONNX", "fastgan[onnx]"),
    ("torch-fidelity", "torch_fidelity", "the Inception figures", "fastgan[inception]"),
)


def report() -> dict[str, Any]:
    """Look at the machine; calls the native extension and, on a GPU, compiles and runs one Triton kernel.

    Returns:
        JSON-able: ``versions``, ``cpu``, ``gpus``, ``native``, ``triton`` and ``driver`` (each
        ``{"works", "detail"}``), ``optional`` (package to version or ``None``), ``folders``, and ``lost``, one line for
        everything that is missing here. CUDA is not initialised where there is no GPU.
    """
    gpus, no_gpu = _gpus()
    native, triton, driver = _native(), _triton(bool(gpus)), _driver()
    optional = {package: _version(package) if _imports(module) else None for package, module, *_ in _OPTIONAL}
    lost = [] if gpus else [f"no GPU is used ({no_gpu}): everything runs on the CPU"]
    if not triton["works"]:
        lost.append(f"Triton kernels do not run ({triton['detail']}): their reference in PyTorch ops runs instead")
    if not native["works"]:
        lost.append(
            f"the native extension does not work ({native['detail']}): batches are gathered by numpy, noise and "
            "updates on a CPU are made in PyTorch ops alone, which is slower; with a C++17 compiler installed, "
            "install fastgan again"
        )
    if gpus and native["works"] and not driver["works"]:
        lost.append(
            f"the CUDA driver cannot be called ({driver['detail']}): graphs are replayed one by one from Python, and "
            "what they launch is not counted"
        )
    lost += [
        f"{package} is not installed: without {use}; pip install '{source}'"
        for package, _, use, source in _OPTIONAL
        if optional[package] is None
    ]
    return {
        "versions": {"fastgan": fastgan.__version__, "python": platform.python_version()}
        | {package: _version(package) for package in _PACKAGES},
        "cpu": _cpu(),
        "gpus": gpus,
        "native": native,
        "triton": triton,
        "driver": driver,
        "optional": optional,
        "folders": {
            "fastgan": str(Path(fastgan.__file__).parent),
            "runs": str(Path("runs").resolve()),
            "inception weights": str(Path(torch.hub.get_dir()) / "checkpoints"),
            "triton cache": os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache")),
        },
        "lost": lost,
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    cpu = report["cpu"]
    rows = [(name, str(version or "missing")) for name, version in report["versions"].items()]
    rows.append(("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['memory_gib']} GiB"))
    rows += [
        ("gpu", f"{g['name']}, {g['memory_gib']} GiB, compute capability {g['capability']}") for g in report["gpus"]
    ] or [("gpu", "none")]
    for part, name in (("native", "native extension"), ("triton", "triton kernels")):
        rows.append((name, f"{'work' if report[part]['works'] else 'do not run'}: {report[part]['detail']}"))
    rows.append(("cuda driver", report["driver"]["detail"]))
    rows += [(package, str(version or "missing (optional)")) for package, version in report["optional"].items()]
    rows += [(f"folder: {name}", path) for name, path in report["folders"].items()]
    width = max(len(name) for name, _ in rows) + 2
    lost = [f"- {line}" for line in report["lost"]]
    return "\n".join([f"{name:<{width}}{value}" for name, value in rows] + (["", "lost here:", *lost] if lost else []))


def _version(package: str) -> str | None:
    return str(torch.__version__) if package == "torch" else machine.version(package)  # torch's with its suffix


def _imports(module: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except Exception:  # a package that is there but broken is as good as missing
            return False
    return True


def _cpu() -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"model": machine.cpu_name(), "cores": machine.cores(), "memory_gib": round(memory / 2**30, 1)}


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """The CUDA devices; where there are none, also why."""
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is a build without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return [], str(caught[0].message).partition("\n")[0] if caught else "torch finds no CUDA device"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
        )
    return found, ""


def _native() -> dict[str, Any]:
    try:
        ext: Any = importlib.import_module("fastgan._C")
        import numpy as np

        rows, out = np.array([[1, 2], [3, 4]], np.uint8), np.full((2, 2), np.nan, np.float32)
        ext.gather(rows, np.array([1, 0]), np.array([True, False]), out, 2, 0.5, -1.0, 1)
    except ModuleNotFoundError:
        return {"works": False, "detail": "it was not built when fastgan was installed"}
    except Exception as e:  # whatever a stale or foreign build raises is the answer
        return {"works": False, "detail": _line(e)}
    if out.tolist() != [[1.0, 0.5], [-0.5, 0.0]]:
        return {"works": False, "detail": f"it gives wrong numbers: {out.tolist()}"}
    if ext.__version__ != fastgan.__version__:
        return {"works": False, "detail": f"it was built from fastgan {ext.__version__}"}
    return {"works": True, "detail": "called, right numbers"}


def _triton(gpu: bool) -> dict[str, Any]:
    try:
        from fastgan.kernels.bias_lrelu import bias_lrelu, bias_lrelu_reference

        if not gpu:
            return {"works": False, "detail": "they import, and need a GPU to run"}
        x, bias = torch.linspace(-1, 1, 1024, device="cuda").reshape(8, 128), torch.linspace(0, 1, 128, device="cuda")
        error = (bias_lrelu(x, bias, backend="triton") - bias_lrelu_reference(x, bias)).abs().max().item()
    except Exception as e:  # a missing compiler, driver or package: each its own kind
        return {"works": False, "detail": _line(e)}
    if not error < 1e-6:
        return {"works": False, "detail": f"bias_lrelu differs from its reference by {error:.1e}"}
    return {"works": True, "detail": "bias_lrelu compiled, equals its reference"}


def _driver() -> dict[str, Any]:
    from fastgan import driver

    try:
        return {"works": True, "detail": f"runs CUDA {driver.version()}"}
    except RuntimeError as e:
        return {"works": False, "detail": _line(e)}


def _line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
