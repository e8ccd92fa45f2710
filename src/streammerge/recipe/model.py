"""The classes of a recipe. Their fields are its keys: mergekit's configuration, and streammerge's additions.

Recipes from the command line, the Python API and files are equal if they say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from streammerge.methods.contracts import MergeMethod
from streammerge.options.base import options_of
from streammerge.options.converting import Converting
from streammerge.options.functions import MERGE
from streammerge.recipe.adapted import resolved
from streammerge.recipe.experts import ARCHITECTURE, COUNT, GATE, Expert
from streammerge.recipe.extraction import Extraction
from streammerge.recipe.fields import (
    TEXT,
    TRUTH,
    WHOLE,
    FormOf,
    ListOf,
    MapOf,
    Path,
    Plain,
    Positions,
    key,
    one_of,
    option_key,
    position_of,
)
from streammerge.recipe.patterns import Pattern, Rename
from streammerge.recipe.scalars import COMPUTE, DTYPE, LAYER_RANGE, METHOD, MODEL, PATTERN, RENAME, SIZE, parameter_docs
from streammerge.recipe.settings import Settings, SettingsKind
from streammerge.recipe.vocabulary import TEMPLATE, Tokenizer
from streammerge.tensors.dtypes import DType

_OPTIONS = options_of(Converting, *MERGE)


def _chosen(name: str) -> Any:
    """A key that takes one of the choices of the option of that name."""
    return option_key(one_of(_OPTIONS[name].choices), _OPTIONS[name])


class Reference(NamedTuple):
    """A checkpoint as the user named it; optionally one of its state dicts, and other names for its tensors."""

    path: str
    state_dict: str | None = None
    rename: tuple[Rename, ...] = ()

    def same(self, other: Reference) -> bool:
        alike = self.state_dict == other.state_dict and self.rename == other.rename
        return alike and resolved(self.path) == resolved(other.path)


SETTINGS = SettingsKind(parameter_docs)


def _misplaced() -> dict[str, str]:
    """Keys that mergekit ignores in a mapping that has a key ``parameters``. A function, because it imports all methods."""
    return dict.fromkeys(parameter_docs(), "a parameter stands under parameters")


_WITH_MODEL = dict.fromkeys(("lora", "adapter"), "model, as in `model: BASE+ADAPTER`")
"""Keys that mergekit ignores too. They are refused, because the adapter would be missing in the output."""


@dataclass(frozen=True)
class Model:
    """One model of a merge, or the base among them. A text is its path."""

    SHORT: ClassVar = "model"
    IGNORED: ClassVar = _misplaced
    ELSEWHERE: ClassVar = _WITH_MODEL

    model: str = key(MODEL, "Path of a file or folder.")
    parameters: Settings = key(SETTINGS, "This model's own parameters, such as weight.", default_factory=dict)
    state_dict: str | None = key(TEXT, "State dict inside a wrapped file; by default found automatically.", default=None)
    rename: tuple[Rename, ...] = key(RENAME, "Other names for this model's tensors; applied first.", default=())
    path: Path = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class SliceSource:
    """Some layers of a model, for a slice."""

    IGNORED: ClassVar = _misplaced
    ELSEWHERE: ClassVar = _WITH_MODEL

    model: str = key(MODEL, "Path of a file or folder.")
    layer_range: tuple[int, int] = key(LAYER_RANGE, "First layer, and the layer after the last.")
    parameters: Settings = key(SETTINGS, "This model's own parameters in the slice.", default_factory=dict)
    state_dict: str | None = key(TEXT, "State dict inside a wrapped file; by default found automatically.", default=None)
    rename: tuple[Rename, ...] = key(RENAME, "Other names for this model's tensors; applied first.", default=())
    path: Path = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output."""

    IGNORED: ClassVar = _misplaced

    sources: tuple[SliceSource, ...] = key(ListOf(FormOf(SliceSource)), "The layers to merge.")
    base_model: str | None = key(MODEL, "The base in this slice.", default=None)
    parameters: Settings = key(SETTINGS, "Parameters in this slice.", default_factory=dict)
    residual_weight: Any = key(
        Plain("a number", float, {"type": "number"}), "Accepted and ignored, as in mergekit.", default=None
    )
    path: Path = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Module:
    """A part of the model with its own count of layers, named by the prefix of its tensors' names."""

    IGNORED: ClassVar = _misplaced

    models: tuple[Model, ...] = key(ListOf(FormOf(Model)), "The models to merge, with all their layers.", default=())
    slices: tuple[Slice, ...] = key(ListOf(FormOf(Slice)), "Stacked layers of models.", default=())
    parameters: Settings = key(SETTINGS, "Parameters in this module.", default_factory=dict)
    path: Path = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Rule:
    """An action for the tensors that a pattern matches. The first rule that matches is used."""

    MEANT: ClassVar = {"filter": "match", "pattern": "match", "method": "merge_method", "model": "copy"}

    match: tuple[Pattern, ...] = key(ListOf(PATTERN, or_one=True), "Globs on tensor names, or /regular expressions/.")
    copy: str | None = key(MODEL, "Copy the tensor from this model.", default=None)
    rename: tuple[Rename, ...] = key(RENAME, "Other names for the tensors of the model to copy from.", default=())
    drop: bool = key(TRUTH, "Leave the tensor out.", default=False)
    merge_method: MergeMethod | None = key(METHOD, "Merge with this method.", default=None)
    parameters: Settings = key(
        SETTINGS, "Parameters for these tensors; a list has one value per model.", default_factory=dict
    )
    dtype: DType | None = key(DTYPE, "Dtype of the output.", default=None)
    path: Path = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return ", ".join(map(str, self.match))

    def takes(self, name: str) -> bool:
        """Whether one of its patterns matches the name."""
        for pattern in self.match:  # noqa: SIM110 - this runs for every tensor and rule, and any() takes twice as long
            if pattern.matches(name):
                return True
        return False

    @property
    def action(self) -> str:
        if self.drop:
            return "left out"
        what = (
            f"copied from {self.copy}" if self.copy else f"by {self.merge_method.name}" if self.merge_method else "merged"
        )
        return what + (f" as {self.dtype.torch_name}" if self.dtype else "")


