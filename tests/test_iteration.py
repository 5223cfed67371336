"""Iterations on kernels: the same numbers as plans in PyTorch ops, in a counted number of launches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import distance
from torch import nn

import fastgan
from fastgan import Adam, Engine, Schedule
from fastgan.errors import InputError
from fastgan.kernels._launch import Launch
from fastgan.models.packing import Packed
from fastgan.penalties import DRAGAN, R1, R2, GradientPenalty

pytestmark = pytest.mark.interpreted

Networks = tuple[nn.Module, nn.Module]
CRITIC = {"loss": "wasserstein", "penalties": [GradientPenalty(10.0)]}


def mlp() -> Networks:
    g = nn.Sequential(
        nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 20), nn.LeakyReLU(0.1), nn.Linear(20, 10), nn.Tanh()
    )  # fmt: skip
    d = nn.Sequential(nn.Linear(10, 24), nn.LeakyReLU(0.2), nn.Linear(24, 18), nn.LeakyReLU(0.2), nn.Linear(18, 1))
    return g, d


def shallow() -> Networks:
    """One hidden layer each, without biases; sigmoid at the generator's end."""
    g = nn.Sequential(nn.Linear(5, 12, bias=False), nn.Linear(12, 10), nn.Sigmoid())
    return g, nn.Sequential(nn.Linear(10, 33, bias=False), nn.ReLU(), nn.Linear(33, 1, bias=False))


def smooth() -> Networks:
    """Curved layers, norms and dropout: few patterns fit."""
    g = nn.Sequential(nn.Linear(5, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh())
    d = nn.Sequential(
        nn.Linear(10, 16), nn.LayerNorm(16), nn.LeakyReLU(0.2), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1)
    )
    return g, d


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(nn.functional.leaky_relu(self.one(x), 0.2))


def residual() -> Networks:
    g, _ = mlp()
    return g, nn.Sequential(nn.Linear(10, 16), Residual(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def packed() -> Networks:
    g, _ = mlp()
    return g, Packed(nn.Sequential(nn.Linear(20, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)), 2)


def several_logits() -> Networks:
    g, _ = mlp()
    return g, nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.Linear(16, 3))


def convolutional() -> Networks:
    g = nn.Sequential(nn.Linear(5, 16), nn.Unflatten(1, (4, 2, 2)), nn.ReLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1))
    d = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1))
    return g, d


def frozen() -> Networks:
    g, d = mlp()
    d[2].weight.requires_grad_(False)
    return g, d


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "non-saturating": (mlp, {}),
    "wgan-gp": (mlp, CRITIC),
    "wgan-gp, two critic updates": (mlp, {**CRITIC, "n_critic": 2}),
    "r1": (mlp, {"penalties": [R1(1.0)]}),
    "r1, every second update": (mlp, {"penalties": [R1(1.0, interval=2)]}),
    "r1 and r2": (mlp, {"penalties": [R1(1.0), R2(0.5)]}),
    "r2": (mlp, {"penalties": [R2(0.5)]}),
    "r1 and wgan-gp": (mlp, {"penalties": [R1(1.0), GradientPenalty(2.0)]}),
    "minimax, dragan": (mlp, {"loss": "minimax", "penalties": [DRAGAN(1.0, 0.3)]}),
    "hinge": (mlp, {"loss": "hinge"}),
    "least-squares": (mlp, {"loss": "least-squares"}),
    "relativistic, r1 and r2": (mlp, {"loss": "relativistic", "penalties": [R1(1.0), R2(1.0)]}),
    "shallow": (shallow, CRITIC),
    "smooth": (smooth, {"penalties": [R1(1.0)]}),
    "residual": (residual, CRITIC),
    "packed": (packed, CRITIC),
    "several logits": (several_logits, {"penalties": [R1(1.0)]}),
    "convolutional": (convolutional, {"penalties": [R1(1.0)]}),
    "frozen weight": (frozen, CRITIC),
    "schedule, decay, half-life": (mlp, {
        "g_optimizer": fastgan.AdamW(1e-3, schedule=Schedule("cosine", steps=20, warmup=3)),
        "ema": fastgan.EMA(halflife_kimg=0.05, rampup=0.2),
    }),
}  # fmt: skip


