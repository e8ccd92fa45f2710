"""The lock of an output: which run makes it.

The kernel's lock on the file ``lock`` in the staging folder ends with its process. Two machines that share a folder may
not see each other's kernel locks, so the file also names its owner: host, boot, process, user and time. On a file system
without kernel locks, a second file takes their place, which only one run can create. If it is unknown whether the owner is
still running, the output is refused and the owner is named.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from typing import NamedTuple

from streammerge.errors import LockedError, RecipeError, printable
from streammerge.stores import system

_MOST_BYTES = 4096
_CLAIM = "lock.owner"
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_ONE_KERNEL: tuple[str, ...] = (
    "bcachefs",
    "btrfs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "jfs",
    "ntfs3",
    "overlay",
    "ramfs",
    "tmpfs",
)
_ONE_KERNEL += ("vfat", "xfs", "zfs")
"""File systems that only one running kernel has mounted, so that its locks reach everybody."""


class Owner(NamedTuple):
    """The run that makes an output. ``boot`` changes when the machine starts; ``namespace`` is that of its process ids."""

    pid: int
    host: str = ""
    boot: str = ""
    namespace: str = ""
    user: str = ""
    began: str = ""

    def __str__(self) -> str:
        if self.pid <= 0:
            return "a process that did not give its name"
        where = f" on {self.host}" if self.host else ""
        who = f" of {self.user}" if self.user else ""
        since = f" since {self.began}" if self.began else ""
        return printable(f"process {self.pid}{where}{who}{since}")


UNKNOWN = Owner(0)


def this_run() -> Owner:
    """Returns this process as an owner."""
    try:
        import getpass

        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = str(os.getuid())
    began = time.strftime("%Y-%m-%d %H:%M:%S%z")
    return Owner(os.getpid(), os.uname().nodename, system.boot_id(), _namespace(), user, began)


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def owner_in(fd: int) -> Owner | None:
    """Returns the owner that a lock file names: :data:`UNKNOWN` if its content cannot be read, None if nobody has the
    lock."""
    text = os.pread(fd, _MOST_BYTES, 0).decode(errors="replace").strip()
    if not text:
        return None
    try:
        said = json.loads(text)
        return Owner(said) if isinstance(said, int) else Owner(**said)
    except (ValueError, TypeError):
        return UNKNOWN


class _Held(NamedTuple):
    """A lock that this process has. ``place``: device and inode of its file. ``claim``: the file that stands for the
    kernel's lock, "" where the file system has kernel locks."""

    place: tuple[int, int]
    owner: Owner
    claim: str


_held: dict[int, _Held] = {}
"""The locks of this process by descriptor. Needed for file systems without kernel locks."""
_taking = threading.Lock()


def opened(path: str) -> int:
    """Opens the lock file, and creates it if it is absent."""
    return os.open(path, _FLAGS | os.O_CREAT, 0o666)


