"""Rows of embeddings follow the output's tokens, by the rules of mergekit 0.1.5.

The oracle is a plain reading of these rules over dictionaries: token -> row.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import load_file, save_file

import streammerge as sm

Tensors = dict[str, torch.Tensor]
WIDTH = 3


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tokenizer(tokens: list[str], added: list[str] = (), **more: Any) -> dict[str, Any]:  # type: ignore[assignment]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    listed = [{"id": len(tokens) + n, "content": each, **flags} for n, each in enumerate(added)]
    model = {"type": "BPE", "vocab": {token: n for n, token in enumerate(tokens)}, "merges": []}
    return {"version": "1.0", "added_tokens": listed, "normalizer": None, "model": model, **more}


def folder(
    name: str,
    tokens: list[str],
    added: list[str] = (),  # type: ignore[assignment]
    rows: int | None = None,
    head: bool = True,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    **config: Any,
) -> str:
    count, seed = rows or len(tokens) + len(added), sum(map(ord, name))
    make = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(count, WIDTH, generator=make)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.mlp.weight"] = torch.randn(4, WIDTH, generator=make)
    if head:
        tensors["lm_head.weight"], tensors["lm_head.bias"] = torch.randn(count, WIDTH, generator=make), torch.randn(count)
    tensors["final_logits_bias"] = torch.randn(1, count, generator=make)
    tensors["cls.predictions.dense.weight"] = torch.randn(4, count, generator=make)  # MobileBERT's head
    Path(name).mkdir()
    save_file({key: each.to(dtype) for key, each in tensors.items()}, f"{name}/model.safetensors", {"format": "pt"})
    Path(name, "tokenizer.json").write_text(json.dumps(tokenizer(tokens, added)))
    stated = {"model_type": "llama", "vocab_size": count, "tie_word_embeddings": not head, "eos_token_id": 1, **config}
    Path(name, "config.json").write_text(json.dumps(stated))
    return name


def vocabulary(path: str) -> dict[str, int]:
    tree = json.loads(Path(path, "tokenizer.json").read_text())
    return tree["model"]["vocab"] | {each["content"]: each["id"] for each in tree["added_tokens"]}


def expected(
    name: str, models: list[str], base: str | None, out: dict[str, int], rows: int, **tokens: Any
) -> list[torch.Tensor]:
    """Returns each model's tensor in the output's order, by mergekit's rules."""
    held = [(m, load_file(f"{m}/model.safetensors")[name].double()) for m in models]
    held = [(m, t.T if name in ACROSS else t) for m, t in held]
    have = {m: {t: n for t, n in vocabulary(m).items() if n < len(table)} for m, table in held}
    tables = dict(held)
    made = []
    for model, table in held:
        new = torch.zeros(rows, *table.shape[1:], dtype=torch.float64)
        for token, place in out.items():
            told = tokens.get(token)
            owners = [m for m in models if token in have[m]]
            if told is not None:
                default = told["row"](tables)
            elif not owners:
                default = torch.zeros(table.shape[1:])
            elif len(owners) == 1 or base in owners:
                giver = owners[0] if len(owners) == 1 else base
                default = tables[giver][have[giver][token]]  # type: ignore[index]
            else:
                default = torch.stack([tables[m][have[m][token]] for m in owners]).mean(0)
            own = token in have[model] and not (told or {}).get("force")
            new[place] = table[have[model][token]] if own else default
        new[len(out) :] = new[: len(out)].mean(0)
        made.append(new.T if name in ACROSS else new)
    return made


ACROSS = ("final_logits_bias", "cls.predictions.dense.weight")
NAMES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", *ACROSS)
A, B, C = ([*list("abcd"), "ab"], ["<A>"]), ([*list("dcba"), "cd"], ["<B>", "<A>"]), ([*list("abcd"), "ab", "cd", "x"], [])


def merged(models: list[str], out: str = "out/", **more: Any) -> Tensors:
    recipe = {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **more}
    sm.merge(recipe=recipe, out=out, memory="64MiB")
    return load_file(f"{out}/model.safetensors")


