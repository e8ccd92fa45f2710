"""Two tokenizers have one vocabulary if the same tokens have the same numbers, whatever else their files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streammerge.checkpoints.vocabularies import same_vocabulary, vocabulary_of
from streammerge.stores.locations import parse

BPE = {"added_tokens": [{"id": 3, "content": "</s>"}], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
Beside = tuple[Any, dict[str, str]]
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
        ((BPE, {}), (UNIGRAM, {}), True),
        ((UNIGRAM, {}), (UNIGRAM | {"added_tokens": [{"id": 9, "content": "x"}]}, {}), True),
        ((None, {"tokenizer.model": "m"}), (BPE, {"tokenizer.model": "m"}), True),
        ((None, {"tokenizer.model": "m"}), (None, {"tokenizer.model": "n"}), False),
        ((None, {"tokenizer.model": "m"}), (BPE, {}), None),
        (("no tokenizer", {}), ("no tokenizer", {}), True),
        (("no tokenizer", {}), ("none either", {}), False),
        ((None, {}), (None, {}), None),
        ((BPE, {}), (BPE | {"added_tokens": []}, {}), True),
        ((BPE, {}), (BPE | {"added_tokens": [{"id": 4, "content": "x"}]}, {}), True),
        ((BPE, {}), (BPE | {"added_tokens": [{"id": 4, "content": "</s>"}]}, {}), False),
        ((BPE, {}), (BPE | {"added_tokens": [{"id": 3, "content": "x"}]}, {}), False),
        ((BPE, {}), (BPE | {"model": {"vocab": {"a": 1, "b": 0}}}, {}), False),
        ((BPE, {}), (BPE | {"model": {"vocab": {"b": 1, "a": 0}, "merges": [["a", "b"]]}}, {}), True),
        ((BPE, {}), (BPE | {"model": {"vocab": {"a": 0}}}, {}), False),
        ((UNIGRAM, {}), ({"model": {"vocab": [["b", -1.0], ["a", -2.0]]}}, {}), False),
        ((UNIGRAM, {}), ({"model": {"unk_id": 0, "vocab": [["a", 0], ["b", 0]]}}, {}), True),
    ],
)
def test_vocabularies(
    one: tuple[Any, dict[str, str]], two: tuple[Any, dict[str, str]], same: bool | None, tmp_path: Path
) -> None:
    ours, theirs = (vocabulary_of(parse(folder(tmp_path / name, *each))) for name, each in (("a", one), ("b", two)))
    assert same_vocabulary(ours, theirs) is same
    assert same_vocabulary(theirs, ours) is same


def test_a_single_file_has_no_tokenizer(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", BPE, {"model.safetensors": ""})
    assert vocabulary_of(parse(path)) is not None
    assert vocabulary_of(parse(path / "model.safetensors")) is None


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("escaped", [True, False])
def test_a_long_vocabulary_is_read_in_blocks(
    indent: int | None, escaped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may hold quotes, braces and backslashes, and a block may end in any of them."""
    odd = ['"', "{", "}", "\\", '\\"', "[", "]", '"vocab": {', "\u0120a", "\U0001f600", ",", ": 3,", ""]
    words = {f"{word}{number}" if number else word: number + at for number in (0, 20, 40) for at, word in enumerate(odd)}
    for model in ({"vocab": words}, {"vocab": [[word, -1.5] for word in words]}):
        tree = {"added_tokens": [{"id": 99, "content": '"vocab": {'}], "model": {**model, "merges": [["}", "]"]]}}
        path = tmp_path / f"{type(model['vocab']).__name__}"
        folder(path, None, {"tokenizer.json": json.dumps(tree, ensure_ascii=escaped, indent=indent)})
        folder(tmp_path / f"{path.name}-plain", tree, {})
        plain = vocabulary_of(parse(tmp_path / f"{path.name}-plain"))
        for block in (64, 97, 1 << 20):
            monkeypatch.setattr("streammerge.checkpoints.vocabularies._BLOCK_BYTES", block)
            found = vocabulary_of(parse(path))
            assert found is not None
            assert plain is not None
            assert found.tokens == plain.tokens
            assert (found.tokens[0][0], found.tokens[1]) == (len(words), {99: '"vocab": {'})
