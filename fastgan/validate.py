"""Every op and every closed-form update held to fp64 on this machine, beside PyTorch's own error.

An op of :data:`fastgan.kernels.SPECS` runs on its samples: value, first and second derivatives against its reference in
fp64, twice (the same bits?), with its inputs looked at afterwards. An update of a fixed set of small pairs runs in
closed form and through autograd: the gradients of all parameters of a player count as one tensor. The criterion is
:mod:`fastgan.closeness`; in fp64, where nothing more exact is at hand, an update may differ from autograd's by 1e-12 of
its largest gradient.

On a GPU kernels run natively, on a CPU in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import platform
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from fastgan import __version__
from fastgan.arithmetic import Arithmetic
from fastgan.closeness import Closeness, measure
from fastgan.engine import device_of
from fastgan.errors import InputError, unknown

SCHEMA = 1
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ALSO = {"float64": "fp64", "double": "fp64", "float32": "fp32", "float": "fp32", "bfloat16": "bf16",
         "float16": "fp16", "half": "fp16"}  # fmt: skip
_FP64_UPDATE = 1e-12
_WIDTH = 100
_ENGINE_LOG = logging.getLogger("fastgan.engine")


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        kind: ``"op"`` or ``"plan"``.
        name: of the op, or of the pair and what computes it.
        dtype: a key of :data:`DTYPES`.
        what: ``"value"``, ``"first"``, ``"second"`` (derivative), or whose update: ``"critic"``, ``"generator"``.
        samples: how many were run.
        worst: the sample that comes nearest to its bound, or furthest over it.
        error, plain, bound: of that sample; see :class:`fastgan.closeness.Closeness`.
        repeats: whether a second run gave the same bits.
        inputs_kept: whether inputs and incoming gradients were as before afterwards.
        detail: what is wrong, empty where nothing is.
        skipped: why nothing was run, or ``None``.
    """

    kind: str
    name: str
    dtype: str
    what: str = ""
    samples: int = 0
    worst: str = ""
    error: float = 0.0
    plain: float = 0.0
    bound: float = 0.0
    repeats: bool = True
    inputs_kept: bool = True
    detail: str = ""
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        return not self.detail


class _Gathered:
    """Rows of one op or pair in one dtype, over its samples."""

    def __init__(self, kind: str, name: str, dtype: str) -> None:
        self._key = kind, name, dtype
        self._found: dict[str, dict[str, Any]] = {}

    def add(self, what: str, sample: str, close: Closeness, repeats: bool, kept: bool) -> None:
        row = self._found.setdefault(what, {"samples": 0, "repeats": True, "inputs_kept": True, "near": -1.0})
        row["samples"] += 1
        row["repeats"] &= repeats
        row["inputs_kept"] &= kept
        near = close.error / close.bound if close.bound else 0.0
        near = near if close.passed and math.isfinite(near) else math.inf
        if near > row["near"]:
            row |= {"near": near, "worst": sample, "error": close.error, "plain": close.plain, "bound": close.bound}
            row["wrong"] = close.detail and f"{sample}: {close.detail}"

    def rows(self) -> list[Row]:
        out = []
        for what, row in self._found.items():
            wrong = [row.pop("wrong")] if row.pop("near") >= 0 else []
            wrong += [] if row["repeats"] else ["a second run gave other bits"]
            wrong += [] if row["inputs_kept"] else ["an input or the incoming gradient was overwritten"]
            out.append(Row(*self._key, what, **row, detail="; ".join(w for w in wrong if w)))
        return out


# ---- ops


@dataclass
class _Run:
    tensors: dict[str, tuple[str, torch.Tensor]]  # by name: value, first or second, and the tensor
    inputs_kept: bool


