"""Kills merges, or makes their disk fail, at every call that could lose data. Then checks the files.

python tests/crashes.py kill-at-calls | fail-at-calls | kill-at-moments [--every N] [--moments N] [--seed N]

Each run is its own process, forked before torch has started a thread. After each run the inputs must be unchanged, and the
output must be absent, unchanged, or whole. The same merge must then give the same bytes and leave no other file. The last
line reports how many runs were tried, how many survived, and how many continued from kept pieces.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning import tasks
from streammerge.stores import journal, libc
from streammerge.tensors.spec import GRAIN

tasks.PIECE_ELEMS = GRAIN  # so that small tensors have pieces
journal.INTERVAL_SECONDS = 0.002  # so that the journal records small merges
CALLS = (
    "open",
    "mkdir",
    "fallocate",
    "pwrite",
    "write",
    "ftruncate",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
)


class Scene:
    """A merge of two checkpoints into one container, with or without an older output in its place."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.out = folder / {"file": "out.safetensors", "archive": "out.pth", "spooled": "out.pth"}.get(kind, "out")
        self.overwrite = kind == "replaced folder"
        self.inputs = [self._input(number) for number in range(2)]
        self.before = {path: path.read_bytes() for path in self.inputs}
        self.old: dict[str, bytes] | None = None
        self._merge(lambda: None)  # imports what every run needs, so that the time of a run is that of the merge
        self.clear()
        began = time.monotonic()
        assert self.run() == 0
        self.seconds = time.monotonic() - began
        self.whole = self.state()
        self.clear()
        if self.overwrite:
            self.old = {"model.safetensors": self.before[self.inputs[0]]}

    def _input(self, number: int) -> Path:
        chance = torch.Generator().manual_seed(number)
        tensors = {f"layer.{i}.weight": torch.randn(i + 1, GRAIN // 3, generator=chance) for i in range(6)}
        if self.kind in ("file", "folder", "replaced folder"):
            save_file(tensors, self.folder / f"{number}.safetensors")
            return self.folder / f"{number}.safetensors"
        torch.save({"model": tensors, "step": number}, self.folder / f"{number}.pth")
        if self.kind == "spooled":
            with zipfile.ZipFile(self.folder / f"{number}.pth") as stored:
                records = {name: stored.read(name) for name in stored.namelist()}
            with zipfile.ZipFile(self.folder / f"{number}.pth", "w", zipfile.ZIP_DEFLATED) as packed:
                for name, data in records.items():
                    packed.writestr(name, data)
        return self.folder / f"{number}.pth"

    def clear(self) -> None:
        """Restores the scene to its state before any run."""
        for path in self.folder.iterdir():
            if path not in self.inputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, content in (self.old or {}).items():
            self.out.mkdir(exist_ok=True)
            (self.out / name).write_bytes(content)

    def state(self) -> dict[str, bytes] | None:
        """Returns the files under the output's name, None if there are none."""
        if self.out.is_dir():
            return {path.name: path.read_bytes() for path in self.out.iterdir()}
        return {"": self.out.read_bytes()} if self.out.exists() else None

    def run(self, prepare: Callable[[], None] = lambda: None, alive_seconds: float | None = None) -> int:
        """Runs the merge in its own process, killed after ``alive_seconds``. Returns its exit code, -9 if it was killed."""
        pid = os.fork()
        if pid == 0:
            os._exit(self._merge(prepare))
        if alive_seconds is not None:
            time.sleep(alive_seconds)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _merge(self, prepare: Callable[[], None]) -> int:
        resumed = []

        def listen(event: object) -> None:
            time.sleep(0.001)  # a little time for the journal
            if type(event).__name__ == "Resumed":
                resumed.append(event)

        options: dict[str, Any] = {"max_shard_size": 2_000_000} if "folder" in self.kind else {}
        try:
            prepare()
            sm.merge(
                self.inputs, self.out, weights=[0.7, 0.3], workers=2, overwrite=self.overwrite, listener=listen, **options
            )
        except sm.StreammergeError as error:
            return error.exit_code
        except OSError:
            return 1
        except BaseException as error:  # noqa: BLE001 - the exit code reports it
            print(repr(error), file=sys.stderr)
            return 99
        return 64 if resumed else 0

    def judge(self) -> str:
        """Checks the files after a fault. Returns the error, or how the next run ended: "complete", "resumed" or
        "restarted"."""
        if any(path.read_bytes() != content for path, content in self.before.items()):
            return "WRONG: an input was changed"
        there = self.state()
        if there not in (self.old, self.whole):
            return "WRONG: the output is neither what it was nor whole"
        complete = there == self.whole
        code = self.run()
        if code not in ((0, 2, 64) if complete else (0, 64)):
            return f"WRONG: the next run ended with {code}"
        if self.state() != self.whole:
            return "WRONG: the next run made other bytes"
        left = {path.name for path in self.folder.iterdir()} - {path.name for path in (*self.inputs, self.out)}
        if left:
            return f"WRONG: {sorted(left)} is left over"
        return "complete" if complete else "resumed" if code == 64 else "restarted"


class Fault:
    """Does something at the call with this number, or at every call from it on. The parent can see ``fired``."""

    def __init__(self, number: int, what: str, for_ever: bool = False, only: tuple[str, ...] = CALLS) -> None:
        self.number, self.what, self.for_ever, self.only = number, what, for_ever, only
        self._lock, self._count = threading.Lock(), 0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this

    @property
    def fired(self) -> str:
        return os.pread(self._said.fileno(), 100, 0).decode().strip()

    def install(self) -> None:
        for name in self.only:
            if hasattr(os, name):
                setattr(os, name, self._around(name, getattr(os, name)))
        if {"rename", "replace"} & {*self.only} and libc._renameat2 is not None:
            libc._renameat2 = self._around("renameat2", libc._renameat2)
        if "fallocate" in self.only and libc._fallocate is not None:
            libc._fallocate = self._around("fallocate", libc._fallocate)

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **options: Any) -> Any:
            if name == "open" and not (len(args) > 1 and args[1] & os.O_CREAT):
                return call(*args, **options)
            with self._lock:
                self._count += 1
                due = self._count == self.number or (self.for_ever and self._count > self.number)
            if not due:
                return call(*args, **options)
            os.pwritev(self._said.fileno(), [name.encode().ljust(20)], 0)
            return self._happen(name, call, args, options)

        return made

    def _happen(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        try:
            if self.what == "killed after":
                call(*args, **options)
        finally:
            if self.what.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "short":
            return call(args[0], memoryview(args[1])[: max(len(args[1]) // 2, 1)], *args[2:], **options)
        number = getattr(errno, self.what)
        if name in ("renameat2", "fallocate"):
            ctypes.set_errno(number)
            return -1
        raise OSError(number, os.strerror(number))


def kill_at_calls(scene: Scene, every: int) -> Iterator[str]:
    """Kills the merge before and after each call, until no call is left."""
    for what in ("killed before", "killed after"):
        for number in itertools.count(1, every):
            scene.clear()
            fault = Fault(number, what)
            code = scene.run(fault.install)
            if not fault.fired:
                break
            said = scene.judge() if code == -9 else f"WRONG: it ended with {code}"
            yield f"{what} call {number}, {fault.fired}: {said}"


CODES = {"ENOSPC": 6, "EDQUOT": 6, "EIO": 1, "short": 0}


def fail_at_calls(scene: Scene, every: int) -> Iterator[str]:
    """Makes each call fail, once and for ever. Writes that may be short are also made short."""
    faults = [("short", False, ("pwrite", "write")), ("short", True, ("pwrite", "write"))]
    faults += [(what, for_ever, CALLS) for what in ("ENOSPC", "EDQUOT", "EIO") for for_ever in (False, True)]
    for what, for_ever, only in faults:
        for number in itertools.count(1, every):
            scene.clear()
            fault = Fault(number, what, for_ever, only)
            code = scene.run(fault.install)
            if not fault.fired:
                break
            if code == 0 and scene.state() != scene.whole:
                said = "WRONG: it said that all was well"
            elif code in (0, CODES[what]):  # a failing journal or a failing removal stops no run
                said = scene.judge()
            else:
                said = f"WRONG: it ended with {code}"
            yield f"{what} {'from' if for_ever else 'at'} call {number}, {fault.fired}: exit {code}, {said}"


def kill_at_moments(scene: Scene, moments: int, seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    for _ in range(moments):
        scene.clear()
        seconds = chance.uniform(0, 1.2 * scene.seconds)
        code = scene.run(alive_seconds=seconds)
        said = scene.judge() if code in (-9, 0, 64) else f"WRONG: it ended with {code}"
        yield f"killed after {seconds:.3f} s: {said}"


KINDS = ("file", "archive", "spooled", "folder", "replaced folder")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", choices=["kill-at-calls", "fail-at-calls", "kill-at-moments"])
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--every", type=int, default=1, help="only every such call")
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    wish = parser.parse_args()
    tried = wrong = 0
    ends: Counter[str] = Counter()
    for kind in wish.kind or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            scene = Scene(Path(folder), kind)
            sweep = {
                "kill-at-calls": lambda: kill_at_calls(scene, wish.every),
                "fail-at-calls": lambda: fail_at_calls(scene, wish.every),
                "kill-at-moments": lambda: kill_at_moments(scene, wish.moments, wish.seed),
            }[wish.sweep]
            for line in sweep():
                tried += 1
                wrong += "WRONG" in line
                ends[line.rpartition(" ")[2]] += 1
                if wish.verbose or "WRONG" in line:
                    print(f"{kind}: {line}", flush=True)
    print(f"{wish.sweep}: {tried} tried, {tried - wrong} survived; then {ends['resumed']} went on from kept pieces")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
