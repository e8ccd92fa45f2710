"""What becomes of each thing in an input: printed by a plan, recorded in the receipt, said by a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge as sm
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.receipt import read_receipt


def test_equal_decisions_are_one_line() -> None:
    made = Dispositions()
    made.add("entry", "optimizer", "dropped", "stale")
    made.add("file", ["tokenizer.json", "vocab.txt"], "copied")
    made.add("entry", ["scheduler"], "dropped", "stale")
    made.add("tensor", [], "dropped", "nothing")
    assert made.facts() == [("copied", "tokenizer.json, vocab.txt"), ("dropped", "optimizer, scheduler (stale)")]
    assert made.notes() == ["left out of the output: optimizer, scheduler (stale)"]
    assert [(each.thing, each.fate, each.names, each.count) for each in made] == [
        ("file", "copied", ("tokenizer.json", "vocab.txt"), 2),
        ("entry", "dropped", ("optimizer", "scheduler"), 2),
    ]


def test_many_names_are_counted() -> None:
    made = Dispositions()
    made.add("tensor", [f"w{number}\n" for number in range(50_000)], "copied", "why")
    assert made.facts() == [("copied", ", ".join(f"w{number}\\n" for number in range(8)) + " and 49992 more (why)")]
    record = made.record()
    assert record[0]["count"] == 50_000
    assert len(record[0]["names"]) == 20


def test_ledgers_are_joined() -> None:
    one, two = Dispositions(), Dispositions()
    one.add("entry", "a", "dropped", "stale")
    two.add("entry", "b", "dropped", "stale")
    one.update(two)
    assert one.facts() == [("dropped", "a, b (stale)")]
    assert two.facts() == [("dropped", "b (stale)")]


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out"])
def test_a_plan_prints_and_a_receipt_records_what_becomes_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        weights = {"enc.w": torch.full((3,), float(number)), "dec.w": torch.ones(2), "dvae.w": torch.ones(1)}
        torch.save({"model": weights, "optimizer": {"param_groups": []}, "step": number}, f"{number}.pth")
    rules = [{"match": "enc.*", "copy": "1.pth"}, {"match": "dvae.*", "drop": True}]
    recipe = {"merge_method": "linear", "models": [{"model": "1.pth"}, {"model": "2.pth"}], "rules": rules}
    planned = sm.plan(recipe=recipe, out=out)
    text, receipt = str(planned), planned.layout.receipt
    assert "copied   enc.w (by the rule for enc.*)" in text
    assert "dropped  dvae.w (by the rule for dvae.*)" in text
    gone = "optimizer" if out == "out.pth" else "optimizer, step"
    assert f"dropped  {gone} (" in text
    assert text.count("optimizer") == 2 - (out != "out.pth"), "nothing is said twice; one line names the option"
    result = sm.merge(recipe=recipe, out=out)
    assert any(note.startswith(f"left out of the output: {gone} (") for note in result.notes)
    record = [(each["fate"], each["thing"], each["names"]) for each in receipt.dispositions]
    assert ("merged", "tensor", ["dec.w"]) in record
    assert ("copied", "tensor", ["enc.w"]) in record
    assert ("dropped", "tensor", ["dvae.w"]) in record
    assert planned.to_json()["dispositions"] == receipt.dispositions
    if out == "out":
        written = read_receipt((tmp_path / "out/streammerge.json").read_text(), out)
        assert written.dispositions == receipt.dispositions
    assert sm.verify(out)
