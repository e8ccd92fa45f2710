"""Checks of a recipe that need no file. They report all mistakes, each with its key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from streammerge.errors import RecipeError, listed, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.factors import EXTRACT
from streammerge.recipe.adapted import resolved
from streammerge.recipe.experts import GATES, HIDDEN
from streammerge.recipe.extraction import Extraction
from streammerge.recipe.fields import Path, Positions, Problems, is_misspelled, position_of
from streammerge.recipe.model import Model, Recipe, Slice, SliceSource
from streammerge.recipe.scalars import parameter_docs
from streammerge.recipe.settings import Settings, check_setting

Adapters = Callable[[Sequence[str]], bool]
"""Tells whether all of these models are adapters."""


def no_adapters(models: Sequence[str]) -> bool:
    return False


def check(recipe: Recipe, problems: Problems, as_mergekit: bool = False, adapters: Adapters = no_adapters) -> None:
    """Adds every mistake of the recipe to the problems. ``as_mergekit``: warns of what mergekit ignores. ``adapters``:
    whether models are adapters, whose base is zero if the recipe has none."""
    ways = [name for name in ("models", "slices", "modules") if getattr(recipe, name)]
    unread = any(path[:1] in (("models",), ("slices",), ("modules",)) for path, _ in problems)
    if len(ways) > 1 or not (ways or unread):
        said = " and ".join(ways) + " are given" if ways else "there is nothing to merge"
        problems.add((ways[-1],) if ways else (), f"{said}; a recipe has one of models, slices and modules")
    unreadable = list(problems)
    for path, entries, slices, _ in _parts(recipe):
        if path and bool(entries) == bool(slices) and not any(at[: len(path)] == path for at, _ in unreadable):
            problems.add(path, "a module has either models or slices")
        if entries and not _has_unread((*path, "models"), unreadable):
            _count(recipe, entries, recipe.base_model, path, problems, adapters)
        for each in slices:
            if each.sources and not _has_unread((*each.path, "sources"), unreadable):
                _check_slice(recipe, each, problems)
    if recipe.merge_method is not EXTRACT and recipe.extract != Extraction():
        only_energy = recipe.extract == Extraction(energy=recipe.extract.energy)
        if not only_energy or not adapters([each.model for each in recipe.models]):
            problems.add(
                ("extract",),
                "extract says what the method of that name makes, and its energy what adapters alone are cut to; add "
                "merge_method: extract",
            )
    if recipe.tokenizer_source and recipe.tokenizer:
        problems.add(("tokenizer",), "tokenizer_source and tokenizer are given; a recipe has one of them")
    _check_parameters(recipe, problems, as_mergekit)
    if as_mergekit:
        _warn_of_weights(recipe, problems)
    _check_rules(recipe, problems)


def check_experts(recipe: Recipe, problems: Problems) -> None:
    """Adds every mistake of a mixture of experts to the problems."""
    ways = [
        name for name in ("models", "slices", "modules", "rules", "tokenizer_source", "tokenizer") if getattr(recipe, name)
    ]
    for name in ways:
        problems.add((name,), f"a mixture of experts has no {name}; make the mixture a stage of a recipe that has them")
    if recipe.base_model is None:
        problems.add((), "a mixture of experts needs base_model, which gives all tensors but the experts'")
    wanted = recipe.experts_per_token or 2
    if len(recipe.experts) < wanted:
        problems.add(("experts",), f"{wanted} experts per token are more than the {len(recipe.experts)} experts")
    if recipe.gate_file is None and recipe.gate_mode in HIDDEN:
        problems.add(
            ("gate_mode",),
            f"gate_mode {recipe.gate_mode} needs a run of the base model, which is not made here; take one of "
            f"{listed(list(GATES))}, or give the routers by gate_file",
        )
    if recipe.gate_file is not None or recipe.gate_mode != "cheap_embed":
        return
    known: dict[object, int] = {}
    for number, each in enumerate(recipe.experts):
        if not each.positive_prompts:
            problems.add(each.path, "gate_mode cheap_embed needs positive_prompts for each expert")
        elif known.setdefault((each.positive_prompts, each.negative_prompts), number) != number:
            problems.add(each.path, "two experts have the same prompts, so their routers would be equal")


def raise_all(problems: Problems, positions: Positions, name: str = "the recipe") -> None:
    """Raises RecipeError with all problems, in the order of the file. Returns if there are none."""
    found = [(position_of(path, positions), message) for path, message in dict.fromkeys(problems)]
    found.sort(key=lambda each: each[0][1:] if each[0] else (0, 0))
    rows = [f"{place or ''}{message}" for place, message in found]
    if len(rows) == 1:
        raise RecipeError(rows[0])
    if rows:
        raise RecipeError(f"{name} has {len(rows)} mistakes:\n" + "\n".join(f"  {row}" for row in rows))


def ignored(problems: Problems, positions: Positions) -> tuple[str, ...]:
    """Returns the warnings with their places in the file."""
    return tuple(f"{position_of(path, positions) or ''}{said}" for path, said in dict.fromkeys(problems.warnings))


def _has_unread(path: Path, problems: Sequence[tuple[Path, str]]) -> bool:
    """Whether an entry of this list could not be read, so the number of entries is unknown."""
    return any(at[:-1] == path and isinstance(at[-1], int) for at, _ in problems)


_Part = tuple[Path, tuple[Model, ...], tuple[Slice, ...], Settings]


def _parts(recipe: Recipe) -> Iterator[_Part]:
    yield (), recipe.models, recipe.slices, {}
    for name, module in recipe.modules.items():
        yield module.path or ("modules", name), module.models, module.slices, module.parameters


_Entries = Sequence[Model | SliceSource]


def _count(
    recipe: Recipe, entries: _Entries, base: str | None, path: Path, problems: Problems, adapters: Adapters = no_adapters
) -> None:
    """Checks the number of models, and the base, against the method."""
    method = recipe.merge_method
    if base is None and method.base == "required" and not adapters([entry.model for entry in entries]):
        problems.add(path, f"{method.name} needs the models' common ancestor; name it as the base")
    # As in mergekit, a base that the method does not use counts as one more model if it has a weight.
    joins = method.base == "unused" and _models(recipe, method, entries, base) > len(entries)
    if joins and "weight" not in recipe.parameters:
        hint = f"leave it out, or give {printable(base)} as a model too"
        problems.add(("base_model",), f"{method.name} takes no base; {hint}")
    if wrong := _wrong_count(recipe, method, entries, base):
        problems.add(path or ("models",), wrong)


def _models(recipe: Recipe, method: MergeMethod, entries: _Entries, base: str | None) -> int:
    """Returns the number of models for the method: without a separate base, or with a base that is not listed."""
    listed = _lists(entries, base)
    if method.takes_base or recipe.base_apart(listed):
        return len(entries) - listed
    return len(entries) + (base is not None and not listed and isinstance(entries[0], Model))


def _lists(entries: _Entries, base: str | None) -> bool:
    place = None if base is None else resolved(base)
    return any(resolved(entry.model) == place for entry in entries)


def _wrong_count(recipe: Recipe, method: MergeMethod, entries: _Entries, base: str | None) -> str | None:
    try:
        method.check_models(_models(recipe, method, entries, base))
    except RecipeError as error:
        return str(error)
    return None


def _check_slice(recipe: Recipe, each: Slice, problems: Problems) -> None:
    lengths = {source.layer_range[1] - source.layer_range[0] for source in each.sources if any(source.layer_range)}
    if len(lengths) > 1:
        ranges = ", ".join(f"{s.layer_range[1] - s.layer_range[0]} of {s.model}" for s in each.sources)
        problems.add(each.path, f"all sources of a slice must have the same number of layers, not {ranges}")
    base = each.base_model or recipe.base_model
    _count(recipe, each.sources, base, each.path, problems)
    if base is not None and recipe.merge_method.base != "unused" and not _lists(each.sources, base):
        problems.add(each.path, f"the base {printable(base)} must be among the sources, because they name its layers")


def _levels(recipe: Recipe) -> Iterator[tuple[Path, Settings, bool]]:
    """Yields every place of parameters: path, settings, and whether they belong to one model."""
    yield ("parameters",), recipe.parameters, False
    for path, entries, slices, settings in _parts(recipe):
        if settings:
            yield (*path, "parameters"), settings, False
        for entry in entries:
            yield (*entry.path, "parameters"), entry.parameters, True
        for each in slices:
            yield (*each.path, "parameters"), each.parameters, False
            for source in each.sources:
                yield (*source.path, "parameters"), source.parameters, True


def _check_parameters(recipe: Recipe, problems: Problems, as_mergekit: bool) -> None:
    methods = [recipe.merge_method, *(rule.merge_method for rule in recipe.rules if rule.merge_method)]
    given: set[str] = set()
    for path, settings, own in _levels(recipe):
        for name, setting in settings.items():
            parameter = next((m.parameters[name] for m in methods if name in m.parameters), None)
            misplaced = own and parameter is not None and not parameter.per_model
            say = problems.add
            if as_mergekit and (misplaced or (parameter is None and _is_ignored(name))):
                say = problems.warn
            if parameter is None:
                ignored = f", so {printable(name)} is ignored, as in mergekit" if say == problems.warn else ""
                say((*path, name), _unknown(recipe.merge_method, name) + ignored)
            elif misplaced:
                said = f"{name} cannot differ between models" + (", so it is ignored here" if say == problems.warn else "")
                say((*path, name), f"{said}; put it under parameters of the recipe or a slice")
                continue
            elif wrong := check_setting(setting, parameter):
                problems.add((*path, name), wrong)
            given.add(name)
    for rule in recipe.rules:
        given |= set(rule.parameters) if rule.merge_method is None else set()
    for name, parameter in recipe.merge_method.parameters.items():
        if parameter.required and name not in given:
            problems.add(("merge_method",), recipe.merge_method.lack(name))


def _is_ignored(name: str) -> bool:
    """Whether a parameter that the method lacks is another method's, or none at all; not a misspelled one."""
    known = parameter_docs()
    return name in known or not is_misspelled(name, known)


