"""What becomes of a tensor whose shape, or kind of numbers, differs between the inputs: the policies of ``on_shape``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streammerge.errors import MismatchError, printable
from streammerge.methods.registry import COPY
from streammerge.planning.mismatch import Differing
from streammerge.sources.base import Source
from streammerge.tensors.spec import TensorSpec

_COUNTABLE = ("int", "bool")


@dataclass(slots=True, eq=False)
class Fitted:
    """A tensor's sources, made to fit. None stands for an input that lacks the tensor.

    ``keep``: the tensor is kept as the first has it. ``rest``: rows behind the merged ones. ``frame``: the first's whole
    tensor, whose leading block is merged. ``mixed``: some inputs have integers and others floats, or other integers.
    ``said``: a warning. ``extends``: the difference, where the first is an extension of the others and no policy was asked
    for.
    """

    sources: list[Source | None]
    keep: bool = False
    rest: Source | None = None
    frame: Source | None = None
    mixed: bool = False
    said: str = ""
    extends: Differing | None = None


def fit(name: str, sources: list[Source | None], paths: Sequence[object], policy: str) -> Fitted | Differing:
    """Makes sources of differing shapes fit by ``policy``. Returns the difference if the policy does not settle it.

    ``sources``: the first one is that of the checkpoint that gives the container. ``paths``: of their checkpoints.
    """
    present = [(source, str(path)) for source, path in zip(sources, paths, strict=True) if source is not None]
    first = present[0][0].spec
    other, path = next((each for each in present[1:] if differ(first, each[0].spec)), present[0])
    differing = Differing(name, first, other.spec, path)
    kinds = {source.spec.dtype.kind for source, _ in present}
    if (
        not kinds <= {"float", "complex"}
        and not kinds <= {"float", *_COUNTABLE}
        and len({s.spec.dtype for s, _ in present}) > 1
    ):
        return differing
    if "complex" in kinds and len(kinds) > 1:
        return differing
    mixed = not kinds.isdisjoint(_COUNTABLE) and len({source.spec.dtype for source, _ in present}) > 1
    shapes = [source.spec.shape for source, _ in present]
    if all(shape == first.shape for shape in shapes):
        return Fitted(sources, mixed=mixed)
    if policy == "base":
        return Fitted(sources, keep=True, said=f"{printable(name)} is kept as the first has it")
    if first.dtype.kind == "packed" or any(len(shape) != len(first.shape) or not shape for shape in shapes):
        return differing
    if policy == "rows" and all(shape[1:] == first.shape[1:] for shape in shapes):
        return _rows(name, sources, mixed)
    if policy == "leading":
        return _leading(name, sources, mixed) or differing
    if policy == "error" and _extends(first.shape, shapes):
        made = _leading(name, sources, mixed)
        return replace(made, extends=differing) if made else differing
    return differing


def _extends(first: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether the first is a convolution with more input channels than that of all others, as in an inpainting model."""
    others = {shape for shape in shapes if shape != first}
    (other,) = others if len(others) == 1 else (first,)
    return len(first) == 4 and first[1] > other[1] and (first[0], *first[2:]) == (other[0], *other[2:])


def differ(one: TensorSpec, two: TensorSpec) -> bool:
    """Whether two tensors cannot be merged number by number: in shape, or in the kind of their numbers."""
    other_kind = one.dtype.kind != two.dtype.kind or (one.dtype.kind != "float" and one.dtype != two.dtype)
    return one.shape != two.shape or other_kind


def _rows(name: str, sources: list[Source | None], mixed: bool) -> Fitted:
    from streammerge.sources.rows import rows_of

    counts = [source.spec.shape[0] for source in sources if source is not None]
    least, most = min(counts), max(counts)
    largest = next(source for source in sources if source is not None and source.spec.shape[0] == most)
    said = (
        f"{least} rows of {printable(name)} are merged, the other {most - least} are those of {printable(largest.origin)}"
    )
    cut = [source and rows_of(source, 0, least) for source in sources]
    return Fitted(cut, rest=rows_of(largest, least, most), mixed=mixed, said=said)


def _leading(name: str, sources: list[Source | None], mixed: bool) -> Fitted | None:
    """Cuts sources to the block that all have, which begins at element 0 of every axis."""
    shapes = [source.spec.shape for source in sources if source is not None]
    block = tuple(map(min, zip(*shapes, strict=True)))
    if 0 in block:
        return None
    cut = [source and _block(source, (0,) * len(block), block) for source in sources]
    said = (
        f"the leading block {list(block)} of {printable(name)} is merged, and the rest of {list(shapes[0])} is the first's"
    )
    return Fitted(cut, frame=sources[0], mixed=mixed, said=said)


def _block(source: Source, start: tuple[int, ...], shape: tuple[int, ...]) -> Source:
    from streammerge.sources.box import box

    found = box(source, source.spec.name, start, shape, tuple(range(len(shape))))
    if found is None:
        raise MismatchError(
            f"{printable(source.spec.name)} of {printable(source.origin)} cannot be cut to a block; "
            'convert the checkpoint to safetensors first, or use `on_shape="base"`'
        )
    return found


def framed(block: Source, frame: Source) -> Source:
    """Returns a tensor of the frame's shape, whose leading block is replaced. It has the dtype of the block."""
    from streammerge.sources.joined import joined
    from streammerge.sources.merged import Merged as MergedSource

    made = block
    sizes, whole, dtype = list(block.spec.shape), frame.spec.shape, block.spec.dtype
    for axis in reversed(range(len(whole))):
        if sizes[axis] == whole[axis]:
            continue
        start = tuple(sizes[axis] if each == axis else 0 for each in range(len(whole)))
        shape = (*sizes[:axis], whole[axis] - sizes[axis], *whole[axis + 1 :])
        rest = _block(frame, start, shape)
        if rest.spec.dtype is not dtype:
            rest = MergedSource(replace(rest.spec, dtype=dtype), COPY, (rest,))
        made = joined(block.spec.name, [made, rest], axis)
        sizes[axis] = whole[axis]
    return made
