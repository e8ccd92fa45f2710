"""From what was typed to the arguments of the Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from streammerge.cli.arguments import as_arguments, output_name


@pytest.mark.parametrize(
    ("typed", "arguments"),
    [
        ({}, {}),
        ({"weights": None, "parameters": ()}, {"weights": None, "parameters": {}}),
        ({"weights": "0.6,0.4"}, {"weights": [0.6, 0.4]}),
        ({"weights": "1"}, {"weights": [1.0]}),
        ({"no_normalize": True}, {"normalize": False}),
        ({"no_normalize": False, "no_resume": False}, {}),
        ({"no_resume": True}, {"resume": False}),
        ({"weights": None, "parameters": ("t=0.3",)}, {"weights": None, "parameters": {"t": "0.3"}}),
        (
            {"weights": None, "parameters": ("d=1,2", "x=a=b")},
            {"weights": None, "parameters": {"d": ["1", "2"], "x": "a=b"}},
        ),
        ({"weights": None, "parameters": ("weight=1,2",)}, {"weights": [1.0, 2.0], "parameters": {}}),
        ({"weights": None, "parameters": ("weight=1",)}, {"weights": None, "parameters": {"weight": "1"}}),
        ({"memory": "1GiB", "drop": ("a", "b")}, {"memory": "1GiB", "drop": ("a", "b")}),
    ],
)
def test_what_is_typed_becomes_arguments(typed: dict[str, Any], arguments: dict[str, Any]) -> None:
    before = dict(typed)
    assert as_arguments(typed) == arguments
    assert typed == before


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"weights": "a,b"}, "takes numbers joined by commas, like 0.6,0.4, not a,b"),
        ({"weights": ""}, "takes numbers joined by commas"),
        ({"weights": None, "parameters": ("t",)}, "-p t: write it as NAME=VALUE"),
        ({"weights": None, "parameters": ("t=1", "t=2")}, "-p t is given twice"),
        ({"weights": "1", "parameters": ("weight=2",)}, "-p weight is given twice"),
        ({"weights": None, "parameters": ("weight=1,x",)}, "-p weight takes numbers"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(typed: dict[str, Any], words: str) -> None:
    with pytest.raises(sm.RecipeError, match=words):
        as_arguments(typed)


@pytest.mark.parametrize(
    ("first", "made"),
    [
        ("a.safetensors", "out.safetensors"),
        ("a.pth", "out.pth"),
        ("a.ckpt:0.5", "out.ckpt"),
        ("r.yaml", "out.pt"),
        ("f", "out"),
    ],
)
def test_an_output_without_a_suffix_is_of_the_first_inputs_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "a.pth", "a.ckpt", "b.pt"):
        Path(name).touch()
    Path("f").mkdir()
    Path("r.yaml").write_text("merge_method: linear\nmodels: [b.pt, a.pth]\n")
    said: list[str] = []
    assert output_name("out", [first, "a.pth"][: 1 if first == "r.yaml" else 2], None, said.append) == made
    note = f"note: out is written as {made}, like the first input; out/ would be a folder"
    assert said == ([] if made == "out" else [note])
    for given in ("out/", "out.pth", "f"):
        assert output_name(given, [first], None, said.append) == given
    assert len(said) <= 1


@pytest.mark.parametrize(("first", "made"), [("a.pth", "mean-v0.2.pth"), ("f", "mean-v0.2")])
def test_a_dot_before_a_number_begins_no_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pth").touch()
    Path("f").mkdir()
    said: list[str] = []
    assert output_name("mean-v0.2", [first, first], None, said.append) == made
    assert len(said) == (made != "mean-v0.2")


@pytest.mark.parametrize(
    ("first", "made"), [("g_0500", "out"), ("m.mdl", "out.mdl"), ("m.pth.tar", "out.tar"), ("m-1.5", "out.safetensors")]
)
def test_a_suffix_that_only_the_inputs_program_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(first).touch()
    assert output_name("out", [first], None, str) == made
