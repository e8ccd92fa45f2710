"""The checks that every merge method must pass: its oracle, at all difficult sizes, however it is run."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import first_of_each, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.cli.pages import method_page
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.random import uniform
from streammerge.methods.registry import find_method, merge_tensors
from streammerge.planning import tasks
from streammerge.plugins import module_names
from streammerge.tensors.spec import GRAIN

Tensor = torch.Tensor

# Numbers of few bits, so that they cancel out exactly in float32 and in float64.
W2, W3 = {"weight": [0.75, 0.5]}, {"weight": [0.75, 0.5, -0.25]}
EDGES = [(), (0,), (0, 4), (5, 0), (3, 0, 2), (1,), (1, 1), (3, 1), (1, 5), (7,), (2, 3, 5), (4, 3, 2, 2)]


@dataclass
class Case:
    """One way to call a method; ``weight`` and similar parameters have one number per model."""

    method: str
    models: int
    parameters: dict[str, Any] = field(default_factory=dict)
    base: bool | None = None
    tolerance: float = 1e-13
    """Tolerance in float64; larger if the formula divides by the sine of a tiny angle."""
    undecided: float = 0.0
    """Share of elements that may differ in float32, where a threshold is computed with many roundings."""
    keeps_equals: bool = True
    """Whether models that all equal the base give the base."""

    def __post_init__(self) -> None:
        if self.base is None:
            self.base = find_method(self.method).base == "required"

    def __str__(self) -> str:
        said = ",".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.method}-{self.models}{'-based' if self.base else ''}-{said}".replace(" ", "")

    def of(self, models: int) -> Case:
        """Returns the same case for another number of models."""
        repeated = {k: [v[i % len(v)] for i in range(models)] for k, v in self.parameters.items() if isinstance(v, list)}
        return replace(self, models=models, parameters=self.parameters | repeated)


SAMPLED = (
    "test_law_2_for_methods",
    "test_law_2_for_infinities_and_nan_of_all_inputs",
    "test_law_2_for_rows_that_no_grain_divides",
    "test_there_is_room_for_many_models",
)
"""Tests that merge files many times: all but the first case of each method are slow."""


class MethodSuite:
    """The checks of one family of methods. A subclass, whose name begins with Test, lists its cases.

    ``ORACLES[name](models, base, draws, **parameters)`` is the method again, written from its paper: whole tensors,
    float64, sorts and norms, no code of the package. ``draws`` are the uniform numbers of each model, for random
    methods. ``REFUSED`` lists a method, a number of models, invalid parameters, and the expected message.
    """

    CASES: list[Case]
    ORACLES: dict[str, Callable[..., Tensor]]
    REFUSED: list[tuple[str, int, dict[str, Any], str]] = []

    @classmethod
    def arguments(cls) -> dict[str, list[Any]]:
        """Returns the arguments of the tests, by name."""
        return {
            "case": cls.CASES,
            "row_case": [case for case in cls.CASES if find_method(case.method).row],
            "method": list(cls.ORACLES),
            "refused": cls.REFUSED,
        }

    def __init_subclass__(cls) -> None:
        """Removes the tests for which the family has no argument."""
        lacking = {name for name, values in cls.arguments().items() if not values}
        for name, test in vars(MethodSuite).items():
            if name.startswith("test") and not lacking.isdisjoint(inspect.signature(test).parameters):
                setattr(cls, name, None)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, values in self.arguments().items():
            if name in metafunc.fixturenames:
                if metafunc.function.__name__ in SAMPLED:
                    values = first_of_each(values, lambda case: case.method)
                metafunc.parametrize(name, values, ids=lambda v: f"{v[0]}-{v[3]}" if isinstance(v, tuple) else str(v))

    def expected(self, case: Case, base: Tensor, models: list[Tensor], name: str = "tensor") -> Tensor:
        draws = []
        for number, model in enumerate(models):
            out, bits = torch.empty(model.numel()), torch.empty(model.numel(), dtype=torch.int32)
            draws.append(uniform(0, name, number, 0, out, bits).reshape(model.shape))
        wide = [model.double() for model in models]
        return self.ORACLES[case.method](wide, base.double() if case.base else None, draws, **case.parameters)

    @pytest.mark.parametrize("chunk_elems", [GRAIN, 3 * GRAIN])
    @pytest.mark.sampled(2, by="case")
    def test_oracle(self, case: Case, chunk_elems: int) -> None:
        """Sizes that no chunk divides: float64 agrees to the last few bits, float32 to a millionth."""
        for shape in ((3, 70_001), (523, 401), (210_003,)):
            base, models = tensors(shape, case.models, 3, torch.float64)
            close(merged(case, base, models, chunk_elems=chunk_elems), self.expected(case, base, models), case.tolerance)
            base, models = tensors(shape, case.models, 4, torch.float32)
            result = merged(case, base, models, chunk_elems=chunk_elems)
            close(result, self.expected(case, base, models), 1e-6, case.undecided)

    @pytest.mark.parametrize("shape", EDGES, ids=str)
    def test_edge_sizes(self, case: Case, shape: tuple[int, ...]) -> None:
        for dtype, tolerance in ((torch.float64, case.tolerance), (torch.float32, 1e-6)):
            base, models = tensors(shape, case.models, 5, dtype)
            result = merged(case, base, models)
            if 0 in shape:
                assert result.shape == shape
            else:
                close(result, self.expected(case, base, models), tolerance)

    def test_many_numbers_are_equal(self, case: Case) -> None:
        """bfloat16 models close to their base: a delta has few distinct values, and most are zero."""
        make = torch.Generator().manual_seed(6)
        base = torch.randn(301, 433, generator=make).bfloat16()
        models = [base + (0.01 * torch.randn(301, 433, generator=make)).bfloat16() for _ in range(case.models)]
        close(merged(case, base, models), self.expected(case, base, models), 1e-6, case.undecided)

    def test_identical_models_and_zeros(self, case: Case) -> None:
        base, _ = tensors((31, 17), 0, 7, torch.float64)
        for start, model in ((base, base), (base * 0, base * 0), (base * 0, base)):
            models = [model] * case.models
            result = merged(case, start, models)
            assert result.isfinite().all()
            close(result, self.expected(case, start, models), 1e-13)
        if case.keeps_equals:
            close(merged(case, base, [base] * case.models), base, 1e-13)

    def test_nan_passes_through(self, case: Case) -> None:
        for number in range(case.models):
            base, models = tensors((5, 41), case.models, 8, torch.float32)
            models[number][2, 3] = math.nan
            assert merged(case, base, models)[2, 3].isnan(), f"lost from model {number}"
        if case.base:
            base, models = tensors((5, 41), case.models, 8, torch.float32)
            base[2, 3] = math.nan
            assert merged(case, base, models)[2, 3].isnan(), "lost from the base"

    @pytest.mark.parametrize("chunk_elems", [GRAIN, 3 * GRAIN])
    @pytest.mark.sampled(2, by="case")
    def test_infinities_and_nan_of_all_inputs_stay(self, case: Case, chunk_elems: int) -> None:
        """The rest is as if zeros stood there in every input."""
        for shape in ((), (1,), (5, 7), (3, 70_001), (523, 401)):
            base, models = tensors(shape, case.models, 12, torch.float64)
            there = strewn(shape)
            models = [model.where(there == 0, there) for model in models]
            result = merged(case, base.where(there == 0, there), models, chunk_elems=chunk_elems)
            assert torch.equal(result.isnan(), there.isnan())
            assert torch.equal(result[there != 0].nan_to_num(7), there[there != 0].nan_to_num(7))
            cleared = [model.masked_fill(there != 0, 0) for model in models]
            wanted = self.expected(case, base.masked_fill(there != 0, 0), cleared)
            close(result.masked_fill(there != 0, 0), wanted.masked_fill(there != 0, 0), max(case.tolerance, 1e-12))

    def test_half_precision_near_its_limit_does_not_overflow(self, case: Case) -> None:
        make = torch.Generator().manual_seed(9)
        base = (60_000 + 2_000 * torch.rand(37, 53, generator=make)).half()
        models = [(60_000 + 2_000 * torch.rand(37, 53, generator=make)).half() for _ in range(case.models)]
        result = merged(case, base, models)
        assert result.isfinite().all()
        close(result, self.expected(case, base, models), 1e-5)

    def test_as_few_models_as_it_takes_and_many(self, case: Case) -> None:
        least, most = find_method(case.method).models
        for count in {max(least, 1), most or 9}:
            base, models = tensors((19, 23), count, 10, torch.float64)
            this = case.of(count)
            close(merged(this, base, models), self.expected(this, base, models), max(case.tolerance, 1e-12))

    def test_no_model_gives_the_base_or_is_refused(self, method: str) -> None:
        base, _ = tensors((5, 7), 0, 11, torch.float32)
        group = TensorGroup.of(base=base)
        contract = find_method(method)
        if contract.models[0] > 0:
            with pytest.raises(sm.RecipeError, match=f"{method} merges .* not 0"):
                contract.resolve({}, 0)
        else:
            assert torch.equal(group.merged(contract.bind(group, contract.resolve({}, 0))), base)

    def test_what_is_refused(self, refused: tuple[str, int, dict[str, Any], str]) -> None:
        method, models, parameters, said = refused
        with pytest.raises(sm.RecipeError, match=re.escape(said)):
            find_method(method).resolve(parameters, models)

    def test_its_page_says_what_it_must(self, method: str) -> None:
        contract = find_method(method)
        assert contract.summary
        assert len(contract.doc) > 150 or method == "copy"
        assert ".. math::" in contract.doc or method == "copy"
        assert not set(method_page(contract, 100)) & set("\\{}`"), "nothing of the markup is left"

    @pytest.fixture
    def files(self, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        folder = tmp_path_factory.getbasetemp() / "models"
        paths = [folder / f"{number}.safetensors" for number in range(6)]
        if folder.exists():  # made once for all families
            return paths
        folder.mkdir()
        shapes = {"long": (5 * GRAIN + 77,), "rows": (701, 487), "wide": (3, 80_001), "small": (3,), "scalar": ()}
        for number, path in enumerate(paths):
            make = torch.Generator().manual_seed(99)
            base = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
            make.manual_seed(number)
            model = {name: t + 0.1 * torch.randn(t.shape, generator=make) for name, t in base.items()}
            save_file({name: t.bfloat16() for name, t in model.items()}, path)
        return paths

    @pytest.mark.sampled(2)
    def test_law_2_for_methods(
        self, case: Case, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The bytes depend only on recipe and inputs, not on how the merge is run."""
        options = {"parameters": case.parameters}
        base = {"base": files[5]} if case.base else {}
        digests = set()
        for number, how in enumerate(
            [
                {},
                {"workers": 1},
                {"memory": "96MiB", "workers": 3},
                {"io": "pread"},
                {"spread": 2},
                {"spread": 1, "io": "pread"},
            ]
        ):
            # Spread tensors of more than a few grains over the workers, as happens with millions of elements.
            monkeypatch.setattr(tasks, "PIECE_ELEMS", how.pop("spread", 64) * GRAIN)
            out = tmp_path / f"out{number}" / "model.safetensors"
            out.parent.mkdir()
            sm.merge(files[: case.models], out, method=case.method, **base, **options, **how)
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert len(digests) == 1
        *models, start = map(load_safetensors, (*files[: case.models], files[5]))
        for name, tensor in load_safetensors(out).items():
            wanted = self.expected(case, start[name], [model[name] for model in models], name)
            close(tensor, wanted, 2**-8, case.undecided)  # half a unit in the last place of bfloat16

    @pytest.mark.sampled(4)
    def test_law_2_for_infinities_and_nan_of_all_inputs(
        self, case: Case, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tensors in files, whole and shared among workers. They are no error, and a note tells of them."""
        paths, digests = [tmp_path / f"{number}.safetensors" for number in range(6)], set()
        for path, file in zip(paths, files, strict=True):
            tensors = {name: t.where((there := strewn(t.shape)) == 0, there) for name, t in load_safetensors(file).items()}
            save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
        base = {"base": paths[5]} if case.base else {}
        for number, how in enumerate([{}, {"workers": 1, "memory": "96MiB"}, {"spread": 1, "io": "pread"}]):
            monkeypatch.setattr(tasks, "PIECE_ELEMS", how.pop("spread", 64) * GRAIN)
            out = tmp_path / f"out{number}" / "model.safetensors"
            out.parent.mkdir()
            done = sm.merge(paths[: case.models], out, method=case.method, parameters=case.parameters, **base, **how)
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
            assert not [w for w in done.warnings if "NaN" in w]
        assert len(digests) == 1
        for name, tensor in load_safetensors(out).items():
            there = strewn(tensor.shape)
            assert torch.equal(
                tensor[there != 0].nan_to_num(7).double(), there[there != 0].bfloat16().nan_to_num(7).double()
            )
            assert tensor[there == 0].isfinite().all(), name

    @pytest.mark.sampled(3)
    def test_law_2_for_rows_that_no_grain_divides(self, row_case: Case, tmp_path: Path) -> None:
        case, paths = row_case, []
        for number in range(6):
            make = torch.Generator().manual_seed(number)
            paths.append(tmp_path / f"{number}.safetensors")
            shapes = {"w": (300, 3000), "v": (90_001,), "u": (2, 70_003)}
            save_file({n: torch.randn(s, generator=make, dtype=torch.float64) for n, s in shapes.items()}, paths[-1])
        digests, chunks = set(), set()
        options = {"method": case.method, "parameters": case.parameters, "workers": 1}
        options |= {"base": paths[5]} if case.base else {}
        with pytest.raises(sm.BudgetError) as refused:
            sm.merge(paths[: case.models], tmp_path / "out.safetensors", memory="1MiB", **options)
        least = re.findall(r'memory="(\d+MiB)"', str(refused.value))  # enough for the smallest chunk
        for memory in ("512MiB", "128MiB", "64MiB", "48MiB", "32MiB", *least):
            out = tmp_path / memory / "model.safetensors"
            out.parent.mkdir()
            try:
                done = sm.merge(paths[: case.models], out, memory=memory, **options)
            except sm.BudgetError:
                continue
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
            chunks.add(done.plan.budget.chunk_elems)
        assert len(chunks) > 1
        assert len(digests) == 1

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    @pytest.mark.sampled(3, by="case")
    def test_there_is_room_for_many_models(self, case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
        """The number of buffers is that of the contract, with every option that needs one."""
        contract = find_method(case.method)
        count = contract.models[1] or 15
        paths = [tmp_path / f"{number}.safetensors" for number in range(count + 1)]
        for number, path in enumerate(paths):
            values = torch.randn(7, 301, generator=torch.Generator().manual_seed(number))
            save_file({"w": values.to(dtype)}, path)
        greedy = {"density": 0.5, "rescale": True, "normalize": True}
        wishes = case.of(count).parameters | {name: v for name, v in greedy.items() if name in contract.parameters}
        options = {"parameters": wishes} | ({"base": paths[-1]} if case.base else {})
        for how in ({}, {"io": "pread"}, {"compute_dtype": "float64"}):
            sm.merge(paths[:count], tmp_path / "out.safetensors", method=case.method, overwrite=True, **options, **how)
            assert load_safetensors(tmp_path / "out.safetensors")["w"].isfinite().all()


def tensors(shape: tuple[int, ...], count: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Returns a base, and models that differ from it by a tenth."""
    make = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=make, dtype=torch.float64)
    models = [base + 0.1 * torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(count)]
    return base.to(dtype), [model.to(dtype) for model in models]


