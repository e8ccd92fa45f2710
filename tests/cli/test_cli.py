"""The command line as a user sees it: its output, its streams, and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Cli, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm


def test_merge_reports_in_the_promised_order(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    done = cli("merge", "news.pth", "audiobook.pth", "--weights", "0.6,0.4", "-o", "voice.pth")
    wrote, speed, memory = done.stdout.splitlines()
    assert wrote.startswith("wrote voice.pth (9 tensors, ")
    assert re.fullmatch(r"read [\d.]+ [kM]B, wrote [\d.]+ kB in [\d.]+ s \([\d.]+ [kM]B/s\)", speed)
    assert re.fullmatch(
        r"peak memory [\d.]+ (bytes|[KM]iB) of 512 MiB \(above the \d+ MiB start-up footprint; \d+ MiB resident in all\)",
        memory,
    )
    assert "note: left out of the output: optimizer, scheduler, scaler" in done.stderr


def test_json_is_one_object_on_stdout_and_events_on_stderr(cli: Cli, voices: tuple[Path, Path]) -> None:
    done = cli("merge", *voices, "-o", "voice.pth", "--format", "json")
    result = json.loads(done.stdout)
    assert {"out", "read_bytes", "written_bytes", "seconds", "peak_bytes", "startup_bytes", "notes", "warnings"} <= set(
        result
    )
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert events[0] == "RunStarted"
    assert events[-1] == "RunFinished"
    assert "TaskDone" in events


def test_quiet_says_nothing(cli: Cli, voices: tuple[Path, Path]) -> None:
    done = cli("merge", *voices, "-o", "voice.pth", "--format", "quiet")
    assert (done.stdout, done.stderr) == ("", "")


def test_plan_and_dry_run_write_nothing(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    before = sorted(tmp_path.iterdir())
    shown = cli("plan", *voices, "--weights", "3,1").stdout
    assert "weight 0.75" in shown
    assert "the weights sum to 4" in shown
    assert "merged by linear" in shown
    assert cli("merge", *voices, "-o", "voice.pth", "--dry-run").stdout.startswith("linear -> voice.pth")
    planned = json.loads(cli("plan", *voices, "--memory", "2GiB", "--format", "json").stdout)
    assert planned["memory_bytes"] == 2 << 30
    assert planned["peak_bytes"] < 2 << 30
    assert len(planned["tasks"]) == 9
    assert sorted(tmp_path.iterdir()) == before


def test_inspect_tells_what_is_inside(cli: Cli, voices: tuple[Path, Path]) -> None:
    shown = cli("inspect", "news.pth").stdout
    for text in ("PyTorch zip", "model: 9 tensors", "training   optimizer", "step: 10", "epoch: 3", "nothing was executed"):
        assert text in shown
    table = cli("inspect", "news.pth", "--tensors").stdout
    assert re.search(r"^xtts\.embed\.weight +float32 +301x433 +@\d+", table, re.MULTILINE)
    data = json.loads(cli("inspect", "news.pth", "--format", "json", "--tensors").stdout)
    assert data["executed"] is False
    assert data["data"]["model_loss"] == {"train_loss": 2.0, "eval_loss": None}
    assert data["entries"]["xtts.layer.bias"]["shape"] == [31]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["merge", "absent.pth", "-o", "x.pth"], 2, "absent.pth does not exist"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "1", "-o", "x.pth"], 2, "1 weights for 2 inputs"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "a,b", "-o", "x.pth"], 2, "takes numbers joined by commas"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "1,-1", "-o", "x.pth"], 2, "sum to zero"),
        (["merge", "news.pth", "-o", "x.txt"], 2, "x.txt does not say what to write"),
        (["merge", "news.pth", "-o", "news.pth"], 2, "exists already"),
        (["merge", "news.pth", "-o", "news.pth", "--overwrite"], 4, "is one of the inputs"),
        (["merge", "news.pth", "-o", "nowhere/x.pth"], 2, "does not exist; make it first"),
        (["merge", "news.pth", "-o", "x.pth", "--method", "liner"], 2, "did you mean linear"),
        (["merge", "news.pth", "-o", "x.pth", "--dtype", "bflot16"], 2, "did you mean bfloat16"),
        (["merge", "news.pth", "-o", "x.pth", "--memory", "1MiB"], 5, "pass --memory"),
        (["merge", "news.pth", "-o", "x.pth", "--memory", "lots"], 2, "is not a size"),
        (["merge", "n*.pt", "-o", "x.pth"], 2, "nothing matches"),
        (["merge", "news.pth", "-o", "x.pth", "--last", "3"], 2, "there are only 1"),
        (["merge", "news.pth", "-o", "x.pth", "-p", "density=0.5"], 2, "density"),
        (["merge", "news.pth", "broken.pth", "-o", "x.pth"], 4, "broken.pth is a Git LFS pointer"),
        (["merge", "news.pth", "other.pth", "-o", "x.pth"], 4, "do not have the same tensors"),
        (["inspect", "broken.pth"], 4, "git lfs pull"),
        (["frobnicate"], 2, "no such command 'frobnicate'; see `streammerge --help`"),
        (["merge", "news.pth", "-o", "x.pth", "--wieghts", "1"], 2, "no such option '--wieghts'; did you mean --weights?"),
        (["merge", "newz.pth", "-o", "x.pth"], 2, "newz.pth does not exist; did you mean news.pth?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_sentence_and_its_exit_code(
    cli: Cli, tmp_path: Path, voices: tuple[Path, Path], arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "broken.pth").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pth")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = cli(*arguments, code=code)
    assert said in done.stderr
    assert done.stdout == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    command = [sys.executable, "-m", "streammerge", "inspect", str(tmp_path / "x.pth"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "Traceback" in done.stderr


def test_plan_tells_what_would_stop_a_run(cli: Cli, voices: tuple[Path, Path]) -> None:
    assert "exists already" in cli("plan", *voices, "-o", "news.pth").stdout
    assert "does not exist" in cli("plan", *voices, "-o", "nowhere/voice.pth").stdout
    assert re.search(r"disk +\d+ kB needed", cli("plan", *voices).stdout)


def test_names_from_files_are_escaped(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": {"w\x1b[31m\nred": torch.ones(2)}, "note\x1b[2J": "\x1b]0;title\x07"}, tmp_path / "in.pth")
    torch.save({"model": {"v\x1b[31m": torch.ones(2)}}, tmp_path / "other.pth")
    for done in (
        cli("inspect", "in.pth", "--tensors"),
        cli("plan", "in.pth", "-o", "x.safetensors"),
        cli("merge", "in.pth", "other.pth", "-o", "x.pth", code=4),
    ):
        assert "\x1b" not in done.stdout + done.stderr


def test_options_come_from_the_environment_too(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    environment = os.environ | {"STREAMMERGE_PLAN_MEMORY": "64MiB"}
    command = [sys.executable, "-m", "streammerge", "plan", *map(str, voices)]
    assert "of 64.0 MiB" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_terminal_shows_progress_and_leaves_a_clean_screen(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "streammerge", "merge", *map(str, voices), "-o", str(tmp_path / "voice.pth")]
    subprocess.run(command, stdout=slave, stderr=slave, check=True)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:
        pass
    text = shown.decode()
    assert "memory" in text
    assert "of 512 MiB" in text
    assert "peak memory" in text.splitlines()[-2], "the last sentence takes two lines of 80 columns"


def test_a_signal_that_an_import_swallows_is_not_forgotten() -> None:
    code = """
