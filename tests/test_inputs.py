"""One launch draws what the separate ops draw."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fastgan.kernels.inputs import Draw, inputs_, inputs_launch, inputs_reference
from fastgan.kernels.latent import latent_launch
from fastgan.kernels.sample_rows import SampleArguments, sample_rows_launch
from fastgan.noise import Stream

pytestmark = pytest.mark.interpreted


def update(device: torch.device, dtype: torch.dtype, rows: int = 33) -> tuple[list[Draw], SampleArguments]:
    """Two latents, weights, labels and the data, in memory that has room around each of them."""
    step = torch.tensor(2**33 + 7, device=device)
    canvas = torch.full((rows + 2, 40), -9.0, dtype=dtype, device=device)
    draws = [
        Draw(canvas[1:-1, 1:8], step, 7, Stream.D_LATENT),
        Draw(canvas[1:-1, 9:19], torch.tensor(3, device=device), 2**64 - 5, Stream.G_LATENT, first_row=2**31),
        Draw(torch.full((rows, 3), -9.0, device=device)[:, 1:2], step, -7, Stream.ALPHA, "uniform", first_row=5),
        Draw(torch.full((rows, 2), -9, device=device)[:, 1], step, 7, Stream.G_LABELS, "integers", high=2**31 - 1),
        Draw(torch.empty(rows, 9, dtype=torch.float64, device=device), step, 1, Stream.PERTURBATION),
        Draw(torch.empty(rows, 0, dtype=dtype, device=device), step, 1, Stream.PERTURBATION),
    ]
    g = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (50, 6), generator=g, dtype=torch.uint8).to(device)
    sample = SampleArguments(
        data, torch.tensor(2**14 - 20, device=device), canvas[1:-1, 20:26], 5, 3, 2 / 255, -1.0, mirror=True,
        labels=torch.arange(50, device=device), labels_out=torch.full((rows,), -9, device=device),
        arrivals=torch.zeros((), dtype=torch.int32, device=device),
    )  # fmt: skip
    return draws, sample


def outs(draws: list[Draw], sample: SampleArguments) -> list[torch.Tensor]:
    return [*(d.out for d in draws), sample.out, sample.labels_out, sample.position, sample.arrivals]


def whole(t: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor lies in."""
    return t.new_empty(0).set_(t.untyped_storage())


def separately(draws: list[Draw], sample: SampleArguments) -> None:
    for d in draws:
        key = {"seed": d.seed, "stream": d.stream, "first_row": d.first_row, "kind": d.kind, "high": d.high}
        latent_launch(d.out, d.step, **key)()
    sample_rows_launch(sample)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_one_launch_draws_what_the_separate_launches_draw(dtype: torch.dtype, device: torch.device) -> None:
    """To the bit, with the memory around it, twice: the launch is built once, and counters go on."""
    one, other = update(device, dtype), update(device, dtype)
    launch = inputs_launch(*one)
    for _ in range(2):
        launch()
        separately(*other)
        for got, expected in zip(outs(*one), outs(*other), strict=True):
            assert torch.equal(whole(got), whole(expected))
        for made in (one, other):
            made[0][0].step.add_(1)


def test_the_reference_draws_the_same(device: torch.device) -> None:
    one, other = update(device, torch.float32), update(device, torch.float32)
    inputs_(*one, backend="triton")
    inputs_reference(*other)
    for got, expected in zip(outs(*one), outs(*other), strict=True):
        if got.is_floating_point():  # the last bit of a logarithm
            torch.testing.assert_close(
                whole(got), whole(expected), rtol=1e-15 if got.dtype == torch.float64 else 1e-7, atol=1e-14
            )
        else:
            assert torch.equal(got, expected)


def test_many_draws_none_of_rows_and_no_rows_of_data(device: torch.device) -> None:
    """Ranges of programs: 9 draws in a table for 16, a draw of several programs, empty ones first, between and last."""
    step = torch.tensor(4, device=device)
    sizes = [(0, 8), (1, 1), (70, 16), (3, 0), (5, 5), (2, 3), (129, 4), (1, 9), (0, 1)]
    draws = [Draw(torch.empty(size, device=device), step, 3, i) for i, size in enumerate(sizes)]
    launch = inputs_launch(draws)
    assert launch.grid == (sum(-(-rows * -(-cols // 4) // 128) for rows, cols in sizes),)
    launch()
    for d in draws:
        expected = torch.empty_like(d.out)
        latent_launch(expected, step, seed=3, stream=d.stream)()
        assert torch.equal(d.out, expected)


def test_the_table_keeps_what_it_points_to(device: torch.device) -> None:
    step = torch.tensor(4, device=device)
    launch = inputs_launch([Draw(torch.zeros(4, 4, device=device), step, 3, 1)])
    ((out, kept),) = launch.arguments["table_ptr"].keeps_alive
    launch()
    assert kept is step
    assert (out != 0).all()


def test_empty_draws_alone_launch_nothing(device: torch.device) -> None:
    launch = inputs_launch([Draw(torch.empty(0, 4, device=device), torch.tensor(4, device=device), 3, 1)])
    assert launch.grid == (0,)
    launch()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cauchy"}, "kind is 'cauchy', expected one of normal, uniform, integers"),
        ({"out": torch.empty(4)}, "out has shape (4,), expected [rows, cols]"),
        ({"out": torch.empty(4, 4).T[:, :3]}, "the rows of out are not contiguous"),
        ({"out": torch.empty(4, 4, dtype=torch.int32)}, "out has dtype torch.int32, expected one of"),
        ({"kind": "integers", "high": 0, "out": torch.empty(3, dtype=torch.int64)}, "high is 0, expected 1 <= high"),
        ({"step": torch.tensor(1, dtype=torch.int32)}, "step is torch.int32 [] on cpu, expected int64 [] on cpu"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str, backend: str) -> None:
    draw = Draw(torch.empty(3, 4), torch.tensor(1), 1, 1)
    with pytest.raises(ValueError, match=re.escape(f"inputs: {message}")):
        inputs_([draw, replace(draw, **change)], backend=backend)


def test_rows_that_do_not_fit_and_no_draws() -> None:
    draw = Draw(torch.empty(3, 4), torch.tensor(1), 1, 1)
    rows = SampleArguments(torch.zeros(5, 6, dtype=torch.uint8), torch.tensor(0), torch.empty(3, 5), 1, 3)
    with pytest.raises(ValueError, match=re.escape("inputs: out has shape (3, 5), expected [B, 6]")):
        inputs_launch([draw], rows)
    with pytest.raises(ValueError, match="inputs: there is no draw"):
        inputs_launch([], rows)
