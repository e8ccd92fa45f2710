"""The package itself: who imports whom, what is public, what a command line does not wait for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import streammerge as sm

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


def test_public_names_are_sorted_and_there() -> None:
    assert sm.__all__ == sorted(sm.__all__)
    assert all(hasattr(sm, name) for name in sm.__all__)


def test_torch_is_imported_only_where_values_are_computed() -> None:
    heavy = ("torch", "numpy", "safetensors", "yaml")
    code = f"import sys, streammerge.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
