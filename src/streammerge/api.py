"""merge(), plan(), convert(), inspect(): the only module that wires the layers together. Nothing here prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge import inputs as chosen_inputs
from streammerge.checkpoint import CheckpointIndex, open_checkpoint
from streammerge.errors import RecipeError, StreammergeError, printable
from streammerge.events import Event, Listener
from streammerge.group import Kernel
from streammerge.memory import resident_bytes
from streammerge.methods.registry import COPY, find_method
from streammerge.plan import Plan, build_plan
from streammerge.recipe import IO, Recipe, optional_bytes, optional_dtype
from streammerge.run import Result, default_workers, execute
from streammerge.storage import check_writable, free_bytes, write_text
from streammerge.units import decimal_bytes, parse_bytes

DEFAULT_MEMORY = "512MiB"

PathLike = str | Path


def _quiet(event: Event) -> None:
    """The listener of those who do not listen."""


def _paths(paths: PathLike | Sequence[PathLike]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def inspect(path: PathLike, *, state_dict: str | None = None, ema: str = "ignore") -> CheckpointIndex:
    """What a checkpoint is and holds. Reads headers only; nothing in the file is executed or imported.

    Raises FormatError when it cannot be read.
    """
    return open_checkpoint(path, state_dict, ema)


def plan(
    inputs: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
    *,
    weights: Sequence[float] | None = None,
    method: str | Callable[..., Kernel] = "linear",
    base: PathLike | None = None,
    normalize: bool | None = None,
    seed: int = 0,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: str = "mmap",
    dtype: object = None,
    out_dtype: object = None,
    compute_dtype: object = None,
    state_dict: str | None = None,
    ema: str = "ignore",
    last: int | None = None,
    on_missing: str = "error",
    integers: str | None = None,
    allow_nonfinite: bool = False,
    keep_optimizer: bool = False,
    max_shard_size: str | int | None = None,
    convert_first: PathLike | None = None,
    **parameters: Any,
) -> Plan:
    """What :func:`merge` would do, from headers alone; nothing is written. The parameters are those of merge.

    ``method``: a name, ``package.module:function`` or a function; ``parameters`` are its own, like ``t=0.3`` or
    ``density=[0.5, 0.7]``. ``base``: the common ancestor, for the methods that need one.

    ``print(plan)`` shows it; ``plan.tasks``, ``plan.peak_bytes``, ``plan.read_bytes`` are its numbers.
    """
    if normalize is not None:
        parameters["normalize"] = normalize
    recipe = Recipe(
        tuple(chosen_inputs.expand(_paths(inputs), last)),
        method=find_method(method),
        base=None if base is None else str(base),
        weights=None if weights is None else tuple(map(float, weights)),
        parameters=parameters,
        seed=seed,
        out_dtype=optional_dtype(out_dtype if out_dtype is not None else dtype),
        compute_dtype=optional_dtype(compute_dtype),
        state_dict=state_dict,
        ema=ema,
        on_missing=on_missing,
        integers=integers,
        allow_nonfinite=allow_nonfinite,
        keep_optimizer=keep_optimizer,
        max_shard_bytes=optional_bytes(max_shard_size),
    )
    return _plan(recipe, out, memory, workers, io, convert_first)


def _plan(
    recipe: Recipe,
    out: PathLike | None,
    memory: str | int,
    workers: int | None,
    io: str,
    convert_first: PathLike | None = None,
) -> Plan:
    if io not in IO:
        raise RecipeError(f"--io takes {' or '.join(IO)}, not {printable(io)}")
    if workers is not None and workers < 1:
        raise RecipeError("--workers takes a positive number")
    indexes = [open_checkpoint(path, recipe.state_dict, recipe.ema) for path in recipe.checkpoints]
    if convert_first is not None:
        indexes = [_from_converted(index, recipe, Path(convert_first)) for index in indexes]
    planned = build_plan(
        recipe,
        indexes,
        None if out is None else str(out),
        memory_bytes=parse_bytes(memory),
        workers=workers or default_workers(),
        io=io,
    )
    planned.warnings += _output_warnings(planned)
    return planned


def _output_warnings(planned: Plan) -> list[str]:
    """What about the output's place would stop a run, as far as can be told now."""
    if planned.out is None:
        return []
    free = free_bytes(planned.out.absolute().parent)
    said = []
    if planned.disk_bytes > free:
        said.append(f"{decimal_bytes(planned.disk_bytes)} of disk are needed where {decimal_bytes(free)} are free")
    try:
        check_writable(planned.out, overwrite=False)
    except RecipeError as error:
        said.append(str(error))
    return said


