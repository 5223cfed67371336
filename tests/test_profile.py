"""The profiler: phases sum to the iteration, planted waits and slow loaders are found by line and by sentence."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastgan
from fastgan import marks, profiling
from fastgan.cli import main
from fastgan.costs import of_plan
from fastgan.losses import Loss
from fastgan.penalties import R1, GradientPenalty
from fastgan.plan import Plan
from fastgan.profiling import findings, trace
from fastgan.profiling.findings import find
from fastgan.profiling.recorder import Lines, name_of

Tensor = torch.Tensor
HERE = os.path.relpath(__file__)

RESULT = {  # keys, and those of what they hold
    "schema": "", "created": "", "command": "", "conditions": "", "launches_per_iteration": "",
    "run": "what batch n_critic precision iterations images_per_iteration",
    "iteration": "median_us p20_us p80_us iterations_per_second seconds_per_kimg",
    "phases": "phase us share calls gflop gb",
    "operators": "operator us calls",
    "lines": "where source us share phase",
    "synchronisations": "op where source per_iteration",
    "memory": "categories peak_bytes timeline",
    "samples": "interval_s series missing energy_j energy_j_per_kimg",
    "profiler_cost": "share plain_us profiled_us",
    "findings": "title us share evidence advice",
}  # fmt: skip


def engine(critic: nn.Module | None = None, **kwargs: Any) -> fastgan.Engine:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))
    critic = critic or nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    settings: dict[str, Any] = {"latent": 4, "penalties": [GradientPenalty(10.0)], "n_critic": 2, "device": "cpu"}
    return fastgan.Engine(generator, critic, **settings | kwargs)


def feed(n: int = 16, nap_s: float = 0.0) -> Iterator[Tensor]:
    while True:
        time.sleep(nap_s)  # the slow loader
        yield torch.randn(n, 8)


def line_of(text: str) -> str:
    """Where a line of this file is, as results name it."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(text) and "line_of" not in line)
    return f"{HERE}:{number}"


def profiled(e: fastgan.Engine, step: Callable[[], object], iterations: int = 40) -> profiling.Profile:
    with fastgan.profile(e) as p:
        for _ in range(iterations):
            step()
    return p


def titles(result: dict[str, Any]) -> str:
    return "\n".join(f"{f['title']} {f['evidence']} {f['advice']}" for f in result["findings"])


# ---- phases


def test_phases_of_the_closed_form_sum_to_the_iteration() -> None:
    e, batches = engine(), feed()
    p = profiled(e, lambda: e.step(batches))
    result = p.result
    assert set(result) == set(RESULT)
    for key, keys in RESULT.items():
        rows = result[key] if isinstance(result[key], list) else [result[key]]
        assert all(set(row) == set(keys.split()) for row in rows if keys), key
    assert result["schema"] == "fastgan.profile/1"
    phases = {row["phase"]: row for row in result["phases"]}
    assert list(phases) == [name for name in marks.PHASES if name in phases]
    needed = {"data", "copy", "noise", "fakes", "D forward", "chain", "penalty", "sweep", "weight gradient",
              "G forward", "G backward", "optimiser", "host gap"}  # fmt: skip
    assert needed <= set(phases)
    assert "D backward" not in phases
    assert sum(row["share"] for row in phases.values()) == pytest.approx(1)
    total = sum(row["us"] for row in phases.values())
    assert total == pytest.approx(p._timed[0] / p._timed[1] / 1e3)
    assert result["iteration"]["p20_us"] <= result["iteration"]["median_us"] <= result["iteration"]["p80_us"]
    assert result["run"] == {"what": "your loop", "batch": 16, "n_critic": 2, "precision": "fp32", "iterations": 40,
                             "images_per_iteration": 32}  # fmt: skip
    json.dumps(result, allow_nan=False)


def test_flops_are_those_of_the_plans() -> None:
    e, batches = engine(), feed()
    result = profiled(e, lambda: e.step(batches)).result
    counted = 1e9 * sum(row["gflop"] or 0 for row in result["phases"])
    d, g = (e._plans().find(phase, 16) for phase in (e.phases[0], e.phases[-1]))
    assert isinstance(d, Plan)
    assert isinstance(g, Plan)
    fakes = e._plans().fakes(d, 16)
    assert fakes is not None
    assert counted == pytest.approx(2 * (d.program.flops + fakes.program.flops) + g.program.flops)
    launches = 2 * (of_plan(d).launches + of_plan(fakes).launches) + of_plan(g).launches
    assert result["launches_per_iteration"] > launches  # noise, copies and figures besides


