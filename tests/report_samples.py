"""Results like those of ``fastgan bench`` and ``fastgan profile``, made up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_CPU = {
    "device": "cpu", "device_name": "AMD EPYC 7763 64-Core Processor", "cpu": "AMD EPYC 7763 64-Core Processor",
    "cores": 2, "load_before": 0.14013671875, "torch_threads": 2, "system": "Linux-6.1.0-x86_64-with-glibc2.36",
    "python": "3.11.7", "torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.4.6", "fastgan": "0.1.0", "gpu": None,
}  # fmt: skip
_GPU = _CPU | {
    "device": "cuda:0", "device_name": "NVIDIA H100 80GB HBM3", "torch": "2.13.0+cu130",
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "multiprocessors": 132, "memory_gib": 79.2,
            "driver": "580.65.06", "power_limit_w": 700.0, "sm_clock_mhz": 1980, "ecc": True},
}  # fmt: skip

# variant: time over that of eager with little work and with much, launches
_SPEEDS = {
    "eager": (1.0, 1.0, 888), "eager again": (1.003, 0.998, 888), "eager + AMP": (1.35, 0.57, 1079),
    "compiled": (0.62, 0.84, None), "compiled + traced": (0.66, 0.83, None), "CUDA graph": (0.21, 0.93, 888),
    "fastgan reference": (0.93, 0.92, 651), "fastgan": (0.11, 0.68, 219),
}  # fmt: skip


def bench(
    workloads: Sequence[str] = ("wgan-gp-mlp",), batches: Sequence[int] = (64, 512), *, on_gpu: bool = False
) -> dict[str, Any]:  # fmt: skip
    """A result of ``fastgan bench``."""
    cases = [_case(name, i, batch, on_gpu) for i, name in enumerate(workloads) for batch in batches]
    return {
        "schema": "fastgan.bench/1",
        "created": "2026-05-04T09:31:12+00:00",
        "command": f"fastgan bench --workload {','.join(workloads)} --batch {','.join(map(str, batches))}",
        "conditions": (_GPU if on_gpu else _CPU) | {"timing": "variants in turn; at most 60 rounds; medians"},
        "ceilings": {"matrix_tflop_per_s": {"fp32": 0.125, "bf16": 0.61}, "copy_gb_per_s": 14.2},
        "results": cases,
    }


def _case(name: str, number: int, batch: int, on_gpu: bool) -> dict[str, Any]:
    penalised, n_critic = "gp" in name or "r1" in name, 5 if "wgan" in name else 1
    eager_us = (9e3 + 190 * batch) * n_critic * (1 + number) / (40 if on_gpu else 1)
    much = min(1.0, batch / 1024)
    variants: dict[str, Any] = {}
    for variant, (little, large, launches) in _SPEEDS.items():
        if variant == "CUDA graph" and not on_gpu:
            variants[variant] = _without_time("skipped", "CUDA graphs need a CUDA device")
            continue
        ratio = little + (large - little) * much
        us, gflop = eager_us * ratio, 4.1e-3 * batch * n_critic
        penalty = 0.31 if penalised else 0.0
        variants[variant] = {
            "status": "ok", "reason": None, "error": 1.3e-7, "error_limit": 4.1e-7, "median_us": us,
            "p20_us": us * 0.97, "p80_us": us * 1.06, "rounds": 60, "noise": 0.011, "iterations_per_second": 1e6 / us,
            "seconds_per_kimg": us / 1e3 / (n_critic * batch), "eager_over_this": 1 / ratio,
            "best_competitor_over_this": 0.62 / ratio, "penalty_overhead": 1.45 if penalised else None,
            "launches": launches, "gflop": gflop, "gb": 0.57 if launches else None, "tflop_per_s": gflop / us * 1e3,
            "gb_per_s": 0.57e6 / us if launches else None, "share_of_matrix_rate": gflop / us * 8e3,
            "share_of_bandwidth": 0.04e6 / us if launches else None, "peak_bytes": 24_000_000 + 31_000 * batch,
            "joule_per_kimg": 3.2 * ratio if on_gpu else None,
            "time_split_us": None if variant.endswith("again") else {
                "discriminator": us * (0.8 - penalty), "penalty": us * penalty, "generator": us * 0.2,
            },
        }  # fmt: skip
    return {
        "workload": name, "about": "a made-up pair of perceptrons on 28x28 pictures", "batch": batch,
        "precision": "fp32", "n_critic": n_critic, "images_per_iteration": n_critic * batch, "noise": 0.021,
        "best_competitor": "CUDA graph" if on_gpu else "compiled", "variants": variants,
    }  # fmt: skip


def _without_time(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "error": None, "error_limit": None}


def spoiled_bench() -> dict[str, Any]:
    """With variants that are wrong or failed, long and odd names, and figures that are missing."""
    result = bench(["my_project.experiments.very_long_module_name:workload_with_a_long_name", "toy"], [64])
    variants = result["results"][0]["variants"]
    variants["compiled"] = _without_time(
        "wrong", "Adam's first moments are 0.31 from those in fp64, where rounding explains 4.1e-07: a gradient differs"
    )
    variants["compiled + traced"] = _without_time("failed", "BackendCompilerFailed: <inductor> raised: & so on " * 6)
    variants["fastgan"] |= {"penalty_overhead": math.nan, "tflop_per_s": None, "time_split_us": None, "p80_us": None}
    variants["somebody's very long variant of the loop, $x_1$ with \N{GREEK SMALL LETTER LAMDA} = 10"] = variants[
        "eager"
    ]
    return result


_PHASES = {
    "your loop": (0.012, 0), "data": (0.41, 5), "copy": (0.021, 10), "noise": (0.035, 11), "fakes": (0.052, 30),
    "D forward": (0.082, 40), "chain": (0.071, 25), "penalty": (0.004, 5), "sweep": (0.066, 25),
    "weight gradient": (0.104, 45), "G forward": (0.018, 6), "G backward": (0.037, 9), "optimiser": (0.041, 6),
    "metrics": (0.006, 1), "host gap": (0.041, 0),
}  # fmt: skip


def profile(*, on_gpu: bool = False) -> dict[str, Any]:
    """A result of ``fastgan profile``."""
    us = 19_500.0
    phases = [
        {"phase": name, "us": share * us, "share": share, "calls": float(calls), "gflop": share if calls > 20 else None,
         "gb": share / 9 if calls else None}
        for name, (share, calls) in _PHASES.items()
    ]  # fmt: skip
    series = {
        "process_cpu_percent": [[t / 10, 150 + 40 * math.sin(t / 9)] for t in range(1, 120)],
        "resident_bytes": [[t / 10, 4.1e8 + 5e6 * min(t, 30)] for t in range(120)],
        "threads": [[t / 10, 7] for t in range(120)],
    }
    missing = []
    if on_gpu:
        names = ("gpu_percent", "dram_percent", "power_w", "sm_clock_mhz", "temperature_c", "gpu_memory_bytes")
        for i, name in enumerate(names):
            series[name] = [[t / 10, (60 + 9 * math.sin(t / (4 + i))) * 10**i] for t in range(400)]
        missing.append("SM activity: GPM is not supported by this GPU")
    timeline = [[t / 10, 4.1e8 + 5e6 * min(t, 30)] for t in range(120)]
    return {
        "schema": "fastgan.profile/1",
        "created": "2026-05-04T09:31:12+00:00",
        "command": "fastgan profile --recipe wgan-gp --html profile.html",
        "conditions": _GPU if on_gpu else _CPU,
        "run": {"what": "recipe wgan-gp", "batch": 64, "n_critic": 5, "precision": "fp32", "iterations": 716,
                "images_per_iteration": 320},
        "iteration": {"median_us": us, "p20_us": us * 0.95, "p80_us": us * 1.12, "iterations_per_second": 1e6 / us,
                      "seconds_per_kimg": us / 3.2e5},
        "phases": phases,
        "operators": [
            {"operator": name, "us": 3000 / (i + 1), "calls": 67.0 - i} for i, name in enumerate(
                ("fastgan::matrix_product", "fastgan::bias_act", "aten::addmv", "fastgan::outer_mask", "aten::cat"))
        ],
        "lines": [
            {"where": "train.py:21", "source": "batch = next(loader)", "us": 7600.0, "share": 0.39, "phase": "data"},
            {"where": "experiments/wgan/loop.py:118", "source": "print(f\"{i}: {loss.item():.3f} <&> {'x' * 60}\")",
             "us": 231.4, "share": 0.012, "phase": "your loop"},
        ],
        "synchronisations": [
            {"op": "aten::_local_scalar_dense", "where": "experiments/wgan/loop.py:118", "source": "loss.item()",
             "per_iteration": 1.0},
        ],
        "launches_per_iteration": 228.0,
        "memory": {
            "categories": [
                {"category": "parameters", "bytes": 1421312}, {"category": "gradients", "bytes": 1421312},
                {"category": "moments", "bytes": 2842624}, {"category": "activations of plans", "bytes": 2511108},
                {"category": "temporaries", "bytes": 1600},
            ],
            "peak_bytes": 560_000_000, "timeline": timeline,
        },
        "samples": {"interval_s": 0.1, "series": series, "missing": missing, "energy_j": 812.0 if on_gpu else None,
                    "energy_j_per_kimg": 3.5 if on_gpu else None},
        "profiler_cost": {"share": 0.018, "plain_us": 19_200.0, "profiled_us": 19_545.0},
        "findings": [
            {"title": "41% of the time training waits for data.", "us": 7995.0, "share": 0.41,
             "evidence": "8 ms of each iteration pass in the feed, most of it at train.py:21 `batch = next(loader)` "
                         "(7.6 ms).",
             "advice": "where the data fits on the device, give `dataset.feed(batch, device=engine.device)`; otherwise "
                       "let workers prepare batches (DataLoader's num_workers)."},
            {"title": "The batch of 64 is small: its work is bound by launches.", "us": 2100.0, "share": 0.108,
             "evidence": "228 calls per iteration take 41 us each, and one on a single number takes 9.2 us here.",
             "advice": "a larger batch takes little longer per update: `fastgan bench --batch` shows where that ends."},
            {"title": "Memory is nearly full: 93% of it.", "us": 0.0, "share": 0.0,
             "evidence": "The peak is 534 MiB of 574 MiB.", "advice": "a smaller batch takes less."},
        ],
    }  # fmt: skip
