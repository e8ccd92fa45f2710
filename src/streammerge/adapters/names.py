"""Which tensors of a base a module of an adapter is: the same name, one that ends alike, or one of another layout."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from streammerge.adapters.layouts import other_names
from streammerge.adapters.modules import Module, component_of
from streammerge.checkpoints.heads import is_head, tied_embedding
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, listed, printable
from streammerge.tensors.layers import layer_of

_LEAST_COMMON = 2
_PARTS = ("", "model.diffusion_model.", "diffusion_model.", "unet/", "transformer/")
"""Where a name is looked for that does not say its part of a pipeline."""


class Spot(NamedTuple):
    """A tensor of the base, or its rows ``start`` to ``stop``. ``stop`` is -1 for the whole tensor."""

    name: str
    start: int = 0
    stop: int = -1


class Names:
    """The names of a base's tensors, searched in several ways."""

    def __init__(self, base: CheckpointIndex) -> None:
        self.base, self.entries = base, base.entries
        self.notes: list[str] = []
        self._learned: list[tuple[str, str]] = []
        self._stacks: dict[str, tuple[str, str]] = {}
        self._parts: dict[str, dict[str, list[Spot]]] = {}
        self._pieces: dict[str, dict[str, dict[int, Spot]]] = {}

    def find(self, wanted: Iterable[str]) -> Spot | None:
        """Returns the tensor with the first of these names that the base has in any spelling; None if it has none.

        Raises MismatchError where several tensors are possible.
        """
        wanted = list(wanted)
        for way in (self._exact, self._tied, self._in_its_part, self._ending_alike, self._anywhere):
            for name in wanted:
                spot = way(name)
                if spot is not None:
                    self._check_stack(name, spot)
                    return spot
        return None

    def pieces(self, wanted: Iterable[str]) -> list[Spot]:
        """Returns the tensors that are, one behind the other, the tensor with the first of these names; [] if none is."""
        for name in wanted:
            inner, places = component_of(name)
            for place in places or _PARTS:
                self._mangled(place)
                found = self._pieces[place].get(_mangled_name(inner), {})
                if found and sorted(found) == list(range(len(found))) and len(found) > 1:
                    return [found[share] for share in range(len(found))]
        return []

    def learn(self, theirs: str, ours: str) -> None:
        """Lets names that begin with ``theirs`` mean those that begin with ``ours``."""
        if (theirs, ours) not in self._learned:
            self._learned.append((theirs, ours))

    def near(self, name: str) -> str:
        """Returns a clause about a name of the base that is nearly the same, or about how the names of the base begin."""
        ending = name.rpartition(".")[2]
        alike = [each for each in self.entries if each.rpartition(".")[2] == ending]
        found = difflib.get_close_matches(name, alike[:5000], n=1, cutoff=0.75)
        if found:
            return f"; the nearest name there is {printable(found[0])}"
        return f"; names there are like {listed(list(self.entries), 2)}" if self.entries else ""

    # -- the ways, in their order

    def _exact(self, name: str) -> Spot | None:
        if name in self.entries:
            return Spot(self.base.aliases.get(name, name))
        for theirs, ours in self._learned:
            if name.startswith(theirs) and ours + name[len(theirs) :] in self.entries:
                other = ours + name[len(theirs) :]
                return Spot(self.base.aliases.get(other, other))
        return None

    def _tied(self, name: str) -> Spot | None:
        if not is_head(name):
            return None
        own = tied_embedding(self.base)
        if own is None:
            return None
        self.notes.append(
            f"{printable(self.base.path)} has no {printable(name)}: it is tied to {printable(own)}, so both change together"
        )
        return Spot(own)

    def _ending_alike(self, name: str) -> Spot | None:
        """Finds the tensor whose name has the longest end in common, if the numbers of layers are in that end."""
        parts = name.split(".")
        if len(parts) < _LEAST_COMMON:
            return None
        best, longest = list[str](), 0
        for other in self._endings.get(".".join(parts[-_LEAST_COMMON:]), ()):
            theirs = other.split(".")
            common = _common(parts, theirs)
            if any(part.isdigit() for part in (*parts[:-common], *theirs[:-common])):
                continue
            if common > longest:
                best, longest = [other], common
            elif common == longest:
                best.append(other)
        if len(best) > 1:
            raise MismatchError(
                f"{printable(name)} could be {listed(sorted(best), 4)} of {printable(self.base.path)}; rename the "
                "adapter's tensors"
            )
        if not best:
            return None
        theirs = best[0].split(".")
        head, own = ".".join(parts[:-longest]), ".".join(theirs[:-longest])
        self.learn(f"{head}." if head else "", f"{own}." if own else "")
        return Spot(self.base.aliases.get(best[0], best[0]))

    def _in_its_part(self, name: str) -> Spot | None:
        """Finds the tensor by its name without dots, in the part of a pipeline that the name begins with."""
        inner, places = component_of(name)
        return self._without_dots(name, inner, [place for place in places if place])

    def _anywhere(self, name: str) -> Spot | None:
        """Finds the tensor by its name without dots, also in a base that is only the part that the name begins with."""
        inner, places = component_of(name)
        return self._without_dots(name, inner, places or _PARTS)

    def _without_dots(self, name: str, inner: str, places: Sequence[str]) -> Spot | None:
        wanted = _mangled_name(inner)
        for place in places:
            found = self._mangled(place).get(wanted, [])
            spots = set(found)
            if len(spots) > 1:
                raise MismatchError(
                    f"{printable(name)} could be {listed(sorted(spot.name for spot in spots), 4)} of "
                    f"{printable(self.base.path)}, which are one without their dots"
                )
            if spots:
                return found[0]
        return None

    # -- tables

    @cached_property
    def _endings(self) -> dict[str, list[str]]:
        """Last parts of a name -> the names that end so."""
        found: dict[str, list[str]] = {}
        for name in self.entries:
            found.setdefault(".".join(name.split(".")[-_LEAST_COMMON:]), []).append(name)
        return found

    def _mangled(self, place: str) -> dict[str, list[Spot]]:
        """Names without dots -> tensors of the base whose names begin with ``place``."""
        if place not in self._parts:
            table: dict[str, list[Spot]] = {}
            pieces = self._pieces.setdefault(place, {})
            for name, entry in self.entries.items():
                if not name.startswith(place) or "_ema" in name[: len(place) + 10]:
                    continue
                inner = name[len(place) :]
                for whole in other_names(inner):
                    if whole.within:
                        pieces.setdefault(_mangled_name(whole.name), {})[whole.share] = Spot(name)
                for other, spot in _spellings(inner, name, entry.spec.shape):
                    known = table.setdefault(_mangled_name(other), [])
                    if spot not in known:
                        known.append(spot)
            self._parts[place] = table
        return self._parts[place]

    def _check_stack(self, name: str, spot: Spot) -> None:
        """Raises MismatchError if the layers of one stack of the adapter are in two stacks of the base."""
        ours, theirs = layer_of(name), layer_of(spot.name)
        if ours is None or theirs is None or spot.stop >= 0:
            return
        stack, first = self._stacks.setdefault(ours.stack, (theirs.stack, name))
        if stack != theirs.stack:
            raise MismatchError(
                f"{printable(name)} would be {printable(spot.name)} of {printable(self.base.path)}, but "
                f"{printable(first)} is in {printable(stack)}; the adapter is of a model with other layers"
            )