def test_phases_through_autograd_and_why() -> None:
    e, batches = engine(closed_form=False), feed()
    p = profiled(e, lambda: e.step(batches))
    phases = {row["phase"]: row for row in p.result["phases"]}
    assert {"data", "fakes", "D forward", "penalty", "D backward", "G forward", "G backward"} <= set(phases)
    assert not {"chain", "sweep", "weight gradient"} & set(phases)
    assert sum(row["us"] for row in phases.values()) == pytest.approx(p._timed[0] / p._timed[1] / 1e3)
    assert "run through autograd" in titles(p.result)
    assert "closed_form is False" in titles(p.result)


def test_updates_by_hand_and_whole_runs_are_iterations() -> None:
    e, batches = engine(), feed()

    def by_hand() -> None:
        for _ in range(2):
            e.d_step(next(batches))
        e.g_step()

    assert profiled(e, by_hand, 30).result["run"]["iterations"] == 30
    assert profiled(e, lambda: e.run(batches, 10), 4).result["run"]["iterations"] == 40
    assert e.iterations == 70


def test_images_are_those_that_were_shown() -> None:
    e = engine()

    def by_hand() -> None:
        for n in (4, 16, 16, 16, 16):  # as n_critic does not say, with a short batch
            e.d_step(torch.randn(n, 8))
        e.g_step()
        e.step(iter([torch.randn(16, 8)] * 2))

    result = profiled(e, by_hand, 20).result
    assert result["run"]["iterations"] == 40
    assert result["run"]["batch"] == 16
    assert result["run"]["images_per_iteration"] == (68 + 32) / 2
    short = [torch.randn(n, 8) for n in (16, 16, 2)]
    e = engine(n_critic=1)
    p = profiled(e, lambda: [e.step(x) for x in short], 10)
    assert p.result["run"]["batch"] == 16
    assert p.result["run"]["images_per_iteration"] == pytest.approx(34 / 3)
    seconds = p._plain[0] / 1e9
    assert p.result["iteration"]["seconds_per_kimg"] == pytest.approx(seconds / (p._plain[2] / 1000))
    assert 2 * p._plain[1] <= p._plain[2] <= 16 * p._plain[1]
    assert p._plain[2] % 2 == 0


def test_a_critic_trained_alone() -> None:
    e, batches = engine(), feed()
    p = profiled(e, lambda: e.d_step(next(batches)), 120)
    assert p.result["run"]["iterations"] == 60
    assert p.result["run"]["images_per_iteration"] == 32
    assert p._plain[2] == 32 * p._plain[1]
    with fastgan.profile(e) as p:  # before the generator has its turn
        for _ in range(60):
            e.d_step(next(batches))
        for _ in range(20):
            e.step(batches)
    assert p.result["run"]["iterations"] == 30 + 20


def test_a_loop_in_another_thread_is_said_to_be() -> None:
    e, batches = engine(), feed()
    thread = threading.Thread(target=lambda: [e.step(batches) for _ in range(10)])
    with pytest.raises(fastgan.InputError, match="made 0 iterations in the thread that entered it, and others in ano"):
        profiled(e, lambda: (thread.start(), thread.join()), 1)


def test_lazy_penalties_are_covered_by_whole_periods() -> None:
    e, batches = engine(penalties=[R1(1.0, interval=4)], n_critic=1), feed()
    result = profiled(e, lambda: e.step(batches), 60).result
    with_penalty = e._plans().find(e.phases[1], 16)
    assert isinstance(with_penalty, Plan)
    sweeps = sum(
        c[0] for c, part in zip(with_penalty.costs, with_penalty.program.parts, strict=True) if part == "sweep"
    )
    (sweep,) = (row for row in result["phases"] if row["phase"] == "sweep")
    assert sweep["gflop"] == pytest.approx(sweeps / 4 / 1e9)


def test_another_engine_is_the_users_loop() -> None:
    e, other, batches = engine(), engine(), feed()

    def step() -> None:
        e.step(batches)
        other.step(batches)

    result = profiled(e, step, 30).result
    assert result["run"]["iterations"] == 30
    shares = {row["phase"]: row["share"] for row in result["phases"]}
    assert shares["your loop"] > 0.2


