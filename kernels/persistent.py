"""A whole iteration in one cooperative launch: its launches are phases of one kernel, with a barrier between them.

Every program does its share of a phase's tiles (a tile is what a program of the launch would do), then waits until all
programs have done theirs. A tile is made by the launch's own kernel, called as a device function. Addresses and sizes
lie in a table on the device, a row for each phase; what is compiled of the arguments is a form, and phases that agree
in it share its code.

The barrier is one number that the programs of each phase raise by 2^31 together, so that its sign flips when the last
one comes and its other bits are as they were: nothing has to be reset between phases, launches or replays of a graph.
Arrivals release and the wait acquires at the scope of the GPU, so that what one phase wrote the next one reads.

Where programs are not resident at once (the interpreter) the same kernel is launched once for each phase.

The barrier is sense-reversing: Mellor-Crummey and Scott 1991, "Algorithms for scalable synchronization on shared-memory
multiprocessors", TOCS 9(1).
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from fastgan.kernels._launch import Launch
from fastgan.kernels.adam_ema import _adam_ema_kernel, _squares_kernel
from fastgan.kernels.bias_lrelu import _bias_lrelu_fwd_kernel, bias_lrelu_launch
from fastgan.kernels.inputs import _inputs_kernel
from fastgan.kernels.linear_head import _linear_head_kernel
from fastgan.kernels.linear_lrelu import _linear_lrelu_kernel
from fastgan.kernels.linear_mixed import _linear_mixed_kernel
from fastgan.kernels.linear_penalty import _linear_penalty_kernel
from fastgan.kernels.sample_rows import _sample_rows_kernel
from fastgan.kernels.weight_gradient import _weight_gradient_kernel

# ---- kernels

# columns of the table
_FORM = tl.constexpr(0)
_TILES = tl.constexpr(1)
_GRID_M = tl.constexpr(2)
_GRID_N = tl.constexpr(3)
_ARGUMENTS = tl.constexpr(4)


@triton.jit
def arrive(barrier_ptr, program, n_programs):
    """Count a program in; gives what the barrier held before."""
    rest = 2147483648 - (n_programs.to(tl.int64) - 1)
    share = tl.where(program == 0, rest, tl.full([], 1, tl.int64)).to(tl.int32)
    tl.debug_barrier()  # all of the program's threads have stored
    return tl.atomic_add(barrier_ptr, share, sem="release")


@triton.jit
def is_open(barrier_ptr, before):
    """Whether all programs have come since one of them found ``before``."""
    return (tl.atomic_add(barrier_ptr, 0, sem="acquire") ^ before) < 0


@triton.jit
def grid_barrier(barrier_ptr, program, n_programs):
    """Wait for all programs of the grid, which are resident at once; what they stored before is visible after."""
    before = arrive(barrier_ptr, program, n_programs)
    while not is_open(barrier_ptr, before):
        pass
    tl.debug_barrier()


@triton.constexpr_function
def _name(forms, form):
    return forms[form][0]


@triton.constexpr_function
def _n_fields(forms, form):
    """Arguments that the table holds."""
    return len(forms[form][1])


@triton.constexpr_function
def _kind(forms, form, field):
    return forms[form][1][field][0]


@triton.constexpr_function
def _type(forms, form, field):
    return forms[form][1][field][1]


@triton.constexpr_function
def _is_aligned(forms, form, field):
    return forms[form][1][field][2]


@triton.constexpr_function
def _constant(forms, form, constant):
    return forms[form][2][constant]


@triton.jit
def _tile_of_phase(row_ptr, place, FORMS: tl.constexpr, FORM: tl.constexpr):
    """One tile, by the kernel that the form names, with arguments from the phase's row.

    A kernel takes what the table holds first, then its constants, as many as it has; Triton takes only a literal tuple
    in a comprehension, and constants in nothing else.
    """
    values = ()
    for i in tl.static_range(_n_fields(FORMS, FORM)):
        value = tl.load(row_ptr + (_ARGUMENTS + i))
        if _kind(FORMS, FORM, i) == "float":
            value = value.to(tl.int32).to(tl.float32, bitcast=True)
        elif _kind(FORMS, FORM, i) == "pointer":
            value = value.to(tl.pointer_type(_type(FORMS, FORM, i)))
        elif _kind(FORMS, FORM, i) == "int32":
            value = value.to(tl.int32)
        if _is_aligned(FORMS, FORM, i):
            value = tl.multiple_of(value, 16)
        values += (value,)  # type: ignore[assignment]
    grid_m, grid_n = tl.load(row_ptr + _GRID_M).to(tl.int32), tl.load(row_ptr + _GRID_N).to(tl.int32)
    tile = (place // grid_n, place % grid_n, grid_m, grid_n)
    if _name(FORMS, FORM) == "linear_lrelu":
        _linear_lrelu_kernel(
            *values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)], tile
        )
    elif _name(FORMS, FORM) == "linear_mixed":
        _linear_mixed_kernel(*values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)], tile)
    elif _name(FORMS, FORM) == "linear_head":
        _linear_head_kernel(
            *values,
            *[
                _constant(FORMS, FORM, i)
                for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)
            ],
            tile,
        )
    elif _name(FORMS, FORM) == "linear_penalty":
        _linear_penalty_kernel(
            *values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)], tile
        )
    elif _name(FORMS, FORM) == "weight_gradient":
        _weight_gradient_kernel(*values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)], tile)
    elif _name(FORMS, FORM) == "squares":
        _squares_kernel(*values, *[_constant(FORMS, FORM, i) for i in (0, 1)], tile)
    elif _name(FORMS, FORM) == "adam_ema":
        _adam_ema_kernel(*values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)], tile)
    elif _name(FORMS, FORM) == "inputs":
        _inputs_kernel(*values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)], tile)
    elif _name(FORMS, FORM) == "bias_lrelu":
        _bias_lrelu_fwd_kernel(*values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5)], tile)
    else:
        tl.static_assert(_name(FORMS, FORM) == "sample_rows")
        _sample_rows_kernel(*values, *[_constant(FORMS, FORM, i) for i in (0, 1, 2, 3, 4, 5, 6)], tile)


@triton.jit(do_not_specialize=["first", "last"])
def _persistent_kernel(
    table_ptr, barrier_ptr, first, last, FORMS: tl.constexpr, N_COLUMNS: tl.constexpr, WAITS: tl.constexpr
):
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    for phase in tl.range(first, last, num_stages=1, disable_licm=True):
        row_ptr = table_ptr + phase * N_COLUMNS
        form = tl.load(row_ptr + _FORM)
        n_tiles = tl.load(row_ptr + _TILES).to(tl.int32)
        for i in tl.static_range(len(FORMS)):
            if form == i:
                for k in tl.range(program, n_tiles, n_programs, num_stages=1, disable_licm=True):
                    _tile_of_phase(row_ptr, tl.cast(k, tl.int32), FORMS, i)
        if WAITS:  # noqa: SIM102 (known when compiled)
            if phase + 1 < last:
                grid_barrier(barrier_ptr, program, n_programs)


# ---- launchers

_NUM_WARPS = 4  # of every phase: what the shipped tiles have, but for one
_NUM_STAGES = 3
_APART = 2  # programs where the phases are launches: more than one, so that tiles are shared out
_SMALLER = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}  # than the tile for 8 warps, whose sums need their registers

# what each kernel is called in a form
_NAMES: dict[Any, str] = {
    _bias_lrelu_fwd_kernel: "bias_lrelu",
    _linear_lrelu_kernel: "linear_lrelu",
    _linear_mixed_kernel: "linear_mixed",
    _linear_head_kernel: "linear_head",
    _linear_penalty_kernel: "linear_penalty",
    _weight_gradient_kernel: "weight_gradient",
    _squares_kernel: "squares",
    _adam_ema_kernel: "adam_ema",
    _inputs_kernel: "inputs",
    _sample_rows_kernel: "sample_rows",
}
_ANY_NUMBER = ("inputs", "sample_rows")  # take numbers of all kinds, seeds too: none of them compiles anything anew

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
          torch.float64: tl.float64, torch.uint8: tl.uint8, torch.int32: tl.int32, torch.int64: tl.int64}  # fmt: skip

Field = tuple[str, Any, bool]  # kind of an argument, its type, and whether 16 divides it
Form = tuple[str, tuple[Field, ...], tuple[Any, ...]]  # name of the kernel, what the table holds, and constants


@dataclass(frozen=True)
class _Phase:
    """A launch as a phase: what is compiled of it, and its row of the table."""

    form: Form
    tiles: tuple[int, int]
    arguments: list[int]


def persistent_launches(
    launches: Sequence[Launch], *, device: torch.device, programs: int | None = None, cooperative: bool | None = None
) -> list[Launch]:
    """The same work as the given launches one after the other: one cooperative launch on a GPU, else one for each.

    Building one copies a table to the device, which belongs before a capture; running it does not.

    Args:
        launches: at least one, of the kernels that an MLP's iteration consists of; none of them dependent. Their
            tensors must stay where they are, and are kept alive.
        device: of all tensors.
        programs: of each launch, at most as many as the GPU holds at once; by default one for each multiprocessor.
        cooperative: whether the phases are one launch; by default where ``device`` is a GPU.

    Raises:
        LookupError: a launch is of a kernel that has no phase; names it.
        ValueError: there is no launch, or one that is dependent.
    """
    if not launches:
        raise ValueError("persistent: launches is empty, expected at least one")
    if cooperative is None:
        cooperative = device.type == "cuda"
    if programs is None:
        on_gpu = device.type == "cuda"
        programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else _APART
    phases = [_phase(launch, programs) for launch in launches]
    forms = tuple(dict.fromkeys(p.form for p in phases))
    columns = _ARGUMENTS.value + max(len(p.arguments) for p in phases)
    rows = [[forms.index(p.form), p.tiles[0] * p.tiles[1], *p.tiles, *p.arguments] for p in phases]
    table = torch.tensor([[*row, *[0] * (columns - len(row))] for row in rows], dtype=torch.int64, device=device)
    barrier = torch.zeros((), dtype=torch.int32, device=device)
    held = [t for launch in launches for t in (*launch.arguments.values(), *launch.keep) if isinstance(t, torch.Tensor)]

    def launch(first: int, last: int) -> Launch:
        return Launch(
            _persistent_kernel, (programs,),
            {"table_ptr": table, "barrier_ptr": barrier, "first": first, "last": last, "FORMS": forms,
             "N_COLUMNS": columns, "WAITS": cooperative},
            num_warps=_NUM_WARPS, num_stages=_NUM_STAGES, cooperative=cooperative, keep=tuple(held),
        )  # fmt: skip

    if cooperative:
        return [launch(0, len(phases))]
    return [launch(i, i + 1) for i in range(len(phases))]


def copy_launch(src: torch.Tensor, dst: torch.Tensor) -> Launch:
    """``dst = src``, both contiguous and of equal numbers of elements, cast where their types differ."""
    return bias_lrelu_launch(src.view(-1), None, dst.view(-1), slope=1.0)  # which is the identity


def _phase(launch: Launch, programs: int) -> _Phase:
    name = _NAMES.get(launch.kernel)
    if name is None:
        raise LookupError(f"{launch.kernel.__name__} is no phase of a persistent kernel")
    if launch.arguments.get("DEPENDENT"):
        raise ValueError(f"persistent: {launch.kernel.__name__} is launched dependent, expected not")
    launch = _with_few_warps(launch)
    fields: list[Field] = []
    arguments, constants = [], []
    for parameter in inspect.signature(launch.kernel.fn).parameters.values():
        if parameter.name == "tile":
            continue
        value = launch.arguments.get(parameter.name, parameter.default)
        if "constexpr" in str(parameter.annotation):
            constants.append(value)
        else:
            assert not constants, f"{name}: {parameter.name} comes after a constant"
            field, number = _field(value, aligned=name not in _ANY_NUMBER)
            fields.append(field)
            arguments.append(number)
    n_m, n_n = (*launch.grid, 1)[:2]
    if name == "adam_ema":  # whose programs share out the blocks among them: more would repeat what each does first
        n_m = min(n_m, programs)
    return _Phase((name, tuple(fields), tuple(constants)), (n_m, n_n), arguments)


def _field(value: Any, *, aligned: bool) -> tuple[Field, int]:
    """An argument as the kernel's code sees it, and as the table holds it."""
    if isinstance(value, torch.Tensor):
        address = value.data_ptr()
        return ("pointer", _TYPES[value.dtype], address % 16 == 0), address
    if isinstance(value, float):
        return ("float", tl.float32, False), struct.unpack("<i", struct.pack("<f", value))[0]
    small = -(2**31) <= value < 2**31
    return ("int32" if small else "int64", None, aligned and value % 16 == 0), value


def _with_few_warps(launch: Launch) -> Launch:
    """The launch with the warps that all phases have; other tiles than the product's only run better with more."""
    if launch.kernel is not _linear_lrelu_kernel or launch.num_warps <= _NUM_WARPS:
        return launch
    arguments = {**launch.arguments, **_SMALLER}
    grid = tuple(triton.cdiv(arguments[size], arguments[block]) for size, block in (("m", "BLOCK_M"), ("n", "BLOCK_N")))
    return replace(launch, arguments=arguments, grid=grid, num_warps=_NUM_WARPS)
