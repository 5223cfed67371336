"""What the figures of a result depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgan.report.page import Html, el, facts, section
from fastgan.report.values import Row, figure, part, word

_NAMES = {
    "device": "Device", "device_name": "Name of the device", "cpu": "Processor", "cores": "Cores at hand",
    "load_before": "Load before", "torch_threads": "Threads of torch", "system": "System", "python": "Python",
    "torch": "torch", "triton": "triton", "numpy": "numpy", "fastgan": "fastgan", "timing": "Timing",
}  # fmt: skip


def conditions(said: Row, result: Mapping[str, Any]) -> Html:
    """The last section of a page."""
    pairs = [(_NAMES.get(key, _spelled(key)), _text(value)) for key, value in said.items() if key != "gpu"]
    pairs += [(f"GPU: {_spelled(key).lower()}", _text(value)) for key, value in part(said, "gpu").items()]
    command, schema = word(result, "command", ""), word(result, "schema", "")
    shown = el("pre", el("code", command)) if command else None
    named = el("p", f"Schema {schema}", class_="note") if schema else None
    return section("Conditions", facts(pairs, "conditions"), shown, named)


def _spelled(key: str) -> str:
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]


def _text(value: Any) -> str:
    if value is None or value != value:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value, 4)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
