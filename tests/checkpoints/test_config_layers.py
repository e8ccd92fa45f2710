"""A configuration follows layers that were moved. The oracle is what the programs' own classes make of each number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from streammerge.checkpoints.config_keys import PLACINGS
from streammerge.checkpoints.config_layers import Followed, Moved, follow

Config = dict[str, Any]
UP = [0, 1, 2, 3, 4, 2, 3, 4, 5]
"""Six layers, of which some are repeated: a stack that moves layers by 3."""


def followed(config: Config, layers: list[int], stack: str = "model.layers", before: int = 6) -> Followed:
    return follow(config, Moved(stack, before, [(config, number) for number in layers]), "config.json")


def changed(config: Config, layers: list[int], stack: str = "model.layers", before: int = 6) -> dict[str, Any]:
    found = followed(config, layers, stack, before)
    assert not found.unplaced
    return {".".join(path): value for path, value in found.edits.items()}


# ------------------------------------------------------------------------------------------------------- where it stands


@pytest.mark.parametrize(
    ("stack", "config", "keys"),
    [
        ("model.layers", {"num_hidden_layers": 6}, ["num_hidden_layers"]),
        ("transformer.h", {"n_layer": 6, "n_head": 6, "num_attention_heads": 6}, ["n_layer"]),
        ("transformer.h", {"num_layers": 6, "num_hidden_layers": 6}, ["num_layers", "num_hidden_layers"]),
        ("layers", {"n_layers": 6, "dim": 6}, ["n_layers"]),
        ("encoder.block", {"num_layers": 6, "num_decoder_layers": 6}, ["num_layers"]),
        ("decoder.block", {"num_layers": 6, "num_decoder_layers": 6}, ["num_decoder_layers"]),
        (
            "model.encoder.layers",
            {"encoder_layers": 6, "decoder_layers": 6, "num_hidden_layers": 6},
            ["encoder_layers", "num_hidden_layers"],
        ),
        (
            "model.decoder.layers",
            {"encoder_layers": 6, "decoder_layers": 6, "num_hidden_layers": 6},
            ["decoder_layers"],
        ),
        ("model.decoder.layers", {"num_hidden_layers": 6}, ["num_hidden_layers"]),
        ("bert.encoder.layer", {"num_hidden_layers": 6}, ["num_hidden_layers"]),
        (
            "decoder.bert.encoder.layer",
            {"encoder": {"num_hidden_layers": 6}, "decoder": {"num_hidden_layers": 6}},
            ["decoder.num_hidden_layers"],
        ),
        (
            "model.language_model.layers",
            {"text_config": {"num_hidden_layers": 6}, "vision_config": {"depth": 6}},
            ["text_config.num_hidden_layers"],
        ),
        (
            "visual.blocks",
            {"num_hidden_layers": 6, "vision_config": {"depth": 6, "num_heads": 6}},
            ["vision_config.depth"],
        ),
        (
            "vision_model.encoder.layers",
            {"text_config": {"num_hidden_layers": 6}, "vision_config": {"num_hidden_layers": 6}},
            ["vision_config.num_hidden_layers"],
        ),
        ("model.layers", {"llm_config": {"num_hidden_layers": 6}}, ["llm_config.num_hidden_layers"]),
        (
            "thinker.model.layers",
            {
                "thinker_config": {"text_config": {"num_hidden_layers": 6}, "audio_config": {"encoder_layers": 6}},
                "talker_config": {"num_hidden_layers": 6},
            },
            ["thinker_config.text_config.num_hidden_layers"],
        ),
        (
            "thinker.audio_tower.layers",
            {"thinker_config": {"text_config": {"num_hidden_layers": 6}, "audio_config": {"encoder_layers": 6}}},
            ["thinker_config.audio_config.encoder_layers"],
        ),
        (
            "vision_model.global_transformer.layers",
            {"vision_config": {"num_hidden_layers": 6, "num_global_layers": 6}},
            ["vision_config.num_global_layers"],
        ),
        (
            "transformer.resblocks",
            {"model_cfg": {"text_cfg": {"layers": 6, "heads": 6}, "vision_cfg": {"layers": 6}}},
            ["model_cfg.text_cfg.layers"],
        ),
    ],
)
def test_the_depth_is_stated_in_the_part_that_the_stack_is_in(stack: str, config: Config, keys: list[str]) -> None:
    assert changed(config, UP, stack) == dict.fromkeys(keys, 9)


@pytest.mark.parametrize(
    ("stack", "config"),
    [
        ("model.layers", {}),
        ("model.layers", {"num_hidden_layers": 7}),
        ("model.layers", {"num_hidden_layers": True, "depth": "6"}),
        ("visual.blocks", {"num_hidden_layers": 6, "vision_config": {"hidden_size": 6}}),
        ("model.layers", {"vision_config": {"num_hidden_layers": 6}}),
    ],
)
def test_a_depth_that_is_not_stated_is_told(stack: str, config: Config) -> None:
    found = followed(config, UP, stack)
    assert not found.edits
    assert found.notes == [f"config.json does not say how many layers {stack} has; set it there by hand if it should"]


# ------------------------------------------------------------------------------------------------------- lists and texts


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("layer_types", list("abcdef"), list("abcdecdef")),
        ("layers_block_type", list("abcdef"), list("abcdecdef")),
        ("intermediate_size", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 3, 4, 5, 6]),
        ("num_key_value_heads", [8, 8, 4, 4, 2, 2], [8, 8, 4, 4, 2, 4, 4, 2, 2]),
        ("activation_sparsity_pattern", [0.9, 0.9, 0, 0, 0, 0.5], [0.9, 0.9, 0, 0, 0, 0, 0, 0, 0.5]),
        ("no_rope_layers", [1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 0, 1, 1]),
        ("moe_layer_freq", [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("block_configs", [{"n": n} for n in range(6)], [{"n": n} for n in UP]),
        ("hybrid_override_pattern", "M*-M-M", "M*-M--M-M"),
        ("attn_layer_indices", [1, 4], [1, 4, 7]),
        ("moe_layers", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("mlp_only_layers", [0, 3], [0, 3, 6]),
        ("full_attn_idxs", [5], [8]),
        ("hybrid_layer_ids", [2], [2, 5]),
        ("cross_attention_layers", [0], None),
        ("moe_layers_enum", "3,4,5", "3,4,6,7,8"),
        ("slstm_at", [1], None),
        ("slstm_at", [4], [4, 7]),
        ("conv_dim", {str(n): n * n for n in range(6)}, {str(n): old * old for n, old in enumerate(UP)}),
        ("conv_dim", {str(n): n for n in range(5)}, None),
        ("attention_types", [[["global", "local"], 3]], [[["g", "l", "g", "l", "g", "g", "l", "g", "l"], 1]]),
        ("attention_types", [[["global", "local"], 2]], None),
        ("mlp_only_layers", [], None),
        ("no_entry_for_layers", list("abcde"), None),
        ("eos_token_id", [1, 2, 3, 4, 5, 6], None),
        ("architectures", list("abcdef"), None),
        ("image_mean", [0.5] * 6, None),
        ("ssm_multipliers", [0.5] * 6, None),
        ("hidden_act", "swiglu", None),
        ("deepstack_layers", [1, 9], None),
    ],
)
def test_lists_and_texts_with_an_entry_for_each_layer_and_numbers_of_layers(key: str, value: Any, expected: Any) -> None:
    for place in ((), ("text_config",)):
        if key == "attention_types" and expected:
            expected = [[["global" if each[0] == "g" else "local" for each in expected[0][0]], 1]]
        inner = {"num_hidden_layers": 6, key: value}
        config: Config = inner if not place else {"text_config": inner, key: [0] * 6}
        made = changed(config, UP)
        prefix = "".join(f"{each}." for each in place)
        assert made.pop(f"{prefix}num_hidden_layers") == 9
        assert made == ({f"{prefix}{key}": expected} if expected is not None else {})


def test_numbers_that_begin_at_one() -> None:
    """Kimi Linear's kda_layers and full_attn_layers stand in a mapping of their own and count from 1."""
    config = {"num_hidden_layers": 6, "linear_attn_config": {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5]}}
    made = changed(config, UP)
    assert made["linear_attn_config.full_attn_layers"] == [3, 6, 9]
    assert made["linear_attn_config.kda_layers"] == [1, 2, 4, 5, 7, 8]


