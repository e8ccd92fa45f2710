"""Names that differ in their wrappers only are matched; none is guessed."""

from __future__ import annotations

from streammerge.checkpoints.numbers import numeric_order
from streammerge.tensors.names import bare, describe_match, match_names


def test_names() -> None:
    assert bare("module._orig_mod.xtts.gpt.w") == "gpt.w"
    assert bare("model") == "model"
    ours, theirs = ["a.w", "b.w", "b.module.c"], ["module.a.w", "module.b.w", "module.b.c"]
    assert match_names(ours, theirs) == dict(zip(ours, theirs, strict=True))
    assert match_names(["w", "module.w"], ["module.w"]) == {"module.w": "module.w"}
    assert match_names(["w", "module.w"], ["_orig_mod.w"]) == {}, "an ambiguous name must not be guessed"
    assert match_names(["model.w", "model.v"], ["w", "v"]) == {"model.w": "w", "model.v": "v"}
    assert match_names(["w", "v"], ["net.w", "net.v"]) == {"w": "net.w", "v": "net.v"}
    assert match_names(["model.w", "w"], ["w", "net.w"]) == {"w": "w"}, "two tensors must not be crossed"
    assert match_names(["student.w"], ["teacher.w"]) == {}, "different models must not be matched"
    assert describe_match({"a": "module.a", "b": "module.b"}) == [
        "2 tensors match once 'module.' is removed from its names"
    ]
    assert sorted(["c-1000", "c-200", "c-200b"], key=numeric_order) == ["c-200", "c-200b", "c-1000"]
