"""Closed-form updates against the autograd phases, on networks drawn at random."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from networks import Maker, Shape, Sum, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan import _native, losses
from fastgan import plan as plans
from fastgan.arithmetic import Arithmetic
from fastgan.autograd import Autograd, Points, Samples
from fastgan.losses import LOSSES
from fastgan.models.packing import Packed
from fastgan.penalties import DRAGAN, R1, R2, GradientPenalty, Penalty
from fastgan.phases import Phase
from fastgan.plan import Plan, Setting
from fastgan.reader import read

CPU = torch.device("cpu")
REDUCED = {"bf16": torch.bfloat16}
ULP = torch.finfo(torch.float64).eps
METRICS = ("d_loss", "d_real", "d_fake", "penalty")


@dataclass
class Update:
    """One update of one player: modules, and what it is given; ``loss`` is ``None`` for a lazy phase."""

    critic: nn.Module
    shape: Shape
    batch: int
    loss: str | None = "non-saturating"
    penalties: tuple[Penalty, ...] = ()
    every: int = 1
    generator: nn.Module | None = None
    latent: int = 0
    seed: int = 0
    native: bool = True

    def inputs(self, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        r = torch.Generator().manual_seed(seed)
        pac = getattr(self.critic, "pac", 1)
        x = {k: torch.randn(self.batch, *self.shape, generator=r) for k in ("real", "fake", "delta")}
        x["alpha"] = torch.rand(self.batch // pac, generator=r)
        x["z"] = torch.randn(self.batch, self.latent, generator=r)
        return {k: v.to(dtype) for k, v in x.items()}

    def to(self, dtype: torch.dtype) -> Update:
        generator = None if self.generator is None else copy.deepcopy(self.generator).to(dtype)
        return replace(self, critic=copy.deepcopy(self.critic).to(dtype), generator=generator)


@dataclass
class Outcome:
    """What an update leaves behind."""

    gradients: dict[str, Tensor | None]
    metrics: dict[str, Tensor]
    buffers: dict[str, Tensor]
    plan: Plan | None = None
    held: object = None  # memory that the plan works on


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {k: p for k, p in module.named_parameters() if p.requires_grad}


def buffers_of(update: Update) -> dict[str, Tensor]:
    modules = {"critic": update.critic, "generator": update.generator}
    return {f"{k}.{n}": b for k, m in modules.items() if m is not None for n, b in m.named_buffers()}


def by_plan(update: Update, precision: str) -> Outcome:
    """In closed form; the plan runs on something else first, so that nothing may be left from one run to the next."""
    with nullcontext() if update.native else patch.object(_native, "ext", None):
        return _by_plan(update, precision)


def _by_plan(update: Update, precision: str) -> Outcome:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    update = update.to(dtype)
    params = trained(update.generator if update.generator is not None else update.critic)
    into = {p: torch.full_like(p, float("nan"), requires_grad=False) for p in params.values()}
    setting = Setting(
        CPU, dtype, REDUCED.get(precision, dtype), lambda p, dtype: p.detach().to(dtype),  # the same where it is that
        into,
    )  # fmt: skip
    metrics = {k: torch.full((), float("nan"), dtype=dtype) for k in (*METRICS, "g_loss")}
    pac = getattr(update.critic, "pac", 1)
    critic = read(update.critic, torch.zeros(2 * pac, *update.shape, dtype=dtype), what="discriminator")
    if update.generator is not None:
        assert update.loss is not None
        network = read(update.generator, torch.zeros(2, update.latent, dtype=dtype), what="generator")
        for one in (network, critic):
            assert plans.refusal(one, update.batch, setting) is None
        compares = LOSSES[update.loss].compares
        plan = plans.generator(network, critic, update.loss, compares, update.batch, setting, metrics)
    else:
        why = plans.refusal(
            critic, update.batch, setting, penalties=update.penalties, adversarial=update.loss is not None
        )
        assert why is None, why
        plan = plans.discriminator(critic, update.loss, update.penalties, update.every, update.batch, setting, metrics)
    before = {k: b.clone() for k, b in buffers_of(update).items()}
    for seed in (update.seed + 1, update.seed):
        for k, b in buffers_of(update).items():
            b.copy_(before[k])
        x = update.inputs(seed, dtype)
        for name, place in plan.inputs.items():
            place.copy_(x[name.split()[0]].reshape(place.shape))
        torch.manual_seed(seed)
        plan.run()
    gradients = {k: into[p] if p in plan.trained else None for k, p in params.items()}
    return Outcome(gradients, metrics, buffers_of(update), plan, (update, into))


def by_autograd(update: Update, precision: str) -> Outcome:
    """Through torch's autograd."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    update = update.to(dtype)
    params = trained(update.generator if update.generator is not None else update.critic)
    metrics = {k: torch.full((), float("nan"), dtype=dtype) for k in (*METRICS, "g_loss")}
    phase = Phase("discriminator", update.loss is not None, update.penalties, update.every)
    autograd = Autograd(
        update.generator, update.critic, loss=LOSSES[update.loss or "wasserstein"],
        arithmetic=Arithmetic(precision, CPU), dtype=dtype, packed=getattr(update.critic, "pac", 1),
        scale=torch.ones(()),
    )  # fmt: skip
    x = update.inputs(update.seed, dtype)
    torch.manual_seed(update.seed)
    if update.generator is not None:
        real = x["real"] if autograd.loss.compares else None
        grads = autograd.generator_gradients(x["z"], real, None, list(params.values()), metrics["g_loss"])
    else:
        points = Points(autograd, Samples(x["real"], x["fake"], None, x["alpha"], x["delta"]), bool(update.penalties))
        measured = {**metrics, update.every: metrics["penalty"]}
        grads = autograd.discriminator_gradients(phase, points, list(params.values()), measured)
    return Outcome(dict(zip(params, grads, strict=True)), metrics, buffers_of(update))


