"""Tensors that not all checkpoints have: kept, added, left out, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from planning.named_models import draw, mean, merged, model, saved


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("policy", ["base", "average-present", "drop", "union"])
def test_without_a_common_name_there_is_no_merge(policy: str) -> None:
    saved(one=model(1, "student."), two=model(2, "teacher."))
    with pytest.raises(sm.MismatchError, match="next to no name is common") as caught:
        merged("one", "two", on_missing=policy)
    said = str(caught.value)
    assert "settles names" not in said, "no option is offered that fakes a merge"
    assert '`rename="teacher.*=student.*"`' in said
    made, _ = merged("one", "two", rename="teacher.*=student.*")
    assert torch.equal(made["student.norm.weight"], mean(draw(92, 4), draw(93, 4)))


def test_a_part_of_a_model_is_a_merge() -> None:
    part = {name: tensor for name, tensor in model(5, layers=40).items() if "layers.7." in name}
    saved(one=model(1, layers=40), part=part)
    made, _ = merged("one", "part", on_missing="base")
    name = "layers.7.attn.q_proj.weight"
    assert torch.equal(made[name], mean(model(1, layers=40)[name], part[name]))


@pytest.mark.parametrize("holder", ["first", "second"])
def test_marks_without_numbers(holder: str) -> None:
    """ComfyUI knows a model that predicts velocities by an empty tensor called ``v_pred``."""
    sides = [model(1), model(2)]
    sides[holder == "second"]["v_pred"] = torch.zeros(0)
    saved(one=sides[0], two=sides[1])
    made, result = merged("one", "two")
    assert made.keys() == sides[0].keys()
    assert any("1 tensor (v_pred) is not in every input; it" in note and "marks" in note for note in result.notes)


@pytest.mark.parametrize("second", [torch.tensor([9, 9, 9]), torch.tensor([9, 9]), None], ids=["bytes", "length", "none"])
def test_states_of_modules_are_the_firsts(second: torch.Tensor | None) -> None:
    """``get_extra_state`` of a module gives the bytes of a pickle (Transformer Engine), of which there is no mean."""
    name, first = "layers.0.attn._extra_state", torch.tensor([1, 2, 3], dtype=torch.uint8)
    other = {} if second is None else {name: second.to(torch.uint8)}
    saved(one={**model(1), name: first}, two={**model(2), **other})
    made, result = merged("one", "two")
    assert torch.equal(made[name], first)
    assert "_extra_state" in " ".join([*result.notes, *result.warnings])


@pytest.mark.parametrize("policy", ["error", "base", "drop"])
@pytest.mark.parametrize("holder", ["first", "second"])
def test_buffers_that_loaders_compute(holder: str, policy: str) -> None:
    buffers = {f"layers.{n}.self_attn.rotary_emb.inv_freq": draw(7, 2) for n in range(3)}
    buffers["layers.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    sides = [model(1), model(2)]
    sides[holder == "second"] |= buffers
    saved(one=sides[0], two=sides[1])
    made, result = merged("one", "two", on_missing=policy)
    assert made.keys() == sides[0].keys()
    for name in model(1):
        assert torch.equal(made[name], mean(sides[0][name], sides[1][name]))
    for name in buffers if holder == "first" else ():
        assert torch.equal(made[name], buffers[name])
    fate = "are kept as the first has them" if holder == "first" else "stay out, as the first lacks them"
    assert any(f"not in every input; they {fate}, since they are rotary frequencies" in note for note in result.notes)
    assert not result.warnings


@pytest.mark.parametrize("order", [("full", "pruned"), ("pruned", "full")])
def test_a_full_and_a_pruned_diffusion_model(order: tuple[str, str]) -> None:
    """Tools that prune a model leave out the schedule, and its loaders compute it."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 20) ** 2
    schedule = {"betas": betas, "sqrt_one_minus_alphas_cumprod": torch.sqrt(1 - torch.cumprod(1 - betas, 0))}
    schedule |= {"posterior_mean_coef1": draw(7, 20), "loss.logvar": torch.tensor(0.5)}
    saved(full=model(1) | schedule, pruned=model(2))
    made, result = merged(*order)
    assert made.keys() == (model(1) | schedule if order[0] == "full" else model(1)).keys()
    assert torch.equal(made["norm.weight"], mean(model(1)["norm.weight"], model(2)["norm.weight"]))
    assert all(torch.equal(made[name], tensor) for name, tensor in schedule.items() if name in made)
    assert any("noise schedule" in note for note in result.notes)


@pytest.mark.parametrize("holder", ["first", "second"])
def test_drop_leaves_out_what_an_input_lacks(holder: str) -> None:
    sides = [model(1), model(2)]
    sides[holder == "second"]["head.weight"] = draw(5, 4, 4)
    saved(one=sides[0], two=sides[1])
    made, result = merged("one", "two", on_missing="drop")
    assert made.keys() == model(1).keys()
    assert any("head.weight" in warning for warning in result.warnings)


