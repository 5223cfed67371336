"""How each layer runs forward, along the chain and the sweep, and what its parameters' gradients are.

For a layer ``y = f(x)`` with Jacobian J: ``transpose`` is ``J^T u``, ``tangent`` is ``J r``, ``curvature`` is the
derivative of ``<u, J r>`` to x, and ``gradients`` those of ``<v, y> + <u, J r>`` to its parameters, where v are left
operands that carry a loss. All are sums over rows of closed forms; each is derived where it stands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastgan import network as n
from fastgan import steps
from fastgan.stack import Stack

Tensor = torch.Tensor
aten = torch.ops.aten

_NARROW = 8  # columns up to which a CPU's products are several times faster the other way round: bench_steps


class Rule(ABC):
    """What a layer adds to the program of a stack."""

    def prepare(self, s: Stack, i: int, layer: Any, segment: int, rows: slice) -> None:  # noqa: B027 - few have any
        """Noise and state of one segment."""

    @abstractmethod
    def forward(self, s: Stack, i: int, layer: Any) -> None:
        """``a`` of the output, all rows."""

    @abstractmethod
    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        """``J^T u`` for the input at ``position``; ``rows`` of the left operand, J as in rows ``at``."""

    @abstractmethod
    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        """``J r``."""

    def curvature(self, s: Stack, i: int, layer: Any) -> None:  # noqa: B027 - only where a layer is curved
        """Add the derivative of ``<u, J r>``."""

    def gradients(  # noqa: B027 - only where there are parameters
        self, s: Stack, i: int, layer: Any, weights: Tensor | None, loss_rows: int
    ) -> None:
        """Gradients of the parameters."""


class LinearMap(Rule):
    """A layer without parameters that is linear: it is its own Jacobian."""

    def forward(self, s: Stack, i: int, layer: Any) -> None:
        self._apply(s, layer, s.value(layer.inputs[0]), s.value(i + 1))

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        u = s.adjoint(i + 1, rows)
        s.contribute(layer.inputs[position], rows, lambda dst: self._apply_transposed(s, layer, u, dst))

    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        self._apply(s, layer, s.tangent(layer.inputs[0]), s.tangent(i + 1))

    @abstractmethod
    def _apply(self, s: Stack, layer: Any, x: Tensor, y: Tensor) -> None:
        """``y = J x``."""

    @abstractmethod
    def _apply_transposed(self, s: Stack, layer: Any, u: Tensor, dst: Tensor) -> None:
        """``dst = J^T u``."""


# ---- affine layers


class Affine(Rule):
    """``y = x W^T + b``, and convolutions: the same with another product."""

    def prepare(self, s: Stack, i: int, layer: Any, segment: int, rows: slice) -> None:
        if layer.spectral is not None:
            Spectral.of(s, i, layer).advance(s, layer, segment)

    def forward(self, s: Stack, i: int, layer: Any) -> None:
        x, y, mixed = s.value(layer.inputs[0]), s.value(i + 1), s.mixed
        free = mixed is not None and s.root(layer.inputs[0]) == 0
        product = slice(0, mixed.rows.start) if free and mixed is not None else slice(0, s.rows)
        bias = None if layer.bias is None else s.operand(layer.bias)
        act: Any = s.network.layers[s.fused[i]] if i in s.fused else None
        if act is not None:
            s.done.add(("forward", s.fused[i], 0))

        def finish(src: Tensor | None) -> steps.Call:
            if act is not None and act.kind == "tanh":
                return steps.bias_tanh(src, y, bias)
            return steps.bias_act(src, y, bias, 1.0 if act is None else act.slope)

        more = bias is not None or act is not None
        if free or layer.spectral is not None or not more:
            self._product(s, layer, x[product], y[product])
            if free and mixed is not None:
                call = steps.mix(mixed.alpha, y[mixed.first], y[mixed.second], y[mixed.rows])
                s.program.add(call, y[mixed.first], y[mixed.second], y[mixed.rows])
            self._divide(s, i, layer, y, slice(0, s.rows))
            if more:
                s.program.add(finish(y), y, y, bias)
        else:
            self._product(s, layer, x, y, then=finish)

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        u, v = s.adjoint(i + 1, rows), layer.inputs[0]

        def emit(dst: Tensor) -> None:
            self._product_back(s, layer, u, s.a[v][at], dst)
            self._divide(s, i, layer, dst, at)

        s.contribute(v, rows, emit)

    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        r, out = s.tangent(layer.inputs[0]), s.tangent(i + 1)
        if i not in s.fused or not s.needs_tangent[s.fused[i] + 1]:
            self._product(s, layer, r, out)
            self._divide(s, i, layer, out, s.tail)
            return
        s.done.add(("sweep", s.fused[i], 0))
        mask, slope = s.a[i + 1][s.tail], s.network.layers[s.fused[i]].slope  # type: ignore[attr-defined]
        t = s.scratch(1, *out.shape) if s.overwrites else out  # the mask's own memory takes the result
        if layer.spectral is None:
            self._product(s, layer, r, t, then=lambda src: steps.mask_mul(src, out, mask, slope))
        else:
            self._product(s, layer, r, t)
            self._divide(s, i, layer, t, s.tail)
            s.program.add(steps.mask_mul(t, out, mask, slope), t, out, mask)

    def gradients(self, s: Stack, i: int, layer: Any, weights: Tensor | None, loss_rows: int) -> None:
        u, x = s.adjoint(i + 1, slice(0, s.left)), s.a[layer.inputs[0]][: s.left]
        if layer.spectral is None:
            s.gradient_to(layer.weight, lambda dst: self._weight_gradient(s, layer, u, x, dst))
        else:
            s.gradient_to(layer.weight, lambda dst: self._normalised_gradient(s, i, layer, u, x, dst))
        if layer.bias is None or layer.bias not in s.gradients:
            return
        parts = [slice(0, loss_rows)] if loss_rows else []
        depends = s.depends_on_bias(i)
        if s.split and depends and loss_rows < s.chain:
            parts.append(slice(loss_rows, s.chain))  # rows with a penalty alone, for their curvature
        if parts or depends:
            s.gradient_to(layer.bias, lambda dst: self._bias_gradient(s, u, weights, parts, dst))

    @staticmethod
    def _bias_gradient(s: Stack, u: Tensor, weights: Tensor | None, parts: list[slice], dst: Tensor) -> None:
        """``dst = sum of w u``; 0 where only kinks depend on the bias."""
        if not parts:
            s.program.add(steps.fill(dst, 0), dst)
        for k, rows in enumerate(parts):
            w = None if weights is None else weights[rows]
            out = dst if k == 0 else s.scratch(2, *dst.shape)
            s.program.add(steps.channel_sum(u[rows], w, out), u[rows], out)
            if k:
                s.program.add(partial(dst.add_, out), dst, dst, out)

    def _normalised_gradient(self, s: Stack, i: int, layer: Any, u: Tensor, x: Tensor, dst: Tensor) -> None:
        """``sum over segments of (G - <G, W/sigma> u v^T) / sigma``, G the gradient to that segment's W / sigma."""
        state, first = Spectral.of(s, i, layer), True
        g, t = s.scratch(2, *dst.shape), s.scratch(3, *dst.shape)
        blocks = [(k, rows) for k, rows in s.parts(slice(0, s.chain))]
        blocks += [(k, slice(rows.start + s.chain, rows.stop + s.chain)) for k, rows in s.parts(s.tail) if s.split]
        for k, rows in blocks:
            self._weight_gradient(s, layer, u[rows], x[rows], g)
            s.program.add(partial(state.finish, k, s.operand(layer.weight), g, t, dst, not first), g, g, t, dst)
            first = False

    def _divide(self, s: Stack, i: int, layer: Any, y: Tensor, at: slice) -> None:
        if layer.spectral is not None:
            state = Spectral.of(s, i, layer)
            for k, rows in s.parts(at):
                s.program.add(partial(y[rows].mul_, state.inverse[k]), y[rows], y[rows])

    @abstractmethod
    def _product(
        self, s: Stack, layer: Any, x: Tensor, y: Tensor, then: Callable[[Tensor | None], Any] | None = None
    ) -> None:
        """``y = x W^T``; ``then`` makes the call that takes what lies in ``y`` to its place."""

    @abstractmethod
    def _product_back(self, s: Stack, layer: Any, u: Tensor, x: Tensor, dst: Tensor) -> None:
        """``dst = u W``, of the shape of x."""

    @abstractmethod
    def _weight_gradient(self, s: Stack, layer: Any, u: Tensor, x: Tensor, dst: Tensor) -> None:
        """``dst = u^T x``."""


