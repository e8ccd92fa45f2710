"""The C compiler: found, failing, and with other abilities."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from streammerge.compiled import library
from streammerge.compiled.build import compile_library

SOURCE = Path(library.__file__).with_name("arithmetic.c")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@needs_compiler
def test_it_is_compiled_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ("", "-Wall -Wextra -Wconversion -Werror"):
        monkeypatch.setenv("CFLAGS", flags)
        (tmp_path / library.NAME).unlink(missing_ok=True)
        assert compile_library(SOURCE, tmp_path / library.NAME) == ""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv("STREAMMERGE_COMPILED", raising=False)
    assert library._loaded.__wrapped__() is not None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "sh -c 'echo it is broken >&2; exit 3'"])
def test_a_compiler_that_fails_is_told(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    said = compile_library(SOURCE, tmp_path / library.NAME)
    assert said in ("no-such-compiler: No such file or directory", "false ended in 1", "it is broken")
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_the_compiler_can_do_without_copies_for_other_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system's loader cannot choose between them."""
    picky = tmp_path / "picky"
    picky.write_text('#!/bin/sh\ncase "$*" in *CLONES*) exit 1;; esac\nexec cc "$@"\n')
    picky.chmod(0o755)
    monkeypatch.setenv("CC", str(picky))
    assert compile_library(SOURCE, tmp_path / library.NAME) == ""
