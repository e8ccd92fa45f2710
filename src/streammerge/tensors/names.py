"""Matching of tensor names between checkpoints.

Trainers wrap models, and put the wrapper's name before each tensor's: ``module.`` (DataParallel), ``_orig_mod.``
(torch.compile), ``xtts.`` (Coqui's trainer) and others. Names that differ only in such prefixes mean the same tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from streammerge.errors import printable

_NEUTRAL = ("module.", "_orig_mod.", "xtts.")
_ANYWHERE = ("module.", "_orig_mod.")
_MEANINGFUL = ("model.", "net.", "network.", "ema_model.", "student.", "teacher.")


def bare(name: str) -> str:
    """Returns the name without wrapper prefixes."""
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
    """Maps names of the base to the other checkpoint's names that differ only in wrapper prefixes.

    Equal names match themselves. The rest match by :func:`bare`, if the match is unique on both sides. Prefixes that
    may have a meaning (``model.``, ``student.``) are tried only if at most a tenth of the names match without them.
    One such prefix is then removed from all names of one side. ``student.`` therefore never matches ``teacher.``.
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
    """Maps base names to other names with the same key; a key must occur exactly once on each side."""
    left = {theirs(name): name for name in other}
    counts = Counter(map(theirs, other)) + Counter(map(ours, base))
    return {name: left[key] for name in base if counts[key := ours(name)] == 2 and key in left}


def describe_match(matched: Mapping[str, str]) -> list[str]:
    """Returns sentences like ``412 tensors match after 'module.' is removed``; none if all names are equal."""
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
    """Returns the prefixes of both names before their common suffix."""
    common = 0
    while common < min(len(ours), len(theirs)) and ours[-1 - common] == theirs[-1 - common]:
        common += 1
    return ours[: len(ours) - common], theirs[: len(theirs) - common]
