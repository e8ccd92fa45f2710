"""``streammerge help``; the help itself is tested in test_main.py."""

from __future__ import annotations

import pytest
from conftest import Cli


@pytest.mark.parametrize("name", ["merge", "convert", "verify", "diff", "inspect", "plan", "methods", "help"])
def test_every_command_has_its_help(cli: Cli, name: str) -> None:
    assert cli("help", name).stdout.startswith(f"Usage: streammerge {name} ")
