"""The plan of an adapter from adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streammerge as sm
from factoring.test_combination import two


def test_a_plan_prints_itself_and_writes_nothing() -> None:
    two()
    plan = sm.plan(["one", "other"], "made/", method="ties", parameters={"density": 0.5, "rank": 3}, memory="64MiB")
    assert (len(plan.tasks), plan.read_bytes > 0, 0 < plan.peak_bytes <= 64 << 20) == (3, True, True)
    assert "3 by decomposing the update" in str(plan)
    assert repr(plan).startswith("<AdapterPlan: 3 tensors")
    told = json.loads(json.dumps(plan.to_json()))
    assert (told["method"], told["tensors"], told["recipe"]["rank"]) == ("ties", {"decompose": 3}, 3)
    assert sorted(path.name for path in Path().iterdir()) == ["one", "other"]
    sm.merge(["one", "other"], "made/")
    assert any("exists" in warning for warning in sm.plan(["one", "other"], "made/").warnings)
    with pytest.raises(sm.BudgetError):
        sm.plan(["one", "other"], memory="1MiB")
