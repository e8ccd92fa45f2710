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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, overload

from streammerge.errors import FormatError, RecipeError, listed, printable
from streammerge.options import EMA_CHOICES
from streammerge.pickles.arrays import unread_kind
from streammerge.pickles.tree import MISSING, FieldName, FlatTree, Instance, TensorRef, mapping_items, walk
from streammerge.tensors.conventions import AVERAGED, SWAPPED

_Place = tuple[tuple[Any, ...], Any, bool, bool, bool, Any]
_KEYS = (str, int)
_MOST_NAME = 4000
# Patterns are text: compiling them takes longer than reading a safetensors file, which needs none.
_NOT_WEIGHTS = (
    r"(?i)(.*_)?(optim(izer)?s?|opt|(lr_)?sched(uler)?s?|(grad_)?scalers?|amp)(_\w+)?"
    r"|(.*_)?(rng|random)(_?states?)?(_\w+)?|extra_state|criterion|(.*_)?loss(es)?|callbacks|loops|(.*_)?metrics?|logging|message_hub"
    r"|sampler|hyper_parameters|hparams|history|args|cfg|config|(.*_)?stats"
)
_RECORDS = (
    r"(?i)(.*_)?(rng|random)(_?states?)?(_\w+)?|callbacks|loops|(.*_)?metrics?|logging|message_hub|sampler|history"
    r"|args|cfg|config"
)
_STALE = (
    r"(?i)(.*_)?optim(izer)?s?(?!_history)(_\w+)?|(lr_|opt_param_|param_)?sched(uler)?s?(_(states?|state_dict|g|d|disc|gen))?"
    r"|(grad|amp)_scaler(_state(_dict)?)?"
)
_DATA_STATISTICS = r"(?i)(.*_)?stats"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_LOSS_SCALER_KEYS = {"scale", "growth_factor", "loss_scale", "loss_scaler0"}
_STATES = ({"growth_factor", "growth_interval"}, {"loss_scaler0"}, {"last_epoch", "_step_count"})
"""The keys by which the state of torch's GradScaler, of apex and of torch's schedulers is known."""


def is_training_state(key: Any, value: Any) -> bool:
    """Whether a key holds optimizer, scheduler or scaler state, which is stale after weights are merged.

    Some words are ambiguous, so their content decides. ``opt`` may be an optimizer's state or the options of a command
    line. ``scaler`` may belong to mixed precision, or to the data, which the model needs. fairseq cannot load a file
    without its ``optimizer_history``. What has the content of such a state is one under any key, and at any place of a
    tuple.
    """
    if _is_optimizer_state(value) or (isinstance(value, dict) and any(known <= value.keys() for known in _STATES)):
        return True
    if not isinstance(key, str):
        return False
    if key.lower() in ("scaler", "scaler_state", "scaler_state_dict", "amp"):
        return isinstance(value, dict) and (not value or not _LOSS_SCALER_KEYS.isdisjoint(value))
    return re.fullmatch(_STALE, key) is not None


@dataclass(slots=True, eq=False)  # not frozen: creating a frozen one takes three times as long
class Found:
    """One tensor of a state dict: its name, and the mapping and key that hold it (None outside mappings).

    ``ref`` is the tensor that is read; ``node`` is the tensor in the tree. They differ if EMA weights replace plain
    ones.
    """

    name: str
    ref: TensorRef
    holder: Any = None
    key: Any = None
    node: TensorRef | None = None


class AllFound(Sequence[Found]):
    """All tensors of a flat tree. They are made when one is asked for, and then kept."""

    def __init__(self, tree: FlatTree) -> None:
        self.tree = tree

    @cached_property
    def _made(self) -> list[Found]:
        return [Found(name, ref, self.tree, name) for name, ref in self.tree.items()]

    def __len__(self) -> int:
        return len(self.tree)

    def __iter__(self) -> Iterator[Found]:
        return iter(self._made)

    @overload
    def __getitem__(self, at: int) -> Found: ...
    @overload
    def __getitem__(self, at: slice) -> list[Found]: ...
    def __getitem__(self, at: int | slice) -> Found | list[Found]:
        return self._made[at]


@dataclass(slots=True, eq=False)
class Candidate:
    """A state dict, or a possible one. ``kind`` is "state dict", "module", "list" or "loose tensors".

    ``barred``: it lies below a key that no weights lie below. ``stale``: it is the state of an optimizer, a scheduler or a
    scaler. ``swapped``: whether it holds a running mean of the weights, where a program puts it in an unusual place.
    ``within``: it lies inside another state dict.
    """

    path: tuple[Any, ...]
    kind: str
    tensors: Sequence[Found]
    others: int = 0
    barred: bool = False
    holder: Any = None
    key: Any = None
    stale: bool = False
    swapped: bool | None = None
    within: bool = False

    @property
    def label(self) -> str:
        return ".".join(printable(part) for part in self.path) or "(top level)"

    @property
    def nbytes(self) -> int:
        if isinstance(self.tensors, AllFound):
            return self.tensors.tree.table.nbytes
        return sum(_bytes_of(found.ref) for found in self.tensors)

    @property
    def averaged(self) -> bool:
        """Whether it is a running mean of the weights (EMA), as its path tells."""
        if self.swapped is not None:
            return self.swapped
        return any(isinstance(part, str) and re.fullmatch(AVERAGED, part) for part in self.path)


