"""Bases with adapters, against the same arithmetic in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from adapters.arithmetic import Q, Tensors, V, adapter_of, baked, base_of, base_tensors, change, drawn, factors, same

BF16 = torch.bfloat16
TABLES = ("model.embed_tokens", "lm_head")


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
def test_updates_are_added_and_rounded_once(dtype: torch.dtype) -> None:
    base, lora = base_tensors(dtype), factors(Q, 24, 16) | factors(V, 12, 16, seed=20)
    base_of(base)
    adapter_of(lora, config={"r": 4, "lora_alpha": 6})
    expected = {name: tensor.double() for name, tensor in base.items()}
    for module in (Q, V):
        expected[f"{module}.weight"] += change(lora, module, 1.5)
    same(baked("base+lora"), expected)


def test_patterns_and_the_scale_of_the_rank() -> None:
    base, lora = base_tensors(), factors(Q, 24, 16, 2) | factors(V, 12, 16, 8, 20)
    base_of(base)
    patterns = {"rank_pattern": {"layers.0.*q_proj": 2}, "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3}}
    adapter_of(lora, config={"r": 8, "lora_alpha": 5, "use_rslora": True} | patterns)
    expected = {name: tensor.double() for name, tensor in base.items()}
    expected[f"{Q}.weight"] += change(lora, Q, 5 / math.sqrt(2))
    expected[f"{V}.weight"] += change(lora, V, 3 / math.sqrt(8))
    same(baked("base+lora"), expected)


def test_several_adapters_with_scales_are_rounded_once() -> None:
    base = base_tensors(BF16)
    one, two = factors(Q, 24, 16), factors(Q, 24, 16, 3, 30) | factors(V, 12, 16, 3, 40)
    base_of(base)
    adapter_of(one, "one", {"r": 4, "lora_alpha": 4})
    adapter_of(two, "two", {"r": 3, "lora_alpha": 3})
    expected = {name: tensor.double() for name, tensor in base.items()}
    expected[f"{Q}.weight"] += 0.5 * change(one, Q, 1) - 2 * change(two, Q, 1)
    expected[f"{V}.weight"] += -2 * change(two, V, 1)
    same(baked("base+0.5*one+-2*two"), expected)


def test_a_matrix_that_is_stored_transposed() -> None:
    base = {"h.0.attn.c_attn.weight": drawn(1, 16, 48), "h.0.square.weight": drawn(2, 16, 16)}
    lora = factors("h.0.attn.c_attn", 48, 16) | factors("h.0.square", 16, 16, seed=20)
    base_of(base)
    adapter_of({f"transformer.{key}": each for key, each in lora.items()}, config={"r": 4, "fan_in_fan_out": True})
    expected = {
        f"{module}.weight": base[f"{module}.weight"].double() + change(lora, module, 2).t()
        for module in ("h.0.attn.c_attn", "h.0.square")
    }
    same(baked("base+lora"), expected)


def test_embeddings_saved_modules_biases_and_rows() -> None:
    base = base_tensors()
    base_of(base)
    lora = {
        "model.embed_tokens.lora_embedding_A": drawn(10, 4, 30),
        "model.embed_tokens.lora_embedding_B": drawn(11, 16, 4),
        "lm_head.token_adapter.trainable_tokens_delta": drawn(12, 2, 16),
        f"{Q}.base_layer.bias": drawn(13, 24),
        f"{V}.weight": drawn(14, 12, 16),
    }
    adapter_of(lora, config={"r": 4, "lora_alpha": 2, "trainable_token_indices": {"lm_head": [7, 3]}})
    expected = {name: tensor.double() for name, tensor in base.items()}
    expected["model.embed_tokens.weight"] += 0.5 * (drawn(11, 16, 4).double() @ drawn(10, 4, 30).double()).t()
    expected["lm_head.weight"][[7, 3]] = drawn(12, 2, 16).double()
    expected[f"{Q}.bias"], expected[f"{V}.weight"] = drawn(13, 24).double(), drawn(14, 12, 16).double()
    same(baked("base+lora"), expected)


_HEAD = {"r": 4, "lora_alpha": 4, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}


@pytest.mark.parametrize("out", ["out/", "out.safetensors"])
def test_a_head_that_the_base_lacks_is_added(out: str) -> None:
    """PEFT puts a new head on a language model to train a classifier or a reward model, and saves it whole."""
    base, lora = base_tensors(BF16), factors(Q, 24, 16) | {"score.weight": drawn(9, 3, 16)}
    base_of(base)
    adapter_of(lora, config=_HEAD)
    result = sm.merge(["base+lora"], out=out)
    expected = {name: tensor.double() for name, tensor in base.items()} | {"score.weight": drawn(9, 3, 16)}
    expected[f"{Q}.weight"] += change(lora, Q, 1)
    made = load_file(f"{out}model.safetensors" if out.endswith("/") else out)
    same(made, expected)
    assert {each.dtype for each in made.values()} == {BF16}
    assert [each for each in result.warnings if "score" in each] == [
        "lora brings score.weight [3, 16], which base lacks, so the output has it too; the configuration does not tell of "
        "it: load it with the class and the number of labels of the training (SEQ_CLS)"
    ]
    sm.verify(out)


def test_new_heads_of_several_models_are_merged() -> None:
    base_of(base_tensors())
    torch.save(base_tensors(), "base.pth")
    heads = drawn(8, 3, 16), drawn(9, 3, 16)
    for name, head in zip("ab", heads, strict=True):
        adapter_of(factors(Q, 24, 16) | {"score.weight": head}, name, _HEAD)
    sm.merge(["base+a", "base+b"], out="out.safetensors")
    assert torch.equal(load_file("out.safetensors")["score.weight"], ((heads[0].double() + heads[1]) / 2).float())
    sm.merge(["base.pth+a", "base.pth+b"], out="out.pth")
    assert torch.equal(torch.load("out.pth")["score.weight"], ((heads[0].double() + heads[1]) / 2).float())


@pytest.mark.parametrize("has", [True, False])
def test_what_was_trained_whole_and_lies_beside_the_adapter(has: bool) -> None:
    """LLaVA writes its projector into a file of its own; a language model without images lacks it."""
    base, name = base_tensors(), "model.mm_projector.0.weight"
    base_of(base | ({name: drawn(3, 16, 16)} if has else {}))
    lora = factors(Q, 24, 16)
    adapter_of(lora, config={"r": 4, "lora_alpha": 4})
    torch.save({f"base_model.model.{name}": drawn(4, 16, 16)}, "lora/non_lora_trainables.bin")
    torch.save({"other.weight": drawn(5, 2)}, "lora/value_head.bin")
    Path("lora/notes.bin").write_text("no weights")
    result = sm.merge(["base+lora"], out="out/")
    expected = {each: tensor.double() for each, tensor in base.items()} | {name: drawn(4, 16, 16)}
    expected[f"{Q}.weight"] += change(lora, Q, 1)
    same(load_file("out/model.safetensors"), expected)
    said = "lora/non_lora_trainables.bin has 1 tensor that was trained whole (model.mm_projector.0.weight)"
    assert any(said in note for note in result.notes)
    assert any("lora brings model.mm_projector.0.weight" in each for each in result.warnings) != has
    sm.verify("out/")
    with pytest.raises(sm.MismatchError, match="it is a whole tensor, and no factor, so adapters alone cannot be merged"):
        sm.merge(["lora", "lora"], out="both/")


def test_weights_beside_an_adapter_that_it_does_not_take_are_told() -> None:
    base_of(base_tensors())
    adapter_of(factors(Q, 24, 16), config={"r": 4, "lora_alpha": 4})
    torch.save({"v_head.weight": drawn(5, 2)}, "lora/value_head.bin")
    notes = sm.merge(["base+lora"], out="out/").notes
    assert any("the folder also holds value_head.bin" in note for note in notes)


def test_a_head_says_nothing_about_a_base_in_which_no_other_module_is_found() -> None:
    base_of({"wholly.other.weight": drawn(1, 16, 16)})
    adapter_of(factors(Q, 24, 16) | {"score.weight": drawn(9, 3, 16)}, config=_HEAD)
    with pytest.raises(sm.MismatchError, match="give the base that the adapter was made for"):
        sm.merge(["base+lora"], out="out/")


def test_embeddings_of_more_rows_replace_the_base() -> None:
    base = base_tensors()
    base_of(base, vocab_size=30)
    lora = {"model.embed_tokens.base_layer.weight": drawn(20, 33, 16), "lm_head.weight": drawn(21, 33, 16)}
    lora |= {
        "model.embed_tokens.lora_embedding_A": drawn(10, 4, 33),
        "model.embed_tokens.lora_embedding_B": drawn(11, 16, 4),
    }
    adapter_of(lora, config={"r": 4, "lora_alpha": 4})
    result = sm.convert("base+lora", "out/")
    assert any("tokenizer" in each for each in result.warnings)
    assert '"vocab_size": 33' in Path("out/config.json").read_text()
    made = load_file("out/model.safetensors")
    grown = drawn(20, 33, 16).double() + (drawn(11, 16, 4).double() @ drawn(10, 4, 33).double()).t()
    same(
        {"a": made["model.embed_tokens.weight"], "b": made["lm_head.weight"]}, {"a": grown, "b": drawn(21, 33, 16).double()}
    )


def test_trained_rows_of_a_resized_vocabulary() -> None:
    base = base_tensors()
    base_of(base, vocab_size=30)
    grown = {f"{name}.token_adapter.base_layer.weight": drawn(n, 33, 16) for n, name in enumerate(TABLES, 20)}
    rows = {f"{name}.token_adapter.trainable_tokens_delta": drawn(n, 2, 16) for n, name in enumerate(TABLES, 30)}
    adapter_of(grown | rows | factors(Q, 24, 16), config={"r": 4, "lora_alpha": 4, "trainable_token_indices": [3, 32]})
    sm.convert("base+lora", "out/")
    made = load_file("out/model.safetensors")
    for n, name in enumerate(TABLES):
        expected = drawn(20 + n, 33, 16)
        expected[[3, 32]] = drawn(30 + n, 2, 16)
        assert torch.equal(made[f"{name}.weight"], expected)


@pytest.mark.parametrize("trained", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("shared", [False, True], ids=["one name", "shared storage"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_what_peft_trains_apart_is_tied_no_longer(trained: list[str], shared: bool, pickled: bool) -> None:
    """A whole module is a copy beside the base's, so PEFT computes with two tensors from then on."""
    table, head = (f"{name}.weight" for name in TABLES)
    base = {table: drawn(1, 30, 16), f"{Q}.weight": drawn(2, 24, 16)}
    base_of(base, tie_word_embeddings=True, vocab_size=30)
    if shared:
        base |= {head: base[table]}
    if shared or pickled:
        Path("base/model.safetensors").unlink()
        torch.save(base, "base/pytorch_model.bin")
    new = {table: drawn(3, 30, 16), head: drawn(4, 30, 16)}
    whole = {name: tensor for name, tensor in new.items() if name.split(".")[-2] in trained}
    adapter_of(factors(Q, 24, 16) | whole, config={"r": 4, "lora_alpha": 4, "modules_to_save": trained})
    if pickled:
        sm.merge(["base+lora"], "out/")
        made = torch.load("out/pytorch_model.bin")
    else:
        sm.convert("base+lora", "out/")
        made = load_file("out/model.safetensors")
    for name in (table, head):
        assert torch.equal(made[name], whole.get(name, base[table]))
    assert '"tie_word_embeddings": false' in Path("out/config.json").read_text()


