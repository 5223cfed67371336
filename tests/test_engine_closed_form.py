"""What users do to an engine whose phases run in closed form: it must go on as it would through autograd."""

from __future__ import annotations

import copy
import math
import pickle
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Conditional
from torch import nn

import fastgan
from fastgan import Adam, Engine, InputError
from fastgan import plan as plans
from fastgan.losses import Loss, get
from fastgan.models.packing import Packed
from fastgan.penalties import DRAGAN, R1, R2, GradientPenalty, squared_norm

Networks = tuple[nn.Module | None, nn.Module]
ALL = (GradientPenalty(), R1(0.5), R2(0.3), DRAGAN(2.0))


def mlp() -> Networks:
    g = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 6))
    d = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    return g, d


def alone() -> Networks:
    return None, mlp()[1]


def smooth() -> Networks:
    """Nothing here overwrites its input, and the penalty's rows are kept apart."""
    g, _ = mlp()
    return g, nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))


def convolutional() -> Networks:
    g = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)), nn.Tanh())
    d = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 8, 3, 1, 1), nn.ReLU(), nn.Flatten())
    return g, d.append(nn.Linear(128, 1))


def engine(
    networks: Callable[[], Networks] | Networks = mlp, dtype: torch.dtype = torch.float64, **changes: Any
) -> Engine:
    torch.manual_seed(1)
    g, d = networks() if callable(networks) else networks
    settings = {"latent": 4, "device": "cpu", "g_optimizer": Adam(3e-3), "d_optimizer": Adam(3e-3, (0.0, 0.9))}
    return Engine(g.to(dtype) if g is not None else None, d.to(dtype), **(settings | changes))


def batch(e: Engine, step: int = 0, rows: int = 8) -> torch.Tensor:
    x = torch.randn(rows, *(e.sample_shape or (6,)), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x.to(e.dtype)


def numbers(e: Engine) -> torch.Tensor:
    modules = [m for m in (e.generator, e.discriminator, e.generator_ema) if m is not None]
    found = [t.detach().double().flatten() for m in modules for t in m.state_dict().values()]
    figures = [v for k, v in e.metrics().items() if v == v]
    return torch.cat([*found, torch.tensor(figures, dtype=torch.float64)])


def paths(e: Engine) -> str:
    """Of each phase: c for a closed form, a for autograd."""
    lines = e.explain().splitlines()
    return "".join(line.rsplit(": ", 1)[1][0] for line in lines if line.startswith(("discriminator: ", "generator: ")))


def why(e: Engine) -> list[str]:
    return [line.removeprefix("  why: ") for line in e.explain().splitlines() if line.startswith("  why: ")]


def run(e: Engine, steps: int, start: int = 0, rows: int = 8) -> None:
    for i in range(start, start + steps):
        x = batch(e, i, rows * e.n_critic)
        e.step(x, fake=x.flip(0) * 2 + 1 if e.generator is None else None)


def assert_alike(a: Engine, b: Engine, bound: float = 1e-10) -> None:
    x, y = numbers(a), numbers(b)
    assert x.shape == y.shape
    assert (x - y).abs().max() <= bound


def pair_of(networks: Callable[[], Networks] = mlp, **changes: Any) -> tuple[Engine, Engine]:
    """The same in closed form and through autograd."""
    return engine(networks, **changes), engine(networks, **changes, closed_form=False)


# ---- a discriminator alone


@pytest.mark.parametrize(
    "settings",
    [{"loss": "wasserstein", "penalties": ALL, "n_critic": 2}, {"loss": "relativistic", "penalties": (R1(1.0, 3),)}],
)
def test_a_discriminator_alone_trains_on_given_fakes(settings: dict[str, Any]) -> None:
    a, b = pair_of(alone, **settings)
    assert a.explain().count("not known before the first batch") == len(a.phases)
    for e in (a, b):
        run(e, 5)
    assert_alike(a, b)
    assert set(paths(a)) == {"c"}
    assert a.iterations == 5
    assert a.sample_shape == (6,)
    other, _ = pair_of(alone, **settings)
    for i in range(5):  # update by update it is the same
        x = batch(other, i, 8 * other.n_critic)
        for part, fake in zip(x.chunk(other.n_critic), (x.flip(0) * 2 + 1).chunk(other.n_critic), strict=True):
            other.d_step(part, fake=fake)
    assert torch.equal(numbers(other), numbers(a))


def test_a_discriminator_alone_goes_on_from_its_state() -> None:
    a, b = (engine(alone, penalties=(GradientPenalty(), R1(1.0, 2))) for _ in range(2))
    run(a, 3)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert a.state_dict()["generator"] is None
    run(a, 3, start=3)
    run(b, 3, start=3)
    assert torch.equal(numbers(a), numbers(b))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, x: e.d_step(x), "d_step: the engine has no generator: give fake"),
        (lambda e, x: e.step(x), "d_step: the engine has no generator: give fake"),
        (lambda e, x: e.d_step(x, fake=x[:4]), "d_step: fake: has shape [4, 6], expected [8, 6]"),
        (lambda e, x: e.step(x, fake=x[:4]), "step: fake is [4, 6], expected the shape of real"),
        (lambda e, x: e.step(iter([x]), fake=x), "step: fake is [8, 6], expected the shape of real, which must be"),
        (lambda e, x: e.d_step(x, fake=x, z=torch.zeros(8, 4)), "d_step: both z and fake were given"),
        (lambda e, x: e.d_step(x, fake=x, labels=torch.zeros(8).long()), "labels were given, but the networks are not"),
        (lambda e, x: e.g_step(), "g_step: the engine has no generator"),
        (lambda e, x: e.sample(2), "sample: the engine has no generator"),
        (lambda e, x: e.d_step(x[:, :5], fake=x[:, :5]), "real is [8, 5], but the engine was first given [B, 6]"),
        (lambda e, x: e.d_step(x[:0], fake=x[:0]), "real is [0, 6]"),
        (lambda e, x: e.d_step(x.long(), fake=x), "d_step: real has dtype torch.int64, expected floating point"),
    ],
)  # fmt: skip
def test_bad_calls_without_a_generator_end_in_one_line(call: Callable[..., None], message: str) -> None:
    e = engine(alone)
    x = batch(e)
    e.d_step(x, fake=x)
    before = numbers(e)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        call(e, x)
    assert "\n" not in str(error.value)
    assert torch.equal(numbers(e), before)