def merge(
    inputs: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
    convert_first: PathLike | None = None,
    **options: Any,
) -> Result:
    """Merges checkpoints into ``out``, one chunk at a time.

    ``inputs``: paths or globs. ``weights``: one number per input; ``linear``, the default method, divides them by
    their sum unless ``normalize`` is False. ``memory``: the budget above the start-up footprint. Further options, and
    the parameters of the method, are those of :func:`plan`.

    Raises RecipeError, FormatError, MismatchError, BudgetError, SpaceError, LockedError, ChangedError, VerifyError or
    TaskError; the output is then not there. Returns what was read, written and needed.
    """
    check_writable(Path(out), overwrite)
    before = resident_bytes()
    if convert_first is not None:
        named = [] if options.get("base") is None else _paths(options["base"])
        chosen = chosen_inputs.expand(_paths(inputs), options.get("last"))
        _convert_all([*named, *chosen], Path(convert_first), options)
    planned = plan(inputs, out, convert_first=convert_first, **options)
    foreseen = _output_warnings(planned)  # what would stop a run stops this one itself, or was allowed
    planned.warnings = [warning for warning in planned.warnings if warning not in foreseen]
    return execute(planned, overwrite, listener or _quiet, before)


def convert(
    path: PathLike,
    out: PathLike,
    *,
    dtype: object = None,
    max_shard_size: str | int | None = None,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    strip_prefix: str = "",
    keep_optimizer: bool = False,
    state_dict: str | None = None,
    ema: str = "ignore",
    extras: PathLike | None = None,
    allow_nonfinite: bool = False,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: str = "mmap",
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Result:
    """Writes a checkpoint in another container: ``.pth`` to safetensors or back, one file or shards.

    ``dtype`` recasts floating-point tensors; ``keep`` and ``drop`` are glob patterns on tensor names; ``extras`` names
    a JSON file for what is not a tensor. The errors are those of :func:`merge`.
    """
    check_writable(Path(out), overwrite)
    before = resident_bytes()
    recipe = Recipe(
        (str(path),),
        method=COPY,
        out_dtype=optional_dtype(dtype),
        state_dict=state_dict,
        ema=ema,
        allow_nonfinite=allow_nonfinite,
        keep_optimizer=keep_optimizer,
        max_shard_bytes=optional_bytes(max_shard_size),
        drop=tuple(drop),
        keep=tuple(keep),
        strip_prefix=strip_prefix,
    )
    planned = _plan(recipe, out, memory, workers, io)
    if extras is not None:
        _check_extras(Path(extras), planned, overwrite)
    result = execute(planned, overwrite, listener or _quiet, before)
    if extras is not None:
        index = open_checkpoint(path, state_dict, ema)
        content = {"format": index.format, "metadata": index.metadata, "data": index.plain_data()}
        write_text(Path(extras), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return result


def _check_extras(extras: Path, planned: Plan, overwrite: bool) -> None:
    """RecipeError when writing the extras would lose an input, the output or, without ``overwrite``, another file."""
    check_writable(extras, overwrite)
    taken = [Path(path).resolve() for path in planned.identities] + ([planned.out.resolve()] if planned.out else [])
    if extras.resolve() in taken or extras.resolve().parent in taken:
        raise RecipeError(f"--extras {printable(extras)} is an input or the output; choose another name")


def _convert_all(paths: list[str], folder: Path, options: dict[str, Any]) -> None:
    """Each input as a safetensors file in ``folder``, made now unless it is there and still right."""
    folder.mkdir(parents=True, exist_ok=True)
    passed = {k: options[k] for k in ("state_dict", "ema", "memory", "workers", "io") if k in options}
    for path in paths:
        index = open_checkpoint(path, options.get("state_dict"), options.get("ema", "ignore"))
        target = chosen_inputs.converted_path(index, folder)
        if not _is_conversion(target, index):
            convert(path, target, overwrite=True, allow_nonfinite=True, **passed)


def _is_conversion(target: Path, index: CheckpointIndex) -> bool:
    try:
        made = open_checkpoint(target)
    except StreammergeError:
        return False
    wanted = {name: entry.spec for name, entry in index.entries.items()}
    return {name: entry.spec for name, entry in made.entries.items()} == wanted


def _from_converted(index: CheckpointIndex, recipe: Recipe, folder: Path) -> CheckpointIndex:
    """The index with its tensors' bytes taken from the converted file, where that is there."""
    target = chosen_inputs.converted_path(index, folder)
    if not _is_conversion(target, index):
        return index
    made = open_checkpoint(target)
    aliased = {n: made.entries[index.aliases.get(n, n)] for n in index.entries}
    entries = {n: replace(e, spec=index.entries[n].spec) for n, e in aliased.items()}
    return replace(index, entries=entries, files=(*index.files, *made.files))
