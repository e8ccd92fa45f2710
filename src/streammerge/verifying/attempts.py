"""Finds the inputs of an output, and computes its values again from them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.errors import ChangedError, StreammergeError, VerifyError, listed, printable
from streammerge.events import Listener, quiet
from streammerge.methods.factors import EXTRACT
from streammerge.options.resources import Resources
from streammerge.options.telling import Verifying
from streammerge.planning.plan import Plan
from streammerge.planning.receipt import Receipt
from streammerge.recipe.model import Recipe
from streammerge.recipe.reader import recipe_of_receipt
from streammerge.requests.adapters import adapters_alone, are_adapters, combined
from streammerge.requests.extractions import extracted
from streammerge.requests.plans import planned
from streammerge.running.choosing import default_workers
from streammerge.running.readback import read_output
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32
from streammerge.stores.locations import HERE, PathLike, parse
from streammerge.units import parse_bytes
from streammerge.verifying.files import Verified
from streammerge.verifying.values import check_inputs, recompute

if TYPE_CHECKING:
    from streammerge.factoring.making import Making


def with_values(
    verified: Verified,
    out: Location,
    receipt: Receipt,
    share: float,
    asked: Verifying,
    resources: Resources,
    listener: Listener = quiet,
) -> Verified:
    """Computes a share of the values again, from the inputs where they are found. Returns what was verified.

    If the values cannot be computed again, a note says why. Raises VerifyError instead if a sample or a folder of inputs
    was asked for. Raises it for wrong values too.
    """
    if receipt.held:
        said = f"{listed(receipt.held)} of its inputs was in memory when it was merged, so it cannot be read again"
        if asked.sample is not None or asked.inputs is not None:
            raise VerifyError(f"{printable(out)} is as it was written, but its values cannot be computed again: {said}")
        verified.notes.append(f"values were not computed again: {said}")
        return verified
    failures: list[Exception] = []
    for folders in _places_of_inputs(out, asked.inputs):
        attempt = replace(verified, notes=[*verified.notes])
        try:
            recipe = recipe_of_receipt(receipt.recipe, asked.own_methods, folders, are_adapters)
            if recipe.merge_method is EXTRACT:
                _with_factors(attempt, extracted(recipe), receipt, share, asked.seed, resources, listener)
            elif adapters_alone(recipe):
                _with_factors(
                    attempt, combined(recipe, single=not out.is_folder()), receipt, share, asked.seed, resources, listener
                )
            else:
                recompute(attempt, _remade(out, recipe, receipt, resources, listener), receipt, share, asked.seed, listener)
        except (StreammergeError, OSError) as error:
            # Without the frames of the attempt, which hold its plan, because the next attempt needs the memory.
            error.__cause__ = error.__context__ = None
            failures.append(error.with_traceback(None))
        else:
            left = attempt.notes[len(verified.notes) :]
            if left and asked.sample is not None:
                raise VerifyError(f"{printable(out)} can be verified only in part: {'; '.join(left)}")
            return attempt
    ranked = [e for kind in (VerifyError, ChangedError, Exception) for e in failures if isinstance(e, kind)]
    said = "; ".join(map(str.strip, str(ranked[0]).splitlines())).replace(":; ", ": ")  # a heading and its list
    if isinstance(ranked[0], VerifyError):
        raise ranked[0]
    if asked.sample is not None or asked.inputs is not None:
        raise VerifyError(f"{printable(out)} is as it was written, but its values were not computed again: {said}")
    verified.notes.append(f"values were not computed again: {said}")
    return verified


def _places_of_inputs(out: Location, inputs: PathLike | None) -> list[list[Location]]:
    """Returns the folders in which the inputs of an output may be read, one list for each attempt.

    Those are the folder of the output and the current folder, or ``inputs``. With ``inputs`` in another store than the
    output, the inputs that have no scheme are looked for beside the output too.
    """
    if inputs is None:
        return [[out.parent], [HERE]]
    given = parse(inputs)
    return [[given]] if given.store == out.store else [[given, out.parent], [given, HERE]]


def _with_factors(
    verified: Verified,
    making: Making,
    receipt: Receipt,
    share: float,
    seed: int,
    resources: Resources,
    listener: Listener,
) -> None:
    """Computes factors of an adapter again."""
    from streammerge.verifying.factors import recompute_factors  # here, because few outputs are adapters

    if making.record is not None:
        check_inputs(making.record.inputs, receipt, resources.workers or default_workers(), listener)
    recompute_factors(verified, making, share, seed, parse_bytes(resources.memory), listener)


def _remade(out: Location, recipe: Recipe, receipt: Receipt, resources: Resources, listener: Listener = quiet) -> Plan:
    """Returns the plan that made the output.

    Raises StreammergeError when the inputs are missing, or are other files.
    """
    hashed = any("sha256" in said for said in receipt.inputs.values())
    plan = planned(recipe, parse(f"output{_ending(out, receipt)}"), resources, "threads", hashed=hashed)
    check_inputs(plan.input_files, receipt, plan.budget.workers, listener)
    return plan


def _ending(out: Location, receipt: Receipt) -> str:
    """Returns the ending of a name that makes the same kind of output."""
    if out.is_folder():
        return ""
    if receipt.kind is not CRC32:
        return ".safetensors"
    return ".pkl" if read_output(out).format == "pickle" else ".pth"
