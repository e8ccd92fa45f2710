"""Merge methods: each against its oracle, at every size that is easy to get wrong, however it is run."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from oracles import ORACLES
from streammerge import tasks
from streammerge.cli.pages import method_page
from streammerge.group import Chunk, Kernel, TensorGroup
from streammerge.methods.registry import find_method, merge_tensors, methods
from streammerge.rng import uniform
from streammerge.select import inside
from streammerge.tensors import GRAIN

Tensor = torch.Tensor


@dataclass
class Case:
    """One way to call a method; ``weight`` and the like have one number per model."""

    method: str
    models: int
    parameters: dict[str, Any] = field(default_factory=dict)
    base: bool | None = None
    tolerance: float = 1e-13
    """In float64; more where the formula itself divides by the sine of a tiny angle."""
    undecided: float = 0.0
    """In float32, where a threshold is computed with many roundings."""

    def __post_init__(self) -> None:
        if self.base is None:
            self.base = find_method(self.method).base == "required"

    def __str__(self) -> str:
        said = ",".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.method}-{self.models}{'-based' if self.base else ''}-{said}".replace(" ", "")


# Of few bits, so that what cancels out does so in float32 and in float64.
W2, W3 = {"weight": [0.75, 0.5]}, {"weight": [0.75, 0.5, -0.25]}
CASES = [
    Case("linear", 3, W3),
    Case("linear", 3, W3 | {"normalize": False}),
    Case("n_average", 3),
    Case("weighted_sum", 2, {"alpha": 0.3}),
    Case("ema", 4, {"decay": 0.7}),
    Case("copy", 1),
    Case("passthrough", 1, {"scale": [0.5]}),
    Case("slerp", 2, {"t": 0.3}),
    Case("nuslerp", 2, W2),
    Case("nuslerp", 2, W2, base=True),
    Case("nuslerp", 2, W2 | {"nuslerp_flatten": False}, tolerance=1e-7),
    Case("nuslerp", 2, W2 | {"nuslerp_flatten": False, "nuslerp_row_wise": True}, base=True, tolerance=1e-7),
    Case("multislerp", 3, W3),
    Case("multislerp", 3, W3 | {"normalize_weights": False}, base=True),
    Case("karcher", 3),
    Case("karcher", 5, {"max_iter": 3}),
    Case("task_arithmetic", 2, W2 | {"lambda_": 0.6}),
    Case("task_arithmetic", 3, W3 | {"normalize": True}),
    Case("ties", 2, W2 | {"density": [0.5, 0.5]}),
    Case("ties", 3, W3 | {"density": [0.2, 1.0, 0.01], "rescale": True, "lambda_": 1.3}),
    Case("ties", 2, W2 | {"density": [0.999, 0.3], "normalize": False}),
    Case("breadcrumbs", 2, W2 | {"density": [0.5, 0.9], "gamma": [0.01, 0.3]}),
    Case("breadcrumbs_ties", 3, W3 | {"density": [0.5, 0.05, 1.0], "gamma": [0.01, 0.0, 0.1], "normalize": True}),
    Case("dare_linear", 2, W2 | {"density": [0.5, 0.9]}),
    Case("dare_linear", 2, W2 | {"density": [0.3, 1.0], "rescale": False}),
    Case("dare_ties", 3, W3 | {"density": [0.3, 0.5, 0.7], "normalize": True}),
    Case("della", 2, W2 | {"density": [0.5, 0.3], "epsilon": [0.15, 0.1]}),
    Case("della_linear", 2, W2 | {"density": [0.5, 0.3], "epsilon": [0.2, 0.0]}),
    Case("model_stock", 3),
    Case("model_stock", 2, {"filter_wise": True}),
    Case("sce", 3),
    Case("sce", 3, {"select_topk": 0.3}, undecided=1e-3),
    Case("ram", 3, {"epsilon": 0.05}),
    Case("ramplus_tl", 3, {"epsilon": 0.05, "r": 0.3, "alpha": 0.5}),
    Case("nearswap", 1, {"t": 0.02}),
    Case("arcee_fusion", 1, undecided=1e-3),
    Case("median", 4),
    Case("median", 3),
    Case("geometric_median", 4, {"tol": 0.0}),
    Case("clamp", 3),
    Case("add_difference", 2, {"alpha": 0.8}),
    Case("train_difference", 2, {"alpha": 0.8}),
    Case("perpendicular_component", 2),
    Case("add_perpendicular", 2, {"alpha": 0.8}),
]
EDGES = [(), (0,), (0, 4), (5, 0), (3, 0, 2), (1,), (1, 1), (3, 1), (1, 5), (7,), (2, 3, 5), (4, 3, 2, 2)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def tensors(shape: tuple[int, ...], count: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A base, and models that differ from it by a tenth."""
    make = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=make, dtype=torch.float64)
    models = [base + 0.1 * torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(count)]
    return base.to(dtype), [model.to(dtype) for model in models]


