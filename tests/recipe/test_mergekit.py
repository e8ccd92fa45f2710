"""mergekit configurations have the same meaning as in mergekit 0.1.5.

``data/mergekit.json`` holds mergekit's own results on models of known numbers (see ``mergekit_cases.py``). If
``MERGEKIT_PYTHON`` names an interpreter with mergekit, both tools also merge real small architectures.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import mergekit_cases as cases
import pytest

import streammerge as sm
from streammerge.tensors.layers import is_before

EXPECTED = json.loads((Path(__file__).parents[1] / "data" / "mergekit.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    cases.write_models(folder)
    return folder


def test_every_case_was_run_by_mergekit() -> None:
    assert EXPECTED.keys() == cases.CASES.keys()


@pytest.mark.parametrize("case", cases.CASES)
def test_the_same_tensors_as_mergekit(case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "recipe.yml").write_text(cases.CASES[case])
    sm.merge(recipe=tmp_path / "recipe.yml", out=tmp_path / "out")
    made, expected = cases.read(tmp_path / "out"), EXPECTED[case]
    assert made.keys() == expected["tensors"].keys()
    for name, value in expected["tensors"].items():
        assert made[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == expected["layers"]


@pytest.mark.parametrize("case", cases.CASES)
def test_a_recipe_that_travelled_gives_the_same_bytes(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "recipe.yml").write_text(cases.CASES[case])
    sm.merge(recipe=tmp_path / "recipe.yml", out=tmp_path / "one")
    sm.merge(recipe=tmp_path / "one" / "streammerge.yaml", out=tmp_path / "two")
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert str(tmp_path).encode() not in b"".join(one.values())


def test_what_stands_before_the_layers_and_what_behind() -> None:
    """Checks names of architectures that can be sliced: embeddings are before the layers, norm and head behind them."""
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


_ARCHITECTURES = """
import sys, torch
from transformers import *
out, small = sys.argv[1], dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                               intermediate_size=24, max_position_embeddings=32)
kinds = {
    "llama": (LlamaForCausalLM, LlamaConfig(**small, num_key_value_heads=1)),
    "mistral": (MistralForCausalLM, MistralConfig(**small, num_key_value_heads=1)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**small, num_key_value_heads=1)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32)),
    "gemma": (GemmaForCausalLM, GemmaConfig(**small, num_key_value_heads=1, head_dim=8)),
    "bert": (BertForSequenceClassification, BertConfig(**small)),
}
for kind, (made, config) in kinds.items():
    torch.manual_seed(1)
    base = made(config)
    for number, name in enumerate(("base", "a", "b")):
        torch.manual_seed(number)
        model = made(config)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in model.parameters() if number else ():
                p.add_(torch.randn_like(p) * 0.02)
        model.save_pretrained(f"{out}/{kind}/{name}")
"""
_RUN = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
run_merge(config, sys.argv[2], MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
"""
_LIVE = {
    "ties": """
models:
  - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "slerp": """
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
merge_method: slerp
base_model: a
parameters: {t: [{filter: attn, value: [0, 0.5, 1]}, {value: 0.5}]}
dtype: float32
""",
    "linear": """
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}},
              {model: b, layer_range: [1, 3], parameters: {weight: 0.3}}]
  - sources: [{model: a, layer_range: [2, 3], parameters: {weight: 1}},
              {model: b, layer_range: [0, 1], parameters: {weight: 1}}]
merge_method: linear
dtype: float32
""",
}


@pytest.mark.skipif("MERGEKIT_PYTHON" not in os.environ, reason="MERGEKIT_PYTHON names no interpreter with mergekit")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "gemma", "bert"])
def test_real_architectures(
    kind: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    python = os.environ["MERGEKIT_PYTHON"]
    home = tmp_path_factory.getbasetemp() / "architectures"
    if not home.exists():
        subprocess.run([python, "-c", _ARCHITECTURES, str(home)], check=True, capture_output=True)
    monkeypatch.chdir(home / kind)
    for name, text in _LIVE.items():
        recipe = tmp_path / f"{name}.yml"
        recipe.write_text(text)
        subprocess.run([python, "-c", _RUN, str(recipe), str(tmp_path / "theirs" / name)], check=True, capture_output=True)
        (tmp_path / "ours").mkdir(exist_ok=True)
        sm.merge(recipe=recipe, out=tmp_path / "ours" / name)
        theirs, ours = (load_file(tmp_path / who / name / "model.safetensors") for who in ("theirs", "ours"))
        assert {n: (t.dtype, t.shape) for n, t in theirs.items()} == {n: (t.dtype, t.shape) for n, t in ours.items()}
        for n, tensor in theirs.items():
            error = (tensor.double() - ours[n].double()).abs().max() if tensor.numel() else 0.0
            assert error <= 1e-6 * max(float(tensor.abs().max()), 1e-3), (name, n)
