"""The tensors of a checkpoint as schemes look at them: by the end of their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from streammerge.checkpoints.index import QuantisedWeight
from streammerge.errors import MismatchError, printable
from streammerge.sources.base import Source
from streammerge.tensors.spec import TensorSpec

_SUFFIX = re.compile(
    r"_scale_inv$|_scale_2$|_scale$|_zero_point$|_g_idx$|_shape$|_global_scale$|_packed$|_blocks$|_scales$|"
    r"\.qscale_weight$|\.scale_weight$|\.comfy_quant$|\.scale$"
)
USUAL_BLOCK = 128


@dataclass(slots=True)
class StoredTensors:
    """The tensors of a checkpoint, and what its configuration says about quantisation.

    ``by_end``: the end of a helper's name -> the parts before it, such as ``"_scale_inv"`` -> ``"layers.0.q.weight"``.
    """

    entries: Mapping[str, Source]
    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    by_end: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def without(self, names: AbstractSet[str]) -> StoredTensors:
        """Returns the same without some tensors, which a scheme has taken."""
        left = {name: spec for name, spec in self.specs.items() if name not in names}
        by_end = {end: [stem for stem in stems if stem + end not in names] for end, stems in self.by_end.items()}
        return replace(self, specs=left, by_end=by_end)

    def get(self, name: str) -> Source | None:
        return self.entries[name] if name in self.specs else None

    def wrong(self, name: str, what: str) -> MismatchError:
        """Returns the error of a quantised weight that cannot be read."""
        return MismatchError(f"the quantised weight {printable(name)} {what}")


def stored_tensors(
    entries: Mapping[str, Source], specs: Mapping[str, TensorSpec], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> StoredTensors:
    """Returns the tensors of a checkpoint, with the helpers among them."""
    by_end: dict[str, list[str]] = {}
    for name in specs:
        found = _SUFFIX.search(name)
        if found:
            by_end.setdefault(found[0], []).append(name[: found.start()])
    return StoredTensors(entries, specs, config, metadata, by_end)


class Found(NamedTuple):
    """A weight that a scheme has found, under its name as a plain weight."""

    name: str
    weight: QuantisedWeight


Scheme = Callable[[StoredTensors], Iterator[Found]]


def block_of(size: int, count: int, stated: int | None) -> int | None:
    """Returns how many rows or columns share a scale, if ``count`` scales cover ``size`` of them. None if it is not clear.

    ``stated``: what a configuration says. If that does not fit, nothing but the usual block is tried.
    """
    stated = stated if stated and stated > 0 else None
    for block in (stated, USUAL_BLOCK):
        if block and -(-size // block) == count:
            return block
    return size // count if count and size % count == 0 and stated is None else None


def pair_of(value: Any) -> tuple[int | None, int | None]:
    """Returns the two sizes of a block that a configuration states; None for what is no size."""
    if isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value):
        return value[0], value[1]
    return None, None
