"""What becomes of the entries of a pickle beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from conftest import mean

import streammerge as sm
from streammerge.planning.dispositions.ledger import Decision

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((2,), float(value)), "b.w": torch.full((3,), float(value))}


def ema(value: float, **other: Any) -> dict[str, Any]:
    return {"decay": 0.9, "num_updates": 3, "shadow_params": list(weights(value).values()), **other}


def merged(folder: Path, *contents: Any, **options: Any) -> tuple[Any, Any]:
    """Returns the merged content of these checkpoints, and the result."""
    for number, content in enumerate(contents):
        torch.save(content, folder / f"{number}.pt")
    paths = [folder / f"{number}.pt" for number in range(len(contents))]
    result = sm.merge(paths, folder / "out.pt", overwrite=True, **options)
    return torch.load(folder / "out.pt"), result


def decisions(folder: Path, inputs: int, out: str = "plan.pt") -> list[Decision]:
    return list(sm.plan([folder / f"{number}.pt" for number in range(inputs)], out=folder / out).dispositions)


@pytest.mark.parametrize(
    ("first", "second", "left", "gone"),
    [
        ({"ema": weights(1)}, {}, {}, "ema"),
        ({"ema": weights(1)}, {"ema": None}, {"ema": None}, ""),
        ({"ema": ema(1)}, {}, {}, "ema"),
        ({"ema": ema(1)}, {"ema": None}, {"ema": None}, ""),
        ({"ema": ema(1, collected_params=list(weights(1).values()))}, {"step": 1}, {}, "ema"),
        ({"x": {"ema": {"state": weights(1), "decay": 1}, "n": 1}}, {}, {"x": {"n": 1}}, "x.ema"),
        ({"callbacks": {"EMA": {"ema_weights": weights(1)}, "other": 1}}, {}, {"callbacks": {"other": 1}}, "callbacks.EMA"),
        ({"best": {"params": list(weights(1).values()), "n": 1}}, {}, {"best": {"n": 1}}, "best.params"),
        ({"ema": {"a.w": torch.ones(2), "b.w": torch.ones(5)}}, {"ema": {"a.w": torch.ones(2)}}, {}, "ema"),
    ],
)
def test_a_copy_that_only_some_have_is_left_out(tmp_path: Path, first: Any, second: Any, left: Any, gone: str) -> None:
    made, result = merged(tmp_path, {"model": weights(1), **first}, {"model": weights(3), **second})
    assert made.pop("model")["a.w"].tolist() == [2.0, 2.0]
    assert made == left
    notes = [note for note in result.notes if note.startswith("left out of the output: ")]
    assert [note.partition(": ")[2].partition(" (")[0] for note in notes] == ([gone] if gone else [])
    edited = [each for each in decisions(tmp_path, 2) if each.fate == "edited"]
    assert len(edited) == (not gone)


def test_a_list_that_another_has_not_is_none_as_there(tmp_path: Path) -> None:
    """torch_ema's loader reads ``collected_params`` and takes None for nothing."""
    one, two = ema(1, collected_params=list(weights(5).values())), ema(3, collected_params=None)
    made, _ = merged(tmp_path, {"model": weights(1), "ema": one}, {"model": weights(1), "ema": two})
    assert made["ema"]["collected_params"] is None
    assert made["ema"]["shadow_params"][0].tolist() == [2.0, 2.0]


def test_a_copy_whose_tensors_differ_is_left_out(tmp_path: Path) -> None:
    one = {"model": weights(1), "ema": weights(1)}
    two = {"model": weights(3), "ema": weights(3) | {"c.w": torch.ones(1)}}
    made, result = merged(tmp_path, one, two)
    assert list(made) == ["model"]
    assert any("ema (it would be stale: the inputs do not have the same tensors)" in note for note in result.notes)
    made, _ = merged(tmp_path, one, two, on_missing="base")
    assert made["ema"]["a.w"].tolist() == [2.0, 2.0]


