"""Gradients of several layers in one launch: against fp64, joins, biases, partial squares, and the update inside."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_as_accurate
from torch import nn

from fastgan import Adam, AdamW, Schedule
from fastgan.adam import AdamReference, AdamState, AdamTriton, LossScale, Ring, mark
from fastgan.arena import Arena
from fastgan.ema import EMA, Average
from fastgan.kernels.configs import Config
from fastgan.kernels.weight_gradient import Problem, programs_of, weight_gradient, weight_gradient_launch

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.float16, torch.float64]


class Memory:
    """Matrices with rows of their own in larger memory, and whether what is around them was written."""

    def __init__(self, device: torch.device, *, grid: bool = True) -> None:
        """With ``grid``, numbers are multiples of 1/8, so that sums of products are exact in every order."""
        self.device, self.generator, self.grid = device, torch.Generator().manual_seed(0), grid
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def empty(self, *shape: int, dtype: torch.dtype, pad: int = 3) -> torch.Tensor:
        """Rows that are ``pad`` elements apart; what is between them is NaN, and so are they."""
        rows, columns = shape if len(shape) == 2 else (1, *shape)
        room = torch.full((rows + 2, columns + pad), math.nan, dtype=dtype, device=self.device)
        inside = torch.zeros_like(room, dtype=torch.bool)
        inside[1:-1, :columns] = True
        self.kept.append((room, inside, room.clone()))
        view = room[1:-1, :columns]
        return view if len(shape) == 2 else view[0]

    def random(self, *shape: int, dtype: torch.dtype, pad: int = 3) -> torch.Tensor:
        t = self.empty(*shape, dtype=dtype, pad=pad)
        values = torch.randn(shape, generator=self.generator)
        t.copy_((values * 8).round() / 8 if self.grid else values)
        return t

    def check(self) -> None:
        for room, inside, before in self.kept:
            assert torch.equal(room[~inside].isnan(), before[~inside].isnan()), "memory around a matrix was written"


def right(p: Problem, dtype: torch.dtype) -> torch.Tensor:
    """The right factors, in a dtype."""
    x = p.x.to(dtype, copy=True)
    if p.scale is not None:
        begin, end = p.scaled or p.joined
        x[begin:end] *= p.scale.to(dtype)[:, None]
    if p.r is not None:
        x[slice(*p.joined)] += p.r.to(dtype)
    return x


def expected(p: Problem, dtype: torch.dtype, rounded: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """dw and db in a dtype, from right factors that are rounded first."""
    x = right(p, dtype)
    dw = p.u.to(dtype).t() @ (x if rounded is None or len(p.dw) == 1 else x.to(rounded).to(dtype))
    out = {"dw": dw}
    if p.db is not None:
        w = torch.ones(len(p.u), dtype=dtype, device=p.u.device)
        if p.bias_weights is not None:
            w[: len(p.bias_weights)] = p.bias_weights.to(dtype)
        rows = [i for begin, end in p.bias_rows for i in range(begin, end)]
        out["db"] = (w[:, None] * p.u.to(dtype))[rows].sum(0)
    if p.accumulate:
        out = {name: t + getattr(p, name).to(dtype) for name, t in out.items()}
    return out


def problems_of(memory: Memory, dtype: torch.dtype) -> dict[str, Problem]:
    """Layers of odd shapes with all that a problem may have."""
    out = torch.float64 if dtype == torch.float64 else torch.float32

    def problem(k: int, m: int, n: int, *, bias: bool = True, fill: bool = False, pad: int = 3, **rest: Any) -> Problem:
        u, x = memory.random(k, m, dtype=dtype, pad=pad), memory.random(k, n, dtype=dtype, pad=pad)
        make = memory.random if fill else memory.empty
        dw = make(m, n, dtype=out)
        return Problem(u, x, dw, make(m, dtype=out) if bias else None, accumulate=fill, **rest)

    def vector(n: int) -> torch.Tensor:
        return memory.random(n, dtype=out)

    return {
        "plain": problem(33, 7, 65, bias=False),
        "bias": problem(40, 33, 5, bias_rows=[(3, 20)]),
        "aligned": problem(64, 48, 40, bias_rows=[(0, 64)], pad=8),
        "two ranges": problem(37, 4, 9, bias_rows=[(0, 10), (20, 37)], bias_weights=vector(37)),
        "no rows of the bias": problem(12, 35, 3, bias_rows=[]),
        "one output": problem(150, 1, 35, bias_rows=[(0, 131)], bias_weights=vector(140)),
        "one input": problem(20, 33, 1, bias_rows=[(0, 20)]),
        "one of both": problem(9, 1, 1, bias_rows=[(0, 9)]),
        "no rows": problem(0, 4, 5, bias_rows=[(0, 0)]),
        "no inputs": problem(6, 4, 0, bias_rows=[(0, 6)]),
        "no outputs": problem(6, 0, 4, bias_rows=[(0, 6)]),
        "added": problem(17, 8, 6, fill=True, bias_rows=[(0, 17)]),
        "added rows": problem(17, 1, 6, fill=True, bias_rows=[(0, 17)]),
        "scaled": problem(40, 9, 7, scale=vector(22), scaled=(3, 25), bias_rows=[(0, 40)]),
        "joined": problem(40, 9, 33, r=memory.random(33, 33, dtype=dtype), joined=(5, 38)),
        "both": problem(70, 9, 33, scale=vector(36), r=memory.random(36, 33, dtype=dtype), joined=(30, 66)),
        "both, aligned": problem(
            64, 16, 32, scale=vector(64), scaled=(0, 64), r=memory.random(32, 32, dtype=dtype), joined=(0, 32), pad=8
        ),
        "both, one output": problem(
            140, 1, 33, scale=vector(140), scaled=(0, 140), r=memory.random(7, 33, dtype=dtype), joined=(130, 137)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("grid", [True, False], ids=["exact", "rounded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_layers_in_one_launch(dtype: torch.dtype, grid: bool, device: torch.device) -> None:
    memory = Memory(device, grid=grid)
    named = problems_of(memory, dtype)
    out = named["plain"].dw.dtype
    exact = {name: expected(p, torch.float64) for name, p in named.items()}
    plain = {name: expected(p, out, rounded=dtype) for name, p in named.items()}
    inputs = [t for p in named.values() for t in (p.u, p.x, p.r, p.scale, p.bias_weights) if t is not None]
    before = [t.clone() for t in inputs]
    squares = memory.empty(programs_of(list(named.values())), dtype=torch.float64)
    weight_gradient_launch(list(named.values()), squares=squares)()
    for name, p in named.items():
        for key, value in exact[name].items():
            got = getattr(p, key)
            if grid:
                assert torch.equal(got.double(), value), f"{name} {key}"
            elif got.numel() >= 30 and dtype != torch.float64:  # of a few numbers, luck decides whose error is greater
                assert_as_accurate(f"{name} {key}", got, plain[name][key], value)
            elif got.numel():
                assert (got.double() - value).abs().max() <= 100 * torch.finfo(got.dtype).eps
    total = sum((t.double() ** 2).sum().item() for p in named.values() for t in (p.dw, p.db) if t is not None)
    assert squares.sum().item() == pytest.approx(total, rel=1e-6)
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))
    memory.check()


@pytest.mark.parametrize("name", ["bias", "aligned", "both", "one output"])
def test_squares_are_of_the_whole_gradient_alone(name: str, device: torch.device) -> None:
    memory = Memory(device)
    problem = problems_of(memory, torch.float32)[name]
    if problem.scale is None and problem.r is None:  # in operands that may hold anything beyond their columns
        problem = replace(problem, dw=memory.empty(*problem.dw.shape, dtype=torch.float32))
    for dtype in (torch.float32, torch.float64):
        squares = memory.empty(programs_of([problem]), dtype=dtype)
        weight_gradient_launch([problem], squares=squares)()
        total = (problem.dw.double() ** 2).sum() + (0 if problem.db is None else (problem.db.double() ** 2).sum())
        assert squares.double().sum().item() == pytest.approx(total.item(), rel=1e-6)
    memory.check()


@pytest.mark.filterwarnings("ignore:invalid value")  # by numpy, in the interpreter: inf times 0
def test_a_gradient_that_is_not_finite_shows_in_the_squares(device: torch.device) -> None:
    for where in ("dw", "db"):
        memory = Memory(device)
        problem = problems_of(memory, torch.float32)["bias"]
        if where == "dw":
            problem.x[4, 2] = math.inf
        else:
            problem = replace(problem, bias_weights=memory.random(20, dtype=torch.float32))
            problem.bias_weights[7] = math.nan
        squares = memory.empty(programs_of([problem]), dtype=torch.float64)
        weight_gradient_launch([problem], squares=squares)()
        assert not squares.sum().isfinite()
        assert squares.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [5, 128, 131])
def test_terms_of_real_and_fake_rows_cancel_exactly(dtype: torch.dtype, half: int, device: torch.device) -> None:
    memory = Memory(device)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    rows = memory.random(half, 3, dtype=dtype)
    u, x = torch.cat([rows, rows]), memory.random(2 * half, 4, dtype=dtype)
    weights = torch.full((2 * half,), -1 / half, dtype=out, device=device)
    weights[half:] *= -1
    db = memory.empty(3, dtype=out)
    problem = Problem(u, x, memory.empty(3, 4, dtype=out), db, [(0, 2 * half)], weights)
    weight_gradient_launch([problem])()
    assert db.tolist() == [0, 0, 0]
    weight_gradient_launch([replace(problem, bias_rows=[(0, half)])])()
    assert db.any()


def test_two_runs_are_equal_bit_for_bit(device: torch.device) -> None:
    results = []
    for _ in range(2):
        memory = Memory(device)
        named = problems_of(memory, torch.float32)
        squares = memory.empty(programs_of(list(named.values())), dtype=torch.float64)
        weight_gradient_launch(list(named.values()), squares=squares)()
        results.append([squares, *(p.dw.clone() for p in named.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_another_tile_gives_the_same(device: torch.device) -> None:
    memory = Memory(device)
    problem = problems_of(memory, torch.float64)["both"]
    for tile in (Config(16, 16, 16, 4, 2), Config(64, 16, 32, 4, 2)):
        squares = memory.empty(programs_of([problem], tile=tile), dtype=torch.float64)
        weight_gradient_launch([problem], tile=tile, squares=squares)()
        assert_as_accurate("dw", problem.dw, *[expected(problem, torch.float64)["dw"]] * 2)
    memory.check()


def test_a_launch_keeps_what_its_table_points_to(device: torch.device) -> None:
    problem = problems_of(Memory(device), torch.float32)["both"]
    launch = weight_gradient_launch([problem])
    assert {t.data_ptr() for t in (problem.u, problem.x, problem.dw, problem.scale, problem.r)} <= {
        t.data_ptr() for t in launch.keep
    }


def test_a_gradient_penalty_on_the_weights_gradient_is_that_of_plain_torch(device: torch.device) -> None:
    """The derivative of a norm of a weight gradient: silently missing where a backward is not differentiable."""
    results = []
    for backend in ("triton", "reference"):
        g = torch.Generator().manual_seed(0)
        u, x = (torch.randn(6, n, generator=g, dtype=torch.float64).to(device).requires_grad_() for n in (3, 5))
        y = weight_gradient(u, x, backend=backend).tanh().sum()
        (gx,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(torch.autograd.grad(gx.square().sum(), [u, x]))
    for got, plain in zip(*results, strict=True):
        assert plain.abs().max() > 1e-3
        assert (got - plain).abs().max() <= 1e-12


def test_the_op_can_be_compiled_whole(device: torch.device) -> None:
    exported = torch.export.export(_Gradient(), (torch.ones(4, 3, device=device), torch.ones(4, 2, device=device)))
    assert "fastgan.weight_gradient" in exported.graph_module.code


class _Gradient(nn.Module):
    def forward(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return weight_gradient(u, x, backend="triton")


# ---- with the update inside

RULES = {
    "adam": Adam(1e-2, (0.5, 0.99), schedule=Schedule("cosine", steps=9, start=2, final=0.1, warmup=4)),
    "adam-l2": Adam(1e-2, (0.0, 0.9), eps=1e-6, weight_decay=0.1),
    "adamw": AdamW(1e-2, (0.9, 0.999), weight_decay=0.1, schedule=Schedule(warmup=5)),
}
SIZES = [(7, 33), (1, 7)]


class Network:
    """Two linear layers' parameters, and the problems that make their gradients."""

    def __init__(self, rule: Adam, dtype: torch.dtype, kind: type, device: torch.device, scaled: bool) -> None:
        g = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g).to(device, dtype)

        params = [nn.Parameter(randn(*s)) for m, n in SIZES for s in ((m, n), (m,))]
        self.arena = Arena([(str(i), p) for i, p in enumerate(params)], [p.detach().clone() for p in params])
        self.arena.lower(torch.float16)
        self.state = AdamState(len(params), dtype, device)
        self.update, images, averaged = (torch.tensor(0, device=device) for _ in range(3))
        self.images, self.averaged = images, averaged
        average = Average(nn.Module(), EMA(halflife_kimg=0.5, rampup=0.3), images, averaged)
        self.passes = kind(self.arena, self.state, rule, update=self.update, average=average, clip=0.9)
        self.loss_scale = LossScale.on(device) if scaled else None
        self.ring = Ring(self.state.grad_norm.view(1), torch.zeros(3, 1, dtype=dtype, device=device), images.clone())
        self.us = [torch.zeros(40, m, dtype=dtype, device=device) for m, _ in SIZES]
        self.xs = [torch.zeros(40, n, dtype=dtype, device=device) for _, n in SIZES]
        grads = self.arena.grads
        self.problems = [
            Problem(u, x, grads[2 * i], grads[2 * i + 1], [(0, 40)])
            for i, (u, x) in enumerate(zip(self.us, self.xs, strict=True))
        ]

    def load(self, step: int) -> None:
        g = torch.Generator().manual_seed(step)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        for u, x in zip(self.us, self.xs, strict=True):
            u.copy_(torch.randn(u.shape, generator=g) * 0.1).mul_(scale)
            x.copy_(torch.randn(x.shape, generator=g))

    def options(self) -> dict[str, Any]:
        advance = ((self.update, 1), (self.images, 16))
        return {"advance": advance, "ring": self.ring, "loss_scale": self.loss_scale}

    def squares(self, adam: bool = False) -> torch.Tensor:
        n = programs_of(self.problems, adam=adam)
        return torch.full((n,), math.nan, dtype=torch.float64, device=self.arena.flat.device)

    def state_of(self) -> dict[str, torch.Tensor]:
        a = self.arena
        return {"p": a.flat, "exp_avg": a.exp_avg, "exp_avg_sq": a.exp_avg_sq, "average": a.average}

    def counts(self) -> list[list[float]]:
        s = self.state
        rest = [] if self.loss_scale is None else [self.loss_scale.scale, self.loss_scale.good_steps]
        tensors = (s.steps, s.skipped, self.update, self.images, self.averaged, self.ring.slot, *rest)
        return [t.flatten().tolist() for t in tensors]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float32, True), (torch.float64, False)], ids=["fp32", "fp64"])
