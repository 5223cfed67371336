"""The ctgan package: its discriminator update on the census table, inside its own ``fit``.

A step of CTGAN also draws condition vectors, makes fakes through softmax with Gumbel noise and adds a cross entropy to
the generator's loss. The engine has none of these, so that only the discriminator's update on given fakes is compared.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

import fastgan
from bench.peers import Peer, Sides, Skip, difference
from fastgan.benchmark.timing import block, wait
from fastgan.models.packing import Packed
from fastgan.penalties import GradientPenalty

Tensor = torch.Tensor
CENSUS = Path(__file__).parents[3] / "shared" / "data" / "adult.csv"
ROWS = 5000  # of the table: ctgan's set-up takes a minute for all, and a step's time does not depend on their number
CATEGORIES = (9, 16, 7, 15, 6, 5, 2, 42, 2)  # of the census table, beside six columns of numbers


class Clock:
    """Time of discriminator updates and of whole steps in ``fit``, and the rows that the last updates saw."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.discriminator: Any = None
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.restart()

    def restart(self) -> None:
        self.updates: list[float] = []
        self.ends: list[float] = []
        self.began: float | None = None

    def now(self) -> float:
        wait(self.device)
        return time.perf_counter()


@contextlib.contextmanager
def watched(module: Any, clock: Clock) -> Iterator[None]:
    """ctgan's ``fit``, its discriminator and optimisers doing all the same and looking at the clock."""
    network = module.Discriminator
    forward, gradient_penalty = network.forward, network.calc_gradient_penalty

    def watched_forward(self: Any, input_: Tensor) -> Tensor:
        clock.discriminator = self
        if clock.began is None:
            clock.began = clock.now()
        return forward(self, input_)

    def watched_penalty(self: Any, real_data: Tensor, fake_data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(clock.rows) < 8:
            clock.rows.append((real_data.detach().clone(), fake_data.detach().clone()))
        return gradient_penalty(self, real_data, fake_data, *args, **kwargs)

    class Adam(torch.optim.Adam):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            out = super().step(*args, **kwargs)
            now = clock.now()
            if self.param_groups[0]["params"][0] is next(clock.discriminator.parameters()):
                clock.updates.append(now - clock.began)
            else:
                clock.ends.append(now)
            clock.began = None
            return out

    methods = mock.patch.multiple(network, forward=watched_forward, calc_gradient_penalty=watched_penalty)
    with methods, mock.patch.object(module, "optim", SimpleNamespace(Adam=Adam)):
        yield


def table(pandas: Any, rows: int) -> tuple[Any, list[str], str]:
    """The first rows of the census table, or random ones of its shape; its discrete columns; which of both it is."""
    if CENSUS.is_file():
        found = pandas.read_csv(CENSUS, nrows=rows)
        return found, [c for c in found if not pandas.api.types.is_numeric_dtype(found[c])], "census"
    draw = torch.Generator().manual_seed(0)
    columns = {f"number {i}": torch.randn(rows, generator=draw).numpy() for i in range(6)}
    for i, n in enumerate(CATEGORIES):
        columns[f"category {i}"] = torch.randint(n, (rows,), generator=draw).numpy().astype(str)
    return pandas.DataFrame(columns), [c for c in columns if c.startswith("category")], "random, as the census table"


def critic(width: int, pac: int, dropout: float = 0.5) -> Packed:
    """ctgan's discriminator at its defaults."""
    layers: list[nn.Module] = []
    for a, b in ((pac * width, 256), (256, 256)):
        layers += [nn.Linear(a, b), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
    return Packed(nn.Sequential(*layers, nn.Linear(256, 1)), pac)


def engine(network: nn.Module, device: torch.device) -> fastgan.Engine:
    return fastgan.Engine(
        None, network, loss="wasserstein", penalties=[GradientPenalty(10.0)], device=device, precision="fp32",
        d_optimizer=fastgan.Adam(2e-4, (0.5, 0.9), weight_decay=1e-6),
    )  # fmt: skip


def check(theirs: Any, real: Tensor, fake: Tensor, device: torch.device) -> float:
    """One update in fp64 and without dropout, whose masks differ: by ctgan's discriminator and penalty, and by ours."""
    pac = theirs.pac
    theirs = copy.deepcopy(theirs).double()
    for layer in theirs.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    ours = critic(theirs.pacdim // pac, pac, dropout=0.0).double().to(device)
    ours.load_state_dict({f"net.{k.removeprefix('seq.')}": v.clone() for k, v in theirs.state_dict().items()})
    real, fake = real.double(), fake.double().requires_grad_()  # as fakes are in ctgan, on which its penalty relies
    torch.manual_seed(1)
    penalty = theirs.calc_gradient_penalty(real, fake, device, pac)
    torch.manual_seed(1)
    alpha = torch.rand(len(real) // pac, 1, 1, device=device).view(-1)  # as the penalty draws it
    optimizer = torch.optim.Adam(theirs.parameters(), lr=2e-4, betas=(0.5, 0.9), weight_decay=1e-6)
    optimizer.zero_grad()
    (penalty - theirs(real).mean() + theirs(fake).mean()).backward()
    optimizer.step()
    engine(ours, device).d_step(real, fake=fake, alpha=alpha)
    return difference((theirs, ours))


def prepare(device: torch.device, tiny: bool) -> Sides:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ctgan.synthesizers.ctgan as package
            import pandas
    except ImportError as e:
        raise Skip(f"ctgan is not installed ({e}): pip install -c constraints.txt -e '.[peers]'") from e
    rows = 1000 if tiny else ROWS
    data, discrete, which = table(pandas, rows)
    transformer = package.DataTransformer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer.fit(data, discrete)
        transformed = transformer.transform(data)
    clock = Clock(device)
    notes: dict[str, Any] = {"data": which, "rows": rows, "whole_step_us": []}

    def fit(steps: int) -> float:
        """Seconds of an update of the discriminator in ``fit``, without the first, on the table transformed above."""
        epochs = -(-steps // (rows // 500)) + 1  # the first epoch warms up
        model = package.CTGAN(epochs=epochs, enable_gpu=device.type == "cuda")
        fitted = mock.patch.multiple(transformer, fit=lambda *args: None, transform=lambda data: transformed)
        made = mock.patch.object(package, "DataTransformer", return_value=transformer)
        clock.restart()
        with warnings.catch_warnings(), fitted, made, watched(package, clock):
            warnings.simplefilter("ignore")
            model.fit(data, discrete)
        updates, ends = clock.updates[-steps:], clock.ends[-steps - 1 :]
        notes["whole_step_us"].append((ends[-1] - ends[0]) / (len(ends) - 1) * 1e6)
        return sum(updates) / len(updates)

    fit(1)
    real, fake = clock.rows[0]
    error = check(clock.discriminator, real, fake, device)
    notes["whole_step_us"].clear()
    notes |= {"discriminator_input": real.shape[1], "batch": len(real), "pac": clock.discriminator.pac}
    ours = engine(critic(real.shape[1], clock.discriminator.pac), device)
    batches = list(clock.rows)

    def update() -> None:
        real, fake = batches[ours.d_updates % len(batches)]
        ours.d_step(real, fake=fake)

    return Sides(
        peer=fit,
        fastgan=lambda n: block(update, n, device),
        error=error,
        images=len(real),
        iterations=2 if tiny else 50,
        notes=notes,
    )


CTGAN = Peer(
    "ctgan",
    "discriminator update of the ctgan package in its own fit, batch 500, pac 10, census table",
    "From the first pass of the discriminator to the end of its Adam's step, on the same rows. ctgan does not detach "
    "its fakes: its time has the backward passes through its generator, which the update does not need. Not compared: "
    "condition vectors, Gumbel softmax, sampling of rows, the generator's update with its cross entropy (the engine "
    "has no tabular system); notes give the whole step's time. Checked without dropout.",
    prepare,
)
