"""Every tensor of every input has one fate; what is not used is said, and refused where a merge is strict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, load_safetensors, trained, voice
from safetensors.torch import save_file

import streammerge as sm
from quantised.samples import fp8_model
from streammerge.planning.conservation import used_text
from streammerge.running.readback import receipt_of
from streammerge.stores.locations import parse
from streammerge.tensors.bundles import unbundled


def experts(seed: int, called: str = "experts", **more: torch.Tensor) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    made = {"model.embed_tokens.weight": torch.randn(64, 16, generator=make)}
    for layer in range(3):
        made[f"model.layers.{layer}.q.weight"] = torch.randn(16, 16, generator=make)
        for number in range(4):
            for role, shape in (("gate_proj", (8, 16)), ("up_proj", (8, 16)), ("down_proj", (16, 8))):
                name = f"model.layers.{layer}.mlp.{called}.{number}.{role}.weight"
                made[name] = torch.randn(shape, generator=make)
    return made | more


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 3, **config}))
    return path


def fates(account: dict[str, Any], every: list[str]) -> dict[str, tuple[str, str, str]]:
    """Returns name -> (fate, why, name in the output) of each tensor. ``every``: the names of the checkpoint's tensors."""
    found: dict[str, tuple[str, str, str]] = {}
    rule = [each for each in account["fates"] if "names" not in each]
    for each in account["fates"]:
        names = [name for text in each.get("names", ()) for name in unbundled(text)]
        into = [name for text in each.get("into", ()) for name in unbundled(text)] or names
        if len(into) < len(names):  # experts of a layer go into the tensor of the same layer
            into = [next(to for to in into if re.findall(r"\d+", to) == re.findall(r"\d+", name)[:1]) for name in names]
        assert each["count"] == len(names) or each in rule
        assert found.keys().isdisjoint(names)
        found |= {name: (each["fate"], each["why"], to) for name, to in zip(names, into, strict=True)}
    assert len(rule) <= 1
    for name in every:
        if name not in found:
            found[name] = rule[0]["fate"], rule[0]["why"], name
    assert len(found) == account["tensors"] == sum(each["count"] for each in account["fates"])
    return found


