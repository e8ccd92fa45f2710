"""From a name, or a user's own function, to a merge method."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError, printable
from streammerge.group import Kernel, TensorGroup
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.exact import copy, integers
from streammerge.tensors import GRAIN

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
    """Every method that comes with the package, by name."""
    found: dict[str, MergeMethod] = {}
    for module in MODULES:
        for value in vars(import_module(f"streammerge.methods.{module}")).values():
            contract = getattr(value, "contract", None)
            if isinstance(contract, MergeMethod) and contract.listed:
                found[contract.name] = contract
    return found


def find_method(wanted: str | Callable[..., Kernel] | MergeMethod) -> MergeMethod:
    """The method of that name, of ``package.module:function``, or that is a function itself. Raises RecipeError."""
    if isinstance(wanted, MergeMethod):
        return wanted
    if callable(wanted):
        return _own(wanted, f"{wanted.__module__}:{wanted.__qualname__}")
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
    """Merges tensors in memory, to try a method: checked and computed as for files. Returns the compute dtype."""
    import torch

    contract = find_method(method)
    values = contract.resolve(parameters, len(models))
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
    # Nothing is known of it, so it is given room for a copy of each model and as much again.
    return MergeMethod(name, function, buffers=8, buffers_per_model=2)


def _imported(place: str) -> Callable[..., Kernel]:
    module, _, name = place.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the recipe, as for `python -m`
    try:
        function = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"--method {printable(place)} cannot be imported: {printable(error)}") from error
    if not callable(function):
        raise RecipeError(f"--method {printable(place)} is no function")
    return function