def test_gradients_and_their_update_as_two_launches_and_as_one(
    rule: Adam, dtype: torch.dtype, scaled: bool, device: torch.device
) -> None:
    """The chain of a captured step: gradients with partial squares, then one launch; and both in one."""
    exact = Network(rule, torch.float64, AdamReference, device, scaled)
    plain = Network(rule, dtype, AdamReference, device, scaled)
    two, one = (Network(rule, dtype, AdamTriton, device, scaled) for _ in range(2))
    squares = two.squares()
    active = mark([True] * 4, device)
    launches = [weight_gradient_launch(two.problems, squares=squares)]
    launches += two.passes.launches(active, squares=squares, **two.options())
    assert len(launches) == 2
    inside = weight_gradient_launch(
        one.problems, squares=one.squares(adam=True), adam=one.passes.updated(**one.options())
    )
    for i in range(4):
        for each in (exact, plain, two, one):
            each.load(i)
        for each in (exact, plain):
            for p in each.problems:
                p.dw.copy_(p.u.t() @ p.x)
                p.db.copy_(p.u.sum(0))
            each.passes.run(active, **each.options())
        for launch in (*launches, inside):
            launch()
        assert one.counts() == two.counts() == plain.counts(), i
    for name, value in exact.state_of().items():
        for each in (two, one):
            got = each.state_of()[name]
            if dtype == torch.float64:
                assert (got - value).abs().max() <= 1e-14, name
            else:
                assert_as_accurate(name, got, plain.state_of()[name], value)
    assert torch.equal(one.arena.low, one.arena.flat.float().half())
    assert not one.arena.grad.any()  # not written
    norm = plain.state.grad_norm.item()
    assert two.state.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert one.state.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert one.ring.rows[0].item() == one.state.grad_norm.item()


