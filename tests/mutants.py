"""Mutation testing: deliberate faults in the code, one at a time, to find those that no test notices.

``python tests/mutants.py`` tries a sample in the modules listed in ``TESTS``, in a copy of the project. Names limit it
to those modules, ``--most N`` sets the number, ``--seed`` chooses others. It prints the survivors with their lines:
either the line does nothing, or a test is missing. Some mutants are equivalent and need no test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {
    "checkpoints/conversions": "checkpoints/test_conversions.py",
    "checkpoints/index": "checkpoints/test_index.py cli/test_render.py",
    "cli/arguments": "cli/test_arguments.py",
    "diffing/numbers": "diffing/test_numbers.py diffing/test_comparing.py",
    "diffing/pairs": "diffing/test_pairs.py",
    "diffing/result": "diffing/test_result.py diffing/test_pairs.py",
    "formats/archive": "formats/test_archive.py",
    "formats/base": "formats/test_base.py",
    "formats/dcp_items": "formats/test_dcp_items.py formats/test_dcp.py",
    "formats/dcp_metadata": "formats/test_dcp_metadata.py formats/test_dcp.py formats/test_dcp_alike.py",
    "formats/dcp_names": "formats/test_dcp_names.py formats/test_dcp.py",
    "kernels/kth_largest": "kernels/test_kth_largest.py methods/test_task_arithmetic.py",
    "kernels/ranking": "kernels/test_ranking.py kernels/test_kth_largest.py methods/test_task_arithmetic.py",
    "pickles/unpickle": "formats/test_hostile.py planning/outputs/test_pickled.py",
    "planning/budget": "planning/test_budget.py planning/test_tasks.py",
    "planning/digest": "planning/test_digest.py",
    "planning/mismatch": "planning/test_mismatch.py",
    "planning/outputs/container": "planning/outputs/test_container.py recipe/test_rules.py",
    "planning/outputs/folder": "planning/outputs/test_folder.py checkpoints/test_huggingface.py",
    "planning/parameters": "planning/test_parameters.py recipe/test_rules.py",
    "planning/plan": "planning/test_plan.py cli/commands/test_plan.py test_merge.py recipe/test_rules.py",
    "planning/tasks": "planning/test_tasks.py test_merge.py",
    "planning/views": "planning/test_views.py recipe/test_rules.py",
    "recipe/arguments": "recipe/test_arguments.py",
    "recipe/checks": "recipe/test_checks.py recipe/test_reader.py",
    "recipe/fields": "recipe/test_fields.py recipe/test_reader.py",
    "recipe/locations": "recipe/test_locations.py recipe/test_reader.py",
    "recipe/model": "recipe/test_model.py",
    "recipe/scalars": "recipe/test_scalars.py",
    "recipe/summary": "recipe/test_summary.py",
    "running/computing": "running/test_computing.py running/test_makers.py",
    "running/copying": "running/test_copying.py running/test_makers.py",
    "running/head_start": "running/test_head_start.py",
    "running/prefetching": "running/test_prefetching.py",
    "running/readback": "running/test_readback.py",
    "running/sampling": "running/test_sampling.py running/test_measuring.py",
    "sources/base": "sources/test_base.py",
    "stores/caching": "stores/test_caching.py",
    "stores/commit": "stores/test_commit.py running/test_execution.py running/test_session.py",
    "stores/journal": "stores/test_journal.py running/test_session.py",
    "stores/local": "stores/test_local.py running/test_execution.py",
    "verifying/files": "verifying/test_files.py",
}
SECONDS = 240
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def sites(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Yields (number of the node, kind of change) for every change that :func:`changed` knows."""
    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            yield number, 0
        elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
            yield number, 1
        elif isinstance(node, ast.If | ast.While | ast.IfExp):
            yield number, 2
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield number, 3
        elif isinstance(node, ast.Raise | ast.AugAssign) or _is_bare_call(node):
            yield number, 4


def _is_bare_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def changed(tree: ast.AST, number: int, kind: int) -> tuple[ast.AST, int]:
    """Returns a copy with one node changed, and its line."""
    made = copy.deepcopy(tree)
    node = list(ast.walk(made))[number]
    if kind == 0:
        node.ops[0] = SWAPPED[type(node.ops[0])]()  # type: ignore[attr-defined]
    elif kind == 1:
        node.op = SWAPPED[type(node.op)]()  # type: ignore[attr-defined]
    elif kind == 2:
        node.test = ast.UnaryOp(ast.Not(), node.test)  # type: ignore[attr-defined]
    elif kind == 3:
        node.value += 1  # type: ignore[attr-defined]
    else:
        for parent in ast.walk(made):
            for field, value in ast.iter_fields(parent):
                if isinstance(value, list) and any(each is node for each in value):
                    setattr(
                        parent, field, [ast.copy_location(ast.Pass(), node) if each is node else each for each in value]
                    )
    return ast.fix_missing_locations(made), node.lineno  # type: ignore[attr-defined]


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]


def survives(folder: Path, tests: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--no-header"]
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    try:
        done = subprocess.run(
            [*command, *(f"tests/{each}" for each in tests.split())],
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--most", type=int, default=30, help="mutants of each module (30)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    alive = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for each in ("src", "tests", "benchmarks", "examples"):
            shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__pycache__", "files", "site"))
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "recipe.schema.json"):
            shutil.copy(ROOT / name, folder)
        for module in arguments.modules:
            path = folder / "src/streammerge" / f"{module}.py"
            text = path.read_text()
            tree, lines = ast.parse(text), text.splitlines()
            if not survives(folder, TESTS[module]):
                sys.exit(f"{module}: its tests fail, or last longer than {SECONDS} s, without any mutant")
            found = list(sites(tree))
            chosen = random.Random(arguments.seed).sample(found, min(arguments.most, len(found)))
            killed = 0
            for number, kind in sorted(chosen):
                made, line = changed(tree, number, kind)
                path.write_text(ast.unparse(made))
                if survives(folder, TESTS[module]):
                    alive += 1
                    was, now = list(ast.walk(tree))[number], list(ast.walk(made))[number] if kind < 4 else ast.Pass()
                    print(f"{module}.py:{line}: {lines[line - 1].strip()}")
                    print(f"    {_first_line(was)} -> {_first_line(now)}", flush=True)
                else:
                    killed += 1
            path.write_text(text)
            print(f"{module}: {killed} of {len(chosen)} mutants killed", flush=True)
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