def assert_equal(got: Outcome, expected: Outcome) -> None:
    """Per gradient to 1e-12.

    Some are zero but for rounding, as those of a bias ahead of a norm: their summands cancel. These are about as large
    as all gradients together, or, where real and fake rows cancel everywhere, about 1, as all values of the networks
    are: a floor of some ulp of both.
    """
    given = {k: g for k, g in expected.gradients.items() if g is not None}
    total = sum(float(g.norm()) ** 2 for g in given.values()) ** 0.5
    for k, g in got.gradients.items():
        assert (g is None) == (k not in given), f"{k}: {'no' if g is None else 'a'} gradient"
        if g is not None:
            error, size = float((g - given[k]).norm()), float(given[k].norm())
            assert error <= 1e-12 * size + 64 * ULP * (1 + total), (
                f"{k}: error {error:.3e} of {size:.3e}, all {total:.3e}"
            )
    for kind in ("metrics", "buffers"):
        a, b = getattr(got, kind), getattr(expected, kind)
        for k in b:
            torch.testing.assert_close(
                a[k], b[k], rtol=1e-12, atol=1e-13, equal_nan=True, msg=lambda m, k=k: f"{k}: {m}"
            )


def check(update: Update) -> Outcome:
    if currently_in_test_context():
        note(update)
    got = by_plan(update, "fp64")
    assert_equal(got, by_autograd(update, "fp64"))
    return got


# ---- at random

EXAMPLES = 60  # of each of the tests below
random = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
    phases=[hypothesis.Phase.generate],  # shrinking networks takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip
