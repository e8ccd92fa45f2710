"""An adapter that is made has a receipt, its recipe makes it again, and its run can be continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import streammerge as sm
from factoring.test_combination import close, made_products, two, weighted
from factoring.test_extraction import NORM, Q, extracted, pair
from streammerge.events import Event, Resumed, Suspended, TaskDone


def whole(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def stopping_after(count: int) -> Callable[[Event], None]:
    done = []

    def listen(event: Event) -> None:
        if isinstance(event, TaskDone):
            done.append(event)
            if len(done) == count:
                raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({}, {"merge_method": "linear"}),
        ({"method": "cat", "weights": [0.7, -0.4]}, {"merge_method": "cat"}),
        ({"method": "svd", "weights": [0.7, -0.4], "parameters": {"rank": 3}}, {"merge_method": "svd"}),
        ({"method": "ties", "weights": [0.7, -0.4], "parameters": {"density": 0.5, "rank": 3}}, {"merge_method": "ties"}),
    ],
)
def test_a_recipe_makes_the_same_adapter(options: dict[str, Any], recipe: dict[str, Any]) -> None:
    two()
    sm.merge(["one", "other"], "typed/", **options)
    one, other = options.get("weights", [1, 1])
    models = [{"model": "one", "parameters": {"weight": one}}, {"model": "other", "parameters": {"weight": other}}]
    more = dict(options.get("parameters", {}))
    rank = {"rank": more.pop("rank")} if "rank" in more and recipe["merge_method"] != "svd" else {}
    sm.merge(recipe={**recipe, **rank, "models": models, "parameters": more}, out="read/")
    sm.merge(recipe="typed/streammerge.yaml", out="again/")
    for folder in ("read", "again"):
        assert whole(folder)["adapter_model.safetensors"] == whole("typed")["adapter_model.safetensors"]
    assert whole("again") == whole("typed")


def test_rank_of_a_recipe_is_an_option_of_the_adapter() -> None:
    two()
    result = sm.merge(recipe={"merge_method": "linear", "models": ["one", "other"], "rank": 2}, out="made/")
    assert isinstance(result, sm.AdapterResult)
    assert result.rank == 2


def test_what_a_recipe_cannot_say_of_adapters_is_named() -> None:
    two()
    models = {"merge_method": "linear", "models": ["one", "other"]}
    for more, said in (
        ({"rules": [{"match": "*", "drop": True}]}, "`rules` has no meaning"),
        ({"on_missing": "base"}, "`on_missing` has no meaning"),
        ({"parameters": {"rank": [1, 2]}}, "rank is the same for all layers"),
        ({"merge_method": "ties", "parameters": {"density": 0.5}, "rank": 0}, "rank"),
    ):
        with pytest.raises(sm.RecipeError, match=said):
            sm.merge(recipe={**models, **more}, out="made/")
    with pytest.raises(sm.RecipeError, match="cat makes an adapter of adapters alone"):
        sm.merge(recipe={"merge_method": "cat", "models": ["one", "other"], "base_model": "one"}, out="made/")
    assert not Path("made").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_is_continued_to_the_same_bytes(workers: int) -> None:
    updates = two()
    sm.merge(["one", "other"], "whole/")
    seen: list[Event] = []

    def first(event: Event) -> None:
        seen.append(event)
        stop(event)

    stop = stopping_after(2)
    with pytest.raises(KeyboardInterrupt):
        sm.merge(["one", "other"], "made/", workers=1, listener=first)
    assert isinstance(seen[-1], Suspended)
    with pytest.raises(sm.RecipeError, match="an interrupted run into made/ left"):
        sm.merge(["one", "other"], "made/", weights=[1, 2])
    seen.clear()
    sm.merge(["one", "other"], "made/", workers=workers, listener=seen.append)
    assert sum(isinstance(event, Resumed) for event in seen) == 1
    assert sum(isinstance(event, TaskDone) for event in seen) == 1
    assert whole("made") == whole("whole")
    close(made_products()[0], weighted(updates, (0.5, 0.5)))
    assert sorted(path.name for path in Path().iterdir()) == ["made", "one", "other", "whole"]


def test_what_was_left_is_believed_only_with_its_checksum() -> None:
    two()
    with pytest.raises(KeyboardInterrupt):
        sm.merge(["one", "other"], "made/", workers=1, listener=stopping_after(2))
    (left,) = Path().glob(".made*/factors/0")
    data = bytearray(left.read_bytes())
    data[0] ^= 1
    left.write_bytes(data)
    seen: list[Event] = []
    sm.merge(["one", "other"], "made/", listener=seen.append)
    assert sum(isinstance(event, TaskDone) for event in seen) == 2
    sm.merge(["one", "other"], "whole/")
    assert whole("made") == whole("whole")


def test_no_resume_leaves_nothing() -> None:
    two()
    with pytest.raises(KeyboardInterrupt):
        sm.merge(["one", "other"], "made/", workers=1, listener=stopping_after(2), resume=False)
    assert sorted(path.name for path in Path().iterdir()) == ["one", "other"]


def test_a_merge_of_adapters_has_a_card_unless_none_is_wanted() -> None:
    two()
    Path("one/README.md").write_text("---\nlicense: mit\n---\n")
    sm.merge(["one", "other"], "made/", method="svd", parameters={"rank": 2})
    card = Path("made/README.md").read_text()
    assert "library_name: peft\ntags: [merge, streammerge]" in card
    assert "`svd`.\n" in card
    assert "- `one`: `mit`\n- `other`: none\n" in card
    assert Path("made/streammerge.yaml").read_text().rstrip() in card
    assert sm.verify("made/", sample=0).files == 4
    sm.merge(["one", "other"], "made/", method="svd", parameters={"rank": 2}, overwrite=True)
    sm.merge(["one", "other"], "bare/", card=False)
    assert "README.md" not in whole("bare")
    Path("bare/README.md").write_text("mine")
    with pytest.raises(sm.RecipeError, match=r"also holds README\.md"):
        sm.merge(["one", "other"], "bare/", overwrite=True)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {},
        {"energy": 0.9, "save_modules": True, "alpha": 5.0, "dtype": "float16"},
        {"rank": 8, "target": ["q_proj", "/down.*/"], "exclude": "*.mlp.*"},
    ],
)
def test_an_extraction_has_a_recipe_that_makes_it_again(options: dict[str, Any]) -> None:
    pair()
    made = extracted(**options)
    sm.merge(recipe="adapter/streammerge.yaml", out="again/")
    assert whole("again") == whole("adapter")
    receipt = json.loads(Path("adapter/streammerge.json").read_text())
    assert set(receipt["inputs"]) == {"tuned/model.safetensors", "base/model.safetensors"}
    assert [(each["tensor"], each["stored"], each["rank"]) for each in receipt["layers"]] == [
        (each.name, each.stored, each.rank) for each in made.layers
    ]
    assert [each["error"] for each in receipt["layers"]] == pytest.approx([each.error for each in made.layers], rel=1e-5)
    verified = sm.verify("adapter/", sample=1.0)
    stored = [each for each in made.layers if each.stored == "factors"]
    wholes = [each for each in made.layers if each.stored == "whole"]
    assert verified.sampled_tensors == 2 * len(stored) + len(wholes)
    assert verified.repeated_elems == verified.sampled_elems
    assert str(sm.plan(recipe="adapter/streammerge.yaml")).startswith("model    tuned, trained from base\n")


def test_values_of_an_extraction_are_computed_again() -> None:
    """A change of an input that leaves its header is seen in factors, in whole modules, and where nothing differed."""
    _, tuned = pair()
    extracted(rank=3, save_modules=True)
    for name in (f"{Q}.weight", f"{Q}.bias", f"{NORM}.weight", "model.same.weight"):
        changed = {**tuned, name: tuned[name] + 1.0}
        save_file(changed, "tuned/model.safetensors")
        with pytest.raises(sm.VerifyError, match="differs from the result of its recipe") as told:
            sm.verify("adapter/", sample=1.0)
        assert name.rpartition(".")[0] in str(told.value)
    save_file(tuned, "tuned/model.safetensors")
    sm.verify("adapter/", sample=1.0)


def test_an_extraction_that_differs_from_an_interrupted_one_is_refused() -> None:
    pair()
    with pytest.raises(KeyboardInterrupt):
        extracted(rank=3, listener=stopping_after(2))
    with pytest.raises(sm.RecipeError, match=r"differs from it: .*rank"):
        extracted(rank=4)
    seen: list[Event] = []
    extracted(rank=3, listener=seen.append)
    assert any(isinstance(event, Resumed) for event in seen)


def test_an_extraction_from_memory_says_so() -> None:
    base, tuned = pair()
    sm.extract(tuned, "adapter/", base=base, rank=2)
    (note,) = sm.verify("adapter/").notes
    assert "was in memory when it was merged" in note


def test_the_inputs_of_an_extraction_may_have_adapters() -> None:
    pair()
    extracted(rank=2)
    sm.extract("base+adapter", "again/", base="base", rank=2)
    names = set(json.loads(Path("again/streammerge.json").read_text())["inputs"])
    assert names == {"base/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    found = sm.verify("again/", sample=1.0)
    assert found.repeated_elems == found.sampled_elems > 0
