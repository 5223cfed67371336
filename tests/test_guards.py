"""What tests/op_checks.py says of an op that is wrong: each guard catches the flaw that it is there for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from guards import Guard
from op_checks import check_expanded, check_sample, check_strided, derivatives, spread, turned

from fastgan.kernels._spec import OpSpec, Sample

pytestmark = pytest.mark.interpreted

BLOCK = 16


@triton.jit
def _double_kernel(x_ptr, y_ptr, scratch_ptr, n, FLAW: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if FLAW == "read beyond":
        x += 0 * tl.load(x_ptr + offs + 1, mask=mask, other=0.0)
    if FLAW == "half unwritten":
        x += tl.where(tl.load(scratch_ptr + offs, mask=mask, other=0.0) < 0, 1.0, 0.0) * 1e-7
    if FLAW == "missed":
        mask &= offs != n - 1
    if FLAW == "beyond":
        mask = offs < n + 1
    shift = -1 if FLAW == "before" else 0
    tl.store(y_ptr + offs + shift, 2 * x, mask=mask)
    if FLAW == "before":
        tl.store(y_ptr + offs, 2 * x, mask=mask)
    if FLAW == "input":
        tl.store(x_ptr + offs, x + 1, mask=mask)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0), 0))


def double(x: torch.Tensor, flaw: str = "", *, contiguous: bool = True) -> torch.Tensor:
    x = x.contiguous() if contiguous else x
    y = x.new_empty(x.shape)
    _double_kernel[(triton.cdiv(x.numel(), BLOCK) + 1,)](x, y, torch.empty_like(y), x.numel(), flaw, BLOCK)
    return y


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, flaw, backward_flaw, contiguous):
        ctx.args = backward_flaw, contiguous
        return double(x, flaw)

    @staticmethod
    def backward(ctx, dy):
        flaw, contiguous = ctx.args
        return (Double if contiguous else DoubleOfContiguous).apply(dy, flaw, flaw, contiguous), None, None, None


class DoubleOfContiguous(torch.autograd.Function):
    """Reads what it is given as if it were contiguous."""

    @staticmethod
    def forward(ctx, x, flaw, backward_flaw, contiguous):
        return double(x, contiguous=False)

    @staticmethod
    def backward(ctx, dy):
        return DoubleOfContiguous.apply(dy, "", "", False), None, None, None


class SquareOnce(torch.autograd.Function):
    """The usual layout: the backward is right and its own derivative is missing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * double(x.detach())


def spec_of(flaw: str = "", backward_flaw: str = "", contiguous: bool = True) -> OpSpec:
    def op(x: torch.Tensor, *, backend: str) -> torch.Tensor:
        return Double.apply(x, flaw, backward_flaw, contiguous)

    return OpSpec(
        "double", op, lambda x: 2 * x, lambda device, dtype: [], (torch.float32,), lambda d: [], 2, lambda s: 0
    )


def sample(device: torch.device, *shape: int) -> Sample:
    return Sample("s", (torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device),))


@pytest.mark.parametrize("shape", [(7,), (3, 5, 7), (0, 4), (BLOCK,)])
def test_a_right_op_passes(shape: tuple[int, ...], device: torch.device) -> None:
    check_sample(spec_of(), torch.float32, sample(device, *shape))
    for layout in (spread, turned):
        check_strided(spec_of(), torch.float32, sample(device, *shape), layout)
    check_expanded(spec_of(), torch.float32, sample(device, *shape))


