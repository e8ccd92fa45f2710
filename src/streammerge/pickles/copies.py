"""What a tree holds beside the chosen state dict: copies of the weights, and single tensors.

A running average has the weights under other names (``ema_model.``, ``module.``), or as a list without names
(``shadow_params``). :class:`Originals` tells which tensor of a copy is which of the chosen weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from streammerge.pickles.candidates import Candidate, Found, inside
from streammerge.pickles.state_dict import matched_by_order, trained_of, unread_kind, unwrapped, weights_of
from streammerge.pickles.training_state import is_training_state
from streammerge.pickles.tree import MISSING, Instance, OrderedTree, TensorRef, children, mapping_items, number, walk
from streammerge.tensors.conventions import AVERAGED

_DEEPEST = 60
_MOST_MEMBERS = 64
"""A longer list is data, not facts about the training."""


class Originals:
    """The chosen candidates of a tree, of which others may be copies."""

    def __init__(self, chosen: Sequence[Candidate]) -> None:
        self.chosen = [_Original(candidate) for candidate in chosen]

    def of(self, copy: Candidate) -> dict[str, Found]:
        """Returns name in the copy -> the tensor of one chosen candidate that it is a copy of.

        If several chosen candidates are possible, the one with most names wins, then the one with the same last key.
        Returns nothing for tensors that are no copy: half of the tensors must have a counterpart of the same shape.
        """
        found: dict[str, Found] = {}
        for original in sorted(self.chosen, key=lambda each: _strangeness(copy, each.candidate)):
            made = original.by_order(copy) if copy.kind == "list" else original.by_names(copy)
            if len(made) > len(found):
                found = made
        weights = [each for each in copy.tensors if each.ref.shape]
        alike = [each for each in weights if each.name in found and found[each.name].ref.shape == each.ref.shape]
        return found if 2 * len(alike) >= len(weights) else {}


def _strangeness(copy: Candidate, chosen: Candidate) -> int:
    """Returns a sort key: 0 for equal last keys, as in ``model.gen`` and ``ema.gen``, 1 for ``gen`` and ``gen_ema``."""
    if copy.path[-1:] == chosen.path[-1:]:
        return 0
    own, other = (".".join(map(str, each.path)) for each in (copy, chosen))
    return 1 if own in other or other in own else 2


class _Original:
    """One chosen candidate. Its names are looked through once, because a tree may hold many other mappings."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.homes: dict[str | None, dict[str, list[Found]]] = {}

    @cached_property
    def top(self) -> str:
        return _top(self.candidate)

    @cached_property
    def weights(self) -> list[Found]:
        return weights_of(self.candidate)

    @cached_property
    def trained(self) -> list[Found]:
        return trained_of(self.weights)

    def by_names(self, copy: Candidate) -> dict[str, Found]:
        """Matches equal names, names without wrappers, and names without a first part that one of the two has.

        Two different first parts are two parts of a model, unless one of them speaks of an average.
        """
        top = _top(copy)
        ways = [("", ""), (top, ""), ("", self.top)]
        if re.fullmatch(AVERAGED, top):
            ways.append((top, self.top))
        best = self._matched(copy, None, None)
        for theirs, ours in ways:
            if len(best) >= min(len(copy.tensors), len(self.candidate.tensors)):
                break
            found = self._matched(copy, theirs, ours)
            best = found if len(found) > len(best) else best
        return best

    def _matched(self, copy: Candidate, theirs: str | None, ours: str | None) -> dict[str, Found]:
        """Matches names from which these first parts are taken off; None leaves the names as they are."""
        if ours not in self.homes:
            homes: dict[str, list[Found]] = {}
            for each in self.candidate.tensors:
                homes.setdefault(_without(ours, each.name), []).append(each)
            self.homes[ours] = homes
        found, taken = dict[str, Found](), set[int]()
        for each in copy.tensors:
            known = self.homes[ours].get(_without(theirs, each.name), ())
            if len(known) == 1 and id(known[0]) not in taken:
                found[each.name] = known[0]
                taken.add(id(known[0]))
        return found

    def by_order(self, copy: Candidate) -> dict[str, Found]:
        return matched_by_order(copy.tensors, self.weights, self.trained)


