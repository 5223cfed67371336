"""What open_dataset reads, every mistake it names, and what a feed promises."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from fastgan import open_dataset
from fastgan.data import Dataset, Feed, storage
from fastgan.errors import InputError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)  # [N, H, W, C]
GREY = RGB[..., 0]
LABELS = np.array([0, 2, 1, 0, 1, 2])


def pixels(data: Dataset) -> np.ndarray:
    """All images, uint8 [N, H, W, C]."""
    return data.denormalise(data.batch(torch.arange(len(data)))[0])


def labels(data: Dataset) -> list[int] | None:
    found = data.batch(torch.arange(len(data)))[1]
    return None if found is None else found.tolist()


def png(image: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", **options)
    return out.getvalue()


def folder(root: Path, images: dict[str, bytes]) -> Path:
    for name, content in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


def idx(path: Path, values: np.ndarray) -> Path:
    content = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def message(source: object, **settings: object) -> str:
    """The one line that opening ``source`` ends in."""
    with pytest.raises(InputError) as caught:
        open_dataset(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


def test_digits():
    data = open_dataset("digits")
    assert (data.name, data.kind, data.shape, len(data), data.n_classes) == ("digits", "image", (1, 8, 8), 1797, 10)
    assert data.class_names == tuple("0123456789")
    assert data.modes is None
    x, y = data.batch(torch.tensor([0, 1, 2]))
    assert x.dtype == torch.float32
    assert x.min() == -1
    assert y.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("name", "modes", "sigma"), [("gaussians25", 25, 0.05), ("gaussians8", 8, 0.02)])
def test_toys(name, modes, sigma):
    data = open_dataset(name)
    x, y = data.batch(torch.arange(len(data)))
    assert (data.kind, data.shape, len(data), y) == ("table", (2,), 100_000, None)
    assert data.modes.centers.shape == (modes, 2)
    assert data.modes.sigma == sigma
    distance, nearest = torch.cdist(x, data.modes.centers).min(dim=1)
    assert distance.max() < 6 * sigma
    assert abs(distance.square().mean().sqrt().item() / (sigma * 2**0.5) - 1) < 0.01
    share = nearest.bincount(minlength=modes) / len(data)
    assert (share * modes - 1).abs().max() < 0.1
    np.testing.assert_array_equal(data.denormalise(x), x.numpy())
    assert torch.equal(x, open_dataset(name).batch(torch.arange(len(data)))[0])


def test_the_modes_of_the_toys():
    grid = {(a, b) for a in range(-4, 5, 2) for b in range(-4, 5, 2)}
    assert {tuple(c) for c in open_dataset("gaussians25").modes.centers.tolist()} == grid
    torch.testing.assert_close(open_dataset("gaussians8").modes.centers.norm(dim=1), torch.full((8,), 2.0))


# Arrays


@pytest.mark.parametrize("layout", ["N, H, W, C", "N, C, H, W", "N, H, W"])
@pytest.mark.parametrize("how", ["npy", "npz", "x_train", "tensor", "pair"])
def test_arrays(tmp_path, layout, how):
    array = {"N, H, W, C": RGB, "N, C, H, W": RGB.transpose(0, 3, 1, 2), "N, H, W": GREY}[layout]
    if how == "npy":
        np.save(tmp_path / "set.npy", array)
        data, expected, name = open_dataset(tmp_path / "set.npy"), None, "set"
    elif how in ("npz", "x_train"):
        keys = {"npz": ("x", "y"), "x_train": ("x_train", "y_train")}[how]
        np.savez(tmp_path / "set.npz", **dict(zip(keys, (array, LABELS[:, None]), strict=True)), other=np.zeros(3))
        data, expected, name = open_dataset(str(tmp_path / "set.npz")), LABELS.tolist(), "set"
    else:
        tensor = torch.from_numpy(array.copy())
        data = open_dataset(tensor if how == "tensor" else (tensor, torch.from_numpy(LABELS)))
        expected, name = None if how == "tensor" else LABELS.tolist(), "tensor"
    image = RGB if array.ndim == 4 else GREY[..., None]
    np.testing.assert_array_equal(pixels(data), image)
    assert data.shape == (image.shape[3], 5, 5)
    assert labels(data) == expected
    assert data.n_classes == (0 if expected is None else 3)
    assert data.name == name


@pytest.mark.parametrize(
    "array",
    [
        GREY.astype(np.int64),
        GREY.astype(np.uint16),
        GREY.astype(np.uint16) * 257,
        GREY / 255,
        (GREY / 127.5 - 1).astype(np.float32),
        GREY / 127.5 - 1 + 1e-4,
        torch.from_numpy(GREY / 255).float(),
    ],
)
def test_values_of_every_type_become_the_same_images(array):
    np.testing.assert_array_equal(pixels(open_dataset(array))[..., 0], GREY)


def test_bool_and_bfloat16_images():
    assert set(pixels(open_dataset(GREY > 99)).ravel().tolist()) == {0, 255}
    assert pixels(open_dataset(torch.ones(2, 3, 3, dtype=torch.bfloat16))).min() == 255


def test_arrays_with_alpha_lie_on_white():
    alpha = np.concatenate([RGB, np.zeros_like(RGB[..., :1])], axis=3)
    alpha[0, ..., 3] = 255
    found = pixels(open_dataset(alpha))
    np.testing.assert_array_equal(found[0], RGB[0])
    assert (found[1:] == 255).all()
    grey = pixels(open_dataset(np.stack([GREY, np.full_like(GREY, 255)], axis=3)))
    np.testing.assert_array_equal(grey[..., 0], GREY)


def test_a_tensor_is_not_shared_with_the_data_set():
    x = torch.from_numpy(RGB.transpose(0, 3, 1, 2).copy())
    data = open_dataset(x)
    x.zero_()
    np.testing.assert_array_equal(pixels(data), RGB)


def test_words_as_labels(tmp_path):
    np.savez(tmp_path / "set.npz", x=RGB, y=np.array(["cat", "dog", "ant", "cat", "ant", "dog"]))
    data = open_dataset(tmp_path / "set.npz")
    assert data.class_names == ("ant", "cat", "dog")
    assert labels(data) == [1, 2, 0, 1, 0, 2]


def test_tables(tmp_path):
    table = RNG.normal(5, 30, (50, 4))
    table[:, 2] = 7.0  # constant
    np.savez(tmp_path / "table.npz", x=table, y=np.arange(50) % 3)
    data = open_dataset(tmp_path / "table.npz")
    x, y = data.batch(torch.arange(50))
    assert (data.kind, data.shape, data.n_classes) == ("table", (4,), 3)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(0, unbiased=False), torch.tensor([1.0, 1, 0, 1]))
    np.testing.assert_allclose(data.denormalise(x), table, rtol=1e-5, atol=1e-5)
    assert y.tolist() == [i % 3 for i in range(50)]
    taken = torch.randn(20, 3)
    assert torch.equal(open_dataset(taken).batch(torch.arange(20))[0], taken)  # a tensor is taken as it is


# CSV


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n3,4.5\n", "1;2\n3;4.5\n", '\ufeff"a","b"\r\n1,2\r\n\r\n3,4.5', "1\t2\n3\t4.5"]
)
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_csv(tmp_path, text, ending):
    path = tmp_path / f"numbers.{ending}"
    path.write_text(text.replace(",", "\t") if ending == "tsv" else text, encoding="utf-8")
    data = open_dataset(path)
    x, _ = data.batch(torch.arange(2))
    np.testing.assert_allclose(x, [[-1, -1], [1, 1]], atol=1e-6)
    np.testing.assert_allclose(data.denormalise(x), [[1, 2], [3, 4.5]], rtol=1e-6)
    assert data.name == "numbers"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("age,size\n1,2\n3,nan\n", "line 3, column 'size' is 'nan', expected a finite number"),
        ("age,size\n1,2\n\n-inf,4\n", "line 4, column 'age' is '-inf', expected a finite number"),
        ("1,2\n3,four\n", "line 2, column 2 is 'four', expected a finite number"),
        ("1,2\n3,\n", "line 2, column 2 is '', expected a finite number"),
        ("age,7\n1,2\n", "line 1, column 1 is 'age', expected a finite number"),
        ("age,size\n1,2\n3,4,5\n", "line 3 has 3 columns, expected 2"),
        ("age,size\n", "holds no rows of numbers"),
        ("", "holds no rows of numbers"),
        ("\n \n", "holds no rows of numbers"),
        ("\n\nage,size\n1,2\n3,x\n", "line 5, column 'size' is 'x', expected a finite number"),
        ("1,1e308\n2,-1e308\n", "row 0, column 1 is 1e+308, expected a finite number, at most 3.4e+38"),
    ],
)
def test_csv_mistakes(tmp_path, text, expected):
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert message(path) == f"{path}: {expected}"


@pytest.mark.parametrize("text", ["\n1,2\n3,4\n", "\r\n \r\na,b\r\n1,2\r\n\r\n3,4\r\n"])
def test_blank_lines_of_a_csv_are_skipped(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    data = open_dataset(path)
    np.testing.assert_allclose(data.denormalise(data.batch(torch.arange(2))[0]), [[1, 2], [3, 4]], rtol=1e-6)


def test_csv_that_is_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x01\xff" * 9)
    assert message(tmp_path / "t.csv").startswith(f"{tmp_path}/t.csv: not a text table (")


# IDX


@pytest.mark.parametrize("images", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
@pytest.mark.parametrize("zipped_labels", [False, True])
def test_idx(tmp_path, images, zipped_labels):
    path = idx(tmp_path / images, GREY)
    assert open_dataset(path).n_classes == 0
    stem = images.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    idx(tmp_path / (stem + ".gz" * zipped_labels), LABELS.astype(np.uint8))
    data = open_dataset(path)
    np.testing.assert_array_equal(pixels(data)[..., 0], GREY)
    assert labels(data) == LABELS.tolist()
    assert data.name == "train-images"


def test_idx_mistakes(tmp_path):
    path = idx(tmp_path / "train-images-idx3-ubyte", GREY)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert message(path) == f"{path}: holds 143 bytes of data, its header says (6, 5, 5)"
    path.write_bytes(whole[:9])
    assert message(path) == f"{path}: is 9 bytes long, its header alone has 16"
    path.write_bytes(b"what is this")
    assert message(path) == f"{path}: starts with 77686174, expected images in IDX: 00000803"
    path.write_bytes(whole)
    other = idx(tmp_path / "train-labels-idx1-ubyte", LABELS[:5].astype(np.uint8))
    assert message(path) == f"{path}: labels have shape (5,), expected (6,)"
    assert message(other) == f"{other}: starts with 00000801, expected images in IDX: 00000803"
    squeezed = idx(tmp_path / "test-images-idx3-ubyte.gz", GREY)
    squeezed.write_bytes(squeezed.read_bytes()[:-20])
    assert message(squeezed).startswith(f"{squeezed}: cut short or no gzip file (")


# Array mistakes


def test_numpy_files_that_are_none(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=RGB)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"PK\x03\x04nothing", b"hello"):
        path.write_bytes(content)
        assert message(path) == f"{path}: cut short or no NumPy file, expected arrays of numbers"
    path.write_bytes(bytes(b ^ 255 if 300 < i < 330 else b for i, b in enumerate(whole)))  # a wrong checksum
    assert message(path) == f"{path}: cut short or no NumPy file, expected arrays of numbers"
    np.save(tmp_path / "x.npy", RGB)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-9])
    assert message(tmp_path / "x.npy").startswith(f"{tmp_path}/x.npy: cut short")


def test_object_arrays_are_never_unpickled(tmp_path):
    for name in ("o.npz", "o.npy"):
        path = tmp_path / name
        bad = np.array([{"a": 1}, None], dtype=object)
        np.savez(path, x=bad) if name == "o.npz" else np.save(path, bad)
        assert message(path) == f"{path}: holds Python objects, expected arrays of numbers"


def test_npz_without_images(tmp_path):
    np.savez(tmp_path / "a.npz", images=RGB, y=LABELS)
    assert message(tmp_path / "a.npz") == f"{tmp_path}/a.npz: holds images, y, expected an array x or x_train"


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros(5), "an array of shape (5,) and type float64, expected images"),
        (np.zeros((2, 3, 4, 5, 6)), "an array of shape (2, 3, 4, 5, 6)"),
        (np.zeros((2, 3), complex), "an array of shape (2, 3) and type complex128"),
        (np.array([["a", "b"]]), "an array of shape (1, 2) and type <U1"),
        (np.zeros((0, 5, 5)), "holds no samples, its shape is (0, 5, 5)"),
        (np.zeros((4, 0)), "holds no samples, its shape is (4, 0)"),
        (np.zeros((2, 7, 8, 9)), "shape (2, 7, 8, 9) has no axis of 1 to 4 channels"),
        (np.full((2, 5, 5), 300), "integer images hold 300 … 300, expected 0 … 255"),
        (np.full((2, 5, 5), -2.0), "float images hold -2 … -2, expected [-1, 1] or [0, 1]"),
        (np.full((2, 5, 5), 255.0), "float images hold 255 … 255, expected [-1, 1] or [0, 1]"),
        (np.array([[[0.5]], [[np.nan]]]), "image 1 holds a value that is not finite"),
        (np.array([[0.5, 1], [2, np.inf]]), "row 1, column 1 is inf, expected a finite number"),
    ],
)
def test_arrays_that_are_no_data(array, expected, tmp_path):
    assert message(array).startswith(f"tensor: {expected}")
    np.save(tmp_path / "a.npy", array)
    assert message(tmp_path / "a.npy").startswith(f"{tmp_path}/a.npy: {expected}")


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (LABELS[:4], "labels have shape (4,), expected (6,)"),
        (np.eye(6), "labels have shape (6, 6), expected (6,)"),
        (LABELS - 1, "labels are -1 … 1, expected class numbers from 0"),
        (LABELS * 2**40, "labels are 0 … 2199023255552, expected class numbers from 0"),
        (LABELS + 0.5, "labels of type float64 are no class numbers"),
        (LABELS * np.nan, "labels of type float64 are no class numbers"),
    ],
)
def test_label_mistakes(tmp_path, bad, expected):
    np.savez(tmp_path / "a.npz", x=RGB, y=bad)
    assert message(tmp_path / "a.npz") == f"{tmp_path}/a.npz: {expected}"


# Image files


def test_a_flat_folder(tmp_path):
    files = {f"{i}.png": png(image) for i, image in enumerate(RGB)}
    data = open_dataset(folder(tmp_path / "My Pictures", files | {"notes.txt": b"x", ".hidden.png": b"x"}))
    np.testing.assert_array_equal(pixels(data), RGB)
    assert (data.name, data.n_classes, labels(data)) == ("My-Pictures", 0, None)


def nested(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{'cat' if i % 2 else 'ant'}/deep/{i}.png": png(image) for i, image in enumerate(RGB)}


@pytest.mark.parametrize("how", ["folder", "zip", "zip of a folder"])
def test_class_folders(tmp_path, how):
    if how == "folder":
        data = open_dataset(folder(tmp_path / "set", nested()))
    else:
        data = open_dataset(zipped(tmp_path / "set.zip", nested("top/" if how != "zip" else "")))
    np.testing.assert_array_equal(pixels(data), RGB[[0, 2, 4, 1, 3, 5]])
    assert data.class_names == ("ant", "cat")
    assert labels(data) == [0, 0, 0, 1, 1, 1]
    assert data.name == "set"


@pytest.mark.parametrize("how", ["folder", "zip"])
@pytest.mark.parametrize("labelled", [True, False])
def test_stylegan_json(tmp_path, how, labelled):
    files = {f"0000{i % 2}/img{i}.png": png(image) for i, image in enumerate(RGB)}
    entries = [[name, int(name[-5]) % 3] for name in reversed(files)]
    files["dataset.json"] = json.dumps({"labels": entries if labelled else None}).encode()
    make = (lambda f: folder(tmp_path / "s", f)) if how == "folder" else (lambda f: zipped(tmp_path / "s.zip", f))
    data = open_dataset(make(files))
    np.testing.assert_array_equal(pixels(data), RGB[[0, 2, 4, 1, 3, 5]])
    assert labels(data) == ([0, 2, 1, 1, 0, 2] if labelled else None)
    assert data.n_classes == (3 if labelled else 0)


@pytest.mark.parametrize("how", ["folder", "zip"])
def test_many_images_in_several_threads(tmp_path, how):
    images = RNG.integers(0, 256, (300, 6, 4), dtype=np.uint8)
    files = {f"{i:03}.png": png(image) for i, image in enumerate(images)}
    path = folder(tmp_path / "s", files) if how == "folder" else zipped(tmp_path / "s.zip", files)
    np.testing.assert_array_equal(pixels(open_dataset(path))[..., 0], images)


def test_linked_class_folders(tmp_path):
    folder(tmp_path / "real", {"0.png": png(RGB[0])})
    folder(tmp_path / "set", {"b/1.png": png(RGB[1])})
    (tmp_path / "set" / "a").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    data = open_dataset(tmp_path / "set")
    np.testing.assert_array_equal(pixels(data), RGB[:2])
    assert data.class_names == ("a", "b")


def test_every_kind_of_pixel(tmp_path):
    rgb, grey = Image.fromarray(RGB[0]), Image.fromarray(GREY[0])
    clear = Image.fromarray(np.concatenate([RGB[0], np.zeros((5, 5, 1), np.uint8)], axis=2))
    palette = Image.fromarray(np.tile(np.arange(5, dtype=np.uint8), (5, 1)), mode="L").convert("P")
    palette.putpalette([200, 10, 30] * 5)
    rgb.save(tmp_path / "0.png")
    grey.save(tmp_path / "1.png")
    clear.save(tmp_path / "2.png")
    palette.save(tmp_path / "3.png")
    palette.save(tmp_path / "4.png", transparency=bytes(5))
    Image.fromarray(GREY[0].astype(np.uint16) * 256 + 77).save(tmp_path / "5.png")
    grey.point(lambda v: 255 * (v > 99)).convert("1").save(tmp_path / "6.png")
    rgb.save(tmp_path / "7.bmp")
    grey.convert("LA").save(tmp_path / "8.png")
    rgb.convert("CMYK").save(tmp_path / "9.tif")
    found = pixels(open_dataset(tmp_path))
    grey3 = np.repeat(GREY[0][..., None], 3, axis=2)
    expected = [
        RGB[0],
        grey3,
        np.full_like(RGB[0], 255),
        np.full_like(RGB[0], [200, 10, 30]),
        np.full_like(RGB[0], 255),
    ]
    expected += [grey3, 255 * (grey3 > 99), RGB[0], grey3, RGB[0]]
    for i, (image, wanted) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(image, wanted, err_msg=str(i))


def test_greys_stay_grey(tmp_path):
    folder(tmp_path, {"0.png": png(GREY[0]), "1.png": png(GREY[1].astype(np.uint16) * 257)})
    np.testing.assert_array_equal(pixels(open_dataset(tmp_path))[..., 0], GREY[:2])
    assert open_dataset(tmp_path, channels=3).shape == (3, 5, 5)


def test_exif_orientation(tmp_path):
    image = Image.fromarray(np.repeat(np.repeat(RGB[0], 8, 0), 16, 1))  # 40 high, 80 wide
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "0.jpg", exif=exif, quality=100, subsampling=0)
    data = open_dataset(tmp_path)
    assert data.shape == (3, 80, 40)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert abs(pixels(data)[0].astype(int) - upright).mean() < 3


@pytest.mark.parametrize("source", ["array", "files"])
def test_resolution_crop_and_channels(tmp_path, source):
    wide = np.zeros((2, 40, 100, 3), np.uint8)
    wide[:, :, 30:70] = [255, 0, 0]  # the middle 40 x 40 is red
    if source == "files":
        folder(tmp_path, {f"{i}.png": png(image) for i, image in enumerate(wide)})
    where = wide if source == "array" else tmp_path
    assert open_dataset(where).shape == (3, 40, 100)
    cropped = open_dataset(where, crop=True)
    assert cropped.shape == (3, 40, 40)
    assert (pixels(cropped) == [255, 0, 0]).all()
    small = open_dataset(where, crop=True, resolution=16, channels=1)
    assert small.shape == (1, 16, 16)
    assert (pixels(small) == 76).all()  # the luma of red
    stretched = pixels(open_dataset(where, resolution=10))
    assert stretched.shape == (2, 10, 10, 3)
    assert (stretched[:, :, 4:6, 0] == 255).all()
    assert (stretched[:, :, :2] <= 2).all()


def test_resizing_filters_what_it_cannot_show():
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    for resolution in (32, 8):
        found = pixels(open_dataset(board[None].astype(np.uint8), resolution=resolution))
        assert abs(found.astype(int) - 127).max() <= 8


def test_images_of_different_sizes(tmp_path):
    folder(tmp_path, {"a.png": png(RGB[0]), "b.png": png(RGB[1][:3])})
    differ = "images differ in size (a.png is 5x5, b.png is 5x3); give a resolution"
    assert message(tmp_path) == f"{tmp_path}: {differ}"
    assert message(tmp_path, crop=True).startswith(f"{tmp_path}: images differ in size (a.png is 5x5, b.png is 3x3)")
    assert open_dataset(tmp_path, resolution=4).shape == (3, 4, 4)


def test_broken_images(tmp_path):
    noise = png(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    folder(tmp_path, {"a.png": noise, "b.png": noise})
    for keep in (0, 5, 20, 40, 60, len(noise) // 2, len(noise) - 40):
        (tmp_path / "b.png").write_bytes(noise[:keep])
        assert message(tmp_path).startswith(f"{tmp_path}/b.png: not a whole image ("), keep
    (tmp_path / "b.png").write_bytes(b"GIF is what this is not")
    assert message(tmp_path) == f"{tmp_path}/b.png: not a whole image (unknown format)"
    (tmp_path / "b.png").write_bytes(noise[:1000] + bytes(50) + noise[1050:])
    assert message(tmp_path).startswith(f"{tmp_path}/b.png: not a whole image (")
    path = zipped(tmp_path / "z.zip", {"a.png": noise, "x/b.png": noise[:999]})
    assert message(path).startswith(f"{path}: an image, a.png, lies beside a folder of images, x")
    path = zipped(tmp_path / "z.zip", {"a.png": noise, "b.png": noise[:999]})
    assert message(path).startswith(f"{path}/b.png: not a whole image (")


def test_floating_point_pixels(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "0.tif")
    assert message(tmp_path) == f"{tmp_path}/0.tif: floating-point pixels, expected 8 or 16 bits"


def test_empty_places(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    assert message(tmp_path).startswith(f"{tmp_path}: holds no images (.png, ")
    path = zipped(tmp_path / "z.zip", {"readme.txt": b""})
    assert message(path).startswith(f"{path}: holds no images (")


def test_broken_zips(tmp_path):
    path = zipped(tmp_path / "z.zip", nested())
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert message(path).startswith(f"{path}: not a whole zip file (")
    at = whole.index(b"IDAT") + 8
    path.write_bytes(whole[:at] + b"!!" + whole[at + 2 :])
    assert message(path).startswith(f"{path}/ant/deep/0.png: not a whole image (Bad CRC-32")


@pytest.mark.parametrize("how", ["folder", "zip"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"labels": [', "is not JSON ("),
        (b"\xff\xfe\xff", "is not JSON ("),
        ("[" * 100_000, "is not JSON ("),
        ("[]", 'has no "labels", expected {"labels": [["path", 0], ...]} or {"labels": null}'),
        ("{}", 'has no "labels", expected'),
        ('{"labels": {"a.png": 1}}', '"labels" is dict, expected a list of ["path", 0] or null'),
        ('{"labels": [["a.png"]]}', 'has the entry ["a.png"], expected ["path", class number]'),
        ('{"labels": [["a.png", [1, 0]]]}', 'has the entry ["a.png", [1, 0]], expected ["path", class number]'),
        ('{"labels": [["a.png", true]]}', 'has the entry ["a.png", true], expected'),
        ('{"labels": [["a.png", -1]]}', ": the label of 'a.png' is -1, expected a class number from 0"),
        ('{"labels": [["a.png", 0], ["c.png", 1]]}', "names 'c.png', which is not among the images"),
        ('{"labels": [["a.png", 0]]}', "has no label for 'b.png'"),
    ],
)
def test_bad_json(tmp_path, how, text, expected):
    content = text if isinstance(text, bytes) else text.encode()
    files = {"a.png": png(RGB[0]), "b.png": png(RGB[1]), "dataset.json": content}
    path = folder(tmp_path / "s", files) if how == "folder" else zipped(tmp_path / "s.zip", files)
    got = message(path)
    assert got.replace("json :", "json:").startswith(f"{path}: dataset.json")
    assert expected in got


def test_bad_json_is_named_before_missing_images(tmp_path):
    path = zipped(tmp_path / "s.zip", {"dataset.json": b"{not json"})
    assert message(path).startswith(f"{path}: dataset.json is not JSON (")
    path = zipped(tmp_path / "t.zip", {"dataset.json": b'{"labels": []}'})
    assert message(path).startswith(f"{path}: holds no images (")


# Names, endings and settings


def test_what_is_not_there(tmp_path):
    assert message(tmp_path / "no" / "such.npz") == f"{tmp_path}/no/such.npz: no such file or folder"
    assert message("mnist.npz") == "mnist.npz: no such file or folder"
    expected = "unknown data 'digit'; did you mean 'digits'? (known: digits, gaussians25, gaussians8)"
    assert message("digit") == expected


def test_unsupported_endings(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert message(tmp_path / "a.parquet").startswith(
        f"{tmp_path}/a.parquet: unsupported ending '.parquet', expected a "
    )
    (tmp_path / "a.png").write_bytes(png(RGB[0]))
    assert "unsupported ending '.png', expected a folder or zip of images" in message(tmp_path / "a.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    np.save(tmp_path / "a.npy", RGB)
    (tmp_path / "a.npy").chmod(0)
    assert message(tmp_path / "a.npy") == f"{tmp_path}/a.npy: Permission denied"


@pytest.mark.parametrize(
    ("source", "settings", "expected"),
    [
        ("digits", {"channels": 2}, "channels is 2, expected 1 or 3"),
        ("digits", {"resolution": 0}, "resolution is 0, expected 1 … 16384 pixels"),
        ("digits", {"resolution": 8.5}, "resolution is 8.5, expected"),
        (
            "gaussians25",
            {"resolution": 8},
            "gaussians25 is a table: resolution, channels, crop and mirror",
        ),
        ("gaussians8", {"mirror": True}, "gaussians8 is a table: "),
        (7, {}, "data is a int, expected a name, path, tensor or iterable of batches"),
    ],
)
def test_bad_settings(source, settings, expected):
    assert message(source, **settings).startswith(expected)


# Where images lie


@pytest.fixture
def little_memory(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "available_memory", lambda: 10)
    return tmp_path / "cache"


@pytest.mark.parametrize("how", ["folder", "zip", "npz"])
def test_a_set_too_large_for_memory_is_mapped(tmp_path, little_memory, monkeypatch, how):
    if how == "npz":
        path = tmp_path / "s.npz"
        np.savez(path, x=RGB)
    else:
        files = {f"{i}.png": png(image) for i, image in enumerate(RGB)}
        path = folder(tmp_path / "s", files) if how == "folder" else zipped(tmp_path / "s.zip", files)
    data = open_dataset(path)
    assert isinstance(data._rows.base, np.memmap) or isinstance(data._rows, np.memmap)
    np.testing.assert_array_equal(pixels(data), RGB)
    assert [p.suffix for p in little_memory.iterdir()] == [".npy"]
    feed = data.feed(4, 0)
    monkeypatch.setattr("fastgan.data.images._fit", None)  # not decoded again
    again = open_dataset(path)
    assert again.fingerprint == data.fingerprint
    assert torch.equal(next(again.feed(4, 0))[0], next(feed)[0])


def test_a_changed_set_is_decoded_again(tmp_path, little_memory):
    path = folder(tmp_path / "s", {"0.png": png(RGB[0]), "1.png": png(RGB[1])})
    open_dataset(path)
    (path / "1.png").write_bytes(png(RGB[2]))
    np.testing.assert_array_equal(pixels(open_dataset(path)), RGB[[0, 2]])
    assert open_dataset(path, channels=1).shape == (1, 5, 5)
    assert len(list(little_memory.iterdir())) == 3


def test_folders_of_files_that_look_the_same_are_not_each_other(tmp_path, little_memory):
    for i in range(2):
        path = folder(tmp_path / str(i), {f"{n}.ppm": b"P6 5 5 255\n" + RGB[i].tobytes() for n in "ab"})
        for file in path.iterdir():
            os.utime(file, (1, 1))
        np.testing.assert_array_equal(pixels(open_dataset(path)), RGB[[i, i]])


def test_a_mapped_file_cut_short_is_made_again(tmp_path, little_memory):
    path = folder(tmp_path / "s", {"0.png": png(RGB[0]), "1.png": png(RGB[1])})
    open_dataset(path)
    mapped = next(little_memory.iterdir())
    mapped.write_bytes(mapped.read_bytes()[:-50])
    np.testing.assert_array_equal(pixels(open_dataset(path)), RGB[:2])


def test_nothing_is_left_of_a_failed_decoding(tmp_path, little_memory):
    noise = png(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = folder(tmp_path / "s", {"0.png": noise, "1.png": noise[:-500]})
    assert message(path).startswith(f"{path}/1.png: not a whole image")
    assert list(little_memory.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, little_memory):
    little_memory.write_text("a file, not a folder")
    path = folder(tmp_path / "s", {"0.png": png(RGB[0]), "1.png": png(RGB[1])})
    got = message(path)
    assert f"not in {little_memory}: " in got
    assert got.endswith("; FASTGAN_CACHE names another folder")


def test_available_memory(monkeypatch):
    assert 1 << 20 < storage.available_memory() < 1 << 50  # of this machine
    files = {
        "/proc/meminfo": "MemTotal: 900 kB\nMemAvailable:    500 kB\n",
        "/sys/fs/cgroup/memory.max": "300000\n",
        "/sys/fs/cgroup/memory.current": "200000\n",
        "/sys/fs/cgroup/memory.stat": "anon 20000\ninactive_file 150000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    assert storage.available_memory() == 250_000  # a container
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert storage.available_memory() == 512_000


# Data sets


def test_batch_mirrors_and_checks():
    data = open_dataset((torch.from_numpy(RGB), torch.from_numpy(LABELS)))
    x, y = data.batch(torch.tensor([3, 3]), torch.tensor([False, True]))
    assert torch.equal(x[1], x[0].flip(-1))
    assert not torch.equal(x[1], x[0])
    assert y.tolist() == [0, 0]
    assert data.batch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 3, 5, 5)
    strided = torch.tensor([5, 0, 1, 0])[::2]
    assert torch.equal(data.batch(strided)[0], data.batch(strided.clone())[0])
    for bad in (-1, 6):
        with pytest.raises(IndexError):
            data.batch(torch.tensor([bad]))
        with pytest.raises(IndexError):
            open_dataset(RGB).batch(torch.tensor([bad]))
        with pytest.raises(IndexError):
            open_dataset(torch.zeros(6, 2)).batch(torch.tensor([bad]))


def test_the_reference_gives_the_same_batches(monkeypatch):
    def first(data: Dataset) -> torch.Tensor:
        return next(data.feed(32, 1))[0].clone()

    data = open_dataset("digits", mirror=True)
    native = first(data)
    monkeypatch.setattr("fastgan.data.gather.ext", None)
    assert torch.equal(first(data), native)


def test_denormalise_clamps_and_takes_any_device_and_dtype():
    data = open_dataset(RGB)
    x = torch.full((1, 3, 5, 5), 7.0, dtype=torch.bfloat16, requires_grad=True)
    assert (data.denormalise(x) == 255).all()
    assert (data.denormalise(torch.full((1, 3, 5, 5), float("nan"))) == 128).all()
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 5, 4\)"):
        data.denormalise(torch.zeros(1, 3, 5, 4))


def test_the_fingerprint_is_of_the_content():
    prints = [
        open_dataset(RGB).fingerprint,
        open_dataset(RGB[::-1].copy()).fingerprint,
        open_dataset((RGB, LABELS)).fingerprint,
        open_dataset(GREY).fingerprint,
        open_dataset(RGB, channels=1).fingerprint,
        open_dataset(torch.zeros(3, 2)).fingerprint,
        open_dataset("gaussians8").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert open_dataset(RGB.transpose(0, 3, 1, 2)).fingerprint == prints[0]
    assert all(len(p) == 64 and int(p, 16) >= 0 for p in prints)


# Feeds


def which(data: Dataset, x: torch.Tensor) -> list[int]:
    """The samples' numbers; every image of the data set says its own in its left column, as 256 a + b."""
    p = data.denormalise(x)[..., 0].astype(int)
    return (p[:, 0, 0] * 256 + p[:, 1, 0]).tolist()


