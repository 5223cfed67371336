"""What runs between the matrix products of a plan: each function makes a call that does one pass over static tensors.

A call takes no arguments and changes only the tensors it was made for, so that a list of them can be recorded once and
replayed. Natively on a CPU (float32 and float64, contiguous) where the extension was built, else in torch ops with the
same numbers to rounding. ``src`` may be ``None`` where it comes from an op that cannot write to a given place: the call
then takes it.

LeakyReLU's derivative is read off the sign of its output, which is that of its input where ``slope`` is at least 0.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec

import torch

from fastgan import _native
from fastgan.losses import softplus

Call = Callable[..., object]
Tensor = torch.Tensor
_P = ParamSpec("_P")


@dataclass(eq=False)
class Step:
    """A call, and what it was made of: :mod:`fastgan.lowering` reads that to put kernels in the place of several.

    Attributes:
        name: of the function that made it.
        arguments: of that function, by name.
        call: takes nothing, or ``src``.
    """

    name: str
    arguments: Mapping[str, Any]
    call: Call

    def __call__(self, *src: Tensor) -> None:
        self.call(*src)


def _step(make: Callable[_P, Call]) -> Callable[_P, Step]:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Step:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Step(make.__name__, bound.arguments, make(*args, **kwargs))

    return wrapped


_SMALLEST = 32  # side of a matrix below which torch's products are as fast: bench_steps
_LOSSES = ("minimax", "non-saturating", "wasserstein", "hinge", "least-squares", "relativistic")  # order of csrc


def _native_function(name: str, *tensors: Tensor | None) -> Any:
    """The native function for these tensors, or ``None``."""
    dtypes = {t.dtype for t in tensors if t is not None}
    fits = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors if t is not None)
    if _native.ext is None or not fits or len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        return None
    return partial(getattr(_native.ext, name), dtypes == {torch.float64})


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _call(
    native: Any, reference: Call, src: Tensor | None, native_rest: tuple[Any, ...], rest: tuple[Any, ...]
) -> Call:  # fmt: skip
    """The call with ``src`` bound, or one that takes it."""
    if native is None:
        return partial(reference, *rest) if src is None else partial(reference, *rest, src)
    if src is not None:
        return partial(native, src.data_ptr(), *native_rest)

    def call(src: Tensor) -> None:
        src = src.contiguous()  # held until the native code is done with it
        native(src.data_ptr(), *native_rest)

    return call


def _leaky_relu(dst: Tensor, slope: float) -> None:
    if slope == 0:
        torch.clamp(dst, min=0, out=dst)
    elif slope != 1:
        torch.ops.aten.leaky_relu.out(dst, slope, out=dst)


def _mask(dst: Tensor, out: Tensor, slope: float) -> None:
    """``dst *= leaky_relu'``."""
    if slope == 0:
        torch.ops.aten.threshold_backward.grad_input(dst, out, 0, grad_input=dst)
    elif slope != 1:
        torch.ops.aten.leaky_relu_backward.grad_input(dst, out, slope, False, grad_input=dst)


def product(a: Tensor, b: Tensor, out: Tensor) -> Call:
    """``out = a b`` of matrices ``[m, k]`` and ``[k, n]``, each contiguous or the transpose of one that is.

    Natively in float32 where that is faster than the library which torch calls (see csrc/product.hpp).
    """
    (m, k), n = a.shape, b.shape[1]
    ext, operands = _native.ext, (a, b)
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and 1 in t.stride() for t in (*operands, out))
    if ext is None or not fits or min(m, n, k) < _SMALLEST or not out.is_contiguous() or not ext.has_matrix_product():
        return partial(torch.mm, a, b, out=out)
    transposed = [t.stride(1) != 1 for t in operands]
    lines = [t.stride(1) if across else t.stride(0) for t, across in zip(operands, transposed, strict=True)]
    return partial(ext.matrix_product, _at(a), lines[0], transposed[0], _at(b), lines[1], transposed[1], _at(out), m, n,
                   k, torch.get_num_threads())  # fmt: skip


@_step
def linear(x: Tensor, weight: Tensor, y: Tensor) -> Call:
    """``y = x W^T``; x ``[rows, in]``, W ``[out, in]``, y ``[rows, out]``."""
    if len(weight) == 1:
        return partial(torch.mv, x, weight[0], out=y[:, 0])
    return product(x, weight.t(), y)


@_step
def linear_back(u: Tensor, weight: Tensor, dst: Tensor) -> Call:
    """``dst = u W``; u ``[rows, out]``, dst ``[rows, in]``."""
    return product(u, weight, dst)


