"""Quality figures against closed forms and brute force, and their order on real digits."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.data import Modes, open_dataset
from fastgan.errors import InputError
from fastgan.quality import (
    METRICS,
    evaluate,
    features,
    frechet_distance,
    inception_score,
    kernel_distance,
    mode_coverage,
    precision_recall_density_coverage,
    sliced_wasserstein,
)

AUTO_IMAGE = [
    "sliced_wasserstein",
    "precision",
    "recall",
    "density",
    "coverage",
    "kid_small_classifier",
    "fid_small_classifier",
]


class Rows:
    """A data set of rows given as they are; images as values in [-1, 1]."""

    def __init__(self, x: torch.Tensor, labels: torch.Tensor | None = None, modes: Modes | None = None) -> None:
        self.x, self.labels, self.modes, self.name = x, labels, modes, "rows"
        self.shape = tuple(x.shape[1:])
        self.kind = "image" if x.ndim == 4 else "table"
        self.n_classes = 0 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: torch.Tensor, flips: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.x[indices], None if self.labels is None else self.labels[indices]

    def denormalise(self, x: torch.Tensor) -> np.ndarray:
        return ((x + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = open_dataset("digits")
    x, y = data.batch(torch.arange(len(data)))
    assert y is not None
    return x, y


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Points whose own mean and unbiased covariance are exactly these."""
    z = drawn(n, len(mean), seed=seed)
    z = z - z.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / (n - 1)), z.T, upper=False).T
    values, vectors = torch.linalg.eigh(covariance)
    return white @ (vectors * values.clamp(min=0.0).sqrt()).T + mean


# --- modes ---


def test_mode_coverage_by_hand() -> None:
    centers = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    samples = torch.tensor([[0.0, 1.5], [0.5, 0.0], [0.0, 1.51], [4.2, 4.2], [4.0, -1.0], [1.4, 1.4]])
    # reach 1.5: rows 0 (on the rim), 1 and 4 are near; row 5 is within 1.5 along each axis, but 1.98 away
    assert mode_coverage(samples, centers, 0.5) == (2, 3 / 6)


def test_mode_coverage_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    centers, samples = drawn(7, 2, seed=1), drawn(20, 2, seed=2)
    whole = mode_coverage(samples, centers, 0.1)
    assert 1 < whole[0] < 7
    monkeypatch.setattr("fastgan.quality.distances._BLOCK", 7 * 3)
    assert mode_coverage(samples, centers, 0.1) == whole


# --- sliced Wasserstein ---


def test_sliced_wasserstein_of_a_shift_on_a_line() -> None:
    a = drawn(40, 1)
    assert sliced_wasserstein(a, a[torch.randperm(40)] - 2.5) == pytest.approx(2.5, rel=1e-12)


def test_sliced_wasserstein_of_a_shift_in_space() -> None:
    a = drawn(30, 3)
    shift = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    assert sliced_wasserstein(a, a + shift, n_projections=20_000) == pytest.approx(3.0 / math.sqrt(3.0), rel=0.01)


def test_sliced_wasserstein_of_unequal_sizes_is_that_of_repeated_rows() -> None:
    a, b = drawn(6, 1, seed=1), drawn(4, 1, seed=2)
    long_a, long_b = np.sort(np.repeat(a.numpy().ravel(), 2)), np.sort(np.repeat(b.numpy().ravel(), 3))
    assert sliced_wasserstein(a, b) == pytest.approx(math.sqrt(((long_a - long_b) ** 2).mean()), rel=1e-12)
    assert sliced_wasserstein(b, a) == pytest.approx(sliced_wasserstein(a, b), rel=1e-12)


def test_sliced_wasserstein_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn(20, 3, seed=1), 2.0 * drawn(25, 3, seed=2)
    whole = sliced_wasserstein(a, b)
    monkeypatch.setattr("fastgan.quality.distances._BLOCK", 7)
    assert sliced_wasserstein(a, b) == pytest.approx(whole, rel=1e-12)


def test_sliced_wasserstein_depends_on_the_seed_alone() -> None:
    a, b = drawn(20, 3, seed=1), 2.0 * drawn(25, 3, seed=2)
    assert sliced_wasserstein(a, b, 8, seed=3) == sliced_wasserstein(a, b, 8, seed=3)
    assert sliced_wasserstein(a, b, 8, seed=3) != sliced_wasserstein(a, b, 8, seed=4)


# --- precision, recall, density, coverage ---


