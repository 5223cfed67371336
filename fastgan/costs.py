"""What an update costs: counted from a plan's calls, or by watching what autograd runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgan import marks
from fastgan.plan import Plan

if TYPE_CHECKING:
    from fastgan.engine import Engine

PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")}
PRODUCTS |= {"fastgan::linear_lrelu", "fastgan::linear_lrelu_product"}


@dataclass(frozen=True)
class Cost:
    """Per update, without the optimiser: matrix products, convolutions, kernel launches, FLOPs, bytes moved."""

    products: int
    convolutions: int
    launches: int
    flops: int
    bytes: int

    def __str__(self) -> str:
        parts = [f"{self.products} matrix products"] if self.products else []
        parts += [f"{self.convolutions} convolutions"] if self.convolutions else []
        parts += [f"{self.launches} kernel launches", f"{_big(self.flops)}FLOP", f"{_big(self.bytes)}B"]
        return ", ".join(parts)


def of_plan(plan: Plan) -> Cost:
    """Of a plan, which runs once: launches are the torch ops that its calls make, and one for each native call."""
    with torch.no_grad(), OpWatch() as seen:
        _Plans(seen).run(plan)
    return Cost(seen.products, seen.convolutions, seen.launches, seen.flops, seen.bytes)


def measured(run: Callable[[], object]) -> Cost:
    """Of what ``run`` does in torch ops."""
    with OpWatch() as seen:
        run()
    return Cost(seen.products, seen.convolutions, seen.launches, seen.flops, seen.bytes)


def of_iteration(engine: Engine, run: Callable[[], object]) -> Cost:
    """Of an iteration that ``run`` makes: torch ops as they run, plans by what their calls were made of.

    In iterations that are lists of kernels their launches count; what a recording replays is run as it was recorded.
    """
    variants = engine._executor.variants if engine._executor is not None else []
    if variants and variants[-1].recording is not None:
        run = variants[-1].body
    own = all(u.optimizer is None for u in (engine._d, engine._g) if u is not None)
    with OpWatch() as seen:
        before, marks.listener = marks.listener, _Plans(seen, own)
        try:
            run()
        finally:
            marks.listener = before
    launches = seen.launches
    seen.bytes += bytes_of_optimisers(engine)
    if variants and variants[-1].iterations:
        launches = len(variants[-1].iterations[0].calls)
    return Cost(seen.products, seen.convolutions, launches, seen.flops, seen.bytes)


def bytes_of_optimisers(engine: Engine) -> int:
    """In an iteration, where they are the engine's own.

    They read and write value, two moments and the average of every parameter once, and read its gradient.
    """
    total = 0
    for updater, times in ((engine._d, engine.n_critic), (engine._g, 1)):
        if updater is not None and updater.arena is not None and updater.optimizer is None:
            tensors = 7 + 2 * (updater is engine._g and engine.generator_ema is not None)
            total += times * tensors * updater.arena.grad.nbytes
    return total


class _Plans:
    """Hears which plans run, and counts what they are known to do in the place of what is seen of them."""

    def __init__(self, seen: OpWatch, own_optimisers: bool = True) -> None:
        self.seen, self.own = seen, own_optimisers

    @contextlib.contextmanager
    def mark(self, phase: str) -> Iterator[None]:
        before = self.seen.launches, self.seen.bytes
        yield
        if phase == "optimiser":  # a native pass, or torch ops whose bytes are counted apart
            self.seen.launches += self.seen.launches == before[0]
            if self.own:
                self.seen.bytes = before[1]

    def entry(self, engine: Any, method: str) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def run(self, work: marks.Labelled) -> None:
        seen = self.seen
        before = seen.products, seen.convolutions, seen.flops, seen.bytes
        for call in work.calls:
            launches = seen.launches
            call()
            seen.launches += seen.launches == launches
        seen.products, seen.convolutions, seen.flops, seen.bytes = before
        if isinstance(work, Plan):
            seen.products += work.program.kinds.count("product")
            seen.convolutions += work.program.kinds.count("convolution")
        seen.flops += sum(flops for flops, _ in work.costs)
        seen.bytes += sum(n for _, n in work.costs)


class OpWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the torch ops of a run that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.convolutions = self.launches = self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = any(t.untyped_storage().data_ptr() not in inputs for t in outs)
        if not made and not func._schema.is_mutable:  # a view
            return out
        self.launches += 1
        self.bytes += sum(t.nbytes for t in tensors)
        if func._overloadpacket in flop_registry:
            self.flops += int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out))
        self.products += name in PRODUCTS
        if name == "aten::convolution_backward":
            self.convolutions += sum(args[-1][:2])
        self.convolutions += name == "aten::convolution"
        return out


def _big(n: int) -> str:
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000  # type: ignore[assignment]
    return f"{n:.3g} T"