def numbered(n: int, mirror: bool = False) -> Dataset:
    x = np.zeros((n, 2, 1), np.uint8)
    x[:, 0, 0], x[:, 1, 0] = np.arange(n) // 256, np.arange(n) % 256
    return open_dataset((x, np.arange(n) % 5), mirror=mirror)


@pytest.mark.parametrize(("n", "batch"), [(1, 1), (7, 3), (10, 10), (100, 33), (20_000, 9_999)])
def test_every_pass_visits_each_sample_once(n, batch):
    data = numbered(n)
    feed = data.feed(batch, seed=3)
    seen: list[int] = []
    while len(seen) < 3 * n:
        x, y = next(feed)
        assert x.shape == (batch, 1, 2, 1)
        seen += which(data, x)
        assert y.tolist() == [i % 5 for i in seen[-batch:]]
    passes = [seen[k * n : (k + 1) * n] for k in range(3)]
    assert all(sorted(p) == list(range(n)) for p in passes)
    if n > 9:
        assert passes[0] != passes[1] != passes[2]
        assert passes[0] != list(range(n))


def test_the_order_depends_on_the_seed_alone():
    data = numbered(50)
    first = [which(data, next(data.feed(50, seed))[0]) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_order_and_mirroring_do_not_depend_on_the_batch_size():
    data = open_dataset("digits", mirror=True)
    whole = next(data.feed(1000, 5))[0]
    feed = data.feed(37, 5)
    parts = torch.cat([next(feed)[0].clone() for _ in range(28)])
    assert torch.equal(parts[:1000], whole)
    far = data.feed(40, 5)
    far.load_state_dict({"position": (1 << 14) - 20})  # across two blocks
    near = data.feed(20, 5)
    near.load_state_dict({"position": (1 << 14)})
    assert torch.equal(next(far)[0][20:], next(near)[0])


def test_half_of_the_images_are_mirrored_and_not_the_same_half():
    x = np.zeros((100, 1, 2), np.uint8)
    x[:, 0, 0] = 255
    feed = open_dataset(x, mirror=True).feed(100, 0)
    flipped = torch.stack([next(feed)[0][:, 0, 0, 0] < 0 for _ in range(40)]).float()
    assert abs(flipped.mean().item() - 0.5) < 0.03  # 4 standard deviations
    assert abs(flipped.mean(1) - 0.5).max() < 0.25
    assert not torch.equal(flipped[0], flipped[1])
    plain = open_dataset(x).feed(100, 0)
    assert (next(plain)[0][:, 0, 0, 0] == 1).all()


@pytest.mark.parametrize("name", ["digits", "gaussians25"])
def test_a_feed_resumes_to_the_bit(name):
    data = open_dataset(name, mirror=name == "digits")
    feed = data.feed(300, seed=2)
    for _ in range(9):
        next(feed)
    state = json.loads(json.dumps(feed.state_dict()))
    assert state == {"position": 2700}
    expected = [next(feed)[0].clone() for _ in range(3)]
    again = open_dataset(name, mirror=name == "digits").feed(300, seed=2)
    again.load_state_dict(state)
    for x in expected:
        assert torch.equal(next(again)[0], x)


def test_a_batch_that_is_kept_stays_what_it_was():
    feed = open_dataset("digits").feed(16, 0)
    kept = [next(feed)[0] for _ in range(12)]
    views = [next(feed)[0][3, 0, 2:] for _ in range(12)]
    copies = [k.clone() for k in kept], [v.clone() for v in views]
    for _ in range(30):
        next(feed)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(views, copies[1], strict=True))


