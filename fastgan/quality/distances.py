"""Figures that compare two sets of points; each is computed in fp64 and depends on nothing but its arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from fastgan import noise
from fastgan.errors import InputError

_BLOCK = 1 << 23  # fp64 numbers held at a time: 64 MiB


def mode_coverage(samples: torch.Tensor, centers: torch.Tensor, sigma: float) -> tuple[int, float]:
    """Modes covered and share of high-quality samples on a mixture of equal Gaussians.

    A sample is of high quality within ``3 * sigma`` (Euclidean) of a mode; a mode is covered by one such sample.
    The published figures are for 2,500 samples.

    Args:
        samples: ``[N, D]``.
        centers: ``[K, D]``.
        sigma: standard deviation of each mode along each axis.

    Returns:
        The count in ``[0, K]`` and the share in ``[0, 1]``.

    Source: Srivastava et al. 2017, VEEGAN (arXiv:1705.07761); Lin et al. 2018, PacGAN (arXiv:1712.04086).
    """
    a, b = _pair("mode_coverage", samples, centers, least=1)
    near = [_distances(part, b) <= 3.0 * sigma for part in _blocks(a, b)]
    high_quality = sum(int(part.any(dim=1).sum()) for part in near)
    covered = torch.stack([part.any(dim=0) for part in near]).any(dim=0)
    return int(covered.sum()), high_quality / len(a)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, n_projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: the root mean, over random directions, of the squared distance along each.

    Along a direction the distance is the exact one between the two empirical distributions, by their quantile
    functions, so the sets may differ in size. A shift by ``v`` in ``D`` dimensions is at ``|v| / sqrt(D)`` on average.

    Args:
        a: ``[N, D]``.
        b: ``[M, D]``.
        n_projections: directions, uniform on the sphere.
        seed: of the directions; the same seed gives the same directions on every device.

    Source: Rabin et al. 2011 (doi:10.1007/978-3-642-24785-9_37); Bonneel et al. 2015 (doi:10.1007/s10851-014-0506-3).
    """
    _check("sliced_wasserstein", a, b, least=1)
    n, m = len(a), len(b)
    directions = noise.normal(
        n_projections, a.shape[1], seed=seed, stream=noise.Stream.EVALUATION, step=0, device=a.device
    ).double()
    directions = directions / directions.norm(dim=1, keepdim=True)
    sorted_a, sorted_b = _projected(a, directions), _projected(b.to(a.device), directions)
    # both quantile functions are constant between neighbours of these levels, kept as integers of 1 / (N M)
    ends = torch.cat([torch.arange(1, n + 1, device=a.device) * m, torch.arange(1, m + 1, device=a.device) * n])
    ends = torch.unique(ends)
    width = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    gap = sorted_a[:, (ends - 1) // m] - sorted_b[:, (ends - 1) // n]
    return float(((gap * gap) @ width).mean().sqrt())


def precision_recall_density_coverage(
    real: torch.Tensor, fake: torch.Tensor, k: int = 5
) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage by balls that reach from each point to its ``k``-th neighbour in its set.

    Precision: share of fakes in some real ball. Recall: share of reals in some fake ball. Density: real balls that a
    fake lies in, on average, over ``k``. Coverage: share of real balls with a fake inside. Balls are closed, so points
    that repeat still hold each other. All depend on the sizes of the sets.

    Args:
        real: ``[N, D]``, ``N > k``.
        fake: ``[M, D]``, ``M > k``.
        k: the neighbour, the point itself not counted.

    Returns:
        Precision, recall and coverage in ``[0, 1]``, density from 0 up; in the order of the name.

    Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991); Naeem et al. 2020 (arXiv:2002.09797).
    """
    real, fake = _pair("precision_recall_density_coverage", real, fake, least=k + 1)
    real_radius, fake_radius = _radius(real, k), _radius(fake, k)
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # real ones around each fake
    covered, recalled = [], []
    for part, radius in zip(_blocks(real, fake), _blocks(real_radius, fake), strict=True):
        distance = _distances(part, fake)  # [rows, M]
        inside = distance <= radius.unsqueeze(1)
        balls += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        recalled.append((distance <= fake_radius).any(dim=1))
    precision, density = _share(balls > 0), float(balls.double().mean() / k)
    return precision, _share(torch.cat(recalled)), density, _share(torch.cat(covered))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance between the Gaussians of the sets' means and (unbiased) covariances, as in FID.

    ``|mean_a - mean_b|² + tr(A + B - 2 (A B)^½)``, where the trace of the root is the sum of the roots of the
    eigenvalues of ``A^½ B A^½``; covariances may be singular. Its bias falls with the number of rows: compare figures
    of equal sizes only.

    Args:
        a: ``[N, D]``, ``N > 1``.
        b: ``[M, D]``, ``M > 1``.

    Source: Heusel et al. 2017 (arXiv:1706.08500).
    """
    a, b = _pair("frechet_distance", a, b, least=2)
    mean_gap = a.mean(dim=0) - b.mean(dim=0)
    cov_a, cov_b = _covariance(a), _covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0.0).sqrt().sum()
    return max(0.0, float(mean_gap @ mean_gap + cov_a.trace() + cov_b.trace() - 2.0 * cross))