def _warn_of_weights(recipe: Recipe, problems: Problems) -> None:
    """Warns of models without a weight beside models with one, where mergekit stops."""
    if "weight" not in recipe.merge_method.parameters or "weight" in recipe.parameters:
        return
    places: list[tuple[Path, _Entries, Settings]] = []
    for path, entries, slices, settings in _parts(recipe):
        places.append(((*path, "models"), entries, settings))
        places += [(each.path, each.sources, {**settings, **each.parameters}) for each in slices]
    for path, found, shared in places:
        ours = [entry for entry in found if not (recipe.based and _lists([entry], recipe.base_model))]
        without = [entry.model for entry in ours if "weight" not in entry.parameters]
        if "weight" not in shared and 0 < len(without) < len(ours):
            problems.warn(path, f"{listed(without)} has no weight beside models that have one; it counts as 1")


def _unknown(method: MergeMethod, name: Any) -> str:
    return f"{method.name} has no parameter {printable(name)}; {method.hint(name)}"


def _check_rules(recipe: Recipe, problems: Problems) -> None:
    for rule in recipe.rules:
        method = rule.merge_method or recipe.merge_method
        actions = [name for name in ("copy", "drop", "merge_method") if getattr(rule, name)]
        actions += ["parameters"] if rule.parameters and "merge_method" not in actions else []
        if len(actions) > 1:
            problems.add(rule.path, f"a rule does one thing, not {' and '.join(actions)}")
        if rule.rename and not rule.copy:
            problems.add(rule.path, "rename in a rule is about the model that the rule copies from; add copy")
        if rule.drop and rule.dtype:
            problems.add(rule.path, "a dropped tensor has no dtype; give either drop or dtype")
        for name, setting in rule.parameters.items():
            path = (*rule.path, "parameters", name)
            if name not in method.parameters:
                problems.add(path, _unknown(method, name))
            elif wrong := check_setting(setting, method.parameters[name]):
                problems.add(path, wrong)
        if rule.merge_method:
            _check_rule_method(recipe, rule.merge_method, rule.path, problems)


def _check_rule_method(recipe: Recipe, method: MergeMethod, path: Path, problems: Problems) -> None:
    """Checks a rule's own method: its base, its number of models, and its required parameters."""
    parts = list(_parts(recipe))
    bases = [recipe.base_model, *(each.base_model for _, _, slices, _ in parts for each in slices)]
    if method.base == "required" and not any(bases):
        problems.add(path, f"{method.name} needs the models' common ancestor; name it as base_model")
        return
    for where, entries, slices, _ in parts:
        groups: list[tuple[_Entries, str | None]] = [(entries, recipe.base_model)]
        groups += [(each.sources, each.base_model or recipe.base_model) for each in slices]
        for found, base in groups if not _has_unread((*where, "models"), problems) else ():
            wrong = _wrong_count(recipe, method, found, base) if found else None
            if wrong is not None:
                problems.add(path, wrong)
                return
    known = {name for _, settings, _ in _levels(recipe) for name in settings}
    rule = next(rule for rule in recipe.rules if rule.path == path and rule.merge_method is method)
    for name, parameter in method.parameters.items():
        if parameter.required and name not in known and name not in rule.parameters:
            problems.add(path, method.lack(name))
