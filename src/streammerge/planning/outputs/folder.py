"""Plans an output folder, which has the files of the first input's folder: names, container, shards, index, subfolders.

The merged tensors go into files of the same names. The configuration is edited, side files are copied
(:mod:`streammerge.planning.dispositions.files`), recipe and receipt are added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streammerge.checkpoints.config import CONFIG
from streammerge.checkpoints.config_keys import CONFIG_FILES
from streammerge.checkpoints.config_tokens import GENERATION
from streammerge.checkpoints.heads import loader_ties
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import safetensors
from streammerge.formats.base import Form, LayoutFile, Literal
from streammerge.formats.file_names import form_of_file, is_adapter, is_looked_for
from streammerge.formats.records import CARD_FILE, RECEIPT_FILE, RECIPE_FILE
from streammerge.pickles.tree import mapping_items
from streammerge.planning.aligned import Merged, MergedTensors, Way, named, names_of, unlike
from streammerge.planning.alignment import Alignment
from streammerge.planning.dispositions.files import NOT_MERGED, Copies, decide, folder_of, is_file_of_folder, parts_of
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.card import card_text, has_card, library_of
from streammerge.planning.outputs.config import config_files
from streammerge.planning.outputs.layout import (
    Accounting,
    Layout,
    Placed,
    PlacedTensors,
    PlannedOutput,
    blank_sums,
    metadata_of,
    recipe_record,
    text_file,
)
from streammerge.planning.outputs.pickled import pickled_file
from streammerge.planning.outputs.tokenizer import TokenizerFiles, generation_edit, tokenizer_files
from streammerge.planning.views import Indexes
from streammerge.planning.vocabularies import Tokenized
from streammerge.recipe.document import to_yaml
from streammerge.recipe.locations import travelling_names
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location
from streammerge.tensors.conventions import AS_SAFETENSORS, INDEXED
from streammerge.tensors.spec import TensorSpec
from streammerge.units import parse_bytes

_quoted = json.encoder.encode_basestring
DEFAULT_SHARD_BYTES = parse_bytes("5GB")
_NEW = Form("model", ".safetensors")
"""The form of a folder whose first input is a file of another name than loaders look for, or a pickle."""


def is_pickled(recipe: Recipe, base: CheckpointIndex) -> bool:
    """Whether any file of the output folder is an archive of torch.save."""
    return any(_is_pickled(recipe, part) for part in parts_of(base).values())


def _is_pickled(recipe: Recipe, part: CheckpointIndex) -> bool:
    if _is_distributed(recipe, part):
        return True
    form = _form(recipe, part)
    return part.container.pickled and (form is part.container.form or form.ending != _NEW.ending)


def _is_distributed(recipe: Recipe, part: CheckpointIndex) -> bool:
    """Whether a model is written as a checkpoint of several ranks, since the first input is one."""
    if part.container.distributed is None:
        return False
    from streammerge.planning.outputs.distributed import is_distributed  # here, because few inputs are

    return is_distributed(recipe, part)


def _form(recipe: Recipe, part: CheckpointIndex) -> Form:
    """Returns the form of a model in the output: the first input's.

    A conversion writes safetensors instead of pickles, unless a loader looks for the pickle only. A file of a name that a
    loader looks for in a folder has the form of such a folder.
    """
    form = part.container.form
    if form is None:
        named = form_of_file(part.path.name)
        if named is None or part.container.pickled == (named.ending == _NEW.ending):
            return _NEW
        form = named
    if not part.container.pickled or recipe_record(recipe) is not None:
        return form
    if is_file_of_folder(part):
        return Form(form.stem, _NEW.ending, form.variant)
    stem = AS_SAFETENSORS.get(form.stem) if form.ending == ".bin" else None
    if stem is None and not is_looked_for(form):
        stem = _NEW.stem
    return form if stem is None else Form(stem, ".safetensors", form.variant)


def folder_output(
    recipe: Recipe,
    base: CheckpointIndex,
    indexes: Indexes,
    alignment: Alignment,
    accounting: Accounting,
    dispositions: Dispositions,
) -> PlannedOutput:
    """Plans the output folder. Raises RecipeError for what the container of the first input cannot hold."""
    made = _Folder(recipe, indexes, dispositions)
    parts = parts_of(base)
    folder = next((path for path in (base.path, base.container.path) if path.is_folder()), None)
    for name, part in parts.items():
        own = _own_alignment(name, parts, part, alignment)
        made.add_part(name, part, own, folder)
    record = recipe_record(recipe)
    tokenizer = tokenizer_files(recipe, indexes, alignment.tokenized, folder)
    made.add_tokenizer(tokenizer, alignment.tokenized, folder)
    if record:
        made.files.append(text_file(RECIPE_FILE, to_yaml(record)))
        if recipe.output.card and folder is not None and has_card(folder):
            made.add_card(record, accounting.named, folder)
    names = {file.name for file in made.files}
    copied: Copies = []
    if folder is not None:
        written = {*names, RECEIPT_FILE, *tokenizer.left, *(name for _, name in made.copied)}
        can_go_on = any(_is_distributed(recipe, part) for part in parts_of(base).values())
        goes_on = recipe.output.keep_optimizer if can_go_on else None
        copied = decide(base, folder, written, dispositions, goes_on)
        beside = [name for each in dispositions if each.why == NOT_MERGED for name in each.names]
        adapters = [name for name in beside if is_adapter(name)]
        if len(beside) > len(adapters):
            others = [name for name in beside if name not in adapters]
            made.notes.append(f"copied from the first input, not merged: {listed(others)}")
        if adapters:
            made.notes.append(
                f"{listed(adapters)} is an adapter of the first input, copied as it is; transformers applies it to the "
                "merged weights when it loads the folder, so remove it if that is not wanted"
            )
        inner = {name.partition("/")[0] for name in (*names, *(name for _, name in copied)) if "/" in name}
        if inner:
            made.notes.append(f"the output has the subfolders of {printable(folder)}: {listed(sorted(inner))}")
    copied += tokenizer.copied + made.copied
    sums = made.sums | {name: blank_sums([]) for name in (*names, *(name for _, name in copied)) if name not in made.sums}
    made.notes += _without_side_files(base)
    held = (e.merged if isinstance(e, PlacedTensors) else e.merged or e.source for e in made.placed)
    receipt, accounts = accounting.of(filter(None, held))
    receipt = replace(receipt, checksums=dict(sorted(sums.items())), dispositions=dispositions.record())
    file = text_file(RECEIPT_FILE, receipt.text(2))
    made.files.append(file._replace(receipt=file.literals[0].data))
    layout = Layout(tuple(made.files), receipt, True, tuple(copied), made.pickle_bytes)
    return PlannedOutput(layout, made.placed, made.notes, dispositions=dispositions, accounts=accounts)


def _without_side_files(base: CheckpointIndex) -> list[str]:
    """Returns a note about the files beside a file that was given without its folder, if they belong to a model."""
    folder = base.path.parent
    if base.in_memory or base.path.is_folder() or base.container.path.is_folder():
        return []
    config = next((name for name in CONFIG_FILES if (folder / name).is_file()), None)
    if config is None:
        return []
    return [
        f"{config} and the other files beside {printable(base.path)} are not copied, since the input is a file; give its "
        "folder to have them too"
    ]


def _own_alignment(
    name: str, parts: dict[str, CheckpointIndex], part: CheckpointIndex, alignment: Alignment
) -> tuple[Alignment, Sequence[Merged]]:
    """Returns the tensors of one model of a folder under their names in that model; and the same tensors under the names
    that they have in the output."""
    if list(parts) == [""]:
        return replace(alignment, dispositions=Dispositions()), alignment.merged  # the same objects: there may be many
    whole = [m for m in alignment.merged if _home(m, parts) == name]
    if not whole:
        raise RecipeError(
            f"no tensor of {printable(name or part.path)} is left, so its loader would find no weights; keep some"
        )
    cut = len(name) + 1 if name else 0
    own = [
        replace(
            m,
            base_names=tuple(each[cut:] for each in m.base_names),
            spec=replace(m.spec, name=m.spec.name[cut:]),
            tied=tuple(each[cut:] for each in m.tied),
        )
        for m in whole
    ]
    shares = [(index.parts[name], weight) for index, weight in alignment.shares if name in index.parts]
    return replace(alignment, merged=own, shares=shares, dispositions=Dispositions()), whole


def _home(m: Merged, parts: dict[str, CheckpointIndex]) -> str:
    """Returns the model of a folder that a tensor belongs to. Raises RecipeError if it belongs to none."""
    written = (m.spec.name, *m.tied)
    for name in sorted(parts, key=len, reverse=True):
        if all(each.startswith(f"{name}/") for each in written) or not name:
            return name
    if m.added:
        raise RecipeError(
            f"{printable(m.spec.name)} belongs to a model that the first input lacks, which has {listed(sorted(parts))}; "
            "give an input that has it first, since its configuration is copied from there"
        )
    raise RecipeError(f"{printable(m.spec.name)} belongs to none of the subfolders {listed(sorted(parts))}; rename it")


_LINES = 4096
"""Lines of an index that are one literal, since all of them as one text would be held twice."""


def _index_file(name: str, total: int, index: dict[str, str]) -> LayoutFile:
    """Returns the index of a folder's files. ``total``: bytes of the tensors. ``index``: tensor -> file."""
    quoted = {file: _quoted(file) for file in set(index.values())}
    begin = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{'
    names, literals, cursor = sorted(index), list[Literal](), 0
    for start in range(0, max(len(names), 1), _LINES):
        lines = [f"\n    {_quoted(each)}: {quoted[index[each]]}" for each in names[start : start + _LINES]]
        last = start + _LINES >= len(names)
        text = ("" if start else begin) + ",".join(lines) + ("" if not last else "\n  }\n}\n" if names else "}\n}\n")
        data = (text if last else text + ",").encode()
        literals.append(Literal(cursor, data))
        cursor += len(data)
    return LayoutFile(name, cursor, {}, tuple(literals))


@dataclass(slots=True)
class _Folder:
    """The files of an output folder while they are planned."""

    recipe: Recipe
    indexes: Indexes
    dispositions: Dispositions
    files: list[LayoutFile] = field(default_factory=list)
    placed: list[Placed | PlacedTensors] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pickle_bytes: int = 0
    copied: Copies = field(default_factory=list)

    def add_part(
        self, name: str, part: CheckpointIndex, aligned: tuple[Alignment, Sequence[Merged]], folder: Location | None
    ) -> None:
        """Adds the files of one model: its tensors, its index, its configuration."""
        own, whole = aligned
        if _is_distributed(self.recipe, part):
            self._add_distributed(name, part, own, folder)
            return
        own_folder = folder_of(name, part)
        prefix, form = f"{own_folder}/" if own_folder else "", _form(self.recipe, part)
        place = folder and folder / own_folder
        moved = bool(own.restacked) or any(m.base_names[0] not in part.entries for m in unlike(own.merged) if not m.added)
        pickled = _is_pickled(self.recipe, part)
        flat = pickled and _is_flat(part)
        tied = set() if pickled else _tied_by_loader(own.merged, part.path)
        if tied:
            shown = listed(sorted(prefix + each for each in tied))
            self.notes.append(f"stored once, since a loader ties it by {CONFIG}: without {shown}")
        groups = self._groups(part, form, own, place, flat or not pickled, tied)
        outer = {id(m): each for m, each in zip(own.merged, whole, strict=True)} if own.merged is not whole else {}
        index: dict[str, str] = {}
        for file, members in groups.items():
            index |= dict.fromkeys(names_of(members), file)
            index.update((each, file) for m in unlike(members) if m.tied for each in m.tied if each not in tied)
            if pickled:
                written = replace(own, merged=members)
                self._add_pickled(name, prefix + file, part, written, flat and (moved or len(groups) > 1))
            elif isinstance(members, MergedTensors):
                self._add_columns(file, members, part)
            else:
                stored = [(spec, outer.get(id(m), m)) for m in members for spec in _stored(m, tied)]
                self._add_safetensors(name, prefix + file, stored, part)
        was = part.container.form
        if len(groups) > 1 or (was is not None and was.index and set(groups) <= {*was.files}):
            total = sum(m.spec.nbytes if pickled else _stored_bytes(m, tied) for _, m in named(own.merged))
            self.files.append(_index_file(prefix + form.index_name(), total, index))
        if place is not None and own_folder == name:
            self._add_config(prefix, place, part, own)

    def _add_distributed(self, name: str, part: CheckpointIndex, own: Alignment, folder: Location | None) -> None:
        """Adds the files of a checkpoint of several ranks, in the subfolder where the first input has them."""
        from streammerge.planning.outputs.distributed import distributed_files

        prefix, inner = f"{name}/" if name else "", ""
        place = folder / name if folder is not None and name else folder
        if place is not None and place in part.container.path.parents:
            inner = f"{part.container.path.relative_to(place)}/"
        made = distributed_files(self.recipe, part, own.merged, self.dispositions)
        first = len(self.files)
        self.files += [file._replace(name=prefix + inner + file.name) for file in made.files]
        self.placed += [replace(each, file=first + each.file) for each in made.placed]
        self.sums |= {prefix + inner + file: sums for file, sums in made.sums.items()}
        self.copied += [(path, prefix + inner + each) for path, each in made.copied]
        self.notes.append(
            f"the output is a distributed checkpoint as {printable(part.path)} is, from which training can go on; give "
            "`max_shard_size` for a folder of safetensors"
        )
        if place is not None:
            self._add_config(prefix, place, part, own)

    def _add_columns(self, name: str, merged: MergedTensors, part: CheckpointIndex) -> None:
        """Adds a file of these tensors."""
        names, kinds = merged.columns()
        file, starts = safetensors.plan_columns(name, names, kinds, metadata_of(self.recipe, part))
        self.sums[file.name] = blank_sums([kind.nbytes for kind in kinds])
        self.placed.append(PlacedTensors(merged, len(self.files), starts))
        self.files.append(file)

    def add_tokenizer(self, tokenizer: TokenizerFiles, tokenized: Tokenized | None, folder: Location | None) -> None:
        """Adds the edited files of a tokenizer, and the numbers of its tokens in generation_config.json."""
        edit = generation_edit(tokenized, folder) if tokenized is not None and folder is not None else None
        if edit is not None:
            tokenizer.files[GENERATION], said = edit
            self.notes.append(f"{GENERATION}: {said}")
        self.files += tokenizer.layouts()
        self.notes += tokenizer.notes
        self.pickle_bytes += sum(map(len, tokenizer.files.values()))
        self.dispositions.add("file", sorted(tokenizer.files), "edited", "by the tokens of the output")
        self.dispositions.add("file", [name for _, name in tokenizer.copied], "copied", "from the model of the tokenizer")
        gone = tokenizer.left - tokenizer.files.keys() - {name for _, name in tokenizer.copied}
        there = sorted(name for name in gone if folder is not None and (folder / name).is_file())
        self.dispositions.add("file", there, "dropped", "of another tokenizer than the output's")

    def add_card(self, record: Mapping[str, Any], origins: Mapping[str, CheckpointIndex], folder: Location) -> None:
        """Adds the model card. The first input's own card is about another model, so it stays behind."""
        base = travelling_names(self.recipe)[self.recipe.base_model] if self.recipe.base_model else None
        self.files.append(text_file(CARD_FILE, card_text(record, base, origins, library_of(folder))))
        if (folder / CARD_FILE).is_file():
            self.dispositions.add(
                "file", CARD_FILE, "dropped", "the card of the first input; the output has one of its own"
            )

    def _add_safetensors(
        self, model: str, name: str, stored: list[tuple[TensorSpec, Merged]], part: CheckpointIndex
    ) -> None:
        """Adds a file of some tensors of a model. ``stored``: each under its name in the file, and as it is merged."""
        file = safetensors.plan_layout(name, [spec for spec, _ in stored], metadata_of(self.recipe, part))
        prefix = f"{model}/" if model else ""
        self.sums[file.name] = blank_sums([spec.nbytes for spec, _ in stored])
        number = len(self.files)
        self.files.append(file)
        self.placed += [
            Placed(replace(spec, name=prefix + spec.name) if prefix else spec, m, number, file.offsets[spec.name])
            for spec, m in stored
        ]

    def _add_pickled(self, model: str, name: str, part: CheckpointIndex, own: Alignment, flat: bool) -> None:
        prefix = f"{model}/" if model else ""
        indexes = {each: index.parts.get(model, index) for each, index in self.indexes.items()}
        made = pickled_file(name, self.recipe, part, indexes, own, lambda sums, dispositions, held: {}, flat)
        self.sums[made.file.name] = made.sums
        number = len(self.files)
        self.files.append(made.file)
        self.placed += [
            replace(each, file=number, spec=replace(each.spec, name=prefix + each.spec.name)) if prefix or number else each
            for each in made.placed
        ]
        self.notes += [note for note in made.notes if note not in self.notes]
        self.dispositions.update(made.dispositions, prefix)
        self.pickle_bytes += made.pickle_bytes

    def _add_config(self, prefix: str, folder: Location, part: CheckpointIndex, own: Alignment) -> None:
        notes, dispositions = list[str](), Dispositions()
        files = config_files(folder, self.recipe, part, own, notes, dispositions)
        self.files += [file._replace(name=prefix + file.name) for file in files]
        self.notes += [f"{prefix}{note}" for note in notes]
        for each in dispositions:
            self.dispositions.add(each.thing, [prefix + name for name in each.names], each.fate, each.why)

    def _groups(
        self, part: CheckpointIndex, form: Form, own: Alignment, folder: Location | None, may_cut: bool, tied: set[str]
    ) -> dict[str, Sequence[Merged]]:
        """Returns file name -> tensors: the files of the first input, or files filled in order up to the largest size.

        ``tied``: names that are left out.
        """
        was, largest = part.container.form, self.recipe.output.max_shard_size
        indexed = form.stem in INDEXED or (was is not None and bool(was.index))
        if largest is not None and not (may_cut and indexed):
            name = form.files[0] if form.files else form.named()
            self.notes.append(f"{printable(name)} stays one file, since its loader reads no index of shards")
            largest = None
        by_file: dict[str, Sequence[Merged]] | None = None
        if was is not None and largest is None:
            by_file = {was.files[0]: own.merged} if len(was.files) == 1 else _by_file(part, was, own, folder)
        most = largest or (DEFAULT_SHARD_BYTES if may_cut and indexed else None)
        groups = list(by_file.values()) if by_file else _filled(own.merged, most, tied)
        if by_file and form is was:
            return by_file
        if not form.ending:
            form = replace(form, ending=".safetensors" if not part.container.pickled else ".bin")
        return {form.named(number, len(groups)): members for number, members in enumerate(groups, start=1)}


def _by_file(
    part: CheckpointIndex, form: Form, own: Alignment, folder: Location | None
) -> dict[str, Sequence[Merged]] | None:
    """Returns the tensors of each file of the first input, None if they are not in these files."""
    if folder is None or own.restacked:
        return None
    files = {folder / name: name for name in form.files}
    grouped: dict[str, list[int]] = {}
    home: str | None = None
    near: object = None
    for number, (added, path) in enumerate(_origins(part, own.merged)):
        if path is not near and not (added and home):  # an added tensor goes along with the one before it
            near, home = path, files.get(path)
        if home is None:
            return None
        grouped.setdefault(home, []).append(number)
    return {home: _taken(own.merged, numbers) for home, numbers in grouped.items()}


def _origins(part: CheckpointIndex, merged: Sequence[Merged]) -> Iterator[tuple[bool, Any]]:
    """Yields whether the first input lacks a tensor, and the file of it in the first input."""
    if not isinstance(merged, MergedTensors):
        yield from (_origin(part, m) for m in merged)
        return
    table = merged.views.tables[0]
    for made, row in zip(merged.made, merged.rows, strict=True):
        yield (False, table.paths[table.files[row]]) if isinstance(made, Way) else _origin(part, made)


def _origin(part: CheckpointIndex, m: Merged) -> tuple[bool, Any]:
    name = m.base_names[0]
    return m.added, part.homes[name] if name in part.homes else part.entries.get(name, m.sources[0]).begin[0]


def _taken(merged: Sequence[Merged], numbers: Iterable[int]) -> Sequence[Merged]:
    return merged.take(numbers) if isinstance(merged, MergedTensors) else [merged[number] for number in numbers]


def _filled(merged: Sequence[Merged], most_bytes: int | None, tied: set[str]) -> list[Sequence[Merged]]:
    """Returns the tensors in groups of at most ``most_bytes``, in their order; in one group without a limit."""
    if most_bytes is None:
        return [merged]
    grouped: list[list[int]] = [[]]
    filled = 0
    for number, (_, m) in enumerate(named(merged)):
        size = _stored_bytes(m, tied)
        if grouped[-1] and filled + size > most_bytes:
            grouped.append([])
            filled = 0
        grouped[-1].append(number)
        filled += size
    return [_taken(merged, numbers) for numbers in grouped]


def _tied_by_loader(merged: Sequence[Merged], path: Location) -> set[str]:
    """Returns the names that a loader ties to another one, so that a file of safetensors needs only that."""
    several = [m for m in unlike(merged) if m.tied]
    if not several:
        return set()
    ties = loader_ties(path)
    return {name for m in several for name, old in zip(m.tied, m.base_names[1:], strict=True) if ties(old, m.base_names[0])}


def _stored(m: Merged, tied: set[str]) -> list[TensorSpec]:
    """Returns a tensor under each of its names that a file of safetensors holds."""
    return [m.spec, *(TensorSpec(name, m.spec.dtype, m.spec.shape) for name in m.tied if name not in tied)]


def _stored_bytes(m: Merged, tied: set[str]) -> int:
    return m.spec.nbytes * (1 + len([name for name in m.tied if name not in tied])) if m.tied else m.spec.nbytes


def _is_flat(part: CheckpointIndex) -> bool:
    """Whether a pickle holds nothing but the tensors by name, so that they can be written in any number of files."""
    if part.format == "sharded PyTorch":
        return True
    chosen = part.selection.chosen
    items = mapping_items(part.extras)
    return len(chosen) == 1 and not chosen[0].path and items is not None and len(items) == len(part.selection.tensors)
