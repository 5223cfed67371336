"""A feed on the device gives what the feed on the host gives, to the bit, and their states can be exchanged."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from graph_emulator import EmulatedGraph
from torch import nn

from fastgan import Engine, open_dataset
from fastgan.backend import use_backend
from fastgan.data import Dataset, Feed, ResidentFeed, resident
from fastgan.errors import InputError
from fastgan.kernels.inputs import Draw, inputs_launch
from fastgan.noise import Stream

pytestmark = pytest.mark.interpreted

RNG = np.random.default_rng(0)
BACKENDS = ["triton", "reference"]


def images(n: int = 50, mirror: bool = True, labelled: bool = True) -> Dataset:
    x = RNG.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)
    return open_dataset((x, np.arange(n) % 7) if labelled else x, mirror=mirror)


def table(n: int = 50) -> Dataset:
    return open_dataset("gaussians25") if n > 1000 else Dataset("points", torch.randn(n, 2), mirror=True)


def assert_same(got: tuple[torch.Tensor, torch.Tensor | None], expected: tuple[torch.Tensor, torch.Tensor | None]):
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None and e is not None:
            assert (g.shape, g.dtype) == (e.shape, e.dtype)
            assert torch.equal(g.cpu(), e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [images, lambda: images(mirror=False), lambda: images(labelled=False), table])
def test_the_same_samples_over_three_passes(make, backend: str, device: torch.device) -> None:
    data = make()
    host = data.feed(16, seed=2**63 + 5)
    with use_backend(backend):
        there = data.feed(16, seed=2**63 + 5, device=device)
        assert isinstance(there, ResidentFeed)
        assert isinstance(there, Feed)
        for k in range(10):
            x, y = next(there)
            assert x.device.type == device.type
            assert_same((x, y), next(host))
            assert there.position == host.position == 16 * (k + 1) == int(there._counter)


def test_mirroring_across_blocks(device: torch.device) -> None:
    data = images()
    host, there = (data.feed(40, 1, device=d) for d in (None, device))
    for feed in (host, there):
        feed.load_state_dict({"position": (1 << 14) - 17})
    assert_same(next(there), next(host))


@pytest.mark.parametrize("name", ["digits", "gaussians25"])
def test_states_go_from_one_feed_to_the_other(name: str, device: torch.device) -> None:
    data = open_dataset(name, mirror=name == "digits")
    feeds = [data.feed(32, 4, device=d) for d in (None, device, None, device)]
    for a, b in pairwise(feeds):
        next(a)
        b.load_state_dict(a.state_dict())
        expected = data.feed(32, 4)
        expected.load_state_dict(b.state_dict())
        assert_same(next(b), next(expected))
        b.load_state_dict(a.state_dict())
    assert feeds[-1].state_dict() == {"position": 96}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fill_writes_where_it_is_told(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    data = images()
    feed, host = ResidentFeed(data, 9, 3, device=device, backend=backend), data.feed(9, 3)
    canvas = torch.full((11, 3, 4, 5), -9.0, dtype=dtype, device=device)
    labels = torch.full((11,), -9, device=device)
    for k in range(2):
        feed.fill(canvas[1:-1], labels[1:-1] if k else None)
        x, y = next(host)
        assert torch.equal(canvas[1:-1].cpu(), x.to(dtype))
        assert torch.equal(labels[1:-1].cpu(), y if k else torch.full((9,), -9))
    assert (canvas[[0, -1]] == -9).all()
    assert (labels[[0, -1]] == -9).all()
    assert feed.position == 18


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_fill_goes_on_in_replays(backend: str) -> None:
    """The emulated graph freezes what the host computes; position and state follow what it is told of the replays."""
    data = images()
    feed, host = ResidentFeed(data, 9, 3, device="cpu", backend=backend), data.feed(9, 3)
    out, labels = torch.empty(9, 3, 4, 5), torch.empty(9, dtype=torch.int64)
    graph = EmulatedGraph()
    with graph:
        feed.fill(out, labels)
    assert not graph.reads_back
    assert not graph.from_host
    assert_same((out, labels), next(host))
    for _ in range(4):
        graph.replay()
        assert_same((out, labels), next(host))
    feed.advanced(4)
    assert feed.position == host.position == int(feed._counter)
    feed.load_state_dict({"position": 7})
    host.load_state_dict({"position": 7})
    graph.replay()  # the counter is where it was
    assert_same((out, labels), next(host))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_of_fills() -> None:
    data = images()
    feed, host = data.feed(9, 3, device="cuda"), data.feed(9, 3)
    out, labels = torch.empty(9, 3, 4, 5, device="cuda"), torch.empty(9, dtype=torch.int64, device="cuda")
    feed.fill(out, labels)  # compiles
    assert_same((out, labels), next(host))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        feed.fill(out, labels)
    assert feed.position == 9
    for _ in range(20):
        graph.replay()
        assert_same((out, labels), next(host))
    feed.advanced(20)
    assert feed.position == host.position == int(feed._counter)


def test_one_launch_draws_the_batch_with_an_updates_noise(device: torch.device) -> None:
    data = images()
    feed, host = data.feed(9, 3, device=device), data.feed(9, 3)
    out, labels = torch.empty(9, 3, 4, 5, device=device), torch.empty(9, dtype=torch.int64, device=device)
    draw = Draw(torch.empty(9, 4, device=device), torch.tensor(0, device=device), 3, Stream.D_LATENT)
    launch = inputs_launch([draw], feed.arguments(out, labels))
    for _ in range(3):
        launch()
        feed.advanced()
        assert_same((out, labels), next(host))
    assert feed.position == host.position
    stays = inputs_launch([draw], feed.arguments(out, advance=False))
    x, _ = next(host)
    for _ in range(2):
        stays()
        assert torch.equal(out.cpu(), x)


def test_training_takes_it(device: torch.device) -> None:
    """The same update as from the host's feed."""
    data = open_dataset("gaussians25")
    weights = []
    for at in (None, device):
        torch.manual_seed(0)
        engine = Engine(nn.Linear(3, 2), nn.Linear(2, 1), latent=3, device=str(device), precision="fp32", n_critic=2)
        feed = data.feed(8, 1, device=at)
        for _ in range(3):
            engine.step(feed)
        weights.append([p.detach().clone() for p in engine.discriminator.parameters()])
        assert feed.position == 48
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_data_is_on_the_device_once(tmp_path) -> None:
    data = images()
    a, b = data.feed(4, device="cpu"), data.feed(5, 1, device="cpu")
    assert a._data.data_ptr() == b._data.data_ptr() == data._rows.ctypes.data
    assert a._data.dtype == torch.uint8
    np.save(tmp_path / "set.npy", RNG.integers(0, 256, (30, 4, 4), dtype=np.uint8))
    x = np.load(tmp_path / "set.npy", mmap_mode="r")
    mapped = Dataset("mapped", x.reshape(30, 1, 4, 4))
    there = mapped.feed(30, device="cpu")  # a copy: torch does not take what cannot be written
    assert there._data.data_ptr() != mapped._rows.ctypes.data
    assert_same(next(there), next(mapped.feed(30)))


