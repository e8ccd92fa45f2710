"""What a comparison found, by tensor, by layer and for the whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from streammerge.diffing.sums import Agreement, Measured, Sums
from streammerge.errors import listed, printable
from streammerge.tensors.bundles import bundled, shown
from streammerge.tensors.layers import layer_of
from streammerge.tensors.spec import TensorSpec
from streammerge.units import binary_bytes, counted, decimal_bytes, inflected

_AGREE, _PART = 0.5, 0.15
"""Cosines of two changes: at least the first, and a mean keeps most of both; below the second, they are independent."""
_STRANGERS, _NO_CHANGE = 0.1, 0.9
"""Below this cosine, two models come from different trainings; above this share of its norm, a base is not changed, but
another model."""
_SHOWN_LAYERS, _SHOWN_NAMES = 12, 4


@dataclass(frozen=True, slots=True)
class TensorDiff(Measured):
    """A tensor that both have. ``name`` and ``a``: its name and specification in A; ``other`` and ``b``: in B.

    ``sums``: without elements if the numbers cannot be compared, because shapes or kinds of dtypes differ. ``base``:
    whether the base has it too.
    """

    name: str
    other: str
    a: TensorSpec
    b: TensorSpec
    sums: Sums
    comparable: bool = True
    base: bool = False

    @property
    def equal(self) -> bool:
        """Whether shape and all values are equal. The dtypes may differ."""
        return self.comparable and not self.sums.differing

    @property
    def counted(self) -> Sums:
        """The sums as they count for the layer and the model. Counters and other integers would outweigh all weights, so
        only their elements count."""
        s = self.sums
        return s if self.a.dtype.kind in ("float", "complex") else Sums(s.elems, s.differing, s.nonfinite)

    @property
    def layer(self) -> str:
        """The layer that holds it, or the module of a tensor outside the layers."""
        found = layer_of(self.name)
        return f"{found.stack}.{found.number}" if found else self.name.rpartition(".")[0] or self.name

    @property
    def agreement(self) -> Agreement | None:
        """How the changes of the base agree. None without a base."""
        return self.agreement_of() if self.base else None


@dataclass(frozen=True, slots=True)
class LayerDiff(Measured):
    """All tensors of one layer. ``different``: how many of its ``tensors`` are not equal. ``agreement``: see above."""

    name: str
    tensors: int
    different: int
    sums: Sums
    base: bool = False

    @property
    def equal(self) -> bool:
        return not self.different

    @property
    def comparable(self) -> bool:
        """Whether any of its tensors could be compared. The shapes of all others differ."""
        return self.equal or self.sums.elems > 0

    @property
    def agreement(self) -> Agreement | None:
        """How the changes of the base agree. None without a base."""
        return self.agreement_of() if self.base else None


@dataclass(frozen=True, slots=True, repr=False)
class Diff(Measured):
    """What differs between the checkpoints ``a`` and ``b``. Printing it shows a summary.

    Norms, cosines and the largest change of layers and of the model are those of floating-point tensors; integers count
    among the elements only. ``tensors``: those that both have, in the order of A. ``only_a`` and ``only_b``: names that
    only one side has, after names were matched as in a merge. ``ties``, ``extras``, ``notes`` and ``warnings``: sentences.
    ``read_bytes``, ``seconds``, ``peak_bytes``, ``startup_bytes`` and ``memory_bytes``: as of a merge.
    """

    a: str
    b: str
    base: str | None
    tensors: tuple[TensorDiff, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    ties: tuple[str, ...]
    extras: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    read_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    startup_bytes: int = 0
    memory_bytes: int = 0
    sums: Sums = field(init=False)
    layers: tuple[LayerDiff, ...] = field(init=False)

    def __post_init__(self) -> None:
        total, found = Sums(), dict[str, list[TensorDiff]]()
        for each in self.tensors:
            total.add(each.counted)
            found.setdefault(each.layer, []).append(each)
        object.__setattr__(self, "sums", total)
        object.__setattr__(self, "layers", tuple(_layer(name, own) for name, own in found.items()))

    @property
    def equal(self) -> bool:
        """Whether both have the same tensors: names after matching, shapes, and values to the bit.

        NaN equals NaN of the same bits. Values of two dtypes are compared as numbers. Dtypes, ties and what is no tensor
        do not count.
        """
        return not (self.only_a or self.only_b) and all(each.equal for each in self.tensors)

    @property
    def agreement(self) -> Agreement | None:
        """How the changes of the base agree, over all tensors that the base has. None without a base."""
        return self.agreement_of() if self.base is not None and any(each.base for each in self.tensors) else None

    @property
    def advice(self) -> str:
        """One sentence about which kind of merge suits the changes of the base. "" without a base."""
        return _advice(self.agreement) if self.agreement is not None else ""

    @property
    def moved(self) -> list[LayerDiff]:
        """The layers that differ, the one that moved farthest first."""
        return sorted((layer for layer in self.layers if not layer.equal), key=_moved, reverse=True)

    def to_json(self, tensors: bool = True) -> dict[str, Any]:
        """Returns the comparison as data for JSON. ``tensors``: with every tensor. What has no value is None."""
        made: dict[str, Any] = {"a": self.a, "b": self.b, "base": self.base, "equal": self.equal}
        made |= {"tensors_compared": len(self.tensors), "tensors_different": self._count_different()}
        made |= _measures(self, self.agreement) | {"advice": self.advice}
        made |= {"only_a": list(self.only_a), "only_b": list(self.only_b), "ties": list(self.ties), "extras": self.extras}
        made["layers"] = [
            {"layer": each.name, "equal": each.equal, "tensors": each.tensors, "tensors_different": each.different}
            | _measures(each, each.agreement)
            for each in self.layers
        ]
        made["moved_most"] = [each.name for each in self.moved[:_SHOWN_LAYERS]]
        if tensors:
            made["tensors"] = [_tensor_json(each) for each in self.tensors]
        made |= {"read_bytes": self.read_bytes, "seconds": round(self.seconds, 3), "peak_bytes": self.peak_bytes}
        made |= {"startup_bytes": self.startup_bytes, "memory_bytes": self.memory_bytes}
        return made | {"notes": list(self.notes), "warnings": list(self.warnings)}

    def __repr__(self) -> str:
        said = "equal" if self.equal else f"{self._count_different()} of {counted(len(self.tensors), 'tensor')} differ"
        return f"<Diff {printable(self.a)} and {printable(self.b)}: {said}>"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        from streammerge.notebook import table

        moved = self.moved[:_SHOWN_LAYERS]
        rows = [(printable(each.name), *_cells(each if each.comparable else None)) for each in moved]
        more = ""
        if len(moved) < len(self.layers):
            more = f"the {len(moved)} of {len(self.layers)} layers that moved most, the farthest first"
        sides = [("A", printable(self.a)), ("B", printable(self.b))]
        sides += [("base C", printable(self.base))] if self.base is not None else []
        facts = [*sides, *self._facts(), *(("note", each) for each in self.notes)]
        heads = ("layer", "|B-A|/|A|", "cosine", "largest", "differ")
        return table("diff", facts, heads, rows, more if rows else "")

    def _count_different(self) -> int:
        return sum(not each.equal for each in self.tensors)

    def text(self, tensors: bool = False) -> str:
        """Returns the summary. ``tensors``: with every layer and every tensor."""
        lines = [f"A          {printable(self.a)}", f"B          {printable(self.b)}"]
        lines += [f"base C     {printable(self.base)}"] if self.base is not None else []
        lines += [f"{label:<11}{text}" for label, text in self._facts()]
        if not self.equal and self.tensors:
            lines += ["", *self._layer_table(tensors)]
        if tensors and self.tensors:
            lines += ["", *self._tensor_table()]
        speed = self.read_bytes / max(self.seconds, 1e-9)
        lines += ["", f"read {decimal_bytes(self.read_bytes)} in {self.seconds:.1f} s ({decimal_bytes(speed)}/s)"]
        peak, memory = binary_bytes(self.peak_bytes), binary_bytes(self.memory_bytes)
        lines.append(f"peak memory {peak} of {memory} (above the {binary_bytes(self.startup_bytes)} start-up footprint)")
        return "\n".join(lines)

    def _facts(self) -> list[tuple[str, str]]:
        """Returns (label, sentence) of what is told about the whole model."""
        different, count = self._count_different(), len(self.tensors)
        gone = sum(each.a.shape != each.b.shape for each in self.tensors)
        kinds = sum(not each.comparable and each.a.shape == each.b.shape for each in self.tensors)
        facts = [("result", "equal" if self.equal else "different")]
        said = [f"{different:,} of {count:,} differ" if different else f"all {count:,} are equal"]
        said += [f"{gone:,} by shape"] * bool(gone) + [f"{kinds:,} by kind of dtype"] * bool(kinds)
        said += [f"{len(self.only_a):,} only in A"] * bool(self.only_a) + [f"{len(self.only_b):,} only in B"] * bool(
            self.only_b
        )
        facts.append(("tensors", ", ".join(said)))
        if self.sums.differing:
            facts.append(("distance", f"|B - A| is {_number(self.relative)} of |A|, cosine {_cosine(self.cosine)}"))
            if self.cosine is not None and self.cosine < _STRANGERS:
                facts.append(("relatives", "hardly: fine-tunes of one model have a cosine near 1, two trainings near 0"))
            top = max(self.tensors, key=lambda each: each.counted.largest)
            if top.counted.largest:
                facts.append(("largest", f"{_number(top.largest)}, in {printable(top.name)}"))
            facts.append(("elements", f"{_percent(self.share)} of {self.elems:,} differ"))
        if self.nonfinite:
            which = f"{counted(self.nonfinite, 'element')} {inflected(self.nonfinite, 'is', 'are')} NaN or infinite"
            facts.append(("finite", f"{which}; norms and cosines are without {inflected(self.nonfinite, 'it', 'them')}"))
        facts += [("only in A", shown(bundled(self.only_a), _SHOWN_NAMES))] * bool(self.only_a)
        facts += [("only in B", shown(bundled(self.only_b), _SHOWN_NAMES))] * bool(self.only_b)
        shapes = [
            f"{each.name} {list(each.a.shape)} and {list(each.b.shape)}"
            for each in self.tensors
            if each.a.shape != each.b.shape
        ]
        facts += [("shapes", listed(shapes, _SHOWN_NAMES))] * bool(shapes)
        facts += [("dtypes", text) for text in self._dtypes()]
        facts += [("ties", text) for text in self.ties]
        facts += [("extras", self.extras)] * bool(self.extras)
        if self.agreement is not None:
            found = self.agreement
            facts.append(
                ("changes", f"|A - C| is {_number(found.relative_a)} of |C|, |B - C| is {_number(found.relative_b)}")
            )
            facts.append(("advice", self.advice))
        return facts

    def _dtypes(self) -> list[str]:
        counts: dict[tuple[str, str], int] = {}
        for each in self.tensors:
            if each.a.dtype is not each.b.dtype:
                both = each.a.dtype.torch_name, each.b.dtype.torch_name
                counts[both] = counts.get(both, 0) + 1
        return [f"{counted(count, 'tensor')}: {one} in A, {two} in B" for (one, two), count in counts.items()]

    def _layer_table(self, every: bool) -> list[str]:
        """Returns the layers: with ``every`` all in the model's order, else those that moved most, the farthest first."""
        moved = self.moved
        shown = self.layers if every else moved[:_SHOWN_LAYERS]
        which = ""
        if len(shown) < len(moved):
            which = f", the {len(shown)} that moved most"
        elif not every and len(moved) < len(self.layers):
            which = f", {len(moved)} of them different"
        which += "" if every else ", the farthest first"
        rows = [_row(each.name, each if each.comparable else None, each.agreement) for each in shown]
        these = inflected(len(self.layers), "layer or other module", "layers and other modules")
        return [f"{len(self.layers)} {these}{which}", *_table(rows)] if rows else []

    def _tensor_table(self) -> list[str]:
        rows = [_row(each.name, each if each.comparable else None, each.agreement) for each in self.tensors]
        return [counted(len(rows), "tensor"), *_table(rows)]


