"""The tile sweep: which tile is fastest for which shape, timed by graph replays, in the form of kernels/configs.json.

python -m bench.tune --out FILE        on a GPU; ``python -m bench.gpu`` runs it as its section ``tune``

For each class of shapes and dtype every candidate is built, held to torch's product, captured and replayed in turn
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
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import captured
from bench.sections import NO_CUDA, Context, Skip, last_line
from bench.timing import interleaved, wait

SLOPE = 0.2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [  # rows, outputs, inputs: layers of the vanilla pair, rows of two or three places stacked
    *((rows, n, k) for rows in (64, 192, 512, 2048) for n, k in ((512, 784), (256, 512), (784, 512), (512, 256))),
    *((rows, width, width) for rows, width in ((256, 1024), (256, 2048), (1024, 1024), (4096, 1024))),
]
CANDIDATES = [  # block_m, block_n, block_k, num_warps, num_stages
    (m, n, k, warps, stages)
    for (m, n, warps), k, stages in itertools.product(
        ((64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)), (32, 64, 128), (3, 4)
    )
]
REPLAYS = 20  # launches in a graph, so that its own start is small beside them


def tune(context: Context) -> None:
    """Sweep, the shapes of small batches first, until the time is over; what is done is kept."""
    try:
        from fastgan.kernels import configs
        from fastgan.kernels.linear_lrelu import linear_launch
    except ImportError as e:
        raise Skip(f"no matrix kernels: {e}") from e
    major, minor = torch.cuda.get_device_capability(context.device)
    arch = 10 * major + minor
    context.part("compilation", lambda: compiled(context))
    tiles: list[dict[str, Any]] = []
    seen: set[tuple[str, torch.dtype]] = set()
    for (m, n, k), dtype in itertools.product(SHAPES, DTYPES):
        key = configs.shape_class(m, n, k), dtype
        if key in seen:
            continue
        seen.add(key)
        if context.left() < 15:
            context.put("ended early", f"out of time at {m}x{n}x{k}")
            break
        name = f"{m}x{n}x{k} {str(dtype).removeprefix('torch.')}"
        context.part(name, lambda at=(m, n, k, dtype): swept(*at, context, linear_launch, configs.Config))
        found = context.data[name]
        if "best" in found:
            best = configs.Config(*found["best"])
            tiles.append(configs.as_row("linear_lrelu", m, n, k, dtype, arch, best))
            context.put("table", {"tiles": tiles, "library": library(context.data, arch)})


def compiled(context: Context) -> dict[str, float]:
    """Fill Triton's cache with all candidates, a process for each dtype and depth of the pipeline."""
    begin = time.monotonic()
    commands = [
        [sys.executable, "-m", "bench.tune", "--compile", str(dtype).removeprefix("torch."), str(stages)]
        for dtype in DTYPES
        for stages in sorted({c[4] for c in CANDIDATES})
    ]
    children = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for command in commands]
    try:
        for child in children:
            child.wait(max(1.0, context.left() / 2))
    except subprocess.TimeoutExpired:
        print("compilation goes on in the sweep", flush=True)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return {"processes": len(children), "seconds": time.monotonic() - begin}


def compile_some(dtype: torch.dtype, stages: int, device: torch.device) -> None:
    """Launch each candidate of that depth once, on operands that Triton specialises as it does those of the sweep."""
    from fastgan.kernels import configs
    from fastgan.kernels.linear_lrelu import linear_launch

    size = 256
    x, w, y = (torch.zeros(size, size, dtype=dtype, device=device) for _ in range(3))
    precision = "tf32" if dtype == torch.float32 else "ieee"
    for candidate in candidates(size, size, size, dtype):
        if candidate[4] == stages:
            with contextlib.suppress(Exception):  # the sweep records why one does not compile
                linear_launch(x, w, y, bias=w[0], activation="leaky-relu", slope=SLOPE, precision=precision,
                              tile=configs.Config(*candidate))()  # fmt: skip
    wait(device)


