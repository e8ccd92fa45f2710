"""Sparsifiers, which keep a share of the elements of a delta. They change one chunk of one model's delta in place.

By magnitude (TIES), by magnitude without outliers (Breadcrumbs), at random (DARE), at random by rank (DELLA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge.compiled.differences import add_magnitudes
from streammerge.compiled.library import address, library
from streammerge.errors import RecipeError
from streammerge.kernels.chunk import Chunk
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.masks import Masks, masks_bytes
from streammerge.kernels.places import single_places
from streammerge.kernels.random import limits
from streammerge.kernels.ranking import Cut
from streammerge.kernels.row_ranking import by_rank
from streammerge.methods.contracts import Values
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch
    from streammerge.kernels.random import Bits

_MULTIPLIED_ELEMS = 1 << 17
"""Numbers that are multiplied by a mask at once: as many as stay in a CPU's own cache."""
Sparsify = Callable[[Chunk, int, "torch.Tensor"], "torch.Tensor"]
"""(chunk, model, its delta) -> the delta with dropped elements set to zero. NaN stays NaN."""


class Mask(NamedTuple):
    """What a delta is multiplied by: the factor where its bit is set, else 0. Without bits all is kept."""

    bits: Any
    factor: float = 1.0


MaskOf = Callable[[Chunk, int], "Mask | None"]
"""The ``mask`` that a sparsifier may have: (chunk, model) -> its mask, if it is known without the delta."""


def check_density(values: Values) -> None:
    """Raises RecipeError unless every density is at least 0 and gamma and epsilon fit it. Above 1 all is kept, as at 1."""
    for density in values["density"]:
        if not 0 <= density < math.inf:
            raise RecipeError(f"density is the share of elements that is kept, from 0 (none) to 1 (all), not {density:g}")
    for gamma in values.get("gamma", ()):
        if not 0 <= gamma < 1:
            raise RecipeError(f"gamma is the share of elements dropped as outliers, from 0 to below 1, not {gamma:g}")
    for density, epsilon in zip(values["density"], values.get("epsilon", ()), strict=False):
        if 0 < density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
            raise RecipeError(
                f"density {density:g} with epsilon {epsilon:g}: density - epsilon and density + epsilon must lie between 0 "
                "and 1; choose a smaller epsilon"
            )


