"""The head of a language model, which may be tied to the embeddings of words."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from streammerge.checkpoints.config import config_folder, is_model_config, read_config, tie_flag
from streammerge.errors import printable
from streammerge.sources.base import Source
from streammerge.sources.table import StoredTable
from streammerge.stores.base import Location
from streammerge.tensors.layers import layer_of

HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight")
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|backbone\.embeddings?)\.weight$|^(model\.)?shared\.weight$"
)
_TABLE = re.compile(r"(?P<stem>(.*\.)?)(encoder|decoder)\.embed_tokens\.weight")
_COPIED_BIAS = re.compile(r"(?P<stem>(.*\.)?(predictions|lm_head)\.)decoder\.bias")
_COPY = re.compile(
    r"(^|\.)((encoder|decoder)\.embed_tokens|(predictions|lm_head)\.decoder|vocab_projector|generator_lm_head)\."
    r"(weight|bias)$"
)
_COPY_WORDS = ("embed_tokens", "decoder.", "vocab_projector", "generator_lm_head")
"""One of them is in each name that the pattern finds. A search for words is quicker, and most names have none."""
_ANY_EMBEDDINGS = re.compile(r"^(?!.*(pos|type|patch)).*(emb|shared\.weight$)")


class Seen(Protocol):
    """A view of a checkpoint (planning.views.View)."""

    index: Any
    entries: Mapping[str, Source]


def tie_head(views: Sequence[Seen], notes: list[str], wanted: Collection[str] = ()) -> None:
    """Gives every model an output head and embeddings, if some models store two tensors and others store one tensor for
    both.

    Only for folders whose configuration does not forbid it. ``wanted``: names that the output should have in any case.
    """
    _tie_tables(views, notes)
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


def _tie_tables(views: Sequence[Seen], notes: list[str]) -> None:
    """Gives every model the copies of tied tensors that some store: the tables of encoder and decoder beside the one that
    both share (T5, BART), and the heads of masked language models with their bias.

    A model without them gets the tensors that they are tied to, because its loader does the same.
    """
    for name in dict.fromkeys(name for names in _different(views) for name in names if _may_be_copy(name)):
        if not _COPY.search(name):
            continue
        table, bias = _TABLE.fullmatch(name), _COPIED_BIAS.fullmatch(name)
        if table is None and not all(map(_ties, views)):
            continue
        shapes = [view.entries[name].spec.shape for view in views if name in view.entries]
        for view in views:
            config = read_config(config_folder(view.index.path)) if name not in view.entries else None
            if config is None or not is_model_config(config.tree):
                continue
            own = f"{table['stem']}shared.weight" if table else bias["stem"] + "bias" if bias else _embedding(view, shapes)
            if own is not None and own in view.entries and view.entries[own].spec.shape in shapes:
                _stand_in(view, name, own, notes)


def _different(views: Sequence[Seen]) -> list[Iterable[str]]:
    """Returns the names of each view, those that are held once for several views once."""
    tables = [view.entries.names if isinstance(view.entries, StoredTable) else view.entries for view in views]
    return list({id(names): names for names in tables}.values())


def _may_be_copy(name: str) -> bool:
    return any(word in name for word in _COPY_WORDS)


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
    """Whether the configuration lets a loader tie head and embeddings. False for a file without one."""
    config = read_config(config_folder(view.index.path))
    return config is not None and not config.unread and tie_flag(config.tree) is not False


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
    return list(filter(_is_called_embedding, view.index.entries))


def _heads(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(HEADS) and is_head(name)]


def _ending(head: str) -> str:
    return ".".join(head.split(".")[-2:])


def is_head(name: str) -> bool:
    """Whether a tensor is the head of a language model, in whatever module it stands."""
    return name.endswith(HEADS) and _ending(name) in HEADS and layer_of(name) is None


def is_embedding(name: str) -> bool:
    return _is_called_embedding(name) or name.endswith(HEADS)


def _is_called_embedding(name: str) -> bool:
    # a search for words is quicker than the pattern, and this is asked of every tensor
    return ("emb" in name or "wte" in name or "shared" in name) and _EMBEDDINGS.search(name) is not None


def loader_ties(path: Location) -> Callable[[str, str], bool]:
    """Returns whether the loader of a checkpoint's folder makes two tensors one, so that a file needs only one of them.

    Loaders tie what the word embeddings are tied to, and only where the configuration does not deny it. An unnecessary
    copy does no harm, because a loader reads it and then ties it.
    """
    config = read_config(config_folder(path))
    ties = config is not None and is_model_config(config.tree) and tie_flag(config.tree) is not False

    def tied(name: str, other: str) -> bool:
        outside = layer_of(name) is None and layer_of(other) is None
        return ties and outside and (is_embedding(name) or is_embedding(other))

    return tied


def tied_embedding(index: Any) -> str | None:
    """Returns the embeddings of words that the model in an index uses as its head too; None if it has another head."""
    found = [
        name for name in index.entries if ("emb" in name or "wte" in name or "shared" in name) and _EMBEDDINGS.search(name)
    ]
    config = read_config(config_folder(index.path))
    ties = config is not None and not config.unread and tie_flag(config.tree) is not False
    return found[0] if ties and len(found) == 1 else None
