"""Options about memory, workers and machines. None of them changes a byte of the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from streammerge.options.base import Options, option
from streammerge.options.values import BUDGET, COUNT, TEXT, TRUTH, one_of

Io = Literal["mmap", "pread"]
IO: tuple[str, ...] = get_args(Io)
DEFAULT_MEMORY = "512MiB"


class Resources(Options):
    """Memory, workers and the way of reading. None of these options changes a byte of the output."""

    memory: str | int = option(
        "Budget for data held at once, above start-up.", BUDGET, default=DEFAULT_MEMORY, metavar="SIZE"
    )
    workers: int | None = option("How many workers.", COUNT, metavar="N", otherwise="CPUs available")
    io: Io = option("How inputs are read; pread for network drives.", one_of(IO), default="mmap", choices=IO)


class Executing(Options):
    """The kind of workers. It does not change a byte of the output."""

    executor: str | Callable[[int], Any] = option(
        "The kind of workers: threads, processes, or the name of another executor; auto takes processes for much to read "
        "by more than four workers, or more than two for methods with passes; ray takes the nodes of a Ray cluster. In "
        "Python also a function from the number of workers to an executor.",
        default="auto",
        metavar="NAME",
    )
    address: str | None = option(
        'Address of the Ray cluster, for `executor="ray"`.',
        TEXT,
        metavar="HOST:PORT",
        otherwise="RAY_ADDRESS, else a cluster on this machine",
    )


class Sharing(Options):
    """Which units of the plan are made."""

    share: str | None = option(
        "The share I of N, counted from 1 or from 0. With N alone, I is the task of the Slurm array or the index of the "
        "Kubernetes job.",
        TEXT,
        metavar="I/N",
        otherwise="the task of the Slurm array",
    )
    claim: bool = option(
        "Any units that are free, and those of machines that died, until all units are made.", TRUTH, default=False
    )


class Machine(Options):
    """What this machine gives. None of these options changes a byte of the output."""

    memory: str | int | None = option(
        "Budget for data held at once, above start-up.", BUDGET, metavar="SIZE", otherwise="the plan's"
    )
    workers: int | None = option("How many workers.", COUNT, metavar="N", otherwise="the plan's, else CPUs available")
    io: Io | None = option("How inputs are read; pread for network drives.", one_of(IO), choices=IO, otherwise="the plan's")
    executor: str | Callable[[int], Any] | None = option(
        "The kind of workers: threads, processes, or auto.", metavar="NAME", otherwise="the plan's"
    )
    polite: bool = option("Give the inputs' page cache back behind the cursor.", TRUTH, default=False)
