"""The finished pieces of a run are those that were added, whether they are columns or objects."""

from __future__ import annotations

import math
import random
import struct

import pytest

from streammerge.methods.registry import COPY
from streammerge.planning.tasks import MergeTask, pieces
from streammerge.running.finished import FinishedPieces
from streammerge.sources.stored import Stored
from streammerge.stores.journal import Finished
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import PIECE_ELEMS, TensorSpec

FILES = ["a", "b"]


def some_tasks() -> list[MergeTask]:
    """Returns tasks of one piece and of several, in two files."""
    made, cursors = [], [100, 0]
    for number, elems in enumerate((1, 3, 2 * PIECE_ELEMS + 1, 7, PIECE_ELEMS, 5)):
        spec, file = TensorSpec(f"t{number}", DType.U8, (elems,)), number % 2
        made.append(MergeTask(spec, COPY, (Stored(spec, "in", 0),), file, cursors[file]))
        cursors[file] += elems
    return made


def all_pieces(tasks: list[MergeTask]) -> list[Finished]:
    draw = random.Random(1)
    return [
        Finished(
            *piece.key,
            FILES[task.file],
            piece.offset,
            piece.nbytes,
            draw.randrange(1 << 32),
            {"in": 2} if draw.random() < 0.3 else {},
            struct.pack("<2f", draw.random(), 1 + draw.random()).hex() if draw.random() < 0.5 else "",
        )
        for number, task in enumerate(tasks)
        for piece in pieces(task, number)
    ]


def test_the_pieces_are_those_that_were_added() -> None:
    tasks = some_tasks()
    every = all_pieces(tasks)
    assert len(every) == 8
    for count in range(len(every) + 1):
        some = random.Random(count).sample(every, count)
        made = FinishedPieces(tasks, FILES)
        for piece in some:
            made.add(piece)
        assert sorted(made, key=lambda piece: piece.key) == sorted(some, key=lambda piece: piece.key)
        assert [piece.key for piece in every if piece.key in made] == [p.key for p in every if p in some]
        assert list(made) == sorted(some, key=lambda piece: piece.key)
        assert len(made) == len(some)
        assert [(key, FILES[file], place) for key, file, place in made.places()] == [(p.key, p.file, p.place) for p in made]
        assert [made.piece(piece.key).nbytes for piece in some] == [piece.nbytes for piece in some]
        assert made.nbytes == sum(piece.nbytes for piece in some)
        assert sorted(number for number, _ in made.nonfinite()) == sorted(p.task for p in some if p.nonfinite)
        for number, found in enumerate(made.measured.distances()):
            norms = [struct.unpack("<2f", bytes.fromhex(p.measured)) for p in some if p.task == number and p.measured]
            apart, own = (math.fsum(pair[n] ** 2 for pair in norms) for n in range(2))
            assert found == ([pytest.approx(math.sqrt(apart / own))] if norms else [])
        by_file = dict(made.by_file())
        assert list(by_file) == FILES
        for name, parts in by_file.items():
            assert parts == sorted((p.offset, p.nbytes, p.checksum) for p in some if p.file == name)


def test_a_piece_may_hold_what_was_measured_of_those_after_it() -> None:
    specs = [TensorSpec(f"t{number}", DType.U8, (4,)) for number in range(4)]
    tasks = [MergeTask(spec, COPY, (Stored(spec, "in", 0),), 0, 4 * n) for n, spec in enumerate(specs)]
    made = FinishedPieces(tasks, FILES)
    norms = struct.pack("<6f", 1, 2, 3, 4, 5, 6).hex()
    first = Finished(1, 0, "a", 4, 4, 0, {}, norms)
    assert made.fits(first)
    assert not made.fits(first._replace(measured=norms + norms[:16]))  # there are no so many tasks
    assert not made.fits(first._replace(measured=norms[:-2]))
    made.add(first)
    for number in (2, 3):
        made.add(Finished(number, 0, "a", 4 * number, 4, 0))
    assert made.measured.distances() == [[], [0.5], [0.75], [pytest.approx(5 / 6)]]
    assert [each.measured for each in made] == [norms[:16], norms[16:32], norms[32:]]


def test_the_pieces_of_a_broken_file_are_forgotten() -> None:
    tasks = some_tasks()
    made = FinishedPieces(tasks, FILES)
    for piece in all_pieces(tasks):
        made.add(piece)
    made.forget({"b"})
    kept = [piece for piece in all_pieces(tasks) if piece.file == "a"]
    assert sorted(made, key=lambda piece: piece.key) == sorted(kept, key=lambda piece: piece.key)


def test_only_pieces_of_the_plan_fit() -> None:
    tasks = some_tasks()
    made = FinishedPieces(tasks, FILES)
    for piece in all_pieces(tasks):
        assert made.fits(piece)
        for wrong in (
            {"task": len(tasks)},
            {"start": piece.start + 1},
            {"start": 3 * PIECE_ELEMS},
            {"file": "c"},
            {"offset": piece.offset + 1},
            {"nbytes": piece.nbytes + 1},
        ):
            other = piece._replace(**wrong)
            assert not made.fits(other)
            assert other.key in [each.key for each in all_pieces(tasks)] or other.key not in made
    with pytest.raises(ValueError, match="no piece that begins at element 1"):
        made.add(piece._replace(start=1))
    with pytest.raises(KeyError):
        made.get((0, 0))
