"""Chooses among checkpoints: the last ones, a range, or the best by a number in them. Says why."""

from __future__ import annotations

import math
import re
from collections import Counter

from streammerge.checkpoints.duplicates import distinct, twice_told
from streammerge.checkpoints.globs import expand
from streammerge.checkpoints.index import is_shard_of_model, open_checkpoint
from streammerge.errors import RecipeError, StreammergeError, listed, printable
from streammerge.recipe.adapted import parts_of
from streammerge.stores.locations import parse
from streammerge.tensors.conventions import AVERAGED_NAME, LATEST_NAME
from streammerge.units import counted


def choose(
    paths: list[str],
    *,
    last: int | None = None,
    range: str | None = None,
    best: int | None = None,
    by: str | None = None,
    highest: bool | None = None,
    oldest_first: bool = False,
) -> tuple[list[str], list[str]]:
    """Returns the chosen checkpoints in their order, and sentences that say why these.

    ``paths``: paths and globs; if something is chosen, the folder of a run stands for its checkpoints. ``range``:
    ``FROM:TO``, both included, on the number of a checkpoint (:mod:`streammerge.checkpoints.numbers`); ``best``: how many
    are taken by the number at the key ``by``, lowest first unless ``highest``; ``last``: how many are taken from the end;
    ``oldest_first``: the chosen ones stand in the order of their numbers, whatever order they were given in. Links to a
    checkpoint and copies of it do not count again; checkpoints that were named one by one count as often as they were
    named. Raises RecipeError.
    """
    typed, notes = set(paths), list[str]()
    paths = expand(paths)
    _refuse_shards(paths)
    if last is not None and best is not None:
        raise RecipeError("`last` and `best` both choose; give one of them")
    if (best is None) != (by is None):
        raise RecipeError(
            '`best` needs `by`, and `by` needs `best`: a number in the files, like `by="model_loss.eval_loss"`'
        )
    if highest and best is None:
        raise RecipeError("`highest` turns the order of `best`, which is not given")
    chooses = any(choice is not None for choice in (last, range, best))
    if chooses or oldest_first:
        from streammerge.checkpoints.steps import with_steps  # here, because most inputs are named one by one

        paths = with_steps(paths)
    if chooses or not typed.issuperset(paths):
        paths = distinct(paths, notes)
    else:
        notes += twice_told(paths)
    if chooses:
        paths = _without_averages(paths, notes)
    if range is not None:
        paths = _within(paths, range, notes)
    if best is not None and by is not None:
        paths = _best(paths, best, by, bool(highest), notes)
    if last is not None or oldest_first:
        from streammerge.checkpoints.numbers import in_order

        ordered = in_order(paths)
        if last is not None:
            ordered = _from_the_first_to_the_last(paths, notes)
            _enough("last", last, ordered)
            paths = ordered[-last:]
            notes.append(f"chosen as the last {last}: {listed(paths, 20)}")
        elif paths != ordered:
            paths = ordered
            notes.append(f"put in the order of their numbers, the oldest first: {listed(paths, 20)}")
    return paths, notes


def advice_on_newest(paths: list[str]) -> str:
    """Returns how to leave out the newest checkpoint of a run, if that cannot be read and the one before it can; else "".

    A training that was stopped leaves a checkpoint that is not whole.
    """
    from streammerge.checkpoints.numbers import in_order, numbers_of, without_number
    from streammerge.checkpoints.steps import with_steps

    found = with_steps(expand(paths))
    bare = without_number(found)
    known = [path for path, number in numbers_of(found).items() if number is not None and path not in bare]
    *_, before, newest = ["", "", *in_order(known)]
    if not before or _is_readable(newest) or not _is_readable(before):
        return ""
    numbers = numbers_of(known)
    number, last = numbers[before] or 0, numbers[newest] or 0
    if number >= last:
        return ""
    return f'; {printable(newest)} is the newest and may not be whole: `range=":{number}"` leaves it out'


def _is_readable(path: str) -> bool:
    try:
        open_checkpoint(path)
    except StreammergeError:
        return False
    return True


def _refuse_shards(paths: list[str]) -> None:
    """Raises RecipeError if two of the inputs are shards of one checkpoint: parts of a model are not merged with each
    other."""
    seen: dict[tuple[object, ...], str] = {}
    for path in dict.fromkeys(paths):
        place = parse(parts_of(path)[0])
        if not is_shard_of_model(place.name):
            continue
        from streammerge.formats.file_names import parsed_name

        parsed = parsed_name(place.name)
        first = seen.setdefault((place.parent, parsed["stem"], parsed["variant"], parsed["count"], parsed["ending"]), path)
        if first != path:
            folder = printable(place.parent)
            raise RecipeError(
                f"{printable(first)} and {printable(path)} are shards of one checkpoint; give its folder, {folder}"
            )


