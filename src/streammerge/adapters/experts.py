"""Adapters of experts: of fused experts, of single ones, and of the one on a base that has the other.

A fused tensor has the matrices of all experts of a layer, as [experts, out, in] or transposed; gate and up may be one, the
gate first. PEFT stores the factors of fused experts together: A is [experts * r, in], where the experts follow each other,
and B is [out, r * experts], where the experts alternate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from streammerge.adapters.dialects import IN_OUT_EXPERTS
from streammerge.adapters.modules import Module
from streammerge.adapters.updates import updated
from streammerge.checkpoints.config import tree_of
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, RecipeError, printable
from streammerge.sources.base import Source
from streammerge.sources.box import box
from streammerge.sources.constant import Constant
from streammerge.sources.elementwise import rounded, summed
from streammerge.sources.joined import joined
from streammerge.sources.permuted import permuted, shaped
from streammerge.sources.product import product
from streammerge.sources.rows import rows_of
from streammerge.tensors.conventions import EXPERT_ROLES, EXPERT_STACKS
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_STACKS = "|".join(EXPERT_STACKS)
_ROLES = "|".join(EXPERT_ROLES)
_TENSOR = re.compile(rf"^(?P<place>.+)\.(?:{_STACKS})\.(?:(?P<number>\d+)\.)?(?P<role>{_ROLES})(?:\.weight)?$")
_STACK = re.compile(rf"^(?P<place>.+)\.(?:{_STACKS})$")
_BOTH = "gate and up"


@dataclass(slots=True)
class Block:
    """The experts of one layer of a base. ``place``: the module that holds them. ``names``: (role, number, or -1 where all
    are one tensor) -> the tensor's name."""

    place: str
    names: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        return any(number < 0 for _, number in self.names)

    @property
    def count(self) -> int:
        """The number of experts that are tensors of their own."""
        return len({number for _, number in self.names})


def blocks(names: Iterable[str]) -> dict[tuple[str, ...], list[Block]]:
    """Returns the numbers in the name of a layer -> its experts; several where they are told apart by words only."""
    found: dict[str, Block] = {}
    for name in names:
        if match := _TENSOR.match(name):
            number = int(match["number"] or -1)
            found.setdefault(match["place"], Block(match["place"])).names[EXPERT_ROLES[match["role"]], number] = name
    made: dict[tuple[str, ...], list[Block]] = {}
    for place, block in found.items():
        made.setdefault(_numbers(place), []).append(block)
    return made


