"""Whether checkpoints of the same names and shapes come from one training: the cosine of a few sampled tensors.

Fine-tunes of one model point in the same direction (cosines near 1). Two trainings from different random numbers are
orthogonal (near 0), and their mean is useless. Only matrices are compared, because norms and biases are alike in any two
models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from streammerge.errors import listed, printable
from streammerge.planning.tasks import MergeTask, where
from streammerge.sources.base import Source
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.names import bare

_TENSORS = 16
_SAMPLE_ELEMS = 1 << 15
_LEAST_ELEMS = 256
_STRANGERS = 0.1
Pair = tuple[Location, Location]


def strangers(tasks: Sequence[MergeTask], inputs: InputFiles, owners: Mapping[Location, Location]) -> list[str]:
    """Returns a warning about the checkpoints that are not related to the first one. ``owners``: file -> its checkpoint.

    Reads at most 16 samples of 32,768 elements from each.
    """
    cosines: dict[Pair, list[float]] = defaultdict(list)
    for task in _sampled(tasks):
        first = task.sources[0]
        for other in task.sources[1:]:
            pair = owners[first.begin[0]], owners[other.begin[0]]
            if pair[0] != pair[1] and bare(first.spec.name) == bare(other.spec.name):
                cosine = _cosine(first, other, inputs)
                if cosine is not None:
                    cosines[pair].append(cosine)
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


def _cosine(one: Source, two: Source, inputs: InputFiles) -> float | None:
    """Returns the cosine between elements from the middle of both sources, None if one has only zeros there."""
    import torch

    sampled = min(one.spec.numel, _SAMPLE_ELEMS)
    start = (one.spec.numel - sampled) // 2
    vectors = []
    for entry in (one, two):
        size = entry.spec.dtype.element_bytes
        buffer = bytearray(sampled * size)
        path, offset = entry.begin
        inputs.get(path).read_into(memoryview(buffer), offset + start * size)
        vectors.append(torch.frombuffer(buffer, dtype=entry.spec.dtype.torch).double())
    length = vectors[0].norm() * vectors[1].norm()
    cosine = float(vectors[0].dot(vectors[1]) / length) if length > 0 else None
    return cosine if cosine == cosine else None
