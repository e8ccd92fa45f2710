"""Statistics beside an output: a report reads no input if they are there, and says why if they are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.reporting import making
from streammerge.reporting.facts import Facts
from streammerge.running.sampling import places


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Facts]:
    """The facts of each page that is made, instead of the page."""
    made = list[Facts]()
    monkeypatch.setattr(making, "check_possible", lambda *_: None)
    monkeypatch.setattr(making, "_write", lambda facts, _: made.append(facts))
    monkeypatch.chdir(tmp_path)
    return made


def models(**more: Any) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tensors = {f"l.{n}.w": torch.randn(40, 50) for n in range(3)} | {"head": torch.randn(7)}
        odd = {"steps": torch.tensor([4]), "mask": torch.tensor([1.0, -math.inf])}
        extra = {"extra": torch.randn(3)} if name == "a" else {}
        save_file({**tensors, **odd, **extra}, f"{name}.safetensors")
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", on_missing="average-present", statistics=True, **more)


def test_a_report_reads_no_input(pages: list[Facts]) -> None:
    models()
    made, a, b = (load_file(f"{name}.safetensors") for name in ("out", "a", "b"))
    Path("a.safetensors").unlink(), Path("b.safetensors").unlink()
    sm.report("out.safetensors", "page.html")
    [facts] = pages
    assert facts.input_names == ["a.safetensors", "b.safetensors"]
    rows = {row.name: row for row in facts.rows}
    for name in ("l.0.w", "head"):
        for known, own in zip(rows[name].distances, (a, b), strict=True):
            there = places(made[name].numel())
            x, y = made[name].flatten()[there].double(), own[name].flatten()[there].double()
            assert known == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-3)
    assert {name: row.mark for name, row in rows.items() if row.mark} == {"steps": "i", "mask": "N", "extra": "m"}
    assert any(label == "memory" for label, _ in facts.made)
    assert not any("read again" in text for _, text in facts.said)


def test_why_inputs_are_read_is_said(pages: list[Facts]) -> None:
    models()
    place = Path("out.safetensors.statistics.json")
    whole = place.read_text()

    def said() -> str:
        pages.clear()
        sm.report("out.safetensors", "page.html")
        return next(text for _, text in pages[0].said if "so the inputs were read again" in text)

    place.write_text(json.dumps({**json.loads(whole), "output": "0" * 64}))
    assert said().startswith("out.safetensors.statistics.json belongs to an output that was here before")
    place.write_text(whole[:-20])
    assert said().startswith("out.safetensors.statistics.json cannot be read")
    place.write_text(whole.replace('"head"', '"tail"'))
    assert said().startswith("the statistics have other tensors than the output")
    place.unlink()
    assert said().startswith("no statistics were gathered while merging")


def test_statistics_change_no_byte_and_replace_earlier_ones(pages: list[Facts]) -> None:
    models()
    first = Path("out.safetensors").read_bytes()
    models(overwrite=True)
    assert Path("out.safetensors").read_bytes() == first
    sm.report("out.safetensors", "page.html")
    assert not any("so " in text for _, text in pages[-1].said)


def test_a_sum_of_a_base_and_an_adapter_is_measured_too(pages: list[Facts]) -> None:
    base = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8), "model.norm.weight": torch.ones(8)}
    for name in ("base", "other"):
        Path(name).mkdir()
        save_file({k: v + 0.1 * torch.randn_like(v) for k, v in base.items()}, f"{name}/model.safetensors")
        Path(name, "config.json").write_text('{"model_type": "llama"}')
    Path("lora").mkdir()
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{at}.lora_A.weight": torch.randn(2, 8), f"{at}.lora_B.weight": torch.randn(8, 2)}
    save_file(factors, "lora/adapter_model.safetensors")
    Path("lora/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "base"}'
    )
    sm.merge(["base+lora", "other"], "out/", statistics=True)
    sm.report("out", "page.html")
    [facts] = pages
    assert facts.input_names == ["other", "base + lora"]
    assert all(None not in row.distances for row in facts.rows)
    number = facts.input_names.index("base + lora")
    row = next(row for row in facts.rows if row.name.endswith("q_proj.weight"))
    lora, own = load_file("lora/adapter_model.safetensors"), load_file("base/model.safetensors")
    full = own[row.name] + lora[f"{at}.lora_B.weight"] @ lora[f"{at}.lora_A.weight"]
    apart = float((load_file("out/model.safetensors")[row.name] - full).norm() / full.norm())
    assert row.distances[number] == pytest.approx(apart, rel=1e-3)


def test_the_command_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_file({"w": torch.randn(9)}, f"{name}.safetensors")
    cli("merge", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--statistics")
    assert json.loads(Path("c.safetensors.statistics.json").read_text())["names"] == ["w"]


def test_what_rules_leave_out_is_not_called_lost(pages: list[Facts]) -> None:
    models()
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"{name}.safetensors", "parameters": {"weight": 0.5}} for name in "ab"],
        "rules": [{"match": "l.0.*", "copy": "a.safetensors"}],
        "on_missing": "average-present",
    }
    sm.merge(recipe=recipe, out="ruled.safetensors", report="page.html")
    [facts] = pages
    assert ("not used", "nothing but 1 tensor that rules leave out") in facts.summary
    assert {row.name: row.mark for row in facts.rows if row.name.startswith("l.")} == {
        "l.0.w": "c",
        "l.1.w": "",
        "l.2.w": "",
    }
