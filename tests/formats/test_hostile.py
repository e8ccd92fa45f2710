"""Hostile checkpoints: nothing in a file is executed, and the answer is a result or one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hostile as h
import streammerge
from streammerge.cli import main as cli
from streammerge.errors import StreammergeError

GOOD = h.stream({"w": h.tensor()})
SHELL = "a\x1b[31m\n\x9b2J\u202e"


def ask(path: Path, out: Path, monkeypatch: Any, capsys: Any) -> str | None:
    """Returns the error of inspecting a file, None on success. Asserts everything that must hold for every file."""
    error: StreammergeError | None = None
    try:
        streammerge.inspect(path)
        streammerge.convert(path, out, overwrite=True)
    except StreammergeError as raised:
        error = raised
    if out.exists():
        streammerge.inspect(out)
    shown = ""
    for arguments in (["inspect", "--tensors", str(path)], ["plan", str(path), str(path)]):
        monkeypatch.setattr(sys, "argv", ["streammerge", *arguments])
        with contextlib.suppress(SystemExit):
            cli.main()
        shown += "".join(capsys.readouterr())
    assert "Traceback" not in shown
    assert all(c.isprintable() for c in shown.replace("\n", "")), ascii(shown)
    if error is None:
        return None
    message = str(error)
    assert message.isprintable()
    assert 20 < len(message) < 700
    assert any(part in message for part in (path.name[:20], path.parent.name, out.name))
    return message


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., str | None]:
    def asked(content: bytes | Path, file: str = "hostile.bin") -> str | None:
        path = content if isinstance(content, Path) else tmp_path / file
        if isinstance(content, bytes):
            path.write_bytes(content)
        return ask(path, tmp_path / "out.safetensors", monkeypatch, capsys)

    return asked


# -------------------------------------------------------------------------------------------------- code in pickles


EXECUTED = """
import os, pickle, sys, torch
from pathlib import Path

class Unpickler(pickle.Unpickler):
    persistent_load = staticmethod(lambda pid: pid)

for path in sys.argv[2:]:
    if not os.fork():  # in a process of its own, for some payloads end it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with open(path, "rb") as file:
            made = Unpickler(file).load()
        try:
            while os.wait():  # some payloads do not wait for what they start
                pass
        except ChildProcessError:
            os._exit(0)
    os.wait()
    print(os.path.basename(path), Path(sys.argv[1]).exists(), sep="\\t")
    Path(sys.argv[1]).unlink(missing_ok=True)
"""


@pytest.mark.slow
def test_pickle_itself_executes_the_payloads(tmp_path: Path) -> None:
    """Shows that the corpus is effective: pickle itself makes the canary for every payload and way, except the listed
    ones."""
    canary = tmp_path / "canary"
    payloads = h.payloads(canary)
    sharp = {f"payload {label}": (h.WAYS["reduce"], *given) for label, given in payloads.items()}
    sharp |= {f"way {label}": (way, *payloads["os.system"]) for label, way in h.WAYS.items()}
    for label, (way, path, args) in sharp.items():
        (tmp_path / label).write_bytes(h.stream(h.Raw(way(path, args))))
    command = [sys.executable, "-c", EXECUTED, canary, *(tmp_path / label for label in sharp)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    sung = dict(line.split("\t") for line in done.stdout.splitlines())
    blunt = {f"payload {label}" for label in h.BLUNT_PAYLOADS} | {f"way {label}" for label in h.BLUNT_WAYS}
    assert {label for label in sharp if sung[label] == "False"} == blunt, done.stderr[-2000:]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("container", h.CONTAINERS)
@pytest.mark.parametrize("way", h.WAYS)
@pytest.mark.sampled(4, by="way")
def test_no_call_in_a_pickle_is_made(way: str, container: str, protocol: int, tmp_path: Path, asked: Any) -> None:
    wrap, tensor = h.CONTAINERS[container]
    calls = [h.Raw(h.WAYS[way](path, args)) for path, args in h.payloads(tmp_path / "canary").values()]
    message = asked(wrap(h.stream({"w": tensor, "x": calls}, protocol)))
    refused = way in ("ext1", "ext2", "ext4", "build_class") or (way, container) == ("persistent id", "tar")
    assert (message is None) != refused, message
    assert not (tmp_path / "canary").exists()


WATCHED = """
import sys, streammerge.api, streammerge.cli.main, pathlib, json
from streammerge.formats import folder, gguf, nemo, plain_pickle, registry, safetensors, torch_legacy, torch_tar, torch_zip
from streammerge.cli import render

