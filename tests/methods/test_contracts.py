"""Contracts of methods: parameters, the number of models, the base."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.methods.registry import INTEGERS, find_method, merge_tensors

Tensor = torch.Tensor


@pytest.mark.parametrize(
    ("method", "models", "parameters", "said"),
    [
        ("tise", 2, {}, "did you mean ties?"),
        ("ties", 2, {"densty": 0.5}, "ties has no parameter densty; did you mean density?"),
        ("karcher", 2, {"weight": 1}, "karcher has no parameter weight; it has max_iter, tol"),
        ("n_average", 2, {"x": 1}, "it has none"),
        ("ties", 2, {"density": [0.5, 0.5, 0.5]}, "3 values of density for 2 models"),
        ("ties", 2, {"density": "half"}, "density takes a number, not half"),
        ("ties", 2, {"weight": math.nan}, "weight takes a finite number"),
        ("ties", 2, {"normalize": "maybe"}, "normalize takes true or false, not maybe"),
        ("slerp", 2, {}, "slerp needs the parameter t; pass `parameters={'t': ...}`"),
        ("slerp", 3, {"t": 0.5}, "slerp merges exactly 2 models, not 3"),
        ("nearswap", 2, {"t": 0.5}, "exactly 1 model beside the base, not 2"),
        ("model_stock", 1, {}, "at least 2 models beside the base, not 1"),
        ("karcher", 2, {"max_iter": 1.5}, "max_iter takes a whole number"),
        ("ties", 2, {"lambda": 1, "lambda_": 2}, "given twice"),
    ],
)
def test_what_is_refused(method: str, models: int, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(sm.RecipeError, match=re.escape(said)):
        find_method(method).resolve(parameters, models)


def test_it_is_checked_before_a_file_is_read(tmp_path: Path) -> None:
    missing = [tmp_path / "a.pth", tmp_path / "b.pth"]
    with pytest.raises(sm.RecipeError, match="needs the models' common ancestor"):
        sm.plan(missing, method="ties")
    with pytest.raises(sm.RecipeError, match="did you mean density"):
        sm.plan(missing, method="ties", base="c.pth", parameters={"densty": 1})
    with pytest.raises(sm.RecipeError, match="takes no base"):
        sm.plan(missing, base="c.pth")


def test_every_method_is_pickled_as_its_place() -> None:
    for method in [*sm.list_methods().values(), INTEGERS]:
        data = pickle.dumps(method)
        assert pickle.loads(data) is method
        assert len(data) < 200
        assert copy.deepcopy(method) is method


def undecorated(group: Any, *, pull: float = 0.5) -> Any: ...


def test_methods_of_ones_own_are_pickled_where_they_can_be_found_again() -> None:
    for own in (undecorated, functools.partial(undecorated, pull=0.25)):
        found = find_method(own)
        again = pickle.loads(pickle.dumps(found))
        assert (again.name, again.buffers, again.parameters) == (found.name, found.buffers, found.parameters)

    @sm.merge_method("inner", row=lambda shape, values: 1)
    def inner(group: Any) -> Any: ...

    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(find_method(inner))
    by_hand = replace(find_method("ties"), buffers=99)
    with pytest.raises(pickle.PicklingError, match="ties cannot be sent to another process"):
        pickle.dumps(by_hand)


def test_kinds_of_parameters() -> None:
    def own(group: Any, *, t, mode: Literal["point", "x"] = "x", names: list[str] = (), k: int = 1) -> Any: ...  # type: ignore[no-untyped-def]

    values = find_method(own).resolve({"t": "0.3", "mode": "point", "k": "2"}, 2)
    assert values == {"t": 0.3, "mode": "point", "names": (), "k": 2}


def test_compute_dtype() -> None:
    a, b = torch.randn(9), torch.randn(9)
    assert merge_tensors("ties", a, base=b).dtype == torch.float32
    assert merge_tensors("ties", a.double(), base=b).dtype == torch.float64


class TestBase:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, Path]:
        made = {}
        for number, name in enumerate(("base", "a", "b")):
            made[name] = tmp_path / f"{name}.safetensors"
            save_file({"w": torch.randn(50, generator=torch.Generator().manual_seed(number))}, made[name])
        return made

    def result(self, tmp_path: Path, *args: Any, **options: Any) -> Tensor:
        sm.merge(*args, tmp_path / "out.safetensors", overwrite=True, **options)
        return load_safetensors(tmp_path / "out.safetensors")["w"]

    def test_a_base_among_the_inputs_is_no_model(self, files: dict[str, Path], tmp_path: Path) -> None:
        base, a, b = files.values()
        beside = self.result(
            tmp_path, [a, b], base=base, method="ties", weights=[0.7, 0.3], parameters={"density": [0.5, 0.2]}
        )
        among = self.result(
            tmp_path, [a, base, b], base=base, method="ties", weights=[0.7, 9, 0.3], parameters={"density": [0.5, 0.9, 0.2]}
        )
        assert torch.equal(beside, among)

    def test_slerp_starts_at_the_base(self, files: dict[str, Path], tmp_path: Path) -> None:
        _, a, b = files.values()
        forth = self.result(tmp_path, [a, b], method="slerp", parameters={"t": 0.2})
        back = self.result(tmp_path, [a, b], method="slerp", parameters={"t": 0.8}, base=b)
        torch.testing.assert_close(forth, back)
        alone = self.result(tmp_path, [b], method="slerp", parameters={"t": 0.2}, base=a)
        assert torch.equal(forth, alone)

    def test_a_base_that_linear_has_among_its_inputs_only_comes_first(self, files: dict[str, Path], tmp_path: Path) -> None:
        base, a, _ = files.values()
        plain = self.result(tmp_path, [a, base], weights=[0.75, 0.25])
        assert torch.equal(plain, self.result(tmp_path, [a, base], weights=[0.75, 0.25], base=base))

    def test_no_model_beside_the_base(self, files: dict[str, Path], tmp_path: Path) -> None:
        base = files["base"]
        assert torch.equal(self.result(tmp_path, [base], base=base, method="ties"), load_safetensors(base)["w"])

    def test_a_tensor_that_a_model_lacks(self, files: dict[str, Path], tmp_path: Path) -> None:
        common = {"u": torch.ones(3)}
        for path in files.values():
            save_file(common | load_safetensors(path), path)
        save_file(common | {"v": torch.ones(3)}, tmp_path / "c.safetensors")
        base, a, b = files.values()
        options = {"base": base, "method": "task_arithmetic", "on_missing": "average-present", "weights": [0.5, 0.25, 0.25]}
        result = self.result(tmp_path, [a, tmp_path / "c.safetensors", b], **options)
        w = [load_safetensors(path)["w"].double() for path in (base, a, b)]
        torch.testing.assert_close(result.double(), w[0] + 0.5 * (w[1] - w[0]) + 0.25 * (w[2] - w[0]), rtol=1e-6, atol=1e-6)
        kept = self.result(
            tmp_path, [a, tmp_path / "c.safetensors"], base=base, method="model_stock", on_missing="average-present"
        )
        assert torch.equal(kept, load_safetensors(a)["w"]), "too few models have it, so it is the first's"

    def test_how_a_merge_was_made_is_written_down(self, files: dict[str, Path], tmp_path: Path) -> None:
        import json

        from safetensors import safe_open

        base, a, b = files.values()
        sm.merge([a, b], tmp_path / "out.safetensors", base=base, method="dare_ties", parameters={"density": 0.5}, seed=7)
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            record = json.loads(file.metadata()["streammerge"])
        assert record == {
            "merge_method": "dare_ties",
            "models": [{"model": "a.safetensors"}, {"model": "b.safetensors"}],
            "base_model": "base.safetensors",
            "parameters": {
                "density": 0.5,
                "weight": 1.0,
                "normalize": False,
                "rescale": True,
                "int8_mask": False,
                "lambda": 1.0,
            },
            "seed": 7,
            "output": {"container": "first"},
        }
