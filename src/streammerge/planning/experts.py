"""Handles experts that one checkpoint stores one by one and another fused. The other's are viewed in the form of the
first's.

The matrices of an expert are its gate, up and down projection. Stored one by one they are [out, in]. A fused tensor has
those of all experts of a layer, as [experts, out, in] or transposed, and gate and up may be one. The shapes tell which of
these a checkpoint has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from streammerge.errors import MismatchError, printable
from streammerge.planning.views import View
from streammerge.sources.base import Source
from streammerge.sources.box import box
from streammerge.sources.joined import Joined, joined
from streammerge.sources.table import same_names
from streammerge.tensors.conventions import EXPERT_ROLES, EXPERT_STACKS
from streammerge.tensors.spec import TensorSpec

_NAME = re.compile(
    rf"^(?P<place>.+)\.(?:{'|'.join(EXPERT_STACKS)})\.(?:(?P<number>\d+)\.)?(?P<role>{'|'.join(EXPERT_ROLES)})(?:\.weight)?$"
)
_BIAS = re.compile(rf"\.(?:{'|'.join(EXPERT_STACKS)})\..*_?bias$")
_BOTH = "gate and up"
_ALL = ({"gate", "up", "down"}, {_BOTH, "down"})
Shape = tuple[int, ...]


@dataclass(slots=True)
class _Block:
    """The experts of one layer of one checkpoint. ``place``: the name of the module that holds them.

    ``names``: (role, number of the expert, or -1 for all) -> name.
    """

    place: str
    names: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        return any(number < 0 for _, number in self.names)

    @property
    def roles(self) -> set[str]:
        return {role for role, _ in self.names}

    def experts(self, entries: Mapping[str, Source]) -> int:
        """Returns the number of experts; 0 if tensors are missing or do not fit together."""
        if self.roles not in _ALL:
            return 0
        if not self.fused:
            numbers = {number for _, number in self.names}
            flat = all(len(entries[name].spec.shape) == 2 for name in self.names.values())
            whole = numbers == set(range(len(numbers))) and len(self.names) == len(numbers) * len(self.roles)
            return len(numbers) if flat and whole else 0
        shapes = [entries[name].spec.shape for name in self.names.values()]
        same = all(len(shape) == 3 and shape[0] == shapes[0][0] for shape in shapes)
        return shapes[0][0] if same and all(number < 0 for _, number in self.names) else 0


def conformed(first: View, other: View) -> tuple[View, str]:
    """Returns the other view with its experts as the first has them, and a note. Returns the view itself if they agree.

    Raises MismatchError where shapes do not tell whether fused experts are transposed.
    """
    if same_names(first.entries, other.entries):
        return other, ""
    ours, theirs = _blocks(first.entries), _blocks(other.entries)
    entries, made = dict(other.entries), 0
    for key, block in theirs.items():
        wanted = ours.get(key)
        if wanted is None or not set(wanted.names.values()).isdisjoint(other.entries):
            continue
        found = _Conversion(first.entries, wanted, other, block).made()
        if found is None:
            continue
        made += 1
        for name in block.names.values():
            del entries[name]
        beside = [] if wanted.place == block.place else [n for n in entries if n.startswith(f"{block.place}.")]
        for name in beside:  # the router
            moved = wanted.place + name.removeprefix(block.place)
            if moved in first.entries and moved not in entries:
                entries[moved] = entries.pop(name)
        entries |= found
    if not made:
        return other, ""
    forms = [("fused" if each.fused else "separate") for each in (next(iter(theirs.values())), next(iter(ours.values())))]
    aliases = {name: known for name, known in other.aliases.items() if name in entries and known in entries}
    note = (
        f"{printable(other.index.path)}: its {forms[0]} experts in {made} layers are read as the {forms[1]} ones of "
        f"{printable(first.index.path)}"
    )
    return replace(other, entries=entries, aliases=aliases), note


def stacked(entries: Mapping[str, Source]) -> list[str]:
    """Returns the tensors that hold a matrix of all experts of a layer."""
    if not any(f".{stack}." in name for name in entries for stack in EXPERT_STACKS):
        return []
    return [name for block in _blocks(entries).values() if block.fused for name in block.names.values()]


def _blocks(entries: Mapping[str, Source]) -> dict[tuple[str, ...], _Block]:
    """Returns the experts of each layer by the numbers in its name. Numbers that two blocks share are left out."""
    found: dict[str, _Block] = {}
    biased = set[str]()  # gate and up alternate where experts have biases
    for name in entries:
        if match := _NAME.match(name):
            place, number = match["place"], int(match["number"] or -1)
            found.setdefault(place, _Block(place)).names[EXPERT_ROLES[match["role"]], number] = name
        elif match := _BIAS.search(name):
            biased.add(name[: match.start()])
    made: dict[tuple[str, ...], _Block] = {}
    doubled = set[tuple[str, ...]]()
    for place, block in found.items():
        key = tuple(re.findall(r"\d+", place))
        if key in made:
            doubled.add(key)
        if place not in biased:
            made[key] = block
    return {key: block for key, block in made.items() if key not in doubled}


class _Conversion:
    """One layer's experts of a checkpoint, in the form of the first checkpoint's."""

    def __init__(self, entries: Mapping[str, Source], wanted: _Block, other: View, block: _Block) -> None:
        self.first, self.wanted, self.other, self.block = entries, wanted, other, block

    def made(self) -> dict[str, Source] | None:
        """Returns the tensors by the first's names. Returns None if the two do not fit together."""
        count = self.block.experts(self.other.entries)
        if count < 2 or count != self.wanted.experts(self.first) or (self.wanted.fused and self.block.fused):
            return None
        separate, entries = (self.block, self.other.entries) if not self.block.fused else (self.wanted, self.first)
        hidden, inner = entries[separate.names["down", 0]].spec.shape
        self.shapes: dict[str, Shape] = {
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
            _BOTH: (2 * inner, hidden),
        }
        if any(entries[name].spec.shape != self.shapes[role] for (role, _), name in separate.names.items()):
            return None
        self.transposed = False
        for fused, held in ((self.block, self.other.entries), (self.wanted, self.first)):
            if fused.fused:
                ways = list(self._ways(fused, held))
                if not ways:
                    return None
                if len(ways) > 1:
                    raise MismatchError(
                        f"the experts in {printable(fused.place)} are square, so their shapes do not tell whether they are "
                        "transposed; save both checkpoints again with separate experts"
                    )
                (self.transposed,) = ways
        if self.wanted.fused:
            return {name: self._fused(name, role, count) for (role, _), name in self.wanted.names.items()}
        return {name: self._expert(role, number) for (role, number), name in self.wanted.names.items()}

    def _ways(self, fused: _Block, entries: Mapping[str, Source]) -> Iterator[bool]:
        """Yields whether the tensors are transposed, for each way that their shapes allow."""
        held = {role: entries[name].spec.shape[1:] for (role, _), name in fused.names.items()}
        for transposed in (False, True):
            if all(shape == self.shapes[role][:: -1 if transposed else 1] for role, shape in held.items()):
                yield transposed

    def _expert(self, role: str, number: int) -> Source:
        """Returns one matrix of one expert, as [out, in]."""
        names, shape = self.block.names, self.shapes[role]
        where = number if not self.block.fused else -1
        if role == _BOTH and (_BOTH, where) not in names:
            both = [self._expert("gate", number), self._expert("up", number)]
            return joined(both[0].spec.name, both, 0)
        start = 0
        if (role, where) not in names:  # gate and up are one tensor
            start, role = (self.shapes["gate"][0] if role == "up" else 0), _BOTH
        source = self.other.entries[names[role, where]]
        if source.spec.shape == shape:
            return source
        if not self.block.fused:
            return self._box(source, (start, 0), shape, (0, 1))
        if self.transposed:
            return self._box(source, (number, 0, start), shape, (2, 1))
        return self._box(source, (number, start, 0), shape, (1, 2))

    def _fused(self, name: str, role: str, count: int) -> Source:
        """Returns one matrix of all experts in one tensor."""
        rows, columns = self.shapes[role]
        pieces = [self._expert(role, number) for number in range(count)]
        if self.transposed:
            pieces = [self._turned(piece) for piece in pieces]
            rows, columns = columns, rows
        flat: list[Source] = []
        for piece in pieces:
            flat += piece.pieces if isinstance(piece, Joined) and piece.axis == 0 else (piece,)
        made = joined(name, flat, 0)
        return replace(made, spec=TensorSpec(name, made.spec.dtype, (count, rows, columns)))  # type: ignore[type-var]

    def _turned(self, piece: Source) -> Source:
        if isinstance(piece, Joined):
            return joined(piece.spec.name, [self._turned(each) for each in piece.pieces], 1)
        return self._box(piece, (0, 0), piece.spec.shape[::-1], (1, 0))

    def _box(self, source: Source, start: Shape, shape: Shape, axes: Shape) -> Source:
        found = box(source, source.spec.name, start, shape, axes)
        if found is None:
            raise MismatchError(
                f"{printable(source.spec.name)} of {printable(source.origin)} cannot be read as single experts; convert "
                "the checkpoint to safetensors first"
            )
        return found
