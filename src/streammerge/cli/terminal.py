"""Text output: wrapped and coloured on a terminal, plain everywhere else."""

from __future__ import annotations

import os
import re
import sys

import click

from streammerge.cli.streams import give_up_stderr

WIDTH = 100
"""Maximum columns of running text, and the default without a terminal."""
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "wrote": "green", "verified": "green"}
_LABEL = rf"({'|'.join(_COLOURS)})\b"
_COMMAND = r"\s+streammerge "


class CannotPrint(OSError):
    """A standard stream cannot be written. The work may be done all the same."""


def width() -> int:
    """Returns the columns that running text may fill."""
    return min(_columns(), WIDTH) if sys.stdout.isatty() else WIDTH


def say(text: str, err: bool = False) -> None:
    """Prints lines on stdout, or on stderr. Raises OSError, which names the stream, if stdout cannot be written."""
    stream = sys.stderr if err else sys.stdout
    if stream.isatty():
        columns = _columns()
        text = "\n".join(_coloured(_wrapped(line, columns)) for line in text.split("\n"))
    put(text, err)


def put(text: str, err: bool = False, newline: bool = True) -> None:
    """Prints text as it is, for programs. Raises OSError, which names the stream, if stdout cannot be written.

    Behind stderr is a log: if that cannot be written, the work goes on without it.
    """
    try:
        click.echo(text, err=err, nl=newline)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk behind a redirection is not the disk of the output
        if not err:
            raise CannotPrint(error.errno, f"cannot print on stdout: {error.strerror}", "stdout") from error
        give_up_stderr()


def forget_line() -> None:
    """Erases what the terminal has shown on the line of stderr, or ends that line where nothing can be erased."""
    if sys.stderr.isatty():
        sys.stderr.write("\n" if os.environ.get("TERM", "dumb") == "dumb" else "\r\x1b[K")


def quoted(argument: str) -> str:
    """Returns an argument as it is typed in a shell, without characters that a terminal would execute."""
    import shlex

    if argument.isprintable():
        return shlex.quote(argument)
    octets = os.fsencode(argument)
    return "$'" + "".join(chr(o) if 32 <= o < 127 and o not in b"'\\" else f"\\x{o:02x}" for o in octets) + "'"


def _columns() -> int:
    import shutil

    return max(shutil.get_terminal_size().columns, 20)


def _wrapped(line: str, columns: int) -> str:
    """Breaks a line between words and indents its rest to the last column. Commands stay whole, so they can be copied."""
    if len(line) <= columns or re.match(_COMMAND, line):
        return line
    import textwrap

    indent = " " * _indent(line, columns)
    return textwrap.fill(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _indent(line: str, columns: int) -> int:
    gaps = [gap.end() for gap in re.finditer(r"(?<=\S) {2,}", line) if gap.end() <= columns * 0.6]
    label = re.match(r"\s*\w+: ", line)
    return gaps[-1] if gaps else label.end() if label else len(line) - len(line.lstrip()) + 2


def _coloured(text: str) -> str:
    """Colours the first word if it is a known label."""
    found = None if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else re.match(_LABEL, text)
    return click.style(found[0], fg=_COLOURS[found[0]], bold=True) + text[found.end() :] if found else text
