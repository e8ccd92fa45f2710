"""Two tokenizers have one vocabulary if the same tokens have the same numbers, whatever else their files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streammerge.checkpoints.vocabularies import same_vocabulary, vocabulary_of
from streammerge.stores.locations import parse

BPE = {"added_tokens": [{"id": 3, "content": "</s>"}], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}


def folder(path: Path, tokenizer: Any, files: dict[str, str]) -> Path:
    path.mkdir()
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, text in files.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ((BPE, {}), (BPE, {}), True),
        ((BPE, {}), (BPE | {"padding": {"length": 8}}, {"merges.txt": "other"}), True),
        ((BPE, {}), (UNIGRAM, {}), False),
        ((UNIGRAM, {}), (UNIGRAM | {"added_tokens": [{"id": 9, "content": "x"}]}, {}), False),
        ((None, {"tokenizer.model": "m"}), (BPE, {"tokenizer.model": "m"}), True),
        ((None, {"tokenizer.model": "m"}), (None, {"tokenizer.model": "n"}), False),
        ((None, {"tokenizer.model": "m"}), (BPE, {}), False),
        (("no tokenizer", {}), ("no tokenizer", {}), True),
        ((None, {}), (None, {}), False),
    ],
)
def test_vocabularies(one: tuple[Any, dict[str, str]], two: tuple[Any, dict[str, str]], same: bool, tmp_path: Path) -> None:
    ours, theirs = (vocabulary_of(parse(folder(tmp_path / name, *each))) for name, each in (("a", one), ("b", two)))
    assert same_vocabulary(ours, theirs) is same
    assert same_vocabulary(theirs, ours) is same


def test_a_single_file_has_no_tokenizer(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", BPE, {"model.safetensors": ""})
    assert vocabulary_of(parse(path)) != {} == vocabulary_of(parse(path / "model.safetensors"))
