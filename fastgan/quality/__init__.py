"""How good samples are: figures against the data set they were trained on, none of which needs a download.

Every figure but the Inception ones uses at most 10,000 samples, and ``min(len(dataset), N)`` real rows, both drawn
by the seed without replacement. The figures depend on these sizes: compare runs at the same number of samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastgan import noise
from fastgan.errors import InputError, unknown
from fastgan.quality import features
from fastgan.quality.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    mode_coverage,
    precision_recall_density_coverage,
    sliced_wasserstein,
)

if TYPE_CHECKING:
    from fastgan.data import Dataset

__all__ = [
    "METRICS",
    "Metric",
    "check",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mode_coverage",
    "precision_recall_density_coverage",
    "sliced_wasserstein",
]


@dataclass(frozen=True)
class Metric:
    """One figure: what it is, and which way is better."""

    description: str
    lower_is_better: bool


METRICS: dict[str, Metric] = {
    "modes_covered": Metric("modes of the toy with a sample within 3 sigma", False),
    "high_quality": Metric("share of samples within 3 sigma of a mode of the toy", False),
    "sliced_wasserstein": Metric("sliced 2-Wasserstein distance of the normalised values", True),
    "precision": Metric("share of samples among the real ones", False),
    "recall": Metric("share of real rows among the samples", False),
    "density": Metric("real neighbourhoods that a sample lies in; 1 for real rows", False),
    "coverage": Metric("share of real neighbourhoods with a sample inside", False),
    "kid_small_classifier": Metric("KID on a small classifier trained on the data set; not Inception KID", True),
    "fid_small_classifier": Metric("FID on a small classifier trained on the data set; not Inception FID", True),
    "inception_fid": Metric("Fréchet Inception distance", True),
    "inception_kid": Metric("kernel Inception distance", True),
    "inception_is": Metric("Inception score", False),
}

_MODES = ("modes_covered", "high_quality")
_NEIGHBOURS = ("precision", "recall", "density", "coverage")
_SMALL = ("kid_small_classifier", "fid_small_classifier")
_INCEPTION = ("inception_fid", "inception_kid", "inception_is")
_LEAST = {**dict.fromkeys(_NEIGHBOURS, 6), **dict.fromkeys((*_SMALL, "inception_fid", "inception_kid"), 2)}  # rows
_MOST_ROWS = 10_000  # neighbour figures compare every pair of rows


def check(
    dataset: Dataset,
    samples: int,
    metrics: str | Iterable[str] = "auto",
    inception_weights: str | os.PathLike[str] | None = None,
) -> None:
    """Can these figures be had of so many samples and this data set, here? For callers who train before they evaluate.

    Raises:
        InputError: as :func:`evaluate`, without looking at any samples.
    """
    if not set(_INCEPTION).isdisjoint(_chosen(dataset, samples, metrics)):
        features.load_inception(inception_weights, device=torch.device("cpu"))


def evaluate(
    dataset: Dataset,
    samples: torch.Tensor,
    metrics: str | Iterable[str] = "auto",
    *,
    seed: int = 0,
    inception_weights: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Figures of ``samples`` against ``dataset``.

    Precision, recall, density and coverage (k = 5) are taken on the small classifier's features for images, on the
    normalised values for tables. The Inception figures take all ``N`` samples; published ones are for 50,000.

    Args:
        dataset: the real rows.
        samples: ``[N, *dataset.shape]`` in the range of ``dataset.batch``, finite, on any device; that is also where
            the figures are computed.
        metrics: names from :data:`METRICS`, or ``"auto"``: modes and sliced Wasserstein distance for toys, sliced
            Wasserstein distance and neighbour figures for tables, these and ``*_small_classifier`` for images.
        seed: of everything drawn: rows, directions, subsets, the classifier. Torch's global generators are not used.
        inception_weights: file for the Inception figures; see :func:`fastgan.quality.features.load_inception`.

    Returns:
        Name to figure, in the order of ``metrics``.

    Raises:
        InputError: an unknown figure, one the data set has no use for, samples of another shape or not finite, too few
            samples or rows, or no Inception weights.
    """
    x = _checked(dataset, samples)
    names = _chosen(dataset, len(x), metrics)
    found: dict[str, float] = {}

    def wanted(*group: str) -> bool:
        return not set(group).isdisjoint(names)

    if wanted(*_MODES):
        found |= zip(_MODES, _modes(dataset, x), strict=True)
    if wanted("sliced_wasserstein", *_NEIGHBOURS, *_SMALL):
        few = x[_drawn(len(x), _MOST_ROWS, seed).to(x.device)]
        real = _real(dataset, len(few), seed).to(x.device)
        if wanted("sliced_wasserstein"):
            found["sliced_wasserstein"] = sliced_wasserstein(real.flatten(1), few.flatten(1), seed=seed)
        if dataset.kind == "image" and wanted(*_NEIGHBOURS, *_SMALL):
            with features.one_thread():
                classifier = features.small_classifier(dataset, seed=seed, device=x.device)
                real, few = classifier(real), classifier(few)
                if wanted("kid_small_classifier"):
                    found["kid_small_classifier"] = kernel_distance(real, few, seed=seed)
                if wanted("fid_small_classifier"):
                    found["fid_small_classifier"] = frechet_distance(real, few)
        if wanted(*_NEIGHBOURS):
            found |= zip(_NEIGHBOURS, precision_recall_density_coverage(real, few), strict=True)
    if wanted(*_INCEPTION):
        extract = features.load_inception(inception_weights, device=x.device)
        pool, logits = _extracted(dataset, x, extract)
        if wanted("inception_is"):
            found["inception_is"] = inception_score(logits, seed=seed)
        if wanted("inception_fid", "inception_kid"):
            real_pool, _ = _extracted(dataset, _real(dataset, len(x), seed), extract)
            found["inception_fid"] = frechet_distance(real_pool, pool)
            found["inception_kid"] = kernel_distance(real_pool, pool, seed=seed)
    return {name: found[name] for name in names}


