"""Receipts, and what verify accepts and refuses."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tracemalloc
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from conftest import Cli, trained, voice
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.planning.budget import Budget
from streammerge.planning.costs import budget_of
from streammerge.planning.plan import Plan
from streammerge.planning.receipt import read_receipt
from streammerge.planning.tasks import MergeTask
from streammerge.stores.base import Input, Location, Status, Store
from streammerge.stores.checksums import CRC32C
from streammerge.stores.inputs import InputFiles
from streammerge.stores.locations import parse
from streammerge.stores.registry import STORES
from streammerge.verifying import attempts, values

OUTPUTS = {"safetensors": "out.safetensors", "pickle": "out.pth", "folder": "out"}


def receipt(out: Path) -> dict[str, Any]:
    if out.is_dir():
        return json.loads((out / "streammerge.json").read_text())  # type: ignore[no-any-return]
    if out.suffix == ".pth":
        with zipfile.ZipFile(out) as archive:
            return json.loads(archive.read("archive/streammerge.json"))  # type: ignore[no-any-return]
    with safe_open(out, "pt") as file:
        return json.loads(file.metadata()["streammerge_receipt"])  # type: ignore[no-any-return]


def crc32c(data: bytes) -> int:
    """Computes CRC-32C bit by bit from the polynomial."""
    value = 0xFFFFFFFF
    for octet in data:
        value ^= octet
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@pytest.mark.parametrize("container", OUTPUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"weights": [0.7, 0.3]},
        {"dtype": "bfloat16"},
        {"method": "karcher"},
        {"method": "ties", "base": "a.safetensors", "parameters": {"density": 0.3}},
        {"method": "dare_ties", "base": "a.safetensors", "parameters": {"density": 0.5}, "seed": 7},
        {"method": "model_stock", "base": "a.safetensors"},
        {"method": "sce", "base": "a.safetensors", "parameters": {"select_topk": 0.4}},
        {"dtype": "float16", "method": "slerp", "parameters": {"t": 0.4}},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_what_was_merged_verifies(pair: list[Path], here: Path, container: str, options: dict[str, Any]) -> None:
    out = here / OUTPUTS[container]
    inputs = ["a.safetensors", "b.safetensors"]
    models = 2 if options.get("method") == "model_stock" else len(inputs)
    if options.get("method") == "model_stock":
        save_file(
            {n: t * 1.5 if t.is_floating_point() else t for n, t in load_file("b.safetensors").items()}, "c.safetensors"
        )
        inputs = ["b.safetensors", "c.safetensors"]
    assert models == len(inputs)
    sm.merge(inputs, out, **options)
    verified = sm.verify(out, sample="100%")
    assert verified.sampled_elems == sum(t.numel() for n, t in trained(0).items() if n != "norm.num_batches_tracked")
    assert verified.sampled_elems * 0.5 < verified.equal_elems + verified.repeated_elems <= verified.sampled_elems
    assert verified.digest == receipt(out)["digest"]
    assert verified.notes == []


def test_linear_means_are_the_float64_result_to_the_bit(pair: list[Path], here: Path) -> None:
    sm.merge(["a.safetensors", "b.safetensors"], here / "out.safetensors", weights=[0.6, 0.4])
    verified = sm.verify(here / "out.safetensors", sample="100%")
    assert verified.equal_elems == verified.sampled_elems
    assert verified.repeated_elems < 20  # integers and booleans, which are compared bit for bit


@pytest.mark.parametrize("source", ["a.safetensors", "news.pth"])
@pytest.mark.parametrize("container", OUTPUTS)
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"drop": ["layer.*", "model.xtts.l*"]}], ids=str)
def test_what_was_converted_verifies(
    pair: list[Path], here: Path, source: str, container: str, options: dict[str, Any]
) -> None:
    torch.save(voice(1, 10, 3, 2.0), "news.pth")
    sm.convert(source, here / OUTPUTS[container], **options)
    assert sm.verify(here / OUTPUTS[container], sample="100%").recomputed


def test_strided_and_compressed_inputs_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        torch.save({"w": torch.randn(40, 30).t(), "v": torch.randn(5)}, f"{number}.pth")
    with zipfile.ZipFile("0.pth") as old, zipfile.ZipFile("packed.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    sm.merge(["packed.pth", "1.pth"], "out.pth")
    assert sm.verify("out.pth", sample="100%").sampled_tensors == 2


# ------------------------------------------------------------------------------------------------------------- receipts


def test_the_receipt_has_the_checksums_of_the_standard(pair: list[Path], here: Path) -> None:
    out = here / "out.safetensors"
    sm.merge(["a.safetensors", "b.safetensors"], out)
    sums = receipt(out)["checksums"][""]
    content = out.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    spans = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    expected = [crc32c(content[8 + length + a : 8 + length + b]) for a, b in spans if a < b and b - a < 5000]
    found = [int(sums[8 * n : 8 * n + 8], 16) for n, (a, b) in enumerate(s for s in spans if s[0] < s[1]) if b - a < 5000]
    assert len(expected) > 3
    assert found == expected


@pytest.mark.parametrize("container", OUTPUTS)
def test_the_digest_seals_the_receipt(pair: list[Path], here: Path, container: str) -> None:
    sm.merge(["a.safetensors", "b.safetensors"], here / OUTPUTS[container])
    said = receipt(here / OUTPUTS[container])
    text = json.dumps({**said, "digest": "0" * 64}, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == said["digest"]


@pytest.mark.parametrize("container", OUTPUTS)
def test_nothing_of_the_machine_is_in_an_output(
    pair: list[Path], here: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder, user, time and output name give the same bytes."""
    name = OUTPUTS[container]
    sm.merge(pair, here / name)
    shutil.copytree(here / "in", here / "elsewhere")
    monkeypatch.chdir(here / "elsewhere")
    monkeypatch.setenv("USER", "somebody")
    sm.merge(["a.safetensors", "b.safetensors"], here / f"other-{name}")

    def content(out: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else {"": out.read_bytes()}

    assert content(here / name) == content(here / f"other-{name}")
    everything = b"".join(content(here / name).values())
    assert str(here).encode() not in everything


def test_inputs_are_named_with_size_and_hashes(pair: list[Path], here: Path) -> None:
    out = here / "out.safetensors"
    sm.merge(["a.safetensors", "b.safetensors"], out, hash=True)
    for name, said in receipt(out)["inputs"].items():
        content = (here / "in" / name).read_bytes()
        header = content[: 8 + int.from_bytes(content[:8], "little")]
        assert said == {
            "bytes": len(content),
            "header_sha256": hashlib.sha256(header).hexdigest(),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    sm.verify(out, sample="100%")


def test_the_header_of_an_archive_is_all_but_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.full((100,), 7.0)}, "a.pth")
    sm.convert("a.pth", "out.safetensors")
    content = Path("a.pth").read_bytes()
    values = torch.full((100,), 7.0).numpy().tobytes()
    assert content.count(values) == 1
    expected = hashlib.sha256(content.replace(values, b"")).hexdigest()
    assert receipt(Path("out.safetensors"))["inputs"]["a.pth"]["header_sha256"] == expected


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("out", ["a.safetensors", "plain.pth", "a"])
def test_what_has_no_receipt_cannot_be_verified(folder: Path, cli: Cli, out: str) -> None:
    torch.save({"w": torch.ones(2)}, "plain.pth")
    said = cli("verify", f"in/{out}", code=3).stderr
    assert "has no receipt" in said


