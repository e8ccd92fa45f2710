"""An output appears whole, or not at all, and replaces nothing unasked."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores import commit
from streammerge.stores.locations import parse


def test_nothing_appears_without_commit(tmp_path: Path) -> None:
    staging = parse(tmp_path / "out.bin").stage()
    file = staging.create("out.bin", 10)
    file.write_full(b"0123456789", 0)
    assert not (tmp_path / "out.bin").exists()
    staging.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    with pytest.raises(sm.RecipeError, match="File name too long"):
        sm.merge([tmp_path / "in.safetensors"], tmp_path / ("x" * 244 + ".safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    "name", ["x" * 230, "x" * 231, "x" * 243, "ü" * 121, "日" * 81], ids=lambda name: str(len(name.encode()))
)
@pytest.mark.parametrize("ending", [".safetensors", ""])
def test_a_long_name_is_an_output(tmp_path: Path, name: str, ending: str) -> None:
    """The hidden folder's name is longer than the output's and must stay a name that the file system takes."""
    out = tmp_path / (name + ending)
    save_file(trained(1), tmp_path / "in.safetensors")
    sm.merge([tmp_path / "in.safetensors"], f"{out}/" if not ending else out)
    sm.merge([tmp_path / "in.safetensors"], f"{out}/" if not ending else out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", out.name}
    parse(tmp_path / (name + ".json")).write_whole(b"1", overwrite=False)


def test_long_names_of_two_outputs_are_two_hidden_folders(tmp_path: Path) -> None:
    outs = [tmp_path / ("x" * 249 + last) for last in "ab"]
    stagings = [parse(out).stage() for out in outs]
    assert stagings[0].home != stagings[1].home
    assert len({each.home.name for each in stagings}) == 2
    assert all(each.home == parse(commit.staging_folder(out)) for each, out in zip(stagings, outs, strict=True))
    for each in stagings:
        each.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_place_where_no_folder_can_be_made_is_told(tmp_path: Path) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    with pytest.raises(
        sm.RecipeError, match=r"cannot write beside /sys/x\.safetensors: (Operation|No such|Perm|Read-only)"
    ):
        sm.merge([tmp_path / "in.safetensors"], "/sys/x.safetensors")


def test_a_folder_that_vanishes_each_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def opened(path: str) -> int:
        calls.append(path)
        if len(calls) > 10_000:
            raise KeyboardInterrupt
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(commit.lock, "opened", opened)
    with pytest.raises(sm.RecipeError, match="vanishes when it is made"):
        parse(tmp_path / "out.safetensors").stage()


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_files_of_others_in_the_hidden_folder_undo_no_merge(tmp_path: Path, out: str) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")

    def listen(event: object) -> None:
        for folder in (each.parent for each in tmp_path.glob(".out*/output")):
            for name in (".DS_Store", "output/.DS_Store", "output/.nfs0001"):
                (folder / name).write_bytes(b"somebody's")

    sm.merge([tmp_path / "in.safetensors"], tmp_path / out, listener=listen)
    sm.verify(tmp_path / out, sample="100%")
    if out.endswith(".safetensors"):
        assert_same(load_safetensors(tmp_path / out), trained(1))


def test_a_hidden_folder_goes_when_its_removed_files_are_closed(tmp_path: Path) -> None:
    """A network file system removes an open file a moment after it was closed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".fuse_hidden0001").touch()
    timer = threading.Timer(0.1, (folder / ".fuse_hidden0001").unlink)
    timer.start()
    commit._remove_empty(folder)
    timer.join()
    assert not folder.exists()
    folder.mkdir()
    (folder / "somebody's").touch()
    commit._remove_empty(folder)
    assert folder.exists()


