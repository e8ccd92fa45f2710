"""Small tables of HTML, which notebooks show in place of ``repr``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = "text-align:left;vertical-align:top;white-space:pre-wrap;padding-right:1em"


def table(
    title: str,
    facts: Iterable[tuple[str, str]],
    heads: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    more: str = "",
) -> str:
    """Returns a table of (label, text) below a title, and below it a second table with its own heads.

    ``more``: what the second table leaves out. All texts are escaped.
    """
    shown = [f"<strong>{escape(title)}</strong>", "<table>", *(_row((label, text)) for label, text in facts), "</table>"]
    if rows:
        named = "".join(f'<th style="{_STYLE}">{escape(head)}</th>' for head in heads)
        shown += ["<table>", f"<thead><tr>{named}</tr></thead>", "<tbody>", *map(_row, rows), "</tbody>", "</table>"]
    if more:
        shown.append(f"<div>{escape(more)}</div>")
    return f"<div>{''.join(shown)}</div>"


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<td style="{_STYLE}">{escape(cell)}</td>' for cell in cells) + "</tr>"
