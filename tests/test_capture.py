"""Iterations as recordings: the same bits as without, whatever an iteration is made of; and what cannot be recorded."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from graph_emulator import Recorder, Recording, natively, on_any_device
from networks import Conditional
from test_graph import CASES, Case, differing, mlp, results, step, user_adam
from torch import nn

import fastgan
import fastgan.engine
from fastgan import Engine
from fastgan.backend import use_backend
from fastgan.data import Dataset
from fastgan.penalties import R1, GradientPenalty

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    on_any_device(monkeypatch)
    natively(monkeypatch)


def with_executor(case: Case, kind: str, **settings: Any) -> Engine:
    return Case(case.networks, case.settings | {"executor": kind} | settings, user=case.user).engine()


def recordings(e: Engine) -> list[Recording]:
    return [v.recording for v in e._executor._variants.values() if v.recording is not None]


def same_steps(case: Case, n: int, **settings: Any) -> Engine:
    """Train without and with recordings: all state has to be equal to the bit."""
    ends, engines = [], []
    for kind in ("eager", "graph"):
        e = with_executor(case, kind, **settings)
        torch.manual_seed(2)
        for i in range(n):
            step(e, case.batch(e, i))
        ends.append(results(e) | {"history": torch.tensor([list(h.values()) for h in e.history()])})
        engines.append(e)
    assert differing(*ends) == []
    return engines[1]


@pytest.mark.parametrize("name", CASES)
def test_recorded_iterations_equal_eager_ones(name: str) -> None:
    case = CASES[name]
    e = same_steps(case, 3 * case.variants)
    if name == "user-sgd":
        (variant,) = e._executor._variants.values()
        assert "SGD" in variant.why_unrecorded
    else:
        assert sum(r.replays for r in recordings(e)) == 3 * case.variants
        assert all(v.recording is not None for v in e._executor.variants)


KERNELS = ["vanilla", "wgan-gp", "lazy", "all-penalties"]


@pytest.mark.parametrize("name", KERNELS)
def test_recorded_launches_equal_launches(name: str) -> None:
    case = CASES[name]
    n = max(2, case.variants)
    e = same_steps(case, n, backend="triton")
    assert sum(r.replays for r in recordings(e)) == n
    assert all(v.iterations for v in e._executor._variants.values())


def test_conditional_pairs_are_recorded() -> None:
    ends = []
    for kind in ("eager", "graph"):
        torch.manual_seed(0)
        g, d = Conditional(4, 6), Conditional(6, 1)
        e = Engine(g, d, latent=4, n_classes=3, device="cpu", executor=kind, penalties=[GradientPenalty()])
        for i in range(3):
            noise = torch.Generator().manual_seed(i)
            e.step(torch.randn(8, 6, generator=noise), torch.randint(3, (8,), generator=noise))
        ends.append(results(e))
    assert differing(*ends) == []
    assert [r.replays for r in recordings(e)] == [3]


class Reads(nn.Module):
    """A user's generator that looks at its numbers on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.inner(z)
        return x / max(x.abs().max().item(), 1.0)


def test_a_network_that_waits_is_named_and_trains(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(lambda: (Reads(), mlp()[1]), paths="ca")
    with caplog.at_level(logging.WARNING):
        e = same_steps(case, 3)
    (variant,) = e._executor._variants.values()
    assert variant.recording is None
    assert "aten::_local_scalar_dense waits for the device, called at" in variant.why_unrecorded
    assert "test_capture.py:" in variant.why_unrecorded
    assert "(return x / max(x.abs().max().item(), 1.0))" in variant.why_unrecorded
    assert variant.why_unrecorded in e.explain()


def test_a_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    e = with_executor(Case(lambda: (Reads(), mlp()[1])), "graph")
    with caplog.at_level(logging.WARNING):
        for rows in (8, 8, 6):
            e.step(torch.randn(rows, 6))
    assert sum("is not recorded" in r.message for r in caplog.records) == 1


def test_a_latent_of_the_users_is_not_recorded() -> None:
    case = Case(settings={"latent": lambda n, generator: torch.randn(n, 4, generator=generator)})
    e = same_steps(case, 2)
    (variant,) = e._executor._variants.values()
    assert "latent is a function of yours" in variant.why_unrecorded


def test_what_no_dispatch_shows_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Recorder, body: Any) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\n" + "m" + "ore")

    monkeypatch.setattr(Recorder, "record", refuse)
    e = same_steps(CASES["vanilla"], 2)
    (variant,) = e._executor._variants.values()
    assert variant.why_unrecorded.startswith("operation not permitted when stream is capturing")
    assert "more" not in variant.why_unrecorded


