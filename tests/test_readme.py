"""Runs README.md: its Python blocks as they stand, its ``fastgan`` commands (those that train, for 1 kimg).

A block below a comment ``<!-- not run: reason -->`` is left out.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
if not README.is_file():
    pytest.skip("README.md is not beside these tests", allow_module_level=True)

TEXT = README.read_text()
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\s*\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(*languages: str) -> list[tuple[int, str]]:
    """Line of the first line of code, and the code, of the blocks that are to run."""
    found = [m for m in BLOCK.finditer(TEXT) if m["language"] in languages and not m["skip"]]
    return [(TEXT.count("\n", 0, m.start("body")) + 1, m["body"]) for m in found]


def commands() -> list[tuple[int, list[str]]]:
    found = []
    for start, body in blocks("bash", "sh", "console"):
        whole = re.sub(r"\\\n\s*", " ", body)
        lines = [line.removeprefix("$ ") for line in whole.splitlines()]
        found += [(start, shlex.split(line, comments=True)) for line in lines if line.startswith("fastgan ")]
    return found


def test_every_fence_is_read() -> None:
    assert TEXT.count("```") == 2 * len(BLOCK.findall(TEXT))


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader's machine without a GPU: no interpreter
    namespace: dict[str, object] = {"__name__": "readme"}
    found = blocks("python")
    assert found
    for line, code in found:  # padded, so that a traceback names README's own lines
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)


def test_commands(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    found = commands()
    assert found
    for line, (_, *args) in found:
        if args[0] == "train":
            args += ["--kimg", "1"]
        run = subprocess.run(
            [sys.executable, "-m", "fastgan", *args], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, f"README.md:{line}: fastgan {shlex.join(args)}\n{run.stdout}{run.stderr}"
