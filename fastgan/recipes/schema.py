"""The keys of a recipe with their types, ranges and defaults, and the reader that holds a file to them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan import models
from fastgan.errors import InputError, unknown
from fastgan.losses import LOSSES
from fastgan.options import Reader, option
from fastgan.penalties import PENALTIES

_FOLDER = Path(__file__).parent
_ALIASES = {"dcgan": "dcgan32"}
MOST_KIMG = 1e9
STRENGTH = {"gradient-penalty": "weight", "dragan": "weight", "r1": "gamma", "r2": "gamma"}


@dataclass(frozen=True)
class DataSpec:
    """What to train on: a name (digits, gaussians25, gaussians8) or a path, and how images are prepared."""

    source: str = "digits"
    resolution: int | None = option(None, low=1)
    channels: str | None = option(None, choices=("grey", "rgb"))
    crop: bool = False
    mirror: bool = False


@dataclass(frozen=True)
class LossSpec:
    """Adversarial loss; ``clip`` bounds the discriminator's weights (Wasserstein without a penalty)."""

    name: str = option("non-saturating", choices=tuple(LOSSES))
    clip: float | None = option(None, above=0)


@dataclass(frozen=True)
class PenaltySpec:
    """A gradient penalty on the discriminator; gradient-penalty and dragan have a weight, r1 and r2 a gamma."""

    name: str = option(choices=tuple(PENALTIES))
    weight: float | None = option(None, low=0)
    gamma: float | None = option(None, low=0)
    target: float | None = option(None, low=0)
    noise: float | None = option(None, above=0)
    interval: int = option(1, low=1)

    def given(self) -> dict[str, float]:
        """The numbers that are set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "name" and v is not None}


@dataclass(frozen=True)
class ScheduleSpec:
    """Learning rate over the run; ``warmup``, ``start`` and ``end`` are shares of the run."""

    kind: str = option("constant", choices=("constant", "linear", "cosine"))
    warmup: float = option(0.0, low=0, high=1)
    start: float = option(0.0, low=0, below=1)
    end: float = option(1.0, above=0)
    final: float = option(0.0, low=0)


@dataclass(frozen=True)
class OptimizerSpec:
    """Adam or AdamW."""

    name: str = option("adam", choices=("adam", "adamw"))
    lr: float = option(2e-4, above=0)
    betas: tuple[float, float] = option((0.5, 0.999), low=0, below=1)
    eps: float = option(1e-8, above=0)
    weight_decay: float | None = option(None, low=0)
    schedule: ScheduleSpec | None = None


@dataclass(frozen=True)
class EMASpec:
    """Average of the generator: either ``decay`` or ``halflife_kimg`` with ``rampup``."""

    decay: float | None = option(None, low=0, below=1)
    halflife_kimg: float | None = option(None, above=0)
    rampup: float | None = option(None, above=0)


@dataclass(frozen=True)
class EvaluationSpec:
    """Quality figures at the end, and every ``every_kimg`` where given; metrics ``auto``, ``none`` or names."""

    metrics: tuple[str, ...] = ("auto",)
    samples: int = option(2000, low=2, high=1_000_000)
    every_kimg: float | None = option(None, above=0, high=MOST_KIMG)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on. ``kimg`` counts thousands of real images shown to the discriminator.

    ``generator`` and ``discriminator`` hold the key ``model`` and that model's options (see ``fastgan.models``).
    """

    generator: dict[str, Any]
    discriminator: dict[str, Any]
    name: str = ""
    data: DataSpec = dataclasses.field(default_factory=DataSpec)
    conditional: bool = False
    latent: int = option(100, low=1)
    loss: LossSpec = dataclasses.field(default_factory=LossSpec)
    penalties: tuple[PenaltySpec, ...] = ()
    n_critic: int = option(1, low=1)
    batch: int = option(64, low=1)
    kimg: float = option(100.0, above=0, high=MOST_KIMG)
    g_optimizer: OptimizerSpec = dataclasses.field(default_factory=OptimizerSpec)
    d_optimizer: OptimizerSpec = dataclasses.field(default_factory=OptimizerSpec)
    ema: EMASpec | None = EMASpec(decay=0.999)
    precision: str = option("auto", choices=("auto", "fp32", "tf32", "bf16", "fp16"))
    seed: int = 0
    evaluation: EvaluationSpec = dataclasses.field(default_factory=EvaluationSpec)
    snapshot_kimg: float | None = option(None, above=0, high=MOST_KIMG)
    log_kimg: float | None = option(None, above=0, high=MOST_KIMG)

    @property
    def iterations(self) -> int:
        """Iterations of the whole run: ``n_critic`` batches of real images each."""
        return iterations(self.kimg, self.n_critic * self.batch)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every key written out: :func:`read` gives the same recipe back."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        for penalty in plain["penalties"]:
            for key in [k for k, v in penalty.items() if v is None]:
                del penalty[key]
        first = ("name", "data", "conditional", "generator", "discriminator")
        return {k: plain[k] for k in (*first, *(k for k in plain if k not in first))}


def iterations(kimg: float, images: int) -> int:
    """The fewest iterations of ``images`` real images each that show ``kimg`` thousand."""
    return max(1, math.ceil(round(kimg * 1000, 6) / images))


