"""Reads which token has which number from the files beside a checkpoint's weights.

Files of tokenizers can have tens of megabytes. A ``tokenizer.json`` is read in blocks, and nothing of it is kept but its
tokens and what stands before them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from streammerge.checkpoints.config import config_folder
from streammerge.stores.base import Location

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
VOCABULARY_FILES = (
    *(TOKENIZER, "vocab.json", "vocab.txt", "tekken.json", "tokenizer.model", "spiece.model"),
    *("symbols.json", "symbols.txt", "tokens.txt"),
)
"""Files that tell the tokens, the one that loaders prefer first."""
TOKENIZER_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", ADDED_TOKENS, "vocab.json", "merges.txt", "vocab.txt"),
    *("tekken.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm"),
    *("chat_template.jinja", "chat_template.json", "symbols.json", "symbols.txt", "tokens.txt"),
)
"""All files that belong to a tokenizer."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MOST_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20
_MOST_SMALL_BYTES = 32 << 20
_MOST_TOKENS = 1 << 24
_WORD = rb'"((?:[^"\\]|\\.)*)"'
_VOCABULARY = re.compile(rb'(?<!\\)"vocab"\s*:\s*([\[{])')
_ENTRIES = {
    b"{": re.compile(rb"\s*,?\s*(?:" + _WORD + rb"\s*:\s*(\d+)(?=\s*[,}])|})"),
    b"[": re.compile(rb"\s*,?\s*(?:\[\s*" + _WORD + rb"\s*,\s*([-+.\deE]+)\s*\]|\])"),
}
"""The next entry of a vocabulary, or its end: a token with its number, or a token with its score."""
_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)

Added = dict[str, Any]
"""An added token as a tokenizer.json has it: its ``content``, its ``id``, and the flags of FLAGS."""


@dataclass(slots=True)
class Tokens:
    """The vocabulary of one model. ``numbers``: token -> its number. ``added``: those beside the vocabulary, by number.

    ``kind``: how the file tells them: ``tokenizers`` (a tokenizer.json under any name), ``numbers`` (a JSON mapping),
    ``list`` (a JSON list), ``lines``, ``pairs`` (lines of a token and its number), ``sentencepiece`` or ``tekken``.
    ``ordinary``: how many tokens the vocabulary has without the added ones. ``steps``: normalizer, pre_tokenizer, decoder
    and model type of a tokenizer.json, as plain data.
    """

    file: Location
    kind: str
    numbers: MutableMapping[str, int]
    added: list[Added] = field(default_factory=list)
    ordinary: int = 0
    steps: dict[str, Any] = field(default_factory=dict)
    read: list[Location] = field(default_factory=list)


def vocabulary_folder(path: Location) -> Location | None:
    """Returns the folder in which the vocabulary of a checkpoint stands; that of the file for a single file."""
    return config_folder(path) or (path.parent if path.is_file() else None)


def read_tokens(path: Location, numbers: Callable[[], MutableMapping[str, int]] = dict) -> Tokens | None:
    """Returns the tokens of a checkpoint, None if no file tells them. Raises ValueError for a file that cannot be read.

    ``numbers``: makes the mapping for the tokens of a tokenizer.json, of which there may be hundreds of thousands.
    """
    folder = vocabulary_folder(path)
    if folder is None:
        return None
    for name in VOCABULARY_FILES:
        file = folder / name
        if not file.lexists() or not file.is_file() or file.size > MOST_BYTES:
            continue
        try:
            found = _read(file, numbers)
            if found is None or not found.numbers:
                continue
            found.read.append(file)
            _add_beside(folder, found)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON of another form
            raise ValueError(f"{file.name} is no file of a tokenizer as they are known") from error
        if isinstance(found.numbers, dict):
            _check_number(max(found.numbers.values()))
        return found
    return None


def last_tokens(folder: Location) -> dict[str, int]:
    """Returns the tokens with the highest numbers, with these: the added ones of a large vocabulary, all of a small one.

    To read all of a large vocabulary takes a third of a second. Raises ValueError for a file that cannot be read.
    """
    file = folder / TOKENIZER
    if not file.is_file() or file.size <= _BLOCK_BYTES:
        small = all(not (at := folder / name).is_file() or at.size <= _BLOCK_BYTES for name in VOCABULARY_FILES)
        found = read_tokens(folder) if small else None
        return dict(found.numbers) if found is not None else {}
    head = file.read(0, _BLOCK_BYTES)
    begin = _VOCABULARY.search(head)
    return {each["content"]: each["id"] for each in added_in(head[: begin.start()] if begin else b"")}


