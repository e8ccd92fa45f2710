"""Formulas as a terminal shows them."""

from __future__ import annotations

import pytest

from streammerge.cli.formula import unicode_formula


@pytest.mark.parametrize(
    ("tex", "shown"),
    [
        ("", ""),
        ("a + b", "a + b"),
        (r"\frac{a + b}{2} \lambda", "(a + b)/2 λ"),
        (r"\tfrac{1}{n}", "1/n"),
        (r"\frac{\frac{a}{b}}{c + d}", "(a/b)/(c + d)"),
        (r"\|w\|", "‖w‖"),
        (r"w_{i}^{n + 1}", "w_i^(n + 1)"),
        (r"\hat w + \bar\theta", "w\u0302 + θ\u0304"),
        (r"\operatorname{sign}(x) \text{ and so on}", "sign(x)  and so on".replace("  ", " ")),
        (r"\left( \sum_i \delta_i \right)", "( Σ_i δ_i )"),
        (r"\unknown{x}", "unknownx"),
    ],
)
def test_formulas(tex: str, shown: str) -> None:
    assert unicode_formula(tex) == shown
