"""Whole updates in closed form: a static list of calls over static buffers, made once for a batch size.

No autograd graph is built and nothing is read back: what changes from one update to the next is in tensors. With the
native extension, updates of linear layers, LeakyReLU, ReLU, tanh, sigmoid and dropout in fp32 and fp64 allocate
nothing; convolutions and batch normalisation return their results, as torch has no form of them that writes to a given
place, and spectral norm, the curvature of norms, SiLU and softplus, bf16 and all that runs without the extension make
small temporaries. The mathematics is that of :mod:`fastgan.stack`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fastgan import losses, marks, rules, steps
from fastgan.network import Activation, Affine, BatchNorm, Dropout, Layer, Linear, Network, Norm, Reshape
from fastgan.penalties import DRAGAN, R1, R2, GradientPenalty, Penalty
from fastgan.stack import Interpolation, Program, Segment, Stack

Tensor = torch.Tensor


@dataclass
class Plan:
    """An update that is ready to run.

    Attributes:
        program: the calls.
        inputs: tensors to be filled before each run, by name: ``z``, ``real``, ``fake``, ``alpha``, ``delta``;
            ``real again`` and ``fake again`` take the same samples in another precision.
        trained: parameters whose gradient it writes.
        buffers: memory it holds; native calls know addresses alone.
        squares: partial sums of the squares of all gradients, where its kernels make them.
        role: ``"D"`` or ``"G"``, whose update it is, or ``"fakes"``.
    """

    program: Program = field(default_factory=Program)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    trained: set[Tensor] = field(default_factory=set)
    buffers: list[Tensor] = field(default_factory=list)
    squares: Tensor | None = None
    role: str = "D"
    _active: tuple[bool, ...] | None = None

    def active(self, params: Sequence[Tensor]) -> tuple[bool, ...]:
        """Which of some parameters it gives a gradient."""
        if self._active is None:
            self._active = tuple(p in self.trained for p in params)
        return self._active

    @torch.no_grad()
    def run(self) -> None:
        """Make one update's gradients from the inputs."""
        if (listener := marks.listener) is None:
            self.program.run()
        else:
            listener.run(self)

    @property
    def calls(self) -> Sequence[Callable[[], object]]:
        """Of the program."""
        return self.program.calls

    @property
    def phases(self) -> list[str]:
        """Of :data:`fastgan.marks.PHASES`, one for each call."""
        names = _PHASES[self.role]
        return [names.get(part, names.get("other", part)) for part in self.program.parts]

    @property
    def costs(self) -> Sequence[tuple[int, int]]:
        """Of the program."""
        return self.program.costs


_PHASES: dict[str, dict[str, str]] = {  # of a part; "other" is that of all that are not named
    "D": {"forward": "D forward", "loss": "D forward"},
    "G": {"forward": "G forward", "loss": "G forward", "copy": "copy", "other": "G backward"},
    "fakes": {"forward": "fakes"},
}


@dataclass(frozen=True)
class Setting:
    """What all plans of an engine share.

    Attributes:
        device: of all buffers.
        dtype: of the parameters.
        reduced: of everything but penalties and losses.
        operand: a parameter in a dtype.
        gradients: where each trained parameter's gradient goes.
        kernels: whether plans are lowered to kernels. They accumulate in fp32 whatever the operands are, so that
            penalties stay in the update's one stack; without them penalties have a part of their own in ``dtype``.
        loss_scale: what fp16 gradients are multiplied by, 0-dim, or ``None``.
    """

    device: torch.device
    dtype: torch.dtype
    reduced: torch.dtype
    operand: Callable[[Tensor, torch.dtype], Tensor]
    gradients: Mapping[Tensor, Tensor]
    kernels: bool = False
    loss_scale: Tensor | None = None

    def operands(self, adversarial: bool) -> torch.dtype:
        """Of the products of an update with the loss, or with penalties alone."""
        return self.reduced if adversarial or self.kernels else self.dtype


