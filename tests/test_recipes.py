"""Every shipped recipe, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgan.errors import InputError
from fastgan.recipes import about, load_recipe, names
from fastgan.recipes.schema import override, read
from fastgan.trainer import Trainer

FOLDER = Path(load_recipe.__code__.co_filename).parent


@pytest.mark.parametrize("name", names())
def test_shipped_recipe_builds_and_writes_nothing(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe == read(recipe.to_dict(), "again")
    assert about(name)
    trainer = Trainer.from_recipe(recipe, outdir=tmp_path / "runs")
    assert f"{recipe.iterations} iterations" in trainer.explain()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", names())
def test_a_copy_of_a_shipped_recipe_is_the_same(name: str, tmp_path: Path) -> None:
    copy = tmp_path / f"{name}.yaml"
    copy.write_text((FOLDER / f"{name}.yaml").read_text())
    assert load_recipe(copy) == load_recipe(name)
    assert max(map(len, copy.read_text().splitlines())) <= 120


def test_dcgan_is_the_small_one() -> None:
    assert load_recipe("dcgan") == load_recipe("dcgan32")


def with_options(**options: Any) -> dict[str, tuple[str, Any]]:
    return {key.replace("__", "."): (f"--{key}", value) for key, value in options.items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kimgs": 3}, "--kimgs: unknown key 'kimgs'; did you mean 'kimg'?"),
        ({"generator__width": 3}, "--generator__width: generator: unknown key 'width'; did you mean 'widths'?"),
        ({"generator__model": "mpl"}, "generator: unknown model 'mpl'; did you mean 'mlp'?"),
        ({"generator": None}, "generator is empty, expected a mapping"),
        (
            {"g_optimizer__schedule": {"kind": "cosin"}},
            "g_optimizer.schedule.kind: unknown value 'cosin'; did you mean 'cosine'?",
        ),
        ({"g_optimizer__schedule": {"start": 0.5, "end": 0.5}}, "start is 0.5, expected less than end"),
        ({"g_optimizer__betas": [0.5]}, "g_optimizer.betas has 1 values, expected 2"),
        ({"g_optimizer__betas__1": 1}, "g_optimizer.betas.1 is 1, expected less than 1"),
        ({"d_optimizer__lr": "fast"}, "--d_optimizer__lr: d_optimizer.lr is 'fast', expected a number"),
        ({"d_optimizer__lr": 0}, "d_optimizer.lr is 0, expected more than 0"),
        ({"d_optimizer__lr": "nan"}, "d_optimizer.lr is 'nan', expected a number"),
        ({"batch": 2.5}, "batch is 2.5, expected a whole number"),
        ({"batch": True}, "batch is True, expected a whole number"),
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"conditional": "yes"}, "conditional is 'yes', expected true or false"),
        ({"loss": "hing"}, "loss.name: unknown value 'hing'; did you mean 'hinge'?"),
        ({"loss": 3}, "loss is 3, expected a mapping"),
        ({"penalties": "r1"}, "penalties is 'r1', expected a list"),
        ({"penalties": ["r1"]}, "penalties.0.gamma is missing"),
        ({"penalties": [{"name": "r1", "weight": 1}]}, "penalties.0: unknown key of r1 'weight'"),
        ({"penalties": [{"gamma": 1}]}, "penalties.0.name is missing"),
        ({"gamma": -1}, "--gamma: penalties.0.weight is -1, expected at least 0"),
        ({"penalties__3__weight": 1}, "expected a number below 1 where '3' stands"),
        ({"penalties__²__weight": 1}, "expected a number below 1 where '²' stands"),
        ({"kimg__x": 1}, "nothing can be set below 2000"),
        ({"kimg": 1e306}, "kimg is 1e+306, expected at most 1000000000.0"),
        ({"log_kimg": "1e306"}, "log_kimg is 1e306, expected at most"),
        ({"seed": "1e30"}, "seed is 1e30, expected at most 9223372036854775807"),
        ({"seed": 10**400}, "seed is 1000"),
        ({"seed": 1 << 20_000}, "seed is a huge int, expected a whole number"),
        ({"generator__model": [1]}, "generator: unknown model [1]"),
        ({"evaluation__samples": "1e13"}, "evaluation.samples is 1e13, expected at most 1000000"),
        ({"ema": {}}, "ema has both or neither of decay and halflife_kimg"),
        ({"name": "../x"}, "name is '../x'"),
        ({"generator__widths": "wide"}, "generator.widths is 'wide', expected a list"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line(options: dict[str, Any], said: str) -> None:
    recipe = override(load_recipe("wgan-gp"), "config.json", {"kimg": ("", 2000)})
    with pytest.raises(InputError) as e:
        override(recipe, "my.yaml", with_options(**options))
    assert said in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("generator: {model: mlp\nbatch: [", "my.yaml:2: not YAML: "),
        ("- 1\n- 2", "my.yaml: expected a recipe"),
        ("", "my.yaml: expected a recipe"),
        ("batch: 3", "my.yaml: generator is missing"),
        ("a: !!python/object/apply:os.getcwd []", "my.yaml:1: not YAML: could not determine a constructor"),
        ("a: \x00", "my.yaml: not YAML: "),
        ("kimg: 2001-99-99", "my.yaml: not YAML: month must be in 1..12"),
        ("kimg: !!int abc", "my.yaml: not YAML: invalid literal for int()"),
        ("kimg: !!bool abc", "my.yaml: not YAML: "),
        ("kimg: " + "[" * 3000, "my.yaml: not YAML: maximum recursion depth"),
        (b"a: \xff", "my.yaml: cannot be read: not UTF-8 text"),
    ],
)
def test_a_broken_file_is_one_line(text: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as e:
        load_recipe(path)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_missing_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe 'wgangp'; did you mean 'wgan-gp'"):
        load_recipe("wgangp")
    with pytest.raises(InputError, match=r"no\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "no.yaml")


def test_values_as_people_write_them(tmp_path: Path) -> None:
    data = yaml.safe_load((FOLDER / "vanilla.yaml").read_text())
    data |= {
        "g_optimizer": "adamw",
        "kimg": "1e1",
        "data": "gaussians8",
        "loss": {"name": "wasserstein", "clip": "1e-2"},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    recipe = load_recipe(path, {"g_optimizer.lr": ("--lr", "1e-4"), "g_optimizer.betas.0": ("--b1", "0.1")})
    assert recipe.name == "mine"
    assert (recipe.g_optimizer.name, recipe.g_optimizer.lr, recipe.g_optimizer.betas) == ("adamw", 1e-4, (0.1, 0.999))
    assert (recipe.kimg, recipe.data.source, recipe.loss.clip) == (10.0, "gaussians8", 0.01)


def test_a_long_seed_is_exact() -> None:
    for seed in (2**53 + 1, str(2**53 + 1)):
        assert load_recipe("vanilla", {"seed": ("--seed", seed)}).seed == 2**53 + 1


def test_gamma_reaches_every_penalty() -> None:
    recipe = load_recipe("relativistic", {"gamma": ("--gamma", 3)})
    assert [(p.name, p.gamma) for p in recipe.penalties] == [("r1", 3.0), ("r2", 3.0)]
    assert load_recipe("wgan-gp", {"gamma": ("--gamma", 3)}).penalties[0].weight == 3.0
    with pytest.raises(InputError, match="--gamma: the recipe has no penalty"):
        load_recipe("vanilla", {"gamma": ("--gamma", 3)})