def _layer(name: str, tensors: list[TensorDiff]) -> LayerDiff:
    sums = Sums()
    for each in tensors:
        sums.add(each.counted)
    return LayerDiff(name, len(tensors), sum(not each.equal for each in tensors), sums, any(each.base for each in tensors))


def _moved(layer: LayerDiff) -> float:
    return layer.relative or 0.0


def _advice(found: Agreement) -> str:
    far = [(name, size) for name, size in (("A", found.relative_a), ("B", found.relative_b)) if (size or 0) > _NO_CHANGE]
    if far:
        name, size = far[0]
        return f"|{name} - C| is {_number(size)} of |C|: C is hardly the base of {name}, and says little about A and B."
    if found.cosine is None:
        if not found.relative_a and not found.relative_b:
            return "Neither A nor B changes the base."
        same, other = ("A", "B") if not found.relative_a else ("B", "A")
        return f"{same} equals the base, so there is nothing to settle: take {other}, or a mean for a part of its change."
    said = [f"cosine {found.cosine:.2f}"]
    said += [f"{_percent(found.equal_signs)} equal signs"] if found.equal_signs is not None else []
    said += [f"the largest 10% overlap by {_percent(found.overlap)}"] if found.overlap is not None else []
    numbers = ", ".join(said)
    if found.cosine >= _AGREE:
        return f"The changes agree ({numbers}): a mean suits."
    if found.cosine >= _PART:
        return f"The changes agree in part ({numbers}): a mean loses some of both; try TIES too."
    if found.cosine > -_PART:
        return f"The changes are nearly independent ({numbers}): a mean would shrink both; TIES suits better."
    return f"The changes oppose each other ({numbers}): a mean would cancel them; TIES suits better."


