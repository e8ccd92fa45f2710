"""An adapter from adapters: the merge of their products, as factors again. Factors themselves are never averaged.

The product of a module is its update. Its weighted sum over adapters has the stacked factors as factors, exactly ("cat"),
and a best approximation of a lower rank, computed from the factors alone ("svd"). Other methods compute with the products
by rows, as with the weights of models whose base is zero, and their result is decomposed. An adapter without a module has
an update of zero there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from streammerge.adapters.config import CONFIG
from streammerge.adapters.layouts import with_kernel
from streammerge.adapters.modules import Adapter, Module
from streammerge.adapters.updates import delta, lora_factors, update_shape
from streammerge.errors import FormatError, MismatchError, RecipeError, listed, printable
from streammerge.factoring.documents import Document
from streammerge.factoring.layers import DECOMPOSE, EMBEDDING, LINEAR, RECOMPRESS, STACK, Layer
from streammerge.factoring.making import Making
from streammerge.factoring.naming import aligned, is_flat, said
from streammerge.factoring.parameters import Parameters
from streammerge.factoring.recording import Record
from streammerge.factoring.single import SingleFile, refuse_first
from streammerge.factoring.truncated import Wanted
from streammerge.formats.file_names import kind_of_file
from streammerge.formats.records import CARD_FILE
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
from streammerge.sources.permuted import permuted
from streammerge.stores.base import Location, Status
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_RANKS = ("svd_rank", "rank")
Shape = tuple[int, ...]


class Combined(NamedTuple):
    """How one module of adapters is combined. ``way``: a merge method, "cat" or "svd". ``weights``: one for each adapter.
    ``parameters``: of the method. ``rank``: of the result; 0 for the adapters' own. ``energy``: the share of an update's
    squares that the rank needs to hold; 0 for all that the rank holds."""

    way: MergeMethod | str
    weights: Sequence[float]
    parameters: Mapping[str, Any]
    rank: int = 0
    energy: float = 0.0


def combination(adapters: Sequence[Adapter], recipe: Recipe, single: bool = False) -> Making:
    """Returns what an adapter from adapters is made of by a recipe. Reads no tensor.

    ``single``: whether the result is one file, in the dialect of the first adapter, and no folder in PEFT's form.

    Raises MismatchError for adapters whose updates need a base or are no matrices, or whose names do not fit together, and
    RecipeError for parameters that adapters cannot follow.
    """
    if single:
        refuse_first(adapters)
    for adapter in adapters:
        for module in adapter.modules:
            _check(adapter, module)
    modules = aligned(adapters)
    if not single:
        _check_names(adapters, modules)
    parameters = Parameters(recipe, [f"{name}.weight" for name in modules])
    asked = {name: _read(recipe, parameters.of(f"{name}.weight"), len(adapters)) for name in modules}
    file = SingleFile.like(adapters, [_alpha(asked[name], found) for name, found in modules.items()]) if single else None
    layers = [_layer(name, found, adapters, asked[name], recipe, file) for name, found in modules.items()]
    making = Making(
        layers,
        _document(adapters, modules),
        _files(adapters),
        [adapter.index.path for adapter in adapters],
        listed([adapter.where for adapter in adapters], 4),
        notes=[note for adapter in adapters for note in adapter.notes] + said(adapters, modules),
        warnings=[warning for adapter in adapters for warning in adapter.index.warnings] + (file.warnings if file else []),
        record=Record.of(recipe, adapters, card=not single),
        file=file,
    )
    if not single:
        making.notes += _left_out(adapters[0].index.path)
    making.notes += [_said(each.way, each.weights if parameters.fixed else ()) for each in [*asked.values()][:1]]
    return making


def _left_out(folder: Location) -> list[str]:
    """Returns a note about files beside the first adapter that are not in the output, such as a tokenizer's."""
    known = (CONFIG, CARD_FILE)
    files = [path.name for path in folder.children() if path.is_file()] if folder.is_folder() else []
    left = sorted(name for name in files if name not in known and kind_of_file(name) == "side")
    return [f"left out of the output, copy them if it needs them: {listed(left, 6)} of {printable(folder)}"] if left else []


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
    rank, energy = whole_rank(ranks[0]) if ranks else 0, recipe.extract.energy or 0.0
    weights = given.pop("weight", None)
    if method is MEAN:
        normalize = given.pop("normalize", True)
        weights = weights or [1.0] * count
        if normalize not in (False, "false", "False", "0", 0, "off"):
            total = sum(weights)
            if not total:
                raise RecipeError("the weights sum to 0, so they have no mean; pass `normalize=False`")
            weights = [weight / total for weight in weights]
        method = "svd" if rank or energy else "cat"
    if isinstance(method, str):
        if given:
            raise RecipeError(f"{method} of adapters has the parameters weight and rank, not {listed(list(given))}")
        if method == "cat" and (rank or energy):
            raise RecipeError("cat stacks the factors as they are; choose the method svd for a rank or an energy")
        return Combined(method, weights or [1.0] * count, {}, rank, energy)
    if method is COPY:
        raise RecipeError("copy takes one model; choose a method that merges adapters, like linear")
    if weights is not None:
        given["weight"] = weights
    return Combined(method, weights or [1.0] * count, given, rank, energy)


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
    """Raises MismatchError for an update that is no matrix of its own."""
    why = ""
    if module.magnitude:
        why = "its update depends on the base (DoRA)"
    elif module.start:
        why = f"it changes the base when it is loaded ({module.start})"
    elif module.grown:
        why = "it makes the tensor of the base larger (reshape_weight)"
    elif module.kind not in _FACTORED:
        why = _WHY.get(module.kind, f"its update is no product of two factors (kind {module.kind})")
    elif module.kind == "full" and len(module.parts["diff"].spec.shape) < 2:
        why = "its update is a vector, which has no factors"
    if why:
        raise MismatchError(
            f"{adapter.where}: {printable(module.keys[0])}: {why}, so adapters alone cannot be merged; pass `base`, the "
            "model that they were made for, and the merge is a model"
        )


