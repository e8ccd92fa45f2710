"""Copies of bytes: in parts, with pages given back, and whole complex numbers."""

from __future__ import annotations

import torch

from running.test_makers import Opening, bench, made
from streammerge.methods.registry import COPY
from streammerge.running.copying import ReaderCopier, StoredCopier
from streammerge.sources.stored import Stored

__all__ = ["bench"]


def test_a_copy_is_made_in_parts_and_its_pages_are_given_back(bench: Opening) -> None:
    model = torch.randn(5000)
    at = bench([model], False, COPY)
    (stored,) = at.task.sources
    assert isinstance(stored, Stored)
    released = list[tuple[int, int]]()
    file = at.files.get(stored.path)
    file.release = lambda offset, nbytes: released.append((offset, nbytes))  # type: ignore[method-assign]
    copier = StoredCopier(stored, at.files, at.workspace, 4096)
    spans = list(copier.spans(100, 4000))
    assert {b - a for a, b in spans[:-1]} == {1024}
    assert released == [(64 + 400, 15600)]
    assert made(copier, 100, 4000, 4) == bytes(model[100:4000].view(torch.uint8).numpy())


def test_a_reader_is_never_asked_for_half_a_complex_number(bench: Opening) -> None:
    at = bench([torch.randn(1000, dtype=torch.complex128)], False, COPY)
    for out_bytes in (1, 16, 40, 4096):
        spans = list(ReaderCopier(at.task, at.source, out_bytes).spans(0, 2000))
        assert all(not a % 2 and not b % 2 and b - a <= max(out_bytes // 8, 2) for a, b in spans)
