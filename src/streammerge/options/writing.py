"""Options about what is written, and over what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from streammerge.options.base import Options, option
from streammerge.options.values import PATH, TRUTH

if TYPE_CHECKING:
    from streammerge.stores.locations import PathLike


Quantise = Literal["like-base"]


class Writing(Options):
    """What is written."""

    max_shard_size: str | int | None = option(
        "Largest file of a folder.", metavar="SIZE", otherwise="as the first input, else 5GB", overrides=True
    )
    keep_optimizer: bool | None = option(
        "Keep the first input's optimizer, scheduler and scaler in a .pth.", TRUTH, overrides=True
    )
    quantise: Quantise | None = option(
        "like-base: quantise the result as the first input is, where that is fp8 or int8 with scales (no zero points).",
        choices=get_args(Quantise),
        otherwise="off: quantised inputs become plain weights",
        overrides=True,
    )
    allow_nonfinite: bool | None = option("Write NaN and infinite values instead of stopping.", TRUTH, overrides=True)
    hash: bool = option("Put the SHA-256 of each input into the output's receipt.", TRUTH, default=False)


class Running(Options):
    """How the output is made. None of these options changes a byte of it."""

    overwrite: bool = option("Replace a finished output.", TRUTH, default=False)
    resume: bool = option("False: start over instead of continuing an interrupted run.", TRUTH, default=True, negated=True)
    polite: bool = option("Give the inputs' page cache back behind the cursor.", TRUTH, default=False)


class Replacing(Options):
    """How the output is made. None of these options changes a byte of it."""

    overwrite: bool = option("Replace a finished output.", TRUTH, default=False)
    polite: bool = option("Give the inputs' page cache back behind the cursor.", TRUTH, default=False)


class Saving(Options):
    """What is kept of a plan."""

    save: PathLike | None = option(
        "Save the plan in this file, for the workers on several machines and for the one that finishes.",
        PATH,
        metavar="PLAN",
    )


class Finishing(Options):
    """How the output is published."""

    overwrite: bool = option("Replace a finished output.", TRUTH, default=False)
