"""Repositories of the hub, told by names. The oracle is the cache's layout as huggingface_hub documents it."""

from __future__ import annotations

import pytest

from streammerge.stores.locations import parse
from streammerge.stores.repositories import Repository, repository_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            f"/home/me/.cache/huggingface/hub/models--org--my-model.v1/snapshots/{COMMIT}",
            Repository("org/my-model.v1", COMMIT),
        ),
        (f"models--org--name/snapshots/{COMMIT}/sub/model.safetensors", Repository("org/name", COMMIT)),
        (f"memory://hub/models--a--b--c/snapshots/{COMMIT}", Repository("a/b--c", COMMIT)),
        ("models--org--name/snapshots/main", None),
        (f"datasets--org--name/snapshots/{COMMIT}", None),
        (f"xmodels--org--name/snapshots/{COMMIT}", None),
        ("org/name", None),
    ],
)
def test_a_place_in_the_cache_tells_its_repository_and_commit(path: str, expected: Repository | None) -> None:
    assert repository_of(parse(path)) == expected
