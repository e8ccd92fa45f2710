"""What the protocol gives to stores that bring the least."""

from __future__ import annotations

import io

import pytest

import streammerge as sm
from streammerge.stores.ahead import Ahead
from streammerge.stores.base import Input, Joint, Location, Staging, Status
from streammerge.stores.commit import LocalStaging
from streammerge.stores.joint import LocalJoint
from streammerge.stores.memory import MemoryStaging


class Few(sm.Store):
    """A store with the four methods that must be there."""

    scheme = "few"
    FILES = {"a": bytes(range(100)), "folder/b": b"", "folder/c.x": b"c", "folder/.d.x": b"d"}

    def status(self, location: Location) -> Status:
        if location.key not in self.FILES:
            raise sm.FormatError(f"{location} is absent")
        return Status((location.key,), len(self.FILES[location.key]), 1)

    def is_folder(self, location: Location) -> bool:
        return location.key in (".", "folder")

    def list_names(self, location: Location) -> list[str]:
        start = "" if location.key == "." else f"{location.key}/"
        return list({name[len(start) :].partition("/")[0] for name in self.FILES if name.startswith(start)})

    def opened(self, location: Location) -> Input:
        self.status(location)
        return FewInput(location, self.FILES[location.key])


class FewInput(Input):
    def __init__(self, location: Location, data: bytes) -> None:
        self.location, self.size, self._data = location, len(data), data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset + len(buffer) > self.size:
            raise self.ended(offset, len(buffer))
        buffer[:] = self._data[offset : offset + len(buffer)]


STORE = Few()


def at(key: str) -> Location:
    return STORE.parse(f"few://{key}")


def test_what_is_there_follows_from_status_and_folders() -> None:
    assert at("a").is_file()
    assert at("folder").exists()
    assert not at("folder").is_file()
    assert not at("b").exists()
    assert not at("b").lexists()
    assert at("a").broken_link() == ""
    assert at("a").local_path is None
    assert at("a").free_bytes() is None
    assert [str(each) for each in at("folder").children()] == ["few://folder/.d.x", "few://folder/b", "few://folder/c.x"]


def test_a_stream_and_a_view_follow_from_reading() -> None:
    with at("a").stream() as stream:
        assert stream.seek(-3, io.SEEK_END) == 97
        assert stream.read(100) == bytes((97, 98, 99))
        with pytest.raises(ValueError, match="negative"):
            stream.seek(-1)
    assert at("a").open().view(10, 3) == bytes((10, 11, 12))
    with pytest.raises(sm.ChangedError):
        at("a").open().view(99, 2)


def test_patterns_follow_from_listing() -> None:
    assert [each.key for each in at("folder/*.x").glob()] == ["folder/c.x"]
    assert [each.key for each in at("folder/.*.x").glob()] == ["folder/.d.x"]
    assert [each.key for each in at("*/b").glob()] == ["folder/b"]
    assert [each.key for each in at("a").glob()] == ["a"]
    assert at("b").glob() == at("b*/x").glob() == []


def test_a_change_is_noticed_by_the_status() -> None:
    now = at("a").status()
    assert at("a").open(now).size == 100
    with pytest.raises(sm.ChangedError, match="changed since"):
        at("a").open(now._replace(version=2))
    with pytest.raises(sm.ChangedError, match="is gone since"):
        at("absent").open(now)


def test_it_can_be_read_only() -> None:
    for ask in (
        lambda: at("x").stage(),
        lambda: at("x").check_writable(overwrite=True),
        lambda: at("x").write_whole(b"", overwrite=True),
        lambda: at("x").make_folder(),
    ):
        with pytest.raises(sm.RecipeError, match="few://x: the store few:// can be read only"):
            ask()
    at("x").sweep()


def test_a_store_that_promises_more_than_it_has_is_told() -> None:
    """What is asked of some stores only has no abstract method, so that a store need not name what it does not do."""

    class Bare(LocalJoint):
        open_part, sent_part = Joint.open_part, Joint.sent_part

    joint = Bare(at("x"), at("home"))
    with pytest.raises(sm.RecipeError, match="Bare lacks open_part; add the method, or say shares_files = False"):
        joint.open_part("a", 3)
    with pytest.raises(sm.RecipeError, match="Bare lacks sent_part"):
        joint.sent_part(joint.out.store, 0, 3)  # type: ignore[arg-type]
    with pytest.raises(sm.RecipeError, match="few:// says reads_ahead and lacks opened_ahead"):
        at("a").store.opened_ahead(at("a"), None, Ahead(1 << 20))
    with pytest.raises(sm.RecipeError, match="several machines cannot write to the store few://"):
        at("x").join("key")


@pytest.mark.parametrize("staging", [LocalStaging, MemoryStaging])
def test_a_staging_keeps_no_books_of_its_own(staging: type[Staging]) -> None:
    """A store says how a file is opened. The names of the files are kept in one place for all stores."""
    assert not {"create", "temporary", "outputs", "place", "close_files"} & vars(staging).keys()
