"""Recipe files: what they accept, what they refuse and where, and that every command can be saved as a recipe."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import mergekit_cases
import pytest
import torch
import yaml
from conftest import Cli, load_safetensors, octets, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import streammerge as sm
from streammerge.recipe.document import parse_yaml, to_yaml
from streammerge.recipe.reader import json_schema, read_recipe

ROOT = Path(__file__).parents[2]


def refused(text: str) -> list[str]:
    """Returns the mistakes that reading a recipe reports, each as printed."""
    Path("recipe.yaml").write_text(text)
    with pytest.raises(sm.RecipeError) as caught:
        read_recipe("recipe.yaml")
    lines = str(caught.value).splitlines()
    return [line.strip() for line in lines[1:]] if len(lines) > 1 else lines


TEN = """\
merge_metod: linear
merge_method: tie
base_model: base.safetensors
models:
  - model: a.safetensors
    parameters: {weigth: 0.5, density: half}
  - model: nowhere.safetensors
  - model: org/name@main
    parameters:
      weight:
        - {filtre: mlp, value: 0.5}
chat_template: chatmll
seed: many
rules:
  - match: "/(/"
    drop: true
  - match: "*.bias"
    copy: a.safetensors
    drop: true
  - match: "*y"
    merge_method: slerp
    parameters: {tt: 0.3, t: 0.1}
