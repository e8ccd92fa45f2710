"""Profiles of programs whose loaders ignore some tensors of their checkpoints.

A profile applies to checkpoints that are recognised, by what their trainer wrote beside the tensors or by names that only
that model has. It applies to no other checkpoint, even where that has tensors of such names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.tensors.names import bare


@dataclass(frozen=True, slots=True)
class Profile:
    """A program and its checkpoints.

    ``config_model``: what ``config["model"]`` says in a file of its trainer. ``names``: alternatives; in each, prefixes of
    tensor names that one checkpoint must all have. ``ignored``: prefixes of the tensors that its loader drops, without
    wrapper parts such as ``module.``.
    """

    name: str
    config_model: str
    names: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...]

    def ignores(self, name: str) -> bool:
        """Whether the program's loader drops the tensor of this name."""
        return bare(name).startswith(self.ignored)


PROFILES = (
    Profile(
        "XTTS",
        config_model="xtts",
        names=(("xtts.gpt.",), ("gpt.", "hifigan_decoder.")),  # as Coqui's trainer wraps it; as it is released
        ignored=("dvae.", "torch_mel_spectrogram_style_encoder.", "torch_mel_spectrogram_dvae."),
    ),
)


def profile_of(index: CheckpointIndex) -> Profile | None:
    """The profile that a checkpoint is recognised as."""
    config = index.extras.get("config") if isinstance(index.extras, dict) else None
    model = config.get("model") if isinstance(config, dict) else None
    for profile in PROFILES:
        if model == profile.config_model or any(_has(index.entries, prefixes) for prefixes in profile.names):
            return profile
    return None


def _has(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    """Whether each prefix begins a name, as it stands or without its wrapper parts."""
    found = {prefix for name in names for prefix in prefixes if name.startswith(prefix) or bare(name).startswith(prefix)}
    return len(found) == len(prefixes)