@dataclass(slots=True)
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
        if tree and state_dict is None and ema == "ignore" and max(map(len, tree)) <= _MOST_NAME:
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


def candidates(tree: Any) -> list[Candidate]:
    """Returns every state dict in the tree, in its order. Those below optimizer-like keys are marked ``barred``."""
    found: list[Candidate] = []
    seen: set[int] = set()
    stack: list[Iterator[_Place]] = [iter([((), tree, False, False, False, None)])]
    while stack:
        place = next(stack[-1], None)
        if place is None:
            stack.pop()
            continue
        path, node, barred, stale, within, holder = place
        if id(node) in seen:
            continue
        seen.add(id(node))
        candidate = _as_state_dict(path, node)
        if candidate is not None:
            candidate.barred, candidate.stale, candidate.within = barred, stale, within
            candidate.holder, candidate.key = holder, path[-1] if path else None
            found.append(candidate)
        if len(path) < 32 and (candidate is None or candidate.others):
            optimizer = _is_optimizer_state(node)
            within = within or candidate is not None
            stack.append(_places(path, node, barred or optimizer, stale or optimizer, within))
    return found or _loose(tree)


def _places(path: tuple[Any, ...], node: Any, barred: bool, stale: bool, within: bool) -> Iterator[_Place]:
    """Yields the children of a node that may hold tensors. A list of all of them could be larger than the tree."""
    holder, items = inside(node)
    for key, value in items:
        if isinstance(value, dict | list | tuple | Instance):
            yield (*path, key), value, barred or bars(key), stale or is_training_state(key, value), within, holder


def inside(node: Any) -> tuple[Any, Iterable[tuple[Any, Any]]]:
    """Returns the node that holds the (key, value) pairs of a container, and these pairs."""
    items = mapping_items(node)
    if items is not None:
        return node, items
    if isinstance(node, list | tuple):
        return node, enumerate(node)
    if isinstance(node, Instance):
        fields = fields_of(node)
        return fields, fields.items() if isinstance(fields, dict) else enumerate(fields)
    return None, ()


def fields_of(node: Instance) -> dict[Any, Any] | list[Any] | tuple[Any, ...]:
    """Returns the fields of an object that is no mapping: by name, or in their order as a NamedTuple has them."""
    state = state_of(node)
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # with __slots__
        return state[1]
    if isinstance(state, dict | list | tuple):
        return state
    return node.elements or (node.args if node.kind == "new" else ())


def state_of(node: Instance) -> Any:
    """Returns the state of an object. StyleGAN's persistent classes pass theirs to a call, with the source of the class."""
    if node.state in (MISSING, None) and len(node.args) == 1 and isinstance(node.args[0], dict):
        return node.args[0].get("state", node.state) if "class_name" in node.args[0] else node.state
    return node.state


def _loose(tree: Any) -> list[Candidate]:
    """Collects tensors outside any state dict, each under its path."""
    loose = [(path, node) for path, node in walk(tree) if isinstance(node, TensorRef)]
    tensors = [Found(dotted(path), node) for path, node in loose if not any(map(bars, path))]
    return [Candidate((), "loose tensors", tensors)] if tensors else []


def bars(key: Any) -> bool:
    """Whether no weights lie below a key: state of the training, settings, measurements."""
    return isinstance(key, str) and not isinstance(key, FieldName) and re.fullmatch(_NOT_WEIGHTS, key) is not None


def is_record(key: Any) -> bool:
    """Whether a key holds records of one run: measurements, random states, settings. They are not merged."""
    return isinstance(key, str) and not isinstance(key, FieldName) and re.fullmatch(_RECORDS, key) is not None


def is_measurement(key: Any) -> bool:
    """Whether single numbers below a key are measurements of one run, such as losses. Statistics of the data are not."""
    return bars(key) and re.fullmatch(_DATA_STATISTICS, key) is None


def _is_optimizer_state(node: Any) -> bool:
    return isinstance(node, dict) and "param_groups" in node


def _as_state_dict(path: tuple[Any, ...], node: Any) -> Candidate | None:
    if isinstance(node, TensorRef) and not path:
        return Candidate((), "list", [Found("tensor", node)])
    items = mapping_items(node)
    if items is not None:
        tensors = [
            Found(k if isinstance(k, str) and len(k) <= _MOST_NAME else dotted((k,)), v, node, k)
            for k, v in items
            if isinstance(v, TensorRef) and isinstance(k, _KEYS)
        ]
        others = [(k, v) for k, v in items if not isinstance(v, TensorRef)] if len(tensors) < len(items) else []
        enough = tensors and (not others or _prevail(tensors, others))
        return Candidate(path, "state dict", tensors, len(others)) if enough else None
    if isinstance(node, list | tuple) and node and all(isinstance(v, TensorRef) for v in node):
        return Candidate(path, "list", [Found(str(i), v) for i, v in enumerate(node)])
    if isinstance(node, Instance):
        if tensors := _module_tensors(node):
            return Candidate(path, "module", tensors)
        fields = fields_of(node)
        return _as_state_dict(path, fields) if fields else None
    return None


