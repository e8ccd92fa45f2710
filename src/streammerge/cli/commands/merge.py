"""``streammerge merge``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.advice import without_output
from streammerge.cli.arguments import as_arguments, inputs_and_recipe, output_name
from streammerge.cli.reports import report, show_plan
from streammerge.options.base import options_of
from streammerge.options.functions import MERGE
from streammerge.options.telling import Gathering, Reporting
from streammerge.options.writing import Running


@click.command(cls=options.GroupedCommand)
@options.inputs
@options.of(*MERGE)
@options.out()
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@options.no_progress
@options.verbose
@options.report("human", "json", "quiet")
@options.debug
def merge(
    inputs: tuple[str, ...],
    out: str | None,
    dry_run: bool,
    no_progress: bool,
    verbose: bool,
    form: str,
    debug: bool,
    **typed: Any,
) -> None:
    """Merge checkpoints into one.

    \b
    streammerge merge news.pth audiobook.pth --weights 0.6,0.4 -o voice.pth
    streammerge merge 'run/checkpoint-*.pt' --last 5 -o average.safetensors
    streammerge merge recipe.yaml -o merged/
    """
    from streammerge.cli.progress import Progress

    asked = as_arguments(typed)
    found, recipe = inputs_and_recipe(inputs, typed["weights"])
    if dry_run:
        from streammerge import api

        if out is not None:
            out = output_name(out, found, recipe, Progress(form, enabled=False).say, typed["own_methods"])
        asked = {name: asked[name] for name in asked.keys() - options_of(Running, Reporting, Gathering)}
        show_plan(api.plan(found, out, recipe=recipe, **asked), form)
        return
    if out is None:
        raise click.UsageError(without_output(inputs))
    with Progress(form, enabled=not no_progress) as progress:
        progress.out = out
        from streammerge import api

        progress.out = output_name(out, found, recipe, progress.say, typed["own_methods"])
        result = api.merge(found, progress.out, recipe=recipe, listener=progress, **asked)
        report(result, form, progress.told, verbose)
