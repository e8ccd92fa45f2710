"""An adapter is made whole or not at all, within its budget, and never over an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from adapters.arithmetic import drawn
from streammerge.events import Event, Published, RunStarted, TaskDone


def models(count: int = 3, size: int = 40) -> None:
    base = {f"layers.{number}.q.weight": drawn(number, size, size) for number in range(count)}
    save_file(base, "base.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in base.items()}, "tuned.safetensors")


def extracted(**options: Any) -> sm.AdapterResult:
    return sm.extract("tuned.safetensors", "adapter/", base="base.safetensors", **options)


def test_a_run_that_fails_leaves_nothing() -> None:
    models()

    def fails(event: Event) -> None:
        if isinstance(event, TaskDone):
            raise sm.TaskError("no more")

    with pytest.raises(sm.TaskError):
        extracted(listener=fails, rank=2)
    assert sorted(path.name for path in Path().iterdir()) == ["base.safetensors", "tuned.safetensors"]
    seen: list[Event] = []
    result = extracted(listener=seen.append, rank=2)
    assert {RunStarted, TaskDone, Published} <= set(map(type, seen))
    assert sorted(path.name for path in Path("adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "streammerge.json",
        "streammerge.yaml",
    ]
    assert result.written_bytes == sum(path.stat().st_size for path in Path("adapter").iterdir())
    assert repr(result).startswith("<AdapterResult adapter")


def test_an_input_that_changes_meanwhile_is_noticed() -> None:
    models()

    def changes(event: Event) -> None:
        if isinstance(event, TaskDone):
            save_file({"other": torch.zeros(3)}, "base.safetensors")

    with pytest.raises(sm.ChangedError):
        extracted(listener=changes, rank=2)
    assert not Path("adapter").exists()


def test_the_peak_stays_within_the_budget() -> None:
    models(4, 1500)
    result = extracted(rank=8, memory="128MiB", workers=8)
    assert result.peak_bytes <= 128 << 20


def test_an_adapter_does_not_replace_its_inputs() -> None:
    models()
    extracted(rank=2)
    with pytest.raises(sm.FormatError, match="one of the inputs"):
        sm.merge(["adapter"], out="adapter/", method="svd", overwrite=True)
    Path("file").write_text("x")
    with pytest.raises(sm.RecipeError, match="is a file"):
        sm.extract("tuned.safetensors", "file", base="base.safetensors", overwrite=True)
