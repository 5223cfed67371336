"""``fastgan.fuse`` and ``fastgan.nn``: what a user's module computes, keeps and may be put to stays as it was."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_as_accurate
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm

import fastgan
from fastgan import Engine, InputError
from fastgan.backend import Backend, use_backend
from fastgan.export import export_generator
from fastgan.nn import Conv2dLeakyReLU, ConvTranspose2dLeakyReLU, LinearAct
from fastgan.penalties import GradientPenalty, norm
from fastgan.reader import read

pytestmark = pytest.mark.interpreted


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.LeakyReLU(0.2), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.ReLU(),
        nn.Sequential(nn.Linear(5, 4), nn.Sigmoid()), nn.Linear(4, 1),
    )  # fmt: skip


class Images(nn.Module):
    """A user's own class with convolutions on the way down and up, and an activation that several layers share."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.1, inplace=True)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), act, nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 8), act, nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


CASES = [pytest.param(mlp, (6,), id="mlp"), pytest.param(Images, (2, 6, 6), id="images")]


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def batches(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Real, fake and interpolated samples."""
    g = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(5, *shape, generator=g).to(dtype) for _ in range(2))
    return real, fake, (real + 2 * fake) / 3


def wgan_gp(d: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """A critic's loss with its gradient penalty, and the gradient of both to every parameter."""
    real, fake, mixed = batches(shape, dtype)
    mixed.requires_grad_()
    (gradient,) = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)
    loss = d(fake).mean() - d(real).mean() + 10 * (norm(gradient) - 1).square().mean()
    for p in d.parameters():
        p.grad = None
    loss.backward()
    missing = [name for name, p in d.named_parameters() if p.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return {"loss": loss.detach(), **{name: p.grad for name, p in d.named_parameters()}}


# ---- the same numbers


@pytest.mark.parametrize(("make", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_penalty_reaches_every_parameter(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The trap: an op whose backward is opaque gives the penalty's value and, silently, none of its gradient."""
    fused = fastgan.fuse(seeded(make, dtype), backend="triton")
    got, plain = wgan_gp(fused, shape, dtype), wgan_gp(seeded(make, dtype), shape, dtype)
    exact = wgan_gp(seeded(make).double(), shape, torch.float64)
    assert got.keys() == plain.keys()
    for name in plain:
        if dtype == torch.float64:
            torch.testing.assert_close(got[name], plain[name], rtol=1e-11, atol=1e-13)
        else:
            assert_as_accurate(name, got[name], plain[name], exact[name])


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_the_penalty_alone_has_the_gradient_of_plain_torch(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    def gradients(d: nn.Module) -> dict[str, Tensor]:
        mixed = batches(shape, torch.float64)[2].requires_grad_()
        (gradient,) = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)
        (norm(gradient) - 1).square().mean().backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in d.named_parameters()}

    plain = gradients(seeded(make, torch.float64))
    got = gradients(fastgan.fuse(seeded(make, torch.float64), backend="triton"))
    assert sum(bool(g.any()) for g in plain.values()) >= len(plain) / 2, "nothing would be compared"
    for name in plain:
        torch.testing.assert_close(got[name], plain[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_without_kernels_the_numbers_are_the_same_to_the_bit(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    with use_backend("reference"):
        got = wgan_gp(fastgan.fuse(seeded(make)), shape, torch.float32)
    for name, value in wgan_gp(seeded(make), shape, torch.float32).items():
        assert torch.equal(got[name], value), name


def test_on_a_cpu_no_kernel_is_loaded() -> None:
    code = (
        "import sys, torch, fastgan; from torch import nn;"
        "m = fastgan.fuse(nn.Sequential(nn.Linear(3, 2), nn.ReLU()));"
        "m(torch.zeros(1, 3)).sum().backward();"
        "assert 'activation' in repr(m); assert 'fastgan.kernels' not in sys.modules"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


def test_channels_last_stays_channels_last() -> None:
    body = seeded(Images).body
    x = torch.randn(3, 2, 6, 6).to(memory_format=torch.channels_last)
    want = body.to(memory_format=torch.channels_last)(x)
    got = fastgan.fuse(body, backend="triton")(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want)


def test_images_without_a_batch_dimension() -> None:
    body, x = seeded(Images).body, torch.randn(2, 6, 6)
    want = body(x)
    torch.testing.assert_close(fastgan.fuse(body, backend="triton")(x), want)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_autocast_works_as_before(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(5, *shape)
    for backend in ("triton", "reference"):
        plain = seeded(make)
        fused = fastgan.fuse(seeded(make), backend=backend)
        with torch.autocast("cpu", torch.float16):
            want, got = plain(x), fused(x)
        assert got.dtype == want.dtype == torch.float16
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
        got.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


# ---- what stays


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_the_module_keeps_its_state(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module = seeded(make)
    module.eval()
    before, parameters = module.state_dict(), dict(module.named_parameters())
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    fused = fastgan.fuse(module)
    assert fused is module
    assert any(isinstance(m, LinearAct) for m in fused.modules())
    assert not any(isinstance(m, nn.LeakyReLU | nn.ReLU | nn.Tanh | nn.Sigmoid) for m in fused.modules())
    assert [name for name, _ in fused.named_modules(remove_duplicate=False)] == names
    assert not any(m.training for m in fused.modules())
    after = fused.state_dict()
    assert list(after) == list(before)
    assert after._metadata == before._metadata
    assert all(p is parameters[name] for name, p in fused.named_parameters())

    other = make()
    other.load_state_dict(after)
    again = fastgan.fuse(make())
    again.load_state_dict(other.state_dict())
    x = torch.randn(2, *shape)
    with use_backend("reference"):
        assert torch.equal(again(x), other(x))


def test_an_optimiser_made_before_goes_on() -> None:
    module = seeded(mlp)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    before = copy.deepcopy(module.state_dict())
    fastgan.fuse(module, backend="triton")(torch.randn(4, 6)).sum().backward()
    optimiser.step()
    assert all(not torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_copies_and_other_parameters(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    fused = fastgan.fuse(seeded(make), backend="triton")
    x = torch.randn(3, *shape)
    want = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), want)
        assert repr(other) == repr(fused)
        assert not {*other.parameters()} & {*fused.parameters()}
    halved = {k: v / 2 for k, v in fused.named_parameters()}
    got = torch.func.functional_call(fused, halved, (x,))
    fused.load_state_dict(halved)
    assert torch.equal(got, fused(x))


def test_fusing_twice_changes_nothing() -> None:
    fused = fastgan.fuse(seeded(Images))
    modules = list(fused.modules())
    assert all(a is b for a, b in zip(fastgan.fuse(fused).modules(), modules, strict=True))


def test_initialisation_by_type_and_norms_put_on_later() -> None:
    fused, plain = (nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.2), nn.Linear(3, 1)) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    fastgan.fuse(fused, backend="triton")
    assert isinstance(fused[0], nn.Linear)
    for module in (fused, plain):
        torch.manual_seed(0)
        parametrizations.spectral_norm(module[0])
    x = torch.randn(5, 4)
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused(x), plain(x))  # one power iteration on
    network = read(fused, torch.randn(2, 4), what="the critic")
    assert network.layers[0].spectral is not None


# ---- what is left alone


class Loud(nn.Linear):
    """A user's own layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Features(nn.Sequential):
    """A ``Sequential`` with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self]).sum(0)


class Named(nn.Sequential):
    """A ``Sequential`` that is one."""


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.layer(x))
        return out


def hooked(which: int, kind: str) -> nn.Module:
    pair = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    {
        "forward": lambda m: m.register_forward_hook(lambda m, x, y: None),
        "pre": lambda m: m.register_forward_pre_hook(lambda m, x: None),
        "backward": lambda m: m.register_full_backward_hook(lambda m, dx, dy: None),
        "state": lambda m: m.register_state_dict_post_hook(lambda *args: None),
    }[kind](pair[which])
    return pair


def patched() -> nn.Module:
    pair = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    pair[0].forward = lambda x: x
    return pair


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(nn.Linear(4, 4))


def twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(4, 4), "the module itself (Linear) is not in an nn.Sequential"),
        (Apart, "layer (Linear) is not in an nn.Sequential"),
        (lambda: Features(nn.Linear(4, 4), nn.ReLU()), "0 (Linear) is not in an nn.Sequential"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "0 (Linear) has nothing after it"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()), "0 (Linear) is followed by LayerNorm"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), "0 (Linear) is followed by GELU"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(-0.5)),
            "0 (Linear) is followed by LeakyReLU of slope -0.5",
        ),
        (lambda: nn.Sequential(Loud(4, 4), nn.ReLU()), "0 (Loud) is of a class of its own"),
        (
            lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU()),
            "0 (ParametrizedLinear) has a parametrization",
        ),
        (lambda: nn.Sequential(old_spectral_norm(nn.Linear(4, 4)), nn.ReLU()), "0 (Linear) has hooks"),
        (lambda: nn.Sequential(weight_normed(), nn.ReLU()), "0 (Linear) has hooks"),
        *((lambda k=k: hooked(0, k), "0 (Linear) has hooks") for k in ("forward", "pre", "backward", "state")),
        (lambda: hooked(1, "forward"), "0 (Linear) is followed by ReLU, which has hooks"),
        (patched, "0 (Linear) has a forward of its own"),
        (twice, "0 (Linear) is used in 2 places"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()),
            "0 (Conv2d) is followed by Tanh, which only linear layers take in",
        ),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU()), "0 (Conv2d) has no bias"),
    ],
)
def test_what_is_left_is_as_it_was_and_said(
    make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = make()
    before = list(module.modules())
    with caplog.at_level(logging.INFO, "fastgan"):
        fastgan.fuse(module)
    assert all(a is b for a, b in zip(module.modules(), before, strict=True))
    (record,) = caplog.records
    assert record.getMessage() == f"fuse: 0 fused, 1 left: {reason}"


def test_a_class_that_only_names_a_sequential_is_fused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastgan"):
        fused = fastgan.fuse(Named(nn.Linear(4, 4), nn.ReLU()))
    assert isinstance(fused[0], LinearAct)
    assert [r.getMessage() for r in caplog.records] == ["fuse: 1 fused"]


def test_hooks_on_parameters_and_on_the_whole_are_kept() -> None:
    module = seeded(mlp)
    seen = []
    module[0].weight.register_hook(lambda g: seen.append("weight"))
    module.register_forward_hook(lambda m, x, y: seen.append("module"))
    fastgan.fuse(module, backend="triton")(torch.randn(2, 6)).sum().backward()
    assert seen == ["module", "weight"]


# ---- compiled, exported, read


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_compiles_whole() -> None:
    """With kernels through Inductor; the example has one linear layer and one convolution to keep it short."""

    def make() -> nn.Module:
        body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(12, 4), nn.Tanh())
        return seeded(lambda: body)

    def run(module: nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 96).view(3, 2, 4, 4).requires_grad_()
        for p in module.parameters():
            p.grad = None
        y = module(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]

    plain = make()
    state, want = plain.state_dict(), run(plain)
    backends: list[tuple[Backend | None, str]] = [
        ("triton", "inductor"), ("reference", "aot_eager"), (None, "aot_eager"),
    ]  # fmt: skip
    for backend, compiler in backends:
        module = make()
        module.load_state_dict(state)
        compiled = torch.compile(fastgan.fuse(module, backend=backend), fullgraph=True, backend=compiler)
        for got, expected in zip(run(compiled), want, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_is_exported_in_torch_ops(ending: str, tmp_path: Path) -> None:
    generator = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh())).eval()
    z = torch.randn(7, 3)
    want = generator(z)
    path = export_generator(fastgan.fuse(generator, backend="triton"), 3, tmp_path / f"g{ending}")
    if ending == ".pt2":
        program = torch.export.load(path)
        ops = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert all(op.startswith("aten.") for op in ops)
        got = program.module()(z)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(["sample"], {"latent": z.numpy()})[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_is_read_as_the_chain_that_it_was(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(4, *shape)
    plain, fused = (read(m, x, what="it") for m in (seeded(make), fastgan.fuse(seeded(make), backend="triton")))
    assert len(plain.layers) == len(fused.layers)
    for a, b in zip(plain.layers, fused.layers, strict=True):
        facts = [
            {k: v for k, v in vars(layer).items() if k not in ("name", "weight", "bias", "spectral")}
            for layer in (a, b)
        ]
        assert type(a) is type(b)
        assert facts[0] == facts[1]
        assert all(torch.equal(p, q) for p, q in zip(a.parameters, b.parameters, strict=True))


def test_an_engine_takes_the_closed_form_as_before() -> None:
    def train(fused: bool) -> tuple[list[str], list[Tensor]]:
        torch.manual_seed(0)
        g = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh())
        d = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        if fused:
            g, d = fastgan.fuse(g), fastgan.fuse(d)
        engine = Engine(
            g, d, latent=3, loss="wasserstein", penalties=[GradientPenalty()], device="cpu", precision="fp32", ema=None,
            backend="reference",
        )  # fmt: skip
        for _ in range(3):
            engine.step(torch.linspace(-1, 1, 64).view(16, 4))
        said = [line for line in engine.explain().splitlines() if "through autograd" not in line]
        return said, [p.detach() for m in (g, d) for p in m.parameters()]

    explained, parameters = train(fused=True)
    expected, plain = train(fused=False)
    assert explained == expected
    assert sum("closed form" in line for line in explained) == 2
    assert all(torch.equal(p, q) for p, q in zip(parameters, plain, strict=True))


# ---- the layers by themselves


def test_layers_are_made_like_those_of_torch() -> None:
    x, image = torch.randn(2, 3), torch.randn(2, 3, 5, 5)
    with use_backend("reference"):
        for layer, plain, of in (
            (LinearAct(3, 4), nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2)), x),
            (LinearAct(3, 4, False, activation="sigmoid"), nn.Sequential(nn.Linear(3, 4, False), nn.Sigmoid()), x),
            (LinearAct(3, 4, activation="identity"), nn.Sequential(nn.Linear(3, 4)), x),
            (
                Conv2dLeakyReLU(3, 4, 3, padding=1, slope=0.0),
                nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
                image,
            ),
            (
                Conv2dLeakyReLU(3, 4, 3, bias=False),
                nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.LeakyReLU(0.2)),
                image,
            ),
            (
                ConvTranspose2dLeakyReLU(3, 4, 3, stride=2, slope=0.5),
                nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.LeakyReLU(0.5)),
                image,
            ),
        ):
            plain[0].load_state_dict(layer.state_dict())
            assert torch.equal(layer(of), plain(of))
            layer.backend = "triton"
            torch.testing.assert_close(layer(of), plain(of))


