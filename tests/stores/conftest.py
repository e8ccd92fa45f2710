"""What several tests of stores share."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopback_hub import Hub
from stores.hub_models import files
from streammerge.stores import remote


@pytest.fixture
def models(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two models on the hub; their commits by name."""
    monkeypatch.chdir(tmp_path)
    return {"org/a": hub.add("org/a", files(1)), "org/b": hub.add("org/b", files(2))}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
