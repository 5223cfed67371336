"""The engine: a generator and a discriminator in, alternating updates out.

An iteration is a list of phases (:mod:`fastgan.phases`). A phase whose networks can be read as chains of known layers
runs in closed form (:mod:`fastgan.plan`), any other through autograd (:mod:`fastgan.autograd`), with the same numbers.
On a GPU closed forms are lists of kernels (:mod:`fastgan.iteration`), and iterations are recorded as CUDA graphs
(:mod:`fastgan.executor`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastgan import costs, losses, noise
from fastgan import ema as averaging
from fastgan import executor as executors
from fastgan.adam import LossScale, Ring
from fastgan.arithmetic import Arithmetic
from fastgan.autograd import Autograd, Points, Samples
from fastgan.backend import Backend, uses_kernels
from fastgan.data.resident import ResidentFeed
from fastgan.ema import EMA, Average
from fastgan.errors import InputError, unknown
from fastgan.executor import Executor, Kind, Variant
from fastgan.iteration import Counts, Iteration, Parts
from fastgan.marks import during, entry, mark
from fastgan.noise import Stream
from fastgan.optim import Adam, Updater
from fastgan.penalties import Penalty
from fastgan.phases import Phase
from fastgan.plan import Plan
from fastgan.planner import Example, Planner

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Latent = int | Callable[[int, torch.Generator], torch.Tensor]
Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]
Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # real samples, labels, given fakes
State = dict[str, Any]

_LOG = logging.getLogger(__name__)
_METRICS = ("d_loss", "g_loss", "d_real", "d_fake")
_UNROLLED = 8  # iterations in one graph, at least, where nothing comes between them
_HISTORY = 64  # iterations whose figures are kept on the device
_MIXES_ROWS = (nn.modules.batchnorm._BatchNorm,)


class Engine:
    """Trains a generator against a discriminator.

    Args:
        generator: ``z [B, latent] -> [B, ...]``; with classes ``(z, labels) -> [B, ...]``. ``None`` trains the
            discriminator alone, on fakes that are given to every step.
        discriminator: ``[B, ...] -> logits [B, ...]``, one or more per sample; with classes ``(x, labels)``.
            One that ends in ``nn.Sigmoid`` is trained on that layer's input. One that packs k samples into a row says
            so in an attribute ``pac`` (:class:`fastgan.models.packing.Packed`) and gives logits ``[B / k, ...]``.
        latent: size of the standard normal latent, or ``(batch, torch.Generator) -> tensor`` on the CPU.
        loss: a name from :data:`fastgan.losses.LOSSES`, or a :class:`fastgan.losses.Loss`.
        penalties: from :mod:`fastgan.penalties`; several may be given.
        n_critic: discriminator updates per iteration.
        g_optimizer: :class:`Adam`, :class:`AdamW`, or a ``torch.optim`` optimiser over the same parameters.
        d_optimizer: the same for the discriminator.
        ema: of the generator: ``None``, a decay, or :class:`EMA`.
        precision: ``"auto"`` is bf16 on GPUs that have it and fp32 elsewhere. Sums, norms, losses, optimisers and
            averages are fp32 at least. Penalties are fp32 in PyTorch ops; in kernels their products take the operands
            of all others. Modules in float64 train in float64 whatever is asked for.
        backend: ``"auto"`` runs closed forms on Triton kernels on a GPU, and in PyTorch ops with native code between
            them on a CPU; ``"reference"`` runs PyTorch ops; ``"triton"`` runs kernels (on a CPU in Triton's
            interpreter) and never falls back.
        device: ``"auto"`` is the GPU where there is one.
        seed: of all noise.
        n_classes: number of classes of a conditional pair, 0 for an unconditional one.
        closed_form: run phases without autograd where that is possible; :meth:`explain` says where, and why not.
        executor: how :meth:`step` runs an iteration. ``"graph"``, on a GPU what ``"auto"`` means, records it as a CUDA
            graph; ``"dependent"`` lets each kernel of that graph start before the one before it has ended (compute
            capability 9.0); ``"persistent"`` runs an iteration that is all kernels (of MLPs) as one cooperative launch,
            or as several of whole updates, and has not been timed; ``"eager"`` records nothing.

    The parameters become views of one flat tensor per network: ``state_dict()`` and in-place changes work as ever.

    Raises:
        InputError: an argument is out of its range, or the networks do not fit together.
    """

    def __init__(
        self,
        generator: nn.Module | None,
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
        closed_form: bool = True,
        executor: Kind = "auto",
    ) -> None:
        if isinstance(latent, int) and latent < 1:
            raise InputError(f"Engine: latent is {latent}, expected >= 1")
        if not isinstance(n_critic, int) or n_critic < 1:
            raise InputError(f"Engine: n_critic is {n_critic}, expected a whole number >= 1")
        if not isinstance(ema, EMA | int | float | None):
            raise InputError(f"Engine: ema is {ema!r}, expected None, a decay or fastgan.EMA")
        if generator is None and n_classes:
            raise InputError("Engine: n_classes is given, but there is no generator to make samples of a class")
        self.device = device_of("Engine: device", device)
        self.generator = generator.to(self.device) if generator is not None else None
        self.discriminator = discriminator.to(self.device)
        self.latent, self.loss, self.n_critic = latent, losses.get(loss), n_critic
        if not isinstance(penalties, Sequence) or not all(hasattr(p, "rows") for p in penalties):
            raise InputError(f"Engine: penalties is {penalties!r}, expected a sequence of fastgan.penalties")
        self.penalties, self.seed, self.n_classes = tuple(penalties), int(seed), n_classes

        self.packed = getattr(discriminator, "pac", 1)
        if not isinstance(self.packed, int) or self.packed < 1:
            raise InputError(f"discriminator: its attribute pac is {self.packed!r}, expected a whole number >= 1")
        networks = [n for n in (generator, discriminator) if n is not None]
        parameters = [p for n in networks for p in n.parameters() if p.is_floating_point()]
        self.dtype = parameters[0].dtype if parameters else torch.float32
        self._sigmoid: nn.Module | None = None
        self.sample_shape: tuple[int, ...] | None = None  # without a generator, that of the first batch
        if self.generator is not None:
            self._probe(self._probe_generator())
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(f"Engine: parameters are {self.dtype}, expected float32 or float64; see precision")
        self.backend = backend
        self.kernels = uses_kernels("Engine", backend, self.device) and (
            backend == "triton" or self.dtype != torch.float64
        )
        self.executor = executors.choose(executor, self.device, self.kernels)
        self.precision = self._precision(precision)
        self._arithmetic = Arithmetic(self.precision, self.device)
        lazy = sorted({p.interval for p in self.penalties if p.interval > 1})
        self.phases = (
            Phase("discriminator", True, tuple(p for p in self.penalties if p.interval == 1)),
            *(Phase("discriminator", False, tuple(p for p in self.penalties if p.interval == k), k) for k in lazy),
            *([Phase("generator", True)] if generator is not None else []),
        )
        self.g_optimizer, self.d_optimizer = g_optimizer or Adam(), d_optimizer or Adam()
        self.ema = EMA(decay=ema) if isinstance(ema, int | float) else ema
        self.generator_ema = averaging.copy_of(generator) if self.ema and generator is not None else None

        # what a step changes: counters are kept on the device for the step and on the host for control flow
        self.d_updates, self.g_updates, self.images, self.samples, self.batch = 0, 0, 0, 0, 0
        counters = torch.zeros(4, dtype=torch.int64, device=self.device)
        self._d_count, self._g_count, self._image_count, self._averaged = counters.unbind()
        average = None
        if self.ema is not None and self.generator_ema is not None:
            average = Average(self.generator_ema, self.ema, self._image_count, self._averaged)
        self._g: Updater | None = None
        implementation: Backend | None = (
            "triton" if self.kernels else "reference" if self.device.type == "cuda" else None
        )
        if generator is not None:
            self._g = Updater(
                "g_optimizer", generator, self.g_optimizer, update=self._g_count, average=average, other=discriminator,
                backend=implementation,
            )  # fmt: skip
        self._d = Updater(
            "d_optimizer", discriminator, self.d_optimizer, sum(1 / k for k in lazy), update=self._d_count,
            clip=self.loss.clip, other=generator, backend=implementation,
        )  # fmt: skip
        intervals = [phase.every for phase in self.phases if phase.penalties]
        self._intervals = tuple(intervals)
        n_figures = len(_METRICS) + len(intervals) + 2
        self._figures = torch.full((n_figures,), math.nan, dtype=self.dtype, device=self.device)
        self._point_at_figures()
        rows = torch.full((_HISTORY, n_figures), math.nan, dtype=self.dtype, device=self.device)
        self._ring = Ring(self._figures, rows, torch.zeros((), dtype=torch.int64, device=self.device))
        self._row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._loss_scale = LossScale.on(self.device)
        self._warn_of_mixed_rows()
        self._autograd = Autograd(
            self.generator, discriminator, loss=self.loss, arithmetic=self._arithmetic, dtype=self.dtype,
            packed=self.packed, scale=self._loss_scale.scale,
        )  # fmt: skip
        self._autograd.sigmoid = self._sigmoid
        self._closed_form = closed_form
        self._planner: Planner | None = None
        self._executor: Executor | None = None
        self._feed: ResidentFeed | None = None  # the last one that iterations have drawn from
        self._readings = 0
        self._restless: str | None = None  # why no update that runs through a network's own forward is recorded
        self._said: set[object] = set()

    # ---- set-up

    def __getstate__(self) -> State:
        """Without plans and recordings, which hold addresses, and views, which pickling does not keep."""
        apart = ("_planner", "_executor", "_feed", "_measured", "_metrics", "_penalty")
        return self.__dict__ | dict.fromkeys(apart)

    def __setstate__(self, state: State) -> None:
        self.__dict__.update(state)
        self._point_at_figures()
        self._ring = replace(self._ring, values=self._figures)

    def _point_at_figures(self) -> None:
        """Let every figure of an update be part of one tensor, a row of the ring."""
        figures, n = self._figures, len(_METRICS)
        self._metrics = figures[:n]
        self._penalty = {every: figures[n + i] for i, every in enumerate(self._intervals)}
        self._measured: dict[str | int, torch.Tensor] = {}
        self._measured.update(zip(_METRICS, self._metrics, strict=True))
        self._measured.update(self._penalty.items())
        self._d.measure_into(figures[-2])
        if self._g is not None:
            self._g.measure_into(figures[-1])

    def _precision(self, asked: str) -> str:
        if asked not in get_args(Precision):
            raise unknown("precision", asked, get_args(Precision))
        if self.dtype == torch.float64:
            return "fp64"
        if asked != "auto":
            return asked
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"

    def _probe_generator(self) -> torch.Tensor:
        """A few samples in evaluation mode: the networks fit together if the discriminator takes them."""
        generator, rows = self._the_generator("Engine"), 2 * self.packed
        labels = torch.zeros(rows, dtype=torch.int64, device=self.device) if self.n_classes else None
        dtype = next((p.dtype for p in generator.parameters()), torch.float32)
        with torch.no_grad(), _in_evaluation(generator, self.device):
            z = self._latents(rows, Stream.SAMPLE, 0, dtype=dtype)
            x = _call("generator", generator, z, labels, f"latents {_shape(z)}")
        if x.ndim < 2 or len(x) != rows:
            raise InputError(f"generator: gave {_shape(x)} for {rows} latents, expected [{rows}, ...]")
        return x

    def _probe(self, x: torch.Tensor) -> None:
        """Run the discriminator once on a few samples: does it take them, and is its last layer a sigmoid?"""
        ends: dict[nn.Module, list[torch.Tensor]] = {}
        sigmoids = [m for m in self.discriminator.modules() if isinstance(m, nn.Sigmoid)]
        hooks = [m.register_forward_hook(lambda m, args, out: ends.setdefault(m, []).append(out)) for m in sigmoids]
        labels = torch.zeros(len(x), dtype=torch.int64, device=self.device) if self.n_classes else None
        source = "the generator's output" if self.generator is not None else "samples"
        try:
            with _in_evaluation(self.discriminator, self.device):
                logits = _call("discriminator", self.discriminator, x, labels, f"{source} {_shape(x)}")
        finally:
            for hook in hooks:
                hook.remove()
        if logits.ndim < 1 or len(logits) * self.packed != len(x):
            n = len(x) // self.packed
            raise InputError(f"discriminator: gave {_shape(logits)} for {len(x)} samples, expected [{n}] or [{n}, ...]")
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
                stacklevel=4,
            )
        self.sample_shape = tuple(x.shape[1:])

    def _the_generator(self, what: str) -> nn.Module:
        if self.generator is None:
            raise InputError(f"{what}: the engine has no generator")
        return self.generator

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

    def _plans(self) -> Planner:
        """What makes plans, set up when first needed: without a generator the samples' shape is known only then."""
        if self._planner is None:
            updaters = [u for u in (self._g, self._d) if u is not None]
            obstacle = next((u.obstacle for u in updaters if u.obstacle is not None), None)
            if self.n_classes:
                obstacle = "conditional networks take labels beside their input"
            if self.precision in ("tf32", "fp16") and not self.kernels:
                obstacle = f"closed forms in PyTorch ops run in fp32, fp64 and bf16, not in {self.precision}"
            if self.precision == "fp16" and any(u.optimizer is not None for u in updaters):
                obstacle = "closed forms in fp16 scale gradients, which only the engine's own optimisers know"
            if not self._closed_form:
                obstacle = "closed_form is False"
            self._planner = Planner(
                self.generator,
                self.discriminator,
                loss=self.loss,
                arenas=[u.arena for u in updaters if u.arena is not None],
                obstacle=obstacle,
                device=self.device,
                dtype=self.dtype,
                reduced=self._arithmetic.dtype(self.dtype),
                metrics=self._measured,
                example=Example(
                    lambda n: self._latents(n, Stream.SAMPLE, 0),
                    lambda n: torch.zeros(n, *(self.sample_shape or ()), dtype=self.dtype, device=self.device),
                    logits=self._sigmoid is not None,
                ),
                packed=self.packed,
                products=("tf32" if self.precision == "tf32" else "ieee") if self.kernels else None,
                loss_scale=self._loss_scale.scale if self.precision == "fp16" else None,
            )
        return self._planner

    # ---- noise and inputs

    @during("noise")
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
        return z.detach().to(self.device, self.dtype if z.is_floating_point() else None)

    def _given(self, what: str, x: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
        if x is None:
            return None
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(f"{what}: is {got}, expected a tensor of floating point")
        if tuple(x.shape) != shape:
            raise InputError(f"{what}: has shape {_shape(x)}, expected {list(shape)}")
        return x.detach().to(self.device, self.dtype)

    def _real(self, what: str, real: torch.Tensor) -> torch.Tensor:
        if self.sample_shape is None and isinstance(real, torch.Tensor) and real.ndim > 1 and len(real):
            self._probe(real.to(self.device, self.dtype)[:1].repeat(2 * self.packed, *[1] * (real.ndim - 1)))
            self._autograd.sigmoid = self._sigmoid
        if not isinstance(real, torch.Tensor) or tuple(real.shape[1:]) != self.sample_shape or not len(real):
            got = _shape(real) if isinstance(real, torch.Tensor) else type(real).__name__
            shape = ", ".join(map(str, self.sample_shape or ("...",)))
            makes = "the generator makes" if self.generator is not None else "the engine was first given"
            raise InputError(f"{what}: real is {got}, but {makes} [B, {shape}]")
        if not real.is_floating_point():
            raise InputError(f"{what}: real has dtype {real.dtype}, expected floating point")
        if len(real) % self.packed:
            raise InputError(f"{what}: real has {len(real)} rows, expected a multiple of pac = {self.packed}")
        with mark("copy"):
            return real.detach().to(self.device, self.dtype)

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

    @entry
    def step(
        self,
        real: torch.Tensor | Iterator[Batch],
        labels: torch.Tensor | None = None,
        *,
        fake: torch.Tensor | None = None,
    ) -> None:
        """One iteration: ``n_critic`` discriminator updates and one generator update.

        Args:
            real: ``[n_critic * B, ...]``, taken in order, or a feed: an iterator of ``[B, ...]`` tensors or
                of ``(tensor, labels)`` pairs, from which ``n_critic`` batches are taken.
            labels: ``[n_critic * B]`` integers for conditional networks, where ``real`` is a tensor.
            fake: of ``real``'s shape, where there is no generator.

        Raises:
            InputError: a shape, dtype or number of rows does not fit.
        """
        _check_mode("step")
        if self._draws_itself(real):
            self._run_on_feed(real, 1)
            return
        batches = self._batches(real, labels, fake)
        if self._by_variant and (fake is None or self.generator is None):  # with both, updates are made one by one
            self._step_as_variant(list(batches))
            return
        for x, y, f in batches:
            self.d_step(x, labels=y, fake=f)
        if self.generator is not None:
            self.g_step(real=x if self.loss.compares else None, labels=y)
        self._remember()

    @during("metrics")
    def _remember(self) -> None:
        """Put the figures into the ring."""
        ring = self._ring
        torch.remainder(ring.slot, len(ring.rows), out=self._row)
        ring.rows.index_copy_(0, self._row.view(1), ring.values.view(1, -1))
        ring.slot.add_(1)

    @entry
    def run(self, feed: Iterator[Batch], iterations: int) -> None:
        """Many iterations; on a feed that lies on the GPU several of them are one replay of a graph.

        Args:
            feed: an iterator of batches, such as ``dataset.feed(batch, device="cuda")``.
            iterations: how many.

        Raises:
            InputError: a batch does not fit, or the feed ends.
        """
        _check_mode("run")
        if self._draws_itself(feed):
            self._run_on_feed(feed, iterations)
            return
        for _ in range(iterations):
            self.step(feed)

    @property
    def _by_variant(self) -> bool:
        """Whether iterations run over static memory."""
        return self.kernels or self.executor != "eager"

    def _draws_itself(self, feed: object) -> TypeGuard[ResidentFeed]:
        """Whether iterations draw from the feed on their own."""
        return self._by_variant and isinstance(feed, ResidentFeed) and feed.device.type == self.device.type

    def _batches(
        self, real: torch.Tensor | Iterator[Batch], labels: torch.Tensor | None, fake: torch.Tensor | None
    ) -> Iterator[Inputs]:
        """What each discriminator update of an iteration is given."""
        if isinstance(real, torch.Tensor):
            rows = len(real) if real.ndim else 0
            if not rows or rows % self.n_critic:
                raise InputError(f"step: real has {rows} rows, expected a multiple of n_critic = {self.n_critic}")
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
        if fake is not None and (not isinstance(real, torch.Tensor) or fake.shape != real.shape):
            raise InputError(f"step: fake is {_shape(fake)}, expected the shape of real, which must be a tensor")
        fakes = iter(fake.chunk(self.n_critic) if fake is not None else ())
        for _ in range(self.n_critic):
            with mark("data"):
                batch = next(batches, None)
            if batch is None:
                raise InputError(f"step: the feed ended; an iteration takes n_critic = {self.n_critic} batches")
            x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
            yield x, rest[0] if rest and self.n_classes else None, next(fakes, None)

    # ---- whole iterations over static memory

    def _step_as_variant(self, given: Sequence[Inputs]) -> None:
        """One iteration, recorded where that is possible."""
        batches: list[Inputs] = []
        for x, y, f in given:
            real = self._real("step", x)
            fake = self._given("step: fake", f, tuple(real.shape))
            if fake is None and self.generator is None:
                raise InputError("step: the engine has no generator: give fake")
            batches.append((real, self._labels("step", y, len(real)), fake))
        batch = len(batches[0][0])
        if any(len(x) != batch for x, *_ in batches):
            raise InputError(f"step: the batches have {[len(x) for x, *_ in batches]} rows, expected equal numbers")
        variant = self._variant(batch, batches[0][1] is not None)
        with mark("copy"):
            variant.load(batches)
        self._run_variant(variant, batch, 1)

    def _run_on_feed(self, feed: ResidentFeed, iterations: int) -> None:
        """Iterations that draw their batches themselves."""
        if tuple(feed.dataset.shape) != self.sample_shape:
            self._real("step", torch.zeros(2 * self.packed, *feed.dataset.shape, device=self.device))
        if self.generator is None:
            raise InputError("step: the engine has no generator: give real and fake samples as tensors")
        if feed.batch % self.packed:
            raise InputError(f"step: the feed's batch is {feed.batch}, expected a multiple of pac = {self.packed}")
        period = math.lcm(*(p.every for p in self.phases))
        period //= math.gcd(period, self.n_critic)
        unrolled = -(-_UNROLLED // period) * period  # after these the same penalties are due again
        while iterations:
            count = unrolled if iterations >= unrolled else 1
            variant = self._variant(feed.batch, bool(self.n_classes), feed, count)
            times = iterations // count if count % period == 0 else 1
            self._run_variant(variant, feed.batch, count, times)
            feed.advanced(times * count * self.n_critic)
            iterations -= times * count

    def _due(self, ahead: int = 0) -> list[Phase]:
        """Phases of the discriminator's update that many updates from now."""
        n = self.d_updates + ahead
        return [p for p in self.phases if p.player == "discriminator" and n % p.every == 0]

    def _variant(self, batch: int, labelled: bool, feed: ResidentFeed | None = None, iterations: int = 1) -> Variant:
        """How the next iterations run."""
        self.batch = batch
        self._attach()
        for updater in (self._d, self._g):
            if updater is not None:
                updater.take_rates()
        planner = self._plans()
        planner.refresh()
        if self._executor is None or self._readings != planner.readings:
            if self._executor is None:
                self._executor = Executor(self.executor, self.device, self._state_tensors)
            self._executor.clear()
            self._readings = planner.readings
        due = [tuple(tuple(self._due(i * self.n_critic + k)) for k in range(self.n_critic)) for i in range(iterations)]
        self._feed = feed if feed is not None else self._feed
        variant = self._executor.find(
            (batch, labelled, tuple(due), feed, self.seed, self._settings()), lambda: self._lay_out(batch, due, feed),
            lambda: self._updates_one_by_one(batch, due, labelled, feed), self._why_unrecorded(),
        )  # fmt: skip
        if not variant.iterations and variant.recording is not None:
            variant.kept = planner.held(batch)
            if planner.changed():
                self._restless = "a network changes attributes of its own in every pass: a graph would not"
                variant.recording, variant.why_unrecorded = None, self._restless
        self._say_why(variant)
        return variant

    def _run_variant(self, variant: Variant, batch: int, iterations: int, times: int = 1) -> None:
        """Run a variant of so many iterations so many times."""
        updaters = [u for u in (self._d, self._g) if u is not None]
        for updater in updaters:
            updater.refresh()
        if variant.recording is not None or not variant.iterations or self._arithmetic.is_set(self._products):
            variant.run(times)
        else:
            with self._arithmetic.matmul(self._products):
                variant.run(times)
        for iteration in variant.iterations[-1:]:
            for updater, active in iteration.active.items():
                updater.noted(active)
        if not variant.iterations and variant.recording is not None:
            for updater in updaters:
                updater.noted()
        updates = times * iterations * self.n_critic
        self.d_updates += updates
        self.images += updates * batch
        self.g_updates += times * iterations * (self.generator is not None)

    def _lay_out(
        self, batch: int, due: Sequence[tuple[tuple[Phase, ...], ...]], feed: ResidentFeed | None = None
    ) -> list[Iteration]:
        """Iterations as lists of launches, by what is due in each.

        Raises:
            LookupError: there is none; says why.
        """
        if not self.kernels:
            raise LookupError("backend is 'reference'" if self.device.type == "cuda" else "the device is no GPU")
        if not isinstance(self.latent, int):
            raise LookupError("latent is a function of yours, which runs on the host")
        for updater, name in ((self._d, "d_optimizer"), (self._g, "g_optimizer")):
            if updater is not None and not updater.on_kernels:
                raise LookupError(f"{name}: {updater.obstacle or 'it is yours'}")
        parts = Parts(
            planner=self._plans(), d=self._d, g=self._g, seed=self.seed, ring=self._ring,
            counts=Counts(self._d_count, self._g_count, self._image_count),
            loss_scale=self._loss_scale if self.precision == "fp16" else None,
        )  # fmt: skip
        generator = self.phases[-1] if self.generator is not None else None
        compares = self.loss.compares
        made = {phases: Iteration(parts, phases, generator, batch, compares, feed) for phases in dict.fromkeys(due)}
        return [made[phases] for phases in due]

    def _updates_one_by_one(
        self, batch: int, due: Sequence[tuple[tuple[Phase, ...], ...]], labelled: bool, feed: ResidentFeed | None
    ) -> Variant:
        """Iterations as the updates that :meth:`d_step` and :meth:`g_step` make, over static inputs."""
        variant, shape = Variant(batch=batch), (batch, *(self.sample_shape or ()))
        for _ in due[0]:
            variant.real.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
            if labelled:
                variant.labels.append(torch.zeros(batch, dtype=torch.int64, device=self.device))
            if self.generator is None:
                variant.fake.append(torch.zeros(shape, dtype=self.dtype, device=self.device))

        def body() -> None:
            for iteration in due:
                for i, phases in enumerate(iteration):
                    labels, fake = (places[i] if places else None for places in (variant.labels, variant.fake))
                    if feed is not None:
                        with mark("data"):
                            feed.draw(variant.real[i], labels)
                    self._update_discriminator(phases, variant.real[i], fake, labels)
                if self.generator is not None:
                    labels = variant.labels[-1] if variant.labels else None
                    self._update_generator(None, variant.real[-1] if self.loss.compares else None, labels, batch)
                self._remember()

        variant.body = body
        return variant

    def _settings(self) -> tuple[object, ...]:
        """Numbers of the user's optimisers that a recording holds as they are, all but the rates, which are tensors."""
        optimizers = [u.optimizer for u in (self._g, self._d) if u is not None and u.optimizer is not None]
        kinds = (bool, int, float, tuple)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return tuple((k, v) for group in groups for k, v in group.items() if isinstance(v, kinds) and k != "lr")

    def _why_unrecorded(self) -> str | None:
        """Why updates that run one by one cannot be recorded, as far as is known beforehand."""
        if self._restless is not None:
            return self._restless
        if not isinstance(self.latent, int):
            return "latent is a function of yours, which runs on the host"
        for updater, name in ((self._d, "d_optimizer"), (self._g, "g_optimizer")):
            if updater is not None and updater.optimizer is not None and not updater.fused:
                return f"{name} is {type(updater.optimizer).__name__}, whose numbers on the host a graph would freeze"
        return None

    def _say_why(self, variant: Variant) -> None:
        """Say once why a faster path is not taken; an explicit backend or executor is an error then."""
        if variant.why_updates is not None and self.backend == "triton":
            raise InputError(f"Engine: backend is 'triton', but {variant.why_updates}")
        why_updates = variant.why_updates if self.kernels else None
        why_unrecorded = variant.why_unrecorded if self.executor != "eager" else None
        for what, why in (("runs update by update", why_updates), ("is not recorded", why_unrecorded)):
            if why is not None and (what, why) not in self._said:
                _LOG.warning("fastgan: the iteration %s: %s", what, why)
                self._said.add((what, why))

    def _state_tensors(self) -> list[torch.Tensor]:
        """All memory that an iteration changes and that outlives it."""
        updaters = [u for u in (self._g, self._d) if u is not None]
        networks = [n for n in (self.generator, self.discriminator, self.generator_ema) if n is not None]
        tensors = [t for t in tree_leaves(self.state_dict()) if isinstance(t, torch.Tensor)]
        tensors += [b for n in networks for b in n.buffers()]
        tensors += [t for n in networks for m in n.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
        tensors = [t for t in tensors if t.device.type == self.device.type]
        tensors += [u.arena.grad for u in updaters if u.arena is not None]
        tensors += [u.arena.low for u in updaters if u.arena is not None and u.arena.has_low]
        counters = [self._d_count, self._g_count, self._image_count, self._averaged]
        counters += [self._feed.state] if self._feed is not None else []
        return [*tensors, *counters, self._figures, self._ring.rows, self._ring.slot]

    @property
    def _products(self) -> str:
        """The setting of torch's fp32 products in plans."""
        return "high" if self.precision == "tf32" else "highest"

    @entry
    def d_step(
        self,
        real: torch.Tensor,
        z: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        delta: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        fake: torch.Tensor | None = None,
    ) -> None:
        """One discriminator update, and one more for each lazy penalty that is due.

        Args:
            real: ``[B, ...]``, floating point, of the generator's output shape.
            z: latents ``[B, latent]``; drawn where not given.
            alpha: weight of the real sample in each interpolation, ``[B]`` in ``[0, 1]`` (``[B / pac]`` where samples
                are packed); drawn where not given.
            delta: standard normal perturbation of DRAGAN, of ``real``'s shape; drawn where not given.
            labels: ``[B]`` integers for conditional networks; fakes are made for the same labels.
            fake: of ``real``'s shape, instead of the generator's samples.

        Raises:
            InputError: a shape or dtype does not fit.
        """
        _check_mode("d_step")
        real = self._real("d_step", real)
        batch, shape = len(real), tuple(real.shape)
        labels = self._labels("d_step", labels, batch)
        alpha = self._given("d_step: alpha", alpha, (batch // self.packed,))
        delta = self._given("d_step: delta", delta, shape)
        fake = self._given("d_step: fake", fake, shape)
        if z is not None:
            z = self._given_latents("d_step: z", z, batch)
        if fake is None:
            if self.generator is None:
                raise InputError("d_step: the engine has no generator: give fake")
        elif z is not None:
            raise InputError("d_step: both z and fake were given, expected one of them")
        self.batch = batch
        self._attach()
        self._plans().refresh()
        self._update_discriminator(self._due(), real, fake, labels, z, alpha, delta)
        self.d_updates += 1
        self.images += batch

    def _update_discriminator(
        self, due: Sequence[Phase], real: torch.Tensor, fake: torch.Tensor | None, labels: torch.Tensor | None,
        z: torch.Tensor | None = None, alpha: torch.Tensor | None = None, delta: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """The phases of one update, all on the device where noise is."""
        planner, batch = self._plans(), len(real)
        plans = [self._plan_or_say(planner, phase, batch) for phase in due]
        samples = Samples(real, self._fakes(fake, z, labels, batch, plans), labels, alpha, delta)
        self._draw(samples, due, plans)
        for plan in plans:
            if plan is not None:
                self._load(plan, samples)
        if any(plans) and not all(plans):  # a plan may work in the memory where the fakes are
            samples.fake = samples.fake.to(self.dtype, copy=True)
        for phase, plan in zip(due, plans, strict=True):
            if plan is not None:
                self._run(plan)
                self._d.step(plan.active(self._d.params), **self._extras(self._d, plan))
                continue
            points = Points(self._autograd, samples, bool(self.penalties))
            grads = self._autograd.discriminator_gradients(phase, points, self._d.params, self._measured)
            self._d.apply(grads)
            if self.precision == "fp16" and phase.adversarial:
                self._loss_scale.adapt(self._d.grad_norm)
        self._d_count.add_(1)
        self._image_count.add_(batch)

    def _extras(self, updater: Updater, plan: Plan) -> State:
        """What a plan of kernels leaves for the optimiser besides gradients."""
        if not updater.on_kernels:
            return {}
        return {"squares": plan.squares, "loss_scale": self._loss_scale if self.precision == "fp16" else None}

    def _plan_or_say(self, planner: Planner, phase: Phase, batch: int) -> Plan | None:
        """The phase's plan; why there is none is logged, once."""
        found = planner.find(phase, batch)
        if isinstance(found, Plan):
            return found
        if self.backend == "triton":
            raise InputError(f"Engine: backend is 'triton', but the {phase.player}'s update has no kernels: {found}")
        if phase not in self._said and self._closed_form:
            what = " and ".join([self.loss.name] * phase.adversarial + [p.name for p in phase.penalties])
            _LOG.warning("fastgan: the %s's update (%s) runs through autograd: %s", phase.player, what, found)
        self._said.add(phase)
        return None

    def _attach(self) -> None:
        """Take in again parameters whose memory the user has replaced, before anything reads them."""
        for updater in (self._g, self._d):
            if updater is not None:
                updater.attach()
                updater.refresh()

    def _fakes(
        self, fake: torch.Tensor | None, z: torch.Tensor | None, labels: torch.Tensor | None, batch: int,
        plans: Sequence[Plan | None],
    ) -> torch.Tensor:  # fmt: skip
        """The given fakes, or those of the generator; where possible made in the place where the first plan reads."""
        if fake is not None:
            return fake
        first = plans[0] if plans else None
        forward = self._plans().fakes(first, batch) if first is not None else None
        step = self._d_count if isinstance(self.latent, int) else self.d_updates
        if forward is None or first is None:
            z = self._latents(batch, Stream.D_LATENT, step) if z is None else z
            return self._autograd.fakes(z, labels)
        self._load_latents(forward.inputs["z"], z, Stream.D_LATENT, step)
        self._run(forward)
        return first.inputs["fake"].view(batch, *(self.sample_shape or ()))

    @during("noise")
    def _load_latents(
        self, place: torch.Tensor, z: torch.Tensor | None, stream: Stream, step: int | torch.Tensor
    ) -> None:
        if z is None and isinstance(self.latent, int) and place.dtype == self.dtype:
            noise.normal(*place.shape, seed=self.seed, stream=stream, step=step, device=self.device, dtype=self.dtype,
                         out=place)  # fmt: skip
            return
        z = self._latents(len(place), stream, step) if z is None else z
        if z.shape != place.shape:
            raise InputError(f"z has shape {_shape(z)}, expected {_shape(place)}")
        place.copy_(z)

    @during("noise")
    def _draw(self, samples: Samples, due: Sequence[Phase], plans: Sequence[Plan | None]) -> None:
        """Noise that penalties need and that was not given; into the first plan that takes it."""
        places = {penalty.place for phase in due for penalty in phase.penalties}
        keyed: Any = {"seed": self.seed, "step": self._d_count, "device": self.device, "dtype": self.dtype}
        real = samples.real
        if "interpolated" in places and samples.alpha is None:
            samples.alpha = next((p.inputs["alpha"] for p in plans if p is not None and "alpha" in p.inputs), None)
            out = None if samples.alpha is None else samples.alpha.view(-1, 1)
            n = len(real) // self.packed
            samples.alpha = noise.uniform(n, 1, stream=Stream.ALPHA, out=out, **keyed).view(-1)
        if "perturbed" in places and samples.delta is None:
            delta = next((p.inputs["delta"] for p in plans if p is not None and "delta" in p.inputs), None)
            out = None if delta is None else delta.view(len(real), -1)
            flat = noise.normal(len(real), real[0].numel(), stream=Stream.PERTURBATION, out=out, **keyed)
            samples.delta = flat.view_as(real)

    @staticmethod
    @during("copy")
    def _load(plan: Plan, samples: Samples) -> None:
        for name, place in plan.inputs.items():
            value = getattr(samples, name.split()[0])
            if value.data_ptr() != place.data_ptr() or value.dtype != place.dtype:
                place.copy_(value.view(place.shape) if value.is_contiguous() else value.reshape(place.shape))

    def _run(self, plan: Plan) -> None:
        if self._arithmetic.is_set(self._products):
            plan.run()
            return
        with self._arithmetic.matmul(self._products):
            plan.run()

    @entry
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
            InputError: a shape or dtype does not fit, the batch size is not known yet, or there is no generator.
        """
        _check_mode("g_step")
        self._the_generator("g_step")
        assert self._g is not None
        batch = len(real) if real is not None else len(z) if z is not None else self.batch
        if not batch:
            raise InputError("g_step: the batch size is not known: give z, or call d_step first")
        if batch % self.packed:
            raise InputError(f"g_step: z has {batch} rows, expected a multiple of pac = {self.packed}")
        if z is not None:
            z = self._given_latents("g_step: z", z, batch)
        if self.n_classes and labels is None and not self.loss.compares:
            labels = noise.integers(
                batch, self.n_classes, seed=self.seed, stream=Stream.G_LABELS, step=self._g_count, device=self.device
            )
        labels = self._labels("g_step", labels, batch)
        if self.loss.compares:
            if real is None:
                raise InputError(f"g_step: the {self.loss.name} loss compares with real samples: give real")
            real = self._real("g_step", real)
        else:
            real = None
        self._attach()
        self._plans().refresh()
        self._update_generator(z, real, labels, batch)
        self.g_updates += 1

    def _update_generator(
        self, z: torch.Tensor | None, real: torch.Tensor | None, labels: torch.Tensor | None, batch: int
    ) -> None:
        """The generator's phase, all on the device where noise is."""
        assert self._g is not None
        step = self._g_count if isinstance(self.latent, int) else self.g_updates
        plan = self._plan_or_say(self._plans(), self.phases[-1], batch)
        if plan is not None:
            self._load_latents(plan.inputs["z"], z, Stream.G_LATENT, step)
            if real is not None:
                plan.inputs["real"].copy_(real.reshape(plan.inputs["real"].shape))
            self._run(plan)
            self._g.step(plan.active(self._g.params), **self._extras(self._g, plan))
        else:
            z = self._latents(batch, Stream.G_LATENT, step) if z is None else z
            grads = self._autograd.generator_gradients(z, real, labels, self._g.params, self._measured["g_loss"])
            self._g.apply(grads)
            if self.precision == "fp16":
                self._loss_scale.adapt(self._g.grad_norm)
        self._g_count.add_(1)

    # ---- what came of it

    @entry
    def metrics(self) -> dict[str, float]:
        """Figures of the last updates; the only call that waits for the device.

        Returns:
            ``d_loss`` and ``g_loss`` (without penalties), ``penalty`` (sum of the weighted penalties, each at
            its last application), ``d_real`` and ``d_fake`` (mean logits in the last discriminator update),
            ``d_grad_norm`` and ``g_grad_norm`` (of the last gradients, penalties included), and ``skipped_steps``
            (updates left out since the start because a gradient was not finite). NaN where nothing was measured yet.
        """
        skipped = self._d.skipped + (self._g.skipped if self._g is not None else 0)
        *figures, skips = torch.cat([self._figures.double(), skipped.double().view(1)]).tolist()
        return {**self._named(figures), "skipped_steps": skips}

    @entry
    def history(self) -> list[dict[str, float]]:
        """Figures of the last iterations of :meth:`step` and :meth:`run`, at most 64, the newest last; waits.

        They are kept on the device until asked for, also where many iterations are one replay of a graph. Keys are
        those of :meth:`metrics` but ``skipped_steps``.
        """
        ring = self._ring
        *rows, (end, *_) = torch.cat([ring.rows.double(), ring.slot.double().expand(1, ring.rows.shape[1])]).tolist()
        made = range(max(0, int(end) - len(rows)), int(end))
        return [self._named(rows[i % len(rows)]) for i in made]

    def _named(self, figures: Sequence[float]) -> dict[str, float]:
        n = len(_METRICS)
        penalty = sum(figures[n:-2]) if self._intervals else math.nan
        return dict(
            zip(
                (*_METRICS, "penalty", "d_grad_norm", "g_grad_norm"),
                (*figures[:n], penalty, *figures[-2:]),
                strict=True,
            )
        )

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
        network = self._the_generator("sample")
        network = self.generator_ema if ema and self.generator_ema is not None else network
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
        out = torch.empty((n, *(self.sample_shape or ())), device=self.device, dtype=self.dtype)
        network.eval()
        try:
            for i in range(0, n, 256):
                rows = min(256, n - i)
                if latents is None:
                    z = self._latents(rows, Stream.SAMPLE, step, first_row=i, seed=seed)
                else:
                    z = latents[i : i + rows]
                with self._arithmetic.reduced():
                    out[i : i + rows] = network(*_with(z, None if labels is None else labels[i : i + rows]))
        finally:
            for module, mode in training.items():
                module.training = mode
        return out

    def explain(self) -> str:
        """What each phase does, on which path and at what cost; for every fast path not taken, the reason.

        Costs are those of one update at the batch size of the last one (64 before the first), without the optimiser;
        bytes are what each kernel reads and writes, wherever it lies.
        """
        _check_mode("explain")
        lines = [f"{self.precision} on {self.device}, {self.loss.name} loss"]
        batch = self.batch or 64 * self.packed
        for phase in self.phases:
            terms = [self.loss.name] * phase.adversarial + [repr(p) for p in phase.penalties]
            how_often = f"{self.n_critic}x per iteration" if phase.player == "discriminator" else "once per iteration"
            if phase.every > 1:
                how_often = f"after every {phase.every}th update, times {phase.every}"
            lines.append(f"{phase.player}: {' + '.join(terms)} ({how_often}): {self._path(phase, batch)}")
        fakes = self._fakes_path(batch)
        if fakes is not None:
            lines.append(f"fakes of the discriminator's updates: {fakes}")
        if self._by_variant and self.sample_shape is not None:
            lines.append(f"iteration: {self._iteration_path(batch)}")
        notes = []
        if self._sigmoid is not None:
            notes.append("the discriminator ends in Sigmoid: it is trained on that layer's input, the logits")
        if not self._arithmetic.settable:
            notes.append("torch.backends...fp32_precision is set: float32 products run as it says, penalties included")
        if self.loss.clip is not None:
            notes.append(f"discriminator parameters are clamped to +-{self.loss.clip} after each update")
        if any(p.every > 1 for p in self.phases):
            if self._d.rule is not None:
                notes.append(f"lazy penalties: the discriminator's Adam runs with lr x {self._d.lazy:.4g} and betas "
                             f"{tuple(round(b, 6) for b in self._d.rule.betas)}")  # fmt: skip
            else:
                notes.append("lazy penalties: d_optimizer is yours, its lr and betas are left as they are")
        if self.precision in ("bf16", "fp16", "tf32") and self.penalties:
            notes.append(
                f"penalties take {self.precision} operands in kernels; their sums, norms and values are fp32"
                if self.kernels else "penalties run in fp32, on a forward pass of their own"
            )  # fmt: skip
        for updater, name in ((self._d, "d_optimizer"), (self._g, "g_optimizer")):
            if updater is None:
                continue
            if updater.own and updater.optimizer is not None:
                notes.append(f"{name}: {updater.obstacle}: torch's fused {type(updater.optimizer).__name__} runs")
            elif not updater.own and updater.fused:
                notes.append(f"{name}: your {type(updater.optimizer).__name__} runs with torch's fused kernels")
            elif not updater.own:
                notes.append(f"{name}: {type(updater.optimizer).__name__} has no guard against non-finite gradients "
                             "of its own: parameters and state are copied before each update")  # fmt: skip
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])

    def _path(self, phase: Phase, batch: int) -> str:
        """How a phase runs, and what that costs."""
        if self.sample_shape is None:
            return "not known before the first batch"
        self._plans().refresh()
        plan = self._plans().find(phase, batch)
        with self._as_it_was():
            through = costs.measured(lambda: self._differentiate_once(phase, batch))
            cost = costs.of_plan(plan) if isinstance(plan, Plan) else None
        if not isinstance(plan, Plan):
            return f"autograd, PyTorch ops\n  why: {plan}\n  cost at batch {batch}: {through}"
        buffers = sum(t.nbytes for t in plan.buffers) / 2**20
        how = "closed form, Triton kernels" if self.kernels else "closed form"
        return f"{how}\n  cost at batch {batch}: {cost}; {buffers:.1f} MiB of buffers\n  through autograd: {through}"

    def _iteration_path(self, batch: int) -> str:
        """How :meth:`step` runs, as far as that is known."""
        variants = self._executor.variants if self._executor is not None else []
        variant = next((v for v in reversed(variants) if v.batch == batch), None)
        if variant is None:
            variant = Variant(why_unrecorded="not known before the first step")
            try:
                variant.iterations = self._lay_out(batch, [tuple(tuple(self._due(k)) for k in range(self.n_critic))])
            except LookupError as e:
                variant.why_updates = str(e)
        what = f"{len(variant.iterations[0].calls)} launches" if variant.iterations else "update by update"
        nodes = variant.recording.nodes() if variant.recording is not None else None
        recorded = "a CUDA graph" if nodes is None else f"a CUDA graph of {nodes.get('kernel', 0)} kernels"
        lines = [what if variant.recording is None else f"{what}, {recorded}"]
        lines += [f"  why update by update: {variant.why_updates}"] if variant.why_updates is not None else []
        lines += [f"  why no graph: {variant.why_unrecorded}"] if variant.why_unrecorded is not None else []
        return "\n".join(lines)

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Buffers of the networks, gradients, figures and torch's random state are as before afterwards."""
        tensors = [b for n in (self.generator, self.discriminator) if n is not None for b in n.buffers()]
        tensors += [u.arena.grad for u in (self._g, self._d) if u is not None and u.arena is not None]
        tensors += self._measured.values()
        kept = [(t, t.clone()) for t in tensors]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            yield
        with torch.no_grad():
            for t, before in kept:
                t.copy_(before)

    def _fakes_path(self, batch: int) -> str | None:
        """How the fakes of a discriminator's update are made where it is not as usual."""
        first = self._plans().find(self.phases[0], batch) if self.sample_shape is not None else None
        if self.generator is None or not isinstance(first, Plan):
            return None
        forward = self._plans().fakes(first, batch)
        return f"the generator's own forward\n  why: {self._plans().why_no_fakes(batch)}" if forward is None else None

    def _differentiate_once(self, phase: Phase, batch: int) -> None:
        """A phase's gradients through autograd, for nothing."""
        labels = torch.zeros(batch, dtype=torch.int64, device=self.device) if self.n_classes else None
        real = torch.zeros(batch, *(self.sample_shape or ()), dtype=self.dtype, device=self.device)
        if phase.player == "discriminator":
            alpha = torch.zeros(batch // self.packed, dtype=self.dtype, device=self.device)
            points = Points(self._autograd, Samples(real, real, labels, alpha, real), bool(self.penalties))
            self._autograd.discriminator_gradients(phase, points, self._d.params, self._measured)
        elif self._g is not None:
            z = self._latents(batch, Stream.SAMPLE, 0)
            compared = real if self.loss.compares else None
            self._autograd.generator_gradients(z, compared, labels, self._g.params, self._measured["g_loss"])

    # ---- saving

    def state_dict(self) -> State:
        """Everything a later run needs to go on as if it had never stopped: nested dicts of tensors and numbers."""
        return {
            "generator": dict(self.generator.state_dict()) if self.generator is not None else None,
            "discriminator": dict(self.discriminator.state_dict()),
            "generator_ema": dict(self.generator_ema.state_dict()) if self.generator_ema is not None else None,
            "g_optimizer": self._g.state_dict() if self._g is not None else None,
            "d_optimizer": self._d.state_dict(),
            "counters": {key: getattr(self, key) for key in _COUNTERS},
            "averaged": self._averaged,
            "metrics": self._metrics,
            "penalty": list(self._penalty.values()),
            "seed": self.seed,
            "loss_scale": {"scale": self._loss_scale.scale, "good_steps": self._loss_scale.good_steps},
            "torch_rng": {"cpu": torch.get_rng_state()}
            | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; torch's own random state, which dropout uses, is set too.

        Raises:
            InputError: the state is of other networks; names the first tensor that does not fit.
        """
        networks = {
            name: network
            for name in ("generator", "discriminator", "generator_ema")
            if (network := getattr(self, name)) is not None
        }
        for name, network in networks.items():
            source = "generator" if name == "generator_ema" and state.get(name) is None else name
            _check_fits(source, state.get(source), network)
        for name, network in networks.items():
            network.load_state_dict(state[name] if state.get(name) is not None else state["generator"])
        if self._g is not None:
            self._g.load_state_dict(state["g_optimizer"])
        self._d.load_state_dict(state["d_optimizer"])
        for key in _COUNTERS:
            setattr(self, key, int(state["counters"][key]))
        with torch.no_grad():
            self._d_count.fill_(self.d_updates)
            self._g_count.fill_(self.g_updates)
            self._image_count.fill_(self.images)
            self._averaged.copy_(state["averaged"])
            self._metrics.copy_(state["metrics"])
            for penalty, saved in zip(self._penalty.values(), state["penalty"], strict=False):
                penalty.copy_(saved)
            self._loss_scale.scale.copy_(state["loss_scale"]["scale"])
            self._loss_scale.good_steps.copy_(state["loss_scale"]["good_steps"])
        if self._executor is not None and any(u.optimizer is not None for u in (self._g, self._d) if u is not None):
            self._executor.clear()  # recordings hold the state of a torch optimiser, which is replaced
        self.seed = int(state["seed"])
        torch.set_rng_state(state["torch_rng"]["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state["torch_rng"]:
            torch.cuda.set_rng_state(state["torch_rng"]["cuda"].cpu(), self.device)

    @property
    def iterations(self) -> int:
        """Iterations made."""
        return self.g_updates if self.generator is not None else self.d_updates // self.n_critic


_COUNTERS = ("d_updates", "g_updates", "images", "samples", "batch")


def device_of(what: str, device: str | torch.device) -> torch.device:
    """The device that is meant: ``"auto"`` is the GPU where there is one.

    Raises:
        InputError: there is none such; ``what`` names the argument.
    """
    if device == "auto":
        return _current_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"{what} is {device!r}, expected 'auto', 'cpu' or 'cuda'") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"{what} is {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{what} is {device!r}, but no CUDA device is available")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{what} is {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices")
    return chosen if chosen.type == "cpu" or chosen.index is not None else _current_gpu()


def _current_gpu() -> torch.device:
    """With its number, as tensors have it."""
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def _in_evaluation(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, with the modules' modes and the random state as before afterwards."""
    training = {m: m.training for m in module.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            module.eval()
            yield
        finally:
            for m, mode in training.items():
                m.training = mode


def _check_mode(what: str) -> None:
    """Memory made in inference mode could never be written again outside."""
    if torch.is_inference_mode_enabled():
        raise InputError(f"{what}: was called under torch.inference_mode(), where nothing can be trained")


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
