"""What checkpoints disagree about, what it looks like, and what would settle it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.mismatch import Differing, Mismatch
from streammerge.recipe.arguments import recipe_of
from streammerge.tensors.spec import TensorSpec


def test_everything_that_differs_stands_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = {"gpt.text_embedding.weight": (30, 8), "gpt.norm.bias": (16,), "dvae.codebook": (4, 4)}
    first = {name: torch.zeros(shape) for name, shape in shapes.items()}
    decoder = {"hifigan_decoder.conv.bias": torch.zeros(3)}  # tells, with the names of gpt, that this is XTTS
    changed = first | decoder | {"gpt.text_embedding.weight": torch.zeros(40, 8), "gpt.new": torch.zeros(2)}
    del changed["dvae.codebook"], changed["gpt.norm.bias"]
    save_file(first | decoder, "a.safetensors")
    save_file(changed, "b.safetensors")
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(["a.safetensors", "b.safetensors"])
    said = str(caught.value)
    for part in (
        "b.safetensors lacks 1: gpt.norm.bias",
        "b.safetensors has 1 that a.safetensors lacks (they stay out): gpt.new",
        "gpt.text_embedding.weight  [30, 8]  [40, 8] in b.safetensors  vocabulary 30 against 40",
        "this looks like vocabulary 30 against 40",
        '`on_missing="base"`',
        '`on_shape="base"` (keep the first\'s), `"rows"`',
        ' or `"leading"`',
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("one", "two", "guess"),
    [
        ({"student.a": 1, "student.b": 1}, {"teacher.a": 1, "teacher.b": 1}, "another prefix: 'student.' in"),
        ({"ema.a": 1, "ema.b": 1}, {"a": 1, "b": 1}, "another prefix: 'ema.' in a.safetensors, none in b"),
        ({"a": 1, "b": 1, "c": 1}, {"d": 1, "e": 1, "f": 1}, "another architecture: 0 of 3 names"),
        (
            {f"l.{i}.w": 1 for i in range(6)},
            {f"l.{i}.w": 1 for i in range(4)},
            "another depth: l has 6 layers against 4",
        ),
        ({"enc_p.emb_phone.weight": (4, 256)}, {"enc_p.emb_phone.weight": (4, 768)}, "v1 against v2"),
        (
            {"in.weight": (8, 4, 3, 3)},
            {"in.weight": (8, 9, 3, 3)},
            "an inpainting model against an ordinary one",
        ),
        ({"wpe.weight": (8, 4)}, {"wpe.weight": (16, 4)}, "8 positions against 16"),
        ({"vit.pos_embed": (1, 17, 4)}, {"vit.pos_embed": (1, 50, 4)}, "17 positions against 50"),
        ({"emb_g.weight": (109, 4)}, {"emb_g.weight": (2, 4)}, "109 speakers against 2"),
        ({"model.embed_tokens.weight": (30, 4)}, {"model.embed_tokens.weight": (32, 4)}, "vocabulary 30 against 32"),
        (
            {f"unet.{i}": 1 for i in range(9)} | {"vae.w": 1},
            {"vae.w": 1},
            "a part of the first: b.safetensors has 1 of its 10",
        ),
        (
            {f"w{i}": (4, 4) for i in range(4)},
            {f"w{i}": (6, 6) for i in range(4)},
            "another size of the same architecture",
        ),
    ],
)
def test_guesses(
    one: dict[str, Any], two: dict[str, Any], guess: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, shapes in (("a", one), ("b", two)):
        save_file({n: torch.zeros(s if isinstance(s, tuple) else (s,)) for n, s in shapes.items()}, f"{name}.safetensors")
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(["a.safetensors", "b.safetensors"])
    assert f"this looks like {guess}" in str(caught.value)


def test_a_policy_settles_names_but_no_shapes() -> None:
    def recipe(**options: Any) -> Any:
        return recipe_of(["a", "b"], "linear", None, None, {}, options)

    names = Mismatch("a", missing={"b": ["w"]}, names={"a": ["w", "v"], "b": ["v"]})
    with pytest.raises(sm.MismatchError, match="b lacks 1: w"):
        names.refuse(recipe())
    names.refuse(recipe(on_missing="base"))
    Mismatch("a").refuse(recipe())
    shapes = Mismatch("a", differing=[Differing("w", TensorSpec("w", "F32", ()), TensorSpec("w", "F32", (1,)), "b")])  # type: ignore[arg-type]
    with pytest.raises(sm.MismatchError, match=r"w  \[\]  \[1\] in b"):
        shapes.refuse(recipe(on_missing="base"))


def test_only_the_first_rows_of_a_long_table_are_shown() -> None:
    def differing(count: int) -> Mismatch:
        one, two = (TensorSpec("w", dtype, (2,)) for dtype in ("F32", "I64"))  # type: ignore[arg-type]
        return Mismatch("a", differing=[Differing(f"w{n}", one, two, "b") for n in range(count)])

    recipe = recipe_of(["a", "b"], "linear", None, None, {}, {})
    for count, more in ((20, ""), (21, "and 1 more"), (45, "and 25 more")):
        with pytest.raises(sm.MismatchError) as caught:
            differing(count).refuse(recipe)
        lines = str(caught.value).splitlines()
        assert sum("int64 in b" in line for line in lines) == min(count, 20)
        assert [line.strip() for line in lines if line.strip().startswith("and ")] == [more] * bool(more)
        assert "on_shape" not in str(caught.value), "no policy settles dtypes"


@pytest.mark.parametrize(
    ("two", "offered"),
    [
        ({"a": (2,), "b": (2,), "c": (2,), "extra": (2,)}, True),
        ({"c": (2,), "x": (2,), "y": (2,), "z": (2,), "u": (2,)}, False),
        ({"m.lora_A.weight": (2, 2), "m.lora_B.weight": (2, 2), "a": (2,)}, False),
    ],
    ids=["an extra tensor", "another architecture", "an adapter"],
)
def test_policies_are_offered_only_where_they_make_a_merge(
    two: dict[str, tuple[int, ...]], offered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = dict.fromkeys("abcdef", (2,))
    for name, shapes in (("a", one), ("b", two)):
        save_file({n: torch.zeros(shape) for n, shape in shapes.items()}, f"{name}.safetensors")
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(["a.safetensors", "b.safetensors"])
    assert ("on_missing" in str(caught.value)) is offered


def test_a_head_of_labels_is_not_offered_as_a_head_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = {f"model.{n}.weight": torch.zeros(4, 4) for n in range(4)}
    save_file({**body, "lm_head.weight": torch.zeros(9, 4)}, "lm.safetensors")
    save_file({**body, "score.weight": torch.zeros(1, 4)}, "reward.safetensors")
    save_file({**body, "output.weight": torch.zeros(9, 4)}, "meta.safetensors")
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(["lm.safetensors", "reward.safetensors"])
    assert "rename" not in str(caught.value)
    with pytest.raises(sm.MismatchError, match=r"rename=\"output\.\*=lm_head\.\*\""):
        sm.plan(["lm.safetensors", "meta.safetensors"])


@pytest.mark.parametrize("joined_first", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_tensor_in_place_of_several(
    joined_first: bool, axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = {f"h.{n}.mlp.weight": torch.zeros(4, 4) for n in range(6)}
    parts = {f"h.0.attn.{n}_proj.weight": torch.zeros(4 if n == "q" else 2, 4).movedim(axis, 0) for n in "qkv"}
    parts = {name: each.contiguous() for name, each in parts.items()}
    save_file(body | parts, "apart.safetensors")
    save_file(body | {"h.0.attn.qkv.weight": torch.cat([*parts.values()], axis)}, "joined.safetensors")
    names = ["joined.safetensors", "apart.safetensors"]
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(names if joined_first else names[::-1])
    said = str(caught.value)
    assert "one tensor in place of 3: h.0.attn.qkv.weight in joined.safetensors has the rows of h.0.attn" in said
    assert "on_missing" not in said


@pytest.mark.parametrize("order", [("pipe", "pipe/unet"), ("pipe/unet", "pipe"), ("pipe/unet/", "pipe/")])
def test_a_model_of_a_pipeline_against_the_pipeline(
    order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("unet", "vae"):
        folder = Path("pipe") / part
        folder.mkdir(parents=True)
        save_file({f"{part}.{n}.weight": torch.ones(2) for n in range(3)}, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text("{}")
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}
    Path("pipe/model_index.json").write_text(json.dumps(index))
    with pytest.raises(sm.MismatchError, match="this looks like the model of a subfolder: give pipe/unet") as caught:
        sm.plan(list(order))
    assert "another architecture" not in str(caught.value)


def test_names_that_differ_in_numbers_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file, name in (("a", "experts"), ("b", "expert_mlps")):
        tensors = {f"layers.{n}.{name}.{e}.w": torch.zeros(2) for n in range(12) for e in range(8)}
        save_file({**tensors, "norm": torch.zeros(2)}, f"{file}.safetensors")
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(["a.safetensors", "b.safetensors"])
    said = str(caught.value).splitlines()
    assert "  b.safetensors lacks 96: layers.{0-11}.experts.{0-7}.w" in said
    assert "  b.safetensors has 96 that a.safetensors lacks (they stay out): layers.{0-11}.expert_mlps.{0-7}.w" in said


@pytest.mark.parametrize("normed", ["a", "b"])
@pytest.mark.parametrize("spelling", ["{}_g {}_v", "parametrizations.{}.original0 parametrizations.{}.original1"])
def test_weight_norm_in_one_of_two(spelling: str, normed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocoder is often exported without it. No policy for names makes a merge of the two."""
    monkeypatch.chdir(tmp_path)
    length, direction = (f"up.{part}" for part in spelling.format("weight", "weight").split())
    parts = {length: torch.ones(3, 1, 1), direction: torch.ones(3, 4, 5), "up.bias": torch.ones(3)}
    whole = {"up.weight": torch.ones(3, 4, 5), "up.bias": torch.ones(3)}
    save_file(parts if normed == "a" else whole, "a.safetensors")
    save_file(parts if normed == "b" else whole, "b.safetensors")
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(["a.safetensors", "b.safetensors"])
    bare = "b" if normed == "a" else "a"
    assert (
        f"this looks like weight_norm removed: {bare}.safetensors has up.weight in one piece, and {normed}.safetensors as "
        f"length and direction (_g, _v); load {normed}.safetensors in its program"
    ) in str(caught.value)
    assert "on_missing" not in str(caught.value)