def _derivatives(
    fn: Callable[..., Any], sample: Any, dtype: torch.dtype, order: int, seed: int, exact: bool = False
) -> _Run:  # fmt: skip
    """Values of an op of ``dtype``, with ``exact`` in fp64, and derivatives of a random projection of them."""

    def cast(v: Any) -> Any:
        if isinstance(v, torch.Tensor):  # else in the sample's own memory, with its strides
            return v.detach().double() if exact and v.is_floating_point() else v.detach()
        return torch.float64 if exact and isinstance(v, torch.dtype) and v == dtype else v

    def randn_like(t: torch.Tensor) -> torch.Tensor:  # the same numbers in every dtype
        return torch.randn(t.shape, generator=g, device=t.device).to(dtype).to(t.dtype)

    inputs = [cast(t) for t in sample.inputs]
    kwargs = {k: cast(v) for k, v in sample.kwargs.items()}
    given = [t for t in (*inputs, *kwargs.values()) if isinstance(t, torch.Tensor)]
    before = [t.detach().clone() for t in given]
    wrt = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()] if order else []
    for t in wrt:
        t.requires_grad_()
    out = fn(*inputs, **kwargs)
    outs = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor)]
    found = {f"y{i}": ("value", t) for i, t in enumerate(outs)}
    if wrt:
        g = torch.Generator(device=wrt[0].device).manual_seed(seed)
        smooth = [t for t in outs if t.requires_grad]
        if not smooth:
            raise RuntimeError("the result does not depend on the inputs: autograd has no graph of it")
        seeds = [randn_like(t).requires_grad_() for t in smooth]
        given, before = [*given, *seeds], [*before, *(t.detach().clone() for t in seeds)]
        grads = torch.autograd.grad(smooth, wrt, seeds, create_graph=order > 1, allow_unused=True)
        grads = tuple(torch.zeros_like(t) if d is None else d for d, t in zip(grads, wrt, strict=True))
        found |= {f"d{i}": ("first", t) for i, t in enumerate(grads)}
        if order > 1:
            points = [*seeds, *wrt]
            projected = torch.stack([(randn_like(t) * t).sum() for t in grads]).sum()
            second: Sequence[torch.Tensor | None] = [None] * len(points)
            if projected.requires_grad:
                second = torch.autograd.grad(projected, points, allow_unused=True)
            found |= {
                f"dd{i}": ("second", torch.zeros_like(t) if s is None else s)
                for i, (s, t) in enumerate(zip(second, points, strict=True))
            }
    kept = all(_same(t.detach(), b) for t, b in zip(given, before, strict=True))
    return _Run({k: (what, t.detach()) for k, (what, t) in found.items()}, kept)


_FEW, _PROJECTIONS = 32, 4


def _op_rows(spec: Any, dtype: str, device: torch.device) -> list[Row]:
    """A derivative of few numbers, in which PyTorch may be exact by luck, is taken of several projections."""
    kind, gathered = DTYPES[dtype], _Gathered("op", spec.name, dtype)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return spec.op(*args, **kwargs, backend="triton")

    for sample in spec.samples(device, kind):
        plain = [_derivatives(spec.reference, sample, kind, spec.order, 1)]
        few = any(what != "value" and 0 < t.numel() < _FEW for what, t in plain[0].tensors.values())
        seeds = range(1, _PROJECTIONS + 1) if few else range(1, 2)
        plain += [_derivatives(spec.reference, sample, kind, spec.order, seed) for seed in seeds[1:]]
        exact = [_derivatives(spec.reference, sample, kind, spec.order, seed, exact=True) for seed in seeds]
        got = [_derivatives(kernel, sample, kind, spec.order, seed) for seed in seeds]
        again = _derivatives(kernel, sample, kind, spec.order, 1)
        kept = all(run.inputs_kept for run in got)
        for key, (what, expected) in plain[0].tensors.items():
            found = got[0].tensors.get(key, ("", None))[1]
            if found is None:
                close = Closeness(math.nan, math.nan, math.nan, f"{key} is missing")
                gathered.add(what, sample.name, close, True, kept)
                continue
            if found.shape != expected.shape or found.dtype != expected.dtype:
                close = measure(found, expected, exact[0].tensors[key][1])
            else:
                runs = slice(1) if what == "value" else slice(None)
                a, b, c = (torch.stack([run.tensors[key][1] for run in each[runs]]) for each in (got, plain, exact))
                close = measure(a, b, c)
            gathered.add(what, sample.name, close, _same(found, again.tensors[key][1]), kept)
    return gathered.rows()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


# ---- updates


@dataclass(frozen=True)
class Pair:
    """A generator and a discriminator with what they are trained on."""

    name: str
    networks: Callable[[], tuple[nn.Module, nn.Module, int]]  # generator, discriminator, latent
    loss: str
    penalties: tuple[Any, ...] = ()


