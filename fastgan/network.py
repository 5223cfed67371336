"""A network as a list of known layers: what :mod:`fastgan.reader` makes of a module and plans are made of.

Value 0 is the network's input, value ``i + 1`` the output of layer ``i``. Every value is ``[rows, *shape]``, and every
layer but batch normalisation acts on each row by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

Shape = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(eq=False)
class SpectralNorm:
    """Division of a weight by its largest singular value, estimated by power iteration in training mode.

    Source: Miyato et al. 2018, "Spectral normalization for generative adversarial networks" (arXiv:1802.05957).

    Attributes:
        u, v: the buffers of the two singular vectors, which every forward pass in training mode moves on.
        dim: the weight's dimension that becomes the rows of the matrix.
        iterations: per forward pass; 0 outside training.
        eps: of the vectors' normalisation.
        first: the vector that each iteration makes from the other one before it makes the other one anew.
    """

    u: torch.Tensor
    v: torch.Tensor
    dim: int
    iterations: int
    eps: float
    first: Literal["u", "v"]


@dataclass(eq=False, kw_only=True)
class Layer:
    """One operation.

    Attributes:
        name: the module's path, followed by the function's name where its forward calls one.
        inputs: numbers of the values it reads.
        shape: of a row of its output.
    """

    name: str
    inputs: tuple[int, ...]
    shape: Shape

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Its weight and its bias, where it has them; the weight before spectral normalisation."""
        return tuple(p for p in (getattr(self, "weight", None), getattr(self, "bias", None)) if p is not None)

    @property
    def curved(self) -> bool:
        """Whether its second derivative is more than zero almost everywhere."""
        return False


@dataclass(eq=False, kw_only=True)
class Affine(Layer):
    """A product with ``weight``, the trained parameter before spectral normalisation, and a sum with ``bias``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    spectral: SpectralNorm | None = None


@dataclass(eq=False, kw_only=True)
class Linear(Affine):
    """``x W^T + b`` over the last dimension."""


@dataclass(eq=False, kw_only=True)
class Convolution(Affine):
    """``Conv2d`` or, ``transposed``, ``ConvTranspose2d``, with zeros as padding."""

    stride: Pair
    padding: Pair
    dilation: Pair
    output_padding: Pair
    groups: int
    transposed: bool


@dataclass(eq=False, kw_only=True)
class Activation(Layer):
    """Elementwise. ``slope`` belongs to leaky-relu (ReLU has 0), ``beta`` and ``threshold`` to softplus."""

    kind: Literal["leaky-relu", "tanh", "sigmoid", "silu", "softplus"]
    slope: float = 0.0
    beta: float = 1.0
    threshold: float = 20.0

    @property
    def curved(self) -> bool:
        return self.kind != "leaky-relu"


@dataclass(eq=False, kw_only=True)
class Dropout(Layer):
    """Zeroes each element with probability ``p`` and divides the others by ``1 - p``; only in training mode."""

    p: float


@dataclass(eq=False, kw_only=True)
class Reshape(Layer):
    """The same numbers in another shape: flatten, unflatten, view, squeeze; ``shape`` says which."""


@dataclass(eq=False, kw_only=True)
class AveragePool(Layer):
    """``avg_pool2d``; ``mean`` where torch takes a mean instead, as adaptive pooling to 1 x 1 does."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool
    count_include_pad: bool
    divisor: int | None
    mean: bool = False


@dataclass(eq=False, kw_only=True)
class Upsample(Layer):
    """Nearest or bilinear upsampling to ``shape``; ``scales`` as torch's kernels take them."""

    mode: Literal["nearest", "bilinear"]
    align_corners: bool
    scales: tuple[float | None, float | None]


@dataclass(eq=False, kw_only=True)
class Norm(Layer):
    """Layer, instance and group normalisation: each row is cut into ``groups`` equal runs of consecutive numbers, each
    brought to mean 0 and variance 1, then scaled and shifted.

    ``weight`` and ``bias`` have ``affine_shape``, which broadcasts against a row: ``(C, 1, 1)`` for group and instance
    norm, the normalised shape for layer norm.
    """

    groups: int
    eps: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    affine_shape: Shape = ()

    @property
    def curved(self) -> bool:
        return True


@dataclass(eq=False, kw_only=True)
class BatchNorm(Layer):
    """Batch normalisation over dimension 0 of the rows' shape; ``module`` has its parameters, buffers and mode."""

    module: nn.modules.batchnorm._BatchNorm

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.module.parameters())

    @property
    def curved(self) -> bool:
        return True


@dataclass(eq=False, kw_only=True)
class Add(Layer):
    """The sum of two values."""


@dataclass(eq=False)
class Network:
    """Layers in an order in which they can run.

    Attributes:
        layers: the last one gives the output.
        shape: of a row of the input, after packing.
        packed: how many of the caller's samples make one row (Lin et al. 2018, "PacGAN").
        modules: every module that the layers were read from, itself and its children included.
    """

    layers: list[Layer]
    shape: Shape
    packed: int = 1
    modules: list[nn.Module] = field(default_factory=list)

    def value_shape(self, value: int) -> Shape:
        """The shape of a row of that value."""
        return self.shape if value == 0 else self.layers[value - 1].shape
