"""``az://container/key``: Azure Blob Storage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from streammerge.stores.objects import ObjectStore


class Azure(ObjectStore):
    """Azure Blob Storage."""

    scheme = "az"
    root_word = "container"

    def settings(self) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("AZURE_", "AZURITE_"))}

    def allows_http(self) -> bool:
        named = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
        return named.lower().startswith("http://") or bool(os.environ.get("AZURE_STORAGE_USE_EMULATOR"))

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        return module.AzureStore(root, **common)