@dataclass(frozen=True)
class OutputRequest:
    """How the output is written."""

    max_shard_size: int | None = option_key(SIZE, _OPTIONS["max_shard_size"])
    keep_optimizer: bool = option_key(TRUTH, _OPTIONS["keep_optimizer"], default=False)
    strip_prefix: str = option_key(TEXT, _OPTIONS["strip_prefix"], default="")
    card: bool = option_key(TRUTH, _OPTIONS["card"], default=True)
    only: bool = key(TRUTH, "Leave out of a .pth what holds other tensors than the chosen state dict.", default=False)
    container: str = key(
        one_of(("base", "first")),
        "Which checkpoint gives names, shapes, dtypes and files: the base (without one, the first model), as in mergekit; "
        "or the first model.",
        default="base",
    )


_STAGES = MapOf(FormOf(object))
"""Recipes by name. Their form is set below, because a recipe holds them."""


def _ignored() -> dict[str, str]:
    return _misplaced() | {
        "random_seed": "`seed` is the key here",
        "embed_slerp": "embeddings are merged like all other tensors",
    }


@dataclass(frozen=True)
class Recipe:
    """A merge or a conversion: everything besides the inputs that its output depends on.

    ``positions``: the positions of the keys in their file. ``written``: the names of the models in that file.
    ``ignored``: what has no effect in it, as sentences. ``is_read``: whether it was read as a recipe, and not made of
    arguments.
    """

    REFUSED: ClassVar = {
        "out_path": "name the output with `out`",
    }
    ELSEWHERE: ClassVar = dict.fromkeys(OutputRequest.__dataclass_fields__, "output")
    IGNORED: ClassVar = _ignored
    MEANT: ClassVar = {"method": "merge_method", "base": "base_model", "weights": "models", "inputs": "models"}

    merge_method: MergeMethod = key(METHOD, "A name from `streammerge methods`, or package.module:function.")
    models: tuple[Model, ...] = key(ListOf(FormOf(Model)), "The models to merge, with all their layers.", default=())
    slices: tuple[Slice, ...] = key(ListOf(FormOf(Slice)), "Stacked layers of models.", default=())
    modules: Mapping[str, Module] = key(
        MapOf(FormOf(Module)), "Name prefix -> models or slices of that module.", default_factory=dict
    )
    base_model: str | None = key(MODEL, "The models' common ancestor.", default=None)
    parameters: Settings = key(SETTINGS, "Parameters of the method.", default_factory=dict)
    tokenizer_source: str | None = option_key(MODEL, _OPTIONS["tokenizer_source"])
    tokenizer: Tokenizer | None = key(FormOf(Tokenizer), "The same, with a source for single tokens.", default=None)
    chat_template: str | None = option_key(TEMPLATE, _OPTIONS["chat_template"])
    name: str | None = key(
        TEXT, "What later documents of the file call it as a model; otherwise a name for people.", default=None
    )
    stages: Mapping[str, Recipe] = key(
        _STAGES, "Name -> a recipe. The name stands for its result wherever a model may stand.", default_factory=dict
    )
    experts: tuple[Expert, ...] = key(
        ListOf(FormOf(Expert)),
        "Instead of models: the experts of a mixture, whose other tensors are the base's.",
        default=(),
    )
    shared_experts: tuple[Expert, ...] = key(ListOf(FormOf(Expert)), "The expert that always takes part.", default=())
    gate_mode: str = key(GATE, "How the routers of a mixture are made.", default="hidden")
    gate_file: str | None = key(MODEL, "A file of routers, [layers, experts, hidden size].", default=None)
    experts_per_token: int | None = key(COUNT, "How many experts a router chooses; by default 2.", default=None)
    architecture: str | None = key(ARCHITECTURE, "What the mixture is; by default what fits the models.", default=None)
    fused_experts: bool = key(
        TRUTH,
        "Whether the experts of a layer are one tensor, as transformers 5 has them in memory and mergekit writes them.",
        default=False,
    )
    round: bool = key(
        TRUTH, "Whether a stage's result is rounded to its dtype, as in a file, before others take it.", default=True
    )
    rank: int | None = key(
        COUNT,
        "Rank of the adapter that is made; by default the highest of the adapters that it is made of, or for the method "
        "extract 64.",
        default=None,
    )
    extract: Extraction = key(
        FormOf(Extraction), "For the method extract: what the adapter holds.", default_factory=Extraction
    )
    rules: tuple[Rule, ...] = key(ListOf(FormOf(Rule), least=0), "Other ways for some tensors.", default=())
    dtype: DType | None = option_key(DTYPE, _OPTIONS["dtype"])
    out_dtype: DType | None = option_key(DTYPE, _OPTIONS["out_dtype"])
    compute_dtype: DType | None = option_key(COMPUTE, _OPTIONS["compute_dtype"])
    state_dict: str | None = option_key(TEXT, _OPTIONS["state_dict"])
    ema: str = _chosen("ema")
    rename: tuple[Rename, ...] = option_key(RENAME, _OPTIONS["rename"], default=())
    on_missing: str = _chosen("on_missing")
    on_shape: str = _chosen("on_shape")
    integers: str | None = _chosen("integers")
    mixed_dtypes: str | None = _chosen("mixed_dtypes")
    unsafe_truncate_embeddings: bool = option_key(TRUTH, _OPTIONS["unsafe_truncate_embeddings"], default=False)
    quantise: str | None = _chosen("quantise")
    allow_nonfinite: bool = option_key(TRUTH, _OPTIONS["allow_nonfinite"], default=False)
    output: OutputRequest = key(FormOf(OutputRequest), "How the output is written.", default_factory=OutputRequest)
    seed: int = option_key(WHOLE, _OPTIONS["seed"], default=0)
    positions: Positions = field(default_factory=dict, compare=False, repr=False)
    written: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    ignored: tuple[str, ...] = field(default=(), compare=False, repr=False)
    is_read: bool = field(default=False, compare=False, repr=False)

    def at(self, path: Path) -> str:
        """Returns ``recipe.yaml:12:3: `` for a key that was read from a file; empty otherwise."""
        return str(position_of(path, self.positions) or "")

    @cached_property
    def entries(self) -> tuple[Model | SliceSource, ...]:
        """Every named model, slices and modules included, in their order."""
        found: list[Model | SliceSource] = list(self.models)
        found += [source for each in self.slices for source in each.sources]
        for module in self.modules.values():
            found += [*module.models, *(source for each in module.slices for source in each.sources)]
        return tuple(found)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The paths of the models, as the user named them."""
        return tuple(entry.model for entry in self.entries)

    def reference(self, model: str, state_dict: str | None = None, rename: tuple[Rename, ...] = ()) -> Reference:
        return Reference(model, state_dict or self.state_dict, (*rename, *self.rename))

    def of(self, entry: Model | SliceSource) -> Reference:
        return self.reference(entry.model, entry.state_dict, entry.rename)

    @cached_property
    def base(self) -> Reference | None:
        """The base. If it is a model too, it is read as that entry says."""
        if self.base_model is None:
            return None
        named = self.reference(self.base_model)
        paths = (self.of(e) for e in self.entries if resolved(e.model) == resolved(named.path))
        return next(paths, named)

    @property
    def based(self) -> bool:
        """Whether the method takes the base separately from the models."""
        return self.base_model is not None and self.merge_method.takes_base

    def base_apart(self, listed: bool) -> bool:
        """Whether the base is not a model: the method takes it separately, or only a rule needs it.

        ``listed``: whether the base is also listed as a model. A base that is in no other role is one more model, as in
        mergekit.
        """
        ruled = any(rule.merge_method and rule.merge_method.base == "required" for rule in self.rules)
        return self.based or (not listed and ruled and self.merge_method.base == "unused")

    @cached_property
    def checkpoints(self) -> tuple[Reference, ...]:
        """All checkpoints to read, each once: the one that gives the container, then the base, then the models."""
        wanted = [] if self.base is None else [self.base]
        if self.output.container == "first":
            wanted.insert(0, self.of(self.entries[0]))
        wanted += [self.of(entry) for entry in self.entries]
        wanted += [self.reference(s.base_model) for s in self._all_slices if s.base_model]
        wanted += [self.copied(rule.copy, rule.rename) for rule in self.rules if rule.copy]
        wanted += [self.reference(each.source_model) for each in (*self.experts, *self.shared_experts)]
        wanted += [self.reference(self.gate_file)] if self.gate_file else []
        found: list[Reference] = []
        for each in wanted:
            if not any(each.same(known) for known in found):
                found.append(each)
        return tuple(found)

    @property
    def _all_slices(self) -> list[Slice]:
        return [*self.slices, *(each for module in self.modules.values() for each in module.slices)]

    def copied(self, model: str, rename: tuple[Rename, ...] = ()) -> Reference:
        """Returns the checkpoint that a rule's ``copy`` names: a model as its entry reads it, or another checkpoint."""
        if rename:
            return self.reference(model, rename=rename)
        place = resolved(model)
        paths = (self.of(entry) for entry in self.entries if resolved(entry.model) == place)
        return next(paths, self.reference(model))

    @property
    def tokens(self) -> Tokenizer | None:
        """Whose tokens the output has; None if the recipe does not say it."""
        return Tokenizer(self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    @property
    def promotes(self) -> bool:
        """Whether tensors that have several dtypes in the inputs get one that holds all of them, as in mergekit."""
        asked = self.mixed_dtypes or ("promote" if self.is_read else "first")
        return asked == "promote" and self.recast is None

    @property
    def recast(self) -> DType | None:
        """The requested dtype."""
        return self.out_dtype or self.dtype

    def output_name(self, name: str) -> str:
        prefix = self.output.strip_prefix
        return name[len(prefix) :] if prefix and name.startswith(prefix) else name

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as plain data, without keys that have their default."""
        return FormOf(Recipe).dump(self)  # type: ignore[no-any-return]

    def renamed(self, names: Mapping[str, str]) -> Recipe:
        """Returns the same recipe with other names for its models."""

        def entry(each: Any) -> Any:
            return replace(each, model=names[each.model])

        def part(each: Slice) -> Slice:
            base = names[each.base_model] if each.base_model else None
            return replace(each, sources=tuple(map(entry, each.sources)), base_model=base)

        modules = {
            name: replace(m, models=tuple(map(entry, m.models)), slices=tuple(map(part, m.slices)))
            for name, m in self.modules.items()
        }
        return replace(
            self,
            models=tuple(map(entry, self.models)),
            slices=tuple(map(part, self.slices)),
            modules=modules,
            base_model=names[self.base_model] if self.base_model else None,
            tokenizer_source=names.get(self.tokenizer_source or "", self.tokenizer_source),
            tokenizer=self.tokenizer and self.tokenizer.with_models(lambda name: names[name]),
            rules=tuple(replace(r, copy=names[r.copy]) if r.copy else r for r in self.rules),
            experts=tuple(replace(each, source_model=names[each.source_model]) for each in self.experts),
            shared_experts=tuple(replace(each, source_model=names[each.source_model]) for each in self.shared_experts),
            gate_file=names[self.gate_file] if self.gate_file else None,
            stages={name: stage.renamed(names) for name, stage in self.stages.items()},
        )

    @property
    def named_models(self) -> list[str]:
        """Every path in the recipe and its stages, as written."""
        return list(dict.fromkeys(named for each in (self, *self.stages.values()) for named in each.own_models))

    @property
    def own_models(self) -> list[str]:
        """Every path in the recipe without its stages, as written."""
        named = [] if self.base_model is None else [self.base_model]
        named += [entry.model for entry in self.entries]
        named += [each.base_model for each in self._all_slices if each.base_model]
        named += [rule.copy for rule in self.rules if rule.copy]
        named += [each.source_model for each in (*self.experts, *self.shared_experts)]
        named += [self.gate_file] if self.gate_file else []
        named += self.tokens.models if self.tokens else []
        return list(dict.fromkeys(named))


_STAGES.item = FormOf(Recipe)
