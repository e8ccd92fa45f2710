"""The options of the command line: made from the classes of ``streammerge.options``, and options of the commands alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from streammerge.cli.failures import EXIT_CODES
from streammerge.cli.flags import as_flags
from streammerge.errors import RecipeError, printable
from streammerge.options.base import Option, Options, options_of
from streammerge.options.values import PATH

Command = Callable[..., Any]


_SHORT = re.compile(r"-[a-zA-Z]=")
"""A short option with its value behind an equals sign."""


class _Option(click.Option):
    """An option with the heading under which the help lists it."""

    heading = "Options"


class GroupedCommand(click.Command):
    """A command whose help lists the required options first, then the options under the headings of their classes."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{"epilog": EXIT_CODES, **more})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads ``-o=OUT`` as ``-o OUT``. Otherwise the output would be called ``=OUT``."""
        end = args.index("--") if "--" in args else len(args)
        parts = [each.split("=", 1) if _SHORT.match(each) else [each] for each in args[:end]]
        return super().parse_args(ctx, [part for each in parts for part in each] + args[end:])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Required": []}
        last: dict[str, list[tuple[str, str]]] = {"Options": []}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                heading = "Required" if option.required else getattr(option, "heading", "Options")
                (last if heading == "Options" else groups).setdefault(heading, []).append(record)
        for heading, records in (groups | last).items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def of(*groups: type[Options]) -> Callable[[Command], Command]:
    """Decorates a command with the options of these classes, in their order."""

    def apply(command: Command) -> Command:
        for group in reversed(groups):
            for each in reversed(options_of(group).values()):
                command = _click_option(each, _heading(group))(command)
        return command

    return apply


def complete_method(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Returns the methods whose names begin with ``begun``, for shell completion."""
    from streammerge.methods.registry import list_methods

    return [name for name in list_methods() if name.startswith(begun)]


def complete_executor(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Returns the executors whose names begin with ``begun``, for shell completion."""
    from streammerge.running.executors.registry import executors

    return [name for name in ("auto", *executors()) if name.startswith(begun)]


def complete_dtype(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Returns the floating-point dtypes whose names begin with ``begun``, for shell completion."""
    from streammerge.tensors.dtypes import DType

    return [each.torch_name for each in DType if each.kind == "float" and each.torch_name.startswith(begun)]


def complete_parameter(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Returns ``NAME=`` for the parameters of the method that was typed, for shell completion."""
    from streammerge.errors import RecipeError
    from streammerge.methods.registry import find_method

    try:
        method = find_method(context.params.get("method") or "linear")
    except RecipeError:
        return []
    return [f"{name}=" for name in method.parameters if name.startswith(begun)]


_COMPLETIONS = {
    "method": complete_method,
    "executor": complete_executor,
    "parameters": complete_parameter,
    "dtype": complete_dtype,
    "out_dtype": complete_dtype,
}


def _heading(group: type[Options]) -> str:
    """Returns the first sentence of the docstring of a class of options."""
    return (group.__doc__ or "Options").partition(".")[0]


def _click_option(each: Option, heading: str) -> Callable[[Command], Command]:
    kind = each.kind
    named = type("Option", (_Option,), {"heading": heading})
    form: dict[str, Any] = {"cls": named, "metavar": each.metavar or None, "shell_complete": _COMPLETIONS.get(each.name)}
    if kind is not None and kind.flag:
        form |= {"is_flag": True, "default": None if each.default is None else False}
    elif kind is not None and kind.many:
        form |= {"multiple": True}
    elif each.choices:
        form |= {"type": click.Choice(each.choices), "default": each.default}
    elif kind is PATH:
        form |= {"type": click.Path(readable=False)}
    elif kind is not None and kind.least is not None:
        form |= {"type": click.IntRange(kind.least)}
    else:
        form |= {"type": _TYPES.get(each.annotation, str), "default": each.default}
    name = each.name if each.short else f"{'no_' * each.negated}{each.name}"
    return click.option(*filter(None, (each.letter, each.flag)), name, help=_help(each), **form)


_TYPES = {"int": int, "int | None": int, "float | None": float}


def _help(each: Option) -> str:
    text = as_flags(each.doc)
    if each.negated:  # "False: start over" describes --no-resume as "Start over"
        text = text.removeprefix("False: ")
        text = text[:1].upper() + text[1:]
    if each.kind is not None and each.kind.many:
        text += " Repeatable."
    shown = each.otherwise or (each.default if isinstance(each.default, str | int) and each.default not in ("", 0) else "")
    return f"{text}  [default: {shown}]" if shown and not (each.kind and each.kind.flag) else text


inputs = click.argument("inputs", nargs=-1, required=True, type=click.Path(readable=False), metavar="INPUT...")


def _lasting(context: click.Context, option: click.Parameter, out: str | None) -> str | None:
    """Returns the output's name. Raises RecipeError for a store whose bytes end with the process of this command."""
    if out is not None and "://" in out:
        from streammerge.stores.locations import parse

        store = parse(out).store
        if store.one_process:
            raise RecipeError(
                f"{printable(out)}: the store {store.scheme}:// ends with this command, and the output with it; "
                "write to another place, or merge in Python"
            )
    return out


def out(required: bool = True) -> Callable[[Command], Command]:
    """Decorates a command with the option for its output. ``required``: whether the help lists it first."""
    return click.option(
        "-o",
        "--out",
        "out",
        cls=type("Option", (_Option,), {"heading": "Required" if required else "Options"}),
        type=click.Path(readable=False),
        callback=_lasting,
        metavar="OUT",
        help="x.safetensors, x.pth (.pt, .ckpt, .bin, .th), or a folder.",
    )


def report(*forms: str, note: str = "") -> Callable[[Command], Command]:
    """Decorates a command with the options for the form of its report: ``--format``, and ``-q`` if it can be quiet."""

    def apply(command: Command) -> Command:
        @wraps(command)
        def reported(*args: Any, quiet: bool = False, **more: Any) -> Any:
            return command(*args, **(more | {"form": "quiet"} if quiet else more))

        if "quiet" in forms:
            flag = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors: --format quiet.")
            reported = flag(reported)
        return click.option("--format", "form", type=click.Choice(forms), default="human", help=f"How to report{note}.")(
            reported
        )

    return apply


debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
verbose = click.option("-v", "--verbose", is_flag=True, help="Show the plan beside the result.")
no_progress = click.option("--no-progress", is_flag=True, help="Show no progress bar.")
