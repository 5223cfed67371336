"""The rows of the speed targets: updates of the vanilla pair in all ways, their kernels, their drift, their memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastgan
from bench import bench_memory
from bench.sections import Context, Skip
from fastgan.benchmark.by_hand import Unable
from fastgan.benchmark.check import distance
from fastgan.benchmark.measure import Measurement, Settings, compared_with, last_line
from fastgan.benchmark.timing import wait
from fastgan.benchmark.variants import VARIANTS, Make, Way, by_engine, plain_engine
from fastgan.benchmark.workloads import WORKLOADS, Arguments, Case, Workload
from fastgan.machine import conditions

MAIN = "vanilla-mlp", "wgan-gp-critic"  # measured at every batch size
KINDS = (*MAIN, "wgan-gp-mlp")
PRECISIONS = ("fp32", "bf16")


def natively(case: Case, executor: str, calls: int = 1) -> Way:
    """The engine on Triton kernels, where they are compiled."""
    if case.device.type != "cuda":
        raise Unable("kernels are timed on a GPU: the speed of Triton's interpreter says nothing")
    return by_engine(case, executor=executor, backend="triton", calls=calls)


ENGINE: dict[str, Make] = {
    "fastgan autograd": plain_engine,
    "fastgan reference": partial(by_engine, backend="reference", executor="eager"),
    "fastgan reference graph": partial(by_engine, backend="reference", executor="graph"),
    "fastgan kernels": partial(natively, executor="eager"),
    "fastgan graph": partial(natively, executor="graph"),
    "fastgan graph, 20 a call": partial(natively, executor="graph", calls=20),
    "fastgan dependent": partial(natively, executor="dependent"),
    "fastgan persistent": partial(natively, executor="persistent"),
}
BY_HAND: dict[str, Make] = {name: VARIANTS[name] for name in ("eager", "eager again", "eager + AMP", "CUDA graph")}
COMPILED: dict[str, Make] = {name: VARIANTS[name] for name in ("compiled", "compiled + traced")}


def small() -> Arguments:
    """A pair that only shows that everything runs."""
    g = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh())
    d = nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    return {"generator": g, "discriminator": d, "latent": 5}


def shrunk(workload: Workload) -> Workload:
    """The workload on the small pair."""

    def arguments() -> Arguments:
        given = workload.arguments()
        alone = {"generator": None, "sample_shape": (12,)} if given["generator"] is None else {}
        return given | small() | alone

    return replace(workload, arguments=arguments)


def batches(context: Context) -> tuple[int, ...]:
    return (4,) if context.tiny else (64, 256, 1024)


def case(context: Context, name: str, batch: int, precision: str) -> Case:
    workload = WORKLOADS[name]
    return Case(shrunk(workload) if context.tiny else workload, batch, context.device, precision)


# ---- compilation


def compilation(context: Context) -> None:
    """Fill Triton's cache with what the engine's rows need: a process for each batch, precision and executor."""
    jobs = [
        (str(batch), precision, label)
        for label in ("fastgan graph", "fastgan dependent", "fastgan persistent")
        for precision in PRECISIONS
        for batch in batches(context)
    ]
    workers = max(2, len(os.sched_getaffinity(0)) - 1)
    with ThreadPoolExecutor(workers) as pool:
        for job, said in zip(jobs, pool.map(partial(_compiled, context), jobs), strict=True):
            context.put(", ".join(job), said)


def _compiled(context: Context, job: Sequence[str]) -> dict[str, Any]:
    begin = time.monotonic()
    command = [sys.executable, "-m", "bench.rows", *job]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=max(1.0, context.left()))
        said = f"exit code {run.returncode}"
    except subprocess.TimeoutExpired:
        said = "out of time: the rest is compiled where it is needed"
    return {"said": said, "seconds": round(time.monotonic() - begin, 1)}


def compile_one(batch: int, precision: str, label: str) -> None:
    """Run a way once in every kind of update."""
    device = torch.device("cuda", 0)
    context = Context(device, False, float("inf"))
    for name in KINDS if batch == batches(context)[0] else MAIN:
        try:
            of = case(context, name, batch, precision)
            for one in (of, of.without_penalties()):
                ENGINE[label](one).run()
        except Exception as e:  # the rows say why a way does not work
            print(f"{name}: {last_line(e)}", flush=True)
    wait(device)


# ---- time


def rows(context: Context) -> None:
    """Every way that takes no compiler, by batch, precision and kind of update."""
    for batch in batches(context):
        for precision in PRECISIONS:
            for name in KINDS if batch == batches(context)[0] else MAIN:
                key = f"{name}, batch {batch}, {precision}"
                if context.left() < 15:
                    context.put(key, {"skipped": "out of time"})
                    continue
                context.part(key, partial(measured, context, case(context, name, batch, precision), BY_HAND | ENGINE))


def compiled(context: Context) -> None:
    """torch.compile's forms beside the fastest of the others, what matters most first."""
    beside = ("fastgan graph", "fastgan dependent", "fastgan persistent", "fastgan reference graph")
    others = {"CUDA graph": BY_HAND["CUDA graph"]} | {label: ENGINE[label] for label in beside}
    for batch in batches(context):
        for precision in PRECISIONS:
            for name in reversed(MAIN):
                for label, form in COMPILED.items():
                    key = f"{name}, batch {batch}, {precision}, {label}"
                    if context.left() < 60:
                        context.put(key, {"skipped": "out of time"})
                        continue
                    torch._dynamo.reset()
                    of = case(context, name, batch, precision)
                    context.part(key, partial(measured, context, of, others | {label: form}))


