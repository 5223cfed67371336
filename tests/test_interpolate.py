"""What is particular to ``interpolate``: its errors, its ends, mixed dtypes and how it is traced."""

from __future__ import annotations

import re

import pytest
import torch

from fastgan import steps
from fastgan.kernels.interpolate import interpolate, interpolate_launch, interpolate_reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(3, 2)}, "interpolate: b has shape (3, 2), expected (3, 4)"),
        ({"b": torch.zeros(3, 4).half()}, "interpolate: b has dtype torch.float16, expected torch.float32"),
        ({"alpha": torch.zeros(3, 1)}, "interpolate: alpha has shape (3, 1), expected (3,)"),
        ({"alpha": torch.zeros(3).double()}, "interpolate: alpha has dtype torch.float64, expected one of"),
        ({"a": torch.zeros(3, 4).long()}, "interpolate: a has dtype torch.int64"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    args = {"alpha": torch.zeros(3), "a": torch.zeros(3, 4), "b": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        interpolate(**args)


def test_the_ends_are_the_two_batches(device: torch.device) -> None:
    a, b = torch.randn(2, 2, 5, device=device)
    alpha = torch.tensor([1.0, 0.0], device=device)
    assert torch.equal(interpolate(alpha, a, b, backend="triton"), torch.stack([a[0], b[1]]))


def test_places_may_be_more_precise_than_the_samples(device: torch.device) -> None:
    alpha = torch.rand(5, device=device, requires_grad=True)
    a, b = (torch.randn(5, 3, device=device).half().requires_grad_() for _ in range(2))
    for backend in ("triton", "reference"):
        y = interpolate(alpha, a, b, backend=backend)
        grads = torch.autograd.grad(y.sum(), (alpha, a, b))
        assert [t.dtype for t in (y, *grads)] == [torch.float16, torch.float32, torch.float16, torch.float16]
        assert torch.allclose(y.float(), interpolate_reference(alpha, a.float(), b.float()), atol=2e-3)


def test_launch_equals_the_step_of_a_plan(device: torch.device) -> None:
    alpha, a, b = torch.rand(7, device=device), *torch.randn(2, 7, 3, 5, device=device)
    got, want = torch.full_like(a, float("nan")), torch.empty_like(a)
    interpolate_launch(alpha, a, b, got)()
    steps.mix(alpha, a, b, want)()
    assert torch.allclose(got, want, rtol=0, atol=1e-6)


def test_is_traced_with_its_derivatives(device: torch.device) -> None:
    alpha, a, b = (torch.rand(s, device=device, requires_grad=True) for s in ((3,), (3, 4), (3, 4)))
    torch.library.opcheck(torch.ops.fastgan.interpolate.default, (alpha, a, b))