def test_a_first_batch_that_does_not_fit_leaves_an_engine_as_it_was() -> None:
    e = engine(alone)
    with pytest.raises(InputError, match="discriminator: does not accept samples"):
        e.d_step(torch.zeros(8, 5), fake=torch.zeros(8, 5))
    run(e, 2)
    other = engine(alone)
    run(other, 2)
    assert torch.equal(numbers(e), numbers(other))


def test_classes_need_a_generator() -> None:
    with pytest.raises(InputError, match="n_classes is given, but there is no generator"):
        engine(alone, n_classes=3)


def test_a_final_sigmoid_is_found_with_the_first_batch() -> None:
    a, b = engine(alone), engine(lambda: (None, nn.Sequential(mlp()[1], nn.Sigmoid())))
    for e in (a, b):
        run(e, 3)
    assert torch.equal(numbers(a), numbers(b))
    assert "ends in Sigmoid" in b.explain()
    assert paths(b) == "c"


# ---- what is given stays as it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("networks", [mlp, alone, smooth, convolutional])
@pytest.mark.parametrize("penalties", [(), (GradientPenalty(),), ALL, (R1(1.0, 2),)], ids=["none", "gp", "all", "lazy"])
def test_inputs_are_left_as_they_are(networks: Callable[[], Networks], penalties: tuple, dtype: torch.dtype) -> None:
    e = engine(networks, dtype, penalties=penalties, loss="relativistic")
    for i in range(2):
        x = batch(e, i)
        given = {"real": x, "alpha": torch.rand(8, dtype=dtype), "delta": torch.randn_like(x)}
        given |= {"z": torch.randn(8, 4, dtype=dtype)} if e.generator is not None else {"fake": batch(e, 9)}
        before = {k: v.clone() for k, v in given.items()}
        e.d_step(**given)
        if e.generator is not None:
            e.g_step(z=given["z"], real=x)
        assert all(torch.equal(before[k], v) for k, v in given.items())
    assert set(paths(e)) == {"c"}


@pytest.mark.parametrize("networks", [mlp, convolutional])
def test_real_samples_may_lie_anyhow_in_memory(networks: Callable[[], Networks]) -> None:
    def odd(x: torch.Tensor, k: int) -> torch.Tensor:
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
        return (wide, x.movedim(0, -1).contiguous().movedim(-1, 0), x.flip(0).contiguous().flip(0))[k]

    a, b = (engine(networks, penalties=ALL, loss="relativistic") for _ in range(2))
    for i in range(3):
        x = batch(a, i)
        a.step(x)
        b.step(odd(x, i))
    assert torch.equal(numbers(a), numbers(b))


def test_real_samples_of_another_dtype_or_that_need_a_gradient() -> None:
    a, b = (engine(penalties=ALL) for _ in range(2))
    x = batch(a).float()
    a.step(x.double())
    b.step(x.requires_grad_())
    assert torch.equal(numbers(a), numbers(b))
    assert x.grad is None


# ---- changes after building


def hook(e: Engine) -> None:
    e.discriminator[0].register_forward_hook(lambda m, args, out: out * 2)


