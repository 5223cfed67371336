"""The native gather equals its reference to the bit, checks its arguments and leaves the interpreter free."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from fastgan import native_available
from fastgan._native import ext
from fastgan.data import gather as gather_module
from fastgan.data.gather import gather, gather_reference

SCALE, OFFSET = 2 / 255, -1.0
NATIVE = None if ext is None else ext.gather
BOTH = [pytest.param(gather_reference, id="reference"), pytest.param(NATIVE, id="native")]


def case(n: int, row: int, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (n, row), dtype=np.uint8)
    return rows, rng.integers(0, n, batch), rng.random(batch) < 0.5, np.full((batch, row), np.nan, np.float32)


def test_the_extension_is_built():
    assert native_available()
    assert gather_module.ext.gather is NATIVE


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("n", "row", "width", "batch"),
    [
        (1, 1, 1, 1),
        (7, 64, 8, 20),
        (5, 3 * 13 * 7, 7, 33),
        (9, 3 * 5 * 31, 31, 4),
        (3, 17, 17, 2),
        (4, 12, 1, 6),
        (40, 784, 28, 0),
        (6, 0, 1, 3),
        (50, 3 * 64 * 64, 64, 200),  # two threads
        (3, 3 * 700 * 901, 901, 3),  # two threads, fewer rows than threads could be
    ],
)
def test_native_equals_reference(n, row, width, batch, flipped, threads):
    rows, index, flips, out = case(n, row, batch)
    expected = np.full_like(out, np.inf)
    given = flips if flipped else None
    gather_reference(rows, index, given, expected, width, SCALE, OFFSET, 1)
    NATIVE(rows, index, given, out, width, SCALE, OFFSET, threads)
    np.testing.assert_array_equal(out, expected)
    by_hand = rows[index].reshape(batch, row // width, width).astype(np.float32)
    if flipped:
        by_hand = np.where(flips[:, None, None], by_hand[..., ::-1], by_hand)
    by_hand = by_hand * np.float32(SCALE) + np.float32(OFFSET)
    np.testing.assert_array_equal(expected, by_hand.reshape(batch, row))


@pytest.mark.parametrize(("scale", "offset"), [(2 / 255, -1.0), (1 / 3, 0.1), (-1e30, 1e-30)])
def test_every_value_rounds_twice_in_both(scale, offset):
    rows = np.arange(256, dtype=np.uint8)[None].repeat(2, axis=0)
    got, expected = np.empty((2, 256), np.float32), np.empty((2, 256), np.float32)
    index, flips = np.array([0, 1]), np.array([False, True])
    NATIVE(rows, index, flips, got, 256, scale, offset, 1)
    gather_reference(rows, index, flips, expected, 256, scale, offset, 1)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got[1], got[0, ::-1])


def test_the_ends_of_the_range_are_exact():
    rows, out = np.array([[0, 255]], np.uint8), np.empty((1, 2), np.float32)
    gather(rows, np.array([0]), None, out, 2, SCALE, OFFSET)
    assert out.tolist() == [[-1.0, 1.0]]


def test_mapped_read_only_rows(tmp_path):
    rows, index, flips, out = case(20, 48, 9)
    np.save(tmp_path / "rows.npy", rows)
    expected = out.copy()
    NATIVE(np.load(tmp_path / "rows.npy", mmap_mode="r"), index, flips, out, 4, SCALE, OFFSET, 1)
    gather_reference(rows, index, flips, expected, 4, SCALE, OFFSET, 1)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("run", BOTH)
@pytest.mark.parametrize("bad", [-1, 5, 2**62, -(2**63)])
def test_an_index_out_of_range(run, bad):
    rows, _, _, out = case(5, 6, 3)
    with pytest.raises(IndexError, match=rf"index {bad} at position 1 is outside \[0, 5\)"):
        run(rows, np.array([0, bad, 1]), None, out, 3, SCALE, OFFSET, 1)
    assert np.isnan(out).all()  # nothing was written


@pytest.mark.parametrize("run", BOTH)
@pytest.mark.parametrize("change", ["rows", "out", "flips", "width", "zero width", "threads", "no rows"])
def test_arguments_that_do_not_fit(run, change):
    rows, index, flips, out = case(5, 6, 3)
    width, threads, error = 3, 1, ValueError
    if change == "rows":
        rows = rows.reshape(5, 2, 3)
    elif change == "out":
        out = out[:2]
    elif change == "flips":
        flips = flips[:1]
    elif change == "no rows":
        rows, error = rows[:0], IndexError
    else:
        width = {"width": 4, "zero width": 0}.get(change, 3)
        threads = 0 if change == "threads" else 1
    with pytest.raises(error, match="gather: "):
        run(rows, index, flips, out, width, SCALE, OFFSET, threads)


@pytest.mark.parametrize("what", ["strided rows", "float rows", "int32 index", "float64 out", "strided out"])
def test_native_takes_no_copy_of_a_wrong_array(what):
    rows, index, flips, out = case(5, 6, 3)
    rows = {"strided rows": rows.repeat(2, 1)[:, ::2], "float rows": rows.astype(np.float32)}.get(what, rows)
    index = index.astype(np.int32) if what == "int32 index" else index
    out = {"float64 out": out.astype(np.float64), "strided out": out.repeat(2, 1)[:, ::2]}.get(what, out)
    with pytest.raises(TypeError):
        NATIVE(rows, index, flips, out, 3, SCALE, OFFSET, 1)


def test_native_refuses_a_read_only_output():
    rows, index, _, out = case(5, 6, 3)
    out.setflags(write=False)
    with pytest.raises(ValueError, match="writeable"):
        NATIVE(rows, index, None, out, 3, SCALE, OFFSET, 1)


def test_other_python_threads_run_during_a_gather():
    rows, index, _, out = case(4, 1 << 20, 60)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    NATIVE(rows, index, np.ones(60, bool), out, 1, SCALE, OFFSET, 1)  # lines of one value: a long call into C++
    end = time.perf_counter()
    done.set()
    thread.join()
    # With the lock held the other thread would have its turns before and after the call alone.
    middle = (begin + (end - begin) / 4, end - (end - begin) / 4)
    assert any(middle[0] < t < middle[1] for t in ticks)


def test_calls_from_several_threads_at_once():
    rows, index, flips, _ = case(300, 3 * 32 * 32, 700)
    expected = np.empty((700, 3072), np.float32)
    gather_reference(rows, index, flips, expected, 32, SCALE, OFFSET, 1)
    outs = [np.empty_like(expected) for _ in range(4)]
    workers = [threading.Thread(target=NATIVE, args=(rows, index, flips, o, 32, SCALE, OFFSET, 2)) for o in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for out in outs:
        np.testing.assert_array_equal(out, expected)


def test_without_the_extension_the_reference_runs(monkeypatch):
    rows, index, flips, native = case(50, 96, 20)
    reference = native.copy()
    gather(rows, index, flips, native, 8, SCALE, OFFSET)
    monkeypatch.setattr(gather_module, "ext", None)
    gather(rows, index, flips, reference, 8, SCALE, OFFSET)
    np.testing.assert_array_equal(native, reference)
