"""Thousands of small injuries to valid files, and nearly valid documents: each is read, or refused with one error."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz
import hostile as h
from streammerge.errors import FormatError

MUTANTS = 250  # per seed


@pytest.fixture(scope="module", autouse=True)
def room() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    with fuzz.room():
        yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_injured_files_are_read_or_refused(name: str) -> None:
    target = fuzz.TARGETS[name]
    judge = fuzz.Judge(target)
    for data in itertools.islice(fuzz.mutants(target, name), MUTANTS * len(target.seeds)):
        judge.attempt(data)
    assert 0.02 < judge.read / judge.cases < 0.9, "injuries that are all fatal, or all harmless, find nothing"


def _refuse(data: bytes) -> None:
    raise FormatError(data.decode("latin-1"))


def _burn(data: bytes) -> None:
    began = time.process_time()
    while time.process_time() - began < 1.1:
        pass


def _grow(data: bytes) -> None:
    """Takes new pages from the system. The allocator could give memory that an earlier test has freed."""
    with mmap.mmap(-1, 256 << 20) as pages:
        pages[:: mmap.PAGESIZE] = b"x" * (len(pages) // mmap.PAGESIZE)


CRASHES = {
    "KeyError": lambda data: {}[data],
    "SystemExit": lambda data: sys.exit(1),
    "its error": _refuse,
    "it prints": lambda data: fuzz.show("\x9b2J"),
    "executed": lambda data: Path(fuzz.CANARY).touch(),
    "seconds": _burn,
    "MiB": _grow,
}


@pytest.mark.parametrize("said", CRASHES)
def test_the_judge_sees_what_is_a_crash(said: str) -> None:
    with pytest.raises(fuzz.Crash, match=said):
        fuzz.Judge(fuzz.Target(CRASHES[said], fuzz.injured, ())).attempt(b"\x1b[31m")
    fuzz.Judge(fuzz.Target(_refuse, fuzz.injured, ())).attempt(b"no")


def test_the_program_runs_by_hand_without_torch(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(fuzz.TARGETS["pickle"].seeds[0])
    for words, told in ((["--input", "good"], "1 cases, 1 of them read"), (["--runs", "20"], "20 cases")):
        command = [sys.executable, fuzz.__file__, "pickle", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert told in done.stdout


# --------------------------------------------------------------------------------------------- nearly valid documents


def mostly(right: Any, *wrong: Any) -> st.SearchStrategy[Any]:
    """Generates a right value, and a wrong one in one case of ten."""
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from([*wrong, *fuzz.ODD]) if n == 5 else right)


_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
_NAMES = st.sampled_from(["w", "v", "layer.0.w", "__metadata__"]) | _TEXT


def _as_json(data: Any, draw: st.DrawFn) -> bytes:
    return json.dumps(data, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Generates headers with tensors back to back."""
    made, cursor = {}, 0
    for name in draw(st.lists(_NAMES, max_size=4, unique=True)):
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("F8_E4M3", 1), ("I64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        span = [cursor, cursor + size * math.prod(shape)]
        cursor = span[1]
        fields = {
            "dtype": mostly(st.just(dtype), "F33", "F4"),
            "shape": mostly(st.just(shape), [-1], [1 << 62, 4]),
            "data_offsets": mostly(st.just(span), span[::-1], [span[0], span[1] + 4]),
        }
        made[name] = draw(mostly(st.fixed_dictionaries(fields)))
    if draw(st.booleans()):
        made["__metadata__"] = draw(mostly(st.dictionaries(_TEXT, mostly(_TEXT), max_size=2)))
    return h.safetensors_bytes(_as_json(made, draw), bytes(cursor))


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """Generates indexes of tensors in the room's shards. Names that lead elsewhere are in ``fuzz.ODD``."""
    where = draw(st.fixed_dictionaries({"w": mostly(st.just("a"), "b"), "v": mostly(st.just("b"), "a", "../outside")}))
    where |= draw(st.just({}) | st.dictionaries(_TEXT, mostly(st.just("a")), max_size=1))
    return _as_json(draw(mostly(st.just({"weight_map": where}), {"weight_map": []})), draw)


_NUMBERS = st.floats(0, 2) | st.integers(-1, 3)
_SETTINGS = mostly(
    _NUMBERS
    | st.lists(_NUMBERS, max_size=3)
    | st.lists(st.fixed_dictionaries({"value": _NUMBERS}, optional={"filter": _TEXT}))
)
_PARAMETERS = mostly(
    st.dictionaries(st.sampled_from(["weight", "density", "t", "normalize", "lambda"]), _SETTINGS, max_size=2)
)
_METHODS = mostly(
    st.sampled_from(["linear", "ties", "slerp", "task_arithmetic", "dare_ties", "passthrough", "copy"]), "os:x"
)
_MODEL = st.sampled_from(["a", "b", "folder"])
_MODELS = st.lists(
    mostly(st.fixed_dictionaries({"model": mostly(_MODEL)}, optional={"parameters": _PARAMETERS})), min_size=1, max_size=3
)
_RANGE = mostly(st.lists(st.integers(0, 9), min_size=2, max_size=2).map(sorted))
_SOURCES = st.lists(st.fixed_dictionaries({"model": mostly(_MODEL), "layer_range": _RANGE}), min_size=1, max_size=2)
_WHAT = {
    "models": mostly(_MODELS),
    "slices": mostly(st.lists(st.fixed_dictionaries({"sources": mostly(_SOURCES)}), max_size=2)),
}
_RULE = st.fixed_dictionaries(
    {"match": mostly(st.sampled_from(["*.bias", "/^one$/", ["a*", "b"]]), "/(/", "/(a+)+$/")},
    optional={"drop": st.just(True), "copy": mostly(_MODEL), "merge_method": _METHODS, "dtype": st.just("float32")},
)
_OPTIONAL = {
    "base_model": mostly(_MODEL),
    "parameters": _PARAMETERS,
    "rules": mostly(st.lists(_RULE, max_size=2)),
    "out_dtype": mostly(st.sampled_from(["float32", "bfloat16"])),
    "on_missing": mostly(st.sampled_from(["base", "drop", "error"])),
    "output": mostly(st.just({"max_shard_size": "5MB"})),
    "seed": mostly(st.integers(0, 9)),
    "modules": mostly(st.dictionaries(_TEXT, st.fixed_dictionaries({}, optional=_WHAT), max_size=2)),
}


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    what = draw(st.sampled_from(["models", "models", "slices"]))
    data = draw(st.fixed_dictionaries({"merge_method": _METHODS, what: _WHAT[what]}, optional=_OPTIONAL))
    return _as_json(data, draw)  # JSON is also YAML


@pytest.mark.parametrize(("name", "strategy"), [("header", headers()), ("index", indexes()), ("recipe", recipes())])
def test_documents_that_are_nearly_valid(name: str, strategy: st.SearchStrategy[bytes]) -> None:
    judge = fuzz.Judge(fuzz.TARGETS[name])

    @settings(deadline=None, max_examples=100, derandomize=True)
    @given(data=strategy)
    def attempt(data: bytes) -> None:
        judge.attempt(data)

    attempt()
    assert 0.02 < judge.read / judge.cases < 0.9, "documents that are all wrong, or all right, find nothing"


YAML = (
    "!!int ''",
    "!!bool x",
    "!!timestamp x",
    "!!float ''",
    "!!binary x",
    "!!set x",
    "!!omap x",
    "!!pairs [x]",
    "2001-99-99",
    "!x",
    "!!python/object/apply:os.system [touch canary]",
    '"\\ud800"',
    '"\\0"',
)


@pytest.mark.parametrize("text", ["seed: {}", "{}: 1", "base_model: {}", "models: [{{model: {}}}]"])
def test_values_with_tags_are_one_sentence(text: str) -> None:
    judge = fuzz.Judge(fuzz.TARGETS["recipe"])
    rest = "merge_method: ties\nmodels: [{model: a}, {model: b}]\nbase_model: a\n".replace(text.split(":")[0], "x", 1)
    for value in YAML:
        judge.attempt((rest + text.format(value)).encode())
