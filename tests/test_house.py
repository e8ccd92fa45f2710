"""The package's structure: imports between modules, public names, and imports that a command line avoids."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm

SOURCE = Path(sm.__file__).parent


ROOMS = (
    "errors", "events", "units", "version", "strict_json", "plugins", "notebook",  # words
    "stores", "options", "tensors", "compiled", "kernels", "methods", "sources", "pickles", "formats", "recipe",
    "checkpoints", "quantised", "adapters", "planning", "running", "factoring", "requests", "sweeps",
    "verifying", "diffing", "reporting", "progress", "signatures", "api", "cli", "__init__", "__main__",
)  # fmt: skip
"""Rooms from the bottom up. A room imports only from rooms before it."""


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Returns all nodes of a module's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imports(path: Path) -> set[str]:
    """Returns dotted names of the package's modules that a file imports, for type checkers too."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "streammerge":
            module = (node.module or "").removeprefix("streammerge").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                file = SOURCE / inner.replace(".", "/")
                found.add(inner if file.is_dir() or file.with_suffix(".py").exists() else module or "__init__")
    return found


def order_of(room: Path) -> list[str]:
    """Returns the modules of a room in the order of its docstring; each imports only modules above it."""
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    return re.findall(r"^    (\w+)", doc, re.MULTILINE)


def modules() -> dict[str, Path]:
    """Returns dotted name -> file of every module."""
    return {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in SOURCE.rglob("*.py")}


def test_rooms_import_from_the_rooms_below_them() -> None:
    for name, path in modules().items():
        room = name.partition(".")[0]
        for other in imports(path):
            below = other.partition(".")[0]
            assert ROOMS.index(below) <= ROOMS.index(room), f"{name} imports {other}"
            assert below != room or "." in name or name == other, f"{name} imports {other}, which lies beside it"


def test_no_room_holds_a_circle() -> None:
    """A module that its room's docstring does not list is a leaf: no module beside it imports it."""
    for init in SOURCE.rglob("__init__.py"):
        room = init.parent
        if room == SOURCE:
            continue
        prefix, order = ".".join(room.relative_to(SOURCE).parts), order_of(room)
        there = {p.stem for p in room.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
        assert set(order) <= there, f"{prefix} lists {set(order) - there}, which it does not have"
        for module in there:
            files = [room / f"{module}.py"] if (room / f"{module}.py").exists() else (room / module).rglob("*.py")
            for path in files:
                for other in imports(path):
                    beside = other.removeprefix(f"{prefix}.").partition(".")[0]
                    if not other.startswith(f"{prefix}.") or beside == module:
                        continue
                    assert beside in order, f"{prefix}.{module} imports {beside}, which is a leaf"
                    listed = order.index(module) if module in order else len(order)
                    assert order.index(beside) < listed, f"{prefix}.{module} imports {beside}, which stands below it"


PUBLIC = """
    convert diff extract finish inspect list_methods location merge methods plan report sweep verify worker
    Chunk Kernel MergeMethod TensorGroup merge_method
    AdapterResult CheckpointIndex Diff Plan Recipe Result ShareResult Source SweepResult TensorSpec Verified
    SafetensorsWriter
    Executor Location Store executor file_format memory_store register_store
    BudgetError ChangedError FormatError LockedError MismatchError RecipeError SpaceError StoreError StreammergeError
    TaskError UncheckedError UnfinishedError VerifyError
"""
"""Every public name: what is called, what a method sees, what is given back, a writer, what a plug-in brings, errors."""


def test_these_names_are_public_and_each_is_described() -> None:
    assert sorted(PUBLIC.split()) == sm.__all__
    assert set(sm.__all__) <= set(dir(sm))
    for name in sm.__all__:
        value = getattr(sm, name)
        assert name == "Kernel" or len(inspect.getdoc(value) or "") > 30 or issubclass(value, sm.StreammergeError), name


OPENS_FILES = {
    "compiled.build": "the compiled functions, when the package is built",
    "compiled.library": "the compiled functions, which lie beside it",
    "running.process": "memory of this process, which Linux tells in /proc",
    "tensors.instructions": "the kind of the processor, which Linux tells in /proc",
    "cli.streams": "the standard streams, where a daemon has closed them",
}
"""Modules outside ``stores`` that open something by a path, and what."""
ASKS_THE_DISK = re.compile(
    r"os\.(open|stat|lstat|listdir|scandir|access|readlink|unlink|remove|rename|replace|link|symlink|mkdir|makedirs|rmdir"
    r"|removedirs|truncate|utime|chmod|walk|statvfs|getcwd|path\.(exists|lexists|isfile|isdir|islink|getsize|getmtime"
    r"|realpath|abspath|samefile|expanduser))"
)
PATH_METHODS = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "is_dir", "is_symlink", "rglob", "touch", "mkdir"),
    *("rmdir", "unlink", "stat", "lstat", "samefile", "readlink", "symlink_to", "hardlink_to"),
}


