"""A .pth merged from .pth files: the first input's container with its tensors replaced."""

from __future__ import annotations

import argparse
import collections
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, mean, octets, trained, voice

import streammerge as sm


def test_a_voice_keeps_its_container(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    result = sm.merge(voices, tmp_path / "voice.pth", weights=[0.6, 0.4])
    merged = torch.load(tmp_path / "voice.pth", weights_only=True)
    news, audiobook = (torch.load(path, weights_only=True) for path in voices)
    assert list(merged) == ["config", "model", "step", "epoch", "date", "model_loss"]
    assert merged["config"] == news["config"]
    assert (merged["step"], merged["epoch"]) == (30, 3)
    assert merged["model_loss"] == {"train_loss": pytest.approx(1.6), "eval_loss": None}
    assert type(merged["model"]) is collections.OrderedDict
    assert merged["model"]._metadata == {"": {"version": 1}}
    assert list(merged["model"]) == list(news["model"])
    name = "xtts.layer.weight"
    assert octets(merged["model"][name]) == octets(mean([news["model"][name], audiobook["model"][name]], [0.6, 0.4]))
    assert merged["model"]["xtts.norm.num_batches_tracked"].item() == 102
    assert any("optimizer" in note and "`keep_optimizer=True`" in note for note in result.notes)


def test_the_archive_is_sound(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    sm.merge(voices, tmp_path / "voice.pth")
    with zipfile.ZipFile(tmp_path / "voice.pth") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            archive.fp.seek(info.header_offset + 26)  # type: ignore[union-attr]
            name, extra = (int.from_bytes(archive.fp.read(2), "little") for _ in range(2))  # type: ignore[union-attr]
            assert (info.header_offset + 30 + name + extra) % 64 == 0
    mapped = torch.load(tmp_path / "voice.pth", mmap=True)
    assert_same(mapped["model"], torch.load(tmp_path / "voice.pth")["model"])


def test_keep_optimizer_copies_the_firsts(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    sm.merge(voices, tmp_path / "voice.pth", keep_optimizer=True)
    merged, news = torch.load(tmp_path / "voice.pth"), torch.load(voices[0])
    assert merged["scaler"] == news["scaler"]
    assert merged["optimizer"][0]["param_groups"] == news["optimizer"][0]["param_groups"]
    ours, theirs = (c["optimizer"][0]["state"][0] for c in (merged, news))
    assert_same(ours, theirs)


def test_coquis_own_loader_takes_the_output(tmp_path: Path) -> None:
    io = pytest.importorskip("trainer.io")
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20))
    paths = []
    for step in (5, 7):
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 30)).sum().backward()
        optimizer.step()
        io.save_checkpoint(
            {"a": 1}, model, tmp_path, current_step=step, epoch=1, optimizer=[optimizer], model_loss={"train_loss": 1.5}
        )
        paths.append(tmp_path / f"checkpoint_{step}.pth")
    sm.merge(paths, tmp_path / "merged.pth", weights=[0.6, 0.4])
    loaded = io.load_fsspec(tmp_path / "merged.pth", map_location="cpu")
    model.load_state_dict(loaded["model"], strict=True)
    first, second = (io.load_fsspec(path, map_location="cpu")["model"] for path in paths)
    assert octets(loaded["model"]["0.weight"]) == octets(mean([first["0.weight"], second["0.weight"]], [0.6, 0.4]))
    assert loaded["step"] == 7


