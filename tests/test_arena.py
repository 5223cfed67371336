"""Updates over flat memory: their numbers against PyTorch's optimisers, and modules whose parameters are views."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import re

import pytest
import safetensors.torch
import torch
from closeness import assert_as_accurate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan import Adam, AdamW, InputError, Schedule, checkpoint
from fastgan._native import ext
from fastgan.adam import AdamNative, AdamReference, AdamState, mark
from fastgan.arena import PAD, Arena, obstacle
from fastgan.ema import EMA, Average, copy_of
from fastgan.optim import Updater

NATIVE = pytest.mark.skipif(ext is None, reason="the native extension was not built")
KINDS = (AdamNative, AdamReference) if ext is not None else (AdamReference,)

SHAPES = [(7, 13), (70, 65), (129,), (1,), (5, 3, 3, 3), (), (0, 4)]
LARGE = [(7, 13), (300, 257), (129,), (2049,), (5, 3, 3, 3)]  # worth more than one thread
STEPS, BATCH, CLIP = 200, 16, 0.9
SCHEDULE = Schedule("cosine", steps=150, start=20, final=0.1, warmup=10)
RULES = {
    "adam": Adam(1e-2, (0.5, 0.99), schedule=SCHEDULE),
    "adam-l2": Adam(1e-2, (0.0, 0.9), eps=1e-6, weight_decay=0.1),
    "adamw": AdamW(1e-2, (0.9, 0.999), weight_decay=0.1, schedule=SCHEDULE),
}


def counter(value: int = 0) -> torch.Tensor:
    return torch.tensor(value)


def first_values(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    values[4] = values[4].to(memory_format=torch.channels_last)
    return values


def gradients(step: int, dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[torch.Tensor | None]:
    """Rounded to fp32, of scales that differ; missing here and there; twice not finite."""
    g = torch.Generator().manual_seed(step)
    out: list[torch.Tensor | None] = [
        (torch.randn(shape, generator=g) * 10.0 ** (-k)).to(dtype) for k, shape in enumerate(shapes)
    ]
    if step == 50:
        out[1][-1, -1] = math.nan
    if step == 120:
        out[2][0] = math.inf
    if step % 3 == 1:
        out[0] = out[3] = None
    return out


class Passes:
    """Parameters, and what updates them by one of the two implementations."""

    def __init__(
        self,
        kind: type,
        dtype: torch.dtype,
        rule: Adam,
        shapes: list[tuple[int, ...]] = SHAPES,
        **options: object,
    ) -> None:
        values = first_values(dtype, shapes)
        self.params = [nn.Parameter(v) for v in values]
        self.averages = [v.clone() for v in values]
        self.arena = Arena([(str(i), p) for i, p in enumerate(self.params)], self.averages)
        self.state = AdamState(len(values), dtype, torch.device("cpu"))
        self.update, self.images, self.averaged = counter(), counter(), counter()
        average = Average(nn.Module(), EMA(halflife_kimg=0.5, rampup=0.3), self.images, self.averaged)
        options = {"clip": CLIP, "average": average} | options
        self.passes = kind(self.arena, self.state, rule, update=self.update, **options)

    def step(self, grads: list[torch.Tensor | None]) -> None:
        self.images += BATCH
        for view, g in zip(self.arena.grads, grads, strict=True):
            view.fill_(math.nan) if g is None else view.copy_(g)  # what has no gradient must not be read
        active = mark([g is not None for g in grads], torch.device("cpu"))
        function, arguments = self.passes.call(active)
        function(*arguments)
        self.update += 1

    def results(self) -> dict[str, torch.Tensor]:
        arena = self.arena
        flats = {"p": arena.flat, "exp_avg": arena.exp_avg, "exp_avg_sq": arena.exp_avg_sq, "average": arena.average}
        return {name: torch.cat([v.flatten() for v in arena.views_of(flat)]) for name, flat in flats.items()}


def by_torch(dtype: torch.dtype, rule: Adam) -> dict[str, torch.Tensor]:
    """The same training by a loop around PyTorch's optimiser."""
    params = [nn.Parameter(v) for v in first_values(dtype)]
    averages = [p.detach().clone() for p in params]
    kind = torch.optim.AdamW if isinstance(rule, AdamW) else torch.optim.Adam
    optimizer = kind(params, rule.lr, rule.betas, rule.eps, rule.weight_decay, foreach=False)
    for i in range(STEPS):
        grads = gradients(i, dtype)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if rule.schedule is not None:
            left = (1 + math.cos(math.pi * min(max((i - 20) / 130, 0), 1))) / 2
            optimizer.param_groups[0]["lr"] = rule.lr * (0.1 + 0.9 * left) * min((i + 1) / 10, 1)
        if all(g is None or g.isfinite().all() for g in grads):
            optimizer.step()
        weight = 1 - 0.5 ** (BATCH / min(500, 0.3 * BATCH * (i + 1)))
        with torch.no_grad():
            for p, a in zip(params, averages, strict=True):
                p.clamp_(-CLIP, CLIP)
                a.lerp_(p, weight)
    moments = {k: torch.cat([optimizer.state[p][k].flatten() for p in params]) for k in ("exp_avg", "exp_avg_sq")}
    flat = {
        "p": torch.cat([p.detach().flatten() for p in params]),
        "average": torch.cat([a.flatten() for a in averages]),
    }
    return flat | moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_both_passes_are_as_accurate_as_torchs_optimisers(rule: Adam, dtype: torch.dtype) -> None:
    exact, plain = by_torch(torch.float64, rule), by_torch(dtype, rule) if dtype == torch.float32 else None
    made = {kind: Passes(kind, dtype, rule) for kind in KINDS}
    for i in range(STEPS):
        grads = gradients(i, dtype)
        finite = all(g is None or g.isfinite().all() for g in grads)
        norm = torch.cat([g.double().flatten() for g in grads if g is not None]).norm().item()
        for passes in made.values():
            passes.step(grads)
            assert passes.state.grad_norm.isfinite().item() is finite
            assert not finite or passes.state.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    for kind, passes in made.items():
        for name, got in passes.results().items():
            if plain is not None:
                assert_as_accurate(f"{kind.__name__} {name}", got, plain[name], exact[name])
            else:
                assert (got - exact[name]).abs().max() <= 1e-13, f"{kind.__name__} {name}"
        missing = sum(i % 3 == 1 for i in range(STEPS))
        skips = [i for i in (50, 120) if gradients(i, dtype)[0] is not None]
        expected = [STEPS - 2] * len(SHAPES)
        expected[0] = expected[3] = STEPS - missing - len(skips)
        assert passes.state.steps.tolist() == expected
        assert passes.state.skipped.item() == 2
        assert passes.arena.flat.isfinite().all()  # the padding too


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_native_numbers_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            passes = Passes(AdamNative, dtype, RULES["adamw"], LARGE)
            norms = []
            for i in range(45, 55):
                passes.step(gradients(i, dtype, LARGE))
                norms.append(passes.state.grad_norm.clone())
            results.append((passes.results(), torch.stack(norms)))
    finally:
        torch.set_num_threads(threads)
    for other, norms in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0][0].items())
        assert torch.equal(norms.nan_to_num(), results[0][1].nan_to_num())