def test_each_layer_is_what_its_own_checkpoint_says() -> None:
    one = {
        "num_hidden_layers": 2,
        "layer_types": ["a0", "a1"],
        "mlp_only_layers": [],
        "size": 1,
        "intermediate_size": [8, 9],
    }
    two = {"num_hidden_layers": 4, "layer_types": ["b0", "b1", "b2", "b3"], "mlp_only_layers": [3], "intermediate_size": 7}
    layers = [(one, 0), (two, 2), (two, 3), ({}, 1), ({}, 3)]
    made = follow(one, Moved("model.layers", 2, layers), "config.json").edits
    assert made == {
        ("num_hidden_layers",): 5,
        ("layer_types",): ["a0", "b2", "b3", "a1", "a1"],
        ("mlp_only_layers",): [2],
        ("intermediate_size",): [8, 7, 7, 9, 9],
    }


def test_layers_in_their_order_change_nothing() -> None:
    config = {"num_hidden_layers": 6, "layer_types": list("ababab"), "attn_layer_indices": [1], "attn_layer_period": 4}
    found = followed(config | {"attn_layer_offset": 1, "scale_depth": 1.4, "num_odd_layers": 6}, [0, 1, 2, 3, 4, 5])
    assert (found.edits, found.notes, found.unplaced) == ({}, [], [])


