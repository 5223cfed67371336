"""The error that a user can mend: the command line prints it as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument or a file is not what was expected; the message names it, what it was and what was expected."""


def unknown(what: str, got: object, known: Iterable[str]) -> InputError:
    """The error for a name outside ``known``, with the nearest one suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {what} {got!r}{hint} (known: {', '.join(names)})")
