"""Output is wrapped and coloured on a terminal of any width, and plain everywhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from streammerge.cli.terminal import _wrapped

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def shown(folder: Path, columns: int, *arguments: object, **environment: str) -> list[str]:
    """Returns the lines that a command prints on a terminal of this width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "streammerge", *map(str, arguments)]
    given = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "TERM")}
    subprocess.run(
        command, cwd=folder, stdout=slave, stderr=slave, env=given | {"TERM": "xterm"} | environment, check=False
    )
    os.close(slave)
    octets = b""
    try:
        while piece := os.read(master, 65536):
            octets += piece
    except OSError:
        pass
    os.close(master)
    return octets.decode().splitlines()


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_every_line_fits(voices: tuple[Path, Path], tmp_path: Path, columns: int) -> None:
    for arguments in (
        ("plan", *voices),
        ("inspect", "news.pth"),
        ("methods", "ties"),
        ("merge", "news.pth", "-o", "news.pth"),
    ):
        lines = [ESCAPE.sub("", line) for line in shown(tmp_path, columns, *arguments)]
        unbroken = [line for line in lines if len(line) > columns and " " in line.strip() and not line.startswith("    ")]
        assert lines
        assert not unbroken


def test_colours_are_for_terminals_that_want_them(voices: tuple[Path, Path], tmp_path: Path) -> None:
    wrong = ("merge", "nothing.pth", "-o", "x.pth")
    assert any(ESCAPE.search(line) for line in shown(tmp_path, 80, *wrong))
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert not any(ESCAPE.search(line) for line in shown(tmp_path, 80, *wrong, **environment))


def test_what_is_piped_is_neither_wrapped_nor_coloured(voices: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streammerge", "plan", *map(str, voices)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "20"}
    )
    assert any(len(line) > 80 for line in done.stdout.splitlines())
    assert not ESCAPE.search(done.stdout)


@pytest.mark.parametrize(
    ("line", "wrapped"),
    [
        ("note     one two three four", ["note     one two", "         three", "         four"]),
        ("error: one two three four", ["error: one two", "       three four"]),
        ("  one two three four five", ["  one two three", "    four five"]),
        ("  streammerge merge a b c d e f", ["  streammerge merge a b c d e f"]),
        ("x" * 30, ["x" * 30]),
        ("", [""]),
    ],
)
def test_the_rest_of_a_line_hangs_below_its_last_column(line: str, wrapped: list[str]) -> None:
    assert _wrapped(line, 17).split("\n") == wrapped


def test_the_shell_completes_options_methods_and_files(tmp_path: Path) -> None:
    (tmp_path / "news.pth").touch()
    for words, wanted in (("merge --on-m", "--on-missing"), ("methods sle", "slerp"), ("merge --method sle", "slerp")):
        typed = f"streammerge {words}"
        environment = {
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split()) - 1),
            "_STREAMMERGE_COMPLETE": "bash_complete",
        }
        command = [sys.executable, "-m", "streammerge"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [f"plain,{wanted}"]
