"""The rows of the speed targets: updates of the vanilla pair in all ways, their kernels, their drift, their memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import bench_memory, rivals
from bench.bench_closed_form import PLAIN, WGAN_GP, Kind, Networks, Work, gflop, multiply_adds, vanilla
from bench.rivals import Setting, Way
from bench.sections import Context, Skip, last_line
from fastgan.benchmark.timing import BLOCK_S, interleaved, wait
from fastgan.machine import conditions

WGAN = dataclasses.replace(WGAN_GP, autograd=PLAIN.autograd, closed=PLAIN.closed)  # no penalty: other products


@dataclasses.dataclass(frozen=True)
class Update:
    """What is timed: a whole iteration, or an update of the critic on given fakes."""

    kind: Kind
    weight: float  # of the penalty
    whole: bool = False
    n_critic: int = 1


KINDS = {
    "vanilla iteration": Update(PLAIN, 0.0, whole=True),
    "wgan-gp critic": Update(WGAN_GP, 10.0),
    "wgan critic": Update(WGAN, 0.0),
    "wgan-gp iteration": Update(WGAN_GP, 10.0, whole=True),
    "wgan-gp iteration, n_critic 5": Update(WGAN_GP, 10.0, whole=True, n_critic=5),
}
MAIN = "vanilla iteration", "wgan-gp critic", "wgan critic"  # measured at every batch size
OVERHEAD = "wgan-gp critic", "wgan critic"  # with the penalty, and without
CRITICS = "wgan-gp iteration, n_critic 5", "wgan-gp iteration"  # differ by four updates of the critic with their fakes
PRECISIONS = ("fp32", "bf16")
ADAM_BYTES = 32  # per parameter: value, gradient and two moments, read and written in fp32


def small() -> Networks:
    g = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh())
    d = nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    return g, d, 5, (12,)


def batches(context: Context) -> tuple[int, ...]:
    return (4,) if context.tiny else (64, 256, 1024)


def setting(context: Context, name: str, batch: int, precision: str) -> Setting:
    update = KINDS[name]
    networks = small if context.tiny else vanilla
    work = Work(networks, update.kind, update.weight, batch, whole=update.whole)
    return Setting.of(work, context.device, precision, update.n_critic)


# ---- compilation


def compilation(context: Context) -> None:
    """Fill Triton's cache with what the engine's rows need: a process for each batch, precision and executor."""
    jobs = [
        (str(batch), precision, label)
        for label in ("engine graph", "engine dependent", "engine persistent")
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
            rivals.ENGINE[label](setting(context, name, batch, precision)).run()
        except Exception as e:  # the rows say why a way does not work
            print(f"{name}: {last_line(e)}", flush=True)
    wait(device)


# ---- time


def rows(context: Context) -> None:
    """Every way that takes no compiler, by batch and precision; all kinds of update in turn."""
    ways = rivals.hand_written(context.device) | rivals.ENGINE
    for batch in batches(context):
        for precision in PRECISIONS:
            if context.left() < 15:
                context.put("ended early", f"out of time at batch {batch}, {precision}")
                return
            kinds = [name for name in KINDS if batch == batches(context)[0] or name in MAIN]
            context.part(f"batch {batch}, {precision}", partial(measured, context, batch, precision, kinds, ways))


def compiled(context: Context) -> None:
    """torch.compile's forms beside the fastest of the others, what matters most first."""
    beside = ("eager graph", "engine graph", "engine dependent", "engine persistent", "engine reference graph")
    known = rivals.hand_written(context.device) | rivals.ENGINE
    others = {label: known[label] for label in beside if label in known}
    forms = rivals.compiled(context.device)
    for batch in batches(context):
        for precision in PRECISIONS:
            for kind in ("wgan-gp critic", "vanilla iteration"):
                for form in forms:
                    key = f"batch {batch}, {precision}, {kind}, {form}"
                    if context.left() < 60:
                        context.put(key, {"skipped": "out of time"})
                        continue
                    ways = others | {form: forms[form]}
                    torch._dynamo.reset()
                    context.part(key, partial(measured, context, batch, precision, (kind,), ways))


