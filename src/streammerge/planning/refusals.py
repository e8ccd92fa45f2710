"""Tensors that no method may merge. Each is refused by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from streammerge.checkpoints.config import CONFIG, tree_of
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, listed, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY
from streammerge.pickles.state_dict import unread_arrays, unread_tensors
from streammerge.planning.views import Indexes
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.table import same_tensors
from streammerge.tensors.adapters import factors, holds_its_base
from streammerge.tensors.quantised import ADVICE, belongs, companions
from streammerge.tensors.spec import TensorSpec
from streammerge.units import counted

_LEAST_PLACEHOLDERS = 2


class Made(Protocol):
    """The fields of :class:`~streammerge.planning.alignment.Merged` that are looked at here."""

    @property
    def spec(self) -> TensorSpec: ...
    @property
    def method(self) -> MergeMethod: ...
    @property
    def sources(self) -> tuple[Source, ...]: ...
    @property
    def inner(self) -> MergeMethod | None: ...


def refuse_unreadable(index: CheckpointIndex) -> None:
    """Raises MismatchError for a checkpoint whose tensors are not all there: of classes that are not read, or without
    their elements."""
    unread = unread_tensors(index.extras, index.selection.chosen) if index.extras is not None else []
    if unread:
        kind = unread[0][1]
        advice = (
            "they have no numbers, so save it from a model whose weights are loaded"
            if kind == "meta"
            else "save it again with ordinary ones, which `dequantize()` and `to_dense()` of torch make"
        )
        raise MismatchError(
            f"{printable(index.path)} holds {kind} tensors ({listed([name for name, _ in unread])}), "
            f"which are not merged or converted; {advice}"
        )
    arrays = unread_arrays(index.selection.chosen)
    if arrays:
        raise MismatchError(
            f"{printable(index.path)} holds {listed([name for name, _ in arrays])} as an array of {arrays[0][1]}, which is "
            "not merged or converted; save it again as an array of float32"
        )
    empty = [name for name, spec in index.specs().items() if spec.shape == (0,)]
    placeholders = [name for name in empty if name.rpartition(".")[2] == "weight"]
    if len(placeholders) >= _LEAST_PLACEHOLDERS:
        raise MismatchError(
            f"{printable(index.path)} was saved under DeepSpeed's ZeRO-3: {len(empty)} of its {len(index.entries)} tensors "
            f"are placeholders without elements ({listed(empty, 3)}); the weights are in the global_step folder of that "
            "checkpoint, so run `python zero_to_fp32.py . OUTPUT` in the folder that holds it, and give the result"
        )


def refuse_inseparable(indexes: Iterable[CheckpointIndex], merged: Sequence[Made], conversion: bool = False) -> None:
    """Raises MismatchError for factors of adapters that are merged, and for quantised weights that are not copied whole.

    ``conversion``: whether one input is converted. Then quantised weights that a library can dequantise are refused in any
    case, because those of other schemes are dequantised here.
    """
    plain: list[Mapping[str, Source]] = []
    for index in indexes:
        if not any(same_tensors(index.entries, each) for each in plain) and not (
            _refuse_factors(index, merged) or _refuse_quantised(index, merged, conversion)
        ):
            plain.append(index.entries)


def refuse_unmerged(recipe: Recipe, indexes: Indexes, merged: Iterable[Made]) -> None:
    """Raises MismatchError for a model that gives nothing to the output, because policies take every tensor from the
    others."""
    used = {path for m in merged for source in m.sources for path in source.paths}
    for reference in dict.fromkeys(map(recipe.of, recipe.entries)):
        index = next(index for known, index in indexes.items() if known.same(reference))
        own = {path for entry in index.entries.values() for path in entry.paths}
        if own and own.isdisjoint(used):
            raise MismatchError(
                f"nothing of {printable(index.path)} would go into the output: no tensor has the name and shape of one in "
                "the first checkpoint, so this is no merge"
            )


def quantised(index: CheckpointIndex) -> str:
    """Says how a checkpoint is quantised, and what to do; "" if it is not."""
    return next((_how(index, name, label) for name, (label, _) in _packed(index).items()), "")


def _packed(index: CheckpointIndex) -> dict[str, tuple[str, str]]:
    """Returns the signs of a quantisation: the tensors' names, or integers in a folder whose configuration states it."""
    specs = index.specs()
    told = companions(specs)
    integers = [name for name, spec in specs.items() if spec.shape and spec.dtype.kind == "int"]
    integers = [name for name in integers if not name.endswith(("position_ids", "token_type_ids"))]
    if told or not integers:
        return told
    from streammerge.checkpoints.config_keys import QUANTISATION

    tree = tree_of(index.path)
    scheme = next((tree[key] for key in QUANTISATION if isinstance(tree.get(key), dict)), None)
    if scheme is None:
        return {}
    label = f"{printable(scheme.get('quant_method', 'by its configuration'))}, which {CONFIG} states"
    return {name: (label, name.rpartition(".")[0]) for name in integers}