def test_a_bias_is_no_mask() -> None:
    saved(one=model(1) | {"layers.0.attn.bias": draw(1, 4)}, two=model(2))
    with pytest.raises(sm.MismatchError, match=r"two\.safetensors lacks 1: layers\.0\.attn\.bias"):
        merged("one", "two")


@pytest.mark.parametrize("container", ["safetensors", "pth"])
def test_union_adds_what_only_a_later_model_has(container: str) -> None:
    states = {"a": model(1), "b": model(2) | {"head.b": draw(5, 3), "n": torch.tensor(7)}}
    states["c"] = model(3) | {"module.head.b": draw(6, 3), "head.c": draw(7, 2)}
    for name, tensors in states.items():
        torch.save({"model": tensors, "step": 1}, f"{name}.pth")
    result = sm.merge([f"{n}.pth" for n in states], f"out.{container}", on_missing="union", dtype="float64")
    path = Path(f"out.{container}")
    made = load_safetensors(path) if container == "safetensors" else torch.load(path, weights_only=True)["model"]
    assert container != "pth" or list(made) == [*model(1), "head.b", "n", "head.c"], "behind the first's names"
    assert torch.equal(made["head.b"], draw(5, 3).double()), "of the first model that has it"
    assert torch.equal(made["head.c"], draw(7, 2).double())
    assert torch.equal(made["n"], torch.tensor(7))
    assert torch.equal(made["norm.weight"], mean(*(draw(seed + 91, 4).double() for seed in (1, 2, 3))))
    assert any("b.pth has 2 that a.pth lacks (they are added): head.b, n" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("ours", "theirs", "others"),
    [
        ("bert.", "", {"pooler.w": "bert.pooler.w", "cls.w": "bert.cls.w"}),
        ("", "bert.", {"bert.pooler.w": "pooler.w", "cls.w": "cls.w"}),
        ("model.text.", "model.", {"model.pooler.w": "model.text.pooler.w", "score.w": "score.w"}),
    ],
)
def test_union_adds_by_the_names_of_the_first(ours: str, theirs: str, others: dict[str, str]) -> None:
    """A loader looks for what is added where the first's other tensors are."""
    saved(
        one=model(1, ours, layers=20) | {"head.w": draw(5, 3)},
        two=model(2, theirs, layers=20) | {name: draw(6, 2) for name in others},
    )
    made, _ = merged("one", "two", on_missing="union")
    assert made.keys() == model(1, ours, layers=20).keys() | {"head.w", *others.values()}
    assert all(torch.equal(made[name], draw(6, 2)) for name in others.values())
    torch.save(model(1, ours, layers=20), "one.pth")
    torch.save(model(2, theirs, layers=20) | {name: draw(6, 2) for name in others}, "two.pth")
    sm.merge(["one.pth", "two.pth"], "out.pth", on_missing="union")
    assert torch.load("out.pth").keys() == model(1, ours, layers=20).keys() | set(others.values())


def test_union_of_shards_of_the_same_file_names() -> None:
    """Added tensors go into a shard of the first; a shard of the other has the same name."""
    for folder, tensors in (("a", model(1)), ("b", model(2) | {"extra": draw(9, 3)})):
        save_file(tensors, "whole.safetensors")
        sm.convert("whole.safetensors", f"{folder}/", max_shard_size=100)
    sm.merge(["a", "b"], "out/", on_missing="union")
    index = sm.inspect("out/")
    assert set(index.entries) == {*model(1), "extra"}
    assert {path.name for path in Path("out").glob("*.safetensors")} == {p.name for p in Path("a").glob("*.safetensors")}


