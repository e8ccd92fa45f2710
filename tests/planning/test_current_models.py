"""Current models: no tensor is without an account, sound merges pass `strict`, and parts that one model lacks are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint

import streammerge as sm
from formats.gguf_samples import plain, q8_0, write
from planning.model_headers import HEADERS, Header


def every(cases: list[Header]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("header", cases, ids=[each.name for each in cases])


def accounted(plan: sm.Plan) -> list[int]:
    """Returns how many tensors of each checkpoint have a fate."""
    return [sum(fate["count"] for fate in account.record()["fates"]) for account in plan.accounts]


def used(plan: sm.Plan) -> bool:
    return not any(list(account.unused()) for account in plan.accounts)


def asked(header: Header, folder: Path) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in "ab"]
    rules = [{"match": pattern, "copy": str(folder / "a")} for pattern in header.copied]
    return {"recipe": {"merge_method": "linear", "models": models, "rules": rules}, "out": folder / "out/"}


def test_there_are_twenty() -> None:
    assert len({each.name for each in HEADERS}) >= 20


@every(HEADERS)
def test_two_of_a_kind_are_used_whole_and_agree_with_their_configurations(header: Header, tmp_path: Path) -> None:
    count = len(header.write(tmp_path / "a"))
    header.write(tmp_path / "b")
    plan = sm.plan(**asked(header, tmp_path), strict=True)
    assert accounted(plan) == [count, count]
    assert used(plan)
    assert not plan.disagreements
    assert len({task.out.name for task in plan.tasks}) == len(plan.tasks)


@every(HEADERS)
def test_a_part_that_only_the_second_has_is_told_and_refused_when_strict(header: Header, tmp_path: Path) -> None:
    rest, whole = header.write(tmp_path / "a", without=header.part), header.write(tmp_path / "b")
    with pytest.raises(sm.MismatchError, match="lacks"):
        sm.plan(**asked(header, tmp_path))
    plan = sm.plan(**asked(header, tmp_path), on_missing="base")
    assert accounted(plan) == [len(rest), len(whole)]
    lost = {name for account in plan.accounts for _, names in account.unused() for name in names}
    assert lost == whole.keys() - rest.keys()
    with pytest.raises(sm.MismatchError, match=r"`strict=True` refuses"):
        sm.plan(**asked(header, tmp_path), on_missing="base", strict=True)


@every(HEADERS)
def test_a_part_that_the_second_lacks_is_an_error_or_kept(header: Header, tmp_path: Path) -> None:
    whole, rest = header.write(tmp_path / "a"), header.write(tmp_path / "b", without=header.part)
    with pytest.raises(sm.MismatchError, match="lack"):
        sm.plan(**asked(header, tmp_path))
    plan = sm.plan(**asked(header, tmp_path), on_missing="average-present")
    assert accounted(plan) == [len(whole), len(rest)]
    assert used(plan)


def test_checkpoints_of_several_ranks_have_accounts(tmp_path: Path) -> None:
    for name, more in (("a", {}), ("b", {"head": torch.ones(5, 3)})):
        weights = {f"layers.{n}.weight": torch.randn(6, 4) for n in range(3)} | more
        state = {
            "model": weights,
            "optimizer": {"state": {n: {"exp_avg": torch.zeros(w.shape)} for n, w in weights.items()}},
        }
        torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / name, no_dist=True)
    inputs = [tmp_path / "a", tmp_path / "b"]
    plan = sm.plan(inputs, tmp_path / "out/", on_missing="base")
    accounts = [each.record() for each in plan.accounts]
    assert [sum(f["count"] for f in each["fates"] if f["fate"] != "training") for each in accounts] == [3, 4]
    assert {name for each in plan.accounts for _, names in each.unused() for name in names} == {"head"}
    with pytest.raises(sm.MismatchError, match=r"`strict=True` refuses this merge: not used: 1 of .* head"):
        sm.plan(inputs, tmp_path / "out/", on_missing="base", strict=True)
    assert sm.plan([inputs[0]] * 2, tmp_path / "out/", strict=True).accounts


def test_files_of_llama_cpp_have_accounts(tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    for name, layers in (("a", 1), ("b", 2)):
        tensors = {"token_embd.weight": q8_0(torch.randn(40, 64))[0]}
        for n in range(layers):
            tensors |= {
                f"blk.{n}.attn_q.weight": q8_0(torch.randn(64, 64))[0],
                f"blk.{n}.attn_norm.weight": plain(torch.ones(64)),
            }
        write(tmp_path / f"{name}.gguf", metadata, tensors)
    inputs = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    plan = sm.plan(inputs, tmp_path / "out/", on_missing="base")
    assert accounted(plan) == [3, 5]
    lost = {name for account in plan.accounts for _, names in account.unused() for name in names}
    assert lost == {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"}
    assert accounted(sm.plan([inputs[1]] * 2, tmp_path / "out/", strict=True)) == [5]
