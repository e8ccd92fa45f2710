"""What a task reads more than once: tensors below merges, and what passes look at. It is remembered, as far as there is
memory: :mod:`streammerge.planning.staying` shares that out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from streammerge.planning.tasks import MergeTask, Tasks, replaced
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.inline import Inline
from streammerge.sources.merged import Merged
from streammerge.sources.remembered import Remembered
from streammerge.sources.turned import Turned

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
        finder.see(source, task.method.passes)
    if not finder.again:
        return task
    known: dict[_Place, Source] = {}
    return replace(task, sources=tuple(_rebuilt(source, finder.again, known) for source in task.sources))


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
            inner = isinstance(source, Turned) or (isinstance(source, Merged) and source.method.passes)
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


def apart(sources: Iterable[Source]) -> Iterator[Source]:
    """Yields the expressions that one worker opens for a task: each remembered one once, and those in it apart."""
    seen = set[_Place]()

    def inside(source: Source) -> Iterator[Source]:
        if isinstance(source, Remembered):
            if source.place not in seen:
                seen.add(source.place)
                yield _without(source.source)
                yield from inside(source.source)
            return
        for part in source.parts:
            yield from inside(part)

    for source in sources:
        if not isinstance(source, Remembered):
            yield _without(source)
        yield from inside(source)


def _without(source: Source) -> Source:
    """Returns an expression without the remembered ones in it, which others open too."""
    if isinstance(source, Remembered):
        return Constant(source.spec)
    parts = source.parts
    return source.with_parts(tuple(map(_without, parts))) if parts else source
