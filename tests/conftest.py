"""Real files for the tests, and an oracle that shares no code with the package."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open

from loopback_hub import Hub, running
from streammerge.compiled import library
from streammerge.events import TaskDone
from streammerge.formats.registry import FORMATS
from streammerge.methods.contracts import METHODS
from streammerge.running.executors.registry import EXECUTORS

for room in ("methods", "formats", "running.executors", "sources"):  # so that their assertions show the values too
    pytest.register_assert_rewrite(f"{room}.suite")
torch.set_num_threads(1)  # the tests already run in parallel


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the real hub, whatever is installed
_NO_S3 = "the tests of object stores need obstore and moto, which the extra dev has"
_buckets = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on this machine, which keeps objects in memory.

    It is a process of its own, because a folder of these tests has the name of a package that it imports.
    """
    if not all(map(importlib.util.find_spec, ("obstore", "moto", "flask_cors"))):
        pytest.skip(_NO_S3)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket as ``s3://bucket``. The variables of the environment lead to it, for subprocesses too."""
    use_s3(s3_server, monkeypatch)
    name = f"bucket-{os.getpid()}-{next(_buckets)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    return f"s3://{name}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub on this machine, to which the variables of the environment lead, and an empty cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("the tests of the hub need huggingface_hub, which the extra dev has")
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    with running(Hub()) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield made


def use_s3(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the variables of the environment lead to a server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the parametrized tests slow that are beyond the sample of a test marked ``sampled(every, by=...)``.

    One of ``every`` is in the sample, at least one for each value of the parameters that ``by`` names. Which ones they are
    is drawn by their names, so that all processes, and all days, take the same.
    """
    groups: dict[tuple[Any, ...], list[pytest.Item]] = {}
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None and item.get_closest_marker("slow") is None and isinstance(item, pytest.Function):
            values = item.callspec.params if hasattr(item, "callspec") else {}
            same = tuple(str(values[name]) for name in mark.kwargs.get("by", "").split())
            groups.setdefault((item.parent, item.originalname, *mark.args, *same), []).append(item)
    for (_, _, every, *_), group in groups.items():
        group.sort(key=lambda item: zlib.crc32(item.name.encode()))
        for item in group[-(-len(group) // every) :]:
            item.add_marker(pytest.mark.slow)


def first_of_each(values: Iterable[Any], key: Callable[[Any], object]) -> list[Any]:
    """Returns parameters of a test: the first value of each key, a fair sample, and the others marked slow."""
    seen, made = set[object](), []
    for value in values:
        made.append(pytest.param(value, marks=pytest.mark.slow) if key(value) in seen else value)
        seen.add(key(value))
    return made


def octets(tensor: torch.Tensor) -> bytes:
    """Returns a tensor's bytes in C order, so that comparisons distinguish NaN and -0.0."""
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts the same names, shapes, dtypes and bits."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        assert octets(actual[name]) == octets(tensor), name


def deflate(path: Path, target: Path) -> Path:
    """The same archive with compressed records."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file with the safetensors library."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Returns the float64 weighted mean, rounded once to the first tensor's dtype."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    total = sum(w * t.to(wide) for t, w in zip(tensors, weights, strict=True)) / sum(weights)
    return total.to(tensors[0].dtype)


def trained(seed: int, dtype: torch.dtype = torch.float32) -> OrderedDict[str, torch.Tensor]:
    """Returns a state dict like real ones: 0-d, empty and odd sizes, counters, several grains."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    made = OrderedDict(
        {
            "embed.weight": draw(301, 433),
            "layer.weight": draw(17, 31),
            "layer.bias": draw(31),
            "scale": draw(),
            "one": draw(1),
            "empty": draw(0, 4),
            "norm.num_batches_tracked": torch.tensor(100 + seed),
            "position_ids": torch.arange(7),
            "mask": torch.tensor([True, False, True]),
        }
    )
    made._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return made


def voice(seed: int, step: int, epoch: int, loss: float) -> dict[str, Any]:
    """Returns a checkpoint in the form of Coqui's trainer."""
    model = OrderedDict((f"xtts.{name}", value) for name, value in trained(seed).items())
    model._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(model["xtts.layer.weight"].clone())
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "config": {"model": "xtts", "languages": ["en"], "audio": {"sample_rate": 22050}},
        "model": model,
        "optimizer": [optimizer.state_dict()],
        "scheduler": [],
        "scaler": {"scale": 1024.0},
        "step": step,
        "epoch": epoch,
        "date": "November 22, 2026",
        "model_loss": {"train_loss": loss, "eval_loss": None},
    }


