"""arcee_fusion against its oracle: important changes of one model, by divergence and difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from methods.suite import Case, MethodSuite
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.masks import MaskRoom
from streammerge.methods import arcee_fusion as module
from streammerge.stores.spilled import SpillFile
from streammerge.tensors.spec import GRAIN

Tensor = torch.Tensor


def arcee_fusion(x: list[Tensor], b: Tensor, draws: Any) -> Tensor:
    p, q = (torch.softmax(t, -1) + 1e-8 for t in (x[0], b))
    importance = (x[0] - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True).reshape((*b.shape[:-1], 1) if b.dim() else ())
    ordered, n = importance.reshape(-1).sort().values, b.numel()
    first, middle, third = (ordered[int(s * (n - 1))] for s in (0.25, 0.5, 0.75))
    return b + (x[0] - b) * (importance >= middle + 1.5 * (third - first))


class TestArceeFusion(MethodSuite):
    ORACLES = {"arcee_fusion": arcee_fusion}
    CASES = [Case("arcee_fusion", 1, undecided=1e-3)]


def test_passes_and_kernel_make_divergences_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those of the sample. Without room for them the result is the same."""
    rows, width = 1000, 3 * GRAIN // 1000
    make = torch.Generator().manual_seed(0)
    base = torch.randn(rows, width, generator=make)
    model = base + 0.1 * torch.randn(rows, width, generator=make)
    made = list[int]()
    divergence = module._divergence
    monkeypatch.setattr(module, "_divergence", lambda chunk, row: made.append(chunk.elems) or divergence(chunk, row))

    def merged(masks: Callable[[int], MaskRoom | None] | None) -> Tensor:
        made.clear()
        group = replace(TensorGroup.of(model, base=base, row=width, chunk_elems=GRAIN), masks=masks)
        return group.merged(module.arcee_fusion(group))

    once = merged(lambda nbytes: MaskRoom(SpillFile(nbytes), 1))
    sample = sum(elems for elems in made if elems <= 2048)
    assert sample < base.numel() / 2
    assert sum(made) - sample == base.numel()
    for lacking in (None, lambda nbytes: None):
        assert torch.equal(merged(lacking), once)
        assert sum(made) - sample == 2 * base.numel()
