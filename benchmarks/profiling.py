"""python -m benchmarks.profiling METHOD [NAME=NUMBER ...]: where a worker's CPU time goes with many small tensors.

Merges files of 64 KiB tensors with one worker in a thread, and prints the functions by their own CPU time. The first file
is the base, if the method needs one. Profiling makes all numbers larger, most for short functions.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import sys
import threading
import time
from pathlib import Path

import streammerge as sm
from benchmarks.files import Model
from streammerge.methods.registry import find_method

_FILES = Path(__file__).parent / "files"


def main(method: str, *parameters: str) -> None:
    base, *models = [Model(0.13, number, shape="small").made(_FILES) for number in range(3)]
    contract = find_method(method)
    most = contract.models[1] or 2
    given = {name: float(value) for name, _, value in (text.partition("=") for text in parameters)}
    profiles: list[cProfile.Profile] = []
    plain = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        profile = cProfile.Profile(time.thread_time)
        try:
            profile.runcall(plain, thread)
        finally:
            profiles.append(profile)

    threading.Thread.run = run  # type: ignore[method-assign, assignment]
    out = _FILES / "profiled.safetensors"
    try:
        sm.merge(
            models[:most],
            out,
            method=method,
            parameters=given,
            base=base if contract.base == "required" else None,
            workers=1,
            executor="threads",
            overwrite=True,
        )
    finally:
        threading.Thread.run = plain  # type: ignore[method-assign]
        out.unlink(missing_ok=True)
    text = io.StringIO()
    made = pstats.Stats(profiles[0], stream=text)
    for profile in profiles[1:]:
        made.add(profile)
    made.sort_stats("tottime").print_stats(40)
    print(text.getvalue().replace(str(Path(sm.__file__).parent) + "/", ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
