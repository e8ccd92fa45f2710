"""Where bytes live, and how an output appears. All system calls on checkpoint files.

Each module imports only modules above it::

    checksums  CRC-32 and CRC-32C, and joining those of parts
    faults     mapped files that shrink
    local      files: read, mapped, preallocated, written, synced
    journal    which pieces of an output are on the disk
    commit     the staging folder, the lock, the rename
"""
