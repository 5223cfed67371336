"""From a plan's calls to kernels: several calls become one launch that leaves the same numbers in the same places.

The calls of a plan are read in order. Where the next ones are a pattern that a kernel computes, the launch takes their
place; what no pattern fits stays as it is, so that a plan of any network can be lowered. What a launch does not write
is memory that nothing reads again: scratch, logits in reduced precision, seeds before a cast.

    product, bias, activation                                    one launch of ``linear_lrelu``
    the same with the free first layer of interpolated rows      one launch
    product, mask (chain and sweep)                              one launch
    last layer, loss, seeds, first step of the chain             one launch
    penalty and first step of the sweep                          one launch
    every weight gradient and bias sum                           one launch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgan.stack import Kind, Program
from fastgan.steps import Step

Tensor = torch.Tensor


@dataclass
class Lowered:
    """A program of launches.

    Attributes:
        program: the calls.
        squares: partial sums of the squares of all gradients that it writes, or ``None`` where some are not in it.
    """

    program: Program
    squares: Tensor | None


@dataclass
class _Epilogue:
    """What follows a product: how many calls, and where the result goes."""

    out: Tensor
    calls: int = 0
    bias: Tensor | None = None
    activation: str = "identity"
    slope: float = 0.0
    mask: Tensor | None = None


@dataclass
class _Gradient:
    """One layer's weight gradient and bias sum."""

    u: Tensor
    x: Tensor
    dw: Tensor
    db: Tensor | None = None
    bias_rows: list[tuple[int, int]] = field(default_factory=list)
    weights: Tensor | None = None
    joined: Step | None = None


def lower(program: Program, gradients: Sequence[Tensor], *, precision: str, device: torch.device) -> Lowered:
    """Put kernels in the place of a plan's calls.

    Args:
        program: of a plan that was made for kernels.
        gradients: all that it writes, for :attr:`Lowered.squares`.
        precision: of products of fp32 operands: ``"ieee"`` or ``"tf32"``.
        device: on which it runs.
    """
    return _Lowering(program, precision, device).run(gradients)


