"""Bytes in the memory of this process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import assert_same, trained
from safetensors.torch import load, save

import streammerge as sm
from stores.suite import StoreSuite
from streammerge.stores.base import Location
from streammerge.stores.locations import parse

_numbers = itertools.count()


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def home(self, tmp_path: Path) -> Iterator[Location]:  # type: ignore[override]
        home = parse(f"memory://test-{next(_numbers)}/home")
        home.make_folder()
        yield home
        assert not sm.memory_store.staged
        sm.memory_store.remove(str(home.parent))

    def remove(self, location: Location) -> None:
        sm.memory_store.remove(str(location))


def test_bytes_are_put_and_got() -> None:
    store = sm.memory_store
    data = bytearray(b"12345")
    store.put("memory://x/a.bin", data)
    data[0] = 0
    assert store.get("x/a.bin") == b"12345"
    assert store.names("x") == store.names("memory://x") == ["x/a.bin"]
    assert "x/a.bin" in store.names()
    store.remove("x")
    assert store.names("x") == []
    with pytest.raises(KeyError):
        store.get("x/a.bin")


def test_a_name_is_the_same_however_it_is_spelled() -> None:
    for text in ("memory://a/b", "memory:///a/b", "memory://a//b", "memory://a/./b/", "memory://a/c/../b", "MEMORY://a/b"):
        assert parse(text) == parse("memory://a/b"), text
    assert parse("memory://a/../../..").key == "."


def test_a_file_and_a_folder_cannot_have_one_name() -> None:
    sm.memory_store.put("f/x", b"1")
    with pytest.raises(IsADirectoryError):
        sm.memory_store.put("f", b"1")
    with pytest.raises(sm.RecipeError, match="is a file"):
        parse("memory://f/x/y").stage()
    with pytest.raises(sm.RecipeError, match="a file has this name"):
        parse("memory://f/x").make_folder()
    with pytest.raises(sm.RecipeError, match="not a name for an output"):
        parse("memory://").stage()
    sm.memory_store.remove("f")


def test_a_merge_between_the_stores(tmp_path: Path) -> None:
    """One input on the disk, one in memory; the output in either is the same but for the names in its recipe."""
    (tmp_path / "a.safetensors").write_bytes(save(trained(1)))
    sm.memory_store.put("b.safetensors", save(trained(1)))
    inputs = [tmp_path / "a.safetensors", "memory://b.safetensors"]
    sm.merge(inputs, "memory://merged.safetensors")
    sm.merge(inputs, tmp_path / "merged.safetensors")
    assert sm.memory_store.get("merged.safetensors") == (tmp_path / "merged.safetensors").read_bytes()
    assert_same(load(sm.memory_store.get("merged.safetensors")), trained(1))
    assert sm.verify("memory://merged.safetensors", inputs=tmp_path, sample="100%").recomputed
    for name in ("b.safetensors", "merged.safetensors"):
        sm.memory_store.remove(name)


def test_an_interrupted_merge_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.stores.journal.INTERVAL_SECONDS", 0.001)
    for number in range(2):
        sm.memory_store.put(f"m/{number}.safetensors", save(trained(number)))
    inputs = ["memory://m/0.safetensors", "memory://m/1.safetensors"]
    sm.merge(inputs, "memory://m/whole.safetensors")
    resumed = []

    def interrupt(event: object) -> None:
        import time

        if type(event).__name__ == "TaskDone":
            time.sleep(0.02)
        if type(event).__name__ == "Syncing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge(inputs, "memory://m/out.safetensors", listener=interrupt)
    sm.merge(inputs, "memory://m/out.safetensors", listener=lambda e: resumed.append(type(e).__name__))
    assert "Resumed" in resumed
    assert sm.memory_store.get("m/out.safetensors") == sm.memory_store.get("m/whole.safetensors")
    assert sm.memory_store.names("m") == [f"m/{n}.safetensors" for n in ("0", "1", "out", "whole")]
    sm.memory_store.remove("m")