def measured(
    context: Context, batch: int, precision: str, kinds: Any, ways: Mapping[str, Callable[[Setting], Way]]
) -> dict[str, Any]:
    """By kind of update and way: whether it is right, its time, and what that is of the machine's limit."""
    table: dict[str, Any] = {}
    runs: dict[tuple[str, str], Way] = {}
    settings = {name: setting(context, name, batch, precision) for name in kinds}
    for name, s in settings.items():
        kept: dict[str, Way] = {}
        table[name] = rivals.prepared(s, ways, kept)
        runs |= {(name, label): way for label, way in kept.items()}
    rounds = 3 if context.tiny else 30
    table["conditions"] = {
        "batch": batch, "precision": precision,
        "samples": "real rows, and a critic's given fakes: fixed, on the device",
        "noise": "fresh in every update",
        "timing": f"up to {rounds} rounds, ways in turn, blocks of at least {BLOCK_S * 1e3:g} ms between two waits",
        "machine": conditions(context.device),
    }  # fmt: skip
    deadline = time.monotonic() + max(5.0, min(25.0, context.left() / 2))
    with s.products():
        timed = interleaved(
            {"\n".join(key): way.many or way.run for key, way in runs.items()}, context.device, rounds, deadline
        )  # fmt: skip
    for (name, label), way in runs.items():
        row, times = table[name][label], timed["\n".join((name, label))]
        row |= {k: v / way.calls if k.endswith("_us") else v for k, v in times.items()}
        row |= limits(context, settings[name], label, row["median_us"])
    for name in kinds:
        for label, row in table[name].items():
            row |= ratios(table[name], label, row) if "median_us" in row else {}
    for label, row in table.get(OVERHEAD[0], {}).items():
        other = table.get(OVERHEAD[1], {}).get(label, {})
        if "median_us" in row and "median_us" in other:
            row["penalty_overhead"] = row["median_us"] / other["median_us"]
    for label, row in table.get(CRITICS[0], {}).items():
        other = table.get(CRITICS[1], {}).get(label, {})
        if "median_us" in row and "median_us" in other:
            row["critic_with_fakes_us"] = (row["median_us"] - other["median_us"]) / 4
    bad = [
        f"{name}, {label}: {row.get('wrong') or row['failed']}"
        for name in kinds
        for label, row in table[name].items()
        if label.startswith("engine") and ("wrong" in row or "failed" in row)
    ]
    return table | ({"failed": "; ".join(bad)} if bad else {})


def ratios(table: Mapping[str, Any], label: str, row: Mapping[str, float]) -> dict[str, float]:
    """How many times as long the usual ways take; of a way that is measured twice, the noise."""
    found = {}
    once = table.get(label.removesuffix(" again"), {})
    if label.endswith(" again") and "median_us" in once:
        found["noise"] = row["median_us"] / once["median_us"]
    for usual in ("eager", "eager graph"):
        if "median_us" in table.get(usual, {}):
            found[f"{usual.replace(' ', '_')}_over_this"] = table[usual]["median_us"] / row["median_us"]
    return found


def limits(context: Context, s: Setting, label: str, time_us: float) -> dict[str, float]:
    """Operations and bytes of the update, and the share of the time that the machine's measured limits account for.

    Bytes are those of the optimiser alone, the least that an update moves; they may come from the cache.
    """
    closed = label.startswith("engine") and label != "engine autograd"
    n_gflop = operations(s)["closed form" if closed else "autograd"]
    sizes = [sum(p.numel() for p in net.parameters()) for net in (s.g, s.d)]
    n_bytes = ADAM_BYTES * (s.n_critic * sizes[1] + (sizes[0] if s.work.whole else 0))
    out: dict[str, float] = {"gflop": n_gflop, "bytes": n_bytes, "tflop_per_s": n_gflop / time_us * 1e3}
    found = context.of("ceilings")
    rate = found.get(f"matrix {s.precision}", {}).get("tflop_per_s")
    bandwidth = found.get("copy l2", {}).get("gb_per_s")
    if rate and bandwidth:
        out["share_of_matrix_rate"] = out["tflop_per_s"] / rate
        out["limit_us"] = n_gflop / rate * 1e3 + n_bytes / bandwidth / 1e3
        out["share_of_limit"] = out["limit_us"] / time_us
    return out


