"""State dicts in memory in place of files: merge, plan, convert, inspect, verify."""

from __future__ import annotations

import argparse
import gc
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import assert_same, load_safetensors, mean, trained, voice
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.digest import can_be_resumed

Tensors = dict[str, torch.Tensor]


def floats(seed: int) -> Tensors:
    return {name: tensor for name, tensor in trained(seed).items() if tensor.is_floating_point()}


def test_state_dicts_merge_like_files(tmp_path: Path) -> None:
    one, two, base = floats(1), floats(2), floats(3)
    for number, state in enumerate((one, two, base)):
        save_file(state, tmp_path / f"{number}.safetensors")
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    ways_of: tuple[tuple[str, dict[str, Any]], ...] = (
        ("linear", {"weights": [0.3, 0.7]}),
        ("ties", {"parameters": {"density": 0.4}}),
        ("slerp", {"parameters": {"t": 0.2}}),
    )
    for method, parameters in ways_of:
        bases: list[Any] = [tmp_path / "2.safetensors", base] if method == "ties" else [None, None]
        sm.merge(files, tmp_path / "files.safetensors", method=method, base=bases[0], overwrite=True, **parameters)
        expected = load_safetensors(tmp_path / "files.safetensors")
        for inputs in ([one, two], [one, files[1]], [files[0], two]):
            for ways in ({}, {"io": "pread", "workers": 1}, {"memory": "48MiB"}):
                out = tmp_path / "out.safetensors"
                sm.merge(inputs, out, method=method, base=bases[1], overwrite=True, **parameters, **ways)
                assert_same(load_safetensors(out), expected)


