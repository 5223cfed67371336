"""The ``torch.nn`` layers and torch functions that :mod:`fastgan.reader` knows, and what it makes of each.

A function here takes what the layer or the torch function takes, and gives the class of the layer and its own fields,
a list of them where it is several, or None where nothing is done to the values; where a use is not known, it raises
:class:`Unreadable` with a predicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan.network import (
    Activation,
    Add,
    Affine,
    AveragePool,
    BatchNorm,
    Convolution,
    Dropout,
    Layer,
    Linear,
    Norm,
    Reshape,
    Shape,
    SpectralNorm,
    Upsample,
)
from fastgan.nn import Conv2dLeakyReLU, ConvTranspose2dLeakyReLU, LinearAct

One = tuple[type[Layer], dict[str, Any]]
Found = One | list[One] | None


class Unreadable(Exception):
    """Why a module is not a network of known layers, in one clause."""


def told(title: str, reader: Callable[..., Found], *args: Any, **kwargs: Any) -> Found:
    """What a function of this file gives; ``title`` is the subject of a reason against it."""
    try:
        return reader(*args, **kwargs)
    except Unreadable as e:
        raise Unreadable(f"{title} {e}") from None
    except TypeError:
        raise Unreadable(f"{title} is called with arguments that are not known") from None


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Sequence):
        return (value[0], value[-1])
    return (value, value)


def _parameter(m: nn.Module, name: str) -> nn.Parameter | None:
    value = getattr(m, name)
    if parametrize.is_parametrized(m, name) or not isinstance(value, nn.Parameter | None):
        raise Unreadable(f"has a {name} that is made of something else")
    return value


def _weight(m: nn.Module) -> dict[str, Any]:
    """Weight, bias and spectral norm.

    Both of torch's forms view the weight as a matrix M whose rows are dimension ``dim``, move u and v on in training
    mode, in place and without gradient, and divide the weight by sigma = u^T M v, whose gradient goes through M alone.
    An iteration is u = M v / |M v|, v = M^T u / |M^T u| in ``parametrizations.spectral_norm``, and v = M^T u / |M^T u|,
    u = M v / |M v| in the old hook; norms are at least ``eps``. The mode is the parametrization's own, for the hook
    the layer's.
    """
    fields: dict[str, Any] = {"bias": _parameter(m, "bias"), "spectral": None}
    hooks = list(m._forward_pre_hooks.values())
    if parametrize.is_parametrized(m, "weight"):
        made: Any = getattr(m, "parametrizations")["weight"]  # noqa: B009 - not in nn.Module's type
        if hooks or len(made) != 1 or type(made[0]) is not _SpectralNorm:
            raise Unreadable(f"has a weight that is made by {', '.join(type(p).__name__ for p in made)}")
        norm = made[0]
        iterations = norm.n_power_iterations if norm.training else 0
        fields["spectral"] = SpectralNorm(norm._u, norm._v, norm.dim, iterations, norm.eps, "u")
        return {"weight": made.original, **fields}
    if not hooks:
        return {"weight": _parameter(m, "weight"), **fields}
    hook: Any = hooks[0]
    old: Any = m
    if len(hooks) > 1 or hook.name != "weight":
        raise Unreadable("has a spectral norm of something else than its weight")
    iterations = hook.n_power_iterations if m.training else 0
    fields["spectral"] = SpectralNorm(old.weight_u, old.weight_v, hook.dim, iterations, hook.eps, "v")
    return {"weight": old.weight_orig, **fields}


def _rank(x: Tensor, *ranks: int) -> None:
    if x.ndim not in ranks:
        raise Unreadable(f"reads a tensor of {x.ndim} dimensions, expected {' or '.join(map(str, ranks))}")


def _linear(m: nn.Linear, x: Tensor) -> One:
    return Linear, _weight(m)


def _convolution(m: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> One:
    _rank(x, 4)
    if m.padding_mode != "zeros":
        raise Unreadable(f"pads with {m.padding_mode!r}")
    padding: Any = m.padding
    if isinstance(padding, str):
        both = [d * (k - 1) if padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        if any(p % 2 for p in both):
            raise Unreadable("pads one side more than the other")
        padding = tuple(p // 2 for p in both)
    fields = {"stride": m.stride, "padding": padding, "dilation": m.dilation, "groups": m.groups}
    transposed = isinstance(m, nn.ConvTranspose2d)
    return Convolution, {**_weight(m), **fields, "output_padding": m.output_padding, "transposed": transposed}


def _activation(kind: str, **fixed: float) -> Callable[..., Found]:
    return lambda input, inplace=False: (Activation, {"kind": kind, **fixed})


def _linear_act(m: LinearAct, x: Tensor) -> Found:
    if m.activation == "identity":
        return _linear(m, x)
    return [_linear(m, x), (Activation, {"kind": m.activation, "slope": m.slope})]


def _convolution_leaky_relu(m: Conv2dLeakyReLU | ConvTranspose2dLeakyReLU, x: Tensor) -> Found:
    return [_convolution(m, x), (Activation, {"kind": "leaky-relu", "slope": m.slope})]


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Found:
    return Activation, {"kind": "leaky-relu", "slope": float(negative_slope)}


def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Found:
    return Activation, {"kind": "softplus", "beta": float(beta), "threshold": float(threshold)}


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Found:
    if training and p == 1:
        raise Unreadable("drops everything")
    return (Dropout, {"p": float(p)}) if training and p else None


def _nothing(input: Tensor, *args: Any, **kwargs: Any) -> Found:
    return None


def _reshape(input: Tensor, *args: Any, **kwargs: Any) -> Found:
    return Reshape, {}


def _add(input: Tensor | float, other: Tensor | float, *, alpha: float = 1) -> Found:
    if isinstance(input, Tensor) and isinstance(other, Tensor) and input.shape == other.shape and alpha == 1:
        return Add, {}
    if any(not isinstance(t, Tensor) and t == 0 for t in (input, other)):
        return None  # sum() starts from 0
    raise Unreadable("is not a sum of two values of one shape")


def _average_pool(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> One:  # fmt: skip
    _rank(input, 4)
    kernel = _pair(kernel_size)
    return AveragePool, {
        "kernel": kernel, "stride": _pair(stride) if stride else kernel, "padding": _pair(padding),
        "ceil_mode": ceil_mode, "count_include_pad": count_include_pad, "divisor": divisor_override,
    }  # fmt: skip


def _adaptive_average_pool(input: Tensor, output_size: Any) -> Found:
    _rank(input, 4)
    sizes = [(n, out or n) for n, out in zip(input.shape[2:], _pair(output_size), strict=True)]
    if any(n % out for n, out in sizes):
        raise Unreadable(f"pools {list(input.shape[2:])} to {output_size}, in windows of different sizes")
    cls, fields = _average_pool(input, [n // out for n, out in sizes])
    return cls, {**fields, "mean": all(out == 1 for _, out in sizes)}


def _interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Found:  # fmt: skip
    _rank(input, 4)
    if mode not in ("nearest", "bilinear") or antialias:
        raise Unreadable(f"upsamples with mode {mode!r}{' and antialias' * antialias}")
    scales = (None, None) if scale_factor is None or recompute_scale_factor else _pair(scale_factor)
    return Upsample, {"mode": mode, "align_corners": bool(align_corners), "scales": scales}


def _norm(m: nn.Module, groups: int, eps: float, affine_shape: Shape) -> Found:
    weight, bias = _parameter(m, "weight"), _parameter(m, "bias")
    return Norm, {"groups": groups, "eps": eps, "weight": weight, "bias": bias, "affine_shape": affine_shape}


def _layer_norm(m: nn.LayerNorm, x: Tensor) -> Found:
    return _norm(m, x[0].numel() // math.prod(m.normalized_shape), m.eps, tuple(m.normalized_shape))


def _group_norm(m: nn.GroupNorm, x: Tensor) -> Found:
    return _norm(m, m.num_groups, m.eps, (m.num_channels, *[1] * (x.ndim - 2)))


def _instance_norm(m: nn.InstanceNorm1d | nn.InstanceNorm2d, x: Tensor) -> Found:
    _rank(x, 3 if isinstance(m, nn.InstanceNorm1d) else 4)
    if m.track_running_stats:
        raise Unreadable("has running statistics")
    return _norm(m, x.shape[1], m.eps, (x.shape[1], *[1] * (x.ndim - 2)))


def _batch_norm(m: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Found:
    _parameter(m, "weight"), _parameter(m, "bias")
    return BatchNorm, {"module": m}


def keeps_state(layer: Layer) -> bool:
    """Whether each forward pass changes the layer's buffers."""
    if isinstance(layer, BatchNorm):
        return layer.module.training and layer.module.track_running_stats
    return isinstance(layer, Affine) and layer.spectral is not None and layer.spectral.iterations > 0


