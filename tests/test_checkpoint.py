"""Checkpoints: exact round trips, damage that is recognised, writers that are killed."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan import checkpoint
from fastgan.checkpoint import complete, load, newest, present, save
from fastgan.errors import InputError

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def assert_same(a: object, b: object) -> None:
    """Equal in type, order and every bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        raw = (a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
        assert torch.equal(*raw)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    elif isinstance(a, float):
        assert (math.isnan(a) and math.isnan(b)) or a.hex() == b.hex()
    else:
        assert a == b


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=g) * 10
    t = values.to(draw(st.sampled_from(DTYPES)))
    if t.is_floating_point() and t.numel():
        t.reshape(-1)[0] = draw(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf]))
    return t.transpose(0, -1) if t.ndim > 1 and draw(st.booleans()) else t


KEYS = st.text(min_size=1, max_size=8).filter(lambda k: "/" not in k and k != "__metadata__")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | tensors()
VALUES = st.recursive(LEAVES, lambda v: st.dictionaries(KEYS, v, max_size=4) | st.lists(v, max_size=3), max_leaves=12)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_round_trip_is_exact(state: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "1", state)
        assert_same(load(Path(folder) / "1"), state)


def test_tied_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "b": base, "t": base.t(), "row": base[1], "wide": torch.ones(1).expand(5)}
    save(tmp_path / "1", state)
    got = load(tmp_path / "1")
    assert_same(got, state)
    got["a"].zero_()
    assert_same(got["b"], base)


