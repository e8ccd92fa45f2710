"""Runs must not lose inputs, their folders or other files. Inputs that change during a run, and forks after a run."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from running.own_methods import at_once, failing, in_a_pass
from streammerge.planning import tasks
from streammerge.tensors.spec import GRAIN


def test_an_input_that_changes_during_the_run_leaves_no_output(tmp_path: Path) -> None:
    for number in range(2):
        save_file(trained(number), tmp_path / f"{number}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]

    def meddle(event: object) -> None:
        if type(event).__name__ == "Syncing" or type(event).__name__ == "TaskDone":
            os.utime(paths[1], (1, 1))

    with pytest.raises(sm.ChangedError, match=r"1\.safetensors changed"):
        sm.merge(paths, tmp_path / "out.safetensors", listener=meddle)
    assert not (tmp_path / "out.safetensors").exists()


WAYS_TO_FAIL = ("at once", "in a pass", "in a kernel", "interrupted", "of the listener", "values")


def held(folder: Path) -> list[str]:
    """Returns the files of the folder that this process has open or mapped."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.lexists(link)]
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [path for path in opened + mapped if path.startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel does not list open files")
@pytest.mark.parametrize(
    ("way", "how"),
    [
        *((way, {"io": io}) for way in WAYS_TO_FAIL for io in ("mmap", "pread")),
        *((way, {"executor": "processes"}) for way in ("in a pass", "interrupted")),
    ],
)
@pytest.mark.sampled(3)
def test_a_failed_run_keeps_no_file_open(
    way: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without the garbage collector, which a training loop may have turned off."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        infinite = torch.full((3,), torch.inf if way == "values" and number else 1.0)
        save_file({f"w{i}": torch.ones(700, 300) for i in range(4)} | {"v": infinite}, path)
    methods = {"at once": at_once, "in a pass": in_a_pass, "in a kernel": failing}

    def listen(event: object) -> None:
        if type(event).__name__ == "TaskDone" and way in ("interrupted", "of the listener"):
            raise KeyboardInterrupt if way == "interrupted" else ZeroDivisionError

    gc.collect()
    gc.disable()
    try:
        sm.merge(
            paths,
            tmp_path / "out.safetensors",
            method=methods.get(way, "linear"),
            listener=listen,
            resume=False,
            workers=3,
            **how,
        )
    except (sm.StreammergeError, ZeroDivisionError, KeyboardInterrupt):
        pass
    else:
        raise AssertionError
    finally:
        gc.enable()
    assert held(tmp_path) == []


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_output_that_is_an_input_is_refused(tmp_path: Path, link: object) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    before = (tmp_path / "in.safetensors").read_bytes()
    link(tmp_path / "in.safetensors", tmp_path / "out.safetensors")  # type: ignore[operator]
    with pytest.raises(sm.FormatError, match="one of the inputs"):
        sm.merge([tmp_path / "in.safetensors"], tmp_path / "out.safetensors", overwrite=True)
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_a_folder_that_holds_an_input_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file(trained(1), tmp_path / "a" / "model.safetensors")
    with pytest.raises(sm.FormatError, match="holds one of the inputs"):
        sm.merge([tmp_path / "a"], tmp_path / "a", overwrite=True)
    assert_same(load_safetensors(tmp_path / "a" / "model.safetensors"), trained(1))


def folders(tmp_path: Path) -> tuple[Path, Path]:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file(trained(number), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path / "a", tmp_path / "b"


def test_an_output_in_the_folder_of_an_input_is_refused(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    with pytest.raises(sm.FormatError, match="lies in the folder of an input"):
        sm.merge([a, b], a / "merged.safetensors", integers="first")
    with pytest.raises(sm.FormatError, match="lies in the folder of an input"):
        sm.merge([a, b], b / "merged" / "x.safetensors" if (b / "merged").mkdir() else b / "merged" / "x", integers="first")


def test_a_folder_with_a_hard_link_of_an_input_is_not_replaced(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "out").mkdir()
    os.link(a / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(sm.FormatError, match="holds one of the inputs"):
        sm.merge([a, b], tmp_path / "out", integers="first", overwrite=True)


def test_a_file_in_the_place_of_a_folder_is_noticed_first(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(sm.RecipeError, match="is a file, and a folder is to be there"):
        sm.merge([a, b], tmp_path / "out", integers="first", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("how", ["own", "link"])
def test_extras_over_an_inputs_configuration_are_refused(tmp_path: Path, how: str) -> None:
    a, _ = folders(tmp_path)
    extras = a / "config.json"
    if how == "link":
        extras = tmp_path / "linked.json"
        os.link(a / "config.json", extras)
    with pytest.raises(sm.RecipeError, match="an input or the output"):
        sm.convert(a, tmp_path / "out", extras=extras, overwrite=True)
    assert (a / "config.json").read_text() == "{}"


def test_our_own_output_is_replaced_whatever_it_held(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    sm.merge([a, b], tmp_path / "out", integers="first")
    sm.merge([a / "model.safetensors", b / "model.safetensors"], tmp_path / "out", integers="first", overwrite=True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_side_file_that_changes_is_noticed(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "secret").write_text("secret")

    def listen(event: object) -> None:
        if type(event).__name__ == "RunStarted":
            (a / "config.json").unlink()
            (a / "config.json").symlink_to(tmp_path / "secret")

    with pytest.raises(sm.ChangedError, match=r"config\.json"):
        sm.merge([a, b], tmp_path / "out", integers="first", listener=listen)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- fork after a merge

FORKS = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # making the inputs starts no thread
import streammerge as sm
from safetensors.torch import save_file
chance = torch.Generator().manual_seed(0)
for number in range(3):
    tensors = {f"l{i}.w": torch.randn(300, 301, generator=chance) for i in range(4)}
    save_file(tensors | {"long": torch.randn((1 << 22) + 7, generator=chance)}, f"{number}.safetensors")
torch.save({"w": torch.randn(2000, 1001, generator=chance).t()}, "strided.pth")
numbers = torch.ones(1 << 20, dtype=torch.float64)
torch.set_num_threads(4)
ALL = ["0.safetensors", "1.safetensors", "2.safetensors"]

def merged(method, out):
    parameters = {"linear": {}, "slerp": {"t": 0.3}, "ties": {"density": 0.5}}[method]
    how = {"parameters": parameters} | ({"base": ALL[2]} if method == "ties" else {})
    sm.merge(ALL[:2], out, method=method, workers=3, overwrite=True, **how)

def forked(what, work):
    child = os.fork()
    if not child:
        signal.alarm(40)  # ends a child that hangs
        work()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"a child forked after {what} ended with {status}")

def use_helpers():
    assert torch.get_num_threads() == 4
    assert numbers.dot(numbers) == numbers.numel()
"""
"""The common part of programs that fork. One tensor is so long that all workers share its passes."""


def run_forks(folder: Path, code: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORKS + code], cwd=folder, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_nothing_leaves_torch_threads_behind_in_the_caller(tmp_path: Path) -> None:
    """A child that is forked afterwards has no such threads. It would hang as soon as torch waits for them."""
    code = """
def converted():
    sm.convert("strided.pth", "strided.safetensors", dtype="float16")

def verified():
    for workers in (1, 3):
        sm.verify("ties", sample="100%", workers=workers)
    sm.verify("strided.safetensors", sample="100%")

def written():
    with sm.SafetensorsWriter("written.safetensors", [sm.TensorSpec("w", "float64", (1024, 1024))]) as writer:
        writer.write("w", numbers.view(1024, 1024).t())
        writer.commit()

for method in ("linear", "slerp", "ties"):
    merged(method, method)
    forked(method, use_helpers)
for work in (converted, verified, written):
    work()
    forked(work.__name__, use_helpers)
use_helpers()
"""
    run_forks(tmp_path, code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_children_merge_after_their_parent_has_merged_and_computed(tmp_path: Path) -> None:
    """The program itself has started torch's threads."""
    code = """
use_helpers()
for method in ("linear", "slerp", "ties"):
    merged(method, f"{method}.safetensors")
    forked(method, lambda: merged(method, f"child-{method}.safetensors"))
    assert open(f"{method}.safetensors", "rb").read() == open(f"child-{method}.safetensors", "rb").read()
"""
    run_forks(tmp_path, code)