def merged(case: Case, base: Tensor, models: list[Tensor], **options: Any) -> Tensor:
    return merge_tensors(case.method, *models, base=base if case.base else None, **case.parameters, **options)


def expected(case: Case, base: Tensor, models: list[Tensor], name: str = "tensor", seed: int = 0) -> Tensor:
    draws = []
    for number, model in enumerate(models):
        out = torch.empty(model.numel())
        draws.append(
            uniform(seed, name, number, 0, out, torch.empty(model.numel(), dtype=torch.int32)).reshape(model.shape)
        )
    wide = [model.double() for model in models]
    return ORACLES[case.method](wide, base.double() if case.base else None, draws, **case.parameters)


def close(actual: Tensor, wanted: Tensor, tolerance: float, undecided: float = 0.0) -> None:
    """``undecided``: the share of elements that may differ, as they lie just where float32 rounds to either side."""
    assert actual.shape == wanted.shape
    scale = max(float(wanted.abs().max()), 0.1) if wanted.numel() else 0.0
    if undecided:
        differ = (actual.double() - wanted).abs() > tolerance * scale
        assert int(differ.sum()) <= undecided * wanted.numel()
        actual = actual.double().where(~differ, wanted)
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance * scale)


def test_every_method_has_an_oracle_and_a_case() -> None:
    assert set(ORACLES) == set(methods())
    assert {case.method for case in CASES} == set(methods())


def test_all_of_mergekits_are_there() -> None:
    names = "linear passthrough slerp nuslerp multislerp karcher task_arithmetic ties dare_linear dare_ties breadcrumbs"
    names += " breadcrumbs_ties della della_linear model_stock sce ram ramplus_tl nearswap arcee_fusion"
    assert set(names.split()) <= set(methods())


@every_case
@pytest.mark.parametrize("chunk_elems", [GRAIN, 3 * GRAIN])
def test_oracle(case: Case, chunk_elems: int) -> None:
    """Sizes that no chunk divides, in float64 to the last few bits, in float32 to a millionth."""
    for shape in ((3, 70_001), (523, 401), (210_003,)):
        base, models = tensors(shape, case.models, 3, torch.float64)
        close(merged(case, base, models, chunk_elems=chunk_elems), expected(case, base, models), case.tolerance)
        base, models = tensors(shape, case.models, 4, torch.float32)
        close(merged(case, base, models, chunk_elems=chunk_elems), expected(case, base, models), 1e-6, case.undecided)


@every_case
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edge_sizes(case: Case, shape: tuple[int, ...]) -> None:
    for dtype, tolerance in ((torch.float64, case.tolerance), (torch.float32, 1e-6)):
        base, models = tensors(shape, case.models, 5, dtype)
        result = merged(case, base, models)
        if 0 in shape:
            assert result.shape == shape
        else:
            close(result, expected(case, base, models), tolerance)


@every_case
def test_many_numbers_are_equal(case: Case) -> None:
    """bfloat16 models close to their base: a delta takes a few values only, zero most often."""
    make = torch.Generator().manual_seed(6)
    base = torch.randn(301, 433, generator=make).bfloat16()
    models = [base + (0.01 * torch.randn(301, 433, generator=make)).bfloat16() for _ in range(case.models)]
    close(merged(case, base, models), expected(case, base, models), 1e-6, case.undecided)


