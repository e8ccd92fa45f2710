"""Who makes an output: the lock file in its staging folder.

The lock itself is the kernel's and ends with its process. Two machines that share a folder may not see each other's
kernel locks, so the file also says who has it: host, boot, process, user and time. When it is unsure whether the owner is
alive, the output is refused and the owner is named.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass

from streammerge.errors import LockedError, printable
from streammerge.stores import system

_MOST_BYTES = 4096
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


@dataclass(frozen=True, slots=True)
class Owner:
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
    """The owner that this process is."""
    try:
        import getpass

        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = str(os.getuid())
    began = time.strftime("%Y-%m-%d %H:%M:%S%z")
    return Owner(os.getpid(), os.uname().nodename, _boot(), _namespace(), user, began)


def _boot() -> str:
    """What the kernel calls this run of the machine; "" where it does not say."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def owner_in(fd: int) -> Owner | None:
    """The owner that a lock file names, :data:`UNKNOWN` for what cannot be read as one; None when nobody has it."""
    text = os.pread(fd, _MOST_BYTES, 0).decode(errors="replace").strip()
    if not text:
        return None
    try:
        said = json.loads(text)
        return Owner(said) if isinstance(said, int) else Owner(**said)
    except (ValueError, TypeError):
        return UNKNOWN


_held: set[tuple[int, int, int]] = set()
"""Lock files that this process has: process, device, inode. File systems without locks need it."""


def opened(path: str) -> int:
    """The lock file, made where it is absent."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _place(fd: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return os.getpid(), found.st_dev, found.st_ino


def take(fd: int, folder: str, out: object) -> None:
    """Takes the lock. LockedError when another run has it, or may have."""
    if _place(fd) in _held:
        raise _locked(out, owner_in(fd))
    _take(fd, folder, out)
    _held.add(_place(fd))


def _take(fd: int, folder: str, out: object) -> None:
    known = owner_in(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in system.UNSUPPORTED:
            raise _locked(out, known) from error
        if known is not None and _may_run(known, None):
            raise _locked(out, known, folder) from error
        return
    known = owner_in(fd)  # once more: it may have changed hands
    if known is not None and _may_run(known, folder):
        raise _locked(out, known, folder)


def sign(fd: int) -> None:
    """Writes down who has the lock; a full disk is noticed later."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(asdict(this_run())).encode() + b"\n", 0)


def release(fd: int) -> None:
    """Says in the file that nobody has the lock, and gives it back."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
    drop(fd)


def drop(fd: int) -> None:
    """Gives the lock back, and leaves the file as it is."""
    _held.discard(_place(fd))
    os.close(fd)


def _may_run(owner: Owner, locked_in: str | None) -> bool:
    """Whether an owner may be alive, seen from here. ``locked_in``: the folder in which we hold the kernel's lock."""
    here = this_run()
    same_kernel = owner.boot == here.boot if owner.boot else owner.host == here.host
    if locked_in is not None and (same_kernel or one_kernel(locked_in)):
        return False  # its kernel is ours, and gave us the lock
    if owner.pid <= 0:
        return True
    if owner.host and not (same_kernel and owner.namespace == here.namespace):
        return True
    return owner.pid != here.pid and _is_alive(owner.pid)


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


def _locked(out: object, owner: Owner | None, folder: str = "") -> LockedError:
    said = f"{printable(out)} is being written by {owner or UNKNOWN}"
    if not folder:
        return LockedError(f"{said}; wait for it")
    return LockedError(f"{said}, as far as can be told from here; when that run has ended, remove {printable(folder)}/lock")