class LinearRule(Affine):
    """Matrix products into place."""

    def _product(
        self, s: Stack, layer: Any, x: Tensor, y: Tensor, then: Callable[[Tensor | None], Any] | None = None
    ) -> None:
        w = s.operand(layer.weight)
        kind: Any = "other" if len(w) == 1 else "product"
        s.program.add(steps.linear(x, w, y), x, w, y, kind=kind, flops=2 * x.numel() * len(w))
        if then is not None:
            s.program.add(then(y), y, y)

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        w, v = s.operand(layer.weight), layer.inputs[0]
        if len(w) != 1 or layer.spectral is not None:
            super().transpose(s, i, layer, position, rows, at)
            return
        u = s.adjoint(i + 1, rows)[:, 0]
        above = v - 1  # the layer that made the input, if any
        act: Any = s.network.layers[above] if above in s.fused.values() and len(s.consumers[v]) == 1 else None
        if act is None or act.kind != "leaky-relu":
            s.contribute(v, rows, lambda dst: s.program.add(steps.outer_mask(u, w[0], dst, None, 1.0), dst))
            return
        dst, _ = s.contribution(v, rows)
        s.done.add(("chain", above, rows.stop))
        out = s.a[v][at]
        s.program.add(steps.outer_mask(u, w[0], dst, out, act.slope), dst, out)

    def _product_back(self, s: Stack, layer: Any, u: Tensor, x: Tensor, dst: Tensor) -> None:
        w, flops = s.operand(layer.weight), 2 * u.numel() * layer.weight.shape[1]
        if w.shape[1] <= _NARROW and not s.kernels:
            t = s.scratch(4, w.shape[1], w.shape[0])
            s.program.add(partial(t.copy_, w.t()), w, t)
            w = t.t()
        s.program.add(steps.linear_back(u, w, dst), u, w, dst, kind="product", flops=flops)

    def _weight_gradient(self, s: Stack, layer: Any, u: Tensor, x: Tensor, dst: Tensor) -> None:
        flops = 2 * x.numel() * u.shape[1]
        if u.shape[1] > 1 and x.shape[1] <= _NARROW and not s.kernels:
            t = s.scratch(4, x.shape[1], u.shape[1])
            s.program.add(steps.product(x.t(), u, t), u, x, t, kind="product", flops=flops)
            s.program.add(partial(dst.copy_, t.t()), t, dst)
        else:
            kind: Any = "other" if u.shape[1] == 1 else "product"
            s.program.add(steps.weight_gradient(u, x, dst), u, x, dst, kind=kind, flops=flops)


