"""CUDA graphs through the driver: against a library that stands in for it, without one, and on a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgan import driver
from fastgan._native import ext

GPU = torch.cuda.is_available()

# Graph 1: three kernels, a copy, two fills, a kind that no list knows. Graph 2: a kernel and graph 1 as a child.
# Graph 3: empty. Graph 4: no graph. Instantiation 1 launches; 2 fails at its third launch; 3 takes 20 ms.
FAKE = r"""
#include <stddef.h>
#include <time.h>

static const int one[] = {0, 0, 0, 1, 2, 2, 99}, two[] = {0, 4};
static long launches[4];
static void *stream;

long fake_launches(int exec) { return launches[exec]; }
long fake_stream(void) { return (long)stream; }

int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuGetErrorName(int error, const char **name) {
  if (error != 400) return 1;
  *name = "CUDA_ERROR_INVALID_HANDLE";
  return 0;
}
int cuGraphLaunch(void *exec, void *on) {
  long which = (long)exec;
  stream = on;
  if (which == 2 && launches[2] == 2) return 719;
  if (which == 3) nanosleep(&(struct timespec){0, 20000000}, NULL);
  ++launches[which];
  return 0;
}
int cuGraphGetNodes(void *graph, void **nodes, size_t *count) {
  long which = (long)graph;
  const int *kinds = which == 1 ? one : two;
  if (which > 3) return 400;
  *count = which == 1 ? 7 : which == 2 ? 2 : 0;
  for (size_t i = 0; nodes != NULL && i < *count; ++i) nodes[i] = (void *)(kinds + i);
  return 0;
}
int cuGraphNodeGetType(void *node, int *type) { *type = *(const int *)node; return 0; }
#ifndef OLD
int cuGraphChildGraphNodeGetGraph(void *node, void **graph) { *graph = (void *)1; return 0; }
#endif
"""


def compiled(folder: Path, *options: str) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler makes a library that stands in for the driver")
    (folder / "fake.c").write_text(FAKE)
    command = [compiler, "-std=c99", "-D_POSIX_C_SOURCE=199309L", "-shared", "-fPIC", *options]
    subprocess.run([*command, "-o", folder / "libcuda.so.1", folder / "fake.c"], check=True)
    return folder


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1."""
    return compiled(tmp_path_factory.mktemp("fake"))


def run(folder: Path, code: str) -> str:
    """What a process prints that finds its driver in a folder."""
    if ext is None:
        pytest.skip("the native extension is not built")
    prelude = "import ctypes\nfrom fastgan import _C\nlibrary = ctypes.CDLL('libcuda.so.1')\n"
    env = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_version(fake: Path) -> None:
    code = "from fastgan import driver; print(_C.driver_version(), driver.version(), driver.available())"
    assert run(fake, code) == "13010 13.1 True"


def test_nodes_are_counted_by_kind(fake: Path) -> None:
    assert eval(run(fake, "print([_C.graph_nodes(i) for i in (1, 2, 3)])")) == [
        {"kernel": 3, "memcpy": 1, "memset": 2, "kind 99": 1},
        {"kernel": 4, "graph": 1, "memcpy": 1, "memset": 2, "kind 99": 1},
        {},
    ]


def test_replays(fake: Path) -> None:
    code = "_C.replay(1, 77, 1000); _C.replay(1, 78, 0); print(library.fake_launches(1), library.fake_stream())"
    assert run(fake, code) == "1000 77"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("graph_nodes(4)", "RuntimeError", "cuGraphGetNodes: CUDA_ERROR_INVALID_HANDLE (400)"),
        ("replay(2, 0, 10)", "RuntimeError", "cuGraphLaunch after 2 launches: unknown error (719)"),
        ("graph_nodes(0)", "ValueError", "graph_nodes: graph is 0, expected a handle"),
        ("replay(0, 0, 1)", "ValueError", "replay: graph_exec is 0, expected a handle"),
        ("replay(1, 0, -1)", "ValueError", "replay: times is -1, expected at least 0"),
    ],
)
def test_errors_are_named(fake: Path, call: str, error: str, message: str) -> None:
    code = f"try: _C.{call}\nexcept Exception as e: print(type(e).__name__, e, sep='|')"
    assert run(fake, code) == f"{error}|{message}"


