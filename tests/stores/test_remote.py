"""The common part of remote stores, over a store whose failures are made."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

import streammerge as sm
from stores.suite import noise
from streammerge.stores import remote
from streammerge.stores.ahead import Ahead
from streammerge.stores.base import Location, Status
from streammerge.stores.remembering import remembering
from streammerge.stores.remote import PAGE_BYTES, Entries, Passing, RemoteStore


class Failing(RemoteStore):
    """Holds files. ``answer`` may change or refuse what a request gets. ``asked`` counts requests."""

    scheme = "failing"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, Any]] = []
        self.answer: Callable[[bytes], bytes] = bytes

    def look(self, location: Location) -> Status | None:
        self.asked.append(("look", location.key))
        data = self.files.get(location.key)
        return None if data is None else Status((location.key,), len(data), str(hash(data)))

    def entries(self, location: Location) -> Entries:
        self.asked.append(("entries", location.key))
        start = f"{location.key}/"
        below = {name[len(start) :]: data for name, data in self.files.items() if name.startswith(start)}
        files = {
            name: Status((start + name,), len(data), str(hash(data))) for name, data in below.items() if "/" not in name
        }
        return Entries(files, frozenset(name.partition("/")[0] for name in below if "/" in name))

    def fetched(self, location: Location, status: Status, start: int, stop: int, buffers: object = None) -> Any:
        self.asked.append(("fetched", (start, stop)))
        return self.answer(self.files[location.key][start:stop])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Failing:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    made = Failing()
    made.files = {"a/x": noise(200_000), "a/b/y": b"1", "z": b""}
    return made


def test_a_failure_that_passes_is_tried_again(store: Failing) -> None:
    there, numbers = Location(store, "a/x"), itertools.count()

    def answer(data: bytes) -> bytes:
        number = next(numbers)
        if number % 3 == 0:
            raise Passing("503 SlowDown")
        return data[:-1] if number % 3 == 1 else data

    store.answer = answer
    for ahead in (None, Ahead(1 << 20)):
        file = there.open(ahead=ahead)
        buffer = bytearray(100_000)
        file.read_into(memoryview(buffer), 50_000)
        assert buffer == store.files["a/x"][50_000:150_000]


@pytest.mark.parametrize("wrong", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_a_body_of_another_length_is_never_believed(store: Failing, wrong: Callable[[bytes], bytes]) -> None:
    store.answer = wrong
    for ahead in (None, Ahead(1 << 20)):
        with pytest.raises(sm.StoreError, match=r"reading failing://a/x failed \d+ times .* bytes came instead of"):
            Location(store, "a/x").open(ahead=ahead).read_into(memoryview(bytearray(10)), 0)


def test_an_error_that_stays_is_not_tried_again(store: Failing) -> None:
    def answer(data: bytes) -> bytes:
        raise sm.ChangedError("changed")

    store.answer = answer
    with pytest.raises(sm.ChangedError):
        Location(store, "a/x").open().read_into(memoryview(bytearray(10)), 0)
    assert len([each for each in store.asked if each[0] == "fetched"]) == 1


def test_what_was_asked_is_not_asked_again_while_a_plan_is_made(store: Failing) -> None:
    folder = Location(store, "a")
    with remembering():
        assert [each.name for each in folder.children()] == ["b", "x"]
        store.asked.clear()
        assert (folder / "x").size == 200_000
        assert (folder / "x").exists()
        assert (folder / "b").is_folder()
        assert not (folder / "absent").exists()
        assert store.asked == []
        for _ in range(3):
            with (folder / "x").stream() as stream:
                assert stream.read(10) == store.files["a/x"][:10]
                assert stream.read(20) == store.files["a/x"][10:30]
        assert store.asked == [("fetched", (0, PAGE_BYTES))]
        (folder / "x").store.read_heads([folder / "x"])
        assert len(store.asked) == 1
    assert (folder / "x").size == 200_000
    assert len(store.asked) == 2


def test_places_close_together_are_one_request(store: Failing) -> None:
    with remembering(), Location(store, "a/x").stream() as stream:
        sm.stores.streams.read_starts(stream, [0, 1000, 2000, 100_000, 199_999])
        assert sorted(each for _, each in store.asked if isinstance(each, tuple)) == [
            (0, 2512),
            (100_000, 100_512),
            (199_999, 200_000),
        ]
        store.asked.clear()
        for at in (0, 1000, 2000, 100_000, 199_999):
            stream.seek(at)
            assert stream.read(30) == store.files["a/x"][at : at + 30]
        assert store.asked == []


@pytest.mark.parametrize(
    "name", ["mistyped/model", "hf://org/model", "s3://bucket/model.pth", "https://host.invalid/a.pth"]
)
def test_without_a_network_a_mistyped_path_is_told_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """All tries together took 12 seconds for an object store, and 38 for the hub."""
    pytest.importorskip("huggingface_hub" if "://" not in name or name.startswith("hf") else "obstore")
    monkeypatch.setattr(remote, "_reached", threading.Event())
    monkeypatch.setattr(remote.time, "sleep", pytest.fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for variable in ("HF_ENDPOINT", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(variable, "http://host.invalid")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "x")
    with pytest.raises(
        sm.StreammergeError, match=r" failed \(.*(not known|name resolution)\); look at the network, and run it again$"
    ):
        sm.inspect(name)


def test_a_name_that_was_known_before_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([1, 2])

    def ask() -> str:
        if next(failures, None):
            raise remote.Unresolved("not known")
        return "answer"

    monkeypatch.setattr(remote, "_reached", threading.Event())
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with pytest.raises(sm.StoreError, match=r"asking failed \(not known\)"):
        remote.persistently(ask, "asking")
    assert remote.persistently(lambda: 1, "asking") == 1
    assert remote.persistently(ask, "asking") == "answer"
