"""Peak memory of one WGAN-GP critic update, 784-1024-1024-1024-1 at batch 4096, on a CPU in fp32.

python -m bench.bench_memory          each in processes of its own; writes bench/results/cpu/memory.json

What counts is all that an update needs beyond an idle process that has built the networks and the batch and made an
update of eight rows: the third update's peak, with what is kept between updates. It is read twice: as resident memory
of the process (tensors come and go through mmap, so that freed ones leave at once; every library's buffers are in it),
and as live tensors by torch's allocator (the profiler's record of every allocation).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fastgan
from bench.conditions import conditions, write
from fastgan.penalties import GradientPenalty

BATCH, WIDTH, LATENT, WARMUP_ROWS = 4096, 1024, 100, 8
UNIT = BATCH * WIDTH * 4  # one hidden layer's activations
TARGET = 0.6
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
WAYS = ("eager", "engine, autograd", "engine")


def networks() -> tuple[nn.Module, nn.Module]:
    g = nn.Sequential(
        nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784), nn.Tanh()
    )  # fmt: skip
    d = nn.Sequential(
        nn.Linear(784, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 1),
    )  # fmt: skip
    return g, d


def updater(way: str) -> Callable[[torch.Tensor], None]:
    """One critic update on the real rows it is given."""
    torch.manual_seed(0)
    g, d = networks()
    if way != "eager":
        adam = fastgan.Adam(1e-4, (0.0, 0.9))
        return fastgan.Engine(
            g, d, LATENT, "wasserstein", (GradientPenalty(10.0),), g_optimizer=adam, d_optimizer=adam, ema=None,
            precision="fp32", device="cpu", closed_form=way == "engine",
        ).d_step  # fmt: skip
    optimizer = torch.optim.Adam(d.parameters(), 1e-4, (0.0, 0.9))

    def update(real: torch.Tensor) -> None:
        fake = g(torch.randn(len(real), LATENT)).detach()
        optimizer.zero_grad()
        r, f = d(real), d(fake)
        alpha = torch.rand(len(real), 1)
        x = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        (s,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        (f.mean() - r.mean() + 10 * ((s.norm(dim=1) - 1) ** 2).mean()).backward()
        optimizer.step()

    return update


def resident(key: str) -> int:
    """Bytes: ``VmRSS`` now, or ``VmHWM`` at its highest since :func:`forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS


def ready(way: str) -> tuple[Callable[[torch.Tensor], None], torch.Tensor]:
    """The update and the batch, after an update of a few rows."""
    update, real = updater(way), torch.rand(BATCH, 784) * 2 - 1
    update(real[:WARMUP_ROWS])
    return update, real


def by_process(way: str) -> int:
    update, real = ready(way)
    idle = resident("VmRSS")
    for _ in range(2):
        update(real)
    forget()
    update(real)
    return resident("VmHWM") - idle


def by_allocator(way: str) -> int:
    """From the profiler's trace, whose ``[memory]`` events carry the bytes that are live after each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        update, real = ready(way)
        for name in ("first", "second", "third"):
            with torch.profiler.record_function(f"{name} update"):
                update(real)
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    first, third = (next(e["ts"] for e in events if e["name"] == f"{name} update") for name in ("first", "third"))
    live = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e["name"] == "[memory]")
    idle = [size for at, size in live if at < first][-1]
    return max(size for at, size in live if at >= third) - idle


MEASURES = {"resident": by_process, "allocated": by_allocator}


def measured(way: str, measure: str) -> int:
    """Bytes, from a process of its own."""
    command = [sys.executable, "-m", "bench.bench_memory", "--child", way, measure]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    if run.returncode:
        raise SystemExit(run.stderr)
    return int(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MEASURE"), help="measure in this process")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.child:
        way, measure = args.child
        print(MEASURES[measure](way))
        return
    said = conditions(critic=f"784-{WIDTH}-{WIDTH}-{WIDTH}-1", batch=BATCH, environment=ENVIRONMENT, unit_bytes=UNIT)
    table: dict[str, dict[str, int]] = {}
    print(f"peak of a critic update, in units of one hidden layer's activations ({UNIT / 1e6:.1f} MB)")
    for way in WAYS:
        table[way] = {f"{measure}_bytes": measured(way, measure) for measure in MEASURES}
        print(f"  {way:16} " + ", ".join(f"{k[:-6]} {v / UNIT:.2f}" for k, v in table[way].items()), flush=True)
    ratios = {
        f"engine over {way}": {k[:-6]: table["engine"][k] / table[way][k] for k in table[way]} for way in WAYS[:2]
    }
    for name, ratio in ratios.items():
        print(f"  {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratio.items()))
    reached = max(ratios["engine over engine, autograd"].values()) <= TARGET
    print(f"  at most {TARGET} of autograd's: {'reached' if reached else 'missed'}")
    print(f"written to {write('memory', {'conditions': said, 'target': TARGET, 'ways': table, 'ratios': ratios})}")


if __name__ == "__main__":
    main()
