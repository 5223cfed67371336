"""``fastgan profile``: a recipe, trained for a few seconds and thrown away."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgan.data.resident import ResidentFeed
from fastgan.errors import InputError
from fastgan.plain import as_json
from fastgan.profiling import profile
from fastgan.recipes.schema import load_recipe
from fastgan.trainer import Trainer

_SECONDS = 10.0
_AT_ONCE = 64  # iterations of one call, where they are one replay of a graph or several


def main(args: Namespace, default: str, overrides: Mapping[str, tuple[str, Any]]) -> int:
    """The command, with its arguments read.

    Args:
        args: of the command line.
        default: the recipe where none is named.
        overrides: what options put before the recipe's values.
    """
    for name in ("json", "html", "trace"):
        path = getattr(args, name)
        if path not in (None, "-") and not Path(path).parent.is_dir():
            raise InputError(f"--{name}: {path}: its folder does not exist")
        if path not in (None, "-") and Path(path).is_dir():
            raise InputError(f"--{name}: {path}: is a folder, expected a file")
    recipe = load_recipe(args.recipe or default, overrides)
    torch.manual_seed(recipe.seed)  # what dropout draws from
    trainer = Trainer.from_recipe(recipe, device=args.device, progress="none")

    def say(line: str) -> None:
        print(f"profile: {line}", file=sys.stderr, flush=True)

    p = profile(
        trainer.engine, what=f"recipe {recipe.name}", command=shlex.join(["fastgan", *sys.argv[1:]]),
        progress=None if args.quiet else say,
    )  # fmt: skip
    if args.iterations is not None and args.iterations < p.least:
        raise InputError(f"--iterations: {args.iterations}, expected at least {p.least}")
    at_once = _AT_ONCE if isinstance(trainer.feed, ResidentFeed) else 1
    with p:
        made, end = 0, time.monotonic() + _SECONDS
        while made < (args.iterations or p.least) or (args.iterations is None and time.monotonic() < end):
            count = min(at_once, args.iterations - made) if args.iterations else at_once
            trainer.engine.run(trainer.feed, count)
            made += count
    print(as_json(p.result, indent=1) if args.json == "-" else p, flush=True)
    p.write(json=None if args.json == "-" else args.json, html=args.html, trace=args.trace)
    return 0
