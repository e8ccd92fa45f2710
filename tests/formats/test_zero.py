"""Checkpoints of DeepSpeed: the float32 parameters, whatever the stage, the ranks and the paddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets

import streammerge as sm
from formats.zero_maker import model, write, write_universal

PADDINGS = [[3, 0, 2, 1], [0, 5, 0]]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float32])
@pytest.mark.sampled(2, by="stage half")
def test_all_tensors_in_float32(tmp_path: Path, stage: int, ranks: int, half: torch.dtype) -> None:
    made = model(half=half)
    folder = write(tmp_path / "run", made, stage, ranks, bf16=half is torch.bfloat16)
    for place in (folder, folder / "global_step12"):
        sm.convert(place, tmp_path / "out.safetensors", overwrite=True)
        assert_same(load_safetensors(tmp_path / "out.safetensors"), made.expected)
    facts = sm.inspect(folder).container.facts
    assert facts == {"ranks": str(ranks), "stage": f"ZeRO {stage}", "step": "12"}


@pytest.mark.parametrize("sub_groups", [1, 8, 20, 40])
def test_stage_3_in_sub_groups(tmp_path: Path, sub_groups: int) -> None:
    made = model()
    folder = write(tmp_path / "run", made, 3, 11, sub_groups=sub_groups)
    sm.convert(folder, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), made.expected)


def test_paddings_between_parameters(tmp_path: Path) -> None:
    made = model()
    sm.convert(write(tmp_path / "run", made, 2, paddings=PADDINGS), tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), made.expected)


@pytest.mark.parametrize("bare", [True, False])
def test_universal(tmp_path: Path, bare: bool) -> None:
    made = model()
    sm.convert(write_universal(tmp_path / "run", made, bare), tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), made.expected)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_the_mean_of_two_stages(tmp_path: Path, io: str) -> None:
    one, two = model(1), model(2)
    paths = [write(tmp_path / "a", one, 2), write(tmp_path / "b", two, 3, 2)]
    sm.merge(paths, tmp_path / "out.safetensors", weights=[0.6, 0.4], io=io, integers="first")
    made = load_safetensors(tmp_path / "out.safetensors")
    wanted = {n: mean([t, two.expected[n]], [0.6, 0.4]) for n, t in one.expected.items() if t.is_floating_point()}
    assert {n: octets(made[n]) for n in wanted} == {n: octets(t) for n, t in wanted.items()}
    sm.verify(tmp_path / "out.safetensors")


def test_the_last_steps_of_a_run(tmp_path: Path) -> None:
    for step in (100, 200, 1000):
        write(tmp_path / f"checkpoint-{step}", model(step), 3)
    result = sm.merge([str(tmp_path / "checkpoint-*")], tmp_path / "out.safetensors", last=2, integers="first")
    made = load_safetensors(tmp_path / "out.safetensors")
    wanted = mean([model(200).expected["emb.weight"], model(1000).expected["emb.weight"]], [0.5, 0.5])
    assert octets(made["emb.weight"]) == octets(wanted)
    assert any("not merged: the state of the optimizer" in note for note in result.notes)


def test_stale_files_of_more_ranks_are_ignored(tmp_path: Path) -> None:
    made = model()
    write(tmp_path / "old", model(5), 2, ranks=5)
    folder = write(tmp_path / "run", made, 2, ranks=3)
    for rank in (3, 4):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        (tmp_path / "old" / "global_step12" / name).rename(folder / "global_step12" / name)
    sm.convert(folder, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), made.expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank_is_named(tmp_path: Path, stage: int) -> None:
    folder = write(tmp_path / "run", model(), stage)
    (folder / "global_step12" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(sm.FormatError, match=r"zero_pp_rank_2_mp_rank_00_optim_states\.pt is absent"):
        sm.inspect(folder)


def test_a_missing_fragment_of_frozen_parameters(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model(), 3)
    (folder / "global_step12" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(sm.FormatError, match=r"zero_pp_rank_1_mp_rank_00_model_states\.pt is absent"):
        sm.inspect(folder)


def test_without_the_files_of_the_optimizer(tmp_path: Path) -> None:
    made = model()
    for stage in (2, 3):
        folder = write(tmp_path / str(stage), made, stage)
        for path in (folder / "global_step12").glob("*optim_states.pt"):
            path.unlink()
    index = sm.inspect(tmp_path / "2")
    assert index["emb.weight"].spec.dtype.torch is torch.bfloat16
    assert any("no files of the optimizer" in note for note in index.notes)
    with pytest.raises(sm.FormatError, match=r"lacks its optim_states\.pt, which hold the parameters of ZeRO 3"):
        sm.inspect(tmp_path / "3")


def test_without_zero_the_model_is_whole(tmp_path: Path) -> None:
    states = {"module": {"w": torch.randn(3, 2).bfloat16(), "table": torch.arange(4.0)}, "buffer_names": ["table"]}
    nothing = dict.fromkeys(("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"))
    beside = {"optimizer": {"optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3, 2)}}}}, "dp_world_size": 2}
    (tmp_path / "run/global_step2").mkdir(parents=True)
    (tmp_path / "run/latest").write_text("global_step2")
    torch.save(states | nothing | beside, tmp_path / "run/global_step2/mp_rank_00_model_states.pt")
    sm.convert(tmp_path / "run", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), states["module"])
    assert not any("the files of the optimizer" in note for note in sm.inspect(tmp_path / "run").notes)


@pytest.mark.parametrize(
    "name",
    ["mp_rank_01_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt", "layer_01-model_00-model_states.pt"],
)
def test_other_parallelism_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "run", model(), 2)
    (folder / "global_step12" / name).touch()
    with pytest.raises(sm.FormatError, match=r"run DeepSpeed's `ds_to_universal\.py` and give its output"):
        sm.inspect(folder)


def changed(folder: Path, file: str, change: Any) -> Path:
    path = min((folder / "global_step12").glob(file))
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)
    return folder


def test_experts_in_the_flat_tensors_are_refused_by_name(tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 cuts the experts of AutoEP at stage 3 among fewer ranks, in files with the usual names."""
    for number, key in enumerate(("ds_autoep_layers", "autoep_layers")):
        folder = write(tmp_path / str(number), model(), 3)
        told = [{"checkpoint_format": "zero3_partitioned", "num_experts": 4, "num_local_experts": 2, "ep_size": 2}]
        changed(folder, "*_0_mp_rank_00_model_states.pt", lambda state, key=key, told=told: state.update({key: told}))
        with pytest.raises(sm.FormatError, match=r"of a mixture of experts, which is not read; run DeepSpeed's `ds_to_un"):
            sm.inspect(folder)
        changed(folder, "*_0_mp_rank_00_model_states.pt", lambda state, key=key: state.update({key: []}))
        assert sm.inspect(folder).container.facts["stage"] == "ZeRO 3"


