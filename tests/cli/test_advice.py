"""Suggestions for mistyped command lines; more of them stand in test_main.py."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest

from streammerge.cli.advice import check_inputs, of_command, of_usage, without_output
from streammerge.cli.main import cli

COMMANDS = ["convert", "help", "inspect", "merge", "methods", "plan", "verify"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["vesion"], "; see `streammerge --help`"),
        (["mrge"], "; did you mean merge?"),
        (["average", "a", "b"], "; did you mean merge?"),
        (["a.pth"], "; to merge, type `streammerge merge a.pth`"),
        (["some/folder", "b"], "; to merge, type `streammerge merge some/folder b`"),
        (["my voice.pth", "b"], "; to merge, type `streammerge merge 'my voice.pth' b`"),
        (["x*.pt"], "; to merge, type `streammerge merge 'x*.pt'`"),
        (["zzz"], "; see `streammerge --help`"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_word_that_is_no_command(typed: list[str], said: str) -> None:
    assert of_command(typed, COMMANDS) == said


def test_an_output_among_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pth").touch()
    assert without_output(["a.pth", "my out.pth"]).endswith("write -o 'my out.pth'")
    for inputs in (["a.pth"], ["absent.pth"], ["b", "a.pth"], ["a.pth", "x*.pth"]):
        assert "add -o OUT" in without_output(inputs)


@pytest.mark.parametrize("option", ["--densty", "--base-modle", "--zzzz", "--no-resum"])
def test_an_unknown_option_gets_one_suggestion(option: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        cli.main(["merge", "a", option, "-o", "x"], prog_name="streammerge", standalone_mode=False)
    said = of_usage(refused.value)
    assert said.lower().count("did you mean") + said.count("see `streammerge merge --help`") == 1


def test_a_capital_letter_for_a_small_one() -> None:
    with pytest.raises(click.UsageError) as refused:
        cli.main(["merge", "a", "-O", "x"], prog_name="streammerge", standalone_mode=False)
    assert of_usage(refused.value).endswith("; did you mean -o?")


def test_a_path_with_a_dash_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-in put.pth").touch()
    words = ["merge", "-in put.pth", "-o", "x"]
    monkeypatch.setattr(sys, "argv", ["streammerge", *words])
    with pytest.raises(click.UsageError) as refused:
        cli.main(words, prog_name="streammerge", standalone_mode=False)
    assert of_usage(refused.value).endswith("; if it is the path, write './-in put.pth'")


def test_a_file_may_have_a_number_as_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.UsageError, match=r"--weights 0\.6,0\.4$"):
        check_inputs(["a", "0.6", "0.4"], None)
    (tmp_path / "0.6").touch()
    check_inputs(["a", "0.6"], None)
