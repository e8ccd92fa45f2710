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
    "A merge method": ["tests/methods/test_registry.py"],
    "A format": ["tests/formats/test_detect.py"],
    "An executor": [],
}


def blocks(section: str, kind: str) -> dict[str, str]:
    """Returns path -> text of the files, or of the changes, that a section shows."""
    found = re.findall(rf"^```{kind}\n# (\S+)\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return dict(found)


def applied(text: str, change: str) -> str:
    """Applies the lines of a diff to a text. The removed lines must occur exactly once."""
    rows = change.splitlines()
    before = "\n".join(row[1:] for row in rows if row[0] in " -")
    after = "\n".join(row[1:] for row in rows if row[0] in " +")
    assert text.count(before) == 1
    return text.replace(before, after)


@pytest.mark.parametrize("section", EXAMPLES)
def test_an_example_fits(section: str, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    made = blocks(section, "python")
    for path, text in made.items():
        assert not (tmp_path / path).exists()
        (tmp_path / path).write_text(text)
    for path, change in blocks(section, "diff").items():
        (tmp_path / path).write_text(applied((tmp_path / path).read_text(), change))
    commands = [
        ["ruff", "check", "--no-cache", *made],
        ["ruff", "format", "--no-cache", "--check", *made],
        ["pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_house.py", *EXAMPLES[section]]
        + [path for path in made if path.startswith("tests/")],
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    for command in commands:
        call = [sys.executable, "-m", *command]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_measured_numbers_are_those_of_the_examples() -> None:
    told = re.findall(r"^\| (an? [\w ]+) \| (\d+) \| (\d+) \| (\d+) \|$", SECTIONS["Measured"], re.MULTILINE)
    counted = []
    for section in EXAMPLES:
        files, changes = blocks(section, "python"), blocks(section, "diff")
        lines = sum(text.strip().count("\n") + 1 for text in files.values())
        changed = sum(len(re.findall(r"^\+", change, re.MULTILINE)) for change in changes.values())
        counted.append((section[0].lower() + section[1:], str(len(files)), str(lines), str(changed)))
    assert told == counted