def measured(context: Context, of: Case, ways: Mapping[str, Make]) -> dict[str, Any]:
    """A result of ``fastgan bench``, beside the machine's state; ``failed`` where a way of the engine is not right."""
    settings = Settings(3 if context.tiny else 30, max(2.0, min(6.0, context.left() / 4)), ways, energy_s=0.0)
    measurement = Measurement(of, settings)
    found = measurement.run() | {"ceilings": measurement.limits, "conditions": conditions(of.device)}
    compared_with(measurement.limits, found["variants"].values())
    bad = [
        f"{label}: {row['reason']}"
        for label, row in found["variants"].items()
        if label.startswith("fastgan") and row["status"] in ("wrong", "failed")
    ]
    return found | ({"failed": "; ".join(bad)} if bad else {})


# ---- launches


def kernels(context: Context) -> None:
    """Kernels, copies and fills of one update by way, counted by the profiler and, of a graph, by the driver."""
    ways = BY_HAND | ENGINE
    ways = {label: make for label, make in ways.items() if not label.endswith(("again", "a call"))}
    for name in KINDS:
        of = case(context, name, batches(context)[0], "bf16")
        for label, make in ways.items():
            context.part(f"{name}, {label}", partial(counted, of, make))


def made(of: Case, make: Make) -> Way:
    """One way, or a skip that says why there is none."""
    try:
        return make(of)
    except (fastgan.InputError, Unable) as e:
        raise Skip(str(e)) from e


def warm(of: Case, make: Make) -> Way:
    """The same, run a few times."""
    way = made(of, make)
    for _ in range(3):
        way.run()
    return way


def counted(of: Case, make: Make) -> dict[str, Any]:
    way = warm(of, make)
    found: dict[str, Any] = {"by profiler": profiled(way.run, of.device)}
    if way.graph is not None:
        found["by driver"] = graph_nodes(way.graph)
    return found


