"""Iterations as CUDA graphs: recorded once for each variant, replayed with no work of the interpreter between kernels.

A body is a function without arguments that works on static memory alone. It is run a few times to warm up, on a side
stream and on state that is put back afterwards, so that no training step is spent and no number changes; then it is
recorded on that stream. Replays run on the current stream, so that what the caller queues before and after is in order.
A body that waits for the device, or takes numbers from the host, is found in the warm-up, named with the line that does
it, and never recorded: it runs as it is.
"""

from __future__ import annotations

import contextlib
import linecache
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan import driver

Tensor = torch.Tensor
Body = Callable[[], None]

_WARM_UPS = 3  # runs before a recording: libraries choose algorithms and make workspaces in the first ones
_VARIANTS = 16  # recordings in use

READS_BACK = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2", "unique_dim",
        "unique_consecutive", "unique_dim_consecutive", "bincount",
    )
}  # fmt: skip
INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


def reads_back(func: Any, args: Any) -> str | None:
    """The name of the op that an op waits for the device with, or ``None``."""
    name: str = func._schema.name
    if name in READS_BACK:
        return name
    if name in INDEXES and any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None):
        return "aten::nonzero"  # within the op: the number of true values decides a shape
    return None


class Watch(TorchDispatchMode):
    """Notes the ops of a run that a recording could not hold, each with the line that called it.

    Attributes:
        found: one line for each: the op, what is wrong, where.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self._waits = [
            (torch.cuda, "synchronize"),
            (torch.cuda.Stream, "synchronize"),
            (torch.cuda.Event, "synchronize"),
        ]

    def __enter__(self) -> Watch:
        self._originals = [getattr(owner, name) for owner, name in self._waits]
        for (owner, name), original in zip(self._waits, self._originals, strict=True):
            setattr(owner, name, self._noting(f"{getattr(owner, '__name__', owner)}.{name}", original))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for (owner, name), original in zip(self._waits, self._originals, strict=True):
            setattr(owner, name, original)

    def _noting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._note(name, "waits for the device", {"cuda"})
            return original(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (name := reads_back(func, args)) is not None:
            self._note(name, "waits for the device", _devices((args, kwargs)))
        elif not func.is_view:
            given, made = _devices((args, kwargs)), _devices(out)
            if "cuda" in given and "cpu" in made:
                self._note(func._schema.name, "copies to the host", given)
            elif "cpu" in given and "cuda" in made and "cuda" not in given:
                self._note(func._schema.name, "copies from the host", made)
        return out

    def _note(self, op: str, does: str, devices: set[str]) -> None:
        what = f"{op} {does}"
        if line := users_line():
            file, number, source = line
            what = f"{what}, called at {file}:{number}" + (f" ({source})" if source else "")
        if what not in self.found:
            self.found.append(what)


def _devices(tree: Any) -> set[str]:
    return {t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor)}


FASTGAN = str(Path(__file__).parent)
_OWN = (FASTGAN, str(Path(torch.__file__).parent))


def users_line() -> tuple[str, int, str] | None:
    """File, line and source of the innermost frame that is neither torch's nor fastgan's."""
    for frame, number in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if not file.startswith((*_OWN, "<frozen", "<string")):
            return file, number, linecache.getline(file, number).strip()
    return None


class Recording(Protocol):
    """A recorded body."""

    def replay(self, times: int = 1) -> None:
        """Run it again, on the current stream."""

    def nodes(self) -> dict[str, int] | None:
        """How many nodes of each kind it has, where the driver tells."""


class Recorder(Protocol):
    """What warms up and records."""

    def forget(self) -> None:
        """Begin anew: what was recorded is gone, or a recording has failed."""

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """A context for warm-up: on the side stream."""

    def record(self, body: Body) -> Recording:
        """Record what the body queues; it is not run."""


class CudaRecorder:
    """torch's CUDA graphs on one side stream and one memory pool.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.forget()

    def forget(self) -> None:
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, body: Body) -> Recording:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            body()
        graph.instantiate()
        return CudaRecording(graph, self.device)


class CudaRecording:
    """One CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self.graph, self.device = graph, device

    def replay(self, times: int = 1) -> None:
        with torch.cuda.device(self.device):
            driver.replay(self.graph, times)

    def nodes(self) -> dict[str, int] | None:
        return driver.nodes(self.graph) if driver.available() else None


class Graphs:
    """Recordings of one engine, by variant.

    Args:
        recorder: how to record.
        state: all tensors that a body changes and that outlive it.
        device: whose random state, which torch's dropout uses, is put back after warm-up.
    """

    def __init__(self, recorder: Recorder, state: Callable[[], Iterable[Tensor]], device: torch.device) -> None:
        self.recorder, self.device = recorder, device
        self._state = state
        self._recordings: dict[Hashable, Recording] = {}
        self._retired: list[Recording] = []  # kept: destroying one while others of its stream live can crash

    def find(self, key: Hashable, body: Body) -> Recording | str:
        """The recording of a variant, made if need be; or why it cannot be recorded."""
        if key in self._recordings:
            return self._recordings[key]
        if len(self._recordings) >= _VARIANTS:
            return f"{_VARIANTS} variants of the iteration are recorded already"
        made = self._make(body)
        if not isinstance(made, str):
            self._recordings[key] = made
        return made

    def clear(self) -> None:
        """Use no recording any more: memory that they work on is no longer what it was."""
        self._retired += self._recordings.values()
        self._recordings.clear()
        self.recorder.forget()

    def _make(self, body: Body) -> Recording | str:
        with self._as_it_was(), self.recorder.beside():
            body()  # what is made once, such as plans, may take numbers from the host
            with Watch() as watch:
                body()
            if watch.found:
                return "; ".join(watch.found)
            for _ in range(_WARM_UPS - 2):
                body()
        try:
            return self.recorder.record(body)
        except RuntimeError as e:  # of what no dispatch shows
            self.recorder.forget()
            while isinstance(e.__context__, RuntimeError):  # ending a recording that has failed fails too
                e = e.__context__
            lines = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(_OWN)]
            where = f", called at {lines[-1].filename}:{lines[-1].lineno} ({lines[-1].line})" if lines else ""
            return f"{next(iter(str(e).splitlines()), type(e).__name__)}{where}"

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """State is as before afterwards; what first appears within is zero, as an optimiser's state begins."""
        kept = [(t, t.clone()) for t in self._state()]
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            self._put_back(kept)

    @torch.no_grad()
    def _put_back(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        known = {t.data_ptr() for t, _ in kept}
        for t in self._state():
            if t.data_ptr() not in known:
                t.zero_()
        for t, before in kept:
            t.copy_(before)
