"""``gs://bucket/key``: Google Cloud Storage."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from streammerge.stores.objects import ObjectStore


class GoogleStorage(ObjectStore):
    """Google Cloud Storage."""

    scheme = "gs"
    tagged_by = "version"

    def settings(self) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("GOOGLE_", "STORAGE_EMULATOR"))}

    def allows_http(self) -> bool:
        return bool(os.environ.get("STORAGE_EMULATOR_HOST"))

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        config: dict[str, Any] = {}
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            address = emulator if "://" in emulator else f"http://{emulator}"
            key = {
                "gcs_base_url": address,
                "disable_oauth": True,
                "client_email": "",
                "private_key": "",
                "private_key_id": "",
            }
            config = {"service_account_key": json.dumps(key)}
        return module.GCSStore(root, **config, **common)
