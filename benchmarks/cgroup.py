"""A private memory cgroup, version 1 or 2: the kernel's count of memory, and a limit beyond which it kills."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

_numbers = itertools.count()


class MemoryGroup:
    """A new group, removed by :meth:`close`. Raises OSError if groups cannot be made; :func:`why_not` says why.

    ``limit_bytes`` includes the page cache; there is no swap. The kernel reclaims memory at the limit, and kills if
    that is not enough.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.version, parent = _parent()
        self.path = parent / f"streammerge-{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()
        if limit_bytes is not None:
            try:
                self._limit(limit_bytes)
            except OSError:
                self.close()
                raise

    def _limit(self, limit_bytes: int) -> None:
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if self.version == 1 else ("memory.max",)
        for name in names:
            if (self.path / name).exists():
                (self.path / name).write_text(str(limit_bytes))
        if self.version == 2:
            (self.path / "memory.swap.max").write_text("0")

    def join(self) -> None:
        """Moves the calling process into the group; called in a child before its program starts."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes that were charged, page cache included; None if the kernel does not report it."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        with contextlib.suppress(OSError):
            return int((self.path / name).read_text())
        return None

    def close(self) -> None:
        """Removes the group. Its processes must have ended."""
        self.path.rmdir()


def why_not() -> str | None:
    """Returns why no group with a limit can be made here; None if it can."""
    try:
        MemoryGroup(1 << 30).close()
    except OSError as error:
        return f"no memory cgroup can be made here ({error})"
    return None


def _parent() -> tuple[int, Path]:
    """Returns the version, and the folder for new groups: the group of this process, or the topmost one."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            here = Path(mount, next((path for names, path in own.items() if "memory" in names.split(",")), ""))
            return 1, here if here.is_dir() else Path(mount)
        if kind == "cgroup2" and "memory" in Path(mount, "cgroup.controllers").read_text().split():
            # A group that contains processes cannot have groups below it, except the topmost.
            Path(mount, "cgroup.subtree_control").write_text("+memory")
            return 2, Path(mount)
    raise FileNotFoundError("the memory controller is not mounted")