@every_case
def test_identical_models_and_zeros(case: Case) -> None:
    base, _ = tensors((31, 17), 0, 7, torch.float64)
    for start, models in (
        (base, [base] * case.models),
        (base * 0, [base * 0] * case.models),
        (base * 0, [base] * case.models),
    ):
        result = merged(case, start, models)
        assert result.isfinite().all()
        if case.method not in ("dare_linear", "dare_ties", "della", "della_linear"):
            close(result, expected(case, start, models), 1e-13)
    unchanged = ("passthrough", "perpendicular_component", "multislerp", "linear")  # by their parameters
    if case.method not in unchanged:
        close(merged(case, base, [base] * case.models), base, 1e-13)


@every_case
def test_nan_passes_through(case: Case) -> None:
    for number in range(case.models):
        base, models = tensors((5, 41), case.models, 8, torch.float32)
        models[number][2, 3] = math.nan
        assert merged(case, base, models)[2, 3].isnan(), f"lost from model {number}"
    if case.base:
        base, models = tensors((5, 41), case.models, 8, torch.float32)
        base[2, 3] = math.nan
        assert merged(case, base, models)[2, 3].isnan(), "lost from the base"


@every_case
def test_half_precision_near_its_limit_does_not_overflow(case: Case) -> None:
    make = torch.Generator().manual_seed(9)
    base = (60_000 + 2_000 * torch.rand(37, 53, generator=make)).half()
    models = [(60_000 + 2_000 * torch.rand(37, 53, generator=make)).half() for _ in range(case.models)]
    result = merged(case, base, models)
    assert result.isfinite().all()
    close(result, expected(case, base, models), 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if find_method(c.method).models[1] is None], ids=lambda c: str(c.method))
def test_one_model_and_many(case: Case) -> None:
    least = max(find_method(case.method).models[0], 1)
    for count in (least, 9):
        shared = {k: v for k, v in case.parameters.items() if not isinstance(v, list)}
        lists = {k: [v[i % len(v)] for i in range(count)] for k, v in case.parameters.items() if isinstance(v, list)}
        base, models = tensors((19, 23), count, 10, torch.float64)
        this = Case(case.method, count, shared | lists, case.base)
        close(merged(this, base, models), expected(this, base, models), 1e-12)


@pytest.mark.parametrize("method", [name for name, m in methods().items() if m.models[0] == 0])
def test_no_model_gives_the_base(method: str) -> None:
    base, _ = tensors((5, 7), 0, 11, torch.float32)
    group = TensorGroup.of(base=base)
    contract = find_method(method)
    assert torch.equal(group.merged(contract.bind(group, contract.resolve({}, 0))), base)


