"""``fastgan bench``: variants are right or said to be wrong, figures are what they claim, results can be compared."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastgan
from fastgan import costs
from fastgan.benchmark import command, compare, variants
from fastgan.benchmark.by_hand import Form, Objective, Unable
from fastgan.benchmark.check import Reference
from fastgan.benchmark.measure import TIMED, Measurement, Settings, compared_with
from fastgan.benchmark.memory import Held, transient
from fastgan.benchmark.table import whole_table
from fastgan.benchmark.timing import quantiles, ratio
from fastgan.benchmark.variants import VARIANTS, Way, by_engine, by_hand, eager, plain_engine
from fastgan.benchmark.workloads import WORKLOADS, Case, Workload, cases, find
from fastgan.cli import main
from fastgan.models.packing import Packed
from fastgan.penalties import DRAGAN, R1, R2, GradientPenalty
from fastgan.phases import Phase

CPU = torch.device("cpu")
CEILINGS = {"matrix_tflop_per_s": {"fp32": 0.2, "bf16": 0.4}, "copy_gb_per_s": 20.0}
PLAIN = {"eager": eager, "fastgan reference": plain_engine, "fastgan": by_engine}


class Labelled(nn.Module):
    """Takes labels beside its input."""

    def __init__(self, net: nn.Module, n: int) -> None:
        super().__init__()
        self.net, self.embed = net, nn.Embedding(n, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(torch.cat([x, self.embed(labels)], 1))
        return out


def pair(inputs: int = 0, *, out: int = 6, d_rows: int = 1, dropout: float = 0.0) -> dict[str, nn.Module]:
    middle = [nn.Dropout(dropout)] if dropout else []
    return {
        "generator": nn.Sequential(nn.Linear(4 + inputs, 16), nn.ReLU(), nn.Linear(16, out), nn.Tanh()),
        "discriminator": nn.Sequential(
            nn.Linear(out * d_rows + inputs, 16), nn.LeakyReLU(0.2), *middle, nn.Linear(16, 8), nn.LeakyReLU(0.2),
            nn.Linear(8, 1),
        ),
    }  # fmt: skip


def wgan_gp(**more: Any) -> dict[str, Any]:
    return {**pair(), "latent": 4, "loss": "wasserstein", "penalties": (GradientPenalty(10.0),), "n_critic": 2, **more}


def conditional() -> dict[str, Any]:
    networks = {name: Labelled(net, 3) for name, net in pair(3).items()}
    return wgan_gp(**networks, n_classes=3)


def packed() -> dict[str, Any]:
    networks = pair(d_rows=2)
    return wgan_gp(**networks | {"discriminator": Packed(networks["discriminator"], 2)})


def alone() -> dict[str, Any]:
    return wgan_gp(generator=None, sample_shape=(6,))


def with_torch_optimizers() -> dict[str, Any]:
    given = wgan_gp()
    g, d = given["generator"].parameters(), given["discriminator"].parameters()
    return given | {"g_optimizer": torch.optim.RMSprop(g, 1e-3), "d_optimizer": torch.optim.Adam(d, 1e-3)}


def latents(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, 4, generator=generator)


def frozen() -> dict[str, Any]:
    given = wgan_gp()
    given["discriminator"][2].requires_grad_(False)
    given["generator"][0].bias.requires_grad_(False)
    return given


def normalised() -> dict[str, Any]:
    given = pair()
    given["generator"].insert(1, nn.BatchNorm1d(16))
    return {**given, "latent": 4, "ema": 0.9}


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "wgan-gp": wgan_gp,
    "clipped": lambda: wgan_gp(loss=fastgan.losses.get("wasserstein", clip=0.05), penalties=()),
    "r1 and r2, relativistic": lambda: wgan_gp(loss="relativistic", penalties=(R1(1.0), R2(0.5))),
    "dragan, twice": lambda: wgan_gp(loss="minimax", penalties=(DRAGAN(5.0, 0.5), DRAGAN(1.0, 0.1))),
    "lazy r1": lambda: wgan_gp(loss="non-saturating", penalties=(R1(1.0, interval=2),), n_critic=1),
    "average": lambda: wgan_gp(ema=0.9),
    "weight decay": lambda: wgan_gp(d_optimizer=fastgan.AdamW(1e-3, (0.5, 0.9), weight_decay=0.1)),
    "dropout": lambda: wgan_gp(**pair(dropout=0.5)),
    "labels": conditional,
    "packed": packed,
    "frozen": frozen,
    "batch norm": normalised,
    "given fakes": alone,
    "torch optimisers": with_torch_optimizers,
    "a function for latents": lambda: wgan_gp(latent=latents),
}


def case(kind: str = "wgan-gp", batch: int = 8, precision: str = "fp32") -> Case:
    return Case(Workload(kind, f"of the tests: {kind}", KINDS[kind]), batch, CPU, precision)


def penalty_dropped(of: Case) -> Way:
    """The loop whose penalty has no gradient."""
    way = by_hand(of)
    loop = way.keep
    loop._objectives = [replace(o, phase=Phase("discriminator", True)) for o in loop._objectives]
    return way


# ---- right or wrong


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_right_in_every_way(kind: str) -> None:
    of = case(kind)
    reference = Reference(of, iterations=3)
    for name, make in PLAIN.items():
        found = reference.hold(make(of), "fp32")
        assert found.right, (name, found)
    amp = reference.hold(by_hand(of, Form(amp=True)), "bf16")
    assert amp.right, amp
    assert amp.moments > 1e-5  # it does compute in bf16


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", ["wgan-gp", "r1 and r2, relativistic", "labels", "lazy r1", "frozen"])
def test_compiled_forms_are_right(kind: str, traced: bool) -> None:
    of = case(kind)
    torch._dynamo.config.trace_autograd_ops = True
    try:
        way = by_hand(of, Form(compiled={"backend": "aot_eager"}, traced=traced, fused=True))
        found = Reference(of).hold(way, "fp32")
    finally:
        torch._dynamo.config.trace_autograd_ops = False
        torch._dynamo.reset()
    assert found.right, found


def test_a_traced_form_with_batch_norm_is_right() -> None:
    def arguments() -> dict[str, Any]:
        given = normalised()
        given["discriminator"].insert(1, nn.BatchNorm1d(16))
        return given

    of = Case(Workload("batch norm in both", "", arguments), 8, CPU)
    torch._dynamo.config.trace_autograd_ops = True
    try:
        form = Form(compiled={"backend": "aot_eager"}, traced=True, fused=True)
        found = Reference(of).hold(by_hand(of, form), "fp32")
    finally:
        torch._dynamo.config.trace_autograd_ops = False
        torch._dynamo.reset()
    assert found.right, found


@pytest.mark.parametrize("name", ["wgan-gp-mlp", "toy", "r1-conv"])
def test_a_dropped_penalty_is_wrong(name: str) -> None:
    of = Case(WORKLOADS[name], 8, CPU)
    reference = Reference(of)
    assert reference.hold(eager(of), "fp32").right
    for precision in ("fp32", "bf16"):
        found = reference.hold(penalty_dropped(of), precision)
        assert not found.right
        assert "off those in fp64" in found.sentence()


def wrong_weight(of: Case) -> Way:
    arguments = lambda: KINDS["wgan-gp"]() | {"penalties": (GradientPenalty(9.0),)}  # noqa: E731
    return by_hand(replace(of, workload=replace(of.workload, arguments=arguments), _known={}))


def another_start(of: Case) -> Way:
    way = by_hand(of)
    with torch.no_grad():
        way.parameters[0].mul_(1.0001)
    return way


def same_noise_twice(of: Case) -> Way:
    way = by_hand(of)
    held = way.held
    way.held = lambda iteration: held(0)
    return way


def other_generator(of: Case) -> Way:
    way = by_hand(of)
    loop = way.keep
    loop.g_optimizer = torch.optim.Adam(loop.g.parameters(), 4e-4, (0.5, 0.999))
    return way


def without_average(of: Case) -> Way:
    way = by_hand(of)
    way.keep.averaged.clear()
    return way


def without_statistics(of: Case) -> Way:
    way = by_hand(of)
    for net in way.networks:
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.momentum = 0.0
    return way


@pytest.mark.parametrize("make", [without_average, without_statistics])
def test_what_follows_is_held_too(make: Callable[[Case], Way]) -> None:
    of = case("batch norm")
    assert Reference(of).hold(by_hand(of), "fp32").right
    assert not Reference(of).hold(make(of), "fp32").right


def nothing_finite(of: Case) -> Way:
    way = by_hand(of)
    way.keep.real.fill_(math.nan)
    return way


@pytest.mark.parametrize("make", [wrong_weight, another_start, same_noise_twice, other_generator, nothing_finite])
def test_what_else_is_wrong(make: Callable[[Case], Way]) -> None:
    found = Reference(case()).hold(make(case()), "fp32")
    assert not found.right
    assert found.sentence()


def test_graphs_start_where_the_networks_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up before a capture trains; parameters and Adam's state must be as before it."""

    def graphs(runs: Any, device: torch.device) -> list[Any]:
        for _ in range(3):
            runs[0]()
        return [SimpleNamespace(replay=run) for run in runs]

    monkeypatch.setattr(variants, "_graphs", graphs)
    reset, of = variants._reset, case()

    def graphed() -> Way:
        way = by_hand(of, Form(fused=True))
        return variants._as_graph(way, way.keep, of)

    assert Reference(of).hold(graphed(), "fp32").right
    monkeypatch.setattr(variants, "_reset", lambda *args: None)
    assert not Reference(of).hold(graphed(), "fp32").right
    assert reset is not variants._reset