class ConvolutionRule(Affine):
    """torch's convolutions, which return their result: it is taken to its place by what runs next."""

    @staticmethod
    def _settings(layer: n.Convolution) -> tuple[Any, ...]:
        return (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)

    @staticmethod
    def _flops(layer: n.Convolution, x: Tensor, y: Tensor) -> int:
        moved = x if layer.transposed else y  # each of its elements meets a whole filter
        return 2 * moved.numel() * layer.weight[0].numel()

    def _product(
        self, s: Stack, layer: Any, x: Tensor, y: Tensor, then: Callable[[Tensor | None], Any] | None = None
    ) -> None:
        w, settings = s.operand(layer.weight), self._settings(layer)
        finish = y.copy_ if then is None else then(None)
        s.program.add(
            lambda: finish(aten.convolution(x, w, None, *settings)), x, w, y, y, kind="convolution",
            flops=self._flops(layer, x, y),
        )  # fmt: skip

    def _product_back(self, s: Stack, layer: Any, u: Tensor, x: Tensor, dst: Tensor) -> None:
        w, settings = s.operand(layer.weight), self._settings(layer)

        def call() -> None:
            dst.copy_(aten.convolution_backward(u, x, w, None, *settings, (True, False, False))[0])

        s.program.add(call, u, w, dst, dst, kind="convolution", flops=self._flops(layer, dst, u))

    def _weight_gradient(self, s: Stack, layer: Any, u: Tensor, x: Tensor, dst: Tensor) -> None:
        w, settings = s.operand(layer.weight), self._settings(layer)

        def call() -> None:
            dst.copy_(aten.convolution_backward(u, x, w, None, *settings, (False, True, False))[1])

        s.program.add(call, u, x, dst, dst, kind="convolution", flops=self._flops(layer, x, u))


class Spectral:
    """Per segment: the singular vectors and 1 / sigma that the reference's forward call would have used."""

    def __init__(self, s: Stack, layer: Any) -> None:
        spectral, w = layer.spectral, s.operand(layer.weight)
        self.spectral = spectral
        self.view = w.movedim(spectral.dim, 0)
        self.matrix = s.new(len(spectral.u), len(spectral.v))
        count = len(s.segments)
        self.u, self.v = s.new(count, len(spectral.u)), s.new(count, len(spectral.v))
        self.inverse = s.new(count)
        self.t = s.new(len(spectral.u))

    @staticmethod
    def of(s: Stack, i: int, layer: Any) -> Spectral:
        """The state of that layer in that stack."""
        if i not in s.state:
            s.state[i] = Spectral(s, layer)
        state: Spectral = s.state[i]
        return state

    def advance(self, s: Stack, layer: Any, segment: int) -> None:
        """Power iterations and 1 / sigma, as a forward call in the reference makes them."""
        p, m = self.spectral, self.matrix
        if segment == 0:
            s.program.add(partial(m.view(self.view.shape).copy_, self.view), m, m)
        for _ in range(p.iterations):
            for vector, product, other in ((p.u, m, p.v), (p.v, m.t(), p.u))[:: 1 if p.first == "u" else -1]:
                s.program.add(partial(_normalised_product, product, other, vector, p.eps), m)
        s.program.add(partial(self._sigma, segment), m)

    def _sigma(self, k: int) -> None:
        self.u[k].copy_(self.spectral.u)
        self.v[k].copy_(self.spectral.v)
        torch.mv(self.matrix, self.v[k], out=self.t)
        torch.dot(self.u[k], self.t, out=self.inverse[k])
        self.inverse[k].reciprocal_()

    def finish(self, k: int, w: Tensor, g: Tensor, t: Tensor, dst: Tensor, add: bool) -> None:
        """``dst (+)= (g - <g, W / sigma> u v^T) / sigma``."""
        torch.mul(g, w, out=t)
        dot = t.sum() * self.inverse[k]
        outer = torch.outer(self.u[k], self.v[k]).view(self.view.shape).movedim(0, self.spectral.dim)
        torch.sub(g, outer * dot, out=g)
        g.mul_(self.inverse[k])
        if add:
            dst.add_(g)
        else:
            dst.copy_(g)


