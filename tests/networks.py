"""Random networks of the layers that have closed forms, and what several tests build them from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]

SLOPES = [0.0, 1e-3, 0.2, 1.0, -0.5]
KINKED: list[Callable[[], nn.Module]] = [*(lambda s=s: nn.LeakyReLU(s) for s in SLOPES), nn.ReLU]  # type: ignore[misc]
SMOOTH: list[Callable[[], nn.Module]] = [
    nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus, lambda: nn.Softplus(2.0, 0.5), lambda: nn.Softplus(0.3, 4.0)
]  # fmt: skip
NORM_EPS = 0.1  # groups of two or three numbers have derivatives that nearly cancel with a smaller one


class Sum(nn.Module):
    """``after(branch_1(x) + branch_2(x) + ...)``."""

    def __init__(self, *branches: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        out: Tensor = self.after(total)
        return out


class Twice(nn.Module):
    """``layer(between(layer(x)))``."""

    def __init__(self, layer: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.layer, self.between = layer, between

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.between(self.layer(x)))
        return out


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Parameters at random, in float64, so that values keep their size from layer to layer.

    Vectors of spectral norms are near the largest singular ones, as in training: sigma may be 0 with any others.
    """
    torch.manual_seed(seed)
    module.double()
    for p in module.parameters():
        p.normal_(0.0, 1.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.7)
    for m in module.modules():
        if isinstance(m, parametrize.ParametrizationList):
            norm: Any = m[0]
            norm._u.normal_()
            norm._v.normal_()
            norm._power_method(norm._reshape_weight_to_matrix(m.original), 5)
        for hook in m._forward_pre_hooks.values():
            if isinstance(hook, SpectralNormHook):
                m.weight_u.normal_()
                for _ in range(5):
                    hook.compute_weight(m, True)
    return module


@torch.no_grad()
def shape_after(module: nn.Module, shape: Shape) -> Shape | None:
    """Of a row of its output, or ``None`` where there is none or it is large."""
    try:
        out = module.double()(torch.zeros(2, *shape, dtype=torch.float64))
    except (RuntimeError, ValueError):
        return None
    return tuple(out.shape[1:]) if out.numel() and max(out.shape[2:]) <= 9 else None


