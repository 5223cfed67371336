"""The rows of a batch: the order is the stateless permutation, and values are the host's gather, to the bit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from graph_emulator import EmulatedGraph

from fastgan import noise
from fastgan.data.dataset import flips_at
from fastgan.data.gather import gather_reference
from fastgan.kernels.latent import keys
from fastgan.kernels.sample_rows import (
    SCALARS,
    SampleArguments,
    halves,
    sample_rows,
    sample_rows_,
    sample_rows_launch,
    shuffled,
)

pytestmark = pytest.mark.interpreted

BACKENDS = ["triton", "reference"]


def order(n: int, position: int, batch: int, seed: int, device: torch.device, backend: str) -> torch.Tensor:
    """The items that a batch takes: the labels of rows that number themselves."""
    data, numbers = torch.zeros(n, 1, dtype=torch.uint8, device=device), torch.arange(n, device=device)
    at = torch.tensor(position, device=device)
    _, drawn = sample_rows(data, at, batch, seed=seed, labels=numbers, backend=backend)
    assert int(at) == position
    return drawn.cpu()


@triton.jit(do_not_specialize=SCALARS)
def _shuffled_kernel(position_ptr, item_ptr, n, low_bits, high_bits, key0, key1, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    key0 = key0.to(tl.int64) & 0xFFFFFFFF
    key1 = key1.to(tl.int64) & 0xFFFFFFFF
    item = shuffled(tl.load(position_ptr + at), n.to(tl.int64), low_bits, high_bits, key0, key1)
    tl.store(item_ptr + at, item)


def by_kernel(position: torch.Tensor, n: int, seed: int, device: torch.device) -> torch.Tensor:
    """The kernel's order, for sets of any size: no data is read."""
    bits, size = max(6, (n - 1).bit_length()), triton.next_power_of_2(len(position))
    at = torch.cat([position, position[:1].expand(size - len(position))]).to(device)
    item = torch.full_like(at, -1)
    _shuffled_kernel[1,](at, item, n, bits // 2, bits - bits // 2, *keys(seed), BLOCK=size)
    return item[: len(position)].cpu()


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000])
def test_the_order_of_whole_passes_is_shuffleds(n: int, device: torch.device) -> None:
    for seed, first in ((3, 0), (2**64 - 1, 5), (-(2**40), 2**20))[: 3 if n > 2 else 1]:  # walks through 62 values
        at = torch.arange(first * n, (first + 2) * n)
        got = by_kernel(at, n, seed, device)
        assert torch.equal(got, noise.shuffled(at, n, seed=seed))
        assert all(torch.equal(p.sort().values, torch.arange(n)) for p in got.view(2, n))


@pytest.mark.parametrize(("n", "position"), [(2**17 + 1, 2**40), (2**31 + 11, 2**41), (2**32 - 1, 2**45 + 7)])
def test_the_order_of_a_large_set(n: int, position: int, device: torch.device) -> None:
    at = torch.arange(position, position + 50)
    assert torch.equal(by_kernel(at, n, 9, device), noise.shuffled(at, n, seed=9))


@pytest.mark.parametrize("n", [1, 33, 65])
def test_a_batch_takes_the_items_in_that_order(n: int, device: torch.device) -> None:
    for seed, first in ((3, 0), (2**64 - 1, 2**20)):
        got = order(n, first * n, n, seed, device, "triton")
        assert torch.equal(got, noise.shuffled(torch.arange(first * n, (first + 1) * n), n, seed=seed))


def test_a_walk_that_is_not_looked_at_ends_where_it_should() -> None:
    """What a GPU does in torch ops; and it reads nothing back, or the meta device would fail."""
    for n in (1, 2, 64, 65, 1025):
        at = torch.arange(2 * n)
        assert torch.equal(noise._shuffled(at, n, 5, look=False), noise._shuffled(at, n, 5, look=True))
    assert noise.shuffled(torch.empty(7, dtype=torch.int64, device="meta"), 100, seed=1).shape == (7,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("n", "row", "width", "batch"), [(7, 64, 8, 5), (40, 3 * 5 * 7, 7, 33), (33, 1030, 515, 2)])
