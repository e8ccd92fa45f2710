"""The number of each token, from every kind of file that tells it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from streammerge.checkpoints.tokens import entry, fingerprint, next_number, read_tokens
from streammerge.stores.locations import parse

VOCAB = {"a": 0, "b": 1, "Ġé": 2, "\"'\\": 3, "\U0001f600x": 4}


def read(path: Path, files: dict[str, str | bytes]) -> tuple[str, dict[str, int]]:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = read_tokens(parse(path))
    assert found is not None
    return found.kind, found.numbers


def tokenizer(**more: object) -> str:
    added = [{"id": 5, "content": "</s>", "special": True}, {"id": 0, "content": "a", "special": False}]
    return json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": VOCAB, "merges": ["a b"]}, **more})


def field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


PIECES = b"".join(field(1, field(1, each.encode()) + b"\x15\0\0\x80\x3f\x18\x03") for each in ("<unk>", "▁a", "b"))


@pytest.mark.parametrize(
    ("files", "kind", "numbers"),
    [
        ({"tokenizer.json": tokenizer()}, "tokenizers", VOCAB | {"</s>": 5}),
        ({"vocab.json": tokenizer()}, "tokenizers", VOCAB | {"</s>": 5}),
        (
            {"tokenizer.json": json.dumps({"model": {"type": "Unigram", "vocab": [["x", -1.5], ["y", 0]]}})},
            "tokenizers",
            {"x": 0, "y": 1},
        ),
        ({"vocab.json": json.dumps(VOCAB), "merges.txt": ""}, "numbers", VOCAB),
        ({"vocab.json": '{"a": 0}', "added_tokens.json": '{"<x>": 7}'}, "numbers", {"a": 0, "<x>": 7}),
        ({"vocab.txt": " \na\r\n\nb"}, "lines", {" ": 0, "a": 1, "": 2, "b": 3}),
        ({"symbols.json": '["_", "a", "_"]'}, "list", {"_": 0, "a": 1}),
        ({"tokens.txt": "a 3\n  4\n"}, "pairs", {"a": 3, " ": 4}),
        ({"tokenizer.model": PIECES + field(2, b"\x08\x01")}, "sentencepiece", {"<unk>": 0, "▁a": 1, "b": 2}),
        (
            {
                "tekken.json": json.dumps(
                    {
                        "config": {"default_num_special_tokens": 3, "default_vocab_size": 5},
                        "special_tokens": [{"rank": 1, "token_str": "<s>"}],
                        "vocab": [
                            {"rank": n, "token_bytes": base64.b64encode(b).decode()}
                            for n, b in enumerate((b"a", b"\xc3", b"z"))
                        ],
                    }
                )
            },
            "tekken",
            {"<SPECIAL_0>": 0, "<s>": 1, "<SPECIAL_2>": 2, "a": 3, "\udcc3": 4},
        ),
    ],
)
def test_kinds_of_files(files: dict[str, str | bytes], kind: str, numbers: dict[str, int], tmp_path: Path) -> None:
    assert read(tmp_path / "a", files) == (kind, numbers)


def test_loaders_add_what_only_the_configuration_names(tmp_path: Path) -> None:
    config = {
        "added_tokens_decoder": {"9": {"content": "<late>"}, "5": {"content": "</s>"}},
        "pad_token": {"content": "<pad>"},
        "extra_special_tokens": {"image_token": "<img>"},
        "additional_special_tokens": None,
        "bos_token": "a",
    }
    files = {"tokenizer.json": tokenizer(), "tokenizer_config.json": json.dumps(config)}
    assert read(tmp_path / "a", files)[1] == VOCAB | {"</s>": 5, "<late>": 6, "<pad>": 7, "<img>": 8}


def test_what_tells_no_tokens(tmp_path: Path) -> None:
    assert read_tokens(parse(tmp_path)) is None
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    assert read_tokens(parse(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("no JSON")
    with pytest.raises(ValueError, match="no vocabulary"):
        read_tokens(parse(tmp_path))


@pytest.mark.parametrize(
    ("tokens", "added", "number"), [(4, [], 4), (4, [0, 1], 4), (4, [4], 5), (4, [9], 10), (0, [2], 3), (4, [3], 4)]
)
def test_the_next_number(tokens: int, added: list[int], number: int) -> None:
    assert next_number(tokens, [entry(str(each), each) for each in added]) == number


@pytest.mark.parametrize(
    "text",
    [
        '{"model": {"vocab": {"a": 99999999999999}}}',
        '{"added_tokens": [{"id": 99999999999, "content": "x"}], "model": {"vocab": {"a": 0}}}',
        '{"model": {"vocab": {"a": 0',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": {"\\ud8": 0}}}',
        '{"model": ' * 5000,
    ],
)
def test_damaged_files_are_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"number|vocabulary|escape|Unterminated|\\u"):
        read_tokens(parse(tmp_path))


def test_odd_files_beside_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    deep = '{"added_tokens_decoder": {"x": {"content": "<x>"}, "1": 3}, "pad_token": 5, "extra_special_tokens": [[]]}'
    (tmp_path / "tokenizer_config.json").write_text(deep)
    (tmp_path / "added_tokens.json").write_text("[" * 100_000)
    found = read_tokens(parse(tmp_path))
    assert found is not None
    assert found.numbers == {"a": 0, "<x>": 1}


def test_equal_files_have_one_fingerprint(tmp_path: Path) -> None:
    for name, more in (("a", {}), ("b", {}), ("c", {"tokenizer_config.json": "{}"})):
        read(tmp_path / name, {"tokenizer.json": tokenizer(), **more})
    (tmp_path / "b/other.json").write_text("1")
    one, two, three = (fingerprint(parse(tmp_path / name)) for name in "abc")
    assert one == two != three
