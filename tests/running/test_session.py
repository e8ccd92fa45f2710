"""Interrupted runs: what is kept, which runs continue from it, and which must not."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, hear_signals, interrupt, journalled, wait_until, when_kept
from safetensors.torch import save_file

import streammerge as sm
from streammerge.events import TaskDone
from streammerge.planning import tasks
from streammerge.running import readback
from streammerge.stores import commit, journal, libc, lock, system
from streammerge.stores.commit import LocalJournalFile, LocalStaging
from streammerge.stores.locations import parse
from streammerge.stores.written_files import OutputFile
from streammerge.tensors.spec import GRAIN

OUTPUTS = {"safetensors": "out.safetensors", "pickle": "out.pth", "folder": "out"}


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pieces of one grain, which the journal records at once, so that small merges have pieces to keep."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.001)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Makes two checkpoints whose tensors have up to seven pieces. One tensor is empty, one strided."""
    paths = []
    for number in range(2):
        chance = torch.Generator().manual_seed(number)
        tensors = {f"layer.{i}": torch.randn(i + 1, GRAIN + 77, generator=chance) for i in range(6)}
        tensors |= {"empty": torch.empty(0, 3), "turned": torch.randn(GRAIN, 3, generator=chance).t()}
        paths.append(tmp_path / f"{number}.pth")
        torch.save({"model": tensors, "step": number}, paths[-1])
    return paths


def stop(inputs: list[Path], out: Path, at_least: int = 5, **options: Any) -> None:
    """Runs the merge until the journal has some pieces, and interrupts it there."""
    with pytest.raises(KeyboardInterrupt):
        sm.merge(inputs, out, listener=when_kept(out, at_least, interrupt), **options)


