"""What no method may merge is refused by name, copied where that is asked for, and told from what looks like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.tensors.quantised import ADVICE

FP8 = torch.float8_e4m3fn
PEFT = {"base_model.model.q.lora_A.weight": (2, 8), "base_model.model.q.lora_B.weight": (6, 2)}
KOHYA = {"lora_x.lora_up.weight": (6, 2), "lora_x.lora_down.weight": (2, 8), "lora_x.alpha": ()}
INSIDE = {"q.base_layer.weight": (6, 8), "q.lora_A.default.weight": (2, 8), "q.lora_B.default.weight": (6, 2)}
LOHA = {"lora_x.hada_w1_a": (6, 2), "lora_x.hada_w1_b": (2, 8), "lora_x.hada_w2_a": (6, 2), "lora_x.hada_w2_b": (2, 8)}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, f"{name}.safetensors")
    return f"{name}.safetensors"


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("values", "advice"),
    [(torch.ones(3, device="meta"), "a model whose weights are loaded"), (torch.eye(3).to_sparse(), r"to_dense\(\)")],
)
def test_tensors_that_are_not_read_are_refused_with_what_to_do(values: torch.Tensor, advice: str) -> None:
    torch.save({"w": torch.ones(3), "v": values}, "a.pt")
    with pytest.raises(sm.MismatchError, match=advice):
        sm.plan(["a.pt", "a.pt"])


@pytest.mark.parametrize("shapes", [PEFT, KOHYA, INSIDE, LOHA], ids=["peft", "kohya", "inside a model", "loha"])
@pytest.mark.parametrize("method", ["linear", "slerp", "median"])
def test_factors_of_adapters_are_not_merged(shapes: dict[str, tuple[int, ...]], method: str) -> None:
    a, b = (write(name, drawn(shapes, seed)) for name, seed in (("a", 1), ("b", 2)))
    parameters: dict[str, Any] = {"t": 0.5} if method == "slerp" else {}
    parameters |= {"rank": 2} if shapes is LOHA else {}
    recipe = {"merge_method": method, "models": [{"model": a}, {"model": b}], "parameters": parameters}
    if shapes is INSIDE:
        with pytest.raises(sm.MismatchError, match=r"a\.safetensors holds \d factors of an adapter .*merge_and_unload"):
            sm.plan(recipe=recipe)
    else:  # an adapter of both, whose updates are merged
        assert not isinstance(sm.plan(recipe=recipe), sm.Plan)
    sm.convert(a, "c.safetensors", dtype="float16")


def test_rules_have_no_meaning_for_adapters_alone() -> None:
    a, b = (write(name, drawn(KOHYA, seed)) for name, seed in (("a", 1), ("b", 2)))
    rules = [{"match": ["*lora_up*", "*lora_down*"], "copy": a}]
    with pytest.raises(sm.RecipeError, match="`rules` has no meaning for adapters alone"):
        sm.plan(recipe={"merge_method": "linear", "models": [{"model": a}, {"model": b}], "rules": rules})


def test_a_model_and_an_adapter() -> None:
    a, b = write("a", drawn({"q.weight": (6, 8), "v.weight": (6, 8)}, 1)), write("b", drawn(PEFT, 2))
    for policy in ("error", "base"):
        with pytest.raises(
            sm.MismatchError, match=r"this looks like an adapter \(LoRA\) in b\.safetensors: name it with its base model"
        ):
            sm.plan([a, b], on_missing=policy)  # type: ignore[arg-type]


def test_scales_that_enter_linearly_are_merged() -> None:
    a, b = (write(name, drawn({"base_model.model.h.0.ia3_l": (8, 1)}, seed)) for name, seed in (("a", 1), ("b", 2)))
    assert sm.plan([a, b]).counts() == {"linear": 1}


U32, I16, I32, F16, BF16, F32 = torch.uint32, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtypes", "label"),
    [
        ({"q.weight": U32, "q.scales": F16, "q.biases": F16}, "MLX"),
        ({"m.switch_mlp.up_proj.weight": U32, "m.switch_mlp.up_proj.scales": BF16}, "MLX"),
        ({"q.trellis": I16, "q.suh": F16, "q.svh": F16}, "EXL3"),
        ({"q.q_weight": I32, "q.q_scale": I32, "q.q_invperm": I16}, "EXL2"),
        ({"q.Qidxs": torch.int64, "q.Qidxs_0": I16, "q.SU": F16}, "QuIP#"),
        ({"q.indices": I16, "q.centroids.weight": F16}, "VPTQ"),
        ({"q.weight": torch.int8, "q.weight_step": F16}, "integers in place of weights"),
        ({"q.weight": torch.uint8, "q.weight_scale": F32}, "weight_scale"),
        ({"q.weight": FP8, "q.weights_scaling_factor": F32}, "scaling_factor"),
        ({"q._weight_qdata": torch.int8, "q._weight_scale": F32}, "torchao"),
    ],
    ids=str,
)
def test_packs_are_quantised(dtypes: dict[str, torch.dtype], label: str) -> None:
    tensors = {name: torch.ones(4, 4).to(dtype) for name, dtype in dtypes.items()} | {"norm.weight": torch.ones(4)}
    a, b = write("a", tensors), write("b", tensors)
    for options in ({}, {"integers": "first"}):
        with pytest.raises(sm.MismatchError, match=f"is quantised: .*{label}"):
            sm.plan([a, b], **options)
    if any(dtype.is_floating_point for dtype in dtypes.values()):
        with pytest.raises(sm.MismatchError, match="is quantised"):
            sm.convert(a, "c.safetensors", dtype="float64")
    if label in ADVICE:
        with pytest.raises(sm.MismatchError, match=f"is quantised: {label}"):
            sm.convert(a, "c.safetensors")
    else:
        sm.convert(a, "c.safetensors")


@pytest.mark.parametrize(
    ("dtypes", "library"),
    [
        ({"q.qweight": I32, "q.qzeros": I32, "q.scales": F16}, "GPTQModel"),
        ({"q.weight": torch.uint8, "q.weight.absmax": F32, "q.weight.quant_map": F32}, "bitsandbytes"),
        ({"q.W_q": torch.uint8, "q.scale": F16, "q.zero": F16}, "hqq"),
        ({"q.weight": U32, "q.scales": F16, "q.biases": F16}, "mlx_lm"),
        ({"q.trellis": I16, "q.suh": F16, "q.svh": F16}, "exllamav3"),
    ],
    ids=str,
)
def test_the_library_that_dequantises_is_named(dtypes: dict[str, torch.dtype], library: str) -> None:
    tensors = {name: torch.ones(4, 4).to(dtype) for name, dtype in dtypes.items()} | {"norm.weight": torch.ones(4)}
    a, b = write("a", tensors), write("b", tensors)
    for call in (
        lambda: sm.merge([a, b], "out.safetensors"),
        lambda: sm.convert(a, "out.safetensors"),
        lambda: sm.convert(a, "out.safetensors", dtype="bfloat16"),
    ):
        with pytest.raises(sm.MismatchError, match=rf"^a\.safetensors is quantised: .*{library}"):
            call()
    rules = [{"match": "q.*", "copy": a}]
    recipe = {"merge_method": "n_average", "models": [{"model": a}, {"model": b}], "rules": rules}
    sm.merge(recipe=recipe, out="out.safetensors")
    assert load_safetensors(Path("out.safetensors")).keys() == tensors.keys()


def test_a_quantised_model_beside_a_plain_one_is_told_as_that() -> None:
    plain = write("a", {"q.weight": torch.ones(8, 8), "norm.weight": torch.ones(8)})
    packed = {"q.weight": torch.ones(8, 1).to(U32), "q.scales": torch.ones(8, 1), "norm.weight": torch.ones(8)}
    with pytest.raises(sm.MismatchError, match=r"quantised weights: b\.safetensors is quantised: MLX.*mlx_lm\.convert"):
        sm.plan([plain, write("b", packed)])


@pytest.mark.parametrize(
    "tensors",
    [
        {"img_attn.qkv.weight": (8, 8, FP8), "img_attn.norm.query_norm.scale": (8, 1, FP8)},
        {"norm.weight": (8, 1, FP8), "norm.scale": (8, 1, FP8)},
        {"logit_scale": (1, 1, F32), "step": (1, 1, I32), "visual.proj": (4, 4, F32)},
        {"logit_scale": (1, 1, BF16), "text_projection": (4, 4, FP8)},
        {"attn.logit_scale": (4, 1, F32), "attn.relative_position_index": (4, 4, I32), "attn.qkv.weight": (4, 4, F32)},
        {"q.scales": (4, 4, F32), "q.weight": (4, 4, F32)},
    ],
    ids=str,
)
def test_a_parameter_called_scale_is_merged(tensors: dict[str, tuple[int, int, torch.dtype]]) -> None:
    files = []
    for seed in (1, 2):
        make = torch.Generator().manual_seed(seed)
        values = {
            n: torch.rand(r, c, generator=make) if d.is_floating_point else torch.ones(r, c)
            for n, (r, c, d) in tensors.items()
        }
        files.append(write(str(seed), {n: values[n].to(d) for n, (_, _, d) in tensors.items()}))
    sm.merge(files, "out.safetensors")
    one, two, out = map(load_safetensors, map(Path, (*files, "out.safetensors")))
    for name, made in out.items():
        assert torch.equal(made.float(), ((one[name].double() + two[name].double()) / 2).to(made.dtype).float()), name
    sm.convert(files[0], "bf16.safetensors", dtype="bfloat16")


def test_placeholders_of_zero_3_are_no_weights() -> None:
    """Small parameters stay whole under ZeRO-3."""
    torch.save({"a.weight": torch.empty(0), "b.weight": torch.empty(0), "b.bias": torch.ones(3)}, "pytorch_model.bin")
    torch.save({"a.weight": torch.ones(3, 3), "b.weight": torch.ones(3, 3), "b.bias": torch.ones(3)}, "whole.bin")
    for call in (
        lambda: sm.plan(["pytorch_model.bin", "whole.bin"]),
        lambda: sm.plan(["whole.bin", "pytorch_model.bin"], on_shape="base"),
        lambda: sm.convert("pytorch_model.bin", "out.safetensors"),
    ):
        with pytest.raises(sm.MismatchError, match=r"pytorch_model\.bin was saved under DeepSpeed's ZeRO-3.*zero_to_fp32"):
            call()


def test_an_empty_buffer_is_no_placeholder() -> None:
    tensors = {
        "queue": torch.empty(0),
        "other": torch.empty(0),
        "head.weight": torch.empty(0, 4),
        "w.weight": torch.empty(0),
    }
    torch.save(tensors, "a.bin")
    sm.convert("a.bin", "out.safetensors")
    shapes = {name: tensor.shape for name, tensor in load_safetensors(Path("out.safetensors")).items()}
    assert shapes == {name: tensor.shape for name, tensor in tensors.items()}


def test_integers_that_a_configuration_calls_quantised() -> None:
    """SpQR's tensors have names that tell nothing, and its config.json has a quantization_config."""
    folders = []
    for name, seed in (("a", 1), ("b", 2)):
        Path(name).mkdir()
        tensors = drawn({"q.first_order_stats": (4,), "norm.weight": (4,)}, seed)
        save_file(tensors | {"q.dense_weights": torch.arange(4) + seed}, f"{name}/model.safetensors")
        folders.append(name)
    with pytest.raises(sm.MismatchError, match="int64 values that differ"):
        sm.merge(folders, "out/")
    Path("a/config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "spqr"}}')
    with pytest.raises(sm.MismatchError, match=r"a is quantised: spqr, which config\.json states, as q\.dense"):
        sm.plan(folders, integers="first")
    with pytest.raises(sm.MismatchError, match="a is quantised: spqr"):
        sm.convert("a", "half/", dtype="float16")
    sm.convert("a", "same/")


def test_the_advice_for_an_adapter_names_its_base() -> None:
    Path("a").mkdir()
    save_file(drawn(PEFT, 1), "a/adapter_model.safetensors")
    Path("a/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": null}')
    with pytest.raises(sm.StreammergeError, match="lora_alpha"):
        models = [{"model": "a/adapter_model.safetensors"}, {"model": write("b", drawn(PEFT, 2))}]
        sm.plan(recipe={"merge_method": "linear", "models": models})
    a, b = (write(name, drawn(INSIDE, seed)) for name, seed in (("c", 1), ("d", 2)))
    with pytest.raises(sm.MismatchError, match=r"a model that holds its adapter; load it in PEFT"):
        sm.plan([a, b])
