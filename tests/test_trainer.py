"""The trainer: what a run writes, and that a stopped and resumed one equals one that was never stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastgan import Adam, Engine, Trainer, checkpoint, losses, runs
from fastgan.cli import main
from fastgan.data import open_dataset
from fastgan.errors import InputError
from fastgan.optim import Schedule
from fastgan.penalties import R1
from fastgan.recipes import load_recipe
from fastgan.recipes.schema import EvaluationSpec


def trainer(name: str = "wgan-gp", *, outdir: Path, resume: bool | Path = False, **options: Any) -> Trainer:
    """A run of seconds: small networks, no quality figures."""
    small: dict[str, Any] = {
        "kimg": 0.96,
        "batch": 16,
        "n_critic": 2,
        "evaluation.metrics": ["none"],
        "snapshot_kimg": 0.192,
    }
    if not name.startswith("dcgan"):
        small |= {"generator.widths": [16], "discriminator.widths": [16]}
    options = small | {key.replace("__", "."): value for key, value in options.items()}
    recipe = load_recipe(name, {key: (key, value) for key, value in options.items()})
    return Trainer.from_recipe(recipe, outdir=outdir, resume=resume, device="cpu", progress="none")


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall-clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("wall_")} for line in lines]


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in state.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


def assert_same_run(a: Path, b: Path) -> None:
    """Checkpoint, log and last pictures agree to the bit, wall-clock fields aside."""
    last = [checkpoint.newest(run / "checkpoints") for run in (a, b)]
    assert last[0] is not None
    assert last[1] is not None
    assert last[0].name == last[1].name
    one, other = (flat(checkpoint.load(path)) for path in last)
    ours = {"trainer/wall_seconds", "trainer/metrics_bytes"}
    assert one.keys() == other.keys()
    assert ours <= one.keys()
    for key in one.keys() - ours:
        a_value, b_value = (v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for v in (one[key], other[key]))
        assert a_value == b_value, key
    assert rows(a) == rows(b)
    assert rows(a)
    for name in ("loss_curves.png", f"samples/{last[0].name}.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# ---- what a run writes


def test_a_run_writes_its_folder(tmp_path: Path) -> None:
    report = trainer(outdir=tmp_path, evaluation__metrics=["sliced_wasserstein"], evaluation__samples=64).run()
    run = report.folder
    assert run.name == "00000-wgan-gp-digits"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {"config.json", "metrics.jsonl", "samples", "loss_curves.png", "checkpoints"}
    assert len(list(run.glob("events.out.tfevents*"))) == 1
    assert (report.iterations, report.images, report.signal) == (30, 960, None)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000768", "00000960"]
    assert len(list((run / "samples").iterdir())) == 5
    assert report.checkpoint == run / "checkpoints" / "00000960"
    for picture in (report.samples, report.curves):
        with Image.open(picture) as image:
            assert min(image.size) >= 8 * 48
    *logged, last = rows(run)
    assert [row["iteration"] for row in logged] == list(range(1, 31))
    assert logged[-1]["kimg"] == 0.96
    assert report.metrics.items() >= {k: logged[-1][k] for k in ("d_loss", "g_loss", "penalty")}.items()
    assert last["quality/sliced_wasserstein"] == report.quality["sliced_wasserstein"] > 0
    assert report.iterations_per_second is not None
    assert report.seconds_per_kimg is not None
    assert report.seconds_per_kimg * 0.032 * report.iterations_per_second == pytest.approx(1)


def test_folders_are_numbered_on(tmp_path: Path) -> None:
    (tmp_path / "00041-old").mkdir()
    assert runs.make(tmp_path, "a b/c").name == "00042-a-b-c"
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(runs.make(tmp_path, f"n{len(made)}"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name[:5] for path in made) == [f"{n:05d}" for n in range(43, 51)]


def image_folder(folder: Path) -> Path:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gaussians25", {"evaluation__metrics": "auto", "evaluation__samples": 100}),
        ("gaussians8", {}),
        ("relativistic", {"penalties__0__interval": 4, "mirror": True}),
        ("wgan", {}),
        ("hinge", {"g_optimizer__schedule": "cosine"}),
        ("least-squares", {"ema": None, "g_optimizer": "adamw"}),
        ("minimax", {"ema": {"decay": 0.9}}),
        ("conditional", {"discriminator__conditioning": "projection"}),
        ("dcgan32", {"generator__width": 4, "discriminator__width": 4, "kimg": 0.1}),
    ],
)
def test_every_kind_of_recipe_trains(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if options.pop("mirror", False):
        options["data__mirror"] = True
    report = trainer(name, outdir=tmp_path, **options).run()
    assert all(np.isfinite(value) for value in report.metrics.values())
    assert report.metrics["skipped_steps"] == 0
    with Image.open(report.samples) as image:
        assert len(image.getcolors(1 << 20) or []) > 2
    if name == "gaussians25":
        assert report.quality.keys() == {"modes_covered", "high_quality", "sliced_wasserstein"}


def test_real_files_train(tmp_path: Path) -> None:
    npz, csv = tmp_path / "pictures.npz", tmp_path / "table.csv"
    x = np.random.default_rng(0).integers(0, 256, (40, 9, 7), dtype=np.uint8)
    np.savez(npz, x=x, y=np.arange(40) % 4)
    np.savetxt(csv, np.random.default_rng(0).normal(size=(40, 5)), delimiter=",")
    folder = image_folder(tmp_path / "animals")
    for source, name, size in (
        (npz, "conditional", None),
        (folder, "dcgan32", 16),
        (folder, "conditional", 8),
        (csv, "vanilla", None),
    ):
        options = {"data__resolution": size, "data__crop": True} if size else {}
        options |= {"generator__width": 4, "discriminator__width": 4} if name == "dcgan32" else {}
        report = trainer(name, outdir=tmp_path / "runs", data__source=str(source), kimg=0.1, **options).run()
        assert report.folder.name.endswith(source.stem)
        assert report.samples.is_file()


def test_from_python(tmp_path: Path) -> None:
    engine = Engine(nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(3, 1)), latent=4, device="cpu")
    data = torch.randn(50, 3)
    fit = {"batch": 10, "outdir": tmp_path, "evaluation": EvaluationSpec(("none",)), "progress": "none"}
    report = Trainer(engine, data, kimg=0.1, **fit).run()
    assert (report.iterations, engine.images) == (10, 100)
    again = Engine(nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(3, 1)), latent=4, device="cpu")
    assert Trainer(again, data, kimg=0.2, resume=True, **fit).run().iterations == 20


# ---- resuming


class Stop(Exception):
    pass


def stopped(run: Trainer, at: int, how: Callable[[], None]) -> None:
    """Call ``how`` after that iteration's update."""
    step = run.engine.step

    def counted(*args: Any) -> None:
        step(*args)
        if run.engine.iterations == at:
            how()

    run.engine.step = counted  # type: ignore[method-assign]


