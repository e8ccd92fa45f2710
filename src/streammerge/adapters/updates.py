"""What the factors of a module make of a tensor, as a source. Nothing is rounded before the last step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from streammerge.adapters.modules import Module
from streammerge.checkpoints.heads import is_embedding
from streammerge.errors import MismatchError, RecipeError, printable
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.contracted import contracted
from streammerge.sources.elementwise import multiplied, rounded, summed
from streammerge.sources.joined import joined
from streammerge.sources.kronecker import kronecker
from streammerge.sources.permuted import permuted, shaped
from streammerge.sources.product import product
from streammerge.sources.rescaled import rescaled
from streammerge.sources.residual import residual
from streammerge.sources.rows import gathered
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

Shape = tuple[int, ...]
_EPSILONS = {DType.F64: 2.0**-52, DType.F32: 2.0**-23, DType.F16: 2.0**-10, DType.BF16: 2.0**-7}


def updated(module: Module, weight: Source, strength: float, dtype: DType) -> Source:
    """Returns a tensor with the update of a module, in float64, or as it is stored where it is replaced.

    ``strength``: what the user multiplies the update by. ``dtype``: the dtype that the base has. Raises MismatchError if
    the factors do not fit the tensor.
    """
    try:
        if module.grown:
            weight = _filled_up(weight, module.grown)
        return _CHANGES[module.kind](module, weight, strength, dtype)
    except RecipeError as error:
        raise _misfit(module, weight, str(error)) from error


def delta(module: Module, shape: Shape) -> Source:
    """Returns what a module adds to a tensor of this shape, in float64, its scale included.

    For the kinds "lora", "embedding", "loha", "lokr" and "full", without norms of its own (DoRA). Raises RecipeError.
    """
    return _DELTAS[module.kind](module, shape)


def _misfit(module: Module, weight: Source, said: str) -> MismatchError:
    shapes = ", ".join(f"{part} {list(each.spec.shape)}" for part, each in module.parts.items())
    return MismatchError(
        f"{printable(module.keys[0])} does not fit {printable(weight.spec.name)} of shape {list(weight.spec.shape)}: "
        f"{said} (it has {shapes}); the adapter is of another base"
    )


# ----------------------------------------------------------------------------------------------------------- additions


def _added(module: Module, weight: Source, strength: float, dtype: DType) -> Source:
    if module.start and module.kind == "lora" and len(weight.spec.shape) == 2:  # PEFT does so in linear layers only
        weight = _without_start(module, weight)
    change = delta(module, weight.spec.shape)
    if not module.magnitude:
        return summed([weight, change], [1.0, strength])
    whole = summed([weight, change])
    made = _normed(module, whole, dtype)
    return made if strength == 1.0 else summed([weight, made], [1.0 - strength, strength])


def _filled_up(weight: Source, shape: Shape) -> Source:
    """Returns a tensor with zeros behind its numbers along each axis that is to be longer. Raises RecipeError."""
    spec = weight.spec
    if len(spec.shape) != len(shape) or any(size < old for size, old in zip(shape, spec.shape, strict=True)):
        raise RecipeError(f"its reshape_weight {list(shape)} is no larger shape")
    for axis, size in enumerate(shape):
        now = weight.spec.shape
        if size > now[axis]:
            more = TensorSpec(spec.name, spec.dtype, (*now[:axis], size - now[axis], *now[axis + 1 :]))
            weight = joined(spec.name, [weight, Constant(more)], axis)
    return weight


def _glora(module: Module, weight: Source, strength: float, dtype: DType) -> Source:
    """Adds ``W a1 a2 + b1 b2``, or ``W a2 a1 + b2 b1`` in files of older releases of LyCORIS. The shapes tell which."""
    shape, name = weight.spec.shape, weight.spec.name
    if len(shape) < 2:
        raise RecipeError(f"a tensor of {len(shape)} axes has no such update")
    rows, inner, rest = shape[0], shape[1], math.prod(shape[1:])
    parts = {part: shaped(each, each.spec.shape[0], -1) for part, each in module.parts.items() if each.spec.shape}
    shapes = [parts[part].spec.shape if part in parts else () for part in ("a1", "a2", "b1", "b2")]
    rank = module.rank
    new = shapes == [(inner, rank), (rank, inner), (rows, rank), (rank, rest)]
    old = shapes == [(rank, inner), (inner, rank), (rank, rest), (rows, rank)] and inner == rest
    if new and old:
        raise RecipeError("its factors are all square, so it is not known whether an older release of LyCORIS made them")
    if not (new or old):
        raise RecipeError(f"it has the rank {rank}")
    a1, a2, b1, b2 = (parts[part] for part in (("a1", "a2", "b1", "b2") if new else ("a2", "a1", "b2", "b1")))
    if inner == rest:
        scaled = product(name, product(name, shaped(weight, rows, inner), a1), a2, module.scale, shape)
    else:  # each kernel of a convolution is a matrix [in, positions]
        once = product(name, _repeated(permuted(a1), rows), shaped(weight, rows, inner, -1))
        scaled = product(name, _repeated(permuted(a2), rows), once, module.scale, shape)
    return summed([weight, scaled, product(name, b1, b2, module.scale, shape)], [1.0, strength, strength])


def _repeated(matrix: Source, count: int) -> Source:
    return gathered(shaped(matrix, 1, *matrix.spec.shape), [0] * count)


def _without_start(module: Module, weight: Source) -> Source:
    """Takes out of the base what the adapter began with, as PEFT does when it loads such an adapter."""
    across = module.start == "pissa" and transposed(module, weight.spec.shape)
    return residual(weight, module.rank, module.start, module.scale, across)


def transposed(module: Module, shape: Shape) -> bool:
    """Whether the tensor of a module is stored as [in, out]: by its shape, or by the configuration where it is square."""
    rows, columns = module.parts["B"].spec.shape[0], math.prod(module.parts["A"].spec.shape[1:])
    as_is = bool(shape) and shape[0] == rows and math.prod(shape[1:]) == columns
    across = shape == (columns, rows)
    return across and (module.transposed or not as_is)


def lora_factors(module: Module) -> tuple[Source, Source]:
    """Returns the factors [out, r] and [r, in...] of an update of the kind "lora", the second as a matrix. A core between
    them (``mid``) is multiplied into the second."""
    down, up, mid = module.parts["A"], module.parts["B"], module.parts.get("mid")
    rank = down.spec.shape[0]
    left, right = shaped(up, up.spec.shape[0], -1), shaped(down, rank, -1)
    if mid is not None:
        core = contracted(up.spec.name, "abx,bi->aix", shaped(mid, *mid.spec.shape[:2], -1), right)
        right = shaped(core, mid.spec.shape[0], -1)
    return left, right


def _lora(module: Module, shape: Shape) -> Source:
    name = module.parts["B"].spec.name
    left, right = lora_factors(module)
    if "mid" not in module.parts and transposed(module, shape):
        return product(name, permuted(right), permuted(left), module.scale, shape)
    if not shape or left.spec.shape[0] != shape[0]:
        raise RecipeError(f"it updates {left.spec.shape[0]} rows of {right.spec.shape[1]}")
    return product(name, left, right, module.scale, shape)


def update_shape(module: Module) -> Shape:
    """Returns the shape of the update of a module whose factors tell it: of the kinds "lora", "embedding", "loha", "lokr"
    and "full". Linear weights are [out, in] here. The kernel of a convolution is flat where factors hold it so."""
    parts = {name: part.spec.shape for name, part in module.parts.items()}
    if module.kind == "embedding":
        return parts["embedding A"][1], parts["embedding B"][0]
    if module.kind == "lora":
        kernel = parts["mid"][2:] if "mid" in parts else parts["A"][2:]
        return parts["B"][0], parts["A"][1], *kernel
    if module.kind == "loha":
        return _decomposed_shape(parts, "hada_w1", "hada_t1")
    if module.kind == "lokr":
        rows, columns = parts["lokr_w1"] if "lokr_w1" in parts else _decomposed_shape(parts, "lokr_w1", "")
        inner = parts["lokr_w2"] if "lokr_w2" in parts else _decomposed_shape(parts, "lokr_w2", "lokr_t2")
        return rows * inner[0], columns * inner[1], *inner[2:]
    return parts["diff"]


def _decomposed_shape(parts: Mapping[str, Shape], pair: str, core: str) -> Shape:
    """Returns the shape of the product of two factors, or of a core [r, r, kernel] with factors [r, out] and [r, in]."""
    one, two = parts[f"{pair}_a"], parts[f"{pair}_b"]
    if core in parts:
        return one[1], two[1], *parts[core][2:]
    return one[0], *two[1:]


def _embedding(module: Module, shape: Shape) -> Source:
    down, up = module.parts["embedding A"], module.parts["embedding B"]
    if shape != (down.spec.shape[1], up.spec.shape[0]):
        raise RecipeError(f"it updates embeddings of shape {[down.spec.shape[1], up.spec.shape[0]]}")
    return product(up.spec.name, permuted(down), permuted(up), module.scale, shape)


def _loha(module: Module, shape: Shape) -> Source:
    factors = list[Source]()
    for number in (1, 2):
        one, two = module.parts[f"hada_w{number}_a"], module.parts[f"hada_w{number}_b"]
        core = module.parts.get(f"hada_t{number}")
        scale = module.scale if number == 1 else 1.0
        if core is None:
            factors.append(product(one.spec.name, one, shaped(two, two.spec.shape[0], -1), scale, shape))
        else:
            factors.append(_tucker(core, one, two, scale, shape))
    return multiplied(factors)


def _tucker(core: Source, one: Source, two: Source, scale: float, shape: Shape) -> Source:
    """Returns the tensor of a core [i, j, ...] and factors [i, out] and [j, in]."""
    rank = core.spec.shape[0]
    flat = shaped(core, *core.spec.shape[:2], -1)
    right = contracted(core.spec.name, "ijx,jr->irx", flat, two)
    return product(core.spec.name, permuted(one), shaped(right, rank, -1), scale, shape)


def _lokr(module: Module, shape: Shape) -> Source:
    parts = module.parts
    name = next(iter(parts.values())).spec.name
    one = parts.get("lokr_w1") or product(name, parts["lokr_w1_a"], parts["lokr_w1_b"])
    two = parts.get("lokr_w2")
    if len(one.spec.shape) != 2 or not one.spec.numel or len(shape) < 2:
        raise RecipeError(f"its first factor has the shape {list(one.spec.shape)}")
    rows, columns = one.spec.shape
    inner = (shape[0] // rows, shape[1] // columns, *shape[2:])
    if two is None and "lokr_t2" in parts:
        two = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"], 1.0, inner)
    elif two is None:
        left, right = parts["lokr_w2_a"], parts["lokr_w2_b"]
        two = product(name, left, shaped(right, right.spec.shape[0], -1), 1.0, inner)
    return kronecker(name, one, shaped(two, *inner), module.scale, shape)


def _full(module: Module, shape: Shape) -> Source:
    return shaped(module.parts["diff"], *shape)


def _normed(module: Module, whole: Source, dtype: DType) -> Source:
    """Gives rows or columns of the updated tensor the norms that the adapter states (DoRA)."""
    shape, wanted = whole.spec.shape, module.parts[module.magnitude]
    if module.magnitude == "magnitude":
        axis = 1 if module.kind == "embedding" or (module.kind == "lora" and transposed(module, shape)) else 0
        return rescaled(whole, shaped(wanted, -1), axis, normed=True)
    sizes = [axis for axis, size in enumerate(wanted.spec.shape) if size > 1]
    axis = 0 if not wanted.spec.shape or wanted.spec.shape[0] == shape[0] else 1
    if len(sizes) > 1:
        raise RecipeError(f"its dora_scale has the shape {list(wanted.spec.shape)}")
    return rescaled(whole, shaped(wanted, -1), axis, normed=True, epsilon=_EPSILONS.get(dtype, 2.0**-23))


# -------------------------------------------------------------------------------------------- multiples, replacements


def _ia3(module: Module, weight: Source, strength: float, dtype: DType) -> Source:
    shape = weight.spec.shape
    if "ia3 change" in module.parts:  # of LyCORIS: what is added to 1
        factors, axis = module.parts["ia3 change"], int(module.transposed)
        if shape[axis : axis + 1] != (factors.spec.numel,):
            raise RecipeError(f"its numbers have the shape {list(factors.spec.shape)}")
        return summed([weight, rescaled(weight, shaped(factors, -1), axis)], [1.0, strength])
    factors = module.parts["ia3"]
    count, long = factors.spec.numel, [axis for axis, size in enumerate(factors.spec.shape) if size > 1]
    if module.parameter == "bias":
        axis = 0
    elif len(factors.spec.shape) == 2 and len(long) == 1 and long[0] != module.transposed:
        raise RecipeError(f"its numbers have the shape {list(factors.spec.shape)}")
    elif module.transposed:
        axis = 1 if len(shape) > 1 and shape[1] == count else 0
    elif len(factors.spec.shape) == 2 and long and shape[0] != shape[1]:
        axis = 0 if shape[0] == count else 1
    else:
        axis = 0
    made = rescaled(weight, shaped(factors, -1), axis)
    return made if strength == 1.0 else summed([weight, made], [1.0 - strength, strength])


def _bias(module: Module, weight: Source, strength: float, dtype: DType) -> Source:
    (change,) = module.parts.values()
    return summed([weight, shaped(change, *weight.spec.shape)], [1.0, module.scale * strength])


def _saved(module: Module, weight: Source, strength: float, dtype: DType) -> Source:
    value, spec = module.parts["value"].named(weight.spec.name), weight.spec
    resized = (
        is_embedding(spec.name) and len(spec.shape) == 2 == len(value.spec.shape) and spec.shape[1] == value.spec.shape[1]
    )
    if value.spec.shape != spec.shape and not resized:
        raise RecipeError(f"it would replace a tensor of shape {list(spec.shape)} by one of shape {list(value.spec.shape)}")
    if value.spec.dtype.kind != dtype.kind:
        raise RecipeError(f"it would replace {dtype.torch_name} by {value.spec.dtype.torch_name}")
    if strength == 1.0:
        return value
    return summed([weight, value], [1.0 - strength, strength])


def _tokens(module: Module, weight: Source, strength: float, dtype: DType) -> Source:
    rows, shape = module.parts["tokens"], weight.spec.shape
    if len(shape) != 2 or rows.spec.shape != (len(module.rows), shape[1]):
        raise RecipeError(f"it has {list(rows.spec.shape)} for {len(module.rows)} rows")
    wrong = next((row for row in module.rows if not 0 <= row < shape[0]), None)
    if wrong is not None:
        raise RecipeError(f"there is no row {wrong}")
    if rows.spec.dtype is not weight.spec.dtype:
        weight, rows = rounded(weight, DType.F64), rounded(rows, DType.F64)
    order = list(range(shape[0]))
    for place, row in enumerate(module.rows):
        order[row] = shape[0] + place
    made = gathered(joined(weight.spec.name, [weight, rows]), order)
    return made if strength == 1.0 else summed([weight, made], [1.0 - strength, strength])


_DELTAS: dict[str, Callable[[Module, Shape], Source]] = {
    "lora": _lora,
    "embedding": _embedding,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
}
_CHANGES: dict[str, Callable[[Module, Source, float, DType], Source]] = {
    **dict.fromkeys(_DELTAS, _added),
    "glora": _glora,
    "ia3": _ia3,
    "bias": _bias,
    "saved": _saved,
    "tokens": _tokens,
}
