"""The command line as a user sees it: its output, its streams, and its exit codes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cli


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["merge", "absent.pth", "-o", "x.pth"], 2, "absent.pth does not exist"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "1", "-o", "x.pth"], 2, "1 weights for 2 inputs"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "a,b", "-o", "x.pth"], 2, "takes numbers joined by commas"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "1,-1", "-o", "x.pth"], 2, "sum to zero"),
        (["merge", "news.pth", "-o", "x.txt"], 2, "x.txt does not say what to write"),
        (["merge", "news.pth", "-o", "news.pth"], 2, "exists already"),
        (["merge", "news.pth", "-o", "news.pth", "--overwrite"], 4, "is one of the inputs"),
        (["merge", "news.pth", "-o", "nowhere/x.pth"], 2, "does not exist; make it first"),
        (["merge", "news.pth", "-o", "x.pth", "--method", "liner"], 2, "did you mean linear"),
        (["merge", "news.pth", "-o", "x.pth", "--dtype", "bflot16"], 2, "did you mean bfloat16"),
        (["merge", "news.pth", "-o", "x.pth", "--memory", "1MiB"], 5, "pass --memory"),
        (["merge", "news.pth", "-o", "x.pth", "--memory", "lots"], 2, "is not a size"),
        (["merge", "n*.pt", "-o", "x.pth"], 2, "nothing matches"),
        (["merge", "news.pth", "-o", "x.pth", "--last", "3"], 2, "there are only 1"),
        (["merge", "news.pth", "-o", "x.pth", "-p", "density=0.5"], 2, "density"),
        (["merge", "news.pth", "broken.pth", "-o", "x.pth"], 4, "broken.pth is a Git LFS pointer"),
        (["merge", "news.pth", "other.pth", "-o", "x.pth"], 4, "do not have the same tensors"),
        (["inspect", "broken.pth"], 4, "git lfs pull"),
        (["frobnicate"], 2, "no such command 'frobnicate'; see `streammerge --help`"),
        (["merge", "news.pth", "-o", "x.pth", "--wieghts", "1"], 2, "no such option '--wieghts'; did you mean --weights?"),
        (["merge", "newz.pth", "-o", "x.pth"], 2, "newz.pth does not exist; did you mean news.pth?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_sentence_and_its_exit_code(
    cli: Cli, tmp_path: Path, voices: tuple[Path, Path], arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "broken.pth").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pth")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = cli(*arguments, code=code)
    assert said in done.stderr
    assert done.stdout == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    command = [sys.executable, "-m", "streammerge", "inspect", str(tmp_path / "x.pth"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "Traceback" in done.stderr


def test_a_terminal_shows_progress_and_leaves_a_clean_screen(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "streammerge", "merge", *map(str, voices), "-o", str(tmp_path / "voice.pth")]
    subprocess.run(command, stdout=slave, stderr=slave, check=True)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:
        pass
    text = shown.decode()
    assert "memory" in text
    assert "of 512 MiB" in text
    assert "peak memory" in text.splitlines()[-2], "the last sentence takes two lines of 80 columns"
