"""The files of this machine, behind the protocol."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import streammerge as sm
from stores.suite import StoreSuite
from streammerge.stores.base import Location
from streammerge.stores.locations import parse


class TestLocalStore(StoreSuite):
    @pytest.fixture
    def home(self, tmp_path: Path) -> Location:
        (tmp_path / "home 1").mkdir()
        return parse(tmp_path / "home 1")

    def remove(self, location: Location) -> None:
        os.unlink(location)


def test_a_local_location_is_path_like(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    with open(parse(tmp_path / "x"), "rb") as stream:
        assert stream.read() == b"12345"
    assert Path(parse(tmp_path / "x")) == tmp_path / "x"
    with pytest.raises(TypeError):
        os.fspath(parse("memory://x"))  # type: ignore[arg-type]


def test_a_link_resolves_to_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "nothing").symlink_to("absent")
    assert parse(tmp_path / "link").resolve() == parse(tmp_path / "x").resolve()
    assert parse(tmp_path / "link") != parse(tmp_path / "x")
    assert parse(tmp_path / "link").status() == parse(tmp_path / "x").status()
    assert parse(tmp_path / "nothing").lexists()
    assert not parse(tmp_path / "nothing").exists()
    assert "which is absent" in parse(tmp_path / "nothing").broken_link()


def test_what_cannot_be_asked_for_ahead_is_no_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", "pipe", "."):
        place = parse(tmp_path / name)
        place.store.will_need(place, [(0, 100)])


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "a\udfff"])
def test_a_name_that_no_system_has_is_absent(name: str) -> None:
    there = parse(name)
    assert not any((there.exists(), there.is_file(), there.is_folder(), there.lexists()))
    with pytest.raises(sm.FormatError):
        there.status()
    there.resolve()


def test_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = parse(tmp_path / "not" / "yet" / "there").free_bytes()
    assert free is not None
    assert abs(free - status.f_bavail * status.f_frsize) < 1 << 30
