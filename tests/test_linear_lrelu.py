"""What is particular to ``linear_lrelu``: its errors, its launches on given memory, and what compiles it."""

from __future__ import annotations

import re

import pytest
import torch
from launches import Guarded, assert_as_accurate, matmul, strided

from fastgan.kernels import configs
from fastgan.kernels._matrix import ACTIVATIONS
from fastgan.kernels.linear_lrelu import linear_launch, linear_lrelu

pytestmark = pytest.mark.interpreted

DTYPES = (torch.float16, torch.float32, torch.float64)
SLOPES = {"identity": 0.0, "leaky-relu": 0.2, "tanh": 0.0, "sigmoid": 0.0}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x has shape (2, 5), expected (..., 4) for weight (3, 4)"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x has dtype torch.int32, expected one of"),
        ({"x": torch.zeros(())}, "x is a scalar"),
        ({"weight": torch.zeros(3)}, "weight has shape (3,), expected [N, K]"),
        ({"weight": torch.zeros(3, 4).double()}, "weight has dtype torch.float64, expected torch.float32"),
        ({"bias": torch.zeros(4)}, "bias has shape (4,), expected (3,)"),
        ({"bias": torch.zeros(3).half()}, "bias has dtype torch.float16, expected torch.float32"),
        ({"activation": "gelu"}, "activation is 'gelu', expected one of identity, leaky-relu, tanh, sigmoid"),
        ({"slope": -0.1}, "slope is -0.1, expected >= 0"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of ieee, tf32"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4)} | kwargs
    with pytest.raises(ValueError, match=re.escape(f"linear_lrelu: {message}")):
        linear_lrelu(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x has shape (2, 5), expected 4 columns for weight (3, 4)"),
        ({"x": torch.zeros(4, 2).t()}, "x has strides (1, 2), expected rows that are contiguous"),
        ({"x": torch.zeros(2, 4).double()}, "expected both or neither torch.float64"),
        ({"y": torch.zeros(2, 4)}, "y has shape (2, 4), expected (2, 3)"),
        ({"mask": torch.zeros(3, 3)}, "mask has shape (3, 3), expected (2, 3)"),
        ({"bias": torch.zeros(6)[::2]}, "bias is not contiguous"),
        ({"transposed": True}, "x has shape (2, 4), expected 3 columns for weight (3, 4)"),
    ],
)
def test_errors_of_a_launch_name_the_argument(kwargs: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "y": torch.zeros(2, 3)} | kwargs
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_launch(**arguments)


def phi(z: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    if activation == "leaky-relu":
        return torch.where(z > 0, z, z * slope)
    return {"identity": torch.clone, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation](z)


def dphi(y: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    ones = torch.ones_like(y)
    if activation == "leaky-relu":
        return torch.where(y > 0, ones, ones * slope)
    return {"identity": ones, "tanh": ones - y * y, "sigmoid": y * (ones - y)}[activation]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 33, 65), (33, 7, 1), (65, 1, 33), (0, 3, 2), (2, 3, 0)])
