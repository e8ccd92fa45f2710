"""Making the tensor names of several checkpoints agree.

Trainers wrap models, and the wrapper's name leads each tensor's: ``module.`` (DataParallel), ``_orig_mod.``
(torch.compile), ``xtts.`` (Coqui's trainer) and so on. Names that differ only in such parts are the same tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from streammerge.errors import printable

_PREFIXES = ("module.", "_orig_mod.", "model.", "xtts.", "ema_model.", "net.", "network.", "student.", "teacher.")
_ANYWHERE = ("module.", "_orig_mod.")

LOADER_IGNORES: tuple[str, ...] = ("dvae.", "torch_mel_spectrogram_style_encoder.", "torch_mel_spectrogram_dvae.")
"""Tensors of Coqui's XTTS trainer that its loader drops; a checkpoint may have them or not."""


def bare(name: str) -> str:
    """The name without wrapper parts."""
    for part in _ANYWHERE:
        name = name.replace("." + part, ".")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix) and len(name) > len(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def match_names(base: Iterable[str], other: Iterable[str]) -> dict[str, str]:
    """Base name -> the other checkpoint's name for it, where they differ only in wrapper parts.

    Equal names match themselves. The rest match by :func:`bare`, where that is unambiguous on both sides.
    """
    base, other = list(base), list(other)
    theirs = set(other)
    matched = {name: name for name in base if name in theirs}
    left = {bare(n): n for n in other if n not in matched}
    counts = Counter(bare(n) for n in other if n not in matched) + Counter(bare(n) for n in base if n not in matched)
    for name in base:
        if name not in matched and counts[bare(name)] == 2 and bare(name) in left:
            matched[name] = left[bare(name)]
    return matched


def describe_match(matched: Mapping[str, str]) -> list[str]:
    """Sentences such as ``412 tensors match after 'module.' is removed``; none when all names were equal."""
    ways: Counter[tuple[str, str]] = Counter()
    for one, two in matched.items():
        if one != two:
            ours, theirs = map(printable, _difference(one, two))
            ways[ours, theirs] += 1
    return [
        f"{count} tensors match with '{theirs}' in its names for '{ours}' in the first"
        if ours and theirs
        else f"{count} tensors match without '{theirs}' in its names"
        if theirs
        else f"{count} tensors match with '{ours}' put before its names"
        for (ours, theirs), count in ways.most_common(4)
    ]


def _difference(ours: str, theirs: str) -> tuple[str, str]:
    """What stands before the part that both names end in."""
    common = 0
    while common < min(len(ours), len(theirs)) and ours[-1 - common] == theirs[-1 - common]:
        common += 1
    return ours[: len(ours) - common], theirs[: len(theirs) - common]


def ignored_by_loader(name: str) -> bool:
    """Whether the checkpoint's own loader drops this tensor."""
    return bare(name).startswith(LOADER_IGNORES)
