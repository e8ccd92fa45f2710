"""How a command reports: a plan, a result, as text or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.terminal import say

if TYPE_CHECKING:
    from streammerge.planning.plan import Plan
    from streammerge.running.execution import Result


def as_json(data: Any, **form: Any) -> str:
    import json

    return json.dumps(data, **form)


def show_plan(plan: Plan, form: str) -> None:
    if form == "json":
        click.echo(as_json(plan.to_json(), indent=2))
    elif form == "yaml":
        from streammerge.recipe.document import to_yaml

        click.echo(to_yaml(plan.recipe.to_dict()), nl=False)
    elif form == "human":
        say(str(plan))


def report(result: Result, form: str) -> None:
    from streammerge.cli import render

    if form == "json":
        click.echo(as_json(render.result_json(result)))
    elif form == "human":
        for note in result.notes:
            say(f"note: {note}", err=True)
        for warning in result.warnings:
            say(f"warning: {warning}", err=True)
        say(render.result_text(result))
