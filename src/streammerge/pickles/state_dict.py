"""Selection of the state dict in a checkpoint's tree.

A mapping whose values are mostly tensors is a state dict, also if some of its values are dictionaries with fewer tensors.
So is a pickled module: its parameters and persistent buffers, under their dotted names. If there are several:

1. Skip those below a key of the optimizer, scheduler, scaler, random state and the like.
2. If a model and its running average have the same names (``model`` and ``ema``, ``student`` and ``teacher``), take the
plain one, unless the user asks for the average. If a program puts the average where its loaders look for the weights, take
that one.
3. Take all others together (``model`` and ``generator``, ``net.*``), each under its own path.

The other state dicts stay known as ``Selection.copies``: a ``.pth`` holds them too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.errors import FormatError, RecipeError, listed, printable
from streammerge.options.selecting import EMA_CHOICES
from streammerge.pickles.candidates import MOST_NAME, AllFound, Candidate, Found, candidates, dotted, inside
from streammerge.pickles.training_state import bars, is_training_state
from streammerge.pickles.tree import FlatTree, Global, Instance, TensorRef, is_quantised, mapping_items, walk
from streammerge.tensors.conventions import AVERAGED, SWAPPED
from streammerge.units import counted, inflected

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(slots=True, eq=False)
class Selection:
    """The tensors to merge, by name, and the candidates that hold them.

    ``left_out``: averaged tensors that stand in for plain ones of the same state dict, each with the name of the plain one.
    """

    tensors: Sequence[Found]
    chosen: list[Candidate]
    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)
    left_out: list[tuple[Found, str]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return " + ".join(c.label for c in self.chosen)

    @property
    def copies(self) -> list[Candidate]:
        """The other state dicts and lists: averages, further models, statistics; no state of an optimizer."""
        chosen = set(map(id, self.chosen))
        return [c for c in self.candidates if id(c) not in chosen and not c.stale]


def select(tree: Any, state_dict: str | None = None, ema: str = "ignore") -> Selection:
    """Selects the state dict of a tree, by the rules of this module.

    ``state_dict`` names it instead, by keys joined with dots. ``ema``: "ignore" takes the plain weights of a pair,
    "prefer" takes averaged ones if there are any, "only" requires them. Raises FormatError if the tree holds no
    tensors, RecipeError if the requested weights are absent.
    """
    if ema not in EMA_CHOICES:
        raise RecipeError(f"`ema` takes {', '.join(EMA_CHOICES)}, not {ema!r}")
    if isinstance(tree, FlatTree):
        if tree and state_dict is None and ema == "ignore" and max(map(len, tree)) <= MOST_NAME:
            whole = Candidate((), "state dict", AllFound(tree))
            return Selection(whole.tensors, [whole], [whole])
        tree = dict(tree)
    found = candidates(tree)
    if state_dict is not None:
        return _named(tree, found, state_dict)
    usable = _worthy([c for c in found if not c.barred and (not c.within or (ema != "ignore" and c.averaged))])
    if not usable:
        if not found:
            kinds = sorted({kind for _, kind in unread_tensors(tree)})
            if kinds == [_DISTRIBUTED]:
                raise FormatError("it holds one rank's part of each tensor; give the folder with the files of all ranks")
            raise FormatError(
                f"it holds no tensors{f' but {listed(kinds)} ones, which are not supported' if kinds else ''}"
            )
        if all(c.stale for c in found):
            raise FormatError("it holds no weights but the state of an optimizer; leave it out of the inputs")
        raise RecipeError(
            f"it holds tensors only at {listed([c.label for c in found])}; name one of them with `state_dict`"
        )
    _mark_swapped(tree, found)
    chosen = _choose(usable, ema)
    if ema == "only":
        chosen = [c for c in chosen if c.averaged] or chosen
    selection = Selection(_together(chosen), chosen, found)
    if ema == "ignore" or any(c.averaged for c in chosen) or _use_averages(selection) or _use_list(selection):
        return selection
    if ema == "only":
        raise RecipeError('there are no averaged (EMA) weights in it; leave `ema="only"` out')
    selection.notes.append("it has no averaged (EMA) weights, so its plain ones are taken")
    return selection


def _worthy(candidates: list[Candidate]) -> list[Candidate]:
    """Drops bare lists and single numbers if there are better candidates."""
    better = [c for c in candidates if c.kind != "list" and any(f.ref.shape for f in c.tensors)]
    return better or candidates


def _mark_swapped(tree: Any, found: list[Candidate]) -> None:
    """Marks the average and the plain weights of programs that exchange their places."""
    for averaged, plain, beside, _ in SWAPPED if isinstance(tree, dict) else ():
        if averaged in tree and plain in tree and beside in tree:
            for candidate in found:
                if candidate.path[:1] in ((averaged,), (plain,)):
                    candidate.swapped = candidate.path[0] == averaged


def _choose(usable: list[Candidate], ema: str) -> list[Candidate]:
    """Chooses one of each set of twins, and all candidates with names of their own."""
    groups: dict[Any, list[Candidate]] = {}
    for candidate in usable:
        groups.setdefault(candidate.path[:1], []).append(candidate)
    plain_of = _plain_groups(groups)
    twins: dict[Any, list[Any]] = {}
    for key in groups:
        twins.setdefault(plain_of.get(key, key), []).append(key)
    best = (min(keys, key=lambda k: _rank(groups[k][0], ema)) for keys in twins.values())
    return [candidate for key in best for candidate in groups[key]]


def _plain_groups(groups: dict[Any, list[Candidate]]) -> dict[Any, Any]:
    """Returns the key of a running average -> the key of the model that it is the average of.

    Of several models with the same names, it is the one whose key is in the average's key: ``G_A`` and ``G_A_ema``.
    """
    found = {}
    for key, group in groups.items():
        if not group[0].averaged:
            continue
        plain = [k for k, other in groups.items() if not other[0].averaged and _same_names(group, other)]
        if plain:
            found[key] = max(plain, key=lambda k: len(_text(k)) if _text(k) in _text(key) else 0)
    return found


def _text(key: tuple[Any, ...]) -> str:
    return "".join(map(str, key))


def _rank(candidate: Candidate, ema: str) -> bool:
    """Sorts the weights that are taken before their twins."""
    if candidate.swapped is not None:
        return not candidate.swapped
    return candidate.averaged == (ema == "ignore")


def _same_names(one: list[Candidate], two: list[Candidate]) -> bool:
    """Whether the names are nearly the same without wrapper prefixes, so one set is a copy of the other.

    An average may have the plain weights beside its own, so that one set has twice as many names and some counters.
    """
    a, b = ({unwrapped(f.name) for c in group for f in c.tensors} for group in (one, two))
    return len(a & b) >= 0.9 * min(len(a), len(b)) and len(a & b) >= 0.4 * max(len(a), len(b))


def unwrapped(name: str) -> str:
    """Returns the name without the parts that averages and wrappers of models put in."""
    return re.sub(r"(^|(?<=\.))(module|_orig_mod|ema_model|model|n_averaged)\.", "", name)


def _together(chosen: list[Candidate]) -> Sequence[Found]:
    """Returns the tensors of all candidates. With several candidates, the path of each is put before its names."""
    if len(chosen) == 1:
        return chosen[0].tensors
    return [Found(dotted((*c.path, f.name)), f.ref, f.holder, f.key) for c in chosen for f in c.tensors]


def _named(tree: Any, found: list[Candidate], wanted: str) -> Selection:
    within = [c for c in found if c.label == wanted or c.label.startswith(wanted + ".")]
    if not within:
        raise RecipeError(
            f"there is no state dict {printable(wanted)} in it; it has {listed([c.label for c in found]) or 'none'}"
        )
    chosen = [c for c in within if c.label == wanted][:1] or within
    _mark_swapped(tree, found)
    return Selection(_together(chosen), chosen, found)


def _use_averages(selection: Selection) -> bool:
    """Puts averaged weights in the place of plain ones, where both have names in one flat state dict.

    Stable Diffusion writes ``model_ema.`` and the name without dots beside ``model.``. Other programs write
    ``online_model.`` and ``ema_model.``, or ``student.`` and ``teacher.``. Returns whether there are averaged weights.
    """
    averages = [f for f in selection.tensors if _is_averaged(f.name)]
    plain = {f.name: f for f in selection.tensors if not _is_averaged(f.name)}
    if averages and not any(f.ref.shape for f in plain.values()):
        return True  # all of it is the average
    homes: dict[str, dict[str, str]] = {}  # what stands behind the first part -> first part -> plain name
    for name in plain:
        top, _, ending = name.partition(".")
        for key, under in ((ending, top), (ending.replace(".", ""), top), (unwrapped(ending), top), (name, "")):
            homes.setdefault(key, {}).setdefault(under, name)
    found, votes = list[tuple[Found, dict[str, str]]](), Counter[str]()
    for averaged in averages:
        ending = averaged.name.partition(".")[2]
        known = homes.get(ending) or homes.get(unwrapped(ending)) or {}
        known = {top: name for top, name in known.items() if plain[name].ref.shape == averaged.ref.shape}
        votes.update(list(known))
        found.append((averaged, known))
    best = max(votes, key=lambda top: votes[top], default=None)
    stand_in = {known[best]: averaged for averaged, known in found if best in known}
    if not stand_in:
        return False
    selection.left_out = [(averaged, name) for name, averaged in stand_in.items()]
    left_out = {averaged.name.partition(".")[0] for averaged in averages}
    kept = [f for f in plain.values() if f.name.partition(".")[0] not in left_out]
    selection.tensors = [Found(f.name, stand_in.get(f.name, f).ref, f.holder, f.key, f.ref) for f in kept]
    tops = listed([f"{top}.*" for top in sorted(left_out)])
    selection.notes.append(_replaced(len(stand_in), tops))
    return True


def _use_list(selection: Selection) -> bool:
    """Puts the averages in a list without names, as ``shadow_params``, in the place of the plain weights.

    Returns whether there is such a list.
    """
    if len(selection.chosen) != 1:
        return False
    lists = [c for c in selection.candidates if c.kind == "list" and c.averaged and not c.barred]
    weights = weights_of(selection.chosen[0])
    for copy in sorted(lists, key=lambda each: not _is_averaged(f"{each.path[-1]}.")):
        plain = matched_by_order(copy.tensors, weights, trained_of(weights))
        if plain:
            stand_in = {plain[f.name].name: f for f in copy.tensors}
            selection.tensors = [
                Found(f.name, stand_in[f.name].ref, f.holder, f.key, f.ref) if f.name in stand_in else f
                for f in selection.tensors
            ]
            selection.notes.append(_replaced(len(stand_in), copy.label))
            return True
    return False


def _replaced(count: int, where: str) -> str:
    return f"{counted(count, 'EMA weight')} ({where}) {inflected(count, 'replaces', 'replace')} plain ones"


def weights_of(candidate: Candidate) -> list[Found]:
    return [each for each in candidate.tensors if each.ref.dtype.kind == "float"]


def trained_of(weights: list[Found]) -> list[Found]:
    """Returns the weights without the buffers of batch norms."""
    return [each for each in weights if each.name.rpartition(".")[2] not in _STATISTICS]


def matched_by_order(copy: Sequence[Found], weights: list[Found], trained: list[Found]) -> dict[str, Found]:
    """Returns name in a list without names -> the weight that it is a copy of; nothing if the list is no copy.

    The tensors of the list come in the order of the state dict, which also has buffers.
    """
    if len(copy) * 4 < len(trained):
        return {}
    shapes = [each.ref.shape for each in copy]
    for known in (weights, trained):
        if [each.ref.shape for each in known] == shapes:
            return {own.name: each for own, each in zip(copy, known, strict=True)}
    found: dict[str, Found] = {}
    rest = iter(trained)
    for own in copy:
        home = next((each for each in rest if each.ref.shape == own.ref.shape), None)
        if home is None:
            return {}
        found[own.name] = home
    return found


def _is_averaged(name: str) -> bool:
    """Whether the first part of a name speaks of a running mean of the weights."""
    top, dot, _ = name.partition(".")
    return bool(dot) and re.fullmatch(AVERAGED, top) is not None


_UNREAD = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
}
_OF_WEIGHTS = ("meta", "distributed")
_FROM_TYPE, _DISTRIBUTED = "torch._tensor._rebuild_from_type_v2", "distributed"


def unread_arrays(chosen: Iterable[Candidate]) -> list[tuple[str, str]]:
    """Returns (name, kind) of numpy's arrays in the chosen state dicts that may hold numbers in a form that is not read."""
    found = []
    for candidate in chosen:
        if not candidate.others:
            continue
        from streammerge.pickles.arrays import unread_kind

        for key, value in mapping_items(candidate.tensors[0].holder) or ():
            if kind := unread_kind(value):
                found.append((printable(key), kind))
    return found


