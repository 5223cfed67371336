"""Steps are safe to capture: N replays of a recorded iteration equal N more eager ones, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_emulator import EmulatedGraph, NewMemory, natively
from torch import nn

import fastgan
from fastgan import Adam, AdamW, Engine, Schedule, noise
from fastgan._native import native_available
from fastgan.losses import Loss, get
from fastgan.models.packing import Packed
from fastgan.penalties import DRAGAN, R1, R2, GradientPenalty

needs_extension = pytest.mark.skipif(not native_available(), reason="fastgan._C was not built")
PATHS = [pytest.param(True, id="native", marks=needs_extension), pytest.param(False, id="torch-ops")]
Networks = tuple[nn.Module | None, nn.Module]


def mlp() -> Networks:
    g = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 6))
    d = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    return g, d


def with_dropout() -> Networks:
    g, d = mlp()
    return g, nn.Sequential(*d[:2], nn.Dropout(0.3), *d[2:])


def curved() -> Networks:
    """Batch norm and tanh in the generator, layer norm and smooth activations in the discriminator."""
    g = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6), nn.Tanh())
    d = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 1))
    return g, d


def normed() -> Networks:
    """Batch norm in both."""
    g, _ = curved()
    return g, nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def spectral() -> Networks:
    g, d = mlp()
    d[0] = nn.utils.parametrizations.spectral_norm(d[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d[2] = nn.utils.spectral_norm(d[2])
    return g, d


def packed() -> Networks:
    g, _ = mlp()
    return g, Packed(nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(16, 1)), 2)


def convolutional() -> Networks:
    g = nn.Sequential(
        nn.Linear(4, 8 * 4), nn.Unflatten(1, (8, 2, 2)), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 1, 3, 1, 1), nn.Tanh(),
    )  # fmt: skip
    d = nn.Sequential(
        nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(4, 8, 3, 1, 1),
        nn.GroupNorm(2, 8), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(32, 1),
    )  # fmt: skip
    return g, d


def opaque() -> Networks:
    """A discriminator that cannot be read, with dropout."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.drop = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 1), nn.Dropout(0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.drop(self.a(x)) * torch.tanh(self.b(x)))

    return mlp()[0], Product()


@dataclass
class Case:
    """An engine and what it is expected to do; ``variants``: iterations after which what is due repeats."""

    networks: Callable[[], Networks] = mlp
    settings: dict[str, Any] = field(default_factory=dict)
    paths: str = "cc"  # of each phase: closed form or autograd
    variants: int = 1
    user: Callable[[Any], torch.optim.Optimizer] | None = None

    def engine(self) -> Engine:
        torch.manual_seed(1)
        g, d = self.networks()
        if self.user is not None:
            self.settings |= {"g_optimizer": self.user(g.parameters()), "d_optimizer": self.user(d.parameters())}
        schedule = Schedule("cosine", steps=30, warmup=5)
        rates = {"g_optimizer": Adam(3e-3, schedule=schedule), "d_optimizer": Adam(3e-3, (0.0, 0.9), schedule=schedule)}
        average = {"ema": fastgan.EMA(halflife_kimg=0.05, rampup=0.3)}
        return Engine(g, d, **({"latent": 4, "device": "cpu"} | rates | average | self.settings))

    def batch(self, e: Engine, step: int) -> torch.Tensor:
        rows = 8 * e.n_critic
        return torch.randn(rows, *(e.sample_shape or (6,)), generator=torch.Generator().manual_seed(step))


def user_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=torch.tensor(3e-3), fused=True)


