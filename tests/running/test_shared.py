"""Units that several machines make: machines that die or stop, what is never written."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until
from safetensors.torch import save_file

import streammerge as sm
from streammerge.events import Suspended, TaskDone
from streammerge.planning import saved, tasks, units
from streammerge.running import shared
from streammerge.stores import claims
from streammerge.tensors.spec import GRAIN

MACHINE = Path(__file__).with_name("machine.py")
LEASE_SECONDS = 1.0
DEATHS = 50


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units and pieces, and a short lease, also for plans that other processes follow."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    monkeypatch.setattr(units, "_LEAST_COST", 300_000)
    monkeypatch.setattr(saved, "LEASE_SECONDS", LEASE_SECONDS)


Models = Callable[..., list[Path]]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = []
    for seed in (1, 2, 3):
        make = torch.Generator().manual_seed(seed)
        made = {f"layers.{n}.w": torch.randn(90, 301, generator=make) for n in range(24)}
        made |= {f"layers.{n}.b": torch.randn(301, generator=make).bfloat16() for n in range(24)}
        made |= {"embed": torch.randn(3, GRAIN, generator=make), "empty": torch.ones(0, 3), "scalar": torch.tensor(2.0)}
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(made, paths[-1])
    return paths


def machine(plan: Path, folder: Path, seconds: float, **options: Any) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    words = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    return subprocess.Popen(
        [sys.executable, str(MACHINE), str(plan), str(folder), str(seconds), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def receipts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(f".*.machines/{claims.UNITS}/[0-9]*"))


@pytest.mark.usefixtures("small")
def test_a_killed_machine_costs_the_units_it_was_making(tmp_path: Path, models: list[Path]) -> None:
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    expected = sm.merge(models[:2], tmp_path / "whole.safetensors").out
    count = len(sm.plan(models[:2], out, save=plan).tasks)
    first = machine(plan, tmp_path / "told", 0.05, claim=True, workers=1)
    wait_until(lambda: len(receipts(tmp_path)) >= 3)
    first.kill()
    first.communicate()
    there = receipts(tmp_path)
    with pytest.raises(sm.UnfinishedError, match="units have no receipt yet"):
        sm.finish(plan)
    began = time.monotonic()
    result = sm.worker(plan, claim=True)
    assert time.monotonic() - began < 20
    assert result.left == 0
    assert result.made == result.share - len(there), "what has a receipt is not made again"
    assert count > 20
    sm.finish(plan)
    assert out.read_bytes() == Path(str(expected)).read_bytes()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.usefixtures("small")
def test_a_stopped_machine_writes_nothing_after_the_others_have_finished(tmp_path: Path, models: list[Path]) -> None:
    """It goes on when the output is there and the inputs are others."""
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    expected = Path(str(sm.merge(models[:2], tmp_path / "whole.safetensors").out)).read_bytes()
    sm.plan(models[:2], out, save=plan)
    told = tmp_path / "told"
    first = machine(plan, told, 0.02, claim=True, workers=1)
    wait_until(lambda: len(list(told.glob("piece *"))) >= 2)
    first.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        result = sm.worker(plan, claim=True)
        assert result.left == 0
        assert time.monotonic() - began < 30 * LEASE_SECONDS
        sm.finish(plan)
        assert out.read_bytes() == expected
        for path in models:
            with path.open("r+b") as file:
                file.seek(20_000)
                file.write(b"\xff" * 3_000_000)
    finally:
        first.send_signal(signal.SIGCONT)
    said = first.communicate(timeout=60)
    assert out.read_bytes() == expected, said
    assert "Traceback" not in said[1] or "Error" in said[1]


@pytest.mark.usefixtures("small")
def test_a_machine_that_has_lost_its_lease_leaves_a_finished_output_alone(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are those that were published, and its home is gone, so it would find nothing finished."""
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    expected = Path(str(sm.merge(models[:2], tmp_path / "whole.safetensors").out)).read_bytes()
    sm.plan(models[:2], out, save=plan)
    finished, lost = shared.Share._finished, list[bool]()

    def others_go_on(self: shared.Share, *more: Any) -> None:
        finished(self, *more)
        if not lost:
            lost.append(True)
            more[2].claims.fence.move(0.0)
            assert machine(plan, tmp_path / "told", 0.0, claim=True).wait(60) == 0
            sm.finish(plan)
            for path in models:
                with path.open("r+b") as file:
                    file.seek(20_000)
                    file.write(b"\xff" * 3_000_000)

    monkeypatch.setattr(shared.Share, "_finished", others_go_on)
    result = sm.worker(plan, claim=True, workers=1)
    assert (result.finished, result.left) == (True, 0)
    assert out.read_bytes() == expected


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_machine_that_was_stopped_for_a_moment_claims_again(tmp_path: Path, models: list[Path]) -> None:
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    expected = Path(str(sm.merge(models[:2], tmp_path / "whole.safetensors").out)).read_bytes()
    sm.plan(models[:2], out, save=plan)
    told = tmp_path / "told"
    first = machine(plan, told, 0.01, claim=True, workers=1)
    wait_until(lambda: len(list(told.glob("piece *"))) >= 2)
    first.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * LEASE_SECONDS)
    first.send_signal(signal.SIGCONT)
    said = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert " 0 left in all" in said[0]
    sm.finish(plan)
    assert out.read_bytes() == expected


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_machines_that_claim_at_once_make_each_unit_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unit is one piece, and is claimed when a worker is free for it. No machine begins before all have one."""
    models = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for seed, path in enumerate(models):
        make = torch.Generator().manual_seed(seed)
        save_file({f"layers.{n}.w": torch.randn(2 * GRAIN, generator=make) for n in range(16)}, path)
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    expected = Path(str(sm.merge(models, tmp_path / "whole.safetensors").out)).read_bytes()
    monkeypatch.setattr(saved, "LEASE_SECONDS", 60.0)  # no machine is taken for dead because this computer is busy
    sm.plan(models, out, save=plan)
    monkeypatch.setenv("MACHINES", "3")
    several = [machine(plan, tmp_path / "told", 0.0, claim=True, workers=2, executor="threads") for _ in range(3)]
    said = [each.communicate(timeout=400) for each in several]
    assert all(each.returncode == 0 for each in several), said
    made = [int(text.split(": ")[1].split()[0]) for text, _ in said]
    assert sum(made) == len(receipts(tmp_path)) == 32, "no unit is made twice"
    assert min(made) > 0, "they share the work"
    sm.finish(plan)
    assert out.read_bytes() == expected


@pytest.mark.usefixtures("small")
def test_an_interrupted_machine_keeps_what_it_has_made(tmp_path: Path, models: list[Path]) -> None:
    plan, told = tmp_path / "plan", list[Any]()
    sm.plan(models[:2], tmp_path / "out.safetensors", save=plan)

    def listen(event: object) -> None:
        told.append(event)
        if sum(isinstance(each, TaskDone) for each in told) == 30 and not isinstance(event, Suspended):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.worker(plan, claim=True, workers=1, listener=listen)
    assert 0 < told[-1].kept_bytes < told[-1].write_bytes
    there = receipts(tmp_path)
    result = sm.worker(plan, claim=True)
    assert result.made == result.share - len(there) > 0
    sm.finish(plan)
    sm.merge(models[:2], tmp_path / "whole.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.usefixtures("small")
def test_nan_stops_a_machine_and_leaves_no_output(tmp_path: Path, models: list[Path]) -> None:
    save_file({"w": torch.full((400, 400), float("nan")), "v": torch.ones(3)}, tmp_path / "nan.safetensors")
    save_file({"w": torch.ones(400, 400), "v": torch.ones(3)}, tmp_path / "one.safetensors")
    plan, pair = tmp_path / "plan", [tmp_path / "nan.safetensors", tmp_path / "one.safetensors"]
    sm.plan(pair, tmp_path / "out.safetensors", save=plan)
    with pytest.raises(sm.VerifyError, match=r"NaN or infinite values.*allow_nonfinite=True.*: w: \d+ in .*nan"):
        sm.worker(plan, claim=True)
    with pytest.raises(sm.UnfinishedError):
        sm.finish(plan)
    assert not (tmp_path / "out.safetensors").exists()
    again = tmp_path / "allowed"
    sm.plan(pair, tmp_path / "out.safetensors", save=again, allow_nonfinite=True)
    assert sm.worker(again, share="1/1").left == 0
    expected = sm.merge(pair, tmp_path / "whole.safetensors", allow_nonfinite=True)
    assert [each for each in sm.finish(again).warnings if "NaN" in each] == [
        each for each in expected.warnings if "NaN" in each
    ]
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_nan_in_an_adapter_is_said_of_the_adapter(tmp_path: Path) -> None:
    save_file({"q.weight": torch.ones(8, 6), "k.weight": torch.ones(8, 6)}, tmp_path / "base.safetensors")
    lora = {"q.lora_up.weight": torch.ones(8, 4), "q.lora_down.weight": torch.ones(4, 6)}
    lora["q.lora_down.weight"][1, 2] = torch.nan
    save_file(lora, tmp_path / "style.safetensors")
    models = [f"{tmp_path}/base.safetensors+{tmp_path}/style.safetensors", tmp_path / "base.safetensors"]
    sm.plan(models, tmp_path / "out.safetensors", save=tmp_path / "plan")
    with pytest.raises(sm.VerifyError, match=r"q\.weight: 8 in .*\(q\.lora_down\.weight of .*style\.safetensors\)"):
        sm.worker(tmp_path / "plan", claim=True)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_an_input_that_changes_gives_no_receipt(tmp_path: Path, models: list[Path]) -> None:
    plan = tmp_path / "plan"
    sm.plan(models[:2], tmp_path / "out.safetensors", save=plan)
    first = machine(plan, tmp_path / "told", 0.05, claim=True, workers=1)
    wait_until(lambda: receipts(tmp_path))
    with models[1].open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"1234")
    said = first.communicate(timeout=60)[1]
    assert first.returncode != 0
    assert "ChangedError" in said
    with pytest.raises(sm.ChangedError, match=r"2\.safetensors changed; save a new one"):
        sm.finish(plan)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_many_deaths(tmp_path: Path, models: list[Path], method: str) -> None:
    """Machines are killed at random moments. Nothing is visible before the end, and the end has the right bytes."""
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    way: dict[str, Any] = {} if method == "linear" else {"method": method, "base": models[2]}
    expected = Path(str(sm.merge(models[:2], tmp_path / "whole.safetensors", **way).out)).read_bytes()
    draw = random.Random(method)
    for death in range(DEATHS // 2):
        plan.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        sm.plan(models[:2], out, save=plan, **way)
        told = tmp_path / f"told{death}"
        first = machine(plan, told, 0.01, claim=True, workers=2, executor=draw.choice(["threads", "processes"]))
        count = draw.randrange(30)
        wait_until(
            lambda told=told, count=count, first=first: len(list(told.glob("piece *"))) >= count or first.poll() is not None
        )  # type: ignore[misc]
        time.sleep(draw.random() * 0.05)
        first.kill()
        first.communicate()
        assert not out.exists()
        there = receipts(tmp_path)
        result = sm.worker(plan, claim=True)
        assert result.made == result.share - len(there)
        sm.finish(plan)
        assert out.read_bytes() == expected
