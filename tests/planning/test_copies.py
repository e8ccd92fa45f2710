"""Files that hold their weights more than once: every copy of a .pth is merged with its counterparts.

The layouts are those that the programs write: F5-TTS, Lightning, mmengine, torch_ema, stylegan2, DINO, fairseq, timm,
icefall, ultralytics, ema-pytorch, Stable Diffusion.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets

import streammerge as sm

WEIGHTS = (0.6, 0.4)
Draw = Callable[..., torch.Tensor]


def drawing(seed: int) -> Draw:
    make = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=make)


def net(draw: Draw, prefix: str = "", parts: str = "abc") -> dict[str, torch.Tensor]:
    sizes = {"a": (3, 5), "b": (70_001,), "c": (), "d": (0, 4)}
    return {f"{prefix}{part}.weight": draw(*sizes[part]) for part in parts}


def trained(draw: Draw) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Returns the state dict of a model with buffers, and the parameters that an average lists."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    state = {name: draw(*value.shape) for name, value in model.state_dict().items() if value.is_floating_point()}
    return state, [draw(*parameter.shape) for parameter in model.parameters()]


def optimizer(draw: Draw) -> dict[str, Any]:
    return {"state": {0: {"exp_avg": draw(3, 5), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def f5(draw: Draw, seed: int) -> Any:
    average = {"initted": torch.tensor(True), "step": torch.tensor(100 * seed)}
    return {
        "model_state_dict": net(draw),
        "optimizer_state_dict": optimizer(draw),
        "ema_model_state_dict": average | net(draw, "ema_model."),
        "update": seed,
    }


def lightning(draw: Draw, seed: int) -> Any:
    """Weight averaging since 2.6: the average stands where loaders look for the weights."""
    return {
        "state_dict": net(draw, "model."),
        "current_model_state": net(draw, "model."),
        "averaging_state": {"n_averaged": torch.tensor(seed)},
        "optimizer_states": [optimizer(draw)],
        "callbacks": {"EMA": {"ema_state_dict": net(draw, "model."), "decay": 0.9}},
        "global_step": seed,
    }


def mmengine(draw: Draw, seed: int) -> Any:
    average = {"steps": torch.tensor(seed)} | net(draw, "module.")
    return {"meta": {}, "state_dict": net(draw), "message_hub": {"log_scalars": {}}, "ema_state_dict": average}


def torch_ema(draw: Draw, seed: int) -> Any:
    state, listed = trained(draw)
    average = {
        "decay": 0.9,
        "num_updates": seed,
        "shadow_params": listed,
        "collected_params": [draw(*p.shape) for p in listed],
    }
    return {"model": state, "ema": average, "optimizer": optimizer(draw)}


def stylegan(draw: Draw, seed: int) -> Any:
    return {
        "g": net(draw, "g."),
        "d": net(draw, "d.", "ab"),
        "g_ema": net(draw, "g."),
        "latent_avg": draw(7),
        "g_optim": optimizer(draw),
        "args": argparse.Namespace(lr=seed),
    }


def two_averages(draw: Draw, seed: int) -> Any:
    networks = {"generator": net(draw, "g."), "discriminator": net(draw, "d.", "ab")}
    averages = {"discriminator_ema": net(draw, "d.", "ab"), "generator_ema": net(draw, "g.")}
    return {"nets": networks, "ema": {"generator": net(draw, "g."), "discriminator": net(draw, "d.", "ab")}, **averages}


def dino(draw: Draw, seed: int) -> Any:
    center = {"center": draw(1, 4)}
    return {"student": net(draw, "module.backbone."), "teacher": net(draw, "backbone."), "dino_loss": center, "epoch": seed}


def fairseq(draw: Draw, seed: int) -> Any:
    return {"model": net(draw), "extra_state": {"ema": net(draw)}, "last_optimizer_state": optimizer(draw)}


def timm(draw: Draw, seed: int) -> Any:
    return {"state_dict": net(draw, "module."), "state_dict_ema": net(draw), "optimizer": optimizer(draw), "arch": "x"}


def icefall(draw: Draw, seed: int) -> Any:
    average = {name: value.double() for name, value in net(draw).items()}
    return {"model": net(draw), "model_avg": average, "optimizer": optimizer(draw), "batch_idx_train": seed}


def ultralytics(draw: Draw, seed: int) -> Any:
    torch.manual_seed(seed)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)]
    models[0].stride = draw(2)  # type: ignore[assignment]
    return {"model": models[0], "ema": models[1].half(), "updates": seed, "optimizer": optimizer(draw)}


def stable_diffusion(draw: Draw, seed: int) -> Any:
    average = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(seed, dtype=torch.int32)}
    average |= {f"model_ema.net{part}weight": draw(3, 5) for part in "ab"}
    return {"state_dict": {f"model.net.{part}.weight": draw(3, 5) for part in "ab"} | average | {"vae.weight": draw(3)}}


def ema_pytorch(draw: Draw, seed: int) -> Any:
    counters = {"initted": torch.tensor([True]), "step": torch.tensor([seed])}
    return {"model": net(draw), "ema": net(draw, "online_model.") | net(draw, "ema_model.") | counters}


def guided_diffusion(draw: Draw, seed: int) -> Any:
    state, listed = trained(draw)
    return {"model": state, "ema_rates": {"0.999": listed, "0.9999": [draw(*p.shape) for p in listed]}}


def soft_actor_critic(draw: Draw, seed: int) -> Any:
    return {
        "actor": net(draw, "a."),
        "critic": net(draw, "c."),
        "critic_target": net(draw, "c."),
        "log_alpha": draw().requires_grad_(),
        "normaliser": [{"mean": draw(3), "std": draw(3), "eps": 1e-5}, draw(2)],
        "actor_optimizer": optimizer(draw),
    }


def flat(draw: Draw, seed: int) -> Any:
    """The average is one of the items of a flat state dict."""
    return {**net(draw, "x."), "ema": net(draw, "x."), "normaliser": {"mean": draw(3)}, "optimizer": optimizer(draw)}


LAYOUTS = [
    *(f5, lightning, mmengine, torch_ema, stylegan, two_averages, dino, fairseq, timm, icefall, ultralytics),
    *(stable_diffusion, ema_pytorch, guided_diffusion, soft_actor_critic, flat),
]


def tensors(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """Yields every tensor by its path, without those of optimizers."""
    if isinstance(node, torch.nn.Module):
        node = node.state_dict() | {"stride": node.stride} if hasattr(node, "stride") else node.state_dict()
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if "optim" not in str(key):
                yield from tensors(value, (*path, key))


def saved(folder: Path, layout: Any) -> list[dict[tuple[Any, ...], torch.Tensor]]:
    """Writes two checkpoints of a layout; returns their tensors."""
    contents = [layout(drawing(seed), seed) for seed in (1, 2)]
    for seed, content in enumerate(contents, start=1):
        torch.save(content, folder / f"{seed}.pt")
    return [dict(tensors(content)) for content in contents]


def merge(folder: Path, out: str = "out.pt", **options: Any) -> Any:
    paths = [folder / "1.pt", folder / "2.pt"]
    return sm.merge(paths, folder / out, weights=list(WEIGHTS), overwrite=True, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_copy_is_merged(tmp_path: Path, layout: Any) -> None:
    one, two = saved(tmp_path, layout)
    merge(tmp_path)
    made = dict(tensors(torch.load(tmp_path / "out.pt", weights_only=False)))
    assert made.keys() == one.keys()
    for path, value in made.items():
        if one[path].is_floating_point():
            assert value.dtype == one[path].dtype
            assert octets(value) == octets(mean([one[path], two[path]], WEIGHTS)), path
        else:
            assert torch.equal(value, torch.maximum(one[path], two[path])), path


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_copy_is_converted_as_it_is(tmp_path: Path, layout: Any) -> None:
    one, _ = saved(tmp_path, layout)
    sm.convert(tmp_path / "1.pt", tmp_path / "out.pt")
    made = dict(tensors(torch.load(tmp_path / "out.pt", weights_only=False)))
    assert made.keys() == one.keys()
    assert all(octets(made[path]) == octets(value) and made[path].dtype == value.dtype for path, value in one.items())


@pytest.mark.parametrize(
    ("layout", "plain", "averaged"),
    [
        (f5, ("model_state_dict", "a.weight"), ("ema_model_state_dict", "ema_model.a.weight")),
        (stylegan, ("g", "g.a.weight"), ("g_ema", "g.a.weight")),
        (dino, ("student", "module.backbone.a.weight"), ("teacher", "backbone.a.weight")),
        (mmengine, ("ema_state_dict", "module.a.weight"), ("state_dict", "a.weight")),
        (lightning, ("current_model_state", "model.a.weight"), ("state_dict", "model.a.weight")),
        (stable_diffusion, ("state_dict", "model.net.a.weight"), ("state_dict", "model_ema.netaweight")),
        (ultralytics, ("model", "0.weight"), ("ema", "0.weight")),
        (flat, ("x.a.weight",), ("ema", "x.a.weight")),
    ],
)
@pytest.mark.parametrize("ema", ["prefer", "only"])
def test_averages_stand_in_for_plain_weights(tmp_path: Path, layout: Any, plain: Any, averaged: Any, ema: str) -> None:
    one, two = saved(tmp_path, layout)
    merge(tmp_path, ema=ema)
    made = dict(tensors(torch.load(tmp_path / "out.pt", weights_only=False)))
    assert made.keys() == one.keys()
    wide = [each[averaged].double() for each in (one, two)]
    for path in (averaged, plain):
        assert made[path].dtype == one[path].dtype
        assert octets(made[path]) == octets(mean(wide, WEIGHTS).to(one[path].dtype))
    alike = one[plain].dtype == one[averaged].dtype
    assert alike == (made[plain].data_ptr() == made[averaged].data_ptr())
    for path in made.keys() - {plain, averaged}:
        if one[path].is_floating_point() and path[0] in ("d", "latent_avg", "dino_loss", "vae.weight"):
            assert octets(made[path]) == octets(mean([one[path], two[path]], WEIGHTS)), path


def test_a_safetensors_file_has_one_copy(tmp_path: Path) -> None:
    one, two = saved(tmp_path, f5)
    result = merge(tmp_path, "out.safetensors")
    made = load_safetensors(tmp_path / "out.safetensors")
    key = "model_state_dict"
    assert_same(made, {p[1]: mean([one[p], two[p]], WEIGHTS) for p in one if p[0] == key})
    assert any("left out of the output: ema_model_state_dict (" in note for note in result.notes)
    result = merge(tmp_path, "ema.safetensors", ema="prefer")
    assert "ema_model.a.weight" in load_safetensors(tmp_path / "ema.safetensors")
    assert any("left out of the output: model_state_dict (" in note for note in result.notes)


def test_a_state_dict_chosen_by_hand_does_not_make_the_others_stale(tmp_path: Path) -> None:
    one, two = saved(tmp_path, stylegan)
    merge(tmp_path, state_dict="g")
    made = dict(tensors(torch.load(tmp_path / "out.pt", weights_only=False)))
    assert all(octets(made[p]) == octets(mean([one[p], two[p]], WEIGHTS)) for p in one)


def test_averages_chosen_by_hand_stand_in_for_plain_weights(tmp_path: Path) -> None:
    """icefall averages ``model_avg`` of two checkpoints; its decoder reads ``model``."""
    one, two = saved(tmp_path, icefall)
    merge(tmp_path, state_dict="model_avg")
    made = dict(tensors(torch.load(tmp_path / "out.pt", weights_only=False)))
    path = ("model_avg", "a.weight")
    expected = mean([one[path], two[path]], WEIGHTS)
    assert octets(made[path]) == octets(expected)
    assert octets(made["model", "a.weight"]) == octets(expected.float()), "in the dtype of the plain weights"


def layered(draw: Draw, seed: int) -> Any:
    names = [f"layers.{number}.weight" for number in range(5)]
    return {
        "state_dict": {name: draw(3, 2) for name in names},
        "ema": {f"module.{name}": draw(3, 2) for name in names},
        "list": {"shadow_params": [draw(3, 2) for _ in names]},
    }


def test_rules_and_gradients_hold_in_the_copies(tmp_path: Path) -> None:
    one, two = saved(tmp_path, layered)
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: linear\n"
        "models:\n"
        "  - {model: 1.pt, parameters: {weight: [1.0, 0.0]}}\n"
        "  - {model: 2.pt, parameters: {weight: [0.0, 1.0]}}\n"
        'rules: [{match: "layers.1.*", copy: 2.pt}, {match: "layers.2.*", dtype: float16}]\n'
    )
    sm.merge(tmp_path / "recipe.yaml", out=tmp_path / "out.pt")
    made = dict(tensors(torch.load(tmp_path / "out.pt")))
    for number, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        name = f"layers.{number}.weight"
        for path in (("state_dict", name), ("ema", f"module.{name}"), ("list", "shadow_params", number)):
            expected = two[path] if number == 1 else mean([one[path], two[path]], [1 - t, t])
            expected = expected.half() if number == 2 else expected
            assert octets(made[path]) == octets(expected), path
            assert made[path].dtype == expected.dtype


def test_what_a_rule_drops_is_dropped_in_the_copies(tmp_path: Path) -> None:
    one, _ = saved(tmp_path, layered)
    result = sm.convert(tmp_path / "1.pt", tmp_path / "out.pt", drop="layers.0.*", dtype="float16")
    made = torch.load(tmp_path / "out.pt")
    assert list(made["state_dict"]) == [f"layers.{number}.weight" for number in range(1, 5)]
    assert list(made["ema"]) == [f"module.layers.{number}.weight" for number in range(1, 5)]
    assert made["ema"]["module.layers.1.weight"].dtype == torch.float16
    assert octets(made["ema"]["module.layers.1.weight"]) == octets(one["ema", "module.layers.1.weight"].half())
    assert made["list"] == {}, "a list without names cannot be without one of them"
    assert any("ema.module.layers.0.weight (like the tensor that it is a copy of)" in note for note in result.notes)
    assert any("list.shadow_params (" in note for note in result.notes)


def test_renamed_weights_are_renamed_in_the_copies(tmp_path: Path) -> None:
    saved(tmp_path, layered)
    merge(tmp_path, rename="layers.*=blocks.*")
    made = torch.load(tmp_path / "out.pt")
    assert list(made["state_dict"]) == [f"blocks.{number}.weight" for number in range(5)]
    assert list(made["ema"]) == [f"module.blocks.{number}.weight" for number in range(5)]


def grown(draw: Draw, seed: int) -> Any:
    names = [f"l{number}.weight" for number in range(3 + seed)]
    return {"model": {name: draw(2) for name in names}, "ema": {f"module.{name}": draw(2) for name in names}}


def test_policies_hold_in_the_copies(tmp_path: Path) -> None:
    one, two = saved(tmp_path, grown)
    merge(tmp_path, on_missing="union")
    made = torch.load(tmp_path / "out.pt")
    assert list(made["model"]) == [f"l{number}.weight" for number in range(5)]
    assert list(made["ema"]) == [f"module.l{number}.weight" for number in range(5)]
    assert octets(made["ema"]["module.l4.weight"]) == octets(two["ema", "module.l4.weight"])
    sm.merge([tmp_path / "2.pt", tmp_path / "1.pt"], tmp_path / "less.pt", on_missing="drop")
    assert list(torch.load(tmp_path / "less.pt")["ema"]) == [f"module.l{number}.weight" for number in range(4)]
    with pytest.raises(sm.MismatchError, match="lacks 1"):
        sm.merge([tmp_path / "2.pt", tmp_path / "1.pt"], tmp_path / "no.pt")
    assert one.keys() < two.keys()


@pytest.mark.parametrize("has_average", [True, False])
def test_the_ancestor_of_a_copy(tmp_path: Path, has_average: bool) -> None:
    """A base with an average gives it; the plain weights of a base without one are the ancestors of both."""
    one, two = saved(tmp_path, layered)
    base = layered(drawing(3), 3)
    names = list(base["state_dict"])
    torch.save(base if has_average else {"state_dict": base["state_dict"], "ema": None}, tmp_path / "base.pt")
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    sm.merge(paths, tmp_path / "out.pt", method="task_arithmetic", base=tmp_path / "base.pt", weights=[1.0, 1.0])
    made = torch.load(tmp_path / "out.pt")
    assert list(made) == ["state_dict", "ema", "list"]
    for number, name in enumerate(names):
        average, listed = base["ema"][f"module.{name}"], base["list"]["shadow_params"][number]
        plain = base["state_dict"][name]
        for path, ancestor in (
            (("state_dict", name), plain),
            (("ema", f"module.{name}"), average if has_average else plain),
            (("list", "shadow_params", number), listed if has_average else plain),
        ):
            expected = one[path].double() + two[path].double() - ancestor.double()
            assert torch.allclose(dict(tensors(made))[path].double(), expected, atol=1e-6), path


def test_what_a_base_lacks_beside_the_weights_stays(tmp_path: Path) -> None:
    saved(tmp_path, f5)
    torch.save({"model_state_dict": net(drawing(3))}, tmp_path / "base.pt")
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    result = sm.merge(paths, tmp_path / "out.pt", method="task_arithmetic", base=tmp_path / "base.pt")
    made = torch.load(tmp_path / "out.pt")
    assert made["ema_model_state_dict"]["initted"].item()
    assert made["ema_model_state_dict"]["step"].item() == 200, "a counter needs no ancestor"
    assert not any("kept as the first" in note for note in result.notes)


def test_copies_of_state_dicts_in_memory(tmp_path: Path) -> None:
    contents = [stylegan(drawing(seed), seed) for seed in (1, 2)]
    for content in contents:
        del content["args"]
    sm.merge(contents, tmp_path / "out.pt", weights=list(WEIGHTS))
    made = torch.load(tmp_path / "out.pt")
    for key in ("g", "d", "g_ema"):
        both = [content[key] for content in contents]
        assert_same(made[key], {name: mean([each[name] for each in both], WEIGHTS) for name in both[0]})


def test_frozen_weights_that_model_and_average_share_stay_shared(tmp_path: Path) -> None:
    for seed in (1, 2):
        draw = drawing(seed)
        frozen = draw(4)
        model = {"frozen.weight": frozen, "w": draw(3), "v": draw(2)}
        torch.save({"model": model, "ema": {"frozen.weight": frozen, "w": draw(3), "v": draw(2)}}, tmp_path / f"{seed}.pt")
    merge(tmp_path)
    made = torch.load(tmp_path / "out.pt")
    assert made["model"]["frozen.weight"].data_ptr() == made["ema"]["frozen.weight"].data_ptr()
    assert made["model"]["w"].data_ptr() != made["ema"]["w"].data_ptr()


def test_what_only_the_first_shares_is_merged_apart(tmp_path: Path) -> None:
    shared = torch.zeros(3)
    torch.save({"model": {"w": shared}, "ema": {"w": shared}}, tmp_path / "1.pt")
    torch.save({"model": {"w": torch.ones(3)}, "ema": {"w": torch.full((3,), 2.0)}}, tmp_path / "2.pt")
    sm.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")
    assert (made["model"]["w"].tolist(), made["ema"]["w"].tolist()) == ([0.5] * 3, [1.0] * 3)


def test_a_merge_with_copies_is_verified(tmp_path: Path) -> None:
    saved(tmp_path, stylegan)
    merge(tmp_path)
    assert sm.verify(tmp_path / "out.pt", sample="100%").tensors
    text = str(sm.plan([tmp_path / "1.pt", tmp_path / "2.pt"], out=tmp_path / "plan.pt"))
    assert "merged   g_ema (a copy of the weights)" in text