def _enough(option: str, wanted: int, paths: list[str]) -> None:
    if wanted < 1:
        raise RecipeError(f"`{option}` takes a positive number")
    if len(paths) == 1 < wanted and parse(paths[0]).is_folder():
        raise RecipeError(
            f"`{option}={wanted}`, but {printable(paths[0])} is a folder without steps of a run; give a pattern of them, "
            "like 'run/checkpoint-*'"
        )
    if wanted > len(paths):
        raise RecipeError(
            f"`{option}={wanted}`, but there {'are' if len(paths) > 1 else 'is'} only {counted(len(paths), 'checkpoint')}"
        )


def _without_averages(paths: list[str], notes: list[str]) -> list[str]:
    """Returns the checkpoints without those that are averages by their names, if others are none."""
    averages = [path for path in paths if re.search(AVERAGED_NAME, parse(path).name)]
    if not averages or len(averages) == len(paths):
        return paths
    notes.append(
        f"passed over, as averages by their names beside other checkpoints: {listed(averages, 20)}; "
        "a pattern that only their names match takes them"
    )
    return [path for path in paths if path not in averages]


def _from_the_first_to_the_last(paths: list[str], notes: list[str]) -> list[str]:
    """Returns the checkpoints in their order. Passes over those whose names tell no place in it.

    Raises RecipeError if the numbers in the names tell no order.
    """
    from streammerge.checkpoints.numbers import in_order, without_number

    _refuse_without_order(paths)
    bare = without_number(paths)
    latest = [path for path in bare if re.search(LATEST_NAME, parse(path).name)]
    placeless = [path for path in bare if path not in latest]
    if placeless:
        notes.append(f"passed over, since no number in their names tells their place: {listed(placeless, 20)}")
    return in_order([path for path in paths if path not in bare]) + latest


def _refuse_without_order(paths: list[str]) -> None:
    """Raises RecipeError if some names have a step, and others an epoch."""
    from streammerge.checkpoints.numbers import have_no_order

    if unlike := have_no_order(paths):
        step, epoch = map(printable, unlike)
        raise RecipeError(f"{step} has a step, and {epoch} an epoch, so they have no order; give a pattern of one kind")


def _within(paths: list[str], within: str, notes: list[str]) -> list[str]:
    from streammerge.checkpoints.numbers import numbers_of

    start, colon, stop = within.partition(":")
    if not colon or not all(re.fullmatch("[0-9]{0,18}", part.strip()) for part in (start, stop)) or within.strip() == ":":
        raise RecipeError(f"`range` takes FROM:TO, like 1000:5000, not {printable(within)}")
    low, high = int(start.strip() or 0), int(stop.strip()) if stop.strip() else math.inf
    _refuse_without_order(paths)
    numbers = numbers_of(paths)
    nameless = [path for path, number_in in numbers.items() if number_in is None]
    if nameless:
        raise RecipeError(f"`range` needs a number in each name, and {printable(nameless[0])} has none")
    chosen = [path for path, number_in in numbers.items() if number_in is not None and low <= number_in <= high]
    if not chosen:
        known = listed([str(each) for each in sorted(numbers.values(), key=lambda each: each or 0)])
        raise RecipeError(
            f"`range` {printable(within)}: none of the {len(paths)} checkpoints has such a number; they have {known}"
        )
    notes.append(f"chosen by `range` {printable(within)}: {len(chosen)} of {len(paths)}, {listed(chosen, 20)}")
    return chosen


_LOSS = r"(?i)loss|err|ppl|perplexity|nll|bpb|bpc|[wcm]er\b|mse|mae|fid\b|dist|time|epoch|step"
"""Matches numbers that are better when they are lower, and numbers that do not measure quality."""


def _best(paths: list[str], best: int, by: str, highest: bool, notes: list[str]) -> list[str]:
    from streammerge.checkpoints.numbers import in_order

    _enough("best", best, paths)
    folders = Counter(parse(path).parent for path in paths)
    alone = len(paths) > 1 and max(folders.values()) == 1
    values = {path: _value(path, by, alone) for path in in_order(paths)}
    ranked = sorted(values, key=lambda path: -values[path] if highest else values[path])
    order = "highest" if highest else "lowest"
    if not highest and not re.search(_LOSS, by):
        notes.append(f"{printable(by)} may be better where it is higher: `highest=True` takes the highest")
    shown = [f"{path} ({values[path]:.6g})" for path in ranked]
    notes.append(f"chosen by {printable(by)}, {order} first: {listed(shown[:best], 20)}")
    if ranked[best:]:
        notes.append(f"passed over: {listed(shown[best:], 20)}")
    return [path for path in paths if path in ranked[:best]]


def _value(path: str, key: str, alone: bool) -> float:
    """Returns the number at a key: from the file's own data, from files beside it, or from its name.

    ``alone``: each checkpoint has a folder of its own.
    """
    from streammerge.checkpoints.metrics import Beside, keys_of

    index, beside = open_checkpoint(path), Beside(path, alone)
    value = index.value(key)
    if value is None:
        value = beside.value(key)
    if value is None:
        known = sorted({*keys_of(index.plain_data()), *beside.keys()})
        raise RecipeError(f"{printable(path)} has no number {printable(key)}; it has {listed(known, 12) or 'none'}")
    if not math.isfinite(value):
        raise RecipeError(f"{printable(key)} of {printable(path)} is {value}, by which nothing can be chosen")
    return float(value)
