"""Merge model checkpoints larger than memory: streaming, exact, in a memory budget you set."""

from streammerge.api import convert, inspect, merge, plan
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
from streammerge.plan import Plan
from streammerge.run import Result
from streammerge.tensors import TensorEntry, TensorSpec
from streammerge.writer import SafetensorsWriter

__version__ = "0.1.0"

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
    "VerifyError",
    "convert",
    "inspect",
    "merge",
    "merge_method",
    "plan",
]
