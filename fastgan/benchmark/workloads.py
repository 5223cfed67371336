"""What is timed: pairs of networks with their training, by name, or the user's own.

A workload is a function that returns the arguments of an :class:`fastgan.Engine`, new networks in every call; where
there is no generator also ``sample_shape``. Everything else (a batch size, a device, a precision) is a case of it.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgan import models, noise
from fastgan.engine import Engine
from fastgan.errors import InputError, unknown
from fastgan.noise import Stream
from fastgan.optim import Adam
from fastgan.penalties import R1, R2, GradientPenalty

Tensor = torch.Tensor
Arguments = dict[str, Any]
_ALLOWED = {*inspect.signature(Engine.__init__).parameters} - {"self", "device", "precision", "backend", "executor"}
_ROWS_SEED = 1  # of samples


@dataclass(frozen=True)
class Workload:
    """A pair and how it is trained.

    Attributes:
        name: of the row.
        about: one line.
        arguments: of an engine, with networks of their own in every call.
        batch: where none is asked for.
    """

    name: str
    about: str
    arguments: Callable[[], Arguments]
    batch: int = 64


def _mlp(*widths: int, activation: Callable[[], nn.Module], last: nn.Module | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1], *([last] if last is not None else []))


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def _digits_pair() -> Arguments:
    return {
        "generator": _mlp(100, 256, 512, 784, activation=nn.ReLU, last=nn.Tanh()),
        "discriminator": _mlp(784, 512, 256, 1, activation=_leaky),
        "ema": None,
    }


def _adam(lr: float, b1: float, b2: float) -> Arguments:
    return {"g_optimizer": Adam(lr, (b1, b2)), "d_optimizer": Adam(lr, (b1, b2))}


def _vanilla_mlp() -> Arguments:
    return _digits_pair() | _adam(2e-4, 0.5, 0.999)


def _wgan_gp_mlp() -> Arguments:
    penalties = (GradientPenalty(10.0),)
    return _digits_pair() | {"loss": "wasserstein", "penalties": penalties, "n_critic": 5} | _adam(1e-4, 0.0, 0.9)


def _wgan_gp_critic() -> Arguments:
    alone = {"generator": None, "n_critic": 1, "sample_shape": (784,)}
    return _wgan_gp_mlp() | alone


def _toy() -> Arguments:
    networks = {
        "generator": _mlp(2, 128, 128, 2, activation=nn.ReLU),
        "discriminator": _mlp(2, 128, 128, 1, activation=_leaky),
        "latent": 2,
        "ema": None,
    }
    return networks | {"loss": "relativistic", "penalties": (R1(0.1), R2(0.1))} | _adam(1e-3, 0.0, 0.99)


def _r1_conv() -> Arguments:
    g = nn.Sequential(
        nn.Linear(64, 32 * 64), nn.ReLU(), nn.Unflatten(1, (32, 8, 8)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    d = nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), _leaky(), nn.Conv2d(64, 128, 4, 2, 1), _leaky(),
        nn.Conv2d(128, 256, 4, 2, 1), _leaky(), nn.Conv2d(256, 1, 4), nn.Flatten(),
    )  # fmt: skip
    pair = {"generator": g, "discriminator": d, "latent": 64, "ema": None}
    return pair | {"penalties": (R1(10.0),)} | _adam(1e-3, 0.0, 0.99)


def _dcgan64() -> Arguments:
    shape = (3, 64, 64)
    pair = {
        "generator": models.build("generator", {"model": "dcgan", "width": 64}, shape, 100),
        "discriminator": models.build("discriminator", {"model": "dcgan", "width": 64}, shape, 100),
        "ema": None,
    }
    return pair | _adam(2e-4, 0.5, 0.999)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("vanilla-mlp", "G 100-256-512-784, D 784-512-256-1, non-saturating", _vanilla_mlp),
        Workload("wgan-gp-mlp", "the same pair, WGAN-GP, five critic updates an iteration", _wgan_gp_mlp),
        Workload("wgan-gp-critic", "its critic alone on given fakes, WGAN-GP", _wgan_gp_critic),
        Workload("toy", "G and D 2-128-128, relativistic with R1 and R2", _toy, 256),
        Workload("r1-conv", "four convolutions on 3x32x32, non-saturating with R1", _r1_conv),
        Workload("dcgan64", "DCGAN on 3x64x64, batch norm, non-saturating", _dcgan64, 32),
    )
}


def find(name: str) -> Workload:
    """The workload of that name, or of a function ``module:function``, which is looked for in the current folder too.

    Raises:
        InputError: there is no such workload, module or function.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        if name not in WORKLOADS:
            raise unknown("workload", name, [*WORKLOADS, "module:function"])
        return WORKLOADS[name]
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module), function, None)
    except ImportError as e:
        raise InputError(f"workload {name!r}: cannot import {module!r}: {e}") from e
    if not callable(made):
        got = "nothing" if made is None else f"a {type(made).__name__}"
        raise InputError(f"workload {name!r}: {function!r} in {module!r} is {got}, expected a function")
    about = (inspect.getdoc(made) or "").splitlines()
    return Workload(name, about[0] if about else "", made)


# ---- a case of it


