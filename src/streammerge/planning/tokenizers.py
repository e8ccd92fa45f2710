"""The tokens of the output: whose tokenizer it has, which number each token gets, and what its files say.

Works as mergekit 0.1.5 does, and in the order of the recipe, where mergekit's order depends on the hashes of the names. No
library is needed: a union is an edit of the ``added_tokens`` of a tokenizer.json.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streammerge.checkpoints.heads import is_embedding, is_head
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.checkpoints.tokens import (
    FLAGS,
    Added,
    Tokens,
    entry,
    fingerprint,
    last_tokens,
    next_number,
    read_tokens,
    vocabulary_folder,
)
from streammerge.checkpoints.vocabularies import same_vocabulary, vocabulary_of
from streammerge.errors import RecipeError, listed, printable
from streammerge.planning.aligned import Merged, where
from streammerge.planning.views import Indexes
from streammerge.recipe.adapted import resolved
from streammerge.recipe.model import Recipe, Reference
from streammerge.recipe.vocabulary import NO_MODEL, Tokenizer
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.units import counted, inflected


def differing_vocabularies(recipe: Recipe, indexes: Indexes) -> list[str]:
    """Returns a warning about each model whose tokenizer numbers its tokens in another way than the first model's."""
    opened = [index.path for index in indexes.values() if not index.in_memory]
    if len(opened) < 2 or recipe.tokens:
        return []
    first, *others = opened
    return [
        f"the tokenizers of {printable(first)} and {printable(path)} give tokens other numbers, so rows of their "
        "embeddings that are merged belong to different tokens; "
        '`tokenizer_source="base"` brings them into one order'
        for path in others
        if _number_otherwise(first, path)
    ]


def tokens_without_rows(first: CheckpointIndex, merged: Sequence[Merged]) -> list[str]:
    """Returns a note if the first checkpoint's tokenizer has tokens for which the output's embeddings have no row."""
    if first.in_memory or first.parts or not first.path.is_folder():
        return []
    found = where(merged, is_embedding)
    tables = {m.spec.shape[0]: m.spec.name for m in found if len(m.spec.shape) == 2 and not is_head(m.spec.name)}
    if not tables:
        return []
    try:
        numbers = last_tokens(first.path)
    except (OSError, ValueError):
        return []
    rows, name = max(tables.items())
    beyond = sorted((token for token, number in numbers.items() if number >= rows), key=lambda token: numbers[token])
    if not beyond:
        return []
    return [
        f"the tokenizer of {printable(first.path)} numbers tokens up to {max(numbers.values())}, and {printable(name)} has "
        f"{counted(rows, 'row')}: a text with {listed(beyond, 3)} stops a program that loads the output; "
        '`tokenizer_source="base"` leaves such tokens out'
    ]


def _number_otherwise(one: Location, two: Location) -> bool:
    """Whether the files beside two models give a token two numbers, or a number two tokens. False if they do not tell."""
    differ = False
    if one.is_folder() and two.is_folder():
        ours, theirs = vocabulary_of(one), vocabulary_of(two)
        same = same_vocabulary(ours, theirs)
        if same is None or (same and ours is not None and ours.tokenizer and theirs is not None and theirs.tokenizer):
            return False
        differ = not same
    homes = vocabulary_folder(one), vocabulary_folder(two)
    if homes[0] is None or homes[1] is None or homes[0] == homes[1] or fingerprint(one) == fingerprint(two):
        return differ
    try:
        first, second = read_tokens(one), read_tokens(two)
    except (OSError, ValueError):
        return differ
    if first is None or second is None:
        return differ
    numbers = second.numbers
    if any(numbers.get(token, number) != number for token, number in first.numbers.items()):
        return True
    tokens = {number: token for token, number in numbers.items()}
    return any(tokens.get(number, token) != token for token, number in first.numbers.items())


class Pool:
    """All tokens of a merge. Each has a serial number, so that a model's vocabulary is kept as a list of numbers."""

    def __init__(self) -> None:
        self.serials: dict[str, int] = {}

    def numbered(self, tokens: Tokens) -> array[int]:
        """Returns the serial of the token of each number; -1 where no token has the number."""
        numbers = tokens.numbers
        if not isinstance(numbers, _Interned):
            numbers, plain = _Interned(self), numbers
            numbers.update(plain)
        return numbers.held


