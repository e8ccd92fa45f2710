"""The six laws of DESIGN.md, each shown once on real files. Each docstring names the thorough tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, assert_same, interrupt, load_safetensors, mean, trained, voice, when_kept
from safetensors.torch import save_file

import hostile as h
import streammerge as sm
from streammerge.planning import tasks
from streammerge.stores import journal
from streammerge.tensors.spec import GRAIN


def large(folder: Path, megabytes: int) -> list[Path]:
    """Writes two checkpoints of this size: one large tensor, and some small ones."""
    paths = [folder / f"{megabytes}-{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        tensors = {f"w{i}": torch.full((1000,), float(number + i)) for i in range(20)}
        save_file(tensors | {"large": torch.full((megabytes, 1_000_000 // 4), 0.1 + number)}, path)
    return paths


def test_law_1_memory_is_bounded(tmp_path: Path, cli: Cli) -> None:
    """Four times larger files, the same peak. Thorough: test_memory.py, and by the kernel test_limits.py."""
    peaks = []
    for megabytes in (50, 200):
        files = (*large(tmp_path, megabytes), "-o", f"{megabytes}.out.safetensors")
        done = cli("merge", *files, "--memory", "96MiB", "--format", "json", fresh=True)
        result = json.loads(done.stdout)
        assert result["peak_bytes"] <= result["memory_bytes"] == 96 << 20
        peaks.append(result["peak_bytes"])
    assert peaks[1] < peaks[0] + (16 << 20), "of 300 MB more in the inputs"


def test_law_2_the_output_is_a_function_of_recipe_and_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budget, workers, reading and interruption do not change the bytes. Thorough: test_merge.py,
    running/test_session.py, methods/."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.001)
    inputs = []
    for seed in (1, 2, 3):
        inputs.append(tmp_path / f"{seed}.pth")
        torch.save(voice(seed, seed, seed, 1.0), inputs[-1])
    way: dict[str, Any] = {"method": "dare_ties", "base": inputs.pop(), "parameters": {"density": 0.5}, "integers": "max"}
    sm.merge(inputs, tmp_path / "out.pth", **way)
    expected = (tmp_path / "out.pth").read_bytes()
    for number, how in enumerate(({"workers": 1}, {"workers": 5}, {"memory": "32MiB"}, {"io": "pread"}, {"polite": True})):
        sm.merge(inputs, tmp_path / f"how-{number}.pth", **way, **how)
        assert (tmp_path / f"how-{number}.pth").read_bytes() == expected, how

    stop = when_kept(tmp_path / "again.pth", 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        sm.merge(inputs, tmp_path / "again.pth", **way, workers=1, listener=stop)
    result = sm.merge(inputs, tmp_path / "again.pth", **way)
    assert any("continued an interrupted run" in note for note in result.notes)
    assert (tmp_path / "again.pth").read_bytes() == expected


def test_law_3_nothing_in_an_input_is_executed(tmp_path: Path, cli: Cli) -> None:
    """A pickle that would make a file. Thorough: formats/test_hostile.py, formats/test_corpus.py, test_fuzz.py."""
    canary = tmp_path / "canary"
    path, arguments = h.payloads(canary)["os.system"]
    data = h.stream(h.Raw(h.WAYS["reduce"](path, arguments)))
    (tmp_path / "evil.pth").write_bytes(h.zip_bytes(data))
    (tmp_path / "proof.pkl").write_bytes(data)
    for command in (
        ("inspect", "evil.pth"),
        ("convert", "evil.pth", "-o", "out.safetensors"),
        ("merge", "evil.pth", "-o", "out.pth"),
    ):
        command_line = [sys.executable, "-m", "streammerge", *command]
        done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
    assert not canary.exists()
    subprocess.run([sys.executable, "-c", "import pickle; pickle.load(open('proof.pkl', 'rb'))"], cwd=tmp_path, check=False)
    assert canary.exists(), "the payload is sharp"


def test_law_4_the_output_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Killed at some moments. Thorough: stores/test_crashes.py, and crashes.py at every call."""
    inputs = large(tmp_path, 100)
    before = [path.read_bytes() for path in inputs]
    out = tmp_path / "out.safetensors"
    sm.merge(inputs, out)
    expected = out.read_bytes()
    out.unlink()
    command = [sys.executable, "-m", "streammerge", "merge", *map(str, inputs), "-o", str(out), "--no-progress"]
    for seconds in (1.5, 2.5, 2.8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() or out.read_bytes() == expected
        if out.exists():
            break
    subprocess.run([*command, "--overwrite"], check=True, capture_output=True)
    assert out.read_bytes() == expected
    assert [path.read_bytes() for path in inputs] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(path.name for path in inputs), out.name])


def read_so_far() -> int:
    """Returns bytes that this process has read from files, and mapped pages that it has read from the disk."""
    said = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(said["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not tell what was read")
@pytest.mark.parametrize(
    ("changed", "how", "error"),
    [
        ({"extra": torch.ones(2)}, {}, sm.MismatchError),
        ({"layer.weight": torch.ones(2, 2)}, {}, sm.MismatchError),
        ({}, {"memory": "1MiB"}, sm.BudgetError),
        ({}, {"method": "ties"}, sm.RecipeError),
        ({}, {"dtype": "int8"}, sm.RecipeError),
    ],
    ids=["names", "shapes", "memory", "base", "dtype"],
)
def test_law_5_what_headers_can_tell_is_told_first(
    tmp_path: Path, changed: dict[str, torch.Tensor], how: dict[str, Any], error: type[Exception]
) -> None:
    """Errors come before a byte of a tensor is read or written. Thorough: recipe/test_rules.py, test_limits.py."""
    floats = {name: tensor for name, tensor in trained(1).items() if tensor.is_floating_point()} | {
        "large": torch.ones(1 << 22)
    }
    inputs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file(floats, inputs[0])
    save_file(floats | changed, inputs[1])
    with pytest.raises(error):  # a first run imports all modules
        sm.merge(inputs, tmp_path / "out.safetensors", io="pread", **how)
    before = read_so_far()
    with pytest.raises(error):
        sm.merge(inputs, tmp_path / "out.safetensors", io="pread", **how)
    assert read_so_far() - before < 1 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_law_6_the_result_loads_wherever_the_inputs_loaded(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    """Same container, names, dtypes, side files. Thorough: planning/outputs/test_pickled.py, test_convert.py,
    formats/test_folder.py."""
    sm.merge(voices, tmp_path / "voice.pth", weights=[0.6, 0.4], integers="max")
    one, two = (torch.load(path, weights_only=True) for path in voices)
    for options in ({}, {"mmap": True}):
        made = torch.load(tmp_path / "voice.pth", weights_only=True, **options)
        assert list(made) == [key for key in one if key not in ("optimizer", "scheduler", "scaler")]
        assert list(made["model"]) == list(one["model"])
        assert made["config"] == one["config"]
        for name, tensor in made["model"].items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, mean([one["model"][name], two["model"][name]], [0.6, 0.4]))
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        save_file(dict(trained(seed)), tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "tokenizer.json").write_text("{}")
    sm.merge([tmp_path / "a", tmp_path / "a"], tmp_path / "merged")
    assert_same(load_safetensors(tmp_path / "merged" / "model.safetensors"), dict(trained(1)))
    assert {"config.json", "tokenizer.json"} <= set(os.listdir(tmp_path / "merged"))