def test_what_peft_keeps_tied_stays_one_tensor() -> None:
    table, head = (f"{name}.weight" for name in TABLES)
    base = {table: drawn(1, 30, 16), f"{Q}.weight": drawn(2, 24, 16)}
    base_of(base, tie_word_embeddings=True, vocab_size=30)
    grown = drawn(3, 33, 16)
    for name, config in (("one", {}), ("two", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True})):
        lora = factors(Q, 24, 16) | {table: grown, head: grown.clone()}
        adapter_of(lora, name, {"r": 4, "lora_alpha": 4, **config})
        sm.convert(f"base+{name}", "out/", overwrite=True)
        made = load_file("out/model.safetensors")
        assert head not in made
        assert torch.equal(made[table], grown)
        assert '"tie_word_embeddings": true' in Path("out/config.json").read_text()


def test_a_tied_head_is_the_embeddings() -> None:
    base = {"model.embed_tokens.weight": drawn(1, 30, 16), f"{Q}.weight": drawn(2, 24, 16)}
    base_of(base, tie_word_embeddings=True)
    lora = factors("lm_head", 30, 16)
    adapter_of(lora, config={"r": 4, "lora_alpha": 4})
    expected = {"model.embed_tokens.weight": base["model.embed_tokens.weight"].double() + change(lora, "lm_head", 1)}
    same(baked("base+lora"), expected | {f"{Q}.weight": base[f"{Q}.weight"].double()})


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_norms_of_rows_and_of_columns(strength: float) -> None:
    base = {f"{Q}.weight": drawn(1, 24, 16), "h.c_attn.weight": drawn(2, 16, 48), "emb.weight": drawn(3, 30, 16)}
    base |= {"conv.weight": drawn(4, 8, 3, 3, 3)}
    lora = factors(Q, 24, 16) | factors("h.c_attn", 48, 16, seed=20)
    lora |= {"emb.lora_embedding_A": drawn(30, 4, 30), "emb.lora_embedding_B": drawn(31, 16, 4)}
    lora |= {"conv.lora_A.weight": drawn(32, 4, 3, 3, 3), "conv.lora_B.weight": drawn(33, 8, 4, 1, 1)}
    lora |= {f"{Q}.lora_magnitude_vector": drawn(40, 24), "h.c_attn.lora_magnitude_vector": drawn(41, 48)}
    lora |= {"emb.lora_magnitude_vector": drawn(42, 16), "conv.lora_magnitude_vector": drawn(43, 1, 8, 1, 1)}
    base_of(base)
    adapter_of(lora, config={"r": 4, "lora_alpha": 4, "use_dora": True})
    conv = (drawn(33, 8, 4).double() @ drawn(32, 4, 27).double()).view(8, 3, 3, 3)
    whole = {
        f"{Q}.weight": (change(lora, Q, 1), 40, (24, 1), (1,)),
        "h.c_attn.weight": (change(lora, "h.c_attn", 1).t(), 41, (1, 48), (0,)),
        "emb.weight": ((drawn(31, 16, 4).double() @ drawn(30, 4, 30).double()).t(), 42, (1, 16), (0,)),
        "conv.weight": (conv, 43, (8, 1, 1, 1), (1, 2, 3)),
    }
    expected = {}
    for name, (delta, seed, shape, axes) in whole.items():
        weight = base[name].double()
        total = weight + delta
        normed = drawn(seed, math.prod(shape)).double().view(shape) * total / total.pow(2).sum(axes, keepdim=True).sqrt()
        expected[name] = weight + strength * (normed - weight)
    same(baked(f"base+{strength}*lora"), expected)


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base(way: str) -> None:
    base, lora = base_tensors(), factors(Q, 24, 16)
    base_of(base)
    adapter_of(lora, config={"r": 4, "lora_alpha": 8, "init_lora_weights": way})
    weight = base[f"{Q}.weight"].double()
    if way == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        taken = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    else:
        q, r = torch.linalg.qr(weight)
        taken = 2 * q[:, :4] @ r[:4]
    made = baked("base+lora")[f"{Q}.weight"]
    torch.testing.assert_close(made.double(), weight - taken + change(lora, Q, 2), rtol=0, atol=5e-5)


