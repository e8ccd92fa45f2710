"""``streammerge inspect``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.reports import show_indexes
from streammerge.options import Selecting


@click.command(cls=options.GroupedCommand)
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="PATH...")
@click.option("-v", "--tensors", is_flag=True, help="List names, dtypes, shapes and offsets.")
@click.option("--recipe", is_flag=True, help="Print the recipe by which it was merged, as YAML.")
@options.of(Selecting)
@options.report("human", "json", "quiet")
@options.debug
def inspect(paths: tuple[str, ...], tensors: bool, recipe: bool, form: str, debug: bool, **typed: Any) -> None:
    """Show what a checkpoint is and holds; nothing in it is executed."""
    from streammerge.adapters.applying import open_model  # as api.inspect does, but without importing the merge
    from streammerge.checkpoints.globs import expand
    from streammerge.recipe.locations import from_hub_cache

    asked = Selecting(**typed)
    found = map(from_hub_cache, expand(list(paths)))
    indexes = [open_model(path, asked.state_dict, asked.ema or "ignore") for path in found]
    show_indexes(indexes, form, tensors, recipe)
