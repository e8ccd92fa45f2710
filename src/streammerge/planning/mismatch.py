"""Collects what checkpoints disagree about: missing, extra and differing tensors. Explains a disagreement, and says what
settles it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from streammerge.errors import MismatchError, listed, printable
from streammerge.recipe.model import Recipe
from streammerge.tensors.adapters import is_adapter
from streammerge.tensors.layers import depths
from streammerge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from streammerge.tensors.matching import Renaming

_MOST_ROWS = 20
_MOST_PREFIXES = 3
_POSITIONS = r"(?i)(^|[._])(pos|position|positional|wpe)([._]|$)|pos(ition(al)?)?_?emb"
_SPEAKERS = r"(?i)(^|[._])(speakers?|spk|emb_g)([._]|$)"
_VOCABULARY = ("emb", "lm_head", "text_head", "wte", "vocab", "embed_out")


class Differing(NamedTuple):
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
        """Guesses the reason of the difference from name and shapes."""
        one, two = self.first.shape, self.other.shape
        if not self.in_shape:
            return ""
        unlike = [pair for pair in zip(one, two, strict=False) if pair[0] != pair[1]]
        if len(one) == len(two) and len(unlike) == 1 and re.search(_POSITIONS, self.name):
            return f"{unlike[0][0]} positions against {unlike[0][1]}, so another length of text or size of images"
        if len(one) == len(two) and one[1:] == two[1:] and re.search(_SPEAKERS, self.name):
            return f"{one[0]} speakers against {two[0]}"
        if len(one) == len(two) and one[1:] == two[1:] and any(word in self.name.lower() for word in _VOCABULARY):
            return f"vocabulary {one[0]} against {two[0]}"
        if len(one) == len(two) == 4 and {one[1], two[1]} & {9}:
            advice = "; give the inpainting model first, and it keeps its channels" if one[1] < two[1] else ""
            return f"an inpainting model against an ordinary one{advice}"
        if {one[-1:], two[-1:]} == {(256,), (768,)}:
            return "v1 against v2 (256 against 768 features)"
        return ""

    @property
    def by_blocks(self) -> bool:
        """Whether the two have a leading block in common."""
        one, two = self.first.shape, self.other.shape
        return len(one) == len(two) > 0 and 0 not in (*one, *two)

    @property
    def by_rows(self) -> bool:
        """Whether the two differ in their number of rows only."""
        return bool(self.first.shape and self.other.shape) and self.first.shape[1:] == self.other.shape[1:]


@dataclass(slots=True, eq=False)
class Mismatch:
    """All disagreements of one merge. ``missing`` and ``extra``: path of the checkpoint -> names. ``names``: path -> the
    shapes of its tensors by their names.

    ``quantised``: path of a quantised checkpoint -> a sentence about it. ``extended``: tensors that the first has with more
    channels. They are merged if all are extended alike.
    """

    first: str
    missing: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, list[str]] = field(default_factory=dict)
    differing: list[Differing] = field(default_factory=list)
    names: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    doubtful: dict[str, list[Renaming]] = field(default_factory=dict)
    shared: dict[str, list[int]] = field(default_factory=dict)
    quantised: dict[str, str] = field(default_factory=dict)
    extended: list[Differing] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.differing)

    def count(self, path: str, common: int, ours: int, theirs: int) -> None:
        """Adds what a part of the merge has in common with a checkpoint: names of the first, of the other, of both."""
        known = self.shared.get(path, [0, 0, 0])
        self.shared[path] = [known[0] + common, known[1] + ours, known[2] + theirs]

    def rows(self, policy: str = "error", extra: bool = True) -> list[str]:
        """Sentences about names, one for each checkpoint and kind. ``extra``: also about names that the first lacks."""
        from streammerge.tensors.bundles import bundled  # here, because most inputs have the same names

        fate = "they are added" if policy == "union" else "they stay out"
        said = []
        for path in dict.fromkeys([*self.missing, *self.extra]):
            if self.missing.get(path):
                said.append(f"{printable(path)} lacks {len(self.missing[path])}: {listed(bundled(self.missing[path]))}")
            if extra and self.extra.get(path):
                whose = f"{printable(path)} has {len(self.extra[path])} that {printable(self.first)} lacks"
                said.append(f"{whose} ({fate}): {listed(bundled(self.extra[path]))}")
        return said

    def refuse(self, recipe: Recipe) -> None:
        """MismatchError with everything that the recipe's policies do not settle."""
        strangers = [path for path, known in self.shared.items() if known[0] * 20 < min(known[1:])]
        strangers = [path for path in strangers if not self._sole(path)]
        if len({(each.first.shape, each.other.shape) for each in self.extended}) > 1 or self.differing:
            self.differing += self.extended
        names = self.rows() if recipe.on_missing == "error" or strangers else []
        if not names and not self.differing:
            return
        lines = []
        if names:
            lines += ["the inputs do not have the same tensors:", *(f"  {row}" for row in names)]
        if self.differing:
            lines += ["these tensors differ between the inputs:", *_aligned([d.row for d in self.differing])]
        guesses, related = self._guesses()
        lines += [f"this looks like {guess}" for guess in guesses]
        if strangers:
            lines.append(
                f"nothing can be merged with {listed(strangers)}: next to no name is common, whatever `on_missing` says"
            )
        elif names and related:
            lines.append(
                '`on_missing="base"` (keep the first\'s), `"average-present"` (mean of those that have it), `"drop"`, or '
                "`\"union\"` (keep the first's, and add what only another has) settles names; the first checkpoint's names "
                "are the output's"
            )
        shapes = [d for d in self.differing if d.in_shape]
        if shapes:
            ways = ['`on_shape="base"` (keep the first\'s)']
            if all(d.by_rows for d in shapes):
                ways.append('`"rows"` (merge the common leading rows, keep the rest of the larger)')
            if all(d.by_blocks for d in shapes):
                ways.append(
                    '`"leading"` (merge the block that all have at the start of every axis, keep the rest of the first)'
                )
            lines.append(f"{_either(ways)} settles shapes; a rule can copy a tensor from one model, or drop it")
            if any(d.guess.startswith("vocabulary") for d in shapes):
                lines.append(
                    '`tokenizer_source="base"` or `"union"` brings the rows of several vocabularies into one order, where '
                    "each model has its tokenizer or vocabulary beside it (in a recipe, tokenizer: {source: base})"
                )
        elif self.differing:
            lines.append("a rule of a recipe settles these: it copies a tensor from one model, or drops it")
        raise MismatchError("\n".join(lines))

    def _guesses(self) -> tuple[list[str], bool]:
        """Returns what the disagreements look like, and whether a policy for names could make a right merge."""
        guesses: Counter[str] = Counter(d.guess for d in self.differing if d.guess)
        said = [f"{guess} (from the tensors that differ)" for guess in guesses]
        said += [f"quantised weights: {sentence}" for sentence in self.quantised.values()]
        related = not self.quantised
        ours = self.names.get(self.first, {})
        for path in dict.fromkeys([*self.missing, *self.extra]):
            theirs, shown = self.names.get(path, {}), printable(path)
            missing, extra = self.missing.get(path, []), self.extra.get(path, [])
            common = len(ours) - len(missing)
            if not {self.first, path}.isdisjoint(self.quantised):
                continue
            if adapter := next((each for each in (self.first, path) if is_adapter(self.names.get(each, {}))), None):
                said.append(f"an adapter (LoRA) in {printable(adapter)}: {_ADAPTER}")
                related = False
            elif part := _subfolder(missing, extra):
                said.append(f"the model of a subfolder: give {printable(path.rstrip('/'))}/{printable(part)}")
                related = False
            elif part := _subfolder(extra, missing):
                said.append(f"the model of a subfolder: give {printable(self.first.rstrip('/'))}/{printable(part)}")
                related = False
            elif fused := _fused(missing, extra):
                fused_in, apart_in = (self.first, path) if fused[0] else (path, self.first)
                said.append(_experts(fused_in, apart_in, *fused[1:]))
                related = False
            elif joined := self._joined(path, missing, extra):
                said.append(joined)
                related = False
            elif normed := self._normed(path, missing, extra):
                said.append(normed)
                related = False
            elif sole := self._sole(path):
                said.append(sole)
                related = False
            elif renamings := self._renamings(path, missing, extra):
                said += [self._prefix(path, renaming) for renaming in renamings]
            elif common * 2 < min(len(ours), len(theirs)):
                said.append(f"another architecture: {common} of {len(ours)} names are in {shown}")
                related = False
            elif common * 2 < len(ours):
                said.append(f"a part of the first: {shown} has {common} of its {len(ours)} names")
            elif deep := _depths(list(ours), list(theirs)):
                said.append(f"another depth: {deep} in {shown}")
        wide = [d for d in self.differing if d.in_shape and not d.guess]
        if len(wide) > 2 and len(wide) * 2 > len(ours):
            said.append("another size of the same architecture: most tensors differ in shape")
        return said, related

    def _joined(self, path: str, missing: Sequence[str], extra: Sequence[str]) -> str:
        """Says which tensor of the one stands for several of the other, such as a fused projection of attention."""
        ours, theirs = self.names.get(self.first, {}), self.names.get(path, {})
        for joined_in, whole, wholes, apart_in, parts, pieces in (
            (self.first, missing, ours, path, extra, theirs),
            (path, extra, theirs, self.first, missing, ours),
        ):
            beside: dict[tuple[str, str], list[str]] = {}
            for name in parts:
                beside.setdefault(_module(name), []).append(name)
            for name in whole:
                found = beside.get(_module(name), [])
                if len(found) > 1 and _is_joined(wholes.get(name), [pieces.get(each, ()) for each in found]):
                    return (
                        f"one tensor in place of {len(found)}: {printable(name)} in {printable(joined_in)} has the rows of "
                        f"{listed(found)} in {printable(apart_in)}; save one of the two again in the form of the other"
                    )
        return ""

    def _normed(self, path: str, missing: Sequence[str], extra: Sequence[str]) -> str:
        """Says which of the two has weights with torch's weight_norm, where the other has them without it."""
        from streammerge.tensors.names import spelled  # here, because it is seldom asked

        for normed_in, parts, bare_in, whole in ((self.first, missing, path, extra), (path, extra, self.first, missing)):
            there = set(map(spelled, parts))
            found = [name for name in whole if {f"{spelled(name)}_g", f"{spelled(name)}_v"} <= there]
            if found and 2 * len(found) >= len(whole):
                return (
                    f"weight_norm removed: {printable(bare_in)} has {listed(found, 2)} in one piece, and "
                    f"{printable(normed_in)} as length and direction (_g, _v); load {printable(normed_in)} in its program, "
                    "call torch.nn.utils.remove_weight_norm for each of its layers, and save it again"
                )
        return ""

    def _sole(self, path: str) -> str:
        """Says how to name the only tensor of a checkpoint as the only one of the first, such as a learned word."""
        ours, theirs = self.names.get(self.first, {}), self.names.get(path, {})
        if len(ours) != 1 or list(ours.values()) != list(theirs.values()):
            return ""
        (one,), (other,) = ours, theirs
        return (
            f"another name of the only tensor: {printable(one)} in {printable(self.first)}; if the two are the same, "
            f'`rename="{printable(other)}={printable(one)}"` says so'
        )

    def _renamings(self, path: str, missing: Sequence[str], extra: Sequence[str]) -> list[Renaming]:
        """Returns prefixes that would make most names equal, and that were not matched automatically."""
        from streammerge.tensors.matching import replacements

        known = self.doubtful.get(path, [])[:_MOST_PREFIXES]
        return known or [each for each in replacements(missing, extra) if self._fits(path, each, extra)]

    def _fits(self, path: str, renaming: Renaming, extra: Sequence[str]) -> bool:
        """Whether the tensors that a renaming matches have equal shapes. The head of a classifier is not the head of a
        language model."""
        ours, theirs = self.names.get(self.first, {}), self.names.get(path, {})
        pairs = [(renaming.ours + n.removeprefix(renaming.theirs), n) for n in extra if n.startswith(renaming.theirs)]
        return all(ours[one] == theirs[two] for one, two in pairs if one in ours and two in theirs)

    def _prefix(self, path: str, renaming: Renaming) -> str:
        one, two = (f"'{printable(prefix)}'" if prefix else "none" for prefix in (renaming.ours, renaming.theirs))
        said = f"another prefix: {one} in {printable(self.first)}, {two} in {printable(path)}"
        if "*" in renaming.ours + renaming.theirs:
            return said
        return (
            f'{said}; if the two are the same, `rename="{printable(renaming.theirs)}*={printable(renaming.ours)}*"` says so'
        )


