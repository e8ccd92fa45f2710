"""python -m benchmarks.compare [REVISION] [CASE ...]: whether the working tree is slower than a revision of git.

Runs a few short cases with both versions, in turn, and compares the CPU seconds of the whole processes: on a machine that
does other work too, these vary less than the seconds on a clock. Takes about a minute. Ends with 1 if a case is slower.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.files import Model

_HERE = Path(__file__).parent
_SMALL, _LARGE = (tuple(Model(0.13, number, shape=shape) for number in range(3)) for shape in ("small", "layers"))
_CASES: dict[str, tuple[tuple[Model, ...], str, bool]] = {
    "linear of small tensors": (_SMALL, "linear", False),
    "ties of small tensors": (_SMALL, "ties -p density=0.5", True),
    "dare_ties of small tensors": (_SMALL, "dare_ties -p density=0.5", True),
    "karcher of small tensors": (_SMALL, "karcher", False),
    "linear of large tensors": (_LARGE, "linear", False),
    "slerp of large tensors": (_LARGE[:2], "slerp -p t=0.4", False),
    "ties of large tensors": (_LARGE, "ties -p density=0.5", True),
    "della of large tensors": (_LARGE, "della -p density=0.5", True),
}
"""Name -> (models, method and parameters, whether the first model is the base)."""
_SLOWER = 1.05
"""A ratio above this is called slower. Two runs of the same version differ by 2 to 3 %."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("revision", nargs="?", default="", help="HEAD if anything is changed since, else the one before it")
    parser.add_argument("case", nargs="*", help="which cases, by a part of their names; all without")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=Path, default=_HERE / "files", help="where inputs are made and outputs written")
    arguments = parser.parse_args()
    revision = arguments.revision or ("HEAD" if _git("status", "--porcelain", "--", "src") else "HEAD~1")
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        old.mkdir()
        archive = subprocess.run(["git", "archive", revision, "src"], cwd=_HERE.parent, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(old)], input=archive.stdout, check=True)
        trees = {revision: old / "src", "now": _HERE.parent / "src"}
        for tree in trees.values():
            subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree)], check=True)
        slower = False
        for name in _CASES:
            if not arguments.case or any(part in name for part in arguments.case):
                slower |= _compare(name, trees, arguments.files, arguments.rounds)
    return 1 if slower else 0


def _compare(name: str, trees: dict[str, Path], files: Path, rounds: int) -> bool:
    """Prints the medians of one case. Returns whether the second tree is slower."""
    models, method, based = _CASES[name]
    inputs = [str(model.made(files)) for model in models]
    base = ["--base", inputs.pop(0)] if based else []
    seconds: dict[str, list[float]] = {tree: [] for tree in trees}
    for number in range(rounds):
        for tree in list(trees) if number % 2 else list(trees)[::-1]:
            command = [*inputs, *base, "-o", str(files / "compared.safetensors"), "--method", *method.split()]
            seconds[tree].append(_cpu_seconds(trees[tree], command))
    (files / "compared.safetensors").unlink()
    (before, was), (_, now) = ((tree, statistics.median(taken)) for tree, taken in seconds.items())
    slower = now > _SLOWER * was and min(seconds["now"]) > min(seconds[before])
    print(f"{name}: {was:.2f} CPU s at {before}, {now:.2f} now{', SLOWER' if slower else ''}", flush=True)
    return slower


def _cpu_seconds(tree: Path, arguments: list[str]) -> float:
    own = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "streammerge",
        "merge",
        *arguments,
        "--overwrite",
        "--no-progress",
        "--format",
        "quiet",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=os.environ | own, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=_HERE.parent, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
