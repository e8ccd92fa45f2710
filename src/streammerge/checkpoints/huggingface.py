"""What a Hugging Face folder says beside its tensors: the configuration, and a head that is tied to the embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from streammerge.errors import printable
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.strict_json import load_json
from streammerge.tensors.layers import layer_of

CONFIG = "config.json"
_MOST_CONFIG_BYTES = 16 << 20
HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight")
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|backbone\.embeddings?)\.weight$|^(model\.)?shared\.weight$"
)
_ANY_EMBEDDINGS = re.compile(r"^(?!.*(pos|type|patch)).*(emb|shared\.weight$)")
_DEEPEST = 4
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_DTYPES = ("dtype", "torch_dtype")


class Seen(Protocol):
    """A view of a checkpoint (planning.views.View)."""

    index: Any
    entries: dict[str, Source]


def read_config(folder: Location) -> dict[str, Any] | None:
    """The folder's config.json; None where there is none that can be read."""
    return read_side_json(folder / CONFIG, _MOST_CONFIG_BYTES)


def read_side_json(path: Location, most_bytes: int) -> dict[str, Any] | None:
    """The mapping in a JSON file that may be beside a checkpoint; None where there is none, or it holds no mapping.

    FormatError for a name that is there and is no regular file, nor a link to one.
    """
    if not path.lexists() or (size := path.size) > most_bytes:
        return None
    try:
        content = load_json(path.read(0, size).decode("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def tie_head(views: Sequence[Seen], notes: list[str], wanted: Collection[str] = ()) -> None:
    """Gives every model an output head and embeddings where some models store both and others store one for both.

    Only in folders, whose configuration does not deny it. ``wanted``: names that the output should have in any case.
    """
    heads = {id(view): _heads(view.entries) for view in views}
    found = _heads(wanted)
    if not found and not any(heads.values()):
        return
    _name_alike(views, heads, notes)
    for head in dict.fromkeys([*(name for view in views for name in heads[id(view)]), *found]):
        for view in views:
            if not any(_ending(own) == _ending(head) for own in heads[id(view)]):
                shapes = [other.entries[head].spec.shape for other in views if head in other.entries]
                _stand_in(view, head, _tied(view, shapes), notes)


def _name_alike(views: Sequence[Seen], heads: Mapping[int, list[str]], notes: list[str]) -> None:
    """Settles models that store only a head, tied to the embeddings that others store.

    Where no model stores both, the tensor has the name that the first model gives it. Elsewhere the head stands in for the
    embeddings.
    """
    embedded = {id(view): _embeddings(view) for view in views}
    headed = [view for view in views if heads[id(view)] and not embedded[id(view)] and _ties(view)]
    names = [found[0] for found in embedded.values() if len(found) == 1]
    if not headed or not names:
        return
    apart = all(len(heads[id(view)]) + len(embedded[id(view)]) == 1 for view in views)
    if apart and all(map(_ties, views)):
        first = (heads[id(views[0])] or [names[0]])[0]
        for view in views:
            own = (heads[id(view)] or embedded[id(view)])[0]
            if own != first:
                view.entries = {first if name == own else name: entry for name, entry in view.entries.items()}
                heads_here = heads[id(view)]
                heads_here[:] = [first] if is_head(first) else []
                notes.append(f"{printable(view.index.path)} calls {printable(first)} {printable(own)}: the two are tied")
        return
    for view in headed:
        _stand_in(view, names[0], heads[id(view)][0], notes)


def _stand_in(view: Seen, name: str, own: str | None, notes: list[str]) -> None:
    """Gives a view the tensor that it lacks: the one that is tied to it."""
    if own is None:
        return
    entry = view.index.entries[own]  # under the new name, which filters look at
    view.entries = {**view.entries, name: entry.named(name)}
    tied = f"it is tied to {printable(own)}, which stands in for it"
    notes.append(f"{printable(view.index.path)} has no {printable(name)}: {tied}")


def _ties(view: Seen) -> bool:
    """Whether the configuration lets a loader tie head and embeddings; a file without one does not."""
    config = read_config(view.index.path) if view.index.path.is_folder() else None
    return config is not None and tie_flag(config) is not False


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """``tie_word_embeddings``, the outermost there is at any depth; None where there is none."""
    level: list[Mapping[str, Any]] = [config]
    for _ in range(_DEEPEST):
        for each in level:
            if isinstance(each.get("tie_word_embeddings"), bool):
                return bool(each["tie_word_embeddings"])
        level = [value for each in level for value in each.values() if isinstance(value, dict)]
    return None


def _tied(view: Seen, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """The embeddings that a model without a head uses as its head."""
    return _embedding(view, shapes) if _ties(view) else None


def _embedding(view: Seen, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """The embeddings of words: by their name, else the only embeddings that have the shape of a head."""
    found = _embeddings(view)
    if len(found) == 1:
        return found[0]
    entries: Mapping[str, Source] = view.index.entries
    alike = [
        name
        for name in found or filter(_ANY_EMBEDDINGS.search, entries)
        if entries[name].spec.shape in shapes and not is_head(name)
    ]
    return alike[0] if len(alike) == 1 else None


def _embeddings(view: Seen) -> list[str]:
    """All that are called embeddings of words."""
    names = (name for name in view.index.entries if "emb" in name or "wte" in name or "shared" in name)  # quicker
    return [name for name in names if _EMBEDDINGS.search(name)]


def _heads(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(HEADS) and is_head(name)]


def _ending(head: str) -> str:
    return ".".join(head.split(".")[-2:])


def is_head(name: str) -> bool:
    """Whether a tensor is the head of a language model, in whatever module it stands."""
    return name.endswith(HEADS) and _ending(name) in HEADS and layer_of(name) is None


def is_embedding(name: str) -> bool:
    return _EMBEDDINGS.search(name) is not None or name.endswith(HEADS)


Moved = tuple[str, int, Sequence[tuple[Mapping[str, Any] | None, int]]]
"""A stack, its layers before, and for each of the output's the configuration it comes from and its number there."""


def edited_config(
    config: Mapping[str, Any],
    *,
    dtype: str | None = None,
    restacked: Sequence[Moved] = (),
    untied: bool = False,
    vocabulary: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a merged model; and the stacks whose number of layers stands nowhere in it.

    Lists with an entry for each layer follow the layers.
    """
    edited = json.loads(json.dumps(config))
    holders = [edited, *(edited[key] for key in ("text_config",) if isinstance(edited.get(key), dict))]
    for holder in holders:
        if dtype is not None:
            holder.update(dict.fromkeys([key for key in _DTYPES if key in holder], dtype))
        if (
            untied
            and holder.get("tie_word_embeddings") is not False
            and (holder is edited or "tie_word_embeddings" in holder)
        ):
            holder["tie_word_embeddings"] = False
        if vocabulary is not None and holder.get("vocab_size") == vocabulary[0]:
            holder["vocab_size"] = vocabulary[1]
    if dtype is not None and not any(key in edited for key in _DTYPES):
        edited["torch_dtype"] = dtype
    return edited, [moved[0] for moved in restacked if not _set_depth(edited, moved)]


def _set_depth(config: dict[str, Any], moved: Moved) -> bool:
    """Puts the number of layers where the configuration has it, in the part that the stack's name speaks of."""
    stack, before, layers = moved
    parts = set(re.split(r"[._]", stack))
    words = [word for word in ("encoder", "decoder") if word in parts]
    keys = [key for word in words for key in (f"{word}_layers", f"num_{word}_layers")]
    keys += [] if "decoder" in parts and any(key in config for key in keys) else list(_DEPTHS)
    where = ("vision_config",) if {"visual", "vision", "tower"} & parts else ("", "text_config")
    done = False
    for place in where:
        holder = _part(config, place)
        for key, value in holder.items():
            if key in keys and value == before and not isinstance(value, bool):
                holder[key] = len(layers)
                done = True
            elif isinstance(value, list) and len(value) == before and "layer" in key and "only" not in key:
                holder[key] = [_at(_part(theirs, place).get(key, value), layer, value[-1]) for theirs, layer in layers]
    return done


def _part(config: Mapping[str, Any] | None, place: str) -> dict[str, Any]:
    found = config if not place else (config or {}).get(place)
    return found if isinstance(found, dict) else {}


def _at(values: Any, layer: int, otherwise: Any) -> Any:
    return values[layer] if isinstance(values, list) and layer < len(values) else otherwise
