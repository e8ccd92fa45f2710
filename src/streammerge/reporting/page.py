"""The page: one self-contained file, light and dark, readable on a phone. Each number of a picture is in a table too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from streammerge.errors import printable
from streammerge.reporting.facts import LOST, MARKS, NOT_COMPARED, NOTHING, Facts, Grid, Row
from streammerge.reporting.pictures import curves, heat_map
from streammerge.version import __version__

_MOST_ROWS = 2000
BEGIN = "<!doctype html>"
"""How each page begins. A report replaces only a file that begins so."""
_STYLE = """
html { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0; background: #ffffff; color: #1b1f24; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: .5rem 0; font-weight: 600; overflow-wrap: anywhere; }
p.sub, p.small { color: #5b6570; margin: .2rem 0 1rem; }
p.small { font-size: .85rem; }
dl.first { display: grid; gap: .75rem; margin: 1rem 0; }
dl.first > div { background: #f6f8fa; border-left: 4px solid #00798c; padding: .6rem .9rem; border-radius: 4px; }
dl.first > div.lost { border-left-color: #b23a48; }
dl.first dt { font-size: .85rem; color: #5b6570; }
dl.first dd { margin: 0; font-size: 1.05rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; min-width: 20rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #d9dee3; }
th { color: #5b6570; font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 12rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
figure svg { display: block; max-width: 100%; height: auto; color: #1b1f24; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem; border-radius: 4px; }
details > summary { cursor: pointer; color: #00798c; padding: .3rem 0; }
ul.said { padding-left: 1.1rem; overflow-wrap: anywhere; }
ul.said li.warning { color: #b23a48; }
footer { color: #5b6570; font-size: .8rem; margin: 2.5rem 0 1rem; }
@media (max-width: 36rem) {
  table.stacks, table.stacks tbody, table.stacks tr, table.stacks td { display: block; }
  table.stacks thead { display: none; }
  table.stacks { min-width: 0; }
  table.stacks tr { border-bottom: 1px solid #8b95a0; padding: .4rem 0; }
  table.stacks td, table.stacks td.n { display: grid; grid-template-columns: 7rem 1fr; border: 0; padding: .1rem 0; }
  table.stacks td, table.stacks td.n { text-align: left; white-space: normal; overflow-wrap: anywhere; }
  table.stacks td::before { content: attr(data-head); color: #5b6570; }
}
@media (prefers-color-scheme: dark) {
  table.stacks td::before { color: #9aa5b1; }
  body { background: #14181c; color: #e6e9ec; }
  p.sub, p.small { color: #9aa5b1; }
  dl.first > div { background: #1b2127; border-left-color: #4fc3d6; }
  dl.first > div.lost { border-left-color: #ff8a94; }
  dl.first dt { color: #9aa5b1; }
  th, td { border-bottom-color: #2f3841; }
  th { color: #9aa5b1; }
  figure svg { color: #e6e9ec; }
  pre { background: #1b2127; }
  details > summary { color: #4fc3d6; }
  ul.said li.warning { color: #ff8a94; }
  footer { color: #9aa5b1; }
}
"""


def page(facts: Facts) -> str:
    """Returns the page as HTML. Raises RecipeError if matplotlib is not installed."""
    grids = facts.grids()
    moved, left, merged = "How far the output moved", "What was not merged under its own name", "What was merged"
    if facts.compared:
        moved, left, merged = "How far B lies from A", "What could not be compared", "What was compared"
    parts = [
        f"<h1>{escape(facts.title)}</h1><p class=sub>{escape(facts.subtitle)}</p>",
        _first(facts),
        _section(moved, _heat(facts, grids) if grids else _unknown(facts)),
        _section(left, _accounts(facts)),
        _section(merged, _pairs(facts.made) + _inputs(facts) + _recipe(facts)),
        "" if facts.compared else _section("Memory and throughput", _curves(facts)),
        _section("Verification", _pairs(facts.verification)) if facts.verification else "",
        _section("Notes and warnings", _said(facts)) if facts.said else "",
        _section("Every tensor", _tensors(facts)),
    ]
    body = "\n".join(parts)
    return (
        f"{BEGIN}\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(facts.title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n<footer>streammerge {escape(__version__)}</footer>\n</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _first(facts: Facts) -> str:
    rows = list[str]()
    for label, text in facts.summary:
        kind = "lost" if label in (LOST, NOT_COMPARED) and not text.startswith(NOTHING) else ""
        rows.append(f'<div class="{kind}"><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>')
    return f"<dl class=first>{''.join(rows)}</dl>"


def _heat(facts: Facts, grids: Sequence[Grid]) -> str:
    figures = "".join(f"<figure><h3>from {escape(printable(grid.title))}</h3>{heat_map(grid)}</figure>" for grid in grids)
    there = {mark for grid in grids for line in grid.marks for mark in line}
    letters = "; ".join(f"{mark}: {meaning}" for mark, meaning in MARKS.items() if mark in there)
    what = "|B - A| / |A|" if facts.compared else "|output - input| / |input|"
    tables = "".join(
        f"<h3>from {escape(printable(grid.title))}</h3>"
        + _table(
            ["layer", *grid.kinds],
            ([layer, *(_number(cell) for cell in line)] for layer, line in zip(grid.layers, grid.values, strict=True)),
            numbers=range(1, len(grid.kinds) + 1),
        )
        for grid in grids
    )
    return (
        f"<p class=small>Brighter is farther: {what}; {escape(facts.measured)}.{f' {escape(letters)}.' * bool(letters)}</p>"
        f"<div class=pictures>{figures}</div>"
        f"<details><summary>the numbers</summary>{tables}</details>"
    )


def _unknown(facts: Facts) -> str:
    if facts.compared:
        return "<p>No tensor could be compared.</p>"
    return (
        "<p>The distances are not known: nothing was measured while merging, and no input was found to compare with. A "
        "report that is made with the merge measures them, and so does a merge with statistics.</p>"
    )


def _accounts(facts: Facts) -> str:
    if not facts.accounts:
        if facts.compared:
            return "<p>Both have the same tensors.</p>"
        return "<p>Every tensor of every input went into the tensor of its own name.</p>"
    rows = ([a, fate, f"{count:,}", names, why] for a, fate, count, names, why in facts.accounts)
    return _table(["input", "fate", "tensors", "names", "why"], rows, numbers=(2,), names=(3,), stacks=True)


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return _table([], ([label, text] for label, text in pairs), names=(1,))


def _inputs(facts: Facts) -> str:
    if not facts.inputs:
        return ""
    return "<h3>Inputs</h3>" + _table(
        ["input", "size", "tensors used", "SHA-256 of the headers"], facts.inputs, names=(0,), stacks=True
    )


def _recipe(facts: Facts) -> str:
    return f"<h3>Recipe</h3><pre>{escape(facts.recipe)}</pre>" if facts.recipe else ""


def _curves(facts: Facts) -> str:
    if len(facts.samples) < 2:
        return (
            "<p>Not recorded: the run was too short, or ended before this report. A report that is made with the merge "
            "records it.</p>"
        )
    rows = (
        [f"{each.seconds:.2f}", f"{each.memory_bytes / (1 << 20):.1f}", f"{each.done_bytes / 1e6:.1f}"]
        for each in facts.samples[:: max(len(facts.samples) // 60, 1)]
    )
    table = _table(["seconds", "memory (MiB)", "read and written (MB)"], rows, numbers=(0, 1, 2))
    return (
        f"<figure>{curves(facts.samples, facts.memory_bytes)}</figure>"
        f"<details><summary>the numbers</summary>{table}</details>"
    )


def _said(facts: Facts) -> str:
    rows = "".join(f"<li class={escape(kind)}>{escape(kind)}: {escape(text)}</li>" for kind, text in facts.said)
    return f"<ul class=said>{rows}</ul>"


def _tensors(facts: Facts) -> str:
    names = [f"from {name}" for name in facts.input_names]
    shown = sorted(facts.rows, key=_farthest, reverse=True)[:_MOST_ROWS]
    rows = (
        [row.name, " x ".join(map(str, row.shape)) or "scalar", row.dtype, row.how, *_cells(row, len(names))]
        for row in shown
    )
    table = _table(["tensor", "shape", "dtype", "how", *names], rows, numbers=range(4, 4 + len(names)), names=(0,))
    more = (
        f"<p class=small>The {_MOST_ROWS:,} that moved most of {len(facts.rows):,}.</p>"
        if len(facts.rows) > _MOST_ROWS
        else ""
    )
    return f"<details><summary>{len(facts.rows):,} tensors, the farthest first</summary>{more}{table}</details>"


def _cells(row: Row, count: int) -> list[str]:
    return [_number(row.distances[n]) if n < len(row.distances) else "" for n in range(count)]


def _farthest(row: Row) -> float:
    return max((each for each in row.distances if each is not None), default=-1.0)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Iterable[int] = (),
    names: Iterable[int] = (),
    stacks: bool = False,
) -> str:
    """Returns a table. ``stacks``: on a phone its cells stand one below the other, each with its head."""
    kinds = {**dict.fromkeys(numbers, "n"), **dict.fromkeys(names, "name")}

    def cells(row: Sequence[str], tag: str) -> str:
        told = [f' data-head="{escape(head)}"' for head in heads] if stacks and tag == "td" else [""] * len(row)
        return "".join(f'<{tag} class="{kinds.get(n, "")}"{told[n]}>{escape(cell)}</{tag}>' for n, cell in enumerate(row))

    head = f"<thead><tr>{cells(heads, 'th')}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=scroll><table{' class=stacks' * stacks}>{head}<tbody>{body}</tbody></table></div>"
