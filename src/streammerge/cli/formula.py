"""TeX formulas of docstrings as Unicode text on one line, for a terminal."""

from __future__ import annotations

import re

_SYMBOLS = {
    "alpha": "α", "gamma": "γ", "delta": "δ", "epsilon": "ε", "theta": "θ", "lambda": "λ", "mu": "μ", "rho": "ρ",
    "tau": "τ", "sum": "Σ", "langle": "⟨", "rangle": "⟩", "lfloor": "⌊", "rfloor": "⌋", "cdot": "·", "odot": "⊙",
    "leftarrow": "←", "in": "∈", "le": "≤", "ge": "≥", "ne": "≠", "propto": "∝", "ldots": "…", "qquad": "    ",
    "quad": "  ", "arg": "arg ", "sigma": "σ", "top": "ᵀ", "perp": "⊥", "approx": "≈",
}  # fmt: skip
_ACCENTS = {"hat": "\u0302", "bar": "\u0304"}
_GROUP = r"\{([^{}]*)\}"


def unicode_formula(tex: str) -> str:
    r"""Converts ``\\frac{a + b}{2} \\lambda`` to ``(a + b)/2 λ``."""
    text = tex.replace(r"\|", "‖").replace(r"^\top", r"\top")
    text = re.sub(r"\\(?:textstyle|Big|big|left|right|!)(?![a-z])", "", text)
    text = re.sub(r"\\[,;: ]", " ", text).replace("~", " ").replace(r"\{", "{").replace(r"\#", "#")
    before = None
    while before != text:  # from the inside out
        before = text
        text = re.sub(r"\\(hat|bar)(?:\s+(\w)|\\(\w+))", _accented, text)
        text = re.sub(rf"\\(?:operatorname|mathrm|text){_GROUP}", r"\1", text)
        text = re.sub(rf"\\t?frac{_GROUP}{_GROUP}", lambda m: f"{_grouped(m[1])}/{_grouped(m[2])}", text)
        text = re.sub(rf"([_^]){_GROUP}", lambda m: m[1] + (m[2] if len(m[2]) == 1 else f"({m[2]})"), text)
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _SYMBOLS.get(m[1], m[1]), text)
    return re.sub(r"(?<=\S) {2,3}(?=\S)", " ", text.replace("{", "").replace("}", "")).strip()


def _accented(match: re.Match[str]) -> str:
    return (match[2] or _SYMBOLS.get(match[3], match[3])) + _ACCENTS[match[1]]


def _grouped(text: str) -> str:
    return text if re.fullmatch(r"[\w.]+|\\\w+", text.strip()) else f"({text.strip()})"
