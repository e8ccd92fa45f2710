"""Every system call on checkpoint files: reading and mapping, writing and syncing, what has been done, committing."""

from streammerge.storage.commit import Staging, check_writable, free_bytes, sweep, sync_folder, write_text
from streammerge.storage.files import (
    COPY_BYTES,
    Identity,
    InputFile,
    InputFiles,
    OutputFile,
    digest_outside,
    file_size,
    identity,
    open_stream,
    outside,
    read_full,
    space_checked,
)

__all__ = [
    "COPY_BYTES",
    "Identity",
    "InputFile",
    "InputFiles",
    "OutputFile",
    "Staging",
    "check_writable",
    "digest_outside",
    "file_size",
    "free_bytes",
    "identity",
    "open_stream",
    "outside",
    "read_full",
    "space_checked",
    "sweep",
    "sync_folder",
    "write_text",
]
