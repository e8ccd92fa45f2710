"""The options of all functions and commands, each described once: name, type, default, choices, description.

The command line makes its options from these classes. The Python functions make their documentation and checks from them,
and the recipe the keys that an option overrides. The functions repeat names, types and defaults in their signatures, which
editors read. A test checks that both agree.

A description names another option in backquotes and in Python's syntax: ```on_missing="base"```. The command line shows it
as ``--on-missing base``.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from streammerge.errors import RecipeError, printable
from streammerge.units import parse_bytes, parse_share, plain_number

if TYPE_CHECKING:
    from streammerge.stores.locations import PathLike

    Checkpoint = PathLike | Mapping[str, Any]

Ema = Literal["ignore", "prefer", "only"]
OnMissing = Literal["error", "base", "average-present", "drop", "union"]
OnShape = Literal["error", "base", "rows", "leading"]
Integers = Literal["first", "last", "max", "error"]
MixedDtypes = Literal["first", "promote"]
Quantise = Literal["like-base"]
Io = Literal["mmap", "pread"]
Soup = Literal["greedy"]
EMA_CHOICES: tuple[str, ...] = get_args(Ema)
IO: tuple[str, ...] = get_args(Io)
DEFAULT_MEMORY = "512MiB"
_LEAST_BUDGET = 1 << 20


class OptionKind(NamedTuple):
    """The kind of value that an option takes.

    ``words``: its description for messages. ``parse`` reads a value, and raises TypeError or ValueError for an invalid one.
    ``flag``: whether the value is true or false. ``many``: whether the command line accepts the option several times.
    ``least``: the smallest whole number.
    """

    words: str
    parse: Callable[[Any], Any]
    flag: bool = False
    many: bool = False
    least: int | None = None


class Option(NamedTuple):
    """One option. ``kind`` is None if the recipe's key of that name reads the value.

    ``otherwise``: describes the behaviour when the option is not given. ``negated``: the command line has ``--no-NAME``
    instead. ``letter``: a short name beside the long one, like ``-m``.
    """

    name: str
    annotation: str
    default: Any
    doc: str
    kind: OptionKind | None
    metavar: str
    choices: tuple[str, ...]
    otherwise: str
    negated: bool
    short: str
    overrides: bool
    letter: str

    @property
    def flag(self) -> str:
        """The option of the command line, like ``--no-resume``; ``-p`` for the parameters of a method."""
        return self.short or f"--{'no-' * self.negated}{self.name.replace('_', '-')}"

    def read(self, value: Any) -> Any:
        """Returns the parsed value. Raises RecipeError for a value that the option does not take."""
        if self.kind is None or (value is None and self.default is None):
            return value
        try:
            return self.kind.parse(value)
        except (TypeError, ValueError, OverflowError) as error:
            shown = printable(value, 60) or "an empty text"
            raise RecipeError(f"`{self.name}` takes {self.kind.words}, not {shown}") from error


def option(
    doc: str,
    kind: OptionKind | None = None,
    *,
    default: Any = None,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    otherwise: str = "",
    negated: bool = False,
    short: str = "",
    overrides: bool = False,
    letter: str = "",
) -> Any:
    """Makes a field of an options class. ``overrides``: whether it replaces the key of that name in a recipe."""
    made = {"doc": doc, "kind": kind, "metavar": metavar, "choices": choices, "otherwise": otherwise}
    return field(
        default=default, metadata=made | {"negated": negated, "short": short, "overrides": overrides, "letter": letter}
    )


class Options:
    """A group of options. Making one reads every value, and raises RecipeError for a value that an option does not take.

    Its values cannot be changed. That is written here once, because a dataclass would compile it for each group, in each
    start of a command.
    """

    def __init__(self, **given: Any) -> None:
        for name, each in options_of(type(self)).items():
            object.__setattr__(self, name, each.read(given.pop(name, each.default)))
        if given:
            raise TypeError(f"{type(self).__name__} has no option {next(iter(given))}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    @property
    def overrides(self) -> dict[str, Any]:
        """Returns the given options that replace keys of a recipe."""
        return {name: getattr(self, name) for name, each in options_of(type(self)).items() if each.overrides}


Group = TypeVar("Group", bound=Options)


def options_of(*groups: type[Options]) -> dict[str, Option]:
    """Returns the options of these classes by name."""
    found = (each for group in groups for each in fields(group))  # type: ignore[arg-type]
    return {each.name: Option(each.name, str(each.type), each.default, **each.metadata) for each in found}


def picked(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Makes the options of one class from all arguments of a function."""
    return group(**{name: given[name] for name in options_of(group) if name in given})


def _number(value: Any) -> float:
    number = float(plain_number(value))
    if isinstance(value, str | bool) or not math.isfinite(number):
        raise ValueError(value)
    return number


