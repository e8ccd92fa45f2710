"""How the public functions are called, and what they give back, as a person meets them in a notebook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import load_safetensors, mean, octets
from safetensors.torch import save_file

import streammerge as sm
from streammerge.events import quiet
from streammerge.running.executors.threads import ThreadExecutor

AB = ["a.safetensors", "b.safetensors"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, in the working directory, which is also the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, name in enumerate(AB):
        draw = torch.Generator().manual_seed(number)
        save_file({"w": torch.randn(5, 7, generator=draw), "b": torch.randn(3, generator=draw)}, name)
    return tmp_path


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sm.merge(AB, "x", methd="ties"), "merge has no option methd; did you mean method?"),
        (lambda: sm.plan(AB, wieghts=[1, 2]), "plan has no option wieghts; did you mean weights?"),
        (lambda: sm.inspect("a.safetensors", em="only"), "inspect has no option em; did you mean ema?"),
        (lambda: sm.convert("a", "b", dtyp="half"), "convert has no option dtyp; did you mean dtype?"),
        (lambda: sm.verify("a", smaple=1), "verify has no option smaple; did you mean sample?"),
        (lambda: sm.verify("a", qqq=1), "verify has no option qqq; it has out, sample, seed"),
        (
            lambda: sm.merge(AB, "x", method="slerp", t=0.3),
            "t is a parameter of slerp; pass `parameters={'t': 0.3}`",
        ),
        (lambda: sm.merge(AB, "x", t=0.3), "t is a parameter of nearswap, slerp; pass `parameters={'t': 0.3}`"),
        (
            lambda: sm.merge(AB, "x", method="ties", lambda_=[1, 2]),
            "lambda is a parameter of ties; pass `parameters={'lambda': [1, 2]}`",
        ),
        (
            lambda: sm.merge(AB, "x", method="ties", densty=torch.ones(2)),
            "merge has no option densty; did you mean `parameters={'density': ...}`, a parameter of ties?",
        ),
        (lambda: sm.merge(AB, "x", method=3, methd=1), "merge has no option methd; did you mean method?"),
        (lambda: sm.merge(AB, "x", "y"), "merge cannot be called like this: too many positional arguments"),
        (lambda: sm.convert("a"), "convert cannot be called like this: missing a required argument: 'out'"),
        (lambda: sm.merge(AB), "a merge needs a name for its output; pass `out`"),
        (lambda: sm.merge(5, "x"), "`inputs` takes a path, not 5"),
        (lambda: sm.merge([*AB, None], "x"), "`inputs` takes a path, not None"),
        (lambda: sm.merge(b"a.safetensors", "x"), "`inputs` takes a path, not b'a.safetensors'"),
        (lambda: sm.merge(AB, 5), "`out` takes a path, not 5"),
        (lambda: sm.merge(recipe=5, out="x"), "`recipe` takes a path, not 5"),
        (lambda: sm.inspect(None), "`path` takes a path, not None"),
        (lambda: sm.merge(AB, "x", listener=3), "`listener` takes a function of one event, not 3"),
        (lambda: sm.merge(AB, "x", executor=3), "`executor` takes a name, or what makes an executor"),
        (lambda: sm.merge(AB, "x", seed="x"), "`seed` takes a whole number, not x"),
        (lambda: sm.merge(AB, "x", dtype=3), "`dtype`: unknown dtype '3'"),
        (lambda: sm.merge(AB, "x", on_missing="ignore"), "`on_missing` takes one of error, base"),
        (lambda: sm.merge(AB, "x", max_shard_size=[]), "`max_shard_size`: [] is not a size"),
        (lambda: sm.merge(AB, "x", allow_nonfinite="yes"), "`allow_nonfinite` takes True or False, not yes"),
        (lambda: sm.merge({"a.safetensors": "much"}, "x"), "a dict of inputs gives each path its weight"),
        (
            lambda: sm.merge({"a.safetensors": 1}, "x", weights=[1]),
            "the inputs come with their weights; leave `weights` out",
        ),
        (
            lambda: sm.merge(AB, "x", normalize=False, parameters={"normalize": True}),
            "`normalize` and the parameter normalize are the same",
        ),
        (lambda: sm.convert("a.safetensors", "x", drop=[3]), "`drop` takes patterns like 'dvae.*'"),
        (lambda: sm.verify("a.safetensors", sample=[1]), "`sample` takes a share like 5%"),
    ],
)
def test_a_wrong_call_is_one_of_our_errors(call: Callable[[], Any], said: str, world: Path) -> None:
    with pytest.raises(sm.RecipeError, match=re.escape(said)):
        call()
    assert sorted(path.name for path in world.iterdir()) == AB


CHECKED = """
from collections.abc import Mapping
from pathlib import Path

