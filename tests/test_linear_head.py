"""The end of a critic in one launch: against the engine's losses and the chain's formula, in fp64."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from launches import Guarded, assert_as_accurate, strided
from test_linear_lrelu import DTYPES, SLOPES, dphi, phi

from fastgan.kernels import configs
from fastgan.kernels._losses import KINDS, PLAYERS
from fastgan.kernels.linear_head import Head, head_launch
from fastgan.losses import LOSSES

pytestmark = pytest.mark.interpreted


def test_knows_every_loss() -> None:
    assert set(KINDS) == set(LOSSES)


def expected(
    head: Head, hidden: torch.Tensor, adjoint_dtype: torch.dtype, weight: torch.Tensor | None,
    mask: torch.Tensor | None, mask_activation: str, dtype: torch.dtype,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """By autograd through the loss of ``fastgan/losses.py``, in one dtype.

    The means of logits are far from 0 where there is a bias: their bound would ask for digits that cancel.
    """
    logits = (hidden.to(dtype) @ head.weight.to(dtype)).detach()
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    out = {"logits": logits}
    seed = torch.ones(len(hidden), dtype=dtype, device=hidden.device)
    if head.kind is not None:
        loss, n = LOSSES[head.kind], head.n
        leaf = logits.clone().requires_grad_()
        fake = leaf[head.fake : head.fake + n]
        real = None if head.real is None else leaf[head.real : head.real + n]
        if head.player == "discriminator":
            value = loss.discriminator(real, fake).mean()
            out |= {"real_mean": real.mean().detach(), "fake_mean": fake.mean().detach()}
        else:
            value = loss.generator(fake, None if real is None else real.detach()).mean()
        (scales,) = torch.autograd.grad(value, leaf)
        if head.loss_scale is not None:
            scales = scales * head.loss_scale.to(dtype)
        has = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        has[head.fake : head.fake + n] = True
        if head.player == "discriminator":
            has[head.real : head.real + n] = True
        out |= {"loss": value.detach(), "scales": scales.where(has, torch.nan)}
        seeded = has & (torch.arange(len(hidden), device=hidden.device) < head.seeded)
        seed = torch.where(seeded, scales, seed)
        if head.seeds is not None:
            out["scales"] = out["scales"].where(~seeded, torch.nan)
    if head.seeds is not None:
        out["seeds"] = seed[: head.chain]
    h = hidden[: head.chain].to(dtype)
    adjoint = seed[: head.chain, None] * head.weight.to(dtype) * dphi(h, head.activation, head.slope)
    out["adjoint"] = adjoint
    if weight is not None:
        below = adjoint.to(adjoint_dtype).to(dtype) @ weight.to(dtype)
        out["out"] = below if mask is None else below * dphi(mask.to(dtype), mask_activation, SLOPES[mask_activation])
    return out


def run(
    device: torch.device, dtype: torch.dtype, *, kind: str | None, player: str, n: int, k: int, columns: int | None,
    real: int | None, fake: int, rows: int, seeded: int, chain: int, activation: str = "leaky-relu",
    mask_activation: str | None = "tanh", bias: bool = True, scaled: bool = False,
    seeds: bool = False, tile: configs.Config | None = None,
) -> None:  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    guarded = Guarded(device)
    hidden = phi(torch.randn(rows, k, device=device, dtype=wide), activation, SLOPES[activation]).to(dtype)
    weight = None if columns is None else torch.randn(k, columns, device=device).to(dtype) * k**-0.5
    mask = out = None
    if columns is not None:
        out = guarded.new(chain, columns, dtype=dtype)
        if mask_activation is not None:  # which the product overwrites
            mask = phi(torch.randn(chain, columns, device=device, dtype=wide), mask_activation, 0.2).to(dtype)
            out.copy_(mask)
    adjoint = guarded.new(chain, k, dtype=dtype)
    loss, real_mean, fake_mean = (guarded.new(dtype=wide) for _ in range(3))
    head = Head(
        torch.randn(k, device=device).to(dtype) * k**-0.5,
        torch.full((1,), 0.75, device=device, dtype=wide) if bias else None,
        activation, SLOPES[activation], chain, seeded, kind, player, n, real, fake,
        logits=guarded.new(rows, dtype=wide), scales=guarded.new(rows, dtype=wide), loss=loss, real_mean=real_mean,
        fake_mean=fake_mean, counter=torch.zeros(1, dtype=torch.int32, device=device),
        loss_scale=torch.tensor(64.0, device=device, dtype=wide) if scaled else None,
        seeds=guarded.new(chain, dtype=dtype) if seeds else None,
    )  # fmt: skip
    before = hidden.clone(), head.weight.clone()
    launch = head_launch(
        strided(hidden), head, adjoint, weight, out, None if mask is None else out,
        mask_activation=mask_activation or "identity", mask_slope=SLOPES[mask_activation or "identity"], tile=tile,
    )  # fmt: skip
    launch()
    first = {k: t.clone() for k, t in (("adjoint", adjoint), ("logits", head.logits), ("loss", loss))}
    if mask is not None:
        out_first = out.clone()
        out.copy_(mask)
    launch()  # the counter is as it was, and the numbers are the same
    guarded.check()
    assert torch.equal(hidden, before[0])
    assert torch.equal(head.weight, before[1])
    assert int(head.counter) == 0
    assert torch.equal(first["adjoint"], adjoint)
    assert torch.equal(first["logits"], head.logits)
    assert torch.equal(first["loss"], loss) or kind is None
    assert mask is None or torch.equal(out_first, out)
    got = {"logits": head.logits, "scales": head.scales, "loss": loss, "real_mean": real_mean, "fake_mean": fake_mean,
           "seeds": head.seeds, "adjoint": adjoint, "out": out}  # fmt: skip
    plain = expected(head, hidden, dtype, weight, mask, mask_activation or "", wide)
    exact = expected(head, hidden, dtype, weight, mask, mask_activation or "", torch.float64)
    for name in plain:
        g, p, e = got[name], plain[name].to(got[name].dtype), exact[name]
        if name == "scales":
            assert torch.equal(g.isnan(), e.isnan()), "other rows than those of the loss have a scale"
            if not (~e.isnan()).any():
                continue
            g, p, e = (t[~t.isnan()] for t in (g, p, e))
        assert_as_accurate(f"{kind} {player} {name}", g, p, e)
    if kind is None or player == "generator":
        assert real_mean.isnan(), "a mean that nobody asked for"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "player"), list(itertools.product(KINDS, PLAYERS)))
def test_every_loss(kind: str, player: str, dtype: torch.dtype, device: torch.device) -> None:
    """A discriminator's rows are all differentiated; a generator's are the fake ones, and the real ones follow."""
    rest = {"kind": kind, "player": player, "n": 17, "k": 33, "columns": 41, "rows": 34}
    if player == "discriminator":
        run(device, dtype, real=0, fake=17, seeded=34, chain=34, **rest)
    else:
        run(device, dtype, real=17 if kind == "relativistic" else None, fake=0, seeded=17, chain=17, **rest)


@pytest.mark.parametrize("seeds", [False, True], ids=["", "seeds"])
@pytest.mark.parametrize("kind", ["non-saturating", "relativistic"])
@pytest.mark.parametrize(
    ("rows", "places", "seeded", "chain"),
    [
        (51, (0, 17), 34, 51),  # a penalty at rows of its own, as WGAN-GP has
        (34, (17, 0), 17, 34),  # a penalty at the real rows, which share their chain: R1
        (34, (0, 17), 0, 34),  # at both
        (40, (20, 1), 37, 38),  # rows of nothing before, between and behind
    ],
)
def test_rows_of_penalties_begin_with_one(
    rows: int, places: tuple[int, int], seeded: int, chain: int, kind: str, seeds: bool, device: torch.device
) -> None:
    """With a place for seeds, what each row begins with, the scales are those of the other rows that have a loss."""
    real, fake = places
    for dtype in (torch.float16, torch.float32, torch.float64):
        run(device, dtype, kind=kind, player="discriminator", n=17, k=20, columns=7, real=real, fake=fake, rows=rows,
            seeded=seeded, chain=chain, seeds=seeds)  # fmt: skip


@pytest.mark.parametrize(("activation", "mask_activation"), [("identity", None), ("tanh", "sigmoid"),
                                                              ("sigmoid", "leaky-relu")])  # fmt: skip
def test_every_activation(activation: str, mask_activation: str | None, device: torch.device) -> None:
    run(device, torch.float64, kind="minimax", player="discriminator", n=3, k=9, columns=5, real=0, fake=3, rows=6,
        seeded=6, chain=6, activation=activation, mask_activation=mask_activation)  # fmt: skip


@pytest.mark.parametrize(("n", "k", "columns"), [(1, 1, 1), (33, 65, 1), (33, 1, 65), (40, 70, None)])
def test_odd_shapes_and_the_head_alone(n: int, k: int, columns: int | None, device: torch.device) -> None:
    run(device, torch.float32, kind="hinge", player="discriminator", n=n, k=k, columns=columns, real=0, fake=n,
        rows=2 * n, seeded=2 * n, chain=2 * n)  # fmt: skip


def test_penalties_alone(device: torch.device) -> None:
    run(device, torch.float32, kind=None, player="discriminator", n=0, k=33, columns=9, real=None, fake=0, rows=20,
        seeded=0, chain=20, bias=False, seeds=True)  # fmt: skip


def test_loss_scale_enters_the_derivatives_alone(device: torch.device) -> None:
    run(device, torch.float16, kind="least-squares", player="generator", n=5, k=9, columns=8, real=None, fake=0, rows=5,
        seeded=5, chain=5, scaled=True)  # fmt: skip


def test_more_programs_than_one_reads_at_a_time(device: torch.device) -> None:
    """72 programs write partial sums, and the last of them adds up 64 at a time."""
    n = 36 * 16
    run(device, torch.float32, kind="wasserstein", player="discriminator", n=n, k=3, columns=None, real=0, fake=n,
        rows=2 * n, seeded=2 * n, chain=2 * n)  # fmt: skip


@pytest.mark.parametrize("logit", [-90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind: str, logit: float, device: torch.device) -> None:
    """Small losses keep their digits, large ones do not overflow; at the hinge's kinks the derivative is torch's."""
    for player, dtype in itertools.product(PLAYERS, (torch.float32, torch.float64)):
        hidden = torch.tensor([[-logit / 2], [logit / 2]], device=device, dtype=dtype)
        vectors = [torch.empty(2, device=device, dtype=dtype) for _ in range(2)]
        scalars = [torch.empty((), device=device, dtype=dtype) for _ in range(3)]
        head = Head(torch.full((1,), 2.0, device=device, dtype=dtype), None, "identity", 0.0, 2, 2, kind, player, 1, 0,
                    1, *vectors, *scalars, counter=torch.zeros(1, dtype=torch.int32, device=device))  # fmt: skip
        head_launch(hidden, head, torch.empty_like(hidden))()
        plain, exact = (expected(head, hidden, dtype, None, None, "", d) for d in (dtype, torch.float64))
        assert_as_accurate("loss", head.loss, plain["loss"], exact["loss"])
        has = ~exact["scales"].isnan()
        for i in has.nonzero().flatten().tolist():
            assert_as_accurate("scale", head.scales[i], plain["scales"][i], exact["scales"][i])


def test_a_nan_stays_in_its_row(device: torch.device) -> None:
    hidden = torch.ones(4, 3, device=device)
    hidden[1, 2] = float("nan")
    out, adjoint = torch.empty(4, 5, device=device), torch.empty(4, 3, device=device)
    scalars = [torch.empty((), device=device) for _ in range(3)]
    head = Head(torch.ones(3, device=device), None, "tanh", 0.0, 4, 4, "hinge", "discriminator", 2, 0, 2,
                torch.empty(4, device=device), torch.empty(4, device=device), *scalars,
                torch.zeros(1, dtype=torch.int32, device=device))  # fmt: skip
    head_launch(hidden, head, adjoint, torch.ones(3, 5, device=device), out)()
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]].isnan().any()
    assert head.loss.isnan()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": torch.zeros(4)}, "head.weight has shape (4,), expected (3,)"),
        ({"kind": "logistic"}, "head.kind is 'logistic', expected one of minimax"),
        ({"player": "critic"}, "head.player is 'critic', expected one of discriminator, generator"),
        ({"real": None}, "head.real is None, which the discriminator's hinge loss needs"),
        ({"loss": None}, "head.loss is None, which the discriminator's hinge loss needs"),
        ({"real": 1}, "head.real is 1 and head.fake 2: their 2 rows overlap"),
        ({"fake": 3}, "head.fake is 3, expected rows [3, 3 + 2) within 4"),
        ({"seeded": 5}, "head.seeded is 5 and head.chain 4, expected 0 <= seeded <= chain <= 4"),
        ({"n": 0}, "head.n is 0, expected > 0"),
        ({"seeds": torch.zeros(3)}, "head.seeds has shape (3,), expected (4,)"),
        ({"seeds": torch.zeros(3), "kind": None}, "head.seeds has shape (3,), expected (4,)"),
        ({"scales": torch.zeros(3)}, "head.scales has shape (3,), expected (4,)"),
        ({"activation": "relu"}, "activation is 'relu', expected one of identity"),
        ({"partials": torch.zeros(2)}, "partials has 2 elements, expected 3"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    scalars = [torch.zeros(()) for _ in range(3)]
    head = Head(torch.zeros(3), None, "leaky-relu", 0.2, 4, 4, "hinge", "discriminator", 2, 0, 2, torch.zeros(4),
                torch.zeros(4), *scalars, torch.zeros(1, dtype=torch.int32))  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f"linear_head: {message}")):
        head_launch(torch.zeros(4, 3), replace(head, **kwargs), torch.zeros(4, 3))


def test_adjoint_is_not_the_memory_of_hidden() -> None:
    hidden = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="linear_head: adjoint is the memory of hidden"):
        head_launch(hidden, Head(torch.zeros(3), chain=4), hidden)