GP = GradientPenalty()
ALL = (GP, R1(0.5), R2(0.3), DRAGAN(2.0))
CASES = {
    "vanilla": Case(),
    "wgan-gp": Case(settings={"loss": "wasserstein", "penalties": (GP,), "n_critic": 3}),
    "wgan-clip": Case(settings={"loss": get("wasserstein", clip=0.05), "n_critic": 2, "d_optimizer": AdamW(1e-2)}),
    "hinge-r1": Case(settings={"loss": "hinge", "penalties": (R1(1.0),), "ema": 0.9}),
    "relativistic-r1-r2": Case(settings={"loss": "relativistic", "penalties": (R1(1.0), R2(1.0))}),
    "all-penalties": Case(with_dropout, {"penalties": ALL, "loss": "least-squares"}),
    "lazy": Case(settings={"penalties": (GP, R1(1.0, interval=3)), "n_critic": 2}, paths="ccc", variants=3),
    "two-lazy": Case(settings={"penalties": (DRAGAN(interval=2), R2(1.0, interval=4))}, paths="cccc", variants=4),
    "curved": Case(curved, {"penalties": ALL, "loss": "wasserstein"}),
    "batch-norm": Case(normed),
    "spectral": Case(spectral, {"penalties": (R1(1.0),), "loss": "hinge"}),
    "packed": Case(packed, {"penalties": (GP,), "loss": "wasserstein"}),
    "convolutional": Case(convolutional, {"penalties": (R1(1.0),), "loss": "relativistic"}),
    "user-adam": Case(settings={"penalties": (GP,)}, user=user_adam),
    "user-sgd": Case(user=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "opaque-user-adam": Case(opaque, {"penalties": (GP,), "loss": get("hinge", clip=0.1)}, "aa", user=user_adam),
    "opaque": Case(opaque, {"penalties": ALL}, paths="aa"),
    "autograd-lazy": Case(
        spectral, {"closed_form": False, "penalties": (R1(1.0, interval=2),), "loss": "relativistic"}, "aaa", 2
    ),
    "autograd-batch-norm": Case(normed, {"closed_form": False, "loss": get("wasserstein", clip=0.05)}, "aa"),
    "mixed": Case(settings={"loss": Loss("own", lambda r, f: F.softplus(f - r), lambda f, r: -f),
                            "penalties": (R1(1.0, interval=2),)}, paths="aca", variants=2),
    "bf16": Case(settings={"precision": "bf16", "loss": "hinge", "n_critic": 2}),
    "bf16-penalties": Case(settings={"precision": "bf16", "penalties": (GP, R1(1.0, interval=2))}, paths="ccc",
                           variants=2),
    "bf16-convolutional": Case(convolutional, {"precision": "bf16", "penalties": (R1(1.0),)}, paths="aa"),
    "fp16": Case(settings={"precision": "fp16", "penalties": (GP,)}, paths="aa"),
    "discriminator-alone": Case(lambda: (None, mlp()[1]), {"penalties": (GP,)}, paths="c"),
}  # fmt: skip


def results(e: Engine) -> dict[str, torch.Tensor]:
    """Everything that a step changes on the device, torch's random state included."""
    out: dict[str, torch.Tensor] = {"scale": e._loss_scale.scale, "torch's": torch.get_rng_state()}
    out |= {"d_count": e._d_count, "g_count": e._g_count, "images": e._image_count}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                put(f"{name}.{key}", inner)
        elif isinstance(value, list):
            put(name, dict(enumerate(value)))
        elif isinstance(value, torch.Tensor):
            out[name] = value

    state = e.state_dict()
    put("", {k: v for k, v in state.items() if k not in ("counters", "torch_rng")})
    return {k: v.detach().clone() for k, v in out.items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k].nan_to_num(7.0), b[k].nan_to_num(7.0))]


def step(e: Engine, x: torch.Tensor) -> None:
    e.step(x, fake=x.flip(0) * 2 if e.generator is None else None)


