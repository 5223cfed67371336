"""The beginning of a penalty's sweep: against autograd through the penalty, in fp64."""

from __future__ import annotations

import re

import pytest
import torch
from launches import Guarded, assert_as_accurate, matmul, strided
from test_linear_lrelu import DTYPES, SLOPES, dphi, phi

from fastgan.kernels._matrix import ACTIVATIONS
from fastgan.kernels.linear_penalty import KINDS, penalty_launch

pytestmark = pytest.mark.interpreted


def expected(
    g: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None, activation: str, kind: str, w: float,
    target: float, scale: float, dtype: torch.dtype, mm,
) -> list[torch.Tensor]:  # fmt: skip
    g = g.to(dtype).requires_grad_()
    squared = g.square().sum(1)
    rows = w * ((squared + torch.finfo(dtype).tiny).sqrt() - target).square() if kind == "norm" else w * squared
    value = rows.mean()
    (direction,) = torch.autograd.grad(scale * value, g)
    out = mm(direction, weight.to(dtype).t())
    if mask is not None:
        out = out * dphi(mask.to(dtype), activation, SLOPES[activation])
    return [value.detach(), rows.detach(), direction, out]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (33, 65, 7), (7, 33, 65)])
def test_is_the_derivative_of_the_penalty(
    rows: int, n: int, k: int, activation: str, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    guarded, slope = Guarded(device), SLOPES[activation]
    g, weight = (torch.randn(s, device=device).to(dtype) for s in ((rows, k), (n, k)))
    mask = None
    if activation != "identity":
        mask = phi(torch.randn(rows, n, device=device, dtype=wide), activation, slope).to(dtype)
    out = guarded.new(rows, n, dtype=dtype, like=mask)
    direction, value, rows_value = (
        guarded.new(rows, k, dtype=dtype),
        guarded.new(dtype=wide),
        guarded.new(rows, dtype=wide),
    )
    counter, before = torch.zeros(1, dtype=torch.int32, device=device), (g.clone(), weight.clone())
    loss_scale = torch.tensor(8.0, device=device, dtype=wide) if dtype == torch.float16 else None
    launch = penalty_launch(
        strided(g), direction, weight, out, mask=None if mask is None else out, activation=activation, slope=slope,
        kind=kind, penalty_weight=10.0, target=0.75, scale=4.0, value=value, rows_value=rows_value, counter=counter,
        loss_scale=loss_scale,
    )  # fmt: skip
    launch()
    first = [t.clone() for t in (value, rows_value, direction, out)]
    if mask is not None:
        out.copy_(mask)
    launch()  # the counter is as it was, and the numbers are the same
    assert all(map(torch.equal, first, (value, rows_value, direction, out)))
    assert int(counter) == 0
    guarded.check()
    assert torch.equal(g, before[0])
    assert torch.equal(weight, before[1])
    scale = 4.0 * (1.0 if loss_scale is None else 8.0)
    plain = expected(g, weight, mask, activation, kind, 10.0, 0.75, scale, wide, torch.mm)
    exact = expected(g, weight, mask, activation, kind, 10.0, 0.75, scale, torch.float64, matmul)
    pairs = zip(("value", "rows", "direction", "out"), (value, rows_value, direction, out), plain, exact, strict=True)
    for name, got, p, e in pairs:
        assert_as_accurate(f"{name} {kind}", got, p.to(got.dtype), e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_zero_has_no_direction(dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g, weight = torch.zeros(3, 4, device=device, dtype=dtype), torch.ones(5, 4, device=device, dtype=dtype)
    direction, out = torch.empty_like(g), torch.empty(3, 5, device=device, dtype=dtype)
    value, rows = torch.empty((), device=device, dtype=wide), torch.empty(3, device=device, dtype=wide)
    penalty_launch(g, direction, weight, out, penalty_weight=10.0, value=value, rows_value=rows,
                   loss_scale=torch.tensor(65536.0, device=device, dtype=wide),
                   counter=torch.zeros(1, dtype=torch.int32, device=device))()  # fmt: skip
    assert torch.equal(direction, torch.zeros_like(direction))
    assert torch.equal(out, torch.zeros_like(out))
    assert float(value) == 10.0


def test_more_rows_than_are_read_at_a_time(device: torch.device) -> None:
    g, weight = torch.randn(300, 2, device=device), torch.randn(3, 2, device=device)
    value, rows, counter = (torch.zeros(s, device=device) for s in ((), 300, 1))
    penalty_launch(g, torch.empty_like(g), weight, torch.empty(300, 3, device=device), kind="square",
                   penalty_weight=0.5, value=value, rows_value=rows, counter=counter.int())()  # fmt: skip
    assert_as_accurate("value", value, g.square().sum(1).mean() / 2, g.double().square().sum(1).mean() / 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"g": torch.zeros(0, 3)}, "g has no rows"),
        ({"weight": torch.zeros(2, 4)}, "weight has shape (2, 4), expected (N, 3)"),
        ({"kind": "lipschitz"}, "kind is 'lipschitz', expected one of norm, square"),
        ({"direction": torch.zeros(4, 2)}, "direction has shape (4, 2), expected (4, 3)"),
        ({"out": torch.zeros(4, 3)}, "out has shape (4, 3), expected (4, 2)"),
        ({"mask": torch.zeros(3, 2)}, "mask has shape (3, 2), expected (4, 2)"),
        ({"rows_value": torch.zeros(3)}, "rows_value has shape (3,), expected (4,)"),
        ({"counter": torch.zeros(1)}, "counter has dtype torch.float32, expected torch.int32"),
        ({"activation": "relu"}, "activation is 'relu', expected one of identity"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    arguments = {"g": torch.zeros(4, 3), "direction": torch.zeros(4, 3), "weight": torch.zeros(2, 3),
                 "out": torch.zeros(4, 2), "penalty_weight": 1.0, "value": torch.zeros(()),
                 "rows_value": torch.zeros(4), "counter": torch.zeros(1, dtype=torch.int32)}  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f"linear_penalty: {message}")):
        penalty_launch(**arguments | kwargs)


def test_direction_is_not_the_memory_of_g() -> None:
    g = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="linear_penalty: direction is the memory of g"):
        penalty_launch(g, g, torch.zeros(2, 3), torch.zeros(4, 2), penalty_weight=1.0, value=torch.zeros(()),
                       rows_value=torch.zeros(4), counter=torch.zeros(1, dtype=torch.int32))  # fmt: skip
