"""Two sets of names brought together: what is one tensor, and what must not be taken for one."""

from __future__ import annotations

import random
import time

import pytest

from streammerge.tensors.matching import Renaming, describe, match, replacements

Shapes = dict[str, tuple[int, ...]]


def shapes(*names: str, shape: tuple[int, ...] = (4,)) -> Shapes:
    return dict.fromkeys(names, shape)


def decoder(prefix: str, layers: int = 3, hidden: int = 8) -> Shapes:
    made: Shapes = {f"{prefix}embed_tokens.weight": (32, hidden), f"{prefix}norm.weight": (hidden,)}
    for n in range(layers):
        made |= {f"{prefix}layers.{n}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        made |= {f"{prefix}layers.{n}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return made


def renamed(names: Shapes, old: str, new: str) -> Shapes:
    return {new + n.removeprefix(old) if n.startswith(old) else n: shape for n, shape in names.items()}


def test_wrappers_need_no_guess() -> None:
    ours, theirs = ["a.w", "b.w", "b.module.c"], ["module.a.w", "module.b.w", "module.b.c"]
    assert match(shapes(*ours), shapes(*theirs)).names == dict(zip(ours, theirs, strict=True))
    assert match(shapes("w", "module.w"), shapes("module.w")).names == {"module.w": "module.w"}
    assert match(shapes("w", "module.w"), shapes("_orig_mod.w")).names == {}, "an ambiguous name must not be guessed"
    assert match(shapes("w"), shapes("module.w", shape=(5,))).names == {"w": "module.w"}, "the shape is told then"


def test_spellings_need_equal_shapes() -> None:
    assert match(shapes("n.gamma", "n.beta"), shapes("n.weight", "n.bias")).names == {
        "n.gamma": "n.weight",
        "n.beta": "n.bias",
    }
    assert match(shapes("n.gamma"), shapes("n.weight", shape=(4, 4))).names == {}
    both = shapes("n.gamma", "n.weight")
    assert match(both, shapes("n.weight")).names == {"n.weight": "n.weight"}, "a layer scale beside a weight"


@pytest.mark.parametrize(
    "prefix", ["model.", "bert.", "net.generator.", "model.diffusion_model.", "a.b.c.d.", "0.auto_model.", "0."]
)
@pytest.mark.parametrize("turned", [False, True])
def test_any_leading_prefix_on_either_side(prefix: str, turned: bool) -> None:
    plain = decoder("")
    led = renamed(plain, "", prefix)
    expected = dict(zip(plain, led, strict=True))
    ours, theirs = (led, plain) if turned else (plain, led)
    pairs = {two: one for one, two in expected.items()} if turned else expected
    assert match(ours, theirs).names == pairs
    extra = shapes("cls.weight", "cls.bias")
    assert match(ours | extra, theirs).names == pairs, "a head that one of them has"


def bert(prefix: str, layers: int = 2) -> Shapes:
    """Literal names of transformers; all matrices of a layer have one shape here."""
    made: Shapes = {f"{prefix}embeddings.{p}_embeddings.weight": (9, 4) for p in ("word", "position", "token_type")}
    norms = [f"{prefix}embeddings.LayerNorm"]
    for n in range(layers):
        layer = f"{prefix}encoder.layer.{n}."
        dense = [*(f"attention.self.{p}" for p in ("query", "key", "value")), "attention.output.dense"]
        made |= {f"{layer}{m}.weight": (4, 4) for m in (*dense, "intermediate.dense", "output.dense")}
        made |= {f"{layer}{m}.bias": (4,) for m in (*dense, "intermediate.dense", "output.dense")}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    made |= {f"{norm}.{p}": (4,) for norm in norms for p in ("weight", "bias")}
    return made | {f"{prefix}pooler.dense.weight": (4, 4), f"{prefix}pooler.dense.bias": (4,)}


@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("prefix", ["bert.", "model.bert.", "attention."])
@pytest.mark.parametrize("turned", [False, True])
def test_modules_that_resemble_each_other_are_not_crossed(layers: int, prefix: str, turned: bool) -> None:
    """``output.dense`` and ``attention.output.dense`` have one ending and one shape."""
    sides = bert("", layers), bert(prefix, layers)
    ours, theirs = sides[::-1] if turned else sides
    assert match(ours, theirs).names == dict(zip(ours, theirs, strict=True))
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): s
        for n, s in ours.items()
    }
    assert match(old, theirs).names == dict(zip(old, theirs, strict=True))


def test_names_of_two_releases() -> None:
    """transformers 4.51 and 4.52 (Qwen2-VL), 4.51 and 4.52 (LLaVA): literal names."""
    old = decoder("model.") | renamed(decoder(""), "", "visual.") | {"lm_head.weight": (32, 8)}
    new = renamed(renamed(old, "model.", "model.language_model."), "visual.", "model.visual.")
    assert match(old, new).names == dict(zip(old, new, strict=True))
    assert match(new, old).names == dict(zip(new, old, strict=True))
    vision = renamed(decoder("", 2, 6), "", "vision_tower.vision_model.encoder.")
    old = decoder("language_model.model.") | {"language_model.lm_head.weight": (32, 8)} | vision
    old |= {f"multi_modal_projector.linear_{n}.weight": (n, 8) for n in (1, 2)}
    new = renamed(renamed(old, "language_model.model.", "model.language_model."), "language_model.lm_head", "lm_head")
    new = renamed(
        renamed(new, "vision_tower.vision_model.", "model.vision_tower."),
        "multi_modal_projector",
        "model.multi_modal_projector",
    )
    assert match(old, new).names == dict(zip(old, new, strict=True))
    said = " / ".join(describe(match(old, new).names))
    assert "once 'model.language_model.' in its names is read as 'language_model.model.'" in said


