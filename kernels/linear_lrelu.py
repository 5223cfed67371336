"""Linear layer and activation in one launch, and the products of its derivatives.

    y = phi(x W^T + b)

phi is LeakyReLU (ReLU with slope 0), tanh, sigmoid or the identity, applied to the accumulator. The backward pass needs
x, W and y alone, since phi' is a function of y:

    dz = dy * phi'(y)      dx = dz W      dW = dz^T x      db = the sum of dz over rows

Each is an op with a derivative of its own, made of the same ops, hence the layer is differentiable twice: ``dz``
depends on dy and, for tanh and sigmoid, on y; a product's derivatives are products. For LeakyReLU phi' is constant on
either side of 0, and at 0 that of the negative side, as in PyTorch.

:func:`linear_launch` makes the launches of a closed-form update, which writes to given memory: the layer itself, a step
of the chain (u W) * phi'(a), and a step of the sweep (r W^T) * phi'(a).

Source: the closed forms of a piecewise linear network; see ``fastgan/rules.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.backend import Backend, resolve
from fastgan.kernels import configs, linear_head, linear_mixed, linear_penalty
from fastgan.kernels._device import activate, derivative, place_of
from fastgan.kernels._launch import Launch, accumulator, check, check_dtype, grid_1d
from fastgan.kernels._library import register
from fastgan.kernels._matrix import (
    DTYPES,
    INTERPRETED,
    PRECISIONS,
    accumulate,
    arch_of,
    check_activation,
    check_operands,
    input_precision,
    rows_of,
)
from fastgan.kernels._spec import OpSpec, Sample

# ---- reference


def linear_lrelu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "leaky-relu",
    slope: float = 0.2,
    precision: str = "ieee",
) -> torch.Tensor:
    """The formula above in PyTorch ops; the precision of its fp32 products is PyTorch's setting."""
    z = torch.nn.functional.linear(x, weight, bias)
    if activation == "leaky-relu":
        return torch.relu(z) if slope == 0 else torch.nn.functional.leaky_relu(z, slope)
    if activation == "identity":
        return z
    return torch.tanh(z) if activation == "tanh" else torch.sigmoid(z)


# ---- kernels


