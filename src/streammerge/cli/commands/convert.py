"""``streammerge convert``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import as_arguments, output_name
from streammerge.cli.reports import report
from streammerge.options.functions import CONVERT


@click.command(cls=options.GroupedCommand)
@click.argument("path", type=click.Path(readable=False), metavar="INPUT")
@options.of(*CONVERT)
@options.out()
@options.no_progress
@options.verbose
@options.report("human", "json", "quiet")
@options.debug
def convert(path: str, out: str | None, no_progress: bool, verbose: bool, form: str, debug: bool, **typed: Any) -> None:
    """Convert .pth to safetensors or back; recast, shrink, shard.

    \b
    streammerge convert pytorch_model.bin -o model.safetensors
    streammerge convert best_model.pth -o small.pth --drop 'dvae.*'
    """
    from streammerge.cli.progress import Progress

    if out is None:
        raise click.UsageError("the output has no name; add -o OUT, like -o model.safetensors")
    with Progress(form, enabled=not no_progress) as progress:
        progress.out = out
        from streammerge import api

        if "://" not in out:
            progress.out = output_name(out, [path], None, progress.say)
        result = api.convert(path, progress.out, listener=progress, **as_arguments(typed))
        report(result, form, progress.told, verbose)
