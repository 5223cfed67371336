"""``pytest bench --benchmark-only``: its results name their conditions and nothing private, and compare with others."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TREE = Path(__file__).parents[1]
RESULTS = TREE / "bench" / "results" / "pytest-benchmark"
if not RESULTS.is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
COMMITTED = sorted(RESULTS.glob("*/*.json"))


def test_two_benchmarks(tmp_path: Path) -> None:
    """Shortened, beside the committed results, as if they were of another processor."""
    out, other = tmp_path / "out.json", tmp_path / COMMITTED[-1].name
    committed = json.loads(COMMITTED[-1].read_text())
    committed["machine_info"]["cpu"] = "an abacus"
    other.write_text(json.dumps(committed))
    command = [
        sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-k", "bias_lrelu and forward and reference or toy and 64 and closed", "--benchmark-max-time=0.05",
        "--benchmark-min-rounds=2", f"--benchmark-json={out}", f"--benchmark-storage={RESULTS}",
        f"--benchmark-compare={other}",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    run = subprocess.run(command, cwd=TREE, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("test_op[bias_lrelu-forward-reference]", "test_iteration[toy-64-closed form]"):
        assert f"{name} (NOW)" in run.stdout
        assert re.search(rf"{re.escape(name)} \(\S*{other.stem[:4]}_", run.stdout), run.stdout
    assert "Warning" not in run.stdout + run.stderr
    result = json.loads(out.read_text())
    said = result["machine_info"]
    assert (said["torch"], said["torch_threads"]) == (torch.__version__, 1)
    assert f"cpu: {said['cpu']} here, an abacus there" in run.stderr
    assert said["after"]["load"] >= 0
    assert (said["gpu"] is None) != torch.cuda.is_available()
    op, iteration = sorted(result["benchmarks"], key=lambda row: -row["fullname"].count("bench_kernels"))
    assert op["group"] == "bias_lrelu forward"
    assert op["extra_info"]["forward_bytes"] > 0
    assert iteration["group"] == "toy, batch 64"
    for row in (op, iteration):
        assert row["options"]["timer"] == "synced"
        assert 0 < row["stats"]["q1"] <= row["stats"]["median"] <= row["stats"]["q3"]
    nothing_private(result)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results(path: Path) -> None:
    result = json.loads(path.read_text())
    assert {"cpu", "cores", "load_before", "torch", "gpu", "after"} <= result["machine_info"].keys()
    assert len(result["benchmarks"]) > 30
    nothing_private(result)


def nothing_private(result: dict) -> None:
    """Of whoever measures here; single rounds and what the plugin adds of its own are gone everywhere."""
    text = json.dumps(result)
    for word in (platform.node(), str(TREE), str(Path.home())):
        assert f'"{word}' not in text
    assert f'"{getpass.getuser()}"' not in text
    assert not {"node", "release", "processor"} & result["machine_info"].keys()
    assert result["commit_info"].keys() == {"id", "dirty"}
    assert not any("data" in row["stats"] for row in result["benchmarks"])