def test_what_is_not_there_is_a_mistake(tmp_path: Path, cli: Cli) -> None:
    assert "does not exist" in cli("verify", "x.safetensors", code=2).stderr
    (tmp_path / "x.safetensors").write_text("hello\n")
    assert "cannot be read" in cli("verify", "x.safetensors", code=3).stderr


def test_a_receipt_that_was_edited_is_none(pair: list[Path], here: Path) -> None:
    sm.merge(["a.safetensors", "b.safetensors"], here / "out", weights=[0.5, 0.5])
    path = here / "out" / "streammerge.json"
    path.write_text(path.read_text().replace("0.5", "0.4", 1))
    with pytest.raises(sm.VerifyError, match="receipt is damaged"):
        sm.verify(here / "out")


HOSTILE: dict[str, dict[str, Any]] = {
    "sums that are no text": {"checksums": {"": 5}},
    "sums of odd length": {"checksums": {"": "abc"}},
    "no sums": {"checksums": {}},
    "sums of a folder": {"checksums": {"model.safetensors": "00000000"}},
    "sums of a file elsewhere": {"checksums": {"../../../etc/passwd": "00000000"}},
    "sums of a device": {"checksums": {"/dev/zero": "00000000"}},
    "sums too many": {"checksums": {"": "00000000" * 100_000}},
    "another checksum": {"checksum": "md5"},
    "inputs that are a list": {"inputs": []},
    "inputs that are numbers": {"inputs": {"a.safetensors": 3}},
    "inputs without sizes": {"inputs": {"a.safetensors": {"header_sha256": "x"}}},
    "a form of tomorrow": {"form": 3},
    "a recipe that is a list": {"recipe": []},
    "a recipe of numbers": {"recipe": {"merge_method": 3, "models": 5}},
    "a recipe with models that are devices": {
        "recipe": {"merge_method": "linear", "models": [{"model": "/dev/zero"}, {"model": "/proc/self/mem"}]}
    },
    "a recipe with one's own code": {"recipe": {"merge_method": "os:getcwd", "models": [{"model": "a.safetensors"}]}},
    "a recipe that is a path": {"recipe": "/etc/passwd"},
    "a recipe with a model in a home": {"recipe": {"merge_method": "linear", "models": [{"model": "~/x.safetensors"}]}},
    "a name without end": {"checksums": {"x" * 5000: "00000000"}},
    "a recipe without end": {"recipe": {"merge_method": json.loads("[" * 500 + "]" * 500)}},
    "a key too many": {"more": 1},
    "a version that is a list": {"versions": [[]], "seed": {}},
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("container", ["safetensors", "folder"])
def test_a_strangers_receipt_is_refused_in_a_sentence(pair: list[Path], here: Path, container: str, attack: str) -> None:
    """The digest of the receipt is right, because a stranger can compute it too."""
    out = here / "in" / OUTPUTS[container]
    sm.merge(["a.safetensors", "b.safetensors"], out)
    made = {**receipt(out), **HOSTILE[attack], "digest": "0" * 64}
    made["digest"] = hashlib.sha256(json.dumps(made, separators=(",", ":")).encode()).hexdigest()
    if container == "folder":
        (out / "streammerge.json").write_text(json.dumps(made, separators=(",", ":")))
    else:
        save_file(load_file(out), out, {"streammerge_receipt": json.dumps(made, separators=(",", ":"))})
    with pytest.raises(sm.VerifyError) as refused:
        sm.verify(out, sample="100%")
    assert str(refused.value).replace("\n", "").isprintable()
    assert len(str(refused.value)) < 2000


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_values_that_the_recipe_does_not_give_are_found(pair: list[Path], here: Path, method: str) -> None:
    """The inputs' headers are unchanged, but one number differs."""
    out = here / "out.safetensors"
    sm.merge(["a.safetensors", "b.safetensors"], out, method=method)
    where = sm.inspect("b.safetensors").entries["layer.weight"].offset + 4 * 100
    content = bytearray(pair[1].read_bytes())
    content[where : where + 4] = torch.tensor([9.0]).numpy().tobytes()
    pair[1].write_bytes(content)
    with pytest.raises(sm.VerifyError, match=r"differs from the result of its recipe and these inputs in layer\.weight"):
        sm.verify(out, sample="100%")


def test_one_large_number_excuses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = torch.randn(1000)
    values[7] = 1e6
    for name in ("a", "b"):
        save_file({"w": values}, f"{name}.safetensors")
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors")
    save_file({"w": torch.where(values == 1e6, values, values + 0.9)}, "a.safetensors")
    save_file({"w": torch.where(values == 1e6, values, values + 0.9)}, "b.safetensors")
    with pytest.raises(sm.VerifyError, match="differs from the result"):
        sm.verify("out.safetensors", sample="100%")


def test_infinity_is_not_near_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.tensor([60000.0, 1.0]), "v": torch.tensor([1.0])}, "a.safetensors")
    sm.merge(["a.safetensors", "a.safetensors"], "out.safetensors", weights=[1, 1], normalize=False, dtype="bfloat16")
    save_file({"w": torch.tensor([float("inf"), 1.0]), "v": torch.tensor([1.0])}, "a.safetensors")
    with pytest.raises(sm.VerifyError, match="differs from the result"):
        sm.verify("out.safetensors", sample="100%")


