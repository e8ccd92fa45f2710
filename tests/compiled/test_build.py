"""The C compiler: found, failing, and with other abilities."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from streammerge.compiled import library
from streammerge.compiled.build import compile_library
from streammerge.compiled.library import address
from streammerge.compiled.sums import CompiledSums
from streammerge.tensors.dtypes import DType

SOURCE = Path(library.__file__).with_name("arithmetic.c")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@needs_compiler
def test_it_is_compiled_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ("", "-Wall -Wextra -Wconversion -Werror"):
        monkeypatch.setenv("CFLAGS", flags)
        (tmp_path / library.NAME).unlink(missing_ok=True)
        assert compile_library(SOURCE, tmp_path / library.NAME) == ""
    assert built_in(tmp_path, monkeypatch) is not None
    monkeypatch.setenv("CFLAGS", "-include no-such-file.h")
    assert "no-such-file.h" in compile_library(SOURCE, tmp_path / library.NAME)


@needs_compiler
def test_flags_that_change_results_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-ffast-math")
    assert compile_library(SOURCE, tmp_path / library.NAME) == ""
    found = built_in(tmp_path, monkeypatch)
    monkeypatch.setattr(library, "_loaded", lambda: found)
    rows = np.random.default_rng(0).normal(size=(2, 5000))
    made = np.zeros(5000)
    sums = CompiledSums([[0.1, 0.7]], [(3.0, True)], [DType.F64, DType.F64], [DType.F64])
    assert sums.put([address(row) for row in rows], [address(made)], 5000) == [True]
    assert np.array_equal(made, (rows[0] * 0.1 + rows[1] * 0.7) / 3.0)


def built_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL | None:
    """Returns the library in a folder."""
    with monkeypatch.context() as patched:
        patched.setattr(library, "__file__", str(folder / "library.py"))
        patched.delenv("STREAMMERGE_COMPILED", raising=False)
        found: ctypes.CDLL | None = library._loaded.__wrapped__()
        return found


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "sh -c 'echo it is broken >&2; exit 3'"])
def test_a_compiler_that_fails_is_told(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    said = compile_library(SOURCE, tmp_path / library.NAME)
    assert said in ("no-such-compiler: No such file or directory", "false ended in 1", "it is broken")
    assert list(tmp_path.iterdir()) == []


@needs_compiler
@pytest.mark.parametrize("refusal", ["exit 1", 'while [ "$1" != -o ]; do shift; done; echo no >"$2"; exit 0'])
def test_the_compiler_can_do_without_copies_for_other_processors(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the compiler does not know them, and where the system's loader cannot choose between them."""
    picky = tmp_path / "picky"
    picky.write_text(f'#!/bin/sh\ncase "$*" in *CLONES*) {refusal};; esac\nexec cc "$@"\n')
    picky.chmod(0o755)
    monkeypatch.setenv("CC", str(picky))
    assert compile_library(SOURCE, tmp_path / library.NAME) == ""
