"""Every kernel of ``fastgan.kernels.SPECS`` compiled for GPUs that need not be here: it fits, and nothing spills.

The table is in ``bench/results/ahead_of_time.md``; ``python tests/ahead_of_time.py --write`` brings it up to date.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ahead_of_time
import pytest
from ahead_of_time import ARCHS, REPORT, SHARED, Row, misfits, render

from fastgan.kernels import SPECS

pytestmark = pytest.mark.xdist_group("ahead of time")  # one process compiles, with a process for each core

CASES = [
    pytest.param(spec.name, str(dtype).removeprefix("torch."), arch, id=f"{spec.name}-{str(dtype)[6:]}-sm_{arch}")
    for spec in SPECS
    for dtype in spec.dtypes
    for arch in ARCHS
]


@functools.cache
def run(*options: str) -> str:
    """Lines of JSON; those that a run just before has saved, where the environment names its file."""
    saved = os.environ.get("FASTGAN_AHEAD_OF_TIME")
    if saved and not options:
        return Path(saved).read_text()
    command = [sys.executable, ahead_of_time.__file__, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(*options: str) -> list[Row]:
    found = []
    for line in run(*options).splitlines():
        row = json.loads(line)
        found.append(Row(**row | {"dots": tuple(map(tuple, row["dots"])), "instructions": tuple(row["instructions"])}))
    return found


def flawed() -> dict[str, Row]:
    return {row.op: row for row in rows("--flaws")}


@pytest.mark.parametrize(("op", "dtype", "arch"), CASES)
def test_fits_without_spills(op: str, dtype: str, arch: int) -> None:
    mine = [r for r in rows() if (r.op, r.dtype, r.arch) == (op, dtype, arch)]
    assert mine
    assert not [m for r in mine for m in misfits(r)]


@pytest.mark.parametrize(
    ("flaw", "found"),
    [
        ("spills", r"stack \[B\] is \d+, at most 0"),
        ("waits late", "touches memory before it waits"),
        ("never waits", "touches memory before it waits"),
        ("never lets the next begin", "never lets the next launch begin"),
        ("no instruction", "is launched dependent and has no griddepcontrol instruction"),
        ("too few warps for wgmma", r"no wgmma instruction for the products \(\('bf16', 64, 64\),\)"),
        ("does not compile", "for sm_90: CompilationError: "),
        ("too much shared memory", rf"shared memory \[B\] is \d+, at most {SHARED[90]}"),
    ],
)
def test_a_flaw_is_found(flaw: str, found: str) -> None:
    (line,) = misfits(flawed()[flaw])
    assert re.search(found, line)


@pytest.mark.parametrize(
    ("name", "instructions", "dots"),
    [
        ("copy", ("griddepcontrol",), ()),
        ("product", ("wgmma",), (("bf16", 64, 64),)),
        ("tf32 product", ("wgmma",), (("tf32", 64, 64),)),
        ("ieee product", (), ()),
        ("small product", ("mma",), (("bf16", 32, 32),)),
        ("product on sm_80", ("mma",), (("fp16", 64, 64),)),
        ("product on sm_100", ("tcgen05",), (("bf16", 128, 128),)),
    ],
)
def test_what_is_right_passes(name: str, instructions: tuple, dots: tuple) -> None:
    row = flawed()[f"right {name}"]
    assert misfits(row) == []
    assert (row.instructions, row.dots) == (instructions, dots)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"registers": 249, "threads": 264}, "registers x threads is 67584, at most 65536"),
        ({"registers": 248, "threads": 264}, None),
        ({"local": 8}, r"local memory \[B\] is 8, at most 0"),
        ({"cooperative": True}, "not launched as cooperative, compiled otherwise"),
        ({"cooperative_asked": True}, "is launched as cooperative, compiled otherwise"),
        ({"cooperative": True, "cooperative_asked": True}, None),
        ({"dots": (("fp16", 16, 16),), "arch": 100}, "no mma or tcgen05 instruction"),
        ({"dots": (("fp16", 64, 16),), "arch": 80, "instructions": ("wgmma",)}, None),
    ],
)
def test_limits(change: dict, found: str | None) -> None:
    lines = misfits(replace(flawed()["right copy"], **change))
    assert [bool(re.search(found or "", line)) for line in lines] == [True] * bool(found)


def test_every_kernel_is_launched_and_can_be_dependent() -> None:
    """A kernel that its module's ``launches`` forgets would never be compiled here."""
    folder = Path(sys.modules[SPECS[0].op.__module__].__file__).parent
    written = {
        name for file in folder.glob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)
    }
    assert written == {r.kernel for r in rows()}
    assert written == {r.kernel for r in rows() if r.dependent or r.cooperative}


def test_the_report_is_current() -> None:
    import triton

    if not REPORT.is_file():
        pytest.skip(f"{REPORT} is not beside these tests")
    written = REPORT.read_text()
    (version,) = re.findall(r"^By Triton (\S+),", written, re.M)
    if version != triton.__version__:
        pytest.skip(f"the report is Triton {version}'s, this is {triton.__version__}: registers may differ")
    assert written == render(rows()), "run python tests/ahead_of_time.py --write"


def test_no_two_rows_share_a_name() -> None:
    names = [(r.op, r.kernel, r.dtype, r.config, r.arch) for r in rows()]
    assert [n for n in set(names) if names.count(n) > 1] == []
