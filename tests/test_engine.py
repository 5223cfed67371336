"""What the engine promises beyond the numbers of ``test_engine_parity``."""

from __future__ import annotations

import copy
import itertools
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import Conditional
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan import Adam, AdamW, Engine, InputError, Schedule
from fastgan.losses import get
from fastgan.penalties import DRAGAN, R1, R2, GradientPenalty, norm


def pair(dtype: torch.dtype = torch.float32, tail: tuple[nn.Module, ...] = ()) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    d = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), *tail)
    return g.to(dtype), d.to(dtype)


def engine(**changes: object) -> Engine:
    settings = {"latent": 4, "device": "cpu", "g_optimizer": Adam(1e-3), "d_optimizer": Adam(1e-3)} | changes
    g, d = settings.pop("networks", None) or pair()
    return Engine(g, d, **settings)


def real(rows: int = 8, step: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def weights(*modules: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for m in modules for t in m.state_dict().values()])


# ---- the iteration


def test_step_takes_n_critic_batches_in_order_from_a_tensor_or_a_feed() -> None:
    a, b, c = (engine(n_critic=3, penalties=(GradientPenalty(),)) for _ in range(3))
    x = real(24)
    a.step(x)
    b.step(iter([x[:8], (x[8:16], None), [x[16:]]]))
    for part in x.chunk(3):
        c.d_step(part)
    c.g_step()
    assert torch.equal(weights(a.generator, a.discriminator), weights(b.generator, b.discriminator))
    assert torch.equal(weights(a.generator, a.discriminator), weights(c.generator, c.discriminator))
    assert (a.d_updates, a.g_updates, a.iterations, a.images) == (3, 1, 1, 24)


def test_given_noise_replaces_the_drawn() -> None:
    a, b = engine(penalties=(GradientPenalty(), DRAGAN())), engine(penalties=(GradientPenalty(), DRAGAN()))
    keyed = {"seed": 0, "step": 0, "device": "cpu"}
    from fastgan.noise import Stream, normal, uniform

    a.d_step(real())
    b.d_step(
        real(),
        z=normal(8, 4, stream=Stream.D_LATENT, **keyed),
        alpha=uniform(8, 1, stream=Stream.ALPHA, **keyed)[:, 0],
        delta=normal(8, 6, stream=Stream.PERTURBATION, **keyed),
    )
    a.g_step()
    b.g_step(z=normal(8, 4, stream=Stream.G_LATENT, **keyed))
    assert torch.equal(weights(a.generator, a.discriminator), weights(b.generator, b.discriminator))


def test_noise_advances_and_depends_on_the_seed() -> None:
    seen = []
    latent_of: Callable = lambda m, args: seen.append(args[0].clone())  # noqa: E731
    a = engine()
    a.generator.register_forward_pre_hook(latent_of)
    for _ in range(2):
        a.step(real())
    b = engine(seed=1)
    b.generator.register_forward_pre_hook(latent_of)
    b.step(real())
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(seen, 2))


def test_own_latent_is_drawn_anew_for_every_update_and_again_after_a_reload() -> None:
    def latent(batch: int, generator: torch.Generator) -> torch.Tensor:
        if batch == 5:
            return torch.zeros(1, 4)
        return torch.rand(batch, 4, generator=generator) * 2 - 1

    a, b = engine(latent=latent), engine(latent=latent)
    a.step(real())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    a.step(real(step=1))
    b.step(real(step=1))
    assert torch.equal(weights(a.generator, a.discriminator), weights(b.generator, b.discriminator))
    assert not torch.equal(a.sample(3), a.sample(3))
    with pytest.raises(InputError, match=re.escape("Engine: latent gave [1, 4], expected [5, ...]")):
        a.d_step(real(5))


def test_the_generator_step_leaves_the_discriminator_alone_and_the_other_way_round() -> None:
    e = engine(networks=(pair()[0], nn.Sequential(nn.Linear(6, 1))))
    before = weights(e.discriminator)
    e.g_step(z=torch.randn(8, 4))
    assert torch.equal(before, weights(e.discriminator))
    assert all(p.grad is None for p in e.discriminator.parameters())
    before = torch.cat([p.detach().flatten() for p in e.generator.parameters()])
    e.d_step(real())
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in e.generator.parameters()]))


