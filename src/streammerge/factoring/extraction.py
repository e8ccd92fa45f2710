"""An adapter from the difference of two models: which of their tensors get factors, and which are stored whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from streammerge.checkpoints.config import is_model_config, tree_of
from streammerge.checkpoints.heads import HEADS, is_embedding
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, RecipeError, listed, printable
from streammerge.factoring.documents import Document, task_of
from streammerge.factoring.layers import COMPARE, DECOMPOSE, EMBEDDING, LINEAR, TRANSPOSED, Layer
from streammerge.factoring.making import Making
from streammerge.factoring.recording import Record
from streammerge.factoring.truncated import Wanted
from streammerge.recipe.patterns import Pattern
from streammerge.sources.base import Source
from streammerge.sources.elementwise import summed
from streammerge.tensors.matching import describe, match
from streammerge.tensors.quantised import companions
from streammerge.units import counted

_TABLES = re.compile(r"emb|^(wte|wpe|shared|relative_attention_bias)$", re.IGNORECASE)
"""Last parts of the names of modules that look rows up."""
_HEADS = tuple(head.removesuffix(".weight") for head in HEADS)
_MOST_AXES = 5


class Asked(NamedTuple):
    """What an extraction was asked for. ``target`` and ``exclude``: patterns of modules. ``alpha``: 0 is the rank.
    ``base_name``: what the configuration calls the base. ``record``: how it can be made again."""

    wanted: Wanted
    target: Sequence[Pattern] = ()
    exclude: Sequence[Pattern] = ()
    save_modules: bool = False
    alpha: float = 0.0
    base_name: str = ""
    record: Record | None = None


class _Chosen:
    """Modules that patterns name: by their whole name, or by its last parts, as PEFT does."""

    def __init__(self, asked: Asked) -> None:
        self._target, self._exclude = asked.target, asked.exclude

    @property
    def targeted(self) -> bool:
        """Whether only some modules are asked for."""
        return bool(self._target)

    def of(self, module: str) -> bool:
        return (not self._target or _any(self._target, module)) and not _any(self._exclude, module)


def _any(patterns: Sequence[Pattern], module: str) -> bool:
    parts = module.split(".")
    names = [".".join(parts[start:]) for start in range(len(parts))]
    return any(pattern.matches(name) for pattern in patterns for name in (names if pattern.text[:1] != "/" else names[:1]))


def extraction(tuned: CheckpointIndex, base: CheckpointIndex, asked: Asked) -> Making:
    """Returns what an adapter from ``base`` to ``tuned`` is made of. Reads no tensor.

    Raises MismatchError for models that have no tensor in common, or are quantised, and RecipeError for patterns that match
    nothing.
    """
    for index in (tuned, base):
        _refuse(index)
    pairs = _Pairs(tuned, base)
    chosen = _Chosen(asked)
    forms = _Forms(base.entries, chosen.targeted)
    layers, compared = list[Layer](), list[Layer]()
    for name, source in base.entries.items():
        if name in base.aliases or not pairs.fits(name):
            continue
        module, _, last = name.rpartition(".")
        if not chosen.of(module):
            continue
        other, shape = pairs.tuned(name), source.spec.shape
        form = forms.of(name) if module and last == "weight" else ""
        if not source.spec.numel:
            continue
        if form:
            sources = (summed([other, source], [1.0, -1.0]), other)
            layers.append(Layer(name, shape, DECOMPOSE, sources, asked.wanted, form, asked.alpha))
        else:
            compared.append(Layer(name, shape, COMPARE, (other, source), asked.wanted))
    if not layers and not compared:
        raise RecipeError("`target` and `exclude` leave no module of the base; they take names of modules, like q_proj")
    across = [each for each in layers if each.form == TRANSPOSED]
    making = Making(
        [*layers, *compared],
        Document(
            asked.base_name or str(base.path),
            task_of(tree_of(base.path)),
            {name.rpartition(".")[0] for name in base.entries},
            asked.alpha,
            bool(across),
            _tied(base),
        ),
        tuned.identities() | base.identities(),
        [tuned.path, base.path],
        f"{printable(tuned.path)} and {printable(base.path)}",
        absent=dict(pairs.unfit(chosen)),
        notes=[*tuned.notes, *base.notes, *pairs.notes],
        warnings=[*tuned.warnings, *base.warnings],
        record=asked.record,
    )
    if asked.save_modules:
        making.wholes = _wholes(base.entries, {each.module for each in layers}, compared, pairs)
    if making.absent:
        shown = [f"{name} ({why})" for name, why in making.absent.items()]
        making.warnings.append(
            f"{counted(len(shown), 'tensor')} cannot be compared, and the adapter lacks them: {listed(shown, 3)}"
        )
    return making


def _refuse(index: CheckpointIndex) -> None:
    told = companions(index.specs())
    if told:
        name, (label, _) = next(iter(told.items()))
        raise MismatchError(
            f"{printable(index.path)} is quantised ({label}: {printable(name)}), and its numbers have no difference; give "
            "the weights that it was made from"
        )
    if index.parts:
        raise MismatchError(
            f"{printable(index.path)} holds several models ({listed(list(index.parts), 4)}); name one of them"
        )


def _tied(base: CheckpointIndex) -> list[str]:
    """Returns the embeddings that stand in for the head of a language model, if its folder has no head of its own."""
    names = [name for name in base.entries if name not in base.aliases]
    if not is_model_config(tree_of(base.path)) or any(name.endswith(HEADS) for name in names):
        return []
    return [name.rpartition(".")[0] for name in names if is_embedding(name)]


class _Pairs:
    """The tensors of both models that correspond, by the names of the base."""

    def __init__(self, tuned: CheckpointIndex, base: CheckpointIndex) -> None:
        self._tuned, self._base = tuned, base
        shapes = [{name: spec.shape for name, spec in index.specs().items()} for index in (base, tuned)]
        self._names: Mapping[str, str] = match(*shapes).names
        self.notes = describe({ours: theirs for ours, theirs in self._names.items() if ours != theirs})
        if not any(map(self.fits, base.entries)):
            raise MismatchError(
                f"{printable(tuned.path)} and {printable(base.path)} have no tensor of equal name and shape; give the base "
                "that the model was trained from"
            )

    def tuned(self, name: str) -> Source:
        return self._tuned.entries[self._names[name]]

    def fits(self, name: str) -> bool:
        return not self._why(name)

    def _why(self, name: str) -> str:
        """Says why a tensor of the base cannot be compared with one of the other model; "" if it can."""
        if name not in self._names:
            return "only the base has it"
        ours, theirs = self._base.entries[name].spec, self.tuned(name).spec
        if ours.dtype.kind != "float" or theirs.dtype.kind != "float":
            return f"its numbers are {ours.dtype.torch_name} and {theirs.dtype.torch_name}"
        if ours.shape != theirs.shape:
            return f"its shapes are {list(ours.shape)} and {list(theirs.shape)}"
        return ""

    def unfit(self, chosen: _Chosen) -> Iterator[tuple[str, str]]:
        """Yields the tensors that cannot be compared, and why. Equal integers of a kind that no training changes are left
        out."""
        for name, source in self._base.entries.items():
            why = self._why(name)
            if why and source.spec.dtype.kind == "float" and chosen.of(name.rpartition(".")[0]):
                yield name, why
        taken = set(self._names.values())
        for name in self._tuned.entries:
            if name not in taken and name not in self._tuned.aliases and chosen.of(name.rpartition(".")[0]):
                yield name, "the base lacks it"


class _Forms:
    """How the weights of modules are stored: a bias beside a weight tells which of its axes is the output. Square weights
    are as others whose names end alike."""

    def __init__(self, entries: Mapping[str, Source], targeted: bool) -> None:
        self._entries, self._targeted = entries, targeted
        self._told: dict[str, set[bool | None]] = {}
        for name in entries:
            module, _, last = name.rpartition(".")
            if last == "weight":
                self._told.setdefault(module.rpartition(".")[2], set()).add(self._is_across(name))

    def of(self, name: str) -> str:
        """Returns the form of a tensor; "" if it has no factors.

        Tables of rows and heads have factors only if they are targeted, because their updates are seldom of a low rank.
        """
        shape, last = self._entries[name].spec.shape, name.split(".")[-2]
        if not 2 <= len(shape) <= _MOST_AXES:
            return ""
        if len(shape) == 2 and _TABLES.search(last):
            return EMBEDDING if self._targeted else ""
        if last in _HEADS:
            return LINEAR if self._targeted else ""
        across = self._is_across(name)
        if across is None:
            across = self._told[last] <= {True, None} and True in self._told[last]
        if not across:
            return LINEAR
        return TRANSPOSED if len(shape) == 2 else ""  # a transposed convolution

    def _is_across(self, name: str) -> bool | None:
        """Whether the second axis of a weight is its output; None if its bias does not tell."""
        shape = self._entries[name].spec.shape
        bias = self._entries.get(f"{name.removesuffix('.weight')}.bias")
        if bias is None or len(shape) < 2 or shape[0] == shape[1]:
            return None
        return bias.spec.shape == shape[1:2]


def _wholes(
    entries: Mapping[str, Source], factored: set[str], compared: Sequence[Layer], pairs: _Pairs
) -> dict[str, dict[str, Source]]:
    """Returns module -> its tensors in the tuned model, for the modules that PEFT can store whole.

    Such a module holds no other module, and the tuned model has all its tensors. Of modules with factors it has the biases.
    """
    inside: dict[str, list[str]] = {}
    holders = set[str]()
    for name in entries:
        module = name.rpartition(".")[0]
        inside.setdefault(module, []).append(name)
        while "." in module:
            module = module.rpartition(".")[0]
            holders.add(module)
    found = {}
    for module in dict.fromkeys(each.module for each in compared):
        if module and module not in holders and all(map(pairs.fits, inside[module])):
            found[module] = {name: pairs.tuned(name) for name in inside[module]}
    return found