def test_a_batch_that_is_dropped_is_written_again():
    feed = open_dataset("digits").feed(16, 0)
    places = {next(feed)[0].data_ptr() for _ in range(20)}
    assert len(places) <= 2


@pytest.mark.parametrize("batch", [0, -3, 6])
def test_a_batch_the_data_set_does_not_have(batch):
    with pytest.raises(InputError, match=rf"batch is {batch}, expected 1 … 5, the number of samples in tensor"):
        open_dataset(RGB[:5]).feed(batch)


@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "3"}, {"position": 1.5}, {"position": True}])
def test_a_state_that_is_none(state):
    with pytest.raises(InputError, match="feed state: position is "):
        open_dataset("digits").feed(4).load_state_dict(state)


# Streams

X = torch.from_numpy(RGB.transpose(0, 3, 1, 2).copy())
Y = torch.from_numpy(LABELS)
AS_FLOAT = X.float() * (2 / 255) - 1


def loader(batch: int = 4, **options: object) -> DataLoader:
    return DataLoader(TensorDataset(AS_FLOAT, Y), batch_size=batch, **options)


@pytest.mark.parametrize(
    "source",
    [
        loader(),
        loader(1),
        [(X[:2], Y[:2]), (X[2:], Y[2:])],
        [[X.float() / 255, Y]],
        [(AS_FLOAT[:5], Y[:5]), (AS_FLOAT[5:], Y[5:])],
        [(X.numpy(), LABELS)],
    ],
)
def test_streams(source):
    data = open_dataset(source)
    assert (data.kind, data.shape, data.n_classes, len(data), data.name) == ("image", (3, 5, 5), 3, 6, "stream")
    np.testing.assert_array_equal(pixels(data), RGB)
    feed = data.feed(4)
    x, y = zip(*(next(feed) for _ in range(6)), strict=True)
    torch.testing.assert_close(torch.cat(x), AS_FLOAT.repeat(4, 1, 1, 1), atol=1e-6, rtol=0)
    assert torch.cat(y).tolist() == LABELS.tolist() * 4
    assert isinstance(feed, Feed)
    assert feed.state_dict() == {"position": 24, "offset": 6}


