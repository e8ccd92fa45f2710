"""An adapter from adapters: the merge of their products, as factors again. Factors themselves are never averaged.

The product of a module is its update. Its weighted sum over adapters has the stacked factors as factors, exactly ("cat"),
and a best approximation of a lower rank, computed from the factors alone ("svd"). Other methods compute with the products
by rows, as with the weights of models whose base is zero, and their result is decomposed. An adapter without a module has
an update of zero there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from streammerge.adapters.config import CONFIG
from streammerge.adapters.modules import Adapter, Module
from streammerge.adapters.updates import delta
from streammerge.errors import FormatError, MismatchError, RecipeError, listed, printable
from streammerge.factoring.documents import Document
from streammerge.factoring.layers import DECOMPOSE, EMBEDDING, LINEAR, RECOMPRESS, STACK, Layer
from streammerge.factoring.making import Making
from streammerge.factoring.parameters import Parameters
from streammerge.factoring.recording import Record
from streammerge.factoring.truncated import Wanted
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.factors import FACTORS
from streammerge.methods.registry import COPY
from streammerge.methods.registry import LINEAR as MEAN
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.elementwise import rounded, summed
from streammerge.sources.joined import joined
from streammerge.sources.merged import merged
from streammerge.sources.permuted import permuted, shaped
from streammerge.stores.base import Location, Status
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_RANKS = ("svd_rank", "rank")
Shape = tuple[int, ...]


class Combined(NamedTuple):
    """How one module of adapters is combined. ``way``: a merge method, "cat" or "svd". ``weights``: one for each adapter.
    ``parameters``: of the method. ``rank``: of the result; 0 for the adapters' own."""

    way: MergeMethod | str
    weights: Sequence[float]
    parameters: Mapping[str, Any]
    rank: int = 0


def combination(adapters: Sequence[Adapter], recipe: Recipe) -> Making:
    """Returns what an adapter from adapters is made of by a recipe. Reads no tensor.

    Raises MismatchError for adapters whose updates are no products of two factors, or need a base, and RecipeError for
    parameters that adapters cannot follow.
    """
    modules: dict[str, list[tuple[int, Module]]] = {}
    for number, adapter in enumerate(adapters):
        for module in adapter.modules:
            _check(adapter, module)
            modules.setdefault(module.name, []).append((number, module))
    parameters = Parameters(recipe, [f"{name}.weight" for name in modules])
    asked = {name: _read(recipe, parameters.of(f"{name}.weight"), len(adapters)) for name in modules}
    layers = [_layer(name, found, adapters, asked[name], recipe) for name, found in modules.items()]
    making = Making(
        layers,
        _document(adapters),
        _files(adapters),
        [adapter.index.path for adapter in adapters],
        listed([adapter.where for adapter in adapters], 4),
        notes=[note for adapter in adapters for note in adapter.notes],
        warnings=[warning for adapter in adapters for warning in adapter.index.warnings],
        record=Record.of(recipe, adapters),
    )
    making.notes += [_said(each.way, each.weights if parameters.fixed else ()) for each in [*asked.values()][:1]]
    return making


def _said(way: MergeMethod | str, weights: Sequence[float]) -> str:
    """Says how adapters are merged. ``weights``: of all layers; none if layers have their own."""
    shown = ", ".join(f"{weight:g}" for weight in weights) if weights else "the weights of each layer"
    if way == "cat":
        return f"the factors are stacked (method cat), which is exactly the sum of the updates, times {shown}"
    if way == "svd":
        return f"the sum of the updates, times {shown}, is cut to the rank of the result (method svd)"
    name = way if isinstance(way, str) else way.name
    return f"{name} merges the products of the factors, and the result is cut to the rank of the new adapter"


def _read(recipe: Recipe, given: dict[str, Any], count: int) -> Combined:
    """Returns how a module is combined with these parameters."""
    method: MergeMethod | str = recipe.merge_method
    if FACTORS.get(recipe.merge_method.name) is method:
        method = recipe.merge_method.name
    own = method.parameters if isinstance(method, MergeMethod) else {}
    ranks = [recipe.rank] if recipe.rank is not None else []
    ranks += [given.pop(name) for name in _RANKS if name in given and name not in own]
    rank = whole_rank(ranks[0]) if ranks else 0
    weights = given.pop("weight", None)
    if method is MEAN:
        normalize = given.pop("normalize", True)
        weights = weights or [1.0] * count
        if normalize not in (False, "false", "False", "0", 0, "off"):
            total = sum(weights)
            if not total:
                raise RecipeError("the weights sum to 0, so they have no mean; pass `normalize=False`")
            weights = [weight / total for weight in weights]
        method = "svd" if rank else "cat"
    if isinstance(method, str):
        if given:
            raise RecipeError(f"{method} of adapters has the parameters weight and rank, not {listed(list(given))}")
        return Combined(method, weights or [1.0] * count, {}, rank)
    if method is COPY:
        raise RecipeError("copy takes one model; choose a method that merges adapters, like linear")
    if weights is not None:
        given["weight"] = weights
    return Combined(method, weights or [1.0] * count, given, rank)


def whole_rank(value: Any) -> int:
    """Returns a rank that was given as a number or a text. Raises RecipeError for what is no positive whole number."""
    try:
        rank = int(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"rank takes a positive whole number, not {printable(value, 60)}") from error
    if rank < 1:
        raise RecipeError(f"rank takes a positive whole number, not {rank}")
    return rank


