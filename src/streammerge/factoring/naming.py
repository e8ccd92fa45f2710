"""Which modules of several adapters are the same, whatever their dialect calls them.

Kohya's names have underscores in place of dots, which cannot be undone. So names are compared without their dots and
without the start that tells the part of a pipeline; names of Stable Diffusion and Flux in all layouts
(:mod:`streammerge.adapters.layouts`). A module that the first adapter lacks gets a name like those of the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from streammerge.adapters.layouts import FLAT_BLOCKS, flat_blocks, other_names
from streammerge.adapters.modules import Adapter, Module
from streammerge.errors import MismatchError, printable
from streammerge.units import counted, inflected

_STARTS: tuple[tuple[str, str], ...] = (
    ("lora_unet_", "unet"),
    ("lora_transformer_", "unet"),
    ("lora_prior_unet_", "prior"),
    ("lora_te1_", "text 1"),
    ("lora_te2_", "text 2"),
    ("lora_te3_", "text 3"),
    ("lora_te_", "text 1"),
    ("lycoris_", "unet"),
    ("lora_", ""),
    ("unet.", "unet"),
    ("transformer.", "unet"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("text_encoder.", "text 1"),
    ("text_encoder_2.", "text 2"),
    ("text_encoder_3.", "text 3"),
)
"""(start of a module's name, the part of a pipeline that it tells)."""
_FLAT_STARTS = {"unet": "lora_unet_", "prior": "lora_prior_unet_", "text 2": "lora_te2_", "text 3": "lora_te3_"}
"""Part of a pipeline -> the start of its names in Kohya's dialect. The first text encoder has two."""
_NUMBER = r"(?<![^._])\d+(?![^._])"
Spelling = tuple[str, str]
"""Part of a pipeline, and a module's name there without dots."""


def is_flat(name: str) -> bool:
    """Whether a module's name has underscores in place of the dots of the base's, as in Kohya's dialect."""
    return "." not in name and name.startswith(("lora_", "lycoris_"))


def aligned(adapters: Sequence[Adapter]) -> dict[str, list[tuple[int, Module]]]:
    """Returns each module's name in the result -> the adapters that have it, by number, with their module.

    Raises MismatchError for names that have no counterpart in the dialect of the first adapter.
    """
    names = _Names(adapters)
    found: dict[str, list[tuple[int, Module]]] = {module.name: [(0, module)] for module in adapters[0].modules}
    for number, adapter in enumerate(adapters[1:], 1):
        taken: dict[str, Module] = {}
        for module in adapter.modules:
            name = names.of(adapter, module)
            if name in taken:
                raise MismatchError(
                    f"{adapter.where}: {printable(taken[name].name)} and {printable(module.name)} are both "
                    f"{printable(name)} of {adapters[0].where}; rename the tensors of one"
                )
            taken[name] = module
            found.setdefault(name, []).append((number, module))
    return found


class _Names:
    """The names in the result. Those of the first adapter stay; others get names like them."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._first = adapters[0]
        every = [module.name for adapter in adapters for module in adapter.modules]
        own = [module.name for module in self._first.modules]
        self._own = set(own)
        self._flat = any(map(is_flat, own))
        self._mixed = self._flat or any(map(is_flat, every))
        self._known: dict[Spelling, str] = {}
        self._fused: dict[Spelling, str] = {}
        self._starts: dict[str, str] = {}
        self._patterns: dict[Spelling, set[str]] = {}
        self._two_encoders = any(_split(name)[1] == "text 2" for name in every)
        self._layouts = {place: layout for name in own for place, layout in _layout(name)}
        for name in own:
            self._learn(name)

    def _learn(self, name: str) -> None:
        start, part, inner = _split(name)
        self._starts.setdefault(part, start)
        for spelling in _spellings(name):
            other = self._known.setdefault(spelling, name)
            if other != name and spelling == (part, _flat(inner)):
                raise MismatchError(
                    f"{self._first.where}: {printable(other)} and {printable(name)} are one module in two dialects; rename "
                    "the tensors of one"
                )
        self._fused.update(dict.fromkeys(_fused(name), name))
        if not is_flat(name):
            pattern = re.sub(_NUMBER, "#", inner)
            self._patterns.setdefault((part, _flat(pattern)), set()).add(pattern)

    def of(self, adapter: Adapter, module: Module) -> str:
        """Returns the name in the result of a module of another adapter."""
        name = module.name
        if name in self._own or not self._own:
            return name
        spellings = list(_spellings(name))
        for spelling in spellings:
            if spelling in self._known:
                return self._known[spelling]
        fused = next((self._fused[each] for each in spellings if each in self._fused), None)
        fused = fused or next((self._known[each] for each in _fused(name) if each in self._known), None)
        if fused is not None:
            raise self._no_name(adapter, name, f"{printable(fused)} there has it in another division of its rows")
        return self._new(adapter, name)

    def _new(self, adapter: Adapter, name: str) -> str:
        """Returns a name like those of the first adapter for a module that it lacks."""
        start, part, inner = _split(name)
        theirs, ours = dict(_layout(name)).get(part), self._layouts.get(part)
        if theirs is not None and ours is not None and theirs != ours:
            inner = self._in_layout(adapter, name, inner, ours)
        if self._flat:
            return self._flat_start(part, start) + _flat(inner)
        if not is_flat(name):
            return self._starts.get(part, start) + inner if self._mixed else name
        patterns = self._patterns.get((part, re.sub(_NUMBER, "#", _flat(inner))), set())
        if len(patterns) != 1:
            raise self._no_name(adapter, name, "its dots cannot be told; give the file with Kohya's names first")
        numbers = iter(re.findall(_NUMBER, inner))
        return self._starts[part] + re.sub("#", lambda _: next(numbers), next(iter(patterns)))

    def _in_layout(self, adapter: Adapter, name: str, inner: str, layout: str) -> str:
        """Returns the name of a module in the other layout of Stable Diffusion's or Flux' names."""
        _, part, _ = _split(name)
        if is_flat(name) or self._flat:
            found = [each for _, each in _spellings(name) if dict(_layout_of(each, part)).get(part) == layout]
        else:
            found = [stem for stem in _dotted(inner) if dict(_layout_of(_flat(stem), part)).get(part) == layout]
        if len(found) != 1:
            raise self._no_name(adapter, name, f"names of the layout {layout} have no counterpart for it")
        return found[0]

    def _flat_start(self, part: str, start: str) -> str:
        """Returns how names of a part begin in Kohya's dialect."""
        if part in self._starts:
            return self._starts[part]
        if start.endswith("_") or part not in {*_FLAT_STARTS, "text 1"}:
            return start if start.endswith("_") else "lora_"
        if part == "text 1":
            return "lora_te1_" if self._two_encoders else "lora_te_"
        return _FLAT_STARTS[part]

    def _no_name(self, adapter: Adapter, name: str, why: str) -> MismatchError:
        return MismatchError(
            f"{adapter.where}: {printable(name)} has no name in the dialect of {self._first.where} "
            f"(there are names like {printable(next(iter(self._first.modules)).name)}): {why}"
        )


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _split(name: str) -> tuple[str, str, str]:
    """Returns the start of a module's name, the part of a pipeline that it tells, and the rest."""
    for start, part in _STARTS:
        if name.startswith(start) and len(name) > len(start):
            return start, part, name[len(start) :]
    return "", "", name


def _dotted(inner: str) -> Iterator[str]:
    """Yields the names of a whole module in other layouts."""
    for other in other_names(f"{inner}.weight"):
        if other.shares == 1:
            yield other.name.removesuffix(".weight")


def _spellings(name: str) -> Iterator[Spelling]:
    """Yields the part of a module with each of its names without dots, its own first."""
    _, part, inner = _split(name)
    yield part, _flat(inner)
    if is_flat(name):
        for other in flat_blocks(inner):
            yield part, other
    else:
        for other in _dotted(inner):
            yield part, _flat(other)


def _fused(name: str) -> list[Spelling]:
    """Returns the names of modules that a module is a part of, or that are parts of it."""
    _, part, inner = _split(name)
    others = () if is_flat(name) else other_names(f"{inner}.weight")
    return [(part, _flat(each.name.removesuffix(".weight"))) for each in others if each.shares > 1]


def _layout(name: str) -> Iterator[tuple[str, str]]:
    _, part, inner = _split(name)
    yield from _layout_of(_flat(inner), part)


def _layout_of(inner: str, part: str) -> Iterator[tuple[str, str]]:
    """Yields the part with its layout, if a name without dots tells it."""
    for layout, starts in FLAT_BLOCKS.items():
        if inner.startswith(starts):
            yield part, layout


def said(adapters: Sequence[Adapter], modules: Mapping[str, Sequence[tuple[int, Module]]]) -> list[str]:
    """Returns notes about names that were translated, and modules that not all adapters have."""
    notes = []
    other = next(
        ((number, name, module) for name, found in modules.items() for number, module in found if module.name != name), None
    )
    if other is not None:
        number, name, module = other
        notes.append(
            f"the result has the names of {adapters[0].where}: {printable(module.name)} of {adapters[number].where} is "
            f"{printable(name)} there"
        )
    if len(adapters) > 1:
        for number, adapter in enumerate(adapters):
            alone = [name for name, found in modules.items() if [each for each, _ in found] == [number]]
            if alone:
                notes.append(
                    f"{len(alone)} of {counted(len(modules), 'module')} {inflected(len(alone), 'is', 'are')} only "
                    f"in {adapter.where}, like {printable(alone[0])}; "
                    "the others' updates count as zero there"
                )
    return notes
