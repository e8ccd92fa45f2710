"""Stages: a graph of merges in one run, bit for bit as its merges one after the other, through files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.methods.contracts import METHODS

SHAPES = {
    "a.weight": (37,),
    "b.weight": (64, 48),
    "c.weight": (5, 3, 7),
    "d": (),
    "layers.0.w.weight": (300, 256),
    "layers.1.w.weight": (1, 1),
    "layers.2.w.weight": (0, 4),
}
GIVEN: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.01},
    "sce": {"select_topk": 0.4},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.7, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.05},
}
NAMES = [name for name in METHODS.built_in if name not in ("copy", "integers")]


def tensors(number: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(number)
    made = {
        name: (torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=own)).to(dtype)
        for name, shape in SHAPES.items()
    }
    return {**made, "n.num_batches_tracked": torch.tensor(7 + number)}


def node(method: str, models: list[str]) -> dict[str, Any]:
    """A merge of these models; the first is the base where the method has one."""
    found = METHODS.built_in[method]
    count = max(found.models[0], min(found.models[1] or 3, len(models) - (found.base == "required")))
    made: dict[str, Any] = {"merge_method": method}
    if found.base in ("required", "model"):
        made["base_model"] = models[0]
    start = 1 if found.base == "required" else 0
    made["models"] = [{"model": each} for each in models[start : start + count]]
    if "weight" in found.parameters:
        for number, each in enumerate(made["models"]):
            each["parameters"] = {"weight": 0.3 + 0.2 * number}
    given = dict(GIVEN.get(method, {}))
    given |= {k: 0.4 for k, p in found.parameters.items() if p.required and k not in given and k != "weight"}
    return {**made, "parameters": given} if given else made


def graph(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Five merges; the first is a model of two others."""
    first, second, third, fourth, fifth = methods
    return {
        "s1": node(first, ["m0", "m1", "m2"]),
        "s2": node(second, ["s1", "m3", "m4"]) | {"dtype": "float32"},
        "s3": node(third, ["m0", "s1", "m2"]),
        "s4": node(fourth, ["s3", "s2", "m1"]) | {"seed": 5},
        "out": node(fifth, ["s4", "s1", "s2"]),
    }


def with_ending(recipe: dict[str, Any], ending: str) -> dict[str, Any]:
    made = json.loads(json.dumps(recipe))
    for each in made["models"]:
        each["model"] += ending
    if "base_model" in made:
        made["base_model"] += ending
    return made  # type: ignore[no-any-return]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    def octets(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return list(one) == list(two) and all(
        one[n].dtype == two[n].dtype and one[n].shape == two[n].shape and octets(one[n]) == octets(two[n]) for n in one
    )


def in_stages(nodes: dict[str, dict[str, Any]], ending: str, **more: Any) -> None:
    for name, recipe in nodes.items():
        sm.merge(recipe=with_ending(recipe, ending), out=name + ending, allow_nonfinite=True, **more)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        save_file(tensors(number), f"m{number}.safetensors")
    return tmp_path


def one_run(nodes: dict[str, dict[str, Any]], ending: str) -> dict[str, Any]:
    made = {name: with_ending(recipe, "") for name, recipe in nodes.items()}
    for recipe in made.values():
        for each in recipe["models"]:
            each["model"] += ending * each["model"].startswith("m")
        if recipe.get("base_model", "").startswith("m"):
            recipe["base_model"] += ending
    final = made.pop("out")
    return {**final, "stages": made}


@pytest.mark.parametrize("at", range(0, len(NAMES), 5))
@pytest.mark.sampled(2)
def test_every_method_as_a_stage_equals_runs_through_files(models: Path, at: int) -> None:
    nodes = graph([NAMES[(at + number) % len(NAMES)] for number in range(5)])
    in_stages(nodes, ".safetensors")
    sm.merge(recipe=one_run(nodes, ".safetensors"), out="whole.safetensors", allow_nonfinite=True)
    assert same(load_safetensors("whole.safetensors"), load_safetensors("out.safetensors"))
    assert sorted(path.name for path in models.iterdir() if path.name[0] not in "ms") == [
        "out.safetensors",
        "whole.safetensors",
    ]
    assert sm.verify("whole.safetensors")


