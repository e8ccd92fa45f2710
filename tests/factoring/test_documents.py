"""PEFT's configuration of an adapter that is made."""

from __future__ import annotations

import json
import re

import pytest

from streammerge.factoring.documents import Document, task_of


def test_ranks_that_differ_become_patterns() -> None:
    tree = json.loads(Document("base", "CAUSAL_LM", {"a.q", "a.v"}).text({"a.q": 8, "a.v": 2}, ["norm"], True))
    assert (tree["r"], tree["lora_alpha"], tree["rank_pattern"], tree["alpha_pattern"]) == (8, 8, {"a.v": 2}, {"a.v": 2})
    assert (tree["target_modules"], tree["modules_to_save"], tree["bias"]) == (["a.q", "a.v"], ["norm"], "lora_only")
    assert (tree["base_model_name_or_path"], tree["task_type"], tree["fan_in_fan_out"]) == ("base", "CAUSAL_LM", False)
    fixed = json.loads(Document(alpha=4.0).text({"a.q": 8, "a.v": 2}, [], False))
    assert (fixed["lora_alpha"], fixed["alpha_pattern"], fixed["modules_to_save"]) == (4.0, {}, None)


def test_a_name_that_ends_others_is_matched_whole() -> None:
    modules = {"q", "a.q", "b.v"}
    tree = json.loads(Document(modules=modules).text({"q": 4, "b.v": 2}, [], False))
    assert [name for name in modules if re.fullmatch(tree["target_modules"], name)] != []
    assert {name for name in modules if re.fullmatch(tree["target_modules"], name)} == {"q", "b.v"}
    both = json.loads(Document(modules=modules).text({"q": 4, "a.q": 2}, [], False))
    assert both["rank_pattern"] == {"a.q": 2}
    other = json.loads(Document(modules=modules).text({"q": 2, "a.q": 4}, [], False))
    assert other["rank_pattern"] == {"^q": 2}


@pytest.mark.parametrize(
    ("tree", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "CAUSAL_LM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "CAUSAL_LM"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "SEQ_2_SEQ_LM"),
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"a": 1}}, None),
        ({"architectures": ["BertModel"]}, None),
        ({"architectures": "x"}, None),
        ({}, None),
    ],
)
def test_the_task_follows_from_the_architecture(tree: dict[str, object], task: str | None) -> None:
    assert task_of(tree) == task


def test_ties_are_kept_where_peft_knows_them() -> None:
    document = Document(tied=["model.embed_tokens", "wte"])
    assert json.loads(document.text({"a": 1}, ["model.embed_tokens"], False))["ensure_weight_tying"] is True
    assert "ensure_weight_tying" not in json.loads(document.text({"a": 1}, ["wte"], False))