def pre_hook_of_the_generator(e: Engine) -> None:
    e.generator[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def backward_hook(e: Engine) -> None:
    e.discriminator[2].register_full_backward_hook(lambda m, gin, gout: (gin[0] * 2,))


def replace_data(e: Engine) -> None:
    p = e.discriminator[0].weight
    p.data = p.data.clone() * 0.5


def replace_generators_data(e: Engine) -> None:
    p = e.generator[0].weight
    p.data = p.data.clone() * 0.5


def change_in_place(e: Engine) -> None:
    with torch.no_grad():
        e.discriminator[0].weight.mul_(0.5)
        e.generator[2].bias.add_(1)


def load(e: Engine) -> None:
    e.discriminator.load_state_dict({k: v * 0.5 for k, v in e.discriminator.state_dict().items()})


def assign(e: Engine) -> None:
    state = {k: (v * 0.5).clone() for k, v in e.discriminator.state_dict().items()}
    for (_, p), v in zip(e.discriminator.named_parameters(), state.values(), strict=True):
        p.data = v


def freeze(e: Engine) -> None:
    e.discriminator[0].weight.requires_grad_(False)


def freeze_everything(e: Engine) -> None:
    e.discriminator.requires_grad_(False)


def replace_layer(e: Engine) -> None:
    e.discriminator[1] = nn.Tanh()


def change_slope(e: Engine) -> None:
    e.discriminator[1].negative_slope = 0.7


def replace_forward(e: Engine) -> None:
    e.discriminator[0].forward = lambda x: 2 * F.linear(x, e.discriminator[0].weight)


def append_layer(e: Engine) -> None:
    e.generator.append(nn.Tanh())


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        (hook, "aa", "discriminator: layer '0' (Linear) has a forward hook"),
        (pre_hook_of_the_generator, "ca", "generator: layer '0' (Linear) has a forward pre-hook"),
        (backward_hook, "aa", "discriminator: layer '2' (Linear) has a backward hook"),
        (replace_data, "cc", None),
        (replace_generators_data, "cc", None),
        (change_in_place, "cc", None),
        (load, "cc", None),
        (assign, "cc", None),
        (freeze, "cc", None),
        (freeze_everything, "ac", "discriminator: nothing in it is trained"),
        (replace_layer, "cc", None),
        (append_layer, "cc", None),
        (change_slope, "cc", None),
        (replace_forward, "aa", "discriminator: layer '0' (Linear) has a forward of its own on the instance"),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
@pytest.mark.parametrize("penalties", [(), (GradientPenalty(),)], ids=["none", "gp"])
def test_changes_are_noticed_at_the_next_step(
    change: Callable[[Engine], None], path: str, reason: str | None, penalties: tuple
) -> None:
    a, b = pair_of(penalties=penalties)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of backward hooks whose input needs no gradient
        for e in (a, b):
            run(e, 2)
            if e is a:
                assert paths(e) == "cc"
            change(e)
            run(e, 3, start=2)
        assert_alike(a, b)
        assert paths(a) == path
        assert reason is None or reason in why(a)


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_evaluation_mode_is_noticed(which: str) -> None:
    def networks() -> Networks:
        g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 6))
        return g, nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(8, 1))

    a, b = pair_of(networks, penalties=(R1(1.0),))
    for e in (a, b):
        torch.manual_seed(3)
        run(e, 2)
        getattr(e, which).eval()
        run(e, 2, start=2)
        getattr(e, which).train()
        run(e, 2, start=4)
    assert_alike(a, b)
    assert paths(a) == "cc"


def test_layers_settings_and_buffers_may_be_replaced() -> None:
    def networks() -> Networks:
        g = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        return g, nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(8, 1))

    a, b = pair_of(networks)
    for e in (a, b):
        torch.manual_seed(3)
        run(e, 2)
        e.discriminator[2].p = 0.2
        e.generator[1].momentum = 0.3
        run(e, 2)
        e.generator[1].running_mean = torch.ones(8, dtype=e.dtype)
        run(e, 2)
    assert_alike(a, b)
    assert paths(a) == "cc"


def test_a_hook_that_is_removed_again_brings_the_closed_form_back() -> None:
    e = engine()
    handle = e.discriminator[0].register_forward_hook(lambda m, args, out: None)
    run(e, 1)
    assert paths(e) == "aa"
    handle.remove()
    run(e, 1)
    assert paths(e) == "cc"


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_another_dtype_after_building_ends_in_one_line(which: str) -> None:
    e = engine(dtype=torch.float32)
    run(e, 1)
    getattr(e, which).to(torch.float64)
    message = f"{which[0]}_optimizer: parameter '0.weight' became torch.float64"
    with pytest.raises(InputError, match=re.escape(message)) as error:
        run(e, 1)
    assert "\n" not in str(error.value)
    getattr(e, which).to(torch.float32)
    run(e, 1)


