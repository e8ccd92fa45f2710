"""Saved plans from end to end: the same bytes as one machine makes, in any shares; which share a machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import deflate, trained, voice, wait_until
from safetensors.torch import save_file

import streammerge as sm
from adapters.arithmetic import adapter_of, drawn
from formats import dcp_maker
from quantised.samples import fp8_model
from streammerge.options.resources import Sharing
from streammerge.planning import saved, tasks, units
from streammerge.planning.units import Unit
from streammerge.requests.machines import chosen
from streammerge.tensors.spec import GRAIN, PIECE_ELEMS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    monkeypatch.setattr(units, "_LEAST_COST", 20_000)


def content(place: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(place)): f.read_bytes()
        for f in sorted(place.rglob("*") if place.is_dir() else [place])
        if f.is_file()
    }


class Files(dict[str, list[Path]]):
    """Inputs of several kinds, three of each. They are written when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, kind: str) -> list[Path]:
        self[kind] = [self._write(kind, seed) for seed in (1, 2, 3)]
        return self[kind]

    def _write(self, kind: str, seed: int) -> Path:
        tensors = {name: tensor for name, tensor in trained(seed).items() if tensor.is_floating_point()}
        tensors["wide.weight"] = torch.randn(70, 300, generator=torch.Generator().manual_seed(seed))
        path = self._folder / f"{kind}{seed}"
        match kind:
            case "safetensors":
                path = self._folder / f"{seed}.safetensors"
                save_file(tensors, path)
            case "pth":
                path = self._folder / f"{seed}.pth"
                torch.save(voice(seed, seed, 1, 1.0), path)
            case "deflated":
                path = deflate(self["pth"][seed - 1], self._folder / f"deflated{seed}.pth")
            case "folder":
                path.mkdir()
                save_file(tensors, path / "model.safetensors", {"format": "pt"})
                (path / "config.json").write_text("{}")
            case "dcp":
                dcp_maker.write(path, tensors, dcp_maker.sharded(0, 3), ranks=3)
            case "fp8":
                fp8_model(path, seed)
            case "adapter":
                factors = {"wide.lora_A.weight": drawn(seed, 4, 300), "wide.lora_B.weight": drawn(seed + 10, 70, 4)}
                adapter_of(factors, str(path), {"r": 4, "lora_alpha": 8, "target_modules": ["wide"]})
                path = Path(f"{self['folder'][seed - 1]}+{path}")
        return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path)
    assert made["safetensors"]  # tests call these by their names
    return made


WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("safetensors", "out.safetensors", {}),
    ("safetensors", "out.safetensors", {"method": "ties", "parameters": {"density": 0.5}, "base": 2}),
    ("safetensors", "out.safetensors", {"method": "dare_linear", "parameters": {"density": 0.5}, "base": 2, "seed": 4}),
    ("safetensors", "out.safetensors", {"method": "tsv", "base": 2}),
    ("safetensors", "out.safetensors", {"method": "iso_c", "base": 2}),
    ("safetensors", "out.safetensors", {"method": "slerp", "parameters": {"t": 0.25}, "hash": True}),
    ("pth", "out.pth", {"weights": [0.25, 0.75]}),
    ("deflated", "out.pth", {}),
    ("folder", "out/", {"max_shard_size": "100KB", "dtype": "bfloat16"}),
    ("pth", "out.safetensors", {}),
    ("dcp", "out/", {"weights": [0.25, 0.75]}),
    ("fp8", "out/", {"quantise": "like-base"}),
    ("adapter", "out/", {"method": "ties", "parameters": {"density": 0.5}, "base": 2}),
]


@pytest.mark.parametrize(
    ("kind", "out", "way"), WAYS, ids=[f"{kind}-{way.get('method', 'linear')}" for kind, _, way in WAYS]
)
@pytest.mark.sampled(2)
def test_shares_make_the_bytes_of_a_merge(tmp_path: Path, files: Files, kind: str, out: str, way: dict[str, Any]) -> None:
    given = dict(way)
    if "base" in given:
        given["base"] = files[kind][2]
    (tmp_path / "whole").mkdir()
    sm.merge(files[kind][:2], f"{tmp_path}/whole/{out}", **given)
    expected = content(tmp_path / "whole" / out)
    for shares in (1, 2, 7) if way == {} else (3,):
        place = tmp_path / f"{shares}"
        place.mkdir()
        plan = place / "plan"
        sm.plan(files[kind][:2], f"{place}/{out}", save=plan, **given)
        results = [sm.worker(plan, share=f"{n}/{shares}", workers=1 + n % 2) for n in range(shares)]
        assert results[-1].left == 0
        assert all(each.made == each.share for each in results)
        assert [each.name for each in place.iterdir() if each.name[0] != "."] == ["plan"], "nothing is visible"
        sm.finish(plan)
        assert content(place / out) == expected, shares
        assert sorted(each.name for each in place.iterdir()) == sorted([out.rstrip("/"), "plan"])


