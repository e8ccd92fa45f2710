"""The command line: the group of commands, its errors and its end."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from importlib import import_module
from typing import Any

import click

from streammerge.cli.commands import SHORT
from streammerge.cli.failures import EXIT_CODES, fail, notes_of, wants_json
from streammerge.cli.signals import Stopped, stoppable
from streammerge.cli.streams import open_standard_streams
from streammerge.cli.terminal import CannotPrint, forget_line
from streammerge.errors import StreammergeError, printable
from streammerge.tensors.instructions import choose_instructions
from streammerge.version import __version__

_ROOM = "streammerge.cli.commands"


_OBJECTS_PER_SEARCH = 50_000
"""New objects after which Python looks for reference cycles. By default it would do so 150 times during imports alone,
whose objects all last."""
_STACK_SLOTS = 40_000
"""Size of the frame of :func:`main`, in pointers. Python (3.11 and later) keeps frames in chunks of 16 KiB, or as large as
one frame needs. It maps a chunk when a call needs one and unmaps it when that call returns. A loop whose calls cross the
end of a chunk does so each time, 3,000 times where numpy was imported. One large frame takes a chunk of 512 KiB for all."""
_SPELLED = {"output": "out", "weight": "weights", "base-model": "base", "merge-method": "method", "mem": "memory"}
"""Options as people type them -> their names here."""


def spelled(name: str) -> str:
    """Returns the name of an option, command or choice for the way in which it was typed."""
    name = name.replace("_", "-")
    return _SPELLED.get(name, name)


class Commands(click.Group):
    """The modules of ``cli/commands``. Each is imported when its command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        return [*SHORT]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        width = formatter.width - 6 - max(map(len, names))  # as click writes it, but without importing the commands
        with formatter.section("Commands"):
            formatter.write_dl([(name, click.Command(name, help=SHORT[name]).get_short_help_str(width)) for name in names])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in SHORT:
            return None
        found: click.Command = getattr(import_module(f"{_ROOM}.{cmd_name}"), cmd_name)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and self.get_command(ctx, spelled(args[0])) is None:
            from streammerge.cli.advice import of_command

            near = of_command(args, self.list_commands(ctx))
            raise click.UsageError(f"there is no command {printable(args[0], 60)}{near}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "auto_envvar_prefix": "STREAMMERGE",
        "token_normalize_func": spelled,
    },
    epilog=EXIT_CODES,
)
@click.version_option(__version__, "-V", "-v", "--version", prog_name="streammerge")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Merge model checkpoints larger than memory.

    An INPUT is a .safetensors, .pth, .pt, .bin or .ckpt file, a folder with one checkpoint or with shards and their
    index, or a quoted glob. BASE+ADAPTER is a model with a LoRA on it. A recipe, which is a mergekit configuration,
    stands in place of all inputs. Nothing in an input is ever executed.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Runs the command line. Shows each of streammerge's own errors as one sentence, and ends with its exit code."""
    gc.set_threshold(_OBJECTS_PER_SEARCH)
    open_standard_streams()
    choose_instructions()
    debug, as_json = "--debug" in sys.argv, wants_json(sys.argv[1:])
    try:
        with stoppable():
            cli.main(prog_name="streammerge", standalone_mode=False)
    except Stopped as stopped:
        forget_line()  # the terminal has shown ^C
        fail("Interrupted", f"{stopped.word}; {stopped.outcome}", stopped.exit_code, as_json=as_json)
        sys.stdout.flush()
        sys.stderr.flush()
        # Everything is cleaned up. Ends at once, because torch can abort if the interpreter ends while a thread starts.
        os._exit(stopped.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if not isinstance(error, _TOLD) and not _lacks_memory(error):
            if as_json:
                fail(type(error).__name__, printable(error, 1000) or "an unforeseen error", 1, notes_of(error), as_json)
            raise
        if debug and not isinstance(error, click.ClickException):
            _print_traceback()
        sentence, code = _told(error)
        kind = "UsageError" if isinstance(error, click.UsageError) else type(error).__name__
        fail(kind, sentence, code, notes_of(error), as_json)
        sys.exit(code)


main.__code__ = main.__code__.replace(co_stacksize=_STACK_SLOTS)


_TOLD = (click.ClickException, StreammergeError, MemoryError, OSError)
"""Errors that are told in a sentence. All others are mistakes of this program, whose traceback is worth reading."""


def _told(error: Exception) -> tuple[str, int]:
    """Returns an error as a sentence, with options as they are typed, and its exit code."""
    if isinstance(error, click.ClickException):
        from streammerge.cli.advice import of_usage

        return of_usage(error), error.exit_code
    if isinstance(error, StreammergeError):
        from streammerge.cli.flags import as_flags

        return as_flags(str(error)), error.exit_code
    if isinstance(error, CannotPrint):
        return str(error.strerror), 1
    if _lacks_memory(error):
        return "the system gave no more memory; lower --memory or --workers, or raise the limit (ulimit -v)", 1
    if isinstance(error, FileNotFoundError) and not error.filename and not _has_folder():
        return "the current folder was removed; go to another one (cd), and run the command there", 1
    named = isinstance(error, OSError) and error.filename
    why = error if named else f"{getattr(error, 'strerror', None) or error} (run it again with --debug)"
    return printable(why, 1000), 1


def _has_folder() -> bool:
    """Whether the current folder still exists."""
    from streammerge.stores.locations import parse

    try:
        parse(".").absolute()
    except FileNotFoundError:
        return False
    return True


def _lacks_memory(error: Exception) -> bool:
    """Whether the system gave no memory, for a buffer or for the stack of a thread."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and str(error) == "can't start new thread"


def run() -> None:
    """The installed command: runs :func:`main` and ends the process at once, which saves half a second of torch's end."""
    code: Any = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    if code is not None and not isinstance(code, int):
        sys.exit(code)
    if "matplotlib" in sys.modules:
        atexit._run_exitfuncs()  # it removes its temporary folder, if it has one
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code or 0)


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()
