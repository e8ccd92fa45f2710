"""What an adapter says about each module."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from adapters.arithmetic import Tensors, adapter_of, drawn, factors
from streammerge.adapters.modules import read_adapter

M = "lora_unet_down_blocks_0_x"


def test_factors_of_peft_have_the_scale_of_their_configuration() -> None:
    lora = factors("model.q", 8, 6, 2) | {"model.q.lora_B.bias": drawn(1, 8), "model.norm.weight": drawn(2, 6)}
    found = read_adapter(adapter_of(lora, config={"r": 2, "lora_alpha": 3, "lora_bias": True}))
    told = [(each.name, each.kind, each.parameter, each.scale, each.rank) for each in found.modules]
    assert told == [
        ("model.norm.weight", "saved", "weight", 1.0, 0),
        ("model.q", "lora", "weight", 1.5, 2),
        ("model.q", "bias", "bias", 1.5, 0),
    ]
    assert found.dialect == "PEFT"
    assert found.modules[1].keys == ("base_model.model.model.q.lora_A.weight", "base_model.model.model.q.lora_B.weight")
    assert found.modules[1].parts["B"].spec.shape == (8, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_an_alpha_is_divided_by_the_rank(dtype: torch.dtype) -> None:
    tensors = {f"{M}.lora_down.weight": drawn(1, 4, 6), f"{M}.lora_up.weight": drawn(2, 8, 4)}
    (module,) = read_adapter(adapter_of(tensors | {f"{M}.alpha": torch.tensor(6, dtype=dtype)})).modules
    assert (module.kind, module.scale, module.rank) == ("lora", 1.5, 4)
    (module,) = read_adapter(adapter_of(tensors, "without")).modules
    assert module.scale == 1.0


@pytest.mark.parametrize(
    ("tensors", "kind", "scale"),
    [
        ({"hada_w1_a": (8, 4), "hada_w1_b": (4, 6), "hada_w2_a": (8, 4), "hada_w2_b": (4, 6), "alpha": ()}, "loha", 0.5),
        ({"lokr_w1": (2, 2), "lokr_w2": (4, 3), "alpha": ()}, "lokr", 1.0),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 4), "lokr_w2_b": (4, 3), "alpha": ()}, "lokr", 0.5),
        ({"diff": (8, 6)}, "full", 1.0),
    ],
)
def test_kinds_of_lycoris(tensors: dict[str, tuple[int, ...]], kind: str, scale: float) -> None:
    made = {f"{M}.{name}": drawn(1, *shape) if shape else torch.tensor(2.0) for name, shape in tensors.items()}
    (module,) = read_adapter(adapter_of(made)).modules
    assert (module.kind, module.scale, module.name) == (kind, scale, M)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("a.lora.down.weight", "a.lora.up.weight"), "a"),
        (("a_lora.down.weight", "a_lora.up.weight"), "a"),
        (("a.processor.to_q_lora.down.weight", "a.processor.to_q_lora.up.weight"), "a.to_q"),
        (("a.processor.to_out_lora.down.weight", "a.processor.to_out_lora.up.weight"), "a.to_out.0"),
        (("a.lora_linear_layer.down.weight", "a.lora_linear_layer.up.weight"), "a"),
        (("a.lora_A", "a.lora_B"), "a"),
        (("a.lora_A.default.weight", "a.lora_B.default.weight"), "a"),
        (("base_model.model.a.base_layer.b.lora_A.weight", "base_model.model.a.base_layer.b.lora_B.weight"), "a.b"),
        (("cfm.base_model.model.a.lora_A.default.weight", "cfm.base_model.model.a.lora_B.default.weight"), "cfm.a"),
    ],
)
def test_every_dialect_names_its_module(keys: tuple[str, str], name: str) -> None:
    tensors = {keys[0]: drawn(1, 4, 6), keys[1]: drawn(2, 8, 4)}
    (module,) = read_adapter(adapter_of(tensors)).modules
    assert (module.name, module.kind, module.rank) == (name, "lora", 4)


@pytest.mark.parametrize("turned", [False, True])
def test_of_several_copies_of_a_whole_module_the_one_that_peft_loads_counts(turned: bool) -> None:
    """PEFT saves the embeddings of a resized vocabulary once as its whole module, and once for each part of that."""
    names = ["lm_head.weight", "lm_head.modules_to_save.weight", "lm_head.original_module.weight"]
    copies = {name: drawn(number, 9, 6) for number, name in enumerate(names)}
    older = {"score.modules_to_save.default.weight": drawn(5, 2, 6), "score.original_module.weight": drawn(6, 2, 6)}
    lora = factors("model.q", 8, 6, 2) | dict(sorted((copies | older).items(), reverse=turned))
    found = read_adapter(adapter_of(lora, config={"r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head", "score"]}))
    saved = {each.name: each.keys for each in found.modules if each.kind == "saved"}
    assert saved == {
        "lm_head.weight": ("base_model.model.lm_head.weight",),
        "score.weight": ("base_model.model.score.modules_to_save.default.weight",),
    }


def test_diffusers_puts_the_configuration_into_the_metadata() -> None:
    tensors = {"unet.a.lora_A.weight": drawn(1, 4, 6), "unet.a.lora_B.weight": drawn(2, 8, 4)}
    save_file(tensors, "x.safetensors", {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})})
    (module,) = read_adapter("x.safetensors").modules
    assert module.scale == 0.5


def test_the_scale_without_a_configuration_is_told() -> None:
    adapter = read_adapter(adapter_of({f"unet.{key}": each for key, each in factors("a", 8, 6).items()}))
    assert any("the scale of its updates is not known" in note for note in adapter.notes)


@pytest.mark.parametrize(
    ("config", "gone", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector", "lora_A.weight has no lora_magnitude_vector, and .* use_dora: true"),
        ({}, "", "has a lora_magnitude_vector, and .* use_dora: false"),
        ({"lora_bias": True}, "", "has no lora_B.bias"),
    ],
)
def test_what_some_modules_lack_is_an_error(config: dict[str, bool], gone: str, words: str) -> None:
    lora = factors("a", 8, 6) | factors("b", 8, 6)
    if "lora_bias" in config:
        lora |= {"b.lora_B.bias": drawn(3, 8)}
    else:
        lora |= {f"{name}.lora_magnitude_vector": drawn(3, 8) for name in "ab"}
    lora = {name: each for name, each in lora.items() if not gone or gone not in name or name.startswith("b")}
    with pytest.raises(sm.MismatchError, match=words):
        read_adapter(adapter_of(lora, config={"r": 4} | config))


def test_biases_that_the_configuration_does_not_tell_are_added_with_a_warning() -> None:
    found = read_adapter(adapter_of(factors("a", 8, 6) | {"a.lora_B.bias": drawn(3, 8)}, config={"r": 4}))
    assert any("PEFT would leave them out" in each for each in found.index.warnings)
    assert [each.kind for each in found.modules] == ["lora", "bias"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {f"{m}.{n}": drawn(1, 4, 4) for m in ("lora_a", "lora_b") for n in ("lora_up.weight", "lora_down.weight")}
            | {"lora_a.alpha": torch.tensor(2.0)},
            "lora_b has no alpha, and 1 other modules have one",
        ),
        ({f"{M}.lokr_{n}": drawn(1, 4, 4) for n in ("w1", "w1_a", "w1_b", "w2")}, "do not tell one update"),
        ({f"{M}.hada_{n}": drawn(1, 4, 4) for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")}, "do not tell one update"),
        ({f"{M}.alpha": torch.tensor(2.0), f"{M}.lora_up.weight": drawn(1, 8, 4)}, "no partner A"),
        ({f"{M}.alpha": torch.tensor(2.0), "x.diff": drawn(1, 2)}, "alpha has no factors beside it"),
        ({f"{M}.lora_down.weight": drawn(1, 4, 6), f"{M}.lora_up.weight": drawn(2, 8, 5)}, "no factors of one update"),
        (
            {f"{M}.lora_down.weight": drawn(1, 4, 6), f"{M}.lora_up.weight": drawn(2, 8, 4), f"{M}.diff": drawn(3, 8, 6)},
            "several kinds",
        ),
        (factors("a", 8, 6) | {"a.alpha": drawn(1, 2)}, "not one number"),
        (factors("a", 8, 6) | {"a.reshape_weight": drawn(1, 2)}, "which is no shape"),
        (factors("a", 8, 6) | {"a.reshape_weight": torch.tensor([8, 0])}, "which is no shape"),
        (factors("a", 8, 6) | {"a.reshape_weight": torch.zeros(3, 2, dtype=torch.bool)}, "no shape"),
        ({f"a.{n}.weight": drawn(1, 4, 4) for n in ("a1", "a2", "b1")}, "no partner b2"),
        ({f"a.{n}.weight": drawn(1, 4, 4) for n in ("a1", "a2", "b1", "b2", "bm")}, "a core of its own"),
        (factors("a", 8, 6) | {"base_model.model.a.lora_A.weight": drawn(1, 4, 6)}, "are the same factor of a"),
        ({"a.oft_blocks": drawn(1, 2, 2)}, "OFT"),
        ({"a.weight": drawn(1, 2, 2)}, "holds no factors"),
    ],
)
def test_factors_that_mean_nothing_are_errors(tensors: Tensors, words: str) -> None:
    with pytest.raises(sm.MismatchError, match=words):
        read_adapter(adapter_of(tensors))


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "TRAINABLE_TOKENS"])
def test_factors_of_another_kind_than_the_configuration_states_are_an_error(kind: str) -> None:
    with pytest.raises(sm.MismatchError, match=f"no factor of the kind {kind}"):
        read_adapter(adapter_of(factors("a", 8, 6), config={"peft_type": kind, "r": 4}))
    loha = {f"a.hada_w{n}_{h}": drawn(1, *((8, 4) if h == "a" else (4, 6))) for n in (1, 2) for h in "ab"}
    if kind != "LOHA":
        with pytest.raises(sm.MismatchError, match="no factor of the kind LORA"):
            read_adapter(adapter_of(loha, "other", config={"r": 4}))


def test_what_no_update_follows_from_is_refused_by_its_name_before_its_alpha() -> None:
    for parts, named in (
        ({"oft_blocks": drawn(1, 2, 2)}, "OFT or BOFT"),
        ({"q_layer.weight": drawn(1, 2, 6), "p_layer.weight": drawn(1, 8, 2), "lambda_layer": drawn(1, 1, 2)}, "T-LoRA"),
    ):
        with pytest.raises(sm.MismatchError, match=named):
            read_adapter(adapter_of({f"{M}.{part}": each for part, each in parts.items()} | {f"{M}.alpha": drawn(1)}))
    glora = adapter_of({f"lycoris_a.{part}.weight": drawn(1, 4, 4) for part in ("a1", "a2", "b1", "b2")}, "glora")
    with pytest.raises(sm.MismatchError, match=r"depends on the base \(GLoRA\)"):
        sm.merge([glora, glora], out="made.safetensors")
    with pytest.raises(sm.MismatchError, match="alpha is nan, so the update has no scale"):
        read_adapter(adapter_of(factors("a", 8, 6) | {"a.alpha": torch.tensor(torch.nan)}))
