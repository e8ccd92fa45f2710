"""Other names for tensors, said by hand: for all models, for one, for the model that a rule copies from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.recipe.patterns import parse_renames, renamed

Tensors = dict[str, torch.Tensor]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a.double() + b.double()) / 2).to(a.dtype)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file({"h.0.w": draw(1, 3), "h.1.w": draw(2, 3)}, "a.safetensors")
    save_file({"layers.0.w": draw(3, 3), "layers.1.w": draw(4, 3)}, "b.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("said", "name", "expected"),
    [
        ("old.*=new.*", "old.a.b", "new.a.b"),
        ("old.*=new.*", "gold.a", "gold.a"),
        ("*=model.*", "a.b", "model.a.b"),
        ("model.*=*", "model.a.b", "a.b"),
        ("a.*.b.*=x.*.y.*", "a.1.b.w", "x.1.y.w"),
        ("*.gamma=*.weight", "n.gamma", "n.weight"),
        ("exact=other", "exact", "other"),
        ("exact=other", "exactly", "exactly"),
        ("a.c=x", "abc", "abc"),
        (r"/^h\.(\d+)\.(.*)$/=layers.\1.\2", "h.3.w", "layers.3.w"),
        (r"/\.gamma$/=.weight", "n.gamma", "n.weight"),
        (r"/(?P<n>\d+)=/=<\g<n>>", "a7=b", "a<7>b"),
        (["x=first", "*=second.*"], "x", "first"),
        ({"x": "first", "*": "second.*"}, "y", "second.y"),
    ],
)
def test_new_names(said: Any, name: str, expected: str) -> None:
    assert renamed([name], parse_renames(said)) == {name: expected}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("a.*", "write FROM=TO"),
        ("a=*", "has more \\* than a"),
        ("a=", "is empty"),
        ("/(/=x", "not a regular expression"),
        (r"/(a)/=\2", "names group 2"),
        ("h.*.w=w", "h.0.w and h.1.w would both be called w"),
        ("h.0.w=h.1.w", "h.0.w and h.1.w would both be called h.1.w"),
        (7, "`rename` takes patterns and new names"),
        ({"a": 7}, "`rename` takes patterns and new names"),
    ],
)
def test_what_cannot_be(said: Any, words: str) -> None:
    with pytest.raises(sm.RecipeError, match=words):
        sm.plan(["a.safetensors"], rename=said)


def test_a_pattern_that_takes_for_ever_is_stopped() -> None:
    started = time.monotonic()
    with pytest.raises(sm.RecipeError, match="takes for ever"):
        renamed(["a" * 4000 + "!"], parse_renames(r"/^(a|a|aa)+$/=x"))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_dialects_are_mapped_on_the_command_line(command: str, cli: Cli) -> None:
    out = ["-o", "out.safetensors"] if command == "merge" else []
    shown = cli(command, "a.safetensors", "b.safetensors", "--rename", r"/^layers\.(\d+)/=h.\1", *out)
    assert "b.safetensors: 2 tensors renamed by" in shown.stdout + shown.stderr
    if command == "merge":
        assert load_safetensors(Path("out.safetensors")).keys() == {"h.0.w", "h.1.w"}
        assert torch.equal(load_safetensors(Path("out.safetensors"))["h.1.w"], mean(draw(2, 3), draw(4, 3)))
        sm.verify("out.safetensors", sample="100%")


def test_the_first_models_new_names_are_the_outputs() -> None:
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", rename={"h.*": "layers.*"})
    assert torch.equal(load_safetensors(Path("out.safetensors"))["layers.0.w"], mean(draw(1, 3), draw(3, 3)))


@pytest.mark.parametrize("several", [False, True])
def test_convert_renames_the_keys_of_a_pth(several: bool, cli: Cli) -> None:
    states = {"net_g": {"w": draw(1, 2), "b": draw(2, 2)}} | ({"net_d": {"w": draw(3, 2)}} if several else {})
    torch.save({**states, "step": 3}, "in.pth")
    prefix = "net_g." if several else ""
    cli("convert", "in.pth", "--rename", f"{prefix}w={prefix}weight", "-o", "out.pth")
    made = torch.load("out.pth", weights_only=True)
    assert list(made["net_g"]) == ["weight", "b"]
    assert torch.equal(made["net_g"]["weight"], draw(1, 2))
    assert made["step"] == 3
    if several:
        with pytest.raises(sm.RecipeError, match="cannot be called elsewhere"):
            sm.convert("in.pth", "no.pth", rename="net_g.w=elsewhere")
        sm.convert("in.pth", "yes.safetensors", rename="net_g.w=elsewhere")
        assert "elsewhere" in load_safetensors(Path("yes.safetensors"))


def test_a_vae_is_baked_in() -> None:
    """The VAE of one file, the rest of another: names as Stable Diffusion's files have them."""
    vae = {f"{part}.conv_in.weight": draw(7 + n, 3, 3) for n, part in enumerate(("encoder", "decoder"))}
    whole = {"model.diffusion_model.w": draw(1, 4)} | {f"first_stage_model.{n}": draw(2, 3, 3) for n in vae}
    save_file(whole, "model.safetensors")
    save_file(vae, "vae.safetensors")
    rule = {"match": "first_stage_model.*", "copy": "vae.safetensors", "rename": {"*": "first_stage_model.*"}}
    recipe = {"merge_method": "linear", "models": [{"model": "model.safetensors"}], "rules": [rule]}
    sm.merge(recipe=recipe, out="out.safetensors")
    made = load_safetensors(Path("out.safetensors"))
    assert made.keys() == whole.keys()
    assert all(torch.equal(made[f"first_stage_model.{n}"], tensor) for n, tensor in vae.items())
    sm.verify("out.safetensors", sample="100%")
    with pytest.raises(sm.RecipeError, match="rename in a rule is about the model that the rule copies from"):
        sm.plan(recipe={**recipe, "rules": [{"match": "*", "drop": True, "rename": {"a": "b"}}]})


def test_names_of_one_model_in_a_recipe() -> None:
    models = [{"model": "a.safetensors"}, {"model": "b.safetensors", "rename": {r"/^layers/": "h"}}]
    wish = {"merge_method": "linear", "models": models}
    planned = sm.plan(recipe=wish)
    assert "layers" in str(planned)
    assert yaml.safe_load(yaml.safe_dump(planned.recipe.to_dict()))["models"][1]["rename"] == {"/^layers/": "h"}
    sm.merge(recipe=wish, out="out.safetensors")
    assert torch.equal(load_safetensors(Path("out.safetensors"))["h.0.w"], mean(draw(1, 3), draw(3, 3)))
    own_first = {**wish, "rename": {"layers.*": "wrong.*"}}
    assert sm.plan(recipe=own_first).counts() == {"linear": 2}, "a model's own renaming goes before that of all"


def test_a_renaming_that_matches_nothing_is_told() -> None:
    planned = sm.plan(["a.safetensors"], rename="nothing.*=x.*")
    assert any("no tensor's name matches `rename` nothing.* -> x.*" in warning for warning in planned.warnings)
