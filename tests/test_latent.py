"""The noise kernel gives the CPU stream's numbers: uniform ones and integers to the bit, normal ones too."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fastgan import native_available, noise
from fastgan.backend import use_backend
from fastgan.kernels.latent import latent, latent_launch
from fastgan.noise import Stream

pytestmark = pytest.mark.interpreted

SEEDS = [0, 11, -5, 2**64 - 1, 5 << 32 | 7]
GPU = torch.cuda.is_available()


def on_cpu(name: str, rows: int, cols: int, **key: object) -> torch.Tensor:
    return getattr(noise, name)(rows, cols, device="cpu", **key)


def assert_same(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To the bit where roundings are the CPU's; fused multiply-adds on a GPU move normal numbers by the last bits."""
    if name == "normal" and GPU:
        ulp = torch.finfo(got.dtype).eps * expected.double().abs() + 1e-15
        assert ((got.cpu().double() - expected.double()).abs() <= ulp).all()
        assert got.dtype == torch.float64 or (got.cpu() != expected).double().mean() < 1e-4
    else:
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 7), (3, 260), (130, 4)])
@pytest.mark.parametrize("name", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_are_the_cpu_streams(
    seed: int, rows: int, cols: int, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert native_available()
    for step, first_row in ((0, 0), (2**33 + 1, 2**31)):
        key = {"seed": seed, "stream": Stream.G_LATENT, "step": step, "first_row": first_row, "dtype": dtype}
        got = latent(rows, cols, kind=name, device=device, backend="triton", **key)
        assert_same(got, on_cpu(name, rows, cols, **key), name)


def test_many_normal_numbers_are_the_cpu_streams(device: torch.device) -> None:
    key = {"seed": 3, "stream": Stream.TOY, "step": 1}
    assert_same(latent(160, 256, device=device, backend="triton", **key), on_cpu("normal", 160, 256, **key), "normal")


def test_a_last_bit_of_fp64_hardly_ever_shows_in_fp32() -> None:
    """What fusing multiply-adds may change: against 64 bits of mantissa, 1 number of 3.2e7 differs; here 1 of 2e6."""
    words = noise.bits(1000, 2000, seed=1, stream=Stream.D_LATENT, step=0, device="cpu").numpy().reshape(-1, 2)
    u = (words.astype(np.longdouble) + np.longdouble(0.5)) * np.longdouble(2) ** -32
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), np.longdouble(2 * np.pi) * u[:, 1]
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
    z = on_cpu("normal", 1000, 2000, seed=1, stream=Stream.D_LATENT, step=0).numpy().reshape(-1, 2)
    assert (exact != z).sum() <= 1


def test_half_precision_rounds_by_way_of_fp32(device: torch.device) -> None:
    key = {"seed": 3, "stream": Stream.TOY, "step": 1, "dtype": torch.float16}
    for name in ("normal", "uniform"):
        got = latent(65, 64, kind=name, device=device, backend="triton", **key)
        assert_same(got, on_cpu(name, 65, 64, **{**key, "dtype": torch.float32}).half(), name)
        assert_same(got, on_cpu(name, 65, 64, **key), name)


def test_the_references_fp16_does_not_overflow() -> None:
    out = torch.empty(9, 9, dtype=torch.float16)
    noise.uniform_reference_(out, torch.tensor(1), 3, int(Stream.TOY), 0)
    assert torch.equal(out, on_cpu("uniform", 9, 9, seed=3, stream=Stream.TOY, step=1).half())


@pytest.mark.parametrize("name", ["normal", "uniform", "integers"])
def test_a_launch_writes_what_it_should_and_nothing_else(name: str, device: torch.device) -> None:
    """Any strides; and the step is read when it runs, so that a captured launch goes on with the counter."""
    step = torch.tensor(4, device=device)
    canvas = torch.full((40, 21), -9.0, device=device)
    outs = [canvas[:, 3:10], torch.empty(7, 40, device=device).T, torch.empty(40, 14, device=device)[:, ::2]]
    if name == "integers":
        canvas = torch.full((40, 2), -9, device=device)
        outs = [canvas[:, 1]]
    key = {"seed": -3, "stream": Stream.G_LABELS, "first_row": 7}
    launches = [latent_launch(out, step, kind=name, high=1000, **key) for out in outs]
    for _ in range(2):
        size = (40, 1000) if name == "integers" else (40, 7)
        expected = on_cpu(name, *size, step=int(step), **key)
        for launch, out in zip(launches, outs, strict=True):
            launch()
            assert_same(out, expected, name)
        step += 1
    outs[0].fill_(-9)
    assert (canvas == -9).all()


@pytest.mark.parametrize("high", [1, 10, 2**31 - 1])
def test_integers_are_the_cpu_streams(high: int, device: torch.device) -> None:
    out, step = torch.full((77,), -1, device=device), torch.tensor(2**40, device=device)
    latent_launch(out, step, seed=2**63, stream=Stream.SAMPLE_LABELS, first_row=8, kind="integers", high=high)()
    key = {"seed": 2**63, "stream": Stream.SAMPLE_LABELS, "step": 2**40, "first_row": 8}
    assert torch.equal(out.cpu(), noise.integers(77, high, device="cpu", **key))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", ["normal", "uniform", "integers"])
def test_what_a_gpus_noise_calls(
    name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """noise.normal and its like on a GPU are one launch, or the reference where that is asked for."""
    from fastgan.kernels import latent as module

    launched = []
    monkeypatch.setattr(module, "latent_launch", lambda *a, **k: launched.append(name) or latent_launch(*a, **k))
    out = torch.empty(33, dtype=torch.int64) if name == "integers" else torch.empty(33, 5)
    out = out.to(device)
    high = (10,) if name == "integers" else ()
    with use_backend(backend):
        noise._launch(name, out, torch.tensor(5, device=device), *high, 7, int(Stream.ALPHA), 2)
    assert launched == [name] * (backend == "triton")
    size = (33, 10) if name == "integers" else (33, 5)
    assert_same(out, on_cpu(name, *size, seed=7, stream=Stream.ALPHA, step=5, first_row=2), name)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_noise_on_a_gpu_is_the_cpus() -> None:
    key = {"seed": 7, "stream": Stream.ALPHA, "step": 5}
    for name in ("normal", "uniform", "integers"):
        args = (33, 10)
        assert_same(getattr(noise, name)(*args, device="cuda", **key), on_cpu(name, *args, **key), name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cauchy"}, "latent: kind is 'cauchy', expected normal or uniform"),
        ({"kind": "integers"}, "latent: kind is 'integers', expected normal or uniform"),
        ({"dtype": torch.int32}, "latent: dtype is torch.int32, expected one of torch.float16"),
        ({"rows": -1}, "latent: rows and cols are -1 and 4, expected at least 0"),
        ({"step": torch.tensor([1])}, "latent: step is torch.int64 [1] on cpu, expected int64 [] on"),
        ({"step": torch.tensor(1.0)}, "latent: step is torch.float32 [] on cpu, expected int64 [] on"),
        ({"rows": 2**31, "cols": 0, "dtype": torch.float16, "backend": "cuda"}, "unknown backend"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    given = {"rows": 3, "cols": 4, "seed": 1, "stream": 0, "step": torch.tensor(1), **change}
    with use_backend("triton"), pytest.raises(ValueError, match=re.escape(message)):
        latent(**given)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        (torch.empty(3), {}, "out has shape (3,), expected [rows, cols]"),
        (torch.empty(3, 4, dtype=torch.int64), {}, "out has dtype torch.int64"),
        (torch.empty(3, 4), {"kind": "integers"}, "out is torch.float32 [3, 4], expected int64 [B]"),
        (torch.empty(3, dtype=torch.int64), {"kind": "integers", "high": 2**31}, "high is 2147483648, expected"),
        (torch.empty(1, 1).expand(2**20, 2**13), {}, "1048576 x 8192 numbers are too many for one launch"),
        (torch.empty(3, 4), {"kind": "other"}, "kind is 'other', expected one of normal, uniform, integers"),
    ],
)
def test_a_launch_that_cannot_be(out: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"latent: {message}")):
        latent_launch(out, torch.tensor(1), seed=1, stream=0, **options)
