"""Tensors of an output as rows of tables are the same as one object each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning import alignment as module
from streammerge.planning.aligned import Merged, MergedTensors, elements, named, names_of, unlike, where
from streammerge.planning.alignment import Alignment, align
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import Tasks, alike
from streammerge.planning.tasks import where as tasks_where


def model(seed: int, layers: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    made = {"embed.weight": torch.randn(8, 4), "empty": torch.zeros(0, 3), "scale": torch.tensor(1.5)}
    for layer in range(layers):
        made[f"layers.{layer}.w"] = torch.randn(4, 4).bfloat16()
        made[f"layers.{layer}.b"] = torch.randn(4)
        made[f"layers.{layer}.n.num_batches_tracked"] = torch.tensor(3 + seed)
        made[f"layers.{layer}.ids"] = torch.arange(5)
    return made


def save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [save(model(seed), tmp_path / f"{seed}.safetensors") for seed in range(2)]


def planned(monkeypatch: pytest.MonkeyPatch, pair: list[Path], **how: object) -> tuple[list[Alignment], Plan]:
    """Returns the alignments of a plan too."""
    made: list[Alignment] = []

    def kept(*given: object) -> Alignment:
        made.append(align(*given))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr("streammerge.planning.plan.align", kept)
    return made, sm.plan(pair if "recipe" not in how else None, **how) if "recipe" not in how else sm.plan(**how)  # type: ignore[arg-type]


def as_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the aligner treat all checkpoints as if they were no tables."""
    monkeypatch.setattr(module._Aligner, "_tables", lambda self: None)


def recipes(pair: list[Path]) -> Iterator[dict[str, object]]:
    a, b = map(str, pair)
    models = [{"model": a}, {"model": b}]
    yield {"models": models, "merge_method": "linear"}
    yield {"models": models, "merge_method": "linear", "dtype": "float16"}
    yield {"models": [{"model": b}], "base_model": a, "merge_method": "task_arithmetic"}
    yield {"models": models, "base_model": a, "merge_method": "slerp", "parameters": {"t": [0, 0.5, 1]}}
    weights = [{"filter": "w", "value": 0.25}, {"value": 0.75}]
    weighted = [{"model": a, "parameters": {"weight": weights}}, {"model": b, "parameters": {"weight": 1.0}}]
    yield {"models": weighted, "merge_method": "linear"}
    rules = [
        {"match": "*.w", "copy": b},
        {"match": "embed*", "dtype": "float32"},
        {"match": "*.1.b", "drop": True},
        {"match": "*.b", "merge_method": "slerp", "parameters": {"t": 0.5}},
    ]
    yield {"models": models, "base_model": a, "merge_method": "linear", "rules": rules}


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("out", ["out.safetensors", "out.pth", "out/"])
def test_rows_give_the_plan_of_objects(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, out: str
) -> None:
    recipe = list(recipes(pair))[number]
    rows, plan = planned(monkeypatch, pair, recipe=recipe, out=tmp_path / out)
    as_objects(monkeypatch)
    ones, expected = planned(monkeypatch, pair, recipe=recipe, out=tmp_path / out)
    table, plain = rows[0].merged, ones[0].merged
    assert isinstance(table, MergedTensors)
    assert isinstance(plain, list)
    assert any(not isinstance(each, Merged) for each in table.made), "nothing is a row"
    assert list(table) == plain
    assert table[: len(plain)] == plain
    assert list(plan.tasks) == list(expected.tasks)
    assert plan.counts() == expected.counts()
    assert plan.read_bytes == expected.read_bytes
    assert plan.to_json()["dispositions"] == expected.to_json()["dispositions"]
    for one, other in zip(plan.layout.files, expected.layout.files, strict=True):
        assert (one.name, one.size, one.literals) == (other.name, other.size, other.literals)
        assert dict(one.offsets) == dict(other.offsets)
    assert plan.torch_needed == expected.torch_needed


def test_what_is_told_of_rows_is_what_objects_tell(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (alignment,), plan = planned(monkeypatch, pair)
    rows, ones = alignment.merged, list(alignment.merged)
    assert isinstance(rows, MergedTensors)
    assert [name for name, _ in named(rows)] == names_of(rows) == names_of(ones) == [m.spec.name for m in ones]
    assert [like.method for _, like in named(rows)] == [m.method for m in ones]
    assert list(where(rows, lambda name: name.endswith("w"))) == list(where(ones, lambda name: name.endswith("w")))
    assert all(m in ones for m in unlike(rows))
    totals: list[dict[str, int]] = [{}, {}]
    for total, merged in zip(totals, (rows, ones), strict=True):
        for spec, numel in elements(merged):
            total[spec.dtype] = total.get(spec.dtype, 0) + numel
    assert totals[0] == totals[1]
    taken = rows.take([5, 0, 3])
    assert list(taken) == [ones[5], ones[0], ones[3]]
    assert isinstance(plan.tasks, Tasks)
    assert sum(count for _, count in alike(plan.tasks)) == len(plan.tasks)
    matrices = tasks_where(plan.tasks, lambda task: len(task.out.shape) == 2)
    assert matrices == [number for number, task in enumerate(plan.tasks) if len(task.out.shape) == 2]


def test_shards_in_another_order_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = model(0), model(1)
    first = save(one, tmp_path / "a.safetensors")
    folder = tmp_path / "b"
    folder.mkdir()
    names, weight_map = sorted(other, reverse=True), {}
    for shard, own in enumerate((names[:5], names[5:])):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        save({name: other[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (alignment,), plan = planned(monkeypatch, [first, folder])
    assert isinstance(alignment.merged, MergedTensors)
    assert [[source.spec.name for source in task.sources] for task in plan.tasks] == [
        [task.out.name] * 2 for task in plan.tasks
    ]


def test_a_tensor_that_a_model_lacks_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = model(0), model(1)
    del other["layers.1.w"]
    pair = [save(each, tmp_path / f"{n}.safetensors") for n, each in enumerate((one, other))]
    (alignment,), _ = planned(monkeypatch, pair, on_missing="base")
    as_objects(monkeypatch)
    (expected,), _ = planned(monkeypatch, pair, on_missing="base")
    assert isinstance(alignment.merged, MergedTensors)
    assert list(alignment.merged) == list(expected.merged)
    lacking = next(m for m in alignment.merged if m.spec.name == "layers.1.w")
    assert lacking.why == "not in every input"
    assert lacking in list(unlike(alignment.merged))
