"""What the names of files in a checkpoint's folder tell."""

from __future__ import annotations

import pytest

from streammerge.formats.base import Form
from streammerge.formats.file_names import form_of_file, grouped, is_looked_for, is_shard, is_whole_model, kind_of_file


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", "weights"),
        ("anything.pth", "weights"),
        ("optimizer.pt", "training"),
        ("optimizer.bin", "training"),
        ("trainer_state.json", "training"),
        ("random_states_0.pkl", "training"),
        ("model.safetensors.index.json", "index"),
        ("model.onnx", "export"),
        ("model.gguf", "export"),
        (".gitattributes", "hidden"),
        ("checklist.chk", "checksums"),
        ("integrity.json", "checksums"),
        ("streammerge.json", "ours"),
        ("config.json", "side"),
        ("vocab.txt", "side"),
    ],
)
def test_the_kind_of_a_file(name: str, kind: str) -> None:
    assert kind_of_file(name) == kind


def test_names_are_grouped_to_forms() -> None:
    names = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "pytorch_model.bin", "x.txt"]
    assert grouped(names) == [
        (Form("model", ".safetensors", "fp16", "", tuple(names[:2])), [1, 2]),
        (Form("pytorch_model", ".bin", "", "", ("pytorch_model.bin",)), []),
    ]


def test_a_form_gives_its_names_back() -> None:
    for name in ("model.pth", "pytorch_model.fp16.bin", "consolidated.safetensors", "diffusion_pytorch_model.safetensors"):
        form = form_of_file(name)
        assert form is not None
        assert is_looked_for(form)
        assert form.named() == name
    assert form_of_file("best.pth") is None
    assert form_of_file("model-00001-of-00002.safetensors") is None


def test_adapters_and_shards_are_no_whole_models() -> None:
    assert is_whole_model("model.safetensors")
    assert not is_whole_model("adapter_model.safetensors")
    assert not is_whole_model("best.safetensors")
    assert is_shard("any-00001-of-00002.bin")
    assert not is_shard("any.bin")
