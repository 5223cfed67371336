"""The shipped networks: sizes, labels, starting weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgan.errors import InputError
from fastgan.models import MODELS, build

MLP = {"model": "mlp", "widths": [24, 16]}
CONV = {"model": "dcgan", "width": 4}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (1, 32, 32), (3, 64, 64), (1, 28, 20), (2,), (7,)], ids=str)
@pytest.mark.parametrize("n_classes", [0, 5])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["none", "layer", "batch", "instance"])
def test_sizes_follow_the_data(shape: tuple[int, ...], n_classes: int, name: str, norm: str) -> None:
    spec = {**(MLP if name == "mlp" else CONV), "norm": norm}
    if name == "mlp" and norm == "instance":
        with pytest.raises(InputError, match="norm: unknown value 'instance'"):
            build("generator", spec, shape, 6, n_classes)
        return
    if name == "dcgan" and (len(shape) == 1 or shape[1] != shape[2]):
        with pytest.raises(InputError, match=r"data have shape .* expected square images"):
            build("generator", spec, shape, 6, n_classes)
        return
    labels = (torch.arange(4) % n_classes,) if n_classes else ()
    x = build("generator", spec, shape, 6, n_classes)(torch.randn(4, 6), *labels)
    assert x.shape == (4, *shape)
    assert len(shape) == 1 or (x.abs() <= 1).all()
    ways = {"mlp": ["concat", "projection"], "dcgan": ["map", "projection"]}[name] if n_classes else [None]
    for way in ways:
        options = {} if way is None else {"conditioning": way}
        discriminator = build("discriminator", {**spec, **options}, shape, 6, n_classes)
        assert discriminator(x, *labels).shape == (4, 1)


@pytest.mark.parametrize(
    ("name", "way"), [("mlp", "concat"), ("mlp", "projection"), ("dcgan", "map"), ("dcgan", "projection")]
)
def test_labels_matter_and_only_to_their_row(name: str, way: str) -> None:
    spec = {**(MLP if name == "mlp" else CONV), "norm": "none"}
    generator = build("generator", spec, (1, 8, 8), 6, 3)
    discriminator = build("discriminator", {**spec, "conditioning": way}, (1, 8, 8), 6, 3)
    z, x = torch.randn(4, 6), torch.randn(4, 1, 8, 8)
    before, after = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0])
    for net, rows in ((generator, z), (discriminator, x)):
        changed = (net(rows, before) - net(rows, after)).flatten(1).abs().sum(1) > 0
        assert changed.tolist() == [False, False, True, False]


def test_the_vanilla_pair_is_the_published_one() -> None:
    generator = build("generator", {"model": "mlp", "widths": [256, 512]}, (1, 28, 28), 100)
    discriminator = build("discriminator", {"model": "mlp", "widths": [512, 256]}, (1, 28, 28), 100)
    sizes = [
        [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]
        for net in (generator, discriminator)
    ]
    assert sizes == [[(100, 256), (256, 512), (512, 784)], [(784, 512), (512, 256), (256, 1)]]
    assert [m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)] == [0.2, 0.2]


def test_dcgan_starts_from_small_normal_weights() -> None:
    for role in ("generator", "discriminator"):
        net = build(role, {"model": "dcgan", "width": 32}, (3, 32, 32), 64)
        weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert len(weights) == 4
        for weight in weights:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_toys_have_linear_output() -> None:
    x = build("generator", MLP, (2,), 6)(100 * torch.randn(64, 6))
    assert x.abs().max() > 1
