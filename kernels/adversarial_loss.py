"""What a player minimises, from logits, with its derivatives in the same pass.

With real and fake logits r and f and s the softplus, the mean over rows of

    minimax         D  s(-r) + s(f)                 G  -s(f)
    non-saturating  D  s(-r) + s(f)                 G  s(-f)
    wasserstein     D  f - r                        G  -f
    hinge           D  relu(1 - r) + relu(1 + f)    G  -f
    least-squares   D  (r - 1)^2 / 2 + f^2 / 2      G  (f - 1)^2 / 2
    relativistic    D  s(f - r)                     G  s(r - f)

The derivatives of the mean to every logit ("row scales", as they scale the rows of a backward pass) are outputs of the
op: the first backward pass is a product with them, and they are differentiable themselves through each loss's second
derivative, which is diagonal (relativistic: in f - r). One program walks over all rows: there are few, and their sum
is made in one order.

Sources: see :mod:`fastgan.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import softplus
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.backend import Backend, resolve
from fastgan.kernels._device import activate
from fastgan.kernels._launch import Launch, accumulator, check, check_dtype
from fastgan.kernels._library import register
from fastgan.kernels._spec import OpSpec, Sample

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Kind = Literal["minimax", "non-saturating", "wasserstein", "hinge", "least-squares", "relativistic"]
Player = Literal["discriminator", "generator"]

# ---- reference


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _softplus(x: Tensor) -> Tensor:
    return softplus(x, threshold=40.0)  # torch's default leaves out 2e-9 from 20 on


_DISCRIMINATOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minimax": lambda r, f: _softplus(-r) + _softplus(f),
    "non-saturating": lambda r, f: _softplus(-r) + _softplus(f),
    "wasserstein": lambda r, f: f - r,
    "hinge": lambda r, f: torch.relu(1 - r) + torch.relu(1 + f),
    "least-squares": lambda r, f: ((r - 1).square() + f.square()) / 2,
    "relativistic": lambda r, f: _softplus(f - r),
}
_GENERATOR: dict[str, Callable[[Tensor], Tensor]] = {
    "minimax": lambda f: -_softplus(f),
    "non-saturating": lambda f: _softplus(-f),
    "wasserstein": lambda f: -f,
    "hinge": lambda f: -f,
    "least-squares": lambda f: (f - 1).square() / 2,
}


def adversarial_loss_reference(real: Tensor | None, fake: Tensor, *, kind: Kind, player: Player) -> Tensor:
    """The formulas above in PyTorch ops."""
    f = _wide(fake)
    if player == "generator" and kind != "relativistic":
        return _GENERATOR[kind](f).mean()
    assert real is not None  # checked by the op
    r = _wide(real)
    if player == "generator":
        return _softplus(r - f).mean()
    return _DISCRIMINATOR[kind](r, f).mean()


# ---- kernels


@triton.jit
def _positive(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays


@triton.jit
def _log_sum(x):
    """log(1 + exp(x)), with all its digits where it is small."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    rounded = tl.where(u == 1, 1.0, u - 1)  # what of e is in u
    return _positive(x) + tl.where(u == 1, e, tl.log(u) * (e / rounded))