class TestHoweverItIsRun:
    """Law 2 for methods: the bytes depend on recipe and inputs only."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        shapes = {"long": (5 * GRAIN + 77,), "rows": (701, 487), "wide": (3, 80_001), "small": (3,), "scalar": ()}
        paths = []
        for number in range(6):
            make = torch.Generator().manual_seed(99)
            base = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
            make.manual_seed(number)
            model = {name: t + 0.1 * torch.randn(t.shape, generator=make) for name, t in base.items()}
            paths.append(tmp_path / f"{number}.safetensors")
            save_file({name: t.bfloat16() for name, t in model.items()}, paths[-1])
        return paths

    @every_case
    def test_law_2_for_methods(
        self, case: Case, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = case.parameters
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
            # Tensors of more than a few grains are spread over the workers, as those of millions of elements are.
            monkeypatch.setattr(tasks, "PIECE_ELEMS", how.pop("spread", 64) * GRAIN)
            out = tmp_path / f"out{number}" / "model.safetensors"
            out.parent.mkdir()
            sm.merge(files[: case.models], out, method=case.method, **base, **options, **how)
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert len(digests) == 1
        result = load_safetensors(out)
        for name, tensor in result.items():
            models = [load_safetensors(path)[name] for path in files[: case.models]]
            wanted = expected(case, load_safetensors(files[5])[name], models, name)
            close(tensor, wanted, 2**-8, case.undecided)  # half a unit in the last place of bfloat16

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties", "della", "sce", "median", "karcher"])
    def test_there_is_room_for_many_models(self, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
        paths = [tmp_path / f"{number}.safetensors" for number in range(15)]
        for number, path in enumerate(paths):
            values = torch.randn(7, 301, generator=torch.Generator().manual_seed(number))
            save_file({"w": values.to(dtype)}, path)
        needs_base = find_method(method).base == "required"
        wishes = {"base": paths[0]} if needs_base else {}
        wishes |= {"density": 0.5} if "density" in find_method(method).parameters else {}
        wishes |= {"rescale": True, "normalize": True} if "rescale" in find_method(method).parameters else {}
        for how in ({}, {"io": "pread"}, {"compute_dtype": "float64"}):
            sm.merge(paths[needs_base:], tmp_path / "out.safetensors", method=method, overwrite=True, **wishes, **how)
            assert load_safetensors(tmp_path / "out.safetensors")["w"].isfinite().all()

    @pytest.mark.parametrize("case", [c for c in CASES if find_method(c.method).row], ids=str)
    def test_law_2_for_rows_that_no_grain_divides(self, case: Case, tmp_path: Path) -> None:
        paths = []
        for number in range(6):
            make = torch.Generator().manual_seed(number)
            paths.append(tmp_path / f"{number}.safetensors")
            shapes = {"w": (300, 3000), "v": (90_001,), "u": (2, 70_003)}
            save_file({n: torch.randn(s, generator=make, dtype=torch.float64) for n, s in shapes.items()}, paths[-1])
        base = {"base": paths[5]} if case.base else {}
        digests, chunks = set(), set()
        for memory in ("512MiB", "64MiB", "48MiB", "32MiB", "20MiB"):
            out = tmp_path / memory / "model.safetensors"
            out.parent.mkdir()
            options = case.parameters | base
            try:
                done = sm.merge(paths[: case.models], out, method=case.method, workers=1, memory=memory, **options)
            except sm.BudgetError:
                break
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
            chunks.add(done.plan.budget.chunk_elems)
        assert len(chunks) > 1
        assert len(digests) == 1


class TestSelection:
    """The exact k-th largest, whatever the numbers look like."""

    KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
        "continuous": lambda n, make: torch.randn(n, generator=make),
        "differences of bfloat16": lambda n, make: (
            torch.randn(n, generator=make).bfloat16() - torch.randn(n, generator=make).bfloat16()
        ).float(),
        "all equal": lambda n, make: torch.full((n,), 1.5),
        "mostly zero": lambda n, make: torch.randn(n, generator=make) * (torch.rand(n, generator=make) < 0.1),
        "few values": lambda n, make: torch.randint(0, 5, (n,), generator=make).float(),
        "sorted": lambda n, make: torch.randn(n, generator=make).abs().sort().values,
        "one block apart": lambda n, make: torch.cat(
            [torch.full((n // 2,), 100.0), torch.randn(n - n // 2, generator=make)]
        ),
        "next to each other": lambda n, make: 1 + torch.randint(0, 300, (n,), generator=make) * 2.0**-23,
        "tiny": lambda n, make: torch.randn(n, generator=make) * 1e-42,
        "huge": lambda n, make: torch.randn(n, generator=make) * 1e38,
        "with infinity": lambda n, make: torch.where(
            torch.rand(n, generator=make) < 0.2, torch.inf, torch.randn(n, generator=make)
        ),
    }

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_exactly_k_are_kept_and_the_first_of_equal_ones(self, kind: str, dtype: torch.dtype) -> None:
        for n in (1, 2, 7, 9_001, GRAIN, GRAIN + 1, 700_001):
            values = self.KINDS[kind](n, torch.Generator().manual_seed(n)).to(dtype).abs()
            ranks = sorted({0, 1, min(3, n), n // 100, n // 2, n - 1, n})
            group = TensorGroup.of(values, values.flip(0), chunk_elems=2 * GRAIN)
            cuts = group.kth_largest(lambda chunk: (chunk.load(i) for i in range(2)), [ranks, [n // 3]])
            order = values.argsort(descending=True, stable=True)
            for rank, cut in zip(ranks, cuts[0], strict=True):
                kept = torch.cat([cut.keep(values[a : a + 5000].clone(), a) for a in range(0, n, 5000)])
                wanted = torch.zeros_like(values)
                wanted[order[:rank]] = values[order[:rank]]
                assert torch.equal(kept, wanted.nan_to_num(nan=0.0, posinf=torch.inf)), (n, rank)
            if n > 3:
                assert cuts[1][0].threshold == values[order[n // 3 - 1]]

    def test_what_lies_inside_is_found_to_the_last_bit(self) -> None:
        """Limits a few units in the last place apart, where the middle between them is rounded."""
        make = torch.Generator().manual_seed(0)
        for _ in range(300):
            scale = 2.0 ** int(torch.randint(-5, 5, (1,), generator=make))
            values = (1 + torch.randint(0, 300, (4099,), generator=make) * 2.0**-23) * scale
            first, count = int(torch.randint(0, 295, (1,), generator=make)), int(torch.randint(1, 6, (1,), generator=make))
            low, high = (1 + first * 2.0**-23) * scale, (1 + (first + count) * 2.0**-23) * scale
            _, places = inside(values, low, high, torch.empty(4099))
            assert torch.equal(places.sort().values, ((values >= low) & (values <= high)).nonzero()[:, 0])

    def test_signed_numbers(self) -> None:
        values = torch.randn(300_001, generator=torch.Generator().manual_seed(1))
        for dtype in (torch.float32, torch.float64):
            group = TensorGroup.of(values.to(dtype))
            ordered = values.to(dtype).sort(descending=True).values
            ranks = [1, 5, 150_000, 299_990, 300_000]
            cuts = group.kth_largest(lambda chunk: [chunk.load(0)], [ranks], signed=True)[0]
            assert [cut.threshold for cut in cuts] == [float(ordered[rank - 1]) for rank in ranks]

    def test_nan_is_the_largest_and_is_kept(self) -> None:
        values = torch.rand(100_000)
        values[[5, 70_000]] = math.nan
        cut = TensorGroup.of(values).kth_largest(lambda chunk: [chunk.load(0)], [[1000]])[0][0]
        kept = cut.keep(values.clone(), 0)
        assert int((kept != 0).sum()) == 1000
        assert kept[[5, 70_000]].isnan().all()

    def test_as_many_nan_as_are_kept(self) -> None:
        values = torch.arange(1.0, 11.0)
        values[[2, 5]] = math.nan
        result = merge_tensors("ties", values, base=torch.zeros(10), density=0.1, normalize=False)
        assert result.isnan().nonzero()[:, 0].tolist() == [2, 5]
        assert float(result.nansum()) == 0

    def test_a_misleading_sample_is_found_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is sampled looks nothing like the rest."""
        values = torch.rand(1 << 20)
        # The sample takes spans of 1024 in every 16384.
        for start in range(0, 1 << 20, 1 << 14):
            values[start : start + 1024] = 7.0
        cut = TensorGroup.of(values).kth_largest(lambda chunk: [chunk.load(0)], [[500_000]])[0][0]
        kept = cut.keep(values.clone(), 0)
        assert int((kept != 0).sum()) == 500_000
        assert kept[kept > 0].min() == values.sort(descending=True).values[499_999]