@pytest.mark.filterwarnings("ignore:invalid value")  # by numpy, in the interpreter: inf times 0
@pytest.mark.parametrize("scaled", [False, True])
def test_inside_each_element_is_guarded_by_itself(scaled: bool, device: torch.device) -> None:
    net = Network(RULES["adam"], torch.float32, AdamTriton, device, scaled)
    net.load(0)
    net.xs[0][3, 5] = math.inf  # one column of dW, for every row
    net.us[0][3].abs_()
    launch = weight_gradient_launch(
        net.problems, squares=net.squares(adam=True), adam=net.passes.updated(**net.options())
    )
    before = {name: t.clone() for name, t in net.state_of().items()}
    launch()
    moment, was = (net.arena.views_of(t)[0] for t in (net.arena.exp_avg, before["exp_avg"]))
    changed = moment != was
    assert not changed[:, 5].any()
    assert changed[:, [i for i in range(33) if i != 5]].all()
    assert net.arena.views_of(net.arena.exp_avg)[2].all()
    assert all(t.isfinite().all() for t in net.state_of().values())
    assert net.state.skipped.item() == 1
    assert net.state.steps.tolist() == [1, 1, 1, 1]
    assert not net.state.grad_norm.isfinite()
    assert net.loss_scale is None or net.loss_scale.scale.item() == 2.0**15