MODULES: dict[type[nn.Module], Callable[[Any, Tensor], Found]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _convolution,
    LinearAct: _linear_act,
    Conv2dLeakyReLU: _convolution_leaky_relu,
    ConvTranspose2dLeakyReLU: _convolution_leaky_relu,
    nn.LeakyReLU: lambda m, x: _leaky_relu(x, m.negative_slope),
    nn.ReLU: lambda m, x: _leaky_relu(x, 0.0),
    nn.Softplus: lambda m, x: _softplus(x, m.beta, m.threshold),
    nn.Tanh: lambda m, x: (Activation, {"kind": "tanh"}),
    nn.Sigmoid: lambda m, x: (Activation, {"kind": "sigmoid"}),
    nn.SiLU: lambda m, x: (Activation, {"kind": "silu"}),
    nn.Identity: _nothing,
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
    nn.Dropout: lambda m, x: _dropout(x, m.p, m.training),
    nn.AvgPool2d: lambda m, x: _average_pool(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda m, x: _adaptive_average_pool(x, m.output_size),
    nn.Upsample: lambda m, x: _interpolate(
        x, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor
    ),
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}

FUNCTIONS: dict[Callable[..., Any], Callable[..., Found]] = {
    **dict.fromkeys([torch.relu, torch.relu_, F.relu, Tensor.relu, Tensor.relu_], _activation("leaky-relu")),
    **dict.fromkeys([torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_], _activation("tanh")),
    **dict.fromkeys([torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_], _activation("sigmoid")),
    F.silu: _activation("silu"),
    F.leaky_relu: _leaky_relu,
    F.softplus: _softplus,
    F.dropout: _dropout,
    **dict.fromkeys([torch.add, Tensor.add, Tensor.add_], _add),
    F.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _adaptive_average_pool,
    F.interpolate: _interpolate,
    **dict.fromkeys([torch.flatten, Tensor.flatten, torch.unflatten, Tensor.unflatten], _reshape),
    **dict.fromkeys([torch.reshape, Tensor.reshape, Tensor.view], _reshape),
    **dict.fromkeys([torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze], _reshape),
    **dict.fromkeys([Tensor.contiguous, Tensor.clone, Tensor.to, Tensor.float, Tensor.double], _nothing),
}

# what a forward may ask of any tensor: nothing that depends on its numbers
FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, torch.numel, Tensor.__len__, Tensor.is_contiguous),
    *(Tensor.is_floating_point, torch.is_floating_point),
}


def known(m: nn.Module) -> type[nn.Module] | None:
    """The known layer that a module is, or is derived from."""
    return next((cls for cls in type(m).__mro__ if cls in MODULES), None)


_HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__constants__", "__module__", "__doc__",
             "__annotations__", "__annotate_func__", "__static_attributes__", "__firstlineno__"}  # fmt: skip


def overridden(cls: type[nn.Module], base: type[nn.Module]) -> str | None:
    """What a class derived from a known layer has in its place, if that can matter when it is called."""
    before = cls.__mro__[: cls.__mro__.index(base)]
    names = [n for c in before for n in vars(c) if n not in _HARMLESS and (hasattr(base, n) or n in ("weight", "bias"))]
    return names[0] if names else None
