"""From image files and arrays of any kind to one uint8 array ``[N, C, H, W]``.

Resizing is Lanczos, after a box reduction where an image is more than three times too large; a crop is the largest
centred square. Transparent pixels lie on white, 16-bit greys keep their upper 8 bits, Exif orientation is applied.
Float arrays in ``[0, 1]`` or ``[-1, 1]`` are rounded to 8 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastgan.data.gather import U8
from fastgan.data.storage import cache_path, cached, stored
from fastgan.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
_ORIENTATION = 0x0112
_CHUNK = 64


@dataclass(frozen=True)
class Look:
    """What images are made into; ``None`` keeps what they are."""

    resolution: int | None = None
    channels: int | None = None
    crop: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image of ``height`` and ``width`` afterwards."""
        if self.resolution is not None:
            return self.resolution, self.resolution
        return (min(height, width),) * 2 if self.crop else (height, width)


@dataclass(frozen=True)
class Listing:
    """Image files of a folder or a zip.

    Attributes:
        where: the folder or zip, for messages.
        names: relative paths with ``/``, sorted.
        open: a file by its name.
        stamp: what changes when a file does.
    """

    where: str
    names: Sequence[str]
    open: Callable[[str], IO[bytes]]
    stamp: Callable[[str], list[int]]


def _one_line(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return (str(error) or type(error).__name__).splitlines()[0]


def _with_image(listing: Listing, name: str, use: Callable[[Image.Image], T]) -> T:
    from PIL import Image

    try:
        with listing.open(name) as file, Image.open(file) as image:
            return use(image)
    except InputError as error:
        raise InputError(f"{listing.where}/{name}: {error}") from None
    except Exception as error:  # Pillow's readers raise about every type there is
        raise InputError(f"{listing.where}/{name}: not a whole image ({_one_line(error)})") from None


def _orientation(image: Image.Image) -> int:
    # Only where the header holds it: for other formats Pillow would decode the whole image to look for it.
    return int(image.getexif().get(_ORIENTATION, 1)) if image.format in ("JPEG", "MPO", "TIFF", "WEBP") else 1


def _header(image: Image.Image) -> tuple[int, int, bool]:
    """Upright height and width, and whether the image is grey."""
    if image.mode == "F":
        raise InputError("floating-point pixels, expected 8 or 16 bits")
    width, height = image.size
    if _orientation(image) >= 5:
        width, height = height, width
    return height, width, image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def _fit(image: Image.Image, look: Look, channels: int) -> U8:
    """One image as uint8 ``[C, H, W]``."""
    from PIL import Image, ImageOps

    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if look.crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    height, width = look.size(image.height, image.width)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _each(n: int, what: str, work: Callable[[int], T]) -> list[T]:
    """``work`` of 0 … n-1 in threads (Pillow decodes without the interpreter lock), with a bar where it takes long."""
    from tqdm import tqdm

    def part(begin: int) -> list[T]:
        return [work(i) for i in range(begin, min(begin + _CHUNK, n))]

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        parts = pool.map(part, range(0, n, _CHUNK))
        bar = tqdm(parts, what, total=-(-n // _CHUNK), delay=2, leave=False, disable=None)
        return [item for items in bar for item in items]


def decode(listing: Listing, look: Look) -> U8:
    """All images of a listing, uint8 ``[N, C, H, W]``, in its order.

    Raises:
        InputError: a file that is no whole image; images of different sizes without a resolution.
    """
    names = listing.names
    settings = [look.resolution, look.channels, look.crop]
    where = str(Path(listing.where).resolve())
    path = cache_path(settings, where, [[name, *listing.stamp(name)] for name in names])
    if (known := cached(path)) is not None:
        return known
    headers = _each(len(names), "reading headers", lambda i: _with_image(listing, names[i], _header))
    sizes = [look.size(height, width) for height, width, _ in headers]
    for name, size in zip(names, sizes, strict=True):
        if size != sizes[0]:
            (h0, w0), (h1, w1) = sizes[0], size
            differ = f"{names[0]} is {w0}x{h0}, {name} is {w1}x{h1}"
            raise InputError(f"{listing.where}: images differ in size ({differ}); give a resolution")
    channels = look.channels or (1 if all(grey for *_, grey in headers) else 3)

    def fill(out: U8) -> None:
        def work(i: int) -> None:
            out[i] = _with_image(listing, names[i], lambda image: _fit(image, look, channels))

        _each(len(names), "decoding images", work)

    return stored((len(names), channels, *sizes[0]), fill, path)


def _quantiser(x: npt.NDArray[Any], name: str) -> Callable[[npt.NDArray[Any]], U8]:
    """How the values of ``x`` become uint8, decided by its dtype and range."""
    if x.dtype == np.uint8:
        return lambda part: part
    if x.dtype == np.bool_:
        return lambda part: part.astype(np.uint8) * np.uint8(255)
    low, high = x.min(), x.max()
    if x.dtype.kind in "iu":
        if low >= 0 and high <= 255:
            return lambda part: part.astype(np.uint8)
        if x.dtype == np.uint16:
            return lambda part: (part >> 8).astype(np.uint8)
        raise InputError(f"{name}: integer images hold {low} … {high}, expected 0 … 255")
    if not np.isfinite(low + high):
        bad = next(i for i, row in enumerate(x) if not np.isfinite(row).all())
        raise InputError(f"{name}: image {bad} holds a value that is not finite")
    slack = 1e-3  # overshoot of somebody's resizing
    if low < -1 - slack or high > 1 + slack:
        raise InputError(f"{name}: float images hold {low:g} … {high:g}, expected [-1, 1] or [0, 1]")
    scale, offset = (255.0, 0.0) if low >= -slack else (127.5, 127.5)
    return lambda part: np.rint(part.astype(np.float32) * scale + offset).clip(0, 255).astype(np.uint8)


def from_array(x: npt.NDArray[Any], name: str, look: Look, *, channels_first: bool, file: Path | None = None) -> U8:
    """An array of images as uint8 ``[N, C, H, W]``, a copy.

    Args:
        x: ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with 1 to 4 channels (2 and 4: the last is alpha);
            uint8, bool, integers in 0 … 255, uint16, or floats in ``[0, 1]`` or ``[-1, 1]``.
        name: for messages.
        look: what they are made into.
        channels_first: which to take where the shape admits both.
        file: where the array comes from: a set too large for memory is then mapped.

    Raises:
        InputError: no such array.
    """
    if x.ndim == 3:
        x = x[..., None]
    else:
        axes = (1, 3) if channels_first else (3, 1)
        axis = next((a for counts in ((1, 3), (2, 4)) for a in axes if x.shape[a] in counts), None)
        if axis is None:
            raise InputError(f"{name}: shape {x.shape} has no axis of 1 to 4 channels, second or last")
        x = np.moveaxis(x, axis, 3)
    n, height, width, found = x.shape
    if not x.size:
        raise InputError(f"{name}: images of shape {x.shape[1:]} have no pixels")
    to_uint8 = _quantiser(x, name)
    channels = look.channels or (1 if found <= 2 else 3)
    size = look.size(height, width)
    plain = size == (height, width) and found == channels

    def one(i: int) -> U8:
        from PIL import Image

        pixels = np.ascontiguousarray(to_uint8(x[i]))
        return _fit(Image.fromarray(pixels[..., 0] if found == 1 else pixels), look, channels)

    def fill(out: U8) -> None:
        def work(i: int) -> None:
            out[i] = one(i)

        if not plain:
            _each(n, "resizing images", work)
            return
        step = max(1, (1 << 22) // (height * width * found))
        for i in range(0, n, step):
            out[i : i + step] = to_uint8(x[i : i + step]).transpose(0, 3, 1, 2)

    path = None
    if file is not None:
        stat = file.stat()
        settings = [look.resolution, look.channels, look.crop]
        path = cache_path(settings, str(file.resolve()), name, stat.st_size, stat.st_mtime_ns)
        if (known := cached(path)) is not None:
            return known
    return stored((n, channels, *size), fill, path)
