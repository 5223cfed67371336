"""What the tile sweep times: launches of each matrix kernel on seeded operands, with what must come out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgan.kernels.configs import Config

SLOPE = 0.2
Tensor = torch.Tensor


@dataclass
class Problem:
    """One shape of one op in one dtype.

    Attributes:
        build: a tile to the launches that are timed; all write to ``outs``.
        outs: what they write.
        exact: the same in fp64.
        plain: the same by torch in the dtype.
        library: the same work by torch on static memory, or ``None``.
    """

    build: Callable[[Config], list[Any]]
    outs: list[Tensor]
    exact: list[Tensor] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)
    library: Callable[[], object] | None = None


def phi(z: Tensor) -> Tensor:
    return torch.nn.functional.leaky_relu(z, SLOPE)


def slope_of(y: Tensor) -> Tensor:
    return torch.where(y > 0, 1.0, SLOPE).to(y.dtype)


class Operands:
    """Seeded, and of a size that keeps sums near 1."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.precision = "tf32" if dtype == torch.float32 else "ieee"
        self.wide = torch.float32
        self._g = torch.Generator(device=device).manual_seed(0)

    def randn(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*size, generator=self._g, device=self.device) * scale).to(dtype or self.dtype)

    def new(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(size, float("nan"), dtype=dtype or self.dtype, device=self.device)


def both(formula: Callable[..., list[Tensor]], *operands: Tensor) -> dict[str, list[Tensor]]:
    return {"exact": formula(*(t.double() for t in operands)), "plain": formula(*operands)}


def linear_lrelu(m: int, n: int, k: int, o: Operands) -> Problem:
    """Forward with bias and activation, and a step of the chain: the other layout of the weight, with a mask."""
    from fastgan.kernels.linear_lrelu import linear_launch

    x, w, bias = o.randn(m, k), o.randn(n, k, scale=k**-0.5), o.randn(n)
    back, mask = o.randn(k, n, scale=k**-0.5), o.randn(m, n)
    y, u = o.new(m, n), o.new(m, n)

    def formula(x: Tensor, w: Tensor, bias: Tensor, back: Tensor, mask: Tensor) -> list[Tensor]:
        return [phi(torch.addmm(bias, x, w.T)), x @ back * slope_of(mask)]

    factor, y2, u2 = slope_of(mask), torch.empty_like(y), torch.empty_like(u)

    def library() -> None:
        torch.nn.functional.leaky_relu_(torch.addmm(bias, x, w.T, out=y2), SLOPE)
        torch.mul(torch.mm(x, back, out=u2), factor, out=u2)

    def build(tile: Config) -> list[Any]:
        rest: Any = {"activation": "leaky-relu", "slope": SLOPE, "precision": o.precision, "tile": tile}
        return [
            linear_launch(x, w, y, bias=bias, **rest),
            linear_launch(x, back, u, mask=mask, transposed=True, **rest),
        ]

    return Problem(build, [y, u], library=library, **both(formula, x, w, bias, back, mask))


def linear_mixed(m: int, n: int, k: int, o: Operands) -> Problem:
    from fastgan.kernels.linear_mixed import mixed_launch

    x, w, bias = o.randn(2 * m, k), o.randn(n, k, scale=k**-0.5), o.randn(n)
    alpha = torch.linspace(0, 1, m, device=o.device, dtype=o.wide)
    y = o.new(3 * m, n)

    def formula(x: Tensor, w: Tensor, bias: Tensor, alpha: Tensor) -> list[Tensor]:
        z, a = torch.addmm(bias, x, w.T), alpha.to(x.dtype)[:, None]
        return [phi(torch.cat([z, a * z[:m] + (1 - a) * z[m:]]))]

    def build(tile: Config) -> list[Any]:
        return [
            mixed_launch(x, w, y, alpha, bias=bias, activation="leaky-relu", slope=SLOPE, first=0, second=m,
                         mixed=2 * m, precision=o.precision, tile=tile)
        ]  # fmt: skip

    return Problem(build, [y], **both(formula, x, w, bias, alpha))


def linear_penalty(m: int, n: int, k: int, o: Operands) -> Problem:
    from fastgan.kernels.linear_penalty import penalty_launch

    g, w, mask = o.randn(m, k, scale=2 * k**-0.5), o.randn(n, k, scale=k**-0.5), o.randn(m, n)
    direction, out = o.new(m, k), o.new(m, n)
    value, rows = o.new(dtype=o.wide), o.new(m, dtype=o.wide)
    counter = torch.zeros(1, dtype=torch.int32, device=o.device)

    def formula(g: Tensor, w: Tensor, mask: Tensor) -> list[Tensor]:
        norm = g.norm(dim=1, keepdim=True)
        r = 20 / m * (1 - 1 / norm) * g
        return [r, r @ w.T * slope_of(mask)]

    def build(tile: Config) -> list[Any]:
        return [
            penalty_launch(g, direction, w, out, mask=mask, activation="leaky-relu", slope=SLOPE, kind="norm",
                           penalty_weight=10.0, value=value, rows_value=rows, counter=counter, precision=o.precision,
                           tile=tile)
        ]  # fmt: skip

    return Problem(build, [direction, out], **both(formula, g, w, mask))


def linear_head(m: int, n: int, k: int, o: Operands) -> Problem:
    """Rows of WGAN-GP: a third real, a third fake, and the interpolated ones, whose chain begins with 1."""
    from fastgan.kernels.linear_head import Head, head_launch

    rows = m // 3
    hidden, last, w, mask = o.randn(m, k), o.randn(k, scale=k**-0.5), o.randn(k, n, scale=k**-0.5), o.randn(m, n)
    adjoint, out = o.new(m, k), o.new(m, n)
    scalars = [o.new(dtype=o.wide) for _ in range(3)]
    head = Head(
        last, None, "leaky-relu", SLOPE, m, 2 * rows, "wasserstein", "discriminator", rows, 0, rows,
        o.new(m, dtype=o.wide), o.new(m, dtype=o.wide), *scalars,
        torch.zeros(1, dtype=torch.int32, device=o.device), None, o.new(3 * (m // 16 + 1), dtype=o.wide),
    )  # fmt: skip
    seeds = torch.ones(m, 1, device=o.device)
    seeds[:rows], seeds[rows : 2 * rows] = -1 / rows, 1 / rows

    def formula(hidden: Tensor, last: Tensor, w: Tensor, mask: Tensor) -> list[Tensor]:
        a = seeds.to(hidden.dtype) * last * slope_of(hidden)
        return [a, a @ w * slope_of(mask)]

    def build(tile: Config) -> list[Any]:
        return [
            head_launch(hidden, head, adjoint, w, out, mask, mask_activation="leaky-relu", mask_slope=SLOPE,
                        precision=o.precision, tile=tile)
        ]  # fmt: skip

    return Problem(build, [adjoint, out], **both(formula, hidden, last, w, mask))


def weight_gradient(m: int, n: int, k: int, o: Operands) -> Problem:
    from fastgan.kernels.weight_gradient import Problem as Layer
    from fastgan.kernels.weight_gradient import programs_of, weight_gradient_launch

    u, x = o.randn(k, m, scale=k**-0.5), o.randn(k, n)
    dw, db = o.new(m, n, dtype=o.wide), o.new(m, dtype=o.wide)
    layer = Layer(u, x, dw, db, [(0, k)])
    out = torch.empty(m, n, dtype=o.dtype, device=o.device)
    column = torch.empty(m, dtype=o.dtype, device=o.device)

    def library() -> None:
        torch.mm(u.T, x, out=out)
        torch.sum(u, 0, out=column)

    def build(tile: Config) -> list[Any]:
        squares = torch.empty(programs_of([layer], tile=tile), dtype=torch.float64, device=o.device)
        return [weight_gradient_launch([layer], squares=squares, precision=o.precision, tile=tile)]

    def formula(u: Tensor, x: Tensor) -> list[Tensor]:
        wide = torch.float64 if u.dtype == torch.float64 else o.wide
        return [(u.T @ x).to(wide), u.sum(0).to(wide)]

    return Problem(build, [dw, db], library=library, **both(formula, u, x))


PROBLEMS: dict[str, Callable[[int, int, int, Operands], Problem]] = {
    "linear_lrelu": linear_lrelu,
    "linear_head": linear_head,
    "linear_penalty": linear_penalty,
    "linear_mixed": linear_mixed,
    "weight_gradient": weight_gradient,
}