@_step
def weight_gradient(u: Tensor, x: Tensor, dst: Tensor) -> Call:
    """``dst = u^T x``; u ``[rows, out]``, x ``[rows, in]``, dst ``[out, in]``, which may be of higher precision."""
    if dst.dtype != u.dtype:
        return lambda: dst.copy_(u.t() @ x)
    if u.shape[1] == 1:
        return partial(torch.mv, x.t(), u[:, 0], out=dst[0])
    return product(u.t(), x, dst)


@_step
def fill(dst: Tensor, value: float) -> Call:
    """``dst = value``."""
    return partial(dst.fill_, value)


@_step
def copy(src: Tensor, dst: Tensor) -> Call:
    """``dst = src``, cast where their types differ."""
    return partial(dst.copy_, src)


@_step
def total(values: Tensor, dst: Tensor) -> Call:
    """``dst = sum of values``; values ``[n]``, dst 0-dim."""
    return partial(torch.sum, values, 0, out=dst)


@_step
def activate(kind: str, x: Tensor, y: Tensor) -> Call:
    """``y = phi(x)`` for tanh, sigmoid and silu."""
    functions: dict[str, Any] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": torch.ops.aten.silu.out}
    return partial(functions[kind], x, out=y)


@_step
def activate_back(kind: str, u: Tensor, y: Tensor, dst: Tensor) -> Call:
    """``dst = u phi'``, read off the output y of tanh and sigmoid."""
    aten = torch.ops.aten
    functions = {"tanh": aten.tanh_backward.grad_input, "sigmoid": aten.sigmoid_backward.grad_input}
    return partial(functions[kind], u, y, grad_input=dst)


@_step
def bias_act(src: Tensor | None, dst: Tensor, bias: Tensor | None, slope: float) -> Call:
    """``dst = leaky_relu(src + bias)`` with the bias along dimension 1, ``[rows, C, ...]``; slope 1 is the identity."""
    rows, channels, inner = dst.shape[0], dst.shape[1], math.prod(dst.shape[2:])
    native = _native_function("bias_act", src, dst, bias)
    shape = (_at(dst), _at(bias), rows, channels, inner, slope, torch.get_num_threads())
    return _call(native, _bias_act, src, shape, (dst, bias, slope))


def _bias_act(dst: Tensor, bias: Tensor | None, slope: float, src: Tensor) -> None:
    if bias is not None:
        torch.add(src, bias.view(-1, *[1] * (dst.ndim - 2)), out=dst)
    elif src.data_ptr() != dst.data_ptr():
        dst.copy_(src)
    _leaky_relu(dst, slope)


@_step
def bias_tanh(src: Tensor | None, dst: Tensor, bias: Tensor | None) -> Call:
    """``dst = tanh(src + bias)`` with the bias along dimension 1, ``[rows, C, ...]``."""
    rows, channels, inner = dst.shape[0], dst.shape[1], math.prod(dst.shape[2:])
    native = _native_function("bias_tanh", src, dst, bias)
    shape = (_at(dst), _at(bias), rows, channels, inner, torch.get_num_threads())
    return _call(native, _bias_tanh, src, shape, (dst, bias))


def _bias_tanh(dst: Tensor, bias: Tensor | None, src: Tensor) -> None:
    if bias is not None:
        src = torch.add(src, bias.view(-1, *[1] * (dst.ndim - 2)), out=dst)
    torch.tanh(src, out=dst)


@_step
def mask_mul(src: Tensor | None, dst: Tensor, out: Tensor, slope: float) -> Call:
    """``dst = src * leaky_relu'(z)`` of equal shapes, with ``out = leaky_relu(z)``, which may be ``dst`` itself.

    With a negative slope ``out`` has to be ``z``.
    """
    native = _native_function("mask_mul", src, dst, out)
    rest = (_at(dst), _at(out), dst.numel(), slope, torch.get_num_threads())
    return _call(native, _mask_mul, src, rest, (dst, out, slope))


def _mask_mul(dst: Tensor, out: Tensor, slope: float, src: Tensor) -> None:
    if slope == 0:
        torch.ops.aten.threshold_backward.grad_input(src, out, 0, grad_input=dst)
    else:
        torch.ops.aten.leaky_relu_backward.grad_input(src, out, slope, False, grad_input=dst)