def engine(networks: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Engine:
    torch.manual_seed(0)
    g, d = (n.to(dtype) for n in networks())
    adam = Adam(1e-3, (0.0, 0.9))
    return Engine(
        g, d, **{"latent": 5, "seed": 3, "g_optimizer": adam, "d_optimizer": adam, "precision": "fp32"} | options
    )


def batches(e: Engine, n: int, rows: int = 6) -> Iterator[torch.Tensor]:
    for i in range(n):
        noise = torch.Generator().manual_seed(i)
        yield torch.randn(rows * e.n_critic, *(e.sample_shape or ()), generator=noise).to(e.device, e.dtype)


@pytest.mark.parametrize("name", CASES)
def test_iterations_equal_those_in_torch_ops(name: str, device: torch.device) -> None:
    networks, options = CASES[name]
    plain, kernels = (engine(networks, backend=b, device=device, **options) for b in ("reference", "triton"))
    for real in batches(plain, 10 if name in ("non-saturating", "wgan-gp", "r1") else 3):
        plain.step(real)
        kernels.step(real)
        assert distance(plain, kernels) < 1e-12
    assert kernels.metrics() == pytest.approx(plain.metrics(), rel=1e-9, abs=1e-12, nan_ok=True)
    assert distance(plain, engine(networks, backend="reference", device=device, **options)) > 1e-3  # it trains


@pytest.mark.parametrize("name", ["non-saturating", "wgan-gp", "r1"])
def test_ten_iterations_in_fp32_err_no_more_than_torch_ops(name: str, device: torch.device) -> None:
    networks, options = CASES[name]
    exact = engine(networks, backend="reference", device=device, **options)
    plain, kernels = (engine(networks, torch.float32, backend=b, device=device, **options)
                      for b in ("reference", "triton"))  # fmt: skip
    for real in batches(exact, 10):
        for e in (exact, plain, kernels):
            e.step(real.float())
    assert distance(kernels, exact) <= 2 * distance(plain, exact) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["non-saturating", "wgan-gp", "r1", "residual"])
def test_half_precision_is_as_near_as_autograd(name: str, device: torch.device) -> None:
    """One update of each player in fp16, the loss scaled; the penalty's operands are fp16 too."""
    networks, options = CASES[name]
    gradients = []
    for dtype, backend, precision in (
        (torch.float64, "reference", "fp32"), (torch.float32, "reference", "fp16"), (torch.float32, "triton", "fp16"),
    ):  # fmt: skip
        e = engine(networks, dtype, backend=backend, precision=precision, device=device, **options)
        e._loss_scale.scale.fill_(256)
        (real,) = batches(e, 1)
        e.step(real)
        assert e.metrics()["skipped_steps"] == 0
        moments = e.state_dict()["d_optimizer"]["state"] | {"g": e.state_dict()["g_optimizer"]["state"]}
        g = [s["exp_avg"] for s in (*moments.pop("g").values(), *moments.values())]  # (1 - beta1) g, unscaled
        gradients.append([t.double() for t in g])
    exact, plain, kernels = gradients
    for g, p, k in zip(exact, plain, kernels, strict=True):
        ulp = torch.finfo(torch.float16).eps * g.abs().max()
        assert (k - g).abs().max() <= 2 * (p - g).abs().max() + 4 * ulp


def test_the_vanilla_pair_is_seventeen_launches() -> None:
    """G 100-256-512-784, D 784-512-256-1, one update each: noise, data, moments, average and counters included."""
    g = nn.Sequential(
        nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784), nn.Tanh()
    )  # fmt: skip
    e = Engine(g, big_critic(), loss="minimax", backend="triton", device="cpu")
    e._plans().refresh()
    e.batch = 64
    calls = e._lay_out(64, [(tuple(e._due()),)])[0].calls
    assert len(calls) <= 17
    assert all(isinstance(call, Launch) for call in calls)