def test_a_batch_of_another_size_is_another_recording() -> None:
    eager, e = (with_executor(CASES["vanilla"], kind) for kind in ("eager", "graph"))
    for i, rows in enumerate((8, 6, 8, 6)):
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(i))
        for one in (eager, e):
            one.step(x)
    assert differing(results(eager), results(e)) == []
    assert [r.replays for r in recordings(e)] == [2, 2]


def test_a_changed_network_is_recorded_anew() -> None:
    eager, e = (with_executor(CASES["opaque"], kind) for kind in ("eager", "graph"))
    torch.manual_seed(0)
    for one in (eager, e):
        torch.manual_seed(3)
        for i in range(4):
            if i == 2:
                one.discriminator.drop.p = 0.6
                one.discriminator.a.weight.requires_grad_(False)
            one.step(CASES["opaque"].batch(one, i))
    assert differing(results(eager), results(e)) == []
    assert [r.replays for r in recordings(e)] == [2]


def test_a_rate_that_follows_a_schedule_of_the_users_needs_no_new_recording() -> None:
    case = Case(user=lambda p: torch.optim.Adam(p, lr=3e-3, fused=True))
    eager, e = (with_executor(case, kind) for kind in ("eager", "graph"))
    for one in (eager, e):
        for i in range(4):
            one.g_optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
            one.step(case.batch(one, i))
    assert [r.replays for r in recordings(e)] == [4]
    differences = [(a - b).abs().max() for a, b in zip(results(eager).values(), results(e).values(), strict=True)
                   if a.is_floating_point()]  # fmt: skip
    assert max(differences) < 1e-6  # a rate as a tensor is rounded where a number is not


def test_another_setting_of_the_users_optimiser_is_recorded_anew() -> None:
    case = Case(user=user_adam)
    eager, e = (with_executor(case, kind) for kind in ("eager", "graph"))
    for one in (eager, e):
        for i in range(4):
            if i == 2:
                one.d_optimizer.param_groups[0]["weight_decay"] = 0.1
            one.step(case.batch(one, i))
    assert differing(results(eager), results(e)) == []
    assert [r.replays for r in recordings(e)] == [2, 2]


@pytest.mark.parametrize("user", [None, user_adam])
def test_a_restored_state_is_what_recordings_go_on_from(user: Any) -> None:
    eager, e = (with_executor(Case(user=user), kind) for kind in ("eager", "graph"))
    for one in (eager, e):
        reals = [Case().batch(one, i) for i in range(5)]
        one.step(reals[0])
        state = copy.deepcopy(one.state_dict())
        one.step(reals[1])
        one.load_state_dict(state)
        for real in reals[2:]:
            one.step(real)
    assert differing(results(eager), results(e)) == []


def test_recordings_keep_what_they_work_on() -> None:
    """More batch sizes than plans are kept for."""
    eager, e = (with_executor(CASES["mixed"], kind) for kind in ("eager", "graph"))
    sizes = (8, 6, 4, 2, 3)
    for one in (eager, e):
        for i, rows in enumerate(sizes * 2):
            one.step(torch.randn(rows, 6, generator=torch.Generator().manual_seed(i)))
    assert differing(results(eager), results(e)) == []


def test_a_device_with_a_number_is_that_device() -> None:
    eager, e = (with_executor(CASES["vanilla"], kind, device="cpu:0") for kind in ("eager", "graph"))
    for one in (eager, e):
        one.step(CASES["vanilla"].batch(one, 0))
    assert differing(results(eager), results(e)) == []


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.last = nn.Linear(6, 1), 0, torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last.copy_(x.detach().sum())
        return torch.special.erf(self.inner(x))


def test_a_network_that_changes_itself_is_not_recorded_again_and_again() -> None:
    e = with_executor(Case(lambda: (mlp()[0], Counts())), "graph")
    for i in range(4):
        e.step(CASES["vanilla"].batch(e, i))
    (variant,) = e._executor.variants
    assert "changes attributes of its own" in variant.why_unrecorded
    assert e.discriminator.calls < 40


