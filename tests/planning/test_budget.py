"""The memory model: its arithmetic, and that allocations equal its counts."""

from __future__ import annotations

import itertools

import pytest

import streammerge as sm
from streammerge.planning import budget
from streammerge.planning.budget import Load
from streammerge.stores.ahead import BLOCKS_OF_STREAM, LEAST_BLOCK_BYTES
from streammerge.tensors.spec import GRAIN
from streammerge.units import PAGE_BYTES


class TestBudget:
    cost = budget.Cost(compute=3, buffers=5, out=7, read=11, passes_bytes=17, spread_bytes=19)

    def test_the_peak_is_the_sum_of_its_terms(self) -> None:
        fitted = budget.fit(1 << 40, workers=3, cost=self.cost, load=Load(tensors=5, spooling=True))
        buffers = 5 * 3 + 2 * 11
        expected = budget.RUN_BYTES + 5 * budget.PER_TENSOR_BYTES + budget.SPOOLING_BYTES + 19
        expected += 3 * (budget.PER_WORKER_BYTES + 17 + budget.BEST_OUT_BYTES + budget.BEST_CHUNK_ELEMS * buffers)
        assert (fitted.workers, fitted.chunk_elems, fitted.peak_bytes) == (3, budget.BEST_CHUNK_ELEMS, expected)

    def test_slots_are_what_was_counted(self) -> None:
        made = budget.regions(budget.Budget(1, 100, 5000, 1000, self.cost, 0))
        assert sum(size for _, size in made.values()) == 100 * self.cost.element_bytes + 5000 + PAGE_BYTES
        assert all(offset % PAGE_BYTES == 0 for offset, _ in made.values())
        ends = sorted((offset, offset + size) for offset, size in made.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))

    def test_less_memory_means_smaller_chunks_then_fewer_workers_then_an_error(self) -> None:
        seen, memory = [], 1 << 28
        with pytest.raises(sm.BudgetError) as error:
            while True:
                fitted = budget.fit(memory, workers=4, cost=self.cost, load=Load(tensors=5))
                assert fitted.peak_bytes <= memory
                assert fitted.chunk_elems % GRAIN == 0
                seen.append((fitted.workers, fitted.chunk_elems))
                memory -= 1 << 20
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] == (1, GRAIN)
        least = int(str(error.value).rpartition('memory="')[2].partition("MiB")[0]) << 20
        budget.fit(least, workers=4, cost=self.cost, load=Load(tensors=5))
        with pytest.raises(sm.BudgetError):
            budget.fit(least - (1 << 20), workers=4, cost=self.cost, load=Load(tensors=5))

    def test_blocks_of_remote_files_are_as_many_as_are_read_side_by_side(self) -> None:
        assert budget.LEAST_STREAM_BYTES == 2 * BLOCKS_OF_STREAM * LEAST_BLOCK_BYTES
        for memory, workers, models in itertools.product((128, 256, 512, 4096), (1, 2, 16, 64), (2, 3, 8, 50)):
            made = budget.fit(memory << 20, workers, self.cost._replace(spread_bytes=0), Load(streams=models))
            assert made.peak_bytes <= memory << 20
            assert made.ahead_bytes >= made.workers * models * budget.LEAST_STREAM_BYTES
            assert made.streams == models
            inputs = made.opened({}, processes=made.workers)
            assert inputs.ahead_bytes * made.workers <= made.ahead_bytes
            assert (inputs._streams, made.opened({})._streams) == (models, made.workers * models)
        with pytest.raises(sm.BudgetError, match="needs at least"):
            budget.fit(128 << 20, 1, self.cost, Load(streams=80))

    def test_mapped_windows_shrink_before_chunks(self) -> None:
        cost = budget.Cost(compute=8, buffers=2, out=2, read=0, inputs=8, mapped=2)
        wide, narrow = (budget.fit(m << 20, workers=2, cost=cost, load=Load(tensors=10)) for m in (512, 64))
        assert wide.window_bytes == budget.MOST_WINDOW_BYTES > narrow.window_bytes
        assert wide.chunk_elems == narrow.chunk_elems

    @pytest.mark.parametrize(
        ("input_bytes", "pages"),
        [(1, 2), (budget.HUGE_PAGE_BYTES, 2), (budget.HUGE_PAGE_BYTES + 1, 3), (5 * budget.HUGE_PAGE_BYTES, 6)],
    )
    def test_mapped_pages_count_as_huge_ones(self, input_bytes: int, pages: int) -> None:
        """The pages may begin anywhere in a huge page."""
        assert budget._huge_pages(input_bytes) == pages * budget.HUGE_PAGE_BYTES

    def test_what_is_mapped_and_what_is_kept_are_terms_of_the_peak(self) -> None:
        mapped = budget.Cost(compute=0, buffers=0, out=0, read=0, inputs=3, mapped=2)
        kept = budget.Cost(compute=0, buffers=0, out=0, read=0, inputs=3)
        own = budget.RUN_BYTES + 2 * (budget.PER_WORKER_BYTES + budget.BEST_OUT_BYTES)
        pages = budget._huge_pages(budget.MOST_WINDOW_BYTES + 2 * budget.BEST_CHUNK_ELEMS)
        for cost, each in ((mapped, pages), (kept, budget.MOST_WINDOW_BYTES)):
            fitted = budget.fit(1 << 40, workers=2, cost=cost, load=Load())
            assert fitted.peak_bytes == own + 2 * 3 * each

    def test_what_readers_of_nested_sources_need_is_a_term_and_tiles_shrink(self) -> None:
        cost = budget.Cost(compute=4, buffers=2, out=4, read=4, scratch=1 << 20, shared=1 << 16, tiles=3, held=1 << 18)
        wide = budget.fit(1 << 40, workers=2, cost=cost, load=Load())
        bare = budget.fit(1 << 40, workers=2, cost=budget.Cost(4, 2, 4, 4), load=Load())
        each = (1 << 20) + (1 << 16) + (1 << 18) + 3 * budget.BEST_TILE_BYTES
        assert wide.peak_bytes == bare.peak_bytes + 2 * each
        made = budget.regions(wide)
        sizes = [made[f"reader {region}"][1] for region in ("scratch", "shared", "tiles")]
        assert sizes == [1 << 20, 1 << 16, 3 * budget.BEST_TILE_BYTES]
        narrow = budget.fit(56 << 20, workers=2, cost=cost, load=Load())
        assert narrow.tile_bytes < wide.tile_bytes
        assert budget.fit(14 << 20, workers=1, cost=cost, load=Load()).tile_bytes == 0

    def test_inputs_that_are_read_are_kept_beside_mapped_ones(self) -> None:
        mixed = budget.fit(1 << 40, workers=1, cost=budget.Cost(4, 2, 4, 4, inputs=2, mapped=4, passes=True), load=Load())
        assert budget.regions(mixed)["kept"][1] == mixed.kept_bytes == 2 * mixed.window_bytes

    def test_data_of_pickles_is_a_term(self) -> None:
        with_data, without = (budget.fit(1 << 40, 1, self.cost, Load(pickle_bytes=n)) for n in (12345, 0))
        assert with_data.peak_bytes == without.peak_bytes + 12345

    def test_methods_with_passes_have_twice_the_window(self) -> None:
        plain, passing = (budget.Cost(4, 2, 2, 0, 2, 2, passes=passes) for passes in (False, True))
        one, two = (budget.fit(1 << 40, workers=1, cost=cost, load=Load()) for cost in (plain, passing))
        assert (two.chunk_elems, two.window_bytes) == (one.chunk_elems, 2 * one.window_bytes)

    def test_the_preferred_chunk_is_the_largest_of_all_tasks(self) -> None:
        wide = budget.Cost(8, 4, 2, 0, 2, 2, best=budget.FLOAT64_CHUNK_ELEMS)
        plain = budget.Cost(4, 2, 2, 0, 2, 2, best=budget.BEST_CHUNK_ELEMS)
        for cost, elems in ((wide, budget.FLOAT64_CHUNK_ELEMS), (wide.most(plain), budget.BEST_CHUNK_ELEMS)):
            assert budget.fit(1 << 40, workers=1, cost=cost, load=Load()).chunk_elems == elems

    def test_more_workers_than_fit_cost_no_time(self) -> None:
        assert budget.fit(1 << 29, workers=1 << 70, cost=self.cost, load=Load()) == budget.fit(
            1 << 29, workers=1 << 9, cost=self.cost, load=Load()
        )


def test_memory_for_what_is_read_again() -> None:
    """There is as much as is asked for, or no budget; fewer workers may have it. What a chunk needs is always there."""
    cost = budget.Cost(4, 2, 2, 4, remembered=400 << 20, passing=12, lag=1 << 20)
    for memory, workers in ((512, 4), (300, 2)):
        found = budget.fit(memory << 20, workers=4, cost=cost, load=Load(), remembered_bytes=96 << 20)
        assert (found.remembered_bytes, found.workers) == (96 << 20, workers)
        assert budget.regions(found)["remembered"][1] == 96 << 20
        assert found.peak_bytes <= memory << 20
    bare = budget.fit(512 << 20, workers=4, cost=cost, load=Load())
    assert bare.remembered_bytes == 12 * bare.chunk_elems + (1 << 20)
    little = cost._replace(remembered=5 << 10)
    assert budget.fit(512 << 20, workers=4, cost=little, load=Load()).remembered_bytes == 5 << 10
    with pytest.raises(sm.BudgetError):
        budget.fit(64 << 20, workers=4, cost=cost, load=Load(), remembered_bytes=96 << 20)
