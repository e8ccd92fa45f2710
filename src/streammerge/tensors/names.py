"""Making the tensor names of several checkpoints agree.

Trainers wrap models, and the wrapper's name leads each tensor's: ``module.`` (DataParallel), ``_orig_mod.``
(torch.compile), ``xtts.`` (Coqui's trainer) and so on. Names that differ only in such parts are the same tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from streammerge.errors import printable

_NEUTRAL = ("module.", "_orig_mod.", "xtts.")
_ANYWHERE = ("module.", "_orig_mod.")
_MEANINGFUL = ("model.", "net.", "network.", "ema_model.", "student.", "teacher.")


def bare(name: str) -> str:
    """The name without the wrapper parts that say nothing about what the tensor is."""
    for part in _ANYWHERE:
        name = name.replace("." + part, ".")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _NEUTRAL:
            if name.startswith(prefix) and len(name) > len(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def match_names(base: Iterable[str], other: Iterable[str]) -> dict[str, str]:
    """Base name -> the other checkpoint's name for it, where they differ only in wrapper parts.

    Equal names match themselves. The rest match by :func:`bare`, where that is unambiguous on both sides. Prefixes that
    may mean something (``model.``, ``student.``) are considered only where next to nothing matches without them, one
    for the whole file and on one side: a ``student.`` is never taken for a ``teacher.``.
    """
    base, other = list(base), list(other)
    theirs = set(other)
    matched = {name: name for name in base if name in theirs}
    matched |= _by(bare, bare, [n for n in base if n not in matched], [n for n in other if n not in matched])
    if len(matched) * 10 > len(base):
        return matched
    ways = [matched]
    for prefix in _MEANINGFUL:
        ways += [_by(_without(prefix), bare, base, other), _by(bare, _without(prefix), base, other)]
    return max(ways, key=len)


def _without(prefix: str) -> Callable[[str], str]:
    return lambda name: bare(bare(name).removeprefix(prefix))


def _by(ours: Callable[[str], str], theirs: Callable[[str], str], base: list[str], other: list[str]) -> dict[str, str]:
    """Base name -> other name, where both have the same key and no other name on either side has it."""
    left = {theirs(name): name for name in other}
    counts = Counter(map(theirs, other)) + Counter(map(ours, base))
    return {name: left[key] for name in base if counts[key := ours(name)] == 2 and key in left}


def describe_match(matched: Mapping[str, str]) -> list[str]:
    """Sentences such as ``412 tensors match after 'module.' is removed``; none when all names were equal."""
    ways: Counter[tuple[str, str]] = Counter()
    for one, two in matched.items():
        if one != two:
            ours, theirs = map(printable, _difference(one, two))
            ways[ours, theirs] += 1
    return [
        f"{count} tensors match once '{theirs}' in its names is read as '{ours}'"
        if ours and theirs
        else f"{count} tensors match once '{theirs}' is removed from its names"
        if theirs
        else f"{count} tensors match once '{ours}' is put before its names"
        for (ours, theirs), count in ways.most_common(4)
    ]


def _difference(ours: str, theirs: str) -> tuple[str, str]:
    """What stands before the part that both names end in."""
    common = 0
    while common < min(len(ours), len(theirs)) and ours[-1 - common] == theirs[-1 - common]:
        common += 1
    return ours[: len(ours) - common], theirs[: len(theirs) - common]
