"""``streammerge merge``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import plan_arguments
from streammerge.cli.reports import report, show_plan

# What the command needs is imported in it, so that --help waits for nothing.


@click.command()
@options.merging
@options.out
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@options.running
def merge(
    inputs: tuple[str, ...],
    out: str,
    dry_run: bool,
    overwrite: bool,
    no_resume: bool,
    polite: bool,
    no_progress: bool,
    form: str,
    debug: bool,
    **wishes: Any,
) -> None:
    """Merge checkpoints into one.

    \b
    streammerge merge news.pth audiobook.pth --weights 0.6,0.4 -o voice.pth
    streammerge merge 'run/checkpoint-*.pt' --last 5 -o average.safetensors
    streammerge merge recipe.yaml -o merged/
    """
    from streammerge import api
    from streammerge.cli.progress import Progress

    arguments = plan_arguments(wishes)
    if dry_run:
        show_plan(api.plan(inputs, out, **arguments), form)
        return
    with Progress(form, enabled=not no_progress) as progress:
        result = api.merge(
            inputs, out, overwrite=overwrite, resume=not no_resume, polite=polite, listener=progress, **arguments
        )
    report(result, form)
