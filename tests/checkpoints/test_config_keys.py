"""The lists of keys agree with each other."""

from __future__ import annotations

import re

import pytest

from streammerge.checkpoints import config_keys as keys


def test_placings_have_a_form_that_is_known() -> None:
    forms = {placing.form for placing in keys.PLACINGS.values()}
    assert forms == {"every", "from zero", "offset", "leading", "up to", "trailing"}
    assert all((placing.form == "offset") == bool(placing.second) for placing in keys.PLACINGS.values())
    assert all(key in keys.PLACINGS for implied in keys.IMPLIED.values() for key in implied)


@pytest.mark.parametrize(
    ("key", "matters"),
    [
        *((key, True) for key in ("rope_theta", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")),
        *((key, True) for key in ("layer_norm_epsilon", "hidden_act", "activation_function", "sliding_window", "n_head")),
        *((key, True) for key in ("logit_scale", "embedding_multiplier", "final_logit_softcapping", "scale_embedding")),
        *(
            (key, True)
            for key in ("num_experts_per_tok", "norm_topk_prob", "partial_rotary_factor", "sample_rate", "alibi")
        ),
        *((key, False) for key in ("transformers_version", "_name_or_path", "torch_dtype", "use_cache", "eos_token_id")),
        *((key, False) for key in ("vocab_size", "initializer_range", "attention_dropout", "max_position_embeddings")),
        *((key, False) for key in ("hidden_size", "tie_word_embeddings", "pad_token_id", "id2label", "top_k", "factor")),
        *((key, False) for key in ("router_aux_loss_coef", "layer_scale_init_value", "interaction", "theatre")),
    ],
)
def test_which_keys_change_the_arithmetic(key: str, matters: bool) -> None:
    assert (bool(re.search(keys.ARITHMETIC, key)) and not re.search(keys.NOT_ARITHMETIC, key)) == matters


@pytest.mark.parametrize(
    ("key", "vocabulary", "positions"),
    [
        ("vocab_size", True, False), ("n_vocab", True, False), ("type_vocab_size", True, False),
        ("gpt_number_text_tokens", True, False), ("num_embeddings", True, False), ("max_new_tokens", False, False),
        ("max_position_embeddings", False, True), ("n_ctx", False, True), ("hidden_size", False, False),
    ],
)  # fmt: skip
def test_which_keys_state_rows(key: str, vocabulary: bool, positions: bool) -> None:
    assert bool(re.search(keys.VOCABULARY, key)) == vocabulary
    assert bool(re.search(keys.POSITIONS, key)) == positions
