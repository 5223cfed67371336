"""Tile sizes of the matrix kernels: a shipped table, and a rule for the shapes that it does not hold.

``configs.json`` beside this file is the table: rows ``op, shape class, dtype, arch -> config``, and from which shape on
the library (cuBLAS, with a pointwise pass behind it) is faster. A row with ``"measured": false`` was estimated from
the number of tiles beside the number of multiprocessors, not timed; the tile sweep of ``bench.gpu`` replaces such
rows by measured ones.

A shape class rounds each of m, n and k up to a power of 2 between 32 and 4096.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

OPS = ("linear_lrelu", "linear_mixed", "linear_head", "linear_penalty", "weight_gradient")

_TABLE = Path(__file__).with_name("configs.json")
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Config:
    """Of one launch of a matrix kernel.

    Attributes:
        block_m: rows of the output that a program makes.
        block_n: columns of the output that a program makes.
        block_k: terms of the sum that a program reads at a time; at least 16, as all three.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# what the rule chooses from, small to large; BLOCK_M of 64 and more are products of whole warp groups on sm_90
_TILES: Mapping[str, tuple[Config, ...]] = {
    "half": (Config(64, 16, 128, 4, 3), Config(64, 32, 64, 4, 4), Config(64, 64, 64, 4, 4), Config(128, 128, 64, 8, 3)),
    "single": (Config(64, 16, 64, 4, 3), Config(64, 32, 32, 4, 4), Config(64, 64, 32, 4, 3)),
    "double": (Config(32, 32, 16, 4, 2),),  # for checks
    "interpreted": (Config(32, 32, 32, 4, 1),),
}
# two accumulators, or operands that are made on the way: no tile of 128
_LARGEST = {"linear_lrelu": 128 * 128, "linear_mixed": 64 * 64, "linear_head": 64 * 64, "linear_penalty": 64 * 64,
            "weight_gradient": 64 * 64}  # fmt: skip
_DEEPEST = {"linear_lrelu": 128, "linear_mixed": 128, "linear_head": 64, "linear_penalty": 32, "weight_gradient": 128}
_NARROWEST = {"weight_gradient": 32}  # all layers share a launch, and so the multiprocessors


def config(op: str, m: int, n: int, k: int, dtype: torch.dtype, arch: int | None = None) -> Config:
    """The tile of a launch that writes ``[m, n]`` from sums over ``k``.

    Args:
        op: one of ``OPS``.
        m, n, k: the shape of the product.
        dtype: of the operands.
        arch: compute capability (90 is Hopper), ``None`` without a GPU.
    """
    if arch is None and os.environ.get("TRITON_INTERPRET") == "1":
        return _TILES["interpreted"][0]
    row = None if arch is None else _table()[0].get((op, shape_class(m, n, k), dtype, arch))
    if row is not None:
        return row
    return rule(op, m, n, k, dtype, arch)


def rule(op: str, m: int, n: int, k: int, dtype: torch.dtype, arch: int | None = None) -> Config:
    """What :func:`config` gives for shapes that the table does not hold.

    The largest tile that still gives most multiprocessors one; the smallest where none does.
    """
    tiles = _candidates(op, dtype)
    wanted = 3 * _MULTIPROCESSORS.get(arch or 90, 132) // 4
    enough = [t for t in tiles if triton.cdiv(m, t.block_m) * triton.cdiv(n, t.block_n) >= wanted]
    return enough[-1] if enough else tiles[0]


def library_wins(m: int, n: int, k: int, dtype: torch.dtype, arch: int | None = None) -> bool:
    """Whether cuBLAS and a pointwise pass are faster than one fused launch; arguments as for :func:`config`."""
    if arch is None:
        return False
    limits = _table()[1]
    limit = limits.get((dtype, arch)) or limits.get((dtype, None))
    if limit is None:
        return False
    return m >= limit[0] or min(n, k) >= limit[1]


def shipped(op: str, dtype: torch.dtype) -> list[Config]:
    """Every config that :func:`config` may give for an op on a GPU, each once."""
    rows = [c for (name, _, row_dtype, _), c in _table()[0].items() if (name, row_dtype) == (op, dtype)]
    return list(dict.fromkeys([*_candidates(op, dtype), *rows]))


def shape_class(m: int, n: int, k: int) -> str:
    """The row of the table that a shape belongs to, as ``"256x512x1024"``."""
    return "x".join(str(min(4096, max(32, triton.next_power_of_2(size)))) for size in (m, n, k))


def _candidates(op: str, dtype: torch.dtype) -> list[Config]:
    kind = "double" if dtype == torch.float64 else "single" if dtype == torch.float32 else "half"
    return [
        replace(t, block_k=min(t.block_k, _DEEPEST[op]))
        for t in _TILES[kind]
        if t.block_m * t.block_n <= _LARGEST[op] and t.block_n >= _NARROWEST.get(op, 0)
    ]


Key = tuple[str, str, torch.dtype, int]


@functools.cache
def _table() -> tuple[dict[Key, Config], dict[tuple[torch.dtype, int | None], tuple[int, int]]]:
    read = json.loads(_TABLE.read_text())
    rows = {
        (row["op"], row["shape"], getattr(torch, row["dtype"]), row["arch"]): Config(*row["config"])
        for row in read["tiles"]
    }
    library = {(getattr(torch, row["dtype"]), row["arch"]): (row["rows"], row["width"]) for row in read["library"]}
    return rows, library


def as_row(op: str, m: int, n: int, k: int, dtype: torch.dtype, arch: int, chosen: Config) -> dict[str, Any]:
    """A row of ``tiles`` in ``configs.json`` for a config that was measured."""
    name = str(dtype).removeprefix("torch.")
    return {"op": op, "shape": shape_class(m, n, k), "dtype": name, "arch": arch, "config": list(astuple(chosen)),
            "measured": True}  # fmt: skip
