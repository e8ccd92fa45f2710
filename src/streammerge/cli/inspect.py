"""``streammerge inspect``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.reports import as_json
from streammerge.cli.terminal import say
from streammerge.options import EMA_CHOICES


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="PATH...")
@click.option("--tensors", is_flag=True, help="List names, dtypes, shapes and offsets.")
@click.option("--recipe", is_flag=True, help="Print the recipe by which it was merged, as YAML.")
@options.selection
@options.output
@options.debug
def inspect(paths: tuple[str, ...], tensors: bool, recipe: bool, form: str, debug: bool, **wishes: Any) -> None:
    """Show what a checkpoint is and holds; nothing in it is executed."""
    from streammerge.checkpoints.globs import expand
    from streammerge.checkpoints.index import open_checkpoint
    from streammerge.cli import render

    state_dict, ema = wishes["state_dict"], wishes["ema"] or EMA_CHOICES[0]
    indexes = [open_checkpoint(path, state_dict, ema) for path in expand(list(paths))]
    if recipe:
        click.echo("---\n".join(render.recipe_text(index) for index in indexes), nl=False)
        return
    if form == "json":
        shown = [render.index_json(index, tensors) for index in indexes]
        click.echo(as_json(shown[0] if len(shown) == 1 else shown, indent=2))
    elif form == "human":
        say("\n\n".join(render.index_text(index, tensors) for index in indexes))
