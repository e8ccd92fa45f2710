"""Whether a checkpoint's tensors can stand in the container of another one: the same names, in the same shapes."""

from __future__ import annotations

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, listed, printable
from streammerge.recipe.model import Recipe
from streammerge.tensors.matching import match
from streammerge.tensors.names import why_ignored
from streammerge.tensors.spec import TensorSpec
from streammerge.units import counted, inflected


def check_likeness(recipe: Recipe, like: CheckpointIndex, given: CheckpointIndex) -> list[str]:
    """Returns notes about numbers that are rounded to the dtype of ``like``. Raises MismatchError for tensors that only one
    of the two has, or that have another shape.

    Tensors of ``like`` that a rule leaves out may be missing. So may tensors of ``given`` that every loader ignores.
    """
    ours = {name: entry.spec for name, entry in like.entries.items()}
    theirs = {name: entry.spec for name, entry in given.entries.items()}
    names = match(*({name: spec.shape for name, spec in specs.items()} for specs in (ours, theirs))).names
    used = set(names.values())
    found = {name: names.get(name, names.get(like.aliases.get(name, name))) for name in ours if not _drops(recipe, name)}
    missing = [name for name, other in found.items() if other is None]
    foreign = [
        name
        for name, spec in theirs.items()
        if name not in used and given.aliases.get(name) not in used and not why_ignored(name, spec.shape)
    ]
    reshaped = [name for name, other in found.items() if other is not None and theirs[other].shape != ours[name].shape]
    said = [f"lacks {listed(missing)}"] if missing else []
    said += [f"has {listed(foreign)} besides"] if foreign else []
    said += [f"has other shapes of {listed(reshaped)}"] if reshaped else []
    if said:
        labels = [candidate.label for candidate in like.selection.candidates if not candidate.barred]
        chosen = f", of which {printable(like.selection.label)} was taken (`state_dict` takes another)"
        several = f"; {printable(like.path)} holds {listed(labels)}{chosen}" if len(labels) > 1 else ""
        raise MismatchError(
            f"{printable(given.path)} does not fit into {printable(like.path)}: it {' and '.join(said)}; "
            f"leave out with `drop` what it lacks, and give a checkpoint of the same model{several}"
        )
    rounded = [name for name, other in found.items() if other is not None and _is_narrower(ours[name], theirs[other])]
    if recipe.recast is not None or not rounded:
        return []
    return [
        f"{counted(len(rounded), 'tensor')} ({listed(rounded, 2)}) {inflected(len(rounded), 'is', 'are')} rounded to the "
        f"dtype that {printable(like.path)} has; `dtype` sets another one"
    ]


def _drops(recipe: Recipe, name: str) -> bool:
    rule = next((rule for rule in recipe.rules if rule.takes(name)), None)
    return rule is not None and rule.drop


def _is_narrower(one: TensorSpec, other: TensorSpec) -> bool:
    return one.dtype.kind == other.dtype.kind == "float" and one.dtype.bits < other.dtype.bits
