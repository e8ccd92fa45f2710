"""``streammerge plan``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import plan_arguments
from streammerge.cli.reports import show_plan


@click.command()
@options.merging
@click.option("-o", "--out", type=click.Path(), metavar="OUT", help="The output, by whose name its container is planned.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["human", "json", "yaml", "quiet"]),
    default="human",
    help="How to report; yaml: the recipe of this command.",
)
@options.debug
def plan(inputs: tuple[str, ...], out: str | None, form: str, debug: bool, **wishes: Any) -> None:
    """Show what merge would do; nothing is written."""
    from streammerge import api

    show_plan(api.plan(inputs, out, **plan_arguments(wishes)), form)