def test_all_tensors_of_equal_models_follow_the_rule(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", experts(1)), folder(tmp_path / "b", experts(2))
    result = sm.merge([a, b], tmp_path / "out/")
    accounts = receipt_of(parse(str(tmp_path / "out"))).accounts
    assert accounts == [
        {"checkpoint": name, "tensors": 40, "fates": [{"fate": "merged", "why": "by linear", "count": 40}]}
        for name in ("a", "b")
    ]
    assert "used     all 80 tensors of 2 inputs" in str(result.plan)
    assert not result.warnings or "not used" not in " ".join(result.warnings)
    sm.merge([a, b], tmp_path / "strict/", strict=True)


@pytest.mark.parametrize("policy", ["base", "average-present"])
def test_experts_under_other_names(tmp_path: Path, policy: Any) -> None:
    a, b = folder(tmp_path / "a", experts(1)), folder(tmp_path / "b", experts(2, "specialists"))
    asked = {"on_missing": policy, "out": tmp_path / "out.safetensors"}
    plan = sm.plan([a, b], **asked)
    (said,) = [each for each in plan.warnings if each.startswith("not used")]
    text = "model.layers.{0-2}.mlp.specialists.{0-3}.down_proj.weight"
    assert f"not used: 36 of 40 tensors of b: {text}, " in said
    assert said.endswith("(the first input lacks it)")
    assert "used     44 of 80 tensors of 2 inputs, 36 not used" in str(plan)
    told: list[Any] = []
    sm.merge([a, b], **asked, listener=told.append)
    first = next(number for number, event in enumerate(told) if type(event).__name__ == "TaskDone")
    assert any(said == getattr(event, "text", "") for event in told[:first])  # before the first tensor
    with pytest.raises(sm.MismatchError, match=r"`strict=True` refuses this merge: not used: 36 of 40 tensors of b"):
        sm.merge([a, b], tmp_path / "strict.safetensors", on_missing=policy, strict=True)
    assert not (tmp_path / "strict.safetensors").exists()


def test_the_command_line_refuses_with_its_exit_code(tmp_path: Path, cli: Cli) -> None:
    folder(tmp_path / "a", experts(1)), folder(tmp_path / "b", experts(2, "specialists"))
    made = cli("merge", "a", "b", "-o", "out/", "--on-missing", "base", "--strict", code=4)
    assert "--strict refuses this merge" in made.stderr
    assert "specialists" in made.stderr
    assert not (tmp_path / "out").exists()


def rows_and_objects(tmp_path: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yields inputs of which tensors are rows of tables, and the same as objects."""
    one, two = trained(1), trained(2)
    two["only.second"] = torch.ones(3, 3)
    for ending in ("safetensors", "pth"):
        paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
        for path, state in zip(paths, (one, two), strict=True):
            torch.save(state, path) if ending == "pth" else save_file(state, path)
        yield ending, paths


def test_rows_and_objects_have_the_same_accounts(tmp_path: Path) -> None:
    found = []
    for ending, paths in rows_and_objects(tmp_path):
        plan = sm.plan(paths, tmp_path / "out.safetensors", on_missing="base", integers="first")
        accounts = [each.record() for each in plan.accounts]
        found.append([{**each, "checkpoint": each["checkpoint"].removesuffix(f".{ending}")} for each in accounts])
        known = fates(accounts[1], [*trained(2), "only.second"])
        assert known["only.second"] == ("dropped", "the first input lacks it", "only.second")
        assert known["embed.weight"] == ("merged", "by linear", "embed.weight")
        assert known["position_ids"] == ("merged", "by integers", "position_ids")
    assert found[0] == found[1]


def test_rules_are_no_surprise(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        save_file(trained(seed), tmp_path / f"{name}.safetensors")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / f"{name}.safetensors"), "parameters": {"weight": 1}} for name in "ab"],
        "rules": [{"match": "layer.*", "drop": True}, {"match": "embed*", "copy": str(tmp_path / "b.safetensors")}],
        "integers": "first",
    }
    plan = sm.plan(recipe=recipe, out=tmp_path / "out.safetensors", strict=True)
    one, two = (fates(each.record(), list(trained(1))) for each in plan.accounts)
    assert one["layer.bias"] == two["layer.bias"] == ("dropped", "by the rule for layer.*", "layer.bias")
    assert one["embed.weight"] == ("dropped", "by the rule for embed*", "embed.weight")
    assert two["embed.weight"] == ("copied", "by the rule for embed*", "embed.weight")
    assert used_text(plan.accounts).endswith("5 left out by rules")


def test_other_names_are_told_with_those_in_the_output(tmp_path: Path) -> None:
    save_file(experts(1), tmp_path / "a.safetensors")
    save_file({f"wrapped.{name}": value for name, value in experts(2).items()}, tmp_path / "b.safetensors")
    plan = sm.plan([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], strict=True)
    record = plan.accounts[1].record()
    found = fates(record, [f"wrapped.{name}" for name in experts(2)])
    assert all(to == name.removeprefix("wrapped.") and fate == "merged" for name, (fate, _, to) in found.items())
    assert len(record["fates"]) == 5  # one for each form of a name


def test_fused_experts_are_told(tmp_path: Path) -> None:
    one, two = experts(1), {name: value for name, value in experts(2).items() if ".experts." not in name}
    for layer in range(3):
        for role in ("gate_proj", "up_proj", "down_proj"):
            rows = [experts(2)[f"model.layers.{layer}.mlp.experts.{n}.{role}.weight"] for n in range(4)]
            two[f"model.layers.{layer}.mlp.experts.{role}"] = torch.stack(rows)
    folder(tmp_path / "a", two), folder(tmp_path / "b", one)
    plan = sm.plan([tmp_path / "a", tmp_path / "b"], strict=True)  # a is fused, and b is read in this form
    found = fates(plan.accounts[1].record(), list(one))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert found[name] == ("fused", "by linear", "model.layers.1.mlp.experts.up_proj")
    plan = sm.plan([tmp_path / "b", tmp_path / "a"], strict=True)  # one fused tensor goes into several
    found = fates(plan.accounts[1].record(), list(two))
    assert found["model.layers.1.mlp.experts.up_proj"][0] == "merged"


def test_the_state_of_a_training_is_what_it_is(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    plan = sm.plan(voices, tmp_path / "out.pth", integers="first", strict=True)
    for seed, account in enumerate(plan.accounts, start=1):
        moments = sum(torch.is_tensor(each) for each in voice(seed, 1, 1, 1.0)["optimizer"][0]["state"][0].values())
        assert account.tensors == len(trained(seed)) + moments
        assert account.count("training") == moments
        assert not list(account.unused())
    kept = sm.plan(voices, tmp_path / "out.pth", integers="first", keep_optimizer=True)
    assert kept.accounts[0].count("training") == 0 < kept.accounts[1].count("training")


def test_a_second_state_dict_that_has_no_place_is_named(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        model = trained(seed)
        torch.save({"model": model, "ema": {n: v.clone() for n, v in model.items()}}, tmp_path / f"{name}.pth")
    inputs = [tmp_path / "a.pth", tmp_path / "b.pth"]
    strict = {"integers": "first", "strict": True}
    assert not [w for w in sm.plan(inputs, tmp_path / "out.pth", **strict).warnings if "not used" in w]
    with pytest.raises(sm.MismatchError, match=r"9 of 18 tensors of a.pth: ema.embed.weight"):
        sm.plan(inputs, tmp_path / "out.safetensors", **strict)


def test_tied_names_are_told(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        state = trained(seed)
        state["head.weight"] = state["embed.weight"]
        torch.save(state, tmp_path / f"{name}.pth")
    plan = sm.plan([tmp_path / "a.pth", tmp_path / "b.pth"], tmp_path / "out.pth", integers="first", strict=True)
    assert fates(plan.accounts[1].record(), [*trained(1), "head.weight"])["head.weight"] == ("tied", "", "embed.weight")


def test_state_dicts_in_memory_and_adapters(tmp_path: Path) -> None:
    one, two = dict(trained(1)), dict(trained(2))
    plan = sm.plan([one, two], tmp_path / "out.safetensors", integers="first", strict=True)
    assert [each.tensors for each in plan.accounts] == [9, 9]
    assert all(not each.count("dropped") for each in plan.accounts)
    name = "base_model.model.layer.lora_{}.weight"
    adapter = {name.format("A"): torch.ones(2, 31), name.format("B"): torch.ones(17, 2)}
    path = tmp_path / "adapter"
    path.mkdir()
    save_file(adapter, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file(one, tmp_path / "a.safetensors")
    save_file(two, tmp_path / "b.safetensors")
    inputs = [f"{tmp_path}/a.safetensors+{path}", tmp_path / "b.safetensors"]
    plan = sm.plan(inputs, tmp_path / "out.safetensors", integers="first", strict=True)
    assert sum(each.tensors for each in plan.accounts) == 9 + 2 + 9
    whole = next(name for name in one if name.startswith("layer") and name.endswith("bias"))
    save_file(adapter | {f"base_model.model.{whole}": torch.ones_like(one[whole])}, path / "adapter_model.safetensors")
    plan = sm.plan(inputs, tmp_path / "out.safetensors", integers="first")
    lost = fates(plan.accounts[0].record(), list(one))[whole]
    assert lost[:2] == ("dropped", "an adapter has another in its place")


def test_stages_account_for_their_models(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        save_file(trained(seed), tmp_path / f"{name}.safetensors")

    def models(*names: str) -> list[dict[str, Any]]:
        return [{"model": name, "parameters": {"weight": 1}} for name in names]

    paths = {name: str(tmp_path / f"{name}.safetensors") for name in "abc"}
    text = "\n---\n".join(
        json.dumps(each)
        for each in (
            {"name": "first", "merge_method": "linear", "models": models(paths["a"], paths["b"]), "integers": "first"},
            {"merge_method": "linear", "models": models("first", paths["c"]), "integers": "first"},
        )
    )
    (tmp_path / "recipe.yaml").write_text(text)
    plan = sm.plan(recipe=tmp_path / "recipe.yaml", out=tmp_path / "out.safetensors", strict=True)
    assert sorted(each.checkpoint for each in plan.accounts) == [f"{name}.safetensors" for name in "abc"]
    assert all(each.tensors == 9 and not list(each.unused()) for each in plan.accounts)


def test_many_exceptions_stay_small(tmp_path: Path) -> None:
    one, two = experts(1), experts(2, "specialists")
    save_file(one, tmp_path / "a.safetensors")
    save_file(two, tmp_path / "b.safetensors")
    plan = sm.plan([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], on_missing="base")
    assert len(json.dumps([each.record() for each in plan.accounts])) < 2000


def test_scales_are_read_with_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fp8_model(Path("a"), 1), fp8_model(Path("b"), 2, torch.bfloat16)
    plan = sm.plan(["a", "b"], "out/", strict=True)
    stored = [name for file in Path("a").glob("*.safetensors") for name in load_safetensors(file)]
    found = fates(plan.accounts[0].record(), stored)
    scales = [name for name in stored if name.endswith("weight_scale_inv")]
    assert scales
    assert all(found[name][::2] == ("read", name.removesuffix("_scale_inv")) for name in scales)
    plan = sm.plan(["a", "b"], "out/", quantise="like-base", strict=True)
    assert fates(plan.accounts[0].record(), stored)[scales[0]][0] in ("read", "merged")


def test_what_stands_beside_the_weights_is_not_called_a_state_dict(tmp_path: Path) -> None:
    for number in (1, 2):
        beside = {"codes": torch.tensor([number, 2]), "state": ("MT19937", np.array([number], dtype="uint32"))}
        torch.save({"model": {"w": torch.full((4,), float(number))}, **beside}, tmp_path / f"{number}.pth")
    result = sm.merge([tmp_path / "1.pth", tmp_path / "2.pth"], tmp_path / "out.pth")
    (said,) = [warning for warning in result.warnings if warning.startswith("not used")]
    assert "1.pth" not in said  # its array stays in the pickle
    assert said.endswith("2.pth: codes, state.1 (beside the weights; the output has what the first input has there)")


def test_a_mark_of_quantised_weights_is_a_helper(tmp_path: Path) -> None:
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    for number in (1, 2):
        tensors = {"q.weight": codes, "q.scale_weight": torch.tensor(float(number)), "n": torch.ones(2)}
        save_file({**tensors, "scaled_fp8": torch.zeros(2).to(codes.dtype)}, tmp_path / f"{number}.safetensors")
    plan = sm.plan([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], out=tmp_path / "out.safetensors")
    assert not any("not used" in warning for warning in plan.warnings)
    assert plan.accounts[0].count("read") == 2
