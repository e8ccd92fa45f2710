"""Options about what is merged, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from streammerge.options.base import OptionKind, Options, option
from streammerge.options.values import COUNT, PATH, RENAMES, TEXT, TRUTH, number, numbers, parameters

if TYPE_CHECKING:
    from streammerge.stores.locations import PathLike

    Checkpoint = PathLike | Mapping[str, Any]


OnMissing = Literal["error", "base", "average-present", "drop", "union"]
OnShape = Literal["error", "base", "rows", "leading"]
Integers = Literal["first", "last", "max", "error"]
MixedDtypes = Literal["first", "promote"]


class Merging(Options):
    """What is merged, and how."""

    weights: Sequence[float] | None = option(
        "One number per input; linear divides them by their sum.",
        OptionKind("one number per input, like [0.6, 0.4]", numbers),
        metavar="W,W,...",
        otherwise="equal",
    )
    normalize: bool | None = option("False: use the weights as given.", TRUTH, negated=True)
    method: str | Callable[..., Any] | None = option(
        "A merge method's name, or package.module:function; a function in Python.",
        metavar="METHOD",
        otherwise="linear",
        letter="-m",
    )
    base: Checkpoint | None = option("The common ancestor, for the methods that need one.", PATH, metavar="PATH")
    parameters: Mapping[str, Any] | None = option(
        "Parameters of the method by name; a list of values has one per input.",
        OptionKind("a dict of names and values, like {'t': 0.3}", parameters, many=True),
        metavar="NAME=VALUE,...",
        short="-p",
    )
    seed: int | None = option("For the methods that draw random numbers.", metavar="N", otherwise="0", overrides=True)
    dtype: object = option(
        "Dtype of the output's floating-point tensors.", metavar="DTYPE", otherwise="the first input's", overrides=True
    )
    out_dtype: object = option("The same; wins over `dtype`.", metavar="DTYPE", overrides=True)
    compute_dtype: object = option(
        "Dtype of the arithmetic: float32 or float64.", metavar="DTYPE", otherwise="the method's", overrides=True
    )
    own_methods: bool = option("Let a recipe name methods that are your own code.", TRUTH, default=False)
    convert_first: PathLike | None = option(
        "Convert each input into this folder, keep it, and merge from there.", PATH, metavar="DIR"
    )
    card: bool | None = option(
        "False: write no model card (README.md) into a folder that a library of the hub loads.",
        TRUTH,
        negated=True,
        overrides=True,
    )


class Choosing(Options):
    """Which of the inputs are merged."""

    last: int | None = option("Only the numerically last N inputs.", COUNT, metavar="N")
    range: str | None = option(
        "Only inputs with a number from FROM to TO in their name, both included.", TEXT, metavar="FROM:TO"
    )
    best: int | None = option("Only the best N inputs, by `by`.", COUNT, metavar="N")
    by: str | None = option("A number in the files, like model_loss.eval_loss; lowest first.", TEXT, metavar="KEY")
    highest: bool = option("With `best`: highest first.", TRUTH, default=False)
    schedule: str | None = option(
        "Weights of a run's checkpoints, oldest first, that stand in for a decay of the learning rate: linear (a plain "
        "mean), minus-sqrt, cosine, wma (1, 2, 3, ...) or ema:0.99.",
        TEXT,
        metavar="NAME",
    )
    ema_decay: float | None = option(
        "The same as schedule ema:D.",
        OptionKind("a number from 0 to below 1", number),
        metavar="D",
    )


class Naming(Options):
    """What the tensors are called."""

    rename: str | Sequence[str] | Mapping[str, str] | None = option(
        "Other names for the tensors of all inputs, like 'old.*=new.*' or '/^(.*)_g$/=\\1'.",
        RENAMES,
        metavar="FROM=TO",
        overrides=True,
    )


class Policies(Options):
    """The handling of tensors that do not fit together."""

    on_missing: OnMissing | None = option(
        "Tensors that are not in every input.", choices=get_args(OnMissing), otherwise="error", overrides=True
    )
    on_shape: OnShape | None = option(
        "Tensors whose shapes differ.", choices=get_args(OnShape), otherwise="error", overrides=True
    )
    integers: Integers | None = option(
        "Integer tensors that differ.",
        choices=get_args(Integers),
        otherwise="max for num_batches_tracked, else error",
        overrides=True,
    )
    mixed_dtypes: MixedDtypes | None = option(
        "Tensors that have several floating-point dtypes in the inputs: the first input's dtype, or the smallest that "
        "holds all of them.",
        choices=get_args(MixedDtypes),
        otherwise="first; promote in a recipe, as in mergekit",
        overrides=True,
    )
    strict: bool = option(
        "Refuse a merge that leaves any tensor of an input unused, or whose configuration and tensors disagree. "
        "What a rule leaves out and the state of a training do not count.",
        TRUTH,
        default=False,
    )
    unsafe_truncate_embeddings: bool | None = option(
        "Cut embeddings and heads to the rows that all models have. Right only if equal rows are of equal tokens; "
        "`tokenizer_source` brings rows into one order.",
        TRUTH,
        overrides=True,
    )
    tokenizer_source: str | None = option(
        "Whose tokenizer the output has: base, union, or a model. Rows of embeddings follow the tokens.",
        TEXT,
        metavar="MODEL",
        otherwise="the files of the first input, and rows as they are",
        overrides=True,
    )
    chat_template: str | None = option(
        "Chat template of the output: auto (the commonest among the inputs), alpaca, chatml, exaone, llama3, mistral, or "
        "Jinja text.",
        TEXT,
        metavar="NAME",
        otherwise="the first input's",
        overrides=True,
    )
