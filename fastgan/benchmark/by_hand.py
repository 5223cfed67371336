"""Training by hand in plain PyTorch: what people write, compiled, or as a CUDA graph.

Eager is the usual loop: ``zero_grad``, ``backward``, torch's default Adam, the discriminator's gradients computed in
the generator's update and thrown away. Its fakes are detached, and R1 and R2 share the loss's forward pass. The
compiled forms are one full graph from noise to gradients for each player, with fused Adam outside: by
``torch.func.grad`` twice, or by ``torch.autograd.grad`` twice under ``trace_autograd_ops`` (plain
``create_graph=True`` is refused by the compiler), there with real and fake samples in one call where no layer mixes
rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fastgan.benchmark.workloads import Case, Update
from fastgan.engine import Engine
from fastgan.losses import Loss
from fastgan.optim import Adam
from fastgan.penalties import Penalty, Perturbing
from fastgan.phases import Phase

Tensor = torch.Tensor
Critic = Callable[[Tensor], Tensor]
Slope = Callable[[Critic, Tensor], tuple[Tensor, Tensor]]  # logits, and their gradient per row
_MIXES_ROWS = (nn.modules.batchnorm._BatchNorm,)


class Unable(Exception):
    """Why a variant is not to be had here."""


# ---- the mathematics


def slope(critic: Critic, x: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd twice."""
    x = x.detach().requires_grad_(True)
    y = critic(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y, g


def slope_by_func(critic: Critic, x: Tensor) -> tuple[Tensor, Tensor]:
    """By ``torch.func.grad``."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        y = critic(x)
        return y.sum(), y

    g, y = torch.func.grad(total, has_aux=True)(x)
    return y, g


@dataclass(frozen=True)
class Objective:
    """What a discriminator minimises in one of its phases.

    Attributes:
        loss: of the logits; its share is 0 where ``phase`` is not adversarial.
        phase: its penalties, and their weight.
        packed: samples of a row of the discriminator.
        stacked: real and fake samples go through the discriminator in one call.
    """

    loss: Loss
    phase: Phase
    packed: int = 1
    stacked: bool = False

    def value(
        self, critic: Critic, slope: Slope, real: Tensor, fake: Tensor, alpha: Tensor | None, delta: Tensor | None
    ) -> Tensor:
        """The mean over the batch, 0-dim."""
        logits: dict[object, Tensor] = {}
        slopes: dict[object, Tensor] = {}
        places = {p.place for p in self.phase.penalties}
        pair, n = torch.cat([real, fake]) if self.stacked else None, len(real) // self.packed
        if pair is not None and {"real", "fake"} <= places:
            both, s = slope(critic, pair)
            logits["real"], logits["fake"] = both[:n], both[n:]
            slopes["real"], slopes["fake"] = s[: len(real)], s[len(real) :]
        for penalty in self.phase.penalties:
            key = self._key(penalty)
            if key not in slopes:
                logits[key], slopes[key] = slope(critic, self._at(penalty, real, fake, alpha, delta))
        total: Tensor | None = None
        if self.phase.adversarial:
            if pair is not None and not logits.keys() & {"real", "fake"}:
                both = critic(pair)
                logits["real"], logits["fake"] = both[:n], both[n:]
            for name, x in (("real", real), ("fake", fake)):
                if name not in logits:
                    logits[name] = critic(x)
            total = self.loss.discriminator(logits["real"], logits["fake"]).mean()
        for penalty in self.phase.penalties:
            g = slopes[self._key(penalty)]
            value = penalty.rows(g.reshape(len(g) // self.packed, -1)).mean() * self.phase.every
            total = value if total is None else total + value
        assert total is not None
        return total

    @staticmethod
    def _key(penalty: Penalty) -> object:
        return (penalty.place, penalty.noise) if isinstance(penalty, Perturbing) else penalty.place

    def _at(self, penalty: Penalty, real: Tensor, fake: Tensor, alpha: Tensor | None, delta: Tensor | None) -> Tensor:
        if penalty.place == "interpolated":
            assert alpha is not None
            a = alpha.repeat_interleave(self.packed).view(-1, *[1] * (real.ndim - 1))
            return a * real + (1 - a) * fake
        if isinstance(penalty, Perturbing):
            assert delta is not None
            return real + penalty.noise * delta
        return real if penalty.place == "real" else fake


# ---- the loop


@dataclass(frozen=True)
class Form:
    """How a loop runs.

    Attributes:
        amp: autocast to bf16 around networks and losses.
        compiled: options of torch.compile; ``None`` for eager ops.
        traced: the compiled form differentiates by ``torch.autograd.grad``.
        graph: one CUDA graph of the whole iteration, noise included.
        fused: torch's fused Adam.
    """

    amp: bool = False
    compiled: Mapping[str, Any] | None = None
    traced: bool = False
    graph: bool = False
    fused: bool = False


PLAIN = Form()


class Loop:
    """Networks and optimisers of their own, and the updates.

    Args:
        case: what is trained.
        form: how.
        dtype: of the parameters where it is not theirs: float64 for the reference.

    Raises:
        Unable: the case has something that this loop does not do.
    """

    def __init__(self, case: Case, form: Form = PLAIN, dtype: torch.dtype | None = None) -> None:
        self.case, self.form, self.plain = case, form, case.plain
        given = case.arguments()
        _check(self.plain)
        dtype = dtype or self.plain.dtype
        self.d: nn.Module = given["discriminator"].to(case.device, dtype)
        g: nn.Module | None = given.get("generator")
        self.g = None if g is None else g.to(case.device, dtype)
        self.networks = [n for n in (self.g, self.d) if n is not None]
        self.dtype, self.n = dtype, case.batch
        self.phases = [p for p in self.plain.phases if p.player == "discriminator"]
        self.d_optimizer = self._optimizer(self.d, given.get("d_optimizer"), self.plain._d.lazy)
        self.g_optimizer = None if self.g is None else self._optimizer(self.g, given.get("g_optimizer"), 1.0)
        real, labels, fake = case.samples()
        self.real, self.labels = real.to(dtype), labels
        self.fake = None if fake is None else fake.to(dtype)
        self.averaged: list[Tensor] = []
        if self.plain.ema is not None and self.g is not None:
            self.averaged = [p.detach().clone() for p in self.g.parameters()]
        self.updates = 0
        mixes = any(isinstance(m, _MIXES_ROWS) for m in self.d.modules())
        stacked = form.traced and not mixes and not self.plain.n_classes and self.plain.packed == 1
        self._objectives = [Objective(self.plain.loss, p, self.plain.packed, stacked) for p in self.phases]
        self._d_used = [self._used(o) if form.compiled is not None else [] for o in self._objectives]
        self._g_used = [] if self.g is None else [name for name, p in self.g.named_parameters() if p.requires_grad]
        self._d_grads = [
            self._compiled(partial(self._d_gradients, o, used))
            for o, used in zip(self._objectives, self._d_used, strict=True)
        ]
        self._g_grads = self._compiled(self._g_gradients)

    def _optimizer(self, net: nn.Module, asked: Any, lazy: float) -> torch.optim.Optimizer:
        if isinstance(asked, torch.optim.Optimizer):
            return asked
        rule = asked or Adam()
        kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
        options = {"fused": True, "capturable": True} if self.form.graph else {"fused": True} if self.form.fused else {}
        betas = (rule.betas[0] ** lazy, rule.betas[1] ** lazy)
        return kind(net.parameters(), rule.lr * lazy, betas, rule.eps, rule.weight_decay, **options)

    def _used(self, objective: Objective) -> list[str]:
        """Names of the discriminator's parameters that a phase gives a gradient: the others' optimiser step is none."""
        named = {name: p for name, p in self.d.named_parameters() if p.requires_grad}
        update, rows = self.draw(), slice(0, self.n)
        kept = [(b, b.clone()) for b in self.d.buffers()]  # running statistics, and vectors of spectral norms
        labels = None if self.labels is None else self.labels[rows]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            loss = objective.value(
                self._critic(labels), slope, self.real[rows], self.real[rows].flip(0), update.alpha, update.delta
            )  # fmt: skip
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        with torch.no_grad():
            for b, before in kept:
                b.copy_(before)
        return [name for name, g in zip(named, grads, strict=True) if g is not None]

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Of products, while the loop is made and run."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.case.precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def reduced(self) -> contextlib.AbstractContextManager[object]:
        """Autocast around networks and losses, penalties included, as where it is written around all of it."""
        return torch.autocast(self.case.device.type, torch.bfloat16) if self.form.amp else contextlib.nullcontext()

    # ---- updates

    def iterate(self, given: tuple[list[Update], Update] | None = None) -> None:
        """One iteration, on given noise or on fresh."""
        for k in range(self.plain.n_critic):
            self.d_update(k, given[0][k] if given else self.draw())
        if self.g is not None:
            self.g_update(given[1] if given else self.draw(generator=True))

    def draw(self, generator: bool = False) -> Update:
        """Fresh noise, as people draw it."""
        n = self.n
        on: dict[str, Any] = {"device": self.case.device, "dtype": self.dtype}
        latent, places = self.plain.latent, {p.place for p in self.plain.penalties}
        z = alpha = delta = None
        if self.g is not None:
            z = torch.randn(n, latent, **on) if isinstance(latent, int) else latent(n, torch.default_generator).to(**on)
        if not generator and "interpolated" in places:
            alpha = torch.rand(n // self.plain.packed, **on)
        if not generator and "perturbed" in places:
            delta = torch.randn(self.real[:n].shape, **on)
        return Update(z, alpha, delta)

    def _rows(self, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows = slice(k * self.n, (k + 1) * self.n)
        return (
            self.real[rows],
            None if self.labels is None else self.labels[rows],
            None if self.fake is None else self.fake[rows],
        )

    def d_update(self, k: int, update: Update) -> None:
        """The ``k``-th discriminator update of an iteration, with the lazy penalties that are due."""
        real, labels, fake = self._rows(k)
        if fake is None and self.form.compiled is None:  # a compiled form makes its own in one graph
            fake = self._fakes(update.z, labels)
        parts = zip(self.phases, self._d_grads, self._objectives, self._d_used, strict=True)
        for phase, grads, objective, used in parts:
            if self.updates % phase.every:
                continue
            if self.form.compiled is not None:
                with torch.set_grad_enabled(self.form.traced):
                    found = grads(real, fake, labels, update.z, update.alpha, update.delta)
                self._apply(self.d_optimizer, self.d, used, found)
            else:
                self.d_optimizer.zero_grad()
                with self.reduced():
                    loss = objective.value(self._critic(labels), slope, real, _given(fake), update.alpha, update.delta)
                loss.backward()  # type: ignore[no-untyped-call]
                self.d_optimizer.step()
            if self.plain.loss.clip is not None:
                with torch.no_grad():
                    for p in self.d.parameters():
                        p.clamp_(-self.plain.loss.clip, self.plain.loss.clip)
        self.updates += 1

    def g_update(self, update: Update) -> None:
        """The generator's update, and that of its average."""
        assert self.g is not None
        assert self.g_optimizer is not None
        real, labels, _ = self._rows(self.plain.n_critic - 1)
        if self.form.compiled is not None:
            with torch.set_grad_enabled(self.form.traced):
                grads = self._g_grads(real, labels, update.z)
            self._apply(self.g_optimizer, self.g, self._g_used, grads)
        else:
            self.g_optimizer.zero_grad()
            with self.reduced():
                loss = self._g_loss(self._critic(labels), real, self._call(self.g, update.z, labels))
            loss.backward()  # type: ignore[no-untyped-call]
            self.g_optimizer.step()
        if self.averaged:
            assert self.plain.ema is not None
            assert self.plain.ema.decay is not None
            with torch.no_grad():
                for mean, p in zip(self.averaged, self.g.parameters(), strict=True):
                    mean.lerp_(p, 1 - self.plain.ema.decay)

    def _fakes(self, z: Tensor | None, labels: Tensor | None) -> Tensor:
        assert self.g is not None
        with self.reduced():
            return self._call(self.g, z, labels).detach()

    def _call(self, net: nn.Module, x: Tensor | None, labels: Tensor | None) -> Tensor:
        out: Tensor = net(x) if labels is None else net(x, labels)
        return out.to(self.dtype)

    def _critic(self, labels: Tensor | None) -> Critic:
        return lambda x: self._call(self.d, x, labels)

    def _g_loss(self, critic: Critic, real: Tensor, fake: Tensor) -> Tensor:
        loss = self.plain.loss
        return loss.generator(critic(fake), critic(real).detach() if loss.compares else None).mean()

    # ---- compiled

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.form.compiled is None:
            return function
        return torch.compile(function, fullgraph=True, dynamic=False, **self.form.compiled)

    def _pure(self, net: nn.Module, params: dict[str, Tensor], labels: Tensor | None) -> Critic:
        def call(x: Tensor) -> Tensor:
            out: Tensor = functional_call(net, params, (x,) if labels is None else (x, labels))
            return out.to(self.dtype)

        return call

    def _d_gradients(
        self, objective: Objective, used: list[str], real: Tensor, fake: Tensor | None, labels: Tensor | None,
        z: Tensor | None, alpha: Tensor | None, delta: Tensor | None,
    ) -> Sequence[Tensor]:  # fmt: skip
        if fake is None:
            with torch.no_grad():
                fake = self._fakes(z, labels)
        if self.form.traced:
            with self.reduced():
                loss = objective.value(self._critic(labels), slope, real, fake, alpha, delta)
            return torch.autograd.grad(loss, _named(self.d, used))

        def value(params: dict[str, Tensor]) -> Tensor:
            with self.reduced():
                critic = self._pure(self.d, _detached(self.d) | params, labels)
                return objective.value(critic, slope_by_func, real, fake, alpha, delta)

        return tuple(torch.func.grad(value)(_detached(self.d, used)).values())

    def _g_gradients(self, real: Tensor, labels: Tensor | None, z: Tensor | None) -> Sequence[Tensor]:
        assert self.g is not None
        if self.form.traced:
            with self.reduced():
                loss = self._g_loss(self._critic(labels), real, self._call(self.g, z, labels))
            return torch.autograd.grad(loss, _named(self.g, self._g_used))
        g = self.g

        def value(params: dict[str, Tensor]) -> Tensor:
            with self.reduced():
                critic = self._pure(self.d, _detached(self.d), labels)
                return self._g_loss(critic, real, self._pure(g, _detached(g) | params, labels)(_given(z)))

        return tuple(torch.func.grad(value)(_detached(g, self._g_used)).values())

    @torch.no_grad()
    def _apply(
        self, optimizer: torch.optim.Optimizer, net: nn.Module, used: list[str], grads: Iterable[Tensor]
    ) -> None:  # fmt: skip
        for p in net.parameters():
            p.grad = None
        for p, grad in zip(_named(net, used), grads, strict=True):
            p.grad = grad if grad.stride() == p.stride() else grad.contiguous()
        optimizer.step()


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _named(net: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    named = dict(net.named_parameters())
    return [named[name] for name in names]


def _detached(net: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The same memory."""
    named = dict(net.named_parameters())
    return {name: named[name].detach() for name in (named if names is None else names)}


def _check(plain: Engine) -> None:
    """Does the loop do what this engine does?"""
    if plain._sigmoid is not None:
        raise Unable("the discriminator ends in Sigmoid: let it return the logits")
    if plain.ema is not None and plain.ema.decay is None:
        raise Unable("the average has a half-life: give a decay")
    for name, rule in (("g_optimizer", plain.g_optimizer), ("d_optimizer", plain.d_optimizer)):
        if isinstance(rule, Adam) and rule.schedule is not None:
            raise Unable(f"{name} has a schedule: leave it out")
