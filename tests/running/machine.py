"""A machine of the tests: a process that makes units of a plan. It tells each piece that it has made.

python machine.py PLAN FOLDER SECONDS OPTION=VALUE...

``FOLDER`` gets a file for each piece that was made, and ``SECONDS`` pass after each. Units, pieces and the times between
syncs are small.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import streammerge as sm
from streammerge.planning import tasks
from streammerge.running import shared
from streammerge.tensors.spec import GRAIN


def main(plan: str, folder: str, seconds: str, *options: str) -> None:
    tasks.PIECE_ELEMS = GRAIN
    shared._SYNC_SECONDS = 0.02
    finished = shared.Share._finished

    def slow(self: shared.Share, *more: object) -> None:
        finished(self, *more)  # type: ignore[arg-type]
        Path(folder, f"piece {time.monotonic_ns()}").touch()
        time.sleep(float(seconds))

    shared.Share._finished = slow  # type: ignore[method-assign]
    together = int(os.environ.get("MACHINES", "1"))  # those that begin together
    Path(folder, f"ready {os.getpid()}").touch()
    while len([*Path(folder).glob("ready *")]) < together:
        time.sleep(0.005)
    given = {name: json.loads(value) for name, value in (each.split("=", 1) for each in options)}
    print(repr(sm.worker(plan, **given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
