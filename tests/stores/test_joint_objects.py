"""Uploads to S3 that several machines send: invisible until they are completed, and aborted if nobody names them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning import units
from streammerge.planning.saved import read_saved
from streammerge.planning.units import cut
from streammerge.requests.machines import joint_of
from streammerge.stores.claims import Claims
from streammerge.stores.joint_objects import _cut
from streammerge.stores.locations import parse
from streammerge.stores.objects import ObjectStore
from streammerge.stores.parts import PartedOutput, Sender
from streammerge.stores.registry import STORES
from streammerge.stores.s3 import S3Upload


def objects(place: str) -> dict[str, bytes]:
    """The objects below a place, by their names there."""
    at = parse(place)
    return {item.location.key.removeprefix(f"{at.key}/"): at.store.get(item.location)[0] for item in at.store.items(at)}  # type: ignore[attr-defined]


def uploads(place: str) -> list[Any]:
    at = parse(place)
    return at.store.uploads_below(at)  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = []
    for seed in (1, 2):
        make = torch.Generator().manual_seed(seed)
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        tensors = {f"layers.{n}.w": torch.randn(300, 100, generator=make) for n in range(40)}
        tensors |= {f"layers.{n}.b": torch.randn(7, generator=make) for n in range(140)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")
        paths.append(folder)
    return paths


def test_small_files(s3: str) -> None:
    place = parse(f"{s3}/claims/0.0")
    assert place.create_small(b"one")
    assert not place.create_small(b"other")
    assert place.create_small(b"one"), "our own request, which was repeated"
    place.replace_small(b"new")
    assert objects(f"{s3}/claims") == {"0.0": b"new"}


def test_claims_in_a_bucket(s3: str) -> None:
    place = parse(f"{s3}/out/").join("key")
    with Claims(place, 30.0) as one, Claims(place, 30.0) as other:
        assert one.take("0")
        assert not other.take("0")
        assert other.owners() == {"0": ["0.0"]}
        assert not other.dead("0.0")
    with Claims(place, 30.0) as third:
        assert third.dead("0.0")
        assert third.take("0", ["0.0"])


@pytest.mark.parametrize("shares", [1, 2, 7])
@pytest.mark.sampled(3)
def test_a_folder_in_a_bucket_has_the_bytes_of_a_local_one(
    s3: str, tmp_path: Path, models: list[Path], shares: int
) -> None:
    size = {"max_shard_size": "1MB"}
    sm.merge(models, f"{tmp_path}/whole/", **size)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    sm.plan(models, f"{s3}/out/", save=tmp_path / "plan", **size)
    for number in range(shares):
        assert not objects(f"{s3}/out"), "nothing is visible"
        result = sm.worker(tmp_path / "plan", share=f"{number}/{shares}")
    assert result.left == 0
    assert len(uploads(s3)) == len([name for name in expected if name.endswith(".safetensors")]) > 4
    sm.finish(tmp_path / "plan")
    assert objects(f"{s3}/out") == expected
    assert not uploads(s3)
    assert not objects(f"{s3}/.out.{read_saved(parse(tmp_path / 'plan')).key}.machines")
    assert sm.worker(tmp_path / "plan", claim=True).finished
    assert sm.finish(tmp_path / "plan").notes[-1].endswith("is finished already")


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_one_file_is_one_unit(s3: str, tmp_path: Path, name: str) -> None:
    paths = []
    for seed in (1, 2):
        make = torch.Generator().manual_seed(seed)
        tensors = {f"{n}": torch.randn(30, 10, generator=make) for n in range(150)}
        paths.append(tmp_path / f"{seed}{name[3:]}")
        torch.save(tensors, paths[-1]) if name.endswith("pth") else save_file(tensors, paths[-1])
    sm.merge(paths, tmp_path / name)
    sm.plan(paths, f"{s3}/{name}", save=tmp_path / "plan")
    assert sm.worker(tmp_path / "plan", claim=True).left == 0
    assert not parse(f"{s3}/{name}").is_file()
    sm.finish(tmp_path / "plan")
    assert parse(f"{s3}/{name}").read(0, (tmp_path / name).stat().st_size) == (tmp_path / name).read_bytes()
    assert not uploads(s3)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Models of 42 MB, which are six parts. Units are much smaller than usual."""
    monkeypatch.setattr(units, "_LEAST_SENT", 25_000_000)
    paths = []
    for seed in (1, 2):
        make = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{n}.w": torch.randn(700, 1001, generator=make) for n in range(9)}
        tensors |= {"embed": torch.randn(1_501, 2800, generator=make), "scalar": torch.tensor(1.0)}
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def content(place: str) -> bytes:
    at = parse(place)
    return at.read(0, at.size)


