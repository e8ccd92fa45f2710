"""Reports of the commands, as text or as JSON. Options in them are named as they are typed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from streammerge.cli.flags import as_flags
from streammerge.cli.terminal import put, quoted, say, width
from streammerge.errors import printable
from streammerge.units import decimal_bytes

if TYPE_CHECKING:
    from streammerge.checkpoints.index import CheckpointIndex
    from streammerge.diffing.result import Diff
    from streammerge.factoring.making import AdapterResult
    from streammerge.factoring.planned import AdapterPlan
    from streammerge.methods.contracts import MergeMethod
    from streammerge.planning.plan import Plan
    from streammerge.running.execution import Result
    from streammerge.running.shared import ShareResult
    from streammerge.stores.leftovers import Leftover
    from streammerge.sweeps.results import SweepResult
    from streammerge.verifying.files import Verified


def as_json(data: Any, **form: Any) -> str:
    import json

    return json.dumps(_with_flags(data), **form)


def _with_flags(data: Any) -> Any:
    """Returns the data with options in notes and warnings named as they are typed."""
    if not isinstance(data, dict):
        return data
    return {key: [*map(as_flags, value)] if key in ("notes", "warnings") else value for key, value in data.items()}


def show_plan(plan: Plan | AdapterPlan, form: str) -> None:
    if form == "json":
        put(as_json(plan.to_json(), indent=2))
    elif form == "yaml":
        from streammerge.recipe.document import to_yaml

        put(to_yaml(plan.recipe.to_dict()), newline=False)
    elif form == "human":
        say(as_flags(str(plan)))


def report(
    result: Result | AdapterResult, form: str, told: Collection[tuple[str, str]] = (), verbose: bool = False
) -> None:
    """Reports a run. ``told``: the notes and warnings, by kind and text, that were said while it ran. ``verbose``: whether
    its plan is shown too."""
    from streammerge.cli import render
    from streammerge.running.execution import Result

    if not isinstance(result, Result):
        report_adapter(result, form, told, verbose)
    elif form == "json":
        put(as_json(render.result_json(result)))
    elif form == "human":
        _tell(result, told)
        if verbose:
            say(as_flags(str(result.plan)), err=True)
        say(render.result_text(result))


def show_share(result: ShareResult, plan: str, form: str, told: Collection[tuple[str, str]] = ()) -> None:
    """Shows what a machine has made of a plan. ``told``: see :func:`report`."""
    from streammerge.cli import render

    if form == "json":
        put(as_json(render.share_json(result)))
    elif form == "human":
        _tell(result, told)
        say(render.share_text(result))
        if not result.left and not result.finished:
            say(f"all units are made; `streammerge finish {quoted(plan)}` makes the output visible", err=True)


def report_adapter(result: AdapterResult, form: str, told: Collection[tuple[str, str]] = (), verbose: bool = False) -> None:
    """Reports an adapter that was made. ``verbose``: whether all its layers are shown."""
    from streammerge.cli import render

    if form == "json":
        put(as_json(render.adapter_json(result)))
    elif form == "human":
        _tell(result, told)
        say(render.adapter_text(result, verbose))


def _tell(result: Result | AdapterResult | ShareResult, told: Collection[tuple[str, str]]) -> None:
    """Says the notes and warnings that were not said while it ran."""
    for kind, texts in (("note", result.notes), ("warning", result.warnings)):
        for text in texts:
            if (kind, text) not in told:
                say(f"{kind}: {as_flags(text)}", err=True)


def show_verified(verified: Verified, form: str) -> None:
    from streammerge.cli import render

    if form == "json":
        put(as_json(render.verified_json(verified)))
    elif form == "human":
        say(as_flags(str(verified)))


def show_diff(diff: Diff, form: str, tensors: bool, told: Collection[tuple[str, str]] = ()) -> None:
    """Shows a comparison, with every layer and the ``tensors``. ``told``: see :func:`report`."""
    if form == "json":
        put(as_json(diff.to_json(tensors), indent=2))
    elif form == "human":
        for kind, texts in (("note", diff.notes), ("warning", diff.warnings)):
            for text in texts:
                if (kind, text) not in told:
                    say(f"{kind}: {as_flags(text)}", err=True)
        say(diff.text(tensors))


def show_sweep(result: SweepResult, form: str) -> None:
    if form == "json":
        put(as_json(result.to_json(), indent=2))
    elif form == "human":
        say(as_flags(str(result)))


def show_indexes(indexes: list[CheckpointIndex], form: str, tensors: bool, recipe: bool) -> None:
    """Shows the contents of checkpoints, with their ``tensors``, or only the ``recipe`` that each holds."""
    from streammerge.cli import render

    if recipe:
        put("---\n".join(render.recipe_text(index) for index in indexes), newline=False)
    elif form == "json":
        shown = [_with_flags(render.index_json(index, tensors)) for index in indexes]
        put(as_json(shown[0] if len(shown) == 1 else shown, indent=2))
    elif form == "human":
        say("\n\n".join(render.index_text(index, tensors) for index in indexes))


def show_lineages(paths: Sequence[str], form: str) -> None:
    """Shows what outputs were merged from, as trees."""
    from streammerge.stores.locations import parse
    from streammerge.verifying.lineage import lineage

    found = [lineage(parse(path)) for path in paths]
    if form == "json":
        shown = [each.to_json() for each in found]
        put(as_json(shown[0] if len(shown) == 1 else shown, indent=2))
    elif form == "human":
        say("\n\n".join(map(str, found)))


def show_leftovers(found: Sequence[Leftover], form: str, hint: str = "") -> None:
    """Shows runs that go on or were interrupted. ``hint``: what to do about them."""
    if form == "json":
        put(as_json({"runs": [_leftover_json(each) for each in found]}, indent=2))
        return
    for each in found:
        say(str(each))
    if not found:
        say("no run is going on here, and none was interrupted")
    if hint:
        say(hint, err=True)


def _leftover_json(found: Leftover) -> dict[str, Any]:
    return {
        "out": str(found.out),
        "folder": str(found.folder),
        "user": found.user,
        "running": None if found.owner is None else str(found.owner),
        "kept_bytes": found.kept_bytes,
        "changed": found.changed,
    }


def show_cleaned(removed: Sequence[Leftover]) -> None:
    """Shows what was removed."""
    for each in removed:
        say(f"removed what a run into {printable(each.out)} had left ({decimal_bytes(each.kept_bytes)})")


def show_methods(methods: list[MergeMethod], form: str) -> None:
    from streammerge.cli import pages

    if form == "json":
        put(as_json([pages.method_json(method) for method in methods], indent=2))
    else:
        say(pages.methods_table(methods))


def show_method(method: MergeMethod, form: str) -> None:
    from streammerge.cli import pages

    if form == "json":
        put(as_json(pages.method_json(method), indent=2))
    else:
        say(pages.method_page(method, width()))
