"""The store az://: what its client is made with, and what it does at a server of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import bucket_server
from stores import test_objects
from streammerge.stores.az import Azure
from streammerge.stores.base import Location
from streammerge.stores.locations import parse


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:10000", True),
        ("AZURE_ENDPOINT", "HTTP://127.0.0.1:10000", True),
        ("AZURE_STORAGE_ENDPOINT", "https://account.blob.core.windows.net", False),
        ("AZURE_STORAGE_USE_EMULATOR", "true", True),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account", False),
        ("AZURITE_BLOB_STORAGE_URL", "http://127.0.0.1:10000", False),  # another address must make another client
    ],
)
def test_http_is_allowed_where_the_environment_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, plain: bool
) -> None:
    monkeypatch.setenv(name, value)
    store, module = parse("az://container/a").store, SimpleNamespace(AzureStore=lambda root, **config: (root, config))
    assert isinstance(store, Azure)
    assert (store.allows_http(), store.settings()) == (plain, {name: value})
    assert store.made_client("container", module, {"client_options": 1}) == ("container", {"client_options": 1})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[bucket_server.BucketServer]:
    with bucket_server.bucket_server(bucket_server.Azure) as made:
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", made.address)
        yield made


class TestAzure(test_objects.TestInOrder):
    @pytest.fixture
    def home(self, server: bucket_server.BucketServer) -> Location:  # type: ignore[override]
        pytest.importorskip("obstore")
        return parse("az://container/home")

    def test_machines_share_a_plan(self, home: Location, tmp_path: Path) -> None:
        test_objects.make_by_two_machines(home, tmp_path / "plan")
