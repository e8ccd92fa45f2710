"""The facts of a merge that just ended, of an output by its receipt, and of a comparison."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.index import open_checkpoint
from streammerge.errors import StreammergeError, printable
from streammerge.planning.conservation import unused_text
from streammerge.planning.plan import Plan
from streammerge.planning.receipt import Receipt
from streammerge.planning.tasks import MergeTask, alike, named, objects
from streammerge.recipe.document import to_yaml
from streammerge.recipe.locations import travelling
from streammerge.reporting.facts import LOST, NOT_COMPARED, NOTHING, Facts, Row, Sample
from streammerge.reporting.statistics import Statistics, rows_of
from streammerge.running.execution import Result
from streammerge.sources.base import Source
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.tensors.bundles import bundled, shown
from streammerge.tensors.spec import TensorSpec
from streammerge.units import binary_bytes, counted, decimal_bytes

if TYPE_CHECKING:
    from streammerge.diffing.result import Diff

_MOST_SHOWN, _MOST_MOVED, _MOST_NAMES = 3, 5, 20
_SAMPLED = (
    "distances are estimated while merging, from a sample: all of a tensor up to 256 elements, 256 of up to 65,536, 0.16 % "
    "of a million, 0.1 % of 4 million and more. Where all elements change alike, they are within 1 % from 4 million "
    "on, 5 % below; where rows, columns and single elements change very unlike, within 10 %, and 25 % below (medians). "
    "A report that is asked to be exact compares all elements"
)
_EXACT = "distances are of all elements, measured by reading the inputs and the output again"


def of_merge(result: Result, samples: Sequence[Sample]) -> Facts:
    """Returns the facts of a merge that are kept beside its output. It was run with ``measures``."""
    plan = result.plan
    columns = _Columns(plan)
    names = columns.names
    base = plan.recipe.base
    if base is not None:  # how far the output moved from it is what people ask first
        names.sort(key=lambda name: name != posixpath.basename(base.path.rstrip("/")))
    facts = Facts(
        f"Merge into {printable(result.out.name)}",
        f"{plan.recipe.merge_method.name} of {counted(len(plan.recipe.inputs), 'model')}",
        input_names=names,
        measured=_SAMPLED,
        samples=list(samples),
        memory_bytes=result.memory_bytes,
    )
    facts.rows = _rows(result, columns, names)
    seconds = max(result.seconds, 1e-9)
    facts.made = [
        ("output", printable(result.out)),
        ("size", f"{counted(len(plan.tasks), 'tensor')}, {decimal_bytes(result.written_bytes)}"),
        ("method", plan.recipe.merge_method.name),
        ("time", f"{result.seconds:.1f} s, {decimal_bytes((result.read_bytes + result.written_bytes) / seconds)}/s"),
        ("read", decimal_bytes(result.read_bytes)),
        ("memory", f"{binary_bytes(result.peak_bytes)} of {binary_bytes(result.memory_bytes)} above start-up"),
    ]
    facts.said = [("warning", text) for text in result.warnings] + [("note", text) for text in result.notes]
    return facts


def complete(facts: Facts, result: Result) -> None:
    """Adds to the facts of a merge what only its page shows: recipe, inputs, accounts, verification and summary."""
    plan = result.plan
    accounts = [each.record() for each in plan.accounts]
    facts.recipe = to_yaml(travelling(plan.recipe).to_dict())
    facts.accounts = _accounts(accounts)
    facts.inputs = _input_rows(plan.layout.receipt.inputs, accounts)
    facts.verification = [
        ("checked", "the output can be read back: its structure, its headers and the place of every tensor"),
        ("recipe and inputs", "are in the output's receipt, with a checksum of every tensor"),
        ("again", f"streammerge verify {printable(result.out)}"),
    ]
    _summarise(facts, unused_text(plan.accounts))


def of_output(
    out: Location,
    receipt: Receipt,
    compare: Callable[[str], Diff] | None,
    found: Mapping[str, str],
    gathered: Statistics | str,
) -> Facts:
    """Returns the facts of an output. ``found``: name of a checkpoint in the receipt -> its path, of those that are there.
    ``compare``: compares the output with a path; None if nothing is to be read. ``gathered``: the statistics of the merge,
    or why there are none."""
    recipe = receipt.recipe
    method = str(recipe.get("merge_method", "convert"))
    index = open_checkpoint(out)
    names = [each["checkpoint"] for each in receipt.accounts] or list(receipt.inputs)
    names.sort(key=lambda name: name != recipe.get("base_model"))
    models = len(recipe.get("models", ()))
    facts = Facts(
        f"Merge into {printable(out.name)}",
        f"{method} of {counted(models, 'model') if models else counted(len(names), 'input')}",
        recipe=to_yaml(recipe),
        input_names=names,
    )
    plain = [_plain_row(name, spec) for name, spec in index.specs().items()]
    rows = None if isinstance(gathered, str) else rows_of(gathered, plain)
    if rows is not None and not isinstance(gathered, str):
        facts.rows, facts.input_names, facts.measured = rows, list(gathered.inputs), gathered.measured
        facts.samples, facts.memory_bytes = list(gathered.samples), gathered.memory_bytes
        facts.said += gathered.said
        run = [(label, text) for label, text in gathered.made if label in ("time", "read", "memory")]
    else:
        run = []
        why = gathered if isinstance(gathered, str) else "the statistics have other tensors than the output"
        _compare(facts, plain, names, compare, found, why)
    facts.accounts = _accounts(receipt.accounts)
    facts.inputs = _input_rows(receipt.inputs, receipt.accounts)
    facts.made = [
        ("output", printable(out)),
        ("size", f"{counted(len(index), 'tensor')}, {decimal_bytes(index.nbytes)}"),
        ("method", method),
        ("made by", ", ".join(f"{name} {version}" for name, version in receipt.versions.items())),
        *run,
    ]
    facts.verification = [
        ("receipt", f"sound, digest {receipt.digest[:16]}…"),
        ("bytes", f"not compared here: streammerge verify {printable(out)}"),
    ]
    counts = {each["checkpoint"]: each["tensors"] for each in receipt.accounts}
    lost = [
        f"{count:,} of {counted(counts[checkpoint], 'tensor')} of {printable(checkpoint)}: {names} ({why})"
        for checkpoint, fate, count, names, why in facts.accounts
        if fate == "dropped"
    ]
    _summarise(facts, f"not used: {'; '.join(lost)}" if lost else "")
    return facts


def _compare(
    facts: Facts,
    plain: Sequence[Row],
    names: Sequence[str],
    compare: Callable[[str], Diff] | None,
    found: Mapping[str, str],
    why: str,
) -> None:
    """Compares an output with the inputs that are there. ``why``: why there are no statistics."""
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
        row if row.mark == "i" else row._replace(distances=tuple(each.get(row.name) for each in apart)) for row in plain
    ]
    facts.measured = _EXACT if any(apart) else ""
    facts.said.append(("note", f"{why}, so {'the inputs were read again' if any(apart) else 'no distance is known'}"))
    missing = [name for name in names if name not in found]
    if missing:
        shown = ", ".join(map(printable, missing[:_MOST_SHOWN]))
        facts.said.append(("note", f"{shown} was not found here, so distances to it are not shown"))


def of_diff(diff: Diff) -> Facts:
    """Returns the facts of a comparison: how far B lies from A."""
    facts = Facts(
        f"{printable(posixpath.basename(diff.a.rstrip('/')))} and {printable(posixpath.basename(diff.b.rstrip('/')))}",
        f"{'equal' if diff.equal else 'how far B lies from A'}; A is the first",
        input_names=["A"],
        measured="distances are |B - A| / |A|, of all elements",
        memory_bytes=diff.memory_bytes,
        compared=True,
    )
    facts.rows = [
        Row(
            each.name,
            each.b.shape,
            each.b.dtype.torch_name,
            "equal" if each.equal else "differs",
            (each.relative if each.b.dtype.kind == "float" else None,),  # the number of a counter is no distance
            each.elems,
            "N" if each.nonfinite else "" if each.b.dtype.kind == "float" else "i",
        )
        for each in diff.tensors
        if each.comparable
    ]
    facts.made = [("A", printable(diff.a)), ("B", printable(diff.b))]
    facts.made += [("base", printable(diff.base))] if diff.base is not None else []
    facts.made += [("distance", _number(diff.relative)), ("cosine", _number(diff.cosine))]
    facts.made += [("read", decimal_bytes(diff.read_bytes))]
    only = [
        f"{len(names):,} only in {side}: {shown(bundled(names), _MOST_SHOWN)}"
        for side, names in (("A", diff.only_a), ("B", diff.only_b))
        if names
    ]
    facts.accounts = [
        (side, "only here", len(names), shown(bundled(names), _MOST_NAMES), "the other lacks it")
        for side, names in (("A", diff.only_a), ("B", diff.only_b))
        if names
    ]
    facts.said = [("warning", text) for text in diff.warnings] + [("note", text) for text in diff.notes]
    if diff.agreement is not None:
        facts.summary.append(("advice", diff.advice))
    _summarise(facts, "; ".join(only), what=NOT_COMPARED, all_used=f"{NOTHING}: both have the same tensors")
    return facts


def _summarise(facts: Facts, lost: str, what: str = LOST, all_used: str = "") -> None:
    """Puts what a person wants to know first in front: which layers moved most, and what was not used."""
    first, moved = next(((n, found) for n in range(len(facts.input_names)) if (found := facts.moved(n))), (None, []))
    if first is not None:
        shown = ", ".join(f"{printable(layer)} ({_percent(distance)})" for layer, distance in moved[:_MOST_MOVED])
        facts.summary.insert(0, (f"moved most, from {printable(facts.input_names[first])}", shown))
    facts.summary.insert(
        1 if first is not None else 0, (what, lost.removeprefix("not used: ") or all_used or _all_used(facts))
    )


def _all_used(facts: Facts) -> str:
    """Returns that nothing is lost, beside what nobody wants in a merge."""
    counts = {fate: sum(each[2] for each in facts.accounts if each[1] == fate) for fate in ("dropped", "training")}
    said = [f"{counted(counts['dropped'], 'tensor')} that rules leave out"] if counts["dropped"] else []
    said += [f"the state of a training ({counted(counts['training'], 'tensor')})"] if counts["training"] else []
    return f"{NOTHING} but {' and '.join(said)}" if said else f"{NOTHING}: everything was used"


def _plain_row(name: str, spec: TensorSpec) -> Row:
    mark = "" if spec.dtype.kind == "float" else "i"
    return Row(name, spec.shape, spec.dtype.torch_name, "", (), spec.numel, mark)


def _label(plan: Plan, source: Source) -> str:
    """Returns the checkpoint that a source belongs to; several for an expression over several; "" for what no file has."""
    owners = dict.fromkeys(plan.owners[path] for path in source.paths if path in plan.owners)
    return " + ".join(dict.fromkeys(owner.name or str(owner) for owner in owners))


class _Columns:
    """What distances are measured to: the checkpoints of a plan, and expressions over several, such as a base with an
    adapter. All tensors of a model stand in one column, also those that its adapter leaves alone. ``names``: in the order
    of the recipe."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known: dict[tuple[object, ...], list[str]] = {}
        self._whole = max((len(task.sources) for task, _ in alike(plan.tasks)), default=0)
        places: dict[tuple[int, int], dict[str, None]] = {}
        met: dict[str, None] = {}
        for task in [task for task, _ in alike(plan.tasks)] + list(objects(plan.tasks)):
            for number, source in enumerate(task.sources):
                label = _label(plan, source)
                met[label] = None
                if len(task.sources) == self._whole:
                    places.setdefault((number, int(task.based)), {})[label] = None
        models = travelling(plan.recipe).models
        self._of_place = {}
        for (number, based), own in places.items():
            model = models[number - based].model if 0 <= number - based < len(models) == self._whole - based else ""
            label = max(own, key=lambda label: label.count(" + "))
            self._of_place[number, based] = model if " + " in model else label
        owners: dict[str, set[str]] = {}
        for place, own in places.items():
            for label in own:
                owners.setdefault(label, set()).add(self._of_place[place])
        self._of_label = {label: next(iter(own)) for label, own in owners.items() if len(own) == 1}
        files = dict.fromkeys(owner.name or str(owner) for owner in plan.owners.values())
        named = dict.fromkeys([*self._of_place.values(), *(self._of_label.get(label, label) for label in met)])
        self.names = [name for name in files if name in named] + [name for name in named if name and name not in files]

    def of(self, task: MergeTask) -> list[str]:
        """Returns the column of each source of a task."""
        key = (
            task.based,
            *[id(s.path) if s.__class__ is Stored else s.paths for s in task.sources],
        )  # hashes of paths are slow
        known = self._known.get(key)
        if known is None:
            labels = [_label(self._plan, source) for source in task.sources]
            if len(labels) == self._whole:
                known = [self._of_place.get((n, int(task.based)), label) for n, label in enumerate(labels)]
            else:
                known = [self._of_label.get(label, label) for label in labels]
            self._known[key] = known
        return known