def disk_calls(path: Path) -> list[str]:
    """What a module calls or imports that looks at a disk by a path."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import | ast.ImportFrom):
            from_ = node.module if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names]
            found += [name for name in (from_, *names) if name in ("glob", "tempfile", "shutil.rmtree", "Path", "pathlib")]
            found = [name for name in found if not (name == "pathlib" and names == ["PurePosixPath"])]
            found = [name for name in found if not (name == "Path" and from_ == "streammerge.recipe.fields")]
        elif isinstance(node, ast.Attribute) and ASKS_THE_DISK.fullmatch(ast.unparse(node)):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id == "open":
                found.append("open")
            elif isinstance(called, ast.Attribute) and called.attr in PATH_METHODS:
                found.append(ast.unparse(called))
    return found


def test_nothing_outside_stores_opens_a_path() -> None:
    assert disk_calls(SOURCE / "stores" / "files.py")
    for name, path in modules().items():
        if name.partition(".")[0] != "stores":
            assert bool(found := disk_calls(path)) == (name in OPENS_FILES), f"{name}: {found}"


def test_public_names_are_there_for_people_and_for_type_checkers() -> None:
    assert all(hasattr(sm, name) for name in sm.__all__)
    (typed,) = [node for node in ast.parse(Path(sm.__file__).read_text()).body if isinstance(node, ast.If)]
    assert sorted(alias.asname for line in typed.body for alias in line.names) == sm.__all__


def test_torch_is_imported_only_where_values_are_computed() -> None:
    heavy = ("torch", "numpy", "safetensors", "yaml")
    code = f"import sys, streammerge.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_is_imported_is_declared() -> None:
    """Checks every import of another project. No line imports numpy; safetensors imports it on request."""
    text = (SOURCE.parent.parent / "pyproject.toml").read_text()
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = {name.lower().replace("-", "_") for name in re.findall(r'^    "([\w-]+)', block, re.MULTILINE)}
    called = {"yaml": "pyyaml"}
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    extras = text.partition("\n[project.optional-dependencies]\n")[2].partition("\ndev = [")[0]
    declared |= set(re.findall(r'^    "([\w-]+)', extras, re.MULTILINE))
    others = {called.get(name, name) for name in found - {*sys.stdlib_module_names, "streammerge"}}
    assert others | {"numpy"} == declared
    assert 'framework="numpy"' in (SOURCE / "running/readback.py").read_text()


def test_every_module_has_its_test_file() -> None:
    """``streammerge/room/module.py`` is tested in ``tests/room/test_module.py``, which holds at least one test."""
    tests = Path(__file__).parent
    without = set()
    for name, path in modules().items():
        if path.stem.startswith("__"):
            continue
        file = tests / path.relative_to(SOURCE).parent / f"test_{path.name}"
        if not file.exists() or not re.search(r"^ *def test_|\w+Suite\)", file.read_text(), re.MULTILINE):
            without.add(name)
    assert not without


FEATURES = (
    "adapters", "factoring", "diffing", "verifying", "requests.extractions", "requests.conversions",
    "planning.stages", "planning.mixtures", "planning.unwritten", "planning.repeated", "planning.experts",
    "planning.staying", "planning.vocabularies", "planning.tokenizers", "planning.likeness", "planning.copies",
    "planning.dispositions.entries", "planning.dispositions.files", "planning.outputs.pickled",
    "planning.outputs.folder", "planning.outputs.tree_builder", "planning.outputs.tree_edits",
    "checkpoints.tokens", "checkpoints.vocabularies", "checkpoints.heads", "checkpoints.config_differences",
    "checkpoints.conversions", "checkpoints.metrics", "checkpoints.numbers", "checkpoints.steps", "checkpoints.in_memory",
    "checkpoints.profiles", "pickles.unpickle", "pickles.repickle", "pickles.arrays", "pickles.copies",
    "formats.archive", "formats.plain_pickle", "formats.torch_zip", "formats.torch_legacy", "formats.folder",
    "formats.distributed", "formats.file_names", "formats.shards",
    "kernels.spectral", "kernels.kth_largest", "kernels.random", "kernels.reductions",
    "methods.spectral", "methods.task_arithmetic", "methods.spherical",
    "sources.merged", "sources.strided", "sources.deflated", "sources.rows", "sources.joined", "sources.drawn",
    "recipe.stages", "running.spooling", "running.turning", "running.sweeping", "running.executors.processes",
)  # fmt: skip
"""What a merge of two files of safetensors by ``linear`` does without. The branch that leads to it imports it."""


@pytest.mark.parametrize("command", ["--help", "inspect a.safetensors", "plan a.safetensors b.safetensors", "merge"])
def test_a_command_imports_only_what_it_needs(command: str, tmp_path: Path) -> None:
    """Imports are most of the time of a short command: 74 modules of features took a fifth of it.

    psutil took as much as ten of ours. It is needed where the system does not tell a process its memory.
    """
    for name in ("a", "b"):
        save_file({"w": torch.arange(8.0)}, tmp_path / f"{name}.safetensors")
    typed = f"{command} a.safetensors b.safetensors -o out.safetensors" if command == "merge" else command
    code = (
        "import atexit, sys; from streammerge.cli.main import main; ours = ('streammerge.', 'psutil'); "
        "atexit.register(lambda: print('\\n', *sorted(m for m in sys.modules if m.startswith(ours)))); "
        f"sys.argv = ['streammerge', *{typed.split()!r}]; main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    loaded = {name.removeprefix("streammerge.") for name in shown.splitlines()[-1].split()}
    assert "cli.main" in loaded
    assert sys.platform != "linux" or "psutil" not in loaded
    assert not {name for name in loaded if name.startswith(tuple(f"{each}." for each in FEATURES)) or name in FEATURES}
    if command == "--help":
        assert not {name.partition(".")[0] for name in loaded} & {"stores", "formats", "planning", "running", "api"}


CONVERTING = (
    "formats.dcp", "methods.difference", "methods.spectral", "planning.copies", "planning.dispositions.entries",
    "planning.outputs.tree_edits", "quantised", "recipe.stages", "running.relatives", "running.sweeping",
    "tensors.matching",
)  # fmt: skip


def test_a_conversion_imports_neither_other_methods_nor_patterns(tmp_path: Path) -> None:
    """Into a ``.pth``, which comes past nearly all formats when it is read back."""
    save_file({"w": torch.arange(8.0)}, tmp_path / "a.safetensors")
    code = (
        "import atexit, sys; from streammerge.cli.main import main; "
        "atexit.register(lambda: print('\\n', *sorted(sys.modules))); "
        "sys.argv = ['streammerge', 'convert', 'a.safetensors', '-o', 'a.pth']; main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    loaded = {name.removeprefix("streammerge.") for name in shown.splitlines()[-1].split()}
    assert "formats.torch_zip" in loaded
    assert not loaded & {*CONVERTING, "regex", "torch"}


INSPECTING = (
    "adapters", "api", "kernels", "methods", "planning", "plugins", "quantised", "recipe.adapted", "recipe.hub_names",
    "recipe.locations", "recipe.model", "requests", "running", "signatures", "verifying",
    "options.converting", "options.functions", "options.merging", "options.resources", "options.sweeping",
    "options.telling", "options.writing", "formats.registry", "pickles.arrays", "pickles.copies", "pickles.unpickle",
    "sources.deflated", "stores.checksums", "stores.hub_places", "stores.libc", "stores.registry", "stores.remote",
    "stores.repositories", "stores.written_files",
)  # fmt: skip
"""What inspecting safetensors does without: other commands, what makes an output, and what pickles, adapters, the hub,
plug-ins and other stores need."""
OTHERS = ("ctypes", "importlib.util", "pathlib", "shutil", "tempfile", "urllib")
"""Modules of Python that take as long as ten of ours."""


@pytest.mark.parametrize("inspected", ["a.safetensors", "folder"])
def test_inspecting_imports_only_what_headers_need(inspected: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "a.safetensors", tmp_path / "folder" / "model.safetensors"):
        save_file({"w": torch.arange(8.0)}, path)
    (tmp_path / "folder" / "config.json").write_text("{}")
    code = (
        "import atexit, sys; from streammerge.cli.main import main; "
        "atexit.register(lambda: print('\\n', *sorted(sys.modules))); "
        f"sys.argv = ['streammerge', 'inspect', {inspected!r}]; main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    loaded = {name.removeprefix("streammerge.") for name in shown.splitlines()[-1].split()}
    assert "checkpoints.index" in loaded
    assert not {name for name in loaded if name.startswith(tuple(f"{each}." for each in INSPECTING)) or name in INSPECTING}
    assert not loaded & {*OTHERS}
    if inspected != "folder":
        assert not {name for name in loaded if name.startswith("formats.")} - {
            f"formats.{each}" for each in ("base", "detect", "records", "safetensors")
        }


COUNTS = """
import atexit, re, sys
from streammerge.cli.main import main

def tell():
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("streammerge")]
    held = [value for module in ours for value in vars(module).values()]
    classes = {value for value in held if isinstance(value, type) and "__dataclass_fields__" in vars(value)}
    patterns = {value for value in held if isinstance(value, re.Pattern)}
    print("\\n", sum("__eq__" in vars(value) for value in classes), len(patterns))

atexit.register(tell)
sys.argv = ["streammerge", *"merge a.safetensors b.safetensors -o out.safetensors".split()]
main()
"""


def test_a_start_makes_few_classes_that_are_compared_and_few_patterns(tmp_path: Path) -> None:
    """A dataclass with an equality takes 0.6 ms of every start, as long as three without one or five named tuples. So a
    class whose objects nobody compares says ``eq=False``, or is a ``NamedTuple``. A pattern takes 0.1 to 0.6 ms. So one
    that a plain merge does not use is kept as text, which ``re`` compiles at its first use and remembers."""
    for name in ("a", "b"):
        save_file({"w": torch.arange(8.0)}, tmp_path / f"{name}.safetensors")
    shown = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    compared, patterns = map(int, shown.splitlines()[-1].split())
    assert compared <= 44
    assert patterns <= 20
