"""How much memory this process holds. Imports nothing heavy, changes nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident set now: anonymous memory and mapped file pages."""
    return int(psutil.Process().memory_info().rss)


def anonymous_bytes() -> int:
    """Memory that is not a page of a file, now."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def reset_peak() -> None:
    """Lets :func:`peak_resident_bytes` start over, where the kernel offers it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The largest resident set so far, by the kernel's own count; what is resident now where it keeps none."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()
