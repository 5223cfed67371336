"""Lightning's loop for GANs, by manual optimisation, in the style of its documentation."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import fastgan
from bench.peers import Peer, Sides, Skip, difference, stepping
from bench.peers.loops import Pair, copies, doubles, random_images
from fastgan.benchmark.timing import wait

Tensor = torch.Tensor
SHAPE, LATENT, SKIPPED = (1, 28, 28), 100, 5  # batches of a fit before the clock starts


def networks(tiny: bool) -> Pair:
    a, b, c = (16, 24, 32) if tiny else (128, 256, 512)
    g = nn.Sequential(
        nn.Linear(LATENT, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(),
        nn.Linear(c, 784), nn.Tanh(), nn.Unflatten(1, SHAPE),
    )  # fmt: skip
    d = nn.Sequential(
        nn.Flatten(), nn.Linear(784, c), nn.LeakyReLU(0.2), nn.Linear(c, b), nn.LeakyReLU(0.2), nn.Linear(b, 1)
    )
    return g, d


def engine(of: Pair, device: torch.device) -> fastgan.Engine:
    """Ours, of the same training."""
    adam = fastgan.Adam(2e-4, (0.5, 0.999))
    return fastgan.Engine(
        *of, latent=LATENT, g_optimizer=adam, d_optimizer=adam, ema=None, device=device, precision="fp32"
    )


def module_of(pair: Pair) -> Any:
    """The ``LightningModule``: one optimiser after the other, each with only its own parameters switched on."""
    import lightning

    class Gan(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.discriminator = pair
            self.drawn: Tensor | None = None

        def configure_optimizers(self) -> Any:
            g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
            d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
            return [g, d], []

        def adversarial_loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
            return functional.binary_cross_entropy_with_logits(y_hat, y)

        def training_step(self, imgs: Tensor) -> None:
            optimizer_g, optimizer_d = self.optimizers()
            z = torch.randn(len(imgs), LATENT).type_as(imgs)
            self.drawn = z

            self.toggle_optimizer(optimizer_d)
            real, fake = torch.ones(len(imgs), 1).type_as(imgs), torch.zeros(len(imgs), 1).type_as(imgs)
            real_loss = self.adversarial_loss(self.discriminator(imgs), real)
            fake_loss = self.adversarial_loss(self.discriminator(self.generator(z).detach()), fake)
            self.manual_backward(real_loss + fake_loss)
            optimizer_d.step()
            optimizer_d.zero_grad()
            self.untoggle_optimizer(optimizer_d)

            self.toggle_optimizer(optimizer_g)
            g_loss = self.adversarial_loss(self.discriminator(self.generator(z)), real)
            self.manual_backward(g_loss)
            optimizer_g.step()
            optimizer_g.zero_grad()
            self.untoggle_optimizer(optimizer_g)

    return Gan()


def fit(module: Any, loader: DataLoader[Any], device: torch.device, batches: int, skipped: int) -> float:
    """Seconds of a batch in ``Trainer.fit`` after the first ``skipped``, which is where the loop has started."""
    import lightning

    class Clock(lightning.Callback):
        begin = end = 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == skipped - 1:
                wait(device)
                self.begin = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            wait(device)
            self.end = time.perf_counter()

    clock = Clock()
    with quiet():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=skipped + batches,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(module, loader)
    return (clock.end - clock.begin) / batches


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's lines about the machine and its advice on loader workers, which the data do not need."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def endless(loader: DataLoader[Any]) -> Iterator[Tensor]:
    while True:
        yield from loader


def prepare(device: torch.device, tiny: bool) -> Sides:
    try:
        with quiet():
            import lightning  # noqa: F401
    except ImportError as e:
        raise Skip(f"lightning is not installed ({e}): pip install -c constraints.txt -e '.[peers]'") from e
    batch, iterations = (8, 2) if tiny else (64, 50)
    images = random_images(batch * (iterations + SKIPPED), SHAPE)
    loader: DataLoader[Any] = DataLoader(images, batch_size=batch, shuffle=True)
    torch.manual_seed(0)
    pair = networks(tiny)

    module, ours, one = module_of(doubles(pair)), engine(doubles(pair), device), images[:batch].double()
    fit(module, DataLoader(one, batch_size=batch), device, batches=1, skipped=0)
    ours.d_step(one, z=module.drawn)
    ours.g_step(z=module.drawn)
    theirs = module.to(device)
    error = difference((theirs.generator, ours.generator), (theirs.discriminator, ours.discriminator))

    module, ours, alone = module_of(copies(pair)), engine(copies(pair), device), engine(copies(pair), device)
    batches, feed = (
        endless(loader),
        fastgan.open_dataset(images).feed(batch, device=device if device.type == "cuda" else None),
    )
    return Sides(
        peer=lambda n: fit(module, loader, device, n, SKIPPED),
        fastgan=stepping(lambda: ours.step(batches), device),
        error=error,
        images=batch,
        iterations=iterations,
        more={"fastgan, its own feed": stepping(lambda: alone.step(feed), device)},
        notes={"batch": batch, "shape": SHAPE, "data": "uniform random"},
    )


LIGHTNING = Peer(
    "lightning",
    "one iteration of an MLP GAN on 28x28, batch 64, in Lightning's Trainer.fit with manual optimisation",
    "Networks, losses, Adam and the DataLoader are the same; progress bar, logger and checkpoints are off; the time is "
    "that between batches, without the fit's start. The module makes fakes of the same latents for both updates; the "
    "engine draws new ones for the generator's. Its own feed is timed beside it.",
    prepare,
)
