"""One training update in several ways on one device: as people write it, in a CUDA graph, compiled, and by the engine.

Every way trains networks of its own from the same start on the same real rows. The hand-written ones are bound to the
mathematics of :mod:`bench.bench_closed_form`; before anything is timed each is held to the engine's update, and the
engine's own paths to its plainest one: a way that is wrong is not timed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

import fastgan
from bench.bench_closed_form import LR, Work, slope, slope_by_func
from bench.sections import Skip, last_line

Noise = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # latents, interpolation weights, latents of the generator
STEPS = 3  # that a way is held to before it is timed
# relative distance from the engine, of Adam's first moments and of the way that the parameters have gone: Adam divides
# by the gradient's size, so that a few elements whose gradient is all rounding go the other way
# (seen on a CPU: 3e-4 and 8e-4 in fp32, where a row crosses a kink; 0.04 and 0.11 in bf16; a penalty's weight of 9
# instead of 10: 0.09 and 0.13)
LIMITS = {"fp32": (2e-3, 0.02), "tf32": (0.01, 0.1), "bf16": (0.08, 0.3)}
GRAPHED = {"fused": True, "capturable": True}  # Adam's options in a graph
AUTOCAST = {"bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What all ways of an update share."""

    work: Work
    device: torch.device
    precision: str
    g: nn.Module
    d: nn.Module
    latent: int
    real: torch.Tensor
    fake: torch.Tensor | None  # of an update of the critic alone; a whole iteration makes its own
    n_critic: int = 1

    @staticmethod
    def of(work: Work, device: torch.device, precision: str, n_critic: int = 1) -> Setting:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            g, d, latent, shape = work.networks()
            real, fake = (torch.rand(work.batch, *shape, device="cpu") * 2 - 1 for _ in range(2))
        given = None if work.whole else fake.to(device)
        return Setting(work, device, precision, g, d, latent, real.to(device), given, n_critic)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.g).to(self.device), copy.deepcopy(self.d).to(self.device)

    def noise(self) -> list[Noise]:
        """Of the steps that ways are held to."""
        r = torch.Generator().manual_seed(1)
        n, latent = self.work.batch, self.latent
        return [
            tuple(t.to(self.device) for t in (torch.randn(n, latent, generator=r), torch.rand(n, generator=r),
                                               torch.randn(n, latent, generator=r)))
            for _ in range(STEPS)
        ]  # fmt: skip

    def reduced(self) -> Any:
        """The precision of the networks, penalties included, as where autocast is written around the whole loss."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """The precision of fp32 products; a global setting, so that it is held while a way is made and run."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@dataclass
class Way:
    """One way of doing the update.

    Attributes:
        run: the update, noise drawn.
        given: the update on given noise, or ``None`` where it draws its own only.
        networks: that it trains, ``(generator, discriminator)``.
        moments: Adam's first, of all players that are updated.
        keep: what must live as long.
        graph: the CUDA graph that ``run`` replays, or ``None``.
        trained: the networks that are updated.
        many: a call that makes ``calls`` updates, where that is what is timed.
    """

    run: Callable[[], object]
    given: Callable[[Noise], None] | None
    networks: tuple[nn.Module, nn.Module]
    moments: Callable[[], list[torch.Tensor]]
    keep: Any = None
    graph: Any = None
    trained: tuple[nn.Module, ...] = ()
    many: Callable[[], object] | None = None
    calls: int = 1


# ---- by hand


@dataclass
class _Updates:
    d: Callable[[torch.Tensor, torch.Tensor], None]
    g: Callable[[torch.Tensor], None]
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]  # of g and d


