"""The hub as a store: the real client against a hub on this machine. The oracles are local folders with the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import streammerge as sm
from loopback_hub import Answer, Hub, Repo, Request, git_id
from stores.hub_models import content, files, read, tensors, written
from stores.suite import ODD_NAMES, SIZES, ReadingSuite
from streammerge.stores.base import Location
from streammerge.stores.locations import parse


def nightly(size: int) -> Any:
    return pytest.param(size, marks=pytest.mark.slow)


class TestTheHub(ReadingSuite):
    NAMES = ODD_NAMES

    @pytest.fixture
    def home(self, tmp_path: Path, hub: Hub) -> Location:
        self.repo = hub.repos["org/name"] = Repo()
        self.repo.commit({"other/file": b""})
        return parse("hf://org/name/home")

    def inner(self, location: Location) -> str:
        return location.key.split("/", 2)[2]

    def put(self, location: Location, data: bytes) -> Location:
        files = self.repo.commits[self.repo.branches["main"]]
        self.repo.commit({**files, self.inner(location): data})
        return location

    def put_folder(self, location: Location) -> None:
        self.put(location / ".gitkeep", b"")

    def remove(self, location: Location) -> None:
        files = dict(self.repo.commits[self.repo.branches["main"]])
        del files[self.inner(location)]
        self.repo.commit(files)

    @pytest.mark.parametrize("nbytes", [size if size in (0, 4097) else nightly(size) for size in SIZES])
    def test_ranges_are_read_as_they_are(self, home: Location, nbytes: int) -> None:
        super().test_ranges_are_read_as_they_are(home, nbytes)  # a range is a request to two servers here

    def test_a_folder_lists_what_is_in_it(self, home: Location) -> None:
        """A folder is there while something is in it."""
        self.put(home / "first", b"")
        assert [each.name for each in home.children()] == ["first"]
        for name in self.NAMES:
            self.put(home / name, name.encode())
        self.put(home / "folder" / "deep", b"")
        assert home.children() == sorted(home / name for name in (*self.NAMES, "first", "folder"))
        assert [each.name for each in (home / "folder").children()] == ["deep"]
        assert all(each.read(0, each.size) == each.name.encode() for each in home.children() if each.name in self.NAMES)

    def test_a_pattern_names_inputs(self, home: Location) -> None:
        """They are named at the commit."""
        self.inputs(home)
        commit = self.repo.branches["main"]
        assert list(sm.plan([home / "in" / "*.safetensors"]).recipe.inputs) == [
            f"hf://org/name@{commit}/home/in/{n}.safetensors" for n in (0, 1)
        ]


# --------------------------------------------------------------------------------------------------------------- models


def expected(weight: float = 0.5) -> dict[str, torch.Tensor]:
    a, b = tensors(1), tensors(2)
    return {name: (a[name].double() * weight + b[name].double() * (1 - weight)).float() for name in a}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "names",
    [
        ("hf://org/a", "hf://org/b"),
        ("org/a", "org/b@main"),
        ("hf://org/a:0.5", "hf://org/b@main:0.5"),
        ("HF://org/a/", "org/b"),
    ],
)
def test_models_are_merged_without_a_download(
    hub: Hub, models: dict[str, str], tmp_path: Path, names: tuple[str, str]
) -> None:
    plan = sm.plan(names)
    assert hub.sent_bytes < 200_000
    assert hub.count("^/data/") == 4, "one request for the header of each shard"
    assert f"org/a@{models['org/a']}" in str(plan)
    sm.merge(names, "out/")
    assert same(read(tmp_path / "out"), expected())
    assert (tmp_path / "out" / "extra" / "words.txt").read_bytes() == b"word\n" * 100
    receipt = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert [each["model"] for each in receipt["recipe"]["models"]] == [f"{n}@{commit}" for n, commit in models.items()]
    assert f"org/b@{models['org/b']}/model-00001-of-00002.safetensors" in receipt["inputs"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"[org/a](https://huggingface.co/org/a) at commit `{models['org/a']}`" in card
    assert "base_model: [org/a, org/b]" in card
    assert not (tmp_path / "hf-home" / "hub").exists(), "nothing is kept on the disk"
    with pytest.raises(sm.VerifyError):
        sm.verify("out", sample="100%", inputs=tmp_path)
    assert sm.verify("out", sample="100%", inputs="hf://").recomputed
    assert [name for name in os.listdir(tmp_path) if name not in ("out", "hf-home")] == []


def cached(tmp_path: Path, name: str, commit: str, data: dict[str, bytes], branch: str = "main") -> Path:
    """Puts files into the hub's cache, as the client does."""
    home = tmp_path / "hf-home" / "hub" / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / branch).write_text(commit)
    return written(home / "snapshots" / commit, data)