def _how(index: CheckpointIndex, name: str, label: str, conversion: bool = False) -> str:
    do = ADVICE.get(label, "give the weights that it was made from, or dequantise it first")
    other = "" if conversion else ", or copy its tensors by a rule, with all that belongs to them"
    return f"{printable(index.path)} is quantised: {label}, as {printable(name)} tells; {do}{other}"


def _refuse_quantised(index: CheckpointIndex, merged: Iterable[Made], conversion: bool) -> bool:
    """Quantised weights may be copied, byte for byte and with all that belongs to them, but neither merged nor recast.

    Returns whether there are such weights, or integers, which a configuration may tell to be weights.
    """
    told = _packed(index)
    if not told:
        return any(spec.dtype.kind == "int" for spec in index.specs().values())
    copied, others = _used(index, merged, lambda m: m.sources[0].spec.dtype == m.spec.dtype)
    for name, (label, stem) in told.items():
        if conversion and label in ADVICE:
            raise MismatchError(_how(index, name, label, conversion))
        parted = name not in copied and any(belongs(each, stem) for each in copied)
        if name in others or parted or any(belongs(each, stem) for each in others):
            raise MismatchError(_how(index, name, label))
    return True


def _refuse_factors(index: CheckpointIndex, merged: Iterable[Made]) -> bool:
    """Factors of an adapter may be copied and recast, but not merged. Returns whether there are any."""
    told = factors(index.entries)
    if not told:
        return False
    _, others = _used(index, merged, lambda m: True)
    for name in told:
        if name in others:
            raise MismatchError(_adapter(index, told))
    return True


def _adapter(index: CheckpointIndex, told: dict[str, str]) -> str:
    kind, name = next((kind, name) for name, kind in told.items())
    where = printable(index.path)
    return (
        f"{where} holds {counted(len(told), 'factor')} of an adapter ({kind}: {printable(name)}), and the mean of factors "
        f"is not the mean of the updates, which are their products; {_into_base(index)}; a rule can copy an adapter's "
        "tensors from one model"
    )


def _into_base(index: CheckpointIndex) -> str:
    """Returns how an adapter is added to its base model."""
    if holds_its_base(index.entries):
        return "this is a model that holds its adapter; load it in PEFT, then `model.merge_and_unload()`"
    return (
        f"name each with its base model, as in `BASE+{printable(index.path)}`, so that its updates are added to the base; "
        "adapters alone are merged to an adapter"
    )


def _used(index: CheckpointIndex, merged: Iterable[Made], verbatim: Callable[[Made], bool]) -> tuple[set[str], set[str]]:
    """Returns the names of a checkpoint's tensors that are copied, and of those that are used in another way."""
    own = {path for entry in index.entries.values() for path in entry.paths}  # a state dict in memory has no files
    copied, others = set[str](), set[str]()
    for m in merged:
        for source in m.sources:
            if not own.isdisjoint(source.paths):
                whole = m.method is COPY and m.inner is None and verbatim(m)
                (copied if whole else others).add(source.spec.name)
    return copied, others
