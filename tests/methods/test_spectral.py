"""Merges by singular values, against LAPACK in float64 on whole matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from methods.oracles import elected, top
from methods.suite import W2, W3, Case, MethodSuite
from streammerge.kernels import spectral
from streammerge.kernels.chunk import Chunk
from streammerge.methods import spectral as methods
from streammerge.methods.registry import merge_tensors

Tensor = torch.Tensor
TINY = 1e-6


def svd(matrix: Tensor, floor: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the singular vectors and values, with zeros for tiny ones."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > TINY * (float(s.max()) if floor is None else floor)
    return u * kept, s * kept, v * kept.unsqueeze(1)


def polar(matrix: Tensor) -> Tensor:
    u, _, v = svd(matrix)
    return u @ v


def matrices(x: list[Tensor], b: Tensor, weight: list[float]) -> list[Tensor]:
    return [w * (t - b).reshape(len(b), -1) for w, t in zip(weight, x, strict=True)]


def plain(x: list[Tensor], b: Tensor, weight: list[float], scale: float) -> Tensor:
    return b + scale * sum(w * (t - b) for w, t in zip(weight, x, strict=True)) / len(x)


def iso_c(x: list[Tensor], b: Tensor, draws: Any, weight: Any = None, lambda_: float = 1.0) -> Tensor:
    weight = weight or [1.0] * len(x)
    if b.dim() < 2:
        return plain(x, b, weight, lambda_)
    u, s, v = svd(sum(matrices(x, b, weight)))
    return b + lambda_ * (s.mean() * u @ v).reshape(b.shape)


def tsv(x: list[Tensor], b: Tensor, draws: Any, weight: Any = None, rank: int = 0, lambda_: float = 1.0) -> Tensor:
    weight = weight or [1.0] * len(x)
    if b.dim() < 2 or min(len(b), b[0].numel()) < len(x):
        return plain(x, b, weight, lambda_)
    deltas = matrices(x, b, weight)
    each = min(deltas[0].shape) // len(x)
    each = min(rank or each, each)
    parts = [svd(delta) for delta in deltas]
    left, right = torch.cat([u[:, :each] for u, _, _ in parts], 1), torch.cat([v[:each] for _, _, v in parts])
    sigma = torch.cat([s[:each] for _, s, _ in parts])
    return b + lambda_ * (polar(left) * sigma @ polar(right)).reshape(b.shape)


def iso_cts(
    x: list[Tensor], b: Tensor, draws: Any, weight: Any = None, common_space_fraction: float = 0.8, lambda_: float = 1.0
) -> Tensor:
    weight = weight or [1.0] * len(x)
    if b.dim() < 2:
        return plain(x, b, weight, lambda_)
    deltas = matrices(x, b, weight)
    n = min(deltas[0].shape)
    each = min(round((n - int(n * common_space_fraction)) / len(x)), n // len(x))
    common = n - each * len(x)
    u, s, v = svd(sum(deltas))
    u, s, v = u[:, :common], s[:common], v[:common]
    left, sigma, right = [], [], []
    for delta in deltas:
        own = svd(delta - u @ (u.T @ delta), float(delta.norm()))
        for parts, part in zip((left, sigma, right), (own[0][:, :each], own[1][:each], own[2][:each]), strict=True):
            parts.append(part)
    sigmas = torch.cat([*sigma, s])
    made = sigmas.mean() * polar(torch.cat([*left, u], 1)) @ polar(torch.cat([*right, v]))
    return b + lambda_ * made.reshape(b.shape)


def knots(
    x: list[Tensor],
    b: Tensor,
    draws: Any,
    weight: Any = None,
    density: Any = None,
    consensus: str = "ties",
    normalize: bool = True,
    concat_across_output: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    weight, density = weight or [1.0] * len(x), density or [1.0] * len(x)
    if b.dim() < 2:
        rotated, basis = [t - b for t in x], None
    else:
        deltas = matrices(x, b, [1.0] * len(x))
        deltas = deltas if concat_across_output else [delta.T for delta in deltas]
        u, s, _ = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
        basis = u[:, s > TINY * s[0]]
        rotated = [basis.T @ delta for delta in deltas]
    kept = [r if d >= 1 else r * top(r.abs(), max(1, int(d * r.numel()))) for r, d in zip(rotated, density, strict=True)]
    z = torch.stack([w * r for w, r in zip(weight, kept, strict=True)])
    w = torch.tensor(weight, dtype=torch.float64).reshape(-1, *[1] * (z.dim() - 1))
    agrees = elected(z) if consensus == "ties" else torch.ones_like(z)
    mixed, divisor = (z * agrees).sum(0), (w * agrees).sum(0)
    mixed = mixed / torch.where(divisor == 0, 1.0, divisor) if normalize else mixed
    if basis is not None:
        mixed = basis @ mixed
        mixed = mixed if concat_across_output else mixed.T
    return b + lambda_ * mixed.reshape(b.shape)


ORACLES = {"iso_c": iso_c, "iso_cts": iso_cts, "tsv": tsv, "knots": knots}


class TestSpectral(MethodSuite):
    ORACLES = {"iso_c": iso_c, "iso_cts": iso_cts, "tsv": tsv}
    CASES = [
        Case("iso_c", 3, tolerance=1e-9),
        Case("iso_c", 2, W2 | {"lambda_": 1.3}, tolerance=1e-9),
        Case("tsv", 2, tolerance=1e-9),
        Case("tsv", 3, W3 | {"lambda_": 0.7, "rank": 9}, tolerance=1e-9),
        Case("iso_cts", 3, tolerance=1e-9),
        Case("iso_cts", 2, W2 | {"common_space_fraction": 0.5, "lambda_": 1.3}, tolerance=1e-9),
    ]
    REFUSED = [
        ("tsv", 2, {"rank": -1}, "a rank of 0 or more"),
        ("iso_cts", 2, {"common_space_fraction": 1.5}, "from 0 to 1, not 1.5"),
    ]


METHODS = ["iso_c", "iso_cts", "tsv", "knots"]


def orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q if rows >= columns else torch.linalg.qr(drawn.T).Q.T


@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (32, 32)])
def test_equal_singular_values(shape: tuple[int, int]) -> None:
    """One orthogonal delta: Iso-C has nothing to change. Two: the polar factor of their sum."""
    base = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    deltas = [orthogonal(*shape, seed=seed) for seed in (1, 2)]
    alone = merge_tensors("iso_c", base + 3 * deltas[0], base=base)
    torch.testing.assert_close(alone, base + 3 * deltas[0], rtol=0, atol=1e-12)
    both = merge_tensors("iso_c", *(base + delta for delta in deltas), base=base)
    torch.testing.assert_close(both, iso_c([base + delta for delta in deltas], base, None), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (16, 5, 3, 3)])
def test_low_rank(method: str, shape: tuple[int, ...]) -> None:
    """Deltas of rank 2, as of an adapter: only their row and column spaces are changed."""
    make = torch.Generator().manual_seed(0)
    base = torch.randn(shape, dtype=torch.float64, generator=make)
    rows, columns = shape[0], base[0].numel()
    models = []
    for _ in range(3):
        factors = [torch.randn(size, dtype=torch.float64, generator=make) for size in ((rows, 2), (2, columns))]
        models.append(base + (factors[0] @ factors[1]).reshape(shape))
    made = merge_tensors(method, *models, base=base)
    torch.testing.assert_close(made, ORACLES[method](models, base, None), rtol=0, atol=1e-8)
    assert torch.linalg.matrix_rank((made - base).reshape(rows, -1), rtol=1e-7) <= 6


@pytest.mark.parametrize("method", METHODS)
def test_one_model(method: str) -> None:
    """Without others, TSV-M and KnOTS change nothing."""
    make = torch.Generator().manual_seed(0)
    base, model = (torch.randn(30, 20, dtype=torch.float64, generator=make) for _ in range(2))
    made = merge_tensors(method, model, base=base)
    torch.testing.assert_close(made, ORACLES[method]([model], base, None), rtol=0, atol=1e-8)
    if method in ("tsv", "knots"):
        torch.testing.assert_close(made, model, rtol=0, atol=1e-8)


@pytest.mark.parametrize("few", [8, 1])
@pytest.mark.parametrize("method", METHODS)
def test_long_sides_give_the_same(method: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solvers for long sides, vectors in 32 bits, and a pass for each Gram matrix."""
    make = torch.Generator().manual_seed(0)
    for shape in ((300, 80), (80, 300)):
        base = torch.randn(shape, dtype=torch.float64, generator=make)
        models = [base + torch.randn(shape, dtype=torch.float64, generator=make) for _ in range(3)]
        wanted = merge_tensors(method, *models, base=base)
        with monkeypatch.context() as patch:
            patch.setattr(spectral, "_AT_ONCE", 0)
            patch.setattr(spectral, "_PAIR_ROWS", 16)
            patch.setattr(spectral, "_FEW", few)
            patch.setattr(methods, "_MOST_AT_ONCE", 1)
            torch.testing.assert_close(merge_tensors(method, *models, base=base), wanted, rtol=0, atol=1e-7)


