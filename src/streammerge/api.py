"""merge(), plan(), convert(), inspect(), verify(): the only module that wires the rooms together. Nothing here prints.

Each function has its options as keyword arguments, which editors complete. ``options`` describes them. Each function first
collects them by one call of ``locals()``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.agreement import agreed
from streammerge.checkpoints.choosing import choose, exponential_weights
from streammerge.checkpoints.conversions import converted_path, from_conversion, is_conversion
from streammerge.checkpoints.globs import expand
from streammerge.checkpoints.in_memory import hold, index_state_dict
from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.errors import ChangedError, FormatError, RecipeError, StreammergeError, VerifyError, listed, printable
from streammerge.events import Listener, quiet
from streammerge.methods.registry import LINEAR
from streammerge.options import (
    CONVERT,
    DEFAULT_MEMORY,
    MERGE,
    PLAN,
    VERIFY,
    Choosing,
    Converting,
    Ema,
    Executing,
    Integers,
    Io,
    Merging,
    Naming,
    OnMissing,
    OnShape,
    Policies,
    Resources,
    Running,
    Selecting,
    Verifying,
    Writing,
    number_or_percent,
    path,
    picked,
)
from streammerge.planning.plan import Plan, build_plan
from streammerge.planning.receipt import Receipt
from streammerge.recipe.arguments import conversion, overridden, recipe_of
from streammerge.recipe.locations import found_in_hub_cache, from_hub_cache, is_recipe_name
from streammerge.recipe.model import Recipe, Reference
from streammerge.recipe.reader import read_recipe, recipe_of_receipt
from streammerge.running.choosing import choose_executor
from streammerge.running.execution import Result, default_workers, execute, refuse_extras
from streammerge.running.executors.base import Executors
from streammerge.running.process import collector_paused, resident_bytes
from streammerge.running.readback import read_output, receipt_of
from streammerge.running.session import RunOptions
from streammerge.signatures import takes
from streammerge.sources.memory import is_array, is_tensor
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32
from streammerge.stores.locations import HERE, PathLike, has_scheme, parse, resolved
from streammerge.units import decimal_bytes, parse_bytes, parse_share

if TYPE_CHECKING:
    from streammerge.verifying.files import Verified

Checkpoint = PathLike | Mapping[str, Any]
"""A file or folder, or a state dict in memory: torch tensors or numpy arrays by name, or a mapping that holds one."""
Inputs = Checkpoint | Iterable[Checkpoint] | Mapping[str, float]
Held = dict[str, Mapping[str, Any]]
"""The state dicts in memory, by their names in the recipe."""
_WEIGHTED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)%?)")
"""An input with its weight behind it, as in ``a.safetensors:0.6``."""


@takes(Selecting)
def inspect(path: Checkpoint, *, state_dict: str | None = None, ema: Ema | None = None) -> CheckpointIndex:
    """Returns the index of a checkpoint. Reads headers only. Nothing in the file is executed or imported.

    The index is a mapping from the tensors' names to :class:`Source`: ``len(index)``, ``index[name]``, iteration.
    ``path``: a file or folder, or a state dict in memory. Raises FormatError when the checkpoint cannot be read.
    """
    asked, held = picked(Selecting, locals()), Held()
    name = _named("path", path, held)
    return _opened(name if name in held else from_hub_cache(name), asked.state_dict, asked.ema or "ignore", held)


@takes(*PLAN)
def plan(
    inputs: Inputs = (),
    out: PathLike | None = None,
    *,
    recipe: PathLike | Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    method: str | Callable[..., Any] | None = None,
    base: Checkpoint | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: int | None = None,
    dtype: object = None,
    out_dtype: object = None,
    compute_dtype: object = None,
    own_methods: bool = False,
    convert_first: PathLike | None = None,
    last: int | None = None,
    range: str | None = None,
    best: int | None = None,
    by: str | None = None,
    highest: bool = False,
    ema_decay: float | None = None,
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    on_missing: OnMissing | None = None,
    on_shape: OnShape | None = None,
    integers: Integers | None = None,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    max_shard_size: str | int | None = None,
    keep_optimizer: bool | None = None,
    allow_nonfinite: bool | None = None,
    hash: bool = False,
) -> Plan:
    """Returns the plan of :func:`merge`, from headers alone. Nothing is written. The options are those of merge.

    ``inputs``: paths, globs or state dicts in memory, or a dict that gives each path its weight. ``out``: its name decides
    the container. ``recipe``: a mergekit configuration as a YAML file or a dict, in place of inputs, method and parameters.
    The other options override its keys. ``print(plan)`` shows the plan. ``plan.tasks``, ``plan.peak_bytes`` and
    ``plan.read_bytes`` are its numbers.
    """
    return _Request.of(locals()).plan()


@takes(*MERGE)
def merge(
    inputs: Inputs = (),
    out: PathLike | None = None,
    *,
    recipe: PathLike | Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    method: str | Callable[..., Any] | None = None,
    base: Checkpoint | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: int | None = None,
    dtype: object = None,
    out_dtype: object = None,
    compute_dtype: object = None,
    own_methods: bool = False,
    convert_first: PathLike | None = None,
    last: int | None = None,
    range: str | None = None,
    best: int | None = None,
    by: str | None = None,
    highest: bool = False,
    ema_decay: float | None = None,
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    on_missing: OnMissing | None = None,
    on_shape: OnShape | None = None,
    integers: Integers | None = None,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    max_shard_size: str | int | None = None,
    keep_optimizer: bool | None = None,
    allow_nonfinite: bool | None = None,
    hash: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    polite: bool = False,
    listener: Listener = quiet,
) -> Result:
    """Merges checkpoints into ``out``, one chunk at a time.

    ``inputs``: paths, globs or state dicts in memory, or a dict that gives each path its weight; or ``recipe``: a mergekit
    configuration as a YAML file or a dict. ``listener`` is called with each of :mod:`streammerge.events`.

    Raises RecipeError, FormatError, MismatchError, BudgetError, SpaceError, LockedError, ChangedError, VerifyError or
    TaskError. The output does not exist after an error. Returns the bytes read and written, the time and the memory.
    """
    given = locals()
    request, running = _Request.of(given), _run_options(given)
    if request.out is None:
        raise RecipeError("a merge needs a name for its output; pass `out`")
    request.out.sweep()
    request.out.check_writable(running.overwrite)
    before = resident_bytes()
    planned = request.plan()
    if _convert_first(planned.recipe, request, running):
        planned = request.plan()
    foreseen = _output_warnings(planned)  # the run itself raises these as errors, unless they are allowed
    planned.warnings = [warning for warning in planned.warnings if warning not in foreseen]
    return execute(planned, running, before)


@takes(*CONVERT)
def convert(
    path: Checkpoint,
    out: PathLike,
    *,
    dtype: object = None,
    drop: str | Sequence[str] = (),
    keep: str | Sequence[str] = (),
    strip_prefix: str = "",
    like: PathLike | None = None,
    only: str | None = None,
    extras: PathLike | None = None,
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    max_shard_size: str | int | None = None,
    keep_optimizer: bool | None = None,
    allow_nonfinite: bool | None = None,
    hash: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    polite: bool = False,
    listener: Listener = quiet,
) -> Result:
    """Writes a checkpoint in another container: ``.pth`` to safetensors or back, one file or shards.

    ``path``: a file or folder, or a state dict in memory. ``out``: its name decides the container. ``drop`` and
    ``keep`` take glob patterns on tensor names. ``like``: a checkpoint of the same model, whose tensors are replaced by
    these; what else it holds is kept, and ``state_dict`` chooses in it. ``only`` prunes a ``.pth``: its other state dicts
    are left out. ``listener`` and the errors are those of :func:`merge`.
    """
    given = locals()
    asked, naming = picked(Converting, given), picked(Naming, given)
    selection, output = picked(Selecting, given), picked(Writing, given)
    resources, running = picked(Resources, given), _run_options(given)
    held = Held()
    source, target = _named("path", path, held), parse(_path("out", out))
    target.sweep()
    target.check_writable(running.overwrite)
    before = resident_bytes()
    overrides = asked.overrides | naming.overrides | selection.overrides | output.overrides
    if asked.only is not None:
        if selection.state_dict not in (None, asked.only):
            raise RecipeError("`only` names the state dict; leave `state_dict` out")
        overrides |= {"state_dict": asked.only, "only": True}
    like = None if asked.like is None else str(asked.like)
    if like is not None and resolved(like) == resolved(source):
        raise RecipeError("`like` names the input itself; leave it out, or name another checkpoint")
    recipe = found_in_hub_cache(conversion(source, asked.drop, asked.keep, overrides, like))
    planned = _plan(recipe, target, resources, running.executor, hashed=output.hash, held=held, like=like is not None)
    if asked.extras is not None:
        refuse_extras(parse(asked.extras), planned, running.overwrite)
    result = execute(planned, running, before)
    if asked.extras is not None:
        index = _opened(source, None if asked.like else recipe.state_dict, recipe.ema, held)
        content = {"format": index.format, "metadata": index.metadata, "data": index.plain_data()}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        parse(asked.extras).write_whole(text.encode("utf-8", "backslashreplace"), running.overwrite)
    return result


@takes(*VERIFY)
def verify(
    out: PathLike,
    *,
    sample: str | float | None = None,
    seed: int = 0,
    inputs: PathLike | None = None,
    own_methods: bool = False,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    io: Io = "mmap",
) -> Verified:
    """Verifies the output ``out`` against its receipt: its structure, the checksum of every byte and, if its inputs are
    available, the values of a sample of its tensors, computed again in float64.

    ``sample``: a share like ``"5%"`` or ``0.05``, ``"100%"`` for all, 0 for none. If it is given, missing inputs are an
    error. Raises VerifyError when anything is wrong or cannot be verified.
    """
    given = locals()
    asked, resources = picked(Verifying, given), picked(Resources, given)
    from streammerge.verifying.files import check_files  # here: a merge starts without it
    from streammerge.verifying.values import recompute

    path, share = parse(_path("out", out)), parse_share("5%" if asked.sample is None else asked.sample)
    receipt = receipt_of(path)
    try:
        verified = check_files(path, receipt, resources.workers or default_workers())
    except (FormatError, OSError) as error:
        raise VerifyError(f"{printable(path)} cannot be verified: {printable(error, 1000)}") from error
    if not share:
        return verified
    if receipt.held:
        said = f"{listed(receipt.held)} of its inputs was in memory when it was merged, so it cannot be read again"
        if asked.sample is not None or asked.inputs is not None:
            raise VerifyError(f"{printable(path)} is as it was written, but its values cannot be computed again: {said}")
        verified.notes.append(f"values were not computed again: {said}")
        return verified
    failures: list[Exception] = []
    for folders in _places_of_inputs(path, asked.inputs):
        attempt = replace(verified, notes=[*verified.notes])
        try:
            recompute(attempt, _remade(path, receipt, folders, asked.own_methods, resources), receipt, share, asked.seed)
        except (StreammergeError, OSError) as error:
            # Without the frames of the attempt, which hold its plan, because the next attempt needs the memory.
            error.__cause__ = error.__context__ = None
            failures.append(error.with_traceback(None))
        else:
            left = attempt.notes[len(verified.notes) :]
            if left and asked.sample is not None:
                raise VerifyError(f"{printable(path)} cannot be verified wholly: {'; '.join(left)}")
            return attempt
    ranked = [e for kind in (VerifyError, ChangedError, Exception) for e in failures if isinstance(e, kind)]
    said = "; ".join(map(str.strip, str(ranked[0]).splitlines()))
    if isinstance(ranked[0], VerifyError):
        raise ranked[0]
    if asked.sample is not None or asked.inputs is not None:
        raise VerifyError(f"{printable(path)} is as it was written, but its values were not computed again: {said}")
    verified.notes.append(f"values were not computed again: {said}")
    return verified


def _likeness(recipe: Recipe, indexes: Mapping[Reference, CheckpointIndex]) -> list[str]:
    from streammerge.planning.likeness import check_likeness  # here, because only a conversion with `like` needs it

    return check_likeness(recipe, *indexes.values())


@dataclass(frozen=True)
class _Request:
    """The arguments of a merge or a plan, read and checked."""

    inputs: list[str]
    held: Held
    out: Location | None
    recipe: str | Mapping[str, Any] | None
    merging: Merging
    choosing: Choosing
    naming: Naming
    policies: Policies
    selection: Selecting
    resources: Resources
    executing: Executing
    output: Writing

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Request:
        """Reads the arguments of :func:`plan` or :func:`merge`. Raises RecipeError for an invalid value."""
        held = Held()
        inputs, own_weights = _inputs(given["inputs"], held)
        out, recipe = given["out"], given["recipe"]
        if isinstance(given["base"], Mapping):
            given = {**given, "base": hold(given["base"], held)}
        merging = picked(Merging, given)
        if own_weights is not None:
            if merging.weights is not None:
                raise RecipeError("the inputs come with their weights; leave `weights` out")
            merging = replace(merging, weights=own_weights)
        if recipe is None and len(inputs) == 1 and is_recipe_name(inputs[0]):
            recipe, inputs = inputs[0], []
        return cls(
            inputs,
            held,
            None if out is None else parse(_path("out", out)),
            recipe if recipe is None or isinstance(recipe, Mapping) else _path("recipe", recipe),
            merging,
            *(picked(group, given) for group in (Choosing, Naming, Policies, Selecting, Resources, Executing, Writing)),  # type: ignore[arg-type]
        )

    def plan(self) -> Plan:
        asked = self.merging
        notes: list[str] = []
        overrides = asked.overrides | self.naming.overrides | self.policies.overrides
        overrides |= self.selection.overrides | self.output.overrides
        choice = {name: getattr(self.choosing, name) or None for name in ("last", "range", "best", "by", "highest")}
        parameters = dict(asked.parameters or {})
        if asked.normalize is not None:
            if "normalize" in parameters:
                raise RecipeError("`normalize` and the parameter normalize are the same; give one of them")
            parameters["normalize"] = asked.normalize
        decay = self.choosing.ema_decay
        if self.recipe is None:
            chosen, notes = choose(self.inputs, **choice)
            weights = _weights(asked.weights, decay, len(chosen))
            base = None if asked.base is None else str(asked.base)
            recipe = recipe_of(chosen, asked.method or LINEAR, base, weights, parameters, overrides)
            recipe = found_in_hub_cache(recipe)
        else:
            theirs = {"inputs": self.inputs or None, "weights": asked.weights, "method": asked.method, "base": asked.base}
            _refuse_beside_recipe({**theirs, "ema_decay": decay, **choice, **parameters})
            recipe = overridden(read_recipe(self.recipe, asked.own_methods), overrides)
        folder = None if asked.convert_first is None else parse(asked.convert_first)
        planned = _plan(recipe, self.out, self.resources, self.executing.executor, folder, self.output.hash, self.held)
        planned.notes[:0] = notes
        return planned


def _path(name: str, value: Any) -> str:
    """Returns the path given as argument ``name``. Raises RecipeError for anything but a path."""
    try:
        read = path(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`{name}` takes a path, not {printable(value, 60)}") from error
    if name == "out" and value == "-":
        raise RecipeError(
            "an output is written in any order, so it cannot go to stdout (-); name a file, like merged.safetensors"
        )
    return read


def _named(name: str, given: Any, held: Held) -> str:
    """Returns the name in a recipe of the checkpoint given as argument ``name``: its path, or its name in ``held``."""
    return hold(given, held) if isinstance(given, Mapping) else _path(name, given)


def _opened(path: str, state_dict: str | None, ema: str, held: Held) -> CheckpointIndex:
    if path in held:
        return index_state_dict(held[path], path, state_dict, ema)
    return open_checkpoint(path, state_dict, ema)


def _inputs(given: Any, held: Held) -> tuple[list[str], list[float] | None]:
    """Returns the names of the inputs, and their weights if a dict gives each path its weight. Raises RecipeError for
    anything but inputs."""
    if isinstance(given, Mapping) and not any(map(_may_hold_tensors, given.values())):
        wrong = next((name for name, weight in given.items() if not isinstance(weight, Real)), None)
        if wrong is not None:
            raise RecipeError(
                f"a dict of inputs gives each path its weight, like {{'a.pth': 0.9}}; {printable(wrong)} has no number"
            )
        return [_path("inputs", each) for each in given], list(map(float, given.values()))
    if isinstance(given, str | bytes | os.PathLike | Location | Mapping) or not isinstance(given, Iterable):
        given = [given]
    return _with_weights([_named("inputs", each, held) for each in given])


def _with_weights(names: list[str]) -> tuple[list[str], list[float] | None]:
    """Returns the inputs without the weight that stands behind each, as in ``a.safetensors:0.6``, and these weights.

    A glob gives its weight to each match. Raises RecipeError if only some inputs have a weight.
    """
    found = [_WEIGHTED.fullmatch(name) for name in names]
    weighted = [each if each and not has_scheme(each[0]) and not parse(each[0]).lexists() else None for each in found]
    if not any(weighted):
        return names, None
    bare = next((name for name, each in zip(names, weighted, strict=True) if each is None), None)
    if bare is not None:
        raise RecipeError(f"{printable(bare)} has no weight behind it, and others have; write {printable(bare)}:0.5, say")
    paths = [(path, number_or_percent(each[2])) for each in weighted if each for path in expand([each[1]])]
    return [path for path, _ in paths], [weight for _, weight in paths]


def _may_hold_tensors(value: Any) -> bool:
    if isinstance(value, Real):  # numpy's numbers are arrays too
        return False
    return is_array(value) or is_tensor(value) or isinstance(value, Mapping | list | tuple)


def _run_options(given: Mapping[str, Any]) -> RunOptions:
    asked, executing, listener = picked(Running, given), picked(Executing, given), given["listener"]
    if not callable(listener):
        raise RecipeError(f"`listener` takes a function of one event, not {printable(listener, 60)}")
    return RunOptions(asked.overwrite, asked.resume, asked.polite, listener, executing.executor)


def _weights(weights: Sequence[float] | None, ema_decay: float | None, inputs: int) -> Sequence[float] | None:
    if ema_decay is None:
        return weights
    if weights is not None:
        raise RecipeError("`ema_decay` gives the weights; leave `weights` out")
    return exponential_weights(ema_decay, inputs)


def _refuse_beside_recipe(said: Mapping[str, Any]) -> None:
    """Raises RecipeError for arguments that contradict a recipe instead of replacing one of its keys."""
    given = [name for name, value in said.items() if value is not None]
    if given:
        raise RecipeError(
            f"{listed(given)} beside a recipe: it names its models, method and parameters itself; change them there"
        )


def _plan(
    recipe: Recipe,
    out: Location | None,
    resources: Resources,
    executor: str | Executors,
    convert_first: Location | None = None,
    hashed: bool = False,
    held: Held | None = None,
    like: bool = False,
) -> Plan:
    """``like``: the first checkpoint gets the tensors of the second."""
    if held and convert_first is not None:
        raise RecipeError("`convert_first` converts files; give state dicts in memory without it")
    with collector_paused():
        indexes: dict[Reference, CheckpointIndex] = {}
        for each in recipe.checkpoints:
            index = _opened(each.path, each.state_dict, recipe.ema, held or {})
            for known in indexes.values():
                index.share(known)
            indexes[each] = index
        if convert_first is not None:
            indexes = {each: from_conversion(index, convert_first) for each, index in indexes.items()}
        indexes = agreed(recipe, indexes)
        indexes = {each: index.with_names(each.rename) for each, index in indexes.items()}
        told = _likeness(recipe, indexes) if like else []
        planned = build_plan(
            recipe,
            indexes,
            out,
            memory_bytes=parse_bytes(resources.memory),
            workers=resources.workers or default_workers(),
            io=resources.io,
            hashed=hashed,
        )
    planned.notes += told
    choose_executor(planned, executor)
    planned.warnings += _output_warnings(planned)
    return planned


def _output_warnings(planned: Plan) -> list[str]:
    """Returns warnings about known obstacles at the output's place that would stop a run."""
    if planned.out is None:
        return []
    free = planned.out.absolute().parent.free_bytes()
    said = []
    if free is not None and planned.disk_bytes > free:
        said.append(f"{decimal_bytes(planned.disk_bytes)} of disk are needed where {decimal_bytes(free)} are free")
    try:
        planned.out.check_writable(overwrite=False)
    except RecipeError as error:
        said.append(str(error))
    return said