TERMS: list[tuple[Penalty, ...]] = [
    (GradientPenalty(10.0),),
    (R1(0.8),),
    (R2(0.5),),
    (DRAGAN(3.0, noise=0.3),),
    (R1(0.8), R2(0.5)),
    (R2(0.5), R1(0.8), R1(0.1)),
    (GradientPenalty(10.0, target=0.0), GradientPenalty(0.7, target=2.0)),
    (DRAGAN(3.0, noise=0.3), DRAGAN(1.0, noise=0.1), DRAGAN(0.5, noise=0.3, target=0.3)),
    (GradientPenalty(10.0), R2(0.3)),
    (R1(0.2), GradientPenalty(1.0), R2(0.3), DRAGAN(3.0)),
]
some_loss = st.sampled_from([*LOSSES])


native = st.sampled_from([True, True, False])  # or torch ops in place of native passes


def freeze(data: st.DataObject, module: nn.Module) -> None:
    """At times leave some parameters out."""
    parameters = list(module.parameters())
    if data.draw(st.booleans()):
        for p in data.draw(st.lists(st.sampled_from(parameters), max_size=len(parameters) - 1)):
            p.requires_grad_(False)
    if not any(p.requires_grad for p in parameters):
        parameters[0].requires_grad_(True)


def finish(data: st.DataObject, module: nn.Module) -> nn.Module:
    randomise(module, data.draw(st.integers(0, 2**32)))
    freeze(data, module)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module


def penalised(data: st.DataObject) -> dict[str, Any]:
    """A loss with penalties, penalties alone, or a loss alone."""
    every = data.draw(st.sampled_from([1, 1, 1, 4]))
    if every > 1:
        terms = data.draw(st.sampled_from(TERMS))
        return {"loss": None, "penalties": terms, "every": every, "native": data.draw(native)}
    terms = data.draw(st.sampled_from([(), *TERMS]))
    return {"loss": data.draw(some_loss), "penalties": terms, "native": data.draw(native)}


@pytest.mark.parametrize("smooth", [False, True], ids=["kinked", "smooth"])
@random
@given(data=st.data())
def test_discriminators_of_rows(data: st.DataObject, smooth: bool) -> None:
    make = Maker(data.draw, smooth=smooth)
    pac, width = data.draw(st.sampled_from([1, 1, 2, 3, 4])), data.draw(st.sampled_from([1, 2, 5, 8]))
    critic = make.rows(width * pac, data.draw(st.sampled_from([1, 1, 1, 3])))
    critic = finish(data, critic if pac == 1 else Packed(critic, pac))
    batch = pac * data.draw(st.integers(1, 5))
    check(Update(critic, (width,), batch, **penalised(data), seed=data.draw(st.integers(0, 99))))


@pytest.mark.parametrize("smooth", [False, True], ids=["kinked", "smooth"])
@random
@given(data=st.data())
def test_discriminators_of_images(data: st.DataObject, smooth: bool) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(3, 6), st.integers(3, 6)))
    critic = finish(data, Maker(data.draw, smooth=smooth).images(shape))
    check(Update(critic, shape, data.draw(st.integers(1, 4)), **penalised(data), seed=data.draw(st.integers(0, 99))))


@random
@given(data=st.data())
def test_discriminators_with_batch_norm(data: st.DataObject) -> None:
    make = Maker(data.draw, smooth=True, batch_norm=True)
    shape = data.draw(st.sampled_from([(5,), (2, 5, 4)]))
    critic = finish(data, make.rows(5, 1, depth=3) if len(shape) == 1 else make.images(shape))
    critic.train(data.draw(st.booleans()))
    check(Update(critic, shape, data.draw(st.integers(2, 5)), loss=data.draw(some_loss)))