def _prevail(tensors: list[Found], others: list[tuple[Any, Any]]) -> bool:
    """Whether tensors make a state dict of a mapping that holds other things too.

    They are at least half of its values, or have names with dots. No other value has more of them, except a running average
    beside names with dots, which has counters too. If they have no names with dots, the tensors of other values have none
    either, and not more bytes.
    """
    dotted = 2 * sum("." in found.name for found in tensors) >= len(tensors)
    if not dotted and len(tensors) < len(others):
        return False
    own_bytes = 0 if dotted else sum(_bytes_of(found.ref) for found in tensors)
    for key, value in others:
        if not isinstance(value, dict | list | tuple | Instance) or _ignorable(key) or is_training_state(key, value):
            continue
        if dotted and isinstance(key, str) and re.fullmatch(AVERAGED, key):
            continue
        count = nbytes = 0
        for path, node in walk(value):
            if isinstance(node, TensorRef):
                if not dotted and path and isinstance(path[-1], str) and "." in path[-1]:
                    return False
                count, nbytes = count + 1, nbytes + _bytes_of(node)
                if count > len(tensors):
                    return False
        if not dotted and nbytes > own_bytes:
            return False
    return True


def _bytes_of(ref: TensorRef) -> int:
    return prod(ref.shape) * ref.dtype.element_bytes


def _ignorable(key: Any) -> bool:
    return isinstance(key, str) and key.rpartition(".")[2] in ("_extra_state", "_metadata")


def _module_tensors(root: Instance) -> list[Found]:
    """Returns parameters and persistent buffers of a pickled nn.Module, or of a TorchScript object, under dotted names."""
    found: list[Found] = []
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    seen: set[int] = set()
    while stack:
        prefix, node, depth = stack.pop()
        state = state_of(node) if isinstance(node, Instance) else None
        if not isinstance(state, dict) or id(node) in seen or depth > 64:
            continue
        seen.add(id(node))
        if isinstance(state.get("_modules"), dict):
            transient = state.get("_non_persistent_buffers_set")
            skipped = _members(transient)
            for part in ("_parameters", "_buffers"):
                held = state.get(part)
                for name, value in held.items() if isinstance(held, dict) else ():
                    if isinstance(value, TensorRef) and not (part == "_buffers" and name in skipped):
                        found.append(Found(dotted((prefix + str(name),)), value, held, name))
            inner = state["_modules"]
        elif node.path.startswith("__torch__."):
            found += [Found(dotted((prefix + str(k),)), v, state, k) for k, v in state.items() if isinstance(v, TensorRef)]
            inner = state
        else:
            continue
        below = [(dotted((f"{prefix}{k}.",)), v, depth + 1) for k, v in inner.items() if isinstance(v, Instance)]
        stack.extend(reversed(below))
    return found


def _members(node: Any) -> set[str]:
    """Returns the names in a pickled set; none for anything else."""
    inside = node.args[0] if isinstance(node, Instance) and node.args else ()
    return set(map(str, inside)) if isinstance(inside, list | tuple) else set()


def dotted(path: tuple[Any, ...]) -> str:
    """Joins keys with dots. The length is limited, because long keys above many tensors would use unbounded memory."""
    if len(path) == 1 and isinstance(path[0], str) and len(path[0]) <= _MOST_NAME:
        return path[0]
    parts = list(map(str, path))
    if sum(map(len, parts)) > _MOST_NAME:
        raise FormatError(f"a tensor's name of {sum(map(len, parts))} characters is beyond the limit of {_MOST_NAME}")
    return ".".join(parts)


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
            f"`state_dict` {printable(wanted)}: there is no such state dict in it; "
            f"it has {listed([c.label for c in found]) or 'none'}"
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
        for key, under in ((ending, top), (ending.replace(".", ""), top), (name, "")):
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
    selection.notes.append(f"{len(stand_in)} EMA weights ({tops}) replace the plain ones")
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
            selection.notes.append(f"{len(stand_in)} EMA weights ({copy.label}) replace the plain ones")
            return True
    return False


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
    "torch.distributed.tensor._api.DTensor": "distributed",
}


def unread_arrays(chosen: Iterable[Candidate]) -> list[tuple[str, str]]:
    """Returns (name, kind) of numpy's arrays in the chosen state dicts that may hold numbers in a form that is not read."""
    found = []
    for candidate in chosen:
        if not candidate.others:
            continue
        for key, value in mapping_items(candidate.tensors[0].holder) or ():
            if kind := unread_kind(value):
                found.append((printable(key), kind))
    return found


def unread_tensors(tree: Any) -> list[tuple[str, str]]:
    """Returns (path, kind) of tensors in forms that are not read, like quantised and sparse ones."""
    return [
        (".".join(map(printable, path)), _UNREAD[node.path])
        for path, node in walk(tree)
        if isinstance(node, Instance) and node.path in _UNREAD
    ]
