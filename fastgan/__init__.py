"""fastgan: a GAN training engine built from fused kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgan import losses, nn, penalties
    from fastgan._native import native_available
    from fastgan.backend import use_backend
    from fastgan.data import open_dataset
    from fastgan.ema import EMA
    from fastgan.engine import Engine
    from fastgan.errors import InputError
    from fastgan.fusion import fuse
    from fastgan.optim import Adam, AdamW, Schedule
    from fastgan.profiling import profile
    from fastgan.trainer import Trainer

__version__ = "0.1.0"

_HOME = {
    "EMA": "ema",
    "Adam": "optim",
    "AdamW": "optim",
    "Engine": "engine",
    "InputError": "errors",
    "Schedule": "optim",
    "Trainer": "trainer",
    "fuse": "fusion",
    "native_available": "_native",
    "open_dataset": "data",
    "profile": "profiling",
    "use_backend": "backend",
}

__all__ = [
    "EMA",
    "Adam",
    "AdamW",
    "Engine",
    "InputError",
    "Schedule",
    "Trainer",
    "__version__",
    "fuse",
    "losses",
    "native_available",
    "nn",
    "open_dataset",
    "penalties",
    "profile",
    "use_backend",
]


def __getattr__(name: str) -> object:
    """Import on first use: the command line answers ``--help`` without loading torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f"fastgan.{_HOME[name]}"), name)
    if name in ("losses", "nn", "penalties"):
        return importlib.import_module(f"fastgan.{name}")
    raise AttributeError(f"module 'fastgan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
