"""The classes of a recipe: which checkpoints they mean, what is the base, and their form as plain data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streammerge.methods.registry import find_method
from streammerge.recipe.fields import Position
from streammerge.recipe.model import Model, Module, OutputRequest, Recipe, Reference, Rule, Slice, SliceSource
from streammerge.recipe.patterns import parse_pattern
from streammerge.recipe.settings import constant
from streammerge.tensors.dtypes import DType

LINEAR, TIES = find_method("linear"), find_method("ties")
A, B = Model("a.pth"), Model("b.pth", {"weight": constant(0.5)}, "ema")
SLICE = Slice((SliceSource("c.pth", (0, 2)), SliceSource("a.pth", (1, 3))), base_model="d.pth")
RULE = Rule((parse_pattern("*.bias"), parse_pattern("/^x/")), copy="e.pth")
WHOLE = Recipe(TIES, (A, B), modules={"m": Module(slices=(SLICE,))}, base_model="base.pth", rules=(RULE,))


def test_every_checkpoint_is_named_once_the_base_first() -> None:
    names = ["base.pth", "a.pth", "b.pth", "c.pth", "d.pth", "e.pth"]
    assert WHOLE.checkpoints == tuple(Reference(name, "ema" if name == "b.pth" else None) for name in names)
    assert WHOLE.named_models == names
    assert WHOLE.inputs == ("a.pth", "b.pth", "c.pth", "a.pth")
    assert Recipe(LINEAR, (A, Model("./a.pth"))).checkpoints == (Reference("a.pth"),)
    assert Recipe(LINEAR, (A, Model("a.pth", state_dict="x"))).checkpoints == (Reference("a.pth"), Reference("a.pth", "x"))


def test_a_base_that_is_a_model_is_read_as_that_entry_says() -> None:
    listed = replace(WHOLE, base_model="./b.pth")
    assert listed.base == Reference("b.pth", "ema")
    assert replace(WHOLE, base_model="./x.pth", state_dict="ema").base == Reference("./x.pth", "ema")
    assert Recipe(LINEAR, (A,)).base is None
    assert listed.copied("b.pth") == Reference("b.pth", "ema")


def test_a_base_is_apart_where_the_method_or_only_a_rule_needs_it() -> None:
    assert WHOLE.based
    assert WHOLE.base_apart(listed=True)
    plain = Recipe(LINEAR, (A, B), base_model="base.pth")
    assert not plain.based
    assert [plain.base_apart(listed) for listed in (False, True)] == [False, False]
    ruled = replace(plain, rules=(Rule((parse_pattern("q"),), merge_method=TIES),))
    assert [ruled.base_apart(listed) for listed in (False, True)] == [True, False]


def test_renaming_reaches_every_model_and_nothing_else() -> None:
    names = {name: name.upper() for name in WHOLE.named_models}
    renamed = WHOLE.renamed(names)
    assert renamed.named_models == [name.upper() for name in WHOLE.named_models]
    assert renamed.renamed({new: old for old, new in names.items()}) == WHOLE
    with pytest.raises(KeyError):
        WHOLE.renamed({})


def test_plain_data_leaves_out_what_is_not_said() -> None:
    assert Recipe(LINEAR, (A,)).to_dict() == {"merge_method": "linear", "models": [{"model": "a.pth"}]}
    said = replace(WHOLE, out_dtype=DType.BF16, output=OutputRequest(max_shard_size=7), seed=3).to_dict()
    assert said["models"][1] == {"model": "b.pth", "parameters": {"weight": 0.5}, "state_dict": "ema"}
    assert said["rules"] == [{"match": ["*.bias", "/^x/"], "copy": "e.pth"}]
    assert (said["out_dtype"], said["output"], said["seed"]) == ("bfloat16", {"max_shard_size": 7}, 3)
    assert said["modules"]["m"]["slices"][0]["sources"][0] == {"model": "c.pth", "layer_range": [0, 2]}


def test_a_rule_takes_names_and_tells_its_action() -> None:
    assert [RULE.takes(name) for name in ("a.bias", "x.w", "a.x", "")] == [True, True, False, False]
    assert str(RULE) == "*.bias, /^x/"
    match = RULE.match
    rules = [RULE, Rule(match, drop=True), Rule(match, merge_method=TIES), Rule(match, dtype=DType.F16)]
    assert [rule.action for rule in rules] == ["copied from e.pth", "left out", "by ties", "merged as float16"]


def test_names_dtypes_and_places() -> None:
    recipe = replace(
        WHOLE, output=OutputRequest(strip_prefix="m."), dtype=DType.F16, positions={("rules", 0): Position("r", 2, 3)}
    )
    assert [recipe.output_name(name) for name in ("m.w", "w", "m.m.w", "xm.w")] == ["w", "w", "m.w", "xm.w"]
    assert (WHOLE.recast, recipe.recast, replace(recipe, out_dtype=DType.F64).recast) == (None, DType.F16, DType.F64)
    assert (recipe.at(("rules", 0, "copy")), recipe.at(("seed",))) == ("r:2:3: ", "")
