"""Where decoded images lie: in memory where half of what is free holds them, else in a mapped file in the cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np

from fastgan.data.gather import U8
from fastgan.errors import InputError

_FORMAT = 1  # of the cached files: raised whenever the same listing and settings would decode to other bytes


def available_memory() -> int:
    """Bytes that can be taken without swapping, also in a container; 4 GiB where the system does not tell."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(stat["inactive_file"]))  # cached files give way
    except (OSError, ValueError):  # another system, or no limit
        pass
    return max(0, min(free, default=4 << 30))


def cache_folder() -> Path:
    """``$FASTGAN_CACHE``, else ``fastgan`` in the user's cache folder."""
    given = os.environ.get("FASTGAN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan"


def cache_path(*content: object) -> Path:
    """The mapped file of what ``content`` (names, sizes, times, settings; JSON values) describes."""
    key = hashlib.sha256(json.dumps([_FORMAT, *content]).encode()).hexdigest()[:32]
    return cache_folder() / f"{key}.npy"


def cached(path: Path) -> U8 | None:
    """The mapped file, or ``None`` where there is none that is whole."""
    try:
        return cast(U8, np.load(path, mmap_mode="r"))
    except (OSError, ValueError):
        return None


def stored(shape: tuple[int, ...], fill: Callable[[U8], None], path: Path | None) -> U8:
    """A uint8 array of ``shape`` that ``fill`` wrote: in memory, or mapped at ``path`` where memory does not suffice.

    Raises:
        InputError: the cache folder cannot be written or has no room.
    """
    size = math.prod(shape)
    if path is None or size <= available_memory() // 2:
        out = np.empty(shape, np.uint8)
        fill(out)
        return out
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        os.close(handle)
        mapped = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        with open(part, "r+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here and a crash in a mapped page
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            fill(mapped)
            mapped.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        part = None
    except OSError as error:
        room = f"{size / 2**30:.1f} GiB of decoded images do not fit in memory and not in {path.parent}"
        raise InputError(f"{room}: {error.strerror}; FASTGAN_CACHE names another folder") from None
    finally:
        if part is not None:
            os.unlink(part)
    return cast(U8, np.load(path, mmap_mode="r"))
