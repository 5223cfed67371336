"""Pages and pictures of results: whole, escaped, the same for the same result, and opened in a browser."""

from __future__ import annotations

import base64
import copy
import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
import report_samples as samples
from PIL import Image

from fastgan import InputError
from fastgan.report import bench_page, bench_pictures, palette, profile_page, profile_pictures

Page = Callable[[dict[str, Any]], str]
PAGES = {"bench": (bench_page, samples.bench), "profile": (profile_page, samples.profile)}
pytestmark = pytest.mark.xdist_group("report")  # pages are made once, and one browser opens them
SPOILED = (bench_page, samples.spoiled_bench)
ATTACK = "<script>alert('1')</script>\"'>&amp;$x^{\x00\x1b\udcff"


class Elements(HTMLParser):
    """All start tags with their attributes, and whether the end tags fit."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


@functools.cache
def page_of(make: Page, sample: Callable[[], dict[str, Any]]) -> str:
    """The page of a sample, made once."""
    return make(sample())


def svgs(page: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_is_a_whole_document(kind: str) -> None:
    page = page_of(*PAGES[kind])
    elements = Elements(page)
    assert page.startswith("<!DOCTYPE html>")
    assert elements.of("html") == [{"lang": "en"}]
    assert len(elements.of("h1")) == len(elements.of("title")) == len(elements.of("main")) == 1
    levels = [0, *(int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag))]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert len(elements.of("caption")) == len(elements.of("table")) > 0
    assert all(th.get("scope") in ("col", "row", "rowgroup") for th in elements.of("th"))
    assert len(elements.of("picture")) == len(elements.of("img")) >= 2
    assert len(elements.of("source")) == 3 * len(elements.of("img"))
    assert all(re.search(r"\d", img["alt"] or "") for img in elements.of("img"))


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_asks_for_nothing(kind: str) -> None:
    page = page_of(*PAGES[kind])
    policy = {"default-src 'none'; style-src 'unsafe-inline'; img-src data:"}
    elements = Elements(page)
    assert policy == {m["content"] for m in elements.of("meta") if m.get("http-equiv") == "Content-Security-Policy"}
    assert not elements.of("script", "link", "iframe", "object", "base")
    addresses = [v for _, a in elements.found for k, v in a.items() if k in ("src", "srcset", "href") and v is not None]
    assert addresses
    assert all(a.startswith(("data:image/svg+xml;base64,", "#")) for a in addresses)
    assert not re.search(r"https?:|url\(|@import", page)
    for svg in svgs(page):
        assert set(re.findall(r'"(https?:[^"]*)"', svg)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }


@pytest.mark.parametrize("kind", PAGES)
def test_the_same_result_gives_the_same_page(kind: str) -> None:
    make, sample = PAGES[kind]
    assert make(sample()) == page_of(make, sample)


def one_case() -> dict[str, Any]:
    return samples.bench(batches=[64])


def test_what_the_bench_page_says() -> None:
    page = page_of(bench_page, one_case)
    elements = Elements(page)
    row = one_case()["results"][0]["variants"]["fastgan"]
    ratios = f"{row['eager_over_this']:.2f}x as fast as eager and {row['best_competitor_over_this']:.2f}x as fast as"
    assert f"fastgan is {ratios} the best competitor (compiled) at batch 64; noise 2.1%." in elements.text
    assert "Skipped: CUDA graphs need a CUDA device" in elements.text
    assert "○ skipped" in "".join(svgs(page))
    assert "Not known here: Energy." in elements.text


def test_a_variant_that_is_wrong_has_words_and_no_figure() -> None:
    page = page_of(*SPOILED)
    assert "✗ compiled is wrong in my_project" in Elements(page).text
    rows = re.findall(r'<tr class="wrong">.*?</tr>', page)
    assert len(rows) == rows[0].count("<td") == 1
    assert "Adam's first moments are 0.31" in rows[0]
    assert "✗ wrong" in "".join(svgs(page))
    alts = [img["alt"] or "" for img in Elements(page).of("img")]
    assert any("compiled ✗ wrong, compiled + traced ! failed" in alt for alt in alts)


def test_what_the_profile_page_says() -> None:
    text = Elements(profile_page(samples.profile(on_gpu=True))).text
    assert text.index("41% of the time training waits for data.") < text.index("The batch of 64 is small")
    assert "19.2 ms without the profiler and 19.5 ms with it: 1.8%" in text
    for said in ("train.py:21", "loss.item()", "SM activity: GPM is not supported", "used 812 J in", "NVIDIA H100"):
        assert said in text


def attacked(value: Any, attack: str) -> Any:
    """Every text and key of a result as an attack would have it, but those with a meaning."""
    if isinstance(value, dict):
        return {
            k: v if k in ("status", "best_competitor", "created") else attacked(v, attack) for k, v in value.items()
        }
    if isinstance(value, list):
        return [attacked(v, attack) for v in value]
    return value + attack if isinstance(value, str) else value


@pytest.mark.parametrize("kind", PAGES)
def test_texts_are_escaped(kind: str) -> None:
    make, sample = PAGES[kind]
    result = attacked(sample(), ATTACK)
    if kind == "bench":
        variants = result["results"][0]["variants"]
        variants["odd" + ATTACK] = copy.deepcopy(variants["eager"])
        variants["bad" + ATTACK] = {"status": "wrong", "reason": ATTACK}
    page = make(result)
    page.encode()
    assert not Elements(page).of("script")
    assert "<script>alert('1')</script>\"'>&amp;$x^{" in Elements(page).text
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", page + "".join(svgs(page)))
    assert not any("<script" in svg for svg in svgs(page))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every key, once for all of a list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def spoiled(result: dict[str, Any], path: tuple[Any, ...], *value: Any) -> dict[str, Any]:
    """The result without that key, or with another value there."""
    result = at = copy.deepcopy(result)
    for key in path[:-1]:
        at = at[key]
    if value:
        at[path[-1]] = value[0]
    else:
        del at[path[-1]]
    return result


@pytest.mark.parametrize("kind", PAGES)
def test_any_figure_may_be_missing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgan.report.plots.svg", lambda plot, narrow: "")  # drawn in the next test
    make, sample = PAGES[kind]
    result = sample()
    if kind == "bench":
        result["results"] = result["results"][:1]
        del result["results"][0]["variants"]["compiled"], result["results"][0]["variants"]["fastgan reference"]
    paths = list(places(result))
    assert len(paths) > 50
    for path in paths:
        for found in (spoiled(result, path), spoiled(result, path, None), spoiled(result, path, math.nan)):
            assert not re.search(r"\bnan\b|None", Elements(make(found)).text), path


@pytest.mark.parametrize("value", [None, math.nan, 0.0], ids=str)
@pytest.mark.parametrize("kind", PAGES)
def test_all_figures_may_be_missing(kind: str, value: float | None) -> None:
    make, sample = PAGES[kind]
    Elements(make(without_figures(sample(), value)))
    Elements(make({}))


def without_figures(result: Any, value: float | None) -> Any:
    if isinstance(result, dict):
        return {key: without_figures(inner, value) for key, inner in result.items()}
    if isinstance(result, list):
        return [without_figures(inner, value) for inner in result]
    return value if isinstance(result, (int, float)) else result


def test_pictures_are_files(tmp_path: Path) -> None:
    paths = bench_pictures(samples.bench(["toy", "a/b:c"], [8, 16]), tmp_path / "new" / "folder")
    names = [f"{plot}-{workload}.png" for workload in ("toy", "a-b-c") for plot in ("ratios", "scaling", "split")]
    assert [p.name for p in paths] == names
    paths += profile_pictures(samples.profile(), tmp_path)
    assert {p.name for p in paths} >= {"phases.png", "memory.png", "memory-timeline.png", "samples.png"}
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width >= 1800
            assert np.asarray(picture.convert("L")).std() > 5
    assert not list(tmp_path.rglob("*.unfinished"))


def test_pictures_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is no folder and cannot be made one: File exists"):
        bench_pictures(samples.bench(), tmp_path / "file")


def contrast(a: str, b: str) -> float:
    """By WCAG 2."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(scheme: int) -> None:
    colours = {role: pair[scheme] for role, pair in palette.COLOURS.items()}
    for role in ("ink", "muted", "accent", "bad", "warning"):
        assert min(contrast(colours[role], colours[ground]) for ground in ("ground", "panel")) >= 4.5, role
    for role in {palette.phase(name) for name in (*palette._PHASES, "another")}:
        assert contrast(colours[role], colours["ground"]) >= 4.5, role  # a phase has its name inside
    for role in {
        *map(palette.variant, palette._VARIANTS),
        "other-1",
        "other-2",
        "discriminator",
        "penalty",
        "generator",
    }:
        assert contrast(colours[role], colours["ground"]) >= 3.0, role