def _mlp(norm: bool = False, smooth: bool = False) -> tuple[nn.Module, nn.Module, int]:
    def hidden(a: int, b: int) -> list[nn.Module]:
        norms: list[nn.Module] = [nn.LayerNorm(b, 0.1)] if norm else []
        return [nn.Linear(a, b), *norms, nn.Tanh() if smooth else nn.LeakyReLU(0.2)]

    g = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 6), nn.Tanh())
    d = nn.Sequential(*hidden(6, 24), *hidden(24, 16), nn.Linear(16, 1))
    return g, d, 5


def _conv() -> tuple[nn.Module, nn.Module, int]:
    g = nn.Sequential(nn.Linear(5, 8 * 4), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 2, 4, 2, 1),
                      nn.Tanh())  # fmt: skip
    d = nn.Sequential(nn.Conv2d(2, 6, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 4, 2, 1), nn.LeakyReLU(0.2),
                      nn.Flatten(), nn.Linear(32, 1))  # fmt: skip
    return g, d, 5


def pairs() -> list[Pair]:
    """The pairs whose updates are checked."""
    from functools import partial

    from fastgan.penalties import R1, R2, GradientPenalty

    return [
        Pair("wgan-gp", _mlp, "wasserstein", (GradientPenalty(10.0),)),
        Pair("r1", _mlp, "non-saturating", (R1(4.0),)),
        Pair("r1-r2", _mlp, "relativistic", (R1(4.0), R2(2.0))),
        Pair("non-saturating", _mlp, "non-saturating"),
        Pair("relativistic", _mlp, "relativistic"),
        Pair("conv-r1", _conv, "non-saturating", (R1(4.0),)),
        Pair("layer-norm-tanh", partial(_mlp, norm=True, smooth=True), "wasserstein", (GradientPenalty(10.0),)),
    ]


_ROWS, _DRAWS, _INTERPRETED_DRAWS, _CANDIDATES = 16, 8, 3, 1024
_INTERPRETER = "Triton's interpreter is wrong for {} here: run it on a GPU"
_BY = {"reference": "torch ops", "triton": "kernels"}  # what runs the plan, by backend


@torch.no_grad()
def _randomise(*networks: nn.Module) -> None:
    """Parameters with which values and gradients keep their size from layer to layer, so that every term counts."""
    for network in networks:
        for p in network.parameters():
            p.normal_(0.0, 1.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.5)


