"""Everything that :func:`open_dataset` reads."""

from __future__ import annotations

import csv
import gzip
import importlib.resources
import json
import math
import os
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from fastgan.data.dataset import Dataset
from fastgan.data.gather import I64
from fastgan.data.images import Listing, Look, decode, from_array
from fastgan.data.stream import Stream
from fastgan.data.toys import TOYS, draw
from fastgan.errors import InputError, unknown

Source = str | os.PathLike[str] | torch.Tensor | npt.NDArray[Any] | Iterable[Any]
Array = npt.NDArray[Any]

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_MOST_CLASSES = 1 << 20
_LARGEST = float(np.finfo(np.float32).max)
_IDX = re.compile(r"(ubyte|\.idx\d?)(\.gz)?$")
_KNOWN = "a folder or zip of images, .npy, .npz, .csv, .tsv, or IDX such as train-images-idx3-ubyte.gz"


def open_dataset(
    source: Source,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    crop: bool = False,
    mirror: bool = False,
) -> Dataset:
    """Open a data set.

    Args:
        source: one of

            - ``"digits"`` (1,797 grey 8x8 images with labels, part of the package), ``"gaussians25"``,
              ``"gaussians8"``;
            - a folder of image files: all in it (no labels), one folder per class, or any nesting with StyleGAN's
              ``dataset.json``; or a zip of the same;
            - ``.npy`` or ``.npz`` (array ``x`` or ``x_train``, labels ``y`` or ``y_train``): images ``[N, H, W]``,
              ``[N, H, W, C]`` or ``[N, C, H, W]``, or a table ``[N, D]``;
            - IDX images, also ``.gz``, with the labels file beside it;
            - a CSV of numbers, with or without a header;
            - a tensor or array, or a tuple of one and its labels; a table is taken as it is;
            - any iterable or DataLoader that gives batches: see :class:`fastgan.data.stream.Stream`.

            Images are kept as uint8: floats, in ``[0, 1]`` or ``[-1, 1]``, are rounded to 8 bits. Tables from files
            are standardised per column; ``denormalise`` takes that back.
        resolution: side of the square that images are resized to (Lanczos); ``None`` keeps their size.
        channels: 1 (grey) or 3 (RGB); ``None``: grey where all images are.
        crop: cut the largest centred square before resizing; otherwise resizing stretches.
        mirror: feeds mirror half of the images, left to right.

    Raises:
        InputError: one line that names the file or argument, what it was and what was expected.
    """
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels!r}, expected 1 or 3")
    if resolution is not None and (type(resolution) is not int or not 1 <= resolution <= 1 << 14):
        raise InputError(f"resolution is {resolution!r}, expected 1 … 16384 pixels")
    look = Look(resolution, channels, crop)
    data = _open(source, look, mirror)
    if data.kind == "table" and (look != Look() or mirror):
        raise InputError(f"{data.name} is a table: resolution, channels, crop and mirror are for images")
    return data


def _open(source: Source, look: Look, mirror: bool) -> Dataset:
    if isinstance(source, (str, os.PathLike)):
        try:
            return _named(os.fspath(source), look, mirror)
        except OSError as error:
            raise InputError(f"{error.filename or source}: {error.strerror or error}") from None
    if isinstance(source, (torch.Tensor, np.ndarray)):
        return _arrays(source, None, "tensor", look, mirror)
    if isinstance(source, tuple) and [isinstance(v, (torch.Tensor, np.ndarray)) for v in source] == [True, True]:
        return _arrays(source[0], source[1], "tensor", look, mirror)
    if isinstance(source, torch.utils.data.Dataset) and not isinstance(source, torch.utils.data.IterableDataset):
        raise InputError(f"{type(source).__name__} gives single samples: wrap it in a torch.utils.data.DataLoader")
    if not isinstance(source, Iterable):
        raise InputError(f"data is a {type(source).__name__}, expected a name, path, tensor or iterable of batches")
    stream = Stream(source, mirror=mirror)
    if stream.kind == "image":
        kept = (stream.shape[0], *look.size(*stream.shape[1:]))
        if kept != stream.shape or look.channels not in (None, stream.shape[0]):
            raise InputError(f"a stream of shape {stream.shape} cannot be resized, cropped or recoloured: do so in it")
    return stream


