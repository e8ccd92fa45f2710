"""Options about many merges of the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from streammerge.options.base import OptionKind, Options, option
from streammerge.options.merging import Merging
from streammerge.options.values import COUNT, TEXT, TRUTH, WHOLE, lists_of_numbers, one_of, parameters

if TYPE_CHECKING:
    from streammerge.stores.locations import PathLike

    Checkpoint = PathLike | Mapping[str, Any]


Soup = Literal["greedy"]


class Sweeping(Options):
    """Which merges are made, and which are kept."""

    weights: Sequence[Sequence[float]] | None = option(
        "One number per input, for each merge; of a recipe, per model, in each list of models.",
        OptionKind("lists of one number per input, like [[0.5, 0.5], [0.6, 0.4]]", lists_of_numbers, many=True),
        metavar="W,W,...",
    )
    parameters: Mapping[str, Any] | None = option(
        "Parameters of the method by name. A range FROM:TO:STEP and a list have a merge for each value, a range FROM:TO is "
        "drawn from; of several, all combinations are made. Of a recipe, these are its own `parameters`; rules, models, "
        "slices and modules keep theirs.",
        OptionKind("a dict of names and values, like {'t': '0.2:0.8:0.1'}", parameters, many=True),
        metavar="NAME=VALUE",
        short="-p",
    )
    random: int | None = option("Draw N merges with `seed`: from the ranges, or weights that sum to 1.", COUNT, metavar="N")
    epochs: str | None = option(
        "Plain means of the last inputs up to these numbers in their names, like 20:30.", TEXT, metavar="FROM:TO[:STEP]"
    )
    averages: str | None = option("How many inputs each of these means takes, like 1:5.", TEXT, metavar="FROM:TO[:STEP]")
    score: str | Callable[[str], Any] | None = option(
        "Your own evaluation: a command with {} in place of an output, whose last number is the score. In Python also a "
        "function of the output's name.",
        metavar="COMMAND",
    )
    lowest: bool = option("Lower scores are better, as of losses and error rates.", TRUTH, default=False)
    keep: str | int | None = option("Keep only the N outputs with the best scores.", metavar="best:N", otherwise="all")
    soup: Soup | None = option(
        "Add the inputs to a mean in the order of their scores, each only if the score does not get worse.",
        one_of(("greedy",)),
        choices=("greedy",),
    )


class Blending(Options):
    """How each of them is merged."""

    normalize: bool | None = Merging.normalize
    method: str | Callable[..., Any] | None = Merging.method
    base: Checkpoint | None = Merging.base
    seed: int | None = option("For drawn merges, and methods that draw random numbers.", WHOLE, metavar="N", otherwise="0")
    dtype: object = option("Dtype of the output's floating-point tensors.", metavar="DTYPE", otherwise="the first input's")
    out_dtype: object = Merging.out_dtype
    compute_dtype: object = option(
        "Dtype of the arithmetic: float32 or float64.", metavar="DTYPE", otherwise="the method's"
    )
    own_methods: bool = Merging.own_methods
    card: bool | None = Merging.card
