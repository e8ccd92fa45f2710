"""``streammerge sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from streammerge.cli import options
from streammerge.cli.arguments import as_arguments, inputs_and_recipe, lists_of_numbers, values_of_parameters
from streammerge.cli.reports import show_sweep
from streammerge.cli.terminal import say
from streammerge.options.functions import SWEEP


@click.command(cls=options.GroupedCommand)
@options.inputs
@options.of(*SWEEP)
@options.out()
@click.option("--dry-run", is_flag=True, help="Show which merges would be made, and write nothing.")
@options.no_progress
@options.report("human", "json", "quiet")
@options.debug
def sweep(
    inputs: Sequence[str], out: str | None, dry_run: bool, no_progress: bool, form: str, debug: bool, **typed: Any
) -> None:
    """Make many merges of the same inputs in one read, score them, keep the best.

    OUT is a folder. The names of the outputs in it say their settings; `{}` in OUT stands for these.

    \b
    streammerge sweep news.pth audiobook.pth --weights 0.5,0.5 --weights 0.6,0.4 -o voices/
    streammerge sweep a/ b/ --method slerp -p t=0.2:0.8:0.1 --score './evaluate.sh {}' --keep best:3 -o tries/
    streammerge sweep recipe.yaml -p density=0.3:0.9:0.2 -o tries/
    streammerge sweep 'exp/epoch-*.pt' --epochs 28:30 --averages 1:5 --score './wer.sh {}' --lowest -o averages/
    """
    from streammerge.cli.progress import Progress

    if out is None:
        raise click.UsageError("a sweep needs a folder for its outputs: -o DIR")
    parameters = values_of_parameters(typed.pop("parameters"))
    weights = lists_of_numbers([*typed.pop("weights"), *parameters.pop("weight", [])])
    asked = as_arguments({**typed, "weights": None}) | {"weights": weights or None, "parameters": parameters}
    found, asked["recipe"] = inputs_and_recipe(inputs, None)
    if dry_run:
        from streammerge.running.session import RunOptions
        from streammerge.sweeps.sweeping import Sweep

        say(Sweep({"inputs": found, "out": out, **asked}, RunOptions()).planned())
        return
    with Progress(form, enabled=not no_progress) as progress:
        from streammerge import api

        made = api.sweep(found, out, listener=progress, **asked)
        show_sweep(made, form)
