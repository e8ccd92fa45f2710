"""The options of the command line: made from the classes of ``streammerge.options``, and options of the commands alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from streammerge.cli.flags import as_flags
from streammerge.options import PATH, Option, Options, options_of

Command = Callable[..., Any]


def of(*groups: type[Options]) -> Callable[[Command], Command]:
    """Decorates a command with the options of these classes, in their order."""

    def apply(command: Command) -> Command:
        for each in reversed(options_of(*groups).values()):
            command = _click_option(each)(command)
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


_COMPLETIONS = {"method": complete_method, "executor": complete_executor}


def _click_option(each: Option) -> Callable[[Command], Command]:
    kind = each.kind
    form: dict[str, Any] = {"metavar": each.metavar or None, "shell_complete": _COMPLETIONS.get(each.name)}
    if kind is not None and kind.flag:
        form |= {"is_flag": True, "default": None if each.default is None else False}
    elif kind is not None and kind.many:
        form |= {"multiple": True}
    elif each.choices:
        form |= {"type": click.Choice(each.choices), "default": each.default}
    elif kind is PATH:
        form |= {"type": click.Path()}
    elif kind is not None and kind.least is not None:
        form |= {"type": click.IntRange(kind.least)}
    else:
        form |= {"type": _TYPES.get(each.annotation, str), "default": each.default}
    name = each.name if each.short else f"{'no_' * each.negated}{each.name}"
    return click.option(each.flag, name, help=_help(each), **form)


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


inputs = click.argument("inputs", nargs=-1, required=True, type=click.Path(), metavar="INPUT...")


def out(required: bool = True) -> Callable[[Command], Command]:
    return click.option(
        "-o",
        "--out",
        required=required,
        type=click.Path(),
        metavar="OUT",
        help="x.safetensors, x.pth (.pt, .ckpt, .bin, .th), or a folder.",
    )


def report(*forms: str, note: str = "") -> Callable[[Command], Command]:
    """Decorates a command with the option for the form of its report."""
    return click.option("--format", "form", type=click.Choice(forms), default="human", help=f"How to report{note}.")


debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
no_progress = click.option("--no-progress", is_flag=True, help="Show no progress bar.")