def _measures(each: Measured, agreement: Agreement | None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "relative": _finite(each.relative),
        "cosine": each.cosine,
        "largest": _finite(each.largest),
        "share": each.share,
        "elems": each.elems,
        "differing": each.sums.differing,
        "nonfinite": each.nonfinite,
        "norm_a": _finite(math.sqrt(each.sums.aa)),
        "norm_b": _finite(math.sqrt(each.sums.bb)),
        "distance": _finite(math.sqrt(each.sums.dd)),
    }
    if agreement is not None:
        made["agreement"] = {
            "relative_a": _finite(agreement.relative_a),
            "relative_b": _finite(agreement.relative_b),
            "cosine": agreement.cosine,
            "equal_signs": agreement.equal_signs,
            "overlap": agreement.overlap,
        }
    return made


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _tensor_json(each: TensorDiff) -> dict[str, Any]:
    made = {"name": each.name, "name_b": each.other, "equal": each.equal, "comparable": each.comparable}
    made |= {"shape_a": list(each.a.shape), "shape_b": list(each.b.shape)}
    made |= {"dtype_a": each.a.dtype.value, "dtype_b": each.b.dtype.value, "layer": each.layer}
    return made | _measures(each, each.agreement)


def _row(name: str, each: Measured | None, agreement: Agreement | None) -> tuple[str, ...]:
    """Returns the cells of a table. ``each`` is None for what cannot be compared."""
    changes = _cosine(agreement.cosine, 2) if agreement is not None else ""
    return (*_cells(each), changes, name)