def _normalised_product(matrix: Tensor, x: Tensor, out: Tensor, eps: float) -> None:
    torch.mv(matrix, x, out=out)
    F.normalize(out, dim=0, eps=eps, out=out)


# ---- elementwise


class ActivationRule(Rule):
    """``y = phi(x)``: J is diagonal and its own transpose; the curvature is phi''(x) u r."""

    def forward(self, s: Stack, i: int, layer: Any) -> None:
        x, y = s.value(layer.inputs[0]), s.value(i + 1)
        if layer.kind == "leaky-relu" and layer.slope >= 0 and y.ndim > 1:
            call: Any = steps.bias_act(x.flatten(1), y.flatten(1), None, layer.slope)
        elif layer.kind == "leaky-relu":
            call = partial(aten.leaky_relu.out, x, layer.slope, out=y)
        elif layer.kind == "softplus":
            call = partial(aten.softplus.out, x, layer.beta, layer.threshold, out=y)
        else:
            call = steps.activate(layer.kind, x, y)
        s.program.add(call, x, y)

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        u = s.adjoint(i + 1, rows)
        if i + 1 in s.alias:
            self._times_derivative(s, i, layer, u, at, u)
        else:
            s.contribute(layer.inputs[0], rows, lambda dst: self._times_derivative(s, i, layer, u, at, dst))

    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        self._times_derivative(s, i, layer, s.tangent(layer.inputs[0]), s.tail, s.tangent(i + 1))

    def curvature(self, s: Stack, i: int, layer: Any) -> None:
        v = layer.inputs[0]
        x, y, r = s.a[v][s.tail], s.a[i + 1][s.tail], s.tangent(v)
        u = s.adjoint(i + 1, slice(s.chain, s.left))
        slope, t = s.scratch(2, *u.shape), s.scratch(3, *u.shape)
        self._times_derivative(s, i, layer, u, s.tail, slope)  # phi' u
        kind: str = layer.kind

        def curve() -> None:
            if kind == "tanh":  # phi'' = -2 y phi'
                torch.mul(y, -2, out=t)
            elif kind == "sigmoid":  # (1 - 2 y) phi'
                torch.mul(y, -2, out=t)
                t.add_(1)
            elif kind == "softplus":  # beta (1 - sigmoid(beta x)) phi', 0 where torch takes the identity
                torch.mul(x, -layer.beta, out=t)
                t.sigmoid_().mul_(layer.beta)
                t.mul_(x * layer.beta <= layer.threshold)
            else:  # silu: sigma (1 - sigma) (2 + x (1 - 2 sigma))
                sigma = torch.sigmoid(x)
                torch.mul(x, 1 - 2 * sigma, out=t)
                t.add_(2).mul_(sigma * (1 - sigma)).mul_(u)
            t.mul_(r)
            if kind != "silu":
                t.mul_(slope)

        s.program.add(curve, x, y, r, slope, t)
        dst = s.adjoint(v, s.tail)
        s.program.add(partial(dst.add_, t), dst, dst, t)

    def _times_derivative(self, s: Stack, i: int, layer: Any, u: Tensor, at: slice, dst: Tensor) -> None:
        x, y = s.a[layer.inputs[0]][at], s.a[i + 1][at]
        if layer.kind == "leaky-relu":
            call: Any = steps.mask_mul(u, dst, y if layer.slope >= 0 else x, layer.slope)
        elif layer.kind in ("tanh", "sigmoid"):
            call = steps.activate_back(layer.kind, u, y, dst)
        elif layer.kind == "silu":
            call = partial(aten.silu_backward.grad_input, u, x, grad_input=dst)
        else:
            call = partial(aten.softplus_backward.grad_input, u, x, layer.beta, layer.threshold, grad_input=dst)
        s.program.add(call, u, y, dst)


