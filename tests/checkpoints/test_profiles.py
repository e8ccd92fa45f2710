"""Which checkpoints are recognised, and whose tensors may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.profiles import profile_of

HALF = {"gpt.text_head.weight": torch.ones(2, 3), "hifigan_decoder.conv.bias": torch.ones(3)}
"""Names as the released XTTS-v2 has them."""
EXTRA = {
    "dvae.codebook.embed": torch.full((4,), 7.0),
    "torch_mel_spectrogram_style_encoder.mel_stats": torch.full((2,), 8.0),
    "torch_mel_spectrogram_dvae.mel_stats": torch.full((2,), 9.0),
}
"""What Coqui's trainer saves beside it, and what XTTS does not load."""


def wrapped(tensors: dict[str, torch.Tensor], by: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"xtts.{name}": value * by for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("content", "known"),
    [
        ({"model": HALF}, True),
        (HALF, True),
        ({"model": wrapped(HALF) | EXTRA}, True),
        ({"model": {f"module.{name}": value for name, value in wrapped(HALF).items()}}, True),
        ({"model": {"xtts.gpt.w": torch.ones(1)}}, True),
        ({"model": {"any": torch.ones(1)}, "config": {"model": "xtts"}}, True),
        ({"model": {"any": torch.ones(1)}, "config": {"model": "vits"}}, False),
        ({"model": {"any": torch.ones(1)}, "config": "xtts"}, False),
        ({"model": EXTRA}, False),
        ({"model": {"gpt.w": torch.ones(1)} | EXTRA}, False),
        ({"model": {"hifigan_decoder.w": torch.ones(1)} | EXTRA}, False),
        ({"model": {"decoder.gpt.w": torch.ones(1), "hifigan_decoder.w": torch.ones(1)}}, False),
    ],
)
def test_what_is_recognised(tmp_path: Path, content: dict[str, Any], known: bool) -> None:
    torch.save(content, tmp_path / "some.pth")
    profile = profile_of(sm.inspect(tmp_path / "some.pth"))
    assert (profile.name if profile else None) == ("XTTS" if known else None)


def test_names_are_enough_where_nothing_stands_beside_them(tmp_path: Path) -> None:
    save_file(HALF, tmp_path / "some.safetensors")
    assert profile_of(sm.inspect(tmp_path / "some.safetensors")) is not None


def two(tmp_path: Path, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[Path]:
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    save_file(one, paths[0])
    save_file(other, paths[1])
    return paths


def test_a_recognised_model_may_lack_what_its_loader_ignores(tmp_path: Path) -> None:
    paths = two(tmp_path, wrapped(HALF, 3.0) | EXTRA, HALF)
    result = sm.merge(paths, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), wrapped(HALF, 2.0) | EXTRA)
    assert any("3 tensors that the XTTS loader ignores" in note for note in result.notes)


def test_further_ones_of_another_input_are_left_out(tmp_path: Path) -> None:
    sm.merge(two(tmp_path, HALF, wrapped(HALF, 3.0) | EXTRA), tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), {n: 2 * t for n, t in HALF.items()})


def test_all_else_of_a_recognised_model_may_not_be_missing(tmp_path: Path) -> None:
    paths = two(tmp_path, HALF | EXTRA | {"dvae_like.w": torch.ones(1)}, HALF)
    with pytest.raises(sm.MismatchError, match=r"lacks 1: dvae_like\.w"):
        sm.plan(paths)


@pytest.mark.parametrize("swapped", [False, True])
def test_of_any_other_model_nothing_may_be_missing(tmp_path: Path, swapped: bool) -> None:
    plain = {"encoder.w": torch.ones(2, 3)}
    paths = two(tmp_path, plain | EXTRA, plain)
    with pytest.raises(sm.MismatchError, match=r"dvae\.codebook\.embed"):
        sm.plan(paths[::-1] if swapped else paths)


def test_policies_hold_for_other_models_as_for_any_tensor(tmp_path: Path) -> None:
    plain = {"encoder.w": torch.ones(2, 3)}
    sm.merge(two(tmp_path, plain | EXTRA, plain), tmp_path / "out.safetensors", on_missing="drop")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), plain)


POSTERIOR = {"enc_q.pre.weight": torch.full((4, 4, 1), 7.0), "enc_q.enc.cond_layer.bias": torch.full((4,), 8.0)}


def voice(*own: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((3,), 2.0) for name in (*own, "flow.flows.0.pre.weight", "dec.conv_pre.bias")}


@pytest.mark.parametrize(
    "own", [["enc_p.emb_phone.weight"], ["enc_p.ssl_proj.weight"], ["enc_p.proj.weight", "emb_uv.weight"]]
)
@pytest.mark.parametrize("trained_first", [True, False])
def test_a_trained_and_an_exported_voice(tmp_path: Path, own: list[str], trained_first: bool) -> None:
    """RVC, GPT-SoVITS and so-vits-svc leave the posterior encoder out of the models that they export."""
    trained, exported = voice(*own) | POSTERIOR, {name: tensor * 2 for name, tensor in voice(*own).items()}
    sides = [trained, exported] if trained_first else [exported, trained]
    result = sm.merge(two(tmp_path, *sides), tmp_path / "out.safetensors")
    mean = {name: tensor * 1.5 for name, tensor in voice(*own).items()}
    assert_same(load_safetensors(tmp_path / "out.safetensors"), mean | (POSTERIOR if trained_first else {}))
    said = [note for note in result.notes if "enc_q" in note and "ignores" in note]
    assert len(said) == trained_first


def test_another_model_may_not_lack_a_module_of_that_name(tmp_path: Path) -> None:
    """VITS itself converts voices with its posterior encoder."""
    plain = voice("enc_p.emb.weight")
    with pytest.raises(sm.MismatchError, match="enc_q"):
        sm.merge(two(tmp_path, plain | POSTERIOR, plain), tmp_path / "out.safetensors")
