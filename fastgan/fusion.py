"""``fastgan.fuse``: a module's pairs of a layer and its activation, each as one layer of :mod:`fastgan.nn`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from fastgan.backend import Backend, checked
from fastgan.errors import InputError
from fastgan.nn import Conv2dLeakyReLU, ConvTranspose2dLeakyReLU, LinearAct

_LOG = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LinearAct,
    nn.Conv2d: Conv2dLeakyReLU,
    nn.ConvTranspose2d: ConvTranspose2dLeakyReLU,
}
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], tuple[str, float]]] = {
    nn.LeakyReLU: lambda m: ("leaky-relu", float(m.negative_slope)),
    nn.ReLU: lambda m: ("leaky-relu", 0.0),
    nn.Tanh: lambda m: ("tanh", 0.0),
    nn.Sigmoid: lambda m: ("sigmoid", 0.0),
}


def fuse(module: M, *, backend: Backend | None = None) -> M:
    """Put fused layers in a module in place of pairs of layers it knows; the module itself is changed and returned.

    Inside every ``nn.Sequential``, at any depth, ``Linear`` followed by ``LeakyReLU``, ``ReLU``, ``Tanh`` or
    ``Sigmoid`` becomes :class:`fastgan.nn.LinearAct`, and ``Conv2d`` or ``ConvTranspose2d`` with a bias, followed by
    ``LeakyReLU`` or ``ReLU``, becomes :class:`fastgan.nn.Conv2dLeakyReLU` or
    :class:`fastgan.nn.ConvTranspose2dLeakyReLU`. The fused layer takes the layer's place and ``nn.Identity`` the
    activation's, so that keys of state dicts, positions and training flags stay, and it holds the very same
    ``Parameter`` objects: optimisers, weight tying and hooks on parameters go on, and state dicts load both ways.

    The result has the same values, first and second derivatives (a gradient penalty needs those) as before: to the bit
    where PyTorch's ops run, as on a CPU, to rounding in kernels. It can be compiled with ``fullgraph=True``, copied,
    pickled, exported and read by :class:`fastgan.Engine` as before. Under ``torch.func.vmap`` use
    ``backend="reference"``.

    A pair is left as it is where fusing could be noticed: its modules are of a class of their own or carry hooks, a
    parametrization such as spectral norm, or a forward set on the instance; the layer is used in several places; the
    slope is negative. What was left and why is logged once, at level INFO by the logger ``fastgan.fusion``.

    One thing it cannot see: code that takes the output of a layer inside a ``Sequential`` by itself (a loop over its
    children that collects features) finds it after the activation.

    Args:
        module: any module; changed in place.
        backend: of the fused layers; see :func:`fastgan.backend.resolve`.

    Raises:
        InputError: ``module`` is no module, or the backend is unknown.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"fuse: module is a {type(module).__name__}, expected a torch.nn.Module")
    if backend is not None:
        checked(backend, "fuse")
    named = list(module.named_modules())
    uses = Counter(child for _, m in named for child in m._modules.values() if child is not None)
    known = [m for _, m in named if isinstance(m, tuple(_FUSED)) and not isinstance(m, tuple(_FUSED.values()))]
    reasons = dict.fromkeys(known, "is not in an nn.Sequential")
    fused: list[nn.Module] = []
    for _, sequential in named:
        if not _runs_in_order(sequential):
            continue
        children = list(sequential._modules.items())
        for (key, layer), (next_key, after) in zip(children, [*children[1:], ("", None)], strict=True):
            if layer is None or layer not in reasons:
                continue
            why = _obstacle(layer, after, uses[layer])
            if why is None:
                assert after is not None  # an obstacle otherwise
                sequential._modules[key] = _made(layer, after, backend)
                sequential._modules[next_key] = nn.Identity().train(after.training)
                fused.append(layer)
                del reasons[layer]
            else:
                reasons[layer] = why
    left = [f"{name or 'the module itself'} ({type(m).__name__}) {reasons[m]}" for name, m in named if m in reasons]
    _LOG.info("fuse: %d fused%s", len(fused), f", {len(left)} left: {'; '.join(left)}" if left else "")
    return module


def _runs_in_order(m: nn.Module) -> bool:
    return isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward and "forward" not in vars(m)


def _carries(m: nn.Module) -> str | None:
    """What a module has beside what its class does."""
    if any(hooks for name, hooks in vars(m).items() if name.endswith("_hooks")):
        return "hooks"
    if "forward" in vars(m) or vars(m).get("_compiled_call_impl") is not None:
        return "a forward of its own"
    return None


def _obstacle(layer: nn.Module, after: nn.Module | None, uses: int) -> str | None:
    """Why a layer and what follows it are not fused."""
    if parametrize.is_parametrized(layer):
        return "has a parametrization"
    if type(layer) not in _FUSED:
        return "is of a class of its own"
    if carried := _carries(layer):
        return f"has {carried}"
    if uses > 1:
        return f"is used in {uses} places"
    if after is None:
        return "has nothing after it"
    follower = f"is followed by {type(after).__name__}"
    if type(after) not in _ACTIVATIONS:
        return follower
    if carried := _carries(after):
        return f"{follower}, which has {carried}"
    activation, slope = _ACTIVATIONS[type(after)](after)
    if not slope >= 0:
        return f"{follower} of slope {slope:g}"
    if type(layer) is not nn.Linear:
        if activation != "leaky-relu":
            return f"{follower}, which only linear layers take in"
        if layer.bias is None:
            return "has no bias"
    return None


def _made(layer: nn.Module, after: nn.Module, backend: Backend | None) -> nn.Module:
    """The fused layer: all that the layer holds, and the activation."""
    cls = _FUSED[type(layer)]
    new = cls.__new__(cls)
    vars(new).update({k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(layer).items()})
    activation, slope = _ACTIVATIONS[type(after)](after)
    vars(new).update(slope=slope, backend=backend)
    if cls is LinearAct:
        vars(new).update(activation=activation)
    return new
