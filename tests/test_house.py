"""The package itself: who imports whom, what is public, what a command line does not wait for."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import streammerge as sm
from streammerge.cli import cli

SOURCE = Path(sm.__file__).parent


LAYERS = {
    0: [
        "choices",
        "tensors",
        "dtypes",
        "units",
        "events",
        "errors",
        "tree",
        "checksums",
        "names",
        "rng",
        "select",
        "layers",
        "quantised",
        "version",
    ],
    1: [
        "group",
        "sums",
        "order",
        "budget",
        "storage",
        "memory",
        "executors",
        "unpickle",
        "rebuild",
        "repickle",
        "statedict",
    ],
    2: ["formats", "methods", "recipe", "bookkeeping", "huggingface"],
    3: ["checkpoint", "workspace", "tasks", "engine", "staging", "writer", "receipt"],
    4: [
        "inputs",
        "conversions",
        "choose",
        "parts",
        "values",
        "mismatch",
        "align",
        "output",
        "placing",
        "structure",
        "pickled",
        "planning",
        "wish",
        "relatives",
        "resume",
    ],
    5: ["production", "run", "verification", "recomputation"],
    6: ["api"],
    7: ["__init__", "cli", "__main__"],
}


def test_imports_go_downward_only() -> None:
    layer = {name: number for number, names in LAYERS.items() for name in names}
    order = [name for names in LAYERS.values() for name in names]
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streammerge"):
                parts = (node.module or "").split(".")
                used = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                for other in used:
                    other = "__init__" if other == "__version__" else other
                    assert other in order, f"{path.name} imports {other}, which has no layer"
                    assert layer[other] <= layer[room], f"{room} ({layer[room]}) imports {other} ({layer[other]})"
                    if room != other and layer[other] == layer[room] and layer[room] == 2:
                        assert {room, other} != {"formats", "methods"}


def test_public_names_are_there_for_people_and_for_type_checkers() -> None:
    assert all(hasattr(sm, name) for name in sm.__all__)
    (typed,) = [node for node in ast.parse(Path(sm.__file__).read_text()).body if isinstance(node, ast.If)]
    assert sorted(alias.asname for line in typed.body for alias in line.names) == sm.__all__


def test_torch_is_imported_only_where_values_are_computed() -> None:
    heavy = ("torch", "numpy", "safetensors", "yaml")
    code = f"import sys, streammerge.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_is_imported_is_declared() -> None:
    """Every module of another project, wherever it is imported. No line imports numpy: safetensors does, when asked to."""
    text = (SOURCE.parent.parent / "pyproject.toml").read_text()
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = {name.lower().replace("-", "_") for name in re.findall(r'^    "([\w-]+)', block, re.MULTILINE)}
    called = {"yaml": "pyyaml"}
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    others = {called.get(name, name) for name in found - {*sys.stdlib_module_names, "streammerge"}}
    assert others | {"numpy"} == declared
    assert 'framework="numpy"' in (SOURCE / "structure.py").read_text()


def test_command_line_and_python_call_the_same_things_the_same() -> None:
    """Every option is an argument of that name, described where the function is; and the other way round."""
    for command, functions in (("merge", (sm.merge, sm.plan)), ("convert", (sm.convert,)), ("verify", (sm.verify,))):
        arguments = {name for function in functions for name in inspect.signature(function).parameters}
        options = [name for each in cli.commands[command].params for name in each.opts]
        typed = {name[2:].replace("-", "_") for name in options if name.startswith("--")}
        how_shown = {"debug", "format", "no_progress", "no_resume", "no_normalize", "dry_run"}
        assert typed - how_shown <= arguments
        given_otherwise = {"inputs", "path", "out", "options", "parameters", "recipe"}
        assert arguments - typed - given_otherwise <= {"executor", "listener", "normalize", "resume"}
        described = " ".join(inspect.getdoc(function) or "" for function in (*functions, sm.plan, sm.merge))
        assert not [name for name in arguments - {"options"} if f"``{name}" not in described]