def _places_of_inputs(out: Location, inputs: PathLike | None) -> list[list[Location]]:
    """Returns the folders in which the inputs of an output may be read, one list for each attempt.

    Those are the folder of the output and the current folder, or ``inputs``. With ``inputs`` in another store than the
    output, the inputs that have no scheme are looked for beside the output too.
    """
    if inputs is None:
        return [[out.parent], [HERE]]
    given = parse(inputs)
    return [[given]] if given.store == out.store else [[given, out.parent], [given, HERE]]


def _remade(out: Location, receipt: Receipt, folders: list[Location], own_methods: bool, resources: Resources) -> Plan:
    """Returns the plan that made the output, with inputs from these folders.

    Raises StreammergeError when the inputs are missing, or are other files.
    """
    from streammerge.verifying.values import check_inputs

    recipe = recipe_of_receipt(receipt.recipe, own_methods, folders)
    hashed = any("sha256" in said for said in receipt.inputs.values())
    planned = _plan(recipe, parse(f"output{_ending(out, receipt)}"), resources, "threads", hashed=hashed)
    check_inputs(planned, receipt)
    return planned


def _ending(out: Location, receipt: Receipt) -> str:
    """Returns the ending of a name that makes the same kind of output."""
    if out.is_folder():
        return ""
    if receipt.kind is not CRC32:
        return ".safetensors"
    return ".pkl" if read_output(out).format == "pickle" else ".pth"


def _convert_first(recipe: Recipe, request: _Request, running: RunOptions) -> bool:
    """Converts each checkpoint to a safetensors file in the requested folder, unless a correct one is there.

    Returns whether any file was made.
    """
    if request.merging.convert_first is None:
        return False
    folder, resources, made = parse(request.merging.convert_first), request.resources, False
    folder.make_folder()
    for each in recipe.checkpoints:
        index = open_checkpoint(each.path, each.state_dict, recipe.ema)
        target = converted_path(index, folder)
        if not is_conversion(target, index):
            convert(
                each.path,
                target,
                overwrite=True,
                resume=running.resume,
                polite=running.polite,
                executor=running.executor,
                listener=running.listener,
                state_dict=each.state_dict,
                ema=recipe.ema,  # type: ignore[arg-type]
                allow_nonfinite=True,
                memory=resources.memory,
                workers=resources.workers,
                io=resources.io,
            )
            made = True
    return made