@pytest.mark.parametrize("source", ["base", "union", "c"])
@pytest.mark.parametrize("base", [None, "a", "b"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_the_rows_are_those_of_the_rules(source: str, base: str | None, multiple: int | None) -> None:
    for name, own in zip("abc", (A, B, C), strict=True):
        folder(name, *own)
    models = ["a", "b", "c"]
    more = {"base_model": base} if base else {}
    made = merged(models, tokenizer={"source": source, "pad_to_multiple_of": multiple}, **more)
    out, first = vocabulary("out"), base or "a"
    rows = -(-len(out) // (multiple or 1)) * (multiple or 1)
    own = vocabulary(first)
    if source != "c":
        assert {token: out[token] for token in own} == own
    assert (
        set(out)
        == {"base": set(own), "union": {t for m in models for t in vocabulary(m)}, "c": set(vocabulary("c"))}[source]
    )
    for name in NAMES:
        wanted = torch.stack(expected(name, models, base, out, rows)).mean(0).float()
        torch.testing.assert_close(made[name], wanted, rtol=1e-6, atol=1e-6)
    config = json.loads(Path("out/config.json").read_text())
    assert config["vocab_size"] == rows
    end = next(token for token, n in vocabulary("c" if source == "c" else first).items() if n == 1)
    assert config["eos_token_id"] == out[end]  # the tokenizer's own model says which token ends a text
    sm.verify("out/", sample="100%")


def test_the_numbers_depend_on_no_worker(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(3000)]
    folder("a", words, ["<A>"]), folder("b", words[::-1] + [f"v{n}" for n in range(60)], ["<A>"])
    recipe = {
        "merge_method": "ties",
        "base_model": "a",
        "models": [{"model": "b"}],
        "tokenizer": {"pad_to_multiple_of": 64},
    }
    seen = set()
    for number, (workers, io) in enumerate(itertools.product((1, 3), ("mmap", "pread"))):
        sm.merge(recipe=recipe, out=f"out{number}/", workers=workers, io=io, memory=f"{40 + 20 * number}MiB")
        seen.add(Path(f"out{number}/model.safetensors").read_bytes())
    assert len(seen) == 1
    assert load_file("out0/model.safetensors")["lm_head.weight"].shape == (3072, WIDTH)


def test_sources_of_single_tokens() -> None:
    folder("a", *A), folder("b", *B)
    tokens = {
        "<B>": {"source": {"kind": "zero"}},
        "<A>": {"source": "b", "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "a", "token": "ab"}},
        "<num>": {"source": {"kind": "model_token", "model": "b", "token_id": 3}},
        "c": {"source": {"kind": "zero"}, "force": True},
    }
    made = merged(["a", "b"], tokenizer={"source": "union", "tokens": tokens})
    out = vocabulary("out")
    rows = {
        "<B>": {"row": lambda tables: torch.zeros_like(tables["a"][0])},
        "<A>": {"row": lambda tables: tables["b"][vocabulary("b")["<A>"]], "force": True},
        "<new>": {"row": lambda tables: tables["a"][4]},
        "<num>": {"row": lambda tables: tables["b"][3]},
        "c": {"row": lambda tables: torch.zeros_like(tables["a"][0]), "force": True},
    }
    for name in NAMES:
        wanted = torch.stack(expected(name, ["a", "b"], None, out, len(out), **rows)).mean(0).float()
        torch.testing.assert_close(made[name], wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(sm.RecipeError, match="has no token nope"):
        merged(
            ["a", "b"],
            "other/",
            tokenizer={"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token": "nope"}}}},
        )
    with pytest.raises(sm.RecipeError, match="a gives <B> its row, but has no such token"):
        merged(["a", "b"], "other/", tokenizer={"tokens": {"<B>": {"source": "a", "force": True}}})


def test_tables_with_other_rows_than_tokens() -> None:
    folder("padded", *A, rows=16), folder("short", *B, rows=6), folder("b", *B)
    made = merged(["padded", "b"], "o1/", tokenizer_source="union")
    assert made["lm_head.weight"].shape == (len(vocabulary("o1")), WIDTH)
    merged(["short", "padded"], "o2/", tokenizer_source="base")
    assert vocabulary("o2") == {t: n for t, n in vocabulary("short").items() if n < 6}
    merged(["padded", "short"], "o3/", tokenizer_source="short")
    assert vocabulary("o3") == vocabulary("short")


def test_tied_heads() -> None:
    folder("a", *A, head=False), folder("b", *B, head=False), folder("c", *B)
    assert "lm_head.weight" not in merged(["a", "b"], "o1/", tokenizer_source="union")
    tensors = load_file("c/model.safetensors")
    del tensors["lm_head.bias"]
    save_file(tensors, "c/model.safetensors", {"format": "pt"})
    made = merged(["a", "c"], "o2/", tokenizer_source="union")
    out, embed = vocabulary("o2"), load_file("a/model.safetensors")["model.embed_tokens.weight"]
    row = (embed[vocabulary("a")["a"]] + tensors["lm_head.weight"][vocabulary("c")["a"]]) / 2
    torch.testing.assert_close(made["lm_head.weight"][out["a"]], row)
    torch.testing.assert_close(made["lm_head.weight"][out["<B>"]], tensors["lm_head.weight"][vocabulary("c")["<B>"]])
    assert json.loads(Path("o2/config.json").read_text())["tie_word_embeddings"] is False


def test_embeddings_come_from_the_first_slice_and_heads_from_the_last() -> None:
    folder("a", *A), folder("b", *B)
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in "ab"]
    sm.merge(recipe={"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}, out="out/")
    made, out = load_file("out/model.safetensors"), vocabulary("out")
    embed, head = load_file("a/model.safetensors")[NAMES[0]], load_file("b/model.safetensors")["lm_head.weight"]
    for token, place in out.items():
        a, b = vocabulary("a").get(token), vocabulary("b").get(token)
        assert made[NAMES[0]][place].tolist() == (embed[a].tolist() if a is not None else [0.0] * WIDTH)
        assert made["lm_head.weight"][place].tolist() == (head[b].tolist() if b is not None else [0.0] * WIDTH)


def test_rows_of_other_dtypes_are_exact() -> None:
    folder("a", *A, dtype=torch.bfloat16), folder("b", *B, dtype=torch.float16)
    plain = merged(["a", "b"], "o1/", tokenizer_source="union", mixed_dtypes="first")
    assert plain["lm_head.weight"].dtype == torch.bfloat16
    made = merged(["a", "b"], "o2/", tokenizer_source="union")
    row = load_file("b/model.safetensors")["lm_head.weight"][vocabulary("b")["<B>"]].float()
    assert torch.equal(made["lm_head.weight"][vocabulary("o2")["<B>"]], row)


def test_rows_of_text_embeddings_of_voices_follow_their_tokens() -> None:
    """As XTTS has them: the vocabulary is a tokenizers JSON called vocab.json beside a .pth, other tables stay."""
    for name, tokens in (("old", ["[STOP]", "a", "b", "[START]"]), ("new", ["[STOP]", "a", "b", "[ru]", "c", "[START]"])):
        Path(name).mkdir()
        count = len(tokens)
        model = {
            "gpt.text_embedding.weight": torch.arange(count).float()[:, None] + torch.zeros(count, 2),
            "gpt.mel_embedding.weight": torch.ones(9, 2),
            "gpt.text_head.weight": -torch.arange(count).float()[:, None] + torch.zeros(count, 2),
            "gpt.text_head.bias": torch.arange(count).float(),
        }
        torch.save({"model": model}, f"{name}/model.pth")
        Path(name, "vocab.json").write_text(json.dumps(tokenizer(tokens)))
    sm.merge(["new/model.pth", "old/model.pth"], out="out.pth", tokenizer_source="base")
    made = torch.load("out.pth", weights_only=True)["model"]
    assert made["gpt.text_embedding.weight"][:, 0].tolist() == [0, 1, 2, 3, 4, 4]
    assert made["gpt.text_head.bias"].tolist() == [0, 1, 2, 3, 4, 4]
    with pytest.raises(sm.MismatchError, match="tokenizer_source"):
        sm.merge(["new/model.pth", "old/model.pth"], out="other.pth")


def test_symbols_in_lines_with_a_row_before_them() -> None:
    """As F5-TTS has them: one symbol in a line, the first is a space, and row 0 stands before all."""
    for name, symbols in (("a", [" ", "x", "y"]), ("b", [" ", "y", "z", "x"])):
        Path(name).mkdir()
        count = len(symbols) + 1
        table = torch.tensor([[float(n)] for n in range(count)])
        save_file({"transformer.text_embed.text_embed.weight": table}, f"{name}/model.safetensors", {"format": "pt"})
        Path(name, "vocab.txt").write_text("".join(f"{each}\n" for each in symbols))
    sm.merge(["a/", "b/"], out="out/", tokenizer_source="union")
    assert Path("out/vocab.txt").read_text() == " \nx\ny\nz\n"
    made = load_safetensors(Path("out/model.safetensors"))["transformer.text_embed.text_embed.weight"]
    assert made[:, 0].tolist() == [0, 1, 3, 2.5, 3]


def test_cut_embeddings() -> None:
    folder("a", *A, rows=8), folder("b", *B, rows=9)
    with pytest.raises(sm.MismatchError, match="tokenizer_source"):
        merged(["a", "b"])
    made = merged(["a", "b"], unsafe_truncate_embeddings=True)
    a, b = (load_file(f"{m}/model.safetensors") for m in "ab")
    torch.testing.assert_close(made["lm_head.weight"], (a["lm_head.weight"] + b["lm_head.weight"][:8]) / 2)
    for name in ACROSS:
        torch.testing.assert_close(made[name], (a[name] + b[name][:, :8]) / 2)
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 8


@pytest.mark.parametrize("models", [["a", "b"], ["b", "a"]])
def test_a_head_that_is_tied_in_one_model_is_cut_too(models: list[str]) -> None:
    folder("a", *A, rows=8, head=False), folder("b", *B, rows=9)
    made = merged(models, unsafe_truncate_embeddings=True, rules=[{"match": "lm_head.bias", "drop": True}])
    a, b = (load_file(f"{m}/model.safetensors") for m in "ab")
    torch.testing.assert_close(made["lm_head.weight"], (a["model.embed_tokens.weight"] + b["lm_head.weight"][:8]) / 2)
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_rule_copies_rows_in_the_order_of_the_output() -> None:
    for name, own in zip("abc", (A, B, C), strict=True):
        folder(name, *own)
    made = merged(["a", "b"], tokenizer_source="base", rules=[{"match": "lm_head.weight", "copy": "c"}])
    head, out = load_file("c/model.safetensors")["lm_head.weight"], vocabulary("out")
    for token, place in out.items():
        number = vocabulary("c").get(token)
        assert made["lm_head.weight"][place].tolist() == (head[number].tolist() if number is not None else [0.0] * WIDTH)


def test_a_folder_of_xtts_with_a_grown_vocabulary() -> None:
    for name, tokens in (("old", ["[STOP]", "a", "[START]"]), ("new", ["[STOP]", "a", "[ru]", "c", "[START]"])):
        Path(name).mkdir()
        count = len(tokens)
        table = torch.arange(count).float()[:, None].expand(count, 2).clone()
        torch.save({"gpt.text_embedding.weight": table, "gpt.mel_embedding.weight": torch.ones(9, 2)}, f"{name}/model.pth")
        Path(name, "vocab.json").write_text(json.dumps(tokenizer(tokens)))
        arguments = {"gpt_number_text_tokens": count, "gpt_start_text_token": count - 1, "gpt_start_audio_token": 1}
        Path(name, "config.json").write_text(json.dumps({"model": "xtts", "model_args": arguments}))
    sm.merge(["old/", "new/"], out="out/", tokenizer_source="union")
    table = torch.load("out/model.pth", weights_only=True)["gpt.text_embedding.weight"][:, 0]
    out = json.loads(Path("out/vocab.json").read_text())
    numbers = out["model"]["vocab"] | {each["content"]: each["id"] for each in out["added_tokens"]}
    assert numbers == {"[STOP]": 0, "a": 1, "[START]": 2, "[ru]": 3, "c": 4}
    assert table.tolist() == [0, 1, 3, 2, 3]
    arguments = json.loads(Path("out/config.json").read_text())["model_args"]
    assert arguments == {"gpt_number_text_tokens": 5, "gpt_start_text_token": 2, "gpt_start_audio_token": 1}


def test_tensors_are_found_by_their_rows() -> None:
    """Names of CTRL, XLM and RoBERTa with an early norm; a position table and a bias of another size stay as they are."""
    for name, own in zip("ab", (A, B), strict=True):
        folder(name, *own)
        count = len(vocabulary(name))
        tensors = {
            "transformer.w.weight": torch.arange(count).float()[:, None].expand(count, 2).clone(),
            "prelayernorm.embeddings.word_embeddings.weight": torch.zeros(count, 2),
            "prelayernorm.embeddings.position_embeddings.weight": torch.zeros(16, 2),
            "pred_layer.proj.bias": torch.arange(count).float(),
            "lm_head.weight": torch.arange(count + 1).float()[:, None].expand(count + 1, 2).clone(),
            "final.norm.weight": torch.zeros(2),
        }
        save_file(tensors, f"{name}/model.safetensors", {"format": "pt"})
    made, out = merged(["a", "b"], tokenizer_source="union"), vocabulary("out")
    for name in ("transformer.w.weight", "pred_layer.proj.bias", "lm_head.weight"):
        held = [vocabulary(model) for model in "ab"]
        for token, place in out.items():
            rows = [numbers[token] for numbers in held if token in numbers]
            assert made[name][place].flatten()[0] == sum(rows) / len(rows), (name, token)
    assert made["prelayernorm.embeddings.position_embeddings.weight"].shape == (16, 2)


_MODELS = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
KINDS = {
    "a": (["<s>", "</s>", *"abcd", "ab"], [("a", "b")], ["<A>"], None, False),
    "b": (["<s>", "</s>", *"dcba", "cd"], [("c", "d")], ["<B>", "<A>"], None, False),
    "padded": (["<s>", "</s>", *"abcd"], [], ["<P>"], 16, False),
    "short": (["<s>", "</s>", *"abcd"], [], ["<P>", "<Q>"], 7, False),
    "tied": (["<s>", "</s>", *"xabcd"], [], ["<A>"], None, True),
}
for seed, (name, (tokens, merges, added, rows, tied)) in enumerate(KINDS.items()):
    torch.manual_seed(seed)
    made = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(added)
    config = LlamaConfig(vocab_size=rows or len(tokenizer.get_vocab()), hidden_size=8, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(f"{sys.argv[1]}/{name}")
    tokenizer.save_pretrained(f"{sys.argv[1]}/{name}")
"""
_RUN = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, config in json.load(open(sys.argv[1])).items():
    run_merge(MergeConfiguration.model_validate(config), f"theirs-{name}", MergeOptions(quiet=True, write_model_card=False))
"""
_NEW = {"<new>": {"source": {"kind": "model_token", "model": "b", "token": "cd"}}, "<A>": {"source": "b", "force": True}}
_ASKED: dict[str, Any] = {
    "union": {"models": "ab", "tokenizer_source": "union"},
    "based": {"models": "ab", "base_model": "b", "tokenizer_source": "union"},
    "base": {"models": ["a", "b", "padded"], "base_model": "a", "tokenizer_source": "base"},
    "model": {"models": "ab", "tokenizer_source": "padded"},
    "pad": {"models": ["padded", "b"], "tokenizer": {"source": "union", "pad_to_multiple_of": 8}},
    "short": {"models": ["a", "short"], "tokenizer_source": "union"},
    "tokens": {"models": "ab", "tokenizer": {"source": "union", "tokens": _NEW}},
    "tied": {"models": ["tied", "b"], "tokenizer_source": "union"},
    "ties": {"models": "b", "base_model": "a", "merge_method": "ties", "tokenizer_source": "union"},
}


@pytest.mark.skipif("MERGEKIT_PYTHON" not in os.environ, reason="MERGEKIT_PYTHON names no interpreter with mergekit")
def test_mergekit_makes_the_same_rows() -> None:
    python = os.environ["MERGEKIT_PYTHON"]
    subprocess.run([python, "-c", _MODELS, "."], check=True, capture_output=True)
    shared = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    recipes = {
        name: {**shared, **asked, "models": [{"model": m} for m in asked["models"]]} for name, asked in _ASKED.items()
    }
    Path("recipes.json").write_text(json.dumps(recipes))
    subprocess.run([python, "-c", _RUN, "recipes.json"], check=True, capture_output=True)
    for name, recipe in recipes.items():
        sm.merge(recipe=recipe, out=f"ours-{name}/")
        ours, theirs = vocabulary(f"ours-{name}"), vocabulary(f"theirs-{name}")
        assert ours.keys() == theirs.keys(), name
        made, wanted = (load_file(f"{who}-{name}/model.safetensors") for who in ("ours", "theirs"))
        assert made.keys() == wanted.keys(), name
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert made[key].shape == wanted[key].shape, (name, key)
            torch.testing.assert_close(
                made[key][[*ours.values()]], wanted[key][[theirs[t] for t in ours]], msg=f"{name} {key}"
            )
            torch.testing.assert_close(made[key][len(ours) :], wanted[key][len(ours) :])
