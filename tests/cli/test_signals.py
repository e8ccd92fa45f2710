"""A signal unwinds a run, a second one ends it. How a whole run ends: running/test_session.py."""

from __future__ import annotations

import subprocess
import sys
import time

from conftest import hear_signals


def test_a_signal_that_an_import_swallows_is_not_forgotten() -> None:
    code = """
import os, signal
from streammerge.cli.progress import Progress
from streammerge.cli.signals import Stopped, stoppable
from streammerge.events import RunStarted, Suspended
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
    with Progress("quiet") as progress:
        try:
            progress(RunStarted(1, 1, 1, 1))
        except Stopped as stopped:
            progress(Suspended(1, 2))  # what is told while cleaning up raises no more
            print("stopped", stopped.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("stopped 143\n", "")


def test_a_second_signal_ends_at_once(job: str) -> None:
    code = """
import os, signal, sys, time
from streammerge.cli.signals import Stopped, stoppable
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    except Stopped as stopped:
        assert stopped.exit_code == 143
        os.kill(os.getpid(), signal.SIGINT)  # while it cleans up
        time.sleep(20)
"""
    began = time.monotonic()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, preexec_fn=hear_signals)
    assert (done.returncode, done.stderr) == (130, "")
    assert time.monotonic() - began < 15
