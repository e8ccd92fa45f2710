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
