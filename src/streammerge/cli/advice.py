"""What a mistyped command line probably meant."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import click

from streammerge.cli.terminal import quoted

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)%?,?")
_CHECKPOINT = re.compile(r".*(\.(safetensors|pth|pt|ckpt|bin|th|tar|ya?ml)|[/*].*)")
_EXTRA = re.compile(r"unexpected extra argument \(([^ ()]+)\)")
_MEANT = {
    "version": "--version",
    "average": "merge",
    "soup": "merge",
    "check": "verify",
    "show": "inspect",
    "list": "methods",
}
"""What people type -> what does it."""
_ELSEWHERE = {
    "--device": "streammerge computes on CPUs, so there is no device to choose",
    "--cuda": "streammerge computes on CPUs, so there is no device to choose",
    "--gpu": "streammerge computes on CPUs, so there is no device to choose",
    "--lazy-unpickle": "streammerge always reads lazily",
    "--low-cpu-memory": "streammerge always bounds its memory; --memory sets the budget",
    "--allow-crimes": "streammerge merges every architecture; leave it out",
    "--copy-tokenizer": "streammerge copies the tokenizer of the first input",
    "--trust-remote-code": "streammerge runs no code of a model; leave it out",
}
"""Options of other tools, and what to say about them."""


def of_usage(error: click.ClickException) -> str:
    """Returns the error of a command in one sentence, with one suggestion."""
    said = re.split(r"\s*\(?Did you mean", error.format_message())[0].rstrip(". ")
    if isinstance(error, click.NoSuchOption):
        near = _of_option(error, sys.argv[1:])
    elif (extra := _EXTRA.search(said)) and _takes_output(error):
        near = f"; if it is the output, write -o {quoted(extra[1])}"
    elif isinstance(error, click.UsageError) and error.ctx and ";" not in said:
        near = f"; see `{error.ctx.command_path} --help`"
    else:
        near = ""
    return said[:1].lower() + said[1:] + near


def _takes_output(error: click.ClickException) -> bool:
    context = getattr(error, "ctx", None)
    return context is not None and any("-o" in option.opts for option in context.command.params)


def _of_option(error: click.NoSuchOption, typed: Sequence[str]) -> str:
    from difflib import get_close_matches

    name = error.option_name
    if name in _ELSEWHERE:
        return f"; {_ELSEWHERE[name]}"
    if error.ctx is not None and any(name.lower() in option.opts for option in error.ctx.command.params):
        return f"; did you mean {name.lower()}?"
    from streammerge.stores.locations import parse

    if named := next((each for each in typed if each.startswith(name) and parse(each).lexists()), ""):
        return f"; if it is the path, write {quoted(f'./{named}')}"
    word = name.lstrip("-").replace("-", "_")
    given = typed[typed.index(name) + 1] if name in typed[:-1] else "VALUE"
    methods = _methods_with(word, typed)
    if methods and error.ctx is not None and any("-p" in option.opts for option in error.ctx.command.params):
        return f"; {word} is a parameter of {methods}: -p {word}={given}"
    commands = error.ctx.find_root().command if error.ctx else None
    if isinstance(commands, click.Group) and error.ctx is not None:
        for other in commands.list_commands(error.ctx):
            command = commands.get_command(error.ctx, other)
            if command is not None and any(name in option.opts for option in command.params):
                return f"; it is an option of `streammerge {other}`"
    known = [opt for option in error.ctx.command.params for opt in option.opts if opt.startswith("--")] if error.ctx else []
    has_parameters = "--method" in known
    parameters = {f"--{each.replace('_', '-')}": each for each in _parameters_of(typed)} if has_parameters else {}
    near = get_close_matches(name, [*known, *parameters], n=1, cutoff=0.7)
    if near and near[0] not in known:
        meant = parameters[near[0]]
        return f"; did you mean -p {meant}={given}, a parameter of {_methods_with(meant, typed)}?"
    return f"; did you mean {near[0]}?" if near else f"; see `{error.ctx.command_path} --help`" if error.ctx else ""


def _methods_with(word: str, typed: Sequence[str]) -> str:
    """Returns the methods that have this parameter: the one on the command line, or up to three."""
    from streammerge.methods.registry import list_methods

    having = [name for name, method in list_methods().items() if word in method.parameters]
    asked = [name for name in having if name in typed or f"--method={name}" in typed]
    shown = asked[:1] or having
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more methods" if len(shown) > 3 else "")


def _parameters_of(typed: Sequence[str]) -> list[str]:
    """Returns the parameters of the method on the command line, of all methods if none is there."""
    from streammerge.methods.registry import list_methods

    methods = list_methods()
    words = [each.removeprefix("--method=").lower() for each in typed]
    asked = [methods[word] for word in words if word in methods]
    return list(dict.fromkeys(name for method in asked or methods.values() for name in method.parameters))


def of_command(typed: Sequence[str], commands: Sequence[str]) -> str:
    """Returns what to do when the first word is no command."""
    from difflib import get_close_matches

    word = typed[0]
    if _CHECKPOINT.fullmatch(word) or (len(typed) > 1 and word not in _MEANT and not get_close_matches(word, commands)):
        return f"; to merge, type `streammerge merge {' '.join(map(quoted, typed))}`"
    near = _MEANT.get(word.lower()) or next(iter(get_close_matches(word, commands, n=1)), None)
    return f"; did you mean {near}?" if near else "; see `streammerge --help`"


def without_output(inputs: Sequence[str]) -> str:
    """Returns what to do about a merge without an output. The last input may be meant as one."""
    from streammerge.stores.locations import parse

    last = inputs[-1]
    absent = len(inputs) > 1 and "://" not in last and not parse(last).lexists() and not parse(last).has_magic
    meant = (
        f"if {quoted(last)} is the output, write -o {quoted(last)}" if absent else "add -o OUT, like -o merged.safetensors"
    )
    return f"the output has no name; {meant}"


def check_inputs(inputs: Sequence[str], weights: str | None) -> None:
    """Raises UsageError for a number among the inputs that is no file: weights are joined by commas."""
    from streammerge.stores.locations import parse  # here, so that --help imports no store

    for each in inputs:
        if _NUMBER.fullmatch(each) and not parse(each).lexists():
            numbers = [text.strip(",") for text in (weights or "", *inputs) if _NUMBER.fullmatch(text)]
            raise click.UsageError(
                f"{each} was read as an input; join the weights by commas: --weights {','.join(numbers)}"
            )