_ADAPTER = "name it with its base model, as in `BASE+ADAPTER`"
_EXPERT = r"^(.*experts)\.(\d+)\.([^.]+)\.weight$"
_FUSED = r"^(.*experts)\.(gate_up_proj|down_proj|gate_proj|up_proj|w[123]|w13)(\.weight)?$"


def _subfolder(names: Sequence[str], others: Sequence[str]) -> str:
    """Returns the subfolder in ``others``, the tensors of a pipeline, that has most of ``names``; "" for none."""
    wanted = set(names)
    found = Counter(top for top, slash, name in (each.rpartition("/") for each in others) if slash and name in wanted)
    top, count = found.most_common(1)[0] if found else ("", 0)
    return top if 2 * count >= len(wanted) else ""


def _fused(missing: Sequence[str], extra: Sequence[str]) -> tuple[bool, str, str] | None:
    """(whether the first checkpoint has the fused experts, a fused name, a separate one); None for no experts."""
    for first_fused, fused, apart in ((True, missing, extra), (False, extra, missing)):
        one = next((name for name in fused if re.match(_FUSED, name)), None)
        each = next((name for name in apart if re.match(_EXPERT, name)), None)
        if one and each:
            return first_fused, one, each
    return None


def _experts(fused: str, apart: str, one: str, each: str) -> str:
    return (
        f"fused experts in {printable(fused)} ({printable(one)} holds all experts of a layer) and separate ones in "
        f"{printable(apart)} ({printable(each)}); save {printable(fused)} again with separate experts, in Python: "
        f"AutoModelForCausalLM.from_pretrained({printable(fused)!r}, dtype='auto')"
        f".save_pretrained({printable(fused.rstrip('/') + '-separate')!r}, save_original_format=True)"
    )


def _module(name: str) -> tuple[str, str]:
    """Returns what the projections of one layer's module have in common: the module's name, and the parameter's."""
    head, _, parameter = name.rpartition(".")
    return head.rpartition(".")[0], parameter


def _is_joined(whole: tuple[int, ...] | None, parts: Sequence[tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes, one after the other along an axis, have the shape of the whole."""
    if not whole or any(len(part) != len(whole) for part in parts):
        return False
    return any(
        sum(part[axis] for part in parts) == whole[axis]
        and all(part[:axis] + part[axis + 1 :] == whole[:axis] + whole[axis + 1 :] for part in parts)
        for axis in range(len(whole))
    )


def _depths(ours: Sequence[str], theirs: Sequence[str]) -> str:
    one, two = depths(ours), depths(theirs)
    return ", ".join(f"{printable(s)} has {n} layers against {two[s]}" for s, n in one.items() if two.get(s, n) != n)


def _either(ways: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(ways[:-1]), ways[-1]]))


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