def test_building_an_engine_changes_neither_the_networks_nor_the_random_state() -> None:
    g, d = pair()
    d.insert(1, nn.Dropout(0.5))
    before, rng = weights(g, d), torch.get_rng_state()
    Engine(g, d, latent=4, device="cpu")
    assert torch.equal(before, weights(g, d))
    assert torch.equal(rng, torch.get_rng_state())
    assert g.training
    assert d.training
    assert not d._forward_hooks


# ---- sigmoid


class View(nn.Module):
    """A discriminator with a forward of its own, as tutorials write it."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).view(-1)


@pytest.mark.parametrize("wrap", [lambda d: d, View], ids=["sequential", "own-forward"])
def test_a_final_sigmoid_is_trained_on_its_logits(wrap: Callable) -> None:
    g, d = pair()
    plain = engine(networks=(g, d))
    g2, d2 = pair(tail=(nn.Sigmoid(),))
    ended = engine(networks=(g2, wrap(d2)))
    for i in range(3):
        plain.step(real(step=i))
        ended.step(real(step=i))
    assert torch.equal(weights(g, d), weights(g2, d2))
    assert "ends in Sigmoid" in ended.explain()
    assert "Sigmoid" not in plain.explain()
    out = ended.discriminator(real())
    assert ((out > 0) & (out < 1)).all()  # to its user it still gives probabilities


def test_a_final_sigmoid_that_is_used_elsewhere_too_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gate, self.sigmoid = nn.Linear(6, 1), nn.Linear(6, 1), nn.Sigmoid()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sigmoid(self.body(x) * self.sigmoid(self.gate(x)))

    with pytest.raises(InputError, match="its final Sigmoid is used elsewhere too"):
        engine(networks=(pair()[0], Gated()))


def test_a_final_torch_sigmoid_is_warned_of() -> None:
    class Functional(View):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self.main(x)).squeeze(1)

    with pytest.warns(UserWarning, match=r"ends in torch\.sigmoid"):
        engine(networks=(pair()[0], Functional(pair()[1])))


def test_a_sigmoid_inside_is_left_alone() -> None:
    g, _ = pair()
    d = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 1))
    assert "Sigmoid" not in engine(networks=(g, d)).explain()


# ---- penalties


def test_penalty_of_a_zero_gradient_has_a_finite_gradient() -> None:
    g, d = pair()
    for p in d[2].parameters():
        nn.init.zeros_(p)  # D is constant: its input gradient is exactly 0
    e = engine(networks=(g, d), penalties=(GradientPenalty(), DRAGAN()), loss="wasserstein")
    e.d_step(real())
    assert all(torch.isfinite(p.grad).all() for p in d.parameters())
    assert e.metrics()["penalty"] == pytest.approx(20.0)
    assert e.metrics()["skipped_steps"] == 0
    x = torch.zeros(2, 3, requires_grad=True)
    norm(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_norm_is_over_all_axes_but_the_batch() -> None:
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    expected = torch.stack([(row**2).sum() ** 0.5 for row in x])
    assert (norm(x) - expected).abs().max() < 1e-14


def test_lazy_penalty_steps_when_due_and_rescales_adam() -> None:
    e = engine(penalties=(R1(1.0, interval=4),), d_optimizer=Adam(1e-3, betas=(0.5, 0.9)))
    c = 4 / 5
    assert e._d.rule.lr == pytest.approx(1e-3 * c)
    assert e._d.rule.betas == pytest.approx((0.5**c, 0.9**c))
    for _ in range(9):
        e.d_step(real())
    assert e.state_dict()["d_optimizer"]["state"]["0.weight"]["step"] == 9 + 3  # after updates 0, 4 and 8
    assert "after every 4th update" in e.explain()


def test_batch_norm_under_a_penalty_is_warned_of_by_name() -> None:
    g, _ = pair()
    d = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with pytest.warns(UserWarning, match=r"discriminator layer '1' \(BatchNorm1d\)"):
        engine(networks=(g, d), penalties=(R1(1.0),))
    engine(networks=(g, d))  # filterwarnings=error: silent without a penalty


# ---- optimisers


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Adam(1e-2, (0.5, 0.9), weight_decay=0.1), lambda p: torch.optim.Adam(p, 1e-2, (0.5, 0.9), weight_decay=0.1)),
        (AdamW(1e-2, (0.5, 0.9)), lambda p: torch.optim.AdamW(p, 1e-2, (0.5, 0.9), weight_decay=0.01)),
    ],
    ids=["adam", "adamw"],
)
def test_settings_equal_torchs_optimisers(ours: Adam, theirs: Callable) -> None:
    (g, d), (other, d2) = pair(torch.float64), pair(torch.float64)
    for network in (g, other):  # rounding alone is the gradient of a bias before batch norm, and Adam would blow it up
        network[0].bias = None
    a = engine(networks=(other, d2), d_optimizer=ours, g_optimizer=ours)
    b = engine(networks=(g, d), d_optimizer=theirs(d.parameters()), g_optimizer=theirs(g.parameters()))
    for i in range(5):
        a.step(real(step=i, dtype=torch.float64))
        b.step(real(step=i, dtype=torch.float64))
    assert (weights(a.generator, a.discriminator) - weights(g, d)).abs().max() <= 1e-13


def test_a_users_optimiser_keeps_its_rate_under_the_users_control() -> None:
    g, d = pair()
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    e = engine(networks=(g, d), d_optimizer=optimizer)
    e.d_step(real())
    before = weights(d)
    optimizer.param_groups[0]["lr"] = 0.0
    e.d_step(real())
    assert torch.equal(before, weights(d))


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.RMSprop, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)]
)
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(kind: Callable) -> None:
    g, d = pair()
    e = engine(networks=(g, d), d_optimizer=kind(d.parameters()), g_optimizer=kind(g.parameters()), ema=None)
    e.d_step(real())
    before = copy.deepcopy(e.state_dict()["d_optimizer"]["state"])
    kept = weights(d)
    bad = real()
    bad[3, 2] = math.nan
    e.d_step(bad)
    assert torch.equal(kept, weights(d))
    for name, entry in e.state_dict()["d_optimizer"]["state"].items():
        for key, value in entry.items():
            same = before[name][key]
            assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    assert e.metrics()["skipped_steps"] == 1
    e.d_step(real())
    assert not torch.equal(kept, weights(d))
    assert torch.isfinite(weights(d)).all()


def test_schedules_equal_their_formulas() -> None:
    at = [Schedule("linear", steps=10, start=2, final=0.5).factor(torch.tensor(i)).item() for i in (0, 2, 6, 10, 99)]
    assert at == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    at = [Schedule("cosine", steps=8).factor(torch.tensor(i)).item() for i in (0, 4, 8)]
    assert at == pytest.approx([1, 0.5, 0])
    at = [Schedule(warmup=4).factor(torch.tensor(i)).item() for i in range(6)]
    assert at == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    at = Schedule("linear", steps=10, warmup=5).factor(torch.tensor(1)).item()
    assert at == pytest.approx(0.9 * 0.4)


def test_scheduled_training_equals_torchs_scheduler() -> None:
    schedule = Schedule("cosine", steps=12, warmup=3)
    a = engine(networks=pair(torch.float64), d_optimizer=Adam(1e-2, (0.5, 0.9), schedule=schedule))
    g, d = pair(torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), 1e-2, (0.5, 0.9))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 3) * (1 + math.cos(math.pi * min(i / 12, 1))) / 2
    )
    b = engine(networks=(g, d), d_optimizer=optimizer)
    for i in range(15):
        for e in (a, b):
            e.d_step(real(step=i, dtype=torch.float64))
        rate.step()
    assert (weights(a.discriminator) - weights(d)).abs().max() < 1e-13


# ---- average


def test_an_optimisers_own_step_works_on_after_the_engines() -> None:
    g, d = pair()
    optimizer = torch.optim.Adam(d.parameters(), 1e-2)
    e = engine(networks=(g, d), d_optimizer=optimizer)
    e.d_step(torch.full((8, 6), math.nan))
    before = weights(d)
    for p in d.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(before, weights(d))


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adagrad])
def test_a_skipped_first_step_does_not_cripple_an_optimiser(kind: Callable) -> None:
    """Exact where all state begins at zero; elsewhere the state of one step of nothing, which barely shows."""
    moved = []
    for first in (True, False):
        g, d = pair()
        e = engine(networks=(g, d), d_optimizer=kind(d.parameters(), lr=1e-2), ema=None)
        before = weights(d)
        if first:
            e.d_step(torch.full((8, 6), math.nan), z=torch.zeros(8, 4))
            assert torch.equal(before, weights(d))
        for i in range(5):
            e.d_step(real(step=i), z=torch.ones(8, 4))
        moved.append((weights(d) - before).norm().item())
    assert moved[0] == pytest.approx(moved[1], rel=0.2)  # NAdam: 14%, its momentum product is one step ahead


@pytest.mark.parametrize("other", [torch.optim.RMSprop, torch.optim.SGD, lambda p: torch.optim.Adam(p, amsgrad=True)])
def test_another_optimisers_state_is_refused(other: Callable) -> None:
    a = engine()
    a.step(real())
    g, d = pair()
    b = engine(networks=(g, d), d_optimizer=other(d.parameters()))
    with pytest.raises(InputError, match="checkpoint: its optimiser is Adam, expected"):
        b.load_state_dict(a.state_dict())
    b.step(real())
    with pytest.raises(InputError, match="expected Adam"):
        a.load_state_dict(b.state_dict())


def test_a_state_of_another_dtype_is_refused() -> None:
    a, b = engine(), engine(networks=pair(torch.float64))
    with pytest.raises(
        InputError, match=re.escape("generator.0.weight is torch.float32 [8, 4], the network's torch.float64")
    ):
        b.load_state_dict(a.state_dict())


def test_average_by_decay_covers_parameters_and_buffers() -> None:
    e = engine(ema=0.9)
    expected = {k: v.clone() for k, v in e.generator.state_dict().items()}
    for i in range(4):
        e.step(real(step=i))
        for k, v in e.generator.state_dict().items():
            expected[k] = 0.9 * expected[k] + 0.1 * v if v.is_floating_point() else v.clone()
    for k, v in e.generator_ema.state_dict().items():
        assert torch.allclose(v, expected[k], rtol=1e-6), k
    assert not torch.equal(e.sample(4, seed=1), e.sample(4, seed=1, ema=False))


def test_average_by_half_life_with_ramp_up() -> None:
    """Karras et al. 2020: decay = 0.5 ** (images per update / min(half-life, ramp-up * images so far))."""
    e = engine(networks=pair(torch.float64), ema=fastgan.EMA(halflife_kimg=0.1, rampup=0.5), n_critic=2)
    expected = e.generator[0].weight.detach().clone()
    for i in range(20):
        e.step(real(16, step=i, dtype=torch.float64))
        decay = 0.5 ** (16 / min(100, 0.5 * 16 * (i + 1)))
        expected = decay * expected + (1 - decay) * e.generator[0].weight.detach()
    assert (e.generator_ema[0].weight - expected).abs().max() < 1e-12


def test_no_average() -> None:
    e = engine(ema=None)
    e.step(real())
    assert e.generator_ema is None
    assert torch.equal(e.sample(4, seed=1), e.sample(4, seed=1, ema=False))


# ---- classes


def conditional(**changes: object) -> Engine:
    torch.manual_seed(0)
    return engine(networks=(Conditional(4, 6).double(), Conditional(6, 1).double()), n_classes=3, **changes)


def test_labels_reach_both_networks() -> None:
    """One iteration against a loop by hand: fakes and interpolates carry the labels of the real rows."""
    e = conditional(loss="wasserstein", penalties=(GradientPenalty(),), d_optimizer=Adam(1e-2), ema=None)
    g, d = copy.deepcopy(e.generator), copy.deepcopy(e.discriminator)
    x, z, alpha = real(dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2])
    e.d_step(x, labels=y, z=z, alpha=alpha)
    e.g_step(z=z, labels=y)
    opt = torch.optim.Adam(d.parameters(), 1e-2, (0.5, 0.999))
    fake = g(z, y).detach()
    mid = (alpha[:, None] * x + (1 - alpha[:, None]) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(d(mid, y).sum(), mid, create_graph=True)
    (d(fake, y).mean() - d(x, y).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()).backward()
    opt.step()
    opt = torch.optim.Adam(g.parameters(), 1e-3, (0.5, 0.999))
    (-d(g(z, y), y).mean()).backward()
    opt.step()
    assert (weights(e.discriminator) - weights(d)).abs().max() < 1e-12
    assert (weights(e.generator) - weights(g)).abs().max() < 1e-12


def test_labels_are_drawn_where_not_given_and_asked_for_where_needed() -> None:
    e = conditional()
    e.g_step(z=torch.randn(64, 4))
    assert e.sample(5).shape == (5, 6)
    assert e.sample(2, labels=torch.tensor([1, 2])).shape == (2, 6)
    with pytest.raises(InputError, match=r"d_step: the networks are conditional \(3 classes\), but no labels"):
        e.d_step(real())
    with pytest.raises(InputError, match=re.escape("d_step: labels are in 0 ... 3, expected 0 ... 2")):
        e.d_step(real(), labels=torch.tensor([0, 1, 2, 3] * 2))
    with pytest.raises(InputError, match=re.escape("d_step: labels are torch.int64 [3], expected integers [8]")):
        e.d_step(real(), labels=torch.zeros(3, dtype=torch.int64))


# ---- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_reduced_precision_stays_near_full_and_penalties_stay_fp32(precision: str) -> None:
    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return x

    seen: list = []
    g, d = pair()
    d.insert(1, Spy())
    full, low = engine(penalties=(R1(0.1),)), engine(networks=(g, d), precision=precision, penalties=(R1(0.1),))
    seen.clear()
    for i in range(3):
        full.step(real(step=i))
        low.step(real(step=i))
    assert (torch.float32, False) in seen
    if precision != "tf32":
        assert ({"bf16": torch.bfloat16, "fp16": torch.float16}[precision], True) in seen
    assert (weights(full.generator) - weights(g)).abs().max() < 0.02
    assert low.metrics()["penalty"] == pytest.approx(full.metrics()["penalty"], rel=0.05)
    assert low.sample(2).dtype == torch.float32


def test_fp16_scale_halves_on_overflow_and_grows_after_good_steps() -> None:
    g, d = pair()
    e = engine(networks=(g, d), precision="fp16", loss="wasserstein")
    for _ in range(4):
        e.d_step(real() * 1e-2)
    start, skipped = e._loss_scale.scale.item(), e.metrics()["skipped_steps"]
    kept = weights(d)
    e.d_step(real() * 1e4)  # the scaled gradient of the first layer is beyond fp16
    assert e._loss_scale.scale.item() == start / 2
    assert e.metrics()["skipped_steps"] == skipped + 1
    assert torch.equal(kept, weights(d))
    e._loss_scale.good_steps.fill_(1999)
    e.d_step(real() * 1e-2)
    assert e._loss_scale.scale.item() == start


def test_fp16_scale_survives_many_bad_batches() -> None:
    e = engine(precision="fp16", penalties=(R1(1.0, interval=2),))
    for _ in range(60):
        e.d_step(torch.full((8, 6), math.nan))
    before = weights(e.discriminator)
    for i in range(10):
        e.d_step(real(step=i))
    assert not torch.equal(before, weights(e.discriminator))


def test_the_newer_precision_setting_of_torch_is_left_to_its_user() -> None:
    code = """