@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
@random
@given(data=st.data())
def test_generators(data: st.DataObject, images: bool) -> None:
    make = Maker(data.draw, smooth=True, batch_norm=True)
    shape: Shape = (data.draw(st.sampled_from([1, 4, 6])),)
    latent, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    if images:
        start = (data.draw(st.integers(1, 3)), 3, 2)
        block, shape = make.image_block(start)
        n = start[0] * start[1] * start[2]
        generator: nn.Module = nn.Sequential(nn.Linear(latent, n), nn.Unflatten(1, start), *block, nn.Tanh())
        critic = Maker(data.draw, smooth=data.draw(st.booleans())).images(shape, depth=2)
    else:
        generator = nn.Sequential(make.rows(latent, shape[0], depth=4), make.activation())
        pac = data.draw(st.sampled_from([1, 1, 2]))
        critic = Maker(data.draw, smooth=data.draw(st.booleans())).rows(shape[0] * pac, 1, depth=3)
        critic, batch = (critic, batch) if pac == 1 else (Packed(critic, pac), batch * pac)
    for module in (generator, critic):
        finish(data, module).train(data.draw(st.booleans()))
    check(
        Update(critic, shape, batch, data.draw(some_loss), generator=generator, latent=latent, native=data.draw(native))
    )


@random
@given(data=st.data())
def test_generators_against_batch_norm(data: st.DataObject) -> None:
    """Critics whose running statistics move on in a generator's update too."""
    generator = finish(data, Maker(data.draw, smooth=True).rows(3, 5, depth=2))
    critic = finish(data, Maker(data.draw, smooth=True, batch_norm=True).rows(5, 1, depth=3))
    check(Update(critic, (5,), data.draw(st.integers(2, 4)), data.draw(some_loss), generator=generator, latent=3))


@pytest.mark.parametrize("through", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((2, 1)), nn.AdaptiveAvgPool2d(1), nn.ReLU()])
def test_a_bias_gets_a_gradient_of_zero_where_autograd_gives_one(through: nn.Module) -> None:
    """As Adam goes on with a moment then, but leaves a parameter without gradient as it is."""
    critic = nn.Sequential(
        nn.Conv2d(2, 3, 1), copy.deepcopy(through), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.LazyLinear(1)
    )
    critic(torch.zeros(1, 2, 4, 4))
    gradients = check(Update(randomise(critic, 0), (2, 4, 4), 3, None, (R1(1.0),), 4)).gradients
    assert gradients["4.bias"] is None
    assert (gradients["0.bias"] is None) == (isinstance(through, nn.AdaptiveAvgPool2d) and through.output_size == 1)


def test_penalty_that_no_trained_parameter_is_part_of() -> None:
    critic = randomise(nn.Linear(3, 1), 0)
    critic.weight.requires_grad_(False)
    assert check(Update(critic, (3,), 4, None, (R1(1.0),), 2)).gradients == {"bias": None}


def test_batch_norm_that_is_used_twice_is_refused() -> None:
    norm = nn.BatchNorm1d(4)
    critic = read(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm), torch.zeros(2, 4), what="discriminator")
    setting = Setting(CPU, torch.float32, torch.float32, lambda p, dtype: p, {})
    assert plans.refusal(critic, 4, setting) == (
        "layer '1' (BatchNorm) is used twice, and its statistics move on from one use to the next"
    )


# ---- particular networks

Made = tuple[nn.Module, Shape]


def mlp(activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2)) -> Made:
    widths = [7, 32, 24, 16]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers, nn.Linear(16, 1)), (7,)


def residual_images() -> Made:
    body = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1, groups=2), nn.LeakyReLU(0.2), nn.Conv2d(6, 6, 3, 1, 1))
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), Sum(nn.Identity(), body), nn.AvgPool2d(2), nn.LeakyReLU(0.2),
        nn.Conv2d(6, 8, 3, 1, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 2 * 2, 1),
    ), (3, 8, 8)  # fmt: skip


def normed_images() -> Made:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, 1, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 4, 3, 2, 1),
        nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3),
    ), (2, 8, 8)  # fmt: skip


def normed_rows() -> Made:
    linear = parametrizations.spectral_norm(nn.Linear(7, 32))
    return nn.Sequential(linear, nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 16), nn.Softplus(), nn.Linear(16, 1)), (7,)