def test_inside_what_is_there_is_added_to_and_not_written(device: torch.device) -> None:
    nets = [Network(RULES["adamw"], torch.float64, AdamTriton, device, False) for _ in range(2)]
    for net in nets:
        net.load(0)
        for view in net.arena.grads:
            view.fill_(0.5)
        net.problems = [replace(p, accumulate=True) for p in net.problems]
    kept = nets[0].arena.grad.clone()
    squares = nets[0].squares(adam=True)
    weight_gradient_launch(nets[0].problems, squares=squares, adam=nets[0].passes.updated())()
    weight_gradient_launch(nets[1].problems)()
    for launch in nets[1].passes.launches(mark([True] * 4, device)):
        launch()
    for name, value in nets[0].state_of().items():
        assert (value - nets[1].state_of()[name]).abs().max() <= 1e-14, name
    assert torch.equal(nets[0].arena.grad, kept)


def test_inside_every_parameter_is_needed(device: torch.device) -> None:
    net = Network(RULES["adam"], torch.float32, AdamTriton, device, False)
    adam, squares = net.passes.updated(), net.squares(adam=True)
    with pytest.raises(ValueError, match=re.escape("weight_gradient: squares is None, expected memory for the sums")):
        weight_gradient_launch(net.problems, adam=adam)
    some = [replace(net.problems[0], db=None), net.problems[1]]
    with pytest.raises(ValueError, match=re.escape("weight_gradient: problems lack parameters [1], expected all")):
        weight_gradient_launch(some, adam=adam, squares=squares[: programs_of(some, adam=True)])
    elsewhere = [replace(net.problems[0], dw=torch.empty_like(net.problems[0].dw)), net.problems[1]]
    with pytest.raises(ValueError, match=re.escape("weight_gradient: dw or db is no parameter's part of adam.grad")):
        weight_gradient_launch(elsewhere, adam=adam, squares=squares)


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3)}, "x has shape (5, 3), expected (4, 3)"),
        ({"x": torch.zeros(4, 3).half()}, "x has dtype torch.float16, expected one of torch.float32"),
        ({"u": torch.zeros(2, 4).t()}, "u has strides (1, 4), expected rows that are contiguous"),
        ({"u": torch.zeros(4, 2, dtype=torch.int32)}, "u has dtype torch.int32, expected one of"),
        ({"dw": torch.zeros(3, 2)}, "dw has shape (3, 2), expected (2, 3)"),
        ({"dw": torch.zeros(2, 3).double()}, "dw has dtype torch.float64, expected one of torch.float32"),
        ({"db": torch.zeros(3)}, "db has shape (3,), expected (2,)"),
        ({"bias_rows": [(0, 1)] * 3}, "bias_rows has 3 ranges, expected at most 2"),
        ({"bias_rows": [(0, 5)]}, "bias_rows is (0, 5), expected rows of u's 4"),
        ({"bias_rows": [(0, 4)], "bias_weights": torch.zeros(3)}, "bias_weights has 3 rows, expected 4"),
        ({"scale": torch.zeros(2)}, "scale is given without the rows that it is for"),
        ({"scale": torch.zeros(2), "scaled": (0, 3)}, "scale has 2 rows, expected those of (0, 3)"),
        ({"scale": torch.zeros(3).half(), "scaled": (0, 3)}, "scale has dtype torch.float16"),
        ({"r": torch.zeros(2, 3), "joined": (3, 5)}, "joined is (3, 5), expected rows of u's 4"),
        ({"r": torch.zeros(2, 2), "joined": (0, 2)}, "r has shape (2, 2), expected (2, 3)"),
    ],
)
def test_errors_name_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    problem = Problem(torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(2), [(0, 4)])
    with pytest.raises(ValueError, match=re.escape(f"weight_gradient: {message}")):
        weight_gradient_launch([replace(problem, **change)])


def test_errors_of_a_launch() -> None:
    problem = Problem(torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="weight_gradient: problems is empty"):
        weight_gradient_launch([])
    with pytest.raises(ValueError, match=re.escape("squares has shape (5,), expected (1,)")):
        weight_gradient_launch([problem], squares=torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="precision is 'fast', expected one of ieee, tf32"):
        weight_gradient_launch([problem], precision="fast")
    with pytest.raises(ValueError, match=re.escape("weight_gradient: x has shape (3, 3), expected (4, N)")):
        weight_gradient(torch.zeros(4, 2), torch.zeros(3, 3))
