"""Bounds the number of open files of this process. If there are too many, the file that was unused for the longest time
is closed. A file in use is never closed.

A :class:`Descriptor` opens its file when it is used and may lose it between two uses. So 2,000 shards are written, and
600 are read, under a limit of a few dozen open files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator

from streammerge.errors import BudgetError

try:
    import resource
except ImportError:  # pragma: no cover - a platform without limits of this kind
    resource = None  # type: ignore[assignment]

SPARE = 12
"""Open files that are not counted one by one: the lock, the journal, a folder that is synced, a library that
reads a header."""
_MOST_OPEN = 512
_LEAST_OPEN = 4
_MOST_LIMIT = 16_384
_UNKNOWN_OPEN = 32
MAPS_HOLD_FILES = sys.version_info < (3, 13)
"""Whether each mapped file keeps a descriptor of its own, which Python duplicates."""

_lock = threading.RLock()  # reentrant, since the garbage collector may end a Descriptor anywhere
_open: set[Descriptor] = set()
_clock = itertools.count()
_users = 0
_most = 0
_raised: tuple[int, int] | None = None


class Descriptor:
    """A file that is open while it is used::

        with descriptor as fd:
            os.pread(fd, 100, 0)

    ``opened`` opens it, and is called again after it was closed between two uses. ``before_closing`` gets the descriptor
    before it is closed between two uses. It may take long: meanwhile others open, use and close their files.
    """

    __slots__ = ("_before_closing", "_ended", "_fd", "_users", "last_used", "opened")

    def __init__(self, opened: Callable[[], int], before_closing: Callable[[int], object] | None = None) -> None:
        self.opened, self._before_closing = opened, before_closing
        self._fd, self._users, self._ended, self.last_used = -1, 0, False, 0

    def __enter__(self) -> int:
        if self._fd < 0:
            _make_room(limit() - 1)
        try:
            return self._use()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        _make_room(0)
        return self._use()

    def _use(self) -> int:
        with _lock:
            if self._fd < 0:
                if self._ended:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self._fd = self.opened()
                _open.add(self)
            self._users += 1
            self.last_used = next(_clock)
            return self._fd

    def __exit__(self, *error: object) -> None:
        with _lock:
            self._users -= 1
            if self._ended:
                self._close()

    @property
    def idle(self) -> bool:
        return not self._users

    def close(self) -> None:
        """Closes it for good, after those that use it now."""
        with _lock:
            self._ended = True
            self._close()

    def retire(self) -> None:
        """Closes it until it is used again. It stays open if somebody uses it now, or while :attr:`before_closing` runs."""
        with _lock:
            if self._fd < 0 or self._users:
                return
            if self._before_closing is None:
                self._close()
                return
            fd, used = self._fd, self.last_used
            self._users += 1  # so that nobody else closes it meanwhile
        try:
            self._before_closing(fd)
        finally:
            with _lock:
                self._users -= 1
                if self._ended or self.last_used == used:
                    self._close()

    def _close(self) -> None:
        if self._fd >= 0 and not self._users:
            fd, self._fd = self._fd, -1
            _open.discard(self)
            os.close(fd)


def _make_room(most: int) -> None:
    """Closes files, the longest unused first, until at most so many are open. Files in use stay open, so more may remain.

    Waits for the disk where a file is synced before it is closed, so the lock is not held.
    """
    if len(_open) <= most:
        return
    with _lock:
        known = list(_open)  # one call in C: the garbage collector, which may close any of them, cannot run within it
        idle = sorted((each for each in known if each.idle), key=lambda each: each.last_used)
    for each in idle:
        if len(_open) <= most:
            return
        each.retire()


def limit() -> int:
    """How many descriptors are kept open at most, unless more are in use."""
    global _most
    if not _most:
        _most = max(min(_room() // 3, _MOST_OPEN), _LEAST_OPEN)
    return _most


def mapped_at_once(workers: int) -> int:
    """How many files may be mapped at one time, beside so many workers that read and write."""
    if not MAPS_HOLD_FILES or resource is None:
        return _MOST_LIMIT
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MOST_LIMIT)
    return max(most - _others() - SPARE - 2 * workers, 0) // 2


def _others() -> int:
    """Returns how many files other code of this process has open."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")) - len(_open)
    return _UNKNOWN_OPEN


def _room() -> int:
    """Returns how many files this module may have open, those that are open now included."""
    if resource is None:
        return 3 * _MOST_OPEN
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (_MOST_LIMIT if soft == resource.RLIM_INFINITY else soft) - _others() - SPARE


@contextlib.contextmanager
def room_for(files: int, workers: int) -> Iterator[None]:
    """While the block runs, so many files may be open at once, or as many as the system allows.

    Raises the soft limit towards the hard one when it is too low, and puts it back afterwards. Raises BudgetError if the
    limit is too low for the files that each worker uses at one time.
    """
    global _users, _most
    with _lock:
        _users += 1
        _raise_limit(2 * files + 2 * workers)
        _most = 0
    try:
        least, room = 2 * workers + 2, _room()
        if room < least:
            raise BudgetError(
                f"the limit on open files leaves room for {max(room, 0)}, and {workers} workers need {least}; "
                "allow more (ulimit -n), or take fewer workers"
            )
        yield
    finally:
        with _lock:
            _users -= 1
            last = not _users
            _most = 0
        if last:
            _restore_limit()


def _raise_limit(wanted: int) -> None:
    global _raised
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_LIMIT if hard == resource.RLIM_INFINITY else hard
    needed = min(wanted + _others() + SPARE, _MOST_LIMIT, most)
    if soft != resource.RLIM_INFINITY and needed > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            _raised = (_raised[0] if _raised else soft, needed)


def _restore_limit() -> None:
    """Puts the soft limit back, unless another run needs it or somebody else has changed it meanwhile."""
    global _raised
    if _raised is None or resource is None:
        return
    before, _ = _raised
    _make_room(max(min(before // 3, _MOST_OPEN), _LEAST_OPEN))
    with _lock:
        if _users or _raised is None:
            return
        (before, ours), _raised = _raised, None
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == ours:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


if hasattr(os, "register_at_fork"):
    # A child must not inherit the lock from a thread that it does not have.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