def test_copies_are_paired_where_their_keys_differ(tmp_path: Path) -> None:
    made, _ = merged(tmp_path, {"model": weights(1), "ema": weights(5)}, {"model": weights(1), "model_ema": weights(7)})
    assert list(made) == ["model", "ema"]
    assert made["ema"]["b.w"].tolist() == [6.0, 6.0, 6.0]


def test_single_tensors(tmp_path: Path) -> None:
    rng = torch.get_rng_state()

    def content(value: float, **other: Any) -> dict[str, Any]:
        numbers = {"mean": torch.tensor(value), "size": torch.tensor([1, 2]), "num_updates": torch.tensor(int(value))}
        numbers |= {"std": [torch.full((2,), value), "x"], "half": torch.full((2,), value).half()}
        metrics = {
            "metrics": {"best": torch.tensor(value), "all": torch.full((2,), value)},
            "loss": {"w": torch.tensor(value)},
        }
        metrics |= {
            "criterion": {"centre": torch.full((1, 2), value), "x": 1, "y": 2},
            "rng_state": rng,
            "complex": torch.full((1,), 1j * value),
        }
        return {"model": weights(value), **numbers, **metrics, **other}

    one = content(1.0, mine=torch.ones(1), shape=torch.ones(2), kind=torch.ones(2))
    two = content(3.0, shape=torch.ones(3), kind=torch.ones(2, dtype=torch.int64))
    made, result = merged(tmp_path, one, two)
    assert made["mean"].item() == 2.0
    assert made["std"][0].tolist() == made["half"].tolist() == [2.0, 2.0]
    assert made["half"].dtype == torch.float16
    assert made["complex"].tolist() == [2j]
    assert made["num_updates"].item() == 3
    assert made["size"].tolist() == [1, 2]
    assert made["metrics"]["best"].item() == made["loss"]["w"].item() == 1.0
    assert made["metrics"]["all"].tolist() == [1.0, 1.0]
    assert made["criterion"]["centre"].tolist() == [[2.0, 2.0]]
    assert torch.equal(made["rng_state"], rng)
    kept = [note for note in result.notes if note.startswith("kept as the first input has them")]
    assert kept == [
        "kept as the first input has them: size (no floating-point numbers)",
        "kept as the first input has them: metrics.best, metrics.all, loss.w (a record of the training)",
        "kept as the first input has them: mine (not in every input)",
        "kept as the first input has them: shape (of another shape in another input)",
        "kept as the first input has them: kind (of another dtype in another input)",
    ]
    copied = {name: each.why for each in decisions(tmp_path, 2) if each.fate == "copied" for name in each.names}
    assert copied["metrics.best"] == "a record of the training"
    assert set(copied) == {"size", "mine", "shape", "kind", "metrics.best", "metrics.all", "loss.w", "rng_state"}


def test_single_tensors_keep_their_dtype(tmp_path: Path) -> None:
    content = {"model": weights(1), "ema": weights(1), "log_alpha": torch.tensor(0.1)}
    made, _ = merged(tmp_path, content, content, dtype="float16")
    assert made["model"]["a.w"].dtype == made["ema"]["a.w"].dtype == torch.float16
    assert made["log_alpha"].dtype == torch.float32


def test_a_kept_optimizer_is_the_first_inputs(tmp_path: Path) -> None:
    def content(value: float) -> dict[str, Any]:
        state = {0: {"exp_avg": torch.full((2,), float(value))}}
        return {"model": weights(value), "optimizer": {"state": state, "param_groups": []}, "x": {"ema": weights(value)}}

    made, _ = merged(tmp_path, content(1), content(3), keep_optimizer=True)
    assert made["optimizer"]["state"][0]["exp_avg"].tolist() == [1.0, 1.0]
    assert made["x"]["ema"]["a.w"].tolist() == [2.0, 2.0]
    made, _ = merged(tmp_path, content(1), content(3))
    assert list(made) == ["model", "x"]