@_step
def outer_mask(seed: Tensor, weight: Tensor, dst: Tensor, out: Tensor | None, slope: float) -> Call:
    """``dst[i, j] = seed[i] weight[j] leaky_relu'(z[i, j])``; no mask where ``out`` is ``None``."""
    native = _native_function("outer_mask", seed, weight, dst, out) if out is not None else None
    if native is None:
        return partial(_outer_mask, seed, weight, dst, out, slope)
    threads = torch.get_num_threads()
    return partial(native, _at(seed), _at(weight), _at(out), _at(dst), len(dst), dst.shape[1], slope, threads)


def _outer_mask(seed: Tensor, weight: Tensor, dst: Tensor, out: Tensor | None, slope: float) -> None:
    torch.mul(seed.unsqueeze(1), weight, out=dst)
    if out is not None:
        _mask(dst, out, slope)


@_step
def mix(alpha: Tensor, a: Tensor, b: Tensor, dst: Tensor) -> Call:
    """``dst[i] = alpha[i] a[i] + (1 - alpha[i]) b[i]``; alpha ``[rows]``."""
    native = _native_function("mix", alpha, a, b, dst)
    if native is None:
        return partial(_mix, alpha.view(-1, *[1] * (a.ndim - 1)), a, b, dst)
    return partial(
        native, _at(alpha), _at(a), _at(b), _at(dst), len(a), math.prod(a.shape[1:]), torch.get_num_threads()
    )


def _mix(alpha: Tensor, a: Tensor, b: Tensor, dst: Tensor) -> None:
    torch.mul(b, 1 - alpha, out=dst)
    dst.addcmul_(a, alpha.to(a.dtype))


@_step
def scale_add(scale: Tensor, a: Tensor, r: Tensor) -> Call:
    """``a[i] = scale[i] a[i] + r[i]``; scale ``[rows]``."""
    native = _native_function("scale_add", scale, a, r)
    if native is None:
        return partial(_scale_add, scale.view(-1, *[1] * (a.ndim - 1)), a, r)
    return partial(native, _at(scale), _at(a), _at(r), len(a), math.prod(a.shape[1:]), torch.get_num_threads())


def _scale_add(scale: Tensor, a: Tensor, r: Tensor) -> None:
    a.mul_(scale).add_(r)


@_step
def channel_sum(src: Tensor, weight: Tensor | None, dst: Tensor) -> Call:
    """``dst[c] = sum of weight[row] src[row, c, ...]``; weight ``[rows]``, dst ``[C]``.

    The halves of the rows are summed apart: where they are real and fake samples whose terms cancel (the last bias
    under the Wasserstein loss), they cancel exactly, as they do where each has a loss term of its own.
    """
    rows, channels, inner = src.shape[0], src.shape[1], math.prod(src.shape[2:])
    native = _native_function("channel_sum", src, weight, dst)
    if native is None:
        return partial(_channel_sum, src, weight, dst)
    return partial(native, _at(src), _at(weight), _at(dst), rows, channels, inner, torch.get_num_threads())


def _channel_sum(src: Tensor, weight: Tensor | None, dst: Tensor) -> None:
    if weight is not None:
        src = src * weight.view(-1, *[1] * (src.ndim - 1))
    axes, half = [0, *range(2, src.ndim)], (len(src) + 1) // 2
    torch.add(src[:half].sum(axes, dtype=dst.dtype), src[half:].sum(axes, dtype=dst.dtype), out=dst)


