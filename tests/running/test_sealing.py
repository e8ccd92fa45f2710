"""Bytes outside tensors are given to outputs in parts as soon as nothing unknown is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import trained

import streammerge as sm
from streammerge.formats.base import LayoutFile
from streammerge.planning.tasks import pieces
from streammerge.running.finished import FinishedPieces
from streammerge.running.sealing import Sealing
from streammerge.stores.journal import Finished


class Told:
    """Notes what it is given."""

    in_parts = True
    waiting = 0

    def __init__(self) -> None:
        self.given: dict[int, bytes] = {}

    def preset(self, literals: Any) -> None:
        self.given = dict(literals)


def given(path: Path) -> tuple[LayoutFile, Told, Any, Any]:
    plan = sm.plan([path, path], path.with_name(f"out{path.suffix}"))
    told = Told()
    done = FinishedPieces(plan.tasks, [file.name for file in plan.layout.files])
    sealing = Sealing(plan.layout, plan.tasks, [told], done)  # type: ignore[list-item]
    return plan.layout.files[0], told, (plan, done), sealing


def test_records_of_an_archive_follow_their_tensors(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "a.pth")
    file, told, (plan, done), sealing = given(tmp_path / "a.pth")
    before = dict(told.given)
    tensors = set(file.offsets.values())
    assert all(offset + len(data) not in tensors for offset, data in before.items() if data[:2] == b"PK")
    for number, task in enumerate(plan.tasks):
        for piece in pieces(task, number):
            done.add(Finished(*piece.key, file.name, piece.offset, piece.nbytes, 7, {}))
    sealing.made(0)
    assert told.given == before
    told.waiting = 100
    sealing.made(0)
    sums = dict.fromkeys(tensors, 7)
    final = {literal.offset: literal.data for literal in file.around(sums, file.receipt)}
    assert told.given.items() < final.items()
    assert len(final) - len(told.given) <= 3  # the receipt, its header, and the directory
    assert len(told.given) > len(before) + 3


def test_a_header_without_checksums_is_known_from_the_start(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "a").mkdir()
    save_file(trained(1), tmp_path / "a" / "model.safetensors")
    plan = sm.plan([tmp_path / "a"] * 2, tmp_path / "out")
    outputs = [Told() for _ in plan.layout.files]
    Sealing(plan.layout, plan.tasks, outputs, FinishedPieces(plan.tasks, [file.name for file in plan.layout.files]))  # type: ignore[arg-type]
    for file, told in zip(plan.layout.files, outputs, strict=True):
        if file.name.endswith(".safetensors"):
            assert told.given == {literal.offset: literal.data for literal in file.literals}
        elif file.receipt:
            assert told.given == {}