def _cells(each: Measured | None) -> tuple[str, str, str, str]:
    """Returns distance, cosine, largest change and share of what differs; no change where only integers differ."""
    if each is None:
        return ("-", "-", "-", "-")
    largest = "-" if each.relative is None and each.cosine is None else _number(each.largest)
    return (_number(each.relative), _cosine(each.cosine), largest, _percent(each.share))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a table. Names stand last, so that they are shown whole in any terminal."""
    heads = ("|B-A|/|A|", "cosine", "largest", "differ", "changes", "")
    kept = [number for number in range(5) if number != 4 or any(row[4] for row in rows)]
    widths = [max(len(row[number]) for row in (heads, *rows)) for number in kept]
    return [
        "  " + "  ".join([*(row[n].rjust(w) for n, w in zip(kept, widths, strict=True)), printable(row[5])]).rstrip()
        for row in (heads, *rows)
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if not value else f"{value:.3g}"


def _cosine(value: float | None, places: int = 6) -> str:
    text = "-" if value is None else f"{value:.{places}f}"
    return text.lstrip("-") if value is not None and float(text) == 0 else text  # not -0.00


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    if 0 < value < 0.001 or 0.999 < value < 1:
        return "<0.1%" if value < 0.5 else ">99.9%"
    return f"{value:.1%}" if value not in (0, 1) else f"{value:.0%}"
