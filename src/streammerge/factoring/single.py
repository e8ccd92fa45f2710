"""An adapter as one file, in the dialect of the first adapter that it is made of: its names, and its metadata.

Loaders know the scale of an update by an alpha beside its factors, or take 1 where a dialect has none. So an alpha is
written where the first adapter has them, the same for all modules, since diffusers 0.42 mistakes alphas that differ for
the most frequent one. It is the most frequent rank, so that most updates are the products of their factors, for programs
that forget the alpha too. The rest of a scale is multiplied into the second factor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from streammerge.adapters.modules import METADATA_KEY, Adapter, Module
from streammerge.errors import MismatchError, printable
from streammerge.factoring.layers import Keys, Layer
from streammerge.factoring.naming import is_flat
from streammerge.formats.records import RECEIPT_KEY, RECIPE_KEY
from streammerge.tensors.dtypes import DType

_BETWEEN = ("A", "B"), ("embedding A", "embedding B")
_SPOKEN = ("ss_", "sshs_", "modelspec.")
_FACTS = (
    *("ss_base_model_version", "ss_v2", "ss_network_module", "modelspec.sai_model_spec", "modelspec.architecture"),
    *("modelspec.implementation", "modelspec.prediction_type", "modelspec.resolution"),
)
"""Metadata of Kohya's trainers that say what the adapter is for. All others are about one training."""
_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "prior.")
"""How diffusers' names of modules begin."""


class _Template(NamedTuple):
    """How a file calls the factors of a module: what stands before and behind its name."""

    start: str
    down: str
    up: str
    alpha: str


