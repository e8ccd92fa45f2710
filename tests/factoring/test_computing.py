"""The factors of one layer: what is not finite is named by its file, and what a layer read is given back."""

from __future__ import annotations

import pytest
import torch

import streammerge as sm
from adapters.arithmetic import Q, adapter_of, factors


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_a_tensor_that_is_not_finite_is_named_by_its_file(method: str) -> None:
    one, other = factors(Q, 24, 16), factors(Q, 24, 16, 2, 40)
    adapter_of(one, "one", {"r": 4, "lora_alpha": 4})
    other[f"{Q}.lora_B.weight"][3, 1] = torch.inf
    adapter_of(other, "other", {"r": 2, "lora_alpha": 2})
    with pytest.raises(sm.MismatchError, match=r"q_proj.lora_B.weight of other/adapter_model.safetensors has NaN or inf"):
        sm.merge(["one", "other"], out="made/", method=method)


def test_memory_does_not_grow_with_the_number_of_layers() -> None:
    modules = [f"model.layers.{number}.q_proj" for number in range(24)]
    adapter_of({name: each for module in modules for name, each in factors(module, 8, 8, 2).items()}, "one")
    result = sm.merge(["one.safetensors"] * 2, out="made/", method="ties", memory="100MiB", workers=1)
    assert result.peak_bytes <= 100 << 20  # 24 kept layers would have 210 MiB