class DropoutRule(Rule):
    """``y = m x`` with a fresh mask in every update, drawn as torch draws it."""

    def prepare(self, s: Stack, i: int, layer: Any, segment: int, rows: slice) -> None:
        if i not in s.state:
            s.state[i] = s.new(s.rows, *layer.shape)
        noise = s.state[i][rows]
        s.program.add(partial(noise.bernoulli_, 1 - layer.p), noise)
        s.program.add(partial(noise.div_, 1 - layer.p), noise, noise)

    def forward(self, s: Stack, i: int, layer: Any) -> None:
        self._times(s, s.value(layer.inputs[0]), s.state[i], s.value(i + 1))

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        u = s.adjoint(i + 1, rows)
        if i + 1 in s.alias:
            self._times(s, u, s.state[i][at], u)
        else:
            s.contribute(layer.inputs[0], rows, lambda dst: self._times(s, u, s.state[i][at], dst))

    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        self._times(s, s.tangent(layer.inputs[0]), s.state[i][s.tail], s.tangent(i + 1))

    def _times(self, s: Stack, x: Tensor, mask: Tensor, y: Tensor) -> None:
        s.program.add(partial(torch.mul, x, mask, out=y), x, mask, y)


class ReshapeRule(LinearMap):
    """The same numbers: nothing to do where the memory is shared."""

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        if i + 1 not in s.alias:
            super().transpose(s, i, layer, position, rows, at)

    def _apply(self, s: Stack, layer: Any, x: Tensor, y: Tensor) -> None:
        if x.data_ptr() != y.data_ptr():
            s.program.add(partial(y.copy_, x.view(y.shape)), x, y)

    def _apply_transposed(self, s: Stack, layer: Any, u: Tensor, dst: Tensor) -> None:
        s.program.add(partial(dst.copy_, u.view(dst.shape)), u, dst)


class AddRule(Rule):
    """``y = x_0 + x_1``."""

    def forward(self, s: Stack, i: int, layer: Any) -> None:
        x, y = (s.value(v) for v in layer.inputs)
        self._add(s, x, y, s.value(i + 1))

    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        x, y = (s.tangent(v) for v in layer.inputs)
        self._add(s, x, y, s.tangent(i + 1))

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        u = s.adjoint(i + 1, rows)
        s.contribute(layer.inputs[position], rows, lambda dst: s.program.add(partial(dst.copy_, u), u, dst))

    @staticmethod
    def _add(s: Stack, x: Tensor, y: Tensor, out: Tensor) -> None:
        s.program.add(partial(torch.add, x, y, out=out), x, y, out)


# ---- fixed linear maps of images


class AveragePoolRule(LinearMap):
    """``avg_pool2d``."""

    @staticmethod
    def _settings(layer: n.AveragePool) -> tuple[Any, ...]:
        return (layer.kernel, layer.stride, layer.padding, layer.ceil_mode, layer.count_include_pad, layer.divisor)

    def _apply(self, s: Stack, layer: Any, x: Tensor, y: Tensor) -> None:
        s.program.add(partial(aten.avg_pool2d.out, x, *self._settings(layer), out=y), x, y)

    def _apply_transposed(self, s: Stack, layer: Any, u: Tensor, dst: Tensor) -> None:
        settings = self._settings(layer)  # of its input, torch's kernel reads the shape alone: dst has it too
        s.program.add(partial(aten.avg_pool2d_backward.grad_input, u, dst, *settings, grad_input=dst), u, dst)


class UpsampleRule(LinearMap):
    """Nearest and bilinear."""

    def _apply(self, s: Stack, layer: Any, x: Tensor, y: Tensor) -> None:
        size, scales = list(y.shape[2:]), layer.scales
        if layer.mode == "nearest":
            call: Any = partial(aten.upsample_nearest2d.out, x, size, *scales, out=y)
        else:
            call = partial(aten.upsample_bilinear2d.out, x, size, layer.align_corners, *scales, out=y)
        s.program.add(call, x, y)

    def _apply_transposed(self, s: Stack, layer: Any, u: Tensor, dst: Tensor) -> None:
        size, scales, shape = list(u.shape[2:]), layer.scales, list(dst.shape)
        if layer.mode == "nearest":
            call: Any = partial(aten.upsample_nearest2d_backward.grad_input, u, size, shape, *scales, grad_input=dst)
        else:
            back = aten.upsample_bilinear2d_backward.grad_input
            call = partial(back, u, size, shape, layer.align_corners, *scales, grad_input=dst)
        s.program.add(call, u, dst)


# ---- normalisation


