"""The engine against a training loop written by hand in plain PyTorch that shares no code with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_accurate
from torch import nn

import fastgan
from fastgan import penalties
from fastgan.losses import Loss, get

STEPS, BATCH, LATENT, N_CRITIC = 20, 6, 5, 2
D_LR, G_LR, D_BETAS, G_BETAS = 2e-3, 1e-3, (0.5, 0.9), (0.3, 0.99)


def mlp_pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    torch.manual_seed(3)
    g = nn.Sequential(nn.Linear(LATENT, 12), nn.ReLU(), nn.Linear(12, 7), nn.Tanh())
    d = nn.Sequential(nn.Linear(7, 16), nn.LeakyReLU(0.2), nn.Linear(16, 9), nn.SiLU(), nn.Linear(9, 1))
    d[-1].weight.data *= 12  # logits on both sides of the hinge
    return g.to(dtype), d.to(dtype), (7,)


def conv_pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    torch.manual_seed(4)
    g = nn.Sequential(
        nn.Linear(LATENT, 4 * 3 * 3), nn.Unflatten(1, (4, 3, 3)), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    d = nn.Sequential(nn.Conv2d(2, 5, 3, 2, 1), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(5 * 3 * 3, 1))
    return g.to(dtype), d.to(dtype), (2, 6, 6)


def draw(shape: tuple[int, ...]) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Inputs of every discriminator and generator update, in fp64."""
    r = torch.Generator().manual_seed(0)
    d = [
        {
            "real": torch.randn(BATCH, *shape, generator=r, dtype=torch.float64) * 0.5,
            "z": torch.randn(BATCH, LATENT, generator=r, dtype=torch.float64),
            "alpha": torch.rand(BATCH, generator=r, dtype=torch.float64),
            "delta": torch.randn(BATCH, *shape, generator=r, dtype=torch.float64),
        }
        for _ in range(STEPS * N_CRITIC)
    ]
    return d, [torch.randn(BATCH, LATENT, generator=r, dtype=torch.float64) for _ in range(STEPS)]


# ---- by hand