def test_fewer_singular_values_than_models() -> None:
    """The mean, where a share of the singular values would be none."""
    make = torch.Generator().manual_seed(0)
    base, *models = (torch.randn(2, 5, dtype=torch.float64, generator=make) for _ in range(4))
    made = merge_tensors("tsv", *models, base=base)
    torch.testing.assert_close(made, plain(models, base, [1.0] * 3, 1.0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_complex_tensors_are_matrices_of_their_parts(tmp_path: Path, method: str) -> None:
    make = torch.Generator().manual_seed(0)
    drawn = [torch.randn(12, 9, dtype=torch.complex64, generator=make) for _ in range(3)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for tensor, path in zip(drawn, paths, strict=True):
        save_file({"w": tensor}, path)
    sm.merge(paths[:2], tmp_path / "out.safetensors", method=method, base=paths[2])
    made = torch.view_as_real(load_file(tmp_path / "out.safetensors")["w"])
    *models, base = (torch.view_as_real(tensor).double() for tensor in drawn)
    wanted = ORACLES[method](models, base, None).float()
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)


PASSES = {
    ("iso_c", "wide"): (2, 2),
    ("iso_c", "tall"): (2, 2),
    ("tsv", "wide"): (2, 5),
    ("tsv", "tall"): (2, 5),
    ("iso_cts", "wide"): (3, 5),
    ("iso_cts", "tall"): (3, 11),
    ("knots", "wide"): (2, 2),
}
"""How often eight models are read, and the base, where the Gram matrices do not fit beside each other."""


@pytest.mark.parametrize(("method", "side"), PASSES)
def test_a_delta_is_read_three_times_at_most(method: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, raw = [0] * 9, Chunk.raw

    def counted(chunk: Chunk, model: int) -> Tensor:
        read[model + 1] += chunk.elems
        return raw(chunk, model)

    monkeypatch.setattr(Chunk, "raw", counted)
    monkeypatch.setattr(spectral, "_AT_ONCE", 0)
    monkeypatch.setattr(spectral, "_PAIR_ROWS", 16)
    monkeypatch.setattr(methods, "_MOST_AT_ONCE", 1)
    make = torch.Generator().manual_seed(0)
    shape = (200, 80) if side == "tall" else (80, 200)
    base, *models = (torch.randn(shape, dtype=torch.float64, generator=make) for _ in range(9))
    merge_tensors(method, *models, base=base)
    of_models, of_base = PASSES[method, side]
    assert [read[0], max(read[1:])] == [of_base * base.numel(), of_models * base.numel()]
    assert (sum(read) <= 3 * 9 * base.numel()) is ((method, side) != ("iso_cts", "tall"))


def empty_checkpoints(folder: Path, shape: list[int]) -> list[Path]:
    """Returns nine files of one bf16 tensor each, of which only the headers take disk."""
    paths = [folder / f"{number}.safetensors" for number in range(9)]
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2 * math.prod(shape)]}}).encode()
    for path in paths:
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * math.prod(shape))
    return paths


