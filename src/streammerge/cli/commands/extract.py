"""``streammerge extract``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import as_arguments
from streammerge.cli.reports import report_adapter
from streammerge.options.functions import EXTRACT


@click.command(cls=options.GroupedCommand)
@click.argument("tuned", type=click.Path(readable=False), metavar="TUNED")
@options.of(*EXTRACT)
@options.out()
@options.no_progress
@options.verbose
@options.report("human", "json", "quiet")
@options.debug
def extract(tuned: str, out: str | None, no_progress: bool, verbose: bool, form: str, debug: bool, **typed: Any) -> None:
    """Write the difference of a model and its base as a LoRA adapter.

    \b
    streammerge extract tuned/ --base base/ -o adapter/ --rank 64
    streammerge extract tuned/ --base base/ -o adapter/ --energy 0.95 --save-modules
    """
    from streammerge.cli.progress import Progress

    if out is None:
        raise click.UsageError("the output has no name; add -o OUT, like -o adapter/")
    with Progress(form, enabled=not no_progress) as progress:
        progress.out = out
        from streammerge import api

        result = api.extract(tuned, out, listener=progress, **as_arguments(typed))
        report_adapter(result, form, progress.told, verbose)
