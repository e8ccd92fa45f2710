"""Quantised models in every command: they are merged as the numbers that they stand for."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors, mean
from safetensors.torch import save_file

import streammerge as sm
from quantised.samples import FP8, Tensors, fp8_blocks, fp8_model, load_folder, mxfp4_experts, numbers_of, packed


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensors, Tensors]:
    monkeypatch.chdir(tmp_path)
    return fp8_model(Path("a"), 1), fp8_model(Path("b"), 2, torch.bfloat16)


Models = tuple[Tensors, Tensors]


def test_a_merge_is_the_mean_of_the_numbers(models: Models) -> None:
    result = sm.merge(["a", "b"], "out/")
    made = load_folder(Path("out"))
    assert made.keys() == models[0].keys()
    for name, tensor in made.items():
        expected = mean([each[name].double() for each in models], [1, 1]).bfloat16()
        assert torch.equal(tensor, expected), name
    config = json.loads(Path("out/config.json").read_text())
    assert config == {"model_type": "qwen3", "torch_dtype": "bfloat16"}
    weight_map = json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == made.keys()
    assert any("6 as fp8, a scale for each block of 128 x 128" in note for note in result.notes)
    assert any("weight_scale_inv" in note and "left out" in note for note in result.notes)
    assert sm.verify("out", sample="100%").equal_elems
    assert result.read_bytes < 2 * sum(file.stat().st_size for file in Path("a").glob("*.safetensors"))


@pytest.mark.parametrize(
    "ways", [{"workers": 1}, {"io": "pread"}, {"memory": "40MiB", "workers": 3}, {"executor": "processes"}]
)
def test_no_byte_depends_on_how_it_is_made(models: Models, ways: dict[str, object]) -> None:
    sm.merge(["a", "b"], "one/", method="ties", base="a")
    sm.merge(["a", "b"], "two/", method="ties", base="a", **ways)  # type: ignore[arg-type]
    for file in Path("one").iterdir():
        assert file.read_bytes() == Path("two", file.name).read_bytes(), file


def test_a_plain_model_and_a_quantised_one(models: Models) -> None:
    Path("plain").mkdir()
    save_file({name: tensor.half() for name, tensor in models[1].items()}, "plain/model.safetensors")
    sm.merge(["plain", "a"], "first.safetensors")
    sm.merge(["a", "plain"], "second.safetensors")
    for name, tensor in load_safetensors(Path("first.safetensors")).items():
        numbers = [models[1][name].half().double(), models[0][name].double()]
        assert torch.equal(tensor, mean(numbers, [1, 1]).half()), name
    kinds = {name: tensor.dtype for name, tensor in load_safetensors(Path("second.safetensors")).items()}
    assert set(kinds.values()) == {torch.bfloat16}
    recipe = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")]}
    sm.merge(recipe=recipe, out="third.safetensors")
    assert {t.dtype for t in load_safetensors(Path("third.safetensors")).values()} == {torch.bfloat16}


def test_rules_slices_and_adapters_see_numbers(models: Models) -> None:
    rules = [{"match": "*layers.1.*", "copy": "b"}, {"match": "*q_proj*", "dtype": "float32"}]
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "rules": rules}
    recipe["parameters"] = {"weight": 1}  # type: ignore[assignment]
    sm.merge(recipe=recipe, out="ruled.safetensors")
    made = load_safetensors(Path("ruled.safetensors"))
    assert torch.equal(made["model.layers.1.up_proj.weight"], models[1]["model.layers.1.up_proj.weight"].bfloat16())
    q = "model.layers.0.q_proj.weight"
    assert torch.equal(made[q], ((models[0][q].double() + models[1][q].double()) / 2).float())
    slices = [{"sources": [{"model": "a", "layer_range": [n, n + 1]}]} for n in (1, 0, 1)]
    sm.merge(recipe={"merge_method": "passthrough", "slices": slices}, out="stacked/")
    stacked = load_folder(Path("stacked"))
    assert torch.equal(stacked["model.layers.2.q_proj.weight"], models[0]["model.layers.1.q_proj.weight"].bfloat16())
    factors = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.randn(4, 200)}
    factors["base_model.model.model.layers.0.q_proj.lora_B.weight"] = torch.randn(200, 4)
    Path("lora").mkdir()
    save_file(factors, "lora/adapter_model.safetensors")
    Path("lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    sm.convert("a+lora", "applied.safetensors")
    a, b = (each.double() for each in factors.values())
    applied = load_safetensors(Path("applied.safetensors"))[q]
    assert applied.dtype == torch.bfloat16
    assert torch.equal(applied, (models[0][q].double() + b @ a).float().bfloat16())


def test_diff_and_extract_see_numbers(models: Models) -> None:
    sm.convert("a", "plain.safetensors", dtype="float32")
    assert sm.diff("a", "plain.safetensors").equal
    assert not sm.diff("a", "b").equal
    sm.extract("a", "lora", base="b", rank=4)
    assert Path("lora/adapter_model.safetensors").exists()


def test_noise_is_told_for_methods_of_differences(models: Models) -> None:
    told = sm.plan(["a", "b"], method="task_arithmetic", base="a").notes
    assert any("mostly the rounding to the grid of its codes" in note for note in told)
    assert not any("grid" in note for note in sm.plan(["a", "b"]).notes)


def test_files_that_state_a_quantisation_stay_behind(models: Models) -> None:
    Path("a/hf_quant_config.json").write_text("{}")
    sm.convert("a", "out/")
    assert not Path("out/hf_quant_config.json").exists()


def test_inspect_tells_the_scheme(models: Models) -> None:
    def shown(*arguments: str) -> str:
        command = [sys.executable, "-m", "streammerge", "inspect", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "quantised  6 weights as fp8, a scale for each block of 128 x 128" in shown("a")
    assert json.loads(shown("a", "--format", "json"))["quantised"] == {"fp8, a scale for each block of 128 x 128": 6}
    save_file({"m.weight": torch.ones(20, 30).to(FP8), "m.weight_scale_inv": torch.ones(7, 7)}, "bad.safetensors")
    assert "which do not fit" in shown("bad.safetensors") or "no blocks that fit" in shown("bad.safetensors")
    save_file({"m.qweight": torch.ones(8, 8).int(), "m.scales": torch.ones(8)}, "gptq.safetensors")
    assert "GPTQ or AWQ, which is not read" in shown("gptq.safetensors")


def test_a_pipeline_has_its_configurations_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("p", "q")):
        for part in ("transformer", "vae"):
            Path(name, part).mkdir(parents=True)
            Path(name, part, "config.json").write_text(
                '{"_class_name": "X", "quantization_config": {"quant_method": "fp8"}}'
            )
        Path(name, "model_index.json").write_text('{"transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}')
        codes, scales = fp8_blocks(torch.randn(130, 140, generator=torch.Generator().manual_seed(number)))
        stored = {"l.weight": codes, "l.weight_scale_inv": scales}
        save_file(stored, f"{name}/transformer/diffusion_pytorch_model.safetensors")
        save_file({"v.weight": torch.ones(3, 4)}, f"{name}/vae/diffusion_pytorch_model.safetensors")
    sm.merge(["p", "q"], "out/")
    assert load_safetensors(Path("out/transformer/diffusion_pytorch_model.safetensors")).keys() == {"l.weight"}
    assert "quantization_config" not in Path("out/transformer/config.json").read_text()
    assert "quantization_config" in Path("out/vae/config.json").read_text()
    sm.merge(["p", "p"], "self/", quantise="like-base")
    for file in Path("p").rglob("*.*"):
        if file.suffix == ".safetensors":
            one, two = load_safetensors(file), load_safetensors(Path("self", file.relative_to("p")))
            assert one.keys() == two.keys()
            assert all(torch.equal(each.view(torch.uint8), two[name].view(torch.uint8)) for name, each in one.items())
        else:
            assert file.read_bytes() == Path("self", file.relative_to("p")).read_bytes(), file


def _stored(seed: int) -> tuple[Tensors, Tensors]:
    """Returns weights of four schemes as they are stored, and their numbers."""
    make = torch.Generator().manual_seed(seed)
    stored: Tensors = {"norm.weight": torch.randn(200, generator=make).bfloat16()}
    numbers = dict(stored)
    codes, scales = fp8_blocks(torch.randn(200, 200, generator=make))
    stored |= {"q.weight": codes.t().contiguous().t(), "q.weight_scale_inv": scales}  # a strided view in a pickle
    numbers["q.weight"] = numbers_of(codes, scales)
    stored["i.weight"] = torch.randint(-127, 128, (30, 50), generator=make, dtype=torch.int8)
    stored["i.weight_scale"] = torch.rand(30, 1, generator=make)
    numbers["i.weight"] = stored["i.weight"].float() * stored["i.weight_scale"]
    fields = torch.randint(0, 16, (24, 64), generator=make)
    stored |= {"p.weight_packed": packed(fields, 4), "p.weight_shape": torch.tensor([24, 64])}
    stored["p.weight_scale"] = torch.rand(24, 2, generator=make)
    numbers["p.weight"] = (fields - 8).float() * stored["p.weight_scale"].repeat_interleave(32, 1)
    stored["e.experts_blocks"], stored["e.experts_scales"], numbers["e.experts"] = mxfp4_experts(2 + seed, 6, 3)
    stored["e.experts_blocks"], stored["e.experts_scales"] = stored["e.experts_blocks"][:2], stored["e.experts_scales"][:2]
    numbers["e.experts"] = numbers["e.experts"][:2].contiguous()
    stored["c.weight"] = torch.randn(9, 10, generator=make).to(FP8)
    stored["c.weight_scale"] = torch.rand((), generator=make)
    stored["c.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    numbers["c.weight"] = stored["c.weight"].float() * stored["c.weight_scale"]
    return stored, numbers


def _deflated(path: Path) -> None:
    """Compresses the records of an archive, as people do who zip a checkpoint again."""
    with zipfile.ZipFile(path) as old:
        members = [(each.filename, old.read(each)) for each in old.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members:
            new.writestr(name, data)


@pytest.mark.parametrize("form", ["zip", "wrapped", "deflated", "legacy", "plain", "memory"])
def test_every_container_may_hold_quantised_weights(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme is an expression over sources, so the codes may lie in views, records and the caller's memory."""
    monkeypatch.chdir(tmp_path)
    both = [_stored(1), _stored(2)]
    inputs: list[Any] = ["a.pth", "b.pth"]
    for name, (stored, _) in zip(inputs, both, strict=True):
        content = {"model": stored, "step": 3} if form == "wrapped" else stored
        if form == "plain":
            Path(name).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, name, _use_new_zipfile_serialization=form != "legacy")
        if form == "deflated":
            _deflated(Path(name))
    if form == "memory":
        inputs = [stored for stored, _ in both]
    sm.merge(inputs, "out.safetensors")
    made = {"out.safetensors": load_safetensors(Path("out.safetensors"))}
    if form != "memory":
        sm.merge(inputs, "out.pth")
        loaded = pickle.loads(Path("out.pth").read_bytes()) if form == "plain" else torch.load("out.pth")
        made["out.pth"] = loaded["model"] if form == "wrapped" else loaded
        assert sm.verify("out.pth", sample="100%").equal_elems
    for tensors in made.values():
        assert tensors.keys() == both[0][1].keys()
        for name, tensor in tensors.items():
            expected = mean([numbers[name].double() for _, numbers in both], [1, 1]).bfloat16()
            assert torch.equal(tensor, expected), name


