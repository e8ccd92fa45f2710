"""Repositories of the hub, told by names. The oracle is the grammar of names that huggingface_hub documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.stores.locations import parse
from streammerge.stores.repositories import Repository, leading_repository, named_repository, read_name, repository_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Repository("org/name")),
        ("org/name@main", Repository("org/name", "main")),
        ("org/na.me_2-b@v1.0/sub/file.bin", Repository("org/na.me_2-b", "v1.0", "sub/file.bin")),
        ("org/name/sub/", None),
        ("hf://org/name/sub/", Repository("org/name", "", "sub")),
        ("HF://org/name@refs/pr/12/sub", Repository("org/name", "refs/pr/12", "sub")),
        ("hf://org/name@a%2Fb", Repository("org/name", "a/b")),
        *(
            (text, None)
            for text in ("name", "/org/name", "./name", "../name", "org/..", "a--b/c", "-a/b", "a/b.", "a/b c", "a/b.pth")
        ),
        *(
            (text, None)
            for text in ("hf://name", "hf://org/name@", "hf://org/name/a/../b", "s3://org/name", "org/name:0.5")
        ),
    ],
)
def test_a_text_may_name_a_repository(text: str, expected: Repository | None) -> None:
    assert named_repository(text) == expected
    if expected is not None:
        assert read_name(str(expected)) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"/home/me/.cache/huggingface/hub/models--org--my.v1/snapshots/{COMMIT}", Repository("org/my.v1", COMMIT)),
        (f"models--org--name/snapshots/{COMMIT}/sub/x.bin", Repository("org/name", COMMIT, "sub/x.bin")),
        (f"hf://org/name@{COMMIT}/sub", Repository("org/name", COMMIT, "sub")),
        ("hf://org/name@main/sub", None),
        (f"memory://hub/models--a--b--c/snapshots/{COMMIT}", None),
        ("models--org--name/snapshots/main", None),
        (f"datasets--org--name/snapshots/{COMMIT}", None),
        (f"xmodels--org--name/snapshots/{COMMIT}", None),
        ("org/name", None),
    ],
)
def test_a_place_tells_its_repository_and_commit(path: str, expected: Repository | None) -> None:
    assert repository_of(parse(path)) == expected


def test_a_snapshot_is_called_by_its_repository_where_the_client_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    place.mkdir(parents=True)
    (place / "x.bin").touch()
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    found = Repository("org/name", COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "link"))
    assert leading_repository(parse(place)) == found
    assert leading_repository(parse(place / "x.bin")) == found._replace(inner="x.bin")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert leading_repository(parse(place)) is None
    assert leading_repository(parse(f"hf://org/name@{COMMIT}")) == found
