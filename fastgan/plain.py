"""Results as JSON, which has no NaN and no infinity: ``null`` stands for them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """What JSON can hold; anything else as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)


def as_json(value: Any, indent: int | None = None) -> str:
    """One object, on one line where ``indent`` is not given."""
    return json.dumps(plain(value), indent=indent)