@pytest.mark.parametrize("kind", [pytest.param(AdamNative, marks=NATIVE), AdamReference])
def test_a_repeated_call_equals_calls_of_ones_own(kind: type) -> None:
    a, b = (Passes(kind, torch.float32, RULES["adam"]) for _ in range(2))
    function, arguments = b.passes.call(ones := mark([True] * len(SHAPES), torch.device("cpu")))
    assert ones.all()
    for i in range(0, 30, 3):
        a.step(gradients(i, torch.float32))
        b.images += BATCH
        b.arena.take(gradients(i, torch.float32))
        function(*arguments)
        b.update += 1
    assert all(torch.equal(value, b.results()[name]) for name, value in a.results().items())


def test_the_reference_reads_nothing_back() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    passes = Passes(AdamReference, torch.float32, RULES["adamw"])
    function, arguments = passes.passes.call(mark([True] * len(SHAPES), torch.device("cpu")))
    with Watch():
        function(*arguments)
    assert "aten::lerp_" in seen  # the watch works
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"} & set(seen)


@pytest.mark.parametrize("kind", [pytest.param(AdamNative, marks=NATIVE), AdamReference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_squares_that_overflow_are_not_finite(kind: type, dtype: torch.dtype) -> None:
    passes = Passes(kind, dtype, RULES["adam"], average=None)
    before = passes.arena.flat.clone().clamp(-CLIP, CLIP)
    huge = torch.finfo(dtype).max ** 0.6
    passes.step([torch.full(shape, huge, dtype=dtype) for shape in SHAPES])
    assert passes.state.skipped.item() == 1
    assert torch.equal(before, passes.arena.flat)
    assert not passes.arena.exp_avg_sq.any()


@pytest.mark.parametrize("kind", [pytest.param(AdamNative, marks=NATIVE), AdamReference])
def test_copy_in_bf16_and_gradients_to_zero(kind: type) -> None:
    passes = Passes(kind, torch.float32, Adam(0.0), clip=None, average=None)
    special = torch.tensor(
        [math.inf, -math.inf, 1.00390625, 1.01171875, 3e38, 3.4e38, -1e-40, -0.0, 1 + 2**-8 + 2**-20]
    )
    assert not passes.arena.has_low
    assert passes.arena.low.dtype == torch.bfloat16
    passes = Passes(kind, torch.float32, Adam(0.0), clip=None, average=None)
    low = passes.arena.low
    passes.passes = kind(passes.arena, passes.state, Adam(0.0), update=passes.update, zero_grad=True)
    with torch.no_grad():
        passes.params[1].view(-1)[: len(special)] = special
        passes.params[2].fill_(math.nan)
    passes.step(gradients(1, torch.float32))
    expected = passes.arena.flat.bfloat16()
    bits, expected_bits = (t[~expected.isnan()].view(torch.int16) for t in (low, expected))  # a zero has a sign
    assert torch.equal(bits, expected_bits)
    assert torch.equal(low.isnan(), expected.isnan())
    assert not passes.arena.grad.any()


@NATIVE
@pytest.mark.parametrize(
    "schedule",
    [Schedule("linear", steps=8, start=2, final=0.3, warmup=3), Schedule("cosine", steps=5), Schedule(warmup=4)],
    ids=lambda s: s.kind,
)
@pytest.mark.parametrize("ema", [EMA(decay=0.9), EMA(decay=0.0), EMA(halflife_kimg=0.03)], ids=["0.9", "0", "images"])
def test_native_settings_equal_the_references(schedule: Schedule, ema: EMA) -> None:
    results = []
    for kind in KINDS:
        passes = Passes(kind, torch.float64, Adam())
        average = Average(nn.Module(), ema, passes.images, passes.averaged)
        rule = Adam(1e-2, (0.5, 0.9), schedule=schedule)
        passes.passes = kind(passes.arena, passes.state, rule, update=passes.update, average=average)
        for i in range(12):
            passes.step(gradients(i, torch.float64))
        results.append(passes.results())
        assert passes.averaged.item() == passes.images.item()
    for name, value in results[0].items():
        assert (value - results[1][name]).abs().max() <= 1e-14, name


# ---- the arena


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net(torch.randn(2, 3, 6, 6))
    net[0].to(memory_format=torch.channels_last)
    return net


def arena_of(net: nn.Module, **options: object) -> Arena:
    return Arena([(n, p) for n, p in net.named_parameters() if p.requires_grad], **options)


def test_parameters_keep_values_and_strides_and_become_views() -> None:
    net, before = network(), {n: (p.detach().clone(), p.stride()) for n, p in network().named_parameters()}
    arena = arena_of(net)
    assert arena.attached()
    assert arena.size % PAD == 0
    for (name, p), view, grad, offset in zip(
        net.named_parameters(), arena.views, arena.grads, arena.offsets, strict=True
    ):
        assert torch.equal(p, before[name][0])
        assert p.stride() == before[name][1] == grad.stride() == view.stride()
        assert p.data_ptr() == arena.flat[offset:].data_ptr() == view.data_ptr()
        assert offset % PAD == 0
    arena.flat.zero_()
    assert all(not p.any() for p in net.parameters())
    assert isinstance(net[0].weight, nn.Parameter)


def test_copies_and_files_hold_the_parameters_once() -> None:
    net = network()
    size = sum(p.numel() for p in net.parameters()) * 4
    padding = len(list(net.parameters())) * PAD * 4
    arena_of(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[4].weight.zero_()
    assert net[4].weight.any()
    assert sum(p.untyped_storage().nbytes() for p in other.parameters()) <= size + padding
    pickled = pickle.loads(pickle.dumps(net))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), pickled.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    assert len(file.getvalue()) < size + padding + 8192
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert torch.equal(loaded["4.weight"], net[4].weight)
    contiguous = {k: v.contiguous() for k, v in net.state_dict().items()}
    assert len(safetensors.torch.save(contiguous)) < size + 4096


def test_a_checkpoint_holds_no_arena(tmp_path) -> None:
    net = network()
    arena_of(net)
    checkpoint.save(tmp_path / "1", {"net": dict(net.state_dict())})
    assert (tmp_path / "1" / "state.safetensors").stat().st_size < sum(p.numel() for p in net.parameters()) * 4 + 4096
    got = checkpoint.load(tmp_path / "1")["net"]
    assert all(torch.equal(got[k], v) for k, v in net.state_dict().items())


def test_what_the_user_does_reaches_the_arena() -> None:
    net, other = network(), network()
    arena = arena_of(net)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
        net[4].weight.add_(1.0)
        net[4].bias.data.copy_(torch.arange(4.0))
    assert torch.equal(arena.views[-2], net[4].weight)
    assert torch.equal(arena.views[-1], torch.arange(4.0))
    net.load_state_dict(other.state_dict())
    assert arena.attached()
    assert torch.equal(arena.views[-1], other[4].bias)
    net[4].bias.data = torch.full((4,), 7.0)
    net.load_state_dict(other.state_dict() | {"0.bias": torch.full((5,), 9.0)}, assign=False)
    assert not arena.attached()
    arena.attach()
    assert arena.attached()
    assert net[4].bias.data_ptr() == arena.views[-1].data_ptr()
    assert torch.equal(arena.views[-1], other[4].bias)
    net.double().float()
    arena.attach()
    assert torch.equal(arena.views[1], torch.full((5,), 9.0))


def test_a_parameter_that_became_another_is_named() -> None:
    net = network()
    arena = arena_of(net)
    net.double()
    before = arena.flat.clone()
    message = (
        "parameter '0.weight' became torch.float64 on cpu [5, 3, 3, 3], expected torch.float32 on cpu [5, 3, 3, 3]"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        arena.attach()
    assert torch.equal(before, arena.flat)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda net: net[4].double(),
            "parameter '4.weight' is torch.float64 on cpu, '0.weight' is torch.float32 on cpu",
        ),
        (lambda net: net.bfloat16(), "parameter '0.weight' is torch.bfloat16, expected float32 or float64"),
        (lambda net: setattr(net[4].bias, "data", net[2].bias.data), "'2.bias' and '4.bias' share memory"),
        (lambda net: setattr(net[4].bias, "data", torch.ones(1).expand(4)), "parameter '4.bias' is not dense"),
    ],
)
def test_what_cannot_be_flat_is_named(spoil, message: str) -> None:
    net = network()
    spoil(net)
    assert re.search(re.escape(message), obstacle(list(net.named_parameters())))
    with pytest.raises(InputError, match=re.escape(message)):
        arena_of(net)


