"""The colours of pages and plots: each has a role, and a value on light and on dark ground.

A plot is drawn in the light values, each of which is there once, so that its dark form is the same file with the other
ones. Hues are those of Okabe and Ito, told apart by all kinds of colour vision, with their lightness moved until they
stand out from both grounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

COLOURS: dict[str, tuple[str, str]] = {
    "ground": ("#ffffff", "#14171b"),
    "panel": ("#f5f6f8", "#1d2126"),
    "ink": ("#1b1f24", "#e7eaee"),
    "muted": ("#59626e", "#a4adb8"),
    "line": ("#d8dce2", "#363c44"),
    "accent": ("#0068a8", "#5db4ec"),
    "bad": ("#b3261d", "#ff9389"),
    "warning": ("#835400", "#edb54e"),
    "eager": ("#757e8a", "#8f99a5"),
    "autocast": ("#cc5a0a", "#f0853a"),
    "compiled": ("#a8447f", "#de8fbd"),
    "traced": ("#b07d00", "#e0b13c"),
    "graph": ("#00845f", "#2dba8d"),
    "reference": ("#4199cf", "#9bd0f5"),
    "fastgan": ("#00639f", "#4ba7e3"),
    "other-1": ("#6a51a3", "#ab97dd"),
    "other-2": ("#7b5b3a", "#c9a27a"),
    "discriminator": ("#4d5866", "#7f8b9a"),
    "penalty": ("#d1731a", "#f2994b"),
    "generator": ("#8591a0", "#c3ccd6"),
    "input-1": ("#b5570b", "#ec9047"),
    "input-2": ("#9a4a08", "#cf7a35"),
    "pass-1": ("#00629e", "#4aa6e2"),
    "pass-2": ("#2777ab", "#86c3ee"),
    "penalty-1": ("#93386d", "#cf7dab"),
    "penalty-2": ("#ac5086", "#e6a5ca"),
    "generator-1": ("#00704f", "#25b083"),
    "generator-2": ("#258264", "#74d3b2"),
    "update": ("#5f4a97", "#a08ad6"),
    "gap-1": ("#5a636f", "#8a94a0"),
    "gap-2": ("#6e7783", "#a7b0bb"),
}

_VARIANTS = {
    "eager": "eager", "eager again": "eager", "eager + AMP": "autocast", "compiled": "compiled",
    "compiled + traced": "traced", "CUDA graph": "graph", "fastgan reference": "reference", "fastgan": "fastgan",
}  # fmt: skip
_PHASES = {
    "your loop": "input-2", "data": "input-1", "copy": "input-2", "noise": "input-1", "fakes": "generator-1",
    "D forward": "pass-1", "chain": "penalty-1", "penalty": "penalty-2", "sweep": "penalty-1",
    "weight gradient": "pass-2", "D backward": "pass-1", "G forward": "generator-2", "G backward": "generator-1",
    "optimiser": "update", "metrics": "gap-1", "graph replay": "pass-2", "other": "gap-2", "host gap": "gap-1",
}  # fmt: skip
_DARK = dict(COLOURS.values())


def variant(name: str) -> str:
    """The colour's role of a benchmark's variant, the same everywhere."""
    return _VARIANTS.get(name, f"other-{1 + sum(name.encode('utf-8', 'replace')) % 2}")


def phase(name: str) -> str:
    """The colour's role of a phase: neighbours differ, and those that belong together are alike."""
    return _PHASES.get(name, "gap-2")


def light(role: str) -> str:
    """What plots draw with."""
    return COLOURS[role][0]


def dark(svg: str) -> str:
    """A plot on dark ground."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _DARK.get(found[0], found[0]), svg)


def custom_properties() -> str:
    """The colours for a style sheet; paper is light."""

    def declared(values: Iterable[tuple[str, str]]) -> str:
        return ":root{" + ";".join(f"--{role}:{value}" for role, value in values) + "}"

    bright = declared((role, pair[0]) for role, pair in COLOURS.items())
    dim = declared((role, pair[1]) for role, pair in COLOURS.items())
    return f"{bright}@media screen and (prefers-color-scheme:dark){{{dim}}}"
