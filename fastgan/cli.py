"""The command line: ``fastgan train | sample | evaluate | export | bench | profile | validate | doctor``.

Nothing heavy is imported before the arguments are read. A mistake that the user can mend ends in one line on the
standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastgan import __version__
from fastgan.errors import InputError
from fastgan.plain import as_json

if TYPE_CHECKING:
    import torch

    from fastgan.engine import Engine
    from fastgan.recipes import Recipe
    from fastgan.trainer import Report

_DEFAULT_RECIPE = "wgan-gp"
_MOST_THREADS = 4096

# option, key paths in the recipe, what --help says
_RECIPE_OPTIONS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("--data", ("data.source",), "SOURCE", "digits, gaussians25, gaussians8, or a path"),
    ("--kimg", ("kimg",), "N", "thousands of real images to show"),
    ("--batch", ("batch",), "N", "rows per update"),
    ("--lr", ("g_optimizer.lr", "d_optimizer.lr"), "X", "learning rate of both networks"),
    ("--g-lr", ("g_optimizer.lr",), "X", "... of the generator"),
    ("--d-lr", ("d_optimizer.lr",), "X", "... of the discriminator"),
    ("--b1", ("g_optimizer.betas.0", "d_optimizer.betas.0"), "X", "Adam's beta 1 of both"),
    ("--b2", ("g_optimizer.betas.1", "d_optimizer.betas.1"), "X", "Adam's beta 2 of both"),
    ("--n-critic", ("n_critic",), "N", "discriminator updates per generator update"),
    ("--gamma", ("gamma",), "X", "R1's and R2's gamma, or the gradient penalty's weight"),
    ("--loss", ("loss",), "NAME", "minimax, non-saturating, wasserstein, hinge, ..."),
    ("--precision", ("precision",), "P", "auto, fp32, tf32, bf16 or fp16"),
    ("--ema", ("ema",), "DECAY", "decay of the generator's average, or none"),
    ("--seed", ("seed",), "N", "of weights, noise and data order"),
)


class _Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a mistake; the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def options(self) -> list[str]:
        return [o for action in self._actions for o in action.option_strings]


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    def wide(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=26)

    top = _Parser(
        prog="fastgan",
        description="Train GANs fast, with the same mathematics.",
        allow_abbrev=False,
        formatter_class=wide,
    )
    top.add_argument("--version", action="version", version=f"fastgan {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser, required=True)
    made: dict[str, _Parser] = {}

    def command(name: str, usage: str, text: str) -> _Parser:
        made[name] = commands.add_parser(
            name, help=text, description=text, usage=f"fastgan {name} {usage}", allow_abbrev=False, formatter_class=wide
        )
        return made[name]

    def common(p: _Parser) -> None:
        p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        p.add_argument("--json", action="store_true", help="print one JSON object")

    def run_of(p: _Parser) -> None:
        p.add_argument("run", nargs="?", metavar="RUN", help="a run or a checkpoint; the newest run if left out")
        p.add_argument("--outdir", default="runs", help="where runs are (default: runs)")
        p.add_argument("--no-ema", action="store_true", help="take the generator itself, not its average")

    p = command("train", "[--recipe NAME|FILE] [--data SOURCE] [options]", "train a GAN, or go on with a run")
    p.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"what to train (default: {_DEFAULT_RECIPE}); copy and edit one"
    )
    p.add_argument("--list-recipes", action="store_true", help="print the recipes and leave")
    for option, _, metavar, text in _RECIPE_OPTIONS:
        p.add_argument(option, metavar=metavar, help=text)
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key, e.g. generator.widths=[64,64]"
    )
    p.add_argument("--outdir", default="runs", help="where run folders are made (default: runs)")
    p.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="go on with a run, by default the newest")
    p.add_argument("-n", "--dry-run", action="store_true", help="show what would be done; write nothing")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    p.add_argument("--quiet", action="store_true", help="no progress")
    common(p)

    p = command("sample", "[RUN] [options]", "draw samples from a trained generator")
    run_of(p)
    p.add_argument("-n", "--number", type=int, default=64, metavar="N", help="how many (default: 64)")
    p.add_argument("--seed", type=int, default=0, help="of the latents (default: 0)")
    p.add_argument("--class", type=int, dest="label", metavar="K", help="only this class, of a conditional generator")
    p.add_argument("--out", default="samples.png", help="a .png, .npz, .npy or .csv file, or a folder for PNG files")
    common(p)

    p = command("evaluate", "[RUN] [options]", "quality figures of a trained generator")
    run_of(p)
    p.add_argument("--data", metavar="SOURCE", help="other data to compare with, of the same shape")
    p.add_argument("--metrics", metavar="A,B", help="figures (default: those of the recipe)")
    p.add_argument("--samples", type=int, metavar="N", help="how many samples (default: that of the recipe)")
    p.add_argument("--inception-weights", metavar="FILE", help="for inception_fid, inception_kid and inception_is")
    common(p)

    p = command("export", "[RUN] --out FILE [options]", "write the generator alone, for other programs")
    run_of(p)
    p.add_argument(
        "--out", required=True, metavar="FILE", help=".onnx, .pt2 (torch.export) or .safetensors (state dict)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")

    p = command("bench", "[--workload A,B] [--batch N,N] [options]", "time training beside other ways of doing it")
    p.add_argument("--workload", metavar="A,B", help="names (see --list), or your own module:function")
    p.add_argument("--batch", metavar="N,N", help="batch sizes (default: the workload's)")
    p.add_argument("--variant", metavar="A,B", help="only these")
    p.add_argument("--list", action="store_true", help="print workloads and variants and leave")
    p.add_argument("--precision", default="auto", metavar="P", help="auto, fp32, tf32 or bf16")
    p.add_argument("--rounds", type=int, default=60, metavar="N", help="of timing, at most (default: 60)")
    p.add_argument("--seconds", type=float, default=25.0, metavar="S", help="of timing a case (default: 25)")
    p.add_argument("--isolate", action="store_true", help="each variant in a process of its own")
    p.add_argument("--json", metavar="FILE", help="write the results; - is the standard output")
    p.add_argument("--html", metavar="FILE", help="write a report with plots")
    p.add_argument("--png", metavar="FOLDER", help="write the plots as pictures")
    p.add_argument("--compare", nargs=2, metavar="FILE", help="two results: exit code 1 if the second is slower")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    p.add_argument("--quiet", action="store_true", help="no progress")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")

    p = command("profile", "[--recipe NAME|FILE] [options]", "where time and memory go, and what to change")
    p.add_argument("--recipe", metavar="NAME|FILE", help=f"what to train meanwhile (default: {_DEFAULT_RECIPE})")
    for option, _, metavar, text in _RECIPE_OPTIONS:
        if option != "--kimg":
            p.add_argument(option, metavar=metavar, help=text)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe")
    p.add_argument("--iterations", type=int, metavar="N", help="how many (default: ten seconds' worth)")
    p.add_argument("--json", metavar="FILE", help="write the result; - is the standard output")
    p.add_argument("--html", metavar="FILE", help="write the result as one page")
    p.add_argument("--trace", metavar="FILE", help="write a few iterations as a Chrome trace")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    p.add_argument("--quiet", action="store_true", help="no progress")

    p = command("validate", "[--op NAME] [--dtype D] [options]", "hold every op and update to fp64, beside PyTorch")
    p.add_argument("--op", action="append", default=[], metavar="NAME", help="an op or a pair; may be repeated")
    p.add_argument(
        "--dtype", action="append", default=[], metavar="D", help="fp64, fp32, bf16 or fp16; may be repeated"
    )
    p.add_argument("--quiet", action="store_true", help="no progress")
    common(p)

    p = command("doctor", "[--json]", "versions, devices, what works here and what is lost")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return top, made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 where a check failed, 2 for a mistake of the user, 128 + the signal where one ended a run
        early.
    """
    top, made = _parser()
    args, extra = top.parse_known_args(argv)
    if extra:
        parser = made[args.command]
        if extra[0].startswith("-"):
            near = difflib.get_close_matches(extra[0].split("=")[0], parser.options(), n=1, cutoff=0.5)
            parser.error(f"unknown option {extra[0]}{f'; did you mean {near[0]}?' if near else ''}")
        parser.error(f"unexpected argument {extra[0]!r}")
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin for long are 20 times slower on cores that are shared
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    commands = {"train": _train, "sample": _sample, "evaluate": _evaluate, "export": _export, "bench": _bench,
                "profile": _profile, "validate": _validate, "doctor": _doctor}  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = commands[args.command](args)
        sys.stdout.flush()
    except InputError as e:
        print(f"fastgan: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastgan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be flushed into it
        return 141
    return code


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    print(f"fastgan: warning: {message}", file=sys.stderr)


# ---- train


def _train(args: argparse.Namespace) -> int:
    if args.list_recipes:
        from fastgan.recipes import about, names

        found = {name: about(name) for name in names()}
        print(json.dumps(found, indent=1) if args.json else _table(list(found.items())))
        return 0
    _threads(args.threads)
    import torch

    from fastgan import runs
    from fastgan.recipes.schema import load_recipe, override
    from fastgan.trainer import Trainer

    overrides = _overrides(args)
    resume: Path | None = None
    before: Recipe | None = None
    if args.resume:
        resume = runs.newest(Path(args.outdir)) if args.resume is True else Path(args.resume)
        before = _recipe_of(resume)
    if before is not None and args.recipe is None:
        recipe = override(before, f"{resume}/config.json", overrides)
    else:
        recipe = load_recipe(args.recipe or _DEFAULT_RECIPE, overrides)
    torch.manual_seed(recipe.seed)  # what dropout draws from
    trainer = Trainer.from_recipe(
        recipe,
        outdir=args.outdir,
        resume=resume or False,
        device=args.device,
        progress="none" if args.quiet else "lines" if args.json else "auto",
    )
    if before is not None:
        _must_equal(before, recipe, str(resume))
    if args.dry_run:
        _show_plan(recipe, trainer.engine, trainer.explain(), args.json)
        return 0
    report = trainer.run()
    if args.json:
        print(as_json(vars(report)))
    else:
        print(_summary(report, recipe))
    if report.signal is not None:
        print(f"stopped early; to go on: fastgan train --resume {report.folder}", file=sys.stderr)
        return 128 + report.signal
    return 0


def _overrides(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """What the options put before the recipe's values, the general options first."""
    found: dict[str, tuple[str, Any]] = {}
    for option, paths, *_ in _RECIPE_OPTIONS:
        value: Any = getattr(args, option.strip("-").replace("-", "_"), None)
        if value is not None:
            if option == "--ema":
                value = None if value == "none" else {"decay": value}
            found |= dict.fromkeys(paths, (option, value))
    for text in args.set:
        import yaml

        from fastgan.recipes.schema import parse

        path, equals, value = text.partition("=")
        if not equals or not path:
            raise InputError(f"--set {text}: expected KEY=VALUE, e.g. generator.widths=[64,64]")
        try:
            found[path] = (f"--set {path}", parse(value))
        except yaml.YAMLError as e:
            raise InputError(f"--set {text}: the value is not YAML") from e
    return found


def _recipe_of(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        InputError: not a run, or one whose networks were made in Python.
    """
    from fastgan import runs
    from fastgan.recipes.schema import read

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: {'is not' if folder.exists() else 'does not exist, expected'} a run")
    recipe = runs.config(folder)["recipe"]
    if recipe is None:
        raise InputError(f"{folder}: its networks were made in Python, not by a recipe: go on from Python as well")
    return read(recipe, str(folder / "config.json"))


def _must_equal(before: Recipe, after: Recipe, folder: str) -> None:
    """A resumed run keeps its recipe, but for its length and what is looked at along the way.

    The trainer has compared data and precision, which may be said in other words.
    """
    had, has = before.to_dict(), after.to_dict()
    free = ("name", "data", "precision", "kimg", "evaluation", "snapshot_kimg", "log_kimg")
    for key in had:
        if key not in free and had[key] != has[key]:
            raise InputError(f"{folder}: {key} is {has[key]}, the run has {had[key]}: a resumed run keeps its recipe")


def _show_plan(recipe: Recipe, engine: Engine, explanation: str, in_json: bool) -> None:
    import yaml

    if in_json:
        print(as_json({"recipe": recipe.to_dict(), "explain": explanation}))
        return
    print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, default_flow_style=None))
    for name, network in (("generator", engine.generator), ("discriminator", engine.discriminator)):
        assert network is not None  # a recipe has both
        n = sum(p.numel() for p in network.parameters())
        print(f"{name}, {n:,} parameters: {network}\n")
    print(explanation)


def _summary(report: Report, recipe: Recipe) -> str:
    rows = [
        ("samples", str(report.samples)),
        ("loss curves", str(report.curves)),
        ("checkpoint", str(report.checkpoint)),
    ]
    if report.iterations_per_second is not None:
        speed = f"{report.iterations_per_second:.1f} iterations/s, {report.seconds_per_kimg:.3f} s/kimg"
        rows.append(("speed", f"{speed} ({report.train_seconds:.1f} s of training)"))
    if report.metrics["skipped_steps"]:
        rows.append(("skipped", f"{report.metrics['skipped_steps']:.0f} updates, whose gradients were not finite"))
    return _table(rows + _figures(report.quality, recipe.evaluation.samples))


def _figures(quality: dict[str, float], n: int) -> list[tuple[str, str]]:
    if not quality:
        return []
    from fastgan.quality import METRICS

    rows = [(name, f"{value:<10.4g} {METRICS[name].description}") for name, value in quality.items()]
    return [("quality", f"of {n} samples, against the data"), *rows]


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


# ---- what is done with a run


def _open_run(args: argparse.Namespace) -> tuple[Recipe, Engine, dict[str, Any], Path]:
    """Recipe, engine as of the checkpoint, what config.json says of the data, and the run folder."""
    from fastgan import runs
    from fastgan.trainer import build_engine, restore

    path = Path(args.run) if args.run else runs.newest(Path(args.outdir))
    folder, last = runs.locate(path)
    recipe = _recipe_of(folder)
    data = runs.config(folder)["data"]
    engine = build_engine(recipe, tuple(data["shape"]), data["classes"], getattr(args, "device", "cpu"))
    restore(engine, runs.state(last), last)
    return recipe, engine, data, folder


def _sample(args: argparse.Namespace) -> int:
    if args.number < 1:
        raise InputError(f"-n: {args.number}, expected at least 1")
    import torch

    recipe, engine, about, folder = _open_run(args)
    labels = None
    if args.label is not None:
        if not 0 <= args.label < engine.n_classes:
            has = f"classes 0 to {engine.n_classes - 1}" if engine.n_classes else "no classes: it is not conditional"
            raise InputError(f"--class: {args.label}, but the generator of {folder} has {has}")
        labels = torch.full((args.number,), args.label)
    elif engine.n_classes:
        labels = torch.arange(args.number) * engine.n_classes // args.number  # sorted, as evenly as can be
    x = engine.sample(args.number, seed=args.seed, ema=not args.no_ema, labels=labels)
    out = Path(args.out)
    _write_samples(recipe, about, x, labels, out)
    if args.json:
        print(as_json({"run": folder, "out": out, "samples": args.number}))
    else:
        print(out)
    return 0


def _write_samples(
    recipe: Recipe, about: dict[str, Any], x: torch.Tensor, labels: torch.Tensor | None, out: Path
) -> None:
    import numpy as np

    from fastgan import pictures, runs
    from fastgan.data import Dataset
    from fastgan.trainer import open_data

    suffix = out.suffix.lower()
    if suffix not in (".png", ".npz", ".npy", ".csv", ""):
        raise InputError(f"--out: {out}, expected a .png, .npz, .npy or .csv file, or a folder")
    shape = tuple(about["shape"])
    if not suffix and len(shape) != 3:
        raise InputError(
            f"--out: {out}, but a folder is for images and {about['name']!r} is a table: take .csv or .npz"
        )
    # pixels need no data; the units of a table are the data's
    data = Dataset(about["name"], np.empty((1, *shape), np.uint8)) if len(shape) == 3 else open_data(recipe.data)
    values = data.denormalise(x)  # uint8 [N, H, W, C], or float32 [N, D] in the file's units
    try:
        if suffix == ".png":
            pictures.samples(data, x, out)
        elif suffix == ".npz":
            arrays: dict[str, Any] = {"x": values} if labels is None else {"x": values, "y": labels.numpy()}
            np.savez(out, **arrays)
        elif suffix == ".npy":
            np.save(out, values)
        elif suffix == ".csv":
            form = "%d" if values.dtype == np.uint8 else "%.9g"
            np.savetxt(out, values.reshape(len(values), -1), delimiter=",", fmt=form)
        else:
            out.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(values):
                pictures.write_whole(out / f"{i:06d}.png", pictures.png(image))
    except OSError as e:
        raise runs.cannot_write(out, e) from e


def _evaluate(args: argparse.Namespace) -> int:
    import dataclasses

    from fastgan.recipes.schema import EvaluationSpec
    from fastgan.trainer import open_data, quality

    recipe, engine, _, folder = _open_run(args)
    changes: dict[str, Any] = {}
    if args.metrics:
        changes["metrics"] = tuple(name.strip() for name in args.metrics.split(","))
    elif recipe.evaluation.metrics == ("none",):  # who asks for figures wants some
        changes["metrics"] = ("auto",)
    if args.samples is not None:
        if args.samples < 2:
            raise InputError(f"--samples: {args.samples}, expected at least 2")
        changes["samples"] = args.samples
    evaluation: EvaluationSpec = dataclasses.replace(recipe.evaluation, **changes)
    spec = dataclasses.replace(recipe.data, source=args.data) if args.data else recipe.data
    found = quality(engine, open_data(spec), evaluation, ema=not args.no_ema, inception_weights=args.inception_weights)
    if args.json:
        print(as_json({"run": folder, "samples": evaluation.samples, "quality": found}))
    else:
        print(_table([("run", str(folder)), *_figures(found, evaluation.samples)]))
    return 0


def _export(args: argparse.Namespace) -> int:
    from fastgan.export import export_generator

    recipe, engine, _, folder = _open_run(args)
    average = None if args.no_ema else engine.generator_ema
    network = average or engine.generator
    assert network is not None  # a recipe has one
    out = export_generator(network, recipe.latent, args.out, n_classes=engine.n_classes)
    print(as_json({"run": folder, "out": out}) if args.json else out)
    return 0


def _bench(args: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler and allocator write lines of their own
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _threads(args.threads)
    from fastgan.benchmark import command

    return command.main(args)


def _profile(args: argparse.Namespace) -> int:
    _threads(args.threads)
    from fastgan.profiling import command

    return command.main(args, _DEFAULT_RECIPE, _overrides(args))


def _validate(args: argparse.Namespace) -> int:
    import torch

    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
    if on_cpu and "triton" not in sys.modules:  # which reads this as it is imported, and much of torch imports it
        os.environ["TRITON_INTERPRET"] = "1"
    from fastgan import validate

    progress = None if args.quiet else lambda line: print(f"validate: {line}", file=sys.stderr, flush=True)
    report = validate.run(args.op, args.dtype, args.device, progress)
    print(as_json(report) if args.json else validate.render(report))
    return 0 if report["passed"] else 1


def _doctor(args: argparse.Namespace) -> int:
    from fastgan import doctor

    found = doctor.report()
    print(as_json(found) if args.json else doctor.render(found))
    return 0


def _threads(n: int | None) -> None:
    if n is None:
        return
    if not 1 <= n <= _MOST_THREADS:
        raise InputError(f"--threads: {n}, expected 1 … {_MOST_THREADS}")
    import torch

    torch.set_num_threads(n)