def crash() -> None:
    raise Stop


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("wgan-gp", {"g_optimizer__schedule": "linear", "evaluation__every_kimg": 0.2}),
    ("relativistic", {"penalties__0__interval": 3, "data__mirror": True, "generator__norm": "batch"}),
    ("conditional", {"d_optimizer": "adamw", "loss": "hinge"}),
]


@pytest.mark.parametrize(("name", "options"), KINDS, ids=[name for name, _ in KINDS])
@pytest.mark.parametrize("at", [2, 17], ids=["before-a-checkpoint", "later"])
def test_a_crashed_run_goes_on_to_the_bit(name: str, options: dict[str, Any], at: int, tmp_path: Path) -> None:
    options = options | {"evaluation__metrics": ["sliced_wasserstein"], "evaluation__samples": 32}
    whole = trainer(name, outdir=tmp_path / "whole", **options).run()
    broken = trainer(name, outdir=tmp_path / "broken", **options)
    stopped(broken, at, crash)
    with pytest.raises(Stop):
        broken.run()
    resumed = trainer(name, outdir=tmp_path / "broken", resume=True, **options)
    assert resumed.iteration == at // 6 * 6  # a checkpoint at every sixth of 30 iterations
    report = resumed.run()
    assert report.folder == broken.folder
    assert_same_run(whole.folder, report.folder)
    assert report.quality == whole.quality


