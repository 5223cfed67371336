"""The reader: what it makes of a module computes what the module does, and what it cannot read it says."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from fastgan import models
from fastgan import network as n
from fastgan.models.packing import Packed
from fastgan.reader import Signature, Unreadable, read

# ---- a network, executed with plain torch functions


def normalised(weight: Tensor, norm: n.SpectralNorm | None) -> Tensor:
    if norm is None:
        return weight
    matrix = weight.movedim(norm.dim, 0).flatten(1)
    with torch.no_grad():
        for _ in range(norm.iterations):
            for which in ("uv", "vu")[norm.first == "v"]:
                target, product = (norm.u, matrix @ norm.v) if which == "u" else (norm.v, matrix.T @ norm.u)
                target.copy_(F.normalize(product, dim=0, eps=norm.eps))
    return weight / torch.dot(norm.u.clone(), matrix @ norm.v.clone())


def activated(layer: n.Activation, x: Tensor) -> Tensor:
    if layer.kind == "leaky-relu":
        return torch.where(x > 0, x, x * layer.slope)
    if layer.kind == "softplus":
        return F.softplus(x, layer.beta, layer.threshold)
    return {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu}[layer.kind](x)


def executed(layer: n.Layer, x: Tensor, *others: Tensor) -> Tensor:
    match layer:
        case n.Linear():
            return F.linear(x, normalised(layer.weight, layer.spectral), layer.bias)
        case n.Convolution(transposed=False):
            weight = normalised(layer.weight, layer.spectral)
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        case n.Convolution():
            return F.conv_transpose2d(
                x, normalised(layer.weight, layer.spectral), layer.bias, layer.stride, layer.padding,
                layer.output_padding, layer.groups, layer.dilation,
            )  # fmt: skip
        case n.Activation():
            return activated(layer, x)
        case n.Dropout():
            return F.dropout(x, layer.p)
        case n.Reshape():
            return x.reshape(len(x), *layer.shape)
        case n.AveragePool():
            return F.avg_pool2d(
                x, layer.kernel, layer.stride, layer.padding, layer.ceil_mode, layer.count_include_pad, layer.divisor
            )
        case n.Upsample():
            if layer.mode == "nearest":
                return torch.ops.aten.upsample_nearest2d(x, layer.shape[1:], *layer.scales)
            return torch.ops.aten.upsample_bilinear2d(x, layer.shape[1:], layer.align_corners, *layer.scales)
        case n.Norm():
            runs = x.reshape(len(x), layer.groups, -1)
            var, mean = torch.var_mean(runs, dim=2, correction=0, keepdim=True)
            y = ((runs - mean) / (var + layer.eps).sqrt()).reshape(x.shape)
            y = y if layer.weight is None else y * layer.weight.view(layer.affine_shape)
            return y if layer.bias is None else y + layer.bias.view(layer.affine_shape)
        case n.BatchNorm():
            return layer.module(x)
        case n.Add():
            return x + others[0]
    raise AssertionError(layer)


def run(net: n.Network, x: Tensor) -> Tensor:
    values = [x.reshape(-1, *net.shape)]
    for layer in net.layers:
        out = executed(layer, *(values[i] for i in layer.inputs))
        assert tuple(out.shape) == (len(values[0]), *layer.shape), layer
        values.append(out)
    return values[-1]


def state(module: nn.Module) -> list[Tensor]:
    return [b.detach().clone() for b in module.buffers()]


def assert_reads(module: nn.Module, x: Tensor, rows: int | None = None, **kwargs: Any) -> n.Network:
    """Reading changes nothing; the network gives the module's output, gradients and buffers, for any batch."""
    module, x = module.double(), x.double()
    before, modes = state(module), [m.training for m in module.modules()]
    attributes = [dict(vars(m)) for m in module.modules()]
    random, given = torch.get_rng_state(), x.clone()
    net = read(module, x, what="net", **kwargs)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert all(torch.equal(a, b) for a, b in zip(state(module), before, strict=True))
    assert [m.training for m in module.modules()] == modes
    for m, old in zip(module.modules(), attributes, strict=True):
        assert vars(m).keys() == old.keys()
        assert all(v is old[k] for k, v in vars(m).items())
    assert set(net.modules) == set(module.modules())

    x = x if rows is None else torch.randn(rows, *x.shape[1:], dtype=torch.float64)
    leaves = [p for p in module.parameters() if p.requires_grad]
    results, after = [], []
    for call in (module, lambda x: run(net, x)):
        for b, old in zip(module.buffers(), before, strict=True):
            b.copy_(old)
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        out = call(leaf * 1)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        grads = torch.autograd.grad((out * weights).sum(), [leaf, *leaves], allow_unused=True)
        results.append([out, *grads])
        after.append(state(module))
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for got, expected in zip(after[1], after[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    return net


def randomised(module: nn.Module, data: st.DataObject) -> nn.Module:
    """Every parameter random: with biases of 0, constant planes lie on the kink after a norm."""
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def kinds(net: n.Network) -> list[str]:
    return [type(layer).__name__ for layer in net.layers]


def refused(module: nn.Module, x: Tensor, **kwargs: Any) -> str:
    before, random = state(module), torch.get_rng_state()
    attributes = [dict(vars(m)) for m in module.modules()]
    with pytest.raises(Unreadable) as e:
        read(module, x, what="net", **kwargs)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(state(module), before, strict=True))
    assert [dict(vars(m)) for m in module.modules()] == attributes
    text = str(e.value)
    assert text.startswith("net: ")
    return text.removeprefix("net: ")


class Forward(nn.Module):
    """A module with layers ``0``, ``1``, ... and a function of itself and the input for its forward."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for i, layer in enumerate(layers):
            self.add_module(f"l{i}", layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


# ---- layers

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 3), (5,)),
    "linear, no bias, more dimensions": (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "conv": (nn.Conv2d(4, 6, 3, (2, 1), (1, 0), 2, 2), (4, 9, 8)),
    "conv same": (nn.Conv2d(3, 2, (3, 5), padding="same", dilation=(2, 1)), (3, 7, 6)),
    "conv valid": (nn.Conv2d(3, 2, 2, padding="valid", bias=False), (3, 5, 4)),
    "conv transposed": (nn.ConvTranspose2d(4, 6, (3, 4), 2, 1, (1, 0), 2), (4, 3, 5)),
    "leaky relu": (nn.LeakyReLU(0.3), (7,)),
    "relu": (nn.ReLU(), (2, 3)),
    "tanh": (nn.Tanh(), (7,)),
    "sigmoid": (nn.Sigmoid(), (7,)),
    "silu": (nn.SiLU(), (7,)),
    "softplus": (nn.Softplus(2.0, 0.5), (7,)),
    "identity": (nn.Identity(), (2, 3)),
    "flatten": (nn.Flatten(), (2, 3, 4)),
    "flatten some": (nn.Flatten(1, 2), (2, 3, 4)),
    "unflatten": (nn.Unflatten(1, (2, 3, 1)), (6,)),
    "dropout": (nn.Dropout(0.4), (50,)),
    "dropout of nothing": (nn.Dropout(0.0), (50,)),
    "dropout in eval": (nn.Dropout(0.4).eval(), (50,)),
    "pool": (nn.AvgPool2d(2), (3, 6, 5)),
    "pool, every option": (nn.AvgPool2d((3, 2), (2, 1), 1, True, False), (3, 6, 5)),
    "pool with divisor": (nn.AvgPool2d(3, divisor_override=4), (3, 6, 5)),
    "adaptive pool": (nn.AdaptiveAvgPool2d(1), (3, 6, 5)),
    "adaptive pool to divisors": (nn.AdaptiveAvgPool2d((3, None)), (3, 6, 5)),
    "nearest": (nn.Upsample(scale_factor=2), (3, 4, 5)),
    "nearest, odd scale": (nn.Upsample(scale_factor=(1.7, 2.3)), (3, 4, 5)),
    "nearest to size": (nn.UpsamplingNearest2d((7, 9)), (3, 4, 5)),
    "bilinear": (nn.Upsample(scale_factor=1.6, mode="bilinear"), (3, 4, 5)),
    "bilinear, recomputed scale": (
        nn.Upsample(scale_factor=1.6, mode="bilinear", recompute_scale_factor=True), (3, 4, 5)
    ),
    "bilinear, aligned": (nn.UpsamplingBilinear2d(scale_factor=2), (3, 4, 5)),
    "layer norm": (nn.LayerNorm(6), (6,)),
    "layer norm of the last two": (nn.LayerNorm((4, 5), bias=False), (3, 4, 5)),
    "layer norm, not affine": (nn.LayerNorm(5, elementwise_affine=False), (3, 4, 5)),
    "instance norm 1d": (nn.InstanceNorm1d(3), (3, 5)),
    "instance norm 2d": (nn.InstanceNorm2d(3, eps=1e-3, affine=True), (3, 4, 5)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3, 5)),
    "group norm of a row": (nn.GroupNorm(2, 6), (6,)),
    "batch norm 1d": (nn.BatchNorm1d(5), (5,)),
    "batch norm 2d": (nn.BatchNorm2d(3, momentum=None), (3, 4, 2)),
    "batch norm 3d in eval": (nn.BatchNorm3d(2).eval(), (2, 3, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(4, *shape)
    assert_reads(layer, x)
    net = assert_reads(nn.Sequential(nn.Identity(), nn.Sequential(layer)), x, rows=2 if "batch" in name else 1)
    assert all(la.name in ("1.0", "") for la in net.layers)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spectral_norm", [parametrizations.spectral_norm, old_spectral_norm])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(5, 3), (5,)), (nn.Conv2d(3, 4, 3), (3, 5, 4)), (nn.ConvTranspose2d(3, 4, 2, bias=False), (3, 2, 2))],
)
def test_spectral_norm(
    layer: nn.Module, shape: tuple[int, ...], spectral_norm: Callable[..., nn.Module], training: bool
) -> None:
    module = spectral_norm(copy.deepcopy(layer).double(), n_power_iterations=2, eps=1e-6)
    net = assert_reads(nn.Sequential(module, nn.ReLU(), nn.Flatten()).train(training), torch.randn(2, *shape))
    first = net.layers[0]
    assert isinstance(first, n.Linear | n.Convolution)
    assert first.spectral is not None
    assert (first.spectral.iterations, first.spectral.eps) == (2 * training, 1e-6)
    assert isinstance(first.weight, nn.Parameter)
    assert any(first.weight is p for p in module.parameters())


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.LeakyReLU(0.2), lambda: nn.ReLU(inplace=True), nn.Tanh, lambda: nn.SiLU(inplace=True), nn.Softplus,
    nn.Sigmoid, nn.Identity, lambda: nn.Dropout(0.3, inplace=True),
]  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_rows(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        linear = nn.Linear(a, b, bias=data.draw(st.booleans()))
        layers.append(parametrizations.spectral_norm(linear) if data.draw(st.booleans()) else linear)
        norms = [nn.Identity(), nn.LayerNorm(b, eps=0.1), *([nn.GroupNorm(1, b, eps=0.1)] if b > 1 else [])]
        layers.append(data.draw(st.sampled_from(norms)))
        layers.append(data.draw(st.sampled_from(ACTIVATIONS))())
    cut = data.draw(st.integers(0, len(layers)))
    module = nn.Sequential(nn.Sequential(*layers[:cut]), *layers[cut:], nn.Linear(widths[-1], 1))
    randomised(module, data).train(data.draw(st.booleans()))
    assert_reads(module, torch.randn(data.draw(st.integers(1, 5)), widths[0]), rows=data.draw(st.integers(1, 3)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_images(data: st.DataObject) -> None:
    sizes = st.integers(1, 3)
    channels, height, width = data.draw(sizes), data.draw(st.integers(3, 7)), data.draw(st.integers(3, 7))
    x = torch.randn(2, channels, height, width)
    layers: list[nn.Module] = []
    for _ in range(data.draw(st.integers(1, 4))):
        after, kernel = data.draw(sizes), data.draw(sizes)
        layers += [
            data.draw(
                st.sampled_from(
                    [
                        nn.Conv2d(channels, after, kernel, data.draw(sizes), kernel // 2),
                        nn.ConvTranspose2d(channels, after, kernel, data.draw(sizes)),
                    ]
                )
            ),
            data.draw(
                st.sampled_from([nn.BatchNorm2d(after, eps=0.1), nn.Identity(), nn.GroupNorm(1, after, eps=0.1)])
            ),
            data.draw(st.sampled_from(ACTIVATIONS))(),
            data.draw(st.sampled_from([nn.AvgPool2d(1), nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1)])),
        ]
        channels = after
    module = randomised(nn.Sequential(*layers, nn.Flatten()), data).train(data.draw(st.booleans()))
    try:
        module.double()(x.double())
    except ValueError:  # batch norm of single numbers in training mode
        module.eval()
    assert_reads(module, x)


# ---- forwards


class Residual(nn.Module):
    def __init__(self, width: int, grow: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.body(x)
        h += x
        return self.act(h)


def test_residual() -> None:
    net = assert_reads(nn.Sequential(nn.Linear(4, 6), Residual(6), Residual(6), nn.Linear(6, 1)), torch.randn(3, 4))
    adds = [la for la in net.layers if isinstance(la, n.Add)]
    assert [la.inputs for la in adds] == [(5, 1), (11, 7)]
    assert [la.name for la in adds] == ["1.add_", "2.add_"]


def test_in_place_before_the_skip() -> None:
    """The usual pre-activation block whose in-place ReLU changes the skip too: read as torch computes it."""
    module = nn.Sequential(nn.Linear(4, 6), Forward(lambda m, x: x + m.l1(m.l0(x)), nn.ReLU(True), nn.Tanh()))
    net = read(module, torch.randn(2, 4), what="net")
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(net, x), module(x))


def with_shape_arithmetic(m: nn.Module, x: Tensor) -> Tensor:
    b, c, *_ = x.shape
    assert x.size(0) % 1 == 0
    assert c in (2, 3)
    h = F.leaky_relu(m.l0(x), 0.1)
    h = F.avg_pool2d(h, 2).contiguous().to(x.dtype)
    h = F.interpolate(h, size=[2 * s for s in h.shape[-2:]], mode="bilinear", align_corners=False)
    h = F.interpolate(h, scale_factor=2.0)
    h = F.adaptive_avg_pool2d(h, 2)
    h = h.view(b, math.prod(h.shape[1:]))
    h = torch.unflatten(h, 1, (-1, 2)).unsqueeze(1).squeeze(1)
    return torch.squeeze(torch.unsqueeze(h, 2), 2).reshape(len(h), -1).unflatten(1, (2, -1)).flatten(1)


FORWARDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "shape arithmetic": (Forward(with_shape_arithmetic, nn.Conv2d(2, 4, 1)), (2, 4, 6)),
    "activations": (
        Forward(lambda m, x: sum([torch.relu(x), F.relu(x), x.relu(), F.silu(x), F.softplus(x, 2), F.tanh(x),
                                  torch.tanh(x), torch.sigmoid(x), F.sigmoid(x), F.leaky_relu(x, negative_slope=0.3)])),
        (5,),
    ),
    "in place": (Forward(lambda m, x: F.relu(torch.tanh_(m.l0(x)).add(x).add_(x), True), nn.Linear(4, 4)), (4,)),
    "dropout": (Forward(lambda m, x: F.dropout(F.dropout(x, 0.2, m.training), 0.5, False)), (30,)),
    "branches on attributes": (Forward(lambda m, x: m.l0(x) if m.training else x, nn.Linear(2, 2)), (2,)),
    "the same layer twice": (Forward(lambda m, x: m.l0(m.l1(m.l0(x))), nn.Linear(3, 3), nn.Tanh()), (3,)),
    "the same normalised layer twice": (
        Forward(lambda m, x: m.l0(m.l0(x)), parametrizations.spectral_norm(nn.Linear(3, 3))), (3,)
    ),
    "one number a row": (nn.Sequential(nn.Linear(3, 1), Forward(lambda m, x: x.view(-1))), (3,)),
    "unused": (Forward(lambda m, x: (m.l0(x), m.l1(x))[1], nn.Linear(3, 3), nn.Linear(3, 2)), (3,)),
    "the input itself": (Forward(lambda m, x: x.view(len(x), -1)), (3,)),
    "a view's clone in place": (
        Forward(lambda m, x: (h := m.l0(x)) + h.clone().relu_(), nn.Linear(3, 3)), (3,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORWARDS)
def test_forward(name: str, training: bool) -> None:
    module, shape = FORWARDS[name]
    assert_reads(copy.deepcopy(module).train(training), torch.randn(4, *shape), rows=1)


def test_unused_layers_are_dropped_and_names_are_paths() -> None:
    unused = Forward(lambda m, x: (m.l0(x), F.relu(m.l1(x)))[1], nn.Linear(3, 3), nn.Linear(3, 2))
    net = read(nn.Sequential(unused), torch.randn(2, 3), what="net")
    assert [(la.name, la.inputs) for la in net.layers] == [("0.l1", (0,)), ("0.relu", (1,))]


def test_tied_weights() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    net = assert_reads(module, torch.randn(2, 3))
    assert net.layers[0].weight is net.layers[2].weight


def test_subclasses_without_a_forward_of_their_own() -> None:
    class Wide(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 64)

        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight)
            nn.init.zeros_(self.bias)

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    assert kinds(assert_reads(nn.Sequential(Wide(), Twice(nn.Linear(64, 64))), torch.randn(2, 3))) == ["Linear"] * 3


@pytest.mark.parametrize("model", ["mlp", "dcgan"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_our_models(model: str, norm: str) -> None:
    widths = {"widths": [9, 5]} if model == "mlp" else {"width": 2}
    spec = {"model": model, "norm": norm, **widths}
    assert_reads(models.build("generator", spec, (1, 8, 8), 7), torch.randn(2, 7))
    assert_reads(models.build("discriminator", spec, (1, 8, 8), 7, 0), torch.randn(2, 1, 8, 8))


# ---- logits


@pytest.mark.parametrize(
    "end",
    [nn.Sigmoid(), nn.Sequential(nn.Sigmoid(), nn.Flatten(0)), Forward(lambda m, x: torch.sigmoid(x).squeeze(1))],
)
def test_logits(end: nn.Module) -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1))
    x = torch.randn(4, 3)
    net = read(nn.Sequential(body, end), x, what="net", logits=True)
    assert [la.kind for la in net.layers if isinstance(la, n.Activation)] == ["sigmoid"]
    torch.testing.assert_close(run(net, x).flatten(), body(x).flatten())
    assert run(net, x).shape == end(body(x)).shape
    assert kinds(read(body, x, what="net", logits=True)) == ["Linear", "Activation", "Linear"]


def test_logits_of_a_sigmoid_alone() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(run(read(nn.Sigmoid(), x, what="net", logits=True), x), x)


# ---- packing


@pytest.mark.parametrize("k", [1, 2, 4])
def test_packing(k: int) -> None:
    net = assert_reads(
        Packed(nn.Sequential(nn.Linear(k * 12, 3), nn.ReLU(), nn.Linear(3, 1)), k), torch.randn(4, 12), 8
    )
    assert (net.packed, net.shape) == (k, (12 * k,))
    assert kinds(net) == ["Linear", "Activation", "Linear"]


def test_packing_of_images() -> None:
    assert_reads(Packed(nn.Linear(2 * 12, 1), 2), torch.randn(4, 3, 2, 2))
    module = Forward(lambda m, x: m.l0(x.view(-1, 6, 4, 4)), nn.Conv2d(6, 2, 3))
    net = assert_reads(module, torch.randn(4, 3, 4, 4))
    assert (net.packed, net.shape) == (2, (6, 4, 4))


# ---- refusals


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return super()._conv_forward(*args) * 2


def hooked(how: str, module: nn.Module) -> nn.Module:
    getattr(module, how)(lambda *args: None)
    return module


def overridden(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def under_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.l0(x)


def under_inference_mode(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return m.l0(x)


def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.l0(x)


def sets_attribute(m: Any, x: Tensor) -> Tensor:
    m.features = m.l0(x)
    return m.features


def appends(m: Any, x: Tensor) -> Tensor:
    m.seen.append(1)
    return m.l0(x)


def views(m: Any, x: Tensor) -> Tensor:
    h = m.l0(x)
    return torch.relu_(h.view(-1, 1, 3)).flatten(1) + h


appending = Forward(appends, nn.Linear(3, 3))
appending.seen = []
hidden = Forward(lambda m, x: m.held[0](x))
hidden.held = [nn.Linear(3, 3)]
IMAGE = nn.Unflatten(1, (1, 1, 3))
IT = "the network itself (Forward) calls"
REFUSED: dict[str, tuple[nn.Module, str]] = {
    "unknown": (nn.Sequential(nn.Sequential(nn.ReLU6())), "layer '0.0' (ReLU6) is not known"),
    "forward hook": (
        nn.Sequential(hooked("register_forward_hook", nn.Linear(3, 3))),
        "layer '0' (Linear) has a forward hook",
    ),
    "pre-hook": (
        hooked("register_forward_pre_hook", nn.Sequential()),
        "the network itself (Sequential) has a forward pre-hook",
    ),
    "backward hook": (
        nn.Sequential(hooked("register_full_backward_hook", nn.Tanh())),
        "layer '0' (Tanh) has a backward hook",
    ),
    "backward pre-hook": (
        nn.Sequential(hooked("register_full_backward_pre_hook", nn.Tanh())),
        "layer '0' (Tanh) has a backward pre-hook",
    ),
    "subclass": (nn.Sequential(Scaled(3, 3)), "layer '0' (Scaled) has its own forward"),
    "subclass's part": (
        nn.Sequential(nn.Unflatten(1, (3, 1, 1)), ScaledConv(3, 1, 1)),
        "layer '1' (ScaledConv) has its own _conv_forward",
    ),
    "forward on the instance": (
        nn.Sequential(overridden(nn.Tanh())),
        "layer '0' (Tanh) has a forward of its own on the instance",
    ),
    "weight norm": (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))),
        "layer '0' (Linear) has a weight that is made by _WeightNorm",
    ),
    "orthogonal bias": (
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3), "bias")),
        "layer '0' (Linear) has a bias that is made of something else",
    ),
    "padding mode": (
        nn.Sequential(IMAGE, nn.Conv2d(1, 1, (1, 3), padding=(0, 1), padding_mode="circular")),
        "layer '1' (Conv2d) pads with 'circular'",
    ),
    "uneven padding": (
        nn.Sequential(IMAGE, nn.Conv2d(1, 1, 2, padding="same")),
        "layer '1' (Conv2d) pads one side more than the other",
    ),
    "adaptive pool": (
        nn.Sequential(IMAGE, nn.AdaptiveAvgPool2d((1, 2))),
        "layer '1' (AdaptiveAvgPool2d) pools [1, 3] to (1, 2), in windows of different sizes",
    ),
    "bicubic": (
        nn.Sequential(IMAGE, nn.Upsample(scale_factor=2, mode="bicubic")),
        "layer '1' (Upsample) upsamples with mode 'bicubic'",
    ),
    "antialias": (
        Forward(lambda m, x: F.interpolate(x.view(-1, 1, 1, 3), scale_factor=2, mode="bilinear", antialias=True)),
        f"{IT} interpolate, which upsamples with mode 'bilinear' and antialias",
    ),
    "upsampling of rows": (
        nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Upsample(scale_factor=2)),
        "layer '1' (Upsample) reads a tensor of 3 dimensions, expected 4",
    ),
    "running statistics": (
        nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True)),
        "layer '1' (InstanceNorm1d) has running statistics",
    ),
    "all dropped": (nn.Sequential(nn.Dropout(1.0)), "layer '0' (Dropout) drops everything"),
    "operation": (nn.Sequential(Forward(lambda m, x: x * 2)), "layer '0' (Forward) calls mul, which is not known"),
    "index": (
        nn.Sequential(Forward(lambda m, x: x[:, :2])),
        "layer '0' (Forward) calls __getitem__, which is not known",
    ),
    "transposition": (Forward(lambda m, x: x.T), f"{IT} T, which is not known"),
    "gradient": (Forward(lambda m, x: x.grad), f"{IT} grad, which is not known"),
    "data": (Forward(lambda m, x: x.data), f"{IT} data, which is not known"),
    "numbers": (Forward(lambda m, x: x if x.sum() > 0 else -x), f"{IT} sum, which is not known"),
    "added number": (Forward(lambda m, x: x + 1), f"{IT} add, which is not a sum of two values of one shape"),
    "added parameter": (
        Forward(lambda m, x: x + m.l0.bias.view(1, 3), nn.Linear(3, 3)),
        f"{IT} view, which reads a tensor that is not computed from its input by known operations",
    ),
    "broadcast": (
        Forward(lambda m, x: x + m.l0(x), nn.Linear(3, 1)),
        f"{IT} add, which is not a sum of two values of one shape",
    ),
    "weighted sum": (
        Forward(lambda m, x: torch.add(x, x, alpha=2)),
        f"{IT} add, which is not a sum of two values of one shape",
    ),
    "other arguments": (
        Forward(lambda m, x: torch.add(x, x, out=torch.Tensor())),
        f"{IT} add, which is called with arguments that are not known",
    ),
    "autograd function": (
        Forward(lambda m, x: m.l0(Reverse.apply(x)), nn.Linear(3, 3)),
        f"{IT} view_as, which is not known",
    ),
    "autograd function at the end": (
        Forward(lambda m, x: Reverse.apply(m.l0(x)), nn.Linear(3, 3)),
        f"{IT} view_as, which is not known",
    ),
    "no_grad": (Forward(under_no_grad, nn.Linear(3, 3)), f"{IT} _set_grad_enabled, which is not known"),
    "inference_mode": (
        Forward(under_inference_mode, nn.Linear(3, 3)),
        "layer 'l0' (Linear) runs under no_grad or autocast",
    ),
    "autocast": (Forward(under_autocast, nn.Linear(3, 3)), "layer 'l0' (Linear) runs under no_grad or autocast"),
    "precision": (
        Forward(lambda m, x: x.double()),
        f"{IT} double, which makes torch.float64 on cpu of torch.float32 on cpu",
    ),
    "attribute": (
        nn.Sequential(Forward(sets_attribute, nn.Linear(3, 3))),
        "layer '0' (Forward) changes its own attributes when it is called",
    ),
    "list": (nn.Sequential(appending), "layer '0' (Forward) changes its own attributes when it is called"),
    "unregistered": (hidden, "it calls a module (Linear) that is not registered in it"),
    "input in place": (nn.Sequential(nn.ReLU(inplace=True)), "layer '0' (ReLU) changes the network's input in place"),
    "view in place": (
        Forward(views, nn.Linear(3, 3)),
        f"{IT} add, which reads a tensor that was packed or changed in place through another view of it",
    ),
    "tuple": (Forward(lambda m, x: (x, x)), "it returns a tuple"),
    "rows": (Forward(lambda m, x: x.view(-1)), f"{IT} view, which does not keep the rows: [4, 3] become [12]"),
    "late packing": (
        nn.Sequential(nn.Linear(3, 3), Forward(lambda m, x: x.view(-1, 6))),
        "layer '1' (Forward) calls view, which does not keep the rows: [4, 3] become [2, 6]",
    ),
    "packed and not": (
        Forward(lambda m, x: m.l0(x.view(-1, 6)) + m.l1(x), nn.Linear(6, 3), nn.Linear(3, 3)),
        "layer 'l1' (Linear) reads a tensor that was packed or changed in place through another view of it",
    ),
    "whole batch": (Forward(lambda m, x: x.view(1, -1)), "what it computes depends on the number of rows"),
    "slope by rows": (
        Forward(lambda m, x: F.leaky_relu(x, 1 / len(x))),
        "what it computes depends on the number of rows",
    ),
    "unused state": (
        Forward(lambda m, x: (m.l0(x), x)[1], nn.BatchNorm1d(3)),
        "layer 'l0' has buffers that it changes, but its output is not used",
    ),
    "wrong width": (
        nn.Sequential(nn.Linear(4, 3)),
        "it cannot run on [4, 3]: mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)",
    ),
    "labels": (nn.Bilinear(3, 3, 1), "the network itself (Bilinear) is not known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    module, reason = REFUSED[name]
    assert refused(module, torch.randn(4, 3)) == reason


# ---- signature


def test_signature_notices_changes() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))
    signature = Signature(read(module, torch.randn(2, 3), what="net"))
    seen = [signature()]
    assert signature() == seen[0]

    def replace() -> None:
        module[2][0] = nn.Tanh()

    def reassign() -> None:
        module[0].weight = nn.Parameter(module[0].weight.detach().clone())

    def move() -> None:
        module[0].bias.data = module[0].bias.data.clone()

    changes: list[Callable[[], Any]] = [
        module.eval,
        lambda: module[1].train(),
        lambda: module[2].register_forward_hook(lambda *a: None),
        lambda: module[2][1].bias.requires_grad_(False),
        replace,
        reassign,
        move,
    ]
    for change in changes:
        change()
        seen.append(signature())
        assert seen[-1] == signature()
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    module(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert signature() == seen[-1]


def test_signature_is_cheap() -> None:
    module = nn.Sequential(*[m for _ in range(7) for m in (nn.Linear(3, 3), nn.ReLU())])
    signature = Signature(read(module, torch.randn(2, 3), what="net"))
    best = min(_timed(signature) for _ in range(200))
    assert best < 100e-6, f"{best * 1e6:.1f} us"


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_leaves_no_hook_on_every_module() -> None:
    read(nn.Linear(2, 2), torch.zeros(2, 2), what="it")
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not torch.nn.modules.module._global_forward_hooks_with_kwargs
