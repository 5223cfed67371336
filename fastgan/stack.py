"""One network over one stack of rows: static buffers, and the calls that run through them.

The rows of all samples of an update are one stack. With values ``a_v``, the adjoints ``u_v`` of the summed logits and
the tangents ``r_v`` in the penalty's direction, the calls are those of the closed-form update:

    forward     a_v                                      all rows
    chain       u_v = (d logit / d a_v), from above      rows that are differentiated
    sweep       r_v = (d a_v / d x) r_0, from below      rows with a penalty: the last ones
    gradients   dW = u^T [c a; r]                        one product per layer over the whole stack

A stack is *joined* where each layer is piecewise linear (and rows with loss and penalty have one logit): the chain
of a row with a loss alone starts from c, the loss's derivative, that of a row with a penalty from 1, and the right
operand of ``dW`` is ``a``, ``r`` or ``c a + r``. It is *split* otherwise: further rows at the end of the stack hold the
penalty's ``u`` and ``r``, and a second chain over all rows starts from c and takes up the layers' curvature, so that
its left operands are c u + e and ``dW = [c u + e; u]^T [a; r]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from fastgan import steps
from fastgan.network import Activation, Affine, AveragePool, Dropout, Layer, Network, Reshape
from fastgan.steps import Call, Step

Tensor = torch.Tensor
Kind = Literal["product", "convolution", "other"]

_VECTOR = 16  # elements


@dataclass
class Program:
    """A static list of calls, with what each of them costs.

    Attributes:
        calls: run in order; they take nothing and always work on the same tensors.
        kinds: of each call.
        steps: what each call was made of, where that is known.
        costs: FLOPs of each call, and the bytes it reads and writes.
        parts: what of an update each call belongs to: ``forward``, ``loss``, ``chain``, ``penalty``, ``sweep``,
            ``weight gradient`` or ``copy``.
        part: of the calls that are added next.
        scratch: addresses of memory that holds nothing from one call to the next but one.
    """

    calls: list[Call] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    steps: list[Step | None] = field(default_factory=list)
    costs: list[tuple[int, int]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    part: str = "copy"
    scratch: set[int] = field(default_factory=set)

    @property
    def flops(self) -> int:
        """Of all calls together."""
        return sum(flops for flops, _ in self.costs)

    @property
    def bytes(self) -> int:
        """Of all calls together, as read and written by each."""
        return sum(n for _, n in self.costs)

    def add(self, call: Call, *touched: Tensor | None, kind: Kind = "other", flops: int = 0) -> None:
        """Append a call that reads or writes the ``touched`` tensors."""
        self.calls.append(call.call if isinstance(call, Step) else call)
        self.kinds.append(kind)
        self.steps.append(call if isinstance(call, Step) else None)
        self.costs.append((flops, sum(t.nbytes for t in touched if t is not None)))
        self.parts.append(self.part)

    def extend(self, other: Program) -> None:
        """Append the calls of another one."""
        self.calls += other.calls
        self.kinds += other.kinds
        self.steps += other.steps
        self.costs += other.costs
        self.parts += other.parts
        self.scratch |= other.scratch

    def prepend(self, calls: Sequence[Call]) -> None:
        """Put calls before the others: copies."""
        self.calls[:0] = calls
        self.kinds[:0] = ["other"] * len(calls)
        self.steps[:0] = [None] * len(calls)
        self.costs[:0] = [(0, 0)] * len(calls)
        self.parts[:0] = ["copy"] * len(calls)

    def run(self) -> None:
        """Make every call."""
        for call in self.calls:
            call()


@dataclass(frozen=True)
class Segment:
    """Rows that the reference passes through the network in a call of their own."""

    name: str
    rows: slice


@dataclass(frozen=True)
class Interpolation:
    """Rows that are mixed of two others, ``alpha`` times the first."""

    alpha: Tensor
    first: slice
    second: slice
    rows: slice


class Stack:
    """Buffers of a network for a fixed number of rows.

    Args:
        program: takes the calls.
        network: what to run.
        segments: in the order in which the reference passes them through the network; together all rows.
        chain: number of rows, from the first on, that are differentiated.
        tail: of those, how many have a penalty, the last ones.
        shared: of those, how many have a loss too, the first ones.
        split: see above.
        dtype, device: of the buffers.
        operand: a parameter's tensor in ``dtype``.
        gradients: where the gradient of each trained parameter goes; nothing is trained where empty.
        input_gradient: whether the chain goes on to the network's input in all its rows.
        input, output, output_adjoint: the buffers of the network's input and output, where they are given.
        before: further rows of memory just before those of the input.
        spread: whether rows of a vector input begin at whole vectors of memory, which kernels read at once.
        mixed: rows of the input that are never formed, as the first layer is affine.
        trained: takes the parameters whose gradient is written; one that is there already is added to.
        share: below 1, all gradients are added that much of, to what is there.
        kernels: whether the calls will be lowered to kernels, which write gradients in the parameters' own type and
            read matrices of every shape alike.
    """

    def __init__(
        self,
        program: Program,
        network: Network,
        segments: list[Segment],
        *,
        chain: int = 0,
        tail: int = 0,
        shared: int = 0,
        split: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        operand: Callable[[Tensor], Tensor],
        gradients: Mapping[Tensor, Tensor] | None = None,
        input_gradient: bool = False,
        input: Tensor | None = None,
        output: Tensor | None = None,
        output_adjoint: Tensor | None = None,
        before: int = 0,
        spread: bool = False,
        mixed: Interpolation | None = None,
        trained: set[Tensor] | None = None,
        share: float = 1.0,
        kernels: bool = False,
    ) -> None:
        self.kernels = kernels
        self.program, self.network, self.segments, self.chain = program, network, segments, chain
        self.tail, self.n_tail = slice(chain - tail, chain), tail
        self.shared = slice(chain - tail, chain - tail + shared)
        self.split, self.dtype, self.device, self.operand = split, dtype, device, operand
        self.gradients, self.mixed = gradients or {}, mixed
        self.rows = max(s.rows.stop for s in segments)
        self.left = chain + (self.n_tail if split else 0)  # rows of the left and right operands of dW
        self.trained = trained if trained is not None else set()
        self.share = share
        self._contributed: set[tuple[int, int]] = set()
        self.done: set[tuple[str, int, int]] = set()  # calls that a neighbouring layer has taken over
        self._scratch: dict[tuple[int, int], Tensor] = {}
        self.owned: list[Tensor] = []
        self.state: dict[object, Any] = {}  # of single layers, by number or parameter

        layers = network.layers
        self.consumers: dict[int, list[int]] = {v: [] for v in range(len(layers) + 1)}
        for i, layer in enumerate(layers):
            for v in layer.inputs:
                self.consumers[v].append(i)
        self.alias = self._aliases()
        self.fused = {  # affine layer -> the activation that its output is overwritten with
            i: self.consumers[i + 1][0]
            for i in range(len(layers))
            if isinstance(layers[i], Affine) and self._is_overwritten(self.consumers[i + 1])
        }
        self.upstream = [input_gradient]
        for layer in layers:
            self.upstream.append(any(self.upstream[v] for v in layer.inputs) or self._trains(layer))
        self.needs_tangent = self._tangents()
        # tangents take the place of their rows' values unless something needs both
        self.separate_tangents = not split and bool(shared or not all(map(self._keeps_its_mask, range(len(layers)))))
        self.overwrites = not split and not self.separate_tangents
        rows = max(self.rows, self.left)
        self.before: Tensor | None = None  # them and those of the input
        if before:
            self.before = self.new(before + rows, *self.shape(0))
            input = self.before[before:]
        if spread and input is None and len(self.shape(0)) == 1:
            (width,) = self.shape(0)
            input = self.new(rows, -(-width // _VECTOR) * _VECTOR)[:, :width]
        self.a = self._buffers(lambda v: rows, output, input)
        self.u = self._buffers(lambda v: self.left if self.upstream[v] else self.n_tail, output_adjoint)
        self.r: dict[int, Tensor] = {}

    # ---- buffers

    def shape(self, value: int) -> tuple[int, ...]:
        """Of a row of the value."""
        return self.network.value_shape(value)

    def root(self, value: int) -> int:
        """The value whose memory it shares."""
        while value in self.alias:
            value = self.alias[value]
        return value

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer of the plan."""
        t = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        self.owned.append(t)
        return t

    def scratch(self, slot: int, *shape: int) -> Tensor:
        """Memory for one call or two; another slot is other memory."""
        n = 1
        for size in shape:
            n *= size
        if (slot, n) not in self._scratch:
            self._scratch[slot, n] = self.new(n)
            self.program.scratch.add(self._scratch[slot, n].data_ptr())
        return self._scratch[slot, n].view(shape)

    def _buffers(
        self, rows: Callable[[int], int], output: Tensor | None = None, input: Tensor | None = None
    ) -> dict[int, Tensor]:
        out: dict[int, Tensor] = {}
        last = self.root(len(self.network.layers))
        for v in range(len(self.network.layers) + 1):
            if v in self.alias:
                t = out[self.root(v)]
                out[v] = t.view(len(t), *self.shape(v))
            elif v == last and output is not None:
                out[v] = output.view(-1, *self.shape(v))
            elif v == 0 and input is not None:
                out[v] = input.view(len(input), *self.shape(v))
            elif rows(v):
                out[v] = self.new(rows(v), *self.shape(v))
            else:
                out[v] = torch.empty(0, *self.shape(v), dtype=self.dtype, device=self.device)
        return out

    def value(self, v: int, rows: slice | None = None) -> Tensor:
        """``a_v`` of some rows."""
        return self.a[v][rows if rows is not None else slice(0, self.rows)]

    def adjoint(self, v: int, rows: slice) -> Tensor:
        """``u_v`` of rows of the left operand."""
        base = 0 if self.upstream[v] else self.left - self.n_tail
        return self.u[v][rows.start - base : rows.stop - base]

    def tangent(self, v: int) -> Tensor:
        """``r_v`` of the rows with a penalty."""
        if self.split:
            return self.a[v][self.chain : self.chain + self.n_tail]
        if not self.separate_tangents:
            return self.a[v][self.tail]
        if not self.r:
            self.r = self._buffers(lambda v: self.n_tail if self.needs_tangent[v] else 0)
        return self.r[v]

    def contribution(self, v: int, rows: slice) -> tuple[Tensor, bool]:
        """Where an adjoint of ``v`` goes, and whether it is added to what is there."""
        key = (v, rows.start)
        add = key in self._contributed
        self._contributed.add(key)
        return self.adjoint(v, rows), add

    def contribute(self, v: int, rows: slice, emit: Callable[[Tensor], None]) -> None:
        """Let ``emit`` add calls that write an adjoint of ``v``, through scratch memory where it is to be added."""
        dst, add = self.contribution(v, rows)
        if not add:
            emit(dst)
            return
        t = self.scratch(0, *dst.shape)
        emit(t)
        self.program.add(partial(torch.add, dst, t, out=dst), dst, dst, t)

    # ---- which values share memory

    def _aliases(self) -> dict[int, int]:
        alias: dict[int, int] = {}
        for i, layer in enumerate(self.network.layers):
            v = layer.inputs[0]
            if len(self.consumers[v]) != 1:
                continue
            producer = self._producer(alias, v)
            if isinstance(layer, Reshape):
                alias[i + 1] = v
            elif producer is None:
                continue
            elif isinstance(layer, Dropout):
                if not isinstance(producer, Activation) or producer.kind == "leaky-relu":
                    alias[i + 1] = v
            elif isinstance(layer, Activation) and not isinstance(producer, Activation | Dropout):
                from_output = layer.kind in ("tanh", "sigmoid") and not self.n_tail
                if (layer.kind == "leaky-relu" and layer.slope >= 0) or from_output:
                    alias[i + 1] = v
        return alias

    def _producer(self, alias: dict[int, int], v: int) -> Layer | None:
        """The layer that made the value, looking through reshapes; ``None`` for the input."""
        while v and isinstance(self.network.layers[v - 1], Reshape):
            if v not in alias:
                break
            v = alias[v]
        return self.network.layers[v - 1] if v else None

    def _is_overwritten(self, consumers: list[int]) -> bool:
        if len(consumers) != 1:
            return False
        layer = self.network.layers[consumers[0]]
        return isinstance(layer, Activation) and layer.kind != "sigmoid" and consumers[0] + 1 in self.alias

    def _keeps_its_mask(self, i: int) -> bool:
        layer = self.network.layers[i]
        if not isinstance(layer, Activation):
            return True
        return layer.slope >= 0 and (i + 1 not in self.alias or i in self.fused.values())

    def _trains(self, layer: Layer) -> bool:
        return any(p in self.gradients for p in layer.parameters)

    def _tangents(self) -> list[bool]:
        needed = [False] * (len(self.network.layers) + 1)
        for i, layer in reversed(list(enumerate(self.network.layers))):
            own = isinstance(layer, Affine) or layer.curved
            for v in layer.inputs:
                needed[v] = needed[v] or own or needed[i + 1]
        return needed

    def depends_on_bias(self, i: int) -> bool:
        """Whether the input's gradient depends on an offset of value ``i + 1``.

        If only through zeros, as torch gives them for kinks and for pooling, whose backward keeps the input.
        """
        reached = {i + 1}
        for j in range(i + 1, len(self.network.layers)):
            layer = self.network.layers[j]
            if reached.intersection(layer.inputs):
                if isinstance(layer, Activation) or layer.curved or (isinstance(layer, AveragePool) and not layer.mean):
                    return True
                reached.add(j + 1)
        return False

    # ---- rows

    def parts(self, rows: slice) -> Iterable[tuple[int, slice]]:
        """The segments within some rows: number and rows, counted from the start of ``rows``."""
        for k, segment in enumerate(self.segments):
            start, stop = max(segment.rows.start, rows.start), min(segment.rows.stop, rows.stop)
            if start < stop:
                yield k, slice(start - rows.start, stop - rows.start)

    # ---- calls of more than one layer

    def join(self, scale: Tensor | None) -> None:
        """Make the right operands of a joined stack: c a + r in the shared rows, r in the others with a penalty."""
        if not self.separate_tangents:
            return
        shared, n_shared = self.shared, self.shared.stop - self.shared.start
        seen: set[int] = set()
        for layer in self.network.layers:
            v = layer.inputs[0]
            if not isinstance(layer, Affine) or self.root(v) in seen or not self._trains(layer):
                continue
            seen.add(self.root(v))
            r = self.tangent(v)
            if n_shared and scale is not None:
                self.program.add(steps.scale_add(scale, self.a[v][shared], r[:n_shared]), r[:n_shared], r, r)
            if n_shared < self.n_tail:
                rest = self.a[v][shared.stop : self.tail.stop]
                self.program.add(steps.copy(r[n_shared:], rest), rest, rest)

    def gradient_to(self, parameter: Tensor, emit: Callable[[Tensor], None]) -> None:
        """Let ``emit`` add calls that write a gradient of the parameter; uses after the first one are added."""
        dst = self.gradients.get(parameter)
        if dst is None:
            return
        adds = parameter in self.trained or self.share < 1
        self.trained.add(parameter)
        if not adds and (dst.dtype == self.dtype or self.kernels):
            emit(dst)
            return
        target = torch.zeros_like(dst, dtype=self.dtype)
        self.owned.append(target)
        emit(target)
        if adds:
            self.program.add(partial(dst.add_, target, alpha=self.share), dst, dst, target)
        else:
            self.program.add(partial(dst.copy_, target), dst, target)
