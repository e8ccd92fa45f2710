"""torch's tensors in a plain pickle, as ``pickle.dump`` writes them, and StyleGAN's pickles of modules."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors, mean, octets

import streammerge as sm
from formats.suite import FormatSuite, Tensors
from streammerge.pickles.storages import EnclosedStorages


class PickledTensors(FormatSuite):
    PROTOCOL = 2
    NAME = "model.pkl"

    def write(self, path: Path, tensors: Tensors) -> None:
        path.write_bytes(pickle.dumps(tensors, self.PROTOCOL))


class TestProtocol2(PickledTensors):
    """The storages are texts."""


class TestProtocol4(PickledTensors):
    PROTOCOL = 4


def content(seed: int) -> OrderedDict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    large = torch.randn(300, 200, generator=make)
    return OrderedDict(
        large=large,
        turned=large.t(),
        cut=large[3:5, ::2],
        short=torch.randn(3, generator=make),
        empty=torch.zeros(0, 4),
        single=torch.tensor(2.5 + seed),
        half=torch.randn(4, 5, generator=make).bfloat16(),
        parameter=torch.nn.Parameter(torch.randn(7, generator=make)),
        count=torch.tensor(3),
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(("name", "out"), [("a.pkl", "out.pkl"), ("a.pth", "out.pth"), ("a.pkl", "out.pth")])
def test_a_merge_has_the_form_of_the_first_input(tmp_path: Path, protocol: int, name: str, out: str) -> None:
    """A plain pickle stays one under a name of its own kind, or under one that ends like the input's."""
    one, two = content(1), content(2)
    for file, tensors in ((name, one), (f"other-{name}", two)):
        (tmp_path / file).write_bytes(pickle.dumps({"model": tensors, "tied": tensors["large"], "note": "n"}, protocol))
    seen = set()
    for way in ({}, {"workers": 1, "memory": "48MiB"}, {"io": "pread", "workers": 3}):
        sm.merge([tmp_path / name, tmp_path / f"other-{name}"], tmp_path / out, weights=[0.6, 0.4], overwrite=True, **way)  # type: ignore[arg-type]
        seen.add((tmp_path / out).read_bytes())
    assert len(seen) == 1
    data = seen.pop()
    plain = name.endswith(out[-4:])
    made = pickle.loads(data) if plain else torch.load(io.BytesIO(data))
    assert sm.inspect(tmp_path / out).format == ("pickle" if plain else "PyTorch zip")
    assert (made["note"], made["tied"] is made["model"]["large"]) == ("n", True)
    assert list(made["model"]) == list(one)
    for key, tensor in made["model"].items():
        assert type(tensor) is type(one[key])
        wanted = mean([one[key], two[key]], [0.6, 0.4]) if tensor.is_floating_point() else one[key]
        assert octets(tensor.detach()) == octets(wanted.detach()), key
    assert sm.verify(tmp_path / out, sample=1.0).recomputed


def test_a_dtype_without_a_storage_class_can_be_loaded(tmp_path: Path) -> None:
    """torch cannot load such a tensor from the pickle that it wrote itself."""
    tensors = {"w": torch.arange(8.0).to(torch.float8_e4m3fn), "v": torch.ones(3)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tensors))
    sm.merge([tmp_path / "a.pkl"] * 2, tmp_path / "b.pkl")
    sm.merge([tmp_path / "b.pkl"] * 2, tmp_path / "c.pkl")
    made = pickle.loads((tmp_path / "c.pkl").read_bytes())
    assert {name: octets(tensor) for name, tensor in made.items()} == {name: octets(t) for name, t in tensors.items()}


def test_storages_of_another_form_are_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"w": torch.ones(2)}, 4)
    for old, new, said in (
        (b"\x8a\nl\xfc\x9c", b"\x8a\nl\xfc\x9d", "in another form than torch writes"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "in another form than torch writes"),
        (b"K\2Ntq\4Q", b"K\3Ntq\4Q", "another number of elements|has others"),
        (b"FloatStorage", b"floatStorage", "in another form than torch writes"),
    ):
        assert data.count(old) == 1
        (tmp_path / "a.pkl").write_bytes(data.replace(old, new))
        with pytest.raises(sm.FormatError, match=said):
            sm.inspect(tmp_path / "a.pkl")


