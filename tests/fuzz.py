"""Fuzzing of every parser of foreign bytes: a program; test_fuzz.py also runs it for some seconds.

    python tests/fuzz.py pickle --runs 200000             injuries to valid seeds that know the format's structure
    python tests/fuzz.py pickle --atheris --seconds 300   the same seeds, guided by coverage (pip install atheris)
    python tests/fuzz.py pickle --input crash-pickle-...  one case again

A target reads bytes, and may refuse them with a StreammergeError. Everything else is a crash: another exception, a file
called canary, text that a terminal would execute, a second of work, 64 MiB of memory. No target imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import io
import itertools
import json
import os
import pickletools
import random
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import hostile as h
import streammerge
from formats.gguf_samples import gguf
from streammerge.cli import render
from streammerge.errors import StreammergeError
from streammerge.recipe.document import to_yaml
from streammerge.recipe.reader import read_recipe

MOST_SECONDS, MOST_BYTES, HANGS_SECONDS = 1, 64 << 20, 20
CANARY = "canary"
INSTRUMENTED = ("streammerge", "json", "pickletools", "yaml", "zipfile")

# ---------------------------------------------------------------------------------------------------------- targets


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """Makes a folder in memory the current one. It holds the files that the targets' inputs may name."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name) / "room"
        folder.mkdir()
        os.chdir(folder)
        for shard, tensor in (("a", "w"), ("b", "v"), ("../outside", "w")):
            Path(shard).write_bytes(h.safetensors_bytes({tensor: h.f32(0, 16)}))
        Path("link").symlink_to("../outside")
        Path("memory").symlink_to("/proc/self/mem")
        Path("folder").mkdir()
        os.mkfifo("pipe")
        try:
            yield folder
        finally:
            os.chdir(home)


class Crash(BaseException):
    """A result that no input may cause. It is not an Exception, so the tested code cannot catch it."""


def show(text: str) -> None:
    if not text.replace("\n", "").isprintable():
        raise Crash(f"it prints {text!a}")


def read_checkpoint(name: str, data: bytes) -> None:
    Path(name).write_bytes(data)
    index = streammerge.inspect(name)
    show(render.index_text(index, True))
    json.dumps(render.index_json(index, True))
    if zlib.crc32(data) % 4 == 0:  # planning takes longer than everything above
        streammerge.plan(name)


def read_pickle(data: bytes) -> None:
    """The first bytes choose the container; the container is valid except for its pickle."""
    wrap, _ = list(h.CONTAINERS.values())[sum(data[:1]) % len(h.CONTAINERS)]
    read_checkpoint("x.pth", wrap(data[1:]))


def read_beside(folder: str, name: str, beside: dict[str, bytes], data: bytes) -> None:
    """Reads a folder that holds this file beside valid ones."""
    Path(folder).mkdir(exist_ok=True)
    for other, content in beside.items():
        (Path(folder) / other).write_bytes(content)
    (Path(folder) / name).write_bytes(data)
    index = streammerge.inspect(folder)
    show(render.index_text(index, True))
    if zlib.crc32(data) % 4 == 0:
        streammerge.plan(folder)


def read_states(data: bytes) -> None:
    """The pickle is that of the model in a checkpoint of DeepSpeed, at the stage that the first byte tells."""
    stage = 3 if data[:1] < b"\x80" else 2
    name = f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"
    optim = {"zero_pp_rank_0_mp_rank_00_optim_states.pt": h.zip_bytes(h.optim_states(stage))}
    read_beside(f"zero{stage}", name, optim, h.zip_bytes(data[1:]))


def read_text(data: bytes) -> None:
    """A recipe that was read can be written, and reads back equal."""
    Path("x.yaml").write_bytes(data)
    recipe = read_recipe("x.yaml")
    text = to_yaml(recipe.to_dict())
    Path("x.yaml").write_text(text, errors="surrogatepass")
    if to_yaml(read_recipe("x.yaml").to_dict()) != text:
        raise Crash(f"it is another recipe once it was written:\n{text}")


# ---------------------------------------------------------------------------------------------------------- mutators

