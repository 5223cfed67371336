"""Convolutional pair for square images of 8, 16, 32, 64, ... pixels.

The generator goes from 4x4 up by transposed convolutions, the discriminator back down by strided ones; every weight
starts from N(0, 0.02). Source: Radford et al. 2016, "Unsupervised representation learning with deep convolutional
generative adversarial networks" (arXiv:1511.06434).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastgan.errors import InputError
from fastgan.models.conditional import ConcatLabels, MapLabels, Projection
from fastgan.options import option

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


@dataclass(frozen=True)
class GeneratorOptions:
    """``width``: channels before the last layer, doubled at each halving of the image; ``embedding``: per label."""

    width: int = option(64, low=1)
    norm: str = option("batch", choices=("none", *NORMS))
    embedding: int = option(16, low=1)


@dataclass(frozen=True)
class DiscriminatorOptions:
    """``width``: channels after the first layer, doubled at each halving; ``conditioning`` matters with labels.

    A gradient penalty is a function of one row, which ``norm: batch`` breaks: take layer, instance or none.
    """

    width: int = option(64, low=1)
    norm: str = option("batch", choices=("none", *NORMS))
    conditioning: str = option("map", choices=("map", "projection"))


def _halvings(shape: tuple[int, ...]) -> int:
    """Number of times the image is halved down to 4x4."""
    size = shape[-1]
    if len(shape) != 3 or shape[1] != size or size < 8 or size & (size - 1):
        raise InputError(
            f"dcgan: the data have shape {shape}, expected square images of 8, 16, 32, 64, ... pixels: "
            "set data.resolution (and data.crop), or take model mlp"
        )
    return size.bit_length() - 3


def _normal(net: nn.Module) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)
    return net


def build_generator(options: GeneratorOptions, shape: tuple[int, ...], latent: int, n_classes: int) -> nn.Module:
    """Latents ``[B, latent]`` (and labels ``[B]`` where ``n_classes`` > 0) to images ``[B, *shape]`` in [-1, 1].

    Raises:
        InputError: ``shape`` is not that of square images of a power of two pixels.
    """
    halvings = _halvings(shape)
    inputs = latent + (options.embedding if n_classes else 0)
    plain = options.norm == "none"
    layers: list[nn.Module] = [nn.Unflatten(1, (inputs, 1, 1))]
    channels = inputs
    for step in range(halvings):
        wider = options.width << (halvings - 1 - step)
        stride, padding = (2, 1) if step else (1, 0)  # 1x1 to 4x4, then doubled each time
        layers.append(nn.ConvTranspose2d(channels, wider, 4, stride, padding, bias=plain))
        layers += [*([] if plain else [NORMS[options.norm](wider)]), nn.ReLU()]
        channels = wider
    net = nn.Sequential(*layers, nn.ConvTranspose2d(channels, shape[0], 4, 2, 1), nn.Tanh())
    return _normal(ConcatLabels(net, n_classes, options.embedding) if n_classes else net)


def build_discriminator(options: DiscriminatorOptions, shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Images ``[B, *shape]`` (and labels ``[B]`` where ``n_classes`` > 0) to logits ``[B, 1]``.

    Raises:
        InputError: ``shape`` is not that of square images of a power of two pixels.
    """
    halvings = _halvings(shape)
    mapped = bool(n_classes) and options.conditioning == "map"
    channels = shape[0] + int(mapped)
    layers: list[nn.Module] = []
    for step in range(halvings):
        wider = options.width << step
        normed = step > 0 and options.norm != "none"
        layers.append(nn.Conv2d(channels, wider, 4, 2, 1, bias=not normed))
        layers += [*([NORMS[options.norm](wider)] if normed else []), nn.LeakyReLU(0.2)]
        channels = wider
    if n_classes and not mapped:
        pooled = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return _normal(Projection(pooled, channels, n_classes))
    net = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4), nn.Flatten())
    return _normal(MapLabels(net, n_classes, (shape[1], shape[2])) if mapped else net)