def loss_kind(loss: losses.Loss) -> str | None:
    """The name of a loss whose derivatives are known, or ``None``."""
    return loss.name if replace(loss, clip=None) == losses.LOSSES.get(loss.name) else None


def refusal(
    network: Network,
    rows: int,
    setting: Setting,
    *,
    penalties: Sequence[Penalty] = (),
    adversarial: bool = True,
    once: bool = False,
) -> str | None:
    """Why an update through this network has no closed form here, or ``None``; ``once``: it runs on one batch only."""
    for penalty in penalties:
        if type(penalty) not in (GradientPenalty, R1, R2, DRAGAN):
            return f"penalty {penalty.name!r} is your own: only the built-in ones have a known derivative"
    if rows % network.packed:
        return f"{rows} samples do not make whole rows of {network.packed}"
    normalising: set[object] = set()
    for layer in network.layers:
        what = f"layer {layer.name!r} ({type(layer).__name__})"
        if isinstance(layer, BatchNorm):
            if layer.module in normalising and not once:
                return f"{what} is used twice, and its statistics move on from one use to the next"
            normalising.add(layer.module)
            if penalties:
                return f"{what} mixes the batch, so that a penalty on each sample's gradient is ill-defined"
            if layer.module.momentum is None:
                return f"{what} averages its statistics without momentum"
            if layer.inputs == (0,):
                return f"{what} normalises the network's input"
            if layer.module.training and rows // network.packed * math.prod(layer.shape[1:]) == 1:
                return f"{what} has a single value per channel"
        if isinstance(layer, Linear) and len(layer.shape) != 1:
            return f"{what} acts on rows of {len(layer.shape)} dimensions"
        if setting.operands(adversarial) != setting.dtype and not _runs_reduced(layer):
            return f"{what} is not planned in {str(setting.reduced).removeprefix('torch.')}"
    return None


def _runs_reduced(layer: Layer) -> bool:
    if isinstance(layer, Norm | BatchNorm):
        return False
    if isinstance(layer, Activation):
        return layer.kind in ("leaky-relu", "tanh", "sigmoid")
    return not (isinstance(layer, Affine) and layer.spectral is not None)


# ---- the discriminator


def fakes(network: Network, batch: int, setting: Setting, output: Tensor) -> Plan:
    """The generator's forward pass into ``output [B, ...]``; input ``z``."""
    plan = Plan(role="fakes")
    segments = [Segment("fake", slice(0, batch))]
    stack = _stack(plan, network, segments, setting, setting.reduced, output=output, spread=setting.kernels)
    rules.prepare(stack)
    rules.forward(stack)
    plan.inputs["z"] = stack.value(0)
    plan.buffers += stack.owned
    return plan


def discriminator(
    network: Network, loss: str | None, penalties: Sequence[Penalty], every: int, batch: int, setting: Setting,
    metrics: Mapping[str, Tensor],
) -> Plan:  # fmt: skip
    """Gradients of a discriminator's update.

    Args:
        network: the discriminator, ending in logits.
        loss: its kind, or ``None`` for the penalties alone.
        penalties: of this update.
        every: factor of the penalties (lazy regularisation).
        batch: samples, real and fake each.
        setting: what all plans share.
        metrics: 0-dim tensors ``d_loss``, ``d_real``, ``d_fake`` and ``penalty`` that are written.
    """
    if (parts := _parts(network, loss, penalties, batch, setting)) > 1:
        return _in_parts(parts, network, loss, penalties, every, batch, setting, metrics)
    return _whole(network, loss, penalties, every, batch, setting, metrics)