def test_batch_sizes_may_change_and_come_back() -> None:
    a, b = pair_of(penalties=ALL, loss="relativistic", n_critic=2)
    for e in (a, b):
        for i, rows in enumerate([8, 3, 8, 5, 1, 7, 2, 8, 3, 64, 8]):
            run(e, 1, start=i, rows=rows)
    assert_alike(a, b)
    assert paths(a) == "cc"


def test_the_generators_batch_may_differ_from_the_discriminators() -> None:
    a, b = pair_of(penalties=(GradientPenalty(),))
    for e in (a, b):
        for i, rows in enumerate([8, 3, 8]):
            e.d_step(batch(e, i, rows))
            e.g_step(z=torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))
    assert_alike(a, b)


def test_a_state_may_be_loaded_mid_run() -> None:
    a, b, c = (engine(penalties=(GradientPenalty(), R2(1.0, 2))) for _ in range(3))
    run(a, 3)
    state = copy.deepcopy(a.state_dict())
    run(b, 2, start=20)
    b.load_state_dict(state)
    c.load_state_dict(state)
    for e in (a, b, c):
        run(e, 3, start=3)
    assert torch.equal(numbers(a), numbers(b))
    assert torch.equal(numbers(a), numbers(c))


# ---- weights


def tied() -> Networks:
    g, d = mlp()
    d = nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.2), nn.Linear(6, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))
    d[2].weight = d[0].weight
    return g, d


def one_layer_twice() -> Networks:
    layer = nn.Linear(6, 6)
    return mlp()[0], nn.Sequential(layer, nn.LeakyReLU(0.2), layer, nn.LeakyReLU(0.2), nn.Linear(6, 1))


def tied_in_the_generator() -> Networks:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.ReLU(), nn.Linear(4, 6)), mlp()[1]


def tied_across() -> Networks:
    g, d = mlp()
    g = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 6))
    d[0] = nn.Linear(6, 6)
    d[2] = nn.Linear(6, 8)
    d[0].weight = g[2].weight
    return g, d


def frozen() -> Networks:
    g, d = mlp()
    d[0].weight.requires_grad_(False)
    d[2].requires_grad_(False)
    g[0].bias.requires_grad_(False)
    return g, d


def frozen_from_below() -> Networks:
    g, d = mlp()
    d[0].requires_grad_(False)
    d[2].requires_grad_(False)
    g[2].requires_grad_(False)
    return g, d


def frozen_below_batch_norm() -> Networks:
    g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    g[0].requires_grad_(False)
    return g, mlp()[1]


def batch_norm_twice() -> Networks:
    norm = nn.BatchNorm1d(8)
    g = nn.Sequential(nn.Linear(4, 8, bias=False), norm, nn.ReLU(), nn.Linear(8, 8, bias=False), norm, nn.Linear(8, 6))
    return g, mlp()[1]


def frozen_below_layer_norm() -> Networks:
    d = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 1))
    d[0].requires_grad_(False)
    return mlp()[0], d


def layer_norm_twice() -> Networks:
    norm = nn.LayerNorm(8)
    return mlp()[0], nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 8), norm, nn.SiLU(), nn.Linear(8, 1))


def without_biases() -> Networks:
    g, d = mlp()
    for layer in (g[0], d[0], d[2], d[4]):
        layer.bias = None
    return g, d


