"""Who makes an output, where kernel locks reach everybody and where they do not."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from streammerge.stores import lock
from streammerge.stores.locations import parse
from streammerge.stores.lock import Owner, this_run


@pytest.fixture
def left(tmp_path: Path) -> Any:
    """A staging folder as a killed run of that owner left it, with a journal; the lock file's path comes back."""

    def leave(owner: Owner | str) -> Path:
        folder = tmp_path / ".out.safetensors.streammerge"
        (folder / "output").mkdir(parents=True, exist_ok=True)
        (folder / "output" / "out.safetensors").write_bytes(b"half")
        (folder / "journal").write_bytes(b"journal")
        (folder / "lock").write_text(owner if isinstance(owner, str) else json.dumps(owner._asdict()))
        return folder / "lock"

    return leave


def content(path: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def test_the_owner_is_written_down(tmp_path: Path) -> None:
    staging = parse(tmp_path / "out.safetensors").stage()
    said = json.loads((tmp_path / ".out.safetensors.streammerge" / "lock").read_text())
    assert said["pid"] == os.getpid()
    assert said["host"]
    assert said["user"]
    assert said["began"].startswith("20")
    if Path("/proc").is_dir():
        assert said["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert said["namespace"].startswith("pid:")
    staging.abort()


ELSEWHERE = {
    "another host": {"host": "node17", "boot": "b"},
    "this host before it started again, or its namesake": {"boot": "b"},
    "a clone without boot ids": {"host": "node17", "boot": ""},
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_what_another_host_may_own_is_refused_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: Any, where: str
) -> None:
    """The kernel's lock is ours, but on this file system the other host's kernel need not know of it."""
    monkeypatch.setattr(lock, "one_kernel", lambda folder: False)
    owner = this_run()._replace(pid=77, user="ada", **ELSEWHERE[where])
    path = left(owner)
    before = content(tmp_path)
    for ask in (
        lambda: parse(tmp_path / "out.safetensors").stage(),
        lambda: parse(tmp_path / "out.safetensors").stage(True),
    ):
        with pytest.raises(sm.LockedError, match=rf"process 77 on {owner.host} of ada since 20.*, remove {path}$"):
            ask()
    (tmp_path / "out.safetensors").write_bytes(b"old")
    parse(tmp_path / "out.safetensors").sweep()
    (tmp_path / "out.safetensors").unlink()
    assert content(tmp_path) == before
    path.unlink()
    parse(tmp_path / "out.safetensors").stage().abort(keep=True)


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_disk_of_this_machine_has_no_other_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: Any, where: str
) -> None:
    """The machine was started again, or has got another name: nobody else has this disk, and the work is continued."""
    monkeypatch.setattr(lock, "one_kernel", lambda folder: True)
    left(this_run()._replace(pid=77, **ELSEWHERE[where]))
    staging = parse(tmp_path / "out.safetensors").stage()
    assert staging.resumable
    staging.abort()


def test_a_container_of_the_same_kernel_is_known_by_the_kernels_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: Any
) -> None:
    monkeypatch.setattr(lock, "one_kernel", lambda folder: False)
    other = this_run()._replace(pid=77, host="container", namespace="pid:[1]")
    if not other.boot:
        pytest.skip("this platform has no boot ids")
    left(other)
    parse(tmp_path / "out.safetensors").stage().abort()


