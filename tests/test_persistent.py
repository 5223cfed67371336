"""The persistent kernel: the same numbers as one launch after the other, and a barrier that every program passes."""

from __future__ import annotations

import copy
import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from networks import distance, parameters
from torch import nn

from fastgan import Adam, Engine
from fastgan.data import Dataset
from fastgan.errors import InputError
from fastgan.kernels import adam_ema
from fastgan.kernels._launch import Launch
from fastgan.kernels.bias_lrelu import bias_lrelu_backward_launch
from fastgan.kernels.configs import Config
from fastgan.kernels.inputs import Draw, inputs_launch
from fastgan.kernels.linear_lrelu import linear_launch
from fastgan.kernels.persistent import PHASES, arrive, copy_launch, is_open, persistent_launches
from fastgan.kernels.sample_rows import SampleArguments, sample_rows_launch
from fastgan.penalties import R1, GradientPenalty

pytestmark = pytest.mark.interpreted

CASES: dict[str, dict[str, Any]] = {
    "wgan-gp": {"loss": "wasserstein", "penalties": [GradientPenalty(10.0)]},
    "r1": {"penalties": [R1(1.0)]},
    "non-saturating": {},
    "wgan-gp, two critic updates": {"loss": "wasserstein", "penalties": [GradientPenalty(10.0)], "n_critic": 2},
}


def engine(dtype: torch.dtype, device: torch.device, networks: Any = None, **options: Any) -> Engine:
    torch.manual_seed(0)
    g = nn.Sequential(
        nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 40), nn.LeakyReLU(0.1), nn.Linear(40, 10), nn.Tanh()
    )  # fmt: skip
    d = nn.Sequential(nn.Linear(10, 40), nn.LeakyReLU(0.2), nn.Linear(40, 36), nn.LeakyReLU(0.2), nn.Linear(36, 1))
    g, d = (n.to(dtype) for n in networks or (g, d))
    adam = Adam(1e-3, (0.0, 0.9))
    given = {"latent": 5, "seed": 3, "g_optimizer": adam, "d_optimizer": adam, "precision": "fp32"}
    return Engine(g, d, **given | {"backend": "triton", "device": device} | options)


def batches(e: Engine, n: int, rows: int = 12) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(rows * e.n_critic, 10, generator=noise).to(e.device, e.dtype) for _ in range(n)]


def calls(e: Engine) -> list[Any]:
    (variant,) = e._executor._variants.values()
    return variant.iterations[0].calls


@pytest.mark.parametrize("name", CASES)
def test_iterations_equal_those_of_single_launches(name: str, device: torch.device) -> None:
    single, persistent = (engine(torch.float64, device, executor=kind, **CASES[name])
                          for kind in ("eager", "persistent"))  # fmt: skip
    start = [p.clone() for p in parameters(single)]
    for real in batches(single, 3 if single.n_critic == 1 else 2):
        for e in (single, persistent):
            e.step(real)
        assert distance(single, persistent) < 1e-12
    assert persistent.metrics() == pytest.approx(single.metrics(), rel=1e-12, nan_ok=True)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(parameters(single)[:10], start, strict=False))  # it trains
    if device.type == "cpu":
        phases = calls(persistent)
        assert len(phases) == len(calls(single)) > 10
        assert {c.kernel.__name__ for c in phases} == {"_persistent_kernel"}
        assert not any(c.cooperative for c in phases)
    else:
        (launch,) = calls(persistent)
        assert launch.cooperative


@pytest.mark.parametrize("name", ["wgan-gp", "r1", "non-saturating"])
def test_fp32_iterations_equal_those_of_single_launches_up_to_rounding(name: str, device: torch.device) -> None:
    exact, single, persistent = (
        engine(dtype, device, executor=kind, **CASES[name], backend=backend)
        for dtype, kind, backend in (
            (torch.float64, "eager", "reference"),
            (torch.float32, "eager", "triton"),
            (torch.float32, "persistent", "triton"),
        )
    )
    for real in batches(exact, 3):
        for e in (exact, single, persistent):
            e.step(real.to(e.dtype))
    assert distance(persistent, exact) <= 2 * distance(single, exact) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("options", [{"loss": "relativistic"}, {}], ids=["relativistic", "non-saturating"])