def test_what_the_loop_does_not_do_is_a_reason() -> None:
    for more, reason in (
        ({"ema": fastgan.EMA(halflife_kimg=1.0)}, "half-life"),
        ({"g_optimizer": fastgan.Adam(schedule=fastgan.Schedule("linear", 10))}, "g_optimizer has a schedule"),
    ):
        of = Case(Workload("own", "", partial(wgan_gp, **more)), 8, CPU)
        with pytest.raises(Unable, match=reason):
            eager(of)
        assert Reference(of).hold(by_engine(of), "fp32").right  # held to the engine's plainest path


# ---- a result


def measured(ways: Mapping[str, Any], kind: str = "wgan-gp", **settings: Any) -> dict[str, Any]:
    found = Measurement(case(kind), Settings(4, 2.0, ways, **settings)).run()
    compared_with(CEILINGS, found["variants"].values())
    return found


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    def breaks(of: Case) -> Way:
        raise RuntimeError("no such\n\n  form")

    ways = {"eager": eager, "eager again": eager, "broken": penalty_dropped, "breaks": breaks,
            "CUDA graph": VARIANTS["CUDA graph"], "fastgan": by_engine}  # fmt: skip
    found = measured(ways)
    return {
        "schema": compare.SCHEMA, "created": "2026-01-01T00:00:00+00:00", "command": "fastgan bench",
        "conditions": {"device_name": "a CPU", "torch_threads": 1, "torch": torch.__version__, "load_before": None},
        "ceilings": CEILINGS, "results": [found],
    }  # fmt: skip


