"""Every hostile file through every command: no code runs, no traceback, at most a second and 64 MiB."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

import hostile as h
from formats import test_bombs
from formats import test_hostile as t
from streammerge.cli import main as command_line

MOST_SECONDS, MOST_BYTES = 4, 64 << 20  # one second on a quiet machine
Make = Callable[[Path], dict[str, bool | None]]

# ------------------------------------------------------------------------------------------------------ more attacks


def _commented(content: bytes, comment: bytes) -> bytes:
    return content[:-2] + struct.pack("<H", len(comment)) + comment


OTHER = h.zip_bytes(h.stream({"w": h.tensor(), "x": h.call("posix.system", "touch canary")}))
DEFLATED = h.zip_bytes(t.GOOD, {"0": b"\0" * (200 << 20)}, compress=True)
RECORDS = [("a/data.pkl", t.GOOD), ("a/data/0", h.FOUR_FLOATS)]
SECOND = t.GOOD + h.stream({"w": h.call("posix.system", "touch canary")})
LIES = {"__metadata__": {"format": "pt", "code": "__import__('os').system('touch canary')"}, "w": h.f32(0, 16)}
MORE: dict[str, tuple[bytes, bool]] = {  # label -> content, and whether it is read (as 1, 2, 3, 4)
    "zip with a data descriptor": (t.edited(t.ZIP, (t.CENTRAL, 8, b"\x08\0"), (t.LOCAL, 6, b"\x08\0")), True),
    "zip, only the local header says encrypted": (t.edited(t.ZIP, (t.LOCAL, 6, b"\1\0")), True),
    "zip, only the local header says compressed": (t.edited(t.ZIP, (t.LOCAL, 8, b"\x08\0")), True),
    "zip, the local header has other sizes": (t.edited(t.ZIP, (t.LOCAL, 18, t.U32(9) * 2)), True),
    "zip with a comment": (_commented(t.ZIP, b"x" * 999), True),
    "zip whose comment is an archive": (_commented(t.ZIP, OTHER), False),
    "zip whose comment ends another": (_commented(t.ZIP, t.END + b"\0" * 18), False),
    "zip with bytes behind": (t.ZIP + b"x" * 99, False),
    "zip with a pickle before": (t.GOOD + t.ZIP, False),
    "zip, second pickle behind STOP": (h.zip_bytes(SECOND), True),
    "zip, second pickle in another record": (h.zip_of([*RECORDS, ("a/x.pkl", SECOND)]), True),
    "zip of 20000 records": (h.zip_of([*RECORDS, *((f"a/{i}", b"") for i in range(20_000))]), True),
    "zip, storage of 200 MB": (DEFLATED, False),
    "safetensors of a script": (h.safetensors_bytes(LIES, h.FOUR_FLOATS), True),
    "safetensors, empty tensors share an offset": (
        h.safetensors_bytes({"w": h.f32(0, 16), **{f"e{i}": h.f32(16, 16, [0, i]) for i in range(9)}}, h.FOUR_FLOATS),
        True,
    ),
    "safetensors of 10000 tensors": (
        h.safetensors_bytes({"w": h.f32(0, 16), **{f"t{i}": h.f32(16, 16) for i in range(10_000)}}, h.FOUR_FLOATS),
        True,
    ),
    "safetensors, name of 1 MB": (
        h.safetensors_bytes({"n" * (1 << 20): h.f32(0, 0), "w": h.f32(0, 16)}, h.FOUR_FLOATS),
        False,
    ),
    "safetensors in UTF-16": (h.safetensors_bytes('{"w": 1}'.encode("utf-16")), False),
    "legacy, magic number overridden": (h.legacy_bytes(t.GOOD, before=h.call("posix.system", "touch canary") + b"0"), True),
    "legacy, second pickle in the keys' place": (h.legacy_bytes(SECOND), False),
    "a plain pickle": (h.stream({"w": h.call("posix.system", "touch canary")}), False),
    "setitem of a tensor, CVE-2026-24747": (h.zip_bytes(h.stream({"w": h.Raw(h.tensor() + b"K\0K\1s")})), False),
    "setitems of a tensor, CVE-2026-24747": (h.zip_bytes(h.stream({"w": h.Raw(h.tensor() + b"(K\0K\1u")})), False),
    "duplicated without end": (h.zip_bytes(h.stream({"w": h.tensor(), "x": h.Raw(b"]" + b"2a" * 100_000)})), True),
}

BESIDE = {  # files in a folder beside one good shard: the index, and whether it is read
    "a device": ({"w": "device"}, False),
    "memory": ({"w": "memory"}, False),
    "another case": ({"w": "a", "v": "A"}, False),
    "Windows' names": ({"w": "CON", "v": "a.", "x": "a ", "y": "NUL.safetensors", "z": "a:b"}, False),
    "a tensor of escapes": ({"w": "a", t.SHELL: "a"}, True),  # with a warning that escapes the name
    "a name of 1 MB": ({"w": "a", "n" * (1 << 20): "a"}, True),  # with a warning that cuts the name
    "a shard of 1 MB": ({"w": "n" * (1 << 20)}, False),
    "good": ({"w": "a"}, True),
}
CONFIG = {"auto_map": {"AutoModel": "code.Model"}, "trust_remote_code": True, "architectures": ["__import__('os')"]}
CODE = "open('canary', 'w').close()\n"


def folder_of(folder: Path, weight_map: dict[str, str]) -> None:
    """Makes a folder with an index, code, links that lead out of it, and special files."""
    folder.mkdir()
    (folder / "a").write_bytes(h.safetensors_bytes({"w": h.f32(0, 16)}, h.FOUR_FLOATS))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "code.py").write_text(CODE)
    (folder / "sitecustomize.py").write_text(CODE)
    for name, target in (("device", "/dev/zero"), ("memory", "/proc/self/mem"), ("tokenizer.json", "/etc/passwd")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")


def corpus(folder: Path) -> dict[str, bool | None]:
    """Writes all attacks into a folder. Returns whether each is read, by name; None if other tests check it."""
    made: dict[str, bool | None] = {}

    def put(label: str, content: bytes, read: bool | None = None, ending: str = "bin") -> None:
        made[f"{label.replace('/', ' of ')[:100]}.{ending}"] = read
        (folder / f"{label.replace('/', ' of ')[:100]}.{ending}").write_bytes(content)

    for container, (wrap, tensor) in h.CONTAINERS.items():
        for payload, (path, args) in h.payloads(folder / "canary").items():
            put(
                f"{container}, {payload}",
                wrap(h.stream({"w": tensor, "x": h.call(path, *args)})),
                container != "tar" or None,
            )
        path, args = "posix.system", ("touch canary",)
        for way, make in h.WAYS.items():
            put(f"{container}, {way}", wrap(h.stream({"w": tensor, "x": h.Raw(make(path, args))})))
    for label, (value, _) in t.PICKLES.items():
        for container in ("zip", "legacy"):
            put(f"{container}, {label}", h.CONTAINERS[container][0](h.stream(value)))
    for kind, table in (("safetensors", t.SAFETENSORS), ("zip", t.ZIPS), ("other", t.OTHERS)):
        for label, (content, _) in table.items():
            put(f"{kind}, {label}", content)
    for label, content in t.NAMES.items():
        put(f"name, {label}", content)
    for label, (content, read) in MORE.items():
        put(label, content, read, "pth" if label.startswith("safetensors") else "safetensors")  # a wrong ending on purpose
    for number, (label, (weight_map, read)) in enumerate([*BESIDE.items(), *_indexes()]):
        folder_of(folder / f"folder {number} {label}", weight_map)
        made[f"folder {number} {label}"] = read
    return made


def _indexes() -> Iterator[tuple[str, tuple[Any, None]]]:
    for label, (weight_map, _) in t.INDEXES.items():
        if isinstance(weight_map, dict):
            yield label, (weight_map, None)


COMMANDS = (
    ["inspect", "--tensors", "IN"],
    ["plan", "IN", "IN"],
    ["convert", "IN", "-o", "out.safetensors", "--overwrite"],
    ["merge", "IN", "IN", "-o", "out/", "--overwrite"],
)


def run(folder: str) -> None:
    """Runs every file through every command, in a fresh process. Prints one JSON line each: cost and output."""
    os.chdir(folder)
    peaks = Path("/proc/self/clear_refs")
    for name in json.loads(Path("list.json").read_text()):
        for words in COMMANDS:
            for left in ("out.safetensors", "out"):
                shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink(missing_ok=True)
            sys.argv = ["streammerge", *(name if word == "IN" else word for word in words)]
            shown = io.StringIO()
            peaks.write_text("5")
            before, began, code = memory("VmRSS"), time.process_time(), 0
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                try:
                    command_line.main()
                except SystemExit as exit:
                    code = exit.code
            took = time.process_time() - began
            result = [name, words[0], code, took, memory("VmHWM") - before, shown.getvalue()[-5000:], written()]
            print(json.dumps(result), flush=True)


def memory(field: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) << 10


def written() -> str | None:
    """Returns the bytes of the tensor w in the output."""
    path = Path("out/model.safetensors") if Path("out").is_dir() else Path("out.safetensors")
    index = Path("out/model.safetensors.index.json")
    if index.exists():
        path = index.parent / json.loads(index.read_text())["weight_map"]["w"]
    if not path.exists():
        return None
    data = path.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    field = json.loads(data[8:begin]).get("w")
    return field and data[begin + field["data_offsets"][0] : begin + field["data_offsets"][1]].hex()


def bombs(folder: Path) -> dict[str, bool | None]:
    for label, make in test_bombs.BOMBS.items():
        (folder / label).write_bytes(make())
    return dict.fromkeys(test_bombs.BOMBS)


@pytest.mark.parametrize(
    ("make", "every", "most_seconds"),
    [
        (corpus, 4, MOST_SECONDS),
        pytest.param(corpus, 1, MOST_SECONDS, marks=pytest.mark.slow),
        pytest.param(bombs, 1, 20, marks=pytest.mark.slow),  # millions of opcodes are slow
    ],
)
def test_every_attack_through_every_command(make: Make, every: int, most_seconds: float, tmp_path: Path) -> None:
    """Attacks by every command; one of ``every`` attacks."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    made = dict(list(make(folder).items())[::every])
    (folder / "first").write_bytes(t.ZIP)
    (folder / "list.json").write_text(json.dumps(["first", *made]))
    command = [sys.executable, "-c", "import sys; from formats import test_corpus; test_corpus.run(sys.argv[1])", folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(h.__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()][len(COMMANDS) :]  # the first command imports torch
    assert len(results) == len(made) * len(COMMANDS)
    assert not list(tmp_path.rglob("canary*"))
    for name, verb, code, seconds, grown, shown, tensor in results:
        said = f"{name}: {verb}: {code} {seconds:.2f} s {grown >> 20} MiB {shown[-300:]!a}"
        assert "Traceback" not in shown, said
        assert shown.replace("\n", "").isprintable(), said
        assert code in (0, 2, 4), said
        assert seconds < most_seconds, said
        assert grown < MOST_BYTES, said
        if made[name] is not None:
            assert (code in (0, None)) == made[name], said
            if made[name] and verb in ("convert", "merge"):
                assert tensor == h.FOUR_FLOATS.hex(), said


def test_a_folder_is_copied_as_data_with_what_its_links_lead_to(tmp_path: Path, cli: Cli) -> None:
    """A link in the folder belongs to the user and is followed. A device or a pipe is never read."""
    folder_of(tmp_path / "in", {"w": "a"})
    cli("merge", "in", "in", "-o", "out/")
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "in/config.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == Path("/etc/passwd").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert not {"device", "pipe"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert not list(tmp_path.rglob("canary*"))


def test_an_output_that_is_an_input_does_not_destroy_it(tmp_path: Path, cli: Cli) -> None:
    """The bytes stay unchanged, or become the whole result. In both cases the tensor is there."""
    folder_of(tmp_path / "in", {"w": "a"})
    command = [sys.executable, "-m", "streammerge", "convert", "in", "-o", "in/a", "--overwrite"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "in/a").read_bytes().endswith(h.FOUR_FLOATS)
    cli("inspect", "in")


@pytest.mark.parametrize(
    "label", ["legacy, magic number overridden", "zip, second pickle behind STOP", "safetensors of a script"]
)
def test_some_attacks_in_a_process_of_their_own(label: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "x.bin").write_bytes(MORE[label][0])
    for words in COMMANDS:
        cli(*("x.bin" if word == "IN" else word for word in words))
    assert not list(tmp_path.rglob("canary*"))