PARTICULAR: dict[str, Callable[[], Made]] = {
    "kinked rows": mlp,
    "smooth rows": lambda: mlp(nn.Tanh),
    "normed rows": normed_rows,
    "residual images": residual_images,
    "normed images": normed_images,
}
REDUCIBLE = ("kinked rows", "smooth rows", "residual images")
WORKLOADS: list[tuple[str, tuple[Penalty, ...]]] = [
    ("non-saturating", ()),
    ("wasserstein", (GradientPenalty(10.0),)),
    ("relativistic", (R1(0.8), R2(0.5))),
]


def assert_as_accurate_on_average(update: Update, precision: str, draws: int = 12) -> None:
    """The criterion of closeness.py on root mean squares over several draws.

    Rounding puts single pre-activations on the other side of a kink, here and there for each of the two; the largest
    error of one draw says which of them met more of these.
    """
    squares: dict[str, Tensor] = {}
    update = update.to(torch.float32)  # fp64 starts from the same numbers
    for seed in range(draws):
        update = replace(update, seed=seed)
        exact, plain, got = by_autograd(update, "fp64"), by_autograd(update, precision), by_plan(update, precision)
        for kind in ("gradients", "metrics"):
            for k, reference in getattr(exact, kind).items():
                g, p = getattr(got, kind)[k], getattr(plain, kind)[k]
                assert (g is None) == (p is None) == (reference is None)
                if reference is not None and not reference.isnan().any():
                    sums = torch.stack([(g - reference).norm(), (p - reference).norm(), reference.norm()]).square()
                    squares[k] = squares.get(k, torch.zeros(3, dtype=torch.float64)) + sums
    floor = max(float(s[2]) for k, s in squares.items() if k in exact.gradients) ** 0.5 * torch.finfo(torch.float32).eps
    assert len(squares) > len(exact.gradients)
    for k, s in squares.items():
        error, plain_error, size = s.sqrt().tolist()
        bound = 2 * plain_error + 2 * torch.finfo(torch.float32).eps * size
        # gradients that are zero but for rounding: see assert_equal
        assert error <= bound or (size < 1e-9 * floor and error <= floor), f"{k}: error {error:.3e} > {bound:.3e}"


@pytest.mark.parametrize(("loss", "terms"), WORKLOADS, ids=[w[0] for w in WORKLOADS])
@pytest.mark.parametrize(("name", "precision"), [*((k, "fp32") for k in PARTICULAR), *((k, "bf16") for k in REDUCIBLE)])
def test_accuracy_of_discriminator_updates(name: str, precision: str, loss: str, terms: tuple[Penalty, ...]) -> None:
    critic, shape = PARTICULAR[name]()
    assert_as_accurate_on_average(Update(randomise(critic, 1), shape, 16, loss, terms), precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["non-saturating", "relativistic"])
@pytest.mark.parametrize("name", REDUCIBLE)
def test_accuracy_of_generator_updates(name: str, loss: str, precision: str) -> None:
    critic, shape = PARTICULAR[name]()
    if len(shape) == 1:
        generator = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 7), nn.Tanh())
    else:
        generator = nn.Sequential(
            nn.Linear(5, 4 * 4 * 4), nn.Unflatten(1, (4, 4, 4)), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
    modules = {"critic": randomise(critic, 2), "generator": randomise(generator, 3)}
    assert_as_accurate_on_average(Update(shape=shape, batch=16, loss=loss, latent=5, **modules), precision)


# ---- what an update costs


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("terms", "products"),
    [((), 8), ((GradientPenalty(),), 12), ((R1(1.0),), 12), ((R1(1.0), R2(1.0)), 12)],
    ids=["none", "gradient-penalty", "r1", "r1+r2"],
)
def test_matrix_products(terms: tuple[Penalty, ...], products: int) -> None:
    critic, shape = mlp()
    outcome = check(Update(randomise(critic, 0), shape, 6, "wasserstein", terms))
    plan = outcome.plan
    assert plan is not None
    with Products() as seen:
        plan.run()
    assert seen.count == products
    assert plan.program.kinds.count("product") == products
    assert len(plan.program.kinds) == len(plan.program.calls)