def test_a_wrong_variant_has_no_speed(result: dict[str, Any]) -> None:
    (found,) = result["results"]
    rows = found["variants"]
    assert [rows[name]["status"] for name in rows] == ["ok", "ok", "wrong", "failed", "skipped", "ok"]
    for name in ("broken", "breaks", "CUDA graph"):
        assert not rows[name].keys() & TIMED
    assert rows["breaks"]["reason"] == "RuntimeError: form"
    assert rows["broken"]["error"] > rows["broken"]["error_limit"]
    assert found["best_competitor"] == "eager"
    text = whole_table(result)
    assert re.search(r"broken +WRONG: its gradients are", text)
    assert "CUDA graphs need a CUDA device" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_penalty_whose_cost_is_not_known() -> None:
    def only_with_penalty(of: Case) -> Way:
        if not of.penalised:
            raise RuntimeError("no such form")
        return by_hand(of)

    said: list[str] = []
    found = measured({"eager": eager, "fastgan": only_with_penalty}, say=said.append)
    rows = found["variants"]
    assert rows["fastgan"]["median_us"] > 0
    assert rows["fastgan"]["penalty_overhead"] is None
    assert rows["eager"]["penalty_overhead"] > 0
    assert "fastgan: its penalty's cost is not known: RuntimeError: no such form" in said


