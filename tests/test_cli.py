"""The command line: what it prints, what it writes, and the one line that every mistake ends in."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgan.cli import main
from fastgan.errors import InputError

TINY = ["--kimg", "0.2", "--batch", "10", "--quiet", "--device", "cpu"]
SMALL = ["--set", "generator.widths=[8]", "--set", "discriminator.widths=[8]", "--set", "evaluation.samples=50"]
FEW = ["--set", "evaluation.metrics=sliced_wasserstein"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained conditional run."""
    outdir = tmp_path_factory.mktemp("runs")
    assert main(["train", "--recipe", "conditional", *TINY, *SMALL, *FEW, "--outdir", str(outdir)]) == 0
    return outdir / "00000-conditional-digits"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files() -> list[str]:
    return sorted(os.listdir())


# ---- what it does


def fastgan(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastgan", *args], capture_output=True, text=True)


def test_help_is_quick_and_fits_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    took = []
    for _ in range(3):
        before = time.perf_counter()
        top = fastgan("--help")
        took.append(time.perf_counter() - before)
    assert min(took) < 1
    for command in ("train", "sample", "evaluate", "export", "profile", "validate", "doctor"):
        assert command in top.stdout
        text = fastgan(command, "--help").stdout
        assert 5 < len(text.splitlines()) <= 40, command
        assert max(map(len, text.splitlines())) <= 80, command
    loaded = "import sys, fastgan.cli; fastgan.cli._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0


def test_version() -> None:
    from fastgan import __version__

    assert fastgan("--version").stdout == f"fastgan {__version__}\n"


def test_train_tells_where_everything_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, *SMALL, *FEW]) == 0
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "runs/00000-wgan-gp-digits/samples/00000200.png" in told["samples"]
    assert "runs/00000-wgan-gp-digits/loss_curves.png" in told["loss"]
    assert "runs/00000-wgan-gp-digits/checkpoints/00000200" in told["checkpoint"]
    assert "iterations/s" in told["speed"]
    assert "s/kimg" in told["speed"]
    assert float(told["sliced_wasserstein"].split()[1]) > 0


def test_train_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, *SMALL, *FEW, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 200
    assert Path(found["checkpoint"]).is_dir()
    assert found["quality"].keys() == {"sliced_wasserstein"}


