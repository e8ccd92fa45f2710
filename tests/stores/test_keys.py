"""Names within a store follow POSIX paths, without a look at the store."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from stores.test_base import at


@pytest.mark.parametrize("text", ["a", "a/b.tar.gz", "/a/.b", "/", ".", "../x", "a b/c.x"])
def test_parts_of_a_name(text: str) -> None:
    name, path = at(text), PurePosixPath(text)
    assert (name.name, name.stem, name.suffix) == (path.name, path.stem, path.suffix)
    assert name.parent.key == str(path.parent)
    assert [each.key for each in name.parents] == [str(each) for each in path.parents]
    assert (name / "c").key == str(path / "c")
    assert (name / "c").relative_to(name) == "c"
    assert (name / "c").with_name("d") == name / "d"
    assert type(name.parent) is type(name)


def test_names_outside_a_folder() -> None:
    with pytest.raises(ValueError, match="not in the subpath"):
        at("a").relative_to(at("b"))


@pytest.mark.parametrize(("text", "magic"), [("a", False), ("a*", True), ("a?/b", True), ("[a]", True), ("a]", False)])
def test_patterns(text: str, magic: bool) -> None:
    assert at(text).has_magic == magic