PIECES = [bytes([code]) for code in b"RQbt(}]sueo02N)\x81\x85\x8f\x90\x91\x92\x93\x94"]
PIECES += [
    b"K\0",
    b"h\0",
    b"J\xff\xff\xff\xff",
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b'"',
    b"{",
    b"-",
    b"1e9",
    b"null",
]
ODD = (None, True, -1, 0, 5, 16, 1 << 31, 1 << 63, 1 << 64, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "..", "w")
ODD += ("a/b", "/etc/passwd", "link", "memory", "pipe", "folder", "~", "\x1b[31m", "\0", "\ud800", "n" * 300, [], {}, [[]])
TAGS = "!!int ''|!!int _|!!timestamp x|2001-99-99|!!bool x|!!float x|!!binary x|!!map x|!!set x|!!omap []|!!str |!x |&a |*a"
TAGS += "|<<: |? |: |- |'|\"|{|}|[|]|,|#|~|.nan|1e999|0x|0b|1:2:3|1_0|=|os:system|/(/|*|\t|\0|\x1b|\u2028|\ufeff|\x85"
TAGS += "|!!python/object/apply:os.system [touch canary]|on|no|linear|ties|filter: x|value: 1|t: 0.5"
WORDS = [tag.encode() for tag in TAGS.split("|")] + [b"|\n", b">\n", b"%YAML 9.9\n", b"---\n", b"...\n", b"\n", b"\n  "]


def injured(content: bytes, chance: random.Random, pieces: list[bytes] = PIECES) -> bytes:
    made = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 10])):
        at, piece = chance.randrange(len(made) + 1), chance.choice(pieces)
        kind = chance.randrange(7)
        if kind == 0:
            made[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            made[at : at + len(piece)] = piece
        elif kind == 3:
            made[at:at] = piece
        elif kind == 4:
            del made[at : at + chance.randrange(1, 9)]
        elif kind == 5:
            start = chance.randrange(len(made) + 1)
            made[at:at] = made[start : start + chance.randrange(1, 40)]
        elif chance.random() < 0.2:
            del made[at:]
    return bytes(made)


def _somewhere(data: Any, chance: random.Random) -> tuple[Any, Any]:
    """Returns a list or dictionary in the data, and one of its keys."""
    holder, key = [data], 0
    while isinstance(holder[key], list | dict) and holder[key] and (holder[key] is data or chance.random() < 0.8):
        holder = holder[key]
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    return holder, key


def injured_data(data: Any, chance: random.Random) -> Any:
    """Returns plain data with some parts replaced, renamed, repeated, moved or removed."""
    made = copy.deepcopy(data)
    for _ in range(chance.choice([1, 1, 2, 3])):
        if not isinstance(made, list | dict) or not made:
            break
        holder, key = _somewhere(made, chance)
        other, place = _somewhere(data, chance)
        value = copy.deepcopy(chance.choice([chance.choice(ODD), other[place]]))
        kind = chance.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = [holder[key]] * chance.choice([1, 2, 9])
        elif isinstance(holder, list) and kind == 2:
            holder.insert(key, value)
        elif isinstance(holder, dict) and kind < 4:
            holder[str(place if kind == 2 else chance.choice(ODD))] = holder.pop(key) if kind == 2 else value
        else:
            holder[key] = value
    return made


def _json_bytes(data: Any, chance: random.Random) -> bytes:
    return json.dumps(data, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def injured_json(content: bytes, chance: random.Random) -> bytes:
    return (
        injured(content, chance)
        if chance.random() < 0.5
        else _json_bytes(injured_data(json.loads(content), chance), chance)
    )


def injured_header(content: bytes, chance: random.Random) -> bytes:
    """Returns a file with a damaged header. Its length is right in three cases of four."""
    (length,) = struct.unpack("<Q", content[:8])
    if chance.random() < 0.25:
        return injured(content, chance)
    return h.safetensors_bytes(injured_json(content[8 : 8 + length], chance), content[8 + length :])


def injured_text(content: bytes, chance: random.Random) -> bytes:
    """Returns a recipe with lines moved or words of YAML inserted, or with damaged data written as JSON (also YAML)."""
    if chance.random() < 0.4:
        return _json_bytes(injured_data(_loaded(content), chance), chance)
    lines = content.splitlines(keepends=True)
    for _ in range(chance.choice([0, 1, 2])):
        lines.insert(chance.randrange(len(lines) + 1), lines.pop(chance.randrange(len(lines))))
    return injured(b"".join(lines), chance, WORDS)


def injured_gguf(content: bytes, chance: random.Random) -> bytes:
    """Returns a file of llama.cpp with a damaged number or text in its header, or with damaged bytes."""
    if chance.random() < 0.5:
        return injured(content, chance)
    made = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at, size = chance.randrange(4, len(made)), chance.choice([1, 4, 8])
        odd = [0, 1, 7, 8, 9, 32, 64, 255, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 64) - 1]
        made[at : at + size] = chance.choice(odd).to_bytes(8, "little")[:size]
    return bytes(made)


@cache
def _loaded(content: bytes) -> Any:
    import yaml

    return yaml.safe_load(content)


@cache
def _opcodes(content: bytes) -> list[bytes]:
    ends = [at for *_, at in pickletools.genops(content)] + [len(content)]
    return [content[a:b] for a, b in itertools.pairwise(ends)]


def injured_pickle(content: bytes, chance: random.Random) -> bytes:
    """Returns a pickle with opcodes exchanged, or with damaged bytes."""
    if chance.random() < 0.4:
        return content[:1] + injured(content[1:], chance)
    made = list(_opcodes(content[1:]))
    for _ in range(chance.choice([1, 1, 2, 4])):
        at, other = (chance.randrange(len(made)) for _ in range(2))
        kind = chance.randrange(5)
        if kind == 0:
            made[at], made[other] = made[other], made[at]
        elif kind == 1:
            made[at:at] = made[other : other + chance.randrange(1, 9)]
        elif kind == 2:
            made[at] = chance.choice(PIECES)
        elif kind == 3:
            made.insert(at, chance.choice(PIECES))
        elif len(made) > 9:
            del made[at : at + chance.randrange(1, 4)]
    return bytes([chance.randrange(256)]) + b"".join(made)


def injured_bare(content: bytes, chance: random.Random) -> bytes:
    """Returns a pickle, which no byte stands before, with opcodes exchanged or damaged bytes."""
    return injured_pickle(b"\0" + content, chance)[1:]


def injured_tar(content: bytes, chance: random.Random) -> bytes:
    """Returns a tar archive with fields of its headers damaged, or bytes anywhere."""
    if chance.random() < 0.2:
        return injured(content, chance)
    made = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        header = chance.choice([found.start() - 257 for found in re.finditer(b"ustar", content)])
        field, size = chance.choice([(0, 100), (124, 12), (156, 1), (257, 6), (345, 155), (512, 40)])
        at = header + field + chance.randrange(size)
        piece = chance.choice(
            [b"\0", b"7", b"\x80", b"x", b"L", b"/", b"..", b"model_weights/", b"9" * 12, chance.randbytes(4)]
        )
        made[at : at + len(piece)] = piece
    return bytes(made)


@cache
def _records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist()}


