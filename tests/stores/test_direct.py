"""Ranges read by the kernel into place: the bytes that were asked for, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import use_s3

from fault_proxy import FaultProxy
from stores.suite import noise
from streammerge.errors import ChangedError, StoreError
from streammerge.stores import direct, multipart
from streammerge.stores.ahead import Ahead
from streammerge.stores.buffers import Buffers
from streammerge.stores.locations import parse
from streammerge.stores.multipart import Requests
from streammerge.stores.remote import Passing, RangedInput
from streammerge.stores.s3 import S3
from streammerge.stores.signing import Credentials

SIZE = 3_000_001


@pytest.fixture
def proxied(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, bytes, FaultProxy]]:
    """A bucket with one object, its bytes, and a proxy that makes no faults yet."""
    data = noise(SIZE)
    parse(f"{s3}/x").write_whole(data, overwrite=False)
    proxy = FaultProxy(s3_server, share=0.0, in_a_row=1 << 30)
    use_s3(proxy.address, monkeypatch)
    yield s3.removeprefix("s3://"), data, proxy
    proxy.close()


def read(bucket: str, key: str, start: int, nbytes: int, tag: str = "") -> tuple[direct.Range | None, bytes]:
    buffer = memoryview(bytearray(nbytes))
    return direct.read_range(Requests(bucket), key, start, buffer, tag, 0.4), bytes(buffer)


@pytest.mark.parametrize(("start", "stop"), [(0, SIZE), (5, 6), (1_000_000, 2_999_999), (SIZE - 1, SIZE)])
def test_a_range_is_the_bytes_that_were_asked_for(proxied: tuple[str, bytes, FaultProxy], start: int, stop: int) -> None:
    bucket, data, _ = proxied
    found, got = read(bucket, "x", start, stop - start)
    assert found is not None
    assert found.size == SIZE
    assert got == data[start:stop]


def test_another_version_is_not_read(proxied: tuple[str, bytes, FaultProxy]) -> None:
    bucket, data, _ = proxied
    found, _ = read(bucket, "x", 0, 10)
    assert found is not None
    assert read(bucket, "x", 0, 10, found.tag) == (found, data[:10])
    assert read(bucket, "x", 0, 10, '"0123456789abcdef0123456789abcdef"')[0] is None
    assert read(bucket, "gone", 0, 10)[0] is None


def test_another_range_of_the_same_length_is_not_taken(
    proxied: tuple[str, bytes, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, _, _ = proxied
    answered = Requests.answered

    def shifted(self: Requests, *asked: Any) -> Any:
        *others, headers = asked
        first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
        return answered(self, *others, headers | {"range": f"bytes={first + 1}-{last + 1}"})

    monkeypatch.setattr(Requests, "answered", shifted)
    with pytest.raises(Passing, match="the bytes 8-17 came instead of those asked for"):
        read(bucket, "x", 7, 10)


@pytest.mark.parametrize("fault", ["drop", "reset", "503", "500", "short", "long", "stall"])
def test_a_fault_is_an_error_and_the_connection_is_not_used_again(
    proxied: tuple[str, bytes, FaultProxy], fault: str
) -> None:
    bucket, data, proxy = proxied
    requests, buffer = Requests(bucket), memoryview(bytearray(2_000_000))
    direct.read_range(requests, "x", 0, buffer, "", 0.4)
    proxy.faults, proxy._share = (fault,), 1.0
    with pytest.raises(Passing):
        direct.read_range(requests, "x", 7, buffer, "", 0.4)
    proxy._share = 0.0
    assert direct.read_range(requests, "x", 9, buffer, "", 0.4)
    assert bytes(buffer) == data[9:2_000_009]


def test_a_server_that_refuses_is_told(proxied: tuple[str, bytes, FaultProxy]) -> None:
    bucket, _, _ = proxied
    with pytest.raises(StoreError, match=r"416"):
        read(bucket, "x", SIZE + 5, 10)


def test_blocks_are_read_in_this_way(proxied: tuple[str, bytes, FaultProxy], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, data, _ = proxied
    used = list[int]()

    def counted(requests: Requests, key: str, start: int, *rest: object) -> direct.Range | None:
        used.append(start)
        return before(requests, key, start, *rest)  # type: ignore[arg-type]

    before = direct.read_range
    monkeypatch.setattr(direct, "read_range", counted)
    location = parse(f"s3://{bucket}/x")
    ahead = Ahead(8 << 20)
    file = location.open(location.status(), False, [], ahead)
    buffer = bytearray(SIZE)
    file.read_into(memoryview(buffer), 0)
    assert bytes(buffer) == data
    assert len(used) == -(-SIZE // ahead.block_bytes)
    status = location.status()
    location.write_whole(noise(SIZE)[::-1], overwrite=True)
    store = location.store
    assert isinstance(store, S3)
    with pytest.raises(ChangedError, match=r"changed since it was planned"):
        store.fetcher(location, status)(0, 100, Buffers(100))


def test_settings_are_looked_up_once_for_a_file(
    proxied: tuple[str, bytes, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, data, _ = proxied
    location, looked, before = parse(f"s3://{bucket}/x"), list[str](), multipart.credentials
    status = location.status()
    assert isinstance(location.store, S3)

    def counted() -> Credentials | None:
        looked.append("credentials")
        return before()

    def possible() -> bool:
        looked.append("possible")
        return True

    monkeypatch.setattr(direct, "possible", possible)
    monkeypatch.setattr(multipart, "credentials", counted)
    monkeypatch.setattr(location.store, "_clients", {})
    file, buffers = RangedInput(location, location.store, status, Ahead(8 << 20)), Buffers(100)
    assert b"".join(file.fetch(at, at + 100, buffers) for at in range(0, 1000, 100)) == data[:1000]
    assert looked == ["possible", "credentials"]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, True),
        ({"AWS_ENDPOINT_URL": "https://127.0.0.1:9000"}, False),
        ({}, False),
        ({"AWS_ENDPOINT_URL": "http://x:9000", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"}, False),
        ({"AWS_ENDPOINT_URL": "http://x:9000", "http_proxy": "http://proxy:3128"}, False),
        ({"AWS_ENDPOINT_URL": "http://x:9000", "http_proxy": "http://proxy:3128", "no_proxy": "x"}, True),
    ],
)
def test_where_it_is_possible(variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "http_proxy", "no_proxy", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert direct.possible() is wanted
