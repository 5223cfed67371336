"""Ops that ``torch.compile`` and autograd know: kernels behind names in ``torch.ops.fastgan``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastgan", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Any:
    """Define an op and return it.

    Args:
        schema: name, arguments and results, as ``torch.library.define`` takes them; no result shares an input's memory.
        implementation: runs the kernels.
        fake: gives results of the same shapes, strides and dtypes without running anything.
        setup_context: ``(ctx, inputs, output)``, what ``backward`` needs; an output that is saved stays differentiable.
        backward: ``(ctx, *gradients)``, of differentiable ops only: a gradient penalty differentiates it again.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgan::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fastgan::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.fastgan, name)