def _check(adapter: Adapter, module: Module) -> None:
    """Raises MismatchError for an update that is no product of two factors."""
    why = ""
    if module.magnitude:
        why = "its update depends on the base (DoRA)"
    elif module.start:
        why = f"it changes the base when it is loaded ({module.start})"
    elif module.kind not in ("lora", "embedding") or "mid" in module.parts:
        why = f"its update is no product of two factors (kind {module.kind})"
    elif "." not in module.name and module.name.startswith(("lora_", "lycoris_")):
        why = "its name lacks the dots of the base's, so PEFT would not find the module"
    if why:
        raise MismatchError(
            f"{adapter.where}: {printable(module.keys[0])}: {why}, so adapters alone cannot be merged; pass `base`, the "
            "model that they were made for, and the merge is a model"
        )


def _sides(module: Module) -> tuple[Source, Source]:
    """Returns the factors [n, r] and [r, m] of an update as PEFT stores it, without the scale."""
    if module.kind == "embedding":
        return permuted(module.parts["embedding A"]), permuted(module.parts["embedding B"])
    down, up = module.parts["A"], module.parts["B"]
    return shaped(up, up.spec.shape[0], -1), shaped(down, down.spec.shape[0], -1)


def _shape(module: Module) -> Shape:
    """Returns the shape of a module's update. Linear weights are [out, in] here, also where the base stores [in, out]."""
    if module.kind == "embedding":
        return module.parts["embedding A"].spec.shape[1], module.parts["embedding B"].spec.shape[0]
    down, up = module.parts["A"].spec.shape, module.parts["B"].spec.shape
    return up[0], *down[1:]


def _layer(
    name: str,
    found: Sequence[tuple[int, Module]],
    adapters: Sequence[Adapter],
    asked: Combined,
    recipe: Recipe,
) -> Layer:
    way, weights, parameters, rank = asked
    first = found[0][1]
    shape = _shape(first)
    for number, module in found[1:]:
        if _shape(module) != shape or module.kind != first.kind:
            raise MismatchError(
                f"{printable(name)}: the update of {adapters[found[0][0]].where} has the shape {list(shape)}, and that of "
                f"{adapters[number].where} {list(_shape(module))}; they are of different bases"
            )
    form = EMBEDDING if first.kind == "embedding" else LINEAR
    tensor = f"{name}.weight"
    dtype = recipe.recast or _dtype(module for _, module in found)
    if isinstance(way, MergeMethod):
        by_number = dict(found)
        deltas = [
            delta(_as_stored(by_number[n]), shape).named(tensor)
            if n in by_number
            else Constant(TensorSpec(tensor, DType.F64, shape))
            for n in range(len(adapters))
        ]
        based = way.base == "required"
        sources = [Constant(TensorSpec(tensor, DType.F64, shape))] * based + deltas
        one = merged(tensor, way, sources, dict(parameters), based=based, seed=recipe.seed)
        most = rank or max(module.rank for _, module in found)
        return Layer(tensor, shape, DECOMPOSE, (one,), Wanted(most, 0.0, dtype), form)
    left, right, total = list[Source](), list[Source](), 0
    for number, module in found:
        one, other = _sides(module)
        scale = weights[number] * module.scale
        left.append(rounded(one, DType.F64))
        right.append(summed([other], [scale]))
        total += module.rank
    stacked = joined(tensor, left, 1), joined(tensor, right, 0)
    if way == "cat":
        return Layer(tensor, shape, STACK, stacked, Wanted(total, 0.0, dtype), form)
    most = rank or max(module.rank for _, module in found)
    return Layer(tensor, shape, RECOMPRESS, stacked, Wanted(min(most, total), 0.0, dtype), form)


def _as_stored(module: Module) -> Module:
    """Returns a module whose update is made as [out, in]."""
    return replace(module, transposed=False)


def _dtype(modules: Any) -> DType:
    """Returns float64 if a factor has it, else float32, since a factor times a number has more digits than 16 bits hold."""
    dtypes = {part.spec.dtype for module in modules for part in module.parts.values()}
    return DType.F64 if DType.F64 in dtypes else DType.F32


def _files(adapters: Sequence[Adapter]) -> dict[Location, Status]:
    return {path: status for adapter in adapters for path, status in adapter.index.identities().items()}


def _document(adapters: Sequence[Adapter]) -> Document:
    """Returns the configuration's content that the adapters agree on."""
    trees = [_tree(adapter) for adapter in adapters]

    def common(key: str) -> Any:
        values = [tree.get(key) for tree in trees]
        return values[0] if all(value == values[0] for value in values) else None

    base, task = common("base_model_name_or_path"), common("task_type")
    across = {bool(tree.get("fan_in_fan_out")) for tree in trees}
    if len(across) > 1:
        raise MismatchError(
            f"{listed([adapter.where for adapter in adapters], 4)} say different things about fan_in_fan_out in {CONFIG}, "
            "so they are of different bases"
        )
    names = {module.name for adapter in adapters for module in adapter.modules}
    return Document(base, task, names, 0.0, across == {True})


def _tree(adapter: Adapter) -> Mapping[str, Any]:
    folder = adapter.index.path if adapter.index.path.is_folder() else adapter.index.path.parent
    if adapter.config is None:
        return {}
    path = folder / CONFIG
    try:
        tree = json.loads(path.read(0, path.size).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{printable(path)} cannot be read ({printable(error)})") from error
    return tree if isinstance(tree, dict) else {}