def swept(
    m: int, n: int, k: int, dtype: torch.dtype, context: Context, build: Callable[..., Any], config: Callable[..., Any]
) -> dict[str, Any]:
    """Microseconds of each candidate, of the library, and the best candidate."""
    device = context.device
    g = torch.Generator(device=device).manual_seed(0)
    x, w = (torch.randn(*size, generator=g, device=device).to(dtype) for size in ((m, k), (n, k)))
    bias = torch.randn(n, generator=g, device=device).to(dtype)
    precision = "tf32" if dtype == torch.float32 else "ieee"
    exact = torch.nn.functional.leaky_relu(x.double() @ w.double().T + bias.double(), SLOPE)
    runs: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    keep = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        plain = torch.nn.functional.leaky_relu(torch.addmm(bias, x, w.T), SLOPE)
        allowed = 4 * float((plain.double() - exact).abs().max()) + 1e-3
        library_out = torch.empty_like(plain)

        def by_library() -> None:
            for _ in range(REPLAYS):
                torch.addmm(bias, x, w.T, out=library_out)
                torch.nn.functional.leaky_relu_(library_out, SLOPE)

        graph = captured(by_library, device)
        keep.append(graph)
        runs["library"] = graph.replay
        for candidate in candidates(m, n, k, dtype):
            label = "x".join(map(str, candidate))
            try:
                y = torch.full((m, n), float("nan"), dtype=dtype, device=device)
                launch = build(x, w, y, bias=bias, activation="leaky-relu", slope=SLOPE, precision=precision,
                               tile=config(*candidate))  # fmt: skip
                launch()
                wait(device)
                off = float((y.double() - exact).abs().max())
                if not off <= allowed:
                    refused[label] = f"wrong by {off:.1e}"
                    continue
                graph = captured(lambda launch=launch: [launch() for _ in range(REPLAYS)], device)
            except Exception as e:  # too much shared memory, or a tile that Triton cannot compile
                refused[label] = last_line(e)
                continue
            keep.append((graph, launch, y))
            runs[label] = graph.replay
            if context.left() < 10:
                break
        timed = interleaved(runs, device, 10, time.monotonic() + 5)
    finally:
        torch.set_float32_matmul_precision(before)
    times = {label: row["median_us"] / REPLAYS for label, row in timed.items()}
    ours = {label: t for label, t in times.items() if label != "library"}
    if not ours:
        return {"failed": "no candidate works", "refused": refused}
    best = min(ours, key=lambda label: ours[label])
    return {"best": [int(size) for size in best.split("x")], "best_us": ours[best], "library_us": times["library"],
            "times_us": times, "refused": refused, "shape": [m, n, k]}  # fmt: skip


def candidates(m: int, n: int, k: int, dtype: torch.dtype) -> Iterable[tuple[int, ...]]:
    """Those that make sense for a shape: no block of twice its size or more, and shared memory that an SM has."""
    for block_m, block_n, block_k, warps, stages in CANDIDATES:
        shared = (block_m + block_n) * block_k * dtype.itemsize * stages
        fits = shared <= 200 * 1024 and block_n < 2 * n and block_k < 2 * k and (block_m == 64 or block_m < 2 * m)
        if fits and not (dtype == torch.float32 and block_k == 128):
            yield block_m, block_n, block_k, warps, stages


def library(swept: dict[str, Any], arch: int) -> list[dict[str, Any]]:
    """From which rows, and from which width, the library was faster on everything measured there; 2^30 for never."""
    out = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found = [v for key, v in swept.items() if key.endswith(f" {name}") and "best_us" in v]

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
    parser.add_argument("--compile", nargs=2, metavar=("DTYPE", "STAGES"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.compile:
        compile_some(getattr(torch, args.compile[0]), int(args.compile[1]), device)
        return
    if args.out is None or device.type != "cuda":
        parser.error("--out is missing" if args.out is None else NO_CUDA)
    context = Context(device, False, time.monotonic() + args.seconds)
    try:
        tune(context)
    except Skip as e:
        parser.error(str(e))
    args.out.write_text(json.dumps(context.data["table"], indent=1) + "\n")


if __name__ == "__main__":
    main()
