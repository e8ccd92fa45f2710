"""A mixture of experts, built of dense models: as mergekit-moe builds it, in the layout of the programs' own checkpoints.

Each expert is the MLPs of a model. All else is the base's. The routers are drawn, computed from the base's embeddings of
some texts, or read from a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from streammerge.checkpoints.config import CONFIG, read_config
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.checkpoints.tokens import TOKENIZER_CONFIG
from streammerge.errors import MismatchError, RecipeError, listed, printable
from streammerge.formats import detect, safetensors
from streammerge.formats.base import LayoutFile
from streammerge.planning.dispositions.files import decide
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.layout import Layout, text_file
from streammerge.planning.receipt import planned
from streammerge.planning.stages import Opened, settled
from streammerge.planning.unwritten import Unwritten
from streammerge.planning.views import Indexes
from streammerge.recipe.experts import Expert
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.directions import directions
from streammerge.sources.drawn import drawn
from streammerge.sources.elementwise import rounded, summed
from streammerge.sources.joined import joined
from streammerge.sources.reshaped import reshaped
from streammerge.sources.rows import rows_of
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32C
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec
from streammerge.units import parse_bytes

_MLP = re.compile(r"^(?P<layer>.*\blayers\.(?P<number>\d+)\.)mlp\.(?P<part>.+)$")
_PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_EMBEDDINGS = "model.embed_tokens.weight"
_SHARD_BYTES = parse_bytes("5GB")


@dataclass(frozen=True)
class _Form:
    """How a kind of mixture calls its tensors and describes itself. ``parts``: the names of gate, up and down.

    ``shared``: the numbers of shared experts that it may have. ``biased``: whether the attention has biases: always, never,
    or as in the base. ``fused``: whether its loader takes the experts of a layer as one tensor.
    """

    name: str
    inputs: tuple[str, ...]
    block: str
    parts: tuple[str, str, str]
    shared: tuple[int, ...]
    shared_block: str
    config: Mapping[str, Any]
    count_key: str
    biased: bool | None = None
    fused: bool = False


_DENSE = ("llama", "mistral")
_DEEPSEEK = "deepseek-ai/deepseek-moe-16b-base--"
_FORMS = (
    _Form(
        "mixtral",
        _DENSE,
        "block_sparse_moe",
        ("w1.weight", "w3.weight", "w2.weight"),
        (0,),
        "",
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "sliding_window": None,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
        },
        "num_local_experts",
        False,
        True,
    ),
    _Form(
        "deepseek",
        _DENSE,
        "mlp",
        _PARTS,
        (0, 1),
        "shared_experts",
        {
            "architectures": ["DeepseekForCausalLM"],
            "model_type": "deepseek",
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
            "auto_map": {
                "AutoConfig": f"{_DEEPSEEK}configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{_DEEPSEEK}modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{_DEEPSEEK}modeling_deepseek.DeepseekForCausalLM",
            },
        },
        "n_routed_experts",
    ),
    _Form(
        "qwen2",
        (*_DENSE, "qwen2"),
        "mlp",
        _PARTS,
        (1,),
        "shared_expert",
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        "num_experts",
        True,
    ),
    _Form(
        "qwen3",
        ("qwen3",),
        "mlp",
        _PARTS,
        (0,),
        "",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        "num_experts",
        fused=True,
    ),
)


class Mixed(Opened):
    """A mixture of experts as a stage: an unwritten folder."""

    def __init__(self, name: str, recipe: Recipe, indexes: Indexes) -> None:
        """Plans the mixture. Raises RecipeError and MismatchError for models that do not fit together."""
        self.name, self.indexes, self.declared = name, indexes, {}
        builder = _Builder(recipe, indexes)
        tensors = builder.tensors()
        store = Unwritten(name)
        files, self.made = _files(store, tensors)
        files.append(text_file(CONFIG, builder.config()))
        base = builder.base
        side = decide(base, base.path, {file.name for file in files}, Dispositions())
        receipt = planned({}, {}, recipe.seed, CRC32C, hashed=False, computed=False)
        store.add(Layout(tuple(files), receipt, True, tuple(side)))
        self.container = settled(detect.read(store.folder), self.made)
        store.sealed = True
        self.place = store.folder
        said = [*(note for index in indexes.values() for note in index.notes), *builder.notes]
        self.notes = [self._told(note) for note in dict.fromkeys(said)]
        warned = [*(warning for index in indexes.values() for warning in index.warnings), *builder.warnings]
        self.warnings = [self._told(warning) for warning in dict.fromkeys(warned)]


def _files(store: Unwritten, tensors: Mapping[str, Source]) -> tuple[list[LayoutFile], dict[tuple[str, int], Source]]:
    """Returns the weights' files with their index, and the tensor at each place in them."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for source in tensors.values():
        if groups[-1] and filled + source.spec.nbytes > _SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(source.spec)
        filled += source.spec.nbytes
    files, made, where = list[LayoutFile](), dict[tuple[str, int], Source](), dict[str, str]()
    for number, specs in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        file = safetensors.plan_layout(name, specs, {"format": "pt"})
        files.append(file)
        for spec in specs:
            where[spec.name] = name
            if spec.numel:
                made[(store.folder / name).key, file.offsets[spec.name]] = tensors[spec.name]
    if len(groups) > 1:
        total = sum(source.spec.nbytes for source in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        files.append(text_file("model.safetensors.index.json", text + "\n"))
    return files, made


class _Builder:
    """Builds the tensors and the configuration of a mixture."""

    def __init__(self, recipe: Recipe, indexes: Indexes) -> None:
        self.recipe, self.indexes = recipe, indexes
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.base = self._index(str(recipe.base_model))
        self.experts = [(each, self._index(each.source_model)) for each in recipe.experts]
        self.shared = [(each, self._index(each.source_model)) for each in recipe.shared_experts]
        self.tree = self._tree(self.base)
        self.form = self._form()
        self.layers = list(_layers(self.base))
        self.hidden = self._checked()
        if self.form.name != "deepseek" and len(self.experts) & (len(self.experts) - 1):
            self.notes.append(f"{len(self.experts)} experts are no power of two, so llama.cpp does not load the model")

    def _index(self, model: str) -> CheckpointIndex:
        wanted = self.recipe.reference(model)
        return next(index for reference, index in self.indexes.items() if reference.same(wanted))

    def _tree(self, index: CheckpointIndex) -> Mapping[str, Any]:
        config = read_config(index.path) if index.path.is_folder() else None
        if config is None or config.unread:
            raise RecipeError(
                f"{printable(index.path)} has no {CONFIG} that can be read; experts are made of folders with one"
            )
        return config.tree

    def _form(self) -> _Form:
        """Returns the kind of mixture that is asked for, or the first that fits. Raises RecipeError if none does."""
        kinds = {
            str(self._tree(index).get("model_type")): index
            for index in (self.base, *(index for _, index in (*self.experts, *self.shared)))
        }
        if len(kinds) > 1:
            shown = ", ".join(f"{printable(kind)} in {printable(index.path)}" for kind, index in kinds.items())
            raise RecipeError(f"the models of a mixture of experts are of one model_type, not {shown}")
        (kind,) = kinds
        asked, count = self.recipe.architecture, len(self.shared)
        fits = [form for form in _FORMS if kind in form.inputs and count in form.shared and asked in (None, form.name)]
        if not fits:
            ways = listed(
                [f"{f.name} (from {' or '.join(f.inputs)}, {' or '.join(map(str, f.shared))} shared)" for f in _FORMS]
            )
            raise RecipeError(
                f"no mixture is made of {printable(kind)} models with {count} shared experts here; known are {ways}"
            )
        if self.recipe.fused_experts and not fits[0].fused:
            raise RecipeError(
                f"mixtures of the kind {fits[0].name} have separate experts in all programs; leave fused_experts out"
            )
        return fits[0]

    def _checked(self) -> int:
        """Returns the hidden size. Raises MismatchError for an expert whose MLPs are not like the base's."""
        if not self.layers:
            raise MismatchError(
                f"{printable(self.base.path)} has no MLPs called model.layers.0.mlp.gate_proj.weight and so on"
            )
        for layer in self.layers:
            for part in _PARTS:
                name = f"{layer}mlp.{part}"
                for index in (self.base, *(index for _, index in (*self.experts, *self.shared))):
                    entry = index.entries.get(name)
                    if entry is None:
                        raise MismatchError(f"{printable(index.path)} has no tensor {printable(name)}")
                    wanted = self.base.entries[name].spec.shape
                    if entry.spec.shape != wanted:
                        raise MismatchError(
                            f"{printable(index.path)}: {printable(name)} is {list(entry.spec.shape)}, where "
                            f"{printable(self.base.path)} has {list(wanted)}"
                        )
        return self.base.entries[f"{self.layers[0]}mlp.{_PARTS[0]}"].spec.shape[1]

    # -- tensors ------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Source]:
        """Returns the tensors of the mixture, in the base's order."""
        made: dict[str, Source] = {}
        done = set[str]()
        for name, entry in self.base.entries.items():
            match = _MLP.match(name)
            if match is None:
                self._add_other(made, name, entry)
                continue
            if match["part"] not in _PARTS:
                raise MismatchError(f"{printable(self.base.path)}: {printable(name)} has no place in a mixture of experts")
            if match["layer"] not in done:
                done.add(match["layer"])
                for source in self._layer(match["layer"], self.layers.index(match["layer"])):
                    made[source.spec.name] = source
        return made

    def _add_other(self, made: dict[str, Source], name: str, entry: Source) -> None:
        """Adds a tensor of the base, and the bias that the mixture needs beside it."""
        biased = re.search(r"\.self_attn\.[qkvo]_proj\.bias$", name)
        if biased and self.form.biased is False:
            self.warnings.append(f"{self.form.name} has no biases of the attention, so those of the base are left out")
            return
        made[name] = self._cast(entry, name)
        if self.form.biased and re.search(r"\.self_attn\.[qkv]_proj\.weight$", name):
            bias = name.removesuffix("weight") + "bias"
            if bias not in self.base.entries:
                spec = made[name].spec
                made[bias] = Constant(TensorSpec(bias, spec.dtype, spec.shape[:1]))

    def _cast(self, source: Source, name: str) -> Source:
        dtype = self.recipe.recast
        named = source.named(name)
        return named if dtype is None or source.spec.dtype.kind != "float" else rounded(named, dtype).named(name)

    def _layer(self, layer: str, number: int) -> Iterator[Source]:
        block = f"{layer}{self.form.block}."
        if self.recipe.fused_experts:
            block = f"{layer}mlp."
            yield from self._fused(layer, f"{block}experts.")
        else:
            for place, (expert, index) in enumerate(self.experts):
                yield from self._expert(expert, index, layer, f"{block}experts.{place}.", self.form.parts)
        yield self._gate(f"{block}gate.weight", self.experts, number, "gates")
        for expert, index in self.shared:
            yield from self._expert(expert, index, layer, f"{block}{self.form.shared_block}.", _PARTS)
            if self.form.name == "qwen2":
                yield self._gate(f"{block}shared_expert_gate.weight", self.shared, number, "shared_gates")

    def _fused(self, layer: str, block: str) -> Iterator[Source]:
        """Yields the experts of a layer as two tensors: gate above up [experts, 2 intermediate, hidden], and down."""
        above, below = f"{block}gate_up_proj", f"{block}down_proj"
        both, down = list[Source](), list[Source]()
        for place, (expert, index) in enumerate(self.experts):
            gate, up, back = self._expert(expert, index, layer, f"{block}{place}.", self.form.parts)
            both.append(joined(above, [gate, up]))
            down.append(back)
        for name, parts in ((above, both), (below, down)):
            yield joined(name, [reshaped(part, (1, *part.spec.shape)) for part in parts])

    def _expert(
        self, expert: Expert, index: CheckpointIndex, layer: str, block: str, parts: tuple[str, str, str]
    ) -> Iterator[Source]:
        for old, new in zip(_PARTS, parts, strict=True):
            source, name = index.entries[f"{layer}mlp.{old}"], block + new
            noise = expert.noise_scale or 0.0
            scale = 1.0 if expert.residual_scale is None or old != _PARTS[2] else expert.residual_scale
            if not noise and scale == 1.0:
                yield self._cast(source, name)
                continue
            terms, scales = [source], [scale]
            if noise:
                terms.append(drawn(name, source.spec.shape, self.recipe.seed))
                scales.append(noise * scale)
            yield summed(terms, scales, self.recipe.recast or source.spec.dtype).named(name)

    # -- routers ------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> DType:
        return self.recipe.recast or self.base.entries[f"{self.layers[0]}mlp.{_PARTS[0]}"].spec.dtype

    def _gate(self, name: str, experts: list[tuple[Expert, CheckpointIndex]], layer: int, key: str) -> Source:
        shape = (len(experts), self.hidden)
        if self.recipe.gate_file is not None:
            return self._from_file(name, shape, layer, key)
        if self.recipe.gate_mode == "cheap_embed":
            return self._embedded(name, experts)
        if self.recipe.gate_mode == "random":
            return rounded(drawn(name, shape, self.recipe.seed), self.dtype).named(name)
        scale = self.hidden**-0.5
        return summed([drawn(name, shape, self.recipe.seed, normal=False)], [scale], self.dtype).named(name)

    def _from_file(self, name: str, shape: tuple[int, int], layer: int, key: str) -> Source:
        """Returns one layer of the routers in a file: of its tensor ``gates`` or ``shared_gates``, or of its only one."""
        index = self._index(str(self.recipe.gate_file))
        known = list(index.entries)
        found = index.entries.get(key) or (index.entries[known[0]] if len(known) == 1 and key == "gates" else None)
        wanted = (len(self.layers), *shape)
        if found is None or found.spec.shape != wanted or found.spec.dtype.kind != "float":
            has = "no such tensor" if found is None else f"{found.spec.dtype} {list(found.spec.shape)}"
            raise MismatchError(
                f"{printable(index.path)}: {key} are [layers, experts, hidden size], here {list(wanted)}; the file "
                f"has {has}"
            )
        return rounded(reshaped(rows_of(found, layer, layer + 1), shape), self.dtype).named(name)

    def _embedded(self, name: str, experts: list[tuple[Expert, CheckpointIndex]]) -> Source:
        embeddings = self.base.entries.get(_EMBEDDINGS)
        if embeddings is None:
            raise MismatchError(f"{printable(self.base.path)} has no tensor {_EMBEDDINGS}, which cheap_embed needs")
        rows, against = self._numbers(experts)
        try:
            return directions(name, embeddings, rows, against, self.dtype)
        except IndexError as error:
            raise MismatchError(
                f"{printable(self.base.path)}: its tokenizer has token {error}, and {_EMBEDDINGS} has "
                f"{embeddings.spec.shape[0]} rows"
            ) from error

    def _numbers(
        self, experts: list[tuple[Expert, CheckpointIndex]]
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """Returns the tokens of the prompts of each expert: for it, and against it."""

        def numbers(prompts: tuple[str, ...]) -> tuple[int, ...]:
            return tuple(number for prompt in prompts for number in self.encode(prompt))

        ours = [numbers(each.positive_prompts) for each, _ in experts]
        return tuple(ours), tuple(numbers(each.negative_prompts) for each, _ in experts)

    @cached_property
    def encode(self) -> Callable[[str], list[int]]:
        """Turns a text into the numbers of its tokens."""
        return _encoder(self.base.path)

    # -- configuration ------------------------------------------------------------------------------------------------

    def config(self) -> str:
        """Returns the text of the mixture's configuration."""
        made = {**self.tree, **self.form.config}
        shared = len(self.shared)
        made[self.form.count_key] = len(self.experts)
        made["num_experts_per_tok"] = self.recipe.experts_per_token or 2
        if self.form.name != "mixtral":
            made["moe_intermediate_size"] = made["intermediate_size"]
        if self.form.name == "qwen2":
            made["shared_expert_intermediate_size"] = made["intermediate_size"]
        if self.form.name == "deepseek":
            made["n_shared_experts"] = shared or None
        if self.recipe.recast is not None:
            made["dtype" if "dtype" in made else "torch_dtype"] = self.recipe.recast.torch_name
        return json.dumps(made, indent=2) + "\n"


def _layers(index: CheckpointIndex) -> Iterator[str]:
    """Yields what stands before ``mlp.`` in the names of each layer, in the order of the layers."""
    found = {match["layer"]: int(match["number"]) for name in index.entries if (match := _MLP.match(name))}
    yield from sorted(found, key=found.__getitem__)


def _encoder(folder: Location) -> Callable[[str], list[int]]:
    """Returns a function from a text to the numbers of its tokens, the first token of a text before them.

    Raises RecipeError without the package tokenizers, or without a tokenizer.json.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RecipeError("cheap_embed needs the package tokenizers: `pip install 'streammerge[llm]'`") from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise RecipeError(f"{printable(folder)} has no tokenizer.json, which cheap_embed needs")
    try:
        tokenizer = Tokenizer.from_str(file.read(0, file.size).decode())
    except Exception as error:  # the package raises plain exceptions
        raise RecipeError(f"{printable(file)} cannot be read: {printable(error)}") from error
    config = read_config(folder, TOKENIZER_CONFIG)
    begin = config.tree.get("bos_token") if config else None
    begin = begin.get("content") if isinstance(begin, dict) else begin
    first = begin if isinstance(begin, str) else ""
    return lambda text: tokenizer.encode(first + text, add_special_tokens=False).ids
