"""Which executor runs a plan."""

from __future__ import annotations

import pickle
from collections.abc import Iterable

from streammerge.errors import BudgetError, RecipeError, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.planning.budget import PER_PROCESS_BYTES, Budget
from streammerge.planning.plan import Plan, budget_of
from streammerge.running.executors.base import Executors
from streammerge.running.executors.processes import supported
from streammerge.running.executors.registry import find_executor

MOST_THREADS = 4
"""Up to so many workers are threads. A worker holds Python's lock for 6 to 18 % of its time. At 18 %, four threads lose a
tenth to waiting for each other, and eight lose a third."""
LEAST_BYTES = 8 << 30
"""What must be read before processes are worth their start, which takes a second for torch alone."""


def choose_executor(plan: Plan, wanted: str | Executors) -> None:
    """Puts into the plan which executor it is run with, and the memory that this needs.

    ``wanted``: "auto", a name, or what makes an executor. Raises RecipeError for an unknown name and for methods that
    cannot be sent to processes, BudgetError when processes have too little memory.
    """
    if wanted == "auto":
        if plan.budget.workers > MOST_THREADS and plan.read_bytes >= LEAST_BYTES and supported():
            _use_processes_if_they_help(plan)
        return
    found = find_executor(wanted)
    if not isinstance(wanted, str):
        plan.executor = getattr(found, "__name__", type(found).__name__)
    elif wanted == "processes" and not supported():
        plan.notes.append("worker processes need a system with fork, such as Linux: the workers are threads")
    elif wanted == "processes":
        stuck = _stuck(task.method for task in plan.tasks)
        if stuck is not None:
            raise RecipeError(
                f"the merge method {printable(stuck.name)} cannot be sent to worker processes; put its function into a "
                'module that can be imported, or use executor="threads"'
            )
        plan.budget, plan.io = _budget_of_processes(plan)
        plan.executor = wanted
    else:
        plan.executor = wanted


def executor_of(plan: Plan, wanted: str | Executors) -> Executors:
    """What makes the executor that was chosen for a plan."""
    return find_executor(plan.executor if isinstance(wanted, str) else wanted)


def _use_processes_if_they_help(plan: Plan) -> None:
    """Leaves the plan with threads where processes have too little memory for more workers, or a method is stuck here."""
    if _stuck(task.method for task in plan.tasks) is not None:
        return
    try:
        budget, io = _budget_of_processes(plan)
    except BudgetError:
        return
    if budget.workers > MOST_THREADS:
        plan.budget, plan.io, plan.executor = budget, io, "processes"


def _budget_of_processes(plan: Plan) -> tuple[Budget, str]:
    workers, staged = plan.budget.workers, bool(plan.staged)
    return budget_of(plan.tasks, plan.memory_bytes, workers, plan.io, staged, beside_bytes=PER_PROCESS_BYTES)


def _stuck(methods: Iterable[MergeMethod]) -> MergeMethod | None:
    """A method that another process cannot find: a lambda, a function in another, or in the script that runs."""
    for method in {id(method): method for method in methods}.values():
        try:
            if b"__main__" in pickle.dumps(method):
                return method
        except Exception:  # noqa: BLE001 - a user's own object may fail to be pickled in any way
            return method
    return None
