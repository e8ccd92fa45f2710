"""The standard streams, which a daemon may have closed."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Opens closed standard streams on the null device.

    Otherwise the next opened file would get their number, and text that a library prints would go into a model.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = (
        stream if stream is not None else open(os.devnull, mode)  # noqa: SIM115 - open until the process ends
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