@pytest.fixture(autouse=True)
def no_names_of_other_tests() -> Iterator[None]:
    """Methods, formats and executors that a test registers are forgotten after it."""
    before = [(each, dict(each._own), set(each._replacing)) for each in (METHODS, FORMATS, EXECUTORS)]
    yield
    for each, own, replacing in before:
        each._own, each._replacing = own, replacing


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test as where the package was built without a C compiler."""
    monkeypatch.setattr(library, "_loaded", lambda: None)
    monkeypatch.setenv("STREAMMERGE_COMPILED", "0")  # for processes that are started anew


@pytest.fixture(params=["compiled", "uncompiled"])
def compiled_or_not(request: pytest.FixtureRequest) -> bool:
    """Runs a test with compiled functions and without. Skips the first where the package was built without them."""
    if request.param == "uncompiled":
        request.getfixturevalue("uncompiled")
    elif library.library() is None:
        pytest.skip("the package was built without a C compiler")
    return request.param == "compiled"


@pytest.fixture
def voices(tmp_path: Path) -> tuple[Path, Path]:
    """Writes two voice checkpoints: steps 10 and 30, epochs 3 and 2, training losses 2.0 and 1.0."""
    paths = tmp_path / "news.pth", tmp_path / "audiobook.pth"
    torch.save(voice(1, 10, 3, 2.0), paths[0])
    torch.save(voice(2, 30, 2, 1.0), paths[1])
    return paths


Cli = Callable[..., "subprocess.CompletedProcess[str]"]
CLI_SECONDS = 120


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs the command line in its own process, in ``tmp_path``.

    The process is a fork of this one, where torch is already imported. With ``fresh`` it is started as by a user.
    """

    def run(*arguments: object, code: int = 0, fresh: bool = False) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        if fresh:
            command = [sys.executable, "-m", "streammerge", *words]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=CLI_SECONDS)
        else:
            done = forked(words, tmp_path)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


def forked(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a fork of this process; returns its output and exit code."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            hear_signals()
            run_command(words, folder, out.fileno(), err.fileno())
        deadline = time.monotonic() + CLI_SECONDS
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        shown = [stream.seek(0) or stream.read().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(ended[1]), *shown)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until the condition is true. Fails after that time, which is long, since the machine may be busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.005)


def journalled(out: Path) -> int:
    """Returns the number of pieces in the journal beside an output."""
    path = out.parent / f".{out.name}.streammerge" / "journal"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def when_kept(out: Path, at_least: int, act: Callable[[], object]) -> Callable[[object], None]:
    """Returns a listener that acts once, when the journal beside the output has so many pieces.

    The journal is written on a thread of its own, whose syncs may take seconds on a busy disk. So the merge waits at the
    piece from which on there are enough.
    """
    made, acted = journalled(out), False

    def listen(event: object) -> None:
        nonlocal made, acted
        if isinstance(event, TaskDone) and not acted:
            made += 1
            if made >= at_least:
                wait_until(lambda: journalled(out) >= at_least)
                acted = True
                act()

    return listen


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


def hear_signals() -> None:
    """Undoes, in a child, that SIGINT and SIGHUP are ignored. A suite that runs in the background or under nohup ignores
    them, and so would all of its children. Given to subprocess as ``preexec_fn``."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(params=["foreground", "background"])
def job(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test twice: as the suite was started, and with SIGINT and SIGHUP ignored, as in the background."""
    if request.param == "foreground":
        yield request.param
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def run_command(words: list[str], folder: Path, out: int, err: int) -> NoReturn:
    """Runs the command line in a forked process, with its streams in these files, and exits."""
    from streammerge.cli import main as command_line

    status = 70
    try:
        os.chdir(folder)
        for number, target in ((out, 1), (err, 2)):
            os.dup2(number, target)
        sys.stdin = open(os.devnull)  # noqa: SIM115 - open until the process ends
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.argv = ["streammerge", *words]
        command_line.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - printed for the caller
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
