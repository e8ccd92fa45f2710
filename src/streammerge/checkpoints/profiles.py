"""Profiles of programs whose loaders ignore some tensors of their checkpoints.

A profile applies only to checkpoints that it recognises, by data that the trainer wrote beside the tensors or by names that
only that model has. It does not apply to other checkpoints that have some tensors of the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.tensors.names import bare


@dataclass(frozen=True, slots=True)
class Profile:
    """A program and its checkpoints.

    ``names``: alternative sets of prefixes; a checkpoint matches a set if it has tensor names with each of its prefixes.
    ``ignored``: prefixes of the tensors that the loader drops, without wrapper parts such as ``module.``.
    ``config_model``: the value of ``config["model"]`` in a file of its trainer, "" if it writes none.
    """

    name: str
    names: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...]
    config_model: str = ""

    def ignores(self, name: str) -> bool:
        """Whether the program's loader drops the tensor of this name."""
        return bare(name).startswith(self.ignored)


PROFILES = (
    Profile(
        "XTTS",
        names=(("xtts.gpt.",), ("gpt.", "hifigan_decoder.")),  # written by Coqui's trainer; as released
        ignored=("dvae.", "torch_mel_spectrogram_style_encoder.", "torch_mel_spectrogram_dvae."),
        config_model="xtts",
    ),
    Profile(
        "RVC, GPT-SoVITS or so-vits-svc",
        names=(("enc_p.emb_phone.", "flow."), ("enc_p.ssl_proj.", "flow."), ("enc_p.", "emb_uv.", "flow.")),
        ignored=("enc_q.",),  # the posterior encoder, which only training uses; what they export has none
    ),
)


def profile_of(index: CheckpointIndex) -> Profile | None:
    """Returns the profile that recognises a checkpoint, None if there is none."""
    config = index.extras.get("config") if isinstance(index.extras, dict) else None
    model = config.get("model") if isinstance(config, dict) else None
    for profile in PROFILES:
        if (profile.config_model and model == profile.config_model) or any(
            _has(index.entries, prefixes) for prefixes in profile.names
        ):
            return profile
    return None


def _has(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    """Whether each prefix begins at least one name, with or without the name's wrapper parts."""
    found = {prefix for name in names for prefix in prefixes if name.startswith(prefix) or bare(name).startswith(prefix)}
    return len(found) == len(prefixes)