def kernel_distance(
    a: torch.Tensor, b: torch.Tensor, n_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Unbiased squared MMD with the kernel ``(x·y / D + 1)³``, averaged over subsets, as in KID; may be negative.

    Args:
        a: ``[N, D]``, ``N > 1``.
        b: ``[M, D]``, ``M > 1``.
        n_subsets: how many pairs of subsets; one where both sets are no larger than a subset.
        subset_size: rows of a subset, drawn without replacement; no more than the smaller set has.
        seed: of the subsets.

    Source: Bińkowski et al. 2018 (arXiv:1801.01401).
    """
    a, b = _pair("kernel_distance", a, b, least=2)
    size = min(subset_size, len(a), len(b))
    if size == len(a) == len(b):
        n_subsets = 1
    total = 0.0
    for x, y in zip(_subsets(a, n_subsets, size, 0, seed), _subsets(b, n_subsets, size, 1, seed), strict=True):
        own = sum(((k := _kernel(t, t)).sum() - k.trace()) / (size * (size - 1)) for t in (x, y))
        total += float(own - 2.0 * _kernel(x, y).mean())
    return total / n_subsets


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> float:
    """``exp(mean KL(p(y|x) || p(y)))``, averaged over ``splits`` parts of the samples in an order drawn by ``seed``.

    Args:
        logits: ``[N, classes]`` of the samples.
        splits: parts, no more than ``N``.
        seed: of the order.

    Source: Salimans et al. 2016 (arXiv:1606.03498).
    """
    order = noise.shuffled(torch.arange(len(logits)), len(logits), seed=seed).to(logits.device)
    log_p = logits.double()[order].log_softmax(dim=1)
    scores = []
    for part in log_p.tensor_split(min(splits, len(log_p))):
        log_marginal = part.logsumexp(dim=0) - math.log(len(part))
        scores.append((part.exp() * (part - log_marginal)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def _pair(name: str, a: torch.Tensor, b: torch.Tensor, *, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets in fp64 on the device of ``a``."""
    _check(name, a, b, least=least)
    return a.detach().double(), b.detach().to(a.device, torch.float64)


def _check(name: str, a: torch.Tensor, b: torch.Tensor, *, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise InputError(
            f"{name}: sets have shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            f"expected [N, D] and [M, D] with at least {least} row{'s' * (least > 1)} each"
        )


def _projected(points: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Sorted along each direction, ``[n_projections, N]``; images are wide, so a part at a time is taken to fp64."""
    parts = torch.split(points.detach(), max(1, _BLOCK // points.shape[1]))
    return torch.cat([directions @ part.double().T for part in parts], dim=1).sort(dim=1).values


def _share(flags: torch.Tensor) -> float:
    return float(flags.double().mean())


def _blocks(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(a, max(1, _BLOCK // len(b)))


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances ``[N, M]``; by differences, so that equal rows are at 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radius(points: torch.Tensor, k: int) -> torch.Tensor:
    """Distance of each point to its ``k``-th neighbour, ``[N]``; the nearest of the ``k + 1`` is the point itself."""
    return torch.cat(
        [_distances(part, points).topk(k + 1, dim=1, largest=False).values[:, k] for part in _blocks(points, points)]
    )


def _covariance(points: torch.Tensor) -> torch.Tensor:
    centred = points - points.mean(dim=0)
    return centred.T @ centred / (len(points) - 1)


def _subsets(points: torch.Tensor, n_subsets: int, size: int, first: int, seed: int) -> Iterator[torch.Tensor]:
    """The first ``size`` rows of every second shuffle; the other set takes the other shuffles."""
    if size == len(points):  # whatever the order
        yield from itertools.repeat(points, n_subsets)
        return
    shuffle = (2 * torch.arange(n_subsets) + first) * len(points)
    position = (shuffle.unsqueeze(1) + torch.arange(size)).flatten()
    for rows in noise.shuffled(position, len(points), seed=seed).to(points.device).reshape(n_subsets, size):
        yield points[rows]


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = torch.addmm(x.new_ones(1), x, y.T, alpha=1.0 / x.shape[1])
    return base * base * base
