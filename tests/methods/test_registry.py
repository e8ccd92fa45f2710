"""Lookup of methods by name, users' own methods, and a test for every method."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from methods.suite import MethodSuite, suites
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import METHODS
from streammerge.methods.registry import list_methods
from streammerge.tensors.spec import GRAIN

Tensor = torch.Tensor


def test_every_method_has_cases_and_an_oracle_in_its_familys_file() -> None:
    every = {f"{method.function.__module__.rpartition('.')[2]}: {name}" for name, method in METHODS.built_in.items()}

    def family(suite: type[MethodSuite]) -> str:
        return suite.__module__.removeprefix("methods.test_")

    assert {f"{family(suite)}: {name}" for suite in suites() for name in suite.ORACLES} == every
    assert {f"{family(suite)}: {case.method}" for suite in suites() for case in suite.CASES} == every


def test_all_of_mergekits_are_there() -> None:
    names = "linear passthrough slerp nuslerp multislerp karcher task_arithmetic ties dare_linear dare_ties breadcrumbs"
    names += " breadcrumbs_ties della della_linear model_stock sce ram ramplus_tl nearswap arcee_fusion"
    assert set(names.split()) <= set(list_methods())


OWN = """
def midrange(group, *, pull=0.5):
    def kernel(chunk):
        low, high = chunk.models[0], chunk.models[0]
        for values in chunk.models[1:]:
            low, high = low.minimum(values), high.maximum(values)
        return low + pull * (high - low)
    return kernel
