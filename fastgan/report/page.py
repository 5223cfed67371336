"""HTML by construction: every text is escaped, except what is markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastgan.report import palette

_VOID = frozenset({"img", "meta", "source"})
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """A text that is markup already."""

    __slots__ = ()


def clean(text: str) -> str:
    """Without what no document may hold: control characters and lone surrogates."""
    return text.encode("utf-8", "replace").decode().translate(_CONTROLS)


def el(tag: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """An element.

    Args:
        tag: its name.
        children: texts, escaped unless they are :class:`Html`; ``None`` is left out.
        attributes: by name, ``_`` for ``-`` and ``class_`` for ``class``; ``None`` is left out.
    """
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(clean(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{tag}{named}>"
    return Html(opening if tag in _VOID else f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[str | None]) -> Html:
    """One after the other, escaped unless they are :class:`Html`."""
    return Html(
        "".join(c if isinstance(c, Html) else html.escape(clean(c), quote=False) for c in children if c is not None)
    )


def prose(text: str) -> Html:
    """A sentence whose `` `code` `` is shown as such."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        return join([text])
    return join(el("code", piece) if i % 2 else piece for i, piece in enumerate(pieces))


def page(title: str, body: Iterable[str | None]) -> str:
    """A whole document that needs nothing else."""
    style = Html(palette.custom_properties() + Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", style),
    )
    return f"<!DOCTYPE html>\n{el('html', head, el('body', el('main', *body)), lang='en')}\n"


def header(kind: str, title: str, about: Iterable[str]) -> Html:
    """The beginning of a page: what was run, on what, when."""
    return el("header", el("p", kind, class_="kind"), el("h1", title), el("p", " · ".join(about), class_="about"))


def section(title: str, *children: str | None, anchor: str | None = None) -> Html:
    """A part of the page, with its heading."""
    return el("section", el("h2", title), *children, id=anchor)


def table(caption: str, head: Sequence[str], *bodies: Sequence[Html], class_: str | None = None) -> Html:
    """A table that scrolls in a box of its own where it is wider than that.

    Args:
        caption: above it.
        head: the columns' names.
        bodies: groups of ``<tr>``.
        class_: of the table.
    """
    names = el("thead", el("tr", *(el("th", name, scope="col") for name in head)))
    groups = (el("tbody", *rows) for rows in bodies)
    inner = el("table", el("caption", el("span", caption)), names, *groups, class_=class_)
    return el("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def row(name: str, cells: Iterable[str], class_: str | None = None) -> Html:
    """A line of a table, with its heading first."""
    return el("tr", el("th", name, scope="row"), *(el("td", cell) for cell in cells), class_=class_)


def bar(share: float | None, role: str = "accent") -> Html:
    """A share as a length, for a table's cell that also says it in words."""
    wide = min(max(share or 0.0, 0.0), 1.0)
    inner = el("span", style=f"width:{wide:.1%};background:var(--{role})")
    return el("span", inner, class_="bar", aria_hidden="true")


def swatch(role: str) -> Html:
    """A spot in the colour that plots use."""
    return el("span", class_="swatch", style=f"background:var(--{role})", aria_hidden="true")


def facts(pairs: Iterable[tuple[str, str]], class_: str) -> Html:
    """Names and values."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in pairs), class_=class_)
