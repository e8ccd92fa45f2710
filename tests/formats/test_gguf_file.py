"""Files of llama.cpp: quantised weights, names and layouts of transformers, and headers that lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors, mean

import streammerge as sm
from formats.gguf_samples import Tensor, gguf, plain, q8_0, text, value, write
from quantised.samples import Tensors
from streammerge.formats.gguf_file import read_gguf
from streammerge.stores.locations import parse

LLAMA = {"general.architecture": "llama", "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
TOKENS = {
    "tokenizer.ggml.tokens": ["a", "b" * 70, ""],
    "tokenizer.ggml.scores": [0.5, 1.0],
    "empty": [],
    "deep": [[1], [2, 3]],
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns rows as llama.cpp's converter stores them: the halves of each head by turns."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama(seed: int, kind: str) -> tuple[dict[str, Tensor], Tensors]:
    """Returns the tensors of a file, and their numbers under the names of transformers."""
    make = torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {}
    numbers: Tensors = {}

    def add(name: str, theirs: str, shape: tuple[int, ...], heads: int = 0, small: bool = False) -> None:
        weight = torch.randn(shape, generator=make)
        if kind == "Q8_0" and not small:
            _, weight = q8_0(weight)
            stored[name], _ = q8_0(interleaved(weight, heads) if heads else weight)
        else:
            weight = weight if small or kind == "F32" else weight.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind])
            stored[name] = plain(interleaved(weight, heads) if heads else weight)
        numbers[theirs] = weight

    add("token_embd.weight", "model.embed_tokens.weight", (40, 64))
    for layer in range(2):
        at, there = f"blk.{layer}.", f"model.layers.{layer}."
        add(f"{at}attn_q.weight", f"{there}self_attn.q_proj.weight", (64, 64), 4)
        add(f"{at}attn_q.bias", f"{there}self_attn.q_proj.bias", (64,), 4, True)
        add(f"{at}attn_k.weight", f"{there}self_attn.k_proj.weight", (32, 64), 2)
        add(f"{at}attn_v.weight", f"{there}self_attn.v_proj.weight", (32, 64))
        add(f"{at}ffn_up.weight", f"{there}mlp.up_proj.weight", (96, 64))
        add(f"{at}attn_norm.weight", f"{there}input_layernorm.weight", (64,), 0, True)
    stored["rope_freqs.weight"] = plain(torch.ones(8))
    return stored, numbers


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_llama_has_the_names_and_rows_of_transformers(kind: str) -> None:
    numbers = []
    for seed, name in enumerate(("a", "b")):
        stored, theirs = llama(seed, kind)
        write(Path(f"{name}.gguf"), LLAMA | TOKENS, stored)
        numbers.append(theirs)
    sm.convert("a.gguf", "a.safetensors", dtype="float32")
    made = load_safetensors(Path("a.safetensors"))
    assert made.keys() == numbers[0].keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, numbers[0][name].float()), name
    result = sm.merge(["a.gguf", "b.gguf"], "out/")
    merged = load_safetensors(Path("out/model.safetensors"))
    for name, tensor in merged.items():
        one, two = (each[name] for each in numbers)
        wide = kind == "F32" or one.dim() == 1
        dtype = torch.float32 if wide else one.dtype if kind != "Q8_0" else torch.bfloat16
        assert torch.equal(tensor, mean([one.double(), two.double()], [1, 1]).to(dtype)), name
    assert any("rope_freqs.weight is left out" in note for note in result.notes)
    assert sm.verify("out", sample="100%").equal_elems
    assert sm.diff("a.gguf", "a.safetensors").equal


def test_experts_and_norms_and_other_architectures() -> None:
    make = torch.Generator().manual_seed(1)
    stack, numbers = q8_0(torch.randn(3, 5, 64, generator=make))
    norm, gate = torch.randn(64, generator=make), torch.randn(64, generator=make)
    stored = {
        "blk.0.ffn_up_exps.weight": stack,
        "blk.0.ffn_gate_exps.weight": plain(torch.randn(3, 5, 64, generator=make)),
        "blk.0.ffn_gate_inp_shexp.weight": plain(gate),
        "odd.name": plain(norm),
    }
    write(Path("qwen.gguf"), {"general.architecture": "qwen2moe"}, stored)
    sm.convert("qwen.gguf", "qwen.safetensors", dtype="float32")
    made = load_safetensors(Path("qwen.safetensors"))
    for expert in range(3):
        assert torch.equal(made[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"], numbers[expert])
        assert made[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"].shape == (5, 64)
    assert torch.equal(made["model.layers.0.mlp.shared_expert_gate.weight"], gate.view(1, 64))
    assert torch.equal(made["odd.name"], norm)
    assert any("odd.name keep" in note for note in sm.inspect("qwen.gguf").notes)
    write(Path("gemma.gguf"), {"general.architecture": "gemma3"}, {"blk.0.attn_norm.weight": plain(norm + 1)})
    sm.convert("gemma.gguf", "gemma.safetensors")
    made = load_safetensors(Path("gemma.safetensors"))
    assert torch.equal(made["model.layers.0.input_layernorm.weight"], ((norm + 1).double() - 1).float())
    write(Path("other.gguf"), {"general.architecture": "mamba"}, {"blk.0.attn_norm.weight": plain(norm)})
    assert list(sm.inspect("other.gguf")) == ["blk.0.attn_norm.weight"]
    assert any("the names of llama.cpp are kept" in note for note in sm.inspect("other.gguf").notes)


def test_the_files_of_a_set_are_one_model() -> None:
    stored, numbers = llama(1, "Q8_0")
    names = list(stored)
    for number in (1, 2):
        part = {name: stored[name] for name in names[number - 1 :: 2]}
        write(Path(f"m-0000{number}-of-00002.gguf"), LLAMA if number == 1 else {"split.no": 1}, part)
    for given in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        sm.convert(given, "out.safetensors", dtype="float32", overwrite=True)
        made = load_safetensors(Path("out.safetensors"))
        assert made.keys() == numbers.keys()
        assert all(torch.equal(tensor, numbers[name].float()) for name, tensor in made.items())
    Path("m-00002-of-00002.gguf").unlink()
    with pytest.raises(
        sm.FormatError, match=r"m-00001-of-00002\.gguf is one file of 2, and m-00002-of-00002\.gguf is absent"
    ):
        sm.inspect("m-00001-of-00002.gguf")


def test_quantise_like_base_is_refused() -> None:
    write(Path("a.gguf"), LLAMA, llama(1, "Q8_0")[0])
    with pytest.raises(sm.RecipeError, match="is stored as Q8_0 of GGUF, which is read and not written"):
        sm.plan(["a.gguf", "a.gguf"], quantise="like-base")
    assert "Q8_0 of GGUF" in {weight.scheme for weight in sm.inspect("a.gguf").quantised.values()}


W = plain(torch.ones(4, 64))


def head(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def info(name: str, shape: tuple[int, ...], kind: int, start: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, start)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"GGUF", "is a truncated GGUF file: its header goes on behind byte 4"),
    "version 1": (head(0, 0, version=1), "is of version 1 of GGUF"),
    "version 9": (head(0, 0, version=9), "is of version 9 of GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "many tensors": (head(1 << 60, 0), "claims 1152921504606846976 tensors and 0 keys"),
    "many keys": (head(0, 1 << 60), "claims 0 tensors and 1152921504606846976 keys"),
    "long key": (head(0, 1, struct.pack("<Q", 1 << 60)), "a key of its metadata has 1152921504606846976 bytes"),
    "long text": (head(0, 1, text("k") + struct.pack("<IQ", 8, 1 << 60)), "is a truncated GGUF file"),
    "long array": (head(0, 1, text("k") + struct.pack("<IIQ", 9, 4, 1 << 60)), "is a truncated GGUF file"),
    "array of texts": (
        head(0, 1, text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)),
        "an array of 1152921504606846976 values",
    ),
    "array of arrays": (
        head(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1 << 60)),
        "an array of 1152921504606846976 values",
    ),
    "deep arrays": (
        head(0, 1, text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9 + bytes(99)),
        "a value of type 9, which GGUF does not have there",
    ),
    "unknown value": (head(0, 1, text("k") + struct.pack("<I", 77)), "a value of type 77"),
    "no UTF-8": (head(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "is not valid UTF-8"),
    "long name": (head(1, 0, struct.pack("<Q", 1 << 40)), "the name of a tensor has 1099511627776 bytes"),
    "many axes": (head(1, 0, text("w") + struct.pack("<I", 1 << 31)), "tensor w has 2147483648 axes"),
    "huge shape": (head(1, 0, info("w", (1 << 60, 64), 0, 0)), "has a shape whose size overflows"),
    "huge size": (head(1, 0, info("w", (1 << 50,), 0, 0)), "reaches to byte"),
    "offset outside": (head(1, 0, info("w", (4,), 0, 1 << 60)), "reaches to byte"),
    "unaligned": (head(1, 0, info("w", (4,), 0, 7)) + bytes(200), "which is no multiple of 32"),
    "overlap": (head(2, 0, info("w", (16,), 0, 0) + info("v", (16,), 0, 32)) + bytes(300), "overlaps the tensor before it"),
    "twice": (head(2, 0, info("w", (8,), 0, 0) + info("w", (8,), 0, 32)) + bytes(300), "tensor w is there twice"),
    "no blocks": (head(1, 0, info("w", (33,), 8, 0)) + bytes(300), "does not consist of blocks of 32 numbers"),
    "no axis": (head(1, 0, info("w", (), 12, 0)) + bytes(300), r"of shape \[\] does not consist of blocks"),
    "Q8_K": (head(1, 0, info("w", (256,), 15, 0)) + bytes(300), "tensor w is of the type Q8_K, which is not read"),
    "unknown type": (head(1, 0, info("w", (256,), 999, 0)) + bytes(300), "is of the unknown type 999"),
    "alignment 0": (gguf({"general.alignment": 0}, {"w": W}), "its alignment 0 is no power of two"),
    "alignment 48": (gguf({"general.alignment": 48}, {"w": W}), "its alignment 48 is no power of two"),
    "adapter": (gguf({"general.type": "adapter"}, {"w": W}), r"is an adapter \(LoRA\) for llama\.cpp"),
    "no heads": (gguf({"general.architecture": "llama"}, {"blk.0.attn_q.weight": W}), "states no head_count that fits"),
    "odd heads": (
        gguf({"general.architecture": "llama", "llama.attention.head_count": 3}, {"blk.0.attn_q.weight": W}),
        "states no head_count that fits",
    ),
    "two of one name": (
        gguf({"general.architecture": "qwen2"}, {"output.weight": W, "lm_head.weight": W}),
        "the name lm_head.weight stands for two tensors",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_wrong_is_one_sentence(case: str) -> None:
    data, said = HOSTILE[case]
    Path("x.gguf").write_bytes(data)
    with pytest.raises(sm.FormatError, match=said) as caught:
        sm.inspect("x.gguf")
    assert str(caught.value).startswith("x.gguf")
    assert "\n" not in str(caught.value)


def test_another_alignment_and_long_texts_are_read() -> None:
    metadata: dict[str, Any] = {"general.alignment": 128, "long": "x" * 100_000}
    Path("x.gguf").write_bytes(gguf(metadata, {"w": W, "v": plain(torch.arange(3.0))}, alignment=128, version=2))
    container = read_gguf(parse("x.gguf"))
    assert [container.tree[name].shape for name in ("w", "v")] == [(4, 64), (3,)]
    sm.convert("x.gguf", "x.safetensors")
    assert torch.equal(load_safetensors(Path("x.safetensors"))["v"], torch.arange(3.0))
    assert value(True)[:4] == struct.pack("<I", 7)
