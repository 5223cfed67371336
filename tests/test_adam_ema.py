"""The update of an arena as Triton launches, against the same update in torch ops, with all that is counted with it."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from closeness import assert_as_accurate
from torch import nn

from fastgan import Adam, AdamW, InputError, Schedule
from fastgan.adam import AdamReference, AdamState, AdamTriton, LossScale, Ring, mark, pass_for
from fastgan.arena import Arena
from fastgan.ema import EMA, Average
from fastgan.kernels.adam_ema import BLOCK, adam_ema, adam_ema_launch
from fastgan.optim import Updater

pytestmark = pytest.mark.interpreted

SHAPES = [(7, 13), (1,), (BLOCK + 1,), (0, 4), (3, 2, 2, 2), ()]
STEPS = 12
RULES = {
    "adam": Adam(1e-2, (0.5, 0.99), schedule=Schedule("cosine", steps=9, start=2, final=0.1, warmup=4)),
    "adam-l2": Adam(1e-2, (0.0, 0.9), eps=1e-6, weight_decay=0.1, schedule=Schedule("linear", steps=7, final=0.2)),
    "adamw": AdamW(1e-2, (0.9, 0.999), weight_decay=0.1, schedule=Schedule(warmup=5)),
}
FOLLOW = {"decay": EMA(decay=0.9), "halflife": EMA(halflife_kimg=0.03), "rampup": EMA(halflife_kimg=0.5, rampup=0.3)}


def count(value: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(value, device=device)


class Trained:
    """Parameters of some shapes, and what updates them."""

    def __init__(
        self,
        kind: type,
        dtype: torch.dtype,
        rule: Adam,
        device: torch.device,
        *,
        follow: EMA | None = FOLLOW["rampup"],
        low: torch.dtype | None = None,
        scaled: bool = False,
        **options: object,
    ) -> None:
        g = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=g).to(device, dtype) for shape in SHAPES]
        self.params = [nn.Parameter(v) for v in values]
        averages = [v.clone() for v in values] if follow is not None else None
        self.arena = Arena([(str(i), p) for i, p in enumerate(self.params)], averages)
        if low is not None:
            self.arena.lower(low)
        self.state = AdamState(len(values), dtype, device)
        self.updates, self.images, self.averaged, self.others = (count(0, device) for _ in range(4))
        average = Average(nn.Module(), follow, self.images, self.averaged) if follow is not None else None
        self.passes = kind(self.arena, self.state, rule, update=self.updates, average=average, **options)
        self.loss_scale = LossScale.on(device) if scaled else None
        self.metrics = torch.zeros(3, dtype=dtype, device=device)
        self.state.grad_norm = self.metrics[2] if kind is AdamReference else self.state.grad_norm
        self.ring = Ring(self.metrics, torch.full((4, 3), -1.0, dtype=dtype, device=device), count(2, device))

    def step(self, grads: list[torch.Tensor | None], squares: bool = False) -> None:
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        for view, g in zip(self.arena.grads, grads, strict=True):
            view.fill_(math.nan) if g is None else view.copy_(g.to(view) * scale)  # without a gradient: not to be read
        present = [view for view, g in zip(self.arena.grads, grads, strict=True) if g is not None]
        active = mark([g is not None for g in grads], self.arena.flat.device)
        options = {
            "squares": torch.stack([(v.double() ** 2).sum() for v in present]) if squares else None,
            "loss_scale": self.loss_scale,
            "advance": ((self.updates, 1), (self.images, 16), (self.others, 3)),
            "ring": self.ring,
        }
        self.metrics[:2] += 1
        if isinstance(self.passes, AdamReference):
            self.passes.run(active, **options)
        else:
            launches = self.passes.launches(active, **options)
            assert len(launches) == (1 if squares else 2)
            for launch in launches:
                launch()

    def floats(self) -> dict[str, torch.Tensor]:
        a = self.arena
        named = {"p": a.flat, "exp_avg": a.exp_avg, "exp_avg_sq": a.exp_avg_sq, "average": a.average}
        return {name: torch.cat([v.flatten() for v in a.views_of(t)]) for name, t in named.items() if t is not None}

    def counts(self) -> dict[str, list[float]]:
        names = ("updates", "images", "averaged", "others")
        named = {"steps": self.state.steps, "skipped": self.state.skipped, "slot": self.ring.slot}
        named |= {name: getattr(self, name) for name in names}
        if self.loss_scale is not None:
            named |= {"scale": self.loss_scale.scale, "good_steps": self.loss_scale.good_steps}
        return {name: t.flatten().tolist() for name, t in named.items()}


def gradients(step: int) -> list[torch.Tensor | None]:
    """Of scales that differ; missing here and there; twice not finite."""
    g = torch.Generator().manual_seed(step)
    out: list[torch.Tensor | None] = [torch.randn(s, generator=g) * 10.0 ** (-k) for k, s in enumerate(SHAPES)]
    if step == 4:
        out[0][-1, -1] = math.nan
    if step == 8:
        out[2][BLOCK] = math.inf
    if step % 3 == 1:
        out[0] = out[5] = None
    return out


def padding(arena: Arena) -> torch.Tensor:
    inside = torch.zeros_like(arena.flat, dtype=torch.bool)
    for view in arena.views_of(inside):
        view.fill_(True)
    return ~inside


@pytest.mark.parametrize(
    ("rule", "follow"),
    [(RULES["adam"], FOLLOW["rampup"]), (RULES["adam-l2"], FOLLOW["decay"]), (RULES["adamw"], FOLLOW["halflife"])],
    ids=RULES,
)
@pytest.mark.parametrize(
    ("dtype", "squares", "scaled"),
    [(torch.float32, False, False), (torch.float32, True, True), (torch.float64, True, False)],
    ids=["fp32", "fp32-scaled-squares", "fp64-squares"],
)
def test_equals_the_reference_over_a_training(
    rule: Adam, follow: EMA, dtype: torch.dtype, squares: bool, scaled: bool, device: torch.device
) -> None:
    options = {"follow": follow, "scaled": scaled, "clip": 0.9, "zero_grad": True}
    exact = Trained(AdamReference, torch.float64, rule, device, **options)
    plain, got = (
        Trained(kind, dtype, rule, device, low=torch.float16, **options) for kind in (AdamReference, AdamTriton)
    )
    for i in range(STEPS):
        for each in (exact, plain, got):
            each.step(gradients(i), squares)
        assert got.counts() == plain.counts() == exact.counts(), i
        norm, expected = got.state.grad_norm, plain.state.grad_norm
        assert norm.isfinite() == expected.isfinite()
        assert not norm.isfinite() or abs(norm - expected) <= 2 * torch.finfo(dtype).eps * expected
        assert not got.arena.grad.any()
        assert torch.equal(got.arena.low, got.arena.flat.half())
    assert got.counts()["skipped"] == [1 + (gradients(4)[0] is not None)]
    assert got.counts()["steps"][0] == sum(i % 3 != 1 and i != 8 for i in range(STEPS))
    for name, value in got.floats().items():
        if dtype == torch.float64:  # in which the reference is not an exact one
            assert (value - exact.floats()[name]).abs().max() <= 1e-14, name
        else:
            assert_as_accurate(name, value, plain.floats()[name], exact.floats()[name])
    for t in (got.arena.flat, got.arena.exp_avg, got.arena.exp_avg_sq, got.arena.average, got.arena.low):
        assert not t[padding(got.arena)].any()


def test_the_ring_holds_the_last_rows_as_they_are_after_an_update(device: torch.device) -> None:
    for kind in (AdamReference, AdamTriton):
        each = Trained(kind, torch.float64, Adam(1e-2), device)
        each.state.grad_norm = each.metrics[2]
        each.passes = kind(each.arena, each.state, Adam(1e-2), update=each.updates)
        norms = []
        for i in (0, 2, 3, 5, 6):
            each.step(gradients(i))
            norms.append(each.state.grad_norm.item())
        assert each.ring.slot.item() == 7
        # slots 2 to 6 of a ring of 4: the first of them was overwritten by the last
        assert each.ring.rows[:, 0].tolist() == [3.0, 4.0, 5.0, 2.0]
        assert each.ring.rows[:, 2].tolist() == [norms[2], norms[3], norms[4], norms[1]]


def test_a_ring_of_many_values_is_copied_whole(device: torch.device) -> None:
    each = Trained(AdamTriton, torch.float32, Adam(1e-2), device)
    values = torch.arange(300.0, device=device)
    ring = Ring(values, torch.zeros(2, 300, device=device), count(3, device))
    for launch in each.passes.launches(mark([True] * len(SHAPES), device), ring=ring):
        launch()
    assert torch.equal(ring.rows, torch.stack([torch.zeros_like(values), values]))


@pytest.mark.parametrize("kind", [AdamReference, AdamTriton])
def test_the_loss_scale_grows_after_good_updates_and_backs_off_from_bad_ones(kind: type, device: torch.device) -> None:
    each = Trained(kind, torch.float32, Adam(1e-2), device, scaled=True)
    scale, good = each.loss_scale.scale, each.loss_scale.good_steps
    good.fill_(1998)
    each.step(gradients(0))
    assert (scale.item(), good.item()) == (2.0**16, 1999)
    each.step(gradients(2))
    assert (scale.item(), good.item()) == (2.0**17, 0)
    each.step(gradients(3))
    assert (scale.item(), good.item()) == (2.0**17, 1)
    each.step(gradients(8))
    assert (scale.item(), good.item()) == (2.0**16, 0)
    scale.fill_(2.0**-14)
    each.step(gradients(8))
    assert (scale.item(), good.item(), each.state.skipped.item()) == (2.0**-14, 0, 2)


def test_a_scaled_update_equals_an_unscaled_one(device: torch.device) -> None:
    """Powers of two divide out exactly."""
    rule = RULES["adam-l2"]
    plain, scaled = (Trained(AdamTriton, torch.float32, rule, device, scaled=s) for s in (False, True))
    for i in range(4):
        for each in (plain, scaled):
            each.step(gradients(i))
    assert all(torch.equal(value, scaled.floats()[name]) for name, value in plain.floats().items())
    assert torch.equal(plain.state.grad_norm, scaled.state.grad_norm)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # by numpy, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_squares_that_overflow_are_not_finite(dtype: torch.dtype, device: torch.device) -> None:
    each = Trained(AdamTriton, dtype, Adam(1e-2), device, follow=None)
    before = each.arena.flat.clone()
    huge = torch.finfo(dtype).max ** 0.6
    each.step([torch.full(shape, huge, dtype=torch.float64) for shape in SHAPES])
    assert each.state.skipped.item() == 1
    assert each.state.grad_norm.item() == math.inf
    assert torch.equal(before, each.arena.flat)
    assert not each.arena.exp_avg_sq.any()


def test_the_greatest_finite_sum_goes_and_the_next_does_not(device: torch.device) -> None:
    """The sum is judged in the parameters' type, where it rounds to infinity from half an ulp above the greatest."""
    most = torch.finfo(torch.float32).max
    for total, goes in (
        (most, True),
        (math.nextafter((2 - 2**-24) * 2.0**127, 0), True),
        ((2 - 2**-24) * 2.0**127, False),
    ):
        for kind in (AdamReference, AdamTriton):
            each = Trained(kind, torch.float32, Adam(1e-2), device)
            squares = torch.tensor([total], dtype=torch.float64, device=device)
            active = mark([True] * len(SHAPES), device)
            if kind is AdamReference:
                each.passes.run(active, squares=squares)
            else:
                each.passes.launches(active, squares=squares)[0]()
            assert each.state.skipped.item() == (not goes), (kind, total)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # by numpy, in the interpreter: 0 / 0
