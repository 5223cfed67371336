"""The recipes that need no data of the user's, from start to finish: wall time, speed and quality.

python -m bench.bench_recipes          one after the other; writes bench/results/cpu/recipes.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

from bench.conditions import conditions, write

RECIPES = ("wgan-gp", "gaussians8", "gaussians25", "gaussians25-wgan-gp")


def main() -> None:
    said = conditions(timing="one run each, `fastgan train --recipe NAME --json`, defaults; wall_s includes the start")
    results = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as outdir:
            command = [sys.executable, "-m", "fastgan", "train", "--recipe", recipe, "--outdir", outdir, "--json"]
            begin = time.perf_counter()
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            wall = time.perf_counter() - begin
        report = json.loads(run.stdout)
        keys = ("iterations", "images", "train_seconds", "iterations_per_second", "seconds_per_kimg", "quality")
        results[recipe] = {"wall_s": wall, **{key: report[key] for key in keys}}
        print(f"{recipe}: {wall:.0f} s, {report['seconds_per_kimg']:.3f} s/kimg, {report['quality']}", flush=True)
    print(f"written to {write('recipes', {'conditions': said, 'recipes': results})}")


if __name__ == "__main__":
    main()
