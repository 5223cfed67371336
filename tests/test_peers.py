"""Peers beside the engine, at sizes that only show that they run: what is checked, timed, wrong and skipped."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

TREE = Path(__file__).parents[1]
if not (TREE / "bench" / "peers").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(TREE))  # where pytest is not started as a module

from bench.peers import LIMIT, Peer, Sides, __main__, difference, line, measure  # noqa: E402
from bench.peers.ctgan import CTGAN  # noqa: E402
from bench.peers.lightning import LIGHTNING  # noqa: E402
from bench.peers.loops import DCGAN, WGAN_GP, Dcgan, WganGp  # noqa: E402
from bench.peers.torchgan import TORCHGAN  # noqa: E402

CPU = torch.device("cpu")
PACKAGED = (CTGAN, LIGHTNING, TORCHGAN)


@pytest.mark.parametrize("peer", [DCGAN, WGAN_GP], ids=lambda peer: peer.name)
def test_a_loop_makes_the_engines_updates(peer: Peer) -> None:
    said = measure(peer, CPU, rounds=2, tiny=True)
    assert said["status"] == "ok", said["reason"]
    assert 0 < said["error"] <= LIMIT
    assert list(said["sides"]) == [peer.name, "fastgan", f"{peer.name} again"]
    for side in said["sides"].values():
        assert side["rounds"] == 2
        assert 0 < side["p20_us"] <= side["median_us"] <= side["p80_us"]
        assert side["seconds_per_kimg"] == pytest.approx(side["median_us"] * 1e-3 / said["images_per_iteration"])
    json.dumps(said)


def test_a_penalty_without_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WganGp.gradient_penalty
    monkeypatch.setattr(WganGp, "gradient_penalty", lambda *args: right(*args).detach())
    said = measure(WGAN_GP, CPU, rounds=1, tiny=True)
    assert said["status"] == "wrong"
    assert said["error"] > 1e3 * LIMIT
    assert "sides" not in said
    assert line("x", said).startswith("x            wrong: parameters differ by ")


def test_a_generator_that_is_not_trained_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(self: Dcgan, *args: Any) -> None:
        made(self, *args)
        self.optimizer_g.step = lambda: None

    made = Dcgan.__init__
    monkeypatch.setattr(Dcgan, "__init__", untrained)
    assert measure(DCGAN, CPU, rounds=1, tiny=True)["status"] == "wrong"


@pytest.mark.parametrize("peer", PACKAGED, ids=lambda peer: peer.name)
def test_without_its_package_a_peer_is_skipped(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, peer.name, None)  # importing it raises ImportError
    said = measure(peer, CPU, rounds=1, tiny=True)
    assert said["status"] == "skipped"
    assert said["reason"].startswith(peer.name)
    assert "sides" not in said


@pytest.mark.parametrize("peer", PACKAGED, ids=lambda peer: peer.name)
def test_a_package_makes_the_engines_updates(peer: Peer) -> None:
    said = measure(peer, CPU, rounds=1, tiny=True)
    if said["status"] == "skipped":
        pytest.skip(said["reason"])
    assert said["status"] == "ok", said["reason"]
    assert 0 <= said["error"] <= LIMIT
    json.dumps(said)


def made_up(us: dict[str, float], error: float = 0.0) -> Peer:
    def prepare(device: torch.device, tiny: bool) -> Sides:
        return Sides(lambda n: us["peer"] * 1e-6, lambda n: us["fastgan"] * 1e-6, error, images=10, iterations=3)

    return Peer("made-up", "nothing", "nothing", prepare)


def test_ratios_and_rates() -> None:
    said = measure(made_up({"peer": 300.0, "fastgan": 100.0}), CPU, rounds=5)
    assert said["peer_over_fastgan"] == pytest.approx(3.0)
    assert said["noise"] == pytest.approx(0.0, abs=1e-12)
    assert said["sides"]["fastgan"]["seconds_per_kimg"] == pytest.approx(0.01)
    assert "3.00 ± 0% x fastgan" in line("made-up", said)


def test_the_noise_is_that_of_the_same_side_twice() -> None:
    found = iter([1.0, 1.0, 1.2] * 4)
    peer = made_up({"peer": 1.0, "fastgan": 1.0})
    twice = replace(peer, prepare=lambda device, tiny: Sides(lambda n: next(found), lambda n: next(found), 0.0, 1, 1))
    assert measure(twice, CPU, rounds=3)["noise"] == pytest.approx(0.2)


def test_a_failure_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(device: torch.device, tiny: bool) -> Sides:
        raise RuntimeError("no such thing\nat all")

    said = measure(replace(WGAN_GP, prepare=prepare), CPU, rounds=1)
    assert (said["status"], said["reason"]) == ("failed", "RuntimeError: no such thing")
    assert "Traceback" in capsys.readouterr().err


def test_difference_is_the_largest() -> None:
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.bias[1] += 0.5
        b.weight[0, 0] += 0.25
    assert difference((a, a), (a, b)) == pytest.approx(0.5)


# ---- the command


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("error", "code"), [(0.0, 0), (1.0, 1), (float("nan"), 1)])
def test_the_command(
    error: float, code: int, threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(__main__.PEERS, "made-up", made_up({"peer": 300.0, "fastgan": 100.0}, error))
    out = tmp_path / "new" / "peers.json"
    args = ["--only", "made-up", "--rounds", "3", "--threads", "1", "--device", "cpu", "--out", str(out)]
    assert __main__.main(args) == code
    result = json.loads(out.read_text())
    assert result["conditions"]["torch_threads"] == 1
    assert result["peers"]["made-up"]["status"] == ("wrong" if code else "ok")
    assert "made-up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--only", "lightening"], "peers: unknown --only 'lightening'; did you mean 'lightning'?"),
        (["--rounds", "0"], "peers: --rounds: is 0, expected >= 1"),
    ],
)
def test_mistakes_of_the_command(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.count("\n") == 1
