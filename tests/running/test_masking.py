"""Masks are kept between the passes and the kernel, whoever makes them, and the bytes are those without room for them."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from running.own_methods import drawing
from streammerge.errors import SpaceError
from streammerge.kernels import random
from streammerge.planning import tasks
from streammerge.running import masking
from streammerge.tensors.spec import GRAIN

SHAPES = {"long": (321, 1023), "vector": (GRAIN + 4465,), "deep": (70, 33, 29), "short": (5, 7), "line": (6 * GRAIN + 1,)}
MODELS = 2


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A base and models. The first and the last of their tensors are longer than a piece."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", 2 * GRAIN)
    paths = [tmp_path / f"{number}.safetensors" for number in range(1 + MODELS)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(number)
        save_file({name: torch.randn(shape, generator=make).bfloat16() for name, shape in SHAPES.items()}, path)
    return paths


def made(files: list[Path], out: Path, method: Any, **how: Any) -> bytes:
    sm.merge(files[1:], out, method=method, base=files[0], overwrite=True, **how)
    return out.read_bytes()


def no_room(*args: Any, **more: Any) -> None:
    raise SpaceError("full")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.sampled(2)
def test_kept_masks_are_those_that_would_be_made_again(
    method: str, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"parameters": {"density": [0.4, 0.7]}, "seed": 5}
    with monkeypatch.context() as patch:
        patch.setattr(masking, "SpillFile", no_room)
        wanted = made(files, tmp_path / "wanted.safetensors", method, workers=1, **how)
    for executor, workers in (("threads", 1), ("threads", 2), ("processes", 2)):
        found = made(files, tmp_path / "out.safetensors", method, executor=executor, workers=workers, **how)
        assert found == wanted, executor
    assert made(files, tmp_path / "out.safetensors", method, memory="80MiB", io="pread", **how) == wanted


@pytest.mark.parametrize(
    ("executor", "workers", "room"),
    [("threads", 1, True), ("threads", 2, True), ("processes", 2, True), ("threads", 1, False)],
)
@pytest.mark.sampled(2)
def test_random_numbers_are_made_once_where_there_is_room(
    executor: str, workers: int, room: bool, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker finds what another one has kept, in other processes too."""
    monkeypatch.setattr(random, "chosen", random.chosen)  # the method replaces it
    monkeypatch.setenv("DRAWN", str(tmp_path / "drawn"))
    if not room:
        monkeypatch.setattr(masking, "SpillFile", no_room)
    made(files, tmp_path / "out.safetensors", drawing, executor=executor, workers=workers)
    elems = [torch.Size(shape).numel() for shape in SHAPES.values()]
    once = MODELS * sum(elems)
    again = MODELS * sum(n for n in elems if n > GRAIN)
    assert (tmp_path / "drawn").stat().st_size == once + (0 if room else again)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_of_masks_are_closed_with_their_run(workers: int, files: list[Path], tmp_path: Path) -> None:
    """Whatever still refers to them: the collector does not run."""
    kept = list[Any]()
    opened = masking.SpillFile

    class Kept(opened):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            kept.append(self)

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masking, "SpillFile", Kept)
            made(files, tmp_path / "out.safetensors", "dare_linear", parameters={"density": 0.5}, workers=workers)
    finally:
        gc.enable()
    assert kept
    assert not any(file._closing.alive for file in kept)


def test_a_file_of_masks_is_used_again_until_a_tensor_needs_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, opened = list[int](), masking.SpillFile

    class Kept(opened):  # type: ignore[misc, valid-type]
        def __init__(self, size: int, *args: Any, **more: Any) -> None:
            sizes.append(size)
            super().__init__(size, *args, **more)

    monkeypatch.setattr(masking, "SpillFile", Kept)
    masks = masking.OwnMasks(SimpleNamespace(home=None))  # type: ignore[arg-type]
    rooms = [masks.room(nbytes) for nbytes in (100, 70, 5000, 100)]
    assert sizes == [100, 5000]
    assert len({room.number for room in rooms if room is not None}) == 4, "each tensor has a number of its own"
    files = [room.spill for room in rooms if room is not None]
    assert files[0] is files[1]
    assert files[2] is files[3]
    alive = [file._closing.alive for file in (files[0], files[2])]  # type: ignore[attr-defined]
    assert alive == [False, True], "the one before is closed"
    masks.close()
    assert not files[2]._closing.alive  # type: ignore[attr-defined]
    monkeypatch.setattr(masking, "SpillFile", no_room)
    assert masks.room(6000) is None
    assert masks.room(10) is None
