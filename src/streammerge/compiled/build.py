"""Compiles ``arithmetic.c`` when the package is built (``hatch_build.py``, which loads this file alone)."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

_FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-trapping-math")
"""A product that is fused with a sum has other bits than one that is rounded. Nobody asks which operation trapped, and
loops with a choice in them become vector instructions then."""
_CLONES = "-DSTREAMMERGE_CLONES"
"""Compiles each loop for several sets of instructions. Not every loader can choose between them."""


def compile_library(source: Path, library: Path) -> str:
    """Compiles C source to a library. Returns "" if it is done, else why it is not."""
    compiler, own = shlex.split(os.environ.get("CC", "cc")), shlex.split(os.environ.get("C_FLAGS", ""))
    unfinished, said = library.with_suffix(".tmp"), ""
    for clones in ((_CLONES,), ()):
        try:
            done = subprocess.run(
                [*compiler, *own, *_FLAGS, *clones, "-o", str(unfinished), str(source)], capture_output=True, text=True
            )
        except OSError as error:
            return f"{compiler[0]}: {error.strerror}"
        if done.returncode == 0:
            unfinished.replace(library)  # a process may have mapped the library that was there
            return ""
        said = done.stderr.strip()
    unfinished.unlink(missing_ok=True)
    return said.splitlines()[0] if said else f"{compiler[0]} ended in {done.returncode}"
