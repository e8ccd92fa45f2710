"""What a Hugging Face folder says beside its tensors: the configuration, and a head that is tied to the embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from streammerge.errors import printable
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.strict_json import load_json

CONFIG = "config.json"
_MOST_CONFIG_BYTES = 16 << 20
HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_DTYPES = ("dtype", "torch_dtype")


class Seen(Protocol):
    """A view of a checkpoint (parts.View)."""

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
    """Where some models have an output head and others share it with the embeddings, gives those their embeddings as head.

    Only in folders, whose configuration does not deny it. ``wanted``: names that the output should have in any case.
    """
    for head in HEADS:
        holders = [view for view in views if head in view.entries]
        for view in views if holders or head in wanted else ():
            embedding = None if head in view.entries else _tied(view)
            if embedding is not None:
                entry = view.index.entries[embedding]  # by the head's name, which filters look at
                view.entries = {**view.entries, head: entry.named(head)}
                tied = f"it is tied to {printable(embedding)}, which stands in for it"
                notes.append(f"{printable(view.index.path)} has no {head}: {tied}")


def _tied(view: Seen) -> str | None:
    """The embeddings that a model without a head uses as its head."""
    config = read_config(view.index.path) if view.index.path.is_folder() else None
    if config is None or config.get("tie_word_embeddings", True) is False:
        return None
    found = [name for name in view.index.entries if _EMBEDDINGS.search(name)]
    return found[0] if len(found) == 1 else None


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
