"""The factors of each module that an adapter changes, read from the names of its tensors in any dialect."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from streammerge.adapters.config import CONFIG, Config, config_of, read_config
from streammerge.adapters.dialects import COMPONENTS, COPIES, PARTS, REFUSED_PARTS, SAME_PARTS, WRAPPERS
from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.errors import FormatError, MismatchError, StreammergeError, listed, printable
from streammerge.formats.file_names import kind_of_file
from streammerge.sources.base import Allocated, Source, read_whole
from streammerge.stores.locations import PathLike
from streammerge.tensors.dtypes import DType
from streammerge.units import counted, inflected

_KINDS: tuple[tuple[str, str], ...] = (
    ("A", "lora"),
    ("B", "lora"),
    ("embedding A", "embedding"),
    ("embedding B", "embedding"),
    ("hada_", "loha"),
    ("lokr_", "lokr"),
    ("ia3", "ia3"),
    ("tokens", "tokens"),
    ("diff", "full"),
    ("set_weight", "saved"),
    *((part, "glora") for part in ("a1", "a2", "b1", "b2")),
)
"""(start of a part's name, the kind of change that it tells), the first one counts."""
_ALPHA, _GROWN = "alpha", "reshape_weight"
_ON_INPUT, _MULTIPLE = ".on_input", "ia3 change"
"""LyCORIS' IA3: a weight is a multiple if this stands beside it, and which part it is."""
_MOST_AXES, _MOST_SIZE = 5, 1 << 31
METADATA_KEY = "lora_adapter_metadata"
_OF_PEFT = "base_model.model."
"""What the names of all tensors begin with that PEFT saves."""
_DEPTH = re.compile(r"\.base_layer(?=\.|$)")
_FORMS = {DType.F64: "<d", DType.F32: "<f", DType.BF16: "<f", DType.F16: "<e", DType.I64: "<q", DType.I32: "<i"}


@dataclass(frozen=True, slots=True)
class Module:
    """What an adapter says about one module of its base.

    ``name``: the module as the adapter calls it; for the kind "saved" the whole name of a tensor. ``kind``: "lora"
    (``A`` [r, in...], ``B`` [out, r], maybe ``mid``), "embedding" (``embedding A`` [r, rows], ``embedding B``
    [columns, r]), "loha", "lokr", "glora" (LyCORIS' factors), "ia3", "full" (``diff``), "saved" (``value`` replaces one),
    "tokens" (``tokens`` replace the rows ``rows``), "bias" (``B bias`` or ``diff_b`` is added to the bias).
    ``parts``: part -> its tensor. ``keys``: the names of these tensors in the adapter. ``scale``: of the update, alpha / r
    for most, without a strength of the user. ``rank``: of its factors. ``magnitude``: the part with the norms of the
    updated tensor (DoRA), "" without. ``parameter``: the tensor of the module. ``transposed``: what the configuration says
    about the layout, which counts where shapes do not tell; for the kind "ia3", whether the inputs are multiplied.
    ``start``: an initialisation that changed the base. ``others``: the same for further parameters of the module that it
    may be about. The order in the configuration tells which, but not in all versions of PEFT, so a parameter counts only
    if its shape fits. ``grown``: the shape that the tensor of the base is filled up to with zeros first.
    """

    name: str
    kind: str
    parts: Mapping[str, Source]
    keys: tuple[str, ...]
    scale: float = 1.0
    rank: int = 0
    parameter: str = "weight"
    transposed: bool = False
    start: str = ""
    rows: tuple[int, ...] = ()
    others: tuple[Module, ...] = ()
    grown: tuple[int, ...] = ()

    @property
    def magnitude(self) -> str:
        return next((each for each in ("magnitude", "dora_scale") if each in self.parts), "")


@dataclass(slots=True)
class Adapter:
    """An adapter without its data. ``index``: its tensors. ``config``: PEFT's, if there is one. ``dialect``: for people."""

    index: CheckpointIndex
    modules: list[Module]
    config: Config | None = None
    dialect: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return printable(self.index.path)


class _Key(NamedTuple):
    """A tensor's name, split. ``part``: "" for a whole tensor of the base."""

    module: str
    part: str
    depth: int


def read_adapter(place: PathLike) -> Adapter:
    """Returns the adapter of a file or folder. Reads headers, PEFT's configuration and single numbers such as alphas.

    Raises FormatError and RecipeError as for any checkpoint, and MismatchError for an adapter that cannot be merged.
    """
    index = open_checkpoint(place)
    folder = index.path if index.path.is_folder() else index.path.parent
    own = index.path.is_folder() or index.path.name.startswith("adapter_model.")
    config = read_config(folder) if own else None
    if config is not None:
        container = index.container
        files = (*container.files, folder / CONFIG)
        index = replace(index, container=replace(container, files=files), files=files)
        if index.path.is_folder():
            index, config, notes = _with_beside(index, config)
            made = adapter_of(index, config)
            made.notes += notes
            return made
    return adapter_of(index, config)


def _with_beside(index: CheckpointIndex, config: Config) -> tuple[CheckpointIndex, Config, list[str]]:
    """Returns an adapter with the tensors that were trained whole and lie in a file of their own beside it, and notes.

    LLaVA and its kin write what they train besides the factors, such as a projector, into ``non_lora_trainables.bin``. Its
    tensors are called as PEFT calls those of the model. All other weights beside the adapter are no part of it.
    """
    entries, files, notes, names = dict(index.entries), list(index.files), list[str](), list[str]()
    for path in index.path.children():
        if kind_of_file(path.name) != "weights" or not path.is_file() or path in files:
            continue
        try:
            other = open_checkpoint(path)
        except StreammergeError:
            continue  # the note of the folder names it
        keys = {name: _split(name) for name in other}
        if entries.keys().isdisjoint(keys) and all(
            name.startswith(_OF_PEFT) and not key.part for name, key in keys.items()
        ):
            entries |= other.entries
            files += other.files
            names += [key.module for key in keys.values()]
            notes.append(
                f"{printable(path)} has {counted(len(keys), 'tensor')} that {inflected(len(keys), 'was', 'were')} trained "
                f"whole ({listed([key.module for key in keys.values()], 2)}), in place of the base's"
            )
    if not names:
        return index, config, index.notes
    container = replace(index.container, files=tuple(files))
    index = replace(index, entries=entries, container=container, files=tuple(files))
    return index, replace(config, saved=(*config.saved, *names)), notes


def adapter_of(index: CheckpointIndex, config: Config | None = None) -> Adapter:
    """Returns the adapter whose tensors are in an index. ``config``: PEFT's configuration. Raises MismatchError."""
    made = Adapter(index, [], config)
    if refused := _refused(index):  # before anything else, since their alphas and scales have no meaning here
        raise MismatchError(refused)
    configs = _of_metadata(index) if config is None and METADATA_KEY in index.metadata else {"": config} if config else {}
    groups: dict[tuple[str, int], dict[str, tuple[str, Source]]] = {}
    saved: dict[str, Module] = {}
    factors = 0
    multiplied = {name.removesuffix(_ON_INPUT) for name in index if name.endswith(_ON_INPUT)}
    for name, source in index.items():
        key = _split(name)
        if not source.spec.numel:
            raise MismatchError(
                f"{made.where}: {printable(name)} is a placeholder without elements, as ZeRO-3 saves what it has divided; "
                "save the adapter anew with its weights gathered, or take a checkpoint of the run that has them"
            )
        if not key.part and key.module.endswith(".weight") and name.removesuffix(".weight") in multiplied:
            key = _Key(key.module.removesuffix(".weight"), _MULTIPLE, key.depth)
        if source.spec.dtype.kind != "float" and key.part not in ("", _ALPHA, _GROWN, "on_input"):
            raise MismatchError(
                f"{made.where}: {printable(name)} is a factor of {source.spec.dtype.torch_name}, and factors are "
                "floating-point numbers"
            )
        if not source.spec.shape and key.part not in ("", _ALPHA, "on_input"):
            raise MismatchError(f"{made.where}: {printable(name)} is one number, and a factor has axes")
        if not key.part:
            whole = _saved(name, source, key)
            saved[key.module] = min(saved.get(key.module, whole), whole, key=_place_among_copies)
            continue
        factors += 1
        part = SAME_PARTS.get(key.part, key.part)
        group = groups.setdefault((key.module, key.depth), {})
        if part in group:
            raise MismatchError(
                f"{made.where}: {printable(group[part][0])} and {printable(name)} are the same factor of "
                f"{printable(key.module)}"
            )
        group[part] = name, source
    if not factors and not config:
        raise MismatchError(
            f"{made.where} holds no factors of an adapter, so it cannot be added to a model; to average the two, name "
            "them as two inputs"
        )
    made.dialect = _dialect(index, configs)
    for (module, depth), group in groups.items():
        made.modules += _modules(made, module, depth, group, _config_for(configs, module))
    _check_alike(made, bool(configs))
    made.modules[:0] = saved.values()
    ranked = isinstance(index.extras, dict) and "lora_rank" in index.extras  # GPT-SoVITS, whose alpha is the rank
    loras = any(each.kind == "lora" for each in made.modules)
    if made.dialect.startswith("PEFT") and not configs and loras and not ranked:
        made.notes.append(
            f"{made.where} has no {CONFIG} beside it, so the scale of its updates is not known; they are added as they "
            "are, which is right where alpha equals the rank"
        )
    return made


def _check_alike(adapter: Adapter, configured: bool) -> None:
    """Raises MismatchError if some modules have what the others of one adapter lack: alphas, norms, or biases."""
    scaled = [each for each in adapter.modules if each.kind in ("lora", "loha", "lokr", "embedding")]
    with_alpha = [each for each in scaled if any(key.endswith(f".{_ALPHA}") for key in each.keys)]
    if not configured and 0 < len(with_alpha) < len(scaled):
        without = next(each for each in scaled if each not in with_alpha)
        raise MismatchError(
            f"{adapter.where}: {printable(without.name)} has no alpha, and {len(with_alpha)} other modules have one; the "
            "adapter is not complete"
        )
    config = adapter.config
    if config is None:
        return
    other = next(
        (each for each in adapter.modules if each.kind in _FACTORS and each.kind not in _OF_TYPE[config.kind]), None
    )
    if other is not None:
        raise MismatchError(
            f"{adapter.where}: {printable(other.keys[0])} is no factor of the kind {config.kind}, which {CONFIG} states as "
            "peft_type; the configuration is another adapter's"
        )
    if config.kind != "LORA":
        return
    for each in scaled:
        if config.dora != bool(each.magnitude) and each.kind in ("lora", "embedding"):
            has = "has no lora_magnitude_vector" if config.dora else "has a lora_magnitude_vector"
            raise MismatchError(
                f"{adapter.where}: {printable(each.keys[0])} {has}, and {CONFIG} says use_dora: "
                f"{str(config.dora).lower()}; the adapter is not complete, or the configuration is another's"
            )
    biased = {each.name: each.keys[0] for each in adapter.modules if each.kind == "bias"}
    if biased and not config.lora_bias:
        adapter.index.warnings.append(
            f"{adapter.where} has biases of factors ({printable(next(iter(biased.values())))}), and {CONFIG} does not "
            "say lora_bias; they are added, and PEFT would leave them out"
        )
    lacking = next((each for each in scaled if each.name not in biased), None)
    if config.lora_bias and lacking is not None and lacking.kind == "lora":
        raise MismatchError(
            f"{adapter.where}: {printable(lacking.name)} has no lora_B.bias, and {CONFIG} says lora_bias; the adapter is "
            "not complete"
        )


def _refused(index: CheckpointIndex) -> str:
    for name in index:
        for pattern, what in _refusals():
            if pattern.search(name):
                return (
                    f"{printable(index.path)}: {printable(name)} belongs to {what}; it cannot be merged here, so merge it "
                    "with the library that made it, and give the merged model"
                )
    return ""


@cache
def _refusals() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), what) for pattern, what in REFUSED_PARTS]