def _whole(
    network: Network, loss: str | None, penalties: Sequence[Penalty], every: int, batch: int, setting: Setting,
    metrics: Mapping[str, Tensor], share: float = 1.0,
) -> Plan:  # fmt: skip
    plan = Plan()
    if loss is not None and penalties and setting.reduced != setting.operands(False):  # penalties in full precision
        _update(plan, network, loss, (), 1, batch, setting, setting.reduced, metrics, share)
        apart = Plan(program=plan.program, trained=plan.trained, buffers=plan.buffers)
        _update(apart, network, None, penalties, every, batch, setting, setting.dtype, metrics, share)
        for name in ("real", "fake"):  # in full precision, where they are given in it
            if name in apart.inputs:
                plan.inputs[f"{name} again"] = apart.inputs.pop(name)
        plan.inputs.update(apart.inputs)
    else:
        dtype = setting.operands(loss is not None)
        _update(plan, network, loss, penalties, every, batch, setting, dtype, metrics, share)
    return plan


def _parts(
    network: Network, loss: str | None, penalties: Sequence[Penalty], batch: int, setting: Setting
) -> int:  # fmt: skip
    """Into how many parts of the batch an update is cut, so that its buffers stay small beside the products' work.

    What a network draws or iterates in each forward call would differ: such an update is not cut.
    """
    for layer in network.layers:
        if isinstance(layer, BatchNorm | Dropout) or (isinstance(layer, Affine) and layer.spectral is not None):
            return 1
    places = {_key(p) for p in penalties} | ({"real", "fake"} if loss is not None else set())
    values = sum(math.prod(la.shape) for la in network.layers if not isinstance(la, Activation | Reshape))
    size = 2 * len(places) * values * batch // network.packed * setting.dtype.itemsize
    limit, rows = _PART[setting.device.type]
    parts = 1
    while size / parts > limit and batch % (2 * parts * network.packed) == 0 and batch // (2 * parts) >= rows:
        parts *= 2
    return parts


_PART = {"cpu": (2**26, 512), "cuda": (2**30, 4096)}  # bytes of buffers, and rows below which a part is not cut