GRAPHS = [
    ["slerp", "ties", "linear", "task_arithmetic", "slerp"],
    ["ties"] * 5,
    ["ties", "della", "sce", "model_stock", "ties"],
    ["slerp", "ties", "sce", "nuslerp", "arcee_fusion"],
    ["linear"] * 5,
    ["iso_c", "linear", "tsv", "ties", "iso_c"],
]
counted = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")


def moved() -> tuple[int, int]:
    """The bytes that this process has read and written so far, as the system counts them."""
    found = re.findall(r"[rw]char: (\d+)", Path("/proc/self/io").read_text())
    return int(found[0]), int(found[1])


def moves(recipe: dict[str, Any], out: str, **options: Any) -> tuple[int, int]:
    """The bytes that a merge in this process reads, and those that it reads and writes. Those that it tells are compared
    with what the system counts, where pages of headers come on top."""
    before = moved()
    plain: dict[str, Any] = {"io": "pread", "executor": "threads", "allow_nonfinite": True, "overwrite": True}
    made = sm.merge(recipe=recipe, out=out, **plain, **options)
    read, written = (now - then for now, then in zip(moved(), before, strict=True))
    assert made.read_bytes <= read <= made.read_bytes + 7 * 1_200_000
    return read, read + written


@counted
@pytest.mark.parametrize("methods", GRAPHS, ids=",".join)
@pytest.mark.sampled(3)
def test_reads_and_writes_are_at_most_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: list[str]) -> None:
    """The system counts, so that what passes read again is seen: by the runs through files, and by the graph."""
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        draw = torch.Generator().manual_seed(number)
        save_file({f"w{n}": torch.randn(600, 520, generator=draw) for n in range(8)}, f"m{number}.safetensors")
    nodes = graph(methods)
    staged = sum(moves(with_ending(each, ".safetensors"), f"{name}.safetensors")[1] for name, each in nodes.items())
    read, both = moves(one_run(nodes, ".safetensors"), "whole.safetensors")
    assert 2 * both <= staged
    assert read < 1.2 * 5 * 8 * 4 * 600 * 520  # each input once
    assert same(load_safetensors("whole.safetensors"), load_safetensors("out.safetensors"))


@counted
@pytest.mark.parametrize(
    ("methods", "memory"),
    [
        (GRAPHS[0], "110MiB"),
        *(pytest.param(each, "140MiB", marks=pytest.mark.slow) for each in GRAPHS[1:4]),
    ],
)
def test_long_tensors_are_read_half_as_much_where_memory_is_scarce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: list[str], memory: str
) -> None:
    """Not all that is read again can be held. Passes are made once, and what is held spares the most reading."""
    monkeypatch.chdir(tmp_path)
    common = torch.randn(3100, 3000, generator=torch.Generator().manual_seed(99))
    for number in range(5):
        draw = torch.Generator().manual_seed(number)
        tensor = common + 0.1 * torch.randn(3100, 3000, generator=draw)
        save_file({"w": tensor.to(torch.bfloat16)}, f"m{number}.safetensors")
    nodes = graph(methods)
    options: dict[str, Any] = {"memory": memory, "workers": 2}
    staged = sum(
        moves(with_ending(each, ".safetensors"), f"{name}.safetensors", **options)[1] for name, each in nodes.items()
    )
    read, both = moves(one_run(nodes, ".safetensors"), "whole.safetensors", **options)
    assert 2 * both <= staged
    assert read > 1.2 * 5 * 2 * common.numel()  # else the memory is not scarce
    assert same(load_safetensors("whole.safetensors"), load_safetensors("out.safetensors"))


