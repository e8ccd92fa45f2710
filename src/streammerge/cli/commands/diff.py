"""``streammerge diff``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import as_arguments
from streammerge.cli.reports import show_diff
from streammerge.options.functions import DIFF


@click.command(cls=options.GroupedCommand)
@click.argument("a", type=click.Path(readable=False), metavar="A")
@click.argument("b", type=click.Path(readable=False), metavar="B")
@options.of(*DIFF)
@click.option("--tensors", is_flag=True, help="Show every layer and every tensor.")
@options.no_progress
@options.report("human", "json", "quiet")
@options.debug
def diff(a: str, b: str, tensors: bool, no_progress: bool, form: str, debug: bool, **typed: Any) -> None:
    """Compare two checkpoints: what moved, and how far.

    Exits with 0 if they are equal (names, shapes, and values to the bit), with 1 if they differ.

    \b
    streammerge diff chat/ code/
    streammerge diff chat/ code/ --base base/
    streammerge diff model.pth model.safetensors && echo equal
    """
    from streammerge.cli.progress import Progress

    with Progress(form, enabled=not no_progress) as progress:
        from streammerge import api

        found = api.diff(a, b, listener=progress, **as_arguments(typed))
        show_diff(found, form, tensors, progress.told)
    if not found.equal:
        raise SystemExit(1)
