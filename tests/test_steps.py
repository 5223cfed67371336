"""What runs between a plan's products: natively, in torch ops, and in fp64 the same; nothing else is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
from closeness import assert_as_accurate
from torch import Tensor

from fastgan import _native, losses, steps
from fastgan.steps import Call

Shape = tuple[int, ...]
Tensors = Mapping[str, Tensor]

pytestmark = pytest.mark.skipif(_native.ext is None, reason="the native extension was not built")

GUARD, CANARY = 64, 12345.0  # elements around every tensor, and what is in them


@dataclass(frozen=True)
class Case:
    """A call over tensors of these shapes; ``out`` are written, ``both`` read and written."""

    call: Callable[[Tensors], Call]
    read: dict[str, Shape]
    out: dict[str, Shape] = field(default_factory=dict)
    both: dict[str, Shape] = field(default_factory=dict)


def activations(rows: int, channels: int, *inner: int) -> dict[str, Case]:
    x, c = (rows, channels, *inner), (channels,)
    cases = {}
    for slope in (0.0, 0.2, 1.0):
        cases |= {
            f"bias_act {slope}": Case(
                lambda t, s=slope: steps.bias_act(t["x"], t["y"], t["b"], s), {"x": x, "b": c}, {"y": x}
            ),
            f"bias_act {slope}, no bias": Case(
                lambda t, s=slope: steps.bias_act(t["x"], t["y"], None, s), {"x": x}, {"y": x}
            ),
            f"bias_act {slope}, in place": Case(
                lambda t, s=slope: steps.bias_act(t["y"], t["y"], t["b"], s), {"b": c}, both={"y": x}
            ),
            f"bias_act {slope}, source later": Case(
                lambda t, s=slope: later(steps.bias_act(None, t["y"], t["b"], s), t["x"]), {"x": x, "b": c}, {"y": x}
            ),
            f"mask_mul {slope}": Case(
                lambda t, s=slope: steps.mask_mul(t["x"], t["y"], t["m"], s), {"x": x, "m": x}, {"y": x}
            ),
            f"mask_mul {-slope}": Case(
                lambda t, s=-slope: steps.mask_mul(t["x"], t["y"], t["m"], s), {"x": x, "m": x}, {"y": x}
            ),
            f"mask_mul {slope}, in place": Case(
                lambda t, s=slope: steps.mask_mul(t["y"], t["y"], t["m"], s), {"m": x}, both={"y": x}
            ),
            f"mask_mul {slope}, over the mask": Case(
                lambda t, s=slope: steps.mask_mul(t["x"], t["y"], t["y"], s), {"x": x}, both={"y": x}
            ),
            f"mask_mul {slope}, source later": Case(
                lambda t, s=slope: later(steps.mask_mul(None, t["y"], t["m"], s), t["x"]), {"x": x, "m": x}, {"y": x}
            ),
        }  # fmt: skip
    return cases


def later(call: Call, x: Tensor) -> Call:
    """From a source that is not contiguous, as a convolution's may be."""
    src = x.movedim(0, -1).contiguous().movedim(-1, 0)
    return lambda: call(src)


def rows_alone(rows: int, columns: int) -> dict[str, Case]:
    x, r, c = (rows, columns), (rows,), (columns,)
    return {
        f"outer_mask {s}": Case(
            lambda t, s=s: steps.outer_mask(t["u"], t["w"], t["y"], t["m"], s), {"u": r, "w": c, "m": x}, {"y": x}
        )
        for s in (0.0, 0.2, 1.0)
    } | {
        "outer_mask, no mask": Case(
            lambda t: steps.outer_mask(t["u"], t["w"], t["y"], None, 1.0), {"u": r, "w": c}, {"y": x}
        )
    }


def reductions(rows: int, channels: int, *inner: int) -> dict[str, Case]:
    x, r, c = (rows, channels, *inner), (rows,), (channels,)
    cases = {
        "mix": Case(lambda t: steps.mix(t["alpha"], t["a"], t["b"], t["y"]), {"alpha": r, "a": x, "b": x}, {"y": x}),
        "scale_add": Case(lambda t: steps.scale_add(t["c"], t["a"], t["r"]), {"c": r, "r": x}, both={"a": x}),
        "channel_sum": Case(lambda t: steps.channel_sum(t["x"], None, t["y"]), {"x": x}, {"y": c}),
        "channel_sum, weighted": Case(lambda t: steps.channel_sum(t["x"], t["w"], t["y"]), {"x": x, "w": r}, {"y": c}),
    }
    for norm in (True, False):
        options = {"norm": norm, "weight": 3.0, "target": 0.7, "scale": 4.0}
        cases |= {
            f"penalty, {norm=}": Case(
                lambda t, o=options: steps.penalty(t["g"], t["r"], t["value"], add=False, **o),
                {"g": x}, {"r": x, "value": ()},
            ),
            f"penalty, {norm=}, added": Case(
                lambda t, o=options: steps.penalty(t["g"], t["r"], t["value"], add=True, **o),
                {"g": x}, {"value": ()}, {"r": x},
            ),
        }  # fmt: skip
    return cases


