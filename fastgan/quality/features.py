"""What images are compared by: the features of a small classifier trained on the data set, or those of Inception."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastgan import noise
from fastgan.errors import InputError

if TYPE_CHECKING:
    from fastgan.data import Dataset

Features = Callable[[torch.Tensor], torch.Tensor]
Inception = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_VARIABLE = "FASTGAN_INCEPTION_WEIGHTS"

_BATCH = 128
_STEPS = 200
_FEATURES = 64
_SCALE_ROWS = 2000


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations: threads on busy cores wait for each other, and their number changes the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_classifier(dataset: Dataset, *, seed: int, device: torch.device) -> Features:
    """The last hidden layer, 64 wide, of a small convolutional network trained on the data set at hand.

    It learns the labels, or where there are none, by how many quarter turns an image is rotated (images that are not
    square: half turns); 200 steps of Adam at batch 128. Weights and order depend on ``seed`` alone, torch's global
    generators are not touched, and the caller may be in ``no_grad`` or ``inference_mode``. On a CPU, with the same
    number of threads (see :func:`one_thread`), the same seed gives the same features. They are shifted and divided by
    one number, so that 2,000 real rows have mean 0 and a variance of 1 on average.

    Args:
        dataset: images ``[C, H, W]`` of any size.
        seed: of initial weights and order.
        device: where to train.

    Returns:
        A function from images ``[N, C, H, W]`` in ``[-1, 1]`` to features ``[N, 64]``, fp32 on ``device``.
    """
    height, width = dataset.shape[1:]
    turns = (0, 1, 2, 3) if height == width else (0, 2)
    labelled = dataset.n_classes > 1
    with torch.inference_mode(False), torch.enable_grad():
        body, head = _network(dataset.shape, dataset.n_classes if labelled else len(turns), seed, device)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
        order = noise.shuffled(torch.arange(_STEPS * _BATCH), len(dataset), seed=seed)
        for step, index in enumerate(order.reshape(_STEPS, _BATCH)):
            x, y = dataset.batch(index, None)
            if y is None or not labelled:
                parts = x.chunk(len(turns))
                x = torch.cat([part.rot90(turn, (2, 3)) for part, turn in zip(parts, turns, strict=True)])
                y = torch.arange(len(turns)).repeat_interleave(_BATCH // len(turns))
            loss = F.cross_entropy(head(body(x.to(device))), y.to(device))
            optimizer.param_groups[0]["lr"] = 2e-3 * (1.0 - step / _STEPS)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    def hidden(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([body(part.to(device)) for part in torch.split(images, 512)])

    known = hidden(
        dataset.batch(noise.shuffled(torch.arange(min(len(dataset), _SCALE_ROWS)), len(dataset), seed=seed), None)[0]
    )
    center, scale = known.mean(dim=0), known.var(dim=0).mean().sqrt().clamp(min=1e-12)
    return lambda images: (hidden(images) - center) / scale


def _network(
    shape: tuple[int, ...], n_classes: int, seed: int, device: torch.device
) -> tuple[torch.nn.Sequential, torch.nn.Linear]:
    """Body and head, He-initialised; the body halves the image until about 4 pixels are left on its shorter side."""
    stages = max(1, round(math.log2(max(1.0, min(shape[1:]) / 4))))
    widths = [shape[0], *(min(64, 16 * 2**i) for i in range(stages))]
    with torch.device("meta"):
        body = torch.nn.Sequential()
        for before, after in itertools.pairwise(widths):
            body.append(torch.nn.Conv2d(before, after, 3, stride=2, padding=1)).append(torch.nn.LeakyReLU(0.2))
        body.append(torch.nn.Flatten())
        flat = body(torch.empty(1, *shape, dtype=torch.get_default_dtype())).shape[1]
        body.append(torch.nn.Linear(flat, _FEATURES)).append(torch.nn.LeakyReLU(0.2))
        head = torch.nn.Linear(_FEATURES, n_classes)
    for module in (body, head):
        module.float().to_empty(device=device)
    with torch.no_grad():
        for step, weight in enumerate([*body.parameters(), *head.parameters()], start=1):
            if weight.ndim == 1:
                weight.zero_()
                continue
            fan_in = weight[0].numel()
            drawn = noise.normal(
                len(weight), fan_in, seed=seed, stream=noise.Stream.EVALUATION, step=step, device=device
            )
            weight.copy_(drawn.reshape(weight.shape) * math.sqrt(2.0 / fan_in))
    return body, head


def load_inception(weights: str | os.PathLike[str] | None, *, device: torch.device) -> Inception:
    """The Inception network of FID, by torch-fidelity, from a file that is there already; nothing is downloaded.

    Args:
        weights: the file. Else the environment variable ``FASTGAN_INCEPTION_WEIGHTS`` names it, else it is looked for
            in torch hub's folder of checkpoints (moved by ``TORCH_HOME``).
        device: where to run.

    Returns:
        A function from images, uint8 ``[N, 3, H, W]``, to pool features ``[N, 2048]`` and logits without bias
        ``[N, 1008]``, both fp32.

    Raises:
        InputError: no such file, a file of something else, or torch-fidelity is not installed.
    """
    path = _inception_file(weights)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision built for another torch
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"Inception figures need the package torch-fidelity, pip install 'fastgan[inception]' ({reason}); "
            f"their weights are there: {path}"
        ) from error
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity's own loading would run a file's code
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights before it loads them
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
    except Exception as error:  # a foreign file fails in any way
        what = type(error).__name__
        raise InputError(f"{path}: not the Inception weights ({what}), expected {INCEPTION_FILES[0]}") from error
    network.to(device)

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            pool, logits = network(images.to(device))
        return pool, logits

    return extract


def _inception_file(weights: str | os.PathLike[str] | None) -> Path:
    for source, named in (("inception_weights", weights), (INCEPTION_VARIABLE, os.environ.get(INCEPTION_VARIABLE))):
        if named:
            if not Path(named).is_file():
                raise InputError(f"{source}: {named} is not a file, expected {INCEPTION_FILES[0]}")
            return Path(named)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in INCEPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"no Inception weights: neither {' nor '.join(INCEPTION_FILES)} is in {folder}; put one there, "
        f"or name the file by inception_weights or {INCEPTION_VARIABLE}"
    )