def test_streams_without_labels_and_of_tables():
    data = open_dataset([GREY[:3], GREY[3:]])
    assert (data.shape, data.n_classes) == ((1, 5, 5), 0)
    assert next(data.feed(2))[1] is None
    rows = torch.randn(10, 3) * 50
    table = open_dataset(DataLoader(rows, batch_size=4))
    assert table.kind == "table"
    assert torch.equal(next(table.feed(10))[0], rows)
    np.testing.assert_array_equal(table.denormalise(rows), rows.numpy())


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 4, 5, 13])
def test_a_stream_resumes(stop, batch):
    feed = open_dataset(loader(), mirror=True).feed(batch, seed=1)
    for _ in range(stop):
        next(feed)
    state = json.loads(json.dumps(feed.state_dict()))
    expected = [next(feed)[0] for _ in range(4)]
    again = open_dataset(loader(), mirror=True).feed(batch, seed=1)
    again.load_state_dict(state)
    for x in expected:
        assert torch.equal(next(again)[0], x)


def test_mirroring_leaves_the_stream_s_own_tensors_alone():
    batches = [AS_FLOAT.clone()]
    feed = open_dataset(batches, mirror=True).feed(6)
    got = torch.cat([next(feed)[0] for _ in range(20)])
    assert torch.equal(batches[0], AS_FLOAT)
    same = (got == AS_FLOAT.repeat(20, 1, 1, 1)).flatten(1).all(1)
    turned = (got == AS_FLOAT.flip(-1).repeat(20, 1, 1, 1)).flatten(1).all(1)
    assert (same | turned).all()
    assert 30 < same.sum() < 90