@pytest.mark.parametrize("key", ["fp32_groups", "fp32_groups_flat", "fp32_from_fp16_params", "fp32_from_fp16"])
def test_an_optimizer_with_the_weights_in_float32_is_not_kept(tmp_path: Path, key: str) -> None:
    """DeepSpeed 0.19.8 without ZeRO in fp16, Megatron's legacy format and apex: loading it undoes the merge."""
    state = {"optimizer_state_dict": OPTIMIZER, key: [[torch.ones(3)]]}
    content = {"module": weights(1), "optimizer": state}
    with pytest.raises(sm.RecipeError, match=rf"holds the weights in float32 \(optimizer\.{key}\), .* leave `keep_optim"):
        merged(tmp_path, content, content, keep_optimizer=True)
    made, _ = merged(tmp_path, content, content)
    assert list(made) == ["module"]
    content = {"module": weights(1), "optimizer": {"optimizer_state_dict": OPTIMIZER, key: []}}
    made, _ = merged(tmp_path, content, content, keep_optimizer=True)
    assert list(made) == ["module", "optimizer"]


def test_the_optimizer_beside_a_copy_is_left_out(tmp_path: Path) -> None:
    content = {"model": weights(1), "average": {"ema": weights(1), "optimizer": OPTIMIZER}}
    made, _ = merged(tmp_path, content, content)
    assert list(made["average"]) == ["ema"]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"model": weights(1), "ema": weights(1), "epoch": 3}, {"ema", "epoch"}),
        ({"model": weights(1), "latent_avg": torch.ones(3), "optimizer": OPTIMIZER}, {"latent_avg", "optimizer"}),
        ({"model": weights(1), "ema": ema(1)}, {"ema.shadow_params"}),
        ({**weights(1), "c.w": torch.ones(1), "epoch": 3}, {"epoch"}),
        ({"x": {"model": weights(1), "log_alpha": torch.ones(())}}, {"x.log_alpha"}),
        (weights(1), set()),
    ],
)
def test_what_a_safetensors_file_does_not_hold_is_named(tmp_path: Path, content: Any, names: set[str]) -> None:
    torch.save(content, tmp_path / "0.pt")
    dropped = [each for each in decisions(tmp_path, 1, "out.safetensors") if each.fate == "dropped"]
    assert {name for each in dropped for name in each.names} == names
    tensors = {name for each in dropped for name in each.names if each.why.startswith("outside the state dict")}
    assert tensors == names & {"latent_avg", "x.log_alpha"}


class Norm(NamedTuple):
    mean: torch.Tensor
    var: torch.Tensor


