"""The one numerical criterion: of the tests, of ``fastgan validate`` and of whoever writes an op.

``max|got - exact| <= 2 max|plain - exact| + 2 ulp``: what is checked may err at most twice as much as plain PyTorch in
the same dtype, both measured against fp64. A floor of 2 ulp of the largest value keeps the bound meaningful where plain
PyTorch happens to be exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Closeness:
    """How far a result and PyTorch's own are from fp64, and how far the result may be.

    Attributes:
        error: largest absolute error of the result; NaN where it has a NaN.
        plain: of plain PyTorch.
        bound: what ``error`` may be.
        detail: what is wrong, where something is; empty otherwise.
    """

    error: float
    plain: float
    bound: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return not self.detail


def measure(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, slack: float = 2.0) -> Closeness:
    """Hold one result to the criterion.

    Args:
        got: of any shape and floating dtype.
        plain: PyTorch's result in that dtype, of that shape.
        exact: in fp64, of that shape.
        slack: how many times PyTorch's error is allowed.
    """
    if got.shape != plain.shape:
        detail = f"shape {tuple(got.shape)}, expected {tuple(plain.shape)}"
    elif got.dtype != plain.dtype:
        detail = f"dtype {got.dtype}, expected {plain.dtype}"
    else:
        detail = ""
    if detail:
        return Closeness(float("nan"), float("nan"), float("nan"), detail)
    if got.numel() == 0:
        return Closeness(0.0, 0.0, 0.0)
    ulp = torch.finfo(got.dtype).eps * exact.abs().max().item() if got.is_floating_point() else 0.0
    exact = exact.double()
    off = (plain.double() - exact).abs().max().item()
    err = (got.double() - exact).abs()
    bound = slack * off + 2 * ulp
    if got.isnan().any():
        return Closeness(float("nan"), off, bound, f"{int(got.isnan().sum())} of {got.numel()} values are NaN")
    error, worst = err.max().item(), int(err.argmax())
    if not error <= bound:
        detail = (
            f"error {error:.3e} > {bound:.3e} at flat index {worst}: "
            f"got {got.flatten()[worst].item():.6g}, exact {exact.flatten()[worst].item():.6g}"
        )
    return Closeness(error, off, bound, detail)


def assert_as_accurate(
    name: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, slack: float = 2.0
) -> None:
    """Raise an ``AssertionError`` that begins with ``name`` where the criterion does not hold."""
    found = measure(got, plain, exact, slack)
    if not found.passed:
        raise AssertionError(f"{name}: {found.detail}")