def paths(e: Engine) -> str:
    lines = e.explain().splitlines()
    found = [line.rsplit(": ", 1)[1] for line in lines if line.startswith(("discriminator: ", "generator: "))]
    return "".join(f[0] for f in found)


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_replays_equal_eager_steps(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    n = case.variants
    natively(monkeypatch, native)

    eager = case.engine()
    torch.manual_seed(2)
    for i in range(5 * n):
        step(eager, case.batch(eager, i))
    expected = results(eager)
    assert paths(eager) == case.paths

    e = case.engine()
    x = torch.empty_like(case.batch(e, 0))
    torch.manual_seed(2)
    for i in range(2 * n):  # plans, moments and optimisers' states are made
        x.copy_(case.batch(e, i))
        step(e, x)
    graphs = []
    for i in range(2 * n, 3 * n):
        x.copy_(case.batch(e, i))
        with EmulatedGraph() as graph:
            step(e, x)
        graphs.append(graph)
    for i in range(3 * n, 5 * n):
        x.copy_(case.batch(e, i))
        graphs[i % n].replay()
    assert [g.reads_back for g in graphs] == [[]] * n
    assert [g.from_host for g in graphs] == [[]] * n
    assert differing(results(e), expected) == []
    assert torch.isfinite(expected[".d_optimizer.grad_norm"])
    if native and "a" not in case.paths:
        assert all(g.native for g in graphs)
    if case.user is None and "a" not in case.paths and native:
        assert all("run" in g.native for g in graphs)


@pytest.mark.parametrize("native", PATHS)
def test_updates_recorded_one_by_one_replay_in_any_order(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    natively(monkeypatch, native)
    case = CASES["all-penalties"]
    order = "ddgdgdddgg"
    e, eager = case.engine(), case.engine()
    x = case.batch(e, 0)

    def update(e: Engine, which: str, x: torch.Tensor) -> None:
        e.d_step(x) if which == "d" else e.g_step()

    torch.manual_seed(2)
    for i, which in enumerate("dgdg" + order):
        update(eager, which, case.batch(eager, i))
    expected = results(eager)
    torch.manual_seed(2)
    graphs = {}
    for i, which in enumerate("dgdg" + order):
        x.copy_(case.batch(e, i))
        if i < 2:
            update(e, which, x)
        elif which not in graphs:
            with EmulatedGraph() as graphs[which]:
                update(e, which, x)
        else:
            graphs[which].replay()
    assert differing(results(e), expected) == []


# ---- failures that have to be seen


def train(update: Callable[[], None], replayed: int) -> EmulatedGraph:
    """One update to begin with, one recorded, the rest eager or replayed."""
    update()
    with EmulatedGraph() as graph:
        update()
    for _ in range(4):
        graph.replay() if replayed else update()
    return graph


@pytest.mark.parametrize(
    ("make", "safe"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), True),
        (lambda p: torch.optim.Adam(p, torch.tensor(1e-2), fused=True), True),
        (lambda p: torch.optim.Adam(p, 1e-2, foreach=False), False),
        (lambda p: torch.optim.NAdam(p, 1e-2, foreach=False), False),
    ],
    ids=["sgd", "adam-fused", "adam", "nadam"],
)
def test_a_step_counter_on_the_host_drifts(make: Callable[[Any], torch.optim.Optimizer], safe: bool) -> None:
    ends = []
    for replayed in (True, False):
        torch.manual_seed(0)
        net, x = nn.Linear(8, 1), torch.randn(16, 8)
        optimizer = make(net.parameters())

        def update(net: nn.Module = net, x: torch.Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)
            F.softplus(net(x)).mean().backward()
            optimizer.step()

        graph = train(update, replayed)
        ends.append(net.weight.detach())
    assert torch.equal(*ends) == safe
    assert bool(graph.reads_back) != safe


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda t: t.sum().item(), "aten::_local_scalar_dense"),
        (lambda t: bool((t > 0).any()), "aten::_local_scalar_dense"),
        (lambda t: torch.equal(t, t), "aten::equal"),
        (lambda t: t.nonzero(), "aten::nonzero"),
        (lambda t: t[t > 0], "aten::nonzero"),
        (lambda t: t.masked_select(t > 0), "aten::masked_select"),
        (lambda t: t.index_put_((t > 0,), t[0]), "aten::nonzero"),
        (lambda t: t.tolist(), "tolist"),
        (lambda t: t.numpy(), "numpy"),
        (lambda t: torch.unique(t), "aten::_unique2"),
    ],
)
def test_reading_back_is_named(read: Callable[[torch.Tensor], object], name: str) -> None:
    with EmulatedGraph() as graph:
        read(torch.ones(3) * 2)
    assert name in graph.reads_back


def test_a_number_from_the_host_is_named() -> None:
    with EmulatedGraph() as graph:
        torch.tensor(3.0)
    assert graph.from_host == ["aten::lift_fresh"]


def drifts(case: Case, spoil: Callable[[Engine, EmulatedGraph], None] = lambda e, g: None) -> list[str]:
    """What of an engine's state differs after replays."""
    ends = []
    for replayed in (True, False):
        e = case.engine()
        torch.manual_seed(2)
        x = case.batch(e, 0)
        step(e, x)
        with EmulatedGraph() as graph:
            step(e, x)
        spoil(e, graph)
        for _ in range(3):
            graph.replay() if replayed else step(e, x)
        ends.append(results(e))
    return differing(*ends)


