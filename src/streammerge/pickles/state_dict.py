"""Selection of the state dict in a checkpoint's tree.

A mapping whose values are mostly tensors is a state dict, also if some of its values are dictionaries with fewer tensors.
So is a pickled module: its parameters and persistent buffers, under their dotted names. If there are several:

1. Skip those below a key of the optimizer, scheduler, scaler, random state and the like.
2. If a model and its running average have the same names (``model`` and ``ema``, ``student`` and ``teacher``), take the
plain one, unless the user asks for the average.
3. Take all others together (``model`` and ``generator``, ``net.*``), each under its own path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from streammerge.errors import FormatError, RecipeError, listed, printable
from streammerge.options import EMA_CHOICES
from streammerge.pickles.arrays import unread_kind
from streammerge.pickles.tree import Instance, TensorRef, mapping_items, walk
from streammerge.tensors.conventions import AVERAGED

_Place = tuple[tuple[Any, ...], Any, bool, bool, Any]
_KEYS = (str, int)
_MOST_NAME = 4000
# Patterns are text: compiling them takes longer than reading a safetensors file, which needs none.
_NOT_WEIGHTS = (
    r"(?i)(.*_)?(optim(izer)?s?|opt|(lr_)?sched(uler)?s?|(grad_)?scalers?|amp)(_\w+)?"
    r"|(.*_)?(rng|random)(_?states?)?(_\w+)?|extra_state|criterion|(.*_)?loss(es)?|callbacks|loops|(.*_)?metrics?|logging|message_hub"
    r"|sampler|hyper_parameters|hparams|history|args|cfg|config|(.*_)?stats"
)
_STALE = (
    r"(?i)(.*_)?optim(izer)?s?(?!_history)(_\w+)?|(lr_|opt_param_|param_)?sched(uler)?s?(_(states?|state_dict|g|d|disc|gen))?"
    r"|(grad|amp)_scaler(_state(_dict)?)?"
)
_LOSS_SCALER_KEYS = {"scale", "growth_factor", "loss_scale", "loss_scaler0"}


def is_training_state(key: Any, value: Any) -> bool:
    """Whether a key holds optimizer, scheduler or scaler state, which is stale after weights are merged.

    Some words are ambiguous, so their content decides. ``opt`` may be an optimizer's state or the options of a command
    line. ``scaler`` may belong to mixed precision, or to the data, which the model needs. fairseq cannot load a file
    without its ``optimizer_history``.
    """
    if not isinstance(key, str):
        return False
    if key.lower() in ("scaler", "scaler_state", "scaler_state_dict", "amp"):
        return isinstance(value, dict) and (not value or not _LOSS_SCALER_KEYS.isdisjoint(value))
    return re.fullmatch(_STALE, key) is not None or _is_optimizer_state(value)


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


@dataclass(slots=True, eq=False)
class Candidate:
    """A state dict, or a possible one. ``kind`` is "state dict", "module", "list" or "loose tensors"."""

    path: tuple[Any, ...]
    kind: str
    tensors: list[Found]
    others: int = 0
    barred: bool = False
    holder: Any = None
    key: Any = None
    within: bool = False
    """Whether it lies inside another state dict."""

    @property
    def label(self) -> str:
        return ".".join(printable(part) for part in self.path) or "(top level)"

    @property
    def nbytes(self) -> int:
        return sum(_bytes_of(found.ref) for found in self.tensors)

    @property
    def averaged(self) -> bool:
        """Whether its path says that it is a running mean of the weights (EMA)."""
        return any(isinstance(part, str) and re.fullmatch(AVERAGED, part) for part in self.path)


@dataclass(slots=True)
class Selection:
    """The tensors to merge, by name, and the candidates that hold them.

    ``twins``: candidates with the same names that were not chosen. ``left_out``: tensors that others replace.
    """

    tensors: list[Found]
    chosen: list[Candidate]
    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)
    left_out: list[Found] = field(default_factory=list)
    twins: list[Candidate] = field(default_factory=list)

    @property
    def label(self) -> str:
        return " + ".join(c.label for c in self.chosen)


def select(tree: Any, state_dict: str | None = None, ema: str = "ignore") -> Selection:
    """Selects the state dict of a tree, by the rules of this module.

    ``state_dict`` names it instead, by keys joined with dots. ``ema``: "ignore" takes the plain weights of a pair,
    "prefer" takes averaged ones if there are any, "only" requires them. Raises FormatError if the tree holds no
    tensors, RecipeError if the requested weights are absent.
    """
    if ema not in EMA_CHOICES:
        raise RecipeError(f"`ema` takes {', '.join(EMA_CHOICES)}, not {ema!r}")
    found = candidates(tree)
    if state_dict is not None:
        return _named(tree, found, state_dict)
    usable = _worthy([c for c in found if not c.barred and not c.within])
    if not usable:
        if not found:
            kinds = sorted({kind for _, kind in unread_tensors(tree)})
            raise FormatError(
                f"it holds no tensors{f' but {listed(kinds)} ones, which are not supported' if kinds else ''}"
            )
        raise RecipeError(
            f"it holds tensors only at {listed([c.label for c in found])}; name one of them with `state_dict`"
        )
    notes: list[str] = []
    twins: list[Candidate] = []
    chosen = _choose(usable, ema, notes, twins)
    if ema == "only":
        chosen = [c for c in chosen if c.averaged] or chosen
    selection = Selection(_together(chosen), chosen, found, notes, twins=twins)
    if ema != "ignore" and not any(c.averaged for c in chosen) and not _use_litema(selection) and ema == "only":
        raise RecipeError('there are no averaged (EMA) weights in it; leave `ema="only"` out')
    return selection


def candidates(tree: Any) -> list[Candidate]:
    """Returns every state dict in the tree, in its order. Those below optimizer-like keys are marked ``barred``."""
    found: list[Candidate] = []
    seen: set[int] = set()
    stack: list[Iterator[_Place]] = [iter([((), tree, False, False, None)])]
    while stack:
        place = next(stack[-1], None)
        if place is None:
            stack.pop()
            continue
        path, node, barred, within, holder = place
        if id(node) in seen:
            continue
        seen.add(id(node))
        candidate = _as_state_dict(path, node)
        if candidate is not None:
            candidate.barred, candidate.within = barred, within
            candidate.holder, candidate.key = holder, path[-1] if path else None
            found.append(candidate)
        if len(path) < 32 and (candidate is None or candidate.others):
            within = within or candidate is not None
            stack.append(_places(path, node, barred or _is_optimizer_state(node), within))
    return found or _loose(tree)


def _places(path: tuple[Any, ...], node: Any, barred: bool, within: bool) -> Iterator[_Place]:
    """Yields the children of a node that may hold tensors. A list of all of them could be larger than the tree."""
    holder, items = inside(node)
    for key, value in items:
        if isinstance(value, dict | list | tuple | Instance):
            yield (*path, key), value, barred or _bars(key), within, holder


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
    state = node.state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # with __slots__
        return state[1]
    if isinstance(state, dict | list | tuple):
        return state
    return node.elements or (node.args if node.kind == "new" else ())


def _loose(tree: Any) -> list[Candidate]:
    """Collects tensors outside any state dict, each under its path."""
    loose = [(path, node) for path, node in walk(tree) if isinstance(node, TensorRef)]
    tensors = [Found(_name(path), node) for path, node in loose if not any(map(_bars, path))]
    return [Candidate((), "loose tensors", tensors)] if tensors else []


def _bars(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch(_NOT_WEIGHTS, key) is not None


def _is_optimizer_state(node: Any) -> bool:
    return isinstance(node, dict) and "param_groups" in node


def _as_state_dict(path: tuple[Any, ...], node: Any) -> Candidate | None:
    if isinstance(node, TensorRef) and not path:
        return Candidate((), "list", [Found("tensor", node)])
    items = mapping_items(node)
    if items is not None:
        tensors = [
            Found(k if isinstance(k, str) and len(k) <= _MOST_NAME else _name((k,)), v, node, k)
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

    They are at least half of its values, or have names with dots. They are not fewer than the tensors in the other values,
    and have more bytes or names with dots.
    """
    dotted = 2 * sum("." in found.name for found in tensors) >= len(tensors)
    if not dotted and len(tensors) < len(others):
        return False
    left, own_bytes = len(tensors), 0 if dotted else sum(map(_bytes_of, (found.ref for found in tensors)))
    for key, value in others:
        if not isinstance(value, dict | list | tuple | Instance) or _ignorable(key) or is_training_state(key, value):
            continue
        for _, node in walk(value):
            if isinstance(node, TensorRef):
                left, own_bytes = left - 1, own_bytes - _bytes_of(node)
                if left < 0:
                    return False
    return dotted or own_bytes >= 0


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
        if not isinstance(node, Instance) or not isinstance(node.state, dict) or id(node) in seen or depth > 64:
            continue
        seen.add(id(node))
        state = node.state
        if isinstance(state.get("_modules"), dict):
            transient = state.get("_non_persistent_buffers_set")
            skipped = _members(transient)
            for part in ("_parameters", "_buffers"):
                held = state.get(part)
                for name, value in held.items() if isinstance(held, dict) else ():
                    if isinstance(value, TensorRef) and not (part == "_buffers" and name in skipped):
                        found.append(Found(_name((prefix + str(name),)), value, held, name))
            inner = state["_modules"]
        elif node.path.startswith("__torch__."):
            found += [Found(_name((prefix + str(k),)), v, state, k) for k, v in state.items() if isinstance(v, TensorRef)]
            inner = state
        else:
            continue
        below = [(_name((f"{prefix}{k}.",)), v, depth + 1) for k, v in inner.items() if isinstance(v, Instance)]
        stack.extend(reversed(below))
    return found


