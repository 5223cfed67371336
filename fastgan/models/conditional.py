"""Three ways to tell a network the label of each row; each wraps plain networks and is called ``net(x, labels)``."""

from __future__ import annotations

import math

import torch
from torch import nn


class ConcatLabels(nn.Module):
    """``net([x, embedding(label)])``: a row of features is lengthened by the label's embedding.

    Args:
        net: takes ``[B, features + embedding]``.
        n_classes: number of labels.
        embedding: numbers per label.

    Source: Mirza and Osindero 2014, "Conditional generative adversarial nets" (arXiv:1411.1784).
    """

    def __init__(self, net: nn.Module, n_classes: int, embedding: int) -> None:
        super().__init__()
        self.net = net
        self.embed = nn.Embedding(n_classes, embedding)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, ...]`` and int64 labels ``[B]`` to the output of ``net``."""
        out: torch.Tensor = self.net(torch.cat([x.flatten(1), self.embed(labels)], dim=1))
        return out


class MapLabels(nn.Module):
    """``net([x, map(label)])``: an image gets one more channel, the label's embedding laid out as a picture.

    Args:
        net: takes ``[B, C + 1, H, W]``.
        n_classes: number of labels.
        size: ``(H, W)``.
    """

    def __init__(self, net: nn.Module, n_classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.embed = nn.Embedding(n_classes, size[0] * size[1])

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, C, H, W]`` and int64 labels ``[B]`` to the output of ``net``."""
        plane = self.embed(labels).unflatten(1, (1, *self.size))
        out: torch.Tensor = self.net(torch.cat([x, plane], dim=1))
        return out


class Projection(nn.Module):
    """``head(h) + <embedding(label), h>`` with ``h = trunk(x)``: the projection discriminator.

    Args:
        trunk: takes the data, gives ``[B, features]``.
        features: numbers per row that ``trunk`` gives.
        n_classes: number of labels.

    Source: Miyato and Koyama 2018, "cGANs with projection discriminator" (arXiv:1802.05637).
    """

    def __init__(self, trunk: nn.Module, features: int, n_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(features, 1)
        self.embed = nn.Embedding(n_classes, features)
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(features))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, ...]`` and int64 labels ``[B]`` to logits ``[B, 1]``."""
        h = self.trunk(x)
        out: torch.Tensor = self.head(h) + (self.embed(labels) * h).sum(1, keepdim=True)
        return out
