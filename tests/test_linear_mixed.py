"""The first layer of samples between others: against the layer of the mixed samples."""

from __future__ import annotations

import re

import pytest
import torch
from launches import Guarded, assert_as_accurate, matmul, strided
from test_linear_lrelu import DTYPES, SLOPES, phi

from fastgan.kernels._matrix import ACTIVATIONS
from fastgan.kernels.linear_mixed import mixed_launch

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "n", "k", "swapped"), [(1, 1, 1, False), (33, 7, 65, True), (7, 65, 33, False)])
def test_is_the_layer_of_the_mixed_samples(
    rows: int, n: int, k: int, swapped: bool, activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    slope, guarded = SLOPES[activation], Guarded(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2 * rows, k, device=device).to(dtype)
    weight, bias = torch.randn(n, k, device=device).to(dtype), torch.randn(n, device=device, dtype=wide)
    alpha = torch.rand(rows, device=device, dtype=wide)
    first, second = (rows, 0) if swapped else (0, rows)
    y, before = guarded.new(3 * rows + 2, n, dtype=dtype), [t.clone() for t in (x, weight, bias, alpha)]
    mixed_launch(
        strided(x), weight, y, alpha, bias=bias, activation=activation, slope=slope, first=first, second=second,
        mixed=2 * rows + 2,
    )()  # fmt: skip
    guarded.check()
    assert y[2 * rows : 2 * rows + 2].isnan().all(), "rows of no part were written"
    assert all(map(torch.equal, before, (x, weight, bias, alpha)))

    def expected(dtype: torch.dtype, mm) -> list[torch.Tensor]:
        a, real, fake = alpha.to(dtype).view(-1, 1), *(x[p : p + rows].to(dtype) for p in (first, second))
        w, b = weight.to(dtype), bias.to(dtype)
        return [phi(mm(t, w.t()) + b, activation, slope) for t in (real, fake, a * real + (1 - a) * fake)]

    got = [y[p : p + rows] for p in (first, second, 2 * rows + 2)]
    pairs = zip(
        ("first", "second", "mixed"), got, expected(dtype, torch.mm), expected(torch.float64, matmul), strict=True
    )
    for name, part, plain, exact in pairs:
        assert_as_accurate(name, part, plain, exact)


def test_no_rows_and_no_bias(device: torch.device) -> None:
    y = torch.empty(0, 3, device=device)
    empty = torch.empty(0, device=device)
    mixed_launch(
        torch.empty(0, 4, device=device), torch.ones(3, 4, device=device), y, empty, first=0, second=0, mixed=0
    )()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(5, 3)}, "x has shape (5, 3), expected (4, 3)"),
        ({"second": 1}, "first is 0 and second 1, expected 0 and 2"),
        ({"mixed": 3}, "mixed is 3, expected >= 4"),
        ({"mixed": 5}, "y has shape (6, 2), expected (>= 7, 2)"),
        ({"bias": torch.zeros(3)}, "bias has shape (3,), expected (2,)"),
        ({"alpha": torch.zeros(2, 1)}, "alpha has shape (2, 1), expected one dimension"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    arguments = {"x": torch.zeros(4, 3), "weight": torch.zeros(2, 3), "y": torch.zeros(6, 2), "alpha": torch.zeros(2),
                 "first": 0, "second": 2, "mixed": 4}  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f"linear_mixed: {message}")):
        mixed_launch(**arguments | kwargs)