@pytest.mark.parametrize(
    "networks",
    [
        tied, one_layer_twice, tied_in_the_generator, frozen, frozen_from_below, frozen_below_batch_norm,
        batch_norm_twice, frozen_below_layer_norm, layer_norm_twice, without_biases,
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "settings",
    [{}, {"penalties": ALL, "loss": "wasserstein"}, {"penalties": (R1(1.0), R2(1.0, 2)), "loss": "relativistic"}],
    ids=["none", "all", "relativistic"],
)
def test_shared_and_frozen_weights(networks: Callable[[], Networks], settings: dict[str, Any]) -> None:
    a, b = pair_of(networks, **settings)
    for e in (a, b):
        run(e, 4)
    assert_alike(a, b)
    assert set(paths(a)) == {"c"}


def test_a_weight_in_both_networks() -> None:
    a, b = pair_of(tied_across, penalties=ALL)
    for e in (a, b):
        run(e, 4)
    assert_alike(a, b)
    assert why(a) == ["parameter '2.weight' is in both networks"] * 2


@pytest.mark.parametrize("penalties", [(), ALL], ids=["none", "all"])
def test_a_frozen_parameter_keeps_its_values_and_moments(penalties: tuple) -> None:
    e = engine(penalties=penalties, d_optimizer=fastgan.AdamW(1e-2))
    run(e, 2)
    e.discriminator[2].requires_grad_(False)
    before, state = numbers(e), copy.deepcopy(e.state_dict()["d_optimizer"]["state"])
    kept = [p.detach().clone() for p in e.discriminator[2].parameters()]
    run(e, 2)
    assert all(torch.equal(x, p) for x, p in zip(kept, e.discriminator[2].parameters(), strict=True))
    after = e.state_dict()["d_optimizer"]["state"]
    assert all(torch.equal(state["2.weight"][k], after["2.weight"][k]) for k in after["2.weight"])
    assert not torch.equal(before, numbers(e))
    e.discriminator[2].requires_grad_(True)
    run(e, 1)
    assert not torch.equal(kept[0], e.discriminator[2].weight)


def test_copies_of_networks_are_independent() -> None:
    e = engine(penalties=ALL)
    run(e, 2)
    g, d = copy.deepcopy(e.generator), copy.deepcopy(e.discriminator)
    before = [p.detach().clone() for p in (*g.parameters(), *d.parameters())]
    run(e, 1, start=2)
    assert all(torch.equal(x, p) for x, p in zip(before, (*g.parameters(), *d.parameters()), strict=True))
    a, b = engine((g, d), penalties=ALL), engine((copy.deepcopy(g), copy.deepcopy(d)), penalties=ALL, closed_form=False)
    for other in (a, b):
        run(other, 3)
    assert_alike(a, b)


def test_two_engines_over_the_same_networks_train_them_in_turn() -> None:
    """The second one moves the parameters into memory of its own; the first takes them in again."""
    ends = []
    for closed_form in (True, False):
        first = engine(closed_form=closed_form)
        run(first, 2)
        second = engine((first.generator, first.discriminator), loss="hinge", closed_form=closed_form)
        for i in range(3):
            run(second, 1, start=2 * i)
            run(first, 1, start=2 * i + 1)
        ends.append((first, second))
    for a, b in zip(*ends, strict=True):
        assert_alike(a, b)


def test_two_engines_side_by_side() -> None:
    one, two = engine(penalties=ALL), engine(penalties=ALL, seed=5)
    apart = engine(penalties=ALL), engine(penalties=ALL, seed=5)
    for i in range(3):
        for e in (one, two):
            run(e, 1, start=i)
    for e in apart:
        run(e, 3)
    assert torch.equal(numbers(one), numbers(apart[0]))
    assert torch.equal(numbers(two), numbers(apart[1]))


# ---- packing


def packs(k: int) -> Callable[[], Networks]:
    def networks() -> Networks:
        net = nn.Sequential(
            nn.Linear(6 * k, 16), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(16, 8), nn.LeakyReLU(0.2),
            nn.Linear(8, 1),
        )  # fmt: skip
        return mlp()[0], Packed(net, k)

    return networks


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"penalties": ALL, "loss": "wasserstein"}, {"loss": "relativistic"}])
def test_packed_samples(k: int, settings: dict[str, Any]) -> None:
    a, b = pair_of(packs(k), **settings)
    for e in (a, b):
        torch.manual_seed(2)
        run(e, 3)
        run(e, 1, start=3, rows=4)
    assert_alike(a, b)
    assert paths(a) == "cc"


def test_packed_samples_without_a_generator() -> None:
    a, b = pair_of(lambda: (None, packs(2)()[1]), penalties=ALL)
    for e in (a, b):
        torch.manual_seed(2)
        run(e, 3)
    assert_alike(a, b)
    assert paths(a) == "c"


def test_rows_that_do_not_make_packs_end_in_one_line() -> None:
    e = engine(packs(4))
    with pytest.raises(InputError, match=re.escape("d_step: real has 6 rows, expected a multiple of pac = 4")):
        e.d_step(batch(e, rows=6))
    with pytest.raises(InputError, match=re.escape("g_step: z has 6 rows, expected a multiple of pac = 4")):
        e.g_step(z=torch.zeros(6, 4))


# ---- optimisers


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 3e-3, (0.5, 0.9)),
        lambda p: torch.optim.AdamW(p, 3e-3, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, 1e-3),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("networks", [mlp, frozen])
def test_users_optimisers(make: Callable[..., torch.optim.Optimizer], networks: Callable[[], Networks]) -> None:
    ends = []
    for closed_form in (True, False):
        torch.manual_seed(1)
        g, d = (m.double() for m in networks())
        g_opt, d_opt = (make([p for p in m.parameters() if p.requires_grad]) for m in (g, d))
        e = engine(
            (g, d), g_optimizer=g_opt, d_optimizer=d_opt, penalties=(GradientPenalty(), R1(1.0, 2)),
            loss=get("wasserstein", clip=0.3), closed_form=closed_form,
        )  # fmt: skip
        run(e, 4)
        ends.append(e)
    assert_alike(*ends)
    assert paths(ends[0]) == "ccc"


