"""Whole training iterations, fp32, on samples that lie on the device: ``fastgan.Engine`` in its two ways.

``autograd`` is the reference: PyTorch ops, one by one. ``closed form`` is what an engine does by itself: passes without
autograd, on a GPU by kernels and as a CUDA graph. ``fastgan bench`` has the comparison with other code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import fastgan
from bench.timer import DEVICE, after_warm_up, timed
from fastgan.benchmark.workloads import WORKLOADS

WAYS: dict[str, dict[str, Any]] = {
    "autograd": {"closed_form": False, "backend": "reference", "executor": "eager"},
    "closed form": {},
}


@timed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("workload", "batch"),
    [(name, n) for name in ("vanilla-mlp", "wgan-gp-mlp", "toy") for n in (64, 256)]
    + [("r1-conv", 16), ("r1-conv", 64)],
)
def test_iteration(benchmark, workload: str, batch: int, way: str) -> None:
    torch.manual_seed(0)
    engine = fastgan.Engine(**WORKLOADS[workload].arguments(), device=DEVICE, precision="fp32", **WAYS[way])
    images = engine.n_critic * batch
    real = torch.rand(images, *engine.sample_shape, device=DEVICE) * 2 - 1
    benchmark.group = f"{workload}, batch {batch}"
    benchmark.extra_info["images"] = images
    after_warm_up(benchmark, partial(engine.step, real))
