"""Open files are bounded, whatever the number of inputs and outputs; one that is in use stays open."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.stores import descriptors
from streammerge.stores.descriptors import Descriptor
from streammerge.stores.files import InputFile
from streammerge.stores.locations import parse
from streammerge.stores.written_files import OutputFile

LIMITED = """
import json, os, resource, sys
soft, hard, code = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
exec(code)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard), "the limit was not put back"
"""


def limited(folder: Path, code: str, soft: int, hard: int | None = None) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own that may have so many files open."""
    command = [sys.executable, "-c", LIMITED, str(soft), str(hard or soft), f"import streammerge as sm\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def sharded(folder: Path, shards: int, rows: int = 1) -> dict[str, torch.Tensor]:
    """A checkpoint with a tensor in each shard."""
    folder.mkdir()
    tensors = {f"layer.{n}.weight": torch.full((rows, 3), float(n)) for n in range(shards)}
    names = {name: f"model-{n:05}-of-{shards:05}.safetensors" for n, name in enumerate(tensors)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / names[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tensors


@pytest.mark.parametrize("io", ["mmap", pytest.param("pread", marks=pytest.mark.slow)])
def test_600_input_shards_under_a_limit_of_64(tmp_path: Path, io: str) -> None:
    tensors = sharded(tmp_path / "in", 600)
    code = f"sm.merge(['in', 'in'], 'out.safetensors', io={io!r}, weights=[1, 3], state_dict=None, workers=2, polite=True)"
    done = limited(tmp_path, code, 64)
    assert done.returncode == 0, done.stderr[-2000:]
    merged = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


def test_2000_output_shards_under_a_limit_of_256(tmp_path: Path) -> None:
    tensors = {f"layer.{n}.weight": torch.full((3, 100), float(n)) for n in range(2000)}
    save_file(tensors, tmp_path / "in.safetensors")
    done = limited(tmp_path, "sm.convert('in.safetensors', 'out', max_shard_size=1200, workers=2)", 256)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "out").glob("model-*"))) == 2000
    for number in (0, 1, 999, 1999):
        (name, made), *rest = load_file(tmp_path / "out" / f"model-{number + 1:05}-of-02000.safetensors").items()
        assert not rest
        assert torch.equal(made, tensors[name])
    sm.verify(tmp_path / "out", sample=0)


def test_many_models_in_one_tensor_under_a_limit_of_64(tmp_path: Path) -> None:
    """More inputs at once than may be mapped: they are read instead, and the bytes are the same."""
    for number in range(80):
        save_file({"w": torch.full((7, 11), float(number))}, tmp_path / f"{number}.safetensors")
    inputs = [f"{number}.safetensors" for number in range(80)]
    done = limited(tmp_path, f"print(sm.merge({inputs}, 'out.safetensors', workers=2).plan.io)", 64)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ("pread" if descriptors.MAPS_HOLD_FILES else "mmap")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        sm.merge(inputs, "whole.safetensors", workers=2)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_soft_limit_is_raised_and_put_back(tmp_path: Path) -> None:
    sharded(tmp_path / "in", 200)
    code = """
import os
most = 0
def listen(event):
    global most
    most = max(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
sm.convert('in', 'out', listener=listen)
assert soft < most <= hard, most
"""
    done = limited(tmp_path, code, 64, 4096)
    assert done.returncode == 0, done.stderr[-2000:]


def test_too_few_files_are_told_before_the_first_byte(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "in.safetensors")
    code = """
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
try:
    sm.convert('in.safetensors', 'out.safetensors', workers=30)
except sm.BudgetError as error:
    print(error)
"""
    done = limited(tmp_path, code, 64)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the limit on open files leaves room for" in done.stdout
    assert "30 workers need 62" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


# --------------------------------------------------------------------------------------------------------- in a process


