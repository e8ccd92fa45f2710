"""A recipe as readable text, for the plan."""

from __future__ import annotations

from streammerge.errors import printable
from streammerge.methods.contracts import FALSE
from streammerge.methods.registry import LINEAR
from streammerge.recipe.model import Model, Recipe, Slice, SliceSource
from streammerge.recipe.settings import Setting, SettingKind, Settings


def recipe_lines(recipe: Recipe) -> list[str]:
    """Returns the models with their own parameters, then the shared parameters."""
    lines = _models(recipe, recipe.models)
    if recipe.experts:
        lines.append(f"  {printable(recipe.base_model)}  base")
        lines += [f"  {printable(each.source_model)}  expert {number}" for number, each in enumerate(recipe.experts)]
        lines += [f"  {printable(each.source_model)}  shared expert" for each in recipe.shared_experts]
        lines.append(f"routers  {printable(recipe.gate_file) if recipe.gate_file else f'by {recipe.gate_mode}'}")
    lines += _slices(recipe, recipe.slices)
    for name, module in recipe.modules.items():
        lines += [f"  module {printable(name)}{_after(module.parameters)}"]
        lines += [f"  {line}" for line in (*_models(recipe, module.models), *_slices(recipe, module.slices))]
    if recipe.rename:
        lines.append(f"rename   {', '.join(printable(each) for each in recipe.rename)}")
    if recipe.parameters:
        lines.append(f"with     {_shown_all(recipe.parameters)}")
    return lines


def stage_lines(recipe: Recipe) -> list[str]:
    """Returns the stages that the recipe needs, each with its models, in the order of computing."""
    if not recipe.stages:
        return []
    from streammerge.recipe.stages import stages_used

    lines = []
    for name in stages_used(recipe):
        stage = recipe.stages[name]
        how = ("a mixture of experts" if stage.experts else f"by {stage.merge_method.name}") + (
            "" if stage.round else ", not rounded"
        )
        how += f", as {stage.recast.torch_name}" if stage.recast else ""
        lines += [f"stage    {printable(name)}: {how}", *(f"  {line}" for line in recipe_lines(stage))]
    return lines


def rule_lines(recipe: Recipe, taken: list[int]) -> list[str]:
    """Returns one line per rule, with the number of tensors that it took."""
    rules = [(printable(rule), printable(rule.action) + _after(rule.parameters)) for rule in recipe.rules]
    width = max((len(what) for what, _ in rules), default=0)
    return [f"rule     {what:<{width}}  {count:>5} {how}" for (what, how), count in zip(rules, taken, strict=True)]


def weight_notes(recipe: Recipe) -> list[str]:
    """Returns a note that weights are divided by their sum, if they were given and the division changes them."""
    if recipe.merge_method is not LINEAR or not _normalizes(recipe):
        return []
    weights = _weights(recipe)
    if weights and abs(sum(weights) - 1) > 1e-9:
        return [f"the weights sum to {sum(weights):.6g} and are divided by it (`normalize=False` uses them as given)"]
    return []


def _models(recipe: Recipe, models: tuple[Model, ...]) -> list[str]:
    rows = [(_named(entry), _own(recipe, entry)) for entry in models]
    base = recipe.base
    if base is not None and models:
        place = next((n for n, entry in enumerate(models) if recipe.of(entry).same(base)), None)
        first = (printable(base.path), "") if place is None else rows.pop(place)
        rows.insert(0, (first[0], "base" if recipe.based or not first[1] else first[1]))
    width = max((len(path) for path, _ in rows), default=0)
    return [f"  {path:<{width}}  {said}".rstrip() for path, said in rows]


def _named(entry: Model | SliceSource) -> str:
    return printable(entry.model) + (f" ({printable(entry.state_dict)})" if entry.state_dict else "")


def _slices(recipe: Recipe, slices: tuple[Slice, ...]) -> list[str]:
    lines, start = [], 0
    for each in slices:
        count = each.sources[0].layer_range[1] - each.sources[0].layer_range[0]
        lines.append(f"  layers {start} to {start + count - 1}{_after(each.parameters)}")
        for source in each.sources:
            first, stop = source.layer_range
            lines.append(f"    {_named(source)}  its {first} to {stop - 1}  {_own(recipe, source)}".rstrip())
        start += count
    return lines


def _own(recipe: Recipe, entry: Model | SliceSource) -> str:
    """Formats a model's own parameters; its weight is the share in a weighted mean."""
    own = {name: _shown(setting) for name, setting in entry.parameters.items()}
    weights = _weights(recipe)
    if isinstance(entry, Model) and recipe.merge_method is LINEAR and recipe.models:
        equal = [1.0] * len(recipe.models) if "weight" not in recipe.parameters else []
        shares = weights or (equal if not any("weight" in m.parameters for m in recipe.models) else [])
        place = next(n for n, model in enumerate(recipe.models) if model is entry)
        if shares and sum(shares) and _normalizes(recipe):
            own["weight"] = f"{shares[place] / sum(shares):.6g}"
    if entry.rename:
        own["rename"] = ", ".join(printable(each) for each in entry.rename)
    return ", ".join(f"{name} {value}" for name, value in own.items())


def _weights(recipe: Recipe) -> list[float]:
    """Returns the weight of each model if all are plain numbers, else an empty list."""
    found = [_number(model.parameters.get("weight")) for model in recipe.models]
    return [w for w in found if w is not None] if None not in found else []


def _number(setting: Setting | None) -> float | None:
    if setting is None or len(setting) != 1 or setting[0].filter is not None:
        return None
    value = setting[0].value
    try:
        return None if isinstance(value, tuple) else float(value)
    except ValueError:
        return None


def _normalizes(recipe: Recipe) -> bool:
    setting = recipe.parameters.get("normalize")
    return setting is None or str(setting[0].value).lower() not in FALSE


def _after(settings: Settings) -> str:
    return f"  with {_shown_all(settings)}" if settings else ""


def _shown_all(settings: Settings) -> str:
    return ", ".join(f"{printable(name)} {_shown(setting)}" for name, setting in settings.items())


def _shown(setting: Setting) -> str:
    value = SettingKind().dump(setting)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        cases = [f"{case['value']}" + (f" for {printable(case['filter'])}" if case.get("filter") else "") for case in value]
        return ", else ".join(cases)
    return printable(str(value).lower() if isinstance(value, bool) else value)