def _numbers(place: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", place))


def block_of(module: Module, known: dict[tuple[str, ...], list[Block]]) -> tuple[Block, str] | None:
    """Returns the experts of the base that a module belongs to, and the place of these experts in the adapter's names."""
    match = _STACK.match(module.name) if module.kind == "experts" else _TENSOR.match(module.name)
    if match is None:
        return None
    found = known.get(_numbers(match["place"]), [])
    ending = match["place"].rpartition(".")[2]
    chosen = [block for block in found if block.place.rpartition(".")[2] == ending] or found
    return (chosen[0], match["place"]) if len(chosen) == 1 else None


def cut(source: Source, start: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> Source:
    """Returns a block of a factor. Raises MismatchError for one that is no plain tensor of a file."""
    found = box(source, source.spec.name, start, shape, axes)
    if found is None:
        raise MismatchError(f"{printable(source.spec.name)} cannot be read in parts; save the adapter as safetensors first")
    return found


# ------------------------------------------------------------------------------------------------------ fused factors


def _stacked(module: Module, experts: int) -> tuple[Source, Source, int]:
    """Returns A as [experts, r, in], B as [out, r, experts], and r. Raises RecipeError for other shapes."""
    down, up = module.parts["A"], module.parts["B"]
    rank = module.rank
    if down.spec.shape[0] != rank * experts or up.spec.shape[1] != rank * experts:
        raise RecipeError(f"{experts} experts of rank {rank} have {rank * experts} rows of A, not {down.spec.shape[0]}")
    return shaped(down, experts, rank, -1), shaped(up, -1, rank, experts), rank


def fused_update(module: Module, weight: Source, strength: float, base: CheckpointIndex) -> Source:
    """Returns a parameter with its update, in float64: of fused experts, or of one matrix. Raises RecipeError."""
    shape = weight.spec.shape
    if len(shape) not in (2, 3):
        raise RecipeError(f"a parameter of {len(shape)} axes has no such update")
    experts = shape[0] if len(shape) == 3 else 1
    down, up, _ = _stacked(module, experts)
    outer, inner = up.spec.shape[0], down.spec.shape[2]
    ways = [way for way, wanted in ((False, (outer, inner)), (True, (inner, outer))) if shape[-2:] == wanted]
    if not ways:
        raise RecipeError(f"it updates matrices of {outer} and {inner}")
    across = _is_in_out(base) if len(ways) > 1 else ways[0]
    left, right = (permuted(down, 0, 2, 1), permuted(up, 2, 1, 0)) if across else (permuted(up, 2, 0, 1), down)
    made = product(weight.spec.name, left, right, module.scale, shape)
    return summed([weight, made], [1.0, strength])


def _is_in_out(base: CheckpointIndex) -> bool:
    return tree_of(base.path).get("model_type") in IN_OUT_EXPERTS


def separate_updates(module: Module, block: Block, now: dict[str, Source], strength: float) -> dict[str, Source]:
    """Returns the tensors of single experts with their share of the update of fused ones. Raises RecipeError."""
    role = EXPERT_ROLES.get(module.parameter, "")
    wanted = ["gate", "up"] if role == _BOTH and (_BOTH, 0) not in block.names else [role]
    experts = block.count
    if any((each, number) not in block.names for each in wanted for number in range(experts)):
        raise RecipeError(f"the base has no {printable(module.parameter)} of each expert")
    down, up, rank = _stacked(module, experts)
    made, start = {}, 0
    for each in wanted:
        for number in range(experts):
            name = block.names[each, number]
            weight = now[name]
            rows, columns = weight.spec.shape
            if columns != down.spec.shape[2] or start + rows > up.spec.shape[0]:
                raise RecipeError(f"it updates {up.spec.shape[0]} rows of {down.spec.shape[2]}")
            left = cut(up, (start, 0, number), (rows, rank), (0, 1))
            right = cut(down, (number, 0, 0), (rank, columns), (1, 2))
            made[name] = summed([weight, product(name, left, right, module.scale)], [1.0, strength])
        start += rows
    if start != up.spec.shape[0]:
        raise RecipeError(f"it updates {up.spec.shape[0]} rows, and the experts have {start}")
    return made


# --------------------------------------------------------------------------------------- single factors, fused tensors


@dataclass(slots=True)
class Singles:
    """The updates of single experts of a layer, collected for the fused tensors of the base."""

    block: Block
    modules: dict[tuple[str, int], Module] = field(default_factory=dict)

    def add(self, module: Module) -> None:
        match = _TENSOR.match(module.name)
        if match is None or match["number"] is None or module.parameter != "weight" or module.grown:
            raise RecipeError("it is no update of a single expert's weight")
        self.modules[EXPERT_ROLES[match["role"]], int(match["number"])] = module

    def updates(self, now: dict[str, Source], strength: float, base: CheckpointIndex) -> dict[str, Source]:
        """Returns the fused tensors with the updates of all experts. Raises RecipeError."""
        made = {}
        for (role, number), name in self.block.names.items():
            halves = ("gate", "up") if role == _BOTH else (role,)
            own = {key: module for key, module in self.modules.items() if key[0] in halves}
            if number >= 0 or not own:
                continue
            if all(_is_plain(module) for module in own.values()):
                made[name] = summed([now[name], _fused(own, now[name], halves, base)], [1.0, strength])
            else:
                made[name] = _one_by_one(own, now[name], halves, strength, base)
        used = {role for role, number in self.block.names if number < 0}
        used |= {"gate", "up"} if _BOTH in used else set()
        lost = next((module for (role, _), module in self.modules.items() if role not in used), None)
        if lost is not None:
            raise RecipeError(f"{printable(lost.name)} is no expert of the base")
        return made


def _is_plain(module: Module) -> bool:
    """Whether its update is a product of two factors that does not depend on the base."""
    return module.kind == "lora" and not (module.magnitude or module.start or "mid" in module.parts)


def _one_by_one(
    own: dict[tuple[str, int], Module], weight: Source, halves: tuple[str, ...], strength: float, base: CheckpointIndex
) -> Source:
    """Returns a fused tensor, in float64, whose experts are updated one by one: DoRA has norms of single matrices."""
    shape = weight.spec.shape
    if len(shape) != 3 or max(number for _, number in own) >= shape[0]:
        raise RecipeError(f"fused experts of shape {list(shape)} have no expert {max(number for _, number in own)}")
    sizes = [_sides(module) for module in own.values()]
    rows, columns = sizes[0]
    ways = [
        across
        for across, wanted in ((False, (rows * len(halves), columns)), (True, (columns, rows * len(halves))))
        if shape[1:] == wanted
    ]
    if not ways or len(set(sizes)) > 1:
        raise RecipeError(f"it updates matrices of {rows} and {columns}")
    across = _is_in_out(base) if len(ways) > 1 else ways[0]
    dtype = base.entries[weight.spec.name].spec.dtype
    flat, made = shaped(weight, shape[0] * shape[1], shape[2]), list[Source]()
    for number in range(shape[0]):
        whole = rows_of(flat, number * shape[1], (number + 1) * shape[1])
        if not any((half, number) in own for half in halves):
            made.append(rounded(whole, DType.F64))
            continue
        expert = permuted(whole) if across else whole
        parts = list[Source]()
        for place, half in enumerate(halves):
            matrix, module = rows_of(expert, place * rows, (place + 1) * rows), own.get((half, number))
            part = matrix if module is None else updated(module, matrix, strength, dtype)
            parts.append(rounded(part, DType.F64))
        done = joined("w", parts)
        made.append(permuted(done) if across else done)
    return shaped(joined(weight.spec.name, made), *shape)


def _sides(module: Module) -> tuple[int, int]:
    """Returns the rows and columns of the matrix that a module updates. Raises RecipeError if it does not tell them."""
    if "A" not in module.parts or "B" not in module.parts:
        raise RecipeError(f"updates of the kind {module.kind} of single experts cannot be added to fused ones")
    return module.parts["B"].spec.shape[0], module.parts["A"].spec.shape[1]


def _fused(own: dict[tuple[str, int], Module], weight: Source, halves: tuple[str, ...], base: CheckpointIndex) -> Source:
    """Returns the update of a fused tensor, in float64."""
    shape, first = weight.spec.shape, next(iter(own.values()))
    if len(shape) != 3 or shape[1] % len(halves):
        raise RecipeError(f"fused experts of shape {list(shape)} have no single ones")
    experts = shape[0]
    rows, columns = first.parts["B"].spec.shape[0], first.parts["A"].spec.shape[1]
    ways = [
        across
        for across, wanted in ((False, (rows * len(halves), columns)), (True, (columns, rows * len(halves))))
        if shape[1:] == wanted
    ]
    if not ways or max(number for _, number in own) >= experts:
        raise RecipeError(f"it updates matrices of {rows} and {columns} of up to {1 + max(n for _, n in own)} experts")
    across = _is_in_out(base) if len(ways) > 1 else ways[0]
    rank = max(module.rank for module in own.values())
    scales = {module.scale for module in own.values()}
    dtypes = {part.spec.dtype for module in own.values() for part in module.parts.values()}
    alike = len(scales) == len(dtypes) == 1  # then the factors are read as they are stored
    dtype, scale = (next(iter(dtypes)), next(iter(scales))) if alike else (DType.F64, 1.0)
    left, right = list[Source](), list[Source]()
    for number in range(experts):
        pairs = [_padded(own.get((half, number)), rows, columns, rank, dtype, alike) for half in halves]
        if across:
            left.append(joined("w", [permuted(down) for _, down in pairs], 1))
            right.append(_diagonal([permuted(up) for up, _ in pairs]))
        else:
            left += [up for up, _ in pairs]
            right += [down for _, down in pairs]
    stacks = experts if across else experts * len(halves)
    one, two = (shaped(joined(weight.spec.name, each), stacks, each[0].spec.shape[0], -1) for each in (left, right))
    return product(weight.spec.name, one, two, scale, shape)


def _padded(module: Module | None, rows: int, columns: int, rank: int, dtype: DType, plain: bool) -> tuple[Source, Source]:
    """Returns the factors of one expert, of the common rank; zeros for an expert without.

    ``plain``: as they are stored. Otherwise the first one is multiplied by the scale.
    """
    if module is None:
        return _zeros(dtype, rows, rank), _zeros(dtype, rank, columns)
    up, down = module.parts["B"], module.parts["A"]
    if up.spec.shape != (rows, module.rank) or down.spec.shape != (module.rank, columns):
        raise RecipeError(f"{printable(module.name)} has factors of other shapes than the other experts")
    one, two = (up, down) if plain else (summed([up], [module.scale]), summed([down]))
    more = rank - module.rank
    if more:
        one, two = joined("w", [one, _zeros(dtype, rows, more)], 1), joined("w", [two, _zeros(dtype, more, columns)])
    return one, two


def _diagonal(parts: list[Source]) -> Source:
    """Returns matrices as the blocks of a block-diagonal one."""
    rows = []
    for place, part in enumerate(parts):
        high = part.spec.shape[0]
        row = [part if at == place else _zeros(part.spec.dtype, high, each.spec.shape[1]) for at, each in enumerate(parts)]
        rows.append(joined("w", row, 1))
    return joined("w", rows)


def _zeros(dtype: DType, *shape: int) -> Source:
    return Constant(TensorSpec("zeros", dtype, shape))
