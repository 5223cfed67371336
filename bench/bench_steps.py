"""Where the thresholds of native passes and products come from, on a CPU, in fp32.

python -m bench.bench_steps          interleaved, medians; writes bench/results/cpu/steps.json

Thresholds: ``kGrain`` (csrc/elementwise.cpp), ``kWorth`` (csrc/product.cpp), ``_SMALLEST`` (fastgan/steps.py) and
``_NARROW`` (fastgan/rules.py). A ratio above 1 says that what the threshold chooses beyond it is the faster way.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.conditions import conditions, interleaved, write
from fastgan import steps
from fastgan.steps import Call

ROUNDS = 200


def ratio(slow: Call, fast: Call) -> float:
    """Median time of the one over that of the other."""
    table = interleaved({"slow": slow, "fast": fast}, ROUNDS)
    return table["slow"]["median_ms"] / table["fast"]["median_ms"]


def on(threads: int, make: Call, *arguments: object) -> Call:
    """A step made for that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return make(*arguments)  # type: ignore[return-value]
    finally:
        torch.set_num_threads(before)


def two_threads(n: int) -> float:
    """A pass over n numbers by one thread over the same by two."""
    x, y, m = torch.randn(3, n).unbind()
    one, two = (on(k, steps.mask_mul, x, y, m, 0.2) for k in (1, 2))
    return ratio(one, two)


def two_threads_for_a_product(side: int) -> float:
    """A square product by one thread over the same by two."""
    a, b, out = torch.randn(3, side, side).unbind()
    one, two = (on(k, steps.product, a, b, out) for k in (1, 2))
    return ratio(one, two)


def native_product(side: int) -> float:
    """torch's product of ``[256, 256]`` and ``[256, side]`` over the native one."""
    a, b, out = torch.randn(256, 256), torch.randn(256, side), torch.empty(256, side)
    return ratio(partial(torch.mm, a, b, out=out), steps.product(a, b, out))


def turned(columns: int) -> float:
    """``u W`` of ``[512, 128]`` and ``[128, columns]`` as it stands over the way through a copy of ``W^T``."""
    u, w = torch.randn(512, 128), torch.randn(128, columns)
    out, t = torch.empty(512, columns), torch.empty(columns, 128)

    def through_a_copy() -> None:
        t.copy_(w.t())
        torch.mm(u, t.t(), out=out)

    return ratio(partial(torch.mm, u, w, out=out), through_a_copy)


TABLES = {
    "two threads, elements": (two_threads, [2**k for k in range(14, 21)]),
    "two threads, side of a product": (two_threads_for_a_product, [32, 64, 96, 128, 192, 256, 512]),
    "native product, columns": (native_product, [8, 16, 32, 64, 128, 256]),
    "turned product, columns": (turned, [1, 2, 4, 8, 12, 16, 32]),
}


def main() -> None:
    said, results = conditions(timing=f"{ROUNDS} rounds, both ways in turn"), {}
    for name, (measure, sizes) in TABLES.items():
        results[name] = {size: measure(size) for size in sizes}
        print(f"{name}: " + ", ".join(f"{size}: {value:.2f}" for size, value in results[name].items()), flush=True)
    print(f"written to {write('steps', {'conditions': said, 'ratios': results})}")


if __name__ == "__main__":
    main()