@triton.jit
def _linear_lrelu_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, y_ptr,
    m, n, k, stride_x, stride_weight, stride_mask, stride_y,
    X_TRANSPOSED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    rows = place_of(tile, 0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = place_of(tile, 1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = accumulate(
        acc, x_ptr, weight_ptr, rows, cols, m, n, k, stride_x, stride_weight,
        X_TRANSPOSED, TRANSPOSED, PRECISION, BLOCK_K,
    )  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(ACC)[None, :]
    if HAS_MASK:  # of a layer's output, which y may overwrite
        out = tl.load(mask_ptr + rows[:, None] * stride_mask + cols[None, :], mask=inside, other=0.0).to(ACC)
        acc *= derivative(out, ACTIVATION, SLOPE)
    else:
        acc = activate(acc, ACTIVATION, SLOPE)
    tl.store(y_ptr + rows[:, None] * stride_y + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_lrelu_mask_kernel(
    dy_ptr, y_ptr, dz_ptr,
    n_elements,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offs < n_elements
    dy = tl.load(dy_ptr + offs, mask=inside, other=0.0).to(ACC)
    y = tl.load(y_ptr + offs, mask=inside, other=0.0).to(ACC)
    dz = dy * derivative(y, ACTIVATION, SLOPE)
    tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=inside)


# ---- launchers

_BLOCK = 1024  # not tuned, as in bias_lrelu


def linear_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
    mask: torch.Tensor | None = None,
    transposed: bool = False,
    precision: str = "ieee",
    tile: configs.Config | None = None,
) -> Launch:
    """The launch that writes ``y = phi(x B + bias)``, or ``y = (x B + bias) * phi'(mask)``.

    Args:
        x: ``[M, K]``; fp16, bf16, fp32 or fp64. Converted to ``weight``'s dtype on the way.
        weight: ``[N, K]``, and ``B`` is its transpose; with ``transposed`` ``[K, N]``, and ``B`` is the weight itself.
        y: ``[M, N]``, written; any of the dtypes. Must not overlap ``x``.
        bias: ``[N]``, contiguous, of any of the dtypes.
        activation: of :data:`ACTIVATIONS`.
        slope: of LeakyReLU, ``>= 0``.
        mask: ``[M, N]``, of any of the dtypes: an output of that activation. May be the same memory as ``y``.
        transposed: see ``weight``.
        precision: of products of fp32 operands: ``"ieee"`` or ``"tf32"``.
        tile: instead of the one that :func:`fastgan.kernels.configs.config` gives.

    All matrices have contiguous rows; the distance between rows is free.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "linear_lrelu"
    check_operands(op, x, weight, precision)
    check_activation(op, activation, slope)
    k, n = weight.shape if transposed else weight.shape[::-1]
    check(x.shape[1] == k, op, f"x has shape {tuple(x.shape)}, expected {k} columns for weight {tuple(weight.shape)}")
    rows_of(op, "y", y, (x.shape[0], n))
    if bias is not None:
        check(bias.shape == (n,), op, f"bias has shape {tuple(bias.shape)}, expected ({n},)")
        check(bias.is_contiguous(), op, "bias is not contiguous")
    if mask is not None:
        rows_of(op, "mask", mask, (x.shape[0], n))
    return _product_launch(x, weight, y, False, transposed, bias, mask, activation, slope, precision, tile)


def _product_launch(
    a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, a_transposed: bool, transposed: bool, bias: torch.Tensor | None,
    mask: torch.Tensor | None, activation: str, slope: float, precision: str, tile: configs.Config | None = None,
) -> Launch:  # fmt: skip
    (m, n), k = y.shape, a.shape[0] if a_transposed else a.shape[1]
    tile = tile or configs.config("linear_lrelu", m, n, k, b.dtype, arch_of(y))
    return Launch(
        _linear_lrelu_kernel, (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n)),
        {"x_ptr": a, "weight_ptr": b, "bias_ptr": y if bias is None else bias, "mask_ptr": y if mask is None else mask,
         "y_ptr": y, "m": m, "n": n, "k": k, "stride_x": a.stride(0), "stride_weight": b.stride(0),
         "stride_mask": 0 if mask is None else mask.stride(0), "stride_y": y.stride(0), "X_TRANSPOSED": a_transposed,
         "TRANSPOSED": transposed, "HAS_BIAS": bias is not None, "HAS_MASK": mask is not None,
         "ACTIVATION": activation, "SLOPE": float(slope), "PRECISION": input_precision(b.dtype, precision),
         "ACC": accumulator(b.dtype), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _mask_launch(dy: torch.Tensor, y: torch.Tensor, dz: torch.Tensor, activation: str, slope: float) -> Launch:
    return Launch(
        _linear_lrelu_mask_kernel, grid_1d(y.numel(), _BLOCK),
        {"dy_ptr": dy, "y_ptr": y, "dz_ptr": dz, "n_elements": y.numel(), "ACTIVATION": activation,
         "SLOPE": float(slope), "ACC": accumulator(y.dtype), "BLOCK": _BLOCK},
    )  # fmt: skip


def _library(m: int, n: int, k: int, like: torch.Tensor, precision: str) -> bool:
    """Whether the library takes a product, in the precision that is asked for."""
    same = like.dtype != torch.float32 or (precision == "tf32") == (torch.backends.cuda.matmul.fp32_precision == "tf32")
    return same and configs.library_wins(m, n, k, like.dtype, arch_of(like))


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, slope: float, precision: str
) -> torch.Tensor:
    if _library(x.shape[0], weight.shape[0], weight.shape[1], x, precision):
        return linear_lrelu_reference(x, weight, bias, activation=activation, slope=slope)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    linear_launch(_rows(x), _rows(weight), y, bias=bias, activation=activation, slope=slope, precision=precision)()
    return y


def _product(a: torch.Tensor, b: torch.Tensor, a_transposed: bool, b_transposed: bool, precision: str) -> torch.Tensor:
    (k, m), n = a.shape if a_transposed else a.shape[::-1], b.shape[0] if b_transposed else b.shape[1]
    if _library(m, n, k, a, precision):
        return torch.mm(a.t() if a_transposed else a, b.t() if b_transposed else b)
    y = torch.empty(m, n, dtype=a.dtype, device=a.device)
    a, b = _rows(a), _rows(b)
    _product_launch(a, b, y, a_transposed, not b_transposed, None, None, "identity", 0.0, precision)()
    return y


def _mask(dy: torch.Tensor, y: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    dz = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    _mask_launch(dy.contiguous(), y.contiguous(), dz, activation, slope)()
    return dz


def _rows(t: torch.Tensor) -> torch.Tensor:
    """With contiguous rows, copied where it has none."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


# ---- autograd: three ops, each with a derivative that is made of the three


def _forward_fake(x, weight, bias, activation, slope, precision):
    return x.new_empty(x.shape[0], weight.shape[0])


def _forward_setup(ctx, inputs, output):
    x, weight, _, ctx.activation, ctx.slope, ctx.precision = inputs
    ctx.save_for_backward(x, weight, output if ctx.activation != "identity" else None)


def _forward_backward(ctx, dy):
    x, weight, y = ctx.saved_tensors
    dz = dy if y is None else _linear_lrelu_mask(dy, y, ctx.activation, ctx.slope)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = _linear_lrelu_product(dz, weight, False, False, ctx.precision) if needs_x else None
    dweight = _linear_lrelu_product(dz, x, True, False, ctx.precision) if needs_weight else None
    return dx, dweight, dz.sum(0) if needs_bias else None, None, None, None


def _product_fake(a, b, a_transposed, b_transposed, precision):
    return a.new_empty(a.shape[1 if a_transposed else 0], b.shape[0 if b_transposed else 1])


def _product_setup(ctx, inputs, output):
    a, b, ctx.a_transposed, ctx.b_transposed, ctx.precision = inputs
    ctx.save_for_backward(a, b)


def _product_backward(ctx, dc):
    """Of C = A B: dA = dC B^T and dB = A^T dC, each transposed where the operand is."""
    (a, b), product = ctx.saved_tensors, _linear_lrelu_product
    a_t, b_t, precision = ctx.a_transposed, ctx.b_transposed, ctx.precision
    da = db = None
    if ctx.needs_input_grad[0]:
        da = product(b, dc, b_t, True, precision) if a_t else product(dc, b, False, not b_t, precision)
    if ctx.needs_input_grad[1]:
        db = product(dc, a, True, a_t, precision) if b_t else product(a, dc, not a_t, False, precision)
    return da, db, None, None, None


def _mask_fake(dy, y, activation, slope):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _mask_setup(ctx, inputs, output):
    dy, y, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(dy, y)


def _mask_backward(ctx, ddz):
    """The factor phi' is a function of y: 1 - y^2 for tanh and y (1 - y) for sigmoid; constant for LeakyReLU."""
    dy, y = ctx.saved_tensors
    ddy = dy_y = None
    if ctx.needs_input_grad[0]:
        ddy = _linear_lrelu_mask(ddz, y, ctx.activation, ctx.slope)
    if ctx.needs_input_grad[1] and ctx.activation in ("tanh", "sigmoid"):
        dy_y = ddz * dy * (-2 * y if ctx.activation == "tanh" else 1 - 2 * y)
    return ddy, dy_y, None, None


_linear_lrelu = register(
    "linear_lrelu(Tensor x, Tensor weight, Tensor? bias, str activation, float slope, str precision) -> Tensor",
    _forward, _forward_fake, _forward_setup, _forward_backward,
)  # fmt: skip
_linear_lrelu_product = register(
    "linear_lrelu_product(Tensor a, Tensor b, bool a_transposed, bool b_transposed, str precision) -> Tensor",
    _product, _product_fake, _product_setup, _product_backward,
)  # fmt: skip
_linear_lrelu_mask = register(
    "linear_lrelu_mask(Tensor dy, Tensor y, str activation, float slope) -> Tensor",
    _mask, _mask_fake, _mask_setup, _mask_backward,
)  # fmt: skip


@register_flop_formula(torch.ops.fastgan.linear_lrelu)
def _forward_flops(x_shape, weight_shape, *args, **kwargs):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.fastgan.linear_lrelu_product)
def _product_flops(a_shape, b_shape, a_transposed, b_transposed, *args, **kwargs):
    return 2 * a_shape[0] * a_shape[1] * b_shape[0 if b_transposed else 1]


# ---- public


def linear_lrelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "leaky-relu",
    slope: float = 0.2,
    precision: str = "ieee",
    backend: Backend | None = None,
) -> torch.Tensor:
    """Linear layer and activation: ``phi(x W^T + b)``.

    Args:
        x: ``[..., K]``; fp16, bf16, fp32 or fp64. Copied if its rows are not contiguous.
        weight: ``[N, K]`` of ``x``'s dtype.
        bias: ``[N]`` of ``x``'s dtype, or ``None``.
        activation: ``"leaky-relu"`` (ReLU with slope 0), ``"tanh"``, ``"sigmoid"`` or ``"identity"``.
        slope: factor of LeakyReLU for negative values, ``>= 0``.
        precision: of products of fp32 operands: ``"ieee"`` or ``"tf32"``.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        ``[..., N]``, contiguous, ``x``'s dtype. Sums in fp32 (fp64 for fp64). Differentiable twice and more.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "linear_lrelu"
    check_dtype(op, "x", x, DTYPES)
    check(x.ndim >= 1, op, "x is a scalar, expected [..., K]")
    check(weight.ndim == 2, op, f"weight has shape {tuple(weight.shape)}, expected [N, K]")
    n, k = weight.shape
    check(x.shape[-1] == k, op, f"x has shape {tuple(x.shape)}, expected (..., {k}) for weight {tuple(weight.shape)}")
    check(weight.dtype == x.dtype, op, f"weight has dtype {weight.dtype}, expected {x.dtype}")
    if bias is not None:
        check(bias.shape == (n,), op, f"bias has shape {tuple(bias.shape)}, expected ({n},)")
        check(bias.dtype == x.dtype, op, f"bias has dtype {bias.dtype}, expected {x.dtype}")
    check_activation(op, activation, slope)
    check(precision in PRECISIONS, op, f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if resolve(op, backend, x, weight, bias) == "reference":
        return linear_lrelu_reference(x, weight, bias, activation=activation, slope=slope, precision=precision)
    bias = None if bias is None else bias.contiguous()
    rows = x.numel() // k if k else x.shape[:-1].numel()
    y: torch.Tensor = _linear_lrelu(x.reshape(rows, k), weight, bias, activation, float(slope), precision)
    return y.view(*x.shape[:-1], n)


# ---- spec


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    g = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        """On a grid of 1/64, so that sums of products are exact and orders of summation agree, in fp64 as well."""
        t = torch.randn(shape, generator=g, device=device, dtype=torch.float32) * scale
        return (t.mul_(64).round_() / 64).to(dtype)

    def layer(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return randn(n, k, scale=max(k, 1) ** -0.5), randn(n)

    return [
        Sample("small", (randn(3, 5), *layer(4, 5)), {"activation": "tanh"}),
        Sample("odd", (randn(33, 65), *layer(7, 65)), {"slope": 0.25}),
        Sample("row", (randn(7), *layer(1, 7)), {"slope": 0.0}),
        Sample("odd-3d", (randn(2, 3, 17), *layer(33, 17)), {"slope": 0.125}),
        Sample("no-bias", (randn(16, 32), randn(48, 32), None), {"activation": "identity"}),
        Sample("sigmoid", (randn(5, 33), *layer(9, 33)), {"activation": "sigmoid"}),
        Sample("transposed", (randn(19, 6).t(), randn(19, 8, scale=19**-0.5).t(), None), {"activation": "tanh"}),
        Sample("no-rows", (randn(0, 16), *layer(8, 16))),
        Sample("no-columns", (randn(4, 0), *layer(8, 0))),
    ]


def _launches(dtype: torch.dtype) -> list[Launch]:
    x, weight, y = (torch.empty(64, 64, dtype=dtype) for _ in range(3))
    bias = torch.empty(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    tiles = configs.shipped("linear_lrelu", dtype)

    def layer(activation: str, tile: configs.Config, precision: str = "tf32") -> Launch:
        return linear_launch(x, weight, y, bias=bias, activation=activation, slope=0.2, precision=precision, tile=tile)

    def step(activation: str, tile: configs.Config, transposed: bool) -> Launch:
        return linear_launch(x, weight, y, mask=y, activation=activation, slope=0.2, transposed=transposed,
                             precision="tf32", tile=tile)  # fmt: skip

    launches = [layer("leaky-relu", tile) for tile in tiles]
    launches += [step("leaky-relu", tile, True) for tile in tiles]
    launches += [step("leaky-relu", tiles[-1], False), _mask_launch(x, y, y, "leaky-relu", 0.2)]
    if dtype == torch.float32:  # in which all compute what comes after the product
        launches += [layer(activation, tiles[-1]) for activation in ("identity", "tanh", "sigmoid")]
        launches += [step(activation, tiles[-1], False) for activation in ("identity", "tanh", "sigmoid")]
        launches += [_mask_launch(x, y, y, activation, 0.2) for activation in ("tanh", "sigmoid")]
    for a_transposed in (False, True):  # the products of the derivatives
        for transposed in (False, True):
            launches.append(
                _product_launch(x, weight, y, a_transposed, transposed, None, None, "identity", 0.0, "tf32")
            )
    if dtype == torch.float32:
        launches += [layer("leaky-relu", tile, "ieee") for tile in tiles]
    for module in (linear_mixed, linear_head, linear_penalty):  # which are no ops of their own
        launches += module.launches(dtype)
    return launches


def _bytes_moved(s: Sample) -> int:
    x, weight = s.inputs[:2]
    assert x is not None
    assert weight is not None
    rows = x.shape[:-1].numel()
    return (x.numel() + weight.numel() + len(weight) * (rows + 1)) * x.element_size()


SPEC = OpSpec(
    name="linear_lrelu",
    op=linear_lrelu,
    reference=linear_lrelu_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=2,
    bytes_moved=_bytes_moved,
    interpreted_dtypes=INTERPRETED,
)
