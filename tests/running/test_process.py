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


def test_memory_is_told_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sandbox may have no /proc, and psutil reads it too."""

    def nobody(*_: object) -> None:
        raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(process, "_PAGES", tmp_path / "absent")
    monkeypatch.setattr(psutil, "Process", nobody)
    assert 10 << 20 < process.resident_bytes() < 64 << 30


def test_memory_is_counted() -> None:
    held = process.resident_bytes()
    assert 10 << 20 < held <= process.peak_resident_bytes()
    gauge = process.Gauge()
    assert gauge.now() == gauge.now(), "the kernel is asked once in a while only"


def test_memory_is_that_of_the_machine_or_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form of the kernel's documentation, for both versions of control groups."""
    whole = psutil.virtual_memory().total
    groups, home = tmp_path / "cgroup", tmp_path / "fs"
    monkeypatch.setattr(process, "_GROUPS", groups)
    monkeypatch.setattr(process, "_GROUP_HOME", home)
    assert process.memory_bytes() == whole, "there are no groups"
    groups.write_text("0::/user.slice/app\n")
    (home / "user.slice" / "app").mkdir(parents=True)
    (home / "user.slice" / "app" / "memory.max").write_text("max\n")
    assert process.memory_bytes() == whole
    (home / "user.slice" / "memory.max").write_text("700000000\n")
    assert process.memory_bytes() == 700_000_000, "the group above has a limit"
    (home / "user.slice" / "app" / "memory.max").write_text("500000000\n")
    assert process.memory_bytes() == 500_000_000
    groups.write_text("12:cpu:/other\n11:memory,hugetlb:/docker/1\n1:name=systemd:/\n")
    (home / "memory" / "docker" / "1").mkdir(parents=True)
    (home / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (home / "memory" / "docker" / "1" / "memory.limit_in_bytes").write_text("300000000\n")
    assert process.memory_bytes() == 300_000_000
