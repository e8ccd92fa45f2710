"""The memory of a process, and that the garbage collector of the calling program stays as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from streammerge.running import process


@pytest.fixture
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_the_program_froze_stays_frozen(thawed: None) -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    assert frozen > 1000
    with process.collector_spared():
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == frozen


def test_what_is_there_is_spared_meanwhile_and_thawed_afterwards(thawed: None) -> None:
    with process.collector_spared():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_the_collector_is_as_it_was() -> None:
    for running in (True, False):
        (gc.enable if running else gc.disable)()
        try:
            with process.collector_paused():
                assert not gc.isenabled()
            assert gc.isenabled() == running
        finally:
            gc.enable()


def test_resident_memory_is_what_psutil_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = psutil.Process().memory_info().rss
    assert abs(process.resident_bytes() - told) < 8 << 20
    monkeypatch.setattr(process, "_PAGES", tmp_path / "statm")
    assert abs(process.resident_bytes() - told) < 8 << 20, "another system than Linux has no such file"


def test_memory_is_counted() -> None:
    held = process.resident_bytes()
    assert 10 << 20 < held <= process.peak_resident_bytes()
    gauge = process.Gauge()
    assert gauge.now() == gauge.now(), "the kernel is asked once in a while only"
