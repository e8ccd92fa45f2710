"""The numbers of tokens in a configuration."""

from __future__ import annotations

from streammerge.checkpoints.config_tokens import renumbered, special, vocabulary_sizes


def test_sizes() -> None:
    assert vocabulary_sizes({"text_config": {"vocab_size": 9}, "vocab_size": 7, "x": {"vocab_size": True}}) == [7, 9]


def test_numbers_follow_their_tokens_and_others_stay() -> None:
    tree = {
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "bos_token_id": 3,
        "image_token_index": 1,
        "forced_eos_token_id": 9,
        "gpt_start_audio_token": 1,
        "gpt_start_text_token": 1,
        "bad_words_ids": [[1], [2, 1]],
        "num_tokens": 1,
        "text_config": {"eos_token_id": -1, "unk_token_id": 0},
        "tokenizer_class": "x",
    }
    new = {0: 0, 1: 5, 2: 4}
    edits, lost = renumbered(tree, lambda old: new.get(old, -1), {"bos_token_id": 8})
    assert edits == {
        ("eos_token_id",): [5, 4],
        ("bos_token_id",): 8,
        ("image_token_index",): 5,
        ("gpt_start_text_token",): 5,
        ("bad_words_ids",): [[5], [4, 5]],
    }
    assert lost == ["forced_eos_token_id"]


def test_special_tokens_of_another_model_are_those_that_it_states_or_names() -> None:
    tree = {"bos_token_id": 1, "eos_token_id": [1], "pad_token_id": 1, "sep_token_id": None, "text": {"unk_token_id": 1}}
    numbers: dict[str | int, int] = {"<p>": 7, 4: 4}
    found = special(
        tree, {"bos_token_id": 4, "eos_token_id": 9}, {"pad_token": "<p>"}, lambda token: numbers.get(token, -1)
    )
    assert found == {("bos_token_id",): 4, ("pad_token_id",): 7}
