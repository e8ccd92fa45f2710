"""Stores by their scheme: registered by the caller, or brought by an installed package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.plugins import Registry
from streammerge.stores import registry
from streammerge.stores.base import Input, Location, Staging, Status, Store
from streammerge.stores.locations import parse

DISK = '''
"""A read-only store over a folder of this machine."""
import os
import streammerge as sm
from streammerge.stores.base import Input, Status

ROOT = os.environ.get("DISK_ROOT", "")

class Opened(Input):
    def __init__(self, location, data):
        self.location, self.size, self.data = location, len(data), data
    def read_into(self, buffer, offset):
        if offset + len(buffer) > self.size:
            raise self.ended(offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

class Disk(sm.Store):
    scheme = "disk"
    def _path(self, location):
        return os.path.join(ROOT, location.key)
    def status(self, location):
        try:
            data = open(self._path(location), "rb").read()
        except OSError as error:
            raise sm.FormatError(f"{location}: {error.strerror}") from error
        return Status((location.key,), len(data), hash(data))
    def is_folder(self, location):
        return os.path.isdir(self._path(location))
    def list_names(self, location):
        return os.listdir(self._path(location))
    def opened(self, location):
        self.status(location)
        return Opened(location, open(self._path(location), "rb").read())
'''


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which a package with that store is installed."""
    site = tmp_path / "site"
    (site / "disk_store-1.0.dist-info").mkdir(parents=True)
    (site / "disk_store.py").write_text(DISK)
    (site / "disk_store-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: disk-store\nVersion: 1.0\n")
    (site / "disk_store-1.0.dist-info" / "entry_points.txt").write_text(
        "[streammerge.stores]\ndisk = disk_store:Disk\nbroken = disk_store:Absent\n"
    )
    (tmp_path / "root").mkdir()
    save_file(trained(1), tmp_path / "root" / "a.safetensors")
    source = str(Path(sm.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), source]), "DISK_ROOT": str(tmp_path / "root")}


def run(code: str, environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_package_brings_a_store(tmp_path: Path, installed: dict[str, str]) -> None:
    code = """
import pickle, sys
import streammerge as sm
from streammerge.stores.locations import parse
sm.inspect("local.safetensors") if False else None
assert "disk_store" not in sys.modules
result = sm.merge(["disk://a.safetensors", "disk://*.safetensors"], "out.safetensors")
print(result.plan.io, [note for note in result.notes])
print(sm.verify("out.safetensors", sample="100%", inputs="disk://").recomputed)
location = parse("disk://a.safetensors")
assert pickle.loads(pickle.dumps(location)) == location
for text in ("broken://x", "other://x"):
    try:
        sm.inspect(text)
    except sm.RecipeError as error:
        print(error)
try:
    sm.merge("disk://a.safetensors", "disk://b.safetensors")
except sm.RecipeError as error:
    print(error)
"""
    said = run(code, installed, tmp_path).splitlines()
    assert said[0].startswith("pread ")
    assert said[1] == "True"
    assert said[2].startswith("the store broken of disk-store cannot be loaded: ")
    assert re.fullmatch(
        "no store is known for other://; known are .*disk, .*memory.*, and a package can bring another", said[3]
    )
    assert said[4] == "disk://b.safetensors: the store disk:// can be read only; write to another place"


def test_a_package_that_is_not_needed_is_not_imported(tmp_path: Path, installed: dict[str, str]) -> None:
    code = "import sys, streammerge as sm; sm.inspect('root/a.safetensors'); print('disk_store' in sys.modules)"
    assert run(code, installed, tmp_path).strip() == "False"


class Empty(Store):
    scheme = "empty"

    def status(self, location: Location) -> Status:
        raise sm.FormatError(f"{location} is absent")

    def is_folder(self, location: Location) -> bool:
        return location.key == "."

    def list_names(self, location: Location) -> list[str]:
        return []

    def opened(self, location: Location) -> Input:
        raise sm.FormatError(f"{location} is absent")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.STORES, "_own", dict(registry.STORES._own))


def test_a_class_is_registered_by_a_decorator(known: None) -> None:
    assert sm.register_store(Empty) is Empty
    assert isinstance(parse("empty://x").store, Empty)
    with pytest.raises(sm.RecipeError, match="empty://x does not exist"):
        sm.inspect("empty://x")
    with pytest.raises(sm.RecipeError, match="nothing matches"):
        sm.merge("empty://*", "x.safetensors")


def test_a_scheme_is_one_stores_only(known: None) -> None:
    class Taken(Empty):
        scheme = "file"

    class Nameless(Empty):
        scheme = ""

    with pytest.raises(sm.RecipeError, match="file:// belongs to LocalStore"):
        sm.register_store(Taken)
    with pytest.raises(sm.RecipeError, match="Nameless needs a scheme"):
        sm.register_store(Nameless)


def test_a_store_for_outputs_that_is_incomplete_says_which_method_it_lacks(known: None) -> None:
    class Half(Empty):
        scheme = "half"

        def stage(self, location: Location, overwrite: bool = False) -> Staging:
            raise NotImplementedError

    sm.register_store(Half)
    with pytest.raises(sm.RecipeError, match="the store half:// has stage and lacks reopen"):
        parse("half://x").reopen(3)
    with pytest.raises(sm.RecipeError, match="the store half:// has stage and lacks check_writable"):
        parse("half://x").check_writable(overwrite=False)
    sm.register_store(Empty)
    with pytest.raises(sm.RecipeError, match="can be read only"):
        parse("empty://x").reopen(3)


def test_a_class_in_a_module_of_the_room_is_a_store() -> None:
    module = ModuleType("streammerge.stores.here")
    made = type("Here", (Empty,), {"scheme": "here", "__module__": module.__name__})
    base = type("Base", (Empty,), {"__module__": module.__name__})
    vars(module).update(Here=made, Base=base, Empty=Empty, Store=Store)
    found = registry._of_module(module)
    assert list(found) == ["here"]
    assert type(found["here"]) is made
    vars(module)["here"] = instance = made()
    assert registry._of_module(module) == {"here": instance}
    assert registry._of_module(module)["here"] is instance
    assert isinstance(registry.STORES.built_in["memory"], type(sm.memory_store))
    assert registry.STORES.built_in["memory"] is sm.memory_store


def test_what_is_no_store_is_not_registered(known: None) -> None:
    class Other:
        scheme = "other"

    class Abstract(Store):
        scheme = "abstract"

    class Raises(Empty):
        scheme = "raises"

        def __init__(self) -> None:
            raise KeyError("no key")

    for kind, words in (
        (Other, "Other is no store"),
        (Abstract, "the store Abstract lacks the methods is_folder, list_names, opened, status"),
        (Raises, "the store Raises cannot be made: 'no key'"),
    ):
        with pytest.raises(sm.RecipeError, match=words):
            sm.register_store(kind)  # type: ignore[type-var]
        assert kind.scheme not in registry.STORES._own  # type: ignore[attr-defined]


def test_a_store_is_made_once_whoever_asks_first() -> None:
    """Its connections, and what it knows of a place, are for all locations."""
    found = Registry("store", "streammerge.stores", registry._of_module, registry._of_plugin)
    alone = found.find("memory"), found.find("s3")
    assert found.find("memory") is alone[0]
    assert found.find("s3") is alone[1]
    every = found.all()
    assert (every["memory"], every["s3"]) == alone