@cache
def _endings() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(f"(?P<module>.+?){pattern}$"), part.replace(r"\1", r"\2")) for pattern, part, _ in PARTS]


@cache
def _wrappers() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), other) for pattern, other, _ in WRAPPERS]


def _split(name: str) -> _Key:
    """Splits the name of an adapter's tensor into the module, the part and the number of wrappers around the module."""
    plain = name
    for pattern, other in _wrappers():
        plain = pattern.sub(other, plain)
    for pattern, part in _endings():
        if match := pattern.match(plain):
            module, inner = match["module"], match.expand(part)
            trailing = re.search(r"(\.base_layer)*$", module)
            depth = trailing[0].count(".") if trailing else 0
            return _Key(_DEPTH.sub("", module), inner, depth)
    return _Key(_DEPTH.sub("", plain), "", 0)


def _saved(name: str, source: Source, key: _Key) -> Module:
    return Module(key.module, "saved", {"value": source}, (name,))


def _place_among_copies(whole: Module) -> int:
    """Returns a number that is the smaller, the sooner a copy of a whole module is the one that counts."""
    return next((place for place, part in enumerate(COPIES, 1) if part in whole.keys[0]), 0)


def _dialect(index: CheckpointIndex, configs: Mapping[str, Config]) -> str:
    if configs:
        return "PEFT"
    names = list(index)
    if any(name.startswith(("lora_", "lycoris_")) for name in names):
        return "Kohya or LyCORIS"
    if any(".lora_A" in name or ".lora_embedding_A" in name for name in names):
        return "PEFT's names"
    return "Kohya or LyCORIS" if any(".lora_up" in n or ".hada_" in n or ".lokr_" in n for n in names) else "diffusers"