class _Lowering:
    def __init__(self, program: Program, precision: str, device: torch.device) -> None:
        self.source, self.precision, self.device = program, precision, device
        self.at = 0
        self.out = Program(scratch=program.scratch)
        self.arch: int | None = None
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            self.arch = 10 * major + minor
        self.squares: list[Tensor] = []
        self.written: set[int] = set()

    def run(self, gradients: Sequence[Tensor]) -> Lowered:
        rules = (self._head, self._linear, self._back, self._penalty, self._gradients, self._pointwise)
        while self.at < len(self.source.calls):
            if not any(rule() for rule in rules):
                self._keep()
        whole = len(self.squares) == 1 and {g.data_ptr() for g in gradients if g.numel()} <= self.written
        return Lowered(self.out, self.squares[0] if whole else None)

    # ---- the list

    def _step(self, ahead: int = 0, *names: str) -> Step | None:
        """The step that many calls ahead, if it has one of the names."""
        at = self.at + ahead
        step = self.source.steps[at] if at < len(self.source.steps) else None
        return step if step is not None and (not names or step.name in names) else None

    def _keep(self) -> None:
        i = self.at
        self.out.calls.append(self.source.calls[i])
        self.out.kinds.append(self.source.kinds[i])
        self.out.steps.append(self.source.steps[i])
        self.out.costs.append(self.source.costs[i])
        self.out.parts.append(self.source.parts[i])
        self.at += 1

    def _launch(self, launch: Any, calls: int) -> bool:
        """Put a launch in the place of the next calls."""
        taken = range(self.at, self.at + calls)
        flops = sum(self.source.costs[i][0] for i in taken)
        kinds = [self.source.kinds[i] for i in taken]
        kind: Kind = "product" if "product" in kinds else "other"
        self.out.calls.append(launch)
        self.out.kinds.append(kind)
        self.out.steps.append(None)
        self.out.costs.append((flops, sum(t.nbytes for t in launch.arguments.values() if isinstance(t, Tensor))))
        self.out.parts.append(self.source.parts[max(taken, key=lambda i: self.source.costs[i])])  # the largest call's
        self.at += calls
        return True

    def _counter(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32, device=self.device)

    def _library_wins(self, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
        from fastgan.kernels import configs

        return configs.library_wins(m, n, k, dtype, self.arch)

    # ---- products

    def _linear(self) -> bool:
        step = self._step(0, "linear")
        if step is None:
            return False
        x, weight, y = (step.arguments[k] for k in ("x", "weight", "y"))
        if not _fits(x, weight, y) or self._library_wins(len(x), len(weight), x.shape[1], x.dtype):
            return False
        mixed = self._step(1, "mix")
        if mixed is not None and _row(y, mixed.arguments["a"]) is not None:
            return self._mixed(x, weight, y, mixed)
        from fastgan.kernels.linear_lrelu import linear_launch

        e = self._forward_epilogue(y, 1)
        if e.calls == 0:
            e = self._mask_epilogue(y, 1)
        launch = linear_launch(
            x, weight, e.out, bias=e.bias, activation=e.activation, slope=e.slope, mask=e.mask,
            precision=self.precision,
        )  # fmt: skip
        return self._launch(launch, 1 + e.calls)

    def _mixed(self, x: Tensor, weight: Tensor, y: Tensor, step: Step) -> bool:
        """The free first layer of interpolated rows."""
        from fastgan.kernels.linear_mixed import mixed_launch

        alpha, a, b, dst = (step.arguments[k] for k in ("alpha", "a", "b", "dst"))
        first, second, rows = _row(y, a), _row(y, b), _row(y, dst)
        assert first is not None
        if second is None or rows is None or sorted((first, second)) != [0, len(a)] or len(x) != 2 * len(a):
            return False
        whole = y.as_strided((rows + len(dst), y.shape[1]), y.stride())
        e = self._forward_epilogue(whole, 2)
        if e.calls and not _same(e.out, whole):
            return False
        launch = mixed_launch(
            x, weight, whole, alpha, bias=e.bias, activation=e.activation, slope=e.slope, first=first, second=second,
            mixed=rows, precision=self.precision,
        )  # fmt: skip
        return self._launch(launch, 2 + e.calls)

    def _back(self) -> bool:
        step = self._step(0, "linear_back")
        if step is None:
            return False
        u, weight, dst = (step.arguments[k] for k in ("u", "weight", "dst"))
        if not _fits(u, weight, dst) or self._library_wins(len(u), weight.shape[1], u.shape[1], u.dtype):
            return False
        from fastgan.kernels.linear_lrelu import linear_launch

        e = self._mask_epilogue(dst, 1)
        launch = linear_launch(
            u, weight, e.out, activation=e.activation, slope=e.slope, mask=e.mask, transposed=True,
            precision=self.precision,
        )  # fmt: skip
        return self._launch(launch, 1 + e.calls)

    def _forward_epilogue(self, y: Tensor, ahead: int) -> _Epilogue:
        """Bias and activation of what a product left in ``y``."""
        e = _Epilogue(y)
        step = self._step(ahead, "bias_act", "bias_tanh")
        if step is not None and _same(step.arguments["src"], y):
            dst = step.arguments["dst"]
            slope = step.arguments.get("slope", 1.0)
            if slope >= 0 and (_same(dst, y) or self._is_scratch(y)):
                e.calls, e.bias, e.out = 1, step.arguments["bias"], _flat(dst)
                if step.name == "bias_tanh":
                    e.activation = "tanh"
                elif slope != 1:
                    e.activation, e.slope = "leaky-relu", slope
        if e.activation == "identity":
            step = self._step(ahead + e.calls, "activate")
            if step is not None and step.arguments["kind"] in ("tanh", "sigmoid"):
                src, dst = step.arguments["x"], step.arguments["y"]
                if _same(src, e.out) and _same(dst, e.out):
                    e.calls, e.activation = e.calls + 1, step.arguments["kind"]
        return e

    def _mask_epilogue(self, y: Tensor, ahead: int) -> _Epilogue:
        """The activation's derivative as a factor of what a product left in ``y``."""
        e = _Epilogue(y)
        step = self._step(ahead, "mask_mul", "activate_back")
        if step is None:
            return e
        src, dst = step.arguments["src" if step.name == "mask_mul" else "u"], step.arguments["dst"]
        if src is None or not _same(src, y) or not (_same(dst, y) or self._is_scratch(y)):
            return e
        if step.name == "mask_mul":
            if step.arguments["slope"] < 0:
                return e
            e.activation, e.slope, e.mask = "leaky-relu", step.arguments["slope"], _flat(step.arguments["out"])
        else:
            e.activation, e.mask = step.arguments["kind"], _flat(step.arguments["y"])
        e.calls, e.out = 1, _flat(dst)
        return e

    def _is_scratch(self, t: Tensor) -> bool:
        return t.data_ptr() in self.source.scratch

    # ---- the last layer, the loss and the seeds

    def _head(self) -> bool:
        step = self._step(0, "linear")
        if step is None or len(step.arguments["weight"]) != 1:
            return False
        hidden, weight, y = (step.arguments[k] for k in ("x", "weight", "y"))
        if not _fits(hidden, weight, y):
            return False
        at, bias = 1, None
        e = self._forward_epilogue(y, 1)
        if e.calls:
            if e.activation != "identity" or not _same(e.out, y):
                return False
            at, bias = 2, e.bias
        loss: Step | None = None
        wide: dict[int, Tensor] = {}  # logits by the address of their copies in full precision
        narrow: dict[int, Tensor] = {}  # seeds by the address of theirs
        while (step := self._step(at, "copy", "fill", "discriminator_loss", "generator_loss")) is not None:
            if step.name == "copy":
                src, dst = step.arguments["src"], step.arguments["dst"]
                if loss is None:
                    wide[dst.data_ptr()] = src
                else:
                    narrow[src.data_ptr()] = dst
            elif step.name != "fill":
                loss = step
            at += 1
        outer = self._step(at, "outer_mask")
        if outer is None:
            return False
        seed, adjoint = outer.arguments["seed"], _flat(outer.arguments["dst"])
        activation, slope = "identity", 0.0
        if outer.arguments["out"] is not None:
            activation, slope = "leaky-relu", outer.arguments["slope"]
            if slope < 0 or outer.arguments["out"].data_ptr() != hidden.data_ptr():
                return False
        at += 1
        if activation == "identity":
            derivative = self._step(at, "activate_back")
            if derivative is not None and all(_same(derivative.arguments[k], adjoint) for k in ("u", "dst")):
                if derivative.arguments["y"].data_ptr() != hidden.data_ptr():
                    return False
                activation, at = derivative.arguments["kind"], at + 1
        if seed.stride() != (1,) or len(seed) > len(hidden):
            return False
        head = self._make_head(loss, hidden, y, weight[0], bias, activation, slope, seed, wide, narrow)
        if head is None:
            return False

        from fastgan.kernels.linear_head import head_launch

        below = self._step(at, "linear_back")
        if below is not None and _same(below.arguments["u"], adjoint):
            w, dst = below.arguments["weight"], below.arguments["dst"]
            if _fits(adjoint, w, dst) and not self._library_wins(len(adjoint), w.shape[1], len(w), w.dtype):
                self.at += at  # the epilogue is looked for from there
                e = self._mask_epilogue(dst, 1)
                self.at -= at
                launch = head_launch(
                    hidden, head, adjoint, w, e.out, e.mask, mask_activation=e.activation, mask_slope=e.slope,
                    precision=self.precision,
                )  # fmt: skip
                return self._launch(launch, at + 1 + e.calls)
        return self._launch(head_launch(hidden, head, adjoint, precision=self.precision), at)

    def _make_head(
        self, loss: Step | None, hidden: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, activation: str,
        slope: float, seed: Tensor, wide: Mapping[int, Tensor], narrow: Mapping[int, Tensor],
    ) -> Any:  # fmt: skip
        """What the kernel needs to know of the loss, or ``None`` where its memory is not as plans lay it."""
        from fastgan.kernels.linear_head import Head

        rows, chain = len(hidden), len(seed)
        full = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        kind, player = None, "discriminator"
        places: dict[str, int | None] = {"real": None, "fake": None}
        seeded, n, scales = 0, 0, None
        figures: dict[str, Tensor | None] = {"loss": None, "real_mean": None, "fake_mean": None}
        loss_scale = None
        if loss is not None:
            a = loss.arguments
            kind, player = a["kind"], "discriminator" if loss.name == "discriminator_loss" else "generator"
            loss_scale, n = a["loss_scale"], len(a["fake"])
            figures = {k: a.get(k) for k in figures}
            for name in ("real", "fake"):
                if a[name] is None:
                    continue
                places[name] = start = _offset(y, wide.get(a[name].data_ptr(), a[name]))
                to = a.get(f"{name}_scale")
                if start is None or len(a[name]) != n:
                    return None
                if to is None:  # real logits that a generator's loss compares with
                    continue
                to = narrow.get(to.data_ptr(), to)
                if _offset(seed, to) == start:
                    seeded = max(seeded, start + n)
                elif to.dtype == full and to.stride() == (1,) and to.storage_offset() >= start:
                    scales = to.as_strided((start + n,), (1,), to.storage_offset() - start)
                else:
                    return None
            # rows with a loss alone are the first ones
            alone = sum(s is not None and s < seeded for k, s in places.items() if k == "fake" or player != "generator")
            if seeded != alone * n:
                return None
        return Head(
            weight=weight, bias=bias, activation=activation, slope=slope, kind=kind, player=player, n=n,
            real=places["real"], fake=places["fake"] or 0, seeded=seeded, chain=chain, seeds=seed, scales=scales,
            loss_scale=loss_scale, logits=torch.zeros(rows, dtype=full, device=self.device),
            partials=torch.zeros(3 * -(-rows // 16), dtype=full, device=self.device), counter=self._counter(),
            **figures,
        )  # fmt: skip

    # ---- penalties

    def _penalty(self) -> bool:
        step = self._step(0, "penalty")
        if step is None:
            return False
        a = step.arguments
        g, direction, value = a["g"].flatten(1), a["dst"].flatten(1), a["value"]
        settings = {
            "kind": "norm" if a["norm"] else "square", "target": a["target"], "scale": a["scale"],
            "loss_scale": a["loss_scale"],
        }  # fmt: skip
        rows_value = torch.zeros(len(g), dtype=value.dtype, device=self.device)
        total, product = self._step(1, "total"), self._step(2, "linear")
        apart = g.data_ptr() != direction.data_ptr()
        if total is not None and len(total.arguments["values"]) == 1 and product is not None and apart:
            x, weight, y = (product.arguments[k] for k in ("x", "weight", "y"))
            fits = _same(x, direction) and _fits(x, weight, y) and _fits(g, weight, y)
            if fits and not self._library_wins(len(x), len(weight), x.shape[1], x.dtype):
                from fastgan.kernels.linear_penalty import penalty_launch

                e = self._mask_epilogue(y, 3)
                launch = penalty_launch(
                    g, direction, weight, e.out, mask=e.mask, activation=e.activation, slope=e.slope,
                    penalty_weight=a["weight"], value=total.arguments["dst"], rows_value=rows_value,
                    counter=self._counter(), precision=self.precision, **settings,
                )  # fmt: skip
                return self._launch(launch, 3 + e.calls)
        from fastgan.kernels.gradient_penalty import gradient_penalty_launch

        launch = gradient_penalty_launch(
            g, direction, value, rows_value, self._counter(), weight=a["weight"], add=a["add"], **settings
        )
        return self._launch(launch, 1)

    # ---- gradients of parameters

    def _gradients(self) -> bool:
        """The run of weight gradients and bias sums from here on, as one launch."""
        found: list[_Gradient] = []
        joins: list[Step] = []
        used: set[int] = set()
        calls = 0
        while (step := self._step(calls, "scale_add", "weight_gradient", "channel_sum", "fill")) is not None:
            a = step.arguments
            if step.name == "scale_add":
                if found:
                    break
                joins.append(step)
            elif step.name == "weight_gradient":
                if not _fits(a["u"], a["x"], a["dst"]):
                    break
                join = next((j for j in joins if _row(a["x"], _flat(j.arguments["a"])) is not None), None)
                used |= {id(join)}
                found.append(_Gradient(a["u"], a["x"], a["dst"], joined=join))
            elif not found or found[-1].db is not None or not self._bias(found[-1], step):
                break
            calls += 1
        if not found:
            return False
        if any(id(join) not in used for join in joins):  # something else reads what it leaves
            for _ in joins:
                self._keep()
            for g in found:
                g.joined = None
            calls -= len(joins)
        from fastgan.kernels.weight_gradient import Problem, programs_of, weight_gradient_launch

        problems = [
            Problem(
                u=g.u, x=g.x, dw=g.dw, db=g.db, bias_rows=g.bias_rows, bias_weights=g.weights, **_joined(g)
            )
            for g in found
        ]  # fmt: skip
        squares = torch.zeros(programs_of(problems), dtype=torch.float64, device=self.device)
        launch = weight_gradient_launch(problems, squares=squares, precision=self.precision)
        self.squares.append(squares)
        self.written |= {t.data_ptr() for g in found for t in (g.dw, g.db) if t is not None}
        return self._launch(launch, calls)

    @staticmethod
    def _bias(g: _Gradient, step: Step) -> bool:
        """Let a bias sum, or zeros, be part of a layer's gradient."""
        a = step.arguments
        if step.name == "fill":
            if a["value"] != 0 or a["dst"].shape != (g.u.shape[1],):
                return False
            g.db = a["dst"]
            return True
        start = _row(g.u, a["src"])
        if start is None or a["src"].ndim != 2 or a["src"].shape[1] != g.u.shape[1]:
            return False
        if a["weight"] is not None and start:
            return False
        g.db, g.weights, g.bias_rows = a["dst"], a["weight"], [(start, start + len(a["src"]))]
        return True

    # ---- what stands alone

    def _pointwise(self) -> bool:
        step = self._step(0, "mix", "discriminator_loss", "generator_loss")
        if step is None:
            return False
        a = step.arguments
        if step.name == "mix":
            from fastgan.kernels.interpolate import interpolate_launch

            if not all(a[k].is_contiguous() for k in ("a", "b", "dst")):
                return False
            return self._launch(interpolate_launch(a["alpha"], a["a"], a["b"], a["dst"]), 1)
        from fastgan.kernels.adversarial_loss import adversarial_loss_launch

        player: Any = "discriminator" if step.name == "discriminator_loss" else "generator"
        launch = adversarial_loss_launch(
            a["kind"], player, a["real"], a["fake"], a.get("real_scale"), a["fake_scale"], a["loss"],
            a.get("real_mean"), a.get("fake_mean"), loss_scale=a["loss_scale"],
        )  # fmt: skip
        return self._launch(launch, 1)


def _joined(g: _Gradient) -> dict[str, Any]:
    if g.joined is None:
        return {}
    a = g.joined.arguments
    start = _row(g.x, _flat(a["a"]))
    assert start is not None
    return {"scale": a["scale"], "r": _flat(a["r"]), "joined": (start, start + len(a["a"]))}


def _flat(t: Tensor) -> Tensor:
    """``[rows, columns]`` of the same memory."""
    return t.view(len(t), -1)


def _fits(*matrices: Tensor) -> bool:
    """Whether a kernel reads these: rows of numbers that lie side by side."""
    return all(t.ndim == 2 and (t.stride(1) == 1 or t.shape[1] == 1) for t in matrices)


def _same(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory."""
    if a is None or a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.numel() != b.numel():
        return False
    return len(a) == len(b) and a.stride(0) == b.stride(0)


def _row(whole: Tensor, part: Tensor) -> int | None:
    """The row of ``whole`` at which ``part``, rows of the same memory, begins; it may lie past the end."""
    size = whole.stride(0) * whole.element_size()
    if not size or whole.dtype != part.dtype or part.stride(0) != whole.stride(0):
        return None
    if whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return None
    row, rest = divmod(part.data_ptr() - whole.data_ptr(), size)
    return row if row >= 0 and not rest else None


def _offset(whole: Tensor, part: Tensor) -> int | None:
    """The same for numbers in a row."""
    return _row(whole.view(-1, 1), part.view(-1, 1)) if whole.is_contiguous() and part.is_contiguous() else None
