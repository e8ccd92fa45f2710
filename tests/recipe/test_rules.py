"""Rules per tensor, policies for disagreements, folders, and other people's checkpoints."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, assert_same, load_safetensors, mean, octets, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.tensors.quantised import ADVICE

Tensors = dict[str, torch.Tensor]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, **models: Tensors) -> None:
    for name, tensors in models.items():
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})


def voice_like(seed: int) -> Tensors:
    return {
        "gpt.text_embedding.weight": draw(seed, 30, 8),
        "gpt.encoder.layer.weight": draw(seed + 10, 16, 16),
        "gpt.encoder.layer.bias": draw(seed + 20, 16),
        "gpt.decoder.0.weight": draw(seed + 30, 16, 16),
        "gpt.decoder.norm1.bias": draw(seed + 40, 16),
        "dvae.codebook": draw(seed + 50, 4, 4),
    }


@pytest.fixture
def voices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensors, Tensors]:
    a = voice_like(1)
    b = {name: tensor + 0.1 * draw(7, *tensor.shape) for name, tensor in a.items()}
    saved(tmp_path, a=a, b=b)
    monkeypatch.chdir(tmp_path)
    return a, b


def recipe(**keys: Any) -> dict[str, Any]:
    models = [
        {"model": "a.safetensors", "parameters": {"weight": 0.6}},
        {"model": "b.safetensors", "parameters": {"weight": 0.4}},
    ]
    return {"merge_method": "linear", "models": models, **keys}


class TestRules:
    rules = (
        {"match": "*encoder*", "copy": "a.safetensors"},
        {"match": ["*.bias", "/norm\\d+/"], "parameters": {"weight": [0.25, 0.75]}},
        {"match": "*decoder.*", "merge_method": "slerp", "parameters": {"t": 0.3}},
        {"match": "dvae.*", "drop": True},
        {"match": "*text_embedding*", "dtype": "bfloat16"},
    )

    def test_each_tensor_goes_the_way_of_the_first_rule_that_matches(self, voices: tuple[Tensors, Tensors]) -> None:
        a, b = voices
        result = sm.merge(recipe=recipe(rules=list(self.rules)), out="out.safetensors")
        slerped = "gpt.decoder.0.weight"
        u, v = (t[slerped].double().flatten() for t in (a, b))
        theta = torch.acos(u.dot(v) / (u.norm() * v.norm()))
        expected = {
            "gpt.text_embedding.weight": mean(
                [a["gpt.text_embedding.weight"], b["gpt.text_embedding.weight"]], [0.6, 0.4]
            ).bfloat16(),
            "gpt.encoder.layer.weight": a["gpt.encoder.layer.weight"],
            "gpt.encoder.layer.bias": a["gpt.encoder.layer.bias"],
            "gpt.decoder.norm1.bias": mean([a["gpt.decoder.norm1.bias"], b["gpt.decoder.norm1.bias"]], [0.25, 0.75]),
        }
        made = load_safetensors(Path("out.safetensors"))
        torch.testing.assert_close(
            made.pop(slerped).double().flatten(),
            (torch.sin(0.7 * theta) * u + torch.sin(0.3 * theta) * v) / torch.sin(theta),
            rtol=1e-5,
            atol=1e-6,
        )
        assert octets(made["gpt.text_embedding.weight"]) == octets(expected["gpt.text_embedding.weight"])
        assert_same(made, expected)
        assert result.plan.taken == [2, 1, 1, 1, 1]
        assert not result.warnings

    def test_the_plan_shows_what_each_rule_took(self, voices: tuple[Tensors, Tensors], cli: Cli) -> None:
        rules = [*self.rules, {"match": "*nothing*", "drop": True}, {"match": "*encoder.layer.bias", "drop": True}]
        Path("recipe.yaml").write_text(json.dumps(recipe(rules=rules)))
        shown = cli("plan", "recipe.yaml").stdout
        for line in (
            "rule     *encoder*                  2 copied from a.safetensors",
            "rule     *.bias, /norm\\d+/          1 merged  with weight [0.25, 0.75]",
            "rule     *decoder.*                 1 by slerp  with t 0.3",
            "rule     dvae.*                     1 left out",
            "rule     *text_embedding*           1 merged as bfloat16",
            "rule     *nothing*                  0 left out",
        ):
            assert line.split() in [row.split() for row in shown.splitlines()], shown
        assert "the rule for *nothing* took no tensor: no tensor's name matches" in shown
        assert (
            "the rule for *encoder.layer.bias took no tensor: every tensor that it matches is taken by a rule before it"
            in shown
        )
        told = json.loads(cli("plan", "recipe.yaml", "--format", "json").stdout)["rules"]
        assert [rule["tensors"] for rule in told] == [2, 1, 1, 1, 1, 0, 0]

    def test_a_pth_keeps_its_shape_under_rules(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        a, b = voice_like(1), voice_like(2)
        for name, tensors in (("a", a), ("b", b)):
            torch.save({"config": {"x": 1}, "model": tensors, "step": 3}, f"{name}.pth")
        rules = [{"match": "*encoder*", "copy": "b.pth"}, {"match": "dvae.*", "drop": True}]
        sm.merge(
            recipe={"merge_method": "linear", "models": [{"model": "a.pth"}, {"model": "b.pth"}], "rules": rules},
            out="out.pth",
        )
        made = torch.load("out.pth", weights_only=True)
        assert (made["config"], made["step"]) == ({"x": 1}, 3)
        assert "dvae.codebook" not in made["model"]
        assert octets(made["model"]["gpt.encoder.layer.weight"]) == octets(b["gpt.encoder.layer.weight"])
        assert octets(made["model"]["gpt.decoder.0.weight"]) == octets(
            mean([a["gpt.decoder.0.weight"], b["gpt.decoder.0.weight"]], [1, 1])
        )

    def test_a_copy_may_come_from_a_model_that_is_not_merged(self, voices: tuple[Tensors, Tensors], tmp_path: Path) -> None:
        other = voice_like(9) | {"gpt.text_embedding.weight": draw(9, 50, 8), "more": draw(1, 3)}
        saved(tmp_path, other=other)
        made = sm.merge(
            recipe=recipe(rules=[{"match": "*text_embedding*", "copy": "other.safetensors"}]), out="out.safetensors"
        )
        out = load_safetensors(Path("out.safetensors"))
        assert octets(out["gpt.text_embedding.weight"]) == octets(other["gpt.text_embedding.weight"])
        assert out.keys() == voices[0].keys()
        assert not made.warnings

    def test_what_a_rule_cannot_copy_or_weigh_is_told(self, voices: tuple[Tensors, Tensors], tmp_path: Path) -> None:
        saved(tmp_path, small={"gpt.encoder.layer.bias": draw(1, 16)})
        with pytest.raises(sm.MismatchError, match=r"small.safetensors has no tensor gpt.encoder.layer.weight to copy"):
            sm.plan(recipe=recipe(rules=[{"match": "*encoder*", "copy": "small.safetensors"}]))
        with pytest.raises(sm.RecipeError, match="3 values of weight for 2 models"):
            sm.plan(recipe=recipe(rules=[{"match": "*", "parameters": {"weight": [1, 2, 3]}}]))
        with pytest.raises(sm.RecipeError, match="the rules leave no tensor over"):
            sm.plan(recipe=recipe(rules=[{"match": "*", "drop": True}]))

    def test_a_rule_settles_what_differs(self, voices: tuple[Tensors, Tensors], tmp_path: Path) -> None:
        changed = voices[1] | {"dvae.codebook": draw(1, 5, 4)}
        del changed["gpt.encoder.layer.bias"]
        saved(tmp_path, b=changed)
        with pytest.raises(sm.MismatchError):
            sm.plan(recipe=recipe())
        rules = [{"match": "dvae.*", "drop": True}, {"match": "*encoder*", "copy": "a.safetensors"}]
        assert not sm.plan(recipe=recipe(rules=rules)).warnings


class TestRulesAndBases:
    """A rule's method merges the recipe's models. The base is separate if either method takes it separately."""

    @pytest.fixture
    def models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
        base = {"q.weight": draw(1, 16, 16), "v.weight": draw(2, 16, 16)}
        made = {"base": base}
        for seed, name in enumerate("abc", start=5):
            made[name] = {n: t + 0.1 * draw(seed, 16, 16) for n, t in base.items()}
        saved(tmp_path, **made)
        monkeypatch.chdir(tmp_path)
        return made

    def merged(self, names: str, **keys: Any) -> Tensors:
        listed = [{"model": f"{name}.safetensors"} for name in names.split()]
        sm.merge(recipe={"models": listed, "base_model": "base.safetensors", **keys}, out="out.safetensors", overwrite=True)
        return load_safetensors(Path("out.safetensors"))

    def test_a_rule_without_a_use_for_the_base(self, models: dict[str, Tensors]) -> None:
        rules = [{"match": "q.*", "merge_method": "linear"}]
        made = self.merged("a b", merge_method="task_arithmetic", rules=rules)
        assert octets(made["q.weight"]) == octets(mean([models["a"]["q.weight"], models["b"]["q.weight"]], [1, 1]))
        deltas = models["a"]["v.weight"].double() + models["b"]["v.weight"] - models["base"]["v.weight"]
        torch.testing.assert_close(made["v.weight"].double(), deltas, rtol=1e-5, atol=1e-6)

    def test_a_rule_that_alone_needs_the_base(self, models: dict[str, Tensors]) -> None:
        rules = [{"match": "q.*", "merge_method": "task_arithmetic"}]
        made = self.merged("a b", merge_method="linear", rules=rules)
        assert octets(made["v.weight"]) == octets(mean([models["a"]["v.weight"], models["b"]["v.weight"]], [1, 1]))
        deltas = models["a"]["q.weight"].double() + models["b"]["q.weight"] - models["base"]["q.weight"]
        torch.testing.assert_close(made["q.weight"].double(), deltas, rtol=1e-5, atol=1e-6)
        again = sm.plan(recipe={"merge_method": "linear", "models": [{"model": "a.safetensors"}], "rules": []})
        assert again.counts() == {"linear": 2}

    def test_a_base_that_only_a_rule_needs_is_not_counted(self, models: dict[str, Tensors]) -> None:
        """weighted_sum takes two models and no base."""
        rules = [{"match": "q.*", "merge_method": "task_arithmetic"}]
        made = self.merged("a b", merge_method="weighted_sum", parameters={"alpha": 0.5}, rules=rules)
        assert octets(made["v.weight"]) == octets(mean([models["a"]["v.weight"], models["b"]["v.weight"]], [1, 1]))

    def test_a_base_among_the_models_is_not_one_of_them(self, models: dict[str, Tensors]) -> None:
        """nearswap takes one model beside its base; add_difference takes two."""
        self.merged("base a", merge_method="nearswap", parameters={"t": 0.01})
        self.merged("a base b", merge_method="add_difference")
        with pytest.raises(sm.RecipeError, match="exactly 1 model beside the base, not 2"):
            self.merged("base a b", merge_method="nearswap", parameters={"t": 0.01})

    def test_the_order_of_models_is_the_written_one(self, models: dict[str, Tensors]) -> None:
        made = self.merged("a base", merge_method="ema", parameters={"decay": 0.9})
        expected = 0.9 * models["a"]["q.weight"].double() + 0.1 * models["base"]["q.weight"].double()
        torch.testing.assert_close(made["q.weight"].double(), expected, rtol=1e-6, atol=1e-7)
        rules = [{"match": "*", "parameters": {"weight": [0.9, 0.1]}}]
        made = self.merged("a base", merge_method="linear", rules=rules)
        assert octets(made["q.weight"]) == octets(mean([models[n]["q.weight"] for n in ("a", "base")], [0.9, 0.1]))

    def test_a_rules_method_is_checked_as_the_recipes(self, models: dict[str, Tensors]) -> None:
        for method, words in (("slerp", "slerp merges exactly 2 models, not 3"), ("add_difference", "exactly 2 models")):
            with pytest.raises(sm.RecipeError, match=words):
                self.merged("a b c", merge_method="task_arithmetic", rules=[{"match": "q.*", "merge_method": method}])
        with pytest.raises(sm.RecipeError, match="slerp needs the parameter t"):
            self.merged("a b", merge_method="task_arithmetic", rules=[{"match": "q.*", "merge_method": "slerp"}])
        sources = [{"model": f"{n}.safetensors", "layer_range": [0, 1]} for n in "ab"]
        with pytest.raises(sm.RecipeError, match="needs the models' common ancestor"):
            rules = [{"match": "q.*", "merge_method": "ties"}]
            sm.plan(recipe={"merge_method": "linear", "slices": [{"sources": sources}], "rules": rules})

    def test_defaults_that_travel_are_not_taken_for_a_rules(self, models: dict[str, Tensors]) -> None:
        """linear normalises by default, task_arithmetic does not."""
        rules = [{"match": "q.*", "merge_method": "task_arithmetic"}]
        listed = [{"model": f"{n}.safetensors", "parameters": {"weight": 0.7}} for n in "ab"]
        wish = {"merge_method": "linear", "models": listed, "base_model": "base.safetensors", "rules": rules}
        sm.merge(recipe=wish, out="one/")
        sm.merge(recipe="one/streammerge.yaml", out="two/")
        assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


class TestShapes:
    @pytest.mark.parametrize("first", ["small", "large"])
    @pytest.mark.parametrize("container", ["safetensors", "pth"])
    def test_rows(self, first: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        rows = {"small": draw(1, 30, 8), "large": draw(2, 41, 8)}
        order = [first, *({"small", "large"} - {first})]
        for name in order:
            torch.save({"model": {"emb.weight": rows[name], "w": draw(3, 3)}}, f"{name}.pth")
        result = sm.merge([f"{name}.pth" for name in order], f"out.{container}", on_shape="rows")
        path = Path(f"out.{container}")
        made = load_safetensors(path) if container == "safetensors" else torch.load(path, weights_only=True)["model"]
        common = mean([rows["small"], rows["large"][:30]], [1, 1])
        assert octets(made["emb.weight"]) == octets(torch.cat([common, rows["large"][30:]]))
        assert container != "pth" or zipfile.ZipFile(path).testzip() is None, "a checksum covers both halves"
        assert "30 rows of emb.weight are merged, the other 11 are those of large.pth" in result.warnings[0]

    def test_rows_of_a_transposed_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        large, small = draw(2, 8, 41).t(), draw(1, 30, 8)
        torch.save({"emb.weight": large}, "large.pth")
        torch.save({"emb.weight": small}, "small.pth")
        sm.merge(["large.pth", "small.pth"], "out.safetensors", on_shape="rows")
        expected = torch.cat([mean([large[:30], small], [1, 1]), large[30:]])
        assert octets(load_safetensors(Path("out.safetensors"))["emb.weight"]) == octets(expected)

    def test_base_and_what_rows_cannot_settle(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        saved(tmp_path, a={"w": draw(1, 3, 4), "v": draw(1, 2)}, b={"w": draw(2, 3, 5), "v": draw(2, 2)})
        with pytest.raises(sm.MismatchError, match=r"\[3, 4\]"):
            sm.plan(["a.safetensors", "b.safetensors"], on_shape="rows")
        result = sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", on_shape="base")
        assert octets(load_safetensors(Path("out.safetensors"))["w"]) == octets(draw(1, 3, 4))
        assert any("w is kept as the first has it" in warning for warning in result.warnings)


FP8, U8, I32 = torch.float8_e4m3fn, torch.uint8, torch.int32


class TestQuantised:
    @pytest.mark.parametrize(
        ("tensors", "name"),
        [
            ({"q.qweight": I32, "q.qzeros": I32, "q.scales": torch.float16}, "GPTQ or AWQ"),
            ({"q.weight": U8, "q.weight.absmax": torch.float32, "q.weight.quant_map": torch.float32}, "bitsandbytes"),
            ({"q.weight": torch.int8, "q.SCB": torch.float32}, "bitsandbytes"),
            ({"q.weight": FP8, "q.weight_scale_inv": torch.float32}, "weight_scale_inv"),
            ({"q.weight": FP8, "q.scale_weight": torch.float32, "scaled_fp8": FP8}, "ComfyUI"),
            ({"q.weight": FP8, "q.weight_scale": torch.float32, "q.input_scale": torch.float32}, "weight_scale"),
            ({"q.weight": FP8, "q.scale": torch.float32}, "weight_scale"),
            ({"q.weight": FP8, "q.weight._scale": torch.float32}, "weight_scale"),
            ({"q.W_q": U8, "q.scale": torch.float16, "q.zero": torch.float16}, "HQQ"),
        ],
        ids=str,
    )
    def test_it_is_refused_by_name(
        self, tensors: dict[str, torch.dtype], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        made = {n: torch.ones(4, 4).to(dtype) for n, dtype in tensors.items()} | {"norm.weight": torch.ones(4, 4)}
        saved(tmp_path, a=made, b=made, plain={n: torch.ones(4, 4) for n in made})
        with pytest.raises(sm.MismatchError, match=f"is quantised: .*{name}"):
            sm.plan(["a.safetensors", "b.safetensors"])
        if any(dtype.is_floating_point for dtype in tensors.values()):
            with pytest.raises(sm.MismatchError, match="is quantised"):
                sm.convert("a.safetensors", "c.safetensors", dtype="float64")
        if name in ADVICE:
            with pytest.raises(sm.MismatchError, match=f"is quantised: {name}"):
                sm.convert("a.safetensors", "c.safetensors")
        else:
            sm.convert("a.safetensors", "c.safetensors")
        everything = [{"match": n, "copy": "a.safetensors"} for n in tensors]
        assert sm.plan(recipe=recipe(rules=everything)).counts()["linear"] == 1
        with pytest.raises(sm.MismatchError, match="is quantised"):
            sm.plan(recipe=recipe(rules=[*everything[:1], {"match": list(tensors)[1:], "drop": True}]))
        assert sm.plan(["plain.safetensors"] * 2).counts() == {"linear": len(made)}, "names alone tell nothing"

    def test_only_in_the_second_checkpoint_or_the_one_that_is_copied(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        scaled = {"q.weight": torch.ones(2).to(FP8), "q.weights_scaling_factor": torch.ones(1)}
        saved(tmp_path, a={"q.weight": torch.ones(2)}, b={"q.weight": torch.ones(2)}, x=scaled)
        with pytest.raises(sm.MismatchError, match=r"x\.safetensors is quantised"):
            sm.plan(["a.safetensors", "x.safetensors"], on_missing="base")
        with pytest.raises(sm.MismatchError, match=r"x\.safetensors is quantised"):
            sm.plan(recipe=recipe(rules=[{"match": "q.weight", "copy": "x.safetensors"}]))

    def test_gguf_and_scaleless_fp8(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
        with pytest.raises(sm.FormatError, match=r"x\.gguf: it holds no tensors"):
            sm.inspect("x.gguf")
        values = [draw(s, 40, 8).to(torch.float8_e4m3fn) for s in (1, 2)]
        saved(tmp_path, a={"w": values[0]}, b={"w": values[1]})
        sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors")
        expected = ((values[0].double() + values[1].double()) / 2).to(torch.float8_e4m3fn)
        assert octets(load_safetensors(Path("out.safetensors"))["w"]) == octets(expected)


class TestFolders:
    """The side files of a Hugging Face folder agree with the merge."""

    def make(self, folder: Path, name: str, head: bool, layers: int = 3, **config: Any) -> Tensors:
        tensors = {"model.embed_tokens.weight": draw(len(name), 7, 4), "model.norm.weight": draw(2, 4)}
        tensors |= {f"model.layers.{n}.mlp.weight": draw(n + 10 * len(name), 4, 4) for n in range(layers)}
        if head:
            tensors["lm_head.weight"] = draw(5, 7, 4)
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        written = {"num_hidden_layers": layers, "vocab_size": 7, "torch_dtype": "float32", **config}
        (folder / name / "config.json").write_text(json.dumps(written))
        return tensors

    def config(self, path: str) -> dict[str, Any]:
        return json.loads(Path(path, "config.json").read_text())  # type: ignore[no-any-return]

    def test_layers_dtype_and_lists_of_layers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        kinds = ["full", "sliding", "chunked"]
        a = self.make(tmp_path, "a", False, layer_types=kinds, mlp_only_layers=[], tie_word_embeddings=True)
        slices = [{"sources": [{"model": "a", "layer_range": span}]} for span in ([0, 2], [1, 3])]
        sm.merge(recipe={"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}, out="out")
        config = self.config("out")
        assert (config["num_hidden_layers"], config["torch_dtype"]) == (4, "bfloat16")
        assert config["layer_types"] == ["full", "sliding", "sliding", "chunked"]
        assert (config["mlp_only_layers"], config["tie_word_embeddings"], config["vocab_size"]) == ([], True, 7)
        out = load_safetensors(Path("out/model.safetensors"))
        for place, layer in enumerate((0, 1, 1, 2)):
            expected = a[f"model.layers.{layer}.mlp.weight"].bfloat16()
            assert octets(out[f"model.layers.{place}.mlp.weight"]) == octets(expected)

    @pytest.mark.parametrize("order", [["tied", "own"], ["own", "tied"]])
    def test_one_head_is_tied_the_other_is_not(
        self, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        tied = self.make(tmp_path, "tied", False, tie_word_embeddings=True)
        own = self.make(tmp_path, "own", True, tie_word_embeddings=False)
        sm.merge(order, "out/")
        out = load_safetensors(Path("out/model.safetensors"))
        expected = mean([tied["model.embed_tokens.weight"], own["lm_head.weight"]], [1, 1])
        assert octets(out["lm_head.weight"]) == octets(expected)
        assert self.config("out")["tie_word_embeddings"] is False

    def test_filters_see_the_head_that_stands_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        tied = self.make(tmp_path, "tied", False, tie_word_embeddings=True)
        own = self.make(tmp_path, "own", True)
        weight = [{"filter": "lm_head", "value": 3}, {"value": 1}]
        models = [{"model": "tied", "parameters": {"weight": weight}}, {"model": "own", "parameters": {"weight": 1}}]
        sm.merge(recipe={"merge_method": "linear", "models": models}, out="out/")
        expected = mean([tied["model.embed_tokens.weight"], own["lm_head.weight"]], [3, 1])
        assert octets(load_safetensors(Path("out/model.safetensors"))["lm_head.weight"]) == octets(expected)

    def test_lists_of_layers_come_from_each_models_own_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        self.make(tmp_path, "a", True, layers=2, layer_types=["a0", "a1"], tie_word_embeddings=True)
        self.make(tmp_path, "deep", True, layers=4, layer_types=["d0", "d1", "d2", "d3"])
        slices = [{"sources": [{"model": n, "layer_range": span}]} for n, span in (("a", [0, 1]), ("deep", [2, 4]))]
        sm.merge(recipe={"merge_method": "passthrough", "slices": slices}, out="out")
        assert self.config("out")["layer_types"] == ["a0", "d2", "d3"]
        assert self.config("out")["tie_word_embeddings"] is False, "the head is the second model's"

    def test_all_heads_are_tied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        self.make(tmp_path, "a", False, tie_word_embeddings=True)
        self.make(tmp_path, "bb", False, tie_word_embeddings=True)
        sm.merge(["a", "bb"], "out/")
        assert "lm_head.weight" not in load_safetensors(Path("out/model.safetensors"))
        assert Path("out/config.json").read_bytes() == Path("a/config.json").read_bytes()

    def test_a_head_that_is_missing_and_not_tied_is_a_mismatch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        self.make(tmp_path, "a", True, tie_word_embeddings=False)
        self.make(tmp_path, "bb", False, tie_word_embeddings=False)
        with pytest.raises(sm.MismatchError, match=r"lacks 1: lm_head\.weight"):
            sm.plan(["a", "bb"], "out/")

    def test_the_vocabulary_grows_with_the_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        self.make(tmp_path, "a", False)
        bigger = self.make(tmp_path, "bb", False)
        bigger["model.embed_tokens.weight"] = draw(3, 9, 4)
        save_file(bigger, tmp_path / "bb" / "model.safetensors", {"format": "pt"})
        sm.merge(["a", "bb"], "out/", on_shape="rows")
        assert self.config("out")["vocab_size"] == 9

    def test_slices_beyond_the_layers_and_of_several_stacks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        self.make(tmp_path, "a", False)
        (tmp_path / "r.yaml").write_text(
            "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [1, 4]\n"
        )
        with pytest.raises(sm.RecipeError, match=r"r.yaml:5:5: layer_range \[1, 4\] reaches beyond the 3 layers of a"):
            sm.plan(recipe="r.yaml")
        two = {f"{side}.layers.{n}.w": draw(n, 4) for n in range(3) for side in ("encoder", "decoder")}
        saved(tmp_path, two=two, flat={"w": draw(1, 3)})
        source = {"model": "two.safetensors", "layer_range": [0, 2]}
        with pytest.raises(sm.RecipeError, match=r"several stacks of layers: .*encoder\.layers"):
            sm.plan(recipe={"merge_method": "passthrough", "slices": [{"sources": [source]}]})
        with pytest.raises(sm.RecipeError, match="has no layers"):
            flat = {"model": "flat.safetensors", "layer_range": [0, 2]}
            sm.plan(recipe={"merge_method": "passthrough", "slices": [{"sources": [flat]}]})
        modules = {"encoder": {"slices": [{"sources": [source]}]}, "decoder": {"models": [{"model": "two.safetensors"}]}}
        sm.merge(recipe={"merge_method": "passthrough", "modules": modules}, out="out.safetensors")
        made = load_safetensors(Path("out.safetensors"))
        assert sorted(made) == sorted(set(two) - {"encoder.layers.2.w"})
        with pytest.raises(sm.RecipeError, match="belongs to a module text"):
            sm.plan(recipe={"merge_method": "passthrough", "modules": {"text": {"models": [{"model": "two.safetensors"}]}}})

    def test_tensors_of_no_module_are_copied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        a, b = ({"enc.w": draw(s, 3), "dec.w": draw(s + 1, 3)} for s in (1, 5))
        saved(tmp_path, a=a, b=b)
        modules = {"enc": {"models": [{"model": "a.safetensors"}, {"model": "b.safetensors"}]}}
        result = sm.merge(recipe={"merge_method": "linear", "modules": modules}, out="out.safetensors")
        made = load_safetensors(Path("out.safetensors"))
        assert_same(made, {"enc.w": mean([a["enc.w"], b["enc.w"]], [1, 1]), "dec.w": a["dec.w"]})
        assert any("to no module, so it is copied: dec.w" in note for note in result.notes)

    def test_layers_cannot_be_moved_in_a_pth(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({"model": {f"l.{n}.w": draw(n, 3) for n in range(3)}}, "a.pth")
        slices = [{"sources": [{"model": "a.pth", "layer_range": [0, 2]}]}]
        with pytest.raises(sm.RecipeError, match="no layers can be moved"):
            sm.plan(recipe={"merge_method": "passthrough", "slices": slices}, out="out.pth")
        sm.merge(recipe={"merge_method": "passthrough", "slices": slices}, out="out.safetensors")


def test_one_file_with_two_state_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """icefall's average over an interval: a combination of the running means of two checkpoints."""
    monkeypatch.chdir(tmp_path)
    start, end = ({"w": draw(s, 40), "b": draw(s + 1, 3)} for s in (1, 3))
    for name, averaged in (("start", start), ("end", end)):
        torch.save({"model": trained(1), "model_avg": averaged, "batch_idx_train": 4000}, f"{name}.pt")
    models = [
        {"model": "end.pt", "state_dict": "model_avg", "parameters": {"weight": 4.0}},
        {"model": "start.pt", "state_dict": "model_avg", "parameters": {"weight": -3.0}},
    ]
    sm.merge(recipe={"merge_method": "linear", "models": models}, out="out.safetensors")
    made = load_safetensors(Path("out.safetensors"))
    assert octets(made["w"]) == octets((4.0 * end["w"].double() - 3.0 * start["w"].double()).float())
    both = [{"model": "end.pt", "state_dict": "model"}, {"model": "end.pt", "state_dict": "model"}]
    assert len(sm.plan(recipe={"merge_method": "linear", "models": both}).recipe.checkpoints) == 1
