"""A recipe may say whose tokenizer the output has, where that changes no number of the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm

BPE = {"added_tokens": [{"id": 3, "content": "</s>"}], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder(name: str, tokenizer: Any = BPE) -> str:
    Path(name).mkdir()
    save_file({"embed.weight": torch.full((4, 2), float(len(name)))}, f"{name}/model.safetensors", {"format": "pt"})
    Path(name, "tokenizer.json").write_text(json.dumps(tokenizer))
    return name


def recipe(**more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": "a"}, {"model": "bb"}], "parameters": {"weight": 1}, **more}


@pytest.mark.parametrize(
    "more",
    [
        {"tokenizer_source": "base"},
        {"tokenizer_source": "union"},
        {"tokenizer_source": "a"},
        {"tokenizer": {"source": "a"}},
        {"tokenizer": {}},
    ],
)
def test_one_vocabulary(more: dict[str, Any]) -> None:
    folder("a", BPE | {"padding": None}), folder("bb", BPE | {"truncation": {"max_length": 8}})
    plain, asked = sm.plan(recipe=recipe()), sm.plan(recipe=recipe(**more))
    assert asked.counts() == plain.counts()
    assert [note for note in asked.notes if "have one vocabulary" in note]
    assert not [note for note in plain.notes if "vocabulary" in note]
    sm.merge(recipe=recipe(**more), out="out/")
    assert json.loads(Path("out/tokenizer.json").read_text())["model"] == BPE["model"]


def test_a_tokenizer_that_only_one_model_has_is_that_of_all() -> None:
    folder("a"), folder("bb")
    Path("bb/tokenizer.json").unlink()
    plan = sm.plan(recipe=recipe(tokenizer_source="base"))
    assert [each for each in plan.warnings if "bb without a tokenizer: taken to have that of a" in each]
    Path("a/tokenizer.json").unlink()
    with pytest.raises(sm.RecipeError, match="a has no tokenizer that can be read"):
        sm.plan(recipe=recipe(tokenizer_source="base"))


def test_the_files_of_another_model() -> None:
    folder("a", BPE | {"padding": None}), folder("bb", BPE | {"truncation": {"max_length": 8}})
    Path("a/vocab.json").write_text("{}")
    Path("bb/chat_template.jinja").write_text("theirs")
    sm.merge(recipe=recipe(tokenizer_source="bb"), out="out/")
    assert Path("out/tokenizer.json").read_text() == Path("bb/tokenizer.json").read_text()
    assert Path("out/chat_template.jinja").read_text() == "theirs"
    assert not Path("out/vocab.json").exists()
    sm.verify("out/", sample="100%")


def test_a_name_has_no_effect() -> None:
    folder("a"), folder("bb")
    assert sm.plan(recipe=recipe(name="my-model")).counts() == {"linear": 1}


def test_a_merge_warns_of_tokens_with_other_numbers() -> None:
    folder("a"), folder("bb", BPE | {"model": {"vocab": {"a": 1, "b": 0}}}), folder("ccc", BPE | {"padding": None})
    warnings = sm.plan(["a", "bb", "ccc"]).warnings
    assert [each for each in warnings if "tokenizers" in each] == [
        "the tokenizers of a and bb give tokens other numbers, so rows of their embeddings that are merged belong to "
        'different tokens; `tokenizer_source="base"` brings them into one order'
    ]


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "warned"),
    [
        ("vocab.json", '{"a": 0, "b": 1}', '{"a": 0, "b": 1, "c": 2}', False),
        ("vocab.json", '{"a": 0, "b": 1}', '{\r\n"b": 1, "a": 0}', False),
        ("vocab.txt", "a\nb\n", "a\nb\nc\n", False),
        ("vocab.txt", "a\nb\n", "a\nc\n", True),
        ("tokenizer.json", json.dumps(BPE), json.dumps(BPE | {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}), False),
        ("added_tokens.json", '{"<x>": 2}', '{"<y>": 2}', True),
        ("added_tokens.json", '{"<x>": 2}', '{"<x>": 2, "<y>": 3}', False),
    ],
)
def test_a_vocabulary_that_goes_on_gives_no_token_another_number(name: str, ours: str, theirs: str, warned: bool) -> None:
    for path, text in (("a", ours), ("b", theirs)):
        folder(path)
        Path(path, "tokenizer.json").unlink()
        if name == "added_tokens.json":
            Path(path, "vocab.json").write_text('{"a": 0, "b": 1}')
        Path(path, name).write_text(text, newline="")
    assert any("tokenizers" in each for each in sm.plan(["a", "b"]).warnings) == warned


def test_the_files_that_tell_tokens_are_inputs() -> None:
    folder("a"), folder("bb", BPE | {"model": {"type": "BPE", "vocab": {"b": 0, "a": 1}, "merges": []}})
    sm.merge(recipe=recipe(tokenizer_source="base"), out="out/")
    assert "bb/tokenizer.json" in json.loads(Path("out/streammerge.json").read_text())["inputs"]
    sm.verify("out/", sample="100%")
    text = Path("bb/tokenizer.json").read_text()
    Path("bb/tokenizer.json").write_text(text.replace('"b": 0, "a": 1', '"a": 0, "b": 1'))
    with pytest.raises(sm.VerifyError, match=r"tokenizer\.json is not the file that was merged"):
        sm.verify("out/", sample="100%")


def test_a_merge_of_files_warns_of_the_vocabularies_beside_them() -> None:
    for name, vocab in (("a", {"x": 0, "y": 1}), ("b", {"y": 0, "x": 1}), ("c", {"x": 0, "y": 1})):
        Path(name).mkdir()
        for number in range(2):
            torch.save({"text_emb.weight": torch.ones(2, 2)}, f"{name}/{number}.pth")
        Path(name, "vocab.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    said = [each for each in sm.plan(["a/0.pth", "a/1.pth", "b/0.pth", "c/0.pth"]).warnings if "tokenizers" in each]
    assert len(said) == 1
    assert said[0].startswith("the tokenizers of a/0.pth and b/0.pth give tokens other numbers")


def _language_model(name: str, rows: int, **tokenizer: Any) -> None:
    folder(name, BPE | tokenizer)
    save_file({"model.embed_tokens.weight": torch.full((rows, 2), float(len(name)))}, f"{name}/model.safetensors")
    Path(name, "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))


_MORE = [{"id": number, "content": f"<t{number}>"} for number in range(3, 8)]


@pytest.mark.parametrize("words", [0, 100_000])  # a large vocabulary is not read, and its added tokens are
def test_tokens_without_a_row_are_told(words: int) -> None:
    more = [each | {"id": each["id"] + words} for each in _MORE]
    model = {"type": "BPE", "vocab": {f"word{number}": number for number in range(words)}, "merges": []}
    for name in ("a", "bb"):
        _language_model(name, words + 6, added_tokens=more, **({"model": model} if words else {}))
    said = [each for each in sm.plan(["a", "bb"]).notes if "tokens up to" in each]
    assert said == [
        f"the tokenizer of a numbers tokens up to {words + 7}, and model.embed_tokens.weight has {words + 6:,} rows: "
        'a text with <t6>, <t7> stops a program that loads the output; `tokenizer_source="base"` leaves such tokens out'
    ]
    for recipe in ({"tokenizer_source": "base"}, {"tokenizer_source": "union"}):
        sm.merge(["a", "bb"], out="out/", overwrite=True, **recipe)
        kept = {each["content"] for each in json.loads(Path("out/tokenizer.json").read_text())["added_tokens"]}
        assert kept == {"<t3>", "<t4>", "<t5>"}
    assert not [each for each in sm.plan(["out", "bb"]).notes if "tokens up to" in each]


def test_tokens_of_which_each_has_a_row_are_not_told() -> None:
    for name in ("a", "bb"):
        _language_model(name, 8, added_tokens=_MORE)
    assert not [each for each in sm.plan(["a", "bb"]).notes if "tokens up to" in each]
    Path("a/tokenizer.json").write_text("{")  # a file that cannot be read tells nothing
    assert not [each for each in sm.plan(["a", "bb"]).notes if "tokens up to" in each]