def test_a_feed_on_the_device_is_drawn_from_within(options: dict[str, Any], device: torch.device) -> None:
    data = Dataset("points", torch.randn(40, 10, generator=torch.Generator().manual_seed(0)))
    engines = [engine(torch.float64, device, executor=kind, **options) for kind in ("eager", "persistent")]
    for e in engines:
        e.run(data.feed(12, device=device), 2)
    assert distance(*engines) < 1e-12


def test_the_small_kernels_are_phases(device: torch.device) -> None:
    """What an iteration has beside products only now and then."""
    on = {"device": device}
    data, blocks = torch.randn(40, 3, **on), adam_ema.blocks_of([0, 1008], [1000, 30], device)
    position, arrivals = torch.tensor(38, **on), torch.zeros((), dtype=torch.int32, **on)
    rows, half = torch.full((70, 3), float("nan"), **on), torch.zeros(70, 3, dtype=torch.float16, **on)
    grad, active, squares = torch.randn(1040, **on), torch.ones(2, dtype=torch.uint8, **on), adam_ema.squares_of(blocks)
    launches = [
        sample_rows_launch(SampleArguments(data, position, rows, 5, 3, arrivals=arrivals)),
        copy_launch(rows, half),
        adam_ema.squares_launch(grad, blocks, active, squares),
    ]
    results = []
    for calls in (launches, persistent_launches(launches, device=device)):
        for t in (rows, half, squares):
            t.fill_(float("nan"))
        position.fill_(38)
        for call in calls:
            call()
        assert (position.item(), arrivals.item()) == (108, 0)
        results.append([t.clone() for t in (rows, half, squares)])
    assert all(map(torch.equal, *results))
    assert torch.equal(half, rows.half())


def test_a_restored_engine_goes_on(device: torch.device) -> None:
    """The table's addresses stay those of the engine's tensors."""
    e, other = (engine(torch.float32, device, executor="persistent") for _ in range(2))
    first, second, third = batches(e, 3)
    other.step(third)
    e.step(first)
    other.load_state_dict(copy.deepcopy(e.state_dict()))
    for one in (e, other, copied := copy.deepcopy(e)):
        one.step(second)
    assert distance(e, other) == distance(e, copied) == 0


def layers(n: int, device: torch.device | str = "cpu") -> tuple[list[Launch], list[torch.Tensor]]:
    """A chain of so many layers, three tiles each where a tile has 32 rows, and what it writes."""
    x, w = torch.randn(70, 9, device=device), torch.randn(9, 9, device=device) / 3
    made = [torch.full_like(x, float("nan")) for _ in range(n)]
    return [linear_launch(a, w, b) for a, b in itertools.pairwise([x, *made])], made


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_any_number_of_programs_makes_all_tiles(programs: int, device: torch.device) -> None:
    """On a GPU in one launch as well, several times: a phase that begins early would read NaN."""
    launches, made = layers(30 if device.type == "cuda" else 3, device)
    for launch in launches:
        launch()
    expected = [t.clone() for t in made]
    for cooperative in {False, device.type == "cuda"}:
        phases = persistent_launches(launches, device=device, programs=programs, cooperative=cooperative)
        assert len(phases) == (1 if cooperative else len(launches))
        for _ in range(100 if cooperative else 1):
            for t in made:
                t.fill_(float("nan"))
            for launch in phases:
                assert launch.grid == (programs,)
                launch()
            assert all(map(torch.equal, made, expected))


def test_launches_on_a_gpu_are_whole_updates() -> None:
    """Three updates of 13 layers: two fit into one launch of at most 32 phases; alike ones are compiled once."""
    one, _ = layers(13)
    adam = adam_ema.SPEC.launches(torch.float32)[1]
    made = persistent_launches([*one, adam] * 5, device=torch.device("cpu"), programs=132, cooperative=True)
    assert [(m.arguments["FIRST"], m.arguments["LAST"]) for m in made] == [(0, 28), (0, 28), (0, 14)]
    assert all(m.cooperative and m.grid == (132,) and m.keep for m in made)
    assert made[0].arguments["FORMS"] == made[1].arguments["FORMS"]
    assert made[0].arguments["ORDER"] == made[1].arguments["ORDER"]
    assert made[0].arguments["table_ptr"].data_ptr() != made[1].arguments["table_ptr"].data_ptr()
    (long,) = persistent_launches(layers(40)[0], device=torch.device("cpu"), programs=132, cooperative=True)
    assert long.arguments["LAST"] == 40