def d_loss_by_hand(name: str, r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones_like(r), torch.zeros_like(r)
    if name in ("minimax", "non-saturating"):
        return bce(r, one) + bce(f, zero)
    if name == "wasserstein":
        return f.mean() - r.mean()
    if name == "hinge":
        return torch.clamp(1 - r, min=0).mean() + torch.clamp(1 + f, min=0).mean()
    if name == "least-squares":
        return 0.5 * F.mse_loss(r, one) + 0.5 * F.mse_loss(f, zero)
    return bce(r - f, one)


def g_loss_by_hand(name: str, f: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones_like(f), torch.zeros_like(f)
    if name == "minimax":
        return -bce(f, zero)
    if name == "non-saturating":
        return bce(f, one)
    if name in ("wasserstein", "hinge"):
        return -f.mean()
    if name == "least-squares":
        return 0.5 * F.mse_loss(f, one)
    return bce(f - r.detach(), one)


def penalty_by_hand(
    kind: str, d: nn.Module, real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    alpha = alpha.reshape(-1, *[1] * (real.ndim - 1))
    x = {"gp": alpha * real + (1 - alpha) * fake, "r1": real, "r2": fake, "dragan": real + 0.3 * delta}[kind]
    x = x.detach().clone().requires_grad_(True)
    (g,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    g = g.reshape(len(g), -1)
    if kind in ("r1", "r2"):
        return {"r1": 0.8, "r2": 0.5}[kind] / 2 * (g**2).sum(1).mean()
    return {"gp": 10.0, "dragan": 3.0}[kind] * ((torch.linalg.norm(g, dim=1) - 1) ** 2).mean()


def train_by_hand(
    pair: Callable, dtype: torch.dtype, loss: str, clip: float | None, terms: dict[str, int]
) -> torch.Tensor:
    """``terms``: penalty -> interval. Returns all parameters in one vector."""
    g, d, shape = pair(dtype)
    lazy = 1 + sum(1 / k for k in {k for k in terms.values() if k > 1})
    d_opt = torch.optim.Adam(
        d.parameters(), lr=D_LR / lazy, betas=(D_BETAS[0] ** (1 / lazy), D_BETAS[1] ** (1 / lazy)), foreach=False
    )
    g_opt = torch.optim.Adam(g.parameters(), lr=G_LR, betas=G_BETAS, foreach=False)

    def clamp() -> None:
        if clip is not None:
            with torch.no_grad():
                for p in d.parameters():
                    p.clamp_(-clip, clip)

    d_inputs, g_inputs = draw(shape)
    d_inputs = [{k: v.to(dtype) for k, v in one.items()} for one in d_inputs]
    for i in range(STEPS):
        for j in range(N_CRITIC):
            n = i * N_CRITIC + j
            one = d_inputs[n]
            fake = g(one["z"]).detach()
            extras = (one["real"], fake, one["alpha"], one["delta"])
            d_opt.zero_grad()
            total = d_loss_by_hand(loss, d(one["real"]), d(fake))
            for kind, k in terms.items():
                if k == 1:
                    total = total + penalty_by_hand(kind, d, *extras)
            total.backward()
            d_opt.step()
            clamp()
            for k in sorted({k for k in terms.values() if k > 1}):
                if n % k == 0:
                    d_opt.zero_grad()
                    (
                        k * sum(penalty_by_hand(kind, d, *extras) for kind, every in terms.items() if every == k)
                    ).backward()
                    d_opt.step()
                    clamp()
        g_opt.zero_grad()
        g_loss_by_hand(loss, d(g(g_inputs[i].to(dtype))), d(one["real"])).backward()
        g_opt.step()
    return torch.cat([p.detach().flatten() for p in (*g.parameters(), *d.parameters())])


# ---- by the engine


def train_by_engine(
    pair: Callable, dtype: torch.dtype, loss: str, clip: float | None, terms: dict[str, int]
) -> torch.Tensor:
    g, d, shape = pair(dtype)
    make = {
        "gp": lambda k: penalties.GradientPenalty(10.0, interval=k),
        "r1": lambda k: penalties.R1(0.8, interval=k),
        "r2": lambda k: penalties.R2(0.5, interval=k),
        "dragan": lambda k: penalties.DRAGAN(3.0, noise=0.3, interval=k),
    }
    engine = fastgan.Engine(
        g, d, latent=LATENT, loss=get(loss, clip=clip), penalties=[make[kind](k) for kind, k in terms.items()],
        n_critic=N_CRITIC, g_optimizer=fastgan.Adam(G_LR, G_BETAS), d_optimizer=fastgan.Adam(D_LR, D_BETAS),
        precision="fp32", device="cpu",
    )  # fmt: skip
    d_inputs, g_inputs = draw(shape)
    for i in range(STEPS):
        for one in d_inputs[i * N_CRITIC : (i + 1) * N_CRITIC]:
            one = {k: v.to(dtype) for k, v in one.items()}
            engine.d_step(one["real"], z=one["z"], alpha=one["alpha"], delta=one["delta"])
        engine.g_step(z=g_inputs[i], real=one["real"])
    return torch.cat([p.detach().flatten() for p in (*g.parameters(), *d.parameters())])


LOSS_CASES = [("minimax", None), ("non-saturating", None), ("wasserstein", None), ("wasserstein", 0.05),
              ("hinge", None), ("least-squares", None), ("relativistic", None)]  # fmt: skip
PENALTY_CASES: list[dict[str, int]] = [
    {},
    {"gp": 1},
    {"r1": 1},
    {"r2": 1},
    {"dragan": 1},
    {"r1": 1, "r2": 1},
    {"gp": 1, "r1": 1, "r2": 1, "dragan": 1},
    {"gp": 4},
    {"gp": 1, "r1": 3, "r2": 5, "dragan": 3},
]
CASES = [
    pytest.param(
        loss,
        clip,
        terms,
        id="-".join([loss, *(["clip"] if clip else []), "+".join(f"{k}/{n}" for k, n in terms.items()) or "none"]),
    )
    for (loss, clip), terms in itertools.product(LOSS_CASES, PENALTY_CASES)
]


@pytest.mark.parametrize(("loss", "clip", "terms"), CASES)
def test_mlp_equals_the_loop_by_hand(loss: str, clip: float | None, terms: dict[str, int]) -> None:
    exact = train_by_hand(mlp_pair, torch.float64, loss, clip, terms)
    got = train_by_engine(mlp_pair, torch.float64, loss, clip, terms)
    assert (got - exact).abs().max() <= 1e-10
    plain = train_by_hand(mlp_pair, torch.float32, loss, clip, terms)
    assert_as_accurate("parameters", train_by_engine(mlp_pair, torch.float32, loss, clip, terms), plain, exact)


@pytest.mark.parametrize("loss", ["non-saturating", "wasserstein", "relativistic"])
@pytest.mark.parametrize("terms", [{}, {"gp": 1}, {"r1": 2, "r2": 1}], ids=["none", "gp", "r1-lazy+r2"])
def test_convolutions_equal_the_loop_by_hand(loss: str, terms: dict[str, int]) -> None:
    exact = train_by_hand(conv_pair, torch.float64, loss, None, terms)
    assert (train_by_engine(conv_pair, torch.float64, loss, None, terms) - exact).abs().max() <= 1e-10


def test_a_missing_second_derivative_would_be_noticed() -> None:
    """The bound has teeth: dropping the penalty's gradient moves the parameters far beyond it."""
    exact = train_by_hand(mlp_pair, torch.float64, "wasserstein", None, {"gp": 1})
    without = train_by_hand(mlp_pair, torch.float64, "wasserstein", None, {})
    assert (without - exact).abs().max() > 1e-4


def test_own_loss() -> None:
    """A user's Loss equals the built-in of the same formula through autograd, which both take here."""
    own = Loss("own", lambda r, f: F.softplus(-r) + F.softplus(f), lambda f, r: F.softplus(-f))
    g, d, shape = mlp_pair(torch.float64)
    engine = fastgan.Engine(g, d, latent=LATENT, loss=own, g_optimizer=fastgan.Adam(G_LR, G_BETAS), device="cpu")
    same, d2, _ = mlp_pair(torch.float64)
    other = fastgan.Engine(
        same, d2, latent=LATENT, g_optimizer=fastgan.Adam(G_LR, G_BETAS), device="cpu", closed_form=False
    )
    assert "loss 'own' is your own" in engine.explain()
    for one in draw(shape)[0]:
        engine.step(one["real"])
        other.step(one["real"])
    assert all(torch.equal(a, b) for a, b in zip(g.parameters(), same.parameters(), strict=True))
