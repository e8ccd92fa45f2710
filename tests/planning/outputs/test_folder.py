"""Folders as outputs: files, shards, index, subfolders. The oracles are json, safetensors and torch.load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, interrupt, when_kept
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.events import TaskDone

TENSORS = {f"layers.{n}.w": torch.full((25,), float(n)) for n in range(5)} | {"e": torch.empty(0), "s": torch.tensor(1.0)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "in.safetensors", {"mine": "kept", "sshs_model_hash": "old", "format": "tf"})
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize(("largest", "files"), [(None, 1), (504, 1), (503, 2), (200, 3), (199, 5), (100, 6), (1, 7)])
def test_shards_are_filled_in_order_up_to_the_largest_size(single: Path, largest: int | None, files: int) -> None:
    out = single.parent / "out"
    made = sm.convert(single, out, max_shard_size=largest)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == files
    assert len({p.name for p in shards}) == len(made.plan.layout.receipt.checksums) - (files > 1)
    held = [load_file(path) for path in shards]
    assert_same({name: tensor for each in held for name, tensor in each.items()}, TENSORS)
    assert all(sum(t.nbytes for t in each.values()) <= max(largest or 1 << 30, 100) for each in held)
    index = out / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert content["weight_map"] == {n: p.name for p, each in zip(shards, held, strict=True) for n in each}


def test_tensors_that_share_memory_are_written_twice_where_no_loader_ties_them(tmp_path: Path) -> None:
    shared = torch.ones(3)
    torch.save({"model": {"a": shared, "b": shared}, "step": 3}, tmp_path / "in.pth")
    folder = sm.convert(tmp_path / "in.pth", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), {"a": shared, "b": shared})
    file = sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {"a": shared, "b": shared})
    for made in (folder, file):
        assert "left out of the output: step (a safetensors file holds tensors only)" in made.notes


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"down.w": (70_001,), "down.b": (), "up.w": (33, 7), "up.e": (0, 4)}
    return {name: torch.randn(shape, generator=chance).to(dtype) for name, shape in shapes.items()}


def save(path: Path, tensors: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(tensors, path)


def load(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def half(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a.double() + b.double()) / 2).to(a.dtype)


def merged(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: half(tensor, b[name]) for name, tensor in a.items()}


ADDED = {"streammerge.json", "streammerge.yaml"}
NAMES = (
    "model.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.fp16.bin",
    "open_clip_pytorch_model.bin",
    "open_clip_model.safetensors",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "model.pth",
    "anything.pt",
    "anything.safetensors",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_keeps_its_name_and_its_container(tmp_path: Path, name: str) -> None:
    for seed, folder in enumerate("ab"):
        save(tmp_path / folder / name, draw(seed))
        (tmp_path / folder / "params.json").write_text("{}")
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    assert names(tmp_path / "out") == {name, "params.json"} | ADDED
    assert_same(load(tmp_path / "out" / name), merged(draw(0), draw(1)))
    assert sm.verify(tmp_path / "out", sample="100%").recomputed


@pytest.mark.parametrize("stem", ["model", "model.fp16", "diffusion_pytorch_model", "diffusion_pytorch_model.fp16"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("indexed", [True, False])
def test_shards_keep_their_names_and_get_an_index_that_their_loader_reads(
    tmp_path: Path, stem: str, ending: str, indexed: bool
) -> None:
    first, _, variant = stem.partition(".")
    first = "pytorch_model" if (first, ending) == ("model", ".bin") else first
    stem = f"{first}.{variant}" if variant else first
    index = f"{first}{ending}.index{f'.{variant}' if variant else ''}.json"
    for seed, folder in enumerate("ab"):
        tensors, weight_map = draw(seed), {}
        for number, half_of in enumerate((["up.w", "down.b"], ["down.w", "up.e"]), start=1):
            shard = f"{stem}-{number:05}-of-00002{ending}"
            save(tmp_path / folder / shard, {each: tensors[each] for each in half_of})
            weight_map |= dict.fromkeys(half_of, shard)
        if indexed:
            (tmp_path / folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    made = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    shards = {f"{stem}-{number:05}-of-00002{ending}" for number in (1, 2)}
    assert names(tmp_path / "out") == shards | {index} | ADDED
    assert any("has no index" in note for note in made.notes) != indexed
    content = json.loads((tmp_path / "out" / index).read_text())
    assert content["weight_map"] == weight_map
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    found = {name: tensor for shard in shards for name, tensor in load(tmp_path / "out" / shard).items()}
    assert_same(dict(sorted(found.items())), dict(sorted(merged(draw(0), draw(1)).items())))
    assert sm.verify(tmp_path / "out", sample="100%").recomputed
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "cut/", max_shard_size=2000)
    cut = {name for name in names(tmp_path / "cut") if name.startswith(stem) and name != index}
    assert cut == {f"{stem}-{number:05}-of-00003{ending}" for number in (1, 2, 3)}
    assert set(json.loads((tmp_path / "cut" / index).read_text())["weight_map"].values()) == cut


def test_a_loader_of_one_file_gets_one_file(tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "model.pth"):
        folder = tmp_path / name
        save(folder / name, {"model": draw(0), "step": 3} if name == "model.pth" else draw(0))
        made = sm.convert(folder, f"{tmp_path}/out-{name}/", max_shard_size=1000)
        assert name in names(tmp_path / f"out-{name}")
        assert f"{name} stays one file, since its loader reads no index of shards" in made.notes


def test_a_pickle_in_a_folder_keeps_its_tree(tmp_path: Path) -> None:
    """XTTS: the loader takes ``model`` of model.pth, and speakers_xtts.pth beside it."""
    for seed, folder in enumerate("ab"):
        tree = {"model": draw(seed), "config": {"a": 1}, "step": seed, "optimizer": {"state": {}, "param_groups": []}}
        save(tmp_path / folder / "model.pth", tree)
        for name in ("speakers_xtts.pth", "dvae.pth"):
            save(tmp_path / folder / name, {name: torch.full((3, 2), float(seed))})
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/", weights=[1, 3])
    made = load(tmp_path / "out" / "model.pth")
    mean = {n: ((t.double() + 3 * draw(1)[n].double()) / 4).to(t.dtype) for n, t in draw(0).items()}
    assert_same(made["model"], mean)
    assert (made["config"], made["step"], "optimizer" in made) == ({"a": 1}, 1, False)
    for name in ("speakers_xtts.pth", "dvae.pth"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert sm.verify(tmp_path / "out", sample="100%").recomputed


def test_tied_names_of_a_pickle_share_their_storage(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        shared = draw(seed)["up.w"]
        save(tmp_path / folder / "pytorch_model.bin", {"embed": shared, "head": shared, "x": torch.ones(2)})
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    made = load(tmp_path / "out" / "pytorch_model.bin")
    assert made["embed"].data_ptr() == made["head"].data_ptr()
    assert_same({"embed": made["embed"]}, {"embed": half(draw(0)["up.w"], draw(1)["up.w"])})


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("model.pth", "model.pth"),
        ("consolidated.00.pth", "consolidated.00.pth"),
        ("anything.pt", "model.safetensors"),
    ],
)
def test_a_conversion_writes_safetensors_unless_a_loader_looks_for_the_pickle_only(
    tmp_path: Path, name: str, written: str
) -> None:
    save(tmp_path / "a" / name, draw(0))
    sm.convert(tmp_path / "a", tmp_path / "out/")
    assert names(tmp_path / "out") == {written, "streammerge.json"}
    assert_same(load(tmp_path / "out" / written), draw(0))
    assert sm.verify(tmp_path / "out", sample="100%").recomputed


PIPELINE = {
    "_class_name": "Pipe", "unet": ["diffusers", "UNet"], "text_encoder": ["transformers", "CLIP"], "vae": ["x", "V"],
    "scheduler": ["diffusers", "DDIM"], "safety_checker": [None, None],
}  # fmt: skip


def pipeline(folder: Path, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Makes a pipeline of a sharded model, a variant and a pickle, and returns the tensors of each."""
    parts = {"unet": draw(seed), "text_encoder": draw(seed + 10, torch.float16), "vae": draw(seed + 20)}
    tensors, weight_map = parts["unet"], {}
    for number, name in enumerate(tensors, start=1):
        shard = weight_map[name] = f"diffusion_pytorch_model-{number:05}-of-00004.safetensors"
        save(folder / "unet" / shard, {name: tensors[name]})
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save(folder / "text_encoder" / "model.fp16.safetensors", parts["text_encoder"])
    save(folder / "vae" / "diffusion_pytorch_model.bin", parts["vae"])
    save(folder / "single-file.safetensors", {f"{part}.{n}": t for part in ("unet", "vae") for n, t in parts[part].items()})
    for part in parts:
        (folder / part / "config.json").write_text(json.dumps({"dtype": "float32", "part": part}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(PIPELINE))
    return parts


def read_pipeline(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    shards = sorted((folder / "unet").glob("*.safetensors"))
    return {
        "unet": {name: tensor for shard in shards for name, tensor in load(shard).items()},
        "text_encoder": load(folder / "text_encoder" / "model.fp16.safetensors"),
        "vae": load(folder / "vae" / "diffusion_pytorch_model.bin"),
    }


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_pipeline_is_merged_model_by_model(tmp_path: Path, store: str) -> None:
    a, b = (pipeline(tmp_path / folder, seed) for seed, folder in enumerate("ab"))
    out = "memory://pipeline/out/" if store == "memory" else f"{tmp_path}/out/"
    made = sm.merge([tmp_path / "a", tmp_path / "b"], out)
    if store == "memory":
        for name in sm.memory_store.names("pipeline/out"):
            path = tmp_path / "out" / name.removeprefix("pipeline/out/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sm.memory_store.get(name))
        sm.memory_store.remove("pipeline")
    assert names(tmp_path / "out") == names(tmp_path / "a") - {"single-file.safetensors"} | ADDED | {"README.md"}
    for part, tensors in read_pipeline(tmp_path / "out").items():
        assert_same(tensors, merged(a[part], b[part]))
    assert any("single-file.safetensors (another form" in note for note in made.notes)
    assert sm.verify(tmp_path / "out", sample="100%", inputs=tmp_path).recomputed
    assert len(sm.inspect(tmp_path / "out")) == 12


def test_rules_and_dtypes_reach_into_the_models_of_a_pipeline(tmp_path: Path) -> None:
    a, b = (pipeline(tmp_path / folder, seed) for seed, folder in enumerate("ab"))
    models = [{"model": str(tmp_path / each), "parameters": {"weight": 0.5}} for each in "ab"]
    rules: list[Any] = [{"match": "unet/down.*", "copy": str(tmp_path / "b")}, {"match": "vae/up.*", "drop": True}]
    recipe = {"merge_method": "linear", "models": models, "rules": rules, "dtype": "bfloat16"}
    sm.merge(recipe=recipe, out=tmp_path / "out/")
    unet = {n: t for shard in (tmp_path / "out" / "unet").glob("*.safetensors") for n, t in load(shard).items()}
    wanted = {n: t.to(torch.bfloat16) for n, t in b["unet"].items() if n.startswith("down")}
    wanted |= {n: half(t.double(), b["unet"][n]).to(torch.bfloat16) for n, t in a["unet"].items() if n.startswith("up")}
    assert_same(dict(sorted(unet.items())), dict(sorted(wanted.items())))
    assert set(load(tmp_path / "out" / "vae" / "diffusion_pytorch_model.bin")) == {"down.w", "down.b"}
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config == {"dtype": "bfloat16", "part": "text_encoder"}
    with pytest.raises(sm.RecipeError, match=r"no tensor of vae is left"):
        sm.merge(recipe=recipe | {"rules": [{"match": "vae/*", "drop": True}]}, out=tmp_path / "other/")


def test_a_pipeline_that_another_lacks_a_model_of_is_refused_by_the_names(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        pipeline(tmp_path / folder, seed)
    shutil.rmtree(tmp_path / "b" / "vae")
    with pytest.raises(sm.MismatchError, match=r"vae/down\.w"):
        sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")


@pytest.mark.parametrize("own", [True, False])
def test_modules_with_weights_are_merged_with_the_model(tmp_path: Path, own: bool) -> None:
    """sentence-transformers: the transformer lies in the folder itself, or in 0_Transformer."""
    root = "" if own else "0_Transformer/"
    files = [f"{root}model.safetensors", "2_Dense/pytorch_model.bin"]
    modules = [{"idx": 0, "path": root.rstrip("/")}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    for seed, folder in enumerate("ab"):
        for number, name in enumerate(files):
            save(tmp_path / folder / name, draw(seed + 10 * number))
        (tmp_path / folder / "modules.json").write_text(json.dumps(modules))
        (tmp_path / folder / "1_Pooling").mkdir()
        (tmp_path / folder / "1_Pooling" / "config.json").write_text("{}")
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    assert names(tmp_path / "out") == names(tmp_path / "a") | ADDED
    for number, name in enumerate(files):
        assert_same(load(tmp_path / "out" / name), merged(draw(10 * number), draw(1 + 10 * number)))
    assert sm.verify(tmp_path / "out", sample="100%").recomputed


@pytest.mark.parametrize(("place", "file"), [("", "router_config.json"), ("", "config.json"), ("0_Asym", "config.json")])
def test_the_modules_of_a_router_are_merged(tmp_path: Path, place: str, file: str) -> None:
    """sentence-transformers: a router has the encoders of queries and of documents in subfolders that its file names."""
    inner = [f"{place}/{name}".lstrip("/") for name in ("query_0_Transformer", "document_0_Transformer")]
    types = dict.fromkeys(("query_0_Transformer", "document_0_Transformer", "document_1_Pooling"), "a.Class")
    for seed, folder in enumerate("ab"):
        for number, name in enumerate(inner):
            save(tmp_path / folder / name / "model.safetensors", draw(seed + 10 * number))
        (tmp_path / folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": place}]))
        (tmp_path / folder / place / file).write_text(json.dumps({"types": types, "structure": {"query": []}}))
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    assert names(tmp_path / "out") - {"README.md"} == names(tmp_path / "a") | ADDED
    for number, name in enumerate(inner):
        made = load(tmp_path / "out" / name / "model.safetensors")
        assert_same(made, merged(draw(10 * number), draw(1 + 10 * number)))


def test_a_damaged_file_in_a_subfolder_is_found(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        pipeline(tmp_path / folder, seed)
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    for name in ("vae/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json"):
        path = tmp_path / "out" / name
        good = path.read_bytes()
        path.write_bytes(
            good[:-1] + bytes([good[-1] ^ 1]) if name.endswith("json") else good.replace(b"\0" * 8, b"\1" * 8, 1)
        )
        with pytest.raises(sm.VerifyError):
            sm.verify(tmp_path / "out", sample=0)
        path.write_bytes(good)
    (tmp_path / "out" / "unet" / "more.safetensors").write_bytes(b"")
    with pytest.raises(sm.VerifyError, match=r"unet/more\.safetensors does not belong to it"):
        sm.verify(tmp_path / "out", sample=0)


def test_what_somebody_put_into_a_subfolder_is_not_lost(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        pipeline(tmp_path / folder, seed)
    for _ in range(2):
        sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/", overwrite=True)
    (tmp_path / "out" / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(sm.RecipeError, match=r"unet/notes\.txt"):
        sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/", overwrite=True)
    assert (tmp_path / "out" / "unet" / "notes.txt").read_text() == "mine"


def test_an_interrupted_pipeline_is_continued(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        pipeline(tmp_path / folder, seed)
    told, out = list[object](), tmp_path / "out"
    sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "whole/", listener=told.append)
    pieces = sum(isinstance(event, TaskDone) for event in told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streammerge.stores.journal.INTERVAL_SECONDS", 0.01)
        with pytest.raises(KeyboardInterrupt):
            sm.merge([tmp_path / "a", tmp_path / "b"], out, listener=when_kept(out, pieces, interrupt))
    assert (tmp_path / ".out.streammerge" / "journal").exists()
    made = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    assert any("continued an interrupted run" in note for note in made.notes)
    assert made.read_bytes == 0
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "consolidated.safetensors"])
def test_a_file_that_a_loader_looks_for_keeps_its_name_in_a_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, draw(0))
    sm.convert(tmp_path / name, tmp_path / "out/")
    assert names(tmp_path / "out") == {name, "streammerge.json"}


def test_weights_that_are_copied_are_said(tmp_path: Path) -> None:
    save(tmp_path / "a" / "model.safetensors", draw(0))
    save(tmp_path / "a" / "projector.safetensors", {"p": torch.ones(2)})
    made = sm.merge([tmp_path / "a", tmp_path / "a"], tmp_path / "out/")
    assert "copied from the first input, not merged: projector.safetensors" in made.notes


def test_a_single_shard_keeps_the_index_by_which_it_is_found(tmp_path: Path) -> None:
    for folder, shard, index in (
        ("a", "model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        ("b", "weights", "mine.index.json"),
    ):
        (tmp_path / folder).mkdir()
        save_file(draw(0), tmp_path / folder / shard)
        (tmp_path / folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(draw(0), shard)}))
        sm.convert(tmp_path / folder, f"{tmp_path}/{folder}-out/")
        assert names(tmp_path / f"{folder}-out") == {shard, index, "streammerge.json"}
        assert len(sm.inspect(tmp_path / f"{folder}-out")) == 4
        sm.convert(tmp_path / folder, f"{tmp_path}/{folder}-cut/", max_shard_size=1000)
        assert len(sm.inspect(tmp_path / f"{folder}-cut")) == 4


@pytest.mark.parametrize(
    ("name", "out"),
    [("model.pth", "model.pth"), ("pytorch_model.bin", "pytorch_model.bin"), ("best.pth", "model.safetensors")],
)
def test_a_file_keeps_the_name_that_its_loader_looks_for(tmp_path: Path, name: str, out: str) -> None:
    """XTTS looks for model.pth in a folder. Nothing is known of a loader of best.pth, so it gets the usual name."""
    for folder in ("a", "b"):
        save(tmp_path / folder / name, {"model": draw(1), "config": {"k": 1}, "step": 3})
        (tmp_path / folder / "config.json").write_text("{}")
    result = sm.merge([tmp_path / "a" / name, tmp_path / "b" / name], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [out, "streammerge.json", "streammerge.yaml"]
    assert any(f"config.json and the other files beside {tmp_path / 'a' / name} are not copied" in n for n in result.notes)
    if out != "model.safetensors":
        assert torch.load(tmp_path / "out" / out)["config"] == {"k": 1}
    sm.convert(tmp_path / "a" / name, tmp_path / "converted")
    converted = "model.pth" if name == "model.pth" else "model.safetensors"
    assert (tmp_path / "converted" / converted).exists()


def classifier(folder: Path, labels: list[str]) -> Path:
    save(folder / "model.safetensors", {"body.weight": torch.ones(4, 4), "classifier.weight": torch.ones(len(labels), 4)})
    names = {str(number): label for number, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": names, "label2id": {}}, indent=2))
    return folder


def test_labels_follow_the_rows_of_a_classifier(tmp_path: Path) -> None:
    short, long = classifier(tmp_path / "a", ["good", "bad"]), classifier(tmp_path / "b", ["good", "bad", "odd"])
    result = sm.merge([short, long], tmp_path / "out", on_shape="rows")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["id2label"] == {"0": "good", "1": "bad", "2": "odd"}
    assert made["label2id"] == {"good": 0, "bad": 1, "odd": 2}
    assert not any("by hand" in note for note in result.notes)
    other = classifier(tmp_path / "c", ["x", "y", "z"])
    result = sm.merge([short, other], tmp_path / "told", on_shape="rows")
    assert any("name the others there by hand" in note for note in result.notes)


def test_an_adapter_beside_the_model_is_told(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(tmp_path / folder / "model.safetensors", {"w": torch.ones(4, 4)})
        save(tmp_path / folder / "adapter_model.safetensors", {"w.lora_A.weight": torch.ones(2, 4)})
        save(tmp_path / folder / "other.safetensors", {"v": torch.ones(3)})
    result = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert any("adapter_model.safetensors is an adapter of the first input, copied as it is" in n for n in result.notes)
    assert "copied from the first input, not merged: other.safetensors" in result.notes


def test_a_model_that_only_a_later_pipeline_has_is_told(tmp_path: Path) -> None:
    for folder, parts in (("a", ["unet"]), ("b", ["unet", "vae"])):
        for part in parts:
            save(tmp_path / folder / part / "diffusion_pytorch_model.safetensors", {"w": torch.ones(2)})
        declared = {part: ["diffusers", "Model"] for part in parts}
        (tmp_path / folder / "model_index.json").write_text(json.dumps(declared))
    with pytest.raises(sm.RecipeError, match=r"vae/w belongs to a model that the first input lacks, which has unet;"):
        sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", on_missing="union")
    sm.merge([tmp_path / "b", tmp_path / "a"], tmp_path / "out", on_missing="union")
    assert (tmp_path / "out" / "vae").is_dir()
