"""Options of the commands, made from the classes of ``streammerge.options``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from conftest import Cli
from safetensors.torch import save_file

import streammerge as sm
from streammerge.cli import options
from streammerge.options.converting import Converting
from streammerge.options.merging import Merging
from streammerge.options.resources import Resources
from streammerge.options.writing import Running


def test_options_come_from_the_environment_too(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    environment = os.environ | {"STREAMMERGE_PLAN_MEMORY": "64MiB"}
    command = [sys.executable, "-m", "streammerge", "plan", *map(str, voices)]
    assert "of 64.0 MiB" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@click.command()
@options.of(Merging, Resources, Converting, Running)
def command(**typed: Any) -> None:
    click.echo(repr(typed))


def typed(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made: dict[str, Any] = ast.literal_eval(done.stdout)
    return made


def test_what_is_not_typed_has_the_default_of_the_class() -> None:
    found = typed()
    assert (found["memory"], found["io"], found["workers"], found["parameters"]) == ("512MiB", "mmap", None, ())
    assert (found["no_resume"], found["overwrite"], found["strip_prefix"]) == (False, False, "")


def test_each_kind_is_read_in_its_way() -> None:
    found = typed("-p", "t=1", "-p", "u=2", "--workers", "3", "--no-resume", "--drop", "a", "--drop", "b", "--io", "pread")
    assert (found["parameters"], found["drop"], found["io"]) == (("t=1", "u=2"), ("a", "b"), "pread")
    assert (found["workers"], found["no_resume"]) == (3, True)


@pytest.mark.parametrize(
    "words", [["--workers", "0"], ["--workers", "x"], ["--io", "x"], ["--seed", "x"], ["--overwrite=1"]]
)
def test_what_is_wrong_is_refused(words: list[str]) -> None:
    assert CliRunner().invoke(command, words).exit_code == 2


def test_help_speaks_of_flags_and_tells_defaults() -> None:
    shown = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=120).stdout.split())
    assert "`" not in shown
    for text in ("Start over instead", "[default: 512MiB]", "[default: equal]", "wins over --dtype", "match. Repeatable."):
        assert text in shown, shown


def test_the_shell_completes_names() -> None:
    context = click.Context(command)
    (method,) = [each for each in command.params if each.name == "method"]
    found = {item.value for item in method.shell_complete(context, "sl")}
    assert found == {name for name in sm.list_methods() if name.startswith("sl")} != set()
    assert options.complete_executor(context, method, "t") == ["threads"]
    assert "auto" in options.complete_executor(context, method, "")


@pytest.mark.parametrize("command", ["merge", "convert", "plan"])
def test_an_output_that_ends_with_the_command_is_refused(cli: Cli, tmp_path: Path, command: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    said = cli(command, "a.safetensors", "-o", "memory://x.safetensors", code=2).stderr
    assert "the store memory:// ends with this command, and the output with it" in said
