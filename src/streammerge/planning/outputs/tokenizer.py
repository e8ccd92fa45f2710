"""Plans the tokenizer files of an output folder, and its chat template.

Files are edited in their text: added tokens are put in, everything else stays.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from streammerge.checkpoints.config import Config, read_config, value_at
from streammerge.checkpoints.config_text import KeyPath, edited
from streammerge.checkpoints.config_tokens import GENERATION, renumbered, special
from streammerge.checkpoints.reachable import HOW_TO_COUNT, unreachable
from streammerge.checkpoints.tokens import (
    ADDED_TOKENS,
    FLAGS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    Added,
    Tokens,
    vocabulary_entries,
    vocabulary_folder,
)
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats.base import LayoutFile, Literal
from streammerge.planning.outputs.templates import BUILT_IN
from streammerge.planning.tokenizers import Vocabulary
from streammerge.planning.views import Indexes
from streammerge.planning.vocabularies import Tokenized
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location
from streammerge.units import counted, inflected

TEMPLATE = "chat_template.jinja"
_MOST_BYTES = 16 << 20


@dataclass(slots=True)
class TokenizerFiles:
    """``files``: those that are written. ``copied``: (source, name) of another model's. ``left``: names of files in the
    first input's folder that stay behind."""

    files: dict[str, bytes] = field(default_factory=dict)
    copied: list[tuple[Location, str]] = field(default_factory=list)
    left: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def layouts(self) -> list[LayoutFile]:
        return [LayoutFile(name, len(data), {}, (Literal(0, data),)) for name, data in self.files.items()]


def tokenizer_files(
    recipe: Recipe, indexes: Indexes, tokenized: Tokenized | None, folder: Location | None
) -> TokenizerFiles:
    """Returns what becomes of the tokenizer files. ``folder``: the first input's."""
    made = TokenizerFiles()
    if tokenized is not None:
        _add_vocabulary(made, tokenized, folder)
    if recipe.chat_template is not None:
        _add_template(made, recipe, indexes, folder)
    return made


def generation_edit(tokenized: Tokenized, folder: Location) -> tuple[bytes, str] | None:
    """Returns the text of generation_config.json in the numbers of the output's tokens, and what changes; None for no
    change."""
    config = read_config(folder, GENERATION)
    if config is None or config.unread:
        return None
    edits, _ = token_edits(config, tokenized)
    if not edits:
        return None
    said = ", ".join(f"{'.'.join(path)} is now {printable(value, 60)}" for path, value in edits.items())
    return edited(config.text, edits).encode(), said


def token_edits(config: Config, tokenized: Tokenized) -> tuple[dict[KeyPath, Any], list[str]]:
    """Returns the numbers of tokens that a configuration has to state, and a note about those that are gone."""
    before, giver = tokenized.before, vocabulary_folder(tokenized.vocabulary.giver.file.parent)
    theirs = read_config(giver, config.name)
    tree = theirs.tree if theirs and not theirs.unread else {}
    edits, notes = dict[KeyPath, Any](), list[str]()
    if min(before, default=0) < 0 or any(number != place for place, number in enumerate(before)):

        def number(old: int) -> int:
            return before[old] if old < len(before) else -1

        edits, lost = renumbered(config.tree, number, tree)
        notes = [f"{config.name}: {listed(lost)} name tokens that the output lacks; set them by hand"] if lost else []
    words = read_config(giver, TOKENIZER_CONFIG)
    for place, value in special(config.tree, tree, words.tree if words else {}, tokenized.vocabulary.number_of).items():
        now = edits.get(place, value_at(config.tree, place))
        if now != value and not (isinstance(now, list) and value in now):
            edits[place] = value
    return edits, notes


# ---------------------------------------------------------------------------------------------------------- vocabulary


def _add_vocabulary(made: TokenizerFiles, tokenized: Tokenized, folder: Location | None) -> None:
    vocabulary = tokenized.vocabulary
    home = vocabulary.giver.file.parent
    elsewhere = folder is None or home.absolute() != folder.absolute()
    if vocabulary.edited:
        _edit(made.files, vocabulary, home)
        made.notes += _worth(vocabulary)
    if not elsewhere:
        return
    for name in TOKENIZER_FILES:
        if name not in made.files and (home / name).is_file():
            made.copied.append((home / name, name))
    made.left = set(TOKENIZER_FILES)
    made.notes.append(f"the tokenizer's files are those of {printable(home)}")


