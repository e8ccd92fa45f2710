"""How much memory this process holds."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path

_GAUGE_SECONDS = 0.1
_STATUS, _ROLLUP = Path("/proc/self/status"), Path("/proc/self/smaps_rollup")


def resident_bytes() -> int:
    """Resident set now: anonymous memory and mapped file pages."""
    import psutil  # here, since --help and inspect do without it

    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No search for reference cycles meanwhile.

    Headers become some hundred thousand small objects without cycles, through all of which Python would go each time.
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
    """What is there already is left out of the searches meanwhile: of torch alone, some hundred thousand objects.

    Does nothing in a program that has frozen objects of its own: thawing knows only all of them.
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
    """:func:`resident_bytes`, asked of the kernel at most ten times a second."""

    def __init__(self) -> None:
        self._asked, self._value = float("-inf"), 0

    def now(self) -> int:
        if time.monotonic() - self._asked > _GAUGE_SECONDS:
            self._asked, self._value = time.monotonic(), resident_bytes()
        return self._value


def reset_peak() -> None:
    """Lets :func:`peak_resident_bytes` start over, where the kernel offers it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The largest resident set so far, by the kernel's own count; what is resident now where it keeps none."""
    return _status().get("VmHWM") or resident_bytes()


class Growth:
    """How much the memory of this process, a fork of another, grows from now on.

    Pages of libraries do not count, which a fork maps one by one as it comes to need them: they are the other's as well.
    Pages of the other's data count when they are written to, since the kernel then copies them.
    """

    def __init__(self) -> None:
        reset_peak()
        self._start = _status()

    def most(self) -> int:
        """The most that was resident beyond the start. To be asked when no file of data is mapped any more."""
        now = _status()
        if "VmHWM" not in now:
            return 0
        libraries, new = now["RssFile"] - self._start["RssFile"], now["RssAnon"] - self._start["RssAnon"]
        return max(now["VmHWM"] - self._start["VmRSS"] - libraries, 0) + max(_own_bytes() - max(new, 0), 0)


def _own_bytes() -> int:
    """Memory that this process has written to and that no other process has."""
    with contextlib.suppress(OSError):
        for line in _ROLLUP.read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) * 1024
    return 0


def _status() -> dict[str, int]:
    """What the kernel tells of the memory of this process, in bytes; nothing where it does not."""
    with contextlib.suppress(OSError):
        rows = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith(("Vm", "Rss"))]
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
    return {}
