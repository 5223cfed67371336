"""Compiles every launch of ``fastgan.kernels.SPECS`` for GPUs that need not be here, and says what it takes of them.

    python tests/ahead_of_time.py            prints the table; exit code 1 where a launch does not fit
    python tests/ahead_of_time.py --write    writes it to bench/results/ahead_of_time.md

Triton's cache holds what was compiled before; a process for each core compiles the rest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # before torch and triton are imported
    os.environ.pop("TRITON_INTERPRET", None)  # it would replace the kernels
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

from fastgan.kernels import SPECS

if TYPE_CHECKING:
    from fastgan.kernels._launch import Launch

REPORT = Path(__file__).parents[1] / "bench" / "results" / "ahead_of_time.md"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for, by architecture
ARCHS = tuple(SHARED)
REGISTERS = 65536  # of a multiprocessor
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
          torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
          torch.bool: "i1"}  # fmt: skip
_TENSOR_CORE = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
_MEMORY = re.compile(r"\b(ld|st|atom|red)\.(\w+\.)*global|\bcp\.async|\bcp\.reduce")


@dataclass(frozen=True)
class Row:
    """One launch compiled for one architecture.

    Attributes:
        config: the compile-time arguments, warps and stages; numbered where launches differ in their shapes alone.
        registers: per thread.
        shared: bytes per program.
        stack: bytes per thread: where spilled registers go.
        local: bytes per thread of other local memory.
        threads: per program.
        instructions: of tensor cores, and ``griddepcontrol``.
        dots: operand type, rows and columns of each matrix product that tensor cores can do; tf32 where fp32 may be.
        dependent: launched before the one before it has ended.
        waits: before it touches memory, and lets the next launch begin; for a dependent launch.
        cooperative: as compiled.
        cooperative_asked: as launched.
        error: why it does not compile.
    """

    op: str
    kernel: str
    dtype: str
    config: str
    arch: int
    registers: int = 0
    shared: int = 0
    stack: int = 0
    local: int = 0
    threads: int = 0
    instructions: tuple[str, ...] = ()
    dots: tuple[tuple[str, int, int], ...] = ()
    dependent: bool = False
    waits: bool = False
    cooperative: bool = False
    cooperative_asked: bool = False
    error: str = ""


def misfits(row: Row) -> list[str]:
    """What a launch takes beyond the target's limits, and what is missing in it."""
    name = f"{row.op}: {row.kernel} {row.dtype} [{row.config}] for sm_{row.arch}"
    if row.error:
        return [f"{name}: {row.error}"]
    allocated = -(-row.registers // 8) * 8  # registers are handed out in eights
    found = [
        f"{name}: {what} is {n}, at most {most}"
        for what, n, most in (
            ("stack [B]", row.stack, 0),
            ("local memory [B]", row.local, 0),
            ("registers x threads", allocated * row.threads, REGISTERS),
            ("shared memory [B]", row.shared, SHARED[row.arch]),
        )
        if n > most
    ]
    expected = set()
    for _, m, _ in row.dots:
        if row.arch == 90 and m >= 64:
            expected.add("wgmma")
        else:
            expected.add("mma or tcgen05" if row.arch == 100 else "mma or wgmma")
    missing = [e for e in sorted(expected) if not set(e.split(" or ")) & set(row.instructions)]
    found += [f"{name}: no {e} instruction for the products {row.dots}" for e in missing]
    if row.dependent and row.arch >= 90:
        if "griddepcontrol" not in row.instructions:
            found.append(f"{name}: is launched dependent and has no griddepcontrol instruction")
        elif not row.waits:
            found.append(f"{name}: touches memory before it waits, or never lets the next launch begin")
    if row.cooperative != row.cooperative_asked:
        found.append(f"{name}: is {'' if row.cooperative_asked else 'not '}launched as cooperative, compiled otherwise")
    return found


# ---- one compilation


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and divisibility of the arguments, as Triton specialises a call at run time."""
    signature, constants, attributes = {}, {}, {}
    unknown = launch.arguments.keys() - {p.name for p in launch.kernel.params}
    if unknown:
        raise TypeError(f"{launch.kernel.__name__} has no parameter {', '.join(sorted(unknown))}")
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments.get(name, parameter.default)
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], number = "*" + _TYPES[value.dtype], value.data_ptr()
        elif type(value) is int:
            signature[name], number = ("i32" if -(2**31) <= value < 2**31 else "i64"), value
        elif type(value) in (bool, float):
            signature[name], number = ("u1" if type(value) is bool else "fp32"), 1
        else:
            raise TypeError(f"{launch.kernel.__name__}: {name} is a {type(value).__name__}, which the gate cannot type")
        if specialised and number % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _config(launch: Launch, constants: dict[str, Any]) -> str:
    """The compile-time arguments that tell launches of one kernel apart."""
    words = []
    for p in launch.kernel.params:
        value = constants.get(p.name)
        if p.name in ("ACC", "DEPENDENT", "FORMS", "ORDER") or value is None or value is False:
            continue
        if value is True:
            words.append(p.name)
        elif isinstance(value, float):
            words.append(f"{p.name}={value:.4g}")
        else:
            words.append(value if isinstance(value, str) else f"{p.name}={value}")
    words += ["dependent"] * bool(constants.get("DEPENDENT")) + ["cooperative"] * launch.cooperative
    return " ".join([*words, f"{launch.num_warps} warps", f"{launch.num_stages} stages"])


def _waits(ptx: str) -> bool:
    """Whether ``griddepcontrol.wait`` comes before the first access to memory and the next launch is let begin."""
    body = ptx[ptx.index(".entry") :]
    wait, touches = body.find("griddepcontrol.wait"), _MEMORY.search(body)
    return 0 <= wait < (touches.start() if touches else len(body)) and "griddepcontrol.launch_dependents" in body


def _products(ttir: str) -> tuple[tuple[str, int, int], ...]:
    """Operand type, rows and columns of the matrix products that tensor cores can do."""
    found = set()
    for line in re.findall(r"tt\.dot .*", ttir):
        shapes = re.search(r": tensor<(\d+)x\d+x(\w+)> \* tensor<\d+x(\d+)x\w+>", line)
        if shapes is None:
            raise ValueError(f"a product of unknown form: {line}")
        m, operand, n = shapes.groups()
        if operand in ("bf16", "f16") or (operand == "f32" and "inputPrecision = tf32" in line):
            found.add(({"f16": "fp16", "f32": "tf32"}.get(operand, operand), int(m), int(n)))
    return tuple(sorted(found))


def compiled(op: str, dtype: str, config: str, launch: Launch, arch: int) -> Row:
    """Compile one launch for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(launch)
    dependent = bool(constants.get("DEPENDENT"))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options |= {"launch_pdl": True} if dependent else {}
    options |= {"launch_cooperative_grid": True} if launch.cooperative else {}
    binary = triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        dump = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    ptx = binary.asm["ptx"]
    instructions = [name for name, pattern in _TENSOR_CORE.items() if re.search(pattern, ptx)]
    return Row(
        op=op,
        kernel=launch.kernel.__name__,
        dtype=dtype,
        config=config,
        arch=arch,
        registers=used["REG"],
        shared=binary.metadata.shared,
        stack=used["STACK"],
        local=used["LOCAL"],
        threads=32 * binary.metadata.num_warps,
        instructions=tuple(instructions + (["griddepcontrol"] if "griddepcontrol" in ptx else [])),
        dots=_products(binary.asm["ttir"]),
        dependent=dependent,
        waits=dependent and _waits(ptx),
        cooperative=bool(binary.metadata.launch_cooperative_grid),
        cooperative_asked=launch.cooperative,
    )


# ---- all of them

Job = tuple[str, str, str, "Launch", int]  # op, dtype, configuration, launch, architecture


def jobs(dtypes: Iterable[str] = ()) -> list[Job]:
    """Every launch of every op for every architecture, and every kernel once more as a dependent launch.

    Args:
        dtypes: of these alone, ``"float32"``; all where none is given.
    """
    found: list[Job] = []
    seen: set[str] = set()
    dependent: set[str] = set()
    named: Counter[tuple[str, ...]] = Counter()

    def add(op: str, dtype: str, launch: Launch, archs: Iterable[int]) -> None:
        kernel, specialised = launch.kernel.__name__, _signature(launch)
        key = repr((kernel, specialised, launch.num_warps, launch.num_stages, launch.cooperative))
        if key in seen:
            return
        seen.add(key)
        config = _config(launch, specialised[1])
        named[op, kernel, dtype, config] += 1
        count = named[op, kernel, dtype, config]
        found.extend((op, dtype, config + f" ({count})" * (count > 1), launch, arch) for arch in archs)

    for spec in SPECS:
        for dtype in spec.dtypes:
            name = str(dtype).removeprefix("torch.")
            if dtypes and name not in dtypes:
                continue
            for launch in spec.launches(dtype):
                add(spec.name, name, launch, ARCHS)
                if launch.kernel.__name__ not in dependent and not launch.cooperative:
                    dependent.add(launch.kernel.__name__)
                    add(spec.name, name, replace(launch, arguments={**launch.arguments, "DEPENDENT": True}), ARCHS[1:])
    return found


_jobs: list[Job] = []  # the launches cannot be pickled: forked processes find them here


def _run(i: int) -> Row:
    op, dtype, config, launch, arch = _jobs[i]
    try:
        return compiled(op, dtype, config, launch, arch)
    except Exception as e:  # whatever Triton or ptxas raises: the others are compiled nevertheless
        last = (str(e).strip().splitlines() or [""])[-1]
        return Row(op, launch.kernel.__name__, dtype, config, arch, error=f"{type(e).__name__}: {last}")


def compile_all(todo: list[Job]) -> list[Row]:
    _jobs[:] = todo
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_run, range(len(todo)), chunksize=4)


