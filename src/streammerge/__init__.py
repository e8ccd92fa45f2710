"""Merge model checkpoints larger than memory: streaming, exact, in a memory budget you set."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streammerge.version import __version__ as __version__

if TYPE_CHECKING:
    # Every public name stands here for type checkers, and once more in _PLACES for people.
    from streammerge.api import convert as convert
    from streammerge.api import diff as diff
    from streammerge.api import extract as extract
    from streammerge.api import finish as finish
    from streammerge.api import inspect as inspect
    from streammerge.api import merge as merge
    from streammerge.api import plan as plan
    from streammerge.api import report as report
    from streammerge.api import sweep as sweep
    from streammerge.api import verify as verify
    from streammerge.api import worker as worker
    from streammerge.checkpoints.index import CheckpointIndex as CheckpointIndex
    from streammerge.diffing.result import Diff as Diff
    from streammerge.errors import BudgetError as BudgetError
    from streammerge.errors import ChangedError as ChangedError
    from streammerge.errors import FormatError as FormatError
    from streammerge.errors import LockedError as LockedError
    from streammerge.errors import MismatchError as MismatchError
    from streammerge.errors import RecipeError as RecipeError
    from streammerge.errors import SpaceError as SpaceError
    from streammerge.errors import StoreError as StoreError
    from streammerge.errors import StreammergeError as StreammergeError
    from streammerge.errors import TaskError as TaskError
    from streammerge.errors import UncheckedError as UncheckedError
    from streammerge.errors import UnfinishedError as UnfinishedError
    from streammerge.errors import VerifyError as VerifyError
    from streammerge.factoring.making import AdapterResult as AdapterResult
    from streammerge.formats.registry import file_format as file_format
    from streammerge.formats.safetensors_writer import SafetensorsWriter as SafetensorsWriter
    from streammerge.kernels.chunk import Chunk as Chunk
    from streammerge.kernels.chunk import Kernel as Kernel
    from streammerge.kernels.group import TensorGroup as TensorGroup
    from streammerge.methods.contracts import MergeMethod as MergeMethod
    from streammerge.methods.contracts import merge_method as merge_method
    from streammerge.methods.registry import list_methods as list_methods
    from streammerge.methods.registry import methods as methods
    from streammerge.planning.plan import Plan as Plan
    from streammerge.recipe.model import Recipe as Recipe
    from streammerge.running.execution import Result as Result
    from streammerge.running.executors.base import Executor as Executor
    from streammerge.running.executors.registry import executor as executor
    from streammerge.running.shared import ShareResult as ShareResult
    from streammerge.sources.base import Source as Source
    from streammerge.stores.base import Location as Location
    from streammerge.stores.base import Store as Store
    from streammerge.stores.locations import location as location
    from streammerge.stores.memory import memory_store as memory_store
    from streammerge.stores.registry import register_store as register_store
    from streammerge.sweeps.results import SweepResult as SweepResult
    from streammerge.tensors.spec import TensorSpec as TensorSpec
    from streammerge.verifying.files import Verified as Verified

_PLACES = {
    "api": "convert diff extract finish inspect merge plan report sweep verify worker",
    "checkpoints.index": "CheckpointIndex",
    "diffing.result": "Diff",
    "errors": "BudgetError ChangedError FormatError LockedError MismatchError RecipeError SpaceError StreammergeError "
    "StoreError TaskError UncheckedError UnfinishedError VerifyError",
    "factoring.making": "AdapterResult",
    "formats.registry": "file_format",
    "kernels.chunk": "Chunk Kernel",
    "kernels.group": "TensorGroup",
    "methods": "methods",
    "methods.contracts": "MergeMethod merge_method",
    "methods.registry": "list_methods",
    "planning.plan": "Plan",
    "recipe.model": "Recipe",
    "running.execution": "Result",
    "running.executors.base": "Executor",
    "running.executors.registry": "executor",
    "running.shared": "ShareResult",
    "stores.base": "Location Store",
    "stores.locations": "location",
    "stores.memory": "memory_store",
    "stores.registry": "register_store",
    "sources.base": "Source",
    "sweeps.results": "SweepResult",
    "tensors.spec": "TensorSpec",
    "verifying.files": "Verified",
    "formats.safetensors_writer": "SafetensorsWriter",
}
"""Module -> the public names that it has."""
_HOMES = {name: place for place, names in _PLACES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """The public names, each loaded when it is first asked for: the command line's --help needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    if name == _HOMES[name]:  # a room that can be called
        return module
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
