"""Makes tensors by the kernel of their method, which can make every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from streammerge.errors import StreammergeError, TaskError, printable
from streammerge.kernels.agreed import finite
from streammerge.kernels.batch import Batch
from streammerge.kernels.chunk import Chunk, Kernel, Look, Step, chunk_spans
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.pass_results import PassResults
from streammerge.kernels.spill import Spill
from streammerge.planning.tasks import MergeTask, Piece
from streammerge.running.nonfinite import Numbers, may_be_nonfinite, nonfinite_of
from streammerge.running.workspace import Outgoing, Workspace
from streammerge.stores.libc import return_large_blocks

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.masks import MaskRoom
    from streammerge.running.measuring import Taking

T = TypeVar("T")
OTHER_PASSES = (
    "it makes other passes when it is bound a second time, and a method must depend on its group and parameters only"
)


class Sources(Numbers, Protocol):
    """The numbers of a task's sources, as :class:`~streammerge.running.workspace.Inputs` has them."""

    def move_to(self, start: int, stop: int, /) -> None: ...
    def stays(self, source: int, /) -> bool: ...


def no_sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
    """Stands for the sweep of a method whose passes are made, or that makes none."""
    raise ValueError(OTHER_PASSES)


def bind(
    task: MergeTask,
    sweep: Callable[..., Iterator[Any]],
    results: PassResults | None = None,
    spills: Callable[[int], Spill] | None = None,
    masks: Callable[[int], MaskRoom | None] | None = None,
) -> Kernel:
    """Returns the kernel of a task. ``sweep`` runs the passes whose results are not in ``results``; ``spills`` makes a
    temporary file, ``masks`` room for masks."""
    import torch

    if task.method.whole:
        return_large_blocks()
    models, compute = len(task.sources) - task.based, getattr(torch, task.compute)
    more = (task.based, task.row, task.seed, results, task.turned, spills, masks)
    group = TensorGroup(task.out.name, task.shape, models, compute, sweep, *more)
    return task.method.bind(group, task.parameters)


def chunk_of(
    task: MergeTask, source: Sources, workspace: Workspace, start: int, stop: int, taking: Taking | None = None
) -> Chunk:
    """Returns the next chunk of a task, in the worker's buffers. The chunk before is of no use any more."""
    import torch

    workspace.clear(stop - start)
    source.move_to(start, stop)
    read = source.read
    if taking is not None:
        taking.move_to(start, stop)
        read = taking.read
    models = len(task.sources) - task.based
    return Chunk(start, stop, getattr(torch, task.compute), workspace, read, task.based, models, stays=source.stays)


@contextmanager
def failures(task: MergeTask, start: int, stop: int) -> Iterator[None]:
    """Turns errors that are not streammerge's own into a TaskError."""
    try:
        yield
    except StreammergeError:
        raise
    except Exception as error:
        raise TaskError(
            f"{printable(task.out.name)} ({task.method.name}, elements {start} to {stop}) failed: {printable(error)}"
        ) from error


class KernelMaker:
    """Calls a kernel. ``chunk_elems``: the most elements of a chunk. ``taking``: takes a sample of what is made."""

    def __init__(
        self,
        kernel: Kernel,
        task: MergeTask,
        source: Sources,
        workspace: Workspace,
        chunk_elems: int,
        taking: Taking | None = None,
    ) -> None:
        self.task, self.kernel = task, kernel
        self._puts: Callable[[Chunk, torch.Tensor], bool] | None = getattr(kernel, "put_compiled", None)
        """Rounds the kernel's result into memory by compiled functions. Returns whether it is done, and all is finite."""
        self.nonfinite: dict[str, int] = {}
        self._source, self._workspace, self._chunk_elems, self._taking = source, workspace, chunk_elems, taking

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return chunk_spans(start, stop, self._chunk_elems, self.task.row)

    def chunk(self, start: int, stop: int) -> Chunk:
        """Returns the chunk for the kernel."""
        return chunk_of(self.task, self._source, self._workspace, start, stop, self._taking)

    def put(self, start: int, stop: int, outgoing: Outgoing) -> memoryview:
        return self.put_chunk(self.chunk(start, stop), outgoing)

    def put_chunk(self, chunk: Chunk, outgoing: Outgoing) -> memoryview:
        """Makes a chunk, which is the last that :meth:`chunk` has returned."""
        import torch

        dtype = self.task.out.dtype.component
        part = outgoing.room(chunk.elems * dtype.element_bytes)
        out = torch.frombuffer(part, dtype=dtype.torch)
        if self._puts is None or not self._puts(chunk, out):
            result = self.kernel(chunk)
            if result.numel() != chunk.elems:
                raise ValueError(f"its kernel made {result.numel()} numbers of a chunk of {chunk.elems}")
            self.count(out.copy_(result.reshape(-1)), chunk)
        if self._taking is not None:
            self._taking.made(part)
        return part

    def count(self, out: torch.Tensor, chunk: Chunk) -> None:
        """Counts NaN and infinity in the result of a chunk by source. Puts in what all inputs agree on."""
        if self.task.out.dtype.kind == "float" and may_be_nonfinite(out):
            for name, count in nonfinite_of(out, self.kernel, self.task.row, chunk, self._source).items():
                self.nonfinite[name] = self.nonfinite.get(name, 0) + count


def put_batch(
    pieces: Sequence[Piece], source: Sources, workspace: Workspace, outgoing: Outgoing, taking: Taking | None
) -> memoryview | None:
    """Makes neighbouring tensors of one shape at once by the method's ``batch``. Returns their bytes, which are the last in
    ``outgoing``. None if a number is not finite, which must be settled tensor by tensor."""
    import torch

    task, elems = pieces[0].task, sum([piece.stop for piece in pieces])
    chunk = chunk_of(task, source, workspace, 0, elems, taking)
    names, models = [piece.task.out.name for piece in pieces], len(task.sources) - task.based
    with failures(task, 0, elems):
        result = task.method.batch and task.method.batch(
            Batch(names, task.shape, models, task.seed, chunk), task.parameters
        )
    if result is None:
        return None
    dtype = task.out.dtype.component
    data = outgoing.room(elems * dtype.element_bytes)
    out = torch.frombuffer(data, dtype=dtype.torch).copy_(result.view(-1))
    if may_be_nonfinite(out) and not bool(finite(out).all()):
        outgoing.take_back(len(data))
        return None
    if taking is not None:
        taking.made(data)
    return data