def test_a_copy_of_the_weights_is_quantised_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An average beside the weights in a .pth has codes and scales of its own."""
    monkeypatch.chdir(tmp_path)
    numbers: dict[tuple[str, str], torch.Tensor] = {}
    for name in ("a", "b"):
        content: dict[str, Tensors] = {}
        for part in ("model", "ema"):
            codes, scales = fp8_blocks(torch.randn(130, 140) * (1 + len(numbers)))
            content[part] = {"q.weight": codes, "q.weight_scale_inv": scales, "q.bias": torch.ones(3)}
            numbers[name, part] = numbers_of(codes, scales)
        torch.save(content, f"{name}.pth")
    sm.merge(["a.pth", "b.pth"], "out.pth")
    made = torch.load("out.pth")
    for part in ("model", "ema"):
        assert made[part].keys() == {"q.weight", "q.bias"}
        expected = mean([numbers[name, part].double() for name in ("a", "b")], [1, 1]).bfloat16()
        assert torch.equal(made[part]["q.weight"], expected), part
    sm.merge(["a.pth", "a.pth"], "self.pth", quantise="like-base")
    same, own = torch.load("self.pth"), torch.load("a.pth")
    for part in ("model", "ema"):
        assert same[part].keys() == own[part].keys()
        assert all(torch.equal(same[part][n].float(), own[part][n].float()) for n in own[part]), part


def test_equal_codes_with_other_scales_are_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes, scales = fp8_blocks(torch.randn(130, 140))
    stored = {"a.weight": codes, "a.weight_scale_inv": scales, "b.weight": codes, "b.weight_scale_inv": 2 * scales}
    stored |= {"c.weight": codes, "c.weight_scale_inv": scales}
    torch.save(stored, "x.pth")
    sm.convert("x.pth", "out.pth", dtype="float32")
    made = torch.load("out.pth")
    assert torch.equal(made["a.weight"], numbers_of(codes, scales))
    assert torch.equal(made["b.weight"], numbers_of(codes, 2 * scales))
    assert made["c.weight"].data_ptr() == made["a.weight"].data_ptr()
