"""What must hold for every op, as functions of its spec and a sample."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import torch
from closeness import assert_as_accurate
from guards import Guard, programs_in_reverse

from fastgan.kernels import OpSpec
from fastgan.kernels._spec import Sample

Results = dict[str, torch.Tensor]


def exact(t: Any, dtype: torch.dtype) -> Any:
    """A floating tensor, or the dtype that a call is asked for, in fp64."""
    if isinstance(t, torch.Tensor):
        return t.double() if t.is_floating_point() else t
    return torch.float64 if isinstance(t, torch.dtype) and t == dtype else t


def in_fp64(sample: Sample, dtype: torch.dtype) -> Sample:
    kwargs = {k: exact(v, dtype) for k, v in sample.kwargs.items()}
    return Sample(sample.name, tuple(exact(t, dtype) for t in sample.inputs), kwargs)


def derivatives(
    fn: Callable[..., Any],
    sample: Sample,
    order: int,
    guard: Guard | None = None,
    incoming: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    **kwargs: Any,
) -> Results:
    """Value, first and second derivatives of a random projection of ``fn``, by name.

    Args:
        fn: returns a tensor or a tuple; what is not floating is not differentiated.
        sample: its floating inputs are differentiated, what ``kwargs`` holds is not.
        order: highest derivative.
        guard: guards inputs, incoming gradients and what is allocated.
        incoming: what becomes of the incoming gradients: a layout.
        kwargs: of ``fn`` beside the sample's.
    """

    def given(name: str, t: Any) -> Any:
        return guard.input(name, t) if guard is not None and isinstance(t, torch.Tensor) else t

    inputs = [given(f"input {i}", t if t is None else t.detach()) for i, t in enumerate(sample.inputs)]
    kwargs |= {k: given(k, v) for k, v in sample.kwargs.items()}
    wrt = [t.requires_grad_() for t in inputs if t is not None and t.is_floating_point()] if order else []
    g = torch.Generator().manual_seed(1)

    def like(t: torch.Tensor) -> torch.Tensor:  # the same numbers in every dtype: an fp16's
        values = torch.randn(t.shape, generator=g).half()
        return given("incoming gradient", incoming(values.to(t.device, t.dtype)))

    with guard.allocations() if guard is not None else contextlib.nullcontext():
        returned = fn(*inputs, **kwargs)
        ys = {"y": returned} if isinstance(returned, torch.Tensor) else {f"y{i}": y for i, y in enumerate(returned)}
        out = dict(ys)
        if order:
            ys = {k: y for k, y in ys.items() if y.is_floating_point()}
            dys = [like(y).requires_grad_() for y in ys.values()]
            grads = torch.autograd.grad(list(ys.values()), wrt, dys, create_graph=order > 1)
            out |= {f"d{i}": t for i, t in enumerate(grads)}
        if order > 1:
            penalty = sum((like(t) * t).sum() for t in grads)
            second = torch.autograd.grad(penalty, [*dys, *wrt], allow_unused=True)
            out |= {
                f"dd{i}": torch.zeros_like(t) if s is None else s
                for i, (s, t) in enumerate(zip(second, [*dys, *wrt], strict=True))
            }
    return {k: v.detach() for k, v in out.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def check_close(name: str, got: Results, plain: Results, right: Results) -> None:
    assert got.keys() == plain.keys(), f"{name}: {len(got)} results, expected {len(plain)}"
    for key, value in plain.items():
        if value.is_floating_point():
            assert_as_accurate(f"{name}.{key}", got[key], value, right[key])
        else:
            assert torch.equal(got[key], value), f"{name}.{key} is not the reference's"


def check_sample(spec: OpSpec, dtype: torch.dtype, sample: Sample) -> None:
    """The op against its reference, in guarded memory; then again, which must give the same bits.

    The second time, new memory holds other garbage and the programs of a launch run in the opposite order.
    """
    name = f"{spec.name}[{sample.name}]"
    got = derivatives(spec.op, sample, spec.order, Guard(), backend="triton")
    plain = derivatives(spec.reference, sample, spec.order)
    check_close(name, got, plain, derivatives(spec.reference, in_fp64(sample, dtype), spec.order))
    with programs_in_reverse():
        again = derivatives(spec.op, sample, spec.order, Guard(poison=123.0), backend="triton")
    for key in got:
        assert same_bits(got[key], again[key]), f"{name}.{key} differs between two runs"


def expanded(t: torch.Tensor) -> torch.Tensor:
    """One number for the whole tensor, as the backward of a sum hands on."""
    return t.flatten()[0].expand(t.shape) if t.numel() else t


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values, two elements apart along the last dimension."""
    wide = torch.full((*t.shape, 2), float("nan") if t.is_floating_point() else 1, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


def turned(t: torch.Tensor) -> torch.Tensor:
    """The same values with the first dimension innermost in memory."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def check_strided(spec: OpSpec, dtype: torch.dtype, sample: Sample, layout: Callable) -> None:
    """Each input in a layout of its own: right, or refused by name; incoming gradients in that layout: right."""
    name = f"{spec.name}[{sample.name}, {layout.__name__}]"
    right = derivatives(spec.reference, in_fp64(sample, dtype), spec.order)
    plain = derivatives(spec.reference, sample, spec.order)
    for i, t in enumerate(sample.inputs):
        if t is None or t.ndim == 0:
            continue
        strided = Sample(sample.name, (*sample.inputs[:i], layout(t), *sample.inputs[i + 1 :]), sample.kwargs)
        try:
            got = derivatives(spec.op, strided, spec.order, Guard(), backend="triton")
        except ValueError as refusal:
            if not re.match(rf"{spec.name}: .*(contiguous|stride)", str(refusal)):
                raise AssertionError(f"{name}, input {i}: refused with {str(refusal)!r}") from refusal
        else:
            check_close(f"{name}, input {i}", got, plain, right)
    if spec.order:
        got = derivatives(spec.op, sample, spec.order, Guard(), layout, backend="triton")
        check_close(f"{name}, incoming gradients", got, plain, right)


def check_expanded(spec: OpSpec, dtype: torch.dtype, sample: Sample) -> None:
    """Incoming gradients that are one number each, with strides of 0."""
    results = [
        derivatives(fn, s, spec.order, guard, expanded, **kwargs)
        for fn, s, guard, kwargs in (
            (spec.op, sample, Guard(), {"backend": "triton"}),
            (spec.reference, sample, None, {}),
            (spec.reference, in_fp64(sample, dtype), None, {}),
        )
    ]
    check_close(f"{spec.name}[{sample.name}, expanded]", *results)
