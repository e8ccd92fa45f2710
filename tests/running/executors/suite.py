"""The rules for every executor. A subclass, whose name begins with Test, sets ``executor`` to the executor under test."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm
from running.executors.toys import SLOW_SECONDS, Fails, Keeps, Measures, Square, Waits, Zeros
from streammerge.running.executors.base import Executor, Executors

WAIT_SECONDS = 2.0


class ExecutorSuite:
    """Tests of one executor. Workers may be other processes, so the tests look only at results and written files."""

    executor: Executors

    @pytest.fixture
    def two(self) -> Iterator[Executor]:
        with closing(self.executor(2)) as executor:
            yield executor

    @pytest.mark.parametrize("workers", [1, 2, 8])
    def test_every_unit_is_done_once(self, workers: int) -> None:
        with closing(self.executor(workers)) as executor:
            assert sorted(executor.run(Square(), range(500))) == [number * number for number in range(500)]

    def test_nothing_to_do(self, two: Executor) -> None:
        assert list(two.run(Square(), [])) == []

    def test_a_unit_may_have_no_result(self, two: Executor) -> None:
        assert list(two.run(Square(nothing=True), range(10))) == [None] * 10

    def test_one_work_after_another(self, two: Executor) -> None:
        for count in (5, 0, 9, 1):
            assert sorted(two.run(Square(), range(count))) == [number * number for number in range(count)]

    def test_units_come_from_any_iterable_and_only_when_they_are_needed(self, two: Executor) -> None:
        taken = []

        def units() -> Iterator[int]:
            for number in range(100_000):
                taken.append(number)
                yield number

        with closing(two.run(Square(), units(), backlog=4)) as results:
            for _ in range(20):
                next(results)
        assert 20 <= len(taken) < 200

    def test_results_that_wait_are_all_taken(self) -> None:
        with closing(self.executor(4)) as executor:
            results = executor.run(Zeros(1_000_000), range(40), backlog=2)
            first = next(results)
            time.sleep(SLOW_SECONDS)
            assert len(first) + sum(len(each) for each in results) == 40 * 1_000_000

    def test_units_may_be_large_while_results_are(self, two: Executor) -> None:
        assert sorted(two.run(Measures(), (bytes(n * 100_000) for n in range(20)))) == [n * 100_000 for n in range(20)]
        assert sum(len(each) for each in two.run(Zeros(3_000_000), (bytes(3_000_000) for _ in range(8)))) == 24_000_000

    def test_the_first_error_stops_the_rest(self, two: Executor) -> None:
        began = time.monotonic()
        with pytest.raises(sm.TaskError, match="twenty"):
            list(two.run(Fails(20, seconds=SLOW_SECONDS / 10), range(100_000)))
        assert time.monotonic() - began < 100_000 * SLOW_SECONDS / 10 / 4
        assert sorted(two.run(Square(), range(3))) == [0, 1, 4], "it can be used again"

    def test_an_error_keeps_its_cause(self, two: Executor) -> None:
        with pytest.raises(sm.TaskError, match="twenty") as caught:
            list(two.run(Fails(20, "cause"), range(100)))
        cause = caught.value.__cause__
        assert isinstance(cause, OSError)
        assert (cause.errno, cause.strerror, cause.filename) == (5, "the disk", "a file")

    def test_an_error_that_cannot_be_pickled_says_the_same(self, two: Executor) -> None:
        with pytest.raises(Exception, match="one and two"):
            list(two.run(Fails(20, "odd"), range(100)))

    @pytest.mark.parametrize("when", ["open", "close"])
    def test_an_error_before_or_after_the_units(self, two: Executor, when: str) -> None:
        with pytest.raises(sm.TaskError, match=f"it cannot be {when}"):
            list(two.run(Fails(-1, when), range(10)))
        assert sorted(two.run(Square(), range(3))) == [0, 1, 4]

    def test_an_error_of_the_units_themselves(self, two: Executor) -> None:
        def units() -> Iterator[int]:
            yield 1
            raise KeyError("no more")

        with pytest.raises(KeyError, match="no more"):
            list(two.run(Square(), units()))
        assert sorted(two.run(Square(), range(3))) == [0, 1, 4]

    def test_who_leaves_early_ends_what_runs(self, two: Executor, tmp_path: Path) -> None:
        results = two.run(Waits(str(tmp_path)), range(100))
        assert next(results) == 0
        deadline = time.monotonic() + WAIT_SECONDS
        while not list(tmp_path.glob("begun [1-9]*")) and time.monotonic() < deadline:
            time.sleep(SLOW_SECONDS / 10)  # an executor on the calling thread starts no unit meanwhile
        results.close()
        said = {kind: {path.name.split()[1] for path in tmp_path.glob(f"{kind} *")} for kind in ("begun", "ended")}
        assert said["begun"] - {"0"} == said["ended"], "units had ended when the generator was closed"
        assert sorted(two.run(Square(), range(3))) == [0, 1, 4], "it can be used again"

    def test_what_is_kept_lasts_while_the_key_does(self, tmp_path: Path) -> None:
        with closing(self.executor(2)) as executor:
            seen = [set(executor.run(Keeps(str(tmp_path), key), range(40))) for key in "aab"]
            assert {key for _, _, key in seen[0] | seen[1]} == {"a"}
            first = {pid: kept for pid, kept, _ in seen[0]}
            assert all(kept == first[pid] for pid, kept, _ in seen[1] if pid in first), "one object for both works"
            made = list(tmp_path.glob("made a *"))
            assert len(made) == len({path.name.split()[2] for path in made}), "made once in each process"
        for key in "ab":
            assert len(list(tmp_path.glob(f"made {key} *"))) == len(list(tmp_path.glob(f"closed {key} *"))) > 0
        assert len(list(tmp_path.glob("*"))) == 2 * len(list(tmp_path.glob("made *")))

    def test_an_executor_that_was_never_used_can_be_closed(self) -> None:
        self.executor(3).close()

    @pytest.mark.parametrize(
        "way",
        [{}, {"method": "ties", "parameters": {"density": 0.5}}, {"method": "dare_linear", "parameters": {"density": 0.5}}],
    )
    @pytest.mark.sampled(3)
    def test_a_merge_has_the_bytes_it_has_with_threads(self, way: dict[str, object], tmp_path: Path) -> None:
        """Includes a long tensor, whose passes all workers share."""
        for seed in (1, 2, 3):
            tensors = {name: tensor for name, tensor in trained(seed).items() if tensor.is_floating_point()}
            large = trained(seed)["embed.weight"].repeat(45, 1)
            save_file(tensors | {"large": large}, tmp_path / f"{seed}.safetensors")
        models = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
        base = {"base": tmp_path / "3.safetensors"} if way else {}
        sm.merge(models, tmp_path / "threads.safetensors", workers=2, **base, **way)
        sm.merge(models, tmp_path / "own.safetensors", workers=2, executor=self.executor, **base, **way)
        assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "threads.safetensors").read_bytes()

    def test_a_merge_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        weight = trained(1)["embed.weight"]
        save_file({"w": weight}, tmp_path / "in.safetensors")
        save_file({"w": weight.log()}, tmp_path / "nan.safetensors")
        with pytest.raises(sm.VerifyError, match="NaN"):
            sm.merge(
                [tmp_path / "in.safetensors", tmp_path / "nan.safetensors"],
                tmp_path / "out.safetensors",
                executor=self.executor,
            )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "nan.safetensors"]