# ---- the report


def render(rows: list[Row]) -> str:
    """The table in Markdown: a line for each launch, its architectures side by side."""
    import triton

    lines: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault((row.op, f"`{row.kernel}`", row.dtype, row.config), {})[row.arch] = row
    most = {arch: [r for r in rows if r.arch == arch] for arch in ARCHS}
    table = [
        ["op", "kernel", "dtype", "configuration", *(f"sm_{arch}" for arch in ARCHS)],
        ["---"] * (4 + len(ARCHS)),
        *([*key, *(_cell(by_arch.get(arch)) for arch in ARCHS)] for key, by_arch in lines.items()),
    ]
    return "\n".join(
        [
            "# Kernels compiled ahead of time",
            "",
            f"By Triton {triton.__version__}, without a GPU: registers per thread, shared memory per program, "
            "instructions of tensor cores and of dependent launches. Nothing here was run or timed.",
            f"{len(rows)} compilations of {len({r.kernel for r in rows})} kernels; largest stack "
            f"{max(r.stack for r in rows)} bytes, largest local memory {max(r.local for r in rows)} bytes; at most "
            + ", ".join(
                f"{max(r.registers for r in of)} registers and {max(r.shared for r in of) / 1024:.1f} of "
                f"{SHARED[arch] // 1024} KiB shared memory on sm_{arch}"
                for arch, of in most.items()
                if of
            )
            + ".",
            "",
            "`python tests/ahead_of_time.py --write` writes this file, `tests/test_ahead_of_time.py` holds it current.",
            "",
            *("| " + " | ".join(cells) + " |" for cells in table),
            "",
        ]
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.error:
        return "does not compile"
    over = [f"{row.stack} B stack"] * (row.stack > 0) + [f"{row.local} B local"] * (row.local > 0)
    return ", ".join([f"{row.registers} r", f"{row.shared / 1024:.1f} KiB", *row.instructions, *over])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}")
    parser.add_argument("--dtypes", nargs="+", default=(), help="compile these alone, such as bfloat16")
    parser.add_argument("--save", type=Path, help="write what --json prints to a file as well, for the tests")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each compilation, judge nothing")
    parser.add_argument("--flaws", action="store_true", help="with --json: compile tests/flawed_kernels.py instead")
    args = parser.parse_args()
    if args.flaws:
        sys.path.append(str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
        from flawed_kernels import LAUNCHES

        rows = compile_all([(name, "", "", launch, arch) for name, (launch, arch) in LAUNCHES.items()])
    else:
        rows = compile_all(jobs(args.dtypes))
    lines = "\n".join(json.dumps(asdict(row)) for row in rows)
    if args.save:
        args.save.write_text(lines)
    if args.json:
        print(lines)
        return 0
    print(render(rows))
    if args.write:
        REPORT.write_text(render(rows))
    found = [line for row in rows for line in misfits(row)]
    print("\n".join(found) or "every launch fits")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
