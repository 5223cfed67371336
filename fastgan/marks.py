"""What a running step is doing, for whoever listens; where nobody does, a mark is one look at a global.

A listener (:class:`fastgan.profiling.recorder.Recorder`) hears which phase of an iteration begins and ends, and which
of an engine's methods the user has called. Phases within phases count for themselves alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

PHASES = (
    "your loop", "data", "copy", "noise", "fakes", "D forward", "chain", "penalty", "sweep", "weight gradient",
    "D backward", "G forward", "G backward", "optimiser", "metrics", "graph replay", "other", "host gap",
)  # fmt: skip
"""All phases, in the order of an iteration; the last one is what no other accounts for."""


class Listener(Protocol):
    """Who is told."""

    def mark(self, phase: str) -> contextlib.AbstractContextManager[object]:
        """What is done within belongs to that phase."""

    def entry(self, engine: Any, method: str) -> contextlib.AbstractContextManager[object]:
        """The user has called, or another method has, that method of that engine."""

    def run(self, work: Labelled) -> None:
        """Make a list of calls."""


class Labelled(Protocol):
    """Calls that know their phases."""

    @property
    def calls(self) -> Sequence[Callable[[], object]]:
        """In order."""

    @property
    def phases(self) -> Sequence[str]:
        """Of each call."""

    @property
    def costs(self) -> Sequence[tuple[int, int]]:
        """FLOPs of each call, and the bytes it reads and writes."""


class Outermost(Protocol):
    """Who hears of an engine's methods alone, so that the work within them costs nothing more."""

    def around(self, call: Callable[[], R], engine: Any, method: str) -> R:
        """Make a call of that method of that engine."""


listener: Listener | None = None
outermost: Outermost | None = None
"""Told where there is no listener."""

_NOTHING = contextlib.nullcontext()


def mark(phase: str) -> contextlib.AbstractContextManager[object]:
    """A context for work of one phase; also for a loop of the user's own: ``with mark("data"):``.

    Names that are not in :data:`PHASES` count as ``"other"``.
    """
    heard = listener  # another thread may change it
    return _NOTHING if heard is None else heard.mark(phase)


def during(phase: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: all that a function does is of one phase."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def marked(*args: P.args, **kwargs: P.kwargs) -> R:
            if (heard := listener) is None:
                return function(*args, **kwargs)
            with heard.mark(phase):
                return function(*args, **kwargs)

        return marked

    return decorate


def entry(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A decorator of an engine's methods between whose calls iterations begin and end."""

    @functools.wraps(method)
    def entered(engine: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if (heard := listener) is not None:
            with heard.entry(engine, method.__name__):
                return method(engine, *args, **kwargs)
        if (told := outermost) is not None:
            return told.around(functools.partial(method, engine, *args, **kwargs), engine, method.__name__)
        return method(engine, *args, **kwargs)

    return entered