class NormState:
    """What the forward pass of a :class:`fastgan.network.Norm` leaves: x^ and 1 / sigma of every group."""

    def __init__(self, s: Stack, layer: n.Norm) -> None:
        size = s.value(layer.inputs[0], slice(0, 1)).numel() // layer.groups
        self.groups = layer.groups
        self.x = s.new(s.rows * layer.groups, size)
        self.inverse, self.mean = s.new(s.rows * layer.groups, 1), s.new(s.rows * layer.groups, 1)
        self.dot = s.new(s.rows * layer.groups, 1)
        self.t = s.new(s.rows * layer.groups, size)
        self.tangent = s.new(s.n_tail * layer.groups, size)  # J r, before the scale

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """x^ and 1 / sigma of some rows."""
        groups = slice(rows.start * self.groups, rows.stop * self.groups)
        return self.x[groups], self.inverse[groups]

    def normalise(self, x: Tensor, eps: float) -> None:
        torch.mean(x, 1, keepdim=True, out=self.mean)
        torch.sub(x, self.mean, out=self.x)
        torch.mul(self.x, self.x, out=self.t)
        torch.mean(self.t, 1, keepdim=True, out=self.inverse)
        self.inverse.add_(eps).rsqrt_()
        self.x.mul_(self.inverse)

    def jacobian(self, v: Tensor, rows: slice, out: Tensor) -> None:
        """``J v = (v - mean(v) - x^ mean(x^ v)) / sigma``, which is its own transpose; ``out`` is not ``v``."""
        x, inverse = self.of(rows)
        mean, dot = self.mean[: len(v)], self.dot[: len(v)]
        torch.mul(v, x, out=out)
        torch.mean(out, 1, keepdim=True, out=dot)
        torch.mean(v, 1, keepdim=True, out=mean)
        torch.sub(v, mean, out=out)
        out.addcmul_(x, dot, value=-1)
        out.mul_(inverse)


class NormRule(Rule):
    """``y = gamma x^ + beta`` with ``x^ = (x - mean) / sigma`` in each group of n numbers.

    d sigma / d x = x^ / n gives the symmetric J of x^ in :class:`NormState`. With w = gamma u and means over a group,
    <w, J r> = n A / sigma, A = mean(w r) - mean(w) mean(r) - mean(x^ w) mean(x^ r), and so its derivative to x is
    ``-(A x^ / sigma + mean(x^ r) J w + mean(x^ w) J r) / sigma``.
    """

    def forward(self, s: Stack, i: int, layer: Any) -> None:
        x, y = s.value(layer.inputs[0]), s.value(i + 1)
        state = s.state[i] = NormState(s, layer)
        s.program.add(partial(state.normalise, x.view(len(state.x), -1), layer.eps), x, x, x, state.x, state.x)
        self._scale(s, layer, state.x.view(y.shape), y, shift=True)

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        u, state = s.adjoint(i + 1, rows), s.state[i]
        w = s.scratch(2, *u.shape)

        def emit(dst: Tensor) -> None:
            self._scale(s, layer, u, w)
            flat = dst.view(-1, state.x.shape[1])
            s.program.add(partial(state.jacobian, w.view(flat.shape), at, flat), u, w, flat)

        s.contribute(layer.inputs[0], rows, emit)

    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        r, out, state = s.tangent(layer.inputs[0]), s.tangent(i + 1), s.state[i]
        s.program.add(partial(state.jacobian, r.view(state.tangent.shape), s.tail, state.tangent), r, state.tangent)
        self._scale(s, layer, state.tangent.view(out.shape), out)

    def curvature(self, s: Stack, i: int, layer: Any) -> None:
        v, state = layer.inputs[0], s.state[i]
        u, r, dst = s.adjoint(i + 1, slice(s.chain, s.left)), s.tangent(v), s.adjoint(v, s.tail)
        w, t, jw = (s.scratch(slot, *u.shape) for slot in (2, 3, 4))
        self._scale(s, layer, u, w)
        shape = state.tangent.shape
        flat = [z.view(shape) for z in (w, r, t, jw, dst)]
        s.program.add(partial(self._curve, state, s.tail, *flat), u, r, w, t, jw, dst, dst)

    @staticmethod
    def _curve(state: NormState, rows: slice, w: Tensor, r: Tensor, t: Tensor, jw: Tensor, dst: Tensor) -> None:
        x, inverse = state.of(rows)

        def mean(a: Tensor, b: Tensor) -> Tensor:
            torch.mul(a, b, out=t)
            return t.mean(1, keepdim=True)

        xw, xr = mean(x, w), mean(x, r)
        a = mean(w, r) - w.mean(1, keepdim=True) * r.mean(1, keepdim=True) - xw * xr
        state.jacobian(w, rows, jw)
        torch.mul(x, a * inverse, out=t)
        t.addcmul_(jw, xr).addcmul_(state.tangent, xw).mul_(inverse)
        dst.sub_(t)

    def gradients(self, s: Stack, i: int, layer: Any, weights: Tensor | None, loss_rows: int) -> None:
        """dgamma = sum of v x^ + u J r, dbeta = sum of v."""
        state, shape = s.state[i], (-1, *layer.shape)
        v, x = s.adjoint(i + 1, slice(0, s.chain)), state.x.view(shape)[: s.chain]
        axes = _summed_axes(layer)

        def emit_weight(dst: Tensor) -> None:
            t, out = s.scratch(2, *v.shape), dst.view([d for d in layer.affine_shape if d != 1] or [])
            s.program.add(partial(torch.mul, v, x, out=t), v, x, t)
            s.program.add(partial(torch.sum, t, axes, out=out), t, out)
            if s.n_tail:
                u, r = s.adjoint(i + 1, slice(s.chain, s.left)), state.tangent.view(shape)
                t2, out2 = s.scratch(3, *u.shape), s.scratch(5, *out.shape)
                s.program.add(partial(torch.mul, u, r, out=t2), u, r, t2)
                s.program.add(partial(torch.sum, t2, axes, out=out2), t2, out2)
                s.program.add(partial(out.add_, out2), out, out2)

        def emit_bias(dst: Tensor) -> None:
            out = dst.view([d for d in layer.affine_shape if d != 1] or [])
            s.program.add(partial(torch.sum, v, axes, out=out), v, out)

        if layer.weight is not None:
            s.gradient_to(layer.weight, emit_weight)
        if layer.bias is not None and (loss_rows or s.depends_on_bias(i)):
            s.gradient_to(layer.bias, emit_bias)

    @staticmethod
    def _scale(s: Stack, layer: n.Norm, x: Tensor, out: Tensor, shift: bool = False) -> None:
        weight = None if layer.weight is None else s.operand(layer.weight).view(layer.affine_shape)
        bias = None if layer.bias is None or not shift else s.operand(layer.bias).view(layer.affine_shape)
        if weight is not None and bias is not None:
            s.program.add(partial(torch.addcmul, bias, x, weight, out=out), x, out)
        elif weight is not None:
            s.program.add(partial(torch.mul, x, weight, out=out), x, out)
        else:
            s.program.add(partial(out.copy_, x), x, out)
            if bias is not None:
                s.program.add(partial(out.add_, bias), out, out)


