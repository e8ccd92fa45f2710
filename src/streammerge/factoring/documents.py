"""PEFT's configuration of an adapter that is made here, and the names of whole tensors in its file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.adapters.config import CONFIG
from streammerge.checkpoints.config import Tree

WEIGHTS = "adapter_model.safetensors"
START = "base_model.model."
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""End of an architecture's name -> what PEFT calls its task."""
TIED_NAMES = ("embed_tokens", "lm_head")
"""Modules whose tie PEFT keeps."""
__all__ = ["CONFIG", "START", "TIED_NAMES", "WEIGHTS", "Document", "task_of"]


def task_of(tree: Tree) -> str | None:
    """Returns PEFT's name for the task of a base, by its configuration; None if it does not tell."""
    named = tree.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    if tree.get("vision_config") or tree.get("audio_config"):
        return None
    return next((task for ending, task in _TASKS.items() if first.endswith(ending)), None)


@dataclass(frozen=True, slots=True)
class Document:
    """What an adapter says beside its factors. ``base``: the base as its user calls it. ``modules``: all modules of the
    base that are known. ``alpha``: 0 is each module's rank. ``fan_in_fan_out``: whether weights are stored as [in, out].
    ``tied``: the modules of the base whose weights the head has too.
    """

    base: str | None = None
    task: str | None = None
    modules: Collection[str] = ()
    alpha: float = 0.0
    fan_in_fan_out: bool = False
    tied: Collection[str] = ()

    def text(self, ranks: Mapping[str, int], saved: Sequence[str], biased: bool) -> str:
        """Returns the configuration. ``ranks``: of each module. ``saved``: the modules that are stored whole. ``biased``:
        whether biases beside factors are stored too."""
        ranked = list(ranks.values())
        most = max(ranked, default=1)
        patterns = {self._pattern(name, ranks): rank for name, rank in ranks.items() if rank != most}
        content: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": self.task,
            "base_model_name_or_path": self.base,
            "r": most,
            "lora_alpha": self.alpha or most,
            "rank_pattern": patterns,
            "alpha_pattern": {} if self.alpha else patterns,
            "target_modules": self._targets(ranks),
            "modules_to_save": list(saved) or None,
            "bias": "lora_only" if biased else "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "use_rslora": False,
            "use_dora": False,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            **({"ensure_weight_tying": True} if self.ties(saved) or self.ties(ranks) else {}),
            "inference_mode": True,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def ties(self, modules: Collection[str]) -> bool:
        """Whether PEFT is to give the head the weights of one of these modules. It does so for certain names only."""
        return any(name in self.tied and name.rpartition(".")[2] in TIED_NAMES for name in modules)

    def _targets(self, ranks: Mapping[str, int]) -> list[str] | str:
        """PEFT compares the end of a module's name. If that would find more modules, returns a pattern of whole names."""
        endings = {each[place + 1 :] for each in self.modules for place, letter in enumerate(each) if letter == "."}
        if endings.isdisjoint(ranks):
            return list(ranks)
        return "|".join(map(re.escape, ranks))

    @staticmethod
    def _pattern(name: str, ranks: Mapping[str, int]) -> str:
        return f"^{name}" if any(each.endswith(f".{name}") for each in ranks) else name
