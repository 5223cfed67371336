"""A whole iteration in one cooperative launch: its launches are phases of one kernel, with a barrier between them.

Every program does its share of a phase's tiles (a tile is what a program of the launch would do), then waits until all
programs have done theirs. A tile is made by the launch's own kernel, called as a device function. Addresses and sizes
lie in a table on the device, a row for each phase; what is compiled of the arguments is a phase's form. Launches whose
phases have the same forms in the same order are one compiled kernel.

The barrier is one number that the programs of each phase raise by 2^31 together, so that its sign flips when the last
one comes and its other bits are as they were: nothing has to be reset between phases, launches or replays of a graph.
Arrivals release and the wait acquires at the scope of the GPU, so that what one phase wrote the next one reads.

Where programs are not resident at once (the interpreter) the same kernel is launched once for each phase.

The barrier is sense-reversing: Mellor-Crummey and Scott 1991, "Algorithms for scalable synchronization on shared-memory
multiprocessors", TOCS 9(1).
"""

from __future__ import annotations

import inspect
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from fastgan.backend import Backend, resolve
from fastgan.kernels._launch import Launch, check, check_dtype
from fastgan.kernels._matrix import DTYPES, INTERPRETED, check_activation
from fastgan.kernels._spec import OpSpec, Sample
from fastgan.kernels.adam_ema import _adam_ema_kernel, _squares_kernel, adam_ema_launch, blocks_of, variants
from fastgan.kernels.bias_lrelu import _bias_lrelu_fwd_kernel, bias_lrelu_launch
from fastgan.kernels.inputs import Draw, _inputs_kernel, inputs_launch
from fastgan.kernels.linear_head import Head, _linear_head_kernel, head_launch
from fastgan.kernels.linear_lrelu import _linear_lrelu_kernel, linear_launch
from fastgan.kernels.linear_mixed import _linear_mixed_kernel, mixed_launch
from fastgan.kernels.linear_penalty import _linear_penalty_kernel, penalty_launch
from fastgan.kernels.sample_rows import _sample_rows_kernel
from fastgan.kernels.weight_gradient import Problem, _weight_gradient_kernel, programs_of, weight_gradient_launch

# ---- kernels

# columns of the table
_TILES = tl.constexpr(0)
_GRID_M = tl.constexpr(1)
_GRID_N = tl.constexpr(2)
_ARGUMENTS = tl.constexpr(3)


@triton.jit
def arrive(barrier_ptr, program, n_programs):
    """Count a program in; gives what the barrier held before."""
    rest = 2147483648 - (n_programs.to(tl.int64) - 1)
    share = tl.where(program == 0, rest, tl.full([], 1, tl.int64)).to(tl.int32)
    tl.debug_barrier()  # all of the program's threads have stored
    return tl.atomic_add(barrier_ptr, share, sem="release")


@triton.jit
def is_open(barrier_ptr, before):
    """Whether all programs have come since one of them found ``before``.

    An atomic that adds 0 is compiled to a load that acquires: waiting programs do not write.
    """
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


@triton.constexpr_function
def _form(order, phase):
    return order[phase]


@triton.jit
def _persistent_kernel(
    table_ptr, barrier_ptr,
    FIRST: tl.constexpr, LAST: tl.constexpr, ORDER: tl.constexpr, FORMS: tl.constexpr, N_COLUMNS: tl.constexpr,
):  # fmt: skip
    # unrolled: in a loop over phases, what is the same for each turn of it stays in registers from the first phase on
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    for phase in tl.static_range(FIRST, LAST):
        if phase > FIRST:
            grid_barrier(barrier_ptr, program, n_programs)
        row_ptr = table_ptr + phase * N_COLUMNS
        n_tiles = tl.load(row_ptr + _TILES).to(tl.int32)
        for k in tl.range(program, n_tiles, n_programs, num_stages=1, disable_licm=True):
            _tile_of_phase(row_ptr, tl.cast(k, tl.int32), FORMS, _form(ORDER, phase))


# ---- launchers

_NUM_WARPS = 4  # of every phase: what the shipped tiles have, but for one
_NUM_STAGES = 3
_MOST = 32  # phases of a launch, where it is not a single update that has more: each is a second of compilation
_APART = 2  # programs where the phases are launches: more than one, so that tiles are shared out
_SMALLER = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}  # than the tile for 8 warps, whose sums need their registers

