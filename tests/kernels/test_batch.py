"""Small tensors that are computed together have the bytes that each has alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.kernels.batch import Batch
from streammerge.kernels.group import TensorGroup
from streammerge.methods.registry import list_methods
from streammerge.running import computing, worker

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": [0.5, 0.01, 1.0]}),
    ("ties", {"density": 0.3, "rescale": True, "weight": [0.5, -2.0, 1.0], "lambda": 0.7}),
    ("breadcrumbs", {"density": [0.5, 0.9, 0.2], "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1, "normalize": True}),
    ("dare_linear", {"density": [0.5, 0.9, 0.0], "normalize": True}),
    ("dare_ties", {"density": 0.5, "rescale": False}),
    ("della_linear", {"density": [0.5, 1.0, 0.0]}),
    ("della", {"density": 0.5, "epsilon": 0.2, "weight": [0.5, 0.3, 0.4]}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {}),
    ("sce", {"select_topk": 0.5, "uniform_below": 1e9}),
    ("slerp", {"t": 0.3}),
    ("slerp", {"t": 1.0}),
    ("nuslerp", {"weight": [0.3, 0.9]}),
    ("nuslerp", {"weight": [1.0, -1.0], "base": True}),
    ("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "base": True}),
    ("multislerp", {"weight": [0.5, 2.0, 1.0, 0.7]}),
    ("multislerp", {"weight": [0.5, -2.0, 1.0], "normalize_weights": False, "base": True}),
    ("karcher", {}),
    ("karcher", {"max_iter": 0, "base": True}),
    ("karcher", {"tol": 0.5}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("arcee_fusion", {}),
    ("ramplus_tl", {}),
    ("ramplus_tl", {"r": 0.5, "alpha": 3.0, "epsilon": 0.07}),
    ("perpendicular_component", {}),
    ("add_perpendicular", {"alpha": 0.4}),
]
"""Methods with parameters. ``base``: whether a method has one that can do without."""
SHAPES = [(700,)] * 3 + [(20, 30)] * 3 + [(4, 6, 5)] * 2 + [(1,)] * 2 + [()] * 2 + [(40_000,)] * 2 + [(0,)] + [(700,)]


def written(folder: Path, dtype: torch.dtype, models: int, spoiled: bool = False) -> list[Path]:
    """Writes a base and models of small tensors; some differences are equal. ``spoiled``: one number is not finite."""
    base = {f"w{n:02}": torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(SHAPES)}
    paths = []
    for model in range(models + 1):
        make = torch.Generator().manual_seed(100 + model)
        own = {k: t + 0.05 * torch.randint(-4, 5, t.shape, generator=make) * bool(model) for k, t in base.items()}
        own["w08"] = base["w08"].clone()
        if spoiled:
            own["w01"][3] = -torch.inf
            own["w04"][2, 2] = torch.nan if model == 1 else 1.0
        paths.append(folder / f"{model}.safetensors")
        save_file({k: t.to(dtype) for k, t in own.items()}, paths[-1])
    return paths


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=lambda value: value if isinstance(value, str) else None)
@pytest.mark.parametrize(("dtype", "spoiled"), [("bfloat16", False), ("float16", True), ("float64", False)])
@pytest.mark.sampled(2)
def test_a_batch_changes_no_byte(
    method: str, parameters: dict[str, Any], dtype: str, spoiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = parameters.copy()
    contract = list_methods()[method]
    based = parameters.pop("base", contract.base == "required")
    base, *models = written(tmp_path, getattr(torch, dtype), 3, spoiled)
    models = (models if based else [base, *models])[: contract.models[1]]
    sizes = list[int]()

    def counted(*fields: Any) -> Batch:
        sizes.append(len(fields[0]))
        return Batch(*fields)

    def bytes_of(name: str) -> tuple[bytes, Sequence[str]]:
        out = tmp_path / name
        result = sm.merge(
            models,
            out,
            base=base if based else None,
            method=method,
            parameters=parameters,
            allow_nonfinite=True,
            workers=1,
            executor="threads",
        )
        return out.read_bytes(), result.warnings

    monkeypatch.setattr(computing, "Batch", counted)
    together = bytes_of("together.safetensors")
    assert max(sizes) == 3
    sizes.clear()
    monkeypatch.setattr(worker, "MOST_ELEMS", 0)
    assert bytes_of("alone.safetensors") == together
    assert not sizes


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "sce", "multislerp", "karcher", "ramplus_tl"])
def test_any_number_of_models(method: str, models: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *paths = written(tmp_path, torch.bfloat16, models)
    parameters = {"select_topk": 0.5} if method == "sce" else {"density": 0.4}
    parameters = {name: value for name, value in parameters.items() if name in list_methods()[method].parameters}
    made = []
    for name in ("together", "alone"):
        out = tmp_path / f"{name}.safetensors"
        sm.merge(
            paths,
            out,
            base=base,
            method=method,
            parameters=parameters,
            workers=1,
            executor="threads",
        )
        made.append(out.read_bytes())
        monkeypatch.setattr(worker, "MOST_ELEMS", 0)
    assert made[0] == made[1]


def batch_of(*models: torch.Tensor, base: torch.Tensor | None = None) -> Batch:
    """Returns a batch of tensors, which are the rows of each model."""
    first, flat = models[0], [model.flatten() for model in models]
    group = TensorGroup.of(*flat, base=None if base is None else base.flatten(), compute=first.dtype)
    (chunk,) = next(iter(group.sweep(lambda chunk: (), lambda look, chunks: list(chunks), 0, first.numel())))
    return Batch([f"w{n}" for n in range(len(first))], tuple(first.shape[1:]), len(models), 0, chunk)


def test_statistics_of_each_tensor() -> None:
    values = torch.randint(0, 9, (3, 50), generator=torch.Generator().manual_seed(0)).float()
    batch = batch_of(values)
    assert batch.sums(values.flatten()) == values.double().sum(1).tolist()
    cuts = batch.cuts(values.flatten(), [[10, 0], [50, 7], [1, 1]])
    assert cuts is not None
    for row, of, ranks in zip(values, cuts, [[10, 0], [50, 7], [1, 1]], strict=True):
        order = row.argsort(descending=True, stable=True)
        for cut, rank in zip(of, ranks, strict=True):
            wanted = torch.zeros(50).index_copy_(0, order[:rank], row[order[:rank]])
            assert torch.equal(cut.keep(row.clone(), 0), wanted)
    values[1, 3] = torch.nan
    assert batch.cuts(values.flatten(), [[10], [10], [10]]) is None


def test_inner_products_of_each_tensor() -> None:
    models = [torch.randn(3, 50, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(4)]
    base = torch.randn(3, 50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for deltas in (False, True):
        grams = batch_of(*models, base=base).grams(deltas)
        for number in range(3):
            group = TensorGroup.of(*(model[number] for model in models), base=base[number])
            assert grams is not None
            assert grams[number] == group.gram(deltas).tolist()
    models[2][1, 7] = torch.inf
    assert batch_of(*models, base=base).grams() is None


def test_quartiles_of_numbers_with_signs() -> None:
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    cuts = batch_of(values).cuts(values.flatten(), [[1, 50], [25], [13, 38]], signed=True)
    assert cuts is not None
    for row, of, ranks in zip(values, cuts, [[1, 50], [25], [13, 38]], strict=True):
        assert [cut.threshold for cut in of] == [float(row.sort(descending=True).values[rank - 1]) for rank in ranks]


def test_methods_that_can() -> None:
    assert {name for name, _ in METHODS} == {name for name, method in list_methods().items() if method.batch is not None}