def watch(event, args):
    if event.split(".")[0] in ("subprocess", "exec", "compile", "import", "pickle", "socket", "ctypes", "shutil"):
        raise SystemExit(f"audit: {event} {args}")
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"):
        raise SystemExit(f"audit: {event} {args}")
    if event == "open" and (args[1] or "r").strip("rb"):
        raise SystemExit(f"audit: open {args}")

def show(path):
    try:
        index = streammerge.api.inspect(path)
    except streammerge.StreammergeError:
        return
    render.index_text(index, True), json.dumps(render.index_json(index, True))

show(sys.argv[1])
sys.addaudithook(watch)
for path in sys.argv[1:]:
    show(path)
print("quiet")
"""


def test_an_audit_hook_sees_no_execution_import_or_write(tmp_path: Path) -> None:
    paths = []
    for label, (path, args) in h.payloads(tmp_path / "canary").items():
        for container, (wrap, tensor) in h.CONTAINERS.items():
            for way in h.WAYS:
                paths.append(tmp_path / f"{label}-{container}-{way}.pth")
                paths[-1].write_bytes(wrap(h.stream({"w": tensor, "x": h.Raw(h.WAYS[way](path, args))})))
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *paths], capture_output=True, text=True, env=environment, timeout=300
    )
    assert (done.stdout, done.returncode) == ("quiet\n", 0), done.stderr[-2000:]
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------- damage, by container

HUGE = 1 << 61
PICKLES: dict[str, tuple[Any, str | None]] = {  # the value beside or in place of the tensor -> the expected message
    "reach beyond the storage": ({"w": h.tensor((5,))}, "reaches to byte"),
    "offset beyond the storage": ({"w": h.tensor(offset=1)}, "reaches to byte"),
    "negative size": ({"w": h.tensor((-1,))}, "natural number"),
    "negative stride": ({"w": h.tensor(strides=(-1,))}, "natural number"),
    "negative offset": ({"w": h.tensor(offset=-4)}, "natural number"),
    "size is true": ({"w": h.tensor((True,))}, "natural number"),
    "size is a float": ({"w": h.tensor((4.0,))}, "natural number"),
    "shape product overflows": ({"w": h.tensor((1 << 33, 1 << 33), (0, 0))}, "overflows"),
    "shape wraps to 4": ({"w": h.tensor((4194305, 4194305, 211106198978564), (0, 0, 0))}, "overflows"),
    "empty but endless": ({"w": h.tensor((0, HUGE, HUGE), (1, 1, 1))}, "overflows"),
    "expanded": ({"w": h.tensor((1 << 40,), (0,))}, "expanded beyond reason"),
    "many expanded": ({f"w{i}": h.tensor((1 << 20,), (0,), i % 4) for i in range(40)}, None),
    "many expanded, different": ({f"w{i}": h.tensor((1 << 20, i + 1), (0, 0)) for i in range(9)}, "expanded beyond reason"),
    "strides are fewer": ({"w": h.tensor((2, 2))}, "differ in length"),
    "65 dimensions": ({"w": h.tensor((1,) * 65, (1,) * 65)}, "shape"),
    "64 dimensions, gaps": ({"w": h.tensor((1,) * 63 + (2,), (1,) * 63 + (2,))}, None),
    "numel lies": ({"w": h.tensor(store=h.storage(numel=1 << 40))}, "expect"),
    "numel is negative": ({"w": h.tensor(store=h.storage(numel=-4))}, "natural number"),
    "storage is absent": ({"w": h.tensor(store=h.storage("7"))}, "missing|does not have|belongs to no"),
    "storage key climbs": ({"w": h.tensor(store=h.storage("../data.pkl"))}, "missing|does not have|belongs to no"),
    "storage key is bytes": ({"w": h.tensor(store=h.storage(h.Raw(b"U\x010")))}, None),
    "storage class is not torch's": ({"w": h.tensor(store=h.storage(kind="os.FloatStorage"))}, "unknown class"),
    "storage has two dtypes": ({"w": h.tensor(), "v": h.tensor(store=h.storage(kind="torch.IntStorage"))}, "two dtypes"),
    "storage view lies": ({"w": h.tensor(store=h.storage("0", 4, "torch.FloatStorage", ("v", 2, 4)))}, "reaches to byte"),
    "persistent id is a number": ({"w": h.tensor(), "x": h.Raw(b"K\x07Q")}, None),
    "no tensor": ({"a": 1}, "no tensors|belongs to no"),
    "tensor of a tensor": ({"w": h.tensor(store=h.tensor())}, "without a storage"),
    "set item of a number": (h.Raw(b"K\x01K\x02K\x03s"), "sets items of a int"),
    "append to a tuple": (h.Raw(b")K\x03a"), "appends to a tuple"),
    "build on a number": (h.Raw(b"K\x01K\x02b"), "attributes of a int"),
    "list as a key": (h.Raw(b"}]K\x01s"), "as a dictionary key"),
    "empty stack": (h.Raw(b"R"), "damaged pickle"),
    "unmatched mark": (h.Raw(b"(t(u"), "items of a tuple"),
    "memo that is not there": (h.again(5), "damaged pickle"),
    "unknown opcode": (h.Raw(b"\xfe"), "damaged pickle"),
    "refused opcode": (h.Raw(b"\x97"), "refused"),
    "module that is no module": ({"_modules": 1, "w": h.tensor()}, None),
    "module of nonsense": (
        h.Raw(
            h.name("a.B")
            + b")\x81"
            + h.dump(
                {
                    "_modules": {},
                    "_parameters": [1],
                    "_buffers": {"b": h.tensor()},
                    "_non_persistent_buffers_set": h.call("builtins.set", 5),
                    "w": {"w": h.tensor()},
                }
            )
            + b"b"
        ),
        None,
    ),
    "line break in a class": ({"w": h.tensor(), "x": h.Raw(h.dump("a\nb") + h.dump("c") + b"\x93")}, None),
    "lone surrogates": ({chr(0xD800): h.tensor(), chr(0xD801): h.tensor((2,))}, "not valid text"),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("label", PICKLES)
def test_damaged_pickles(label: str, container: str, asked: Any) -> None:
    value, expected = PICKLES[label]
    message = asked(h.CONTAINERS[container][0](h.stream(value)))
    if expected is None or (container, label) == ("legacy", "numel lies"):
        assert message is None or container == "legacy", message
    else:
        assert re.search(expected, message or ""), message


def header(**fields: Any) -> dict[str, Any]:
    return {"w": {**h.f32(0, 16), **fields}}


def twice(text: str) -> bytes:
    return b"{" + ",".join([text] * 2).encode() + b"}"


W = json.dumps(h.f32(0, 16))
SAFETENSORS: dict[str, tuple[bytes, str | None]] = {
    "good": (h.safetensors_bytes(header()), None),
    "header longer than the file": (h.safetensors_bytes(header(), length=10_000), "truncated"),
    "header beyond 100 MB": (h.safetensors_bytes(header(), length=100_000_001), "claims 100000001|impossible"),
    "header of 2**64 - 1": (h.safetensors_bytes(header(), length=(1 << 64) - 1), "impossible"),
    "header cut short": (h.safetensors_bytes(header(), length=30), "cannot be read"),
    "empty header": (h.safetensors_bytes(b"", b"{" + b" " * 15, 0), "cannot be read"),
    "truncated data": (h.safetensors_bytes(header(), b"\0" * 15), "truncated: 1 bytes"),
    "trailing byte": (h.safetensors_bytes(header(), b"\0" * 17), "1 bytes behind"),
    "duplicate tensor": (h.safetensors_bytes(twice(f'"w":{W}')), "is given twice"),
    "duplicate field": (
        h.safetensors_bytes(W.replace('"dtype"', '"dtype":"U8","dtype"').join(['{"w":', "}"]).encode()),
        "is given twice",
    ),
    "duplicate by escape": (h.safetensors_bytes(f'{{"w":{W},"\\u0077":{W}}}'.encode()), "is given twice"),
    "overlap": (h.safetensors_bytes({"a": h.f32(0, 12), "b": h.f32(8, 16)}), "overlaps"),
    "same bytes": (h.safetensors_bytes({"a": h.f32(0, 16), "b": h.f32(0, 16)}), "overlaps"),
    "hole": (h.safetensors_bytes({"a": h.f32(0, 4), "b": h.f32(8, 16)}), "hole of 4"),
    "hole at the start": (h.safetensors_bytes({"a": h.f32(4, 16)}), "hole of 4"),
    "empty between": (h.safetensors_bytes({"a": h.f32(0, 8), "e": h.f32(8, 8), "b": h.f32(8, 16)}), None),
    "empty within": (h.safetensors_bytes({"a": h.f32(0, 16), "e": h.f32(8, 8)}), "overlaps"),
    "negative offset": (h.safetensors_bytes(header(data_offsets=[-16, 0])), "malformed data_offsets"),
    "float offset": (h.safetensors_bytes(header(data_offsets=[0, 16.0])), "malformed data_offsets"),
    "boolean offset": (h.safetensors_bytes(header(data_offsets=[False, 16])), "malformed data_offsets"),
    "huge offset": (h.safetensors_bytes(header(data_offsets=[0, 1 << 64])), "malformed data_offsets"),
    "endless digits": (h.safetensors_bytes(b'{"w":' + b"9" * 5000 + b"}"), "cannot be read"),
    "three offsets": (h.safetensors_bytes(header(data_offsets=[0, 8, 16])), "malformed data_offsets"),
    "reversed offsets": (h.safetensors_bytes(header(data_offsets=[16, 0])), "has -16 bytes"),
    "negative size": (h.safetensors_bytes(header(shape=[-4])), "malformed shape"),
    "float size": (h.safetensors_bytes(header(shape=[4.0])), "malformed shape"),
    "boolean size": (h.safetensors_bytes(header(shape=[4, True])), "malformed shape"),
    "size as text": (h.safetensors_bytes(header(shape="4")), "malformed shape"),
    "shape product overflows": (h.safetensors_bytes(header(shape=[4194305, 4194305, 211106198978564])), "overflows"),
    "empty but overflows": (
        h.safetensors_bytes(header(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0]), b""),
        "overflows",
    ),
    "shape and bytes differ": (h.safetensors_bytes(header(shape=[5])), "needs 20"),
    "many dimensions": (h.safetensors_bytes(header(shape=[4] + [1] * 100)), "malformed shape"),
    "unknown dtype": (h.safetensors_bytes(header(dtype="F33")), "dtype F33"),
    "dtype of torch alone": (h.safetensors_bytes(header(dtype="C128")), "not supported"),
    "dtype is a list": (h.safetensors_bytes(header(dtype=["F32"])), "not supported"),
    "half a packed value": (
        h.safetensors_bytes(header(dtype="F4", shape=[31], data_offsets=[0, 16])),
        "even last dimension",
    ),
    "missing field": (h.safetensors_bytes({"w": {"dtype": "F32", "shape": [4]}}), "must have exactly"),
    "unknown field": (h.safetensors_bytes(header(extra=1)), "must have exactly"),
    "tensor is a number": (h.safetensors_bytes({"w": 5}), "must have exactly"),
    "metadata is a list": (h.safetensors_bytes({"__metadata__": [], **header()}), "strings only"),
    "metadata has numbers": (h.safetensors_bytes({"__metadata__": {"a": 1}, **header()}), "strings only"),
    "header is a list": (h.safetensors_bytes(b"[{}]"), "not a checkpoint"),
    "NaN": (h.safetensors_bytes(header(shape=[float("nan")])), "NaN is not JSON"),
    "Infinity": (h.safetensors_bytes(header(shape=[float("inf")])), "Infinity is not JSON"),
    "deep JSON": (h.safetensors_bytes(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deeply"),
    "not UTF-8": (h.safetensors_bytes(b'{"\xff":' + W.encode() + b"}"), "cannot be read"),
    "byte order mark": (
        h.safetensors_bytes(b"\xef\xbb\xbf" + json.dumps(header()).encode()),
        "not a checkpoint|impossible",
    ),
    "single quotes": (h.safetensors_bytes(b"{'w': 1}"), "cannot be read"),
    "a pickle in the padding": (h.safetensors_bytes(json.dumps(header()).encode() + GOOD), "cannot be read"),
    "lone surrogates": (h.safetensors_bytes({chr(0xD800): h.f32(0, 8), chr(0xD801): h.f32(8, 16)}), "not valid text"),
    "no tensors": (h.safetensors_bytes({}, b""), "no tensors"),
    "empty file": (b"", "empty"),
}


@pytest.mark.parametrize("label", SAFETENSORS)
def test_rules_of_safetensors(label: str, asked: Any) -> None:
    content, expected = SAFETENSORS[label]
    message = asked(content, "hostile.safetensors")
    assert message is None if expected is None else re.search(expected, message or ""), message


def edited(content: bytes, *changes: tuple[bytes, int, bytes]) -> bytes:
    """Replaces bytes at an offset from the first (b"PK..") or last ("-") mention of a signature."""
    made = bytearray(content)
    for mark, offset, octets in changes:
        at = (content.rfind(mark[1:]) if mark[:1] == b"-" else content.find(mark)) + offset
        made[at : at + len(octets)] = octets
    return bytes(made)


def doubled(content: bytes, name: str) -> bytes:
    """Returns the archive with a second record of the same name."""
    other = name[:-1] + "~"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(i.filename, archive.read(i)) for i in archive.infolist()]
    return h.zip_of([*records, (other, GOOD)]).replace(other.encode(), name.encode())


ZIP = h.zip_bytes(GOOD)
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
U32 = struct.Struct("<I").pack
ZIP64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, 1 << 60, 1 << 60) + struct.pack(
    "<4sIQI", b"PK\6\7", 0, 0, 1
)
ZIPS: dict[str, tuple[bytes, str | None]] = {
    "good": (ZIP, None),
    "good, compressed": (h.zip_bytes(GOOD, compress=True), None),
    "duplicate pickle": (doubled(ZIP, "archive/data.pkl"), "twice"),
    "duplicate storage": (doubled(ZIP, "archive/data/0"), "twice"),
    "two roots": (h.zip_of([("a/data.pkl", GOOD), ("b/data.pkl", GOOD)]), "2 pickles"),
    "no pickle": (h.zip_of([("a/b", b"")]), "without data.pkl"),
    "encrypted": (edited(ZIP, (CENTRAL, 8, b"\1\0")), "encrypted"),
    "strongly encrypted": (edited(ZIP, (CENTRAL, 8, b"\x41\0")), "encrypted"),
    "bzip2": (edited(ZIP, (CENTRAL, 10, b"\x0c\0")), "method 12"),
    "unknown method": (edited(ZIP, (CENTRAL, 10, b"\x63\0")), "method 99"),
    "name differs": (edited(ZIP, (LOCAL, 30, b"brchive")), "another name"),
    "two sizes": (edited(ZIP, (CENTRAL, 20, U32(5))), "two sizes"),
    "size beyond the file": (edited(ZIP, (CENTRAL, 20, U32(1 << 30) * 2)), "truncated|overlap"),
    "compressed beyond the file": (
        edited(h.zip_bytes(GOOD, compress=True), (CENTRAL, 20, U32(1 << 31))),
        "truncated|overlap",
    ),
    "compressed to more than it says": (edited(h.zip_bytes(GOOD, compress=True), (CENTRAL, 24, U32(9))), "bytes, not 9"),
    "header elsewhere": (edited(ZIP, (b"-" + CENTRAL, 42, U32(7))), "not where"),
    "overlap": (edited(ZIP, (b"-" + CENTRAL, 20, U32(60) * 2)), "truncated|overlap|expect"),
    "storage too short": (h.zip_bytes(GOOD, {"0": b"\0" * 12}), "has 12 bytes"),
    "storage too long": (h.zip_bytes(GOOD, {"0": b"\0" * 20}), "has 20 bytes"),
    "storage missing": (h.zip_bytes(GOOD, {}), "missing"),
    "names that climb": (
        h.zip_of([("../data.pkl", GOOD), ("../data/0", h.FOUR_FLOATS), ("/etc/x", b""), ("C:\\x", b"")]),
        None,
    ),
    "big-endian": (h.zip_of([("a/data.pkl", GOOD), ("a/byteorder", b"big"), ("a/data/0", h.FOUR_FLOATS)]), "big-endian"),
    "byteorder of nonsense": (h.zip_of([("a/data.pkl", GOOD), ("a/byteorder", b"x" * 99)]), "limit"),
    "directory too long": (edited(ZIP, (END, 12, U32(1 << 30))), "zip directory"),
    "directory elsewhere": (edited(ZIP, (END, 16, U32(3))), "stand before its zip archive"),
    "zip64 lies": (ZIP[: ZIP.find(END)] + ZIP64 + edited(ZIP[ZIP.find(END) :], (END, 8, b"\xff" * 12)), "zip directory"),
    "behind a prefix": (b"x" * 600 + ZIP, "bytes before its zip archive"),
    "behind another archive": (ZIP + ZIP, "stand before its zip archive"),
    "with bytes behind it": (ZIP + bytes(10), "bytes stand behind its zip archive"),
    "with many bytes behind it": (ZIP + bytes(4096), "bytes stand behind its zip archive"),
    "record name with escapes": (
        h.zip_of([("a/data.pkl", GOOD), (SHELL, b""), ("a/data/0", h.FOUR_FLOATS), (SHELL, b"")]),
        "twice",
    ),
    "no pickle, two of escapes": (h.zip_of([(f"{SHELL}/data.pkl", GOOD), ("b/data.pkl", GOOD)]), "2 pickles"),
    **{
        f"cut by {part}/8": (ZIP[: len(ZIP) * part // 8], "truncated|damaged|zip directory|empty|begins")
        for part in range(8)
    },
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("label", ZIPS)
def test_damaged_archives(label: str, asked: Any) -> None:
    content, expected = ZIPS[label]
    message = asked(content, "hostile.pth")
    assert message is None if expected is None else re.search(expected, message or ""), message


LEGACY = h.legacy_bytes(GOOD)
TAR, TAR_TREE = h.tar_bytes, h.stream({"w": h.CONTAINERS["tar"][1]})
OTHERS: dict[str, tuple[bytes, str | None]] = {
    "legacy": (LEGACY, None),
    **{
        f"legacy cut at {n}": (LEGACY[:n], "truncated|damaged")
        for n in (16, 40, 60, 200, len(LEGACY) - 24, len(LEGACY) - 1)
    },
    "legacy, count of elements lies": (h.legacy_bytes(GOOD, stored=struct.pack("<q", 1 << 60)), "expected 4"),
    "legacy, negative count": (h.legacy_bytes(GOOD, stored=struct.pack("<q", -1)), "expected 4"),
    "legacy, storage of no tensor": (h.legacy_bytes(GOOD, ("0", "1")), "belongs to no tensor"),
    "legacy, keys are numbers": (h.legacy_bytes(GOOD, (0,)), "list of storages"),
    "legacy, no keys": (h.legacy_bytes(GOOD, ()), "does not have"),
    "magic of another object": (LEGACY.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)), "version 1002"),
    "tar": (TAR(TAR_TREE), None),
    "tar, view beyond": (TAR(TAR_TREE, [("0", "0", 3, 4)]), "reaches to byte"),
    "tar, negative view": (TAR(TAR_TREE, [("0", "0", -3, 4)]), "natural number"),
    "tar, view of text": (TAR(TAR_TREE, [("0", "0", "1", 4)]), "natural number"),
    "tar, rank of a million": (TAR(TAR_TREE, geometry=(1 << 20, 4, 1, 0)), "dimensions"),
    "tar, negative rank": (TAR(TAR_TREE, geometry=(-1, 4, 1, 0)), "dimensions"),
    "tar, negative size": (TAR(TAR_TREE, geometry=(1, -4, 1, 0)), "negative size"),
    "tar, too long": (TAR(TAR_TREE, geometry=(1, 5, 1, 0)), "reaches to byte"),
    "tar, key without end": (TAR(h.stream({"w": h.Raw(h.shared(60) + b"Q")})), "not a string"),
    "tar, negative member": (edited(TAR(TAR_TREE), (b"sys_info", 124, b"\xff" * 12)), "tar directory"),
    "tar, huge member": (edited(TAR(TAR_TREE), (b"sys_info", 124, b"\x80" + b"\x7f" * 11)), "truncated"),
    "tar, member of another type": (edited(TAR(TAR_TREE), (b"sys_info", 156, b"x")), None),
    "tar, cut": (TAR(TAR_TREE)[:1500], "tar|truncated"),
}


@pytest.mark.parametrize("label", OTHERS)
def test_damaged_older_formats(label: str, asked: Any) -> None:
    content, expected = OTHERS[label]
    message = asked(content, "hostile.pth")
    assert message is None if expected is None else re.search(expected, message or ""), message


# --------------------------------------------------------------------------------------------------- folders, names

SHARD = h.safetensors_bytes({"w": h.f32(0, 16)})
OTHER = h.safetensors_bytes({"v": h.f32(0, 16)})
INDEXES: dict[str, tuple[Any, str | None]] = {
    "good": ({"w": "a", "v": "b"}, None),
    "climbing": ({"w": "../outside"}, "not the name of a file"),
    "absolute": ({"w": "/etc/passwd"}, "not the name of a file"),
    "backslash": ({"w": "..\\outside"}, "not the name of a file"),
    "home": ({"w": "~root"}, "not the name of a file"),
    "zero byte": ({"w": "a\0b"}, "not the name of a file"),
    "empty name": ({"w": ""}, "not the name of a file"),
    "dot": ({"w": ".."}, "not the name of a file"),
    "link out of the folder": ({"w": "link"}, None),
    "through a link to a folder": ({"w": "away/outside"}, "not the name of a file"),
    "link to itself": ({"w": "loop"}, "leads in a circle"),
    "link to nothing": ({"w": "broken"}, "is a link to .*gone, which is absent"),
    "link to a device": ({"w": "zero"}, "is a link to /dev/zero, which is not a regular file but a device"),
    "link to a folder": ({"w": "away"}, "which is not a regular file but a folder"),
    "link to a pipe": ({"w": "hose"}, "which is not a regular file but a pipe"),
    "pipe": ({"w": "pipe"}, "not a regular file"),
    "folder": ({"w": "folder"}, "not a regular file"),
    "index as its own shard": ({"w": "x.index.json"}, "JSON text"),
    "absent shard": ({"w": "a", "v": "c"}, "absent"),
    "very long name": ({"w": "a" * 5000}, "longer than"),
    "surrogate name": ({"w": "\ud800"}, "absent"),
    "name with escapes": ({"w": SHELL + "x"}, "absent"),
    "in two shards": ({"w": "a", "x": "a2"}, None),  # the index decides, and no shard has x: both are said
    "in another shard": ({"w": "b", "v": "a"}, None),
    "one is in no shard": ({"w": "a", "z": "a"}, None),
    "most are in no shard": ({"w": "a", "y": "a", "z": "a"}, "do not have: y, z"),
    "shard is a number": ({"w": 5}, "not text"),
    "shard is a list": ({"w": ["a"]}, "not text"),
    "shard is null": ({"w": None}, "not text"),
    "empty map": ({}, "no weight_map"),
    "map is a list": ([], "no weight_map"),
    "key twice": (b'{"weight_map":{"w":"a","w":"b"}}', "is given twice"),
    "not JSON": (b"{", "as JSON"),
    "a list": (b"[]", "no weight_map"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "not UTF-8": (b"\xff", "as JSON"),
    "empty": (b"", "as JSON"),
}


@pytest.mark.parametrize("label", INDEXES)
def test_indexes_stay_in_their_folder(label: str, tmp_path: Path, asked: Any) -> None:
    weight_map, expected = INDEXES[label]
    folder = tmp_path / "sharded"
    folder.mkdir()
    for name, content in (("a", SHARD), ("a2", SHARD), ("b", OTHER), ("../outside", SHARD)):
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("../outside")
    (folder / "loop").symlink_to("loop")
    (folder / "away").symlink_to("..")
    (folder / "broken").symlink_to("../gone")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "hose").symlink_to("pipe")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    index = folder / "x.index.json"
    index.write_bytes(weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode())
    for path in (index, folder):
        message = asked(path)
        assert message is None if expected is None else re.search(expected, message or ""), message


def test_a_pipe_or_a_name_without_end_is_no_checkpoint(tmp_path: Path, asked: Any) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a regular file" in asked(tmp_path / "pipe.pth")
    assert "does not exist" in asked(tmp_path / ("n" * 5000))
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    assert "leads in a circle" in asked(tmp_path / "loop.pth")


NAMES: dict[str, bytes] = {
    "safetensors": h.safetensors_bytes(
        {"__metadata__": {SHELL: SHELL}, SHELL: h.f32(0, 8), "module." + SHELL: h.f32(8, 16)}
    ),
    "pickle": h.zip_bytes(
        h.stream(
            {
                SHELL: {SHELL: h.tensor(), "v": h.tensor((2,))},
                "ema_" + SHELL: {"w": h.tensor()},
                "note": SHELL,
                "object": h.Raw(h.dump(SHELL) + h.dump(SHELL) + b"\x93)R"),
                "optimizer": {SHELL: {"w": h.tensor()}},
            }
        )
    ),
    "storage": h.zip_bytes(h.stream({SHELL: h.tensor(store=h.storage(SHELL))})),
    "unread": h.zip_bytes(h.stream({"m": {"w": h.tensor()}, SHELL: h.call("torch._utils._rebuild_qtensor")})),
    "dtype": h.safetensors_bytes({SHELL: {**h.f32(0, 16), "dtype": SHELL}}),
}


@pytest.mark.parametrize("label", NAMES)
def test_no_escape_sequence_reaches_the_terminal(label: str, asked: Any) -> None:
    """``asked`` checks all printed text."""
    asked(NAMES[label], f"{label}{SHELL}")


def test_a_line_break_in_a_class_name_does_not_become_an_opcode(tmp_path: Path) -> None:
    written, path = tmp_path / "out.pth", tmp_path / "in.pth"
    path.write_bytes(
        h.zip_bytes(h.stream({"w": h.tensor(), "x": h.Raw(h.dump("a\ncos\nsystem\n") + h.dump("b") + b"\x93")}))
    )
    streammerge.convert(path, written)
    assert {"x"} == {key for key, value in streammerge.inspect(written).extras.items() if getattr(value, "name", "") == "b"}
