"""Results as text and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.cli.flags import as_flags
from streammerge.cli.terminal import WIDTH
from streammerge.errors import RecipeError, StreammergeError, listed, printable
from streammerge.formats.records import RECEIPT_FILE, RECEIPT_KEY, RECIPE_FILE, RECIPE_KEY
from streammerge.pickles.state_dict import unread_tensors
from streammerge.sources.base import Source
from streammerge.sources.stored import Stored
from streammerge.strict_json import load_json
from streammerge.units import binary_bytes, counted, decimal_bytes

if TYPE_CHECKING:
    from streammerge.factoring.making import AdapterResult
    from streammerge.planning.receipt import Receipt
    from streammerge.running.execution import Result
    from streammerge.running.shared import ShareResult
    from streammerge.verifying.files import Verified


_MOST_BYTES = 16 << 20
_SHOWN_LAYERS = 10
"""Layers of an adapter that are shown: those that it represents worst."""


def result_text(result: Result) -> str:
    """Returns the last lines of a run: the output, the speed, the memory."""
    tensors = len(result.plan.tasks)
    files = sum(bool(file.offsets) for file in result.plan.layout.files)
    return _text(
        result, counted(tensors, "tensor") + (f" in {counted(files, 'file')}" if result.plan.layout.as_folder else "")
    )


def adapter_text(result: AdapterResult, verbose: bool = False) -> str:
    """Returns the report of an adapter: how much of the updates it has, its worst layers, and the last lines of a run.
    ``verbose``: all layers."""
    made = counted(sum(each.stored == "factors" for each in result.layers), "module")
    lines = [_factored([each.record() for each in result.layers])]
    shown = [each for each in result.layers if each.stored in ("factors", "absent") and each.norm]
    if not verbose:
        shown = sorted(shown, key=lambda each: -each.error)[:_SHOWN_LAYERS]
    if shown:
        rows = [(printable(each.name), str(each.rank or "-"), f"{each.norm:.3g}", f"{each.error:.2%}") for each in shown]
        table = [("tensor" if verbose else "worst tensors", "rank", "norm", "error"), *rows]
        width = [max(len(row[column]) for row in table) for column in range(4)]
        lines += [
            f"  {row[0]:{width[0]}}  {row[1]:>{width[1]}}  {row[2]:>{width[2]}}  {row[3]:>{width[3]}}" for row in table
        ]
    return "\n".join(lines) + "\n" + _text(result, made)


def _factored(layers: Sequence[Mapping[str, Any]]) -> str:
    """Returns what the factors of an adapter that was made represent. ``layers``: as its receipt has them."""
    kinds = Counter(each["stored"] for each in layers)
    words = {"whole": "stored whole", "equal": "without an update", "absent": "not represented"}
    counts = [f"{kinds[kind]} {said}" for kind, said in words.items() if kinds[kind]]
    ranks = [each["rank"] for each in layers if each["rank"]]
    span = f"{min(ranks)} to {max(ranks)}" if ranks and min(ranks) != max(ranks) else str(max(ranks, default=0))
    total = math.hypot(*(each["norm"] for each in layers))
    error = math.hypot(*(each["norm"] * each["error"] for each in layers)) / total if total else 0.0
    made = f"{counted(kinds['factors'], 'module')} of rank {span}, error {error:.2%} of all updates"
    return ", ".join([made, *counts])


def adapter_json(result: AdapterResult) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "error": result.error,
        "rank": result.rank,
        "layers": [asdict(each) for each in result.layers],
        **_measured(result),
    }


def share_text(result: ShareResult) -> str:
    """Returns the report of a machine that made units of a plan."""
    made = f"made {result.made} of {counted(result.share, 'unit')} of {printable(result.out)}"
    return "\n".join([f"{made}, {result.left} left in all", *_speed(result)])


def share_json(result: ShareResult) -> dict[str, Any]:
    units = {"made": result.made, "share": result.share, "left": result.left}
    return {"out": str(result.out), **units, **_measured(result)}


def _measured(result: Result | AdapterResult | ShareResult) -> dict[str, Any]:
    """Returns the fields that the reports of all runs have."""
    return {
        "read_bytes": result.read_bytes,
        "written_bytes": result.written_bytes,
        "seconds": round(result.seconds, 3),
        "peak_bytes": result.peak_bytes,
        "startup_bytes": result.startup_bytes,
        "memory_bytes": result.memory_bytes,
        "notes": list(result.notes),
        "warnings": list(result.warnings),
    }


def _text(result: Result | AdapterResult, what: str) -> str:
    wrote = f"wrote {printable(result.out)} ({what}, {decimal_bytes(result.written_bytes)})"
    return "\n".join([wrote, *_speed(result)])


def _speed(result: Result | AdapterResult | ShareResult) -> list[str]:
    speed = (result.read_bytes + result.written_bytes) / max(result.seconds, 1e-9)
    return [
        f"read {decimal_bytes(result.read_bytes)}, wrote {decimal_bytes(result.written_bytes)} "
        f"in {result.seconds:.1f} s ({decimal_bytes(speed)}/s)",
        f"peak memory {binary_bytes(result.peak_bytes)} of {binary_bytes(result.memory_bytes)} (above the "
        f"{binary_bytes(result.startup_bytes)} start-up footprint; "
        f"{binary_bytes(result.startup_bytes + result.peak_bytes)} resident in all)",
    ]


def result_json(result: Result) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "tensors": len(result.plan.tasks),
        **_measured(result),
    }


def verified_json(verified: Verified) -> dict[str, Any]:
    return {**asdict(verified), "out": str(verified.out), "recomputed": verified.recomputed}


def _total_bytes(index: CheckpointIndex) -> int:
    return sum(path.size for path in index.files)


def _dtypes(index: CheckpointIndex) -> Counter[str]:
    return Counter(entry.spec.dtype.torch_name for entry in index.entries.values())


def schemes(index: CheckpointIndex) -> dict[str, int]:
    """Returns how many weights are quantised, by their scheme; also by schemes that are not read."""
    found = Counter(weight.scheme for weight in index.quantised.values())
    if index.stored is None and index.narrow:
        from streammerge.tensors.quantised import companions

        known = {name for weight in index.quantised.values() for name in weight.stored}
        told = {(label, stem) for name, (label, stem) in companions(index.specs()).items() if name not in known}
        found.update(f"{label}, which is not read" for label, _ in told)
    return dict(found.most_common())


def recipe_text(index: CheckpointIndex) -> str:
    """Returns the recipe inside a merged file or folder. Raises RecipeError if there is none."""
    from streammerge.recipe.document import parse_yaml, to_yaml

    record = index.metadata.get(RECIPE_KEY)
    beside = index.path / RECIPE_FILE
    if record is None and not index.in_memory and index.path.is_folder() and beside.is_file():
        record = beside.read(0, min(beside.size, _MOST_BYTES)).decode("utf-8", "replace")
    if record is None:
        raise RecipeError(f"{printable(index.path)} carries no recipe; it was not merged by streammerge")
    try:
        try:
            return to_yaml(load_json(record))
        except ValueError:  # a .pth or folder holds YAML
            return to_yaml(parse_yaml(record, str(index.path)).data)
    except RecursionError as error:
        raise RecipeError(f"the recipe in {printable(index.path)} is nested too deeply") from error


def index_json(index: CheckpointIndex, tensors: bool) -> dict[str, Any]:
    """Returns the data that ``inspect --format json`` prints for one checkpoint."""
    shown: dict[str, Any] = {
        "path": index.adapted_as or str(index.path),
        "format": index.format,
        "files": [str(path) for path in index.files],
        "bytes": _total_bytes(index),
        "state_dict": [candidate.label for candidate in index.selection.chosen],
        "tensors": len(index.entries),
        "parameters": index.numel,
        "tensor_bytes": index.nbytes,
        "dtypes": dict(_dtypes(index)),
        "quantised": schemes(index),
        "aliases": index.aliases,
        "candidates": [
            {"path": c.label, "kind": c.kind, "tensors": len(c.tensors), "bytes": c.nbytes, "weights": not c.barred}
            for c in index.selection.candidates
        ],
        "metadata": index.metadata,
        "layers": [] if (receipt := _receipt(index)) is None else receipt.layers,
        "facts": index.container.facts,
        "data": index.plain_data(),
        "classes": index.classes() if index.extras is not None else [],
        "executed": False,
        "notes": index.notes,
        "warnings": index.warnings,
    }
    if tensors:
        shown["entries"] = {
            name: {
                "dtype": entry.spec.dtype.value,
                "shape": list(entry.spec.shape),
                "bytes": entry.nbytes,
                "file": entry.origin,
                "offset": _offset(entry),
                **_form(entry),
            }
            for name, entry in index.entries.items()
        }
    return shown


def index_text(index: CheckpointIndex, tensors: bool) -> str:
    """Returns the text that ``inspect`` prints for one checkpoint."""
    rows = [*_held(index), *_beside(index), *_safety(index)]
    lines = [printable(index.adapted_as or index.path), *(f"  {label:<11}{text}" for label, text in rows)]
    return "\n".join(lines + (_tensor_lines(index) if tensors else []))


_Rows = Iterator[tuple[str, str]]


def _held(index: CheckpointIndex) -> _Rows:
    """Yields rows about the chosen tensors, and about those that were not chosen."""
    selection = index.selection
    count = f" in {len(index.files)} files" if len(index.files) > 1 else ""
    yield "format", f"{index.format}, {decimal_bytes(_total_bytes(index))}{count}"
    held = f"{counted(len(index.entries), 'tensor')}, {index.numel:,} parameters, {decimal_bytes(index.nbytes)}"
    yield ("tensors", held) if index.parts else ("state dict", f"{printable(selection.label)}: {held}")
    for name, part in index.parts.items():
        yield (
            "model",
            f"{printable(name) or '(the folder itself)'}: {counted(len(part), 'tensor')}, {decimal_bytes(part.nbytes)}",
        )
    yield "dtypes", ", ".join(f"{name} {count}" for name, count in _dtypes(index).most_common())
    for scheme, weights in schemes(index).items():
        yield "quantised", f"{weights} weights as {printable(scheme)}"
    training: Counter[str] = Counter()
    for other in selection.candidates:
        if other.barred:
            training[str(other.path[0])] += other.nbytes
        elif other not in selection.chosen:
            yield (
                "also",
                f"{printable(other.label)}: {counted(len(other.tensors), 'tensor')}, {decimal_bytes(other.nbytes)}",
            )
    if training:
        sizes = ", ".join(f"{printable(top)} {decimal_bytes(size)}" for top, size in training.items())
        yield "training", f"{sizes} (not weights)"
    if index.aliases:
        shown = listed([f"{name} = {first}" for name, first in index.aliases.items()], 4)
        yield "tied", f"{len(index.aliases)} names: {shown}"
    unread = unread_tensors(index.extras) if index.extras is not None else []
    if unread:
        yield "not read", f"{counted(len(unread), 'tensor')}: {listed([f'{name} ({kind})' for name, kind in unread], 4)}"


def _beside(index: CheckpointIndex) -> _Rows:
    """Yields rows about the metadata, and about data beside the tensors."""
    for label, text in index.container.facts.items():
        yield label, _short(text)
    keys = [key for key in index.metadata if key != RECEIPT_KEY]
    for key in keys[:12]:
        yield "metadata", _short(f"{key}: {index.metadata[key]}")
    receipt = _receipt(index)
    if receipt is not None or len(keys) < len(index.metadata):
        yield "receipt", "of streammerge, which `streammerge verify` checks"
    if receipt is not None and receipt.layers:
        yield "adapter", _factored(receipt.layers)
    data = index.plain_data()
    if isinstance(data, dict):
        for key, value in list(data.items())[:40]:
            yield "data", _short(f"{key}: {_compact(value)}")
    elif data is not None and not isinstance(data, list):
        yield "data", _short(_compact(data))


def _receipt(index: CheckpointIndex) -> Receipt | None:
    """Returns the receipt of an output that is a folder; None if it has none that can be read."""
    if index.in_memory or index.adapted_as or not index.path.is_folder() or not (index.path / RECEIPT_FILE).lexists():
        return None
    from streammerge.running.readback import receipt_of

    try:
        return receipt_of(index.path)
    except (StreammergeError, OSError):
        return None


def _safety(index: CheckpointIndex) -> _Rows:
    classes = index.classes() if index.extras is not None else []
    if classes:
        yield "classes", listed(classes, 12)
    for note in index.notes:
        yield "note", as_flags(note)
    for warning in index.warnings:
        yield "warning", as_flags(warning)
    if index.extras is not None:
        yield "safety", "nothing was executed or imported"


def _tensor_lines(index: CheckpointIndex) -> list[str]:
    several = len({entry.origin for entry in index.entries.values()}) > 1
    rows = []
    for name, entry in index.entries.items():
        marks = [f"tied to {printable(index.aliases[name])}"] if name in index.aliases else []
        form = _form(entry)
        marks += [f"strides {form['strides']}"] if "strides" in form else []
        marks += ["compressed"] if "compressed" in form else []
        marks += [printable(entry.origin)] if several else []
        shape = "x".join(map(str, entry.spec.shape)) or "scalar"
        rows.append((printable(name), entry.spec.dtype.torch_name, shape, f"@{_offset(entry)}", " ".join(marks)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["", *("  ".join(f"{cell:<{w}}" for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows)]


def _offset(entry: Source) -> int:
    """Where it begins: in the file, or in the inflated bytes of its record."""
    if entry.__class__ is Stored:
        return entry.begin[1]
    from streammerge.sources.deflated import Deflated

    return (entry.within if isinstance(entry, Deflated) else entry).begin[1]


def _form(entry: Source) -> dict[str, Any]:
    """What is said of a tensor whose bytes do not lie in C order in a file."""
    if entry.__class__ is Stored:
        return {}
    from streammerge.sources.deflated import Deflated
    from streammerge.sources.strided import Strided

    inner = entry.within if isinstance(entry, Deflated) else entry
    strides = {"strides": list(inner.strides)} if isinstance(inner, Strided) else {}
    return {**strides, **({"compressed": True} if isinstance(entry, Deflated) else {})}


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    shown = printable(text, 100_000)
    return shown if len(shown) <= WIDTH else shown[: WIDTH - 3] + "..."
