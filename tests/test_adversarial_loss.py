"""What is particular to ``adversarial_loss``: its errors, its kinks, large logits, and its launch beside a plan's."""

from __future__ import annotations

import itertools
import re
from typing import get_args

import pytest
import torch
from closeness import assert_as_accurate

from fastgan import losses, steps
from fastgan.kernels.adversarial_loss import Kind, adversarial_loss, adversarial_loss_launch

pytestmark = pytest.mark.interpreted

KINDS = get_args(Kind)
GAMES = [*itertools.product(KINDS, ["discriminator", "generator"])]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "logistic"}, "adversarial_loss: kind is 'logistic', expected one of minimax, non-saturating"),
        ({"player": "critic"}, "adversarial_loss: player is 'critic', expected one of discriminator, generator"),
        ({"real": None}, "adversarial_loss: real is None, but the hinge loss of the discriminator compares"),
        ({"real": torch.zeros(3)}, "adversarial_loss: real has shape (3,), expected (4,)"),
        ({"real": torch.zeros(4).half()}, "adversarial_loss: real has dtype torch.float16, expected torch.float32"),
        ({"fake": torch.zeros(4).long()}, "adversarial_loss: fake has dtype torch.int64, expected one of"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    args = {"real": torch.zeros(4), "fake": torch.zeros(4), "kind": "hinge", "player": "discriminator"} | kwargs
    with pytest.raises(ValueError, match=re.escape(message)):
        adversarial_loss(**args)


@pytest.mark.parametrize(("kind", "player"), GAMES)
def test_is_the_loss_of_that_name(kind: str, player: str, device: torch.device) -> None:
    r, f = 2 * torch.randn(2, 37, device=device, dtype=torch.float64)
    loss = losses.get(kind)
    want = loss.discriminator(r, f) if player == "discriminator" else loss.generator(f, r)
    for backend in ("triton", "reference"):
        got = adversarial_loss(r, f, kind=kind, player=player, backend=backend)
        assert torch.allclose(got, want.mean(), rtol=1e-14)


@pytest.mark.parametrize(("kind", "player"), GAMES)
@pytest.mark.parametrize("n", [1, 37, 513])
def test_launch_equals_the_step_of_a_plan(kind: str, player: str, n: int, device: torch.device) -> None:
    r, f = 2 * torch.randn(2, n, device=device, dtype=torch.float64)

    def outputs() -> list[torch.Tensor]:
        return [torch.full(s, float("nan"), device=device).double() for s in ((n,), (n,), (), (), ())]

    got, want = outputs(), outputs()
    if player == "discriminator":
        adversarial_loss_launch(kind, player, r, f, *got)()
        steps.discriminator_loss(kind, r, f, *want)()
    else:
        real = r if losses.get(kind).compares else None
        adversarial_loss_launch(kind, player, real, f, None, *got[1:3])()
        steps.generator_loss(kind, f, real, *want[1:3])()
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, equal_nan=True)  # NaN: what the generator's launch does not write
    scaled, loss_scale = outputs(), torch.tensor(1024.0, device=device)
    real, to_real = (r, scaled[0]) if player == "discriminator" or kind == "relativistic" else (None, None)
    adversarial_loss_launch(kind, player, real, f, to_real, *scaled[1:3], loss_scale=loss_scale)()
    assert torch.equal(scaled[1], 1024 * got[1])
    assert torch.equal(scaled[2], got[2])


@pytest.mark.parametrize(("kind", "player"), GAMES)
@pytest.mark.parametrize("size", [3.0, 17.5, 30.0, 80.0, 200.0])
def test_confident_logits_keep_their_digits(kind: str, player: str, size: float, device: torch.device) -> None:
    """Where ``1 + exp(-size)`` is 1, and as far out as ``exp(size)`` overflows."""
    for sign in (-1.0, 1.0):
        r, f = (torch.full((1,), s * size, device=device, requires_grad=True) for s in (sign, -sign))

        def results(*logits: torch.Tensor, backend: str) -> list[torch.Tensor]:
            loss = adversarial_loss(*logits, kind=kind, player=player, backend=backend)
            grads = torch.autograd.grad(loss, logits, allow_unused=True)
            return [loss.detach(), *(g for g in grads if g is not None)]

        exact = results(*(t.detach().double().requires_grad_() for t in (r, f)), backend="reference")
        plain = results(r, f, backend="reference")
        for i, got in enumerate(results(r, f, backend="triton")):
            assert_as_accurate(f"{sign * size} {i}", got, plain[i], exact[i])


@pytest.mark.parametrize(("kind", "player"), GAMES)
def test_not_a_number_is_passed_on(kind: str, player: str, device: torch.device) -> None:
    f = torch.tensor([0.5, float("nan"), 1.0], device=device)
    assert adversarial_loss(torch.zeros_like(f), f, kind=kind, player=player, backend="triton").isnan()


def test_derivative_at_the_kinks_of_hinge_is_0(device: torch.device) -> None:
    for backend in ("triton", "reference"):
        r, f = (torch.full((3,), v, device=device, requires_grad=True) for v in (1.0, -1.0))
        adversarial_loss(r, f, kind="hinge", player="discriminator", backend=backend).backward()
        assert torch.equal(r.grad, torch.zeros_like(r))
        assert torch.equal(f.grad, torch.zeros_like(f))


def test_no_logits_have_no_mean(device: torch.device) -> None:
    for backend in ("triton", "reference"):
        assert adversarial_loss(None, torch.zeros(0), kind="hinge", player="generator", backend=backend).isnan()


@pytest.mark.parametrize(("kind", "player"), GAMES)
def test_third_derivatives_are_there_too(kind: str, player: str, device: torch.device) -> None:
    def third(backend: str) -> torch.Tensor:
        x = torch.linspace(-1.7, 2.1, 12, device=device, dtype=torch.float64).requires_grad_()
        out = adversarial_loss(x[:6], x[6:] * x[6:], kind=kind, player=player, backend=backend)
        for power in (2, 3, 1):
            (out,) = torch.autograd.grad(out.pow(power).sum(), x, create_graph=True)
        return out

    assert torch.allclose(third("triton"), third("reference"), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("kind", "player"), GAMES)
def test_is_traced_with_its_derivatives(kind: str, player: str, device: torch.device) -> None:
    r, f = (torch.randn(5, 1, device=device, requires_grad=True) for _ in range(2))
    real = r if player == "discriminator" or kind == "relativistic" else None
    torch.library.opcheck(torch.ops.fastgan.adversarial_loss.default, (real, f, kind, player))
