"""What every executor must keep. A subclass, its name beginning with Test, says which it is, by ``executor``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.running.executors.base import Executors

SLOW_SECONDS = 0.05


class ExecutorSuite:
    """Tasks may run in other processes, so that these tests see of them only what they return."""

    executor: Executors

    @pytest.mark.parametrize("workers", [1, 2, 8])
    def test_every_task_runs_once(self, workers: int) -> None:
        done = self.executor(workers).run(range(500), lambda number: number * number)
        assert sorted(done) == [number * number for number in range(500)]

    def test_nothing_to_do(self) -> None:
        assert list(self.executor(2).run([], lambda number: number)) == []

    def test_nothing_may_come_of_a_task(self) -> None:
        assert list(self.executor(2).run(range(10), lambda number: None)) == [None] * 10

    def test_one_run_after_another(self) -> None:
        executor = self.executor(2)
        assert [sorted(executor.run(range(count), lambda number: number)) for count in (5, 0, 9)] == [
            list(range(count)) for count in (5, 0, 9)
        ]

    def test_results_that_wait_are_all_taken(self) -> None:
        results = self.executor(4).run(range(40), lambda number: bytes(100_000), backlog=2)
        time.sleep(SLOW_SECONDS)
        assert sum(len(each) for each in results) == 40 * 100_000

    def test_the_first_error_stops_the_rest(self) -> None:
        def fail(number: int) -> int:
            if number == 20:
                raise sm.TaskError("twenty")
            time.sleep(SLOW_SECONDS / 10)
            return number

        began = time.monotonic()
        with pytest.raises(sm.TaskError, match="twenty"):
            list(self.executor(2).run(range(100_000), fail))
        assert time.monotonic() - began < 100_000 * SLOW_SECONDS / 10 / 4

    def test_who_leaves_early_waits_for_nobody(self) -> None:
        executor = self.executor(2)

        def work(number: int) -> int:
            while number and not executor.stopping.is_set():
                time.sleep(SLOW_SECONDS)
            return number

        results = executor.run(range(100), work)
        assert next(results) == 0
        results.close()
        assert executor.stopping.is_set()

    @pytest.mark.parametrize(
        "way",
        [{}, {"method": "ties", "parameters": {"density": 0.5}}, {"method": "dare_linear", "parameters": {"density": 0.5}}],
    )
    def test_a_merge_has_the_bytes_it_has_with_threads(self, way: dict[str, object], tmp_path: Path) -> None:
        """Also of a tensor that is spread, whose passes all workers share."""
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
        save_file({"w": trained(1)["embed.weight"].log()}, tmp_path / "in.safetensors")
        with pytest.raises(sm.VerifyError, match="NaN"):
            sm.merge([tmp_path / "in.safetensors"] * 2, tmp_path / "out.safetensors", executor=self.executor)
        assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]

    def test_tasks_are_numbered_by_nobody(self) -> None:
        """They come from any iterable, once."""

        def tasks() -> Iterator[str]:
            yield from "abc"

        assert sorted(self.executor(2).run(tasks(), str.upper)) == ["A", "B", "C"]