class Everything:
    """Keeps all elements."""

    def __call__(self, _chunk: Chunk, _model: int, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def mask(self, _chunk: Chunk, _model: int) -> Mask | None:
        return Mask(None)


everything = Everything()


def magnitude(group: TensorGroup, density: Sequence[float]) -> Sparsify:
    """Keeps the int(density * n) largest by magnitude, at least one unless the density is 0. Among equal ones, keeps those
    with the lowest index."""
    cuts = group.kth_largest(_magnitudes(group), [[_largest(group.elems, d)] for d in density])
    return lambda chunk, model, delta: cuts[model][0].keep(delta, chunk.start)


def magnitude_outliers(group: TensorGroup, density: Sequence[float], gamma: Sequence[float]) -> Sparsify:
    """Drops the int(gamma * n) largest by magnitude, keeps the next int(density * n), drops the rest.

    If fewer are left, fewer outliers are dropped. A density of 1 keeps all.
    """
    ranks = [_without_outliers(group.elems, d, g) for d, g in zip(density, gamma, strict=True)]
    cuts = group.kth_largest(_magnitudes(group), ranks)

    def apply(chunk: Chunk, model: int, delta: torch.Tensor) -> torch.Tensor:
        upto, outliers = cuts[model]
        return _between(delta, upto, outliers, chunk.start, chunk.empty("outliers"))

    return apply


def _largest(n: int, density: float) -> int:
    """Returns how many of n elements are kept."""
    return n if density >= 1 else max(int(density * n), 1) if density else 0


def _without_outliers(n: int, density: float, gamma: float) -> tuple[int, int]:
    """Returns how many of n elements are kept or dropped as outliers, and how many are outliers."""
    kept = int(density * n)
    outliers = min(int(gamma * n), n - kept)
    return (n, 0) if density >= 1 else (outliers + kept, outliers)


def _between(delta: torch.Tensor, upto: Cut, outliers: Cut, start: int, scratch: torch.Tensor) -> torch.Tensor:
    """Keeps the elements of a cut without those of another one, in place. The elements begin at ``start``."""
    dropped = outliers.keep(scratch.copy_(delta), start)
    return upto.keep(delta, start).sub_(dropped)  # x - x is 0, and x - 0 is x


def bernoulli(group: TensorGroup, density: Sequence[float]) -> Masked:
    """Keeps each element with probability ``density``."""
    return Masked(group, lambda chunk, model, delta: None if density[model] >= 1 else density[model], density)


class Masked:
    """Sets the elements to zero that a random mask drops. ``chances(chunk, model, delta)``: the chances of being kept, as
    :func:`~streammerge.kernels.random.chosen` takes them; None to keep all.

    A mask that a pass makes is kept for the kernel, a bit for each element. Of a tensor of up to a grain it lies in memory,
    and the budget counts it as ``kept_bits`` of the method. Of a longer tensor it lies in a file, as far as that has room.
    What is not kept is made again.

    ``constant``: the chance of each model, if none depends on the delta.
    """

    def __init__(
        self,
        group: TensorGroup,
        chances: Callable[[Chunk, int, torch.Tensor], float | torch.Tensor | None],
        constant: Sequence[float] | None = None,
    ) -> None:
        self._group, self._chances, self._constant = group, chances, constant
        self._held: dict[int, Bits] = {}
        self._masks: Masks | None = None
        self._tables = dict[int, tuple[float, Any]]()

    def __call__(
        self, chunk: Chunk, model: int, delta: torch.Tensor, factor: float = 1.0, keep: bool = False
    ) -> torch.Tensor:
        """Multiplies what is kept by a factor. ``keep``: whether the mask is needed again."""
        bits = None if keep else self._kept(chunk, model)
        if bits is None:
            chances = self._chances(chunk, model, delta)
            if chances is None:
                return delta.mul_(factor) if factor != 1 else delta
            bits = self._group.chosen(chunk, model, chances)
            if keep and not chunk.hides:
                self._keep(chunk, model, bits)
        _multiply(delta, bits, self._table(model, factor, delta.dtype), chunk.empty("mask"))
        return delta

    def mask(self, chunk: Chunk, model: int, keep: bool = False) -> Mask | None:
        """Returns the mask of a model. None if it is a function of the delta, and not kept. ``keep``: whether it is needed
        again."""
        bits = None if keep else self._kept(chunk, model)
        if bits is None:
            if self._constant is None:
                return None
            if self._constant[model] >= 1:
                return Mask(None)
            bits = self._group.chosen(chunk, model, self._constant[model])
            if keep and not chunk.hides:
                self._keep(chunk, model, bits)
        return Mask(bits)

    def make_room(self) -> None:
        """Makes room for the masks of a tensor of more than a grain, because a pass needs them before the kernel does."""
        group = self._group
        if group.masks is not None and group.elems > GRAIN:
            room = group.masks(masks_bytes(group.models, group.elems, group.grain))
            self._masks = None if room is None else Masks(room, group.elems, group.grain)

    def _kept(self, chunk: Chunk, model: int) -> Bits | None:
        """Returns the mask of a chunk, None if it is not there."""
        if chunk.hides:
            return None
        if chunk.elems == self._group.elems <= GRAIN:
            return self._held.get(model)
        return None if self._masks is None else self._masks.kept(model, chunk.start, chunk.stop)

    def _keep(self, chunk: Chunk, model: int, bits: Bits) -> None:
        if chunk.elems == self._group.elems <= GRAIN:
            self._held[model] = bits
        elif self._masks is not None:
            self._masks.keep(model, chunk.start, chunk.stop, bits)

    def _table(self, model: int, factor: float, dtype: torch.dtype) -> Any:
        """Returns what 8 elements are multiplied with, for each byte of a mask."""
        import torch

        known = self._tables.get(model)
        if known is None or known[0] != factor:
            known = self._tables[model] = factor, (torch.from_numpy(_of_bytes(dtype)) * factor).numpy()
        return known[1]


def _multiply(delta: torch.Tensor, bits: Bits, table: Any, room: torch.Tensor) -> None:
    """Multiplies numbers by what their bits stand for in the table. ``room`` has the size of the numbers."""
    import numpy as np
    import torch

    known_here = delta.dtype in (torch.float32, torch.float64) and delta.is_contiguous() and delta.device.type == "cpu"
    if known_here and (compiled := library()) is not None:
        multiply = compiled.streammerge_mask_f64 if delta.itemsize == 8 else compiled.streammerge_mask_f32
        multiply(delta.data_ptr(), address(bits), address(table), len(delta))
        return
    for start, stop in ranges(len(delta), _MULTIPLIED_ELEMS):
        elems = stop - start
        factors = room[:elems]  # always the same memory, which stays in the CPU's cache
        made, whole = factors.numpy(), elems // 8 * 8
        of_part = bits[start // 8 : -(-stop // 8)]
        np.take(table, of_part[: whole // 8], axis=0, out=made[:whole].reshape(-1, 8), mode="clip")
        if whole < elems:
            made[whole:] = table[of_part[-1], : elems - whole]
        delta[start:stop].mul_(factors)  # torch warns of no NaN


@lru_cache(maxsize=2)
def _of_bytes(dtype: torch.dtype) -> Any:
    """Returns 1 and 0 for the 8 bits of each byte."""
    import numpy as np

    every = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return every.astype(np.float64 if dtype.itemsize == 8 else np.float32)


def magprune(group: TensorGroup, density: Sequence[float], epsilon: Sequence[float]) -> Masked:
    r"""Keeps each element with a probability p that rises with the rank r of its magnitude among the n of its row.

    :math:`p = d - \epsilon + 2 \epsilon\, r / (n - 1)`, from density - epsilon to density + epsilon. A single element
    is kept.
    """

    import torch

    # Small tables serve the tensors that come next too. The table of a longer row is dropped with its tensor.
    table = _limits_by_rank if group.row <= GRAIN else cache(_limits_by_rank.__wrapped__)

    def chances(chunk: Chunk, model: int, delta: torch.Tensor) -> float | torch.Tensor | None:
        if not density[model]:
            return 0.0
        fibres = fibre_view(delta, group.shape)
        n = fibres.shape[1]
        if density[model] >= 1 or n <= 1:
            return None
        made = chunk.empty("chances", torch.int32)
        keys, order = (chunk.empty(slot, torch.int64) for slot in ("rank keys", "rank order"))
        limits_of = table(n, density[model], epsilon[model], group.compute)
        by_rank(fibres, limits_of, made.view(fibres.shape), keys, order)
        return made

    return Masked(group, chances)


@lru_cache(maxsize=8)
def _limits_by_rank(n: int, density: float, epsilon: float, compute: torch.dtype) -> torch.Tensor:
    """Returns the :func:`limits` of the chances of all ranks in a row of ``n`` elements, that of the largest first."""
    import torch

    return limits(torch.arange(n).to(compute).mul_(2 * epsilon / (n - 1)).add_(density - epsilon)).flip(0)


def fibre_view(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Views whole rows of a tensor as (rows, n, rest). Ranks run along n: the second dimension, or the only one."""
    if len(shape) < 2:
        return values.view(1, -1, 1)
    rest = math.prod(shape[2:])
    return values.view(len(values) // (shape[1] * rest) if len(values) else 0, shape[1], rest)


def fibre_row(shape: tuple[int, ...], values: Values) -> int:
    """Number of elements that :func:`magprune` needs together."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def rescaled(group: TensorGroup, sparsify: Sparsify) -> Sparsify:
    r"""Multiplies the sparsifier's result by :math:`\sum |\delta| / \sum |\delta'|` over the tensor.

    This restores the sum of magnitudes. There is no factor if either sum is below 1e-7.
    """

    masked = sparsify if isinstance(sparsify, Masked) else None
    if masked:
        masked.make_room()
    totals = list(map(float, group.reduce(_Magnitudes(group, sparsify, masked)))) if group.models else []
    factors = [_factor(a, b) for a, b in zip(totals[::2], totals[1::2], strict=True)]
    if masked:
        return _Restored(masked, factors)
    return lambda chunk, model, delta: sparsify(chunk, model, delta).mul_(factors[model])


@dataclass(frozen=True, slots=True)
class _Restored:
    """Multiplies what a mask keeps by a factor of each model."""

    masked: Masked
    factors: Sequence[float]

    def __call__(self, chunk: Chunk, model: int, delta: torch.Tensor) -> torch.Tensor:
        return self.masked(chunk, model, delta, self.factors[model])

    def mask(self, chunk: Chunk, model: int) -> Mask | None:
        found = self.masked.mask(chunk, model)
        return None if found is None else found._replace(factor=self.factors[model])


@dataclass(frozen=True, slots=True)
class _Magnitudes:
    """Looks at the magnitudes of each model's delta, and at those that are kept. What is kept depends on no sign."""

    group: TensorGroup
    sparsify: Sparsify
    masked: Masked | None

    def __call__(self, chunk: Chunk) -> Iterator[torch.Tensor]:
        for model in range(self.group.models):
            magnitudes = chunk.delta(model).abs_()
            yield magnitudes
            masked = self.masked
            yield masked(chunk, model, magnitudes, keep=True) if masked else self.sparsify(chunk, model, magnitudes)

    def add_compiled(self, totals: list[float], chunk: Chunk, grain: int) -> list[float] | None:
        import numpy as np
        import torch

        held = single_places(chunk)
        if held is None or self.masked is None or (grain % 8 and chunk.elems > grain):  # a byte has the bits of eight
            return None
        made, sums = list[float](), list(totals)
        base, models = held[0], held[1:]
        for number, model in enumerate(models):
            mask = self.masked.mask(chunk, number, keep=True)
            if mask is None:
                return None
            both = np.array(sums[2 * number : 2 * number + 2] or [0.0, 0.0])
            table = _of_bytes(torch.float32)
            add_magnitudes(both, bool(sums), *model, *base, mask.bits, table, grain, chunk.elems)
            made += both.tolist()
        return made


def table_of(factor: float) -> Any:
    """Returns what 8 numbers are multiplied by, for each byte of a mask: the factor, rounded to float32, or 0."""
    import torch

    return (torch.from_numpy(_of_bytes(torch.float32)) * factor).numpy()


def _magnitudes(group: TensorGroup) -> Callable[[Chunk], Iterator[torch.Tensor]]:
    return lambda chunk: (chunk.delta(model).abs_() for model in range(group.models))


# -------------------------------------------------------------------------------------------------------- in a batch

Keep = Callable[["Batch", int, "torch.Tensor", "torch.Tensor"], bool]
"""(batch, model, its deltas, room for their magnitudes) -> whether all is finite. Sets dropped elements to zero."""


def magnitude_in(density: Sequence[float]) -> Keep:
    """:func:`magnitude` of each tensor of a batch."""

    def keep(batch: Batch, model: int, delta: torch.Tensor, room: torch.Tensor) -> bool:
        ranks = [(_largest(batch.elems, density[model]), 0)] * len(batch.names)
        return batch.keep_largest(delta, ranks)

    return keep


def magnitude_outliers_in(density: Sequence[float], gamma: Sequence[float]) -> Keep:
    """:func:`magnitude_outliers` of each tensor of a batch."""

    def keep(batch: Batch, model: int, delta: torch.Tensor, room: torch.Tensor) -> bool:
        ranks = [_without_outliers(batch.elems, density[model], gamma[model])] * len(batch.names)
        return batch.keep_largest(delta, ranks)

    return keep


def bernoulli_in(density: Sequence[float]) -> Keep:
    """:func:`bernoulli` of each tensor of a batch."""

    def keep(batch: Batch, model: int, delta: torch.Tensor, room: torch.Tensor) -> bool:
        if density[model] < 1:
            delta.mul_(batch.chosen(model, density[model]))
        return True

    return keep


def magprune_in(density: Sequence[float], epsilon: Sequence[float]) -> Keep:
    """:func:`magprune` of each tensor of a batch."""

    def keep(batch: Batch, model: int, delta: torch.Tensor, room: torch.Tensor) -> bool:
        import torch

        if not density[model]:
            delta.mul_(batch.chosen(model, 0.0))
            return True
        fibres = fibre_view(delta, batch.shape) if len(batch.shape) > 1 else batch.rows(delta).unsqueeze(2)
        n = fibres.shape[1]
        if density[model] < 1 and n > 1:
            chunk = batch.chunk
            chances = chunk.empty("chances", torch.int32)
            keys, order = (chunk.empty(slot, torch.int64) for slot in ("rank keys", "rank order"))
            table = _limits_by_rank(n, density[model], epsilon[model], chunk.compute)
            by_rank(fibres, table, chances.view(fibres.shape), keys, order)
            delta.mul_(batch.chosen(model, chances))
        return True

    return keep


def rescaled_in(keep: Keep) -> Keep:
    """:func:`rescaled` for each tensor of a batch."""

    def kept(batch: Batch, model: int, delta: torch.Tensor, room: torch.Tensor) -> bool:
        before = batch.sums(_absolute(delta, room))
        if not all(map(math.isfinite, before)) or not keep(batch, model, delta, room):
            return False
        after = batch.sums(_absolute(delta, room))
        batch.rows(delta).mul_(batch.column([_factor(a, b) for a, b in zip(before, after, strict=True)]))
        return True

    return kept


def _absolute(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.abs(values, out=out)


def _factor(before: float, after: float) -> float:
    # Not >=: NaN must stay
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after
