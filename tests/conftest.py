"""Real files for the tests, and an oracle that shares no code with the package."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open

for room in ("methods", "formats", "running.executors"):  # makes their assertions show values too
    pytest.register_assert_rewrite(f"{room}.suite")
torch.set_num_threads(1)  # the tests already run in parallel


def octets(tensor: torch.Tensor) -> bytes:
    """Returns a tensor's bytes in C order, so that comparisons distinguish NaN and -0.0."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts the same names, shapes, dtypes and bits."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        assert octets(actual[name]) == octets(tensor), name


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
            run_command(words, folder, out.fileno(), err.fileno())
        deadline = time.monotonic() + CLI_SECONDS
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        shown = [stream.seek(0) or stream.read().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(ended[1]), *shown)


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
