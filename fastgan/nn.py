"""Layers that do in one kernel what ``torch.nn`` does in two or three, differentiable to any order.

Each is the ``torch.nn`` layer it is named after, with the same parameters under the same names, followed by an
activation: state dicts interchange, initialisation by type works, spectral norm and the like may be put on. They run on
kernels where :func:`fastgan.backend.resolve` chooses Triton, and there in PyTorch's own ops, with PyTorch's numbers to
the bit, where it does not. While a module is exported (``torch.export``, ONNX) they are PyTorch's ops on any device, so
that what is exported does not need fastgan.

Autocast and ``torch.set_float32_matmul_precision`` hold as they do for the layers of ``torch.nn``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.backend import Backend, checked, resolve
from fastgan.errors import InputError, unknown

__all__ = ["ACTIVATIONS", "Conv2dLeakyReLU", "ConvTranspose2dLeakyReLU", "LinearAct"]

ACTIVATIONS = ("leaky-relu", "tanh", "sigmoid", "identity")


def _activated(z: Tensor, activation: str, slope: float) -> Tensor:
    if activation == "leaky-relu":
        return F.relu(z) if slope == 0 else F.leaky_relu(z, slope)
    if activation == "tanh":
        return torch.tanh(z)
    return torch.sigmoid(z) if activation == "sigmoid" else z


def _plain(layer: nn.Module, backend: Backend | None, *tensors: Tensor | None) -> bool:
    """Whether a layer runs in PyTorch's ops."""
    if torch.compiler.is_exporting():
        return True
    return resolve(type(layer).__name__, backend, *tensors) == "reference"


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Tensors in the dtype that autocast gives the operands of products."""
    kind = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _precision() -> str:
    """Of fp32 products; torch.compile compiles again where the setting behind it changes."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _check(layer: nn.Module, activation: str, slope: float, backend: Backend | None) -> None:
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if not 0 <= slope < math.inf:
        raise InputError(f"{type(layer).__name__}: slope is {slope}, expected a finite slope >= 0")
    if backend is not None:
        checked(backend, type(layer).__name__)


class LinearAct(nn.Linear):
    """``activation(x W^T + b)`` by :func:`fastgan.kernels.linear_lrelu.linear_lrelu`.

    Args:
        in_features, out_features, bias, device, dtype: as for ``torch.nn.Linear``.
        activation: ``"leaky-relu"``, ``"tanh"``, ``"sigmoid"`` or ``"identity"``.
        slope: of LeakyReLU, ``>= 0``; 0 is ReLU.
        backend: see :func:`fastgan.backend.resolve`.

    Raises:
        InputError: an activation, slope or backend is none of these.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "leaky-relu",
        slope: float = 0.2,
        backend: Backend | None = None,
    ) -> None:
        _check(self, activation, slope, backend)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation, self.slope, self.backend = activation, float(slope), backend

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        weight, bias = self.weight, self.bias
        if _plain(self, self.backend, input, weight, bias):
            return _activated(F.linear(input, weight, bias), self.activation, self.slope)
        from fastgan.kernels.linear_lrelu import linear_lrelu  # needs Triton

        input, weight, bias = _autocast(input, weight, bias)
        how: Any = {"activation": self.activation, "slope": self.slope, "precision": _precision()}
        return linear_lrelu(input, weight, bias, backend="triton", **how)

    def extra_repr(self) -> str:
        slope = f"({self.slope:g})" if self.activation == "leaky-relu" else ""
        return f"{super().extra_repr()}, activation={self.activation}{slope}"


def _biased(layer: nn.Conv2d | nn.ConvTranspose2d, y: Tensor, slope: float) -> Tensor:
    """The bias and the activation behind a convolution, in one pass."""
    from fastgan.kernels.bias_lrelu import bias_lrelu  # needs Triton

    assert layer.bias is not None  # checked where this is called
    return bias_lrelu(y, layer.bias.to(y.dtype).contiguous(), slope=slope, channel_dim=-3, backend="triton")


class Conv2dLeakyReLU(nn.Conv2d):
    """``leaky_relu(conv2d(x) + b)``: PyTorch's convolution, then :func:`fastgan.kernels.bias_lrelu.bias_lrelu`.

    Args:
        args, kwargs: of ``torch.nn.Conv2d``.
        slope: ``>= 0``; 0 is ReLU.
        backend: see :func:`fastgan.backend.resolve`.

    Raises:
        InputError: a slope or backend is none of these.
    """

    def __init__(self, *args: Any, slope: float = 0.2, backend: Backend | None = None, **kwargs: Any) -> None:
        _check(self, "leaky-relu", slope, backend)
        super().__init__(*args, **kwargs)
        self.slope, self.backend = float(slope), backend

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C_in, H, W] -> [B, C_out, H', W']``, or both without ``B``; channels-last stays channels-last."""
        if self.bias is None or _plain(self, self.backend, input, self.weight, self.bias):
            return _activated(super().forward(input), "leaky-relu", self.slope)
        return _biased(self, self._conv_forward(input, self.weight, None), self.slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope:g}"  # type: ignore[no-untyped-call]


class ConvTranspose2dLeakyReLU(nn.ConvTranspose2d):
    """``leaky_relu(conv_transpose2d(x) + b)``; arguments and errors as for :class:`Conv2dLeakyReLU`."""

    def __init__(self, *args: Any, slope: float = 0.2, backend: Backend | None = None, **kwargs: Any) -> None:
        _check(self, "leaky-relu", slope, backend)
        super().__init__(*args, **kwargs)
        self.slope, self.backend = float(slope), backend

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``[B, C_in, H, W] -> [B, C_out, H', W']``, or both without ``B``; in PyTorch's ops with ``output_size``."""
        plain = output_size is not None or self.bias is None or self.padding_mode != "zeros"
        if plain or _plain(self, self.backend, input, self.weight, self.bias):
            return _activated(super().forward(input, output_size), "leaky-relu", self.slope)
        rest: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return _biased(self, F.conv_transpose2d(input, self.weight, None, *rest), self.slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope:g}"  # type: ignore[no-untyped-call]
