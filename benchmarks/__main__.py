"""python -m benchmarks: runs cases, prints their results, keeps the history, writes the page."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks import history, page
from benchmarks.cases import CASES, Case
from benchmarks.runner import OURS, REFERENCE, SYNCED, TORCH, Result, run_capped, run_case

_HERE = Path(__file__).parent
_LIMITED_BYTES = 300 << 20
"""Bytes for Python and torch, plus the smallest useful budget."""


def main() -> int:
    arguments = _arguments()
    cases = [case for case in CASES if _chosen(case, arguments)]
    if not cases:
        print("no such case; there are:", *(case.name for case in CASES), sep="\n  ", file=sys.stderr)
        return 2
    results: list[Result] = []
    try:
        for number, case in enumerate(cases):
            print(f"{case.name} ({number + 1} of {len(cases)})", flush=True)
            made = run_case(case, arguments.files, arguments.files, arguments.rounds, arguments.peers, _say)
            results += made
            print("\n".join(map(_line, made)), flush=True)
            _make_room(cases[number + 1 :], arguments)
    except KeyboardInterrupt:
        print("interrupted; the cases that are done count")
    if arguments.limited:
        results += run_capped(CASES[0], arguments.files, arguments.files, _LIMITED_BYTES)
        print(
            *(f"limited: {each['tool']} ended with {each['exit_code']}" for each in results if "limit_bytes" in each),
            sep="\n",
        )
    night = history.night(results)
    nights = [*history.read(arguments.history), night]
    if arguments.append:
        history.append(arguments.history, night)
    if arguments.page:
        print(f"wrote {page.write(arguments.page, nights)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(night, indent=1))
    worse = history.regressions(nights)
    print(*(f"WORSE: {each}" for each in worse), sep="\n")
    return 1 if worse else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("case", nargs="*", help="which cases, by their names or a part of them; all without")
    parser.add_argument("--quick", action="store_true", help="only the few cases of a short run")
    parser.add_argument("--peers", action="store_true", help="other tools too, as far as scripts/peers has installed them")
    parser.add_argument("--limited", action="store_true", help="also under a limit of the kernel (a memory cgroup)")
    parser.add_argument("--rounds", type=int, default=3, help="of each case, side by side with its reference (3)")
    parser.add_argument("--files", type=Path, default=_HERE / "files", help="where inputs are made and outputs written")
    parser.add_argument("--tidy", action="store_true", help="remove inputs when no later case needs them")
    parser.add_argument("--history", type=Path, default=_HERE / "history.jsonl")
    parser.add_argument("--append", action="store_true", help="add this run to the history")
    parser.add_argument("--page", type=Path, help="write the page there")
    parser.add_argument("--json", type=Path, help="write all results there")
    return parser.parse_args()


def _chosen(case: Case, arguments: argparse.Namespace) -> bool:
    names = {each.name for each in CASES}
    named = not arguments.case or any(part == case.name if part in names else part in case.name for part in arguments.case)
    return named and (case.quick or not arguments.quick)


def _make_room(later: list[Case], arguments: argparse.Namespace) -> None:
    if arguments.tidy:
        wanted = {model.file_name for case in later for model in case.models}
        for path in arguments.files.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _say(text: str) -> None:
    print(text, flush=True)


def _line(result: Result) -> str:
    held = f"{result['anonymous_bytes'] >> 20} MiB of its own, {result['resident_bytes'] >> 20} resident"
    ratio = f"{result['ratio']:.2f} times the reference ({result['ratio_low']:.2f} to {result['ratio_high']:.2f})"
    plain = result["tool"] in (REFERENCE, SYNCED, TORCH)
    told = "" if plain else f", {ratio}, {held}"
    if result["tool"] == OURS and "own_ratio" in result:
        told += f"; the work itself {result['own_seconds']:.2f} s, {result['own_ratio']:.2f} times"
    failed = f"  FAILED with exit code {result['exit_code']}" if result["exit_code"] else ""
    return f"= {result['tool']}: {result['seconds']:.2f} s, {result['cpu_seconds']:.2f} CPU s{told}{failed}"


if __name__ == "__main__":
    sys.exit(main())
