"""Other names of the same tensors: diffusion models as their authors call them, and as diffusers does.

A LoRA of Stable Diffusion 1 is called after diffusers' names, one of SDXL after the original ones, whatever the base is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_SINGLE = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("middle_block.0", "mid_block.resnets.0"),
    ("middle_block.1", "mid_block.attentions.0"),
    ("middle_block.2", "mid_block.resnets.1"),
)
_MOST_BLOCKS = 4
_OPEN_CLIP = (
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
_OPEN_CLIP_FUSED = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
_FLUX_FUSED = (
    ("double_blocks.#.img_attn.qkv", "transformer_blocks.#.attn.", ("to_q", "to_k", "to_v")),
    ("double_blocks.#.txt_attn.qkv", "transformer_blocks.#.attn.", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ("single_blocks.#.linear1", "single_transformer_blocks.#.", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
)
"""(original name, start of diffusers' names, their ends): tensors that diffusers has in parts. # is a layer's number."""
_FLUX = (
    ("double_blocks.#.img_attn.proj", "transformer_blocks.#.attn.to_out.0"),
    ("double_blocks.#.txt_attn.proj", "transformer_blocks.#.attn.to_add_out"),
    ("double_blocks.#.img_mlp.0", "transformer_blocks.#.ff.net.0.proj"),
    ("double_blocks.#.img_mlp.2", "transformer_blocks.#.ff.net.2"),
    ("double_blocks.#.txt_mlp.0", "transformer_blocks.#.ff_context.net.0.proj"),
    ("double_blocks.#.txt_mlp.2", "transformer_blocks.#.ff_context.net.2"),
    ("double_blocks.#.img_mod.lin", "transformer_blocks.#.norm1.linear"),
    ("double_blocks.#.txt_mod.lin", "transformer_blocks.#.norm1_context.linear"),
    ("single_blocks.#.linear2", "single_transformer_blocks.#.proj_out"),
    ("single_blocks.#.modulation.lin", "single_transformer_blocks.#.norm.linear"),
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
)
_FLUX_STARTS = (
    *("double_blocks.", "single_blocks.", "img_in.", "txt_in."),
    *("transformer_blocks.", "single_transformer_blocks.", "x_embedder.", "context_embedder."),
)

FLAT_BLOCKS: dict[str, tuple[str, ...]] = {
    "of Stable Diffusion's authors": ("input_blocks_", "middle_block_", "output_blocks_"),
    "of diffusers' UNet": ("down_blocks_", "mid_block_", "up_blocks_"),
    "of Flux' authors": ("double_blocks_", "single_blocks_"),
    "of diffusers' transformer": ("transformer_blocks_", "single_transformer_blocks_"),
}
"""Layout -> how names of blocks begin there, without dots."""


_THREE_BY_THREE = re.compile(
    r"(^|[._])(conv[12]?|conv_in|conv_out|in_layers[._]2|out_layers[._]3|op|input_blocks[._]0[._]0|out[._]2)$"
)
"""The end of the name of a convolution of a UNet with a kernel of 3 x 3."""


def with_kernel(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of an update [out, in * 9] as that of a convolution, if the module's name in a UNet says so."""
    if len(shape) == 2 and shape[1] % 9 == 0 and _THREE_BY_THREE.search(name):
        return shape[0], shape[1] // 9, 3, 3
    return shape


class Other(NamedTuple):
    """Another name of a tensor, or of consecutive rows of it: ``share`` is the number of the part among ``shares``.

    ``even``: whether all parts have the same number of rows; otherwise those before the last have as many as the tensor
    has columns. ``within``: the other way round, the tensor is that part of the one that is called ``name``.
    """

    name: str
    share: int = 0
    shares: int = 1
    even: bool = True
    within: bool = False


def other_names(name: str) -> Iterator[Other]:
    """Yields the names that a tensor has in other layouts. ``name``: without the part of a pipeline before it."""
    stem, dot, ending = name.rpartition(".")
    for pairs in (_original_unet(), _diffusers_unet()):
        for start, others in pairs.items():
            if stem == start or stem.startswith(f"{start}."):
                for other in others:
                    yield from _inside(other, stem[len(start) :], dot + ending)
    if match := _OPEN_CLIP_FUSED.match(name):
        for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
            yield Other(f"text_model.encoder.layers.{match[1]}.self_attn.{part}.{match[2]}", number, 3)
    elif name.startswith("transformer.resblocks."):
        yield from _replaced(name, _OPEN_CLIP)
    if name.startswith(_FLUX_STARTS):
        yield from _of_flux(stem, dot + ending)


def flat_blocks(stem: str) -> Iterator[str]:
    """Yields the names that a module of a UNet has in the other layout. ``stem``: its name with underscores for dots."""
    for pairs in (_original_unet(), _diffusers_unet()):
        for start, others in pairs.items():
            flat = start.replace(".", "_")
            if stem == flat or stem.startswith(f"{flat}_"):
                inner = stem[len(flat) :]
                for one, two in (*_RESNET, *((two, one) for one, two in _RESNET)):
                    if inner == f"_{one.replace('.', '_')}" and "attentions" not in start:
                        inner = f".{two}"
                        break
                for other in others:
                    yield (other + inner).replace(".", "_")


def _of_flux(stem: str, ending: str) -> Iterator[Other]:
    """Yields the other names of a tensor of Flux, in both directions."""
    number = next((part for part in stem.split(".") if part.isdigit()), "")
    general = stem.replace(f".{number}.", ".#.", 1) if number else stem
    for pair in _FLUX:
        for one, two in (pair, pair[::-1]):
            if general == one:
                yield Other(two.replace("#", number) + ending)
    for fused, start, parts in _FLUX_FUSED:
        for share, part in enumerate(parts):
            even = len(parts) == len(_FLUX_FUSED[0][2])
            if general == fused:
                yield Other(start.replace("#", number) + part + ending, share, len(parts), even)
            elif general == start + part:
                yield Other(fused.replace("#", number) + ending, share, len(parts), even, within=True)


def _replaced(name: str, rules: tuple[tuple[str, str], ...]) -> Iterator[Other]:
    made = name
    for pattern, other in rules:
        made = re.sub(pattern, other, made)
    if made != name:
        yield Other(made)


def _inside(start: str, inner: str, ending: str) -> Iterator[Other]:
    """Yields the name of a part of a block. The parts of a ResNet have two names each."""
    for original, theirs in _RESNET:
        for one, two in ((original, theirs), (theirs, original)):
            if inner == f".{one}" and "attentions" not in start:
                yield Other(f"{start}.{two}{ending}")
                return
    yield Other(start + inner + ending)


@cache
def _blocks() -> list[tuple[str, str]]:
    """Returns pairs (original, diffusers) of the names of the blocks of a UNet with two ResNets in each block."""
    made = list(_SINGLE)
    for block in range(_MOST_BLOCKS):
        for layer in range(2):
            place = 3 * block + layer + 1
            made.append((f"input_blocks.{place}.0", f"down_blocks.{block}.resnets.{layer}"))
            made.append((f"input_blocks.{place}.1", f"down_blocks.{block}.attentions.{layer}"))
        made.append((f"input_blocks.{3 * block + 3}.0.op", f"down_blocks.{block}.downsamplers.0.conv"))
        for layer in range(3):
            made.append((f"output_blocks.{3 * block + layer}.0", f"up_blocks.{block}.resnets.{layer}"))
            made.append((f"output_blocks.{3 * block + layer}.1", f"up_blocks.{block}.attentions.{layer}"))
        for place in (1, 2):
            made.append((f"output_blocks.{3 * block + 2}.{place}.conv", f"up_blocks.{block}.upsamplers.0.conv"))
    return made


@cache
def _original_unet() -> dict[str, list[str]]:
    """Returns original name -> diffusers' names."""
    found: dict[str, list[str]] = {}
    for original, theirs in _blocks():
        found.setdefault(original, []).append(theirs)
    return found


@cache
def _diffusers_unet() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for original, theirs in _blocks():
        found.setdefault(theirs, []).append(original)
    return found