# --------------------------------------------------------------------------------------------------- the whole program


def test_one_digest_for_all_ways_of_running() -> None:
    """Long tensors of every kind of arithmetic: products, norms of rows and of columns, Kronecker and Hadamard products."""
    emb, wide = "model.embed_tokens", "model.layers.0.mlp.down_proj"
    base = {f"{Q}.weight": drawn(1, 1500, 3001, dtype=BF16), f"{V}.weight": drawn(2, 7, 3001, dtype=BF16)}
    base |= {f"{emb}.weight": drawn(3, 3001, 160, dtype=BF16), f"{wide}.weight": drawn(4, 160, 1200, dtype=BF16)}
    lora = factors(Q, 1500, 3001, 16) | factors(V, 7, 3001, 16, 20)
    lora |= {f"{emb}.lora_embedding_A": drawn(30, 16, 3001), f"{emb}.lora_embedding_B": drawn(31, 160, 16)}
    lora |= {f"{V}.lora_magnitude_vector": drawn(32, 7), f"{emb}.lora_magnitude_vector": drawn(33, 160)}
    lora |= {f"{Q}.lora_magnitude_vector": drawn(34, 1500)}
    base_of(base)
    adapter_of(lora, config={"r": 16, "lora_alpha": 8, "use_dora": True})
    mangled = f"lycoris_{wide.replace('.', '_')}"
    factored = {f"{mangled}.lokr_w1": drawn(40, 4, 3), f"{mangled}.lokr_w2": drawn(41, 40, 400)}
    adapter_of(factored, "lokr")
    hadamard = {
        f"{mangled}.hada_w{n}_{h}": drawn(50 + n, *((160, 4) if h == "a" else (4, 1200))) for n in (1, 2) for h in "ab"
    }
    adapter_of(hadamard, "loha")
    expected = {name: tensor.double() for name, tensor in base.items()}
    updates = {Q: (change(lora, Q, 0.5), 34, 1), V: (change(lora, V, 0.5), 32, 1)}
    updates[emb] = (0.5 * (drawn(31, 160, 16).double() @ drawn(30, 16, 3001).double()).t(), 33, 0)
    for name, (update, seed, axis) in updates.items():
        total = expected[f"{name}.weight"] + update
        norm = total.pow(2).sum(axis, keepdim=True).sqrt()
        expected[f"{name}.weight"] = total / norm * drawn(seed, norm.numel()).double().view(norm.shape)
    expected[f"{wide}.weight"] += torch.kron(drawn(40, 4, 3).double(), drawn(41, 40, 400).double())
    expected[f"{wide}.weight"] += (drawn(51, 160, 4).double() @ drawn(51, 4, 1200).double()) * (
        drawn(52, 160, 4).double() @ drawn(52, 4, 1200).double()
    )
    seen = set()
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"workers": 1, "io": "pread"},
        {"memory": "64MiB", "workers": 3},
        {"executor": "processes", "workers": 2},
    )
    for way in ways:
        same(baked("base+lora+lokr.safetensors+loha.safetensors", **way), expected)
        seen.add(Path("out.safetensors").read_bytes())
    assert len(seen) == 1