@pytest.mark.parametrize("loss", ["wasserstein", "non-saturating"])
def test_a_penalised_critic_update_is_twelve_launches(loss: str) -> None:
    g = nn.Sequential(
        nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784), nn.Tanh()
    )  # fmt: skip
    penalty = GradientPenalty(10.0) if loss == "wasserstein" else R1(1.0)
    e = Engine(g, big_critic(), loss=loss, penalties=[penalty], backend="triton", device="cpu")
    e._plans().refresh()
    generator, e.generator = e.generator, None  # the critic's update alone, with its fakes
    calls = e._lay_out(64, [(tuple(e._due()),)])[0].calls
    e.generator = generator
    assert len(calls) <= 12
    assert all(isinstance(call, Launch) for call in calls)


def big_critic() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)
    )


def test_every_second_gradient_penalty_has_its_own_variant(device: torch.device) -> None:
    e = engine(mlp, backend="triton", device=device, penalties=[R1(1.0, interval=3)])
    for real in batches(e, 4):
        e.step(real)
    assert len(e._executor._variants) == 2


def test_another_batch_size_is_another_variant(device: torch.device) -> None:
    plain, kernels = (engine(mlp, backend=b, device=device) for b in ("reference", "triton"))
    for rows in (6, 4, 6):
        for e in (plain, kernels):
            e.step(next(batches(e, 1, rows)))
    assert distance(plain, kernels) < 1e-12
    assert len(kernels._executor._variants) == 2


