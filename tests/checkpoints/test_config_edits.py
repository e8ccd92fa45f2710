"""What a configuration states of its weights: dtype, rows, a tied head."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.checkpoints.config import Config
from streammerge.checkpoints.config_edits import Edits, ties_somewhere


def edits(**tree: Any) -> Edits:
    return Edits(Config("config.json", tree=tree))


def values(made: Edits) -> dict[str, Any]:
    return {".".join(path): value for path, value in made.values.items()}


@pytest.mark.parametrize("all_alike", [True, False])
def test_the_dtype_is_stated_at_every_nesting(all_alike: bool) -> None:
    made = edits(
        dtype="float32",
        text_config={"torch_dtype": "torch.bfloat16", "inner_config": {"dtype": None}},
        vision_config={"dtype": "float16"},
        quantization_config={"dtype": "float32"},
        audio={"dtype": "auto"},
    )
    made.set_dtype("float16", all_alike)
    inner = {"text_config.torch_dtype": "torch.float16", "text_config.inner_config.dtype": "float16"}
    assert values(made) == {"dtype": "float16"} | (inner if all_alike else {})


def test_a_dtype_is_added_only_to_a_configuration_of_a_model() -> None:
    for tree, expected in (
        ({"model_type": "llama"}, {"torch_dtype": "float16"}),
        (
            {"model_type": "llava", "text_config": {"dtype": "float32"}},
            {"torch_dtype": "float16", "text_config.dtype": "float16"},
        ),
        ({"audio": {"sample_rate": 22050}}, {}),
    ):
        made = edits(**tree)
        made.set_dtype("float16", True)
        assert values(made) == expected


def test_a_dtype_that_no_tensor_has_is_told_and_stays() -> None:
    made = edits(torch_dtype="float32")
    made.compare_dtype(["bfloat16", "float16"])
    assert made.notes == [
        "config.json says torch_dtype float32, but the tensors are bfloat16, as in the first input; it stays"
    ]
    for tree in ({"dtype": "float16"}, {"dtype": None}, {}, {"dtype": "float32", "quantization_config": {}}):
        made = edits(**tree)
        made.compare_dtype(["bfloat16", "float16"])
        assert (made.notes, made.values) == ([], {})


@pytest.mark.parametrize(
    ("name", "tree", "expected"),
    [
        ("shared.weight", {"vocab_size": 64, "d_model": 64}, {"vocab_size": 70}),
        ("backbone.embeddings.weight", {"vocab_size": 64}, {"vocab_size": 70}),
        ("lm_head.weight", {"llm_config": {"vocab_size": 64}}, {"llm_config.vocab_size": 70}),
        ("embed.weight", {"a": {"b": {"vocab_size": 64}}, "vocab_size": 64}, {"a.b.vocab_size": 70, "vocab_size": 70}),
        ("emb_g.weight", {"model": {"n_vocab": 64, "num_symbols": 64}}, {"model.n_vocab": 70, "model.num_symbols": 70}),
        ("wpe.weight", {"n_positions": 64, "vocab_size": 64, "n_ctx": 64}, {"n_positions": 70, "n_ctx": 70}),
        ("token_type_embeddings.weight", {"type_vocab_size": 64, "vocab_size": 64}, {"type_vocab_size": 70}),
        ("embed_tokens.weight", {"type_vocab_size": 64, "vocab_size": 64}, {"vocab_size": 70}),
    ],
)
def test_rows_are_stated_wherever_they_were(name: str, tree: dict[str, Any], expected: dict[str, Any]) -> None:
    made = edits(**tree)
    made.set_rows({(64, 70): [name]}, lambda rows: False)
    assert (values(made), made.notes) == (expected, [])


def test_rows_that_other_embeddings_keep_are_told_apart_by_their_part() -> None:
    made = edits(text_config={"vocab_size": 64}, audio_config={"vocab_size": 64})
    made.set_rows({(64, 70): ["audio_tower.embed.weight"]}, lambda rows: rows == 64)
    assert values(made) == {"audio_config.vocab_size": 70}


def test_rows_that_are_stated_nowhere_are_told() -> None:
    made = edits(vocab_size=32)
    made.set_rows({(64, 70): ["embed.weight"]}, lambda rows: False)
    assert "states nowhere that embed.weight had 64 rows; now it has 70" in made.notes[0]
    made = edits(vocab_size=56)
    made.set_rows({(64, 70): ["embed.weight"], (56, 62): ["lm_head.weight"]}, lambda rows: False)
    assert (values(made), made.notes) == ({"vocab_size": 62}, []), "Mllama's embeddings have eight rows more than stated"


def test_labels_that_do_not_fit_are_told() -> None:
    """Other configurations that call the first labels otherwise, or disagree on the last one, tell nothing."""
    strangers = [{"id2label": {"0": "good", "1": "worse", "2": "odd"}}, {}, {"id2label": {"0": "good", "1": "bad"}}]
    apart = [{"id2label": {"0": "good", "1": "bad", "2": name}} for name in ("odd", "even")]
    for others in ([], strangers, apart, [{"id2label": {"0": "good", "1": "bad", "x": "odd"}}]):
        made = edits(id2label={"0": "good", "1": "bad"})
        made.set_labels({"classifier.weight": (2, 3), "pooler.weight": (5, 6)}, others)
        assert made.values == {}
        assert made.notes == [
            "id2label of config.json has 2 labels, but classifier.weight now has 3 rows; name the others there by hand"
        ]


def test_further_labels_are_those_of_the_model_that_the_rows_come_from() -> None:
    longer = {"id2label": {"0": "good", "1": "bad", "2": "odd"}, "label2id": {"odd": 2}}
    made = edits(id2label={"0": "good", "1": "bad"}, label2id={"good": 0, "bad": 1}, num_labels=2)
    made.set_labels({"classifier.weight": (2, 3)}, [{"id2label": {"0": "good", "1": "bad"}}, longer])
    assert values(made) == {
        "id2label": longer["id2label"],
        "label2id": {"good": 0, "bad": 1, "odd": 2},
        "num_labels": 3,
    }
    assert made.notes == []


def test_all_flags_are_taken_away() -> None:
    tree = {
        "tie_word_embeddings": True,
        "text_config": {"tie_word_embeddings": True},
        "other": {"tie_word_embeddings": False},
    }
    made = edits(**tree, vision_config={})
    made.untie()
    assert values(made) == {"tie_word_embeddings": False, "text_config.tie_word_embeddings": False}
    made = edits(model_type="gpt2")
    made.untie()
    assert values(made) == {"tie_word_embeddings": False}, "a loader ties where nothing is said"
    assert ties_somewhere(tree)
    assert not ties_somewhere({"other": {"tie_word_embeddings": False}})


def test_edits_are_described_by_their_keys() -> None:
    kinds = ["full_attention", "sliding_attention"] * 4
    made = edits(text_config={"layer_types": kinds, "depth": 8, "note": "x" * 99}, dtype="float32")
    made.values = {
        ("text_config", "layer_types"): kinds[:1],
        ("text_config", "depth"): 1,
        ("text_config", "added"): None,
        ("text_config", "note"): "y\n",
        ("dtype",): "float16",
    }
    was = f"(was {'x' * 40}...(99 characters))"
    assert made.described().split(", text_config.") == [
        "text_config.layer_types follows the layers (1 entries, was 8)",
        "depth is now 1 (was 8)",
        "added is now None",
        f"note is now y\\n {was}, dtype is now float16 (was float32)",
    ]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has quantization_config (bitsandbytes), but"),
        ({"text_config": {"quantization_config": {}}}, "has text_config.quantization_config, but"),
        ({"compression_config": {"format": "dense"}}, "has compression_config, but"),
    ],
)
def test_a_statement_about_codes_without_codes_is_told_and_stays(tree: dict[str, Any], words: str) -> None:
    made = edits(**tree)
    made.compare_codes(lambda: True)
    assert not made.notes
    made.compare_codes(lambda: False)
    assert [words in note for note in made.notes] == [True]
    assert made.values == {}
