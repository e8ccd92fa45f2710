"""Every scheme against the library that it comes from, where that is installed. Samples are made by the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from quantised.samples import FP8_CONFIG, Tensors, fp8_blocks, in_blocks, mxfp4_experts, numbers_of


def converted(tensors: Tensors, config: dict[str, Any] | None = None) -> Tensors:
    Path("a").mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "a/model.safetensors")
    Path("a/config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    sm.convert("a", "out/", dtype="float32", overwrite=True)
    return load_safetensors(Path("out/model.safetensors"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


INTEGERS = [
    {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size, "symmetric": symmetric}
    for bits in (3, 4, 5, 8)
    for strategy, size in (("group", 32), ("channel", None))
    for symmetric in (True, False)
]
FLOATS = [
    {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    for strategy, more in (("tensor", {}), ("channel", {}), ("block", {"block_structure": [128, 128]}))
]


@pytest.mark.parametrize(
    "weights", [*INTEGERS, *FLOATS], ids=lambda w: f"{w['type']}{w['num_bits']} {w['strategy']} {w['symmetric']}"
)
@pytest.mark.parametrize("packs", [True, False])
def test_compressed_tensors(weights: dict[str, Any], packs: bool) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    if (packs and weights["type"] == "float") or (not packs and weights["type"] == "int" and weights["num_bits"] != 8):
        pytest.skip("compressed-tensors has no such format")
    shape = (256, 320)
    if weights["strategy"] == "block":
        shape = (256, 384)
    weight, arguments = drawn(*shape), QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    if weights["strategy"] == "group":
        parts = weight.unflatten(1, (-1, weights["group_size"]))
        low, high = parts.amin(2), parts.amax(2)
    elif weights["strategy"] == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif weights["strategy"] == "block":
        parts = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    else:
        low, high = weight.min().view(1), weight.max().view(1)
    scale, zero = calculate_qparams(low, high, arguments)
    form = "pack-quantized" if packs else "naive-quantized"
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale.float()}
    if not weights["symmetric"]:
        state["weight_zero_point"] = zero
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}
    made = converted({f"m.{name}": tensor for name, tensor in stored.items()}, config)
    assert made.keys() == {"m.weight"}
    assert expected.dtype == torch.float32
    assert torch.equal(made["m.weight"], expected)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_what_is_quantised_like_compressed_tensors(kind: str, strategy: str, tmp_path: Path) -> None:
    """Codes and scales of a merge are those that the library makes of the same numbers."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("naive-quantized")

    def compressed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        low, high = weight.min().view(1), weight.max().view(1)
        if strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale, _ = calculate_qparams(low, high, arguments)
        return dict(compressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme))

    stored = [compressed(drawn(256, 320) * number) for number in (1.0, -0.3)]
    inputs = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, tensors in zip(inputs, stored, strict=True):
        save_file({f"m.{each}": tensor for each, tensor in tensors.items()}, path)
    sm.merge(inputs, tmp_path / "out.safetensors", quantise="like-base")
    numbers = [compressor.decompress(dict(each), scheme)["weight"].double() for each in stored]
    expected = compressed(((numbers[0] + numbers[1]) / 2).float())
    made = load_safetensors(tmp_path / "out.safetensors")
    for name in ("weight", "weight_scale"):
        assert torch.equal(made[f"m.{name}"].float(), expected[name].float()), name


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_compressed_tensors_of_four_bits(form: str) -> None:
    """The library rounds to bfloat16 in between."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    packed = torch.randint(0, 256, (64, 96), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    if form.startswith("nv"):
        more: dict[str, Any] = {"strategy": "tensor_group", "group_size": 16}
        scale = (drawn(64, 12).abs() + 0.1).to(torch.float8_e4m3fn)
        stored = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": torch.tensor([300.0])}
    else:
        more = {"strategy": "group", "group_size": 32}
        stored = {"weight_packed": packed, "weight_scale": torch.randint(118, 130, (64, 6), dtype=torch.uint8)}
    arguments = QuantizationArgs(num_bits=4, type="float", symmetric=True, **more)
    compressor = BaseCompressor.get_value_from_registry(form)
    expected = compressor.decompress(dict(stored), QuantizationScheme(targets=["Linear"], weights=arguments))["weight"]
    made = converted({f"m.{name}": tensor for name, tensor in stored.items()})["m.weight"]
    torch.testing.assert_close(made, expected.float(), rtol=8e-3, atol=0)


def test_gpt_oss_in_transformers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed")
    blocks, scales, _ = mxfp4_experts(3, 10, 2)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    made = converted({"m.experts.down_proj_blocks": blocks, "m.experts.down_proj_scales": scales})
    assert torch.equal(made["m.experts.down_proj"], expected.float())


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_comfy_kitchen(form: str) -> None:
    quantization = pytest.importorskip("comfy_kitchen.backends.eager.quantization", reason="comfy-kitchen is not installed")
    weight = drawn(200, 96)
    if form == "nvfp4":
        whole = weight.abs().max() / (448 * 6)
        codes, scales = quantization.quantize_nvfp4(weight, whole)
        expected = quantization.dequantize_nvfp4(codes, whole, scales, torch.float32)
        stored = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
    else:
        codes, scales = quantization.quantize_mxfp8(weight)
        expected = quantization.dequantize_mxfp8(codes, scales, torch.float32)
        stored = {"weight": codes, "weight_scale": scales}
    said = torch.frombuffer(bytearray(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    made = converted({f"m.{name}": tensor for name, tensor in stored.items()} | {"m.comfy_quant": said})
    assert torch.equal(made["m.weight"], expected)


GGML = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "TQ1_0",
    "TQ2_0",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "NVFP4",
)


@pytest.mark.parametrize("kind", [*GGML, "F32", "F16", "BF16"])
def test_gguf_of_its_own_writer(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    import numpy as np

    form = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[form]
    numbers = drawn(24, 2 * block if block > 1 else 64).numpy()
    try:
        data = gguf.quants.quantize(numbers, form)
    except NotImplementedError:  # the library only reads it
        data = np.random.default_rng(1).integers(0, 256, (24, 2 * size), dtype=np.uint8)
        data[:, 1::size] &= 0x3B
        data[:, size - 1 :: size] &= 0x3B
    writer = gguf.GGUFWriter("a.gguf", "none")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("w", data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(data, form).astype(np.float32)
    sm.convert("a.gguf", "out.safetensors", dtype="float32", allow_nonfinite=True)
    made = load_safetensors(Path("out.safetensors"))["w"]
    assert made.shape == expected.shape
    same = (made.numpy().view(np.uint32) == expected.view(np.uint32)) | (np.isnan(expected) & made.isnan().numpy())
    assert same.all()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_gguf_in_transformers(architecture: str) -> None:
    """The names, rows and norms are those of transformers' own reader."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    utils = pytest.importorskip("transformers.modeling_gguf_pytorch_utils", reason="transformers is not installed")
    import inspect

    import transformers

    wide, heads, kv, inner, layers, tokens = 64, 4, 2, 96, 2, 40
    writer = gguf.GGUFWriter("a.gguf", architecture)
    for key, number in (("block_count", layers), ("context_length", 64), ("embedding_length", wide)):
        getattr(writer, f"add_{key}")(number)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tokens)
    shapes = {"token_embd.weight": (tokens, wide), "output_norm.weight": (wide,), "output.weight": (tokens, wide)}
    for layer in range(layers):
        at = f"blk.{layer}."
        shapes |= {f"{at}attn_{n}.weight": (r * wide // heads, wide) for n, r in (("q", heads), ("k", kv), ("v", kv))}
        shapes |= {f"{at}attn_output.weight": (wide, wide), f"{at}ffn_down.weight": (wide, inner)}
        shapes |= {f"{at}ffn_{n}.weight": (inner, wide) for n in ("gate", "up")}
        sandwiched = ["post_attention_norm", "post_ffw_norm"] if architecture in ("gemma2", "gemma3") else []
        shapes |= {f"{at}{n}.weight": (wide,) for n in ("attn_norm", "ffn_norm", *sandwiched)}
        if architecture in ("qwen3", "gemma3"):
            shapes |= {f"{at}attn_{n}_norm.weight": (wide // heads,) for n in "qk"}
    for seed, (name, shape) in enumerate(shapes.items()):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        if len(shape) == 2:
            packed = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kinds = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3": "Gemma3"}
    config = getattr(transformers, f"{kinds[architecture]}{'Text' * (architecture == 'gemma3')}Config")(
        hidden_size=wide, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=inner,
        head_dim=wide // heads, num_hidden_layers=layers, vocab_size=tokens,
        tie_word_embeddings=False, attention_bias=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{kinds[architecture]}ForCausalLM")(config)
    more = {"model_to_load": model} if "model_to_load" in inspect.signature(utils.load_gguf_checkpoint).parameters else {}
    theirs = utils.load_gguf_checkpoint("a.gguf", return_tensors=True, **more)["tensors"]
    sm.convert("a.gguf", "out.safetensors", dtype="float32")
    made = load_safetensors(Path("out.safetensors"))
    assert len(theirs) > 10
    for name, tensor in theirs.items():
        assert torch.equal(made[name], tensor.float()), name


def test_transformers_loads_what_is_quantised_like_the_base() -> None:
    """Its own fp8 quantiser gives the merge within half a step; the plain merge loads without it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    config = transformers.Qwen3Config(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    numbers: list[Tensors] = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(name)
        stored, plain = load_safetensors(Path(name, "model.safetensors")), Tensors()
        for key, tensor in list(stored.items()):
            plain[key] = tensor.float()
            if "proj.weight" in key:
                stored[key], stored[f"{key}_scale_inv"] = fp8_blocks(tensor.float())
                plain[key] = numbers_of(stored[key], stored[f"{key}_scale_inv"])
        save_file(stored, f"{name}/model.safetensors", {"format": "pt"})
        said = json.loads(Path(name, "config.json").read_text())
        said["quantization_config"] = FP8_CONFIG | {"modules_to_not_convert": ["lm_head"]}
        Path(name, "config.json").write_text(json.dumps(said))
        numbers.append(plain)
    sm.merge(["a", "b"], "plain/")
    sm.merge(["a", "b"], "like/", quantise="like-base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain_model = load("plain", dtype=torch.bfloat16).state_dict()
    quantiser = transformers.FineGrainedFP8Config(
        weight_block_size=(128, 128), dequantize=True, modules_to_not_convert=["lm_head"]
    )
    like = load("like", quantization_config=quantiser, dtype=torch.float32).state_dict()
    scales = load_safetensors(Path("like/model.safetensors"))
    for key, one in numbers[0].items():
        merged = (one.double() + numbers[1][key].double()) / 2
        assert torch.equal(plain_model[key], merged.bfloat16()), key
        if f"{key}_scale_inv" in scales:
            scale = in_blocks(scales[f"{key}_scale_inv"], *merged.shape).double()
            step = torch.maximum(merged.abs() * 2.0**-3, scale * 2.0**-9)
            assert bool(((like[key].double() - merged).abs() <= step / 2).all()), key