def test_a_longer_run_is_the_long_run(tmp_path: Path) -> None:
    """Where no schedule depends on the length."""
    same = {"snapshot_kimg": 0.32, "log_kimg": 0.064, "g_optimizer__schedule": None, "d_optimizer__schedule": None}
    whole = trainer(outdir=tmp_path / "whole", **same).run()
    trainer(outdir=tmp_path / "short", kimg=0.64, **same).run()
    longer = trainer(outdir=tmp_path / "short", resume=True, **same).run()
    assert longer.iterations == 30
    assert_same_run(whole.folder, longer.folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(number: int, tmp_path: Path) -> None:
    whole = trainer(outdir=tmp_path / "whole").run()
    run = trainer(outdir=tmp_path / "stopped")
    stopped(run, 16, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    report = run.run()
    assert signal.getsignal(number) is before
    assert (report.signal, report.iterations, report.quality) == (number, 16, {})
    assert report.checkpoint.name == "00000512"
    resumed = trainer(outdir=tmp_path / "stopped", resume=True)
    assert resumed.iteration == 16
    assert_same_run(whole.folder, resumed.run().folder)


def test_a_second_interrupt_aborts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # a shell lets what it starts in the background ignore interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    run = trainer(outdir=tmp_path)

    def twice() -> None:
        first = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is first:  # two signals that come before the handler has run are one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    stopped(run, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        run.run()


def test_a_killed_process_goes_on_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--recipe", "gaussians8", "--kimg", "12", "--batch", "20", "--quiet", "--device", "cpu", "--json"]
    for key in ("generator.widths=[8]", "discriminator.widths=[8]", "evaluation.metrics=none"):
        options += ["--set", key]
    assert main(["train", *options, "--outdir", f"{tmp_path}/whole"]) == 0
    command = [sys.executable, "-m", "fastgan", "train", *options, "--outdir", f"{tmp_path}/killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log = tmp_path / "killed" / "00000-gaussians8" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 50):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    before = runs.last_checkpoint(log.parent)
    assert before is not None
    assert 0 < int(before.name) < 12_000
    capsys.readouterr()
    assert main(["train", "--resume", "--outdir", f"{tmp_path}/killed", "--quiet", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12_000
    assert_same_run(tmp_path / "whole" / "00000-gaussians8", log.parent)


@pytest.mark.parametrize("moment", ["tensors half written", "before the rename", "after the rename"])
def test_a_process_killed_while_it_writes_a_checkpoint_goes_on_to_the_bit(moment: str, tmp_path: Path) -> None:
    whole = trainer(outdir=tmp_path / "whole").run()
    child = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from fastgan import checkpoint
from test_trainer import trainer

write, rename, written = checkpoint._write, os.rename, []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def write_and_die(file, data):
    written.append(file)
    third = len(written) == 5  # two files a checkpoint
    write(file, data[: len(data) // 2] if third and {moment!r} == "tensors half written" else data)
    if third and {moment!r} == "tensors half written":
        die()

def rename_and_die(old, new):
    third = len(written) == 6 and str(old).endswith(".unfinished")
    if third and {moment!r} == "before the rename":
        die()
    rename(old, new)
    if third and {moment!r} == "after the rename":
        die()

checkpoint._write, os.rename = write_and_die, rename_and_die
torch.manual_seed(0)  # as this test's own process
trainer(outdir=Path({str(tmp_path / "killed")!r})).run()
"""
    assert subprocess.run([sys.executable, "-c", child]).returncode == -signal.SIGKILL
    resumed = trainer(outdir=tmp_path / "killed", resume=True)
    third = resumed.total * 3 // 5  # a checkpoint is due every fifth of the run
    assert resumed.iteration == (third if moment == "after the rename" else third * 2 // 3)
    assert_same_run(whole.folder, resumed.run().folder)


def small_engine(**options: Any) -> Engine:
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
    return Engine(nn.Linear(4, 3), discriminator, **{"latent": 4, "device": "cpu", "loss": "hinge", **options})


def small_trainer(engine: Engine, data: Any, outdir: Path, **options: Any) -> Trainer:
    fit = {"batch": 8, "kimg": 0.24, "snapshot_kimg": 0.04, "evaluation": EvaluationSpec(("none",)), "progress": "none"}
    return Trainer(engine, data, outdir=outdir, **{**fit, **options})


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_data_loader_goes_on(shuffle: bool, tmp_path: Path) -> None:
    rows = torch.utils.data.TensorDataset(torch.randn(60, 3))

    def started(outdir: Path, **options: Any) -> Trainer:
        loader = torch.utils.data.DataLoader(rows, batch_size=10, shuffle=shuffle)
        return small_trainer(small_engine(), loader, outdir, **options)

    whole = started(tmp_path / "whole").run()
    broken = started(tmp_path / "broken")
    stopped(broken, 17, crash)
    with pytest.raises(Stop):
        broken.run()
    with pytest.warns(UserWarning, match="only if the data come in the same order again") as caught:
        resumed = started(tmp_path / "broken", resume=True)
    assert len(caught) == 1
    assert resumed.iteration == 15
    report = resumed.run()
    assert report.iterations == 30
    if not shuffle:
        assert_same_run(whole.folder, report.folder)


def test_a_run_that_was_interrupted_runs_on(tmp_path: Path) -> None:
    whole = trainer(outdir=tmp_path / "whole").run()
    run = trainer(outdir=tmp_path / "stopped")
    stopped(run, 16, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run.run().iterations == 16
    assert_same_run(whole.folder, run.run().folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "wasserstein"}, "loss is wasserstein, the run to go on with has hinge"),
        ({"loss": losses.get("hinge", clip=0.1)}, "clip is 0.1, the run to go on with has None"),
        ({"penalties": [R1(1.0)]}, r"penalties is \['R1\(gamma=1.0, interval=1\)'\], the run to go on with has \[\]"),
        ({"n_critic": 2}, "n_critic is 2, the run to go on with has 1"),
        ({"d_optimizer": Adam(lr=1.0)}, r"d_optimizer is Adam\(lr=1.0, .* has Adam\(lr=0.0002, "),
        ({"g_optimizer": Adam(schedule=Schedule("cosine", steps=9))}, "schedule='cosine to 0'.* has .*'linear to 0'"),
        ({"ema": None}, r"ema is None, the run to go on with has EMA\(decay=0.999"),
        ({"precision": "bf16"}, "precision is bf16, the run to go on with has fp32"),
        ({"seed": 1}, "seed is 1, the run to go on with has 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_refuses_another_engine(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = torch.randn(50, 3)
    settings = {"g_optimizer": Adam(schedule=Schedule("linear", steps=30))}
    run = small_trainer(small_engine(**settings), data, tmp_path).run().folder
    longer = {"g_optimizer": Adam(schedule=Schedule("linear", steps=60))}
    assert small_trainer(small_engine(**longer), data, tmp_path, kimg=0.48, resume=run).iteration == 30
    with pytest.raises(InputError, match=said) as e:
        small_trainer(small_engine(**settings | changed), data, tmp_path, resume=run)
    assert "\n" not in str(e.value)


def test_resuming_takes_what_is_given_of_how_often(tmp_path: Path) -> None:
    every = trainer(outdir=tmp_path).run().folder / "config.json"
    before = json.loads(every.read_text())["every"]
    trainer(outdir=tmp_path, resume=True, snapshot_kimg=0.064, kimg=1.92).run()
    assert json.loads(every.read_text())["every"] == before | {"snapshot": 2}
    names = [path.stem for path in (every.parent / "samples").iterdir()]
    assert "00001024" in names


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "recipe"),
        ("config.json", "every"),
        ("config.json", "every.log"),
        ("config.json", "engine"),
        ("config.json", "data.shape"),
        ("config.json", "data.fingerprint"),
        ("state.json", "trainer.iteration"),
        ("state.json", "trainer.warned"),
        ("state.json", "feed.position"),
        ("state.json", "engine.counters"),
        ("state.json", "engine.counters.images"),
        ("state.json", "engine.g_optimizer"),
    ],
)
def test_a_file_of_a_run_without_a_key_is_named(file: str, key: str, tmp_path: Path) -> None:
    run = trainer(outdir=tmp_path).run().folder
    path = run / file if file == "config.json" else run / "checkpoints" / "00000960" / file
    content = json.loads(path.read_text())
    *parents, last = key.split(".")
    node = content if file == "config.json" else content["state"]
    for parent in parents:
        node = node[parent]
    del node[last]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=last) as e:
        trainer(outdir=tmp_path, resume=run)
    assert str(e.value).startswith(str(path.parent))
    assert file in str(e.value)


def test_resuming_refuses_what_would_not_be_the_same_run(tmp_path: Path) -> None:
    run = trainer(outdir=tmp_path).run().folder
    with pytest.raises(InputError, match="batch is 8, the run to go on with has 16"):
        trainer(outdir=tmp_path, resume=run, batch=8)
    with pytest.raises(InputError, match="was trained on other data"):
        trainer(outdir=tmp_path, resume=run, data__resolution=4)
    with pytest.raises(
        InputError, match=r"00000960: checkpoint of another network: generator\.0\.weight .*\[16, 100\].*\[20, 100\]"
    ):
        trainer(outdir=tmp_path, resume=run, generator__widths=[20])
    with pytest.raises(InputError, match="has no run to take up"):
        trainer(outdir=tmp_path / "none", resume=True)
    with runs.held(run), pytest.raises(InputError, match="another process trains in it"):
        trainer(outdir=tmp_path, resume=run).run()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = trainer(outdir=tmp_path).run().folder
    tensors = run / "checkpoints" / "00000960" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=r"00000960 is damaged; .*00000768 is taken"):
        assert trainer(outdir=tmp_path, resume=run).iteration == 24
    other = run / "checkpoints" / "00000768" / "state.safetensors"
    other.write_bytes(other.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"00000960/state\.safetensors: .* cut short"):
        trainer(outdir=tmp_path, resume=run)


def test_other_folders_among_the_checkpoints_change_nothing(tmp_path: Path) -> None:
    run = trainer(outdir=tmp_path, kimg=0.576).run().folder
    for name in ("00099999", "²"):
        (run / "checkpoints" / name).mkdir()
    assert trainer(outdir=tmp_path, resume=run).run().iterations == 30
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["00000768", "00000960", "00099999", "²"]
    for name in names[:2]:
        os.truncate(run / "checkpoints" / name / "state.safetensors", 10)
    with pytest.raises(InputError, match=r"00000960/state\.safetensors: .* cut short"):
        trainer(outdir=tmp_path, resume=run)


# ---- what does not fit


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch is 0, expected a whole number of at least 1"),
        ({"batch": 2.5}, "batch is 2.5, expected a whole number"),
        ({"kimg": math.nan}, "kimg is nan, expected more than 0"),
        ({"kimg": -5}, "kimg is -5, expected more than 0"),
        ({"kimg": 1e306}, "kimg is 1e.306, expected more than 0 and at most 1e.09"),
        ({"snapshot_kimg": 0}, "snapshot_kimg is 0, expected more than 0"),
        ({"log_kimg": math.inf}, "log_kimg is inf, expected more than 0"),
        ({"evaluation": EvaluationSpec(every_kimg=-1)}, "every_kimg is -1, expected more than 0"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"Trainer: {said}"):
        small_trainer(small_engine(), torch.randn(50, 3), tmp_path, **options)


def test_mistakes_are_found_before_anything_is_written(tmp_path: Path) -> None:
    data = open_dataset("digits")
    wide = Engine(nn.Sequential(nn.Linear(4, 65)), nn.Sequential(nn.Linear(65, 1)), latent=4, device="cpu")
    with pytest.raises(InputError, match=r"'digits' has shape \(1, 8, 8\), the generator makes \(65,\)"):
        Trainer(wide, data, outdir=tmp_path / "runs")
    with pytest.raises(InputError, match="batch is 2000, expected 1"):
        trainer(outdir=tmp_path / "runs", batch=2000)
    with pytest.raises(InputError, match="'gaussians8' has no labels; recipe 'conditional' is conditional"):
        trainer("conditional", outdir=tmp_path / "runs", data__source="gaussians8")
    with pytest.raises(InputError, match="expected square images"):
        trainer("dcgan32", outdir=tmp_path / "runs", data__resolution=24)
    with pytest.raises(InputError, match="unknown metric 'fidd'"):
        trainer(outdir=tmp_path / "runs", evaluation__metrics="fidd")
    assert list(tmp_path.iterdir()) == []


def test_labels_must_be_those_of_the_networks(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, n: int, out: int) -> None:
            super().__init__()
            self.linear, self.embed = nn.Linear(n, out), nn.Embedding(3, out)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x) + self.embed(labels)
            return out

    engine = Engine(Pair(4, 2), Pair(2, 1), latent=4, n_classes=3, device="cpu")
    with pytest.raises(InputError, match="'gaussians8' has no labels, the networks are conditional on 3 classes"):
        Trainer(engine, "gaussians8", outdir=tmp_path)
    with pytest.raises(InputError, match="has 2 classes, the networks are conditional on 3 classes"):
        Trainer(engine, (torch.randn(80, 2), torch.arange(80) % 2), outdir=tmp_path)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(outdir=tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    stopped(run, 17, lambda: monkeypatch.setattr("fastgan.pictures.write_whole", full))
    with pytest.raises(InputError, match="x: cannot be written: No space left on device"):
        run.run()
    monkeypatch.undo()
    assert trainer(outdir=tmp_path, resume=True).iteration == 12


def test_a_loss_that_is_not_finite_is_said_once(tmp_path: Path) -> None:
    generator, discriminator = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(2, 1))
    settings: dict[str, Any] = {"latent": 4, "device": "cpu", "d_optimizer": Adam(lr=1e30), "penalties": [R1(1.0)]}
    engine = Engine(generator, discriminator, **settings)
    run = Trainer(
        engine, "gaussians8", batch=8, kimg=0.4, outdir=tmp_path, progress="none", evaluation=EvaluationSpec(("none",))
    )
    with pytest.warns(UserWarning, match=r"iteration \d+: .*not finite|iteration \d+: \w+ is (nan|inf)") as caught:
        report = run.run()
    assert len(caught) == 1
    assert report.metrics["skipped_steps"] > 0
    assert any(row["penalty"] is None for row in rows(report.folder))  # JSON has no NaN


def test_cli_prints_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Engine.step

    def step(self: Engine, *args: Any) -> None:
        real(self, *args)
        if self.iterations == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Engine, "step", step)
    assert main(["train", "--kimg", "4", "--quiet", "--outdir", str(tmp_path), "--device", "cpu"]) == 130
    said = capsys.readouterr()
    assert f"to go on: fastgan train --resume {tmp_path}/00000-wgan-gp-digits" in said.err
    assert "checkpoints/00001600" in said.out


def test_figures_that_cannot_be_had_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    digits = open_dataset("digits")
    few = open_dataset(torch.rand(4, 1, 8, 8))
    for key, value, data, message in (
        ("metrics", "modes_covered", digits, "modes_covered: data set 'digits' has no known modes"),
        ("metrics", "inception_fid", digits, "nception"),
        ("metrics", "fid", digits, "unknown metric 'fid'"),
        ("metrics", "none,auto", digits, "metrics has '(none|auto)' beside others, expected it alone"),
        ("samples", 3, digits, "precision: 3 samples against the 1797 rows of data set 'digits', expected at least 6"),
        ("samples", 100, few, "precision: 100 samples against the 4 rows of data set 'tensor', expected at least 6"),
    ):
        recipe = load_recipe("wgan-gp", {f"evaluation.{key}": ("--set", value), "batch": ("--batch", 2)})
        with pytest.raises(InputError, match=f"evaluation: .*{message}"):
            Trainer.from_recipe(recipe, outdir=tmp_path / "runs", device="cpu", data=data)
    assert not (tmp_path / "runs").exists()
