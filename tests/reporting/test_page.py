"""The page of a report; how a browser shows it is tested in test_making.py."""

from __future__ import annotations

import pytest

from streammerge.reporting.facts import Facts
from streammerge.reporting.page import page

pytest.importorskip("matplotlib", reason="matplotlib, which draws the pictures, is not installed")


def test_texts_from_files_are_escaped() -> None:
    made = page(Facts("<i>t</i>", "&", summary=[("not used", '<script>alert("x")</script>')], recipe="a: <b>"))
    assert "<i>" not in made
    assert "<script" not in made
    assert "a: &lt;b&gt;" in made


def test_what_is_not_known_is_said() -> None:
    made = page(Facts("t", "s"))
    assert "The distances are not known" in made
    assert "Not recorded" in made
    assert "Every tensor of every input went into the tensor of its own name." in made


def test_on_a_phone_the_cells_of_long_tables_have_their_heads() -> None:
    facts = Facts(
        "t", "s", accounts=[("a", "dropped", 2, "x, y", "the first input lacks it")], summary=[("not compared", "2")]
    )
    made = page(facts)
    assert '<td class="name" data-head="names">x, y</td>' in made
    assert '<div class="lost"><dt>not compared</dt>' in made
    assert "table.stacks td::before { content: attr(data-head)" in made
