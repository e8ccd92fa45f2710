"""Tokenizer files of an output folder: edited in their text, or another model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder(name: str, tokens: list[str], files: dict[str, Any], rows: int | None = None) -> None:
    Path(name).mkdir()
    table = torch.arange(rows or len(tokens)).float()[:, None]
    save_file({"model.embed_tokens.weight": table}, f"{name}/model.safetensors", {"format": "pt"})
    vocab = {token: n for n, token in enumerate(tokens)}
    plain = {
        "version": "1.0",
        "truncation": None,
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    for file, content in ({"tokenizer.json": plain, "config.json": {"vocab_size": len(table)}} | files).items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            Path(name, file).write_text(text)


def merge(**more: Any) -> None:
    sm.merge(recipe={"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **more}, out="out/")


def test_only_the_added_tokens_of_a_tokenizer_change() -> None:
    decoder = {"0": {"content": "é", "special": True}}
    config = {"tokenizer_class": "X", "added_tokens_decoder": decoder, "z": [1]}
    (
        folder("a", ["é", "x"], {"tokenizer_config.json": config, "added_tokens.json": {"é": 0}}),
        folder("b", ["x", "é", "ñ"], {}),
    )
    merge(tokenizer_source="union")
    before, after = (Path(each, "tokenizer.json").read_text() for each in ("a", "out"))
    cut = after.index("[", after.index("added_tokens"))
    end = after.index("]", cut) + 1
    assert after[:cut] + "[]" + after[end:] == before
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    assert json.loads(after)["added_tokens"] == [{"id": 2, "content": "ñ", **flags}]
    made = json.loads(Path("out/tokenizer_config.json").read_text())
    assert made == config | {"added_tokens_decoder": decoder | {"2": {"content": "ñ", **flags}}}
    assert json.loads(Path("out/added_tokens.json").read_text()) == {"é": 0, "ñ": 2}
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 3


def test_tokens_without_a_row_leave_the_vocabulary_and_its_merges() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    tree = {"added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "c"]]}}
    folder("a", [], {"tokenizer.json": tree, "config.json": {"vocab_size": 4}}, rows=4), folder("b", ["a", "b"], {})
    merge(tokenizer_source="base")
    made = json.loads(Path("out/tokenizer.json").read_text())["model"]
    assert made["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3}
    assert made["merges"] == ["a b"]


def test_without_a_tokenizer_json_added_tokens_stand_beside_the_vocabulary() -> None:
    bare = {"tokenizer.json": None, "merges.txt": "#version: 0.2\n"}
    folder("a", ["a", "b"], bare | {"vocab.json": {"a": 0, "b": 1}}), folder("b", ["b", "<x>"], {})
    merge(tokenizer_source="union")
    assert json.loads(Path("out/added_tokens.json").read_text()) == {"<x>": 2}
    assert json.loads(Path("out/vocab.json").read_text()) == {"a": 0, "b": 1}


def test_numbers_of_tokens_in_configurations_follow_another_tokenizer() -> None:
    generation = {"eos_token_id": [1], "pad_token_id": 0}
    folder("a", ["x", "</s>"], {"generation_config.json": generation, "config.json": {"vocab_size": 2, "eos_token_id": 1}})
    folder("b", ["</s>", "y", "x"], {})
    merge(tokenizer_source="b")
    assert json.loads(Path("out/generation_config.json").read_text()) == {"eos_token_id": [0], "pad_token_id": 2}
    assert json.loads(Path("out/config.json").read_text()) == {"vocab_size": 3, "eos_token_id": 0}


def test_the_plan_says_what_added_tokens_are_worth() -> None:
    tree = {"added_tokens": [], "decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": 0}}}
    folder("a", [], {"tokenizer.json": tree}, rows=1), folder("b", ["a", "Ġthe", "ab"], {})
    plan = sm.plan(
        recipe={"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "tokenizer_source": "union"}, out="o/"
    )
    said = next(note for note in plan.notes if "tokens are added" in note)
    assert said.startswith("2 tokens are added to the tokenizer of ")
    assert "it can never produce 1 of them (Ġthe)" in said
    assert "1 ordinary one changes how it splits texts" in said


def test_a_file_has_no_room_for_a_new_vocabulary() -> None:
    folder("a", ["a"], {}), folder("b", ["b"], {})
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "tokenizer_source": "union"}
    plan = sm.plan(recipe=recipe, out="o.safetensors")
    assert [each for each in plan.warnings if "vocabulary with 1 new tokens is not written" in each]


@pytest.mark.parametrize("tokens", [{}, {"tokenizer_source": "base"}])
def test_chat_templates(tokens: dict[str, Any]) -> None:
    folder("a", ["a"], {"tokenizer_config.json": {"chat_template": "old", "x": 1}})
    folder("b", ["a"], {"chat_template.jinja": " {{ common }} "})
    folder("c", ["a"], {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ common }}"}]}})
    models = {"models": [{"model": each} for each in "abc"]}
    recipe = {"merge_method": "linear", **models, **tokens, "chat_template": "auto"}
    sm.merge(recipe=recipe, out="out/")
    assert Path("out/chat_template.jinja").read_text() == "{{ common }}"
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"chat_template": "{{ common }}", "x": 1}
    sm.merge(recipe=recipe | {"chat_template": "chatml"}, out="other/")
    assert "<|im_start|>" in Path("other/chat_template.jinja").read_text()
    sm.merge(["a/", "b/"], out="third/", chat_template="{{ messages[0]['content'] }}")
    assert Path("third/chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_special_tokens_are_those_of_the_tokenizer_that_the_output_has() -> None:
    """mergekit keeps the base's numbers, so a chat model with the other's tokenizer would not end its answers."""
    ours = {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    theirs = {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": [3, 1]}
    words = {"tokenizer_config.json": {"eos_token": {"content": "<end>"}, "pad_token": "<pad>", "bos_token": "<s>"}}
    tokens = ["<s>", "</s>", "<pad>", "<end>"]
    folder("a", tokens, {"config.json": ours, "generation_config.json": {"eos_token_id": 1, "pad_token_id": 9}})
    folder("b", tokens, {"config.json": theirs} | words)
    merge(tokenizer_source="b")
    assert json.loads(Path("out/config.json").read_text()) == ours | {"eos_token_id": [3, 1], "pad_token_id": 2}
    assert json.loads(Path("out/generation_config.json").read_text()) == {"eos_token_id": 3, "pad_token_id": 2}