class Maker:
    """Draws layers.

    Args:
        draw: of hypothesis.
        smooth: with activations and norms that are curved.
        batch_norm: whether there may be batch normalisation.
    """

    def __init__(self, draw: Draw, *, smooth: bool, batch_norm: bool = False) -> None:
        self.draw, self.smooth, self.batch_norm = draw, smooth, batch_norm
        torch.manual_seed(0)  # layers draw their first values as they are made

    def one_of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def maybe(self) -> bool:
        return bool(self.draw(st.booleans()))

    def activation(self) -> nn.Module:
        made: nn.Module = self.one_of(*KINKED, *(SMOOTH if self.smooth else []))()
        return made

    def spectral(self, layer: nn.Module) -> nn.Module:
        """The layer, at times with spectral normalisation."""
        how = self.one_of(None, None, None, parametrizations.spectral_norm, old_spectral_norm)
        if how is None:
            return layer
        made: nn.Module = how(layer.double(), n_power_iterations=self.one_of(1, 2))
        return made if self.maybe() else made.eval()

    def extras(self, *norms: nn.Module) -> list[nn.Module]:
        """What may stand around an activation."""
        out: list[nn.Module] = [self.one_of(*norms)] if norms and self.maybe() else []
        out += [self.activation()] if self.one_of(True, True, False) else []
        out += [nn.Dropout(0.3)] if self.one_of(True, False, False, False) else []
        if self.maybe():
            out.reverse()
        return out

    # ---- rows

    def rows_norms(self, width: int) -> list[nn.Module]:
        norms: list[nn.Module] = [nn.BatchNorm1d(width, NORM_EPS, affine=self.maybe())] if self.batch_norm else []
        if self.smooth:
            norms += [nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)]
            groups = self.one_of(*(k for k in (1, 2, 3) if width % k == 0 and width > k), 0)
            norms += [nn.GroupNorm(groups, width, NORM_EPS)] if groups else []
        return norms

    def rows_block(self, a: int, b: int, depth: int = 0) -> list[nn.Module]:
        """``[rows, a]`` to ``[rows, b]``."""
        kind = self.one_of("plain", "plain", "plain", "residual", "twice") if depth < 2 else "plain"
        first = [self.spectral(nn.Linear(a, b, bias=self.maybe())), *self.extras(*self.rows_norms(b))]
        if kind == "plain":
            return first
        if kind == "twice":
            return [*first, Twice(self.spectral(nn.Linear(b, b)), self.activation())]
        branches = [
            nn.Identity(),
            *(nn.Sequential(*self.rows_block(b, b, depth + 1)) for _ in range(self.one_of(1, 1, 2))),
        ]
        branches += [nn.Identity()] * self.one_of(0, 0, 1)
        return [*first, Sum(*branches, after=self.activation() if self.maybe() else None)]

    def rows(self, width: int, out: int, *, depth: int = 6, widest: int = 64) -> nn.Module:
        """``[rows, width]`` to ``[rows, out]``."""
        widths = self.draw(st.lists(st.sampled_from([1, 2, 3, 6, 9, 17, widest]), min_size=0, max_size=depth - 1))
        layers: list[nn.Module] = []
        if not self.batch_norm and self.one_of(True, False, False, False):  # its input reaches more than products
            layers += [*self.extras(), *([Sum(nn.Identity(), nn.Linear(width, width))] if self.maybe() else [])]
        for b in widths:
            layers += self.rows_block(width, b)
            width = b
        layers.append(self.spectral(nn.Linear(width, out, bias=self.maybe())))
        layers += [self.activation()] if self.one_of(True, False, False, False) else []
        self.tie(layers)
        return nn.Sequential(*layers)

    def tie(self, layers: list[nn.Module]) -> None:
        """At times share weights, or biases, of two layers."""
        found = [m for la in layers for m in la.modules() if type(m) is nn.Linear and not m._forward_pre_hooks]
        for i, m in enumerate(found):
            for other in found[i + 1 :]:
                if other.weight.shape == m.weight.shape and self.maybe():
                    other.weight = m.weight
                    other.bias = m.bias if self.maybe() else other.bias

    # ---- images

    def image_norms(self, c: int, h: int, w: int) -> list[nn.Module]:
        norms: list[nn.Module] = [nn.BatchNorm2d(c, NORM_EPS, self.one_of(0.1, 0.7))] if self.batch_norm else []
        if self.smooth:
            norms += [nn.LayerNorm((c, h, w), NORM_EPS), nn.LayerNorm(w, NORM_EPS)]
        if self.smooth and h * w > 1:
            norms += [nn.GroupNorm(c, c, NORM_EPS), nn.GroupNorm(1, c, NORM_EPS, affine=self.maybe())]
            norms += [nn.InstanceNorm2d(c, NORM_EPS, affine=True), nn.InstanceNorm2d(c, NORM_EPS)]
        return norms

    def convolution(self, c: int) -> nn.Module:
        d = self.one_of(1, 1, 2, 4)
        groups = self.one_of(1, *([c] if d % c == 0 else []))
        k, stride, dilation = self.one_of(1, 2, 3, (3, 2)), self.one_of(1, 2, (2, 1)), self.one_of(1, 1, 2)
        bias, padding = self.maybe(), self.one_of(0, 1)
        if self.one_of(True, True, False):
            return nn.Conv2d(c, d, k, stride, padding, dilation, groups, bias)
        largest = max(stride) if isinstance(stride, tuple) else stride
        extra = self.one_of(0, *([(1, 0)] if largest > 1 else []))
        return nn.ConvTranspose2d(c, d, k, stride, padding, extra, groups, bias, dilation)

    def image_block(self, shape: Shape) -> tuple[list[nn.Module], Shape]:
        """Layers for images of that shape, and the shape that they make."""
        c = shape[0]
        block: list[nn.Module] = [self.spectral(self.convolution(c))]
        after = shape_after(block[0], shape)
        if after is None:
            block = [nn.Conv2d(c, c, 3, 1, 1)]
        shape = after or shape
        block += self.extras(*self.image_norms(*shape))
        c = shape[0]
        if self.one_of(True, False, False, False):
            body = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), self.activation(), self.spectral(nn.Conv2d(c, c, 1)))
            block.append(Sum(nn.Identity(), body, after=self.activation() if self.maybe() else None))
        resample = self.one_of(
            None, None, None, nn.AvgPool2d(2), nn.AvgPool2d((3, 2), (2, 1), 1, True, False), nn.AdaptiveAvgPool2d(1),
            nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=(1.7, 1.3)),
            nn.Upsample(scale_factor=1.6, mode="bilinear"), nn.UpsamplingBilinear2d(scale_factor=2),
        )  # fmt: skip
        after = None if resample is None else shape_after(resample, shape)
        if after is None:
            return block, shape
        return [*block, resample], after

    def images(self, shape: Shape, *, depth: int = 3) -> nn.Module:
        """``[rows, *shape]`` to logits ``[rows, 1]``, or of patches ``[rows, 1, h, w]``."""
        layers: list[nn.Module] = []
        for _ in range(self.draw(st.integers(1, depth))):
            block, shape = self.image_block(shape)
            layers += block
        if self.one_of(True, False, False):
            layers.append(self.spectral(nn.Conv2d(shape[0], 1, 1)))
        else:
            n = shape[0] * shape[1] * shape[2]
            layers += [nn.Flatten(), self.spectral(nn.Linear(n, 1, bias=self.maybe()))]
        return nn.Sequential(*layers)


class Conditional(nn.Module):
    """Of three classes."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(3, 2), nn.Linear(size + 2, out)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([x, self.embed(labels)], 1))


def parameters(e: Any) -> list[torch.Tensor]:
    """Of an engine's networks, the averaged one included."""
    return [p.detach() for n in (e.generator, e.discriminator, e.generator_ema) for p in n.parameters()]


def distance(a: Any, b: Any) -> float:
    """The largest difference of two engines' parameters."""
    pairs = zip(parameters(a), parameters(b), strict=True)
    return max((p.double() - q.double()).abs().max().item() for p, q in pairs)
