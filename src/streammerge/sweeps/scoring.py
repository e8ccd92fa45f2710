"""The user's own evaluation: a command with ``{}`` in place of the output, or a function. Its last number is the score."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from collections.abc import Callable

from streammerge.errors import RecipeError, TaskError, printable
from streammerge.tensors.instructions import environment_of_others

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
Score = Callable[[str], float]


def scorer(asked: str | Callable[[str], object]) -> Score:
    """Returns a function from the path of an output to its score. Raises RecipeError for a command without ``{}``."""
    if callable(asked):
        return lambda path: _number(asked(path), path)
    if "{}" not in asked:
        raise RecipeError(f"`score` takes a command with {{}} where the output's name is to stand, not {printable(asked)}")
    return lambda path: _run(asked.replace("{}", shlex.quote(path)))


def _run(command: str) -> float:
    """Runs the command in a shell, as the user typed it. Returns the last number that it printed."""
    done = subprocess.run(
        command,
        shell=True,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env=environment_of_others(),
    )
    if done.returncode:
        raise TaskError(f"the score could not be computed: {printable(command)} ended with code {done.returncode}")
    found = _NUMBER.findall(done.stdout)
    if not found:
        raise TaskError(f"the score could not be computed: {printable(command)} printed no number")
    return float(found[-1])


def _number(value: object, path: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TaskError(f"the score of {printable(path)} is no number: {printable(value, 60)}") from error
    if math.isnan(number):
        raise TaskError(f"the score of {printable(path)} is not a number (NaN)")
    return number


def kept_count(keep: str | int | None) -> int | None:
    """Reads ``best:3`` or a number. Returns how many outputs are kept, None for all. Raises RecipeError."""
    if keep is None:
        return None
    found = re.fullmatch(r"(?:best:)?([1-9]\d*)", str(keep))
    if found is None:
        raise RecipeError(f"`keep` takes best:N, like best:3, not {printable(keep)}")
    return int(found[1])
