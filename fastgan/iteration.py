"""One iteration as a list of calls over static memory: what a CUDA graph is recorded of.

Where every update has a plan of kernels and the engine's own optimisers, nothing of an iteration is decided while it
runs: its noise, data, plans, optimisers and counters are launches that were made before, in this order:

    for each discriminator update     inputs (noise, and rows of a device-resident data set), fakes, gradients, Adam
    for the generator                 inputs, gradients, Adam and average

Where the networks permit, the last discriminator update and the generator's have one launch for their inputs and one
forward pass of the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastgan import marks, steps
from fastgan.adam import LossScale, Ring
from fastgan.noise import Stream
from fastgan.optim import Updater
from fastgan.phases import Phase
from fastgan.plan import Plan
from fastgan.planner import Planner
from fastgan.steps import Call

if TYPE_CHECKING:
    from fastgan.data.resident import ResidentFeed
    from fastgan.kernels._launch import Launch
    from fastgan.kernels.inputs import Draw

Tensor = torch.Tensor


@dataclass(frozen=True)
class Counts:
    """Counters on the device, int64 0-dim."""

    d_updates: Tensor
    g_updates: Tensor
    images: Tensor


@dataclass(frozen=True)
class Parts:
    """What an engine lends to its iterations.

    Attributes:
        planner: of lowered plans.
        d, g: the players' updates; ``g`` is ``None`` where fakes are given.
        counts: of the engine.
        seed: of all noise.
        ring: takes the figures of each iteration.
        loss_scale: of fp16.
    """

    planner: Planner
    d: Updater
    g: Updater | None
    counts: Counts
    seed: int
    ring: Ring
    loss_scale: LossScale | None


def _as_launch(call: Call) -> Launch:
    """What does the same as a call.

    Raises:
        LookupError: nothing does; names the call.
    """
    from fastgan.kernels._launch import Launch
    from fastgan.kernels.persistent import copy_launch

    if isinstance(call, Launch):
        return call
    if isinstance(call, steps.Step) and call.name == "copy":
        src, dst = call.arguments["src"], call.arguments["dst"]
        if src.is_contiguous() and dst.is_contiguous() and src.is_floating_point():
            return copy_launch(src, dst)
    function = getattr(call, "func", call)  # of a partial
    name = call.name if isinstance(call, steps.Step) else getattr(function, "__name__", repr(function))
    raise LookupError(f"{name} is no launch of a kernel, and so no phase of one")


class Iteration:
    """The calls, and the memory that they read.

    Attributes:
        calls: in order; they take nothing.
        phases: of each call, from :data:`fastgan.marks.PHASES`.
        costs: FLOPs of each call, and the bytes it reads and writes, where a plan says so.
        real: places for real samples, ``[B, ...]`` for each discriminator update, in the data's dtype; empty where a
            feed fills them.
        fake: the same for given fakes, where there is no generator.
        active: which of a player's parameters have a gradient, by player, after the last update with the loss.
    """

    def __init__(
        self, parts: Parts, due: Sequence[Sequence[Phase]], generator: Phase | None, batch: int, compares: bool,
        feed: ResidentFeed | None = None,
    ) -> None:  # fmt: skip
        """Lay out an iteration.

        Args:
            parts: of the engine.
            due: the phases of each discriminator update.
            generator: the generator's phase.
            batch: samples of an update.
            compares: whether the generator's loss compares with real samples.
            feed: fills real samples within the iteration.

        Raises:
            LookupError: a phase has no plan; says which and why.
        """
        self.parts, self.batch, self.feed = parts, batch, feed
        self.calls: list[Call] = []
        self.phases: list[str] = []
        self.costs: list[tuple[int, int]] = []
        self.real: list[Tensor] = []
        self.fake: list[Tensor] = []
        self.active: dict[Updater, tuple[bool, ...]] = {}
        self._kept: list[object] = []
        for k, phases in enumerate(due):
            last = k == len(due) - 1
            joint = None
            if last and generator is not None and not compares:
                joint = parts.planner.joint(phases[0], generator, batch)
            own = len(due) > 1 or (last and compares)  # a plan may leave other numbers in its memory
            self._discriminator(phases, joint, own_slot=own, last=last and generator is None)
        if generator is not None:
            self._generator(generator, joint, compares)

    def make_dependent(self) -> None:
        """Let each kernel that follows another be launched before that one has ended: it waits on the device."""
        from fastgan.kernels._launch import Launch

        calls = self.calls
        self.calls = [
            replace(call, arguments={**call.arguments, "DEPENDENT": True})
            if isinstance(call, Launch) and i and isinstance(calls[i - 1], Launch)
            else call
            for i, call in enumerate(calls)
        ]

    @property
    def repeats(self) -> bool:
        """Whether nothing has to come between replays: torch's generators, which dropout uses, advance on the host."""
        return all(hasattr(call, "kernel") for call in self.calls)

    def run(self) -> None:
        """Make every call."""
        if (listener := marks.listener) is not None:
            listener.run(self)
            return
        for call in self.calls:
            call()

    def persist(self, device: torch.device) -> None:
        """Put the launches of a persistent kernel in the place of all calls.

        Raises:
            LookupError: some call is none of its phases; names it.
        """
        from fastgan.kernels.persistent import persistent_launches

        self.calls = [*persistent_launches([_as_launch(call) for call in self.calls], device=device)]
        self.phases, self.costs = ["graph replay"] * len(self.calls), [(0, 0)] * len(self.calls)

    # ---- the players

    def _discriminator(
        self, phases: Sequence[Phase], joint: tuple[Plan, Plan, Plan] | None, *, own_slot: bool, last: bool
    ) -> None:
        parts, counts = self.parts, self.parts.counts
        plans = [joint[1]] if joint is not None else []
        plans += [self._plan(phase) for phase in phases[len(plans) :]]
        draws: list[Draw] = []
        forward: Plan | None = None
        if joint is not None:
            forward = joint[0]
            z = forward.inputs["z"]
            draws += [
                self._draw(z[self.batch :], Stream.D_LATENT, counts.d_updates),
                self._draw(z[: self.batch], Stream.G_LATENT, counts.g_updates),
            ]
        elif parts.g is not None and "fake" in plans[0].inputs:
            forward = parts.planner.fakes(plans[0], self.batch)
            if forward is None:
                raise LookupError(f"the generator's forward pass: {parts.planner.why_no_fakes(self.batch)}")
            draws.append(self._draw(forward.inputs["z"], Stream.D_LATENT, counts.d_updates))
        first: dict[str, Tensor] = {}
        copies: list[Call] = []
        for plan in plans:
            for name, place in plan.inputs.items():
                source = name.split()[0]
                if source not in first:
                    first[source] = place
                else:
                    copies.append(steps.copy(first[source].view(place.shape), place))
        if "alpha" in first:
            draws.append(self._draw(first["alpha"].view(-1, 1), Stream.ALPHA, counts.d_updates, "uniform"))
        if "delta" in first:
            draws.append(self._draw(first["delta"].flatten(1), Stream.PERTURBATION, counts.d_updates))
        self._last_real = self._slot(first["real"], own_slot)
        self._inputs(draws, self._last_real)
        if self.feed is None:
            self.real.append(self._last_real)
        if self._last_real is not first["real"]:
            copies.insert(0, steps.copy(self._last_real, first["real"]))
        if parts.g is None and "fake" in first:
            self.fake.append(self._slot(first["fake"], own_slot))
            if self.fake[-1] is not first["fake"]:
                copies.insert(0, steps.copy(self.fake[-1], first["fake"]))
        if forward is not None:
            self._add_plan(forward)
        self._add("copy", *copies)
        for phase, plan in zip(phases, plans, strict=True):
            final = phase is phases[-1]
            self._update(parts.d, plan, [(counts.d_updates, 1), (counts.images, self.batch)] * final, final and last)

    def _generator(self, phase: Phase, joint: tuple[Plan, Plan, Plan] | None, compares: bool) -> None:
        parts = self.parts
        assert parts.g is not None
        if joint is not None:
            plan = joint[2]
        else:
            plan = self._plan(phase)
            self._inputs([self._draw(plan.inputs["z"], Stream.G_LATENT, parts.counts.g_updates)], None)
            if compares:
                source = self._last_real
                self._add("copy", steps.copy(source.view(plan.inputs["real"].shape), plan.inputs["real"]))
        self._update(parts.g, plan, [(parts.counts.g_updates, 1)], True)

    def _update(self, updater: Updater, plan: Plan, advance: list[tuple[Tensor, int]], ring: bool) -> None:
        self._add_plan(plan)
        self.active[updater] = plan.active(updater.params)
        self._add("optimiser", *updater.calls(
            self.active[updater], squares=plan.squares, loss_scale=self.parts.loss_scale, advance=advance,
            ring=self.parts.ring if ring else None,
        ))  # fmt: skip

    def _plan(self, phase: Phase) -> Plan:
        plan = self.parts.planner.find(phase, self.batch)
        if not isinstance(plan, Plan):
            raise LookupError(f"the {phase.player}'s update: {plan}")
        return plan

    # ---- inputs

    @staticmethod
    def _slot(place: Tensor, own: bool) -> Tensor:
        """Where samples come in: the plan's own memory, or memory apart from it."""
        return torch.zeros_like(place) if own else place

    def _draw(self, out: Tensor, stream: Stream, step: Tensor, kind: str = "normal") -> Draw:
        """Noise at a counter's step."""
        from fastgan.kernels.inputs import Draw

        return Draw(out, step, self.parts.seed, int(stream), kind)

    def _inputs(self, draws: Sequence[Draw], real: Tensor | None) -> None:
        from fastgan.kernels.inputs import inputs_launch
        from fastgan.kernels.sample_rows import sample_rows_launch

        rows = None
        if self.feed is not None and real is not None:
            rows = self.feed.arguments(real.view(self.batch, *self.feed.dataset.shape))
        if draws:
            self._add("noise" if rows is None else "data", inputs_launch(draws, rows))
        elif rows is not None:
            self._add("data", sample_rows_launch(rows))

    def _add(self, phase: str, *calls: Call) -> None:
        self.calls += calls
        self.phases += [phase] * len(calls)
        self.costs += [(0, 0)] * len(calls)

    def _add_plan(self, plan: Plan) -> None:
        self.calls += plan.program.calls
        self.phases += plan.phases
        self.costs += plan.costs
        self._kept.append(plan)
