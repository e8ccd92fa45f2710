"""The store gs://: what its client is made with, and what it does at a server of the tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from bucket_server import BucketServer, Google, bucket_server
from stores import test_objects
from streammerge.requests import plans
from streammerge.stores.base import Location
from streammerge.stores.gs import GoogleStorage
from streammerge.stores.locations import parse


def test_an_emulator_is_asked_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "key.json")
    store, module = parse("gs://bucket/a").store, SimpleNamespace(GCSStore=lambda root, **config: (root, config))
    assert isinstance(store, GoogleStorage)
    assert not store.allows_http()
    assert store.made_client("bucket", module, {"client_options": 1}) == ("bucket", {"client_options": 1})
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:4443")
    assert store.allows_http()
    assert store.settings() == {
        "GOOGLE_APPLICATION_CREDENTIALS": "key.json",
        "STORAGE_EMULATOR_HOST": "127.0.0.1:4443",
    }
    _, config = store.made_client("bucket", module, {})
    key = json.loads(config["service_account_key"])
    assert (key["gcs_base_url"], key["disable_oauth"]) == ("http://127.0.0.1:4443", True)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    with bucket_server(Google) as made:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", made.address)
        yield made


class TestGoogle(test_objects.TestInOrder):
    @pytest.fixture
    def home(self, server: BucketServer) -> Location:  # type: ignore[override]
        pytest.importorskip("obstore")
        return parse("gs://bucket/home")

    def test_a_long_output_that_cannot_go_on_is_told(
        self, home: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_file({"w": torch.ones(300)}, tmp_path / "a.safetensors")
        told = "a run into gs:// that is interrupted begins anew"
        assert told not in "".join(sm.plan([tmp_path / "a.safetensors"], f"{home}/out/").notes)
        monkeypatch.setattr(plans, "_LONG_BYTES", 1000)
        assert told in "".join(sm.plan([tmp_path / "a.safetensors"], f"{home}/out/").notes)
        assert "interrupted" not in "".join(sm.plan([tmp_path / "a.safetensors"], tmp_path / "out").notes)

    def test_machines_share_a_plan(self, home: Location, tmp_path: Path) -> None:
        test_objects.make_by_two_machines(home, tmp_path / "plan")
