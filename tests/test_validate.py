"""``fastgan validate`` passes what is right, and finds everything that it says it looks for."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastgan
from fastgan import cli, closeness, kernels, validate
from fastgan.kernels import bias_lrelu
from fastgan.kernels._spec import Sample

pytestmark = pytest.mark.interpreted

SPEC = bias_lrelu.SPEC


def with_op(op: Callable[..., Any], **changes: Any) -> Any:
    """The row of ``bias_lrelu`` with another op and fewer samples."""
    changes = {"dtypes": (torch.float32,), "samples": lambda device, dtype: SPEC.samples(device, dtype)[:2], **changes}
    return replace(SPEC, op=op, **changes)


def report_of(monkeypatch: pytest.MonkeyPatch, spec: Any) -> dict[str, Any]:
    monkeypatch.setattr(kernels, "SPECS", (spec,))
    return validate.run([spec.name], ["fp32"])


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in report["rows"]}


# ---- what is right


def test_an_op_passes() -> None:
    lines: list[str] = []
    report = validate.run(["bias_lrelu"], ["float32", "fp16"], progress=lines.append)
    assert json.loads(json.dumps(report)) == report
    assert report["schema"] == 1
    assert report["passed"]
    assert [(r["dtype"], r["what"]) for r in report["rows"]] == [
        (dtype, what) for dtype in ("fp32", "fp16") for what in ("value", "first", "second")
    ]
    for row in report["rows"]:
        assert row["samples"] >= len(SPEC.samples(torch.device("cpu"), torch.float32))
        assert 0 <= row["error"] <= row["bound"]
        assert row["repeats"]
        assert row["inputs_kept"]
    assert [line.split(",")[0] for line in lines] == ["bias_lrelu fp32: ok", "bias_lrelu fp16: ok"]
    text = validate.render(report).splitlines()
    assert max(map(len, text)) <= 100
    assert text[-1].startswith("PASSED: 6 passed, 0 failed, 0 skipped")
    assert sum(line.endswith("ok") for line in text) == 6


@pytest.fixture
def by_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates by kernels take seconds in the interpreter."""
    monkeypatch.setattr(validate, "_BY", {"reference": "torch ops"})


def test_updates_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_BY", {"triton": "kernels"})
    monkeypatch.setattr(validate, "_INTERPRETED_DRAWS", 1)
    report = validate.run(["wgan-gp"], ["fp32", "bf16"], "cpu")
    assert report["passed"], validate.render(report)
    ran = [row["what"] for row in report["rows"] if row["skipped"] is None]
    assert ran == ["critic", "generator"]
    assert [row["dtype"] for row in report["rows"] if row["skipped"] is not None] == ["bf16"]


def test_updates_pass(by_ops: None) -> None:
    report = validate.run(["wgan-gp", "layer-norm-tanh"], ["fp64", "fp32", "fp16"])
    assert report["passed"], validate.render(report)
    rows = report["rows"]
    checked = {(r["name"], r["dtype"], r["what"]) for r in rows if r["skipped"] is None}
    assert checked == set(
        itertools.product(
            ("wgan-gp, torch ops", "layer-norm-tanh, torch ops"), ("fp64", "fp32"), ("critic", "generator")
        )
    )
    assert all(r["bound"] > 0 for r in rows if r["skipped"] is None)
    (skipped,) = (r for r in rows if r["skipped"] is not None)  # one line for all pairs
    assert (skipped["name"], skipped["dtype"]) == ("all updates, torch ops", "fp16")
    assert "fp16" in skipped["skipped"]
    assert max(map(len, validate.render(report).splitlines())) <= 100


def test_rows_stay_off_the_kinks_and_all_terms_count() -> None:
    """Else the rounding of a working precision would decide, and a missing penalty would hide behind the loss."""
    by_name = {pair.name: pair for pair in validate.pairs()}
    cpu = torch.device("cpu")
    with_penalty, without = (
        validate._update(by_name[name], 0, "fp64", cpu, "reference", False).gradients["critic"]
        for name in ("r1", "non-saturating")
    )
    assert (with_penalty - without).abs().max() > 0.1 * without.abs().max()
    _, d, _, given = validate._drawn(by_name["wgan-gp"], 0)
    real = given["real"].double()
    assert validate.margin(d, real).min() > 0.02
    assert torch.equal(given["real"], validate._drawn(by_name["wgan-gp"], 0)[3]["real"])


# ---- what is wrong