def test_the_figures_agree_with_each_other(result: dict[str, Any]) -> None:
    (found,) = result["results"]
    assert found["images_per_iteration"] == 16
    assert found["noise"] >= abs(found["variants"]["eager again"]["eager_over_this"] - 1)
    for name in ("eager", "fastgan"):
        row = found["variants"][name]
        assert row["iterations_per_second"] == pytest.approx(1e6 / row["median_us"])
        assert row["seconds_per_kimg"] == pytest.approx(row["median_us"] / 1e6 / 16 * 1e3)
        assert row["tflop_per_s"] == pytest.approx(row["gflop"] / row["median_us"] * 1e3)
        assert row["gb_per_s"] == pytest.approx(row["gb"] / row["median_us"] * 1e6)
        assert row["share_of_matrix_rate"] == pytest.approx(row["tflop_per_s"] / 0.2)
        assert row["share_of_bandwidth"] == pytest.approx(row["gb_per_s"] / 20)
        assert row["peak_bytes"] > 0
        assert row["joule_per_kimg"] is None
        assert sum(row["time_split_us"].values()) == pytest.approx(row["median_us"])
        assert row["penalty_overhead"] > 0
    rows = found["variants"]
    assert rows["eager"]["eager_over_this"] == 1.0
    assert rows["eager"]["launches"] > rows["fastgan"]["launches"] > 10


def test_the_schema_is_documented(result: dict[str, Any]) -> None:
    page = Path(__file__).parents[1] / "bench" / "README.md"
    if not page.is_file():
        pytest.skip("the benchmarks are not part of the wheel")
    documented = set(re.findall(r"^\| `([a-z0-9_]+)`", page.read_text(), re.MULTILINE))
    (found,) = result["results"]
    row = found["variants"]["fastgan"]
    assert set(row) == {"status", "reason", "precision", "error", "error_limit", *TIMED}
    assert documented >= {*result, *found, *row}
    assert compare.SCHEMA in page.read_text()


def test_operations_are_counted() -> None:
    """Of the plain pair without penalty: 6 products of the discriminator's layers, less the first's two, and so on."""
    of = Case(Workload("plain", "", lambda: {**pair(), "latent": 4, "ema": None}), 8, CPU)
    g, d = 4 * 16 + 16 * 6, 6 * 16 + 16 * 8 + 8
    discriminator = 8 * (6 * d - 2 * 6 * 16) + 8 * g
    generator = 8 * (3 * g - 4 * 16) + 8 * 2 * d
    way = by_engine(of)
    way.run()
    cost = way.cost()
    assert cost is not None
    outer = 3 * 8 * 8  # the last layer's part of a chain is no product
    assert cost.flops == 2 * (discriminator + generator - outer)
    assert cost.products + cost.convolutions > 10
    thrown_away = 8 * d  # by hand, the discriminator's gradients in the generator's update
    assert by_hand(of).cost().flops == 2 * (discriminator + generator + thrown_away)  # type: ignore[union-attr]


def test_a_plan_costs_the_same_however_it_is_counted() -> None:
    engine = case().engine()
    engine.step(torch.rand(16, 6))
    before = copy.deepcopy(engine.metrics())
    found = costs.of_iteration(engine, lambda: None)
    arenas = (2 * engine._d.arena.grad.nbytes * 7, engine._g.arena.grad.nbytes * 9)  # type: ignore[union-attr]
    assert (found.launches, found.flops, found.bytes) == (0, 0, sum(arenas))
    assert engine.metrics() == before


def test_memory_is_what_lives_at_once() -> None:
    n = 1 << 20
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept[:] = [torch.empty(n, dtype=torch.uint8)]  # in the place of one from before
        torch.empty(3 * n, dtype=torch.uint8)
        torch.empty(2 * n, dtype=torch.uint8)

    run()
    assert transient(run) in range(3 * n, 3 * n + 4096)
    held = Held(CPU)
    more = torch.empty(5 * n, dtype=torch.uint8)
    assert held.peak(run) in range(8 * n, 8 * n + 65536)
    assert len(more) == 5 * n


def test_wrappers_of_torch_func_have_no_memory_of_their_own() -> None:
    found = []

    def within(x: torch.Tensor) -> torch.Tensor:
        found.append(Held(CPU).peak(lambda: torch.empty(1 << 20, dtype=torch.uint8)))
        return x.sum()

    torch.func.grad(within)(torch.ones(3))
    assert found[0] in range(1 << 20, (1 << 20) + 65536)


