"""Checkpoints: a folder that is written whole or not at all, and that is read without running any code.

``state.safetensors`` holds the tensors, each named by its keys joined by ``/``; ``state.json`` holds everything else
(a tensor's place reads ``null`` there) with the size and SHA-256 of the first, so that a file that was cut short
or taken from another checkpoint is recognised. Infinity and NaN are written as Python's ``json`` writes them.

One process at a time may write into a folder of checkpoints. A writer killed at any moment leaves at most
``.NAME.unfinished`` (ignored) and, where it was replacing NAME, the previous one as ``.NAME.replaced`` (found by
:func:`load` and :func:`newest`); the next :func:`save` into that folder tidies both up.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastgan.errors import InputError

_VERSION = 1
_TENSORS, _REST = "state.safetensors", "state.json"


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` as the folder ``path``, replacing a checkpoint that is there.

    Args:
        path: the folder; its parents are made where missing.
        state: dicts with ``str`` keys and lists, whose leaves are tensors of any device and strides, ``int``,
            ``float``, ``str``, ``bool`` or ``None``. Tensors that share memory are written once each.

    Raises:
        InputError: the disk is full, the folder is read-only, or ``path`` is something else than a checkpoint.
        TypeError: a key or a leaf is of another type.
        ValueError: a key contains ``/`` or is empty.
    """
    if not isinstance(state, dict):
        raise TypeError(f"checkpoint: state is {type(state).__name__}, expected dict")
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", tensors)
    data = safetensors.torch.save(tensors)
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rest = json.dumps({"format": "fastgan-checkpoint", "version": _VERSION, "tensors": digest, "state": tree}, indent=1)

    path = Path(os.path.realpath(path))
    new, old = path.with_name(f".{path.name}.unfinished"), _old(path)
    try:
        if path.exists() and not (path / _REST).is_file() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path}: exists and is not a checkpoint; not overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent)
        try:
            new.mkdir()
            _write(new / _TENSORS, data)
            _write(new / _REST, rest.encode("ascii"))
            _sync(new)
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            shutil.rmtree(new, ignore_errors=True)
            raise
        _sync(path.parent)
    except OSError as e:
        raise InputError(f"{path}: cannot write the checkpoint: {e.strerror or e}") from e
    shutil.rmtree(old, ignore_errors=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read the state that :func:`save` wrote; tensors come on the CPU, each with its own memory.

    Raises:
        InputError: the folder is missing or no checkpoint, or a file in it is cut short or from another checkpoint.
    """
    folder = _standing(Path(path))
    head = _head(folder)
    file = folder / _TENSORS
    try:
        data = file.read_bytes()
    except OSError as e:
        raise InputError(f"{file}: cannot read: {e.strerror or e}") from e
    _check_size(file, len(data), head)
    if hashlib.sha256(data).hexdigest() != head["tensors"]["sha256"]:
        raise InputError(f"{file}: checksum differs from the one in {_REST}: damaged, or from another checkpoint")
    state: dict[str, Any] = head["state"]
    try:
        for name, tensor in safetensors.torch.load(data).items():
            *parents, last = name.split("/")
            node: Any = state
            for key in parents:
                node = node[int(key) if isinstance(node, list) else key]
            place = int(last) if isinstance(node, list) else last
            if node[place] is not None:
                raise LookupError(f"{name!r} is taken")
            node[place] = tensor
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError) as e:
        raise InputError(f"{file}: does not fit {_REST}: {e}") from e
    return state


def newest(folder: str | Path) -> Path | None:
    """The last of :func:`complete`, or ``None``."""
    return next(reversed(complete(folder)), None)


def complete(folder: str | Path) -> list[Path]:
    """Those of :func:`present` that have both files, the tensors of the size that was written.

    :func:`load` checks their contents too.
    """
    return [path for path in present(folder) if _is_complete(_standing(path))]


def present(folder: str | Path) -> list[Path]:
    """The checkpoints in ``folder``, damaged ones too, the lowest number first.

    Names are numbers such as ``00012800``; a folder of such a name without any file of a checkpoint is none.
    """
    folder = Path(folder)
    found = (re.fullmatch(r"([0-9]+)|\.([0-9]+)\.replaced", f.name) for f in folder.glob("*"))
    paths = [folder / name for name in sorted({match[1] or match[2] for match in found if match}, key=int)]
    return [path for path in paths if any((_standing(path) / file).exists() for file in (_TENSORS, _REST))]


def _is_complete(path: Path) -> bool:
    try:
        _check_size(path / _TENSORS, (path / _TENSORS).stat().st_size, _head(path))
    except (InputError, OSError):
        return False
    return True


def _split(value: object, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` with every tensor moved into ``tensors`` and replaced by ``None``."""

    def child(key: str, v: object) -> Any:
        return _split(v, f"{name}/{key}" if name else key, tensors)

    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return None
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"checkpoint: key {key!r} in {name or 'state'!r} is not a str")
            if "/" in key or not key or key == "__metadata__":  # the last is safetensors' own
                raise ValueError(f"checkpoint: key {key!r} in {name or 'state'!r} is reserved, empty or contains '/'")
        return {key: child(key, v) for key, v in value.items()}
    if isinstance(value, list):
        return [child(str(i), v) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint: {name!r} is {type(value).__name__}, expected a tensor or a JSON value")


def _head(folder: Path) -> dict[str, Any]:
    """The checked contents of ``state.json``."""
    file = folder / _REST
    if not folder.is_dir():
        raise InputError(
            f"{folder}: {'is a file' if folder.exists() else 'does not exist'}, expected a checkpoint folder"
        )
    if not file.is_file():
        raise InputError(f"{folder}: not a checkpoint: {_REST} is missing")
    try:
        head: dict[str, Any] = json.loads(file.read_bytes())
    except OSError as e:
        raise InputError(f"{file}: cannot read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: cut short or not JSON") from e
    match head:
        case {"format": "fastgan-checkpoint", "version": version} if version != _VERSION:
            raise InputError(f"{file}: format version {version!r}, this fastgan reads version {_VERSION}")
        case {"format": "fastgan-checkpoint", "tensors": {"bytes": int(), "sha256": str()}, "state": dict()}:
            return head
    raise InputError(f"{file}: not a fastgan checkpoint")


def _check_size(file: Path, size: int, head: dict[str, Any]) -> None:
    if size != head["tensors"]["bytes"]:
        raise InputError(
            f"{file}: {size} bytes, expected {head['tensors']['bytes']}: cut short, or from another checkpoint"
        )


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _standing(path: Path) -> Path:
    """``path``, or where a writer was killed while it replaced that, the previous one."""
    return _old(path) if not path.exists() and _old(path).exists() else path


def _tidy(parent: Path) -> None:
    """Remove or put back what killed writers left."""
    for left in parent.glob(".?*.*"):
        if not left.is_dir() or left.suffix not in (".unfinished", ".replaced"):
            continue
        real = left.with_name(left.stem[1:])
        if left.suffix == ".replaced" and not real.exists():
            os.rename(left, real)
        else:
            shutil.rmtree(left)


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(fd)