def injured_within(content: bytes, chance: random.Random) -> bytes:
    """Returns a valid archive with one damaged record."""
    records = dict(_records(content))
    records["archive/data.pkl"] = injured(records["archive/data.pkl"], chance)
    return h.zip_of(records.items(), compress=chance.random() < 0.3)


def injured_archive(content: bytes, chance: random.Random) -> bytes:
    """Returns a .pth file with damaged bytes, zip header fields or pickle."""
    kind = chance.randrange(4) if content[:2] == b"PK" else 0
    if kind == 0:
        return injured(content, chance)
    if kind == 1:
        return injured_within(content, chance)
    made = bytearray(content)
    for _ in range(kind - 1):
        field = chance.choice([*re.finditer(rb"PK[\1\3\5]", made)] or [re.search(b"", made)]).start() + chance.randrange(
            4, 46
        )
        size = chance.choice([1, 2, 4])
        made[field : field + size] = chance.choice([b"\0" * 4, b"\xff" * 4, b"\1\0\0\0", chance.randbytes(4)])[:size]
    return bytes(made)


# ------------------------------------------------------------------------------------------------------------ seeds

FIRES = h.call("posix.system", f"touch {CANARY}")
PICKLE = h.stream(
    {"m": {"w": h.tensor(), "v": h.tensor((2, 2), (1, 2))}, "c": h.call("a.b", 1, "x"), "s": {"lr": 0.1, "l": [1, None]}}, 4
)
MODULE = (
    h.name("a.Net")
    + h.dump(())
    + b"\x81"
    + h.dump({"_modules": {}, "_parameters": {"w": h.tensor()}, "_buffers": {}})
    + b"b"
)
HOSTILE = h.stream({"w": h.tensor(), "x": [FIRES, h.call("io.open", CANARY, "w"), h.memoized(1, {"a": FIRES}), h.again(1)]})
TAR = h.stream({"w": h.CONTAINERS["tar"][1], "x": FIRES})
RECIPE = b"""\
merge_method: ties
models:
- {model: a, parameters: {weight: [{filter: layer, value: [0.25, 0.75]}, {value: 0.5}], density: 0.5}}
- model: b
  parameters:
    weight: 2.0
base_model: a
rules:
- {match: ['*.bias', /^one$/], parameters: {weight: [0.5, 0.25]}}
- {match: scale, merge_method: linear}
- {match: embed, copy: b}
- {match: mask, drop: true}
out_dtype: float32
on_missing: base
output: {max_shard_size: 5MB}
seed: 3
"""
SLICES = b"""\
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [&s {model: b, layer_range: [1, 3], parameters: {scale: 0.5}}]
"""
MODULES = b"merge_method: linear\nmodules:\n  one: {models: [{model: a}, {model: b}]}\n  two: {models: &m [{model: a}]}\n"