def test_receipts_are_small(tmp_path: Path, files: Files) -> None:
    for seed in (1, 2):
        save_file({f"t.{n}": torch.full((3,), float(seed)) for n in range(1000)}, tmp_path / f"many{seed}.safetensors")
    sm.plan(
        [tmp_path / "many1.safetensors", tmp_path / "many2.safetensors"], tmp_path / "out.safetensors", save=tmp_path / "p"
    )
    sm.worker(tmp_path / "p", claim=True)
    sizes = [path.stat().st_size for path in tmp_path.glob(".*.machines/units/*")]
    assert len(sizes) > 8
    assert max(sizes) < 1000


def test_a_plan_is_followed_from_another_folder_and_in_processes(
    tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sm.merge(["1.safetensors", "2.safetensors"], "whole.safetensors")
    sm.plan(["1.safetensors", "2.safetensors"], "out.safetensors", save="plan")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert sm.worker("../plan", claim=True, executor="processes", workers=2).left == 0
    sm.finish("../plan")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_relative_names_of_folders(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files["folder"]
    monkeypatch.chdir(tmp_path)
    sm.merge(["folder1/", "folder2"], "whole/")
    sm.plan(["folder1/", "folder2"], "out/", save="plan")
    monkeypatch.chdir("/")
    for number in (1, 2):
        sm.worker(tmp_path / "plan", share=f"{number}/2")
    sm.finish(tmp_path / "plan")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sm.ChangedError, match=r"folder1/config\.json changed"):
        (tmp_path / "folder1" / "config.json").write_text('{"new": 1}')
        sm.worker("plan", claim=True)


def test_the_same_plan_may_be_saved_again_and_no_other(tmp_path: Path, files: Files) -> None:
    plan = tmp_path / "plan"
    sm.plan(files["safetensors"][:2], tmp_path / "out.safetensors", save=plan)
    before = plan.read_bytes()
    sm.plan(files["safetensors"][:2], tmp_path / "out.safetensors", save=plan, memory="1GiB")
    assert plan.read_bytes() == before
    with pytest.raises(sm.RecipeError, match="plan exists already; choose another name"):
        sm.plan(files["safetensors"][1:], tmp_path / "out.safetensors", save=plan)
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(sm.FormatError, match="is no saved plan"):
        sm.plan(files["safetensors"][:2], tmp_path / "out.safetensors", save=other)
    assert other.read_text() == "mine"
    with pytest.raises(sm.RecipeError, match="converts nothing first"):
        sm.plan(files["safetensors"][:2], tmp_path / "o.safetensors", save=tmp_path / "p", convert_first=tmp_path / "c")


UNITS = [Unit(n, n, n + 1, 10) for n in range(100)]


def numbers(environment: dict[str, str], **asked: Any) -> list[int]:
    return [unit.number for unit in chosen(UNITS, Sharing(**asked), environment)]


def test_which_share() -> None:
    first = list(range(25))
    assert numbers({}, share="0/4") == numbers({}, share="4/4") == first, "shares count from 0 or from 1"
    assert sorted(n for i in (1, 2, 3, 4) for n in numbers({}, share=f"{i}/4")) == list(range(100))
    slurm = {
        "SLURM_ARRAY_TASK_ID": "6",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_TASK_MIN": "2",
        "SLURM_ARRAY_TASK_STEP": "4",
    }
    assert numbers(slurm) == list(range(25, 50))
    assert numbers({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}) == list(range(75, 100))
    assert numbers({"JOB_COMPLETION_INDEX": "2"}, share="4") == list(range(50, 75))
    assert numbers(slurm, share="1/100") == [1], "what is asked for counts"
    assert sorted(numbers({}, claim=True)) == list(range(100))


@pytest.mark.parametrize(
    ("environment", "asked", "said"),
    [
        ({}, {}, "a share of the units, like `share=\"1/8\"`"),
        ({}, {"share": "5/4"}, "takes I/N, like 1/8, not 5/4"),
        ({}, {"share": "-1/4"}, "takes I/N, like 1/8, not -1/4"),
        ({}, {"share": "1/0"}, "takes I/N, like 1/8, not 1/0"),
        ({}, {"share": "half"}, "needs SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX"),
        ({"JOB_COMPLETION_INDEX": "1"}, {"share": "half"}, "takes I/N, like 1/8, not half"),
        ({"JOB_COMPLETION_INDEX": "1"}, {}, "there is no SLURM_ARRAY_TASK_COUNT"),
        ({}, {"share": "1/2", "claim": True}, "give one of them"),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": "2"}, {}, "no even steps"),
    ],
)  # fmt: skip
def test_what_is_no_share(environment: dict[str, str], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(sm.RecipeError, match=said):
        numbers(environment, **asked)


@pytest.mark.slow
def test_an_array_of_slurm(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are processes with Slurm's variables, which run at the same time."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", PIECE_ELEMS)
    sm.merge(files["safetensors"][:2], tmp_path / "whole.safetensors")
    sm.plan(files["safetensors"][:2], tmp_path / "out.safetensors", save=tmp_path / "plan")
    command = [sys.executable, "-m", "streammerge", "worker", str(tmp_path / "plan"), "-q"]
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "1"}
    running = [subprocess.Popen(command, env={**os.environ, **array, "SLURM_ARRAY_TASK_ID": f"{n}"}) for n in (1, 2, 3)]
    assert [each.wait(100) for each in running] == [0, 0, 0]
    sm.finish(tmp_path / "plan")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


EXAMPLES = Path(__file__).parents[2] / "examples"


def run_command(folder: Path) -> dict[str, str]:
    """Returns an environment in which ``streammerge`` and ``srun`` are commands."""
    (folder / "bin").mkdir()
    for name, text in (("streammerge", f'exec {sys.executable} -m streammerge "$@"'), ("srun", 'exec "$@"')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def test_the_examples_of_slurm_and_kubernetes(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as Slurm runs it, and the command of the job as Kubernetes runs it; one task of three is the other's."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", PIECE_ELEMS)
    sm.merge(files["safetensors"][:2], tmp_path / "whole.safetensors")
    plan = tmp_path / "plan"
    sm.plan(files["safetensors"][:2], tmp_path / "out.safetensors", save=plan)
    environment = run_command(tmp_path)
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "2"}
    subprocess.run(["bash", EXAMPLES / "slurm.sh", plan], env=environment | array, check=True, capture_output=True)
    job = yaml.safe_load((EXAMPLES / "kubernetes-job.yml").read_text())["spec"]
    assert job["completionMode"] == "Indexed"
    command = job["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--share") + 1] == str(job["completions"])
    command = [str(plan) if word.endswith(".plan") else word for word in command]
    command[command.index("--share") + 1] = "2"
    subprocess.run(command, env=environment | {"JOB_COMPLETION_INDEX": "1"}, check=True, capture_output=True)
    sm.finish(plan)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_two_hosts_that_share_a_folder(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host has its own process ids. One is killed with all its processes, and the other takes over."""
    space = ["unshare", "-p", "-f", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make namespaces of process ids")
    monkeypatch.setattr(tasks, "PIECE_ELEMS", PIECE_ELEMS)
    monkeypatch.setattr(saved, "LEASE_SECONDS", 1.0)
    sm.merge(files["safetensors"][:2], tmp_path / "whole.safetensors")
    plan, told = tmp_path / "plan", tmp_path / "told"
    told.mkdir()
    sm.plan(files["safetensors"][:2], tmp_path / "out.safetensors", save=plan)
    machine = Path(__file__).parents[1] / "running" / "machine.py"
    first = subprocess.Popen([*space, sys.executable, str(machine), str(plan), str(told), "0.5", "claim=true", "workers=1"])
    wait_until(lambda: list(told.glob("piece *")))
    first.kill()
    first.wait()
    command = [*space, sys.executable, "-m", "streammerge"]
    began = time.monotonic()
    subprocess.run([*command, "worker", str(plan), "--claim", "-q"], check=True)
    assert time.monotonic() - began > 1.0, "no process id of the other host is asked for; its lease ends"
    subprocess.run([*command, "finish", str(plan), "-q"], check=True)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