def strewn(shape: tuple[int, ...]) -> Tensor:
    """Returns infinities of both signs and NaN at one element of twenty, and zeros elsewhere."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    made = torch.zeros(shape, dtype=torch.float64)
    for number, value in enumerate((math.inf, -math.inf, math.nan)):
        made[(draw >= 0.02 * number) & (draw < 0.02 * number + 0.02)] = value
    return made


def merged(case: Case, base: Tensor, models: list[Tensor], **options: Any) -> Tensor:
    return merge_tensors(case.method, *models, base=base if case.base else None, **case.parameters, **options)


def close(actual: Tensor, wanted: Tensor, tolerance: float, undecided: float = 0.0) -> None:
    """Compares tensors. ``undecided``: the share of elements that may differ because float32 may round either way."""
    assert actual.shape == wanted.shape
    scale = max(float(wanted.abs().max()), 0.1) if wanted.numel() else 0.0
    if undecided:
        differ = (actual.double() - wanted).abs() > tolerance * scale
        assert int(differ.sum()) <= undecided * wanted.numel()
        actual = actual.double().where(~differ, wanted)
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance * scale)


def suites() -> list[type[MethodSuite]]:
    """Returns the suites of all families. Each module of methods has a test file."""
    families = [name for name in module_names("methods") if name.startswith("test_")]
    found = [value for family in families for value in vars(import_module(f"methods.{family}")).values()]
    return [v for v in found if isinstance(v, type) and issubclass(v, MethodSuite) and v is not MethodSuite]
