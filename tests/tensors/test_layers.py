"""Layers, by the names of tensors."""

from __future__ import annotations

import pytest

from streammerge.tensors.layers import Layer, depths, is_before, layer_of, position, renumbered, stacks

NAMES = ["emb.w", "m.layers.0.a.w", "m.layers.0.b.2.w", "m.layers.11.a.w", "vision.3.w", "norm.w"]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("m.layers.3.mlp.w", Layer("m.layers", 3, "mlp.w")),
        ("h.0.experts.7.w", Layer("h", 0, "experts.7.w")),
        ("h.007.w", Layer("h", 7, "w")),
        ("h.1000000.w", None),
        ("0.w", None),
        ("h.0", None),
        ("conv1.w", None),
        ("", None),
    ],
)
def test_the_first_number_between_dots_is_the_layer(name: str, layer: Layer | None) -> None:
    assert layer_of(name) == layer


def test_renumbering_changes_the_layer_and_nothing_else() -> None:
    assert renumbered("h.1.experts.1.w", 12) == "h.12.experts.1.w"
    for name in NAMES:
        layer = layer_of(name)
        if layer:
            assert layer_of(renumbered(name, 5)) == Layer(layer.stack, 5, layer.rest)
        else:
            assert renumbered(name, 5) == name


def test_depths_and_tensors_of_stacks() -> None:
    assert depths(NAMES) == {"m.layers": 12, "vision": 4}
    assert stacks(NAMES) == {"m.layers": 3, "vision": 1}
    assert (depths([]), stacks([])) == ({}, {})


def test_positions_are_those_of_a_gradient() -> None:
    assert [position(index, 5) for index in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert position(0, 1) == 1


def test_what_stands_before_the_layers_and_what_behind() -> None:
    """Names of architectures that can be sliced: embeddings come from the first slice, norm and head from the last."""
    before = (
        "model.embed_tokens.weight transformer.wte.weight transformer.wpe.weight bert.embeddings.word_embeddings.weight "
        "bert.embeddings.LayerNorm.weight gpt_neox.embed_in.weight transformer.word_embeddings.weight "
        "transformer.rotary_pos_emb.inv_freq transformer.relative_pe.slopes model.tok_embeddings.weight "
        "backbone.embeddings.weight transformer.embedding.word_embeddings.weight model.embedding_norm.weight"
    )
    behind = (
        "model.norm.weight lm_head.weight embed_out.weight transformer.ln_f.bias gpt_neox.final_layer_norm.weight "
        "vocab_projector.bias bert.pooler.dense.weight classifier.weight cls.predictions.bias output.weight score.weight "
        "lm_head.layer_norm.bias transformer.encoder.final_layernorm.weight transformer.output_layer.weight "
        "pre_classifier.bias "
        "backbone.norm_f.weight cls.predictions.transform.LayerNorm.weight"
    )
    assert all(map(is_before, before.split()))
    assert not any(map(is_before, behind.split()))