# ---- the updater


def updater(net: nn.Module, rule: object = None, **options: object) -> Updater:
    return Updater("d_optimizer", net, rule or Adam(1e-2, (0.5, 0.9)), **({"update": counter()} | options))


def some_grads(up: Updater, step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=g) for p in up.params]


def test_tied_and_frozen_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
            self.b.weight = self.a.weight
            self.c.requires_grad_(False)

    net = Tied()
    frozen = net.c.weight.detach().clone()
    average = Average(copy_of(net), EMA(decay=0.5), counter(), counter())
    up = updater(net, average=average)
    assert up.names == ["a.weight", "a.bias", "b.bias"]
    up.apply(some_grads(up, 0))
    assert net.a.weight is net.b.weight
    assert net.a.weight.data_ptr() == up.arena.views[0].data_ptr()
    assert torch.equal(net.c.weight, frozen)
    with torch.no_grad():
        net.c.weight.zero_()
    up.apply(some_grads(up, 1))
    assert torch.allclose(average.module.c.weight, frozen / 2)
    assert average.module.a.weight.data_ptr() == up.arena.average.data_ptr()


def test_a_step_takes_moved_parameters_in_again_and_goes_on() -> None:
    nets = network(), network()
    ups = [updater(net) for net in nets]
    for i in range(4):
        for up in ups:
            up.apply(some_grads(up, i))
        for p in nets[1].parameters():
            p.data = p.data.clone()
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))
    nets[1].double()
    with pytest.raises(InputError, match=re.escape("d_optimizer: parameter '0.weight' became torch.float64")):
        ups[1].apply(some_grads(ups[1], 0))


