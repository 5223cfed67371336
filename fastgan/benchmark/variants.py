"""The ways of doing an iteration that are timed beside each other, each on networks of its own from the same start."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastgan import costs
from fastgan.benchmark.by_hand import PLAIN, Form, Loop, Unable
from fastgan.benchmark.workloads import Case, Update
from fastgan.costs import Cost

Tensor = torch.Tensor
Drawn = tuple[list[Update], Update]


@dataclass
class Way:
    """One way of doing an iteration.

    Attributes:
        run: an iteration, noise drawn.
        held: iterations on the noise of :meth:`Case.drawn`, from the start: what is checked, and is what ``run`` does.
        networks: that are trained.
        moments: Adam's first, of each of them; empty where its optimiser has none.
        followers: the generator's average, and running statistics of all networks, where there are such.
        generate: the generator's update alone, or ``None``.
        cost: of an iteration, where it is known.
        numbers: precision that it computes in.
        precision: a context that it is made and run in.
        graph: the CUDA graph that ``run`` replays, or ``None``.
        keep: what must live as long.
        many: a call that makes ``calls`` iterations, where that is what is timed.
    """

    run: Callable[[], object]
    held: Callable[[int], object]
    networks: Sequence[nn.Module]
    moments: Callable[[], list[list[Tensor]]]
    followers: Sequence[Sequence[Tensor]] = ()
    generate: Callable[[], object] | None = None
    cost: Callable[[], Cost | None] = lambda: None
    numbers: str = "fp32"
    precision: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    graph: Any = None
    keep: Any = None
    many: Callable[[], object] | None = None
    calls: int = 1

    @property
    def parameters(self) -> list[Tensor]:
        return [p for net in self.networks for p in net.parameters()]


Make = Callable[[Case], Way]


# ---- by hand


def by_hand(case: Case, form: Form = PLAIN, dtype: torch.dtype | None = None) -> Way:
    """A hand-written loop.

    Raises:
        Unable: the loop does not do what the case asks for, or needs a CUDA device.
    """
    if form.graph and case.device.type != "cuda":
        raise Unable("CUDA graphs need a CUDA device")
    loop = Loop(case, form, dtype)
    if form.graph and any(p.every > 1 for p in loop.phases):
        raise Unable("one graph of an iteration has no lazy penalties")

    def held(iteration: int) -> None:
        with loop.precision():
            loop.iterate(_cast(case.drawn(iteration), loop.dtype))

    def moments() -> list[list[Tensor]]:
        optimizers = [o for o in (loop.g_optimizer, loop.d_optimizer) if o is not None]
        pairs = zip(optimizers, loop.networks, strict=True)
        return [[o.state[p]["exp_avg"] for p in net.parameters() if "exp_avg" in o.state[p]] for o, net in pairs]

    def generate() -> None:
        loop.g_update(loop.draw(generator=True))

    followers = _followers(loop.averaged, loop.networks)
    way = Way(loop.iterate, held, loop.networks, moments, followers, None if loop.g is None else generate, keep=loop)
    way.precision = loop.precision
    way.numbers = "bf16" if form.amp else case.precision
    if form.compiled is None:
        way.cost = lambda: costs.measured(loop.iterate)
    return _as_graph(way, loop, case) if form.graph else way


def _followers(average: Sequence[Tensor], networks: Iterable[nn.Module]) -> list[list[Tensor]]:
    statistics = [b for net in networks for b in net.buffers() if b.is_floating_point()]
    return [of for of in (list(average), statistics) if of]


def _cast(drawn: Drawn, dtype: torch.dtype) -> Drawn:
    def cast(update: Update) -> Update:
        parts = {f.name: getattr(update, f.name) for f in dataclasses.fields(update)}
        return Update(**{k: v if v is None or not v.is_floating_point() else v.to(dtype) for k, v in parts.items()})

    return [cast(update) for update in drawn[0]], cast(drawn[1])


def _as_graph(way: Way, loop: Loop, case: Case) -> Way:
    """The way as replays of one graph that draws its noise, checked by another one on given noise."""
    kept = [*way.parameters, *itertools.chain.from_iterable(way.followers)]
    start = [t.detach().clone() for t in kept]
    places = _cast(case.drawn(0), loop.dtype)
    with loop.precision():
        alone, replayed = _graphs([partial(loop.iterate, places), loop.iterate], case.device)
    _reset(kept, start, [o for o in (loop.g_optimizer, loop.d_optimizer) if o is not None])

    def held(iteration: int) -> None:
        flat = [[*drawn[0], drawn[1]] for drawn in (places, _cast(case.drawn(iteration), loop.dtype))]
        for place, update in zip(*flat, strict=True):
            for f in dataclasses.fields(place):
                if (at := getattr(place, f.name)) is not None:
                    at.copy_(getattr(update, f.name))
        alone.replay()

    way.run, way.held, way.graph, way.generate = replayed.replay, held, replayed, None
    way.keep = (loop, alone, places)
    return way


def _graphs(runs: Sequence[Callable[[], object]], device: torch.device) -> list[Any]:
    """A graph of each, after three calls of the first on a side stream."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            runs[0]()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graphs = []
    for run in runs:
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its nodes can be counted
        with torch.cuda.graph(graph):
            run()
        graph.instantiate()
        graphs.append(graph)
    return graphs


