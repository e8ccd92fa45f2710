"""Which tensor of which checkpoint goes into which tensor of the output. Headers only; nothing is read.

Every disagreement is found here, before a byte is written, and reported in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from streammerge.checkpoint import CheckpointIndex
from streammerge.dtypes import DType
from streammerge.errors import MismatchError, RecipeError, listed, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY, INTEGERS
from streammerge.names import describe_match, ignored_by_loader, match_names
from streammerge.recipe import Recipe
from streammerge.statedict import unread_tensors
from streammerge.tensors import TensorEntry, TensorSpec

_WIDE = (DType.F64, DType.C128)


@dataclass(slots=True)
class Merged:
    """One tensor of the output: what it is, from what it is made, and how.

    ``base_names`` are its names in the first checkpoint, more than one when tied; ``tied`` its further output names.
    """

    base_names: tuple[str, ...]
    spec: TensorSpec
    method: MergeMethod
    sources: tuple[TensorEntry, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    compute: str = "float32"
    based: bool = False
    tied: tuple[str, ...] = ()


@dataclass(slots=True)
class Alignment:
    merged: list[Merged]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def align(recipe: Recipe, indexes: list[CheckpointIndex]) -> Alignment:
    """The output's tensors, in the first checkpoint's order. Raises MismatchError and RecipeError."""
    base, others = indexes[0], indexes[1:]
    alignment = Alignment([])
    for index in indexes:
        unread = unread_tensors(index.extras) if index.extras is not None else []
        if unread:
            raise MismatchError(
                f"{printable(index.path)} holds {unread[0][1]} tensors ({listed([name for name, _ in unread])}), "
                "which are not merged or converted; save it again with ordinary ones"
            )
    matches = [match_names(base.entries, other.entries) for other in others]
    for other, matched in zip(others, matches, strict=True):
        alignment.notes += [f"{printable(other.path)}: {text}" for text in describe_match(matched)]
    ties = _shared_ties(base, others, matches, alignment)
    names = _names(recipe, base, others, matches, ties, alignment)
    taken = [name for name in names if recipe.takes(name)]
    if not taken:
        raise RecipeError(
            "--keep and --drop leave no tensor over" if names else f"{printable(base.path)} has no tensors to merge"
        )
    tied_to: dict[str, list[str]] = {}
    kept = set(taken)
    for name in taken:
        if ties.get(name) in kept:
            tied_to.setdefault(ties[name], []).append(name)
    problems: list[str] = []
    for name in taken:
        if ties.get(name) in kept:
            continue
        sources = _sources(name, base, others, matches)
        problem = _disagreement(name, sources, indexes)
        if problem:
            problems.append(problem)
            continue
        alignment.merged.append(_merged(recipe, (name, *tied_to.get(name, ())), sources))
    if problems:
        raise MismatchError(_table("these tensors differ between the inputs", problems))
    _check_output_names(alignment.merged)
    alignment.warnings += _idle_patterns(recipe, list(base.entries))
    return alignment


def _idle_patterns(recipe: Recipe, names: list[str]) -> list[str]:
    """Warnings about patterns that met no tensor."""
    idle = [f"--keep {p}" for p in recipe.keep if not any(fnmatchcase(n, p) for n in names)]
    idle += [f"--drop {p}" for p in recipe.drop if not any(fnmatchcase(n, p) for n in names)]
    if recipe.strip_prefix and not any(n.startswith(recipe.strip_prefix) for n in names):
        idle.append(f"--strip-prefix {recipe.strip_prefix}")
    return [f"no tensor's name matches {listed(idle)}"] if idle else []


def _names(
    recipe: Recipe,
    base: CheckpointIndex,
    others: list[CheckpointIndex],
    matches: list[dict[str, str]],
    ties: dict[str, str],
    alignment: Alignment,
) -> list[str]:
    """The first checkpoint's names that go into the output, after the policy for tensors that are not everywhere."""
    partial: dict[str, list[str]] = {}
    problems = []
    for other, matched in zip(others, matches, strict=True):
        taken = [n for n in base.entries if recipe.takes(n)]
        missing = [n for n in taken if n not in matched and not (n in ties and ties[n] in matched)]
        used = set(matched.values())
        extra = [n for n in other.entries if n not in used and other.aliases.get(n) not in used and recipe.takes(n)]
        for name in missing:
            partial.setdefault(name, []).append(str(other.path))
        missing, extra = ([n for n in names if not ignored_by_loader(n)] for names in (missing, extra))
        if missing:
            problems.append(f"{printable(other.path)} lacks {len(missing)}: {listed(missing)}")
        if extra:
            whose = f"{printable(other.path)} has {len(extra)} that {printable(base.path)} lacks"
            problems.append(f"{whose} (they stay out): {listed(extra)}")
    if problems and recipe.on_missing == "error":
        how = "--on-missing base (keep the first's), average-present (mean of those that have it) or drop settles it"
        raise MismatchError(_table("the inputs do not have the same tensors", problems) + f"\n{how}")
    alignment.warnings += [f"--on-missing {recipe.on_missing}: {problem}" for problem in problems]
    optional = [n for n in partial if ignored_by_loader(n)]
    if optional:
        alignment.notes.append(
            f"{len(optional)} tensors that the XTTS loader ignores ({optional[0].split('.')[0]}.*, ...) are not in every "
            "input; they are kept as in the first"
        )
    if recipe.on_missing == "drop":
        return [n for n in base.entries if n not in partial or ignored_by_loader(n)]
    return list(base.entries)


