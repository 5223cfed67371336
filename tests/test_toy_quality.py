"""The toy recipes find the modes: 25 Gaussians, 2,500 samples, within 3 sigma (VEEGAN 2017, PacGAN 2018)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "modes", "high_quality"), [("gaussians25-wgan-gp", 23, 0.6), ("gaussians25", 25, 0.9)]
)
def test_recipe_covers_the_grid(recipe: str, modes: int, high_quality: float, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastgan", "train", "--recipe", recipe, "--outdir", str(tmp_path), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    quality = json.loads(run.stdout)["quality"]
    assert quality["modes_covered"] >= modes
    assert quality["high_quality"] >= high_quality