def _worth(vocabulary: Vocabulary) -> list[str]:
    """Says what the added tokens are worth."""
    ordinary = [each for each in vocabulary.new if not each["special"] and each["normalized"]]
    some = f"{counted(len(vocabulary.new), 'token')} {inflected(len(vocabulary.new), 'is', 'are')}"
    said = f"{some} added to the tokenizer of {printable(vocabulary.giver.file.parent)}"
    if vocabulary.giver.kind != "tokenizers" or not vocabulary.new:
        return [said] if vocabulary.new else []
    dead = unreachable(vocabulary.giver.steps, vocabulary.new)
    if dead is None:
        return [f"{said}; {HOW_TO_COUNT}"]
    if dead:
        said += f"; it can never produce {len(dead)} of them ({listed(dead, 3)}), so their rows have no use"
    alive = len(ordinary) - len(set(dead) & {each["content"] for each in ordinary})
    if alive:
        change = "ordinary one changes" if alive == 1 else "ordinary ones change"
        said += f"; {alive} {change} how it splits texts that contain {'it' if alive == 1 else 'them'}"
    if dead or alive:
        said += ' (`tokenizer_source="base"` adds none)'
    return [said]


def _edit(files: dict[str, bytes], vocabulary: Vocabulary, home: Location) -> None:
    """Makes the edited files: the one that holds the vocabulary, and those that repeat the added tokens."""
    giver = vocabulary.giver
    own = _EDITORS.get(giver.kind)
    if own is not None and not (giver.kind == "numbers" and (home / "merges.txt").is_file()):
        files[giver.file.name] = own(giver, vocabulary)
    elif vocabulary.gone or giver.kind == "tekken":
        raise RecipeError(
            f"{printable(giver.file)} has to be edited, and only a tokenizer.json can be; write one there with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`, or use the base's"
        )
    more = {each["content"]: each["id"] for each in (*vocabulary.marked, *vocabulary.new)}
    beside = read_config(home, ADDED_TOKENS)
    if beside is not None or giver.file.name not in files:
        known = {token: number for token, number in (beside.tree if beside else {}).items() if token not in vocabulary.gone}
        files[ADDED_TOKENS] = _json(known | more)
    config = read_config(home, TOKENIZER_CONFIG)
    decoder = config.tree.get("added_tokens_decoder") if config else None
    if config is not None and isinstance(decoder, dict):
        gone = vocabulary.gone
        kept = {n: each for n, each in decoder.items() if not (isinstance(each, dict) and each.get("content") in gone)}
        added = {
            str(each["id"]): {"content": each["content"], **{flag: each[flag] for flag in FLAGS}} for each in vocabulary.new
        }
        files[TOKENIZER_CONFIG] = edited(config.text, {("added_tokens_decoder",): kept | added}).encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=True, indent=2) + "\n").encode()


def _edited_tokenizers(giver: Tokens, vocabulary: Vocabulary) -> bytes:
    """Returns a tokenizer.json with other added tokens. All other bytes stay, unless tokens leave its vocabulary."""
    file = giver.file
    listed_: list[Added] = [each for each in giver.added if each["content"] not in vocabulary.gone]
    listed_ = sorted([*listed_, *vocabulary.marked, *vocabulary.new], key=lambda each: int(each["id"]))
    data = file.read(0, file.size)
    head, _ = vocabulary_entries(file)
    place = head.find(b'"added_tokens"')
    if place < 0 or vocabulary.gone - {each["content"] for each in giver.added}:
        try:
            return _without(json.loads(data), vocabulary, listed_, file)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise RecipeError(
                f"{printable(file)} cannot be edited, since it is no tokenizer.json as they are known"
            ) from error
    begin = head.index(b"[", place)
    text = head[begin:].decode()
    length = len(text[: json.JSONDecoder().raw_decode(text)[1]].encode())
    dumped = json.dumps(listed_, ensure_ascii=True, indent=2).replace("\n", "\n  ").encode()
    return data[:begin] + dumped + data[begin + length :]


def _without(tree: dict[str, Any], vocabulary: Vocabulary, added: list[Added], file: Location) -> bytes:
    """Returns a tokenizer.json without the tokens that are gone."""
    model, gone = tree["model"], vocabulary.gone
    if isinstance(model["vocab"], list):
        if any(entry[0] in gone for entry in model["vocab"][: -len(gone)]):
            raise RecipeError(
                f"{printable(file)}: tokens without a row stand between others; give it embeddings with all rows"
            )
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] not in gone]
    else:
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in gone}
    if "merges" in model:
        model["merges"] = [each for each in model["merges"] if gone.isdisjoint(_merge(each))]
    return _json(tree | {"added_tokens": added})