STYLEGAN = '''
import copy, pickle, sys, types
import torch

classes = {}


def reconstruct(meta):
    made = classes[meta["class_name"]].__new__(classes[meta["class_name"]])
    made.__dict__.update(meta["state"])
    return made


sys.modules["torch_utils"] = types.ModuleType("torch_utils")
module = sys.modules["torch_utils.persistence"] = types.ModuleType("torch_utils.persistence")
reconstruct.__module__, reconstruct.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
module._reconstruct_persistent_obj = reconstruct


class Persistent(torch.nn.Module):
    """Pickles as a class under torch_utils.persistence does: its source and its state are the arguments of a call."""

    def __init_subclass__(cls):
        classes[cls.__name__] = cls

    def __reduce__(self):
        state = super().__reduce__()[2]
        meta = dict(type="class", version=6, module_src="class Layer: ...", class_name=type(self).__name__, state=state)
        return reconstruct, (meta,), None


class Layer(Persistent):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(50, 4))


class Generator(Persistent):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = Layer(), 2.0
        self.register_buffer("w_avg", torch.randn(4))


def made(seed):
    torch.manual_seed(seed)
    whole, average = Generator(), Generator()
    return {"G": whole, "D": Layer(), "G_ema": average, "augment_pipe": None, "training_set_kwargs": {"path": "p"}}
'''
WRITES = f"{STYLEGAN}\nfor seed in (1, 2):\n    pickle.dump(made(seed), open(f'{{sys.argv[1]}}/{{seed}}.pkl', 'wb'))"
READS = f"""{STYLEGAN}
one, two, out = (pickle.load(open(f"{{sys.argv[1]}}/{{name}}.pkl", "rb")) for name in ("1", "2", "out"))
for key in ("G", "D", "G_ema"):
    a, b, c = (each[key].state_dict() for each in (one, two, out))
    assert list(a) == list(c) and type(out[key]) is type(one[key])
    for name in a:
        assert torch.equal(c[name], ((a[name].double() + b[name].double()) / 2).float()), (key, name)
print(out["G"].scale, out["training_set_kwargs"], out["augment_pipe"])
"""


def test_modules_with_their_source_are_merged_unexecuted(tmp_path: Path) -> None:
    """Networks of StyleGAN carry the source of their classes, which is never run here."""

    def run(code: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout

    run(WRITES)
    inputs = [tmp_path / "1.pkl", tmp_path / "2.pkl"]
    assert sm.inspect(inputs[0]).selection.label == "G + D"
    sm.merge(inputs, tmp_path / "out.pkl")
    assert run(READS).split() == ["2.0", "{'path':", "'p'}", "None"]
    sm.merge(inputs, tmp_path / "out.safetensors", state_dict="G_ema")
    assert sorted(load_safetensors(tmp_path / "out.safetensors")) == ["layer.weight", "w_avg"]


def test_bytes_that_are_mentioned_again_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small hostile file would take hours otherwise."""
    storage = torch.ones(2).untyped_storage().__reduce__()[1][0]
    load = b"\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93q\x00"
    value = b"B" + len(storage).to_bytes(4, "little") + storage + b"q\x01"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + load + value + b"00" + b"h\x00h\x01\x85R0" * 50 + b"N.")
    times, read = [], EnclosedStorages._read

    def counted(self: EnclosedStorages, head: bytes) -> Any:
        times.append(head)
        return read(self, head)

    monkeypatch.setattr(EnclosedStorages, "_read", counted)
    with pytest.raises(sm.FormatError, match="it holds no tensors"):
        sm.inspect(tmp_path / "a.pkl")
    assert len(times) == 1
