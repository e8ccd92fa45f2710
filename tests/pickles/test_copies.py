"""Which tensor of a copy is which of the chosen weights, and what stands outside state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge as sm
from streammerge.pickles.candidates import Candidate
from streammerge.pickles.copies import Originals, outside, tensor_at, trail

NAMES = ("a.w", "a.b", "c.w")
SIZES = dict(zip(NAMES, (2, 3, 4), strict=True))


def candidates(path: Path, content: Any) -> dict[str, Candidate]:
    torch.save(content, path / "in.pt")
    return {candidate.label: candidate for candidate in sm.inspect(path / "in.pt").selection.candidates}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("", ""),
        ("", "ema_model."),
        ("model.", ""),
        ("net.", "ema.net."),
        ("net.", "ema_model.module."),
        ("", "module.model."),
        ("", "shadow."),
        ("body.", "ema."),
    ],
)
def test_a_copy_has_the_names_of_the_weights(tmp_path: Path, ours: str, theirs: str) -> None:
    model = {ours + name: torch.ones(size) for name, size in SIZES.items()}
    average = {theirs + name: torch.ones(size) for name, size in SIZES.items()} | {"step": torch.tensor(3)}
    found = candidates(tmp_path, {"model": model, "other": average, "more": {}})
    known = Originals([found["model"]]).of(found["other"])
    assert {name: home.name for name, home in known.items()} == {theirs + name: ours + name for name in NAMES}


def test_parts_of_a_model_are_no_copies(tmp_path: Path) -> None:
    parts = {part: {f"{part}.{name}": torch.ones(size) for name, size in SIZES.items()} for part in ("encoder", "decoder")}
    found = candidates(tmp_path, parts)
    assert Originals([found["decoder"]]).of(found["encoder"]) == {}
    found = candidates(
        tmp_path, {"model": {n: torch.ones(s) for n, s in SIZES.items()}, "other": {n: torch.ones(9) for n in NAMES}}
    )
    assert Originals([found["model"]]).of(found["other"]) == {}, "the shapes differ"


def test_a_list_has_the_order_of_the_weights(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    lists = {
        "all": [v for v in net.state_dict().values() if v.is_floating_point()],
        "trained": [p.data for p in net.parameters()],
        "some": [p.data for p in net.parameters()][2:],
        "mean": [torch.ones(3), torch.ones(3)],
        "deeper": [p.data for p in net.parameters()][::-1],
    }
    found = candidates(tmp_path, {"model": net.state_dict(), "lists": lists})
    names = {
        kind: [home.name for home in Originals([found["model"]]).of(found[f"lists.{kind}"]).values()] for kind in lists
    }
    trained = [name for name, _ in net.named_parameters()]
    assert names["all"] == [name for name, value in net.state_dict().items() if value.is_floating_point()]
    assert names["trained"] == trained
    assert [net.state_dict()[name].shape for name in names["some"]] == [p.shape for p in lists["some"]]
    assert names["mean"] == names["deeper"] == []


def test_of_several_models_the_one_that_the_copy_is_called_after(tmp_path: Path) -> None:
    state = {name: torch.ones(size) for name, size in SIZES.items()}
    content = {"G_A": state, "G_B": dict(state), "G_A_ema": dict(state), "ema": {"G_B": dict(state)}}
    found = candidates(tmp_path, content)
    models = [found["G_A"], found["G_B"]]
    homes = {label: {id(each) for each in Originals(models).of(found[label]).values()} for label in ("G_A_ema", "ema.G_B")}
    assert homes["G_A_ema"] == {id(each) for each in found["G_A"].tensors}
    assert homes["ema.G_B"] == {id(each) for each in found["G_B"].tensors}


def test_single_tensors_are_found_again(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    module.stride = torch.tensor([8.0])  # type: ignore[assignment]
    content = {
        "model": {"w": torch.ones(2)},
        "mean": torch.zeros(3),
        "nested": [{"x": 1, "std": torch.ones(1)}, (torch.ones(4), "text")],
        "module": module,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
    }
    torch.save(content, tmp_path / "in.pt")
    tree, other = (sm.inspect(tmp_path / "in.pt").extras for _ in range(2))
    taken = {id(tree["model"])}
    found = dict(outside(tree, taken))
    assert {path[:3] for path in found} >= {
        ("mean",),
        ("nested", 0, "std"),
        ("nested", 1, 0),
        ("module", "state", "stride"),
    }
    assert not any(path[0] in ("optimizer", "model") for path in found)
    for path, ref in found.items():
        again = tensor_at(other, path)
        assert again is not None
        assert again.shape == ref.shape
    for path in (("mean", 0), ("nested", 7, "std"), ("nested", "x"), ("other",), ("module", "args", 3)):
        assert tensor_at(other, path) is None


def test_the_trail_of_a_path_ends_where_the_tree_ends(tmp_path: Path) -> None:
    torch.save({"a": {"b": [None, {"w": torch.ones(1)}]}}, tmp_path / "in.pt")
    tree = sm.inspect(tmp_path / "in.pt").extras
    assert [key for _, key, _ in trail(tree, ("a", "b", 1, "w"))] == ["a", "b", 1, "w"]
    assert trail(tree, ("a", "b", 0))[-1][2] is None
    assert [key for _, key, _ in trail(tree, ("a", "c", 1))] == ["a"]
    assert [key for _, key, _ in trail(tree, ("a", "b", 5))] == ["a", "b"]
