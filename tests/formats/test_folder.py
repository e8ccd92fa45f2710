"""Checkpoints that are folders: shards and their index, side files, and refused folders."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets, trained
from safetensors.torch import load_file, save_file

import streammerge as sm
from formats.suite import FormatSuite, Tensors


def shards(folder: Path, state: dict[str, torch.Tensor], pickled: bool = False) -> Path:
    """Makes a Hugging Face folder of two shards, with side files and with files that must not be copied."""
    folder.mkdir()
    names = list(state)
    ending = "bin" if pickled else "safetensors"
    stem = "pytorch_model" if pickled else "model"
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{number:05}-of-00002.{ending}"
        tensors = {name: state[name] for name in part}
        torch.save(tensors, folder / shard) if pickled else save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "training_args.bin").write_bytes(b"arguments")
    return folder


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Reads a folder as transformers does: the single file, else the index."""
    index = next(folder.glob("*.index.json"), None)
    if index is None:
        return load(next(path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).exists()))
    weight_map = json.loads(index.read_text())["weight_map"]
    loaded = {shard: load(folder / shard) for shard in set(weight_map.values())}
    assert sum(map(len, loaded.values())) == len(weight_map)
    return {name: loaded[shard][name] for name, shard in weight_map.items()}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_folders_merge_into_folders(tmp_path: Path, pickled: bool) -> None:
    a, b = shards(tmp_path / "a", trained(1), pickled), shards(tmp_path / "b", trained(2), pickled)
    sm.merge([a, b], tmp_path / "merged", integers="first")
    expected = {n: mean([t, trained(2)[n]], [1, 1]) if t.is_floating_point() else t for n, t in trained(1).items()}
    assert_same(read_folder(tmp_path / "merged"), expected)
    made = {path.name for path in (tmp_path / "merged").iterdir()}
    kept = {path.name for path in a.iterdir()} - {"optimizer.pt", "training_args.bin"}
    assert made == kept | {"streammerge.json", "streammerge.yaml", "README.md"}
    index = json.loads(next((tmp_path / "merged").glob("*.index.json")).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())


