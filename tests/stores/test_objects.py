"""Object stores over a real server on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trained
from safetensors.torch import save, save_file

import streammerge as sm
from stores.suite import ODD_NAMES, StoreSuite, content, noise
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.stores.objects import ObjectStore
from streammerge.stores.parts import PART_BYTES
from streammerge.stores.registry import STORES
from streammerge.stores.staged import Taken

LINE_NAMES = tuple(name for name in ODD_NAMES if "\n" not in name)
"""Names that the client does not refuse: those without line breaks."""


def put(location: Location, data: bytes) -> Location:
    import obstore

    client, name = location.store.split(location)  # type: ignore[attr-defined]
    obstore.put(client, name, data, use_multipart=False)
    return location


def upload(path: Path, location: Location) -> Location:
    """Copies a file or folder."""
    if path.is_dir():
        for each in path.iterdir():
            upload(each, location / each.name)
        return location
    return put(location, path.read_bytes())


def make_by_two_machines(home: Location, plan: Path) -> None:
    """Makes a folder of three files by two shares of a saved plan, and verifies it."""
    for seed in (1, 2):
        made = {name: tensor for name, tensor in trained(seed).items() if tensor.is_floating_point()}
        put(home / f"{seed}.safetensors", save(made))
    size = max(tensor.nbytes for tensor in made.values())
    sm.plan([home / "1.safetensors", home / "2.safetensors"], f"{home}/out/", max_shard_size=f"{size}B", save=plan)
    with pytest.raises(sm.UnfinishedError):
        sm.finish(plan)
    shares = [sm.worker(plan, share=f"{number}/2").made for number in (1, 2)]
    assert min(shares) >= 1
    assert not (home / "out").exists()
    sm.finish(plan)
    assert sum(shares) == len([each for each in (home / "out").children() if each.name.startswith("model-")])
    assert sm.verify(home / "out", sample="100%", inputs=home).recomputed
    assert [each.name for each in home.children()] == ["1.safetensors", "2.safetensors", "out"]


class Held(ObjectStore):
    """The client's own store in memory, whose uploads are made in order, as those of gs:// and az:// are."""

    scheme = "held"
    one_process = True

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        return module.MemoryStore()


class TestInOrder(StoreSuite):
    READS_BACK = False
    NAMES = LINE_NAMES

    @pytest.fixture
    def home(self, tmp_path: Path) -> Iterator[Location]:  # type: ignore[override]
        pytest.importorskip("obstore")
        sm.register_store(Held)
        yield parse(f"held://{tmp_path.name}/home")
        STORES.unregister("held")

    def put(self, location: Location, data: bytes) -> Location:
        return put(location, data)

    def put_folder(self, location: Location) -> None:
        """Folders are there while something is in them."""

    def remove(self, location: Location) -> None:
        import obstore

        obstore.delete(*location.store.split(location))  # type: ignore[attr-defined]

    def left(self, home: Location) -> list[str]:
        return [each.name for each in home.children()] if home.is_folder() else []

    def test_a_folder_lists_what_is_in_it(self, home: Location) -> None:
        for name in self.NAMES:
            self.put(home / name, name.encode())
        self.put(home / "folder" / "deep", b"")
        assert home.children() == sorted(home / name for name in (*self.NAMES, "folder"))
        assert [each.name for each in (home / "folder").children()] == ["deep"]

    def test_a_folder_is_no_file(self, home: Location) -> None:
        self.put(home / "a" / "b" / "c", b"1")
        super().test_a_folder_is_no_file(home)

    def test_an_object_is_replaced_if_it_is_the_one_that_is_known(self, home: Location) -> None:
        """As locks are renewed and taken over."""
        store = home.store
        assert isinstance(store, ObjectStore)
        first = store.put(home / "x", b"1", "")
        with pytest.raises(Taken):
            store.put(home / "x", b"2", "")
        second = store.put(home / "x", b"2", first)
        assert store.get(home / "x")[1].tag == second != first
        with pytest.raises(Taken):
            store.put(home / "x", b"3", first)
        store.put(home / "x", b"4", store.get(home / "x")[1].tag)
        assert store.get(home / "x")[0] == b"4"

    def test_a_location_pickles(self, home: Location) -> None:
        """Another instance would be another store in memory."""

    @pytest.mark.parametrize("out", ["out.safetensors"])
    @pytest.mark.parametrize("io", ["pread"])
    def test_checkpoints_are_merged_verified_and_converted(self, home: Location, out: str, io: str) -> None:
        inputs = self.inputs(home)
        with pytest.raises(sm.RecipeError, match="write a folder of safetensors"):
            sm.merge(inputs, home / out)
        assert self.left(home) == ["in"]
        sm.merge(inputs, home / "out.pth")
        assert sm.verify(home / "out.pth", sample="100%", inputs=home / "in").recomputed
        sm.merge(inputs, f"{home}/out/", max_shard_size="100B")
        assert sm.verify(home / "out", sample="100%", inputs=home / "in").recomputed
        assert self.left(home) == ["in", "out", "out.pth"]

    def test_an_input_that_changes_stops_the_merge(self, home: Location, tmp_path: Path) -> None:
        inputs = self.inputs(home)
        plan = sm.plan(inputs)
        self.put(inputs[1], b"other")
        with pytest.raises(sm.ChangedError):
            inputs[1].open(plan.identities[inputs[1]])

    def test_a_recipe_names_models_beside_it(self, home: Location) -> None:
        """As in the suite, into a folder."""

    def test_a_file_in_a_subfolder_is_opened_again_and_kept(self, home: Location) -> None:
        """Nothing is kept of an upload in order."""

    def test_an_output_is_read_back_before_it_is_published(self, home: Location) -> None:
        """What was sent cannot be read."""

    def test_kept_work_is_continued(self, home: Location) -> None:
        staging = (home / "out").stage()
        staging.create("x", 3).write_full(b"abc", 0)
        staging.journal_file.begin(b"plan\n")
        assert not staging.resumable
        staging.abort(keep=True)
        assert self.left(home) == []

    def interrupted(self, out: Location) -> Any:
        staging = out.stage()
        staging.clear()
        staging.create("out", 6).write_full(b"abc", 0)
        staging.journal_file.begin(b"plan\n")
        return staging

    def test_kept_work_can_be_cleared(self, home: Location) -> None:
        """Nothing is kept."""

    def test_readers_see_the_old_or_the_new(self, home: Location) -> None:
        """A reader is pinned to its version: see TestS3."""

    def test_parts_that_come_early_wait(self, home: Location) -> None:
        each, data = PART_BYTES, noise(5 * PART_BYTES + 7)
        staging = (home / "out").stage()
        staging.as_folder = False
        file = staging.create("out", len(data))
        for number in (3, 1, 5, 4, 0, 2):
            file.write_full(data[number * each : (number + 1) * each], number * each)
            file.sync()
        staging.commit(as_folder=False)
        assert content(home / "out") == {"": data}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def written(folder: Path, number: int) -> dict[str, Path]:
    """Returns a model in each container: long tensors, short ones, and a folder of shards with an index."""
    tensors: dict[str, Any] = {**trained(number), "long": torch.randn(3_000_001).to(torch.bfloat16)}
    made = {kind: folder / f"{number}.{kind}" for kind in ("safetensors", "pth", "old.pth")}
    save_file(tensors, made["safetensors"])
    torch.save({"model": tensors, "step": 3}, made["pth"])
    torch.save(tensors, made["old.pth"], _use_new_zipfile_serialization=False)
    made["folder"] = folder / f"folder-{number}"
    sm.convert(made["safetensors"], f"{made['folder']}/", max_shard_size="1MB")
    return made


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old.pth", "folder"])
@pytest.mark.sampled(2)
def test_remote_inputs_give_the_bytes_of_local_ones(kind: str, s3: str, tmp_path: Path) -> None:
    paths = [written(tmp_path, number)[kind] for number in (1, 2)]
    remote = [upload(path, parse(f"{s3}/in/{path.name}")) for path in paths]
    ending = ".pth" if kind.endswith("pth") else ".safetensors"
    for name, options in (("linear", {}), ("ties", {"base": 0})):
        made = []
        for number, inputs in enumerate((paths, remote)):
            given = {key: inputs[value] for key, value in options.items()}
            made.append(tmp_path / f"{name}-{number}{ending}")
            sm.merge(inputs, made[-1], method=name, **given)
        assert sha256(made[0]) == sha256(made[1])
    assert sm.diff(remote[0], paths[0]).equal
    assert sm.verify(made[1], inputs=f"{s3}/in", sample="100%").recomputed


