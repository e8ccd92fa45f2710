"""``streammerge clean``."""

from __future__ import annotations

import click

from streammerge.cli import options
from streammerge.cli.reports import show_cleaned, show_leftovers
from streammerge.errors import RecipeError, printable


@click.command(cls=options.GroupedCommand)
@click.argument("location", type=click.Path(readable=False), metavar="LOCATION")
@click.option("--yes", is_flag=True, help="Remove what was left for all outputs in a folder; without it they are listed.")
@options.debug
def clean(location: str, yes: bool, debug: bool) -> None:
    """Discard what an interrupted run has left. The output itself stays.

    In an object store these are uploads that were not completed, too.

    \b
    streammerge clean merged.safetensors
    streammerge clean results/ --yes
    streammerge clean s3://bucket/results/ --yes
    """
    from streammerge.stores.leftovers import discard, leftover_of, leftovers
    from streammerge.stores.locations import parse

    if not location:  # an unset variable of a shell is not the current folder
        raise RecipeError("the location is an empty text; give the name of an output, or a folder")
    place = parse(location)
    place = place.store.made_at(place)
    own = leftover_of(place)
    if own is not None:
        discard(place)
        show_cleaned([own])
        return
    if not place.is_folder():
        raise RecipeError(f"no run has left anything for {printable(location)}; `streammerge runs` lists what there is")
    found = [each for each in leftovers(place) if each.owner is None]
    if not found or not yes:
        show_leftovers(found, "human", "add --yes to remove what they left" if found else "")
        return
    for each in found:
        discard(each.out)
    show_cleaned(found)