def profiled(run: Callable[[], object], device: torch.device, calls: int = 4) -> dict[str, Any]:
    """Per call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for _ in range(calls):
            run()
        wait(device)
    names = [e.name for e in prof.events() if e.device_type == DeviceType.CUDA]
    copies = sum(name.startswith("Memcpy") for name in names)
    fills = sum(name.startswith("Memset") for name in names)
    most: dict[str, int] = {}
    for name in names:
        most[name[:60]] = most.get(name[:60], 0) + 1
    return {"kernels": (len(names) - copies - fills) / calls, "copies": copies / calls, "fills": fills / calls,
            "names": {k: v / calls for k, v in sorted(most.items(), key=lambda kv: -kv[1])[:40]}}  # fmt: skip


def graph_nodes(graph: Any) -> Any:
    """By kind; of the engine's recording or of a graph by hand."""
    from fastgan import driver

    try:
        return graph.nodes() if hasattr(graph, "nodes") else driver.nodes(graph)
    except RuntimeError as e:
        return {"skipped": str(e)}


# ---- drift


def drift(context: Context) -> None:
    """Each executor against eager launches of the same backend, over many iterations of the same noise."""
    steps = 20 if context.tiny else 10_000
    pairs = {
        "kernels graph": ("fastgan graph", "fastgan kernels"),
        "kernels dependent": ("fastgan dependent", "fastgan kernels"),
        "kernels persistent": ("fastgan persistent", "fastgan kernels"),
        "reference graph": ("fastgan reference graph", "fastgan reference"),
        "twice the same": ("fastgan reference", "fastgan reference"),
    }
    for name, (a, b) in pairs.items():
        if context.left() < 10:
            context.put(name, {"skipped": "out of time"})
            continue
        count = max(1, steps // 10) if a == b else steps
        context.part(name, partial(apart, context, ENGINE[a], ENGINE[b], count))


def apart(context: Context, a: Make, b: Make, steps: int) -> dict[str, Any]:
    """Distance of all parameters after so many iterations, at powers of ten."""
    of = case(context, "wgan-gp-mlp", batches(context)[0], "fp32")
    ways = [made(of, make) for make in (a, b)]
    start = [p.detach().clone() for net in ways[0].networks for p in net.parameters()]
    found: dict[str, Any] = {"steps": 0}
    at = 1
    for step in range(1, steps + 1):
        for way in ways:
            way.run()
        if step in (at, steps):
            at *= 10 if step == at else 1
            x, y = ([p for net in way.networks for p in net.parameters()] for way in ways)
            equal = all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
            most = max(float((p - q).detach().abs().max()) for p, q in zip(x, y, strict=True))
            found[f"after {step}"] = {"equal_bits": equal, "largest": most, "way_off": distance(x, y, start)}
            found["steps"] = step
            if context.left() < 5:
                found["ended early"] = "out of time"
                break
    finite = all(bool(p.isfinite().all()) for p in x + y)
    return found | {"finite": finite}


# ---- memory


def memory(context: Context) -> None:
    """Peak of a critic update of 784-1024-1024-1024-1 at batch 4096 by way, networks and optimiser included."""
    ways = BY_HAND | ENGINE
    ways = {label: make for label, make in ways.items() if not label.endswith(("again", "a call"))}
    for precision in PRECISIONS:
        for label, make in ways.items():
            context.part(f"{label}, {precision}", partial(peak, context, make, precision))


def peak(context: Context, make: Make, precision: str) -> dict[str, float]:
    """Bytes by torch's allocator: the most that lives in three updates, less the batch."""

    def arguments() -> Arguments:
        _, d = bench_memory.networks()
        return WORKLOADS["wgan-gp-critic"].arguments() | {"discriminator": d}

    of = Case(Workload("wide critic", "", arguments), bench_memory.BATCH, context.device, precision)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _way = warm(of, make)  # held while memory is read
    wait(context.device)
    held = torch.cuda.max_memory_allocated() - before
    return {"peak_bytes": held, "in_layers": held / bench_memory.UNIT, "reserved_bytes": torch.cuda.memory_reserved()}


if __name__ == "__main__":
    compile_one(int(sys.argv[1]), *sys.argv[2:])
