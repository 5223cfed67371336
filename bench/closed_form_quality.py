"""Training in closed form comes to the quality that training through autograd does: the same recipes, several seeds.

python -m bench.closed_form_quality [--recipe NAME] [--kimg N] [--seeds N]

One run after the other; each is written to bench/results/cpu/closed_form_quality.json when it ends, and what is there
is not run again (delete the file after a change of the engine). Both ways see the same weights, noise and order of
data; they part through rounding alone, which training amplifies, so that the means over seeds are what can agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import fastgan
from bench.conditions import RESULTS, conditions, write
from fastgan import trainer
from fastgan.recipes import Recipe, load_recipe

FIGURES = {
    "gaussians25": ("modes_covered", "high_quality"),
    "wgan-gp": ("fid_small_classifier", "precision", "recall"),
}
WAYS = {"closed form": True, "autograd": False}


def build_engine(recipe: Recipe, data: Any, closed_form: bool) -> fastgan.Engine:
    """The recipe's engine on that path."""
    told = functools.partial(fastgan.Engine, closed_form=closed_form)
    with mock.patch.object(trainer, "Engine", told):  # recipes have no key for it
        return trainer.build_engine(recipe, tuple(data.shape), data.n_classes, "cpu")


def train(recipe: Recipe, closed_form: bool) -> dict[str, Any]:
    """The figures at the end of a run, and what each phase ran on."""
    data = trainer.open_data(recipe.data)
    engine = build_engine(recipe, data, closed_form)
    with tempfile.TemporaryDirectory() as outdir:
        begin = time.perf_counter()
        report = fastgan.Trainer(
            engine, data, batch=recipe.batch, kimg=recipe.kimg, outdir=outdir, name=recipe.name,
            evaluation=recipe.evaluation, progress="none", recipe=recipe,
        ).run()  # fmt: skip
    if report.signal:
        raise SystemExit("stopped; the runs that ended are kept")
    figures = {name: report.quality[name] for name in FIGURES[recipe.name]}
    wall = time.perf_counter() - begin
    return {**figures, "train_s": report.train_seconds, "wall_s": wall, "explain": engine.explain().splitlines()}


def summary(runs: dict[str, list[dict[str, Any]]], names: tuple[str, ...]) -> dict[str, Any]:
    """By figure: mean and standard deviation each way, and how many standard errors lie between the means."""
    out: dict[str, Any] = {}
    for name in names:
        values = {way: [run[name] for run in done] for way, done in runs.items()}
        mean = {way: statistics.fmean(v) for way, v in values.items()}
        deviation = {way: statistics.stdev(v) for way, v in values.items()}
        error = sum(deviation[way] ** 2 / len(v) for way, v in values.items()) ** 0.5
        apart = abs(mean["closed form"] - mean["autograd"])
        out[name] = {
            "mean": mean,
            "standard_deviation": deviation,
            "difference": mean["closed form"] - mean["autograd"],
            "standard_error": error,
            "within_two_standard_errors": apart <= 2 * error,
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=FIGURES, help="one of them; both where not given")
    parser.add_argument("--kimg", type=float, help="thousands of real images, to shorten; the recipe's where not given")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: a standard deviation takes at least 2")
    out = RESULTS / "cpu" / "closed_form_quality.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": {}, "summary": {}}
    result = {"conditions": conditions(), **{key: result[key] for key in ("runs", "summary")}}
    for name in [args.recipe] if args.recipe else FIGURES:
        recipe = load_recipe(name)
        recipe = dataclasses.replace(recipe, kimg=args.kimg or recipe.kimg)
        what = f"{name}, {recipe.kimg:g} kimg"
        done: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for seed in range(args.seeds):
            for way, closed_form in WAYS.items():
                key = f"{what}, {way}, seed {seed}"
                had = key in result["runs"]
                if not had:
                    result["runs"][key] = train(dataclasses.replace(recipe, seed=seed), closed_form)
                    write("closed_form_quality", result)
                run = result["runs"][key]
                done[way].append(run)
                figures = ", ".join(f"{figure} {run[figure]:.4g}" for figure in FIGURES[name])
                print(f"{key}: {figures}, {run['wall_s']:.0f} s{' (had it)' if had else ''}", flush=True)
        result["summary"][what] = table = summary(done, FIGURES[name])
        print(f"{what}, {args.seeds} seeds")
        for figure, row in table.items():
            both = ", ".join(f"{w} {row['mean'][w]:.4g} ± {row['standard_deviation'][w]:.2g}" for w in WAYS)
            inside = "within" if row["within_two_standard_errors"] else "NOT within"
            print(f"  {figure}: {both}; the means differ by {row['difference']:.2g}, {inside} two standard errors "
                  f"({2 * row['standard_error']:.2g})")  # fmt: skip
    print(f"written to {write('closed_form_quality', result)}")


if __name__ == "__main__":
    main()
