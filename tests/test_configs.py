"""The table of tiles: what is in it, what is chosen without it, and that the library's way has the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from op_checks import check_sample

from fastgan.kernels import SPECS, configs
from fastgan.kernels.configs import Config

TABLE = json.loads(Path(configs.__file__).with_name("configs.json").read_text())
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose kernels are compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("row", TABLE["tiles"], ids=lambda r: f"{r['op']}-{r['shape']}-{r['dtype']}-{r['arch']}")
def test_a_row_is_found_and_shipped(row: dict, compiled: None) -> None:
    """A row that was estimated says what the rule does; one that was measured says what it likes."""
    shape, dtype = tuple(map(int, row["shape"].split("x"))), getattr(torch, row["dtype"])
    assert configs.shape_class(*shape) == row["shape"]
    chosen = configs.config(row["op"], *shape, dtype, row["arch"])
    assert chosen == Config(*row["config"])
    assert chosen in configs.shipped(row["op"], dtype)
    assert row["measured"] or chosen == configs.rule(row["op"], *shape, dtype, row["arch"])


def test_rows_are_what_a_sweep_writes() -> None:
    for row in TABLE["tiles"]:
        shape = tuple(map(int, row["shape"].split("x")))
        made = configs.as_row(row["op"], *shape, getattr(torch, row["dtype"]), row["arch"], Config(*row["config"]))
        assert {**made, "measured": row["measured"]} == row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", configs.OPS)
def test_whatever_is_chosen_is_shipped(op: str, dtype: torch.dtype, compiled: None) -> None:
    """So that the compilation ahead of time has seen it."""
    sizes = (1, 33, 64, 100, 256, 784, 1024, 4096)
    for arch in (None, 80, 90, 100, 120):
        chosen = {configs.config(op, m, n, k, dtype, arch) for m in sizes for n in sizes for k in (64, 784)}
        assert chosen <= set(configs.shipped(op, dtype))
        assert all(min(c.block_m, c.block_n, c.block_k) >= 16 for c in chosen)
        if dtype != torch.float64:
            assert all(c.block_m >= 64 for c in chosen), "no warp group's product"


def test_large_products_have_large_tiles_and_small_ones_many(compiled: None) -> None:
    def programs(m: int, n: int) -> tuple[int, int]:
        c = configs.rule("linear_lrelu", m, n, 512, torch.bfloat16, 90)
        return c.block_m * c.block_n, -(-m // c.block_m) * -(-n // c.block_n)

    assert programs(64, 512) == (64 * 16, 32)
    assert programs(1024, 512) == (64 * 64, 128)
    assert programs(8192, 2048) == (128 * 128, 1024)


def test_one_small_tile_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert configs.config("linear_lrelu", 4096, 4096, 4096, torch.bfloat16) == Config(32, 32, 32, 4, 1)


@pytest.mark.parametrize(
    ("shape", "wins"),
    [((64, 512, 784), False), ((4096, 64, 64), True), ((64, 2048, 2048), True), ((64, 2048, 64), False)],
)
def test_the_library_takes_what_is_large(shape: tuple[int, int, int], wins: bool) -> None:
    assert configs.library_wins(*shape, torch.bfloat16, 90) is wins
    assert configs.library_wins(*shape, torch.bfloat16) is False, "without a GPU there is no library to compare with"


@pytest.mark.parametrize("index", range(9))
def test_the_library_has_the_same_numbers(index: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, first and second derivatives where the library makes all products."""
    (spec,) = (s for s in SPECS if s.name == "linear_lrelu")
    asked = []
    monkeypatch.setattr(configs, "library_wins", lambda *shape: asked.append(shape) or True)
    check_sample(spec, torch.float32, spec.samples(device, torch.float32)[index])
    assert len(asked) > 3