def _numbers(value: Any) -> list[float]:
    value = plain_number(value)
    if isinstance(value, str | bytes | Mapping):
        raise TypeError
    return [float(plain_number(each)) for each in value]


def number_or_percent(text: str) -> float:
    """Reads ``"0.6"`` or ``"60%"``. Raises ValueError for anything else."""
    text = text.strip()
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def whole(value: Any) -> int:
    """Reads a whole number, also numpy's and torch's. Raises TypeError for anything else."""
    value = plain_number(value)
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _at_least(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = whole(value)
        if number < least:
            raise ValueError(value)
        return number

    return parse


def truth(value: Any) -> bool:
    """Reads True or False, also numpy's. Raises TypeError for anything else."""
    value = plain_number(value)
    if not isinstance(value, bool):
        raise TypeError
    return value


def text(value: Any) -> str:
    """Reads a text. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError
    return value


def path(value: Any) -> str:
    """Reads a path or location as text. Expands ``~`` and keeps a final slash. Raises TypeError for anything else, and
    ValueError for a text that cannot be a name; an empty one, as of an unset variable, is not the current folder."""
    if not isinstance(value, str):
        from streammerge.stores.base import Location  # here, so that --help imports no store

        value = str(value) if isinstance(value, Location) else os.fspath(value)
    if not isinstance(value, str):
        raise TypeError
    if not value or "\0" in value:
        raise ValueError(value)
    os.fsencode(value)  # a text that is no name for the system is a ValueError too
    if value.startswith("~"):
        from streammerge.stores.locations import parse

        return parse(value).key + "/" * value.endswith("/")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(text, [value] if isinstance(value, str) else value))


def _renames(value: Any) -> dict[str, str] | tuple[str, ...] | None:
    """Texts ``FROM=TO``, or new names by pattern; None for none."""
    if isinstance(value, Mapping):
        return {text(pattern): text(name) for pattern, name in value.items()} or None
    return _texts(value) or None


def _parameters(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {text(name): each for name, each in value.items()}


def _size(value: Any) -> str | int:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    parse_bytes(value)  # its own error says how a size is written
    return value


def _budget(value: Any) -> str | int:
    size = _size(value)
    if parse_bytes(size) < _LEAST_BUDGET and str(size).strip().isdigit():
        raise RecipeError(f"`memory` takes a size with its unit: {size} means {size} bytes; write {size}MiB or {size}GiB")
    return size


def _share(value: Any) -> str | float:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    parse_share(value)
    return value


def share_of_energy(value: Any) -> float:
    number = number_or_percent(value) if isinstance(value, str) else _number(value)
    if not 0 < number <= 1:
        raise ValueError(value)
    return number


def _positive(value: Any) -> float:
    number = float(value) if isinstance(value, str) else _number(value)
    if not 0 < number < math.inf:
        raise ValueError(value)
    return number


def _one_of(choices: tuple[str, ...]) -> OptionKind:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return OptionKind(" or ".join(choices), parse)


TRUTH = OptionKind("True or False", truth, flag=True)
TEXT = OptionKind("a text", text)
PATH = OptionKind("a path", path)
COUNT = OptionKind("a positive whole number", _at_least(1), least=1)
WHOLE = OptionKind("a whole number", whole)
SIZE = OptionKind("a size like 512MiB", _size)
BUDGET = OptionKind("a size like 512MiB", _budget)
RENAMES = OptionKind("patterns and new names, like {'old.*': 'new.*'}", _renames, many=True)
PATTERNS = OptionKind("patterns like 'dvae.*'", _texts, many=True)


@dataclass(init=False, eq=False, repr=False)
class Merging(Options):
    """What is merged, and how."""

    weights: Sequence[float] | None = option(
        "One number per input; linear divides them by their sum.",
        OptionKind("one number per input, like [0.6, 0.4]", _numbers),
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
        OptionKind("a dict of names and values, like {'t': 0.3}", _parameters, many=True),
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


def _lists_of_numbers(value: Any) -> list[list[float]]:
    return [_numbers(each) for each in plain_number(value)]


@dataclass(init=False, eq=False, repr=False)
class Sweeping(Options):
    """Which merges are made, and which are kept."""

    weights: Sequence[Sequence[float]] | None = option(
        "One number per input, for each merge.",
        OptionKind("lists of one number per input, like [[0.5, 0.5], [0.6, 0.4]]", _lists_of_numbers, many=True),
        metavar="W,W,...",
    )
    parameters: Mapping[str, Any] | None = option(
        "Parameters of the method by name. A range FROM:TO:STEP and a list have a merge for each value, a range FROM:TO is "
        "drawn from; of several, all combinations are made.",
        OptionKind("a dict of names and values, like {'t': '0.2:0.8:0.1'}", _parameters, many=True),
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
        _one_of(("greedy",)),
        choices=("greedy",),
    )


@dataclass(init=False, eq=False, repr=False)
class Blending(Options):
    """How each of them is merged."""

    normalize: bool | None = option("False: use the weights as given.", TRUTH, negated=True)
    method: str | Callable[..., Any] | None = option(
        "A merge method's name, or package.module:function; a function in Python.",
        metavar="METHOD",
        otherwise="linear",
        letter="-m",
    )
    base: Checkpoint | None = option("The common ancestor, for the methods that need one.", PATH, metavar="PATH")
    seed: int | None = option("For drawn merges, and methods that draw random numbers.", WHOLE, metavar="N", otherwise="0")
    dtype: object = option("Dtype of the output's floating-point tensors.", metavar="DTYPE", otherwise="the first input's")
    compute_dtype: object = option(
        "Dtype of the arithmetic: float32 or float64.", metavar="DTYPE", otherwise="the method's"
    )


@dataclass(init=False, eq=False, repr=False)
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
        OptionKind("a number from 0 to below 1", _number),
        metavar="D",
    )


@dataclass(init=False, eq=False, repr=False)
class Naming(Options):
    """What the tensors are called."""

    rename: str | Sequence[str] | Mapping[str, str] | None = option(
        "Other names for the tensors of all inputs, like 'old.*=new.*' or '/^(.*)_g$/=\\1'.",
        RENAMES,
        metavar="FROM=TO",
        overrides=True,
    )


@dataclass(init=False, eq=False, repr=False)
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


@dataclass(init=False, eq=False, repr=False)
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
        _one_of(EMA_CHOICES),
        choices=EMA_CHOICES,
        otherwise="ignore",
        overrides=True,
    )


@dataclass(init=False, eq=False, repr=False)
class Writing(Options):
    """What is written."""

    max_shard_size: str | int | None = option(
        "Largest file of a folder.", metavar="SIZE", otherwise="as the first input, else 5GB", overrides=True
    )
    keep_optimizer: bool | None = option(
        "Keep the first input's optimizer, scheduler and scaler in a .pth.", TRUTH, overrides=True
    )
    quantise: Quantise | None = option(
        "like-base: quantise the result as the first input is, where that is fp8 in blocks or by tensor.",
        choices=get_args(Quantise),
        otherwise="off: quantised inputs become plain weights",
        overrides=True,
    )
    allow_nonfinite: bool | None = option("Write NaN and infinite values instead of stopping.", TRUTH, overrides=True)
    hash: bool = option("Put the SHA-256 of each input into the output's receipt.", TRUTH, default=False)


@dataclass(init=False, eq=False, repr=False)
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


@dataclass(init=False, eq=False, repr=False)
class Extracting(Options):
    """What the adapter holds."""

    base: Checkpoint | None = option("The model that it was trained from.", PATH, metavar="PATH")
    rank: int | None = option(
        "The most singular values of each update.", COUNT, metavar="N", otherwise="64, or all that `energy` needs"
    )
    energy: str | float | None = option(
        "As many singular values of each update as have this share of its sum of squares.",
        OptionKind("a share above 0, up to 1", share_of_energy),
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
        OptionKind("a positive number", _positive),
        metavar="A",
        otherwise="each module's rank",
    )
    dtype: object = option("Dtype of the factors.", metavar="DTYPE", otherwise="float32")


@dataclass(init=False, eq=False, repr=False)
class Replacing(Options):
    """How the output is made. None of these options changes a byte of it."""

    overwrite: bool = option("Replace a finished output.", TRUTH, default=False)
    polite: bool = option("Give the inputs' page cache back behind the cursor.", TRUTH, default=False)


@dataclass(init=False, eq=False, repr=False)
class Verifying(Options):
    """What is verified."""

    sample: str | float | None = option(
        "How much of the values is computed again; 100% for all.",
        OptionKind("a share like 5%", _share),
        metavar="SHARE",
        otherwise="5% if the inputs are available",
    )
    seed: int = option("Chooses the sample.", WHOLE, default=0, metavar="N")
    inputs: PathLike | None = option(
        "The folder that holds the inputs.", PATH, metavar="DIR", otherwise="here, or beside the output"
    )
    own_methods: bool = option("Let the recipe name methods that are your own code.", TRUTH, default=False)


@dataclass(init=False, eq=False, repr=False)
class Comparing(Options):
    """What is compared."""

    base: Checkpoint | None = option(
        "Their common ancestor C: compares what A and B have changed in it.", PATH, metavar="C"
    )


@dataclass(init=False, eq=False, repr=False)
class Resources(Options):
    """Memory, workers and the way of reading. None of these options changes a byte of the output."""

    memory: str | int = option(
        "Budget for data held at once, above start-up.", BUDGET, default=DEFAULT_MEMORY, metavar="SIZE"
    )
    workers: int | None = option("How many workers.", COUNT, metavar="N", otherwise="CPUs available")
    io: Io = option("How inputs are read; pread for network drives.", _one_of(IO), default="mmap", choices=IO)


@dataclass(init=False, eq=False, repr=False)
class Executing(Options):
    """The kind of workers. It does not change a byte of the output."""

    executor: str | Callable[[int], Any] = option(
        "The kind of workers: threads, processes, or the name of another executor; auto takes processes for much to read "
        "by more than four workers, or more than two for methods with passes; ray takes the nodes of a Ray cluster. In "
        "Python also a function from the number of workers to an executor.",
        default="auto",
        metavar="NAME",
    )
    address: str | None = option(
        'Address of the Ray cluster, for `executor="ray"`.',
        TEXT,
        metavar="HOST:PORT",
        otherwise="RAY_ADDRESS, else a cluster on this machine",
    )


@dataclass(init=False, eq=False, repr=False)
class Running(Options):
    """How the output is made. None of these options changes a byte of it."""

    overwrite: bool = option("Replace a finished output.", TRUTH, default=False)
    resume: bool = option("False: start over instead of continuing an interrupted run.", TRUTH, default=True, negated=True)
    polite: bool = option("Give the inputs' page cache back behind the cursor.", TRUTH, default=False)


@dataclass(init=False, eq=False, repr=False)
class Saving(Options):
    """What is kept of a plan."""

    save: PathLike | None = option(
        "Save the plan in this file, for the workers on several machines and for the one that finishes.",
        PATH,
        metavar="PLAN",
    )


@dataclass(init=False, eq=False, repr=False)
class Sharing(Options):
    """Which units of the plan are made."""

    share: str | None = option(
        "The share I of N, counted from 1 or from 0. With N alone, I is the task of the Slurm array or the index of the "
        "Kubernetes job.",
        TEXT,
        metavar="I/N",
        otherwise="the task of the Slurm array",
    )
    claim: bool = option(
        "Any units that are free, and those of machines that died, until all units are made.", TRUTH, default=False
    )


@dataclass(init=False, eq=False, repr=False)
class Machine(Options):
    """What this machine gives. None of these options changes a byte of the output."""

    memory: str | int | None = option(
        "Budget for data held at once, above start-up.", BUDGET, metavar="SIZE", otherwise="the plan's"
    )
    workers: int | None = option("How many workers.", COUNT, metavar="N", otherwise="the plan's, else CPUs available")
    io: Io | None = option(
        "How inputs are read; pread for network drives.", _one_of(IO), choices=IO, otherwise="the plan's"
    )
    executor: str | Callable[[int], Any] | None = option(
        "The kind of workers: threads, processes, or auto.", metavar="NAME", otherwise="the plan's"
    )
    polite: bool = option("Give the inputs' page cache back behind the cursor.", TRUTH, default=False)


@dataclass(init=False, eq=False, repr=False)
class Finishing(Options):
    """How the output is published."""

    overwrite: bool = option("Replace a finished output.", TRUTH, default=False)


@dataclass(frozen=True, eq=False, repr=False)
class Reporting(Options):
    """What is shown besides."""

    report: PathLike | None = option(
        "Write a page with pictures there, which a browser opens offline; needs streammerge[report].",
        PATH,
        metavar="FILE.html",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Gathering(Options):
    """What is gathered besides."""

    statistics: bool = option(
        "Measure how far the output lies from its inputs while merging, into OUT.statistics.json, so that a later report "
        "reads no input.",
        TRUTH,
        default=False,
    )


@dataclass(frozen=True, eq=False, repr=False)
class Showing(Options):
    """What a report shows."""

    inputs: PathLike | None = option(
        "The folder that holds the inputs.", PATH, metavar="DIR", otherwise="here, or beside the output"
    )
    compare: bool = option(
        "False: do not read the inputs, whose distances to the output are then not shown.",
        TRUTH,
        default=True,
        negated=True,
    )
    overwrite: bool = option("Replace a report.", TRUTH, default=False)


MERGE = (Merging, Choosing, Naming, Policies, Selecting, Resources, Executing, Writing, Running, Reporting, Gathering)
PLAN = (Merging, Choosing, Naming, Policies, Selecting, Resources, Executing, Writing, Saving)
CONVERT = (Converting, Naming, Selecting, Resources, Executing, Writing, Running)
EXTRACT = (Extracting, Selecting, Resources, Replacing)
VERIFY = (Verifying, Resources)
DIFF = (Comparing, Selecting, Resources, Executing, Reporting)
WORKER = (Sharing, Machine)
FINISH = (Finishing,)
SWEEP = (Sweeping, Blending, Naming, Policies, Selecting, Resources, Executing, Writing, Running)
REPORT = (Showing, Resources)