def test_gradients_lie_in_the_parameters_grad() -> None:
    a, b = pair_of(penalties=ALL)
    for e in (a, b):
        run(e, 2)
    for m, n in ((a.generator, b.generator), (a.discriminator, b.discriminator)):
        for p, q in zip(m.parameters(), n.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() < 1e-12


def test_gradients_that_are_not_finite_are_skipped() -> None:
    a, b = pair_of(penalties=(GradientPenalty(),))
    for e in (a, b):
        run(e, 2)
        bad = batch(e)
        bad[3, 2] = float("nan")
        e.d_step(bad)
        assert e.metrics()["skipped_steps"] == 1
        run(e, 2, start=2)
    assert_alike(a, b)


# ---- what has no closed form


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1))[0].squeeze(1))


class Bilinear(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(size, 6), nn.Bilinear(6, 6, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.both(h, h)


class OwnPenalty:
    name, place, interval = "own", "real", 1

    def rows(self, gradient: torch.Tensor) -> torch.Tensor:
        return squared_norm(gradient)


def batch_normed() -> Networks:
    """No bias whose gradient is rounding alone, which Adam would blow up."""
    first = nn.Linear(6, 8, bias=False)
    return mlp()[0], nn.Sequential(first, nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


OWN_LOSS = Loss("own", lambda r, f: F.softplus(f - r), lambda f, r: -f)
NO_CLOSED_FORM = {
    "own-loss": ({"loss": OWN_LOSS}, "aa", ["loss 'own' is your own: only the built-in ones have a known derivative"]),
    "own-loss-lazy": ({"loss": OWN_LOSS, "penalties": (R1(1.0, 2),)}, "aca", ["loss 'own' is your own"]),
    "own-penalty": ({"penalties": (OwnPenalty(),)}, "ac", ["discriminator: penalty 'own' is your own: only the"]),
    "own-and-lazy": ({"penalties": (OwnPenalty(), R1(1.0, 2))}, "acc", ["discriminator: penalty 'own' is your own"]),
    "attention": (
        {"networks": lambda: (mlp()[0], Attention())}, "aa",
        ["discriminator: layer 'attention' (MultiheadAttention) is not known"],
    ),
    "bilinear-critic": (
        {"networks": lambda: (mlp()[0], Bilinear(6, 1))}, "aa", ["discriminator: layer 'both' (Bilinear) is not known"],
    ),
    "bilinear-generator": (
        {"networks": lambda: (Bilinear(4, 6), mlp()[1]), "penalties": (GradientPenalty(), R2(1.0, 2))}, "cca",
        ["generator: layer 'both' (Bilinear) is not known"],
    ),
    "batch-norm": (
        {"networks": batch_normed, "penalties": (R1(1.0),)}, "ac",
        ["discriminator: layer '1' (BatchNorm) mixes the batch, so that a penalty"],
    ),
    "batch-norm-lazy": (
        {"networks": batch_normed, "penalties": (R1(1.0, 2),)}, "cac",
        ["discriminator: layer '1' (BatchNorm) mixes the batch, so that a penalty"],
    ),
    "asked-for": ({"closed_form": False}, "aa", ["closed_form is False"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CLOSED_FORM)
def test_what_has_no_closed_form_says_why(name: str) -> None:
    settings, path, reasons = NO_CLOSED_FORM[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = engine(**settings)
        b = engine(**(settings | {"closed_form": False}))
    for e in (a, b):
        run(e, 4)
    assert_alike(a, b)
    assert paths(a) == path
    for reason in reasons:
        assert any(reason in line for line in why(a)), (reason, why(a))


@pytest.mark.parametrize(
    ("precision", "path", "reason"),
    [
        ("fp16", "aa", "closed forms in PyTorch ops run in fp32, fp64 and bf16, not in fp16"),
        ("tf32", "aa", "closed forms in PyTorch ops run in fp32, fp64 and bf16, not in tf32"),
        ("bf16", "cc", None),
        ("fp32", "cc", None),
    ],
)
def test_precisions(precision: str, path: str, reason: str | None) -> None:
    a, b = pair_of(dtype=torch.float32, precision=precision, penalties=(GradientPenalty(),))
    for e in (a, b):
        run(e, 3)
    x, y = numbers(a), numbers(b)
    assert ((x - y).abs() <= {"bf16": 0.05}.get(precision, 1e-5) * (1 + y.abs())).all()
    assert paths(a) == path
    assert reason is None or why(a) == [reason] * 2


def test_conditional_networks_run_through_autograd() -> None:
    ends = []
    for closed_form in (True, False):
        e = engine(lambda: (Conditional(4, 6), Conditional(6, 1)), n_classes=3, closed_form=closed_form)
        for i in range(3):
            e.step(batch(e, i), torch.arange(8) % 3)
        ends.append(e)
    assert torch.equal(*map(numbers, ends))
    assert why(ends[0]) == ["conditional networks take labels beside their input"] * 2


# ---- explain()


@pytest.mark.parametrize(
    "networks",
    [mlp, convolutional, batch_normed, packs(2), alone, lambda: (mlp()[0], Attention())],
    ids=["mlp", "conv", "batch-norm", "packed", "alone", "attention"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_explain_changes_nothing(networks: Callable[[], Networks], precision: str) -> None:
    ends = []
    for asked in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            e = engine(networks, torch.float32, precision=precision, penalties=(R1(1.0), GradientPenalty(interval=2)))
        torch.manual_seed(3)
        for i in range(4):
            if asked:
                before, rng, samples = numbers(e), torch.get_rng_state(), e.samples
                grads = [p.grad.clone() for p in e.discriminator.parameters() if p.grad is not None]
                assert e.explain() == e.explain()
                assert torch.equal(before, numbers(e))
                assert torch.equal(rng, torch.get_rng_state())
                assert samples == e.samples
                after = [p.grad for p in e.discriminator.parameters() if p.grad is not None]
                assert len(after) == len(grads)
                assert all(map(torch.equal, grads, after))
            run(e, 1, start=i)
        ends.append((numbers(e), torch.get_rng_state()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_explain_lists_what_each_phase_costs() -> None:
    e = engine(convolutional, penalties=(GradientPenalty(), R1(1.0, 4)))
    text = e.explain()
    assert text.count("closed form\n  cost at batch 64: ") == 3
    assert text.count("  through autograd: ") == 3
    number = r"[\d.e+]+ [kMGT]?"
    cost = rf"(\d+ matrix products, )?\d+ convolutions, \d+ kernel launches, {number}FLOP, {number}B"
    assert len(re.findall(rf"cost at batch 64: {cost}; [\d.]+ MiB of buffers", text)) == 3
    assert len(re.findall(rf"through autograd: {cost}\n?", text)) == 3
    run(e, 1, rows=16)
    assert e.explain().count("cost at batch 16: ") == 3


def test_explain_counts_what_the_literature_counts() -> None:
    """12 matrix products for an update with a gradient penalty through four layers, some 43 through autograd."""
    g = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    d = nn.Sequential(
        nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16),
        nn.LeakyReLU(0.2), nn.Linear(16, 1),
    )  # fmt: skip
    lines = engine((g, d), loss="wasserstein", penalties=(GradientPenalty(),)).explain().splitlines()
    closed, through = (int(re.search(r"(\d+) matrix products", line)[1]) for line in lines[2:4])
    assert closed == 12
    assert through > 40  # torch's, which may leave out some


# ---- contexts and copies


@pytest.mark.parametrize("closed_form", [True, False])
def test_engines_run_under_no_grad(closed_form: bool) -> None:
    a, b = (engine(penalties=(*ALL, R1(1.0, 2)), loss="relativistic", closed_form=closed_form) for _ in range(2))
    run(a, 3)
    with torch.no_grad():
        run(b, 1)
        assert b.explain().count("through autograd") == 3 * closed_form
        run(b, 1, start=1)
    run(b, 1, start=2)
    assert torch.equal(numbers(a), numbers(b))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("closed_form", [True, False])
def test_inference_mode_ends_in_one_line_and_leaves_an_engine_as_it_was(closed_form: bool, steps: int) -> None:
    a, b = (engine(penalties=ALL, closed_form=closed_form) for _ in range(2))
    run(a, 3)
    run(b, steps)
    with torch.inference_mode():
        for call in (lambda: run(b, 1), b.g_step, b.explain):
            with pytest.raises(InputError, match=r"was called under torch\.inference_mode\(\), where nothing can be"):
                call()
        b.sample(2, seed=3)
    run(b, 3 - steps, start=steps)
    assert torch.equal(numbers(a), numbers(b))


def own_d_loss(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return F.softplus(f - r)


def own_g_loss(f: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
    return -f


def pickled(e: Engine) -> Engine:
    return pickle.loads(pickle.dumps(e))


@pytest.mark.parametrize(
    ("copy_of", "own"),
    [(copy.deepcopy, False), (copy.deepcopy, True), (pickled, False)],
    ids=["copy", "copy-own-loss", "pickle"],
)
@pytest.mark.parametrize("after", [0, 2])
def test_a_copy_of_an_engine_goes_on_by_itself(copy_of: Callable[[Engine], Engine], own: bool, after: int) -> None:
    loss = Loss("own", own_d_loss, own_g_loss) if own else "non-saturating"
    a = engine(penalties=(GradientPenalty(), R1(1.0, 2)), loss=loss)
    run(a, after)
    assert "closed form" in a.explain()
    b = copy_of(a)
    before = numbers(a)
    run(b, 3, start=after)
    assert torch.equal(before, numbers(a))
    run(a, 3, start=after)
    assert torch.equal(numbers(a), numbers(b))
    state = copy.deepcopy(a.state_dict())
    run(b, 1, start=9)
    b.load_state_dict(state)
    run(b, 1, start=5)
    run(a, 1, start=5)
    assert torch.equal(numbers(a), numbers(b))


# ---- what a step is given, and what a forward may do besides


@pytest.mark.parametrize("closed_form", [True, False])
def test_inputs_that_require_a_gradient_are_taken_as_they_are(closed_form: bool) -> None:
    a, b = engine(closed_form=closed_form), engine(closed_form=closed_form)
    for i in range(3):
        x, z = batch(a, i), torch.randn(8, 4, dtype=torch.float64)
        a.d_step(x, z=z)
        b.d_step(x.clone().requires_grad_(), z=z.clone().requires_grad_())
        a.g_step(z)
        b.g_step(z.clone().requires_grad_())
        fake = torch.randn_like(x)
        a.d_step(x, fake=fake)
        b.d_step(x, fake=(fake.clone().requires_grad_() * 1))
    assert torch.equal(numbers(a), numbers(b))
    for found in () if b._planner is None else b._planner._plans.values():
        assert not any(t.requires_grad for t in getattr(found, "inputs", {}).values())


class Sometimes(nn.Module):
    """Leaves a layer out at random, and has settings of several kinds."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 1)
        self.draws, self.slope, self.steps, self.settings = draws, None, [0.2], {"twice": False}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.draws and random.random() < 0.5:
            return self.second(x)
        h = F.leaky_relu(self.first(x), self.steps[0] if self.slope is None else self.slope)
        return self.second(h + h if self.settings["twice"] else h)


def sometimes() -> Networks:
    return mlp()[0], Sometimes().double()


def test_a_forward_that_draws_on_the_host_runs_through_autograd() -> None:
    e = engine(lambda: (mlp()[0], Sometimes(draws=True).double()))
    run(e, 1)
    assert "draws random numbers of Python or numpy" in e.explain()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: setattr(d, "slope", 0.9),
        lambda d: d.steps.__setitem__(0, 0.7),
        lambda d: d.settings.__setitem__("twice", True),
        lambda d: d.first.weight.register_hook(lambda g: g * 0),
    ],
    ids=["none", "list", "dict", "gradient-hook"],
)
@pytest.mark.parametrize("after", [0, 2])
def test_changes_of_settings_and_gradient_hooks_are_noticed(change: Callable[[nn.Module], Any], after: int) -> None:
    a, b = pair_of(sometimes)
    for e in (a, b):
        run(e, after)
        change(e.discriminator)
        run(e, 2, start=after)
    assert_alike(a, b)


def test_a_hook_on_every_module_is_noticed() -> None:
    e = engine()
    run(e, 1)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        run(e, 1, start=1)
        assert "a hook on every module is registered" in e.explain()
    finally:
        handle.remove()
    run(e, 1, start=2)
    assert "closed form" in e.explain()


def test_the_number_of_threads_is_noticed() -> None:
    e, before = engine(), torch.get_num_threads()
    run(e, 1)
    plan = next(iter(e._planner._plans.values()))
    try:
        torch.set_num_threads(before + 1)
        run(e, 1, start=1)
        assert next(iter(e._planner._plans.values())) is not plan
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("networks", [mlp, smooth, convolutional])
@pytest.mark.parametrize(
    "settings",
    [{}, {"penalties": ALL, "loss": "wasserstein"}, {"penalties": (R1(1.0), R2(1.0, 2)), "loss": "relativistic"}],
    ids=["none", "all", "relativistic"],
)
def test_large_batches_in_parts(
    networks: Callable[[], Networks], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_PART", {"cpu": (1, 2)})  # every batch is cut, down to two samples
    a, b = pair_of(networks, **settings)
    for e in (a, b):
        run(e, 2, rows=8)
        run(e, 1, start=2, rows=6)
    assert_alike(a, b)
    one = {k: v for k, v in a.metrics().items() if not math.isnan(v)}
    assert one == pytest.approx({k: v for k, v in b.metrics().items() if not math.isnan(v)})
    parts = plans._parts(a._planner._networks["discriminator"], "hinge", (), 8, a._planner._setting)
    assert parts == 4


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(16), nn.utils.parametrizations.spectral_norm])
def test_what_draws_or_moves_on_in_every_call_is_not_cut(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def networks() -> Networks:
        torch.manual_seed(5)
        g, d = mlp()
        if isinstance(layer, nn.Module):
            d.insert(1, copy.deepcopy(layer).double())
        else:
            d[0] = layer(d[0])
        return g, d

    monkeypatch.setattr(plans, "_PART", {"cpu": (1, 2)})
    ends = []
    for closed_form in (True, False):
        e = engine(networks, closed_form=closed_form)
        torch.manual_seed(7)
        run(e, 3)
        ends.append(numbers(e))
    assert (ends[0] - ends[1]).abs().max() <= 1e-10