def _of_metadata(index: CheckpointIndex) -> dict[str, Config]:
    """Returns the configurations that diffusers writes into a file's metadata, by the component that each is about."""
    where = f"{printable(index.path)}: {METADATA_KEY}"
    try:
        tree = json.loads(index.metadata[METADATA_KEY])
        groups: dict[str, dict[str, Any]] = {}
        for key, value in tree.items():
            component, _, inner = key.partition(".")
            groups.setdefault(component if inner else "", {})[inner or key] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read ({printable(error)})") from error
    return {component: config_of(group, where) for component, group in groups.items()}


def _config_for(configs: Mapping[str, Config], module: str) -> Config | None:
    return configs.get(module.partition(".")[0]) or configs.get("")


def _modules(
    adapter: Adapter, name: str, depth: int, group: dict[str, tuple[str, Source]], config: Config | None
) -> Iterable[Module]:
    """Yields the changes of one module. Raises MismatchError for factors without their partner."""
    biases = {part for part in group if part in ("B bias", "diff_b")}
    kinds = dict.fromkeys(kind for start, kind in _KINDS for part in group if part.startswith(start) and part not in biases)
    keys = {part: key for part, (key, _) in group.items()}
    tensors = {part: source for part, (_, source) in group.items()}
    if len(kinds) > 1:
        raise MismatchError(
            f"{adapter.where}: {printable(name)} has factors of several kinds ({', '.join(sorted(keys.values()))}), and "
            "what they mean together is not known"
        )
    rest = [part for part in sorted(group) if part not in biases]
    kind = next(iter(kinds), "")
    if not kind and rest:
        only = keys[rest[0]]
        raise MismatchError(f"{adapter.where}: {printable(only)} has no factors beside it that it belongs to")
    made: Module | None = None
    if kind == "saved":
        parts = {"value": tensors["set_weight"]}
        made = Module(f"{name}.weight", "saved", parts, (keys["set_weight"],))
    elif kind:
        parts = {part: tensors[part] for part in rest}
        made = _scaled(adapter, name, depth, kind, parts, keys, config)
        yield made
        if kind == "ia3" and not made.transposed and _MULTIPLE not in made.parts:
            yield replace(made, parameter="bias")
    if kind == "saved" and made is not None:
        yield made
    for part in sorted(biases):
        scale = made.scale if made is not None and part == "B bias" else 1.0
        yield Module(name, "bias", {part: tensors[part]}, (keys[part],), scale, parameter="bias")


_PARTNERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lora": (("A",), ("B",)),
    "embedding": (("embedding A",), ("embedding B",)),
    "loha": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "lokr": (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
    "full": (("diff",),),
    "tokens": (("tokens",),),
    "ia3": (("ia3", "ia3 change"),),
    "glora": (("a1",), ("a2",), ("b1",), ("b2",)),
}
"""What each kind cannot be without: one of each of these."""


_OF_TYPE: dict[str, tuple[str, ...]] = {
    "LORA": ("lora", "embedding", "experts"),
    "LOHA": ("loha",),
    "LOKR": ("lokr",),
    "IA3": ("ia3",),
    "TRAINABLE_TOKENS": (),
}
"""PEFT's types of adapters -> the kinds of factors that each has."""
_FACTORS = {kind for kinds in _OF_TYPE.values() for kind in kinds} | {"glora"}
_NORMS = ("magnitude", "dora_scale")
_BELONGS: dict[str, tuple[str, ...]] = {
    "lora": ("A", "B", "mid", *_NORMS),
    "embedding": ("embedding ", *_NORMS),
    "loha": ("hada_", *_NORMS),
    "lokr": ("lokr_", *_NORMS),
    "full": ("diff", *_NORMS),
    "tokens": ("tokens",),
    "ia3": ("ia3",),
    "glora": ("a1", "a2", "b1", "b2"),
}
"""How the parts of each kind may be called."""


