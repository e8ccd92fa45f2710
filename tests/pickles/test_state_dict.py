"""Which tensors of a tree are the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import load_safetensors

import streammerge as sm
from streammerge.pickles.state_dict import select


@pytest.mark.parametrize(
    ("tree", "label"),
    [
        ({"a.w": 1, "b.w": 1}, "(top level)"),
        ({"state_dict": {"w": 1}, "optimizer_states": [{"state": {0: {"exp_avg": 1}}}], "epoch": 3}, "state_dict"),
        ({"network_weights": {"w": 1}, "optimizer_state": {"state": {0: {"m": 1}}, "param_groups": []}}, "network_weights"),
        ({"dims": {}, "model_state_dict": {"w": 1}}, "model_state_dict"),
        ({"weight": {"w": 1}, "config": ["x"], "info": "x", "sr": "40k", "f0": 0}, "weight"),
        ({"best_state": {"w": 1}, "xp.cfg": "yaml"}, "best_state"),
        ({"model": None, "ema": {"w": 1}}, "ema"),
        ({"net": {"a": {"w": 1}, "b": {"module.w": 1}}, "optimizer": {"w": 1}}, "net.a + net.b"),
        ({"student": {"module.w": 1, "module.v": 1}, "teacher": {"w": 1, "v": 1}, "dino_loss": {"center": 1}}, "student"),
        ({"model": {"w": 1}, "model_avg": {"w": 1}, "sampler": {"x": 1}, "grad_scaler": {"s": 1}}, "model"),
        ({"model": {"language_model": {"embedding": {"w": 1}, "encoder": {"v": 1}}}, "rng_state": [1]},
         "model.language_model.embedding + model.language_model.encoder"),
        ({"model": {"w": 1, "version": "x"}, "criterion": {"w": 1}, "last_optimizer_state": {"state": {"a": 1}}}, "model"),
        ({"model": {"w": 1}, "optimizer": [{"state": {"0": {"exp_avg": 1}}}]}, "model"),
        ({"model": {"w": 1}, "rng": {"torch": 1, "cuda": [1]}, "losses": {"train": 1}, "hparams": {"w": 1}}, "model"),
        ({"model": {"w": 1}, "ema": {"decay": 0.9, "shadow_params": [1, 1]}, "cuda_rng_state_all": [1]}, "model"),
        ({"state_dict": {"w": 1, "v": 1}, "current_model_state": {"w": 1, "v": 1}, "averaging_state": {"n": 1}},
         "state_dict + averaging_state"),
        ({"state_dict": {"w": 1}, "ema_state_dict": {"module.w": 1}, "message_hub": {}}, "state_dict"),
        ({"ema": {"w": 1}, "model": {"w": 1}}, "model"),
        ({"G_A": {"w": 1}, "G_B": {"w": 1}, "G_A_ema": {"w": 1}, "G_B_ema": {"w": 1}}, "G_A + G_B"),
        ({"model": {"a": 1, "b": 1}, "ema": {"online_model.a": 1, "online_model.b": 1, "ema_model.a": 1, "ema_model.b": 1,
          "step": 1}}, "model"),
        ([1, 1], "(top level)"),
        ({"fc.w": 1, "gc.w": 1, "normalizer": {"mean": 1, "std": 1}}, "(top level)"),
        ({"weight": 1, "bias": 1, "normalizer": {"mean": 1, "std": 1}}, "(top level)"),
        ({"mean": 1, "std": 1, "model": {"w": 1, "v": 1, "u": 1}}, "model"),
        ({"mean": 1, "std": 1, "model": {"fc.w": 1}}, "model"),
        ({"fc.w": 1, "optimizer": {"state": {0: {"m": 1, "v": 1}}, "param_groups": []}, "epoch": 3}, "(top level)"),
        ({"fc.w": 1, "a": 0, "b": 0, "c": "", "names": ["x", "y"], "config": {"x": {"y": []}}}, "(top level)"),
        ({"fc.w": 1, "fc.b": 1, "ema": {"fc.w": 1, "fc.b": 1}}, "(top level)"),
        ({"fc.w": 1, "_extra_state": {"a": 1, "b": 1, "c": 1}}, "(top level)"),
        ({"latent_avg": 1, "g_ema": {"w": 1, "v": 1}, "args": {}}, "g_ema"),
    ],
)  # fmt: skip
def test_the_state_dict_is_found_in_every_layout(tmp_path: Path, tree: Any, label: str) -> None:
    def with_tensors(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: with_tensors(v) for k, v in node.items()}
        if isinstance(node, list):
            return [with_tensors(v) for v in node]
        return torch.ones(2) if node == 1 and not isinstance(node, bool) else node

    torch.save(with_tensors(tree), tmp_path / "in.pt")
    index = sm.inspect(tmp_path / "in.pt")
    assert index.selection.label == label
    assert select(index.extras).label == label


def test_what_was_asked_for_and_is_not_there_is_told(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "epoch": 1}, tmp_path / "in.pt")
    for how in ({"state_dict": "generator"}, {"state_dict": "epoch"}, {"ema": "only"}):
        with pytest.raises(sm.RecipeError):
            sm.inspect(tmp_path / "in.pt", **how)
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(sm.FormatError):
        sm.inspect(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("tree", "ema", "label"),
    [
        ({"model": {"w": 1}, "ema": {"w": 1}}, "prefer", "ema"),
        ({"model": {"w": 1}}, "prefer", "model"),
        ({"G_A": {"w": 1}, "G_A_ema": {"w": 1}, "G_B": {"w": 1}, "G_B_ema": {"w": 1}}, "prefer", "G_A_ema + G_B_ema"),
        ({"g": {"w": 1}, "d": {"v": 1}, "g_ema": {"w": 1}}, "prefer", "g_ema + d"),
        ({"g": {"w": 1}, "d": {"v": 1}, "g_ema": {"w": 1}}, "only", "g_ema"),
        ({"a.w": 1, "b.w": 1, "c.w": 1, "ema": {"a.w": 1, "b.w": 1, "c.w": 1}}, "prefer", "ema"),
        ({"a.w": 1, "b.w": 1, "c.w": 1, "ema": {"a.w": 1, "b.w": 1, "c.w": 1}}, "ignore", "(top level)"),
        ({"state_dict": {"w": 1}, "ema_state_dict": {"module.w": 1}, "message_hub": {}}, "only", "state_dict"),
        ({"state_dict": {"w": 1}, "current_model_state": {"w": 1}, "averaging_state": {}}, "only", "state_dict"),
    ],
)
def test_averages_are_taken_when_asked(tmp_path: Path, tree: Any, ema: Any, label: str) -> None:
    made = {
        key: {name: torch.ones(2) for name in value} if isinstance(value, dict) else torch.ones(2)
        for key, value in tree.items()
    }
    torch.save(made, tmp_path / "in.pt")
    assert sm.inspect(tmp_path / "in.pt", ema=ema).selection.label == label


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("online_model.a.w", "ema_model.a.w"),
        ("model.a.w", "ema_model.module.a.w"),
        ("model.a.w", "model_ema.aw"),
        ("student.a.w", "teacher.a.w"),
        ("a.w", "ema.a.w"),
        ("diffusion.model.a.w", "diffusion_ema.ema_model.a.w"),
    ],
)
def test_averages_replace_plain_weights_of_one_state_dict(tmp_path: Path, plain: str, averaged: str) -> None:
    names = {"w": "w", "v": "v", "u": "u"}
    state = {plain[:-1] + name: torch.zeros(2) for name in names} | {averaged[:-1] + name: torch.ones(2) for name in names}
    other = {"vae.a.w": torch.zeros(2), averaged.partition(".")[0] + ".decay": torch.tensor(0.9)}
    torch.save(state | other, tmp_path / "in.pt")
    index = sm.inspect(tmp_path / "in.pt", ema="only")
    assert set(index) == {plain[:-1] + name for name in names} | {"vae.a.w"}
    read = {found.name: found.ref for found in index.selection.tensors}
    kept = {found.name: found.ref for found in select(index.extras).tensors}
    for name in names:
        assert read[plain[:-1] + name] is kept[averaged[:-1] + name]
    assert read["vae.a.w"] is kept["vae.a.w"]
    assert len(index.notes) == 1


def test_a_state_dict_of_averages_needs_no_plain_weights(tmp_path: Path) -> None:
    torch.save({"ema_model.w": torch.ones(2), "initted": torch.tensor(True)}, tmp_path / "in.pt")
    assert set(sm.inspect(tmp_path / "in.pt", ema="only")) == {"ema_model.w", "initted"}


def test_the_other_state_dicts_stay_known(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}
    content = {"model": {"w": torch.ones(2)}, "ema": {"shadow_params": [torch.ones(2)], "decay": 0.9}}
    content |= {"optimizer": optimizer, "deep": {"opt": optimizer}, "criterion": {"w": torch.ones(2)}}
    torch.save(content, tmp_path / "in.pt")
    selection = sm.inspect(tmp_path / "in.pt").selection
    assert [copy.label for copy in selection.copies] == ["ema.shadow_params", "criterion"]


class Pair(NamedTuple):
    params: dict[str, torch.Tensor]
    step: int


class Weights(NamedTuple):
    w: torch.Tensor
    b: torch.Tensor


@dataclass
class Statistics:
    mean: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    mean: torch.Tensor
    std: torch.Tensor


class Slotted:
    __slots__ = ("model", "step")


def slotted(model: dict[str, torch.Tensor]) -> Slotted:
    made = Slotted()
    made.model, made.step = model, 3  # type: ignore[attr-defined]
    return made


RECORDS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], Callable[[Any], torch.Tensor], list[str]]] = {
    "NamedTuple with a state dict": (lambda sd: Pair(sd, 3), lambda made: made.params["w"], ["w", "b"]),
    "NamedTuple of tensors": (lambda sd: Weights(**sd), lambda made: made.w, ["0", "1"]),
    "NamedTuple in a dict": (lambda sd: {"m": Pair(sd, 3), "e": 1}, lambda made: made["m"].params["w"], ["w", "b"]),
    "list of NamedTuples": (lambda sd: [Pair(sd, 3)], lambda made: made[0].params["w"], ["w", "b"]),
    "dataclass of tensors": (lambda sd: Statistics(*sd.values()), lambda made: made.mean, ["mean", "std"]),
    "frozen dataclass with slots": (lambda sd: Frozen(*sd.values()), lambda made: made.mean, ["0", "1"]),
    "object with slots": (slotted, lambda made: made.model["w"], ["w", "b"]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_tensors_in_records_are_merged_and_the_classes_stay(tmp_path: Path, name: str) -> None:
    make, get, names = RECORDS[name]
    inputs = [make({"w": torch.full((3, 4), float(n)), "b": torch.ones(2)}) for n in (1, 2)]
    for number, content in enumerate(inputs):
        torch.save(content, tmp_path / f"{number}.pth")
    assert list(sm.inspect(tmp_path / "0.pth")) == names
    sm.merge([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth", weights_only=False)
    assert type(made) is type(inputs[0])
    assert get(made).tolist() == [[1.5] * 4] * 3
    if hasattr(inputs[0], "__dict__") or isinstance(inputs[0], tuple):  # a state dict in memory keeps the classes too
        sm.merge([{"x": each} for each in inputs], tmp_path / "out.pth", overwrite=True)
        again = torch.load(tmp_path / "out.pth", weights_only=False)["x"]
        assert (type(again), get(again).tolist()) == (type(inputs[0]), [[1.5] * 4] * 3)


def test_arrays_of_objects_among_the_weights_are_refused_by_name(tmp_path: Path) -> None:
    texts = np.array(["a", "b"])
    for array, said in (
        (np.array([{}, 2], object), r"odd as an array of objects"),
        (np.zeros(2, [("a", "f4")]), r"odd as an array of records"),
        (np.ma.masked_array([1.0], [True]), r"odd as an array of masked numbers"),
    ):
        torch.save({"model": {"w": np.ones(2), "v": torch.ones(2), "odd": array, "texts": texts}}, tmp_path / "in.pth")
        with pytest.raises(sm.MismatchError, match=said):
            sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    torch.save({"model": {"w": np.ones(2), "v": torch.ones(2), "texts": texts}}, tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=False)["model"]["texts"].tolist() == ["a", "b"]


@pytest.mark.parametrize("statistics", [False, True], ids=["without batch norm", "with batch norm"])
@pytest.mark.parametrize("key", ["shadow_params", "averages"])
def test_a_list_of_averages_replaces_the_weights_when_asked(tmp_path: Path, statistics: bool, key: str) -> None:
    plain = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3), "b.weight": torch.ones(2, 3)}
    if statistics:
        plain |= {"n.running_mean": torch.full((2,), 9.0), "n.num_batches_tracked": torch.tensor(4)}
    shadow = [torch.full((3, 2), 2.0), torch.full((3,), 3.0), torch.full((2, 3), 4.0)]
    held = {"decay": 0.9, key: shadow, "collected_params": None}
    torch.save({"state_dict": plain, "ema": held, "epoch": 1}, tmp_path / "a.pt")
    for choice in ("prefer", "only"):
        result = sm.convert(tmp_path / "a.pt", tmp_path / f"{choice}.safetensors", ema=choice)
        made = load_safetensors(tmp_path / f"{choice}.safetensors")
        assert made.keys() == plain.keys()
        assert [made[name].flatten()[0].item() for name in ("a.weight", "a.bias", "b.weight")] == [2, 3, 4]
        assert not statistics or made["n.running_mean"].tolist() == [9, 9]
        assert not any("left out" in note and key in note for note in result.notes), "it is what was written"
    sm.convert(tmp_path / "a.pt", tmp_path / "plain.safetensors")
    assert load_safetensors(tmp_path / "plain.safetensors")["a.bias"].tolist() == [1, 1, 1]


def test_a_list_that_fits_no_weights_is_no_average_of_them(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}, "ema": {"shadow_params": [torch.ones(4)]}}, tmp_path / "a.pt")
    with pytest.raises(sm.RecipeError, match="no averaged"):
        sm.convert(tmp_path / "a.pt", tmp_path / "out.safetensors", ema="only")


def test_the_state_of_an_optimizer_is_no_checkpoint(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    with pytest.raises(sm.FormatError, match="no weights but the state of an optimizer; leave it out of the inputs"):
        sm.inspect(tmp_path / "opt.pt")


def test_an_input_without_averages_is_named_where_averages_are_preferred(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "ema": {"w": torch.full((3,), 5.0)}}, tmp_path / "a.pt")
    torch.save({"model": {"w": torch.full((3,), 3.0)}}, tmp_path / "b.pt")
    result = sm.merge([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "out.safetensors", ema="prefer")
    assert load_safetensors(tmp_path / "out.safetensors")["w"].tolist() == [4, 4, 4]
    assert any("b.pt: it has no averaged (EMA) weights, so its plain ones" in note for note in result.notes)
