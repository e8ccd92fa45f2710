"""Chooses the executor that runs a plan."""

from __future__ import annotations

import pickle

from streammerge.errors import BudgetError, RecipeError, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.planning.budget import PER_PROCESS_BYTES, Budget
from streammerge.planning.plan import Plan, budget_of
from streammerge.running.executors.base import Executors
from streammerge.running.executors.processes import supported
from streammerge.running.executors.registry import find_executor
from streammerge.sources.merged import methods_in

MOST_THREADS = 4
"""The most workers that are threads. A worker holds Python's lock for 6 to 18 % of its time. At 18 %, four threads lose a
tenth of their time to waiting for each other, and eight lose a third."""
LEAST_BYTES = 8 << 30
"""The least bytes to read for which processes are worth their start, which takes a second for torch alone."""


def choose_executor(plan: Plan, wanted: str | Executors) -> None:
    """Writes into the plan which executor runs it, and the memory that this executor needs.

    ``wanted``: "auto", a name, or a function that makes an executor. Raises RecipeError for an unknown name and for methods
    that cannot be sent to processes, BudgetError when the memory is too little for processes.
    """
    if wanted == "auto":
        if plan.budget.workers > MOST_THREADS and plan.read_bytes >= LEAST_BYTES and not _why_threads(plan):
            _use_processes_if_they_help(plan)
        return
    found = find_executor(wanted)
    if not isinstance(wanted, str):
        plan.executor = getattr(found, "__name__", type(found).__name__)
    elif wanted != "processes":
        plan.executor = wanted
    elif why := _why_threads(plan):
        plan.notes.append(f"{why}; the workers are threads")
    else:
        stuck = _stuck(plan)
        if stuck is not None:
            raise RecipeError(
                f"the merge method {printable(stuck.name)} cannot be sent to worker processes; put its function into a "
                'module that can be imported, or use `executor="threads"`'
            )
        plan.budget, plan.io = _budget_of_processes(plan)
        plan.executor = wanted


def executor_of(plan: Plan, wanted: str | Executors) -> Executors:
    """Returns the function that makes the executor chosen for a plan."""
    return find_executor(plan.executor if isinstance(wanted, str) else wanted)


def _why_threads(plan: Plan) -> str:
    """Returns the reason why only threads can do this work, "" if processes can."""
    if not supported():
        return "worker processes need a Python interpreter, and a system with fork such as Linux"
    if any(source.held for source in plan.expressions):
        return "tensors in the memory of this process cannot be read by others"
    places = [plan.out, *plan.identities] if plan.out else [*plan.identities]
    alone = next((place for place in places if place.store.one_process), None)
    return "" if alone is None else f"the store {alone.store.scheme}:// belongs to this process"


def _use_processes_if_they_help(plan: Plan) -> None:
    """Switches the plan to processes if its methods can be sent and the memory allows more of them than threads."""
    if _stuck(plan) is not None:
        return
    try:
        budget, io = _budget_of_processes(plan)
    except BudgetError:
        return
    if budget.workers > MOST_THREADS:
        plan.budget, plan.io, plan.executor = budget, io, "processes"


def _budget_of_processes(plan: Plan) -> tuple[Budget, str]:
    more = (plan.io, bool(plan.spooled), plan.pickle_bytes, PER_PROCESS_BYTES)
    return budget_of(plan.tasks, plan.memory_bytes, plan.budget.workers, *more)


def _stuck(plan: Plan) -> MergeMethod | None:
    """Returns a method that another process cannot import: a lambda, a nested function, or one of the running script."""
    methods = {id(task.method): task.method for task in plan.tasks}
    methods |= {id(method): method for source in plan.expressions for method in methods_in(source)}
    for method in methods.values():
        try:
            if b"__main__" in pickle.dumps(method):
                return method
        except Exception:  # noqa: BLE001 - a user's own object may fail to be pickled in any way
            return method
    return None
