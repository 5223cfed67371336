"""Dataclasses read from plain data (YAML, JSON): every mistake is one line that names the file and the key."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fastgan.errors import InputError, unknown

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field whose value, or each of whose values, lies in the given range or among ``choices``."""
    rules = {"low": low, "above": above, "high": high, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={k: v for k, v in rules.items() if v is not None})


class Reader:
    """Reads dataclasses from one file.

    Args:
        file: the file's name, for messages.
        given: where a value came from when not from the file, by its key path, e.g. ``{"kimg": "--kimg"}``.
    """

    def __init__(self, file: str, given: Mapping[str, str] | None = None) -> None:
        self.file = file
        self.given = given or {}

    def error(self, path: str, text: str) -> InputError:
        """The error for the value at ``path``."""
        parts = path.split(".")
        for n in range(len(parts), 0, -1):
            if origin := self.given.get(".".join(parts[:n])):
                return InputError(f"{origin}: {text}")
        return InputError(f"{self.file}: {text}")

    def read(self, cls: type[T], data: object, path: str = "") -> T:
        """``cls`` from a mapping; a text alone stands for the first field where that is a text."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(cls)
        first = next(iter(fields))
        if isinstance(data, str) and hints[first] is str:
            data = {first: data}
        if not isinstance(data, Mapping):
            raise self.error(path, f"{path or 'the recipe'} is {_said(data)}, expected a mapping of keys to values")
        for key in data:
            if key not in fields:
                at = f"{path}.{key}" if path else str(key)
                raise self.error(at, f"{path and f'{path}: '}{unknown('key', key, fields)}")
        values: dict[str, Any] = {}
        for name, f in fields.items():
            at = f"{path}.{name}" if path else name
            if name in data:
                values[name] = self._value(hints[name], data[name], at, f.metadata)
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise self.error(at, f"{at} is missing")
        return cls(**values)

    def _value(self, hint: Any, value: object, path: str, rules: Mapping[str, Any]) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in args:
                return None
            return self._value(next(a for a in args if a is not type(None)), value, path, rules)
        if dataclasses.is_dataclass(hint):
            return self.read(hint, value, path)  # type: ignore[arg-type]
        if origin is dict:
            if not isinstance(value, Mapping):
                raise self.error(path, f"{path} is {_said(value)}, expected a mapping of keys to values")
            return dict(value)
        if origin is tuple:
            if isinstance(value, str) and args[0] is str:
                value = [v.strip() for v in value.split(",")]
            if not isinstance(value, (list, tuple)):
                raise self.error(path, f"{path} is {_said(value)}, expected a list")
            if args[-1] is not Ellipsis and len(value) != len(args):
                raise self.error(path, f"{path} has {len(value)} values, expected {len(args)}")
            return tuple(self._value(args[0], v, f"{path}.{i}", rules) for i, v in enumerate(value))
        return self._scalar(hint, value, path, rules)

    def _scalar(self, hint: Any, value: object, path: str, rules: Mapping[str, Any]) -> Any:
        if hint is bool:
            if not isinstance(value, bool):
                raise self.error(path, f"{path} is {_said(value)}, expected true or false")
            return value
        if hint is str:
            if not isinstance(value, str):
                raise self.error(path, f"{path} is {_said(value)}, expected a text")
            if "choices" in rules and value not in rules["choices"]:
                raise self.error(path, f"{path}: {unknown('value', value, rules['choices'])}")
            return value
        number = _number(value)  # YAML 1.1 reads 1e-4 as a text
        if hint is int:
            rules = {"low": -(2**63), "high": 2**63 - 1, **rules}
        if number is None or (hint is int and number != int(number)):
            kind = "a whole number" if hint is int else "a number"
            raise self.error(path, f"{path} is {_said(value)}, expected {kind}")
        for rule, holds, words in (
            ("low", number >= rules.get("low", number), "at least"),
            ("above", "above" not in rules or number > rules["above"], "more than"),
            ("high", number <= rules.get("high", number), "at most"),
            ("below", "below" not in rules or number < rules["below"], "less than"),
        ):
            if not holds:
                raise self.error(path, f"{path} is {value}, expected {words} {rules[rule]}")
        return hint(number)


def _number(value: object) -> float | None:
    """A finite number; an ``int``, which is exact, where it is written as one; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return _number(kind(value))
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _said(value: object) -> str:
    if value is None:
        return "empty"
    try:
        text = repr(value)
    except ValueError:  # of a number that is too long
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