def _merge(each: Any) -> tuple[str, ...]:
    """Returns the two tokens of a merge, and the one that they make."""
    one, two = each.split(" ", 1) if isinstance(each, str) else each
    return one, two, one + two


def _edited_lines(giver: Tokens, vocabulary: Vocabulary) -> bytes:
    data = giver.file.read(0, giver.file.size)
    lines = data.decode("utf-8").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    lines = [line for line in lines if line.removesuffix("\r") not in vocabulary.gone]
    return "".join(f"{line}\n" for line in (*lines, *(each["content"] for each in vocabulary.new))).encode()


def _edited_pairs(giver: Tokens, vocabulary: Vocabulary) -> bytes:
    lines = giver.file.read(0, giver.file.size).decode("utf-8").splitlines()
    kept = [line for line in lines if line.rpartition(" ")[0] not in vocabulary.gone]
    return "".join(f"{line}\n" for line in (*kept, *(f"{e['content']} {e['id']}" for e in vocabulary.new))).encode()


def _edited_numbers(giver: Tokens, vocabulary: Vocabulary) -> bytes:
    known = json.loads(giver.file.read(0, giver.file.size))
    known = {token: number for token, number in known.items() if token not in vocabulary.gone}
    return _json(known | {each["content"]: each["id"] for each in vocabulary.new})


def _edited_list(giver: Tokens, vocabulary: Vocabulary) -> bytes:
    known = [token for token in json.loads(giver.file.read(0, giver.file.size)) if token not in vocabulary.gone]
    return _json([*known, *(each["content"] for each in vocabulary.new)])


_EDITORS: dict[str, Callable[[Tokens, Vocabulary], bytes]] = {
    "tokenizers": _edited_tokenizers,
    "lines": _edited_lines,
    "pairs": _edited_pairs,
    "numbers": _edited_numbers,
    "list": _edited_list,
}


# ------------------------------------------------------------------------------------------------------- chat template


def _add_template(made: TokenizerFiles, recipe: Recipe, indexes: Indexes, folder: Location | None) -> None:
    asked = recipe.chat_template or ""
    text = _commonest(recipe, indexes) if asked == "auto" else BUILT_IN.get(asked, asked)
    if text is None:
        made.notes.append("chat_template: auto finds no template beside any model, so the output has none")
        return
    home = next((source.parent for source, name in made.copied if name == TOKENIZER_CONFIG), folder)
    made.files[TEMPLATE] = text.encode()
    made.copied = [(source, name) for source, name in made.copied if name != TEMPLATE]
    made.left |= {"chat_template.json"}
    made.copied = [(source, name) for source, name in made.copied if name != "chat_template.json"]
    if TOKENIZER_CONFIG in made.files:
        config_text = made.files[TOKENIZER_CONFIG].decode()
        tree = json.loads(config_text)
    else:
        config = read_config(home, TOKENIZER_CONFIG)
        config_text, tree = (config.text, config.tree) if config and not config.unread else ("", {})
        if config is None:
            made.notes.append(f"chat_template: there is no {TOKENIZER_CONFIG}, so a loader may look at no template")
    if "chat_template" in tree:
        made.files[TOKENIZER_CONFIG] = edited(config_text, {("chat_template",): text}).encode()
        made.copied = [(source, name) for source, name in made.copied if name != TOKENIZER_CONFIG]


def _commonest(recipe: Recipe, indexes: Indexes) -> str | None:
    """Returns the chat template of most models, of equally many the one that comes first in the recipe."""
    found = [template.strip() for index in indexes.values() if (template := template_of(index.path))]
    return Counter(found).most_common(1)[0][0] if found else None


def template_of(path: Location) -> str | None:
    """Returns the chat template of a model; None if it has none."""
    folder = vocabulary_folder(path)
    if folder is None:
        return None
    file = folder / TEMPLATE
    if file.is_file() and file.size <= _MOST_BYTES:
        return file.read(0, file.size).decode("utf-8", "replace")
    for name in ("chat_template.json", TOKENIZER_CONFIG):
        config = read_config(folder, name)
        value = config.tree.get("chat_template") if config else None
        if isinstance(value, list):
            named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
            value = named.get("default")
        if isinstance(value, str) and value:
            return value
    return None
