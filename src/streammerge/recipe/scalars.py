"""Single values of a recipe: paths of models, ranges of layers, sizes, dtypes, merge methods, patterns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.methods.contracts import METHODS, MergeMethod, Parameter
from streammerge.methods.factors import FACTORS
from streammerge.methods.registry import COPY, LINEAR, find_method
from streammerge.options.values import whole
from streammerge.recipe.adapted import adapted_text, with_revision
from streammerge.recipe.fields import Plain
from streammerge.recipe.patterns import Rename, parse_pattern, parse_renames
from streammerge.stores.locations import without_queries
from streammerge.tensors.dtypes import DType, parse_dtype
from streammerge.units import parse_bytes


def parameter_docs() -> dict[str, str]:
    """Returns a description of every parameter: the names of the methods that have it."""
    owners: dict[str, list[str]] = {}
    for method in METHODS.built_in.values():
        for name in method.parameters:
            owners.setdefault(name, []).append(method.name)
    return {name: f"Parameter of {', '.join(names)}." for name, names in sorted(owners.items())}


def _model(value: Any) -> str:
    """Returns a model's path. mergekit may write a mapping that contains it."""
    if isinstance(value, Mapping):
        if value.get("override_architecture") is not None:
            raise RecipeError("override_architecture is not supported yet; give a folder with the weights merged")
        unknown = next((name for name in value if name not in ("model", "lora", "override_architecture")), None)
        if unknown is not None:
            raise RecipeError(f"unknown key {printable(unknown)} of a model; it knows model and lora")
        lora = value.get("lora")
        inner = value.get("model")
        value = with_revision(inner.get("path"), inner.get("revision")) if isinstance(inner, Mapping) else inner
        if lora is not None and isinstance(value, str):
            value = adapted_text(value, lora)
    value = str(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(value)
    return without_queries(value)


def _layer_range(value: Any) -> tuple[int, int]:
    start, stop = (int(end) if isinstance(end, str) else whole(end) for end in value)
    if not isinstance(value, list | tuple) or not 0 <= start < stop:
        raise ValueError(value)
    return start, stop


def _size(value: Any) -> int:
    size = parse_bytes(value)
    if size < 1:
        raise RecipeError("a size must be positive")
    return size


def _float_dtype(value: Any) -> DType:
    dtype = parse_dtype(value)
    if dtype.kind != "float":
        raise RecipeError(f"takes a floating-point dtype, not {dtype.torch_name}")
    return dtype


def _compute_dtype(value: Any) -> DType:
    dtype = parse_dtype(value)
    if dtype not in (DType.F32, DType.F64):
        raise RecipeError("the compute dtype must be float32 or float64")
    return dtype


def _torch_name(dtype: DType) -> str:
    return dtype.torch_name


@dataclass(frozen=True)
class _AnyMethod(MergeMethod):
    """Replaces an unknown method, so that the rest of its recipe is checked. It accepts everything."""

    @property
    def parameters(self) -> dict[str, Parameter]:
        return {name: Parameter(name, "any", True, (None,)) for name in parameter_docs()}


def _nearest_method(value: Any) -> MergeMethod:
    import difflib

    near = difflib.get_close_matches(str(value), METHODS.built_in, n=1)
    return METHODS.built_in[near[0]] if near else _AnyMethod("unknown", LINEAR.function, (0, None))


UNREAD = "\n(unreadable)"
"""Replaces a model whose name is invalid."""


MODEL = Plain(
    "the path of a model",
    _model,
    {"anyOf": [{"type": "string"}, {"type": "object", "required": ["model"]}]},
    guess=lambda value: UNREAD,
)
LAYER_RANGE = Plain(
    "the first layer and the layer after the last, like [0, 24]",
    _layer_range,
    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
    list,
    lambda value: (0, 0),
)
SIZE = Plain("a size like 5GB", _size, {"type": ["string", "integer"]})
DTYPE = Plain("a dtype like bfloat16", _float_dtype, {"type": "string"}, _torch_name)
COMPUTE = Plain("float32 or float64", _compute_dtype, {"enum": ["float32", "float64"]}, _torch_name)


def _listed_method(value: Any) -> MergeMethod:
    """Returns a method by its name. User code is not imported because a file names it."""
    if isinstance(value, str) and ":" in value:
        raise RecipeError(f"{printable(value)} is not a built-in method; `own_methods=True` lets a recipe import it")
    return find_method(value)


def _method_name(method: MergeMethod) -> str:
    """Returns the name under which the method is found again."""
    known = method is COPY or FACTORS.get(method.name) is method or METHODS.is_known_as(method.name, method)
    return method.name if known else method.place


METHOD = Plain(
    "a merge method",
    _listed_method,
    lambda: {"type": "string", "anyOf": [{"enum": sorted((*METHODS.built_in, *FACTORS))}, {"pattern": ":"}]},
    _method_name,
    _nearest_method,
)
PATTERN = Plain("a glob or a /regular expression/", parse_pattern, {"type": "string"}, str)


def _dump_renames(renames: tuple[Rename, ...]) -> dict[str, str]:
    return {each.pattern: each.name for each in renames}


_TEXTS = {"type": "string"}
RENAME = Plain(
    "patterns and new names, like {old.*: new.*}",
    parse_renames,
    {"anyOf": [{"type": "object", "additionalProperties": _TEXTS}, _TEXTS, {"type": "array", "items": _TEXTS}]},
    _dump_renames,
)