"""


class TestOwnMethod:
    def midrange(self, group: TensorGroup, pull: float = 0.5) -> Kernel:
        def kernel(chunk: Chunk) -> Tensor:
            stacked = torch.stack(chunk.models)
            low, high = stacked.amin(0), stacked.amax(0)
            return low + pull * (high - low)

        return kernel

    def models(self, tmp_path: Path) -> tuple[list[Path], Tensor]:
        paths, all_of_them = [], []
        for number in range(3):
            paths.append(tmp_path / f"{number}.safetensors")
            all_of_them.append(torch.randn(GRAIN + 3, generator=torch.Generator().manual_seed(number)))
            save_file({"w": all_of_them[-1]}, paths[-1])
        return paths, torch.stack(all_of_them)

    def test_a_function(self, tmp_path: Path) -> None:
        paths, stacked = self.models(tmp_path)
        sm.merge(paths, tmp_path / "out.safetensors", method=self.midrange)
        low, high = stacked.amin(0), stacked.amax(0)
        assert torch.equal(load_safetensors(tmp_path / "out.safetensors")["w"], low + 0.5 * (high - low))

    def test_a_decorated_function_with_passes(self, tmp_path: Path) -> None:
        @sm.merge_method("centred", models=(2, 3), base="unused")
        def centred(group: TensorGroup, *, scale: float = 1.0) -> Kernel:
            """Returns the mean of the models, minus its own mean."""
            total = float(group.reduce(lambda chunk: [sum(chunk.models)])[0])
            shift = total / group.models / group.elems
            return lambda chunk: scale * (sum(chunk.models) / group.models - shift)

        paths, stacked = self.models(tmp_path)
        sm.merge(paths, tmp_path / "out.safetensors", method=centred, parameters={"scale": 2.0})
        mean = stacked.double().mean(0)
        result = load_safetensors(tmp_path / "out.safetensors")["w"]
        torch.testing.assert_close(result.double(), 2 * (mean - mean.mean()), rtol=1e-5, atol=1e-6)
        with pytest.raises(sm.RecipeError, match="centred merges 2 to 3 models, not 1"):
            sm.merge(paths[:1], tmp_path / "x.safetensors", method=centred)
        with pytest.raises(sm.RecipeError, match="did you mean scale"):
            sm.merge(paths, tmp_path / "x.safetensors", method=centred, parameters={"scalee": 1})

    def test_one_that_is_called_copy_is_run(self, tmp_path: Path) -> None:
        """Dtypes are equal, so that a copy would be byte by byte."""

        @sm.merge_method("copy", models=(1, 1), base="unused", passes=False)
        def doubled(group: TensorGroup) -> Kernel:
            return lambda chunk: 2 * chunk.models[0]

        paths, stacked = self.models(tmp_path)
        sm.merge(paths[:1], tmp_path / "out.safetensors", method=doubled)
        assert torch.equal(load_safetensors(tmp_path / "out.safetensors")["w"], 2 * stacked[0])

    def test_two_of_one_name_have_their_own_parameters(self, tmp_path: Path) -> None:
        def add(default: float) -> Callable[..., Kernel]:
            @sm.merge_method("add", passes=False)
            def add(group: TensorGroup, *, what: float = default) -> Kernel:
                return lambda chunk: chunk.models[0] + what

            return add

        save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "in.safetensors")
        rules = [{"match": "b", "merge_method": add(2.0)}]
        models = [{"model": str(tmp_path / "in.safetensors")}]
        recipe = {"merge_method": add(1.0), "models": models, "rules": rules}
        sm.merge(recipe=recipe, out=tmp_path / "out.safetensors")
        made = load_safetensors(tmp_path / "out.safetensors")
        assert (made["a"].tolist(), made["b"].tolist()) == ([1.0] * 3, [2.0] * 3)

    def test_by_its_place_on_the_command_line(self, tmp_path: Path, cli: Callable[..., Any]) -> None:
        (tmp_path / "own.py").write_text(OWN)
        paths, stacked = self.models(tmp_path)
        cli("merge", *paths, "--method", "own:midrange", "-p", "pull=0.25", "-o", "out.safetensors")
        low, high = stacked.amin(0), stacked.amax(0)
        torch.testing.assert_close(load_safetensors(tmp_path / "out.safetensors")["w"], low + 0.25 * (high - low))
        for place, said in (
            ("own:nothing", "cannot be imported"),
            ("nowhere:f", "cannot be imported"),
            ("own:__name__", "is not a function"),
        ):
            assert said in cli("merge", *paths, "--method", place, "-o", "x.safetensors", code=2).stderr

    def test_what_is_no_method(self, tmp_path: Path, cli: Callable[..., Any]) -> None:
        paths, stacked = self.models(tmp_path)
        sm.merge(paths, tmp_path / "out.safetensors", method=functools.partial(self.midrange, pull=0.0))
        assert torch.equal(load_safetensors(tmp_path / "out.safetensors")["w"], stacked.amin(0))
        with pytest.raises(sm.RecipeError, match="a name or a function, not 3"):
            sm.merge(paths, tmp_path / "x.safetensors", method=3)
        with pytest.raises(sm.TaskError, match="made 1 numbers of a chunk of 65539"):
            sm.merge(paths, tmp_path / "x.safetensors", method=lambda group: lambda chunk: chunk.models[0].sum())
        (tmp_path / "broken.py").write_text("def f(:\n")
        for place, said in (("broken:f", "cannot be imported"), ("builtins:dict", "cannot be a merge method")):
            assert said in cli("merge", *paths, "--method", place, "-o", "x.safetensors", code=2).stderr
        for wish in ("overwrite=1", "inputs=1", "out=1", "listener=1", "memory=1"):
            assert "linear has no parameter" in cli("merge", *paths, "-p", wish, "-o", "x.safetensors", code=2).stderr
        twice = ["-p", "weight=1,2,3", "--weights", "1,2,3"]
        assert "given twice" in cli("merge", *paths, *twice, "-o", "x.safetensors", code=2).stderr
        cli("merge", *paths, "-p", "weight=2", "-o", "x.safetensors")

    def test_what_it_raises_names_the_tensor(self, tmp_path: Path) -> None:
        paths, _ = self.models(tmp_path)

        def broken(group: TensorGroup) -> Kernel:
            raise ZeroDivisionError("oops")

        with pytest.raises(sm.TaskError, match=r"w \(.*broken, elements 0 to 65539\) failed: oops"):
            sm.merge(paths, tmp_path / "out.safetensors", method=broken)
        assert not (tmp_path / "out.safetensors").exists()


def test_the_table_and_the_pages(cli: Callable[..., Any]) -> None:
    table = cli("methods").stdout
    for name, method in list_methods().items():
        summary = method.summary.replace("``", "")
        assert any(line.split()[0] == name and summary in line for line in table.splitlines() if line), name
        page = cli("methods", name).stdout if name in ("ties", "slerp", "copy") else ""
        assert not page or all(parameter in page for parameter in method.parameters)
    assert "arXiv:2306.01708" in cli("methods", "ties").stdout
    assert "did you mean slerp" in cli("methods", "slrp", code=2).stderr
    assert '"per_model": true' in cli("methods", "ties", "--format", "json").stdout
