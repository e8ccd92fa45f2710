"""Writes reports: of a merge that just ended, of an output, of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.reporting import statistics
from streammerge.reporting.facts import Facts, Sample
from streammerge.reporting.gathered import complete, of_diff, of_merge, of_output
from streammerge.running.execution import Result
from streammerge.running.process import collector_paused
from streammerge.running.readback import receipt_of
from streammerge.stores.base import Location
from streammerge.stores.locations import parse

if TYPE_CHECKING:
    from streammerge.diffing.result import Diff


def check_possible(file: Location, overwrite: bool) -> None:
    """Raises RecipeError if a report cannot be written: its file exists, or matplotlib is not installed.

    A report replaces only a page, so that no model is lost by a mistyped name.
    """
    from streammerge.reporting.page import BEGIN
    from streammerge.reporting.pictures import plotting  # here, because statistics are gathered without pages

    plotting()
    file.check_writable(overwrite)
    if file.is_folder():
        raise RecipeError(f"{printable(file)} is a folder, and a report is a file; name one, like report.html")
    if file.exists() and file.size and file.read(0, min(file.size, len(BEGIN))).lower() != BEGIN.encode():
        raise RecipeError(f"{printable(file)} is no report, and would be lost; choose another name for the report")


def report_merge(result: Result, samples: Sequence[Sample], file: Location | None, keeps: bool) -> None:
    """Writes the report of a merge into a file, and if ``keeps`` its statistics beside the output."""
    with collector_paused():  # the rows of many tensors are no cycles
        facts = of_merge(result, samples)
        if keeps:
            statistics.write(facts, result.receipt_digest, result.out)
    if file is not None:
        complete(facts, result)
        _write(facts, file)


def report_diff(diff: Diff, file: Location) -> None:
    """Writes the report of a comparison."""
    _write(of_diff(diff), file)


def report_output(
    out: Location, file: Location, inputs: str | None, compare: Callable[[str, str], Diff] | None, exact: bool = False
) -> None:
    """Writes the report of an output, from its receipt and its statistics. Without these, compares it with the inputs that
    are there.

    ``inputs``: the folder that holds them; else they are looked for here and beside the output. ``compare``: compares an
    input and the output; None if nothing is to be read. ``exact``: compares in any case. Raises RecipeError for an output
    without a receipt.
    """
    receipt = receipt_of(out)
    if exact and compare is None:
        raise RecipeError("`exact` compares the output with its inputs, and `compare=False` reads none; leave one out")
    gathered = "all elements are asked for" if exact else statistics.read(out, receipt.digest)
    places = [parse(inputs)] if inputs is not None else [parse("."), out.absolute().parent]
    found = {}
    for name in [each["checkpoint"] for each in receipt.accounts] or list(receipt.inputs):
        if "://" in name or name.startswith("/") or ".." in name.split("/"):
            continue  # a receipt may come from a stranger
        there = next((place / name for place in places if (place / name).exists()), None)
        if there is not None:
            found[name] = str(there)
    if inputs is not None and not found:
        raise RecipeError(f"{printable(inputs)} holds none of the inputs that the receipt of {printable(out)} names")
    reading = None if compare is None else lambda path: compare(path, str(out))
    _write(of_output(out, receipt, reading, found, gathered), file)


def _write(facts: Facts, file: Location) -> None:
    from streammerge.reporting.page import page

    with collector_paused():  # matplotlib makes so many objects that torch's would be searched again and again
        text = page(facts)
    file.write_whole(text.encode("utf-8", "backslashreplace"), overwrite=True)
