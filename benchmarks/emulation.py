"""A merge on a small scale, in which a wait stands for all work that does not hold Python's lock.

Kernels, reads and writes release the lock, so on a machine with enough CPUs they run beside each other. Two CPUs are enough
to measure how workers wait for the lock. Every size (tensors, chunks, pieces, buffers) is divided by SCALE. The same Python
code then runs the same number of times, and kernels take next to no time. Before each chunk the worker waits for as long as
the missing work takes. A waiting worker needs no CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCALE = 64
_PR_SET_TIMERSLACK = 29
_CODE = "from benchmarks.emulation import emulate\nemulate({nanoseconds})\nfrom streammerge"
HIDDEN = 2048
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "parameters": {"density": 0.5}},
}


def shapes_of(shape: str, gigabytes: float, scale: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of a model in bfloat16. ``shape``: "large" has the matrices of a language model, of 8 and 32
    MiB; "small" has tensors of 64 KiB. ``scale``: each tensor has this many times fewer elements."""
    elems = int(gigabytes * 1e9) // 2
    if shape == "small":
        for number in range(elems >> 15):
            yield f"blocks.{number // 64}.{number % 64}.weight", ((1 << 15) // scale,)
        return
    side = HIDDEN // math.isqrt(scale)
    for layer in range(elems // (12 * HIDDEN * HIDDEN)):
        for name, rows in (("q", 1), ("k", 1), ("v", 1), ("o", 1), ("up", 4), ("down", 4)):
            yield f"model.layers.{layer}.{name}.weight", (rows * side, side)


def made(folder: Path, shape: str, gigabytes: float, scale: int, number: int) -> Path:
    """Returns the file of a model. Writes it first if it is absent."""
    import torch
    from safetensors.torch import save_file

    path = folder / f"{shape}-{gigabytes:g}GB-{scale}-{number}.safetensors"
    if not path.exists():
        make = torch.Generator().manual_seed(number)
        tensors = {
            name: (torch.randn(sizes, generator=make) * 0.02).bfloat16()
            for name, sizes in shapes_of(shape, gigabytes, scale)
        }
        save_file(tensors, path)
    return path


def shrink() -> None:
    """Divides the sizes of the engine by SCALE. Modules copy them when they are imported, so this comes first."""
    if "streammerge.kernels.chunk" in sys.modules:
        raise RuntimeError("streammerge is imported already, with its own sizes")
    from streammerge.tensors import spec

    spec.GRAIN //= SCALE
    spec.PIECE_ELEMS //= SCALE
    from streammerge.kernels import batch, chunk, kth_largest, ranking
    from streammerge.planning import budget

    batch.MOST_ELEMS //= SCALE
    chunk._SAMPLE_SPAN //= SCALE
    ranking._MOST_COLLECTED *= math.sqrt(SCALE)  # a smaller sample brackets a rank less closely
    ranking._MOST_HELD_BYTES = int(ranking._MOST_HELD_BYTES / math.sqrt(SCALE))
    whole = ranking.sample_elems
    for module in (ranking, kth_largest):
        if hasattr(module, "sample_elems"):
            module.sample_elems = lambda count: whole(count * SCALE) // SCALE  # type: ignore[attr-defined]
    budget.BEST_OUT_BYTES //= SCALE
    budget.MOST_WINDOW_BYTES //= SCALE


def emulate(nanoseconds: float) -> None:
    """Shrinks the engine. Each chunk then waits ``nanoseconds`` for each element that it stands for."""
    shrink()
    from streammerge.running.executors import processes, server

    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # inherited by threads and forked workers
    seconds, late = nanoseconds * SCALE / 1e9, _lateness()

    def waiting(chunk: Any) -> None:
        wait = seconds * chunk.elems - late
        if wait > 0:
            time.sleep(wait)

    if nanoseconds:
        _tell_of_chunks(waiting)
    code = server.CODE.replace("from streammerge", _CODE.format(nanoseconds=nanoseconds), 1)
    processes.CODE = code  # type: ignore[attr-defined]


def _tell_of_chunks(listener: Callable[[Any], None]) -> None:
    """Lets workers call ``listener`` with each chunk before they compute it."""
    from streammerge.running import computing, worker

    whole = computing.chunk_of

    def chunk_of(*given: Any, **how: Any) -> Any:
        made = whole(*given, **how)
        listener(made)
        return made

    computing.chunk_of = worker.chunk_of = chunk_of  # type: ignore[attr-defined]


def _lateness() -> float:
    """Returns the seconds by which a sleep of half a millisecond is too long."""
    found = []
    for _ in range(50):
        begin = time.perf_counter()
        time.sleep(0.0005)
        found.append(time.perf_counter() - begin - 0.0005)
    return sorted(found)[len(found) // 2]


class Timed:
    """Merges the same files again and again, and times the part that workers do."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from streammerge.running import execution

        self.arguments, self.scale = arguments, 1 if arguments.whole else SCALE
        files = (made(arguments.files, arguments.shape, arguments.gigabytes, self.scale, number) for number in range(3))
        self.base, *self.models = files
        self.chunks = self.elems = 0
        self._execute, self._times = execution._produce, (0.0, 0.0)
        execution._produce = self._timed  # type: ignore[assignment]
        if arguments.nanoseconds == 0:
            _tell_of_chunks(self._count)

    def run(self, workers: int, executor: Any) -> dict[str, Any]:
        """Returns the seconds and the CPU seconds of a merge, the number of chunks, and the number of their elements."""
        import streammerge as sm

        how = METHODS[self.arguments.method] | ({} if self.arguments.method == "linear" else {"base": self.base})
        self.chunks = self.elems = 0
        memory = (256 << 20) * max(workers, 2)
        out = self.arguments.files / f"out-{self.arguments.shape}-{self.arguments.method}.safetensors"
        sm.merge(self.models, out, workers=workers, executor=executor, memory=memory, overwrite=True, **how)
        seconds, cpu_seconds = self._times
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "chunks": self.chunks, "elems": self.elems}

    def _timed(self, *given: Any) -> Any:
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            return self._execute(*given)
        finally:
            self._times = time.perf_counter() - begin, time.process_time() - cpu

    def _count(self, chunk: Any) -> None:
        self.chunks += 1
        self.elems += chunk.elems * self.scale


def main() -> int:
    """Merges with each number of workers, by threads and by processes. Prints a line of JSON for each merge."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", type=Path)
    parser.add_argument("--shape", default="large")
    parser.add_argument("--method", default="linear")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", default="1", help="numbers, like 1,2,4")
    parser.add_argument("--executors", default="threads", help="names, like threads,processes")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="merges files of full size")
    parser.add_argument("--nanoseconds", type=float, default=0.0, help="wait for each element of a chunk")
    arguments = parser.parse_args()
    arguments.files.mkdir(parents=True, exist_ok=True)
    if not arguments.whole:
        emulate(arguments.nanoseconds)
    from streammerge.running.executors.processes import ProcessExecutor
    from streammerge.running.executors.threads import ThreadExecutor

    class Lasting(ProcessExecutor):
        """Serves several merges, so that the start of its processes is in the first one only."""

        def close(self) -> None:
            return

    timed = Timed(arguments)
    for workers in map(int, arguments.workers.split(",")):
        teams = {
            name: Lasting(workers) if name == "processes" else ThreadExecutor(workers)
            for name in arguments.executors.split(",")
        }
        for turn in range(arguments.rounds + 1):
            for name, team in teams.items():
                found = timed.run(workers, lambda count, team=team: team)
                print(json.dumps({"workers": workers, "executor": name, "turn": turn} | found), flush=True)
        for team in teams.values():
            if isinstance(team, ProcessExecutor):
                ProcessExecutor.close(team)
    return 0


if __name__ == "__main__":
    sys.exit(main())