def test_gradients_are_handed_over_as_views_and_missing_ones_as_none() -> None:
    up = updater(network())
    grads: list[torch.Tensor | None] = list(some_grads(up, 0))
    grads[2] = None
    before = up.params[2].detach().clone()
    up.apply(grads)
    assert up.params[2].grad is None
    assert torch.equal(before, up.params[2])
    assert up.params[0].grad.data_ptr() == up.arena.grad.data_ptr()
    assert torch.equal(up.params[0].grad, grads[0])


def test_step_with_written_gradients_equals_apply() -> None:
    for rule in (lambda net: Adam(1e-2), lambda net: torch.optim.RMSprop(net.parameters(), 1e-2)):
        nets = network(), network()
        a, b = (updater(net, rule(net)) for net in nets)
        active = tuple(i != 1 for i in range(len(a.params)))
        for i in range(3):
            grads = some_grads(a, i)
            a.apply([g if on else None for g, on in zip(grads, active, strict=True)])
            b.arena.take(grads)
            b.step(active)
        assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_a_bf16_copy_asked_for_between_updates_is_written_by_the_next() -> None:
    up = updater(network())
    up.apply(some_grads(up, 0))
    low = up.arena.low
    up.apply(some_grads(up, 1))
    assert torch.equal(low, up.arena.flat.bfloat16())