FLAWS = {
    "beyond": "memory of new_empty .* was written beside, at bytes 60 to 63 of 60",
    "before": "memory of new_empty .* was written beside, at bytes -4 to -1 of 60",
    "missed": "1 of 15 values are NaN",
    "read beyond": "1 of 15 values are NaN",
    "input": "is an input and was overwritten",
    "half unwritten": "differs between two runs",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_of_the_value(flaw: str, device: torch.device) -> None:
    with pytest.raises(AssertionError, match=FLAWS[flaw]):
        check_sample(spec_of(flaw), torch.float32, sample(device, 3, 5))


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_of_the_gradient(flaw: str, device: torch.device) -> None:
    with pytest.raises(AssertionError, match=FLAWS[flaw]):
        check_sample(spec_of("", flaw), torch.float32, sample(device, 3, 5))


def test_a_store_between_the_elements_of_an_input(device: torch.device) -> None:
    def op(x: torch.Tensor, *, backend: str) -> torch.Tensor:
        if not x.is_contiguous():
            x.detach().as_strided((1,), (1,), x.storage_offset() + 1).zero_()
        return 2 * x

    with pytest.raises(AssertionError, match=r"input 0 .* is an input and was overwritten, at bytes 4 to 7 of"):
        check_strided(replace(spec_of(), op=op), torch.float32, sample(device, 3, 5), spread)


@pytest.mark.parametrize("allocate", ["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])
def test_every_allocation_is_poisoned_and_guarded(allocate: str, device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)

    def op() -> torch.Tensor:
        return {
            "empty": lambda: torch.empty(2, 3, device=device),
            "empty_like": lambda: torch.empty_like(x),
            "empty_strided": lambda: torch.empty_strided((2, 3), (1, 2), device=device),
            "new_empty": lambda: x.new_empty(2, 3),
            "new_empty_strided": lambda: x.new_empty_strided((2, 3), (1, 2)),
        }[allocate]()

    guard = Guard()
    with guard.allocations():
        y = op()
    assert y.isnan().all()
    assert y.stride() == op().stride()
    y.as_strided((7,), (1,))[6] = 0
    with pytest.raises(AssertionError, match=f"memory of {allocate} .* was written beside, at bytes 24 to 27 of 24"):
        guard.check()


@pytest.mark.parametrize("allocate", ["zeros", "zeros_like", "new_zeros"])
def test_zeroed_memory_is_guarded(allocate: str, device: torch.device) -> None:
    x, guard = torch.ones(3, dtype=torch.int32, device=device), Guard()
    with guard.allocations():
        y = {
            "zeros": lambda: torch.zeros(3, dtype=torch.int32, device=device),
            "zeros_like": lambda: torch.zeros_like(x),
            "new_zeros": lambda: x.new_zeros(3),
        }[allocate]()
    assert not y.any()
    y.as_strided((4,), (1,))[3] = 1
    with pytest.raises(AssertionError, match=f"memory of {allocate}"):
        guard.check()


def test_a_margin_copied_into_a_margin(device: torch.device) -> None:
    guard = Guard()
    x = guard.input("x", torch.ones(3, device=device))
    with guard.allocations():
        y = torch.empty_like(x)
    y.as_strided((4,), (1,)).copy_(x.as_strided((4,), (1,)))
    with pytest.raises(AssertionError, match="memory of empty_like"):
        guard.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_margin_reads_as_nan(dtype: torch.dtype, device: torch.device) -> None:
    guard = Guard()
    for _ in range(16):
        x = guard.input("x", torch.ones(3, dtype=dtype, device=device))
        for beside in (-1, 3):
            assert x.as_strided((1,), (1,), x.storage_offset() + beside).isnan()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the order of atomics on a GPU cannot be chosen")
def test_a_sum_in_the_order_of_arrival(device: torch.device) -> None:
    def op(x: torch.Tensor, *, backend: str) -> torch.Tensor:
        y = x.new_zeros(())
        _sum_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK)
        return y

    spec = replace(spec_of(), op=op, reference=lambda x: x.sum(), order=0)
    x = torch.zeros(5, BLOCK, device=device)
    x[:, 0] = torch.tensor([1, *[2.0**-25] * 4])  # each is lost beside the 1, all of them together are not
    with pytest.raises(AssertionError, match=r"double\[s\]\.y differs between two runs"):
        check_sample(spec, torch.float32, Sample("s", (x,)))


def test_a_second_derivative_that_is_silently_missing(device: torch.device) -> None:
    spec = replace(spec_of(), op=lambda x, backend: SquareOnce.apply(x), reference=lambda x: x * x)
    check_sample(replace(spec, order=1), torch.float32, sample(device, 3, 5))
    with pytest.raises(AssertionError, match=r"double\[s\]\.dd1: error"):
        check_sample(spec, torch.float32, sample(device, 3, 5))


@pytest.mark.parametrize("check", [check_expanded, lambda *args: check_strided(*args, spread)])
def test_incoming_gradients_read_as_contiguous(check, device: torch.device) -> None:
    check_sample(spec_of(contiguous=False), torch.float32, sample(device, 3, 5))
    with pytest.raises(AssertionError):
        check(spec_of(contiguous=False), torch.float32, sample(device, 3, 5))


@pytest.mark.parametrize("what", ["double: x is not contiguous", "no"])
def test_strided_inputs_may_be_refused_by_name(what: str, device: torch.device) -> None:
    def op(x: torch.Tensor, *, backend: str) -> torch.Tensor:
        if not x.is_contiguous():
            raise ValueError(what)
        return Double.apply(x, "", "", True)

    spec = replace(spec_of(), op=op)
    if what == "no":
        with pytest.raises(AssertionError, match="input 0: refused with 'no'"):
            check_strided(spec, torch.float32, sample(device, 3, 5), turned)
    else:
        check_strided(spec, torch.float32, sample(device, 3, 5), turned)


def test_tuples_and_integers(device: torch.device) -> None:
    """Results that are not floating are compared to the bit; integer inputs are not differentiated."""

    def reference(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[index] * x[0], index + 1

    def op(x: torch.Tensor, index: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return x[index] * x[0], index + 1

    given = Sample("s", (torch.arange(1.0, 6.0, device=device), torch.tensor([3, 3, 1], device=device)))
    check_sample(replace(spec_of(), op=op, reference=reference), torch.float32, given)
    assert set(derivatives(reference, given, 2)) == {"y0", "y1", "d0", "dd0", "dd1"}
    wrong = replace(spec_of(), op=lambda x, index, backend: (x[index] * x[0], index), reference=reference)
    with pytest.raises(AssertionError, match=r"double\[s\]\.y1 is not the reference's"):
        check_sample(wrong, torch.float32, given)


def test_a_dtype_among_the_arguments(device: torch.device) -> None:
    """An op without tensors is asked for fp64 when the exact result is."""

    def reference(n: int, *, dtype: torch.dtype) -> torch.Tensor:
        return torch.arange(n, device=device, dtype=dtype) / 3

    given = Sample("s", (), {"n": 5, "dtype": torch.float16})
    spec = replace(spec_of(), op=lambda n, dtype, backend: reference(n, dtype=dtype), reference=reference, order=0)
    check_sample(spec, torch.float16, given)
    spec = replace(spec, op=lambda n, dtype, backend: reference(n, dtype=dtype) + 0.01)
    with pytest.raises(AssertionError, match="error"):
        check_sample(spec, torch.float16, given)