def test_without_eps_the_padding_stays_zero(device: torch.device) -> None:
    each = Trained(AdamTriton, torch.float32, Adam(1e-2, eps=0.0), device)
    for i in (0, 2):
        each.step(gradients(i))
    assert not each.arena.flat[padding(each.arena)].any()
    assert each.arena.flat.isfinite().all()


def test_a_call_can_be_repeated_and_is_deterministic(device: torch.device) -> None:
    results = []
    for _ in range(2):
        each = Trained(AdamTriton, torch.float32, RULES["adamw"], device)
        function, arguments = each.passes.call(mark([True] * len(SHAPES), device))
        for i in (0, 2, 3):
            each.arena.take([g.to(device) for g in gradients(i)])
            function(*arguments)
            each.updates += 1
        results.append(each.floats())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert each.state.steps.tolist() == [3.0] * len(SHAPES)


def test_an_updater_runs_it_where_it_is_asked_for(device: torch.device) -> None:
    torch.manual_seed(0)
    nets = [nn.Linear(3, 4).to(device).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ups = [
        Updater("d_optimizer", net, Adam(1e-2), update=count(0, device), backend=backend)
        for net, backend in zip(nets, ("triton", "reference"), strict=True)
    ]
    for i in range(3):
        g = torch.Generator().manual_seed(i)
        grads = [torch.randn(p.shape, generator=g, dtype=torch.float64).to(device) for p in nets[0].parameters()]
        for up in ups:
            up.apply(grads)
    assert isinstance(ups[0]._pass, AdamTriton)
    assert not isinstance(ups[1]._pass, AdamTriton)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert (p - q).abs().max() <= 1e-14


def test_which_pass_an_arena_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena([("w", nn.Parameter(torch.ones(3)))])
    assert pass_for(arena) is not AdamTriton
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pass_for(arena, "triton") is AdamTriton
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match=re.escape("adam_ema: backend 'triton' needs CUDA tensors, got one on cpu")):
        pass_for(arena, "triton")
    arena.lower(torch.float16)
    assert pass_for(arena) is AdamReference  # the native pass writes bf16
    with pytest.raises(
        InputError, match=re.escape("the copy of the parameters is torch.float16, expected torch.bfloat16")
    ):
        arena.lower(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(3).double()}, "adam_ema: grad has dtype torch.float64, expected one of torch.float32"),
        ({"exp_avg": torch.zeros(4)}, "adam_ema: exp_avg has shape (4,), expected (3,)"),
        ({"step": torch.ones(1)}, "adam_ema: step has shape (1,), expected a scalar"),
        ({"param": torch.zeros(3).half()}, "adam_ema: param has dtype torch.float16, expected one of"),
        ({"lr": -1.0}, "adam_ema: lr is -1.0, expected >= 0"),
        ({"betas": (0.5, 1.0)}, "adam_ema: betas is (0.5, 1.0), expected two in [0, 1)"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    given = {name: torch.zeros(3) for name in ("param", "grad", "exp_avg", "exp_avg_sq")} | {"step": torch.tensor(1)}
    with pytest.raises(ValueError, match=re.escape(message)):
        adam_ema(**given | change)


def test_too_many_counters_are_refused(device: torch.device) -> None:
    each = Trained(AdamTriton, torch.float32, Adam(1e-2), device)
    with pytest.raises(ValueError, match="advance has 4 counters, expected at most 3"):
        each.passes.launches(mark([True] * len(SHAPES), device), advance=[(each.images, 1)] * 4)


def test_tensors_that_do_not_fit_are_named(device: torch.device) -> None:
    each = Trained(AdamTriton, torch.float32, Adam(1e-2), device)
    updated = replace(each.passes.updated(), exp_avg=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match=re.escape("adam_ema: exp_avg has shape (3,), flat (")):
        adam_ema_launch(updated, torch.zeros(1, 3), torch.zeros(1))
