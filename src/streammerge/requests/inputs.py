"""The inputs that a public function was given: paths, state dicts in memory, and weights behind them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsFloat

from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.errors import RecipeError, printable
from streammerge.options.values import number_or_percent, path
from streammerge.recipe.adapted import check_there, is_there, split
from streammerge.recipe.hub_names import hub_place
from streammerge.stores.base import Location
from streammerge.stores.locations import PathLike, has_scheme, parse, without_queries
from streammerge.stores.repositories import named_repository
from streammerge.units import plain_number

if TYPE_CHECKING:
    from streammerge.planning.stages import Opened

Checkpoint = PathLike | Mapping[str, Any]
"""A file or folder, or a state dict in memory: torch tensors or numpy arrays by name, or a mapping that holds one. An index
of :func:`streammerge.inspect` stands for its file or folder."""
Inputs = Checkpoint | Iterable[Checkpoint] | Mapping[Any, SupportsFloat]
Held = dict[str, Mapping[str, Any]]
"""The state dicts in memory, by their names in the recipe."""
_NO_STAGES: Mapping[str, Opened] = {}
_WEIGHTED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)%?)")
"""An input with its weight behind it, as in ``a.safetensors:0.6``."""
_CALLED = {"inputs": "an input", "path": "the input"}
"""What a sentence calls arguments that are no options of a command."""


def path_of(name: str, value: Any) -> str:
    """Returns the path given as argument ``name``. Raises RecipeError for anything but a path."""
    if isinstance(value, str) and not value:
        raise RecipeError(f"{_CALLED.get(name, f'`{name}`')} is an empty text, where a path is needed")
    try:
        read = path(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`{name}` takes a path, not {printable(value, 60)}") from error
    if name == "out" and value == "-":
        raise RecipeError(
            "an output is written in any order, so it cannot go to stdout (-); name a file, like merged.safetensors"
        )
    if name == "out" and is_special(parse(read)):
        raise RecipeError(
            f"{printable(read)} is a device, a pipe or a socket, and an output is written in any order; name a file, like "
            "merged.safetensors, or plan it, which writes nothing"
        )
    return without_queries(read)


def is_special(place: Location) -> bool:
    """Whether something on the disk is neither a file nor a folder, such as ``/dev/null``, or may be none at another time.

    Behind ``/dev/stdout`` is a file where a shell redirects it.
    """
    if str(place.local_path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        return True
    return place.local_path is not None and place.exists() and not place.is_file() and not place.is_folder()


def named(name: str, given: Any, held: Held) -> str:
    """Returns the name in a recipe of the checkpoint given as argument ``name``: its path, or its name in ``held``."""
    if isinstance(given, CheckpointIndex):
        if given.in_memory:
            raise RecipeError(f"`{name}` takes a state dict, not its index; give the state dict itself")
        return given.adapted_as or str(given.path)
    if not isinstance(given, Mapping):
        return path_of(name, given)
    from streammerge.checkpoints.in_memory import hold

    return hold(given, held)


def opened(
    path: str, state_dict: str | None, ema: str, held: Held, stages: Mapping[str, Opened] = _NO_STAGES
) -> CheckpointIndex:
    """Returns the index of a file, a folder, a state dict in ``held``, a stage, or one of these with adapters.

    Raises as :func:`open_checkpoint`."""
    if path in held:
        from streammerge.checkpoints.in_memory import index_state_dict

        return _as_numbers(index_state_dict(held[path], path, state_dict, ema))
    if path in stages:
        return stages[path].index(state_dict, ema)
    parts = split(path)
    if parts is None:
        check_there(path)
        return _as_numbers(open_checkpoint(path, state_dict, ema))
    from streammerge.adapters.applying import adapted, read_adapter  # here, because most merges have no adapters

    base = opened(parts.base, state_dict, ema, held, stages)
    return adapted(base, [(read_adapter(each.path), each.scale) for each in parts.adapters], str(parts))


def _as_numbers(index: CheckpointIndex) -> CheckpointIndex:
    """Returns the index with quantised weights as numbers."""
    if not index.may_be_quantised:
        return index
    from streammerge.quantised.dequantised import dequantised  # here, because most models are not quantised

    return dequantised(index)


def names_and_weights(given: Any, held: Held) -> tuple[list[str], list[float] | None]:
    """Returns the names of the inputs, and their weights if a dict gives each path its weight. Raises RecipeError for
    anything but inputs."""
    names, weights = _names_and_weights(given, held)
    return [name if name in held else hub_place(name) for name in names], weights


def _names_and_weights(given: Any, held: Held) -> tuple[list[str], list[float] | None]:
    if isinstance(given, CheckpointIndex):
        given = [given]
    if isinstance(given, Mapping) and _gives_weights(given):
        return _each_with_weight([(path_of("inputs", path), _weight(path, weight)) for path, weight in given.items()])
    if isinstance(given, set | frozenset):
        raise RecipeError(
            "`inputs` are in an order, which a set has not, and the first gives the names of the output; pass a list"
        )
    if isinstance(given, str | bytes | os.PathLike | Location | Mapping) or not isinstance(plain_number(given), Iterable):
        given = [given]
    return _with_weights([named("inputs", each, held) for each in given])


def _with_weights(names: list[str]) -> tuple[list[str], list[float] | None]:
    """Returns the inputs without the weight that stands behind each, as in ``a.safetensors:0.6``, and these weights.

    A glob gives its weight to each match. Raises RecipeError if only some inputs have a weight.
    """
    found = [_WEIGHTED.fullmatch(name) for name in names]
    weighted = [each if each and _has_weight(each) else None for each in found]
    if not any(weighted):
        return names, None
    bare = next((name for name, each in zip(names, weighted, strict=True) if each is None), None)
    if bare is not None:
        raise RecipeError(f"{printable(bare)} has no weight behind it, and others have; write {printable(bare)}:0.5, say")
    return _each_with_weight([(each[1], number_or_percent(each[2])) for each in weighted if each])


def _has_weight(found: re.Match[str]) -> bool:
    """Whether a number behind a colon is a weight, and no part of the name."""
    if has_scheme(found[0]):
        return named_repository(found[1]) is not None
    return not parse(found[0]).lexists()


def _each_with_weight(given: list[tuple[str, float]]) -> tuple[list[str], list[float]]:
    """Returns the paths, each glob replaced by its matches, and the weight of each."""
    from streammerge.checkpoints.globs import expand

    paths = [(path, weight) for glob, weight in given for path in expand([glob])]
    return [path for path, _ in paths], [weight for _, weight in paths]


def _weight(path: Any, given: Any) -> float:
    from decimal import Decimal

    number = plain_number(given)
    if not isinstance(number, Real | Decimal):
        raise RecipeError(
            f"a dict of inputs gives each path its weight, like {{'a.pth': 0.9}}; {printable(path)} has no number"
        )
    return float(number)


def _gives_weights(given: Mapping[Any, Any]) -> bool:
    """Whether a dict gives paths their weights; otherwise it is a state dict. Numbers of numpy and torch are tensors too,
    and are weights where a key of theirs is a path."""
    values = given.values()
    if not any(map(_may_hold_tensors, values)):
        return True
    return all(isinstance(plain_number(each), Real) for each in values) and any(map(_is_path, given))


def _is_path(key: Any) -> bool:
    return isinstance(key, os.PathLike | Location) or (isinstance(key, str) and is_there(key))


def _may_hold_tensors(value: Any) -> bool:
    from streammerge.sources.memory import is_array, is_tensor

    if isinstance(value, Real):  # numpy's numbers are arrays too
        return False
    return is_array(value) or is_tensor(value) or isinstance(value, Mapping | list | tuple)