def operations(s: Setting) -> dict[str, float]:
    """GFLOP of the products, through autograd and in closed form."""
    alone = gflop(dataclasses.replace(s.work, whole=False))  # an update of the critic, with its fakes
    if s.work.whole:
        return {k: whole + (s.n_critic - 1) * alone[k] for k, whole in gflop(s.work).items()}
    fakes = 2 * s.work.batch * multiply_adds(s.g, torch.zeros(1, s.latent))[0] / 1e9
    return {k: v - fakes for k, v in alone.items()}


# ---- launches


def kernels(context: Context) -> None:
    """Kernels, copies and fills of one update by way, counted by the profiler and, of a graph, by the driver."""
    ways = rivals.hand_written(context.device) | rivals.ENGINE
    ways = {label: make for label, make in ways.items() if not label.endswith(("again", "a call"))}
    for name in ("vanilla iteration", "wgan-gp critic", "wgan-gp iteration"):
        s = setting(context, name, batches(context)[0], "bf16")
        for label, make in ways.items():
            context.part(f"{name}, {label}", partial(counted, s, make))


def made(s: Setting, make: Callable[[Setting], Way]) -> Way:
    """One way, or a skip that says why there is none."""
    import fastgan

    try:
        return make(s)
    except fastgan.InputError as e:
        raise Skip(str(e)) from e


def warm(s: Setting, make: Callable[[Setting], Way]) -> Way:
    """The same, run a few times."""
    way = made(s, make)
    for _ in range(3):
        way.run()
    return way


def counted(s: Setting, make: Callable[[Setting], Way]) -> dict[str, Any]:
    way = warm(s, make)
    found: dict[str, Any] = {"by profiler": profiled(way.run, s.device)}
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
        "kernels graph": ("engine graph", "engine kernels"),
        "kernels dependent": ("engine dependent", "engine kernels"),
        "kernels persistent": ("engine persistent", "engine kernels"),
        "reference graph": ("engine reference graph", "engine reference"),
        "twice the same": ("engine reference", "engine reference"),
    }
    for name, (a, b) in pairs.items():
        if context.left() < 10:
            context.put(name, {"skipped": "out of time"})
            continue
        count = max(1, steps // 10) if a == b else steps
        context.part(name, partial(apart, context, rivals.ENGINE[a], rivals.ENGINE[b], count))


def apart(context: Context, a: Callable[..., Way], b: Callable[..., Way], steps: int) -> dict[str, Any]:
    """Distance of all parameters after so many iterations, at powers of ten."""
    s = setting(context, "wgan-gp iteration", batches(context)[0], "fp32")
    ways = [made(s, make) for make in (a, b)]
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
            found[f"after {step}"] = {"equal_bits": equal, "largest": most, "way_off": rivals.distance(x, y, start)}
            found["steps"] = step
            if context.left() < 5:
                found["ended early"] = "out of time"
                break
    finite = all(bool(p.isfinite().all()) for p in x + y)
    return found | {"finite": finite}


# ---- memory


def memory(context: Context) -> None:
    """Peak of a critic update of 784-1024-1024-1024-1 at batch 4096 by way, networks and optimiser included."""
    ways = rivals.hand_written(context.device) | rivals.ENGINE
    ways = {label: make for label, make in ways.items() if not label.endswith(("again", "a call"))}
    for precision in PRECISIONS:
        for label, make in ways.items():
            context.part(f"{label}, {precision}", partial(peak, context, make, precision))


def peak(context: Context, make: Callable[[Setting], Way], precision: str) -> dict[str, float]:
    """Bytes by torch's allocator: the most that lives in three updates, less the batch."""

    def networks() -> Networks:
        g, d = bench_memory.networks()
        return g, d, bench_memory.LATENT, (784,)

    s = Setting.of(Work(networks, WGAN_GP, 10.0, bench_memory.BATCH), context.device, precision)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _way = warm(s, make)  # held while memory is read
    wait(context.device)
    held = torch.cuda.max_memory_allocated() - before
    return {"peak_bytes": held, "in_layers": held / bench_memory.UNIT, "reserved_bytes": torch.cuda.memory_reserved()}


if __name__ == "__main__":
    compile_one(int(sys.argv[1]), *sys.argv[2:])