# ---- whole engines


def conv_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 4 * 4 * 4, bias=False), nn.Unflatten(1, (4, 4, 4)), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def plain_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.LeakyReLU(0.2), nn.Linear(12, 7), nn.Tanh())


def row_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 7), nn.Tanh())


def packed() -> nn.Module:
    return Packed(nn.Sequential(nn.Linear(14, 9), nn.LeakyReLU(0.2), nn.Dropout(0.4), nn.Linear(9, 1)), 2)


@dataclass
class Lasso:
    """A penalty that no plan knows."""

    interval: int = 1
    name: str = "lasso"
    place: str = "fake"

    def rows(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).abs().sum(1)


Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any]]
ENGINES: dict[str, Pair] = {
    "gradient penalty, lazy r1": (
        row_generator, lambda: mlp()[0],
        {"loss": "wasserstein", "penalties": [GradientPenalty(10.0), R1(1.0, interval=3), DRAGAN(interval=2)]},
    ),
    "all lazy, clipped": (
        row_generator, lambda: mlp(nn.SiLU)[0],
        {"loss": losses.get("hinge", clip=0.5), "penalties": [R2(1.0, interval=2), R1(1.0, interval=2)]},
    ),
    "images, relativistic": (
        conv_generator, lambda: residual_images()[0], {"loss": "relativistic", "penalties": [R1(0.8), R2(0.5)]}
    ),
    "packed, dropout": (
        row_generator, packed, {"loss": "least-squares", "penalties": [GradientPenalty(10.0), R1(1.0, interval=2)]}
    ),
    "ends in sigmoid": (
        row_generator, lambda: nn.Sequential(mlp()[0], nn.Sigmoid()), {"loss": "minimax", "penalties": [DRAGAN()]}
    ),
    "spectral norm": (row_generator, lambda: normed_rows()[0], {"loss": "hinge", "penalties": [R1(1.0, interval=2)]}),
    "frozen, batch norm": (
        conv_generator,
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1).requires_grad_(False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1),
        ),
        {"loss": "non-saturating"},
    ),
}  # fmt: skip


def engine_of(pair: Pair, closed_form: bool, dtype: torch.dtype = torch.float64, **changes: Any) -> fastgan.Engine:
    make_generator, make_critic, options = pair
    torch.manual_seed(0)
    generator, critic = make_generator(), make_critic()
    return fastgan.Engine(
        generator.to(dtype), critic.to(dtype), latent=5, device="cpu", closed_form=closed_form,
        **{"n_critic": 2, "g_optimizer": fastgan.Adam(1e-3), "d_optimizer": fastgan.Adam(1e-3), **options, **changes},
    )  # fmt: skip


def state_of(engine: fastgan.Engine) -> Tensor:
    assert engine.generator is not None
    modules = (engine.generator, engine.discriminator)
    tensors = [v for m in modules for v in m.state_dict().values() if v.is_floating_point()]
    return torch.cat([v.detach().double().flatten() for v in tensors])


def assert_paths(engine: fastgan.Engine, batch: int, *, closed_form: bool) -> None:
    for phase in engine.phases:
        assert isinstance(engine._plans().find(phase, batch), Plan) == closed_form, phase
    assert engine.explain().count("closed form\n") == (len(engine.phases) if closed_form else 0)


