"""The examples of CONTRIBUTING work: applied to a copy of the project they pass the suites, and have the stated length."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
EXAMPLES = {
    "A merge method": ["tests/methods/test_registry.py", "tests/methods/test_contracts.py"],
    "A format": ["tests/formats/test_detect.py"],
    "A store": ["tests/stores/test_registry.py"],
    "A source": [],
    "An executor": [],
}
EVERY = ("tests/test_house.py", "tests/options/test_functions.py")
"""Tests that look at all that is known by name, and must not ask for a change elsewhere."""


def blocks(section: str, kind: str) -> dict[str, str]:
    """Returns path -> text of the files, or of the changes, that a section shows."""
    found = re.findall(rf"^```{kind}\n# (\S+)\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("section", EXAMPLES)
def test_an_example_fits(section: str, tmp_path: Path) -> None:
    check_that_they_fit([section], tmp_path)


def test_all_examples_fit_at_once(tmp_path: Path) -> None:
    check_that_they_fit([*EXAMPLES], tmp_path)


def check_that_they_fit(sections: list[str], tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for folder in ("src", "tests", "examples", "benchmarks", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for path in ROOT.glob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tmp_path)
    made = {path: text for section in sections for path, text in blocks(section, "python").items()}
    for path, text in made.items():
        assert not (tmp_path / path).exists()
        (tmp_path / path).write_text(text)
    commands = [
        ["ruff", "check", "--no-cache", *made],
        ["ruff", "format", "--no-cache", "--check", *made],
        ["pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *EVERY]
        + [path for section in sections for path in EXAMPLES[section]]
        + [path for path in made if path.startswith("tests/")],
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    for command in commands:
        call = [sys.executable, "-m", *command]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_measured_numbers_are_those_of_the_examples() -> None:
    told = re.findall(r"^\| (an? [\w ]+) \| (\d+) \| (\d+) \| (\d+) \|$", SECTIONS["Measured"], re.MULTILINE)
    counted = []
    for section in EXAMPLES:
        files = blocks(section, "python")
        lines = sum(text.strip().count("\n") + 1 for text in files.values())
        counted.append((section[0].lower() + section[1:], str(len(files)), str(lines), "0"))
    assert told == counted


def test_no_example_changes_a_file_that_is_there() -> None:
    assert "```diff" not in TEXT


def test_the_package_with_plugins_is_the_one_that_is_tested() -> None:
    section = "A plug-in of another package"
    ((path, text),) = blocks(section, "toml").items()
    assert text.strip() in (ROOT / path).read_text()
    code = (ROOT / "tests/plugin/streammerge_example.py").read_text()
    assert f"{code.count(chr(10))} lines" in SECTIONS[section]