def test_arguments_that_change_from_run_to_run_compile_nothing() -> None:
    """A form holds no address, size or seed."""
    forms = set()
    for rows, seed in ((64, 5), (32, 2**40 + 7)):
        z, step = torch.empty(rows, 64), torch.zeros((), dtype=torch.int64)
        (launch,) = persistent_launches([inputs_launch([Draw(z, step, seed, 2)])], device=z.device)
        forms.add(launch.arguments["FORMS"])
    assert len(forms) == 1


def test_sums_for_more_warps_get_a_smaller_tile() -> None:
    x, w, y = torch.empty(130, 64), torch.empty(200, 64), torch.empty(130, 200)
    launch = linear_launch(x, w, y, tile=Config(128, 128, 64, 8, 3))
    (made,) = persistent_launches([launch], device=x.device)
    ((_, _, constants),) = made.arguments["FORMS"]
    assert {128} & {c for c in constants if type(c) is int} == set()
    assert made.arguments["table_ptr"][0, :3].tolist() == [12, 3, 4]
    assert made.num_warps == 4


@pytest.mark.parametrize("kernel", PHASES, ids=PHASES.values())
def test_a_phase_asks_for_its_place_by_its_tile(kernel: Any) -> None:
    """The program's own number would be another one's in a persistent launch."""
    source = inspect.getsource(kernel.fn)
    assert "place_of(tile, 0)" in source
    assert "program_id" not in source
    assert "num_programs" not in source


# ---- the barrier


@triton.jit(do_not_specialize=["n_programs"])
def _arrivals_kernel(barrier_ptr, before_ptr, open_ptr, n_programs, PROGRAM: tl.constexpr):
    """One program comes; then whether the barrier is open for it and for those that came before."""
    before = arrive(barrier_ptr, tl.full([], PROGRAM, tl.int32), n_programs)
    tl.store(before_ptr + PROGRAM, before)
    for i in range(n_programs):
        tl.store(open_ptr + i, is_open(barrier_ptr, tl.load(before_ptr + i)).to(tl.int32))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_barrier_opens_when_the_last_program_comes(n: int, device: torch.device) -> None:
    """In any order, again and again: also where the sign flips back."""
    barrier = torch.zeros((), dtype=torch.int32, device=device)
    before, is_open_ = (torch.zeros(n, dtype=torch.int32, device=device) for _ in range(2))
    for turn, order in zip(range(6), itertools.cycle(itertools.permutations(range(n))), strict=False):
        came: list[int] = []
        for program in order:
            _arrivals_kernel[(1,)](barrier, before, is_open_, n, program)
            came.append(program)
            assert [is_open_[i].item() for i in came] == [int(len(came) == n)] * len(came)
        assert barrier.item() == (-(2**31) if turn % 2 == 0 else 0)


# ---- what has no phase


def test_a_kernel_without_a_phase_is_named() -> None:
    x = torch.zeros(4, 4)
    backward = bias_lrelu_backward_launch(x, x, x.clone())
    with pytest.raises(LookupError, match=r"^_bias_lrelu_bwd_kernel is no phase of a persistent kernel$"):
        persistent_launches([backward], device=x.device)
    with pytest.raises(ValueError, match=r"^persistent: launches is empty, expected at least one$"):
        persistent_launches([], device=x.device)
    (launch,), _ = layers(1)
    dependent = replace(launch, arguments={**launch.arguments, "DEPENDENT": True})
    with pytest.raises(ValueError, match="_linear_lrelu_kernel is launched dependent"):
        persistent_launches([dependent], device=x.device)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Dropout(0.5), "bernoulli_ is no launch of a kernel, and so no phase of one"),
        (nn.LayerNorm(8), "normalise is no launch of a kernel, and so no phase of one"),
        (nn.Softsign(), r"the discriminator's update: discriminator: layer '1' \(Softsign\) is not known"),
    ],
)
def test_an_iteration_that_is_not_all_kernels_is_an_error(layer: nn.Module, found: str, device: torch.device) -> None:
    critic = nn.Sequential(nn.Linear(10, 8), layer, nn.Linear(8, 1))
    e = engine(torch.float32, device, (nn.Linear(5, 10), critic), executor="persistent")
    with pytest.raises(InputError, match=f"^Engine: executor is 'persistent', but {found}"):
        e.step(batches(e, 1)[0])