def test_launches_write_their_formulas(
    m: int, n: int, k: int, activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Forward with the bias of another dtype, a step of the chain in place of its mask, a step of the sweep."""
    slope, guarded = SLOPES[activation], Guarded(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
    bias, back = torch.randn(n, device=device, dtype=wide), torch.randn(m, n, device=device).to(dtype)
    out = phi(torch.randn(m, n, device=device, dtype=wide), activation, slope).to(dtype)
    below = phi(torch.randn(m, k, device=device, dtype=wide), activation, slope).to(dtype)
    y, chain, sweep = (
        guarded.new(*t.shape, dtype=dtype, like=like) for t, like in ((out, None), (below, below), (out, None))
    )
    before = [t.clone() for t in (x, weight, bias, back, out)]
    linear_launch(strided(x), weight, y, bias=bias, activation=activation, slope=slope)()
    linear_launch(strided(back), weight, chain, mask=chain, activation=activation, slope=slope, transposed=True)()
    linear_launch(x, weight, sweep, mask=strided(out), activation=activation, slope=slope)()
    guarded.check()
    assert all(map(torch.equal, before, (x, weight, bias, back, out)))

    def expected(dtype: torch.dtype, mm=torch.mm) -> list[torch.Tensor]:
        x_, w, b, u, o, a = (t.to(dtype) for t in (x, weight, bias, back, out, below))
        return [phi(mm(x_, w.t()) + b, activation, slope), mm(u, w) * dphi(a, activation, slope),
                mm(x_, w.t()) * dphi(o, activation, slope)]  # fmt: skip

    for name, got, plain, exact in zip(
        ("y", "chain", "sweep"), (y, chain, sweep), expected(dtype), expected(torch.float64, matmul), strict=True
    ):
        assert_as_accurate(f"{name} {activation}", got, plain, exact)


@pytest.mark.parametrize("tile", [configs.Config(16, 64, 16, 4, 1), configs.Config(64, 16, 32, 4, 1)])
def test_a_tile_changes_no_more_than_rounding(tile: configs.Config, device: torch.device) -> None:
    x, weight, bias = (torch.randn(*s, device=device) for s in ((33, 50), (41, 50), (41,)))
    y = torch.empty(33, 41, device=device)
    linear_launch(x, weight, y, bias=bias, activation="tanh", tile=tile)()
    plain, exact = (torch.tanh(x.to(d) @ weight.to(d).t() + bias.to(d)) for d in (torch.float32, torch.float64))
    assert_as_accurate("y", y, plain, exact)


def test_operands_of_two_dtypes_meet_in_the_weights(device: torch.device) -> None:
    x, weight = torch.randn(9, 20, device=device), torch.randn(6, 20, device=device).half()
    y = torch.empty(9, 6, device=device)
    linear_launch(x, weight, y)()
    exact = x.half().double() @ weight.double().t()
    assert_as_accurate("y", y, (x.half().float() @ weight.float().t()), exact)


def test_derivative_at_zero_is_the_negative_side(device: torch.device) -> None:
    x, weight = torch.zeros(2, 3, device=device), torch.ones(4, 3, device=device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    linear_lrelu(x, weight, bias, slope=0.25, backend="triton").sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 0.5))


@pytest.mark.parametrize("activation", ["leaky-relu", "tanh"])
def test_a_gradient_penalty_reaches_every_parameter(activation: str, device: torch.device) -> None:
    """The trap of a backward that is not differentiable: a right penalty, and no gradient of it."""
    shapes = ((8, 5), (8,), (1, 8), (1,))
    parameters = [torch.randn(s, device=device, dtype=torch.float64, requires_grad=True) for s in shapes]

    def gradients(backend: str) -> list[torch.Tensor | None]:
        w1, b1, w2, b2 = parameters
        x = torch.linspace(-1, 1, 35, device=device, dtype=torch.float64).view(7, 5).requires_grad_()
        hidden = linear_lrelu(x, w1, b1, activation=activation, backend=backend)
        logits = linear_lrelu(hidden, w2, b2, activation="identity", backend=backend)
        (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return torch.autograd.grad((g.norm(dim=1) - 1).square().mean() + logits.mean(), parameters)

    for got, exact in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_compiles_in_one_graph(device: torch.device) -> None:
    x, weight, bias = (torch.randn(*s, device=device, requires_grad=True) for s in ((5, 6), (4, 6), (4,)))

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_lrelu(x, weight, bias, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    for a, b in zip(got, torch.autograd.grad(loss(x, weight, bias), (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_custom_ops_are_registered_as_torch_wants_them(device: torch.device) -> None:
    x, weight, bias = (torch.randn(*s, device=device, requires_grad=True) for s in ((5, 6), (4, 6), (4,)))
    ops = torch.ops.fastgan
    torch.library.opcheck(ops.linear_lrelu.default, (x, weight, bias, "tanh", 0.2, "ieee"))
    torch.library.opcheck(ops.linear_lrelu_product.default, (x, weight, False, True, "ieee"))
    torch.library.opcheck(ops.linear_lrelu_mask.default, (x, x.detach(), "leaky-relu", 0.2))