def margin(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """How far each row stays from the kinks of the activations."""
    least = [torch.full((len(x),), math.inf, dtype=x.dtype)]
    hooks = [
        m.register_forward_hook(lambda m, args, out: least.append(args[0].flatten(1).abs().amin(1)))
        for m in net.modules()
        if isinstance(m, nn.ReLU | nn.LeakyReLU)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return torch.stack(least).amin(0)


def _drawn(pair: Pair, seed: int) -> tuple[nn.Module, nn.Module, int, dict[str, torch.Tensor]]:
    """Networks in fp64, and rows for both updates: of many candidates those farthest from every kink, where the
    rounding of a working precision decides nothing."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        g, d, latent = pair.networks()
        _randomise(g, d)
        n = _CANDIDATES
        z, z_g, alpha = torch.randn(n, latent), torch.randn(n, latent), torch.rand(n)
        g, d = g.double(), d.double()
        with torch.no_grad():
            fake, fake_g = g(z.double()), g(z_g.double())
        real = torch.rand(fake.shape) * 2 - 1
    weight = alpha.double().view(-1, *[1] * (real.ndim - 1))
    points = (real.double(), fake, weight * real.double() + (1 - weight) * fake, fake_g)
    far = torch.stack([margin(d, x) for x in points] + [margin(g, y.double()) for y in (z, z_g)]).amin(0)
    rows = far.topk(_ROWS).indices
    return g, d, latent, {"real": real[rows], "z": z[rows], "alpha": alpha[rows], "z_g": z_g[rows]}


class _AllReduced(Arithmetic):
    """Autocast around penalties too."""

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        with self.reduced():
            yield


@dataclass
class _Update:
    gradients: dict[str, torch.Tensor]  # of all parameters of a player in one tensor
    inputs_kept: bool
    autograd: dict[str, str]  # players whose update ran through autograd, and why


def _update(
    pair: Pair, seed: int, dtype: str, device: torch.device, backend: str, closed_form: bool,
    penalties: str = "full",
) -> _Update:  # fmt: skip
    """Both players' gradients at the start, read off Adam's first moments: with beta 1 = 0 they are the gradients.

    ``penalties``: the precision that autograd takes them in.
    """
    from fastgan.engine import Engine
    from fastgan.optim import Adam

    g, d, latent, given = _drawn(pair, seed)
    working = torch.float64 if dtype == "fp64" else torch.float32
    g, d = copy.deepcopy(g).to(working), copy.deepcopy(d).to(working)
    given = {k: v.to(device, working) for k, v in given.items()}
    before = {k: v.clone() for k, v in given.items()}
    adam = Adam(1e-3, (0.0, 0.9))
    precision: Any = "fp32" if dtype == "fp64" else dtype
    by: Any = backend
    engine = Engine(
        g, d, latent, pair.loss, pair.penalties, g_optimizer=adam, d_optimizer=adam, ema=None, device=device,
        precision=precision, backend=by, closed_form=closed_form,
    )  # fmt: skip
    if penalties == "reduced":
        engine._autograd.arithmetic = _AllReduced(engine.precision, engine.device)
    if dtype == "fp16":  # a scale at which nothing overflows, which would leave the update out
        state = engine.state_dict()
        state["loss_scale"]["scale"] = torch.full_like(state["loss_scale"]["scale"], 2.0**8)
        engine.load_state_dict(state)
    start = copy.deepcopy(engine.discriminator.state_dict())
    engine.d_step(given["real"], z=given["z"], alpha=given["alpha"])
    engine.discriminator.load_state_dict(start)  # the generator's update is taken at the start too
    engine.g_step(z=given["z_g"], real=given["real"] if engine.loss.compares else None)
    state = engine.state_dict()
    gradients = {
        player: torch.cat([s["exp_avg"].flatten() for s in state[f"{key}_optimizer"]["state"].values()]).cpu()
        for player, key in (("critic", "d"), ("generator", "g"))
    }
    autograd: dict[str, str] = {}
    if closed_form:
        for player, why in re.findall(
            r"^(discriminator|generator): .*: autograd[^\n]*\n *why: (.*)$", engine.explain(), re.MULTILINE
        ):
            autograd["critic" if player == "discriminator" else player] = why
    kept = all(torch.equal(given[k], before[k]) for k in given)
    return _Update(gradients, kept, autograd)


def _plan_rows(pair: Pair, dtype: str, device: torch.device, backend: str) -> list[Row]:
    name = f"{pair.name}, {_BY[backend]}"
    compared: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    repeats = kept = True
    skipped: dict[str, str] = {}
    interpreted = backend == "triton" and device.type == "cpu"
    if interpreted and dtype == "bf16":
        return [Row("plan", name, dtype, skipped=_INTERPRETER.format(dtype))]
    for seed in range(_INTERPRETED_DRAWS if interpreted else _DRAWS):
        try:
            got = _update(pair, seed, dtype, device, backend, True)
            again = _update(pair, seed, dtype, device, backend, True) if seed == 0 else got
        except InputError as e:  # a path that the engine does not have here
            return [Row("plan", name, dtype, skipped=str(e))]
        skipped = got.autograd
        if len(skipped) == len(got.gradients):
            break
        # kernels multiply in the working precision in penalties too: so must what they are compared with
        penalties = "reduced" if backend == "triton" and dtype in ("bf16", "fp16") else "full"
        plain = _update(pair, seed, dtype, device, "reference", False, penalties)
        exact = _update(pair, seed, "fp64", device, "reference", False) if dtype != "fp64" else plain
        kept &= got.inputs_kept
        for player in plain.gradients:
            if player not in skipped:
                repeats &= _same(got.gradients[player], again.gradients[player])
                compared.setdefault(player, []).append(tuple(u.gradients[player] for u in (got, plain, exact)))
    gathered = _Gathered("plan", name, dtype)
    for player, draws in compared.items():
        a, b, c = (torch.cat(parts) for parts in zip(*draws, strict=True))  # one tensor of all draws
        close = _of_fp64(a, c) if dtype == "fp64" else measure(a, b, c)
        gathered.add(player, f"{len(draws)} draws", close, repeats, kept)
    reasons = [*dict.fromkeys(skipped.values())]
    if len(skipped) == 2 and len(reasons) == 1:
        return [Row("plan", name, dtype, skipped=reasons[0])]
    return gathered.rows() + [Row("plan", name, dtype, player, skipped=why) for player, why in skipped.items()]


def _of_fp64(got: torch.Tensor, exact: torch.Tensor) -> Closeness:
    error, bound = (got - exact).abs().max().item(), _FP64_UPDATE * exact.abs().max().item()
    return Closeness(error, 0.0, bound, "" if error <= bound else f"error {error:.3e} > {bound:.3e}")


# ---- all of it


def run(
    names: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    device: str | torch.device = "auto",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Check ops and updates.

    Args:
        names: ops and pairs, by name; all where none is given.
        dtypes: of ``fp64``, ``fp32``, ``bf16`` and ``fp16``, or torch's names; all where none is given.
        device: ``"auto"`` is the GPU where there is one. On a CPU ``TRITON_INTERPRET=1`` must be in the environment
            before Triton is imported; the command sees to that.
        progress: called with a line for each op or pair and dtype.

    Returns:
        JSON-able: ``schema``, ``passed``, ``summary`` (numbers of rows), ``conditions``, ``criterion`` and ``rows``
        (:class:`Row`, with ``passed``).

    Raises:
        InputError: a name, dtype or device is unknown or not there, or Triton was imported for the other device.
    """
    wanted = [_dtype(name) for name in dtypes] or [*DTYPES]
    place = device_of("device", device)
    specs = {spec.name: spec for spec in _specs(place)}
    couples = {pair.name: pair for pair in pairs()}
    for name in names:
        if name not in specs and name not in couples:
            raise unknown("op or pair", name, (*specs, *couples))
    begin = time.perf_counter()
    say = progress or (lambda line: None)
    rows: list[Row] = []
    before = torch.get_float32_matmul_precision(), _ENGINE_LOG.level
    torch.set_float32_matmul_precision("highest")
    _ENGINE_LOG.setLevel(logging.ERROR)  # what runs through autograd is in the report
    try:
        for name, dtype, work in _work(specs, couples, names, wanted, place):
            at = time.perf_counter()
            try:
                rows += (found := work())
            except Exception as e:  # whatever an op raises is its result, and a failure
                found = [Row("op" if name in specs else "plan", name, dtype, detail=f"{type(e).__name__}: {_line(e)}")]
                rows += found
            say(f"{name} {dtype}: {_said(found)}, {time.perf_counter() - at:.1f} s")
    finally:
        torch.set_float32_matmul_precision(before[0])
        _ENGINE_LOG.setLevel(before[1])
    rows = _merged(rows, wanted)
    failed = [r for r in rows if not r.passed]
    skipped = sum(r.skipped is not None for r in rows)
    return {
        "schema": SCHEMA,
        "passed": not failed,
        "summary": {"passed": len(rows) - len(failed) - skipped, "failed": len(failed), "skipped": skipped,
                    "seconds": round(time.perf_counter() - begin, 1)},
        "conditions": _conditions(place),
        "criterion": "max|got - fp64| <= 2 max|PyTorch - fp64| + 2 ulp; updates in fp64: 1e-12 of the largest gradient",
        "rows": [asdict(row) | {"passed": row.passed} for row in rows],
    }  # fmt: skip


def _merged(rows: Sequence[Row], dtypes: Sequence[str]) -> list[Row]:
    """One row for all pairs, or for all dtypes too, that are skipped for one reason."""

    def key(row: Row) -> tuple[str | None, str]:
        return row.skipped, row.name.split(", ")[-1]

    whole = [r for r in rows if r.kind == "plan" and r.skipped is not None and not r.what]
    n_pairs = len({r.name.split(", ")[0] for r in rows if r.kind == "plan"})
    out: list[Row] = []
    for row in rows:
        same = [r for r in whole if key(r) == key(row)] if row in whole else []
        in_dtype = [r for r in same if r.dtype == row.dtype]
        if n_pairs < 2 or len(in_dtype) < n_pairs:
            out.append(row)
        elif len(same) == n_pairs * len(dtypes):
            if row is same[0]:
                out.append(replace(row, name=f"all updates, {key(row)[1]}", dtype="all"))
        elif row is in_dtype[0]:
            out.append(replace(row, name=f"all updates, {key(row)[1]}"))
    return out


def _work(
    specs: dict[str, Any], couples: dict[str, Pair], names: Sequence[str], dtypes: Sequence[str], device: torch.device
) -> Iterator[tuple[str, str, Callable[[], list[Row]]]]:
    interpreted = device.type == "cpu"
    for name, spec in specs.items():
        if names and name not in names:
            continue
        for dtype in dtypes:
            if DTYPES[dtype] not in spec.dtypes:
                continue
            here = getattr(spec, "interpreted_dtypes", None)
            if interpreted and here is not None and DTYPES[dtype] not in here:
                why = _INTERPRETER.format(dtype)
                yield name, dtype, lambda row=Row("op", name, dtype, skipped=why): [row]  # type: ignore[misc]
                continue
            yield name, dtype, lambda spec=spec, dtype=dtype: _op_rows(spec, dtype, device)  # type: ignore[misc]
    for name, pair in couples.items():
        if names and name not in names:
            continue
        for dtype in dtypes:
            for backend in _BY:
                yield (
                    name, dtype,
                    lambda p=pair, d=dtype, b=backend: _plan_rows(p, d, device, b),  # type: ignore[misc]
                )  # fmt: skip


def _dtype(name: str) -> str:
    found = _ALSO.get(name, name)
    if found not in DTYPES:
        raise unknown("dtype", name, (*DTYPES, *_ALSO))
    return found


def _specs(device: torch.device) -> tuple[Any, ...]:
    """The ops, imported for the device: Triton reads ``TRITON_INTERPRET`` as it decorates a kernel."""
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" and interpret:
        raise InputError("device: TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it")
    if device.type == "cpu" and not interpret and "triton" in sys.modules:
        raise InputError("device: Triton was imported for a GPU: set TRITON_INTERPRET=1 before the first import")
    try:
        from fastgan.kernels import SPECS
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] != "triton":
            raise
        return ()  # a platform without Triton: updates alone
    return SPECS


def _conditions(device: torch.device) -> dict[str, Any]:
    from importlib import metadata

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "missing"
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "kernels": "native" if on_gpu else "Triton's interpreter",
        "fastgan": __version__,
        "torch": str(torch.__version__),
        "triton": triton,
        "python": platform.python_version(),
    }