COPIES = {
    "a latent diffusion model": ("model.", lambda name: f"model_ema.{name.replace('.', '')}", "model_ema.num_updates"),
    "two models of a trainer": ("online_model.", lambda name: f"ema_model.{name}", "ema_model.n_averaged"),
    "a student and its teacher": ("student.", lambda name: f"teacher.{name}", "teacher.step"),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("container", ["safetensors", "pth"])
@pytest.mark.parametrize("holder", ["first", "second"])
def test_an_average_that_one_input_has_in_its_state_dict_is_left_out(kind: str, container: str, holder: str) -> None:
    prefix, called, counter = COPIES[kind]
    plain = [model(1, prefix), model(2, prefix)]
    average = {called(name): draw(number, 4) for number, name in enumerate(model(3))} | {counter: torch.tensor(5)}
    whole = [plain[0] | average, plain[1]] if holder == "first" else [plain[0], plain[1] | average]
    for name, tensors in zip("ab", whole, strict=True):
        torch.save({"state_dict": tensors, "epoch": 3}, f"{name}.pth")
    result = sm.merge(["a.pth", "b.pth"], f"out.{container}")
    path = Path(f"out.{container}")
    made = load_safetensors(path) if container == "safetensors" else torch.load(path, weights_only=True)["state_dict"]
    assert made.keys() == plain[0].keys()
    for name in plain[0]:
        assert torch.equal(made[name], mean(plain[0][name], plain[1][name]))
    said = "so it would be stale" if holder == "first" else "a running average, which a.pth lacks; "
    assert any(said in note and called("norm.weight").partition(".")[0] in note for note in result.notes)


def test_an_average_of_which_a_part_is_missing_is_no_copy() -> None:
    average = {f"teacher.{name}": draw(3, 4) for name in model(3)}
    some = dict(list(average.items())[:2])
    saved(one=model(1, "student.") | average, two=model(2, "student.") | some)
    with pytest.raises(sm.MismatchError, match=r"two\.safetensors lacks 3: teacher\."):
        merged("one", "two")


def test_a_teacher_without_a_student_is_a_part_of_the_model() -> None:
    saved(one=model(1) | {"teacher.head.weight": draw(5, 4)}, two=model(2))
    with pytest.raises(sm.MismatchError, match=r"two\.safetensors lacks 1: teacher\.head\.weight"):
        merged("one", "two")


def test_what_becomes_of_an_average_can_be_said() -> None:
    average = {f"ema.{name}": draw(3, 4) for name in model(3)}
    saved(one=model(1) | average, two=model(2))
    made, result = merged("one", "two", on_missing="base")
    assert torch.equal(made["ema.norm.weight"], average["ema.norm.weight"])
    assert any("lacks" in warning and "ema." in warning for warning in result.warnings)


@pytest.mark.parametrize("counter", ["n_averaged", "bn.num_batches_tracked", "ema.step"])
@pytest.mark.parametrize("policy", ["error", "drop"])
@pytest.mark.parametrize("holder", ["first", "second"])
def test_an_input_may_lack_a_counter(counter: str, policy: str, holder: str) -> None:
    sides = [model(1), model(2)]
    sides[holder == "second"][counter] = torch.tensor(70)
    saved(one=sides[0], two=sides[1])
    made, result = merged("one", "two", on_missing=policy)
    assert made.keys() == sides[0].keys()
    assert torch.equal(made["norm.weight"], mean(draw(92, 4), draw(93, 4)))
    if holder == "first":
        assert made[counter] == 70
    assert any(f"1 tensor ({counter}) is not in every input" in note and "counters" in note for note in result.notes)
    assert not result.warnings


def test_a_table_of_counts_is_no_counter() -> None:
    saved(one=model(1) | {"codes.count": draw(1, 4)}, two=model(2))
    with pytest.raises(sm.MismatchError, match=r"lacks 1: codes\.count"):
        merged("one", "two")


def test_a_module_that_is_added_has_its_counters(tmp_path: Path) -> None:
    """Its loader would find a name missing."""
    torch.save({"a.w": torch.ones(2), "a.num_batches_tracked": torch.tensor(1)}, tmp_path / "1.pth")
    more = {
        "b.running_mean": torch.ones(3),
        "b.num_batches_tracked": torch.tensor(4),
        "c.num_batches_tracked": torch.tensor(5),
    }
    torch.save({"a.w": torch.zeros(2), "a.num_batches_tracked": torch.tensor(2), **more}, tmp_path / "2.pth")
    sm.merge([tmp_path / "1.pth", tmp_path / "2.pth"], tmp_path / "out.pth", on_missing="union")
    made = torch.load(tmp_path / "out.pth")
    assert [*made] == ["a.w", "a.num_batches_tracked", "b.running_mean", "b.num_batches_tracked"]
    assert (made["a.num_batches_tracked"].item(), made["b.num_batches_tracked"].item()) == (2, 4)


def test_union_adds_whole_state_dicts(tmp_path: Path) -> None:
    """speakers_xtts.pth: a state dict for each speaker, by names that may hold dots."""
    voices = {
        (number, name): {"gpt_cond_latent": draw(number + len(name), 1, 4, 8), "speaker_embedding": draw(number, 1, 8, 1)}
        for number, name in ((1, "Ana Florence"), (1, "Bo"), (2, "Bo"), (2, "Dr. Who"), (2, "Cleo"))
    }
    for number in (1, 2):
        torch.save({name: voice for (file, name), voice in voices.items() if file == number}, tmp_path / f"{number}.pth")
    sm.merge([tmp_path / "1.pth", tmp_path / "2.pth"], tmp_path / "out.pth", on_missing="union")
    made = torch.load(tmp_path / "out.pth", weights_only=True)
    assert [*made] == ["Ana Florence", "Bo", "Dr. Who", "Cleo"]
    for part in ("gpt_cond_latent", "speaker_embedding"):
        assert torch.equal(made["Bo"][part], mean(voices[1, "Bo"][part], voices[2, "Bo"][part]))
        for number, name in ((1, "Ana Florence"), (2, "Dr. Who"), (2, "Cleo")):
            assert torch.equal(made[name][part], voices[number, name][part])
