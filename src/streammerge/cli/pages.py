"""Pages of merge methods, made from their contracts and docstrings."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

from streammerge.cli.formula import unicode_formula
from streammerge.cli.terminal import WIDTH

if TYPE_CHECKING:
    from streammerge.methods.contracts import MergeMethod, Parameter


def methods_table(methods: list[MergeMethod]) -> str:
    """Returns the table that ``methods`` prints: one line per method."""
    rows = [(m.name, _models(m), _base(m), " ".join(_plain(m.summary, WIDTH).split())) for m in methods]
    head = ("method", "models", "base", "")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(3)]
    lines = [
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row[:3], widths, strict=True)), row[3]]) for row in (head, *rows)
    ]
    lines += [
        "",
        "`streammerge methods NAME` shows parameters, formula and paper; --method package.module:function runs your own.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def method_page(method: MergeMethod, width: int) -> str:
    """Returns the page that ``methods NAME`` prints, in ``width`` columns."""
    count = _models(method).replace("any", "any number of") + (" model" if method.models[1] == 1 else " models")
    head = f"{method.name}: {count}, {_BASE_WORDS[method.base]}"
    longest = max((len(p.name) for p in method.parameters.values()), default=0)
    rows = [f"  {p.name:<{longest}}  {_parameter(p)}" for p in method.parameters.values()]
    shown = ["parameters (-p NAME=VALUE):", *rows] if rows else ["no parameters"]
    return "\n".join([head, "", *shown, "", _plain(method.doc, width)])


_BASE_WORDS = {
    "required": "--base required",
    "optional": "--base optional",
    "model": "one of which --base may name",
    "unused": "no --base",
}


def _base(method: MergeMethod) -> str:
    return {"model": "a model", "unused": "-"}.get(method.base, method.base)


def _models(method: MergeMethod) -> str:
    least, most = method.models
    if least == 0:
        return "any"
    return f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"


def _parameter(parameter: Parameter) -> str:
    kind = "one number per input, or one for all" if parameter.per_model else _KINDS[parameter.kind]
    if parameter.required:
        return f"{kind}; required"
    default = parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default
    return f"{kind}; default {str(default).lower()}"


_KINDS = {"float": "number", "int": "whole number", "bool": "true or false", "any": "any"}


def _plain(doc: str, width: int) -> str:
    """Returns a docstring without its markup, with each paragraph wrapped to ``width`` columns."""
    shown = []
    for paragraph in doc.split("\n\n"):
        if paragraph.startswith(".. math::"):
            formula = " ".join(line.strip() for line in paragraph.removeprefix(".. math::").splitlines())
            lines = [line.strip() for line in unicode_formula(formula).split("    ")]
            shown.append("\n".join(f"    {line}" for line in lines if line))
        else:
            text = re.sub(r":math:`([^`]*)`", lambda m: unicode_formula(m[1]), " ".join(paragraph.split()))
            text = re.sub(r"``([^`]*)``", r"\1", re.sub(r"(?<!\w)\*(\S[^*]*)\*", r"\1", text))
            shown.append(textwrap.fill(text, width, break_on_hyphens=False))
    return "\n\n".join(shown)


def method_json(method: MergeMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "models": list(method.models),
        "base": method.base,
        "granularity": method.granularity,
        "parameters": {
            p.name: {
                "kind": p.kind,
                "per_model": p.per_model,
                "required": p.required,
                **({} if p.required else {"default": p.default[0] if isinstance(p.default, tuple) else p.default}),
            }
            for p in method.parameters.values()
        },
        "doc": method.doc,
    }