class _Kind:
    """What the rows of tensors have in common that are merged in one way. ``task``: one of them."""

    def __init__(self, plan: Plan, task: MergeTask, columns: _Columns, names: Sequence[str]) -> None:
        self._task, self._is_float = task, task.out.dtype.kind == "float"  # who keeps a task keeps its id
        places = {name: number for number, name in enumerate(names)}
        self._nothing = (None,) * len(names)
        own = columns.of(task)
        self._places = [places.get(column) for column in own]
        self._in_order = self._places == list(range(len(names)))
        self._shape, self._dtype = task.out.shape, task.out.dtype.torch_name
        self._elems = max(task.out.numel, 1)
        inputs, is_copy = len(plan.recipe.inputs), task.method.name == "copy"
        self._copied = self._at(0, 0.0) if task.verbatim and task.sources and self._is_float else self._nothing
        self._how = "copied" if is_copy else task.method.name
        self._mark = ""
        if not self._is_float:
            self._mark = "i"
        elif inputs > 1 and (is_copy or task.verbatim):
            self._mark = "c"
        elif 0 < len(task.sources) - task.based < inputs - (plan.recipe.base is not None):
            self._mark = "m"

    def _at(self, source: int, distance: float) -> tuple[float | None, ...]:
        place = self._places[source]
        return tuple([distance if number == place else None for number in range(len(self._nothing))])

    def row(self, name: str, measured: list[float | None], nonfinite: bool) -> Row:
        if measured and self._in_order:  # nearly always
            mark = "N" if nonfinite else self._mark
            return Row(name, self._shape, self._dtype, self._how, tuple(measured), self._elems, mark)
        distances = self._copied
        if measured:
            found: list[float | None] = [*self._nothing]
            for place, distance in zip(self._places, measured, strict=True):
                if place is not None and found[place] is None:
                    found[place] = distance
            distances = tuple(found)
        mark = "N" if nonfinite else self._mark
        return Row(name, self._shape, self._dtype, self._how, distances, self._elems, mark)


def _rows(result: Result, columns: _Columns, names: Sequence[str]) -> list[Row]:
    """Returns a row for each tensor of the output."""
    plan, kinds, rows = result.plan, dict[int, _Kind](), list[Row]()
    measured = result.measured.distances() if result.measured is not None else [[]] * len(plan.tasks)
    nonfinite = set(result.nonfinite)
    for number, ((name, task), own) in enumerate(zip(named(plan.tasks), measured, strict=True)):
        kind = kinds.get(id(task))
        if kind is None:
            kind = kinds[id(task)] = _Kind(plan, task, columns, names)
        rows.append(kind.row(name, own, number in nonfinite))
    return rows


def _accounts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int, str, str]]:
    """Returns what is not merged under its own name."""
    found = []
    for account in records:
        for each in account["fates"]:
            if each["fate"] != "merged" or "into" in each:
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


def _percent(share: float) -> str:
    """Returns a relative distance as people say it: 16 %, 310 %, 0.42 %."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%" if share >= 0.1 else f"{100 * share:.2g}\N{NO-BREAK SPACE}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