def test_a_merge_equals_one_of_baked_models() -> None:
    base, other = (
        base_tensors(BF16),
        {name: drawn(n + 50, *t.shape, dtype=BF16) for n, (name, t) in enumerate(base_tensors().items())},
    )
    base_of(base)
    base_of(other, "other")
    adapter_of(factors(Q, 24, 16), "one", {"r": 4, "lora_alpha": 6})
    adapter_of(factors(V, 12, 16), "two", {"r": 4, "lora_alpha": 2})
    sm.convert("base+one", "baked1/")
    sm.convert("other+0.5*two", "baked2/")
    sm.merge(["base+one:0.3", "other+0.5*two:0.7"], "typed.safetensors")
    sm.merge(["baked1:0.3", "baked2:0.7"], "baked.safetensors")
    typed, expected = load_file("typed.safetensors"), load_file("baked.safetensors")
    assert all(torch.equal(typed[name], expected[name]) for name in expected)
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": {"model": {"path": "base"}, "lora": {"path": "one"}}, "parameters": {"weight": 0.3}},
            {"model": {"model": "other", "lora": [{"path": "two", "scale": 0.5}]}, "parameters": {"weight": 0.7}},
        ],
    }
    sm.merge(recipe=recipe, out="recipe.safetensors")
    assert all(torch.equal(load_file("recipe.safetensors")[name], expected[name]) for name in expected)
    sm.merge(["base+one"], "ties/", base="base", method="task_arithmetic", weights=[1.0])
    assert sm.verify("ties/", sample="100%").notes == []


