"""The adversarial losses row by row, for kernels; ``fastgan/losses.py`` has their formulas and sources."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.kernels._device import activate

KINDS = ("minimax", "non-saturating", "wasserstein", "hinge", "least-squares", "relativistic")
PLAYERS = ("discriminator", "generator")


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to rounding also where it is next to 0: log(1 + e) = 2 artanh(e / (2 + e)) as a series."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)  # at most 1/3
    q = s * s
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    series = tl.zeros_like(x)
    for i in tl.static_range(TERMS):
        series = series * q + 1.0 / (2 * (TERMS - i) - 1)
    return tl.where(x > 0, x, tl.where(x <= 0, tl.zeros_like(x), x)) + 2 * s * series  # NaN stays NaN


@triton.jit
def row_loss(logit, paired, is_real, KIND: tl.constexpr, PLAYER: tl.constexpr):
    """Each row's term of the loss, before the mean over pairs of rows, and its derivative to the row's logit.

    ``paired`` is the other logit of the pair, which only the relativistic loss reads; its terms are those of the fake
    rows. With a generator as PLAYER, real rows have no meaning.
    """
    one = tl.full(logit.shape, 1.0, logit.dtype)
    if PLAYER == "discriminator":
        sign = tl.where(is_real, -one, one)
        t = sign * logit
        if KIND == "wasserstein":
            value, slope = t, sign
        elif KIND == "hinge":
            value = tl.where(t <= -1, tl.zeros_like(t), 1 + t)
            slope = tl.where(t > -1, sign, tl.zeros_like(t))
        elif KIND == "least-squares":
            slope = tl.where(is_real, logit - 1, logit)
            value = slope * slope / 2
        elif KIND == "relativistic":
            t = sign * (logit - paired)
            value, slope = tl.where(is_real, tl.zeros_like(t), softplus(t)), sign * activate(t, "sigmoid", 0.0)
        else:
            value, slope = softplus(t), sign * activate(t, "sigmoid", 0.0)
    else:
        if KIND == "minimax":
            value, slope = -softplus(logit), -activate(logit, "sigmoid", 0.0)
        elif KIND == "non-saturating":
            value, slope = softplus(-logit), -activate(-logit, "sigmoid", 0.0)
        elif KIND == "least-squares":
            slope = logit - 1
            value = slope * slope / 2
        elif KIND == "relativistic":
            value, slope = softplus(paired - logit), -activate(paired - logit, "sigmoid", 0.0)
        else:
            value, slope = -logit, -one
    return value, slope