@pytest.mark.skipif(shutil.which("bindfs") is None or os.geteuid() != 0, reason="needs bindfs and root")
@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_nothing_is_left_on_a_fuse_file_system(tmp_path: Path, out: str) -> None:
    (tmp_path / "back").mkdir()
    (tmp_path / "mount").mkdir()
    if subprocess.run(["bindfs", tmp_path / "back", tmp_path / "mount"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        save_file(trained(1), tmp_path / "in.safetensors")
        sm.merge([tmp_path / "in.safetensors"], tmp_path / "mount" / out)
        sm.verify(tmp_path / "mount" / out, sample="100%", inputs=tmp_path)
        assert [path.name for path in (tmp_path / "mount").iterdir()] == [out]
    finally:
        subprocess.run(["umount", tmp_path / "mount"], check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("kind", ["file", "empty folder"])
def test_a_sticky_folder_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    shared, out = tmp_path / "shared", tmp_path / "shared" / "out"
    shared.mkdir()
    out.write_bytes(b"theirs") if kind == "file" else out.mkdir()
    os.chown(out, 1, -1)
    os.chown(shared, 2, -1)
    os.chmod(shared, 0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(sm.RecipeError, match=r"belongs to \w+, and nobody else may replace it .* sticky"):
        parse(out).stage(overwrite=True)
    os.chmod(shared, 0o777)
    parse(out).stage(overwrite=True).abort()
    os.chmod(shared, 0o1777)
    for user in (0, 1, 2):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        parse(out).stage(overwrite=True).abort()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_another_user_has_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = parse(tmp_path / "out.safetensors").stage()
    staging.journal_file.begin(b"plan\n")
    folder, good = commit.staging_folder(tmp_path / "out.safetensors"), commit.lock.opened
    os.chown(folder, 1, -1)

    def opened(path: str) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(commit.lock, "opened", opened)
    with pytest.raises(sm.LockedError, match=f"is being written by process {os.getpid()}"):
        parse(tmp_path / "out.safetensors").stage()
    monkeypatch.setattr(commit.lock, "opened", good)
    staging.abort(keep=True)
    monkeypatch.setattr(commit.lock, "opened", opened)
    with pytest.raises(sm.RecipeError, match=r"an interrupted run of (\w+) into .* has left .*, or ask \1 to finish"):
        parse(tmp_path / "out.safetensors").stage()
    os.chown(folder, 0, -1)
    with pytest.raises(sm.RecipeError, match=r"cannot write beside .*: Permission denied"):
        parse(tmp_path / "out.safetensors").stage()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the place of another user")
def test_a_folder_of_others_is_told_before_anything_is_made(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        os.seteuid(65534)
        try:
            for name in ("x", "new/x"):
                with pytest.raises(sm.RecipeError, match=rf"cannot write beside .*/{name}: Permission denied"):
                    parse(folder / name).check_writable(overwrite=True)
        finally:
            os.seteuid(0)
        parse(folder / "x").check_writable(overwrite=True)
    finally:
        folder.rmdir()


def test_the_root_is_no_output(tmp_path: Path) -> None:
    for name in ("/", "//", "/."):
        with pytest.raises(sm.RecipeError, match="is not a name for an output"):
            parse(name).check_writable(overwrite=True)


def test_the_folders_of_a_small_file_are_made(tmp_path: Path) -> None:
    parse(tmp_path / "a/b/x.json").write_whole(b"new", overwrite=False)
    assert (tmp_path / "a/b/x.json").read_bytes() == b"new"
    (tmp_path / "d").mkdir()
    with pytest.raises(sm.RecipeError, match="cannot write"):
        parse(tmp_path / "d" / "e" / ("x" * 300)).write_whole(b"new", overwrite=False)
    assert not list((tmp_path / "d").iterdir())


def test_a_small_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "extras.json").write_text("somebody's")
    with pytest.raises(sm.RecipeError, match="exists already"):
        parse(tmp_path / "extras.json").write_whole(b"new", overwrite=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["somebody's"]


def test_a_small_file_replaces_nothing_of_a_like_name(tmp_path: Path) -> None:
    (tmp_path / ".extras.json.part").write_text("somebody's")
    parse(tmp_path / "extras.json").write_whole(b"new", overwrite=False)
    assert (tmp_path / "extras.json").read_text() == "new"
    assert (tmp_path / ".extras.json.part").read_text() == "somebody's"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "extras.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_overwrite_replaces_a_file_whole(tmp_path: Path) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    sm.merge([tmp_path / "in.safetensors"], tmp_path / "out.safetensors", overwrite=True)
    assert_same(load_safetensors(tmp_path / "out.safetensors"), trained(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_an_output_that_may_not_be_replaced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rename can tell it where rights were taken from root, as in some containers. What was made is kept."""
    (tmp_path / "out.bin").write_bytes(b"old")
    staging = parse(tmp_path / "out.bin").stage(overwrite=True)
    staging.create("out.bin", 3).write_full(b"new", 0)
    staging.as_folder = False

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(sm.RecipeError, match=r"out\.bin may not be replaced \(Operation not permitted\)") as caught:
        staging.commit(as_folder=False)
    assert isinstance(caught.value.__cause__, PermissionError)
    staging.abort(keep=True)
    assert (tmp_path / "out.bin").read_bytes() == b"old"