def _scaled(
    adapter: Adapter,
    name: str,
    depth: int,
    kind: str,
    parts: dict[str, Source],
    keys: Mapping[str, str],
    config: Config | None,
) -> Module:
    """Returns a module with its rank and scale."""
    used = tuple(keys[part] for part in parts)
    double = next(
        (each for each in ("lokr_w1", "lokr_w2") if each in parts and {f"{each}_a", f"{each}_b"} & set(parts)), None
    )
    if double is not None or ("hada_t1" in parts) != ("hada_t2" in parts):
        raise MismatchError(
            f"{adapter.where}: {printable(used[0])} and the factors beside it do not tell one update of {printable(name)}: "
            f"there are {', '.join(parts)}"
        )
    for needed in _PARTNERS[kind]:
        if not any(part in parts for part in needed):
            raise MismatchError(
                f"{adapter.where}: {printable(used[0])} has no partner {needed[0]}, so {printable(name)} cannot be "
                "updated; the adapter is not complete"
            )
    own = parts.pop("alpha", None)
    side = parts.pop("on_input", None) if kind == "ia3" else None
    grown = _sizes(adapter, keys[_GROWN], parts.pop(_GROWN)) if kind == "lora" and _GROWN in parts else ()
    foreign = next((part for part in parts if not part.startswith(_BELONGS[kind])), None)
    if foreign is not None:
        raise MismatchError(
            f"{adapter.where}: {printable(keys[foreign])} has no meaning beside {printable(used[0])}, so the update of "
            f"{printable(name)} is not known"
        )
    stated, rank, scale = config is not None, 0, 1.0
    if kind in ("lora", "embedding"):
        rank = _rank(adapter, name, parts, keys)
        scale = 1.0 if own is None else _element(adapter, keys["alpha"], own) / max(rank, 1)
    elif kind == "glora":
        one, two = parts["a1"].spec.shape, parts["a2"].spec.shape
        rank = min(one[0] if one else 0, two[0] if two else 0)
        scale = _element(adapter, keys["alpha"], own) / rank if own is not None and rank else 1.0
    elif kind in ("loha", "lokr"):
        rank = _lycoris_rank(kind, parts)
        scale = _element(adapter, keys["alpha"], own) / rank if own is not None and rank else 1.0
    if config is None or kind in ("ia3", "tokens", "full"):
        rows = _rows(adapter, name, config, keys.get("tokens", "")) if kind == "tokens" else ()
        through = config is not None and config.is_feedforward(name)
        through = through if side is None else _element(adapter, keys["on_input"], side) != 0
        return Module(name, kind, parts, used, scale, rank, rows=rows, transposed=through, grown=grown)
    module = Module(name, kind, parts, used, config.scale(name), config.rank(name))
    module = replace(module, transposed=config.fan_in_fan_out, start=config.init, grown=grown)
    targets = _targets(config, name)
    if targets and stated:
        if depth >= len(targets):
            raise MismatchError(
                f"{adapter.where}: {printable(used[0])} is one factor more than the parameters of {printable(name)} that "
                f"target_parameters of {CONFIG} names"
            )
        likely = targets[len(targets) - 1 - depth]
        first, *others = (
            _of_parameter(module, config, each) for each in (likely, *(each for each in targets if each != likely))
        )
        return replace(first, others=tuple(others))
    if rank and rank != module.rank:
        raise MismatchError(
            f"{adapter.where}: {printable(used[0])} has the rank {rank}, and {CONFIG} says {module.rank} for "
            f"{printable(name)}; the file or the configuration is another adapter's"
        )
    return module