def names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def about(name: str) -> str:
    """The first line of a shipped recipe: what it is for."""
    return (_FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")


def load_recipe(name: str | Path, overrides: Mapping[str, tuple[str, Any]] | None = None) -> Recipe:
    """Read a shipped recipe or a file.

    Args:
        name: one of :func:`names`, or the path of a YAML file.
        overrides: values that go before the file's: key path to (the option that errors name, the value), e.g.
            ``{"g_optimizer.lr": ("--g-lr", 1e-4)}``. The path ``gamma`` sets the weight of every penalty.

    Raises:
        InputError: the file cannot be read, or a key or value in it is not what is expected.
    """
    data, file, stem = _load(name)
    data.setdefault("name", stem)
    return _read_with(data, file, overrides or {})


def override(recipe: Recipe, file: str, overrides: Mapping[str, tuple[str, Any]]) -> Recipe:
    """``recipe`` with overrides as for :func:`load_recipe`; ``file`` is where the recipe came from."""
    return _read_with(recipe.to_dict(), file, overrides)


def _read_with(data: dict[str, Any], file: str, overrides: Mapping[str, tuple[str, Any]]) -> Recipe:
    for path, (origin, value) in overrides.items():
        _set(data, path, value, origin)
    return read(data, file, {"penalties" if path == "gamma" else path: o for path, (o, _) in overrides.items()})


def read(data: Mapping[str, Any], file: str, given: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from plain data; ``file`` and ``given`` name the origin of values in errors."""
    reader = Reader(file, given)
    recipe = reader.read(Recipe, data)
    if not recipe.name or "/" in recipe.name or recipe.name.startswith("."):
        raise reader.error("name", f"name is {recipe.name!r}, expected one that a folder can have")
    for i, penalty in enumerate(recipe.penalties):
        at = f"penalties.{i}"
        strength = STRENGTH[penalty.name]
        allowed = {
            strength,
            "interval",
            *{"gradient-penalty": ["target"], "dragan": ["target", "noise"]}.get(penalty.name, []),
        }
        for key in penalty.given():
            if key not in allowed:
                raise reader.error(f"{at}.{key}", f"{at}: {unknown(f'key of {penalty.name}', key, allowed)}")
        if strength == "gamma" and penalty.gamma is None:
            raise reader.error(f"{at}.gamma", f"{at}.gamma is missing")
    for player in ("g_optimizer", "d_optimizer"):
        schedule = getattr(recipe, player).schedule
        if schedule is not None and not schedule.start < schedule.end:
            raise reader.error(
                f"{player}.schedule", f"{player}.schedule: start is {schedule.start}, expected less than end"
            )
    if recipe.ema is not None and (recipe.ema.decay is None) == (recipe.ema.halflife_kimg is None):
        raise reader.error("ema", "ema has both or neither of decay and halflife_kimg, expected one")
    return dataclasses.replace(
        recipe,
        generator=_network("generator", recipe.generator, reader),
        discriminator=_network("discriminator", recipe.discriminator, reader),
    )


def _network(role: str, spec: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """A network's part of a recipe, checked and with every option written out."""
    return {"model": spec.get("model"), **_plain(dataclasses.asdict(models.options(role, spec, reader)))}


def _load(name: str | Path) -> tuple[dict[str, Any], str, str]:
    """The mapping in a recipe's file, the file's name for messages, and its stem."""
    import yaml

    shipped = _FOLDER / f"{_ALIASES.get(str(name), name)}.yaml"
    path = shipped if str(name) in (*names(), *_ALIASES) else Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise unknown("recipe", str(name), [*names(), *_ALIASES])
    file = str(path) if path is not shipped else f"recipe {name}"
    try:
        data = parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file}: cannot be read: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from e
    except yaml.MarkedYAMLError as e:
        line = f"{file}:{e.problem_mark.line + 1}" if e.problem_mark else file
        raise InputError(f"{line}: not YAML: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise InputError(f"{file}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a recipe, a mapping of keys to values")
    return data, file, path.stem


def parse(text: str) -> Any:
    """Plain data from YAML; whatever is wrong with it is a ``yaml.YAMLError``."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except Exception as e:  # the reading of numbers and dates raises about every type there is
        raise yaml.YAMLError(e) from e


def _set(data: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Put ``value`` at a key path; a text on the way becomes a mapping, as for the reader."""
    if path == "gamma":
        penalties = data.get("penalties")
        if not isinstance(penalties, list) or not penalties:
            raise InputError(f"{origin}: the recipe has no penalty to set it for")
        for i, penalty in enumerate(penalties):
            kind = penalty if isinstance(penalty, str) else penalty.get("name") if isinstance(penalty, dict) else None
            _set(data, f"penalties.{i}.{STRENGTH.get(str(kind), 'weight')}", value, origin)
        return
    *parents, last = path.split(".")
    node: Any = data
    for key in parents:
        place = _place(node, key, path, origin)
        child = node[place] if isinstance(node, list) else node.get(place)
        if child is None:
            node[place] = child = list(OptimizerSpec.betas) if key == "betas" else {}
        elif isinstance(child, str):
            node[place] = child = {{"data": "source", "schedule": "kind"}.get(key, "name"): child}
        node = child
    node[_place(node, last, path, origin)] = value


def _place(node: Any, key: str, path: str, origin: str) -> Any:
    if isinstance(node, list):
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(node):
            raise InputError(f"{origin}: {path}: expected a number below {len(node)} where {key!r} stands")
        return int(key)
    if not isinstance(node, dict):
        raise InputError(f"{origin}: {path}: nothing can be set below {node!r}")
    return key


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