def test_an_orderly_end_leaves_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So another host may continue what was interrupted, though nobody knows whose locks reach whom."""
    staging = parse(tmp_path / "out.safetensors").stage()
    staging.journal_file.begin(b"plan\n")
    staging.abort(keep=True)
    assert (tmp_path / ".out.safetensors.streammerge" / "lock").read_text() == ""
    monkeypatch.setattr(lock, "one_kernel", lambda folder: False)
    monkeypatch.setattr(lock, "this_run", lambda: Owner(1, "node18", "c"))
    staging = parse(tmp_path / "out.safetensors").stage()
    assert staging.resumable
    staging.abort()


class TestWithoutKernelLocks:
    """File systems without locks: only what the file says counts."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(fd: int, how: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "flock", unsupported)

    @pytest.mark.parametrize(
        "change", [{"boot": "b", "host": "node17"}, {"namespace": "pid:[1]"}, {"pid": os.getppid()}], ids=str
    )
    def test_who_may_be_alive_is_refused(self, tmp_path: Path, left: Any, change: dict[str, Any]) -> None:
        left(this_run()._replace(**{"pid": 999_999_999, **change}))
        before = content(tmp_path)
        with pytest.raises(sm.LockedError, match="as far as can be told from here"):
            parse(tmp_path / "out.safetensors").stage()
        assert content(tmp_path) == before

    def test_who_is_dead_is_followed(self, tmp_path: Path, left: Any) -> None:
        left(this_run()._replace(pid=999_999_999))
        parse(tmp_path / "out.safetensors").stage().abort()

    def test_one_process_has_it_once(self, tmp_path: Path) -> None:
        first = parse(tmp_path / "out.safetensors").stage()
        with pytest.raises(sm.LockedError, match=f"process {os.getpid()}"):
            parse(tmp_path / "out.safetensors").stage()
        first.abort()
        parse(tmp_path / "out.safetensors").stage().abort()

    def test_only_one_run_creates_the_owner_file(self, tmp_path: Path) -> None:
        """Both runs have looked at the lock file, and neither has written into it."""
        folder = tmp_path / ".out.safetensors.streammerge"
        folder.mkdir()
        fd = lock.opened(str(folder / "lock"))
        lock.take(fd, str(folder), "out")
        child = os.fork()
        if not child:
            try:
                parse(tmp_path / "out.safetensors").stage()
                os._exit(1)
            except sm.LockedError as error:
                os._exit(0 if f"process {os.getppid()}" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        lock.sign(fd, str(folder), "out")
        lock.release(fd)
        assert [path.name for path in folder.iterdir()] == ["lock"]
        parse(tmp_path / "out.safetensors").stage().abort()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("alive", [False, True])
    def test_the_owner_file_of_a_killed_run(self, tmp_path: Path, left: Any, alive: bool) -> None:
        path = left("").with_name("lock.owner")
        path.write_text(json.dumps(this_run()._replace(pid=os.getppid() if alive else 999_999_999)._asdict()))
        if alive:
            with pytest.raises(sm.LockedError, match=f"process {os.getppid()} .*, remove {path}$"):
                parse(tmp_path / "out.safetensors").stage()
            path.write_text("")
            with pytest.raises(sm.LockedError, match=f"a process that did not give its name, .*, remove {path}$"):
                parse(tmp_path / "out.safetensors").stage()
            path.unlink()
        parse(tmp_path / "out.safetensors").stage().abort()

    def test_two_runs_follow_a_dead_one_at_once(self, tmp_path: Path, left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other one has replaced the dead run's file after we read it."""
        path, good = left("").with_name("lock.owner"), os.rename
        path.write_text(json.dumps(this_run()._replace(pid=999_999_999)._asdict()))
        other = json.dumps(this_run()._replace(pid=os.getppid())._asdict())

        def rename(source: Any, target: Any) -> None:
            if str(source) == str(path):
                path.write_text(other)
            good(source, target)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(sm.LockedError, match=f"process {os.getppid()}"):
            parse(tmp_path / "out.safetensors").stage()
        assert path.read_text() == other

    def test_where_locks_work_the_owner_file_counts_too(
        self, tmp_path: Path, left: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lock.fcntl, "flock", lambda fd, how: None)
        path = left("").with_name("lock.owner")
        path.write_text(json.dumps(this_run()._replace(pid=os.getppid())._asdict()))
        with pytest.raises(sm.LockedError, match=f"process {os.getppid()} .*, remove {path}$"):
            parse(tmp_path / "out.safetensors").stage()


def test_two_machines_that_write_at_once_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own kernel's lock. What this one has written is read back after it reached the server."""
    path, synced = tmp_path / ".out.safetensors.streammerge" / "lock", []
    other = json.dumps(this_run()._replace(pid=77, host="node17", boot="b")._asdict())

    def sync(fd: int) -> None:
        synced.append(json.loads(path.read_text())["pid"])
        path.write_text(other)

    monkeypatch.setattr(lock.system, "full_sync", sync)
    with pytest.raises(sm.LockedError, match="process 77 on node17"):
        parse(tmp_path / "out.safetensors").stage()
    assert synced == [os.getpid()]
    assert path.read_text() == other


@pytest.mark.parametrize("keep", [False, True])
def test_a_forked_child_keeps_no_lock(tmp_path: Path, keep: bool) -> None:
    """It lives on after the run, has a copy of the descriptor, and ends a copy of the staging."""
    staging = parse(tmp_path / "out.safetensors").stage()
    staging.journal_file.begin(b"plan\n")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        staging.abort()
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        time.sleep(0.2)
        assert staging.resumable, "the child has removed nothing"
        with pytest.raises(sm.LockedError):
            parse(tmp_path / "out.safetensors").stage()
        if keep:  # the parent's descriptor is closed without a word, as when it is killed
            os.close(staging._lock_fd)  # type: ignore[attr-defined]
            lock._held.pop(staging._lock_fd)  # type: ignore[attr-defined]
        else:
            staging.abort(keep=True)
        again = parse(tmp_path / "out.safetensors").stage()
        assert again.resumable
        again.abort()
    finally:
        os.close(writer)
        os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_which_file_systems_have_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock.one_kernel("/proc") is False
    real = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    good = open

    def opened(path: Any, *arguments: Any, **options: Any) -> Any:
        return good(mounts if path == "/proc/self/mountinfo" else path, *arguments, **options)

    monkeypatch.setattr("builtins.open", opened)
    for kind, alone in (("ext4", True), ("tmpfs", True), ("nfs4", False), ("fuse.sshfs", False), ("lustre", False)):
        mounts.write_text(f"36 35 {os.major(real)}:{os.minor(real)} / /mnt rw shared:1 - {kind} source rw\n")
        assert lock.one_kernel(str(tmp_path)) is alone, kind
    mounts.write_text("36 35 999:999 / /mnt rw - ext4 source rw\n")
    assert lock.one_kernel(str(tmp_path)) is False
