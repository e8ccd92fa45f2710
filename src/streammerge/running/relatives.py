"""Whether checkpoints of the same names and shapes come from one training: the cosine of a few sampled tensors.

Fine-tunes of one model point in the same direction (cosines near 1). Two trainings from different random numbers are
orthogonal (near 0), and their mean is useless. Only matrices are compared, because norms and biases are alike in any two
models.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streammerge.errors import listed, printable
from streammerge.planning.tasks import MergeTask, where
from streammerge.sources.base import Source
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.dtypes import DType
from streammerge.tensors.names import bare

if TYPE_CHECKING:
    import torch

_TENSORS = 16
_SAMPLE_ELEMS = 1 << 15
_LEAST_ELEMS = 256
_MOST_BYTES = 4 << 20
"""Samples that are read at once, at least those of one tensor."""
_STRANGERS = 0.1
_OF_NUMPY = (DType.F64, DType.F32, DType.F16)
Pair = tuple[Location, Location]


def strangers(tasks: Sequence[MergeTask], inputs: InputFiles, owners: Mapping[Location, Location]) -> list[str]:
    """Returns a warning about the checkpoints that are not related to the first one. ``owners``: file -> its checkpoint.

    Reads at most 16 samples of 32,768 elements from each.
    """
    cosines: dict[Pair, list[float]] = defaultdict(list)
    for compared in _compared(tasks, owners):
        samples = iter(inputs.alone([_middle(source) for sources in compared for source in sources]))
        for first, *others in compared:
            one = _numbers(first, next(samples))
            for other in others:
                cosine = _cosine(one, _numbers(other, next(samples)))
                if cosine is not None:
                    cosines[owners[first.begin[0]], owners[other.begin[0]]].append(cosine)
    medians = {pair: (_median(found), len(found)) for pair, found in cosines.items()}
    apart: dict[Location, list[Location]] = defaultdict(list)
    for (known, another), (median, _) in medians.items():
        if abs(median) < _STRANGERS:
            apart[known].append(another)
    return [_warning(known, others, medians) for known, others in apart.items()]


def _warning(first: Location, others: list[Location], medians: Mapping[Pair, tuple[float, int]]) -> str:
    if len(others) == 1:
        median, count = medians[first, others[0]]
        who = f"{printable(others[0])} has the names and shapes of {printable(first)} but seems"
        how = f"the median cosine of {count} sampled tensors is {median:.3f}"
    else:
        found = [medians[first, other][0] for other in others]
        who = f"{len(others)} inputs ({listed([*map(str, others)], 3)})"
        who += f" have the names and shapes of {printable(first)} but seem"
        how = f"the median cosines of sampled tensors are {min(found):.3f} to {max(found):.3f}"
    return f"{who} to come from another training: {how} (fine-tunes of one model: near 1)"


def _median(values: list[float]) -> float:
    """Returns the median. ``statistics`` would take as long to import as the sample takes to read."""
    ordered, last = sorted(values), len(values) - 1
    return (ordered[last // 2] + ordered[-(-last // 2)]) / 2


def _sampled(tasks: Sequence[MergeTask]) -> Iterator[MergeTask]:
    """Yields some of the tasks that merge matrices, spread over the whole checkpoint."""
    fit = where(tasks, lambda task: len(task.sources) > 1 and all(map(_is_matrix, task.sources)))
    yield from (tasks[number] for number in fit[:: max(len(fit) // _TENSORS, 1)][:_TENSORS])


def _is_matrix(entry: Source) -> bool:
    spec = entry.spec
    return spec.dtype.kind == "float" and len(spec.shape) > 1 and spec.numel >= _LEAST_ELEMS and entry.__class__ is Stored


def _compared(tasks: Sequence[MergeTask], owners: Mapping[Location, Location]) -> Iterator[list[list[Source]]]:
    """Yields batches of tensors whose samples are read at once. Each is its first source, and those that it is compared
    with."""
    batch, held = list[list[Source]](), 0
    for task in _sampled(tasks):
        first, *others = task.sources
        owner, name = owners[first.begin[0]], bare(first.spec.name)
        found = [each for each in others if owners[each.begin[0]] != owner and bare(each.spec.name) == name]
        if not found:
            continue
        nbytes = sum(_middle(each)[2] for each in (first, *found))
        if batch and held + nbytes > _MOST_BYTES:
            yield batch
            batch, held = [], 0
        batch.append([first, *found])
        held += nbytes
    if batch:
        yield batch


def _middle(source: Source) -> tuple[Location, int, int]:
    """Returns the place of the sample of a source: file, offset and bytes."""
    size = source.spec.dtype.element_bytes
    sampled = min(source.spec.numel, _SAMPLE_ELEMS)
    path, offset = source.begin
    return path, offset + (source.spec.numel - sampled) // 2 * size, sampled * size


def _numbers(source: Source, data: memoryview) -> Any:
    """Returns numbers as float64. By numpy: who only finishes an output would load torch for this alone. By torch where
    numpy cannot be imported, since no merge depends on it."""
    dtype = source.spec.dtype
    try:
        import numpy as np
    except ImportError:
        return _by_torch(dtype, data)
    if dtype == DType.BF16:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in _OF_NUMPY:
        return np.frombuffer(data, dtype.torch_name).astype(np.float64)
    return _by_torch(dtype, data).numpy()


def _by_torch(dtype: DType, data: memoryview) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=dtype.torch).double()


def _cosine(one: Any, two: Any) -> float | None:
    """Returns the cosine between two vectors, None if one has only zeros, or numbers that are not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of numbers too large to be squared
        squared = float((one * one).sum()) * float((two * two).sum())
        cosine = float((one * two).sum()) / math.sqrt(squared) if squared > 0 else None
    return cosine if cosine == cosine else None