@torch.no_grad()
def _reset(kept: Sequence[Tensor], start: Sequence[Tensor], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Parameters, what follows them and Adam's state, in place, to what they were before warm-up."""
    for t, value in zip(kept, start, strict=True):
        t.copy_(value)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


# ---- the engine


def by_engine(
    case: Case, *, closed_form: bool = True, calls: int = 1, dtype: torch.dtype | None = None, **options: Any
) -> Way:
    """The engine's way, by ``step``; ``calls``: so many iterations in one call, on the same real samples.

    Raises:
        InputError: the engine does not have it here.
        Unable: it falls back to something else.
    """
    engine = case.engine(dtype, precision=case.precision, closed_form=closed_form, **options)
    real, labels, fake = case.samples()
    run = partial(engine.step, real.to(engine.dtype), labels, fake=None if fake is None else fake.to(engine.dtype))
    start = copy.deepcopy(engine.state_dict())
    run()
    variants = engine._executor.variants if engine._executor is not None else []
    recorded = variants[0].recording if variants else None
    if options.get("executor") in ("graph", "dependent") and recorded is None:
        raise Unable(f"not recorded: {variants[0].why_unrecorded if variants else 'there is no variant'}")
    engine.load_state_dict(start)

    def moments() -> list[list[Tensor]]:
        state = engine.state_dict()
        optimizers = [state[key] for key in ("g_optimizer", "d_optimizer") if state[key] is not None]
        return [[one["exp_avg"] for one in o["state"].values() if "exp_avg" in one] for o in optimizers]

    networks = [n for n in (engine.generator, engine.discriminator) if n is not None]
    averaged = [] if engine.generator_ema is None else list(engine.generator_ema.parameters())
    followers = _followers(averaged, networks)
    way = Way(run, lambda iteration: run(), networks, moments, followers, graph=recorded, keep=engine)
    way.numbers = case.precision
    if engine.generator is not None and recorded is None:  # a recording holds both players' updates
        compared = real[-case.batch :] if engine.loss.compares else None
        way.generate = partial(engine.g_step, real=compared, labels=None if labels is None else labels[-case.batch :])
    way.cost = lambda: costs.of_iteration(engine, run)
    if calls > 1:
        way.many, way.calls = partial(variants[0].run, calls), calls
    return way


# ---- those that are timed


def eager(case: Case) -> Way:
    """As people write it, in fp32."""
    return by_hand(dataclasses.replace(case, precision="fp32"))


def compiled(case: Case, *, traced: bool) -> Way:
    """The compiler's form in the case's precision; on a GPU as one graph."""
    graph = case.device.type == "cuda"
    options: dict[str, Any] = {}
    if traced:
        options = {"mode": "max-autotune-no-cudagraphs"} if graph else {"options": {"cpp_wrapper": True}}
        torch._dynamo.config.trace_autograd_ops = True
    return by_hand(case, Form(case.precision == "bf16", options, traced, graph, fused=True))


def graphed(case: Case) -> Way:
    """Eager ops in the case's precision, the whole iteration one CUDA graph."""
    return by_hand(case, Form(case.precision == "bf16", graph=True))


plain_engine = partial(by_engine, closed_form=False, backend="reference", executor="eager")

VARIANTS: Mapping[str, Make] = {
    "eager": eager,
    "eager again": eager,
    "eager + AMP": lambda case: by_hand(case, Form(amp=True)),
    "compiled": partial(compiled, traced=False),
    "compiled + traced": partial(compiled, traced=True),
    "CUDA graph": graphed,
    "fastgan reference": plain_engine,
    "fastgan": by_engine,
}

ABOUT = {
    "eager": "PyTorch as people write it, in fp32",
    "eager again": "the same once more: what differs is noise",
    "eager + AMP": "under autocast to bf16",
    "compiled": "torch.compile, torch.func.grad for penalties, fused Adam",
    "compiled + traced": "torch.compile, torch.autograd.grad traced into it, tuned, fused Adam",
    "CUDA graph": "the eager iteration as one graph",
    "fastgan reference": "the engine through autograd, in PyTorch ops",
    "fastgan": "the engine as it comes",
}
