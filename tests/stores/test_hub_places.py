"""Where a repository is read, without a hub: what the cache tells. Its layout is that of huggingface_hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge as sm
from streammerge.stores.hub_places import on_hub
from streammerge.stores.repositories import Repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--org--name"
    (home / "snapshots" / COMMIT / "sub").mkdir(parents=True)
    (home / "snapshots" / COMMIT / "sub" / "file").write_text("1")
    (home / "refs" / "refs" / "pr").mkdir(parents=True)
    for name in ("main", "v1", "refs/pr/1"):
        (home / "refs" / name).write_text(COMMIT)
    (home / "refs" / "gone").write_text("f" * 40)
    (home / "refs" / "up").write_text("../..")
    return tmp_path


@pytest.mark.parametrize("revision", ["", "main", "v1", "refs/pr/1", COMMIT])
@pytest.mark.parametrize("inner", ["", "sub", "sub/file"])
def test_the_cache_tells_a_revision(cache: Path, revision: str, inner: str) -> None:
    found = on_hub(Repository("org/name", revision, inner))
    assert found == (str(cache / "models--org--name" / "snapshots" / COMMIT / inner), None)


@pytest.mark.parametrize(
    "name", [("org/name", "gone"), ("org/name", "absent"), ("org/name", "up"), ("org/other",), ("org/name", "", "no")]
)
def test_what_the_cache_does_not_hold_is_told(cache: Path, name: tuple[str, ...]) -> None:
    found = on_hub(Repository(*name))
    assert not found.place
    assert isinstance(found.error, sm.StoreError)
    assert "the hub's cache does not hold it, while HF_HUB_OFFLINE is set" in str(found.error)


@pytest.mark.parametrize("index", [False, True])
def test_a_part_of_the_cache_is_told(index: bool, cache: Path) -> None:
    """The client keeps what was asked for, as a configuration alone."""
    folder = cache / "models--org--name" / "snapshots" / COMMIT
    (folder / "config.json").write_text("{}")
    if index:
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(
        sm.FormatError, match=f"holds a part of org/name only: run `hf download org/name --revision {COMMIT}`"
    ):
        sm.inspect("org/name")
