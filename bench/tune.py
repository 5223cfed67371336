"""The tile sweep: which tile is fastest for which shape, timed by graph replays, in the form of kernels/configs.json.

python -m bench.tune --out FILE        on a GPU; ``python -m bench.gpu`` runs it as its section ``tune``

For each op, class of shapes and dtype every candidate is built, held to torch's result, captured and replayed in turn
with the others; the fastest becomes a row. Beside them runs the library (cuBLAS, with pointwise passes behind it): from
which number of rows and which width on it wins is the other half of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import captured
from bench.sections import NO_CUDA, Context
from fastgan.benchmark.measure import last_line
from fastgan.benchmark.timing import interleaved, wait

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
BATCHES = (64, 256, 1024)
WIDE = ((256, 1024), (256, 2048), (1024, 1024), (4096, 1024))  # rows and width: where the library begins to win
# op, and for each batch the shapes m, n, k that its table is asked for: layers of 784-512-256-1 and of its generator
SHAPES: dict[str, Callable[[int], list[tuple[int, int, int]]]] = {
    "linear_lrelu": lambda b: [(b, 512, 256), (3 * b, 256, 512), (2 * b, 512, 784), (b, 784, 512)],
    "linear_head": lambda b: [(3 * b, 512, 256)],
    "linear_penalty": lambda b: [(b, 512, 784)],
    "linear_mixed": lambda b: [(b, 512, 784)],
    "weight_gradient": lambda b: [(512, 784, 3 * b)],
}
CANDIDATES = [  # block_m, block_n, block_k, num_warps, num_stages
    (*block, block_k, warps, stages)
    for (block, warps) in (((64, 16), 4), ((64, 32), 4), ((64, 64), 4), ((64, 128), 4), ((128, 64), 4), ((128, 128), 8))
    for block_k, stages in itertools.product((32, 64, 128), (3, 4))
]
REPLAYS = 20  # launches in a graph, so that its own start is small beside them
SHARED = 200 * 1024  # bytes that a program's pipeline may take


def work() -> list[tuple[str, tuple[int, int, int], torch.dtype]]:
    """What is swept, what matters most first."""
    found = [
        (op, shape, dtype)
        for batch in BATCHES
        for dtype in DTYPES
        for op, shapes in SHAPES.items()
        for shape in shapes(batch)
    ]
    return found + [("linear_lrelu", (rows, width, width), dtype) for dtype in DTYPES for rows, width in WIDE]


def tune(context: Context) -> None:
    """Sweep until the time is over; what is done is kept."""
    from fastgan.kernels import configs

    major, minor = torch.cuda.get_device_capability(context.device)
    arch = 10 * major + minor
    context.part("compilation", lambda: compiled(context))
    tiles: list[dict[str, Any]] = []
    seen: set[tuple[str, str, torch.dtype]] = set()
    for op, (m, n, k), dtype in work():
        key = op, configs.shape_class(m, n, k), dtype
        if key in seen:
            continue
        seen.add(key)
        name = f"{op} {m}x{n}x{k} {short(dtype)}"
        if context.left() < 12:
            context.put("ended early", f"out of time at {name}")
            break
        context.part(name, partial(swept, op, m, n, k, dtype, context))
        found = context.data[name]
        if "best" in found:
            tiles.append(configs.as_row(op, m, n, k, dtype, arch, configs.Config(*found["best"])))
            context.put("table", {"tiles": tiles, "library": library(context.data, arch)})


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiled(context: Context) -> dict[str, float]:
    """Fill Triton's cache with all candidates, a process for each op and dtype."""
    begin = time.monotonic()
    commands = [
        [sys.executable, "-m", "bench.tune", "--compile", op, short(dtype)]
        for dtype in DTYPES[:2]
        for op in SHAPES
    ]  # fmt: skip
    children = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for command in commands]
    deadline = time.monotonic() + context.left() / 2
    try:
        for child in children:
            child.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("compilation goes on in the sweep", flush=True)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return {"processes": len(children), "seconds": time.monotonic() - begin}


def compile_some(op: str, dtype: torch.dtype, device: torch.device) -> None:
    """Launch each candidate once, on operands that Triton specialises as it does those of the sweep."""
    from bench.tiles import PROBLEMS, Operands
    from fastgan.kernels.configs import Config

    size = 768
    problem = PROBLEMS[op](size, size, size, Operands(dtype, device))
    for candidate in candidates(op, size, size, size, dtype):
        with contextlib.suppress(Exception):  # the sweep records why one does not compile
            for launch in problem.build(Config(*candidate)):
                launch()
    wait(device)


