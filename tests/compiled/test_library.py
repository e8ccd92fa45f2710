"""The compiled functions: that they are built and found, and that nothing fails without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streammerge.compiled import library
from streammerge.compiled.build import compile_library

SOURCE = Path(library.__file__).with_name("arithmetic.c")
CODE = "from streammerge.compiled import library; print(library.library() is not None)"


def test_version_and_functions_are_those_of_the_source() -> None:
    text = SOURCE.read_text()
    assert f"#define VERSION {library.VERSION} " in text
    assert f"#define LANES {library.LANES}\n" in text
    assert f"#define SUMMED ({library.SUMMED // library.LANES} * LANES)\n" in text
    for name, arguments in library._FUNCTIONS.items():
        declared = text.partition(f" streammerge_{name}(")[2].partition(")")[0]
        assert declared.count(",") + 1 == len(arguments)


@pytest.mark.parametrize("wanted", ["0", ""])
def test_the_environment_leaves_them_unused(wanted: str) -> None:
    environment = {**os.environ, "STREAMMERGE_COMPILED": wanted}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wanted == "" and library.library() is not None)


@pytest.mark.parametrize("damage", ["absent", "text", "older", "other"])
def test_a_library_that_is_none_is_not_used(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    path = tmp_path / library.NAME
    code = {
        "older": f"int streammerge_version(void) {{ return {library.VERSION - 1}; }}",
        "other": f"int streammerge_version(void) {{ return {library.VERSION}; }}",  # without the functions
    }.get(damage)
    if code is not None:
        source = tmp_path / "source.c"
        source.write_text(code)
        assert not compile_library(source, path)
    elif damage == "text":
        path.write_text("no library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library._loaded.__wrapped__() is None