def test_an_iterator_lasts_one_pass():
    data = open_dataset(iter([X[:4], X[4:]]))
    feed = data.feed(3)
    np.testing.assert_array_equal(data.denormalise(torch.cat([next(feed)[0], next(feed)[0]])), RGB)
    with pytest.raises(InputError, match="the stream is used up: give an iterable that can be read again"):
        next(feed)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([], "the stream gives no samples"),
        ([{"image": X}], "the stream gives dict; expected batches: tensors, or pairs of a tensor and its labels"),
        ([(X, Y, Y)], "the stream gives Tensor, Tensor, Tensor; expected batches"),
        ([X[0, 0, 0]], "the stream gives shape (5,), expected [B, C, H, W], [B, H, W] or [B, D]"),
        ([X[:, :2]], "the stream gives 2 channels, shape (6, 2, 5, 5), expected 1 or 3"),
        ([X, X[:, :, :4]], "the stream gives shape (6, 3, 4, 5), expected (B, 3, 5, 5)"),
        ([(X, Y), X], "the stream gives labels with some of its batches only"),
        (
            [(X, Y[:2])],
            "the stream gives labels of shape (2,) and type torch.int64, expected class numbers of",
        ),
        ([(X, Y.float())], "the stream gives labels of shape (6,) and type torch.float32, expected class numbers"),
        ([(X, Y - 1)], "the stream gives labels of shape (6,) and type torch.int64, expected class numbers"),
        ([AS_FLOAT * 3], "the stream gives images in -3 … 3, expected [-1, 1]"),
        ([AS_FLOAT.abs() * 9], "the stream gives images in "),
        ([AS_FLOAT * float("nan")], "the stream gives images in nan … nan, expected [-1, 1]"),
        ([torch.full((2, 2), float("inf"))], "the stream gives a value that is not finite"),
        (TensorDataset(X, Y), "TensorDataset gives single samples: wrap it in a torch.utils.data.DataLoader"),
    ],
)
def test_stream_mistakes(source, expected):
    assert message(source).startswith(expected)


