"""A machine of the tests: a process that makes units of a plan. It tells each piece that it has made.

python machine.py PLAN FOLDER SECONDS OPTION=VALUE...

``FOLDER`` gets a file for each piece that was made, and ``SECONDS`` pass after each. Units, pieces and the times between
syncs are small. In the environment: ``MACHINES`` of them wait for each other when they begin, before their first piece is
made by a thread, and before their first answer of a pass is kept, so that each of them makes something. ``ANSWER_SECONDS``
pass before an answer is kept.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import streammerge as sm
from streammerge.planning import tasks
from streammerge.running import exchanging, shared, worker
from streammerge.tensors.spec import GRAIN


def meet(folder: Path, where: str) -> None:
    """Waits until all machines have been here."""
    (folder / f"{where} {os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len([*folder.glob(f"{where} *")]) < int(os.environ.get("MACHINES", "1")):
        time.sleep(0.005)


def main(plan: str, told: str, seconds: str, *options: str) -> None:
    tasks.PIECE_ELEMS = GRAIN
    shared._SYNC_SECONDS = 0.02
    folder = Path(told)
    finished, keep, run = shared.Share._finished, exchanging.Exchange._keep, worker.MergeWorker.run

    def run_later(self: worker.MergeWorker, batch: list[Any]) -> Any:
        meet(folder, "first")
        return run(self, batch)

    def slow(self: shared.Share, *more: object) -> None:
        finished(self, *more)  # type: ignore[arg-type]
        (folder / f"piece {time.monotonic_ns()}").touch()
        time.sleep(float(seconds))

    def slow_to_keep(self: exchanging.Exchange, *more: Any) -> Any:
        meet(folder, "answer")
        time.sleep(float(os.environ.get("ANSWER_SECONDS", "0")))
        return keep(self, *more)

    worker.MergeWorker.run = run_later  # type: ignore[method-assign]
    shared.Share._finished = slow  # type: ignore[method-assign]
    exchanging.Exchange._keep = slow_to_keep  # type: ignore[method-assign]
    meet(folder, "ready")
    given = {name: json.loads(value) for name, value in (each.split("=", 1) for each in options)}
    print(repr(sm.worker(plan, **given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
