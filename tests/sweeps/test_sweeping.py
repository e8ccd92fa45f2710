"""Sweeps: each output is its own merge, the inputs are read once, the best are kept, and the same command goes on."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Cli, deflate, load_safetensors, mean, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.cli.main import cli as command_line
from streammerge.events import Hashed, TaskDone

WEIGHTS = [[0.5, 0.5], [0.6, 0.4], [1.5, -0.5]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2), ("base", 3)):
        state = trained(seed)
        state["long"] = torch.randn(70_001, generator=torch.Generator().manual_seed(seed))  # more than a grain
        save_file(state, f"{name}.safetensors")
        torch.save(state, f"{name}.pth")
        Path(name).mkdir()
        save_file(state, f"{name}/model.safetensors", metadata={"format": "pt"})
        Path(name, "config.json").write_text(json.dumps({"model_type": "x"}))
    return tmp_path


def tensors_of(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".pth"):
        return dict(torch.load(path, weights_only=True))
    return load_safetensors(Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path))


def bytes_of(path: str) -> dict[str, bytes]:
    place = Path(path)
    return {each.name: each.read_bytes() for each in place.iterdir()} if place.is_dir() else {"": place.read_bytes()}


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ""])
def test_each_output_is_its_own_merge(here: Path, ending: str) -> None:
    inputs = [f"a{ending}", f"b{ending}"]
    result = sm.sweep(inputs, "out", weights=WEIGHTS, integers="first")
    assert [each.name for each in result.outputs] == ["weight_0.5_0.5", "weight_0.6_0.4", "weight_1.5_-0.5"]
    assert result.reads == 1
    for each, weights in zip(result.kept, WEIGHTS, strict=True):
        sm.merge(inputs, f"one{ending or '/'}", weights=weights, integers="first", overwrite=True)
        assert bytes_of(each.out) == bytes_of(f"one{ending}")
        expected = mean([trained(1)["embed.weight"], trained(2)["embed.weight"]], weights)
        assert torch.equal(tensors_of(each.out)["embed.weight"], expected)
        assert sm.verify(each.out, inputs=here, sample="100%").equal_elems


@pytest.mark.parametrize(
    ("method", "parameters", "base"),
    [
        ("slerp", {"t": "0.2:0.8:0.3"}, None),
        ("ties", {"density": ["0.3", "0.7"], "weight": 0.5}, "base.safetensors"),
        ("dare_linear", {"density": "0.2:0.6:0.4", "weight": 0.5}, "base.safetensors"),
        ("task_arithmetic", {"lambda": "0.5:1:0.5", "weight": 0.5}, "base.safetensors"),
        ("model_stock", {"filter_wise": ["true", "false"]}, "base.safetensors"),
        ("nearswap", {"t": ["0.1", "0.3"]}, "a.safetensors"),
    ],
)
@pytest.mark.parametrize("ways", [{}, {"io": "pread", "workers": 1, "memory": "40MiB"}])
@pytest.mark.sampled(2, by="method")
def test_all_methods(here: Path, method: str, parameters: dict[str, Any], base: str | None, ways: dict[str, Any]) -> None:
    inputs = ["a.safetensors", "b.safetensors"]
    more: dict[str, Any] = {"method": method, "base": base, "integers": "first", "seed": 5, **ways}
    result = sm.sweep(inputs, "out", parameters=parameters, **more)
    assert len(result.outputs) >= 2
    contents = set()
    for each in result.outputs:
        own = {**parameters, **each.settings}
        sm.merge(inputs, "one.safetensors", parameters=own, overwrite=True, **more)
        assert bytes_of(each.out) == bytes_of("one.safetensors")
        contents.add(bytes_of(each.out)[""])
    assert len(contents) == len(result.outputs)


def test_the_inputs_are_read_once(here: Path) -> None:
    told: list[Any] = []
    inputs = ["a.safetensors", "b.safetensors"]
    result = sm.sweep(inputs, "out", random=16, seed=3, integers="first", io="pread", listener=told.append)
    once = sm.merge(inputs, "one.safetensors", integers="first")
    assert result.read_bytes == once.read_bytes <= sum(e.read_bytes for e in told if isinstance(e, TaskDone))
    assert len(result.kept) == 16
    assert result.written_bytes > 15 * once.written_bytes
    again = sm.sweep(inputs, "again", random=16, seed=3, integers="first")
    assert [each.settings for each in again.outputs] == [each.settings for each in result.outputs]
    other = sm.sweep(inputs, "other", random=16, seed=4, integers="first")
    assert [each.settings for each in other.outputs] != [each.settings for each in result.outputs]


def test_little_memory_takes_several_reads(here: Path) -> None:
    inputs = ["a.safetensors", "b.safetensors"]
    result = sm.sweep(inputs, "out", random=24, integers="first", memory="40MiB", workers=1)
    assert 1 < result.reads < 24
    assert result.peak_bytes < 60 << 20
    for each in result.outputs[::7]:
        weights = [float(w) for w in each.settings["weight"].split(",")]
        sm.merge(inputs, "one.safetensors", weights=weights, integers="first", overwrite=True)
        assert bytes_of(each.out) == bytes_of("one.safetensors")


def test_packed_records_are_unpacked_once(here: Path) -> None:
    for name in "ab":
        deflate(Path(f"{name}.pth"), Path(f"{name}-packed.pth"))
    inputs = ["a-packed.pth", "b-packed.pth"]
    result = sm.sweep(inputs, "out", weights=WEIGHTS, integers="first")
    for each, weights in zip(result.kept, WEIGHTS, strict=True):
        sm.merge(inputs, "one.pth", weights=weights, integers="first", overwrite=True)
        assert bytes_of(each.out) == bytes_of("one.pth")


@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.sampled(2)
def test_no_byte_depends_on_the_executor(here: Path, executor: str) -> None:
    inputs = ["a.safetensors", "b.safetensors"]
    result = sm.sweep(inputs, "out", weights=WEIGHTS, integers="first", executor=executor, workers=2)
    sm.merge(inputs, "one.safetensors", weights=WEIGHTS[1], integers="first")
    assert bytes_of(result.outputs[1].out) == bytes_of("one.safetensors")


def test_icefalls_table_in_one_command(here: Path, cli: Cli) -> None:
    Path("exp").mkdir()
    for epoch in range(8, 13):
        save_file({"w": torch.full((70_000,), float(epoch))}, f"exp/epoch-{epoch}.safetensors")
    words = ("exp/epoch-*.safetensors", "--epochs", "11:12", "--averages", "1:3", "-o", "means", "--lowest")
    score = Path("score.py")
    score.write_text(
        "import struct, sys\nprint('WER', abs(struct.unpack('<f', open(sys.argv[1], 'rb').read()[-4:])[0] - 10.2))\n"
    )
    made = cli("sweep", *words, "--score", f"{sys.executable} -S score.py {{}}", "--keep", "best:2")
    assert "epoch \\ avg" in made.stdout
    for epoch, average in ((11, 1), (12, 3), (11, 2)):
        row = next(line for line in made.stdout.splitlines() if line.split()[:2] == [str(epoch), str(average)])
        mean_of = sum(range(epoch - average + 1, epoch + 1)) / average
        assert abs(float(row.split()[2]) - abs(mean_of - 10.2)) < 1e-5
    assert sorted(each.name for each in Path("means").glob("*.safetensors")) == [
        "epoch_11-avg_2.safetensors",
        "epoch_11-avg_3.safetensors",
    ]
    sm.merge([f"exp/epoch-{n}.safetensors" for n in (9, 10, 11)], "one.safetensors")
    assert bytes_of("means/epoch_11-avg_3.safetensors") == bytes_of("one.safetensors")


def test_the_best_are_kept_and_no_score_is_asked_for_twice(here: Path) -> None:
    asked: list[str] = []

    def score(path: str) -> float:
        asked.append(Path(path).stem)
        return float(load_safetensors(Path(path))["layer.weight"].abs().sum())

    inputs = ["a.safetensors", "b.safetensors"]
    more: dict[str, Any] = {"random": 6, "integers": "first", "score": score, "keep": "best:2"}
    result = sm.sweep(inputs, "out", **more)
    assert len(asked) == 6
    scores = sorted((each.score or 0.0 for each in result.outputs), reverse=True)
    assert [each.score for each in result.kept] == scores[:2]
    assert result.best is result.kept[0]
    assert {each.stem for each in Path("out").glob("*.safetensors")} == {each.name for each in result.kept}
    with Path("out/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [each.score for each in result.outputs]
    assert sum(row["state"] == "removed" for row in rows) == 4
    again = sm.sweep(inputs, "out", **more)
    assert len(asked) == 6
    assert again.read_bytes == 0
    assert [each.out for each in again.kept] == [each.out for each in result.kept]


def test_an_interrupted_sweep_goes_on(here: Path) -> None:
    inputs = ["a.safetensors", "b.safetensors"]

    class Stop(BaseException):
        pass

    seen = 0

    def stopping(event: Any) -> None:
        nonlocal seen
        seen += isinstance(event, TaskDone)
        if seen == 12:
            raise Stop

    with pytest.raises(Stop):
        sm.sweep(inputs, "out", weights=WEIGHTS, integers="first", listener=stopping)
    assert not list(Path("out").glob("*.safetensors"))
    result = sm.sweep(inputs, "out", weights=WEIGHTS, integers="first")
    for each, weights in zip(result.kept, WEIGHTS, strict=True):
        sm.merge(inputs, "one.safetensors", weights=weights, integers="first", overwrite=True)
        assert bytes_of(each.out) == bytes_of("one.safetensors")
    assert sorted(each.name for each in Path("out").iterdir()) == [
        "sweep.csv",
        "sweep.json",
        *sorted(Path(each.out).name for each in result.kept),
    ]


def test_what_is_there_is_not_made_again_and_strangers_stay(here: Path) -> None:
    inputs = ["a.safetensors", "b.safetensors"]
    sm.sweep(inputs, "out", weights=WEIGHTS[:2], integers="first")
    before = Path("out/weight_0.5_0.5.safetensors").stat().st_mtime_ns
    result = sm.sweep(inputs, "out", weights=WEIGHTS, integers="first")
    assert [each.state for each in result.outputs] == ["there", "there", "made"]
    assert Path("out/weight_0.5_0.5.safetensors").stat().st_mtime_ns == before
    save_file({"x": torch.ones(2)}, "out/weight_1.5_-0.5.safetensors")
    with pytest.raises(sm.RecipeError, match="is not what this sweep would make"):
        sm.sweep(inputs, "out", weights=WEIGHTS, integers="first")


def test_nan_is_told_and_stops_all(here: Path) -> None:
    state = trained(2)
    state["layer.bias"][3] = float("nan")
    save_file(state, "bad.safetensors")
    save_file(trained(1), "good.safetensors")
    inputs = ["good.safetensors", "bad.safetensors"]
    with pytest.raises(sm.VerifyError, match=r"layer\.bias: 1 in bad\.safetensors"):
        sm.sweep(inputs, "out", weights=WEIGHTS, integers="first")
    assert not list(Path("out").glob("*.safetensors"))
    result = sm.sweep(inputs, "out", weights=WEIGHTS, integers="first", allow_nonfinite=True)
    sm.merge(inputs, "one.safetensors", weights=WEIGHTS[0], integers="first", allow_nonfinite=True)
    assert bytes_of(result.outputs[0].out) == bytes_of("one.safetensors")


def test_a_greedy_soup_takes_what_does_not_harm(here: Path) -> None:
    values = {"good": 1.0, "fair": 1.4, "far": 9.0, "other": 0.7}
    for name, value in values.items():
        save_file({"w": torch.full((10,), value)}, f"{name}.safetensors")

    def score(path: str) -> float:
        return -abs(float(load_safetensors(Path(path))["w"].mean()) - 1.0)

    inputs = [f"{name}.safetensors" for name in values]
    result = sm.sweep(inputs, "soup", soup="greedy", score=score)
    tried = [each.settings["models"] for each in result.outputs if "round" in each.settings]
    assert tried == ["1+4", "1+2", "1+3"]  # the best alone is never beaten
    assert result.best is not None
    assert result.best.out == "good.safetensors"
    assert result.kept == ()
    values["good"] = 1.1
    save_file({"w": torch.full((10,), 1.1)}, "good.safetensors")
    result = sm.sweep(inputs, "second", soup="greedy", score=score)
    (kept,) = result.kept
    assert kept.settings["models"] in ("1+4", "1+4+2")
    assert kept.score is not None
    assert kept.score >= max(each.score or -9 for each in result.outputs if each.name.startswith("input"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "a sweep varies something"),
        ({"weights": [[0.5, 0.5], [0.5, 0.5]]}, "two merges of the sweep are the same: weight_0.5_0.5"),
        ({"weights": WEIGHTS, "keep": "best:2"}, "need scores; pass `score`"),
        ({"weights": WEIGHTS, "keep": "worst", "score": "x {}"}, "`keep` takes best:N"),
        ({"weights": WEIGHTS, "score": "x"}, "`score` takes a command with {}"),
        ({"parameters": {"t": "0.2:0.8"}, "method": "slerp"}, "a range without a step"),
        ({"parameters": {"t": "0.8:0.2:0.1"}, "method": "slerp"}, "is no range"),
        ({"weights": [[0.5]]}, "1 weight for 2 inputs"),
        ({"epochs": "1:2"}, "has no number in its name"),
        ({"weights": WEIGHTS, "score": "false {}"}, "ended with code 1"),
        ({"weights": WEIGHTS, "score": "echo none {} | tr -d 0-9"}, "printed no number"),
    ],
)
def test_what_cannot_be_made_is_refused(here: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises((sm.RecipeError, sm.TaskError)) as caught:
        sm.sweep(["a.safetensors", "b.safetensors"], "out", integers="first", **asked)
    assert said in str(caught.value)


def test_the_command_reports_as_json(here: Path, cli: Cli) -> None:
    words = ("a.safetensors", "b.safetensors", "--weights", "0.5,0.5", "-p", "weight=0.6,0.4", "--integers", "first")
    dry = cli("sweep", *words, "-o", "out", "--dry-run").stdout
    assert "2 merges in out: read" in dry
    assert not Path("out").exists()
    found = json.loads(cli("sweep", *words, "-o", "out", "--format", "json").stdout)
    assert [each["settings"] for each in found["outputs"]] == [{"weight": "0.5,0.5"}, {"weight": "0.6,0.4"}]
    assert found["reads"] == 1
    assert found["peak_bytes"] < found["memory_bytes"]


def test_inputs_are_hashed_once(here: Path) -> None:
    told: list[Any] = []
    inputs = ["a.safetensors", "b.safetensors"]
    result = sm.sweep(inputs, "out", weights=WEIGHTS, integers="first", hash=True, listener=told.append)
    assert sum(isinstance(event, Hashed) for event in told) <= 2
    sm.merge(inputs, "one.safetensors", weights=WEIGHTS[2], integers="first", hash=True)
    assert bytes_of(result.outputs[2].out) == bytes_of("one.safetensors")


MODELS = """
base_model: base-llm
models:
- model: base-llm
- model: a-llm
  parameters: {weight: 0.4, density: [{filter: mlp, value: [0.2, 0.8]}]}
