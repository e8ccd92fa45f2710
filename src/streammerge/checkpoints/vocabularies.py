"""Compares the vocabularies of tokenizers beside the weights of language models.

Files of tokenizers can have tens of megabytes. They are read in blocks, and a vocabulary is kept as a checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from streammerge.checkpoints import tokens
from streammerge.checkpoints.config import config_folder
from streammerge.checkpoints.tokens import MOST_BYTES
from streammerge.stores.base import Location

_JSON = "tokenizer.json"
_FILES = (
    *("vocab.json", "merges.txt", "vocab.txt", "tekken.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm"),
)
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer. ``files``: name -> checksum. ``tokenizer``: its tokenizer.json, or None."""

    files: dict[str, bytes]
    tokenizer: Location | None

    @cached_property
    def tokens(self) -> tuple[tuple[int, int], dict[int, str]]:
        """Returns what the tokenizer.json says: the number of its tokens and the sum of checksums of each token with its
        number; and number -> token of those that stand beside them. No token if it cannot be read."""
        try:
            return _tokens(self.tokenizer) if self.tokenizer else ((0, 0), {})
        except (OSError, ValueError):
            return (0, 0), {}


def vocabulary_of(path: Location) -> Vocabulary | None:
    """Returns the vocabulary beside a checkpoint's weights; None if there is none that can be read."""
    folder = config_folder(path)
    if folder is None:
        return None
    files = dict[str, bytes]()
    for name in (_JSON, *_FILES):
        file = folder / name
        try:
            if file.is_file() and file.size <= MOST_BYTES:
                files[name] = _checksum(file)
        except OSError:
            continue
    return Vocabulary(files, folder / _JSON if _JSON in files else None) if files else None


def same_vocabulary(one: Vocabulary | None, two: Vocabulary | None) -> bool | None:
    """Whether two tokenizers agree: no token has two numbers, and no number has two tokens. None if their files do not
    tell."""
    if one is None or two is None:
        return None
    common = one.files.keys() & two.files.keys()
    if _JSON in common and one.files[_JSON] != two.files[_JSON]:
        (ours, added), (theirs, others) = one.tokens, two.tokens
        return ours == theirs and bool(ours[0]) and _agree(added, others)
    if _JSON in common:
        return True
    return all(one.files[name] == two.files[name] for name in common) if common else None


def _agree(one: dict[int, str], two: dict[int, str]) -> bool:
    numbers = {token: number for number, token in two.items()}
    return all(two.get(n, token) == token and numbers.get(token, n) == n for n, token in one.items())


def _blocks(file: Location) -> Iterator[bytes]:
    size = file.size
    for start in range(0, size, _BLOCK_BYTES):
        yield file.read(start, min(_BLOCK_BYTES, size - start))


def _checksum(file: Location) -> bytes:
    made = hashlib.sha256()
    for block in _blocks(file):
        made.update(block)
    return made.digest()


def _tokens(file: Location) -> tuple[tuple[int, int], dict[int, str]]:
    """Returns the tokens of a tokenizer.json as :class:`Vocabulary` holds them. Raises ValueError for any other file."""
    head, found = tokens.vocabulary_entries(file)
    added = {each["id"]: each["content"] for each in tokens.added_in(head)}
    count = total = 0
    for word, number in found:
        count, total = count + 1, (total + _mixed(word, number)) & ((1 << 64) - 1)
    return (count, total), added


def _mixed(word: bytes, number: bytes) -> int:
    if b"\\" in word:
        word = tokens.text_of(word).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(word + b"\0" + number, digest_size=8).digest(), "little")
