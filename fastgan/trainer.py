"""Training from start to finish: data, log, pictures, checkpoints, resuming, quality figures.

A run is a folder ``OUTDIR/00007-NAME-DATA`` with ``config.json``, ``metrics.jsonl``, TensorBoard events,
``samples/``, ``loss_curves.png`` and ``checkpoints/``. Everything that happens, happens at a fixed iteration, so that
a run that was stopped and resumed writes what one that was never stopped would have: only keys that begin with
``wall_`` differ.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch

import fastgan
from fastgan import checkpoint, losses, models, penalties, pictures, runs
from fastgan.data import Dataset, open_dataset
from fastgan.data.dataset import Feed
from fastgan.data.resident import ResidentFeed
from fastgan.data.stream import Stream
from fastgan.data.toys import TOYS
from fastgan.ema import EMA
from fastgan.engine import Engine
from fastgan.errors import InputError
from fastgan.optim import Adam, AdamW, Schedule
from fastgan.recipes import Recipe
from fastgan.recipes.schema import MOST_KIMG, DataSpec, EvaluationSpec, OptimizerSpec, iterations

if TYPE_CHECKING:
    from tqdm import tqdm

Progress = Literal["auto", "bar", "lines", "none"]

_LOG = logging.getLogger(__name__)
_KEEP = 2  # checkpoints
_AT_ONCE = 64  # iterations between two looks at the clock and at signals, where several are one call
_GRID_SEED, _QUALITY_SEED = 1, 2
_LINE_EVERY_S = 10.0


@dataclass
class Report:
    """What a run came to.

    Attributes:
        folder: the run's.
        samples: the newest picture of samples.
        curves: the picture of the losses.
        checkpoint: the newest.
        images: real images shown to the discriminator.
        iterations: iterations made.
        iterations_per_second: of training alone, in this process.
        seconds_per_kimg: the same, per thousand real images shown; ``None`` where nothing was trained.
        train_seconds: seconds of training alone, over all processes of the run.
        quality: figures of the averaged generator's samples by name; empty where not evaluated.
        metrics: the engine's figures at the end.
        signal: the signal that ended the run early, or ``None``.
    """

    folder: Path
    samples: Path
    curves: Path
    checkpoint: Path
    images: int
    iterations: int
    iterations_per_second: float | None
    seconds_per_kimg: float | None
    train_seconds: float
    quality: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    signal: int | None = None


class Trainer:
    """Trains an engine on a data set in a run folder of its own.

    Args:
        engine: networks, loss, penalties and optimisers.
        data: a data set, or whatever :func:`fastgan.open_dataset` takes.
        batch: rows per update.
        kimg: thousands of real images to show to the discriminator; an iteration shows ``n_critic * batch``.
        outdir: where run folders are.
        name: part of the run folder's name.
        snapshot_kimg: a picture of samples and a checkpoint every so often; a tenth of the run where not given.
        log_kimg: a line of metrics.jsonl every so often; a two-hundredth of the run where not given.
        evaluation: which quality figures, of how many samples, how often.
        resume: a run folder to go on with, or ``True`` for the newest in ``outdir``. Data, batch and the engine's
            settings must be the run's; what happens how often is the run's where not given. An iterable or DataLoader
            is restarted and what the pass had given is skipped: the resumed run is the same to the bit only where the
            order within a pass is the same too.
        progress: ``"bar"``, ``"lines"`` (one every ten seconds) or ``"none"``, on the standard error; ``"auto"`` is a
            bar on a terminal and lines elsewhere.
        recipe: what the engine was built from; kept in config.json.

    Raises:
        InputError: an argument is out of its range, the data do not fit the networks, the batch or the figures, or the
            run to resume cannot be gone on with. Nothing has been written then.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset | Any,
        *,
        batch: int = 64,
        kimg: float = 100.0,
        outdir: str | Path = "runs",
        name: str = "gan",
        snapshot_kimg: float | None = None,
        log_kimg: float | None = None,
        evaluation: EvaluationSpec | None = None,
        resume: bool | str | Path = False,
        progress: Progress = "auto",
        recipe: Recipe | None = None,
    ) -> None:
        self.engine = engine
        self.data = data if isinstance(data, Dataset) else open_dataset(data)
        self.evaluation = evaluation or EvaluationSpec()
        self.outdir = Path(outdir)
        self.progress = progress
        if engine.generator is None:
            raise InputError("Trainer: the engine has no generator: call engine.step(real, fake=...) in your own loop")
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"Trainer: batch is {batch}, expected a whole number of at least 1")
        every_kimg = self.evaluation.every_kimg
        lengths = {"kimg": kimg, "snapshot_kimg": snapshot_kimg, "log_kimg": log_kimg, "every_kimg": every_kimg}
        for key, value in lengths.items():
            if value is not None and not 0 < value <= MOST_KIMG:
                raise InputError(f"Trainer: {key} is {value}, expected more than 0 and at most {MOST_KIMG:g}")
        self.per_iteration = engine.n_critic * batch
        self.total = iterations(kimg, self.per_iteration)
        self._check()
        self.feed = self._feed(batch)
        self.folder: Path | None = None
        self.iteration = 0
        self.train_seconds = 0.0
        self._metrics_bytes = 0  # of the log's lines up to this iteration
        self._warned = False
        given = {"log": log_kimg, "snapshot": snapshot_kimg, "evaluate": every_kimg}
        every = {k: iterations(v, self.per_iteration) for k, v in given.items() if v is not None}
        usual = {"log": kimg / 200, "snapshot": kimg / 10, "evaluate": kimg}
        suffix = "" if self.data.name in name else f"-{self.data.name}"
        self.name = f"{name}{suffix}"
        self.config: dict[str, Any] = {
            "fastgan": fastgan.__version__,
            "torch": torch.__version__,
            "recipe": recipe.to_dict() if recipe is not None else None,
            "batch": batch,
            "kimg": kimg,
            "every": {k: iterations(v, self.per_iteration) for k, v in usual.items()} | every,  # iterations
            "engine": settings(engine),
            "data": {
                "name": self.data.name,
                "rows": len(self.data),
                "shape": list(self.data.shape),
                "classes": self.data.n_classes,
                "mirror": self.data.mirror,
                "fingerprint": None if isinstance(self.data, Stream) else self.data.fingerprint,
            },
        }
        if resume:
            self._resume(runs.newest(self.outdir) if resume is True else Path(str(resume)), every)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        *,
        outdir: str | Path = "runs",
        resume: bool | str | Path = False,
        device: str | torch.device = "auto",
        progress: Progress = "auto",
        data: Dataset | None = None,
    ) -> Trainer:
        """The trainer that a recipe describes; arguments and errors as above, ``data`` goes before what it names."""
        data = data if data is not None else open_data(recipe.data)
        path = Path(recipe.data.source).expanduser()
        if recipe.data.source not in ("digits", *TOYS) and path.exists():  # to be found from any folder
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=str(path.resolve())))
        return cls(
            build_engine(recipe, tuple(data.shape), data.n_classes, device),
            data,
            batch=recipe.batch,
            kimg=recipe.kimg,
            outdir=outdir,
            name=recipe.name,
            snapshot_kimg=recipe.snapshot_kimg,
            log_kimg=recipe.log_kimg,
            evaluation=recipe.evaluation,
            resume=resume,
            progress=progress,
            recipe=recipe,
        )

    def run(self) -> Report:
        """Train to the end, or until SIGINT or SIGTERM: the step is finished and a checkpoint written.

        Raises:
            InputError: the run folder cannot be written, e.g. because the disk is full. Checkpoints stay.
        """
        if self.folder is None:
            self.folder = runs.make(self.outdir, self.name)
        folder = self.folder
        try:
            with runs.held(folder):
                return self._run(folder)
        except OSError as e:
            raise runs.cannot_write(folder, e) from e

    def _run(self, folder: Path) -> Report:
        for part in ("samples", "checkpoints"):
            (folder / part).mkdir(exist_ok=True)
        self._cut_metrics()
        pictures.write_whole(folder / "config.json", (json.dumps(self.config, indent=1) + "\n").encode())
        every, engine = self.config["every"], self.engine
        first, here = self.iteration, 0.0
        quality: dict[str, float] = {}
        with _Board(folder, engine.images) as board:
            with self._bar() as bar, _Stop() as stop:
                started = time.perf_counter()
                while self.iteration < self.total and not stop.signal:
                    count = self._until_next_event()
                    engine.run(self.feed, count)
                    self.iteration += count
                    bar.step(count)
                    last = self.iteration == self.total
                    log, evaluate, snapshot = (self.iteration % every[k] == 0 for k in ("log", "evaluate", "snapshot"))
                    if not (log or evaluate or snapshot or last or stop.signal):
                        continue
                    metrics = self._metrics()  # waits for the device
                    here += (spent := time.perf_counter() - started)
                    self.train_seconds += spent
                    if log or last:
                        self._log({**metrics, "wall_seconds": round(self.train_seconds, 3)}, board)
                        bar.show(metrics)
                    if evaluate and not last:
                        self._log(self._quality(), board, "quality/")
                    if snapshot or last:
                        self._snapshot()
                    started = time.perf_counter()
                if stop.signal and not self._checkpoint_path().is_dir():
                    self._snapshot()
            if not stop.signal:
                quality = self._quality()
                self._log(quality, board, "quality/")
        done = self.iteration - first
        kimg = done * self.per_iteration / 1000
        return Report(
            folder=folder,
            samples=self._picture(),
            curves=self._curves(),
            checkpoint=self._checkpoint_path(),
            images=engine.images,
            iterations=self.iteration,
            iterations_per_second=done / here if here else None,
            seconds_per_kimg=here / kimg if kimg else None,
            train_seconds=self.train_seconds,
            quality=quality,
            metrics=self._metrics(),
            signal=stop.signal,
        )

    def explain(self) -> str:
        """What the run would be, and what would be written."""
        every = {k: v * self.per_iteration / 1000 for k, v in self.config["every"].items()}
        where = self.folder or self.outdir / f"NNNNN-{self.name}"
        return (
            f"{self.data.name}: {len(self.data)} rows of shape {tuple(self.data.shape)}\n"
            f"{self.total} iterations of {self.per_iteration} real images, from iteration {self.iteration}\n"
            f"{self.engine.explain()}\n"
            f"would write {where}/: config.json, metrics.jsonl every {every['log']:g} kimg, "
            f"samples, loss_curves.png and a checkpoint every {every['snapshot']:g} kimg and at the end"
        )

    def _feed(self, batch: int) -> Feed:
        """Batches made on the GPU where the engine and the data set are there."""
        data, engine = self.data, self.engine
        if engine.device.type == "cuda" and not isinstance(data, Stream):
            try:
                return data.feed(batch, engine.seed, device=engine.device)
            except InputError as e:
                _LOG.warning("fastgan: batches are made on the host: %s", e)
        return data.feed(batch, engine.seed)

    def _until_next_event(self) -> int:
        """Iterations before something is logged or saved: one by one, but many where they are one call on a GPU."""
        if not isinstance(self.feed, ResidentFeed):
            return 1
        every: list[int] = list(self.config["every"].values())
        return min(_AT_ONCE, self.total - self.iteration, *(k - self.iteration % k for k in every))

    # ---- before the start

    def _check(self) -> None:
        """Do data, networks and evaluation fit?"""
        data, engine = self.data, self.engine
        if engine.sample_shape != tuple(data.shape):
            raise InputError(
                f"data set {data.name!r} has shape {tuple(data.shape)}, the generator makes {engine.sample_shape}"
            )
        if engine.n_classes and engine.n_classes != data.n_classes:
            has = f"{data.n_classes} classes" if data.n_classes else "no labels"
            raise InputError(
                f"data set {data.name!r} has {has}, the networks are conditional on {engine.n_classes} classes"
            )
        from fastgan.quality import check

        try:
            check(data, self.evaluation.samples, _wanted(self.evaluation))
        except InputError as e:
            raise InputError(f"evaluation: {e}") from e

    def _resume(self, folder: Path, every: dict[str, int]) -> None:
        old = runs.config(folder)
        if old["data"]["fingerprint"] != self.config["data"]["fingerprint"]:
            raise InputError(f"{folder}: was trained on other data than {self.data.name!r} now holds")
        had = _kept(old)
        for key, value in _kept(self.config).items():
            if had.get(key) != value:
                raise InputError(f"{folder}: {key} is {value}, the run to go on with has {had.get(key)}")
        self.config["every"] = old["every"] | every
        self.folder = folder
        last = runs.last_checkpoint(folder)
        if last is None:  # stopped before the first: start over
            return
        state = runs.state(last)
        try:
            self.feed.load_state_dict(state["feed"])  # a DataLoader starting anew draws from torch's generator
        except InputError as e:
            raise InputError(f"{last}/state.json: {e}") from e
        restore(self.engine, state, last)
        if isinstance(self.data, Stream):
            warnings.warn(f"{folder}: goes on to the bit only if the data come in the same order again", stacklevel=3)
        trainer = state["trainer"]
        self.iteration, self.train_seconds = trainer["iteration"], trainer["wall_seconds"]
        self._metrics_bytes, self._warned = trainer["metrics_bytes"], trainer["warned"]

    # ---- along the way

    def _metrics(self) -> dict[str, float]:
        """The engine's figures, without those that do not apply; warns once of a loss that is not finite."""
        found = self.engine.metrics()
        if not self.engine.penalties:
            del found["penalty"]
        bad = [name for name, value in found.items() if not math.isfinite(value)]
        if (bad or found["skipped_steps"]) and not self._warned:
            self._warned = True
            what = f"{bad[0]} is {found[bad[0]]}" if bad else "a gradient was not finite"
            warnings.warn(f"iteration {self.iteration}: {what}; such updates are skipped and counted", stacklevel=2)
        return found

    def _log(self, figures: dict[str, float], board: _Board, prefix: str = "") -> None:
        """One line of metrics.jsonl, and the same for TensorBoard."""
        if not figures:
            return
        images = self.engine.images
        row: dict[str, Any] = {"iteration": self.iteration, "images": images, "kimg": images / 1000}
        row |= {prefix + k: v if math.isfinite(v) else None for k, v in figures.items()}
        with (self._inside() / "metrics.jsonl").open("ab") as f:
            f.write(json.dumps(row).encode() + b"\n")
            self._metrics_bytes = f.tell()
        board.add({prefix + k: v for k, v in figures.items()}, images)

    def _cut_metrics(self) -> None:
        """Drop what came after this iteration."""
        path = self._inside() / "metrics.jsonl"
        if path.exists() and path.stat().st_size > self._metrics_bytes:
            os.truncate(path, self._metrics_bytes)

    def _snapshot(self) -> None:
        """Picture of samples, loss curves, checkpoint."""
        path = self._picture()
        pictures.samples(self.data, self._grid_samples(), path, columns=10 if self.engine.n_classes else None)
        log = self._inside() / "metrics.jsonl"
        if log.exists():
            with log.open("rb+") as f:
                os.fsync(f.fileno())
            lines = log.read_text("utf-8").splitlines()
            pictures.loss_curves([row for row in map(json.loads, lines) if "d_loss" in row], self._curves())
        state = {
            "engine": self.engine.state_dict(),
            "feed": self.feed.state_dict(),
            "trainer": {
                "iteration": self.iteration,
                "metrics_bytes": self._metrics_bytes,
                "warned": self._warned,
                "wall_seconds": self.train_seconds,
            },
        }
        checkpoint.save(self._checkpoint_path(), state)
        runs.prune(self._inside(), _KEEP)

    def _grid_samples(self) -> torch.Tensor:
        """Samples of the same latents every time; of conditional networks ten of each class, a class a row."""
        engine = self.engine
        if self.data.kind == "table":
            return engine.sample(2500, seed=_GRID_SEED)
        if not engine.n_classes:
            return engine.sample(64, seed=_GRID_SEED)
        labels = torch.arange(min(engine.n_classes, 16)).repeat_interleave(10)
        return engine.sample(len(labels), seed=_GRID_SEED, labels=labels)

    def _quality(self) -> dict[str, float]:
        """Figures as of now; none and a warning where samples do not admit them."""
        try:
            return quality(self.engine, self.data, self.evaluation)
        except InputError as e:
            warnings.warn(f"iteration {self.iteration}: no quality figures: {e}", stacklevel=2)
            return {}

    def _inside(self) -> Path:
        assert self.folder is not None  # set by run()
        return self.folder

    def _picture(self) -> Path:
        return self._inside() / "samples" / f"{self.engine.images:08d}.png"

    def _curves(self) -> Path:
        return self._inside() / "loss_curves.png"

    def _checkpoint_path(self) -> Path:
        return self._inside() / "checkpoints" / f"{self.engine.images:08d}"

    def _bar(self) -> _Bar:
        kind = self.progress
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "lines"
        return _Bar(kind, self.iteration, self.total, self.per_iteration, self._inside().name)


