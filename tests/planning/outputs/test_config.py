"""The edited configurations of an output folder. The oracle is json, and what each program would read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, octets
from safetensors.torch import save_file

import streammerge as sm

Tensors = dict[str, torch.Tensor]
LLAMA = {"model_type": "llama", "torch_dtype": "float32", "vocab_size": 7, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder(name: str, config: dict[str, Any] | str, layers: int = 3, rows: int = 7, prefix: str = "model.") -> Tensors:
    """A model with as many layers; every second one has an expert."""
    make = torch.Generator().manual_seed(len(name))
    tensors = {f"{prefix}embed_tokens.weight": torch.randn(rows, 4, generator=make)}
    for n in range(layers):
        tensors[f"{prefix}layers.{n}.{'mlp' if n % 2 == 0 else 'experts'}.weight"] = torch.randn(3, 3, generator=make)
    Path(name).mkdir()
    save_file(tensors, f"{name}/model.safetensors", {"format": "pt"})
    Path(name, "config.json").write_text(config if isinstance(config, str) else json.dumps(config, indent=2))
    return tensors


def stack(spans: Sequence[tuple[str, int, int]], out: str = "out/", **recipe: Any) -> sm.MergeResult:
    slices = [{"sources": [{"model": model, "layer_range": [start, stop]}]} for model, start, stop in spans]
    return sm.merge(recipe={"merge_method": "passthrough", "slices": slices, **recipe}, out=out)


def text(name: str = "config.json") -> str:
    return Path("out", name).read_text()


def fates(fate: str) -> dict[str, str]:
    receipt = json.loads(text("streammerge.json"))
    return {name: each["why"] for each in receipt["dispositions"] if each["fate"] == fate for name in each["names"]}


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_dtype_is_edited_only_if_it_changes(tmp_path: Path, dtype: str | None) -> None:
    config = {"model_type": "llama", "torch_dtype": "float32", "rope_theta": 1e4}
    folder("in", config)
    made = sm.convert("in", "out", dtype=dtype)
    assert json.loads(text()) == config | ({"torch_dtype": dtype} if dtype else {})
    said = "torch_dtype is now float16 (was float32)"
    assert (f"config.json: {said}" in made.notes) == (dtype is not None)
    assert fates("edited") == ({"config.json": said} if dtype else {})


def test_a_text_keeps_all_that_is_not_edited() -> None:
    """Mamba 2 as transformers 4 wrote it: Infinity is not JSON, but Python reads and writes it."""
    written = (
        '{\n    "time_step_limit": [0.0, Infinity],\n  "eps": 1E-05, "num_hidden_layers": 3, "dtype":"float32", "x": NaN}'
    )
    folder("in", written)
    stack([("in", 0, 2), ("in", 0, 3)], dtype="bfloat16")
    assert text() == written.replace('layers": 3', 'layers": 5').replace("float32", "bfloat16")
    assert json.loads(text())["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("content", ["{not JSON", "[]", '{"a": "' + "x" * (16 << 20) + '"}'])
def test_what_cannot_be_edited_is_told(content: str) -> None:
    folder("in", content)
    note = next(note for note in stack([("in", 0, 3), ("in", 0, 2)], dtype="float16").notes if "config.json" in note)
    assert note.startswith("config.json is copied as it is, since it is ")
    assert note.endswith("; it should say: the dtype is float16; model.layers has 5 layers")
    assert text() == content
    assert not any("config.json" in note for note in sm.convert("in", "again").notes), "nothing was to be edited"


def test_the_dtype_follows_the_tensors() -> None:
    tensors = folder("in", LLAMA | {"vision_config": {"torch_dtype": "float32"}})
    rules = [{"match": "*", "dtype": "bfloat16"}]
    sm.merge(recipe={"models": [{"model": "in"}, {"model": "in"}], "merge_method": "linear", "rules": rules}, out="out/")
    made = json.loads(text())
    assert (made["torch_dtype"], made["vision_config"]["torch_dtype"]) == ("bfloat16", "bfloat16")
    rules = [{"match": "*layers.0*", "dtype": "float16"}]
    sm.merge(
        recipe={"models": [{"model": "in"}, {"model": "in"}], "merge_method": "linear", "rules": rules},
        out="out/",
        overwrite=True,
    )
    assert json.loads(text())["torch_dtype"] == "float32", "that of most elements"
    save_file({name: each.half() for name, each in tensors.items()}, "in/model.safetensors", {"format": "pt"})
    made_of_half = sm.merge(["in", "in"], "out/", overwrite=True)
    assert json.loads(text())["torch_dtype"] == "float32"
    assert any("says torch_dtype float32, but the tensors are float16" in note for note in made_of_half.notes)


@pytest.mark.parametrize(
    ("prefix", "config", "path"),
    [
        ("shared.", {"vocab_size": 7}, ("vocab_size",)),
        ("language_model.model.", {"llm_config": {"vocab_size": 7}}, ("llm_config", "vocab_size")),
        (
            "thinker.model.",
            {"thinker_config": {"text_config": {"vocab_size": 7}}},
            ("thinker_config", "text_config", "vocab_size"),
        ),
    ],
)
def test_the_vocabulary_grows_at_any_nesting(prefix: str, config: dict[str, Any], path: tuple[str, ...]) -> None:
    folder("a", config, prefix=prefix)
    folder("bb", config, rows=9, prefix=prefix)
    made = sm.merge(["a", "bb"], "out/", on_shape="rows")
    value = json.loads(text())
    for key in path:
        value = value[key]
    assert value == 9
    assert f"config.json: {'.'.join(path)} is now 9 (was 7)" in made.notes


def test_lists_of_a_hybrid_follow_the_stack() -> None:
    folder("in", LLAMA | {"num_hidden_layers": 4, "moe_layers": [1, 3], "hybrid_override_pattern": "-M-M"}, layers=4)
    made = stack([("in", 0, 3), ("in", 1, 4)])
    config = json.loads(text())
    assert (config["num_hidden_layers"], config["moe_layers"], config["hybrid_override_pattern"]) == (
        6,
        [1, 3, 5],
        "-M-M-M",
    )
    kinds = dict.fromkeys(config["moe_layers"], "experts")
    names = {f"model.layers.{n}.{kinds.get(n, 'mlp')}.weight" for n in range(6)}
    assert set(load_safetensors(Path("out/model.safetensors"))) == {"model.embed_tokens.weight", *names}
    assert not any("loader may expect" in note for note in made.notes)


def test_a_period_stops_a_stack_that_it_cannot_tell() -> None:
    config = LLAMA | {"num_hidden_layers": 4, "expert_layer_period": 2, "expert_layer_offset": 1}
    folder("in", config, layers=4)
    with pytest.raises(
        sm.RecipeError, match=r"^expert_layer_period \(2\) of config\.json tells by a layer's number"
    ) as error:
        stack([("in", 0, 3), ("in", 2, 4)])
    assert "layer 3 of the output, which was layer 2, would be" in str(error.value)
    assert "move layers by multiples of 2 only, or end the output's name in .safetensors" in str(error.value)
    assert not Path("out").exists()
    stack([("in", 0, 3), ("in", 2, 4)], out="out.safetensors")
    assert len(load_safetensors(Path("out.safetensors"))) == 6
    stack([("in", 0, 4), ("in", 2, 4)])
    assert json.loads(text()) == config | {"num_hidden_layers": 6}


def test_kinds_that_nothing_tells_are_told_by_what_the_tensors_are() -> None:
    folder("in", LLAMA | {"num_hidden_layers": 4}, layers=4)
    notes = [note for note in stack([("in", 0, 3), ("in", 2, 4)]).notes if "loader may expect" in note]
    assert notes == [
        "layer 3 of model.layers, which was layer 2, has no experts.weight, unlike what a loader may expect there: "
        "config.json does not tell"
    ]
    assert not any("loader may expect" in note for note in stack([("in", 0, 2), ("in", 0, 4)], out="b/").notes)


def test_layers_that_only_a_later_model_has_are_counted() -> None:
    kinds = ["a", "b", "c", "d"]
    folder("a", LLAMA | {"num_hidden_layers": 2, "layer_types": kinds[:2]}, layers=2)
    folder("bb", LLAMA | {"num_hidden_layers": 4, "layer_types": kinds}, layers=4)
    sm.merge(["a", "bb"], "out/", on_missing="union")
    made = json.loads(text())
    assert (made["num_hidden_layers"], made["layer_types"]) == (4, kinds)
    sm.merge(
        recipe={
            "models": [{"model": "bb"}, {"model": "bb"}],
            "merge_method": "linear",
            "rules": [{"match": "*.3.*", "drop": True}],
        },
        out="out/",
        overwrite=True,
    )
    made = json.loads(text())
    assert (made["num_hidden_layers"], made["layer_types"]) == (3, kinds[:3])


def test_all_configurations_of_a_folder_are_edited() -> None:
    folder("in", LLAMA | {"num_hidden_layers": 3}, prefix="")
    Path("in/params.json").write_text('{"dim": 4, "n_layers": 3, "vocab_size": 7}')
    Path("in/open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {"layers": 3}, "vision_cfg": {"layers": 3}}}')
    made = stack([("in", 0, 3), ("in", 0, 2)])
    assert json.loads(text("params.json")) == {"dim": 4, "n_layers": 5, "vocab_size": 7}
    clip = json.loads(text("open_clip_config.json"))["model_cfg"]
    assert (clip["text_cfg"]["layers"], clip["vision_cfg"]["layers"]) == (5, 3)
    assert set(fates("edited")) == {"config.json", "params.json", "open_clip_config.json"}
    assert "params.json: n_layers is now 5 (was 3)" in made.notes


def test_names_of_modules_by_the_numbers_of_layers_are_told() -> None:
    quantised = {"quantization_config": {"ignore": ["model.layers.1.mlp"]}}
    folder("in", LLAMA | {"num_hidden_layers": 3} | quantised)
    notes = stack([("in", 0, 2), ("in", 0, 3)]).notes
    assert "config.json names layers by their numbers, as in its names of modules; these stay" in notes


@pytest.mark.parametrize("codes", [False, True])
def test_a_statement_about_codes_is_told_if_there_are_none(codes: bool) -> None:
    folder("in", LLAMA | {"num_hidden_layers": 3, "quantization_config": {"quant_method": "bitsandbytes"}})
    if codes:
        tensors = load_safetensors(Path("in/model.safetensors"))
        save_file({**tensors, "model.layers.0.weight_scale": torch.ones(1)}, "in/model.safetensors")
    notes = sm.merge(["in", "in"], out="out/").notes
    assert any("no tensor is stored in codes" in note for note in notes) != codes
    assert "quantization_config" in text("config.json")


@pytest.mark.parametrize("shard", [None, "100"])
@pytest.mark.parametrize(
    ("config", "left_out"),
    [({"model_type": "llama", "tie_word_embeddings": False}, False), ({"model_type": "gpt2"}, True), (None, False)],
)
def test_a_tied_name_is_left_out_only_where_the_loader_ties_it(
    config: dict[str, Any] | None, left_out: bool, shard: str | None
) -> None:
    """A .bin file has head and embeddings in one memory, whatever the configuration says."""
    shared, other = torch.randn(7, 4), torch.randn(5)
    tensors = {"transformer.wte.weight": shared, "n": other, "lm_head.weight": shared}
    Path("in").mkdir()
    torch.save(tensors, "in/pytorch_model.bin")
    if config is not None:
        Path("in/config.json").write_text(json.dumps(config))
    expected = {name: each for name, each in tensors.items() if not left_out or name != "lm_head.weight"}
    made = sm.convert("in", "out", max_shard_size=shard)
    shards = [load_safetensors(path) for path in sorted(Path("out").glob("*.safetensors"))]
    assert_same({name: each for held in shards for name, each in held.items()}, expected)
    assert any("a loader ties it by config.json: without lm_head.weight" in note for note in made.notes) == left_out
    if len(shards) > 1:
        index = json.loads(text("model.safetensors.index.json"))
        assert set(index["weight_map"]) == set(expected)
        assert index["metadata"]["total_size"] == sum(len(octets(each)) for each in expected.values())
    assert sm.verify("out").tensors == len(expected)
