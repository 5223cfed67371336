"""What a CUDA graph would do to a step, on any machine: record it once, replay it with frozen numbers and addresses.

The tape holds torch's ops, custom ones and random ones included, the calls of ``fastgan._C`` and launches of kernels,
which no dispatch mode sees. Whatever Python computes between them is frozen as it was, as in a captured graph: a
counter that advances on the host stands still in a replay, and training that depends on one drifts away from the eager
steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fastgan import _native, adam, executor
from fastgan.graphs import READS_BACK, Graphs, reads_back
from fastgan.kernels._launch import Launch

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
        self.within = 0
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
        if (waits := reads_back(func, args)) is not None:
            self.reads_back.append(waits)
        elif name in _FROM_HOST:
            self.from_host.append(name)
        given = tree_map(_alias, (args, kwargs))  # as they are now: unsqueeze_ and its like change them
        self.within += 1  # what an op launches is replayed with the op
        out = func(*args, **kwargs)
        self.within -= 1
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


class Recording:
    """What :class:`fastgan.graphs.Graphs` keeps of a body."""

    def __init__(self, graph: EmulatedGraph) -> None:
        self.graph, self.replays = graph, 0

    def replay(self, times: int = 1) -> None:
        for _ in range(times):
            self.graph.replay()
        self.replays += times

    def nodes(self) -> dict[str, int] | None:
        return None


class Recorder:
    """CUDA records without running; here a recording is a run, whose changes are undone."""

    def __init__(self, device: torch.device) -> None:
        self.undone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def beside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forget(self) -> None:
        pass

    def record(self, body: Callable[[], None]) -> Recording:
        with self.undone(), EmulatedGraph() as graph:
            body()
        assert not graph.reads_back
        assert not graph.from_host
        return Recording(graph)


class _Graphs(Graphs):
    def _make(self, body: Callable[[], None]) -> Any:
        self.recorder.undone = self._as_it_was
        return super()._make(body)


def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``executor="graph"`` work without a GPU, by emulated graphs."""
    monkeypatch.setattr(executor, "CudaRecorder", Recorder)
    monkeypatch.setattr(executor, "Graphs", _Graphs)
    monkeypatch.setattr(executor, "choose", lambda kind, device, kernels: "eager" if kind == "auto" else kind)
    launch = Launch.__call__

    def recorded(self: Launch) -> None:
        for graph in EmulatedGraph.active:
            if not graph.within:
                graph.tape.append((launch, (self,), {}, None))
        with _disable_current_modes():
            launch(self)

    monkeypatch.setattr(Launch, "__call__", recorded)


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