def test_workers_tell_what_they_have_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that all workers share and that one makes alone, mapped inputs and copies, threads and processes."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        shapes = {"long": (2100, 2050), "short": (64, 64), "n": ()}
        save_file({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, f"m{number}.safetensors")
    inner = with_ending(node("ties", ["m0", "m1", "m2"]), ".safetensors")
    outer = {"merge_method": "slerp", "models": ["s", "m2.safetensors"], "parameters": {"t": 0.4}, "stages": {"s": inner}}
    copied = {"merge_method": "passthrough", "models": ["m0.safetensors"]}
    inputs = 4 * (2100 * 2050 + 64 * 64 + 1)
    for recipe, least, most in ((inner, 6, 10), (outer, 3, 3), (copied, 1, 1)):
        told = [
            sm.merge(recipe=recipe, out="o.safetensors", overwrite=True, workers=2, **how).read_bytes
            for how in ({"io": "mmap"}, {"io": "pread"}, {"io": "pread", "executor": "processes"})
        ]
        assert told[1] == told[2]
        assert all(least * inputs <= each <= most * inputs for each in told), (told, inputs)


@pytest.mark.parametrize("memory", ["200MiB", "1GiB"])
@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.sampled(2, by="executor")
def test_no_byte_depends_on_memory_or_workers(models: Path, memory: str, executor: str) -> None:
    recipe = one_run(graph(["dare_linear", "ties", "slerp", "della", "sce"]), ".safetensors")
    sm.merge(recipe=recipe, out="one.safetensors", workers=1, executor="threads", allow_nonfinite=True)
    sm.merge(recipe=recipe, out="two.safetensors", workers=2, memory=memory, executor=executor, allow_nonfinite=True)
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


def test_a_tensor_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(1)
    for number in range(3):
        save_file({"w": torch.randn(2100, 2050, generator=draw).to(torch.bfloat16)}, f"m{number}.safetensors")
    nodes = {
        "s1": node("slerp", ["m0", "m1"]),
        "s2": node("linear", ["s1", "m2"]),
        "out": node("slerp", ["s1", "s2"]),
    }
    in_stages(nodes, ".safetensors")
    recipe = one_run(nodes, ".safetensors")
    for options in ({"executor": "processes", "workers": 2}, {"executor": "threads", "workers": 2, "memory": "64MiB"}, {}):
        sm.merge(recipe=recipe, out="w.safetensors", overwrite=True, **options)
        assert same(load_safetensors("w.safetensors"), load_safetensors("out.safetensors"))


def test_sums_of_one_worker_are_those_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are added piece by piece, which float64 shows."""
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(1)
    for number in range(2):
        save_file({"w": torch.randn(2500, 2400, generator=draw, dtype=torch.float64)}, f"m{number}.safetensors")
    nodes = {"s1": node("linear", ["m0", "m1"]), "out": node("slerp", ["s1", "m1"])}
    in_stages(nodes, ".safetensors")
    sm.merge(recipe=one_run(nodes, ".safetensors"), out="w.safetensors", workers=1)
    assert same(load_safetensors("w.safetensors"), load_safetensors("out.safetensors"))


@counted
def test_inputs_of_long_tensors_are_read_once_where_there_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole tensor is held, and one worker makes it. Otherwise passes read some of it again."""
    monkeypatch.chdir(tmp_path)
    shape = (2100, 2050)
    for number in range(3):
        save_file({"w": torch.full(shape, 1.0 + number, dtype=torch.bfloat16)}, f"m{number}.safetensors")
    nodes = {
        "s1": node("slerp", ["m0", "m1"]),
        "s2": node("linear", ["s1", "m2"]),
        "out": node("slerp", ["s1", "s2"]),
    }

    inputs = 3 * 2 * shape[0] * shape[1]
    for memory, most in (("512MiB", 1.1), ("64MiB", 1.1), ("32MiB", 5.0)):
        before = moved()[0]
        options = {"workers": 2, "executor": "threads", "io": "pread", "overwrite": True, "memory": memory}
        sm.merge(recipe=one_run(nodes, ".safetensors"), out="w.safetensors", **options)
        assert moved()[0] - before <= most * inputs
        assert (moved()[0] - before > 1.1 * inputs) == (memory == "32MiB")


def test_a_pickle_has_the_counters_of_runs_through_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        torch.save({"model": tensors(number), "epoch": number, "note": f"m{number}"}, f"m{number}.pth")
    nodes = graph(["slerp", "ties", "linear", "task_arithmetic", "linear"])
    in_stages(nodes, ".pth")
    sm.merge(recipe=one_run(nodes, ".pth"), out="whole.pth")
    ours, theirs = torch.load("whole.pth"), torch.load("out.pth")
    assert same(ours.pop("model"), theirs.pop("model"))
    assert ours == theirs


def test_a_folder_has_the_files_of_runs_through_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are stacked by a stage and cut again by the output, so both edit the configuration."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Path(f"m{number}").mkdir()
        parts = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(8, 4) for n in range(4)}
        parts |= {"model.embed_tokens.weight": torch.randn(10, 4), "lm_head.weight": torch.randn(10, 4)}
        keys = list(parts)
        files = {f"model-0000{n}-of-00002.safetensors": keys[3 * n - 3 : 3 * n] for n in (1, 2)}
        for file, names in files.items():
            save_file({name: parts[name] for name in names}, f"m{number}/{file}", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
        Path(f"m{number}/model.safetensors.index.json").write_text(json.dumps(index))
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "dtype": "float32"}
        Path(f"m{number}/config.json").write_text(json.dumps(config, indent=2))
        Path(f"m{number}/notes.txt").write_text(f"m{number}")
    stack = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "m0", "layer_range": [0, 3]}]},
            {"sources": [{"model": "m1", "layer_range": [1, 4]}]},
        ],
    }
    mixed = {"merge_method": "linear", "models": [{"model": "m1"}, {"model": "m2"}]}
    last = {
        "merge_method": "slerp",
        "slices": [
            {"sources": [{"model": "tall", "layer_range": [1, 5]}, {"model": "mixed", "layer_range": [0, 4]}]},
        ],
        "base_model": "tall",
        "parameters": {"t": [0.2, 0.8]},
        "dtype": "bfloat16",
    }
    for name, recipe in (("tall", stack), ("mixed", mixed), ("out", last)):
        sm.merge(recipe=recipe, out=f"{name}/")
    Path("mixed").rename("mixed_")
    Path("tall").rename("tall_")
    sm.merge(recipe={**last, "stages": {"tall": stack, "mixed": mixed}}, out="whole/")
    ours = {path.name for path in Path("whole").iterdir()}
    assert ours == {path.name for path in Path("out").iterdir()}
    for name in sorted(ours - {"streammerge.json", "streammerge.yaml", "README.md"}):
        if name.endswith(".safetensors"):
            assert same(load_safetensors(f"whole/{name}"), load_safetensors(f"out/{name}"))
        else:
            assert Path("whole", name).read_bytes() == Path("out", name).read_bytes(), name
    assert json.loads(Path("whole/config.json").read_text())["num_hidden_layers"] == 4
    assert sm.verify("whole/")


