"""KnOTS, against LAPACK in float64 on whole matrices. Its other cases are those of the spectral family."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge as sm
from methods.suite import W2, W3, Case, MethodSuite
from methods.test_spectral import empty_checkpoints, knots


class TestKnots(MethodSuite):
    ORACLES = {"knots": knots}
    CASES = [
        Case("knots", 2, tolerance=1e-9),
        Case("knots", 3, W3 | {"density": [0.3, 1.0, 0.05], "concat_across_output": False}, tolerance=1e-9),
        Case("knots", 2, W2 | {"consensus": "linear", "density": [0.5, 0.9], "lambda_": 1.3}, tolerance=1e-9),
    ]
    REFUSED = [
        ("knots", 2, {"consensus": "mean"}, "ties or linear, not mean"),
        ("knots", 2, {"density": -0.5}, "from 0 (none) to 1 (all), not -0.5"),
    ]


@pytest.mark.parametrize("shape", [[8192, 28672], [28672, 8192]])
def test_the_shared_side_decides_about_memory(tmp_path: Path, shape: list[int]) -> None:
    """A Gram matrix of the side that all deltas share is inherent: that of 28672 numbers has 6.6 GB."""
    paths = empty_checkpoints(tmp_path, shape)
    long = shape[0] > shape[1]
    with pytest.raises(sm.BudgetError, match=r"needs at least 6\.\d GiB"):
        sm.plan(
            paths[:8],
            tmp_path / "out.safetensors",
            method="knots",
            base=paths[8],
            memory="1GiB",
            parameters={"concat_across_output": long},
        )