@pytest.mark.parametrize("rule", [Adam(1e-2, (0.5, 0.9)), AdamW(1e-2, (0.5, 0.9), schedule=Schedule(warmup=4))])
def test_what_has_no_arena_runs_in_torchs_fused_optimiser(rule: Adam) -> None:
    nets = network().double(), network().double()
    a, b = updater(nets[0], rule), updater(nets[1], rule, other=nn.ModuleList([nets[1][4]]))
    assert b.arena is None
    assert b.obstacle == "parameter '4.weight' is in both networks"
    for i in range(5):
        grads = [g.double() for g in some_grads(a, i)]
        for up in (a, b):
            up.apply(grads)
            up.update += 1
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert (p - q).abs().max() <= 1e-13


def test_states_interchange_with_torchs_optimiser() -> None:
    """A checkpoint from before there were arenas loads, and one from an arena loads without one."""
    rule = Adam(1e-2, (0.5, 0.9))
    nets = [network().double() for _ in range(3)]
    before, here, after = (
        updater(nets[0], rule, other=nets[0]),
        updater(nets[1], rule),
        updater(nets[2], rule, other=nets[2]),
    )
    missing = [None if i == 1 else g.double() for i, g in enumerate(some_grads(before, 0))]
    before.apply(missing)
    assert before.state_dict()["state"]["0.bias"] == {}
    for up, down, net in ((before, here, nets[1]), (here, after, nets[2])):
        net.load_state_dict(nets[0].state_dict())
        down.load_state_dict(copy.deepcopy(up.state_dict()))
    for i in range(1, 4):
        for up in (before, here, after):
            up.apply([g.double() for g in some_grads(up, i)])
    for net in nets[1:]:
        for p, q in zip(nets[0].parameters(), net.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-13
    assert here.state_dict()["kind"] == "Adam"
    assert here.state_dict()["state"]["0.bias"]["step"] == 3
    state = before.state_dict()
    del state["state"]["4.bias"]
    with pytest.raises(InputError, match=re.escape("checkpoint: no optimiser state for parameter '4.bias'")):
        here.load_state_dict(state)


def test_a_copied_engine_trains_apart_from_the_first() -> None:
    def engine() -> fastgan.Engine:
        torch.manual_seed(0)
        return fastgan.Engine(nn.Linear(4, 6), nn.Linear(6, 1), latent=4, device="cpu", ema=0.5)

    a, real = engine(), torch.randn(8, 6)
    a.step(real)
    b = copy.deepcopy(a)
    kept = b.discriminator.weight.detach().clone()
    a.step(real)
    assert torch.equal(kept, b.discriminator.weight)
    b.step(real)
    for x, y in ((a.discriminator, b.discriminator), (a.generator, b.generator), (a.generator_ema, b.generator_ema)):
        assert all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters(), strict=True))


def test_rules_are_rescaled_for_lazy_penalties() -> None:
    up = updater(network(), Adam(1e-2, (0.5, 0.9), eps=1e-7), extra_per_update=0.25)
    assert up.rule == dataclasses.replace(Adam(eps=1e-7), lr=8e-3, betas=(0.5**0.8, 0.9**0.8))
