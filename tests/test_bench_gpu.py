"""``python -m bench.gpu`` on a machine without a GPU: what runs, what is skipped, and what a crash leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

TREE = Path(__file__).parents[1]
if not (TREE / "bench" / "gpu.py").is_file():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(TREE))  # where pytest is not started as a module

from bench import gpu, rows, sections, tiles, tune  # noqa: E402
from bench.sections import Context, Results, Section, Skip  # noqa: E402
from fastgan.benchmark.variants import by_engine  # noqa: E402

CPU = torch.device("cpu")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is skipped without a GPU")


def context(**data: Any) -> Context:
    return Context(CPU, True, time.monotonic() + 60, read=lambda name: data.get(name, {}))


# ---- the command


@without_cuda
def test_all_sections_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in gpu.SECTIONS if name not in ("validate", "tests")]  # which have tests of their own
    code = gpu.main(["--tiny", "--in-process", "--out", str(tmp_path), "--sections", ",".join(names)])
    out = capsys.readouterr().out
    assert code == 0, out
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["schema"] == 1
    assert result["tiny"]
    found = {name: entry["status"] for name, entry in result["sections"].items()}
    done = {"environment", "ceilings", "rows", "drift"}
    assert found == {name: "ok" if name in done else "skipped" for name in names}
    assert {result["sections"][name]["reason"] for name in names if name not in done} == {"no CUDA device"}
    data = {name: result["sections"][name]["data"] for name in done}
    assert data["environment"]["conditions"]["torch"] == torch.__version__
    assert data["ceilings"]["matrix fp32"]["tflop_per_s"] > 0
    assert data["ceilings"]["graph node, dependent"] == {"skipped": "no CUDA device"}
    for precision in rows.PRECISIONS:
        for name in rows.KINDS:
            found = data["rows"][f"{name}, batch 4, {precision}"]
            assert found["conditions"]["torch"] == torch.__version__
            ways = found["variants"]
            for label in ("eager", "eager again", "fastgan autograd", "fastgan reference"):
                assert ways[label]["status"] == "ok", (name, label, ways[label])
                assert 0 < ways[label]["p20_us"] <= ways[label]["median_us"] <= ways[label]["p80_us"]
                assert ways[label]["eager_over_this"] > 0
                assert ways[label]["share_of_matrix_rate"] > 0
            assert "median_us" not in ways["fastgan persistent"]  # whatever the reason
            if "wgan" in name:
                assert ways["fastgan reference"]["penalty_overhead"] > 0
    assert data["drift"]["twice the same"]["after 2"]["equal_bits"]
    summary = gpu.summary(result)
    assert summary in out
    assert len(out) < 12_000
    assert max(map(len, summary.splitlines())) <= 120
    assert "wgan-gp-critic, batch 4, fp32" in summary


@without_cuda
def test_each_section_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The command as it is called; a section that is not run again keeps what it had."""
    results = Results(tmp_path)
    results.set("rows", status="ok", data={"batch 1": {}})
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", str(tmp_path), "--sections", "environment,tune"]
    run = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = results.load()["sections"]
    assert found["environment"]["status"] == "ok"
    assert found["tune"]["reason"] == "no CUDA device"
    assert found["rows"] == {"status": "ok", "data": {"batch 1": {}}}
    assert results.log.read_text().startswith("--- environment")


def test_an_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        gpu.main(["--sections", "environment,tuna"])
    assert e.value.code == 2
    assert "unknown section 'tuna'" in capsys.readouterr().err


# ---- sections


def test_a_failure_keeps_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path)

    def breaks(c: Context) -> None:
        c.put("first", {"value": float("nan"), "of": CPU})
        raise RuntimeError("a\n\n  b")

    def has_a_bad_part(c: Context) -> None:
        c.part("one", lambda: {}["key"])
        c.part("two", lambda: {"value": 1})
        c.part("three", partial(c.needs_cuda))

    def cannot(c: Context) -> None:
        raise Skip("not here")

    def one_after_another(c: Context) -> None:
        c.put("seen", c.of("breaks")["first"])

    tasks = {"breaks": breaks, "part": has_a_bad_part, "cannot": cannot, "after": one_after_another}
    states = [
        sections.run_here(name, Section(task, 5), results, device=CPU, tiny=True, seconds=5)
        for name, task in tasks.items()
    ]
    assert states == ["failed", "failed", "skipped", "ok"]
    found = results.load()["sections"]
    assert found["breaks"]["data"] == {"first": {"value": None, "of": "cpu"}}
    assert found["breaks"]["reason"] == "RuntimeError: b"
    assert found["part"]["data"] == {"one": {"failed": "KeyError: 'key'"}, "two": {"value": 1},
                                     "three": {"skipped": "no CUDA device"}}  # fmt: skip
    assert found["part"]["reason"] == "failed: one"
    assert found["cannot"]["reason"] == "not here"
    assert found["after"]["data"]["seen"] == found["breaks"]["data"]["first"]
    assert "RuntimeError" in capsys.readouterr().err  # the whole traceback is in the log


def test_a_section_that_dies_or_hangs(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert sections.run_apart("dies", ["no_such_module_of_ours"], results, 30) == "failed"
    reason = results.load()["sections"]["dies"]["reason"]
    assert reason.startswith("exit code 1: ")
    assert "no_such_module_of_ours" in reason
    begin = time.monotonic()
    assert sections.run_apart("hangs", ["http.server", "--bind", "127.0.0.1", "0"], results, 0.7) == "out of time"
    assert time.monotonic() - begin < 5
    assert results.load()["sections"]["hangs"]["reason"] == "ended after 1 s"


def test_the_file_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path)
    results.set("one", status="ok")

    def full(self: Path, *args: Any) -> int:
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        results.set("two", status="ok")
    assert results.load()["sections"] == {"one": {"status": "ok"}}