@pytest.mark.parametrize(("layers", "depth", "extra"), [([0, 1, 2, 3, 3, 4, 5], 6, 1), ([0, 1, 2], 3, 0), ([5], 0, 1)])
def test_layers_for_multi_token_prediction_are_not_in_the_depth(layers: list[int], depth: int, extra: int) -> None:
    """DeepSeek-V3: 61 layers, and the tensors of layer 61 are those of multi-token prediction."""
    config = {"num_hidden_layers": 5, "num_nextn_predict_layers": 1, "layer_types": list("abcde"), "swa": list("abcdef")}
    made = changed(config, layers)
    assert made.get("num_hidden_layers", 5) == depth
    assert made.get("num_nextn_predict_layers", 1) == extra
    assert made.get("layer_types", list("abcde")) == ["abcde"[n] for n in layers if n < 5]
    assert made["swa"] == ["abcdef"[n] for n in layers]
    assert "num_nextn_predict_layers (1)" in followed(config, [0, 5, 1]).refusal("config.json")


# ------------------------------------------------------------------------------------------- numbers that tell the kind

ORACLES: dict[str, Callable[[int, int, int], Any]] = {
    "attn_layer_period": lambda i, n, k: i % k == 1,
    "expert_layer_period": lambda i, n, k: i % k == 1,
    "decoder_sparse_step": lambda i, n, k: (i + 1) % k == 0,
    "encoder_sparse_step": lambda i, n, k: (i + 1) % k == 0,
    "interleave_moe_layer_step": lambda i, n, k: i in range(k - 1, n, k),
    "moe_layer_interval": lambda i, n, k: (i + 1) % k == 0,
    "moe_layer_start_index": lambda i, n, k: i >= k,
    "moe_layer_end_index": lambda i, n, k: i <= k,
    "moe_layer_freq": lambda i, n, k: i % k == 0,
    "moe_every_n_layers": lambda i, n, k: (i + 1) % k == 0,
    "first_k_dense_replace": lambda i, n, k: i < k,
    "num_dense_layers": lambda i, n, k: i < k,
    "full_attention_interval": lambda i, n, k: bool((i + 1) % k),
    "sliding_window_pattern": lambda i, n, k: bool((i + 1) % k),
    "_sliding_window_pattern": lambda i, n, k: bool((i + 1) % k),
    "global_attn_every_n_layers": lambda i, n, k: i % k == 0,
    "no_rope_layer_interval": lambda i, n, k: (i + 1) % k != 0,
    "max_window_layers": lambda i, n, k: i >= k,
    "num_kv_shared_layers": lambda i, n, k: i >= n - k,
    "layer_group_size": lambda i, n, k: (i + 1) % k == 0,
    "mb_per_layer": lambda i, n, k: i % k == 0,
    "block_types": lambda i, n, k: (i + 1) % k == 0,
    "_block_types": lambda i, n, k: (i + 1) % k == 0,
}
STACKS = [
    UP,
    [0, 1, 2, 3, 4, 5] * 2,
    [0, 1, 2, 3],
    [1, 2, 3, 4, 5],
    [2, 3, 4, 5],
    [0, 1, 2, 3, 3, 4, 5],
    [3, 4, 5, 3, 4, 5],
]


@pytest.mark.parametrize("key", sorted(PLACINGS))
@pytest.mark.parametrize("value", [1, 2, 3, 5])
@pytest.mark.parametrize("layers", STACKS)
def test_a_number_stays_or_changes_or_stops_the_stack(key: str, value: int, layers: list[int]) -> None:
    """Each layer is in the output what it was, or there is no output."""
    oracle = ORACLES[key]
    config = {"num_hidden_layers": 6, key: value}
    if PLACINGS[key].second:
        config[PLACINGS[key].second] = 1
    found = followed(config, layers)
    wanted = [oracle(number, 6, value) for number in layers]
    if found.unplaced:
        assert [oracle(i, len(layers), value) for i in range(len(layers))] != wanted
        if key in ("first_k_dense_replace", "num_kv_shared_layers", "max_window_layers"):
            alike = [[oracle(i, len(layers), k) for i in range(len(layers))] == wanted for k in range(20)]
            assert not any(alike), "no other number would do"
        (each,) = found.unplaced
        assert (each.path, each.value, each.number) == ((key,), value, layers[each.place])
        assert oracle(each.place, len(layers), value) != wanted[each.place]
        assert f"{key} ({value}) of config.json tells by a layer's number" in found.refusal("config.json")
    else:
        new = found.edits.get((key,), value)
        assert [oracle(i, len(layers), new) for i in range(len(layers))] == wanted


