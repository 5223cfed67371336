"""The rows of the speed targets: updates of the vanilla pair in all ways, their kernels, their drift, their memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from bench import bench_memory, machine, rivals
from bench.bench_closed_form import PLAIN, WGAN_GP, Kind, Networks, Work, gflop, vanilla
from bench.conditions import conditions
from bench.rivals import Setting, Way
from bench.sections import Context, Skip
from bench.timing import BLOCK_S, interleaved, wait

WGAN = dataclasses.replace(WGAN_GP, autograd=PLAIN.autograd, closed=PLAIN.closed)  # no penalty: other products
KINDS: dict[str, tuple[Kind, float, bool]] = {  # kind, weight of the penalty, whether the generator is updated too
    "vanilla iteration": (PLAIN, 0.0, True),
    "wgan-gp critic": (WGAN_GP, 10.0, False),
    "wgan critic": (WGAN, 0.0, False),
    "wgan-gp iteration": (WGAN_GP, 10.0, True),
}
OVERHEAD = "wgan-gp critic", "wgan critic"  # with the penalty, and without
PRECISIONS = ("fp32", "bf16")
ADAM_BYTES = 32  # per parameter: value, gradient and two moments, read and written in fp32


def small() -> Networks:
    g = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh())
    d = nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    return g, d, 5, (12,)


def batches(context: Context) -> tuple[int, ...]:
    return (4,) if context.tiny else (64, 256, 1024)


def work_of(context: Context, name: str, batch: int) -> Work:
    kind, weight, whole = KINDS[name]
    return Work(small if context.tiny else vanilla, kind, weight, batch, whole=whole)


# ---- time


def rows(context: Context) -> None:
    """Every way that takes no compiler, by batch and precision; all kinds of update in turn."""
    ways = rivals.hand_written(context.device) | rivals.ENGINE
    for batch in batches(context):
        for precision in PRECISIONS:
            if context.left() < 15:
                raise Skip("out of time")
            context.part(f"batch {batch}, {precision}", partial(measured, context, batch, precision, KINDS, ways))


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
    for name in kinds:
        s = Setting.of(work_of(context, name, batch), context.device, precision)
        kept: dict[str, Way] = {}
        table[name] = rivals.prepared(s, ways, kept)
        runs |= {(name, label): way for label, way in kept.items()}
    rounds = 3 if context.tiny else 30
    table["conditions"] = {
        "batch": batch, "precision": precision, "real rows": "fixed, on the device", "noise": "fresh in every update",
        "timing": f"up to {rounds} rounds, ways in turn, blocks of at least {BLOCK_S * 1e3:g} ms between two waits",
        "machine": machine.state(context.device) if context.device.type == "cuda" else conditions(),
    }  # fmt: skip
    deadline = time.monotonic() + max(5.0, min(25.0, context.left() / 2))
    with s.products():
        timed = interleaved(
            {"\n".join(key): way.run for key, way in runs.items()}, context.device, rounds, deadline
        )  # fmt: skip
    for name, label in runs:
        row = table[name][label]
        row |= timed["\n".join((name, label))]
        row |= limits(context, work_of(context, name, batch), precision, label, row["median_us"])
    for name in kinds:
        for label, row in table[name].items():
            row |= ratios(table[name], label, row) if "median_us" in row else {}
            other = table.get(OVERHEAD[1], {}).get(label, {})
            if name == OVERHEAD[0] and "median_us" in row and "median_us" in other:
                row["penalty_overhead"] = row["median_us"] / other["median_us"]
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


def limits(context: Context, work: Work, precision: str, label: str, time_us: float) -> dict[str, float]:
    """Operations and bytes of the update, and the share of the time that the machine's measured limits account for.

    Bytes are those of the optimiser alone, the least that an update moves; they may come from the cache.
    """
    closed = label.startswith("engine") and label != "engine autograd"
    n_gflop = gflop(work)["closed form" if closed else "autograd"]
    g, d, *_ = work.networks()
    trained = (g, d) if work.whole else (d,)
    n_bytes = ADAM_BYTES * sum(p.numel() for net in trained for p in net.parameters())
    out: dict[str, float] = {"gflop": n_gflop, "bytes": n_bytes, "tflop_per_s": n_gflop / time_us / 1e-3 / 1e3}
    found = context.of("ceilings")
    rate = found.get(f"matrix {precision}", {}).get("tflop_per_s")
    bandwidth = found.get("copy l2", {}).get("gb_per_s")
    if rate and bandwidth:
        out["share_of_matrix_rate"] = out["tflop_per_s"] / rate
        out["limit_us"] = n_gflop / rate * 1e3 + n_bytes / bandwidth / 1e3
        out["share_of_limit"] = out["limit_us"] / time_us
    return out


# ---- launches


def kernels(context: Context) -> None:
    """Kernels, copies and fills of one update by way, counted by the profiler and, of a graph, by the driver."""
    ways = rivals.hand_written(context.device) | rivals.ENGINE
    ways.pop("eager again"), ways.pop("eager graph again")
    for name in ("vanilla iteration", "wgan-gp critic", "wgan-gp iteration"):
        s = Setting.of(work_of(context, name, batches(context)[0]), context.device, "bf16")
        for label, make in ways.items():
            context.part(f"{name}, {label}", partial(counted, s, make))


def counted(s: Setting, make: Callable[[Setting], Way]) -> dict[str, Any]:
    import fastgan

    try:
        way = make(s)
    except fastgan.InputError as e:
        raise Skip(str(e)) from e
    for _ in range(3):
        way.run()
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
    try:
        from fastgan.driver import nodes
    except ImportError:
        return {"skipped": "this fastgan does not ask the driver"}
    try:
        return nodes(graph)
    except Exception as e:  # no handle of a graph that was not kept, or no native extension
        return {"skipped": f"{type(e).__name__}: {e}"}


# ---- drift


def drift(context: Context) -> None:
    """Each executor against eager launches of the same backend, over many iterations of the same noise."""
    steps = 20 if context.tiny else 10_000
    pairs = {
        "reference graph": ("engine reference graph", "engine reference"),
        "kernels graph": ("engine graph", "engine kernels"),
        "kernels dependent": ("engine dependent", "engine kernels"),
        "kernels persistent": ("engine persistent", "engine kernels"),
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
    import fastgan

    s = Setting.of(work_of(context, "wgan-gp iteration", batches(context)[0]), context.device, "fp32")
    try:
        ways = [make(s) for make in (a, b)]
    except fastgan.InputError as e:
        raise Skip(str(e)) from e
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
    """Peak of a critic update of 784-1024-1024-1024-1 at batch 4096 by way, beyond networks and batch."""
    ways = rivals.hand_written(context.device) | rivals.ENGINE
    ways.pop("eager again"), ways.pop("eager graph again")
    for precision in PRECISIONS:
        for label, make in ways.items():
            context.part(f"{label}, {precision}", partial(peak, context, make, precision))


def peak(context: Context, make: Callable[[Setting], Way], precision: str) -> dict[str, float]:
    """Bytes by torch's allocator: the most that lives, less what lived once networks and batch were there."""
    import fastgan

    def networks() -> Networks:
        g, d = bench_memory.networks()
        return g, d, bench_memory.LATENT, (784,)

    s = Setting.of(Work(networks, WGAN_GP, 10.0, bench_memory.BATCH), context.device, precision)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        way = make(s)
    except fastgan.InputError as e:
        raise Skip(str(e)) from e
    for _ in range(3):
        way.run()
    wait(context.device)
    held = torch.cuda.max_memory_allocated() - before
    return {"peak_bytes": held, "in_layers": held / bench_memory.UNIT, "reserved_bytes": torch.cuda.memory_reserved()}
