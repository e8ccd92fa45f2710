"""The facts of a merge that just ended, of an output by its receipt, and of a comparison."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streammerge.checkpoints.index import open_checkpoint
from streammerge.diffing.result import Diff
from streammerge.errors import StreammergeError, printable
from streammerge.planning.conservation import unused_text
from streammerge.planning.plan import Plan
from streammerge.planning.receipt import Receipt
from streammerge.planning.tasks import MergeTask
from streammerge.recipe.document import to_yaml
from streammerge.recipe.locations import travelling
from streammerge.reporting.facts import Facts, Row, Sample
from streammerge.running.execution import Result
from streammerge.running.measuring import distances
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.units import binary_bytes, counted, decimal_bytes

_MOST_SHOWN = 3
_SAMPLED = "distances are estimated from 1,024 of each 1,048,576 elements, measured while merging"
_EXACT = "distances are of all elements, measured by reading the inputs and the output again"
_ALL_USED = "everything was used"


def of_merge(result: Result, samples: Sequence[Sample]) -> Facts:
    """Returns the facts of a merge. It was run with ``measures``."""
    plan = result.plan
    names = list(dict.fromkeys(_label(plan, path) for path in plan.owners))
    base = plan.recipe.base
    if base is not None:  # how far the output moved from it is what people ask first
        names.sort(key=lambda name: name != posixpath.basename(base.path.rstrip("/")))
    made = travelling(plan.recipe)
    facts = Facts(
        f"Merge into {printable(result.out.name)}",
        f"{plan.recipe.merge_method.name} of {counted(len(plan.recipe.inputs), 'model')}",
        recipe=to_yaml(made.to_dict()),
        input_names=names,
        measured=_SAMPLED,
        samples=list(samples),
        memory_bytes=result.memory_bytes,
    )
    facts.rows = [_row(plan, number, task, names, result.measured) for number, task in enumerate(plan.tasks)]
    facts.accounts = _accounts([each.record() for each in plan.accounts])
    lost = unused_text(plan.accounts)
    seconds = max(result.seconds, 1e-9)
    facts.made = [
        ("output", printable(result.out)),
        ("size", f"{counted(len(plan.tasks), 'tensor')}, {decimal_bytes(result.written_bytes)}"),
        ("method", plan.recipe.merge_method.name),
        ("time", f"{result.seconds:.1f} s, {decimal_bytes((result.read_bytes + result.written_bytes) / seconds)}/s"),
        ("read", decimal_bytes(result.read_bytes)),
        ("memory", f"{binary_bytes(result.peak_bytes)} of {binary_bytes(result.memory_bytes)} above start-up"),
    ]
    facts.inputs = _input_rows(plan.layout.receipt.inputs, [each.record() for each in plan.accounts])
    facts.said = [("warning", text) for text in result.warnings] + [("note", text) for text in result.notes]
    facts.verification = [
        ("checked", "the output can be read back: its structure, its headers and the place of every tensor"),
        ("recipe and inputs", "are in the output's receipt, with a checksum of every tensor"),
        ("again", f"streammerge verify {printable(result.out)}"),
    ]
    _summarise(facts, lost)
    return facts


def of_output(out: Location, receipt: Receipt, compare: Callable[[str], Diff] | None, found: Mapping[str, str]) -> Facts:
    """Returns the facts of an output. ``found``: name of a checkpoint in the receipt -> its path, of those that are there.
    ``compare``: compares the output with a path; None if nothing is to be read."""
    recipe = receipt.recipe
    method = str(recipe.get("merge_method", "convert"))
    index = open_checkpoint(out)
    names = [each["checkpoint"] for each in receipt.accounts] or list(receipt.inputs)
    names.sort(key=lambda name: name != recipe.get("base_model"))
    facts = Facts(
        f"Merge into {printable(out.name)}",
        f"{method} of {counted(len(names), 'input')}",
        recipe=to_yaml(recipe),
        input_names=names,
    )
    apart: list[dict[str, float | None]] = []
    for name in names:
        apart.append({})
        if compare is None or name not in found:
            continue
        try:
            diff = compare(found[name])
        except StreammergeError as error:
            facts.said.append(("note", f"{printable(name)} could not be compared: {error}"))
            continue
        apart[-1] = {each.name: each.relative for each in diff.tensors if each.comparable}
    facts.rows = [
        Row(
            name,
            spec.shape,
            spec.dtype.torch_name,
            "",
            tuple(each.get(name) for each in apart) if spec.dtype.kind == "float" else (),
            spec.numel,
        )
        for name, spec in index.specs().items()
    ]
    missing = [name for name in names if name not in found]
    facts.measured = _EXACT if any(apart) else ""
    if missing:
        shown = ", ".join(map(printable, missing[:_MOST_SHOWN]))
        facts.said.append(("note", f"{shown} was not found here, so distances to it are not shown"))
    facts.accounts = _accounts(receipt.accounts)
    facts.inputs = _input_rows(receipt.inputs, receipt.accounts)
    facts.made = [
        ("output", printable(out)),
        ("size", f"{counted(len(index), 'tensor')}, {decimal_bytes(index.nbytes)}"),
        ("method", method),
        ("made by", ", ".join(f"{name} {version}" for name, version in receipt.versions.items())),
    ]
    facts.verification = [
        ("receipt", f"sound, digest {receipt.digest[:16]}…"),
        ("bytes", f"not compared here: streammerge verify {printable(out)}"),
    ]
    lost = [
        f"{count:,} of {checkpoint}: {names} ({why})"
        for checkpoint, fate, count, names, why in facts.accounts
        if fate == "dropped"
    ]
    _summarise(facts, f"not used: {'; '.join(lost)}" if lost else "")
    return facts


def of_diff(diff: Diff) -> Facts:
    """Returns the facts of a comparison: how far B lies from A."""
    facts = Facts(
        f"{printable(posixpath.basename(diff.a.rstrip('/')))} and {printable(posixpath.basename(diff.b.rstrip('/')))}",
        "equal" if diff.equal else "how far B lies from A",
        input_names=["A"],
        measured="distances are |B - A| / |A|, of all elements",
        memory_bytes=diff.memory_bytes,
    )
    facts.rows = [
        Row(
            each.name,
            each.b.shape,
            each.b.dtype.torch_name,
            "equal" if each.equal else "differs",
            (each.relative,),
            each.elems,
        )
        for each in diff.tensors
        if each.comparable
    ]
    facts.made = [("A", printable(diff.a)), ("B", printable(diff.b))]
    facts.made += [("base", printable(diff.base))] if diff.base is not None else []
    facts.made += [("distance", _number(diff.relative)), ("cosine", _number(diff.cosine))]
    facts.made += [("read", decimal_bytes(diff.read_bytes))]
    only = [f"{len(names):,} only in {side}" for side, names in (("A", diff.only_a), ("B", diff.only_b)) if names]
    facts.accounts = [
        (side, "only here", len(names), ", ".join(map(printable, names[:20])), "the other lacks it")
        for side, names in (("A", diff.only_a), ("B", diff.only_b))
        if names
    ]
    facts.said = [("warning", text) for text in diff.warnings] + [("note", text) for text in diff.notes]
    if diff.agreement is not None:
        facts.summary.append(("advice", diff.advice))
    _summarise(facts, "", what="not compared", all_used=", ".join(only) or "both have the same tensors")
    return facts


def _summarise(facts: Facts, lost: str, what: str = "not used", all_used: str = _ALL_USED) -> None:
    """Puts what a person wants to know first in front: which layers moved most, and what was not used."""
    first = next((n for n in range(len(facts.input_names)) if facts.moved(n)), None)
    if first is not None:
        moved = facts.moved(first)
        shown = ", ".join(f"{printable(layer)} ({distance:.2g})" for layer, distance in moved[:5])
        facts.summary.insert(0, (f"moved most, from {printable(facts.input_names[first])}", shown))
    facts.summary.insert(1 if first is not None else 0, (what, lost.removeprefix("not used: ") or all_used))


def _label(plan: Plan, file: Location) -> str:
    owner = plan.owners[file]
    return owner.name or str(owner)


def _row(plan: Plan, number: int, task: MergeTask, names: Sequence[str], measured: Mapping[int, Sequence[float]]) -> Row:
    own: dict[str, float | None] = {}
    if number in measured:
        for source, distance in zip(task.sources, distances(measured[number]), strict=True):
            if isinstance(source, Stored) and source.path in plan.owners:
                own[_label(plan, source.path)] = distance
    elif task.verbatim and task.sources and isinstance(task.sources[0], Stored) and task.sources[0].path in plan.owners:
        own[_label(plan, task.sources[0].path)] = 0.0 if task.out.dtype.kind == "float" else None
    how = "copied" if task.method.name == "copy" else task.method.name
    return Row(
        task.out.name, task.out.shape, task.out.dtype.torch_name, how, tuple(map(own.get, names)), max(task.out.numel, 1)
    )


def _accounts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int, str, str]]:
    """Returns what is not merged under its own name."""
    found = []
    for account in records:
        for each in account["fates"]:
            if "names" in each or each["fate"] != "merged":
                names = ", ".join(map(printable, each.get("names", ["all others"])[:6]))
                into = f" → {', '.join(map(printable, each['into'][:3]))}" if "into" in each else ""
                found.append((account["checkpoint"], each["fate"], each["count"], names + into, each["why"]))
    order = {"dropped": 0, "training": 1, "copied": 2}
    return sorted(found, key=lambda each: (order.get(each[1], 3), each[0]))


def _input_rows(inputs: Mapping[str, Mapping[str, Any]], accounts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for account in accounts:
        name = account["checkpoint"]
        files = {n: said for n, said in inputs.items() if n == name or n.startswith(f"{name.rstrip('/')}/")}
        used = sum(each["count"] for each in account["fates"] if each["fate"] not in ("dropped", "training"))
        nbytes = decimal_bytes(sum(said["bytes"] for said in files.values()))
        digest = next((str(said["header_sha256"])[:12] for said in files.values() if "header_sha256" in said), "")
        rows.append((printable(name), nbytes, f"{used:,} of {account['tensors']:,}", digest))
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