def _members(node: Any) -> set[str]:
    """Returns the names in a pickled set; none for anything else."""
    inside = node.args[0] if isinstance(node, Instance) and node.args else ()
    return set(map(str, inside)) if isinstance(inside, list | tuple) else set()


def _name(path: tuple[Any, ...]) -> str:
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


def _choose(usable: list[Candidate], ema: str, notes: list[str], passed_over: list[Candidate]) -> list[Candidate]:
    """Chooses one of each set of twins, and all candidates with names of their own."""
    groups: dict[Any, list[Candidate]] = {}
    for candidate in usable:
        groups.setdefault(candidate.path[:1], []).append(candidate)
    chosen: list[list[Candidate]] = []
    taken: set[Any] = set()
    for key, group in groups.items():
        if key in taken:
            continue
        twins = [k for k in groups if k not in taken and (k == key or _are_twins(group, groups[k]))]
        best = sorted(twins, key=lambda k: groups[k][0].averaged == (ema == "ignore"))[0]
        taken.update(twins)
        chosen.append(groups[best])
        for other in twins:
            if other != best:
                kind = "EMA weights" if groups[other][0].averaged else "weights"
                passed_over += groups[other]
                notes.append(
                    f"'{_label(best)}' was taken; '{_label(other)}' holds {kind} of the same names "
                    "(`state_dict`, `ema` choose)"
                )
    return [c for group in chosen for c in group]


