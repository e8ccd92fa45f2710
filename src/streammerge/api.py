"""The public functions: merge(), plan(), sweep(), convert(), extract(), inspect(), verify(), diff(), report() and others.

The rooms below do the work. Nothing here prints, unless ``progress`` asks for a bar.

Each function has its options as keyword arguments, which editors complete. ``options`` describes them. Each function first
collects them by one call of ``locals()``, and then imports the rooms that it needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import FormatError, RecipeError, VerifyError, printable
from streammerge.events import Event, Listener, quiet
from streammerge.options.base import picked
from streammerge.options.converting import Converting
from streammerge.options.functions import CONVERT, DIFF, EXTRACT, FINISH, MERGE, PLAN, REPORT, SWEEP, VERIFY, WORKER
from streammerge.options.merging import Integers, MixedDtypes, Naming, OnMissing, OnShape
from streammerge.options.resources import DEFAULT_MEMORY, Executing, Io, Machine, Resources, Sharing
from streammerge.options.selecting import Ema, Selecting
from streammerge.options.sweeping import Soup
from streammerge.options.telling import Showing, Verifying
from streammerge.options.values import truth
from streammerge.options.writing import Finishing, Quantise, Replacing, Running, Saving, Writing
from streammerge.recipe.adapted import resolved
from streammerge.recipe.hub_names import hub_place, with_hub_places
from streammerge.running.process import resident_bytes
from streammerge.signatures import takes
from streammerge.stores.base import Location
from streammerge.stores.locations import PathLike, parse
from streammerge.stores.remembering import remembering
from streammerge.units import parse_bytes, parse_share

if TYPE_CHECKING:
    from streammerge.diffing.result import Diff
    from streammerge.factoring.making import AdapterResult, Making
    from streammerge.factoring.planned import AdapterPlan
    from streammerge.planning.plan import Plan
    from streammerge.requests.inputs import Checkpoint, Inputs
    from streammerge.running.execution import Result
    from streammerge.running.session import RunOptions
    from streammerge.running.shared import ShareResult
    from streammerge.sweeps.results import SweepResult
    from streammerge.verifying.files import Verified


@takes(Selecting)
def inspect(path: Checkpoint, *, state_dict: str | None = None, ema: Ema | None = None) -> CheckpointIndex:
    """Returns the index of a checkpoint. Reads headers only. Nothing in the file is executed or imported.

    The index is a mapping from the tensors' names to :class:`Source`: ``len(index)``, ``index[name]``, iteration.
    ``path``: a file or folder, or a state dict in memory. Raises FormatError when the checkpoint cannot be read.
    """
    asked = picked(Selecting, locals())
    from streammerge.requests.inputs import Held, named, opened

    held = Held()
    name = named("path", path, held)
    return opened(name if name in held else hub_place(name), asked.state_dict, asked.ema or "ignore", held)


@takes(*PLAN)
def plan(
    inputs: Inputs = (),
    out: PathLike | None = None,
    *,
    recipe: PathLike | Mapping[str, Any] | None = None,
    weights: Iterable[SupportsFloat] | None = None,
    normalize: bool | None = None,
    method: str | Callable[..., Any] | None = None,
    base: Checkpoint | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: SupportsIndex | None = None,
    dtype: object = None,
    out_dtype: object = None,
    compute_dtype: object = None,
    own_methods: bool = False,
    convert_first: PathLike | None = None,
    card: bool | None = None,
    last: SupportsIndex | None = None,
    range: str | None = None,
    best: SupportsIndex | None = None,
    by: str | None = None,
    highest: bool = False,
    schedule: str | None = None,
    ema_decay: SupportsFloat | None = None,
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    on_missing: OnMissing | None = None,
    on_shape: OnShape | None = None,
    integers: Integers | None = None,
    mixed_dtypes: MixedDtypes | None = None,
    strict: bool = False,
    unsafe_truncate_embeddings: bool | None = None,
    tokenizer_source: str | None = None,
    chat_template: str | None = None,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    address: str | None = None,
    max_shard_size: str | SupportsIndex | None = None,
    keep_optimizer: bool | None = None,
    quantise: Quantise | None = None,
    allow_nonfinite: bool | None = None,
    hash: bool = False,
    save: PathLike | None = None,
) -> Plan | AdapterPlan:
    """Returns the plan of :func:`merge`, from headers alone. Nothing else is written. The options are those of merge.

    ``inputs``: paths, globs or state dicts in memory, or a dict that gives each path its weight. ``base+adapter`` is a path
    too. ``out``: its name decides the container. ``recipe``: a mergekit configuration as a YAML file or a dict, in place of
    inputs, method and parameters. The other options override its keys. ``print(plan)`` shows the plan. ``plan.tasks``,
    ``plan.peak_bytes`` and ``plan.read_bytes`` are its numbers. A plan that is saved is followed by :func:`worker` on
    several machines, and by :func:`finish` on one.
    """
    given = locals()
    from streammerge.requests.merging import Request
    from streammerge.requests.plans import output_warnings

    saving = picked(Saving, given)
    with remembering():
        request = Request.of(given)
        combined = request.combination()
        if combined is not None:
            from streammerge.requests.adapters import adapter_plan  # here, because most plans are of models

            if saving.save is not None:
                raise RecipeError(
                    "a plan of an adapter cannot be saved, because its ranks, and so the places of its tensors, are known "
                    "last; make it on one machine, without `save`"
                )
            return adapter_plan(combined, request.out, request.resources)
        made = request.plan()
    made.warnings += output_warnings(made)
    if saving.save is not None:
        from streammerge.requests import machines  # here, because most plans are not saved

        if request.merging.convert_first is not None:
            raise RecipeError("a saved plan converts nothing first; convert the inputs, and plan with the results")
        machines.save(made, parse(saving.save), request.resources, request.executing, request.output)
    return made


@takes(*MERGE)
def merge(
    inputs: Inputs = (),
    out: PathLike | None = None,
    *,
    recipe: PathLike | Mapping[str, Any] | None = None,
    weights: Iterable[SupportsFloat] | None = None,
    normalize: bool | None = None,
    method: str | Callable[..., Any] | None = None,
    base: Checkpoint | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: SupportsIndex | None = None,
    dtype: object = None,
    out_dtype: object = None,
    compute_dtype: object = None,
    own_methods: bool = False,
    convert_first: PathLike | None = None,
    card: bool | None = None,
    last: SupportsIndex | None = None,
    range: str | None = None,
    best: SupportsIndex | None = None,
    by: str | None = None,
    highest: bool = False,
    schedule: str | None = None,
    ema_decay: SupportsFloat | None = None,
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    on_missing: OnMissing | None = None,
    on_shape: OnShape | None = None,
    integers: Integers | None = None,
    mixed_dtypes: MixedDtypes | None = None,
    strict: bool = False,
    unsafe_truncate_embeddings: bool | None = None,
    tokenizer_source: str | None = None,
    chat_template: str | None = None,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    address: str | None = None,
    max_shard_size: str | SupportsIndex | None = None,
    keep_optimizer: bool | None = None,
    quantise: Quantise | None = None,
    allow_nonfinite: bool | None = None,
    hash: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    polite: bool = False,
    report: PathLike | None = None,
    statistics: bool = False,
    listener: Listener = quiet,
    progress: bool = False,
) -> Result | AdapterResult:
    """Merges checkpoints into ``out``, one chunk at a time.

    ``inputs``: paths, globs or state dicts in memory, or a dict that gives each path its weight. ``base+adapter`` is a path
    too. Or ``recipe``: a mergekit configuration as a YAML file or a dict. ``listener`` is called with each of
    :mod:`streammerge.events`. ``progress``: shows a bar on stderr.

    Raises RecipeError, FormatError, MismatchError, BudgetError, SpaceError, LockedError, ChangedError, VerifyError or
    TaskError. The output does not exist after an error. Returns the bytes read and written, the time and the memory.

    Adapters alone are merged to an adapter, in the folder ``out``: by the method linear, which stacks their factors, by
    ``"cat"``, ``"svd"``, or another method on the products of their factors. The result then tells the error of each layer.
    With ``base`` each adapter is merged as the base with it.
    """
    given = locals()
    from streammerge.requests.merging import Request
    from streammerge.running.head_start import HeadStart

    request = Request.of(given)
    with _run_options(given) as running, closing(HeadStart(0 if running.polite else None)) as head_start:
        if request.out is None:
            raise RecipeError("a merge needs a name for its output; pass `out`")
        request.out.sweep()
        try:
            request.out.check_writable(running.overwrite)
        except RecipeError:
            request.refuse_input_as_output()  # this one could not be replaced with `overwrite` either
            raise
        if report is not None or statistics:  # before memory is counted from, and here, because most merges have no report
            from streammerge.reporting import making, recorded
            from streammerge.requests.inputs import path_of
        before = resident_bytes()
        with remembering():
            combined = request.combination()
            if combined is None:
                made = request.plan(head_start.opened)
        if combined is not None:
            if report is not None or statistics:
                named = "report" if report is not None else "statistics"
                raise RecipeError(f"`{named}` is of a model, and this makes an adapter; leave it out")
            return _make(combined, request.out, given, running.listener, before)
        if request.merging.convert_first is not None:
            from streammerge.requests import conversions  # here, because most merges convert nothing

            folder = parse(request.merging.convert_first)
            if conversions.convert_first(made.recipe, folder, request.resources, running):
                made = request.plan()
        if report is None and not statistics:
            return _executed(made, running, given, before)
        page = None if report is None else parse(path_of("report", report))
        if page is not None:
            from streammerge.running.execution import refuse_beside

            making.check_possible(page, running.overwrite)
            refuse_beside("report", page, made, inside=True)
        recorder = recorded.Recorder(running.listener)
        result = _executed(made, replace(running, listener=recorder, measures=True), given, before)
        making.report_merge(result, recorder.samples, page, statistics)
        return result


@takes(*SWEEP)
def sweep(
    inputs: Inputs = (),
    out: PathLike | None = None,
    *,
    recipe: PathLike | Mapping[str, Any] | None = None,
    weights: Sequence[Iterable[SupportsFloat]] | None = None,
    parameters: Mapping[str, Any] | None = None,
    random: SupportsIndex | None = None,
    epochs: str | None = None,
    averages: str | None = None,
    score: str | Callable[[str], Any] | None = None,
    lowest: bool = False,
    keep: str | SupportsIndex | None = None,
    soup: Soup | None = None,
    normalize: bool | None = None,
    method: str | Callable[..., Any] | None = None,
    base: Checkpoint | None = None,
    seed: SupportsIndex | None = None,
    dtype: object = None,
    out_dtype: object = None,
    compute_dtype: object = None,
    own_methods: bool = False,
    card: bool | None = None,
    rename: str | Sequence[str] | Mapping[str, str] | None = None,
    on_missing: OnMissing | None = None,
    on_shape: OnShape | None = None,
    integers: Integers | None = None,
    mixed_dtypes: MixedDtypes | None = None,
    strict: bool = False,
    unsafe_truncate_embeddings: bool | None = None,
    tokenizer_source: str | None = None,
    chat_template: str | None = None,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    address: str | None = None,
    max_shard_size: str | SupportsIndex | None = None,
    keep_optimizer: bool | None = None,
    quantise: Quantise | None = None,
    allow_nonfinite: bool | None = None,
    hash: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    polite: bool = False,
    listener: Listener = quiet,
    progress: bool = False,
) -> SweepResult:
    """Makes many merges of the same inputs in one read, and keeps the best if it is given a score.

    ``inputs`` or ``recipe``: as of :func:`merge`; of a recipe its own ``parameters`` vary, and rules, models, slices and
    modules keep theirs. ``out``: a folder for the outputs, whose names say their settings; or a name with
    ``{}`` in place of the settings. Each output has the bytes of its own merge, but for the receipt. The same call goes on
    after an interruption, and repeats no score. ``sweep.csv`` in the folder has the table, ``print(result)`` shows it.
    ``result.outputs``, ``result.kept`` and ``result.best`` are its rows. ``listener``, ``progress`` and the errors are
    those of :func:`merge`; TaskError is raised for a score that fails.
    """
    given = locals()
    from streammerge.sweeps.sweeping import Sweep  # here, because merges start without it

    with _run_options(given) as running:
        made = {name: value for name, value in given.items() if name not in ("listener", "progress")}
        return Sweep(made, running).run()


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
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    address: str | None = None,
    max_shard_size: str | SupportsIndex | None = None,
    keep_optimizer: bool | None = None,
    quantise: Quantise | None = None,
    allow_nonfinite: bool | None = None,
    hash: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    polite: bool = False,
    listener: Listener = quiet,
    progress: bool = False,
) -> Result:
    """Writes a checkpoint in another container: ``.pth`` to safetensors or back, one file or shards.

    ``path``: a file or folder, or a state dict in memory. ``out``: its name decides the container. ``drop`` and
    ``keep`` take glob patterns on tensor names. ``like``: a checkpoint of the same model, whose tensors are replaced by
    these; what else it holds is kept, and ``state_dict`` chooses in it. ``only`` prunes a ``.pth``: its other state dicts
    are left out. ``listener``, ``progress`` and the errors are those of :func:`merge`.
    """
    given = locals()
    from streammerge.recipe.arguments import conversion
    from streammerge.requests.inputs import Held, named, opened, path_of
    from streammerge.requests.plans import planned
    from streammerge.running.execution import refuse_beside

    asked, naming = picked(Converting, given), picked(Naming, given)
    selection, output, resources = picked(Selecting, given), picked(Writing, given), picked(Resources, given)
    held = Held()
    source, target = named("path", path, held), parse(path_of("out", out))
    with _run_options(given) as running:
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
        recipe = with_hub_places(conversion(source, asked.drop, asked.keep, overrides, like))
        made = planned(recipe, target, resources, running.executor, hashed=output.hash, held=held, like=like is not None)
        if asked.extras is not None:
            beside = parse(asked.extras)
            beside.check_writable(running.overwrite)
            refuse_beside("extras", beside, made)
        result = _executed(made, running, given, before)
    if asked.extras is not None:
        place = source if source in held else hub_place(source)
        index = opened(place, None if asked.like else recipe.state_dict, recipe.ema, held)
        content = {"format": index.format, "metadata": index.metadata, "data": index.plain_data()}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        parse(asked.extras).write_whole(text.encode("utf-8", "backslashreplace"), running.overwrite)
    return result


@takes(*EXTRACT)
def extract(
    tuned: Checkpoint,
    out: PathLike,
    *,
    base: Checkpoint | None = None,
    rank: SupportsIndex | None = None,
    energy: str | SupportsFloat | None = None,
    target: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    save_modules: bool = False,
    alpha: str | SupportsFloat | None = None,
    dtype: object = None,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    overwrite: bool = False,
    polite: bool = False,
    listener: Listener = quiet,
    progress: bool = False,
) -> AdapterResult:
    """Writes the difference of a model and its base as a LoRA adapter, in the folder ``out`` that PEFT loads.

    ``tuned``: a file or folder, or a state dict in memory. The update of each matrix becomes its truncated singular value
    decomposition, computed by rows within ``memory``. ``result.error`` is what the adapter lacks of all updates, as a share
    of their norm, and ``result.layers`` says it for each tensor. ``listener``, ``progress`` and the errors are those of
    :func:`merge`.
    """
    given = locals()
    from streammerge.requests.inputs import path_of

    target_place = parse(path_of("out", out))
    with _run_options({**given, "resume": True, "executor": "auto"}) as running:
        target_place.sweep()
        target_place.check_writable(running.overwrite)
        before = resident_bytes()
        from streammerge.requests.extractions import extracting  # here, because merges start without it

        return _make(extracting(given), target_place, given, running.listener, before)


def _executed(made: Plan, running: RunOptions, given: Mapping[str, Any], before: int) -> Result:
    executing = picked(Executing, given)
    if executing.executor != "ray":
        from streammerge.running.execution import execute

        return execute(made, running, before)
    from streammerge.requests.cluster import execute_on_nodes  # here, because most merges run on one machine

    resources, writing = picked(Resources, given), picked(Writing, given)
    return execute_on_nodes(made, running, resources, executing, writing.hash, before)


def _make(made: Making, out: Location, given: Mapping[str, Any], listener: Listener, before: int) -> AdapterResult:
    from streammerge.factoring.making import make  # here, because most runs make no adapter
    from streammerge.running.choosing import default_workers

    resources, asked = picked(Resources, given), picked(Replacing, given)
    return make(
        made,
        out,
        memory_bytes=parse_bytes(resources.memory),
        workers=resources.workers or default_workers(),
        overwrite=asked.overwrite,
        polite=asked.polite,
        listener=listener,
        resident_before=before,
        resume=given.get("resume", True),
    )


@takes(*VERIFY)
def verify(
    out: PathLike,
    *,
    sample: str | SupportsFloat | None = None,
    seed: SupportsIndex = 0,
    inputs: PathLike | None = None,
    own_methods: bool = False,
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    listener: Listener = quiet,
    progress: bool = False,
) -> Verified:
    """Verifies the output ``out`` against its receipt: its structure, the checksum of every byte and, if its inputs are
    available, the values of a sample of its tensors, computed again in float64.

    ``sample``: a share like ``"5%"`` or ``0.05``, ``"100%"`` for all, 0 for none. If it is given, missing inputs are an
    error. ``listener`` and ``progress`` are those of :func:`merge`. Raises VerifyError when anything is wrong or cannot be
    verified.
    """
    given = locals()
    asked, resources = picked(Verifying, given), picked(Resources, given)
    with _listening(given) as told:
        return _verified(out, asked, resources, told)


def _verified(out: PathLike, asked: Verifying, resources: Resources, listener: Listener) -> Verified:
    from streammerge.requests.inputs import path_of
    from streammerge.running.choosing import default_workers
    from streammerge.running.readback import receipt_of
    from streammerge.verifying.files import check_files

    place, share = parse(hub_place(path_of("out", out))), parse_share("5%" if asked.sample is None else asked.sample)
    receipt = receipt_of(place)
    try:
        workers = resources.workers or default_workers()
        verified = check_files(place, receipt, workers, parse_bytes(resources.memory), listener)
    except (FormatError, OSError) as error:
        raise VerifyError(f"{printable(place)} cannot be verified: {printable(error, 1000)}") from error
    if not share:
        return verified
    from streammerge.verifying.attempts import with_values

    return with_values(verified, place, receipt, share, asked, resources, listener)


@takes(*DIFF)
def diff(
    a: Checkpoint,
    b: Checkpoint,
    base: Checkpoint | None = None,
    *,
    state_dict: str | None = None,
    ema: Ema | None = None,
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    executor: str | Callable[[int], Any] = "auto",
    address: str | None = None,
    report: PathLike | None = None,
    listener: Listener = quiet,
    progress: bool = False,
) -> Diff:
    """Compares two checkpoints of any containers, tensor by tensor, in one streaming read.

    ``a`` and ``b``: paths, or state dicts in memory. Names are matched as in a merge. ``print(result)`` shows a summary;
    ``result.equal``, ``result.tensors``, ``result.layers``, ``result.relative``, ``result.cosine`` are its numbers. With
    ``base``, ``result.agreement`` tells how the changes agree. Equal means the same names, shapes and values to the bit;
    dtypes, ties and what is no tensor are told, and do not count. ``listener`` and ``progress``: as of :func:`merge`.

    Sums are float64, and do not depend on the memory, the workers or the executor. Raises RecipeError, FormatError,
    MismatchError, BudgetError, ChangedError or TaskError. Differences are no error.
    """
    given = locals()
    from streammerge.requests.inputs import Held, named

    selecting, resources = picked(Selecting, given), picked(Resources, given)
    held = Held()
    names = named("a", a, held), named("b", b, held), None if base is None else named("base", base, held)
    from streammerge.diffing.comparing import compare  # here: a merge starts without it

    if report is not None:
        from streammerge.reporting import making  # here, because most comparisons have no report
        from streammerge.requests.inputs import path_of

        page = parse(path_of("report", report))
        making.check_possible(page, overwrite=True)
    with _run_options(given) as running:
        found = compare(names, held, selecting, resources, running.executor, running.listener)
    if report is not None:
        making.report_diff(found, page)
    return found


@takes(*REPORT)
def report(
    out: PathLike,
    to: PathLike,
    *,
    inputs: PathLike | None = None,
    compare: bool = True,
    exact: bool = False,
    overwrite: bool = False,
    memory: str | SupportsIndex = DEFAULT_MEMORY,
    workers: SupportsIndex | None = None,
    io: Io = "mmap",
    listener: Listener = quiet,
    progress: bool = False,
) -> Location:
    """Writes the page of an output ``out`` into the file ``to``: what was merged, how far the output moved, what was not
    used.

    The page is one file that opens offline. What was merged comes from the receipt, and distances from the inputs that are
    found, which are read again. A merge with ``report`` or ``statistics`` measures them while it merges; the statistics
    stay beside the output, and then no input is read. These distances are of a sample; ``exact`` reads output and inputs
    again, for distances of all elements. Needs ``streammerge[report]``.
    ``listener`` and ``progress``: as of :func:`merge`. Raises RecipeError, and VerifyError for an output without a receipt.
    """
    given = locals()
    from streammerge.reporting import making  # here: a merge starts without it
    from streammerge.requests.inputs import path_of

    asked, place = picked(Showing, given), parse(path_of("to", to))
    making.check_possible(place, asked.overwrite)

    def compared(path: str, made: str) -> Diff:
        return diff(path, made, memory=memory, workers=workers, io=io, listener=listener, progress=progress)

    folder = None if asked.inputs is None else str(asked.inputs)
    reading = compared if asked.compare else None
    making.report_output(parse(path_of("out", out)), place, folder, reading, asked.exact)
    return place


@takes(*WORKER)
def worker(
    plan: PathLike,
    *,
    share: str | None = None,
    claim: bool = False,
    memory: str | SupportsIndex | None = None,
    workers: SupportsIndex | None = None,
    io: Io | None = None,
    executor: str | Callable[[int], Any] | None = None,
    polite: bool = False,
    listener: Listener = quiet,
    progress: bool = False,
) -> ShareResult:
    """Makes units of a saved plan on this machine, while other machines make others.

    ``plan``: the file that :func:`plan` saved. Inputs, output and this file are on storage that all machines see under the
    same names. Each unit leaves a receipt, and what has a receipt is not made again. A machine that is killed loses the
    units that it was making; the others take them over, if they claim. Returns when all units of its share have receipts.
    ``listener``, ``progress`` and the errors are those of :func:`merge`.
    """
    given = locals()
    with _listening(given) as told:
        from streammerge.requests import machines  # here, because a merge on one machine does without
        from streammerge.requests.inputs import path_of

        place = parse(path_of("plan", plan))
        return machines.work(place, picked(Sharing, given), picked(Machine, given), told, resident_bytes())


@takes(*FINISH)
def finish(
    plan: PathLike,
    *,
    overwrite: bool = False,
    listener: Listener = quiet,
    progress: bool = False,
) -> Result:
    """Publishes the output of a saved plan, when all of its units are made.

    ``plan``: the file that :func:`plan` saved. Checks the receipts of all units, writes headers and side files, and makes
    the output visible in one step. It is the same to the byte as that of :func:`merge`. Raises UnfinishedError, which names
    the missing units, LockedError if another machine is finishing it, and the errors of :func:`merge`. ``listener`` and
    ``progress`` are those of :func:`merge`.
    """
    given = locals()
    with _listening(given) as told:
        from streammerge.requests import machines
        from streammerge.requests.inputs import path_of

        place = parse(path_of("plan", plan))
        return machines.finish(place, picked(Finishing, given).overwrite, told, resident_bytes())


@contextmanager
def _run_options(given: Mapping[str, Any]) -> Iterator[RunOptions]:
    """Reads the options of a run. Shows a progress bar while the block runs, if it is asked for."""
    from streammerge.running.session import RunOptions

    asked, executing = picked(Running, given), picked(Executing, given)
    with _listening(given) as listener:
        yield RunOptions(asked.overwrite, asked.resume, asked.polite, listener, executing.executor)


@contextmanager
def _listening(given: Mapping[str, Any]) -> Iterator[Listener]:
    """Returns the listener of a call. Shows a progress bar while the block runs, if it is asked for."""
    listener = given["listener"]
    if not callable(listener):
        raise RecipeError(f"`listener` takes a function of one event, not {printable(listener, 60)}")
    try:
        wanted = truth(given["progress"])
    except TypeError as error:
        raise RecipeError(f"`progress` takes True or False, not {printable(given['progress'], 60)}") from error
    if not wanted or sys.stderr is None:  # pythonw and some services have no stderr
        yield listener
        return
    from streammerge.progress import ProgressBar  # here, because most programs show none

    with ProgressBar() as bar:

        def both(event: Event) -> None:
            bar(event)
            listener(event)

        yield both
