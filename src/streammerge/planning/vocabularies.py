"""Puts the rows of embeddings and heads into the order of the output's vocabulary, before anything is aligned.

Each such tensor becomes a gather of rows: the model's own, and rows of other models for tokens that it lacks. The rules for
those are mergekit's. No tensor is read here, and no list of architectures is needed: the tensors are found by their shapes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from streammerge.checkpoints.config import tree_of
from streammerge.checkpoints.config_tokens import vocabulary_sizes
from streammerge.checkpoints.heads import is_head, tie_head
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.checkpoints.tokens import Tokens, read_tokens, vocabulary_folder
from streammerge.errors import RecipeError, listed, printable
from streammerge.methods.registry import COPY, LINEAR
from streammerge.planning.tokenizers import Known, Pool, Vocabulary, base_of, known_vocabularies, output_vocabulary
from streammerge.planning.views import Indexes
from streammerge.recipe.adapted import resolved
from streammerge.recipe.model import Recipe, Reference
from streammerge.recipe.vocabulary import Token
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.joined import joined
from streammerge.sources.mean_row import mean_rows
from streammerge.sources.merged import Merged as MergedSource
from streammerge.sources.merged import merged
from streammerge.sources.reshaped import reshaped
from streammerge.sources.rows import Runs, gathered, rows_of, runs_of
from streammerge.sources.turned import turned, turned_back
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType, promoted
from streammerge.tensors.layers import is_before, layer_of
from streammerge.tensors.matching import match
from streammerge.tensors.spec import TensorSpec
from streammerge.units import counted

_WORDS = re.compile(
    r"(^|\.)(embed_tokens\w*|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|backbone\.embeddings?)\.weight$|"
    r"^(model\.)?shared\.weight$"
)
_EMBEDDINGS = re.compile(r"emb|wte|shared\.weight$")
_OF_TOKENS = re.compile(r"emb|wte|shared\.|head|decoder|predict|logits|vocab|proj_out|output|generator")
_OF_OTHERS = re.compile(r"pos(?!t)|wpe|type|patch|norm|speaker|spk|lang|dense|emb_g|emb_l|rotary|time", re.IGNORECASE)
"""Parts of names that embeddings of words have, tensors with a row for each token, and tensors that never have one."""
_ACROSS = re.compile(r"(^|\.)predictions\.dense\.weight$")
"""The head of MobileBERT, the only matrix known whose columns belong to tokens."""
_TOKEN_BYTES = 300
"""What a token takes while vocabularies are compared: its text, its numbers, and their places in mappings."""
_NONE, _GAP = array("i"), array("i", [-1])
_FILLER = "\0filler"
"""Stands for the row before all tokens, which F5's models have."""


@dataclass(slots=True)
class Tokenized:
    """A merge whose embeddings are in the order of one vocabulary.

    ``indexes``: the checkpoints with gathered rows. ``vocabulary``: the output's tokens. ``before``: the number in the
    output of each number of a token in the first checkpoint, or -1. ``rows``: of the output's embeddings; ``had``: of the
    first checkpoint's. ``read``: the files that tell the tokens.
    """

    indexes: Indexes
    vocabulary: Vocabulary
    before: array[int]
    rows: int
    had: int
    read: list[Location]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def held_bytes(self) -> int:
        """Memory of the tokens while the plan is made."""
        return _TOKEN_BYTES * len(self.vocabulary.names)


@dataclass(slots=True)
class _Seen:
    """A checkpoint with its tensors, as :func:`tie_head` looks at it."""

    index: CheckpointIndex
    entries: Mapping[str, Source]


class _Table(NamedTuple):
    """A tensor with a row for each token, in every model of a group. ``names``: its name in each, or None. ``axis``: that
    of the rows. ``rows``: how many each model has, or None."""

    names: tuple[str | None, ...]
    axis: int
    rows: tuple[int | None, ...]