def test_shard_size_decides(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", trained(1))
    sm.convert(folder, tmp_path / "small/", max_shard_size="100kB")
    assert_same(read_folder(tmp_path / "small"), trained(1))
    sizes = [sum(len(octets(t)) for t in load_safetensors(p).values()) for p in (tmp_path / "small").glob("model-*")]
    assert len(sizes) == 3
    assert sorted(sizes)[:-1] < [100_000, 100_000]  # the embedding alone is larger
    sm.convert(folder, tmp_path / "one/", max_shard_size="5GB")
    assert [p.name for p in (tmp_path / "one").glob("*model*")] == ["model.safetensors"]


def test_a_folder_merges_into_a_file_and_a_file_into_a_folder(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", trained(1), pickled=True)
    sm.convert(folder, tmp_path / "flat.safetensors")
    assert_same(load_safetensors(tmp_path / "flat.safetensors"), trained(1))
    sm.convert(folder, tmp_path / "flat.bin")
    assert_same(torch.load(tmp_path / "flat.bin", weights_only=True), trained(1))
    sm.convert(tmp_path / "flat.bin", tmp_path / "again")
    assert_same(read_folder(tmp_path / "again"), trained(1))


def test_replacing_a_folder_leaves_no_stale_shard(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", trained(1))
    sm.convert(folder, tmp_path / "out", max_shard_size="20kB")
    with pytest.raises(sm.RecipeError, match="`overwrite=True`"):
        sm.convert(folder, tmp_path / "out")
    sm.convert(folder, tmp_path / "out", max_shard_size="1GB", overwrite=True)
    assert not list((tmp_path / "out").glob("*-of-*"))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    for name in ("my notes.txt", "my_lora.safetensors", "training_args.bin"):
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(sm.RecipeError, match=name):
            sm.convert(folder, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / name).read_text() == "mine"
        (tmp_path / "out" / name).unlink()


def test_a_run_killed_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", trained(1))
    sm.convert(folder, tmp_path / "out")
    (tmp_path / ".out.streammerge").mkdir()
    os.rename(tmp_path / "out", tmp_path / ".out.streammerge" / "replaced")
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.convert(folder, tmp_path / "out")
    assert_same(read_folder(tmp_path / "out"), trained(1))


def test_an_output_that_is_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    sm.convert(shards(tmp_path / "a", trained(1)), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert_same(read_folder(tmp_path / "disk"), trained(1))


def test_the_form_that_transformers_takes_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "absent.bin"}}')
    (folder / "global_step5").mkdir()
    (folder / "global_step5" / "mp_rank_00_model_states.pt").touch()
    save_file(trained(1), folder / "model.safetensors")
    assert sm.inspect(folder).format == "safetensors"


def test_one_checkpoint_among_side_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save(trained(1), folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    assert len(sm.inspect(folder).entries) == len(trained(1))
    save_file(trained(2), folder / "model.safetensors")
    index = sm.inspect(folder)
    assert index.format == "safetensors"
    assert any("pytorch_model.bin" in note for note in index.notes)
    os.rename(folder / "model.safetensors", folder / "x.safetensors")
    os.rename(folder / "pytorch_model.bin", folder / "y.bin")
    with pytest.raises(sm.FormatError, match=r"several checkpoints \(x\.safetensors, y\.bin\)"):
        sm.inspect(folder)


def moved(folder: Path, name: str, target: Path, via: Path | None = None) -> None:
    """Moves a file, and puts a link in its place: to the file, or to another link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / name, target)
    if via is not None:
        via.parent.mkdir(parents=True, exist_ok=True)
        via.symlink_to(os.path.relpath(target, via.parent))
    (folder / name).symlink_to(os.path.relpath(via or target, folder))


def as_shared_blobs(folder: Path, home: Path) -> Path:
    """The hub's cache since huggingface_hub 2: blobs are links into a store that all repositories share."""
    repository = home / "hub" / "models--me--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        via, store = repository / "blobs" / f"{number:064x}", home / "hub" / "blobs" / "00" / f"{number:064x}"
        moved(snapshot, path.name, store, via)
    return snapshot


def as_blobs(folder: Path, home: Path) -> Path:
    """The hub's cache before huggingface_hub 2."""
    snapshot = home / "hub" / "models--me--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        moved(snapshot, path.name, snapshot.parent.parent / "blobs" / f"{number:064x}")
    return snapshot


def as_subfolder(folder: Path, home: Path) -> Path:
    """A part of a pipeline in the hub's cache: its blobs are two folders above it."""
    snapshot = home / "hub" / "models--me--pipe" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    folder.rename(snapshot / "text_encoder")
    for number, path in enumerate(sorted((snapshot / "text_encoder").iterdir())):
        moved(snapshot / "text_encoder", path.name, snapshot.parent.parent / "blobs" / f"{number:064x}")
    return snapshot / "text_encoder"


def as_local_folder(folder: Path, home: Path) -> Path:
    """`--local-dir` of older hubs: links from another folder into the cache."""
    for number, path in enumerate(sorted(folder.iterdir())):
        moved(folder, path.name, home / "elsewhere" / "models--me--model" / "blobs" / f"{number:064x}")
    return folder


def as_another_disk(folder: Path, home: Path) -> Path:
    """Shards on another disk that has room, linked by absolute paths."""
    disk = home / "disk"
    disk.mkdir()
    for path in sorted(folder.glob("*.safetensors")):
        shutil.move(path, disk / path.name)
        path.symlink_to(disk / path.name)
    return folder


def as_linked_folder(folder: Path, home: Path) -> Path:
    (home / "name").symlink_to(folder)
    return home / "name"


LINKED = (as_shared_blobs, as_blobs, as_subfolder, as_local_folder, as_another_disk, as_linked_folder)


@pytest.mark.parametrize("linked", LINKED)
@pytest.mark.parametrize("tensors", ["one file", "shards"])
def test_links_in_a_folder_are_followed(tmp_path: Path, linked: Callable[[Path, Path], Path], tensors: str) -> None:
    folder = shards(tmp_path / "plain", trained(1))
    if tensors == "one file":
        for path in folder.glob("model*"):
            path.unlink()
        save_file(trained(1), folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_hidden_layers": 3, "torch_dtype": "float32"}')
    expected = tmp_path / "expected"
    sm.convert(folder, expected, dtype="bfloat16")  # edits the configuration and copies the tokenizer
    given = linked(folder, tmp_path)
    result = sm.convert(given, tmp_path / "out", dtype="bfloat16")
    assert not [note for note in result.notes if "left out" in note and "tokenizer" in note]
    apart = {"streammerge.json", "streammerge.yaml", "model.safetensors"}  # these hold the names of the inputs
    names = {path.name for path in expected.iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()} > {"config.json", "tokenizer.json"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    for name in names - apart - {path.name for path in expected.glob("model-*")}:
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes(), name
    assert_same(read_folder(tmp_path / "out"), read_folder(expected))
    sm.verify(tmp_path / "out", sample="100%", inputs=given.parent)


PARTS = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json")


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("chain", [False, True])
def test_a_link_to_nothing_is_named_with_what_it_points_to(tmp_path: Path, name: str, chain: bool) -> None:
    folder = shards(tmp_path / "a", trained(1))
    moved(folder, name, tmp_path / "gone", tmp_path / "via" if chain else None)
    (tmp_path / "gone").unlink()
    with pytest.raises(sm.FormatError) as caught:
        sm.convert(folder, tmp_path / "out")
    assert f"{folder / name} is a link to {tmp_path / 'gone'}, which is absent" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PARTS)
def test_a_link_that_leads_in_a_circle_is_named(tmp_path: Path, name: str) -> None:
    folder = shards(tmp_path / "a", trained(1))
    (folder / name).unlink()
    (folder / name).symlink_to("other")
    (folder / "other").symlink_to(name)
    with pytest.raises(sm.FormatError, match=r"is a link to .*, which leads in a circle"):
        sm.convert(folder, tmp_path / "out")


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, name: str, kind: str, linked: bool) -> None:
    folder = shards(tmp_path / "a", trained(1))
    (folder / name).unlink()
    place = tmp_path / "special" if linked or kind == "device" else folder / name
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:  # bound by a short path: the system allows 108 bytes
            fd = os.open(place.parent, os.O_PATH)
            bound.bind(f"/proc/self/fd/{fd}/{place.name}")
            os.close(fd)
    else:
        place = Path("/dev/zero")
    if place != folder / name:
        (folder / name).symlink_to(place)
    if name == "tokenizer.json":  # a special side file is not read and not copied
        result = sm.convert(folder, tmp_path / "out")
        assert not os.path.lexists(tmp_path / "out" / name)
        said = [note for note in result.notes if "left out of the output" in note and name in note]
        assert bool(said) == (kind != "folder" or linked)
        return
    with pytest.raises(sm.FormatError, match=rf"is not a regular file but a {kind}") as caught:
        sm.convert(folder, tmp_path / "out")
    assert str(folder / name) in str(caught.value)
    assert (f"is a link to {place}" in str(caught.value)) == (place != folder / name)


def test_a_file_of_the_kernel_is_not_read_beyond_its_size(tmp_path: Path) -> None:
    """Some files of the kernel, like /proc/kmsg, have size 0 and never end."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(sm.FormatError, match="is empty"):
        sm.inspect(tmp_path / "a")


def test_a_named_link_to_nothing_says_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("gone.safetensors")
    said = rf"a\.safetensors is a link to {tmp_path}/gone\.safetensors, which is absent"
    with pytest.raises(sm.RecipeError, match=said):
        sm.inspect(tmp_path / "a.safetensors")
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "a.safetensors")}]}
    with pytest.raises(sm.RecipeError, match=said):
        sm.plan(recipe=recipe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i["weight_map"].update({"scale": "../a/model-00001-of-00002.safetensors"}), "not the name of a file"),
        (lambda i: i["weight_map"].update({"scale": "/etc/passwd"}), "not the name of a file"),
        (lambda i: i["weight_map"].update({"scale": "absent.safetensors"}), "absent"),
        (
            lambda i: i["weight_map"].update({f"{n}": "model-00001-of-00002.safetensors" for n in range(99)}),
            "do not have: 0",
        ),
        (lambda i: i.update({"weight_map": []}), "no weight_map"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: object, said: str) -> None:
    folder = shards(tmp_path / "a", trained(1))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)  # type: ignore[operator]
    path.write_text(json.dumps(index))
    with pytest.raises(sm.FormatError, match=said):
        sm.inspect(folder)


class TestShardedSafetensors(FormatSuite):
    NAME = "folder"

    def write(self, path: Path, tensors: Tensors) -> None:
        path.mkdir()
        names = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(tensors)}
        for shard in set(names.values()):
            save_file({name: tensor for name, tensor in tensors.items() if names[name] == shard}, path / shard)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


class TestShardedTorch(FormatSuite):
    NAME = "folder"

    def write(self, path: Path, tensors: Tensors) -> None:
        path.mkdir()
        names = {name: f"pytorch_model-{number % 2 + 1:05}-of-00002.bin" for number, name in enumerate(tensors)}
        for shard in set(names.values()):
            torch.save({name: tensor for name, tensor in tensors.items() if names[name] == shard}, path / shard)
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def test_a_shard_without_tensors_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"step": 3}, folder / "pytorch_model-00002-of-00002.bin")
    names = {"w": "pytorch_model-00001-of-00002.bin", "v": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(sm.FormatError, match=r"pytorch_model-00002-of-00002\.bin: it holds no tensors"):
        sm.inspect(folder)


def indexed(folder: Path, weight_map: dict[str, str], files: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def one(value: float) -> torch.Tensor:
    return torch.full((3,), value)


def test_the_index_decides_between_duplicates(tmp_path: Path) -> None:
    files = {"x.safetensors": {"a": one(1), "b": one(2)}, "y.safetensors": {"a": one(3), "c": one(4)}}
    for letter, value in (("x", 1.0), ("y", 3.0)):
        weight_map = {"a": f"{letter}.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
        folder = indexed(tmp_path / letter, weight_map, files)
        index = sm.inspect(folder)
        sm.convert(folder, tmp_path / f"out-{letter}")
        assert read_folder(tmp_path / f"out-{letter}")["a"].tolist() == [value] * 3
        assert sum("a is in several shards" in note for note in index.notes) == 1


def test_loaders_read_all_tensors_of_the_shards_wherever_the_index_puts_them(tmp_path: Path) -> None:
    files = {"x.safetensors": {"a": one(1), "extra": one(5)}, "y.safetensors": {"b": one(2)}}
    folder = indexed(tmp_path / "in", {"a": "y.safetensors", "b": "y.safetensors", "c": "x.safetensors"}, files)
    index = sm.inspect(folder)
    assert sorted(index) == ["a", "b", "extra"]
    assert any("does not name 1 tensor of its shards, which loaders read too: extra" in note for note in index.notes)
    assert any("puts a into another shard" in note for note in index.notes)
    assert len(index.warnings) == 1
    assert "names tensors that no shard has: c" in index.warnings[0]
    assert sm.merge([folder, folder], tmp_path / "out/").warnings[0] == index.warnings[0]


def test_shards_in_subfolders_are_read_and_written_there(tmp_path: Path) -> None:
    files = {"parts/x.safetensors": {"a": one(1)}, "y.safetensors": {"b": one(2)}}
    folder = indexed(tmp_path / "in", {"a": "parts/x.safetensors", "b": "y.safetensors"}, files)
    sm.merge([folder, folder], tmp_path / "out/")
    assert_same(read_folder(tmp_path / "out"), {"a": one(1), "b": one(2)})
    assert (tmp_path / "out" / "parts" / "x.safetensors").exists()
    sm.verify(tmp_path / "out", sample="100%")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//x", "~/x", "a\\..\\x", "C:x", "", ".", 3])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: object) -> None:
    folder = indexed(tmp_path / "in", {"a": name}, {})  # type: ignore[dict-item]
    with pytest.raises(sm.FormatError, match=r"is not the name of a file|names of files that are not text"):
        sm.inspect(folder)


def test_a_stale_index_is_passed_over_and_a_download_that_is_not_complete_is_told(tmp_path: Path) -> None:
    shard = "model-00003-of-00003.safetensors"
    folder = indexed(tmp_path / "in", {"a": "model-00001-of-00003.safetensors", "b": shard}, {shard: {"b": one(1)}})
    with pytest.raises(
        sm.FormatError, match=r"model-00001-of-00003\.safetensors, named by model.* is absent; the download"
    ):
        sm.inspect(folder)
    torch.save({"a": one(2)}, folder / "pytorch_model.bin")
    index = sm.inspect(folder)
    assert list(index) == ["a"]
    assert any("pytorch_model.bin was taken and model.safetensors.index.json was not" in note for note in index.notes)
    save_file({"a": one(3)}, folder / "model.safetensors")
    assert sm.inspect(folder).format == "safetensors"


def test_diffusers_looks_for_the_index_first(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model"
    for name, value in ((f"{stem}.safetensors", 1), (f"{stem}-00001-of-00001.safetensors", 2)):
        save_file({"a": one(value)}, tmp_path / name)
    weight_map = {"a": f"{stem}-00001-of-00001.safetensors"}
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sm.inspect(tmp_path).format == "sharded safetensors"


@pytest.mark.parametrize("first", [0, 1])
def test_shards_without_an_index_are_one_checkpoint_if_all_are_there(tmp_path: Path, first: int) -> None:
    for number in range(first, first + 3):
        save_file({f"w{number}": one(number)}, tmp_path / f"model-{number:05}-of-00003.safetensors")
    index = sm.inspect(tmp_path)
    assert sorted(index) == [f"w{number}" for number in range(first, first + 3)]
    assert any("has no index" in note for note in index.notes)
    gone = f"model-{first + 1:05}-of-00003.safetensors"
    (tmp_path / gone).unlink()
    with pytest.raises(sm.FormatError, match=rf"{gone} is absent; the download is not complete"):
        sm.inspect(tmp_path)


def test_slices_of_tensors_and_folders_of_checkpoints_are_told(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "llama").mkdir(exist_ok=True)
        torch.save({"w": one(number)}, tmp_path / "llama" / f"consolidated.0{number}.pth")
    with pytest.raises(sm.FormatError, match="each hold a slice of every tensor"):
        sm.inspect(tmp_path / "llama")
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        save_file({"w": one(1)}, tmp_path / "run" / name / "model.safetensors")
    with pytest.raises(sm.FormatError, match=r"holds no checkpoint; its subfolders checkpoint-1, checkpoint-2 do"):
        sm.inspect(tmp_path / "run")


def test_an_adapter_beside_a_model_is_said(tmp_path: Path) -> None:
    save_file({"w": one(1)}, tmp_path / "model.safetensors")
    save_file({"lora_A": one(1)}, tmp_path / "adapter_model.safetensors")
    assert any("also holds adapter_model.safetensors" in note for note in sm.inspect(tmp_path).notes)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"unet": ["a", "b"], "../x": ["a", "b"], "vae": 3}', '{"/etc": ["a", "b"]}']
)
def test_a_pipeline_that_lies_names_no_folder_elsewhere(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "in"
    for place in (folder, folder / "vae", tmp_path / "x"):
        place.mkdir(exist_ok=True)
        save_file({"w": one(1)}, place / "model.safetensors")
    (folder / "model_index.json").write_text(content)
    assert list(sm.inspect(folder)) == ["w"]


def test_the_file_that_the_configuration_names_is_taken(tmp_path: Path) -> None:
    for name in ("model.safetensors", "mine.safetensors"):
        save_file({name: one(1)}, tmp_path / name)
    assert list(sm.inspect(tmp_path)) == ["model.safetensors"]
    (tmp_path / "config.json").write_text('{"transformers_weights": "mine.safetensors"}')
    assert list(sm.inspect(tmp_path)) == ["mine.safetensors"]


def test_two_sets_of_shards_are_told_apart_by_nothing(tmp_path: Path) -> None:
    for count in (2, 3):
        for number in range(1, count + 1):
            save_file({f"w{number}": one(1)}, tmp_path / f"model-{number:05}-of-{count:05}.safetensors")
    with pytest.raises(sm.FormatError, match=r"several checkpoints \(model-00001-of-00002.*, model-00001-of-00003"):
        sm.inspect(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert sorted(sm.inspect(tmp_path)) == ["w1", "w2"]


def test_an_index_may_begin_its_names_with_the_folder_itself(tmp_path: Path) -> None:
    folder = indexed(tmp_path / "in", {"a": "./x.safetensors"}, {"x.safetensors": {"a": one(1)}})
    assert list(sm.inspect(folder)) == ["a"]


def test_the_nearest_folders_with_weights_are_named(tmp_path: Path) -> None:
    """A repository in the hub's cache has its weights in snapshots/REVISION; Megatron's in iter_N/mp_rank_N."""
    inner = tmp_path / "models--org--name" / "snapshots" / "abc"
    inner.mkdir(parents=True)
    save_file({"w": one(1)}, inner / "model.safetensors")
    with pytest.raises(sm.FormatError, match=r"holds no checkpoint; its subfolder snapshots/abc does, so give that"):
        sm.inspect(tmp_path / "models--org--name")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(sm.FormatError, match=r"holds no checkpoint; its subfolder models--org--name/snapshots/abc does"):
        sm.inspect(tmp_path)


def test_parts_without_an_index_are_not_offered_one_by_one(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({f"w{number}": one(number)}, tmp_path / f"hf_model_000{number}_0.pt")
    with pytest.raises(sm.FormatError, match=r"hf_model_0001_0\.pt, hf_model_0002_0\.pt without an index.*parts of one"):
        sm.inspect(tmp_path)
    index = {"weight_map": {f"w{number}": f"hf_model_000{number}_0.pt" for number in (1, 2)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert sorted(sm.inspect(tmp_path)) == ["w1", "w2"]


def test_a_file_with_other_names_does_not_stand_in_for_an_absent_shard(tmp_path: Path) -> None:
    """Mistral's folders hold consolidated.safetensors beside the shards of transformers."""
    folder = indexed(tmp_path / "in", {"a": "x.safetensors", "b": "y.safetensors"}, {"x.safetensors": {"a": one(1)}})
    save_file({"w": one(1)}, folder / "consolidated.safetensors")
    with pytest.raises(sm.FormatError, match=r"y\.safetensors, .* is absent; .*consolidated\.safetensors has other"):
        sm.inspect(folder)
    save_file({"a": one(1), "b": one(1)}, folder / "consolidated.safetensors")
    assert sorted(sm.inspect(folder)) == ["a", "b"]


def test_a_generator_and_a_discriminator_are_no_parts_of_one_checkpoint(tmp_path: Path) -> None:
    for name in ("G_100.pth", "D_100.pth"):
        torch.save({"model": {f"{name[0]}.w": torch.ones(2)}, "iteration": 100}, tmp_path / name)
    assert set(sm.inspect(tmp_path).parts) == {"D_100.pth", "G_100.pth"}
    torch.save({"model": {"G.w": torch.ones(2)}, "iteration": 200}, tmp_path / "G_200.pth")
    with pytest.raises(sm.FormatError, match=r"holds several checkpoints \(D_100\.pth, G_100\.pth, G_200\.pth\); give one"):
        sm.inspect(tmp_path)


def in_training(folder: Path, seed: int, beside: str = "optimizer.bin") -> Path:
    """Makes a folder as accelerate's ``save_state`` does in diffusers' training scripts."""
    for number, name in enumerate(("unet", "unet_ema")):
        (folder / name).mkdir(parents=True)
        save_file(trained(seed + number), folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    torch.save({"state": {}}, folder / beside)
    (folder / "logs").mkdir()
    return folder


def test_models_beside_the_state_of_a_training_are_merged_one_by_one(tmp_path: Path) -> None:
    paths = [in_training(tmp_path / "checkpoint-1", 1), in_training(tmp_path / "checkpoint-2", 5)]
    assert sm.inspect(paths[0]).format == "training folder of 2 models"
    result = sm.merge(paths, tmp_path / "out", integers="first")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["unet", "unet_ema"]
    for number, name in enumerate(("unet", "unet_ema")):
        made = load_safetensors(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors")
        one, two = trained(1 + number), trained(5 + number)
        wanted = {n: mean([one[n], two[n]], [1, 1]) if one[n].is_floating_point() else one[n] for n in one}
        assert {n: octets(t) for n, t in made.items()} == {n: octets(t) for n, t in wanted.items()}
    assert any("optimizer.bin" in note and "state of a training run" in note for note in result.notes)
    sm.merge([tmp_path / "out", paths[0]], tmp_path / "again", integers="first")
    with pytest.raises(sm.RecipeError, match="give one of the subfolders"):
        sm.merge(paths, tmp_path / "out.safetensors")


def test_subfolders_of_models_without_a_training_are_not_guessed_to_belong_together(tmp_path: Path) -> None:
    folder = in_training(tmp_path / "mine", 1, "notes.bin")
    (folder / "notes.bin").unlink()
    with pytest.raises(sm.FormatError, match="its subfolders unet, unet_ema do, so give one of them"):
        sm.inspect(folder)


def speechbrain(folder: Path, seed: int) -> Path:
    """Makes a checkpoint folder of SpeechBrain, in which some files of this ending are texts."""
    folder.mkdir()
    torch.save(trained(seed), folder / "model.ckpt")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.ckpt")
    torch.save({"count": seed, "glob_mean": torch.full((3,), float(seed))}, folder / "normalizer.ckpt")
    torch.save({"encoder.w": torch.full((2, 2), float(seed))}, folder / "wav2vec2.ckpt")
    (folder / "counter.ckpt").write_text(str(seed))
    (folder / "CKPT.yaml").write_text("WER: 1.0\n")
    return folder


def test_a_folder_of_speechbrain_keeps_its_files(tmp_path: Path) -> None:
    paths = [speechbrain(tmp_path / "CKPT+1", 1), speechbrain(tmp_path / "CKPT+2", 2)]
    result = sm.merge(paths, tmp_path / "out", integers="first")
    made = torch.load(tmp_path / "out" / "model.ckpt")
    one, two = trained(1), trained(2)
    wanted = {n: mean([one[n], two[n]], [1, 1]) if one[n].is_floating_point() else one[n] for n in one}
    assert {n: octets(t) for n, t in made.items()} == {n: octets(t) for n, t in wanted.items()}
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"streammerge.json", "streammerge.yaml"}
    assert files == {"model.ckpt", "wav2vec2.ckpt", "normalizer.ckpt", "counter.ckpt", "CKPT.yaml"}
    assert "copied from the first input, not merged: counter.ckpt" in result.notes


def test_every_part_of_a_training_of_speechbrain_is_merged(tmp_path: Path) -> None:
    """``model.ckpt`` may be the smallest of them: a head beside the encoder that was tuned."""
    paths = [speechbrain(tmp_path / "CKPT+1", 1), speechbrain(tmp_path / "CKPT+2", 4)]
    sm.merge(paths, tmp_path / "out", integers="first", weights=[2, 1])
    assert torch.equal(torch.load(tmp_path / "out" / "wav2vec2.ckpt")["encoder.w"], torch.full((2, 2), 2.0))
    normalizer = torch.load(tmp_path / "out" / "normalizer.ckpt")
    assert normalizer["glob_mean"].tolist() == [2.0, 2.0, 2.0]
    assert normalizer["count"] == 4  # a counter of a model in a folder is the largest, as in a file


def test_model_ckpt_is_taken_beside_another_form_of_it(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "model.ckpt")
    torch.save(trained(2), tmp_path / "last.ckpt")
    index = sm.inspect(tmp_path)
    assert any("model.ckpt was taken; the folder also holds last.ckpt" in note for note in index.notes)


def _program(folder: Path, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Writes what a program of several networks reads by the names of their files. Returns the tensors of each."""
    make = torch.Generator().manual_seed(seed)
    (folder / "gpt").mkdir(parents=True)
    networks = {"llm.pt": ("llm.w", "enc.w"), "flow.pt": ("flow.w",), "dvae.safetensors": ("d.w", "enc.w")}
    networks |= {"llm.rl.pt": networks["llm.pt"], "gpt/model.safetensors": ("layers.0.w",)}
    made = {
        file: {name: torch.randn(4, len(file[:4]), generator=make) for name in names} for file, names in networks.items()
    }
    for file, tensors in made.items():
        if file.endswith(".pt"):
            torch.save({"model": tensors, "step": seed}, folder / file)
        else:
            save_file(tensors, folder / file)
    torch.save({"labels": {"a": 1}}, folder / "labels.ckpt")
    (folder / "gpt" / "config.json").write_text("{}")
    (folder / "hyperparams.yaml").write_text(f"seed: {seed}\n")
    return made


def test_models_side_by_side_are_merged_by_the_names_of_their_files(tmp_path: Path) -> None:
    """Each with the one of its name. What holds no weights is copied, and the output is such a folder again."""
    both = [_program(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    result = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    assert any("holds several models side by side (dvae.safetensors, flow.pt, llm.pt" in note for note in result.notes)
    for file in both[0]:
        path = tmp_path / "out" / file
        tensors = torch.load(path)["model"] if file.endswith(".pt") else load_safetensors(path)
        expected = {name: mean([each[file][name].double() for each in both], [1, 1]).float() for name in both[0][file]}
        assert_same(tensors, expected)
    for file in ("labels.ckpt", "hyperparams.yaml"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    assert sm.verify(tmp_path / "out", sample="100%").equal_elems
    sm.convert(tmp_path / "out", tmp_path / "converted/")
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert {"llm.safetensors", "llm.rl.safetensors", "flow.safetensors", "dvae.safetensors", "gpt"} <= names
    with pytest.raises(sm.RecipeError, match="holds several models"):
        sm.inspect(tmp_path / "a", state_dict="model")


def test_copies_of_one_model_are_not_side_by_side(tmp_path: Path) -> None:
    for name in ("best.pt", "last.pt"):
        torch.save({"w": torch.ones(2), "v": torch.ones(3)}, tmp_path / name)
    with pytest.raises(sm.FormatError, match=r"holds several checkpoints \(best\.pt, last\.pt\); give one of them"):
        sm.inspect(tmp_path)


def test_steps_of_one_network_beside_another_are_not_side_by_side(tmp_path: Path) -> None:
    """Two runs that ended at other steps would have other names, so that nothing of them belongs together."""
    for name, tensors in (("G_100.pth", "g"), ("G_200.pth", "g"), ("D_100.pth", "d")):
        torch.save({f"{tensors}.w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(sm.FormatError, match=r"holds several checkpoints \(D_100\.pth, G_100\.pth, G_200\.pth\)"):
        sm.inspect(tmp_path)


def test_several_control_networks_of_a_pipeline_are_merged(tmp_path: Path) -> None:
    """diffusers declares one subfolder, and saves further networks of it under numbers."""
    for number, name in ((1, "a"), (3, "b")):
        for part in ("unet", "controlnet", "controlnet_1", "controlnet_2", "controlnet_4"):
            place = tmp_path / name / part
            place.mkdir(parents=True)
            save_file({"w": torch.full((2,), float(number))}, place / "diffusion_pytorch_model.safetensors")
        index = {"unet": ["diffusers", "UNet"], "controlnet": ["diffusers", "MultiControlNetModel"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    result = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    for part in ("unet", "controlnet", "controlnet_1", "controlnet_2"):
        made = load_file(tmp_path / "out" / part / "diffusion_pytorch_model.safetensors")
        assert made["w"].tolist() == [2.0, 2.0]
    (told,) = [note for note in result.notes if note.startswith("copied from the first input, not merged")]
    assert told.endswith("controlnet_4/diffusion_pytorch_model.safetensors")  # the loader stops at the first gap


def in_accelerate(folder: Path, seed: int, stem: str = "model", ending: str = ".safetensors") -> dict[str, torch.Tensor]:
    """Makes what accelerate saves of a training of two networks with equal names. Returns each file's tensor."""
    folder.mkdir(exist_ok=True)
    made = {f"{stem}{part}{ending}": torch.full((2,), float(seed + place)) for place, part in enumerate(("", "_1"))}
    for name, tensor in made.items():
        save_file({"w": tensor}, folder / name) if ending == ".safetensors" else torch.save({"w": tensor}, folder / name)
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
    return made


@pytest.mark.parametrize(("stem", "ending"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_the_networks_that_accelerate_numbers_are_merged(tmp_path: Path, stem: str, ending: str) -> None:
    first = in_accelerate(tmp_path / "a", 1, stem, ending)
    second = in_accelerate(tmp_path / "b", 5, stem, ending)
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    read = load_file if ending == ".safetensors" else torch.load
    for name in first:
        assert octets(read(tmp_path / "out" / name)["w"]) == octets(mean([first[name], second[name]], [1, 1]))
    assert len(sm.inspect(tmp_path / "out")) == 2, "the output is such a folder too"


def test_a_numbered_file_elsewhere_is_another_checkpoint(tmp_path: Path) -> None:
    in_accelerate(tmp_path, 1)
    (tmp_path / "optimizer.bin").unlink()
    assert list(sm.inspect(tmp_path)) == ["w"]


def test_what_becomes_of_a_part_is_told_by_its_file(tmp_path: Path) -> None:
    """A generator and a discriminator in one folder, each with its own optimizer and count."""
    for folder, count in (("a", 3), ("b", 8)):
        (tmp_path / folder).mkdir()
        for name in ("G_latest.pth", "D_latest.pth"):
            content = {"model": {f"{name[0]}.w": torch.ones(2) * count}, "iteration": count, "optimizer": {"state": {}}}
            torch.save(content, tmp_path / folder / name)
    result = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    (left,) = [note for note in result.notes if note.startswith("left out of the output")]
    assert "D_latest.pth/optimizer, G_latest.pth/optimizer (stale after a merge" in left
    assert "bookkeeping: iteration = 8" in result.notes
    for name in ("G_latest.pth", "D_latest.pth"):
        assert torch.load(tmp_path / "out" / name)["iteration"] == 8


def test_one_of_several_files_is_offered_as_a_file(tmp_path: Path) -> None:
    in_accelerate(tmp_path / "a", 1)
    with pytest.raises(sm.RecipeError, match=r"several models \(model.safetensors, .*give one of the files"):
        sm.convert(tmp_path / "a", tmp_path / "out.safetensors")