class TestRandomNumbers:
    def draw(self, count: int, seed: int = 0, name: str = "w", model: int = 0, start: int = 0) -> Tensor:
        return uniform(seed, name, model, start, torch.empty(count), torch.empty(count, dtype=torch.int32))

    def test_they_do_not_depend_on_how_they_are_asked_for(self) -> None:
        whole = self.draw(3 * GRAIN + 5)
        for a, b in ((0, 1), (GRAIN - 1, GRAIN + 1), (17, 2 * GRAIN + 3), (3 * GRAIN, 3 * GRAIN + 5)):
            assert torch.equal(self.draw(b - a, start=a), whole[a:b])

    def test_they_depend_on_seed_name_and_model(self) -> None:
        draws = [self.draw(1000), self.draw(1000, seed=1), self.draw(1000, name="v"), self.draw(1000, model=1)]
        draws.append(self.draw(1000, start=GRAIN))
        for i, a in enumerate(draws):
            for b in draws[:i]:
                assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.15
                assert (a != b).float().mean() > 0.99

    @pytest.mark.parametrize("bits", [8, 12])
    def test_chi_square_of_the_leading_and_of_the_trailing_bits(self, bits: int) -> None:
        count, bins = 1 << 22, 1 << bits
        whole = (self.draw(count).double() * (1 << 24)).long()
        for part in (whole >> (24 - bits), whole & (bins - 1)):
            seen = torch.bincount(part, minlength=bins).double()
            chi = float(((seen - count / bins) ** 2 / (count / bins)).sum())
            assert abs(chi - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1)), chi

    def test_chi_square_of_neighbours_and_of_grains(self) -> None:
        whole = (self.draw(64 * GRAIN) * 64).long()
        for lag in (1, 2, 1024, GRAIN):
            seen = torch.bincount(whole[:-lag] * 64 + whole[lag:], minlength=4096).double()
            mean = seen.sum() / 4096
            chi = float(((seen - mean) ** 2 / mean).sum())
            assert abs(chi - 4095) < 5 * math.sqrt(2 * 4095), (lag, chi)

    @pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
    def test_kept_share_mean_and_factor(self, method: str) -> None:
        """Of many draws: the share that is kept, an unbiased mean, the factor that restores the sum of magnitudes."""
        base, delta = torch.zeros(64, 512), torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
        density, total, shares = 0.4, torch.zeros(64, 512), []
        for seed in range(200):
            result = merge_tensors(method, base + delta, base=base, seed=seed, density=density, rescale=False)
            kept = result != 0
            assert torch.equal(result[kept], delta[kept])
            shares.append(float(kept.float().mean()))
            total += kept
        spread = math.sqrt(density * (1 - density) / delta.numel() / len(shares))
        assert abs(sum(shares) / len(shares) - density) < 5 * spread
        if method == "dare_linear":
            assert float((total / 200 - density).abs().max()) < 5 * math.sqrt(0.24 / 200)
        else:  # the larger of a row are kept more often, from 0.25 to 0.55
            order = delta.abs().argsort(dim=1)
            often = (total / 200).gather(1, order).mean(0)
            assert abs(float(often[:50].mean()) - 0.265) < 0.02
            assert abs(float(often[-50:].mean()) - 0.535) < 0.02
        scaled = merge_tensors(method, base + delta, base=base, seed=1, density=density)
        assert float(scaled.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)


