"""Heat maps and curves as SVG, by matplotlib. Texts and lines have the colour of the page around them, light or dark."""

from __future__ import annotations

import io
import logging
import re
import zlib
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.reporting.facts import Grid, Sample, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _LINE = "#102030", "#405060"
"""Colours that stand for those of the page."""
_WIDTH = 3.9
"""Inches: an SVG of this width is readable on a phone as it is."""
_MIB, _MB = 1 << 20, 1e6
_STEPS = 40
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "streammerge",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.titlesize": 10.0,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def heat_map(grid: Grid) -> str:
    """Returns a grid as SVG: layers from top to bottom, kinds of tensors from left to right."""

    def draw(figure: Figure) -> None:
        rows, columns = len(grid.layers), len(grid.kinds)
        values = [[float("nan") if cell is None else cell for cell in line] for line in grid.values]
        axes = figure.subplots()
        top, cut = scale_of([cell for line in grid.values for cell in line if cell is not None])
        mesh = axes.pcolormesh(values, cmap="viridis", vmin=0.0, vmax=top, edgecolors="none")
        axes.invert_yaxis()
        labels = shortened(grid.layers)
        step = max(rows // 32, 1)
        axes.set_yticks([n + 0.5 for n in range(0, rows, step)], labels[::step], fontsize=8 if rows < 24 else 7)
        axes.set_xticks([n + 0.5 for n in range(columns)], grid.kinds, rotation=90, fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for row, (line, cells) in enumerate(zip(grid.marks, grid.values, strict=False)):
            for column, (mark, cell) in enumerate(zip(line, cells, strict=True)):
                if mark:
                    colour = _INK if cell is None else "black" if cell > 0.6 * top else "white"
                    centre = {"ha": "center", "va": "center"}
                    axes.text(column + 0.5, row + 0.5, mark, **centre, fontsize=7, color=colour)  # type: ignore[arg-type]
        more: Any = "max" if cut else "neither"
        bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", shrink=0.8, aspect=30, pad=0.02, extend=more)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        bar.ax.locator_params(nbins=4)

    longest = max(map(len, grid.kinds), default=0)
    height = 1.0 + 0.065 * longest + max(min(0.19 * len(grid.layers), 9.0), 0.4)
    return _svg(draw, height, f"Distance of the output from {grid.title}, by layer and kind of tensor")


def scale_of(known: Sequence[float]) -> tuple[float, bool]:
    """Returns the largest distance of a scale of colours, and whether some are larger: a few that lie far above all others
    would leave no colours for these."""
    top = max(known, default=0.0) or 1.0
    most = 2 * sorted(known)[int(0.9 * (len(known) - 1))] if known else 0.0
    return (most, True) if 0 < 2 * most < top else (top, False)


def curves(samples: Sequence[Sample], memory_bytes: int) -> str:
    """Returns memory against the budget, and throughput, over time."""

    def draw(figure: Figure) -> None:
        memory, speed = figure.subplots(2, 1, sharex=True)
        times = [each.seconds for each in samples]
        memory.plot(times, [each.memory_bytes / _MIB for each in samples], color="#00798c", linewidth=1.8)
        memory.axhline(memory_bytes / _MIB, color="#d1495b", linewidth=1.4, linestyle="--")
        place: Any = (0.99, memory_bytes / _MIB)
        memory.annotate("budget", place, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        memory.set_ylim(0, memory_bytes / _MIB * 1.18)
        memory.set_title("memory above start-up (MiB)", loc="left")
        speed.plot(*throughput(samples), color="#66a182", linewidth=1.8)
        speed.set_ylim(0, None)
        speed.set_title("throughput (MB/s)", loc="left")
        speed.set_xlabel("seconds")
        for axes in (memory, speed):
            axes.grid(visible=True, color=_LINE, alpha=0.25, linewidth=0.6)

    return _svg(draw, 3.6, "Memory and throughput over time")


def throughput(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Returns times and MB per second, in some forty steps of equal length."""
    begin, end = samples[0].seconds, samples[-1].seconds
    step = max((end - begin) / _STEPS, 1e-9)
    some = [samples[0]]
    for each in samples[1:]:
        if each.seconds - some[-1].seconds >= step:
            some.append(each)
    if len(some) < 2:
        some.append(samples[-1])
    else:  # what came after the last step belongs to it
        some[-1] = samples[-1]
    speeds = [(b.done_bytes - a.done_bytes) / max(b.seconds - a.seconds, 1e-9) / _MB for a, b in pairwise(some)]
    if len(speeds) == 1:
        return [begin, end], speeds * 2
    return [each.seconds for each in some[1:]], speeds


def _svg(draw: Callable[[Figure], None], height: float, label: str) -> str:
    """Returns a picture as an SVG element. Raises RecipeError if matplotlib is not installed."""
    mpl: Any = plotting()
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        figure.patch.set_alpha(0.0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0.0)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace(_INK, "currentColor").replace(_LINE, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    own = f"p{zlib.crc32((label + text).encode()):08x}-"  # tells the parts of several pictures on one page apart
    text = re.sub(r'\b(id=")|(href="#)', rf"\g<0>{own}", text).replace("url(#", f"url(#{own}")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def plotting() -> Any:
    """Returns matplotlib. Raises RecipeError if it is not installed."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # it would tell at length that a home folder cannot be written
    try:
        import matplotlib as mpl

        mpl.get_configdir()
        mpl.get_cachedir()
    except ModuleNotFoundError as error:
        raise RecipeError(
            "reports are drawn by matplotlib, which is not installed; pip install 'streammerge[report]'"
        ) from error
    finally:
        log.setLevel(level)
    return mpl
