"""Code people train GANs with today, beside the engine: the same networks, losses, optimisers and batches.

A peer prepares two sides, its own way and the engine's. They first make one update in fp64 from the same weights and
noise, and are timed only where they agree. What is missing on a machine (a package, a data set) skips a peer with its
reason. ``python -m bench.peers`` runs them.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgan.benchmark.timing import block, quantiles, ratio
from fastgan.errors import InputError

LIMIT = 1e-9  # of the difference in fp64 after one update; a step of Adam is 1e-4 and more
Run = Callable[[int], float]  # makes that many iterations and gives the seconds of one


class Skip(Exception):
    """Why a peer is not measured here."""


@dataclass(frozen=True)
class Sides:
    """Two ways to make the same iterations.

    Attributes:
        peer: the peer's.
        fastgan: the engine's.
        error: largest difference of a parameter between them, after one update in fp64.
        images: samples of an iteration.
        iterations: of a block, which is timed as one.
        more: other ways, by name.
        notes: conditions of this comparison; a side may add to them.
    """

    peer: Run
    fastgan: Run
    error: float
    images: int
    iterations: int
    more: Mapping[str, Run] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """What people use.

    Attributes:
        name: of the row.
        about: what is timed, in one line.
        compared: what is part of the comparison, and what is not.
        prepare: ``(device, tiny) -> Sides``, or raises :class:`Skip`; ``tiny``: sizes that only show that it runs.
    """

    name: str
    about: str
    compared: str
    prepare: Callable[[torch.device, bool], Sides]


def stepping(step: Callable[[], object], device: torch.device) -> Run:
    """A side that calls ``step`` for each iteration."""
    return lambda iterations: block(step, iterations, device)


def difference(*pairs: tuple[nn.Module, nn.Module]) -> float:
    """Largest difference between the parameters of two networks of the same shape, over all pairs."""
    found = [
        (p.detach() - q.detach()).abs().max()
        for a, b in pairs
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    ]
    return float(torch.stack(found).max())


def measure(peer: Peer, device: torch.device, rounds: int, tiny: bool = False) -> dict[str, Any]:
    """Check and time a peer.

    Returns:
        ``status`` (``ok``, ``wrong``, ``skipped``, ``failed``), ``reason``, ``about``, ``compared``; where it was
        checked ``error`` and ``error_limit``; where it is ``ok`` ``images_per_iteration``, ``sides`` with their
        times in microseconds per iteration, ``peer_over_fastgan`` with ``noise``, and ``notes``. The noise is that of
        the ratio over the rounds, or how far the peer's second run of every round lies from its first, if that is more.
    """
    said: dict[str, Any] = {"status": "ok", "reason": None, "about": peer.about, "compared": peer.compared}
    try:
        sides = peer.prepare(device, tiny)
        said |= {"error": sides.error, "error_limit": LIMIT}
        if not sides.error <= LIMIT:
            reason = f"parameters differ by {sides.error:.2g} after one update in fp64, expected at most {LIMIT:g}"
            return said | {"status": "wrong", "reason": reason}
        return said | timed(peer.name, sides, rounds)
    except Skip as e:
        return said | {"status": "skipped", "reason": str(e)}
    except Exception as e:  # one of several: the others are wanted all the same
        traceback.print_exc()
        return said | {"status": "failed", "reason": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}


def timed(name: str, sides: Sides, rounds: int) -> dict[str, Any]:
    """Blocks of iterations, the sides in turn."""
    again = f"{name} again"
    runs = {name: sides.peer, "fastgan": sides.fastgan, **sides.more, again: sides.peer}
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(1 + rounds):
        for key, run in runs.items():
            times[key].append(run(sides.iterations) * 1e6)
    times = {key: found[1:] for key, found in times.items()}  # without the warm-up
    kimg = 1e-3 * sides.images
    table = {
        key: {**quantiles(t), "seconds_per_kimg": quantiles(t)["median_us"] * 1e-6 / kimg} for key, t in times.items()
    }
    whole, noise = ratio(times[name], times["fastgan"])
    same, _ = ratio(times[again], times[name])
    return {
        "images_per_iteration": sides.images,
        "iterations_per_block": sides.iterations,
        "peer_over_fastgan": whole,
        "noise": max(noise, abs(same - 1)),
        "sides": table,
        "notes": sides.notes,
    }


def write(out: Path, result: Mapping[str, Any]) -> None:
    """The result as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as e:
        raise InputError(f"--out: cannot write {str(out)!r}: {e.strerror}") from e


def line(name: str, said: Mapping[str, Any]) -> str:
    """A peer's row of the table."""
    if said["status"] != "ok":
        return f"{name:12} {said['status']}: {said['reason']}"
    rows = [
        f"{key if i else name:26} {t['median_us']:10.0f} us {t['p20_us']:10.0f} … {t['p80_us']:<10.0f}"
        for i, (key, t) in enumerate(said["sides"].items())
    ]
    rows[0] += f" {said['peer_over_fastgan']:.2f} ± {said['noise']:.0%} x fastgan"
    return "\n  ".join(rows)


def run(
    peers: Mapping[str, Peer], device: torch.device, rounds: int, say: Callable[[str], object], tiny: bool = False
) -> dict[str, dict[str, Any]]:
    """All of them, one after the other; ``say`` gets a line of progress for each."""
    found = {}
    for name, peer in peers.items():
        begin = time.monotonic()
        found[name] = measure(peer, device, rounds, tiny)
        say(f"{name}: {found[name]['status']} after {time.monotonic() - begin:.0f} s")
    return found