def test_views_numpy_and_tied_tensors(tmp_path: Path) -> None:
    numbers = torch.arange(35.0).view(5, 7)
    state = {
        "turned": numbers.t(),
        "half": numbers.bfloat16(),
        "every": numbers.flatten()[::3],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "head": torch.nn.Parameter(numbers),
        "embedding": numbers,
        "array": numbers.numpy()[::-1].astype("f8"),
        "number": numpy.float32(7),
        "eight": numbers.to(torch.float8_e4m3fn),
        "mask": numbers > 3,
    }
    index = sm.inspect(state)
    assert index.aliases == {"embedding": "head"}
    assert "number" not in index.entries  # a number, like the step of a training
    assert index.format == "in memory"
    wanted = {
        n: torch.as_tensor(numpy.ascontiguousarray(t)) if isinstance(t, numpy.ndarray) else t for n, t in state.items()
    }
    del wanted["number"]
    sm.convert(state, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), {n: t.detach() for n, t in wanted.items()})
    sm.convert(state, tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth", weights_only=False)
    assert loaded["number"] == 7
    assert isinstance(loaded["head"], torch.nn.Parameter)
    assert loaded["head"].data_ptr() == loaded["embedding"].data_ptr()
    del loaded["number"]
    assert_same({n: t.detach() for n, t in loaded.items()}, {n: t.detach() for n, t in wanted.items()})


def test_wrapped_checkpoints_are_looked_through_as_in_files(tmp_path: Path) -> None:
    inside = [voice(1, 10, 3, 2.0), voice(2, 30, 2, 1.0)]
    inside[0]["args"] = argparse.Namespace(lr=0.1)
    paths = [tmp_path / "1.pth", tmp_path / "2.pth"]
    for path, content in zip(paths, inside, strict=True):
        torch.save(content, path)
    sm.merge(paths, tmp_path / "files.pth")
    sm.merge(inside, tmp_path / "out.pth")
    made, wanted = (torch.load(tmp_path / name, weights_only=False) for name in ("out.pth", "files.pth"))
    assert_same(made["model"], wanted["model"])
    assert type(made["model"]) is OrderedDict
    assert made["model"]._metadata == wanted["model"]._metadata
    assert {k: v for k, v in made.items() if k != "model"} == {k: v for k, v in wanted.items() if k != "model"}
    assert (made["step"], made["epoch"], made["args"].lr) == (30, 3, 0.1)
    assert sm.inspect(inside[0]).selection.label == sm.inspect(paths[0]).selection.label
    with pytest.raises(sm.RecipeError, match="there is no state dict"):
        sm.inspect(inside[0], state_dict="other")


def test_a_module_inside_gives_its_state_dict() -> None:
    layer = torch.nn.Linear(3, 2)
    assert list(sm.inspect({"net": layer, "step": 3}).entries) == ["weight", "bias"]


def test_the_same_object_as_model_and_base_is_one_checkpoint(tmp_path: Path) -> None:
    one, two = floats(1), floats(2)
    plan = sm.plan([one, two, one], base=one, method="task_arithmetic")
    assert list(plan.recipe.named_models) == ["<in memory 1>", "<in memory 2>"]
    assert len(plan.recipe.checkpoints) == 2


def test_receipt_and_verify_say_that_an_input_was_in_memory(tmp_path: Path) -> None:
    one, two, out = floats(1), floats(2), tmp_path / "out.safetensors"
    save_file(two, tmp_path / "two.safetensors")
    for given in ([one, tmp_path / "two.safetensors"], [one, two], one):
        result = sm.merge(given, out, overwrite=True)
        assert not can_be_resumed(result.plan)
        verified = sm.verify(out)
        assert any("<in memory 1>" in note and "cannot be read again" in note for note in verified.notes)
        with pytest.raises(sm.VerifyError, match="its values cannot be computed again: <in memory 1>"):
            sm.verify(out, sample="100%")
        assert str(tmp_path) not in out.read_bytes().decode("latin-1"), "no path of this machine"


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(event: object) -> None:
        if type(event).__name__ == "TaskDone":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge([floats(1), floats(2)], tmp_path / "out.safetensors", listener=stop)
    assert not list(tmp_path.iterdir())


def test_nan_is_told_by_the_name_of_the_state_dict(tmp_path: Path) -> None:
    one, two = floats(1), floats(2)
    two["scale"] = torch.tensor(float("nan"))
    with pytest.raises(sm.VerifyError, match="scale: 1 in <in memory 2>"):
        sm.merge([one, two], tmp_path / "out.safetensors")


def test_mistakes(tmp_path: Path) -> None:
    one = floats(1)
    with pytest.raises(sm.MismatchError, match="<in memory 2> lacks 1: one"):
        sm.plan([one, {n: t for n, t in one.items() if n != "one"}])
    with pytest.raises(sm.FormatError, match="<in memory 1>: it holds no tensors"):
        sm.inspect({"step": 3})
    around: dict[str, Any] = {"w": torch.ones(3)}
    around["self"] = {"again": around}
    with pytest.raises(sm.FormatError, match="holds itself"):
        sm.inspect(around)
    with pytest.raises(sm.RecipeError, match="`convert_first` converts files"):
        sm.plan([one], convert_first=tmp_path / "kept")
    index = sm.inspect({"w": torch.ones(3), "callback": lambda: None})
    assert re.search("left out, since they cannot be pickled: callback", index.notes[0])


def test_nothing_is_copied_but_chunks_and_nothing_is_kept(tmp_path: Path) -> None:
    """What the process holds besides the inputs stays below the budget, and the inputs can go when it is done."""
    big = {"w": torch.ones(40 << 20), "t": torch.ones(5 << 10, 2 << 10).t()}
    result = sm.merge([big, big], tmp_path / "out.safetensors", memory="64MiB")
    assert result.peak_bytes < 64 << 20
    seen = mean([big["t"], big["t"]], [1, 1])
    assert torch.equal(load_safetensors(tmp_path / "out.safetensors")["t"], seen)
    import weakref

    gone = weakref.ref(big["w"])
    del big, result
    gc.collect()
    assert gone() is None


def test_quantised_weights_in_memory_are_refused(tmp_path: Path) -> None:
    packed = {"w.qweight": torch.zeros(4, 4, dtype=torch.int32), "w.qzeros": torch.zeros(4, dtype=torch.int32)}
    state = packed | {"w.scales": torch.ones(4), "v": torch.ones(3)}
    with pytest.raises(sm.MismatchError, match="in memory 1> is quantised: GPTQ or AWQ"):
        sm.merge([state, state], tmp_path / "out.safetensors", integers="first")
