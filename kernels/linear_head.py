"""The end of a critic and the beginning of its chain in one launch: last layer, loss, seeds, and one more step.

With the last hidden layer's output h ``[R, K]`` and the last layer w ``[K]``, b:

    logit_i = <w, h_i> + b        c_i = the derivative of the mean loss to logit_i
    seed_i = c_i, or 1            adjoint_i = seed_i w * phi'(h_i)            out = (adjoint W) * phi'(mask)

A program makes the logits of its rows by one pass over K (and those of their partners, where the loss compares rows),
then the operand ``adjoint`` on the way in the loop of the product. Programs of the first column of tiles write what
there is one of per row; the last of them to finish adds up their partial sums, in order.

A row is seeded with 1 where the chain makes a penalty's gradient; c_i then enters with the weights' gradients.

Launch only: ``linear_lrelu`` and ``adversarial_loss`` are the ops. Source: see ``fastgan/rules.py`` and ``losses.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgan.kernels import configs
from fastgan.kernels._device import derivative, grid_size, last_arrival, place_of
from fastgan.kernels._launch import Launch, accumulator, check
from fastgan.kernels._losses import KINDS, PLAYERS, row_loss
from fastgan.kernels._matrix import arch_of, check_activation, check_operands, input_precision, rows_of

# ---- kernels


@triton.jit
def _dots(hidden_ptr, last_ptr, rows, mask, stop, k, stride_hidden, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
          BLOCK_K: tl.constexpr):  # fmt: skip
    """<w, h_i> of some rows, over the first ``stop`` columns."""
    inner = tl.arange(0, BLOCK_K)
    products = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for start in range(0, stop, BLOCK_K):
        ks = start + inner
        last = tl.load(last_ptr + ks, mask=ks < k, other=0.0).to(ACC)
        hidden_at = hidden_ptr + rows[:, None] * stride_hidden + ks[None, :]
        hidden = tl.load(hidden_at, mask=mask[:, None] & (ks < k)[None, :], other=0.0).to(ACC)
        products += hidden * last[None, :]
    return tl.sum(products, 1)


@triton.jit
def _linear_head_kernel(
    hidden_ptr, last_ptr, bias_ptr, weight_ptr, mask_ptr, adjoint_ptr, out_ptr,
    logits_ptr, seeds_ptr, scales_ptr, loss_ptr, real_mean_ptr, fake_mean_ptr, loss_scale_ptr, partials_ptr,
    counter_ptr, n_rows, n_chain, n_seeded, n_unscaled, n_loss, real, fake, n, k,
    stride_hidden, stride_weight, stride_mask, stride_adjoint, stride_out,
    KIND: tl.constexpr, PLAYER: tl.constexpr, COMPARES: tl.constexpr, HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LOGITS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LOSS_SCALE: tl.constexpr,
    HAS_SEEDS: tl.constexpr, HAS_SCALES: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    MASK_ACTIVATION: tl.constexpr, MASK_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr, DEPENDENT: tl.constexpr = False, tile=None,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    first_row = place_of(tile, 0).to(tl.int64) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inner, writes = tl.arange(0, BLOCK_K), place_of(tile, 1) == 0
    seed = tl.full([BLOCK_M], 1.0, ACC)
    logit = tl.zeros([BLOCK_M], ACC)
    is_fake = (rows >= fake) & (rows < fake + n_loss)
    is_real = rows < 0
    if HAS_REAL:
        is_real = (rows >= real) & (rows < real + n_loss)
    value, slope = logit, logit
    if HAS_LOGITS:  # of rows that this program writes, or seeds with c
        stop = tl.where(writes | (first_row < n_seeded), k, 0)
        bias = tl.zeros([], ACC)
        if HAS_BIAS:
            bias = tl.load(bias_ptr).to(ACC)
        logit = _dots(hidden_ptr, last_ptr, rows, rows < n_rows, stop, k, stride_hidden, ACC, BLOCK_M, BLOCK_K) + bias
        if KIND != "none":
            paired = logit
            if COMPARES:
                partner = tl.where(is_real, rows - real + fake, rows - fake + real)
                has_partner = is_real | is_fake
                paired = _dots(
                    hidden_ptr, last_ptr, partner, has_partner, stop, k, stride_hidden, ACC, BLOCK_M, BLOCK_K
                )
                paired += bias
            value, slope = row_loss(logit, paired, is_real, KIND, PLAYER)
            slope /= n_loss
            if HAS_LOSS_SCALE:
                slope *= tl.load(loss_scale_ptr).to(ACC)
            has_slope = is_fake if PLAYER == "generator" else is_real | is_fake
            seed = tl.where(has_slope & (rows < n_seeded), slope, seed)

    # before the product, so that none of it stays in registers meanwhile
    if HAS_SEEDS:
        tl.store(seeds_ptr + rows, seed.to(seeds_ptr.dtype.element_ty), mask=(rows < n_chain) & writes)
    if HAS_LOGITS:
        tl.store(logits_ptr + rows, logit.to(logits_ptr.dtype.element_ty), mask=(rows < n_rows) & writes)
    if KIND != "none":  # noqa: SIM102
        if writes:
            zero = tl.zeros_like(logit)
            if HAS_SCALES:
                scaled = has_slope & (rows >= n_unscaled)
                tl.store(scales_ptr + rows, slope.to(scales_ptr.dtype.element_ty), mask=scaled)
            at = partials_ptr + place_of(tile, 0) * 3
            tl.store(at, tl.sum(tl.where(has_slope, value, zero)))
            tl.store(at + 1, tl.sum(tl.where(is_real, logit, zero)))
            tl.store(at + 2, tl.sum(tl.where(is_fake, logit, zero)))

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    cols = place_of(tile, 1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    for start in range(0, tl.where(first_row < n_chain, k, 0), BLOCK_K):
        ks = start + inner
        inside = (rows < n_chain)[:, None] & (ks < k)[None, :]
        last = tl.load(last_ptr + ks, mask=ks < k, other=0.0).to(ACC)
        hidden_at = hidden_ptr + rows[:, None] * stride_hidden + ks[None, :]
        hidden = tl.load(hidden_at, mask=inside, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_K]
        u = (seed[:, None] * last[None, :]) * derivative(hidden, ACTIVATION, SLOPE)
        u = tl.where(inside, u, tl.zeros_like(u)).to(adjoint_ptr.dtype.element_ty)  # a NaN stays in its row
        tl.store(adjoint_ptr + rows[:, None] * stride_adjoint + ks[None, :], u, mask=inside & writes)
        if HAS_WEIGHT:
            weight_at = weight_ptr + ks.to(tl.int64)[:, None] * stride_weight + cols[None, :]
            weight = tl.load(weight_at, mask=(ks < k)[:, None] & (cols < n)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(u.to(weight.dtype), weight, acc, input_precision=PRECISION, out_dtype=ACC)
    if DEPENDENT:
        gdc_launch_dependents()
    if HAS_WEIGHT:
        inside = (rows < n_chain)[:, None] & (cols < n)[None, :]
        if HAS_MASK:
            below = tl.load(mask_ptr + rows[:, None] * stride_mask + cols[None, :], mask=inside, other=0.0).to(ACC)
            acc *= derivative(below, MASK_ACTIVATION, MASK_SLOPE)
        tl.store(out_ptr + rows[:, None] * stride_out + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)

    if KIND != "none":  # noqa: SIM102
        if writes:
            n_programs = grid_size(tile, 0)
            if last_arrival(counter_ptr, n_programs):
                loss = tl.zeros([BLOCK_PROGRAMS], ACC)
                reals, fakes = loss, loss
                for start in range(0, n_programs, BLOCK_PROGRAMS):
                    programs = start + tl.arange(0, BLOCK_PROGRAMS)
                    sums, there = partials_ptr + programs * 3, programs < n_programs
                    loss += tl.load(sums, mask=there, other=0.0, cache_modifier=".cg")
                    reals += tl.load(sums + 1, mask=there, other=0.0, cache_modifier=".cg")
                    fakes += tl.load(sums + 2, mask=there, other=0.0, cache_modifier=".cg")
                tl.store(loss_ptr, (tl.sum(loss) / n_loss).to(loss_ptr.dtype.element_ty))
                if PLAYER == "discriminator":
                    tl.store(real_mean_ptr, (tl.sum(reals) / n_loss).to(real_mean_ptr.dtype.element_ty))
                    tl.store(fake_mean_ptr, (tl.sum(fakes) / n_loss).to(fake_mean_ptr.dtype.element_ty))
                tl.store(counter_ptr, 0)


# ---- launchers

_BLOCK_PROGRAMS = 64
_ALONE = configs.Config(16, 16, 64, 16, 2)  # without a product the tile has no second dimension; not tuned


@dataclass(frozen=True)
class Head:
    """The last layer of a critic and what its logits are for; "wide" is fp64 where the activations are, else fp32.

    Attributes:
        weight: ``[K]``, contiguous.
        bias: ``[1]`` or ``None``.
        activation: of the hidden layer before it, one of ``ACTIVATIONS``.
        slope: of LeakyReLU.
        chain: rows ``[0, chain)`` are differentiated.
        seeded: of these, rows ``[0, seeded)`` that have a loss begin with its derivative, all others with 1.
        kind: name of the loss, ``None`` for none.
        player: ``"discriminator"`` or ``"generator"``: whose loss it is.
        n: rows of each of the two batches.
        real: first of the real rows; ``None`` where a generator's loss does not compare with them.
        fake: first of the fake rows.
        logits: ``[R]`` wide, written; may be ``None`` without a loss.
        scales: ``[R]`` wide: c is written in rows that have a loss, the others are left alone. With ``seeds`` it may
            be ``None``, or shorter, and has c only in rows whose chain begins with 1.
        loss: 0-dim wide, written: the mean.
        real_mean: 0-dim wide, written for a discriminator: the mean logit.
        fake_mean: likewise.
        counter: one int32, 0 before and after.
        loss_scale: 0-dim wide factor of c, or ``None``.
        partials: wide workspace of ``3 * ceil(R / 16)`` elements; made where it is ``None``.
        seeds: ``[chain]``, written where given: what each row's chain begins with.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    activation: str = "leaky-relu"
    slope: float = 0.2
    chain: int = 0
    seeded: int = 0
    kind: str | None = None
    player: str = "discriminator"
    n: int = 0
    real: int | None = None
    fake: int = 0
    logits: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    real_mean: torch.Tensor | None = None
    fake_mean: torch.Tensor | None = None
    counter: torch.Tensor | None = None
    loss_scale: torch.Tensor | None = None
    partials: torch.Tensor | None = None
    seeds: torch.Tensor | None = None


