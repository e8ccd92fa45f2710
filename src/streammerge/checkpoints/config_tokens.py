"""What a configuration states of the tokens: how many there are, and the numbers of special ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from streammerge.checkpoints.config import Tree, mappings, value_at
from streammerge.checkpoints.config_text import KeyPath

_NUMBERS = re.compile(
    r"(^|_)token_(ids?|index)$|_token_(ids?|index)$|(^|_)(start|stop)_text_token$|^forced_\w+_ids?$|^(begin_)?suppress_tokens$|"
    r"^bad_words_ids$"
)
"""Keys whose values are numbers of tokens."""
GENERATION = "generation_config.json"


def vocabulary_sizes(tree: Tree) -> list[int]:
    """Returns every ``vocab_size`` that a configuration states, the outer ones first."""
    found = (each.get("vocab_size") for _, each in mappings(tree))
    return [size for size in found if isinstance(size, int) and not isinstance(size, bool) and size > 0]


def renumbered(tree: Tree, number: Callable[[int], int], giver: Tree) -> tuple[dict[KeyPath, Any], list[str]]:
    """Returns the new numbers of tokens by their keys, and the keys whose tokens the output lacks.

    ``number``: a token's number before -> its number now, or -1. ``giver``: a configuration of the same kind in the new
    numbers, which tells a token where the old one is gone.
    """
    edits, lost = dict[KeyPath, Any](), list[str]()
    for path, each in mappings(tree):
        for key, value in each.items():
            if not _NUMBERS.search(key) or value is None:
                continue
            place, made = (*path, key), _mapped(value, number)
            if made is None:
                theirs = value_at(giver, place)
                if theirs is None:
                    lost.append(".".join(place))
                    continue
                made = theirs
            if made != value:
                edits[place] = made
    return edits, lost


def special(tree: Tree, giver: Tree, words: Tree, number: Callable[[str | int], int]) -> dict[KeyPath, Any]:
    """Returns the numbers of the tokens with a part of their own (begin, end, padding) that a model with another's
    tokenizer has to state: those of the other's configuration, else of the tokens that its tokenizer names.

    ``giver``: the other's configuration of the same kind; ``words``: its ``tokenizer_config.json``. ``number``: the number
    in the output of a token, or of a number in the other; -1 for none.
    """
    found = dict[KeyPath, Any]()
    for path, each in mappings(tree):
        for key in filter(SPECIAL.__contains__, each):
            place = (*path, key)
            value = value_at(giver, place)
            listed = value if isinstance(value, list) else [value]
            if value is None or not all(type(one) is int and number(one) == one for one in listed):
                word = words.get(key.removesuffix("_id"))
                word = word.get("content") if isinstance(word, dict) else word
                value = number(word) if isinstance(word, str) else -1
            if value != -1 and each[key] is not None:
                found[place] = value
    return found


SPECIAL = frozenset(f"{part}_token_id" for part in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))


def _mapped(value: Any, number: Callable[[int], int]) -> Any:
    """Returns a number or lists of numbers in the new numbers; None if one of them is gone."""
    if isinstance(value, list):
        made = [_mapped(each, number) for each in value]
        return None if None in made else made
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        new = number(value)
        return new if new >= 0 else None
    return value