class _Group(NamedTuple):
    """The models that are merged in the tensors outside the layers. ``first``: whether these are the tensors before the
    layers, None for both."""

    models: tuple[Reference, ...]
    base: Reference | None
    first: bool | None

    def takes(self, name: str) -> bool:
        return self.first is None or is_before(name) == self.first


def tokenized(recipe: Recipe, indexes: Indexes) -> Tokenized | None:
    """Returns the checkpoints in the order of the output's vocabulary; None if the recipe asks for no tokenizer.

    Raises RecipeError if tokens or embeddings cannot be found.
    """
    if recipe.tokens is None:
        return None
    return _Gathering(recipe, indexes).made()


def truncated(recipe: Recipe, indexes: Indexes, notes: list[str], warnings: list[str]) -> Indexes:
    """Returns the checkpoints with the embeddings and heads cut to the rows that all of them have.

    A head that only some have is that of the embeddings in the others, and is cut like theirs.
    """
    made = dict(indexes)
    for group in _groups(recipe):
        seens = [_Seen(made[each], made[each].entries) for each in _known(indexes, group.models)]
        tie_head(seens, notes)
        for table in _alike(seens):
            alike = len(set(filter(None, table.rows))) < 2
            if alike or not _is_named(table) or not group.takes(str(table.names[0])):
                continue
            least = min(filter(None, table.rows))
            for name, seen in zip(table.names, seens, strict=True):
                if name is not None:
                    cut = rows_of(_upright(table, seen.entries[name]), 0, least)
                    seen.entries = {**seen.entries, name: _laid_down(table, cut)}
            counts = ", ".join(str(rows) for rows in table.rows)
            warnings.append(
                f"`unsafe_truncate_embeddings`: {printable(table.names[0])} has {counts} rows in the models and is cut to "
                f"{least}; this is right only if the tokens of these rows have the same numbers in all of them"
            )
        for reference, seen in zip(_known(indexes, group.models), seens, strict=True):
            made[reference] = replace(made[reference], entries=seen.entries)
    return made


# -------------------------------------------------------------------------------------------------- models and tensors


def _groups(recipe: Recipe) -> list[_Group]:
    """Returns the groups of models. The tensors before the layers come from the first slice, those behind from the last."""
    if not recipe.slices:
        models = [recipe.base] if recipe.base else []
        models += [recipe.of(entry) for entry in recipe.entries]
        return [_Group(_once(models), recipe.base, None)]
    made = []
    for first, each in ((True, recipe.slices[0]), (False, recipe.slices[-1])):
        base = each.base_model or recipe.base_model
        sources = _once([recipe.of(source) for source in each.sources])
        made.append(_Group(sources, recipe.copied(base) if base else None, first))
    return made


def _once(models: Sequence[Reference | None]) -> tuple[Reference, ...]:
    found: list[Reference] = []
    for each in models:
        if each is not None and not any(each.same(known) for known in found):
            found.append(each)
    return tuple(found)


def _known(indexes: Indexes, models: Sequence[Reference]) -> list[Reference]:
    return [next(known for known in indexes if known.same(each)) for each in models]


def _lengths(seens: Sequence[_Seen], names: Sequence[str | None]) -> tuple[int, tuple[int | None, ...]] | None:
    """Returns the axis of the rows, and their number in each model; None for tensors that cannot have tokens as rows."""
    shapes = [seen.entries[name].spec.shape if name else None for seen, name in zip(seens, names, strict=True)]
    present = [shape for shape in shapes if shape is not None]
    bias = str(names[0]).endswith("bias") and all(len(shape) == 2 and shape[0] == 1 for shape in present)
    across = _ACROSS.search(str(names[0])) and all(len(shape) == 2 for shape in present)
    axis = 1 if bias or across else 0
    around = {shape[:axis] + shape[axis + 1 :] for shape in present}
    if len(around) != 1 or any(not shape or not shape[axis] for shape in present):
        return None
    return axis, tuple(shape[axis] if shape else None for shape in shapes)