def test_values_are_the_gathers(
    n: int, row: int, width: int, batch: int, mirror: bool, backend: str, device: torch.device
) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (n, row), dtype=np.uint8)
    position = 2**14 - 2  # across two blocks of the mirror stream
    at = torch.arange(position, position + batch)
    index = noise.shuffled(at, n, seed=3).numpy()
    flips = torch.cat([flips_at(b, 3) for b in (0, 1)])[at].numpy()
    assert 0 < flips.sum() < batch
    expected = np.empty((batch, row), np.float32)
    gather_reference(rows, index, flips if mirror else None, expected, width, 2 / 255, -1.0, 1)
    got = sample_rows(
        torch.from_numpy(rows).to(device), torch.tensor(position, device=device), batch, seed=3, width=width,
        scale=2 / 255, offset=-1.0, mirror=mirror, backend=backend,
    )  # fmt: skip
    np.testing.assert_array_equal(got.cpu().numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scale", "offset"), [(2 / 255, -1.0), (1 / 3, 0.1), (-1e30, 1e-30), (0.1, 7.0), (0.0, 0.5)])
def test_product_and_sum_round_one_after_the_other(
    scale: float, offset: float, backend: str, device: torch.device
) -> None:
    """For every byte; and the two halves' products are exact, so that a fused multiply-add rounds the same."""
    data = torch.arange(256, dtype=torch.uint8, device=device)[None]
    for dtype in (torch.float32, torch.float64, torch.float16)[: 2 if scale < -1e9 else 3]:  # fp16 ends at 65504
        got = sample_rows(
            data, torch.zeros((), dtype=torch.int64, device=device), 1, seed=0, scale=scale, offset=offset,
            dtype=dtype, backend=backend,
        )  # fmt: skip
        pixels = np.arange(256).astype(np.float32) * np.float32(scale) + np.float32(offset)
        assert torch.equal(got[0].cpu(), torch.from_numpy(pixels).to(dtype))
    for part in halves(scale):
        assert np.float32(part) == part
        assert all(float(np.float32(part * byte)) == part * byte for byte in range(256))
    assert sum(halves(scale)) == np.float32(scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_and_labels(backend: str, device: torch.device) -> None:
    table = torch.randn(70, 3, device=device)
    for data in (table, table.double()):
        labels = torch.arange(70, device=device) * 2**33
        x, y = sample_rows(
            data, torch.tensor(66, device=device), 9, seed=1, labels=labels, dtype=torch.float64, backend=backend
        )
        item = noise.shuffled(torch.arange(66, 75), 70, seed=1).to(device)
        assert torch.equal(x, data[item].double())
        assert torch.equal(y, labels[item])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_position_may_advance_on_the_device(backend: str, device: torch.device) -> None:
    """One value is the whole state of repeated launches, whichever program of one ends last."""
    data = torch.arange(300, device=device).remainder(251).to(torch.uint8).view(100, 3)
    position, arrivals = torch.tensor(90, device=device), torch.zeros((), dtype=torch.int32, device=device)
    canvas = torch.full((70, 8), -9.0, device=device)
    out = canvas[:, 2:5]
    a = SampleArguments(data, position, out, 4, 3, mirror=True, arrivals=arrivals)
    if backend == "triton":
        assert sample_rows_launch(a).grid == (2,)
    for k in range(3):
        expected = sample_rows(data, torch.tensor(90 + 70 * k), 70, seed=4, mirror=True, backend="reference")
        sample_rows_(a, backend=backend)
        assert torch.equal(out, expected)
        assert int(position) == 90 + 70 * (k + 1)
        assert int(arrivals) == 0
    out.fill_(-9)
    assert (canvas == -9).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_records_a_step_sees_the_rows_and_replays_them(backend: str) -> None:
    data, position = torch.arange(120).to(torch.uint8).view(40, 3), torch.tensor(0)
    arrivals, out = torch.zeros((), dtype=torch.int32), torch.empty(16, 3)
    a = SampleArguments(data, position, out, 4, 3, arrivals=arrivals)
    graph = EmulatedGraph()
    with graph:
        sample_rows_(a, backend=backend)
    assert [func._schema.name for func, *_ in graph.tape] == ["fastgan::sample_rows_"]
    assert not graph.reads_back
    for k in range(1, 4):
        graph.replay()
        assert torch.equal(out, sample_rows(data, torch.tensor(16 * k), 16, seed=4, backend="reference"))


def test_it_compiles_into_one_graph() -> None:
    data, position = torch.arange(120).to(torch.uint8).view(40, 3), torch.tensor(5)

    def draw(position: torch.Tensor) -> torch.Tensor:
        return sample_rows(data, position, 4, seed=4, scale=2 / 255, backend="reference") + 1

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(position), draw(position))


DATA = torch.zeros(5, 6, dtype=torch.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DATA.int()}, "data has dtype torch.int32, expected one of torch.uint8"),
        ({"data": DATA[:, ::2]}, "data [5, 3] is not contiguous [N, row size]"),
        ({"data": DATA[:0]}, "data has shape (0, 6), expected 1"),
        ({"out": torch.empty(3, 5)}, "out has shape (3, 5), expected [B, 6]"),
        ({"out": torch.empty(3, 6, dtype=torch.int64)}, "out has dtype torch.int64"),
        ({"out": torch.empty(6, 3).T}, "the rows of out are not contiguous"),
        ({"width": 4}, "width is 4, which does not divide the row size 6"),
        ({"width": 0}, "width is 0, which does not divide"),
        (
            {"position": torch.zeros(1, dtype=torch.int64)},
            "position is torch.int64 [1] on cpu, expected torch.int64 []",
        ),
        ({"position": torch.zeros((), dtype=torch.int32)}, "position is torch.int32 [] on cpu, expected torch.int64"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels and labels_out go together"),
        (
            {"labels": torch.zeros(4, dtype=torch.int64), "labels_out": torch.zeros(3, dtype=torch.int64)},
            "labels is torch.int64 [4] on cpu, expected torch.int64 [5] on cpu",
        ),
        ({"arrivals": torch.zeros((), dtype=torch.int64)}, "arrivals is torch.int64 [] on cpu, expected torch.int32"),
        ({"position": torch.zeros((), dtype=torch.int64, device="meta")}, "position is torch.int64 [] on meta"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str, backend: str) -> None:
    a = SampleArguments(DATA, torch.zeros((), dtype=torch.int64), torch.empty(3, 6), 1, 3)
    with pytest.raises(ValueError, match=re.escape(f"sample_rows: {message}")):
        sample_rows_(replace(a, **change), backend=backend)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": -1}, "batch is -1, expected at least 0"),
        ({"dtype": torch.int64}, "dtype is torch.int64, expected one of"),
        ({"data": DATA[0]}, "data has shape (6,), expected [N, row size]"),
    ],
)
def test_errors_of_the_public_function(given: dict, message: str) -> None:
    arguments = {"data": DATA, "position": torch.zeros((), dtype=torch.int64), "batch": 2, "seed": 1, **given}
    with pytest.raises(ValueError, match=re.escape(f"sample_rows: {message}")):
        sample_rows(**arguments)