on_shape: stretch
output: {max_shard_size: big}
"""


def test_every_mistake_is_told_at_once_each_with_its_place(models: Path) -> None:
    told = refused(TEN)
    expected = {
        "1:1": "merge_metod; did you mean merge_method?",
        "2:1": "tie; did you mean ties?",
        "6:18": "weigth; did you mean weight?",
        "6:31": "density takes a number, not half",
        "7:5": "nowhere.safetensors does not exist",
        "8:5": "org/name@main does not exist, and the hub's cache does not hold it",
        "11:12": "unknown key filtre",
        "12:1": "chat_template takes auto, alpaca, chatml",
        "13:1": "seed takes a whole number, not many",
        "15:5": "not a regular expression",
        "17:5": "a rule does one thing, not copy and drop",
        "20:5": "slerp merges exactly 2 models, not 3",
        "22:18": "slerp has no parameter tt; did you mean t?",
        "23:1": "on_shape takes one of error, base, rows, leading, not stretch",
        "24:10": "'big' is not a size",
    }
    assert len(told) == len(expected)
    for line, (place, words) in zip(told, expected.items(), strict=True):
        assert line.startswith(f"recipe.yaml:{place}: "), line
        assert words in line


LINEAR = "merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("models: [\n a: b\n", "3:1", "this is not YAML"),
        ("a: b: c\n", "1:5", "this is not YAML"),
        ("", "", "is empty"),
        ("# nothing\n", "", "is empty"),
        ("- a\n- b\n", "1:1", "takes keys like merge_method"),
        ("just text\n", "1:1", "takes keys like merge_method"),
        (LINEAR + "---\n" + LINEAR, "4:1", "two documents have no name"),
        ("name: a\n" + LINEAR + "---\nname: a\n" + LINEAR + "---\n" + LINEAR, "5:1", "a second document has the name a"),
        (LINEAR + "seed: 1\nseed: 2\n", "4:1", "is given twice"),
        ("merge_method: linear\nmodels: &a [*a]\n", "2:1", "nested or repeated too much"),
        ("models: [{model: a.safetensors}]\n", "1:1", "needs merge_method"),
        ("merge_method: linear\n", "1:1", "nothing to merge"),
        ("merge_method: linear\nmodels: 3\n", "2:1", "takes a list, not 3"),
        (LINEAR + "slices: [{sources: [{model: a.safetensors, layer_range: [0, 1]}]}]\n", "3:1", "one of models"),
        (LINEAR.replace("{model: b.safetensors}", "3"), "2:34", "with their values, not 3"),
        (
            LINEAR.replace("a.safetensors", "{model: {path: a.safetensors, revision: x}}"),
            "2:11",
            "what lies on a disk has no revisions",
        ),
        (LINEAR.replace("a.safetensors", "a.safetensors+lora"), "2:11", "exists, but the adapter lora does not"),
        (LINEAR.replace("a.safetensors", "org/name"), "2:11", "org/name does not exist, and the hub"),
        (LINEAR + "chat_template: short {\n", "3:1", "or the text of a Jinja template"),
        (LINEAR + "tokenizer: {source: base, tokens: {x: {source: {kind: none}}}}\n", "3:49", "model_token or zero"),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 0}\n", "3:13", "a positive whole number, not 0"),
        (LINEAR + "tokenizer: {source: nowhere}\n", "3:1", "nowhere does not exist"),
        (LINEAR + "tokenizer: {source: base}\ntokenizer_source: base\n", "3:1", "a recipe has one of them"),
        (LINEAR + "dtype: int8\n", "3:1", "floating-point dtype, not int8"),
        (LINEAR + "compute_dtype: bfloat16\n", "3:1", "float32 or float64"),
        (LINEAR + "parameters: {normalize: perhaps}\n", "3:14", "takes true or false"),
        (LINEAR + "parameters: {densty: 1}\n", "3:14", "linear has no parameter densty"),
        (LINEAR + "parameters: {weight: [1, [2]]}\n", "3:14", "a number, a truth value or a word"),
        (LINEAR + "parameters: {weight: [{pattern: mlp, value: 1}]}\n", "3:24", "did you mean filter?"),
        (LINEAR + "parameters: {weight: {filter: mlp}}\n", "3:14", "a filter needs a value"),
        (LINEAR + "parameters: {weight: [{value: 1}, 2]}\n", "3:35", "is not a filter"),
        (LINEAR + "parameters: {weight: {filter: 3, value: 1}}\n", "3:23", "part of a tensor's name"),
        (LINEAR + "rules: [{drop: true}]\n", "3:9", "needs match"),
        (LINEAR + "rules: [{match: x, drop: true, dtype: float32}]\n", "3:9", "has no dtype"),
        (LINEAR + "rules: [{match: x, merge_method: ties}]\n", "3:9", "name it as base_model"),
        (LINEAR.replace("linear", "slerp"), "1:1", "slerp needs the parameter t"),
        (LINEAR.replace("linear", "ties"), "1:1", "needs the models' common ancestor"),
        (LINEAR + "base_model: base.safetensors\n", "3:1", "linear takes no base"),
        (LINEAR.replace("linear", "os:system"), "1:1", "`own_methods=True` lets a recipe import it"),
    ],
)
def test_mistakes(text: str, place: str, words: str, models: Path) -> None:
    told = refused(text)
    assert len(told) == 1, told
    assert told[0].startswith(f"recipe.yaml:{place}: " if place else "recipe.yaml "), told
    assert words in told[0]


SLICES = "merge_method: {}\nslices:\n- sources:\n  - {{model: a.safetensors, layer_range: {}}}\n{}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SLICES.format("passthrough", "[2, 0]", ""), "layer_range takes the first layer"),
        (SLICES.format("passthrough", "[-1, 2]", ""), "layer_range takes the first layer"),
        (SLICES.format("passthrough", "[0]", ""), "layer_range takes the first layer"),
        (SLICES.format("passthrough", "three", ""), "layer_range takes the first layer"),
        (SLICES.format("linear", "[0, 2]", "  - {model: b.safetensors, layer_range: [0, 1]}\n"), "same number of layers"),
        (SLICES.format("passthrough", "[0, 2]", "  - {model: b.safetensors, layer_range: [0, 2]}\n"), "exactly 1 model"),
        (SLICES.format("ties", "[0, 2]", "base_model: base.safetensors\n"), "must be among the sources"),
        ("merge_method: linear\nmodules: {m: {}}\n", "either models or slices"),
        ("merge_method: linear\nslices: [{sources: []}]\n", "sources takes a list, not nothing"),
        (SLICES.format("passthrough", "[0, 2]", "  residual_weigth: 3\n"), "did you mean residual_weight?"),
    ],
)
def test_mistakes_in_slices_and_modules(text: str, words: str, models: Path) -> None:
    assert any(words in line for line in refused(text))


def test_a_recipe_that_is_no_text_or_too_long(models: Path) -> None:
    Path("recipe.yaml").write_bytes(b"merge_method: \xff\xfe\n")
    with pytest.raises(sm.RecipeError, match="is not UTF-8 text"):
        read_recipe("recipe.yaml")
    Path("recipe.yaml").write_text("#" * (17 << 20))
    with pytest.raises(sm.RecipeError, match="bytes, beyond the limit"):
        read_recipe("recipe.yaml")
    with pytest.raises(sm.RecipeError, match=r"absent\.yaml does not exist"):
        read_recipe("absent.yaml")
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    assert "nested or repeated too much" in refused(laughs)[0]


@pytest.mark.parametrize(
    "text",
    [
        LINEAR + "output: {<<: 3}\n",
        LINEAR + f"output: {{max_shard_size: {'9' * 400}}}\n",
        LINEAR + f"parameters: {{weight: {'9' * 400}}}\n",
        LINEAR + f"seed: {'9' * 400}.5\n",
        LINEAR.replace("b.safetensors", '"b\\0"'),
        SLICES.format("passthrough", "[0, .inf]", ""),
        SLICES.format("passthrough", "{0: 1, 1: 2}", ""),
        LINEAR + "rules: [{match: []}]\n",
        LINEAR + "? [a, b]\n: c\n",
        LINEAR + "seed: !!python/object/apply:os.system [x]\n",
    ],
)
def test_odd_values_are_one_sentence(text: str, models: Path) -> None:
    assert all(line.startswith("recipe.yaml:") for line in refused(text))


def test_merge_keys_are_no_bomb(models: Path) -> None:
    nested = "&m0 {model: a.safetensors}"
    for level in range(1, 40):
        nested = f"&m{level} {{<<: [{nested}{f', *m{level - 1}' * 8}]}}"
    began = time.process_time()
    assert "nested or repeated too much" in refused(f"merge_method: linear\nmodels: [{nested}]\n")[0]
    assert time.process_time() - began < 20


def test_mistakes_beside_one_that_hides_the_method(models: Path) -> None:
    told = refused(
        "merge_method: xyzzyqq\nmodels:\n- {model: 3, parameters: {weight: [[1]]}}\n- {model: absent}\n"
        "rules: [{match: x, drop: true, dtype: float32}]\n"
    )
    assert [line.split(": ")[0] for line in told] == [f"recipe.yaml:{p}" for p in ("1:1", "3:4", "3:27", "4:4", "5:9")]


def test_a_method_of_ones_own_keeps_its_place(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(
        "import streammerge as sm\n@sm.merge_method('linear', passes=False)\n"
        "def first(group):\n    return lambda chunk: chunk.models[0]\n"
    )
    monkeypatch.syspath_prepend(str(models))
    saved = sm.plan(["a.safetensors", "b.safetensors"], method="mine:first").recipe.to_dict()
    assert saved["merge_method"] == "mine:first"
    assert read_recipe(saved, own_methods=True).to_dict() == saved
    assert saved["merge_method"] == "mine:first", "the caller's data is left alone"


def assert_a_recipe_or_one_error(data: dict[str, Any]) -> None:
    """Accepts only a recipe that reads back equal, or an error with a message."""
    try:
        recipe = read_recipe(data)
    except sm.RecipeError as error:
        assert str(error).strip()
    else:
        assert read_recipe(recipe.to_dict()) == recipe


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("latin-1")))
def test_any_text_is_a_recipe_or_one_error(text: str) -> None:
    try:
        document = parse_yaml(text, "recipe.yaml")
    except sm.RecipeError as error:
        assert str(error).startswith("recipe.yaml")
    else:
        assert_a_recipe_or_one_error({"merge_method": "linear", "models": document.data})


_PLAIN = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.sampled_from(["linear", "a"])
)
_KEYS = st.sampled_from(
    [
        "merge_method",
        "models",
        "model",
        "slices",
        "sources",
        "layer_range",
        "modules",
        "base_model",
        "parameters",
        "weight",
        "value",
        "filter",
        "rules",
        "match",
        "copy",
        "drop",
        "dtype",
        "output",
        "max_shard_size",
        "seed",
        "on_missing",
        "t",
    ]
)
_DATA = st.recursive(
    _PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.text(max_size=3), inner, max_size=4)
)


@settings(deadline=None, max_examples=300)
@given(data=st.dictionaries(_KEYS, _DATA, max_size=6))
def test_any_data_is_a_recipe_or_one_error(data: dict[str, Any]) -> None:
    assert_a_recipe_or_one_error(data)


# ------------------------------------------------------------------------------------------------- the schema


def without_methods(schema: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Returns the schema without the names of methods and their parameters, and these names."""
    rest, names = copy.deepcopy(schema), set[str]()
    for form in rest["$defs"].values():
        for choice in form.get("properties", {}).get("merge_method", {}).get("anyOf", ()):
            names |= set(choice.pop("enum", ()))
    return rest, names | rest["$defs"]["parameters"].pop("properties").keys()


