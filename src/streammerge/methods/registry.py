"""From a task's method to the kernel that computes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from streammerge.group import Kernel, TensorGroup
from streammerge.methods.contracts import METHODS

_BUILT_IN = {"copy": "exact:copy", "integers": "exact:integers"}


def bind(method: str, group: TensorGroup, parameters: dict[str, Any]) -> Kernel:
    """The kernel of a method for one group of tensors."""
    place = _BUILT_IN.get(method) or METHODS[method].function
    module, _, name = place.partition(":")
    function: Callable[..., Kernel] = getattr(import_module(f"streammerge.methods.{module}"), name)
    return function(group, **parameters)