def test_an_infix_in_each_layer() -> None:
    old = {f"encoder.layer.{n}.attention.self.{p}.weight": (4, 4) for n in range(40) for p in "qkv"}
    new = {name.replace("attention.self.", "attention."): shape for name, shape in old.items()}
    assert match(old, new).names == dict(zip(old, new, strict=True))
    assert describe(match(old, new).names) == ["120 tensors match once 'self.' is put into its names"]


def test_what_could_be_two_things_is_not_guessed() -> None:
    plain = decoder("")
    two = renamed(plain, "", "gen_a.") | renamed(plain, "", "gen_b.")
    found = match(plain, two)
    assert found.names == {}
    assert found.doubtful == [Renaming("", "gen_a.", len(plain)), Renaming("", "gen_b.", len(plain))]
    twice = match(two, plain)
    assert twice.names == {}


@pytest.mark.parametrize("averaged", ["ema.", "model_ema.", "ema_model.", "teacher.", "swa.module."])
def test_a_model_is_not_its_average(averaged: str) -> None:
    plain = decoder("")
    assert match(plain, renamed(plain, "", averaged)).names == {}
    assert match(renamed(plain, "", averaged), plain).names == {}
    beside = renamed(plain, "", "model.") | renamed(plain, "", averaged)
    assert match(plain, beside).names == {name: f"model.{name}" for name in plain}


def test_one_part_never_stands_for_another() -> None:
    for one, two in (
        ("student.", "teacher."),
        ("encoder.", "decoder."),
        ("text_encoder.", "text_encoder_2."),
        ("h.", "layers."),
    ):
        ours, theirs = decoder(one), decoder(two)
        assert match(ours, theirs).names == {}, (one, two)
        assert replacements(ours, theirs) == [Renaming(one, two, len(ours))]
    assert replacements(["a.x", "b.y"], ["c.z", "d.w"]) == []


def test_a_few_tensors_that_are_alike_by_chance_are_not_matched() -> None:
    shared = decoder("model.", layers=12)
    ours, theirs = shared | {"norm.weight": (8,)}, shared | {"decoder.norm.weight": (8,)}
    assert match(ours, theirs).names == {name: name for name in shared}
    resnet = {f"layer{n}.{m}.bn.weight": (8,) for n in range(4) for m in range(3)}
    other = {f"backbone.stage{n}.{m}.bn.weight": (8,) for n in range(4) for m in range(3)}
    assert match(resnet, other).names == {}


def test_a_guess_needs_equal_shapes() -> None:
    plain = decoder("")
    larger = renamed(decoder("", hidden=16), "", "model.")
    assert match(plain, larger).names == {}
    led = renamed(plain, "", "model.") | {"model.embed_tokens.weight": (40, 8)}
    assert match(plain, led).names == {n: f"model.{n}" for n in plain}, "another vocabulary is told as a shape"


def test_every_matching_is_one_to_one() -> None:
    """Random renamings of random trees: whatever is matched has one partner, and an equal name keeps its own."""
    draw = random.Random(5)
    words = ["model", "net", "a", "b", "0", "1", "encoder", "ema", "w"]
    for _ in range(300):
        sides = []
        for _ in range(2):
            names = {".".join(draw.choice(words) for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 25))}
            sides.append({name: (draw.choice([2, 3]),) for name in sorted(names)})
        found = match(*sides).names
        assert len(set(found.values())) == len(found)
        assert found.keys() <= sides[0].keys()
        assert set(found.values()) <= sides[1].keys()
        assert all(found[name] == name for name in sides[0].keys() & sides[1].keys())


def test_many_names_take_seconds_at_most() -> None:
    large = {
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj.weight": (4,) for n in range(40) for e in range(128) for p in "gud"
    }
    started = time.process_time()
    assert match(large, renamed(large, "model.", "model.language_model.")).names.keys() == large.keys()
    hostile = {f"x{n}.weight": (4,) for n in range(20_000)}
    assert match(hostile, {f"y{n}.weight": (4,) for n in range(20_000)}).names == {}
    assert match(hostile, {f"x{n}.y{n}.weight": (4,) for n in range(20_000)}).names == {}
    assert time.process_time() - started < 30


def test_sentences() -> None:
    assert describe({"a": "module.a", "b": "module.b", "c": "c"}) == [
        "2 tensors match once 'module.' is removed from its names"
    ]
    assert describe({"m.a": "a"}) == ["1 tensor matches once 'm.' is put before its names"]
    assert describe({"n.gamma": "n.weight"}) == ["1 tensor matches once 'weight' in its names is read as 'gamma'"]
