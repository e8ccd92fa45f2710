"""The store s3:// over a real server on this machine."""

from __future__ import annotations

import os
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import save

import streammerge as sm
from stores.suite import StoreSuite, content, noise
from stores.test_objects import LINE_NAMES, put
from streammerge.stores import multipart
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.stores.parts import PART_BYTES
from streammerge.stores.remote import RangedInput


class TestS3(StoreSuite):
    READS_BACK = False
    NAMES = LINE_NAMES

    @pytest.fixture
    def home(self, tmp_path: Path, s3: str) -> Location:
        return parse(s3)

    def put(self, location: Location, data: bytes) -> Location:
        return put(location, data)

    def put_folder(self, location: Location) -> None:
        """An empty object whose name ends in a slash stands for a folder, as other programs make it."""
        address = f"{os.environ['AWS_ENDPOINT_URL']}/{quote(location.key)}/"
        who = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, Signature=0"}
        urllib.request.urlopen(urllib.request.Request(address, b"", who, method="PUT")).close()

    def remove(self, location: Location) -> None:
        import obstore

        obstore.delete(*location.store.split(location))  # type: ignore[attr-defined]

    def test_a_folder_is_no_file(self, home: Location) -> None:
        """A folder is there while something is in it."""
        self.put(home / "a" / "b" / "c", b"1")
        super().test_a_folder_is_no_file(home)

    def left(self, home: Location) -> list[str]:
        """What is left counts uploads that are not complete, too."""
        uploads = multipart.Requests(home.key).uploads("")
        return [*super().left(home), *(f"upload of {each.key}" for each in uploads)]

    def test_a_file_in_a_subfolder_is_opened_again_and_kept(self, home: Location) -> None:
        """Only parts that were sent are kept."""
        first, second = noise(PART_BYTES, 1), noise(PART_BYTES // 2, 2)
        staging = (home / "out").stage()
        staging.clear()
        file = staging.create("unet/model", len(first + second))
        file.write_full(second[:-1], len(first))
        file.write_full(first, 0)
        file.sync()
        assert file.holds(0, len(first))
        assert not file.holds(len(first) - 1, 2)
        staging.journal_file.begin(b"plan\n")
        staging.abort(keep=True)
        staging = (home / "out").stage()
        assert staging.journal_file.read() == b"plan\n"
        again = staging.create("unet/model", len(first + second), keep=True)
        assert again.kept
        assert again.holds(0, len(first))
        again.write_full(b"x" * 10, 0)  # what was sent stays
        again.write_full(second, len(first))
        staging.commit(as_folder=True)
        assert content(home / "out") == {"unet/model": first + second}
        assert self.left(home) == ["out"]

    def test_an_output_is_read_back_before_it_is_published(self, home: Location) -> None:
        staging = (home / "out").stage()
        file = staging.create("x", 3)
        file.write_full(b"ab", 0)
        buffer = bytearray(3)
        assert file.read_into(memoryview(buffer), 0) == 3
        assert buffer == b"ab\0"
        file.write_full(b"c", 2)
        with pytest.raises(sm.StoreError, match="cannot be read before it is published"):
            file.read_into(memoryview(buffer), 0)
        staging.abort()

    def test_kept_work_is_continued(self, home: Location) -> None:
        self.interrupted(home / "out").abort(keep=True)
        assert not (home / "out").exists()
        staging = (home / "out").stage()
        staging.as_folder = False
        assert staging.resumable
        assert staging.journal_file.read() == b"plan\none\ntwo\n"
        staging.journal_file.begin(b"plan\nthree\n")
        assert staging.journal_file.read() == b"plan\nthree\n"
        assert not staging.create("out", 6, keep=True).kept  # its only part was not complete
        staging.clear()
        staging.create("out", 6).write_full(b"abcdef", 0)
        staging.commit(as_folder=False)
        assert content(home / "out") == {"": b"abcdef"}
        assert self.left(home) == ["out"]

    def test_readers_see_the_old_or_the_new(self, home: Location) -> None:
        self.make(home / "out", {"": b"old"})
        source = (home / "out").open()
        self.make(home / "out", {"": b"new"}, overwrite=True)
        with pytest.raises(sm.ChangedError):
            source.read_into(memoryview(bytearray(3)), 0)
        assert content(home / "out") == {"": b"new"}


def test_many_workers_and_models_fetch_each_byte_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, lock, wholly = list[int](), threading.Lock(), RangedInput.fetch

    def fetch(file: RangedInput, start: int, stop: int, buffers: Any = None) -> memoryview:
        with lock:
            fetched.append(stop - start)
        return wholly(file, start, stop, buffers)

    for number in range(4):
        made = torch.Generator().manual_seed(number)
        tensors = {f"{row}.weight": torch.randn(1024, 1024, generator=made) for row in range(6)}
        put(parse(f"{s3}/{number}.safetensors"), save(tensors))
    monkeypatch.setattr(RangedInput, "fetch", fetch)
    inputs = [f"{s3}/{number}.safetensors" for number in range(4)]
    result = sm.merge(inputs, f"{s3}/out.safetensors", workers=6, memory="256MiB")
    assert result.plan.budget.workers == 6
    total = 4 * 6 * 4 << 20
    assert total <= sum(fetched) <= 1.2 * total
