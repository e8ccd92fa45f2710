"""merge(), plan(), convert(), inspect(), verify(): the only module that wires the layers together. Nothing here prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.checkpoints.choosing import choose, exponential_weights
from streammerge.checkpoints.conversions import converted_path, from_conversion, is_conversion
from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.errors import ChangedError, FormatError, RecipeError, StreammergeError, VerifyError, listed, printable
from streammerge.events import Listener, quiet
from streammerge.formats.safetensors import shared_headers
from streammerge.kernels.chunk import Kernel
from streammerge.options import DEFAULT_MEMORY, IO
from streammerge.planning.plan import Plan, build_plan
from streammerge.planning.receipt import Receipt
from streammerge.recipe.arguments import conversion, overridden, recipe_of
from streammerge.recipe.model import Recipe
from streammerge.recipe.reader import read_recipe
from streammerge.running.execution import Result, default_workers, execute, refuse_extras
from streammerge.running.executors.base import Executors
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.running.process import collector_paused, resident_bytes
from streammerge.running.readback import receipt_of
from streammerge.running.session import RunOptions
from streammerge.stores.checksums import CRC32
from streammerge.stores.commit import check_writable, sweep, write_text
from streammerge.stores.local import free_bytes
from streammerge.units import decimal_bytes, parse_bytes, parse_share
from streammerge.verifying.files import Verified, check_files
from streammerge.verifying.values import check_inputs, recompute

PathLike = str | Path


def _paths(paths: PathLike | Sequence[PathLike]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def inspect(path: PathLike, *, state_dict: str | None = None, ema: str | None = None) -> CheckpointIndex:
    """What a checkpoint is and holds. Reads headers only; nothing in the file is executed or imported.

    Raises FormatError when it cannot be read.
    """
    return open_checkpoint(path, state_dict, ema or "ignore")


def plan(
    inputs: PathLike | Sequence[PathLike] = (),
    out: PathLike | None = None,
    *,
    recipe: PathLike | Mapping[str, Any] | None = None,
    own_methods: bool = False,
    weights: Sequence[float] | None = None,
    method: str | Callable[..., Kernel] | None = None,
    base: PathLike | None = None,
    normalize: bool | None = None,
    last: int | None = None,
    range: str | None = None,
    best: int | None = None,
    by: str | None = None,
    highest: bool = False,
    ema_decay: float | None = None,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: str = "mmap",
    convert_first: PathLike | None = None,
    dtype: object = None,
    out_dtype: object = None,
    compute_dtype: object = None,
    state_dict: str | None = None,
    ema: str | None = None,
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    on_missing: str | None = None,
    on_shape: str | None = None,
    integers: str | None = None,
    allow_nonfinite: bool | None = None,
    keep_optimizer: bool | None = None,
    max_shard_size: str | int | None = None,
    seed: int | None = None,
    hash: bool = False,
    **parameters: Any,
) -> Plan:
    """What :func:`merge` would do, from headers alone; nothing is written. The parameters are those of merge.

    ``inputs``: paths or globs. ``out``: by its name the container is planned. ``method`` (linear): a name,
    ``package.module:function`` or a function; ``parameters`` are its own, like ``t=0.3`` or ``density=[0.5, 0.7]``.
    ``weights``: one number per input; linear divides them by their sum unless ``normalize`` is False. ``base``: the common
    ancestor, for the methods that need one. ``seed``: for those that draw random numbers.

    ``recipe``: a mergekit configuration as a YAML file or a dict, in place of inputs, method and parameters; other
    options win over its keys. ``own_methods`` lets it name methods that are your own code.

    ``dtype`` or ``out_dtype`` (which wins): of the output's floating-point tensors, the first input's if not given;
    ``compute_dtype``: float32 or float64, the method's if not given.

    ``rename``: other names for the tensors of all inputs, as ``"old.*=new.*"``, a list of such texts or a dict; ``/regex/``
    with groups ``\\1`` too.

    ``on_missing`` (error, base, average-present, drop, union), ``on_shape`` (error, base, rows) and ``integers`` (first,
    last, max, error): what becomes of tensors that are not in every input, differ in shape, or are integers that differ.
    ``allow_nonfinite`` writes NaN and infinity instead of stopping.

    ``state_dict``: which one of wrapped files, by keys joined with dots; ``ema`` (ignore, prefer, only): averaged weights
    beside plain ones. ``keep_optimizer`` keeps the first input's in a ``.pth``; ``max_shard_size``: bytes, or ``"5GB"``.

    ``memory``: bytes, or ``"512MiB"``, above start-up; ``workers``: threads, as many as CPUs if not given; ``io``: mmap or
    pread. ``convert_first``: a folder in which each input is converted to safetensors, kept, and merged from.

    ``last``, ``range="1000:5000"``, ``best`` with ``by`` (a number in the files, lowest first unless ``highest``) choose
    among the inputs; ``ema_decay`` gives them exponential weights, the last one most.

    ``hash`` puts the SHA-256 of every input file into the output's receipt, which reads them once more.

    ``print(plan)`` shows it; ``plan.tasks``, ``plan.peak_bytes``, ``plan.read_bytes`` are its numbers.
    """
    overrides = {
        "dtype": dtype,
        "out_dtype": out_dtype,
        "compute_dtype": compute_dtype,
        "state_dict": state_dict,
        "ema": ema,
        "rename": rename,
        "on_missing": on_missing,
        "on_shape": on_shape,
        "integers": integers,
        "allow_nonfinite": allow_nonfinite,
        "keep_optimizer": keep_optimizer,
        "max_shard_size": max_shard_size,
        "seed": seed,
    }
    paths = _paths(inputs)
    if recipe is None and len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        recipe, paths = paths[0], []
    if normalize is not None:
        parameters["normalize"] = normalize
    choice: dict[str, Any] = {"last": last, "range": range, "best": best, "by": by, "highest": highest or None}
    if recipe is None:
        chosen, notes = choose(paths, **choice)
        weights = _weights(weights, ema_decay, len(chosen))
        named = None if base is None else str(base)
        wished = recipe_of(chosen, method or "linear", named, weights, parameters, overrides)
    else:
        theirs = {"inputs": paths or None, "weights": weights, "method": method, "base": base, "ema_decay": ema_decay}
        _refuse_beside_recipe({**theirs, **choice, **parameters})
        wished, notes = overridden(read_recipe(recipe, own_methods), overrides), []
    planned = _plan(wished, out, memory, workers, io, convert_first, hash)
    planned.notes[:0] = notes
    return planned


def _weights(weights: Sequence[float] | None, ema_decay: float | None, inputs: int) -> Sequence[float] | None:
    if ema_decay is None:
        return weights
    if weights is not None:
        raise RecipeError("--ema-decay gives the weights; leave --weights out")
    return exponential_weights(ema_decay, inputs)


def _refuse_beside_recipe(said: Mapping[str, Any]) -> None:
    """RecipeError for arguments that would contradict what a recipe says, instead of replacing it."""
    given = [name for name, value in said.items() if value is not None]
    if given:
        raise RecipeError(
            f"{listed(given)} beside a recipe: it names its models, method and parameters itself; change them there"
        )


def _plan(
    recipe: Recipe,
    out: PathLike | None,
    memory: str | int,
    workers: int | None,
    io: str,
    convert_first: PathLike | None = None,
    hashed: bool = False,
) -> Plan:
    if io not in IO:
        raise RecipeError(f"--io takes {' or '.join(IO)}, not {printable(io)}")
    if workers is not None and workers < 1:
        raise RecipeError("--workers takes a positive number")
    with collector_paused(), shared_headers():
        indexes = {each: open_checkpoint(each.path, each.state_dict, recipe.ema) for each in recipe.checkpoints}
        if convert_first is not None:
            indexes = {each: from_conversion(index, Path(convert_first)) for each, index in indexes.items()}
        indexes = {each: index.with_names(each.rename) for each, index in indexes.items()}
        planned = build_plan(
            recipe,
            indexes,
            None if out is None else str(out),
            memory_bytes=parse_bytes(memory),
            workers=workers or default_workers(),
            io=io,
            hashed=hashed,
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
    inputs: PathLike | Sequence[PathLike] = (),
    out: PathLike | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    polite: bool = False,
    listener: Listener = quiet,
    executor: Executors = ThreadExecutor,
    convert_first: PathLike | None = None,
    **options: Any,
) -> Result:
    """Merges checkpoints into ``out``, one chunk at a time.

    ``inputs``: paths or globs; or ``recipe``: a mergekit configuration. ``weights``: one number per input; ``linear``,
    the default method, divides them by their sum unless ``normalize`` is False. ``memory``: the budget above the
    start-up footprint. Further options, and the parameters of the method, are those of :func:`plan`.

    ``overwrite``: replace a finished output. ``resume``: go on where the same merge was interrupted. ``polite``: give the
    inputs' page cache back behind the cursor, so that what other programs have there stays. ``listener`` is called with
    each of :mod:`streammerge.events`. ``executor`` makes what runs the tasks, from the number of workers; threads, if not
    given.

    Raises RecipeError, FormatError, MismatchError, BudgetError, SpaceError, LockedError, ChangedError, VerifyError or
    TaskError; the output is then not there. Returns what was read, written and needed.
    """
    if out is None:
        raise RecipeError("a merge needs a name for its output: out=, or -o")
    sweep(Path(out))
    check_writable(Path(out), overwrite)
    before = resident_bytes()
    planned = plan(inputs, out, convert_first=convert_first, **options)
    if convert_first is not None and _convert_all(planned.recipe, Path(convert_first), options, resume, listener):
        planned = plan(inputs, out, convert_first=convert_first, **options)
    foreseen = _output_warnings(planned)  # what would stop a run stops this one itself, or was allowed
    planned.warnings = [warning for warning in planned.warnings if warning not in foreseen]
    return execute(planned, RunOptions(overwrite, resume, polite, listener, executor), before)


def convert(
    path: PathLike,
    out: PathLike,
    *,
    dtype: object = None,
    max_shard_size: str | int | None = None,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    strip_prefix: str = "",
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    keep_optimizer: bool | None = None,
    state_dict: str | None = None,
    ema: str | None = None,
    extras: PathLike | None = None,
    allow_nonfinite: bool | None = None,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: str = "mmap",
    overwrite: bool = False,
    resume: bool = True,
    polite: bool = False,
    hash: bool = False,
    listener: Listener = quiet,
    executor: Executors = ThreadExecutor,
) -> Result:
    """Writes a checkpoint in another container: ``.pth`` to safetensors or back, one file or shards.

    ``path``: a file or folder. ``dtype`` recasts floating-point tensors; ``keep`` and ``drop`` are glob patterns on tensor
    names, ``strip_prefix`` is removed from those that begin with it, ``rename`` is that of :func:`plan`; ``extras`` names a
    JSON file for what is not a tensor. Further options are those of :func:`plan` and :func:`merge`, and so are the errors.
    """
    sweep(Path(out))
    check_writable(Path(out), overwrite)
    before = resident_bytes()
    overrides = {
        "dtype": dtype,
        "state_dict": state_dict,
        "ema": ema,
        "allow_nonfinite": allow_nonfinite,
        "keep_optimizer": keep_optimizer,
        "max_shard_size": max_shard_size,
        "strip_prefix": strip_prefix,
        "rename": rename,
    }
    recipe = conversion(str(path), drop, keep, overrides)
    planned = _plan(recipe, out, memory, workers, io, hashed=hash)
    if extras is not None:
        refuse_extras(Path(extras), planned, overwrite)
    result = execute(planned, RunOptions(overwrite, resume, polite, listener, executor), before)
    if extras is not None:
        index = open_checkpoint(path, state_dict, recipe.ema)
        content = {"format": index.format, "metadata": index.metadata, "data": index.plain_data()}
        write_text(Path(extras), json.dumps(content, indent=2, ensure_ascii=False) + "\n", overwrite)
    return result


def verify(
    out: PathLike,
    *,
    sample: str | float | None = None,
    seed: int = 0,
    inputs: PathLike | None = None,
    own_methods: bool = False,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: str = "mmap",
) -> Verified:
    """Whether an output is what its receipt says: its structure, the checksum of every byte, and, where its inputs are
    at hand, the values of a sample of its tensors, computed again in float64.

    ``sample``: a share like ``"5%"`` (the default), ``"100%"`` for all, 0 for none; when it is given, that the inputs
    are absent is an error. ``seed`` chooses the sample. ``inputs``: the folder in which the inputs are, if not here or
    beside the output. ``own_methods``: see :func:`plan`.

    Raises VerifyError when anything is wrong or cannot be verified.
    """
    path, share = Path(out), parse_share("5%" if sample is None else sample)
    receipt = receipt_of(path)
    try:
        verified = check_files(path, receipt, workers or default_workers())
    except (FormatError, OSError) as error:
        raise VerifyError(f"{printable(path)} cannot be verified: {printable(error, 1000)}") from error
    if not share:
        return verified
    failures: list[Exception] = []
    for folder in [path.parent, Path()] if inputs is None else [Path(inputs)]:
        attempt = replace(verified, notes=[*verified.notes])
        try:
            planned = _remade(path, receipt, folder, own_methods, memory, workers, io)
            recompute(attempt, planned, receipt, share, seed)
        except (StreammergeError, OSError) as error:
            failures.append(error)
        else:
            left = attempt.notes[len(verified.notes) :]
            if left and sample is not None:
                raise VerifyError(f"{printable(path)} cannot be verified wholly: {'; '.join(left)}")
            return attempt
    ranked = [e for kind in (VerifyError, ChangedError, Exception) for e in failures if isinstance(e, kind)]
    said = "; ".join(map(str.strip, str(ranked[0]).splitlines()))
    if isinstance(ranked[0], VerifyError):
        raise ranked[0]
    if sample is not None or inputs is not None:
        raise VerifyError(f"{printable(path)} is as it was written, but its values were not computed again: {said}")
    verified.notes.append(f"values were not computed again: {said}")
    return verified


def _remade(
    out: Path, receipt: Receipt, folder: Path, own_methods: bool, memory: str | int, workers: int | None, io: str
) -> Plan:
    """The plan by which the output was made, from inputs in that folder.

    Raises StreammergeError when they are not there, or are others.
    """
    recipe = read_recipe(receipt.own_recipe(), own_methods, folder)
    hashed = any("sha256" in said for said in receipt.inputs.values())
    name = "output" if out.is_dir() else f"output.{'pth' if receipt.kind is CRC32 else 'safetensors'}"
    planned = _plan(recipe, name, memory, workers, io, hashed=hashed)
    check_inputs(planned, receipt)
    return planned


def _convert_all(recipe: Recipe, folder: Path, options: dict[str, Any], resume: bool, listener: Listener) -> bool:
    """Each checkpoint as a safetensors file in ``folder``, made now unless it is there and still right; whether any was."""
    folder.mkdir(parents=True, exist_ok=True)
    passed = {k: options[k] for k in ("memory", "workers", "io") if k in options}
    made = False
    for each in recipe.checkpoints:
        index = open_checkpoint(each.path, each.state_dict, recipe.ema)
        target = converted_path(index, folder)
        if not is_conversion(target, index):
            convert(
                each.path,
                target,
                overwrite=True,
                resume=resume,
                listener=listener,
                state_dict=each.state_dict,
                ema=recipe.ema,
                allow_nonfinite=True,
                **passed,
            )
            made = True
    return made
