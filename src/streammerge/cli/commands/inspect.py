"""``streammerge inspect``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli import options
from streammerge.cli.reports import show_indexes
from streammerge.options.selecting import Selecting

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.checkpoints.index import CheckpointIndex


@click.command(cls=options.GroupedCommand)
@click.argument("paths", nargs=-1, required=True, type=click.Path(readable=False), metavar="PATH...")
@click.option("-v", "--tensors", is_flag=True, help="List names, dtypes, shapes and offsets.")
@click.option("--recipe", is_flag=True, help="Print the recipe by which it was merged, as YAML.")
@click.option("--lineage", is_flag=True, help="Print what it was merged from, and what that was merged from.")
@options.of(Selecting)
@options.report("human", "json", "quiet")
@options.debug
def inspect(
    paths: tuple[str, ...], tensors: bool, recipe: bool, lineage: bool, form: str, debug: bool, **typed: Any
) -> None:
    """Show what a checkpoint is and holds; nothing in it is executed."""
    from streammerge.checkpoints.globs import expand

    if lineage:
        from streammerge.cli.reports import show_lineages

        show_lineages(expand(list(paths)), form)
        return
    from streammerge.checkpoints.index import open_checkpoint
    from streammerge.stores.locations import is_here

    opened: Callable[..., CheckpointIndex] = open_checkpoint
    if any("+" in path for path in paths):  # as api.inspect does, but without importing the merge
        from streammerge.requests import inputs

        opened = partial(inputs.opened, held={})
    asked = Selecting(**typed)
    found = expand(list(paths))
    if not all(map(is_here, found)):
        from streammerge.recipe.hub_names import hub_place

        found = [*map(hub_place, found)]
    indexes = [opened(path, asked.state_dict, asked.ema or "ignore") for path in found]
    if any(index.may_be_quantised for index in indexes):
        from streammerge.quantised.dequantised import described

        indexes = [described(index) if index.may_be_quantised else index for index in indexes]
    show_indexes(indexes, form, tensors, recipe)
