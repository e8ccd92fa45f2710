"""Lookup of merge methods by name, and of users' own functions."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.exact import copy, integers
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

MODULES = (
    "linear",
    "exact",
    "spherical",
    "nuslerp",
    "task_arithmetic",
    "model_stock",
    "sce",
    "ram",
    "nearswap",
    "arcee_fusion",
    "difference",
    "median",
)


COPY: MergeMethod = copy.contract  # type: ignore[attr-defined]
INTEGERS: MergeMethod = integers.contract  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def methods() -> dict[str, MergeMethod]:
    """Returns the built-in methods by name."""
    found: dict[str, MergeMethod] = {}
    for module in MODULES:
        for value in vars(import_module(f"streammerge.methods.{module}")).values():
            contract = getattr(value, "contract", None)
            if isinstance(contract, MergeMethod) and contract.listed:
                found[contract.name] = contract
    return found


def find_method(wanted: str | Callable[..., Kernel] | MergeMethod) -> MergeMethod:
    """Returns the method of a name, of ``package.module:function``, or of a function. Raises RecipeError."""
    if isinstance(wanted, MergeMethod):
        return wanted
    if callable(wanted):
        # a partial, or a callable object, has no name of its own
        place = wanted if hasattr(wanted, "__qualname__") else type(wanted)
        return _own(wanted, f"{place.__module__}:{place.__qualname__}")
    if not isinstance(wanted, str):
        raise RecipeError(f"a merge method is a name or a function, not {printable(wanted)}")
    if ":" in wanted:
        return _own(_imported(wanted), wanted)
    if wanted in methods():
        return methods()[wanted]
    near = difflib.get_close_matches(wanted, methods(), n=1)
    hint = f"did you mean {near[0]}?" if near else "`streammerge methods` lists them"
    raise RecipeError(f"unknown merge method {printable(wanted)}; {hint}")


def merge_tensors(
    method: str | Callable[..., Kernel],
    *models: torch.Tensor,
    base: torch.Tensor | None = None,
    seed: int = 0,
    chunk_elems: int = GRAIN,
    **parameters: Any,
) -> torch.Tensor:
    """Merges tensors in memory, to try a method. Checks and computes as for files; returns the compute dtype."""
    import torch

    contract = find_method(method)
    values = contract.resolve(parameters, len(models))
    if len({t.shape for t in (*models, *([] if base is None else [base]))}) > 1:
        raise RecipeError("the tensors must have the same shape")
    if contract.base == "required" and base is None:
        raise RecipeError(f"{contract.name} needs a base")
    shape = tuple((models[0] if base is None else base).shape)
    wide = any(t.dtype == torch.float64 for t in (*models, *([] if base is None else [base])))
    group = TensorGroup.of(
        *models,
        base=base,
        seed=seed,
        row=contract.rows(shape, values),
        compute=torch.float64 if wide else getattr(torch, contract.compute),
        chunk_elems=chunk_elems,
    )
    return group.merged(contract.bind(group, values))


def _own(function: Callable[..., Kernel], name: str) -> MergeMethod:
    contract = getattr(function, "contract", None)
    if isinstance(contract, MergeMethod):
        return contract
    # Its needs are unknown, so it gets room for a copy of each model and as much again.
    method = MergeMethod(name, function, buffers=8, buffers_per_model=2)
    try:
        _ = method.parameters
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{printable(name)} cannot be a merge method: {printable(error)}") from error
    return method


def _imported(place: str) -> Callable[..., Kernel]:
    module, _, name = place.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # allow a module beside the recipe, as `python -m` does
    try:
        function = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # the user's own module may raise anything
        raise RecipeError(f"--method {printable(place)} cannot be imported: {printable(error)}") from error
    if not callable(function):
        raise RecipeError(f"--method {printable(place)} is not a function")
    return function