@_step
def penalty(
    g: Tensor, dst: Tensor, value: Tensor, *, norm: bool, weight: float, target: float, scale: float, add: bool,
    loss_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    """A penalty's mean value and ``scale`` times the derivative of that mean to ``g``.

    ``weight (|g| - target)^2`` per row with ``norm``, else ``weight |g|^2``; ``add`` to what ``dst`` holds. Computed in
    the type of ``value``; ``loss_scale`` (0-dim) multiplies the derivative.
    """
    rows, columns = len(g), math.prod(g.shape[1:])
    rows_value = torch.empty(rows, dtype=value.dtype, device=g.device)
    native = _native_function("penalty", g, dst, value) if loss_scale is None else None
    if native is None:
        return partial(
            _penalty, g.flatten(1), dst.flatten(1), value, rows_value, norm, weight, target, scale, add, loss_scale
        )
    call = partial(native, _at(g), _at(dst), _at(value), _at(rows_value), rows, columns, norm, weight, target,
                   scale / rows, add, torch.get_num_threads())  # fmt: skip
    call.keep = rows_value  # type: ignore[attr-defined]
    return call


def _penalty(
    g: Tensor, dst: Tensor, value: Tensor, rows_value: Tensor, norm: bool, weight: float, target: float, scale: float,
    add: bool, loss_scale: Tensor | None,
) -> None:  # fmt: skip
    g = g.to(value.dtype)
    squared = g.square().sum(1)
    factor: Tensor | float = 2 * weight * scale / len(g)
    if norm:
        length = (squared + torch.finfo(g.dtype).tiny).sqrt()
        torch.mul((length - target).square(), weight, out=rows_value)
        r = g * (factor * (length - target) / length).unsqueeze(1)
    else:
        torch.mul(squared, weight, out=rows_value)
        r = g * factor
    if loss_scale is not None:
        r = r * loss_scale
    dst.copy_(dst + r if add else r)
    value.copy_(rows_value.mean())


@_step
def discriminator_loss(
    kind: str, real: Tensor, fake: Tensor, real_scale: Tensor, fake_scale: Tensor, loss: Tensor, real_mean: Tensor,
    fake_mean: Tensor, loss_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    """The loss of real and fake logits ``[n]``: derivatives of its mean to both, its mean, the mean logits (0-dim).

    ``loss_scale`` (0-dim) multiplies the derivatives.
    """
    tensors = (real, fake, real_scale, fake_scale, loss, real_mean, fake_mean)
    native = _native_function("discriminator_loss", *tensors) if loss_scale is None else None
    if native is None:
        return partial(_discriminator_loss, kind, *tensors, loss_scale)
    return partial(native, _LOSSES.index(kind), *map(_at, tensors), len(real))


def _discriminator_loss(
    kind: str, r: Tensor, f: Tensor, real_scale: Tensor, fake_scale: Tensor, loss: Tensor, real_mean: Tensor,
    fake_mean: Tensor, loss_scale: Tensor | None,
) -> None:  # fmt: skip
    relu, sigmoid = torch.relu, torch.sigmoid
    if kind in ("minimax", "non-saturating"):
        value, dr, df = softplus(-r) + softplus(f), -sigmoid(-r), sigmoid(f)
    elif kind == "wasserstein":
        value, dr, df = f - r, -torch.ones_like(r), torch.ones_like(f)
    elif kind == "hinge":
        value, dr, df = relu(1 - r) + relu(1 + f), -(r < 1).to(r.dtype), (f > -1).to(f.dtype)
    elif kind == "least-squares":
        value, dr, df = ((r - 1).square() + f.square()) / 2, r - 1, f
    else:
        value, df = softplus(f - r), sigmoid(f - r)
        dr = -df
    real_scale.copy_(_scaled(dr, loss_scale) / len(r))
    fake_scale.copy_(_scaled(df, loss_scale) / len(f))
    loss.copy_(value.mean())
    real_mean.copy_(r.mean())
    fake_mean.copy_(f.mean())


@_step
def generator_loss(
    kind: str, fake: Tensor, real: Tensor | None, fake_scale: Tensor, loss: Tensor, loss_scale: Tensor | None = None
) -> Call:
    """The loss of fake logits ``[n]`` (against real ones where it compares): the derivative of its mean, its mean.

    ``loss_scale`` (0-dim) multiplies the derivative.
    """
    native = _native_function("generator_loss", fake, real, fake_scale, loss) if loss_scale is None else None
    if native is None:
        return partial(_generator_loss, kind, fake, real, fake_scale, loss, loss_scale)
    return partial(native, _LOSSES.index(kind), _at(fake), _at(real), _at(fake_scale), _at(loss), len(fake))


def _scaled(derivative: Tensor, loss_scale: Tensor | None) -> Tensor:
    return derivative if loss_scale is None else derivative * loss_scale


def _generator_loss(
    kind: str, f: Tensor, r: Tensor | None, fake_scale: Tensor, loss: Tensor, loss_scale: Tensor | None
) -> None:
    sigmoid = torch.sigmoid
    if kind == "minimax":
        value, df = -softplus(f), -sigmoid(f)
    elif kind == "non-saturating":
        value, df = softplus(-f), -sigmoid(-f)
    elif kind in ("wasserstein", "hinge"):
        value, df = -f, -torch.ones_like(f)
    elif kind == "least-squares":
        value, df = (f - 1).square() / 2, f - 1
    else:
        assert r is not None
        value, df = softplus(r - f), -sigmoid(r - f)
    fake_scale.copy_(_scaled(df, loss_scale) / len(f))
    loss.copy_(value.mean())