_FACTORED = ("lora", "embedding", "loha", "lokr", "full")
_PRODUCTS = ("lora", "embedding")
"""Kinds whose updates are products of two factors as they are stored."""
_WHY = {
    "glora": "its update depends on the base (GLoRA)",
    "ia3": "it multiplies the weights of the base (IA3)",
    "bias": "its update is that of a bias, which has no factors",
    "saved": "it is a whole tensor, and no factor",
    "tokens": "it is rows of an embedding, and no factor",
}


def _check_names(adapters: Sequence[Adapter], modules: Mapping[str, object]) -> None:
    """Raises MismatchError for names that PEFT would not find."""
    flat = next(filter(is_flat, modules), None)
    if flat is not None:
        raise MismatchError(
            f"{adapters[0].where}: {printable(flat)}: its name lacks the dots of the base's, so PEFT would not find the "
            "module; give the output a name that ends in .safetensors, or pass `base`, and the merge is a model"
        )


def _sides(module: Module) -> tuple[Source, Source]:
    """Returns the factors [n, r] and [r, m] of an update as PEFT stores it, without the scale."""
    if module.kind == "embedding":
        return permuted(module.parts["embedding A"]), permuted(module.parts["embedding B"])
    return lora_factors(module)


def _shape(found: Sequence[tuple[int, Module]], name: str, adapters: Sequence[Adapter]) -> Shape:
    """Returns the shape of a module's update. Linear weights are [out, in] here, also where the base stores [in, out].

    Raises MismatchError if the adapters have different ones. Some updates of convolutions do not tell the kernel; the
    others do, or the module's name.
    """
    try:
        shapes = [update_shape(module) for _, module in found]
    except (RecipeError, IndexError) as error:
        raise MismatchError(f"{printable(name)}: its factors are no factors of one update") from error
    plain = [shape if set(shape[2:]) != {1} else shape[:2] for shape in shapes]
    told = [place for place, (_, module) in enumerate(found) if module.kind in _PRODUCTS or len(shapes[place]) > 2]
    best = (told or [0])[0]
    for place, (number, module) in enumerate(found):
        alike = plain[place] == plain[best] or (
            place not in told and (shapes[place][0], math.prod(shapes[place])) == (shapes[best][0], math.prod(shapes[best]))
        )
        if not alike or (module.kind == "embedding") != (found[best][1].kind == "embedding"):
            raise MismatchError(
                f"{printable(name)}: the update of {adapters[found[best][0]].where} has the shape {list(shapes[best])}, "
                f"and that of {adapters[number].where} {list(shapes[place])}; they are of different bases"
            )
    return shapes[best] if told else with_kernel(name, shapes[best])


