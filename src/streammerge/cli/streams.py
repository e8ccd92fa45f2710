"""The standard streams, which a daemon may have closed."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Where they were closed, as some daemons do, the next file that is opened would take their number, and what a
    library prints would go into a model."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = (
        stream if stream is not None else open(os.devnull, mode)  # noqa: SIM115 - as long as the process
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