def op_of(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An op with the signature of ``bias_lrelu``."""

    def op(x: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str, **kwargs: float) -> torch.Tensor:
        return forward(x, bias, **kwargs)

    return op


def plain(x: torch.Tensor, bias: torch.Tensor | None, **kwargs: float) -> torch.Tensor:
    return SPEC.reference(x, bias, **kwargs)


def off(x: torch.Tensor, bias: torch.Tensor | None, **kwargs: float) -> torch.Tensor:
    return plain(x, bias, **kwargs) * (1 + 1e-5)


def nan(x: torch.Tensor, bias: torch.Tensor | None, **kwargs: float) -> torch.Tensor:
    y = plain(x, bias, **kwargs)
    return torch.cat([y[..., :1] * float("nan"), y[..., 1:]], -1)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * 1.001


class Trap(torch.autograd.Function):
    """The usual layout of a fused op: its backward runs a kernel, which autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy.detach().clone()


def overwrites(x: torch.Tensor, bias: torch.Tensor | None, **kwargs: float) -> torch.Tensor:
    y = plain(x, bias, **kwargs)
    if bias is not None:
        bias.data.view(-1)[0] += 1
    return y


calls = itertools.count()


def never_the_same(x: torch.Tensor, bias: torch.Tensor | None, **kwargs: float) -> torch.Tensor:
    return plain(x, bias, **kwargs) * (1 + 2.0**-23 * (next(calls) % 2))


def raises(x: torch.Tensor, bias: torch.Tensor | None, **kwargs: float) -> torch.Tensor:
    raise RuntimeError("some context\n\nout of resources")


@pytest.mark.parametrize(
    ("forward", "what", "detail"),
    [
        (off, "value", "> "),
        (nan, "value", "values are NaN"),
        (lambda x, bias, **k: plain(x, bias, **k)[..., :1], "value", "shape"),
        (lambda x, bias, **k: plain(x, bias, **k).double(), "value", "dtype torch.float64"),
        (lambda x, bias, **k: WrongGradient.apply(plain(x, bias, **k)), "first", "> "),
        (lambda x, bias, **k: Trap.apply(plain(x, bias, **k)), "second", "> "),
        (never_the_same, "value", "a second run gave other bits"),
        (overwrites, "value", "overwritten"),
        (raises, "", "RuntimeError: out of resources"),
        (lambda x, bias, **k: plain(x, bias, **k).detach(), "", "autograd has no graph"),
    ],
    ids=["value", "nan", "shape", "dtype", "first", "silent none", "random", "overwrites", "raises", "detached"],
)
def test_a_broken_op_fails(
    monkeypatch: pytest.MonkeyPatch, forward: Callable[..., torch.Tensor], what: str, detail: str
) -> None:
    report = report_of(monkeypatch, with_op(op_of(forward)))
    assert not report["passed"]
    row = rows_of(report)[what]
    assert not row["passed"]
    assert detail in row["detail"]
    text = validate.render(report)
    assert "FAILED" in text.splitlines()[-1]
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_right_about_a_broken_op_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = op_of(lambda x, bias, **k: Trap.apply(plain(x, bias, **k)))
    rows = rows_of(report_of(monkeypatch, with_op(broken)))
    assert rows["value"]["passed"]
    assert rows["first"]["passed"]


@pytest.mark.parametrize("factor", [1.001, 0.0])
def test_a_wrong_update_fails(monkeypatch: pytest.MonkeyPatch, by_ops: None, factor: float) -> None:
    from fastgan import plan

    right = plan._penalise

    def wrong(s: Any, rows: Any, places: Any, every: float, *rest: Any, **more: Any) -> None:
        right(s, rows, places, every * factor, *rest, **more)

    monkeypatch.setattr(plan, "_penalise", wrong)
    report = validate.run(["wgan-gp"], ["fp32"])
    assert not rows_of(report)["critic"]["passed"]
    assert rows_of(report)["generator"]["passed"]
    assert not report["passed"]


def test_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "SPECS", (with_op(op_of(off)),))
    assert cli.main(["validate", "--op", "bias_lrelu", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["summary"]["failed"] > 0
    assert err.startswith("validate: bias_lrelu fp32: FAILED")
    monkeypatch.setattr(kernels, "SPECS", (with_op(SPEC.op),))
    assert cli.main(["validate", "--op", "bias_lrelu", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "PASSED: 3 passed" in out
    assert not err


# ---- ops of other kinds


def test_tuples_integers_and_no_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def pick(table: torch.Tensor, rows: torch.Tensor, backend: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        return table[rows] * 2, rows + 1

    samples = [Sample("some", (torch.rand(4, 3), torch.tensor([2, 0])))]
    spec = with_op(pick, reference=pick, samples=lambda device, dtype: samples, order=0)
    report = report_of(monkeypatch, spec)
    assert report["passed"], validate.render(report)
    assert rows_of(report)["value"]["samples"] == 2  # tensors
    differentiable = replace(spec, order=2)
    assert set(rows_of(report_of(monkeypatch, differentiable))) == {"value", "first", "second"}
    wrong = replace(spec, op=lambda table, rows, backend: (table[rows] * 2, rows + 2))
    assert not report_of(monkeypatch, wrong)["passed"]


def test_what_the_interpreter_cannot_do_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(**vars(SPEC) | {"interpreted_dtypes": (torch.float32,)})
    monkeypatch.setattr(kernels, "SPECS", (spec,))
    report = validate.run(["bias_lrelu"], ["fp32", "bf16"], "cpu")
    assert report["passed"]
    assert report["summary"]["skipped"] == 1
    assert "bf16 skipped: Triton's interpreter" in " ".join(validate.render(report).split())


def test_inputs_of_another_dtype_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in fp32 that is given out in fp16, and sums of fp16 that come in fp32: exact means all in fp64."""

    def cast(table: torch.Tensor, *, dtype: torch.dtype, backend: str = "") -> torch.Tensor:
        assert table.dtype in (torch.float32, torch.float64)
        return table.to(dtype)

    samples = [Sample("some", (torch.rand(4, 3),), {"dtype": torch.float16})]
    spec = with_op(cast, reference=cast, samples=lambda *args: samples, order=0, dtypes=(torch.float16,))
    monkeypatch.setattr(kernels, "SPECS", (spec,))
    (row,) = validate.run([spec.name], ["fp16"])["rows"]
    assert row["passed"], row
    assert row["plain"] > 0

    def total(x: torch.Tensor, *, backend: str = "") -> torch.Tensor:
        return x.float().square().sum()

    samples = [Sample("some", (torch.rand(40, 3).half(),))]
    spec = with_op(total, reference=total, samples=lambda *args: samples, dtypes=(torch.float16,))
    monkeypatch.setattr(kernels, "SPECS", (spec,))
    assert validate.run([spec.name], ["fp16"])["passed"]


def test_derivatives_of_few_numbers_are_taken_of_several_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's error in a single number says little: it may be exact by luck."""
    made: list[int] = []

    def mean(x: torch.Tensor, *, backend: str = "") -> torch.Tensor:
        made.append(backend == "triton")
        return x.square().mean()

    samples = [Sample("some", (torch.rand(40, 3),))]
    assert report_of(monkeypatch, with_op(mean, reference=mean, samples=lambda *args: samples))["passed"]
    assert made.count(True) == 4 + 1  # the last for the same bits


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "bias_lrelo"], "unknown op or pair 'bias_lrelo'; did you mean 'bias_lrelu'?"),
        (["--op", "wgangp"], "did you mean 'wgan-gp'?"),
        (["--dtype", "fp23"], "unknown dtype 'fp23'; did you mean"),
        (["--device", "tpu"], "device is 'tpu', expected 'auto', 'cpu' or 'cuda'"),
        (["--device", "cuda:77"], "device is 'cuda:77', but "),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_kernels_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(fastgan.InputError, match="Triton was imported for a GPU"):
        validate.run(["bias_lrelu"], device="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(fastgan.InputError, match="TRITON_INTERPRET=1 is set"):
        validate._specs(torch.device("cuda"))


def test_the_command_cannot_choose_the_interpreter_any_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["validate", "--op", "bias_lrelu", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("fastgan: device: Triton was imported for a GPU")
    assert "TRITON_INTERPRET" not in os.environ


def test_the_command_chooses_the_interpreter() -> None:
    """Before anything imports Triton, whose own functions, such as a sum, are decorated as it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgan", "validate", "--json", "--device", "cpu"]
    command += ["--op", "gradient_penalty", "--dtype", "fp32"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["conditions"]["kernels"] == "Triton's interpreter"
    assert len(report["rows"]) == 3
    assert run.stderr.startswith("validate: gradient_penalty fp32: ok")


# ---- the criterion


def test_the_criterion() -> None:
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    rounded = exact.float()
    ulp = torch.finfo(torch.float32).eps * 2
    assert closeness.measure(rounded, rounded, exact) == closeness.Closeness(0.0, 0.0, 2 * ulp)
    for n, passes in ((2, True), (3, False)):
        found = closeness.measure(rounded + n * ulp, rounded, exact)
        assert found.passed == passes
        assert found.error == pytest.approx(n * ulp)
    with pytest.raises(AssertionError, match=r"^op: error .* at flat index"):
        closeness.assert_as_accurate("op", rounded + 1, rounded, exact)
    assert closeness.measure(rounded + 8 * ulp, rounded + 4 * ulp, exact).passed  # PyTorch errs half as much
    assert closeness.measure(rounded[:0], rounded[:0], exact[:0]).passed
