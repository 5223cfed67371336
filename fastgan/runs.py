"""Run folders ``runs/00007-wgan-gp-digits``: made, found and held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from fastgan import checkpoint
from fastgan.errors import InputError

_NAME = re.compile(r"([0-9]{5,})-.+")
# what is read of a run's files: key paths, a dict before what is in it, and types
_CONFIG: dict[str, Any] = {
    "recipe": (dict, NoneType),
    "every": dict,
    **dict.fromkeys(("every.log", "every.snapshot", "every.evaluate"), int),
    "engine": dict,
    "data": dict,
    "data.name": str,
    "data.shape": list,
    "data.classes": int,
    "data.fingerprint": (str, NoneType),
}
_STATE: dict[str, Any] = {
    "engine": dict,
    "feed": dict,
    "trainer": dict,
    "trainer.iteration": int,
    "trainer.metrics_bytes": int,
    "trainer.warned": bool,
    "trainer.wall_seconds": (int, float),
}


def cannot_write(path: Path, e: OSError) -> InputError:
    """One line for an ``OSError`` while writing under ``path``."""
    return InputError(f"{e.filename or path}: cannot be written: {e.strerror or e}")


def make(outdir: Path, name: str) -> Path:
    """A new folder in ``outdir`` with the next free number, even where several processes ask at once.

    Raises:
        InputError: ``outdir`` is not a folder or cannot be written.
    """
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        with _locked(outdir):
            folder = outdir / f"{max(_numbered(outdir), default=-1) + 1:05d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
            folder.mkdir()
    except OSError as e:
        raise cannot_write(outdir, e) from e
    return folder


def newest(outdir: Path) -> Path:
    """The run with the highest number in ``outdir``.

    Raises:
        InputError: there is none.
    """
    found = {n: path for n, path in _numbered(outdir).items() if (path / "config.json").is_file()}
    if not found:
        raise InputError(f"{outdir}: has no run to take up")
    return found[max(found)]


def locate(path: Path) -> tuple[Path, Path]:
    """The run folder and the newest complete checkpoint of a run, or of a checkpoint given outright.

    Raises:
        InputError: ``path`` is neither, or holds no complete checkpoint.
    """
    if (path / "state.json").is_file() or (path.parent.name == "checkpoints" and path.is_dir()):
        return path.parent.parent, path
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: {'is not' if path.exists() else 'does not exist, expected'} a run or a checkpoint")
    found = last_checkpoint(path)
    if found is None:
        raise InputError(f"{path}: has no checkpoint yet")
    return path, found


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; warns where it passes over a damaged one.

    Raises:
        InputError: every checkpoint is damaged.
    """
    checkpoints = folder / "checkpoints"
    found = checkpoint.newest(checkpoints)
    last = next(reversed(checkpoint.present(checkpoints)), None)
    if last is not None and last != found:
        if found is None:
            checkpoint.load(last)  # raises, naming the file
        warnings.warn(f"{last} is damaged; {found} is taken", stacklevel=2)
    return found


def config(folder: Path) -> dict[str, Any]:
    """The contents of a run's config.json.

    Raises:
        InputError: it is missing or not what a run wrote.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"{path}: not JSON: {e}") from e
    if not isinstance(found, dict):
        raise InputError(f"{path}: not the config.json of a run")
    for name, kind in _CONFIG.items():
        value: Any = found
        for key in name.split("."):
            if key not in value:
                raise InputError(f"{path}: {name} is missing")
            value = value[key]
        if not isinstance(value, kind):
            raise InputError(f"{path}: {name} is {value!r:.40}, not what a run wrote")
    return found


def state(path: Path) -> dict[str, Any]:
    """The contents of a run's checkpoint.

    Raises:
        InputError: it is damaged or not a run's; names the file.
    """
    found = checkpoint.load(path)
    for name, kind in _STATE.items():
        part, _, key = name.partition(".")
        if part not in found:
            raise InputError(f"{path}: not a checkpoint of a run")
        value = found[part].get(key) if key else found[part]
        if not isinstance(value, kind):
            said = "missing" if value is None else f"{value!r:.40}, not what a run wrote"
            raise InputError(f"{path}/state.json: {name} is {said}")
    return found


def prune(folder: Path, keep: int) -> None:
    """Remove all complete checkpoints but the newest ``keep``; a killed process leaves none half removed."""
    import shutil

    for path in checkpoint.complete(folder / "checkpoints")[:-keep]:
        aside = path.with_name(f".{path.name}.unfinished")
        path.rename(aside)
        shutil.rmtree(aside)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder``.

    Raises:
        InputError: one already does.
    """
    with _locked(folder, wait=False):
        yield


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise InputError(f"{folder}: another process trains in it") from e
        yield
    finally:
        os.close(fd)


def _numbered(outdir: Path) -> dict[int, Path]:
    paths = sorted(outdir.iterdir()) if outdir.is_dir() else []
    return {int(m[1]): p for p in paths if (m := _NAME.fullmatch(p.name)) and p.is_dir()}