def test_what_only_float32_decides_is_told_apart(pair: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("by_dtype.py").write_text(
        "import torch\ndef other(group):\n    return lambda c: c.models[0] + 1000 * (c.models[0].dtype == torch.float32)\n"
    )
    monkeypatch.syspath_prepend(".")
    sm.merge(["a.safetensors", "b.safetensors"], here / "out.safetensors", method="by_dtype:other")
    verified = sm.verify(here / "out.safetensors", own_methods=True, sample="100%")
    floats = sum(t.numel() for t in trained(0).values() if t.is_floating_point())
    assert verified.repeated_elems == floats
    assert verified.equal_elems == verified.sampled_elems - floats


def test_everything_of_a_pth_is_computed_again(voices: tuple[Path, Path], tmp_path: Path) -> None:
    """Includes the optimizer's tensors, and uses the options that choose the weights."""
    sm.merge(voices, tmp_path / "out.pth", integers="first", keep_optimizer=True, state_dict="model")
    assert sm.verify(tmp_path / "out.pth", sample="100%").sampled_tensors > len(
        [t for t in trained(1).values() if t.numel()]
    )
    for out in ("out.safetensors", "out"):
        sm.merge(voices, tmp_path / out, integers="first", state_dict="model")
        assert sm.verify(tmp_path / out, sample="100%").recomputed


def test_inputs_are_those_beside_the_output_or_those_that_are_named(
    pair: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the same names in the current folder are not used."""
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors")
    shutil.copy("out.safetensors", here / "moved.safetensors")
    (here / "other").mkdir()
    for path in pair:
        save_file(
            {n: t * 2 if t.is_floating_point() else t for n, t in load_file(path).items()}, here / "other" / path.name
        )
    monkeypatch.chdir(here / "other")
    assert sm.verify(here / "in" / "out.safetensors").recomputed
    assert sm.verify(here / "moved.safetensors", inputs=here / "in").recomputed


def test_other_inputs_of_the_same_names_beside_the_output_do_not_mislead(pair: list[Path], here: Path) -> None:
    Path("old").mkdir()
    for path in pair:
        save_file({n: t * 2 if t.is_floating_point() else t for n, t in load_file(path).items()}, Path("old") / path.name)
    sm.merge(["a.safetensors", "b.safetensors"], "old/out.safetensors")
    assert sm.verify("old/out.safetensors", sample="100%").recomputed


@pytest.mark.parametrize("change", ["names exchanged", "a tensor more", "another shape"])
def test_a_header_that_a_stranger_sealed_again_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The checksums are right, but the tensors differ from the result of the recipe."""
    monkeypatch.chdir(tmp_path)
    for name in "xy":
        save_file({"a": torch.randn(4, 5), "b": torch.randn(4, 5)}, f"{name}.safetensors")
    sm.merge(["x.safetensors", "y.safetensors"], "out.safetensors")
    content = Path("out.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    said = json.loads(header["__metadata__"]["streammerge_receipt"])
    if change == "names exchanged":
        header["a"], header["b"] = header["b"], header["a"]
    elif change == "another shape":
        header["a"]["shape"] = [5, 4]
    else:
        header["evil"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += bytes(4)
        said["checksums"][""] = said["checksums"][""][:-8] + f"{CRC32C.update(bytes(4)):08x}" + "0" * 8

    def written(receipt: dict[str, Any]) -> bytes:
        header["__metadata__"]["streammerge_receipt"] = json.dumps(receipt, separators=(",", ":"))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    sums = said["checksums"][""]
    rest = CRC32C.update(written({**said, "checksums": {"": "0" * len(sums)}, "digest": "0" * 64}))
    said |= {"checksums": {"": sums[:-8] + f"{rest:08x}"}, "digest": "0" * 64}
    said["digest"] = hashlib.sha256(json.dumps(said, separators=(",", ":")).encode()).hexdigest()
    Path("out.safetensors").write_bytes(written(said) + data)
    sm.verify("out.safetensors", sample=0)
    with pytest.raises(sm.VerifyError):
        sm.verify("out.safetensors", sample="100%")


@pytest.mark.parametrize("name", ["out.bak", "out.safetensors.tmp", "out"])
def test_a_renamed_output_verifies(pair: list[Path], here: Path, name: str) -> None:
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors")
    Path("out.safetensors").rename(name)
    assert sm.verify(name, sample="100%").recomputed


@pytest.mark.parametrize(
    "inputs",
    [
        ("~a.safetensors", "b.safetensors"),
        ("a.safetensors", "./a.safetensors"),
        ("sub/../a.safetensors", "{}/b.safetensors"),
    ],
)
def test_inputs_are_found_however_they_were_spelled(pair: list[Path], here: Path, inputs: tuple[str, str]) -> None:
    Path("sub").mkdir()
    shutil.copy("a.safetensors", "~a.safetensors")
    sm.merge([each.format(here / "in") for each in inputs], "out.safetensors")
    assert sm.verify("out.safetensors", sample="100%").recomputed


def test_memory_of_a_verification_is_bounded(tmp_path: Path) -> None:
    for number in range(2):
        save_file({f"w{i}": torch.randn(1 << 22) for i in range(6)}, tmp_path / f"{number}.safetensors")
    code = """
import os, sys, psutil, streammerge as sm
from streammerge.running import process
from streammerge.running.workspace import prepare_torch
os.chdir(sys.argv[1])
sm.merge(["0.safetensors", "1.safetensors"], "out.safetensors", memory="64MiB")
prepare_torch()
process.reset_peak()
before = process.resident_bytes()
sm.verify("out.safetensors", sample="100%", memory="64MiB")
print(process.peak_resident_bytes() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 64 << 20


def test_pickles_count_in_the_budget_of_a_verification(tmp_path: Path) -> None:
    """40 MiB of bytes beside the tensors, in each input and in the output, whose pickle is read beside theirs."""
    for number in range(2):
        torch.save({"w": torch.ones(1000), "blob": bytes(40 << 20)}, tmp_path / f"{number}.pth")
    out = tmp_path / "out.pth"
    merged = sm.merge([tmp_path / "0.pth", tmp_path / "1.pth"], out, memory="2GiB")
    little = f"{-(-merged.plan.peak_bytes // (1 << 20))}MiB"
    with pytest.raises(sm.VerifyError, match="memory are too little"):
        sm.verify(out, sample="100%", memory=little)
    assert sm.verify(out, sample="100%", memory="2GiB").sampled_tensors == 1


def test_an_attempt_that_failed_holds_nothing_during_the_next(
    pair: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of the first attempt, with the trees of its pickles, is gone before the second one is made."""
    out = here / "out.pth"
    sm.merge(pair, out, integers="max")
    plans: list[weakref.ref[Plan]] = []
    planned = sm.plan(pair, out, integers="max")

    class Seen(Plan):
        """A plan that can have a weak reference."""

    def remade(*arguments: object) -> Plan:
        assert [plan() for plan in plans] == [None] * len(plans)
        made = Seen(**{field.name: getattr(planned, field.name) for field in dataclasses.fields(Plan)})
        plans.append(weakref.ref(made))
        return made

    def recompute(*arguments: object) -> None:
        try:
            {}["w"]
        except KeyError as error:
            raise sm.ChangedError("other inputs") from error

    monkeypatch.setattr(attempts, "recipe_of_receipt", lambda *arguments: planned.recipe)
    monkeypatch.setattr(attempts, "_remade", remade)
    monkeypatch.setattr(attempts, "recompute", recompute)
    gc.collect()
    gc.disable()
    try:
        sm.verify(out)
    finally:
        gc.enable()
    assert len(plans) == 2


def test_a_whole_hash_tells_that_an_input_is_another(pair: list[Path], here: Path) -> None:
    sm.merge(["a.safetensors", "b.safetensors"], here / "out.safetensors", hash=True)
    content = bytearray(pair[1].read_bytes())
    content[-1] ^= 1
    pair[1].write_bytes(content)
    with pytest.raises(sm.VerifyError, match=r"b\.safetensors is not the file that was merged"):
        sm.verify(here / "out.safetensors", sample="5%")


def test_absent_inputs_are_noted_or_an_error(pair: list[Path], here: Path, cli: Cli) -> None:
    sm.merge(["a.safetensors", "b.safetensors"], here / "out.safetensors")
    said = cli("verify", "out.safetensors").stdout
    assert "values were not computed again" in said
    assert "values were not computed again" in cli("verify", "out.safetensors", "--sample", "5%", code=3).stderr
    said = cli("verify", "out.safetensors", "--inputs", "in", "--sample", "100%").stdout
    assert "100 % are the float64 result to the bit" in said
    shown = json.loads(cli("verify", "out.safetensors", "--inputs", "in", "--format", "json").stdout)
    assert shown["recomputed"] is True
    assert shown["digest"] == receipt(here / "out.safetensors")["digest"]
    assert cli("verify", "out.safetensors", "--format", "quiet").stdout == ""


def test_the_sample_is_a_share_that_a_seed_chooses(pair: list[Path], here: Path) -> None:
    out = here / "out.safetensors"
    sm.merge(["a.safetensors", "b.safetensors"], out)
    tensors = sum(1 for t in trained(0).values() if t.numel()) - 1
    assert sm.verify(out).sampled_tensors == 1
    assert sm.verify(out, sample="50%").sampled_tensors == (tensors + 1) // 2
    assert sm.verify(out, sample=0.0).sampled_tensors == 0
    assert len({sm.verify(out, sample="15%", seed=seed).sampled_elems for seed in range(8)}) > 1
    for wrong in ("105%", "-1", "some", "", "1e3%"):
        with pytest.raises(sm.RecipeError, match="is not a share"):
            sm.verify(out, sample=wrong)


def test_a_method_of_ones_own_needs_leave_here_too(pair: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("least_of_two.py").write_text(
        "def least(group):\n    return lambda chunk: chunk.models[0].minimum(chunk.models[1])\n"
    )
    monkeypatch.syspath_prepend(".")
    sm.merge(["a.safetensors", "b.safetensors"], here / "out.safetensors", method="least_of_two:least")
    assert not sm.verify(here / "out.safetensors").recomputed
    assert sm.verify(here / "out.safetensors", own_methods=True, sample="100%").recomputed


def test_checksums_are_the_same_in_one_piece_and_in_many(
    pair: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.planning.tasks.PIECE_ELEMS", 1 << 16)
    for module in ("verifying.files", "running.reading"):
        monkeypatch.setattr(f"streammerge.{module}.RANGE_BYTES", 4099)
    out = here / "out.safetensors"
    sm.merge(["a.safetensors", "b.safetensors"], out, workers=3)
    sm.verify(out, sample="100%")
    content, entry = out.read_bytes(), sm.inspect(out).entries["embed.weight"]
    assert f"{CRC32C.update(content[entry.offset : entry.offset + entry.nbytes]):08x}" in receipt(out)["checksums"][""]


# ------------------------------------------------------------------------------------------- what verification costs


def lines_run(function: Callable[[], object]) -> int:
    """Returns the number of lines of values.py that the calling thread runs, counting each round of a loop."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != values.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_verifying_everything_is_linear_in_tensors(tmp_path: Path) -> None:
    """Integers are verified by repetition, floats by comparison."""
    lines = []
    for tensors in (1500, 3000):
        path, out = tmp_path / f"{tensors}.safetensors", tmp_path / f"out{tensors}.safetensors"
        content = {f"f{i}": torch.full((1,), float(i)) for i in range(tensors // 2)}
        content |= {f"i{i}": torch.tensor([i]) for i in range(tensors // 2)}
        save_file(content, path)
        sm.merge([path, path], out)
        found: list[sm.Verified] = []
        lines.append(lines_run(lambda: found.append(sm.verify(out, sample="100%", workers=1))))
        assert (found[0].sampled_tensors, found[0].equal_elems) == (tensors, tensors)
    assert tensors < lines[1] < 2.2 * lines[0], lines


@pytest.mark.parametrize("nbytes", [0, 1, 7, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 20_000_003])
def test_repetition_compares_in_bounded_memory(tmp_path: Path, nbytes: int) -> None:
    path, content = tmp_path / "output", random.Random(nbytes).randbytes(5 + nbytes)
    path.write_bytes(content)
    data = memoryview(bytearray(content[5:]))
    repetition = values._Repeated(InputFiles({}).get(parse(path)), 3)
    tracemalloc.start()
    try:
        repetition.write_full(data, 2)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert not repetition.found()
    if nbytes:
        data[-1] ^= 1
        repetition.write_full(data, 2)
        assert repetition.found()


def test_what_a_comparison_holds_is_counted(pair: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of a verification counts the blocks that each worker compares."""
    more = []

    def recorded(tasks: list[MergeTask], *how: Any) -> tuple[Budget, str]:
        budget, io = budget_of(tasks, *how)
        plain, _ = budget_of(tasks, *how[:-2], 0, how[-1])
        more.append((budget.peak_bytes - plain.peak_bytes) // budget.workers)
        return budget, io

    monkeypatch.setattr(values, "budget_of", recorded)
    sm.merge(["a.safetensors", "b.safetensors"], here / "out.safetensors")
    sm.verify(here / "out.safetensors", sample="100%", workers=3)
    assert more == [1 << 20] * len(more)
    assert more


# ---------------------------------------------------------------------------------------------------------- one digest


@pytest.fixture
def long(here: Path) -> Path:
    """Makes inputs with a tensor of nine pieces, and with one whose passes all workers share."""
    for number in range(2):
        chance = torch.Generator().manual_seed(number)
        tensors = {f"w{i}": torch.randn(3, 70_001, generator=chance) for i in range(9)}
        save_file(tensors | {"long": torch.randn(9, 1 << 16, generator=chance)}, f"{number}.safetensors")
    return here


@pytest.mark.parametrize("method", ["linear", "dare_ties", "karcher"])
def test_one_digest_however_it_was_run(long: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr("streammerge.planning.tasks.PIECE_ELEMS", 1 << 16)
    options: dict[str, Any] = {"method": method}
    if method == "dare_ties":
        options |= {"base": "0.safetensors", "parameters": {"density": 0.4}, "seed": 3}
    made = set()
    ways = [(workers, "512MiB", "mmap") for workers in range(1, 9)]
    ways += [(workers, memory, io) for workers in (1, 3) for memory in ("64MiB", "4GiB") for io in ("mmap", "pread")]
    for workers, memory, io in ways:
        sm.merge(
            ["0.safetensors", "1.safetensors"], "out", workers=workers, memory=memory, io=io, overwrite=True, **options
        )
        made.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path("out").iterdir())))
    assert len(made) == 1


def test_one_digest_for_every_order_of_hashing(long: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made = set()
    for seed in "0123":
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        cli("merge", "in/0.safetensors", "in/1.safetensors", "-o", "out/", "--overwrite", fresh=True)
        made.add(b"".join(path.read_bytes() for path in sorted((long / "out").iterdir())))
    assert len(made) == 1


def test_a_receipt_that_is_a_link_to_nothing_is_named(folder: Path, tmp_path: Path) -> None:
    receipt = folder / "streammerge.json"
    receipt.unlink()
    receipt.symlink_to(tmp_path / "gone")
    with pytest.raises(sm.FormatError, match=f"is a link to {tmp_path}/gone, which is absent"):
        sm.verify(folder)


# ------------------------------------------------------------------------------------------------- receipts of strangers


class Spied(Store):
    """A store that notes each question."""

    scheme = "spied"
    asked: ClassVar[list[str]] = []

    def status(self, location: Location) -> Status:
        self.asked.append(str(location))
        raise sm.FormatError(f"{location} is absent")

    def is_folder(self, location: Location) -> bool:
        self.asked.append(str(location))
        return False

    def list_names(self, location: Location) -> list[str]:
        self.asked.append(str(location))
        return []

    def opened(self, location: Location) -> Input:
        raise sm.FormatError(f"{location} is absent")


OPENED: list[str] = []
_hooked: list[bool] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and "secret" in str(arguments[0]):
        OPENED.append(str(arguments[0]))


NAMES: dict[str, Any] = {
    "another store": "spied://host/x",
    "a plug-in that is not loaded": "unheard-of://host/x",
    "a file url": "file://{here}/secret/a.safetensors",
    "a file url in capitals": "FILE://{here}/secret/a.safetensors",
    "a relative file url": "file://../secret/a.safetensors",
    "an absolute path": "{here}/secret/a.safetensors",
    "home": "~/secret/a.safetensors",
    "a folder above": "../secret/a.safetensors",
    "a folder above, behind another": "x/../../secret/a.safetensors",
    "mergekit's form": {"model": {"path": "{here}/secret/a.safetensors"}},
    "mergekit's nested form": {"model": {"model": {"path": "{here}/secret/a.safetensors"}}},
}


@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("key", ["models", "base_model"])
def test_a_receipt_opens_nothing_but_what_lies_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, key: str
) -> None:
    if not _hooked:
        _hooked.append(True)
        sys.addaudithook(_note)
    for folder in ("secret", "open"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            save_file({"w": torch.ones(5)}, tmp_path / folder / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path / "open")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(STORES, "_own", {"spied": Spied()})
    sm.merge(["a.safetensors", "b.safetensors"], "out", method="task_arithmetic", base="a.safetensors")
    assert sm.verify("out").recomputed
    path = tmp_path / "open" / "out" / "streammerge.json"
    made = read_receipt(path.read_text(), path)
    name = json.loads(json.dumps(NAMES[named]).replace("{here}", str(tmp_path)))
    recipe = {**made.recipe, "models": [*made.recipe["models"][:-1], name if isinstance(name, dict) else {"model": name}]}
    if key == "base_model":
        recipe = {**made.recipe, "base_model": name}
    edited = dataclasses.replace(made, recipe=recipe)
    path.write_text(dataclasses.replace(edited, digest=edited.own_digest()).text(2))
    OPENED.clear()
    Spied.asked.clear()
    for options in ({}, {"inputs": tmp_path / "open"}, {"sample": "100%"}):
        try:
            verified = sm.verify("out", **options)  # type: ignore[arg-type]
        except sm.VerifyError as error:
            assert "absolute paths" in str(error) or "not computed again" in str(error)
        else:
            assert not options
            assert not verified.recomputed
            assert "values were not computed again" in verified.notes[0]
    assert OPENED == []
    assert Spied.asked == []


def test_a_name_with_a_scheme_is_read_where_the_caller_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_file({"w": torch.ones(5)}, f"{name}.safetensors")
    sm.memory_store.put("strangers/a.safetensors", Path("a.safetensors").read_bytes())
    try:
        sm.merge(["memory://strangers/a.safetensors", "b.safetensors"], "out.safetensors")
        said = sm.verify("out.safetensors").notes
        assert "memory://strangers/a.safetensors leads out of ." in said[0]
        assert sm.verify("out.safetensors", sample="100%", inputs="memory://strangers").recomputed
        with pytest.raises(sm.VerifyError, match="leads out of memory://else"):
            sm.verify("out.safetensors", inputs="memory://else")
        sm.merge(["memory://strangers/a.safetensors"] * 2, "memory://out.safetensors")
        assert sm.verify("memory://out.safetensors", sample="100%").recomputed, "it lies beside"
    finally:
        for name in ("strangers", "out.safetensors"):
            sm.memory_store.remove(name)


def test_names_in_a_receipt_never_lead_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in "ab":
        save_file({"w": torch.ones(5)}, f"../{name}.safetensors")
    sm.merge(["../a.safetensors", "../b.safetensors"], "out.safetensors")
    assert list(receipt(Path("out.safetensors"))["inputs"]) == ["a.safetensors", "b.safetensors"]
    assert sm.verify("out.safetensors", sample="100%", inputs="..").recomputed