def _label(key: tuple[Any, ...]) -> str:
    return printable(".".join(map(str, key)))


def _are_twins(one: list[Candidate], two: list[Candidate]) -> bool:
    """Whether they are a model and its running average. Two plain ones of the same names (speakers, an ensemble) are
    not."""
    return one[0].averaged != two[0].averaged and _same_names(one, two)


def _same_names(one: list[Candidate], two: list[Candidate]) -> bool:
    """Whether the names are nearly the same without wrapper prefixes, so one set is a copy of the other."""
    a, b = ({_bare(f.name) for c in group for f in c.tensors} for group in (one, two))
    return len(a & b) >= 0.9 * min(len(a), len(b)) and len(a & b) >= 0.5 * max(len(a), len(b))


def _bare(name: str) -> str:
    return re.sub(r"(^|(?<=\.))(module|_orig_mod|ema_model|model|n_averaged)\.", "", name)


def _together(chosen: list[Candidate]) -> list[Found]:
    """Returns the tensors of all candidates. With several candidates, the path of each is put before its names."""
    if len(chosen) == 1:
        return chosen[0].tensors
    return [Found(_name((*c.path, f.name)), f.ref, f.holder, f.key) for c in chosen for f in c.tensors]


def _named(tree: Any, found: list[Candidate], wanted: str) -> Selection:
    inside = [c for c in found if c.label == wanted or c.label.startswith(wanted + ".")]
    if not inside:
        raise RecipeError(
            f"`state_dict` {printable(wanted)}: there is no such state dict in it; "
            f"it has {listed([c.label for c in found]) or 'none'}"
        )
    chosen = [c for c in inside if c.label == wanted][:1] or inside
    twins = [c for c in found if c not in chosen and not c.barred and _are_twins(chosen, [c])]
    return Selection(_together(chosen), chosen, found, twins=twins)


def _use_litema(selection: Selection) -> bool:
    """Uses Stable Diffusion's EMA weights: ``model_ema.`` and the name without dots, beside the plain ``model.``
    weights."""
    by_name = {f.name: f for f in selection.tensors}
    averaged = {
        name: by_name[shadow]
        for name in by_name
        if name.startswith("model.") and (shadow := "model_ema." + name.removeprefix("model.").replace(".", "")) in by_name
    }
    if not averaged:
        return False
    kept = [f for f in selection.tensors if not f.name.startswith("model_ema.")]
    selection.left_out = [f for f in selection.tensors if f.name.startswith("model_ema.")]
    selection.tensors = [Found(f.name, averaged.get(f.name, f).ref, f.holder, f.key, f.ref) for f in kept]
    selection.notes.append(f"{len(averaged)} EMA weights (model_ema.*) replace the plain ones")
    return True


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
        holder = candidate.tensors[0].holder
        for key, value in (mapping_items(holder) or ()) if candidate.others else ():
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
