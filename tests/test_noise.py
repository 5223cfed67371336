"""Noise is a function of (seed, stream, step, row, column), and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan import native_available, noise
from fastgan.noise import Stream

KEY = {"seed": 7, "stream": Stream.D_LATENT, "step": 3, "device": "cpu"}


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(counter: int, key: int, expected: tuple[int, ...]) -> None:
    assert tuple(noise.philox(torch.full((4,), counter), (key, key)).tolist()) == expected


def test_philox_known_answer_with_different_words() -> None:
    counter = torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
    out = noise.philox(counter, (0xA4093822, 0x299F31D0)).tolist()
    assert out == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_a_batch_may_be_made_in_parts_and_the_step_may_be_a_tensor() -> None:
    whole = noise.normal(10, 7, **KEY)
    parts = [
        noise.normal(4, 7, **KEY),
        noise.normal(6, 7, **{**KEY, "step": torch.tensor(3)}, first_row=4),
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("change", [{"seed": 8}, {"stream": Stream.G_LATENT}, {"step": 4}, {"step": 3 + 2**32}])
def test_another_key_gives_other_numbers(change: dict) -> None:
    assert not (noise.bits(8, 8, **KEY) == noise.bits(8, 8, **{**KEY, **change})).any()


@given(rows=st.integers(0, 9), cols=st.integers(0, 9), step=st.integers(0, 2**48 - 1), first=st.integers(0, 2**31),
       seed=st.integers(-(2**64), 2**64), stream=st.sampled_from(Stream))  # fmt: skip
def test_native_bits_are_the_references(rows: int, cols: int, step: int, first: int, seed: int, stream: Stream) -> None:
    assert native_available()
    got = noise.bits(rows, cols, seed=seed, stream=stream, step=step, first_row=first, device="cpu")
    assert torch.equal(got, noise.bits_reference(torch.tensor(step), rows, cols, seed, int(stream), first))


def test_a_number_depends_on_its_row_and_column_only() -> None:
    assert torch.equal(noise.normal(10, 8, **KEY)[:6, :3], noise.normal(6, 3, **KEY))


def test_distributions() -> None:
    z = noise.normal(4000, 64, **KEY).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    corr = torch.corrcoef(z.T) - torch.eye(64, dtype=torch.float64)
    assert corr.abs().max() < 6 / 4000**0.5
    u = noise.uniform(4000, 64, **KEY)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.double().mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    k = noise.integers(70000, 7, **KEY)
    assert torch.bincount(k, minlength=7).sub(10000).abs().max() < 500


def test_normal_is_the_same_number_in_both_precisions() -> None:
    assert torch.equal(noise.normal(9, 5, **KEY, dtype=torch.float64).float(), noise.normal(9, 5, **KEY))


@settings(deadline=None)  # a tiny n walks far through the least domain
@given(n=st.integers(1, 300), passes=st.integers(0, 3), seed=st.integers(0, 2**64 - 1))
def test_shuffled_visits_each_item_once_per_pass(n: int, passes: int, seed: int) -> None:
    at = torch.arange(passes * n, (passes + 1) * n)
    assert sorted(noise.shuffled(at, n, seed=seed).tolist()) == list(range(n))
    assert torch.equal(noise.shuffled(at[n // 2 :], n, seed=seed), noise.shuffled(at, n, seed=seed)[n // 2 :])


def test_shuffled_orders_differ_between_passes_and_are_uniform() -> None:
    n = 5
    first = noise.shuffled(torch.arange(0, 20000 * n), n, seed=1).view(-1, n)
    assert len({tuple(row) for row in first.tolist()}) == 120  # every order occurs
    counts = torch.stack([torch.bincount(first[:, i], minlength=n) for i in range(n)])
    assert (counts - 4000).abs().max() < 300  # 5 standard deviations are 283
