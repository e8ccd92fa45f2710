"""``streammerge clean``; what it finds and removes is tested in tests/stores/test_leftovers.py."""

from __future__ import annotations

from conftest import Cli


def test_it_is_a_command(cli: Cli) -> None:
    assert cli("help", "clean").stdout.startswith("Usage: streammerge clean")
    assert cli("help").stdout.count("  clean ") == 1


def test_an_empty_text_is_not_the_current_folder(cli: Cli) -> None:
    assert "the location is an empty text" in cli("clean", "", "--yes", code=2).stderr