class Plain:
    """A class that a checkpoint may mention. Its reader must not need it."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and vars(self) == vars(other)


class AttributeDict(dict):  # type: ignore[type-arg]
    pass


def odd_content() -> dict[str, Any]:
    shared = [1, 2, {"three": (3, 3.5, -1, 1 << 80, "four", b"\xff\x00", True, None)}]
    return {
        "args": argparse.Namespace(lr=1e-3, path=Path("a/b"), names={"x"}, frozen=frozenset([1])),
        "plain": Plain(a=1, nested=Plain(b=[])),
        "attributes": AttributeDict(k=1),
        "default": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], maxlen=3),
        "complex": 1 + 2j,
        "bytes": bytearray(b"abc"),
        "shared": [shared, shared],
        "class": Plain,
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        3: "an int key",
        ("a", 1): "a tuple key",
    }


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_everything_else_in_the_pickle_survives(tmp_path: Path, protocol: int, legacy: bool) -> None:
    content = odd_content() | {"model": trained(1)}
    torch.save(content, tmp_path / "in.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    sm.merge([tmp_path / "in.pth"], tmp_path / "out.pth")
    merged = torch.load(tmp_path / "out.pth", weights_only=False)
    assert_same(merged.pop("model"), trained(1))
    assert merged["shared"][0] is merged["shared"][1]
    assert merged == odd_content()
    assert f"{Plain.__module__}.Plain" in sm.inspect(tmp_path / "out.pth").classes()


def test_a_cycle_stays_a_cycle(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"model": {"w": torch.ones(2)}}
    loop["self"] = loop
    torch.save(loop, tmp_path / "in.pth")
    sm.merge([tmp_path / "in.pth"], tmp_path / "out.pth")
    merged = torch.load(tmp_path / "out.pth")
    assert merged["self"] is merged


def test_parameters_stay_parameters(tmp_path: Path) -> None:
    values = {"p": torch.nn.Parameter(torch.ones(3)), "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False)}
    values["leaf"] = torch.ones(2, requires_grad=True)
    torch.save(values, tmp_path / "in.pth")
    sm.merge([tmp_path / "in.pth"], tmp_path / "out.pth")
    merged = torch.load(tmp_path / "out.pth", weights_only=True)
    assert [type(v) for v in merged.values()] == [torch.nn.Parameter, torch.nn.Parameter, torch.Tensor]
    assert [v.requires_grad for v in merged.values()] == [True, False, True]


def test_whole_modules_are_merged_and_written_again(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LSTM(4, 5))
        module.register_buffer("transient", torch.zeros(1), persistent=False)
        torch.save(module, tmp_path / f"{seed}.pt")
    models = [torch.load(tmp_path / f"{seed}.pt", weights_only=False).state_dict() for seed in (1, 2)]
    assert list(sm.inspect(tmp_path / "1.pt").entries) == list(models[0])
    sm.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt", weights=[0.3, 0.7])
    merged = torch.load(tmp_path / "out.pt", weights_only=False)
    assert_same(merged.state_dict(), {
        name: mean([m[name] for m in models], [0.3, 0.7]) if models[0][name].is_floating_point() else models[0][name]
        for name in models[0]
    })  # fmt: skip
    assert merged(torch.ones(2, 3))[0].shape == (2, 5)


def test_gpt_sovits_header_is_kept(tmp_path: Path) -> None:
    torch.save({"weight": {"w": torch.ones(3).half()}, "config": {}, "info": "s2v2Pro"}, tmp_path / "in.pth")
    data = bytearray((tmp_path / "in.pth").read_bytes())
    data[:2] = b"05"
    (tmp_path / "in.pth").write_bytes(data)
    sm.merge([tmp_path / "in.pth"], tmp_path / "out.pth")
    made = (tmp_path / "out.pth").read_bytes()
    assert made[:2] == b"05"
    (tmp_path / "fixed.pth").write_bytes(b"PK" + made[2:])
    assert_same(torch.load(tmp_path / "fixed.pth")["weight"], {"w": torch.ones(3).half()})


def test_a_flat_state_dict_comes_from_safetensors(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    sm.convert(voices[0], tmp_path / "a.safetensors")
    sm.merge([tmp_path / "a.safetensors", voices[1]], tmp_path / "out.bin")
    merged = torch.load(tmp_path / "out.bin", weights_only=True, mmap=True)
    expected = mean([trained(1)["layer.bias"], trained(2)["layer.bias"]], [1, 1])
    assert octets(merged["xtts.layer.bias"]) == octets(expected)


@pytest.mark.slow
def test_archives_beyond_4_gib(tmp_path: Path) -> None:
    """Needs Zip64 in every place: a storage larger than 4 GiB, and records that begin after 4 GiB."""
    numel = (1 << 31) + 12_345
    with open(tmp_path / "in.safetensors", "wb") as file:
        header = f'{{"big":{{"dtype":"F16","shape":[{numel}],"data_offsets":[0,{2 * numel}]}},'
        header += f'"small":{{"dtype":"F16","shape":[3],"data_offsets":[{2 * numel},{2 * numel + 6}]}}}}'
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2 * numel + 6)
    with open(tmp_path / "in.safetensors", "r+b") as file:
        file.seek(-6 - 2, 2)
        file.write(torch.tensor([7, 1, 2, 3], dtype=torch.float16).numpy().tobytes())
    result = sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth")
    assert result.peak_bytes < 64 << 20
    loaded = torch.load(tmp_path / "out.pth", mmap=True, weights_only=True)
    assert loaded["big"].shape == (numel,)
    assert loaded["big"][-1].item() == 7
    assert loaded["small"].tolist() == [1, 2, 3]
    assert zipfile.ZipFile(tmp_path / "out.pth").testzip() is None
    sm.merge([tmp_path / "out.pth"] * 2, tmp_path / "merged.safetensors", memory="64MiB")
    with open(tmp_path / "merged.safetensors", "rb") as file:
        file.seek(-8, 2)
        assert torch.frombuffer(bytearray(file.read()), dtype=torch.float16).tolist() == [7, 1, 2, 3]


def test_voice_helpers_are_what_the_trainer_writes() -> None:
    trainer = pytest.importorskip("trainer.io")
    assert set(voice(1, 1, 1, 1.0)) >= {"config", "model", "optimizer", "scheduler", "scaler", "step", "epoch", "date"}
    assert callable(trainer.save_model)


def test_a_flat_state_dict_with_dictionaries_among_its_values(tmp_path: Path) -> None:
    """Its tensors are merged, those in the dictionaries too, and the state of the training is left out."""
    for seed in (1, 2):
        flat = {f"fc{n}.w": torch.full((2,), float(seed)) for n in range(4)}
        more = {"normalizer": {"mean": torch.full((3,), float(seed)), "n": 3}, "ema": {k: t * 10 for k, t in flat.items()}}
        optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
        torch.save({**flat, **more, "optimizer": optimizer, "epoch": seed}, tmp_path / f"{seed}.pt")
    result = sm.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")
    assert made["fc0.w"].tolist() == [1.5, 1.5]
    assert made["ema"]["fc0.w"].tolist() == [15.0, 15.0]
    assert (made["normalizer"]["mean"].tolist(), made["normalizer"]["n"], made["epoch"]) == ([1.5] * 3, 3, 2)
    assert "optimizer" not in made
    assert any("optimizer" in note for note in result.notes)
    assert list(sm.inspect(tmp_path / "out.pt")) == [f"fc{n}.w" for n in range(4)]