def _mangled_name(name: str) -> str:
    """Returns the name of a tensor with the dots of its module as underscores."""
    stem, _, ending = name.rpartition(".")
    return f"{stem.replace('.', '_')}.{ending}"


def _common(one: list[str], other: list[str]) -> int:
    """Returns the number of last parts that two names have in common."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _spellings(inner: str, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Spot]]:
    """Yields every name of a tensor in other layouts, with the rows that it stands for."""
    yield inner, Spot(name)
    for other in other_names(inner):
        if other.within:
            continue
        if other.shares == 1:
            yield other.name, Spot(name)
        elif shape:
            rows = shape[0]
            each = rows // other.shares if other.even else shape[-1] if len(shape) > 1 else 0
            if not each and not other.even:  # a bias beside a matrix says nothing about its parts
                continue
            last = other.share == other.shares - 1
            yield other.name, Spot(name, other.share * each, rows if last else (other.share + 1) * each)


def wanted_names(module: Module) -> list[str]:
    """Returns the names that the tensor of a module may have, the likeliest first."""
    if module.kind == "saved":
        return [module.name]
    if module.parameter == "bias":
        return [f"{module.name}.bias", f"{module.name}.in_proj_bias"]
    if module.kind == "experts":
        return [f"{module.name}.{module.parameter}", f"{module.name}.{module.parameter}.weight"]
    return [f"{module.name}.weight", f"{module.name}.in_proj_weight"]