def test_the_schema_in_the_repository_is_the_one_of_the_code() -> None:
    """A new method needs no other file, so the file may lack names of methods. It has none that are gone."""
    said, of_code = (
        without_methods(each) for each in (json.loads((ROOT / "recipe.schema.json").read_text()), json_schema())
    )
    assert said[0] == of_code[0], "run scripts/schema"
    assert len(said[1]) > 30
    assert said[1] <= of_code[1], "run scripts/schema"


def test_the_schema_knows_what_the_reader_knows() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for text in mergekit_cases.CASES.values():
        validator.validate(yaml.safe_load(text))
    good = yaml.safe_load(EVERYTHING)
    validator.validate(good)
    for bad in (
        {**good, "modles": []},
        {**good, "merge_method": "tie"},
        {**good, "on_missing": "whatever"},
        {**good, "rules": [{"drop": True}]},
        {**good, "models": []},
        {**good, "models": [{"model": "a", "parameters": {"weight": {"filtre": "x", "value": 1}}}]},
    ):
        assert list(validator.iter_errors(bad)), bad


# ------------------------------------------------------------------------------------------- the same recipe

EVERYTHING = """\
merge_method: ties
models:
- model: a.safetensors
  parameters:
    weight:
    - filter: layer
      value: [0.25, 0.75]
    - value: 0.5
    density: 0.5
- model: b.safetensors
  parameters:
    weight: 2.0
base_model: base.safetensors
parameters:
  normalize: true
  density: 0.75
rules:
- match: ['*.bias', /^one$/]
  parameters:
    weight: [0.5, 0.25]
- match: [scale]
  merge_method: slerp
  parameters:
    t: 0.5
- match: [embed.weight]
  copy: b.safetensors
- match: [empty]
  dtype: float64
- match: [mask]
  drop: true
out_dtype: float32
compute_dtype: float64
on_missing: base
on_shape: rows
integers: first
allow_nonfinite: true
output:
  max_shard_size: 5000000
seed: 3
"""


