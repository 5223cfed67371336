"""Generators and discriminators in plain ``torch.nn``, one family a file, by name.

A network of ``n_classes`` > 0 is called ``net(x, labels)`` with labels int64 ``[B]``, any other ``net(x)``.
A generator maps latents ``[B, latent]`` to the data's shape, a discriminator the data to logits ``[B, 1]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import nn

from fastgan.errors import unknown
from fastgan.models import dcgan, mlp
from fastgan.options import Reader


class Family(Protocol):
    """What each file of this package holds."""

    GeneratorOptions: type[Any]
    DiscriminatorOptions: type[Any]

    def build_generator(self, options: Any, shape: tuple[int, ...], latent: int, n_classes: int) -> nn.Module: ...

    def build_discriminator(self, options: Any, shape: tuple[int, ...], n_classes: int) -> nn.Module: ...


MODELS: dict[str, Family] = {"mlp": cast(Family, mlp), "dcgan": cast(Family, dcgan)}


def options(role: str, spec: Mapping[str, Any], reader: Reader) -> Any:
    """The checked options of a network's part of a recipe.

    Args:
        role: ``"generator"`` or ``"discriminator"``.
        spec: ``{"model": name, option: value, ...}``.
        reader: names the file in errors.

    Raises:
        InputError: an unknown model or option, or a value of the wrong type or range.
    """
    name = spec.get("model")
    if not isinstance(name, str) or name not in MODELS:
        raise reader.error(f"{role}.model", f"{role}: {unknown('model', name, MODELS)}")
    family = MODELS[name]
    cls = family.GeneratorOptions if role == "generator" else family.DiscriminatorOptions
    return reader.read(cls, {k: v for k, v in spec.items() if k != "model"}, role)


def build(
    role: str, spec: Mapping[str, Any], shape: tuple[int, ...], latent: int, n_classes: int = 0, file: str = "recipe"
) -> nn.Module:
    """A network from its part of a recipe, sized for data of ``shape``.

    Args:
        role: ``"generator"`` or ``"discriminator"``.
        spec: ``{"model": name, option: value, ...}``.
        shape: the data's, ``(C, H, W)`` or ``(D,)``.
        latent: latent numbers per sample.
        n_classes: number of classes of a conditional network, 0 for one without labels.
        file: named in errors.

    Raises:
        InputError: an unknown model or option, a wrong value, or a shape that the model cannot have.
    """
    checked = options(role, spec, Reader(file))
    family = MODELS[spec["model"]]
    if role == "generator":
        return family.build_generator(checked, shape, latent, n_classes)
    return family.build_discriminator(checked, shape, n_classes)