def test_options_reach_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--lr 1e-3 --d-lr 2e-3 --b1 0.1 --b2 0.2 --n-critic 3 --gamma 7 --seed 5 --ema 0.9 --precision fp32 --batch 20"
    )
    assert main(["train", "-n", "--json", *options.split(), "--kimg", "1e0", "--set", "generator.widths=[9, 10]"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["g_optimizer"]["lr"], recipe["d_optimizer"]["lr"]) == (1e-3, 2e-3)
    assert recipe["g_optimizer"]["betas"] == recipe["d_optimizer"]["betas"] == [0.1, 0.2]
    assert (recipe["n_critic"], recipe["penalties"][0]["weight"], recipe["seed"]) == (3, 7, 5)
    assert (recipe["ema"]["decay"], recipe["batch"], recipe["kimg"]) == (0.9, 20, 1)
    assert recipe["generator"]["widths"] == [9, 10]
    assert main(["train", "-n", "--json", "--recipe", "wgan", "--loss", "hinge", "--ema", "none"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["loss"], recipe["ema"]) == ({"name": "hinge", "clip": None}, None)


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("n_critic: 5", "Linear(in_features=64", "GradientPenalty", "would write runs/NNNNN-wgan-gp-digits/"):
        assert part in said
    assert files() == []


def test_the_printed_recipe_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--json", "--recipe", "relativistic", "--seed", "4"]) == 0
    Path("mine.yaml").write_text(json.dumps(json.loads(capsys.readouterr().out)["recipe"]))
    assert main(["train", "--recipe", "mine.yaml", *TINY, *SMALL, *FEW]) == 0
    assert files() == ["mine.yaml", "runs"]


def test_list_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list-recipes"]) == 0
    assert "wgan-gp " in capsys.readouterr().out
    assert main(["train", "--list-recipes", "--json"]) == 0
    assert "dcgan32" in json.loads(capsys.readouterr().out)


def test_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("a.png", "a.npz", "a.npy", "a.csv", "folder"):
        assert main(["sample", str(run), "-n", "20", "--seed", "3", "--out", out]) == 0
        assert capsys.readouterr().out == f"{out}\n"
    stored = np.load("a.npz")
    assert (stored["x"].shape, stored["x"].dtype) == ((20, 8, 8, 1), np.uint8)
    assert stored["y"].tolist() == sorted(stored["y"].tolist()) == [i // 2 for i in range(20)]
    assert np.array_equal(np.load("a.npy"), stored["x"])
    with open("a.csv", newline="") as file:
        assert np.array_equal(np.array(list(csv.reader(file)), dtype=int).reshape(20, 8, 8, 1), stored["x"])
    with Image.open("folder/000019.png") as image:
        assert np.array_equal(np.asarray(image), stored["x"][19, ..., 0])
    assert len(os.listdir("folder")) == 20
    one = ["sample", str(run), "-n", "4", "--out", "one.npz"]
    assert main([*one, "--class", "7"]) == 0
    assert np.load("one.npz")["y"].tolist() == [7] * 4
    assert main([*one, "--class", "7", "--no-ema"]) == 0
    last = run / "checkpoints" / "00000200"
    assert main(["sample", str(last), "-n", "20", "--seed", "3", "--out", "b.npy"]) == 0
    assert np.array_equal(np.load("b.npy"), stored["x"])
    assert main(["sample", "--outdir", str(run.parent), "-n", "20", "--seed", "3", "--out", "c.npy"]) == 0
    assert np.array_equal(np.load("c.npy"), stored["x"])


def test_samples_of_a_table_are_in_its_units(capsys: pytest.CaptureFixture[str]) -> None:
    np.savetxt("t.csv", 1000 + np.random.default_rng(0).normal(size=(60, 3)), delimiter=",")
    assert main(["train", "--recipe", "vanilla", "--data", "t.csv", *TINY, *SMALL, *FEW]) == 0
    assert main(["sample", "-n", "9", "--out", "s.csv"]) == 0
    drawn = np.loadtxt("s.csv", delimiter=",")
    assert drawn.shape == (9, 3)
    assert (abs(drawn - 1000) < 50).all()
    assert main(["sample", "--out", "folder"]) == 2
    assert "a folder is for images" in capsys.readouterr().err


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["evaluate", str(run), "--samples", "50", "--metrics", "sliced_wasserstein"]
    assert main([*few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["quality"]
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["sliced_wasserstein"] == logged["quality/sliced_wasserstein"]
    assert main(few) == 0
    assert "sliced_wasserstein" in capsys.readouterr().out


def test_evaluate_gives_figures_of_a_run_that_asked_for_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, *SMALL, "--set", "evaluation.metrics=none"]) == 0
    assert main(["evaluate", "--samples", "50"]) == 0
    assert "sliced_wasserstein" in capsys.readouterr().out


def test_export(run: Path) -> None:
    assert main(["export", str(run), "--out", "g.safetensors"]) == 0
    assert files() == ["g.safetensors"]


def test_resume_goes_on_and_keeps_the_recipe(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["train", "--resume", str(run), "--quiet", "--device", "cpu", "--json"]
    assert main(again) == 0  # complete: evaluated again
    assert json.loads(capsys.readouterr().out)["iterations"] == 20
    assert main([*again, "--lr", "1"]) == 2
    assert "g_optimizer is " in capsys.readouterr().err
    assert main([*again, "--set", "latent=50"]) == 2
    assert "checkpoint of another network: generator.net.0.weight" in capsys.readouterr().err
    assert main([*again, "--set", "data.mirror=true", "--kimg", "0.3"]) == 2
    assert "data.mirror is True, the run to go on with has False" in capsys.readouterr().err
    assert main([*again, "--kimg", "0.3"]) == 0
    assert json.loads(capsys.readouterr().out)["iterations"] == 30
    assert main([*again, "--kimg", "0.2"]) == 0


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.filterwarnings("always")
def test_a_diverged_run_is_told_once(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*args: object, **kwargs: object) -> dict[str, float]:
        raise InputError("samples: 2 of 3 hold NaN or infinity")

    monkeypatch.setattr("fastgan.quality.evaluate", evaluate)
    assert main(["train", "--recipe", "vanilla", "--lr", "1e30", *TINY, *SMALL, *FEW, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out, parse_constant=no_constant)
    assert None in found["metrics"].values()
    assert Path(found["checkpoint"]).is_dir()
    assert found["quality"] == {}
    first, last = said.err.splitlines()
    assert "such updates are skipped and counted" in first
    assert last == "fastgan: warning: iteration 20: no quality figures: samples: 2 of 3 hold NaN or infinity"
    assert caplog.records == []  # of TensorBoard's writer
    monkeypatch.setattr("fastgan.quality.evaluate", lambda *args, **kwargs: {"recall": float("nan")})
    assert main(["evaluate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=no_constant)["quality"] == {"recall": None}


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastgan", "train", "--list-recipes"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# ---- what it says


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def truncated_png() -> list[str]:
    for name in ("a", "b"):
        picture(Path("pictures") / f"{name}.png", (32, 32))
    path = Path("pictures/b.png")
    path.write_bytes(path.read_bytes()[:1000])
    return ["train", "--data", "pictures"]


def bad_zip() -> list[str]:
    with zipfile.ZipFile("bad.zip", "w") as file:
        file.write(picture(Path("x/a.png")), "a.png")
        file.writestr("dataset.json", "{")
    return ["train", "--data", "bad.zip"]


def csv_of(*lines: str) -> list[str]:
    Path("t.csv").write_text("\n".join(lines))
    return ["train", "--recipe", "vanilla", "--data", "t.csv"]


def mixed_channels() -> list[str]:
    picture(Path("mixed/a.png"))
    Image.fromarray(np.zeros((9, 8), np.uint8)).save("mixed/b.png")
    return ["train", "--data", "mixed"]


def empty_folder() -> list[str]:
    Path("empty").mkdir()
    return ["train", "--data", "empty"]


def recipe_of(text: str) -> list[str]:
    Path("my.yaml").write_text(text)
    return ["train", "--recipe", "my.yaml"]


def blocked_outdir() -> list[str]:
    Path("file").write_text("")
    return ["train", *TINY, "--outdir", "file/runs"]


def cut_short() -> list[str]:
    assert main(["train", *TINY, *SMALL, "--set", "evaluation.metrics=none", "--set", "snapshot_kimg=1"]) == 0
    path = Path("runs/00000-wgan-gp-digits/checkpoints/00000200/state.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    return ["sample"]


def of_another_network() -> list[str]:
    assert main(["train", *TINY, *SMALL, "--set", "evaluation.metrics=none"]) == 0
    return ["train", "--resume", *TINY, *SMALL, "--set", "generator.widths=[12]"]


def python_run() -> list[str]:
    Path("runs/00000-x").mkdir(parents=True)
    every = {"log": 1, "snapshot": 1, "evaluate": 1}
    data = {"name": "x", "shape": [1], "classes": 0, "fingerprint": None}
    found: dict[str, Any] = {"recipe": None, "every": every, "engine": {}, "data": data}
    Path("runs/00000-x/config.json").write_text(json.dumps(found))
    return ["train", "--resume"]


NETWORKS = "generator: {model: mlp, widths: [8]}\ndiscriminator: {model: mlp, widths: [8]}\n"
MISTAKES: dict[str, tuple[Callable[[], list[str]], str]] = {
    "missing path": (lambda: ["train", "--data", "no/such.npz"], "no/such.npz"),
    "unknown data": (lambda: ["train", "--data", "digit"], "did you mean 'digits'"),
    "empty folder": (empty_folder, "empty"),
    "truncated PNG": (truncated_png, "pictures/b.png"),
    "bad dataset.json": (bad_zip, "dataset.json"),
    "CSV with NaN": (lambda: csv_of("1,2", "3,nan"), "t.csv"),
    "CSV with text": (lambda: csv_of("1,2", "3,x"), "t.csv"),
    "channels differ": (mixed_channels, "mixed"),
    "resolution": (lambda: ["train", "--recipe", "dcgan32", "--set", "data.resolution=20"], "expected square images"),
    "unknown recipe": (lambda: ["train", "--recipe", "vanila"], "did you mean 'vanilla'"),
    "unknown recipe key": (lambda: recipe_of(NETWORKS + "kimgs: 3"), "my.yaml: unknown key 'kimgs'; did you mean"),
    "recipe of text": (lambda: recipe_of("hello"), "my.yaml: expected a recipe"),
    "wrong value": (lambda: ["train", "--batch", "many"], "--batch: batch is 'many', expected a whole number"),
    "--set without value": (lambda: ["train", "--set", "kimg"], "--set kimg: expected KEY=VALUE"),
    "--set that is no YAML": (lambda: ["train", "--set", "kimg=["], "--set kimg=["),
    "--set that is no date": (lambda: ["train", "--set", "kimg=2001-99-99"], "--set kimg=2001-99-99"),
    "model": (lambda: ["train", "--set", "generator.model=[1]"], "--set generator.model: generator: unknown model [1]"),
    "seed": (lambda: ["train", "--seed", "1e30"], "--seed: seed is 1e30, expected at most"),
    "length": (lambda: ["train", "--kimg", "1e306"], "--kimg: kimg is 1e306, expected at most"),
    "threads": (lambda: ["train", "--threads", "99999999999"], "--threads: 99999999999"),
    "no memory": (lambda: ["train", "--set", "latent=1e13"], "recipe wgan-gp: networks of latent 10000000000000: "),
    "recipe without end": (lambda: recipe_of("a: " + "[" * 3000), "my.yaml: not YAML"),
    "few samples": (lambda: ["train", "--set", "evaluation.samples=3"], "evaluation: precision: 3 samples"),
    "none and auto": (lambda: ["train", "--set", "evaluation.metrics=none,auto"], "evaluation: metrics has "),
    "checkpoint of another network": (of_another_network, "checkpoint of another network: generator.0.weight"),
    "safetensors cut short": (cut_short, "state.safetensors"),
    "batch too large": (lambda: ["train", "--batch", "5000"], "batch is 5000, expected 1"),
    "blocked outdir": (blocked_outdir, "file"),
    "labels missing": (lambda: ["train", "--recipe", "conditional", "--data", "gaussians8"], "has no labels"),
    "nothing to resume": (lambda: ["train", "--resume"], "runs: has no run"),
    "not a run to resume": (lambda: ["train", "--resume", "nowhere"], "nowhere: does not exist, expected a run"),
    "run made in Python": (python_run, "its networks were made in Python"),
    "no run to sample": (lambda: ["sample"], "runs: has no run"),
    "no such run": (lambda: ["sample", "nowhere"], "nowhere: does not exist"),
    "no threads": (lambda: ["train", "--threads", "0"], "--threads: 0"),
    "unknown metric": (lambda: ["train", "--set", "evaluation.metrics=[fidd]"], "unknown metric 'fidd'"),
    "device": (lambda: ["train", "--device", "gpu"], "gpu"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, culprit = MISTAKES[what]
    args = make()
    before = files()
    capsys.readouterr()
    assert main(args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fastgan: ")
    assert said.err.count("\n") == 1
    assert culprit in said.err
    assert files() == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["sample", "RUN", "--class", "10"], "--class: 10, but the generator of RUN has classes 0 to 9"),
        (["sample", "RUN", "--out", "x.gif"], "--out: x.gif, expected a .png"),
        (["sample", "RUN", "-n", "0"], "-n: 0, expected at least 1"),
        (["sample", "RUN", "--out", "no/x.png"], "No such file or directory"),
        (["evaluate", "RUN", "--metrics", "fidd"], "unknown metric 'fidd'"),
        (["evaluate", "RUN", "--samples", "1"], "--samples: 1, expected at least 2"),
        (["evaluate", "RUN", "--data", "gaussians8"], "samples: shape"),
        (["export", "RUN", "--out", "x.pth"], "unknown file ending '.pth'"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_a_mistake_about_a_run(args: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([arg.replace("RUN", str(run)) for arg in args]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert said.replace("RUN", str(run)) in told.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--kimgs", "3"], "unknown option --kimgs; did you mean --kimg?"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
        (["sample", "a", "b"], "unexpected argument 'b'"),
        (["sample", "-n", "x"], "invalid int value: 'x'"),
        (["export"], "required: --out"),
    ],
)
def test_a_wrong_option_is_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.fixture
def read_only() -> Iterator[Path]:
    folder = Path("locked")
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_outdir(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--outdir", str(read_only)]) == 2
    assert "locked: cannot be written: Permission denied" in capsys.readouterr().err


def test_a_read_only_file_system(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["train", *TINY, "--outdir", "out"]) == 2
    assert capsys.readouterr().err == "fastgan: out: cannot be written: Read-only file system\n"


def test_a_mistake_in_a_process_of_its_own() -> None:
    done = fastgan("train", "--data", "missing.npz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastgan: missing.npz")
    assert done.stderr.count("\n") == 1
