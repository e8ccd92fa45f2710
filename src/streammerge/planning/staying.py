"""How much of each remembered tensor stays in memory, and what the rest costs.

A worker has one region for what a task reads more than once, and shares it out anew for each task. Readers go through a
tensor side by side, so each remembered tensor gets room for the elements between the first and the last of them. What is
left holds the first elements of some tensors from one pass to the next: of those that spare the most reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from streammerge.methods.contracts import MergeMethod
from streammerge.sources.base import Source, region_bytes
from streammerge.sources.merged import Merged
from streammerge.sources.remembered import Remembered
from streammerge.sources.turned import Turned
from streammerge.tensors.spec import GRAIN

_Place = tuple[object, ...]
_COMPUTING = 0.05
"""What it costs to compute a byte of a merge from a byte of one input, in bytes that are read. Reading comes first."""
_AROUND = 2
"""How many times the distance between readers there is room for, so that elements which stay are seldom moved."""


class _Node(NamedTuple):
    """A tensor below a task. ``parts``: the numbers of the tensors that it is made from, which come before it.

    ``read``: the bytes that it reads itself. ``span``: elements that it makes at once, if it is a merge; ``passes``: how
    often it then looks at its parts before. ``visits``: how often it goes through its parts to be read once.
    ``remembered``: whether its readers remember it.
    """

    nbytes: int
    elem_bytes: int
    parts: tuple[int, ...]
    read: int
    span: int
    passes: int
    visits: int
    remembered: bool


class Graph(NamedTuple):
    """The tensors below a task, those first that others are made from. ``roots``: the numbers of its sources. ``passes``:
    whether its method looks at them before."""

    nodes: tuple[_Node, ...]
    roots: tuple[int, ...]
    passes: bool


class Share(NamedTuple):
    """The bytes of memory for a remembered tensor: for its first elements, and for those read last."""

    first: int
    last: int


def graph(sources: Sequence[Source]) -> tuple[Graph, dict[_Place, int]]:
    """Returns the tensors below a task, and the number of each remembered one by its place."""
    nodes, known, numbers = list[_Node](), dict[_Place, int](), dict[_Place, int]()

    def add(source: Source) -> int:
        place = source.place
        if place in known:
            return known[place]
        inner = source.source if isinstance(source, Remembered) else source
        parts = inner.parts if any(_merges(part) for part in inner.parts) or isinstance(inner, Merged) else ()
        below = tuple(add(part) for part in parts)
        read = 0 if below else sum([blob.nbytes for blob in {*inner.blobs}])
        spec, merge = source.spec, inner if isinstance(inner, Merged) else None
        span, passes = (merge.span, _passes(merge.method)) if merge else (0, 0)
        visits = -(-spec.numel // GRAIN) if isinstance(inner, Turned) and below else 1
        nodes.append(_Node(spec.nbytes, spec.dtype.element_bytes, below, read, span, passes, visits, inner is not source))
        known[place] = len(nodes) - 1
        if inner is not source:
            numbers[place] = known[place]
        return known[place]

    roots = tuple(add(source) for source in sources)
    return Graph(tuple(nodes), roots, any(isinstance(source, Remembered) for source in sources)), numbers


def _passes(method: MergeMethod) -> int:
    """Returns how many passes a method makes, more or less: a search may look once to guess, and once to find."""
    return method.passes + (method.passes and method.searches > 0)


def _merges(source: Source) -> bool:
    return isinstance(source, Merged | Remembered) or any(map(_merges, source.parts))


def memory_for(sources: Sequence[Source]) -> tuple[int, int, int]:
    """Returns the memory that remembered tensors can use, and what they need at least: for each element of a chunk in which
    a task is computed, and beside it."""
    of, _ = graph(sources)
    each = sum(_AROUND * node.elem_bytes for node in of.nodes if node.remembered)
    return largest(of), each, each * _longest_span(of) + _rounding(of)


def largest(of: Graph) -> int:
    """Returns the memory that holds all remembered tensors: more is of no use."""
    return sum(node.nbytes for node in of.nodes if node.remembered) + _rounding(of)


def _rounding(of: Graph) -> int:
    """Returns what is lost where the parts of the region begin, which is aligned for every dtype."""
    return 2 * region_bytes(1) * sum(node.remembered for node in of.nodes)


def _longest_span(of: Graph) -> int:
    return max([node.span for node in of.nodes], default=0)


def _passing(of: Graph, chunk_elems: int) -> list[int]:
    """Returns the memory of each tensor for elements between the first and the last of its readers."""
    elems = _AROUND * (chunk_elems + _longest_span(of))
    return [min(node.nbytes, elems * node.elem_bytes) * node.remembered for node in of.nodes]


@lru_cache(maxsize=256)
def shares(of: Graph, room_bytes: int, chunk_elems: int) -> tuple[Share, ...]:
    """Returns the share of each tensor of the graph in a region of ``room_bytes``.

    Each step gives memory to the tensor of which a byte spares the most reading.
    """
    last = _passing(of, chunk_elems)
    room_bytes -= _rounding(of)
    left, staying = room_bytes - sum(last), [0.0] * len(of.nodes)
    if left < 0:
        return tuple(Share(0, nbytes * max(room_bytes, 0) // sum(last)) for nbytes in last)
    sweeps = _sweeps(of)
    now = _cost(of, sweeps, staying)
    while len(sweeps) > 1:
        best, gained, chosen = 0.0, now, (0, 0.0, 0)
        for number, node in enumerate(of.nodes):
            needed = node.nbytes - int(staying[number] * node.nbytes)
            if not node.remembered or not needed:
                continue
            own = last[number]
            taken = needed if needed <= left + own else left // node.elem_bytes * node.elem_bytes
            if taken <= 0:
                continue
            before, staying[number] = staying[number], staying[number] + taken / node.nbytes
            cost = _cost(of, sweeps, staying)
            spared = (now - cost) / max(taken - own * (taken == needed), 1)
            if spared > best:
                best, gained, chosen = spared, cost, (number, staying[number], taken - own * (taken == needed))
            staying[number] = before
        if not best:
            break
        number, part, taken = chosen
        staying[number], now, left = part, gained, left - taken
        if int(part * of.nodes[number].nbytes + 0.5) >= of.nodes[number].nbytes:
            staying[number], last[number] = 1.0, 0
    first = [
        int(part * node.nbytes) // node.elem_bytes * node.elem_bytes for part, node in zip(staying, of.nodes, strict=True)
    ]
    return tuple(map(Share, first, last))


def moved_bytes(of: Graph, room_bytes: int, chunk_elems: int) -> tuple[float, float]:
    """Returns the bytes that a task reads with so much memory, and those of the inputs of merges that it computes, more or
    less."""
    given = shares(of, room_bytes, chunk_elems)
    staying = [share.first / max(node.nbytes, 1) for share, node in zip(given, of.nodes, strict=True)]
    read, both = (_cost(of, _sweeps(of), staying, computing) for computing in (0, 1))
    return read, both - read


def stages_bytes(of: Graph, out_bytes: int) -> int:
    """Returns the bytes that merges one after the other would read and write, more or less. ``out_bytes``: of the task's
    result."""
    moved = out_bytes + (1 + of.passes) * sum(of.nodes[number].nbytes for number in of.roots)
    for node in of.nodes:
        if node.span:
            moved += node.nbytes + (1 + node.passes) * sum(of.nodes[part].nbytes for part in node.parts)
    return moved


def _sweeps(of: Graph) -> list[tuple[int, ...]]:
    """Returns what is read in each sweep over the tensors: the passes of merges, which begin with the innermost, and then
    those of the task."""
    inner = [node.parts for node in of.nodes for _ in range(node.passes)]
    return [*inner, *[of.roots] * (1 + of.passes)]


def _cost(of: Graph, sweeps: list[tuple[int, ...]], staying: list[float], computing: float = _COMPUTING) -> float:
    """Returns what all sweeps cost, in bytes. ``staying``: the part of each tensor that is read once."""
    total, there = 0.0, [False] * len(of.nodes)
    for read in sweeps:
        begins = [1.0] * len(of.nodes)  # where the part begins that is read: all reading goes on to the end
        often = [1] * len(of.nodes)
        for number in read:
            begins[number] = 0.0
        for number in range(len(of.nodes) - 1, -1, -1):
            node, begin = of.nodes[number], begins[number]
            if begin == 1.0:
                continue
            stays = max(begin, staying[number])
            times = often[number] * (1 - stays) + (0 if there[number] else stays - begin)
            begin = stays if there[number] else begin
            there[number] = True
            total += (node.read + computing * node.nbytes * len(node.parts)) * times
            for part in node.parts:
                begins[part] = min(begins[part], begin)
                often[part] = max(often[part], node.visits * (often[number] if staying[number] < 1 else 1))
    return total
