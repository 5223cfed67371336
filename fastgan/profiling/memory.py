"""Where an engine's memory goes, by its own structures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor


def categories(engine: Any, temporaries: int) -> list[dict[str, Any]]:
    """Bytes by category, each piece of memory once, under the first category that holds it.

    Args:
        engine: whose.
        temporaries: bytes at most that an iteration has allocated and freed again.
    """
    updaters = [u for u in (engine._d, engine._g) if u is not None]
    networks = [n for n in (engine.generator, engine.discriminator) if n is not None]
    arenas = [u.arena for u in updaters if u.arena is not None]
    optimizers = [u.optimizer for u in updaters if u.optimizer is not None]
    average = [engine.generator_ema] if engine.generator_ema is not None else []
    planner, executor, feed = engine._planner, engine._executor, engine._feed
    plans: list[Any] = [] if planner is None else [
        *planner._plans.values(), *planner._fakes.values(), *planner._joint.values()
    ]  # fmt: skip
    variants = executor.variants if executor is not None else []
    groups: list[tuple[str, Iterable[object]]] = [
        ("parameters", [[a.flat for a in arenas], *(_of_modules(n) for n in networks)]),
        ("gradients", [[a.grad for a in arenas], *([p.grad for p in n.parameters()] for n in networks)]),
        ("moments", [[(a.exp_avg, a.exp_avg_sq) for a in arenas], *(list(o.state.values()) for o in optimizers)]),
        ("average", [[a.average for a in arenas], *(_of_modules(n) for n in average)]),
        ("low-precision copies", [[a._low for a in arenas], list(planner._low.values()) if planner else []]),
        ("activations of plans", [_buffers(p) for p in tree_leaves(plans)]),
        ("inputs", [[v.real, v.labels, v.fake] for v in variants]),
        ("data set", [] if feed is None else [feed._data, feed._labels]),
    ]
    seen: set[int] = set()
    found = [{"category": name, "bytes": _bytes(tensors, seen)} for name, tensors in groups]
    found.append({"category": "temporaries", "bytes": temporaries})
    if engine.device.type == "cuda":
        found.append({"category": "graph pools", "bytes": _graph_pools()})
    return [row for row in found if row["bytes"]]


def _of_modules(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _buffers(plan: Any) -> list[Tensor]:
    """Of a plan; none of the reason why there is no plan."""
    return [*getattr(plan, "buffers", ()), *getattr(plan, "inputs", {}).values()]


def _bytes(tree: object, seen: set[int]) -> int:
    total = 0
    for t in tree_leaves(tree):
        if isinstance(t, Tensor) and (at := t.untyped_storage().data_ptr()) not in seen:
            seen.add(at)
            total += t.untyped_storage().nbytes()
    return total


def _graph_pools() -> int:
    """Bytes of the allocator's segments that belong to a graph's private pool."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0))
