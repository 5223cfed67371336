"""Packing: a discriminator that judges several samples at once, against mode collapse."""

from __future__ import annotations

import torch
from torch import nn


class Packed(nn.Module):
    """``net([x_1, ..., x_k])``: each ``k`` consecutive samples, flattened, are one row.

    A discriminator of single samples cannot see that they are all alike; one of ``k`` can.

    Args:
        net: takes ``[B / k, k * features]``.
        k: samples per row; ``B`` has to be a multiple of it.

    Source: Lin et al. 2018, "PacGAN: the power of two samples in generative adversarial networks" (arXiv:1712.04086).
    """

    def __init__(self, net: nn.Module, k: int) -> None:
        super().__init__()
        self.net = net
        self.pac = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, ...]`` to the output of ``net``, ``[B / k, ...]``."""
        out: torch.Tensor = self.net(x.reshape(len(x) // self.pac, -1))
        return out
