"""A clean interpreter says which pickle it cannot load."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest

from streammerge.running.executors.importing import first_not_loadable, importable_path
from streammerge.units import PAGE_BYTES

MODULE = """
print("a print that must not be taken for the answer")


class Thing:
    def __setstate__(self, state):
        raise ZeroDivisionError("of its own")


class Ends:
    def __setstate__(self, state):
        import os
        os._exit(7)
"""


def pickled(module: str, name: str, state: bytes = b"") -> bytes:
    """Returns the pickle of an object of that class."""
    return b"c" + f"{module}\n{name}\n".encode() + b")\x81" + state + b"."


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_everything_can_be_loaded(tmp_path: Path) -> None:
    assert str(tmp_path) in importable_path()
    assert first_not_loadable([]) is None
    assert first_not_loadable([pickle.dumps(PAGE_BYTES), pickled("own_module", "Thing"), pickle.dumps([])]) is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickled("no_such_module", "Thing"), "ModuleNotFoundError: No module named 'no_such_module'"),
        (pickled("own_module", "Missing"), "AttributeError: .*Missing"),
        (pickled("own_module", "Thing", b"}b"), "ZeroDivisionError: of its own"),
    ],
)
def test_the_first_that_cannot_be_loaded(data: bytes, said: str) -> None:
    found = first_not_loadable([pickle.dumps(1), pickled("own_module", "Thing"), data, pickled("none", "Thing")])
    assert found is not None
    number, why = found
    assert number == 2
    assert re.match(said, why), why


def test_an_interpreter_that_ends(tmp_path: Path) -> None:
    found = first_not_loadable([pickled("own_module", "Ends", b"}b")])
    assert found == (0, "the interpreter that imports it ended with exit code 7")
    assert "own_module" not in sys.modules
