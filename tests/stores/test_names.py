"""Names of files within a folder."""

from __future__ import annotations

import pytest

from streammerge.stores.names import MOST_PARTS, is_inner


@pytest.mark.parametrize(
    "name", ["x", "a/x", "..x", "a/...", "x.", "-o", "ü/日本", "a b/c:d", "~/x", "/".join("a" * MOST_PARTS), "x" * 255]
)
def test_a_path_below_a_folder_is_inner(name: str) -> None:
    assert is_inner(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "/x", "x/", "a//x", "./x", "a/.", "../x", "a/../x", "a/..", "a\\x", "..\\x", "a/\0", "\0",
     "/".join("a" * (MOST_PARTS + 1)), "x" * 256, "ü" * 128, "a/" + "x" * 256],
)  # fmt: skip
def test_anything_else_is_not(name: str) -> None:
    assert not is_inner(name)