def test_padding_modes_and_output_sizes() -> None:
    image = torch.randn(2, 3, 5, 5)
    reflect = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    want = torch.relu(reflect(image))
    got = fastgan.fuse(nn.Sequential(reflect, nn.ReLU()), backend="triton")(image)
    torch.testing.assert_close(got, want)
    up = ConvTranspose2dLeakyReLU(3, 4, 3, stride=2, backend="triton")
    assert up(image, output_size=[12, 12]).shape == (2, 4, 12, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastgan.fuse(torch.relu), "fuse: module is a builtin_function_or_method, expected a torch.nn.Module"),
        (lambda: fastgan.fuse(nn.ReLU(), backend="cuda"), "fuse: unknown backend 'cuda'"),
        (
            lambda: LinearAct(2, 2, activation="leaky_relu"),
            "unknown activation 'leaky_relu'; did you mean 'leaky-relu'?",
        ),
        (lambda: LinearAct(2, 2, slope=-1.0), "LinearAct: slope is -1.0, expected a finite slope >= 0"),
        (lambda: Conv2dLeakyReLU(2, 2, 1, slope=float("nan")), "Conv2dLeakyReLU: slope is nan"),
        (lambda: Conv2dLeakyReLU(2, 2, 1, backend="cuda"), "Conv2dLeakyReLU: unknown backend 'cuda'"),
    ],
)
def test_errors_name_the_argument(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()