import torch, fastgan
from torch import nn
torch.backends.cuda.matmul.fp32_precision = "tf32"
e = fastgan.Engine(nn.Linear(3, 2), nn.Linear(2, 1), latent=3, device="cpu")
e.step(torch.randn(4, 2))
assert "fp32_precision is set" in e.explain()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_float64_modules_train_in_float64() -> None:
    e = engine(networks=pair(torch.float64), precision="bf16")
    e.step(real())
    assert e.precision == "fp64"
    assert e.sample(2).dtype == torch.float64


# ---- what a step does not do


class ReadsBack(TorchDispatchMode):
    """Notes every op that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_in_a_step_reads_a_value_back(precision: str) -> None:
    schedule = Schedule("cosine", steps=100, warmup=5)
    e = engine(
        loss=get("relativistic", clip=1.0), penalties=(GradientPenalty(), R1(1.0, interval=2), R2(1.0), DRAGAN()),
        d_optimizer=Adam(schedule=schedule), ema=fastgan.EMA(halflife_kimg=1, rampup=0.05), precision=precision,
    )  # fmt: skip
    with ReadsBack() as watch:
        for i in range(3):
            e.step(real(step=i))
        assert watch.seen == []
        torch.ones(()).item()
    assert watch.seen  # the watch works


def test_penalties_of_different_intervals_are_summed() -> None:
    e = engine(penalties=(R1(2.0), R2(200.0, interval=3)), d_optimizer=Adam(0.0), networks=pair(torch.float64))
    for i in range(4):
        x, z = real(dtype=torch.float64, step=i), torch.randn(8, 4, dtype=torch.float64)
        e.d_step(x, z=z)
        at_real = squared_slope(e.discriminator, x)
        if i % 3 == 0:
            at_fake = squared_slope(e.discriminator, e.generator(z).detach())
        assert e.metrics()["penalty"] == pytest.approx((at_real + 100 * at_fake).item())


def squared_slope(d: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean squared norm of the input gradient."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(d(x).sum(), x)[0].square().sum(1).mean()


def test_a_penalty_of_ones_own_may_perturb() -> None:
    @dataclass  # not frozen, so without a hash
    class Own:
        noise: float
        interval: int = 1
        name = "own"
        place = "perturbed"

        def rows(self, gradient: torch.Tensor) -> torch.Tensor:
            return 3 * (norm(gradient) - 1).square()

    a, b = engine(penalties=(Own(0.3),)), engine(penalties=(DRAGAN(3.0, noise=0.3),))
    for e in (a, b):
        e.step(real())
    assert torch.equal(weights(a.discriminator), weights(b.discriminator))


def test_metrics_are_those_of_the_last_updates() -> None:
    e = engine(penalties=(R1(2.0),), d_optimizer=Adam(0.0), networks=pair(torch.float64))
    assert all(math.isnan(v) for k, v in e.metrics().items() if k != "skipped_steps")
    x, z = real(dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    d = e.discriminator
    e.d_step(x, z=z)
    fake = copy.deepcopy(e.generator)(z).detach()
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d(leaf).sum(), leaf, create_graph=True)
    loss = F.softplus(-d(x)).mean() + F.softplus(d(fake)).mean()
    penalty = (slope**2).sum(1).mean()
    grads = torch.autograd.grad(loss + penalty, list(d.parameters()), allow_unused=True)
    got = e.metrics()
    assert got["d_loss"] == pytest.approx(loss.item())
    assert got["penalty"] == pytest.approx(penalty.item())
    assert got["d_real"] == pytest.approx(d(x).mean().item())
    assert got["d_fake"] == pytest.approx(d(fake).mean().item())
    assert got["d_grad_norm"] == pytest.approx(sum((g**2).sum().item() for g in grads if g is not None) ** 0.5)
    assert math.isnan(got["g_loss"])


# ---- saving


def drawn(**changes: object) -> Engine:
    torch.manual_seed(1)
    d = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    return engine(
        networks=(pair()[0], d), penalties=(GradientPenalty(), R1(0.5, interval=3)), n_critic=2,
        d_optimizer=Adam(1e-3, schedule=Schedule("linear", steps=30)), ema=fastgan.EMA(halflife_kimg=0.2, rampup=0.1),
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_going_on_from_a_state_equals_never_having_stopped(precision: str) -> None:
    a, b = drawn(precision=precision), drawn(precision=precision)
    for i in range(5):
        a.step(real(16, step=i))
    a.sample(3)
    state = copy.deepcopy(a.state_dict())
    rest = []
    for i in range(5, 10):
        a.step(real(16, step=i))
        rest.append(a.metrics())
    sample = a.sample(3)
    torch.manual_seed(99)
    b.load_state_dict(state)
    for i, before in zip(range(5, 10), rest, strict=True):
        b.step(real(16, step=i))
        assert b.metrics() == before
    assert torch.equal(
        weights(a.generator, a.discriminator, a.generator_ema), weights(b.generator, b.discriminator, b.generator_ema)
    )
    assert torch.equal(sample, b.sample(3))


def test_a_state_of_other_networks_is_refused_by_name_and_changes_nothing() -> None:
    a = engine()
    other = nn.Sequential(nn.Linear(6, 17), nn.LeakyReLU(0.2), nn.Linear(17, 1))
    b = engine(networks=(pair()[0], other))
    before = weights(a.generator, a.discriminator)
    b.step(real())
    with pytest.raises(
        InputError,
        match=re.escape("discriminator.0.weight is torch.float32 [17, 6], the network's torch.float32 [16, 6]"),
    ):
        a.load_state_dict(b.state_dict())
    deeper = engine(networks=(pair()[0], nn.Sequential(*pair()[1], nn.LeakyReLU(), nn.Linear(1, 1))))
    with pytest.raises(InputError, match=re.escape("discriminator.4.weight is not in the network")):
        a.load_state_dict(deeper.state_dict())
    assert torch.equal(before, weights(a.generator, a.discriminator))


# ---- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hing"}, "unknown loss 'hing'; did you mean 'hinge'?"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"latent": 0}, "Engine: latent is 0, expected >= 1"),
        ({"latent": 5}, "generator: does not accept latents [2, 5]"),
        ({"n_critic": 0}, "Engine: n_critic is 0, expected a whole number >= 1"),
        ({"n_critic": 1.5}, "Engine: n_critic is 1.5, expected a whole number >= 1"),
        ({"ema": "half"}, "Engine: ema is 'half', expected None, a decay or fastgan.EMA"),
        ({"loss": None}, "loss is None, expected a name or a fastgan.losses.Loss"),
        ({"device": "meta"}, "Engine: device is 'meta', expected 'auto', 'cpu' or 'cuda'"),
        ({"executor": "graph"}, "Engine: executor is 'graph', but device is cpu: graphs need a CUDA device"),
        ({"executor": "dependent"}, "Engine: executor is 'dependent', but device is cpu: graphs need a CUDA device"),
        ({"executor": "persistent"}, "Engine: executor is 'persistent', which runs kernels: see backend"),
        ({"executor": "grpah"}, "unknown executor 'grpah'; did you mean 'graph'?"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"device": "gpu0"}, "Engine: device is 'gpu0'"),
        ({"ema": 1.5}, "EMA: decay is 1.5"),
        ({"d_optimizer": "adam"}, "d_optimizer: got str, expected Adam"),
        ({"networks": (pair()[0], nn.Linear(7, 1))}, "discriminator: does not accept the generator's output [2, 6]"),
        ({"networks": (pair()[0], nn.Flatten(0))}, "discriminator: gave [12] for 2 samples"),
        ({"networks": (pair()[0].bfloat16(), pair()[1].bfloat16())}, "parameters are torch.bfloat16"),
        ({"networks": (pair()[0], pair()[1].requires_grad_(False))}, "no parameter that requires a gradient"),
    ],
)
def test_bad_arguments_end_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        engine(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.step(torch.zeros(5, 6)), "step: real has 5 rows, expected a multiple of n_critic = 2"),
        (lambda e: e.step([torch.zeros(4, 6)]), "step: real is a list, expected a tensor or an iterator"),
        (lambda e: e.step(iter([torch.zeros(4, 6)])), "step: the feed ended"),
        (lambda e: e.step(torch.zeros(4, 7)), "d_step: real is [2, 7], but the generator makes [B, 6]"),
        (lambda e: e.d_step(torch.zeros(4, 6, dtype=torch.uint8)), "d_step: real has dtype torch.uint8"),
        (lambda e: e.d_step(torch.zeros(4, 6), alpha=torch.zeros(4, 1)), "alpha: has shape [4, 1], expected [4]"),
        (lambda e: e.d_step(torch.zeros(4, 6), torch.zeros(1, 4)), "d_step: z has shape [1, 4], expected [4, 4]"),
        (lambda e: e.g_step(torch.zeros(1, 4), torch.zeros(8, 6)), "g_step: z has shape [1, 4], expected [8, 4]"),
        (lambda e: e.sample(8, latents=torch.zeros(1, 4)), "sample: latents has shape [1, 4], expected [8, 4]"),
        (lambda e: e.d_step(torch.zeros(4, 6), labels=torch.zeros(4).long()), "d_step: labels were given, but"),
        (lambda e: e.g_step(), "g_step: the batch size is not known"),
        (lambda e: e.g_step(z=torch.zeros(4, 4)), "g_step: the relativistic loss compares with real samples"),
    ],
)
def test_bad_calls_end_in_one_line(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        call(engine(loss="relativistic", n_critic=2))
    assert "\n" not in str(error.value)


def test_an_optimiser_over_other_parameters_is_refused() -> None:
    g, d = pair()
    with pytest.raises(InputError, match="d_optimizer: the optimiser does not hold exactly the network's"):
        engine(networks=(g, d), d_optimizer=torch.optim.Adam(g.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: R1(-1.0), "r1: gamma is -1.0, expected >= 0"),
        (lambda: GradientPenalty(interval=0), "gradient-penalty: interval is 0"),
        (lambda: Adam(betas=(0.5, 1.0)), "Adam: betas is (0.5, 1.0)"),
        (lambda: AdamW(lr=-1.0), "AdamW: lr is -1.0"),
        (lambda: Schedule("linear"), "Schedule: steps is 0, expected more than start, which is 0"),
        (lambda: Schedule("step"), "Schedule: kind is 'step'"),
        (lambda: fastgan.EMA(), "EMA: give either decay or halflife_kimg"),
        (lambda: fastgan.EMA(decay=0.9, rampup=0.1), "EMA: rampup is 0.1"),
        (lambda: get("wasserstein", clip=0.0), "loss: clip is 0.0, expected > 0"),
    ],
)
def test_bad_settings_end_in_one_line(make: Callable, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


def test_explain_names_every_phase() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = engine(penalties=(GradientPenalty(5.0), R2(1.0, interval=8)), loss="hinge", n_critic=3).explain()
    assert text.splitlines()[0] == "fp32 on cpu, hinge loss"
    assert (
        "discriminator: hinge + GradientPenalty(weight=5.0, target=1.0, interval=1) (3x per iteration): closed form"
        in text
    )
    assert "R2(gamma=1.0, interval=8) (after every 8th update, times 8)" in text
    assert "generator: hinge (once per iteration): closed form" in text


def test_a_phase_through_autograd_is_said_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    g, d = pair()
    e = engine(networks=(nn.Sequential(*g, nn.Hardtanh()), d))
    for i in range(3):
        e.step(real(step=i))
    (record,) = caplog.records
    assert record.getMessage() == (
        "fastgan: the generator's update (non-saturating) runs through autograd: "
        "generator: layer '4' (Hardtanh) is not known"
    )
    caplog.clear()
    engine(networks=(nn.Sequential(*g, nn.Hardtanh()), d), closed_form=False).step(real())
    assert not caplog.records  # it was asked for
