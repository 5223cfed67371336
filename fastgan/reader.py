"""Reads a module as a :class:`fastgan.network.Network`, or says why it cannot.

The module runs on an example while a recorder watches: calls of known ``torch.nn`` layers are taken whole, every other
torch function that touches a tensor has to be a known one, and every tensor has to come from the input through them.
What the recorder does not see (an extension's own op, an ``autograd.Function``) makes a tensor it does not know, so it
cannot be overlooked; ``torch.fx`` would lose the latter, ``no_grad`` and in-place additions without a word. A second
run with twice the rows shows what depends on their number. Branches are taken as for the example: what they ask of the
module's attributes must not change later, but for what :class:`Signature` watches.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.overrides import TorchFunctionMode

from fastgan.known import FACTS, FUNCTIONS, MODULES, Found, Unreadable, keeps_state, known, overridden, told
from fastgan.network import Activation, Layer, Network, Reshape

__all__ = ["Signature", "Unreadable", "read"]

_PLAIN = (bool, int, float, str, tuple, type(None), FunctionType, MethodType)
_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in _HOOKS]
_BESIDE = {"training", "in_features", "out_features", "inplace"}  # watched already, or no part of what is computed
_WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def read(module: nn.Module, example: Tensor, *, what: str, logits: bool = False) -> Network:
    """The module as a list of known layers, in its present mode.

    Args:
        module: called with one tensor; it is left as it is, buffers, mode and random state included.
        example: ``[n, ...]`` on the module's device, ``n`` a multiple of the packing.
        what: the module's name in reasons.
        logits: leave out a final sigmoid.

    Raises:
        Unreadable: the first reason that was met.
    """
    try:
        network = _record(module, example).network(logits)
        twice = _record(module, torch.cat([example, example])).network(logits)
    except Unreadable as e:
        raise Unreadable(f"{what}: {e}") from e.__cause__
    if _facts(network) != _facts(twice):
        raise Unreadable(f"{what}: what it computes depends on the number of rows")
    return network


def _facts(network: Network) -> list[Any]:
    layers = [(type(la), {k: v for k, v in vars(la).items() if k != "spectral"}) for la in network.layers]
    return [network.shape, network.packed, *layers]


def _record(module: nn.Module, example: Tensor) -> _Recorder:
    names = {m: name for name, m in module.named_modules()}
    for m, name in names.items():
        if why := _interferes(m):
            raise Unreadable(f"{_title(name, m)} {why}")
    if any(_GLOBAL_HOOKS):
        raise Unreadable("a hook on every module is registered")
    recorder = _Recorder(names, example)
    before = _host_random_state()
    with _untouched(names, example.device), torch.enable_grad(), torch.autocast(example.device.type, enabled=False):
        hooks = (
            register_module_forward_pre_hook(recorder.before),
            register_module_forward_hook(recorder.after, with_kwargs=True),
        )
        try:
            with recorder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = module(recorder.input)
        except Unreadable:
            raise
        except Exception as e:
            raise Unreadable(f"it cannot run on {list(example.shape)}: {(str(e) or repr(e)).splitlines()[0]}") from e
        finally:
            for hook in hooks:
                hook.remove()
                nn.modules.module._global_forward_hooks_with_kwargs.pop(hook.id, None)  # torch leaves it there
    if _host_random_state() != before:
        raise Unreadable("it draws random numbers of Python or numpy when it is called")
    if not isinstance(out, Tensor):
        raise Unreadable(f"it returns a {type(out).__name__}")
    recorder.output = recorder.number(out, "it", "returns")
    return recorder


@contextmanager
def _untouched(names: dict[nn.Module, str], device: torch.device) -> Iterator[None]:
    """Puts back buffers, attributes and random state; refuses a module that sets its attributes when it is called.

    Known layers may set theirs: the hook of the old spectral norm sets the normalised weight.
    """
    buffers = [(b, b.detach().clone()) for m in names for b in m.buffers(recurse=False)]
    holders: list[tuple[nn.Module, Any, Any]] = [(m, vars(m), vars(m).copy()) for m in names]
    holders += [(m, v, v.copy()) for m in names for v in vars(m).values() if isinstance(v, dict | list)]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
        changed = [m for m, now, before in holders if known(m) is None and not _same(now, before)]
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for _, now, before in holders:
            now.clear()
            now.extend(before) if isinstance(now, list) else now.update(before)
    if changed:
        raise Unreadable(f"{_title(names[changed[0]], changed[0])} changes its own attributes when it is called")


def _same(a: Any, b: Any) -> bool:
    """Whether two lists or two dicts hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(v is b[k] for k, v in a.items())
    return len(a) == len(b) and all(v is w for v, w in zip(a, b, strict=True))