def _summed_axes(layer: n.Norm) -> list[int]:
    """Axes of ``[rows, *shape]`` over which a parameter of ``affine_shape`` is the same."""
    missing = len(layer.shape) - len(layer.affine_shape)
    return [0, *(1 + k for k in range(len(layer.shape)) if k < missing or layer.affine_shape[k - missing] == 1)]


class BatchNormRule(Rule):
    """torch's batch normalisation, one call per segment, as the reference makes them: no penalty goes through it."""

    def forward(self, s: Stack, i: int, layer: Any) -> None:
        m: nn.modules.batchnorm._BatchNorm = layer.module
        x, y, channels = s.value(layer.inputs[0]), s.value(i + 1), layer.shape[0]
        weight, bias = (None if p is None else s.operand(p) for p in (m.weight, m.bias))
        batch = m.training or m.running_mean is None
        saved = s.state[i] = []
        for segment in s.segments:
            mean, inverse = s.new(channels), s.new(channels)
            saved.append((mean, inverse))
            if m.training and m.num_batches_tracked is not None:
                s.program.add(partial(m.num_batches_tracked.add_, 1))
            s.program.add(
                partial(
                    aten.native_batch_norm.out, x[segment.rows], weight, bias, m.running_mean, m.running_var, batch,
                    m.momentum, m.eps, out=y[segment.rows], save_mean=mean, save_invstd=inverse,
                ),
                x[segment.rows], x[segment.rows], y[segment.rows],
            )  # fmt: skip

    def transpose(self, s: Stack, i: int, layer: Any, position: int, rows: slice, at: slice) -> None:
        s.contribute(layer.inputs[0], rows, lambda dst: self._back(s, i, layer, rows, at, dst))

    def tangent(self, s: Stack, i: int, layer: Any) -> None:
        raise RuntimeError(f"layer {layer.name!r}: plan.refusal keeps penalties away from batch norm")

    def gradients(self, s: Stack, i: int, layer: Any, weights: Tensor | None, loss_rows: int) -> None:
        trained = [p for p in layer.parameters if p in s.gradients]
        if any((i, p) not in s.state for p in trained):  # nothing below is trained: the chain ended above
            self._back(s, i, layer, slice(0, s.chain), slice(0, s.chain), None)
        for p in trained:
            s.gradient_to(p, partial(self._take, s, s.state[i, p]))

    @staticmethod
    def _take(s: Stack, sums: Tensor, dst: Tensor) -> None:
        s.program.add(partial(dst.copy_, sums), dst, sums)

    @staticmethod
    def _back(s: Stack, i: int, layer: Any, rows: slice, at: slice, dst: Tensor | None) -> None:
        """All derivatives at once, as torch's kernel gives them: to the input where ``dst`` is given, to parameters."""
        m: nn.modules.batchnorm._BatchNorm = layer.module
        u, x = s.adjoint(i + 1, rows), s.a[layer.inputs[0]][at]
        weight = None if m.weight is None else s.operand(m.weight)
        batch = m.training or m.running_mean is None
        trained = [None if p is None or p not in s.gradients else s.new(len(p)) for p in (m.weight, m.bias)]
        for p, sums in zip((m.weight, m.bias), trained, strict=True):
            if sums is not None:
                s.program.add(sums.zero_, sums)
                s.state[i, p] = sums
        mask = (dst is not None, *(t is not None for t in trained))
        for k, part in s.parts(at):
            mean, inverse = s.state[i][k]
            arguments = (u[part], x[part], weight, m.running_mean, m.running_var, mean, inverse, batch, m.eps, mask)
            to = None if dst is None else dst[part]
            s.program.add(partial(_batch_norm_back, arguments, to, trained), u[part], x[part], to)


