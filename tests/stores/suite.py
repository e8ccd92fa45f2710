"""What every store must keep. The tests of a store inherit :class:`StoreSuite` and say where it may be tried."""

from __future__ import annotations

import pickle
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import streammerge as sm
from streammerge.stores.base import Location, Staging
from streammerge.stores.inputs import InputFiles
from streammerge.stores.locations import parse

ODD_NAMES = ("with space", "ünï", "a'b\"c", "-o", "x.tar.gz", "[1]", "100%", "new\nline", "..x", "#", "日本")
SIZES = (0, 1, 2, 4095, 4096, 4097, 300_001, 1_048_577)


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def full(output: Any) -> bytes:
    """All bytes of an output in the making."""
    buffer = bytearray(output.size)
    assert output.read_into(memoryview(buffer), 0) == output.size
    return bytes(buffer)


def content(location: Location) -> dict[str, bytes]:
    """Returns what is under a name: a file's bytes under "", or those of all files below a folder, by their paths."""
    if not location.is_folder():
        return {"": location.read(0, location.size)}
    found = {}
    for each in location.children():
        below = content(each)
        found |= {f"{each.name}/{name}".rstrip("/"): data for name, data in below.items()}
    return found


class ReadingSuite(ABC):
    """What a store that can be read must keep. ``home``: an empty folder in it, made by the fixture of that name.

    ``NAMES``: names that files may have.
    """

    NAMES: Sequence[str] = ODD_NAMES

    @pytest.fixture
    @abstractmethod
    def home(self, tmp_path: Path) -> Location: ...

    @abstractmethod
    def put(self, location: Location, data: bytes) -> Location:
        """Puts bytes there from outside, in place of what is there. Returns the location."""

    @abstractmethod
    def put_folder(self, location: Location) -> None:
        """Makes an empty folder from outside, and those above it; does nothing when it is there."""

    @abstractmethod
    def remove(self, location: Location) -> None:
        """Removes a file from outside."""

    # -------------------------------------------------------------------------------------------------------- locations

    def test_a_location_is_parsed_from_its_text(self, home: Location) -> None:
        for name in self.NAMES:
            there = home / name
            assert parse(str(there)) == there
            assert str(parse(str(there))) == str(there)
            assert hash(parse(str(there))) == hash(there)
            assert (there.name, there.parent) == (name, home)

    def test_a_scheme_may_be_in_capitals(self, home: Location) -> None:
        scheme = home.store.scheme
        assert parse(f"{scheme.upper()}://{home.key}") == parse(f"{scheme}://{home.key}") == home

    def test_names_are_taken_apart_without_asking(self, home: Location) -> None:
        there = home / "folder" / "model.tar.gz"
        assert (there.stem, there.suffix, there.parent.name) == ("model.tar", ".gz", "folder")
        assert there.with_name("other") == home / "folder" / "other"
        assert there.relative_to(home) == "folder/model.tar.gz"
        assert home in there.parents
        with pytest.raises(ValueError, match="model"):
            there.relative_to(home / "elsewhere")

    def test_a_trailing_slash_makes_no_other_place(self, home: Location) -> None:
        slashed = parse(f"{home / 'folder'}/")
        assert slashed == home / "folder"
        assert slashed.ends_in_slash
        assert not (home / "folder").ends_in_slash

    def test_locations_are_keys_and_sort(self, home: Location) -> None:
        names = ["b", "a", "c"]
        assert [each.name for each in sorted(home / name for name in names)] == ["a", "b", "c"]
        assert {home / "a": 1}[home / "a"] == 1
        assert home / "a" != home / "b"
        assert home / "a" != str(home / "a")

    def test_a_location_pickles(self, home: Location) -> None:
        for there in (home, home / "x", parse(f"{home}/"), *(home / name for name in self.NAMES)):
            again = pickle.loads(pickle.dumps(there))
            assert again == there
            assert (type(again), again.store, str(again)) == (type(there), there.store, str(there))

    def test_two_spellings_of_a_place_resolve_to_one(self, home: Location) -> None:
        self.put(home / "x", b"1")
        assert (home / "x").resolve() == parse(str(home / "x")).resolve()
        assert (home / "x").absolute().is_absolute
        assert (home / "x").absolute().absolute() == (home / "x").absolute()

    # ----------------------------------------------------------------------------------------------------- what is there

    def test_an_absent_name_is_absent(self, home: Location) -> None:
        there = home / "absent"
        assert not any((there.exists(), there.is_file(), there.is_folder(), there.lexists()))
        for ask in (there.status, lambda: there.size, lambda: there.read(0, 1), there.stream):
            with pytest.raises(sm.FormatError):
                ask()
        with pytest.raises(OSError, match=r"\S"):
            there.children()

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_a_file_says_its_size(self, home: Location, nbytes: int) -> None:
        there = self.put(home / "x", noise(nbytes))
        assert (there.size, there.status().size) == (nbytes, nbytes)
        assert there.exists()
        assert there.is_file()
        assert not there.is_folder()

    def test_a_status_changes_with_the_content_only(self, home: Location) -> None:
        there = self.put(home / "x", b"12345")
        before = there.status()
        assert there.status() == before
        self.put(home / "y", b"other")
        assert there.status() == before
        self.put(there, b"54321")
        assert there.status() != before

    def test_two_names_are_two_places(self, home: Location) -> None:
        places = {self.put(home / name, b"same").status().place for name in "abc"}
        assert len(places) == 3

    def test_a_folder_lists_what_is_in_it(self, home: Location) -> None:
        assert home.children() == []
        for name in self.NAMES:
            self.put(home / name, name.encode())
        self.put_folder(home / "folder")
        self.put(home / "folder" / "deep", b"")
        assert home.children() == sorted(home / name for name in (*self.NAMES, "folder"))
        assert (home / "folder").is_folder()
        assert [each.name for each in (home / "folder").children()] == ["deep"]
        assert all(each.read(0, each.size) == each.name.encode() for each in home.children() if each.is_file())

    def test_a_folder_is_no_file(self, home: Location) -> None:
        self.put_folder(home / "a" / "b")
        self.put_folder(home / "a" / "b")
        assert (home / "a" / "b").is_folder()
        assert not (home / "a" / "b").is_file()
        with pytest.raises(sm.FormatError):
            (home / "a" / "b").status()

    def test_patterns_stay_within_a_folder(self, home: Location) -> None:
        self.put_folder(home / "sub")
        for name in ("a1.x", "a2.x", "a10.x", ".hidden.x", "b.y", "sub/a3.x"):
            self.put(home / name, b"")
        assert sorted(each.name for each in (home / "a*.x").glob()) == ["a1.x", "a10.x", "a2.x"]
        assert sorted(each.name for each in (home / "*.x").glob()) == ["a1.x", "a10.x", "a2.x"]
        assert [each.name for each in (home / "sub" / "a?.x").glob()] == ["a3.x"]
        assert [each.name for each in (home / "*" / "a3.x").glob()] == ["a3.x"]
        assert (home / "nothing*").glob() == []
        assert (home / "a*.x").has_magic
        assert not (home / "a1.x").has_magic

    # ----------------------------------------------------------------------------------------------------------- reading

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_ranges_are_read_as_they_are(self, home: Location, nbytes: int) -> None:
        data = noise(nbytes)
        there = self.put(home / "x", data)
        source = there.open()
        assert source.size == nbytes
        assert str(source.location) == str(there)
        chance = random.Random(nbytes)
        for _ in range(20):
            start, stop = sorted(chance.randint(0, nbytes) for _ in range(2))
            buffer = bytearray(stop - start)
            source.read_into(memoryview(buffer), start)
            assert buffer == data[start:stop]
            assert source.view(start, stop - start) == data[start:stop] if nbytes else True
            assert there.read(start, stop - start) == data[start:stop]
        source.close()

    def test_a_read_past_the_end_is_an_error(self, home: Location) -> None:
        there = self.put(home / "x", b"12345")
        source = there.open()
        for start, nbytes in ((0, 6), (5, 1), (4, 2), (100, 1)):
            with pytest.raises(sm.ChangedError, match="ended before byte"):
                source.read_into(memoryview(bytearray(nbytes)), start)
            with pytest.raises(sm.ChangedError, match="ended before byte"):
                source.view(start, nbytes)
            with pytest.raises(sm.FormatError, match="too early"):
                there.read(start, nbytes)
        source.read_into(memoryview(bytearray()), 5)

    def test_a_view_outlives_what_it_came_from(self, home: Location) -> None:
        data = noise(10_000)
        source = self.put(home / "x", data).open()
        view = source.view(77, 5000)
        source.release(0, source.size)
        source.close()
        del source
        assert view == data[77:5077]

    def test_a_released_range_can_be_read_again(self, home: Location) -> None:
        data = noise(1 << 20)
        source = self.put(home / "x", data).open(polite=True)
        assert source.view(5, 1000) == data[5:1005]
        for start in (0, 4096, 1 << 19):
            source.release(start, 4096)
        buffer = bytearray(1 << 20)
        source.read_into(memoryview(buffer), 0)
        assert buffer == data

    def test_a_stream_reads_and_seeks(self, home: Location) -> None:
        data = noise(100_000)
        with self.put(home / "x", data).stream() as stream:
            assert stream.read(10) == data[:10]
            assert stream.tell() == 10
            assert stream.seek(-5, 2) == 99_995
            assert stream.read() == data[-5:]
            assert stream.read(1) == b""
            stream.seek(50_000)
            assert stream.read(20_000) == data[50_000:70_000]

    def test_many_threads_read_at_once(self, home: Location) -> None:
        data = noise(1 << 20)
        source, wrong = self.put(home / "x", data).open(), list[int]()

        def read(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(50):
                start = chance.randrange(len(data) - 5000)
                buffer = bytearray(5000)
                source.read_into(memoryview(buffer), start)
                if buffer != data[start : start + 5000]:
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_file_that_is_not_the_expected_one_is_not_opened(self, home: Location) -> None:
        there = self.put(home / "x", b"12345")
        status = there.status()
        there.open(status).close()
        self.put(there, b"54321")
        with pytest.raises(sm.ChangedError, match="changed since it was planned"):
            there.open(status)
        self.remove(there)
        with pytest.raises(sm.ChangedError, match="is gone since it was planned"):
            there.open(status)

    def test_a_change_under_the_reader_is_noticed(self, home: Location) -> None:
        there = self.put(home / "x", b"12345")
        inputs = InputFiles({there: there.status()})
        source = inputs.get(there)
        assert inputs.get(parse(str(there))) is source
        inputs.check_unchanged()
        self.put(there, b"67890")
        with pytest.raises(sm.ChangedError, match="changed while it was read"):
            inputs.check_unchanged()

    # ----------------------------------------------------------------------------------------------------------- merging

    def inputs(self, home: Location) -> list[Location]:
        self.put_folder(home / "in")
        tensors = [
            {"w": torch.arange(30.0).view(5, 6) * n, "e": torch.zeros(0), "s": torch.tensor(float(n))} for n in (1, 2)
        ]
        return [self.put(home / "in" / f"{n}.safetensors", save(each)) for n, each in enumerate(tensors)]

    def test_a_pattern_names_inputs(self, home: Location) -> None:
        self.inputs(home)
        assert list(sm.plan([home / "in" / "*.safetensors"]).recipe.inputs) == [
            str(home / "in" / f"{n}.safetensors") for n in (0, 1)
        ]

    @pytest.mark.parametrize("io", ["mmap", "pread"])
    def test_inputs_are_merged_onto_the_disk(self, home: Location, tmp_path: Path, io: str) -> None:
        inputs, out = self.inputs(home), tmp_path / "merged.safetensors"
        sm.merge(inputs, out, io=io)
        merged = load(out.read_bytes())
        assert torch.equal(merged["w"], torch.arange(30.0).view(5, 6) * 1.5)
        assert (merged["s"].item(), merged["e"].shape) == (1.5, (0,))
        out.unlink()
        assert sm.inspect(home / "in" / "0.safetensors").numel == 31


class StoreSuite(ReadingSuite):
    """What a store that takes outputs must keep, too. ``READS_BACK``: whether what was written can be read before it is
    published."""

    READS_BACK = True

    def put(self, location: Location, data: bytes) -> Location:
        location.write_whole(data, overwrite=True)
        return location

    def put_folder(self, location: Location) -> None:
        location.make_folder()

    def make(self, out: Location, files: dict[str, bytes], overwrite: bool = False) -> None:
        """An output of these files; of one under "", a file."""
        staging = out.stage(overwrite)
        staging.as_folder = "" not in files
        staging.clear()
        for name, data in files.items():
            staging.create(name or out.name, len(data)).write_full(data, 0)
        staging.commit(staging.as_folder)

    def left(self, home: Location) -> list[str]:
        return [each.name for each in home.children()]

    # ------------------------------------------------------------------------------------------------------ small files

    def test_a_small_file_is_written_whole(self, home: Location) -> None:
        (home / "x").write_whole(b"first", overwrite=False)
        with pytest.raises(sm.RecipeError, match="exists already"):
            (home / "x").write_whole(b"second", overwrite=False)
        assert content(home / "x") == {"": b"first"}
        (home / "x").write_whole(b"third", overwrite=True)
        assert content(home / "x") == {"": b"third"}
        assert self.left(home) == ["x"]

    # ----------------------------------------------------------------------------------------------------------- writing

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_what_is_written_is_published(self, home: Location, nbytes: int) -> None:
        data, out = noise(nbytes), home / "out"
        staging = out.stage()
        staging.as_folder = False
        staging.clear()
        file = staging.create("out", nbytes)
        assert (file.size, file.kept, file.synced) == (nbytes, False, True)
        order = list(range(0, nbytes, 70_001))
        random.Random(1).shuffle(order)
        for start in order:
            file.write_full(data[start : start + 70_001], start)
        if self.READS_BACK:
            assert full(file) == data
        file.sync()
        assert file.synced
        assert not out.exists()
        assert not staging.published
        staging.commit(as_folder=False)
        assert staging.published
        assert content(out) == {"": data}
        assert self.left(home) == ["out"]

    def test_what_is_not_written_is_zero(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.as_folder = False
        staging.clear()
        staging.create("out", 10).write_full(b"ab", 4)
        staging.commit(as_folder=False)
        assert content(home / "out") == {"": b"\0\0\0\0ab\0\0\0\0"}

    def test_a_write_outside_the_file_is_refused(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.clear()
        file = staging.create("out", 4)
        for start in (-1, 1, 5):
            with pytest.raises(ValueError, match="lie outside"):
                file.write_full(b"1234", start)
        staging.abort()

    def test_many_threads_write_at_once(self, home: Location) -> None:
        data, out = noise(1 << 20), home / "out"
        staging = out.stage()
        staging.as_folder = False
        staging.clear()
        file = staging.create("out", len(data))

        def write(first: int) -> None:
            for start in range(first * 5003, len(data), 4 * 5003):
                file.write_full(memoryview(data)[start : start + 5003], start)

        threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        staging.commit(as_folder=False)
        assert content(out) == {"": data}

    def test_a_temporary_file_is_read_back_and_goes(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.as_folder = False
        staging.clear()
        file = staging.temporary("spooled", 5)
        file.write_full(b"12345", 0)
        assert InputFiles({}).get(file.location).view(1, 3) == b"234"
        assert staging.outputs == {}
        staging.create("out", 0)
        assert list(staging.outputs) == ["out"]
        staging.commit(as_folder=False)
        assert self.left(home) == ["out"]

    def test_files_in_subfolders_are_published_with_their_folder(self, home: Location) -> None:
        files = {"config.json": b"{}", "unet/model": noise(5000), "a/b/c/deep": b"", "a/b/other": b"12", "a/üx": b"3"}
        self.make(home / "out", files)
        assert content(home / "out") == files
        assert self.left(home) == ["out"]
        fewer = {"unet/model": b"new", "d": b""}
        self.make(home / "out", fewer, overwrite=True)
        assert content(home / "out") == fewer
        assert self.left(home) == ["out"]

    def test_a_file_in_a_subfolder_is_opened_again_and_kept(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.clear()
        file = staging.create("unet/model", 6)
        file.write_full(b"abc", 0)
        assert list(staging.outputs) == ["unet/model"]
        assert content(staging.content) == {"unet/model": b"abc\0\0\0"}
        again = staging.create("unet/model", 6, keep=True)
        assert again.kept
        again.write_full(b"def", 3)
        staging.commit(as_folder=True)
        assert content(home / "out") == {"unet/model": b"abcdef"}

    @pytest.mark.parametrize(
        "name", ["../x", "a/../../x", "/x", "a//x", "a/./x", "a/", "..", ".", "a\\b/x", "/".join("a" * 9)]
    )
    def test_a_name_that_leads_out_of_the_output_is_refused(self, home: Location, name: str) -> None:
        staging = (home / "out").stage()
        staging.clear()
        with pytest.raises(ValueError, match="is not the name of a file in an output"):
            staging.create(name, 1)
        assert staging.outputs == {}
        staging.abort()

    def test_an_output_is_read_back_before_it_is_published(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.clear()
        staging.create("part", 3).write_full(b"abc", 0)
        assert content(staging.content) == {"part": b"abc"}
        assert home in staging.home.parents
        assert staging.home in staging.content.parents
        staging.abort()

    # -------------------------------------------------------------------------------------------------------- publishing

    def test_a_folder_is_published(self, home: Location) -> None:
        files = {name: name.encode() for name in self.NAMES}
        self.make(home / "out", files)
        assert content(home / "out") == files
        assert self.left(home) == ["out"]

    def test_abort_leaves_nothing(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.clear()
        staging.create("out", 100).write_full(b"x" * 100, 0)
        staging.temporary("spooled", 10)
        staging.abort()
        staging.abort()
        assert self.left(home) == []
        (home / "out").stage().abort(keep=True)  # there is no journal, so nothing to be continued
        assert self.left(home) == []

    def test_an_output_that_is_there_is_not_replaced_unasked(self, home: Location) -> None:
        self.put(home / "out", b"old")
        with pytest.raises(sm.RecipeError, match="exists already"):
            (home / "out").check_writable(overwrite=False)
        with pytest.raises(sm.RecipeError, match="exists already"):
            (home / "out").stage()
        (home / "out").check_writable(overwrite=True)
        self.make(home / "out", {"": b"new"}, overwrite=True)
        assert content(home / "out") == {"": b"new"}
        assert self.left(home) == ["out"]

    def test_an_output_that_appears_meanwhile_stays(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.as_folder = False
        staging.clear()
        staging.create("out", 3)
        self.put(home / "out", b"somebody's")
        with pytest.raises(sm.RecipeError, match="exists already"):
            staging.commit(as_folder=False)
        assert not staging.published
        staging.abort()
        assert content(home / "out") == {"": b"somebody's"}
        assert self.left(home) == ["out"]

    def test_a_folder_is_replaced_whole(self, home: Location) -> None:
        self.make(home / "out", {"a": b"1", "b": b"2"})
        with pytest.raises(sm.RecipeError, match="exists already"):
            (home / "out").stage()
        self.make(home / "out", {"b": b"3", "c": b"4"}, overwrite=True)
        assert content(home / "out") == {"b": b"3", "c": b"4"}
        assert self.left(home) == ["out"]

    def test_an_empty_folder_may_be_filled(self, home: Location) -> None:
        (home / "out").make_folder()
        self.make(home / "out", {"a": b"1"})
        assert content(home / "out") == {"a": b"1"}

    def test_an_abandoned_replacement_leaves_the_old(self, home: Location) -> None:
        self.make(home / "out", {"a": b"1"})
        staging = (home / "out").stage(overwrite=True)
        staging.clear()
        staging.create("b", 5)
        staging.abort()
        assert content(home / "out") == {"a": b"1"}
        assert self.left(home) == ["out"]

    def test_readers_see_the_old_or_the_new(self, home: Location) -> None:
        """A reader that asks all the time never finds a half, or nothing."""
        self.make(home / "out", {"": bytes(100_000)})
        seen, done = set[bytes](), threading.Event()

        def look() -> None:
            while not done.is_set():
                source = (home / "out").open()
                buffer = bytearray(source.size)
                source.read_into(memoryview(buffer), 0)
                seen.add(bytes(buffer))

        thread = threading.Thread(target=look)
        thread.start()
        for number in range(1, 6):
            self.make(home / "out", {"": bytes([number]) * (100_000 + number)}, overwrite=True)
        done.set()
        thread.join()
        assert seen <= {bytes([number]) * (100_000 + number) for number in range(6)}

    def test_two_stagings_of_one_output_cannot_be(self, home: Location) -> None:
        first = (home / "out").stage()
        with pytest.raises(sm.LockedError, match=r"is being written by .*process"):
            (home / "out").stage()
        (home / "other").stage().abort()
        first.abort()
        (home / "out").stage().abort()
        assert self.left(home) == []

    def test_a_write_after_the_end_is_refused(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.as_folder = False
        staging.clear()
        file = staging.create("out", 3)
        staging.commit(as_folder=False)
        with pytest.raises(OSError, match=r"\S"):
            file.write_full(b"abc", 0)
        assert content(home / "out") == {"": bytes(3)}

    # -------------------------------------------------------------------------------------------------------- continuing

    def interrupted(self, out: Location) -> Staging:
        staging = out.stage()
        staging.as_folder = False
        staging.clear()
        staging.create("out", 6).write_full(b"abc", 0)
        staging.journal_file.begin(b"plan\n")
        staging.journal_file.append(b"one\n")
        staging.journal_file.append(b"two\n")
        assert staging.resumable
        return staging

    def test_kept_work_is_continued(self, home: Location) -> None:
        self.interrupted(home / "out").abort(keep=True)
        assert not (home / "out").exists()
        assert len(self.left(home)) == 1
        (home / "out").sweep()
        staging = (home / "out").stage()
        staging.as_folder = False
        assert staging.resumable
        assert staging.journal_file.read() == b"plan\none\ntwo\n"
        file = staging.create("out", 6, keep=True)
        assert file.kept
        assert full(file) == b"abc\0\0\0"
        file.write_full(b"def", 3)
        staging.journal_file.begin(b"plan\nthree\n")
        assert staging.journal_file.read() == b"plan\nthree\n"
        staging.commit(as_folder=False)
        assert content(home / "out") == {"": b"abcdef"}
        assert self.left(home) == ["out"]

    def test_kept_work_of_another_size_is_not_taken(self, home: Location) -> None:
        self.interrupted(home / "out").abort(keep=True)
        staging = (home / "out").stage()
        staging.as_folder = False
        file = staging.create("out", 7, keep=True)
        assert not file.kept
        assert full(file) == bytes(7)
        staging.abort()
        assert self.left(home) == []

    def test_kept_work_can_be_cleared(self, home: Location) -> None:
        self.interrupted(home / "out").abort(keep=True)
        staging = (home / "out").stage()
        staging.as_folder = False
        staging.clear()
        assert not staging.resumable
        assert staging.journal_file.read() is None
        staging.create("out", 1)
        staging.commit(as_folder=False)
        assert self.left(home) == ["out"]

    def test_abort_without_keeping_removes_kept_work(self, home: Location) -> None:
        self.interrupted(home / "out").abort()
        assert self.left(home) == []

    # ------------------------------------------------------------------------------------------------------------ merges

    @pytest.mark.parametrize("io", ["mmap", "pread"])
    @pytest.mark.parametrize("out", ["out.safetensors", "out.pth", "out"])
    @pytest.mark.sampled(2, by="out")
    def test_checkpoints_are_merged_verified_and_converted(self, home: Location, out: str, io: str) -> None:
        inputs = self.inputs(home)
        result = sm.merge(inputs, home / out, io=io)
        assert result.out == home / out
        assert sm.verify(home / out, sample="100%", inputs=home / "in").recomputed
        sm.convert(home / out, home / "flat.safetensors")
        merged = load((home / "flat.safetensors").read(0, (home / "flat.safetensors").size))
        assert torch.equal(merged["w"], torch.arange(30.0).view(5, 6) * 1.5)
        assert (merged["s"].item(), merged["e"].shape) == (1.5, (0,))
        assert self.left(home) == sorted(["in", out, "flat.safetensors"])

    def test_an_input_is_never_the_output(self, home: Location) -> None:
        inputs = self.inputs(home)
        for out in (inputs[0], home / "in"):
            with pytest.raises(sm.StreammergeError, match=r"is one of the inputs|holds one of|also holds"):
                sm.merge(inputs, out, overwrite=True)
        assert [each.name for each in (home / "in").children()] == ["0.safetensors", "1.safetensors"]

    def test_a_recipe_names_models_beside_it(self, home: Location) -> None:
        self.inputs(home)
        recipe = b"merge_method: linear\nmodels: [{model: 0.safetensors}, {model: 1.safetensors}]\n"
        self.put(home / "in" / "recipe.yaml", recipe)
        sm.merge(recipe=home / "in" / "recipe.yaml", out=home / "out.safetensors")
        assert (home / "out.safetensors").is_file()

    def test_an_input_that_changes_stops_the_merge(self, home: Location) -> None:
        inputs = self.inputs(home)

        def listen(event: object) -> None:
            if type(event).__name__ == "TaskDone":
                self.put(inputs[1], b"other")

        with pytest.raises(sm.ChangedError):
            sm.merge(inputs, home / "out.safetensors", listener=listen)
        assert not (home / "out.safetensors").exists()
        assert self.left(home) == ["in"]