GGUFS = (
    gguf({"general.architecture": "x", "t": ["a", ""], "n": [[1], [2]], "f": 0.5}, {"w": ("F32", (2, 2), bytes(16))}),
    gguf(
        {"general.architecture": "llama", "llama.attention.head_count": 2, "general.alignment": 64},
        {
            "blk.0.attn_q.weight": ("Q8_0", (4, 32), bytes(136)),
            "blk.0.attn_k.bias": ("F32", (4,), bytes(16)),
            "blk.0.ffn_up_exps.weight": ("Q4_K", (2, 1, 256), bytes(288)),
            "token_embd.weight": ("BF16", (3, 4), bytes(24)),
        },
        alignment=64,
    ),
)


@dataclass(frozen=True)
class Target:
    """``read`` raises StreammergeError for bytes that it refuses; it runs in a :func:`room`."""

    read: Callable[[bytes], None]
    injure: Callable[[bytes, random.Random], bytes]
    seeds: tuple[bytes, ...]
    text_of_lines: bool = False


TARGETS = {
    "header": Target(
        partial(read_checkpoint, "x.safetensors"),
        injured_header,
        (
            h.safetensors_bytes({"__metadata__": {"a": "b"}, "w": h.f32(0, 8), "v": h.f32(8, 16, [1, 2])}),
            h.safetensors_bytes(
                {"e": h.f32(0, 0, [0, 3]), "f": {"dtype": "F4", "shape": [2, 16], "data_offsets": [0, 16]}}
            ),
        ),
    ),
    "index": Target(
        partial(read_checkpoint, "model.safetensors.index.json"),
        injured_json,
        (json.dumps({"metadata": {"total_size": 32}, "weight_map": {"w": "a", "v": "b"}}).encode(),),
    ),
    "zip": Target(
        partial(read_checkpoint, "x.pth"),
        injured_archive,
        (
            h.zip_bytes(PICKLE),
            h.zip_bytes(PICKLE, compress=True),
            h.zip_bytes(h.stream(h.Raw(MODULE))),
            h.zip_bytes(HOSTILE),
            h.legacy_bytes(PICKLE),
            h.tar_bytes(TAR, [("1", "0", 0, 4)]),
        ),
    ),
    "pickle": Target(
        read_pickle,
        injured_pickle,
        tuple(
            bytes([container]) + content
            for container, contents in enumerate(((PICKLE, h.stream(h.Raw(MODULE)), HOSTILE), (PICKLE, HOSTILE), (TAR,)))
            for content in contents
        ),
    ),
    "metadata": Target(
        partial(read_beside, "dcp", ".metadata", dict(h.dcp_files()[:-1])),
        injured_bare,
        (h.dcp_files()[-1][1], h.dcp_files(FIRES)[-1][1]),
    ),
    "states": Target(read_states, injured_pickle, (b"\xff" + h.model_states(2), b"\0" + h.model_states(3))),
    "rank": Target(
        lambda data: read_beside(
            "ranks", "model_rank_0.pt", {"model_rank_1.pt": h.zip_bytes(h.rank_file(1))}, h.zip_bytes(data)
        ),
        injured_bare,
        (h.rank_file(0),),
    ),
    "nemo": Target(
        partial(read_checkpoint, "x.nemo"),
        injured_tar,
        (
            h.nemo_bytes({"model_config.yaml": b"a: 1", "model_weights.ckpt": h.zip_bytes(PICKLE)}),
            h.nemo_bytes({f"model_weights/{name}": data for name, data in h.dcp_files()}),
        ),
    ),
    "places": Target(
        partial(read_beside, "hf", "shard-00001-model-00001-of-00001.safetensors", {}),
        injured_header,
        (
            h.safetensors_bytes(
                {
                    "__metadata__": {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0]}, "v": {"saved_offsets": [0, 0]}}'},
                    "w": h.f32(0, 8),
                    "v": h.f32(8, 16, [1, 2]),
                }
            ),
        ),
    ),
    "gguf": Target(partial(read_checkpoint, "x.gguf"), injured_gguf, GGUFS),
    "recipe": Target(read_text, injured_text, (RECIPE, SLICES, MODULES), text_of_lines=True),
}


def mutants(target: Target, seed: object) -> Iterator[bytes]:
    """Yields damaged seeds endlessly, in turn. The same random seed gives the same ones."""
    chance = random.Random(str(seed))
    for content in itertools.cycle(target.seeds):
        yield target.injure(content, chance)