def prdc_by_loops(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def radii(points: np.ndarray) -> list[float]:
        return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    real_radii, fake_radii = radii(real), radii(fake)
    precision = recall = density = coverage = 0.0
    for f in fake:
        inside = sum(math.dist(f, r) <= radius for r, radius in zip(real, real_radii, strict=True))
        precision += inside > 0
        density += inside / k
    for r, radius in zip(real, real_radii, strict=True):
        recall += any(math.dist(f, r) <= reach for f, reach in zip(fake, fake_radii, strict=True))
        coverage += any(math.dist(f, r) <= radius for f in fake)
    return precision / len(fake), recall / len(real), density / len(fake), coverage / len(real)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "with-repeats"])
def test_neighbour_figures_by_loops(k: int, grid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgan.quality.distances._BLOCK", 100)
    real, fake = drawn(40, 2, seed=1), 0.8 * drawn(25, 2, seed=2) + 0.7
    if grid:
        real, fake = real.round(), fake.round()
    got = precision_recall_density_coverage(real, fake, k)
    assert got == pytest.approx(prdc_by_loops(real.numpy(), fake.numpy(), k), rel=1e-12)
    assert len(set(got)) > 1


def test_neighbour_figures_need_more_rows_than_neighbours() -> None:
    with pytest.raises(InputError, match=r"\(5, 2\).*at least 6 rows each"):
        precision_recall_density_coverage(drawn(9, 2), drawn(5, 2))


# --- Fréchet distance ---


def test_frechet_distance_on_a_line() -> None:
    a = with_moments(torch.tensor([1.0], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64), 30, 1)
    b = with_moments(torch.tensor([-2.0], dtype=torch.float64), torch.tensor([[0.25]], dtype=torch.float64), 50, 2)
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    first = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    second = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    product = first @ second
    assert not torch.allclose(product, product.T)
    # the root of a 2 by 2 matrix has trace sqrt(tr + 2 sqrt(det))
    root = math.sqrt(float(product.trace()) + 2.0 * math.sqrt(float(torch.linalg.det(product))))
    want = 1.25 + float(first.trace() + second.trace()) - 2.0 * root
    a, b = with_moments(0.0 * mean, first, 40, 1), with_moments(mean, second, 60, 2)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-10)


def test_frechet_distance_of_singular_covariances() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    a = with_moments(zero, torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)), 30, 1)
    along = with_moments(zero, torch.diag(torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)), 30, 2)
    across = with_moments(zero, torch.diag(torch.tensor([0.0, 9.0, 0.0], dtype=torch.float64)), 30, 3)
    assert frechet_distance(a, along) == pytest.approx((3.0 - 2.0) ** 2, abs=1e-6)
    assert frechet_distance(a, across) == pytest.approx(4.0 + 9.0, abs=1e-6)
    few = drawn(10, 50)
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(few, few + 1.0) == pytest.approx(50.0, rel=1e-6)


# --- kernel distance ---


def mmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float((p @ q / len(p) + 1.0) ** 3)

    def own(points: np.ndarray) -> float:
        pairs = itertools.permutations(points, 2)
        return sum(kernel(p, q) for p, q in pairs) / (len(points) * (len(points) - 1))

    return own(x) + own(y) - 2.0 * sum(kernel(p, q) for p in x for q in y) / (len(x) * len(y))


def test_kernel_distance_by_loops() -> None:
    a, b = drawn(20, 3, seed=1), 1.5 * drawn(20, 3, seed=2) + 0.5
    assert kernel_distance(a, b) == pytest.approx(mmd_by_loops(a.numpy(), b.numpy()), rel=1e-12)


def test_kernel_distance_of_subsets_has_the_mean_of_the_whole() -> None:
    a, b = drawn(24, 3, seed=1), 0.5 * drawn(31, 3, seed=2) + 2.0
    whole = mmd_by_loops(a.numpy(), b.numpy())
    assert kernel_distance(a, b, 150, 12) == pytest.approx(whole, rel=0.05)
    assert kernel_distance(a, b[:24], 150, 12) == pytest.approx(mmd_by_loops(a.numpy(), b[:24].numpy()), rel=0.05)
    assert kernel_distance(a, b, 3, 5, seed=1) == kernel_distance(a, b, 3, 5, seed=1)
    assert kernel_distance(a, b, 3, 5, seed=1) != kernel_distance(a, b, 3, 5, seed=2)


def test_kernel_distance_is_unbiased() -> None:
    same = [kernel_distance(drawn(15, 2, seed=i), drawn(15, 2, seed=1000 + i)) for i in range(400)]
    assert min(same) < 0.0 < max(same)
    assert abs(np.mean(same)) < 3.0 * np.std(same) / math.sqrt(len(same))


