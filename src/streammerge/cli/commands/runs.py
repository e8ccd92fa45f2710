"""``streammerge runs``."""

from __future__ import annotations

import click

from streammerge.cli import options
from streammerge.cli.reports import show_leftovers


@click.command(cls=options.GroupedCommand)
@click.argument("folder", required=False, default=".", type=click.Path(readable=False), metavar="[FOLDER]")
@options.report("human", "json")
@options.debug
def runs(folder: str, form: str, debug: bool) -> None:
    """List outputs in a folder whose runs go on or were interrupted.

    Says whose each is and how much of it is kept. The same merge command continues an interrupted run, and
    `streammerge clean OUT` discards what it left.
    """
    from streammerge.stores.leftovers import leftovers
    from streammerge.stores.locations import parse

    show_leftovers(leftovers(parse(folder)), form)
