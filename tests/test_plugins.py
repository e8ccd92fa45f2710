"""What is found by name: plug-ins of an installed package, what a program registers, and what is built in."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.formats.base import Container, Match
from streammerge.formats.registry import FORMATS
from streammerge.formats.safetensors import read as read_safetensors
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import METHODS
from streammerge.methods.registry import LINEAR, find_method
from streammerge.plugins import imported

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the package of tests/plugin is installed, as pip installs any package."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(HERE / "plugin", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def numbers(path: Path, *values: float) -> None:
    path.write_bytes(b"NUMBERS\n" + struct.pack(f"<{len(values)}f", *values))


def run(words: str, folder: Path, site: Path, code: int = 0) -> str:
    """What a command prints in a process of its own that finds the installed package."""
    paths = [str(site), str(Path(sm.__file__).parent.parent)]
    code_text = f"import sys; sys.path[:0] = {paths}; from streammerge.cli.main import run; run()"
    command = [sys.executable, "-c", code_text, *words.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_package_brings_a_method_a_format_a_store_and_an_executor(installed: Path, tmp_path: Path) -> None:
    numbers(tmp_path / "a.numbers", 1, 2, 3)
    numbers(tmp_path / "b.numbers", 5, 2, -1)
    assert "midpoint" in run("methods", tmp_path, installed)
    assert "numbers, 20 bytes" in run("inspect a.numbers", tmp_path, installed)
    (tmp_path / "b.hex").write_text((tmp_path / "b.numbers").read_bytes().hex())
    words = "merge a.numbers hexed://b.hex --method midpoint -p pull=0.25 --executor one_by_one -o out.safetensors"
    run(words, tmp_path, installed)
    assert torch.equal(load_safetensors(tmp_path / "out.safetensors")["w"], torch.tensor([2.0, 2.0, 2.0]))
    assert "to the bit" in run("verify out.safetensors --sample 100% --inputs hexed://", tmp_path, installed), (
        "its recipe names the method"
    )
    assert "hexed://absent does not exist" in run("inspect hexed://absent", tmp_path, installed, code=2)
    assert "did you mean midpoint" in run("methods midpont", tmp_path, installed, code=2)
    assert "did you mean one_by_one" in run("merge a.numbers --executor one_by -o x/", tmp_path, installed, code=2)


def test_a_package_is_asked_only_where_it_may_be_needed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        code = (
            f"import sys, streammerge as sm; sm.inspect({str(tmp_path / name)!r}); "
            "print([m for m in ('importlib.metadata', 'torch') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-S", "-c", _without_site(code)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def _without_site(code: str) -> str:
    """The program in a Python whose start-up imports nothing of the environment."""
    return f"import sys; sys.path[:0] = {sys.path!r}; {code}"


def test_a_plugin_that_does_not_load_is_named_and_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS.plugins, "broken", EntryPoint("broken", "nowhere_to_be_found:f", METHODS.group))
    monkeypatch.setitem(METHODS.plugins, "wrong", EntryPoint("wrong", "sys:maxsize", METHODS.group))
    with pytest.raises(sm.RecipeError, match=r"the merge method broken of .* cannot be loaded: No module named"):
        find_method("broken")
    with pytest.raises(sm.RecipeError, match="wrong is no function"):
        find_method("wrong")
    assert {"linear", "ties"} <= set(sm.list_methods())
    assert not {"broken", "wrong"} & set(sm.list_methods())


class TestMethods:
    def models(self, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
        for number, path in enumerate(paths):
            save_file({"w": torch.full((5,), float(number))}, path)
        return paths

    def test_a_decorated_method_is_found_by_its_name(self, tmp_path: Path) -> None:
        @sm.merge_method("doubled", base="unused", passes=False)
        def doubled(group: TensorGroup) -> Kernel:
            return lambda chunk: 2 * sum(chunk.models)

        assert find_method("doubled") is doubled.contract  # type: ignore[attr-defined]
        assert "doubled" in sm.list_methods()
        result = sm.merge(self.models(tmp_path), tmp_path / "out.safetensors", method="doubled")
        assert torch.equal(load_safetensors(tmp_path / "out.safetensors")["w"], torch.full((5,), 2.0))
        place = f"{__name__}:TestMethods.test_a_decorated_method_is_found_by_its_name.<locals>.doubled"
        assert result.plan.recipe.to_dict()["merge_method"] == place, "elsewhere nobody knows the name"

    def test_a_clash_with_a_built_in_is_refused_when_it_matters(self, tmp_path: Path) -> None:
        @sm.merge_method("median", models=(2, None))
        def median(group: TensorGroup) -> Kernel:
            return lambda chunk: chunk.models[0] + 7

        paths, out = self.models(tmp_path), tmp_path / "out.safetensors"
        sm.merge(paths, out, method=median)
        assert load_safetensors(out)["w"].tolist() == [7.0] * 5
        with pytest.raises(sm.RecipeError, match="median is built in, and this program registers another"):
            sm.merge(paths, tmp_path / "x.safetensors", method="median")
        sm.merge_method("median", models=(2, None), replace=True)(median)
        sm.merge(paths, out, method="median", overwrite=True)
        assert load_safetensors(out)["w"].tolist() == [7.0] * 5
        METHODS.unregister("median")
        assert find_method("median").function is not median

    def test_what_is_built_in_needs_no_name(self, tmp_path: Path) -> None:
        @sm.merge_method("linear")
        def linear(group: TensorGroup) -> Kernel:
            raise AssertionError

        sm.merge(self.models(tmp_path), tmp_path / "out.safetensors")
        assert LINEAR.function is not linear


def test_a_registered_format_is_asked_before_a_zip_archive_is_taken_for_torchs(tmp_path: Path) -> None:
    asked = []

    @sm.file_format("mine")
    class Mine:
        def matches(self, head: bytes, size: int) -> Match:
            asked.append(head[:2])
            return head.startswith(b"MINE")

        def read(self, path: sm.Location) -> Container:
            inner = path.with_name("inner.safetensors")
            inner.write_whole(path.read(4, path.size - 4), overwrite=True)
            return read_safetensors(inner)

    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    sm.inspect(tmp_path / "a.safetensors")
    sm.inspect(tmp_path / "a.pth")
    assert not asked, "what is recognised for certain"
    (tmp_path / "in.mine").write_bytes(b"MINE" + (tmp_path / "a.safetensors").read_bytes())
    assert list(sm.inspect(tmp_path / "in.mine")) == ["w"]
    with zipfile.ZipFile(tmp_path / "a.pth") as plain, zipfile.ZipFile(tmp_path / "turned.pth", "w") as turned:
        for name in reversed(plain.namelist()):  # as of another writer, its pickle last
            turned.writestr(name, plain.read(name))
    assert list(sm.inspect(tmp_path / "turned.pth")) == ["w"]
    assert asked == [b"MI", b"PK"]
    with pytest.raises(sm.RecipeError, match="the format x has no matches"):
        sm.file_format("x")(object())


def test_importing_a_module_of_ones_own_leaves_the_path_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    (tmp_path / "beside_the_recipe.py").write_text("def f(group): return lambda chunk: chunk.models[0]\n")
    before = list(sys.path)
    assert find_method("beside_the_recipe:f").name == "beside_the_recipe:f"
    assert sys.path == before
    with pytest.raises(ModuleNotFoundError):
        imported("not_there_at_all:f")
    assert sys.path == before


def test_completion_offers_methods_and_executors(cli: Cli) -> None:
    from streammerge.cli.options import complete_executor, complete_method

    nothing: Any = None
    assert complete_executor(nothing, nothing, "thr") == ["threads"]
    assert complete_method(nothing, nothing, "nusl") == ["nuslerp"]


def test_a_format_that_fails_is_named_and_spoils_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "_own", {})
    (tmp_path / "other").write_bytes(bytes([1, 2]))
    (tmp_path / "bad").write_bytes(bytes([1, 2, 3]) * 10)
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    class Bad:
        def matches(self, head: bytes, size: int) -> Match:
            return head[:30][29] == 3

        def read(self, path: sm.Location) -> Any:
            raise KeyError("x") if Bad.raises else 0

        raises = True

    sm.file_format("bad")(Bad)
    with pytest.raises(sm.FormatError, match=r"is not a checkpoint.*; the format bad failed with IndexError"):
        sm.inspect(tmp_path / "other")
    assert sm.inspect(tmp_path / "old.pth").numel == 3
    with pytest.raises(sm.FormatError, match="cannot be read: the format bad failed with KeyError") as caught:
        sm.inspect(tmp_path / "bad")
    assert isinstance(caught.value.__cause__, KeyError)
    monkeypatch.setattr(Bad, "read", lambda self, path: None)
    with pytest.raises(sm.FormatError, match="the format bad made NoneType, not a Container"):
        sm.inspect(tmp_path / "bad")


@pytest.mark.parametrize(
    ("made", "words"), [(3, "made int, not a streammerge.Executor"), (None, "cannot be made: KeyError")]
)
def test_an_executor_that_is_none_is_named(tmp_path: Path, made: Any, words: str) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")

    def mine(workers: int) -> Any:
        if made is None:
            raise KeyError(workers)
        return made

    with pytest.raises(sm.RecipeError, match=f"the executor mine {words}"):
        sm.merge(tmp_path / "a.safetensors", tmp_path / "out.safetensors", executor=mine)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