def unread_tensors(tree: Any, chosen: Sequence[Candidate] | None = None) -> list[tuple[str, str]]:
    """Returns (path, kind) of tensors in forms that are not read, like sparse ones, outside the state of a training.

    ``chosen``: only those among these candidates. Elsewhere one rank's part of a tensor may be a weight, a sparse one is
    none.
    """
    found = []
    skip: set[tuple[int, Any]] = set()
    for path, node in walk(tree, skip):
        kind = unread_kind(node)
        if kind:
            among = chosen is None or kind in _OF_WEIGHTS or any(c.path == path[: len(c.path)] for c in chosen)
            found += [(".".join(map(printable, path)), kind)] if among else []
        elif isinstance(node, dict | list | tuple | Instance):
            holder, items = inside(node)
            for key, value in items:
                if isinstance(value, dict | list | tuple | Instance) and (bars(key) or is_training_state(key, value)):
                    skip.add((id(holder), key))
    return found


def unread_kind(node: Any) -> str:
    """Returns what a tensor in a form that is not read is called; "" for all else. A layer of torch's quantised modules
    packs its weight and bias into one tuple."""
    if isinstance(node, tuple):
        return "packed" if any(isinstance(each, TensorRef) and is_quantised(each) for each in node) else ""
    if not isinstance(node, Instance):
        return ""
    return _UNREAD.get(node.path, "") or (_DISTRIBUTED if is_distributed(node) else "")


def is_distributed(node: Any) -> bool:
    """Whether a node of a tree is a DTensor, of which a rank has a part."""
    if not isinstance(node, Instance) or node.path != _FROM_TYPE or len(node.args) < 4:
        return False
    return isinstance(node.args[1], Global) and node.args[1].name == "DTensor"
