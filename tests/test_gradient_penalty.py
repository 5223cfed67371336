"""What is particular to ``gradient_penalty``: its errors, rows of length 0, and its launch beside a plan's."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from fastgan import penalties, steps
from fastgan.kernels.gradient_penalty import gradient_penalty, gradient_penalty_launch

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "length"}, "gradient_penalty: kind is 'length', expected one of norm, square"),
        ({"weight": -1.0}, "gradient_penalty: weight is -1.0, expected a finite weight >= 0"),
        ({"target": float("nan")}, "gradient_penalty: target is nan, expected a finite target >= 0"),
        ({"g": torch.zeros(())}, "gradient_penalty: g is a scalar, expected [B, ...]"),
        ({"g": torch.zeros(2, dtype=torch.int64)}, "gradient_penalty: g has dtype torch.int64, expected one of"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gradient_penalty(**({"g": torch.zeros(2, 4), "weight": 1.0} | kwargs))


@pytest.mark.parametrize(
    ("penalty", "kwargs"),
    [
        (penalties.GradientPenalty(10.0), {"weight": 10.0}),
        (penalties.DRAGAN(2.0, target=0.5), {"weight": 2.0, "target": 0.5}),
        (penalties.R1(3.0), {"kind": "square", "weight": 1.5}),
    ],
    ids=["wgan-gp", "dragan", "r1"],
)
def test_is_the_penalty_of_that_name(penalty: penalties.Penalty, kwargs: dict, device: torch.device) -> None:
    g = torch.randn(5, 3, 4, device=device, dtype=torch.float64)
    for backend in ("triton", "reference"):
        assert torch.allclose(gradient_penalty(g, backend=backend, **kwargs), penalty.rows(g).mean(), rtol=1e-14)


@pytest.mark.parametrize("kind", ["norm", "square"])
def test_a_row_of_length_0_has_the_derivative_0(kind: str, device: torch.device) -> None:
    g = torch.randn(3, 4, device=device)
    g[1] = 0
    g.requires_grad_()
    value = gradient_penalty(g, kind=kind, weight=10.0, backend="triton")
    (first,) = torch.autograd.grad(value, g, create_graph=True)
    assert torch.equal(first[1], torch.zeros_like(first[1]))
    (second,) = torch.autograd.grad(first.sum(), g)
    assert second.isfinite().all()


def test_third_derivatives_are_there_too(device: torch.device) -> None:
    def third(backend: str) -> torch.Tensor:
        g = torch.linspace(-1, 2, 12, device=device, dtype=torch.float64).view(3, 4).requires_grad_()
        out = gradient_penalty(g, weight=2.0, backend=backend)
        for power in (2, 3, 1):
            (out,) = torch.autograd.grad(out.pow(power).sum(), g, create_graph=True)
        return out

    assert torch.allclose(third("triton"), third("reference"), rtol=1e-12)


def test_no_rows_have_no_mean(device: torch.device) -> None:
    g = torch.zeros(0, 3, device=device)
    assert gradient_penalty(g, weight=1.0, backend="triton").isnan()
    assert gradient_penalty(g, weight=1.0, backend="reference").isnan()


@pytest.mark.parametrize(("kind", "add"), [*itertools.product(["norm", "square"], [False, True])])
def test_launch_equals_the_step_of_a_plan(kind: str, add: bool, device: torch.device) -> None:
    g, before = torch.randn(2, 7, 3, 5, device=device, dtype=torch.float64)
    got, want = (before.clone() if add else torch.full_like(g, float("nan")) for _ in range(2))
    value, expected = (torch.full((), float("nan"), device=device, dtype=torch.float64) for _ in range(2))
    rows, counter = torch.empty(7, device=device).double(), torch.zeros(1, dtype=torch.int32, device=device)
    launch = gradient_penalty_launch(
        g, got, value, rows, counter, kind=kind, weight=10.0, target=1.0, scale=4.0, add=add
    )
    launch()
    steps.penalty(g, want, expected, norm=kind == "norm", weight=10.0, target=1.0, scale=4.0, add=add)()
    assert torch.allclose(got, want, rtol=1e-13)
    assert torch.allclose(value, expected, rtol=1e-13)
    assert counter.item() == 0, "the next launch would never see its last program"
    if not add:
        loss_scale = torch.tensor(1024.0, device=device)
        gradient_penalty_launch(
            g, got, value, rows, counter, kind=kind, weight=10.0, target=1.0, scale=4.0, loss_scale=loss_scale
        )()
        assert torch.allclose(got, 1024 * want, rtol=1e-13)
        assert torch.allclose(value, expected, rtol=1e-13)
        in_place = g.clone()
        gradient_penalty_launch(
            in_place, in_place, value, rows, counter, kind=kind, weight=10.0, target=1.0, scale=4.0
        )()
        assert torch.allclose(in_place, want, rtol=1e-13)


def test_launches_stay_in_their_buffers_and_repeat_to_the_bit(device: torch.device) -> None:
    g = torch.randn(5, 13, device=device)
    memory = torch.full((5 * 13 + 64,), 7.0, device=device)
    direction, value = memory[32:-32].view(5, 13), torch.empty((), device=device)
    rows, counter = torch.full((5 + 8,), 7.0, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    launch = gradient_penalty_launch(g, direction, value, rows[4:-4], counter, kind="norm", weight=1.0, target=1.0)
    launch()
    first = direction.clone(), value.clone()
    launch()
    assert torch.equal(direction, first[0])
    assert torch.equal(value, first[1])
    for guard in (memory[:32], memory[-32:], rows[:4], rows[-4:]):
        assert torch.equal(guard, torch.full_like(guard, 7.0))


def test_is_traced_with_its_derivatives(device: torch.device) -> None:
    for kind in ("norm", "square"):
        g = torch.randn(3, 4, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.fastgan.gradient_penalty.default, (g, kind, 2.0, 1.0))
