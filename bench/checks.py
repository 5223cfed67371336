"""What must hold on the machine before its numbers count: ``fastgan validate``, the tests, the memory checker."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.sections import Context, Skip

TREE = Path(__file__).parents[1]
_SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")


def validate(context: Context) -> None:
    """``fastgan validate``, in processes beside each other: most of the time goes into compilation."""
    from fastgan import validate
    from fastgan.validate import DTYPES

    if context.device.type == "cuda":
        from fastgan.kernels import SPECS

        halves = (("fp32", "fp16"), ("bf16", "fp64"))  # each with one that takes long to compile
        jobs = [(s.name, half) for s in SPECS for half in halves if any(DTYPES[d] in s.dtypes for d in half)]
        jobs += [(pair.name, tuple(DTYPES)) for pair in validate.pairs()]
    else:
        jobs = [("bias_lrelu", ("fp32",)), ("relativistic", ("fp32",))] if context.tiny else [("", ())]
    workers = 2 if context.device.type == "cpu" else max(2, min(12, len(os.sched_getaffinity(0)) - 2))
    rows: list[dict[str, Any]] = []
    unfinished: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        for job, report in zip(jobs, pool.map(lambda job: validated(*job, context), jobs), strict=True):
            if report is None:
                unfinished.append(" ".join((job[0], *job[1])).strip())
                continue
            rows += report.pop("rows")
            for key in ("schema", "conditions", "criterion"):
                context.data[key] = report[key]
            context.put("rows", rows)
    passed = sum(r["passed"] and r["skipped"] is None for r in rows)
    failed = [f"{r['name']} {r['dtype']} {r['what']}".strip() for r in rows if not r["passed"]]
    skipped = sum(r["skipped"] is not None for r in rows)
    context.put("summary", {"passed": passed, "failed": len(failed), "skipped": skipped, "unfinished": unfinished})
    if rows:
        whole = {**context.data, "passed": not failed, "summary": {**context.data["summary"], "seconds": 0.0}}
        print(validate.render(whole), flush=True)
    if failed or unfinished:
        context.put("result", {"failed": [*failed, *(f"{job}: no report" for job in unfinished)]})


def validated(name: str, dtypes: Sequence[str], context: Context) -> dict[str, Any] | None:
    """The report of one call; ``None`` where it gave none in time."""
    command = [sys.executable, "-m", "fastgan", "validate", "--json", "--quiet", "--device", context.device.type]
    command += ["--op", name] * bool(name)
    for dtype in dtypes:
        command += ["--dtype", dtype]
    try:
        run = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=max(5.0, context.left() - 3))
    except subprocess.TimeoutExpired:
        return None
    if run.stderr:
        print(run.stderr, flush=True)
    return json.loads(run.stdout) if run.returncode in (0, 1) and run.stdout.startswith("{") else None


def tests(context: Context) -> None:
    """Tests that need a GPU, then those of the kernels and of what uses them."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    if context.tiny:
        runs = {"kernels": ["tests/test_bias_lrelu.py"]}
    else:
        context.needs_cuda()
        uses = re.compile(r"^\s*(from fastgan\.kernels|import fastgan\.kernels|from fastgan import .*kernels)", re.M)
        mine = [p for p in sorted((TREE / "tests").glob("test_*.py")) if uses.search(p.read_text())]
        mine = [str(p.relative_to(TREE)) for p in mine if p.stem != "test_ahead_of_time"]  # which needs no GPU
        runs = {"marked gpu": ["-m", "gpu", "tests"], "kernels": ["-m", "not gpu and not slow", *mine]}
    for name, args in runs.items():
        context.part(name, lambda args=args: pytest(args, context))


def pytest(args: Sequence[str], context: Context) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-x" if context.tiny else "--continue-on-collection-errors",
               "-p", "no:cacheprovider", *args]  # fmt: skip
    seconds = max(10.0, context.left() - 5)
    try:
        run = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=seconds)
        out = run.stdout + run.stderr
        code: int | None = run.returncode
    except subprocess.TimeoutExpired as e:
        out, code = (e.stdout or b"").decode(errors="replace"), None
    print(out, flush=True)
    bad = re.findall(r"^(?:FAILED|ERROR) .*", out, re.MULTILINE)
    closing = [line for line in out.splitlines() if re.search(r"\d+ (passed|failed|skipped|error|deselected)", line)]
    found: dict[str, Any] = {"closing line": closing[-1] if closing else "none", "exit code": code, "bad": bad[:50]}
    if code is None:
        found["ended"] = f"out of time after {seconds:.0f} s"
    return found | ({"failed": f"{len(bad)} tests, exit code {code}"} if code not in (0, 5, None) else {})


def sanitizer(context: Context) -> None:
    """compute-sanitizer over every kernel on its first samples."""
    tool = next((found for name in _SANITIZER if (found := shutil.which(name))), None)
    if tool is None:
        raise Skip("compute-sanitizer is not here")
    for check in ("memcheck", "racecheck"):
        context.part(check, lambda check=check: sanitized(tool, check, context))


def sanitized(tool: str, check: str, context: Context) -> dict[str, Any]:
    command = [tool, "--tool", check, sys.executable, "-m", "bench.touch_kernels"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has bounds of its own
    seconds = max(10.0, context.left() - 5)
    try:
        run = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Skip(f"out of time after {seconds:.0f} s") from None
    out = run.stdout + run.stderr
    print(out[-20000:], flush=True)
    said = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", out)
    touched = re.findall(r"^touched .*", out, re.MULTILINE)
    found: dict[str, Any] = {"closing line": said[-1] if said else out.strip()[-300:], "touched": touched}
    clean = bool(said) and re.search(r"SUMMARY: 0 (errors|hazards)", said[-1]) is not None and run.returncode == 0
    return found | ({} if clean else {"failed": found["closing line"]})
