"""``streammerge methods``."""

from __future__ import annotations

import click

from streammerge.cli import options
from streammerge.cli.reports import as_json
from streammerge.cli.terminal import say, width


@click.command()
@click.argument("name", required=False, shell_complete=options.complete_method)
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to report.")
@options.debug
def methods(name: str | None, form: str, debug: bool) -> None:
    """List the merge methods, or show one: parameters, formula, paper."""
    from streammerge.cli import pages
    from streammerge.methods.registry import find_method
    from streammerge.methods.registry import methods as all_methods

    chosen = list(all_methods().values()) if name is None else [find_method(name)]
    if form == "json":
        shown = [pages.method_json(method) for method in chosen]
        click.echo(as_json(shown if name is None else shown[0], indent=2))
    else:
        say(pages.methods_table(chosen) if name is None else pages.method_page(chosen[0], width()))