def test_a_stage_that_is_not_rounded(models: Path) -> None:
    """The output has the dtype that it would have with rounding, and the numbers of one weighted sum."""
    inner = node("linear", ["m0", "m1"])
    outer = {"merge_method": "linear", "models": ["s", "m2.safetensors"]}
    inner["models"] = [{**each, "model": f"{each['model']}.safetensors"} for each in inner["models"]]
    sm.merge(recipe={**outer, "stages": {"s": {**inner, "round": False}}}, out="exact.safetensors")
    sm.merge(recipe={**outer, "stages": {"s": inner}}, out="rounded.safetensors")
    exact, rounded = load_safetensors("exact.safetensors"), load_safetensors("rounded.safetensors")
    given = [load_safetensors(f"m{number}.safetensors")["b.weight"].double() for number in range(3)]
    sums = ((0.3 * given[0] + 0.5 * given[1]) / 0.8 + given[2]) / 2
    assert exact["b.weight"].dtype == torch.bfloat16
    assert torch.equal(exact["b.weight"], sums.to(torch.bfloat16))
    assert not torch.equal(exact["b.weight"], rounded["b.weight"])


def test_an_error_names_the_stage(models: Path) -> None:
    save_file({"other": torch.ones(3)}, "x.safetensors")
    inner = {"merge_method": "linear", "models": ["m0.safetensors", "x.safetensors"]}
    with pytest.raises(sm.MismatchError, match="stage s: "):
        sm.plan(recipe={"merge_method": "linear", "models": ["s", "m1.safetensors"], "stages": {"s": inner}})


def test_the_plan_and_the_receipt_have_the_graph(models: Path) -> None:
    inner = {"merge_method": "linear", "models": ["m0.safetensors", "m1.safetensors"]}
    recipe = {"merge_method": "linear", "models": ["s", "m2.safetensors"], "stages": {"s": inner}}
    plan = sm.plan(recipe=recipe, out="out.safetensors")
    assert "stage    s: by linear" in str(plan)
    assert set(plan.input_files) == {"m0.safetensors", "m1.safetensors", "m2.safetensors"}
    assert plan.read_bytes == 3 * sum(t.nbytes for t in tensors(0).values())
    receipt = plan.layout.receipt
    assert receipt.recipe["models"][0]["model"] == "s"
    assert [each["model"] for each in receipt.recipe["stages"]["s"]["models"]] == ["m0.safetensors", "m1.safetensors"]
