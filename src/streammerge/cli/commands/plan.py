"""``streammerge plan``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import as_arguments, inputs_and_recipe, output_name
from streammerge.cli.reports import show_plan
from streammerge.cli.terminal import quoted, say
from streammerge.options.functions import PLAN


@click.command(cls=options.GroupedCommand)
@options.inputs
@options.of(*PLAN)
@options.out(required=False)
@options.report("human", "json", "yaml", "quiet", note="; yaml: the recipe of this command")
@options.debug
def plan(inputs: tuple[str, ...], out: str | None, form: str, debug: bool, **typed: Any) -> None:
    """Show what merge would do; nothing else is written."""
    from streammerge import api

    found, recipe = inputs_and_recipe(inputs, typed["weights"])
    if out is not None:
        tell = partial(say, err=True) if form == "human" else str
        out = output_name(out, found, recipe, tell, typed["own_methods"])
    show_plan(api.plan(found, out, recipe=recipe, **as_arguments(typed)), form)
    if typed["save"] is not None and form == "human":
        name = quoted(typed["save"])
        say(f"saved; next: `streammerge worker {name} --share 1/N` and so on, then `streammerge finish {name}`", err=True)