def test_stream_settings():
    assert "cannot be resized, cropped or recoloured" in message(loader(), resolution=8)
    assert "cannot be resized, cropped or recoloured" in message(loader(), channels=1)
    assert open_dataset(loader(), resolution=5, channels=3, crop=True).shape == (3, 5, 5)


def test_a_stream_that_changes_its_mind(monkeypatch):
    monkeypatch.setattr("fastgan.data.stream._HEAD_ROWS", 2)
    for second, expected in [((X[2:], Y[2:] + 5), "outside its 3 classes"), (X[2:], "outside its 3 classes")]:
        feed = open_dataset([(X[:2], Y[:2]), second]).feed(4)
        with pytest.raises(InputError, match=expected):
            next(feed)


def test_a_state_of_a_longer_stream():
    feed = open_dataset(loader()).feed(4)
    with pytest.raises(InputError, match="feed state: 7 samples into a pass, but the stream has 6 in one"):
        feed.load_state_dict({"position": 7, "offset": 7})
    with pytest.raises(InputError, match="feed state: offset is None"):
        feed.load_state_dict({"position": 7})


# Real data


@pytest.mark.parametrize(
    ("file", "n", "shape", "classes"),
    [
        ("mnist.npz", 60_000, (1, 28, 28), 10),
        ("cifar10.npz", 5_000, (3, 32, 32), 10),
        ("faces.npz", 400, (1, 64, 64), 40),
        ("horse2deer/A", 600, (3, 32, 32), 0),
        ("horse2deer", 1_200, (3, 32, 32), 2),
    ],
)
def test_real_data(shared_data, file, n, shape, classes):
    data = open_dataset(shared_data / file)
    assert (len(data), data.shape, data.n_classes) == (n, shape, classes)
    x, y = next(data.feed(64, 0))
    assert x.shape == (64, *shape)
    assert -1 <= x.min() < x.mean() < x.max() <= 1
    assert x.std() > 0.2
    assert (y is None) == (classes == 0)
    if file.endswith("npz"):
        with np.load(shared_data / file) as raw:
            key = "x" if "x" in raw else "x_train"
            np.testing.assert_array_equal(pixels(data).reshape(raw[key].shape), raw[key])
            assert labels(data) == raw[key.replace("x", "y", 1)].tolist()


def test_a_real_table_with_text(shared_data):
    path = shared_data / "adult.csv"
    assert message(path) == f"{path}: line 2, column 'workclass' is 'State-gov', expected a finite number"


def test_the_decoder_is_not_loaded_for_arrays():
    code = "import sys; from fastgan.data import open_dataset; open_dataset('digits'); assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