def test_a_copy_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_PIECE", 130)  # two rows of 60 bytes
    data = images(51)
    data._rows.flags.writeable = False
    assert_same(next(data.feed(51, device="cpu")), next(data.feed(51)))


def test_data_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images()
    size = 50 * 60 + 50 * 8
    monkeypatch.setattr(resident, "_free_memory", lambda device: int(size / 0.8) - 2)
    with pytest.raises(
        InputError, match=re.escape("feed: tensor takes 0.00 GiB and 0.00 GiB are free on cpu, of which")
    ):
        data.feed(4, device="cpu")
    monkeypatch.setattr(resident, "_free_memory", lambda device: int(size / 0.8) + 2)
    data.feed(4, device="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: f.fill(torch.empty(9, 3, 4, 4)),
            "feed: out has shape (9, 3, 4, 4) on cpu, expected (9, 3, 4, 5) on",
        ),
        (lambda f: f.fill(torch.empty(8, 3, 4, 5)), "feed: out has shape (8, 3, 4, 5) on cpu"),
        (lambda f: f.fill(torch.empty(9, 3, 5, 4).mT), "on cpu, contiguous"),
        (lambda f: f.fill(torch.empty(9, 3, 4, 5, device="meta")), "on meta, expected"),
        (lambda f: f.fill(torch.empty(9, 3, 4, 5), torch.zeros(9, dtype=torch.int64)), "and tensor has none"),
        (lambda f: f.fill(torch.empty(9, 3, 4, 5, dtype=torch.int64)), "sample_rows: out has dtype torch.int64"),
        (lambda f: f.load_state_dict({"position": -1}), "feed state: position is -1"),
        (lambda f: f.dataset.feed(51, device="cpu"), "batch is 51, expected 1"),
        (lambda f: open_dataset([torch.zeros(4, 2)]).feed(2, device="cpu"), "a stream cannot be put on a device"),
    ],
)
def test_errors(call, message: str) -> None:
    feed = images(labelled=False).feed(9, device="cpu")
    with pytest.raises(ValueError, match=re.escape(message)):
        call(feed)