def _place(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def take(fd: int, folder: str, out: object) -> None:
    """Takes the lock. LockedError when another run has it, or may have."""
    with _taking:
        place = _place(fd)
        for held in _held.values():
            if held.place == place:
                raise _locked(out, held.owner)
        owner = this_run()
        _held[fd] = _Held(place, owner, _take(fd, folder, out, owner))


def _take(fd: int, folder: str, out: object, owner: Owner) -> str:
    """Takes the lock. Returns the claim that stands for it where the file system has no kernel locks, else ""."""
    path, claim = f"{folder}/lock", f"{folder}/{_CLAIM}"
    known = owner_in(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in system.UNSUPPORTED:
            raise _locked(out, known or _owner_at(claim)) from error
        if known is not None and may_run(known, None):
            raise _locked(out, known, path) from error
        _make_claim(claim, out, owner)
        return claim
    known = owner_in(fd)  # once more: it may have changed hands
    if known is not None and may_run(known, folder):
        raise _locked(out, known, path)
    _remove_dead_claim(claim, out)
    return ""


def _make_claim(claim: str, out: object, owner: Owner) -> None:
    """Creates the file that only one run can create. LockedError when another run has created it, or may have."""
    _remove_dead_claim(claim, out)
    try:
        fd = os.open(claim, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise _locked(out, _owner_at(claim), claim) from None
    try:
        _write(fd, owner)
    finally:
        os.close(fd)


def _remove_dead_claim(claim: str, out: object) -> None:
    """Removes a claim whose owner has ended. LockedError when it may be alive."""
    dead = _owner_at(claim)
    if dead is None:
        return
    if may_run(dead, None):
        raise _locked(out, dead, claim)
    aside = f"{claim}.{os.urandom(8).hex()}"
    try:
        os.rename(claim, aside)
    except FileNotFoundError:
        return
    found = _owner_at(aside)
    if found != dead:  # another run has replaced it meanwhile
        os.rename(aside, claim)
        raise _locked(out, found, claim)
    os.unlink(aside)


def _owner_at(path: str) -> Owner | None:
    """The owner that the file at this path names, None if it is absent. UNKNOWN for an empty file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return owner_in(fd) or UNKNOWN
    finally:
        os.close(fd)


def sign(fd: int, folder: str, out: object) -> None:
    """Writes down who has the lock, durably, so that other machines see it. LockedError when another run has written too.

    Ignores a full disk, which is noticed later.
    """
    held = _held[fd]
    if held.claim:
        found = _owner_at(held.claim)
        whole = found != UNKNOWN
    else:
        whole = _write(fd, held.owner)
        found = _owner_at(f"{folder}/lock")
    if whole and found != held.owner:
        raise _locked(out, found)


def _write(fd: int, owner: Owner) -> bool:
    """Writes the owner into a file, durably. Returns False if the disk is full."""
    text, done = json.dumps(owner._asdict()).encode() + b"\n", 0
    try:
        os.ftruncate(fd, 0)
        while done < len(text):
            done += os.pwrite(fd, text[done:], done)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        system.full_sync(fd)
    return True


def release(fd: int) -> None:
    """Says in the file that nobody has the lock, and gives it back."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
    drop(fd)


def drop(fd: int) -> None:
    """Gives the lock back, and leaves the file as it is."""
    held = _held.pop(fd, None)
    with contextlib.suppress(OSError):
        if held is not None and held.claim and _owner_at(held.claim) == held.owner:
            os.unlink(held.claim)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)  # a process that was forked with the descriptor would keep the lock
    os.close(fd)


def _forget_in_child() -> None:
    """Closes the descriptors that a forked child has of the parent's locks: each of them would keep a lock."""
    global _taking
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()
    _taking = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def may_run(owner: Owner, locked_in: str | None) -> bool:
    """Whether an owner may be alive, seen from here. ``locked_in``: the folder in which we hold the kernel's lock."""
    here = this_run()
    same_kernel = owner.boot == here.boot if owner.boot else owner.host == here.host
    if locked_in is not None and (same_kernel or one_kernel(locked_in)):
        return False  # its kernel is ours, and gave us the lock
    if owner.pid <= 0:
        return True
    if owner.host and not (same_kernel and owner.namespace == here.namespace):
        return True
    if owner.pid == here.pid:
        return any(held.owner == owner for held in list(_held.values()))
    return _is_alive(owner.pid)


def has_ended(owner: Owner) -> bool:
    """Whether it is known here that an owner has ended: it ran on this machine, among the processes that are seen here."""
    here = this_run()
    known = owner.boot and owner.boot == here.boot and owner.namespace and owner.namespace == here.namespace
    return bool(known) and owner.pid > 0 and not _is_alive(owner.pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def one_kernel(folder: str) -> bool:
    """Whether only this machine can have the file system mounted. False when that is not known."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1] in _ONE_KERNEL
    return False


def _locked(out: object, owner: Owner | None, path: str = "") -> LockedError:
    """``path``: the file to remove if that run has ended, which cannot be known here."""
    said = f"{printable(out)} is being written by {owner or UNKNOWN}"
    if not path:
        return LockedError(f"{said}; wait for it")
    return LockedError(f"{said}, as far as can be told from here; when that run has ended, remove {printable(path)}")


def locked_by_other_user(out: object, folder: object, user: str) -> LockedError | RecipeError:
    """The error of an output whose staging folder belongs to another user: its run goes on, or was interrupted."""
    try:
        fd = os.open(f"{folder}/lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return _left_by(out, folder, user)
    try:
        owner = owner_in(fd)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _locked(out, owner)
    finally:
        os.close(fd)
    return _left_by(out, folder, user)


def _left_by(out: object, folder: object, user: str) -> RecipeError:
    return RecipeError(
        f"an interrupted run of {printable(user)} into {printable(out)} has left {printable(folder)}, where nobody else "
        f"may write; choose another output, or ask {printable(user)} to finish or remove it"
    )