def _of_parameter(module: Module, config: Config, parameter: str) -> Module:
    """Returns the module as the update of one of its parameters. Patterns of ranks and alphas name parameters here."""
    name = f"{module.name}.{parameter}"
    return replace(module, kind="experts", parameter=parameter, scale=config.scale(name), rank=config.rank(name))


def _targets(config: Config, module: str) -> list[str]:
    """Returns the names of the parameters of a module that target_parameters names, in its order."""
    found = []
    for target in config.targets:
        owner, _, parameter = target.rpartition(".")
        if module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    return found


def _rank(adapter: Adapter, name: str, parts: Mapping[str, Source], keys: Mapping[str, str]) -> int:
    """Returns the rank that both factors have. Raises MismatchError if they have two."""
    down, up = ("A", "B") if "A" in parts else ("embedding A", "embedding B")
    one, two = parts[down].spec.shape, parts[up].spec.shape
    if len(one) < 2 or len(two) < 2 or one[0] != two[1]:
        raise MismatchError(
            f"{adapter.where}: {printable(keys[down])} of shape {list(one)} and {printable(keys[up])} of shape {list(two)} "
            f"are no factors of one update of {printable(name)}"
        )
    return one[0]


def _lycoris_rank(kind: str, parts: Mapping[str, Source]) -> int:
    """Returns the rank of the factors that are decomposed; 0 if none is, so that alpha has no effect."""
    for part in ("hada_w1_b", "hada_w2_b") if kind == "loha" else ("lokr_w1_b", "lokr_w2_b"):
        if part in parts and parts[part].spec.shape:
            return parts[part].spec.shape[0]
    return 0


def _rows(adapter: Adapter, name: str, config: Config | None, key: str) -> tuple[int, ...]:
    """Returns the numbers of the rows that trained tokens replace."""
    tokens = config.tokens if config else {}
    for ending, rows in tokens.items():
        if ending and (name == ending or name.endswith(f".{ending}")):
            return rows
    if "" in tokens:
        return tokens[""]
    if len(tokens) == 1:
        return next(iter(tokens.values()))
    raise MismatchError(
        f"{adapter.where}: {printable(key)} holds trained rows, and their numbers stand in trainable_token_indices of "
        f"{CONFIG}, which does not say them"
    )


def _element(adapter: Adapter, key: str, source: Source) -> float:
    """Reads the only number of a tensor."""
    form = _FORMS.get(source.spec.dtype)
    if form is None or source.spec.numel != 1:
        raise MismatchError(
            f"{adapter.where}: {printable(key)} is {source.spec.dtype} {list(source.spec.shape)}, not one number"
        )
    data = bytes(read_whole(source, Allocated(lambda location: location.open())))
    found = float(struct.unpack(form, b"\0\0" + data if source.spec.dtype is DType.BF16 else data)[0])
    if not math.isfinite(found):
        raise MismatchError(f"{adapter.where}: {printable(key)} is {found}, so the update has no scale")
    return found


def _sizes(adapter: Adapter, key: str, source: Source) -> tuple[int, ...]:
    """Reads the sizes of a shape."""
    form, count = _FORMS.get(source.spec.dtype), source.spec.numel
    if form is None or source.spec.dtype is DType.BF16 or not 1 <= count <= _MOST_AXES:
        raise MismatchError(f"{adapter.where}: {printable(key)} is {source.spec.dtype} {list(source.spec.shape)}, no shape")
    data = bytes(read_whole(source, Allocated(lambda location: location.open())))
    sizes = struct.unpack(f"<{count}{form[1]}", data)
    if any(size != size or size < 1 or size > _MOST_SIZE or size != int(size) for size in sizes):
        raise MismatchError(f"{adapter.where}: {printable(key)} holds {list(sizes)}, which is no shape")
    return tuple(map(int, sizes))


def component_of(name: str) -> tuple[str, tuple[str, ...]]:
    """Returns the name inside the part of a pipeline that it begins with, and the starts of names of this part in a base.

    Returns the name itself, and no starts, if it begins with none.
    """
    for start, places in COMPONENTS:
        if name.startswith(start) and len(name) > len(start):
            return name[len(start) :], places
    return name, ()
