"""How an engine's iterations run: recorded as CUDA graphs or as they are, as a list of kernels or update by update.

A variant is an iteration of one kind: of one batch size, with or without the lazy penalties that are due, on one feed.
Its inputs are static places that the engine fills, its work reads only them. Where every update has a plan of kernels
that work is an :class:`fastgan.iteration.Iteration`; else it is what the engine does update by update.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastgan.errors import InputError, unknown
from fastgan.graphs import CudaRecorder, Graphs, Recording
from fastgan.iteration import Iteration

Tensor = torch.Tensor
Kind = Literal["auto", "eager", "graph", "dependent", "persistent"]
KINDS = ("auto", "eager", "graph", "dependent", "persistent")
_UNRECORDED = 8  # variants that are kept besides those with a graph


def choose(kind: str, device: torch.device, kernels: bool) -> str:
    """The executor that is meant.

    Raises:
        InputError: it is unknown, or does not run here.
    """
    if kind not in KINDS:
        raise unknown("executor", kind, KINDS)
    if kind == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if kind in ("graph", "dependent") and device.type != "cuda":
        raise InputError(f"Engine: executor is {kind!r}, but device is {device}: graphs need a CUDA device")
    if kind in ("dependent", "persistent") and not kernels:
        raise InputError(f"Engine: executor is {kind!r}, which runs kernels: see backend")
    if kind == "dependent" and torch.cuda.get_device_capability(device) < (9, 0):
        raise InputError("Engine: executor is 'dependent', which needs compute capability 9.0")
    return kind


@dataclass
class Variant:
    """One kind of iteration, ready to run.

    Attributes:
        real: places for real samples, one for each discriminator update; none where a feed fills them.
        labels, fake: the same for labels and given fakes.
        iterations: lists of launches, run one after another; none where updates run one by one.
        recording: the graph, or ``None``.
        at_once: whether nothing has to come between two replays.
        batch: samples of an update.
        kept: what the recording works on and nothing else may hold.
        why_updates: why it is not a list of launches.
        why_unrecorded: why there is no graph.
    """

    real: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    fake: list[Tensor] = field(default_factory=list)
    body: Callable[[], None] = lambda: None
    iterations: Sequence[Iteration] = ()
    recording: Recording | None = None
    at_once: bool = False
    batch: int = 0
    kept: Sequence[object] = ()
    why_updates: str | None = None
    why_unrecorded: str | None = None

    def load(self, batches: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> None:
        """Put samples, labels and fakes in their places."""
        for i, (real, labels, fake) in enumerate(batches):
            for places, value in ((self.real, real), (self.labels, labels), (self.fake, fake)):
                if value is not None and i < len(places):
                    places[i].copy_(value.reshape(places[i].shape))

    def run(self, times: int = 1) -> None:
        """Run it so many times."""
        if self.recording is not None and self.at_once:
            self.recording.replay(times)
            return
        for _ in range(times):
            self.body() if self.recording is None else self.recording.replay()


class Executor:
    """Finds the variant for an iteration and runs it.

    Args:
        kind: of :data:`KINDS`, but not ``"auto"``.
        device: of the engine.
        state: all tensors that an iteration changes.
    """

    def __init__(self, kind: str, device: torch.device, state: Callable[[], Sequence[Tensor]]) -> None:
        self.kind, self.device = kind, device
        self.graphs: Graphs | None = None
        if kind in ("graph", "dependent") or (kind == "persistent" and device.type == "cuda"):
            self.graphs = Graphs(CudaRecorder(device), state, device)
        self._variants: dict[Hashable, Variant] = {}

    @property
    def variants(self) -> list[Variant]:
        """Those in use, in the order in which they came up."""
        return list(self._variants.values())

    def clear(self) -> None:
        """Forget all variants: what they were made of has changed."""
        self._variants.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def find(
        self, key: Hashable, lay_out: Callable[[], Sequence[Iteration]], updates: Callable[[], Variant],
        obstacle: str | None,
    ) -> Variant:  # fmt: skip
        """The variant of that key, made if need be.

        Args:
            key: what decides which work is done.
            lay_out: makes lists of launches; raises LookupError where there are none.
            updates: the variant that runs update by update.
            obstacle: why it cannot be recorded as far as is known without trying, or ``None``.
        """
        if key not in self._variants:
            unrecorded = [k for k, v in self._variants.items() if v.recording is None]
            for old in unrecorded[: len(unrecorded) - _UNRECORDED + 1]:
                del self._variants[old]
            self._variants[key] = variant = self._make(lay_out, updates)
            if self.graphs is None:
                cpu = self.kind == "persistent"
                variant.why_unrecorded = "graphs need a CUDA device" if cpu else f"executor is {self.kind!r}"
            elif obstacle is not None and not variant.iterations:
                variant.why_unrecorded = obstacle
            else:
                found = self.graphs.find(key, variant.body)
                if isinstance(found, str):
                    variant.why_unrecorded = found
                else:
                    variant.recording = found
        return self._variants[key]

    def _make(self, lay_out: Callable[[], Sequence[Iteration]], updates: Callable[[], Variant]) -> Variant:
        try:
            made = lay_out()
            if self.kind == "dependent":
                for iteration in set(made):
                    iteration.make_dependent()
            if self.kind == "persistent":
                for iteration in set(made):
                    iteration.persist(self.device)
        except LookupError as e:
            if self.kind == "persistent":
                raise InputError(f"Engine: executor is 'persistent', but {e}") from None
            variant = updates()
            variant.why_updates = str(e)
            return variant

        def body() -> None:
            for iteration in made:
                iteration.run()

        return Variant(
            real=made[0].real, fake=made[0].fake, body=body, iterations=made, batch=made[0].batch,
            at_once=all(iteration.repeats for iteration in made),
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an executor holds addresses: the engine makes its own")