def content(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else {"": out.read_bytes()}


def left_over(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


def resumed_events(run: Callable[[Any], object]) -> list[Any]:
    found: list[Any] = []
    run(lambda event: found.append(event) if type(event).__name__ == "Resumed" else None)
    return found


@pytest.mark.parametrize("container", OUTPUTS)
@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    pair: list[Path], tmp_path: Path, container: str, method: str
) -> None:
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / OUTPUTS[container], tmp_path / OUTPUTS[container]
    sm.merge(pair, whole, method=method)
    stop(pair, out, method=method)
    assert not out.exists()
    run: dict[str, Any] = {"method": method, "workers": 3, "memory": "64MiB", "io": "pread"}
    (event,) = resumed_events(lambda listener: sm.merge(pair, out, listener=listener, **run))
    assert event.kept_bytes >= 5 * 4 * 77
    assert content(out) == content(whole)
    assert left_over(out) == []


def test_what_was_kept_is_not_read_again_and_is_told(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    all_bytes = sm.merge(pair, tmp_path / "other.safetensors").read_bytes
    stop(pair, out, at_least=12)
    result = sm.merge(pair, out)
    assert result.read_bytes < all_bytes
    assert any(re.match(r"continued an interrupted run: .* of .* were there", note) for note in result.notes)


def test_two_interruptions(pair: list[Path], tmp_path: Path) -> None:
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    sm.merge(pair, whole)
    stop(pair, out, at_least=4)
    stop(pair, out, at_least=14)
    (event,) = resumed_events(lambda listener: sm.merge(pair, out, listener=listener))
    assert event.kept_bytes > 10 * 4 * 77
    assert content(out) == content(whole)


@pytest.mark.parametrize("where", ["session.plan_parts", "relatives.strangers", "session.Run._spool", "reading.outside"])
def test_an_interruption_before_the_first_piece_loses_nothing(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out.safetensors"
    stop(pair, out, hash=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"streammerge.running.{where}", interrupted)
        sm.merge(pair, out, hash=True)
    (event,) = resumed_events(lambda listener: sm.merge(pair, out, hash=True, listener=listener))
    assert event.kept_bytes >= 5 * 4 * 77


@pytest.mark.parametrize(
    "change",
    [
        lambda pair: {"weights": [0.3, 0.7]},
        lambda pair: {"method": "karcher"},
        lambda pair: {"dtype": "bfloat16"},
        lambda pair: os.utime(pair[1], (1, 1)) or {},
        lambda pair: {"hash": True},
    ],
    ids=["weights", "method", "dtype", "input", "hash"],
)
def test_another_plan_is_refused_until_what_is_kept_may_go(
    pair: list[Path], tmp_path: Path, change: Callable[[list[Path]], dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """The refusal names the differences of the runs, and loses no kept piece."""
    said = {
        "weights": "the recipe's keys models, parameters changed",
        "method": "the recipe's keys merge_method, parameters changed",
        "dtype": "the recipe's key dtype changed",
        "input": r"the input \S*1\.pth changed",
        "hash": "only one of them hashes the inputs",
    }[request.node.callspec.id]
    out = tmp_path / "out.safetensors"
    stop(pair, out)
    pieces, times = journalled(out), os.stat(pair[1])
    options = change(pair)
    with pytest.raises(sm.RecipeError, match=f"left .*B, and this run differs from it: {said}; repeat"):
        sm.merge(pair, out, **options)
    assert journalled(out) == pieces
    sm.merge(pair, tmp_path / "whole.safetensors", **options)
    os.utime(pair[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(resumed_events(lambda listener: sm.merge(pair, out, listener=listener))) == 1
    out.unlink()
    stop(pair, out)
    sm.merge(pair, out, resume=False, **change(pair))
    assert content(out) == content(tmp_path / "whole.safetensors")


def test_another_version_is_refused(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    stop(pair, out)
    pieces = journalled(out)
    with monkeypatch.context() as patched, pytest.raises(sm.RecipeError, match=r"streammerge was .* and is 0\.0\.9"):
        patched.setattr("streammerge.planning.digest.__version__", "0.0.9")
        sm.merge(pair, out)
    path = tmp_path / ".out.safetensors.streammerge" / "journal"
    good = path.read_bytes()
    text = b'{"plan":"' + b"0" * 64 + b'"}'  # the first line of earlier versions
    path.write_bytes(b"%08x %s" % (zlib.crc32(text), text) + good[good.index(b"\n") :])
    with pytest.raises(sm.RecipeError, match="another version of streammerge made it"):
        sm.merge(pair, out)
    for change, more in (({"form": 99}, {"new": 1}), ({"versions": None}, {})):  # a newer version has other fields
        lines = [json.loads(line[9:]) for line in good.splitlines()]
        said = {name: value for name, value in {**lines[0]["plan"], **change}.items() if value is not None}
        path.write_bytes(journal._lines(map(json.dumps, [{"plan": said}, *({**line, **more} for line in lines[1:])])))
        with pytest.raises(sm.RecipeError, match=r"left .*, and this run differs from it: another version"):
            sm.merge(pair, out)
        assert journalled(out) == pieces
    path.write_bytes(good)
    assert journalled(out) == pieces
    assert len(resumed_events(lambda listener: sm.merge(pair, out, listener=listener))) == 1


def test_the_command_line_names_the_option_that_discards_what_is_kept(pair: list[Path], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out.safetensors"
    stop(pair, out)
    command = ["merge", *map(str, pair), "--weights", "1,2", "-o", str(out)]
    said = cli(*command, code=2).stderr
    assert "discard what it left with --no-resume, or choose another output" in said
    assert "`" not in said
    cli(*command, "--no-resume")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files")]
)
def test_a_journal_that_cannot_be_read_is_still_there(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """An error or Ctrl-C while the journal is read loses nothing. Only an absent journal counts as none."""
    out = tmp_path / "out.safetensors"
    stop(pair, out)
    pieces = journalled(out)

    def fail(record: LocalJournalFile) -> bytes:
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(LocalJournalFile, "read", fail)
        sm.merge(pair, out)
    assert journalled(out) == pieces
    assert len(resumed_events(lambda listener: sm.merge(pair, out, listener=listener))) == 1


def test_ones_own_method_is_never_continued(pair: list[Path], tmp_path: Path) -> None:
    """The method may depend on things that change unnoticed."""

    def half(group: Any) -> Any:
        return lambda chunk: chunk.models[0] * 0.5

    def listen(event: object) -> None:
        if type(event).__name__ == "Syncing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge(pair, tmp_path / "out.safetensors", method=half, listener=listen)
    assert left_over(tmp_path / "out.safetensors") == []


def test_without_resume_nothing_is_taken_up_and_nothing_stays(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    stop(pair, out)
    assert left_over(out) == [".out.safetensors.streammerge"]

    def listen(event: object) -> None:
        assert type(event).__name__ != "Resumed"
        if type(event).__name__ == "Syncing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge(pair, out, resume=False, listener=listen)
    assert left_over(out) == []


def test_a_run_that_has_kept_nothing_leaves_nothing(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is thought so slow that what is finished cannot be synced in time."""
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 60)
    monkeypatch.setattr(journal, "_FIRST_RATE", 1e-3)

    def listen(event: object) -> None:
        if type(event).__name__ == "TaskDone":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge(pair, tmp_path / "out.safetensors", listener=listen)
    assert left_over(tmp_path / "out.safetensors") == []


@pytest.mark.parametrize("where", range(4))
def test_damage_to_what_was_kept_is_found_and_made_good(pair: list[Path], tmp_path: Path, where: int) -> None:
    """Flips one bit of the partial output, in a piece that the journal lists."""
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    sm.merge(pair, whole)
    stop(pair, out, at_least=8)
    folder = tmp_path / ".out.safetensors.streammerge"
    partial = folder / "output" / "out.safetensors"
    lines = (folder / "journal").read_text().splitlines()[1:]
    offset, nbytes = (int(re.search(rf'"{key}":(\d+)', lines[2 * where])[1]) for key in ("offset", "nbytes"))  # type: ignore[index]
    data = bytearray(partial.read_bytes())
    data[offset + nbytes // 2] ^= 4
    partial.write_bytes(data)
    sm.merge(pair, out)
    assert content(out) == content(whole)


def test_no_damage_to_the_journal_matters(pair: list[Path], tmp_path: Path) -> None:
    """Flips a bit at every 37th byte, and cuts at every 89th byte. Pieces of damaged lines are made again."""
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    sm.merge(pair, whole)
    stop(pair, out, at_least=8)
    path = tmp_path / ".out.safetensors.streammerge" / "journal"
    good = path.read_bytes()
    record = LocalJournalFile(parse(path))
    first = journal.read(record)
    assert first is not None
    plan, vouched = first.plan, first.pieces
    assert len(vouched) >= 8
    damaged = [good[:at] + bytes([good[at] ^ 8]) + good[at + 1 :] for at in range(0, len(good), 37)]
    damaged += [good[:at] for at in range(0, len(good), 89)]
    for each in damaged:
        path.write_bytes(each)
        read = journal.read(record)
        assert read is not None
        assert read.plan in (plan, None)
        found = read.pieces
        assert found == vouched[: len(found)]
        assert read.plan is None or len(found) < len(vouched) or each.startswith(good[:-1])
    path.write_bytes(damaged[len(good) // 74])
    sm.merge(pair, out)
    assert content(out) == content(whole)


def test_an_interrupted_replacement_keeps_the_old_output(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    sm.merge(pair, out, weights=[1, 0])
    old = content(out)
    stop(pair, out, overwrite=True)
    assert content(out) == old
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.merge(pair, out)
    assert len(resumed_events(lambda listener: sm.merge(pair, out, overwrite=True, listener=listener))) == 1
    assert content(out) != old


def test_pieces_are_written_down_after_their_files_are_synced(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    good_sync, good_append = OutputFile.sync, LocalJournalFile.append

    def sync(file: OutputFile) -> None:
        good_sync(file)
        order.append(("sync", 0))

    def append(record: LocalJournalFile, data: bytes) -> None:
        order.append(("append", data.count(b"\n")))
        good_append(record, data)

    monkeypatch.setattr(OutputFile, "sync", sync)
    monkeypatch.setattr(LocalJournalFile, "append", append)
    stop(pair, tmp_path / "out.safetensors", at_least=8)
    written = [number for number, (what, pieces) in enumerate(order) if what == "append" and pieces]
    assert sum(order[number][1] for number in written) >= 8
    assert all(order[number - 1][0] == "sync" for number in written)


def test_a_long_piece_is_given_up_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PIECE_ELEMS", 64 * GRAIN)
    for number in range(2):
        save_file({"long": torch.zeros(64 * GRAIN), "short": torch.zeros(3)}, tmp_path / f"{number}.safetensors")

    def slow(group: Any) -> Any:
        def kernel(chunk: Any) -> Any:
            time.sleep(chunk.elems / GRAIN * 0.5)
            return chunk.models[0]

        return kernel

    raised: list[float] = []

    def listen(event: object) -> None:
        if type(event).__name__ == "TaskDone":
            raised.append(time.monotonic())
            raise KeyboardInterrupt

    inputs = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        sm.merge(inputs, tmp_path / "out.safetensors", method=slow, workers=2, memory="64MiB", listener=listen)
    assert time.monotonic() - raised[0] < 10, "the piece would take half a minute"


# ------------------------------------------------------------------------------------------------------- the disk fails


@pytest.fixture
def failing_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], list[str]]]:
    """Makes the first few syncs of files of one name fail. Returns the names of synced files, in order."""
    good = OutputFile.sync

    def arm(failures: int, name: str) -> list[str]:
        seen: list[str] = []

        def sync(file: OutputFile) -> None:
            seen.append(file.location.name)
            if file.location.name == name and seen.count(name) <= failures:
                with open(file.location, "r+b") as stream:  # the pages whose sync failed are lost
                    stream.truncate(0)
                    stream.truncate(file.size)
                raise OSError(errno.EIO, "Input/output error")
            good(file)

        monkeypatch.setattr(OutputFile, "sync", sync)
        return seen

    return arm


@pytest.mark.parametrize("resume", [True, False], ids=["at the first sync", "at the only one, the last"])
@pytest.mark.parametrize("container", OUTPUTS)
def test_what_the_disk_failed_to_store_is_written_anew(
    pair: list[Path], tmp_path: Path, container: str, resume: bool, failing_sync: Callable[[int, str], list[str]]
) -> None:
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / OUTPUTS[container], tmp_path / OUTPUTS[container]
    sm.merge(pair, whole)
    failing_sync(1, "model.safetensors" if container == "folder" else out.name)
    result = sm.merge(pair, out, resume=resume)
    assert content(out) == content(whole)
    assert any("failed to store" in warning for warning in result.warnings)


def test_what_the_disk_fails_to_store_twice_is_not_there(
    pair: list[Path], tmp_path: Path, failing_sync: Callable[[int, str], list[str]]
) -> None:
    out = tmp_path / "out.safetensors"
    failing_sync(99, "out.safetensors")
    with pytest.raises(OSError, match="twice; nothing was written"):
        sm.merge(pair, out)
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------- locks


def hold(out: Path) -> subprocess.Popen[str]:
    """Starts another process that is writing ``out``."""
    code = f"from streammerge.stores.locations import parse; s = parse({str(out)!r}).stage(); "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_of_two_runs_is_told_who_has_the_output(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    other = hold(out)
    try:
        with pytest.raises(sm.LockedError, match=f"being written by process {other.pid}"):
            sm.merge(pair, out)
        assert not out.exists()
    finally:
        other.kill()
        other.wait()
    sm.merge(pair, out)  # the lock of a dead process is taken over
    assert out.exists()
    assert left_over(out) == []


@pytest.mark.parametrize("owner", ["999999999", ""])
def test_without_kernel_locks_the_owner_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    def unsupported(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    folder = tmp_path / ".out.safetensors.streammerge"
    folder.mkdir()
    (folder / "lock").write_text(str(os.getppid()))
    with pytest.raises(sm.LockedError, match=f"process {os.getppid()}"):
        parse(tmp_path / "out.safetensors").stage()
    (folder / "lock").write_text("nonsense")
    with pytest.raises(sm.LockedError, match="a process that did not give its name, as far as can be told from here"):
        parse(tmp_path / "out.safetensors").stage()
    (folder / "lock").write_text(owner)
    parse(tmp_path / "out.safetensors").stage().abort()


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous run removes its folder after we open the lock file and before we lock it."""
    good, calls = lock.fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        good(fd, how)
        if not calls:
            (tmp_path / ".out.safetensors.streammerge" / "lock").unlink()
        calls.append(how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    staging = parse(tmp_path / "out.safetensors").stage()
    assert calls.count(lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB) == 2
    assert json.loads((tmp_path / ".out.safetensors.streammerge" / "lock").read_text())["pid"] == os.getpid()
    staging.abort()


def test_a_link_in_the_place_of_the_staging_folder_is_refused(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / ".out.safetensors.streammerge").symlink_to(tmp_path / "precious")
    with pytest.raises(sm.RecipeError, match="is a link"):
        sm.merge(pair, tmp_path / "out.safetensors")
    assert (tmp_path / "precious" / "file").read_text() == "kept"


# --------------------------------------------------------------------------------------------------------------- commit


@pytest.mark.parametrize("kernel", ["exchange", "two renames"])
def test_a_folder_is_replaced_whole(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    if kernel == "two renames":
        monkeypatch.setattr(libc, "_renameat2", None)
    out = tmp_path / "out"
    sm.merge(pair, out, max_shard_size="500kB")
    assert len(content(out)) > 3
    sm.merge(pair, out, overwrite=True)
    assert sorted(content(out)) == ["model.safetensors", "streammerge.json", "streammerge.yaml"]
    assert left_over(out) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_without_exchange_the_old_folder_comes_back(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "out"
    sm.merge(pair, out)
    old = content(out)

    def fail(*paths: object) -> None:
        raise error

    monkeypatch.setattr(libc, "_renameat2", None)
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(commit.os, "replace", lambda a, b: os.rename(a, b) if "journal" in str(b) else fail())
        sm.merge(pair, out, overwrite=True, weights=[1, 3])
    assert content(out) == old


def test_a_file_that_came_meanwhile_is_not_lost(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sm.merge(pair, out)

    def listen(event: object) -> None:
        if type(event).__name__ == "Syncing":
            (out / "notes.txt").write_text("mine")

    with pytest.raises(sm.RecipeError, match=r"also holds notes\.txt"):
        sm.merge(pair, out, overwrite=True, listener=listen)
    assert (out / "notes.txt").read_text() == "mine"


def test_what_is_not_ours_stays_in_a_folder_of_our_name(pair: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / ".out.safetensors.streammerge"
    (folder / "precious").mkdir(parents=True)
    (folder / "precious" / "file").write_text("kept")
    sm.merge(pair, tmp_path / "out.safetensors")
    assert (folder / "precious" / "file").read_text() == "kept"
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_the_lock_goes_last(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a finished run still removes its files, no other run may begin in its folder."""
    out, refused = tmp_path / "out", []
    good = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        with pytest.raises(sm.LockedError):
            parse(out).stage(overwrite=True)
        refused.append(path)
        good(path, **options)

    monkeypatch.setattr("shutil.rmtree", rmtree)
    sm.merge(pair, out)
    sm.merge(pair, out, overwrite=True)
    assert refused
    assert left_over(out) == []


def test_many_processes_replace_one_output(pair: list[Path], tmp_path: Path) -> None:
    """Each process ends well or reports that another one has the output. The output is whole at the end."""
    code = f"""
import sys, streammerge as sm
ends = set()
for _ in range(6):
    try:
        sm.merge({[str(p) for p in pair]!r}, {str(tmp_path / "out")!r}, overwrite=True, weights=[1, int(sys.argv[1])])
        ends.add(0)
    except sm.LockedError:
        ends.add(7)
print(ends)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in (1, 2, 3)
    ]
    for run in runs:
        said, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
        assert set(said.strip("{}\n").split(", ")) <= {"0", "7"}
    sm.verify(tmp_path / "out", sample=0)
    assert left_over(tmp_path / "out") == []


def test_an_unsynced_output_is_never_published(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(file: OutputFile) -> None:
        raise RuntimeError("anything at all")

    monkeypatch.setattr(OutputFile, "sync", die)
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    with pytest.raises(RuntimeError, match="were not synced"):
        sm.merge(pair, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_journal_that_cannot_be_written_promises_nothing_more(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, calls = os.write, []

    def write(fd: int, data: Any) -> int:
        calls.append(fd)
        if len(calls) == 3:  # the plan's line, one batch, and then half a batch on a full disk
            good(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return good(fd, data)

    out, told = tmp_path / "out.safetensors", []

    def listen(event: object) -> None:
        if type(event).__name__ == "TaskDone":
            time.sleep(0.01)
        elif type(event).__name__ == "Syncing":
            raise KeyboardInterrupt
        elif type(event).__name__ == "Suspended":
            told.append(event)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(commit.os, "write", write)
        sm.merge(pair, out, listener=listen)
    (event,) = resumed_events(lambda listener: sm.merge(pair, out, listener=listener))
    assert event.kept_bytes >= told[0].kept_bytes > 0  # whole lines of the half batch count, too


@pytest.mark.parametrize("when", ["_rename", "_sync_folder"])
def test_an_interruption_around_the_commit_tells_what_is(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before the rename the run can be continued. After the rename the output is there."""
    out, told = tmp_path / "out.safetensors", []
    holder = LocalStaging
    good = getattr(holder, when)

    def interrupted(*arguments: object) -> None:
        if when == "_sync_folder":
            good(*arguments)
        raise KeyboardInterrupt

    def listen(event: object) -> None:
        told.append(type(event).__name__)
        if told[-1] == "TaskDone":
            time.sleep(0.01)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(holder, when, interrupted)
        sm.merge(pair, out, listener=listen)
    if when == "_sync_folder":
        assert told[-1] == "Published"
        sm.verify(out, sample=0)
        assert left_over(out) == []
    else:
        assert told[-1] == "Suspended"
        assert not out.exists()
        assert len(resumed_events(lambda listener: sm.merge(pair, out, listener=listener))) == 1


def test_an_interrupted_conversion_before_a_merge_leaves_nothing_without_resume(pair: list[Path], tmp_path: Path) -> None:
    def listen(event: object) -> None:
        if type(event).__name__ == "Syncing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge(pair, tmp_path / "out.safetensors", convert_first=tmp_path / "cv", resume=False, listener=listen)
    assert list((tmp_path / "cv").iterdir()) == []


def test_hashing_stops_at_once(pair: list[Path], tmp_path: Path) -> None:
    with open(tmp_path / "0.pth", "rb") as stream:
        head = stream.read()
    length = 6 << 30
    with open(tmp_path / "long.safetensors", "wb") as stream:
        text = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (length, length)
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + length)
    assert head
    command = [sys.executable, "-m", "streammerge", "convert", "long.safetensors", "-o", "out.safetensors", "--hash"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".out.safetensors.streammerge" / "output" / "out.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, time.monotonic() - began < 5) == (143, True)


def test_an_output_that_appears_meanwhile_is_not_replaced(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    def listen(event: object) -> None:
        if type(event).__name__ == "Syncing":
            out.write_text("somebody else's")

    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.merge(pair, out, listener=listen)
    assert out.read_text() == "somebody else's"
    out.unlink()
    sm.merge(pair, out)
    assert left_over(out) == []


def test_a_folder_that_cannot_be_synced_is_said(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(system, "sync_folder", fail)
    out = tmp_path / "out.safetensors"
    with pytest.raises(OSError, match="is there, whole, but its folder could not be synced"):
        sm.merge(pair, out)
    sm.verify(out, sample=0)
    assert left_over(out) == []


def test_what_a_run_left_that_was_killed_after_its_commit_is_swept(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    sm.merge(pair, out)
    (tmp_path / ".out.safetensors.streammerge" / "output").mkdir(parents=True)
    (tmp_path / ".out.safetensors.streammerge" / "lock").write_text("1")
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.merge(pair, out)
    assert left_over(out) == []


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with two checkpoints that take some seconds to merge."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(2):
        tensors = {f"layer.{i}": torch.randn(1 << 20, generator=torch.Generator().manual_seed(i)) for i in range(20)}
        save_file(tensors, folder / f"{number}.safetensors")
    return folder


SLOWLY = """
import sys, time
from streammerge.cli.main import main
from streammerge.stores import journal
from streammerge.cli.progress import Progress
journal.INTERVAL_SECONDS = 0.01
listen = Progress.__call__
Progress.__call__ = lambda self, event: (time.sleep(0.05), listen(self, event))
sys.argv[0] = "streammerge"
main()
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        pytest.param(signal.SIGHUP, 129, "terminated", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_in_time_and_says_how_to_go_on(
    large: Path, tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    out = tmp_path / "out.safetensors"
    command = ["merge", "0.safetensors", "1.safetensors", "-o", str(out), "--weights", "0.6,0.4"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *command],
        cwd=large,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    wait_until(lambda: journalled(out) >= 3 or process.poll() is not None)
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 10
    assert process.returncode == code, said
    assert re.search(rf"error: {word}; [^;]* are kept; the same command goes on from there", said)
    assert not out.exists()
    again = shlex.split(said.strip().splitlines()[-1])
    assert again[0] == "streammerge"
    done = subprocess.run(
        [sys.executable, "-m", *again], cwd=large, capture_output=True, text=True, timeout=120, check=True
    )
    assert "continued an interrupted run" in done.stderr
    assert left_over(out) == []


AT_ONCE = SLOWLY.replace("INTERVAL_SECONDS = 0.01", "INTERVAL_SECONDS = 60")


def test_a_signal_keeps_all_that_was_finished(large: Path, tmp_path: Path) -> None:
    """No sync was due before the signal, so the last one has to keep it all."""
    out = tmp_path / "out.safetensors"
    command = ["merge", "0.safetensors", "1.safetensors", "-o", str(out), "--format", "json"]
    process = subprocess.Popen(
        [sys.executable, "-c", AT_ONCE, *command],
        cwd=large,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    assert process.stderr is not None
    events: list[dict[str, Any]] = []
    while sum(each["event"] == "TaskDone" for each in events) < 6:
        events.append(json.loads(process.stderr.readline()))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, rest = process.communicate(timeout=20)
    assert time.monotonic() - began < 10
    events += map(json.loads, rest.splitlines())
    done = sum(each["written_bytes"] for each in events if each["event"] == "TaskDone")
    (suspended,) = [each for each in events if each["event"] == "Suspended"]
    assert done > 0
    assert suspended["kept_bytes"] >= done
    error = json.loads(said)["error"]
    assert (error["class"], error["exit_code"]) == ("Interrupted", 130)
    assert re.match(r"interrupted; [^;]* are kept; the same command goes on from there", error["message"])
    again = subprocess.run(
        [sys.executable, "-m", "streammerge", *command], cwd=large, capture_output=True, text=True, timeout=120, check=True
    )
    (resumed,) = [each for each in map(json.loads, again.stderr.splitlines()) if each["event"] == "Resumed"]
    assert resumed["kept_bytes"] == suspended["kept_bytes"]


def test_a_signal_before_the_first_byte_says_what_an_earlier_run_has_kept(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    stop([large / "0.safetensors", large / "1.safetensors"], out)
    kept = journalled(out)
    early = """
import os, signal, sys
from streammerge.cli.main import main
from streammerge.planning import plan
def stopped(*given, **more):
    os.kill(os.getpid(), signal.SIGINT)
sys.modules["streammerge.planning.plan"].build_plan = stopped
sys.argv[0] = "streammerge"
main()
"""
    command = [sys.executable, "-c", early, "merge", "0.safetensors", "1.safetensors", "-o", str(out)]
    done = subprocess.run(command, cwd=large, capture_output=True, text=True, timeout=60, preexec_fn=hear_signals)
    assert done.returncode == 130
    assert re.fullmatch(
        r"error: interrupted; nothing new was written; [\d.]+ MB of an earlier run are kept, and the command of that run "
        r"goes on from there\n",
        done.stderr,
    )
    assert journalled(out) == kept


def test_a_hangup_that_nohup_hides_does_not_stop(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", SLOWLY, "merge", "0.safetensors", "1.safetensors", "-o", str(out)],
        cwd=large,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: journalled(out) or process.poll() is not None)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert out.exists()


UNFORESEEN = {
    "module": ModuleNotFoundError("No module named 'numpy.core'"),
    "bug": TypeError("cannot unpack"),
    "descriptors": OSError(errno.EMFILE, "Too many open files"),
    "memory": MemoryError(),
}


@pytest.mark.parametrize("seconds", [0.001, 60], ids=["journalled", "nothing journalled"])
@pytest.mark.parametrize("error", UNFORESEEN)
@pytest.mark.parametrize("container", OUTPUTS)
@pytest.mark.sampled(3)
def test_an_error_of_the_last_check_keeps_the_finished_work(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, error: str, seconds: float
) -> None:
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / OUTPUTS[container], tmp_path / OUTPUTS[container]
    needed = sm.merge(pair, whole).read_bytes
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", seconds)
    told = []

    def fail(*arguments: object, **options: object) -> None:
        raise UNFORESEEN[error]

    with monkeypatch.context() as patched, pytest.raises(sm.UncheckedError) as caught:
        patched.setattr(readback, "open_checkpoint", fail)
        sm.merge(pair, out, listener=lambda event: told.append(type(event).__name__))
    staging = tmp_path / f".{out.name}.streammerge"
    assert not out.exists()
    assert told[-1] == "Suspended"
    assert f"is kept in {staging}, and the same command goes on from there" in str(caught.value)
    assert type(UNFORESEEN[error]).__name__ in str(caught.value)
    made = staging / "output" / ("" if container == "folder" else out.name)
    assert content(made) == content(whole)
    told.clear()
    result = sm.merge(pair, out, listener=lambda event: told.append(type(event).__name__))
    assert "Resumed" in told
    assert "TaskDone" not in told
    assert result.read_bytes < needed
    assert content(out) == content(whole)
    assert left_over(out) == []


def test_an_error_of_the_machine_within_a_reader_is_none_of_the_output(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"

    def fail(*arguments: object, **options: object) -> None:
        raise sm.FormatError("it cannot be read") from OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched, pytest.raises(sm.UncheckedError, match="it cannot be read"):
        patched.setattr(readback, "open_checkpoint", fail)
        sm.merge(pair, out)
    assert len(resumed_events(lambda listener: sm.merge(pair, out, listener=listener))) == 1


def test_what_the_last_check_finds_wrong_is_removed(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"

    def refuse(*arguments: object, **options: object) -> None:
        raise sm.FormatError("its header is damaged")

    monkeypatch.setattr(readback, "open_checkpoint", refuse)
    with pytest.raises(sm.VerifyError, match="nothing was written: its header is damaged") as caught:
        sm.merge(pair, out)
    assert not isinstance(caught.value, sm.UncheckedError)
    assert left_over(out) == []


@pytest.mark.parametrize("container", OUTPUTS)
@pytest.mark.parametrize("own", [False, True], ids=["no resume", "own method"])
def test_an_error_of_the_last_check_keeps_what_cannot_be_continued(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, own: bool
) -> None:
    def half(group: Any) -> Any:
        return lambda chunk: chunk.models[0] * 0.5

    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / OUTPUTS[container], tmp_path / OUTPUTS[container]
    options: dict[str, Any] = {"method": half} if own else {"resume": False}
    sm.merge(pair, whole, **options)
    monkeypatch.setattr(readback, "open_checkpoint", lambda *arguments: [][0])
    told = []
    with pytest.raises(sm.UncheckedError, match="move it away") as caught:
        sm.merge(pair, out, listener=lambda event: told.append(type(event).__name__), **options)
    assert "Suspended" not in told
    kept = Path(str(caught.value).partition("is kept as ")[2].partition(";")[0])
    assert content(kept) == content(whole)


def test_the_command_says_how_the_work_goes_on_after_the_last_check(pair: list[Path], tmp_path: Path) -> None:
    """The safetensors library cannot be imported, as after a failed upgrade."""
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "safetensors.py").write_text("raise ImportError('broken')")
    command = [sys.executable, "-m", "streammerge", "merge", "0.pth", "1.pth", "-o", "out.safetensors"]
    paths = os.pathsep.join([str(tmp_path / "block"), *sys.path])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "error: the last check of out.safetensors could not be made (ImportError: broken)" in done.stderr
    assert re.search(r"MB of .* MB are kept; the same command goes on from there:\n  streammerge merge", done.stderr)
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert done.returncode == 0
    sm.verify(tmp_path / "out.safetensors", sample=0)


def test_the_first_value_that_will_be_refused_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        tensors = {f"w{number:02}": torch.ones(1 << 20) for number in range(12)}
        tensors["w01"][7] = torch.nan if name == "a" else 1.0
        save_file(tensors, f"{name}.safetensors")
    done: list[str] = []
    with pytest.raises(sm.VerifyError, match=r"(?s)NaN or infinite values.*w01: 1 in a\.safetensors"):
        sm.merge(
            ["a.safetensors", "b.safetensors"],
            "out.safetensors",
            memory="24MiB",
            workers=1,
            listener=lambda event: done.append(event.tensor) if isinstance(event, TaskDone) else None,
        )
    assert set(done) <= {"w00", "w01", "w02", "w03"}
    assert sorted(os.listdir()) == ["a.safetensors", "b.safetensors"]


def test_an_input_that_is_overwritten_is_told_as_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_file({f"w{number:02}": torch.ones(1 << 20) for number in range(12)}, f"{name}.safetensors")

    def overwrite(event: object) -> None:
        if isinstance(event, TaskDone) and event.tensor == "w00":
            with open("b.safetensors", "r+b") as file:
                file.seek(-(40 << 20), os.SEEK_END)
                file.write(b"\xff" * (40 << 20))

    with pytest.raises(sm.ChangedError, match=r"b\.safetensors changed"):
        sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", memory="24MiB", workers=1, listener=overwrite)