@dataclass(frozen=True)
class Update:
    """What one discriminator update, or the generator's, is given.

    Attributes:
        z: latents ``[B, ...]``.
        alpha: weights of the real samples, ``[B / pac]``.
        delta: perturbation of the real samples.
    """

    z: Tensor | None = None
    alpha: Tensor | None = None
    delta: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """A workload at a batch size on a device in a precision.

    Attributes:
        workload, batch, device: of the case.
        precision: ``fp32``, ``tf32`` or ``bf16``.
        penalised: whether the penalties are there.
    """

    workload: Workload
    batch: int
    device: torch.device
    precision: str = "fp32"
    penalised: bool = True
    _known: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def without_penalties(self) -> Case:
        """The same without penalties: what their cost is measured against."""
        return replace(self, penalised=False, _known={})

    def arguments(self) -> Arguments:
        """Of an engine: the same start in every call.

        Raises:
            InputError: the workload's function gives something else.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                given = self.workload.arguments()
            except InputError:
                raise
            except Exception as e:
                raise InputError(f"workload {self.workload.name!r}: raised {type(e).__name__}: {e}") from e
        what = f"workload {self.workload.name!r}"
        if not isinstance(given, dict):
            raise InputError(f"{what}: gave a {type(given).__name__}, expected a dict of fastgan.Engine's arguments")
        for key in given:
            if key not in _ALLOWED | {"sample_shape"}:
                raise unknown(f"{what}: argument", key, sorted(_ALLOWED))
        if not isinstance(given.get("discriminator"), nn.Module):
            raise InputError(f"{what}: gave no discriminator, expected an nn.Module")
        return given if self.penalised else given | {"penalties": ()}

    def engine(self, dtype: torch.dtype | None = None, **more: Any) -> Engine:
        """A new engine of the case, with networks of that dtype."""
        given = self.arguments()
        given.pop("sample_shape", None)
        networks = (given.pop(name, None) for name in ("generator", "discriminator"))
        g, d = (n if n is None or dtype is None else n.to(dtype) for n in networks)
        return Engine(g, d, **given, device=self.device, **more)

    @property
    def plain(self) -> Engine:
        """An engine in PyTorch ops: what says what the case is, and never trained."""
        if "plain" not in self._known:
            self._known["plain"] = self.engine(precision="fp32", backend="reference", executor="eager")
        found: Engine = self._known["plain"]
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample."""
        shape = self.plain.sample_shape or self.arguments().get("sample_shape")
        if shape is None:
            raise InputError(f"workload {self.workload.name!r}: has no generator: sample_shape is needed too")
        return tuple(shape)

    @property
    def images(self) -> int:
        """Real images of an iteration."""
        return self.batch * self.plain.n_critic

    def rows(self, stream: int) -> Tensor:
        """Samples ``[n_critic B, ...]`` in [-1, 1], always the same."""
        flat = noise.uniform(
            self.images, self.shape_size, seed=_ROWS_SEED, stream=Stream.TOY, step=stream, device="cpu"
        )
        return (2 * flat - 1).view(self.images, *self.shape).to(self.device)

    @property
    def shape_size(self) -> int:
        """Numbers of a sample."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    def samples(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Real samples, their labels, and fakes where there is no generator, of all updates of an iteration."""
        plain = self.plain
        labels = None
        if plain.n_classes:
            labels = torch.arange(self.images, device=self.device) % plain.n_classes
        return self.rows(0), labels, self.rows(1) if plain.generator is None else None

    def drawn(self, iteration: int) -> tuple[list[Update], Update]:
        """The noise that an engine draws in an iteration: of its discriminator updates, and its generator's."""
        e, n = self.plain, self.batch
        key: dict[str, Any] = {"seed": self.arguments().get("seed", 0), "device": self.device}
        places, updates = {p.place for p in e.penalties}, []
        for k in range(iteration * e.n_critic, (iteration + 1) * e.n_critic):
            z = e._latents(n, Stream.D_LATENT, k) if e.generator is not None else None
            alpha = delta = None
            if "interpolated" in places:
                alpha = noise.uniform(n // e.packed, 1, stream=Stream.ALPHA, step=k, **key).view(-1)
            if "perturbed" in places:
                flat = noise.normal(n, self.shape_size, stream=Stream.PERTURBATION, step=k, **key)
                delta = flat.view(n, *self.shape)
            updates.append(Update(z, alpha, delta))
        if e.generator is None:
            return updates, Update()
        return updates, Update(e._latents(n, Stream.G_LATENT, iteration))


def cases(names: Iterable[str], batches: Iterable[int], device: torch.device, precision: str) -> list[Case]:
    """Every workload at every batch size, at its own where there is none.

    Raises:
        InputError: a workload is unknown, or a batch size is not possible.
    """
    asked, found = [*batches], []
    for name in names:
        workload = find(name)
        for batch in asked or [workload.batch]:
            case = Case(workload, batch, device, precision)
            if batch < 1 or batch % case.plain.packed:
                expected = f"a multiple of pac = {case.plain.packed}" if batch > 0 else ">= 1"
                raise InputError(f"batch: is {batch}, expected {expected}")
            found.append(case)
    return found
