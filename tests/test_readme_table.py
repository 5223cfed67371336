"""README's tables are those of the committed results; rows of made-up results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).parents[1]
if not (TREE / "bench" / "readme_table.py").is_file():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(TREE))  # where pytest is not started as a module

from bench import readme_table  # noqa: E402
from bench.readme_table import BEGIN, END, duration, peers, recipes, rewritten, section, workloads  # noqa: E402
from fastgan import InputError  # noqa: E402

CPU = {"device_name": "AMD EPYC", "cpu": "AMD EPYC", "cores": 2, "torch": "2.13.0+cpu", "gpu": None}
GPU = CPU | {"device_name": "NVIDIA H100", "torch": "2.13.0", "gpu": {"name": "NVIDIA H100"}}
TEXT = f"# title\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n"


def test_readme_has_the_tables_of_the_results() -> None:
    have = readme_table.README.read_text()
    assert have == rewritten(have), "README.md differs from bench/results: python -m bench.readme_table --write"


def case(batch: int, us: float, over: float | None = 2.0, best: str | None = "compiled", **more: Any) -> dict[str, Any]:
    own = {"status": "ok", "reason": None, "median_us": us, "eager_over_this": over, "peak_bytes": 3e6}
    own["best_competitor_over_this"] = 1.5 if best else None
    said = {"workload": "toy", "about": "G and D 2-128-128", "batch": batch, "precision": "fp32", "noise": 0.021}
    return said | {"best_competitor": best, "variants": {"eager": {"peak_bytes": 2e6}, "fastgan": own}} | more


def bench(*cases: dict[str, Any], conditions: dict[str, Any] = CPU) -> dict[str, Any]:
    return {"schema": "fastgan.bench/1", "conditions": conditions, "results": [*cases]}


def peer(status: str = "ok", ratio: float = 3.5) -> dict[str, Any]:
    if status != "ok":
        return {"status": status, "reason": "is not installed", "about": "an update"}
    sides = {"fastgan": {"median_us": 4321.0}}
    return {"status": "ok", "about": "an update", "peer_over_fastgan": ratio, "noise": 0.04, "sides": sides}


def test_a_row_for_each_workload() -> None:
    found = workloads({"bench": bench(case(64, 4254.0), case(512, 28756.0, over=0.99), case(64, 900.0, workload="r1"))})
    assert found == [
        (
            "`toy`: G and D 2-128-128, batch 64; 512",
            "4.25 ms; 28.8 ms",
            "2.00 ×; ≈ 1 × as fast as the usual loop, 1.50 ×; 1.50 × as the best other (compiled), ± 2%; 2%, "
            "memory 1.50; 1.50 of the usual loop's",
        ),
        (
            "`r1`: G and D 2-128-128, batch 64",
            "900 µs",
            "2.00 × as fast as the usual loop, 1.50 × as the best other (compiled), ± 2%, "
            "memory 1.50 of the usual loop's",
        ),
    ]


def test_what_has_no_number_is_not_quoted() -> None:
    wrong = {"variants": {"fastgan": {"status": "wrong", "reason": "differs"}}}
    assert workloads({"bench": bench(case(64, 1.0, **wrong))}) == []
    (row,) = workloads({"bench": bench(case(64, 1.0, best=None))})
    assert row[2] == "2.00 × as fast as the usual loop, ± 2%, memory 1.50 of the usual loop's"
    (row,) = workloads({"bench": bench(case(64, 1.0, over=None, best=None, precision="bf16", about=""))})
    assert row == ("`toy`: bf16, batch 64", "1 µs", "memory 1.50 of the usual loop's")
    assert recipes({"recipes": {"recipes": {}}}) == []


def test_peers_that_were_measured_have_rows() -> None:
    found = peers({"peers": {"conditions": CPU, "peers": {"ctgan": peer(), "torchgan": peer("skipped")}}})
    assert found == [("an update", "4.32 ms", "3.50 × as fast as `ctgan`, ± 4%")]


@pytest.mark.parametrize(
    ("us", "text"), [(0.5, "0.5 µs"), (117.4, "117 µs"), (1629.3, "1.63 ms"), (160e3, "160 ms"), (2.5e6, "2.5 s")]
)
def test_durations(us: float, text: str) -> None:
    assert duration(us) == text


def test_tables_follow_the_files(tmp_path: Path) -> None:
    assert section(tmp_path) == ""
    files = {
        "cpu/bench.json": bench(case(64, 4254.0)),
        "cpu/peers.json": {"conditions": CPU, "peers": {"ctgan": peer(), "torchgan": peer("skipped")}},
    }
    for name, result in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(result))
    (tmp_path / "nvidia-a100").mkdir()
    (tmp_path / "nvidia-a100" / "peers.json").write_text(json.dumps(files["cpu/peers.json"]))
    alone = section(tmp_path)
    assert alone.count("| | time | result |") == 1
    assert "Measured on 2 cores of an AMD EPYC, torch 2.13.0, " in alone
    assert "(bench/results/cpu)" in alone
    assert max(len(row) for row in alone.splitlines() if not row.startswith("|")) <= 120
    assert alone.splitlines()[-2:] == [
        "| `toy`: G and D 2-128-128, batch 64 | 4.25 ms | 2.00 × as fast as the usual loop, "
        "1.50 × as the best other (compiled), ± 2%, memory 1.50 of the usual loop's |",
        "| an update | 4.32 ms | 3.50 × as fast as `ctgan`, ± 4% |",
    ]

    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "bench.json").write_text(json.dumps(bench(case(64, 25.0), conditions=GPU)))
    both = section(tmp_path)
    assert both.startswith(alone)
    assert "Measured on one NVIDIA H100, torch 2.13.0, " in both
    assert "(bench/results/h100)" in both
    assert "25 µs | 2.00 × as fast as the usual loop, 1.50 × as the best other (compiled), " in both.splitlines()[-1]
    text = rewritten(TEXT, tmp_path)
    assert text == f"# title\n\n{BEGIN}\n\n{both}\n\n{END}\n\nafter\n"
    assert rewritten(text, tmp_path) == text


def test_the_comments_have_to_be_there() -> None:
    with pytest.raises(InputError, match=r"README\.md: has no lines"):
        rewritten("# title\n")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(TEXT)
    monkeypatch.setattr(readme_table, "README", readme)
    assert readme_table.main([]) == 1
    out, err = capsys.readouterr()
    assert "-old" in out
    assert "python -m bench.readme_table --write" in err
    assert readme.read_text() == TEXT
    assert readme_table.main(["--write"]) == 0
    assert readme_table.main([]) == 0
    readme.write_text("# title\n")
    assert readme_table.main([]) == 2
    assert capsys.readouterr().err.startswith("readme_table: README.md: has no lines")
