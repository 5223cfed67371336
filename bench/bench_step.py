"""One iteration of the engine against the loop that people write, on a CPU, in fp32.

python -m bench.bench_step          interleaved, medians with p20 and p80; writes bench/results/cpu/step.json

Both train the same networks from the same start. The loop is what tutorials and the widely copied scripts do: torch's
default Adam, ``zero_grad`` and ``backward``, the discriminator's gradients computed in the generator's step and thrown
away; its fakes are detached. The engine draws its
latents from its own counter-based streams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fastgan
from bench.conditions import conditions, interleaved, write
from fastgan.penalties import R1, R2, GradientPenalty

ROUNDS = 60


def vanilla() -> tuple[nn.Module, nn.Module, int, tuple[int, ...]]:
    g = nn.Sequential(
        nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784), nn.Tanh()
    )  # fmt: skip
    d = nn.Sequential(
        nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)
    )  # fmt: skip
    return g, d, 100, (784,)


def toy() -> tuple[nn.Module, nn.Module, int, tuple[int, ...]]:
    g = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    d = nn.Sequential(nn.Linear(2, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    return g, d, 2, (2,)


def slope(d: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    return g.flatten(1)


def loop(kind: str, g: nn.Module, d: nn.Module, latent: int, real: torch.Tensor) -> Callable[[], None]:
    """One iteration as people write it."""
    g_opt = torch.optim.Adam(g.parameters(), 1e-4, (0.5, 0.9))
    d_opt = torch.optim.Adam(d.parameters(), 1e-4, (0.5, 0.9))
    n = len(real)

    def step() -> None:
        fake = g(torch.randn(n, latent)).detach()
        d_opt.zero_grad()
        r, f = d(real), d(fake)
        if kind == "wgan-gp":
            alpha = torch.rand(n, *[1] * (real.ndim - 1))
            loss = (
                f.mean() - r.mean() + 10 * ((slope(d, alpha * real + (1 - alpha) * fake).norm(dim=1) - 1) ** 2).mean()
            )
        elif kind == "r1+r2":
            loss = F.softplus(f - r).mean() + 0.5 * (slope(d, real) ** 2).sum(1).mean()
            loss = loss + 0.5 * (slope(d, fake) ** 2).sum(1).mean()
        else:
            bce = F.binary_cross_entropy_with_logits
            loss = bce(r, torch.ones_like(r)) + bce(f, torch.zeros_like(f))
        loss.backward()
        d_opt.step()
        g_opt.zero_grad()
        f = d(g(torch.randn(n, latent)))
        if kind == "wgan-gp":
            loss = -f.mean()
        elif kind == "r1+r2":
            loss = F.softplus(d(real).detach() - f).mean()
        else:
            loss = F.binary_cross_entropy_with_logits(f, torch.ones_like(f))
        loss.backward()
        g_opt.step()

    return step


KINDS: dict[str, tuple[str, tuple[fastgan.penalties.Penalty, ...]]] = {
    "vanilla": ("non-saturating", ()),
    "wgan-gp": ("wasserstein", (GradientPenalty(10.0),)),
    "r1+r2": ("relativistic", (R1(1.0), R2(1.0))),
}


def variants(networks: Callable, kind: str, batch: int) -> dict[str, Callable[[], object]]:
    """The loop and the engine, each on networks of its own with the same weights."""
    torch.manual_seed(0)
    loss, penalties = KINDS[kind]
    runs: dict[str, Callable[[], object]] = {}
    for name in ("loop", "loop again", "engine"):
        torch.manual_seed(1)
        g, d, latent, shape = networks()
        real = torch.rand(batch, *shape) * 2 - 1
        if name != "engine":
            runs[name] = loop(kind, g, d, latent, real)
            continue
        adam = fastgan.Adam(1e-4, (0.5, 0.9))
        engine = fastgan.Engine(
            g, d, latent, loss, penalties, g_optimizer=adam, d_optimizer=adam, ema=None, device="cpu"
        )  # fmt: skip
        runs[name] = partial(engine.step, real)
    return runs


WORKLOADS = [
    ("vanilla 784", vanilla, "vanilla", 64),
    ("vanilla 784", vanilla, "vanilla", 512),
    ("wgan-gp 784", vanilla, "wgan-gp", 64),
    ("wgan-gp 784", vanilla, "wgan-gp", 512),
    ("toy r1+r2", toy, "r1+r2", 256),
]


def main() -> None:
    said = conditions(timing=f"{ROUNDS} rounds, variants interleaved; one discriminator and one generator update")
    results = {}
    for name, networks, kind, batch in WORKLOADS:
        table = interleaved(variants(networks, kind, batch), ROUNDS)
        ratio = table["loop"]["median_ms"] / table["engine"]["median_ms"]
        noise = table["loop again"]["median_ms"] / table["loop"]["median_ms"]
        results[f"{name}, batch {batch}"] = {"variants": table, "loop_over_engine": ratio, "loop_over_loop": noise}
        print(f"{name}, batch {batch}: " + ", ".join(f"{k} {v['median_ms']:.2f} ms" for k, v in table.items()))
        print(f"  loop / engine {ratio:.2f} (the loop against itself: {noise:.2f})", flush=True)
    print(f"written to {write('step', {'conditions': said, 'workloads': results})}")


if __name__ == "__main__":
    main()
