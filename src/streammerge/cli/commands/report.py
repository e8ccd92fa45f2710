"""``streammerge report``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import as_arguments
from streammerge.cli.terminal import say
from streammerge.errors import printable
from streammerge.options.functions import REPORT


@click.command(cls=options.GroupedCommand)
@click.argument("merged", type=click.Path(readable=False), metavar="OUT")
@click.option("-o", "--out", "out", type=click.Path(readable=False), metavar="FILE.html", help="The page to write.")
@options.of(*REPORT)
@options.no_progress
@options.report("human", "quiet")
@options.debug
def report(merged: str, out: str | None, no_progress: bool, form: str, debug: bool, **typed: Any) -> None:
    """Show a merge as a page with pictures, which a browser opens offline.

    \b
    streammerge report merged/ -o report.html
    streammerge merge chat/ code/ -o merged/ --report report.html     measures while it merges
    """
    from streammerge.cli.progress import Progress

    if out is None:
        raise click.UsageError("a report needs a file to be written to: -o FILE.html")
    with Progress(form, enabled=not no_progress) as progress:
        from streammerge import api

        made = api.report(merged, out, listener=progress, **as_arguments(typed))
    if form == "human":
        say(f"wrote {printable(made)}")
