"""The memory that tasks take, and the budget of a run that has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from streammerge.errors import BudgetError
from streammerge.kernels.ranking import held_bytes
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY
from streammerge.planning.budget import BEST_CHUNK_ELEMS, FLOAT64_CHUNK_ELEMS, LONG_CHUNK_ELEMS, Budget, Cost, Load, fit
from streammerge.planning.summed import is_summed, summed_bytes
from streammerge.planning.tasks import MergeTask, Tasks, alike, copy_of_turned, objects, turned_task
from streammerge.sources.base import Needs, Source
from streammerge.sources.stored import Stored
from streammerge.stores import descriptors
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType

_STEP_BYTES = 1 << 20
"""How exactly the memory for what is read again is found."""
_LEAST_WORKERS = 4
"""The part of the workers that is left where fewer workers with more memory each read less."""


def is_stored(source: Source) -> bool:
    """Whether a source is a plain byte range."""
    return source.__class__ is Stored


def budget_of(
    tasks: Sequence[MergeTask],
    memory_bytes: int,
    workers: int,
    io: str,
    spooled: bool = False,
    pickle_bytes: int = 0,
    beside_bytes: int = 0,
    planned: Sequence[MergeTask] = (),
) -> tuple[Budget, str]:
    """Returns the budget of these tasks within ``memory_bytes``, and the way to read the inputs.

    Inputs are read by pread if they cannot be mapped, or if the memory or the file limit has no room for the mapped files.
    ``beside_bytes``: what each worker holds besides its buffers. ``planned``: further tasks that are in memory. Raises
    BudgetError if the memory is too little.
    """
    if io == "mmap" and not _can_map(tasks, workers):
        io = "pread"
    listed = Load._make(map(sum, zip(_load(tasks), _load(planned), strict=True)))
    files, most = _files_of(tasks)
    streams = most if any(path.store.reads_ahead for path in files.values()) else 0
    load = listed._replace(pickle_bytes=pickle_bytes, beside_bytes=beside_bytes, spooling=spooled, streams=streams)
    try:
        found = fit(memory_bytes, workers, _cost(tasks, io), load)
    except BudgetError:
        if io != "mmap":
            raise
        io, found = "pread", fit(memory_bytes, workers, _cost(tasks, "pread"), load)
    return (_remembering(tasks, memory_bytes, found, load) if found.cost.remembered else found), io


def _remembering(tasks: Sequence[MergeTask], memory_bytes: int, found: Budget, load: Load) -> Budget:
    """Returns a budget with more memory for what is read again.

    So many workers leave each of them enough that the largest graph of merges reads and writes half of what its merges
    would do one after the other, or reads its inputs once. Of these numbers it has the one that takes the least time; if
    none is enough, the one that reads the least.
    """
    from streammerge.planning.staying import graph, largest, moved_bytes, stages_bytes  # most merges have no stages

    nested = [task for task in objects(tasks) if task.nested]
    made, task = max(((graph(task.sources)[0], task) for task in nested), key=lambda each: largest(each[0]))
    enough = max(stages_bytes(made, task.out.nbytes) / 2 - task.out.nbytes, task.read_bytes)
    tried = list[tuple[bool, float, Budget]]()
    for count in range(min(found.workers, len(tasks)), max(found.workers // _LEAST_WORKERS, 1) - 1, -1):
        wide = _most_remembered(memory_bytes, count, found, load)
        read, computed = moved_bytes(made, wide.remembered_bytes, wide.chunk_elems)
        tried.append((read > enough, read if read > enough else (read + computed) / count, wide))
    return min(tried, key=lambda each: each[:2])[2] if tried else found


def _most_remembered(memory_bytes: int, workers: int, found: Budget, load: Load) -> Budget:
    """Returns the budget of so many workers that has the most memory for what is read again."""
    best, low, high = found._replace(workers=workers), 0, found.cost.remembered
    wanted = high
    while wanted - low >= _STEP_BYTES or wanted == found.cost.remembered:
        try:
            wide = fit(memory_bytes, workers, found.cost, load, wanted)
        except BudgetError:
            wide = found._replace(workers=0)
        if wide.workers == workers and (wide.tile_bytes or not found.tile_bytes):
            best, low = wide, wanted
            if wanted == found.cost.remembered:
                break
        else:
            high = wanted
        wanted = (low + high) // 2
    return best


def _load(tasks: Sequence[MergeTask]) -> Load:
    """Returns what takes memory for each tensor: the sources of tasks that are objects, these tasks, the sources of tasks
    that are rows, these tasks, the most rows in one file, and the pieces of long tensors."""
    own = list(objects(tasks))
    rows = len(tasks) - len(own)
    columns = rows * max([len(task.sources) for task, _ in alike(tasks)], default=0) if rows else 0
    together = tasks.most_in_one_file() if rows and isinstance(tasks, Tasks) else 0
    counts = ((-(-task.elems // task.piece_elems), count) for task, count in alike(tasks))
    parts = sum(several * count for several, count in counts if several > 1)
    return Load(sum(len(task.sources) for task in own), len(own), columns, rows, together, parts)


def _can_map(tasks: Sequence[MergeTask], workers: int) -> bool:
    """Whether the stores can map files, and as many files as the workers read at one time."""
    seen, most = _files_of(tasks)
    if most * workers > descriptors.mapped_at_once(workers):
        return False
    return all(path.store.mappable for path in seen.values())


def _files_of(tasks: Sequence[MergeTask]) -> tuple[dict[int, Location], int]:
    """Returns the files that the tasks read, and the most of them that one task reads."""
    most, seen = 0, dict[int, Location]()  # by identity, since this looks at every tensor
    if isinstance(tasks, Tasks) and tasks.views:
        seen |= {id(path): path for table in tasks.views.tables for path in table.paths}
    for task, _ in alike(tasks):
        files = 0
        for source in task.sources:
            if source.__class__ is Stored:
                path: Location = source.path
                seen[id(path)] = path
                files += 1
            else:
                paths = {blob.path for blob in source.blobs}
                seen |= {id(path): path for path in paths}
                files += len(paths)
        most = max(most, files)
    return seen, most


def _cost(tasks: Sequence[MergeTask], io: str) -> Cost:
    """Returns the memory of one chunk: for each kind, the most that any task needs. Zero if all tasks copy verbatim."""
    cost = Cost(0, 0, 0, 0)
    seen: set[tuple[object, ...]] = set()
    for task, _ in alike(tasks):
        if task.to_turn:
            cost = cost.most(_turned_cost(task, io))
            continue
        if not all(map(is_stored, task.sources)):
            cost = cost.most(_nested_cost(task, io))
            continue
        if task.verbatim:
            continue
        # Tens of thousands of tasks are alike and cost the same, so each kind is computed once.
        method, dtypes = task.method, tuple(source.spec.dtype for source in task.sources)
        sized = task.out.shape if method.passes or method.row else None
        kind = (id(method), dtypes, task.out.dtype, task.compute, task.based, sized, id(task.parameters))
        if kind not in seen:
            seen.add(kind)
            cost = cost.most(_task_cost(task, [dtype.component for dtype in dtypes], io))
    return cost


def _turned_cost(task: MergeTask, io: str) -> Cost:
    """Returns the memory of a tensor that is made turned, and then copied."""
    made = turned_task(task, 0, 0)
    return _cost([made, copy_of_turned(task, Stored(made.out, None, 0))], io)


def _task_cost(task: MergeTask, dtypes: list[DType], io: str) -> Cost:
    """Returns the memory of one chunk."""
    method, models, alone = task.method, len(dtypes), task.of_one
    widest = max(d.element_bytes for d in dtypes)
    out = task.out.dtype.component.element_bytes
    read, mapped = (widest, 0) if io == "pread" else (0, widest)
    inputs = models if io == "mmap" or method.passes else 0
    if method is COPY:
        return Cost(0, 0, out, read, inputs, mapped)
    compute, buffers = method.buffers_for(dtypes, task.compute, task.based)
    searches, rows_bytes = method.searches * models, method.held_bytes(task.row, models)
    passes = rows_bytes + held_bytes(task.elems if alone else min(task.elems, task.piece_elems), searches)
    passes += method.whole_bytes(task.shape, models - task.based, task.parameters, task.turned)
    spread = rows_bytes + held_bytes(task.elems, searches) if task.spread and not alone else 0
    own = Cost(compute, buffers, out, read, inputs, mapped, task.row, method.passes, passes, spread)
    own = own._replace(best=_best_chunk(method))
    return own._replace(summed=summed_bytes(models, widest)) if is_summed(task) else own


def _best_chunk(method: MergeMethod) -> int:
    """Returns the preferred chunk of a method."""
    if not method.passes or method.searches:
        return BEST_CHUNK_ELEMS
    return FLOAT64_CHUNK_ELEMS if method.compute == "float64" and method.whole is None else LONG_CHUNK_ELEMS


def _nested_cost(task: MergeTask, io: str) -> Cost:
    """Returns the memory of one chunk if some sources are not plain byte ranges. Such sources cannot be mapped."""
    opened: Iterable[Source] = task.sources
    again = (0, 0, 0)
    if task.nested:
        from streammerge.planning.repeated import apart  # here, because most merges have no stages
        from streammerge.planning.staying import memory_for

        opened, again = apart(task.sources), memory_for(task.sources)
    needed = Needs()
    for source in opened:
        if not is_stored(source):
            needed += source.needs()
    nested = Cost(
        *(0, 0, 0, 0),
        scratch=needed.scratch_bytes,
        shared=needed.shared_bytes,
        tiles=needed.tiles,
        held=needed.held_bytes,
        passes_bytes=needed.passes_bytes,
        remembered=again[0],
        passing=again[1],
        lag=again[2],
    )
    if task.verbatim:
        return nested
    dtypes = [source.spec.dtype.component for source in task.sources]
    read, mapped = (_task_cost(task, dtypes, way) for way in ("pread", io))
    plain = any(map(is_stored, task.sources))
    if again[0] and not plain:
        read = read._replace(inputs=0)  # what passes look at is remembered
    return read.most(nested) if not plain or io == "pread" else read.most(mapped).most(nested)
