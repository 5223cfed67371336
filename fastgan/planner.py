"""Which phases run in closed form, and the plans they run: made when first needed, kept for the batch sizes in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastgan import losses, plan
from fastgan.arena import Arena
from fastgan.network import Network
from fastgan.phases import Phase
from fastgan.plan import Plan, Setting
from fastgan.reader import Signature, Unreadable, read

Tensor = torch.Tensor

_BATCH_SIZES = 3  # kept per phase


@dataclass
class Example:
    """Inputs to read the networks with, made when needed.

    Attributes:
        latents, samples: ``batch -> tensor``.
        logits: whether the discriminator's final sigmoid is left out.
    """

    latents: Callable[[int], Tensor]
    samples: Callable[[int], Tensor]
    logits: bool


class Planner:
    """Makes plans for an engine's phases.

    Args:
        generator: ``None`` where fakes are given.
        discriminator: the other network.
        loss: of both players.
        arenas: the networks' parameters and gradients; those that have one.
        obstacle: why nothing is planned, or ``None``.
        reduced: the dtype of everything but penalties.
        metrics: 0-dim tensors that updates write: ``d_loss``, ``d_real``, ``d_fake``, ``g_loss``, and by a phase's
            interval the value of its penalties.
        example: inputs.
        packed: samples in a row of the discriminator.
        products: of fp32 operands in kernels, ``"ieee"`` or ``"tf32"``; ``None`` where plans run in torch ops. With
            kernels, an arena's copy of its parameters in lower precision is what its owner keeps it to be.
        loss_scale: what fp16 gradients are multiplied by.

    Attributes:
        readings: how often the networks were read: plans and recordings of an earlier reading no longer hold.
    """

    def __init__(
        self,
        generator: nn.Module | None,
        discriminator: nn.Module,
        *,
        loss: losses.Loss,
        arenas: Sequence[Arena],
        obstacle: str | None,
        device: torch.device,
        dtype: torch.dtype,
        reduced: torch.dtype,
        metrics: Mapping[str | int, Tensor],
        example: Example,
        packed: int,
        products: str | None = None,
        loss_scale: Tensor | None = None,
    ) -> None:
        self._modules = {"generator": generator, "discriminator": discriminator}
        self._loss, self._arenas, self._obstacle, self._metrics = loss, arenas, obstacle, metrics
        self._example, self._packed = example, packed
        self._casts: list[Callable[[], object]] = []
        self._low: dict[Tensor, Tensor] = {}
        self._products, self.readings = products, 0
        self._setting = Setting(
            device, dtype, reduced, self._operand, {}, kernels=products is not None, loss_scale=loss_scale
        )
        self._networks: dict[str, Network | str] = {}
        self._signatures: list[Signature] = []
        self._seen: Any = None
        self._plans: dict[tuple[Phase, int], Plan | str] = {}
        self._fakes: dict[int, tuple[Plan, Plan]] = {}
        self._joint: dict[tuple[Phase, int], tuple[Plan, Plan, Plan] | None] = {}

    def refresh(self) -> None:
        """Read the networks where that has not been done, and again where the user has changed them."""
        if not self._networks or self._seen != self._look():
            self._read()

    def changed(self) -> bool:
        """Whether a network is no longer what was read."""
        return bool(self._seen != self._look())

    def held(self, batch: int) -> list[object]:
        """The plans of a batch size: who has recorded their calls keeps them, as they may be replaced here."""
        return [p for (_, n), p in self._plans.items() if n == batch] + [
            p for n, p in self._fakes.items() if n == batch
        ]

    def _look(self) -> list[Any]:
        return [torch.get_num_threads(), *(signature() for signature in self._signatures)]

    def find(self, phase: Phase, batch: int) -> Plan | str:
        """The plan for a phase and a batch size, or why there is none; :meth:`refresh` comes first."""
        if self._obstacle is not None:
            return self._obstacle
        key = (phase, batch)
        if key not in self._plans:
            kept = [k for k in self._plans if k[0] == phase]
            for old in kept[: max(0, len(kept) - _BATCH_SIZES + 1)]:
                del self._plans[old]
            self._plans[key] = self._make(phase, batch)
        return self._plans[key]

    def fakes(self, update: Plan, batch: int) -> Plan | None:
        """The generator's forward pass into that update's ``fake``; ``None`` where the generator is not readable."""
        if batch in self._fakes and self._fakes[batch][0] is update:
            return self._fakes[batch][1]
        network = self._networks["generator"]
        if isinstance(network, str) or "fake" not in update.inputs or self.why_no_fakes(batch) is not None:
            return None
        out = update.inputs["fake"].view(batch, *network.value_shape(len(network.layers)))
        made = self._with_casts(lambda: plan.fakes(network, batch, self._setting, out))
        for old in list(self._fakes)[: max(0, len(self._fakes) - _BATCH_SIZES + 1)]:
            del self._fakes[old]
        self._fakes[batch] = update, made
        return made

    def joint(self, phase: Phase, generators: Phase, batch: int) -> tuple[Plan, Plan, Plan] | None:
        """A forward pass of the generator, that discriminator's update and the generator's, all on the same samples.

        Where both have plans and :func:`fastgan.plan.joint_updates` can join them.
        """
        key = (phase, batch)
        if key not in self._joint:
            self._joint[key] = None
            if self._obstacle is None and self._why_not(phase, batch) is self._why_not(generators, batch) is None:
                self._joint[key] = self._make_joint(phase, batch)
        return self._joint[key]

    def _make_joint(self, phase: Phase, batch: int) -> tuple[Plan, Plan, Plan] | None:
        kind, network, critic = plan.loss_kind(self._loss), self._networks["generator"], self._networks["discriminator"]
        assert kind is not None
        assert not isinstance(network, str)
        assert not isinstance(critic, str)
        metrics = self._figures(phase) | {"g_loss": self._metrics["g_loss"]}
        self._casts = []
        made = plan.joint_updates(network, critic, kind, phase.penalties, phase.every, batch, self._setting, metrics)
        return None if made is None else (self._finish(made[0]), self._lowered(made[1]), self._lowered(made[2]))

    def why_no_fakes(self, batch: int) -> str | None:
        """Why the generator's forward pass has no plan."""
        network = self._networks["generator"]
        return network if isinstance(network, str) else plan.refusal(network, batch, self._setting, once=True)

    # ---- making

    @torch.no_grad()
    def _read(self) -> None:
        self._plans.clear()
        self._fakes.clear()
        self._joint.clear()
        self._networks, self._signatures = {}, []
        self.readings += 1
        pairs = [pair for arena in self._arenas for pair in zip(arena.params, arena.grads, strict=True)]
        self._setting = replace(self._setting, gradients={p: g for p, g in pairs if p.requires_grad})
        for name, module in self._modules.items():
            if module is None:
                self._networks[name] = "there is none"
                continue
            try:
                if self._obstacle is not None:
                    raise Unreadable(self._obstacle)
                if name == "generator":
                    network = read(module, self._example.latents(2), what=name)
                else:
                    example = self._example.samples(2 * self._packed)
                    network = read(module, example, what=name, logits=self._example.logits)
            except Unreadable as e:
                self._networks[name] = str(e)
                network = Network([], (), modules=list(module.modules()))
            else:
                self._networks[name] = network
            self._signatures.append(Signature(network))
        self._seen = self._look()

    def _why_not(self, phase: Phase, batch: int) -> str | None:
        """Why a phase has no plan."""
        if phase.adversarial and plan.loss_kind(self._loss) is None:
            return f"loss {self._loss.name!r} is your own: only the built-in ones have a known derivative"
        critic, network = self._networks["discriminator"], self._networks["generator"]
        if isinstance(critic, str):
            return critic
        trained = self._modules[phase.player]
        if trained is not None and not any(p in self._setting.gradients for p in trained.parameters()):
            return f"{phase.player}: nothing in it is trained"
        if phase.player == "discriminator":
            why = plan.refusal(critic, batch, self._setting, penalties=phase.penalties, adversarial=phase.adversarial)
            return why if why is None else f"discriminator: {why}"
        if isinstance(network, str):
            return network
        for name, one in (("generator", network), ("discriminator", critic)):
            if (why := plan.refusal(one, batch, self._setting, once=one is network)) is not None:
                return f"{name}: {why}"
        return None

    def _make(self, phase: Phase, batch: int) -> Plan | str:
        if (why := self._why_not(phase, batch)) is not None:
            return why
        kind, network, critic = plan.loss_kind(self._loss), self._networks["generator"], self._networks["discriminator"]
        assert not isinstance(critic, str)
        if phase.player == "discriminator":
            loss, figures = kind if phase.adversarial else None, self._figures(phase)
            return self._with_casts(
                lambda: plan.discriminator(critic, loss, phase.penalties, phase.every, batch, self._setting, figures)
            )
        assert kind is not None
        assert not isinstance(network, str)
        compares, metric = self._loss.compares, {"g_loss": self._metrics["g_loss"]}
        return self._with_casts(lambda: plan.generator(network, critic, kind, compares, batch, self._setting, metric))

    def _figures(self, phase: Phase) -> dict[str, Tensor]:
        """Where a discriminator's update writes its figures."""
        figures: dict[str, Tensor] = {k: v for k, v in self._metrics.items() if isinstance(k, str)}
        return figures | ({"penalty": self._metrics[phase.every]} if phase.penalties else {})

    def _with_casts(self, make: Callable[[], Plan]) -> Plan:
        """The plan, with the calls before it that cast the parameters it uses."""
        self._casts = []
        return self._finish(make())

    def _finish(self, made: Plan) -> Plan:
        made.program.prepend(self._casts)
        return self._lowered(made)

    def _lowered(self, made: Plan) -> Plan:
        """The plan as launches, where there are kernels."""
        if self._products is not None:
            from fastgan.lowering import lower

            gradients = [self._setting.gradients[p] for p in made.trained]
            device = self._setting.device
            lowered = lower(made.program, gradients, precision=self._products, device=device)
            made.program, made.squares = lowered.program, lowered.squares
        return made

    def _operand(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        if p.dtype == dtype:
            return p.detach()
        for arena in self._arenas:
            for q, low in zip(arena.params, arena.views_of(arena.lower(dtype)), strict=True):
                if q is p:
                    if arena.refresh not in self._casts and self._products is None:
                        self._casts.append(arena.refresh)
                    return low
        if p not in self._low:
            self._low[p] = torch.empty_like(p, dtype=dtype, requires_grad=False)
        cast = partial(self._low[p].copy_, p.detach())
        self._casts.append(cast)
        return self._low[p]