# ---- from a recipe to objects


def open_data(spec: DataSpec) -> Dataset:
    """The data set that a recipe names."""
    channels = None if spec.channels is None else {"grey": 1, "rgb": 3}[spec.channels]
    return open_dataset(spec.source, resolution=spec.resolution, channels=channels, crop=spec.crop, mirror=spec.mirror)


def build_engine(recipe: Recipe, shape: tuple[int, ...], n_classes: int, device: str | torch.device = "auto") -> Engine:
    """The engine that a recipe describes, for data of that shape and those classes; its weights follow the seed.

    Raises:
        InputError: the model cannot have that shape or does not fit in memory, or the recipe is conditional and the
            data have no labels.
    """
    if recipe.conditional and not n_classes:
        raise InputError(f"data set {recipe.data.source!r} has no labels; recipe {recipe.name!r} is conditional")
    n_classes = n_classes if recipe.conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            generator, discriminator = (
                models.build(role, spec, shape, recipe.latent, n_classes, f"recipe {recipe.name}")
                for role, spec in (("generator", recipe.generator), ("discriminator", recipe.discriminator))
            )
        except (RuntimeError, MemoryError) as e:  # PyTorch has no type of its own for memory that is not there
            raise InputError(
                f"recipe {recipe.name}: networks of latent {recipe.latent}: {str(e).splitlines()[0]}"
            ) from e
    updates = recipe.iterations
    return Engine(
        generator,
        discriminator,
        latent=recipe.latent,
        loss=losses.get(recipe.loss.name, clip=recipe.loss.clip),
        penalties=[penalties.PENALTIES[p.name](**p.given()) for p in recipe.penalties],
        n_critic=recipe.n_critic,
        g_optimizer=_optimizer(recipe.g_optimizer, updates),
        d_optimizer=_optimizer(recipe.d_optimizer, updates * recipe.n_critic),
        ema=EMA(**dataclasses.asdict(recipe.ema)) if recipe.ema is not None else None,
        precision=recipe.precision,  # type: ignore[arg-type] # checked by the recipe
        device=device,
        seed=recipe.seed,
        n_classes=n_classes,
    )