def _alike(seens: Sequence[_Seen]) -> Iterator[_Table]:
    """Yields the tensors outside the layers that may have tokens as rows, of the first model's names."""
    first, *others = seens
    matched = [_matched(first, other) for other in others]
    for name, entry in first.entries.items():
        if entry.spec.dtype.kind != "float" or not entry.spec.shape or layer_of(name) is not None:
            continue
        names = (name, *(each.get(name) for each in matched))
        found = _lengths(seens, names)
        if found is not None:
            yield _Table(names, *found)


def _matched(first: _Seen, other: _Seen) -> Mapping[str, str]:
    if first.entries.keys() == other.entries.keys():
        return {name: name for name in first.entries if layer_of(name) is None}
    return match(*({name: entry.spec.shape for name, entry in each.entries.items()} for each in (first, other))).names


def _tables(seens: Sequence[_Seen], group: _Group, counts: Sequence[int]) -> list[_Table]:
    """Returns the tensors with a row for each token. ``counts``: how many tokens each model has.

    Embeddings of words and heads tell how many rows a model has. What has as many belongs to them if the models differ in
    the number, or if its name can mean tokens.
    """
    found = list(_alike(seens))
    tables = [
        each for each in found if each.axis == 0 and _is_table(each, seens) and _fits(each, counts) and _is_named(each)
    ]
    near = sorted(tables, key=lambda each: _far(each, counts))
    words = [each for each in near if _WORDS.search(str(each.names[0]))]
    words = words or [each for each in near if _EMBEDDINGS.search(str(each.names[0]))] or near
    least = _far(words[0], counts) if words else 0
    known = [each for each in words if _far(each, counts) == least or "embed_tokens" in str(each.names[0])]
    known += [each for each in near if is_head(str(each.names[0]))]
    return [
        each
        for each in found
        if group.takes(str(each.names[0]))
        and any(_same_rows(each.rows, one.rows) for one in known)
        and (_is_named(each) or len(set(each.rows) - {None}) > 1)
    ]


def _is_named(table: _Table) -> bool:
    """Whether a name can mean tokens."""
    name = str(table.names[0])
    if table.axis and _ACROSS.search(name):
        return True
    return bool(_OF_TOKENS.search(name)) and not _OF_OTHERS.search(".".join(name.split(".")[-2:]))


def _is_table(table: _Table, seens: Sequence[_Seen]) -> bool:
    return all(len(seen.entries[name].spec.shape) == 2 for seen, name in zip(seens, table.names, strict=True) if name)


def _fits(table: _Table, counts: Sequence[int]) -> bool:
    return all(rows is None or 2 * rows >= count for rows, count in zip(table.rows, counts, strict=True))


def _far(table: _Table, counts: Sequence[int]) -> int:
    return sum(abs(rows - count) for rows, count in zip(table.rows, counts, strict=True) if rows is not None)


