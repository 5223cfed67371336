"""The persistent kernel: the same numbers as one launch after the other, and a barrier that every program passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastgan import Adam, Engine
from fastgan.penalties import R1, GradientPenalty

CASES: dict[str, dict[str, Any]] = {
    "wgan-gp": {"loss": "wasserstein", "penalties": [GradientPenalty(10.0)]},
    "r1": {"penalties": [R1(1.0)]},
    "non-saturating": {},
    "wgan-gp, two critic updates": {"loss": "wasserstein", "penalties": [GradientPenalty(10.0)], "n_critic": 2},
}


def engine(dtype: torch.dtype, device: torch.device, networks: Any = None, **options: Any) -> Engine:
    torch.manual_seed(0)
    g = nn.Sequential(
        nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 40), nn.LeakyReLU(0.1), nn.Linear(40, 10), nn.Tanh()
    )  # fmt: skip
    d = nn.Sequential(nn.Linear(10, 40), nn.LeakyReLU(0.2), nn.Linear(40, 36), nn.LeakyReLU(0.2), nn.Linear(36, 1))
    g, d = (n.to(dtype) for n in networks or (g, d))
    adam = Adam(1e-3, (0.0, 0.9))
    given = {"latent": 5, "seed": 3, "g_optimizer": adam, "d_optimizer": adam, "precision": "fp32"}
    return Engine(g, d, **given | {"backend": "triton", "device": device} | options)


def batches(e: Engine, n: int, rows: int = 12) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(rows * e.n_critic, 10, generator=noise).to(e.device, e.dtype) for _ in range(n)]


def state(e: Engine) -> list[torch.Tensor]:
    return [p.detach() for n in (e.generator, e.discriminator, e.generator_ema) for p in n.parameters()]


def distance(a: Engine, b: Engine) -> float:
    pairs = zip(state(a), state(b), strict=True)
    return max((p.double() - q.double()).abs().max().item() for p, q in pairs)


def calls(e: Engine) -> list[Any]:
    (variant,) = e._executor._variants.values()
    return variant.iterations[0].calls


@pytest.mark.parametrize("name", CASES)
def test_iterations_equal_those_of_single_launches(name: str, device: torch.device) -> None:
    single, persistent = (engine(torch.float64, device, executor=kind, **CASES[name])
                          for kind in ("eager", "persistent"))  # fmt: skip
    start = [p.clone() for p in state(single)]
    for real in batches(single, 3):
        for e in (single, persistent):
            e.step(real)
        assert distance(single, persistent) < 1e-12
    assert persistent.metrics() == pytest.approx(single.metrics(), rel=1e-12, nan_ok=True)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(state(single)[:10], start, strict=False))  # it trains
    if device.type == "cpu":
        phases = calls(persistent)
        assert len(phases) == len(calls(single)) > 10
        assert {c.kernel.__name__ for c in phases} == {"_persistent_kernel"}
        assert not any(c.cooperative for c in phases)
    else:
        (launch,) = calls(persistent)
        assert launch.cooperative


@pytest.mark.parametrize("name", ["wgan-gp", "r1", "non-saturating"])
def test_fp32_iterations_equal_those_of_single_launches_up_to_rounding(name: str, device: torch.device) -> None:
    exact, single, persistent = (
        engine(dtype, device, executor=kind, **CASES[name], backend=backend)
        for dtype, kind, backend in (
            (torch.float64, "eager", "reference"),
            (torch.float32, "eager", "triton"),
            (torch.float32, "persistent", "triton"),
        )
    )
    for real in batches(exact, 3):
        for e in (exact, single, persistent):
            e.step(real.to(e.dtype))
    assert distance(persistent, exact) <= 2 * distance(single, exact) + 2 * torch.finfo(torch.float32).eps
