"""The engine against the same updates in eager PyTorch and in the best form of torch.compile, on a CPU, in fp32.

python -m bench.bench_closed_form [--rounds N] [--only NAME]     interleaved, medians with p20 and p80

It writes bench/results/cpu/closed_form.json; with ``--only``, one workload of it. All variants train the same networks
from the same start on the same real rows. Eager is what people write: torch's default Adam, ``zero_grad`` and
``backward``, the discriminator's gradients computed in the generator's update and thrown away; its fakes are detached,
and R1 and R2 share the loss's forward pass. A compiled form is one full graph from latents to gradients, the generator
in it, with fused Adam outside: ``torch.func.grad`` twice, or ``torch.autograd.grad`` twice under
``trace_autograd_ops`` (plain ``create_graph=True`` is refused by the compiler). The fastest of them is the one the
engine is compared with.

Before anything is timed, one update of each from given noise is held to fp64; a variant that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fastgan
from bench.conditions import RESULTS, conditions, interleaved, write
from fastgan.penalties import R1, R2, GradientPenalty
from fastgan.validate import margin

Critic = Callable[[torch.Tensor], torch.Tensor]
Networks = tuple[nn.Module, nn.Module, int, tuple[int, ...]]  # generator, discriminator, latent, shape of a sample
Slope = Callable[[Critic, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # logits and their gradient per row
LR, MARGIN, CLOSE = 1e-3, 1e-6, 1e-5


def vanilla() -> Networks:
    g = nn.Sequential(
        nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784), nn.Tanh()
    )  # fmt: skip
    d = nn.Sequential(
        nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)
    )  # fmt: skip
    return g, d, 100, (784,)


def toy() -> Networks:
    g = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    d = nn.Sequential(nn.Linear(2, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    return g, d, 2, (2,)


def convolutions() -> Networks:
    g = nn.Sequential(
        nn.Linear(64, 32 * 64), nn.ReLU(), nn.Unflatten(1, (32, 8, 8)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    d = nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 128, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(256, 1, 4), nn.Flatten(),
    )  # fmt: skip
    return g, d, 64, (3, 32, 32)


@dataclass(frozen=True)
class Kind:
    """A loss with penalties: the discriminator's and the generator's loss, and the products they cost.

    ``autograd`` and ``closed`` count a discriminator update in passes of the batch through all layers and in passes
    through the first one. ``weight`` is the penalties' weight or gamma, 0 for none.
    """

    loss: str
    betas: tuple[float, float]
    autograd: tuple[int, int]
    closed: tuple[int, int]

    def penalties(self, weight: float) -> tuple[fastgan.penalties.Penalty, ...]:
        if not weight:
            return ()
        if self.loss == "wasserstein":
            return (GradientPenalty(weight),)
        return (R1(weight), R2(weight)) if self.loss == "relativistic" else (R1(weight),)

    def d_loss(
        self, critic: Critic, slope: Slope, real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor,
        weight: float, stack: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Loss of one discriminator update; with ``stack`` real and fake rows go through the critic in one call."""
        if self.loss == "wasserstein" and weight:
            alpha = alpha.view(-1, *[1] * (real.ndim - 1))
            r, f = critic(torch.cat([real, fake])).chunk(2) if stack else (critic(real), critic(fake))
            _, s = slope(critic, alpha * real + (1 - alpha) * fake)
            return f.mean() - r.mean() + weight * ((s.flatten(1).norm(dim=1) - 1) ** 2).mean()
        if self.loss == "relativistic":
            if stack:
                both, slopes = slope(critic, torch.cat([real, fake]))
                (r, f), (s, t) = both.chunk(2), slopes.chunk(2)
            else:
                (r, s), (f, t) = slope(critic, real), slope(critic, fake)
            squares = (s**2).flatten(1).sum(1).mean() + (t**2).flatten(1).sum(1).mean()
            return F.softplus(f - r).mean() + weight / 2 * squares
        if not weight:
            r, f = critic(torch.cat([real, fake])).chunk(2) if stack else (critic(real), critic(fake))
            return f.mean() - r.mean() if self.loss == "wasserstein" else F.softplus(-r).mean() + F.softplus(f).mean()
        (r, s), f = slope(critic, real), critic(fake)
        return F.softplus(-r).mean() + F.softplus(f).mean() + weight / 2 * (s**2).flatten(1).sum(1).mean()

    def g_loss(self, critic: Critic, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        f = critic(fake)
        if self.loss == "relativistic":
            return F.softplus(critic(real).detach() - f).mean()
        return F.softplus(-f).mean() if self.loss == "non-saturating" else -f.mean()


WGAN_GP = Kind("wasserstein", (0.0, 0.9), autograd=(12, -2), closed=(10, -3))
R1_R2 = Kind("relativistic", (0.0, 0.99), autograd=(12, 0), closed=(8, 0))
PLAIN = Kind("non-saturating", (0.5, 0.999), autograd=(6, -2), closed=(6, -2))
R1_ONLY = Kind("non-saturating", (0.0, 0.99), autograd=(9, -1), closed=(7, -1))


@dataclass(frozen=True)
class Work:
    """What is timed: a discriminator update with its fakes, or (``whole``) one and a generator update."""

    networks: Callable[[], Networks]
    kind: Kind
    weight: float
    batch: int
    whole: bool = False
    over_eager: float | None = None  # targets
    over_compiled: float | None = None


WORKLOADS = {
    "wgan-gp-64": Work(vanilla, WGAN_GP, 10.0, 64, over_eager=2.7, over_compiled=1.7),
    "wgan-gp-512": Work(vanilla, WGAN_GP, 10.0, 512, over_eager=1.4, over_compiled=1.15),
    "wgan-gp-64-iteration": Work(vanilla, WGAN_GP, 10.0, 64, whole=True),
    "wgan-gp-512-iteration": Work(vanilla, WGAN_GP, 10.0, 512, whole=True),
    "vanilla-64-iteration": Work(vanilla, PLAIN, 0.0, 64, whole=True),
    "vanilla-512-iteration": Work(vanilla, PLAIN, 0.0, 512, whole=True),
    "toy-r1-r2": Work(toy, R1_R2, 0.1, 256, whole=True, over_eager=4.0),  # as recipe gaussians25 has it
    "toy-wgan-gp": Work(toy, WGAN_GP, 0.1, 256, whole=True, over_eager=4.0),  # as recipe gaussians25-wgan-gp has it
    "conv-r1": Work(convolutions, R1_ONLY, 10.0, 64, over_eager=1.2),
}


# ---- the variants


@dataclass
class Variant:
    """One way of doing an update, on networks of its own; noise is drawn where none is given."""

    g: nn.Module
    d: nn.Module
    d_update: Callable[..., None]  # (z, alpha)
    g_update: Callable[..., None]  # (z)
    run: Callable[[], None]  # what is timed
    moments: Callable[[str], list[torch.Tensor]]  # Adam's first, of "g" or "d"


def slope(critic: Critic, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_(True)
    y = critic(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y, g


def slope_by_func(critic: Critic, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def total(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = critic(x)
        return y.sum(), y

    g, y = torch.func.grad(total, has_aux=True)(x)
    return y, g


def latents_and_weights(
    work: Work, latent: int, z: torch.Tensor | None, alpha: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(work.batch, latent) if z is None else z
    return z, torch.rand(work.batch) if alpha is None else alpha


def with_adam(work: Work, g: nn.Module, d: nn.Module, fused: bool, make: Callable[..., Any]) -> Variant:
    """A variant of two updates ``make(g_optimizer, d_optimizer)`` whose state torch.optim.Adam holds."""
    optimizers = {
        name: torch.optim.Adam(net.parameters(), LR, work.kind.betas, fused=fused or None)
        for name, net in (("g", g), ("d", d))
    }
    d_update, g_update = make(optimizers["g"], optimizers["d"])

    def run() -> None:
        d_update()
        if work.whole:
            g_update()

    def moments(player: str) -> list[torch.Tensor]:
        return [optimizers[player].state[p]["exp_avg"] for p in optimizers[player].param_groups[0]["params"]]

    return Variant(g, d, d_update, g_update, run, moments)


def eager(work: Work, real: torch.Tensor, g: nn.Module, d: nn.Module, latent: int) -> Variant:
    def make(g_opt: torch.optim.Optimizer, d_opt: torch.optim.Optimizer) -> Any:
        def d_update(z: torch.Tensor | None = None, alpha: torch.Tensor | None = None) -> None:
            z, alpha = latents_and_weights(work, latent, z, alpha)
            fake = g(z).detach()
            d_opt.zero_grad()
            work.kind.d_loss(d, slope, real, fake, alpha, work.weight).backward()
            d_opt.step()

        def g_update(z: torch.Tensor | None = None) -> None:
            z = torch.randn(work.batch, latent) if z is None else z
            g_opt.zero_grad()
            work.kind.g_loss(d, real, g(z)).backward()
            g_opt.step()

        return d_update, g_update

    return with_adam(work, g, d, False, make)


def compiled(
    work: Work, real: torch.Tensor, g: nn.Module, d: nn.Module, latent: int, *, func: bool = False,
    stack: bool = False, **options: Any,
) -> Variant:  # fmt: skip
    """One full graph from noise to gradients for each player, fused Adam outside."""
    g_params = {n: p.detach() for n, p in g.named_parameters()}  # the same memory
    d_params = {n: p.detach() for n, p in d.named_parameters()}
    kind, weight = work.kind, work.weight

    def d_grads(z: torch.Tensor, alpha: torch.Tensor) -> Iterable[torch.Tensor]:
        if not func:
            with torch.no_grad():
                fake = g(z)
            return torch.autograd.grad(kind.d_loss(d, slope, real, fake, alpha, weight, stack), list(d.parameters()))
        fake = functional_call(g, g_params, (z,))

        def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
            critic = lambda x: functional_call(d, params, (x,))  # noqa: E731
            return kind.d_loss(critic, slope_by_func, real, fake, alpha, weight, stack)

        return torch.func.grad(loss)(d_params).values()

    def g_grads(z: torch.Tensor) -> Iterable[torch.Tensor]:
        if not func:
            return torch.autograd.grad(kind.g_loss(d, real, g(z)), list(g.parameters()))
        critic = lambda x: functional_call(d, d_params, (x,))  # noqa: E731
        loss = lambda params: kind.g_loss(critic, real, functional_call(g, params, (z,)))  # noqa: E731
        return torch.func.grad(loss)(g_params).values()

    d_grads, g_grads = (
        torch.compile(f, fullgraph=True, dynamic=False, isolate_recompiles=True, **options) for f in (d_grads, g_grads)
    )

    def make(g_opt: torch.optim.Optimizer, d_opt: torch.optim.Optimizer) -> Any:
        def step(optimizer: torch.optim.Optimizer, net: nn.Module, grads: Iterable[torch.Tensor]) -> None:
            for p, grad in zip(net.parameters(), grads, strict=True):
                p.grad = grad if grad.stride() == p.stride() else grad.contiguous()
            optimizer.step()

        def d_update(z: torch.Tensor | None = None, alpha: torch.Tensor | None = None) -> None:
            with torch.set_grad_enabled(not func):
                step(d_opt, d, d_grads(*latents_and_weights(work, latent, z, alpha)))

        def g_update(z: torch.Tensor | None = None) -> None:
            with torch.set_grad_enabled(not func):
                step(g_opt, g, g_grads(torch.randn(work.batch, latent) if z is None else z))

        return d_update, g_update

    return with_adam(work, g, d, True, make)


def engine(
    work: Work, real: torch.Tensor, g: nn.Module, d: nn.Module, latent: int, *, closed_form: bool = True
) -> Variant:
    adam = fastgan.Adam(LR, work.kind.betas)
    e = fastgan.Engine(
        g, d, latent, work.kind.loss, work.kind.penalties(work.weight), g_optimizer=adam, d_optimizer=adam, ema=None,
        precision="fp32", device="cpu", closed_form=closed_form,
    )  # fmt: skip

    def moments(player: str) -> list[torch.Tensor]:
        return [state["exp_avg"] for state in e.state_dict()[f"{player}_optimizer"]["state"].values()]

    return Variant(
        g,
        d,
        lambda z, alpha: e.d_step(real, z=z, alpha=alpha),
        lambda z: e.g_step(z=z, real=real if e.loss.compares else None),
        partial(e.step if work.whole else e.d_step, real),
        moments,
    )


FORMS: dict[str, dict[str, Any]] = {
    "compiled: func.grad": {"func": True},
    "compiled: func.grad, max-autotune": {"func": True, "mode": "max-autotune-no-cudagraphs"},
    "compiled: traced autograd.grad": {},
    "compiled: traced, rows stacked": {"stack": True},
    "compiled: traced, C++ wrapper": {"options": {"cpp_wrapper": True}},
    "compiled: traced, stacked, C++ wrapper": {"stack": True, "options": {"cpp_wrapper": True}},
}
VARIANTS: dict[str, Callable[..., Variant]] = {
    "eager": eager,
    "eager again": eager,
    **{name: partial(compiled, **form) for name, form in FORMS.items()},
    "engine, autograd": partial(engine, closed_form=False),
    "engine": engine,
}


# ---- is it right?


def given(work: Work, g: nn.Module, d: nn.Module, latent: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Real rows, latents, interpolation weights and the generator update's latents, all off the kinks."""
    g, d = copy.deepcopy(g).double(), copy.deepcopy(d).double()
    n = work.batch
    real, z, alpha, z_g = torch.zeros(n, *shape), torch.zeros(n, latent), torch.zeros(n), torch.zeros(n, latent)
    rows = torch.arange(n)
    while len(rows):
        real[rows], z[rows] = torch.rand(len(rows), *shape) * 2 - 1, torch.randn(len(rows), latent)
        alpha[rows], z_g[rows] = torch.rand(len(rows)), torch.randn(len(rows), latent)
        with torch.no_grad():
            x, fake, fake_g = real.double(), g(z.double()), g(z_g.double())
        a = alpha.double().view(-1, *[1] * len(shape))
        points = (x, fake, a * x + (1 - a) * fake, fake_g)
        far = torch.stack([margin(d, point) for point in points] + [margin(g, z_g.double())]).amin(0)
        rows = (far < MARGIN).nonzero().flatten()
    return real, z, alpha, z_g


def error(work: Work, variant: Variant, noise: tuple[torch.Tensor, ...]) -> float:
    """The larger of the errors of both players' gradients, read off Adam's first moment after its first step.

    Relative, in the norm over all parameters, against fp64. The parameters must be what Adam makes of that gradient.
    """
    real, z, alpha, z_g = noise
    g, d = copy.deepcopy(variant.g).double(), copy.deepcopy(variant.d).double()
    start = [p.clone() for p in variant.d.parameters()]
    variant.d_update(z, alpha)
    fake = g(z.double()).detach()
    loss = work.kind.d_loss(d, slope, real.double(), fake, alpha.double(), work.weight)
    worst = distance(work, loss, variant.d, d, variant.moments("d"))
    if work.whole:
        with torch.no_grad():  # the generator's update is held to fp64 at the start too
            for p, old in zip(variant.d.parameters(), start, strict=True):
                p.copy_(old)
        variant.g_update(z_g)
        loss = work.kind.g_loss(d, real.double(), g(z_g.double()))
        worst = max(worst, distance(work, loss, variant.g, g, variant.moments("g")))
    return worst


def distance(work: Work, loss: torch.Tensor, net: nn.Module, before: nn.Module, moments: list[torch.Tensor]) -> float:
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(before.parameters()))])
    got = torch.cat([m.flatten() for m in moments]).double() / (1 - work.kind.betas[0])
    now, was = (torch.cat([p.detach().double().flatten() for p in n.parameters()]) for n in (net, before))
    moved = was - LR * got / (got.abs() + 1e-8)  # Adam's first step
    step = (now - moved).norm() / (moved - was).norm()
    return max(float((got - exact).norm() / exact.norm()), float(step) if step > 1e-3 else 0.0)


# ---- how fast is it?


def multiply_adds(net: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Per row of the input: in all layers, and in the first."""
    counts: list[float] = []

    def count(m: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        positions = args[0] if isinstance(m, nn.ConvTranspose2d) else out
        counts.append(positions[0].numel() * m.weight[0].numel())

    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return sum(counts), counts[0]


def gflop(work: Work) -> dict[str, float]:
    """Per update, through autograd and in closed form; with ``whole`` the generator's update is in both."""
    g, d, latent, shape = work.networks()
    (d_all, d_first), (g_all, g_first) = (
        multiply_adds(net, torch.zeros(1, *size)) for net, size in ((d, shape), (g, (latent,)))
    )
    out = {}
    for name, (passes, first) in {"autograd": work.kind.autograd, "closed form": work.kind.closed}.items():
        total = passes * d_all + first * d_first + g_all
        if work.whole:  # forward and back through both, once more forward where real logits are needed
            total += 3 * g_all - g_first + (2 + (work.kind.loss == "relativistic")) * d_all
            total += d_all if name == "autograd" else 0  # the discriminator's gradients, thrown away
        out[name] = 2 * total * work.batch / 1e9
    return out


def matrix_rate() -> dict[str, float]:
    """GFLOP/s of square fp32 products by size, medians of ten."""
    rates = {}
    for n in (512, 1024, 2048, 3072):
        a, b, c = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            torch.mm(a, b, out=c)
            times.append(time.perf_counter() - begin)
        rates[str(n)] = 2 * n**3 / statistics.median(times[2:]) / 1e9
    return rates


def measure(name: str, rounds: int, peak: float) -> dict[str, Any]:
    work = WORKLOADS[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    g, d, latent, shape = work.networks()
    noise = given(work, g, d, latent, shape)
    cost = gflop(work)
    table: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for label, make in VARIANTS.items():
        if work.kind is R1_ONLY and FORMS.get(label, {}).get("stack"):
            continue  # one penalty has no second place to stack
        try:
            variant = make(work, noise[0], copy.deepcopy(g), copy.deepcopy(d), latent)
            table[label] = {"error": (off := error(work, variant, noise))}
        except Exception as e:  # a form that the compiler refuses is part of the result
            if label not in FORMS:
                raise
            table[label] = {"refused": f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"}
            continue
        if off <= CLOSE:
            runs[label] = variant.run
        else:
            table[label]["wrong"] = True
    for label, times in interleaved(runs, rounds).items():
        count = cost["closed form" if label == "engine" else "autograd"]
        rate = count / times["median_ms"] * 1e3
        table[label] |= times | {"gflop": count, "gflop_per_s": rate, "share_of_matrix_rate": rate / peak}
    forms = {label: table[label]["median_ms"] for label in FORMS if label in runs}
    best = min(forms, key=lambda label: forms[label]) if forms else None
    for label in runs:
        for other, key in (("eager", "eager_over_this"), (best, "compiled_over_this")):
            if other in runs:
                table[label][key] = table[other]["median_ms"] / table[label]["median_ms"]
    result = {
        "batch": work.batch,
        "update": "iteration" if work.whole else "discriminator update",
        "gflop": cost,
        "best_compiled": best,
        "noise": table["eager again"].get("eager_over_this"),
        "targets": {"eager_over_engine": work.over_eager, "compiled_over_engine": work.over_compiled},
        "variants": table,
    }
    show(name, work, result)
    return result


def show(name: str, work: Work, result: dict[str, Any]) -> None:
    print(f"\n{name}: one {result['update']}, batch {work.batch}; eager against itself {result['noise'] or 0:.2f}")
    print(f"  {'':38} {'median':>8}   {'p20 … p80':17} eager/x comp./x  GFLOP GFLOP/s  share    error")
    for label, row in result["variants"].items():
        if "median_ms" not in row:
            why = row.get("refused") or f"WRONG: relative error {row['error']:.1e}, not timed"
            print(f"  {label:38} {why[:80]}")
            continue
        compared = row.get("compiled_over_this")
        print(
            f"  {label:38} {row['median_ms']:8.3f} ms {row['p20_ms']:7.3f} … {row['p80_ms']:<7.3f}"
            f" {row.get('eager_over_this', 0):6.2f}  {'' if compared is None else f'{compared:.2f}':>6}"
            f" {row['gflop']:6.3f} {row['gflop_per_s']:7.0f} {row['share_of_matrix_rate']:6.0%}  {row['error']:.1e}"
        )
    for key, target in (("eager", work.over_eager), ("compiled", work.over_compiled)):
        got = result["variants"]["engine"].get(f"{key}_over_this")
        if target is not None and got is not None:
            verdict = "reached" if got >= target else "missed"
            print(f"  {key} / engine {got:.2f}, target {target:g}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", choices=WORKLOADS, help="measure this one again; the file keeps the others")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch._dynamo.config.trace_autograd_ops = True
    said = conditions(timing=f"{args.rounds} rounds, variants interleaved", lr=LR)
    rates = matrix_rate()
    peak = max(rates.values())
    print(f"fp32 products: {', '.join(f'{n}: {rate:.0f}' for n, rate in rates.items())} GFLOP/s")
    out = RESULTS / "cpu" / "closed_form.json"
    kept = json.loads(out.read_text())["workloads"] if args.only and out.exists() else {}
    under = {"conditions": said, "matrix_gflop_per_s": rates}  # a later run may measure one workload again
    for name in [args.only] if args.only else WORKLOADS:
        kept[name] = {**under, **measure(name, args.rounds, peak)}
    print(f"written to {write('closed_form', {'workloads': kept})}")


if __name__ == "__main__":
    main()
