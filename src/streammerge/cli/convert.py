"""``streammerge convert``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.reports import report


@click.command()
@click.argument("path", type=click.Path(), metavar="INPUT")
@options.out
@click.option("--dtype", metavar="DTYPE", help="Recast floating-point tensors.")
@click.option(
    "--drop", multiple=True, metavar="PATTERN", help="Leave out tensors whose names match, like 'dvae.*'; repeatable."
)
@click.option("--keep", multiple=True, metavar="PATTERN", help="Keep only tensors whose names match; repeatable.")
@click.option("--strip-prefix", default="", metavar="PREFIX", help="Remove PREFIX from the names that begin with it.")
@options.rename
@click.option("--extras", type=click.Path(), metavar="FILE.json", help="Write what is not a tensor there, readable.")
@options.selection
@options.resources
@options.writing
@options.receipt_hash
@options.running
def convert(path: str, out: str, no_resume: bool, no_progress: bool, form: str, debug: bool, **wishes: Any) -> None:
    """Convert .pth to safetensors or back; recast, shrink, shard.

    \b
    streammerge convert pytorch_model.bin -o model.safetensors
    streammerge convert best_model.pth -o small.pth --drop 'dvae.*'
    """
    from streammerge import api
    from streammerge.cli.progress import Progress

    with Progress(form, enabled=not no_progress) as progress:
        result = api.convert(path, out, resume=not no_resume, listener=progress, **wishes)
    report(result, form)
