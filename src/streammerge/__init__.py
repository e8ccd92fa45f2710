"""Merge model checkpoints larger than memory: streaming, exact, in a memory budget you set."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streammerge.version import __version__ as __version__

if TYPE_CHECKING:
    from streammerge.api import convert, inspect, merge, plan, verify
    from streammerge.checkpoint import CheckpointIndex
    from streammerge.errors import (
        BudgetError,
        ChangedError,
        FormatError,
        LockedError,
        MismatchError,
        RecipeError,
        SpaceError,
        StreammergeError,
        TaskError,
        VerifyError,
    )
    from streammerge.methods.contracts import merge_method
    from streammerge.planning import Plan
    from streammerge.run import Result
    from streammerge.tensors import TensorEntry, TensorSpec
    from streammerge.verification import Verified
    from streammerge.writer import SafetensorsWriter

__all__ = [
    "BudgetError",
    "ChangedError",
    "CheckpointIndex",
    "FormatError",
    "LockedError",
    "MismatchError",
    "Plan",
    "RecipeError",
    "Result",
    "SafetensorsWriter",
    "SpaceError",
    "StreammergeError",
    "TaskError",
    "TensorEntry",
    "TensorSpec",
    "Verified",
    "VerifyError",
    "convert",
    "inspect",
    "merge",
    "merge_method",
    "plan",
    "verify",
]

_PLACES = {
    "BudgetError": "errors",
    "ChangedError": "errors",
    "CheckpointIndex": "checkpoint",
    "FormatError": "errors",
    "LockedError": "errors",
    "MismatchError": "errors",
    "Plan": "planning",
    "RecipeError": "errors",
    "Result": "run",
    "SafetensorsWriter": "writer",
    "SpaceError": "errors",
    "StreammergeError": "errors",
    "TaskError": "errors",
    "TensorEntry": "tensors",
    "TensorSpec": "tensors",
    "Verified": "verification",
    "VerifyError": "errors",
    "convert": "api",
    "inspect": "api",
    "merge": "api",
    "merge_method": "methods.contracts",
    "plan": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    """The public names, each loaded when it is first asked for: the command line's --help needs none of them."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