def _same_rows(one: Sequence[int | None], two: Sequence[int | None]) -> bool:
    return all(a == b or a is None or b is None for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------------------------------------------------------- rows


class _Piece(NamedTuple):
    """Rows of other models behind a model's own. ``rows``: (model, its rows); one pair for rows as they are, several for
    their means; none for one row of zeros."""

    rows: tuple[tuple[int, Runs], ...]


class _How(NamedTuple):
    """How the rows of one model are made: its own rows and the pieces, joined, then gathered by ``runs``."""

    pieces: tuple[_Piece, ...]
    runs: Runs


_Default = tuple[int, ...]
"""Where the row of a token comes from: () for zeros, (model, row), or (-1, model, model, ...) for the mean."""


class _Gathering:
    def __init__(self, recipe: Recipe, indexes: Indexes) -> None:
        self.recipe, self.indexes = recipe, dict(indexes)
        self.groups = [_Group(tuple(_known(indexes, g.models)), g.base, g.first) for g in _groups(recipe)]
        self.first = recipe.checkpoints[0]
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def made(self) -> Tokenized:
        recipe = self.recipe
        asked = recipe.tokens
        if asked is None:
            raise ValueError("the recipe asks for no tokenizer")
        models = _once([base_of(recipe), *(each for group in self.groups for each in group.models)])
        pool, known = known_vocabularies(recipe, {each: self.indexes[each].path for each in _known(self.indexes, models)})
        seens: list[list[_Seen]] = []
        tables: list[list[_Table]] = []
        for group in self.groups:
            views = [_Seen(self.indexes[each], self.indexes[each].entries) for each in group.models]
            wanted = self.indexes[self.first].entries if group.first is False else ()
            tie_head(views, self.notes, wanted)
            seens.append(views)
            tables.append(_tables(views, group, [known[each].count for each in group.models]))
        if not any(tables):
            raise RecipeError(
                f"{recipe.at(('tokenizer',))}no tensor outside the layers has a row for each token of its model's "
                "vocabulary, so no rows can follow a tokenizer; leave tokenizer_source out"
            )
        had = self._limit(known, tables, pool)
        vocabulary = output_vocabulary(recipe, pool, known)
        maps = self._maps(vocabulary, known)
        multiple = asked.pad_to_multiple_of or 1
        rows = -(-vocabulary.size // multiple) * multiple
        forced = self._forced(vocabulary, known)
        for group, views, found in zip(self.groups, seens, tables, strict=True):
            _Rows(self, group, views, [maps[each] for each in group.models], vocabulary, forced, rows).gather(found)
        self._copies(known, vocabulary, rows)
        self._check_tokens(asked.tokens, vocabulary)
        self._report(vocabulary, known, maps)
        first = next(each for reference, each in known.items() if reference.same(base_of(recipe)))
        own = known.get(self.first, first)
        numbers = vocabulary.numbers()
        before = array("i", (numbers[serial] if serial >= 0 else -1 for serial in own.serials))
        read = [file for each in known.values() if each.tokens for file in each.tokens.read]
        read += [file for file in vocabulary.giver.read if file not in read]
        return Tokenized(
            self.indexes,
            vocabulary,
            before,
            rows,
            had,
            read,
            [*self.notes, *vocabulary.notes],
            [*self.warnings, *vocabulary.warnings],
        )

    def _limit(self, known: dict[Reference, Known], tables: list[list[_Table]], pool: Pool) -> int:
        """Sets how many numbers of each model have a row. Returns the rows of the first checkpoint."""
        counted: dict[Reference, int] = {}
        for group, found in zip(self.groups, tables, strict=True):
            for table in found:
                for model, rows in zip(group.models, table.rows, strict=True):
                    if rows is not None:
                        counted.setdefault(model, rows)
        tables_of = [each for each in known if each in counted]
        if all(
            known[each].tokens is not None
            and known[each].tokens.kind == "lines"  # type: ignore[union-attr]
            and counted[each] == len(known[each].serials) + 1
            for each in tables_of
        ):
            filler = pool.serials.setdefault(_FILLER, len(pool.serials))
            for each in {id(each): each for each in known.values()}.values():
                each.serials = array("i", [filler]) + each.serials
        for model in known:
            rows = counted.get(model, len(known[model].serials))
            stated = vocabulary_sizes(tree_of(known[model].path))
            known[model].limit = min(stated[0], rows) if stated and rows not in stated else rows
        return counted.get(self.first, 0)

    def _maps(self, vocabulary: Vocabulary, known: dict[Reference, Known]) -> dict[Reference, array[int]]:
        """Returns for each model the number that each token of the output has in it, or -1."""
        made: dict[Reference, array[int]] = {}
        seen: dict[tuple[int, int], array[int]] = {}
        for reference, each in known.items():
            key = (id(each.serials), each.limit)
            if key not in seen:
                own = array("i", [-1]) * len(vocabulary.names)
                for number, serial in enumerate(each.serials[: each.limit]):
                    if serial >= 0:
                        own[serial] = number
                seen[key] = array("i", (own[serial] if serial >= 0 else -1 for serial in vocabulary.serials))
                for place, serial in enumerate(vocabulary.serials):
                    if serial < 0 and place < each.limit and each.serials[place : place + 1] in (_NONE, _GAP):
                        seen[key][place] = place  # a number that is no token's
            made[reference] = seen[key]
        return made

    def _forced(
        self, vocabulary: Vocabulary, known: dict[Reference, Known]
    ) -> dict[int, tuple[Token, Reference | None, int]]:
        """Returns number in the output -> what the recipe says about the token, with the model and its row, or -1 for the
        row of the same token. Raises RecipeError for what is not there."""
        tokens = self.recipe.tokens.tokens if self.recipe.tokens else {}
        made: dict[int, tuple[Token, Reference | None, int]] = {}
        numbers = vocabulary.numbers() if tokens else array("i")
        serials = {token: serial for serial, token in enumerate(vocabulary.names)} if tokens else {}
        for text, each in tokens.items():
            source, model, row = each.source, None, -1
            where = self.recipe.at(each.path)
            if source is not None and source.model is not None:
                place = resolved(source.model)
                model = next((reference for reference in known if resolved(reference.path) == place), None)
                if model is None:
                    raise RecipeError(
                        f"{where}{printable(source.model)} gives {printable(text)} its row, but is not merged"
                    )
                if source.token_id is not None:
                    row = source.token_id
                elif source.token is not None:
                    own = serials.get(source.token, -2)
                    row = next((number for number, serial in enumerate(known[model].serials) if serial == own), -1)
                    if row < 0:
                        raise RecipeError(f"{where}{printable(source.model)} has no token {printable(source.token)}")
            made[numbers[serials[text]]] = each, model, row
        return made

    def _copies(self, known: dict[Reference, Known], vocabulary: Vocabulary, rows: int) -> None:
        """Puts the rows of models that only a rule copies from into the output's order. They give no other model a row."""
        for reference in [each for each in self.indexes if each not in known]:
            path = self.indexes[reference].path
            tokens = self._tokens_of_copy(path)
            if tokens is None:
                continue
            own, serials = tokens.numbers, vocabulary.serials
            map_ = array("i", (own.get(vocabulary.names[serial], -1) if serial >= 0 else -1 for serial in serials))
            group = _Group((reference,), None, None)
            views = [_Seen(self.indexes[reference], self.indexes[reference].entries)]
            found = _tables(views, group, [len(own)])
            counts = [table.rows[0] or 0 for table in found]
            limited = array("i", (number if number < min(counts, default=0) else -1 for number in map_))
            _Rows(self, group, views, [limited], vocabulary, {}, rows).gather(found)

    def _tokens_of_copy(self, path: Location) -> Tokens | None:
        try:
            return read_tokens(path)
        except (OSError, ValueError):
            return None

    def _check_tokens(self, tokens: Mapping[str, Token], vocabulary: Vocabulary) -> None:
        if tokens and self.recipe.tokens and not vocabulary.edited:
            self.notes.append(f"the recipe says where the rows of {listed(list(tokens))} come from")

    def _report(self, vocabulary: Vocabulary, known: dict[Reference, Known], maps: dict[Reference, array[int]]) -> None:
        plain = array("i", range(vocabulary.size))
        if not vocabulary.edited and all(each == plain for each in maps.values()):
            given = vocabulary.giver.file.parent
            giver = next((each.path for each in known.values() if vocabulary_folder(each.path) == given), given)
            said = f"all models have one vocabulary, so the output has the tokenizer of {printable(giver)} as it is"
            self.notes.append(said)
            return
        moved = [str(known[each].path) for each, own in maps.items() if own != plain]
        where = f"; rows of {listed(moved, 4)} are put into its order" if moved else ""
        self.notes.append(f"the output's vocabulary has {vocabulary.size} tokens{where}")


class _Rows:
    """The gathers of one group of models."""

    def __init__(
        self,
        all_: _Gathering,
        group: _Group,
        seens: list[_Seen],
        maps: list[array[int]],
        vocabulary: Vocabulary,
        forced: Mapping[int, tuple[Token, Reference | None, int]],
        rows: int,
    ) -> None:
        self.all, self.group, self.seens, self.maps = all_, group, seens, maps
        self.vocabulary, self.forced, self.rows = vocabulary, forced, rows
        self.base = next((n for n, each in enumerate(group.models) if group.base and each.same(group.base)), None)
        self.known: dict[tuple[int, ...], tuple[dict[int, _Default], dict[tuple[int, int], _How]]] = {}
        self.zeros: set[int] = set()

    def gather(self, tables: list[_Table]) -> None:
        """Replaces the tensors of the tables by gathers, in the checkpoints of the whole merge."""
        made: list[dict[str, Source]] = [{} for _ in self.seens]
        for table in tables:
            holders = tuple(number for number, name in enumerate(table.names) if name is not None)
            for number in holders:
                name = str(table.names[number])
                made[number][name] = self._table(table, holders, number, name)
        for reference, seen, new in zip(self.group.models, self.seens, made, strict=True):
            index, gone = self.all.indexes[reference], seen.index.entries.keys() - seen.entries.keys()
            entries = {name: entry for name, entry in index.entries.items() if name not in gone}
            entries |= {name: entry for name, entry in seen.entries.items() if name not in entries} | new
            self.all.indexes[reference] = replace(index, entries=entries)
        if self.zeros:
            names = [self.vocabulary.names[self.vocabulary.serials[t]] for t in sorted(self.zeros)]
            self.all.warnings.append(
                f"no model has a row for {counted(len(names), 'token')} ({listed(names, 3)}), so zeros stand there"
            )

    def _table(self, table: _Table, holders: tuple[int, ...], number: int, name: str) -> Source:
        """Returns one model's tensor in the order of the output's vocabulary."""
        entries = {each: self._own(table, each) for each in holders}
        own = entries[number]
        made = self._gathered(name, entries, number, self._how(holders, number, own.spec.shape[0]))
        if self.rows > made.spec.shape[0]:
            made = joined(name, [made, mean_rows(made, self.rows - made.spec.shape[0])])
        return _laid_down(table, made).named(name)

    def _own(self, table: _Table, number: int) -> Source:
        return _upright(table, self.seens[number].entries[str(table.names[number])])

    def _gathered(self, name: str, entries: Mapping[int, Source], number: int, how: _How) -> Source:
        own = entries[number]
        if not how.pieces:
            return gathered(own, how.runs)
        dtype = self._dtype(entries, number, how)
        width = own.spec.shape[1:]
        pieces = [_cast(own, dtype)]
        for piece in how.pieces:
            rows = [gathered(entries[model], runs) for model, runs in piece.rows]
            if not rows:
                pieces.append(Constant(TensorSpec(name, dtype, (1, *width))))
            elif len(rows) == 1:
                pieces.append(_cast(rows[0], dtype))
            else:
                pieces.append(merged(name, LINEAR, rows, dtype=dtype, compute="float64"))
        return gathered(joined(name, pieces), how.runs)

    def _dtype(self, entries: Mapping[int, Source], number: int, how: _How) -> DType:
        """Returns the dtype of a model's tensor: that of all models together if it has rows of others, so that these are
        exact. The first checkpoint keeps its dtype, which is the output's, unless another one is asked for."""
        own = entries[number].spec.dtype
        recipe = self.all.recipe
        keeps = self.group.models[number] == self.all.first and recipe.recast is None and not recipe.promotes
        if keeps or not any(piece.rows for piece in how.pieces):
            return own
        return promoted([each.spec.dtype for each in entries.values()])

    def _how(self, holders: tuple[int, ...], number: int, rows: int) -> _How:
        """Returns how the rows of one model are made, which embeddings and head share."""
        if holders not in self.known:
            self.known[holders] = self._defaults(holders), {}
        defaults, made = self.known[holders]
        if (number, rows) not in made:
            made[number, rows] = self._rows_of(number, rows, defaults)
        return made[number, rows]

    def _defaults(self, holders: tuple[int, ...]) -> dict[int, _Default]:
        """Returns number of a token -> where the row of a model without it comes from, for tokens that some model needs."""
        made: dict[int, _Default] = {}
        maps = [self.maps[each] for each in holders]
        if not self.forced and all(each is maps[0] for each in maps) and min(maps[0], default=0) >= 0:
            return made
        base = self.base if self.base in holders else None
        for t, numbers in enumerate(zip(*maps, strict=True)):
            told = self.forced.get(t)
            if min(numbers) >= 0 and not (told and told[0].force):
                continue
            if told is not None and told[0].source is not None:
                made[t] = self._told(t, told, holders)
                continue
            have = [model for model, row in zip(holders, numbers, strict=True) if row >= 0]
            if not have:
                made[t] = ()
                if self.vocabulary.serials[t] >= 0:
                    self.zeros.add(t)
            elif len(have) == 1:
                made[t] = (have[0], self.maps[have[0]][t])
            elif base is not None and self.maps[base][t] >= 0:
                made[t] = (base, self.maps[base][t])
            else:
                made[t] = (-1, *have)
        return made

    def _told(self, t: int, told: tuple[Token, Reference | None, int], holders: tuple[int, ...]) -> _Default:
        token, reference, row = told
        if reference is None:
            return ()
        where, name = self.all.recipe.at(token.path), printable(self.vocabulary.names[self.vocabulary.serials[t]])
        number = next((n for n in holders if self.group.models[n] == reference), None)
        if number is None:
            raise RecipeError(f"{where}{printable(reference.path)} gives {name} its row, but has no such embeddings here")
        row = self.maps[number][t] if row < 0 else row
        if row < 0:
            raise RecipeError(f"{where}{printable(reference.path)} gives {name} its row, but has no such token")
        return (number, row)

    def _rows_of(self, number: int, at: int, defaults: Mapping[int, _Default]) -> _How:
        """``at``: how many rows the model has, behind which the pieces stand."""
        own = self.maps[number]
        wanted: dict[_Default, list[int]] = {}
        for t, default in defaults.items():
            told = self.forced.get(t)
            if own[t] < 0 or (told is not None and told[0].force):
                wanted.setdefault(default[:1] if default[:1] != (-1,) else default, []).append(t)
        if not wanted:
            return _How((), runs_of(own))
        indices, pieces = array("i", own), list[_Piece]()
        for kind, tokens in wanted.items():
            if not kind:
                pieces.append(_Piece(()))
                for t in tokens:
                    indices[t] = at
                at += 1
                continue
            if len(kind) == 1:
                pieces.append(_Piece(((kind[0], runs_of(defaults[t][1] for t in tokens)),)))
            else:
                pieces.append(_Piece(tuple((n, runs_of(self.maps[n][t] for t in tokens)) for n in kind[1:])))
            for place, t in enumerate(tokens):
                indices[t] = at + place
            at += len(tokens)
        return _How(tuple(pieces), runs_of(indices))


def _upright(table: _Table, entry: Source) -> Source:
    """Returns a tensor with a row for each token."""
    shape = entry.spec.shape
    if not table.axis:
        return entry
    return reshaped(entry, shape[::-1]) if shape[0] == 1 else turned(entry)


def _laid_down(table: _Table, made: Source) -> Source:
    """Returns a tensor with a row for each token as its model has it."""
    spec = made.spec
    if not table.axis:
        return made
    if spec.shape[1] == 1:
        return reshaped(made, spec.shape[::-1])
    return turned_back(made, TensorSpec(spec.name, spec.dtype, spec.shape[::-1]))


def _cast(source: Source, dtype: DType) -> Source:
    if source.spec.dtype is dtype:
        return source
    return MergedSource(replace(source.spec, dtype=dtype), COPY, (source,))
