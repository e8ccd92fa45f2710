"""Compares the vocabularies of tokenizers beside the weights of language models."""

from __future__ import annotations

import json
from typing import Any

from streammerge.checkpoints.config import config_folder
from streammerge.stores.base import Location
from streammerge.strict_json import load_json

_JSON = "tokenizer.json"
_FILES = (
    *("vocab.json", "merges.txt", "vocab.txt", "tekken.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm"),
)
_MOST_BYTES = 256 << 20

Vocabulary = dict[str, Any]
"""File -> its content: bytes, or the numbers of its tokens."""


def vocabulary_of(path: Location) -> Vocabulary:
    """Returns what tells the tokens of a checkpoint's tokenizer; {} if there is none that can be read."""
    folder = config_folder(path)
    if folder is None:
        return {}
    found: Vocabulary = {}
    for name in (_JSON, *_FILES):
        data = _read(folder / name)
        if data is not None:
            found[name] = data
    if _JSON in found:
        found[_JSON] = _numbers(found[_JSON])
    return found


def same_vocabulary(one: Vocabulary, two: Vocabulary) -> bool:
    """Whether two tokenizers have the same tokens under the same numbers. False where the files do not tell."""
    if _JSON in one and _JSON in two:
        return bool(one[_JSON] == two[_JSON])
    common = one.keys() & two.keys()
    return bool(common) and all(one[name] == two[name] for name in common)


def _read(path: Location) -> bytes | None:
    try:
        return path.read(0, path.size) if path.is_file() and path.size <= _MOST_BYTES else None
    except OSError:
        return None


def _numbers(data: bytes) -> Any:
    """Returns the tokens of a tokenizer.json by their numbers, or its bytes if it has none."""
    try:
        tree = load_json(data.decode("utf-8"))
        vocabulary = tree["model"]["vocab"]
        if isinstance(vocabulary, list):  # of [token, score]
            vocabulary = {json.dumps(entry): number for number, entry in enumerate(vocabulary)}
        added = {each["content"]: each["id"] for each in tree.get("added_tokens") or ()}
        return {**vocabulary, **added}, tree["model"].get("merges")
    except (ValueError, KeyError, TypeError, AttributeError):
        return data
