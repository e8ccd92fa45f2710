"""``streammerge finish``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.reports import report
from streammerge.cli.terminal import quoted
from streammerge.errors import UnfinishedError
from streammerge.options.functions import FINISH


@click.command(cls=options.GroupedCommand)
@click.argument("plan", type=click.Path(readable=False), metavar="PLAN")
@options.of(*FINISH)
@options.no_progress
@options.report("human", "json", "quiet")
@options.debug
def finish(plan: str, no_progress: bool, form: str, debug: bool, **typed: Any) -> None:
    """Check that all units of a saved plan are made, and make the output visible."""
    from streammerge.cli.progress import Progress

    with Progress(form, enabled=not no_progress) as progress:
        from streammerge import api

        try:
            result = api.finish(plan, listener=progress, **typed)
        except UnfinishedError as error:
            error.remedy = f"`streammerge worker {quoted(plan)} --claim` makes them"
            raise
        report(result, form, progress.told)
