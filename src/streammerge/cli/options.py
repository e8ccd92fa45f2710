"""The options of the command line, those that several commands have in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from streammerge.options import DEFAULT_MEMORY, EMA_CHOICES, INTEGERS, IO, ON_MISSING, ON_SHAPE

Command = Callable[..., Any]


def together(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def complete_method(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """For the shell: the methods that begin so."""
    from streammerge.methods.registry import methods

    return [name for name in methods() if name.startswith(begun)]


out = click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(),
    metavar="OUT",
    help="x.safetensors, x.pth (.pt, .ckpt, .bin, .th), or a folder.",
)
output = click.option(
    "--format", "form", type=click.Choice(["human", "json", "quiet"]), default="human", help="How to report."
)
debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
selection = together(
    click.option("--state-dict", metavar="KEY.PATH", help="Which state dict of a wrapped file; found by itself otherwise."),
    click.option("--ema", type=click.Choice(EMA_CHOICES), help="Averaged weights beside plain ones.  [default: ignore]"),
)
resources = together(
    click.option(
        "--memory",
        default=DEFAULT_MEMORY,
        show_default=True,
        metavar="SIZE",
        help="Budget for data held at once, above start-up.",
    ),
    click.option("--workers", type=click.IntRange(1), metavar="N", help="Worker threads.  [default: CPUs available]"),
    click.option(
        "--io",
        type=click.Choice(IO),
        default="mmap",
        show_default=True,
        help="How inputs are read; pread for network drives.",
    ),
)
rename = click.option(
    "--rename",
    multiple=True,
    metavar="FROM=TO",
    help="Other names for tensors, like 'old.*=new.*' or '/^(.*)_g$/=\\1'; repeatable.",
)
receipt_hash = click.option("--hash", is_flag=True, help="Put the SHA-256 of each input into the output's receipt.")
writing = together(
    click.option("--max-shard-size", metavar="SIZE", help="For folders.  [default: as the first input, else 5GB]"),
    click.option(
        "--keep-optimizer",
        is_flag=True,
        default=None,
        help="Keep the first input's optimizer, scheduler and scaler in a .pth.",
    ),
    click.option(
        "--allow-nonfinite", is_flag=True, default=None, help="Write NaN and infinite values instead of stopping."
    ),
)
running = together(
    click.option("--overwrite", is_flag=True, help="Replace a finished output."),
    click.option("--no-resume", is_flag=True, help="Start over instead of continuing an interrupted run."),
    click.option("--polite", is_flag=True, help="Give the inputs' page cache back behind the cursor."),
    click.option("--no-progress", is_flag=True, help="Show no progress bar."),
    output,
    debug,
)
merging = together(
    click.argument("inputs", nargs=-1, required=True, type=click.Path(), metavar="INPUT..."),
    click.option(
        "--weights", metavar="W,W,...", help="One number per input; linear divides them by their sum.  [default: equal]"
    ),
    click.option("--no-normalize", is_flag=True, help="Use the weights as given."),
    click.option(
        "--method",
        metavar="METHOD",
        shell_complete=complete_method,
        help="One that `methods` lists, or package.module:function.  [default: linear]",
    ),
    click.option("--base", type=click.Path(), metavar="PATH", help="The common ancestor, for the methods that need one."),
    click.option(
        "-p",
        "parameters",
        multiple=True,
        metavar="NAME=VALUE,...",
        help="A method parameter; several values: one per input.",
    ),
    click.option("--seed", type=int, metavar="N", help="For the methods that draw random numbers.  [default: 0]"),
    click.option("--dtype", metavar="DTYPE", help="Dtype of the output's float tensors.  [default: the first input's]"),
    click.option("--out-dtype", metavar="DTYPE", help="The same; wins over --dtype."),
    click.option("--compute-dtype", metavar="DTYPE", help="float32 or float64.  [default: the method's]"),
    click.option("--last", type=click.IntRange(1), metavar="N", help="Only the numerically last N inputs."),
    click.option("--range", metavar="FROM:TO", help="Only inputs with such a number in their name, both included."),
    click.option("--best", type=click.IntRange(1), metavar="N", help="Only the best N inputs, by --by."),
    click.option("--by", metavar="KEY", help="A number in the files, like model_loss.eval_loss; lowest first."),
    click.option("--highest", is_flag=True, help="With --best: highest first."),
    click.option(
        "--ema-decay", type=float, metavar="D", help="Exponential weights: each input counts D times the one after it."
    ),
    rename,
    click.option("--on-missing", type=click.Choice(ON_MISSING), help="Tensors not in every input.  [default: error]"),
    click.option("--on-shape", type=click.Choice(ON_SHAPE), help="Tensors whose shapes differ.  [default: error]"),
    click.option(
        "--integers",
        type=click.Choice(INTEGERS),
        help="Integer tensors that differ.  [default: max for num_batches_tracked, else error]",
    ),
    click.option("--own-methods", is_flag=True, help="Let a recipe name methods that are your own code."),
    click.option(
        "--convert-first", type=click.Path(), metavar="DIR", help="Convert each input into DIR, keep it, merge from there."
    ),
    selection,
    resources,
    writing,
    receipt_hash,
)
