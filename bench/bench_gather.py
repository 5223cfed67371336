"""The native gather against numpy: 50,000 images of 3x32x32, a random batch, half of it mirrored.

python -m bench.bench_gather          interleaved, medians with p20 and p80; writes bench/results/cpu/gather.json
pytest bench/bench_gather.py          each alone

``expression`` is what people write. ``in place`` is the fastest numpy form found: its arrays are made once, only the
mirrored rows are reversed, product and difference are written in place. The native gather writes into an array made
once too, as a feed's does. Every variant gives the same values to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from bench.conditions import conditions, write
from bench.timer import after_warm_up, timed
from fastgan._native import ext

IMAGES, SHAPE, ROUNDS = 50_000, (3, 32, 32), 300
SCALE, OFFSET = np.float32(2 / 255), np.float32(-1)
Variant = Callable[[npt.NDArray[np.int64], npt.NDArray[np.bool_]], npt.NDArray[np.float32]]


def variants(x: npt.NDArray[np.uint8], batch: int) -> dict[str, Variant]:
    rows = x.reshape(len(x), -1)
    small, out = np.empty((batch, *SHAPE), np.uint8), np.empty((batch, *SHAPE), np.float32)

    def expression(index, flip):
        return np.where(flip[:, None, None, None], x[index][..., ::-1], x[index]).astype(np.float32) * SCALE + OFFSET

    def in_place(index, flip):
        np.take(x, index, axis=0, out=small, mode="clip")
        small[flip] = small[flip][..., ::-1]
        np.multiply(small, SCALE, out=out, dtype=np.float32)
        return np.add(out, OFFSET, out=out)

    def native(threads):
        def run(index, flip):
            ext.gather(rows, index, flip, out.reshape(batch, -1), SHAPE[-1], SCALE, OFFSET, threads)
            return out

        return run

    return {
        "numpy expression": expression,
        "numpy in place": in_place,
        "native, 1 thread": native(1),
        "native, 2 threads": native(2),
    }


def images() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE), dtype=np.uint8)


@timed
@pytest.mark.parametrize("name", list(variants(np.empty((1, *SHAPE), np.uint8), 1)))
def test_gather(benchmark, name: str) -> None:
    rng = np.random.default_rng(1)
    run = variants(images(), 256)[name]
    benchmark.group = "gather"
    after_warm_up(benchmark, partial(run, rng.integers(0, IMAGES, 256), rng.random(256) < 0.5))


def measure(x: npt.NDArray[np.uint8], batch: int) -> dict[str, dict[str, float]]:
    """Microseconds per call, the variants taking turns, each on rows of its own: none finds them in the cache."""
    rng = np.random.default_rng(batch)
    runs = variants(x, batch)
    index, flip = rng.integers(0, IMAGES, batch), rng.random(batch) < 0.5
    expected = runs["numpy expression"](index, flip)
    for run in runs.values():
        np.testing.assert_array_equal(run(index, flip), expected)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            index, flip = rng.integers(0, IMAGES, batch), rng.random(batch) < 0.5
            begin = time.perf_counter()
            run(index, flip)
            times[name].append((time.perf_counter() - begin) * 1e6)
    quantiles = {name: np.percentile(t[10:], (20, 50, 80)) for name, t in times.items()}
    return {name: {"p20_us": a, "median_us": b, "p80_us": c} for name, (a, b, c) in quantiles.items()}


def main() -> None:
    said = conditions(
        data=f"{IMAGES} x {SHAPE} uint8, uniform random",
        timing=f"{ROUNDS} rounds, variants interleaved, a fresh random batch for each call, half mirrored",
    )
    x = images()
    results = {}
    for batch in (64, 256, 1280):
        table = measure(x, batch)
        best = table["native, 2 threads"]["median_us"]
        results[str(batch)] = {
            "bytes_read": batch * 3072,
            "bytes_written": batch * 3072 * 4,
            "variants": table,
            "expression_over_native": table["numpy expression"]["median_us"] / best,
            "in_place_over_native": table["numpy in place"]["median_us"] / best,
        }
        print(f"batch {batch}")
        for name, t in table.items():
            spread = f"{t['p20_us']:8.0f} … {t['p80_us']:.0f}"
            print(f"  {name:18} {t['median_us']:8.0f} us {spread:18} {t['median_us'] / best:6.2f} x native, 2 threads")
    print(f"written to {write('gather', {'conditions': said, 'batch': results})}")


if __name__ == "__main__":
    main()