def of_losses(n: int) -> dict[str, Case]:
    v: Shape = (n,)
    scalars: dict[str, Shape] = {"loss": (), "r_mean": (), "f_mean": ()}
    cases = {}
    for kind in losses.LOSSES:
        cases[f"discriminator, {kind}"] = Case(
            lambda t, k=kind: steps.discriminator_loss(
                k, t["r"], t["f"], t["dr"], t["df"], t["loss"], t["r_mean"], t["f_mean"]
            ),
            {"r": v, "f": v}, {"dr": v, "df": v, **scalars},
        )  # fmt: skip
        cases[f"generator, {kind}"] = Case(
            lambda t, k=kind: steps.generator_loss(k, t["f"], t["r"], t["df"], t["loss"]),
            {"r": v, "f": v}, {"df": v, "loss": ()},
        )  # fmt: skip
    return cases


SIZES = [(1, 1), (1, 7), (5, 1), (3, 33), (9, 300), (1, 1, 1, 1), (2, 3, 5, 3), (3, 19, 4, 4)]
LARGE = [(311, 257), (7, 66, 33, 5)]  # more than a thread's share
CASES = {
    f"{name} {list(size)}": case
    for size in [*SIZES, *LARGE]
    for make in (activations, reductions, *([rows_alone] if len(size) == 2 else []))
    for name, case in make(*size).items()
} | {f"{name} [{n}]": case for n in (1, 2, 77) for name, case in of_losses(n).items()}


