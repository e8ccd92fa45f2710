"""The store az://: what its client is made with. No server of it is tried here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from streammerge.stores.az import Azure
from streammerge.stores.locations import parse


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:10000", True),
        ("AZURE_ENDPOINT", "HTTP://127.0.0.1:10000", True),
        ("AZURE_STORAGE_ENDPOINT", "https://account.blob.core.windows.net", False),
        ("AZURE_STORAGE_USE_EMULATOR", "true", True),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account", False),
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