def test_the_output_is_the_same_from_the_hub_its_cache_and_both(
    hub: Hub, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sm.merge(["org/a", "org/b"], "hub/")
    for name, commit in models.items():
        half = {path: data for path, data in files(int(name == "org/b") + 1).items() if "00001" in path}
        cached(tmp_path, name, commit, half)
    hub.requests.clear()
    sm.merge(["org/a", "org/b"], "both/")
    assert content(tmp_path / "both") == content(tmp_path / "hub")
    shards = [r for r in hub.requests if r.path.startswith("/data/")]
    wanted = {hashlib.sha256(files(seed)["model-00002-of-00002.safetensors"]).hexdigest() for seed in (1, 2)}
    assert {r.path.rpartition("/")[2] for r in shards} == wanted, "the cached shards are not fetched"
    for name, commit in models.items():
        cached(tmp_path, name, commit, files(int(name == "org/b") + 1))
    hub.requests.clear()
    sm.merge(["org/a", "org/b"], "cache/")
    assert content(tmp_path / "cache") == content(tmp_path / "hub")
    assert hub.count("/resolve/|^/data/") == 0
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sm.merge([f"org/a@{models['org/a']}", "hf://org/b"], "offline/")
    assert content(tmp_path / "offline") == content(tmp_path / "hub")
    assert hub.requests == []
    assert sm.verify("offline", sample="100%").recomputed, "the cache holds the commits in the receipt"


def test_without_the_network_a_branch_is_what_the_cache_knows(
    hub: Hub, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(tmp_path, "org/a", models["org/a"], files(1))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert sm.inspect("org/a").path.key.endswith(f"models--org--a/snapshots/{models['org/a']}")
    assert len(sm.inspect("hf://org/a@main")) == 5


def test_a_branch_that_moves_is_read_as_it_was_planned(hub: Hub, models: dict[str, str], tmp_path: Path) -> None:
    plan = sm.plan(["org/a", "org/b"], "out/")
    hub.add("org/a", files(3))
    sm.merge(recipe=plan.recipe.to_dict(), out="out/")
    assert same(read(tmp_path / "out"), expected())
    sm.merge(["org/a", f"org/b@{models['org/b']}"], "next/")
    assert not same(read(tmp_path / "next"), expected())


def test_revisions_and_folders_are_found(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repo = hub.repos["org/c"] = Repo()
    first = repo.commit({f"sub/{name}": data for name, data in files(1).items()}, "refs/pr/1")
    repo.commit({"model.safetensors": files(2)["model-00001-of-00002.safetensors"]}, "a/b")
    repo.commit({"x": b""})
    for name in (
        "hf://org/c@refs/pr/1/sub",
        "org/c@refs%2Fpr%2F1/sub",
        f"org/c@{first[:40]}/sub",
        "hf://models/org/c@refs/pr/1/sub",
    ):
        assert len(sm.inspect(name)) == 5
    assert len(sm.inspect("hf://org/c@a%2Fb/model.safetensors")) == 3
    with pytest.raises(sm.RecipeError, match=r"org/c has no absent at commit"):
        sm.inspect("hf://org/c/absent")
    for name in ("hf://datasets/org/c", "hf://one", "hf://org/c@x/../y", "hf://-o/c"):
        with pytest.raises(sm.RecipeError, match=r"hf://org/name\[@revision\]\[/folder\]"):
            sm.inspect(name)


RECIPE = """\
merge_method: linear
models:
  - {model: {model: {path: org/a, revision: main}}, parameters: {weight: 0.25}}
  - {model: org/b@main, parameters: {weight: 0.75}}
tokenizer_source: org/a
"""


def test_a_recipe_of_mergekit_names_repositories(hub: Hub, models: dict[str, str], tmp_path: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("tokenizer_source: org/a\n", ""))
    sm.merge(recipe="recipe.yaml", out="out/")
    assert same(read(tmp_path / "out"), expected(0.25))
    Path("recipe.yaml").write_text(RECIPE.replace("org/b@main", "org/typo").replace("linear", "linaer"))
    hub.requests.clear()
    hub.sent_bytes = 0
    with pytest.raises(sm.RecipeError) as caught:
        sm.merge(recipe="recipe.yaml", out="out2/")
    assert "linaer" in str(caught.value)
    assert "recipe.yaml:4:" in str(caught.value)
    assert "has no model org/typo" in str(caught.value)
    assert hub.count("/data/|/resolve/") == 0
    assert hub.sent_bytes < 100_000


def test_adapters_of_the_hub_are_merged_into_models_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = torch.Generator().manual_seed(3)
    weight, a, b = (torch.randn(shape, generator=chance) for shape in ((8, 6), (2, 6), (8, 2)))
    hub.add("org/base", {"model.safetensors": save({"q_proj.weight": weight}), "config.json": b"{}"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    names = {f"base_model.model.q_proj.lora_{which}.weight": each for which, each in (("A", a), ("B", b))}
    lora = {"adapter_model.safetensors": save(names), "adapter_config.json": json.dumps(config).encode()}
    commit = hub.add("org/lora", lora)
    sm.merge(["org/base+org/lora@main"], "out/")
    wanted = (weight.double() + 2.0 * (b.double() @ a.double())).float()
    assert torch.equal(load_file("out/model.safetensors")["q_proj.weight"], wanted)
    assert f"org/lora@{commit}" in Path("out/streammerge.yaml").read_text()
    sm.merge(["hf://org/base+hf://org/lora"], "again/")
    assert content(tmp_path / "again") == content(tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- what goes wrong


def merged_with(hub: Hub, before: Callable[[Request], Answer]) -> dict[str, torch.Tensor]:
    hub.before = before
    sm.merge(["org/a", "org/b"], "out/", overwrite=True)
    return read(Path("out"))


def test_a_file_that_xet_stores_is_read_by_plain_ranges(hub: Hub, models: dict[str, str]) -> None:
    """The hub says of each large file where Xet has it. That route downloads whole files, with memory of its own."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url("org/a", "model-00001-of-00002.safetensors", endpoint=hub.address)
    assert get_hf_file_metadata(url, endpoint=hub.address).xet_file_data is not None, "the client knows that it is one"
    assert sm.inspect("hf://org/a").keys()
    assert hub.count("/data/", "GET")
    assert not hub.count("xet")


def test_failures_that_pass_do_not_matter(hub: Hub, models: dict[str, str], quick: None) -> None:
    numbers = itertools.count()

    def before(request: Request) -> Answer:
        number = next(numbers)
        busy = request.path.startswith(("/data/", "/api/models/", "/org/")) and number % 3 == 0
        return (503 if number % 2 else 429, {}, b"busy") if busy else None

    assert same(merged_with(hub, before), expected())


def test_an_address_that_expires_is_asked_for_again(hub: Hub, models: dict[str, str], quick: None) -> None:
    seen: dict[str, int] = {}

    def before(request: Request) -> Answer:
        if not request.path.startswith("/data/"):
            return None
        seen[request.path] = seen.get(request.path, 0) + 1
        return (403, {}, b"<Error>expired</Error>") if seen[request.path] == 2 else None

    assert same(merged_with(hub, before), expected())
    assert len(seen) == 4


@pytest.mark.parametrize("wrong", ["short", "long", "other"])
def test_a_wrong_body_is_never_believed(hub: Hub, models: dict[str, str], quick: None, wrong: str) -> None:
    numbers = itertools.count()

    def change(request: Request, body: bytes) -> bytes:
        if next(numbers) % 3 or len(body) < 1000:
            return body
        return body[: len(body) // 2] if wrong == "short" else body + b"more" if wrong == "long" else b""

    hub.change = change
    assert same(merged_with(hub, lambda request: None), expected())


def test_a_server_without_ranges_still_gives_small_files(hub: Hub, models: dict[str, str]) -> None:
    hub.ranges = False
    assert same(merged_with(hub, lambda request: None), expected())


def changing(hub: Hub, models: dict[str, str], how: str) -> Callable[[Request], Answer]:
    """Returns what changes the first model after the plan is made: when all of a shard is read."""
    repo, commit = hub.repos["org/a"], models["org/a"]

    def before(request: Request) -> Answer:
        if request.path.startswith("/data/") and request.range and not request.range.endswith("-16383"):
            if how == "etag":
                return (206, {"ETag": '"another"', "Content-Range": "bytes 0-1/2"}, b"xx")
            other = files(3)
            repo.commits[commit] = {k: v for k, v in other.items() if how == "content" or "00002" not in k}
            return (403, {}, b"expired")  # so that the address is asked for again
        return None

    return before


@pytest.mark.parametrize("how", ["etag", "content", "gone"])
def test_what_changes_under_a_commit_is_told(hub: Hub, models: dict[str, str], quick: None, how: str) -> None:
    with pytest.raises(sm.ChangedError, match=r"changed since it was planned|is gone since it was planned"):
        merged_with(hub, changing(hub, models, how))
    assert not Path("out").exists()


def test_every_command_reads_the_hub(hub: Hub, models: dict[str, str], tmp_path: Path) -> None:
    local = written(tmp_path / "local", files(1))
    assert sm.diff("hf://org/a", local).equal
    assert not sm.diff("org/a", "org/b", base="org/a").equal
    sm.convert("org/a", "one.safetensors")
    assert same(load_file("one.safetensors"), tensors(1))
    sm.merge([local, "org/b"], "mixed/")
    assert same(read(tmp_path / "mixed"), expected())
    hub.add("org/merged", content(tmp_path / "mixed"))
    assert sm.verify("hf://org/merged", sample=0).files
    shutil.rmtree(local)


def test_the_loopback_hub_counts_as_git_does() -> None:
    assert git_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_workers_in_processes_read_the_hub(hub: Hub, models: dict[str, Any], tmp_path: Path) -> None:
    sm.merge(["org/a", "org/b"], "out/", executor="processes", workers=2)
    assert same(read(tmp_path / "out"), expected())
