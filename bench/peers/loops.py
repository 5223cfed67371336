"""Plain loops as people write them after the tutorials: DCGAN, and WGAN-GP with the habits of its script."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from torch import autograd, nn
from torch.autograd import Variable

import fastgan
from bench.peers import Peer, Sides, difference, stepping
from fastgan import models
from fastgan.penalties import GradientPenalty

Tensor = torch.Tensor
Pair = tuple[nn.Module, nn.Module]


class Dcgan:
    """One iteration in the style of PyTorch's DCGAN tutorial: probabilities, real and fake samples one after the other.

    The generator's update judges the samples of the discriminator's again, and four figures are read back.
    """

    def __init__(self, net_g: nn.Module, net_d: nn.Module, latent: int) -> None:
        self.net_g, self.net_d, self.latent = net_g, net_d, latent
        self.criterion = nn.BCELoss()
        self.optimizer_d = torch.optim.Adam(net_d.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.optimizer_g = torch.optim.Adam(net_g.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.log: tuple[float, ...] = ()

    def step(self, real: Tensor) -> Tensor:
        """``real`` ``[B, C, H, W]``; gives the latents ``[B, latent]`` that were drawn."""
        self.net_d.zero_grad()
        label = torch.full((len(real),), 1.0, dtype=real.dtype, device=real.device)
        output = self.net_d(real).view(-1)
        loss_real = self.criterion(output, label)
        loss_real.backward()
        d_x = output.mean().item()
        noise = torch.randn(len(real), self.latent, dtype=real.dtype, device=real.device)
        fake = self.net_g(noise)
        label.fill_(0.0)
        output = self.net_d(fake.detach()).view(-1)
        loss_fake = self.criterion(output, label)
        loss_fake.backward()
        d_loss = (loss_real + loss_fake).item()
        self.optimizer_d.step()

        self.net_g.zero_grad()
        label.fill_(1.0)
        output = self.net_d(fake).view(-1)
        g_loss = self.criterion(output, label)
        g_loss.backward()
        self.optimizer_g.step()
        self.log = d_x, d_loss, g_loss.item(), output.mean().item()
        return noise


class WganGp:
    """Updates in the style of the widely copied script: noise from numpy, ``Variable``, the fakes' graph kept.

    The critic's backward pass goes through the generator too, whose gradients are thrown away.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent: int) -> None:
        self.generator, self.discriminator, self.latent = generator, discriminator, latent
        self.optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def gradient_penalty(self, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        d_interpolates = self.discriminator(interpolates)
        ones = Variable(torch.ones_like(d_interpolates), requires_grad=False)
        gradients = autograd.grad(
            outputs=d_interpolates,
            inputs=interpolates,
            grad_outputs=ones,
            create_graph=True,
            retain_graph=True,
            only_inputs=True,
        )[0]
        gradients = gradients.view(gradients.size(0), -1)
        return ((gradients.norm(2, dim=1) - 1) ** 2).mean()

    def critic_update(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """``imgs`` ``[B, ...]``; gives the latents ``[B, latent]`` and weights ``[B, 1, ...]`` that were drawn."""
        real_imgs = Variable(imgs)
        self.optimizer_d.zero_grad()
        z = Variable(torch.as_tensor(np.random.normal(0, 1, (imgs.shape[0], self.latent))).to(imgs))
        fake_imgs = self.generator(z)
        real_validity = self.discriminator(real_imgs)
        fake_validity = self.discriminator(fake_imgs)
        alpha = torch.as_tensor(np.random.random((imgs.size(0), *[1] * (imgs.ndim - 1)))).to(imgs)
        penalty = self.gradient_penalty(real_imgs.data, fake_imgs.data, alpha)
        d_loss = -torch.mean(real_validity) + torch.mean(fake_validity) + 10.0 * penalty
        d_loss.backward()
        self.optimizer_d.step()
        return z, alpha

    def generator_update(self, z: Tensor) -> None:
        """``z`` ``[B, latent]``: those of the last critic update, as the script has it."""
        self.optimizer_g.zero_grad()
        g_loss = -torch.mean(self.discriminator(self.generator(z)))
        g_loss.backward()
        self.optimizer_g.step()

    def step(self, batches: tuple[Tensor, ...]) -> None:
        """One critic update for each of the ``batches``, then one of the generator."""
        for imgs in batches:
            z, _ = self.critic_update(imgs)
        self.generator_update(z)


# ---- beside the engine


def copies(pair: Pair) -> Pair:
    return copy.deepcopy(pair[0]), copy.deepcopy(pair[1])


def doubles(pair: Pair) -> Pair:
    g, d = copies(pair)
    return g.double(), d.double()


def random_images(n: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """``[n, *shape]`` in [-1, 1]: no content matters to the time."""
    return 2 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype) - 1


def dcgan(device: torch.device, tiny: bool) -> Sides:
    size, width, batch = (16, 8, 4) if tiny else (64, 64, 32)
    shape, latent, options = (3, size, size), 100, {"model": "dcgan", "width": width}
    torch.manual_seed(0)
    pair = (
        models.build("generator", options, shape, latent).to(device),
        nn.Sequential(models.build("discriminator", options, shape, latent), nn.Sigmoid()).to(device),
    )

    def engine(networks: Pair) -> fastgan.Engine:
        adam = fastgan.Adam(2e-4, (0.5, 0.999))
        return fastgan.Engine(
            *networks, latent=latent, g_optimizer=adam, d_optimizer=adam, ema=None, device=device, precision="fp32"
        )

    loop, ours = Dcgan(*doubles(pair), latent), engine(doubles(pair))
    real = random_images(batch, shape, torch.float64).to(device)
    noise = loop.step(real)
    ours.d_step(real, z=noise)
    ours.g_step(z=noise)
    error = difference((loop.net_g, ours.generator), (loop.net_d, ours.discriminator))

    loop, ours, real = Dcgan(*copies(pair), latent), engine(copies(pair)), real.float()
    return Sides(
        peer=stepping(lambda: loop.step(real), device),
        fastgan=stepping(lambda: ours.step(real), device),
        error=error,
        images=batch,
        iterations=1,
        notes={"batch": batch, "shape": shape},
    )


def critic_pair(shape: tuple[int, ...], widths: tuple[int, ...], critic: tuple[int, ...], latent: int) -> Pair:
    """The script's networks: batch norm in the generator, none in the critic."""
    pixels = int(np.prod(shape))
    g = [nn.Linear(latent, widths[0]), nn.LeakyReLU(0.2)]
    for a, b in itertools.pairwise(widths):
        g += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.LeakyReLU(0.2)]
    d: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise((pixels, *critic)):
        d += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    return (
        nn.Sequential(*g, nn.Linear(widths[-1], pixels), nn.Tanh(), nn.Unflatten(1, shape)),
        nn.Sequential(*d, nn.Linear(critic[-1], 1)),
    )


def wgan_gp(device: torch.device, tiny: bool) -> Sides:
    latent, n_critic = 100, 5
    shape, batch = ((1, 8, 8), 6) if tiny else ((1, 28, 28), 64)
    torch.manual_seed(0)
    widths, critic = ((16, 24), (24, 16)) if tiny else ((128, 256, 512, 1024), (512, 256))
    pair = tuple(net.to(device) for net in critic_pair(shape, widths, critic, latent))

    def engine(networks: Pair) -> fastgan.Engine:
        adam = fastgan.Adam(2e-4, (0.5, 0.999))
        return fastgan.Engine(
            *networks, latent=latent, loss="wasserstein", penalties=[GradientPenalty(10.0)], n_critic=n_critic,
            g_optimizer=adam, d_optimizer=adam, ema=None, device=device, precision="fp32",
        )  # fmt: skip

    loop, ours = WganGp(*doubles(pair), latent), engine(doubles(pair))
    imgs = random_images(n_critic * batch, shape, torch.float64).to(device)
    z, alpha = loop.critic_update(imgs[:batch])
    loop.generator_update(z)
    ours.d_step(imgs[:batch], z=z, alpha=alpha.view(-1))
    ours.g_step(z=z)
    error = difference((loop.generator, ours.generator), (loop.discriminator, ours.discriminator))

    loop, ours, imgs = WganGp(*copies(pair), latent), engine(copies(pair)), imgs.float()
    batches = imgs.split(batch)
    return Sides(
        peer=stepping(lambda: loop.step(batches), device),
        fastgan=stepping(lambda: ours.step(imgs), device),
        error=error,
        images=n_critic * batch,
        iterations=1 if tiny else 2,
        notes={"batch": batch, "n_critic": n_critic, "shape": shape},
    )


DCGAN = Peer(
    "dcgan-loop",
    "one iteration of DCGAN 64x64, batch 32, by a loop in the style of PyTorch's tutorial",
    "Networks, losses and Adam are the same, batches lie in memory. The loop makes one batch of fakes for both "
    "updates; the engine makes new ones for the generator's.",
    dcgan,
)
WGAN_GP = Peer(
    "wgan-gp-loop",
    "one iteration of WGAN-GP, n_critic 5, batch 64, MLPs on 28x28, by a loop in the style of the widely copied script",
    "Networks, losses, penalty and Adam are the same, batches lie in memory. The loop draws its noise by numpy, does "
    "not detach its fakes and uses one batch of latents for the last critic update and the generator's.",
    wgan_gp,
)
