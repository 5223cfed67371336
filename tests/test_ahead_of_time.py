"""Every kernel of ``fastgan.kernels.SPECS`` compiled for GPUs that need not be here: it fits, and nothing spills.

``python tests/test_ahead_of_time.py`` compiles them all and prints what each uses.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastgan.kernels import SPECS

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for, by architecture
CASES = [
    pytest.param(spec.name, str(dtype), arch, id=f"{spec.name}-{str(dtype).removeprefix('torch.')}-sm_{arch}")
    for spec in SPECS
    for dtype in spec.dtypes
    for arch in SHARED
]


def triton_type(value: object) -> str:
    """Of an argument, as Triton names it."""
    if isinstance(value, torch.Tensor):
        kinds = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
                 torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}  # fmt: skip
        return "*" + kinds[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def use(launch, arch: int) -> dict[str, int]:
    """What one compiled launch takes of a multiprocessor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, attrs = launch.kernel, {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # as Triton specialises at run time
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = triton_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return used | {"SHARED": compiled.metadata.shared, "THREADS": 32 * launch.num_warps}


def main() -> None:
    """Print one JSON line per launch, and one for a launch that must spill."""
    from dataclasses import replace

    for spec in SPECS:
        for dtype in spec.dtypes:
            for launch in spec.launches(dtype):
                for arch in SHARED:
                    row = {"op": spec.name, "kernel": launch.kernel.__name__, "dtype": str(dtype), "arch": arch}
                    print(json.dumps(row | use(launch, arch)))
    greedy = SPECS[0].launches(SPECS[0].dtypes[-1])[0]
    greedy = replace(greedy, arguments={**greedy.arguments, "BLOCK": 8192}, num_warps=1)
    print(json.dumps({"op": "greedy", "kernel": "", "dtype": "", "arch": 90} | use(greedy, 90)))


@functools.cache
def rows() -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # it would replace the kernels
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def misfits(row: dict) -> list[str]:
    return [
        f"{row['kernel']}: {what} is {row[key]}, at most {most}"
        for key, what, most in (
            ("STACK", "bytes of stack", 0),
            ("LOCAL", "bytes of local memory", 0),
            ("REG", "registers per thread", min(255, 65536 // row["THREADS"])),
            ("SHARED", "bytes of shared memory", SHARED[row["arch"]]),
        )
        if row[key] > most
    ]


@pytest.mark.parametrize(("op", "dtype", "arch"), CASES)
def test_fits_without_spills(op: str, dtype: str, arch: int) -> None:
    mine = [r for r in rows() if (r["op"], r["dtype"], r["arch"]) == (op, dtype, arch)]
    assert mine
    assert not [m for r in mine for m in misfits(r)]


def test_a_kernel_that_spills_is_caught() -> None:
    (greedy,) = (r for r in rows() if r["op"] == "greedy")
    assert misfits(greedy)


def test_every_kernel_is_launched() -> None:
    """A kernel that its module's ``launches`` forgets would never be compiled here."""
    folder = Path(sys.modules[SPECS[0].op.__module__].__file__).parent
    written = {
        name for file in folder.glob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)
    }
    assert written == {r["kernel"] for r in rows()} - {""}


if __name__ == "__main__":
    main()
