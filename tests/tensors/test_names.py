"""What names say: wrappers, spellings, buffers that loaders ignore, counters."""

from __future__ import annotations

import pytest
import torch

from streammerge.tensors.names import bare, is_counter, spelled, why_ignored


def test_wrappers() -> None:
    assert bare("module._orig_mod.xtts.gpt.w") == "gpt.w"
    assert bare("model") == "model"
    assert bare("a.module.module.w") == "a.w"
    assert bare("layers.0._checkpoint_wrapped_module.attn._fsdp_wrapped_module.w") == "layers.0.attn.w"
    assert bare("_forward_module.w") == "w"
    assert bare("module.") == "module.", "nothing would be left"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_old_and_new_parametrizations(kind: str, name: str) -> None:
    """torch itself loads the one into the other; it is the oracle of the names."""
    if name == "bias" and kind == "spectral_norm":
        pytest.skip("it takes matrices")
    old = {"weight_norm": torch.nn.utils.weight_norm, "spectral_norm": torch.nn.utils.spectral_norm}[kind]
    new = getattr(torch.nn.utils.parametrizations, kind)
    states = [norm(torch.nn.Linear(4, 3), name).state_dict() for norm in (old, new)]
    one, two = ({spelled(f"m.{n}"): t.shape for n, t in state.items()} for state in states)
    assert one == two
    assert set(states[0]) != set(states[1])


def test_buffers_that_loaders_ignore() -> None:
    assert "rotary" in why_ignored("module.model.layers.0.self_attn.rotary_emb.inv_freq", (4,))
    assert "mask" in why_ignored("h.0.attn.bias", (1, 1, 8, 8))
    early = "decoder.block.0.layer.{}.relative_attention_bias.weight"
    assert "early T5" in why_ignored(early.format("1.EncDecAttention"), (32, 8))
    assert why_ignored(early.format("0.SelfAttention"), (32, 8)) == ""
    assert why_ignored("h.0.attn.bias", (8,)) == "", "a bias of an attention is a weight"
    assert why_ignored("h.0.attn.bias", (1, 1, 8, 9)) == ""
    assert why_ignored("dvae.codebook.embed", (3, 4)) == "", "only the loader of a recognised XTTS checkpoint drops it"
    assert why_ignored("encoder.position_ids_proj.weight", (3, 4)) == ""


def test_counters() -> None:
    assert is_counter("n_averaged")
    assert is_counter("bn.num_batches_tracked")
    assert not is_counter("step.weight")
    assert not is_counter("encoder.substep")
