"""The inputs of a run: opened once, let go when there are many, noticed when they change."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge as sm
from stores.suite import noise
from stores.test_remote import Failing
from streammerge.stores import descriptors
from streammerge.stores.base import Damage, Location
from streammerge.stores.inputs import InputFiles
from streammerge.stores.locations import parse


def test_an_input_that_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    location = parse(path)
    planned = {location: location.status()}
    path.write_bytes(b"123456")
    with pytest.raises(sm.ChangedError, match="changed since it was planned"):
        InputFiles(planned).get(location)
    with pytest.raises(sm.ChangedError):
        InputFiles(planned).check_unchanged()


def test_the_longest_unused_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "limit", lambda: 3)
    places = [parse(tmp_path / str(number)) for number in range(4)]
    for place in places:
        place.write_whole(b"12345", overwrite=False)
    inputs = InputFiles({})
    first, second, _ = (inputs.get(place) for place in places[:3])
    assert inputs.get(places[0]) is first
    inputs.get(places[3])
    assert inputs.get(places[0]) is first
    assert inputs.get(places[1]) is not second
    second.read_into(memoryview(bytearray(5)), 0)  # whoever holds it still reads


def test_ranges_that_lie_apart_are_asked_for_alone(tmp_path: Path) -> None:
    data = noise(3_000_000)
    local, store = parse(tmp_path / "x"), Failing()
    local.write_whole(data, overwrite=False)
    store.files = {"x": data}
    for place in (local, Location(store, "x")):
        inputs = InputFiles({place: place.status()}, ahead_bytes=16 << 20)
        found = inputs.alone([(place, 2_000_000, 70), (place, 5, 3), (place, 2_999_999, 1), (place, 7, 0)])
        assert [*map(bytes, found)] == [data[2_000_000:2_000_070], data[5:8], data[-1:], b""]
        with pytest.raises(sm.ChangedError, match="ended before byte 3000001"):
            inputs.alone([(place, 2_999_999, 2)])
        inputs.close()
    assert sorted(span for what, span in store.asked if what == "fetched") == [
        (5, 8),
        (2_000_000, 2_000_070),
        (2_999_999, 3_000_000),
    ]


def test_damage_is_told_by_its_cause(tmp_path: Path) -> None:
    place = parse(tmp_path / "x")
    place.write_whole(b"12345", overwrite=False)
    inputs = InputFiles({})
    inputs.check_whole()
    inputs._damaged.append(Damage(place, 5))
    with pytest.raises(OSError, match="the disk or the network failed"):
        inputs.check_whole()
    inputs._damaged[:] = [Damage(place, 6)]
    with pytest.raises(sm.ChangedError, match="was truncated while it was read"):
        inputs.check_whole()
    (tmp_path / "x").unlink()
    with pytest.raises(sm.ChangedError, match="was truncated while it was read"):
        inputs.check_whole()


def test_an_input_that_is_gone_at_the_end_may_come_back(tmp_path: Path) -> None:
    """A drive that was unmounted: what was made is kept, since the error has the cause of a machine that failed."""
    (tmp_path / "x").write_bytes(b"1234")
    place = parse(tmp_path / "x")
    inputs = InputFiles({place: place.status()})
    (tmp_path / "x").rename(tmp_path / "y")
    with pytest.raises(
        sm.ChangedError, match=r"x: No such file or directory; it was there when the run began, so put"
    ) as caught:
        inputs.check_unchanged()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