@pytest.fixture
def two_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At most two descriptors are kept open."""
    descriptors._make_room(0)
    monkeypatch.setattr(descriptors, "limit", lambda: 2)
    yield
    descriptors._make_room(0)


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def test_the_longest_unused_is_closed_and_opens_again(tmp_path: Path, two_open: None) -> None:
    path, calls = tmp_path / "x", []
    path.write_bytes(b"12345")

    def open_it() -> int:
        calls.append(path)
        return opened(path)

    several = [Descriptor(open_it) for _ in range(3)]
    for each in (*several, several[1], several[2]):
        with each as fd:
            assert os.pread(fd, 5, 0) == b"12345"
    assert len(calls) == 3
    with several[0]:
        assert len(calls) == 4
    assert len(descriptors._open) == 2
    for each in several:
        each.close()
    assert not descriptors._open


def test_one_in_use_is_never_closed(tmp_path: Path, two_open: None) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    several = [Descriptor(lambda: opened(path)) for _ in range(5)]
    with several[0] as a, several[1] as b, several[2] as c:
        several[0].close()
        assert len({a, b, c}) == 3
        assert [os.pread(fd, 5, 0) for fd in (a, b, c)] == [b"12345"] * 3
    with pytest.raises(OSError, match="Bad file descriptor"), several[0]:
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(a)
    for each in several:
        each.close()


def test_files_are_used_while_another_one_is_synced(tmp_path: Path, two_open: None) -> None:
    """Closing a file that has to be synced first takes as long as the disk needs. No other file waits for that."""
    (tmp_path / "x").write_bytes(b"12345")
    syncing, go_on = threading.Event(), threading.Event()

    def sync(*fd: int) -> None:
        syncing.set()
        assert go_on.wait(20)

    slow = Descriptor(lambda: opened(tmp_path / "x"), sync)
    others = [Descriptor(lambda: opened(tmp_path / "x")) for _ in range(3)]
    with slow:
        pass
    retiring = threading.Thread(target=slow.retire)
    retiring.start()
    assert syncing.wait(20)
    done = threading.Event()

    def use() -> None:
        for each in others:
            with each as fd:
                os.pread(fd, 5, 0)
        with slow as fd:
            os.pread(fd, 5, 0)
        done.set()

    using = threading.Thread(target=use)
    using.start()
    try:
        assert done.wait(10), "the other files wait for the sync"
    finally:
        go_on.set()
        retiring.join()
        using.join()
    with slow as fd:
        assert os.pread(fd, 5, 0) == b"12345", "it was used meanwhile, so it stays open"
    for each in (*others, slow):
        each.close()
    assert not descriptors._open


def test_the_collector_may_close_a_file_while_room_is_made(
    tmp_path: Path, two_open: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    several = [Descriptor(lambda: opened(tmp_path / "x")) for _ in range(6)]
    with several[0], several[1], several[2], several[3], several[4], several[5]:
        pass
    unreachable = several[:2]

    def idle(one: Descriptor) -> bool:
        while unreachable:
            unreachable.pop().close()
        return not one._users

    monkeypatch.setattr(Descriptor, "idle", property(idle))
    descriptors._make_room(1)
    monkeypatch.undo()
    assert len(descriptors._open) == 1
    for each in several:
        each.close()
    assert not descriptors._open


def test_many_threads_share_few_descriptors(tmp_path: Path, two_open: None) -> None:
    files = []
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 5000)
        files.append(InputFile(parse(tmp_path / str(number))))
    wrong: list[object] = []

    def read(first: int) -> None:
        for turn in range(300):
            number = (first * 3 + turn) % 8
            buffer = bytearray(1000)
            try:
                files[number].read_into(memoryview(buffer), turn)
            except BaseException as error:  # noqa: BLE001 - told by the main thread
                wrong.append(error)
            if buffer != bytes([number]) * 1000:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_was_replaced_while_it_was_closed_is_noticed(tmp_path: Path, two_open: None) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    file = InputFile(parse(path))
    descriptors._make_room(0)
    (tmp_path / "y").write_bytes(b"54321")
    os.replace(tmp_path / "y", path)
    with pytest.raises(sm.ChangedError, match="changed since it was planned"):
        file.read_into(memoryview(bytearray(5)), 0)


def test_no_strangers_descriptor_is_closed(tmp_path: Path) -> None:
    """The number of a file that was refused goes to somebody else at once, and stays theirs."""
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    status = parse(path).status()
    path.write_bytes(b"123456")
    for _ in range(3):
        with pytest.raises(sm.ChangedError):
            InputFile(parse(path), status)
        strangers = [os.open(path, os.O_RDONLY) for _ in range(3)]
        with pytest.raises(sm.ChangedError) as caught:
            InputFile(parse(path), status)
        del caught
        for fd in strangers:
            os.fstat(fd)
            os.close(fd)


def test_what_is_closed_for_room_was_synced_before(tmp_path: Path, two_open: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may tell a failure to those only who had the file open; so it is asked, and the answer remembered."""
    file = OutputFile(parse(tmp_path / "x"), 10)
    file.write_full(b"0123456789", 0)
    synced: list[int] = []
    good = os.fsync

    def fsync(fd: int) -> None:
        synced.append(fd)
        good(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    descriptors._make_room(0)
    assert len(synced) == 1
    assert file.synced
    file.write_full(b"x", 0)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    descriptors._make_room(0)
    monkeypatch.setattr(os, "fsync", good)
    with pytest.raises(OSError, match="Input/output error"):
        file.sync()
    file.close()


def test_the_limit_that_somebody_else_sets_meanwhile_stays() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = (min(before[0], 600), before[1])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, low)
        with descriptors.room_for(files=1000, workers=2):
            raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            assert raised > low[0] or before[1] <= low[0]
            resource.setrlimit(resource.RLIMIT_NOFILE, (low[0] - 1, before[1]))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == low[0] - 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_fork_while_a_thread_opens_files_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            InputFile(parse(tmp_path / "x")).close()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                InputFile(parse(tmp_path / "x")).close()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()