import numpy
import streammerge as sm
import torch

sm.merge(["a", "b"], "out", weights=[0.6, 0.4], method="slerp", parameters={"t": 0.3}, on_missing="base")
sm.merge({"a": 0.6}, "out").peak_bytes
sm.inspect("a")["w"].spec.shape
sm.merge({Path("a"): numpy.float32(0.6)}, "out", progress=True, memory=numpy.int64(1 << 29))
sm.merge(["a", "b"], "out", weights=numpy.array([0.6, 0.4]), workers=numpy.int64(3), seed=numpy.int64(1))
sm.merge(["a", "b"], "out", weights=torch.ones(2), workers=torch.tensor(3), ema_decay=numpy.float64(0.9))
sm.verify("a", sample=numpy.float32(0.5))
methods: list[str] = sm.methods()
method: sm.MergeMethod = sm.methods("ties")
index: Mapping[str, sm.Source] = sm.inspect("a")
source: sm.Source | None = index.get("w")
sm.merge([sm.inspect("a"), sm.location("memory://b")], "out")
sm.merge(["a", "b"], "out", weights="0.6,0.4")  # error
sm.merge(["a", "b"], "out", weights=0.5)  # error
sm.merge(["a", "b"], "out", progress="yes")  # error
sm.merge(["a", "b"], "out", methd="ties")  # error
sm.merge(["a", "b"], "out", on_missing="ignore")  # error
sm.plan(["a", "b"], workers="two")  # error
sm.convert("a", "out").peak  # error
sm.verify("a", seed=None)  # error
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_options(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(CHECKED)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    environment = os.environ | {"MYPYPATH": str(Path(sm.__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = {int(number) for number in re.findall(r"^user.py:(\d+): error", done.stdout, re.MULTILINE)}
    assert told == {number for number, line in enumerate(CHECKED.splitlines(), 1) if "# error" in line}, done.stdout


class Named:
    """A path of somebody's own class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __fspath__(self) -> str:
        return self.name


@pytest.mark.parametrize("kind", [str, Path, Named, lambda name: f"~/{name}", lambda name: Path("~") / name])
def test_paths_of_any_kind(kind: Callable[[str], Any], world: Path) -> None:
    result = sm.merge([kind(name) for name in AB], kind("out.safetensors"), base=kind("a.safetensors"), method="ties")
    assert Path(result.out).resolve() == world / "out.safetensors"
    assert set(sm.inspect(kind("out.safetensors"))) == {"w", "b"}
    assert sm.verify(kind("out.safetensors"), inputs=kind("."), sample="100%").recomputed
    sm.convert(kind("out.safetensors"), kind("out.pth"), extras=kind("extras.json"))
    assert {"out.pth", "extras.json"} <= {path.name for path in world.iterdir()}
    sm.merge(kind("a.safetensors"), kind("kept.safetensors"), convert_first=kind("kept"))
    assert (world / "kept").is_dir()
    (world / "recipe.yaml").write_text("merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n")
    assert sm.plan(recipe=kind("recipe.yaml")).recipe.inputs == sm.plan(kind("recipe.yaml")).recipe.inputs


def test_numbers_and_dtypes_of_numpy_and_torch(world: Path) -> None:
    wanted = Path(sm.merge(AB, "wanted.safetensors", weights=[0.5, 0.25], dtype="float16").out).read_bytes()
    for number, (weights, dtype) in enumerate(
        [
            ([numpy.float32(0.5), numpy.float64(0.25)], numpy.float16),
            (numpy.array([0.5, 0.25], "f4"), numpy.dtype("float16")),
            ([torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)], torch.float16),
            (torch.tensor([0.5, 0.25]), "torch.float16"),
        ]
    ):
        out = sm.merge(AB, f"{number}.safetensors", weights=weights, dtype=dtype, seed=numpy.int64(0)).out  # type: ignore[arg-type]
        assert Path(out).read_bytes() == wanted
    same = [
        Path(sm.merge(AB, f"t{number}.safetensors", method="slerp", parameters={"t": t}).out).read_bytes()
        for number, t in enumerate((0.25, numpy.float32(0.25), torch.tensor(0.25), "0.25"))
    ]
    assert len(set(same)) == 1
    same = [
        Path(sm.merge(AB, f"w{number}.safetensors", parameters={"weight": weight}).out).read_bytes()
        for number, weight in enumerate(([0.5, 0.25], numpy.array([0.5, 0.25]), torch.tensor([0.5, 0.25])))
    ]
    assert len(set(same)) == 1
    models = [{"model": name} for name in AB]
    recipe = {"merge_method": "weighted_sum", "models": models, "parameters": {"alpha": torch.tensor(0.25)}}
    assert sm.plan(recipe=recipe).recipe.to_dict()["parameters"] == {"alpha": 0.25}


def test_a_dict_gives_each_path_its_weight(world: Path) -> None:
    sm.merge({"a.safetensors": 0.9, Path("b.safetensors"): numpy.float32(0.1)}, "out.safetensors")
    a, b = (load_safetensors(world / name)["w"] for name in AB)
    assert octets(load_safetensors(world / "out.safetensors")["w"]) == octets(
        mean([a, b], [0.9, float(numpy.float32(0.1))])
    )


class TestObjects:
    def test_an_index_is_a_mapping(self, world: Path) -> None:
        index = sm.inspect("a.safetensors")
        assert len(index) == 2
        assert set(index) == {"w", "b"} == set(dict(index))
        assert index["w"] == index.entries["w"]
        assert "w" in index
        assert "x" not in index
        assert [entry.spec.name for entry in index.values()] == list(index.keys()) == [name for name, _ in index.items()]
        with pytest.raises(KeyError):
            index["x"]

    def test_they_print_in_a_line_or_a_few(self, world: Path) -> None:
        result = sm.merge(AB, "out.safetensors")
        plan, verified, index = sm.plan(AB, "x.safetensors"), sm.verify("out.safetensors"), sm.inspect("out.safetensors")
        assert re.fullmatch(
            r"<Result out.safetensors: 2 tensors, .* written in .* s, peak memory .* of 512 MiB>", str(result)
        )
        assert repr(plan).startswith("<Plan linear of 2 models -> x.safetensors: 2 tensors, ")
        assert repr(verified).startswith("<Verified out.safetensors: 2 tensors as they were written, 35 numbers")
        assert str(verified).startswith("verified out.safetensors\n  structure  2 tensors")
        assert repr(index) == "<CheckpointIndex out.safetensors: safetensors, 2 tensors, 152 bytes>"
        assert all("\n" not in repr(each) for each in (result, plan, verified, index))

    def test_many_tensors_do_not_make_it_slow(self, world: Path) -> None:
        save_file({f"layer.{number}": torch.zeros(1) for number in range(20_000)}, "many.safetensors")
        index = sm.inspect("many.safetensors")
        began = time.perf_counter()
        assert len(repr(index)) < 100
        assert time.perf_counter() - began < 5


def test_converting_first_is_done_as_politely_and_by_the_same_executor(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 8 of the house before: the conversion ran on threads, and left the page cache full."""
    from streammerge.requests import conversions
    from streammerge.running import execution

    seen = []

    def executed(plan: Any, options: Any, before: int) -> Any:
        seen.append((options.polite, options.executor, options.resume, plan.io))
        return real(plan, options, before)

    real = execution.execute
    monkeypatch.setattr(execution, "execute", executed)
    monkeypatch.setattr(conversions, "execute", executed)

    def own(workers: int) -> ThreadExecutor:
        return ThreadExecutor(workers)

    sm.merge(
        AB, "out.safetensors", convert_first="kept", polite=True, executor=own, resume=False, io="pread", listener=quiet
    )
    assert seen == [(True, own, False, "pread")] * 3