def test_ratios_and_their_noise() -> None:
    assert ratio([2.0] * 10, [1.0] * 10) == (2.0, 0.0)
    drifting = [1.0 + 0.1 * i for i in range(10)]
    assert ratio([2 * t for t in drifting], drifting) == pytest.approx((2.0, 0.0))  # both drift alike
    generator = torch.Generator().manual_seed(0)
    for n in (25, 100):  # of many runs, nearly all lie within the noise that they print
        runs = [ratio((1 + 0.1 * torch.randn(n, generator=generator)).tolist(), [0.5] * n) for _ in range(400)]
        inside = sum(abs(whole / 2 - 1) <= noise for whole, noise in runs) / len(runs)
        assert 0.96 < inside < 1.0
        assert sum(noise for _, noise in runs) / len(runs) == pytest.approx(2.5 * 1.2533 * 0.1 / n**0.5, rel=0.1)
    assert quantiles([3.0, 1.0, 2.0])["median_us"] == 2.0


# ---- comparison


def changed(result: dict[str, Any], **row: Any) -> dict[str, Any]:
    other = copy.deepcopy(result)
    for r in (other, result):
        r["results"][0]["variants"]["fastgan"]["noise"] = 0.05
        r["results"][0]["variants"]["eager again"]["eager_over_this"] = 1.01
    other["results"][0]["variants"]["fastgan"] |= row
    return other


