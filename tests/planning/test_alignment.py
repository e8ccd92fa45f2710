"""Which tensors are merged where names differ: what is matched, and the dtype of what is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_safetensors

import streammerge as sm
from planning.named_models import draw, mean, merged, model, saved


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("prefix", ["bert.", "model.diffusion_model."])
@pytest.mark.parametrize("first", ["plain", "led"])
def test_a_prefix_is_matched_and_told(prefix: str, first: str) -> None:
    saved(plain=model(1), led=model(50, prefix))
    made, result = merged(*([first, *({"plain", "led"} - {first})]))
    own = prefix if first == "led" else ""
    for name, tensor in model(1).items():
        assert torch.equal(made[own + name], mean(tensor, model(50, prefix)[prefix + name])), name
    assert any(f"5 tensors match once '{prefix}' is" in note for note in result.notes)


def test_two_prefixes_that_could_be_meant_are_both_told() -> None:
    saved(one=model(1), two=model(2, "gen_a.") | model(3, "gen_b."))
    with pytest.raises(sm.MismatchError) as caught:
        merged("one", "two")
    said = str(caught.value)
    assert "'gen_a.' in two.safetensors" in said
    assert '`rename="gen_b.*=*"`' in said
    made, _ = merged("one", "two", rename="gen_b.*=*", on_missing="base")
    assert torch.equal(made["norm.weight"], mean(draw(92, 4), draw(94, 4)))


@pytest.mark.parametrize("first", [torch.int64, torch.float16])
def test_position_ids_of_two_dtypes(first: torch.dtype) -> None:
    dtypes = [first, torch.float16 if first == torch.int64 else torch.int64]
    for name, dtype, length in (("one", dtypes[0], 77), ("two", dtypes[1], 248)):
        saved(**{name: model(1) | {"text.position_ids": torch.arange(length)[None].to(dtype)}})
    made, result = merged("one", "two")
    assert torch.equal(made["text.position_ids"], torch.arange(77)[None].to(first))
    assert any("text.position_ids) differs in shape or dtype; it is kept as the first" in note for note in result.notes)


def test_dtypes_that_no_option_settles_name_what_does() -> None:
    saved(one=model(1) | {"ids": torch.arange(3).to(torch.complex64)}, two=model(1) | {"ids": torch.ones(3)})
    with pytest.raises(sm.MismatchError, match="a rule of a recipe settles these: it copies a tensor"):
        merged("one", "two", on_missing="base")


@pytest.mark.parametrize("counter", ["n_averaged", "ema.num_updates", "ema.step", "iters"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_counters_are_the_largest(counter: str, dtype: torch.dtype) -> None:
    states = [model(s) | {counter: torch.tensor(number).to(dtype)} for s, number in ((1, 500), (2, 1500), (3, 40))]
    saved(one=states[0], two=states[1], three=states[2])
    made, _ = merged("one", "two", "three")
    assert made[counter].item() == 1500
    assert made[counter].dtype == dtype
    made, _ = merged("one", "two", "three", dtype="bfloat16")
    assert made[counter].item() == 1500


@pytest.mark.parametrize(
    ("dtypes", "promoted"),
    [
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
        ((torch.float16, torch.float16), torch.float16),
    ],
)
def test_mixed_dtypes_are_the_firsts_or_promoted(dtypes: tuple[torch.dtype, ...], promoted: torch.dtype) -> None:
    saved(one={n: t.to(dtypes[0]) for n, t in model(1).items()}, two={n: t.to(dtypes[1]) for n, t in model(2).items()})
    assert {t.dtype for t in merged("one", "two")[0].values()} == {dtypes[0]}
    recipe = {"merge_method": "linear", "models": [{"model": f"{n}.safetensors"} for n in ("one", "two")]}
    result = sm.merge(recipe=recipe, out="recipe.safetensors")
    assert {t.dtype for t in load_safetensors(Path("recipe.safetensors")).values()} == {promoted}
    assert bool([note for note in result.notes if "several dtypes" in note]) == (dtypes[0] != dtypes[1])
    sm.verify("recipe.safetensors", sample="100%"), sm.verify("out.safetensors", sample="100%")
    sm.merge(recipe=recipe, out="recipe.safetensors", mixed_dtypes="first", overwrite=True)
    assert {t.dtype for t in load_safetensors(Path("recipe.safetensors")).values()} == {dtypes[0]}
    made = merged("one", "two", mixed_dtypes="promote")[0]
    for name, tensor in model(1).items():
        assert made[name].dtype == torch.promote_types(*dtypes) == promoted
        assert torch.equal(made[name], mean(tensor.to(dtypes[0]).to(promoted), model(2)[name].to(dtypes[1])))
    assert {t.dtype for t in merged("one", "two", mixed_dtypes="promote", dtype="bfloat16")[0].values()} == {torch.bfloat16}