def _optimizer(spec: OptimizerSpec, updates: int) -> Adam:
    schedule = None
    if (s := spec.schedule) is not None:
        start = int(s.start * updates)
        schedule = Schedule(
            s.kind,  # type: ignore[arg-type] # checked by the recipe
            steps=max(start + 1, round(s.end * updates)),
            start=start,
            final=s.final,
            warmup=int(s.warmup * updates),
        )
    kind = AdamW if spec.name == "adamw" else Adam
    decay = {} if spec.weight_decay is None else {"weight_decay": spec.weight_decay}
    return kind(lr=spec.lr, betas=spec.betas, eps=spec.eps, schedule=schedule, **decay)


def restore(engine: Engine, state: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's state into an engine.

    Raises:
        InputError: it is of other networks, or something is missing in it; names the checkpoint.
    """
    try:
        engine.load_state_dict(state["engine"])
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        missing = f"{e} is missing" if isinstance(e, KeyError) else f"not as it was written: {e}"
        raise InputError(f"{path}/state.json: engine: {missing}") from e


def settings(engine: Engine) -> dict[str, Any]:
    """What an engine trains by, as plain data for config.json."""
    return {
        "loss": engine.loss.name,
        "clip": engine.loss.clip,
        "penalties": [_in_words(penalty) for penalty in engine.penalties],
        "n_critic": engine.n_critic,
        "g_optimizer": _in_words(engine.g_optimizer),
        "d_optimizer": _in_words(engine.d_optimizer),
        "ema": engine.ema and _in_words(engine.ema),
        "precision": engine.precision,
        "seed": engine.seed,
    }


def _in_words(setting: object) -> str:
    """A dataclass in full, of its schedule what does not follow from the run's length; the type of anything else."""
    if isinstance(setting, Adam) and (s := setting.schedule) is not None:
        setting = dataclasses.replace(setting, schedule=f"{s.kind} to {s.final:g}")  # type: ignore[arg-type]
    return repr(setting) if dataclasses.is_dataclass(setting) else type(setting).__name__


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """What of config.json a resumed run must have the same, by the names that errors give."""
    data = {f"data.{key}": config["data"].get(key) for key in ("shape", "classes", "mirror")}
    return {"batch": config.get("batch"), **config["engine"], **data}


def quality(
    engine: Engine,
    data: Dataset,
    evaluation: EvaluationSpec,
    *,
    ema: bool = True,
    inception_weights: str | Path | None = None,
) -> dict[str, float]:
    """Quality figures of an engine's samples; empty for metrics ``none``."""
    from fastgan import quality as figures

    metrics = _wanted(evaluation)
    if not metrics:
        return {}
    x = engine.sample(evaluation.samples, seed=_QUALITY_SEED, ema=ema)
    return figures.evaluate(data, x, metrics, inception_weights=inception_weights)


def _wanted(evaluation: EvaluationSpec) -> str | tuple[str, ...]:
    """What :func:`fastgan.quality.evaluate` is asked for; nothing for metrics ``none``.

    Raises:
        InputError: ``none`` or ``auto`` stands beside other names.
    """
    for word in {"none", "auto"}.intersection(evaluation.metrics):
        if len(evaluation.metrics) > 1:
            raise InputError(f"metrics has {word!r} beside others, expected it alone")
    if evaluation.metrics == ("none",):
        return ()
    return "auto" if evaluation.metrics == ("auto",) else evaluation.metrics


# ---- what the run shows and listens to


class _Stop:
    """Notes the first SIGINT or SIGTERM; the second SIGINT interrupts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        print("\nfinishing this step and saving; once more aborts", file=sys.stderr)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Board:
    """TensorBoard events; figures after the point of resuming replace what a stopped run left there."""

    def __init__(self, folder: Path, images: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=images + 1, filename_suffix=f".{images:08d}")

    def add(self, figures: dict[str, float], images: int) -> None:
        for name, value in figures.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, images)

    def __enter__(self) -> _Board:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.close()


class _Bar:
    """Progress on the standard error."""

    def __init__(self, kind: str, iteration: int, total: int, per_iteration: int, name: str) -> None:
        self.kind, self.iteration, self.total, self.per_iteration = kind, iteration, total, per_iteration
        self._bar: tqdm[Any] | None = None
        self._shown = time.perf_counter()
        self._first = (iteration, self._shown)
        if kind == "bar":
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=iteration, desc=name, unit="it", dynamic_ncols=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, iterations: int) -> None:
        self.iteration += iterations
        if self._bar is not None:
            self._bar.update(iterations)

    def show(self, metrics: dict[str, float]) -> None:
        text = ", ".join(f"{name} {metrics[name]:.3g}" for name in ("d_loss", "g_loss"))
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif self.kind == "lines" and (now := time.perf_counter()) - self._shown >= _LINE_EVERY_S:
            self._shown = now
            speed = (self.iteration - self._first[0]) / (now - self._first[1])
            kimg = self.per_iteration / 1000
            left = (self.total - self.iteration) / speed
            done = f"{self.iteration * kimg:.1f} of {self.total * kimg:.1f} kimg"
            print(f"{done}, {text}, {speed:.1f} it/s, {left:.0f} s left", file=sys.stderr, flush=True)