def test_comparisons(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = changed(result)
    ratio_now = old["results"][0]["variants"]["fastgan"]["eager_over_this"]
    for name, new, code, says in (
        ("same", changed(result, eager_over_this=ratio_now * 0.95), 0, "same"),
        ("slower", changed(result, eager_over_this=ratio_now * 0.85), 1, "slower"),
        ("skipped", changed(result, status="skipped", reason="it is"), 1, "skipped"),
        ("faster", changed(result, eager_over_this=ratio_now * 1.2), 0, "faster"),
        ("machine", changed(result, median_us=1e9), 0, "same"),  # eager has slowed down as much
        ("wrong", changed(result, status="wrong", reason="it is"), 1, "wrong"),
    ):
        paths = [tmp_path / f"{part}.json" for part in ("old", name)]
        for path, content in zip(paths, (old, new), strict=True):
            path.write_text(command.as_json(content))
        assert main(["bench", "--compare", *map(str, paths)]) == code, name
        out = capsys.readouterr().out
        line = next(line for line in out.splitlines() if line.startswith("fastgan"))
        assert line.endswith(says)
        assert out.splitlines()[-1] == ("1 regressions beyond noise" if code else "no regression beyond noise")
    gone = copy.deepcopy(old)
    gone["results"] = []
    assert any(c.regression for c in compare.compare(old, gone))
    assert not any(c.regression for c in compare.compare(gone, old))


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("{", "is no JSON"), ("[]", "schema is 'list'"), ('{"schema": "x"}', "schema is 'x'")],
)
def test_a_comparison_of_something_else(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "--compare", str(path), str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert says in err
    assert len(err.splitlines()) == 1


# ---- the command

OWN = '''
"""A workload of one's own."""
from torch import nn
import fastgan

def pair():
    """A pair of one's own."""
    g = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6), nn.Tanh())
    d = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    return {"generator": g, "discriminator": d, "latent": 4, "penalties": (fastgan.penalties.R1(1.0),)}

def misspelt():
    return pair() | {"n_crtic": 2}

def nothing():
    return None

def raises():
    1 / 0

number = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_networks.py").write_text(OWN)
    yield "my_networks"
    sys.modules.pop("my_networks", None)


def test_a_workload_of_ones_own(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "--workload", f"{own}:pair", "--batch", "8,16", "--variant", "eager,fastgan", "--rounds", "3"]
    code = main([*asked, "--seconds", "0.2", "--json", "out.json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert f"bench: {own}:pair, batch 16: timed" in said.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["schema"] == compare.SCHEMA
    assert [(r["workload"], r["batch"]) for r in found["results"]] == [(f"{own}:pair", 8), (f"{own}:pair", 16)]
    assert found["results"][0]["about"] == "A pair of one's own."
    assert [*found["results"][0]["variants"]] == ["eager", "fastgan"]
    assert found["conditions"]["torch_threads"] == torch.get_num_threads()
    assert "fastgan is" in said.out


def test_each_variant_in_a_process_of_its_own(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "--workload", f"{own}:pair", "--batch", "8", "--variant", "eager,fastgan", "--rounds", "3"]
    code = main([*asked, "--seconds", "0.2", "--json", "-", "--isolate", "--quiet"])
    said = capsys.readouterr()
    assert code == 0, said.err
    found = json.loads(said.out)
    assert "process of its own" in found["conditions"]["timing"]
    rows = found["results"][0]["variants"]
    over = rows["eager"]["median_us"] / rows["fastgan"]["median_us"]
    assert rows["fastgan"]["eager_over_this"] == pytest.approx(over)
    assert found["results"][0]["noise"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workload", "wgan-gp-mpl"], "'wgan-gp-mpl'; did you mean 'wgan-gp-mlp'?"),
        (["--workload", "no_such_module:pair"], "cannot import 'no_such_module'"),
        (["--workload", "my_networks:par"], "'par' in 'my_networks' is nothing, expected a function"),
        (["--workload", "my_networks:number"], "is a int, expected a function"),
        (["--workload", "my_networks:nothing"], "gave a NoneType, expected a dict"),
        (["--workload", "my_networks:misspelt"], "'n_crtic'; did you mean 'n_critic'?"),
        (["--workload", "toy", "--batch", "64,x"], "--batch: '64,x', expected whole numbers"),
        (["--workload", "toy", "--batch", "0"], "batch: is 0, expected >= 1"),
        (["--workload", "toy", "--variant", "egaer"], "'egaer'; did you mean 'eager'?"),
        (["--workload", "toy", "--rounds", "1"], "--rounds: 1, expected >= 3"),
        (["--workload", "toy", "--seconds", "0"], "--seconds: 0.0, expected > 0"),
        (["--workload", "toy", "--precision", "fp8"], "precision: is 'fp8', expected auto, fp32, tf32, bf16"),
        (["--workload", "toy", "--device", "tpu"], "--device is 'tpu'"),
        (["--workload", "toy", "--json", "nowhere/out.json"], "nowhere/out.json: its folder does not exist"),
        (["--workload", "toy", "--html", "."], ".: is a folder, expected a file"),
        (["--workload", ":f"], "unknown workload ':f'"),
        (["--workload", "my_networks:raises"], "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_mistake_is_one_line(
    own: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main(["bench", *arguments, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert says in err, err
    assert len(err.splitlines()) == 1


def test_what_is_done_is_kept_when_a_run_is_stopped(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Measurement.run

    def stopped(self: Measurement) -> Any:
        if self.case.batch == 16:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(Measurement, "run", stopped)
    asked = ["bench", "--workload", f"{own}:pair", "--batch", "8,16", "--variant", "fastgan", "--rounds", "3"]
    assert main([*asked, "--seconds", "0.1", "--json", "out.json", "--quiet"]) == 130
    assert [r["batch"] for r in json.loads((tmp_path / "out.json").read_text())["results"]] == [8]


def test_nothing_to_time(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "--workload", f"{own}:pair", "--batch", "8", "--variant", "CUDA graph", "--quiet"]
    assert main([*asked, "--json", "out.json"]) == (0 if torch.cuda.is_available() else 1)
    assert main(["bench", "--compare", "out.json", "out.json"]) == 0
    capsys.readouterr()


def test_all_variants_can_be_named() -> None:
    assert command._variants(",".join(VARIANTS)) == VARIANTS


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*WORKLOADS, *VARIANTS])
    assert {*variants.ABOUT} == {*VARIANTS}
    for name in WORKLOADS:
        made = cases([name], [], CPU, "fp32")[0]
        assert made.images == find(name).batch * made.plain.n_critic


def test_objectives_are_the_papers() -> None:
    """The loop's WGAN-GP objective, written out."""
    torch.manual_seed(0)
    d = pair()["discriminator"].double()
    real, fake, alpha = torch.rand(5, 6).double(), torch.rand(5, 6).double(), torch.rand(5).double()
    objective = Objective(fastgan.losses.get("wasserstein"), Phase("discriminator", True, (GradientPenalty(10.0),)))
    x = (alpha[:, None] * real + (1 - alpha[:, None]) * fake).requires_grad_()
    (g,) = torch.autograd.grad(d(x).sum(), x)
    expected = d(fake).mean() - d(real).mean() + 10 * ((g.norm(dim=1) - 1) ** 2).mean()
    from fastgan.benchmark.by_hand import slope, slope_by_func

    for by in (slope, slope_by_func):
        for stacked in (False, True):
            got = replace(objective, stacked=stacked).value(d, by, real, fake, alpha, None)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
