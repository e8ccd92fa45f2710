"""Chooses the executor that runs a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from streammerge.errors import BudgetError, RecipeError, printable
from streammerge.planning.budget import PER_PROCESS_BYTES, REMOTE_BYTES, Budget
from streammerge.planning.costs import budget_of
from streammerge.planning.tasks import MergeTask, alike
from streammerge.running.executors.base import Executors, processes_supported
from streammerge.running.executors.registry import find_executor
from streammerge.sources.base import Source
from streammerge.stores.base import Location, Status

if TYPE_CHECKING:
    from streammerge.sources.deflated import PackedKey
    from streammerge.sources.merged import Merged

LEAST_BYTES = 16 << 30
"""The least bytes to read for which processes are worth their start, which takes a second for torch alone."""
LEAST_BYTES_OF_PASSES = 8 << 30
"""The same for methods with passes, which hold Python's lock for a larger share of their time."""
TENSOR_BYTES = 1 << 19
"""A tensor of a method with passes holds the lock as long as these bytes do, beside its own. So 16,384 of them repay the
start of processes: two threads do the work of 1.5, and a tensor takes a third of a millisecond."""


class Planned(Protocol):
    """The fields of a plan that decide about its executor."""

    budget: Budget
    io: str
    executor: str
    notes: list[str]

    @property
    def tasks(self) -> Sequence[MergeTask]: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def pickle_bytes(self) -> int: ...
    @property
    def expressions(self) -> Sequence[Source]: ...
    @property
    def spooled(self) -> Mapping[PackedKey, str]: ...
    @property
    def identities(self) -> Mapping[Location, Status]: ...
    @property
    def out(self) -> Location | None: ...


def most_threads(tensors: int, read_bytes: int) -> int:
    """Returns the most workers for which threads are as fast as processes, by ``benchmarks/executors.py``.

    ``tensors``: how many tensors methods with passes make. Without such tensors, four threads do the work of four
    processes, and more threads do less. With them, two threads do nearly the work of two processes. Many small tensors,
    each with passes of its own, are faster in two processes than in any number of threads.
    """
    if not tensors:
        return 4
    return 1 if tensors * TENSOR_BYTES > read_bytes else 2


def default_workers() -> int:
    """Returns the number of CPUs that this process may use."""
    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 1)


def choose_executor(plan: Planned, wanted: str | Executors) -> None:
    """Writes into the plan which executor runs it, and the memory that this executor needs.

    ``wanted``: "auto", a name, or a function that makes an executor. Raises RecipeError for an unknown name and for methods
    or stores that worker processes cannot import, BudgetError when the memory is too little for processes.
    """
    if isinstance(wanted, str) and wanted == "auto":  # an array is not equal to anything
        counted = sum(count for task, count in alike(plan.tasks) if task.method.passes)
        tensors = counted if plan.budget.workers > 1 else 0
        read_bytes = plan.read_bytes
        most = most_threads(tensors, read_bytes)
        enough = read_bytes + tensors * TENSOR_BYTES >= LEAST_BYTES_OF_PASSES if tensors else read_bytes >= LEAST_BYTES
        if enough and plan.budget.workers > most and not _why_threads(plan):
            _use_processes_if_they_help(plan, most)
        return
    found = find_executor(wanted)
    if not isinstance(wanted, str):
        plan.executor = getattr(found, "__name__", type(found).__name__)
    elif wanted != "processes":
        plan.executor = wanted
    elif why := _why_threads(plan):
        plan.notes.append(f"{why}; the workers are threads")
    else:
        if stuck := _stuck(plan):
            raise RecipeError(f'{stuck}, or use `executor="threads"`')
        plan.budget, plan.io = _budget_of_processes(plan)
        plan.executor = wanted


def executor_of(plan: Planned, wanted: str | Executors) -> Executors:
    """Returns the function that makes the executor chosen for a plan."""
    return find_executor(plan.executor if isinstance(wanted, str) else wanted)


