"""The package's structure: imports between modules, public names, and imports that a command line avoids."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import streammerge as sm
from streammerge.cli.main import cli

SOURCE = Path(sm.__file__).parent


ROOMS = (
    "errors", "events", "units", "version", "strict_json", "options",  # words
    "tensors", "kernels", "methods", "stores", "pickles", "formats", "recipe", "checkpoints", "planning", "running",
    "verifying", "api", "cli", "__init__", "__main__",
)  # fmt: skip
"""Rooms from the bottom up. A room imports only from rooms before it."""


def imports(path: Path) -> set[str]:
    """Returns dotted names of the package's modules that a file imports, for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "streammerge":
            module = (node.module or "").removeprefix("streammerge").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                file = SOURCE / inner.replace(".", "/")
                found.add(inner if file.is_dir() or file.with_suffix(".py").exists() else module or "__init__")
    return found


def order_of(room: Path) -> list[str]:
    """Returns the modules of a room in the order of its docstring; each imports only modules above it."""
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    return re.findall(r"^    (\w+)", doc, re.MULTILINE)


def modules() -> dict[str, Path]:
    """Returns dotted name -> file of every module."""
    return {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in SOURCE.rglob("*.py")}


def test_rooms_import_from_the_rooms_below_them() -> None:
    for name, path in modules().items():
        room = name.partition(".")[0]
        for other in imports(path):
            below = other.partition(".")[0]
            assert ROOMS.index(below) <= ROOMS.index(room), f"{name} imports {other}"
            assert below != room or "." in name or name == other, f"{name} imports {other}, which lies beside it"


def test_no_room_holds_a_circle() -> None:
    """A module that its room's docstring does not list is a leaf: no module beside it imports it."""
    for init in SOURCE.rglob("__init__.py"):
        room = init.parent
        if room == SOURCE:
            continue
        prefix, order = ".".join(room.relative_to(SOURCE).parts), order_of(room)
        there = {p.stem for p in room.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
        assert set(order) <= there, f"{prefix} lists {set(order) - there}, which it does not have"
        for module in there:
            files = [room / f"{module}.py"] if (room / f"{module}.py").exists() else (room / module).rglob("*.py")
            for path in files:
                for other in imports(path):
                    beside = other.removeprefix(f"{prefix}.").partition(".")[0]
                    if not other.startswith(f"{prefix}.") or beside == module:
                        continue
                    assert beside in order, f"{prefix}.{module} imports {beside}, which is a leaf"
                    listed = order.index(module) if module in order else len(order)
                    assert order.index(beside) < listed, f"{prefix}.{module} imports {beside}, which stands below it"


def test_public_names_are_there_for_people_and_for_type_checkers() -> None:
    assert all(hasattr(sm, name) for name in sm.__all__)
    (typed,) = [node for node in ast.parse(Path(sm.__file__).read_text()).body if isinstance(node, ast.If)]
    assert sorted(alias.asname for line in typed.body for alias in line.names) == sm.__all__


def test_torch_is_imported_only_where_values_are_computed() -> None:
    heavy = ("torch", "numpy", "safetensors", "yaml")
    code = f"import sys, streammerge.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_is_imported_is_declared() -> None:
    """Checks every import of another project. No line imports numpy; safetensors imports it on request."""
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
    assert 'framework="numpy"' in (SOURCE / "running/readback.py").read_text()


def test_command_line_and_python_call_the_same_things_the_same() -> None:
    """Every option is an argument of the same name, described in the function's docstring, and vice versa."""
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
