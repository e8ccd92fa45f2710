"""What a Hugging Face folder says beside its tensors: the configuration, and a head that is tied to the embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from streammerge.errors import printable
from streammerge.formats.safetensors import load_json
from streammerge.storage import file_size, read_full
from streammerge.tensors import TensorEntry

CONFIG = "config.json"
_MOST_CONFIG_BYTES = 16 << 20
HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_DTYPES = ("dtype", "torch_dtype")


class Seen(Protocol):
    """A view of a checkpoint (parts.View)."""

    index: Any
    entries: dict[str, TensorEntry]


def read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json; None where there is none that can be read."""
    return read_side_json(folder / CONFIG, _MOST_CONFIG_BYTES)


def read_side_json(path: Path, most_bytes: int) -> dict[str, Any] | None:
    """The mapping in a JSON file that may be beside a checkpoint; None where there is none that can be read."""
    if not path.is_file() or file_size(path) > most_bytes:
        return None
    try:
        content = load_json(read_full(path, 0, file_size(path)).decode("utf-8"))
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
                view.entries = {**view.entries, head: view.index.entries[embedding]}
                tied = f"it is tied to {printable(embedding)}, which stands in for it"
                notes.append(f"{printable(view.index.path)} has no {head}: {tied}")


def _tied(view: Seen) -> str | None:
    """The embeddings that a model without a head uses as its head."""
    config = read_config(view.index.path) if view.index.path.is_dir() else None
    if config is None or config.get("tie_word_embeddings", True) is False:
        return None
    found = [name for name in view.index.entries if _EMBEDDINGS.search(name)]
    return found[0] if len(found) == 1 else None


def is_embedding(name: str) -> bool:
    return _EMBEDDINGS.search(name) is not None or name.endswith(HEADS)


def edited_config(
    config: Mapping[str, Any],
    *,
    dtype: str | None = None,
    restacked: Sequence[tuple[str, int, list[int]]] = (),
    untied: bool = False,
    vocabulary: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a merged model; and the stacks whose number of layers stands nowhere in it.

    ``restacked``: (stack, layers before, which of them the output has). Lists with an entry for each layer follow them.
    """
    edited = json.loads(json.dumps(config))
    if dtype is not None:
        present = [key for key in _DTYPES if key in edited] or ["torch_dtype"]
        edited |= dict.fromkeys(present, dtype)
    if untied:
        edited["tie_word_embeddings"] = False
    if vocabulary is not None:
        for holder in (edited, edited.get("text_config")):
            if isinstance(holder, dict) and holder.get("vocab_size") == vocabulary[0]:
                holder["vocab_size"] = vocabulary[1]
    return edited, [stack for stack, before, layers in restacked if not _set_depth(edited, stack, before, layers)]


def _set_depth(config: dict[str, Any], stack: str, before: int, layers: list[int]) -> bool:
    """Puts the number of layers where the configuration has it, in the part that the stack's name speaks of."""
    parts = set(re.split(r"[._]", stack))
    words = [word for word in ("encoder", "decoder") if word in parts]
    keys = [key for word in words for key in (f"{word}_layers", f"num_{word}_layers")]
    keys += [] if "decoder" in parts and any(key in config for key in keys) else list(_DEPTHS)
    vision = bool({"visual", "vision", "tower"} & parts)
    nested = [config.get("vision_config")] if vision else [config, config.get("text_config")]
    done = False
    for holder in nested:
        if not isinstance(holder, dict):
            continue
        for key in keys:
            if holder.get(key) == before and not isinstance(holder[key], bool):
                holder[key] = len(layers)
                done = True
        for key, value in holder.items():
            if isinstance(value, list) and len(value) == before and "layer" in key:
                holder[key] = [value[layer] for layer in layers]
    return done