def _as_written(s: Setting, g: nn.Module, d: nn.Module, **options: Any) -> _Updates:
    """The update as people write it."""
    work = s.work
    g_opt, d_opt = (torch.optim.Adam(net.parameters(), LR, work.kind.betas, **options) for net in (g, d))

    def critic(x: torch.Tensor) -> torch.Tensor:
        return d(x).float()

    def d_update(z: torch.Tensor, alpha: torch.Tensor) -> None:
        d_opt.zero_grad()
        with s.reduced():
            fake = g(z).detach().float() if s.fake is None else s.fake
            loss = work.kind.d_loss(critic, slope, s.real, fake, alpha, work.weight)
        loss.backward()
        d_opt.step()

    def g_update(z: torch.Tensor) -> None:
        g_opt.zero_grad()
        with s.reduced():
            loss = work.kind.g_loss(critic, s.real, g(z).float())
        loss.backward()
        g_opt.step()

    return _Updates(d_update, g_update, (g_opt, d_opt))


def _as_compiled(s: Setting, g: nn.Module, d: nn.Module, compile_options: dict[str, Any], **options: Any) -> _Updates:
    """From noise to gradients one compiled function for each player; torch.func differentiates the penalty."""
    work, kind = s.work, s.work.kind
    g_params = {n: p.detach() for n, p in g.named_parameters()}  # the same memory
    d_params = {n: p.detach() for n, p in d.named_parameters()}
    g_opt, d_opt = (torch.optim.Adam(net.parameters(), LR, kind.betas, **options) for net in (g, d))

    def call(net: nn.Module, params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(net, params, (x,)).float()

    def d_grads(z: torch.Tensor, alpha: torch.Tensor) -> Iterable[torch.Tensor]:
        with s.reduced():
            fake = call(g, g_params, z) if s.fake is None else s.fake

        def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
            with s.reduced():
                return kind.d_loss(lambda x: call(d, params, x), slope_by_func, s.real, fake, alpha, work.weight)

        return torch.func.grad(loss)(d_params).values()

    def g_grads(z: torch.Tensor) -> Iterable[torch.Tensor]:
        def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
            with s.reduced():
                return kind.g_loss(lambda x: call(d, d_params, x), s.real, call(g, params, z))

        return torch.func.grad(loss)(g_params).values()

    compiled = [torch.compile(f, fullgraph=True, dynamic=False, **compile_options) for f in (d_grads, g_grads)]

    def step(optimizer: torch.optim.Optimizer, net: nn.Module, grads: Iterable[torch.Tensor]) -> None:
        for p, grad in zip(net.parameters(), grads, strict=True):
            p.grad = grad if grad.stride() == p.stride() else grad.contiguous()
        optimizer.step()

    @torch.no_grad()
    def d_update(z: torch.Tensor, alpha: torch.Tensor) -> None:
        step(d_opt, d, compiled[0](z, alpha))

    @torch.no_grad()
    def g_update(z: torch.Tensor) -> None:
        step(g_opt, g, compiled[1](z))

    return _Updates(d_update, g_update, (g_opt, d_opt))


def by_hand(
    s: Setting, *, graph: bool = False, compiled: dict[str, Any] | None = None, fused: bool = False
) -> Way:  # fmt: skip
    """A hand-written way.

    Args:
        s: what is trained.
        graph: replay one CUDA graph of the whole update, its noise included.
        compiled: options of torch.compile, or ``None`` for eager ops.
        fused: torch's fused Adam; always with a graph, where it is capturable.
    """
    g, d = s.networks()
    options = GRAPHED if graph else {"fused": True} if fused else {}
    made = _as_written(s, g, d, **options) if compiled is None else _as_compiled(s, g, d, compiled, **options)
    buffers = s.noise()[0]

    def update(noise: Noise = buffers, draw: bool = False) -> None:
        z, alpha, z_g = noise
        for _ in range(s.n_critic):
            if draw:
                alpha.uniform_()
                if s.work.whole:
                    z.normal_()
            made.d(z, alpha)
        if s.work.whole:
            if draw:
                z_g.normal_()
            made.g(z_g)

    run = partial(update, draw=True)
    given: Callable[[Noise], None] = update
    keep: Any = made
    replayed = None
    timed: Callable[[], object] = run
    if graph:
        start = [p.detach().clone() for net in (g, d) for p in net.parameters()]
        alone, replayed = _graphs([update, run], s.device)
        _reset((g, d), start, made.optimizers)
        timed, keep = replayed.replay, (made, alone, buffers)

        def given(noise: Noise) -> None:
            for place, value in zip(buffers, noise, strict=True):
                place.copy_(value)
            alone.replay()

    trained = (g, d) if s.work.whole else (d,)
    optimizer = dict(zip((g, d), made.optimizers, strict=True))

    def moments() -> list[torch.Tensor]:
        return [optimizer[net].state[p]["exp_avg"] for net in trained for p in net.parameters()]

    return Way(timed, given, (g, d), moments, keep, replayed, trained)


def _graphs(runs: Sequence[Callable[[], object]], device: torch.device) -> list[Any]:
    """A graph of each, after three calls of the first on a side stream."""
    side = torch.cuda.Stream(device)
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
def _reset(
    networks: Iterable[nn.Module], start: Sequence[torch.Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> None:  # fmt: skip
    """Parameters and Adam's state, in place, to what they were before warm-up."""
    for p, value in zip((p for net in networks for p in net.parameters()), start, strict=True):
        p.copy_(value)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()


# ---- the engine


def by_engine(
    s: Setting, *, executor: str = "eager", backend: str = "reference", closed_form: bool = True, calls: int = 1
) -> Way:  # fmt: skip
    """The engine's way, by ``step``; ``calls``: so many updates in one call, on the same real rows.

    Raises:
        InputError: the engine does not have it here.
        Skip: it falls back to something else.
    """
    g, d = s.networks()
    adam = fastgan.Adam(LR, s.work.kind.betas)
    anything: Any = {"executor": executor, "backend": backend, "precision": s.precision}
    engine = fastgan.Engine(
        g if s.work.whole else None, d, s.latent, s.work.kind.loss, s.work.kind.penalties(s.work.weight),
        s.n_critic, adam, adam, ema=None, device=s.device, seed=1, closed_form=closed_form, **anything,
    )  # fmt: skip
    players = "gd" if s.work.whole else "d"

    def given(noise: Noise) -> None:
        z, alpha, z_g = noise
        weights = alpha if s.work.weight and s.work.kind.loss == "wasserstein" else None
        for _ in range(s.n_critic):
            engine.d_step(s.real, z=z if s.work.whole else None, alpha=weights, fake=s.fake)
        if s.work.whole:
            engine.g_step(z=z_g, real=s.real if engine.loss.compares else None)

    def moments() -> list[torch.Tensor]:
        state = engine.state_dict()
        return [one["exp_avg"] for key in players for one in state[f"{key}_optimizer"]["state"].values()]

    real = s.real.repeat(s.n_critic, *[1] * (s.real.ndim - 1))
    fake = None if s.fake is None else s.fake.repeat(s.n_critic, *[1] * (s.fake.ndim - 1))
    start = copy.deepcopy(engine.state_dict())
    run = partial(engine.step, real, fake=fake)
    run()
    variants = [*engine._executor._variants.values()] if engine._executor is not None else []
    if executor not in ("eager", "persistent") and not (variants and variants[0].recording is not None):
        raise Skip(f"not recorded: {variants[0].why_unrecorded if variants else 'there is no variant'}")
    engine.load_state_dict(start)
    trained = (g, d) if s.work.whole else (d,)
    way = Way(run, given, (g, d), moments, engine, variants[0].recording if variants else None, trained)
    if calls > 1:
        way.many, way.calls = partial(variants[0].run, calls), calls
    return way


# ---- all ways


def hand_written(device: torch.device) -> dict[str, Callable[[Setting], Way]]:
    ways: dict[str, Callable[[Setting], Way]] = {"eager": by_hand, "eager again": by_hand}
    if device.type == "cuda":
        ways |= {"eager graph": partial(by_hand, graph=True), "eager graph again": partial(by_hand, graph=True)}
    return ways


def natively(s: Setting, executor: str, calls: int = 1) -> Way:
    """The engine on Triton kernels, where they are compiled."""
    if s.device.type != "cuda":
        raise Skip("kernels are timed on a GPU: the speed of Triton's interpreter says nothing")
    return by_engine(s, executor=executor, backend="triton", calls=calls)


ENGINE: dict[str, Callable[[Setting], Way]] = {
    "engine autograd": partial(by_engine, closed_form=False),
    "engine reference": by_engine,
    "engine reference graph": partial(by_engine, executor="graph"),
    "engine kernels": partial(natively, executor="eager"),
    "engine graph": partial(natively, executor="graph"),
    "engine graph, 20 a call": partial(natively, executor="graph", calls=20),
    "engine dependent": partial(natively, executor="dependent"),
    "engine persistent": partial(natively, executor="persistent"),
}


def compiled(device: torch.device) -> dict[str, Callable[[Setting], Way]]:
    graph = device.type == "cuda"
    return {
        "compiled, default": partial(by_hand, compiled={}, graph=graph, fused=True),
        "compiled, max-autotune": partial(
            by_hand, compiled={"mode": "max-autotune-no-cudagraphs"}, graph=graph, fused=True
        ),
    }


# ---- is it right?


def distance(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], start: Sequence[torch.Tensor] | None = None
) -> float:
    """Relative, in the norm over all tensors; with ``start``, of the ways from there."""
    x, y = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (a, b))
    origin = torch.cat([t.detach().double().flatten() for t in start]) if start is not None else torch.zeros_like(y)
    return float((x - y).norm() / (y - origin).norm())


@dataclass
class Standard:
    """The engine's plainest path: autograd, run eagerly. It takes the steps on given noise and on its own."""

    s: Setting
    _after: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)

    def after(self, given: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Parameters at the start, and parameters and moments after the steps."""
        if given not in self._after:
            self._after[given] = self._steps(by_engine(self.s, closed_form=False), given)
        return self._after[given]

    def _steps(self, way: Way, given: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        start = [p.detach().clone() for net in way.trained for p in net.parameters()]
        for noise in self.s.noise():
            if given:
                assert way.given is not None
                way.given(noise)
            else:
                way.run()
        after = [p.detach().clone() for net in way.trained for p in net.parameters()]
        return start, after, [m.clone() for m in way.moments()]

    def hold(self, way: Way, given: bool) -> dict[str, Any]:
        """How far a way is from this after the same steps, and whether that is rounding."""
        start, after, moments = self.after(given)
        own_start, own_after, own_moments = self._steps(way, given)
        found = {
            "moments_off": distance(own_moments, moments),
            "way_off": distance(own_after, after, start),
            "started_off": distance(own_start, start),
        }
        limits = LIMITS[self.s.precision]
        found["right"] = (
            found["moments_off"] <= limits[0] and found["way_off"] <= limits[1] and found["started_off"] == 0.0
        )
        return found


def prepared(
    s: Setting, ways: dict[str, Callable[[Setting], Way]], kept: dict[str, Way]
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Make each way and hold it to the engine; those that are right go to ``kept``.

    The hand-written ones take given noise. The engine's take their own, the same for every executor, so that what is
    timed is what is checked.
    """
    table: dict[str, dict[str, Any]] = {}
    standard = Standard(s)
    for label, make in ways.items():
        try:
            with s.products():
                way = make(s)
                table[label] = standard.hold(way, given=not label.startswith("engine"))
        except (fastgan.InputError, Skip) as e:
            table[label] = {"refused": str(e)}
            continue
        except Exception as e:  # a form that does not work is part of the result
            table[label] = {"failed": last_line(e)}
            continue
        if table[label]["right"]:
            kept[label] = way
        else:
            table[label]["wrong"] = "not the engine's update: not timed"
    return table
