"""The version is one, wherever it is asked for."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from conftest import Cli

import streammerge as sm
from streammerge.version import __version__

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_the_version_is_that_of_the_project(cli: Cli) -> None:
    (written,) = re.findall(r'^version = "(.+)"$', PROJECT.read_text(), re.MULTILINE)
    assert written == __version__ == sm.__version__
    assert cli("--version").stdout == f"streammerge, version {written}\n"


def test_the_installed_metadata_agrees() -> None:
    try:
        installed = importlib.metadata.version("streammerge")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("it is not installed, only on the path")
    assert installed == __version__