import os, signal
from streammerge.cli.progress import Progress
from streammerge.cli.signals import Stopped, stoppable
from streammerge.events import RunStarted, Suspended
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
    with Progress("quiet") as progress:
        try:
            progress(RunStarted(1, 1, 1, 1))
        except Stopped as stopped:
            progress(Suspended(1, 2))  # what is told while cleaning up raises no more
            print("stopped", stopped.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("stopped 143\n", "")


def test_a_second_signal_ends_at_once() -> None:
    code = """
import os, signal, sys, time
from streammerge.cli.signals import Stopped, stoppable
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    except Stopped as stopped:
        assert stopped.exit_code == 143
        os.kill(os.getpid(), signal.SIGINT)  # while it cleans up
        time.sleep(20)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "")
    assert time.monotonic() - began < 15


def test_two_runs_on_one_output(tmp_path: Path, cli: Cli, voices: tuple[Path, Path]) -> None:
    from streammerge.stores.commit import Staging

    with_lock = Staging(tmp_path / "voice.pth")
    try:
        done = cli("merge", *voices, "-o", "voice.pth", code=7)
        assert f"process {os.getpid()}" in done.stderr
    finally:
        with_lock.abort()
    cli("merge", *voices, "-o", "voice.pth")


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, cli: Cli, voices: tuple[Path, Path]) -> None:
    left = tmp_path / ".voice.pth.streammerge"
    (left / "output").mkdir(parents=True)
    (left / "output" / "voice.pth").write_bytes(b"half")
    (left / "lock").write_text("4194305\n")
    cli("merge", *voices, "-o", "voice.pth")
    assert not left.exists()
    assert torch.load(tmp_path / "voice.pth")["step"] == 30


def test_help_names_every_option_of_the_interface(cli: Cli) -> None:
    shown = cli("merge", "--help").stdout
    options = "--weights --no-normalize --method --memory --workers --io --dtype --out-dtype --compute-dtype --state-dict"
    options += " --ema --last --max-shard-size --convert-first --overwrite --on-missing --integers --allow-nonfinite"
    options += " --format --debug --no-progress --dry-run --keep-optimizer"
    assert [option for option in options.split() if option not in shown] == []


def test_listeners_hear_what_happens(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    heard: list[object] = []
    result = sm.merge(voices, tmp_path / "voice.pth", listener=heard.append)
    done = [event for event in heard if type(event).__name__ == "TaskDone"]
    assert sum(event.written_bytes for event in done) == sum(t.out.nbytes for t in result.plan.tasks)  # type: ignore[attr-defined]
    assert {event.tensor for event in done} == {f"xtts.{n}" for n, t in trained(1).items() if t.numel()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_harm(tmp_path: Path, closed: str) -> None:
    """No opened file gets a standard stream's number, and no printed text goes into a model."""
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    command = f"{shlex.quote(sys.executable)} -m streammerge merge a.safetensors a.safetensors -o out.safetensors {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=60).returncode == 0
    assert load_safetensors(tmp_path / "out.safetensors")["w"].tolist() == [1, 1, 1]