@pytest.mark.parametrize("shape", [[8192, 28672], [28672, 8192]])
@pytest.mark.parametrize("method", METHODS)
def test_eight_large_models_are_planned_in_a_gibibyte(tmp_path: Path, method: str, shape: list[int]) -> None:
    paths = empty_checkpoints(tmp_path, shape)
    shared = {"concat_across_output": shape[0] < shape[1]} if method == "knots" else {}
    options: dict[str, Any] = {"method": method, "base": paths[8], "parameters": shared, "memory": "1GiB"}
    made = sm.plan(paths[:8], tmp_path / "out.safetensors", **options)
    assert made.peak_bytes <= 1 << 30
    assert (made.spilled_bytes > 8 * math.prod(shape) // 2) is (method in ("tsv", "iso_cts"))
    assert made.disk_bytes >= 2 * math.prod(shape) + made.spilled_bytes


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("tsv", (1500, 600)),
        pytest.param("iso_cts", (800, 1500), marks=pytest.mark.slow),
        pytest.param("tsv", (800, 1500), marks=pytest.mark.slow),
        pytest.param("iso_cts", (1500, 800), marks=pytest.mark.slow),
    ],
)
def test_what_is_spilled_depends_on_no_worker(tmp_path: Path, method: str, shape: tuple[int, int]) -> None:
    """Two tensors whose left vectors take a temporary file each, made by threads or processes in more or less memory."""
    make, paths = torch.Generator().manual_seed(0), [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        save_file({name: torch.randn(shape, generator=make).bfloat16() for name in "ab"}, path)
    made = []
    for workers, executor, memory in ((1, "threads", "512MiB"), (2, "threads", "1GiB"), (2, "processes", "2GiB")):
        out = tmp_path / f"out{len(made)}.safetensors"
        options: dict[str, Any] = {"workers": workers, "executor": executor, "memory": memory}
        sm.merge(paths[:2], out, method=method, base=paths[2], **options)
        made.append(load_file(out))
        assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]
    for name, (x, y, b) in zip("ab", ([load_file(path)[name].double() for path in paths] for name in "ab"), strict=True):
        assert all(torch.equal(each[name], made[0][name]) for each in made)
        wanted = ORACLES[method]([x, y], b, None)
        torch.testing.assert_close(made[0][name].double(), wanted.bfloat16().double(), rtol=2**-7, atol=1e-5)


def test_too_little_memory_is_told_before_a_byte_is_written(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        save_file({"w": torch.zeros(2048, 2050, dtype=torch.bfloat16)}, path)
    with pytest.raises(sm.BudgetError, match="needs at least"):
        sm.merge(paths[:2], tmp_path / "out.safetensors", method="iso_c", base=paths[2], memory="128MiB")
    assert not (tmp_path / "out.safetensors").exists()