class Breaks(Counts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.calls > 4:
            raise RuntimeError("broken")
        return super().forward(x)


def test_an_error_in_the_warm_up_leaves_the_state_as_it_was() -> None:
    e = with_executor(Case(lambda: (mlp()[0], Breaks())), "graph")
    before, last = results(e), e.discriminator.last.clone()
    with pytest.raises(RuntimeError, match="broken"):
        e.step(CASES["vanilla"].batch(e, 0))
    assert differing(before, results(e)) == []
    assert e.discriminator.last == last


class Synchronises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return torch.special.erf(self.inner(z))


def test_a_synchronisation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    e = with_executor(Case(lambda: (Synchronises(), mlp()[1])), "graph")
    e.step(CASES["vanilla"].batch(e, 0))
    (variant,) = e._executor.variants
    assert variant.why_unrecorded.startswith("torch.cuda.synchronize waits for the device, called at")
    assert "(torch.cuda.synchronize())" in variant.why_unrecorded


def test_the_first_error_of_a_failed_recording_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Recorder, body: Any) -> Recording:
        try:
            raise RuntimeError("operation not permitted")
        finally:
            raise RuntimeError("operation failed due to a previous error")

    monkeypatch.setattr(Recorder, "record", refuse)
    e = same_steps(CASES["vanilla"], 1)
    (variant,) = e._executor.variants
    assert variant.why_unrecorded.startswith("operation not permitted, called at")


def test_more_variants_than_are_kept_run_as_they_are() -> None:
    e = with_executor(CASES["vanilla"], "graph")
    for rows in range(2, 21):
        e.step(torch.randn(rows, 6))
    assert len(recordings(e)) == 16
    assert any("16 variants" in (v.why_unrecorded or "") for v in e._executor._variants.values())


# ---- feeds that lie on the device


def table(n: int = 50) -> Dataset:
    return fastgan.open_dataset(torch.randn(n, 6, generator=torch.Generator().manual_seed(0)).numpy())


def on_feed(kind: str, backend: str, runs: list[int], resident: bool = True, **settings: Any) -> tuple[Engine, Any]:
    torch.manual_seed(0)
    with use_backend(backend):  # of the feed too
        e = Engine(*mlp(), latent=4, device="cpu", executor=kind, backend=backend, **settings)
        feed = table().feed(8, seed=1, device="cpu" if resident else None)
        for n in runs:
            e.run(feed, n)
    return e, feed


@pytest.mark.parametrize("settings", [
    {}, {"n_critic": 2, "loss": "wasserstein", "penalties": [GradientPenalty()]}, {"penalties": [R1(1.0, interval=3)]},
    {"loss": "relativistic"},
], ids=["vanilla", "wgan-gp", "lazy", "relativistic"])  # fmt: skip
def test_runs_of_many_iterations_equal_single_steps(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastgan.engine, "_UNROLLED", 3)
    one, host = on_feed("eager", "reference", [1] * 9, resident=False, **settings)
    many, feed = on_feed("graph", "reference", [2, 7], **settings)
    assert feed.position == host.position == 9 * 8 * one.n_critic
    assert feed.state_dict() == host.state_dict()
    assert differing(results(one), results(many)) == []
    assert one.history() == many.history()
    replays = sum(r.replays for r in recordings(many))
    assert replays < 9  # several iterations are one replay


def test_runs_on_kernels_equal_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastgan.engine, "_UNROLLED", 2)
    settings: dict[str, Any] = {"loss": "wasserstein", "penalties": [GradientPenalty()]}
    one, _ = on_feed("eager", "triton", [1] * 3, **settings)
    many, feed = on_feed("graph", "triton", [3], **settings)
    assert differing(results(one), results(many)) == []
    assert one.history() == many.history()
    calls = next(iter(many._executor._variants.values())).iterations[0].calls
    assert all(hasattr(call, "kernel") for call in calls)  # data is drawn by the launch that draws noise
    next(feed)
    assert feed.position == 4 * 8


def test_history_is_a_ring() -> None:
    e, _ = on_feed("eager", "reference", [70], resident=False)
    history = e.history()
    assert len(history) == 64
    assert history[-1] == {k: v for k, v in e.metrics().items() if k != "skipped_steps"}
    assert not np.isnan(history[0]["d_loss"])


def test_a_copy_records_its_own() -> None:
    e = with_executor(CASES["vanilla"], "graph")
    x = CASES["vanilla"].batch(e, 0)
    e.step(x)
    other = copy.deepcopy(e)
    for one in (e, other):
        one.step(x)
    assert differing(results(e), results(other)) == []
