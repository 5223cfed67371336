"""The torchgan package (last released in 2021): its Trainer, where it still imports."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from bench.peers import Peer, Sides, Skip, difference, stepping
from bench.peers.lightning import LATENT, SHAPE, SKIPPED, endless, engine, networks
from bench.peers.loops import Pair, copies, doubles, random_images
from fastgan.benchmark.timing import wait


def train(package: Any, pair: Pair, loader: DataLoader[Any], device: torch.device, batch: int, skipped: int) -> Any:
    """One epoch of torchgan's Trainer; what it gives has the seconds of a batch and the latents of the first one."""

    class Generator(package.models.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(LATENT, label_type="none")
            self.net, self.drawn = pair[0], []

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            z = z.to(next(self.net.parameters()))
            if len(self.drawn) < 2:  # not those of the pictures at the end
                self.drawn.append(z)
            return self.net(z)

    class Discriminator(package.models.Discriminator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(SHAPE[1] * SHAPE[2], label_type="none")
            self.net = pair[1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    class Trainer(package.trainer.Trainer):  # type: ignore[misc]
        def train_iter_custom(self) -> None:
            wait(device)
            stamps.append(time.perf_counter())

    stamps: list[float] = []
    adam = {"name": torch.optim.Adam, "args": {"lr": 2e-4, "betas": (0.5, 0.999)}}
    models = {
        "discriminator": {"name": Discriminator, "optimizer": adam},
        "generator": {"name": Generator, "optimizer": adam},
    }
    losses = [package.losses.MinimaxDiscriminatorLoss(), package.losses.MinimaxGeneratorLoss()]
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = str(Path(folder) / "out")
        trainer = Trainer(
            models, losses, device=device, epochs=1, sample_size=1, checkpoints=out, retain_checkpoints=1, log_dir=out
        )
        trainer(loader)
    trainer.seconds = (stamps[-1] - stamps[skipped]) / max(1, len(stamps) - 1 - skipped)
    return trainer


def prepare(device: torch.device, tiny: bool) -> Sides:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchgan as package
    except (ImportError, RuntimeError, AttributeError) as e:  # as torchvision raises where it is of another torch
        raise Skip(f"torchgan cannot be imported: {type(e).__name__}: {str(e).splitlines()[0]}") from e
    batch, iterations = (8, 2) if tiny else (64, 50)
    images = random_images(batch * (1 + iterations + SKIPPED), SHAPE)
    loader: DataLoader[Any] = DataLoader(images, batch_size=batch, shuffle=True)
    torch.manual_seed(0)
    pair = networks(tiny)

    theirs, ours, one = doubles(pair), engine(doubles(pair), device), images[:batch].double()
    trainer = train(package, theirs, DataLoader(one, batch_size=batch), device, batch, skipped=0)
    for_discriminator, for_generator = trainer.generator.drawn[:2]
    ours.d_step(one, z=for_discriminator)
    ours.g_step(z=for_generator)
    error = difference((theirs[0], ours.generator), (theirs[1], ours.discriminator))

    theirs, ours, batches = copies(pair), engine(copies(pair), device), endless(loader)
    return Sides(
        peer=lambda n: train(package, theirs, loader, device, batch, SKIPPED).seconds,
        fastgan=stepping(lambda: ours.step(batches), device),
        error=error,
        images=batch,
        iterations=iterations,
        notes={"batch": batch, "shape": SHAPE, "data": "uniform random"},
    )


TORCHGAN = Peer(
    "torchgan",
    "one iteration of an MLP GAN on 28x28, batch 64, by torchgan's Trainer",
    "Networks, losses, Adam and the DataLoader are the same; the time is that between batches. torchgan's WGAN-GP "
    "steps its optimiser once for the loss and once for the penalty, which is another method: it is not compared.",
    prepare,
)