def test_others_run_during_a_replay(fake: Path) -> None:
    code = """
import threading, time
seen, replayed = [], threading.Event()
def watch():
    while not replayed.is_set():
        seen.append(library.fake_launches(3))
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
_C.replay(3, 0, 10)
replayed.set()
watcher.join()
print(len(set(seen)) > 3)
"""
    assert run(fake, code) == "True"


def test_a_replay_can_be_interrupted(fake: Path) -> None:
    code = """
import signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it
def interrupt():
    while library.fake_launches(1) < 1000:
        time.sleep(0.001)
    signal.raise_signal(signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    _C.replay(1, 0, 2**62)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run(fake, code) == "interrupted"


def test_a_driver_without_a_function(tmp_path: Path) -> None:
    code = "try: _C.driver_version()\nexcept RuntimeError as e: print(e)"
    expected = "libcuda.so.1 has no cuGraphChildGraphNodeGetGraph: the driver is too old"
    assert run(compiled(tmp_path, "-DOLD"), code) == expected


class Graph:
    """As torch.cuda.CUDAGraph is used."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1

    def raw_cuda_graph(self) -> int:
        return 11

    def raw_cuda_graph_exec(self) -> int:
        return 12


def test_with_a_driver_all_replays_but_the_first_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    fake = SimpleNamespace(driver_version=lambda: 13000, replay=lambda *args: calls.append(args))
    fake.graph_nodes = lambda graph: {"kernel": graph}
    monkeypatch.setattr(driver, "ext", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    graph = Graph()
    driver.replay(graph, 100)
    assert (graph.replays, calls) == (1, [(12, 5, 99)])
    driver.replay(graph)
    driver.replay(graph, 0)
    assert (graph.replays, calls) == (2, [(12, 5, 99)])
    assert driver.nodes(graph) == {"kernel": 11}
    with pytest.raises(ValueError, match="replay: times is -1"):
        driver.replay(graph, -1)


def raising() -> int:
    raise RuntimeError("no CUDA driver: none")


@pytest.mark.parametrize("extension", [None, SimpleNamespace(driver_version=raising)])
def test_without_a_driver_replays_come_from_python(monkeypatch: pytest.MonkeyPatch, extension: object) -> None:
    monkeypatch.setattr(driver, "ext", extension)
    graph = Graph()
    driver.replay(graph, 7)
    assert graph.replays == 7
    assert not driver.available()
    with pytest.raises(RuntimeError, match="no CUDA driver" if extension else "the native extension was not built"):
        driver.version()


def test_nodes_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ext", None)
    with pytest.raises(RuntimeError, match="nodes: the native extension was not built"):
        driver.nodes(Graph())


@pytest.mark.skipif(GPU, reason="here is a driver")
def test_a_machine_without_a_driver_says_so() -> None:
    if ext is None:
        pytest.skip("the native extension is not built")
    with pytest.raises(RuntimeError, match=r"no CUDA driver: libcuda\.so\.1"):
        driver.nodes(Graph())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_captured_graph() -> None:
    x = torch.zeros(4, device="cuda")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        x += 1
        x += 1
    assert driver.nodes(graph) == {"kernel": 2}
    driver.replay(graph, 1000)
    assert x.tolist() == [2000.0] * 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x -= 1
    driver.replay(graph, 2000)
    assert x.tolist() == [0.0] * 4
    with pytest.raises(RuntimeError, match="keep_graph"):
        driver.nodes(graph)


def test_the_native_code_is_no_cuda() -> None:
    """The same with and without nvcc; .ci/run builds it beside one that fails when called."""
    root = Path(__file__).parents[1]
    if not (root / "CMakeLists.txt").is_file():
        pytest.skip("the source tree is not beside these tests")
    assert {file.suffix for file in (root / "csrc").iterdir()} == {".cpp", ".hpp"}
    assert "LANGUAGES CXX)" in (root / "CMakeLists.txt").read_text()
