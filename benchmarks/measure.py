"""Measurement of one command in its own process: time, and the kernel's counts of memory and disk traffic."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cgroup import MemoryGroup

_LEAST_SECONDS, _MOST_SECONDS = 0.0005, 0.01
"""Seconds between two samples of a process. They are short at first, so that a short process is sampled too."""
_KEPT_SAMPLES = 400
_FIELD = re.compile(r"^(RssAnon|RssShmem|VmRSS|VmHWM):\s+(\d+)", re.MULTILINE)
_COUNT = re.compile(r"^(read_bytes|write_bytes): (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Measured:
    """Results in bytes and seconds; ``exit_code`` is negative for a signal.

    ``anonymous``: the most anonymous memory, sampled. ``resident``: the largest resident set by the kernel's count
    (VmHWM), with mapped and shared memory. ``cgroup``: the most charged to its group, with page cache. ``disk_read``
    and ``disk_written``: traffic to and from the disk. ``samples``: (seconds, anonymous, resident).
    """

    seconds: float
    cpu_seconds: float
    anonymous: int
    resident: int
    cgroup: int | None
    disk_read: int
    disk_written: int
    exit_code: int
    output: str
    samples: list[tuple[float, int, int]] = field(default_factory=list)


def measure(command: Sequence[str | Path], limit_bytes: int | None = None) -> Measured:
    """Runs the command. ``limit_bytes``: limit of its memory cgroup. Raises OSError if a limit cannot be set.

    The largest resident set is not taken from the usage of ended children: that includes the parent's memory at the
    fork, and keeps the maximum over all children.
    """
    group = None
    with contextlib.suppress(OSError):
        group = MemoryGroup(limit_bytes)
    if limit_bytes is not None and group is None:
        raise OSError("a limit needs a memory cgroup, which cannot be made here")
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=group.join if group else None,
        )
        watch, pause = _Watch(child.pid, began), _LEAST_SECONDS
        while True:
            watch.look()
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(pause)
            pause = min(1.1 * pause, _MOST_SECONDS)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read().decode(errors="replace")
    peak = group.peak_bytes if group else None
    if group:
        group.close()
    return Measured(
        seconds,
        usage.ru_utime + usage.ru_stime,
        watch.anonymous,
        watch.resident,
        peak,
        watch.moved["read_bytes"],
        watch.moved["write_bytes"],
        child.returncode,
        said,
        watch.thinned(),
    )


class _Watch:
    """Samples /proc while a process runs."""

    def __init__(self, pid: int, began: float) -> None:
        self._folder, self._began = Path(f"/proc/{pid}"), began
        self.anonymous = self.resident = 0
        self.moved = {"read_bytes": 0, "write_bytes": 0}
        self._samples: list[tuple[float, int, int]] = []

    def look(self) -> None:
        try:
            status, io = (self._folder / "status").read_text(), (self._folder / "io").read_text()
        except OSError:
            return
        held = {name: int(kib) << 10 for name, kib in _FIELD.findall(status)}
        if "VmHWM" not in held:  # the process has ended
            return
        own = held["RssAnon"] + held["RssShmem"]
        self.anonymous, self.resident = max(self.anonymous, own), max(self.resident, held["VmHWM"])
        self.moved.update((name, int(count)) for name, count in _COUNT.findall(io))
        self._samples.append((time.perf_counter() - self._began, own, held["VmRSS"]))

    def thinned(self) -> list[tuple[float, int, int]]:
        """Returns a few hundred of the samples."""
        step = max(len(self._samples) // _KEPT_SAMPLES, 1)
        return [(round(seconds, 3), own, resident) for seconds, own, resident in self._samples[::step]]