class TestContract:
    @pytest.mark.parametrize(
        ("method", "models", "parameters", "said"),
        [
            ("tise", 2, {}, "did you mean ties?"),
            ("ties", 2, {"densty": 0.5}, "ties has no parameter densty; did you mean density?"),
            ("karcher", 2, {"weight": 1}, "karcher has no parameter weight; it has max_iter, tol"),
            ("n_average", 2, {"x": 1}, "it has none"),
            ("ties", 2, {"density": [0.5, 0.5, 0.5]}, "3 values of density for 2 models"),
            ("ties", 2, {"density": 0}, "above 0 and up to 1, not 0"),
            ("ties", 2, {"density": 1.5}, "not 1.5"),
            ("ties", 2, {"density": "half"}, "density takes a number, not half"),
            ("ties", 2, {"weight": math.nan}, "weight takes a finite number"),
            ("ties", 2, {"normalize": "maybe"}, "normalize takes true or false, not maybe"),
            ("breadcrumbs", 2, {"gamma": 1}, "gamma is the share"),
            ("della", 2, {"density": 0.9}, "choose a smaller epsilon"),
            ("della", 2, {"density": 0.5, "epsilon": -0.1}, "choose a smaller epsilon"),
            ("sce", 2, {"select_topk": 2}, "select_topk is the share"),
            ("slerp", 2, {}, "slerp needs the parameter t; give it with -p t=VALUE"),
            ("slerp", 3, {"t": 0.5}, "slerp merges exactly 2 models, not 3"),
            ("nearswap", 2, {"t": 0.5}, "exactly 1 model beside the base, not 2"),
            ("model_stock", 1, {}, "at least 2 models beside the base, not 1"),
            ("linear", 2, {"weight": [1, -1]}, "sum to zero"),
            ("multislerp", 2, {"weight": [1, -1]}, "sum to zero"),
            ("ema", 2, {"decay": 1}, "from 0 to below 1"),
            ("karcher", 2, {"max_iter": 1.5}, "max_iter takes a whole number"),
            ("karcher", 2, {"max_iter": -1}, "max_iter of 0 or more"),
            ("geometric_median", 2, {"eps": 0}, "eps above 0"),
            ("multislerp", 2, {"eps": 0}, "eps above 0"),
            ("ramplus_tl", 2, {"epsilon": 0}, "epsilon above 0"),
            ("ties", 2, {"lambda": 1, "lambda_": 2}, "given twice"),
        ],
    )
    def test_what_is_refused(self, method: str, models: int, parameters: dict[str, Any], said: str) -> None:
        with pytest.raises(sm.RecipeError, match=said.replace("?", r"\?")):
            find_method(method).resolve(parameters, models)

    def test_it_is_checked_before_a_file_is_read(self, tmp_path: Path) -> None:
        missing = [tmp_path / "a.pth", tmp_path / "b.pth"]
        with pytest.raises(sm.RecipeError, match="needs the models' common ancestor"):
            sm.plan(missing, method="ties")
        with pytest.raises(sm.RecipeError, match="did you mean density"):
            sm.plan(missing, method="ties", base="c.pth", densty=1)
        with pytest.raises(sm.RecipeError, match="takes no base"):
            sm.plan(missing, base="c.pth")

    def test_directions_that_cancel_out_are_named(self) -> None:
        a = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 0.0])
        with pytest.raises(sm.TaskError, match="cancel out"):
            merge_tensors("multislerp", *a)

    def test_every_page_says_what_it_must(self) -> None:
        for name, method in methods().items():
            assert method.summary, name
            assert len(method.doc) > 150 or name == "copy", name
            assert ".. math::" in method.doc or name == "copy", name

    def test_compute_dtype(self) -> None:
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
        beside = self.result(tmp_path, [a, b], base=base, method="ties", weights=[0.7, 0.3], density=[0.5, 0.2])
        among = self.result(
            tmp_path, [a, base, b], base=base, method="ties", weights=[0.7, 9, 0.3], density=[0.5, 0.9, 0.2]
        )
        assert torch.equal(beside, among)

    def test_slerp_starts_at_the_base(self, files: dict[str, Path], tmp_path: Path) -> None:
        _, a, b = files.values()
        forth = self.result(tmp_path, [a, b], method="slerp", t=0.2)
        back = self.result(tmp_path, [a, b], method="slerp", t=0.8, base=b)
        torch.testing.assert_close(forth, back)
        alone = self.result(tmp_path, [b], method="slerp", t=0.2, base=a)
        assert torch.equal(forth, alone)

    def test_a_base_that_linear_has_among_its_inputs_only_comes_first(self, files: dict[str, Path], tmp_path: Path) -> None:
        base, a, _ = files.values()
        plain = self.result(tmp_path, [a, base], weights=[0.75, 0.25])
        assert torch.equal(plain, self.result(tmp_path, [a, base], weights=[0.75, 0.25], base=base))

    def test_no_model_beside_the_base(self, files: dict[str, Path], tmp_path: Path) -> None:
        base = files["base"]
        assert torch.equal(self.result(tmp_path, [base], base=base, method="ties"), load_safetensors(base)["w"])

    def test_a_tensor_that_a_model_lacks(self, files: dict[str, Path], tmp_path: Path) -> None:
        save_file({"v": torch.ones(3)}, tmp_path / "c.safetensors")
        base, a, b = files.values()
        options = {"base": base, "method": "task_arithmetic", "on_missing": "average-present", "weights": [0.5, 0.25, 0.25]}
        result = self.result(tmp_path, [a, tmp_path / "c.safetensors", b], **options)
        w = [load_safetensors(path)["w"].double() for path in (base, a, b)]
        torch.testing.assert_close(result.double(), w[0] + 0.5 * (w[1] - w[0]) + 0.25 * (w[2] - w[0]), rtol=1e-6, atol=1e-6)
        kept = self.result(
            tmp_path, [a, tmp_path / "c.safetensors"], base=base, method="model_stock", on_missing="average-present"
        )
        assert torch.equal(kept, load_safetensors(base)["w"]), "too few models have it"

    def test_how_a_merge_was_made_is_written_down(self, files: dict[str, Path], tmp_path: Path) -> None:
        import json

        from safetensors import safe_open

        base, a, b = files.values()
        sm.merge([a, b], tmp_path / "out.safetensors", base=base, method="dare_ties", density=0.5, seed=7)
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
        }


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
            """The mean of the models, less its own mean."""
            total = float(group.reduce(lambda chunk: [sum(chunk.models)])[0])
            shift = total / group.models / group.elems
            return lambda chunk: scale * (sum(chunk.models) / group.models - shift)

        paths, stacked = self.models(tmp_path)
        sm.merge(paths, tmp_path / "out.safetensors", method=centred, scale=2.0)
        mean = stacked.double().mean(0)
        result = load_safetensors(tmp_path / "out.safetensors")["w"]
        torch.testing.assert_close(result.double(), 2 * (mean - mean.mean()), rtol=1e-5, atol=1e-6)
        with pytest.raises(sm.RecipeError, match="centred merges 2 to 3 models, not 1"):
            sm.merge(paths[:1], tmp_path / "x.safetensors", method=centred)
        with pytest.raises(sm.RecipeError, match="did you mean scale"):
            sm.merge(paths, tmp_path / "x.safetensors", method=centred, scalee=1)

    def test_by_its_place_on_the_command_line(self, tmp_path: Path, cli: Callable[..., Any]) -> None:
        (tmp_path / "own.py").write_text(OWN)
        paths, stacked = self.models(tmp_path)
        cli("merge", *paths, "--method", "own:midrange", "-p", "pull=0.25", "-o", "out.safetensors")
        low, high = stacked.amin(0), stacked.amax(0)
        torch.testing.assert_close(load_safetensors(tmp_path / "out.safetensors")["w"], low + 0.25 * (high - low))
        for place, said in (
            ("own:nothing", "cannot be imported"),
            ("nowhere:f", "cannot be imported"),
            ("own:__name__", "is no function"),
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
            assert "an option of the command" in cli("merge", *paths, "-p", wish, "-o", "x.safetensors", code=2).stderr
        twice = ["-p", "weight=1,2,3", "--weights", "1,2,3"]
        assert "given twice" in cli("merge", *paths, *twice, "-o", "x.safetensors", code=2).stderr
        cli("merge", *paths, "-p", "weight=2", "-o", "x.safetensors")

    def test_kinds_of_its_parameters(self) -> None:
        def own(group: Any, *, t, mode: Literal["point", "x"] = "x", names: list[str] = (), k: int = 1) -> Any: ...  # type: ignore[no-untyped-def]

        values = find_method(own).resolve({"t": "0.3", "mode": "point", "k": "2"}, 2)
        assert values == {"t": 0.3, "mode": "point", "names": (), "k": 2}

    def test_what_it_raises_names_the_tensor(self, tmp_path: Path) -> None:
        paths, _ = self.models(tmp_path)

        def broken(group: TensorGroup) -> Kernel:
            raise ZeroDivisionError("oops")

        with pytest.raises(sm.TaskError, match=r"w \(.*broken, elements 0 to 65539\) failed: oops"):
            sm.merge(paths, tmp_path / "out.safetensors", method=broken)
        assert not (tmp_path / "out.safetensors").exists()


def test_the_table_and_the_pages(cli: Callable[..., Any]) -> None:
    table = cli("methods").stdout
    for name, method in methods().items():
        summary = method.summary.replace("``", "")
        assert any(line.split()[0] == name and summary in line for line in table.splitlines() if line), name
        page = cli("methods", name).stdout if name in ("ties", "slerp", "copy") else ""
        assert not page or all(parameter in page for parameter in method.parameters)
    assert "arXiv:2306.01708" in cli("methods", "ties").stdout
    for method in methods().values():  # nothing of the markup is left
        assert not set(method_page(method)) & set("\\{}`"), method_page(method)
    assert "did you mean slerp" in cli("methods", "slrp", code=2).stderr
    assert '"per_model": true' in cli("methods", "ties", "--format", "json").stdout