# --- Inception score ---


def test_inception_score_of_known_predictions() -> None:
    sure = 1e4 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=1) == pytest.approx(5.0, rel=1e-9)
    assert inception_score(sure[:1].repeat(30, 1)) == pytest.approx(1.0, rel=1e-9)


def test_inception_score_by_loops() -> None:
    logits = drawn(30, 4)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    total = sum(row @ np.log(row / p.mean(0)) for row in p)
    assert inception_score(logits, splits=1) == pytest.approx(math.exp(total / 30), rel=1e-12)
    assert inception_score(logits, splits=30) == pytest.approx(1.0, rel=1e-12)


# --- evaluate ---


def test_auto_names_by_kind(digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_STEPS", 2)
    toy = Rows(drawn(50, 2).float(), modes=Modes(torch.zeros(1, 2), 1.0))
    table, image = Rows(drawn(50, 4).float()), Rows(digits[0][:60])
    assert list(evaluate(toy, toy.x)) == ["modes_covered", "high_quality", "sliced_wasserstein"]
    assert list(evaluate(table, table.x)) == AUTO_IMAGE[:5]
    assert list(evaluate(image, image.x)) == AUTO_IMAGE
    assert set(AUTO_IMAGE) < set(METRICS)
    assert evaluate(table, table.x, ["coverage", "precision"]) == {"coverage": 1.0, "precision": 1.0}
    assert evaluate(table, table.x, "recall") == {"recall": 1.0}


def test_toy_figures() -> None:
    centers = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    toy = Rows(centers.repeat(10, 1), modes=Modes(centers, 0.1))
    assert evaluate(toy, centers[:1].repeat(4, 1), "modes_covered") == {"modes_covered": 1.0}
    got = evaluate(toy, torch.tensor([[0.0, 0.1], [1.0, 1.0], [3.0, 2.9], [9.0, 9.0]]))
    assert (got["modes_covered"], got["high_quality"]) == (2.0, 0.5)


@pytest.mark.parametrize(("name", "modes"), [("gaussians25", 25), ("gaussians8", 8)])
def test_real_points_of_the_toys_cover_all_modes(name: str, modes: int) -> None:
    data = open_dataset(name)
    got = evaluate(data, data.batch(torch.arange(10_000))[0])
    assert got["modes_covered"] == modes
    assert got["high_quality"] == pytest.approx(1.0 - math.exp(-4.5), abs=0.005)  # a Rayleigh radius within 3 sigma
    assert got["sliced_wasserstein"] < 0.2


def test_figures_order_samples_of_digits_by_quality(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = digits
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, shown = x[order[:898]], Rows(x[order[898:]], y[order[898:]])
    noise = drawn(*held_out.shape).float()
    real, noisy, lost = (
        evaluate(shown, samples)
        for samples in (held_out, (held_out + 0.3 * noise).clamp(-1.0, 1.0), noise.clamp(-1.0, 1.0))
    )
    one_class = evaluate(shown, held_out[y[order[:898]] == 3])
    for name in AUTO_IMAGE:
        if name != "recall":  # noise widens the balls that recall counts
            sign = 1.0 if METRICS[name].lower_is_better else -1.0
            assert sign * real[name] < sign * noisy[name] < sign * lost[name], name
    assert real["precision"] > 0.9
    assert real["coverage"] > 0.9
    assert 0.9 < real["density"] < 1.1
    assert one_class["precision"] > 0.9  # good digits, but of one kind
    assert max(one_class["recall"], one_class["coverage"]) < 0.5
    assert one_class["fid_small_classifier"] > 3.0 * real["fid_small_classifier"]


def test_evaluating_twice_gives_the_same_and_leaves_torch_alone(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    data, samples = open_dataset("digits"), digits[0][:300].flip(3)
    before = torch.random.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    first = evaluate(data, samples)
    with torch.inference_mode():
        again = evaluate(data, samples.clone())
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert evaluate(data, samples, ["fid_small_classifier"], seed=1) != {
            "fid_small_classifier": first["fid_small_classifier"]
        }
        assert not torch.is_grad_enabled()
    assert again == first
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before[1:]


def test_small_classifier_figures_do_not_depend_on_the_number_of_threads(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_STEPS", 20)
    names, before = ["kid_small_classifier", "fid_small_classifier"], torch.get_num_threads()
    got = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got.append(evaluate(open_dataset("digits"), digits[0][:200].flip(3), names))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert got[0] == got[1]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (3, 12, 20), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "turns"])
def test_small_classifier_learns_images_of_any_shape(
    shape: tuple[int, ...], labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stripes that brighten along one axis: which of two they are, or how they are turned, is easy to learn."""
    monkeypatch.setattr(features, "_STEPS", 50)
    labels = torch.arange(64) % 2
    ramp = torch.linspace(-0.5, 0.5, shape[1]).reshape(1, 1, -1, 1)
    x = ramp * (1.0 + labels.reshape(-1, 1, 1, 1)) + 0.05 * drawn(64, *shape).float()
    extract = features.small_classifier(Rows(x, labels if labelled else None), seed=0, device=torch.device("cpu"))
    hidden = extract(x)
    assert hidden.shape == (64, 64)
    assert hidden.dtype == torch.float32
    assert not hidden.requires_grad
    assert float(hidden.mean(dim=0).abs().max()) < 1e-3
    assert float(hidden.var(dim=0).mean()) == pytest.approx(1.0, rel=1e-3)
    groups = (hidden[labels == 0], hidden[labels == 1]) if labelled else (hidden, extract(x.rot90(2, (2, 3))))
    gap = (groups[0].mean(dim=0) - groups[1].mean(dim=0)).norm()
    spread = max(float(group.var(dim=0).sum().sqrt()) for group in groups)
    assert float(gap) > 3.0 * spread


def test_big_sets_are_compared_by_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgan.quality._MOST_ROWS", 40)
    data = Rows(drawn(500, 2, seed=1).float())
    asked: list[torch.Tensor] = []
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda indices, flips: (asked.append(indices), batch(indices, flips))[1])
    first = evaluate(data, drawn(300, 2, seed=2).float())
    assert [len(set(indices.tolist())) for indices in asked] == [40]
    assert evaluate(data, drawn(300, 2, seed=2).float()) == first
    assert evaluate(data, drawn(300, 2, seed=2).float(), seed=1) != first


NAN = torch.tensor([[0.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])


@pytest.mark.parametrize(
    ("kind", "samples", "metrics", "message"),
    [
        ("table", torch.zeros(9, 2), ["recal"], r"unknown metric 'recal'; did you mean 'recall'\?"),
        ("table", torch.zeros(9, 2), "modes_covered", "data set 'rows' has no known modes"),
        ("table", torch.zeros(9, 2), "fid_small_classifier", "fid_small_classifier: data set 'rows' is a table"),
        ("table", torch.zeros(9, 2), ["inception_fid"], "inception_fid: data set 'rows' is a table"),
        ("pairs", torch.zeros(9, 2, 8, 8), ["inception_is"], "has 2 channels, expected 1 or 3"),
        ("table", torch.zeros(9, 3), "auto", r"samples: shape \(9, 3\), expected \[N, 2\]"),
        ("table", torch.zeros(0, 2), "auto", r"samples: shape \(0, 2\), expected \[N, 2\] with N > 0"),
        ("table", NAN, "auto", "samples: 2 of 3 hold NaN or infinity"),
        ("table", torch.zeros(3, 2), "auto", "precision: 3 samples against the 20 rows of .* at least 6 of each"),
        (
            "few",
            torch.zeros(9, 2),
            ["recall"],
            "recall: 9 samples against the 4 rows of data set 'rows', expected at least 6",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(
    kind: str, samples: torch.Tensor, metrics: str | list[str], message: str
) -> None:
    data = Rows(torch.zeros({"table": (20, 2), "few": (4, 2), "pairs": (20, 2, 8, 8)}[kind]))
    with pytest.raises(InputError, match=message) as caught:
        evaluate(data, samples, metrics)
    assert "\n" not in str(caught.value)


# --- Inception ---


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_figures_on_a_stand_in_network(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures around the network: what it is given and what is made of what it gives."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (150, channels, 4, 4), dtype=np.uint8))
    data, samples = Rows(pixels[:100].float() / 127.5 - 1.0), pixels[70:].float() / 127.5 - 1.0
    seen: list[torch.Tensor] = []

    def project(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1)[:, :5].float() / 255.0, images.flatten(1)[:, 5:9].float() / 64.0

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(images)
        return project(images)

    def loaded(weights: str | None, *, device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        assert (weights, device.type) == ("some.pth", "cpu")
        return extract

    monkeypatch.setattr(features, "load_inception", loaded)
    got = evaluate(data, samples, ["inception_is", "inception_kid", "inception_fid"], inception_weights="some.pth")
    assert list(got) == ["inception_is", "inception_kid", "inception_fid"]
    colour = pixels.expand(-1, 3, -1, -1)
    given = torch.cat(seen)
    assert given.dtype == torch.uint8
    assert torch.equal(given[:80], colour[70:])
    assert len({tuple(row.tolist()) for row in given[80:].flatten(1)}) == 80  # as many real ones, none twice
    (fake, logits), (real, _) = project(given[:80]), project(given[80:])
    assert got["inception_fid"] == pytest.approx(frechet_distance(real, fake), rel=1e-9)
    assert got["inception_kid"] == pytest.approx(mmd_by_loops(real.double().numpy(), fake.double().numpy()), rel=1e-9)
    assert got["inception_is"] == pytest.approx(inception_score(logits), rel=1e-12)
    assert got["inception_is"] > 1.0


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the folder where torch hub would keep the file."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(features.INCEPTION_VARIABLE, raising=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("metric", ["inception_fid", "inception_kid", "inception_is"])
def test_missing_inception_weights_say_where_to_put_them(metric: str, no_weights: Path) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(Rows(torch.zeros(20, 1, 8, 8)), torch.zeros(9, 1, 8, 8), [metric])
    message = str(caught.value)
    assert "\n" not in message
    for part in ("weights-inception-2015-12-05-6726825d.pth", str(no_weights), "FASTGAN_INCEPTION_WEIGHTS"):
        assert part in message


def test_named_inception_weights_must_be_there(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_weights / features.INCEPTION_FILES[0]).touch()
    monkeypatch.setenv(features.INCEPTION_VARIABLE, "/nowhere/a.pth")
    with pytest.raises(InputError, match=r"FASTGAN_INCEPTION_WEIGHTS: /nowhere/a\.pth is not a file"):
        features.load_inception(None, device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"inception_weights: /nowhere/b\.pth is not a file"):
        features.load_inception("/nowhere/b.pth", device=torch.device("cpu"))


@pytest.mark.parametrize("name", features.INCEPTION_FILES)
def test_inception_weights_without_the_package(name: str, no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_weights / name).touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=f"torch-fidelity, pip install .*{name}$") as caught:
        features.load_inception(None, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


class StandIn(torch.nn.Module):
    """The calls of torch-fidelity's extractor, with one weight."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        assert feature_extractor_weights_path is not None, "would download"
        self.weight = torch.nn.Parameter(torch.randn(2))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flatten(1).float() * self.weight[0], x.flatten(1).float() * self.weight[1]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_weights_are_found_and_loaded(no_weights: Path, package: None) -> None:
    torch.save({"weight": torch.tensor([2.0, 3.0])}, no_weights / features.INCEPTION_FILES[1])
    before = torch.random.get_rng_state()
    pool, logits = features.load_inception(None, device=torch.device("cpu"))(
        torch.full((2, 3, 1, 1), 5, dtype=torch.uint8)
    )
    assert torch.equal(pool, torch.full((2, 3), 10.0))
    assert torch.equal(logits, torch.full((2, 3), 15.0))
    assert not pool.requires_grad
    assert torch.equal(torch.random.get_rng_state(), before)


class Touch:
    """Pickled, this makes a file when it is loaded by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_inception_weights_that_are_something_else(tmp_path: Path, no_weights: Path, package: None) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "good.pth")
    files = {name: tmp_path / name for name in ("text.pth", "short.pth", "other.pth", "code.pth")}
    files["text.pth"].write_text("hello")
    files["short.pth"].write_bytes((tmp_path / "good.pth").read_bytes()[:200])
    torch.save({"bias": torch.zeros(2)}, files["other.pth"])
    torch.save(Touch(tmp_path / "ran"), files["code.pth"])
    for path in files.values():
        with pytest.raises(InputError, match=f"{path.name}: not the Inception weights") as caught:
            features.load_inception(path, device=torch.device("cpu"))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_inception_figures_with_the_published_weights(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    try:
        features.load_inception(None, device=torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))
    data = open_dataset("digits")
    names = ["inception_fid", "inception_kid", "inception_is"]
    same, noise = evaluate(data, digits[0], names), evaluate(data, drawn(200, 1, 8, 8).float().clamp(-1.0, 1.0), names)
    assert same["inception_fid"] == pytest.approx(0.0, abs=1e-2)
    assert noise["inception_fid"] > 50.0
    assert same["inception_kid"] < noise["inception_kid"]
    assert 1.0 < same["inception_is"] < 10.0
