"""``streammerge methods``: the list, a page, and their JSON."""

from __future__ import annotations

import json

from conftest import Cli

import streammerge as sm


def test_every_method_is_listed(cli: Cli) -> None:
    shown = cli("methods").stdout
    listed = [line.split()[0] for line in shown.split("\n\n")[0].splitlines()[1:]]
    assert listed == list(sm.list_methods())
    assert [each["name"] for each in json.loads(cli("methods", "--format", "json").stdout)] == listed


def test_one_method_is_a_page(cli: Cli) -> None:
    shown = cli("methods", "slerp").stdout
    assert shown.startswith("slerp: ")
    assert "  t " in shown
    assert json.loads(cli("methods", "slerp", "--format", "json").stdout)["name"] == "slerp"


def test_an_unknown_method_is_a_mistake(cli: Cli) -> None:
    done = cli("methods", "liner", code=2)
    assert "did you mean linear" in done.stderr
    assert done.stdout == ""
