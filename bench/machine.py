"""The machine and what is measured, as the first section of a long measurement."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.sections import Context
from fastgan.machine import conditions, version

_PACKAGES = ("pytest", "nvidia-ml-py", "hypothesis")


def slug(device: torch.device) -> str:
    """The folder of results of a device."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def environment(context: Context) -> None:
    context.put("conditions", conditions(context.device))
    context.put("versions", {name: version(name) for name in _PACKAGES})
    context.put("commit", commit())


def commit() -> dict[str, Any]:
    """What is measured; unknown where the tree came without its history."""
    tree = Path(__file__).parents[1]
    try:
        said = [
            subprocess.run(["git", *args], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return {"unknown": "no git history here"}
    return {"commit": said[0], "changed": bool(said[1]), "environment": os.environ.get("TRITON_INTERPRET", "")}
