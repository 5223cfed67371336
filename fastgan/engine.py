"""The engine: a generator and a discriminator in, alternating updates out.

An iteration is a list of phases. A phase updates one player from an adversarial loss, penalties, or both; it is
data (:class:`Phase`), and the engine runs it. Here every phase goes through autograd in PyTorch ops: these are
the numbers that any faster path is held to.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastgan import ema as averaging
from fastgan import losses, noise
from fastgan.backend import Backend, checked
from fastgan.ema import EMA
from fastgan.errors import InputError, unknown
from fastgan.noise import Stream
from fastgan.optim import Adam, Updater
from fastgan.penalties import Penalty, Perturbing, Place

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Latent = int | Callable[[int, torch.Generator], torch.Tensor]
Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]
State = dict[str, Any]

_METRICS = ("d_loss", "g_loss", "d_real", "d_fake")
_MIXES_ROWS = (nn.modules.batchnorm._BatchNorm,)
_SCALE_START, _SCALE_LEAST, _SCALE_GROWTH_INTERVAL = 2.0**16, 2.0**-14, 2000


@dataclass(frozen=True)
class Phase:
    """One update of one player.

    Attributes:
        player: whose parameters change.
        adversarial: whether the loss is part of it.
        penalties: gradient penalties that are part of it.
        every: runs after every so many updates of the player, the first one included.
    """

    player: Literal["discriminator", "generator"]
    adversarial: bool
    penalties: tuple[Penalty, ...] = ()
    every: int = 1


class Engine:
    """Trains a generator against a discriminator.

    Args:
        generator: ``z [B, latent] -> [B, ...]``; with classes ``(z, labels) -> [B, ...]``.
        discriminator: ``[B, ...] -> logits [B, ...]``, one or more per sample; with classes ``(x, labels)``.
            One that ends in ``nn.Sigmoid`` is trained on that layer's input.
        latent: size of the standard normal latent, or ``(batch, torch.Generator) -> tensor`` on the CPU.
        loss: a name from :data:`fastgan.losses.LOSSES`, or a :class:`fastgan.losses.Loss`.
        penalties: from :mod:`fastgan.penalties`; several may be given.
        n_critic: discriminator updates per iteration.
        g_optimizer: :class:`Adam`, :class:`AdamW`, or a ``torch.optim`` optimiser over the same parameters.
        d_optimizer: the same for the discriminator.
        ema: of the generator: ``None``, a decay, or :class:`EMA`.
        precision: ``"auto"`` is bf16 on GPUs that have it and fp32 elsewhere. Penalties are always fp32. Modules in
            float64 train in float64 whatever is asked for.
        backend: ``"auto"`` and ``"reference"`` run PyTorch ops; ``"triton"`` is refused, as no phase has kernels.
        device: ``"auto"`` is the GPU where there is one.
        seed: of all noise.
        n_classes: number of classes of a conditional pair, 0 for an unconditional one.

    Raises:
        InputError: an argument is out of its range, or the networks do not fit together.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent: Latent = 100,
        loss: str | losses.Loss = "non-saturating",
        penalties: Sequence[Penalty] = (),
        n_critic: int = 1,
        g_optimizer: Adam | torch.optim.Optimizer | None = None,
        d_optimizer: Adam | torch.optim.Optimizer | None = None,
        ema: float | EMA | None = 0.999,
        precision: Precision = "auto",
        backend: Backend = "auto",
        device: str | torch.device = "auto",
        seed: int = 0,
        n_classes: int = 0,
    ) -> None:
        if isinstance(latent, int) and latent < 1:
            raise InputError(f"Engine: latent is {latent}, expected >= 1")
        if not isinstance(n_critic, int) or n_critic < 1:
            raise InputError(f"Engine: n_critic is {n_critic}, expected a whole number >= 1")
        if not isinstance(ema, EMA | int | float | None):
            raise InputError(f"Engine: ema is {ema!r}, expected None, a decay or fastgan.EMA")
        if checked(backend, "Engine") == "triton":
            raise InputError(
                "Engine: backend is 'triton', but every phase runs in PyTorch ops: use 'auto' or 'reference'"
            )
        self.device = _device(device)
        self.generator, self.discriminator = generator.to(self.device), discriminator.to(self.device)
        self.latent, self.loss, self.n_critic = latent, losses.get(loss), n_critic
        self.penalties, self.seed, self.n_classes = tuple(penalties), int(seed), n_classes

        self._sets_precision = _old_precision_setting()
        self.sample_shape = self._probe()
        parameters = [p for p in (*generator.parameters(), *discriminator.parameters()) if p.is_floating_point()]
        self.dtype = parameters[0].dtype if parameters else torch.float32
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(f"Engine: parameters are {self.dtype}, expected float32 or float64; see precision")
        self.precision = self._precision(precision)
        lazy = sorted({p.interval for p in self.penalties if p.interval > 1})
        self.phases = (
            Phase("discriminator", True, tuple(p for p in self.penalties if p.interval == 1)),
            *(Phase("discriminator", False, tuple(p for p in self.penalties if p.interval == k), k) for k in lazy),
            Phase("generator", True),
        )
        self.g_optimizer, self.d_optimizer = g_optimizer or Adam(), d_optimizer or Adam()
        self._g = Updater("g_optimizer", generator, self.g_optimizer)
        self._d = Updater("d_optimizer", discriminator, self.d_optimizer, sum(1 / k for k in lazy))
        self.ema = EMA(decay=ema) if isinstance(ema, int | float) else ema
        self.generator_ema = averaging.copy_of(generator) if self.ema else None

        # what a step changes: counters are kept on the device for the step and on the host for control flow
        self.d_updates, self.g_updates, self.images, self.samples, self.batch = 0, 0, 0, 0, 0
        self._counters = torch.zeros(4, dtype=torch.int64, device=self.device)
        self._d_count, self._g_count, self._image_count, self._averaged = self._counters.unbind()
        self._metrics = torch.full((len(_METRICS),), math.nan, dtype=self.dtype, device=self.device)
        intervals = [phase.every for phase in self.phases if phase.penalties]
        self._penalty = {every: torch.full_like(self._metrics[0], math.nan) for every in intervals}
        self._scale = torch.full((), _SCALE_START, device=self.device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self._warn_of_mixed_rows()

    # ---- set-up

    def _precision(self, asked: str) -> str:
        if asked not in get_args(Precision):
            raise unknown("precision", asked, get_args(Precision))
        if self.dtype == torch.float64:
            return "fp64"
        if asked != "auto":
            return asked
        return "bf16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"

    @torch.no_grad()
    def _probe(self) -> tuple[int, ...]:
        """Run both networks once on two samples, in evaluation mode: do they fit, and is the last layer a sigmoid?"""
        self._sigmoid: nn.Module | None = None
        ends: dict[nn.Module, list[torch.Tensor]] = {}
        networks = (self.generator, self.discriminator)
        training = {m: m.training for network in networks for m in network.modules()}
        sigmoids = [m for m in self.discriminator.modules() if isinstance(m, nn.Sigmoid)]
        hooks = [m.register_forward_hook(lambda m, args, out: ends.setdefault(m, []).append(out)) for m in sigmoids]
        labels = torch.zeros(2, dtype=torch.int64, device=self.device) if self.n_classes else None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            try:
                for network in networks:
                    network.eval()
                dtype = next((p.dtype for p in self.generator.parameters()), torch.float32)
                z = self._latents(2, Stream.SAMPLE, 0, dtype=dtype)
                x = _call("generator", self.generator, z, labels, f"latents {_shape(z)}")
                what = f"the generator's output {_shape(x)}"
                with torch.enable_grad():
                    logits = _call("discriminator", self.discriminator, x, labels, what)
            finally:
                for hook in hooks:
                    hook.remove()
                for module, mode in training.items():
                    module.training = mode
        if x.ndim < 2 or len(x) != 2:
            raise InputError(f"generator: gave {_shape(x)} for 2 latents, expected [2, ...]")
        if logits.ndim < 1 or len(logits) != 2:
            raise InputError(f"discriminator: gave {_shape(logits)} for 2 samples, expected [2] or [2, ...]")
        for module, outs in ends.items():
            if outs[-1].data_ptr() == logits.data_ptr() and outs[-1].numel() == logits.numel():
                if len(outs) > 1:
                    raise InputError(
                        "discriminator: its final Sigmoid is used elsewhere too: give each use its own module"
                    )
                self._sigmoid = module
        if self._sigmoid is None and _ends_in_sigmoid(logits):
            warnings.warn(
                "the discriminator ends in torch.sigmoid, and its probabilities are taken for logits: return the "
                "logits, or end in nn.Sigmoid, which is recognised",
                stacklevel=3,
            )
        return tuple(x.shape[1:])

    def _warn_of_mixed_rows(self) -> None:
        if self.penalties:
            for name, module in self.discriminator.named_modules():
                if isinstance(module, _MIXES_ROWS):
                    warnings.warn(
                        f"discriminator layer {name!r} ({type(module).__name__}) mixes the batch: a penalty "
                        "on each sample's gradient is ill-defined there; use layer, instance or no normalisation",
                        stacklevel=3,
                    )
                    return

    # ---- noise and inputs

    def _latents(
        self, batch: int, stream: Stream, step: noise.Step, *, first_row: int = 0, seed: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        seed = self.seed if seed is None else seed
        dtype = self.dtype if dtype is None else dtype
        if isinstance(self.latent, int):
            return noise.normal(
                batch, self.latent, seed=seed, stream=stream, step=step, first_row=first_row, device=self.device,
                dtype=dtype,
            )  # fmt: skip
        key = noise.bits(1, 2, seed=seed, stream=stream, step=int(step), first_row=first_row, device="cpu")[0].tolist()
        generator = torch.Generator().manual_seed(key[0] << 31 ^ key[1])
        z = self.latent(batch, generator)
        if len(z) != batch:
            raise InputError(f"Engine: latent gave {_shape(z)}, expected [{batch}, ...]")
        return z.to(self.device, dtype if z.is_floating_point() else None)

    def _given_latents(self, what: str, z: torch.Tensor, batch: int) -> torch.Tensor:
        expected = (batch, self.latent) if isinstance(self.latent, int) else (batch, *z.shape[1:])
        if tuple(z.shape) != expected:
            raise InputError(f"{what} has shape {_shape(z)}, expected {list(expected)}")
        return z.to(self.device, self.dtype if z.is_floating_point() else None)

    def _given(self, what: str, x: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
        if x is None:
            return None
        if tuple(x.shape) != shape:
            raise InputError(f"{what}: has shape {_shape(x)}, expected {list(shape)}")
        return x.to(self.device, self.dtype)

    def _real(self, what: str, real: torch.Tensor) -> torch.Tensor:
        if not isinstance(real, torch.Tensor) or tuple(real.shape[1:]) != self.sample_shape or not len(real):
            got = _shape(real) if isinstance(real, torch.Tensor) else type(real).__name__
            raise InputError(
                f"{what}: real is {got}, but the generator makes [B, {', '.join(map(str, self.sample_shape))}]"
            )
        if not real.is_floating_point():
            raise InputError(f"{what}: real has dtype {real.dtype}, expected floating point")
        return real.to(self.device, self.dtype)

    def _labels(self, what: str, labels: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        if not self.n_classes:
            if labels is not None:
                raise InputError(f"{what}: labels were given, but the networks are not conditional: see n_classes")
            return None
        if labels is None:
            raise InputError(
                f"{what}: the networks are conditional ({self.n_classes} classes), but no labels were given"
            )
        if tuple(labels.shape) != (batch,) or labels.is_floating_point():
            raise InputError(f"{what}: labels are {labels.dtype} {_shape(labels)}, expected integers [{batch}]")
        if labels.device.type == "cpu":  # elsewhere the check would wait for the device
            low, high = (int(v) for v in labels.aminmax())
            if low < 0 or high >= self.n_classes:
                raise InputError(f"{what}: labels are in {low} ... {high}, expected 0 ... {self.n_classes - 1}")
        return labels.to(self.device, torch.int64)

    # ---- training

    def step(self, real: torch.Tensor | Iterator[Batch], labels: torch.Tensor | None = None) -> None:
        """One iteration: ``n_critic`` discriminator updates and one generator update.

        Args:
            real: ``[n_critic * B, ...]``, taken in order, or a feed: an iterator of ``[B, ...]`` tensors or
                of ``(tensor, labels)`` pairs, from which ``n_critic`` batches are taken.
            labels: ``[n_critic * B]`` integers for conditional networks, where ``real`` is a tensor.

        Raises:
            InputError: a shape, dtype or number of rows does not fit.
        """
        if isinstance(real, torch.Tensor):
            if not len(real) or len(real) % self.n_critic:
                raise InputError(f"step: real has {len(real)} rows, expected a multiple of n_critic = {self.n_critic}")
            parts = real.chunk(self.n_critic)
            batches: Iterator[Batch] = iter(
                list(zip(parts, labels.chunk(self.n_critic), strict=True)) if labels is not None else parts
            )
        elif isinstance(real, Iterator):
            batches = real
        else:
            raise InputError(
                f"step: real is a {type(real).__name__}, expected a tensor or an iterator: wrap it in iter()"
            )
        for _ in range(self.n_critic):
            batch = next(batches, None)
            if batch is None:
                raise InputError(f"step: the feed ended; an iteration takes n_critic = {self.n_critic} batches")
            x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
            y = rest[0] if rest and self.n_classes else None
            self.d_step(x, labels=y)
        self.g_step(real=x if self.loss.compares else None, labels=y)

    def d_step(
        self,
        real: torch.Tensor,
        z: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        delta: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
    ) -> None:
        """One discriminator update, and one more for each lazy penalty that is due.

        Args:
            real: ``[B, ...]``, floating point, of the generator's output shape.
            z: latents ``[B, latent]``; drawn where not given.
            alpha: weight of the real sample in each interpolation, ``[B]`` in ``[0, 1]``; drawn where not given.
            delta: standard normal perturbation of DRAGAN, of ``real``'s shape; drawn where not given.
            labels: ``[B]`` integers for conditional networks; fakes are made for the same labels.

        Raises:
            InputError: a shape or dtype does not fit.
        """
        real = self._real("d_step", real)
        batch = self.batch = len(real)
        labels = self._labels("d_step", labels, batch)
        alpha = self._given("d_step: alpha", alpha, (batch,))
        delta = self._given("d_step: delta", delta, tuple(real.shape))
        step = self._d_count if isinstance(self.latent, int) else self.d_updates
        z = self._latents(batch, Stream.D_LATENT, step) if z is None else self._given_latents("d_step: z", z, batch)
        with torch.no_grad(), self._reduced():
            fake = self.generator(*_with(z, labels)).to(self.dtype)
        for phase in self.phases:
            if phase.player == "discriminator" and self.d_updates % phase.every == 0:
                self._discriminator_update(phase, _Points(self, real, fake, labels, alpha, delta))
        self.d_updates += 1
        self.images += batch
        self._d_count.add_(1)
        self._image_count.add_(batch)

    def _discriminator_update(self, phase: Phase, points: _Points) -> None:
        adversarial = penalty = None
        if phase.adversarial:
            with self._reduced():
                r, f = points.logits("real"), points.logits("fake")
            adversarial = self.loss.discriminator(r, f).mean()
            self._measure(d_loss=adversarial, d_real=r.mean(), d_fake=f.mean())
        if phase.penalties:
            points = points if self._is_full else points.fresh()  # logits are shared where their precision allows
            with self._full():
                penalty = torch.stack([p.rows(points.gradient(p)).mean() for p in phase.penalties]).sum()
            self._penalty[phase.every].copy_(penalty.detach())
            penalty = penalty * phase.every if phase.every > 1 else penalty
        self._apply(self._d, adversarial, penalty, self._d_count)
        if self.loss.clip is not None:
            with torch.no_grad():
                for p in self._d.params:
                    p.clamp_(-self.loss.clip, self.loss.clip)

    def g_step(
        self,
        z: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
    ) -> None:
        """One generator update, and one of the average.

        Args:
            z: latents ``[B, latent]``; drawn where not given, as many as the last discriminator update had.
            real: ``[B, ...]``, only where the loss compares with it (relativistic).
            labels: ``[B]`` integers for conditional networks; drawn uniformly where not given.

        Raises:
            InputError: a shape or dtype does not fit, or the batch size is not known yet.
        """
        batch = len(real) if real is not None else len(z) if z is not None else self.batch
        if not batch:
            raise InputError("g_step: the batch size is not known: give z, or call d_step first")
        step = self._g_count if isinstance(self.latent, int) else self.g_updates
        z = self._latents(batch, Stream.G_LATENT, step) if z is None else self._given_latents("g_step: z", z, batch)
        if self.n_classes and labels is None and not self.loss.compares:
            labels = noise.integers(
                batch, self.n_classes, seed=self.seed, stream=Stream.G_LABELS, step=self._g_count, device=self.device
            )
        labels = self._labels("g_step", labels, batch)
        r = None
        if self.loss.compares:
            if real is None:
                raise InputError(f"g_step: the {self.loss.name} loss compares with real samples: give real")
            with torch.no_grad(), self._reduced():
                r = self._critic(self._real("g_step", real), labels)
        with self._reduced():
            fake = self.generator(*_with(z, labels))
            f = self._critic(fake, labels)
        loss = self.loss.generator(f, r).mean()
        self._apply(self._g, loss, None, self._g_count)
        self._measure(g_loss=loss)
        self.g_updates += 1
        self._g_count.add_(1)
        if self.ema is not None and self.generator_ema is not None:
            weight = self.ema.weight(self._image_count, self._image_count - self._averaged)
            averaging.update(self.generator_ema, self.generator, weight)
            self._averaged.copy_(self._image_count)

    def _apply(
        self, updater: Updater, adversarial: torch.Tensor | None, penalty: torch.Tensor | None, update: torch.Tensor
    ) -> None:
        """Differentiate and update: in full precision the sum at once, otherwise each part in its own precision."""
        if self._is_full:
            terms = [term for term in (adversarial, penalty) if term is not None]
            parts = [(terms[0] if len(terms) == 1 else terms[0] + terms[1], False)]
        else:
            parts = [(term, i == 0) for i, term in enumerate((adversarial, penalty)) if term is not None]
        for p in updater.params:
            p.grad = None  # its memory, still in the cache, takes the new gradient
        total: list[torch.Tensor | None] = [None] * len(updater.params)
        for value, reduced in parts:
            scale = self._scale if reduced and self.precision == "fp16" else None
            with self._matmul("high" if reduced and self.precision == "tf32" else "highest"):
                grads = torch.autograd.grad(value, updater.params, scale, allow_unused=True)
            for i, (g, before) in enumerate(zip(grads, total, strict=True)):
                if g is not None:
                    g = g if scale is None else g / scale
                    total[i] = g if before is None else before + g
        updater.apply(total, update)
        if self.precision == "fp16" and adversarial is not None:
            self._adapt_scale(updater.grad_norm)

    @torch.no_grad()
    def _adapt_scale(self, grad_norm: torch.Tensor) -> None:
        good = torch.isfinite(grad_norm)
        self._good_steps.copy_(torch.where(good, self._good_steps + 1, 0))
        grow = self._good_steps >= _SCALE_GROWTH_INTERVAL
        self._scale.mul_(torch.where(good, torch.where(grow, 2.0, 1.0), 0.5)).clamp_(min=_SCALE_LEAST)
        self._good_steps.mul_(~grow)

    @torch.no_grad()
    def _measure(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._metrics[_METRICS.index(name)].copy_(value)

    # ---- precision

    @property
    def _is_full(self) -> bool:
        return self.precision in ("fp32", "fp64")

    @contextlib.contextmanager
    def _matmul(self, kind: str) -> Iterator[None]:
        """fp32 products with TF32 (``high``) or without (``highest``)."""
        if not self._sets_precision:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(kind)
        on_gpu = self.device.type == "cuda"
        try:
            with torch.backends.cudnn.flags(allow_tf32=kind == "high") if on_gpu else contextlib.nullcontext():
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    @contextlib.contextmanager
    def _reduced(self) -> Iterator[None]:
        """The precision of everything but penalties."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        cast = torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()
        with self._matmul("high" if self.precision == "tf32" else "highest"), cast:
            yield

    @contextlib.contextmanager
    def _full(self) -> Iterator[None]:
        """The precision of penalties: that of the parameters."""
        with self._matmul("highest"), torch.autocast(self.device.type, enabled=False):
            yield

    def _critic(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Logits, in the parameters' precision: the input of the final sigmoid where there is one."""
        hook = self._sigmoid.register_forward_hook(lambda m, args, out: args[0]) if self._sigmoid else None
        try:
            logits: torch.Tensor = self.discriminator(*_with(x, labels))
        finally:
            if hook is not None:
                hook.remove()
        return logits.to(self.dtype)

    # ---- what came of it

    def metrics(self) -> dict[str, float]:
        """Figures of the last updates; the only call that waits for the device.

        Returns:
            ``d_loss`` and ``g_loss`` (without penalties), ``penalty`` (sum of the weighted penalties, each at
            its last application), ``d_real`` and ``d_fake`` (mean logits in the last discriminator update),
            ``d_grad_norm`` and ``g_grad_norm`` (of the last gradients, penalties included), and ``skipped_steps``
            (updates left out since the start because a gradient was not finite). NaN where nothing was measured yet.
        """
        skipped = (self._d.skipped + self._g.skipped).to(self.dtype)
        nan = torch.full_like(skipped, math.nan)
        penalty = torch.stack(list(self._penalty.values()) or [nan]).sum()
        values = torch.stack([*self._metrics, penalty, self._d.grad_norm, self._g.grad_norm, skipped]).tolist()
        names = (*_METRICS, "penalty", "d_grad_norm", "g_grad_norm", "skipped_steps")
        return dict(zip(names, values, strict=True))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int | None = None,
        ema: bool = True,
        labels: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Samples of the generator, ``[n, ...]`` on the engine's device.

        Args:
            n: how many.
            seed: the same seed gives the same latents; without one every call draws fresh ones.
            ema: take the averaged generator where there is one; it runs in evaluation mode in either case.
            labels: ``[n]`` integers for conditional networks; drawn uniformly where not given.
            latents: ``[n, latent]`` instead of drawn ones.
        """
        network = self.generator_ema if ema and self.generator_ema is not None else self.generator
        step = 0
        if seed is None:
            self.samples += 1
            seed, step = self.seed, self.samples
        if self.n_classes and labels is None:
            labels = noise.integers(
                n, self.n_classes, seed=seed, stream=Stream.SAMPLE_LABELS, step=step, device=self.device
            )
        labels = self._labels("sample", labels, n)
        latents = None if latents is None else self._given_latents("sample: latents", latents, n)
        training = {m: m.training for m in network.modules()}
        out = torch.empty((n, *self.sample_shape), device=self.device, dtype=self.dtype)
        network.eval()
        try:
            for i in range(0, n, 256):
                rows = min(256, n - i)
                if latents is None:
                    z = self._latents(rows, Stream.SAMPLE, step, first_row=i, seed=seed)
                else:
                    z = latents[i : i + rows]
                with self._reduced():
                    out[i : i + rows] = network(*_with(z, None if labels is None else labels[i : i + rows]))
        finally:
            for module, mode in training.items():
                module.training = mode
        return out

    def explain(self) -> str:
        """What each phase does and on which path; for what is not as asked or as usual, the reason."""
        lines = [f"{self.precision} on {self.device}, {self.loss.name} loss"]
        for phase in self.phases:
            terms = [self.loss.name] * phase.adversarial + [repr(p) for p in phase.penalties]
            how_often = f"{self.n_critic}x per iteration" if phase.player == "discriminator" else "once per iteration"
            if phase.every > 1:
                how_often = f"after every {phase.every}th update, times {phase.every}"
            lines.append(f"{phase.player}: {' + '.join(terms)} ({how_often}): autograd, PyTorch ops")
        notes = []
        if self._sigmoid is not None:
            notes.append("the discriminator ends in Sigmoid: it is trained on that layer's input, the logits")
        if not self._sets_precision:
            notes.append("torch.backends...fp32_precision is set: float32 products run as it says, penalties included")
        if self.loss.clip is not None:
            notes.append(f"discriminator parameters are clamped to +-{self.loss.clip} after each update")
        if any(p.every > 1 for p in self.phases):
            if self._d.own:
                group = self._d.optimizer.param_groups[0]
                notes.append(f"lazy penalties: the discriminator's Adam runs with lr x {self._d.lazy:.4g} and betas "
                             f"{tuple(round(b, 6) for b in group['betas'])}")  # fmt: skip
            else:
                notes.append("lazy penalties: d_optimizer is yours, its lr and betas are left as they are")
        if self.precision in ("bf16", "fp16", "tf32") and self.penalties:
            notes.append("penalties run in fp32, on a forward pass of their own")
        for updater, name in ((self._d, "d_optimizer"), (self._g, "g_optimizer")):
            if not updater.own and updater.fused:
                notes.append(f"{name}: your {type(updater.optimizer).__name__} runs with torch's fused kernels")
            elif not updater.own:
                notes.append(f"{name}: {type(updater.optimizer).__name__} has no guard against non-finite gradients "
                             "of its own: parameters and state are copied before each update")  # fmt: skip
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])

    # ---- saving

    def state_dict(self) -> State:
        """Everything a later run needs to go on as if it had never stopped: nested dicts of tensors and numbers."""
        return {
            "generator": dict(self.generator.state_dict()),
            "discriminator": dict(self.discriminator.state_dict()),
            "generator_ema": dict(self.generator_ema.state_dict()) if self.generator_ema is not None else None,
            "g_optimizer": self._g.state_dict(),
            "d_optimizer": self._d.state_dict(),
            "counters": {key: getattr(self, key) for key in _COUNTERS},
            "averaged": self._averaged,
            "metrics": self._metrics,
            "penalty": list(self._penalty.values()),
            "seed": self.seed,
            "loss_scale": {"scale": self._scale, "good_steps": self._good_steps},
            "torch_rng": {"cpu": torch.get_rng_state()}
            | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; torch's own random state, which dropout uses, is set too.

        Raises:
            InputError: the state is of other networks; names the first tensor that does not fit.
        """
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        if self.generator_ema is not None:
            networks["generator_ema"] = self.generator_ema
        for name, network in networks.items():
            source = "generator" if name == "generator_ema" and state.get(name) is None else name
            _check_fits(source, state.get(source), network)
        for name, network in networks.items():
            network.load_state_dict(state[name] if state.get(name) is not None else state["generator"])
        self._g.load_state_dict(state["g_optimizer"])
        self._d.load_state_dict(state["d_optimizer"])
        for key in _COUNTERS:
            setattr(self, key, int(state["counters"][key]))
        with torch.no_grad():
            for count, value in zip(self._counters, (self.d_updates, self.g_updates, self.images), strict=False):
                count.fill_(value)
            self._averaged.copy_(state["averaged"])
            self._metrics.copy_(state["metrics"])
            for penalty, saved in zip(self._penalty.values(), state["penalty"], strict=False):
                penalty.copy_(saved)
            self._scale.copy_(state["loss_scale"]["scale"])
            self._good_steps.copy_(state["loss_scale"]["good_steps"])
        self.seed = int(state["seed"])
        torch.set_rng_state(state["torch_rng"]["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state["torch_rng"]:
            torch.cuda.set_rng_state(state["torch_rng"]["cuda"].cpu(), self.device)

    @property
    def iterations(self) -> int:
        """Iterations made: generator updates."""
        return self.g_updates


_COUNTERS = ("d_updates", "g_updates", "images", "samples", "batch")


class _Points:
    """The samples of one discriminator update, their logits and their gradients, each made when first asked for."""

    def __init__(
        self,
        engine: Engine,
        real: torch.Tensor,
        fake: torch.Tensor,
        labels: torch.Tensor | None,
        alpha: torch.Tensor | None,
        delta: torch.Tensor | None,
    ) -> None:
        self.engine, self.real, self.fake, self.labels, self.alpha, self.delta = (
            engine,
            real,
            fake,
            labels,
            alpha,
            delta,
        )
        self._x: dict[str, torch.Tensor] = {}
        self._logits: dict[str, torch.Tensor] = {}
        self._gradient: dict[str, torch.Tensor] = {}

    def fresh(self) -> _Points:
        """The same samples with nothing computed from them yet."""
        return _Points(self.engine, self.real, self.fake, self.labels, self.alpha, self.delta)

    def logits(self, place: Place) -> torch.Tensor:
        """Logits of the real or the fake samples, ``[B, ...]``."""
        return self._logits_at(place, self.real if place == "real" else self.fake)

    def gradient(self, penalty: Penalty) -> torch.Tensor:
        """Gradient of each sample's summed logits with respect to the sample, differentiable, ``[B, ...]``."""
        key = f"perturbed by {penalty.noise}" if isinstance(penalty, Perturbing) else penalty.place
        if key not in self._gradient:
            logits = self._logits_at(key, self._samples(penalty))
            (self._gradient[key],) = torch.autograd.grad(logits.sum(), self._x[key], create_graph=True)
        return self._gradient[key]

    def _logits_at(self, key: str, x: torch.Tensor) -> torch.Tensor:
        if key not in self._logits:
            self._x[key] = x.detach().requires_grad_(bool(self.engine.penalties))
            self._logits[key] = self.engine._critic(self._x[key], self.labels)
        return self._logits[key]

    def _samples(self, penalty: Penalty) -> torch.Tensor:
        engine, real = self.engine, self.real
        keyed: Any = {"seed": engine.seed, "step": engine._d_count, "device": engine.device, "dtype": engine.dtype}
        if penalty.place == "real":
            return real
        if penalty.place == "fake":
            return self.fake
        if penalty.place == "interpolated":
            alpha = self.alpha
            if alpha is None:
                alpha = noise.uniform(len(real), 1, stream=Stream.ALPHA, **keyed)
            alpha = alpha.view(-1, *[1] * (real.ndim - 1))
            return alpha * real + (1 - alpha) * self.fake
        if isinstance(penalty, Perturbing):
            delta = self.delta
            if delta is None:
                delta = noise.normal(len(real), real[0].numel(), stream=Stream.PERTURBATION, **keyed).view_as(real)
            return real + penalty.noise * delta
        raise InputError(
            f"penalty {penalty.name!r}: place is {penalty.place!r}, expected real, fake, interpolated, "
            "or perturbed and an attribute noise"
        )


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"Engine: device is {device!r}, expected 'auto', 'cpu' or 'cuda'") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"Engine: device is {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"Engine: device is {device!r}, but no CUDA device is available")
    return chosen


def _old_precision_setting() -> bool:
    """Whether torch.set_float32_matmul_precision may be used: torch refuses it once the newer setting has been."""
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:
        return False
    return True


def _shape(x: torch.Tensor) -> list[int]:
    return list(x.shape)


def _with(x: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return (x,) if labels is None else (x, labels)


def _call(name: str, network: nn.Module, x: torch.Tensor, labels: torch.Tensor | None, what: str) -> torch.Tensor:
    try:
        out = network(*_with(x, labels))
    except (RuntimeError, ValueError, TypeError, IndexError) as e:
        classes = " and labels" if labels is not None else ""
        raise InputError(f"{name}: does not accept {what}{classes}: {str(e).splitlines()[0]}") from e
    if not isinstance(out, torch.Tensor):
        raise InputError(f"{name}: returned a {type(out).__name__}, expected a tensor")
    return out


def _ends_in_sigmoid(out: torch.Tensor) -> bool:
    node = out.grad_fn
    while node is not None and type(node).__name__.startswith(("View", "Squeeze", "UnsafeView", "ReshapeAlias")):
        node = node.next_functions[0][0]
    return type(node).__name__ == "SigmoidBackward0"


def _check_fits(name: str, state: Mapping[str, Any] | None, network: nn.Module) -> None:
    if state is None:
        raise InputError(f"checkpoint: has no {name}")
    have = network.state_dict()
    for key in [*have, *state]:
        for side, where in ((state, "the checkpoint"), (have, "the network")):
            if key not in side:
                raise InputError(f"checkpoint of another network: {name}.{key} is not in {where}")
        a, b = state[key], have[key]
        if isinstance(b, torch.Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            was, here = (f"{t.dtype} {_shape(t)}" for t in (a, b))
            raise InputError(f"checkpoint of another network: {name}.{key} is {was}, the network's {here}")