def test_numbers_of_a_record_beside_the_weights_are_merged(tmp_path: Path) -> None:
    for number in (1.0, 3.0):
        beside = {"norm": Norm(torch.full((2,), number), torch.tensor(number)), "data_stats": {"std": torch.tensor(number)}}
        model = {"model": {f"w{n}": torch.full((3,), number) for n in range(3)}, **beside}
        torch.save(model | {"nets": [{"a.w": torch.full((2,), number)}]}, tmp_path / f"{number:g}.pth")
    result = sm.merge([tmp_path / "1.pth", tmp_path / "3.pth"], tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth", weights_only=False)
    assert (made["norm"].mean.tolist(), made["norm"].var.item(), made["data_stats"]["std"].item()) == ([2.0, 2.0], 2.0, 2.0)
    assert made["nets"][0]["a.w"].tolist() == [2.0, 2.0]
    assert not [note for note in result.notes if "nets" in note]


def test_what_a_run_records_is_named_where_it_is_the_firsts(tmp_path: Path) -> None:
    for number in (1.0, 3.0):
        torch.save(
            {"model": {"w": torch.full((3,), number)}, "history": {"losses": torch.full((2,), number)}},
            tmp_path / f"{number:g}.pth",
        )
    result = sm.merge([tmp_path / "1.pth", tmp_path / "3.pth"], tmp_path / "out.pth")
    assert any("history.losses" in note and "record of the training" in note for note in result.notes)


def test_what_only_a_later_input_has_is_named(tmp_path: Path) -> None:
    torch.save({"model": weights(1)}, tmp_path / "1.pth")
    torch.save({"model": weights(3), "log_alpha": torch.ones(()), "std": [torch.ones(2), "x"]}, tmp_path / "2.pth")
    result = sm.merge([tmp_path / "1.pth", tmp_path / "2.pth"], tmp_path / "out.pth")
    assert "left out of the output: log_alpha, std.0 (the first input lacks it)" in result.notes
    assert list(torch.load(tmp_path / "out.pth")) == ["model"]


def test_plain_numbers_that_differ_are_told(tmp_path: Path) -> None:
    for value in (1.0, 3.0):
        content = {
            "model": weights(value),
            "log_alpha": value,
            "scale": numpy.float32(value),
            "same": 0.5,
            "epoch": int(value),
        }
        torch.save(content | {"config": {"lr": value}, "best_loss": value}, tmp_path / f"{value:g}.pth")
    result = sm.merge([tmp_path / "1.pth", tmp_path / "3.pth"], tmp_path / "out.pth")
    assert "kept as the first input has them: log_alpha, scale (plain numbers that differ)" in result.notes
    made = torch.load(tmp_path / "out.pth", weights_only=False)
    assert (made["log_alpha"], made["scale"], made["epoch"]) == (1.0, 1.0, 3)


def _trained(seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    torch.manual_seed(seed)
    net = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return net.state_dict(), optimizer.state_dict(), torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict()


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_state_of_a_training_in_a_tuple_becomes_none(tmp_path: Path, kind: type) -> None:
    """The other members stay at their positions, for a loader that unpacks them."""
    paths = [tmp_path / "1.pth", tmp_path / "2.pth"]
    states = [_trained(seed) for seed in (1, 2)]
    for path, seed, state in zip(paths, (1, 2), states, strict=True):
        torch.save(kind((*state, seed)), path)
    result = sm.merge(paths, tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth")
    assert type(made) is kind
    weights, optimizer, scheduler, seed = made
    assert (optimizer, scheduler, seed) == (None, None, 1)
    assert torch.equal(weights["weight"], mean([states[0][0]["weight"], states[1][0]["weight"]], [1, 1]))
    stored = sm.inspect(tmp_path / "out.pth").container.storages
    assert sum(each.nbytes for each in stored.values()) == 15 * 4
    assert any("[1], [2] (stale after a merge, so None is in its place" in note for note in result.notes)
    assert any("[3] (plain numbers that differ)" in note for note in result.notes)
    sm.merge(paths, tmp_path / "kept.pth", keep_optimizer=True)
    assert torch.load(tmp_path / "kept.pth")[1]["param_groups"] == states[0][1]["param_groups"]


def test_a_scaler_is_known_by_its_content(tmp_path: Path) -> None:
    """Lightning has it under the name of its plugin, apex under any."""
    scaler = {"scale": 4.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 1}
    apex = {"loss_scaler0": {"loss_scale": 4.0, "unskipped": 2}}
    paths = [tmp_path / "1.pth", tmp_path / "2.pth"]
    for path in paths:
        content = {"state_dict": {"net.w": torch.ones(2)}, "NativeMixedPrecisionPlugin": scaler, "halves": apex, "epoch": 1}
        torch.save(content, path)
    sm.merge(paths, tmp_path / "out.pth")
    assert [*torch.load(tmp_path / "out.pth")] == ["state_dict", "epoch"]


def test_a_time_stamp_is_that_of_the_longest_training(tmp_path: Path) -> None:
    paths = [tmp_path / "1.pth", tmp_path / "2.pth", tmp_path / "3.pth"]
    for path, epoch in zip(paths, (1, 3, 2), strict=True):
        stamp = {"iteration": 0, "epoch": epoch, "batch": 100 * epoch, "batch_in_epoch": 9 - epoch}
        content = {"state": {"model": {"net.w": torch.ones(2)}, "timestamp": {"Timestamp": stamp}, "seed": epoch}}
        torch.save(content, path)
    result = sm.merge(paths, tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth")["state"]
    assert made["timestamp"] == {"Timestamp": {"iteration": 0, "epoch": 3, "batch": 300, "batch_in_epoch": 6}}
    assert made["seed"] == 1
    assert any("state.timestamp = that of input 2" in note for note in result.notes)
    assert [note for note in result.notes if "plain numbers that differ" in note] == [
        "kept as the first input has them: state.seed (plain numbers that differ)"
    ]


def test_differing_records_of_a_training_are_recorded(tmp_path: Path) -> None:
    paths = [tmp_path / "1.pth", tmp_path / "2.pth"]
    for path, ready in zip(paths, (1, 3), strict=True):
        torch.save({"state_dict": {"net.w": torch.ones(2)}, "loops": {"fit": {"ready": ready}}}, path)
    plan = sm.plan(paths, tmp_path / "out.pth")
    assert [d.names for d in plan.dispositions if d.why.startswith("settings and records")] == [("loops.fit.ready",)]


class Trained(NamedTuple):
    model: Any
    optimizer: Any
    step: int


def test_the_fields_of_a_named_tuple_are_members(tmp_path: Path) -> None:
    paths = [tmp_path / "1.pth", tmp_path / "2.pth"]
    for path, step in zip(paths, (1, 2), strict=True):
        torch.save(Trained(weights(step), OPTIMIZER, step), path)
    result = sm.merge(paths, tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth", weights_only=False)
    assert (type(made), made.optimizer, made.step) == (Trained, None, 1)
    assert torch.equal(made.model["a.w"], torch.full((2,), 1.5))
    assert any("[1] (stale after a merge" in note for note in result.notes)
    assert any("[2] (plain numbers that differ)" in note for note in result.notes)


def test_tensors_in_other_forms_stay_whole(tmp_path: Path) -> None:
    """The values of a sparse tensor belong to its own indices, so no mean of the values alone is a tensor."""

    def content(value: float) -> dict[str, Any]:
        place = int(value) % 2
        graph = torch.sparse_coo_tensor([[place, 0], [0, 1]], [value, 3.0], (2, 2))
        rows = graph.to_dense().t().contiguous().to_sparse_csr()
        ragged = torch.nested.nested_tensor([torch.full((2 + place,), value), torch.full((3 - place,), value)])
        return {"model": weights(value), "graph": graph, "more": {"rows": rows}, "ragged": ragged}

    made, result = merged(tmp_path, content(1), content(2))
    first = torch.load(tmp_path / "0.pt")
    assert made["model"]["a.w"].tolist() == [1.5, 1.5]
    for own, other in ((made["graph"], first["graph"]), (made["more"]["rows"], first["more"]["rows"])):
        assert torch.equal(own.to_dense(), other.to_dense())
    assert all(map(torch.equal, made["ragged"].unbind(), first["ragged"].unbind()))
    notes = [note for note in result.notes if note.startswith("kept as the first input has them")]
    assert notes == [
        "kept as the first input has them: graph, more.rows (sparse, so not merged)",
        "kept as the first input has them: ragged (nested, so not merged)",
    ]


def test_a_sparse_tensor_that_safetensors_does_not_hold_is_named_once(tmp_path: Path) -> None:
    torch.save({"model": weights(1), "graph": torch.eye(2).to_sparse()}, tmp_path / "0.pt")
    plan = sm.plan([tmp_path / "0.pt", tmp_path / "0.pt"], out=tmp_path / "x.safetensors")
    left = [(each.names, each.why) for each in plan.dispositions if each.fate == "dropped"]
    assert left == [(("graph",), "sparse, which a safetensors file does not hold")]


def test_an_optimizer_in_another_branch_is_left_out(tmp_path: Path) -> None:
    def content(value: float) -> dict[str, Any]:
        state = {"optimizer": OPTIMIZER, "warm": {"sched": {"last_epoch": 1, "_step_count": 2}}, "seed": 1}
        loops = {"fit": {"optimizer": {"param_groups": 1}}}  # a record, without which Lightning does not go on
        return {"model": weights(value), "trainer": state, "loops": loops}

    made, result = merged(tmp_path, content(1), content(3))
    assert made["trainer"] == {"warm": {}, "seed": 1}
    assert made["loops"] == content(1)["loops"]
    assert any("left out of the output: trainer.optimizer, trainer.warm.sched (stale" in note for note in result.notes)
    made, _ = merged(tmp_path, content(1), content(3), keep_optimizer=True)
    assert set(made["trainer"]) == {"optimizer", "warm", "seed"}
