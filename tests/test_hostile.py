"""Hostile checkpoints: whatever is in a file, nothing of it is executed, and the answer is a result or one sentence."""

from __future__ import annotations

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

import hostile as h
import pytest

import streammerge
from streammerge import cli
from streammerge.errors import FormatError, StreammergeError

GOOD = h.stream({"w": h.tensor()})
SHELL = "a\x1b[31m\n\x9b2J\u202e"


def ask(path: Path, out: Path, monkeypatch: Any, capsys: Any) -> str | None:
    """The error of inspecting a file, None where it succeeds; all that must hold for every file is asserted here."""
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
        try:
            cli.main()
        except SystemExit as stopped:
            assert stopped.code in (2, 4)
        shown += "".join(capsys.readouterr())
    assert "Traceback" not in shown
    assert all(c.isprintable() for c in shown.replace("\n", "")), ascii(shown)
    if error is None:
        return None
    message = str(error)
    assert message.isprintable()
    assert 20 < len(message) < 700
    assert path.name[:20] in message or path.parent.name in message
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


def test_the_canary_sings_when_a_payload_is_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for label in ("os.system", "eval", "exec", "open", "spawnv"):
        path, args = h.payloads(canary)[label]
        pickle.loads(h.stream(h.call(path, *args)))
        assert canary.exists(), label
        canary.unlink()


@pytest.mark.parametrize("container", h.CONTAINERS)
@pytest.mark.parametrize("way", h.WAYS)
@pytest.mark.parametrize("label", h.LABELS)
def test_no_call_in_a_pickle_is_made(label: str, way: str, container: str, tmp_path: Path, asked: Any) -> None:
    canary = tmp_path / "canary"
    path, args = h.payloads(canary)[label]
    wrap, tensor = h.CONTAINERS[container]
    for protocol in (0, 2, 4, 5):
        message = asked(wrap(h.stream({"w": tensor, "x": h.Raw(h.WAYS[way](path, args))}, protocol)))
        assert not canary.exists()
        assert (message is None) == (way not in ("ext1", "build_class")), message


WATCHED = """
import sys, streammerge.api, streammerge.cli, streammerge.formats.sniff, pathlib, json
from streammerge.cli import render

def watch(event, args):
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile", "import", "pickle.find_class"):
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
PICKLES: dict[str, tuple[Any, str | None]] = {  # the value beside or in place of the tensor -> what must be said of it
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
    "many expanded": ({f"w{i}": h.tensor((4 << 20,), (0,), i % 4) for i in range(40)}, None),
    "many expanded, different": ({f"w{i}": h.tensor((4 << 20, i + 1), (0, 0)) for i in range(9)}, "expanded beyond reason"),
    "strides are fewer": ({"w": h.tensor((2, 2))}, "differ in length"),
    "65 dimensions": ({"w": h.tensor((1,) * 65, (1,) * 65)}, "shape"),
    "64 dimensions, gaps": ({"w": h.tensor((1,) * 63 + (2,), (1,) * 63 + (2,))}, None),
    "numel lies": ({"w": h.tensor(store=h.storage(numel=1 << 40))}, "expect"),
    "numel is negative": ({"w": h.tensor(store=h.storage(numel=-4))}, "natural number"),
    "storage is absent": ({"w": h.tensor(store=h.storage("7"))}, "missing|does not have"),
    "storage key climbs": ({"w": h.tensor(store=h.storage("../data.pkl"))}, "missing|does not have"),
    "storage key is bytes": ({"w": h.tensor(store=h.storage(h.Raw(b"U\x010")))}, None),
    "storage class is not torch's": ({"w": h.tensor(store=h.storage(kind="os.FloatStorage"))}, "unknown class"),
    "storage has two dtypes": ({"w": h.tensor(), "v": h.tensor(store=h.storage(kind="torch.IntStorage"))}, "two dtypes"),
    "storage view lies": ({"w": h.tensor(store=h.storage("0", 4, "torch.FloatStorage", ("v", 2, 4)))}, "reaches to byte"),
    "persistent id is a number": ({"w": h.tensor(), "x": h.Raw(b"K\x07Q")}, None),
    "no tensor": ({"a": 1}, "no tensors"),
    "tensor of a tensor": ({"w": h.tensor(store=h.tensor())}, "without a storage"),
    "set item of a number": (h.Raw(b"K\x01K\x02K\x03s"), "sets items of a int"),
    "append to a tuple": (h.Raw(b")K\x03a"), "appends to a tuple"),
    "build on a number": (h.Raw(b"K\x01K\x02b"), "attributes of a int"),
    "list as a key": (h.Raw(b"}]K\x01s"), "as a dictionary key"),
    "empty stack": (h.Raw(b"R"), "damaged pickle"),
    "unmatched mark": (h.Raw(b"(t(u"), "damaged pickle"),
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
    "lone surrogates": ({"\ud800": h.tensor(), "\ud801": h.tensor((2,))}, "not valid text"),
}


def short_of_tar(label: str) -> bool:
    return "tensor" in label


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("label", PICKLES)
def test_damaged_pickles(label: str, container: str, asked: Any) -> None:
    value, expected = PICKLES[label]
    message = asked(h.CONTAINERS[container][0](h.stream(value)))
    if expected is None or (container, label) == ("legacy", "numel lies"):
        assert message is None or container == "legacy", message
    else:
        assert re.search(expected, message or ""), message
