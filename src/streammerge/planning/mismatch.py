"""What checkpoints disagree about: missing, extra and differing tensors, what it looks like, and what would settle it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from streammerge.errors import MismatchError, listed, printable
from streammerge.recipe.model import Recipe
from streammerge.tensors.layers import depths
from streammerge.tensors.spec import TensorSpec

_MOST_ROWS = 20
_VOCABULARY = ("emb", "lm_head", "text_head", "wte", "vocab", "embed_out")


@dataclass(frozen=True, slots=True)
class Differing:
    """One tensor that cannot be merged as it is: in the first checkpoint, and in the other."""

    name: str
    first: TensorSpec
    other: TensorSpec
    path: str

    @property
    def in_shape(self) -> bool:
        return self.first.shape != self.other.shape

    @property
    def row(self) -> tuple[str, str, str, str]:
        if self.in_shape:
            shapes = _shape(self.first), _shape(self.other)
        else:
            shapes = self.first.dtype.torch_name, self.other.dtype.torch_name
        return (printable(self.name), shapes[0], f"{shapes[1]} in {printable(self.path)}", self.guess)

    @property
    def guess(self) -> str:
        """What the difference looks like, from name and shapes."""
        one, two = self.first.shape, self.other.shape
        if not self.in_shape:
            return ""
        if len(one) == len(two) and one[1:] == two[1:] and any(word in self.name.lower() for word in _VOCABULARY):
            return f"vocabulary {one[0]} against {two[0]}"
        if len(one) == len(two) == 4 and {one[1], two[1]} & {9}:
            return "an inpainting model against an ordinary one"
        if {one[-1:], two[-1:]} == {(256,), (768,)}:
            return "v1 against v2 (256 against 768 features)"
        return ""

    @property
    def by_rows(self) -> bool:
        """Whether the two differ in their number of rows only."""
        return bool(self.first.shape and self.other.shape) and self.first.shape[1:] == self.other.shape[1:]


@dataclass(slots=True)
class Mismatch:
    """All disagreements of one merge. ``missing`` and ``extra``: path of the checkpoint -> names."""

    first: str
    missing: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, list[str]] = field(default_factory=dict)
    differing: list[Differing] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)

    def rows(self) -> list[str]:
        """Sentences about names, one for each checkpoint and kind."""
        said = []
        for path in dict.fromkeys([*self.missing, *self.extra]):
            if self.missing.get(path):
                said.append(f"{printable(path)} lacks {len(self.missing[path])}: {listed(self.missing[path])}")
            if self.extra.get(path):
                whose = f"{printable(path)} has {len(self.extra[path])} that {printable(self.first)} lacks"
                said.append(f"{whose} (they stay out): {listed(self.extra[path])}")
        return said

    def refuse(self, recipe: Recipe) -> None:
        """MismatchError with everything that the recipe's policies do not settle."""
        names = self.rows() if recipe.on_missing == "error" else []
        if not names and not self.differing:
            return
        lines = []
        if names:
            lines += ["the inputs do not have the same tensors:", *(f"  {row}" for row in names)]
        if self.differing:
            lines += ["these tensors differ between the inputs:", *_aligned([d.row for d in self.differing])]
        lines += [f"this looks like {guess}" for guess in self._guesses()]
        if names:
            lines.append(
                '`on_missing="base"` (keep the first\'s), `"average-present"` (mean of those that have it) or `"drop"` '
                "settles names; the first checkpoint's names are the output's"
            )
        shapes = [d for d in self.differing if d.in_shape]
        if shapes:
            rows = ' or `"rows"` (merge the common leading rows, keep the rest of the larger)'
            lines.append(
                f'`on_shape="base"` (keep the first\'s){rows if all(d.by_rows for d in shapes) else ""} settles shapes; '
                "a rule can copy a tensor from one model, or drop it"
            )
        raise MismatchError("\n".join(lines))

    def _guesses(self) -> list[str]:
        guesses: Counter[str] = Counter(d.guess for d in self.differing if d.guess)
        said = [f"{guess} (from the tensors that differ)" for guess in guesses]
        ours = self.names.get(self.first, [])
        for path in dict.fromkeys([*self.missing, *self.extra]):
            theirs, shown = self.names.get(path, []), printable(path)
            common = len(ours) - len(self.missing.get(path, []))
            prefixes = _prefixes(self.missing.get(path, []), self.extra.get(path, []))
            if prefixes:
                one, two = (f"'{printable(prefix)}'" if prefix else "none" for prefix in prefixes)
                said.append(f"another prefix: {one} in {printable(self.first)}, {two} in {shown}")
            elif common * 2 < len(ours):
                said.append(f"another architecture: {common} of {len(ours)} names are in {shown}")
            elif deep := _depths(ours, theirs):
                said.append(f"another depth: {deep} in {shown}")
        wide = [d for d in self.differing if d.in_shape and not d.guess]
        if len(wide) > 2 and len(wide) * 2 > len(ours):
            said.append("another size of the same architecture: most tensors differ in shape")
        return said


def _prefixes(missing: Sequence[str], extra: Sequence[str]) -> tuple[str, str] | None:
    """What the names begin with, where they are equal behind that."""
    if not missing or not extra:
        return None
    own = [f"{names[0].partition('.')[0]}." for names in (missing, extra)]
    for one, two in ((own[0], own[1]), ("", own[1]), (own[0], "")):
        ours = {name.removeprefix(one) for name in missing if name.startswith(one)}
        theirs = {name.removeprefix(two) for name in extra if name.startswith(two)}
        if len(ours & theirs) * 10 >= 9 * max(len(missing), len(extra)):
            return one, two
    return None


def _depths(ours: Sequence[str], theirs: Sequence[str]) -> str:
    one, two = depths(ours), depths(theirs)
    return ", ".join(f"{printable(s)} has {n} layers against {two[s]}" for s, n in one.items() if two.get(s, n) != n)


def _shape(spec: TensorSpec) -> str:
    return str(list(spec.shape))


def _aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    shown = rows[:_MOST_ROWS]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    lines = [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in shown
    ]
    return lines + ([f"  and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else [])