# kernels that can be phases, and what each is called in a form
PHASES: dict[Any, str] = {
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
    """The same work as the given launches one after the other, in as few as possible.

    On a GPU that is one cooperative launch; where there are more than 32 given ones, several, each of whole updates,
    which share their code where they are alike. Without a GPU each phase is a launch.

    Building one copies a table to the device, which belongs before a capture; running it does not.

    Args:
        launches: at least one, of the kernels that an MLP's iteration consists of; none of them dependent. Their
            tensors must stay where they are, and are kept alive.
        device: of all tensors.
        programs: of each launch, at most as many as the GPU holds at once; by default one for each multiprocessor.
        cooperative: whether phases share a launch; by default where ``device`` is a GPU.

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
    held = [t for launch in launches for t in (*launch.arguments.values(), *launch.keep) if isinstance(t, torch.Tensor)]
    phases = [_phase(launch, programs) for launch in launches]
    made = []
    for part in _parts(phases):
        made += _launches_of(part, device, programs, cooperative, tuple(held))
    return made


def _parts(phases: Sequence[_Phase]) -> list[list[_Phase]]:
    """Whole updates, as many in each part as its code may have phases."""
    ends = [i + 1 for i, p in enumerate(phases) if p.form[0] == "adam_ema"]
    parts: list[list[_Phase]] = [[]]
    for begin, end in itertools.pairwise(sorted({0, *ends, len(phases)})):
        if parts[-1] and len(parts[-1]) + end - begin > _MOST:
            parts.append([])
        parts[-1] += phases[begin:end]
    return parts


def _launches_of(
    phases: Sequence[_Phase], device: torch.device, programs: int, cooperative: bool, held: tuple[torch.Tensor, ...]
) -> list[Launch]:
    forms = tuple(dict.fromkeys(p.form for p in phases))
    columns = _ARGUMENTS.value + max(len(p.arguments) for p in phases)
    rows = [[p.tiles[0] * p.tiles[1], *p.tiles, *p.arguments] for p in phases]
    arguments = {
        "table_ptr": torch.tensor([[*row, *[0] * (columns - len(row))] for row in rows], device=device),
        "barrier_ptr": torch.zeros((), dtype=torch.int32, device=device),
        "ORDER": tuple(forms.index(p.form) for p in phases), "FORMS": forms, "N_COLUMNS": columns,
    }  # fmt: skip
    ranges = [(0, len(phases))] if cooperative else [(i, i + 1) for i in range(len(phases))]
    return [
        Launch(
            _persistent_kernel, (programs,), {**arguments, "FIRST": first, "LAST": last}, num_warps=_NUM_WARPS,
            num_stages=_NUM_STAGES, cooperative=cooperative, keep=held,
        )
        for first, last in ranges
    ]  # fmt: skip


def copy_launch(src: torch.Tensor, dst: torch.Tensor) -> Launch:
    """``dst = src``, both contiguous and of equal numbers of elements, cast where their types differ."""
    return bias_lrelu_launch(src.view(-1), None, dst.view(-1), slope=1.0)  # which is the identity


def _phase(launch: Launch, programs: int) -> _Phase:
    name = PHASES.get(launch.kernel)
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


# ---- spec


def two_layers(
    x: torch.Tensor, hidden: torch.Tensor, last: torch.Tensor, *, slope: float = 0.2, backend: Backend | None = None
) -> torch.Tensor:
    """``leaky_relu(x hidden^T) last^T``, the second phase reading what the first one wrote: for checks.

    Args:
        x: ``[B, K]``; fp16, bf16, fp32 or fp64. Copied if not contiguous, as are the others.
        hidden: ``[H, K]`` of its dtype.
        last: ``[N, H]`` of its dtype.
        slope: of LeakyReLU, ``>= 0``.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        ``[B, N]``, contiguous, ``x``'s dtype; the hidden layer is rounded to it. No derivative.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "persistent"
    check_dtype(op, "x", x, DTYPES)
    check(x.ndim == 2, op, f"x has shape {tuple(x.shape)}, expected two dimensions")
    for name, w in (("hidden", hidden), ("last", last)):
        k = x.shape[1] if name == "hidden" else len(hidden)
        check(w.ndim == 2 and w.shape[1] == k, op, f"{name} has shape {tuple(w.shape)}, expected (..., {k})")
        check(w.dtype == x.dtype, op, f"{name} has dtype {w.dtype}, expected {x.dtype}")
    check_activation(op, "leaky-relu", slope)
    if resolve(op, backend, x, hidden, last) == "reference":
        return two_layers_reference(x, hidden, last, slope=slope)
    x, hidden, last = x.contiguous(), hidden.contiguous(), last.contiguous()
    h, y = (torch.empty(len(x), len(w), dtype=x.dtype, device=x.device) for w in (hidden, last))
    for launch in persistent_launches(_two_layers(x, hidden, last, h, y, slope), device=x.device):
        launch()
    return y


def two_layers_reference(
    x: torch.Tensor, hidden: torch.Tensor, last: torch.Tensor, *, slope: float = 0.2
) -> torch.Tensor:
    """The formula in PyTorch ops."""
    return torch.nn.functional.leaky_relu(x @ hidden.t(), slope) @ last.t()


def _two_layers(
    x: torch.Tensor, hidden: torch.Tensor, last: torch.Tensor, h: torch.Tensor, y: torch.Tensor, slope: float = 0.2
) -> list[Launch]:
    return [linear_launch(x, hidden, h, activation="leaky-relu", slope=slope), linear_launch(h, last, y)]


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    g = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        """On a coarse grid, so that sums of products are exact and orders of summation agree, in fp64 as well."""
        t = torch.randn(shape, generator=g, device=device, dtype=torch.float32)
        return (t.mul_(8).round_() / 8).to(dtype)

    return [
        Sample("small", (randn(3, 5), randn(4, 5), randn(2, 4)), {"slope": 0.25}),
        Sample("odd", (randn(70, 33), randn(65, 33), randn(7, 65)), {"slope": 0.5}),
        Sample("no-rows", (randn(0, 16), randn(8, 16), randn(4, 8))),
    ]


def _iteration(dtype: torch.dtype) -> list[Launch]:
    """What an iteration of WGAN-GP consists of, for networks of two hidden layers."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rows(n: int, columns: int = 64) -> torch.Tensor:
        return torch.empty(n, columns, dtype=dtype)

    w, x, flat, count = rows(64), rows(128), torch.empty(4096, dtype=wide), torch.zeros(1, dtype=torch.int32)
    bias, step, squares = flat[:64], torch.zeros((), dtype=torch.int64), torch.empty(64, dtype=torch.float64)
    one, two, out, u, g = (rows(192) for _ in range(5))
    leaky: dict[str, Any] = {"activation": "leaky-relu", "slope": 0.2}
    below: dict[str, Any] = {"mask_activation": "leaky-relu", "mask_slope": 0.2}

    discriminator, generator = variants(wide)[:2]

    def head(player: str, n: int) -> Head:
        return Head(flat[:64].to(dtype), flat[:1], chain=n, seeded=n if player == "generator" else 128,
                    kind="wasserstein", player=player, n=64, real=0 if player == "discriminator" else None, fake=0
                    if player == "generator" else 64, logits=flat[:n], scales=flat[:n], loss=flat[0],
                    real_mean=flat[1], fake_mean=flat[2], counter=count, seeds=flat[:n])  # fmt: skip

    def gradients(problem: Problem) -> Launch:
        return weight_gradient_launch([problem], squares=squares[: programs_of([problem])])

    dw = flat.view(64, 64)
    joined = Problem(u, one, dw, bias, [(0, 128)], flat[:192], flat[:64], (128, 192), x[:64], (128, 192))
    return [
        inputs_launch([Draw(w, step, 5, 2), Draw(bias.view(-1, 1), step, 5, 4, "uniform")]),
        linear_launch(w, w, one[:64], bias=bias, activation="leaky-relu", slope=0.0),
        linear_launch(one[:64], w, x[64:], bias=bias, activation="tanh"),
        mixed_launch(x, w, one, bias, bias=bias, **leaky, first=0, second=64, mixed=128),
        linear_launch(one, w, two, bias=bias, **leaky),
        head_launch(two, head("discriminator", 192), u, w, out, one, **below),
        linear_launch(out[128:], w, g[:64], transposed=True),
        penalty_launch(g[:64], out[:64], w, g[64:128], mask=one[128:], **leaky, penalty_weight=10.0, value=flat[0],
                       rows_value=bias, counter=count),
        linear_launch(g[64:128], w, g[128:], mask=two[128:], **leaky),
        gradients(joined),
        adam_ema_launch(discriminator, blocks_of([0], [4096], x.device), squares[:8]),
        head_launch(two[:64], head("generator", 64), u[:64], w, out[:64], one[:64], **below),
        linear_launch(out[:64], w, x[64:], mask=x[64:], activation="tanh", transposed=True),
        gradients(Problem(u, x.new_empty(192, 64), dw, bias, [(0, 192)])),
        adam_ema_launch(generator, blocks_of([0], [4096], x.device), squares[:8]),
    ]  # fmt: skip


def _launches(dtype: torch.dtype) -> list[Launch]:
    w, x, h, y = (torch.empty(64, 64, dtype=dtype) for _ in range(4))
    given = _iteration(dtype) if dtype == torch.bfloat16 else _two_layers(x, w, w, h, y)
    return persistent_launches(given, device=x.device, programs=132, cooperative=True)


def _bytes_moved(s: Sample) -> int:
    x, hidden, last = s.inputs[:3]
    assert x is not None
    assert hidden is not None
    assert last is not None
    return (x.numel() + hidden.numel() + last.numel() + len(x) * (2 * len(hidden) + len(last))) * x.element_size()


SPEC = OpSpec(
    name="persistent",
    op=two_layers,
    reference=two_layers_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=0,
    bytes_moved=_bytes_moved,
    interpreted_dtypes=INTERPRETED,
)
