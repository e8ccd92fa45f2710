"""Outputs on the hub: the real client against a hub on this machine. The oracle is the same merge into a local folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import use_s3
from safetensors.torch import save

import streammerge as sm
from loopback_hub import TOKEN, Answer, Hub, Request
from stores.hub_models import content, files, written

INPUTS = ["a", "b"]
SHARDS = {f"model-{n:05}-of-00002.safetensors" for n in (1, 2)}


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two local models, a merge of them in ``local``, and a token that may write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for seed, name in enumerate(INPUTS):
        written(tmp_path / name, files(seed))
    sm.merge(INPUTS, "local/")
    return tmp_path


def on_hub(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[name]
    return {path: data for path, data in repo.commits[repo.branches[branch]].items() if path != ".gitattributes"}


def oids(data: dict[str, bytes]) -> set[str]:
    return {hashlib.sha256(data[shard]).hexdigest() for shard in SHARDS}


@pytest.mark.parametrize(
    ("workers", "part_bytes"),
    [(1, 0), (3, 100_000), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((1, 100_000), (3, 0)))],
)
def test_the_hub_gets_the_bytes_of_a_local_merge_in_one_commit(
    hub: Hub, here: Path, part_bytes: int, workers: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.part_bytes = part_bytes
    most = list[int]()

    def before(request: Request) -> Answer:
        made = here / "hf-home" / "streammerge"
        most.append(sum(path.stat().st_blocks * 512 for path in made.rglob("*") if path.suffix == ".safetensors"))
        return None

    hub.before = before
    result = sm.merge(INPUTS, "hf://me/merged-v1.5", workers=workers, executor="threads")
    local = content(here / "local")
    assert sm.plan(INPUTS, "hf://me/other").disk_bytes == max(len(data) for data in local.values())
    assert on_hub(hub, "me/merged-v1.5") == local
    assert hub.repos["me/merged-v1.5"].private
    assert any("it is private until its settings say otherwise" in note for note in result.notes)
    assert hub.repos["me/merged-v1.5"].messages == ["", "Merge by streammerge"]
    if workers == 1:  # others may have a tensor of the next shard in hand
        assert max(most) <= max(len(local[shard]) for shard in SHARDS) + 200_000, "the disk holds one shard at a time"
    assert content(here / "hf-home" / "streammerge") == {}
    assert not caplog.records
    assert capfd.readouterr() == ("", ""), "the client prints nothing"
    assert sm.verify("hf://me/merged-v1.5", sample=0).files


def test_a_branch_and_a_folder_are_written(hub: Hub, here: Path) -> None:
    hub.add("me/there", {"keep.txt": b"kept"})
    sm.merge(INPUTS, "hf://me/there@try/sub")
    assert on_hub(hub, "me/there") == {"keep.txt": b"kept"}
    local = content(here / "local")
    assert on_hub(hub, "me/there", "try") == {"keep.txt": b"kept"} | {f"sub/{path}": data for path, data in local.items()}
    assert len(sm.inspect("hf://me/there@try/sub")) == 5


def test_what_is_there_is_replaced_only_when_asked(hub: Hub, here: Path) -> None:
    card = {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"mit", ".gitattributes": b""}
    hub.add("me/card", card)
    sm.merge(INPUTS, "hf://me/card")
    assert on_hub(hub, "me/card") == {"LICENSE": b"mit"} | content(here / "local"), "an empty repository has a card"
    before = dict(hub.repos["me/card"].commits)
    with pytest.raises(sm.RecipeError, match=r"hf://me/card exists already; pass `overwrite=True`"):
        sm.merge(INPUTS, "hf://me/card")
    assert any("exists already" in warning for warning in sm.plan(INPUTS, "hf://me/card").warnings)
    hub.add("me/card", on_hub(hub, "me/card") | {"old.safetensors": b"x", "mine.py": b"1"})
    sm.merge(INPUTS, "hf://me/card", weights=[0.1, 0.9], overwrite=True)
    assert on_hub(hub, "me/card").keys() == {"LICENSE", "mine.py"} | content(here / "local").keys()
    assert before.items() <= hub.repos["me/card"].commits.items()


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_who_may_not_write_is_told_before_the_work(
    hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.add("me/there", {"keep.txt": b"kept"})
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(sm.StreammergeError, match=r"HF_TOKEN|may not be read with this token"):
        sm.merge(INPUTS, "hf://me/there@new")
    assert not hub.uploaded
    with pytest.raises(sm.RecipeError, match=r"name a branch: hf://org/name\[@branch\]"):
        sm.merge(INPUTS, f"hf://me/there@{'a' * 40}")


def test_a_run_that_failed_goes_on_and_sends_nothing_twice(hub: Hub, here: Path) -> None:
    local = content(here / "local")
    second = hashlib.sha256(local["model-00002-of-00002.safetensors"]).hexdigest()

    def before(request: Request) -> Answer:
        return (400, {}, b"no") if second in request.path else None

    hub.before = before
    with pytest.raises(sm.StoreError, match=r"me/merged cannot be written on the hub"):
        sm.merge(INPUTS, "hf://me/merged", workers=1)
    assert len(hub.uploaded) == 1
    assert on_hub(hub, "me/merged") == {}
    hub.before = lambda request: None
    result = sm.merge(INPUTS, "hf://me/merged", workers=1)
    assert any("continued an interrupted run" in note for note in result.notes)
    assert on_hub(hub, "me/merged") == local
    assert sorted(each for each in hub.uploaded if each in oids(local)) == sorted(oids(local))


def test_a_run_that_was_killed_goes_on(hub: Hub, here: Path) -> None:
    local = content(here / "local")
    second = hashlib.sha256(local["model-00002-of-00002.safetensors"]).hexdigest()
    reached, go = threading.Event(), threading.Event()

    def before(request: Request) -> Answer:
        if second in request.path:
            reached.set()
            go.wait(60)
        return None

    hub.before = before
    command = [sys.executable, "-m", "streammerge", "merge", *INPUTS, "-o", "hf://me/merged", "--workers", "1"]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        assert reached.wait(60)
        os.kill(run.pid, signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
        go.set()
        hub.before = lambda request: None
    assert on_hub(hub, "me/merged") == {}
    hub.uploaded.clear()
    sm.merge(INPUTS, "hf://me/merged", workers=1)
    assert on_hub(hub, "me/merged") == local
    assert not oids(local) - {second} & {*hub.uploaded}, "the first shard is not sent again"
    assert content(here / "hf-home" / "streammerge") == {}


def test_what_a_run_has_left_can_be_discarded(hub: Hub, here: Path) -> None:
    from streammerge.stores.leftovers import discard, leftover_of, leftovers
    from streammerge.stores.locations import parse

    hub.before = lambda request: (400, {}, b"no") if request.path.startswith("/upload/") and hub.uploaded else None
    with pytest.raises(sm.StoreError):
        sm.merge(INPUTS, "hf://me/merged")
    out, every = (each.store.made_at(each) for each in (parse("hf://me/merged"), parse("hf://")))
    found = leftover_of(out)
    assert found is not None
    assert found.kept_bytes > 0
    assert [each.out for each in leftovers(every)] == [found.out]
    discard(out)
    assert leftover_of(out) is None
    assert content(here / "hf-home" / "streammerge") == {}


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, here: Path, quick: None) -> None:
    hub.loses_commits = 1
    sm.merge(INPUTS, "hf://me/merged")
    assert on_hub(hub, "me/merged") == content(here / "local")
    assert len(hub.repos["me/merged"].messages) == 2


def test_a_commit_by_somebody_else_meanwhile_is_told(hub: Hub, here: Path) -> None:
    hub.add("me/merged", {"README.md": b"mine"})

    def before(request: Request) -> Answer:
        if request.path.endswith("/commit/main") and len(hub.repos["me/merged"].commits) == 1:
            hub.add("me/merged", {"README.md": b"another"})
        return None

    hub.before = before
    with pytest.raises(sm.StoreError, match="got another commit on the hub meanwhile"):
        sm.merge(INPUTS, "hf://me/merged")
    assert on_hub(hub, "me/merged") == {"README.md": b"another"}


def test_busy_uploads_are_repeated(hub: Hub, here: Path, quick: None) -> None:
    failed = set[str]()

    def before(request: Request) -> Answer:
        if request.path.startswith("/upload/") and request.path not in failed:
            failed.add(request.path)
            return 503, {}, b"slow down"
        return None

    hub.before = before
    sm.merge(INPUTS, "hf://me/merged")
    assert on_hub(hub, "me/merged") == content(here / "local")
    assert len(failed) >= 2


def test_the_commands_in_the_readme_merge_two_models_of_a_hub_into_a_bucket(
    hub: Hub, here: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    block = re.search(r"^```sh\npip install '\.\[hub,remote\]'\n(streammerge merge .*)\n```$", readme, re.MULTILINE)
    assert block is not None
    use_s3(s3_server, monkeypatch)
    for seed, name in enumerate(("org/chat", "org/code")):
        hub.add(name, files(seed))
    command = shlex.split(block[1])
    (bucket,) = (word.split("/")[2] for word in command if word.startswith("s3://"))
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")).close()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sm.merge(["org/chat", "org/code"], "merged/", weights=[0.7, 0.3])
    found = {path: (sm.location(f"s3://{bucket}/merged") / path) for path in content(here / "merged")}
    assert {path: place.read(0, place.size) for path, place in found.items()} == content(here / "merged")


def test_single_files_and_conversions_and_pickles_are_written(hub: Hub, here: Path) -> None:
    sm.merge(INPUTS, "one.safetensors")
    sm.merge(INPUTS, "hf://me/one/sub/one.safetensors")
    assert on_hub(hub, "me/one") == {"sub/one.safetensors": (here / "one.safetensors").read_bytes()}
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.merge(INPUTS, "hf://me/one/sub/one.safetensors")
    sm.convert("one.safetensors", "hf://me/cut", max_shard_size="500kB")
    sm.convert("one.safetensors", "cut/", max_shard_size="500kB")
    assert on_hub(hub, "me/cut") == content(here / "cut")
    sm.convert("one.safetensors", "one.pth")
    sm.convert("one.safetensors", "hf://me/cut@pth/one.pth")
    assert on_hub(hub, "me/cut", "pth")["one.pth"] == (here / "one.pth").read_bytes()
    for name in INPUTS:
        (here / f"{name}-bin").mkdir()
        sm.convert(name, f"{name}-bin/pytorch_model.bin")
    sm.merge(["a-bin", "b-bin"], "bin/")
    sm.merge(["a-bin", "b-bin"], "hf://me/bin")
    assert on_hub(hub, "me/bin") == content(here / "bin")


def test_an_adapter_is_written(hub: Hub, here: Path) -> None:
    chance = torch.Generator().manual_seed(1)
    for name in ("one", "two"):
        shapes = {"A": (2, 6), "B": (8, 2)}
        factors = {f"base_model.model.q.lora_{k}.weight": torch.randn(s, generator=chance) for k, s in shapes.items()}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        lora = {"adapter_model.safetensors": save(factors), "adapter_config.json": json.dumps(config).encode()}
        written(here / name, lora)
    sm.merge(["one", "two"], "adapter/")
    sm.merge(["one", "two"], "hf://me/adapter")
    assert on_hub(hub, "me/adapter") == content(here / "adapter")