def test_a_mistake_costs_few_requests_and_bytes(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    paths = [written(tmp_path, number)["folder"] for number in (1, 2)]
    remote = [upload(path, parse(f"{s3}/in/{path.name}")) for path in paths]
    taken: list[int] = []
    get = obstore.get

    def counted(*args: Any, **options: Any) -> Any:
        answer = get(*args, **options)
        taken.append(answer.range[1] - answer.range[0])
        return answer

    monkeypatch.setattr(obstore, "get", counted)
    with pytest.raises(sm.RecipeError, match="lambda"):
        sm.plan(remote, method="task_arithmetic", base=remote[0], parameters={"lambada": 1})
    sm.plan(remote)
    assert sum(taken) < 1_000_000
    assert len(taken) < 60


def test_an_input_that_changes_during_a_run_is_told(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [put(parse(f"{s3}/{number}.safetensors"), save(trained(number))) for number in (1, 2)]
    plan = sm.plan(inputs)
    put(inputs[1], save(trained(3)))
    with pytest.raises(sm.ChangedError, match="changed since it was planned"):
        inputs[1].open(plan.identities[inputs[1]])
    import obstore

    get = obstore.get

    def changing(client: Any, path: str, **options: Any) -> Any:
        if path.startswith("2") and options["options"]["range"][1] > 20_000:
            monkeypatch.setattr(obstore, "get", get)
            put(inputs[1], save(trained(4)))
        return get(client, path, **options)

    monkeypatch.setattr(obstore, "get", changing)
    with pytest.raises(sm.ChangedError, match=r"2\.safetensors changed"):
        sm.merge(inputs, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_told_in_one_sentence(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, error, said in (
        ("s3://", sm.RecipeError, "names no file or folder"),
        ("s3://bucket/../x", sm.RecipeError, "names no file or folder"),
        (f"{s3}/absent.pth", sm.RecipeError, "does not exist"),
        ("s3://there-is-no-such-bucket/x", sm.StoreError, "cannot be used"),
    ):
        with pytest.raises(error, match=said) as caught:
            sm.inspect(text)
        assert "\n" not in str(caught.value)


def test_without_the_extra_the_command_to_install_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "obstore.py").write_text("raise ImportError('absent')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "streammerge", "inspect", "s3://bucket/x"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "pip install 'streammerge[remote]'" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