def _without(top: str | None, name: str) -> str:
    """Returns a name without its first part, if that is ``top``, and without wrappers. None leaves it as it is."""
    if top is None:
        return name
    return unwrapped(name.removeprefix(f"{top}.") if top else name)


def _top(candidate: Candidate) -> str:
    """Returns the first part that nearly all names of a candidate have; empty if there is none. Counters do not count."""
    tops = Counter(each.name.partition(".")[0] for each in candidate.tensors if each.ref.shape)
    top, count = tops.most_common(1)[0] if tops else ("", 0)
    return top if count * 10 >= sum(tops.values()) * 9 else ""


def trail(tree: Any, path: tuple[Any, ...]) -> list[tuple[Any, Any, Any]]:
    """Returns (holder, key, value) of each step on the path of a candidate, without steps that the tree does not have."""
    steps: list[tuple[Any, Any, Any]] = []
    node = tree
    for key in path:
        holder, items = inside(node)
        if isinstance(holder, dict) or (isinstance(holder, list | tuple) and isinstance(key, int) and key < len(holder)):
            node = holder.get(key, MISSING) if isinstance(holder, dict) else holder[key]
        else:
            node = next((value for own, value in items if own == key), MISSING)
        if node is MISSING:
            break
        steps.append((holder, key, node))
    return steps


def outside(tree: Any, taken: set[int]) -> Iterator[tuple[tuple[Any, ...], TensorRef]]:
    """Yields (path, tensor) of the tensors that stand in no state dict, and of those in state dicts that were not taken.

    ``taken``: the identities of nodes that are not entered. State of an optimizer, a scheduler or a scaler is skipped.
    """
    for path, node in _outside(tree, taken):
        if isinstance(node, TensorRef) and id(node) not in taken and len(path) < _DEEPEST:
            yield path, node


def unread_outside(tree: Any, taken: set[int]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yields (path, kind) of the tensors in forms that are not read, such as sparse ones, where :func:`outside` looks."""
    for path, node in _outside(tree, taken):
        if kind := unread_kind(node):
            yield path, kind


def numbers_outside(tree: Any, taken: set[int]) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Yields (path, number) of the plain numbers, also numpy's, that stand where :func:`outside` looks."""
    for path, node in _outside(tree, taken):
        members = enumerate(node) if isinstance(node, list | tuple) and len(node) <= _MOST_MEMBERS else ()
        for key, value in mapping_items(node) or members if len(path) < _DEEPEST else ():
            found = number(value)
            if found is not None:
                yield (*path, key), found


def _outside(tree: Any, taken: set[int]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, node) of what stands outside the nodes that are taken, and outside the state of a training.

    A tensor in a form that is not read is one node: the indices of a sparse one mean nothing without its values.
    """
    skip: set[tuple[int, Any]] = set()
    for path, node in walk(tree, skip) if id(tree) not in taken else ():
        yield path, node
        if isinstance(node, TensorRef):
            continue
        if unread_kind(node):
            skip.update((id(node), key) for key, _ in children(node))
            continue
        for key, value in inside(node)[1] if isinstance(node, dict | list | tuple | Instance) else ():
            if isinstance(value, dict | list | tuple | Instance) and (id(value) in taken or is_training_state(key, value)):
                holder = inside(node)[0]
                skip.add((id(holder), key))


def tensor_at(tree: Any, path: tuple[Any, ...]) -> TensorRef | None:
    """Returns the tensor at a path of :func:`outside` in another tree, None if there is no tensor."""
    node = node_at(tree, path)
    return node if isinstance(node, TensorRef) else None


def node_at(tree: Any, path: tuple[Any, ...]) -> Any:
    """Returns what stands at a path of :func:`outside` in another tree, None if there is nothing."""
    node = tree
    for key in path:
        if isinstance(node, Instance) and isinstance(key, str) and key in ("args", "kwargs", "elements", "state"):
            node = getattr(node, key)
        elif isinstance(node, Instance):
            node = next((value for own, value in node.items if own == key), None)
        elif isinstance(node, OrderedTree) and key == "attributes" and key not in node:
            node = node.attributes
        elif isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list | tuple):
            node = node[key] if isinstance(key, int) and key < len(node) else None
        else:
            return None
    return node