def _title(name: str, module: nn.Module) -> str:
    cls = parametrize.type_before_parametrizations(module).__name__
    return f"layer {name!r} ({cls})" if name else f"the network itself ({cls})"


def _interferes(m: nn.Module) -> str | None:
    """What is between a module's call and its class's forward, if anything is."""
    kinds = {
        "forward": m._forward_hooks, "forward pre-": m._forward_pre_hooks,
        "backward": m._backward_hooks, "backward pre-": m._backward_pre_hooks,
    }  # fmt: skip
    for kind, hooks in kinds.items():
        if any(not (isinstance(hook, SpectralNormHook) and isinstance(m, _WEIGHTED)) for hook in hooks.values()):
            return f"has a {kind}{'hook' if kind[-1] == '-' else ' hook'}"
    if any(p is not None and p._backward_hooks for p in m._parameters.values()):
        return "has a parameter with a hook on its gradient"
    if vars(m).get("_compiled_call_impl") is not None:
        return "is compiled"
    return "has a forward of its own on the instance" if "forward" in vars(m) else None


def _host_random_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), *state[2:]


class _Recorder(TorchFunctionMode):
    """Makes layers of what it sees being called.

    Attributes:
        layers: so far, with values numbered as in :class:`Network`.
        tensors: every tensor that is a value, by id, with the value's number; with -1 where it may no longer be used.
    """

    def __init__(self, names: dict[nn.Module, str], example: Tensor) -> None:
        super().__init__()
        self.names = names
        self.input = example.detach().clone()
        self.rows, self.packed, self.shape = len(example), 1, tuple(example.shape[1:])
        self.layers: list[Layer] = []
        self.tensors = {id(self.input): (self.input, 0)}
        self.output = 0
        self.calls: list[nn.Module] = []
        self.leaf: nn.Module | None = None
        self.thread = threading.get_ident()

    # ---- what is called

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.leaf is not None or func in FACTS:
            return func(*args, **kwargs)
        path, where = self.names[self.calls[-1]], _title(self.names[self.calls[-1]], self.calls[-1])
        name = func.__name__
        if name == "__get__":  # of an attribute of Tensor
            name = getattr(getattr(func, "__self__", None), "__name__", "an attribute's getter")
        title = f"{where} calls {name}, which"
        if func not in FUNCTIONS:
            raise Unreadable(f"{title} is not known")
        found = told(title, FUNCTIONS[func], *args, **kwargs)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        numbers = [self.number(t, title, "reads") for t in inputs]
        out = func(*args, **kwargs)
        self.add(f"{path}.{name}" if path else name, title, found, inputs, numbers, out)
        return out

    def before(self, module: nn.Module, args: Any) -> None:
        """Runs before every module's forward."""
        if threading.get_ident() != self.thread or self.leaf is not None:
            return
        if module not in self.names:
            raise Unreadable(f"it calls a module ({type(module).__name__}) that is not registered in it")
        title = _title(self.names[module], module)
        base = known(module)
        if base is None and type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential):
            raise Unreadable(f"{title} is not known")
        self.calls.append(module)
        if base is not None:
            if own := overridden(parametrize.type_before_parametrizations(module), base):
                raise Unreadable(f"{title} has its own {own}")
            self.leaf = module

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Runs after every module's forward."""
        if threading.get_ident() != self.thread or self.leaf not in (None, module):
            return
        self.calls.pop()
        if self.leaf is None:
            return
        base, title = known(module), _title(self.names[module], module)
        inputs = [*args, *kwargs.values()]
        if base is None or len(inputs) != 1:
            raise Unreadable(f"{title} is called with {len(inputs)} arguments")
        found = told(title, MODULES[base], module, inputs[0])
        numbers = [self.number(inputs[0], title, "reads")]
        self.add(self.names[module], title, found, inputs, numbers, out)
        self.leaf = None

    # ---- what is made of it

    def number(self, tensor: Tensor, who: str, does: str) -> int:
        """The value that a tensor is."""
        number = self.tensors.get(id(tensor), (tensor, None))[1]
        if number is None:
            raise Unreadable(f"{who} {does} a tensor that is not computed from its input by known operations")
        if number < 0:
            raise Unreadable(f"{who} {does} a tensor that was packed or changed in place through another view of it")
        return number

    def add(self, name: str, title: str, found: Found, inputs: list[Tensor], numbers: list[int], out: Tensor) -> None:
        """Make the output a value: of new layers, or, where nothing was ``found`` to be done, of the first input."""
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(out.device.type):
            raise Unreadable(f"{title} runs under no_grad or autocast")
        if any(t.dtype != out.dtype or t.device != out.device for t in inputs):
            raise Unreadable(f"{title} makes {out.dtype} on {out.device} of {inputs[0].dtype} on {inputs[0].device}")
        rows, shape = out.shape[0] if out.ndim else 0, tuple(out.shape[1:])
        made = found if isinstance(found, list) else [] if found is None else [found]
        if made and made[0][0] is Reshape:
            if 0 < rows < self.rows and self.rows % rows == 0 and numbers == [0] and not self.layers:
                self.rows, self.packed, self.shape, made = rows, self.rows // rows, shape, []
                self.tensors = {key: (t, -1) for key, (t, _) in self.tensors.items()}
            elif out.shape == inputs[0].shape:
                made = []
        if rows != self.rows:
            raise Unreadable(f"{title} does not keep the rows: {list(inputs[0].shape)} become {list(out.shape)}")
        for cls, fields in made:
            if cls is not Reshape and any(out is t for t in inputs):
                self._changed_in_place(title, out)
            self.layers.append(cls(name=name, inputs=tuple(numbers), shape=shape, **fields))
            numbers = [len(self.layers)]
        self.tensors[id(out)] = out, numbers[0]

    def _changed_in_place(self, title: str, out: Tensor) -> None:
        """Tensors that share the memory of one that was changed are no longer the values that they were."""
        memory = out.untyped_storage().data_ptr()
        if memory == self.input.untyped_storage().data_ptr():
            raise Unreadable(f"{title} changes the network's input in place")
        for key, (other, _) in self.tensors.items():
            if other.untyped_storage().data_ptr() == memory:
                self.tensors[key] = other, -1

    def network(self, logits: bool) -> Network:
        """The layers that the output needs."""
        end, dropped = self.output, 0
        while logits and end and isinstance(self.layers[end - 1], Reshape):
            (end,) = self.layers[end - 1].inputs
        if logits and end and isinstance(last := self.layers[end - 1], Activation) and last.kind == "sigmoid":
            dropped = end
        needed = {self.output}
        for number in range(len(self.layers), 0, -1):
            if number in needed:
                needed.update(self.layers[number - 1].inputs)
        kept: list[Layer] = []
        renumbered = {0: 0}
        for number, layer in enumerate(self.layers, 1):
            inputs = tuple(renumbered.get(i, 0) for i in layer.inputs)
            if number == dropped:
                renumbered[number] = inputs[0]
            elif number in needed:
                layer.inputs = inputs
                kept.append(layer)
                renumbered[number] = len(kept)
            elif keeps_state(layer):
                raise Unreadable(f"layer {layer.name!r} has buffers that it changes, but its output is not used")
        if not kept:
            kept = [Reshape(name="", inputs=(0,), shape=self.shape)]
        return Network(kept, self.shape, self.packed, list(self.names))