def _chosen(dataset: Dataset, samples: int, metrics: str | Iterable[str]) -> list[str]:
    if metrics == "auto" and dataset.modes is not None:
        metrics = [*_MODES, "sliced_wasserstein"]
    elif metrics == "auto":
        metrics = ["sliced_wasserstein", *_NEIGHBOURS, *(_SMALL if dataset.kind == "image" else ())]
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, ["auto", *METRICS])
        if name in _SMALL + _INCEPTION and dataset.kind != "image":
            raise InputError(f"{name}: data set {dataset.name!r} is a {dataset.kind}, expected images")
        if name in _INCEPTION and dataset.shape[0] not in (1, 3):
            raise InputError(f"{name}: data set {dataset.name!r} has {dataset.shape[0]} channels, expected 1 or 3")
        if name in _MODES and dataset.modes is None:
            raise InputError(f"{name}: data set {dataset.name!r} has no known modes, expected a toy")
        if min(samples, len(dataset)) < (least := _LEAST.get(name, 1)):
            has = f"{samples} samples against the {len(dataset)} rows of data set {dataset.name!r}"
            raise InputError(f"{name}: {has}, expected at least {least} of each")
    return names


def _checked(dataset: Dataset, samples: torch.Tensor) -> torch.Tensor:
    if tuple(samples.shape[1:]) != tuple(dataset.shape) or len(samples) == 0:
        expected = ", ".join(["N", *map(str, dataset.shape)])
        raise InputError(f"samples: shape {tuple(samples.shape)}, expected [{expected}] with N > 0")
    x = samples.detach().float()
    bad = int((~x.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise InputError(f"samples: {bad} of {len(x)} hold NaN or infinity, expected finite values")
    return x


def _drawn(n: int, most: int, seed: int) -> torch.Tensor:
    """``min(n, most)`` row numbers below ``n`` without replacement, in another order than training's with this seed."""
    return noise.shuffled(torch.arange(min(n, most)), n, seed=~seed)


def _real(dataset: Dataset, most: int, seed: int) -> torch.Tensor:
    return dataset.batch(_drawn(len(dataset), most, seed), None)[0]


def _modes(dataset: Dataset, x: torch.Tensor) -> tuple[float, float]:
    assert dataset.modes is not None  # _chosen has seen to it
    covered, high_quality = mode_coverage(x, dataset.modes.centers, dataset.modes.sigma)
    return float(covered), high_quality


def _extracted(dataset: Dataset, x: torch.Tensor, extract: features.Inception) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool features and logits of images in the data set's range, grey ones as RGB."""
    out = []
    for part in torch.split(x, 64):
        pixels = torch.from_numpy(dataset.denormalise(part)).permute(0, 3, 1, 2)  # uint8 [B, C, H, W]
        out.append(extract(pixels.expand(-1, 3, -1, -1).contiguous()))
    return torch.cat([pool for pool, _ in out]), torch.cat([logits for _, logits in out])
