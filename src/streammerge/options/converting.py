"""Options about what a conversion changes, and what an extracted adapter holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streammerge.options.base import OptionKind, Options, option
from streammerge.options.values import COUNT, PATH, PATTERNS, TEXT, TRUTH, energy, positive

if TYPE_CHECKING:
    from streammerge.stores.locations import PathLike

    Checkpoint = PathLike | Mapping[str, Any]


class Converting(Options):
    """What a conversion changes."""

    dtype: object = option("Recast floating-point tensors.", metavar="DTYPE", overrides=True)
    drop: str | Sequence[str] = option(
        "Leave out tensors whose names match, like 'dvae.*'.", PATTERNS, default=(), metavar="PATTERN"
    )
    keep: str | Sequence[str] = option("Keep only tensors whose names match.", PATTERNS, default=(), metavar="PATTERN")
    strip_prefix: str = option(
        "Removed from the names that begin with it.", TEXT, default="", metavar="PREFIX", overrides=True
    )
    like: PathLike | None = option(
        "Put the tensors into this checkpoint's container: its names, order, dtypes and all that it holds besides.",
        PATH,
        metavar="PATH",
    )
    only: str | None = option(
        "Which state dict a .pth keeps; it leaves out the others, and the state of the training.", TEXT, metavar="KEY.PATH"
    )
    extras: PathLike | None = option("Write what is not a tensor there, readable.", PATH, metavar="FILE.json")


class Extracting(Options):
    """What the adapter holds."""

    base: Checkpoint | None = option("The model that it was trained from.", PATH, metavar="PATH")
    rank: int | None = option(
        "The most singular values of each update.", COUNT, metavar="N", otherwise="64, or all that `energy` needs"
    )
    energy: str | float | None = option(
        "As many singular values of each update as have this share of its sum of squares.",
        OptionKind("a share above 0, up to 1", energy),
        metavar="SHARE",
    )
    target: str | Sequence[str] = option(
        "Only modules with these names or last parts of names, like q_proj or '*.mlp.*'. Also decomposes embeddings and "
        "heads that are named.",
        PATTERNS,
        default=(),
        metavar="PATTERN",
    )
    exclude: str | Sequence[str] = option("No modules with these names.", PATTERNS, default=(), metavar="PATTERN")
    save_modules: bool = option(
        "Store modules whole that differ and have no factors: norms, biases, embeddings, heads.", TRUTH, default=False
    )
    alpha: str | float | None = option(
        "lora_alpha of the adapter. The factors are scaled so that the updates stay.",
        OptionKind("a positive number", positive),
        metavar="A",
        otherwise="each module's rank",
    )
    dtype: object = option("Dtype of the factors.", metavar="DTYPE", otherwise="float32")