def _batch_norm_back(arguments: tuple[Any, ...], dst: Tensor | None, trained: list[Tensor | None]) -> None:
    dx, *sums = aten.native_batch_norm_backward(*arguments)
    if dst is not None:
        dst.copy_(dx)
    for total, part in zip(trained, sums, strict=True):
        if total is not None:
            total.add_(part)


RULES: dict[type[n.Layer], Rule] = {
    n.Linear: LinearRule(),
    n.Convolution: ConvolutionRule(),
    n.Activation: ActivationRule(),
    n.Dropout: DropoutRule(),
    n.Reshape: ReshapeRule(),
    n.Add: AddRule(),
    n.AveragePool: AveragePoolRule(),
    n.Upsample: UpsampleRule(),
    n.Norm: NormRule(),
    n.BatchNorm: BatchNormRule(),
}


# ---- a whole network


def prepare(s: Stack, *names: str) -> None:
    """Noise and power iterations of the segments of those names, or of all of them, in the reference's order."""
    s.program.part = "forward"
    for k, segment in enumerate(s.segments):
        if not names or segment.name in names:
            for i, layer in enumerate(s.network.layers):
                RULES[type(layer)].prepare(s, i, layer, k, segment.rows)


def forward(s: Stack) -> None:
    """Values of all rows, with what :func:`prepare` has made ready."""
    s.program.part = "forward"
    for i, layer in enumerate(s.network.layers):
        if ("forward", i, 0) not in s.done:
            RULES[type(layer)].forward(s, i, layer)


def chain(s: Stack, rows: slice, at: slice, *, below: bool, curvature: bool = False) -> None:
    """Adjoints in some rows of the left operand, from the seeds in those of the output; derivatives as in rows ``at``.

    Args:
        s: where.
        rows: of the left operand.
        at: rows of the values.
        below: for the rows with a penalty, the last ones, go on to the network's input.
        curvature: add that of the rows with a penalty.
    """
    s.program.part = "chain"
    penalised, penalised_at = (slice(x.stop - s.n_tail, x.stop) for x in (rows, at))
    for i, layer in reversed(list(enumerate(s.network.layers))):
        rule = RULES[type(layer)]
        if ("chain", i, rows.stop) in s.done:
            continue
        for position, v in enumerate(layer.inputs):
            if s.upstream[v]:
                rule.transpose(s, i, layer, position, rows, at)
            elif below and s.n_tail:
                rule.transpose(s, i, layer, position, penalised, penalised_at)
        if curvature and layer.curved and s.upstream[layer.inputs[0]]:
            rule.curvature(s, i, layer)


def sweep(s: Stack) -> None:
    """Tangents of the rows with a penalty, from that of the input."""
    s.program.part = "sweep"
    for i, layer in enumerate(s.network.layers):
        if s.needs_tangent[i + 1] and ("sweep", i, 0) not in s.done:
            RULES[type(layer)].tangent(s, i, layer)


def gradients(s: Stack, weights: Tensor | None, loss_rows: int) -> None:
    """Gradients of the trained parameters.

    Args:
        s: where.
        weights: of the first ``loss_rows`` rows in the sums of biases; 1 where not given.
        loss_rows: rows of the left operand that carry a loss.
    """
    s.program.part = "weight gradient"
    for i, layer in enumerate(s.network.layers):
        if any(p in s.gradients for p in layer.parameters):
            RULES[type(layer)].gradients(s, i, layer, weights, loss_rows)
