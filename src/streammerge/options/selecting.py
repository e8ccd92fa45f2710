"""Options about which tensors of a file are the weights."""

from __future__ import annotations

from typing import Literal, get_args

from streammerge.options.base import Options, option
from streammerge.options.values import TEXT, one_of

Ema = Literal["ignore", "prefer", "only"]
EMA_CHOICES: tuple[str, ...] = get_args(Ema)


class Selecting(Options):
    """Which tensors of a file are the weights."""

    state_dict: str | None = option(
        "Which state dict of a wrapped file, its keys joined with dots.",
        TEXT,
        metavar="KEY.PATH",
        otherwise="found by itself",
        overrides=True,
    )
    ema: Ema | None = option(
        "Averaged weights beside plain ones. A .pth keeps and merges every copy; averages that are asked for replace the "
        "plain weights in it.",
        one_of(EMA_CHOICES),
        choices=EMA_CHOICES,
        otherwise="ignore",
        overrides=True,
    )