def test_the_only_tensor_of_each_may_have_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned words (textual inversion) are called by their word."""
    monkeypatch.chdir(tmp_path)
    torch.save({"<cat>": torch.full((8,), 1.0)}, "cat.bin")
    torch.save({"<dog>": torch.full((8,), 3.0)}, "dog.bin")
    with pytest.raises(sm.MismatchError) as caught:
        sm.plan(["cat.bin", "dog.bin"])
    assert 'if the two are the same, `rename="<dog>=<cat>"` says so' in str(caught.value)
    assert "nothing can be merged" not in str(caught.value)
    sm.merge(["cat.bin", "dog.bin"], "both.bin", rename="<dog>=<cat>")
    assert torch.equal(torch.load("both.bin")["<cat>"], torch.full((8,), 2.0))


def test_speakers_of_the_first_are_kept_by_leading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of the first says how many speakers its loader makes room for."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": {"emb_g.weight": torch.full((5, 4), 1.0)}}, "many.pth")
    torch.save({"weight": {"emb_g.weight": torch.full((2, 4), 3.0)}}, "few.pth")
    with pytest.raises(sm.MismatchError, match="leading"):
        sm.plan(["many.pth", "few.pth"])
    for first, second, rows in (("many.pth", "few.pth", [2.0] * 2 + [1.0] * 3), ("few.pth", "many.pth", [2.0] * 2)):
        sm.merge([first, second], "made.pth", on_shape="leading", overwrite=True)
        assert torch.load("made.pth")["weight"]["emb_g.weight"][:, 0].tolist() == rows