def _layer(
    name: str,
    found: Sequence[tuple[int, Module]],
    adapters: Sequence[Adapter],
    asked: Combined,
    recipe: Recipe,
    file: SingleFile | None,
) -> Layer:
    way, weights, first = asked.way, asked.weights, found[0][1]
    shape, tensor = _shape(found, name, adapters), f"{name}.weight"
    form = EMBEDDING if first.kind == "embedding" else LINEAR
    own = first if found[0][0] == 0 else None
    keys = None if file is None else file.keys(name, own, form == EMBEDDING)
    dtype = recipe.recast or _dtype(found, file)
    foreign = next(((number, module) for number, module in found if module.kind not in _PRODUCTS), None)
    if foreign is not None and not (asked.rank or asked.energy):
        number, module = foreign
        raise MismatchError(
            f"{adapters[number].where}: {printable(module.name)}: its update is no product of two factors (kind "
            f"{module.kind}), so it is decomposed, and its rank is not known; give the parameter rank, like 32, or energy, "
            "like 0.99"
        )
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
        one = merged(tensor, way, sources, dict(asked.parameters), based=based, seed=recipe.seed)
        return Layer(tensor, shape, DECOMPOSE, (one,), _wanted(asked, found, dtype), form, keys=keys)
    if foreign is not None:
        updates = [delta(_as_stored(module), shape) for _, module in found]
        one = summed(updates, [weights[number] for number, _ in found]).named(tensor)
        return Layer(tensor, shape, DECOMPOSE, (one,), _wanted(asked, found, dtype), form, keys=keys)
    left, right = list[Source](), list[Source]()
    total, stacks = sum(module.rank for _, module in found), way == "cat"
    unit = keys.value / total if keys is not None and keys.value and stacks else 1.0  # what loaders multiply by
    for number, module in found:
        one, other = _sides(module)
        left.append(rounded(one, DType.F64))
        right.append(summed([other], [weights[number] * module.scale / unit]))
    stacked = joined(tensor, left, 1), joined(tensor, right, 0)
    wanted = Wanted(total, 0.0, dtype) if stacks else _wanted(asked, found, dtype)
    return Layer(tensor, shape, STACK if stacks else RECOMPRESS, stacked, wanted, form, keys=keys)


def _alpha(asked: Combined, found: Sequence[tuple[int, Module]]) -> float:
    """Returns the rank of a module: the alpha by which its update is the product of its factors."""
    if asked.way == "cat":
        return float(sum(module.rank for _, module in found))
    return _wanted(asked, found, DType.F32).rank or _ALPHA


_ALPHA = 32.0
"""The alpha where ranks follow from the numbers."""


def _wanted(asked: Combined, found: Sequence[tuple[int, Module]], dtype: DType) -> Wanted:
    """Returns how much of an update is kept: by default the highest rank of the module's adapters."""
    products = all(module.kind in _PRODUCTS for _, module in found) and not isinstance(asked.way, MergeMethod)
    most = asked.rank or (0 if asked.energy else max(module.rank for _, module in found))
    total = sum(module.rank for _, module in found)
    return Wanted(min(most or total, total) if products else most, asked.energy, dtype)


def _as_stored(module: Module) -> Module:
    """Returns a module whose update is made as [out, in]."""
    return replace(module, transposed=False)


def _dtype(found: Sequence[tuple[int, Module]], file: SingleFile | None) -> DType:
    """Returns the dtype of the first adapter for a single file. PEFT's form has float64 if a factor has it, else float32,
    since a factor times a number has more digits than 16 bits hold."""
    number, module = found[0]
    if file is not None:
        return file.dtype_of(module) if number == 0 else file.dtype
    dtypes = {part.spec.dtype for _, each in found for part in each.parts.values()}
    return DType.F64 if DType.F64 in dtypes else DType.F32


def _files(adapters: Sequence[Adapter]) -> dict[Location, Status]:
    return {path: status for adapter in adapters for path, status in adapter.index.identities().items()}


def _document(adapters: Sequence[Adapter], modules: Mapping[str, object]) -> Document:
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
    return Document(base, task, list(modules), 0.0, across == {True})


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
