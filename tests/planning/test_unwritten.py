"""Files that are planned and not written: their texts and headers can be read, the bytes of their tensors cannot."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from streammerge.errors import ChangedError, FormatError
from streammerge.formats.base import LayoutFile, Literal
from streammerge.planning.outputs.layout import Layout, text_file
from streammerge.planning.receipt import Receipt
from streammerge.planning.unwritten import Unwritten
from streammerge.stores.locations import parse


def made(tmp_path: Path) -> Unwritten:
    (tmp_path / "side").write_text("beside")
    weights = LayoutFile("part/w.bin", 10, {"t": 3}, (Literal(0, b"abc"), Literal(8, b"yz")))
    receipt = Receipt({}, {}, {}, 0, "crc32c", {})
    store = Unwritten("s")
    store.add(Layout((weights, text_file("config.json", "{}")), receipt, True, ((parse(tmp_path / "side"), "notes.txt"),)))
    return store


def test_a_folder_of_planned_files(tmp_path: Path) -> None:
    store = made(tmp_path)
    folder = store.folder
    assert str(folder / "config.json") == "<stage s>/config.json"
    assert [each.name for each in folder.children()] == ["config.json", "notes.txt", "part"]
    assert folder.is_folder()
    assert (folder / "part").is_folder()
    assert not (folder / "config.json").is_folder()
    assert (folder / "config.json").read(0, 2) == b"{}"
    assert (folder / "notes.txt").read(0, 6) == b"beside"
    assert (folder / "notes.txt").status() == parse(tmp_path / "side").status()
    assert not (folder / "other").exists()
    with pytest.raises(FormatError, match="does not exist"):
        (folder / "other").read(0, 1)


def test_tensors_are_zeros_until_the_store_is_sealed(tmp_path: Path) -> None:
    store = made(tmp_path)
    file = store.folder / "part" / "w.bin"
    assert file.read(0, 10) == b"abc" + bytes(5) + b"yz"
    assert file.read(4, 5) == bytes(4) + b"y"
    store.sealed = True
    assert file.read(0, 3) == b"abc"
    assert file.read(8, 2) == b"yz"
    for start, nbytes in ((0, 4), (3, 5), (5, 1), (7, 3)):
        with pytest.raises(ChangedError, match="is not stored"):
            file.read(start, nbytes)


def test_the_status_follows_the_bytes(tmp_path: Path) -> None:
    one, two = made(tmp_path), made(tmp_path)
    assert (one.folder / "config.json").status() == (two.folder / "config.json").status()
    two.add(Layout((text_file("config.json", "[]"),), Receipt({}, {}, {}, 0, "crc32c", {})))
    assert (one.folder / "config.json").status() != (two.folder / "config.json").status()


def test_a_worker_process_gets_it_without_files(tmp_path: Path) -> None:
    file = pickle.loads(pickle.dumps(made(tmp_path).folder / "config.json"))
    assert str(file) == "<stage s>/config.json"
    assert not file.exists()