def swept(op: str, m: int, n: int, k: int, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    """Microseconds of each candidate, of the library, and the best candidate."""
    from bench.tiles import PROBLEMS, Operands
    from fastgan.closeness import measure
    from fastgan.kernels.configs import Config

    device = context.device
    refused: dict[str, str] = {}
    graphs: dict[str, Any] = {}
    keep = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        problem = PROBLEMS[op](m, n, k, Operands(dtype, device))
        if problem.library is not None:
            graphs["library"] = captured(partial(again, [problem.library]), device)
        for candidate in candidates(op, m, n, k, dtype):
            label = "x".join(map(str, candidate))
            try:
                for out in problem.outs:
                    out.fill_(float("nan"))
                launches = problem.build(Config(*candidate))
                again(launches, 1)
                wait(device)
                off = [measure(*three, slack=4.0) for three in zip(problem.outs, problem.plain, problem.exact,
                                                                   strict=True)]  # fmt: skip
                if wrong := [o.detail for o in off if not o.passed]:
                    refused[label] = f"wrong: {wrong[0]}"
                    continue
                graphs[label] = captured(partial(again, launches), device)
                keep.append(launches)
            except Exception as e:  # too much shared memory, or a tile that Triton cannot compile
                refused[label] = last_line(e)
            if context.left() < 8:
                break
        runs = {label: graph.replay for label, graph in graphs.items()}
        timed = interleaved(runs, device, 10, time.monotonic() + 4)
    finally:
        torch.set_float32_matmul_precision(before)
    times = {label: row["median_us"] / REPLAYS for label, row in timed.items()}
    library_us = times.pop("library", None)
    if not times:
        return {"failed": "no candidate works", "refused": refused}
    best = min(times, key=lambda label: times[label])
    return {"op": op, "shape": [m, n, k], "best": [int(size) for size in best.split("x")], "best_us": times[best],
            "library_us": library_us, "times_us": times, "refused": refused}  # fmt: skip


def again(launches: Iterable[Callable[[], object]], times: int | None = None) -> None:
    for _ in range(REPLAYS if times is None else times):
        for launch in launches:
            launch()


def candidates(op: str, m: int, n: int, k: int, dtype: torch.dtype) -> Iterable[tuple[int, ...]]:
    """Those that make sense: no block of twice the size or more, and shared memory that a multiprocessor has."""
    for block_m, block_n, block_k, warps, stages in CANDIDATES:
        shared = (block_m + block_n) * block_k * dtype.itemsize * stages
        fits = shared <= SHARED and block_n < 2 * n and block_k < 2 * k and (block_m == 64 or block_m < 2 * m)
        heavy = op != "linear_lrelu" and block_m * block_n > 64 * 64  # two accumulators, or operands made on the way
        if fits and not heavy and not (dtype == torch.float32 and block_k == 128):
            yield block_m, block_n, block_k, warps, stages


def library(swept: dict[str, Any], arch: int) -> list[dict[str, Any]]:
    """From which rows, and from which width, the library was faster on everything measured there; 2^30 for never."""
    out = []
    for dtype in DTYPES:
        name = short(dtype)
        found = [
            v
            for key, v in swept.items()
            if key.startswith("linear_lrelu ") and key.endswith(f" {name}") and "best_us" in v
        ]

        def least(size: Callable[[list[int]], int], found: list[dict[str, Any]] = found) -> int:
            for limit in sorted({size(v["shape"]) for v in found}):
                if all(v["library_us"] < v["best_us"] for v in found if size(v["shape"]) >= limit):
                    return limit
            return 2**30

        if found:
            row = {"rows": least(lambda s: s[0]), "width": least(lambda s: min(s[1:]))}
            out.append({"dtype": name, "arch": arch, **row, "measured": True})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the table, in the form of kernels/configs.json")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--compile", nargs=2, metavar=("OP", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.compile:
        compile_some(args.compile[0], getattr(torch, args.compile[1]), device)
        return
    if args.out is None or device.type != "cuda":
        parser.error("--out is missing" if args.out is None else NO_CUDA)
    context = Context(device, False, time.monotonic() + args.seconds)
    tune(context)
    args.out.write_text(json.dumps(context.data["table"], indent=1) + "\n")


if __name__ == "__main__":
    main()
