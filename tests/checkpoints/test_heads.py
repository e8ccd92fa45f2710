"""Heads that are tied to the embeddings in one model and separate in another, under any name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.heads import is_head, loader_ties
from streammerge.stores.locations import parse

Tensors = dict[str, torch.Tensor]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a.double() + b.double()) / 2).to(a.dtype)


def folder(name: str, tensors: Tensors, **config: Any) -> None:
    Path(name).mkdir()
    save_file({**tensors, "h.0.w": draw(1, 4)}, f"{name}/model.safetensors", {"format": "pt"})
    Path(name, "config.json").write_text(json.dumps(config))


def merged(*inputs: str) -> tuple[Tensors, dict[str, Any]]:
    sm.merge(list(inputs), "out/", overwrite=True)
    return load_safetensors(Path("out/model.safetensors")), json.loads(Path("out/config.json").read_text())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


NAMES = [
    ("transformer.wte.weight", "lm_head.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("shared.weight", "lm_head.weight"),
]


@pytest.mark.parametrize(("embedding", "head"), NAMES)
@pytest.mark.parametrize("tied_first", [True, False])
def test_tied_in_one_and_separate_in_the_other(embedding: str, head: str, tied_first: bool) -> None:
    folder("tied", {embedding: draw(2, 9, 4)}, tie_word_embeddings=True)
    folder("own", {embedding: draw(3, 9, 4), head: draw(4, 9, 4)}, tie_word_embeddings=False)
    made, config = merged(*(["tied", "own"] if tied_first else ["own", "tied"]))
    assert torch.equal(made[embedding], mean(draw(2, 9, 4), draw(3, 9, 4)))
    assert torch.equal(made[head], mean(draw(2, 9, 4), draw(4, 9, 4)))
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(("embedding", "head"), NAMES[:4])
@pytest.mark.parametrize("head_first", [True, False])
def test_stored_under_the_heads_name(embedding: str, head: str, head_first: bool) -> None:
    positions = {"transformer.wpe.weight": draw(9, 9, 4)}
    folder("head", {head: draw(2, 9, 4), **positions}, tie_word_embeddings=True)
    folder("embedding", {embedding: draw(3, 9, 4), **positions}, tie_word_embeddings=True)
    made, config = merged(*(["head", "embedding"] if head_first else ["embedding", "head"]))
    own = head if head_first else embedding
    assert made.keys() == {own, "h.0.w", *positions}
    assert torch.equal(made[own], mean(draw(2, 9, 4), draw(3, 9, 4)))
    assert config["tie_word_embeddings"] is True


def test_only_a_head_beside_a_model_with_both() -> None:
    embedding, head = NAMES[0]
    folder("head", {head: draw(2, 9, 4)}, tie_word_embeddings=True)
    folder("own", {embedding: draw(3, 9, 4), head: draw(4, 9, 4)}, tie_word_embeddings=False)
    made, _ = merged("own", "head")
    assert torch.equal(made[embedding], mean(draw(3, 9, 4), draw(2, 9, 4)))
    assert torch.equal(made[head], mean(draw(4, 9, 4), draw(2, 9, 4)))


@pytest.mark.parametrize("bin_first", [True, False])
def test_one_tensor_under_four_names(bin_first: bool) -> None:
    """T5: pytorch_model.bin has the tied tensor under all its names, safetensors has it once."""
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    folder("st", {"shared.weight": draw(2, 9, 4)})
    folder("bin", {})
    Path("bin/model.safetensors").unlink()
    torch.save({**dict.fromkeys(names, draw(3, 9, 4)), "h.0.w": draw(1, 4)}, "bin/pytorch_model.bin")
    sm.merge(["bin", "st"] if bin_first else ["st", "bin"], "out/")
    made = torch.load("out/pytorch_model.bin") if bin_first else load_safetensors(Path("out/model.safetensors"))
    assert torch.equal(made["shared.weight"], mean(draw(2, 9, 4), draw(3, 9, 4)))
    assert set(names if bin_first else names[:1]) <= set(made)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}])
def test_a_configuration_that_denies_the_tie(config: dict[str, Any]) -> None:
    embedding, head = NAMES[0]
    folder("denies", {embedding: draw(2, 9, 4)}, **config)
    folder("own", {embedding: draw(3, 9, 4), head: draw(4, 9, 4)})
    with pytest.raises(sm.MismatchError, match=r"lacks 1: lm_head\.weight"):
        sm.plan(["own", "denies"])


def test_names_of_heads() -> None:
    assert is_head("model.lm_head.weight")
    assert not is_head("blocks.0.proj_out.weight"), "a projection in a layer"
    assert not is_head("my_lm_head.weight")


TIED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("config", "names", "ties"),
    [
        ({"model_type": "llama", "tie_word_embeddings": True}, TIED, True),
        ({"model_type": "gpt2"}, ("transformer.wte.weight", "lm_head.weight"), True),
        ({"model_type": "bert"}, ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"), True),
        ({"model_type": "t5"}, ("shared.weight", "encoder.embed_tokens.weight"), True),
        ({"model_type": "llama", "tie_word_embeddings": False}, TIED, False),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": False}}, TIED, False),
        ({"model_type": "llama"}, ("a.weight", "b.weight"), False),
        ({"model_type": "llama"}, ("layers.0.embed_tokens.weight", "layers.1.embed_tokens.weight"), False),
        ({"audio": {}}, TIED, False),
        (None, TIED, False),
    ],
)
def test_what_a_loader_ties(config: dict[str, Any] | None, names: tuple[str, str], ties: bool) -> None:
    Path("m").mkdir()
    if config is not None:
        Path("m/config.json").write_text(json.dumps(config))
    tied = loader_ties(parse("m"))
    assert tied(*names) == tied(*reversed(names)) == ties


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("stem", ["", "model."])
@pytest.mark.parametrize("own_first", [True, False])
def test_tables_of_encoder_and_decoder_beside_the_shared_one(stem: str, own_first: bool, config: dict[str, Any]) -> None:
    """T5 and BART: a state dict that was gathered from a GPU holds the shared table once for each of its names."""
    tables = [f"{stem}{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    folder("own", {name: draw(2, 9, 4) for name in [*tables, "lm_head.weight"]}, model_type="t5", **config)
    folder("tied", {tables[0]: draw(3, 9, 4)}, model_type="t5", **config)
    made, written = merged(*(["own", "tied"] if own_first else ["tied", "own"]))
    for name in [*tables, "lm_head.weight"]:
        assert torch.equal(made[name], mean(draw(2, 9, 4), draw(3, 9, 4)))
    assert written == {"model_type": "t5", **config}, "T5 scales its outputs where head and embeddings are tied"


def test_a_table_is_not_taken_from_another_stem_or_without_a_configuration() -> None:
    folder("own", {"model.shared.weight": draw(2, 9, 4), "encoder.embed_tokens.weight": draw(2, 9, 4)}, model_type="t5")
    folder("tied", {"model.shared.weight": draw(3, 9, 4)}, model_type="t5")
    with pytest.raises(sm.MismatchError, match=r"tied lacks 1: encoder\.embed_tokens\.weight"):
        sm.plan(["own", "tied"])
    folder("a", {"shared.weight": draw(2, 9, 4), "encoder.embed_tokens.weight": draw(2, 9, 4)}, model_type="t5")
    folder("b", {"shared.weight": draw(3, 9, 4)})
    with pytest.raises(sm.MismatchError, match=r"b lacks 1: encoder\.embed_tokens\.weight"):
        sm.plan(["a", "b"])


@pytest.mark.parametrize("stem", ["cls.predictions.", "lm_head."])
@pytest.mark.parametrize("own_first", [True, False])
def test_heads_of_masked_language_models(stem: str, own_first: bool) -> None:
    """BERT and RoBERTa: head and bias are tied, and a state dict that was gathered holds both under two names."""
    table, names = "bert.embeddings.word_embeddings.weight", [f"{stem}decoder.weight", f"{stem}decoder.bias"]
    for name, seed in (("own", 2), ("tied", 3)):
        tensors = {table: draw(seed, 9, 4), f"{stem}bias": draw(seed, 9)}
        copies = {names[0]: draw(seed, 9, 4), names[1]: draw(seed, 9)} if name == "own" else {}
        folder(name, tensors | copies, model_type="bert")
    made, written = merged(*(["own", "tied"] if own_first else ["tied", "own"]))
    for name, shape in ((table, (9, 4)), (names[0], (9, 4)), (names[1], (9,)), (f"{stem}bias", (9,))):
        assert torch.equal(made[name], mean(draw(2, *shape), draw(3, *shape)))
    assert written == {"model_type": "bert"}
    Path("own/config.json").write_text('{"model_type": "bert", "tie_word_embeddings": false}')
    with pytest.raises(sm.MismatchError, match=r"decoder\.weight"):
        sm.plan(["own", "tied"])