class Signature:
    """Notices what a user may have changed in a network since it was read.

    Called, it gives a tuple that stays equal as long as these stay the same: training flags, numbers of hooks,
    submodules, every parameter's memory, requires_grad and hooks, every buffer's memory, plain attributes, such as a
    rate of dropout or a method that was replaced on the instance, and what lists and dicts among them hold.
    """

    def __init__(self, network: Network) -> None:
        self._modules = network.modules
        self._children = [m._modules for m in network.modules if m._modules]
        self._parameters = [m._parameters for m in network.modules if m._parameters]
        self._buffers = [m._buffers for m in network.modules if m._buffers]
        self._attributes = [vars(m) for m in network.modules]
        plain = [[k for k, v in a.items() if isinstance(v, _PLAIN) and k not in _BESIDE] for a in self._attributes]
        self._plain = [(a.get, keys) for a, keys in zip(self._attributes, plain, strict=True) if keys]
        public = [v for a in self._attributes for k, v in a.items() if k[:1] != "_"]
        self._lists = [v for v in public if isinstance(v, list)]
        self._dicts = [v for v in public if isinstance(v, dict)]
        self._hooks = list(_GLOBAL_HOOKS)
        self._hooks += [
            hooks
            for m in network.modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]

    def __call__(self) -> tuple[Any, ...]:
        parameters = [p for held in self._parameters for p in held.values() if p is not None]
        return (
            [m.training for m in self._modules],
            list(map(len, self._hooks)),
            [m for held in self._children for m in held.values()],
            [p.data_ptr() for p in parameters],
            [p.requires_grad and not p._backward_hooks for p in parameters],
            [b.data_ptr() for held in self._buffers for b in held.values() if b is not None],
            list(map(len, self._attributes)),
            [list(map(get, keys)) for get, keys in self._plain],
            [list(map(id, v)) for v in self._lists],
            [(list(v), list(map(id, v.values()))) for v in self._dicts],
        )