- model: b-llm
  parameters: {weight: [0.3, 0.9]}
"""
RULES = """
rules:
- match: "*embed*"
  copy: b-llm
- match: "*layers.1.*"
  parameters: {density: 0.9}
- match: "*norm*"
  merge_method: slerp
  parameters: {t: 0.25}
"""
SLICES = """
base_model: a-llm
slices:
- sources: [{model: a-llm, layer_range: [0, 2]}, {model: b-llm, layer_range: [1, 3]}]
  parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}]}
- sources: [{model: a-llm, layer_range: [2, 3]}, {model: b-llm, layer_range: [0, 1]}]
"""
STAGE = """
stages:
  half:
    merge_method: linear
    models: [{model: a-llm}, {model: b-llm}]
models: [{model: half, parameters: {weight: 0.5}}, {model: base-llm}]
"""
PARAMETERS = "parameters: {NAME: VALUE}\n"


def llm(name: str, seed: int, layers: int = 3) -> None:
    make = torch.Generator().manual_seed(seed)
    state = {"model.embed_tokens.weight": torch.randn(9, 8, generator=make)}
    for layer in range(layers):
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
            state[f"model.layers.{layer}.{part}.weight"] = torch.randn(64, 8, generator=make)
    Path(name).mkdir()
    save_file(state, f"{name}/model.safetensors", metadata={"format": "pt"})
    Path(name, "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 9}))
    tokens = {token: n for n, token in enumerate(f"abcdefgh{seed}")}
    tree = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": tokens, "merges": []}}
    Path(name, "tokenizer.json").write_text(json.dumps(tree))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base-llm", "a-llm", "b-llm"), start=1):
        llm(name, seed)


@pytest.mark.parametrize(
    ("recipe", "name", "values"),
    [
        ("merge_method: ties\n" + MODELS + RULES + PARAMETERS, "density", ["0.3", "0.6"]),
        ("merge_method: ties\n" + MODELS + RULES, "lambda", ["0.5", "1.5", "2.5"]),
        ("merge_method: dare_linear\nseed: 4\n" + MODELS + PARAMETERS, "density", ["0.3", "0.6"]),
        ("merge_method: slerp\n" + SLICES + PARAMETERS, "t", ["0.1", "0.7"]),
        ("merge_method: linear\n" + STAGE, "normalize", ["true", "false"]),
        ("merge_method: ties\ntokenizer_source: union\n" + MODELS + PARAMETERS, "density", ["0.2", "0.7"]),
        ("merge_method: della\ndtype: bfloat16\n" + MODELS, "epsilon", ["0.05", "0.1"]),
    ],
    ids=["rules", "rules-lambda", "drawn", "slices", "stages", "tokens", "recast"],
)
@pytest.mark.parametrize("ways", [{}, {"io": "pread", "workers": 1, "memory": "40MiB"}], ids=["mmap", "pread"])
@pytest.mark.sampled(2, by="recipe")
def test_any_recipe_is_swept(models: None, recipe: str, name: str, values: list[str], ways: dict[str, Any]) -> None:
    written = recipe.replace("NAME", name).replace("VALUE", "0.5")
    Path("recipe.yaml").write_text(written)
    result = sm.sweep("recipe.yaml", "out", parameters={name: values}, **ways)
    assert result.reads == 1
    assert [each.settings for each in result.outputs] == [{name: value} for value in values]
    contents = set()
    for each, value in zip(result.kept, values, strict=True):
        with_value = recipe.replace("NAME", name).replace("VALUE", value)
        Path("one.yaml").write_text(with_value if "NAME" in recipe else f"{recipe}\nparameters: {{{name}: {value}}}\n")
        sm.merge("one.yaml", "one", overwrite=True)
        assert bytes_of(each.out) == bytes_of("one")
        contents.add(bytes_of(each.out)["model.safetensors"])
    assert len(contents) == len(values)
    sm.verify(result.kept[0].out, inputs=".", sample="100%")


def test_a_recipe_is_read_as_often_as_one_merge(models: None) -> None:
    Path("recipe.yaml").write_text("merge_method: ties\n" + MODELS + RULES + PARAMETERS.replace("NAME: VALUE", ""))
    # Where a method makes passes, each output looks at a tensor by itself, right after the others.
    told: list[Any] = []
    once = sm.merge("recipe.yaml", "one", io="pread")
    result = sm.sweep("recipe.yaml", "out", parameters={"density": "0.2:0.8:0.2"}, io="pread", listener=told.append)
    assert len(result.kept) == 4
    assert sum(e.read_bytes for e in told if isinstance(e, TaskDone)) == once.plan.read_bytes
    assert once.read_bytes <= result.read_bytes <= 4 * once.read_bytes


@pytest.mark.parametrize("stops", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_long_tensors_with_passes_are_made_one_after_the_other_by_all_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "a", "b")):
        make = torch.Generator().manual_seed(number)
        shapes = {"first": (1025, 4096), "second": (2050, 2048), "short": (70, 70)}
        save_file({k: torch.randn(shape, generator=make) for k, shape in shapes.items()}, f"{name}.safetensors")
    asked: dict[str, Any] = {"base": "base.safetensors", "method": "ties", "workers": 2}
    order: list[str] = []

    def told(event: object) -> None:
        if isinstance(event, TaskDone) and event.tensor in ("first", "second"):
            order.append(event.tensor)
            if stops and len(order) == 3:
                raise KeyboardInterrupt

    def run(listener: Any = lambda event: None) -> Any:
        parameters = {"density": ["0.2", "0.6"]}
        return sm.sweep(["a.safetensors", "b.safetensors"], "out", parameters=parameters, listener=listener, **asked)

    if stops:
        with pytest.raises(KeyboardInterrupt):
            run(told)
        result = run()
    else:
        result = run(told)
        assert order == 4 * ["first"] + 4 * ["second"]  # two outputs, two pieces of each
        assert any("one after the other while a tensor is in the system's cache" in note for note in result.notes)
    for each in result.kept:
        sm.merge(
            ["a.safetensors", "b.safetensors"],
            "one.safetensors",
            parameters={"density": float(each.settings["density"])},
            overwrite=True,
            **asked,
        )
        assert Path(each.out).read_bytes() == Path("one.safetensors").read_bytes()


def test_the_weights_of_a_recipe_are_those_of_its_models(models: None, cli: Cli) -> None:
    Path("recipe.yaml").write_text("merge_method: ties\nparameters: {density: 0.5}\n" + MODELS + RULES)
    found = cli("sweep", "recipe.yaml", "--weights", "0.3,0.7", "-p", "weight=0.9,0.1", "-o", "out").stdout
    assert "weight" in found.splitlines()[0]
    names = ["sweep.csv", "sweep.json", "weight_0.3_0.7", "weight_0.9_0.1"]
    assert sorted(each.name for each in Path("out").iterdir()) == names
    own = Path("recipe.yaml").read_text().replace("weight: 0.4", "weight: 0.9").replace("[0.3, 0.9]", "0.1")
    Path("one.yaml").write_text(own)
    sm.merge("one.yaml", "one")
    assert bytes_of("out/weight_0.9_0.1") == bytes_of("one")
    drawn = sm.sweep("recipe.yaml", "drawn", random=3, seed=2)
    assert [len(each.settings["weight"].split(",")) for each in drawn.outputs] == [2, 2, 2]
    data = cli("inspect", "one", "--recipe").stdout
    typed = CliRunner().invoke(command_line, ["sweep", "-", "--weights", "1,2", "-o", "typed", "--dry-run"], input=data)
    assert typed.stdout.startswith("1 merge in typed")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"epochs": "1:2"}, "epochs beside a recipe"),
        ({"soup": "greedy", "score": "x {}"}, "soup beside a recipe"),
        ({"method": "ties", "base": "base-llm", "random": 2}, "method, base beside a recipe"),
        ({}, "a sweep varies something"),
        ({"parameters": {"density": ["0.1", "0.2"]}}, "linear has no parameter density"),
        ({"normalize": False, "parameters": {"normalize": "true"}}, "`normalize` and the parameter normalize"),
        ({"out": None, "random": 2}, "pass `out`"),
    ],
)
def test_what_a_recipe_says_itself_is_refused(models: None, asked: dict[str, Any], said: str) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a-llm"}, {"model": "b-llm"}]}
    with pytest.raises(sm.RecipeError) as caught:
        sm.sweep(recipe=recipe, **{"out": "out", **asked})
    assert said in str(caught.value)


def test_adapters_alone_are_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(name).mkdir()
        factors = {f"base_model.model.m.lora_{k}.weight": torch.ones(*s) for k, s in (("A", (2, 8)), ("B", (8, 2)))}
        save_file(factors, f"{name}/adapter_model.safetensors")
        Path(name, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(sm.RecipeError, match="adapters alone"):
        sm.sweep(["a", "b"], "out", weights=[[0.5, 0.5], [0.4, 0.6]])
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(sm.RecipeError, match="adapters alone"):
        sm.sweep(recipe=recipe, out="out", weights=[[0.5, 0.5], [0.4, 0.6]])


def test_a_sweep_that_is_refused_leaves_no_folder(here: Path) -> None:
    for folder in ("a/new", "new/folder"):
        with pytest.raises(sm.StreammergeError):
            sm.sweep(["a", "b" if folder[0] == "a" else "a.safetensors:x"], folder, weights=[[0.5, 0.5], [0.3, 0.7]])
    assert not Path("a/new").exists()
    Path("empty").mkdir()
    with pytest.raises(sm.StreammergeError):
        sm.sweep(["a", "absent"], "empty", weights=[[0.5, 0.5]])
    assert Path("empty").is_dir()