def _in_parts(
    parts: int, network: Network, loss: str | None, penalties: Sequence[Penalty], every: int, batch: int,
    setting: Setting, metrics: Mapping[str, Tensor],
) -> Plan:  # fmt: skip
    """One part's calls, made for each part in turn; gradients and figures are the means over the parts."""
    of_part = {k: torch.zeros_like(v) for k, v in metrics.items()}
    part = _whole(network, loss, penalties, every, batch // parts, setting, of_part, 1 / parts)
    plan = Plan(trained=part.trained, buffers=part.buffers)
    metrics = {k: v for k, v in metrics.items() if (penalties if k == "penalty" else loss)}
    for t in [*(setting.gradients[p] for p in part.trained), *metrics.values()]:
        plan.program.add(t.zero_, t)
    for name, place in part.inputs.items():
        plan.inputs[name] = torch.zeros(parts * len(place), *place.shape[1:], dtype=place.dtype, device=place.device)
        plan.buffers.append(plan.inputs[name])
    for k in range(parts):
        for name, place in part.inputs.items():
            source = plan.inputs[name][k * len(place) : (k + 1) * len(place)]
            plan.program.add(steps.copy(source, place), place, source)
        plan.program.extend(part.program)
        for key, t in metrics.items():
            plan.program.add(partial(t.add_, of_part[key], alpha=1 / parts), t)
    return plan


def _update(
    plan: Plan, network: Network, loss: str | None, penalties: Sequence[Penalty], every: int, batch: int,
    setting: Setting, dtype: torch.dtype, metrics: Mapping[str, Tensor], share: float, before: int = 0,
) -> Stack:  # fmt: skip
    """Add an update's calls; ``before``: rows of memory before the fakes', which are the first ones where possible."""
    n = batch // network.packed
    places: dict[str, list[Penalty]] = {}
    for penalty in penalties:
        places.setdefault(_key(penalty), []).append(penalty)
    with_loss = ["real", "fake"] if loss is not None else []
    order = [*with_loss, *(p for p in places if p not in with_loss)]  # of the reference's calls
    # in the stack: rows with a loss alone, with both, with a penalty alone, interpolated ones last
    placed = sorted(
        order, key=lambda p: (p in places, p not in with_loss, p == "interpolated", before > 0 and p != "fake")
    )
    rows = {p: slice(k * n, (k + 1) * n) for k, p in enumerate(placed)}
    shared = [p for p in with_loss if p in places]
    logits_per_row = math.prod(network.value_shape(len(network.layers)))
    curved = any(layer.curved for layer in network.layers)
    split = bool(places) and (curved or (bool(shared) and logits_per_row > 1))

    alpha = torch.zeros(n, dtype=setting.dtype, device=setting.device)
    free = loss is not None and "interpolated" in places and not split and _starts_affine(network)
    mixed = Interpolation(alpha, rows["real"], rows["fake"], rows["interpolated"]) if free else None
    s = _stack(
        plan, network, [Segment(p, rows[p]) for p in order], setting, dtype, chain=len(placed) * n,
        tail=len(places) * n, shared=len(shared) * n, split=split, gradients=setting.gradients, mixed=mixed,
        share=share, before=before,
    )  # fmt: skip
    _make_inputs(plan, s, rows, places, alpha, free)
    program = plan.program
    rules.prepare(s)
    rules.forward(s)

    out, chained = len(network.layers), slice(0, s.chain)
    n_loss = len(with_loss) * n
    weights: Tensor | None = None
    if loss is not None:
        scales = {p: s.adjoint(out, rows[p]).view(-1) for p in with_loss}
        if shared and not split:  # their chain starts from 1, and c comes in with the gradients
            weights = s.new(n_loss, dtype=setting.dtype)
            weights.fill_(1)
            scales.update({p: weights[rows[p]] for p in shared})
        logits = {p: s.value(out, rows[p]).reshape(-1) for p in with_loss}
        program.part = "loss"
        logits, seeds, after = _in_full(s, setting.dtype, logits, scales)
        tensors = (logits["real"], logits["fake"], seeds["real"], seeds["fake"])
        figures = (metrics["d_loss"], metrics["d_real"], metrics["d_fake"])
        call = steps.discriminator_loss(loss, *tensors, *figures, setting.loss_scale)
        program.add(call, *tensors)
        after()
    ones = slice(s.chain, s.left) if split else s.tail
    if places:
        program.part = "chain"
        program.add(steps.fill(s.adjoint(out, ones), 1))
    if split:
        rules.chain(s, ones, s.tail, below=True)
        _penalise(s, rows, places, every, metrics["penalty"], setting)
        rules.sweep(s)
        rules.chain(s, chained, chained, below=False, curvature=True)
        rules.gradients(s, None, n_loss)
    else:
        rules.chain(s, chained, chained, below=True)
        if places:
            _penalise(s, rows, places, every, metrics["penalty"], setting)
            rules.sweep(s)
            s.join(weights[s.shared] if weights is not None else None)
        rules.gradients(s, weights, n_loss)
    plan.buffers += s.owned
    return s


def _key(penalty: Penalty) -> str:
    return f"perturbed by {penalty.noise}" if isinstance(penalty, DRAGAN) else penalty.place


def _starts_affine(network: Network) -> bool:
    """Whether the input reaches nothing but affine layers, through reshapes at most."""
    values, affine = {0}, True
    for i, layer in enumerate(network.layers):
        if values.intersection(layer.inputs):
            if isinstance(layer, Reshape):
                values.add(i + 1)
            else:
                affine = affine and isinstance(layer, Affine)
    return affine and len(values) <= 2


def _make_inputs(
    plan: Plan, s: Stack, rows: Mapping[str, slice], places: Mapping[str, list[Penalty]], alpha: Tensor, free: bool
) -> None:
    """The places that the caller fills, and the calls that form the samples of penalties."""
    plan.program.part = "penalty"
    x = {p: s.value(0, r) for p, r in rows.items()}
    needed = {p for p in ("real", "fake") if p in rows}
    if "interpolated" in places:
        needed |= {"real", "fake"}
        plan.inputs["alpha"] = alpha
    perturbed = {p: ps[0] for p, ps in places.items() if p.startswith("perturbed")}
    needed |= {"real"} if perturbed else set()
    n = len(alpha)
    for name in sorted(needed):
        plan.inputs[name] = x[name] if name in x else s.new(n, *s.shape(0))
    if "interpolated" in places and not free:
        real, fake = plan.inputs["real"], plan.inputs["fake"]
        plan.program.add(steps.mix(alpha, real, fake, x["interpolated"]), real, fake, x["interpolated"])
    for p, penalty in perturbed.items():
        assert isinstance(penalty, DRAGAN)
        delta = plan.inputs.setdefault("delta", s.new(n, *s.shape(0)))
        call = partial(torch.add, plan.inputs["real"], delta, alpha=penalty.noise, out=x[p])
        plan.program.add(call, plan.inputs["real"], delta, x[p])


def _in_full(
    s: Stack, dtype: torch.dtype, logits: dict[str, Tensor], scales: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Callable[[], None]]:
    """Logits and places for their derivatives in full precision, and what adds the calls that bring the latter back."""
    if s.dtype == dtype:
        return logits, scales, lambda: None
    wide = {p: s.new(*t.shape, dtype=dtype) for p, t in logits.items()}
    seeds = {p: s.new(*t.shape, dtype=dtype) for p, t in scales.items()}
    for p, t in logits.items():
        s.program.add(steps.copy(t, wide[p]), wide[p], t)

    def after() -> None:
        for p, t in scales.items():
            s.program.add(steps.copy(seeds[p], t), seeds[p], t)

    return wide, seeds, after


def _penalise(
    s: Stack, rows: Mapping[str, slice], places: Mapping[str, list[Penalty]], every: int, value: Tensor,
    setting: Setting,
) -> None:  # fmt: skip
    """The penalties' values and the direction r_0 of the sweep, from the gradients to the samples."""
    g, r = s.adjoint(0, slice(s.left - s.n_tail, s.left)), s.tangent(0)
    count = sum(map(len, places.values()))
    values = s.new(count, dtype=setting.dtype)
    s.program.part, k = "penalty", 0
    for p, penalties in places.items():
        part = slice(rows[p].start - s.tail.start, rows[p].stop - s.tail.start)
        for j, penalty in enumerate(penalties):
            norm = isinstance(penalty, GradientPenalty | DRAGAN)
            weight = penalty.weight if isinstance(penalty, GradientPenalty | DRAGAN) else penalty.gamma / 2  # type: ignore[attr-defined]
            target = penalty.target if isinstance(penalty, GradientPenalty | DRAGAN) else 0.0
            call = steps.penalty(
                g[part], r[part], values[k], norm=norm, weight=weight, target=target, scale=every, add=j > 0,
                loss_scale=setting.loss_scale,
            )  # fmt: skip
            s.program.add(call, g[part], r[part])
            k += 1
    s.program.add(steps.total(values, value), values)


# ---- the generator


@dataclass
class Joint:
    """One forward pass of the generator for its own update and the discriminator's before it, which does not change it.

    Attributes:
        memory: rows of the discriminator: the samples of the generator's update, then the other's.
        forward: takes the calls; its input ``z`` has the latents in that order.
    """

    memory: Tensor
    forward: Plan


def joint_updates(
    network: Network, critic: Network, loss: str, penalties: Sequence[Penalty], every: int, batch: int,
    setting: Setting, metrics: Mapping[str, Tensor],
) -> tuple[Plan, Plan, Plan] | None:  # fmt: skip
    """A forward pass, a discriminator's update and the generator's update after it, as three plans.

    ``None`` where rows are not independent of each other or of the order of the passes, where the discriminator's rows
    cannot begin with the fakes, or where the batch is cut into parts.
    """
    for layer in (*network.layers, *critic.layers):
        if isinstance(layer, BatchNorm | Dropout) or (isinstance(layer, Affine) and layer.spectral is not None):
            return None
    one_stack = not penalties or setting.operands(False) == setting.reduced
    if not one_stack or _parts(critic, loss, penalties, batch, setting) > 1:
        return None
    n, d = batch // critic.packed, Plan()
    s = _update(d, critic, loss, penalties, every, batch, setting, setting.reduced, metrics, 1.0, before=n)
    if s.before is None or d.inputs["fake"].data_ptr() != s.before[n].data_ptr():
        return None
    joint = Joint(s.before, Plan(role="fakes"))
    g = generator(network, critic, loss, False, batch, setting, metrics, joint)
    return joint.forward, d, g


def generator(
    network: Network, critic: Network, loss: str, compares: bool, batch: int, setting: Setting,
    metrics: Mapping[str, Tensor], joint: Joint | None = None,
) -> Plan:  # fmt: skip
    """Gradients of a generator's update; inputs ``z``, and ``real`` where the loss compares with real samples.

    Args:
        network: the generator.
        critic: the discriminator, ending in logits.
        loss: its kind.
        compares: whether the loss takes real logits too.
        batch: samples.
        setting: what all plans share.
        metrics: the 0-dim tensor ``g_loss`` that is written.
        joint: takes the forward pass, which makes the samples of a discriminator's update too.
    """
    plan, n, dtype = Plan(role="G"), batch // critic.packed, setting.reduced
    segments = [Segment("fake", slice(0, n))]
    if compares:
        segments.insert(0, Segment("real", slice(n, 2 * n)))
    fake = slice(0, n)
    d = _stack(
        plan, critic, segments, setting, dtype, chain=n, input_gradient=True,
        input=None if joint is None else joint.memory[fake],
    )  # fmt: skip
    first = plan if joint is None else joint.forward
    samples = slice(0, batch if joint is None else 2 * batch)
    g = _stack(
        first, network, [Segment("fake", samples)], setting, dtype, chain=batch, gradients=setting.gradients,
        output=d.value(0, fake) if joint is None else joint.memory[: 2 * n], output_adjoint=d.adjoint(0, fake),
        spread=setting.kernels,
    )  # fmt: skip
    first.inputs["z"] = g.value(0)
    if compares:
        plan.inputs["real"] = d.value(0, slice(n, 2 * n))
        rules.prepare(d, "real")
    rules.prepare(g)
    rules.forward(g)
    g.program, g.trained = plan.program, plan.trained
    rules.prepare(d, "fake")
    rules.forward(d)

    out = len(critic.layers)
    scales = {"fake": d.adjoint(out, fake).view(-1)}
    logits = {s.name: d.value(out, s.rows).reshape(-1) for s in segments}
    plan.program.part = "loss"
    logits, seeds, after = _in_full(d, setting.dtype, logits, scales)
    real = logits.get("real")
    call = steps.generator_loss(loss, logits["fake"], real, seeds["fake"], metrics["g_loss"], setting.loss_scale)
    plan.program.add(call, logits["fake"], real, seeds["fake"])
    after()
    rules.chain(d, fake, fake, below=False)
    rows = slice(0, batch)
    rules.chain(g, rows, rows, below=False)
    rules.gradients(g, None, batch)
    plan.buffers += [*d.owned, *g.owned]
    return plan


def _stack(
    plan: Plan, network: Network, segments: list[Segment], setting: Setting, dtype: torch.dtype, *, chain: int = 0,
    tail: int = 0, shared: int = 0, split: bool = False, gradients: Mapping[Tensor, Tensor] | None = None,
    input_gradient: bool = False, input: Tensor | None = None, output: Tensor | None = None,
    output_adjoint: Tensor | None = None, before: int = 0, spread: bool = False, mixed: Interpolation | None = None,
    share: float = 1.0,
) -> Stack:  # fmt: skip
    return Stack(
        plan.program, network, segments, chain=chain, tail=tail, shared=shared, split=split, dtype=dtype,
        device=setting.device, operand=lambda p: setting.operand(p, dtype), gradients=gradients,
        input_gradient=input_gradient, input=input, output=output, output_adjoint=output_adjoint, before=before,
        spread=spread, mixed=mixed, trained=plan.trained, share=share, kernels=setting.kernels,
    )  # fmt: skip