@pytest.mark.parametrize(("shares", "method"), [(1, "linear"), (2, "slerp"), (7, "linear")])
@pytest.mark.sampled(3)
def test_one_large_file_is_sent_by_several_machines(
    s3: str, tmp_path: Path, large: list[Path], shares: int, method: str
) -> None:
    way: dict[str, Any] = {"method": method} | ({"parameters": {"t": 0.3}} if method == "slerp" else {})
    expected = Path(str(sm.merge(large, tmp_path / "whole.safetensors", **way).out)).read_bytes()
    plan = sm.plan(large, f"{s3}/out.safetensors", save=tmp_path / "plan", **way)
    assert len(cut(plan.tasks, whole_files=True)) > 3
    for number in range(shares):
        result = sm.worker(tmp_path / "plan", share=f"{number}/{shares}")
        assert not parse(f"{s3}/out.safetensors").is_file()
    assert result.left == 0
    assert len(uploads(s3)) == 1, "all machines send parts of one upload"
    sm.finish(tmp_path / "plan")
    assert content(f"{s3}/out.safetensors") == expected
    assert not uploads(s3)
    assert list(objects(s3)) == ["out.safetensors"], "nothing is left beside it"


@pytest.mark.parametrize("size", [1, 9, 10, 35, 40])
def test_parts_and_ends_of_ranges_are_the_file(size: int) -> None:
    """Of a file in parts of 10 bytes that is cut at any two places, each part is in one range or made of ends."""
    file = PartedOutput(parse("s3://bucket/out"), size, None, Sender(), each=10)
    for a in range(size):
        for b in range(a + 1, size):
            covered = list[int]()
            for start, stop in ((0, a), (a, b), (b, size)):
                if start < stop:
                    inner, ends = _cut(start, stop, file)
                    assert all(start <= n * 10 and min(n * 10 + 10, size) <= stop for n in inner)
                    assert all(start <= begin < end <= stop for begin, end in ends)
                    spans = [*ends, *((n * 10, min(n * 10 + 10, size)) for n in inner)]
                    covered += [byte for begin, end in spans for byte in range(begin, end)]
            assert sorted(covered) == list(range(size)), (a, b)