class _Interned(MutableMapping[str, int]):
    """The numbers of one model's tokens, as the serial of the token of each number. ``held``: -1 where none has it."""

    def __init__(self, pool: Pool) -> None:
        self.serials, self.held, self.count = pool.serials, array("i"), 0

    def __setitem__(self, token: str, number: int) -> None:
        """Adds a token that is not there."""
        held = self.held
        if number >= len(held):
            held.extend(_GAP * (number + 1 - len(held)))
        held[number] = self.serials.setdefault(token, len(self.serials))
        self.count += 1

    def __getitem__(self, token: str) -> int:
        serial = self.serials.get(token, -1)
        if serial < 0:
            raise KeyError(token)
        try:
            return self.held.index(serial)
        except ValueError:
            raise KeyError(token) from None

    def __delitem__(self, token: str) -> None:
        self.held[self[token]] = -1
        self.count -= 1

    def __iter__(self) -> Iterator[str]:
        names = list(self.serials)
        return (names[serial] for serial in self.held if serial >= 0)

    def __len__(self) -> int:
        return self.count


_GAP = array("i", [-1])


@dataclass(slots=True)
class Known:
    """The vocabulary of one model. ``serials``: the serial of the token of each number, or -1. ``limit``: the numbers from
    here on have no row. ``count``: how many tokens. ``tokens``: what its file tells besides the numbers; None for a model
    without a tokenizer."""

    path: Location
    serials: array[int]
    limit: int
    count: int
    tokens: Tokens | None


@dataclass(slots=True)
class Vocabulary:
    """The output's vocabulary. ``serials``: of the token of each number, or -1. ``names``: serial -> token.

    ``giver``: whose tokenizer files the output has. ``new``: added tokens that these lack. ``marked``: tokens of their
    vocabulary that become added ones. ``gone``: tokens that the output is without, since they have no row.
    """

    serials: array[int]
    giver: Tokens
    next: int
    names: list[str] = field(default_factory=list)
    new: list[Added] = field(default_factory=list)
    marked: list[Added] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.serials)

    @property
    def edited(self) -> bool:
        """Whether the output's tokenizer is not the giver's as it is."""
        return bool(self.new or self.marked or self.gone)

    def numbers(self) -> array[int]:
        """Returns serial -> number in the output, or -1."""
        made = array("i", [-1]) * len(self.names)
        for number, serial in enumerate(self.serials):
            if serial >= 0:
                made[serial] = number
        return made

    def number_of(self, token: str | int) -> int:
        """Returns the number of a token in the output, or -1. A number stands for the token that has it."""
        if isinstance(token, int):
            return token if 0 <= token < self.size and self.serials[token] >= 0 else -1
        serial = self.names.index(token) if token in self.names else -1
        return self.serials.index(serial) if serial >= 0 and serial in self.serials else -1

    def add(self, one: Added, serial: int) -> None:
        """Adds a token behind all others, as an added one with these flags."""
        self.new.append(entry(one["content"], self.next, **dict(zip(FLAGS, _flags(one), strict=True))))
        while self.size < self.next:
            self.serials.append(-1)
        self.serials.append(serial)
        self.next += 1


def base_of(recipe: Recipe) -> Reference:
    """Returns the model whose tokenizer is the base: the recipe's base, or its first model."""
    return recipe.base or recipe.of(recipe.entries[0])


def known_vocabularies(recipe: Recipe, models: Mapping[Reference, Location]) -> tuple[Pool, dict[Reference, Known]]:
    """Returns the vocabulary of each model, the base's first.

    A model without a tokenizer is taken to have the base's, as in mergekit. Raises RecipeError if the base has none.
    """
    pool, known = Pool(), dict[Reference, Known]()
    base = base_of(recipe)
    alike: dict[bytes, Known] = {}
    for reference in sorted(models, key=lambda each: not each.same(base)):
        path = models[reference]
        mark = fingerprint(path)
        if mark in alike:  # the common case, in which nothing is parsed twice
            other = alike[mark]
            home = vocabulary_folder(path) or path
            own = other.tokens and replace(
                other.tokens,
                file=home / other.tokens.file.name,
                added=[*other.tokens.added],
                read=[home / file.name for file in other.tokens.read],
            )
            known[reference] = Known(path, other.serials, other.limit, other.count, own)
            continue
        tokens = _read(recipe, path, pool, required=reference.same(base))
        if tokens is None:
            first = next(iter(known.values()))
            known[reference] = Known(path, first.serials, first.limit, first.count, None)
            continue
        serials = pool.numbered(tokens)
        serials = next((each.serials for each in known.values() if each.serials == serials), serials)
        known[reference] = alike[mark] = Known(path, serials, len(serials), len(tokens.numbers), tokens)
        tokens.numbers = {}  # the serials tell the same in less memory
    return pool, known


