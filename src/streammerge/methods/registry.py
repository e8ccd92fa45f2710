"""Lookup of merge methods by name, and of users' own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import METHODS, MergeMethod, contract_of
from streammerge.methods.exact import copy, integers
from streammerge.methods.factors import FACTORS
from streammerge.methods.linear import linear
from streammerge.plugins import imported
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

COPY: MergeMethod = copy.contract  # type: ignore[attr-defined]
INTEGERS: MergeMethod = integers.contract  # type: ignore[attr-defined]


LINEAR: MergeMethod = linear.contract  # type: ignore[attr-defined]
_MEANT = dict.fromkeys(
    ("mean", "average", "avg", "soup", "model_soup", "model_soups", "lerp", "weighted_average"), "linear"
)
"""Other names of methods, which people type -> the name here."""


def list_methods() -> dict[str, MergeMethod]:
    """Returns the built-in methods by name."""
    return METHODS.all()


@overload
def methods() -> list[str]: ...
@overload
def methods(name: str) -> MergeMethod: ...
def methods(name: str | None = None) -> list[str] | MergeMethod:
    """Returns the names of the built-in methods, or the method of one name. Raises RecipeError for an unknown name."""
    return list(list_methods()) if name is None else find_method(name)


def find_method(wanted: str | Callable[..., Kernel] | MergeMethod) -> MergeMethod:
    """Returns the method of a name, of ``package.module:function``, or of a function. Raises RecipeError."""
    if isinstance(wanted, MergeMethod):
        return wanted
    if callable(wanted):
        place = wanted if hasattr(wanted, "__qualname__") else type(wanted)  # a partial, or an object that can be called
        return contract_of(wanted, f"{place.__module__}:{place.__qualname__}")
    if not isinstance(wanted, str):
        raise RecipeError(f"a merge method is a name or a function, not {printable(wanted)}")
    if ":" in wanted:
        return contract_of(_function_at(wanted), wanted)
    found = METHODS.find(wanted) or FACTORS.get(wanted)
    if found is None:
        meant = wanted.lower().replace("-", "_").replace(" ", "_")
        found = METHODS.find(_MEANT.get(meant, meant))
    if found is not None:
        return found
    import difflib

    near = difflib.get_close_matches(wanted, list_methods(), n=1)
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
    turns = contract.turns is not None and contract.turns(shape, values)
    if turns:
        models = tuple(_turned(model) for model in models)
        base = None if base is None else _turned(base)
    wide = any(t.dtype == torch.float64 for t in (*models, *([] if base is None else [base])))
    group = TensorGroup.of(
        *models,
        base=base,
        seed=seed,
        row=contract.rows(shape if not turns else tuple(models[0].shape), values),
        compute=torch.float64 if wide else getattr(torch, contract.compute),
        chunk_elems=chunk_elems,
        turned=turns,
    )
    made = group.merged(contract.bind(group, values))
    return made.T.reshape(shape) if turns else made


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor as a matrix, with the elements of its first axis in the columns."""
    return tensor.reshape(len(tensor), -1).T


def _function_at(place: str) -> Callable[..., Kernel]:
    try:
        function = imported(place)
    except Exception as error:  # whatever the user's own module raises
        raise RecipeError(f"the merge method {printable(place)} cannot be imported: {printable(error)}") from error
    if not callable(function):
        raise RecipeError(f"the merge method {printable(place)} is not a function")
    return function  # type: ignore[no-any-return]
