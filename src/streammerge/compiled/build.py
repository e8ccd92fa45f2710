"""Compiles ``arithmetic.c`` when the package is built (``hatch_build.py``, which loads this file alone)."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

_FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-fno-fast-math", "-ffp-contract=off", "-fno-trapping-math")
"""A product that is fused with a sum has other bits than one that is rounded. Nobody asks which operation trapped, and
loops with a choice in them become vector instructions then. These stand behind the user's own flags."""
_CLONES = "-DSTREAMMERGE_CLONES"
"""Compiles each loop for several sets of instructions. Not every loader can choose between them."""


def compile_library(source: Path, library: Path) -> str:
    """Compiles C source to a library. Returns "" if it is done, else why it is not."""
    compiler, own = shlex.split(os.environ.get("CC", "cc")), shlex.split(os.environ.get("CFLAGS", ""))
    unfinished, said = library.with_suffix(".tmp"), ""
    for clones in ((_CLONES,), ()):
        try:
            done = subprocess.run(
                [*compiler, *own, *_FLAGS, *clones, "-o", str(unfinished), str(source)], capture_output=True, text=True
            )
        except OSError as error:
            return f"{compiler[0]}: {error.strerror}"
        said = done.stderr.strip() or f"{compiler[0]} ended in {done.returncode}"
        if done.returncode == 0:
            try:
                ctypes.CDLL(str(unfinished))
            except OSError as error:  # such as where the loader cannot choose between copies of a loop
                said = str(error)
                continue
            unfinished.replace(library)  # a process may have mapped the library that was there
            return ""
    with suppress(OSError):
        unfinished.unlink()
    return said.splitlines()[0]