def test_a_phase_of_the_users_own_is_other() -> None:
    e, batches = engine(), feed()

    def step() -> None:
        e.step(batches)
        with marks.mark("augmentation"):
            time.sleep(0.005)

    phases = {row["phase"]: row["share"] for row in profiled(e, step, 20).result["phases"]}
    assert sum(phases.values()) == pytest.approx(1)
    assert phases["other"] > 0.3


# ---- what is planted is found


class Reads(nn.Module):
    """A critic that reads a value back in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.seen = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        self.seen = out.detach().mean().item()  # in the network
        return out


def test_a_value_read_in_the_network_is_found() -> None:
    e, batches = engine(Reads()), feed()
    result = profiled(e, lambda: e.step(batches)).result
    (found,) = result["synchronisations"]
    assert found["op"] == "aten::_local_scalar_dense"
    assert found["where"] == line_of("# in the network")
    assert found["source"].startswith("self.seen = out.detach().mean().item()")
    assert found["per_iteration"] == 2 * 3 + 1  # real, fake and interpolated samples; the generator's update
    assert "Values are read back 7 times in each iteration: a GPU would be waited for" in titles(result)
    assert found["where"] in titles(result)


def test_a_value_read_in_the_loss_and_in_the_loop_is_found() -> None:
    def loss(real: Tensor, fake: Tensor) -> Tensor:
        bool(real.detach().mean() > 0)  # in the loss
        return fake - real

    own = Loss("own", loss, lambda fake, real: -fake)
    e, batches = engine(loss=own), feed()

    def step() -> None:
        e.step(batches)
        float(e.discriminator[0].weight.detach().sum())  # in the loop

    result = profiled(e, step).result
    found = {row["where"]: row["per_iteration"] for row in result["synchronisations"]}
    assert found == {line_of("# in the loss"): 2, line_of("# in the loop"): 1}


def test_figures_read_in_each_iteration_are_found() -> None:
    e, batches = engine(), feed()

    def step() -> None:
        e.step(batches)
        e.metrics()  # each time

    result = profiled(e, step).result
    assert [(row["op"], row["where"]) for row in result["synchronisations"]] == [
        ("engine.metrics()", line_of("# each time"))
    ]
    assert "The engine's figures are read back once in each iteration" in titles(result)


def waits_for_data(result: dict[str, Any], where: str) -> None:
    shares = {row["phase"]: row["share"] for row in result["phases"]}
    assert shares["data"] > 0.5
    first = result["findings"][0]
    assert first["title"].endswith("of the time training waits for data.")
    assert where in first["evidence"]
    assert "workers" in first["advice"]
    assert "device=" not in first["advice"]  # which is for GPUs
    assert result["lines"][0]["where"] == where
    assert result["lines"][0]["phase"] == "data"


def test_a_slow_feed_is_found() -> None:
    e, batches = engine(), feed(nap_s=0.01)
    waits_for_data(profiled(e, lambda: e.step(batches), 25).result, line_of("# the slow loader"))


class Slow(Dataset[Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Tensor:
        time.sleep(0.002)  # a slow sample
        return torch.full((8,), torch.ones(1).item())  # of the host, where it waits for nothing


def test_a_slow_data_loader_is_found() -> None:
    e = engine(n_critic=1)
    loader = DataLoader(Slow(), batch_size=8)
    with fastgan.profile(e) as p:
        for _ in range(4):
            for batch in loader:
                e.step(batch)
    waits_for_data(p.result, line_of("# a slow sample"))
    assert p.result["synchronisations"] == []


def test_a_slow_loop_is_found() -> None:
    e, batches = engine(), feed()

    def step() -> None:
        e.step(batches)
        time.sleep(0.01)  # in between

    result = profiled(e, step, 25).result
    assert result["findings"][0]["title"].endswith("of the time your own loop runs.")
    assert line_of("# in between") in result["findings"][0]["evidence"]


# ---- it changes nothing


@pytest.mark.parametrize("closed_form", [True, False])
def test_no_number_changes(closed_form: bool) -> None:
    plain, seen = (
        engine(closed_form=closed_form, penalties=[GradientPenalty(10.0), R1(1.0, interval=2)]) for _ in "ab"
    )
    batches = [torch.randn(32, 8) for _ in range(30)]
    for x in batches:
        plain.step(x)
    with fastgan.profile(seen):
        for x in batches:
            seen.step(x)
    a, b = plain.state_dict(), seen.state_dict()
    for network in ("generator", "discriminator", "generator_ema"):
        assert all(torch.equal(a[network][k], b[network][k]) for k in a[network])
    assert a["counters"] == b["counters"]
    assert plain.history() == seen.history()


def fails_after(profiler: profiling.Profile, iterations: int, step: Callable[[], object]) -> None:
    with profiler:
        for _ in range(iterations):
            step()
        raise RuntimeError("of the loop")


def test_errors_pass_and_nothing_stays() -> None:
    e, batches = engine(), feed()
    profiler = fastgan.profile(e)
    for least in (0, 4, 7, 20):
        with pytest.raises(RuntimeError, match="of the loop"):
            fails_after(profiler, least, lambda: e.step(batches))
        assert (marks.listener, marks.outermost) == (None, None)
        with pytest.raises(fastgan.InputError, match="no result before the loop has ended"):
            print(profiler.result)
    failing = iter([torch.randn(16, 8)])
    with pytest.raises(fastgan.InputError, match="the feed ended"), profiler:
        e.step(failing)
    assert profiled(e, lambda: e.step(batches), 30).result["run"]["iterations"] == 30


def test_one_at_a_time_and_enough_iterations() -> None:
    e, batches = engine(), feed()
    with pytest.raises(fastgan.InputError, match="profile: the loop made 3 iterations, expected at least 7"):
        profiled(e, lambda: e.step(batches), 3)
    with pytest.raises(fastgan.InputError, match="another profile is running"), fastgan.profile(e), fastgan.profile(e):
        pass
    assert marks.listener is None
    with pytest.raises(fastgan.InputError, match="profile: got a Linear, expected a"):
        fastgan.profile(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(fastgan.InputError, match="interval_s is 0"):
        fastgan.profile(e, interval_s=0)
    p = fastgan.profile(e)
    with p:
        for _ in range(p.least):
            e.step(batches)
    assert p.result["run"]["iterations"] == 7
    assert p.result["operators"] == []


def test_plain_blocks_hear_only_the_ends_of_iterations() -> None:
    e, batches = engine(), feed()
    heard: dict[bool, set[str]] = {False: set(), True: set()}
    p = fastgan.profile(e)
    with p:
        for _ in range(40):
            plain = marks.listener is None
            assert plain == (p._recorder.level == "off") == (marks.outermost is p._recorder)
            heard[plain].add(type(marks.mark("data")).__name__)
            e.step(batches)
    assert heard == {True: {"nullcontext"}, False: {"_Range"}}
    assert (marks.listener, marks.outermost) == (None, None)
    assert "relative to iterations of the same loop in which only their ends are noted" in str(p)


def test_a_mark_without_a_listener_is_nothing() -> None:
    assert marks.mark("data") is marks.mark("copy")
    assert fastgan.Engine.step.__name__ == "step"


def test_looking_at_the_stack_keeps_nothing() -> None:
    lines = Lines(SimpleNamespace(thread=threading.get_ident(), phase="data"))  # type: ignore[arg-type]

    def work() -> weakref.ref[Tensor]:
        x = torch.ones(3)
        end = time.monotonic() + 20
        while not lines.seconds:
            assert time.monotonic() < end
        lines._active.clear()
        time.sleep(0.05)  # the last look is over
        return weakref.ref(x)

    with lines, lines.looking():
        assert work()() is None


# ---- what is written


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e, batches = engine(), feed()
    p = profiled(e, lambda: e.step(batches))
    p.write(json=tmp_path / "a.json", trace=tmp_path / "a.trace.json")
    assert json.loads((tmp_path / "a.json").read_text()) == p.result
    events = json.loads((tmp_path / "a.trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in trace.spans(events, "user_annotation")]
    assert names.count("optimiser") == 3 * 3  # three iterations of two updates and one
    assert {"D forward", "chain", "sweep", "G backward", "data"} <= set(names)
    with pytest.raises(fastgan.InputError, match="cannot be written: No such file"):
        p.write(json=tmp_path / "nowhere" / "a.json")
    text = str(p)
    assert "weight gradient" in text
    assert "memory: parameters" in text
    assert f"profiler: {p.result['profiler_cost']['share']:+.1%}" in text


def test_the_page_is_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastgan.report", SimpleNamespace(profile_page=lambda result: result["schema"]))
    e, batches = engine(), feed()
    profiled(e, lambda: e.step(batches), 10).write(html=tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == profiling.SCHEMA


def test_operators_and_memory() -> None:
    e, batches = engine(), feed()
    result = profiled(e, lambda: e.step(batches)).result
    operators = {row["operator"]: row for row in result["operators"]}
    assert 0 < len(operators) <= 20
    assert not set(operators) & set(marks.PHASES)
    us = [row["us"] for row in result["operators"]]
    assert us == sorted(us, reverse=True)
    assert sum(us) <= 1e6 / result["iteration"]["iterations_per_second"] * 1.01
    memory = {row["category"]: row["bytes"] for row in result["memory"]["categories"]}
    assert e._d.arena is not None
    assert e._g is not None
    assert e._g.arena is not None
    elements = 4 * (e._d.arena.size + e._g.arena.size)
    assert memory["parameters"] == memory["gradients"] == elements
    assert memory["moments"] == 2 * elements
    assert memory["average"] == 4 * e._g.arena.size
    assert memory["activations of plans"] > 0
    assert result["memory"]["peak_bytes"] > 10e6


def test_autograd_holds_activations() -> None:
    e = engine(
        nn.Sequential(nn.Linear(8, 4096), nn.LeakyReLU(0.2), nn.Linear(4096, 1)), closed_form=False, penalties=()
    )
    batches = feed(256)
    result = profiled(e, lambda: e.step(batches), 10).result
    memory = {row["category"]: row["bytes"] for row in result["memory"]["categories"]}
    assert memory["temporaries"] > 2 * 4 * 256 * 4096  # real and fake samples' hidden values at the least


def test_energy_is_that_of_the_blocks_which_are_timed() -> None:
    e, batches = engine(), feed()
    p = profiled(e, lambda: e.step(batches), 200)
    begin, end = p._span
    assert p._sampler.begin < begin < end < p._sampler._end
    assert 0 < p._span_images <= p._shown - 32 * (p.least + 3)
    p._sampler._series["power_w"] = [[0.0, 200.0], [p._sampler._end - p._sampler.begin, 200.0]]
    samples = p._make()["samples"]
    assert samples["energy_j"] == pytest.approx(200 * (end - begin))
    assert samples["energy_j_per_kimg"] == pytest.approx(200 * (end - begin) / (p._span_images / 1000))


# ---- the labels


@pytest.mark.parametrize("kernels", [False, True])
def test_each_call_of_a_plan_has_a_phase(kernels: bool) -> None:
    backend: Any = "triton" if kernels else "reference"
    for penalties in ([], [GradientPenalty(10.0)], [R1(1.0)]):
        e = engine(penalties=penalties, backend=backend, n_critic=1)
        for phase in e.phases:
            e._plans().refresh()
            plan = e._plans().find(phase, 16)
            assert isinstance(plan, Plan)
            assert len(plan.phases) == len(plan.calls) == len(plan.costs)
            assert set(plan.phases) <= set(marks.PHASES)
            expected = {"G forward", "G backward"} if phase.player == "generator" else {"D forward", "weight gradient"}
            assert expected <= set(plan.phases)
            assert ("sweep" in plan.phases) == bool(penalties and phase.player == "discriminator")
        if kernels:
            (iteration,) = e._lay_out(16, [(tuple(e._due()),)])
            assert len(iteration.phases) == len(iteration.calls) == len(iteration.costs)
            assert {"noise", "fakes", "weight gradient", "optimiser", "G backward"} <= set(iteration.phases)


# ---- findings on made-up results


def made_up(**shares: float) -> dict[str, Any]:
    """An iteration of 1 ms."""
    names = {name.replace("_", " "): share for name, share in shares.items()}
    names["host gap"] = 1 - sum(names.values())
    return {
        "run": {"batch": 64}, "iteration": {"median_us": 1000.0}, "lines": [], "synchronisations": [],
        "phases": [{"phase": name, "us": 1000 * share, "share": share} for name, share in names.items()],
        "launches_per_iteration": 10.0, "memory": {"categories": [], "peak_bytes": 0},
    }  # fmt: skip


ABOUT = {
    "device": "cpu", "autograd": {}, "why_updates": None, "why_unrecorded": None, "optimisers": {}, "threads": 2,
    "cores": 2, "memory_limit": 1000, "resident": False, "op_us": 1.0, "recorded": False, "kernels_seen": False,
}  # fmt: skip
CUDA = {**ABOUT, "device": "cuda", "kernels_seen": True}


def test_nothing_stands_out() -> None:
    result = made_up(G_forward=0.45, D_forward=0.45)
    assert find(result, ABOUT) == []


@pytest.mark.parametrize(
    ("rule", "result", "about", "words"),
    [
        (findings.waits_for_data, made_up(data=0.41), CUDA, "41% of the time the GPU waits for data. 410 us device="),
        (findings.waits_for_data, made_up(data=0.41), {**CUDA, "resident": True}, "41% workers"),
        (findings.own_loop, made_up(your_loop=0.2), ABOUT, "20% of the time your own loop runs. 200 us"),
        (findings.through_autograd, made_up(D_forward=0.3, D_backward=0.3),
         {**ABOUT, "autograd": {"discriminator": "layer 'x' is odd"}}, "The discriminator runs 60% layer 'x' is odd"),
        (findings.not_recorded, made_up(), {**CUDA, "why_unrecorded": "f.py:3 reads"},
         "not recorded f.py:3 reads idle for 1 ms mathematics does not need it"),
        (findings.not_recorded, made_up(), {**CUDA, "why_updates": "backend"},
         "not one list of kernels backend idle has no kernel"),
        (findings.foreign_optimiser, made_up(optimiser=0.3), {**ABOUT, "optimisers": {"generator": "SGD"}},
         "30% torch's SGD for the generator 300 us"),
        (findings.idle_between_kernels, made_up(G_forward=0.5), CUDA, "idle for 50% 10 launches 500 us"),
        (findings.launch_bound, made_up(G_forward=0.03, D_forward=0.37), {**ABOUT, "op_us": 20.0},
         "batch of 64 is small 10 calls 40 us each 20 us here"),
        (findings.penalty_is_large, made_up(penalty=0.1, sweep=0.2), ABOUT, "takes 30% 300 us interval=k"),
        (findings.threads, made_up(chain=0.5), {**ABOUT, "threads": 8}, "8 threads on 2 cores set_num_threads(2)"),
        (findings.threads, {**made_up(chain=0.5), "iteration": {"median_us": 5000.0}}, {**ABOUT, "threads": 1},
         "1 thread, and 2 cores"),
        (findings.host_gap, made_up(chain=0.5), ABOUT, "50% of the time the interpreter 500 us"),
        (findings.memory_is_full, {**made_up(), "memory": {"categories": [], "peak_bytes": 950}}, ABOUT,
         "nearly full: 95% 950 B of 1000 B"),
    ],
)  # fmt: skip
def test_a_rule_says_what_it_is_about(
    rule: Callable[[Any, Any], Any], result: dict[str, Any], about: dict[str, Any], words: str
) -> None:
    found = rule(result, about)
    text = f"{found['title']} {found['evidence']} {found['advice']}"
    at = 0
    for word in words.split():
        at = text.find(word, at)
        assert at >= 0, (word, text)
    assert set(found) == {"title", "us", "share", "evidence", "advice"}
    assert rule(made_up(D_forward=0.98), {**ABOUT, "device": about["device"]}) is None


def test_a_graph_is_not_bound_by_launches() -> None:
    result, about = made_up(G_forward=0.03, D_forward=0.37), {**CUDA, "op_us": 20.0}
    assert findings.launch_bound(result, about) is not None
    assert findings.launch_bound(result, {**about, "recorded": True}) is None
    e, batches = engine(), feed()
    e.step(batches)
    assert findings.facts(e)["recorded"] is False


def test_an_idle_gpu_is_one_whose_kernels_were_seen() -> None:
    unseen = {**CUDA, "kernels_seen": False}
    assert findings.idle_between_kernels(made_up(), CUDA) is not None
    assert findings.idle_between_kernels(made_up(), unseen) is None
    (found,) = find(made_up(), {**unseen, "why_updates": "x is odd"})
    assert "idle" not in found["evidence"]


def test_findings_are_in_the_order_of_their_costs() -> None:
    result = made_up(data=0.2, your_loop=0.3, penalty=0.25)
    assert [round(f["share"], 2) for f in find(result, ABOUT)] == [0.3, 0.25, 0.25, 0.2]


# ---- traces, made up as a GPU would write them


def span(cat: str, name: str, ts: float, dur: float, correlation: int | None = None, tid: int = 1) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_kernels_belong_to_the_range_in_which_they_were_launched() -> None:
    events = [
        span("user_annotation", "D forward", 0, 50), span("user_annotation", "penalty", 10, 10),
        span("cuda_runtime", "cudaLaunchKernel", 5, 1, 1), span("cuda_runtime", "cudaLaunchKernel", 15, 1, 2, tid=9),
        span("cuda_runtime", "cudaLaunchKernel", 30, 1, 3), span("cuda_runtime", "cudaMemcpyAsync", 60, 1, 4),
        span("kernel", "a", 100, 10, 1), span("kernel", "b", 105, 10, 2), span("kernel", "c", 130, 5, 3),
        span("gpu_memcpy", "d", 140, 1, 4), span("user_annotation", "not a phase", 0, 200),
    ]  # fmt: skip
    found = trace.on_device(events, marks.PHASES, [])
    assert found.by_phase == {"D forward": (15, 2), "penalty": (10, 1), "other": (1, 1)}
    assert found.launches == 4
    assert found.busy_us == 15 + 5 + 1


def test_kernels_of_a_graph_belong_to_the_launches_in_their_order() -> None:
    kernels = [span("kernel", f"k{i}", 100 + 10 * i, i + 1, 7) for i in (2, 0, 3, 1)]
    events = [span("cuda_runtime", "cudaGraphLaunch", 0, 5, 7), *kernels]
    found = trace.on_device(events, marks.PHASES, [["data"], ["chain", "sweep"] * 2])
    assert found.by_phase == {"chain": (1 + 3, 2), "sweep": (2 + 4, 2)}
    found = trace.on_device(events, marks.PHASES, [["chain", "sweep", "data"]])
    assert found.by_phase == {"graph replay": (10, 4)}


def test_a_gpus_phases_are_its_kernels_and_what_the_host_did_while_it_was_idle() -> None:
    e, batches = engine(), feed()
    p = profiled(e, lambda: e.step(batches), 20)
    iteration = SimpleNamespace(phases=["chain", "optimiser"], costs=[(10**9, 10**6), (0, 0)])
    variant = SimpleNamespace(iterations=[iteration])
    p.engine = SimpleNamespace(  # type: ignore[assignment]
        device=torch.device("cuda"), _executor=SimpleNamespace(variants=[variant]), _d=None, _g=None, n_critic=1
    )
    p._recorder.costs.clear()
    p._traced, p._timed, p._times = 2, [0, 10], defaultdict(int, {"data": 10 * 20_000, "chain": 10 * 90_000})
    p._lines.seconds.clear()
    events = [
        event
        for i in (1, 2)
        for event in (
            span("cuda_runtime", "cudaGraphLaunch", 1000 * i, 5, i),
            span("kernel", "a", 1000 * i + 10, 30, i), span("kernel", "b", 1000 * i + 40, 10, i),
        )
    ]  # fmt: skip
    phases, launches = p._phases(events, 100.0)
    assert launches == 2
    assert [(row["phase"], row["us"], row["gflop"]) for row in phases] == [
        ("data", 20, None), ("chain", 30, 1), ("optimiser", 10, None), ("host gap", 40, None)
    ]  # fmt: skip
    assert sum(row["share"] for row in phases) == pytest.approx(1)
    assert p._kernels_seen
    phases, _ = p._phases([e for e in events if e["cat"] != "kernel"], 100.0)  # as where CUPTI is not permitted
    assert [(row["phase"], row["us"]) for row in phases] == [("data", 20), ("chain", 90), ("host gap", 0)]
    assert not p._kernels_seen


@pytest.mark.interpreted
def test_lists_of_kernels_are_profiled_by_phase() -> None:
    e, batches = engine(backend="triton", n_critic=1), feed(16)
    result = profiled(e, lambda: e.step(batches), fastgan.profile(e).least).result
    phases = {row["phase"]: row for row in result["phases"]}
    assert {"data", "copy", "noise", "fakes", "D forward", "weight gradient", "G backward", "optimiser"} <= set(phases)
    (variant,) = e._executor.variants if e._executor is not None else []
    calls = sum(row["calls"] for name, row in phases.items() if name not in ("data", "copy"))
    assert calls == len(variant.iterations[0].calls)


def test_idle_time_is_split_by_what_the_host_did() -> None:
    assert trace.split_idle(100, 60, {"data": 30, "your loop": 30}) == {"data": 30, "your loop": 10, "host gap": 0}
    assert trace.split_idle(100, 60, {"data": 10}) == {"data": 10, "host gap": 30}
    assert trace.split_idle(100, 120, {"data": 10}) == {"data": 0, "host gap": 0}


def test_operators_have_their_own_time() -> None:
    events = [
        span("user_annotation", "chain", 0, 100), span("cpu_op", "aten::matmul", 10, 50),
        span("cpu_op", "aten::mm", 20, 30), span("cpu_op", "aten::mm", 70, 10),
        span("cpu_op", "aten::mm", 20, 5, tid=2),
    ]  # fmt: skip
    assert trace.operators(events, marks.PHASES) == [("aten::mm", 45, 3), ("aten::matmul", 20, 1)]


def test_the_peak_is_of_what_is_held_at_once() -> None:
    def memory(rows: list[tuple[int, int]], device: int) -> list[dict[str, Any]]:
        return [
            {"ph": "i", "name": "[memory]", "ts": i, "args": {"Bytes": n, "Addr": at, "Device Type": device}}
            for i, (n, at) in enumerate(rows)
        ]

    before = [(-500, 9), (-70, 8)]
    events = memory([*before, (100, 1), (50, 2), (-100, 1), (-900, 7), (30, 1), (-50, 2), (-30, 1)], 0)
    events += memory([(1000, 1), (-1000, 1), (-10, 2), (2000, 2)], 1)
    assert trace.peak_of_temporaries(reversed(events)) == 150
    assert trace.peak_of_temporaries(events, on_gpu=True) == 2000


def test_calls_have_names() -> None:
    assert name_of(torch.zeros(1).neg_) == "fastgan::neg"
    assert name_of(marks.mark) == "fastgan::mark"


# ---- the command


SMALL = ["--quiet", "--device", "cpu", "--batch", "10", "--set", "generator.widths=[8]", "--set",
         "discriminator.widths=[8]"]  # fmt: skip


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"p.{name}" for name in ("json", "trace")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main(["profile", "--iterations", "30", "--loss", "hinge", *SMALL, *options]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("recipe wgan-gp: batch 10, 5 discriminator updates per iteration, fp32")
    assert err == ""
    result = json.loads(files["json"].read_text())
    assert result["run"]["iterations"] == 30
    assert result["run"]["images_per_iteration"] == 50
    assert all(line["where"].startswith(HERE) is False for line in result["lines"])
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert sorted(os.listdir(tmp_path)) == ["p.json", "p.trace"]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--iterations", "10", "--json", "-", *SMALL]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["what"] == "recipe wgan-gp"


def test_the_text_comes_before_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgan.pictures.write_whole", full)
    assert main(["profile", "--iterations", "10", "--json", str(tmp_path / "a.json"), *SMALL]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("recipe wgan-gp")
    assert err.endswith("a.json: cannot be written: No space left on device\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--iterations", "3"], "--iterations: 3, expected at least 7"),
        (["--recipe", "nothing"], "nothing"),
        (["--json", "no/where.json"], "--json: no/where.json: its folder does not exist"),
        (["--html", "."], "--html: .: is a folder, expected a file"),
        (["--threads", "0"], "--threads: 0, expected 1"),
        (["--batch", "0"], "batch"),
    ],
)
def test_mistakes_end_in_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *SMALL, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_unknown_options_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["profile", "--iteration", "3"])
    assert e.value.code == 2
    assert "did you mean --iterations?" in capsys.readouterr().err


def test_a_copy_of_an_engine_is_made_as_ever() -> None:
    e, batches = engine(), feed()
    with fastgan.profile(e):
        for _ in range(10):
            e.step(batches)
        twin = copy.deepcopy(e)
    assert twin.iterations == e.iterations == 10