def test_an_own_latent_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    natively(monkeypatch, native_available())

    def latent(batch: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(batch, 4, generator=generator)

    assert drifts(Case()) == []
    assert ".generator.0.weight" in drifts(Case(settings={"latent": latent}))


def test_a_rate_that_python_sets_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    natively(monkeypatch, native_available())

    def spoil(e: Engine, graph: EmulatedGraph) -> None:
        for group in e.d_optimizer.param_groups:
            group["lr"] = 0.5

    assert drifts(Case(user=lambda p: torch.optim.Adam(p, 1e-3))) == []
    assert ".discriminator.0.weight" in drifts(Case(user=lambda p: torch.optim.Adam(p, 1e-3)), spoil)


def test_a_rate_in_a_tensor_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    natively(monkeypatch, native_available())

    def spoil(e: Engine, graph: EmulatedGraph) -> None:
        for group in e.d_optimizer.param_groups:
            group["lr"].fill_(0.5)

    assert drifts(Case(user=user_adam), spoil) == []


def test_noise_and_torchs_own_random_numbers_advance() -> None:
    step, x = torch.tensor(0), torch.empty(5)
    keyed = {"seed": 3, "stream": noise.Stream.ALPHA, "step": step, "device": "cpu"}

    def draw() -> list[torch.Tensor]:
        step.add_(1)
        drawn = [noise.uniform(2, 3, **keyed), noise.normal(2, 3, **keyed), noise.integers(2, 9, **keyed)]
        return [noise.bits(2, 3, **keyed), *drawn, x.bernoulli_(0.5), torch.rand(3), F.dropout(torch.ones(9), 0.5)]

    torch.manual_seed(0)
    eager = [[t.clone() for t in draw()] for _ in range(4)]
    step.zero_()
    torch.manual_seed(0)
    with EmulatedGraph() as graph:
        out = draw()
    for expected in eager:
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        graph.replay()


@needs_extension
def test_a_native_call_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    natively(monkeypatch)
    case = CASES["wgan-gp"]
    assert drifts(case) == []
    e = case.engine()
    step(e, case.batch(e, 0))
    with EmulatedGraph() as graph:
        step(e, case.batch(e, 0))
    for name in set(graph.native):

        def spoil(e: Engine, graph: EmulatedGraph, name: str = name) -> None:
            graph.tape = [t for t in graph.tape if getattr(t[0], "__name__", "") != name]

        assert drifts(case, spoil), name


# ---- memory


def allocated(case: Case, steps: int = 2) -> set[str]:
    """Ops that made memory in an iteration after some."""
    e = case.engine()
    batches = [case.batch(e, i) for i in range(steps + 1)]
    for i in range(steps):
        step(e, batches[i])
    assert set(paths(e)) == {"c"}
    with NewMemory() as new:
        step(e, batches[steps])
    return {name for name, _ in new.made}


def two_by_128() -> Networks:
    g = nn.Sequential(nn.Linear(4, 128), nn.LeakyReLU(0.2), nn.Linear(128, 2))
    d = nn.Sequential(nn.Linear(2, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    return g, d


@needs_extension
@pytest.mark.parametrize(
    "case",
    [
        CASES["vanilla"],
        CASES["wgan-gp"],
        CASES["wgan-clip"],
        Case(two_by_128, {"loss": "relativistic", "penalties": (R1(1.0), R2(1.0))}),
    ],
    ids=["vanilla", "wgan-gp", "wgan-clip", "r1-r2"],
)
def test_an_iteration_of_dense_networks_allocates_nothing(case: Case) -> None:
    assert allocated(case) == set()


@needs_extension
def test_convolutional_plans_allocate_what_convolutions_return_alone() -> None:
    g = nn.Sequential(
        nn.Linear(4, 32), nn.Unflatten(1, (8, 2, 2)), nn.ReLU(), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(4, 1, 3, 1, 1), nn.Tanh(),
    )  # fmt: skip
    d = nn.Sequential(
        nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(4, 8, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 1),
    )  # fmt: skip
    case = Case(lambda: (g, d), {"loss": "wasserstein", "penalties": (GP, R1(1.0))})
    assert allocated(case) == {"aten::convolution", "aten::convolution_backward"}


def test_what_allocates_is_noticed() -> None:
    a, b = torch.ones(3), torch.empty(3)
    with NewMemory() as new:
        torch.add(a, a, out=b)
        b.view(1, 3).mul_(2)
        assert new.made == []
        a + a
    assert new.made == [("aten::add", 12)]