@triton.jit
def _adversarial_loss_fwd_kernel(
    real_ptr, fake_ptr, real_scale_ptr, fake_scale_ptr, loss_ptr, real_mean_ptr, fake_mean_ptr, loss_scale_ptr,
    n_rows,
    LOSS: tl.constexpr, HAS_REAL: tl.constexpr, REAL_SCALE: tl.constexpr, MEANS: tl.constexpr, SCALED: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    share = tl.full([], 1.0, ACC) / n_rows
    if SCALED:
        share *= tl.load(loss_scale_ptr).to(ACC)
    losses = tl.zeros([BLOCK], ACC)
    reals = tl.zeros([BLOCK], ACC)
    fakes = tl.zeros([BLOCK], ACC)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        mask = rows < n_rows
        f = tl.load(fake_ptr + rows, mask=mask, other=0.0).to(ACC)
        r = tl.zeros([BLOCK], ACC)
        if HAS_REAL:
            r = tl.load(real_ptr + rows, mask=mask, other=0.0).to(ACC)
        dr = tl.zeros([BLOCK], ACC)
        if LOSS == "cross-entropy":
            value = _log_sum(-r) + _log_sum(f)
            dr, df = -activate(-r, "sigmoid", 0.0), activate(f, "sigmoid", 0.0)
        elif LOSS == "difference":
            value = f - r
            dr, df = tl.full([BLOCK], -1.0, ACC), tl.full([BLOCK], 1.0, ACC)
        elif LOSS == "hinge":
            value = _positive(1 - r) + _positive(1 + f)
            dr, df = tl.where(r < 1, -1.0, 0.0).to(ACC), tl.where(f > -1, 1.0, 0.0).to(ACC)
        elif LOSS == "squares":
            value = ((r - 1) * (r - 1) + f * f) / 2
            dr, df = r - 1, f
        elif LOSS == "relativistic":
            value = _log_sum(f - r)
            df = activate(f - r, "sigmoid", 0.0)
            dr = -df
        elif LOSS == "generator-minimax":
            value = -_log_sum(f)
            df = -activate(f, "sigmoid", 0.0)
        elif LOSS == "generator-non-saturating":
            value = _log_sum(-f)
            df = -activate(-f, "sigmoid", 0.0)
        elif LOSS == "generator-higher":
            value = -f
            df = tl.full([BLOCK], -1.0, ACC)
        elif LOSS == "generator-squares":
            value = (f - 1) * (f - 1) / 2
            df = f - 1
        else:
            tl.static_assert(LOSS == "generator-relativistic")
            value = _log_sum(r - f)
            dr = activate(r - f, "sigmoid", 0.0)
            df = -dr
        losses += tl.where(mask, value, 0.0)
        reals += r
        fakes += f
        tl.store(fake_scale_ptr + rows, (df * share).to(fake_scale_ptr.dtype.element_ty), mask=mask)
        if REAL_SCALE:
            tl.store(real_scale_ptr + rows, (dr * share).to(real_scale_ptr.dtype.element_ty), mask=mask)
    if DEPENDENT:
        gdc_launch_dependents()
    tl.store(loss_ptr, (tl.sum(losses) / n_rows).to(loss_ptr.dtype.element_ty))
    if MEANS:
        tl.store(real_mean_ptr, (tl.sum(reals) / n_rows).to(real_mean_ptr.dtype.element_ty))
        tl.store(fake_mean_ptr, (tl.sum(fakes) / n_rows).to(fake_mean_ptr.dtype.element_ty))


# ---- launchers

_BLOCK = 512  # not tuned: replace with the measured choice and name the bench that shows it
_FORMULAS = {
    ("minimax", "discriminator"): "cross-entropy",
    ("non-saturating", "discriminator"): "cross-entropy",
    ("wasserstein", "discriminator"): "difference",
    ("hinge", "discriminator"): "hinge",
    ("least-squares", "discriminator"): "squares",
    ("relativistic", "discriminator"): "relativistic",
    ("minimax", "generator"): "generator-minimax",
    ("non-saturating", "generator"): "generator-non-saturating",
    ("wasserstein", "generator"): "generator-higher",
    ("hinge", "generator"): "generator-higher",
    ("least-squares", "generator"): "generator-squares",
    ("relativistic", "generator"): "generator-relativistic",
}


def adversarial_loss_launch(
    kind: str,
    player: str,
    real: Tensor | None,
    fake: Tensor,
    real_scale: Tensor | None,
    fake_scale: Tensor,
    loss: Tensor,
    real_mean: Tensor | None = None,
    fake_mean: Tensor | None = None,
    loss_scale: Tensor | None = None,
) -> Launch:
    """The mean ``loss``, its derivatives to every logit times ``loss_scale``, and the mean logits.

    Args:
        kind, player: see :func:`adversarial_loss`.
        real: ``[n]``, contiguous, ``n >= 1``; ``None`` for a generator whose loss does not compare.
        fake: ``[n]``, contiguous.
        real_scale: ``[n]`` of any dtype, or ``None`` where it is not needed; may be ``real``.
        fake_scale: ``[n]`` of any dtype; may be ``fake``.
        loss: 0-dim, the mean before any scale.
        real_mean, fake_mean: 0-dim, or both ``None`` for a generator.
        loss_scale: 0-dim factor of the derivatives that is read when the launch runs.
    """
    return Launch(
        _adversarial_loss_fwd_kernel, (1,),
        {"real_ptr": fake if real is None else real, "fake_ptr": fake,
         "real_scale_ptr": fake_scale if real_scale is None else real_scale, "fake_scale_ptr": fake_scale,
         "loss_ptr": loss, "real_mean_ptr": loss if real_mean is None else real_mean,
         "fake_mean_ptr": loss if fake_mean is None else fake_mean,
         "loss_scale_ptr": loss if loss_scale is None else loss_scale, "n_rows": fake.numel(),
         "LOSS": _FORMULAS[kind, player], "HAS_REAL": real is not None, "REAL_SCALE": real_scale is not None,
         "MEANS": real_mean is not None, "SCALED": loss_scale is not None, "ACC": accumulator(fake.dtype),
         "BLOCK": _BLOCK},
    )  # fmt: skip


def _fake(real: Tensor | None, fake: Tensor, kind: Kind, player: Player) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if fake.dtype == torch.float64 else torch.float32
    scales = [fake.new_empty(fake.shape if t is not None else (0,), dtype=dtype) for t in (real, fake)]
    return fake.new_empty((), dtype=dtype), scales[0], scales[1]


def _forward(real: Tensor | None, fake: Tensor, kind: Kind, player: Player) -> tuple[Tensor, Tensor, Tensor]:
    loss, real_scale, fake_scale = _fake(real, fake, kind, player)  # scales are wide: products are rounded once
    loss.fill_(math.nan)  # of no rows, as torch's mean is
    if fake.numel():
        real = None if real is None else real.contiguous()
        to_real = None if real is None else real_scale
        means = [torch.empty_like(loss) if player == "discriminator" else None for _ in range(2)]  # not asked for
        adversarial_loss_launch(kind, player, real, fake.contiguous(), to_real, fake_scale, loss, *means)()
    return loss, real_scale, fake_scale


# ---- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    real, fake, ctx.kind, ctx.player = inputs
    ctx.save_for_backward(real, fake, *output[1:])
    ctx.set_materialize_grads(False)


def _slope(x: Tensor) -> Tensor:
    """The derivative of the sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _differentiate(
    ctx: Any, dloss: Tensor | None, v_real: Tensor | None, v_fake: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    real, fake, real_scale, fake_scale = ctx.saved_tensors
    scales = (None if real is None else real_scale, fake_scale)
    first = [None if dloss is None or s is None else dloss * s for s in scales]  # differentiable: outputs of this op
    formula, n = _FORMULAS[ctx.kind, ctx.player], fake.numel()
    second: list[Tensor | None] = [None, None]
    if formula in ("relativistic", "generator-relativistic"):
        if v_real is not None or v_fake is not None:
            v = _sum(v_fake, None if v_real is None else -v_real)
            assert v is not None
            bent = _slope(_wide(fake) - _wide(real)) * v / n
            second = [-bent, bent]
    else:
        for i, (x, v) in enumerate(((real, v_real), (fake, v_fake))):
            if x is None or v is None:
                continue
            if formula in ("cross-entropy", "generator-non-saturating", "generator-minimax"):
                bent = _slope(_wide(x)) * v / n
                second[i] = -bent if formula == "generator-minimax" else bent
            elif formula in ("squares", "generator-squares"):
                second[i] = v / n
    dreal, dfake = (
        None if x is None or (total := _sum(a, b)) is None else total.to(x.dtype)
        for x, a, b in zip((real, fake), first, second, strict=True)
    )
    return dreal, dfake, None, None


_FORWARD = register(
    "adversarial_loss(Tensor? real, Tensor fake, str kind, str player) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _save,
    _differentiate,
)


# ---- public


def adversarial_loss(
    real: Tensor | None, fake: Tensor, *, kind: Kind, player: Player, backend: Backend | None = None
) -> Tensor:
    """What a player minimises: the mean of one of the losses above.

    Args:
        real: logits of real samples, ``[n]`` or of any shape; fp16, bf16, fp32 or fp64. ``None`` for a generator
            whose loss does not compare, where it is not read; the relativistic one compares.
        fake: logits of generated samples, of the same shape and dtype. Both are copied if not contiguous.
        kind: ``"minimax"``, ``"non-saturating"``, ``"wasserstein"``, ``"hinge"``, ``"least-squares"`` or
            ``"relativistic"``.
        player: ``"discriminator"`` or ``"generator"``.
        backend: see :func:`fastgan.backend.resolve`.

    Returns:
        0-dim, fp32 (fp64 for fp64), computed in that type; NaN where there are no logits. Differentiable to any order,
        in the real logits too. At hinge's kinks the derivative is 0, as in PyTorch.

    Raises:
        ValueError: a shape, dtype or name is none of the above.
    """
    op = "adversarial_loss"
    check(kind in get_args(Kind), op, f"kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    check(player in get_args(Player), op, f"player is {player!r}, expected one of {', '.join(get_args(Player))}")
    check_dtype(op, "fake", fake, DTYPES)
    if player == "generator" and kind != "relativistic":
        real = None
    else:
        check(real is not None, op, f"real is None, but the {kind} loss of the {player} compares")
    if real is not None:
        check(real.shape == fake.shape, op, f"real has shape {tuple(real.shape)}, expected {tuple(fake.shape)}")
        check(real.dtype == fake.dtype, op, f"real has dtype {real.dtype}, expected {fake.dtype}")
    if resolve(op, backend, real, fake) == "reference":
        return adversarial_loss_reference(real, fake, kind=kind, player=player)
    loss, *_ = _FORWARD(real, fake, kind, player)
    return loss  # type: ignore[no-any-return]


# ---- spec


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def sample(name: str, kind: Kind, player: Player, *shape: int) -> Sample:
        real, fake = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))
        compares = player == "discriminator" or kind == "relativistic"
        return Sample(name, (real if compares else None, fake), {"kind": kind, "player": player})

    samples = [sample(f"{kind}-d", kind, "discriminator", 16) for kind in get_args(Kind)]
    samples += [sample(f"{kind}-g", kind, "generator", 2, 1) for kind in get_args(Kind)]
    return [samples[-1], *samples[:-1], sample("blocks", "hinge", "discriminator", 513)]


def _launches(dtype: torch.dtype) -> list[Launch]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, scale, loss = torch.empty(64, dtype=dtype), torch.empty(64, dtype=wide), torch.empty((), dtype=wide)
    out = []
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds if dtype == torch.float32 else kinds[-1:]:  # losses are fp32 in lower precision too
        out.append(adversarial_loss_launch(kind, "discriminator", x, x, scale, scale, loss, loss, loss))
        real = x if kind == "relativistic" else None
        out.append(adversarial_loss_launch(kind, "generator", real, x, None, scale, loss))
        if real is not None:
            out.append(adversarial_loss_launch(kind, "generator", real, x, scale, scale, loss))
        if dtype == torch.float16:
            out += [
                adversarial_loss_launch(kind, "discriminator", x, x, x, x, loss, loss, loss, loss),
                adversarial_loss_launch(kind, "generator", real, x, None, x, loss, loss_scale=loss),
            ]
    return out


def _bytes_moved(s: Sample) -> int:
    return sum(2 * t.numel() * t.element_size() for t in s.inputs if t is not None)


SPEC = OpSpec(
    name="adversarial_loss",
    op=adversarial_loss,
    reference=adversarial_loss_reference,
    samples=_samples,
    dtypes=DTYPES,
    launches=_launches,
    order=2,
    bytes_moved=_bytes_moved,
    takes_empty=False,
)
