"""The tree of a merge of merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores.locations import parse
from streammerge.verifying.lineage import Lineage, lineage


@pytest.fixture
def merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four models, a merge of two, a merge of that, and a merge of that one in a .pth."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abcd"):
        save_file({"w": torch.full((2, 2), float(number))}, f"{name}.safetensors")
    sm.merge(["a.safetensors", "b.safetensors"], "ab.safetensors", weights=[0.3, 0.7])
    sm.merge(["ab.safetensors", "c.safetensors"], "abc/", method="slerp", parameters={"t": 0.3})
    sm.merge(["abc/", "d.safetensors"], "all.pth", method="ties", base="a.safetensors", parameters={"density": 0.5})
    return tmp_path


def named(tree: Lineage) -> list[object]:
    return [tree.name, *(named(each) for each in tree.inputs)]


def test_the_tree_of_three_merges(merges: Path, cli: Cli) -> None:
    assert named(lineage(parse("all.pth"))) == [
        "all.pth",
        ["abc/", ["ab.safetensors", ["a.safetensors"], ["b.safetensors"]], ["c.safetensors"]],
        ["d.safetensors"],
        ["a.safetensors"],
    ]
    shown = cli("inspect", "--lineage", "all.pth").stdout
    assert "├─ abc/  = slerp, t 0.3\n" in shown
    assert "│  │  └─ b.safetensors  (weight 0.7)\n" in shown
    assert "└─ a.safetensors  (base)" in shown
    told = json.loads(cli("inspect", "--lineage", "all.pth", "--format", "json").stdout)
    assert told["inputs"][0]["inputs"][0]["inputs"][1] == {
        "name": "b.safetensors",
        "role": "weight 0.7",
        "method": None,
        "inputs": [],
        "note": "",
    }


def test_the_inputs_lie_beside_the_output(merges: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(merges, merges / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    for name in ("ab.safetensors", "abc"):
        path = merges / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert lineage(parse("elsewhere/all.pth")).inputs[0].method == "slerp, t 0.3"
    assert lineage(parse("all.pth")).inputs[0] == Lineage("abc/", note="is not here")


def test_another_file_under_the_name_of_an_input(merges: Path) -> None:
    sm.merge(["c.safetensors", "d.safetensors"], "ab.safetensors", overwrite=True)
    tree = lineage(parse("abc/"))
    assert tree.inputs[0] == Lineage("ab.safetensors", note="is not the file that was merged")


def test_a_checkpoint_that_is_no_output(merges: Path, cli: Cli) -> None:
    assert cli("inspect", "--lineage", "a.safetensors").stdout == (
        "a.safetensors  [no receipt: streammerge did not make it]\n"
    )
    cli("inspect", "--lineage", "absent.safetensors", code=2)


def test_a_state_dict_and_a_stage(merges: Path) -> None:
    sm.merge([{"w": torch.zeros(2, 2)}, "ab.safetensors"], "held.safetensors")
    assert [each.note for each in lineage(parse("held.safetensors")).inputs] == ["was in memory", ""]
    stage = {"merge_method": "linear", "models": [{"model": "a.safetensors"}, {"model": "ab.safetensors"}]}
    models = [{"model": "inner"}, {"model": "c.safetensors"}]
    sm.merge(recipe={"merge_method": "linear", "models": models, "stages": {"inner": stage}}, out="st.safetensors")
    assert named(lineage(parse("st.safetensors"))) == [
        "st.safetensors",
        ["inner", ["a.safetensors"], ["ab.safetensors", ["a.safetensors"], ["b.safetensors"]]],
        ["c.safetensors"],
    ]


def test_receipts_of_strangers(merges: Path) -> None:
    """A receipt that names absolute paths or itself leads nowhere else on the machine, and ends."""
    from dataclasses import replace

    from streammerge.running.readback import receipt_of

    receipt = receipt_of(parse("abc/"))
    for names, said in (
        (["/etc/passwd", "../../x"], ["is not here", "is not here"]),
        (["abc/"], ["its receipt names itself"]),
    ):
        recipe = {"merge_method": "linear", "models": [{"model": name} for name in names]}
        inputs = dict.fromkeys(["abc/model.safetensors"], lineage_input(parse("abc/model.safetensors")))
        made = replace(receipt, recipe=recipe, inputs=inputs)
        made = replace(made, digest=made.own_digest())
        Path("abc/streammerge.json").write_text(made.text(2))
        assert [each.note for each in lineage(parse("abc/")).inputs] == said


def lineage_input(path: sm.Location) -> dict[str, object]:
    from streammerge.checkpoints.index import open_checkpoint
    from streammerge.stores.digests import digest_outside

    index = open_checkpoint(str(path))
    spans = next(iter(index.container.tensor_spans(joined=True).values()))
    return {"bytes": path.size, "header_sha256": digest_outside(path, spans)}
