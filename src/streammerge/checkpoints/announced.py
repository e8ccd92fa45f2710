"""What a configuration announces and the tensors beside it do not have: layers, vocabulary, head, parts of a model.

Only what every loader of transformers needs is compared, and only in configurations of transformers: a false alarm would
refuse a sound model where a merge is strict.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from streammerge.checkpoints.config import CONFIG, Tree, is_model_config, mappings, tie_flag
from streammerge.checkpoints.config_keys import ALL_EXTRA_LAYERS, DEPTHS, PARTS, SHARED_LAYERS
from streammerge.checkpoints.heads import is_embedding, is_head
from streammerge.errors import listed, printable
from streammerge.tensors.layers import divided
from streammerge.tensors.spec import TensorSpec

_WORDS = {
    "vision": re.compile(r"vis|vit\b|image|img|siglip|clip|vpm|patch|pixel|video"),
    "audio": re.compile(r"audio|speech|sound|apm|whisper|wav|mel|codec"),
}
"""Words of tensors' names that tell of a part of a model."""
_EXTRA = re.compile(r"mtp|nextn|predict")
_OTHER_PARTS = re.compile("vis|audio|speech|image|siglip")


def unannounced(tree: Tree, specs: Mapping[str, TensorSpec], tied: Collection[str] = ()) -> list[str]:
    """Returns a clause for each thing in which a configuration and tensors disagree.

    ``specs``: name -> dtype and shape. ``tied``: names of tensors that are stored under another name.
    """
    if not specs or not is_model_config(tree):
        return []
    found, outside = divided(specs)
    return [*_layers(tree, specs, found), *_extra(tree, specs, found), *_vocabulary(tree, specs, outside, tied)]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _layers(tree: Tree, specs: Mapping[str, TensorSpec], found: Mapping[str, int]) -> Iterator[str]:
    for path, each in mappings(tree):
        part = _part(path)
        own = [each[key] for key in DEPTHS if _is_count(each.get(key))]
        if part and not any(map(_WORDS[part].search, specs)) and not set(own) & set(found.values()):
            yield f"{CONFIG} announces {'.'.join(path)}, and no tensor belongs to a part for {part}"
            continue
        if not found or any(key in each or key in tree for key in SHARED_LAYERS):
            continue
        more = {each[key] for key in ALL_EXTRA_LAYERS if _is_count(each.get(key))}
        inside = {stack: depth for stack, depth in found.items() if bool(_OTHER_PARTS.search(stack)) == bool(part)}
        there = set((inside or found).values())
        for key in DEPTHS:
            value = each.get(key)
            if _is_count(value) and there.isdisjoint({value, *(value + extra for extra in more)}):
                shown = [f"{stack} {depth}" for stack, depth in (inside or found).items()]
                yield f"{CONFIG} says {'.'.join((*path, key))} {value}, and the tensors have {listed(shown, 3)}"


def _part(path: tuple[str, ...]) -> str:
    """Returns the part of a model that a mapping of a configuration describes, "" for the text."""
    words = (PARTS.get(word) for key in path for word in re.split(r"[_\d]+", key.lower()))
    return next((word for word in words if word in _WORDS), "")


def _extra(tree: Tree, specs: Mapping[str, TensorSpec], found: Mapping[str, int]) -> Iterator[str]:
    for path, each in mappings(tree):
        for key in ALL_EXTRA_LAYERS:
            value = each.get(key)
            if not _is_count(value):
                continue
            whole = {each[depth] + value for depth in DEPTHS if _is_count(each.get(depth))}
            if whole.isdisjoint(found.values()) and not any(map(_EXTRA.search, specs)):
                yield (
                    f"{CONFIG} announces layers that predict further tokens ({'.'.join((*path, key))} {value}), and no "
                    "tensor belongs to them"
                )


def _vocabulary(
    tree: Tree, specs: Mapping[str, TensorSpec], outside: Sequence[str], tied: Collection[str]
) -> Iterator[str]:
    sizes = {each["vocab_size"] for _, each in mappings(tree) if _is_count(each.get("vocab_size"))}
    if any("pad_vocab" in key for _, each in mappings(tree) for key in each):
        sizes = set()  # the loader rounds the number up
    words = {name: specs[name] for name in outside if is_embedding(name)}
    plain = {name: spec for name, spec in words.items() if spec.dtype.kind == "float" and len(spec.shape) == 2}
    wrong = {name: spec.shape[0] for name, spec in plain.items() if sizes and spec.shape[0] not in sizes}
    if wrong:
        name, rows = next(iter(wrong.items()))
        yield f"{CONFIG} says vocab_size {listed(sorted(map(str, sizes)))}, and {printable(name)} has {rows} rows"
    embeddings = [name for name in plain if not is_head(name)]
    heads = [name for name in plain if is_head(name)]
    if len(embeddings) != 1:
        return
    flag, shape = tie_flag(tree), plain[embeddings[0]].shape
    architectures = tree.get("architectures")
    causal = isinstance(architectures, list) and any(str(each).endswith("ForCausalLM") for each in architectures)
    if (
        flag is False
        and causal
        and not heads
        and not any(specs[name].shape in (shape, shape[:1]) for name in outside if name != embeddings[0])
    ):
        yield f"{CONFIG} says that the head is not tied to {printable(embeddings[0])}, and there is no head"
    separate = [name for name in heads if name not in tied and embeddings[0] not in tied]
    if flag is True and separate:
        tied_to, head = printable(embeddings[0]), printable(separate[0])
        yield f"{CONFIG} says that the head is tied to {tied_to}, and {head} is stored too"