def test_gradients_are_the_parameters_own(device: torch.device) -> None:
    plain, kernels = (engine(frozen, backend=b, device=device) for b in ("reference", "triton"))
    for e in (plain, kernels):
        e.step(next(batches(e, 1)))
    for network in ("generator", "discriminator"):
        for p, q in zip(getattr(plain, network).parameters(), getattr(kernels, network).parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or (p.grad - q.grad).abs().max() < 1e-12


def test_single_updates_on_kernels_take_given_noise(device: torch.device) -> None:
    plain, kernels = (engine(mlp, backend=b, device=device, **CRITIC) for b in ("reference", "triton"))
    noise = torch.Generator().manual_seed(0)
    for real in batches(plain, 2):
        z, alpha = (torch.rand(*s, generator=noise).to(device, torch.float64) for s in ((6, 5), (6,)))
        for e in (plain, kernels):
            e.d_step(real, z=z, alpha=alpha)
            e.g_step(z=z)
        kernels.step(real)
        plain.step(real)
    assert distance(plain, kernels) < 1e-12


def test_one_player_may_have_a_torch_optimiser(device: torch.device) -> None:
    ends = []
    for backend, player in itertools.product(("reference", "triton"), ("g", "d")):
        torch.manual_seed(0)
        g, d = (n.double().to(device) for n in mlp())
        theirs = torch.optim.Adam((g if player == "g" else d).parameters(), lr=torch.tensor(1e-3), fused=True)
        e = Engine(g, d, latent=5, seed=3, backend=backend, device=device, **{f"{player}_optimizer": theirs})
        for real in batches(e, 2):
            e.d_step(real)
            e.g_step()
        ends.append(e)
    for plain, kernels in zip(ends[:2], ends[2:], strict=True):
        assert distance(plain, kernels) < 1e-12


def test_another_seed_is_other_noise(device: torch.device) -> None:
    plain, kernels = (engine(mlp, backend=b, device=device) for b in ("reference", "triton"))
    for e in (plain, kernels):
        e.step(next(batches(e, 1)))
        e.seed = 77
        e.step(next(batches(e, 1)))
    assert distance(plain, kernels) < 1e-12


def test_given_fakes_take_the_place_of_the_generators(device: torch.device) -> None:
    plain, kernels = (engine(mlp, backend=b, device=device) for b in ("reference", "triton"))
    for real in batches(plain, 2):
        for e in (plain, kernels):
            e.step(real, fake=real.flip(0) * 2)
    assert distance(plain, kernels) < 1e-12
    assert kernels.metrics()["d_fake"] == pytest.approx(plain.metrics()["d_fake"], rel=1e-9)


def test_what_the_user_changes_between_iterations_counts(device: torch.device) -> None:
    plain, kernels = (engine(mlp, backend=b, device=device) for b in ("reference", "triton"))
    for i, real in enumerate(batches(plain, 4)):
        for e in (plain, kernels):
            with torch.no_grad():
                e.discriminator[0].weight.mul_(0.9)
                if i == 1:
                    e.discriminator[0].bias.data = e.discriminator[0].bias.data.clone()
                if i == 2:
                    e.discriminator[2].bias.requires_grad_(False)
            e.step(real)
    assert distance(plain, kernels) < 1e-12


def test_a_copy_in_lower_precision_follows_the_user(device: torch.device) -> None:
    """fp16 operands are a copy that the optimiser writes: a change in place reaches it before the next iteration."""
    e, fresh = (engine(mlp, torch.float32, backend="triton", precision="fp16", device=device) for _ in range(2))
    real = next(batches(e, 1))
    e.step(real)
    with torch.no_grad():
        for p, q in zip(e.discriminator.parameters(), fresh.discriminator.parameters(), strict=True):
            p.mul_(0.5)
            q.copy_(p)
        for p, q in zip(e.generator.parameters(), fresh.generator.parameters(), strict=True):
            q.copy_(p)
    for one in (e, fresh):
        one.d_step(real, z=torch.ones(6, 5))
    assert e.metrics()["d_loss"] == fresh.metrics()["d_loss"]


def test_a_step_with_a_bad_gradient_is_skipped(device: torch.device) -> None:
    e = engine(mlp, backend="triton", device=device)
    first, second = batches(e, 2)
    e.step(first)
    before = copy.deepcopy(list(e.discriminator.parameters()))
    e.step(torch.full_like(second, float("nan")))
    assert all(torch.equal(p, q) for p, q in zip(before, e.discriminator.parameters(), strict=True))
    assert e.metrics()["skipped_steps"] == 1
    e.step(second)
    assert not torch.equal(before[0], next(e.discriminator.parameters()))


def test_a_copy_of_the_engine_trains_on(device: torch.device) -> None:
    e = engine(mlp, backend="triton", device=device, **CRITIC)
    reals = list(batches(e, 3))
    e.step(reals[0])
    other = copy.deepcopy(e)
    for one in (e, other):
        for real in reals[1:]:
            one.step(real)
    assert distance(e, other) == 0
    assert e.metrics() == other.metrics()


def test_a_restored_engine_goes_on_to_the_bit(device: torch.device) -> None:
    e, other = (engine(mlp, backend="triton", device=device, penalties=[R1(1.0, interval=2)]) for _ in range(2))
    other.seed = 99
    reals = list(batches(e, 4))
    other.step(reals[3])
    for real in reals[:2]:
        e.step(real)
    other.load_state_dict(copy.deepcopy(e.state_dict()))
    for one, real in itertools.product((e, other), reals[2:]):
        one.step(real)
    assert distance(e, other) == 0


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.erf(self.inner(x))


def test_an_explicit_backend_never_falls_back(device: torch.device) -> None:
    e = engine(lambda: (mlp()[0], Opaque()), backend="triton", device=device)
    with pytest.raises(InputError, match="backend is 'triton', but the discriminator's update"):
        e.step(next(batches(e, 1)))
    with pytest.raises(InputError, match="backend is 'triton', but the discriminator's update"):
        e.d_step(next(batches(e, 1)))


def test_unequal_batches_are_named(device: torch.device) -> None:
    e = engine(mlp, backend="triton", device=device, n_critic=2)
    with pytest.raises(InputError, match=r"the batches have \[6, 4\] rows"):
        e.step(iter([torch.zeros(6, 10), torch.zeros(4, 10)]))
