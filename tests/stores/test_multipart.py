"""Uploads in parts, on a real server."""

from __future__ import annotations

from typing import Any

import pytest

from stores.suite import noise
from streammerge.errors import RecipeError
from streammerge.stores import remote
from streammerge.stores.locations import parse
from streammerge.stores.multipart import Refused, Requests

PART = 5 << 20


def test_parts_in_any_order_become_an_object(s3: str) -> None:
    requests, key = Requests(s3.removeprefix("s3://")), "a b/ü+x.bin"
    data = noise(PART + 10)
    upload = requests.begin(key)
    second = requests.send(key, upload, 2, data[PART:])
    first = requests.send(key, upload, 1, data[:PART])
    assert [(each.number, each.size, each.tag) for each in requests.parts(key, upload)] == [
        (1, PART, first.tag),
        (2, 10, second.tag),
    ]
    assert [(each.key, each.identifier) for each in requests.uploads("a")] == [(key, upload)]
    assert list(requests.uploads("b")) == []
    assert not parse(f"{s3}/{key}").exists()
    requests.complete(key, upload, [second, first], replaces=False)
    there = parse(f"{s3}/{key}")
    assert there.read(0, there.size) == data
    assert list(requests.uploads("")) == []
    assert requests.parts(key, upload) == []
    again = requests.begin(key)
    part = requests.send(key, again, 1, b"other")
    with pytest.raises(Refused, match="412 PreconditionFailed"):
        requests.complete(key, again, [part], replaces=False)
    requests.abort(key, again)
    requests.abort(key, again)
    assert there.read(0, there.size) == data


def test_an_object_is_copied_by_the_server_if_it_has_the_version(s3: str) -> None:
    bucket = s3.removeprefix("s3://")
    requests, source = Requests(bucket), parse(f"{s3}/a b")
    source.write_whole(b"12345", overwrite=False)
    tag = str(source.status().version)
    requests.copy("copy", f"{bucket}/a b", tag)
    assert parse(f"{s3}/copy").read(0, 5) == b"12345"
    upload = requests.begin("parts")
    part = requests.copy_part("parts", upload, 1, f"{bucket}/a b", 1, 4, tag)
    requests.complete("parts", upload, [part], replaces=True)
    assert parse(f"{s3}/parts").read(0, 3) == b"234"


def test_a_part_that_arrives_as_other_bytes_is_sent_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests(s3.removeprefix("s3://"))
    upload, once, seen = requests.begin("x"), Requests._once, list[str]()

    def wrong(self: Requests, method: str, key: str, query: Any, body: Any, *more: Any) -> Any:
        seen.append(method)
        return once(self, method, key, query, b"wrong" if len(seen) < 3 else body, *more)

    with monkeypatch.context() as patched:
        patched.setattr(remote.time, "sleep", lambda seconds: None)
        patched.setattr(Requests, "_once", wrong)
        part = requests.send("x", upload, 1, b"right")
    assert seen == ["PUT"] * 3
    assert [each.tag for each in requests.parts("x", upload)] == [part.tag]
    requests.abort("x", upload)


def test_an_address_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(RecipeError, match="write an address like https://host:port"):
        Requests("bucket")