@dataclass(frozen=True, slots=True)
class SingleFile:
    """The file that an adapter is written as. ``first``: the adapter whose dialect it has. ``alpha``: that of all modules,
    of the dtype ``alpha_dtype``; 0 for a file without alphas. ``facts``: the metadata that do not depend on ranks.
    ``dtype``: of modules that the first adapter lacks."""

    first: Adapter
    template: _Template
    alpha_dtype: DType
    facts: Mapping[str, str]
    dtype: DType
    alpha: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def like(cls, adapters: Sequence[Adapter], alphas: Iterable[float]) -> SingleFile:
        """Returns the file that is like that of the first adapter. ``alphas``: what would suit each module."""
        first = adapters[0]
        dtypes = [part.spec.dtype for module in first.modules for name, part in module.parts.items() if part.spec.shape]
        narrow = not dtypes or dtypes[0].element_bytes < 2
        theirs = [first.index[key].spec.dtype for module in first.modules for key in module.keys if _is_alpha(key)]
        has_alphas = bool(theirs) and METADATA_KEY not in first.index.metadata
        facts, warnings = _facts(adapters)
        if narrow and dtypes:
            warnings.append(f"{first.where} is stored as {dtypes[0].torch_name}; its merge is stored as bfloat16")
        return cls(
            first,
            _template(first),
            theirs[0] if theirs else DType.F32,
            facts,
            (DType.BF16 if dtypes else DType.F32) if narrow else dtypes[0],
            max(Counter(alphas).items(), key=lambda each: each[1], default=(1.0, 0))[0] if has_alphas else 0.0,
            warnings,
        )

    def dtype_of(self, module: Module) -> DType:
        """Returns the dtype of the factors of a module of the first adapter."""
        found = next((part.spec.dtype for part in module.parts.values() if part.spec.shape), self.dtype)
        return found if found.element_bytes >= 2 else self.dtype

    def keys(self, name: str, module: Module | None, embedding: bool) -> Keys:
        """Returns the names of the factors of a module. ``module``: as the first adapter has it, None if it lacks it."""
        start, down, up, alpha = self.template
        if embedding:
            down, up = ".lora_embedding_A", ".lora_embedding_B"
        down, up, alpha = (start + name + ending for ending in (down, up, alpha))
        if module is not None:
            own = dict(zip(module.parts, module.keys, strict=False))
            pair = next((pair for pair in _BETWEEN if pair[0] in own and pair[1] in own), None)
            if pair is not None:
                down, up = own[pair[0]], own[pair[1]]
            alpha = next(filter(_is_alpha, module.keys), alpha)
        return Keys(down, up, alpha, self.alpha, self.alpha_dtype) if self.alpha else Keys(down, up)

    def metadata(self, layers: Sequence[Layer], ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the metadata for modules of these ranks, by the names of their tensors."""
        made = dict(self.facts)
        if any(key.startswith("ss_") for key in self.first.index.metadata):
            made |= self._network(layers, ranks)
        if METADATA_KEY in self.first.index.metadata or self._may_be_misread(ranks):
            made[METADATA_KEY] = _configurations(
                layers, ranks, '"r"' not in self.first.index.metadata.get(METADATA_KEY, "")
            )
        return made | {"format": "pt"}

    def _network(self, layers: Sequence[Layer], ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns what Kohya's programs say about ranks and alphas."""
        made = {"ss_network_module": "networks.lora"}
        spans = {}
        for kind, wanted in (("linear", False), ("conv", True)):
            chosen = [each for each in layers if (each.shape[2:] > (1,) * len(each.shape[2:])) is wanted]
            found = [each for each in chosen if ranks.get(each.name)]
            dims = {ranks[each.name] for each in found}
            spans[kind] = _said(dims), f"{self.alpha:g}" if self.alpha else _said(dims)
        linear = spans["linear"] if spans["linear"][0] else spans["conv"]
        made |= {"ss_network_dim": linear[0], "ss_network_alpha": linear[1]}
        if spans["conv"][0]:
            made["ss_network_args"] = json.dumps({"conv_dim": spans["conv"][0], "conv_alpha": spans["conv"][1]})
        return made

    def _may_be_misread(self, ranks: Mapping[str, int]) -> bool:
        """Whether releases of diffusers before 0.42 would take one alpha for modules of several ranks."""
        return not self.alpha and len({*ranks.values()}) > 1 and all(name.startswith(_COMPONENTS) for name in ranks)


def _is_alpha(key: str) -> bool:
    return key.endswith(".alpha")


def _said(values: set[Any]) -> str:
    """Returns the one value as a text, "Dynamic" for several, as Kohya's programs say it, "" for none."""
    return "" if not values else f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"


def _template(first: Adapter) -> _Template:
    """Returns how the first adapter calls factors: by an example, or as Kohya does."""
    start = ""
    for module in first.modules:
        own = dict(zip(module.parts, module.keys, strict=False))
        before, found, _ = module.keys[0].partition(module.name)
        start = before if found else start
        if "A" in own and "B" in own and found:
            down, up = (own[part].removeprefix(before + module.name) for part in ("A", "B"))
            return _Template(before, down, up, ".alpha")
    dotted = first.modules and not is_flat(first.modules[0].name)
    if dotted and first.dialect.startswith("PEFT"):
        return _Template(start, ".lora_A.weight", ".lora_B.weight", ".alpha")
    return _Template(start, ".lora_down.weight", ".lora_up.weight", ".alpha")


def _facts(adapters: Sequence[Adapter]) -> tuple[dict[str, str], list[str]]:
    """Returns the metadata that hold for the merge too: those of the first that are no hash, and about no single training.
    Warns about adapters that say to be for different models."""
    first, others = adapters[0].index.metadata, [each.index.metadata for each in adapters[1:]]
    kept, warnings = {}, []
    for key, value in first.items():
        if "hash" in key.lower() or key in (RECIPE_KEY, RECEIPT_KEY, METADATA_KEY, "format", *_NETWORK):
            continue
        other = next((place for place, each in enumerate(others, 1) if each.get(key, value) != value), None)
        if key in _FACTS and other is not None:
            warnings.append(
                f"'{printable(key)}' differs: {printable(value, 60)} in {adapters[0].where}, "
                f"{printable(others[other - 1][key], 60)} in {adapters[other].where}; the first is kept"
            )
        agreed = all(each.get(key) == value for each in others)
        if key in _FACTS or agreed or not key.startswith(_SPOKEN):
            kept[key] = value
    return kept, warnings


def _configurations(layers: Sequence[Layer], ranks: Mapping[str, int], components: bool) -> str:
    """Returns the metadata by which diffusers knows ranks and scales: PEFT's configuration, maybe one for each component
    of a pipeline, with whose name the modules begin."""
    groups: dict[str, dict[str, int]] = {}
    for layer in layers:
        if ranks.get(layer.name):
            component, _, inner = layer.module.partition(".") if components else ("", "", layer.module)
            groups.setdefault(component, {})[inner] = ranks[layer.name]
    made: dict[str, Any] = {}
    for component, found in groups.items():
        most = max(found.values())
        patterns = {name: rank for name, rank in found.items() if rank != most}
        values = {
            "peft_type": "LORA",
            "r": most,
            "lora_alpha": most,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": sorted(found),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }
        made |= {f"{component}.{key}" if component else key: value for key, value in values.items()}
    return json.dumps(made, sort_keys=True)


def refuse_first(adapters: Sequence[Adapter]) -> None:
    """Raises MismatchError if the first adapter is no file, whose dialect the result could have."""
    first = adapters[0]
    if first.config is not None and METADATA_KEY not in first.index.metadata:
        raise MismatchError(
            f"{first.where} is an adapter in PEFT's form, whose configuration stands beside it, so the merge is a folder "
            "too; give a name that ends in /, or a single file first"
        )