def _why_threads(plan: Planned) -> str:
    """Returns the reason why only threads can do this work, "" if processes can."""
    if not processes_supported():
        return "worker processes need a Python interpreter, and a system with fork such as Linux"
    if any(source.held for source in plan.expressions):
        return "tensors in the memory of this process cannot be read by others"
    places = [plan.out, *plan.identities] if plan.out else [*plan.identities]
    alone = next((place for place in places if place.store.one_process), None)
    if plan.out is not None and plan.out.store.sends_parts:
        return f"an output in {plan.out.store.scheme}:// is sent by one process"
    return "" if alone is None else f"the store {alone.store.scheme}:// belongs to this process"


def _use_processes_if_they_help(plan: Planned, most: int) -> None:
    """Switches the plan to processes if its methods can be sent and the memory allows more than ``most`` of them."""
    try:
        budget, io = _budget_of_processes(plan)
    except BudgetError:
        return
    if budget.workers <= most:
        return
    if stuck := _stuck(plan):
        plan.notes.append(f"the workers are threads, because {stuck} to have worker processes")
    else:
        plan.budget, plan.io, plan.executor = budget, io, "processes"


def _budget_of_processes(plan: Planned) -> tuple[Budget, str]:
    each = PER_PROCESS_BYTES + (REMOTE_BYTES if plan.budget.streams else 0)  # each process has a client of its own
    more = (plan.io, bool(plan.spooled), plan.pickle_bytes, each)
    return budget_of(plan.tasks, plan.memory_bytes, plan.budget.workers, *more)


def _stuck(plan: Planned) -> str:
    """Returns what worker processes cannot import, and what to do about it; "" if they can import everything.

    Everything that is not of this package is asked about: methods and their parameters, sources, stores. A lambda, a nested
    function and what the running script defines cannot be imported. A clean interpreter answers about the rest, because a
    module that was loaded from a file of its own is known to this process only.
    """
    from streammerge.running.executors.messages import pickled

    said, pickles = list[str](), list[bytes]()
    for what, place, thing in _own_things(plan):
        problem = f"{what} cannot be sent to worker processes; put {place} into a module that can be imported"
        try:
            data = pickled(thing)
        except Exception:  # noqa: BLE001 - a user's own object may fail to be pickled in any way
            return problem
        if b"__main__" in data:
            return problem
        said.append(problem)
        pickles.append(data)
    if not pickles:
        return ""
    from streammerge.running.executors.importing import first_not_loadable  # here, because most merges do without it

    failed = first_not_loadable(pickles)
    return "" if failed is None else said[failed[0]].replace("; put", f" ({printable(failed[1])}); put", 1)


def _own_things(plan: Planned) -> Iterator[tuple[str, str, Any]]:
    """Yields each thing of a run that this package does not define: its name, the word for its code, and itself."""
    from streammerge.sources.merged import Merged

    sources = [each for source in plan.expressions for each in _nested(source)]
    merges: list[MergeTask | Merged] = [
        *(task for task, _ in alike(plan.tasks)),
        *(each for each in sources if isinstance(each, Merged)),
    ]
    methods = {id(each.method): each.method for each in merges}
    parameters = {id(each.parameters): each.parameters for each in merges}
    for method in methods.values():
        if not _is_ours(method.place):
            yield f"the merge method {printable(method.name)}", "its function", method
    for values in parameters.values():
        for name, value in values.items():
            if not _is_plain(value):
                yield f"the parameter {printable(name)}", "what it names", value
    for kind, source in {type(each): each for each in sources}.items():
        if not _is_ours(kind.__module__):
            yield f"the source {printable(kind.__name__)} of tensor {printable(source.spec.name)}", "its class", source
    places = [*plan.identities, *([plan.out] if plan.out else [])]
    for store in {type(place.store): place.store for place in places}.values():
        if not _is_ours(type(store).__module__):
            yield f"the store {store.scheme}://", "its class", store


def _is_ours(module: str) -> bool:
    return module.startswith("streammerge.")


def _is_plain(value: object) -> bool:
    """Whether a value is made of numbers and text only."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _nested(source: Source) -> Iterator[Source]:
    """Yields a source and its inner sources, at any depth."""
    yield source
    for part in source.parts:
        yield from _nested(part)
