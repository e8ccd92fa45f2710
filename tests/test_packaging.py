"""The wheel that people install: what is in it, what it says of itself, and that it runs on every Python it names."""

from __future__ import annotations

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the source archive, and the wheel from that, as a release does."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, env=CLEAN, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_modules_schema_examples_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert modules <= names
    assert {"streammerge/py.typed", "streammerge/recipe.schema.json", "streammerge/examples/ties.yaml"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    compiled = shutil.which("cc") is not None
    assert ("streammerge/compiled/arithmetic.so" in names) is compiled
    assert wheel.name.endswith("-py3-none-any.whl") is not compiled
    assert not [name for name in names if name.endswith(".c")]
    assert not [name for name in names if "tests" in name or name.endswith((".pyc", ".pth"))]


def test_the_wheel_describes_itself(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    said = email.message_from_string(text)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Author"] == "The streammerge maintainers"
    assert said["Requires-Python"] == ">=3.10"
    assert "torch>=2.6" in said.get_all("Requires-Dist", [])
    assert said["Description-Content-Type"] == "text/markdown"
    shown = said.get_payload()
    assert "Merges model checkpoints that are larger than the machine's memory" in shown
    assert not re.findall(r"\]\((?!http)[^)]*\)", shown), "links that lead nowhere outside the repository"
    assert "[DESIGN.md" not in shown
    assert "DESIGN.md describes the code" in shown


def test_links_lead_to_the_repository_when_it_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object  # type: ignore[attr-defined]
    builder = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    builder.BuildHookInterface = list  # type: ignore[attr-defined]  # a class that takes a parameter
    parents = ("builders", "builders.hooks", "builders.hooks.plugin", "metadata", "metadata.plugin")
    for name in ("hatchling", *(f"hatchling.{parent}" for parent in parents)):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for each in (interface, builder):
        monkeypatch.setitem(sys.modules, each.__name__, each)  # only the build's own environment has it
    description = runpy.run_path(str(ROOT / "hatch_build.py"))["description"]

    readme = "[a](b.md), [c](https://d), [e](#f)\n\n![g](h.svg)\n\ni\n"
    assert description(readme, "") == "a, [c](https://d), [e](#f)\n\ni\n"
    assert description(readme, "https://x/y") == (
        "[a](https://x/y/blob/HEAD/b.md), [c](https://d), [e](#f)\n\n![g](https://x/y/raw/HEAD/h.svg)\n\ni\n"
    )


def interpreters() -> list[str]:
    """Returns the oldest and the newest Python that is installed and supported, besides the running one."""
    roots = [*map(str, Path("~/.pyenv/versions").expanduser().glob("*/bin")), *os.environ.get("PATH", "").split(os.pathsep)]
    found = {}
    for minor in range(10, 15):
        path = shutil.which(f"python3.{minor}", path=os.pathsep.join(roots))
        if path is not None and minor != sys.version_info.minor:
            found[minor] = path
    return [found[minor] for minor in sorted({min(found), max(found)})] if found else []


@pytest.mark.slow
@pytest.mark.parametrize("python", interpreters() or [None], ids=lambda path: path and Path(path).name)
def test_the_wheel_runs_without_torch(wheel: Path, tmp_path: Path, python: str | None) -> None:
    """Installs everything declared but torch, which is large: inspecting, planning, converting, short means do without."""
    if python is None:
        pytest.skip("no other supported Python is installed")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], env=CLEAN, check=True)
    run = tmp_path / "venv/bin/python"
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    needed = [each for each in email.message_from_string(text).get_all("Requires-Dist", []) if "extra ==" not in each]
    for what in (["--no-deps", str(wheel)], [each for each in needed if not each.startswith("torch")]):
        subprocess.run([run, "-m", "pip", "install", "--quiet", *what], env=CLEAN, check=True)
    script = (
        "import numpy; from safetensors.numpy import save_file; save_file({'w': numpy.ones((3, 4), 'f4')}, 'a.safetensors')"
    )
    subprocess.run([run, "-c", script], cwd=tmp_path, env=CLEAN, check=True)
    tool = tmp_path / "venv/bin/streammerge"
    for arguments in (
        ["--help"],
        ["merge", "--help"],
        ["methods"],
        ["inspect", "a.safetensors"],
        ["plan", "a.safetensors", "a.safetensors"],
        ["convert", "a.safetensors", "-o", "b.pth"],
        ["convert", "b.pth", "-o", "c/"],
        ["verify", "b.pth", "--sample", "0"],
        ["merge", "a.safetensors", "a.safetensors", "-o", "short.pth"],  # which numpy makes
    ):
        done = subprocess.run([tool, *arguments], cwd=tmp_path, env=CLEAN, capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stderr)
    slerp = ["merge", "a.safetensors", "a.safetensors", "--method", "slerp", "-p", "t=0.5", "-o", "d.pth"]
    refused = subprocess.run([tool, *slerp], cwd=tmp_path, env=CLEAN, capture_output=True, text=True)
    assert refused.returncode == 2
    assert (
        refused.stderr.splitlines()[-1] == "error: torch is not installed, and this merge computes with it; install torch"
    )
    assert not (tmp_path / "d.pth").exists()
