"""Names within a store follow POSIX paths, without a look at the store."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from stores.test_base import at


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a/b.tar.gz",
        "/a/.b",
        "/",
        ".",
        "../x",
        "a b/c.x",
        "",
        "..",
        "a/../b",
        "./a//b/./",
        "//a/b",
        "///a",
        "//",
        "/..x",
    ],
)
def test_parts_of_a_name(text: str) -> None:
    name, path = at(text), PurePosixPath(text)
    assert (name.key, name.parts) == (str(path), path.parts)
    assert (name.name, name.stem, name.suffix) == (path.name, path.stem, path.suffix)
    assert name.parent.key == str(path.parent)
    assert [each.key for each in name.parents] == [str(each) for each in path.parents]
    assert (name / "c").key == str(path / "c")
    assert (name / "c").relative_to(name) == "c"
    assert (name / "c").with_name("d") == name / "d"
    assert type(name.parent) is type(name)


def test_names_outside_a_folder() -> None:
    for name, folder in (("a", "b"), ("ab", "a"), ("/a", "."), ("a", "/"), ("a", "a/b"), ("//a", "/")):
        with pytest.raises(ValueError, match="subpath"):
            PurePosixPath(name).relative_to(folder)
        with pytest.raises(ValueError, match="not in the subpath"):
            at(name).relative_to(at(folder))
    for name, folder in (("a", "a"), ("/a", "/"), ("a/b", "."), ("/a/b/c", "/a")):
        assert at(name).relative_to(at(folder)) == PurePosixPath(name).relative_to(folder).as_posix()


def test_other_names_in_a_folder() -> None:
    assert (at("a") / "/b").key == "/b"
    assert (at("a") / "").key == "a"
    for name, wrong in ((".", "a"), ("/", "a"), ("a", ""), ("a", "."), ("a", "b/c")):
        with pytest.raises(ValueError, match="name"):
            PurePosixPath(name).with_name(wrong)
        with pytest.raises(ValueError, match="cannot be renamed"):
            at(name).with_name(wrong)


@pytest.mark.parametrize(("text", "magic"), [("a", False), ("a*", True), ("a?/b", True), ("[a]", True), ("a]", False)])
def test_patterns(text: str, magic: bool) -> None:
    assert at(text).has_magic == magic
