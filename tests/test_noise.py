"""Noise is a function of (seed, stream, step, row, column), and nothing else."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import InputError, native_available, noise
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


KEYS = {
    "step": st.integers(0, 2**48 - 1), "first": st.integers(0, 2**31), "seed": st.integers(-(2**64), 2**64),
    "stream": st.sampled_from(Stream),
}  # fmt: skip


def both(name: str, out: torch.Tensor, step: int, first: int, seed: int, stream: Stream, *more: int) -> torch.Tensor:
    """``out`` filled natively, and a copy filled by the reference."""
    expected = out.clone(memory_format=torch.preserve_format)
    getattr(noise, f"{name}_reference_")(
        expected, torch.tensor(step), *more, (seed + 2**63) % 2**64 - 2**63, int(stream), first
    )
    keyed = {"seed": seed, "stream": stream, "step": step, "first_row": first, "device": "cpu", "out": out}
    getattr(noise, name)(*(more and (len(out), *more)) or out.shape, **keyed)
    return expected


@settings(deadline=None)
@given(rows=st.integers(0, 90), cols=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.float64]), **KEYS)
def test_native_uniform_numbers_are_the_references(
    rows: int, cols: int, dtype: torch.dtype, step: int, first: int, seed: int, stream: Stream
) -> None:
    out = torch.full((rows, cols), torch.nan, dtype=dtype)
    assert torch.equal(both("uniform", out, step, first, seed, stream), out)


@settings(deadline=None)
@given(rows=st.integers(0, 90), high=st.integers(1, 2**31 - 1), **KEYS)
def test_native_integers_are_the_references(
    rows: int, high: int, step: int, first: int, seed: int, stream: Stream
) -> None:
    out = torch.full((rows,), -1)
    assert torch.equal(both("integers", out, step, first, seed, stream, high), out)


@pytest.mark.parametrize("shape", [(300, 401), (1, 1), (5, 2), (70, 3), (2, 131)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_native_normal_numbers_are_the_references_to_the_last_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    out = torch.full(shape, torch.nan, dtype=dtype)
    expected = both("normal", out, 5, 3, 11, Stream.TOY)
    ulp = torch.finfo(torch.float64).eps * expected.double().abs().clamp(min=1)
    rounded = torch.finfo(dtype).eps * expected.double().abs() if dtype != torch.float64 else 0  # may go the other way
    assert ((out.double() - expected.double()).abs() <= 4 * ulp + rounded).all()
    assert (out != expected).double().mean() < (0.5 if dtype == torch.float64 else 1e-5)


def test_normal_numbers_of_the_extreme_bits() -> None:
    """Against the C library, where the logarithm's argument is next to 0 and to 1, and at every quarter of a turn."""
    words = noise.bits(400, 8000, seed=1, stream=Stream.TOY, step=0, device="cpu").view(-1, 2)
    z = noise.normal(400, 8000, seed=1, stream=Stream.TOY, step=0, device="cpu", dtype=torch.float64).view(-1, 2)
    quarter = (words[:, 1] + 2**27) % 2**30 - 2**27
    picks = [
        words[:, 0].argmin(),
        words[:, 0].argmax(),
        quarter.abs().argmin(),
        words[:, 1].argmin(),
        words[:, 1].argmax(),
    ]
    for i in map(int, picks):
        u, v = ((int(w) + 0.5) * 2.0**-32 for w in words[i])
        radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * v
        assert z[i].tolist() == pytest.approx(
            [radius * math.cos(angle), radius * math.sin(angle)], rel=1e-15, abs=1e-15
        )


@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_numbers_are_written_where_asked_whatever_the_strides(name: str) -> None:
    expected = getattr(noise, name)(70, 7, **KEY)
    canvas = torch.full((70, 20), -9.0)
    for out in (canvas[:, 3:10], torch.empty(7, 70).T, torch.empty(70, 14)[:, ::2]):
        assert getattr(noise, name)(70, 7, **KEY, out=out) is out
        assert torch.equal(out, expected)
    assert (canvas[:, :3] == -9).all()
    assert (canvas[:, 10:] == -9).all()
    labels = torch.full((70, 2), -9)
    noise.integers(70, 5, **KEY, out=labels[:, 1])
    assert torch.equal(labels[:, 1], noise.integers(70, 5, **KEY))
    assert (labels[:, 0] == -9).all()


@pytest.mark.parametrize(
    ("name", "args", "out", "message"),
    [
        ("normal", (3, 4), torch.empty(4, 3), "out is torch.float32 [4, 3] on cpu, expected floating point [3, 4]"),
        (
            "uniform",
            (3, 4),
            torch.empty(3, 4, dtype=torch.int64),
            "out is torch.int64 [3, 4] on cpu, expected floating",
        ),
        ("integers", (3, 9), torch.empty(3), "out is torch.float32 [3] on cpu, expected torch.int64 [3] on cpu"),
        ("normal", (3, 4), torch.empty(3, 4, device="meta"), "out is torch.float32 [3, 4] on meta, expected"),
    ],
)
def test_an_output_that_does_not_fit_is_named(name: str, args: tuple, out: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        getattr(noise, name)(*args, **KEY, out=out)


def test_what_records_a_step_sees_the_fills_and_replays_them() -> None:
    class Tape(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    calls: list = []
    step, key = torch.tensor(3), {k: v for k, v in KEY.items() if k != "step"}
    z, u, k = torch.empty(4, 5), torch.empty(4, 5), torch.empty(4, dtype=torch.int64)
    with Tape():
        noise.normal(4, 5, **key, step=step, out=z)
        noise.uniform(4, 5, **key, step=step, out=u)
        noise.integers(4, 9, **key, step=step, out=k)
    assert [func._schema.name for func, _, _ in calls] == [
        "fastgan::normal_",
        "fastgan::uniform_",
        "fastgan::integers_",
    ]
    assert all(func._schema.is_mutable for func, _, _ in calls)
    step.add_(1)
    for func, args, kwargs in calls:
        func(*args, **kwargs)
    assert torch.equal(z, noise.normal(4, 5, **key, step=4))
    assert torch.equal(u, noise.uniform(4, 5, **key, step=4))
    assert torch.equal(k, noise.integers(4, 9, **key, step=4))


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