def _line(e: Exception) -> str:
    """What is wrong, which Triton says in the last line of its errors."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _said(rows: Sequence[Row]) -> str:
    if any(not r.passed for r in rows):
        return "FAILED"
    return "skipped" if rows and all(r.skipped is not None for r in rows) else "ok"


# ---- as text

_NAME = 26
_WHAT = {"first": "1st deriv.", "second": "2nd deriv."}


def render(report: dict[str, Any]) -> str:
    """The report as a table of at most 100 columns, what failed below it, and a closing line."""
    said = report["conditions"]
    lines = [
        f"fastgan {said['fastgan']}, torch {said['torch']}, triton {said['triton']}; {said['device']}, "
        f"kernels: {said['kernels']}",
        report["criterion"],
        "",
        f"{'op or update':<{_NAME}} {'dtype':<5} {'what':<10} {'error':>9} {'PyTorch':>9} {'bound':>9} {'twice':>7} "
        f"{'inputs':>8}  result",
    ]
    last = None
    for row in report["rows"]:
        label = row["name"] if (row["name"], row["dtype"]) != last else ""
        dtype = row["dtype"] if label else ""
        last = row["name"], row["dtype"]
        head = f"{label:<{_NAME}} {dtype:<5} "
        what = _WHAT.get(row["what"], row["what"])
        if row["skipped"] is not None:
            text = f"{what + ' ' if what else ''}skipped: {row['skipped']}"
            lines += textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
            continue
        numbers = " ".join(f"{row[k]:>9.2e}" for k in ("error", "plain", "bound"))
        twice, inputs = "equal" if row["repeats"] else "differs", "kept" if row["inputs_kept"] else "written"
        verdict = "ok" if row["passed"] else "FAILED"
        lines.append(f"{head}{what:<10} {numbers} {twice:>7} {inputs:>8}  {verdict}")
    wrong = [row for row in report["rows"] if not row["passed"]]
    for row in wrong:
        text = f"{row['name']} {row['dtype']} {_WHAT.get(row['what'], row['what'])}: {row['detail']}"
        lines += ["", *textwrap.wrap(text, _WIDTH)] if row is wrong[0] else textwrap.wrap(text, _WIDTH)
    n = report["summary"]
    state = "PASSED" if report["passed"] else "FAILED"
    lines += [
        "",
        f"{state}: {n['passed']} passed, {n['failed']} failed, {n['skipped']} skipped in {n['seconds']:.1f} s",
    ]
    return "\n".join(lines)