def test_a_recipe_goes_to_text_and_back(models: Path) -> None:
    Path("recipe.yaml").write_text(EVERYTHING)
    recipe = read_recipe("recipe.yaml")
    assert to_yaml(recipe.to_dict()) == EVERYTHING
    assert read_recipe(recipe.to_dict()) == recipe
    assert all(sm.plan(recipe="recipe.yaml").taken)


def test_the_recipe_travels_in_a_pth_too(voices: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    cli("merge", "news.pth", "audiobook.pth", "--weights", "0.6,0.4", "-o", "voice.pth")
    saved = cli("inspect", "voice.pth", "--recipe").stdout
    assert yaml.safe_load(saved)["models"] == [
        {"model": "news.pth", "parameters": {"weight": 0.6}},
        {"model": "audiobook.pth", "parameters": {"weight": 0.4}},
    ]
    (tmp_path / "saved.yaml").write_text(saved)
    cli("merge", "saved.yaml", "-o", "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "voice.pth").read_bytes()
    for mmap in (False, True):
        assert torch.load(tmp_path / "voice.pth", weights_only=True, mmap=mmap)["step"] == 30
    assert "carries no recipe" in cli("inspect", "news.pth", "--recipe", code=2).stderr


def test_a_copy_with_parts_of_another_model_carries_its_recipe(models: Path) -> None:
    rules = [{"match": "layer.*", "copy": "b.safetensors"}]
    wish = {"merge_method": "copy", "models": [{"model": "a.safetensors"}], "rules": rules}
    sm.merge(recipe=wish, out="one/")
    assert octets(load_safetensors(Path("one/model.safetensors"))["layer.bias"]) == octets(trained(2)["layer.bias"])
    sm.merge(recipe="one/streammerge.yaml", out="two/")
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


def test_own_methods_are_not_imported_on_a_files_word(models: Path, cli: Cli) -> None:
    Path("own.py").write_text("open('canary', 'w').close()\ndef first(group):\n    return lambda chunk: chunk.models[0]\n")
    Path("recipe.yaml").write_text(LINEAR.replace("linear", "own:first"))
    assert "is not a built-in method" in cli("plan", "recipe.yaml", code=2).stderr
    assert not Path("canary").exists()
    cli("merge", "recipe.yaml", "-o", "out.safetensors", "--own-methods")
    assert octets(load_safetensors(Path("out.safetensors"))["scale"]) == octets(trained(1)["scale"])


def test_reading_a_recipe_imports_no_torch(models: Path) -> None:
    Path("recipe.yaml").write_text(LINEAR)
    code = "import sys, streammerge as sm; sm.plan(recipe='recipe.yaml'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ------------------------------------------------------------------------------------------------ the examples


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_do_what_they_say(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = yaml.safe_load(example.read_text())
    jsonschema.validate(data, json_schema())
    named = [data.get("base_model"), *(m["model"] for m in data.get("models", []))]
    named += [source["model"] for each in data.get("slices", []) for source in each["sources"]]
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(32)] + [
        "model.embed_tokens.weight",
        "gpt.conditioning_encoder.init.weight",
        "gpt.norm.bias",
        "hifigan_decoder.conv.weight",
        "dvae.codebook",
    ]
    for seed, name in enumerate(filter(None, dict.fromkeys(named))):
        make = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(4, 4, generator=make) for n in names}
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
            (path / "config.json").write_text('{"num_hidden_layers": 32}')
        else:
            averaged = {n: tensor.clone() for n, tensor in tensors.items()}
            torch.save({"model": tensors, "model_avg": averaged, "step": seed}, path)
    out = example.read_text().partition(" -o ")[2].split()[0]
    result = sm.merge(recipe=example, out=out)
    assert all(result.plan.taken)
    if example.stem == "icefall-average":
        ends = [torch.load(tmp_path / f"exp/epoch-{n}.pt")["model_avg"]["gpt.norm.bias"].double() for n in (30, 10)]
        expected = ((60000 * ends[0] - 20000 * ends[1]) / 40000).float()
        made = torch.load(tmp_path / out)
        assert octets(made["model"]["gpt.norm.bias"]) == octets(expected), "what icefall reads"
        assert octets(made["model_avg"]["gpt.norm.bias"]) == octets(expected)
    if example.stem == "frankenmerge":
        assert json.loads((tmp_path / out / "config.json").read_text())["num_hidden_layers"] == 48


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            LINEAR + "embed_slerp: true\n",
            "3:1: a recipe has no key embed_slerp, so it is ignored, as in mergekit; embeddings",
        ),
        (LINEAR + "random_seed: 3\n", "3:1: a recipe has no key random_seed, so it is ignored, as in mergekit; `seed` is"),
        (
            LINEAR + "int8_mask: true\n",
            "3:1: a recipe has no key int8_mask, so it is ignored, .*; a parameter stands under",
        ),
        (LINEAR + "license: mit\n", "3:1: a recipe has no key license, so it is ignored, as in mergekit$"),
        (
            LINEAR + "parameters: {density: 0.5}\n",
            "3:14: linear has no parameter density; it has weight, normalize, so density",
        ),
        (
            LINEAR + "parameters: {embed_slerp: on}\n",
            "3:14: linear has no parameter embed_slerp; .* is ignored, as in mergekit$",
        ),
        (
            LINEAR.replace("b.safetensors}", "b.safetensors, weight: 2}"),
            r"2:\d+: an entry of models has no key weight, so it is",
        ),
        (LINEAR.replace("b.safetensors}", "b.safetensors, parameters: {normalize: 0}}"), r"2:\d+: normalize cannot differ"),
        (LINEAR.replace("b.safetensors}", "b.safetensors, parameters: {weight: 2}}"), "a.safetensors has no weight beside"),
        (LINEAR + "parameters: {weight: {value: 1, layers: 3}}\n", r"3:\d+: a filter has no key layers, so it is ignored"),
    ],
)
def test_what_mergekit_ignores_is_ignored_and_told(text: str, said: str, models: Path) -> None:
    (models / "recipe.yaml").write_text(text)
    (found,) = read_recipe("recipe.yaml").ignored
    assert re.search(said, found), found
    assert found in sm.plan(recipe="recipe.yaml").warnings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LINEAR + "parameter: {weight: 1}\n", "did you mean parameters?"),
        (LINEAR + "max_shard_size: 1GB\n", "unknown key max_shard_size; it stands under output"),
        (
            LINEAR.replace("b.safetensors}", "b.safetensors, lora: c}"),
            "unknown key lora; it stands under model, as in `model: BASE+ADAPTER`",
        ),
        (LINEAR + "parameters: {densty: 0.5}\n", "linear has no parameter densty"),
        (LINEAR.replace("b.safetensors}", "b.safetensors, parametres: {weight: 2}}"), "did you mean parameters?"),
        ("genome: {models: []}\n", "a configuration of mergekit-evolve"),
        ("layer_slices: []\n", "a configuration of bakllama"),
    ],
)
def test_what_is_probably_misspelled_stops(text: str, said: str, models: Path) -> None:
    assert said in refused(text)[0]
