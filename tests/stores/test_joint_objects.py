"""Uploads to S3 that several machines send: invisible until they are completed, and aborted if nobody names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.saved import read_saved
from streammerge.requests.machines import joint_of
from streammerge.stores.claims import Claims
from streammerge.stores.locations import parse


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