def test_the_advice_says_how_layers_may_move() -> None:
    config = {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 6}
    config["expert_layer_offset"] = 1
    found = followed(config, [0, 2, 3], before=8)
    assert found.refusal("config.json") == (
        "attn_layer_period (4) and expert_layer_period (6) of config.json tell by a layer's number what the layer is, and "
        "layer 1 of the output, which was layer 2, would be taken for another kind; move layers by multiples of 12 only"
    )
    assert "take other layers" in followed({"num_hidden_layers": 6, "first_k_dense_replace": 2}, [2, 1]).refusal("c")
    assert followed(config, list(range(8)), before=8).refusal("config.json") == ""


@pytest.mark.parametrize("value", [None, 0, "LLLG"])
def test_values_that_are_no_period(value: Any) -> None:
    found = followed({"num_hidden_layers": 6, "sliding_window_pattern": value}, UP)
    assert bool(found.unplaced) == isinstance(value, str), "the letters stand for layers 0 to 3, 4 to 7, and so on"
    assert not followed({"num_hidden_layers": 8, "sliding_window_pattern": value}, [*range(8)] * 2, before=8).unplaced


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window_pattern": 2, "sliding_window": None},
        {"max_window_layers": 3, "use_sliding_window": False},
        {"model_type": "llama"},
    ],
)
def test_numbers_that_no_loader_looks_at(config: Config) -> None:
    assert changed({"num_hidden_layers": 6, **config}, UP) == {"num_hidden_layers": 9}


def test_a_list_that_is_repeated() -> None:
    """RecurrentGemma: two recurrent blocks, then one with attention."""
    config = {"num_hidden_layers": 6, "block_types": ["recurrent", "recurrent", "attention"]}
    assert changed(config, UP) == {"num_hidden_layers": 9}
    assert "move layers by multiples of 3 only" in followed(config, [0, 1, 2, 5]).refusal("config.json")


def test_a_number_of_the_other_half_is_not_looked_at() -> None:
    config = {"num_layers": 6, "num_decoder_layers": 6, "encoder_sparse_step": 2, "decoder_sparse_step": 1}
    assert changed(config, [0, 2, 4], "decoder.block") == {"num_decoder_layers": 3}
    assert followed(config, [0, 2, 4], "encoder.block").unplaced


def test_a_list_is_believed_before_a_number() -> None:
    config = {"num_hidden_layers": 6, "sliding_window_pattern": 6, "layer_types": list("sssssf")}
    found = followed(config, UP)
    assert found.edits["layer_types",] == list("ssssssssf")
    assert found.notes == [
        "sliding_window_pattern of config.json no longer tells the same as layer_types, which follows the layers; a loader "
        "that does not know layer_types would place the layers wrongly"
    ]
    assert not followed(config, [*range(6)] * 2).notes


def test_numbers_that_a_program_takes_where_none_is_given() -> None:
    """Gemma 2 makes every second layer slide; its configurations of 2024 do not say so."""
    config = {"num_hidden_layers": 6, "model_type": "gemma2", "sliding_window": 4096}
    assert followed(config, UP).refusal("config.json").startswith("sliding_window_pattern (left out, so 2) of config.json")
    assert changed(config, [*range(6), *range(4, 6)]) == {"num_hidden_layers": 8}


def test_layers_that_share_blocks_are_not_moved() -> None:
    """Zamba's shared blocks have an adapter for each of the layers that use them, in the order of these layers."""
    config = {"num_hidden_layers": 6, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"] * 3}
    assert "num_mem_blocks of config.json (1): layers share blocks" in followed(config, [0, 2]).refusal("config.json")
    assert followed(config, list(range(6))).refusal("config.json") == ""


def test_keys_whose_meaning_is_not_known_are_named() -> None:
    config = {
        "num_hidden_layers": 6,
        "num_odd_layers": 6,
        "num_attention_heads": 6,
        "decoder_layers": 6,
        "scale_depth": 1.4,
    }
    notes = followed(config, [0, 1]).notes
    assert len(notes) == 2
    assert "num_odd_layers of config.json is 6, as the number of layers was" in notes[0]
    assert "scale_depth of config.json: the outputs of all layers are scaled by the number of layers" in notes[1]


def test_what_is_said_of_each_layer() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "a"], "mlp_only_layers": [0], "first_k_dense_replace": 3}
    before, after = followed(config, [0, 2, 2, 1], before=3).kinds
    assert [tuple(kind) for kind in after] == [tuple(before[n]) for n in (0, 2, 2, 1)]
    assert len({tuple(kind) for kind in before}) == 3
