"""Files: whole or absent, inputs never written, counts always checked."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.storage import files
from streammerge.storage.commit import Staging, write_text
from streammerge.storage.files import InputFile, InputFiles, OutputFile, identity


def test_nothing_appears_without_commit(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out.bin")
    file = staging.create("out.bin", 10)
    file.write_full(b"0123456789", 0)
    assert not (tmp_path / "out.bin").exists()
    staging.abort()
    assert list(tmp_path.iterdir()) == []


def test_writes_outside_the_file_are_refused(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "x", 4)
    for offset in (-1, 1, 5):
        with pytest.raises(ValueError, match="lie outside"):
            file.write_full(b"1234", offset)


class TestPastThePageCache:
    """Long writes, wherever they begin and end, and whatever the file system says to them."""

    MIB = 1 << 20

    def written(self, path: Path, where: list[tuple[int, int, int]]) -> tuple[bytes, bytes]:
        """What is there and what should be, after writes of (offset, bytes, first byte of a page in memory)."""
        expected, made = bytearray(3 * self.MIB), OutputFile(path, 3 * self.MIB)
        for number, (offset, nbytes, lead) in enumerate(where):
            memory = mmap.mmap(-1, nbytes + 4096)
            memory[lead : lead + nbytes] = random.Random(number).randbytes(nbytes)
            made.write_full(memoryview(memory)[lead : lead + nbytes], offset)
            expected[offset : offset + nbytes] = memory[lead : lead + nbytes]
        made.sync()
        made.close()
        return path.read_bytes(), bytes(expected)

    PLACES = (
        (0, 3 * MIB, 0),
        (4096, MIB, 0),
        (1001, 2 * MIB, 1001),  # pages in memory as in the file, but for the ends
        (1001, 2 * MIB + 5, 1002),  # not so: the file system refuses
        (3 * MIB - 700_001, 700_001, (3 * MIB - 700_001) % 4096),
        (77, 1, 0),
        (5000, 300, 3),
    )

    def test_the_bytes_are_right(self, tmp_path: Path) -> None:
        for number, place in enumerate(self.PLACES):
            there, expected = self.written(tmp_path / str(number), [place])
            assert there == expected, place
        there, expected = self.written(tmp_path / "all", list(self.PLACES))
        assert there == expected

    def test_without_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_open_direct", lambda path: -1)
        there, expected = self.written(tmp_path / "out", list(self.PLACES))
        assert there == expected

    @pytest.mark.parametrize("cut", [1, 4096, 100_000, 262_144])
    def test_short_counts_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
        good = os.pwrite
        monkeypatch.setattr(
            os, "pwrite", lambda fd, data, offset: good(fd, data[:cut] if len(data) > cut else data, offset)
        )
        places = [place for place in self.PLACES if place[1] < 2 * self.MIB] if cut == 1 else list(self.PLACES)
        there, expected = self.written(tmp_path / "out", places[-3:] if cut == 1 else places)
        assert there == expected

    def test_it_is_what_a_merge_does(self, tmp_path: Path) -> None:
        """Nearly nothing of the output is in the page cache, where the file system can do without."""
        probe = OutputFile(tmp_path / "probe", 1)
        if probe._direct_fd < 0:
            pytest.skip("this file system knows no O_DIRECT")
        seen: dict[int, int] = {}
        good = os.pwrite

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            count = good(fd, data, offset)
            direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
            seen[direct] = seen.get(direct, 0) + count
            return count

        for number in range(2):
            save_file({"w": torch.randn(3_000_000), "b": torch.randn(1001)}, tmp_path / f"{number}.safetensors")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "pwrite", pwrite)
            sm.merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out.safetensors")
        assert seen[True] > 11_500_000
        assert seen[False] < 500_000


def test_short_reads_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    file = InputFile(str(tmp_path / "x"))
    with pytest.raises(sm.ChangedError, match="ended before byte 8"):
        file.read_into(memoryview(bytearray(6)), 2)
    with pytest.raises(sm.ChangedError):
        file.view(2, 6)


def test_an_input_that_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    planned = {str(path): identity(path)}
    path.write_bytes(b"123456")
    with pytest.raises(sm.ChangedError, match="changed since it was planned"):
        InputFiles(planned).get(str(path))
    with pytest.raises(sm.ChangedError):
        InputFiles(planned).check_unchanged()


def test_an_input_that_changes_during_the_run_leaves_no_output(tmp_path: Path) -> None:
    for number in range(2):
        save_file(trained(number), tmp_path / f"{number}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]

    def meddle(event: object) -> None:
        if type(event).__name__ == "Syncing" or type(event).__name__ == "TaskDone":
            os.utime(paths[1], (1, 1))

    with pytest.raises(sm.ChangedError, match=r"1\.safetensors changed"):
        sm.merge(paths, tmp_path / "out.safetensors", listener=meddle)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_output_that_is_an_input_is_refused(tmp_path: Path, link: object) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    before = (tmp_path / "in.safetensors").read_bytes()
    link(tmp_path / "in.safetensors", tmp_path / "out.safetensors")  # type: ignore[operator]
    with pytest.raises(sm.FormatError, match="one of the inputs"):
        sm.merge([tmp_path / "in.safetensors"], tmp_path / "out.safetensors", overwrite=True)
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_a_folder_that_holds_an_input_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file(trained(1), tmp_path / "a" / "model.safetensors")
    with pytest.raises(sm.FormatError, match="holds one of the inputs"):
        sm.merge([tmp_path / "a"], tmp_path / "a", overwrite=True)
    assert_same(load_safetensors(tmp_path / "a" / "model.safetensors"), trained(1))


def folders(tmp_path: Path) -> tuple[Path, Path]:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file(trained(number), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path / "a", tmp_path / "b"


def test_an_output_in_the_folder_of_an_input_is_refused(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    with pytest.raises(sm.FormatError, match="lies in the folder of an input"):
        sm.merge([a, b], a / "merged.safetensors", integers="first")
    with pytest.raises(sm.FormatError, match="lies in the folder of an input"):
        sm.merge([a, b], b / "merged" / "x.safetensors" if (b / "merged").mkdir() else b / "merged" / "x", integers="first")


def test_a_folder_with_a_hard_link_of_an_input_is_not_replaced(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "out").mkdir()
    os.link(a / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(sm.FormatError, match="holds one of the inputs"):
        sm.merge([a, b], tmp_path / "out", integers="first", overwrite=True)


def test_a_file_in_the_place_of_a_folder_is_noticed_first(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(sm.RecipeError, match="is a file, and a folder is to be there"):
        sm.merge([a, b], tmp_path / "out", integers="first", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("how", ["own", "link"])
def test_extras_over_an_inputs_configuration_are_refused(tmp_path: Path, how: str) -> None:
    a, _ = folders(tmp_path)
    extras = a / "config.json"
    if how == "link":
        extras = tmp_path / "linked.json"
        os.link(a / "config.json", extras)
    with pytest.raises(sm.RecipeError, match="an input or the output"):
        sm.convert(a, tmp_path / "out", extras=extras, overwrite=True)
    assert (a / "config.json").read_text() == "{}"


def test_our_own_output_is_replaced_whatever_it_held(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    sm.merge([a, b], tmp_path / "out", integers="first")
    sm.merge([a / "model.safetensors", b / "model.safetensors"], tmp_path / "out", integers="first", overwrite=True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_side_file_that_changes_is_noticed(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "secret").write_text("secret")

    def listen(event: object) -> None:
        if type(event).__name__ == "RunStarted":
            (a / "config.json").unlink()
            (a / "config.json").symlink_to(tmp_path / "secret")

    with pytest.raises(sm.ChangedError, match=r"config\.json"):
        sm.merge([a, b], tmp_path / "out", integers="first", listener=listen)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    with pytest.raises(sm.RecipeError, match="File name too long"):
        sm.merge([tmp_path / "in.safetensors"], tmp_path / ("x" * 238 + ".safetensors"))


def test_a_small_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "extras.json").write_text("somebody's")
    with pytest.raises(sm.RecipeError, match="exists already"):
        write_text(tmp_path / "extras.json", "new", overwrite=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["somebody's"]


def test_a_small_file_replaces_nothing_of_a_like_name(tmp_path: Path) -> None:
    (tmp_path / ".extras.json.part").write_text("somebody's")
    write_text(tmp_path / "extras.json", "new", overwrite=False)
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


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    with pytest.raises(sm.FormatError, match="not a regular file"):
        sm.inspect(tmp_path / "fifo.pth")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_found_before_the_first_byte(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        save_file({"w": torch.ones(1 << 20)}, tmp_path / "in.safetensors")
        with pytest.raises(sm.SpaceError, match=r"4\.2 MB.*are missing"):
            sm.merge([tmp_path / "in.safetensors"], mount / "out.safetensors")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


STRACE = shutil.which("strace")


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("pwrite64:error=ENOSPC:when=2", 6),
        ("pwrite64:error=EIO:when=2", 1),
        ("fallocate:error=ENOSPC:when=1", 6),
        ("fsync:error=EIO", 1),
        ("renameat2:error=EIO", 1),
    ],
)
def test_injected_faults_leave_no_output(tmp_path: Path, call: str, code: int) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    command = [str(STRACE), "-f", "-o", "/dev/null", "-e", f"inject={call}", sys.executable, "-m", "streammerge"]
    command += ["merge", "in.safetensors", "-o", "out.safetensors", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]


class TestSafetensorsWriter:
    specs = (sm.TensorSpec("b", "bool", (3,)), sm.TensorSpec("a", "bfloat16", (2, 3)), sm.TensorSpec("e", "float32", (0,)))

    def test_any_order_and_in_parts(self, tmp_path: Path) -> None:
        value = torch.randn(2, 3).bfloat16()
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs, {"by": "me"}) as writer:
            writer.write("a", value.reshape(-1)[4:], start=4)
            writer.write("a", value.reshape(-1)[:4])
            writer.write("b", torch.tensor([True, False, True]).numpy())
            assert not (tmp_path / "x.safetensors").exists()
            writer.commit()
        expected = {"a": value, "b": torch.tensor([True, False, True]), "e": torch.empty(0)}
        assert_same(load_safetensors(tmp_path / "x.safetensors"), expected)
        header = (tmp_path / "x.safetensors").read_bytes()
        assert b'"format":"pt"' in header
        assert b'"by":"me"' in header

    def test_what_was_committed_is_synced_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[str] = []
        good = os.fsync

        def fsync(fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            good(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs[2:]) as writer:
            writer.commit()
        assert [Path(path).name for path in synced] == ["x.safetensors", tmp_path.name]

    def test_a_kept_merge_is_not_thrown_away(self, tmp_path: Path) -> None:
        folder = tmp_path / ".x.safetensors.streammerge"
        (folder / "output").mkdir(parents=True)
        (folder / "journal").write_text("kept")
        with pytest.raises(sm.RecipeError, match="an interrupted merge"):
            sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs)
        assert (folder / "journal").read_text() == "kept"

    def test_leaving_without_commit_leaves_nothing(self, tmp_path: Path) -> None:
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs) as writer:
            writer.write("b", bytes(3))
        assert list(tmp_path.iterdir()) == []

    def test_incomplete_files_are_not_published(self, tmp_path: Path) -> None:
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs) as writer:
            writer.write("b", bytes(3))
            with pytest.raises(sm.MismatchError, match="a"):
                writer.commit()
        assert list(tmp_path.iterdir()) == []

    def test_a_closed_file_says_so(self, tmp_path: Path) -> None:
        writer = sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs[2:])
        writer.commit()
        for call in (writer.commit, lambda: writer.write("e", b"")):
            with pytest.raises(sm.RecipeError, match="closed"):
                call()

    def test_what_cannot_be_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(sm.RecipeError, match="metadata"):
            sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs, {"a": 1})  # type: ignore[dict-item]
        with pytest.raises(sm.RecipeError, match="shape"):
            sm.TensorSpec("x", "float32", (-1,))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("c", torch.ones(1), sm.RecipeError),
            ("a", torch.ones(2, 3), sm.MismatchError),
            ("a", torch.ones(3, 2).bfloat16(), sm.MismatchError),
            ("a", torch.ones(7).bfloat16(), sm.MismatchError),
            ("b", bytes(4), sm.MismatchError),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path: Path, name: str, value: object, error: type[Exception]) -> None:
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs) as writer, pytest.raises(error):
            writer.write(name, value)