def test_a_finish_that_was_killed_after_the_upload_was_completed_goes_on(
    s3: str, tmp_path: Path, large: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Path(str(sm.merge(large, tmp_path / "whole.safetensors").out)).read_bytes()
    sm.plan(large, f"{s3}/out.safetensors", save=tmp_path / "plan")
    sm.worker(tmp_path / "plan", claim=True)
    for when in (True, False):  # before the upload is completed, and after it

        def die(self: Any, parts: Any, replaces: bool, when: bool = when) -> None:
            if not when:
                complete(self, parts, replaces)
            raise KeyboardInterrupt

        complete = S3Upload.complete
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(S3Upload, "complete", die)
            sm.finish(tmp_path / "plan")
    sm.finish(tmp_path / "plan")
    assert content(f"{s3}/out.safetensors") == expected
    assert list(objects(s3)) == ["out.safetensors"]


def test_what_is_lost_of_a_large_file_is_told(s3: str, tmp_path: Path, large: list[Path]) -> None:
    sm.plan(large, f"{s3}/out.safetensors", save=tmp_path / "plan")
    sm.worker(tmp_path / "plan", claim=True)
    home = joint_of(read_saved(parse(tmp_path / "plan"))).home
    edge = next(item.location for item in home.store.items(home / "edges"))  # type: ignore[attr-defined]
    data = bytearray(edge.store.get(edge)[0])  # type: ignore[attr-defined]
    data[-1] ^= 1
    edge.replace_small(bytes(data))
    with pytest.raises(sm.StoreError, match="clean what is left, and make it again"):
        sm.finish(tmp_path / "plan")
    assert not parse(f"{s3}/out.safetensors").is_file()


def test_what_dead_machines_have_sent_is_aborted(s3: str, tmp_path: Path, models: list[Path]) -> None:
    sm.plan(models, f"{s3}/out/", save=tmp_path / "plan", max_shard_size="1MB")
    place = joint_of(read_saved(parse(tmp_path / "plan")))
    orphan = place.open("model-00001-of-00005.safetensors", 1000)
    orphan.write_full(b"x" * 1000, 0)
    orphan.sync()
    sm.worker(tmp_path / "plan", claim=True)
    before = len(uploads(s3))
    with pytest.raises(sm.RecipeError, match=r"also holds theirs\.json"):
        parse(f"{s3}/out/theirs.json").replace_small(b"{}")
        sm.finish(tmp_path / "plan")
    assert len(uploads(s3)) == before, "a finish that fails keeps what was sent"
    parse(f"{s3}").store.delete([parse(f"{s3}/out/theirs.json")])  # type: ignore[attr-defined]
    sm.finish(tmp_path / "plan")
    assert not uploads(s3)


class HeldByAll(ObjectStore):
    """The client's own store in memory, whose client names no uploads, as those of gs:// and az:// do not."""

    scheme = "heldbyall"

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        return module.MemoryStore()


@pytest.fixture
def unnamed() -> Iterator[str]:
    """A bucket of a store whose client names no uploads."""
    sm.register_store(HeldByAll)
    yield "heldbyall://bucket"
    STORES.unregister("heldbyall")


@pytest.mark.parametrize("shares", [1, 3])
def test_a_folder_in_a_store_without_names_of_uploads(
    unnamed: str, tmp_path: Path, models: list[Path], shares: int
) -> None:
    sm.merge(models, f"{tmp_path}/whole/", max_shard_size="1MB")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    sm.plan(models, f"{unnamed}/out/", save=tmp_path / "plan", max_shard_size="1MB")
    for number in range(shares):
        assert not objects(f"{unnamed}/out"), "nothing is visible"
        result = sm.worker(tmp_path / "plan", share=f"{number}/{shares}")
    assert result.left == 0
    sm.finish(tmp_path / "plan")
    assert objects(f"{unnamed}/out") == expected
    assert {name.partition("/")[0] for name in objects(unnamed)} == {"out"}, "nothing is left beside it"


def test_a_file_that_needs_its_header_last_is_refused_there(unnamed: str, tmp_path: Path, models: list[Path]) -> None:
    sm.plan(models, f"{unnamed}/out.safetensors", save=tmp_path / "plan")
    with pytest.raises(sm.RecipeError, match="write a folder of safetensors"):
        sm.worker(tmp_path / "plan", claim=True)


def test_a_plan_for_the_hub_is_refused_when_it_is_saved() -> None:
    with pytest.raises(sm.RecipeError, match=r"cannot write to the store hf:// together; .* or to s3://"):
        parse("hf://org/name").join("key")
    with pytest.raises(sm.RecipeError, match="a web server can be read only"):
        parse("https://host/out/").join("key")


def test_a_folder_whose_shards_were_completed_by_a_killed_finish(
    s3: str, tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sm.merge(models, f"{tmp_path}/whole/", max_shard_size="1MB")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    sm.plan(models, f"{s3}/out/", save=tmp_path / "plan", max_shard_size="1MB")
    sm.worker(tmp_path / "plan", claim=True)
    complete, calls = S3Upload.complete, list[int]()

    def die(self: Any, parts: Any, replaces: bool) -> None:
        complete(self, parts, replaces)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(S3Upload, "complete", die)
        sm.finish(tmp_path / "plan")
    sm.finish(tmp_path / "plan")
    assert objects(f"{s3}/out") == expected
    assert not uploads(s3)
