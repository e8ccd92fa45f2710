"""The standard streams, which a daemon may have closed, and whose encoding may lack characters."""

from __future__ import annotations

import io
import os
import sys


def open_standard_streams() -> None:
    """Opens closed standard streams on the null device, and escapes what their encoding lacks.

    Otherwise the next opened file would get their number, and text that a library prints would go into a model.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = (
        stream if stream is not None else open(os.devnull, mode)  # noqa: SIM115 - open until the process ends
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding must not turn a finished merge into an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_up_stderr() -> None:
    """Puts the null device in place of a stderr that cannot be written."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