def guarded(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN, and the memory around it."""
    n = math.prod(shape)
    memory = torch.full((n + 2 * GUARD,), CANARY, dtype=dtype)
    memory[GUARD : GUARD + n] = math.nan
    return memory[GUARD : GUARD + n].view(shape), memory


def run(case: Case, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    """What a case writes; all that it must leave alone is as before."""
    r = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    memories = []
    for name, shape in {**case.read, **case.both, **case.out}.items():
        tensors[name], memory = guarded(shape, dtype)
        memories.append(memory)
        if name not in case.out:
            tensors[name].copy_(torch.randn(shape, generator=r) * 2)
    tensors.get("g", torch.empty(1))[0] = 0  # a gradient of zero
    before = {name: tensors[name].clone() for name in case.read}
    case.call(tensors)()
    for memory in memories:
        assert (memory[:GUARD] == CANARY).all()
        assert (memory[-GUARD:] == CANARY).all()
    for name, t in before.items():
        assert torch.equal(tensors[name], t), name
    return {name: tensors[name] for name in (*case.out, *case.both)}


@contextmanager
def in_torch() -> Iterator[None]:
    with patch.object(_native, "ext", None):
        yield


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_native_and_torch(name: str) -> None:
    case = CASES[name]
    with in_torch():
        exact, plain = run(case, torch.float64), run(case, torch.float32)
    for k, got in run(case, torch.float32).items():
        assert_as_accurate(k, got, plain[k], exact[k])
    for k, got in run(case, torch.float64).items():
        assert torch.linalg.norm(got - exact[k]) <= 1e-14 * torch.linalg.norm(exact[k]), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [k for k in CASES if any(str(list(size)) in k for size in LARGE)])
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    with threads(1):
        one = run(CASES[name], dtype)
    with threads(2):
        two = run(CASES[name], dtype)
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize("native", [True, False])
def test_losses_are_those_of_autograd(kind: str, native: bool) -> None:
    r, f = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in "rf")
    loss = losses.get(kind)
    dr, df, value, r_mean, f_mean = (torch.full(s, math.nan, dtype=torch.float64) for s in ((9,), (9,), (), (), ()))
    x, y = r.detach(), f.detach()
    with patch.object(_native, "ext", _native.ext if native else None):
        steps.discriminator_loss(kind, x, y, dr, df, value, r_mean, f_mean)()
        expected = loss.discriminator(r, f).mean()
        for got, want in [
            *zip((dr, df), torch.autograd.grad(expected, (r, f)), strict=True),
            (value, expected), (r_mean, r.mean()), (f_mean, f.mean()),
        ]:  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-16)
        steps.generator_loss(kind, y, x if loss.compares else None, df, value)()
        expected = loss.generator(f, r.detach()).mean()
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-16)
        torch.testing.assert_close(df, torch.autograd.grad(expected, f)[0], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", losses.LOSSES)
def test_losses_of_large_logits(kind: str, native: bool) -> None:
    logits = torch.tensor([-1e4, -300.0, -90.0, 0.0, 90.0, 300.0, 1e4])
    others = logits.flip(0).contiguous()  # calls know addresses alone
    dr, df, value, r_mean, f_mean = (torch.full(s, math.nan) for s in ((7,), (7,), (), (), ()))
    with patch.object(_native, "ext", _native.ext if native else None):
        steps.discriminator_loss(kind, logits, others, dr, df, value, r_mean, f_mean)()
        assert all(t.isfinite().all() for t in (dr, df, value, r_mean, f_mean))
        steps.generator_loss(kind, logits, others, df, value)()
        assert all(t.isfinite().all() for t in (df, value))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_the_kink_belongs_to_the_slope(slope: float, native: bool) -> None:
    z = torch.tensor([[-1.0, -0.0, 0.0, 1e-45, 1.0, math.nan]])
    y, m, ones = torch.full_like(z, math.nan), torch.full_like(z, math.nan), torch.ones_like(z)
    with patch.object(_native, "ext", _native.ext if native else None):
        steps.bias_act(z, y, None, slope)()
        steps.mask_mul(ones, m, y, slope)()
    expected = torch.nn.functional.leaky_relu(z, slope)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert m[0, :5].tolist() == pytest.approx([slope, slope, slope, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_that_cancel_cancel_exactly(dtype: torch.dtype) -> None:
    x = torch.randn(37, 21, 3, dtype=dtype).repeat(2, 1, 1)
    weight = torch.cat([torch.full((37,), -1 / 37), torch.full((37,), 1 / 37)]).to(dtype)
    out = torch.full((21,), math.nan, dtype=dtype)
    for ext in (_native.ext, None):
        with patch.object(_native, "ext", ext):
            steps.channel_sum(x, weight, out)()
        assert (out == 0).all()


def test_what_native_code_does_not_take_runs_in_torch() -> None:
    for x in (torch.randn(4, 6).bfloat16(), torch.randn(6, 4).t()):
        y = torch.full((4, 6), math.nan, dtype=x.dtype)
        steps.bias_act(x, y, None, 0.2)()
        assert torch.equal(y, torch.nn.functional.leaky_relu(x, 0.2))


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(16, 16, 16), (33, 47, 600), (32, 32, 256), (192, 100, 784), (100, 193, 300), (64, 95, 37)]
)
def test_matrix_products(m: int, n: int, k: int, transposed: tuple[bool, bool]) -> None:
    """Every layout beside torch's own product; nothing around it is written; any number of threads gives the same."""
    a = torch.randn(k, m).t() if transposed[0] else torch.randn(m, k)
    b = torch.randn(n, k).t() if transposed[1] else torch.randn(k, n)
    memory = torch.full((m * n + 2 * GUARD,), CANARY)
    out = memory[GUARD:-GUARD].view(m, n).fill_(math.nan)
    results = []
    for count in (1, 2):
        with threads(count):
            steps.product(a, b, out)()
        results.append(out.clone())
    assert_as_accurate("product", results[0], a @ b, a.double() @ b.double())
    if min(m, n, k) >= 32 and _native.ext.has_matrix_product():
        assert torch.equal(*results)
    assert (memory[:GUARD] == CANARY).all()
    assert (memory[-GUARD:] == CANARY).all()


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("native", [True, False])
def test_infinities_and_nan_are_those_of_torch(slope: float, native: bool) -> None:
    x = torch.tensor([[-math.inf, math.inf, math.nan, -1.0, 0.0, 2.0]])
    expected = torch.nn.functional.relu(x) if slope == 0 else torch.nn.functional.leaky_relu(x, slope)
    for bias in (None, torch.zeros(6)):
        y = torch.empty_like(x)
        with nullcontext() if native else in_torch():
            steps.bias_act(x, y, bias, slope)()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
