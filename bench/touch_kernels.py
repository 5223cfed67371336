"""Runs every op's kernels once on small samples, for a memory checker to watch.

compute-sanitizer python -m bench.touch_kernels
"""

from __future__ import annotations

import torch

from fastgan.kernels import SPECS


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for spec in SPECS:
        for dtype in spec.dtypes:
            for sample in spec.samples(device, dtype)[:3]:
                inputs = [
                    t.detach().requires_grad_(spec.order > 0)
                    if isinstance(t, torch.Tensor) and t.is_floating_point()
                    else t
                    for t in sample.inputs
                ]
                out = spec.op(*inputs, **sample.kwargs, backend="triton")
                outs = [t for t in (out if isinstance(out, tuple | list) else (out,)) if t.requires_grad]
                wrt = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
                if outs and wrt:
                    total = torch.stack([t.float().sum() for t in outs]).sum()
                    torch.autograd.grad(total, wrt, allow_unused=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"touched {spec.name} {str(dtype).removeprefix('torch.')}", flush=True)


if __name__ == "__main__":
    main()
