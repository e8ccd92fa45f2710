"""Finds what a task would read more than once: tensors below merges, and what passes look at. It is remembered instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from streammerge.planning.budget import BEST_TILE_BYTES
from streammerge.planning.tasks import MergeTask, Tasks, replaced
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.inline import Inline
from streammerge.sources.merged import Merged, methods_in
from streammerge.sources.remembered import Remembered

_Place = tuple[object, ...]
_FREE = (Constant, Inline)
"""Sources whose elements cost nothing to read."""


def remembered(tasks: Tasks) -> Tasks:
    """Returns the tasks. In those that read merges, each tensor that is read several times is remembered by its readers.

    No number depends on that, and no digest of a plan.
    """
    changed = {
        number: _with_memory(made) for number, made in enumerate(tasks.made) if isinstance(made, MergeTask) and made.nested
    }
    return replaced(tasks, changed) if changed else tasks  # type: ignore[return-value]


def _with_memory(task: MergeTask) -> MergeTask:
    finder = _Finder()
    for source in task.sources:
        if source.parts:
            finder.see(source, task.method.passes)
    if not finder.again:
        return task
    known: dict[_Place, Source] = {}
    sources = tuple(_rebuilt(source, finder.again, known) if source.parts else source for source in task.sources)
    return replace(task, sources=sources)


def remembered_bytes(task: MergeTask) -> int:
    """Returns the bytes of the largest tensor that is remembered below a task whose passes, or those of a merge below it,
    read tensors several times; 0 if there is none."""
    if not task.nested or task.turned or task.to_turn:
        return 0
    methods = [task.method, *(method for source in task.sources for method in methods_in(source))]
    if not any(method.passes for method in methods):
        return 0
    return max(map(_largest, task.sources), default=0)


def _largest(source: Source) -> int:
    own = source.spec.nbytes if isinstance(source, Remembered) else 0
    return max([own, *map(_largest, source.parts)])


def is_alone(task: MergeTask, tile_bytes: int) -> bool:
    """Whether one worker makes all pieces of a long tensor one after the other, because its longer tiles hold what several
    passes read. Another worker would have to make the passes of inner merges again."""
    if tile_bytes <= BEST_TILE_BYTES or task.elems <= task.piece_elems:
        return False
    return 0 < remembered_bytes(task) <= tile_bytes


class _Finder:
    """``again``: the places of sources that are read more than once."""

    def __init__(self) -> None:
        self.seen = Counter[_Place]()
        self.again: dict[_Place, bool] = {}

    def see(self, source: Source, passes: bool) -> None:
        """Looks at a source. ``passes``: whether who reads it makes passes."""
        if isinstance(source, _FREE):
            return
        place = source.place
        self.seen[place] += 1
        if passes or self.seen[place] > 1:
            self.again[place] = True
        if self.seen[place] == 1:
            inner = isinstance(source, Merged) and source.method.passes
            for part in source.parts:
                self.see(part, inner)


def _rebuilt(source: Source, again: Mapping[_Place, bool], known: dict[_Place, Source]) -> Source:
    place = source.place
    made = known.get(place)
    if made is None:
        parts = source.parts
        made = source.with_parts(tuple(_rebuilt(part, again, known) for part in parts)) if parts else source
        if place in again:
            made = Remembered(source.spec, made)
        known[place] = made
    return made.named(source.spec.name)
