"""``streammerge methods``."""

from __future__ import annotations

import click

from streammerge.cli import options
from streammerge.cli.reports import show_method, show_methods


@click.command(cls=options.GroupedCommand)
@click.argument("name", required=False, shell_complete=options.complete_method)
@options.report("human", "json")
@options.debug
def methods(name: str | None, form: str, debug: bool) -> None:
    """List the merge methods, or show one: parameters, formula, paper."""
    from streammerge.methods.registry import find_method
    from streammerge.methods.registry import list_methods as all_methods

    if name is None:
        show_methods([*all_methods().values()], form)
    else:
        show_method(find_method(name), form)
