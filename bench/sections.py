"""Sections of one long measurement: each on its own, in a process of its own, written down as it goes.

A section that fails, crashes or runs out of its time leaves what it had; the next one runs. There is one file of
results, and one process at a time that writes it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgan.benchmark.measure import last_line
from fastgan.plain import as_json

NO_CUDA = "no CUDA device"


class Skip(Exception):
    """Why a section, or a part of one, is not measured here."""


@dataclass
class Context:
    """What a section is given, and where it puts what it found.

    Attributes:
        device: where to measure.
        tiny: sizes that only show that everything runs.
        deadline: ``time.monotonic()`` at which it should be done.
        data: what was put; given back to a later section by :meth:`of`.
    """

    device: torch.device
    tiny: bool
    deadline: float
    write: Callable[[dict[str, Any]], None] = lambda data: None
    read: Callable[[str], dict[str, Any]] = lambda section: {}
    data: dict[str, Any] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """Keep a part of the result, at once on the disk."""
        self.data[key] = value
        self.write(self.data)

    def of(self, section: str) -> dict[str, Any]:
        """What an earlier section put; empty where there is nothing."""
        return self.read(section)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def part(self, key: str, measure: Callable[[], Any]) -> None:
        """Put what ``measure`` gives; why it gives nothing is put instead."""
        begin = time.monotonic()
        try:
            value = measure()
        except Skip as e:
            value = {"skipped": str(e)}
        except Exception as e:  # one part of many: the others are wanted all the same
            traceback.print_exc()
            value = {"failed": last_line(e)}
        print(f"  {key}: {time.monotonic() - begin:.1f} s", flush=True)
        self.put(key, value)

    def needs_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Skip(NO_CUDA)


@dataclass(frozen=True)
class Section:
    """``run`` puts its result part by part, in at most ``seconds``; ``cuda``: nothing in it runs without a GPU."""

    run: Callable[[Context], None]
    seconds: float
    cuda: bool = False


class Results:
    """The file of results."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"
        self.log = folder / "log.txt"

    def load(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"sections": {}}

    def set(self, name: str, **changes: Any) -> None:
        """Change one section's entry; the file is whole at every moment."""
        result = self.load()
        result["sections"].setdefault(name, {}).update(changes)
        self.save(result)

    def save(self, result: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.new")
        beside.write_text(as_json(result, indent=1) + "\n")
        beside.replace(self.path)


def run_here(name: str, section: Section, results: Results, *, device: torch.device, tiny: bool, seconds: float) -> str:
    """Run one section in this process.

    Returns:
        Its status: ``ok``, ``skipped`` or ``failed``.
    """
    begin = time.monotonic()

    def done(status: str, **more: Any) -> str:
        results.set(name, status=status, seconds=round(time.monotonic() - begin, 1), **more)
        return status

    context = Context(
        device, tiny, begin + seconds, lambda data: results.set(name, data=data),
        lambda other: results.load()["sections"].get(other, {}).get("data", {}),
    )  # fmt: skip
    try:
        section.run(context)
    except Skip as e:
        return done("skipped", reason=str(e))
    except Exception as e:
        traceback.print_exc()
        return done("failed", reason=last_line(e))
    wrong = sorted(failures(context.data))
    return done("failed", reason=f"failed: {', '.join(wrong)}"[:400]) if wrong else done("ok")


def failures(data: Mapping[str, Any]) -> list[str]:
    return [key for key, value in data.items() if isinstance(value, Mapping) and value.get("failed")]


def run_apart(name: str, command: Sequence[str], results: Results, seconds: float) -> str:
    """Run one section in a process of its own, which writes the results; ended with all its children when time is up.

    Returns:
        Its status: as of :func:`run_here`, or ``out of time``.
    """
    results.set(name, status="running")
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with results.log.open("a") as log:
        log.write(f"--- {name}\n")
        log.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=log, stderr=log, env=environment, start_new_session=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        try:
            code: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    took = round(time.monotonic() - begin, 1)
    if code is None:
        results.set(name, status="out of time", seconds=took, reason=f"ended after {took:.0f} s")
    elif results.load()["sections"][name]["status"] == "running":  # it died before it could say anything
        with results.log.open() as log:
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
        results.set(name, status="failed", seconds=took, reason=f"exit code {code}: {lines[-1]}"[:400])
    return str(results.load()["sections"][name]["status"])