def _named(source: str, look: Look, mirror: bool) -> Dataset:
    if source == "digits":
        with importlib.resources.files("fastgan.data").joinpath("digits.npz").open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return _arrays(found["x"], found["y"], "digits", look, mirror)
    if source in TOYS:
        modes = TOYS[source]()
        return Dataset(source, draw(modes), mirror=mirror, modes=modes)
    path = Path(source).expanduser()
    name = re.sub(r"[^\w.-]+", "-", re.split(r"[.-]idx\d?|\.gz$", path.resolve().name)[0]).strip(".-") or "data"
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise InputError(f"{source}: no such file or folder")
        raise unknown("data", source, ["digits", *TOYS])
    suffix = path.suffix.lower()
    if path.is_dir():
        return _images(_folder(path), path / "dataset.json", name, look, mirror)
    stem = name[: -len(suffix)] if suffix and name.lower().endswith(suffix) else name
    if suffix == ".zip":
        return _zip(path, stem, look, mirror)
    if suffix in (".npy", ".npz"):
        x, y = _numpy(path)
        return _arrays(x, y, stem, look, mirror, path)
    if suffix in (".csv", ".tsv"):
        return _table(_csv(path), str(path), stem, None, ())
    if _IDX.search(path.name):
        return _arrays(_idx(path, images=True), _idx_labels(path), stem, look, mirror, path)
    raise InputError(f"{path}: unsupported ending {path.suffix!r}, expected {_KNOWN}")


def _arrays(
    x: torch.Tensor | Array,
    y: torch.Tensor | Array | None,
    name: str,
    look: Look,
    mirror: bool,
    file: Path | None = None,
) -> Dataset:
    where = name if file is None else str(file)
    channels_first = isinstance(x, torch.Tensor)
    x, y = _array(x), None if y is None else _array(y)
    if x.ndim not in (2, 3, 4) or x.dtype.kind not in "buif":
        raise InputError(
            f"{where}: an array of shape {x.shape} and type {x.dtype}, "
            "expected images [N, H, W], [N, H, W, C] or [N, C, H, W], or a table [N, D]"
        )
    if not x.size:
        raise InputError(f"{where}: holds no samples, its shape is {x.shape}")
    labels, class_names = (None, ()) if y is None else _classes(y, len(x), where)
    if x.ndim == 2:
        return _table(x, where, name, labels, class_names, standardise=file is not None)
    pixels = from_array(x, where, look, channels_first=channels_first, file=file)
    return Dataset(name, pixels, labels=labels, class_names=class_names, mirror=mirror)


def _array(x: torch.Tensor | Array) -> Array:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return x


def _classes(y: Array, n: int, where: str) -> tuple[I64, tuple[str, ...]]:
    """Labels as int64 ``[N]`` and the classes' names."""
    if y.shape == (n, 1):
        y = y[:, 0]
    if y.shape != (n,):
        raise InputError(f"{where}: labels have shape {y.shape}, expected ({n},)")
    if y.dtype.kind in "US":
        words, numbers = np.unique(y.astype(str), return_inverse=True)
        return numbers.astype(np.int64), tuple(words.tolist())
    if y.dtype.kind not in "buif" or not (np.isfinite(y).all() and (y == np.rint(y)).all()):
        raise InputError(f"{where}: labels of type {y.dtype} are no class numbers")
    if y.min() < 0 or y.max() >= _MOST_CLASSES:
        raise InputError(f"{where}: labels are {y.min()} … {y.max()}, expected class numbers from 0")
    labels = y.astype(np.int64)
    return labels, tuple(map(str, range(int(labels.max()) + 1)))


def _table(
    x: Array, where: str, name: str, labels: I64 | None, class_names: tuple[str, ...], standardise: bool = True
) -> Dataset:
    x = x.astype(np.float64)
    bad = np.argwhere(~(abs(x) <= _LARGEST))
    if len(bad):
        row, column = bad[0]
        value = x[row, column]
        expected = "a finite number" + f", at most {_LARGEST:.3g}" * bool(np.isfinite(value))
        raise InputError(f"{where}: row {row}, column {column} is {value}, expected {expected}")
    units = None
    if standardise:
        scale = x.std(axis=0)
        units = x.mean(axis=0), np.where(scale > 0, scale, 1.0)
        x = (x - units[0]) / units[1]
    table = torch.from_numpy(x.astype(np.float32))
    return Dataset(name, table, labels=labels, class_names=class_names, units=units)


