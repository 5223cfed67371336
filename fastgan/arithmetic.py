"""In which precision products run, and where penalties differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Arithmetic:
    """Contexts for one precision: ``fp64``, ``fp32``, ``tf32``, ``bf16`` or ``fp16``.

    Attributes:
        precision: its name.
        device: on which it runs.
        settable: whether torch's fp32 products may be set: torch refuses once its newer setting has been used.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.precision, self.device = precision, device
        try:
            torch.get_float32_matmul_precision()
            self.settable = True
        except RuntimeError:
            self.settable = False

    @property
    def is_full(self) -> bool:
        """Whether everything runs in the parameters' own precision."""
        return self.precision in ("fp32", "fp64")

    def dtype(self, parameters: torch.dtype) -> torch.dtype:
        """Of the products outside penalties, for parameters of a dtype."""
        return _REDUCED.get(self.precision, parameters)

    def is_set(self, kind: str) -> bool:
        """Whether :meth:`matmul` has nothing to do."""
        on_gpu = self.device.type == "cuda"  # where cuDNN has a setting of its own
        return not self.settable or (not on_gpu and torch.get_float32_matmul_precision() == kind)

    @contextlib.contextmanager
    def matmul(self, kind: str) -> Iterator[None]:
        """fp32 products with TF32 (``high``) or without (``highest``)."""
        if self.is_set(kind):
            yield
            return
        cudnn: Any = torch.backends.cudnn  # whose flags() would turn it off
        before, allowed = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        torch.set_float32_matmul_precision(kind)
        cudnn.allow_tf32 = kind == "high"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
            cudnn.allow_tf32 = allowed

    @contextlib.contextmanager
    def reduced(self) -> Iterator[None]:
        """The precision of everything but penalties."""
        dtype = _REDUCED.get(self.precision)
        cast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with self.matmul("high" if self.precision == "tf32" else "highest"), cast:
            yield

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """The precision of penalties: that of the parameters."""
        with self.matmul("highest"), torch.autocast(self.device.type, enabled=False):
            yield
