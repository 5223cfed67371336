"""Fully connected pair for images and tables, from a list of hidden widths.

The vanilla pair on 28x28 images is 100-256-512-784 with ReLU and tanh against 784-512-256-1 with LeakyReLU 0.2.
Source: Goodfellow et al. 2014, "Generative adversarial nets" (arXiv:1406.2661).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastgan.models.conditional import ConcatLabels, Projection
from fastgan.options import option

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


@dataclass(frozen=True)
class GeneratorOptions:
    """Hidden ``widths``, their ``activation`` and ``norm``; ``output`` auto is tanh for images, linear for tables."""

    widths: tuple[int, ...] = option(low=1)
    activation: str = option("relu", choices=tuple(ACTIVATIONS))
    norm: str = option("none", choices=("none", *NORMS))
    output: str = option("auto", choices=("auto", "tanh", "linear"))
    embedding: int = option(16, low=1)


@dataclass(frozen=True)
class DiscriminatorOptions:
    """Hidden ``widths``, their ``activation`` and ``norm``; ``conditioning`` and ``embedding`` matter with labels."""

    widths: tuple[int, ...] = option(low=1)
    activation: str = option("leaky-relu", choices=tuple(ACTIVATIONS))
    norm: str = option("none", choices=("none", *NORMS))
    conditioning: str = option("concat", choices=("concat", "projection"))
    embedding: int = option(16, low=1)


def _hidden(width: int, options: GeneratorOptions | DiscriminatorOptions) -> list[nn.Module]:
    """Linear, norm and activation of each hidden layer, after ``width`` inputs."""
    layers: list[nn.Module] = []
    for wider in options.widths:
        layers.append(nn.Linear(width, wider))
        if options.norm != "none":
            layers.append(NORMS[options.norm](wider))
        layers.append(ACTIVATIONS[options.activation]())
        width = wider
    return layers


def build_generator(options: GeneratorOptions, shape: tuple[int, ...], latent: int, n_classes: int) -> nn.Module:
    """Latents ``[B, latent]`` (and labels ``[B]`` where ``n_classes`` > 0) to ``[B, *shape]``."""
    inputs = latent + (options.embedding if n_classes else 0)
    layers = _hidden(inputs, options)
    layers.append(nn.Linear(options.widths[-1] if options.widths else inputs, math.prod(shape)))
    if options.output == "tanh" or (options.output == "auto" and len(shape) == 3):
        layers.append(nn.Tanh())
    if len(shape) > 1:
        layers.append(nn.Unflatten(1, shape))
    net = nn.Sequential(*layers)
    return ConcatLabels(net, n_classes, options.embedding) if n_classes else net


def build_discriminator(options: DiscriminatorOptions, shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Data ``[B, *shape]`` (and labels ``[B]`` where ``n_classes`` > 0) to logits ``[B, 1]``."""
    concat = bool(n_classes) and options.conditioning == "concat"
    inputs = math.prod(shape) + (options.embedding if concat else 0)
    width = options.widths[-1] if options.widths else inputs
    layers: list[nn.Module] = [*([nn.Flatten()] if len(shape) > 1 and not concat else []), *_hidden(inputs, options)]
    if n_classes and not concat:
        return Projection(nn.Sequential(*layers), width, n_classes)
    net = nn.Sequential(*layers, nn.Linear(width, 1))
    return ConcatLabels(net, n_classes, options.embedding) if concat else net