def test_a_wrong_path_of_the_engine_fails_its_section() -> None:
    c = context()
    of = rows.case(c, "wgan-gp-critic", 4, "fp32")
    ways = {"eager": rows.BY_HAND["eager"], "fastgan wrong": lambda case: by_engine(case.without_penalties())}
    found = rows.measured(c, of, ways)
    assert found["variants"]["eager"]["median_us"] > 0
    assert found["variants"]["fastgan wrong"]["status"] == "wrong"
    assert "median_us" not in found["variants"]["fastgan wrong"]
    assert found["failed"].startswith("fastgan wrong: its gradients are")


# ---- tiles


def test_candidates_fit() -> None:
    asked = tune.work()
    assert {op for op, *_ in asked} == set(tiles.PROBLEMS)
    for op, (m, n, k), dtype in asked:
        some = list(tune.candidates(op, m, n, k, dtype))
        assert len(some) >= 4
        assert len(set(some)) == len(some)
        for block_m, block_n, block_k, _, stages in some:
            assert (block_m + block_n) * block_k * dtype.itemsize * stages <= 227 * 1024


def at_once(run: Any, device: torch.device) -> Any:
    return SimpleNamespace(replay=run)


@pytest.mark.parametrize("op", tiles.PROBLEMS)
def test_a_sweep_of_each_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter: the launches compute what the sweep holds them to."""
    some = [(32, 32, 32, 4, 1), (16, 32, 32, 4, 1)]
    monkeypatch.setattr(tune, "captured", at_once)
    monkeypatch.setattr(tune, "candidates", lambda *args: some)
    monkeypatch.setattr(tune, "REPLAYS", 1)
    found = tune.swept(op, 48, 32, 40, torch.float32, context())
    assert not found["refused"]
    assert len(found["times_us"]) == 2
    assert tuple(found["best"]) in some
    assert found["best_us"] > 0


def test_a_sweep_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(8, 8)
    times = {16: 1.0, 32: 20.0, 64: 2.0, 128: 30.0}  # by the width of the block; those of 16 and 64 do not work

    def problem(m: int, n: int, k: int, operands: tiles.Operands) -> tiles.Problem:
        y = torch.empty(8, 8)

        def build(tile: Any) -> list[Any]:
            if tile.block_n == 64:
                raise RuntimeError("out of shared memory")
            return [lambda: torch.mul(x, 2.001 if tile.block_n == 16 else 2.0, out=y)]

        return tiles.Problem(build, [y], [2 * x.double()], [2 * x], lambda: None)

    def timed(runs: dict[str, Any], *rest: Any) -> dict[str, dict[str, float]]:
        return {k: {"median_us": 40.0 if k == "library" else times[int(k.split("x")[1])]} for k in runs}

    some = [(64, width, 32, 4, 3) for width in times]
    monkeypatch.setattr(tune, "captured", at_once)
    monkeypatch.setattr(tune, "candidates", lambda *args: some)
    monkeypatch.setattr(tune, "interleaved", timed)
    monkeypatch.setitem(tiles.PROBLEMS, "linear_lrelu", problem)
    found = tune.swept("linear_lrelu", 8, 8, 8, torch.float32, context())
    assert found["best"] == [64, 32, 32, 4, 3]
    assert found["times_us"] == {"64x32x32x4x3": 20.0 / tune.REPLAYS, "64x128x32x4x3": 30.0 / tune.REPLAYS}
    assert found["best_us"] == 20.0 / tune.REPLAYS
    assert found["library_us"] == 40.0 / tune.REPLAYS
    assert found["refused"]["64x64x32x4x3"] == "RuntimeError: out of shared memory"
    assert found["refused"]["64x16x32x4x3"].startswith("wrong: error")


def test_where_the_library_wins() -> None:
    def one(m: int, width: int, library: float) -> dict[str, Any]:
        return {"shape": [m, width, width], "best_us": 1.0, "library_us": library}

    some = [one(64, 256, 2.0), one(64, 2048, 0.5), one(512, 256, 2.0)]
    data = {f"linear_lrelu {i} bfloat16": found for i, found in enumerate(some)}
    data["weight_gradient 0 bfloat16"] = one(64, 2048, 2.0)
    (row,) = tune.library(data, 90)
    assert row == {"dtype": "bfloat16", "arch": 90, "rows": 2**30, "width": 2048, "measured": True}


def test_a_measured_tile_is_a_row_of_the_table() -> None:
    from fastgan.kernels import configs

    row = configs.as_row("linear_lrelu", 64, 512, 784, torch.bfloat16, 90, configs.Config(64, 32, 64, 4, 3))
    assert row["measured"]
    assert set(row) == {"op", "shape", "dtype", "arch", "config", "measured"}


# ---- kernels of the ceilings

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.empty_kernels import barrier_launch, empty_launch
x, n = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
for launch in (empty_launch(x, False), empty_launch(x, True), barrier_launch(n, 132, 100)):
    signature, constants = {}, {}
    for p in launch.kernel.params:
        value = launch.arguments.get(p.name, p.default)
        if p.is_constexpr:
            constants[p.name] = value
        signature[p.name] = "constexpr" if p.is_constexpr else "i32" if isinstance(value, int) else (
            "*fp32" if value.dtype == torch.float32 else "*i32")
    made = triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.num_warps, "launch_cooperative_grid": launch.cooperative},
    )
    ptx = made.asm["ptx"]
    print("griddepcontrol" in ptx, "atom" in ptx, "acquire" in ptx, ptx.count("bar.sync") > 2)
"""


def test_the_kernels_of_the_ceilings_compile() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=TREE, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["False False False False", "True False False False", "False True True True"]
