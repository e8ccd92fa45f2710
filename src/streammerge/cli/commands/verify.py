"""``streammerge verify``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import as_arguments
from streammerge.cli.reports import show_verified
from streammerge.options.functions import VERIFY


@click.command(cls=options.GroupedCommand)
@click.argument("out", type=click.Path(readable=False), metavar="OUT")
@options.of(*VERIFY)
@options.no_progress
@options.report("human", "json", "quiet")
@options.debug
def verify(out: str, no_progress: bool, form: str, debug: bool, **typed: Any) -> None:
    """Check that an output is what its recipe says.

    Checks the structure, the checksum of every byte and, if the inputs are available, a sample of the values, which is
    computed again in float64.
    """
    from streammerge.cli.progress import Progress

    with Progress(form, enabled=not no_progress) as progress:
        from streammerge import api

        verified = api.verify(out, listener=progress, **as_arguments(typed))
    show_verified(verified, form)