# ---------------------------------------------------------------------------------------------------------- judging


class Judge:
    """Runs one target, case by case, and records its cost."""

    def __init__(self, target: Target) -> None:
        self.target, self.cases, self.read, self.slowest = target, 0, 0, 0.0
        self._status = open("/proc/self/status", "rb", buffering=0)  # noqa: SIM115 - open as long as the judge
        for content in target.seeds:  # imports everything, so that late imports do not count as growth
            target.read(content)
        with contextlib.suppress(OSError):  # otherwise the peak of earlier code in this process hides growth
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._peak()
        signal.signal(signal.SIGALRM, self._hangs)

    def _peak(self) -> int:
        self._status.seek(0)
        return int(self._status.read(4096).partition(b"VmHWM:")[2].split(None, 1)[0]) << 10

    @property
    def grown_bytes(self) -> int:
        return self._peak() - self._before

    @staticmethod
    def _hangs(*_: object) -> None:
        raise Crash(f"it hangs for {HANGS_SECONDS} seconds")

    def attempt(self, data: bytes) -> None:
        """Runs one case. Raises Crash."""
        self.cases += 1
        began, said = time.process_time(), ""
        signal.setitimer(signal.ITIMER_REAL, HANGS_SECONDS)
        try:
            self.target.read(data)
            self.read += 1
        except StreammergeError as error:
            said = str(error) or "\0"
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise Crash(f"{type(error).__name__} in {Path(frame.filename).name} {frame.name}: {error}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.process_time() - began
        self.slowest = max(self.slowest, seconds)
        if not (said.replace("\n", "") if self.target.text_of_lines else said).isprintable():
            raise Crash(f"its error is {said!a}")
        if os.path.lexists(CANARY):
            Path(CANARY).unlink()
            raise Crash("it was executed: the canary is there")
        if seconds > MOST_SECONDS:
            raise Crash(f"it took {seconds:.1f} seconds")
        if self.grown_bytes > MOST_BYTES:
            raise Crash(f"it took {self.grown_bytes >> 20} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--input", type=Path)
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--seconds", type=int, default=60, help="how long, with --atheris")
    asked = parser.parse_args()
    target, home = TARGETS[asked.target], Path.cwd()

    found: set[str] = set()

    def attempt(data: bytes) -> None:
        """Runs one case; keeps and prints the first crash of each kind."""
        try:
            judge.attempt(data)
        except Crash as crash:
            kind = re.sub(r"\d+|'.*'", "", str(crash))[:60]
            if kind not in found:
                found.add(kind)
                kept = home / f"crash-{asked.target}-{hashlib.sha256(data).hexdigest()[:12]}"
                kept.write_bytes(data)
                print(f"{crash}\npython {sys.argv[0]} {asked.target} --input {kept.name}", file=sys.stderr, flush=True)

    given = asked.input and asked.input.read_bytes()
    with room():
        judge, began = Judge(target), time.monotonic()
        if given is not None:
            attempt(given)
        elif asked.atheris:
            guided(target, attempt, asked.seconds)
        else:
            for data in itertools.islice(mutants(target, asked.seed), asked.runs):
                attempt(data)
        if not asked.atheris:
            report(asked.target, judge, time.monotonic() - began)
    sys.exit(bool(found))


def report(name: str, judge: Judge, seconds: float) -> None:
    assert "torch" not in sys.modules
    print(
        f"{name}: {judge.cases} cases, {judge.read} of them read, {judge.cases / seconds:.0f} a second; "
        f"the slowest took {judge.slowest * 1000:.0f} ms, memory grew by {judge.grown_bytes / (1 << 20):.1f} MiB"
    )


def guided(target: Target, attempt: Callable[[bytes], None], seconds: int) -> None:
    """Runs libFuzzer in a child, because it ends its process. It makes half of its mutants itself."""
    import atheris

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        with contextlib.suppress(Exception):  # a mutant may lack the structure that the mutators expect
            if chance.random() < 0.5:
                return target.injure(bytes(data), chance)[:most]
        return bytes(atheris.Mutate(data, most))

    Path("corpus").mkdir()
    for number, content in enumerate(target.seeds):
        Path(f"corpus/{number}").write_bytes(content)
    child = os.fork()
    if not child:
        for function in [f for f in gc.get_objects() if isinstance(f, FunctionType)]:
            if str(function.__module__).partition(".")[0] in INSTRUMENTED:
                atheris.instrument_func(function)
        options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=60", "-rss_limit_mb=0", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, "corpus"], attempt, custom_mutator=mutated)
        atheris.Fuzz()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