def _shared_ties(
    base: CheckpointIndex, others: list[CheckpointIndex], matches: list[dict[str, str]], alignment: Alignment
) -> dict[str, str]:
    """Ties of the first checkpoint that hold in every one: name -> the name it is tied to."""
    ties, parted = {}, []
    for name, first in base.aliases.items():
        for other, matched in zip(others, matches, strict=True):
            if (
                name in matched
                and first in matched
                and other.entries[matched[name]].place != other.entries[matched[first]].place
            ):
                parted.append(name)
                break
        else:
            ties[name] = first
    if parted:
        alignment.warnings.append(
            f"{listed(parted)}: tied in {printable(base.path)} but separate in another input, "
            "so merged separately and no longer tied"
        )
    return ties


def _sources(
    name: str, base: CheckpointIndex, others: list[CheckpointIndex], matches: list[dict[str, str]]
) -> list[TensorEntry | None]:
    """The tensor in each checkpoint; None where it is missing."""
    found: list[TensorEntry | None] = [base.entries[name]]
    for other, matched in zip(others, matches, strict=True):
        theirs = matched.get(name) or matched.get(base.aliases.get(name, name))
        found.append(other.entries[theirs] if theirs else None)
    return found


def _disagreement(name: str, sources: list[TensorEntry | None], indexes: list[CheckpointIndex]) -> str | None:
    """What is wrong with these tensors being merged, if anything."""
    present = [(s, i) for s, i in zip(sources, indexes, strict=True) if s is not None]
    first = present[0][0].spec
    for source, index in present[1:]:
        spec = source.spec
        where = f"{printable(name)}: "
        if spec.shape != first.shape:
            return (
                where
                + f"{list(first.shape)} in the first, {list(spec.shape)} in {printable(index.path)}{_guess(first, spec)}"
            )
        if spec.dtype.kind != first.dtype.kind or (first.dtype.kind != "float" and spec.dtype != first.dtype):
            return where + f"{first.dtype.torch_name} in the first, {spec.dtype.torch_name} in {printable(index.path)}"
    return None


def _guess(one: TensorSpec, two: TensorSpec) -> str:
    text = one.name.lower()
    if len(one.shape) == len(two.shape) and one.shape[1:] == two.shape[1:]:
        if any(part in text for part in ("embed", "lm_head", "text_head", "wte", "vocab")):
            return f" (vocabulary {one.shape[0]} against {two.shape[0]})"
        return ""
    if len(one.shape) == 4 and len(two.shape) == 4 and {one.shape[1], two.shape[1]} & {9}:
        return " (an inpainting model against an ordinary one)"
    return ""


def _merged(recipe: Recipe, names: tuple[str, ...], sources: list[TensorEntry | None]) -> Merged:
    name, tied = names[0], tuple(map(recipe.output_name, names[1:]))
    base = next(s for s in sources if s is not None).spec
    absent_here = any(s is None for s in sources) and (recipe.on_missing == "base" or ignored_by_loader(name))
    present = tuple(s for s in sources if s is not None)
    dtype = base.dtype
    if recipe.out_dtype is not None and dtype.kind == "float":
        dtype = recipe.out_dtype
    spec = replace(base, name=recipe.output_name(name), dtype=dtype)
    models = [number for number, s in enumerate(sources[recipe.based :]) if s is not None]
    if recipe.method is COPY or absent_here or len(models) < recipe.method.models[0]:
        return Merged(names, spec, COPY, present[:1], tied=tied)
    if base.dtype.kind not in ("float", "complex"):
        policy = recipe.integers or ("max" if name.endswith("num_batches_tracked") else "error")
        if policy == "max" and base.dtype.kind == "packed":
            raise MismatchError(f"{printable(name)} holds packed {base.dtype} values, of which there is no largest")
        if len(present) == 1:
            return Merged(names, spec, COPY, present, tied=tied)
        return Merged(names, spec, INTEGERS, present, {"policy": policy}, tied=tied)
    wide = any(s.spec.dtype in _WIDE for s in present)
    preferred = recipe.compute_dtype.torch_name if recipe.compute_dtype else recipe.method.compute
    compute = "float64" if wide else preferred
    values = _values(recipe, name, models)
    return Merged(names, spec, recipe.method, present, values, compute, recipe.based, tied)


def _values(recipe: Recipe, name: str, models: list[int]) -> dict[str, Any]:
    """The method's parameters for the models that have the tensor."""
    if len(models) == len(recipe.models):
        return recipe.values
    per_model = {p.name for p in recipe.method.parameters.values() if p.per_model}
    values = {n: [v[m] for m in models] if n in per_model and v is not None else v for n, v in recipe.values.items()}
    try:
        return recipe.method.resolve(values, len(models))
    except RecipeError as error:
        raise RecipeError(f"for the inputs that have {printable(name)}: {error}") from error


def _check_output_names(merged: list[Merged]) -> None:
    seen: set[str] = set()
    for name in (n for m in merged for n in (m.spec.name, *m.tied)):
        if name in seen:
            raise RecipeError(f"two tensors would be called {printable(name)} in the output; change --strip-prefix")
        seen.add(name)


def _table(title: str, rows: list[str]) -> str:
    shown = rows[:20] + ([f"and {len(rows) - 20} more"] if len(rows) > 20 else [])
    return title + ":\n" + "\n".join(f"  {row}" for row in shown)
