"""``streammerge worker``."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.reports import show_share
from streammerge.options.functions import WORKER


@click.command(cls=options.GroupedCommand)
@click.argument("plan", type=click.Path(readable=False), metavar="PLAN")
@options.of(*WORKER)
@options.no_progress
@options.report("human", "json", "quiet")
@options.debug
def worker(plan: str, no_progress: bool, form: str, debug: bool, **typed: Any) -> None:
    """Make a part of a merge on this machine. Any number of machines may do so at once.

    \b
    streammerge plan a/ b/ -o merged/ --save merge.plan
    streammerge worker merge.plan --share 1/2     on one machine
    streammerge worker merge.plan --share 2/2     on another one
    streammerge finish merge.plan                 when both are done
    """
    from streammerge.cli.progress import Progress

    with Progress(form, enabled=not no_progress) as progress:
        from streammerge import api

        show_share(api.worker(plan, listener=progress, **typed), plan, form, progress.told)