def test_files_of_two_checkpoints(tmp_path: Path) -> None:
    for stage in (2, 3):
        folder = write(tmp_path / str(stage), model(), stage)
        changed(folder, "*model_states.pt", lambda state: state["param_shapes"][0].update(more=torch.Size([50])))
        with pytest.raises(sm.FormatError, match="files of two checkpoints are mixed, or one is damaged"):
            sm.inspect(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(param_shapes=7),
        lambda state: state["param_shapes"][0].update({"emb.weight": torch.Size([1 << 58, 1 << 3])}),
        lambda state: state["param_shapes"][0].update({"emb.weight": (-1, 5)}),
        lambda state: state.pop("module"),
        lambda state: state.update(shared_params=[1]),
        lambda state: state.update(dp_world_size=1 << 60),
    ],
)
def test_hostile_states(tmp_path: Path, change: Any) -> None:
    folder = changed(write(tmp_path / "run", model(), 2), "*model_states.pt", change)
    with pytest.raises(sm.FormatError) as caught:
        sm.inspect(folder)
    assert "\n" not in str(caught.value)


def test_a_name_that_leads_out_of_a_universal_checkpoint(tmp_path: Path) -> None:
    made = model()
    folder = write_universal(tmp_path / "a" / "run", made, bare=False)
    path = folder / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["param_shapes"][0]["../../b"] = torch.Size([2])
    torch.save(state, path)
    with pytest.raises(sm.FormatError, match="not the name of a folder"):
        sm.inspect(folder)


def test_a_step_that_is_absent(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model(), 2)
    for said, error in (("global_step99", "which is absent"), ("../x", "not the name of a folder beside it")):
        (folder / "latest").write_text(said)
        with pytest.raises(sm.FormatError, match=error):
            sm.inspect(folder)