def output_vocabulary(recipe: Recipe, pool: Pool, known: dict[Reference, Known]) -> Vocabulary:
    """Returns the output's vocabulary, as the recipe asks for it."""
    asked = recipe.tokens or Tokenizer()
    base = next(iter(known.values()))
    if asked.source in NO_MODEL:
        made = _stripped(base, pool)
        if asked.source == "union":
            _unite(made, known, pool)
    else:
        own = next((each for reference, each in known.items() if resolved(reference.path) == resolved(asked.source)), None)
        if own is not None and own.tokens is not None:
            made = Vocabulary(array("i", own.serials), own.tokens, next_number(own.tokens.ordinary, own.tokens.added))
        else:
            tokens = _read(recipe, parse(asked.source), pool)
            made = Vocabulary(pool.numbered(tokens), tokens, next_number(tokens.ordinary, tokens.added))
    made.next = max(made.next, 0 if made.giver.kind == "tokenizers" else made.size)
    have = set(made.serials)
    for token in asked.tokens:
        serial = pool.serials.setdefault(token, len(pool.serials))
        if serial not in have:
            have.add(serial)
            made.add(entry(token, 0), serial)
    made.names = list(pool.serials)
    if missing := [str(each.path) for each in known.values() if each.tokens is None]:
        made.warnings.append(f"{listed(missing)} without a tokenizer: taken to have that of {printable(base.path)}")
    return made


def _read(recipe: Recipe, path: Location, pool: Pool, required: bool = True) -> Any:
    """Returns the tokens of a model; None if there are none and they are not ``required``."""
    key = recipe.at(("tokenizer_source",) if recipe.tokenizer_source else ("tokenizer",))
    try:
        tokens = read_tokens(path, lambda: _Interned(pool))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}the vocabulary of {printable(path)} cannot be read: {printable(error)}") from error
    if tokens is None and required:
        raise RecipeError(
            f"{key}{printable(path)} has no tokenizer that can be read, and the recipe asks for its tokens; put its "
            "tokenizer.json there (`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes one), or leave this out"
        )
    return tokens


def _stripped(base: Known, pool: Pool) -> Vocabulary:
    """Returns the base's vocabulary without the tokens that have no row."""
    if base.tokens is None:
        raise ValueError("the base has tokens")
    serials = array("i", base.serials[: base.limit])
    while serials and serials[-1] < 0:
        serials.pop()
    beyond = {serial for serial in base.serials[base.limit :] if serial >= 0}
    gone = {token for token, serial in pool.serials.items() if serial in beyond} if beyond else set[str]()
    added = [each for each in base.tokens.added if each["content"] not in gone]
    ordinary = base.tokens.ordinary - (len(gone) - (len(base.tokens.added) - len(added)))
    base.tokens.added = added
    made = Vocabulary(serials, base.tokens, next_number(ordinary, added), gone=gone)
    if gone:
        said = f"{counted(len(gone), 'token')} of {printable(base.path)} ({listed(sorted(gone), 3)})"
        said += f" {inflected(len(gone), 'has', 'have')} no row in its embeddings"
        made.notes.append(f"{said}; the output is without {inflected(len(gone), 'it', 'them')}")
    return made


def _unite(made: Vocabulary, known: Mapping[Reference, Known], pool: Pool) -> None:
    """Adds the tokens that only other models have: ordinary ones first, then added ones, each in the models' order."""
    have = bytearray(len(pool.serials))
    for serial in made.serials:
        if serial >= 0:
            have[serial] = 1
    added, differing, ordinary = dict[int, Added](), list[str](), list[int]()
    for each in known.values():
        own = each.tokens.added if each.tokens else []
        apart = {pool.serials[one["content"]] for one in own}
        for serial in each.serials[: each.limit]:
            if serial >= 0 and not have[serial] and serial not in apart:
                have[serial] = 1
                ordinary.append(serial)
        for one in own:
            if one["id"] < each.limit:
                first = added.setdefault(pool.serials[one["content"]], one)
                differing += [one["content"]] if _flags(first) != _flags(one) else []
    places = {serial: number for number, serial in enumerate(made.serials) if serial in added}
    marked = {one["content"] for one in made.giver.added}
    names = list(pool.serials)
    for serial in ordinary:
        if serial not in added:
            made.add(entry(names[serial], 0), serial)
    for serial, one in added.items():
        if serial not in places:
            made.add(one, serial)
        elif one["content"] not in marked:
            made.marked.append({**one, "id": places[serial]})
    if differing:
        made.warnings.append(
            f"models mark {listed(list(dict.fromkeys(differing)))} differently; the first that has it counts"
        )


def _flags(each: Added) -> tuple[bool, ...]:
    return tuple(bool(each.get(flag, flag == "normalized" and not each.get("special"))) for flag in FLAGS)