def test_a_dark_plot_has_no_light_colour() -> None:
    lights = [pair[0] for pair in palette.COLOURS.values()]
    assert len(set(lights)) == len(lights)
    page = page_of(bench_page, one_case)
    light = {svg for svg in svgs(page) if palette.light("ink") in svg}
    dark = set(svgs(page)) - light
    assert len(dark) == len(light) == 4
    assert all(not set(re.findall(r"#[0-9a-f]{6}\b", svg)) & set(lights) for svg in dark)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    if chromium.PROGRAM is None:
        pytest.skip("Chromium is not installed: no program chromium")
    with chromium.Chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.mark.parametrize("kind", [*PAGES, "spoiled", "empty"])
def test_a_page_opens_in_a_browser(kind: str, browser: chromium.Chromium, tmp_path: Path) -> None:
    pages = PAGES | {"spoiled": SPOILED, "empty": (profile_page, dict)}
    file = tmp_path / "page.html"
    file.write_text(page_of(*pages[kind]), encoding="utf-8")
    for width, height in ((1280, 900), (390, 844)):
        grounds = []
        for scheme in ("light", "dark"):
            view = browser.open(file, width, height, scheme)
            assert not view.messages
            assert not view.requests
            assert view.loaded
            assert view.width == view.content == width
            with Image.open(io.BytesIO(view.png)) as shot:
                pixels = np.asarray(shot.convert("L"))
            assert pixels.shape == (height, width)
            assert pixels.std() > 8  # is not blank
            grounds.append(int(pixels[2, 2]))
        assert grounds[0] == 255
        assert grounds[1] < 40


def test_the_browser_tells_what_is_wrong(browser: chromium.Chromium, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<script>console.log('hello')</script><img src='missing.png'><div style='width:600px'>wide</div>")
    view = browser.open(file, 390, 844, "light")
    assert view.width == 390 < view.content
    assert [Path(url).name for url in view.requests] == ["missing.png"]
    assert any("hello" in message for message in view.messages)
    assert not view.loaded