@pytest.mark.parametrize("name", ENGINES)
def test_engines(name: str) -> None:
    closed, plain = engine_of(ENGINES[name], True), engine_of(ENGINES[name], False)
    torch.manual_seed(1)
    for i in range(3):
        real = torch.randn(8, *(closed.sample_shape or ()), dtype=torch.float64)
        for engine in (closed, plain):
            torch.manual_seed(i)
            engine.step(real)
        a, b = closed.metrics(), plain.metrics()
        assert a == pytest.approx(b, rel=1e-10, abs=1e-12, nan_ok=True)
        assert torch.linalg.norm(state_of(closed) - state_of(plain)) <= 1e-10 * torch.linalg.norm(state_of(plain))
    assert_paths(closed, 4, closed_form=True)
    assert_paths(plain, 4, closed_form=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_phases_of_both_kinds(precision: str) -> None:
    """A lazy phase through autograd takes the fakes that a closed form has made."""
    changes = {"dtype": torch.float32, "penalties": [R1(1.0), Lasso(interval=2)], "precision": precision}
    closed, plain = (engine_of(RUNS["wgan-gp"], c, **changes) for c in (True, False))
    torch.manual_seed(1)
    real = torch.randn(8, 7)
    for engine in (closed, plain):
        torch.manual_seed(2)
        engine.step(real)
    assert "closed form" in closed.explain()
    a, b = closed.metrics(), plain.metrics()
    assert a == pytest.approx(b, rel={"fp32": 1e-4, "bf16": 0.05}[precision], abs=0.01, nan_ok=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_penalties_see_given_fakes_in_full_precision(precision: str) -> None:
    penalty = {}
    for closed_form in (True, False):
        torch.manual_seed(0)
        engine = fastgan.Engine(
            None, mlp()[0], loss="wasserstein", penalties=[R2(1.0), GradientPenalty(1.0)], device="cpu",
            precision=precision, closed_form=closed_form, d_optimizer=fastgan.Adam(1e-3),
        )  # fmt: skip
        engine.d_step(torch.randn(64, 7), fake=torch.randn(64, 7))
        penalty[closed_form] = engine.metrics()["penalty"]
        assert ("closed form" in engine.explain()) == closed_form
    assert penalty[True] == pytest.approx(penalty[False], rel=1e-6)


# ---- whole runs

RUNS: dict[str, Pair] = {
    "wgan-gp": (plain_generator, lambda: mlp()[0], {"loss": "wasserstein", "penalties": [GradientPenalty(10.0)]}),
    "r1+r2": (plain_generator, lambda: mlp()[0], {"loss": "relativistic", "penalties": [R1(0.8), R2(0.5)]}),
    "hinge": (conv_generator, lambda: residual_images()[0], {"loss": "hinge"}),
}


def trained_for(steps: int, name: str, closed_form: bool, dtype: torch.dtype) -> Tensor:
    """The networks' state after that many updates of each player, on the same numbers whatever the dtype."""
    engine = engine_of(RUNS[name], closed_form, dtype, n_critic=1, precision="fp32")
    r = torch.Generator().manual_seed(0)
    for _ in range(steps):
        real = torch.randn(8, *(engine.sample_shape or ()), generator=r) * 0.5 + 0.3
        z, alpha, next_z = torch.randn(8, 5, generator=r), torch.rand(8, generator=r), torch.randn(8, 5, generator=r)
        engine.d_step(real.to(dtype), z=z.to(dtype), alpha=alpha.to(dtype))
        engine.g_step(z=next_z.to(dtype), real=real.to(dtype))
    for phase in engine.phases:
        assert isinstance(engine._plans().find(phase, 8), Plan) == closed_form
    return state_of(engine)


@pytest.mark.parametrize("name", RUNS)
def test_training(name: str) -> None:
    """fp64: the same but for what 200 steps make of rounding. fp32: as near to that as through autograd."""
    run = functools.partial(trained_for, 200, name)
    exact, closed = run(False, torch.float64), run(True, torch.float64)
    plain_error, error = (torch.linalg.norm(run(c, torch.float32) - exact) for c in (False, True))
    assert torch.linalg.norm(closed - exact) <= 1e-12 * torch.linalg.norm(exact)
    assert error <= 2 * plain_error + 2 * torch.finfo(torch.float32).eps * torch.linalg.norm(exact)
