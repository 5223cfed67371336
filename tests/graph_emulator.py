"""What a CUDA graph would do to a step, on any machine: record it once, replay it with frozen numbers and addresses.

The tape holds torch's ops, custom ones and random ones included, and the calls of ``fastgan._C``, which no dispatch
mode sees. Whatever Python computes between them is frozen as it was, as in a captured graph: a counter that advances on
the host stands still in a replay, and training that depends on one drifts away from the eager steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastgan import _native, adam

READS_BACK = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2", "unique_dim",
        "unique_consecutive", "unique_dim_consecutive", "bincount",
    )
}  # fmt: skip
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
_FROM_HOST = {"aten::lift_fresh"}  # torch.tensor(number), and the like
_ALLOCATES = ("aten::empty", "aten::new_empty")  # a graph replays no allocation


class _Watch(TorchFunctionMode):
    """Notes what reads a CPU tensor's memory without an op."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class EmulatedGraph(TorchDispatchMode):
    """``with graph:`` records, :meth:`replay` repeats.

    Attributes:
        tape: ``(function, args, kwargs, what it gave)``; native calls gave nothing. It keeps alive what it points to.
        reads_back: names of recorded ops that wait for the device.
        from_host: names of recorded ops that bring numbers from the host, which are frozen.
    """

    active: list[EmulatedGraph] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.reads_back: list[str] = []
        self.from_host: list[str] = []
        self._watch = _Watch(self.reads_back)

    def __enter__(self) -> EmulatedGraph:
        self.active.append(self)
        self._watch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._watch.__exit__(*exc)
        self.active.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name in READS_BACK:
            self.reads_back.append(name)
        elif name in _FROM_HOST:
            self.from_host.append(name)
        elif name in _INDEXES and any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None):
            self.reads_back.append("aten::nonzero")  # within the op
        given = tree_map(_alias, (args, kwargs))  # as they are now: unsqueeze_ and its like change them
        out = func(*args, **kwargs)
        self.tape.append((func, *given, tree_map(_alias, out)))
        return out

    @property
    def native(self) -> list[str]:
        """Names of the recorded native calls."""
        return [func.__name__ for func, *_ in self.tape if not hasattr(func, "_schema")]

    @torch.no_grad()
    def replay(self) -> None:
        """Everything again, on the same memory."""
        for func, args, kwargs, out in self.tape:
            if not hasattr(func, "_schema"):
                func(*args, **kwargs)
                continue
            name = func._schema.name
            if name in READS_BACK or name in _FROM_HOST or name.startswith(_ALLOCATES):
                continue
            fresh = func(*tree_map(_alias, args), **tree_map(_alias, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # what runs later reads the recorded address


def _alias(x: Any) -> Any:
    """A tensor of its own on the same memory."""
    return x.detach() if isinstance(x, torch.Tensor) else x


def natively(monkeypatch: pytest.MonkeyPatch, on: bool = True) -> None:
    """From now on, what is built calls the extension so that it is recorded; or runs in torch ops, if not ``on``."""
    ext = _Recorded(_native.ext) if on else None
    for module in (_native, adam):
        monkeypatch.setattr(module, "ext", ext)


class _Recorded:
    """An object of the extension whose functions put themselves on the tape; classes make such objects."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if isinstance(found, type):
            return lambda *args, **kwargs: _Recorded(found(*args, **kwargs))
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            for graph in EmulatedGraph.active:
                graph.tape.append((found, args, kwargs, None))
            return found(*args, **kwargs)

        return call


class NewMemory(TorchDispatchMode):
    """Notes ops that made a storage: what a step allocates, as ``(op, bytes)``.

    An op that returns memory which it was not given has allocated it, whoever owned that address before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.made.append((func._schema.name, t.untyped_storage().nbytes()))
        return out
