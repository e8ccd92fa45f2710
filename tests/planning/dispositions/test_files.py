"""What becomes of each file of the first input's folder. The oracles are the files' bytes and the names in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm

Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {f"layers.{n}.w": torch.randn(8, 5, generator=draw).to(dtype) for n in range(3)} | {"s": torch.tensor(1.0)}


def put(path: Path, content: Tensors | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path, {"format": "pt"})
    else:
        torch.save(content, path)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


OURS = {"streammerge.json", "streammerge.yaml"}
VOICES = {"Ana": {"latent": torch.randn(1, 32, 16), "embedding": torch.randn(1, 16, 1)}}
SMALL = {"speaker": torch.ones(1, 7)}
LARGE = {"table": torch.ones(40, 11)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("modeling_mine.py", b"pass"),
        ("campplus.onnx", b"another network"),
        ("scheduler_config.json", b"{}"),
        ("a:b ünï", b"1"),
        ("empty.txt", b""),
        ("spk_dict.pt", SMALL),
        ("speakers.pth", VOICES),
        ("vocoder.safetensors", LARGE),
        ("adapter_model.safetensors", LARGE),
        ("model-mtp-of-00005.safetensors", SMALL),
        ("merges.bin", b"no pickle"),
        ("1_Pooling/config.json", b"{}"),
        ("additional_chat_templates/tool_use.jinja", b"T"),
        ("voices/a/b/c/af.pt", SMALL),
        ("tokenizer/vocab.txt", b"a"),
        ("assets/model.safetensors", LARGE),
        ("assets/model.safetensors.index.json", b"{}"),
    ],
)
def test_what_a_loader_may_read_is_copied(tmp_path: Path, name: str, content: Tensors | bytes) -> None:
    for folder in ("a", "b"):
        put(tmp_path / folder / "model.safetensors", weights())
    put(tmp_path / "a" / name, content)
    made = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    assert names(tmp_path / "out") == {"model.safetensors", name} | OURS
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert made.written_bytes == sum((tmp_path / "out" / each).stat().st_size for each in names(tmp_path / "out"))
    assert [each.fate for each in made.plan.dispositions if name in each.names] == ["copied"]
    assert sm.verify(tmp_path / "out", sample="100%").recomputed


OTHER_FORM = "another form of the merged weights"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("pytorch_model.bin", weights(1), OTHER_FORM),
        ("model.fp16.safetensors", weights(1, torch.float16), OTHER_FORM),
        ("consolidated.safetensors", {f"renamed.{n}": t for n, t in weights(1).items()}, OTHER_FORM),
        ("original/consolidated.00.pth", {f"renamed.{n}": t for n, t in weights(1).items()}, OTHER_FORM),
        ("best.pth", {"model": weights(1), "step": 3}, OTHER_FORM),
        ("model-00003-of-00003.safetensors", {"layers.2.w": torch.ones(8, 5)}, OTHER_FORM),
        ("checkpoint-500/model.safetensors", weights(1), "training run"),
        ("runs/events.out.tfevents.1", b"1", "training run"),
        ("optimizer.pt", b"1", "training run"),
        ("rng_state_0.pth", b"1", "training run"),
        ("trainer_state.json", b"{}", "training run"),
        ("model.Q4.gguf", b"1", "for another program"),
        ("model.onnx", b"1", "for another program"),
        ("onnx/model_quantized.onnx", b"1", "for another program"),
        ("openvino_model.bin", b"1", "for another program"),
        ("flax_model.msgpack", b"1", "for another program"),
        (".gitattributes", b"1", "hidden"),
        (".cache/huggingface/x.lock", b"1", "hidden"),
        ("checklist.chk", b"1", "checksum"),
        ("/".join("abcdefghi"), b"1", "more folders"),
    ],
)
def test_what_is_stale_or_foreign_stays_behind_and_is_named(
    tmp_path: Path, name: str, content: Tensors | bytes, why: str
) -> None:
    put(tmp_path / "a" / "model.safetensors", weights())
    put(tmp_path / "a" / name, content)
    made = sm.merge([tmp_path / "a", tmp_path / "a" / "model.safetensors"], tmp_path / "out/")
    assert names(tmp_path / "out") == {"model.safetensors"} | OURS
    (decision,) = [each for each in made.plan.dispositions if each.fate == "dropped"]
    assert why in decision.why
    (dropped,) = decision.names
    assert name.startswith(dropped)
    assert any(dropped in note and "left out of the output" in note for note in made.notes)


def test_a_folder_with_another_form_of_the_weights_stays_behind_with_all_that_is_in_it(tmp_path: Path) -> None:
    put(tmp_path / "a" / "model.safetensors", weights())
    for name, content in {"model.safetensors": weights(1), "config.json": b"{}", "deep/x": b"1"}.items():
        put(tmp_path / "a" / "older" / name, content)
    made = sm.convert(tmp_path / "a", tmp_path / "out/")
    assert names(tmp_path / "out") == {"model.safetensors", "streammerge.json"}
    assert any("older/" in note for note in made.notes)


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    put(tmp_path / "a" / "model.safetensors", weights())
    put(tmp_path / "elsewhere" / "file", b"123")
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "sub" / "file").symlink_to(tmp_path / "elsewhere" / "file")
    (tmp_path / "a" / "sub" / "circle").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    made = sm.convert(tmp_path / "a", tmp_path / "out/")
    assert names(tmp_path / "out") == {"model.safetensors", "streammerge.json", "sub/file"}
    assert not (tmp_path / "out" / "sub" / "file").is_symlink()
    (decision,) = [each for each in made.plan.dispositions if each.fate == "dropped"]
    assert (decision.why, decision.names) == ("a link to a folder", ("linked/", "sub/circle/"))


def test_the_decisions_stand_in_the_receipt_without_a_path_of_the_machine(tmp_path: Path) -> None:
    put(tmp_path / "a" / "model.safetensors", weights())
    put(tmp_path / "a" / "optimizer.pt", b"1")
    sm.convert(tmp_path / "a", tmp_path / "out/")
    text = (tmp_path / "out" / "streammerge.json").read_text()
    assert '"optimizer.pt"' in text
    assert str(tmp_path) not in text


def test_shapes_alone_tell_another_form_only_of_a_whole_model(tmp_path: Path) -> None:
    """A vocoder or a text encoder may share shapes with the model, and its program needs it."""
    model = {f"layers.{n}.w": torch.ones(8, 5) for n in range(12)}
    put(tmp_path / "a" / "model.safetensors", model)
    put(tmp_path / "a" / "transposed.safetensors", {f"r.{n}": t.t().contiguous() for n, t in model.items()})
    put(tmp_path / "a" / "dvae.pth", {f"codebook.{n}": torch.ones(8, 5) for n in range(9)})
    made = sm.merge([tmp_path / "a", tmp_path / "a" / "model.safetensors"], tmp_path / "out/")
    assert names(tmp_path / "out") == {"model.safetensors", "dvae.pth"} | OURS
    (decision,) = [each for each in made.plan.dispositions if each.fate == "dropped"]
    assert decision.names == ("transposed.safetensors",)


def test_another_network_with_the_same_names_is_copied(tmp_path: Path) -> None:
    """Sequences of modules all call their tensors 0.weight, 2.weight and so on."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    vocoder = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(network.state_dict(), folder / "model.pth")
        torch.save(vocoder.state_dict(), folder / "vocoder.pth")
        torch.save({name: value.half() for name, value in network.state_dict().items()}, folder / "half.pth")
    result = sm.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out/")
    assert (tmp_path / "out" / "vocoder.pth").read_bytes() == (tmp_path / "1" / "vocoder.pth").read_bytes()
    assert not (tmp_path / "out" / "half.pth").exists()
    assert any("half.pth (another form of the merged weights" in note for note in result.notes)