def fingerprint(path: Location) -> bytes:
    """Returns a checksum of the files that tell a checkpoint's tokens. Equal ones mean equal tokens."""
    import hashlib

    made, folder = hashlib.sha256(), vocabulary_folder(path)
    files = () if folder is None else [folder / name for name in (*VOCABULARY_FILES, ADDED_TOKENS, TOKENIZER_CONFIG)]
    for file in files:
        if file.is_file() and (size := file.size) <= MOST_BYTES:
            made.update(f"\0{file.name}\0{size}\0".encode())
            for start in range(0, size, _BLOCK_BYTES):
                made.update(file.read(start, min(_BLOCK_BYTES, size - start)))
    return made.digest()


def entry(content: str, number: int, **flags: bool) -> Added:
    """Returns an added token as a tokenizer.json has it; by default an ordinary one."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": number, "content": content, **plain, **flags}


def next_number(tokens: int, added: list[Added]) -> int:
    """Returns the number that a tokenizer gives the next token that is added. ``tokens``: how many ordinary ones it has."""
    most = max((each["id"] for each in added), default=-1)
    return most + 1 if added and (most >= tokens or not tokens) else tokens


def _read(file: Location, numbers: Callable[[], MutableMapping[str, int]]) -> Tokens | None:
    if file.name.endswith(".json"):
        head = file.read(0, min(file.size, _BLOCK_BYTES))
        if file.name == TOKENIZER or re.search(rb'"(model|added_tokens|pre_tokenizer)"\s*:\s*[\[{]', head):
            return _of_tokenizers(file, numbers())
        return _of_json(file)
    if file.size > _MOST_SMALL_BYTES:
        return None
    data = file.read(0, file.size)
    if file.name.endswith(".txt"):
        return _of_lines(file, data.decode("utf-8-sig"))
    return _of_sentencepiece(file, data)


# ------------------------------------------------------------------------------------------------------ tokenizer.json


def vocabulary_entries(file: Location) -> tuple[bytes, Iterator[tuple[bytes, bytes]]]:
    """Returns what stands before the vocabulary of a tokenizer.json, and its tokens with their numbers, both as they are
    written. Raises ValueError for any other file."""
    found = _entries(file)
    head, _ = next(found, (b"", b""))
    return head, found


def _entries(file: Location) -> Iterator[tuple[bytes, bytes]]:
    """Yields what stands before the vocabulary, then its entries."""
    kept, kind, count = b"", b"", 0
    size = file.size
    for start in range(0, size, _BLOCK_BYTES):
        kept += file.read(start, min(_BLOCK_BYTES, size - start))
        if not kind:
            begin = _VOCABULARY.search(kept)
            if begin is None:
                continue  # all that stands before it is small
            kind = begin[1]
            yield kept[: begin.start()], b""
            kept = kept[begin.end() :]
        end = 0
        while match := _ENTRIES[kind].match(kept, end):
            end, word = match.end(), match[1]
            if word is None:
                return
            yield word, match[2] if kind == b"{" else str(count).encode()
            count += 1
        kept = kept[end:]
        if len(kept) > 4 * _BLOCK_BYTES:
            break  # no entry is so long
    raise ValueError("it has no vocabulary that can be read")


def text_of(word: bytes) -> str:
    """Returns a token from its text in JSON, without the quotes."""
    if b"\\" in word:
        return str(json.loads(b'"' + word + b'"'))
    return word.decode()


def value_in(head: bytes, key: str) -> Any:
    """Returns the value of a key in the begin of a JSON mapping; None if it is not there."""
    found = re.search(rb'(?<!\\)"' + key.encode() + rb'"\s*:\s*', head)
    if found is None:
        return None
    try:
        return json.JSONDecoder().raw_decode(head[found.end() :].decode("utf-8", "surrogatepass"))[0]
    except ValueError:
        return None


def added_in(head: bytes) -> list[Added]:
    """Returns the added tokens in the begin of a tokenizer.json, in the order of their numbers."""
    found = value_in(head, "added_tokens")
    listed = found if isinstance(found, list) else []
    return sorted((each for each in listed if _is_added(each)), key=lambda each: int(each["id"]))


def _is_added(each: Any) -> bool:
    return isinstance(each, dict) and isinstance(each.get("content"), str) and _is_number(each.get("id"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_number(number: int) -> None:
    if number > _MOST_TOKENS:
        raise ValueError(f"a token has the number {number}")


def _of_tokenizers(file: Location, numbers: MutableMapping[str, int]) -> Tokens:
    head, found = vocabulary_entries(file)
    for word, written in found:
        number = int(written)
        _check_number(number)
        numbers[text_of(word)] = number
    ordinary, added = len(numbers), added_in(head)
    for each in added:
        _check_number(each["id"])
        if numbers.get(each["content"]) != each["id"]:
            numbers.pop(each["content"], None)
            numbers[each["content"]] = each["id"]
    steps = {name: value_in(head, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    kinds = re.findall(rb'"type"\s*:\s*"(BPE|Unigram|WordPiece|WordLevel)"', head)
    steps["model"] = kinds[-1].decode() if kinds else ""
    return Tokens(file, "tokenizers", numbers, added, ordinary, steps)


def _add_beside(folder: Location, tokens: Tokens) -> None:
    """Adds the tokens that only other files name: loaders add those that the vocabulary lacks."""
    named: dict[str, Added] = {}
    more = _mapping(folder / ADDED_TOKENS, tokens)
    if tokens.kind != "tokenizers":
        for content, number in more.items():
            if _is_number(number) and content not in tokens.numbers:
                tokens.numbers[content] = number
                tokens.added.append(entry(content, number))
    config = _mapping(folder / TOKENIZER_CONFIG, tokens)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, each in sorted(decoder.items(), key=lambda pair: int(pair[0]) if str(pair[0]).isdigit() else 0):
            if isinstance(each, dict) and isinstance(each.get("content"), str):
                flags = {flag: bool(each[flag]) for flag in FLAGS if flag in each}
                named[each["content"]] = entry(each["content"], int(number) if number.isdigit() else 0, **flags)
    for key in _SPECIAL:
        value = config.get(key)
        several = [*value.values()] if isinstance(value, dict) and "content" not in value else value
        for each in several if isinstance(several, list) else [several]:
            text = each.get("content") if isinstance(each, dict) else each
            if isinstance(text, str) and text:
                named.setdefault(text, entry(text, 0, normalized=False, special=True))
    for content, each in named.items():
        if content not in tokens.numbers:
            each["id"] = next_number(tokens.ordinary or len(tokens.numbers), tokens.added)
            tokens.numbers[content] = each["id"]
            tokens.added.append(each)


def _mapping(file: Location, tokens: Tokens) -> dict[str, Any]:
    """Returns a small JSON mapping; an empty one if it is not there, or is none."""
    if not file.is_file() or file.size > _MOST_SMALL_BYTES:
        return {}
    tokens.read.append(file)
    try:
        found = json.loads(file.read(0, file.size))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --------------------------------------------------------------------------------------------------------- other files


def _of_json(file: Location) -> Tokens | None:
    if file.size > _MOST_SMALL_BYTES * 2:
        return None
    found = json.loads(file.read(0, file.size))
    if isinstance(found, list) and all(isinstance(each, str) for each in found):
        return Tokens(file, "list", _numbered(found), ordinary=len(found))
    if isinstance(found, dict) and isinstance(found.get("vocab"), list) and isinstance(found.get("config"), dict):
        return _of_tekken(file, found)
    if isinstance(found, dict) and found and all(map(_is_number, found.values())):
        return Tokens(file, "numbers", found, ordinary=len(found))
    return None


def _numbered(tokens: list[str]) -> dict[str, int]:
    """Returns token -> its place. Of a token that stands there twice, the first place counts."""
    numbers: dict[str, int] = {}
    for number, token in enumerate(tokens):
        numbers.setdefault(token, number)
    return numbers


def _of_lines(file: Location, text: str) -> Tokens:
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    pairs = [line.rpartition(" ") for line in lines]
    if lines and file.name == "tokens.txt" and all(token and number.isdigit() for token, _, number in pairs):
        return Tokens(file, "pairs", {token: int(number) for token, _, number in pairs}, ordinary=len(pairs))
    return Tokens(file, "lines", _numbered(lines), ordinary=len(lines))


def _of_tekken(file: Location, found: dict[str, Any]) -> Tokens | None:
    config = found["config"]
    specials, size = config.get("default_num_special_tokens"), config.get("default_vocab_size")
    if not _is_number(specials) or not _is_number(size):
        return None
    numbers = {f"<SPECIAL_{number}>": number for number in range(specials)}
    for each in found.get("special_tokens") or ():
        numbers.pop(f"<SPECIAL_{each['rank']}>", None)
        numbers[each["token_str"]] = each["rank"]
    for each in found["vocab"][: size - specials]:
        token = base64.b64decode(each["token_bytes"])
        numbers[token.decode("utf-8", "surrogateescape")] = each["rank"] + specials
    return Tokens(file, "tekken", numbers, ordinary=len(numbers))


def _of_sentencepiece(file: Location, data: bytes) -> Tokens | None:
    """Reads a ModelProto: its field 1 is a piece, whose field 1 is its text. A piece's number is its place."""
    pieces: list[str] = []
    try:
        for number, value in _fields(data):
            if number == 1:
                text = next((each for inner, each in _fields(value) if inner == 1), b"")
                pieces.append(text.decode())
    except (ValueError, IndexError):
        return None
    return Tokens(file, "sentencepiece", _numbered(pieces), ordinary=len(pieces))


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the fields of a protobuf message that hold bytes. Raises ValueError for what is no such message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field reaches beyond the message")
            yield tag >> 3, data[at : at + length]
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("no such kind of field")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")