def _numpy(path: Path) -> tuple[Array, Array | None]:
    try:
        with open(path, "rb") as file:
            if file.read(1) != b"P":
                return np.load(path, mmap_mode="r", allow_pickle=False), None
            file.seek(0)
            found = np.load(file, allow_pickle=False)
            key = next((k for k in ("x", "x_train") if k in found), None)
            if key is None:
                raise InputError(f"{path}: holds {', '.join(found) or 'nothing'}, expected an array x or x_train")
            label = key.replace("x", "y", 1)
            return found[key], found.get(label)
    except (InputError, OSError):
        raise
    except MemoryError:
        raise InputError(f"{path}: does not fit in memory; an .npy file would be mapped") from None
    except Exception as error:  # of a damaged file NumPy raises about every type there is
        reason = (
            "holds Python objects"
            if re.search("Object arrays|Python objects", str(error))
            else "cut short or no NumPy file"
        )
        raise InputError(f"{path}: {reason}, expected arrays of numbers") from None


def _csv(path: Path) -> Array:
    """A table of finite numbers, float64 ``[N, D]``."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            start, first = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (1, ""))
            delimiter = max("\t" if path.suffix.lower() == ".tsv" else ",", ";", "\t", key=first.count)
            fields = next(csv.reader([first], delimiter=delimiter), [])
            names = fields if fields and not any(_number(field) is not None for field in fields) else None
            start += names is not None  # the first line of numbers
            file.seek(0)
            values = array("d")
            width, lines = len(fields), 0
            reader = csv.reader(file, delimiter=delimiter)
            for row in reader:
                if not (row and fields) or reader.line_num < start:
                    continue
                if len(row) != width:
                    raise InputError(f"{path}: line {reader.line_num} has {len(row)} columns, expected {width}")
                try:
                    numbers = [float(field) for field in row]
                except ValueError:
                    numbers = [math.nan]
                if not math.isfinite(sum(numbers)):
                    for column, field in enumerate(row):
                        number = _number(field)
                        if number is None or not math.isfinite(number):
                            called = f"column {names[column].strip()!r}" if names else f"column {column + 1}"
                            at = f"line {reader.line_num}, {called}"
                            raise InputError(f"{path}: {at} is {field.strip()!r}, expected a finite number")
                values.extend(numbers)
                lines += 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a text table ({error})") from None
    if not lines:
        raise InputError(f"{path}: holds no rows of numbers")
    return np.frombuffer(values).reshape(lines, width)


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _idx(path: Path, *, images: bool) -> Array:
    """uint8 ``[N, H, W]`` images or ``[N]`` labels of an IDX file (LeCun's MNIST format)."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cut short or no gzip file ({error})") from None
    axes = 3 if images else 1
    what = "images" if images else "labels"
    if raw[:4] != bytes((0, 0, 8, axes)):
        raise InputError(f"{path}: starts with {raw[:4].hex() or 'nothing'}, expected {what} in IDX: 0000080{axes}")
    header = 4 + 4 * axes
    if len(raw) < header:
        raise InputError(f"{path}: is {len(raw)} bytes long, its header alone has {header}")
    shape = struct.unpack_from(f">{axes}I", raw, 4)
    if len(raw) - header != math.prod(shape):
        raise InputError(f"{path}: holds {len(raw) - header} bytes of data, its header says {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx_labels(path: Path) -> Array | None:
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    other = name[:-3] if name.endswith(".gz") else f"{name}.gz"
    found = next((path.with_name(n) for n in (name, other) if n != path.name and path.with_name(n).exists()), None)
    return None if found is None or found.name in (path.name, f"{path.name}.gz") else _idx(found, images=False)


def _folder(root: Path) -> Listing:
    def failed(error: OSError) -> None:
        raise error

    names, seen = [], set()
    for folder, folders, files in os.walk(root, onerror=failed, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(folder, f)) not in seen]
        names += [Path(folder, file).relative_to(root).as_posix() for file in files]

    def stamp(name: str) -> list[int]:
        stat = (root / name).stat()
        return [stat.st_size, stat.st_mtime_ns]

    return Listing(str(root), _only_images(names), lambda name: open(root / name, "rb"), stamp)


def _zip(path: Path, name: str, look: Look, mirror: bool) -> Dataset:
    with open(path, "rb") as raw:
        try:
            file = zipfile.ZipFile(raw)
            members = {member.filename: member for member in file.infolist()}
            index = file.read("dataset.json") if "dataset.json" in members else None
        except Exception as error:  # of a damaged file zipfile raises about every type there is
            raise InputError(f"{path}: not a whole zip file ({error})") from None

        def stamp(name: str) -> list[int]:
            return [members[name].file_size, members[name].CRC]

        def read(name: str) -> IO[bytes]:
            return file.open(members[name])

        return _images(Listing(str(path), _only_images(members), read, stamp), index, name, look, mirror)


def _only_images(names: Iterable[str]) -> list[str]:
    """Sorted; without hidden files and what macOS puts into its zips."""
    hidden = re.compile(r"(^|/)(\.|__MACOSX/)")
    return sorted(name for name in names if name.lower().endswith(_IMAGES) and not hidden.search(name))


def _images(listing: Listing, index: Path | bytes | None, name: str, look: Look, mirror: bool) -> Dataset:
    if isinstance(index, Path):
        index = index.read_bytes() if index.exists() else None
    told = None if index is None else _json_labels(index, listing)
    if not listing.names:
        raise InputError(f"{listing.where}: holds no images ({', '.join(_IMAGES)})")
    labels, class_names = told or _folder_labels(listing)
    return Dataset(name, decode(listing, look), labels=labels, class_names=class_names, mirror=mirror)


def _json_labels(text: bytes, listing: Listing) -> tuple[I64 | None, tuple[str, ...]]:
    """The labels of StyleGAN's ``{"labels": [["path", 6], ...]}``; ``None`` for ``{"labels": null}``."""
    where = f"{listing.where}: dataset.json"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise InputError(f'{where} has no "labels", expected {{"labels": [["path", 0], ...]}} or {{"labels": null}}')
    if content["labels"] is None:
        return None, ()
    entries = content["labels"]
    if not isinstance(entries, list):
        raise InputError(f'{where}: "labels" is {type(entries).__name__}, expected a list of ["path", 0] or null')
    known = set(listing.names)
    found: dict[str, int] = {}
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int):
            raise InputError(f'{where} has the entry {json.dumps(entry)[:80]}, expected ["path", class number]')
        file = entry[0].replace("\\", "/")
        if file not in known:
            raise InputError(f"{where} names {file!r}, which is not among the images")
        if not 0 <= entry[1] < _MOST_CLASSES:
            raise InputError(f"{where}: the label of {file!r} is {entry[1]}, expected a class number from 0")
        found[file] = entry[1]
    for name in listing.names:
        if name not in found:
            raise InputError(f"{where} has no label for {name!r}")
    if not found:
        return None, ()
    return _classes(np.array([found[name] for name in listing.names]), len(listing.names), where)


def _folder_labels(listing: Listing) -> tuple[I64 | None, tuple[str, ...]]:
    """One class per folder below the deepest that holds all images; no labels where that one holds them itself."""
    parents = [PurePosixPath(name).parent.parts for name in listing.names]
    depth = 0
    while len({parts[: depth + 1] for parts in parents}) == 1 and depth < len(parents[0]):
        depth += 1
    inside = [parts[depth] if len(parts) > depth else None for parts in parents]
    if None in inside:
        if any(inside):
            image, folder = listing.names[inside.index(None)], next(filter(None, inside))
            raise InputError(f"{listing.where}: an image, {image}, lies beside a folder of images, {folder}")
        return None, ()
    names = sorted(cast(set[str], set(inside)))
    numbers = {name: i for i, name in enumerate(names)}
    return np.array([numbers[cast(str, name)] for name in inside], np.int64), tuple(names)