def test_numbers_that_are_not_finite_stop_the_run() -> None:
    base_of(base_tensors(BF16))
    lora = factors(Q, 24, 16)
    lora[f"{Q}.lora_B.weight"][3, 1] = torch.nan
    adapter_of(lora, config={"r": 4, "lora_alpha": 6})
    with pytest.raises(sm.StreammergeError, match=r"16 (NaN|values|numbers)|NaN"):
        sm.convert("base+lora", "out/")
    sm.convert("base+lora", "out/", allow_nonfinite=True)


def test_plan_inspect_and_verify_know_it() -> None:
    base_of(base_tensors(BF16))
    adapter_of(factors(Q, 24, 16), config={"r": 4, "lora_alpha": 6})
    planned = sm.plan(["base+lora", "base"])
    assert [each for each in planned.notes if "1 of its 5 tensors is changed by the adapter lora (PEFT)" in each]
    assert sm.inspect("base+lora")[f"{Q}.weight"].spec.shape == (24, 16)
    sm.convert("base+lora", "out/")
    assert sm.verify("out/", sample="100%").notes == []
    config = Path("lora/adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    with pytest.raises(sm.VerifyError, match=r"adapter_config\.json is not the file that was merged"):
        sm.verify("out/", sample="100%")


def test_a_path_with_a_plus_sign_stays_a_path() -> None:
    base, other = base_tensors(), {name: drawn(n + 50, *t.shape) for n, (name, t) in enumerate(base_tensors().items())}
    base_of(base)
    base_of(other, "base+lora")
    adapter_of(factors(Q, 24, 16), config={"r": 4, "lora_alpha": 6})
    same(baked("base+lora"), {name: each.double() for name, each in other.items()})
    expected = {name: each.double() for name, each in other.items()}
    expected[f"{Q}.weight"] += change(factors(Q, 24, 16), Q, 1.5)
    same(baked("base+lora+lora"), expected)


def test_a_pickled_base_keeps_its_container() -> None:
    base = base_tensors()
    torch.save({"model": base, "step": 3}, "base.pth")
    lora = factors(Q, 24, 16)
    adapter_of(lora, config={"r": 4, "lora_alpha": 4})
    sm.convert("base.pth+lora", "out.pth")
    made = torch.load("out.pth")
    assert made["step"] == 3
    expected = {name: tensor.double() for name, tensor in base.items()}
    expected[f"{Q}.weight"] += change(lora, Q, 1)
    same(dict(made["model"]), expected)


def test_a_running_average_that_no_adapter_updates_is_left_out() -> None:
    base = base_tensors()
    torch.save({"model": base, "ema": {name: each + 1 for name, each in base.items()}, "step": 3}, "base.pth")
    adapter_of(factors(Q, 24, 16), config={"r": 4, "lora_alpha": 4})
    sm.convert("base.pth+lora", "out.pth")
    made = torch.load("out.pth")
    assert set(made) == {"model", "step"}
    result = sm.merge(["base.pth+lora", "base.pth"], "merged.pth")
    assert any("ema" in each for each in (*result.warnings, *sm.plan(["base.pth+lora", "base.pth"], "x.pth").notes))
    assert set(torch.load("merged.pth")) == {"model", "step"}


def test_tensors_of_a_base_with_an_adapter_may_be_renamed() -> None:
    base, lora = base_tensors(), factors(Q, 24, 16)
    torch.save({"model": base, "step": 3}, "base.pth")
    adapter_of(lora, config={"r": 4, "lora_alpha": 4})
    sm.convert("base.pth+lora", "out.pth", rename={"model.*": "net.*"})
    made = torch.load("out.pth")["model"]
    torch.testing.assert_close(made[f"net.{Q[6:]}.weight"].double(), base[f"{Q}.weight"].double() + change(lora, Q, 1))


def test_an_adapter_of_gpt_sovits() -> None:
    """Its file is a torch zip whose first two bytes tell the version; whole tensors stand beside the factors."""
    module = "cfm.estimator.blocks.0.attn.to_q"
    base = {f"{module}.weight": drawn(1, 24, 16), "enc_p.text.weight": drawn(2, 5, 4), "ref_enc.weight": drawn(3, 6)}
    torch.save({"weight": base, "config": {"model": {"version": "v3"}}, "info": "pretrained"}, "s2Gv3.pth")
    lora = {
        "cfm.base_model.model.estimator.blocks.0.attn.to_q.lora_A.default.weight": drawn(10, 4, 16, dtype=torch.float16),
        "cfm.base_model.model.estimator.blocks.0.attn.to_q.lora_B.default.weight": drawn(11, 24, 4, dtype=torch.float16),
        "enc_p.text.weight": drawn(12, 5, 4, dtype=torch.float16),
    }
    torch.save({"weight": lora, "config": {"train": 1}, "info": "v3", "lora_rank": 4}, "voice.pth")
    data = Path("voice.pth").read_bytes()
    Path("voice.pth").write_bytes(b"03" + data[2:])
    sm.convert("s2Gv3.pth+voice.pth", "out.pth")
    made = torch.load("out.pth")
    assert made["info"] == "pretrained"
    delta = drawn(11, 24, 4, dtype=torch.float16).double() @ drawn(10, 4, 16, dtype=torch.float16).double()
    expected = {
        f"{module}.weight": base[f"{module}.weight"].double() + delta,
        "enc_p.text.weight": drawn(12, 5, 4, dtype=torch.float16).double(),
        "ref_enc.weight": base["ref_enc.weight"].double(),
    }
    same(dict(made["weight"]), expected)


def test_globs_of_adapters_are_several_models() -> None:
    base_of(base_tensors())
    for number in (2, 10):
        adapter_of(factors(Q, 24, 16, seed=number), f"checkpoint-{number}", {"r": 4, "lora_alpha": 4})
    planned = sm.plan(["base+checkpoint-*"])
    assert planned.recipe.inputs == ("base + checkpoint-2", "base + checkpoint-10")


def test_an_index_takes_any_source_for_a_name() -> None:
    """The table of a checkpoint holds expressions as well as plain byte ranges."""
    base_of(base_tensors())
    adapter_of(factors(Q, 24, 16), config={"r": 4, "lora_alpha": 4})
    index = sm.inspect("base+lora")
    kinds = {name: type(index[name]).__name__ for name in index}
    assert kinds[f"{Q}.weight"] == "Elementwise"
    assert kinds[f"{V}.weight"] == "Stored"


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (
            factors("model.layers.7.self_attn.q_proj", 24, 16),
            {"r": 4},
            r"layers\.7\.self_attn\.q_proj\.lora_A\.weight has no tensor",
        ),
        ({f"{Q}.lora_A.weight": drawn(1, 4, 16)}, {"r": 4}, r"q_proj\.lora_A\.weight has no partner B"),
        (factors(Q, 24, 16), {"r": 8}, r"q_proj\.lora_A\.weight has the rank 4, and adapter_config\.json says 8"),
        (factors(Q, 23, 16), {"r": 4}, r"q_proj\.lora_A\.weight does not fit .*q_proj\.weight of shape \[24, 16\]"),
        (factors(Q, 24, 15), {"r": 4}, r"q_proj\.lora_A\.weight does not fit"),
        (factors(Q, 24, 16) | {"model.norm.gone": drawn(1, 3)}, {"r": 4}, r"model\.norm\.gone has no tensor"),
        (
            factors(V, 12, 16) | {f"{V}.lora_B.bias": drawn(1, 12)},
            {"r": 4, "lora_bias": True},
            r"v_proj\.lora_B\.bias is added to a bias, and model\.layers\.1\.self_attn\.v_proj\.weight of base has none",
        ),
        (factors(Q, 24, 16), {"r": 4, "use_qalora": True}, "use_qalora is set"),
        (factors(Q, 24, 16), {"r": 4, "alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        (factors(Q, 24, 16), {"r": 4, "a_new_key": {"x": 1}}, "a_new_key is set"),
        (factors(Q, 24, 16), {"r": 4, "init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        (factors(Q, 24, 16), {"peft_type": "OFT"}, "of the kind OFT cannot be merged"),
        ({f"{Q}.oft_R.weight": drawn(1, 2, 2)}, {"r": 4}, "belongs to OFT or BOFT, which multiply"),
        (factors(Q, 24, 16) | {f"{Q}.lora_magnitude_vector": drawn(1, 23)}, {"r": 4, "use_dora": True}, "does not fit"),
        (
            {"lm_head.token_adapter.trainable_tokens_delta": drawn(1, 2, 16)},
            {"trainable_token_indices": {"lm_head": [1, 99]}},
            "no row 99",
        ),
        ({"lm_head.token_adapter.trainable_tokens_delta": drawn(1, 2, 16)}, {}, "does not say them"),
        (factors(Q, 24, 16), {"r": 4, "modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
        (factors(Q, 24, 16), {"r": 4, "trainable_token_indices": [1]}, "has no trainable_tokens_delta"),
        (
            {f"{Q}.ia3_l": drawn(1, 24, 1)},
            {"peft_type": "IA3", "target_modules": ["q_proj", "v_proj"]},
            r"target_modules names model\.layers\.1\.self_attn\.v_proj",
        ),
        (
            {f"{Q}.lora_A.weight": drawn(1, 4, 16).long(), f"{Q}.lora_B.weight": drawn(1, 24, 4)},
            {"r": 4},
            "a factor of int64",
        ),
        ({f"{V}.weight": drawn(1, 11, 16)}, {"r": 4}, "would replace a tensor of shape"),
        (factors(Q, 24, 16) | {"lm_head.weight": torch.zeros(0)}, {"r": 4}, r"lm_head\.weight is a placeholder"),
        ({f"{Q}.lora_A.weight": torch.zeros(0), f"{Q}.lora_B.weight": torch.zeros(0)}, {"r": 4}, "is a placeholder"),
        ({f"{V}.weight": drawn(1, 12, 16).long()}, {"r": 4}, "would replace float32 by int64"),
        (
            {"lm_head.weight": drawn(1, 31, 16)},
            {"r": 4},
            r"lm_head\.weight would have 31 rows, and model\.embed_tokens\.weight 30",
        ),
    ],
)
def test_what_has_no_place_is_an_error_that_names_it(tensors: Tensors, config: dict[str, Any], words: str) -> None:
    base_of(base_tensors())
    adapter_of(tensors, config=config)
    with pytest.raises((sm.MismatchError, sm.FormatError), match=words):
        sm.convert("base+lora", "out/")
    assert not Path("out").exists()


def test_an_absent_part_is_named() -> None:
    base_of(base_tensors())
    with pytest.raises(sm.RecipeError, match=r"base\+lost: the model base exists, but the adapter lost does not"):
        sm.convert("base+lost", "out/")
    with pytest.raises(sm.RecipeError, match="the adapter lost does not"):
        sm.merge(["base+lost", "base"], "out/")


def test_a_quantised_base_is_refused() -> None:
    base_of({f"{Q}.weight": torch.zeros(24, 16, dtype=torch.int8)})
    adapter_of(factors(Q, 24, 16), config={"r": 4})
    with pytest.raises(sm.MismatchError, match="quantised"):
        sm.convert("base+lora", "out/")


def test_a_model_is_no_adapter() -> None:
    base_of(base_tensors())
    save_file(base_tensors(), "other.safetensors")
    with pytest.raises(sm.MismatchError, match="holds no factors of an adapter"):
        sm.convert("base+other.safetensors", "out/")


def test_a_base_of_70_billion_parameters_plans_in_the_default_memory(tmp_path: Path) -> None:
    """The files are sparse: their headers are whole, and their tensors are zeros."""
    hidden, inner, layers, rank = 8192, 28672, 80, 64
    shapes = {"model.embed_tokens.weight": (128256, hidden), "lm_head.weight": (128256, hidden)}
    for number in range(layers):
        for name in ("q_proj", "gate_proj", "up_proj", "down_proj"):
            shape = (hidden if name == "q_proj" else inner, hidden)
            shape = (hidden, inner) if name == "down_proj" else shape
            shapes[f"model.layers.{number}.{name}.weight"] = shape
    sparse(tmp_path / "base.safetensors", "BF16", shapes)
    lora = {}
    for name, (out, columns) in shapes.items():
        if "layers" in name:
            module = name.removesuffix(".weight")
            lora |= {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (out, rank)}
    (tmp_path / "lora").mkdir()
    sparse(tmp_path / "lora" / "adapter_model.safetensors", "F32", lora)
    (tmp_path / "lora" / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 16, "use_rslora": true}')
    planned = sm.plan(["base.safetensors+lora", "base.safetensors"])
    assert planned.read_bytes > 2 * 100e9
    assert planned.peak_bytes < 512 << 20
    assert sum(bool(task.sources[0].parts) for task in planned.tasks) == 4 * layers


def sparse(path: Path, dtype: str, shapes: dict[str, tuple[int, ...]]) -> None:
    header, cursor = dict[str, Any](), 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [cursor, cursor + nbytes]}
        cursor += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + cursor)


def test_infinity_in_an_adapter_is_told_by_its_tensor() -> None:
    lora = factors(Q, 24, 16)
    lora[f"{Q}.lora_B.weight"][2, 1] = torch.inf
    base_of(base_tensors())
    with pytest.raises(sm.VerifyError, match=rf"\({Q}.lora_B.weight of lora.safetensors\)".replace(".", "[.]")):
        sm.merge([f"base+{adapter_of(lora)}", "base"], out="made.safetensors")
