"""Asks a clean interpreter whether it can load pickles, before worker processes get them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence

from streammerge.running.executors.server import ENVIRONMENT

_CODE = """
import os, pickle, sys
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.path[:] = sys.argv[1:]
for number, data in enumerate(pickle.load(sys.stdin.buffer)):
    try:
        pickle.loads(data)
    except BaseException as error:
        answer.write(pickle.dumps((number, f"{type(error).__name__}: {error}")))
        break
else:
    answer.write(pickle.dumps(None))
answer.flush()
os._exit(0)
"""
"""Answers with the number of the first pickle that it cannot load, and the error. What a module prints while it is imported
goes to the standard error."""


def importable_path() -> list[str]:
    """Returns the folders in which this process finds modules, as arguments for another interpreter."""
    return [each for each in sys.path if isinstance(each, str)]


def first_not_loadable(pickles: Sequence[bytes]) -> tuple[int, str] | None:
    """Returns the number of the first pickle that a worker process could not load, and why; None if all can be loaded."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *importable_path()],
        input=pickle.dumps(list(pickles)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
        check=False,
    )
    if not done.stdout:
        return 0, f"the interpreter that imports it ended with exit code {done.returncode}"
    found: tuple[int, str] | None = pickle.loads(done.stdout)
    return found
