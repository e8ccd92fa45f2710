"""That signatures, classes of options and the command line agree, and that sentences name options that exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import streammerge as sm
from streammerge.cli.flags import as_flags
from streammerge.cli.main import cli
from streammerge.options.base import Options, options_of
from streammerge.options.functions import CONVERT, DIFF, EXTRACT, FINISH, MERGE, PLAN, REPORT, SWEEP, VERIFY, WORKER
from streammerge.options.selecting import Selecting
from streammerge.recipe.model import OutputRequest, Recipe

SOURCE = Path(sm.__file__).parent
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[type[Options], ...]]] = {
    "merge": (sm.merge, MERGE),
    "plan": (sm.plan, PLAN),
    "convert": (sm.convert, CONVERT),
    "extract": (sm.extract, EXTRACT),
    "verify": (sm.verify, VERIFY),
    "diff": (sm.diff, DIFF),
    "sweep": (sm.sweep, SWEEP),
    "report": (sm.report, REPORT),
    "worker": (sm.worker, WORKER),
    "finish": (sm.finish, FINISH),
    "inspect": (sm.inspect, (Selecting,)),
}
GIVEN_OTHERWISE = {"a", "b", "inputs", "out", "to", "path", "paths", "plan", "tuned", "recipe", "listener", "progress"}
"""Arguments that are no options: what is merged, where to, and who is told."""
HOW_SHOWN = {"form", "debug", "no_progress", "dry_run", "tensors", "lineage", "recipe", "verbose"}
"""Options of the command line that are about what it shows."""


ACCEPTED = {"Sequence[float]": "Iterable[SupportsFloat]", "int": "SupportsIndex", "float": "SupportsFloat"}
"""Types that an option holds -> wider types that a function accepts for it, numpy's and torch's numbers among them."""


def accepted(annotation: str) -> str:
    return re.sub(r"Sequence\[float\]|(?<!\[)\b(?:int|float)\b", lambda found: ACCEPTED[found[0]], annotation)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_signature_says_what_the_classes_say(name: str) -> None:
    function, groups = FUNCTIONS[name]
    options = options_of(*groups)
    signature = inspect.signature(function).parameters
    assert not [each for each in signature.values() if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    own = GIVEN_OTHERWISE - options.keys()
    keywords = [each for each in signature.values() if each.name not in own]
    assert [(each.name, each.annotation, each.default) for each in keywords] == [
        (each.name, accepted(each.annotation), each.default) for each in options.values()
    ]
    described = inspect.getdoc(function) or ""
    assert all(f"``{each.name}``" in described and each.doc in described for each in options.values())
    assert all(f"``{each}``" in described for each in own & signature.keys() if each != "path" or name == "convert")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_command_line_has_the_same_options(name: str) -> None:
    options = options_of(*FUNCTIONS[name][1])
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    typed = {each.name: each for each in command.params if each.param_type_name == "option"}
    wanted = {each.name if each.short or not each.negated else f"no_{each.name}": each for each in options.values()}
    context = command.make_context(name, ["in", *["b"] * (name == "diff"), *(["-o", "out"] if "out" in typed else [])])
    assert typed.keys() - HOW_SHOWN - {"out", "quiet"} == wanted.keys()
    for param, option in wanted.items():
        assert option.flag in typed[param].opts
        assert as_flags(option.doc).removeprefix("False: ")[1:] in typed[param].help  # type: ignore[operator]
        assert not option.choices or typed[param].type.choices == option.choices  # type: ignore[attr-defined]
        flag = option.kind is not None and option.kind.flag
        assert flag == typed[param].is_flag  # type: ignore[attr-defined]
        assert flag or context.params[param] in (option.default, None, ())


def test_what_overrides_a_recipe_is_described_in_it_alike() -> None:
    for option in options_of(*MERGE).values():
        if option.overrides:
            form = OutputRequest if option.name in OutputRequest.__dataclass_fields__ else Recipe
            assert form.__dataclass_fields__[option.name].metadata["doc"] == option.doc


def test_sentences_of_the_library_name_options_that_exist() -> None:
    """In backquotes, as Python writes them: `name` or `name=value`; no sentence of the library names a flag."""
    known = {
        *options_of(*SWEEP, *MERGE, *PLAN, *CONVERT, *EXTRACT, *VERIFY, *WORKER, *FINISH, *REPORT),
        "out",
        "listener",
        "progress",
        "inputs",
        "path",
    }
    found = set()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                named = re.findall(r"(?<!`)`([a-z_]+)(?:=[^`]*)?`(?!`)", node.value)
                assert set(named) <= known, f"{path}:{node.lineno}: {node.value}"
                found |= set(named)
                own = node.value.replace("--revision", "")  # of the hub's command, which a sentence shows as it is typed
                assert "cli" in path.parts or not re.search(r"(?<![\w-])(--[a-z]|-[po] )", own), f"{path}: {node.value}"
    assert {"overwrite", "on_missing", "keep_optimizer"} <= found