def head_launch(
    hidden: torch.Tensor,
    head: Head,
    adjoint: torch.Tensor,
    weight: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    mask_activation: str = "identity",
    mask_slope: float = 0.0,
    precision: str = "ieee",
    tile: configs.Config | None = None,
) -> Launch:
    """The launch that ends a critic: see the formulas of this module.

    Args:
        hidden: ``[R, K]`` output of the last hidden layer; fp16, bf16, fp32 or fp64.
        head: the rest of it.
        adjoint: ``[chain, K]``, written: the derivative to the hidden layer before its activation. Must not overlap
            ``hidden``.
        weight: ``[K, N]`` of the hidden layer, for the next step of the chain; ``None`` without one.
        out: ``[chain, N]``, written where there is ``weight``.
        mask: ``[chain, N]`` output of the layer below, or ``None``. May be the same memory as ``out``.
        mask_activation, mask_slope: of the layer below.
        precision: of products of fp32 operands: ``"ieee"`` or ``"tf32"``.
        tile: instead of the one that :func:`fastgan.kernels.configs.config` gives.

    All matrices have contiguous rows; the distance between rows is free.

    Raises:
        ValueError: a shape, dtype or value is out of the ranges above.
    """
    op = "linear_head"
    rows_of(op, "hidden", hidden)
    n_rows, k = hidden.shape
    _check_head(op, hidden, head)
    rows_of(op, "adjoint", adjoint, (head.chain, k))
    check(adjoint.numel() == 0 or adjoint.data_ptr() != hidden.data_ptr(), op, "adjoint is the memory of hidden")
    n = 1
    if weight is not None:
        check_operands(op, adjoint, weight, precision)
        check(len(weight) == k, op, f"weight has shape {tuple(weight.shape)}, expected ({k}, N)")
        n = weight.shape[1]
        check(out is not None, op, "out is None, expected the place of the product with weight")
        assert out is not None
        rows_of(op, "out", out, (head.chain, n))
        check_activation(op, mask_activation, mask_slope)
        if mask is not None:
            rows_of(op, "mask", mask, (head.chain, n))
        tile = tile or configs.config(op, n_rows, n, k, weight.dtype, arch_of(hidden))
    else:
        tile = tile or _ALONE
    has_logits = head.kind is not None or head.logits is not None
    n_programs = triton.cdiv(n_rows if has_logits else head.chain, tile.block_m)
    partials = head.partials
    if partials is None:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        partials = torch.empty(3 * n_programs, dtype=wide, device=hidden.device)
    check(
        partials.numel() >= 3 * n_programs, op, f"partials has {partials.numel()} elements, expected {3 * n_programs}"
    )

    def at(t: torch.Tensor | None) -> torch.Tensor:
        """Something to point at where nothing is read or written."""
        return hidden if t is None else t

    dtype = hidden.dtype if weight is None else weight.dtype
    return Launch(
        _linear_head_kernel, (n_programs, triton.cdiv(n, tile.block_n)),
        {"hidden_ptr": hidden, "last_ptr": head.weight, "bias_ptr": at(head.bias), "weight_ptr": at(weight),
         "mask_ptr": at(mask), "adjoint_ptr": adjoint, "out_ptr": at(out), "logits_ptr": at(head.logits),
         "seeds_ptr": at(head.seeds), "scales_ptr": at(head.scales), "loss_ptr": at(head.loss),
         "real_mean_ptr": at(head.real_mean),
         "fake_mean_ptr": at(head.fake_mean), "loss_scale_ptr": at(head.loss_scale), "partials_ptr": partials,
         "counter_ptr": at(head.counter), "n_rows": n_rows, "n_chain": head.chain, "n_seeded": head.seeded,
         "n_unscaled": 0 if head.seeds is None else head.seeded, "n_loss": head.n,
         "real": head.real or 0, "fake": head.fake, "n": n, "k": k,
         "stride_hidden": hidden.stride(0), "stride_weight": 0 if weight is None else weight.stride(0),
         "stride_mask": 0 if mask is None else mask.stride(0), "stride_adjoint": adjoint.stride(0),
         "stride_out": 0 if out is None else out.stride(0), "KIND": head.kind or "none", "PLAYER": head.player,
         "COMPARES": head.kind == "relativistic", "HAS_REAL": head.real is not None, "HAS_BIAS": head.bias is not None,
         "HAS_LOGITS": has_logits, "HAS_WEIGHT": weight is not None, "HAS_MASK": mask is not None,
         "HAS_LOSS_SCALE": head.loss_scale is not None, "HAS_SEEDS": head.seeds is not None,
         "HAS_SCALES": head.scales is not None, "ACTIVATION": head.activation, "SLOPE": float(head.slope),
         "MASK_ACTIVATION": mask_activation, "MASK_SLOPE": float(mask_slope),
         "PRECISION": input_precision(dtype, precision), "ACC": accumulator(dtype), "BLOCK_M": tile.block_m,
         "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_PROGRAMS": _BLOCK_PROGRAMS},
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _check_head(op: str, hidden: torch.Tensor, head: Head) -> None:
    (n_rows, k), h = hidden.shape, head
    check(h.weight.shape == (k,), op, f"head.weight has shape {tuple(h.weight.shape)}, expected ({k},)")
    check(h.weight.is_contiguous(), op, "head.weight is not contiguous")
    check(h.bias is None or h.bias.numel() == 1, op, "head.bias has more than one element")
    check_activation(op, h.activation, h.slope)
    check(
        0 <= h.seeded <= h.chain <= n_rows, op,
        f"head.seeded is {h.seeded} and head.chain {h.chain}, expected 0 <= seeded <= chain <= {n_rows}",
    )  # fmt: skip
    lengths = {"logits": n_rows, "scales": n_rows, "seeds": h.chain}
    for name, vector in (("logits", h.logits), ("seeds", h.seeds), ("scales", h.scales)):
        if vector is None:
            continue
        long = (*vector.shape,) == (lengths[name],) or (name == "scales" and h.seeds is not None)
        check(long, op, f"head.{name} has shape {tuple(vector.shape)}, expected ({lengths[name]},)")
        check(vector.is_contiguous(), op, f"head.{name} is not contiguous")
    if h.kind is None:
        return
    check(h.kind in KINDS, op, f"head.kind is {h.kind!r}, expected one of {', '.join(KINDS)}")
    check(h.player in PLAYERS, op, f"head.player is {h.player!r}, expected one of {', '.join(PLAYERS)}")
    discriminator = h.player == "discriminator"
    names = [
        "logits",
        *(["scales"] if h.seeds is None else []),
        "loss",
        "counter",
        *(["real", "real_mean", "fake_mean"] if discriminator else []),
    ]
    for name in [*names, *(["real"] if h.kind == "relativistic" else [])]:
        check(getattr(h, name) is not None, op, f"head.{name} is None, which the {h.player}'s {h.kind} loss needs")
    check(h.counter is None or h.counter.dtype == torch.int32, op, "head.counter is not of dtype torch.int32")
    check(h.n > 0, op, f"head.n is {h.n}, expected > 0")
    for name, first in (("real", h.real), ("fake", h.fake)):
        inside = first is None or 0 <= first <= n_rows - h.n
        check(inside, op, f"head.{name} is {first}, expected rows [{first}, {first} + {h.n}) within {n_rows}")
    apart = h.real is None or abs(h.real - h.fake) >= h.n
    check(apart, op, f"head.real is {h.real} and head.fake {h.fake}: their {h.n} rows overlap")


def launches(dtype: torch.dtype) -> list[Launch]:
    """Every shipped config, and in fp32 every loss, for the compilation ahead of time."""
    hidden, weight, adjoint, out = (torch.empty(128, 64, dtype=dtype) for _ in range(4))
    weight = weight[:64]
    wide = torch.empty(128, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    zero, counter = wide[0], torch.zeros(1, dtype=torch.int32)

    def head(kind: str | None, player: str = "discriminator") -> Head:
        return Head(
            hidden[0], wide[:1], seeds=hidden.view(-1)[:128], chain=128, seeded=128,
            kind=kind, player=player, n=64, real=0, fake=64, logits=wide,
            scales=wide, loss=zero, real_mean=zero, fake_mean=zero, counter=counter, loss_scale=zero, partials=wide,
        )  # fmt: skip

    fused = [
        head_launch(hidden, head("relativistic"), adjoint, weight, out, out, mask_activation="leaky-relu",
                    mask_slope=0.2, precision="tf32", tile=tile)
        for tile in configs.shipped("linear_head", dtype)
    ]  # fmt: skip
    losses = KINDS if dtype == torch.float32 else KINDS[-1:]  # rows and losses are fp32 in lower precision too
    alone = [head_launch(hidden, head(kind, player), adjoint) for kind in losses for player in PLAYERS]
    if dtype == torch.float32:
        fused.append(head_launch(hidden, head("hinge"), adjoint, weight, out))
    return [*fused, *alone, head_launch(hidden, head(None), adjoint, weight, out, precision="tf32")]
