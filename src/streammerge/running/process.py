"""Measures the memory of this process, and pauses the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

_GAUGE_SECONDS = 0.1
_STATUS, _ROLLUP = Path("/proc/self/status"), Path("/proc/self/smaps_rollup")
_late_bytes = _late_own_bytes = 0
_PAGES = Path("/proc/self/statm")
"""Linux tells there in pages: all of the address space, and what of it is resident."""
_GROUPS, _GROUP_HOME = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def resident_bytes() -> int:
    """Returns the resident bytes now: anonymous memory and mapped file pages. Without /proc, the most so far."""
    with contextlib.suppress(OSError):
        return int(_PAGES.read_bytes().split()[1]) * mmap.PAGESIZE
    import psutil  # here, because Linux itself tells it, and psutil takes as long to import as ten of our modules

    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes() -> int:
    """Returns the memory of this machine, or what the control groups leave of it to this process. 0 if it is not known."""
    most = 0
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the names of sysconf are not those of all systems
        most = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    with contextlib.suppress(OSError):
        for line in _GROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "memory" in kinds.split(","):
                home, file = (_GROUP_HOME / "memory", "memory.limit_in_bytes") if kinds else (_GROUP_HOME, "memory.max")
                group = home / path.lstrip("/")
                for folder in (group, *group.parents):
                    with contextlib.suppress(OSError, ValueError):  # "max" is no number
                        most = min(most, int((folder / file).read_text()))
    return most


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the search for reference cycles.

    Headers become hundreds of thousands of small objects without cycles, and each search would visit all of them.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextlib.contextmanager
def collector_spared() -> Iterator[None]:
    """Excludes the objects that exist now from the search for reference cycles. Torch alone has hundreds of thousands.

    Does nothing in a program that has frozen objects itself, because ``gc.unfreeze`` would thaw those too.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Gauge:
    """Gives :func:`resident_bytes`, but asks the kernel at most ten times a second."""

    def __init__(self) -> None:
        self._asked, self._value = float("-inf"), 0

    def now(self) -> int:
        if time.monotonic() - self._asked > _GAUGE_SECONDS:
            self._asked, self._value = time.monotonic(), resident_bytes()
        return self._value


@contextlib.contextmanager
def of_startup() -> Iterator[None]:
    """Counts the memory that the block takes as start-up: what is loaded late is no run's own."""
    global _late_bytes, _late_own_bytes
    before = _status()
    resident = resident_bytes()
    try:
        yield
    finally:
        _late_bytes += max(resident_bytes() - resident, 0)
        _late_own_bytes += max(_status().get("RssAnon", 0) - before.get("RssAnon", 0), 0)


def late_bytes() -> int:
    """Returns the memory so far of all blocks under :func:`of_startup`."""
    return _late_bytes


def reset_peak() -> None:
    """Resets :func:`peak_resident_bytes` if the kernel supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """Returns the largest resident set so far, as the kernel counts it. Returns the current one if it keeps no count."""
    return _status().get("VmHWM") or resident_bytes()


class Growth:
    """Measures how much the memory of this process, a fork, grows from now on.

    Pages of libraries do not count: a fork maps them one by one when it needs them, and shares them with its parent.
    Pages of the parent's data count when they are written to, because the kernel then copies them.
    """

    def __init__(self) -> None:
        reset_peak()
        self._start, self._late = _status(), _late_own_bytes

    def most(self) -> int:
        """Returns the largest resident set above the start, in bytes. Call it when no data file is mapped any more."""
        now = _status()
        if "VmHWM" not in now:
            return 0
        libraries, new = now["RssFile"] - self._start["RssFile"], now["RssAnon"] - self._start["RssAnon"]
        late = _late_own_bytes - self._late
        return max(now["VmHWM"] - self._start["VmRSS"] - libraries - late, 0) + max(_own_bytes() - max(new, 0), 0)


def _own_bytes() -> int:
    """Returns the bytes that this process has written to and shares with no other process."""
    with contextlib.suppress(OSError):
        for line in _ROLLUP.read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) * 1024
    return 0


def _status() -> dict[str, int]:
    """Returns the kernel's figures on the memory of this process, in bytes. Empty on systems without them."""
    with contextlib.suppress(OSError):
        rows = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith(("Vm", "Rss"))]
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
    return {}