def test_a_module_and_its_optimizer_resume_from_a_checkpoint(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    save(tmp_path / "1", {"net": net.state_dict()})
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other.load_state_dict(load(tmp_path / "1")["net"])
    assert_same(dict(other.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"a/b": 1}, ValueError, "key 'a/b'"),
        ({"": 1}, ValueError, "key ''"),
        ({"__metadata__": torch.zeros(1)}, ValueError, "reserved"),
        ({"a": {1: 2}}, TypeError, "key 1 in 'a' is not a str"),
        ({"a": {"b": (1, 2)}}, TypeError, "'a/b' is tuple"),
        ([], TypeError, "expected dict"),
    ],
)
def test_refuses_what_would_not_come_back(tmp_path: Path, state: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        save(tmp_path / "1", state)
    assert not any(tmp_path.iterdir())


STATE = {"step": 3, "nets": {"g.weight": torch.arange(6.0), "d": torch.ones(2, 2)}, "empty": {}}


def test_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "00000001"
    save(path, {"step": 1})
    save(path, STATE)
    assert_same(load(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(InputError, match="not a checkpoint; not overwritten"):
            save(tmp_path / name, STATE)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def test_newest_takes_the_highest_complete_number(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") is None
    assert newest(tmp_path) is None
    for n in (2, 10, 9):
        save(tmp_path / str(n), {"n": n, "t": torch.zeros(n)})
    (tmp_path / "notes.txt").write_text("x")
    for name in ("99", "²", "٩٩"):
        (tmp_path / name).mkdir()
    (tmp_path / "٩٩" / "state.json").write_text("x")
    assert newest(tmp_path) == tmp_path / "10"
    assert present(tmp_path) == complete(tmp_path) == [tmp_path / name for name in ("2", "9", "10")]
    os.truncate(tmp_path / "10" / "state.safetensors", 20)
    assert newest(tmp_path) == tmp_path / "9"
    assert present(tmp_path)[-1] == tmp_path / "10"
    (tmp_path / "9" / "state.json").write_text("{")
    assert newest(tmp_path) == tmp_path / "2"


def one_line(path: Path, *parts: str) -> None:
    """Loading fails with one line that holds all of ``parts``."""
    with pytest.raises(InputError) as e:
        load(path)
    assert "\n" not in str(e.value)
    for part in parts:
        assert part in str(e.value)


def test_damage_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "1"
    one_line(path, str(path), "does not exist")
    save(path, STATE)
    tensors, rest = path / "state.safetensors", path / "state.json"
    whole, text = tensors.read_bytes(), rest.read_bytes()

    for n in (0, 1, 7, 8, len(whole) // 2, len(whole) - 1):
        tensors.write_bytes(whole[:n])
        one_line(path, str(tensors), f"{n} bytes, expected {len(whole)}", "cut short")
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    one_line(path, str(tensors), "checksum")
    tensors.unlink()
    one_line(path, str(tensors), "No such file")
    tensors.write_bytes(whole)

    for n in (0, 1, len(text) // 2, len(text) - 1):
        rest.write_bytes(text[:n])
        one_line(path, str(rest), "cut short or not JSON")
    for body in ("[]", '{"format": "other"}', '{"format": "fastgan-checkpoint", "version": 1}'):
        rest.write_text(body)
        one_line(path, str(rest), "not a fastgan checkpoint")
    rest.write_text(json.dumps(json.loads(text) | {"version": 2}))
    one_line(path, str(rest), "format version 2")
    for moved in ({"step": 3}, {"step": 3, "nets": [None, None], "empty": {}}, {"nets": {"g.weight": 1, "d": None}}):
        rest.write_text(json.dumps(json.loads(text) | {"state": moved}))
        one_line(path, str(tensors), "does not fit state.json")
    rest.unlink()
    one_line(path, str(path), "state.json is missing")
    one_line(tensors, "is a file, expected a checkpoint folder")


def test_tensors_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "1", {"t": torch.zeros(4)})
    save(tmp_path / "2", {"t": torch.ones(4)})
    (tmp_path / "1" / "state.safetensors").write_bytes((tmp_path / "2" / "state.safetensors").read_bytes())
    one_line(tmp_path / "1", "checksum")


def test_a_planted_pickle_never_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    bomb = pickle.dumps(Bomb())
    save(tmp_path / "1", STATE)
    for name in ("state.pt", "state.pkl", "data.pkl"):
        (tmp_path / "1" / name).write_bytes(bomb)
    assert_same(load(tmp_path / "1"), STATE)
    for name in ("state.safetensors", "state.json"):
        whole = (tmp_path / "1" / name).read_bytes()
        (tmp_path / "1" / name).write_bytes(bomb)
        one_line(tmp_path / "1", name)
        (tmp_path / "1" / name).write_bytes(whole)
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("failing", "at", "replacing"),
    [(f, n, r) for f, n in (("fsync", 0), ("fsync", 1), ("fsync", 2), ("rename", 0)) for r in (False, True)]
    + [("rename", 1, True)],
)
def test_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, at: int, replacing: bool
) -> None:
    path = tmp_path / "2"
    save(tmp_path / "1", {"step": 1})
    if replacing:
        save(path, {"step": 2})
    before = sorted(tmp_path.iterdir())
    real, calls = getattr(os, failing), []

    def full(*args: object) -> None:
        calls.append(args)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(InputError, match="cannot write the checkpoint: No space left on device") as e:
        save(path, STATE)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert sorted(tmp_path.iterdir()) == before
    assert_same(load(before[-1]), {"step": 2 if replacing else 1})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_write_that_the_kernel_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda file, data: write(Path("/dev/full"), data))
    with pytest.raises(InputError, match="No space left on device"):
        save(tmp_path / "1", STATE)
    assert not any(tmp_path.iterdir())


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocker").write_text("x")
    with pytest.raises(InputError, match="cannot write the checkpoint: File exists"):
        save(tmp_path / "blocker" / "1", STATE)
    if os.geteuid() == 0:  # root writes anywhere: let the call fail as it does for others

        def refuse(self: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InputError, match="cannot write the checkpoint: Permission denied"):
            save(tmp_path / "1", STATE)
    finally:
        tmp_path.chmod(0o755)


# Saves into an existing run in a forked child that dies at the n-th system call that changes the disk, for every n
# until the child lives to the end; prints what `newest` and `load` then find.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from fastgan import checkpoint

root, replacing = Path(sys.argv[1]), sys.argv[2] == "replacing"
STATE = [{"n": n, "t": torch.full((1000,), float(n))} for n in range(3)]


def arm(n, torn):
    left = [n]

    def dying(real):
        def call(*args, **kwargs):
            if left[0] == 0:
                if torn and real is write:
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    write = checkpoint._write
    checkpoint._write = dying(write)
    Path.mkdir, os.fsync, os.rename, shutil.rmtree = map(dying, (Path.mkdir, os.fsync, os.rename, shutil.rmtree))


for torn in (False, True):
    for n in range(100):
        folder = root / f"{torn}-{n}"
        checkpoint.save(folder / "0001", STATE[1])
        path = folder / ("0001" if replacing else "0002")
        child = os.fork()
        if child == 0:
            arm(n, torn)
            checkpoint.save(path, STATE[2])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = sorted(p.name for p in folder.iterdir())
        assert checkpoint.newest(folder).name in ("0001", "0002"), (n, left)
        got = checkpoint.load(checkpoint.newest(folder))
        assert got["n"] in (1, 2) and torch.equal(got["t"], STATE[got["n"]]["t"]), (n, left)
        named = checkpoint.load(folder / "0001")
        assert torch.equal(named["t"], STATE[named["n"]]["t"]), (n, left)
        checkpoint.save(folder / "0003", STATE[0])
        tidied = sorted(p.name for p in folder.iterdir())
        assert set(tidied) <= {"0001", "0002", "0003"} and "0001" in tidied, (n, tidied)
        assert checkpoint.load(checkpoint.newest(folder))["n"] == 0
        print(got["n"], *left)
        if status == 0:
            assert got["n"] == 2
            break
    else:
        raise SystemExit("the writer never finished")
"""


@pytest.mark.parametrize("how", ["adding", "replacing"])
def test_killed_writer_leaves_the_previous_or_the_new_checkpoint(tmp_path: Path, how: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), how], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert run.returncode == 0, run.stderr
    outcomes = {tuple(line.split()) for line in run.stdout.splitlines()}
    assert ("1", ".000" + ("1" if how == "replacing" else "2") + ".unfinished", "0001") in outcomes
    if how == "replacing":
        assert ("1", ".0001.replaced", ".0001.unfinished") in outcomes  # between the two renames
        assert ("2", ".0001.replaced", "0001") in outcomes
    else:
        assert ("2", "0001", "0002") in outcomes
