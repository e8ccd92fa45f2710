"""``streammerge verify``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.reports import as_json
from streammerge.cli.terminal import say


@click.command()
@click.argument("out", type=click.Path(), metavar="OUT")
@click.option("--sample", metavar="SHARE", help="How much of the values is computed again; 100% for all.  [default: 5%]")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Chooses the sample.")
@click.option("--inputs", type=click.Path(), metavar="DIR", help="Where the inputs are.  [default: here, or beside OUT]")
@click.option("--own-methods", is_flag=True, help="Let the recipe name methods that are your own code.")
@options.resources
@options.output
@options.debug
def verify(out: str, form: str, debug: bool, **wishes: Any) -> None:
    """Check that an output is what its recipe says.

    Its structure; the checksum of every byte; and, where the inputs are at hand, a sample of its values, computed again
    in float64.
    """
    from streammerge import api
    from streammerge.cli import render

    verified = api.verify(out, **wishes)
    if form == "json":
        click.echo(as_json(render.verified_json(verified)))
    elif form == "human":
        say(render.verified_text(verified))
